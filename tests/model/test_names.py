"""What names a model and a snapshot: the fingerprint of weights and configuration, the step in a folder's name."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from support.generation import CONFIGS
from support.models import random_model

from lrt import LatentRecurrentTransformer
from lrt.model.checkpoint import snapshot_path, snapshot_step, snapshots
from lrt.model.fingerprint import fingerprint


def test_a_fingerprint_is_of_every_weight_and_of_the_configuration():
    config = CONFIGS["both"]
    model = random_model(config)
    known = {fingerprint(model)}
    assert fingerprint(copy.deepcopy(model)) in known
    for name, _ in model.named_parameters():
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(name).view(-1)[-1] += 1e-6
        known.add(fingerprint(other))
    assert len(known) == 1 + len(list(model.parameters()))
    capped = LatentRecurrentTransformer(replace(config, softcap=14.0)).double()
    capped.load_state_dict(model.state_dict())
    assert fingerprint(capped) not in known


def test_a_snapshots_folder_says_its_step_and_snapshots_come_in_order(tmp_path: Path):
    for step in (7, 120, 30):
        path = snapshot_path(tmp_path, step)
        assert snapshot_step(path) == step
        path.mkdir(parents=True)
    assert [snapshot_step(path) for path in snapshots(tmp_path)] == [7, 30, 120]
    assert snapshot_step(tmp_path / "snapshots" / "step-later") == 0
