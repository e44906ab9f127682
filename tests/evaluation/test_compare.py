"""evaluate.py --generated: table, JSON and one page without a network; bands, controls and refusals."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from meloformer.command_config import EvaluateConfig
from meloformer.config import PreprocessConfig
from meloformer.data.preprocess import preprocess
from meloformer.errors import UserError
from meloformer.evaluation.command import run
from meloformer.evaluation.compare import BAND, HALVES, Measured, bands, compare, halves, overlapped_area
from meloformer.evaluation.music import load_music
from meloformer.evaluation.report import histogram, line_chart
from meloformer.midi import write_midi
from meloformer.training.loop import train
from tests.evaluation.music import random_bars, random_score
from tests.training.small import small_config, small_score, write_corpus


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("music")
    for name, seeds in (("generated", range(4)), ("reference", range(10, 18))):
        (folder / name).mkdir()
        for seed in seeds:
            write_midi(random_score(seed, num_bars=20), folder / name / f"{seed}.mid")
    return folder


class Balanced(HTMLParser):
    """Every tag that opens closes, and nothing is fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert not {"src", "href"} & dict(attrs).keys(), (tag, attrs)
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_report_is_written_whole_and_stands_alone(folders, capsys):
    config = EvaluateConfig(
        generated=str(folders / "generated"), reference=str(folders / "reference"), training=str(folders / "generated")
    )
    report = run(config)
    assert json.loads((folders / "generated" / "report.json").read_text()) == report
    assert report["pieces"]["generated"] == report["pieces"]["real"] == report["pieces"]["second half"] == 4
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("pitch class entropy all", "peaks pitched", "shuffled", "generated, jointly"))

    page = (folders / "generated" / "report.html").read_text()
    assert "http" not in page and "url(" not in page.replace("url(#", "")
    parser = Balanced()
    parser.feed(page)
    assert not parser.open and parser.seen.count("path") == 3 * 6 and "nan" not in re.sub("<style.*</style>", "", page)

    memory = report["memorisation"]
    assert memory["generated"]["nearest"]["mean"] == 1 and memory["held out"]["nearest"]["mean"] < 0.5
    assert memory["generated"]["tracks"]["copied"] == memory["generated"]["tracks"]["judged"] > 0
    assert "error pitched" in report["outside"]["loop of four bars"], "a loop is no music"


def test_numbers_of_subsets_are_those_of_the_subsets_alone():
    """Bands come from weighted sums over all pieces; each must be what measuring that half by itself gives."""
    pieces = [random_bars(seed, num_bars=10 + seed) for seed in range(7)]
    everything = Measured(pieces)
    base = everything.curves()
    chosen = halves(7, 3)
    assert (chosen.sum(axis=1) == 3).all()
    found = everything.numbers(base, chosen)
    for i, row in enumerate(chosen):
        alone = Measured([bars for bars, taken in zip(pieces, row) if taken]).numbers(base)
        for name, value in alone.items():
            assert found[name][i] == pytest.approx(value, nan_ok=True), name
    scalar, curves = bands(everything)
    values, splits = everything.values["polyphony all"], halves(7, HALVES) == 1
    apart = [values[one].mean() - values[~one].mean() for one in splits]
    assert scalar["polyphony all"] == pytest.approx(values.mean() + np.quantile(apart, BAND))
    assert scalar["error pitched"][0] == 0 < scalar["error pitched"][1]
    means = everything.means()
    for name, value in means.items():
        assert scalar[name][0] <= value <= scalar[name][1], name
    assert (curves["pitched"][0] <= curves["pitched"][1])[~np.isnan(curves["pitched"][0])].all()


def test_overlapped_area_is_one_for_the_same_and_none_for_what_is_far():
    rng = np.random.default_rng(0)
    one, same, far = rng.normal(0, 1, 200), rng.normal(0, 1, 200), rng.normal(30, 1, 200)
    assert overlapped_area(one, same) > 0.93 and overlapped_area(one, far) < 0.02
    # Kernels summed one by one, not on a grid.
    inside = np.abs(one[:40, None] - one[:40])[np.triu_indices(40, 1)]
    between = np.abs(one[:40, None] - same[:40]).reshape(-1)
    grid = np.linspace(-2, 8, 1000)

    def density(values):
        width = values.std(ddof=1) * len(values) ** -0.2
        kernels = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2) / (width * np.sqrt(2 * np.pi))
        return kernels.mean(axis=1)

    exact = np.minimum(density(inside), density(between)).sum() * (grid[1] - grid[0])
    assert overlapped_area(one[:40], same[:40]) == pytest.approx(exact, abs=0.01)
    assert overlapped_area(one[:2], same) is None and overlapped_area(np.ones(5), np.ones(5)) is None


def test_plots_take_gaps_and_nothing():
    assert line_chart("a", {"generated": [None, None]}, None).count("<path") == 1
    assert histogram("a", {"generated": [], "real": [None]}) == ""
    assert "<polyline" in histogram("a", {"generated": [2.0], "real": [2.0, None]})


