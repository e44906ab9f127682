"""Rows: streams side by side, padded."""

from __future__ import annotations

import numpy as np
import pytest

from meloformer.hid import annotate, find_segments
from meloformer.hid.rows import SEGMENT_FIELDS, TOKEN_FIELDS, make_row, stack_rows
from tests.hid.streams import VOCABULARY, random_stream


def test_a_row_without_a_size_is_as_large_as_its_documents():
    documents = [random_stream(seed, 200, tracks=True) for seed in (1, 2)]
    length = sum(map(len, documents))
    segments = sum(len(find_segments(annotate(tokens, VOCABULARY)).start) for tokens in documents)
    assert segments > 2
    row, sized = make_row(documents, VOCABULARY), make_row(documents, VOCABULARY, length, segments)
    assert set(row) == {*TOKEN_FIELDS, *SEGMENT_FIELDS}
    for name, values in row.items():
        np.testing.assert_array_equal(values, sized[name])
    assert stack_rows([row])["tokens"].shape == (1, length) and row["segment_start"].shape == (segments,)
    for too_small in ((length - 1, segments), (length, segments - 1)):
        with pytest.raises(ValueError, match="documents need at least"):
            make_row(documents, VOCABULARY, *too_small)
