"""The transformer: attention rule, layers, model and KV cache."""

from meloformer.model.cache import DecodingSession
from meloformer.model.transformer import Inputs, MeloFormer

__all__ = ["DecodingSession", "Inputs", "MeloFormer"]
