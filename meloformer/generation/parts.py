"""New parts beside a prompt's, in any number of bars: window by window where they do not fit the model's context.

>>> task = accompaniment(prompt, [33], model.max_seq_len)                              # doctest: +SKIP
>>> for sample in generate(model, task.request):                                       # doctest: +SKIP
...     added = go_on(task, sample, lambda task, number: generate(model, task.request)[0])
...     task.merge(added.notes, frozenset(), f"{sample.index}.mid")

In: a `Task` whose window may end before its parts do, and a sample of it. Out: `Added`, the notes of all windows.

The first window's parts are tracks of their own behind the given ones. In every later window the same tracks stand
there with what has been written, their next bars masked, and the model reads as many bars before those as it writes.
A bar that the length limit cut is written again by the next window.

The surprise: where the piece fits, there is one window and the same notes as ever; where it does not, each sample goes
its own way from its first window on, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from meloformer.errors import UserError
from meloformer.generation.engine import Sample
from meloformer.generation.prompt import Prompt
from meloformer.generation.steering import FREE, Frame, Steering, prompt_rows
from meloformer.generation.tasks import Task, Window, as_task, largest, length
from meloformer.hid.controls import control_rows
from meloformer.midi.score import note_table


def accompaniment(
    prompt: Prompt,
    instruments: Sequence[int],
    max_length: int,
    prompt_bars: int | None = None,
    steering: Steering = FREE,
    bars: range | None = None,
) -> Task:
    """New parts beside the given ones in `bars`, counted from 0, or the last `prompt_bars`, or the whole piece; the
    steering's parts are they. Where those do not fit the context, its window is the first of those that do."""
    if bars is None:
        bars = range(prompt.num_bars - min(prompt_bars or prompt.num_bars, prompt.num_bars), prompt.num_bars)
    # What is asked is laid over all of the bars here, so that a progression goes on from window to window.
    frame = Frame(0, prompt.num_bars, bars, range(len(prompt.score.tracks)), adds_parts=True)
    rows = prompt_rows(prompt.derived, prompt.score, frame, steering.controls(prompt.vocabulary, prompt.tags))
    laid = prompt.with_parts([], note_table(), rows)

    window = Window(bars.start, bars.stop)
    if length(prompt, window, instruments, steering) <= max_length:
        task = as_task(prompt, window, list(instruments), steering, "", max_length)
        return replace(task, prompt=laid, steering=steering)
    if steering.bar_density is not None:
        raise UserError(
            f"{prompt.path}: bar_density with new parts needs all their bars in {max_length} tokens; name fewer bars"
        )
    for name, given in (
        ("begin", steering.begin and bars.start > 0),
        ("end", steering.end and bars.stop < prompt.num_bars),
    ):
        if given:
            raise UserError(f"{name}: the new parts of {prompt.path} do not reach there; leave it out")
    what, remedy = f"a bar of it and {len(instruments)} new parts", "add fewer parts at a time"
    later = _with_new(laid, instruments, note_table(), steering)
    for bar in bars:
        _largest(later, len(instruments), bar, bars.stop, steering, max_length, what, remedy, most=0)

    def grown(size: int) -> Window:
        return Window(bars.start, bars.start + size)

    left = replace(_marks(steering), parts=steering.parts)
    size = largest(laid, grown, 1, len(bars), instruments, left, max_length, what, remedy)
    note = f"reads and writes {size} bars, then goes on from there"
    task = as_task(laid, grown(size), list(instruments), left, note, max_length)
    return replace(task, until=bars.stop, steering=steering)


@dataclass
class Added:
    """What was written of new parts: notes as `Task.new_notes` gives them, the tokens written, and the cells that are
    not there: none, but where not even one bar could be ended."""

    notes: np.ndarray
    tokens: int
    unfinished: list[tuple[int, int]]


def go_on(task: Task, sample: Sample, write: Callable[[Task, int], Sample]) -> Added:
    """All bars of the new parts: those of the sample of the first window, and those that `write` makes of the task of
    each later one; it is given the window's number, from 1."""
    prompt, instruments, steering = task.prompt, task.instruments, task.steering
    notes = task.grid_notes(sample)
    tokens = len(sample.tokens) - len(task.request.given)
    missing, begun, number = task.unfinished(sample), task.first_bar, 0
    while missing:
        bar = min(bar for _, bar in missing)
        if bar == begun and number:  # a window that could not end its first bar
            break
        notes = notes[notes["onset"] < prompt.score.bar_lines()[bar]]
        begun, number = bar, number + 1
        later = _with_new(prompt, instruments, notes, steering)
        window = _largest(later, len(instruments), bar, task.until, steering, task.max_length, "", "")
        step = as_task(later, window, [], _marks(steering), "", task.max_length)
        sample = write(step, number)
        tokens += len(sample.tokens) - len(step.request.given)
        notes = np.concatenate([notes, step.grid_notes(sample)])
        beyond = product(_places(prompt, instruments), range(window.last, task.until))
        missing = [*step.unfinished(sample), *beyond]
    return Added(prompt.file_notes(notes), tokens, missing)


def _places(prompt: Prompt, instruments: Sequence[int]) -> range:
    """The tracks of new parts."""
    first = len(prompt.score.tracks)
    return range(first, first + len(instruments))


def _marks(steering: Steering) -> Steering:
    """Beginning and end alone, where they are not to be said."""
    return replace(FREE, begin=None if steering.begin else steering.begin, end=None if steering.end else steering.end)


def _with_new(prompt: Prompt, instruments: Sequence[int], notes: np.ndarray, steering: Steering) -> Prompt:
    """The prompt with the new parts as far as they are written, and with what is asked of them."""
    asked = steering.controls(prompt.vocabulary, prompt.tags).parts_of(instruments)
    rows = [(track, -1, -1, token) for track, tokens in zip(_places(prompt, instruments), asked) for token in tokens]
    rows = control_rows(np.concatenate([prompt.derived, np.array(rows, dtype=np.int64).reshape(-1, 4)]))
    return prompt.with_parts(instruments, notes, rows)


def _largest(
    prompt: Prompt,
    parts: int,
    bar: int,
    until: int,
    steering: Steering,
    max_length: int,
    what: str,
    remedy: str,
    most: int | None = None,
) -> Window:
    """The largest window for the bars from `bar` on, with as many before them; of size 0, that bar alone."""
    tracks = range(len(prompt.score.tracks) - parts, len(prompt.score.tracks))

    def window(size: int) -> Window:
        last = min(bar + max(size, 1), until)
        return Window(max(bar - size, 0), last, frozenset(product(tracks, range(bar, last))))

    most = until - bar if most is None else most
    size = largest(prompt, window, 0, most, [], _marks(steering), max_length, what, remedy)
    return window(size)
