"""The commands of docs/evaluation.md, run in order as they stand there, on a tiny run and a bundle of three tasks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from support.core_bundle import make_bundle
from support.runs import TINY

from lrt.cli.main import main
from lrt.data.corpus import stdlib_files
from lrt.eval.results import read_results

GUIDE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
    return [shlex.split(line)[1:] for language, block in blocks if not language for line in block.splitlines()]


@pytest.mark.slow
def test_the_guide_s_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    sources = [path for path in stdlib_files() if path.stat().st_size > 20_000][:3]
    for path in sources:
        Path(path.name).write_bytes(path.read_text(encoding="utf-8")[:8000].encode())
    texts = [path.name for path in sources]
    main(["prepare", "runs/data/mine", "--text", *texts, "--vocab-size", "300"])
    tokenizer = ["--tokenizer", "runs/data/mine/tokenizer.json"]
    main(["prepare", "runs/data/other", "--text", *reversed(texts), "--vocab-size", "300", *tokenizer])
    for name, recipe in (("mine", "d2"), ("plain", "d2-transformer")):
        main(["train", "--data", "runs/data/mine", "--out", f"runs/{name}", "--device", "cpu", recipe, *TINY])
    for folder in ("runs/core_eval", "runs/data/core"):  # the second as if it had been downloaded
        Path(folder).mkdir()
        make_bundle(Path(folder))
    found = commands()
    assert len(found) >= 8
    for command in found:
        fewer = ["--at-least", "150"] if command[0] == "diagnose" else []
        device = [] if command[0] == "report" else ["--device", "cpu"]
        main([*command, *fewer, *device])
    kinds = {(result.kind, result.subject) for result in read_results(Path("runs/mine/evaluation"))}
    assert {("bpb", "mine-val"), ("bpb", "other-val"), ("bfloat16", "other-val"), ("core", "CORE")} <= kinds
    assert {kind for kind, _ in kinds} == {
        *("scores", "bpb", "bfloat16", "sweeps", "hops", "ablations", "memory", "text", "probe", "core")
    }
    assert Path("runs/report.html").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "mine: the state survives" in printed or "mine: the memory" in printed
    assert "\nn,full," in printed  # --format csv
