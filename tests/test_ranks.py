"""ranks.py through sft_v1.py: stop, kill, hang, disagree and continue, with real torchrun and gloo processes."""

import contextlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_sft_v1 import ROOT, command, equals_the_uninterrupted, go_back, metrics, torchrun, trained
from test_sft_v1 import two_ranks as two_ranks  # a fixture
from test_sft_v1 import work as work  # a fixture

from sft.training import checkpoints


def children(pid):
    """Return the ids of all processes below `pid`."""
    found = [int(n) for n in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]
    return found + [below for child in found for below in children(child)]


@contextlib.contextmanager
def running(line, checkpoint):
    """Start a run, wait for its `checkpoint`, give its Popen; kill what is left of it at the end."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    try:
        deadline = time.time() + 120
        while not checkpoint.exists():
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.01)
        yield process
    finally:
        for pid in [*children(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def rank(process, number):
    """Return the process id of a rank below torchrun."""
    for pid in children(process.pid):
        if f"\0RANK={number}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return pid


def test_a_stop_file_ends_the_run_in_order(work, two_ranks):
    go_back(work, "stopped", 10)
    (work / "stopped" / "STOP").touch()
    stdout = trained(work, "stopped", 2, "--resume", "step_000010")
    assert not (work / "stopped" / "STOP").exists()
    assert checkpoints.newest_whole(work / "stopped").name == "step_000011"
    again = shlex.split(stdout.partition("Stopped after step 11, as asked. To continue, in ")[2].splitlines()[1])
    assert subprocess.run(again, capture_output=True, timeout=120).returncode == 0
    equals_the_uninterrupted(work, "stopped")


def test_any_ranks_signal_ends_the_run_in_order(work):
    with running(command(work, "signalled", 2, "--max-steps", "9999"), work / "signalled" / "step_000010") as process:
        os.kill(rank(process, 1), signal.SIGTERM)
        stdout = process.communicate(timeout=60)[0]
        assert process.returncode == 0, stdout
    last = int(re.search(r"Stopped after step (\d+), as asked", stdout)[1])
    assert checkpoints.newest_whole(work / "signalled").name == f"step_{last:06d}"
    following = work / "signalled" / f"step_{last // 10 * 10 + 10:06d}"
    with running(command(work, "signalled", 2, "--max-steps", "9999"), following) as process:
        process.send_signal(signal.SIGINT)
        stdout = process.communicate(timeout=60)[0]
        assert process.returncode == 1 and "as asked" in stdout, stdout


def test_a_second_run_into_the_folder_is_refused_and_a_dead_one_frees_it_at_once(work):
    line = command(work, "shared", 2, "--max-steps", "9999")
    with running(line, work / "shared" / "step_000010") as process:
        result = torchrun(work, "shared", 1)
        assert result.returncode == 1
        assert f"shared is in use by another run (process {rank(process, 0)}). Wait for it" in result.stderr
        process.kill()  # its ranks have no launcher now
        process.wait()
        newest = checkpoints.newest_whole(work / "shared").name
        stdout = trained(work, "shared", 2, "--max-steps", str(int(newest[5:]) + 1))
        assert f"continue   {work}/shared/{newest}" in stdout


def test_torchrun_restarts_a_run_whose_rank_was_killed(work, two_ranks):
    line = command(work, "restarted", 2)
    line[3:3] = ["--max-restarts", "3"]
    with running(line, work / "restarted" / "step_000010") as process:
        os.kill(rank(process, 1), signal.SIGKILL)
        stdout = process.communicate(timeout=120)[0]
        assert process.returncode == 0, stdout
    assert "continue" in stdout and "Rank 0 failed in 'step " in stdout and "rank 1 was last heard" in stdout
    equals_the_uninterrupted(work, "restarted")


def test_a_rank_that_hangs_ends_the_others_and_is_named(work):
    flags = ("--max-steps", "9999", "--collective-timeout-seconds", "3")
    with running(command(work, "hanging", 2, *flags), work / "hanging" / "step_000010") as process:
        stopped, since = rank(process, 1), time.time()
        os.kill(stopped, signal.SIGSTOP)
        line = next(line for line in process.stdout if "Rank 0 stops in 's" in line)
        assert time.time() - since < 8
    assert re.search(r"rank 1 was last heard [34] s ago in '(step|saving)[^']*'. Look at the lost process", line), line


def started_by(path, program, line):
    """Return the torchrun command `line` with `program` run before sft_v1.py, in each rank; it is written to `path`."""
    path.write_text(
        f"import os, runpy, sys\nrank, folder = int(os.environ['RANK']), {str(ROOT)!r}\nsys.path[0] = folder\n"
        f"{program}\nrunpy.run_path(sys.path[0] + '/sft_v1.py', run_name='__main__')\n"
    )
    return [str(path) if part.endswith("sft_v1.py") else part for part in line]


def test_a_slow_disk_is_not_taken_for_a_rank_that_hangs(work, tmp_path):
    slow = """
