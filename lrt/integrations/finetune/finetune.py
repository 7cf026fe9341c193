"""Fine-tuning by TRL's SFTTrainer, all weights or adapters of PEFT, with the loss on held-out rows live."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from lrt.integrations.finetune.options import FinetuneOptions, check_options
from lrt.integrations.finetune.targets import FinetuneTarget
from lrt.integrations.hf.schedule_callback import ScheduleCallback, follows
from lrt.utils import files

IGNORED = -100
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in SFTConfig.__dataclass_fields__
    else "gradient_checkpointing"
)
"""What this version of transformers calls computing layers again in the backward."""
DEVICES = ("cpu", "cuda", "mps")
RATES = {True: 2e-4, False: 2e-5}
"""With adapters and without: what people begin with."""
PATHWAY_RATE = 10.0
"""Of a new pathway, over the others' rate."""
LATENT = "latent."
"""In the names of a pathway's parameters, whatever stands around the model …"""
GATES = (".gate.", ".gamma")
"""… and of those among them that scale what the memory adds."""


@dataclass(frozen=True)
class HeldOut:
    """What the held-out rows cost, live."""

    nats: tuple[float, ...]
    """Of each row's learned tokens, in sum."""
    tokens: tuple[int, ...]
    """How many a row has."""

    @property
    def mean(self) -> float:
        """Nats per learned token."""
        return sum(self.nats) / sum(self.tokens)


@dataclass(frozen=True)
class Finetuned:
    """What came of it."""

    before: HeldOut
    after: HeldOut
    rows: int
    """Trained on; packed, as they came to be."""
    steps: int
    tokens: int
    """Seen in training, padding not counted."""
    seconds: float
    """Of training, interrupted parts included."""


def finetune(
    target: FinetuneTarget, rows: Sequence[dict[str, Any]], out: Path, config: FinetuneOptions, device: str = "cpu"
) -> Finetuned:
    """Fine-tune on rows of `read_rows` and write the model, or its adapter, to `out`, a new folder.

    Interrupted, the same call goes on from the last epoch that was finished. ValueError for too few rows, where `out`
    is not empty, and where another call was interrupted there.
    """
    check_options(config)
    check_pathway(target, config)
    if device not in DEVICES:
        raise ValueError(
            f"device is {device!r}; give one of {', '.join(DEVICES)}, and name a GPU by CUDA_VISIBLE_DEVICES"
        )
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another folder")
    train, val = split_rows(rows, config)
    work = out.with_name(f".{out.name}.finetune")
    dtype = target.model.dtype
    trainer = make_trainer(target, train, val, work, config, device)
    begin(work, request_of(target, rows, config))
    before = live_nats(trainer)
    seconds = train_timed(trainer, work)
    tuned: Any = trainer.model
    if not config.lora:  # adapters are saved as they are; the score is of what is saved
        round_weights(tuned, dtype)
    after = live_nats(trainer)
    fresh = files.temporary_name(out)
    try:
        if config.lora:
            tuned.save_pretrained(fresh)
            target.tokenizer.save_pretrained(fresh)
        else:
            target.save(tuned.to(dtype), fresh)
        files.replace_folder(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)
    steps, tokens = trainer.state.global_step, trainer.state.num_input_tokens_seen
    trained_on: Any = trainer.train_dataset
    return Finetuned(before, after, len(trained_on), steps, tokens, seconds)


def train_timed(trainer: SFTTrainer, work: Path) -> float:
    """Train from the last epoch that `work` holds. Returns seconds, with those of earlier calls."""
    file = work / "seconds.json"
    earlier = files.read_json(file)["seconds"] if file.is_file() else 0.0
    begun = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)))
    finally:
        seconds = earlier + time.monotonic() - begun
        files.replace_atomically(file, json.dumps({"seconds": seconds}))
    return seconds


@torch.no_grad()
def round_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give trained weights the values that they have in `dtype`."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.to(dtype))


def check_pathway(target: FinetuneTarget, config: FinetuneOptions) -> None:
    """ValueError where what is asked of a pathway does not go with the model, or with adapters."""
    if config.freeze and config.lora:
        raise ValueError("freeze trains the pathway alone, and lora adapters of all else; leave one of them out")
    rates = (config.pathway_rate, config.gate_rate)
    if (config.freeze or rates != (None, None)) and not target.has_pathway:
        raise ValueError(f"freeze, pathway_rate and gate_rate are for retrofitted models, and {target.source} is none")


def request_of(target: FinetuneTarget, rows: Sequence[dict[str, Any]], options: FinetuneOptions) -> dict[str, Any]:
    """What a fine-tuning is of: only its like may go on from where it was stopped.

    The model's files are known by size and time: to read gigabytes twice for it would take too long.
    """
    fields = [field.name for field in dataclasses.fields(FinetuneOptions)]
    digest = hashlib.sha256(json.dumps(target.rows(rows, options.length), sort_keys=True).encode()).hexdigest()
    kinds = ("*.safetensors", "tokenizer*", "chat_template*")  # not what evaluations write beside them
    sources = sorted(path for kind in kinds for path in target.source.rglob(kind))
    about = {str(path.relative_to(target.source)): [path.stat().st_size, path.stat().st_mtime_ns] for path in sources}
    model = {"model": str(target.source.resolve()), "model's files": about}
    return {**model, "rows": digest, **{name: vars(options)[name] for name in fields}}


