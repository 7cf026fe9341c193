"""What a message repeats of a value."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lrt.utils.validation import LONGEST, Limits, check_numbers, shorten


def test_a_message_repeats_no_more_of_a_value_than_is_read():
    assert shorten(10**29) == str(10**29)
    assert shorten(10**30) == shorten(10**9000) == "a number of more than 30 digits"
    assert shorten(-(10**9000)) == "a negative number of more than 30 digits"
    assert shorten([10**9000]) == "a list with a number of more than 30 digits"
    assert shorten("ab") == "'ab'"
    assert shorten("a" * 5000) == "'" + "a" * (LONGEST - 1) + "… (5,002 characters)"


@pytest.mark.parametrize("digits", [401, 5000])
def test_a_long_number_is_refused_in_a_short_line(digits: int):
    @dataclass
    class Config:
        depth: int

    with pytest.raises(ValueError, match="depth is a number of more than 30 digits; it must be a whole number"):
        check_numbers(Config(10**digits), {"depth": Limits(1, 100, whole=True)})
