"""Tables and figure of when copying is learned, by hand."""

from __future__ import annotations

from typing import Any

from lrt.experiments.studies.copying_tables import copying_figure, copying_tables, learned_at


def line_of(family: str, seed: int, curve: list[list[float]]) -> dict[str, Any]:
    scores = {"copying": curve, "test": {"live_bpb": 1.5 + seed}, "val_live_bpb": 1.0}
    return {"seed": seed, "choices": {"ratio": "4 tokens", "family": family}, "fields": {}, "result": scores}


def test_learned_is_where_it_lasts():
    assert learned_at([[100, 3.0, 2.9], [200, 3.0, 2.5], [300, 3.0, 1.0]]) == 200
    assert learned_at([[100, 3.0, 2.0], [200, 3.0, 2.9], [300, 3.0, 1.0]]) == 300
    assert learned_at([[100, 3.0, 2.0], [200, 3.0, 2.6]]) is None


def test_a_row_per_family():
    late, soon, never = [[200, 4.0, 4.0], [400, 4.0, 3.0]], [[200, 4.0, 3.0], [400, 4.0, 2.0]], [[400, 4.0, 4.0]]
    lines = [line_of("transformer", seed, curve) for seed, curve in enumerate([late, soon, never])]
    lines += [line_of("recommended", 0, soon), {**line_of("lost", 0, soon), "result": {"diverged": "at step 3"}}]
    (table,) = copying_tables(lines)
    assert table.title == "4 tokens, copying from the context"
    plain, recurrent = table.body
    assert plain[:4] == ["transformer", "3", "4.000", "3.000"]
    assert plain[4].startswith("1.000 ± 2.4")  # 1, 2 and 0: deviation 1, t 4.30
    assert plain[5:] == ["2 of 3", "300 (2 seeds)", "2.5000"]
    assert recurrent == ["recommended", "1", "4.000", "2.000", "2.000 (1 seed)", "1 of 1", "200 (1 seed)", "1.5000"]
    (panel,) = copying_figure(lines).axes
    assert len(panel.get_lines()) == 5  # a curve per line, and the bound
