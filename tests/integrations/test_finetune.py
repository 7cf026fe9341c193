"""lrt finetune: what is read, what is learned, what is written, and that the adapter serves."""

import copy
import json
import shutil
from functools import partial
from importlib.resources import files

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.retrofits import awaken, plain
from support.server import saved
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, TrainerCallback
from trl.trainer.sft_trainer import SFTTrainer

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, generate, load, save
from lrt.cli.loading import load_model
from lrt.cli.main import main
from lrt.data.tokenizer import Tokenizer
from lrt.inference.chat_template import TEMPLATES, Message, special_tokens, turn_tokens
from lrt.inference.jinja_template import JinjaTemplate
from lrt.inference.sampling import Sampling
from lrt.integrations.finetune import comparison
from lrt.integrations.finetune.adapter import load_adapted
from lrt.integrations.finetune.chat_rows import read_rows
from lrt.integrations.finetune.comparison import PATHWAY, PLAIN, SHIFT, Outcome, difference
from lrt.integrations.finetune.finetune import make_optimiser, make_trainer, row_costs
from lrt.integrations.finetune.options import FinetuneOptions
from lrt.integrations.finetune.targets import LRTTarget, masked_turns, open_target
from lrt.integrations.hf.export import export
from lrt.integrations.retrofit import retrofit
from lrt.model import checkpoint
from lrt.serve.config import Limits, Settings
from lrt.serve.metrics import ServerMetrics
from lrt.serve.models import load_served_model

ANSWERS = {"red": "the colour of a rose", "blue": "the colour of the sea", "green": "the colour of grass"}
SLOW = pytest.mark.slow
QUESTIONS = [f"what is {name} to you, number {n}" for n in range(8) for name in ANSWERS]
SPECIAL = ["<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"]


def answer(question: str) -> str:
    return next(text for name, text in ANSWERS.items() if name in question)


