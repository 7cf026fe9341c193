"""What every test file shares."""

import torch

# Tiny tensors: a second thread costs more than it computes, and the suite runs several workers (see the Makefile).
torch.set_num_threads(1)
