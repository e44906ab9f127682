"""The block table from counts against `create_block_mask`, which asks the element rule about every pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from meloformer.config import MOST_BARS, DataConfig, ModelConfig
from meloformer.errors import UserError
from meloformer.hid import Tokenizer
from meloformer.midi import read_score
from meloformer.model import block_table
from meloformer.model.attention import BlockVisibility
from meloformer.model.block_table import KEY_ORDER, QUERY_ORDER, block_tables, count_blocks, order_of
from meloformer.model.masks import AttentionRule, Fields, joint_fields
from meloformer.model.packed import MAX_BARS, pack
from tests.hid.streams import VOCABULARY, random_stream
from tests.midi.real_files import midi_files
from tests.model.music import batch_of, real_streams, rich_stream, with_deferred_bars
from tests.model.test_masks import CONFIGS

CONFIGS = {
    **CONFIGS,
    "distances beyond 31": {"same_bar_offsets": [0, 1, 40], "cross_bar_offsets": [-33, 0]},
    "no summaries": {"summaries": False},
    "full causal": {"pattern": "full_causal"},
}


def tables_of(mask):
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    return {name: getattr(mask, name) for name in (*names, *(name.replace("kv", "q") for name in names))}


def assert_equal_tables(rule, batch, block_size, order="kinds"):
    """BlockVisibility against create_block_mask, over the element rule and over the packed one."""
    fields = joint_fields(batch, rule.summaries)
    rows, length = fields.document.shape
    m = length - batch["tokens"].shape[1]
    if order == "random":
        rng = np.random.default_rng(0)
        places = np.stack([np.r_[rng.permutation(m), m + rng.permutation(length - m)] for _ in range(rows)])
    else:
        places = np.stack([order_of(fields.at(b), m) for b in range(rows)])
    if order != "stream":
        fields = Fields(*(field.gather(1, torch.from_numpy(places)) for field in fields))

    visibility = BlockVisibility(rule, fields, m, block_size=block_size)
    ours, keys = visibility.block_mask, fields
    if visibility.key_order is not None:
        keys = Fields(*(field.gather(1, visibility.key_order) for field in fields))

    def element_rule(b, h, q, k):
        return rule(fields.at((b, q)), keys.at((b, k)))

    for mask_mod in (element_rule, ours.mask_mod):
        expected = create_block_mask(mask_mod, rows, None, length, length, device="cpu", BLOCK_SIZE=block_size)
        for name, table in tables_of(expected).items():
            assert torch.equal(getattr(ours, name), table), name
            # The backward kernel reads a row of q_indices as neighbours in memory: these lay transposed, and the
            # gradients of keys and values would have come out of other blocks, without a word.
            assert getattr(ours, name).stride() == table.stride(), name
    return ours


@pytest.mark.parametrize("order", ["stream", "kinds", "random"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_is_that_of_create_block_mask_on_random_documents(name, order):
    """Rows of several pieces, with deferred bars and tracks of one instrument, one of them padding alone."""
    rule = AttentionRule(ModelConfig(size="small", **CONFIGS[name]))
    rows = [[rich_stream(3 * seed + i, 120) for i in range(3)] for seed in range(3)]
    batch = batch_of(*rows, [], max_seq_len=390)
    assert_equal_tables(rule, batch, (16, 16), order)
    assert_equal_tables(rule, batch, (64, 32), order)


@pytest.mark.parametrize("length, segments", [(127, 33), (128, 128), (129, 127), (192, 64), (191, 65)])
def test_lengths_at_and_off_the_block_edge(length, segments):
    rule = AttentionRule(ModelConfig(size="small"))
    batch = batch_of([rich_stream(1, 120)], [random_stream(3, 60)], max_seq_len=length, max_segments=segments)
    for block_size in ((64, 64), (128, 64), (128, 128)):
        assert_equal_tables(rule, batch, block_size)


def test_one_bar_and_padding_alone():
    v, rule = VOCABULARY, AttentionRule(ModelConfig(size="small"))
    note = [v.time(0), v.pitch(60), v.duration(24), v.velocity(90)]
    one_bar = [v.BOS, v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(120), v.instrument(0), v.BAR, *note, v.EOS]
    assert_equal_tables(rule, batch_of([np.array(one_bar)], max_segments=3), (8, 8))
    nothing = assert_equal_tables(rule, batch_of([], max_seq_len=40, max_segments=4), (8, 8))
    assert nothing.kv_num_blocks.sum() == 0 and nothing.full_kv_num_blocks.sum() == 0


def test_a_long_bar_is_cut_between_onsets_and_a_thick_chord_is_not():
    """A run is cut so that its pairs can be counted one by one, but an onset in two runs would lose what it shares."""
    v, rule = VOCABULARY, AttentionRule(ModelConfig(size="small"))
    head = [v.BOS, v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(120), v.instrument(0), v.BAR]
    chord = [token for pitch in range(40, 64) for token in (v.pitch(pitch), v.duration(3), v.velocity(90))]
    long_bar = np.array([*head, *(x for t in range(0, 90, 6) for x in (v.time(t), *chord)), v.EOS])
    assert len(chord) > 2 * block_table.LONGEST_RUN
    assert_equal_tables(rule, batch_of([long_bar], max_segments=1), (64, 64))


def test_on_real_rows(real_midi):
    rng, pieces = np.random.default_rng(0), real_streams(real_midi, 2, 900)
    batch = batch_of(pieces, [with_deferred_bars(p, rng) for p in pieces], max_seq_len=2700, max_segments=256)
    for name in ("default", "near-linear"):
        rule = AttentionRule(ModelConfig(size="small", **CONFIGS[name]))
        mask = assert_equal_tables(rule, batch, (64, 64))
        assert mask.kv_num_blocks.sum() > 100
        assert_equal_tables(rule, batch, (128, 128), "stream")


def test_counts_are_numbers_of_pairs_and_full_means_all_of_them():
    rule, batch = AttentionRule(ModelConfig(size="small")), batch_of([rich_stream(2, 200)], max_seq_len=224)
    fields = joint_fields(batch).at(0)
    m = batch["segment_document"].shape[1]
    mask = rule(fields.queries(), fields.keys())
    size = len(fields.document)
    padded = torch.zeros(-(-size // 16) * 16, -(-size // 8) * 8, dtype=torch.int32)
    padded[:size, :size] = mask
    expected = padded.unflatten(0, (-1, 16)).unflatten(2, (-1, 8)).sum((1, 3))
    counts = count_blocks(rule, fields, m, (16, 8))
    assert torch.equal(counts, expected.int())
    for change, full in ((0, 1), (-1, 0)):  # one pair less than all of them is not full
        table = block_tables(torch.tensor([[[128 + change]]]), (16, 8))
        assert (int(table[0]), int(table[2])) == (1 - full, full)


def test_a_real_piece_in_its_physical_order_needs_fewer_blocks(real_midi):
    """The point of it: a kind at a time, keys in their own order, leaves fewer blocks than the stream's order does."""
    rule = AttentionRule(ModelConfig(size="small"))
    path = max((path for path in midi_files(real_midi) if "awkward" not in path.parts), key=_size_below_60k)
    batch = batch_of([Tokenizer(VOCABULARY).encode(read_score(path))[:12000]])
    m, blocks = batch["segment_document"].shape[1], {}
    stream = ("S GOTPLV", "S GOTPLV", 0)
    for name, (kinds, key_kinds, block) in {
        "stream": stream,
        "kinds": (QUERY_ORDER, KEY_ORDER, 0),
        "used": (QUERY_ORDER, KEY_ORDER, 64),
    }.items():
        fields = joint_fields(batch).at(0)
        order = order_of(fields, m, kinds, block)
        place = np.argsort(order_of(fields, m, key_kinds, block))[order]
        fields = fields.at(torch.from_numpy(order))
        blocks[name] = int((count_blocks(rule, fields, m, (64, 64), key_place=place) > 0).sum())
    assert blocks["kinds"] < 0.85 * blocks["stream"]
    assert blocks["used"] < 0.98 * blocks["kinds"]


