"""Several processes train as one: the same step, the same rows, one voice, one end. gloo, two ranks on the CPU."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode

from meloformer.data import Corpus, RowPlan, batches, steps_in
from meloformer.training import checkpoint, distributed, loop
from meloformer.training.distributed import Ranks
from tests.conftest import ROOT
from tests.training.processes import Run, records
from tests.training.small import small_config, write_corpus


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def make_config(corpus_dir, tmp_path):
    def make(run: str = "run", model: dict | None = None, **given):
        return small_config(corpus_dir, tmp_path / run, model={"dropout": 0.0, **(model or {})}, **given)

    return make


def succeed(config, world_size: int = 1, before=None) -> Run:
    run = Run(config, world_size, before)
    assert run.finish() == [0] * world_size, run.texts
    return run


def weights(config) -> dict[str, torch.Tensor]:
    return checkpoint.read_tensors(checkpoint.find(config.training.output_dir) / checkpoint.MODEL)


def in_update(number: int, action, rank: int):
    """Make `action()` happen in a rank while it works on its update `number`; for Run's `before`."""
    real, count = loop.accumulate, [0]

    def watched(*arguments):
        count[0] += 1
        if count[0] == number:
            action()
        return real(*arguments)

    loop.accumulate = watched


# --- the same step ----------------------------------------------------------------------------------------------


def test_two_processes_take_the_steps_of_one(make_config):
    """2 x 2 micro-steps against 1 x 4, past the end of an epoch, where rank 1 has fewer rows and then none at all."""
    for length in range(384, 640, 16):  # until the last step of an epoch has one row: rank 1 has none
        one, two = (
            make_config(name, max_steps=9, batch_size=1, data={"max_seq_len": length}) for name in ("one", "two")
        )
        plan = RowPlan(Corpus(one.data.data_dir), one.data, 0, 0, "train")
        if plan.num_rows % 4 == 1:
            break
    assert plan.num_rows % 4 == 1 and steps_in(plan, 4) < 9
    one.training.gradient_accumulation_steps = 4
    succeed(one)
    run = succeed(two, 2)
    assert len(records(two)) == 9
    for a, b in zip(records(one), records(two)):
        assert (a["step"], a["epoch"], a["lr"]) == (b["step"], b["epoch"], b["lr"])
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-5)
    for a, b in zip(records(one, "validation"), records(two, "validation")):
        assert b["nats_per_note"] == pytest.approx(a["nats_per_note"], rel=2e-6)
        assert all(a[name] == b[name] for name in ("tokens", "notes", "bars", "rows"))
    mine, theirs = weights(one), weights(two)
    for name in mine:
        torch.testing.assert_close(theirs[name], mine[name], rtol=1e-4, atol=2e-5, msg=name)
    assert "2 x 1 x 2 rows" in run.texts[0]
    assert run.texts[1] == ""


def test_ranks_share_out_the_rows(make_config):
    """Disjoint, and together all of the epoch's, in steps of the same rows whatever the number of ranks."""
    config = make_config()
    plan = RowPlan(Corpus(config.data.data_dir), config.data, 0, 0, "train")
    whole = [[d for rows in step.documents for row in rows for d in row] for step in batches(plan, 0, 4, micro_batch=1)]
    shares = [list(batches(plan, 0, 4, rank, 2, micro_batch=2)) for rank in (0, 1)]
    assert len(whole) == len(shares[0]) == len(shares[1])
    for together, *ranks in zip(whole, *shares):
        parts = [[d for rows in step.documents for row in rows for d in row] for step in ranks]
        assert sorted(map(str, parts[0] + parts[1])) == sorted(map(str, together))
        assert not set(map(str, parts[0])) & set(map(str, parts[1]))
        assert len(ranks[0].micro_batches) == len(ranks[1].micro_batches)


def small_buckets(rank: int) -> None:
    distributed.BUCKET = 5000