def chats(layout: str = "messages") -> list[dict]:
    pairs = [(question, answer(question)) for question in QUESTIONS]
    if layout == "messages":
        return [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    if layout == "conversations":
        return [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in pairs]
    if layout == "prompt":
        return [{"prompt": q + ": ", "completion": a} for q, a in pairs]
    return [{"text": f"{q}: {a}"} for q, a in pairs]


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint of a small LRT with a vocabulary for chats."""
    folder = tmp_path_factory.mktemp("run") / "mine"
    inner = Tokenizer.train([*QUESTIONS, *ANSWERS.values()], 320).inner
    inner.add_special_tokens(SPECIAL)
    tokenizer = Tokenizer(inner)
    torch.manual_seed(0)
    memory = MemoryConfig(source=(0, 2), combine="channels", initial="embedding")
    config = ModelConfig(depth=2, width=32, heads=2, vocab_size=tokenizer.vocab_size, context=64, memory=memory)
    about = {"schedule": "settled(0, 1, 1)", "scores": {"live_bpb": 1.0}}
    save(folder, LatentRecurrentTransformer(config), tokenizer, about)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A retrofitted Llama as transformers saves it."""
    folder = tmp_path_factory.mktemp("llama") / "mine"
    words = sorted({word for text in [*QUESTIONS, *(a for a in ANSWERS.values())] for word in text.split()} | {":"})
    names = ["<pad>", "<unk>", "<eos>", *words][:60]
    inner = Inner(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    awaken(retrofit(plain("llama", lively=False).float(), source=3), std=0.1).float().save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", ["messages", "conversations"])
def test_layouts_of_chats_are_one(tmp_path, layout):
    write(tmp_path / "a.jsonl", chats(layout))
    assert read_rows([tmp_path / "a.jsonl"]) == chats("messages")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_run_learns_the_turns_that_it_is_served_with(run, name):
    template, inner = TEMPLATES[name], Inner.from_str(load(run)[1].to_json())
    inner.add_special_tokens(sorted(template.special))
    tokenizer = Tokenizer(inner)
    messages = [
        Message("system", "be brief"), Message("user", "what is red"), Message("assistant", "a rose"),
        Message("user", "and blue"), Message("assistant", "the sea"),
    ]  # fmt: skip
    ids, mask = masked_turns(tokenizer, template, messages)
    prompt = turn_tokens(tokenizer, template, template.parts(messages[:-1]))
    assert ids[: 1 + len(prompt)] == [tokenizer.bos, *prompt]  # as lrt chat asks for the last answer
    learned = [i for i, counted in zip(ids, mask, strict=True) if counted]
    end = turn_tokens(tokenizer, template, template.ending)
    assert learned == [*tokenizer.encode("a rose"), *end, *tokenizer.encode("the sea"), *end]


ENDED = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} ASSISTANT: "
    "{% else %}{{ m.content + END }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("end", [" END ", " <|end|>", "<|end|>\n", "\n"])
def test_a_template_learns_all_turns_and_what_ends_them(run, end):
    inner = Inner.from_str(load(run)[1].to_json())
    inner.add_special_tokens(["<|end|>"])
    tokenizer = Tokenizer(inner)
    template = JinjaTemplate(ENDED.replace("END }}", f"{end!r} }}}}"), frozenset(special_tokens(tokenizer)))
    talk = [Message("user", "one"), Message("assistant", "AAA"), Message("user", "two"), Message("assistant", "BBB")]
    ids, mask = masked_turns(tokenizer, template, talk)
    whole = f"USER: one ASSISTANT: AAA{end}USER: two ASSISTANT: BBB{end}"
    assert tokenizer.decode(ids) == whole.replace("<|end|>", "")
    learned = tokenizer.decode([i for i, counted in zip(ids, mask, strict=True) if counted])
    assert learned == f"AAA{end}BBB{end}".replace("<|end|>\n", "").replace("<|end|>", "")
    ends = [counted for i, counted in zip(ids, mask, strict=True) if i == special_tokens(tokenizer)["<|end|>"]]
    assert ends == [1, 1] * ("<|end|>" in end)


@pytest.mark.parametrize("layout", ["messages", "prompt", "text"])
def test_a_run_is_fine_tuned_and_stays_a_run(run, tmp_path, capsys, layout):
    file = write(tmp_path / "chat.jsonl", chats(layout))
    out = tmp_path / "tuned"
    main(["finetune", str(run), str(out), "--chat", file, "--steps", "12", "--lr", "3e-3", "--val", "0.2"])
    before, after = live_losses(capsys.readouterr().out)
    assert after < 0.9 * before
    assert load(out)[0].config == load(run)[0].config
    assert checkpoint.about(out) == {"schedule": "settled(0, 1, 1)", "finetuned": True}  # and none of its old scores
    assert not list(tmp_path.glob(".tuned*"))


def live_losses(text: str) -> tuple[float, float]:
    before, after = text.split("held-out rows: ")[1].split(" nats")[0].split(" -> ")
    return float(before), float(after)


def test_an_adapter_of_a_run_serves(run, tmp_path, capsys):
    texts, file = write(tmp_path / "text.jsonl", chats("text")), write(tmp_path / "chat.jsonl", chats())
    base_options = ["--steps", "40", "--lr", "1e-2", "--val", "0.2"]
    main(["finetune", str(run), str(tmp_path / "base"), "--chat", texts, *base_options])  # adapters need a trained head
    run = tmp_path / "base"
    capsys.readouterr()
    main(["finetune", str(run), str(tmp_path / "lora"), "--chat", file, "--lora", "8", "--steps", "30", "--lr", "2e-2"])
    before, after = live_losses(capsys.readouterr().out)
    assert after < 0.8 * before
    base, tokenizer = load(run)
    adapted, _ = load_adapted(run, tmp_path / "lora", "cpu")
    prompt = torch.tensor([[tokenizer.bos, *tokenizer.encode("what is red")]])
    wanted = torch.stack([*generate(adapted, prompt, 8, Sampling(temperature=0))], 1)
    assert not torch.equal(wanted, torch.stack([*generate(base, prompt, 8, Sampling(temperature=0))], 1))
    main([
        "sample", str(run), "--adapter", str(tmp_path / "lora"), "--prompt", "what is red", "--temperature", "0",
        "--max-new-tokens", "8",
    ])  # fmt: skip
    ids = [*wanted[0].tolist(), tokenizer.bos]
    text = tokenizer.decode(ids[: ids.index(tokenizer.bos)])  # where it ends, lrt sample ends
    assert text.split("<|")[0].strip() in capsys.readouterr().out
    load_one = partial(load_model, adapter=tmp_path / "lora")
    served = load_served_model(run, "mine", Settings(), Limits(), ServerMetrics(), load_one, [tmp_path / "lora"])
    for name, weight in served.workers[0].transformer.state_dict().items():
        assert torch.equal(weight, adapted.state_dict()[name]), name


@pytest.mark.parametrize("lora", [0, 4])
def test_a_retrofitted_folder_is_fine_tuned(llama, tmp_path, capsys, lora):
    file = write(tmp_path / "chat.jsonl", chats("prompt"))
    out = tmp_path / "tuned"
    options = ["--steps", "30", "--lr", "3e-2", "--lora", str(lora), "--val", "0.2"]
    main(["finetune", str(llama), str(out), "--chat", file, *options])
    before, after = live_losses(capsys.readouterr().out)
    assert (
        after < (0.98 if lora else 0.9) * before
    )  # around a head that is random and stays so, an adapter can do little
    if lora:
        from peft import PeftModel

        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama, dtype="auto"), out)
    else:
        model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    ids = PreTrainedTokenizerFast.from_pretrained(out)("what is red to you", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "no record"),
        ("{", "line 1 is no JSON"),
        ("[1]", "line 1 is no object"),
        ('{"question": "a"}', "has the fields question"),
        ('{"messages": "a"}', "holds no list of turns"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "a turn of 'bot'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no turn of the assistant"),
        ('{"prompt": "a", "completion": ""}', "no text in 'completion'"),
        ('{"text": "a"}\n{"prompt": "a", "completion": "b"}', "several kinds"),
        ('{"text": "a"}', "leave none to train on"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n' * 4, "turns that begin"),
    ],
)
def test_wrong_rows_are_answered_in_a_sentence(run, tmp_path, capsys, lines, message):
    (tmp_path / "chat.jsonl").write_text(lines)
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", str(run), str(tmp_path / "out"), "--chat", str(tmp_path / "chat.jsonl")])
    error = capsys.readouterr().err
    assert (stopped.value.code, message in error) == (2, True), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora", "-1"], "whole number from 0"),
        (["--val", "1"], "val is 1.0; it must be"),
        (["--epochs", "0"], "epochs is 0.0; it must be"),
        (["--lr", "0"], "lr is 0.0; it must be"),
        (["--length", "2"], "length is 2; it must be"),
        (["--template", "jinja"], "unknown template"),
        (["--template", "chatml"], "needs the special tokens"),
    ],
)
def test_wrong_options_are_answered_in_a_sentence(run, tmp_path, capsys, options, message):
    file = write(tmp_path / "chat.jsonl", chats())
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", str(run), str(tmp_path / "out"), "--chat", file, *options])
    error = capsys.readouterr().err
    assert (stopped.value.code, message in error) == (2, True), error


