"""Retrofits of models that were pretrained: a Llama, a GPT-NeoX and a Qwen3, on the standard library.

What random weights cannot show: that nothing is lost where a model knows something, that a trained pathway is what
an oracle computes, and that all of it goes through the commands.
"""

import copy
import json
import math
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")
from support.retrofits import DEPTH, Double, Oracle
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lrt.cli.main import main
from lrt.integrations.finetune import comparison
from lrt.integrations.finetune.comparison import PATHWAY, PLAIN, SHIFT

pytestmark = pytest.mark.slow
ARCHITECTURES = ("llama", "gpt_neox", "qwen3")
LENGTH, BATCH, STEPS = 128, 8, 300
SIZE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def library() -> list[str]:
    """Modules of the standard library, in a fixed order, each cut to 20,000 characters."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    return [files[number].read_text(encoding="utf-8")[:20_000] for number in order]


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def texts() -> SimpleNamespace:
    """What is pretrained on, what is trained on later, and the tokenizer."""
    whole = library()
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        whole, trainers.BpeTrainer(vocab_size=1024, special_tokens=["<s>"], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    return SimpleNamespace(early=whole[: -len(whole) // 4], late=whole[-len(whole) // 4 :], tokenizer=tokenizer)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, texts, tmp_path_factory) -> Path:
    """A pretrained model as transformers saves it: 0.3 million tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        request.param, **SIZE, vocab_size=len(texts.tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config).train()
    stream = [token for text in texts.early for token in [0, *texts.tokenizer(text)["input_ids"]]]
    rows = torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).view(-1, LENGTH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        falling.step()
        optimiser.zero_grad()
    out = tmp_path_factory.mktemp(request.param) / "mine"
    model.save_pretrained(out)
    texts.tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def retrofitted(folder) -> Path:
    out = folder.with_name("retrofitted")
    main(["retrofit", str(folder), str(out), "--source", "0", str(DEPTH)])
    return out


@pytest.fixture(scope="module")
def compared(retrofitted, texts, tmp_path_factory) -> Path:
    """The pathway and its controls, trained on what was not pretrained on."""
    rows = [{"text": text[start : start + 400]} for text in texts.late for start in range(0, len(text) - 400, 400)][
        :900
    ]
    file = tmp_path_factory.mktemp("texts") / "late.jsonl"
    write_rows(file, rows)
    out = retrofitted.with_name("compared")
    command = ["finetune", str(retrofitted), str(out), "--chat", str(file), "--lr", "1e-3", "--length", str(LENGTH)]
    main([*command, "--steps", "40", "--controls", "tokens"])
    return out


def test_nothing_is_lost(folder, retrofitted, texts):
    """It has learned something, and the retrofitted folder has the same weights and computes the same."""
    one, two = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (folder, retrofitted))
    ids = texts.tokenizer(texts.late[0][:1000], return_tensors="pt")["input_ids"][:, :LENGTH]
    before, after = one(ids, labels=ids), two(ids, labels=ids)
    assert float(before.loss) < 0.8 * math.log(len(texts.tokenizer))
    theirs = two.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in one.state_dict().items())
    torch.testing.assert_close(before.logits, after.logits, rtol=0, atol=1e-4)  # two folders, two places in memory
    options = {"max_new_tokens": 24, "do_sample": False}
    assert torch.equal(one.generate(ids[:, :20], **options), two.generate(ids[:, :20], **options))


def test_a_trained_pathway_is_what_the_oracle_computes(folder, compared, texts):
    model = AutoModelForCausalLM.from_pretrained(compared / "pathway", dtype="auto").double().eval()
    assert model.latent.gamma.abs().max() > 1e-3  # awake
    model.config.latent_memory["prefill"] = "exact"
    model.generation_config.eos_token_id = None
    original = copy.deepcopy(model).detach()
    ids = texts.tokenizer(texts.late[1][:400], return_tensors="pt")["input_ids"][:, :40]
    with Double():
        wanted = Oracle(original, model).logits(ids[0])
        torch.testing.assert_close(model(ids).logits[0], wanted, rtol=0, atol=1e-9)
        model.config.latent_memory["prefill"] = "converged"
        torch.testing.assert_close(model(ids).logits[0], wanted, rtol=0, atol=1e-3)
        again = model.generate(ids[:, :20], max_new_tokens=12, do_sample=False)[0, 20:]
        assert torch.equal(again, Oracle(original, model).greedy(ids[0, :20], 12))
        assert not torch.allclose(original(ids).logits[0], wanted, rtol=0, atol=1e-3)


def test_every_model_of_the_comparison_has_learned(compared):
    outcomes = comparison.read_outcomes(compared)
    assert [outcome.model for outcome in outcomes] == [PATHWAY, SHIFT, PLAIN]
    assert len({outcome.before for outcome in outcomes}) == 1  # all begin as the same model
    for outcome in outcomes:
        assert outcome.after < outcome.before - 0.02, outcome.model


def test_an_adapter_is_trained_on_it_and_merged(retrofitted, texts, tmp_path):
    """--lora, loaded by PEFT around the retrofitted folder, and merged into it."""
    from peft import PeftModel

    file = tmp_path / "late.jsonl"
    write_rows(file, [{"text": text[:400]} for text in texts.late[:40]])
    command = ["finetune", str(retrofitted), str(tmp_path / "adapter"), "--chat", str(file), "--lora", "8"]
    main([*command, "--steps", "8", "--lr", "1e-2", "--length", str(LENGTH)])
    base = AutoModelForCausalLM.from_pretrained(retrofitted, dtype="auto")
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    ids = AutoTokenizer.from_pretrained(retrofitted)(texts.late[0][:300], return_tensors="pt")["input_ids"]
    wanted = adapted(ids).logits
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, wanted, rtol=0, atol=1e-4)
    assert not torch.allclose(base(ids).logits, wanted, rtol=0, atol=1e-2)
