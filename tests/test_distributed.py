"""distributed.py through sft_v1.py: stop, kill, hang, disagree and continue, with real torchrun and gloo processes.

bash tests/run.sh tests/test_distributed.py
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import ROOT, assert_same_run, children, go_back, run_alone, torchrun, train_command, trained

from sft.training import checkpoints

pytestmark = pytest.mark.torchrun


def kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


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
        kill([*children(process.pid), process.pid])
        process.wait()


def rank(process, number):
    """Return the process id of a rank below torchrun."""
    for pid in children(process.pid):
        if f"\0RANK={number}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return pid


def gone(pids, seconds):
    """Return whether all of `pids` have ended within so many seconds."""
    deadline = time.time() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.time() > deadline:
            return False
        time.sleep(0.01)
    return True


def started_by(path, program, line):
    """Return the torchrun command `line` with `program` run before sft_v1.py, in each rank; it is written to `path`."""
    path.write_text(
        f"import os, runpy, sys\nrank, folder = int(os.environ['RANK']), {str(ROOT)!r}\nsys.path[0] = folder\n"
        f"{program}\nrunpy.run_path(sys.path[0] + '/sft_v1.py', run_name='__main__')\n"
    )
    return [str(path) if part.endswith("sft_v1.py") else part for part in line]


# ---- Stopped in order ----


def test_a_stop_file_that_is_made_while_the_run_loads_ends_it_in_order(runs, two_ranks, tmp_path):
    stopped = go_back(two_ranks, runs / "stopped", 10)
    program = (
        f"import pathlib, export_hf\nexport_hf.dry_run = lambda base: pathlib.Path({str(stopped / 'STOP')!r}).touch()"
    )
    line = train_command(runs, "stopped", 2, RESUME="step_000010")
    result = torchrun(started_by(tmp_path / "starter.py", program, line))
    assert result.returncode == 0, result.stdout + result.stderr
    stdout = result.stdout
    assert not (stopped / "STOP").exists()
    assert checkpoints.latest_whole(stopped).name == "step_000011"
    again = shlex.split(stdout.partition("Stopped after step 11, as requested. To continue, in ")[2].splitlines()[1])
    again[again.index(str(tmp_path / "starter.py"))] = str(ROOT / "sft_v1.py")
    assert subprocess.run(again, capture_output=True, timeout=120).returncode == 0
    assert_same_run(stopped, two_ranks)


def test_a_signal_to_any_rank_ends_the_run_in_order_and_a_second_run_is_refused_meanwhile(runs, alone, capsys):
    folder, line = runs / "signalled", train_command(runs, "signalled", 2, MAX_STEPS=9999)
    with running(line, folder / "step_000010") as process:
        with pytest.raises(SystemExit):
            run_alone(alone, runs, "signalled", MAX_STEPS=9999)
        sentence = f"signalled is in use by another run (process {rank(process, 0)}). Wait for it"
        assert sentence in capsys.readouterr().err
        os.kill(rank(process, 1), signal.SIGTERM)
        stdout = process.communicate(timeout=60)[0]
        assert process.returncode == 0, stdout
    last = int(re.search(r"Stopped after step (\d+), as requested", stdout)[1])
    assert checkpoints.latest_whole(folder).name == checkpoints.checkpoint_name(last)
    following = folder / checkpoints.checkpoint_name(last // 10 * 10 + 10)
    with running(line, following) as process:
        process.send_signal(signal.SIGINT)
        stdout = process.communicate(timeout=60)[0]
        assert process.returncode == 1 and "as requested" in stdout, stdout


def test_a_slow_disk_is_no_hanging_rank_and_a_second_interrupt_ends_the_run_at_once(runs, tmp_path):
    slow = """
import time, datasets, torch.distributed.checkpoint as dcp
def slowly(owner, name, seconds):
    plain = getattr(owner, name)
    def wrapped(*args, **kwargs):
        result = plain(*args, **kwargs)
        time.sleep(seconds(*args, **kwargs))
        return result
    setattr(owner, name, wrapped)
slowly(datasets, "load_from_disk", lambda *args: 5 * (rank == 1))
def disk(*args, storage_writer, **more):
    return 25 if "step_000020" in str(storage_writer.path) else 5 * (rank == 0)
