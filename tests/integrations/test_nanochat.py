"""Import of published checkpoints, from files in their layout, held against their forward written down here."""

from pathlib import Path

import pytest
import torch
from support.nanochat import CONTEXT, DEPTH, GROUPS, HEADS, RECURRENT, SIZE, WIDTH, published, write
from torch import Tensor
from torch.nn import functional as F

from lrt import schedules, score
from lrt.data.tokenizer import Tokenizer
from lrt.integrations.nanochat import import_checkpoint
from lrt.model import checkpoint


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer.train(["some text to be cut into pieces"], 270).save(path)
    return path


def their_logits(w: dict[str, Tensor], tokens: list[int], vocab: int, pattern: str) -> Tensor:
    """(T, V): one row decoded token by token as their gpt.py computes it, memory and all; plain loops, no State."""
    w = {name: tensor.double() for name, tensor in w.items()}
    gated = "interleaved_lambdas" in w
    memory, past = torch.zeros(WIDTH, dtype=torch.float64), [([], []) for _ in range(DEPTH)]
    rows = []

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],))

    def turn(x: Tensor, t: int) -> Tensor:
        angle = t * 10000.0 ** (-torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE)
        a, b = x[..., : SIZE // 2], x[..., SIZE // 2 :]
        return torch.cat((a * angle.cos() + b * angle.sin(), -a * angle.sin() + b * angle.cos()), -1)

    for t, token in enumerate(tokens):
        x = x0 = norm(w["transformer.wte.weight"][token])
        for i in range(DEPTH):
            at = f"transformer.h.{i}.attn."
            x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0 if "resid_lambdas" in w else x
            x = x + w["interleaved_lambdas"][i] * memory if gated else x
            u = norm(x)
            q = (w[at + "c_q.weight"] @ u).view(HEADS, SIZE)
            k = (w[at + "c_k.weight"] @ u).view(GROUPS, SIZE)
            v = (w[at + "c_v.weight"] @ u).view(GROUPS, SIZE)
            if gated:
                gate = w[at + "triple_gate.weight"]
                local, fed, ve = (2 * torch.sigmoid(gate @ u[: gate.shape[1]])).view(3, GROUPS, 1)
                table = w[f"interleaved_init_value_embeds.{i}.weight"][token].view(GROUPS, SIZE)
                fed_v = (w[f"interleaved_projections.{i}.W_v.weight"] @ memory).view(GROUPS, SIZE)
                fed_k = (w[f"interleaved_key_projections.{i}.W_v.weight"] @ memory).view(GROUPS, SIZE)
                k, v = local * k + fed * fed_k, local * v + fed * fed_v + ve * table
            elif f"value_embeds.{i}.weight" in w:
                gate = w[at + "ve_gate.weight"]
                ve = (2 * torch.sigmoid(gate @ u[: gate.shape[1]])).view(GROUPS, 1)
                v = v + ve * w[f"value_embeds.{i}.weight"][token].view(GROUPS, SIZE)
            keys, values = past[i]
            keys.append(norm(turn(k, t)))
            values.append(v)
            slides = pattern[i % len(pattern)] == "S" and i < DEPTH - 1
            first = max(0, t - CONTEXT // 2) if slides else 0  # half a context before the token itself
            q = norm(turn(q, t))
            heads = []
            for h in range(HEADS):
                g = h * GROUPS // HEADS
                seen = range(first, t + 1)
                weights = torch.stack([q[h] @ keys[j][g] for j in seen]).div(SIZE**0.5).softmax(0)
                heads.append(sum(a * values[j][g] for a, j in zip(weights, seen, strict=True)))
            x = x + w[at + "c_proj.weight"] @ torch.cat(heads)
            mlp = f"transformer.h.{i}.mlp."
            x = x + w[mlp + "c_proj.weight"] @ F.relu(w[mlp + "c_fc.weight"] @ norm(x)).square()
        memory = norm(x)
        rows.append(15 * torch.tanh(w["lm_head.weight"][:vocab] @ memory / 15))
    return torch.stack(rows)


REFINED = {
    "use_multi_refine": True, "multi_refine_num_passes": 2, "multi_refine_detach": True,
    "multi_refine_loss_weights": [0.1, 0.3, 0.6], "window_pattern": "L",
}  # fmt: skip
CASES = [
    ("first", {}, WIDTH, (), "plain()"),
    ("embeddings", {"window_pattern": "SSSL"}, 32, (0, 2), "plain()"),
    ("embeddings", {"window_pattern": "L"}, WIDTH, (0, 1, 2), "plain()"),
    ("embeddings", {"window_pattern": "L"}, WIDTH, (), "plain()"),
    ("recurrent", RECURRENT, WIDTH, (), "interleaved(3)"),
    (
        "recurrent",
        {**REFINED, "ve_gate_channels": 5},
        5,
        (),
        repr(schedules.multi_refinement(2, (0.1, 0.3, 0.6), True)),
    ),
]


@pytest.mark.parametrize(("kind", "config", "channels", "layers", "schedule"), CASES)
def test_logits_are_theirs(tmp_path, tokenizer, kind, config, channels, layers, schedule):
    vocab = Tokenizer.load(tokenizer).vocab_size
    weights = published(kind, vocab, channels, layers)
    renamed = {f"_orig_mod.{name}": w for name, w in weights.items()}  # as torch.compile leaves it
    source = write(tmp_path / "theirs", renamed, vocab, **config)
    import_checkpoint(source, tmp_path / "ours", tokenizer)
    model, _ = checkpoint.load(tmp_path / "ours")
    assert checkpoint.about(tmp_path / "ours")["schedule"] == schedule
    tokens = torch.randint(0, vocab, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    expected = their_logits(weights, tokens[0].tolist(), vocab, config.get("window_pattern", "L"))
    nats = F.cross_entropy(expected[:-1], tokens[0, 1:], reduction="none")
    torch.testing.assert_close(score(model.double(), tokens)[0], nats, rtol=0, atol=1e-9)


def test_the_newest_of_a_folder_in_bfloat16(tmp_path, tokenizer):
    vocab = Tokenizer.load(tokenizer).vocab_size
    weights = {name: w.bfloat16() for name, w in published("recurrent", vocab).items()}
    write(tmp_path / "theirs", published("first", vocab), vocab, step=3)
    write(tmp_path / "theirs", weights, vocab, step=20, **RECURRENT)
    model = import_checkpoint(tmp_path / "theirs", tmp_path / "ours", tokenizer)
    assert model.embedding.weight.dtype == torch.float32
    assert model.config.memory.injection == "both"
    assert checkpoint.about(tmp_path / "ours")["imported"]["step"] == 20


class Harmful:
    def __reduce__(self):
        return (print, ("this ran",))


def test_refusals_name_the_file_and_the_fix(tmp_path, tokenizer, capsys):
    vocab = Tokenizer.load(tokenizer).vocab_size
    out = tmp_path / "ours"

    def refused(match: str, source: Path, tokens: Path = tokenizer) -> None:
        with pytest.raises(ValueError, match=match):
            import_checkpoint(source, out, tokens)
        assert not out.exists()

    (tmp_path / "empty").mkdir()
    refused("holds no model_", tmp_path / "empty")
    refused("there is no file", tmp_path / "model_000001.pt")
    good = published("recurrent", vocab)
    newer = write(tmp_path / "newer", {**good, "smear_gate.weight": torch.ones(1, 2)}, vocab, **RECURRENT)
    refused("not known here: smear_gate.weight", newer)
    less = {name: w for name, w in good.items() if "key_projections.1" not in name}
    refused(
        r"interleaved_key_projections\.1\.W_v\.weight is missing", write(tmp_path / "less", less, vocab, **RECURRENT)
    )
    later = write(tmp_path / "later", published("embeddings", vocab, 12, (0, 2)), vocab)
    refused(r"ve_gate\.weight reads 12 channels; known are 32, 48: .* computes otherwise", later)
    refused(
        "do not fit|does not fit",
        write(tmp_path / "wide", {**good, "lm_head.weight": torch.ones(320, 7)}, vocab, **RECURRENT),
    )
    refused("has 258 tokens, the model 300", write(tmp_path / "vocab", published("first", 300), 300))
    refused("is a pickle", write(tmp_path / "fine", good, vocab, **RECURRENT), Path("tokenizer.pkl"))
    (tmp_path / "fine" / "meta_000007.json").unlink()
    refused("meta_000007.json is missing", tmp_path / "fine")
    harmful = write(tmp_path / "harmful", {"x": Harmful()}, vocab)
    refused("cannot be read", harmful)
    cut = write(tmp_path / "cut", good, vocab, **RECURRENT) / "model_000007.pt"
    cut.write_bytes(cut.read_bytes()[:2000])
    refused("cannot be read", cut)
    assert "this ran" not in capsys.readouterr().out
