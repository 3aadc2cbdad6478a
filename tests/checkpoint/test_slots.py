"""Matrices read in pieces."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_ms_models.checkpoint.slots import PIECE, pieces


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**5))
def test_pieces_make_up_the_rows(start: int, count: int, columns: int) -> None:
    found = list(pieces(slice(start, start + count), columns))
    assert found and found[0][0] == 0
    position = start
    for first, rows in found:
        assert (first, rows.start) == (position - start, position)
        assert first % 16 == 0
        assert (rows.stop - rows.start) * columns <= max(PIECE, 16 * columns)
        position = rows.stop
    assert position == start + count
