"""A calibration under which prompts are swept."""

from __future__ import annotations

from lrt.inference.cost_model import Calibration, Plan

GROUPS = 4
# A call's overhead so large that sweeps pay from 35 tokens on, as on a GPU.
PARALLEL = Calibration(1000.0, {"converged": Plan(GROUPS, 8), "fast": Plan(GROUPS, 4)})
