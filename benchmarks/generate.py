"""Tokens a second of the decoding engine, beside transformers' GPT-2 with its KV cache and this model without one.

    python benchmarks/generate.py --size small --threads 2 --contexts 1000,4096,16000 --batch_sizes 1,16

Untrained weights and a made piece of eight parts. Each step is what `generate` does for a token: logits, the grammar,
sampling, annotations; GPT-2's is its forward pass and argmax. All contenders take turns within one run, a round each,
and the medians over the rounds are compared, so that a busy machine disturbs all alike. GPT-2 has the same layers,
width, heads and vocabulary; its cache is filled with noise, which costs what music does. Without transformers its
columns stay empty.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable

import numpy as np
import torch

from meloformer.config import ModelConfig
from meloformer.generation.sampling import Sampling, choose
from meloformer.hid import Annotations, StreamState, Tokenizer, Vocabulary
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
    """The engine at a position of the piece; `step` writes its next token, the same in every row."""

    def __init__(self, model: MeloFormer, tokens: np.ndarray, position: int, batch_size: int, room: int):
        self.tokens, self.at, self.batch_size = tokens, position, batch_size
        session = DecodingSession(model, 1, position + room, (position + room) // 5 + 1)
        row = make_row([tokens[:position]], model.vocabulary, position, position // 5 + 1)
        self.logits = session.prefill(stack_rows([row])).numpy().repeat(batch_size, axis=0)
        self.session = session.branch([0] * batch_size)
        self.states = [StreamState(model.vocabulary) for _ in range(batch_size)]
        for state in self.states:
            for token in tokens[:position].tolist():
                state.push_unchecked(token)

    def step(self) -> None:
        token, sampling, said = int(self.tokens[self.at]), Sampling(), []
        for row, state in enumerate(self.states):
            choose(self.logits[row], state.allowed(masks=False), 0.5, sampling)
            said.append(state.push_unchecked(token))
        given = np.full(self.batch_size, token)
        self.logits = self.session.step(given, Annotations(*np.array(said).T)).numpy()
        self.at += 1


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
    """Median steps a second of each, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for step in contenders.values():
        step()  # warm
    for _ in range(rounds):
        for name, step in contenders.items():
            started = clock()
            for _ in range(steps[name]):
                step()
            seconds[name].append((clock() - started) / steps[name])
    return {name: 1 / float(np.median(values)) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contexts", default="1000,4096,16000")
    parser.add_argument("--batch_sizes", default="1,16")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--uncached_up_to", type=int, default=4096, help="longest context without a cache")
    parser.add_argument("--cpu_time", action="store_true", help="the process's own seconds: for a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    contexts = [int(word) for word in options.contexts.split(",")]
    batch_sizes = [int(word) for word in options.batch_sizes.split(",")]
    vocabulary, config = Vocabulary(), ModelConfig(size=options.size)
    model = MeloFormer(config, vocabulary).eval()
    room = options.steps * options.rounds + 2
    tokens = piece(max(contexts) + room, Tokenizer(vocabulary))

    contenders: dict[str, Callable[[], None]] = {}
    for batch_size in batch_sizes:
        for context in contexts:
            cached = Cached(model, tokens, context, batch_size, room)
            contenders[f"cached {context} x{batch_size}"] = cached.step
        other = gpt2(config, vocabulary.size, 4096, batch_size, room)
        if other is not None and 4096 in contexts:
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
    ratio("batch of 16 at 4,096 against one stream (3 wanted)", "cached 4096 x16", "cached 4096 x1")
    ratio("batch of 16 at 4,096 against GPT-2's (3 wanted)", "cached 4096 x16", "gpt2 4096 x16")


if __name__ == "__main__":
    main()