def test_axes_have_round_numbers_and_no_rate_below_nothing():
    """They said 9 %, 19 %, 28 %, and an empty bar rate went from -0.5 to 0.5."""
    rate = histogram("empty bar rate", {"generated": [0.0], "real": [0.0, 0.0]})
    assert re.findall(r">([-\d.]+)</text>", rate) == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert re.findall(r">(\d+)%<", rate) == ["0", "25", "50", "75", "100"]
    spread = histogram("a", {"generated": [*[0.0] * 37, *np.linspace(0.5, 9.3, 63)]})
    assert re.findall(r">(\d+)%<", spread) == ["0", "10", "20", "30", "40"]
    assert re.findall(r">([-\d.]+)</text>", spread) == ["0", "2", "4", "6", "8"]


def test_music_comes_from_midi_shards_and_runs(tmp_path, capsys):
    config = small_config(write_corpus(tmp_path), tmp_path / "run", max_steps=1)
    train(config)
    (tmp_path / "midi" / "broken.mid").write_bytes(b"MThd")
    write_midi(small_score(0), tmp_path / "midi" / "again.MID")
    files = load_music(str(tmp_path / "midi"), "train")
    assert "left out" in capsys.readouterr().out and len(files) == 13
    shards = load_music(str(tmp_path / "shards"), "train")
    held_out, learnt = (load_music(str(tmp_path / "run"), split) for split in ("validation", "train"))
    names = {bars.name for bars in shards}
    assert {bars.name for bars in held_out} | {bars.name for bars in learnt} == names
    assert len(held_out) + len(learnt) == len(names) == 12
    some = load_music(str(tmp_path / "midi"), "train", limit=5)
    assert [bars.name for bars in some] == [bars.name for bars in load_music(str(tmp_path / "midi"), "train", limit=5)]
    for bars in shards:
        (same,) = [other for other in files if other.name == bars.name]
        assert sorted(zip(bars.bar, bars.code)) == sorted(zip(same.bar, same.code))


def test_what_was_not_measured_is_not_called_inside(folders, tmp_path, capsys):
    """Pieces of ten bars have no peaks: they stood there in green."""
    for seed in range(4):
        write_midi(random_score(seed, num_bars=10), tmp_path / f"{seed}.mid")
    report = compare(EvaluateConfig(generated=str(tmp_path), reference=str(folders / "reference")))
    peaks = [f"peaks {view}" for view in ("pitched", "drums", "tracks")]
    assert all(report["numbers"]["generated"][key] is None for key in peaks)
    assert set(peaks) <= set(report["not_measured"]["generated"])
    assert not set(report["outside"]["generated"]) & set(report["not_measured"]["generated"])
    page, shown = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    (row,) = re.findall(r"<tr><td>similarity peaks, %, pitched tracks together</td>.*?</tr>", page)
    assert "<td class='not'>not measured</td>" in row and "inside" not in row
    assert all(line.endswith(" ?") for line in shown.splitlines() if line.startswith("peaks"))
    assert "? not measured: too few pieces" in shown and "class='inside'>inside" in page
    # the other way round: the real pieces are too short for a band
    swapped = EvaluateConfig(generated=str(folders / "reference"), reference=str(tmp_path), output=str(tmp_path))
    report = compare(swapped)
    assert set(peaks) <= set(report["not_measured"]["generated"])


def test_a_file_that_cannot_be_read_is_left_out_whatever_the_limit(tmp_path, capsys):
    """It ended the evaluation where pieces are chosen by content. A link to nowhere is unreadable for root too."""
    for seed in range(3):
        write_midi(small_score(seed), tmp_path / f"{seed}.mid")
    (tmp_path / "a.mid").symlink_to(tmp_path / "gone.mid")
    for limit, pieces in ((None, 3), (3, 2)):
        assert len(load_music(str(tmp_path), "train", limit)) == pieces
        assert "left out" in capsys.readouterr().out


def test_refusals_are_one_line(folders, tmp_path):
    generated, reference = str(folders / "generated"), str(folders / "reference")
    preprocess(PreprocessConfig(input=reference, output=str(tmp_path / "fine"), resolution=48))
    with pytest.raises(UserError, match="its grid has 48 ticks"):
        load_music(str(tmp_path / "fine"), "train")
    for given, message in (
        ({}, "give --checkpoint"),
        ({"checkpoint": "x", "generated": generated}, "one of them"),
        ({"generated": generated}, "go together"),
        ({"checkpoint": "x", "training": generated}, "--training"),
        ({"generated": generated, "reference": reference, "max_pieces": 0}, "max_pieces"),
    ):
        with pytest.raises(UserError, match=message):
            EvaluateConfig(**given).validate()
    (tmp_path / "few").mkdir()
    write_midi(random_score(0), tmp_path / "few" / "one.mid")
    with pytest.raises(UserError, match="noise floor"):
        run(EvaluateConfig(generated=generated, reference=str(tmp_path / "few")))
    with pytest.raises(UserError, match="no such folder"):
        run(EvaluateConfig(generated=generated, reference=reference, output=str(tmp_path / "none")))
    with pytest.raises(UserError, match=r"--generated .*nosuch: no such folder"):  # --output was said, and not given
        run(EvaluateConfig(generated=str(tmp_path / "nosuch"), reference=reference))
    with pytest.raises(UserError, match="gone: no such folder"):
        run(EvaluateConfig(generated=generated, reference=str(tmp_path / "gone")))
