"""What stands side by side is what is seen, wherever it came from, after any coming and going."""

from __future__ import annotations

import numpy as np
import torch

from meloformer.model.visible_keys import History, VisibleKeys, bytes_of

SHAPE = (2, 2, 3, 4)  # layer, K and V, H, D


def fill(history: History, values: torch.Tensor) -> None:
    for slot, value in enumerate(values):
        history.write(slot, bytes_of(value))


def test_the_keys_held_are_the_keys_seen():
    rng, values = np.random.default_rng(0), torch.randn(80, *SHAPE)
    first = History(torch.empty(0, *SHAPE), 80)
    fill(first, values[:30])
    history = first.branch(30).branch(30)  # shared with the first; the rest is its own
    keys, seen = VisibleKeys(history), np.zeros(80, dtype=bool)
    for used in range(30, 80):
        history.write(used, bytes_of(values[used]))
        start = 0 if used % 9 == 0 else int(rng.integers(used))
        seen[start : used + 1] = rng.random(used + 1 - start) < rng.choice([0, 0.1, 0.6, 1])
        keys.update(seen[start : used + 1], start)
        assert sorted(keys.slots[: keys.count].tolist()) == np.flatnonzero(seen).tolist()
        for slot in np.flatnonzero(seen).tolist():
            assert (keys.rows[keys.place[slot]] == bytes_of(values[slot])).all()
        assert (keys.place[~seen] == -1).all()
        if keys.count:
            q, (k, v) = torch.randn(1, 3, 1, 4), values[seen][:, 1].permute(1, 2, 0, 3)
            expected = torch.softmax(q[0] @ k.transpose(1, 2) / 2, dim=-1) @ v
            torch.testing.assert_close(keys.attend(1, q)[0], expected)


def test_a_branch_writes_where_its_origin_does_not_read():
    origin = History(torch.empty(0, *SHAPE), 10)
    values = torch.randn(6, *SHAPE)
    fill(origin, values[:4])
    branches = [origin.branch(4), origin.branch(4)]
    for history, value in zip([origin, *branches], (1.0, 2.0, 3.0)):
        history.write(4, bytes_of(torch.full(SHAPE, value)))
    for history, value in zip([origin, *branches], (1.0, 2.0, 3.0)):
        found = torch.zeros(3, *SHAPE)
        history.send(np.array([0, 3, 4]), bytes_of(found), np.arange(3))
        assert torch.equal(found[:2], values[[0, 3]])
        assert (found[2] == value).all()
        assert len(history) == 10
