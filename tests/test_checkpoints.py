"""checkpoints.py: a checkpoint is whole or it does not exist."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import checkpoints

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


def exchange(path, other):
    """Put another checkpoint's file of the same name and size in the place of `path`."""
    assert path.stat().st_size == other.stat().st_size
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda c: (c / "manifest.json").unlink(), "its save never finished"),
        (lambda c: (c / "manifest.json").write_text("{"), "cannot be read"),
        (lambda c: (c / "manifest.json").write_text("[1, 2]"), "cannot be read"),
        (lambda c: (c / "manifest.json").write_text("{}"), "names no .metadata"),
        (lambda c: (c / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda c: (c / "__0_0.distcp").write_bytes(b"x"), "1 bytes instead of"),
        (lambda c: flip(c / "__0_0.distcp"), "__0_0.distcp was changed"),
        (lambda c: flip(c / ".metadata"), ".metadata was changed"),
        (
            lambda c: exchange(c / "__0_0.distcp", c.with_name("step_000002") / "__0_0.distcp"),
            "__0_0.distcp was changed",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(folder, harm, reason):
    harm(folder / "step_000003")
    told = []
    assert checkpoints.newest_whole(folder, told.append).name == "step_000002"
    assert len(told) == 1 and "step_000003" in told[0] and reason in told[0]
    with pytest.raises(SystemExit, match="step_000003 is not a whole checkpoint"):
        checkpoints.verify(folder / "step_000003")


def test_a_manifest_cannot_name_files_outside_its_folder(folder):
    path = folder / "step_000003" / "manifest.json"
    entries = json.loads(path.read_text())
    entries["../step_000002/facts.json"] = entries.pop("facts.json")
    path.write_text(json.dumps(entries | {"facts.json": entries["../step_000002/facts.json"]}))
    assert "missing" in checkpoints.defect(folder / "step_000003")


def test_a_failed_save_leaves_the_older_ones_and_a_leftover_staging_folder_is_no_checkpoint(folder):
    with pytest.raises(OSError, match="rank 0"):
        checkpoints.save(folder, 4, {"model.a": torch.zeros(3)}, {"step": object()}, keep=2)
    assert not (folder / "staging_step_000004").exists()
    (folder / "staging_step_000004").mkdir()  # as a kill in the middle of a save leaves it
    assert [path.name for path in checkpoints.listed(folder)] == ["step_000003", "step_000002"]
    checkpoints.save(folder, 4, {"model.a": torch.zeros(3)}, {"step": 4}, keep=2)
    assert [path.name for path in checkpoints.listed(folder)] == ["step_000004", "step_000003"]
    assert not (folder / "staging_step_000004").exists()


def test_a_missing_folder_is_a_sentence(tmp_path):
    assert checkpoints.newest_whole(tmp_path / "none") is None
    with pytest.raises(SystemExit, match="no such checkpoint folder"):
        checkpoints.verify(tmp_path / "none")


def test_a_damaged_newer_checkpoint_does_not_push_out_the_whole_ones(folder):
    (folder / "step_000003").rename(folder / "step_000009")
    flip(folder / "step_000009" / "__0_0.distcp")
    for step in (3, 4):
        checkpoints.save(folder, step, {"model.a": torch.zeros(3)}, {"step": step}, keep=1)
    assert [path.name for path in checkpoints.listed(folder)] == ["step_000009", "step_000004"]
    assert checkpoints.newest_whole(folder, lambda text: None).name == "step_000004"


def test_a_save_without_room_writes_nothing(folder, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: type("", (), {"free": 100}))
    with pytest.raises(OSError, match=r"need 0\.0 GiB, 0\.0 are free. Make room"):
        checkpoints.save(folder, 4, {"model.a": torch.zeros(1000)}, {"step": 4}, keep=2)
    assert [path.name for path in checkpoints.listed(folder)] == ["step_000003", "step_000002"]
    assert not list(folder.glob("staging_*"))


def test_leftovers_of_killed_saves_are_cleared(folder):
    (folder / "staging_step_000004").mkdir()
    (folder / "staging_step_000004" / "__0_0.distcp").write_bytes(b"x")
    checkpoints.clear_staging(folder)
    assert not list(folder.glob("staging_*")) and len(checkpoints.listed(folder)) == 2


def test_a_lock_is_held_until_its_process_ends(tmp_path):
    program = (
        "import checkpoints, sys, time; lock = checkpoints.lock(sys.argv[1]); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, cwd=ROOT) as owner:
        try:
            assert owner.stdout.readline() == b"held\n"
            with pytest.raises(SystemExit, match=rf"is in use by another run \(process {owner.pid}\). Wait for it"):
                checkpoints.lock(tmp_path)
        finally:
            owner.kill()
    handle = checkpoints.lock(tmp_path)
    with pytest.raises(SystemExit, match="in use by another run"):
        checkpoints.lock(tmp_path)
    handle.close()
    checkpoints.lock(tmp_path).close()
