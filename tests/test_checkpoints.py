"""checkpoints.py: a checkpoint is whole or it does not exist.

bash tests/run.sh tests/test_checkpoints.py
"""

import contextlib
import json
import math
import re
import shutil
import threading
import time
import types
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import full_disk

from sft.training import checkpoints, distributed, hardware


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2, 3):
        tensors = {"model.a": torch.arange(1000.0) + step, "optimizer.step.a": torch.tensor(float(step))}
        checkpoints.save(tmp_path / "run", step, tensors, {"step": step, "updates": step})
        checkpoints.delete_old(tmp_path / "run", step, keep=2)
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


# ---- The best one ----


def save_steps(folder, losses, first=1):
    """Save step 10 x `first` and on with these validation losses (None: not validated) and values, keeping two."""
    for number, loss in enumerate(losses, start=first):
        tensors = {"model.a": torch.full((1000,), float(number))}
        checkpoints.save(folder, 10 * number, tensors, {"step": 10 * number, "validation_loss": loss})
        checkpoints.delete_old(folder, 10 * number, keep=2)
    return [path.name for path in checkpoints.listed(folder)]


def test_the_best_is_kept_next_to_the_last_k_until_a_better_one_comes(tmp_path):
    assert save_steps(tmp_path, [3.0, 2.0, 2.5, None, 2.0, None]) == ["step_000060", "step_000050", "step_000020"]
    assert checkpoints.best_whole(tmp_path).name == "step_000020"  # of two equal ones, the earlier
    assert checkpoints.best(tmp_path, 60) == {"checkpoint": "step_000020", "validation_loss": 2.0}
    names = save_steps(tmp_path, [math.nan, 1.9, None, None], first=7)
    assert names == ["step_000100", "step_000090", "step_000080"]


def test_a_damaged_best_is_skipped_aloud_and_steps_without_validation_have_none(tmp_path, capsys):
    save_steps(tmp_path, [3.0, 2.0, 2.5, 2.6])
    flip_a_bit(tmp_path / "step_000020")
    assert checkpoints.best_whole(tmp_path).name == "step_000030"
    assert "step_000020 is skipped: " in capsys.readouterr().out
    (tmp_path / "step_000030" / "state.json").write_text("[1]")
    assert checkpoints.best(tmp_path, 30)["checkpoint"] == "step_000020"
    save_steps(tmp_path / "never", [None, None])
    assert checkpoints.best_whole(tmp_path / "never") is None
    assert checkpoints.best(tmp_path / "never", 20) == {"checkpoint": None, "validation_loss": None}


# ---- Saving beside training ----


class Record:
    """The part of training_log.Log that a Saver uses."""

    def __init__(self):
        self.said, self.warning = [], ""

    def say(self, text):
        self.said.append(text)

    def warn(self, text):
        self.warning = text

    def sync(self):
        pass


@pytest.fixture
def saver(tmp_path, alone):
    """A function that starts a Saver of `tmp_path`/run for tensors, on this one rank."""

    def start(tensors, beside=True, keep=9):
        args = {"CHECKPOINT_DIR": str(tmp_path / "run"), "KEEP_CHECKPOINTS": keep, "SAVE_EVERY": 10}
        return checkpoints.Saver(args, beside, tensors, torch.device("cpu"), Record(), 0)

    return start


@pytest.fixture
def held(monkeypatch):
    """Let no write begin before the event that this is."""
    plain, held = dcp.save, threading.Event()

    def save(*args, **kwargs):
        assert held.wait(60)
        return plain(*args, **kwargs)

    monkeypatch.setattr(dcp, "save", save)
    return held


def test_a_save_next_to_training_holds_its_step_whatever_training_changes_meanwhile(tmp_path, saver, held):
    tensors = {"model.a": torch.arange(1000.0), "optimizer.step.a": torch.tensor(1.0)}
    state = {"step": 10, "validation_loss": 2.5}
    with saver(tensors) as beside:
        beside.save(10, tensors, state, wait=False)
        for tensor in tensors.values():
            tensor.add_(1)  # the next step, while nothing is written yet
        beside.check()
        assert distributed.Progress.text().endswith("step 10 being written") and beside.last_saved == 0
        assert not (tmp_path / "run" / "step_000010").exists()
        held.set()
        beside.save(20, tensors, state | {"step": 20, "validation_loss": None}, wait=True)
        assert beside.last_saved == 20 and "written" not in distributed.Progress.text()
    first, best, last = beside.log.said
    assert (
        re.search(r"saved .*step_000010 in \d+\.\d{3} s; training stood still for 0\.\d{3} s", first) and "0020" in last
    )
    assert best.endswith("step_000010: validation loss 2.5000")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["best"]["checkpoint"] == "step_000010"
    for step, change in ((10, 0), (20, 1)):
        wanted = {"model.a": torch.arange(1000.0) + change, "optimizer.step.a": torch.tensor(1.0 + change)}
        checkpoints.save(tmp_path / "waiting", step, wanted, state)
        ours, theirs = (next((tmp_path / run / f"step_0000{step}").glob("*.distcp")) for run in ("run", "waiting"))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.fixture
