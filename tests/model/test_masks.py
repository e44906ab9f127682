"""The attention rule against DESIGN.md, section 4, read out sentence by sentence for each pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meloformer.config import ModelConfig
from meloformer.hid import Family
from meloformer.model.masks import AttentionRule, dense_mask, joint_fields, row_mask
from tests.hid.streams import random_stream
from tests.model.music import batch_of, real_streams, rich_stream, with_deferred_bars

LETTER = {Family.TIME: "T", Family.PITCH: "P", Family.DURATION: "L", Family.VELOCITY: "V"}
CONFIGS = {
    "default": {},
    "near-linear": {"same_bar_offsets": [0, 1, 2, 4, 8], "cross_bar_offsets": [-1, 0, 3]},
    "no type rule": {"visible": None},
    "a type that sees none": {"visible": {"T": ["T"], "V": ["V"]}},
    "no other instruments": {"cross_bar_offsets": []},
}


def is_global(row, i):
    """BOS, INSTRUMENT, the conductor's tokens, and the controls of stream and tracks."""
    if row["type"][i] in (Family.EOS, Family.PAD):
        return False
    return row["type"][i] in (Family.BOS, Family.INSTRUMENT) or row["track"][i] == -1 or row["bar"][i] == -1


def is_open(row, i):
    """BAR, FILL, MASK, a bar's control, or global: the type rule does not concern it."""
    return row["type"][i] not in LETTER or is_global(row, i)


def regular_sees_regular(row, q, k, config):
    if row["position"][k] > row["position"][q]:
        return False
    if is_global(row, k):
        return True
    if row["bar"][q] < 0 or row["bar"][k] < 0:
        return False
    distance = row["bar"][q] - row["bar"][k]
    if row["instrument"][q] == row["instrument"][k]:
        bars = config.same_bar_offsets == "all" or distance in config.same_bar_offsets
    else:
        bars = distance in config.cross_bar_offsets
    types = (
        is_open(row, q)
        or is_open(row, k)
        or config.visible is None
        or LETTER[row["type"][k]] in config.visible.get(LETTER[row["type"][q]], [])
        or (row["onset"][q] >= 0 and row["onset"][q] == row["onset"][k])
    )
    return bool(bars and types)


def oracle(row: dict[str, np.ndarray], config: ModelConfig) -> np.ndarray:
    """(M + N, M + N), pair by pair."""
    m, n = len(row["segment_document"]), len(row["tokens"])
    document = np.concatenate([row["segment_document"], row["document"]])
    seen = np.zeros((m + n, m + n), dtype=bool)
    for q, k in np.argwhere((document[:, None] == document[None, :]) & (document[:, None] >= 0)).tolist():
        if q < m and k < m:
            seen[q, k] = k <= q
        elif q < m:
            seen[q, k] = row["segment"][k - m] == q
        elif k < m:
            seen[q, k] = row["segment_end"][k] < row["position"][q - m]
        else:
            seen[q, k] = regular_sees_regular(row, q - m, k - m, config)
    return seen


def fast(batch, config):
    rule = AttentionRule(config)
    return dense_mask(rule, joint_fields(batch), batch["segment_document"].shape[1]).numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_mask_is_what_the_design_says_on_random_streams(name):
    config = ModelConfig(size="small", **CONFIGS[name])
    rows = [[rich_stream(3 * seed + i, 100) for i in range(3)] for seed in range(4)]
    batch = batch_of(*rows, max_seq_len=320)
    mask = fast(batch, config)
    for b in range(len(rows)):
        np.testing.assert_array_equal(mask[b], oracle({name: values[b] for name, values in batch.items()}, config))


def test_the_mask_is_what_the_design_says_on_real_pieces(real_midi):
    rng, config = np.random.default_rng(0), ModelConfig(size="small")
    (piece,) = real_streams(real_midi, 1, 500)
    batch = batch_of([with_deferred_bars(piece, rng)])
    mask = fast(batch, config)
    np.testing.assert_array_equal(mask[0], oracle({name: values[0] for name, values in batch.items()}, config))
    assert 0.05 < mask.mean() < 0.5


@pytest.mark.parametrize("pattern", ["bar_sparse", "full_causal"])
def test_tables_rows_and_elements_agree(pattern):
    rule = AttentionRule(ModelConfig(size="small", pattern=pattern))
    batch = batch_of(*[[rich_stream(seed, 150)] for seed in range(5)], max_seq_len=160)
    fields = joint_fields(batch, rule.summaries)
    m = batch["segment_document"].shape[1] if rule.summaries else 0
    mask = dense_mask(rule, fields, m)
    assert torch.equal(mask, rule(fields.queries(), fields.keys()))
    some = torch.tensor([0, m, m + 7, m + 40])
    assert torch.equal(mask[:, some], row_mask(rule, fields.at((slice(None), some)), fields))


def test_a_row_may_stand_in_any_order():
    rule, rng = AttentionRule(ModelConfig(size="small")), np.random.default_rng(0)
    batch = batch_of([rich_stream(1, 150), random_stream(2, 80)])
    fields, m = joint_fields(batch), batch["segment_document"].shape[1]
    order = torch.cat([torch.arange(m), m + torch.from_numpy(rng.permutation(batch["tokens"].shape[1]))])
    expected = dense_mask(rule, fields, m)[:, order][:, :, order]
    assert torch.equal(dense_mask(rule, fields.at((slice(None), order)), m), expected)


def test_full_causal_is_a_triangle_for_each_piece():
    batch = batch_of([random_stream(1, 60), random_stream(2, 60)], max_seq_len=130)
    rule = AttentionRule(ModelConfig(size="small", pattern="full_causal"))
    document = batch["document"][0]
    expected = np.tril((document[:, None] == document[None]) & (document[:, None] >= 0))
    np.testing.assert_array_equal(dense_mask(rule, joint_fields(batch, False), 0)[0].numpy(), expected)
