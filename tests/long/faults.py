"""Kill a training run hundreds of times, damage its checkpoints, and check that nothing is lost and nothing is wrong.

Writes  a temporary folder, removed at the end, and one line per fault.

    python tests/long/faults.py                 200 kills, about 20 minutes on two CPU cores
    python tests/long/faults.py --quick         8 kills

A small random Llama trains on two CPU processes and saves every other step, beside training. It is killed at chosen
points of a run and at random times: one rank, all of them, or the launcher. Then the same command is started again.
Some finished checkpoints are damaged in between. After each kill the latest whole checkpoint must be at least the one
before the kill, the one with the lowest validation loss must still be there, and every checkpoint must equal, byte for
byte, the one that an uninterrupted run wrote at that step. That run saves while training waits.

Most runs are forked from this process, which has imported torch already: `Launcher` plays torchrun and does to the
ranks what torchrun does. One run in twenty goes through torchrun itself.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import common  # puts the suite on the path

import sft_v1
from sft import settings, system
from sft.training import checkpoints, dataloader, distributed
from sft.training import model as sft_model

# ---- Faults ----
KILLS = 200  # processes or groups of processes killed before the result is printed
SEED = 0  # of the times, points, victims and damages
QUICK = False  # 8 kills
STEPS = 40  # optimizer steps of one round; a finished round is checked, and the next one starts
SAVE_EVERY = 2  # optimizer steps

# ==== A small model and its data, in the formats of the suite ====

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def make_input(folder):
    """Write `folder`/base and `folder`/data: a random Llama and 64 random sequences."""
    common.write_inputs(folder, SHAPE, np.random.default_rng(0).integers(8, 32, 64))


def in_a_child(action):
    """Run `action()` in a forked process: this one must not have torch's threads when it forks ranks."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("The input of the runs could not be made.")


def flags(folder, output, steps, save_every, keep=3, async_save="on"):
    """Return the trainer's flags for a run of `folder`'s base and data into `folder`/`output`."""
    chosen = {
        "--data-dir": folder / "data",
        "--resized-model": folder / "base",
        "--checkpoint-dir": folder / output,
        "--max-steps": steps,
        "--save-every": save_every,
        "--keep-checkpoints": keep,
        "--async-save": async_save,
        "--validate-every": 10,
        "--warmup-steps": 3,
        "--sequences-per-step": 8,
        "--tokens-per-micro-batch": 64,
        "--compute-dtype": "float32",
        "--learning-rate": 1e-3,
        "--device": "cpu",
        "--collective-timeout-seconds": 30,
    }
    return common.flags(chosen)


# ==== Where a run is killed ====


def wrap(owner, name, when, before=True):
    """Return a function that has `owner.name` call its argument before or after the calls for which `when` holds."""

    def install(strike):
        plain = getattr(owner, name)

        def wrapped(*args, **kwargs):
            chosen = when(*args, **kwargs)
            if chosen and before:
                strike()
            result = plain(*args, **kwargs)
            if chosen and not before:
                strike()
            return result

        setattr(owner, name, wrapped)

    return install


def staged(path, *_):
    return path.name.startswith("step_") and path.name.endswith(".unfinished")


def passed_start(*_):
    """Return True for each staging but the first, which takes the memory at the start of a run."""
    passed_start.calls += 1
    return passed_start.calls > 1


passed_start.calls = 0


def half_deleted(strike):
    """Have the deletion of an old checkpoint take one file away, then strike."""
    plain = shutil.rmtree

    def rmtree(path, *args, **kwargs):
        # A save also removes what is left under its own names; usually there is nothing.
        if Path(path).is_dir() and re.fullmatch(r"step_\d+", Path(path).name):
            sorted(Path(path).iterdir())[-1].unlink()
            strike()
        plain(path, *args, **kwargs)

    shutil.rmtree = rmtree


