"""Retrofitted decoders: neutral bit for bit; once awake equal to an oracle without a cache, however they are called."""

import copy

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from support.retrofits import DEPTH, Double, Oracle, awaken, plain, tokens
from transformers import DynamicCache

from lrt.integrations.retrofit import modeling, retrofit
from lrt.integrations.retrofit.architectures import ARCHITECTURES
from lrt.integrations.retrofit.modeling import CACHE

T = 9
PATHWAYS = {
    "last": {},
    "two channels": {"source": (0, DEPTH)},
    "layers": {"source": (1, 2), "layers": (2, 3)},
    "layerwise": {"source": (2, 0), "layers": (1, 3), "projection": "layerwise"},
    "token shift": {"source": 0},
}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Passes go on until all is exact."""
    monkeypatch.setattr(modeling, "TOLERANCES", {"converged": 0.0, "fast": 0.0})


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> str:
    return request.param


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def pair(architecture: str = "llama", **pathway):
    """(the decoder, the same with a neutral pathway)."""
    original = plain(architecture)
    return original, retrofit(copy.deepcopy(original), **{"source": (0, DEPTH), **pathway})


def awake(architecture: str = "llama", **pathway):
    """(a decoder with a lively pathway, its oracle)."""
    original, model = pair(architecture, **pathway)
    awaken(model)
    model.generation_config.eos_token_id = None
    return model, Oracle(original, model)


def rows_of(oracle: Oracle, ids: Tensor) -> Tensor:
    return torch.stack([oracle.logits(row) for row in ids])


def test_a_new_pathway_changes_no_bit(architecture):
    original, model = pair(architecture)
    ids = tokens(2, T)
    assert torch.equal(model(ids).logits, original(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ours, theirs = model.generate(ids, **options), original.generate(ids, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
    model.train(), original.train()
    for one in (model, original):
        one(ids, labels=ids).loss.backward()
    assert torch.equal(model(ids, labels=ids).loss, original(ids, labels=ids).loss)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(torch.equal(gradients[name], p.grad) for name, p in original.named_parameters())
    assert gradients["latent.gamma"].abs().min() > 0  # and it learns
    assert gradients["latent.project.1.weight"].abs().max() > 0


def test_awake_it_is_the_oracle_however_it_is_called(architecture):
    model, oracle = awake(architecture)
    ids = tokens(2, T)
    with Double():
        wanted = rows_of(oracle, ids)
        close(model(ids).logits, wanted)
        model.config.latent_memory["prefill"] = "exact"
        close(model(ids).logits, wanted)
        model.config.latent_memory["prefill"] = "converged"
        cache, parts = DynamicCache(config=model.config), []
        for start, stop in ((0, 4), (4, 7), (7, 8), (8, 9)):
            parts.append(model(ids[:, start:stop], **{CACHE: cache}).logits)
        close(torch.cat(parts, 1), wanted)
        # Every pass of a schedule that ends exactly is the recurrence, too.
        model.train()
        for schedule in ("strided(3, 3)", f"settled(0, 1, {T})", "sequential()"):
            model.config.latent_memory["schedule"] = schedule
            close(model(ids).logits, wanted)


def test_padded_on_the_left_rows_are_what_each_is_alone(architecture):
    model, oracle = awake(architecture)
    alone = [tokens(1, length, length)[0] for length in (4, 6, T)]
    ids, mask = torch.full((3, T), 7), torch.zeros(3, T, dtype=torch.long)
    for row, text in enumerate(alone):
        ids[row, T - len(text) :], mask[row, T - len(text) :] = text, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if model.config._attn_implementation == "eager":
        # Its softmax is in float32, where the least number of float64, which hides a row's padding from itself, is
        # -inf, and a row of nothing else NaN. So these run as they are used.
        model, atol = model.float(), 1e-4
    else:
        atol = 1e-10
    with Double() if atol < 1e-8 else torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        for row, text in enumerate(alone):
            wanted = oracle.logits(text)
            torch.testing.assert_close(logits[row, T - len(text) :].double(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("name", PATHWAYS)
def test_every_pathway_is_the_oracle(name):
    model, oracle = awake(**PATHWAYS[name])
    ids = tokens(2, T)
    close(model(ids).logits, rows_of(oracle, ids))
    generated = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated[:, T:], torch.stack([oracle.greedy(row, 6) for row in ids]))


GENERATION = {
    "greedy": {},
    "chunked prefill": {"prefill_chunk_size": 4},
    "static": {"cache_implementation": "static"},
    "beam search": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": None},
}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mistral"])
@pytest.mark.parametrize("name", GENERATION)
def test_generate_gives_what_it_gives_without_a_cache(architecture, name):
    """Without a cache every step reads the whole text anew, which the tests above hold against the oracle."""
    model, _ = awake(architecture)
    options = dict(GENERATION[name])
    if "assistant_model" in options:
        options["assistant_model"] = awake(architecture, source=1)[0]
    rows = 1 if name in ("prompt lookup", "assisted") else 2
    ids = tokens(rows, 4).repeat(1, 3)  # repeats, so that lookups find something
    asked = {"max_new_tokens": 10, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ours = model.generate(ids, **asked, **options)
    theirs = model.generate(ids, **asked, num_beams=options.get("num_beams", 1), use_cache=False)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 if architecture == "gemma2" else 1e-10)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str)
def test_a_ragged_batch_generates_what_each_row_does_alone(options):
    model, oracle = awake()
    ids, mask = torch.zeros(3, T, dtype=torch.long), torch.zeros(3, T, dtype=torch.long)
    for row, length in enumerate((2, 5, T)):
        ids[row, T - length :], mask[row, T - length :] = tokens(1, length, length)[0], 1
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
    for row, length in enumerate((2, 5, T)):
        assert torch.equal(generated[row, T:], oracle.greedy(ids[row, T - length :], 6)), row


def test_packed_texts_do_not_read_each_other():
    model, oracle = awake()
    first, second = tokens(1, 4)[0], tokens(1, 5, 2)[0]
    positions = torch.cat((torch.arange(4), torch.arange(5)))[None]
    wanted = torch.cat((oracle.logits(first), oracle.logits(second)))
    ids = torch.cat((first, second))[None]
    close(model(ids, position_ids=positions, use_cache=False).logits[0], wanted)
    model.train()
    for schedule in ("strided(3, 2)", "settled(0, 1, 9)"):
        model.config.latent_memory["schedule"] = schedule
        close(model(ids, position_ids=positions).logits[0], wanted)


def test_inputs_may_be_embeddings():
    model, oracle = awake()
    ids = tokens(2, T)
    embedded = model.get_input_embeddings()(ids)
    close(model(inputs_embeds=embedded).logits, rows_of(oracle, ids))


def test_a_copy_has_parameters_of_its_own():
    model, _ = awake()
    ids = tokens(2, T)
    before, other = model(ids).logits, copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(other(ids).logits, before)


def test_detached_it_is_the_original():
    original, model = pair()
    awaken(model)
    ids, wanted = tokens(2, T), original(tokens(2, T)).logits
    assert not torch.equal(model(ids).logits, wanted)
    detached = model.detach()
    assert type(detached) is type(original)
    assert detached.config.to_dict() == {**original.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    assert torch.equal(detached(ids).logits, wanted)
    assert detached.state_dict().keys() == original.state_dict().keys()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in detached.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in original.modules()]


def gradients(model, ids: Tensor, backwards: int = 1) -> dict[str, Tensor]:
    """Of one loss, or of the sum of two of different texts, which one backward goes through."""
    model.zero_grad()
    losses = [model(ids.roll(n, 1), labels=ids.roll(n, 1)).loss for n in range(backwards)]
    torch.stack(losses).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backwards", [1, 2])
@pytest.mark.parametrize("schedule", ["settled(0, 1, 1)", "multi_refinement(2, (0, 0, 1), True)"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_gradient_checkpointing_changes_no_gradient(architecture, schedule, backwards, reentrant):
    model, _ = awake(architecture, schedule=schedule, source=DEPTH if reentrant else (0, DEPTH))
    ids = tokens(2, T)
    wanted = gradients(model.train(), ids, backwards)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for name, gradient in gradients(model, ids, backwards).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-12, msg=name)


def test_reentrant_checkpointing_is_refused_where_gradients_go_through_the_memory():
    model, _ = awake(schedule="multi_refinement(2)")
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        model(tokens(2, T))


@pytest.mark.parametrize("schedule", ["interleaved(2)", "multi_refinement(2)", "strided(3, 2)", "plain()"])
def test_losses_and_gradients_are_finite_differences(schedule):
    """Through memory, keys and values of every pass."""
    model, _ = awake(schedule=schedule)
    model.train()
    ids = tokens(1, 6)
    with Double():
        got = gradients(model, ids)
        for name, p in model.named_parameters():
            if "latent" not in name and "k_proj" not in name and "embed" not in name:
                continue
            at = int(got[name].abs().argmax())
            with torch.no_grad():
                flat, losses = p.view(-1), []
                for step in (1e-6, -2e-6):
                    flat[at] += step
                    losses.append(model(ids, labels=ids).loss)
                flat[at] += 1e-6
            slope = float(losses[0] - losses[1]) / 2e-6
            assert slope == pytest.approx(float(got[name].view(-1)[at]), rel=1e-4, abs=1e-7), name


def test_the_stack_alone_is_refused():
    model, _ = awake()
    with pytest.raises(ValueError, match="by itself"):
        model.model(tokens(1, 3))


def test_a_cache_of_another_model_is_refused():
    original, model = pair()
    cache = DynamicCache(config=original.config)
    original(tokens(1, 3), **{CACHE: cache})
    with pytest.raises(ValueError, match="keeps no memory"):
        model(tokens(1, 3), **{CACHE: cache})


@pytest.mark.parametrize(
    ("pathway", "message"),
    [
        ({"source": 4}, "layers from 0"),
        ({"source": (1, 1)}, "each once"),
        ({"source": ()}, "layers from 0"),
        ({"layers": (0,)}, "blocks from 1 to 3"),
        ({"layers": (2, 2)}, "each once"),
        ({"projection": "both"}, "shared, layerwise"),
        ({"prefill": "slow"}, "exact, converged, fast"),
        ({"schedule": "settle(1)"}, "schedule"),
    ],
)
def test_wrong_pathways_are_named(pathway, message):
    with pytest.raises(ValueError, match=message):
        retrofit(plain("llama"), **pathway)


def count_passes(model, ids: Tensor) -> list[int]:
    """How often each layer ran in a call."""
    counts = [0] * DEPTH
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, n=number: counts.__setitem__(n, counts[n] + 1))
    model(ids, use_cache=False)
    return counts


def test_passes_end_when_the_memory_has_settled(monkeypatch):
    monkeypatch.setattr(modeling, "TOLERANCES", {"converged": 1e-5, "fast": 1e-3})
    original, model = pair(source=2)
    awaken(model, std=0.01)
    ids = tokens(2, 24)
    wanted = rows_of(Oracle(original, model), ids)
    assert float((original(ids).logits - wanted).abs().max()) > 1e-2  # the memory matters
    errors, passes = [], []
    for mode in ("converged", "fast"):
        other = copy.deepcopy(model)
        other.config.latent_memory["prefill"] = mode
        errors.append(float((other(ids).logits - wanted).abs().max()))
        passes.append(count_passes(other, ids))
    assert errors[0] < 1e-3
    assert passes[1][0] < passes[0][0] < 12  # and not 24
    assert all(counts[2] == 1 and counts[0] == counts[1] for counts in passes)  # above the source once, at the end


@pytest.mark.parametrize("mode", ["converged", "fast"])
def test_a_text_that_does_not_settle_is_read_token_by_token(monkeypatch, mode):
    monkeypatch.setattr(modeling, "TOLERANCES", {"converged": 1e-5, "fast": 1e-3})
    monkeypatch.setattr(modeling, "MOST_PASSES", 2)
    model, oracle = awake(prefill=mode)
    ids = tokens(2, T)
    close(model(ids).logits, rows_of(oracle, ids))
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, a:b], **{CACHE: cache}).logits for a, b in ((0, 4), (4, T))]
    close(torch.cat(parts, 1), rows_of(oracle, ids))


def test_strided_passes_say_what_they_do_not_go_with():
    model, _ = awake(schedule="strided(3, 2)")
    ids = tokens(2, T)
    with pytest.raises(ValueError, match="input_ids are needed"):
        model.train()(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="a loss of one's own"):
        model.base_model(ids)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing computes whole texts"):
        model(ids)


def test_a_cache_of_other_rows_is_refused_and_one_in_training():
    model, _ = awake()
    cache = DynamicCache(config=model.config)
    model(tokens(2, 3), **{CACHE: cache})
    with pytest.raises(ValueError, match="holds 2 rows, the call has 1"):
        model(tokens(1, 3), **{CACHE: cache})
    with pytest.raises(ValueError, match="a cache holds no gradients"):
        model.train()(tokens(2, 3), **{CACHE: cache})
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model.eval()(tokens(2, 3), attention_mask=torch.ones(2, 1, 3, 3))
