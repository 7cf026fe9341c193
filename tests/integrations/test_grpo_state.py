"""GRPO where the answer needs a carried state: the parity of bits. Recurrence learns it live, the same without cannot.

Both models first see rows of bits, a word, and an answer. Behind `known` the answer is the parity; behind `asked` it is
drawn at random. One block cannot count, so only the recurrent model comes to know the parity. Then GRPO rewards the
parity behind `asked`: a reward of 0.5 is chance.
"""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")
from datasets import Dataset as Rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from lrt import MemoryConfig, ModelConfig
from lrt.integrations.hf import LRTConfig, LRTForCausalLM

WORDS = ["<s>", "0", "1", "known", "asked", "even", "odd"]
ZERO, KNOWN, ASKED, EVEN = (WORDS.index(word) for word in ("0", "known", "asked", "even"))
BITS, STEPS = 8, 800


def tokenizer() -> PreTrainedTokenizerFast:
    """A word, a token."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="<s>", pad_token="<s>", padding_side="left"
    )


def draw(
    rows: int, bits: int, generator: torch.Generator, word: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens (rows, bits + 3), parities (rows,)): a start, bits, a word, an answer."""
    values = torch.randint(2, (rows, bits), generator=generator)
    parity = values.sum(1) % 2
    words = torch.randint(KNOWN, ASKED + 1, (rows,), generator=generator) if word is None else torch.full((rows,), word)
    chance = torch.randint(2, (rows,), generator=generator)
    answers = EVEN + torch.where(words == KNOWN, parity, chance)
    return torch.cat((torch.zeros(rows, 1).long(), ZERO + values, words[:, None], answers[:, None]), 1), parity


def make(recurrent: bool) -> LRTForCausalLM:
    """One block of 32, with or without recurrence, that has seen the rows: short ones first."""
    torch.manual_seed(0)
    memory = MemoryConfig(injection="both", source=(0, 1), combine="channels", initial="embedding")
    config = ModelConfig(
        depth=1, width=32, heads=2, vocab_size=len(WORDS), context=32,
        memory=memory if recurrent else MemoryConfig(injection="none"),
    )  # fmt: skip
    schedule = "sequential()" if recurrent else "plain()"
    model = LRTForCausalLM(LRTConfig(config.to_dict(), schedule, prefill="exact")).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        longest = min(BITS, 1 + step * 2 * BITS // STEPS)
        bits = int(torch.randint(1, longest + 1, (1,), generator=generator))
        ids, _ = draw(64, bits, generator)
        labels = ids.clone()
        labels[:, :-1] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimiser.step()
        falling.step()
        optimiser.zero_grad()
    model.config.scoring = "live"
    return model


@torch.no_grad()
def accuracy(model: LRTForCausalLM, word: int) -> float:
    """How often the likeliest answer behind the word is the parity."""
    ids, parity = draw(512, BITS, torch.Generator().manual_seed(2), word)
    return float((model.eval()(input_ids=ids[:, :-1]).logits[:, -1].argmax(-1) == EVEN + parity).float().mean())


def train_for_reward(model: LRTForCausalLM, folder) -> list[float]:
    """The mean reward of each ten steps, of what is sampled live."""
    prompts, parity = draw(256, BITS, torch.Generator().manual_seed(3), ASKED)
    rows = Rows.from_dict(
        {
            "prompt": [" ".join(WORDS[token] for token in row[:-1]) for row in prompts.tolist()],
            "wanted": [WORDS[EVEN + p] for p in parity.tolist()],
        }
    )

    def is_parity(completions, wanted, **_):
        return [float(text.strip() == word) for text, word in zip(completions, wanted, strict=True)]

    config = GRPOConfig(
        output_dir=str(folder), save_strategy="no", report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, max_steps=60, per_device_train_batch_size=64, num_generations=8,
        max_completion_length=1, beta=0.0, learning_rate=3e-3, temperature=1.0, logging_steps=10,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=is_parity, args=config, processing_class=tokenizer(), train_dataset=rows
    )
    trainer.train()
    return [line["reward"] for line in trainer.state.log_history if "reward" in line]


@pytest.mark.slow
def test_reward_rises_where_there_is_a_state_and_not_without(tmp_path):
    recurrent, control = make(True), make(False)
    assert accuracy(recurrent, KNOWN) > 0.95
    assert accuracy(control, KNOWN) < 0.6
    rewards, others = train_for_reward(recurrent, tmp_path / "lrt"), train_for_reward(control, tmp_path / "control")
    assert rewards[0] < 0.65
    assert rewards[-1] > 0.75
    assert accuracy(recurrent, ASKED) > 0.8
    assert max(others) < 0.65  # prompts are 256: it may learn a few by heart
    assert accuracy(control, ASKED) < 0.6