def begin(work: Path, request: dict[str, Any]) -> None:
    """Note what is begun. ValueError where the folder holds epochs of another fine-tuning."""
    file = work / "request.json"
    if work.is_dir() and get_last_checkpoint(str(work)) is not None:
        other = files.read_json(file) if file.is_file() else {}
        if other != request:
            differing = ", ".join(name for name in request if other.get(name) != request[name])
            raise ValueError(
                f"{work} holds an interrupted fine-tuning with other {differing}; repeat that, or remove it"
            )
    work.mkdir(parents=True, exist_ok=True)
    files.replace_atomically(file, json.dumps(request))


def split_rows(
    rows: Sequence[dict[str, Any]], config: FinetuneOptions
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows to train on, rows that are held out)."""
    held = max(1, round(config.val * len(rows)))
    if held >= len(rows):
        raise ValueError(f"{len(rows)} rows leave none to train on; give at least 2")
    order = list(rows)
    random.Random(config.seed).shuffle(order)
    return order[held:], order[:held]


def make_trainer(
    target: FinetuneTarget,
    train: Sequence[dict[str, Any]],
    val: Sequence[dict[str, Any]],
    work: Path,
    config: FinetuneOptions,
    device: str,
) -> SFTTrainer:
    """TRL's trainer, for the rows.

    Where all weights are trained they are in float32, also of a model in bfloat16: a step is smaller than its rounding.
    """
    model, dtype = target.model, target.model.dtype
    set_seed(config.seed)  # adapters begin at random
    if config.freeze:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(LATENT in name)
    elif not config.lora:
        model.float()
    if config.lora:
        adapters = LoraConfig(r=config.lora, lora_alpha=2 * config.lora, task_type="CAUSAL_LM", **target.lora_fields)
        model = get_peft_model(model, adapters)
    chats = "messages" in train[0]
    sets = [Dataset.from_list(target.rows(part, config.length)) for part in (train, val)]
    rate = config.lr or RATES[config.lora > 0]
    off: Any = {CHECKPOINTING: False}
    arguments = SFTConfig(
        output_dir=str(work),
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        num_train_epochs=config.epochs,
        max_steps=config.steps or -1,
        per_device_train_batch_size=config.batch,
        per_device_eval_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulate,
        max_length=config.length,
        packing=config.packing,
        assistant_only_loss=chats and "messages" in sets[0].column_names,
        **off,
        bf16=dtype == torch.bfloat16 and device == "cuda",
        seed=config.seed,
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=10,
        include_num_input_tokens_seen="non_padding",
        report_to=[],
        use_cpu=device == "cpu",
    )
    with without_bars():
        return SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=sets[0],
            eval_dataset=sets[1],
            processing_class=target.tokenizer,
            callbacks=[ScheduleCallback()] if any(map(follows, model.modules())) else [],
            optimizers=(make_optimiser(model, rate, config, target.has_pathway), None),
        )


@contextmanager
def without_bars() -> Iterator[None]:
    """Without a bar for each of the ten ways in which TRL goes through the rows."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def make_optimiser(model: Any, rate: float, config: FinetuneOptions, has_pathway: bool) -> torch.optim.AdamW:
    """AdamW with a rate for all that was there, one for a pathway's projections, and one for its gates and γ."""
    projections = config.pathway_rate or PATHWAY_RATE
    gates = config.gate_rate or projections
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            times = 1.0
            if has_pathway and LATENT in name:
                times = gates if any(gate in name for gate in GATES) else projections
            groups.setdefault(times, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rate * times} for times, parameters in groups.items()], weight_decay=0.0
    )


@torch.no_grad()
def live_nats(trainer: SFTTrainer) -> HeldOut:
    """What the held-out rows cost, decoded live: a call in `eval()` is, of LRTs and retrofits.

    ValueError where no row has a token to learn.
    """
    model: Any = trainer.model
    was_training = model.training
    model.eval()
    rows: list[tuple[float, int]] = []
    for batch in trainer.get_eval_dataloader():
        arguments = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        rows += row_costs(model(**arguments, use_cache=False).logits, batch["labels"], batch.get("position_ids"))
    model.train(was_training)
    if not rows:
        raise ValueError("no held-out row has a token to learn; give longer rows, or a greater length")
    nats, tokens = zip(*rows, strict=True)
    return HeldOut(nats, tokens)


def row_costs(logits: Tensor, labels: Tensor, position_ids: Tensor | None) -> list[tuple[float, int]]:
    """(nats, learned tokens) of each row that has some, of logits (B, T, V) and labels (B, T).

    Packed rows lie one behind another in one row of the batch; each begins where position_ids (B, T) are 0.
    """
    first = torch.zeros_like(labels, dtype=torch.bool) if position_ids is None else position_ids == 0
    first[:, 0] = True
    targets = torch.where(first, IGNORED, labels)[:, 1:]
    row = first.flatten().cumsum(0).view_as(labels)[:, 1:] - 1
    cost = cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    nats = torch.bincount(row.flatten(), cost.double().flatten())
    tokens = torch.bincount(row.flatten(), (targets != IGNORED).flatten())
    return [(one, int(count)) for one, count in zip(nats.tolist(), tokens.tolist(), strict=True) if count]
