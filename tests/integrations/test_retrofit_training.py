"""Training retrofitted decoders with Trainer and TRL: what is sampled, scored and trained is one policy where asked."""

import copy
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")
from datasets import Dataset as Rows
from peft import LoraConfig, get_peft_model
from support.retrofits import DEPTH, V, awaken, plain, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from lrt.integrations.hf import ScheduleCallback
from lrt.integrations.hf.schedule_callback import tell
from lrt.integrations.hf.schedule_step import FollowsSchedule
from lrt.integrations.retrofit import retrofit

TEXTS = [" ".join(f"w{3 + (7 * i + j * j) % (V - 3)}" for j in range(10)) for i in range(24)]


def tokenizer() -> PreTrainedTokenizerFast:
    """A word, a token."""
    special = ["<pad>", "<unk>", "<eos>"]
    words = {name: i for i, name in enumerate([*special, *(f"w{i}" for i in range(3, V))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def made(scoring: str = "auto", lively: bool = False, **pathway):
    """A small Llama in float32 whose memory matters; lively, its weights are so large that any difference shows."""
    model = retrofit(plain("llama", lively=lively).float(), **{"source": DEPTH, "scoring": scoring, **pathway})
    return awaken(model, std=0.3 if lively else 0.1).float()


def arguments(kind, folder, **more):
    settings = {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 2e-2, "logging_steps": 1, **more}
    return kind(output_dir=str(folder), save_strategy="no", report_to=[], use_cpu=True, **settings)


@torch.no_grad()
def live_loss(model) -> float:
    ids = tokenizer()(TEXTS, return_tensors="pt")["input_ids"]
    return float(copy.deepcopy(model).eval()(ids, labels=ids).loss)


@pytest.mark.parametrize("schedule", ["settled(0, 1, 1)", "strided(2, 2)"])
def test_trainer_lowers_the_live_loss(tmp_path, schedule):
    model = made(schedule=schedule)
    before = live_loss(model)
    ids = tokenizer()(TEXTS)["input_ids"]
    rows = Rows.from_dict({"input_ids": ids, "labels": ids})
    Trainer(model=model, args=arguments(TrainingArguments, tmp_path), train_dataset=rows).train()
    assert live_loss(model) < 0.9 * before


def test_stages_follow_the_training(tmp_path, monkeypatch):
    """Two steps of each stage, also inside an adapter; behind the training the last stage, as before it."""
    served = []
    schedule_now = FollowsSchedule.schedule_now

    def noted(self, schedule):
        served.append(repr(schedule_now(self, schedule)))
        return schedule_now(self, schedule)

    monkeypatch.setattr(FollowsSchedule, "schedule_now", noted)
    model = made(schedule="stages([(0.5, plain()), (0.5, settled(0, 1, 1))])")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ids = tokenizer()(TEXTS)["input_ids"]
    Trainer(
        model=adapted, args=arguments(TrainingArguments, tmp_path, max_steps=4),
        train_dataset=Rows.from_dict({"input_ids": ids, "labels": ids}), callbacks=[ScheduleCallback()],
    ).train()  # fmt: skip
    assert served == ["plain()", "plain()", "settled(0, 1, 1)", "settled(0, 1, 1)"]
    rows = torch.tensor(ids[:2])
    adapted.train()(input_ids=rows, labels=rows)
    assert served[4:] == ["settled(0, 1, 1)"]


def test_a_model_without_a_schedule_is_told_so(tmp_path):
    ids = tokenizer()(TEXTS)["input_ids"]
    rows = Rows.from_dict({"input_ids": ids, "labels": ids})
    options = arguments(TrainingArguments, tmp_path, max_steps=1)
    trainer = Trainer(model=plain("llama").float(), args=options, train_dataset=rows, callbacks=[ScheduleCallback()])
    with pytest.raises(ValueError, match="has no schedule that a step could decide"):
        trainer.train()


def test_a_folders_own_code_is_told_the_step():
    """Its class has the same name, and is another."""
    other = type("FollowsSchedule", (), {"training_step": None})
    model = torch.nn.Sequential(type("Remote", (other, torch.nn.Module), {})())
    tell(model, (1, 2, 3))
    assert model[0].training_step == (1, 2, 3)


@pytest.mark.parametrize("scoring", ["auto", "live"])
@pytest.mark.parametrize("packing", [False, True])
def test_sft_lowers_the_live_loss(tmp_path, scoring, packing):
    model = made(scoring)
    before = live_loss(model)
    options = {"packing": packing, "max_length": 32, "bf16": False, "gradient_checkpointing": True}
    SFTTrainer(
        model=model,
        args=arguments(SFTConfig, tmp_path, **options),
        train_dataset=Rows.from_dict({"text": TEXTS}),
        processing_class=tokenizer(),
    ).train()
    assert live_loss(model) < 0.8 * before


PREFERENCES = Rows.from_dict(
    {
        "prompt": [text[:11] for text in TEXTS[:8]],
        "chosen": [text[11:] for text in TEXTS[:8]],
        "rejected": [text[17:] + " w5" for text in TEXTS[:8]],
    }
)


@pytest.mark.parametrize("scoring", ["auto", "live"])
def test_equal_weights_have_no_reward(tmp_path, scoring):
    model = made(scoring, lively=True)
    options = {
        "max_steps": 2, "bf16": False, "max_length": 32, "gradient_checkpointing": False, "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
    }  # fmt: skip
    trainer = DPOTrainer(
        model=model, ref_model=copy.deepcopy(model), args=arguments(DPOConfig, tmp_path, **options),
        processing_class=tokenizer(), train_dataset=PREFERENCES,
    )  # fmt: skip
    trainer.train()
    first, second = (line for line in trainer.state.log_history if "rewards/margins" in line)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(first[name]) <= 1e-4, name
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert second["rewards/margins"] > 0


@pytest.mark.parametrize(("lively", "dtype"), [(True, torch.float64), (False, torch.float32)])
def test_what_is_sampled_and_what_is_trained_have_equal_probabilities(lively, dtype):
    """GRPO's importance ratio: of tokens as generate() drew them, and as the loss scores them in train().

    Lively weights in float64: they make 1e-4 of float32's rounding.
    """
    model = made("live", lively=lively).to(dtype)
    model.generation_config.eos_token_id = None
    prompt = tokens(3, 5)
    options = {"max_new_tokens": 12, "do_sample": True, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(prompt, **options)
    sampled = torch.stack(out.logits, 1).log_softmax(-1).gather(2, out.sequences[:, 5:, None])[..., 0]
    add_fused_lm_head(model)
    labels = out.sequences.clone()
    labels[:, :5] = -100
    called = {"input_ids": out.sequences, "attention_mask": torch.ones_like(labels), "use_cache": False}
    trained = model.train()(**called, labels=labels, fused_lm_head=True).log_probs[:, 4:]
    assert trained.requires_grad
    assert float((trained - sampled).exp().sub(1).abs().max()) <= (1e-5 if lively else 1e-4)
    model.config.latent_memory["scoring"] = "auto"  # the schedule's is another policy
    other = model(**called, labels=labels, fused_lm_head=True).log_probs[:, 4:]
    assert float((other - sampled).exp().sub(1).abs().max()) > (1e-2 if lively else 5e-4)


def test_grpo_raises_its_reward(tmp_path):
    """Rewarded for words of the first half: the share of them among what is sampled."""
    model = made("live")

    def share(completions, **_):
        return [sum(f"w{i}" in text.split() for i in range(3, V // 2)) / 8 for text in completions]

    options = {
        "max_steps": 12, "per_device_train_batch_size": 16, "num_generations": 8, "max_completion_length": 8,
        "bf16": False, "gradient_checkpointing": False, "beta": 0.0, "learning_rate": 2e-2, "temperature": 1.0,
    }  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=share, args=arguments(GRPOConfig, tmp_path, **options),
        processing_class=tokenizer(), train_dataset=Rows.from_dict({"prompt": [text[:11] for text in TEXTS]}),
    )  # fmt: skip
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.1
