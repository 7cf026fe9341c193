"""transformers: every way to call or to generate gives the native model's numbers, and what cannot is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")
from support.prefill import PARALLEL
from support.runs import TINY
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    StaticCache,
    pipeline,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, Sampling, generate, refine, schedules, score
from lrt.cli.main import main
from lrt.data.tokenizer import Tokenizer
from lrt.eval.runs import Run
from lrt.integrations.hf import LRTConfig, LRTForCausalLM
from lrt.integrations.hf.cache import decode_digits, encode_digits
from lrt.integrations.hf.export import export, wrap_tokenizer
from lrt.model import checkpoint
from lrt.schedules.loss import StepLoss

V = 60
MEMORIES = {
    "both": MemoryConfig(injection="both"),
    "channels": MemoryConfig(injection="both", source=(0, 2), combine="channels", initial="embedding"),
    "layers per source": MemoryConfig(
        injection="both", projection="layerwise", source=(0, 0, 2), combine="channels", layers=((1, 2), (1, 2), (2,))
    ),
    "layerwise delay 2": MemoryConfig(injection="key_value", projection="layerwise", source=1, delay=2),
    "delays": MemoryConfig(projection="layerwise", source=(0, 0, 0, 2, 2), combine="channels", delay=(1, 2, 3, 1, 3)),
    "convolution": MemoryConfig(projection="layerwise", source=(0, 0, 0), combine="channels", delay=(1, 2, 3)),
    "token shift": MemoryConfig(injection="both", source=0),
    "none": MemoryConfig(injection="none"),
}


def make(memory: MemoryConfig = MEMORIES["channels"], prefill: str = "exact", seed: int = 0, **model) -> LRTForCausalLM:
    """A small random model in float64 whose memory matters."""
    torch.manual_seed(seed)
    fields = {"depth": 2, "width": 32, "heads": 2, "vocab_size": V, "context": 64, **model}
    config = ModelConfig(**fields, memory=memory)
    made = LRTForCausalLM(LRTConfig(config.to_dict(), "interleaved(2)", prefill, bos_token_id=0))
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made.double().eval()


def native(model: LRTForCausalLM, prompt: Tensor, count: int) -> Tensor:
    return torch.stack(list(generate(model.model, prompt, count, Sampling(temperature=0))), 1)


def prompts(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(1, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: LRTForCausalLM, tokens: Tensor) -> Tensor:
    """(B, T, V): the native model's live logits."""
    state = model.model.empty_state(*tokens.shape)
    rows = []
    with torch.no_grad():
        for t in range(tokens.shape[1]):
            hidden, state = model.model(tokens[:, t : t + 1], range(t, t + 1), state)
            rows.append(model.model.logits(hidden))
    return torch.cat(rows, 1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("window_pattern", ["L", "SL", "S"])
def test_a_plain_call_is_recurrent(name, window_pattern):
    model = make(MEMORIES[name], window_pattern=window_pattern, window=5, kv_heads=1, value_embeddings="alternate")
    tokens = prompts(3, 12)
    close(model(tokens).logits, logits_of(model, tokens))


@pytest.mark.parametrize("name", MEMORIES)
def test_greedy(name):
    model, prompt = make(MEMORIES[name]), prompts(2, 9)
    generated = model.generate(prompt, max_new_tokens=20, do_sample=False)
    assert torch.equal(generated[:, 9:], native(model, prompt, 20))


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}], ids=str)
def test_a_ragged_batch_of_eight_padded_on_the_left(options):
    model = make()
    lengths = [1, 2, 3, 5, 8, 9, 11, 12]
    batch, mask = torch.zeros(8, 12, dtype=torch.long), torch.zeros(8, 12, dtype=torch.long)
    for row, length in enumerate(lengths):
        batch[row, 12 - length :], mask[row, 12 - length :] = prompts(1, length, row)[0], 1
    generated = model.generate(batch, attention_mask=mask, max_new_tokens=16, do_sample=False, **options)
    for row, length in enumerate(lengths):
        assert torch.equal(generated[row, 12:], native(model, batch[row : row + 1, 12 - length :], 16)[0]), row


