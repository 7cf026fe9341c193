"""The model card of an exported model: what it is, how it was scored, how to run it."""

from __future__ import annotations

import textwrap

from lrt.eval.report.score_tables import run_table
from lrt.eval.runs import Run
from lrt.integrations.hf.modeling import LRTForCausalLM
from lrt.model.config import ModelConfig
from lrt.model.size import count_parameters

TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [latent-recurrent-transformer]
---

# Latent Recurrent Transformer, {parameters:,} parameters

A [Latent Recurrent Transformer](https://arxiv.org/abs/2605.26797): each token reads {reads}, as
recurrent memory. One forward per generated token. Every number that transformers computes with this model is made with
true recurrence, in `generate` and in plain calls.

| | |
|---|---|
| injection, projection | {injection}, {projection} |
| depth, width, heads | {depth}, {width}, {heads} |
| context | {context} |
| trained with the schedule | `{schedule}` |
| trained on | {tokens} tokens |
| prompts are read by | `{prefill}` prefill (`config.prefill`: exact, converged, fast, one_sweep) |

{scores}

{how}

```python
{code}```
"""
SCORE_NOTE = """\
Bits per byte (BPB), lower is better. **Live** is token by token: what you get. *Parallel* is under the training
schedule, the gap is live − parallel. Numbers of two rows are not comparable."""
CODE = """\
{first}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
"""


def describe_reads(config: ModelConfig) -> str:
    """What a token reads as its memory, by how far back it stands."""
    by_delay: dict[int, list[str]] = {}
    for source, delay in zip(config.sources, config.delays, strict=True):
        by_delay.setdefault(delay, []).append("the embedding" if source == 0 else f"the output of layer {source}")
    parts = [
        f"{' and '.join(names)} of the token {'before it' if delay == 1 else f'{delay} places before it'}"
        for delay, names in by_delay.items()
    ]
    return "; ".join(parts) or "nothing of the token before it"


def card_markdown(model: LRTForCausalLM, run: Run, remote_code: bool, name: str = "path/to/this/folder") -> str:
    """The card as Markdown. `run` is what is known of the checkpoint; every score says what it was measured on."""
    config, memory = model.config.model, model.config.model.memory
    trust = ", trust_remote_code=True" if remote_code else ""
    names = [record["name"] for record in model.config.plugins]
    own = " and ".join(f"`{name}`" for name in names)
    first = "" if remote_code else "".join(f"import {name}\n" for name in ["lrt.hf  # registers the model", *names])
    how = "The code comes with the folder." if remote_code else "Needs `pip install latent-recurrent-transformer[hf]`."
    if names and remote_code:
        how += f" Part of it is the author's own and no part of lrt: the plugin {own} (`plugin_*.py`)."
    elif names:
        how += f" Needs the author's own plugin {own} too, which is imported first."
    return TEMPLATE.format(
        parameters=count_parameters(config)[0],
        reads=describe_reads(config),
        injection=memory.injection,
        projection=memory.projection,
        depth=config.depth,
        width=config.width,
        heads=config.heads,
        context=config.context,
        schedule=model.config.schedule,
        tokens="an unknown number of" if run.tokens is None else f"{run.tokens:,}",
        prefill=model.config.prefill,
        scores=f"{SCORE_NOTE}\n\n{run_table(run).markdown()}" if run.scores else "Its bits per byte were not measured.",
        how=textwrap.fill(how, 120),
        code=CODE.format(first=first, trust=trust, name=name),
    )
