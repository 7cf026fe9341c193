"""What every test file shares."""

import os
from pathlib import Path

import torch

# Tiny tensors: a second thread costs more than it computes, and the suite runs several workers (see the Makefile).
torch.set_num_threads(1)

# Programs that tests start find tests/support too, as pytest does (`pythonpath` in pyproject.toml).
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
