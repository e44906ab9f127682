"""Shards: the same bytes for the same content, and nothing wrong is ever read as music."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from meloformer.data import Corpus, DataError
from meloformer.data.shards import Piece, Shard, content_hash, shard_name, write_shard
from meloformer.errors import UserError
from meloformer.files import checksum
from meloformer.hid import Tokenizer, Vocabulary, find_segments
from tests.data.music import make_corpus

HASH = Vocabulary().hash


def piece(name: str, length: int, seed: int = 0) -> Piece:
    rng = np.random.default_rng(seed)
    changes = {rule: seed + i for i, rule in enumerate(("overlaps", "bars_cut")[:seed])}
    return Piece(name, rng.integers(0, 1206, length), *(rng.integers(0, 128, length // 4) for _ in range(4)), changes)


def test_a_shard_gives_back_its_pieces(tmp_path):
    pieces = [piece("a.mid", 40, 1), piece("empty", 0), piece("ü/b.mid", 17, 2)]
    sha256, size = write_shard(tmp_path / "s", pieces, HASH)
    assert sha256 == checksum(tmp_path / "s") and size == (tmp_path / "s").stat().st_size
    shard = Shard(tmp_path / "s", HASH)
    assert shard.num_pieces == 3 and shard.names == ["a.mid", "empty", "ü/b.mid"] and shard.num_tokens == 57
    for i, original in enumerate(pieces):
        np.testing.assert_array_equal(shard.tokens(i), original.tokens)
        assert shard.changes(i) == original.changes
        for found, expected in zip(shard.segments(i), original[2:6]):
            np.testing.assert_array_equal(found, expected)


def test_the_same_pieces_are_the_same_bytes(tmp_path):
    """safetensors writes several metadata entries in an order that changes from call to call."""
    assert len({write_shard(tmp_path / "s", [piece("a.mid", 9), piece("b.mid", 5)], HASH) for _ in range(20)}) == 1


def test_a_shard_is_mapped_not_loaded(tmp_path):
    write_shard(tmp_path / "s", [piece("a.mid", 1000)], HASH)
    tokens = base = Shard(tmp_path / "s", HASH).tokens(0)
    while not isinstance(base, np.memmap):
        base = base.base
        assert base is not None, "the tokens were copied into memory"
    assert not tokens.flags.writeable


def test_the_safetensors_library_reads_a_shard(tmp_path):
    write_shard(tmp_path / "s", [piece("a.mid", 12)], HASH)
    assert {name: str(a.dtype) for name, a in load_file(tmp_path / "s").items()} == {
        "tokens": "uint16",
        "piece_offsets": "int64",
        "segment_offsets": "int64",
        "segment_offset": "uint32",
        "segment_bar": "uint16",
        "segment_track": "uint16",
        "segment_instrument": "uint8",
        "change_offsets": "int64",
        "change_rule": "uint8",
        "change_count": "uint32",
        "condition_offsets": "int64",
        "condition_token": "uint16",
        "condition_track": "uint16",
        "condition_bar": "uint16",
        "condition_onset": "uint16",
    }


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_shard_that_was_cut_short_is_named(tmp_path, keep):
    write_shard(tmp_path / "s", [piece("a.mid", 100)], HASH)
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:keep])
    with pytest.raises(DataError, match=str(tmp_path / "s")):
        Shard(tmp_path / "s", HASH)


def test_another_vocabulary_is_refused(tmp_path):
    write_shard(tmp_path / "s", [piece("a.mid", 8)], Vocabulary(12).hash)
    with pytest.raises(DataError, match=f"vocabulary {Vocabulary(12).hash}, this corpus has {HASH}.*preprocess"):
        Shard(tmp_path / "s", HASH)


# --- a whole corpus -----------------------------------------------------------------------------------------


@pytest.fixture
def copy(corpus, tmp_path) -> "Corpus":
    shutil.copytree(corpus.path, tmp_path / "copy")
    return tmp_path / "copy"


def flip(path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_every_piece_and_its_segments_come_back(corpus):
    tokenizer = Tokenizer(corpus.vocabulary)
    assert corpus.num_pieces == 24 and len(corpus.meta["shards"]) == 3
    for i in range(corpus.num_pieces):
        tokens = corpus.piece(i)
        tokenizer.validate(tokens)
        segments = find_segments(tokenizer.annotate(tokens))
        stored = corpus.segments(i)
        np.testing.assert_array_equal(stored.offset, segments.start)
        np.testing.assert_array_equal(stored.bar, segments.bar)
        np.testing.assert_array_equal(stored.track, segments.track)
        np.testing.assert_array_equal(stored.instrument, segments.instrument)
        assert corpus.index["content_hash"][i] == content_hash(tokens)
        assert corpus.name(i) == f"piece{i:03d}.mid"


def test_a_damaged_shard_is_named_with_its_checksum_when_the_piece_is_read(copy):
    path = copy / shard_name(1)
    expected = checksum(path)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    first, _ = json.loads(path.read_bytes()[8 : 8 + size])["tokens"]["data_offsets"]
    flip(path, 8 + size + first)
    corpus = Corpus(copy)  # opening reads no tokens
    corpus.piece(0)
    with pytest.raises(DataError) as caught:
        corpus.piece(10)
    for part in (str(path), expected, checksum(path)):
        assert part in str(caught.value)
    with pytest.raises(DataError, match=expected):
        corpus.verify()


def test_what_is_wrong_with_a_folder_is_said(copy, tmp_path):
    def expect(pattern: str):
        with pytest.raises(UserError, match=pattern):
            Corpus(copy)

    Corpus(copy).verify()
    flip(copy / "index.safetensors", -1)
    expect("index.safetensors: damaged, its sha256 is")
    flip(copy / "index.safetensors", -1)
    (copy / shard_name(2)).rename(tmp_path / "gone")
    expect("shard-00002.safetensors: is missing")
    (tmp_path / "gone").rename(copy / shard_name(2))
    with open(copy / shard_name(0), "ab") as file:
        file.write(b"more")
    expect("shard-00000.safetensors: has .* bytes")
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    expect("format 99, this code reads 3; preprocess")
    (copy / "meta.json").write_text(json.dumps({**meta, "vocabulary": {**meta["vocabulary"], "hash": "0" * 16}}))
    expect("vocabulary hash 0000000000000000 is not this code's")
    (copy / "meta.json").write_text("{")
    expect("meta.json: cannot be read")
    (copy / "meta.json").unlink()
    expect("no meta.json, so this is no finished corpus")
    shutil.rmtree(copy)
    expect("no such folder")


def test_an_index_that_cannot_be_read_is_named(copy, monkeypatch):
    """Training took it for a disk that had gone, and said that there were checkpoints to go on from."""

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("meloformer.data.corpus.checksum", refused)
    with pytest.raises(DataError, match=r"index.safetensors: cannot be read \(Permission denied\); make it readable"):
        Corpus(copy)


def test_a_shard_of_another_corpus_is_refused(corpus, copy, tmp_path):
    """Same names, same vocabulary, other music: only the content hash tells."""
    other = make_corpus(tmp_path / "other", seeds=range(100, 110), shard_size=10)
    shutil.copy(other.path / shard_name(0), copy / shard_name(0))
    meta = json.loads((copy / "meta.json").read_text())
    meta["shards"][0]["bytes"] = (copy / shard_name(0)).stat().st_size
    (copy / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match=r"shard-00000.safetensors: damaged, its sha256 is"):
        Corpus(copy).piece(0)
