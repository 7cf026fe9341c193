"""docs/pretrained.md: its code runs, and its list of models is the library's."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lrt.cli import verbs
from lrt.cli.main import main
from lrt.integrations.retrofit.architectures import ARCHITECTURES
from lrt.integrations.retrofit.pathway_config import PathwayConfig

PAGE = Path(__file__).parents[2] / "docs" / "pretrained.md"
TEXT = PAGE.read_text(encoding="utf-8")
WORDS = ["<unk>", "<eos>", "the", "state", "of", "a", "token", "is", "what", "next", "one", "remembers"]


def make_model(folder: Path) -> None:
    """A Llama of four layers and its tokenizer, as transformers saves them."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=32, **size)).save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "models" / "mine")
    command, serve = re.findall(r"```bash\nlrt (.*)\n```", TEXT)
    main(command.split())
    verbs.parse(shlex.split(serve))  # tests/integrations/test_retrofit_serving.py runs it
    program = tmp_path / "page.py"
    program.write_text("\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)), encoding="utf-8")
    done = runpy.run_path(str(program))
    assert done["model"].latent.gamma.abs().max() > 0  # it was trained
    assert (tmp_path / "retrofitted" / "again" / "modeling_lrt_retrofit.py").is_file()


def test_the_commands_of_finetuning_are_commands():
    lines = re.findall(r"^    lrt (.*?)(?: +#.*)?$", (PAGE.parent / "finetuning.md").read_text("utf-8"), re.MULTILINE)
    assert len(lines) == 6
    for line in lines:
        verbs.parse(shlex.split(line))


def test_the_page_names_every_model_and_every_field():
    (models,) = re.findall(r"\*\*Which models\*\*: (.*?)\. Others", TEXT, re.DOTALL)
    named = re.sub(r"\(.*?\)", "", models).replace(" and ", ", ").split(",")
    assert [name.strip() for name in named] == list(ARCHITECTURES)
    table = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert table == list(PathwayConfig.__dataclass_fields__)