def test_a_folder_without_a_chat_template_is_told_so(llama, tmp_path, capsys):
    file = write(tmp_path / "chat.jsonl", chats())
    with pytest.raises(SystemExit):
        main(["finetune", str(llama), str(tmp_path / "out"), "--chat", file])
    assert "has no chat template" in capsys.readouterr().err


def test_a_tokenizer_that_ends_no_text_is_refused_with_the_fix(llama, tmp_path, capsys):
    shutil.copytree(llama, tmp_path / "endless")
    inner = Inner.from_file(str(llama / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(tmp_path / "endless")
    file = write(tmp_path / "chat.jsonl", chats("text"))
    with pytest.raises(SystemExit):
        main(["finetune", str(tmp_path / "endless"), str(tmp_path / "out"), "--chat", file])
    error = capsys.readouterr().err
    assert "endless has no token that ends a text; name one as eos_token in its tokenizer_config.json" in error


def with_template(llama, folder, template: str) -> str:
    """A copy of the folder whose tokenizer writes chats by `template`."""
    AutoModelForCausalLM.from_pretrained(llama, dtype="auto").save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["qwen3", pytest.param("llama3", marks=SLOW), pytest.param("gemma", marks=SLOW)])
def test_a_folders_own_template_writes_its_chats(llama, tmp_path, capsys, name):
    """As the models themselves have it, without marks: TRL knows it, and learns the assistant's tokens alone."""
    templates = files("trl") / "chat_templates"
    source = with_template(llama, tmp_path / "mine", (templates / f"{name}.jinja").read_text())
    file = write(tmp_path / "chat.jsonl", chats())
    options = ["--steps", "20", "--lr", "1e-2", "--val", "0.2", "--length", "128"]
    main(["finetune", source, str(tmp_path / "out"), "--chat", file, *options])
    before, after = live_losses(capsys.readouterr().out)
    assert after < before
    target = open_target(tmp_path / "mine", None)
    row = next(
        iter(make_trainer(target, chats()[:8], chats()[8:], tmp_path, FinetuneOptions(), "cpu").get_train_dataloader())
    )
    learned = [
        target.tokenizer.decode(ids[labels != -100])
        for ids, labels in zip(row["input_ids"], row["labels"], strict=True)
    ]
    assert all("colour of" in text and "number" not in text for text in learned), learned


def test_a_template_without_marks_is_refused_in_a_sentence(llama, tmp_path, capsys):
    source = with_template(llama, tmp_path / "mine", "{% for turn in messages %}{{ turn['content'] }} {% endfor %}")
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", source, str(tmp_path / "out"), "--chat", write(tmp_path / "chat.jsonl", chats())])
    error = capsys.readouterr().err
    assert (stopped.value.code, "{% generation %}" in error) == (2, True), error
    assert not list(tmp_path.glob(".out*"))  # nothing was begun


@pytest.mark.parametrize("lora", [0, 4])
def test_interrupted_it_goes_on_from_the_last_epoch(run, tmp_path, monkeypatch, capsys, lora):
    """The first call is stopped in its second epoch; the second trains that epoch alone, from what the first left."""
    file, out, seen = write(tmp_path / "chat.jsonl", chats("text")), tmp_path / "tuned", []
    command = ["finetune", str(run), str(out), "--chat", file, "--epochs", "2", "--lora", str(lora), "--val", "0.2"]
    step = SFTTrainer.training_step

    def counted(self, *arguments, **options):
        seen.append(self.state.global_step)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    monkeypatch.setattr(SFTTrainer, "training_step", counted)
    with pytest.raises(SystemExit, match="130"):
        main(command)
    assert not out.exists()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--seed", "1"])  # another one does not go on from these weights
    assert "an interrupted fine-tuning with other seed" in capsys.readouterr().err
    main(command)
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "is not empty" in capsys.readouterr().err
    assert seen == [0, 1, 2, 3, 3, 4, 5]  # three steps an epoch: the fourth was begun twice
    assert out.exists()
    assert not (tmp_path / ".tuned.finetune").exists()


def test_one_checkpoint_alone_is_served_with_an_adapter(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["serve", str(run), str(run), "--adapter", str(tmp_path), "--port", "0"])
    assert "fits one checkpoint, 2 are given" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", str(run), "--adapter", str(tmp_path), "--port", "0"])
    assert "is no adapter" in capsys.readouterr().err


def test_an_adapter_that_is_none_is_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["sample", str(run), "--adapter", str(tmp_path), "--max-new-tokens", "1"])
    assert "is no adapter" in capsys.readouterr().err


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