slowly(dcp, "save", disk)
"""
    line = train_command(runs, "slow", 2, COLLECTIVE_TIMEOUT_SECONDS=2)
    with running(started_by(tmp_path / "starter.py", slow, line), runs / "slow" / "step_000020.unfinished") as process:
        assert (runs / "slow" / "step_000010").is_dir()
        ranks, since = children(process.pid), time.time()
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(1)
        process.communicate(timeout=15)
        assert time.time() - since < 15 and not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert checkpoints.latest_whole(runs / "slow").name == "step_000010"


# ---- Killed and hanging ----


def test_a_run_whose_launcher_was_killed_frees_its_folder_and_continues_bitwise_past_a_damaged_checkpoint(
    runs, two_ranks
):
    killed = runs / "killed"
    with running(train_command(runs, "killed", 2), killed / "step_000020") as process:
        ranks = children(process.pid)
        process.kill()  # its ranks have no launcher now
        process.wait()
        assert gone(ranks, seconds=5)
    assert not (killed / "step_000030").exists()
    first, second = sorted((killed / "step_000020").glob("*.distcp"))  # the shards of the two ranks, swapped
    first.rename(first.with_name("x"))
    second.rename(first)
    first.with_name("x").rename(second)
    stdout = trained(runs, "killed", 2)
    assert "step_000020 is skipped: its file __0_0.distcp" in stdout
    assert f"continue   {killed}/step_000010, 10 steps done" in stdout
    assert_same_run(killed, two_ranks)


def test_torchrun_restarts_a_run_whose_rank_was_killed(runs, two_ranks):
    restarted = runs / "restarted"
    with running(train_command(runs, "restarted", 2, "--max-restarts", "3"), restarted / "step_000010") as process:
        os.kill(rank(process, 1), signal.SIGKILL)
        stdout = process.communicate(timeout=120)[0]
        assert process.returncode == 0, stdout
    assert "continue" in stdout and "Rank 0 failed in 'step " in stdout and "rank 1 last reported" in stdout
    assert_same_run(restarted, two_ranks)


def test_a_rank_that_hangs_ends_the_others_and_is_named(runs):
    line = train_command(runs, "hanging", 2, MAX_STEPS=9999, COLLECTIVE_TIMEOUT_SECONDS=3)
    with running(line, runs / "hanging" / "step_000010") as process:
        stopped, since = rank(process, 1), time.time()
        os.kill(stopped, signal.SIGSTOP)
        line = next(line for line in process.stdout if "Rank 0 stops in 's" in line)
        assert time.time() - since < 8
    assert re.search(r"rank 1 last reported [34] s ago, in '(step|saving)[^']*'. Look at the lost process", line), line


# ---- Out of memory ----

RUN_OUT = """
import time, torch, torch.distributed.checkpoint
from sft.training import distributed, model

def run_out(owner, name, phase):
    real = getattr(owner, name)
    def action(*args, **kwargs):
        if rank == 1 and phase in distributed.Progress.text():
            print("OUT AT", time.time(), flush=True)
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 23.65 GiB of which 1.00 "
                "GiB is free. Including non-PyTorch memory, this process has 22.00 GiB memory in use."
            )
        return real(*args, **kwargs)
    setattr(owner, name, action)

"""


@pytest.mark.parametrize(
    ("where", "phase"),
    [
        ("model.SFTModel, 'forward'", "the largest micro-batch"),
        ("torch.Tensor, 'backward'", "step 12"),
        ("torch.optim.AdamW, 'step'", "step 12"),
        ("model.SFTModel, 'forward'", "validation on x"),
        ("torch.distributed.checkpoint.FileSystemWriter, 'write_data'", "step 10"),
    ],
    ids=["rehearsal", "backward", "optimizer", "validation", "save"],
)
def test_a_rank_that_runs_out_of_memory_ends_all_with_one_sentence_within_seconds(runs, tmp_path, where, phase):
    line = train_command(runs, "full-" + phase.replace(" ", "-"), 2)
    program = f"{RUN_OUT}run_out({where}, {phase!r})"
    result = torchrun(started_by(tmp_path / "starter.py", program, line), timeout=120)
    seconds = time.time() - float(re.search(r"OUT AT ([\d.]+)", result.stdout)[1])
    assert result.returncode == 1 and seconds < 20
    (sentence,) = re.findall(r"Rank \d+ .*", result.stderr)  # of one rank; the other ends without a word
    assert re.match(rf"Rank 1 ran out of memory in '[^']*{phase}", sentence), sentence
    assert "23.65 GiB of which 1.00 GiB is free). Raise RESERVED_GIB" in sentence
    tracebacks = result.stderr.split("Traceback")[1:]
    assert all("ChildFailedError" in text for text in tracebacks), result.stderr  # torchrun's own


# ---- Ranks that differ ----


def test_ranks_that_differ_stop_at_start(runs, tmp_path):
    suite = tmp_path / "another"
    shutil.copytree(ROOT / "sft", suite / "sft")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, suite)
    with (suite / "sft" / "training" / "dataloader.py").open("a") as file:
        file.write("# another version\n")
    line = started_by(
        tmp_path / "starter.py",
        "sys.path[0] = [folder, " + repr(str(suite)) + "][rank]\nsys.argv += ['--learning-rate', '5e-4'] * rank\n",
        train_command(runs, "mixed", 2),
    )
    result = torchrun(line, timeout=120)
    assert result.returncode == 1 and "Traceback" not in result.stderr.partition("The ranks differ")[0]
    assert "LEARNING_RATE: 0.001 on rank 0, 0.0005 on rank 1; code: " in result.stderr, result.stderr
    assert not (runs / "mixed").exists()