def ragged(sides: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(batch (4, 12), its mask, the rows alone), each row padded on one of `sides`: l left, r right, b both, n none."""
    batch, mask, rows = torch.full((4, 12), 17), torch.zeros(4, 12, dtype=torch.long), []
    for row, side in enumerate(sides):
        length, start = {"l": (5, 7), "r": (7, 0), "b": (4, 3), "n": (12, 0)}[side]
        rows.append(prompts(1, length, row))
        batch[row, start : start + length], mask[row, start : start + length] = rows[-1][0], 1
    return batch, mask, rows


@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
@pytest.mark.parametrize("sides", ["rrnr", "lrbn"])
def test_rows_padded_on_the_right_generate_what_each_does_alone(sides, options):
    model, (batch, mask, rows) = make(), ragged(sides)
    generated = model.generate(batch, attention_mask=mask, max_new_tokens=10, do_sample=False, **options)
    for row, alone in enumerate(rows):
        assert torch.equal(generated[row, 12:], native(model, alone, 10)[0]), row
        assert torch.equal(generated[row, 12 - alone.shape[1] : 12], alone[0]), row  # the prompt, moved to the right


def test_logits_of_generation_are_those_of_the_rows_alone():
    model, (batch, mask, rows) = make(), ragged("rlbr")
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 6, "do_sample": False}
    together = model.generate(batch, attention_mask=mask, **options)
    for row, alone in enumerate(rows):
        for a, b in zip(together.logits, model.generate(alone, **options).logits, strict=True):
            close(a[row], b[0])


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}], ids=str)
def test_beams_and_samples_of_rows_padded_on_the_right(options):
    model, (batch, mask, _) = make(), ragged("rrrr")
    left = torch.cat((batch[:, 7:], batch[:, :7]), 1)
    seeded = {"attention_mask": mask, "max_new_tokens": 6, **options}
    torch.manual_seed(0)
    right = model.generate(batch, **seeded)
    torch.manual_seed(0)
    assert torch.equal(right, model.generate(left, **{**seeded, "attention_mask": mask.flip(1)}))


def test_generate_goes_on_behind_a_cache_with_rows_padded_on_the_right():
    model, first = make(), prompts(2, 5)
    begun = model.generate(first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    name = "cache" if "cache" in begun else "past_key_values"
    turn, seen = prompts(2, 4, 9), torch.ones(2, 12, dtype=torch.long)
    seen[1, 10:] = 0
    options = {"attention_mask": seen, "max_new_tokens": 5, "do_sample": False, name: begun[name]}
    generated = model.generate(torch.cat((begun.sequences, turn), 1), **options)
    for row, length in ((0, 4), (1, 2)):
        alone = torch.cat((begun.sequences[row : row + 1], turn[row : row + 1, :length]), 1)
        assert torch.equal(generated[row, 12:], native(model, alone, 5)[0]), row


def test_padding_above_the_vocabulary_is_never_computed():
    model, (batch, mask, rows) = make(), ragged("lrbn")
    model.config.pad_token_id = model.generation_config.pad_token_id = V
    padded = batch.masked_fill(mask == 0, V)
    for trained in (False, True):
        model.train(trained)
        for given in (mask, None):  # without a mask the padding is one
            out = model(padded, attention_mask=given, labels=padded)
            close(out.loss, model(batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100)).loss)
            close(out.logits, model(batch, attention_mask=mask).logits)
    for given in ({"attention_mask": mask}, {}):
        generated = model.eval().generate(padded, max_new_tokens=6, do_sample=False, **given)
        for row, alone in enumerate(rows):
            assert torch.equal(generated[row, 12:], native(model, alone, 6)[0])
    assert model.resize_token_embeddings(V + 1) is model.get_input_embeddings()
    with refused("token 61 is not in the vocabulary"):
        model(batch.masked_fill(mask == 0, V + 1))


def test_rows_that_have_ended_are_filled_with_padding():
    model, prompt = make(), prompts(3, 6)
    model.config.pad_token_id = V
    expected = native(model, prompt, 12)
    end = int(expected[0, 4])
    generated = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=V)[:, 6:]
    for row in range(3):
        ends = (expected[row] == end).nonzero()
        length = int(ends[0]) + 1 if len(ends) else 12
        assert torch.equal(generated[row, :length], expected[row, :length])
        assert bool((generated[row, length:] == V).all())
    assert bool((generated == V).any())


SCHEDULES = ["interleaved(2)", "settled(0, 1, 1)", "settled(1, 1, 1)", "multi_refinement(2)", "plain()"]


@pytest.mark.parametrize("schedule", [*SCHEDULES, "mixture([(0.5, plain()), (0.5, interleaved(3))])"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_for_others_losses_are_bit_equal_in_every_state_of_a_model(schedule, dtype):
    """What TRL compares: a policy in train() with gradients, its reference in eval() without."""
    model, (batch, mask, _) = make().to(dtype), ragged("rrnb")
    model.config.schedule = schedule
    hidden = []
    for trained in (True, False):
        for graded in (True, False):
            model.train(trained)
            with torch.set_grad_enabled(graded):
                out = model.base_model(batch, attention_mask=mask, use_cache=False)
            hidden.append(out.last_hidden_state)
            assert out.last_hidden_state.requires_grad == graded
    assert all(torch.equal(h, hidden[0]) for h in hidden)
    if "mixture" not in schedule:
        assert torch.equal(model.train()(batch, attention_mask=mask).last_hidden_state, hidden[0])


def test_a_mixture_draws_by_the_rows():
    model = make()
    model.config.schedule = "mixture([(0.5, plain()), (0.5, interleaved(3))])"
    torch.manual_seed(0)
    batches = [prompts(2, 9, seed) for seed in range(12)]
    outs = [model.base_model(rows).last_hidden_state for rows in batches]
    plain = [refine(model.model, rows, schedules.plain()).hidden for rows in batches]
    drawn = [torch.equal(a, b) for a, b in zip(outs, plain, strict=True)]
    assert 0 < sum(drawn) < 12
    assert all(torch.equal(model.base_model(r).last_hidden_state, h) for r, h in zip(batches, outs, strict=True))


def test_scoring_is_a_setting():
    model, tokens = make(), prompts(2, 9)
    live, trained = logits_of(model, tokens), model.train()(tokens).logits
    model.eval()
    assert not torch.allclose(live, trained)
    for scoring, own, base in (("auto", live, trained), ("schedule", trained, trained), ("live", live, live)):
        model.config.scoring = scoring
        close(model(tokens).logits, own)
        close(model.base_model(tokens).logits, base)
        generated = model.generate(tokens, max_new_tokens=6, do_sample=False)
        assert torch.equal(generated[:, 9:], native(model, tokens, 6))
    close(model(tokens, scoring="schedule").logits, trained)
    model.config.scoring = "schedule"
    assert torch.equal(model(tokens, labels=tokens).loss, model.train()(tokens, labels=tokens).loss)
    assert LRTConfig(scoring="live").scoring == "live"
    with refused("unknown scoring 'often'; choose one of auto, schedule, live"):
        LRTConfig(scoring="often")
    with refused("unknown scoring 'often'"):
        model(tokens, scoring="often")


def test_the_base_model_is_the_model_in_all_else():
    model = make()
    assert model.base_model.config is model.config
    assert model.get_decoder() is model
    assert not model.supports_tp_plan


def test_padding_on_either_side_touches_nothing():
    model, tokens = make(), prompts(1, 7)
    expected = logits_of(model, tokens)[0]
    for left, right in ((3, 0), (0, 3), (2, 4)):
        for filler in (0, 17):
            padded = torch.full((1, left + 7 + right), filler)
            padded[:, left : left + 7] = tokens
            mask = torch.zeros_like(padded)
            mask[:, left : left + 7] = 1
            close(model(padded, attention_mask=mask).logits[0, left : left + 7], expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_beam_search_reorders_the_memory_too(rows):
    model, prompt = make(), prompts(rows, 6)
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 12, "do_sample": False}
    cached = model.generate(prompt, **options)
    anew = model.generate(prompt, use_cache=False, **options)  # every step recomputes all from the tokens
    assert torch.equal(cached, anew)
    assert len(set(map(tuple, cached.tolist()))) > 1


def test_sampling_and_several_sequences():
    model, prompt = make(), prompts(2, 6)
    options = {"do_sample": True, "temperature": 0.9, "top_k": 20, "num_return_sequences": 3, "max_new_tokens": 10}
    torch.manual_seed(3)
    cached = model.generate(prompt, **options)
    torch.manual_seed(3)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))


@pytest.mark.parametrize("sample", [False, True])
def test_assisted_decoding_with_a_smaller_lrt(sample):
    model, draft, prompt = make(), make(MEMORIES["both"], seed=5, depth=1, width=16), prompts(1, 7)
    if sample:
        torch.manual_seed(0)
        for lrt in (model, draft):  # else transformers takes every 0 that is sampled for padding
            lrt.generation_config.eos_token_id = lrt.generation_config.pad_token_id = 0
        generated = model.generate(prompt, max_new_tokens=12, do_sample=True, assistant_model=draft)
        assert generated.shape[1] == 19 or generated[0, -1] == 0
        return
    # A draft that shares the model's taste, so that some of its tokens are taken and some are not.
    draft.model.head.weight.data[:, :16] = model.model.head.weight.data[:, :16]
    generated = model.generate(prompt, max_new_tokens=24, do_sample=False, assistant_model=draft)
    assert torch.equal(generated[:, 7:], native(model, prompt, 24))


def test_prompt_lookup_crops_the_memory():
    model = make()
    prompt = prompts(1, 5).repeat(1, 3)
    generated = model.generate(prompt, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(generated[:, 15:], native(model, prompt, 20))


def test_a_cache_is_continued_cropped_reordered_and_selected():
    model, tokens = make(), prompts(4, 14)
    expected = logits_of(model, tokens)
    cache = DynamicCache(config=model.config)
    close(model(tokens[:, :5], cache=cache).logits, expected[:, :5])
    close(model(tokens[:, 5:9], cache=cache).logits, expected[:, 5:9])
    cache.crop(-3)
    close(model(tokens[:, 6:7], cache=cache).logits, expected[:, 6:7])
    order = torch.tensor([2, 0, 0, 3])
    cache.reorder_cache(order)
    swapped = torch.cat((tokens[order, :7], tokens[:, 7:]), 1)
    close(model(swapped[:, 7:10], cache=cache).logits, logits_of(model, swapped)[:, 7:10])
    cache.batch_select_indices(torch.tensor([1, 3]))
    close(model(swapped[[1, 3], 10:], cache=cache).logits, logits_of(model, swapped[[1, 3]])[:, 10:])
    lazily = DynamicCache()
    model(tokens[:, :4], past_key_values=lazily)
    close(model(tokens[:, 4:6], past_key_values=lazily).logits, expected[:, 4:6])


def test_generate_goes_on_from_the_cache_it_returned():
    model, prompt = make(), prompts(2, 5)
    first = model.generate(prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    more = torch.cat((first.sequences, prompts(2, 4, 9)), 1)
    cache = first["cache"] if "cache" in first else first["past_key_values"]
    name = "cache" if "cache" in first else "past_key_values"
    generated = model.generate(more, max_new_tokens=8, do_sample=False, **{name: cache})
    assert torch.equal(generated[:, 15:], native(model, more, 8))


def test_logits_to_keep_and_labels():
    model, tokens = make(), prompts(2, 8)
    expected = logits_of(model, tokens)
    close(model(tokens, logits_to_keep=2).logits, expected[:, -2:])
    labels = tokens.masked_fill(torch.arange(8) % 3 == 0, -100)
    loss = model(tokens, labels=labels).loss
    nats = score(model.model, tokens)[labels[:, 1:] != -100]
    close(loss, nats.mean())
    assert not loss.requires_grad


@pytest.fixture
def sweeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps, however short the prompt: as on a device where calls cost much and positions little."""
    monkeypatch.setattr("lrt.inference.prefill.fallback", lambda _: PARALLEL)


@pytest.mark.usefixtures("sweeping")
@pytest.mark.parametrize("prefill", ["converged", "fast", "one_sweep"])
def test_sweeps_give_every_position_within_their_tolerance(prefill):
    model, tokens = make(prefill=prefill), prompts(2, 40)
    for p in model.parameters():
        p.data.mul_(0.5)  # so that it contracts
    expected = logits_of(model, tokens)
    logits = model(tokens).logits
    if prefill == "one_sweep":
        sweep = schedules.strided(PARALLEL.plan("one_sweep").groups, 1)
        close(logits, model.model.logits(refine(model.model, tokens, sweep).hidden))
        assert (logits - expected).norm() > 0.1 * expected.norm()  # which is not yet the recurrence
        return
    error = float((logits - expected).norm() / expected.norm())
    low, high = {"converged": (1e-12, 1e-4), "fast": (1e-7, 1e-2)}[prefill]
    assert low < error < high  # swept, not exact; and near


@pytest.mark.usefixtures("sweeping")
def test_a_ragged_batch_is_swept_as_each_row_alone():
    model = make(prefill="converged")
    for p in model.parameters():
        p.data.mul_(0.5)
    batch, mask = prompts(3, 40), torch.ones(3, 40, dtype=torch.long)
    for row, pads in enumerate((0, 7, 30)):
        mask[row, :pads] = 0
    logits = model(batch, attention_mask=mask).logits
    for row, pads in enumerate((0, 7, 30)):
        expected = logits_of(model, batch[row : row + 1, pads:])[0]
        torch.testing.assert_close(logits[row, pads:], expected, rtol=0, atol=1e-3)


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule", ["interleaved(2)", "settled(0, 1, 1)", "multi_refinement(2, weights=(0.1, 0.3, 0.6))"]
)
def test_training_is_the_schedule(schedule):
    model, tokens = make().train(), prompts(3, 10)
    model.config.schedule = schedule
    out = model(tokens, labels=tokens)
    made = schedules.parse(schedule)
    targets = torch.cat((tokens[:, 1:], torch.full((3, 1), -1)), 1)
    expected = StepLoss.of(made, [targets])(model.model, tokens, targets, None)
    close(out.loss, expected)
    ours = torch.autograd.grad(out.loss, model.model.blocks[0].attention.key.weight, retain_graph=True)[0]
    close(ours, torch.autograd.grad(expected, model.model.blocks[0].attention.key.weight)[0])
    out.logits.sum().backward()  # for losses that others compute


