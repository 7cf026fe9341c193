"""EleutherAI's lm-evaluation-harness on a checkpoint, with true recurrence: `lrt evaluate --tasks`.

It is the harness's own Hugging Face adapter around `LRTForCausalLM`, so `lm_eval --model hf` on an exported folder
gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models import huggingface
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

from lrt.integrations.hf.export import prepend_bos, wrap_model
from lrt.model import checkpoint

# Both are behind decorators whose types the checker cannot read.
HFLM: Any = huggingface.HFLM
simple_evaluate: Any = lm_eval.simple_evaluate


class Adapter(HFLM):
    """The harness's own, which puts its prefix token before a rolling text itself: BOS must not come twice."""

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        # The harness reads this field when it encodes, so it is set for the call alone.
        self.add_bos_token = False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = True


def make_adapter(source: Path | str, prefill: str = "converged", batch_size: int = 16, device: str = "cpu") -> Adapter:
    """A checkpoint as the harness's model; BOS opens every text, as in training."""
    native, tokenizer = checkpoint.load(source, device)
    model = wrap_model(native, tokenizer, checkpoint.about(source).get("schedule", "plain()"), prefill)
    special = tokenizer.inner.id_to_token(tokenizer.bos)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=prepend_bos(tokenizer), bos_token=special, eos_token=special, pad_token=special
    )
    return Adapter(
        pretrained=model,
        tokenizer=fast,
        batch_size=batch_size,
        max_length=native.config.context,
        add_bos_token=True,
    )


def run_tasks(
    source: Path | str,
    tasks: Sequence[str],
    prefill: str = "converged",
    batch_size: int = 16,
    limit: int | None = None,
    shots: int | None = None,
    include: Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """{task: {metric: value}}. `include` is a folder with tasks of one's own (YAML), `limit` items of each task.

    ValueError for tasks that the harness does not know.
    """
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"lm-eval knows no task {', '.join(unknown)}; `lm_eval ls tasks` lists its own, --include adds yours"
        )
    model = make_adapter(source, prefill, batch_size, device)
    report = simple_evaluate(model, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager)
    return {name: dict(metrics) for name, metrics in report["results"].items()}
