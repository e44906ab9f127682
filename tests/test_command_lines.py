"""The command lines as a user types them: the documented ones parse, help is quick, a mistake is one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from meloformer.command_config import GenerateConfig
from meloformer.command_line import load
from meloformer.config import Config, PreprocessConfig
from meloformer.demo import summary
from meloformer.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["train.py", "preprocess_data.py", "generate.py", "evaluate.py"]


def run(*words: str, python_flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *python_flags, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


# The four command lines of the v0.8 guide, paths aside.
QUICK_TEST = (
    "--data_dir processed_data_mini --model_size small --max_seq_len 2048 --max_bars 128 --max_samples 50"
    " --batch_size 1 --gradient_accumulation_steps 4 --learning_rate 3e-4 --epochs 1"
)
ONE_GPU = (
    "--data_dir processed_data --model_size base --max_seq_len 24576 --max_bars 2048 --batch_size 4"
    " --gradient_accumulation_steps 8 --learning_rate 3e-4 --epochs 100"
)
EIGHT_GPUS = (
    "--data_dir processed_data --model_size large --max_seq_len 24576 --max_bars 2048 --batch_size 2"
    " --gradient_accumulation_steps 4 --learning_rate 3e-4 --epochs 100"
)
PREPROCESS = "--input midi_files.txt --output processed_data/ --workers 10 --shard-size 10000"


def test_documented_quick_test():
    config = load(Config, QUICK_TEST.split())
    assert (config.model.size, config.model.n_layer, config.data.max_seq_len) == ("small", 6, 2048)
    assert (config.data.max_bars, config.data.max_samples) == (128, 50)
    assert (config.training.batch_size, config.training.gradient_accumulation_steps) == (1, 4)
    assert (config.training.learning_rate, config.training.epochs) == (3e-4, 1)


def test_documented_single_gpu_line_is_the_defaults():
    assert load(Config, ONE_GPU.split()) == load(Config, ["--data_dir", "processed_data"])


def test_documented_eight_gpu_line():
    config = load(Config, EIGHT_GPUS.split())
    assert (config.model.size, config.training.batch_size, config.training.gradient_accumulation_steps) == (
        "large",
        2,
        4,
    )


def test_documented_preprocessing_line():
    config = load(PreprocessConfig, PREPROCESS.split())
    assert (config.input, config.output) == ("midi_files.txt", "processed_data/")
    assert (config.workers, config.shard_size) == (10, 10000)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_importing_torch(script):
    done = run(script, "--help", python_flags=("-X", "importtime"))
    assert done.returncode == 0
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "numpy", "symusic", "matplotlib"}
    assert "default" in done.stdout and "--config" in done.stdout


def test_help_is_grouped_and_shows_defaults():
    help_text = " ".join(run("train.py", "--help").stdout.split())
    places = [help_text.index(title) for title in ("the model:", "the data:", "training:")]
    assert places == sorted(places)
    assert "(default: 24576; with init_from what that was trained on)" in help_text and "(required)" in help_text


@pytest.mark.parametrize(
    "words",
    [
        ("train.py", "--data_dir", "x", "--model_sise", "base"),
        ("train.py", "--data_dir", "x", "--epochs", "many"),
        ("train.py", "--config", "nowhere.yaml"),
        ("train.py",),
        ("preprocess_data.py", "--input", "x", "--output", "y", "--wrokers", "3"),
        ("generate.py", "--checkpoint", "x", "--output", "y", "--top_p", "2"),
        ("evaluate.py", "--checkpoint", "x", "--split", "valid"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_status_2(words):
    done = run(*words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("statement", "line"),
    [
        ("open('nowhere/x.mid')", "error: nowhere/x.mid: No such file or directory"),
        ("files.write_atomic('README.md/x.png', b'')", "error: README.md/.x.png.tmp: Not a directory"),
        ("[][0]", None),  # a fault of the code keeps its traceback
        ("raise OSError('header\\nis cut')", "error: header is cut"),
    ],
)
def test_what_the_system_refuses_is_one_line(statement, line):
    code = f"from meloformer import errors, files\ndef main():\n    {statement}\nerrors.exit_cleanly(main)"
    done = run("-c", code)
    if line is None:
        assert done.returncode == 1 and "IndexError" in done.stderr
    else:
        assert done.returncode == 2 and done.stderr == f"{line}\n"


@pytest.mark.parametrize(
    ("words", "module"),
    [
        (("preprocess_data.py", "--input", "x", "--output", "y"), "symusic"),
        (("train.py", "--data_dir", "x"), "torch"),
        (("generate.py", "--checkpoint", "pretrained", "--output", "y"), "torch"),
        (("evaluate.py", "--checkpoint", "pretrained"), "torch"),
    ],
)
def test_ctrl_c_while_a_command_imports_ends_it(tmp_path, monkeypatch, words, module):
    """Raised inside an import it was lost, another error with a traceback, or the end of the interpreter."""
    swallow = "try:\n    os.kill(os.getpid(), 2)\n    time.sleep(5)\nexcept BaseException:\n    pass\n"
    (tmp_path / f"{module}.py").write_text(f"import os, time\n{swallow}raise SystemExit(9)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background is deaf to it
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


# --- the demo's last page -----------------------------------------------------------------------------------------


def test_the_demo_page_puts_the_model_beside_its_baselines(tmp_path):
    from meloformer.midi import Score, Track, note_table, write_midi

    (tmp_path / "run").mkdir()
    (tmp_path / "out").mkdir()
    baselines = {"unigram": {"nats_per_note": 15.9}, "bigram": {"nats_per_note": 10.6}}
    evaluation = {"nats_per_note": 3.5, "baselines": baselines}
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(evaluation))
    tracks = [Track(program=0), Track(program=0, is_drum=True)]
    notes = note_table([(0, 0, 480, 60, 90), (1, 480, 480, 38, 90)])
    write_midi(Score(480, tracks, notes), tmp_path / "out" / "sample.mid")
    (tmp_path / "out" / "sample.png").touch()
    page = summary(tmp_path / "run", tmp_path / "out")
    assert page.index("3.50") < page.index("10.60") < page.index("15.90")
    assert "0:01, 2 tracks, 2 notes" in page and str(tmp_path / "out" / "sample.png") in page


def test_the_demo_page_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"evaluation.json: no such file; write it with evaluate.py"):
        summary(tmp_path, tmp_path)
    (tmp_path / "evaluation.json").write_text('{"nats_per_note": 3.5}')
    with pytest.raises(UserError, match=r"no .mid file"):
        summary(tmp_path, tmp_path)


def test_a_home_is_found_behind_an_equals_sign(monkeypatch):
    """A shell leaves the ~ of --output=~/out as it is, and a folder of that name was made."""
    monkeypatch.setenv("HOME", "/home/ada")
    config = load(GenerateConfig, ["--checkpoint", "~/run", "--output=~/out", "prompt=~/a.mid", "--anew", "--tag=~x"])
    assert (config.checkpoint, config.output, config.prompt) == ("/home/ada/run", "/home/ada/out", "/home/ada/a.mid")
    assert config.tag == "~x"


MODULE_COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for room in ("meloformer", "benchmarks")
    for path in sorted((ROOT / room).rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULE_COMMANDS)
def test_a_module_s_command_answers_a_mistake_as_the_scripts_do(name, monkeypatch):
    """Three of the benchmarks had argparse's own two lines, and a traceback for a folder that is not there."""
    module = import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--no_such_flag"])
    with pytest.raises(UserError, match="--help lists every flag"):
        module.main()
    assert "exit_cleanly(main)" in Path(module.__file__).read_text(encoding="utf-8")
