"""Real packed rows for the benchmarks: `packed_rows(data_dir, max_seq_len, count)`, the same ones each time."""

from __future__ import annotations

import numpy as np

from meloformer.config import DataConfig
from meloformer.data.loader import Corpus, RowPlan

_DEFER = ("rectangle", "continuation", "track", "scattered")


def packed_rows(
    data_dir: str, max_seq_len: int, count: int, single_piece: bool = False, deferred: bool = True
) -> list[dict[str, np.ndarray]]:
    """Up to `count` rows as training draws them, or with nothing deferred, or of one piece that fills 80 % of it."""
    undeferred = {} if deferred and not single_piece else {f"defer_{name}_probability": 0.0 for name in _DEFER}
    config = DataConfig(data_dir=data_dir, max_seq_len=max_seq_len, **undeferred)
    plan, rows = RowPlan(Corpus(data_dir), config, 0, 0, "train"), []
    for index in np.random.default_rng(0).permutation(plan.num_rows):
        row, documents = plan.row(int(index))
        if not single_piece or (len(documents) == 1 and (row["document"] >= 0).mean() > 0.8):
            rows.append(row)
        if len(rows) == count:
            break
    return rows
