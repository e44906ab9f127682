"""From a folder of MIDI to rows that a model reads: shards, windows, augmentation, packing, batches. No torch here."""

from meloformer.data.arrays import DataError
from meloformer.data.corpus import Corpus
from meloformer.data.loader import Step, batches, num_targets, steps_in
from meloformer.data.packing import Document, RowPlan

__all__ = ["Corpus", "DataError", "Document", "RowPlan", "Step", "batches", "num_targets", "steps_in"]
