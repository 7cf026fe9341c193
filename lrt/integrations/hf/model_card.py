"""The model card of an exported model: what it is, how it was scored, how to run it."""

from __future__ import annotations

import textwrap
from typing import Any

from lrt.integrations.hf.modeling import LRTForCausalLM
from lrt.model.size import count_parameters

TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [latent-recurrent-transformer]
---

# Latent Recurrent Transformer, {parameters:,} parameters

A [Latent Recurrent Transformer](https://arxiv.org/abs/2605.26797): each token reads {source} of the token before it, as
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
| **live bits per byte** (token by token: what you get) | {live} |
| bits per byte under the training schedule | {parallel} |
| gap (live − parallel) | {gap} |

{how}

```python
{code}```
"""
CODE = """\
{first}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
"""


def card_markdown(
    model: LRTForCausalLM, about: dict[str, Any], remote_code: bool, name: str = "path/to/this/folder"
) -> str:
    """The card as Markdown. `about` is what the checkpoint says of itself; a score that it lacks is "not measured"."""
    config, memory = model.config.model, model.config.model.memory
    scores = about.get("scores") or {}
    sources = memory.sources(config.depth)

    def score(key: str, form: str = ".4f") -> str:
        return f"{scores[key]:{form}}" if key in scores else "not measured"

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
        source=" and ".join("the embedding" if s == 0 else f"the output of layer {s}" for s in sources) or "nothing",
        injection=memory.injection,
        projection=memory.projection,
        depth=config.depth,
        width=config.width,
        heads=config.heads,
        context=config.context,
        schedule=model.config.schedule,
        tokens=f"{about['tokens']:,}" if "tokens" in about else "an unknown number of",
        prefill=model.config.prefill,
        live=score("live_bpb"),
        parallel=score("parallel_bpb"),
        gap=score("gap", "+.4f"),
        how=textwrap.fill(how, 120),
        code=CODE.format(first=first, trust=trust, name=name),
    )
