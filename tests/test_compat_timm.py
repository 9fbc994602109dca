"""timm 1.0.31: the reading of feature indices, which lies in a private module."""

import pytest

from sparing._compat import take_indices


@pytest.mark.parametrize(
    ("indices", "expected"),
    [(None, ([0, 1, 2, 3], 3)), (2, ([2, 3], 3)), ([0, -2], ([0, 2], 2))],
)
def test_indices_are_read_as_timm_reads_them(indices, expected):
    assert take_indices(4, indices) == expected


def test_indices_out_of_range_are_refused():
    with pytest.raises(AssertionError, match="out of range"):
        take_indices(4, [7])