# Point -> (the rank in which it is reached, what installs it there)
POINTS = {
    "as the write begins": (0, wrap(checkpoints, "save", lambda *a: True)),
    "between the files of a save": (1, wrap(dcp.FileSystemWriter, "write_data", lambda *a: True)),
    "inside one rank's file": (1, wrap(torch, "save", lambda *a: True)),
    "after one rank's file": (0, wrap(dcp.FileSystemWriter, "write_data", lambda *a: True, before=False)),
    "while a rank hashes its file": (1, wrap(system, "sha256", lambda path: ".unfinished/__1_" in str(path))),
    "between the writes and the state": (0, wrap(checkpoints, "seal", lambda *a: True)),
    "before the marker": (0, wrap(Path, "write_text", lambda path, *a, **k: path.name == checkpoints.MANIFEST)),
    "after the marker": (0, wrap(Path, "write_text", lambda path, *a, **k: path.name == checkpoints.MANIFEST, False)),
    "before the rename": (0, wrap(Path, "rename", staged)),
    "after the rename": (0, wrap(Path, "rename", staged, before=False)),
    "while an old checkpoint is deleted": (0, half_deleted),
    "before a save": (0, wrap(DefaultStager, "stage", passed_start)),
    "after staging": (1, wrap(DefaultStager, "stage", passed_start, before=False)),
    "while a save is waited for": (0, wrap(checkpoints.Saver, "finish", lambda saver: bool(saver.writing))),
    "as a save is reported": (0, wrap(checkpoints.Saver, "report", lambda saver: True)),
    "while run.json is written": (0, wrap(Path, "replace", lambda path, target: path.name == "run.json.unfinished")),
    "while metrics.jsonl is written": (
        0,
        wrap(Path, "replace", lambda path, t: path.name == "metrics.jsonl.unfinished"),
    ),
    "loading the data": (1, wrap(dataloader, "load_data", lambda *a: True)),
    "loading the model": (0, wrap(sft_model, "load_model", lambda *a: True)),
    "loading a checkpoint": (1, wrap(dcp, "load", lambda *a, **k: True)),
    "first step": (0, wrap(sft_v1, "train_step", lambda *a: True)),
    "mid-step": (
        1,
        wrap(distributed, "heartbeat", lambda phase=None, part="", patient=False: part.startswith("micro-batch 2")),
    ),
}
ONCE = [p for p in POINTS if p.startswith(("loading", "while run", "while metrics"))]  # points that a start passes once
VICTIMS = ("rank 0", "rank 1", "all", "launcher")


def strike_from_inside(victim, passes):
    """Return what kills `victim` ("itself", "all", "launcher") at its `passes`-th call. Runs inside a rank."""
    left = [passes]

    def strike():
        left[0] -= 1
        if left[0] == 0:
            if victim == "all":
                os.killpg(0, signal.SIGKILL)
            os.kill(os.getppid() if victim == "launcher" else os.getpid(), signal.SIGKILL)
            time.sleep(60)  # a launcher's death ends this process within a moment

    return strike


# ==== Runs ====


