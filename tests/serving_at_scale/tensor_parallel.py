"""Greedy answers of vLLM on so many processes, as JSON: `python tensor_parallel.py FOLDER RANKS MODE OUT`."""

import json
import sys
from pathlib import Path

import conftest  # noqa: F401 (the environment that vLLM reads)
from support.vllm_engine import NEW, ragged_prompts, settings
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        sys.argv[1],
        **settings(max_num_batched_tokens=96, hf_overrides={"prefill": sys.argv[3]}),
        tensor_parallel_size=int(sys.argv[2]),
        distributed_executor_backend="mp",
    )
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0)
    done = llm.generate([{"prompt_token_ids": prompt} for prompt in ragged_prompts(12)], greedy)
    answers = [
        {
            "token_ids": list(answer.outputs[0].token_ids),
            "logprobs": [
                step[token].logprob
                for step, token in zip(answer.outputs[0].logprobs, answer.outputs[0].token_ids, strict=True)
            ],
        }
        for answer in done
    ]
    Path(sys.argv[4]).write_text(json.dumps(answers))
