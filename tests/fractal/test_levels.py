"""What a generator may know of a patch when it predicts it. The public version's levels knew the patch itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meloformer.fractal.levels import ArLevel, MarLevel, neighbourhood

SHAPE = {"width": 16, "num_blocks": 2, "num_heads": 2, "d_ff": 32, "dropout": 0.0}
ORDERS = ("row_major", "column_major")
# (rows, columns, whether the grid varies): a square one as below level 0, and two that are not square
GRIDS = [(4, 4, False), (2, 6, True), (4, 2, True)]


def make(kind: type, rows: int, columns: int, varies: bool, patch: int = 2, **options):
    torch.manual_seed(1)
    level = kind(
        **SHAPE,
        patch=patch,
        rows=rows,
        columns=None if varies else columns,
        cond_width=None if varies else 8,
        **options,
    )
    for parameter in level.parameters():
        if parameter.dim() != 1:
            torch.nn.init.normal_(parameter, std=0.5)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return level.eval()


def problem(rows: int, columns: int, varies: bool, patch: int = 2):
    generator = torch.Generator().manual_seed(2)
    cells = torch.randint(0, 256, (2, rows * columns, patch * patch), generator=generator)
    conditions = None if varies else torch.randn(2, 5, 8, generator=generator)
    return cells, conditions


def place_in_scan(index: int, rows: int, columns: int, order: str) -> int:
    """When a patch of the grid comes, said a second time and plainly."""
    r, c = divmod(index, columns)
    return r * columns + c if order == "row_major" else c * rows + r


def handed_down(level, cells, masked, conditions, columns, causal):
    states = level.states(cells, masked, None, conditions)
    n = cells.shape[1]
    return neighbourhood(states, columns, torch.arange(len(cells) * n), None, causal).view(len(cells), n, 5, -1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_changing_a_patch_of_an_ar_level_moves_nothing_that_comes_before_it_or_is_it(grid, order):
    """Neighbours' states are handed down too: those on the right and below come later, and would bring the patch."""
    rows, columns, varies = grid
    level = make(ArLevel, rows, columns, varies, scan_order=order)
    cells, conditions = problem(rows, columns, varies)
    masked = torch.ones(cells.shape[:2], dtype=torch.bool)
    before = handed_down(level, cells, masked, conditions, columns, True)
    for changed in range(rows * columns):
        other = cells.clone()
        other[0, changed] = (other[0, changed] + 100) % 256
        moved = (handed_down(level, other, masked, conditions, columns, True) != before).flatten(2).any(-1)
        when = place_in_scan(changed, rows, columns, order)
        for patch in range(rows * columns):
            later = place_in_scan(patch, rows, columns, order) > when
            assert not moved[0, patch] or later, (changed, patch)
        following = [p for p in range(rows * columns) if place_in_scan(p, rows, columns, order) == when + 1]
        assert all(moved[0, p] for p in following), "the next patch should see it"
        assert not moved[1].any()


@pytest.mark.parametrize("order", ORDERS)
def test_with_every_neighbour_the_leak_would_be_there(order):
    """The test above can fail: neighbours on the right and below do bring the patch itself."""
    level = make(ArLevel, 4, 4, False, scan_order=order)
    cells, conditions = problem(4, 4, False)
    masked = torch.ones(cells.shape[:2], dtype=torch.bool)
    other = cells.clone()
    other[0, 5] = (other[0, 5] + 100) % 256
    moved = handed_down(level, other, masked, conditions, 4, False) != handed_down(
        level, cells, masked, conditions, 4, False
    )
    assert moved[0, 5].any()


@pytest.mark.parametrize("grid", GRIDS)
def test_a_masked_patch_never_reaches_any_state(grid):
    rows, columns, varies = grid
    level = make(MarLevel, rows, columns, varies)
    cells, conditions = problem(rows, columns, varies)
    masked = torch.zeros(cells.shape[:2], dtype=torch.bool)
    masked[:, ::3] = True
    other = torch.where(masked[..., None], (cells + 100) % 256, cells)
    before = handed_down(level, cells, masked, conditions, columns, False)
    assert torch.equal(handed_down(level, other, masked, conditions, columns, False), before)
    other[0, 1] = (other[0, 1] + 100) % 256  # a known one does
    assert (handed_down(level, other, masked, conditions, columns, False) != before)[0, 0].any()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("padded", [False, True])
