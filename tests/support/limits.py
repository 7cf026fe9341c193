"""What every configuration does with numbers that make no sense."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import pytest

from lrt.utils.validation import Limits


def refuses_absurd_numbers(kind: Any, limits: Mapping[str, Limits], elsewhere: tuple[str, ...] = ()) -> None:
    """Every number of the dataclass `kind` has limits, and one sentence refuses what is beyond them.

    `elsewhere` names fields that hold several numbers, which `kind` checks by itself.
    """
    numeric = {f.name for f in dataclasses.fields(kind) if re.search(r"\b(int|float)\b", str(f.type))}
    assert numeric == {*limits, *elsewhere}
    for name, limit in limits.items():
        beyond = [-10 * abs(limit.least) - 1, 10 * limit.most + 1]
        for number in [math.nan, math.inf, -math.inf, True, "3", *beyond, *([1.5] if limit.whole else [])]:
            with pytest.raises(ValueError, match=re.escape(name)) as caught:
                kind(**{name: number})
            message = str(caught.value)
            assert repr(number) in message, (name, number)
            assert re.search(r"it must (be|divide)|raise|change|give", message), message
            assert "\n" not in message
