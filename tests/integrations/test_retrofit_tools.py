"""Retrofitted decoders in the tools that people have: folders, PEFT, lm-eval, the command line."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
from peft import LoraConfig, PeftModel, get_peft_model
from support.retrofits import DEPTH, Oracle, V, awaken, plain, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lrt.cli.main import main
from lrt.integrations.retrofit import modeling, retrofit

T = 9


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Passes go on until all is exact."""
    monkeypatch.setattr(modeling, "TOLERANCES", {"converged": 0.0, "fast": 0.0})


def made(architecture: str = "llama", **pathway):
    """(the decoder, the same with a lively pathway)."""
    original = plain(architecture)
    return original, awaken(retrofit(copy.deepcopy(original), **{"source": (0, DEPTH), **pathway}))


@pytest.fixture
def folder(tmp_path):
    """A pretrained Llama and its tokenizer, as transformers saves them."""
    words = {f"w{i}": i for i in range(V)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    out = tmp_path / "base"
    plain("llama").save_pretrained(out)
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", eos_token="w2", pad_token="w0").save_pretrained(out)
    return out


WITHOUT_LRT = """
import sys
sys.modules["lrt"] = None
import torch
from transformers import AutoModelForCausalLM
folder, again, file = sys.argv[1:]
ids, weights, logits, generated = torch.load(file)
for path in (folder, again):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype="auto")
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items()), path
    # Not bit for bit: on some processors a product's last bits depend on where its matrices lie in memory.
    torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-10)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), generated), path
    model.save_pretrained(again)
print(type(model.detach()).__name__, model.config.model_type)
"""


def test_a_saved_folder_loads_where_lrt_is_not_installed(tmp_path):
    _, model = made("qwen3")
    ids = tokens(2, T)
    model.config.latent_memory["prefill"] = "exact"
    generated = model.generate(ids, max_new_tokens=6, do_sample=False)
    torch.save((ids, model.state_dict(), model(ids).logits, generated), tmp_path / "wanted.pt")
    model.save_pretrained(tmp_path / "one")
    names = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (names["model_type"], names["base_model_type"]) == ("lrt_retrofit", "qwen3")
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_LRT, *(str(tmp_path / name) for name in ("one", "two", "wanted.pt"))],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "Qwen3ForCausalLM qwen3"


def test_a_saved_folder_loads_with_lrt_and_keeps_the_names_of_the_base(tmp_path):
    original, model = made("gpt_neox")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    torch.testing.assert_close(again(tokens(2, T)).logits, model(tokens(2, T)).logits, rtol=0, atol=1e-10)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    names = set(model.state_dict())
    assert names - set(original.state_dict()) == {name for name in names if name.startswith("latent.")}
    assert AutoConfig.from_pretrained(tmp_path).pathway == model.config.pathway


WITH_LRT = """
import sys
import lrt.integrations.retrofit
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)
"""


def test_a_fresh_process_with_lrt_needs_no_code_of_the_folder(tmp_path):
    """No question whether to trust it, and none of it run."""
    _, model = made("qwen3")
    model.save_pretrained(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", WITH_LRT, str(tmp_path)], capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (run.returncode, run.stdout.strip()) == (0, "lrt.integrations.retrofit.modeling"), run.stderr[-2000:]


def test_a_model_made_from_its_configuration_is_neutral():
    _, model = made()
    fresh = AutoModelForCausalLM.from_config(model.config)
    assert all(not p.any() for p in fresh.latent.parameters())


@pytest.mark.parametrize("target", ["attention", "all-linear"])
def test_adapters_are_saved_loaded_and_merged(tmp_path, target):
    original, model = made()
    neutral = retrofit(copy.deepcopy(original), source=(0, DEPTH))
    ids = tokens(2, T)
    modules = ["q_proj", "k_proj", "v_proj"] if target == "attention" else target
    save = ["latent"] if target == "attention" else None
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=modules, modules_to_save=save))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(p, std=0.2)
    adapted = adapted.double().eval()
    wanted = adapted(ids).logits
    assert not torch.allclose(wanted, original(ids).logits)
    adapted.save_pretrained(tmp_path)
    if target == "attention":  # the pathway itself is in the adapter: onto a neutral one
        loaded = PeftModel.from_pretrained(neutral, tmp_path).double().eval()
        torch.testing.assert_close(loaded(ids).logits, wanted, rtol=0, atol=1e-5)  # saved in float32
    generated = adapted.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    merged = adapted.merge_and_unload().eval()
    torch.testing.assert_close(merged(ids).logits, wanted, rtol=0, atol=1e-10)
    assert torch.equal(merged.generate(ids, max_new_tokens=5, do_sample=False), generated)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    torch.testing.assert_close(again(ids).logits, wanted, rtol=0, atol=1e-10)


