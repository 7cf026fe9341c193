"""A retrofitted decoder in `train()`: the passes of its schedule, with gradients.

Full passes run as the decoder itself does, with its masks, its checkpointing and its loss. Where a schedule has passes
over some positions only, texts are taken out of their padding, and keys and values wait in slots (`slots.py`).

Shapes: B rows, T columns, n positions of a pass, P remembered layers, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lrt.integrations.hf.unpadded import Unpadded
from lrt.integrations.retrofit.columns import predecessors
from lrt.integrations.retrofit.pathway import decoder_layers, is_checkpointing
from lrt.integrations.retrofit.slots import Slots
from lrt.schedules.base import Pass
from lrt.schedules.parse import parse

IGNORED = -100
"""What transformers writes where a label counts nowhere."""


def train_output(model: Any, text: dict[str, Any], out: dict[str, Any] | None) -> Any:
    """The decoder's output by the schedule's last passes, with the weighted mean of its passes' losses (contract,
    section 3); that of its stack alone without `out`. ValueError where the schedule does not go with the call."""
    schedule = model.schedule_now(parse(model.config.pathway.schedule))
    inputs = text.get("input_ids")
    columns = (text["inputs_embeds"] if inputs is None else inputs).shape[1]
    passes = schedule.passes(columns)
    if all(len(p.positions) == columns for p in passes):
        return run_full_passes(model, text, out, passes)
    if out is None:
        raise ValueError(
            f"a loss of one's own is made of the last pass over a text, and {schedule} has passes over some positions; "
            "train with a schedule of full passes, such as settled(1, 1, 1)"
        )
    if inputs is None:
        raise ValueError(f"{schedule} computes some positions at a time, for which input_ids are needed; pass those")
    if is_checkpointing(model):
        raise ValueError(
            f"gradient checkpointing computes whole texts, {schedule} some positions at a time; turn it off, or train "
            "with a schedule of full passes, such as settled(1, 1, 1)"
        )
    rows = Unpadded.of(inputs, text["attention_mask"], text["position_ids"])
    return run_strided_passes(model, rows, inputs, out, schedule.passes(rows.index.shape[1]))


def run_full_passes(model: Any, text: dict[str, Any], out: dict[str, Any] | None, passes: Sequence[Pass]) -> Any:
    """Each pass over all columns, as the decoder computes them; it reads what the one before left."""
    known = model.memory_of(text, {})
    nothing = known.new_zeros(*known.shape[:2], 1, known.shape[3])
    before = predecessors(text, known.shape[1:3], known.new_zeros(known.shape[1], dtype=torch.bool))
    total = sum(p.loss_weight for p in passes)
    losses: list[Tensor] = []
    output = None
    for number, p in enumerate(passes, 1):
        whole = p.loss_weight > 0 or number == len(passes)
        with torch.set_grad_enabled(p.grad and torch.is_grad_enabled()):
            memory = before.read(with_embedding(model, text, known), nothing)
            check_checkpointing(model, memory)
            output, known = model.run_pass(text, memory, None, out if whole else None, ends=not whole)
        if p.detach_memory:
            known = known.detach()
        if p.loss_weight and out is not None and out["labels"] is not None:
            losses.append(p.loss_weight / total * output.loss)
    assert output is not None
    if losses:
        output.loss = torch.stack(losses).sum() if len(losses) > 1 else losses[0]
    return output


def run_strided_passes(model: Any, rows: Unpadded, ids: Tensor, out: dict[str, Any], passes: Sequence[Pass]) -> Any:
    """Passes over some positions of texts without padding, in slots."""
    tokens = rows.split(ids, 0)
    labels = None if out["labels"] is None else shift_labels(rows.split(out["labels"], IGNORED))
    slots = Slots(model.config.num_hidden_layers, tokens.shape[1])
    known = model.memory_of({"input_ids": tokens}, {})
    logits: Tensor | None = None
    losses: list[tuple[float, Tensor]] = []
    needed = last_writers(passes, tokens.shape[1])
    output = None
    for number, p in enumerate(passes):
        slots.start(p)
        full = len(p.positions) == tokens.shape[1]
        text = {
            "input_ids": tokens[:, p.slice],
            "attention_mask": None if full else slots.masks(model.config, known),
            "position_ids": torch.tensor(p.positions, device=tokens.device)[None],
        }
        wanted = {"logits_to_keep": 0} if p.loss_weight or number in needed else None
        with torch.set_grad_enabled(p.grad and torch.is_grad_enabled()):
            read = with_embedding(model, {"input_ids": tokens}, known)
            memory = F.pad(read[:, :, :-1], (0, 0, 1, 0))[:, :, p.slice]  # that of the position before; none at first
            output, new = model.run_pass(text, memory, slots, wanted, replaced_next(passes, number, tokens.shape[1]))
            known = torch.slice_scatter(known, new, 2, p.start, p.stop, p.stride)
        if p.detach_memory:
            known = known.detach()
        if wanted is None:
            continue
        if number in needed:
            whole = output.logits.new_zeros(*tokens.shape, output.logits.shape[-1]) if logits is None else logits
            logits = torch.slice_scatter(whole, output.logits, 1, p.start, p.stop, p.stride)
        if labels is not None and p.loss_weight and bool((labels[:, p.slice] != IGNORED).any()):
            losses.append((p.loss_weight, mean_nats(output.logits, labels[:, p.slice])))
    assert output is not None
    assert logits is not None
    output.logits = rows.join(logits, ids.shape)
    if labels is not None:
        output.loss = weighted_mean(losses, logits) * share_of_batch(labels, out.get("num_items_in_batch"))
    return output


def with_embedding(model: Any, text: dict[str, Any], known: Tensor) -> Tensor:
    """The memory (P, B, T, D) with the embedding, where it is remembered, made anew, so that it has gradients."""
    sources = model.config.pathway.sources(model.config.num_hidden_layers)
    if 0 not in sources:
        return known
    embedded = model.memory_of(text, {})
    return torch.stack([(embedded if source == 0 else known)[i] for i, source in enumerate(sources)])


def check_checkpointing(model: Any, memory: Tensor) -> None:
    """ValueError where gradients through the memory would be lost: reentrant checkpoints lose those of keywords."""
    functions = [layer._gradient_checkpointing_func for layer in decoder_layers(model) if layer.gradient_checkpointing]
    if memory.requires_grad and any(function.keywords.get("use_reentrant", True) for function in functions):
        raise ValueError(
            "reentrant gradient checkpointing loses gradients through the memory; enable it with use_reentrant=False, "
            "which is transformers' default"
        )


def replaced_next(passes: Sequence[Pass], number: int, length: int) -> bool:
    """Whether all keys and values are new before anything reads what this pass, which has no loss, leaves."""
    return (
        not passes[number].loss_weight and len(passes[number + 1 :]) > 0 and len(passes[number + 1].positions) == length
    )


def last_writers(passes: Sequence[Pass], length: int) -> set[int]:
    """The passes, by number, that compute some position last."""
    missing, needed = set(range(length)), set()
    for number in reversed(range(len(passes))):
        if not missing.isdisjoint(passes[number].positions):
            missing.difference_update(passes[number].positions)
            needed.add(number)
    return needed


def shift_labels(labels: Tensor) -> Tensor:
    """What each position is to foretell, of labels (B, T): the next one."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def mean_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Of the targets (B, n) that count, under logits (B, n, V), in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def weighted_mean(losses: Sequence[tuple[float, Tensor]], logits: Tensor) -> Tensor:
    """Of the passes' losses; nothing to foretell is a loss of 0 with gradients."""
    if not losses:
        return 0 * logits.sum()
    return torch.stack([weight * loss for weight, loss in losses]).sum() / sum(weight for weight, _ in losses)


def share_of_batch(labels: Tensor, items: Tensor | int | None) -> Tensor | float:
    """Which share of an accumulated batch these labels (B, T) are; 1 where they are all of it."""
    return 1.0 if items is None else (labels != IGNORED).sum() / items
