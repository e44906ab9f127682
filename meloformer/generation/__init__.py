"""New music from a trained model: constraints from the grammar and the request, sampling, the decoding engine."""

from meloformer.generation.engine import Sample, generate
from meloformer.generation.request import Request
from meloformer.generation.sampling import Sampling
from meloformer.generation.steering import Part, Steering

__all__ = ["Part", "Request", "Sample", "Sampling", "Steering", "generate"]