class Launcher:
    """Does for forked ranks what torchrun does for its own: store, environment, end of all when one has failed."""

    def __init__(self, arguments, log, point=None, victim="itself", passes=1, size=2, restarts=0):
        self.arguments, self.log, self.size, self.restarts = arguments, log, size, restarts
        self.point, self.victim, self.passes = point, victim, passes
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            os.setpgid(0, 0)
            code = 1
            with contextlib.suppress(BaseException):
                code = self.launch(writer)
            os._exit(code)
        os.close(writer)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(self.pid, self.pid)
        self.ranks = [int(n) for n in os.fdopen(reader).readline().split()]  # of the first attempt

    def launch(self, writer):
        for attempt in range(self.restarts + 1):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            started = [self.start(rank, port, attempt) for rank in range(self.size)]
            store = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
            if attempt == 0:
                os.write(writer, f"{' '.join(map(str, started))}\n".encode())
                os.close(writer)
            failed = self.follow(started)
            del store
            if not failed:
                return 0
        return 1

    def start(self, rank, port, attempt):
        pid = os.fork()
        if pid:
            return pid
        handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.size)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ |= {"TORCHELASTIC_RESTART_COUNT": str(attempt), "OMP_NUM_THREADS": "1"}
        if self.point and attempt == 0 and POINTS[self.point][0] == rank:
            POINTS[self.point][1](strike_from_inside(self.victim, self.passes))
        code = 1
        try:
            sys.argv = ["sft_v1.py", *self.arguments]
            sft_v1.main(settings.from_flags(vars(sft_v1)))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            print(end.code, file=sys.stderr)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def follow(self, started):
        """Wait for the ranks; end the others when one fails, as torchrun does. Returns whether one failed."""
        left, failed, deadline = set(started), False, None
        while left:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                left.discard(pid)
                if status and not failed:
                    failed, deadline = True, time.monotonic() + 30
                    for other in left:
                        os.kill(other, signal.SIGTERM)
                continue
            if deadline and time.monotonic() > deadline:
                for other in left:
                    os.kill(other, signal.SIGKILL)
            time.sleep(0.01)
        return failed

    def wait(self, seconds=120):
        """Return the exit code (negative: the signal), after all ranks are gone too."""
        deadline = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutError(f"the run did not end within {seconds} s: {Path(self.log).read_text()[-3000:]}")
            time.sleep(0.01)
        gone(self.ranks)
        return os.waitstatus_to_exitcode(status)

    def kill(self, victim):
        """Kill one rank, the launcher, or everything."""
        with contextlib.suppress(ProcessLookupError):
            if victim == "all":
                os.killpg(self.pid, signal.SIGKILL)
            else:
                os.kill(self.pid if victim == "launcher" else self.ranks[int(victim[-1])], signal.SIGKILL)


def running(pid):
    """Return whether a process lives; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pids, seconds=40):
    """Wait until no process of `pids` lives. Raises: TimeoutError."""
    deadline = time.monotonic() + seconds
    while any(running(pid) for pid in pids):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {[pid for pid in pids if running(pid)]} outlive their launcher")
        time.sleep(0.01)


class Torchrun:
    """The same run through torchrun itself."""

    def __init__(self, arguments, log, restarts=0):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", "localhost:0", "--max-restarts", str(restarts), str(common.ROOT / "sft_v1.py")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(log, "a") as file:
            self.process = subprocess.Popen([*command, *arguments], stdout=file, stderr=file, env=environment)
        self.pids = {}

    def ranks(self):
        """Return {rank: pid} of the processes below torchrun."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for pid in path.read_text().split() if path.exists() else ():
            with contextlib.suppress(OSError):
                rank = re.search(rb"\0RANK=(\d)", Path(f"/proc/{pid}/environ").read_bytes())
                if rank:
                    self.pids[int(rank[1])] = int(pid)
        return self.pids

    def kill(self, victim):
        pids = self.ranks()
        chosen = {"all": [self.process.pid, *pids.values()], "launcher": [self.process.pid]}
        for pid in chosen.get(victim) or [pids.get(int(victim[-1]), self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self, seconds=180):
        code = self.process.wait(seconds)
        gone(self.pids.values())
        return code


# ==== Damage ====


def truncate(checkpoint, rng):
    path = rng.choice(sorted(checkpoint.iterdir()))
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip(checkpoint, rng):
    path = rng.choice(sorted(checkpoint.iterdir()))
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def delete(checkpoint, rng):
    rng.choice(sorted(checkpoint.iterdir())).unlink()


def swap(checkpoint, rng):
    first, second = sorted(checkpoint.glob("*.distcp"))[:2]
    first.rename(checkpoint / "between")
    second.rename(first)
    (checkpoint / "between").rename(second)


DAMAGES = (truncate, flip, delete, swap)


def digests(checkpoint):
    """Return the digest of each tensor file of a checkpoint; those of two equal runs are equal."""
    entries = json.loads((checkpoint / checkpoints.MANIFEST).read_text())
    return {name: digest for name, (_, digest) in entries.items() if name.endswith(".distcp")}


def record(run):
    """Return metrics.jsonl without what a clock decides."""
    timing = ("step_seconds", "tokens_per_second", "trainable_tokens_per_second", "data_seconds", "mfu")
    timing += ("allocated_gib", "reserved_gib", "allocation_retries")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timing} for line in lines]


