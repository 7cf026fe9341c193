"""The parts that have no memory: RMSNorm, rotary positions, the MLP.

Shapes: B batch, T positions, D width, K head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrt.model.state_protocol import Positions
from lrt.utils.device import has_float64


def rms(x: Tensor) -> Tensor:
    """RMSNorm without parameters, over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],))


def rotary(positions: Positions, size: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles t · base^(-2i/K), each (T, 1, K/2) or (B, T, 1, K/2), as `like`.

    Computed in float64, so that a position of a million is as exact as the first; on the CPU for a range, because
    some devices have no float64.
    """
    if isinstance(positions, range):
        positions = torch.arange(positions.start, positions.stop, positions.step)
    elif not has_float64(positions.device):
        positions = positions.cpu()
    exponent = torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size
    angles = positions.to(torch.float64).unsqueeze(-1) * base**-exponent
    angles = angles.unsqueeze(-2)
    # Narrowed before it is moved, so that no float64 reaches the device.
    return angles.cos().to(like.dtype).to(like.device), angles.sin().to(like.dtype).to(like.device)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the two halves of each head (B, T, heads, K) by its position's angles.

    Entries i and i + K/2 are a pair, turned clockwise as in nanochat; scores depend on differences of angles alone.
    """
    cos, sin = angles
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class MLP(nn.Module):
    """D -> hidden -> D with a squared ReLU between (Primer, 2109.08668)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())
