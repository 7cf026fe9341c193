"""transformers' Trainer, PEFT and TRL run on an LRT as on any other causal model; what they train is measured live."""

import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("trl")
from datasets import Dataset as Rows
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, score
from lrt.data.tokenizer import Tokenizer
from lrt.integrations.hf import LRTForCausalLM
from lrt.integrations.hf.export import prepend_bos, wrap_model

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
