"""The engineer: a pretrained decoder gets a pathway and is served; a run goes to transformers."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest
from support.journey import Terminal
from support.runs import TINY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<eos>", *(f"w{i}" for i in range(1, 16))]
LOAD = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("exported", trust_remote_code=True)
prompt = tokenizer("def ", return_tensors="pt")
written = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
print("new tokens:", written.shape[1] - prompt["input_ids"].shape[1])
"""


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    """A folder with a small random Llama, and rows to fine-tune it on."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **size, **ends)).save_pretrained(tmp_path / "models/mine")
    save_tokenizer(tmp_path / "models/mine")
    rows = [{"text": " ".join(WORDS[1 + (i + j) % 15] for j in range(12))} for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Terminal(tmp_path)


def save_tokenizer(folder: Path, **special: str) -> None:
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(WORDS)}, unk_token="w1"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", **special).save_pretrained(folder)


@pytest.mark.slow
def test_a_pretrained_decoder_is_retrofitted_fine_tuned_and_served(terminal: Terminal):
    assert "new and neutral" in terminal.lrt("retrofit", "models/mine", "retrofitted", "--source", "0", "2")
    shown = terminal.lrt("finetune", "retrofitted", "tuned", "--chat", "texts.jsonl", "--steps", "4", "--lr", "1e-2")
    before, after = map(float, shown.split("held-out rows: ")[1].split(" nats")[0].split(" -> "))
    assert after < before
    with terminal.serve("tuned") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        (model,) = client.models.list().data
        asked = {"model": model.id, "prompt": "w3 w4", "max_tokens": 6, "temperature": 0}
        (choice,) = client.completions.create(**asked).choices
        assert set(choice.text.split()) <= set(WORDS)
        streamed = [part.choices[0].text for part in client.completions.create(**asked, stream=True) if part.choices]
        assert "".join(streamed).split() == choice.text.split()


@pytest.mark.slow
def test_a_run_becomes_a_model_of_transformers(terminal: Terminal):
    source = Path(json.__file__).parent
    terminal.lrt("prepare", "runs/data/mine", "--text", source, "--vocab-size", "300")
    terminal.lrt("train", "--data", "runs/data/mine", "--out", "runs/mine", "d2", *TINY)
    shown = terminal.lrt("export", "runs/mine", "exported")
    assert 'AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)' in shown
    assert "new tokens: 5" in terminal.python(LOAD)
