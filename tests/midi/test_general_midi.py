"""Names of instruments, there and back."""

from __future__ import annotations

import pytest

from meloformer.errors import UserError
from meloformer.midi.general_midi import (
    FAMILY_NAMES,
    PERCUSSION_NAMES,
    PROGRAM_NAMES,
    instrument_name,
    parse_instrument,
    percussion_name,
)


def test_the_tables_are_whole():
    assert len(PROGRAM_NAMES) == len(set(PROGRAM_NAMES)) == 128 and len(FAMILY_NAMES) == 16
    assert len(PERCUSSION_NAMES) == len(set(PERCUSSION_NAMES)) == 47  # keys 35..81
    assert PROGRAM_NAMES[24] == "Acoustic Guitar (nylon)" and PROGRAM_NAMES[127] == "Gunshot"
    assert percussion_name(42) == "Closed Hi-hat" and percussion_name(81) == "Open Triangle"
    assert percussion_name(3) == "key 3"


def test_every_name_comes_back():
    for instrument in range(129):
        assert parse_instrument(instrument_name(instrument)) == instrument
        assert parse_instrument(f" {instrument_name(instrument).upper()} ") == instrument
        assert parse_instrument(str(instrument)) == instrument


@pytest.mark.parametrize("text, instrument", [("electric bass", 33), ("flut", 73), ("drum", 128), ("lead 2", 81)])
def test_a_beginning_is_enough(text, instrument):
    assert parse_instrument(text) == instrument


@pytest.mark.parametrize(
    "text, nearest",
    [
        ("piano", "Acoustic Grand Piano"),
        ("elctric bass", "Electric Bass"),
        ("tenor sacks", "Tenor Sax"),
        ("129", ""),
        ("", ""),
        ("-1", ""),
    ],
)
def test_what_is_no_instrument_names_the_nearest(text, nearest):
    with pytest.raises(UserError, match=nearest or r"accepted$"):
        parse_instrument(text)


def test_an_instrument_that_is_none():
    with pytest.raises(UserError, match="129"):
        instrument_name(129)
