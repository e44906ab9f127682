"""Conditions from preprocessing to rows: stored beside the streams, given by chance, and true where they stand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meloformer import config as settings_of_commands
from meloformer.config import DataConfig, PreprocessConfig
from meloformer.data import Corpus, RowPlan
from meloformer.data.augment import Deferral, augment
from meloformer.data.draws import generator
from meloformer.data.packing import split_pieces
from meloformer.data.preprocess import preprocess
from meloformer.data.windows import PieceTable
from meloformer.errors import UserError
from meloformer.hid import Family, Tokenizer
from meloformer.hid.conditions import CONDITIONS, derive, insert, strip
from meloformer.hid.controls import BAR, ONSET, TOKEN, TRACK
from meloformer.hid.rows import NO_TARGET
from tests.data.music import make_corpus, make_score, write_folder
from tests.hid.streams import VOCABULARY, random_stream

TOKENIZER, V = Tokenizer(VOCABULARY), VOCABULARY
OFF = {"bare_probability": 0.0, **{f"{name}_probability": 0.0 for name in CONDITIONS}}
ALL = {"bare_probability": 0.0, **{f"{name}_probability": 1.0 for name in CONDITIONS}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two folders of pieces, whose names are their tags, and a piece beside them."""
    folder = tmp_path_factory.mktemp("conditions") / "midi"
    write_folder(folder / "waltz", range(10), num_bars=16)
    write_folder(folder / "band", range(20, 26), num_bars=12)
    write_folder(folder, [40])
    return folder


@pytest.fixture(scope="module")
def corpus(folder):
    preprocess(PreprocessConfig(input=str(folder), output=str(folder.parent / "out")))
    return Corpus(folder.parent / "out")


@pytest.fixture(scope="module")
def plain_corpus(folder):
    preprocess(PreprocessConfig(input=str(folder), output=str(folder.parent / "plain"), conditions=False))
    return Corpus(folder.parent / "plain")


def data(corpus, **given) -> DataConfig:
    return DataConfig(**{"data_dir": str(corpus.path), "max_seq_len": 600, "validation_fraction": 0.25, **given})


def found_in(tokens: np.ndarray) -> set[str]:
    present = set(V.family_of[tokens].tolist())
    return {name for name, family in CONDITIONS.items() if int(family) in present}


# --- what is stored -----------------------------------------------------------------------------------------------


def test_a_corpus_stores_what_its_scores_say(corpus):
    assert corpus.tags == ["band", "waltz"] and corpus.has_conditions
    for piece in range(corpus.num_pieces):
        tag = {"w": 1, "b": 0}.get(corpus.name(piece)[0])
        expected = derive(TOKENIZER.decode(corpus.piece(piece)), tag).rows(V)
        np.testing.assert_array_equal(corpus.conditions(piece), expected)
        assert corpus.index["num_chords"][piece] == (expected[:, ONSET] >= 0).sum()


def test_streams_hashes_and_clusters_do_not_know_of_conditions(corpus, plain_corpus):
    assert not plain_corpus.has_conditions and plain_corpus.hash != corpus.hash
    for name in corpus.index:
        if name != "num_chords":
            np.testing.assert_array_equal(corpus.index[name], plain_corpus.index[name])
    for piece in range(corpus.num_pieces):
        np.testing.assert_array_equal(corpus.piece(piece), plain_corpus.piece(piece))
        assert len(plain_corpus.conditions(piece)) == 0
    assert corpus.meta["totals"] == plain_corpus.meta["totals"]


