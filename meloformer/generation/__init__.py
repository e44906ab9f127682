"""New music from a trained model: constraints from the grammar and the request, sampling, the decoding engine."""

from meloformer.generation.engine import Sample, generate
from meloformer.generation.request import Request
from meloformer.generation.sampling import Sampling

__all__ = ["Request", "Sample", "Sampling", "generate"]
