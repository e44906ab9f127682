"""From a folder of MIDI to rows that a model reads: shards, windows, augmentation, packing, batches. No torch here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meloformer.data.arrays import DataError
    from meloformer.data.corpus import Corpus
    from meloformer.data.loader import Step, batches, num_targets, steps_in
    from meloformer.data.packing import Document, RowPlan

__all__ = ["Corpus", "DataError", "Document", "RowPlan", "Step", "batches", "num_targets", "steps_in"]
_MODULES = {"Corpus": "corpus", "DataError": "arrays", "Document": "packing", "RowPlan": "packing"}


def __getattr__(name: str):
    # Imported when it is asked for: a worker of preprocessing, of which there may be dozens, needs no loader.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'loader')}"), name)