# ==== Check ====


class Check:
    """Counts what was done to the run and what came of it."""

    def __init__(self, folder, steps, save_every, seed):
        self.folder, self.steps, self.save_every, self.rng = folder, steps, save_every, random.Random(seed)
        self.counts = dict.fromkeys(("kills", "saves_interrupted", "corruptions", "caught", "lost", "wrong"), 0)
        self.rounds, self.log = 0, folder / "log"
        self.pending = None  # the checkpoint that was damaged, until a start has seen it
        self.reached, self.damaged = "", set()  # in this round: the latest whole one so far, the names of damaged ones
        in_a_child(lambda: make_input(folder))
        started = time.monotonic()
        if Launcher(flags(folder, "whole", steps, save_every, keep=steps, async_save="off"), self.log).wait():
            raise SystemExit(f"The uninterrupted run failed: {self.log.read_text()[-3000:]}")
        self.seconds = time.monotonic() - started
        self.whole = {path.name: digests(path) for path in checkpoints.listed(folder / "whole")}
        self.losses = {path.name: checkpoints.loss_of(path) for path in checkpoints.listed(folder / "whole")}

    @property
    def run(self):
        return self.folder / f"round_{self.rounds}"

    def latest(self):
        return checkpoints.latest_whole(self.run, say=lambda text: None)

    def arguments(self):
        return flags(self.folder, self.run.name, self.steps, self.save_every)

    def kill(self, point, victim, passes=1):
        """Start the run, kill `victim` at `point` (None: at a random time), and check what is left."""
        self.log.write_text("")
        before = self.latest()
        if point is None:
            launcher = Launcher(self.arguments(), self.log)
            time.sleep(self.rng.uniform(0, 1.1 * self.seconds))
            launcher.kill(victim)
        else:
            launcher = Launcher(self.arguments(), self.log, point, victim, passes)
        self.check(launcher.wait(), before, f"{victim} killed at {point or 'a random time'}")

    def kill_torchrun(self, victim):
        self.log.write_text("")
        before, launcher = self.latest(), Torchrun(self.arguments(), self.log)
        deadline = time.monotonic() + self.rng.uniform(5, 11)
        while time.monotonic() < deadline and launcher.process.poll() is None:
            launcher.ranks()
            time.sleep(0.05)
        launcher.kill(victim)
        self.check(launcher.wait(), before, f"{victim} killed at a random time under torchrun")

    def check(self, code, before, what):
        """Compare what the run left with the uninterrupted one."""
        if code:
            self.counts["kills"] += 1
        text = self.log.read_text()
        if self.pending:
            self.see_through(text, before)
        left = self.latest()
        behind = before is not None and (left is None or left.name < before.name)
        staging = list(self.run.glob("step_*.unfinished"))
        unfinished = staging or "after the rename" in what or "deleted" in what
        self.counts["saves_interrupted"] += bool(code and unfinished)
        self.reached = max(self.reached, left.name if left else "")
        missing = self.missing_best()
        self.counts["lost"] += behind or bool(missing)
        wrong = [p.name for p in checkpoints.listed(self.run) if not checkpoints.defect(p) and self.differs(p)]
        self.counts["wrong"] += len(wrong)
        took = re.findall(r"^continue .*/(step_\d+)", text, re.MULTILINE)
        if took and (before is None or took[0] != before.name):
            self.counts["wrong"] += 1
            wrong.append(f"took {took[0]} instead of {before}")
        print(
            f"{self.counts['kills']:4}  {what}: exit {code}, {left.name if left else 'no checkpoint'}"
            f"{' LOST ' + str(before) if behind else ''}{' LOST the best, ' + missing if missing else ''}"
            f"{' WRONG ' + str(wrong) if wrong else ''}",
            flush=True,
        )
        if behind or missing or wrong:
            print(text[-3000:])
        if code == 0:
            self.finish()

    def missing_best(self):
        """Return the name of the round's best checkpoint if it is not there and whole, else None.

        A damaged one is none of ours to keep, and it may have released the best one before it.
        """
        losses = {name: loss for name, loss in self.losses.items() if loss is not None and name <= self.reached}
        best = min(losses, key=losses.get, default=None)
        return best if best not in {None, *self.damaged} and checkpoints.defect(self.run / best) else None

    def differs(self, checkpoint):
        return digests(checkpoint) != self.whole[checkpoint.name]

    def finish(self):
        """Check a finished round, and start the next."""
        equal = record(self.run) == record(self.folder / "whole")
        last = checkpoints.checkpoint_name(self.steps)
        if not equal or checkpoints.defect(self.run / last) or self.differs(self.run / last):
            self.counts["wrong"] += 1
            print(f"WRONG: {self.run} ended with other {'weights' if equal else 'metrics'}")
        shutil.rmtree(self.run)
        self.rounds += 1
        self.pending = None
        self.reached, self.damaged = "", set()

    def damage(self):
        """Damage the latest checkpoint, if the one before it is whole, too."""
        whole = [path for path in checkpoints.listed(self.run) if not checkpoints.defect(path)]
        if len(whole) > 1 and not self.pending:
            damage = self.rng.choice(DAMAGES)
            damage(whole[0], self.rng)
            self.counts["corruptions"] += 1
            self.pending = whole[0]
            self.damaged.add(whole[0].name)
            print(f"      {damage.__name__}: {whole[0].name}", flush=True)

    def see_through(self, text, before):
        """Count a damage as caught when a start has named it, or when a save has replaced it unread."""
        if f"{self.pending} is skipped" in text:
            self.counts["caught"] += 1
            self.pending = None
        elif f"{self.pending}, " in text:
            self.counts["wrong"] += 1
            self.pending = None

    def to_the_end(self):
        """Run the last round to its end without a fault."""
        self.log.write_text("")
        before = self.latest()
        code = Launcher(self.arguments(), self.log).wait()
        if code:
            self.counts["lost"] += 1
            print(f"The run does not continue: {self.log.read_text()[-3000:]}")
        else:
            self.check(code, before, "no fault")