def test_padding_and_packing_in_training():
    model, tokens = make().train(), prompts(2, 9)
    alone = [model(t.unsqueeze(0), labels=t.unsqueeze(0)).loss for t in (tokens[0], tokens[1, :6])]
    padded = torch.zeros(1, 12, dtype=torch.long)
    padded[0, 3:] = tokens[0]
    mask = torch.zeros_like(padded)
    mask[0, 3:] = 1
    close(model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100)).loss, alone[0])
    packed = torch.cat((tokens[0], tokens[1, :6])).unsqueeze(0)
    positions = torch.cat((torch.arange(9), torch.arange(6))).unsqueeze(0)
    close(model(packed, position_ids=positions).logits[:, 9:], model(tokens[1:, :6]).logits)
    assert not torch.allclose(model(packed).logits[:, 9:], model(tokens[1:, :6]).logits)


def test_adapters_around_any_projection_are_called():
    """What is fused for speed must not go past an adapter: every LoRA matrix gets a gradient."""
    peft = pytest.importorskip("peft")
    names = ["query", "key", "value", "out", "up", "down", "head", "gate"]
    adapted = peft.get_peft_model(make(value_embeddings="all").train(), peft.LoraConfig(r=2, target_modules=names))
    tokens = prompts(2, 9)
    adapted(tokens, labels=tokens).loss.backward()
    lora = {name: p for name, p in adapted.named_parameters() if "lora_B" in name}
    assert len(lora) == 2 * 8 + 1  # two gates in a block: injection and value embedding
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lora.values())
    with torch.no_grad():
        for p in lora.values():
            p.normal_(std=0.1)
    native_model = adapted.eval().get_base_model().model
    nats = torch.nn.functional.cross_entropy(adapted(tokens).logits[:, :-1].mT, tokens[:, 1:], reduction="none")
    close(score(native_model, tokens), nats)  # live scores decode on fused products


