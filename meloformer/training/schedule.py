"""The learning rate as a plain function of the step: linear warm-up, then a cosine down to `min_lr`.

>>> [round(learning_rate(s, 1e-3, 1e-4, 2, 6), 6) for s in range(7)]
[0.0005, 0.001, 0.001, 0.000868, 0.00055, 0.000232, 0.0001]

The cosine is that of Loshchilov and Hutter 2017 (arXiv 1608.03983, equation 5), without restarts. Nothing is remembered
between steps, so resuming has nothing to restore but `max_steps`, which a run fixes at its start.
"""

from __future__ import annotations

import math


def learning_rate(step: int, peak: float, min_lr: float, warmup_steps: int, max_steps: int) -> float:
    """Rate of the update number `step` (from 0): `peak` at the end of the warm-up, `min_lr` from `max_steps` on."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(max_steps - warmup_steps, 1), 1.0)
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