def _size_below_60k(path):
    return path.stat().st_size if path.stat().st_size < 60_000 else 0


def test_the_order_keeps_summaries_in_front_and_padding_behind():
    batch = batch_of([rich_stream(1, 120), rich_stream(2, 120)], max_seq_len=260)
    fields = joint_fields(batch).at(0)
    m = batch["segment_document"].shape[1]
    order = order_of(fields, m)
    shuffled = np.random.default_rng(0).permutation(len(order) - m) + m  # it is the stream's order that counts
    moved = fields.at(torch.from_numpy(np.r_[:m, shuffled]))
    again = np.r_[:m, shuffled][order_of(moved, m)]
    assert (again[fields.document.numpy()[again] >= 0] == order[fields.document.numpy()[order] >= 0]).all()
    assert sorted(order.tolist()) == list(range(len(fields.document))) and (order[:m] < m).all()
    document = fields.document.numpy()[order]
    for part in (document[:m], document[m:]):
        valid = int((part >= 0).sum())
        assert (part[:valid] >= 0).all() and (np.diff(part[:valid]) >= 0).all()


def naive_order(tokens, offset, block):
    """`_whole_blocks_first` with lists: (group, part, token) in order -> token numbers in theirs."""
    out = []
    for group in sorted({g for g, _, _ in tokens}):
        whole, left = [], []
        for part in sorted({p for g, p, _ in tokens if g == group}):
            number = sorted({(g, p) for g, p, _ in tokens}).index((group, part))
            of_part = [t for g, p, t in tokens if (g, p) == (group, part)]
            cut = len(of_part) // block * block
            whole += of_part[:cut]
            left += of_part[cut:][:: -1 if number % 2 else 1]
        fill = min(len(left), -(offset + len(out)) % block)
        out += left[:fill] + whole + left[fill:]
    return out


