"""How a step is computed: compiled or not, recomputing or keeping. It decides speed and memory, not numbers.

An Execution travels in the State, as `write` does, so that neither the model nor a schedule has a flag. It is not in
RunConfig, which holds what decides numbers, and may change when a run goes on. It is plain data, which the command line
reads without torch; what compiles and recomputes is `lrt.model.recompute`.

Regions are compiled rather than the whole (PyTorch's regional compilation recipe): the two halves of a block, before
and after attention, and the head's sweeps. Compiled once, they serve all blocks, all passes of one size and all steps.
Whole passes would repeat a block's code once per layer, for two minutes of compiling, and call the same attention
kernels in between. Nothing of a schedule is unrolled, so a mixture or `sequential` compiles no more than its sizes of
pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from lrt.utils.validation import check_choice

if TYPE_CHECKING:
    import torch
    from torch import nn

F = TypeVar("F", bound=Callable[..., Any])
LONG = 1000
"""Steps from which a run repays the time of compiling (`auto`)."""


@dataclass(frozen=True)
class Execution:
    """How a step is computed. Unlike RunConfig it decides no numbers, beyond rounding, and may change on resuming."""

    compile: Literal["auto", "always", "never"] = "auto"
    """torch.compile of what lies between the attention kernels. auto: for runs of at least 1000 steps, where there is a
    compiler."""
    recompute: Literal["nothing", "blocks", "passes"] = "nothing"
    """What is computed again in the backward instead of being kept (activation checkpointing): nothing; the inside of
    each block; the inside of each pass, of which only what later passes read is kept."""
    blocks: Literal["needed", "all"] = "needed"
    """Which blocks of a pass run. needed: a pass that only the memory is wanted of ends at the highest remembered layer
    and leaves no hidden state, and what does not depend on a remembered layer is computed once for all passes
    (`schedules.work`). all: every block of every pass. Both give the same numbers. A prefill's sweeps are such passes;
    there both give the same within its tolerance."""

    def __post_init__(self) -> None:
        check_choice(self, "compile", ("auto", "always", "never"))
        check_choice(self, "recompute", ("nothing", "blocks", "passes"))
        check_choice(self, "blocks", ("needed", "all"))

    def resolve(self, steps: int, device: str | torch.device) -> tuple[Execution, str]:
        """`always` or `never` in place of `auto` for a run of `steps`, and which path that is, in words."""
        from lrt.utils.torch_private import missing_compiler

        if self.compile != "auto":
            decided, reason = self.compile, f"compile is {self.compile}"
        elif steps < LONG:
            decided, reason = "never", f"{steps:,} steps are fewer than {LONG:,}"
        elif missing := missing_compiler(device):
            decided, reason = "never", missing
        else:
            decided, reason = "always", f"{steps:,} steps are at least {LONG:,}"
        path = "compiled" if decided == "always" else "uncompiled"
        kept = "" if self.recompute == "nothing" else f", recomputing {self.recompute}"
        return dataclasses.replace(self, compile=decided), f"{path} passes ({reason}){kept}"

    def function(self, function: F) -> F:
        """A function of tensors and modules, compiled if that is wanted."""
        if self.compile != "always":
            return function
        from lrt.model.recompute import compile_once

        return cast(F, compile_once(function))

    def block(self, block: nn.Module, *arguments: Any) -> Any:
        """Call a block; keep its arguments only, if blocks are to be recomputed."""
        if self.recompute != "blocks":
            return block(*arguments)
        from lrt.model.recompute import recompute

        return recompute(block, *arguments)

    def whole_pass(self, model: nn.Module, *arguments: Any) -> Any:
        """Call a model for a pass; keep its arguments only, if passes are to be recomputed."""
        if self.recompute != "passes":
            return model(*arguments)
        from lrt.model.recompute import recompute

        return recompute(model, *arguments)


EAGER = Execution(compile="never")
"""Not compiled, nothing recomputed."""
WHOLE = Execution(compile="never", blocks="all")
"""Everything as it is written: the plain reference, which has the hidden states of every pass."""
