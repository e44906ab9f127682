"""HID, the hierarchical instrument-decoupled token stream: vocabulary, encoding, grammar, annotations. No torch."""

from meloformer.hid.annotate import Annotations, annotate, find_segments
from meloformer.hid.grammar import GrammarError, StreamState
from meloformer.hid.quantize import quantize
from meloformer.hid.tokenizer import Tokenizer
from meloformer.hid.vocabulary import ENDS_CELL, OPENS_CELL, Family, Vocabulary

__all__ = [
    "ENDS_CELL",
    "OPENS_CELL",
    "Annotations",
    "Family",
    "GrammarError",
    "StreamState",
    "Tokenizer",
    "Vocabulary",
    "annotate",
    "find_segments",
    "quantize",
]
