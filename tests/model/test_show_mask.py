"""The picture of the attention pattern, and its command line."""

from __future__ import annotations

import sys

import pytest

from meloformer.errors import UserError
from meloformer.hid import Tokenizer
from meloformer.midi import write_midi
from meloformer.model import show_mask
from tests.hid.streams import VOCABULARY
from tests.model.music import rich_stream

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("config", [{}, {"summaries": False}, {"pattern": "full_causal"}], ids=str)
def test_the_picture_of_any_rule_is_drawn_with_its_share(config, tmp_path):
    config = show_mask.ModelConfig(size="small", **config)
    share = show_mask.draw_mask(rich_stream(2, 400), VOCABULARY, tmp_path / "mask.png", config=config)
    assert 0 < share < 4  # a short piece in blocks of 64, summaries included, over the blocks of 128 below the diagonal
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_draws_a_file(tmp_path, monkeypatch, capsys):
    write_midi(Tokenizer(VOCABULARY).decode(rich_stream(2, 400)), tmp_path / "cash_$_and_$_.mid")
    arguments = [str(tmp_path / "cash_$_and_$_.mid"), "--output", str(tmp_path / "mask.png")]
    monkeypatch.setattr(sys, "argv", ["show_mask", *arguments, "--bars", "2"])
    show_mask.main()
    assert "of causal attention's blocks visited" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["show_mask", *arguments, "--bars", "0"])
    with pytest.raises(UserError, match="--bars is 0"):
        show_mask.main()