def test_patch_by_patch_over_a_cache_is_the_whole_pass(grid, order, padded):
    rows, columns, varies = grid
    level = make(ArLevel, rows, columns, varies, scan_order=order)
    cells, conditions = problem(rows, columns, varies)
    valid = None
    if padded:
        valid = (torch.arange(rows * columns) % columns < columns - 1).expand(2, -1)
        cells = torch.where(valid[..., None], cells, -1)
    whole = level.states(cells, torch.ones(cells.shape[:2], dtype=torch.bool), valid, conditions)
    walk, before = level.begin(2, columns, valid, conditions), None
    for place in sorted(range(rows * columns), key=lambda i: place_in_scan(i, rows, columns, order)):
        torch.testing.assert_close(walk.step(before), whole[:, place], rtol=1e-4, atol=1e-5)
        before = cells[:, place]


def test_neighbours_stand_where_they_should():
    """By hand, on a grid of 2 x 3 that is not square; the border is zero."""
    states = torch.arange(1.0, 7.0).view(1, 6, 1)
    found = neighbourhood(states, 3, torch.arange(6), None, False)[..., 0].int().tolist()
    assert found == [
        [1, 0, 2, 4, 0],
        [2, 0, 3, 5, 1],
        [3, 0, 0, 6, 2],
        [4, 1, 5, 0, 0],
        [5, 2, 6, 0, 4],
        [6, 3, 0, 0, 5],
    ]
    past = neighbourhood(states, 3, torch.tensor([4]), None, True)[..., 0].int().tolist()
    assert past == [[5, 2, 0, 0, 4]]
    beyond = neighbourhood(states, 3, torch.tensor([1]), torch.tensor([[True, True, False] * 2]), False)
    assert beyond[..., 0].int().tolist() == [[2, 0, 0, 5, 1]]


@pytest.mark.parametrize("kind", [ArLevel, MarLevel])
def test_padding_is_not_seen(kind):
    """A roll of 20 columns in patches of 16 has 12 columns that are not there: nothing depends on what stands there."""
    options = {"scan_order": "row_major"} if kind is ArLevel else {}
    level = make(kind, 2, 4, True, **options)
    cells, _ = problem(2, 4, True)
    valid = (torch.arange(8) % 4 < 2).expand(2, -1)
    masked = torch.zeros(2, 8, dtype=torch.bool)
    cells = torch.where(valid[..., None], cells, -1)
    states = level.states(cells, masked, valid, None)
    if kind is MarLevel:
        narrow = cells.view(2, 2, 4, 4)[:, :, :2].flatten(1, 2)
        alone = level.states(narrow, masked[:, :4], None, None)
        torch.testing.assert_close(states.view(2, 2, 4, 16)[:, :, :2].flatten(1, 2), alone, rtol=1e-4, atol=1e-5)
    other = torch.where(valid[..., None], cells, 77)
    assert torch.equal(level.states(other, masked, valid, None)[valid], states[valid])


@pytest.mark.parametrize("order", ORDERS)
def test_what_stands_before_padding_is_seen_behind_it(order):
    """An ar level reads a patch one place later, and there the padding is that follows the last patch of a line."""
    level = make(ArLevel, 3, 4, True, scan_order=order)
    cells, _ = problem(3, 4, True)
    valid = (torch.arange(12) % 4 < 3).expand(2, -1)
    cells, masked = torch.where(valid[..., None], cells, -1), torch.zeros(2, 12, dtype=torch.bool)
    before = level.states(cells, masked, valid, None)
    for changed in (0, 1, 2):
        other = cells.clone()
        other[0, changed] = (other[0, changed] + 100) % 256
        moved = (level.states(other, masked, valid, None) != before).any(-1)[0]
        when = place_in_scan(changed, 3, 4, order)
        later = torch.tensor([place_in_scan(patch, 3, 4, order) > when for patch in range(12)])
        assert moved[later & valid[0]].all() and not moved[~later].any()


def test_the_two_axes_are_told_apart():
    """Positions are two-dimensional: patches of equal content in other places have other states."""
    level = make(MarLevel, 4, 6, True)
    states = level.states(torch.zeros(1, 24, 4, dtype=torch.int64), torch.zeros(1, 24, dtype=torch.bool), None, None)
    assert len(np.unique(states[0].detach().numpy().round(4), axis=0)) >= 4  # rows are absolute
    cells = torch.zeros(1, 24, 4, dtype=torch.int64)
    cells[0, 0] = 200
    states = level.states(cells, torch.zeros(1, 24, dtype=torch.bool), None, None)[0].view(4, 6, -1)
    apart = (states[1, :, None] - states[1, None]).abs().sum(-1) + torch.eye(6)
    assert apart.min() > 1e-4  # columns by their distance to what stands elsewhere
