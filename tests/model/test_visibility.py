"""What a position may see, against the sentence that says it, key by key."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from lrt.model.visibility import additive, visible_keys


def sees(query: int, key: int, window: int | None, query_document: int, key_document: int) -> bool:
    """Position p sees the written positions <= p of its own document, within its layer's window."""
    written, earlier = key != -1, key <= query
    return written and earlier and (window is None or query - key < window) and query_document == key_document


positions = st.lists(st.integers(-1, 9), min_size=1, max_size=6)


@given(positions, positions, st.none() | st.integers(1, 10), st.booleans(), st.data())
def test_a_query_sees_the_keys_that_the_rule_names(
    queries: list[int], keys: list[int], window: int | None, packed: bool, data: st.DataObject
):
    ours, theirs = (data.draw(st.lists(st.integers(0, 1), min_size=len(n), max_size=len(n))) for n in (queries, keys))
    if not packed:
        ours, theirs = [0] * len(queries), [0] * len(keys)
    documents = (torch.tensor(ours)[:, None], torch.tensor(theirs)[None]) if packed else ()
    mask = visible_keys(torch.tensor(queries)[:, None], torch.tensor(keys)[None], window, *documents)
    expected = [
        [sees(q, k, window, a, b) for k, b in zip(keys, theirs, strict=True)]
        for q, a in zip(queries, ours, strict=True)
    ]
    assert mask.tolist() == expected


def test_what_is_added_to_scores():
    mask = torch.tensor([[True, False], [False, True]])
    for dtype in (torch.float64, torch.bfloat16):
        added = additive(mask, torch.ones(3, dtype=dtype))
        assert added.dtype == dtype
        assert added.tolist() == [[0, -math.inf], [-math.inf, 0]]
