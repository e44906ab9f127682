"""Tokens a second of the decoding engine, beside transformers' GPT-2 with its KV cache and this model without one.

    python -m benchmarks.generate --threads 2                 # every ratio, about five minutes on two quiet cores
    python -m benchmarks.generate --device cuda               # the device's own loop, tokens a second alone

Untrained weights and a made piece of eight parts. Each step is what `generate` does for a token: logits, the grammar,
sampling, annotations; GPT-2's is its forward pass and argmax. All contenders take turns within one run, and the best
round of each counts. The streams of a batch stand at different tokens, as sampled ones do. GPT-2 has the same layers,
width, heads, vocabulary and dtype; its cache is filled with noise, which costs what music does. Without transformers
its columns stay empty. `tensors`: the loop that a GPU runs, on this device.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks import whole_numbers
from meloformer.command_line import Parser
from meloformer.config import MODEL_SIZES, ModelConfig
from meloformer.device import choose_device
from meloformer.errors import exit_cleanly
from meloformer.generation import Request, Sampling
from meloformer.generation.on_device import DeviceBatch, captured
from meloformer.generation.request import ConstrainedState
from meloformer.generation.sampling import choose
from meloformer.hid import Annotations, Tokenizer, Vocabulary
from meloformer.hid.rows import make_row, stack_rows
from meloformer.midi import Score, Track, note_table
from meloformer.model import DecodingSession, MeloFormer


def piece(num_tokens: int, tokenizer: Tokenizer) -> np.ndarray:
    """A stream of at least so many tokens: drums, bass, chords and melodies, with rests."""
    rng = np.random.default_rng(0)
    programs = [0, 33, 0, 25, 48, 48, 56, 73]
    tracks = [Track(program, is_drum=i == 0) for i, program in enumerate(programs)]
    bars = num_tokens // 180 + 8
    rows = []
    for track in range(len(tracks)):
        for bar in np.flatnonzero(rng.random(bars) < 0.75):
            for onset in rng.choice(16, size=rng.integers(2, 9), replace=False):
                start = 96 * int(bar) + 6 * int(onset)
                size = 1 + int(rng.integers(2))
                rows += [(track, start, 12, 40 + 3 * int(p), 80) for p in rng.choice(16, size, replace=False)]
    tokens = tokenizer.encode(Score(24, tracks, note_table(rows)))
    if len(tokens) < num_tokens:
        raise ValueError(f"the piece has {len(tokens)} tokens, {num_tokens} are wanted")
    return tokens


class Cached:
    """The engine at a position of the piece; `step` writes the next token of every stream, each two behind the last."""

    def __init__(self, model: MeloFormer, tokens: np.ndarray, position: int, batch_size: int, room: int):
        self.tokens, room = tokens, room + 2 * batch_size
        session, start = prompted(model, tokens[:position], room)
        self.session = session.branch([0] * batch_size)
        self.states = [start.branch() for _ in range(batch_size)]
        self.logits = np.zeros((batch_size, model.vocabulary.size), dtype=np.float32)
        for ahead in range(2 * batch_size):
            self.step(np.arange(batch_size) > ahead // 2)

    def step(self, active: np.ndarray | None = None) -> None:
        tokens = self.tokens[self.session.length]
        sampling, said = Sampling(), []
        for row, (state, token) in enumerate(zip(self.states, tokens.tolist())):
            if active is None or active[row]:
                choose(self.logits[row], state.allowed(), 0.5, sampling)
                said.append(state.push(token))
            else:
                said.append([0] * len(Annotations._fields))
        self.logits = self.session.step(tokens, Annotations(*np.array(said).T), active).numpy()


def prompted(model: MeloFormer, tokens: np.ndarray, room: int) -> tuple[DecodingSession, ConstrainedState]:
    """A session behind these tokens with room for so many more, and the stream there."""
    length = len(tokens) + room
    session = DecodingSession(model, 1, length, length // 5 + 1)
    session.prefill(stack_rows([make_row([tokens], model.vocabulary, len(tokens), len(tokens) // 5 + 1)]))
    state = ConstrainedState(model.vocabulary, Request(), 10**6)
    for token in tokens.tolist():
        state.push(token)
    return session, state


def tensors(model: MeloFormer, tokens: np.ndarray, batch_size: int, room: int) -> Callable[[], None]:
    """A step of the loop that stays on the device, as it is played there, behind a prompt of these tokens."""
    session, state = prompted(model, tokens, room)
    state.max_length = len(tokens) + room
    logits = torch.zeros(1, model.vocabulary.size, device=model.device)
    batch = DeviceBatch(session, state, logits, [(0, i) for i in range(batch_size)], Sampling())
    batch.reach(len(tokens) + room * 6 // 5)
    batch.session.width = batch.session.span // 4
    with torch.inference_mode():
        batch.step()
        play = captured(batch.step, model.device)

    @torch.inference_mode()
    def step() -> None:
        play()

    return step


def gpt2(config: ModelConfig, vocab_size: int, position: int, batch_size: int, room: int) -> Callable[[], None] | None:
    """A step of transformers' GPT-2 behind `position` tokens; None without transformers."""
    try:
        from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=position + room + 1,
            n_embd=config.d_model,
            n_layer=config.n_layer,
            n_head=config.n_head,
        )
    ).eval()
    cache = DynamicCache()
    shape = (batch_size, config.n_head, position, config.d_model // config.n_head)
    for layer in range(config.n_layer):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    ids = torch.zeros(batch_size, 1, dtype=torch.long)

    @torch.inference_mode()
    def step() -> None:
        model(ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)

    return step


def rates(
    contenders: dict[str, Callable[[], None]], steps: dict[str, int], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Steps a second of each in its best round; they take turns, and the first round only warms up."""
    best = dict.fromkeys(contenders, float("inf"))
    for turn in range(rounds + 1):
        for name, step in contenders.items():
            started = clock()
            for _ in range(steps[name]):
                step()
            if turn:
                best[name] = min(best[name], (clock() - started) / steps[name])
    return {name: 1 / seconds for name, seconds in best.items()}


def on_gpu(model: MeloFormer, tokens: np.ndarray, options: argparse.Namespace) -> None:
    """Tokens a second of the captured step, at 4,096 tokens of a prompt."""
    for batch_size in (1, 64):
        step = tensors(model, tokens[:4096], batch_size, 400)
        seconds = []
        for _ in range(options.rounds):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(50):
                step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        wanted = {1: 600, 64: 15_000}[batch_size]
        print(f"{options.size} x{batch_size}: {50 * batch_size / min(seconds):.0f} tokens/s ({wanted} wanted of base)")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(MODEL_SIZES), help="default small, on a GPU base")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contexts", default="1000,4096,16000", type=whole_numbers)
    parser.add_argument("--batch_sizes", default="1,16", type=whole_numbers)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--uncached_up_to", type=int, default=4096, help="longest context without a cache")
    parser.add_argument("--cpu_time", action="store_true", help="the process's own seconds: for a busy machine")
    options = parser.parse_args()
    device = choose_device(options.device)
    options.size = options.size or ("small" if device.type == "cpu" else "base")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    contexts, batch_sizes = options.contexts, options.batch_sizes
    vocabulary, config = Vocabulary(), ModelConfig(size=options.size)
    model = MeloFormer(config, vocabulary).eval().to(device)
    room = options.steps * (options.rounds + 1) + 2
    tokens = piece(max([*contexts, 4096]) + room + 2 * max(batch_sizes), Tokenizer(vocabulary))
    if device.type == "cuda":
        on_gpu(model, tokens, options)
        return

    contenders: dict[str, Callable[[], None]] = {}
    for batch_size in batch_sizes:
        for context in contexts:
            contenders[f"cached {context} x{batch_size}"] = Cached(model, tokens, context, batch_size, room).step
        if 4096 in contexts:
            contenders[f"tensors 4096 x{batch_size}"] = tensors(model, tokens[:4096], batch_size, room)
            other = gpt2(config, vocabulary.size, 4096, batch_size, room)
            if other is not None:
                contenders[f"gpt2 4096 x{batch_size}"] = other
    for context in contexts:
        if context <= options.uncached_up_to:
            contenders[f"uncached {context} x1"] = lambda context=context: model.logits(tokens[:context])
    gc.collect()
    clock = time.process_time if options.cpu_time else time.perf_counter
    steps = {name: 1 if name.startswith("uncached") else options.steps for name in contenders}
    per_second = rates(contenders, steps, options.rounds, clock)
    found = {name: rate * int(name.split("x")[-1]) for name, rate in per_second.items()}
    for name, rate in found.items():
        print(f"{name:20} {rate:9.2f} tokens/s")

    def ratio(what: str, a: str, b: str) -> None:
        if a in found and b in found:
            print(f"{what}: {found[a] / found[b]:.2f}")

    ratio("one stream at 4,096 against GPT-2 (1.5 wanted)", "cached 4096 x1", "gpt2 4096 x1")
    ratio("one stream at 4,096 against no cache (30 wanted)", "cached 4096 x1", "uncached 4096 x1")
    ratio("one stream at 1,000 against no cache", "cached 1000 x1", "uncached 1000 x1")
    for size in batch_sizes:
        ratio(f"batch {size}: at 16,000 against 1,000 (0.7 wanted)", f"cached 16000 x{size}", f"cached 1000 x{size}")
        ratio(f"batch {size}: tensors against the host's loop", f"tensors 4096 x{size}", f"cached 4096 x{size}")
    ratio("batch of 16 at 4,096 against one stream (3 wanted)", "cached 4096 x16", "cached 4096 x1")
    ratio("batch of 16 at 4,096 against GPT-2's (3 wanted)", "cached 4096 x16", "gpt2 4096 x16")


if __name__ == "__main__":
    exit_cleanly(main)
