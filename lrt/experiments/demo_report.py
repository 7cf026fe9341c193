"""The demo's table and its page, from JSON alone."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.table import Table

from lrt.eval.report.figures import COLOURS, running_mean
from lrt.eval.report.html import PAGE, figure
from lrt.utils.files import replace_atomically

Row = tuple[str, Callable[[Mapping[str, Any]], str]]
COLUMNS: tuple[Row, ...] = (
    ("parameters", lambda m: f"{m['parameters']:,}"),
    ("tokens", lambda m: f"{m['tokens']:,}"),
    ("TFLOPs", lambda m: f"{m['training_flops'] / 1e12:.1f}"),
    ("train s", lambda m: f"{m['train_seconds']:.0f}"),
    ("parallel", lambda m: f"{m['parallel_bpb']:.4f}"),
    ("live", lambda m: f"{m['live_bpb']:.4f}"),
    ("gap", lambda m: f"{m['live_bpb'] - m['parallel_bpb']:+.4f}"),
)
ABLATIONS = (
    ("live_bpb_memory_zero", "memory zeroed"),
    ("live_bpb_memory_embedding", "memory embedding"),
)


def comparison_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """The comparison as text cells: a row per model, then the ablations; the last column is against the first model."""
    models: Mapping[str, Mapping[str, Any]] = summary["models"]
    base = next(iter(models.values()))["live_bpb"]
    body = []
    for name, m in models.items():
        body.append(
            [name.replace("_", " "), *(cell(m) for _, cell in COLUMNS), f"{100 * (m['live_bpb'] / base - 1):+.1f} %"]
        )
        for key, label in ABLATIONS:
            if key in m:
                against = f"{100 * (m[key] / base - 1):+.1f} %"
                body.append([f"  {label}", *[""] * (len(COLUMNS) - 2), f"{m[key]:.4f}", "", against])
    return body


def header(summary: Mapping[str, Any]) -> list[str]:
    return ["model", *(title for title, _ in COLUMNS), "vs first"]


def table(summary: Mapping[str, Any]) -> Table:
    """The comparison for the terminal, narrow enough for 80 columns: sizes are the same for all and stand elsewhere."""
    out = Table(title="bits per byte on held-out text; lower is better; live is what a user gets")
    shown = [i for i, title in enumerate(header(summary)) if title not in ("parameters", "tokens", "TFLOPs")]
    for i in shown:
        out.add_column(header(summary)[i], justify="left" if i == 0 else "right", no_wrap=True)
    for row in comparison_rows(summary):
        out.add_row(*[row[i] for i in shown])
    return out


def write_report(path: Path, summary: Mapping[str, Any], diaries: Mapping[str, Path], sample: str) -> None:
    """Write the report: table, loss curves from the runs' metrics.jsonl, a sample, the settings."""
    curves = {name: [json.loads(line) for line in diary.read_text().splitlines()] for name, diary in diaries.items()}
    body = [
        "<h1>Latent recurrence on this machine</h1>",
        f"<p>{_headline(summary)}</p>",
        _html_table(summary),
        "<figure>",
        figure(lambda ax: _bars(ax, summary), "Live bits per byte", wide=False),
        "<figcaption>Live bits per byte, decoded token by token, on held-out text. Lighter: the LRT with its memory "
        "tampered with at test time, which shows how much it leans on it.</figcaption></figure>",
        "<figure>",
        figure(lambda ax: _losses(ax, curves, "tokens", 1e6, "million tokens"), "Loss against tokens"),
        figure(lambda ax: _losses(ax, curves, "seconds", 60, "minutes of training"), "Loss against time"),
        "<figcaption>Training loss (nats per token, mean over the passes that have a loss; smoothed) against tokens "
        "and against time.</figcaption></figure>",
        "<h2>A sample from the LRT</h2>",
        f"<pre>{html.escape(sample)}</pre>",
        "<h2>Settings</h2>",
        f"<p>{html.escape(str(summary['hardware']))}. {summary['seconds']:.0f} seconds in all.</p>",
        f"<details><summary>summary.json</summary><pre>{html.escape(json.dumps(summary, indent=2))}</pre></details>",
    ]
    replace_atomically(path, PAGE.replace("{body}", "\n".join(body)))


def _headline(summary: Mapping[str, Any]) -> str:
    models = summary["models"]
    lrt, base, shift = (models[name]["live_bpb"] for name in ("lrt", "transformer", "token_shift"))
    return (
        f"At equal parameters and tokens, the latent recurrent transformer's live bits per byte are "
        f"<b>{100 * (lrt / base - 1):+.1f} %</b> against the transformer's (less is better), and "
        f"<b>{100 * (lrt / shift - 1):+.1f} %</b> against token shift's, the control that reads the previous token's "
        "embedding and needs no recurrence. One seed: seeds alone differ by two or three per cent."
    )


def _html_table(summary: Mapping[str, Any]) -> str:
    cells = "".join(f"<th>{html.escape(t)}</th>" for t in header(summary))
    lines = ["".join(f"<td>{html.escape(c)}</td>" for c in row) for row in comparison_rows(summary)]
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>'
        + "".join(f"<tr>{line}</tr>" for line in lines)
        + "</tbody></table></div>"
    )


def _bars(ax: Axes, summary: Mapping[str, Any]) -> None:
    entries: list[tuple[str, float, str, float]] = []
    for colour, (name, m) in zip(COLOURS, summary["models"].items(), strict=False):
        entries.append((name.replace("_", " "), m["live_bpb"], colour, 1.0))
        entries += [(f"{name}, {label}", m[key], colour, 0.4) for key, label in ABLATIONS if key in m]
    labels, values, colours, alphas = zip(*reversed(entries), strict=True)
    for y, (value, colour, alpha) in enumerate(zip(values, colours, alphas, strict=True)):
        ax.barh(y, value, color=colour, alpha=alpha)
        ax.text(value, y, f" {value:.3f}", va="center")
    ax.set_yticks(range(len(labels)), labels)
    ax.set_xlim(0, max(values) * 1.15)
    ax.set_xlabel("live bits per byte")


def _losses(ax: Axes, curves: Mapping[str, list[dict[str, Any]]], key: str, unit: float, label: str) -> None:
    after_start: list[float] = []
    for colour, (name, lines) in zip(COLOURS, curves.items(), strict=False):
        values = running_mean([line["loss"] for line in lines], max(1, len(lines) // 40))
        after_start += values[len(values) // 10 :]
        ax.plot([line[key] / unit for line in lines], values, color=colour, label=name.replace("_", " "), linewidth=1.6)
    low, high = min(after_start), max(after_start)  # the first tenth falls so far that it would hide the rest
    ax.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    ax.set_xlabel(label)
    ax.set_ylabel("training loss, nats per token")
    ax.legend()