@pytest.mark.parametrize("block", [1, 4, 16])
def test_parts_keep_whole_blocks_and_pool_what_is_left(block):
    rng = np.random.default_rng(block)
    for _ in range(20):
        codes = np.sort(rng.integers(0, 3, 90) << 20 | rng.integers(0, 4, 90))
        offset = int(rng.integers(0, 40))
        tokens = [(code >> 20, code & 0xFFFFF, i) for i, code in enumerate(codes.tolist())]
        assert block_table._whole_blocks_first(codes, offset, block).tolist() == naive_order(tokens, offset, block)


def test_no_whole_block_of_a_part_lies_across_a_block_edge():
    """Where a group has enough left over to fill up the block that it begins in."""
    sizes = {(1, 0): 37, (1, 1): 70, (1, 2): 133, (2, 0): 30, (2, 1): 200}
    codes = np.repeat([g << 20 | p for g, p in sizes], list(sizes.values()))
    owner = codes[block_table._whole_blocks_first(codes, 50, 64)]
    place = np.arange(50, 50 + len(codes))
    for code, size in zip((g << 20 | p for g, p in sizes), sizes.values()):
        blocks = np.bincount(place[owner == code] // 64)
        assert (blocks == 64).sum() == size // 64


def test_more_bars_than_the_words_hold_are_refused():
    fields = Fields(*(torch.zeros(1, 1, dtype=torch.int32) for _ in Fields._fields))
    with pytest.raises(ValueError, match="16384"):
        pack(AttentionRule(ModelConfig(size="small")), fields._replace(bar=torch.tensor([[MAX_BARS]])))
    # and before training begins, not in its first long row
    assert MOST_BARS == MAX_BARS
    with pytest.raises(UserError, match=r"data.max_bars is 16385.*1 to 16384"):
        DataConfig(data_dir="x", max_bars=MAX_BARS + 1).validate()


@pytest.mark.parametrize("name", ["default", "distances beyond 31", "full causal"])
def test_nothing_of_the_device_is_read_on_the_way(name):
    """On `meta`, where tensors have no values: reading one, as a wait for a GPU would, or mixing devices, raises."""
    rule = AttentionRule(ModelConfig(size="small", **CONFIGS[name]))
    fields = joint_fields(batch_of([rich_stream(1, 120)], [rich_stream(2, 120)], max_seq_len=130), rule.summaries)
    m = fields.document.shape[1] - 130
    mask = BlockVisibility(rule, fields, m, "meta").block_mask
    assert mask.kv_indices.device.type == "meta"
    q = torch.zeros(1, dtype=torch.int64, device="meta")
    assert mask.mask_mod(q, q, q, q).shape == (1,)
