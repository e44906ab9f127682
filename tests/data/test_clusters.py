"""Near-duplicates are found in another key and dress, and pieces that share what everybody has are not."""

from dataclasses import replace

import numpy as np
import pytest

from meloformer.data import clusters
from meloformer.data.augment import scale_velocity, track_slices, transpose
from meloformer.data.clusters import COMMON_PIECES, bar_shingles
from meloformer.hid import Tokenizer
from meloformer.midi import Track
from tests.data.music import make_score
from tests.hid.streams import VOCABULARY

TOKENIZER = Tokenizer(VOCABULARY)


def shingles(tokens: np.ndarray) -> np.ndarray:
    return bar_shingles(TOKENIZER.encode_fully(TOKENIZER.decode(tokens), order="given"))


def test_a_copy_in_another_key_tempo_and_dress_has_the_same_bars():
    score = make_score(0)
    tokens = TOKENIZER.encode(score)
    assert len(shingles(tokens)) > 10
    head, tracks, end = track_slices(tokens, VOCABULARY)
    dressed = replace(score, tracks=[Track(0, is_drum=True), *[Track(50 + i) for i in range(4)]], tempos=[(0, 70.0)])
    for other in (
        transpose(tokens, -4, VOCABULARY),
        scale_velocity(tokens, 0.5, VOCABULARY),
        np.concatenate([head, *tracks[::-1], end]),
        TOKENIZER.encode(dressed),
    ):
        np.testing.assert_array_equal(shingles(other), shingles(tokens))


def test_drums_and_plain_bars_say_nothing():
    tokens = TOKENIZER.encode(make_score(0))
    head, tracks, end = track_slices(tokens, VOCABULARY)
    assert len(shingles(np.concatenate([head, tracks[0], end]))) == 0
    v = VOCABULARY
    repeated = [token for t in range(8) for token in (v.time(12 * t), v.pitch(40), v.duration(12), v.velocity(80))]
    bars = [v.BOS, v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(120), v.instrument(33), v.BAR, *repeated, v.EOS]
    assert len(shingles(np.array(bars))) == 0


def bars(*numbers) -> np.ndarray:
    return np.array(sorted(numbers), dtype=np.uint64)


@pytest.fixture
def cluster(tmp_path):
    """`clusters.cluster` in a folder that it has to leave empty."""
    yield lambda contents, shingles, **settings: clusters.cluster(contents, shingles, tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_more_than_three_tenths_shared_is_one_cluster_and_links_chain(cluster):
    a, b, c = bars(*range(1, 21)), bars(*range(14, 34)), bars(*range(27, 47))  # a-b and b-c share 7 of 20, a-c none
    below = bars(*range(1, 7), *range(100, 114))  # 6 of 20 with a
    contents = np.array([40, 30, 20, 10], dtype=np.uint64)
    assert cluster(contents, [a, b, c, below]).tolist() == [20, 20, 20, 10]


def test_an_excerpt_belongs_to_its_piece(cluster):
    whole, part = bars(*range(1, 101)), bars(*range(50, 60))
    assert len(set(cluster(np.array([1, 2], dtype=np.uint64), [whole, part]).tolist())) == 1


def test_what_everybody_has_links_nobody(cluster):
    common = range(1, 11)
    pieces = [bars(*common, *range(1000 * i, 1000 * i + 5)) for i in range(1, COMMON_PIECES + 2)]
    contents = np.arange(1, len(pieces) + 1, dtype=np.uint64)
    assert len(set(cluster(contents, pieces).tolist())) == len(pieces)
    assert len(set(cluster(contents[:-1], pieces[:-1]).tolist())) == 1


def versions(rng, num_tunes: int, each: int, num_bars: int = 40, changed: int = 0) -> list[np.ndarray]:
    """`each` versions of every tune in turn, in which so many bars are other ones."""
    tunes = [rng.integers(1, 1 << 40, num_bars) for _ in range(num_tunes)]
    return [
        bars(*rng.choice(tune, num_bars - changed, replace=False), *rng.integers(1, 1 << 40, changed))
        for _ in range(each)
        for tune in tunes
    ]


@pytest.mark.parametrize(("each", "changed"), [(16, 0), (17, 0), (200, 0), (17, 2), (60, 2)])
def test_many_versions_of_a_tune_are_one_cluster(cluster, each, changed):
    """Seventeen, in a corpus of some hundred pieces, made all their bars common ones, and each was its own cluster: a
    folder augmented beforehand (twelve keys, two velocities) had its training music in its validation."""
    rng = np.random.default_rng(0)
    pieces = versions(rng, 4, each, changed=changed)
    found = cluster(rng.permutation(len(pieces)).astype(np.uint64), pieces).reshape(each, 4)
    assert (found == found[0]).all() and len(set(found[0].tolist())) == 4


def test_many_versions_count_as_one_where_an_excerpt_is_looked_for(cluster):
    pieces = versions(np.random.default_rng(0), 2, 30)
    excerpt = pieces[0][5:15]
    found = cluster(np.arange(61, dtype=np.uint64), [*pieces, excerpt]).tolist()
    assert found == [0, 1] * 30 + [0]


def test_many_versions_do_not_chain_tunes_that_share_an_ostinato(cluster):
    """Four of ten bars of each are common ones: of unlike pieces that is what everybody has."""
    pieces = [np.sort(np.append(piece, bars(1, 2, 3, 4))) for piece in versions(np.random.default_rng(0), 20, 20, 6)]
    found = cluster(np.arange(400, dtype=np.uint64), pieces).tolist()
    assert found == [i % 20 for i in range(400)]


def test_copies_kept_by_no_dedup_share_a_cluster_and_order_does_not_matter(cluster):
    sets = [bars(*range(1, 21)), bars(*range(500, 520)), bars(*range(1, 21)), bars()]
    contents = np.array([9, 5, 9, 7], dtype=np.uint64)
    assert cluster(contents, sets).tolist() == [9, 5, 9, 7]
    order = [3, 2, 0, 1]
    assert cluster(contents[order], [sets[i] for i in order]).tolist() == [7, 9, 9, 5]


@pytest.mark.parametrize("rows", [7, 64, 1000])
def test_the_memory_that_clustering_may_use_does_not_show(cluster, rows):
    """Bars are cut into many files on the way; what meets in one file must not depend on how many there are."""
    rng = np.random.default_rng(0)
    tunes = [rng.integers(1, 1 << 40, 30) for _ in range(12)]
    pieces = [bars(*rng.choice(tunes[i % 12], 20, replace=False), *rng.integers(1, 1 << 40, 15)) for i in range(40)]
    contents = rng.permutation(40).astype(np.uint64)
    at_once = cluster(contents, pieces, rows=1 << 20)
    assert 12 <= len(set(at_once.tolist())) < 30
    np.testing.assert_array_equal(cluster(contents, pieces, rows=rows), at_once)