def test_trainers_count_of_items_makes_shares_of_a_batch():
    model, tokens = make().train(), prompts(4, 9)
    model.config.schedule = "settled(1, 1, 1)"
    labels = tokens.clone()
    labels[0, 3:] = -100
    labels[3] = -100
    counted = (labels[:, 1:] != -100).sum()
    whole = model(tokens, labels=labels).loss
    parts = [
        model(t, labels=n, num_items_in_batch=counted).loss
        for t, n in zip(tokens.split([1, 2, 1]), labels.split([1, 2, 1]), strict=True)
    ]
    close(sum(parts), whole)
    assert parts[0] < parts[1]
    assert parts[2] == 0
    sum(parts).backward()


def test_the_loss_of_padded_and_packed_rows_is_that_of_their_texts():
    model, tokens = make(), prompts(2, 9)
    texts = (tokens[0], tokens[1, :6])
    alone = [model(t.unsqueeze(0), labels=t.unsqueeze(0)).loss for t in texts]
    mean = (8 * alone[0] + 5 * alone[1]) / 13
    batch, mask = torch.full((2, 12), 17), torch.zeros(2, 12, dtype=torch.long)
    for row, text in enumerate(texts):
        batch[row, 12 - len(text) :], mask[row, 12 - len(text) :] = text, 1
    close(model(batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100)).loss, mean)
    close(model(batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100), use_cache=False).loss, mean)
    joined = torch.cat(texts).unsqueeze(0)
    positions = torch.cat((torch.arange(9), torch.arange(6))).unsqueeze(0)
    out = model(joined, position_ids=positions, labels=joined)
    close(out.loss, mean)
    close(out.logits[0, 9:], logits_of(model, tokens[1:, :6])[0])