def check(folder, kills, steps, save_every, seed, through_torchrun):
    """Do `kills` kills in `folder`, at each point in turn and at random times; return the counts."""
    check, turn = Check(Path(folder), steps, save_every, seed), 0
    while check.counts["kills"] < kills:
        if through_torchrun and turn % 20 == 19:
            check.kill_torchrun(check.rng.choice(VICTIMS))
        elif turn % 3 == 2:
            check.kill(None, check.rng.choice(VICTIMS))
        else:
            point = list(POINTS)[(turn // 3 * 2 + turn % 3) % len(POINTS)]
            passes = 1 if point in ONCE else check.rng.choice((1, 1, 2, 3))
            check.kill(point, check.rng.choice(("itself", "all", "launcher")), passes)
        if check.rng.random() < 0.3:
            check.damage()
        turn += 1
    check.to_the_end()
    return check.counts


def main():
    common.machine()
    with tempfile.TemporaryDirectory() as folder:
        counts = check(folder, 8 if QUICK else KILLS, STEPS, SAVE_EVERY, SEED, not QUICK)
    common.result(**counts)
    if counts["lost"] or counts["wrong"] or counts["caught"] != counts["corruptions"]:
        raise SystemExit("A checkpoint was lost or wrong. The lines above name it.")


if __name__ == "__main__":
    settings.from_flags(globals())
    main()