def two_threads():
    """Let torch's kernels run on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_no_thread_of_a_save_or_a_load_stays_that_would_slow_training(saver, tmp_path, two_threads):
    tensors = {f"model.layers.{number}.weight": torch.zeros(100_000) for number in range(1000)}  # plans like a model's
    tensors["optimizer.step.a"] = torch.tensor(0.0)
    with saver(tensors) as beside:
        torch.zeros(10**6).add_(1)  # now training's own threads exist
        before = set(Path("/proc/self/task").iterdir())
        beside.save(10, tensors, {"step": 10, "updates": 0, "fingerprints": {}}, wait=False)
        beside.finish()
        checkpoints.load(tmp_path / "run" / "step_000010", tensors, {})
        deadline = time.monotonic() + 60
        while set(Path("/proc/self/task").iterdir()) - before and time.monotonic() < deadline:
            time.sleep(0.05)  # the save's thread is ending
        assert not set(Path("/proc/self/task").iterdir()) - before


def test_a_save_waits_for_the_one_before_it_and_says_so_when_that_takes_long(tmp_path, saver, held, monkeypatch):
    monkeypatch.setattr(checkpoints, "LONG_WAIT", 0.1)
    tensors = {"model.a": torch.zeros(1000)}
    with saver(tensors) as beside:
        beside.save(10, tensors, {}, wait=False)
        threading.Timer(0.3, held.set).start()
        beside.save(20, tensors, {}, wait=False)
        assert (tmp_path / "run" / "step_000010").is_dir() and beside.last_saved == 10
        beside.finish()
    assert beside.log.said[1] == "step 20: waited 0 s for the save before it; raise SAVE_EVERY."
    assert checkpoints.latest_whole(tmp_path / "run").name == "step_000020"


def test_an_old_checkpoint_that_cannot_be_deleted_is_named_and_the_new_one_counts(tmp_path, saver, monkeypatch):
    tensors, plain = {"model.a": torch.zeros(1000)}, shutil.rmtree

    def rmtree(path, *args, **kwargs):
        if Path(path).name == "step_000010":
            raise PermissionError(13, "Permission denied", str(path))
        plain(path, *args, **kwargs)

    with saver(tensors, keep=1) as beside:
        beside.save(10, tensors, {"step": 10}, wait=True)
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        beside.save(20, tensors, {"step": 20}, wait=True)
        assert beside.last_saved == 20 and beside.log.warning == ""
    assert "WARNING: an old checkpoint stays" in beside.log.said[-1] and "step_000010" in beside.log.said[-1]
    assert checkpoints.latest_whole(tmp_path / "run").name == "step_000020"


def test_the_last_save_is_written_from_the_same_copy_as_those_before_it(saver, monkeypatch):
    tensors, written, plain = {"model.a": torch.zeros(1000)}, [], dcp.save

    def save(tensors, **kwargs):
        written.append(tensors["model.a"].data_ptr())
        return plain(tensors, **kwargs)

    monkeypatch.setattr(dcp, "save", save)
    with saver(tensors) as beside:
        beside.save(10, tensors, {}, wait=False)
        beside.save(20, tensors, {}, wait=True)
    assert beside.last_saved == 20 and written[0] == written[1] != tensors["model.a"].data_ptr()


def test_a_write_that_fails_next_to_training_is_reported_and_leaves_nothing(tmp_path, saver):
    tensors = {"model.a": torch.zeros(100_000)}
    with saver(tensors) as beside:
        beside.save(10, tensors, {}, wait=True)
        with full_disk(10_000):
            beside.save(20, tensors, {}, wait=False)
            beside.finish()
        assert beside.last_saved == 10 and beside.log.warning == "no checkpoint since step 10"
        sentence = "WARNING: no checkpoint at step 20, next try in 10 steps: rank 0: "
        assert beside.log.said[-1].startswith(sentence) and len(beside.log.said[-1].splitlines()) == 1
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["step_000010"]
        beside.save(30, tensors, {}, wait=False)
        beside.finish()
        assert beside.last_saved == 30 and beside.log.warning == ""


def test_a_write_next_to_training_does_not_wait_for_the_stream_that_trains(saver, monkeypatch):
    tensors, waits = {f"model.{number}": torch.zeros(10**6) for number in range(5)}, []
    training = types.SimpleNamespace(synchronize=lambda: waits.append("a wait"))
    with saver(tensors) as beside:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: training)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        beside.save(10, tensors, {}, wait=False)
        beside.finish()
    assert beside.last_saved == 10 and waits == []


def test_a_write_in_flight_becomes_whole_whatever_ends_the_run(tmp_path, saver, held):
    tensors = {"model.a": torch.zeros(1000)}
    with pytest.raises(SystemExit), saver(tensors) as beside:
        beside.save(10, tensors, {}, wait=False)
        threading.Timer(0.2, held.set).start()
        raise SystemExit("10 steps in a row had no finite loss")
    assert checkpoints.latest_whole(tmp_path / "run").name == "step_000010"


def test_a_machine_without_room_for_the_copy_is_refused_and_needs_none_without_it(saver, monkeypatch, capsys):
    tensors = {"model.a": torch.zeros(2**20)}
    monkeypatch.setattr(hardware, "available_memory", lambda: 2**21)
    with pytest.raises(SystemExit):
        saver(tensors)
    sentence = "needs 0.0 GiB of this machine's memory for a copy of the state, 0.0 are free. Free some, or save with"
    assert sentence in capsys.readouterr().err
    with saver(tensors, beside=False) as waiting:
        waiting.save(10, tensors, {}, wait=False)
        assert waiting.last_saved == 10
