"""transformers' Trainer, PEFT and TRL run on an LRT as on any other causal model; what they train is measured live."""

import copy
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("trl")
from datasets import Dataset as Rows
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, score
from lrt.data.tokenizer import Tokenizer
from lrt.integrations.hf import LRTForCausalLM, ScheduleCallback
from lrt.integrations.hf.export import prepend_bos, wrap_model, wrap_tokenizer
from lrt.integrations.hf.schedule_step import FollowsSchedule

TEXTS = [f"the state of token {i} is what token {i + 1} remembers" for i in range(40)]
NEW = [f"token {i + 1} remembers what the state of token {i} is" for i in range(40, 50)]
"""Texts that nothing is trained on."""
TOKENIZER = Tokenizer.train(TEXTS, 300)


def make() -> tuple[LRTForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    memory = MemoryConfig(injection="both", source=(0, 2), combine="channels", initial="embedding")
    config = ModelConfig(depth=2, width=32, heads=2, vocab_size=TOKENIZER.vocab_size, context=64, memory=memory)
    model = wrap_model(LatentRecurrentTransformer(config), TOKENIZER, "settled(0, 1, 1)", "exact")
    special = TOKENIZER.inner.id_to_token(TOKENIZER.bos)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=prepend_bos(TOKENIZER), bos_token=special, eos_token=special, pad_token="<pad>"
    )
    fast.pad_token = special
    return model, fast


def live_bpb(model: LatentRecurrentTransformer) -> float:
    nats = size = 0.0
    for text in NEW:
        nats += float(score(model, torch.tensor([[TOKENIZER.bos, *TOKENIZER.encode(text)]])).sum())
        size += len(text.encode())
    return nats / (math.log(2) * size)


def arguments(kind, folder, **more):
    return kind(
        output_dir=str(folder), max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=4, save_strategy="no", report_to=[], use_cpu=True, **more,
    )  # fmt: skip


def test_stages_follow_the_training(tmp_path, monkeypatch):
    """Half of the twelve steps by each stage, two batches a step; without the callback the last one throughout."""
    served: list[str] = []
    schedule_now = FollowsSchedule.schedule_now

    def noted(self, schedule):
        served.append(repr(schedule_now(self, schedule)))
        return schedule_now(self, schedule)

    monkeypatch.setattr(FollowsSchedule, "schedule_now", noted)
    rows = Rows.from_dict({"input_ids": [TOKENIZER.encode(text) for text in TEXTS]})
    for callbacks, wanted in (([ScheduleCallback()], ["plain()"] * 12 + ["settled(0, 1, 1)"] * 12), ([], None)):
        model, fast = make()
        model.config.schedule = "stages([(0.5, plain()), (0.5, settled(0, 1, 1))])"
        served.clear()
        Trainer(
            model=model, args=arguments(TrainingArguments, tmp_path), train_dataset=rows, callbacks=callbacks,
            data_collator=DataCollatorForLanguageModeling(fast, mlm=False),
        ).train()  # fmt: skip
        assert served == (wanted or ["settled(0, 1, 1)"] * 24)


def test_trainer(tmp_path):
    model, fast = make()
    before = live_bpb(model.model)
    rows = Rows.from_dict({"text": TEXTS}).map(lambda row: fast(row["text"]), remove_columns=["text"])
    trainer = Trainer(
        model=model,
        args=arguments(TrainingArguments, tmp_path),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(fast, mlm=False),
    )
    trainer.train()
    assert live_bpb(model.model) < 0.95 * before
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_lora_lowers_live_bpb_and_leaves_the_base_alone(tmp_path):
    model, fast = make()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = live_bpb(model.model)
    adapted = get_peft_model(
        model,
        LoraConfig(r=4, target_modules=["query", "key", "value", "out", "up", "down", "head"], task_type="CAUSAL_LM"),
    )
    rows = Rows.from_dict({"text": TEXTS}).map(lambda row: fast(row["text"]), remove_columns=["text"])
    Trainer(
        model=adapted,
        args=arguments(TrainingArguments, tmp_path),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(fast, mlm=False),
    ).train()
    adapted.eval()
    after = live_bpb(adapted.get_base_model().model)
    assert after < before - 0.01
    kept = {n.replace(".base_layer", ""): p for n, p in adapted.get_base_model().named_parameters() if "lora_" not in n}
    assert kept.keys() == base.keys()
    assert all(torch.equal(kept[name], base[name]) for name in base)

    prompt = fast("the state of", return_tensors="pt")
    expected = adapted.generate(**prompt, max_new_tokens=8, do_sample=False)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(make()[0], tmp_path / "adapter").eval()
    assert torch.equal(again.generate(**prompt, max_new_tokens=8, do_sample=False), expected)
    merged = again.merge_and_unload()
    assert live_bpb(merged.model) == pytest.approx(after, abs=1e-4)


def test_label_smoothing_is_of_the_next_token(tmp_path):
    """transformers shifts labels only for the causal models that it knows."""
    model, fast = make()
    ids = torch.tensor([fast(TEXTS[0])["input_ids"]])
    smoothed = arguments(TrainingArguments, tmp_path, label_smoothing_factor=1e-9)
    loss = Trainer(model=model.train(), args=smoothed).compute_loss(model, {"input_ids": ids, "labels": ids})
    assert float(loss) == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-4)