def test_missing_weights_are_no_random_memory(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.blocks.0.attention.key.weight"]
    save_file(weights, file, {"format": "pt"})
    with refused(r"lacks model\.blocks\.0\.attention\.key\.weight"):
        LRTForCausalLM.from_pretrained(tmp_path)


# --- refusals ------------------------------------------------------------------------------------------------------


def refused(match: str):
    return pytest.raises(ValueError, match=match)


def test_what_does_not_work_is_refused():
    model, tokens = make(), prompts(2, 6)
    with refused("pass input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
    with refused("output_attentions is not supported"):
        model(tokens, output_attentions=True)
    with refused("output_hidden_states is not supported"):
        model(tokens, output_hidden_states=True)
    with refused("vocabulary of an LRT is fixed"):
        model.resize_token_embeddings(99)
    with refused("makes its own causal mask"):
        model(tokens, attention_mask=torch.ones(2, 1, 6, 6))
    with refused("makes its own causal mask"):
        model(tokens, attention_mask=torch.zeros(2, 6) - torch.inf)
    with refused("60 tokens and 20 new ones exceed the context of 64"):
        model.generate(prompts(1, 60), max_new_tokens=20)
    assert model.generate(prompts(1, 60), max_new_tokens=5, do_sample=False).shape == (1, 65)  # the last is never read
    with refused("position_ids do not count"):
        model(tokens, position_ids=torch.arange(6).flip(0).unsqueeze(0))
    with refused("leaves no token"):
        model(tokens, attention_mask=torch.zeros_like(tokens))
    with refused("exceed the context of 64"):
        model(prompts(1, 65))
    with refused("unknown prefill 'quick'"):
        LRTConfig(prefill="quick")
    with refused("cannot read the schedule"):
        LRTConfig(schedule="interleaved(")
    cache = DynamicCache(config=model.config)
    model(tokens, cache=cache)
    with refused("start from an empty cache"):
        mask = torch.ones(2, 7)
        mask[0, 0] = 0
        model(tokens[:, :1], attention_mask=mask, cache=cache)
    with refused("the cache holds 2 rows, the call has 1"):
        model(tokens[:1, :1], cache=cache)
    with refused("a cache holds no gradients"):
        model.train()(tokens, cache=cache)
    with refused("position_ids do not count"):
        model(tokens, position_ids=torch.arange(6).unsqueeze(0) + 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_type_holds_every_token(dtype):
    tokens = torch.tensor([[-1, 0, 1, 255, 256, 257, 50_303, 199_999, 2**31 - 5]])
    assert torch.equal(decode_digits(encode_digits(tokens, dtype)), tokens)


def test_caches_of_other_kinds_are_refused():
    model, tokens = make(), prompts(2, 6)
    other = DynamicCache()
    other.layers = [DynamicSlidingWindowLayer(4) for _ in range(2)]
    with refused("with one plain layer each"):
        model(tokens, cache=other)
    deeper = DynamicCache(config=make(depth=4).config)
    with refused("in this DynamicCache of 4 layers"):
        model(tokens, cache=deeper)
    for name in ("quantized", "offloaded"):
        with refused("choose one of None, dynamic, static"):
            model.generate(tokens, max_new_tokens=2, cache_implementation=name)
    with refused("not in a EncoderDecoderCache"):
        model(tokens, cache=EncoderDecoderCache(DynamicCache(), DynamicCache()))
    foreign = DynamicCache()
    for layer in range(2):
        foreign.update(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16), layer)
    with refused("filled by what keeps no memory"):
        model(tokens, cache=foreign)
    with refused("6 tokens exceed the 4 of this static cache"):
        model(tokens, cache=StaticCache(config=model.config, max_cache_len=4))
    static = StaticCache(config=model.config, max_cache_len=20)
    close(model(tokens, cache=static).logits, logits_of(model, tokens))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
        ({"dola_layers": "low"}, "dola_generation"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group_beam_search"),
    ],
)
def test_other_ways_to_generate_are_no_silent_greedy(options, name):
    model, tokens = make(), prompts(1, 6)
    with refused(f"{name} is not supported by an LRT; what works: greedy_search"):
        model.generate(tokens, max_new_tokens=2, **options)


# --- folders -------------------------------------------------------------------------------------------------------

TEXT = "The recurrent memory of a token is what the token before it knew. " * 20


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """An exported folder, and its checkpoint beside it in `checkpoint`."""
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = Tokenizer.train([TEXT], 300)
    torch.manual_seed(0)
    config = ModelConfig(
        depth=2, width=32, heads=2, vocab_size=tokenizer.vocab_size, context=64, memory=MEMORIES["both"]
    )
    model = LatentRecurrentTransformer(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    scores = {"live_bpb": 2.5, "parallel_bpb": 2.25, "gap": 0.25}
    about = {"schedule": "settled(1, 1, 1)", "tokens": 12_345, "scores": scores}
    checkpoint.save(folder / "checkpoint", model, tokenizer, about)
    export(folder / "checkpoint", folder / "out", prefill="exact")
    return folder / "out"


def test_an_exported_folder_is_the_checkpoint(exported):
    native_model, tokenizer = checkpoint.load(exported.parent / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(exported)  # registered: lrt.hf is imported
    assert isinstance(model, LRTForCausalLM)
    assert (model.config.schedule, model.config.prefill) == ("settled(1, 1, 1)", "exact")
    fast = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    ids = fast("The memory of", return_tensors="pt")
    assert ids["input_ids"][0].tolist() == [tokenizer.bos, *tokenizer.encode("The memory of")]
    generated = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = torch.stack(list(generate(native_model, ids["input_ids"], 12, Sampling(temperature=0))), 1)
    assert torch.equal(generated[:, ids["input_ids"].shape[1] :], expected)
    assert AutoModelForCausalLM.from_pretrained(exported, prefill="fast").config.prefill == "fast"


@pytest.mark.parametrize("name", ["convolution", "delays"])
def test_delays_of_each_source_survive_an_export(tmp_path, name):
    tokenizer = Tokenizer.train([TEXT], 300)
    wide = make(MEMORIES[name], vocab_size=tokenizer.vocab_size)
    checkpoint.save(tmp_path / "checkpoint", wide.model.float(), tokenizer, {"schedule": "plain()"})
    export(tmp_path / "checkpoint", tmp_path / "out", prefill="exact")
    model, (native_model, _) = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        checkpoint.load(tmp_path / "checkpoint"),
    )
    assert native_model.config.memory == model.config.model.memory == MEMORIES[name]
    prompt = prompts(2, 9)
    expected = torch.stack(list(generate(native_model, prompt, 12, Sampling(temperature=0))), 1)
    generated = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(generated[:, 9:], expected)
    reads = "; the embedding of the token 2 places before it; the"
    assert reads in (tmp_path / "out" / "README.md").read_text()


ROOMS = {"data", "inference", "integrations", "model", "schedules", "utils"}
"""What a folder may hold of: nothing that trains a model, scores it, serves it, or shares it among processes."""


def test_a_folder_carries_the_model_and_no_trainer(exported):
    modules = {path.stem for path in exported.glob("*.py")} - {"configuration_lrt", "modeling_lrt"}
    assert {name.split("_")[1] for name in modules} <= ROOMS
    assert {name for name in modules if name.startswith("lrt_data_")} == {"lrt_data_batch"}  # a target to ignore
    assert not [name for name in modules if "flops" in name]


ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lrt":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer(["The memory of", "A token"], return_tensors="pt", padding=True, padding_side="left")
print(model.train()(**ids, labels=ids["input_ids"]).loss.item())
print(model.eval().generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=None).tolist())
"""


@pytest.mark.slow
def test_the_folder_works_where_lrt_cannot_be_imported(exported, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", ALONE, str(exported)],
        capture_output=True, text=True, env={"HF_MODULES_CACHE": str(tmp_path), "PATH": "", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    ids = tokenizer(["The memory of", "A token"], return_tensors="pt", padding=True, padding_side="left")
    loss, tokens = ran.stdout.splitlines()[-2:]
    assert float(loss) == pytest.approx(float(model.train()(**ids, labels=ids["input_ids"]).loss), rel=1e-6)
    here = model.eval().generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert tokens == str(here.tolist())


def test_an_exported_tokenizer_pads_with_a_token_of_its_own_on_the_left(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert (
        model.config.pad_token_id
        == model.generation_config.pad_token_id
        == tokenizer.pad_token_id
        == len(tokenizer) - 1
    )
    assert model.resize_token_embeddings(len(tokenizer)).num_embeddings == model.config.vocab_size
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = [tokenizer(text + tokenizer.eos_token) for text in ("The memory of a token", "A")]
    batch = collator(rows)
    for labels, row in zip(batch["labels"], rows, strict=True):
        assert labels[labels != -100].tolist() == row["input_ids"]
        assert labels[-1] == tokenizer.eos_token_id
    alone = [model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["input_ids"]])).loss for row in rows]
    lengths = [len(row["input_ids"]) - 1 for row in rows]
    mean = sum(float(loss) * n for loss, n in zip(alone, lengths, strict=True)) / sum(lengths)
    assert float(model(**batch).loss) == pytest.approx(mean, rel=1e-5)


def test_a_tokenizer_that_has_padding_keeps_it():
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<s>": 2, "<pad>": 3}, unk_token="a"))
    inner.add_special_tokens(["<s>", "<pad>"])
    assert wrap_tokenizer(Tokenizer(inner), 8).pad_token_id == 3
    holes = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<s>": 1, "b": 3}, unk_token="a"))
    holes.add_special_tokens(["<s>"])
    with refused("which another token has"):
        wrap_tokenizer(Tokenizer(holes), 8)


def test_a_folder_whose_padding_is_bos_still_works(exported, tmp_path):
    """As folders were exported before."""
    old = shutil.copytree(exported, tmp_path / "old")
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    for name in ("config.json", "generation_config.json"):
        data = json.loads((old / name).read_text())
        data["pad_token_id"] = tokenizer.bos_token_id
        data.pop("scoring", None)
        (old / name).write_text(json.dumps(data))
    data = json.loads((old / "tokenizer_config.json").read_text())
    data |= {"pad_token": tokenizer.bos_token, "padding_side": "right"}
    (old / "tokenizer_config.json").write_text(json.dumps(data))
    model, before = (
        AutoModelForCausalLM.from_pretrained(old),
        AutoTokenizer.from_pretrained(old, trust_remote_code=True),
    )
    assert before.pad_token_id == before.bos_token_id
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    texts = ["The memory of", "A token"]
    right = model.generate(**before(texts, return_tensors="pt", padding=True), **options)
    new = AutoModelForCausalLM.from_pretrained(exported)
    left = new.generate(**tokenizer(texts, return_tensors="pt", padding=True), **options)
    assert torch.equal(right[:, -8:], left[:, -8:])


def test_save_pretrained_and_back(tmp_path):
    model, tokens = make(), prompts(2, 9)
    model.save_pretrained(tmp_path)
    again = LRTForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    close(again(tokens).logits, model(tokens).logits)


def test_the_card_says_how_it_was_scored(exported):
    text = (exported / "README.md").read_text()
    for words in (
        "settled(1, 1, 1)",
        "`exact` prefill",
        "2.5000",
        "2.2500",
        "+0.2500",
        "12,345",
        "trust_remote_code=True",
    ):
        assert words in text, words


def test_the_card_of_a_trained_run_says_its_tokens_and_what_was_scored(tmp_path):
    """What `lrt train` writes of itself, and what `lrt evaluate` measured of it."""
    text = "".join(f"the state of token {i} is what token {i + 1} remembers\n" for i in range(400))
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(text[i * 100 :])
    data = tmp_path / "corpus"
    main(["prepare", str(data), "--text", *(str(tmp_path / f"{i}.txt") for i in range(3)), "--vocab-size", "300"])
    run = tmp_path / "run"
    main(["train", "--data", str(data), "--out", str(run), "--device", "cpu", "d2", *TINY])
    main(["evaluate", str(run), "--data", str(data), "--split", "test", "--device", "cpu"])
    trained = checkpoint.about(run)
    for source in (run, run / "checkpoint"):
        export(source, tmp_path / "out")
        card = (tmp_path / "out" / "README.md").read_text()
        assert f"{trained['trained']['tokens']:,} tokens" in card
        assert "unknown number" not in card
        targets = trained["scores"]["targets"]
        row = next(line for line in card.splitlines() if f"corpus, val: {targets:,} tokens in windows of 32" in line)
        assert f"{trained['scores']['live_bpb']:.4f}" in row
        (test,) = [score for score in Run.read(run).scores if score.on.split == "test"]
        row = next(line for line in card.splitlines() if "corpus, test: " in line)
        assert f"| {test.values['live_bpb']:.4f} |" in row


def test_export_leaves_other_folders_alone(exported, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    shutil.copytree(exported.parent / "checkpoint", tmp_path / "ours")
    for taken in (tmp_path, tmp_path / "other", tmp_path / "ours"):
        before = sorted(taken.rglob("*"))
        with refused("no exported LRT"):
            export(exported.parent / "checkpoint", taken)
        assert sorted(taken.rglob("*")) == before
    export(exported.parent / "checkpoint", tmp_path / "plain")
    assert list((tmp_path / "plain").glob("*.py"))
    usual = (tmp_path / "notes.txt").stat().st_mode  # safetensors writes a file that only its owner can read
    assert {file.stat().st_mode for file in (tmp_path / "plain").iterdir()} == {usual}
    (tmp_path / "plain" / ".git").mkdir()
    (tmp_path / "plain" / ".git" / "HEAD").write_text("ref: refs/heads/main")
    export(exported.parent / "checkpoint", tmp_path / "plain", remote_code=False)  # an earlier export is replaced
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "import lrt.hf" in (tmp_path / "plain" / "README.md").read_text()
    assert (tmp_path / "plain" / ".git" / "HEAD").read_text() == "ref: refs/heads/main"


def test_pipeline(exported):
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    outputs = write(["The memory of", "A token knew what the"], batch_size=2, generation_config=config)
    for (one,), prompt in zip(outputs, ("The memory of", "A token knew what the"), strict=True):
        assert one["generated_text"].startswith(prompt)
        alone = write(prompt, generation_config=config)
        assert alone[0]["generated_text"] == one["generated_text"]


def test_a_loop_transformer_generates_as_its_own_model_does():
    """Each loop has a layer of the cache."""
    model, prompt = make(loops=2), prompts(2, 7)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False)[:, 7:], native(model, prompt, 6))


def test_latent_thoughts_are_not_read_by_transformers():
    model = make(MEMORIES["none"], thoughts=1)
    with pytest.raises(ValueError, match="decoded token by token only"):
        model.generate(prompts(1, 7), max_new_tokens=2, do_sample=False)
