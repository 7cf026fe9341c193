"""`lrt export`: a checkpoint as a Hugging Face folder that works where lrt is not installed.

config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json
configuration_lrt.py, modeling_lrt.py   what transformers loads with trust_remote_code=True
lrt_*.py                                the modules of lrt that those need, imports made relative
plugin_*.py                             the files of a user's own that registered parts of this model, if any
README.md                               the model card

How the modules get there: `remote_code.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import tokenizers
from tokenizers import processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from lrt.data.tokenizer import Tokenizer
from lrt.eval.runs import Run
from lrt.inference.jinja_template import folder_template
from lrt.integrations.hf.configuration import LRTConfig
from lrt.integrations.hf.model_card import card_markdown
from lrt.integrations.hf.modeling import LRTForCausalLM
from lrt.integrations.hf.remote_code import RemoteCode, write_code
from lrt.model import checkpoint
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.base import plugin_uses
from lrt.schedules.parse import Unknown, parse_saved
from lrt.utils import files
from lrt.utils.plugins import Plugin, describe

CODE = RemoteCode(
    {"configuration_lrt": "lrt.integrations.hf.configuration", "modeling_lrt": "lrt.integrations.hf.modeling"},
    {"AutoConfig": "configuration_lrt.LRTConfig", "AutoModelForCausalLM": "modeling_lrt.LRTForCausalLM"},
)
PAD = "<|pad|>"
PAD_NAMES = (PAD, "<pad>", "[PAD]")
"""Special tokens that may pad, in order of preference; without one, PAD is added above the vocabulary."""

OWN = ("*.json", "*.safetensors", "*.py", "*.jinja", "README.md", "LICENSE")
"""What an exported folder may have. What else lies there, such as .git, stays when it is exported again."""


def export(source: Path | str, out: Path | str, prefill: str = "converged", remote_code: bool = True) -> LRTForCausalLM:
    """Write the checkpoint (or run) `source` to the folder `out`, which must be new or an earlier export.

    Without `remote_code` the folder needs `import lrt.hf` before it is loaded. Returns the model that was written.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()) and not is_export(out):
        raise ValueError(f"{out} holds something that is no exported LRT; choose another folder")
    fresh = files.temporary_name(out)
    try:
        model = write_folder(source, fresh, prefill, remote_code)
        files.replace_folder(fresh, out, OWN)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return model


def is_export(folder: Path) -> bool:
    """Whether a folder is what `export` writes: neither a checkpoint of ours nor a model of another kind."""
    file = folder / "config.json"
    if not file.is_file() or (folder / "manifest.json").exists():
        return False
    return files.read_json(file).get("model_type") == LRTConfig.model_type


def write_folder(source: Path | str, out: Path, prefill: str, remote_code: bool) -> LRTForCausalLM:
    """Write a checkpoint as a folder that does not exist yet."""
    native, tokenizer = checkpoint.load(source)
    about = checkpoint.about(source)
    model = wrap_model(native, tokenizer, about.get("schedule", "plain()"), prefill)
    fast = wrap_tokenizer(tokenizer, native.config.context)
    template = folder_template(checkpoint.verify(Path(source)), tokenizer)
    fast.chat_template = None if template is None else template.source
    model.config.pad_token_id = model.generation_config.pad_token_id = fast.pad_token_id
    model.save_pretrained(out)
    fast.save_pretrained(out)
    plugins = list(dict(plugins_behind(native, model.config.schedule)).values())
    if remote_code:
        write_code(out, CODE, list(dict.fromkeys(plugins)))
    (out / "README.md").write_text(card_markdown(model, Run.read(Path(source)), remote_code), encoding="utf-8")
    return model


def plugins_behind(native: LatentRecurrentTransformer, schedule: str) -> list[tuple[str, Plugin]]:
    """What plugins registered of a model and its schedule, as `plugins.describe` takes it."""
    trained = parse_saved(schedule)
    return native.config.memory.plugin_uses() + ([] if isinstance(trained, Unknown) else plugin_uses(trained))


def wrap_model(native: LatentRecurrentTransformer, tokenizer: Tokenizer, schedule: str, prefill: str) -> LRTForCausalLM:
    """A LatentRecurrentTransformer as transformers' model, with the same parameters, in `eval()`."""
    config = LRTConfig(
        native.config.to_dict(),
        schedule,
        prefill,
        describe(plugins_behind(native, schedule)),
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.bos,  # one special token opens a document, and so ends the one before
        pad_token_id=tokenizer.bos,
        dtype=str(native.embedding.weight.dtype).removeprefix("torch."),
    )
    model = LRTForCausalLM(config)
    model.model = native
    model.generation_config = GenerationConfig.from_model_config(config)
    return model.eval()


def wrap_tokenizer(tokenizer: Tokenizer, context: int) -> PreTrainedTokenizerFast:
    """A tokenizer as transformers' own: BOS opens a text and ends it, and padding is neither.

    Padding of its own, because collators take every label that is padding for one that does not count: as BOS, it would
    take the end of every text along. It stands on the left, where generate() wants it.
    """
    inner, bos = prepend_bos(tokenizer), tokenizer.inner.id_to_token(tokenizer.bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=bos,
        eos_token=bos,
        pad_token=add_padding(inner),
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def add_padding(inner: tokenizers.Tokenizer) -> str:
    """The special token that pads, added above the vocabulary where there is none."""
    special = {token.content for token in inner.get_added_tokens_decoder().values() if token.special}
    for name in PAD_NAMES:
        if name in special:
            return name
    ids = set(inner.get_vocab(with_added_tokens=True).values())
    inner.add_special_tokens([PAD])
    if inner.token_to_id(PAD) in ids:
        raise ValueError(
            f"the tokenizer's ids have holes, so that {PAD} gets {inner.token_to_id(PAD)}, which another token has; "
            f"add a special token {PAD} to its tokenizer.json and train with that"
        )
    return PAD


def prepend_bos(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer with BOS before every text, as the model was trained."""
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    bos = inner.id_to_token(tokenizer.bos)
    inner.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos)]
    )
    return inner