def test_gradients_sent_in_many_messages_are_the_same(make_config):
    """Bit for bit: two numbers have one sum. A model of the tests fits into one message otherwise."""
    one, many = (make_config(name, max_steps=3) for name in ("one", "many"))
    succeed(one, 2)
    succeed(many, 2, small_buckets)
    assert records(many) == records(one)
    mine, theirs = weights(one), weights(many)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def tell_messages(rank: int) -> None:
    real = torch.distributed.all_reduce

    def all_reduce(tensor, *arguments, **options):
        print(f"summed {tensor.numel()}")
        return real(tensor, *arguments, **options)

    torch.distributed.all_reduce = all_reduce


def test_a_models_weights_leave_its_gpu_before_they_are_sent(monkeypatch):
    """The main rank would have sent them by NCCL, and the others, whose tensors are on the CPU, waited for gloo: a run
    on several GPUs would have hung before its first step."""
    sent = []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: sent.append(tensor.device.type))
    monkeypatch.setattr(dist, "all_reduce", lambda *_: None)
    with FakeTensorMode():  # a GPU's tensors without a GPU
        weights = {"weight": torch.empty(3, 2, device="cuda")}
    got = Ranks(rank=0, world_size=2).broadcast_tensors(weights)
    assert sent and set(sent) == {"cpu"}
    assert got["weight"].device.type == "cpu"


def test_gradients_are_sent_once_a_step(make_config):
    """However many micro-steps it has: what is sent in between is a few numbers."""
    config = make_config(max_steps=3, batch_size=1, gradient_accumulation_steps=3, val_task_rows=0)
    run = succeed(config, 2, tell_messages)
    size = sum(tensor.numel() for tensor in weights(config).values())
    for text in run.texts:
        messages = [int(line.split()[1]) for line in text.splitlines() if line.startswith("summed")]
        assert messages.count(size) == 3
        assert max(count for count in messages if count != size) < 100


def test_one_process_goes_on_as_two(make_config):
    """Batch 4 as 2 x 2: the same rows, and losses as near as the order of sums allows."""
    whole = make_config("whole", max_steps=8, batch_size=4, gradient_accumulation_steps=1)
    succeed(whole)
    split = make_config("split", max_steps=8, batch_size=4, gradient_accumulation_steps=1, resume="auto")
    succeed(split, 1, functools.partial(in_update, 3, functools.partial(signal.raise_signal, signal.SIGTERM)))
    assert len(records(split)) == 3
    split.training.batch_size = 2
    run = succeed(split, 2)
    assert "resuming" in run.texts[0]
    assert records(split)[:3] == records(whole)[:3]
    for a, b in zip(records(whole), records(split)):
        assert (a["step"], a["epoch"]) == (b["step"], b["epoch"])
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_another_product_is_refused_in_one_line(make_config):
    config = make_config(max_steps=8, resume="auto")
    succeed(config, 1, functools.partial(in_update, 1, functools.partial(signal.raise_signal, signal.SIGTERM)))
    run = Run(config, 2)
    assert run.finish() == [2, 2]
    said = "".join(run.texts)
    assert said.count("error:") == 1 and len(said.splitlines()) == 1
    assert "is 8 rows a step" in said and "so that the product is 4 again" in said


# --- stopping and failing ---------------------------------------------------------------------------------------


def signal_one(which: int, rank: int) -> None:
    if rank == which:
        in_update(3, functools.partial(signal.raise_signal, signal.SIGTERM), rank)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(make_config):
    config = make_config(max_steps=50, batch_size=1)
    run = succeed(config, 2, functools.partial(signal_one, 1))
    assert [record["step"] for record in records(config)] == [1, 2, 3]
    assert "SIGTERM: saved at step 3 of 50" in run.texts[0]
    assert checkpoint.find(config.training.output_dir).name == "step_00000003"


def test_a_signal_that_comes_twice_is_one(make_config):
    """torchrun passes a Ctrl-C on to processes that have had it from the terminal already."""

    config = make_config(max_steps=50, batch_size=1)
    run = succeed(config, 2, interrupt_twice)
    assert "SIGINT: saved at step 2 of 50" in run.texts[0]


def interrupt_twice(rank: int) -> None:
    def both():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    in_update(2, both, rank)


def fail(which: int, error: BaseException, rank: int) -> None:
    def raise_it():
        raise error

    if rank == which:
        in_update(2, raise_it, rank)