@pytest.fixture(scope="module")
def neutral(llama, tmp_path_factory):
    """The Llama with a pathway that was not trained, as `lrt retrofit` writes it."""
    folder = tmp_path_factory.mktemp("neutral") / "mine"
    retrofit(AutoModelForCausalLM.from_pretrained(llama, dtype="auto").detach(), source=3).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(llama).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compared(neutral, tmp_path_factory):
    """(folder, command) of a comparison in equal tokens and in equal time."""
    folder = tmp_path_factory.mktemp("controls")
    file = write(folder / "chat.jsonl", chats("prompt"))
    command = ["finetune", str(neutral), str(folder / "out"), "--chat", file, "--steps", "4", "--lr", "1e-2"]
    command += ["--val", "0.2", "--controls", "tokens", "wall_clock"]
    main(command)
    return folder / "out", command


@pytest.mark.slow
def test_controls_are_what_training_alone_gives(neutral, compared, tmp_path):
    """Each is the model that the same rows make of the same decoder by itself."""
    out, command = compared
    alone = command[: command.index("--controls")]
    base = AutoModelForCausalLM.from_pretrained(neutral, dtype="auto").detach()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(neutral)
    shifted = retrofit(copy.deepcopy(base), source=0, schedule="plain()")
    for name, model in ((PATHWAY, None), (PLAIN, base), (SHIFT, shifted)):
        source, trained = neutral, tmp_path / name
        if model is not None:
            source = tmp_path / f"{name}-base"
            model.save_pretrained(source)
            tokenizer.save_pretrained(source)
        main([alone[0], str(source), str(trained), *alone[3:]])
        one, two = weights(out / name.replace(" ", "-")), weights(trained)
        assert one.keys() == two.keys()
        for key, weight in one.items():
            torch.testing.assert_close(weight, two[key], rtol=0, atol=1e-5)


