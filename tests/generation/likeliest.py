"""What the likeliest token is, slowly, and a model that has a preference."""

from __future__ import annotations

import numpy as np
import torch

from meloformer.hid import Family
from meloformer.model import MeloFormer
from tests.hid.streams import VOCABULARY


def decided(model: MeloFormer) -> MeloFormer:
    """The model with logits of some size. At first all tokens are about as likely, so one of the 130 that end a bar is
    likelier than any note."""
    with torch.no_grad():
        model.token.weight *= 20
    return model


def likeliest(logits: np.ndarray, allowed: np.ndarray) -> int:
    """The most probable allowed token, where what may end a bar has the share of all that does."""
    p = np.exp(logits.astype(np.float64))
    ends = [f in (Family.BAR, Family.INSTRUMENT, Family.FILL, Family.EOS) for f in VOCABULARY.family_of.tolist()]
    all_ends = sum(x for x, end in zip(p, ends) if end)
    its_ends = sum(x for x, end, ok in zip(p, ends, allowed) if end and ok)
    shares = [(x * all_ends / its_ends if end else x) if ok else -1.0 for x, end, ok in zip(p, ends, allowed)]
    return int(np.argmax(shares))