def test_metrics_get_logits_alone(tmp_path):
    model, fast = make()
    rows = Rows.from_dict({"text": TEXTS[:4]}).map(lambda row: fast(row["text"]), remove_columns=["text"])
    shapes = []

    def metrics(evaluation):
        shapes.append(evaluation.predictions.shape)
        return {}

    Trainer(
        model=model,
        args=arguments(TrainingArguments, tmp_path),
        eval_dataset=rows,
        compute_metrics=metrics,
        data_collator=DataCollatorForLanguageModeling(fast, mlm=False),
    ).evaluate()
    assert shapes[0][0] == 4
    assert shapes[0][2] == TOKENIZER.vocab_size


@pytest.mark.parametrize("packing", [False, True])
def test_trl_fine_tunes(tmp_path, packing):
    model, fast = make()
    before = live_bpb(model.model)
    options = {"packing": packing, "max_length": 64, "gradient_checkpointing": False, "bf16": False}
    trainer = SFTTrainer(
        model=model,
        args=arguments(SFTConfig, tmp_path, **options),
        train_dataset=Rows.from_dict({"text": TEXTS}),
        eval_dataset=Rows.from_dict({"text": NEW}),
        processing_class=fast,
    )
    trainer.train()
    assert live_bpb(model.model) < 0.95 * before
    assert math.isfinite(trainer.evaluate()["eval_loss"])


# --- preferences ---------------------------------------------------------------------------------------------------

PREFERENCES = Rows.from_dict(
    {
        "prompt": [text[:20] for text in TEXTS[:8]],
        "chosen": [text[20:] for text in TEXTS[:8]],
        "rejected": [text[26:] + " no" for text in TEXTS[:8]],
    }
)


def vivid() -> tuple[LRTForCausalLM, PreTrainedTokenizerFast]:
    """A model whose memory matters, so that the training schedule and live decoding differ, and a tokenizer."""
    model, _ = make()
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model, wrap_tokenizer(TOKENIZER, 64)


def dpo(tmp_path, model, tokenizer, **options) -> DPOTrainer:
    settings = {"gradient_checkpointing": False, "bf16": False, "max_length": 64, **options}
    made = arguments(DPOConfig, tmp_path, **settings)
    made.max_steps, made.logging_steps, made.gradient_accumulation_steps = 2, 1, 1
    none = isinstance(model, PeftModel) or "precompute_ref_log_probs" in options
    return DPOTrainer(
        model=model, ref_model=None if none else copy.deepcopy(model), args=made, processing_class=tokenizer,
        train_dataset=PREFERENCES, eval_dataset=PREFERENCES,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["reference", "adapter", "precomputed"])
def test_equal_weights_have_no_reward(tmp_path, kind):
    """TRL scores the policy in train() with gradients, its reference in eval() without, or in advance."""
    model, tokenizer = vivid()
    live, trained = (model(**batch_of(tokenizer), scoring=scoring).logits for scoring in ("live", "schedule"))
    assert float((live - trained).abs().max()) > 1  # else any way to score would do
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "key", "value", "out", "up", "down"]))
    trainer = dpo(tmp_path, model, tokenizer, **({"precompute_ref_log_probs": True} if kind == "precomputed" else {}))
    trainer.train()
    first, second = (line for line in trainer.state.log_history if "rewards/margins" in line)
    tolerance = 1e-4 if kind == "precomputed" else 0  # other batches, so other roundings
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(first[name]) <= tolerance, name
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6 + tolerance)
    assert second["rewards/margins"] > 0
    assert trainer.evaluate()["eval_rewards/margins"] > second["rewards/margins"]


def batch_of(tokenizer):
    return tokenizer(TEXTS[:2], return_tensors="pt", padding=True)


def test_policy_and_reference_are_bit_equal_as_dpo_calls_them():
    """DPOTrainer's own steps: chosen and rejected in one batch padded on the right, labels, a head beside the model."""
    policy, tokenizer = vivid()
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    policy.train()
    batch = tokenizer(
        [*TEXTS[:2], *(text[:-9] for text in TEXTS[:2])], return_tensors="pt", padding=True, padding_side="right"
    )
    for model in (policy, reference):
        add_fused_lm_head(model)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    called = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    scores = policy(**called, labels=labels, fused_lm_head=True).log_probs
    with torch.no_grad():
        expected = reference(**called, labels=labels, fused_lm_head=True).log_probs
    assert scores.requires_grad
    assert torch.equal(scores, expected)


def test_a_head_on_the_logits_compares_alike_where_the_setting_says_so():
    """Trainers that read `logits` call the model itself."""
    policy, tokenizer = vivid()
    policy.config.scoring = "schedule"
    reference = copy.deepcopy(policy).eval()
    batch = batch_of(tokenizer)
    with torch.no_grad():
        expected = reference(**batch, use_cache=False).logits
    assert torch.equal(policy.train()(**batch, use_cache=False).logits, expected)