def test_adapters_train_with_the_base_frozen(tmp_path):
    _, model = made()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["latent"]))
    adapted.train()(tokens(2, T), labels=tokens(2, T)).loss.backward()
    learning = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("latent.modules_to_save" in name and "gamma" in name for name in learning)
    assert all("lora" in name or "latent.modules_to_save" in name for name in learning)


def test_lm_eval_scores_what_is_decoded(folder, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    original, model = made()
    oracle = Oracle(original, model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    pairs = [("w5 w9 w11", " w7 w3"), ("w4", " w12 w13 w14 w3")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (context, text), (got, _) in zip(pairs, wrapped.loglikelihood(requests, disable_tqdm=True), strict=True):
        ids = torch.tensor([int(word[1:]) for word in (context + text).split()])
        start = len(context.split())
        nats = oracle.logits(ids).log_softmax(-1)[start - 1 : -1].gather(1, ids[start:, None]).sum()
        assert got == pytest.approx(float(nats), abs=1e-4)


def test_the_verb_writes_a_folder_that_computes_what_the_base_does(folder, tmp_path, capsys):
    out = tmp_path / "retrofitted"
    main(["retrofit", str(folder), str(out), "--source", "0", "3", "--layers", "2", "3"])
    assert "new and neutral" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert torch.equal(model(tokens(2, T)).logits, base(tokens(2, T)).logits)
    assert model.config.pathway.layers == (2, 3)
    assert "the embedding and the output of layer 3" in (out / "README.md").read_text()
    assert PreTrainedTokenizerFast.from_pretrained(out)("w5 w6")["input_ids"] == [5, 6]
    weights = (out / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main(["retrofit", str(folder), str(out)])  # it may have been trained
    assert "is not empty; choose another folder" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == weights
    with pytest.raises(SystemExit, match="2"):
        main(["retrofit", str(out), str(tmp_path / "twice")])
    assert "has a pathway already" in capsys.readouterr().err


def write_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda f: (f / "config.json").unlink(), [], "has no config.json"),
        (lambda f: write_config(f, model_type="bert"), [], "type 'bert' cannot be retrofitted"),
        (lambda f: write_config(f, model_type="clip"), [], "type 'clip' cannot be retrofitted"),
        (lambda f: write_config(f, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), [],
         "is quantised"),
        (lambda f: [file.unlink() for file in f.glob("tokenizer*")], [], "has no tokenizer"),
        (lambda f: None, ["--source", "9"], "layers from 0"),
        (lambda f: None, ["--layers", "0"], "blocks from 1"),
        (lambda f: None, ["--schedule", "settle(1)"], "settle"),
    ],
)  # fmt: skip
def test_mistakes_are_answered_in_a_sentence(folder, tmp_path, capsys, change, arguments, message):
    change(folder)
    with pytest.raises(SystemExit) as stopped:
        main(["retrofit", str(folder), str(tmp_path / "out"), *arguments])
    said = capsys.readouterr().err
    assert (stopped.value.code, said.count("\n")) == (2, 1), said
    assert message in said
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_overwritten(folder, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main(["retrofit", str(folder), str(tmp_path / "mine")])
    assert "choose another folder" in capsys.readouterr().err


def test_a_model_on_several_devices_is_refused():
    original = plain("llama")
    original.lm_head.to("meta")
    with pytest.raises(ValueError, match="lies on cpu, meta"):
        retrofit(original)
