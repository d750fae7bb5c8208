"""checkpoints.py: a checkpoint is whole or it does not exist.

bash tests/run.sh tests/test_checkpoints.py
"""

import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from sft.training import checkpoints


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2, 3):
        tensors = {"model.a": torch.arange(1000.0) + step, "optimizer.step.a": torch.tensor(float(step))}
        checkpoints.save(tmp_path / "run", step, tensors, {"step": step, "updates": step}, keep=2)
    return tmp_path / "run"


def test_the_last_k_are_kept_and_the_latest_is_found(folder):
    assert [path.name for path in checkpoints.listed(folder)] == ["step_000003", "step_000002"]
    latest = checkpoints.latest_whole(folder)
    assert latest.name == "step_000003" and checkpoints.verify(latest)["updates"] == 3
    tensors = {"model.a": torch.zeros(1000)}
    dcp.load(tensors, checkpoint_id=str(latest))
    assert torch.equal(tensors["model.a"], torch.arange(1000.0) + 3)


def flip_a_bit(checkpoint):
    path = next(checkpoint.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(checkpoint):
    path = next(checkpoint.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1])


def name_a_file_outside(checkpoint):
    entries = json.loads((checkpoint / "manifest.json").read_text())
    name = next(checkpoint.glob("*.distcp")).name
    entries[f"../{checkpoint.name}/{name}"] = entries.pop(name)
    (checkpoint / "manifest.json").write_text(json.dumps(entries))


DAMAGE = [
    (flip_a_bit, "was changed after it was written"),
    (cut, r"has \d+ bytes instead of \d+"),
    (lambda checkpoint: next(checkpoint.glob("*.distcp")).unlink(), "distcp is missing"),
    (lambda checkpoint: (checkpoint / "manifest.json").unlink(), "has no manifest.json: its save never finished"),
    (lambda checkpoint: (checkpoint / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
    (lambda checkpoint: (checkpoint / "manifest.json").write_text("{}"), "names no .metadata or no state.json"),
    (name_a_file_outside, "is missing"),
]


@pytest.mark.parametrize(("harm", "sentence"), DAMAGE)
def test_a_damaged_checkpoint_is_skipped_aloud_and_refused_by_name(folder, capsys, harm, sentence):
    harm(folder / "step_000003")
    with pytest.raises(SystemExit, match=f"step_000003 is not a whole checkpoint: .*{sentence}.* Choose another one."):
        checkpoints.choose(folder, "step_000003")
    assert checkpoints.choose(folder, "latest").name == "step_000002"
    assert "step_000003 is skipped: " in capsys.readouterr().out


def test_a_checkpoint_is_chosen_by_name_unless_there_are_later_ones(folder, monkeypatch):
    assert checkpoints.choose(folder, "step_000003").name == "step_000003"
    with pytest.raises(SystemExit, match=r"holds checkpoints later than step_000002\. Move them away"):
        checkpoints.choose(folder, "step_000002")
    with pytest.raises(SystemExit, match="no such checkpoint folder"):
        checkpoints.choose(folder, "step_000009")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun repeats the first command
    assert checkpoints.choose(folder, "step_000002").name == "step_000003"


def test_what_a_killed_save_left_is_removed_and_nothing_else(folder):
    shutil.copytree(folder / "step_000003", folder / "step_000004.unfinished")
    (folder / "notes.unfinished").mkdir()
    (folder / "step_000005.unfinished").symlink_to("step_000003")
    checkpoints.clear_unfinished(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"step_000002", "step_000003", "notes.unfinished"}


def test_fingerprints_of_another_version_are_one_phrase():
    now = {"data": "d", "weights": "w", "tokenizer.json": "t", "config.json layers": 2}
    for then in (None, [], {"data": "d", "tokenizer": "t", "base": "w"}, {"data": "d", "weights": "w"}):
        assert checkpoints.fingerprint_differences(then, now) == "another version of this suite wrote it"
    assert checkpoints.fingerprint_differences(now, now) == ""
    then = now | {"weights": "v", "config.json window": 3}  # the keys of config.json are the base's own
    del then["config.json layers"]
    phrase = "weights: v then, w now; config.json window: 3 then, None now; config.json layers: None then, 2 now"
    assert checkpoints.fingerprint_differences(then, now) == phrase
    assert checkpoints.fingerprint_differences({}, {"data": "d"}) == "data: None then, d now"  # none were kept