@pytest.mark.parametrize("which", [0, 1])
def test_an_error_in_one_rank_ends_all_and_is_said_once(make_config, which):
    config = make_config(max_steps=50, batch_size=1)
    run = Run(config, 2, functools.partial(fail, which, loop.TrainingError("the shard is damaged")))
    assert run.finish() == [2, 2]
    errors = [line for text in run.texts for line in text.splitlines() if line.startswith("error:")]
    assert errors == [f"error: rank {which}: the shard is damaged"], run.texts


def kill_one(which: int, rank: int) -> None:
    if rank == which:
        in_update(2, lambda: os.kill(os.getpid(), signal.SIGKILL), rank)


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_is_killed_is_noticed(make_config, which):
    """Killed for memory, say: nobody speaks for it, so one of the others does."""
    config = make_config(max_steps=50, batch_size=1)
    run = Run(config, 2, functools.partial(kill_one, which))
    codes = run.finish()
    assert codes[which] == -signal.SIGKILL and codes[1 - which] == 2
    said = [line for line in run.texts[1 - which].splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "another process of the run has ended" in said[0] and "--resume auto" in said[0]


def test_a_mistake_that_all_make_is_said_once(make_config, tmp_path):
    config = make_config(max_steps=1)
    config.data.data_dir = str(tmp_path / "nowhere")
    run = Run(config, 2, slow_to_speak)
    wait([process.sentinel for process in run.processes], timeout=120)  # for one, for torchrun ends all then
    assert "nowhere: no such folder" in "".join(run.texts)
    assert run.finish() == [2, 2]
    assert "".join(run.texts).count("nowhere: no such folder") == 1
    assert not Path(config.training.output_dir).exists()


def slow_to_speak(rank: int) -> None:
    def slow(*arguments, **options):
        time.sleep(0.5 * ("file" in options))
        print(*arguments, **options)

    distributed.print = slow


def spoil(rank: int) -> None:
    """Rank 1's loss is infinite from the third update on."""
    real, count = loop.accumulate, [0]

    def spoilt(*arguments):
        loss = real(*arguments)
        count[0] += 1
        return loss * np.inf if rank == 1 and count[0] >= 3 else loss

    loop.accumulate = spoilt


def test_a_loss_that_is_not_finite_in_one_rank_skips_the_update_of_all(make_config):
    config = make_config(max_steps=50, batch_size=1, max_nonfinite_steps=2)
    run = Run(config, 2, spoil)
    assert run.finish() == [2, 2]
    said = "".join(run.texts)
    assert said.count("error:") == 1 and "step 4" in said
    assert said.split("the last rows were")[1].count(".mid bars") >= 4  # of both ranks


# --- as a user starts it ----------------------------------------------------------------------------------------


def test_torchrun_starts_ctrl_c_stops_and_a_plain_run_goes_on(make_config, tmp_path):
    """Ctrl-C reaches the launcher and both processes; then one process with twice the micro-steps takes over."""
    max_steps = 100_000  # not at its end when the signal comes, however late that is
    config = make_config(max_steps=max_steps, batch_size=1, resume="auto", log_interval=1)
    yaml = tmp_path / "config.yaml"
    config.save(yaml)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.Popen(
        [*launcher, "train.py", "--config", str(yaml)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = Path(config.training.output_dir) / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    out, error = run.communicate(timeout=60)
    assert "SIGINT: saved at step" in out, error
    assert out.count("parameters") == 1  # one table
    stopped = len(records(config))
    assert 3 <= stopped < max_steps

    config.training.gradient_accumulation_steps = 4
    succeed(config, 1, functools.partial(in_update, 2, functools.partial(signal.raise_signal, signal.SIGTERM)))
    assert [record["step"] for record in records(config)] == list(range(1, stopped + 3))


def test_torchrun_says_a_mistake_once(tmp_path):
    """Also where the one that speaks is the last to meet it: torchrun ended it when another had ended, in silence."""
    late = tmp_path / "late.py"
    late.write_text(
        "import os, runpy, time\n"
        "time.sleep(os.environ['LOCAL_RANK'] == '0')\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(late), "--data_dir", str(tmp_path), "--batchsize", "2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        "error: --batchsize: no such flag; the nearest is --batch_size"
    ]
