"""metrics.jsonl is cut back to the checkpoint; the table lines up."""

from __future__ import annotations

import json

from meloformer.training.logging import cut_back, flatten, table


def test_cut_back_drops_later_records_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": step}) + "\n" for step in (1, 2, 3, 4)]
    path.write_text("".join(lines) + '{"kind": "train", "st')
    cut_back(path, 3)
    assert path.read_text() == "".join(lines[:3])
    path.write_text("".join(lines[:2]) + lines[2].rstrip("\n"))  # whole JSON, but the line was not finished
    cut_back(path, 3)
    assert path.read_text() == "".join(lines[:2])
    validation = json.dumps({"kind": "validation", "step": 3}) + "\n"
    path.write_text("".join(lines[:3]) + validation)
    cut_back(path, 3)
    assert path.read_text() == "".join(lines[:3]) + validation
    cut_back(path, 3, validation_due=True)
    assert path.read_text() == "".join(lines[:3])
    cut_back(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


def test_flatten_names_numbers_by_their_path():
    record = {"kind": "validation", "step": 4, "nats_per_note": 3.5, "by_type": {"T": {"tokens": 2}}, "loss": None}
    assert dict(flatten(record)) == {"nats_per_note": 3.5, "by_type/T/tokens": 2}


def test_table_aligns_its_second_column():
    assert table([("a", "1"), ("long", "2")]) == "  a     1\n  long  2"
