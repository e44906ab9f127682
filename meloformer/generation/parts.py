"""New parts beside a prompt's, and what goes on from window to window where a task does not fit the model's context.

>>> task = accompaniment(prompt, [33], model.max_seq_len)                              # doctest: +SKIP
>>> for sample in generate(model, task.request):                                       # doctest: +SKIP
...     added = go_on(task, sample, lambda task, number: generate(model, task.request)[0])
...     task.merge(added.notes, added.gone, f"{sample.index}.mid")

In: a `Task` whose window may end before its parts do, and a sample of it. Out: `Added`, the notes of all windows.

The first window's parts are tracks of their own behind the given ones. In every later window the same tracks stand
there with what has been written, their next bars masked, and the model reads as many bars before those as it writes.
Cells to rewrite are taken bar by bar likewise. A bar that the length limit cut is written again by the next window.

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
from meloformer.generation.steering import FREE, Steering
from meloformer.generation.tasks import (
    Task,
    Window,
    as_task,
    laid_over,
    largest,
    length,
    marks,
    refuse_windows,
    rewriting,
)
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
    laid = laid_over(prompt, bars, steering, adds_parts=True)
    window = Window(bars.start, bars.stop)
    if length(prompt, window, instruments, steering) <= max_length:
        task = as_task(prompt, window, list(instruments), steering, "", max_length)
        return replace(task, prompt=laid, steering=steering)
    refuse_windows(prompt, bars.start, bars.stop, steering, max_length)
    what, remedy = f"a bar of it and {len(instruments)} new parts", "add fewer parts at a time"
    later = _with_new(laid, instruments, note_table(), steering)
    for bar in bars:
        _largest(later, len(instruments), bar, bars.stop, steering, max_length, what, remedy, most=0)

    def grown(size: int) -> Window:
        return Window(bars.start, bars.start + size)

    left = replace(marks(steering), parts=steering.parts)
    size = largest(laid, grown, 1, len(bars), instruments, left, max_length, what, remedy)
    note = f"reads and writes {size} bars, then goes on from there"
    task = as_task(laid, grown(size), list(instruments), left, note, max_length)
    return replace(task, until=bars.stop, steering=steering)


@dataclass
class Added:
    """What all windows have written: notes as `Task.new_notes` gives them, the (track, bar) whose old notes go, how
    many tokens, and the cells that are not there: none, but where a window could not end even its first bar."""

    notes: np.ndarray
    gone: frozenset[tuple[int, int]]
    tokens: int
    unfinished: list[tuple[int, int]]


def go_on(task: Task, sample: Sample, write: Callable[[Task, int], Sample]) -> Added:
    """All that a task is to write: the sample of its first window, and what `write` makes of the task of each later
    one; it is given the window's number, from 1."""
    prompt, windows = task.prompt, 0
    notes, missing = task.grid_notes(sample), _to_do(task, task.unfinished(sample))
    tokens = len(sample.tokens) - len(task.request.given)
    next_window = _next_parts if task.instruments else _next_cells
    can_go_on = task.end_bar == prompt.num_bars and task.steering.bar_density is None
    while missing and can_go_on:
        windows += 1
        try:
            step, notes = next_window(task, notes, missing)
        except UserError:  # beside what has been written not even a bar has room
            break
        step = replace(step, request=replace(step.request, chooses=task.request.chooses))
        sample = write(step, windows)
        tokens += len(sample.tokens) - len(step.request.given)
        notes = np.concatenate([notes, step.grid_notes(sample)])
        left = _to_do(task, [*sorted({*missing}.difference(step.to_write)), *step.unfinished(sample)])
        can_go_on, missing = len(left) < len(missing), left
    half = task.replaced.intersection(missing)
    notes = notes[[cell not in half for cell in prompt.cells_of(notes)]] if half else notes
    gone = task.replaced.difference(missing)
    return Added(prompt.file_notes(notes), gone, tokens, missing)


def _to_do(task: Task, missing: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What further windows write where these cells are missing: of new parts everything from the first bar on."""
    if not task.instruments or not missing:
        return missing
    return list(product(_places(task.prompt, task.instruments), range(min(bar for _, bar in missing), task.until)))


def _next_parts(task: Task, notes: np.ndarray, missing: list[tuple[int, int]]) -> tuple[Task, np.ndarray]:
    """The task of the next window of new parts, and the notes that stay: those before the first bar that is missing."""
    bar = min(bar for _, bar in missing)
    notes = notes[notes["onset"] < task.prompt.score.bar_lines()[bar]]
    heard = _with_new(task.prompt, task.instruments, notes, task.steering)
    window = _largest(heard, len(task.instruments), bar, task.until, task.steering, task.max_length, "", "")
    return as_task(heard, window, [], marks(task.steering), "", task.max_length), notes


def _next_cells(task: Task, notes: np.ndarray, missing: list[tuple[int, int]]) -> tuple[Task, np.ndarray]:
    """The task of the next window of cells, and the notes that stay: those of cells that are written."""
    prompt, cells = task.prompt, frozenset(missing)
    notes = notes[[cell not in cells for cell in prompt.cells_of(notes)]]
    heard = prompt.with_music(prompt.derived, notes, gone=task.replaced.difference(cells))
    return rewriting(heard, cells, task.max_length, marks(task.steering)), notes


def _places(prompt: Prompt, instruments: Sequence[int]) -> range:
    """The tracks of new parts."""
    first = len(prompt.score.tracks)
    return range(first, first + len(instruments))


def _with_new(prompt: Prompt, instruments: Sequence[int], notes: np.ndarray, steering: Steering) -> Prompt:
    """The prompt with the new parts as far as they are written, and with what is asked of them."""
    asked = steering.controls(prompt.vocabulary, prompt.tags).parts_of(instruments)
    rows = [(track, -1, -1, token) for track, tokens in zip(_places(prompt, instruments), asked) for token in tokens]
    rows = control_rows(np.concatenate([prompt.derived, np.array(rows, dtype=np.int64).reshape(-1, 4)]))
    return prompt.with_music(rows, notes, instruments)


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
    size = largest(prompt, window, 0, most, [], marks(steering), max_length, what, remedy)
    return window(size)