# --- one policy ----------------------------------------------------------------------------------------------------


def test_live_in_training_is_live_with_the_gradients_of_its_last_pass():
    """As many full passes as there are tokens are exact; cut from each other, they leave the gradients of the last."""
    model, tokenizer = vivid()
    model = model.double()
    batch = {**batch_of(tokenizer), "labels": batch_of(tokenizer)["input_ids"]}
    length = batch["input_ids"].shape[1]
    model.config.schedule = f"multi_refinement({length}, {(0,) * length + (1,)}, True)"
    model.config.prefill = "exact"
    results = {}
    for scoring in ("schedule", "live"):
        model.zero_grad()
        out = model.train()(**batch, scoring=scoring)
        out.loss.backward()
        results[scoring] = (out.logits, out.loss, {n: p.grad for n, p in model.named_parameters()})
    logits, loss, gradients = results["live"]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], model.eval()(**batch).logits[real], rtol=0, atol=1e-10)
    torch.testing.assert_close(loss, results["schedule"][1], rtol=0, atol=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, results["schedule"][2][name], rtol=0, atol=1e-10, msg=name)


def test_shares_of_a_batch_sum_to_it_live_too():
    """Packed texts, whose first tokens nothing foretells, and a share without any label."""
    model, _ = vivid()
    model = model.double().train()
    ids = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(0))
    positions = torch.cat((torch.arange(3), torch.arange(5)))[None].expand(3, 8)
    labels = ids.clone()
    labels[2] = -100
    for scoring in ("live", "schedule"):
        model.config.schedule = "settled(0, 1, 1)"
        whole = model(ids, position_ids=positions, labels=labels, scoring=scoring).loss
        items = 2 * (2 + 4)  # targets: a text of n tokens has n - 1
        parts = [
            model(
                ids[i : i + 1], position_ids=positions[:1], labels=labels[i : i + 1], scoring=scoring,
                num_items_in_batch=items,
            ).loss
            for i in range(3)
        ]  # fmt: skip
        torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=0, atol=1e-10)
        parts[2].backward()  # all zero, and no error


def test_what_is_sampled_and_what_is_trained_have_equal_probabilities():
    """GRPO's importance ratio: of tokens as generate() drew them, and as the loss scores them in train()."""
    model, tokenizer = vivid()
    model.config.scoring = "live"
    prompt = tokenizer([text[:24] for text in TEXTS[:3]], return_tensors="pt", padding=True)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": True, "output_logits": True}
    out = model.train().generate(**prompt, **options, return_dict_in_generate=True)
    width = prompt["input_ids"].shape[1]
    sampled = torch.stack(out.logits, 1).log_softmax(-1).gather(2, out.sequences[:, width:, None])[..., 0]
    add_fused_lm_head(model)
    labels = out.sequences.clone()
    labels[:, :width] = -100
    mask = torch.cat((prompt["attention_mask"], torch.ones(3, 12, dtype=torch.long)), 1)
    called = {"input_ids": out.sequences, "attention_mask": mask, "use_cache": False}
    trained = model(**called, labels=labels, fused_lm_head=True).log_probs[:, width - 1 :]
    assert trained.requires_grad
    assert float((trained - sampled).exp().sub(1).abs().max()) <= 1e-4
    model.config.scoring = "auto"  # the schedule's is another policy
    other = model(**called, labels=labels, fused_lm_head=True).log_probs[:, width - 1 :]
    assert float((other - sampled).exp().sub(1).abs().max()) > 1e-2


def test_grpo_raises_its_reward(tmp_path):
    """Rewarded for one letter: the share of it among what is sampled."""
    model, _ = make()
    model.config.scoring = "live"

    def share(completions, **_):
        return [text.count("t") / max(1, len(text)) for text in completions]

    settings = GRPOConfig(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=16, num_generations=8,
        max_completion_length=8, learning_rate=2e-2, beta=0.0, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=share, args=settings, processing_class=wrap_tokenizer(TOKENIZER, 64),
        train_dataset=Rows.from_dict({"prompt": [text[:11] for text in TEXTS]}),
    )  # fmt: skip
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.1


# --- the end of a text ---------------------------------------------------------------------------------------------


def test_a_fine_tune_learns_to_stop(tmp_path):
    """With the collator of docs/huggingface.md: an end of text is a label, and comes out again."""
    model, _ = make()
    tokenizer = wrap_tokenizer(TOKENIZER, 64)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    rows = Rows.from_dict(tokenizer([text + tokenizer.eos_token for text in ("the state", "a token remembers") * 8]))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    assert all(row[-1] == tokenizer.eos_token_id for row in collator([rows[0], rows[1]])["labels"])
    settings = arguments(TrainingArguments, tmp_path)
    settings.max_steps = 40
    Trainer(model=model, args=settings, train_dataset=rows, data_collator=collator).train()
    prompt = tokenizer(["the", "a token"], return_tensors="pt", padding=True)
    generated = model.eval().generate(**prompt, max_new_tokens=24, do_sample=False)
    assert tokenizer.batch_decode(generated, skip_special_tokens=True) == ["the state", "a token remembers"]