def test_tags_of_a_list_stand_behind_a_tab(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    lines = ["waltz/piece000.mid\tslow and sad", "waltz/piece001.mid", "band/piece020.mid\tgay ", "piece040.mid\t"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    preprocess(PreprocessConfig(input=str(tmp_path / "list.txt"), output=str(tmp_path / "out")))
    corpus = Corpus(tmp_path / "out")
    assert corpus.tags == ["gay", "slow and sad"]
    tags = [corpus.conditions(i)[:, TOKEN] - V.start(Family.TAG) for i in range(4)]
    assert [[t for t in tag.tolist() if 0 <= t < 64] for tag in tags] == [[1], [], [0], []]
    (tmp_path / "list.txt").write_text("\n".join(lines).replace("gay", "merry"))
    with pytest.raises(UserError):  # another tag is another corpus
        preprocess(PreprocessConfig(input=str(tmp_path / "list.txt"), output=str(tmp_path / "out")))


def test_of_many_tags_the_frequent_ones_count(tmp_path):
    from meloformer.data.sources import MAX_TAGS, Input

    lines = [f"{i}.mid\tstyle{i:03d}" for i in range(80)] + [f"again{i}.mid\tstyle{i:03d}" for i in range(70, 80)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    found = Input(str(tmp_path / "list.txt"))
    assert len(found.tags) == MAX_TAGS and {f"style{i:03d}" for i in range(70, 80)} < set(found.tags)
    numbers = [source.tag for source in found]
    assert numbers[79] == found.tags.index("style079") and numbers[69] is None
    assert len(Input(str(tmp_path / "list.txt"), part=(2, 3)).tags) == MAX_TAGS  # a part knows the whole input's


# --- windows ------------------------------------------------------------------------------------------------------


def chord_by_bar(rows: np.ndarray, num_bars: int) -> list[list[tuple[int, int]]]:
    """For each bar the chords in force in it, with the tick from which on: as a reader hears them."""
    heard, chords = [], rows[rows[:, ONSET] >= 0]
    for bar in range(num_bars):
        here = [(int(r[ONSET]), int(r[TOKEN])) for r in chords if r[BAR] == bar]
        before = [int(r[TOKEN]) for r in chords if r[BAR] < bar]
        if before and (not here or here[0][0]):
            here.insert(0, (0, before[-1]))
        heard.append(here)
    return heard


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.data())
def test_windows_restate_what_is_in_force_and_cost_what_they_said(seed, made, draw):
    tokens = TOKENIZER.encode(make_score(seed % 50)) if made else random_stream(seed, masks=False, tracks=True)
    tokens = strip(tokens, CONDITIONS, V)
    score = TOKENIZER.decode(tokens)
    rows = derive(score, tag=1).rows(V)
    kept = draw.draw(st.sets(st.sampled_from(list(CONDITIONS))))
    rows = rows[np.isin(V.family_of[rows[:, TOKEN]], [int(CONDITIONS[name]) for name in kept])]
    table, plain = PieceTable(tokens, V, rows), PieceTable(tokens, V)
    first = draw.draw(st.integers(0, table.num_bars - 1))
    last = draw.draw(st.integers(first + 1, table.num_bars))
    window = table.window(first, last)
    TOKENIZER.validate(window)
    assert len(window) == table.cost(first, last)[0]
    assert strip(window, CONDITIONS, V).tolist() == plain.window(first, last).tolist()
    said = np.array(TOKENIZER.decode(window).controls, dtype=np.int64).reshape(-1, 4)
    assert chord_by_bar(said, last - first) == chord_by_bar(rows, table.num_bars)[first:last]
    density = [r[TOKEN] for r in said.tolist() if V.family_of[r[TOKEN]] == Family.BAR_DENSITY]
    assert density == [
        r[TOKEN] for r in rows.tolist() if r[BAR] in range(first, last) and r[ONSET] < 0 and r[TRACK] < 0
    ]
    if first == 0 and last == table.num_bars:
        assert window.tolist()[-1] == tokens[-1] and found_in(window) == found_in(insert(tokens, rows, V))


# --- rows ---------------------------------------------------------------------------------------------------------


def test_a_planned_row_always_fits(corpus):
    for epoch in range(2):
        for probability in (0.5, 1.0):
            shares = {f"{name}_probability": probability for name in CONDITIONS}
            plan = RowPlan(corpus, data(corpus, max_seq_len=500, **shares), seed=1, epoch=epoch)
            for row in range(plan.num_rows):
                documents = [plan.document(window) for window in range(*plan.window_range(row))]
                for entry, (tokens, _) in zip(plan.windows[slice(*plan.window_range(row))], documents):
                    TOKENIZER.validate(tokens)
                    assert len(tokens) <= entry["tokens"] <= 500
                plan.row(row)


def given_in(corpus, epochs, **shares) -> tuple[dict[str, list[bool]], list[set[bool]], list[bool]]:
    """By document: of the piece's conditions which were given; of each track's role; whether nothing at all was."""
    of_piece, of_tracks, bare = {name: [] for name in ("key", "chords", "tag", "bar_density")}, [], []
    whole = data(corpus, max_seq_len=8000, drop_track_probability=0.0, validation_fraction=0.0, **shares)
    for epoch in range(epochs):
        plan = RowPlan(corpus, whole, seed=3, epoch=epoch)
        for window in range(len(plan.windows)):
            tokens, document = plan.document(window)
            if corpus.name(document.piece).startswith("p"):  # the one without a tag
                continue
            present = found_in(tokens)
            for name, given_ in of_piece.items():
                given_.append(name in present)
            track = TOKENIZER.annotate(tokens).track
            of_tracks.append(np.isin(np.arange(track.max() + 1), track[V.family_of[tokens] == Family.ROLE]))
            bare.append(not present)
    return of_piece, of_tracks, bare


def near(values, expected: float) -> bool:
    return abs(np.mean(values) - expected) < 4 * 0.5 / np.sqrt(len(values))


def test_each_condition_is_given_by_its_own_chance(corpus):
    of_piece, of_tracks, bare = given_in(corpus, 20, bare_probability=0.0, chords_probability=0.3)
    for name, given_ in of_piece.items():
        assert near(given_, 0.3 if name == "chords" else 0.8), name
    assert np.abs(np.corrcoef(list(of_piece.values())) - np.eye(4)).max() < 0.2
    assert near(np.concatenate(of_tracks), 0.8) and not any(bare)
    alike = [len(set(given_)) == 1 for given_ in of_tracks]  # half of them by one coin, or by five that fall alike
    assert near(alike, 0.5 + 0.5 * (0.8**5 + 0.2**5))


def test_some_pieces_are_given_nothing(corpus):
    """A model that has never seen a stream without conditions is at a loss in one."""
    of_piece, _, bare = given_in(corpus, 8)
    assert near(bare, 0.4) and near(of_piece["key"], 0.6 * 0.8)


@pytest.mark.parametrize(
    ("shares", "expected"), [(OFF, set()), (ALL, set(CONDITIONS)), ({**OFF, "chords_probability": 1.0}, {"chords"})]
)
def test_probabilities_of_none_and_one(corpus, shares, expected):
    plan = RowPlan(corpus, data(corpus, drop_track_probability=0.0, max_seq_len=4000, **shares))
    for window in range(len(plan.windows)):
        tokens, document = plan.document(window)
        assert found_in(tokens) == expected - ({"tag"} if corpus.name(document.piece).startswith("p") else set())


def test_without_conditions_rows_are_those_of_a_corpus_without(corpus, plain_corpus):
    """Nothing else of a row depends on the conditions: the draws, the windows, the packing."""
    ours, theirs = (RowPlan(c, data(c, **s)) for c, s in ((corpus, OFF), (plain_corpus, {})))
    np.testing.assert_array_equal(ours.windows, theirs.windows)
    for row in range(ours.num_rows):
        for name, values in ours.row(row)[0].items():
            np.testing.assert_array_equal(values, theirs.row(row)[0][name])


def test_what_is_given_is_true(corpus):
    """Of whole pieces, transposed, louder and shuffled: what the stream says is what its notes say."""
    config = data(corpus, max_seq_len=8000, drop_track_probability=0.0, shuffle_tracks_probability=1.0, **ALL)
    plan = RowPlan(corpus, config, seed=2)
    moved = 0
    for window in range(len(plan.windows)):
        tokens, document = plan.document(window)
        tokens = TOKENIZER.undefer(tokens)
        score = TOKENIZER.decode(tokens)
        said = np.array(score.controls)
        tag = said[V.family_of[said[:, TOKEN]] == Family.TAG, TOKEN] - V.start(Family.TAG)
        expected = derive(score, int(tag[0]) if len(tag) else None).rows(V)
        # A role has a limit of pitch in it, and stays what it was when the piece is transposed.
        said, expected = (rows[V.family_of[rows[:, TOKEN]] != Family.ROLE] for rows in (said, expected))
        marks = V.family_of[said[:, TOKEN]] < Family.KEY
        np.testing.assert_array_equal(said[~marks], expected)
        assert marks.sum() == 2
        moved += document.augmentation.transpose != 0
    assert moved > 2


def test_a_stream_that_lost_a_track_no_longer_says_how_dense_it_is(corpus):
    config = data(corpus, drop_track_probability=1.0, **ALL)
    tokens = PieceTable(corpus.piece(0), V, corpus.conditions(0)).window(0, 12)
    out, done = augment(tokens, TOKENIZER, config, generator(0, 0, "x", 0), Deferral.NONE, 0.0, 9999)
    assert 0 < len(done.tracks) < 5
    controls = TOKENIZER.decode(out).controls
    families = [(V.family_of[c.token], c.track) for c in controls]
    assert not [f for f, track in families if track < 0 and f in (Family.DENSITY, Family.BAR_DENSITY)]
    assert len([f for f, track in families if f == Family.DENSITY]) == len(done.tracks)
    assert {"key", "chords", "tag", "role"} <= found_in(out)


def test_plans_of_equal_room_hold_the_same_music(corpus):
    config = data(corpus, max_seq_len=400)
    plans = {}
    for given_ in ((), ("key",), ("chords", "role"), tuple(CONDITIONS)):
        plans[given_] = RowPlan(corpus, config, split="validation", conditions=given_, room=CONDITIONS)
    first = plans[()]
    assert first.num_rows > 3
    for given_, plan in plans.items():
        np.testing.assert_array_equal(plan.windows, first.windows)
        found = set()
        for window in range(len(plan.windows)):
            tokens, plain = plan.document(window)[0], first.document(window)[0]
            assert strip(tokens, CONDITIONS, V).tolist() == plain.tolist()
            found |= found_in(tokens)
        assert found == set(given_)
    pieces = split_pieces(corpus, config)[0]["validation"]
    default = RowPlan(corpus, config, split="validation")
    assert not any(found_in(default.document(w)[0]) for w in range(len(default.windows)))
    assert set(default.pieces) == set(pieces)


# --- targets ------------------------------------------------------------------------------------------------------


def targets_of(plan) -> set[str]:
    """Names of the families that carry loss, and "chord time" for a T of the conductor."""
    found = set()
    for row in range(plan.num_rows):
        arrays = plan.row(row)[0]
        at = np.flatnonzero(arrays["targets"] != NO_TARGET)
        np.testing.assert_array_equal(arrays["targets"][at], arrays["tokens"][at + 1])
        families = arrays["type"][at + 1]
        found |= {Family(f).name for f in np.unique(families).tolist()}
        if ((families == Family.TIME) & (arrays["track"][at + 1] < 0)).any():
            found.add("chord time")
    return found


def test_what_is_given_is_no_target_unless_it_is_to_be_inferred(corpus):
    config = data(corpus, max_seq_len=2000, **ALL)
    given_ = {family.name for family in CONDITIONS.values()} | {"chord time", "PIECE_BEGIN", "PIECE_END"}
    assert not targets_of(RowPlan(corpus, config)) & given_
    inferred = targets_of(RowPlan(corpus, replace(config, predict_conditions=["chords", "key"])))
    assert inferred & given_ == {"KEY", "CHORD", "chord time"}
    held_out = RowPlan(
        corpus, replace(config, predict_conditions=["chords"]), split="validation", conditions=CONDITIONS
    )
    assert not targets_of(held_out) & given_
    with pytest.raises(UserError, match="predict_conditions is 'tempo', must be key, chords"):
        replace(config, predict_conditions=["tempo"]).validate()


def test_settings_and_streams_speak_of_the_same_conditions():
    assert list(settings_of_commands.CONDITIONS) == list(CONDITIONS)


def test_a_corpus_of_the_tests_has_conditions(tmp_path):
    """So that every test of the loop, of resuming and of several processes trains with them."""
    assert make_corpus(tmp_path, range(2)).has_conditions
