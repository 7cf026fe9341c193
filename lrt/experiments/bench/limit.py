"""How near a decoded token comes to what its weights cost: `lrt bench inference --only limit`.

A token of one row reads every matrix once. Beside its time stand the bare products of the same matrices in the same
torch, the time in which the memory can be read that holds them, a Llama of the same shape in CTranslate2 where that is
installed, and transformers' `generate`. Times are minima of alternated turns: what else the machine does only adds.

CTranslate2 stands for the fast engines as it has wheels for CPUs. It cannot express our Transformer (squared ReLU, x_0
in every block), and so runs a Llama with as many parameters.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lrt.experiments.bench.baselines import Generate, transformers_generate
from lrt.experiments.bench.decode import STEPS, decode_greedily, fastest_decoder
from lrt.experiments.bench.rows import Row
from lrt.model.config import ModelConfig
from lrt.model.size import count_parameters
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.utils.timing import Work, alternate

BATCHES = (1, 8, 32)
"""Rows decoded at once."""
TARGETS = {96: 0.5, 384: 0.8, 768: 0.85}
"""Width -> the share of a token's time that the bare products are to have at least, at batch 1."""
STREAM = 2**28
"""Bytes copied to measure the bandwidth: more than caches hold."""
ENGINE = "ctranslate2"


def limit_rows(
    models: Sequence[LatentRecurrentTransformer],
    rounds: int,
    candidates: Sequence[str] = ("fused", "packed", "compiled"),
    progress: bool = True,
) -> list[Row]:
    """A row per model and batch: the bare products' time over a token's, and the milliseconds of each way."""
    rows = []
    for model in models:
        bandwidth = measure_bandwidth(model.embedding.weight.device, rounds)
        others = {"generate": transformers_generate(model.config, model.embedding.weight.device)}
        with tempfile.TemporaryDirectory() as folder:
            if has_engine(model):
                others[ENGINE] = ctranslate2_generate(model.config, Path(folder))
            rows += [batch_row(model, batch, others, bandwidth, rounds, candidates, progress) for batch in BATCHES]
    return rows


def batch_row(
    model: LatentRecurrentTransformer,
    batch: int,
    others: dict[str, Generate],
    bandwidth: float,
    rounds: int,
    candidates: Sequence[str],
    progress: bool,
) -> Row:
    """One model at one number of rows. `others`: what else decodes; `bandwidth`: bytes a second."""
    device, matrices = model.embedding.weight.device, weight_matrices(model)
    step = fastest_decoder(model, batch, candidates)
    prompt = torch.zeros(batch, 1, dtype=torch.long, device=device)
    works: dict[str, Work] = {"token": decode_greedily(step, batch), "products": bare_products(matrices, batch)}
    works |= {name: lambda run=run: run(prompt, STEPS) for name, run in others.items()}
    kind, config = ("LRT" if model.config.stored_sources else "Transformer"), model.config
    name = f"{config.depth} x {config.width} {kind}, batch {batch}"
    timings = alternate(works, rounds, 1, device, name, progress)
    least = {key: min(timing.seconds) for key, timing in timings.items()}
    size = sum(matrix.numel() * matrix.element_size() for matrix in matrices)
    milliseconds = {f"{key}_ms": 1e3 * seconds / STEPS for key, seconds in least.items()}
    return Row(
        f"bare products / a token, {name}",
        least["products"] / least["token"],
        at_least=TARGETS.get(config.width) if batch == 1 and kind == "LRT" else None,
        figures={**milliseconds, "bandwidth_ms": 1e3 * size / bandwidth},
        about={"mode": step.name, "bytes": size, "bytes_per_second": bandwidth, "threads": torch.get_num_threads()},
    )


def weight_matrices(model: LatentRecurrentTransformer) -> list[Tensor]:
    """Every matrix (out, in) that a token is multiplied with, the head's too; tables of embeddings are looked up."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    weights = [weight.detach() for weight in model.parameters() if weight.dim() > 1 and id(weight) not in tables]
    return [matrix for weight in weights for matrix in weight.reshape(-1, *weight.shape[-2:])]


def bare_products(matrices: Sequence[Tensor], batch: int) -> Work:
    """STEPS times every matrix with a vector, or with the vectors of `batch` rows, in one loop and nothing else."""
    widths = {matrix.shape[1] for matrix in matrices}
    device, dtype = matrices[0].device, matrices[0].dtype
    inputs = {width: torch.randn(batch, width, device=device, dtype=dtype) for width in widths}
    if batch == 1:
        pairs = [(matrix, inputs[matrix.shape[1]][0]) for matrix in matrices]
    else:
        pairs = [(inputs[matrix.shape[1]], matrix.t()) for matrix in matrices]
    multiply = torch.mv if batch == 1 else torch.mm

    @torch.inference_mode()
    def work() -> None:
        for _ in range(STEPS):
            for one, other in pairs:
                multiply(one, other)
        pairs[0][0][0, 0].item()  # waits for what a GPU has queued

    return work


def measure_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes a second that a copy reads and writes, the best of `rounds`."""
    source = torch.zeros(STREAM, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timings = alternate({"copy": lambda: target.copy_(source)}, rounds, 1, device, "bandwidth", progress=False)
    return 2 * STREAM / min(timings["copy"].seconds)


def has_engine(model: LatentRecurrentTransformer) -> bool:
    """Whether CTranslate2 is installed, for a model on the CPU."""
    return model.embedding.weight.device.type == "cpu" and importlib.util.find_spec(ENGINE) is not None


def ctranslate2_generate(config: ModelConfig, folder: Path) -> Generate:
    """Greedy decoding of a random Llama of a Transformer's depth, width and parameters in CTranslate2, in float32.

    It is written to `folder`, which has to stay while it decodes.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    engine = importlib.import_module(ENGINE)
    converters = importlib.import_module(f"{ENGINE}.converters")

    def shape(hidden: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=hidden,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.context,
            bos_token_id=0,
            eos_token_id=0,
        )

    fixed = LlamaForCausalLM(shape(1)).num_parameters() - 3 * config.depth * config.width
    hidden = max(1, round((count_parameters(config)[0] - fixed) / (3 * config.depth * config.width)))
    LlamaForCausalLM(shape(hidden)).save_pretrained(folder / "llama")
    words = Tokenizer(WordLevel({str(token): token for token in range(config.vocab_size)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="0", eos_token="0", unk_token="0").save_pretrained(
        folder / "llama"
    )
    converters.TransformersConverter(str(folder / "llama")).convert(str(folder / ENGINE))
    generator = engine.Generator(str(folder / ENGINE), device="cpu", intra_threads=torch.get_num_threads())

    def generate(prompt: Tensor, count: int) -> object:
        rows = [[str(token) for token in row] for row in prompt.tolist()]
        return generator.generate_batch(
            rows, max_length=count, min_length=count, sampling_topk=1, include_prompt_in_result=False
        )

    return generate