import time, datasets, torch.distributed.checkpoint as dcp
def slowly(owner, name, who):
    plain = getattr(owner, name)
    def wrapped(*args, **kwargs):
        time.sleep(5 if rank == who else 0)
        return plain(*args, **kwargs)
    setattr(owner, name, wrapped)
slowly(datasets, "load_from_disk", 1)
slowly(dcp, "save", 0)
"""
    line = command(work, "slow", 2, "--max-steps", "10", "--collective-timeout-seconds", "2")
    result = subprocess.run(
        started_by(tmp_path / "starter.py", slow, line), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert (work / "slow" / "step_000010").is_dir()


def test_a_second_interrupt_ends_the_run_at_once(work, tmp_path):
    slow = """
import time, torch.distributed.checkpoint as dcp
plain = dcp.save
def save(state, checkpoint_id):
    plain(state, checkpoint_id=checkpoint_id)
    time.sleep(25 if checkpoint_id.endswith("20") else 0)
dcp.save = save
"""
    line = started_by(tmp_path / "starter.py", slow, command(work, "twice", 2))
    with running(line, work / "twice" / "staging_step_000020") as process:
        ranks, since = children(process.pid), time.time()
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(1)
        process.communicate(timeout=15)
        assert time.time() - since < 15 and not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert checkpoints.newest_whole(work / "twice").name == "step_000010"


def test_ranks_that_differ_stop_at_start(work, tmp_path):
    suite = tmp_path / "another"
    shutil.copytree(ROOT / "sft", suite / "sft")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, suite)
    with (suite / "sft" / "training" / "dataloader.py").open("a") as file:
        file.write("# another version\n")
    line = started_by(
        tmp_path / "starter.py",
        "sys.path[0] = [folder, " + repr(str(suite)) + "][rank]\nsys.argv += ['--learning-rate', '5e-4'] * rank\n",
        command(work, "mixed", 2),
    )
    result = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "Traceback" not in result.stderr.partition("The ranks differ")[0]
    assert "LEARNING_RATE is 0.001 on rank 0 and 0.0005 on rank 1; code is " in result.stderr, result.stderr
    assert not (work / "mixed").exists()


def test_a_killed_run_continues_bitwise_as_if_nothing_had_happened(work, two_ranks):
    with running(command(work, "killed", 2), work / "killed" / "step_000010"):
        pass
    assert not (work / "killed" / "step_000030").exists()
    assert "continue" in trained(work, "killed", 2)
    equals_the_uninterrupted(work, "killed")
    again = trained(work, "killed", 2)
    assert "Nothing to do: 30 of 30 steps are done." in again


@pytest.mark.parametrize("order", [(1, 2), (3,)])
def test_a_run_continues_on_another_number_of_ranks(work, two_ranks, order):
    output = f"on_{order[0]}"
    go_back(work, output, 10)
    for number in order:
        if number != order[-1]:
            (work / output / "STOP").touch()  # after one step
        trained(work, output, number)
    assert checkpoints.verify(work / output / "step_000030")["world_size"] == order[-1]
    for ours, theirs in zip(metrics(work, output), metrics(work, "two"), strict=True):
        assert ours["tokens"] == theirs["tokens"] if ours["step"] else True
        assert math.isclose(ours.get("loss", 0), theirs.get("loss", 0), rel_tol=2e-5)
