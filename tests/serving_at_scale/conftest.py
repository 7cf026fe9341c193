"""An LRT inside vLLM. `make vllm` makes the environment that these tests run in; elsewhere none is collected."""

import os
from importlib.util import find_spec

# Before vllm is imported: the engine in this process, so that tests see it; pages of 1 GB; no telemetry.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
