"""A valid stream, as MIDI, through either reader, into shards and out again: the same music."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from meloformer.config import PreprocessConfig
from meloformer.data import Corpus
from meloformer.data.encoder import Encoder
from meloformer.data.sources import Input
from meloformer.data.writer import CorpusWriter, settings_of
from meloformer.hid import Tokenizer, find_segments
from meloformer.hid.tokenizer import canonical_order, reorder_tracks
from meloformer.midi import MidiError, read, read_score, write_midi
from tests.data.test_preprocess import content
from tests.hid.streams import random_stream
from tests.midi.real_files import readable_sample

TOKENIZER = Tokenizer()


def store(folder: Path, output: Path, reader: str) -> Corpus:
    """What `preprocess` does, in this process, through one of the readers."""
    config = PreprocessConfig(input=str(folder), output=str(output), min_notes=1, min_bars=1, dedup=False, shard_size=7)
    source, encode = Input(config.input), Encoder(config)
    with (
        pytest.MonkeyPatch.context() as patch,
        CorpusWriter(output, settings_of(config), source.describe()) as writer,
    ):
        if reader == "miditoolkit":
            patch.setattr(read, "symusic", None)
        for number, file in enumerate(source):
            writer.add(number, encode(file))
        writer.finish()
    return Corpus(output)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=10, max_size=25, unique=True))
@settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.generate))
def test_every_valid_stream_comes_back_from_the_shards_of_both_readers(seeds):
    """Up to the rules of `hid.quantize`, for a stream may hold what a MIDI file cannot: a pitch struck while it sounds.

    Tempos of the file are compared alone: whole microseconds may put a change on the other side of 4 %.
    """
    with TemporaryDirectory() as folder:
        midi = Path(folder) / "midi"
        midi.mkdir()
        scores = [TOKENIZER.decode(random_stream(seed, masks=False, controls=False, tracks=True)) for seed in seeds]
        for i, score in enumerate(scores):
            write_midi(score, midi / f"{i:03d}.mid")
        corpora = [store(midi, Path(folder) / reader, reader) for reader in ("symusic", "miditoolkit")]
        assert content(corpora[0].path) == content(corpora[1].path)
        assert corpora[0].num_pieces == len(scores), corpora[0].meta["rejected"]
        for i, score in enumerate(scores):
            found = TOKENIZER.decode(corpora[0].piece(i))
            grid = TOKENIZER.quantize(read_score(midi / corpora[0].name(i)))
            assert found == reorder_tracks(grid, canonical_order(grid))
            wanted = TOKENIZER.quantize(replace(score, quantized=False, num_bars=None))
            wanted = reorder_tracks(wanted, canonical_order(wanted))
            assert replace(found, tempos=wanted.tempos) == wanted
            annotations = TOKENIZER.annotate(corpora[0].piece(i))
            segments, stored = find_segments(annotations), corpora[0].segments(i)
            assert stored.offset.tolist() == segments.start.tolist()
            for name in ("bar", "track", "instrument"):
                column = getattr(annotations, name)[segments.start]
                assert getattr(stored, name).tolist() == column.tolist()


def test_real_files_through_both_readers_are_the_same_shards(real_midi, tmp_path):
    """Of files that both read, but for counts of what no Score holds: symusic forgets tracks without notes."""
    readable = []
    for path in readable_sample(real_midi)[::6]:
        try:
            if path.stat().st_size < 60_000 and read.read_with_symusic(path) == read.read_with_miditoolkit(path):
                readable.append(path)
        except MidiError:
            continue
    assert len(readable) > 10
    folder = tmp_path / "midi"
    folder.mkdir()
    for i, path in enumerate(readable):
        (folder / f"{i:03d}.mid").write_bytes(path.read_bytes())
    one, other = (store(folder, tmp_path / reader, reader) for reader in ("symusic", "miditoolkit"))
    assert (one.path / "index.safetensors").read_bytes() == (other.path / "index.safetensors").read_bytes()
    assert one.num_pieces > 10
    unheard = {"control_changes", "pedals", "pitch_bends"}
    for i in range(one.num_pieces):
        assert one.piece(i).tolist() == other.piece(i).tolist()
        for mine, others in zip(one.segments(i), other.segments(i)):
            assert mine.tolist() == others.tolist()
        mine, others = (
            {rule: n for rule, n in corpus.changes(i).items() if rule not in unheard} for corpus in (one, other)
        )
        assert mine == others
