"""Decoding with a retrofitted pathway, awake, over decoding with the same decoder without it.

    OMP_NUM_THREADS=2 python benchmarks/retrofit_decode.py

A random Llama of 12 layers and width 768 (and GPT-2 of the same size), `generate` of 48 tokens behind one token, so
that there is nothing to prefill; rounds alternate. Prints tokens per second of both and the ratio, with half the
distance between its quartiles.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import tyro
from transformers import AutoConfig, AutoModelForCausalLM

from lrt.integrations.retrofit import retrofit
from lrt.utils.provenance import hardware_line
from lrt.utils.timing import Work, alternate

SIZE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
}


def pair(architecture: str, sources: tuple[int, ...]) -> dict[str, Any]:
    """The decoder, and the same with a lively pathway."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SIZE)).eval()
    awake = retrofit(copy.deepcopy(base), source=sources)
    with torch.no_grad():
        for parameter in awake.latent.parameters():
            parameter.normal_(std=0.02)
    return {"plain": base, "retrofitted": awake}


def decode(model: Any, batch: int, tokens: int) -> Work:
    """Generate so many tokens in so many rows."""
    prompt = torch.ones(batch, 1, dtype=torch.long)
    options = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0, "do_sample": False}
    return lambda: model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, **options)


def main(rounds: int = 7, tokens: int = 48, architectures: tuple[str, ...] = ("llama", "gpt2")) -> None:
    """Print a line per decoder, batch and pathway."""
    print(f"{hardware_line()}, {torch.get_num_threads()} threads")
    for architecture in architectures:
        for sources in ((12,), (0, 12)):
            models = pair(architecture, sources)
            for batch in (1, 8):
                works = {name: decode(model, batch, tokens) for name, model in models.items()}
                times = alternate(works, rounds, warmup=1, title=f"{architecture}, batch {batch}")
                ratio, spread = times["plain"].ratio(times["retrofitted"])
                speeds = {name: batch * tokens / timing.median for name, timing in times.items()}
                print(
                    f"{architecture}, source {sources}, batch {batch}: {speeds['retrofitted']:.1f} of "
                    f"{speeds['plain']:.1f} tokens a second, {ratio:.3f} +- {spread:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    tyro.cli(main)
