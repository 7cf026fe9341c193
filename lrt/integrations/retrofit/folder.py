"""`lrt retrofit`: a folder of a pretrained decoder to a folder of the same decoder with a pathway.

config.json, generation_config.json, model.safetensors   the decoder's weights under their own names, and `latent.*`
configuration_lrt_retrofit.py, modeling_lrt_retrofit.py  what transformers loads with trust_remote_code=True
lrt_*.py                                                 the modules of lrt that those need
tokenizer*.json, …                                       the decoder's own
README.md                                                what was added to what
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lrt.integrations.hf.remote_code import RemoteCode, write_code
from lrt.integrations.retrofit.convert import pathway_of, retrofit
from lrt.integrations.retrofit.modeling import AFTER_SAVING
from lrt.utils import files

CODE = RemoteCode(
    {
        "configuration_lrt_retrofit": "lrt.integrations.retrofit.configuration",
        "modeling_lrt_retrofit": "lrt.integrations.retrofit.modeling",
    },
    {
        "AutoConfig": "configuration_lrt_retrofit.RetrofitConfig",
        "AutoModelForCausalLM": "modeling_lrt_retrofit.RetrofitForCausalLM",
    },
)
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [latent-recurrent-transformer]
---

# {name} with a latent recurrent pathway

A pretrained {base} to which a pathway of {added:,} parameters ({share:.2f} %) was added: each token reads {reads} of
the token before it ([arXiv 2605.26797](https://arxiv.org/abs/2605.26797)). As it was added it changes nothing; it has
to be trained.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""


def write_own_code(folder: Path) -> None:
    """What a saved folder needs to be loaded where lrt is not installed."""
    write_code(folder, CODE)


AFTER_SAVING.append(write_own_code)


def retrofit_folder(folder: Path, out: Path, /, **pathway: Any) -> Any:
    """Write the decoder in `folder`, with a neutral pathway (`retrofit`), to `out`. Returns the model.

    `out` must be new or empty: an earlier retrofit there may have been trained. ValueError where it is not, where the
    decoder cannot have a pathway, and where it has no tokenizer.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another folder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give the folder of a decoder as transformers saves it")
    pathway_of(AutoConfig.from_pretrained(folder), pathway)  # before the weights are loaded
    tokenizer = read_tokenizer(folder)
    model = retrofit(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), **pathway)
    fresh = files.temporary_name(out)
    try:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        (fresh / "README.md").write_text(card(model, folder.name), encoding="utf-8")
        files.replace_folder(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return model


def read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. ValueError where it has none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        raise ValueError(f"{folder} has no tokenizer; put tokenizer.json and tokenizer_config.json of the model there")
    return AutoTokenizer.from_pretrained(folder)


def card(model: Any, name: str) -> str:
    """README.md of a retrofitted model."""
    depth = model.config.num_hidden_layers
    names = ["the embedding" if s == 0 else f"the output of layer {s}" for s in model.config.pathway.sources(depth)]
    added = sum(p.numel() for p in model.latent.parameters())
    total = sum(p.numel() for p in model.parameters()) - added
    base = model.config.base_model_type
    return CARD.format(name=name, base=base, added=added, share=100 * added / total, reads=" and ".join(names))
