"""checkpoints.py: a checkpoint is whole or it does not exist."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from sft.training import checkpoints

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2, 3):
        state = {"model.a": torch.arange(1000.0) + step, "optimizer.step.a": torch.tensor(float(step))}
        checkpoints.save(tmp_path / "run", step, state, {"step": step, "updates": step}, keep=2)
    return tmp_path / "run"


def test_the_last_k_are_kept_and_the_newest_is_found(folder):
    assert [path.name for path in checkpoints.listed(folder)] == ["step_000003", "step_000002"]
    newest = checkpoints.newest_whole(folder)
    assert newest.name == "step_000003" and checkpoints.verify(newest)["updates"] == 3
    state = {"model.a": torch.zeros(1000)}
    dcp.load(state, checkpoint_id=str(newest))
    assert torch.equal(state["model.a"], torch.arange(1000.0) + 3)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rename_in_manifest(checkpoint, name, other):
    entries = json.loads((checkpoint / "manifest.json").read_text())
    entries[other] = entries.pop(name)
    (checkpoint / "manifest.json").write_text(json.dumps(entries))