def test_controls_are_compared(compared, tmp_path):
    out, _ = compared
    outcomes = {(one.model, one.equal): one for one in comparison.read_outcomes(out)}
    assert set(outcomes) == {
        (PATHWAY, "tokens"), (SHIFT, "tokens"), (PLAIN, "tokens"), (SHIFT, "wall_clock"), (PLAIN, "wall_clock")
    }  # fmt: skip
    assert len({one.tokens for (_, equal), one in outcomes.items() if equal == "tokens"}) == 1
    assert len({one.before for one in outcomes.values()}) == 1  # the pathway is neutral: all begin as one model
    ratios = json.loads((out / "ratios.json").read_text())
    for name, ratio in ratios.items():
        assert outcomes[name, "wall_clock"].steps == max(1, round(4 * ratio))
        assert ratio > 1  # a pass without gradients costs something
    assert not (out / ".timing").exists()
    main(["report", str(out), "--out", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    for one in outcomes.values():
        assert f"{one.after:.4f}" in page


def test_an_interrupted_comparison_goes_on(compared, tmp_path, monkeypatch, capsys):
    """Killed behind the second model's folder, before its line: that one is trained again, the first is not. Stopped
    within a control of equal time, that one goes on with the ratio that was measured first."""
    out, command = tmp_path / "out", compared[1]
    shutil.copytree(compared[0], out)
    command = [*command[:2], str(out), *command[3:]]
    lines = (out / comparison.FILE).read_text().splitlines(keepends=True)
    (out / comparison.FILE).write_text("".join([lines[0], *lines[2:4]]))
    kept = (out / "pathway" / "config.json").stat().st_mtime_ns
    ratios = (out / "ratios.json").read_text()

    def interrupt(self, *_, **__):
        raise KeyboardInterrupt

    step = SFTTrainer.training_step
    monkeypatch.setattr(SFTTrainer, "training_step", interrupt)
    with pytest.raises(SystemExit, match="130"):
        main(command)
    monkeypatch.setattr(SFTTrainer, "training_step", step)
    main(command)
    assert "token shift, equal tokens" in capsys.readouterr().out
    assert (out / "ratios.json").read_text() == ratios
    assert (out / "pathway" / "config.json").stat().st_mtime_ns == kept
    assert (out / "token-shift.old" / "config.json").is_file()  # what was there is kept
    assert {(one.model, one.equal): one.steps for one in comparison.read_outcomes(out)} == {
        (one.model, one.equal): one.steps for one in comparison.read_outcomes(compared[0])
    }
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--seed", "1"])
    assert "holds no comparison of this model, rows and settings" in capsys.readouterr().err


def outcome(nats: tuple[float, ...], learned: tuple[int, ...]) -> Outcome:
    return Outcome(PATHWAY, "tokens", 1, 1, 1.0, 1.0, nats, learned)


def test_the_interval_of_a_difference_is_of_rows():
    """Two rows, of which one gained 2 nats and one nothing: drawn anew, both may be the one or the other."""
    one, two = outcome((8.0, 5.0), (10, 10)), outcome((10.0, 5.0), (10, 10))
    assert difference(one, two) == pytest.approx((-0.1, -0.2, 0.0))
    assert difference(one, outcome((1.0, 1.0), (10, 9))) is None
    assert difference(outcome((1.0,), (10,)), outcome((2.0,), (10,))) is None


def test_the_costs_of_packed_rows_are_those_of_each_alone():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, generator=generator), torch.randint(7, (2, 5), generator=generator)
    labels[0, 3] = -100
    alone = [row_costs(logits[i : i + 1], labels[i : i + 1], None)[0] for i in range(2)]
    packed = row_costs(logits.reshape(1, 10, 7), labels.reshape(1, 10), torch.arange(10)[None] % 5)
    assert [tokens for _, tokens in packed] == [3, 4] == [tokens for _, tokens in alone]
    for (nats, _), (wanted, _) in zip(packed, alone, strict=True):
        assert nats == pytest.approx(wanted)


def test_packing_scores_as_many_rows(run, tmp_path, capsys):
    file = write(tmp_path / "chat.jsonl", chats("text"))
    scores = []
    for name, options in (("alone", ()), ("packed", ("--packing",))):
        main(["finetune", str(run), str(tmp_path / name), "--chat", file, "--steps", "1", "--val", "0.2", *options])
        out = capsys.readouterr().out
        assert "live, 5 held-out rows" in out
        scores.append(live_losses(out)[0])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_a_model_in_bfloat16_is_trained_in_float32(llama, tmp_path):
    """Steps of 1e-6 are lost in bfloat16's rounding of a weight, but not their sum."""
    source = tmp_path / "mine"
    AutoModelForCausalLM.from_pretrained(llama).to(torch.bfloat16).save_pretrained(source)
    PreTrainedTokenizerFast.from_pretrained(llama).save_pretrained(source)
    target = open_target(source, None)
    seen = []

    class Weights(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            seen.append({p.dtype for p in model.parameters()})

    trainer = make_trainer(target, chats("prompt")[:8], chats("prompt")[8:], tmp_path, FinetuneOptions(steps=1), "cpu")
    trainer.add_callback(Weights())
    trainer.train()
    assert seen == [{torch.float32}]
    file = write(tmp_path / "chat.jsonl", chats("prompt"))
    main(["finetune", str(source), str(tmp_path / "out"), "--chat", file, "--steps", "2", "--lr", "1e-2"])
    assert {weight.dtype for weight in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_adapters_of_a_model_in_bfloat16_are_not_rounded(llama, tmp_path):
    """They are trained and saved in float32."""
    source = tmp_path / "mine"
    AutoModelForCausalLM.from_pretrained(llama).to(torch.bfloat16).save_pretrained(source)
    PreTrainedTokenizerFast.from_pretrained(llama).save_pretrained(source)
    file = write(tmp_path / "chat.jsonl", chats("prompt"))
    command = ["finetune", str(source), str(tmp_path / "out"), "--chat", file, "--steps", "2", "--lr", "1e-2"]
    main([*command, "--lora", "2"])
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    adapters = [weight for name, weight in saved.items() if "lora_" in name]
    assert {weight.dtype for weight in adapters} == {torch.float32}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in adapters)


def test_adapters_begin_as_the_seed_says(llama, tmp_path):
    def begun() -> dict[str, torch.Tensor]:
        options = FinetuneOptions(lora=2)
        trainer = make_trainer(open_target(llama, None), chats("text")[:8], chats("text")[8:], tmp_path, options, "cpu")
        return {name: p for name, p in trainer.model.named_parameters() if "lora_A" in name}

    torch.manual_seed(1)
    one = begun()
    torch.manual_seed(2)
    two = begun()
    assert all(torch.equal(p, two[name]) for name, p in one.items())


def test_a_frozen_decoder_stays_as_it_was(llama, tmp_path, capsys):
    file = write(tmp_path / "chat.jsonl", chats("prompt"))
    out = tmp_path / "tuned"
    main(["finetune", str(llama), str(out), "--chat", file, "--steps", "4", "--freeze", "--lr", "1e-2"])
    assert "the pathway, " in capsys.readouterr().out
    before, after = weights(llama), weights(out)
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed
    assert all(name.startswith("latent.") for name in changed)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("gate_rate", "wanted"), [(None, (1e-3, 5e-2, 5e-2)), (200.0, (1e-3, 5e-2, 2e-1))])
def test_a_pathway_has_rates_of_its_own(llama, gate_rate, wanted, adapted):
    model = AutoModelForCausalLM.from_pretrained(llama)
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["latent"]))
    optimiser = make_optimiser(model, 1e-3, FinetuneOptions(pathway_rate=50.0, gate_rate=gate_rate), True)
    rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    assert len(rates) == sum(p.requires_grad for p in model.parameters())
    old, projections, gates = wanted
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind = old if "latent" not in name else projections if "project" in name else gates
        assert rates[id(p)] == pytest.approx(kind), name


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("run", ["--controls", "tokens"], "controls are of retrofitted models"),
        ("run", ["--freeze"], "freeze, pathway_rate and gate_rate are for retrofitted models"),
        ("run", ["--gate-rate", "3"], "are for retrofitted models"),
        ("run", ["--pathway-rate", "3"], "are for retrofitted models"),
        ("llama", ["--pathway-rate", "0"], "pathway_rate is 0.0; it must be"),
        ("llama", ["--freeze", "--lora", "2"], "leave one of them out"),
        ("neutral", ["--freeze", "--controls", "tokens"], "has then nothing to train"),
        ("neutral", ["--lora", "2", "--controls", "tokens"], "controls train all weights"),
        ("llama", ["--controls", "tokens"], "was trained already"),
        ("shift", ["--controls", "tokens"], "which is the control"),
    ],
)
def test_what_fits_no_pathway_is_answered_in_a_sentence(request, llama, tmp_path, capsys, source, options, message):
    folder = tmp_path / "shift"
    if source == "shift":
        retrofit(AutoModelForCausalLM.from_pretrained(llama).detach(), source=0).save_pretrained(folder)
        PreTrainedTokenizerFast.from_pretrained(llama).save_pretrained(folder)
    else:
        folder = request.getfixturevalue(source)
    file = write(tmp_path / "chat.jsonl", chats("prompt"))
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", str(folder), str(tmp_path / "out"), "--chat", file, *options])
    error = capsys.readouterr().err
    assert (stopped.value.code, message in error) == (2, True), error


OWN_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_runs_own_template_is_what_is_learned_and_it_is_kept(tmp_path):
    folder = saved(tmp_path / "run", "<|im_start|>", "<|im_end|>")
    talk = [{"role": role, "content": f"{role} says {i}"} for i, role in enumerate(["user", "assistant"] * 3)]
    by_table = LRTTarget.open(folder, None).encode({"messages": talk})
    (folder / "chat_template.jinja").write_text(OWN_CHATML)
    target = LRTTarget.open(folder, None)
    assert isinstance(target.template, JinjaTemplate)
    assert target.encode({"messages": talk}) == by_table
    target.save(target.model, tmp_path / "tuned")
    assert (tmp_path / "tuned" / "chat_template.jinja").read_text() == OWN_CHATML
    export(tmp_path / "tuned", tmp_path / "exported")
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").chat_template == OWN_CHATML
