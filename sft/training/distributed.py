"""The ranks of one run: how they find each other, agree, are asked to stop, and end when one of them died or hangs.

Used by sft_v1.py under torchrun. Nothing here knows what is trained.
"""

import json
import os
import shlex
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from sft import system
from sft.training import cpu

# Torch's own limit of one collective. It has to outlast what a slow disk needs to load or save; `Watch` is the one
# that sees a dead or hanging rank early.
BACKSTOP = timedelta(hours=1)
CARD_SETTINGS = ("NCCL_P2P_DISABLE", "PYTORCH_ALLOC_CONF")  # environment that join() sets unless you did


def join(device):
    """Join the other processes of torchrun; return (torch.device of this rank, device mesh).

    The mesh has one dimension on one machine: "shard". On several it has two: "machine" (of torchrun's --nnodes), over
    which FSDP2 replicates, and "shard" inside each, so that the slow network carries one sum of gradients.
    device: "auto" | "cuda" | "cpu". Raises: SystemExit if there are too few GPUs or the ranks' links do not add up.
    """
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("Start this script with torchrun: torchrun --nproc-per-node 2 sft_v1.py")
    die_with_launcher()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        local_rank, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= cards:
            raise SystemExit(f"torchrun started more processes than the {cards} GPUs here; lower --nproc-per-node.")
        # Micro-batches of changing size would fragment fixed segments. Read when the first tensor is made.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.set_float32_matmul_precision("highest")  # no TF32: what is float32 here is so for its digits
        torch.cuda.set_device(local_rank)
        if "RTX 40" in torch.cuda.get_device_name():  # these cards have no peer-to-peer; NCCL may hang trying it
            os.environ.setdefault("NCCL_P2P_DISABLE", "1")
        if local_rank == 0:
            told = [f"{name}={os.environ[name]}" for name in CARD_SETTINGS if name in os.environ]
            print(f"{torch.cuda.get_device_name()}: {', '.join(told)}", flush=True)
        card = torch.device("cuda", local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=card, timeout=BACKSTOP, **meeting())
    else:
        cpu.keep_memory()
        dist.init_process_group("gloo", timeout=BACKSTOP, **meeting())
    device = torch.device(device, torch.cuda.current_device() if device == "cuda" else None)
    probe = torch.full((1024,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(probe)
    expected = dist.get_world_size() * (dist.get_world_size() + 1) / 2
    if not bool((probe == expected).all()):
        raise SystemExit(
            f"A test sum over the ranks is wrong: {probe[0]} instead of {expected}. Check the GPUs' links."
        )
    machines, ranks = int(os.environ.get("GROUP_WORLD_SIZE", "1")), dist.get_world_size()
    if machines == 1:
        return device, init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    if ranks != machines * int(os.environ["LOCAL_WORLD_SIZE"]):
        raise SystemExit(f"{ranks} ranks on {machines} machines: start the same --nproc-per-node on each.")
    return device, init_device_mesh(device.type, (machines, ranks // machines), mesh_dim_names=("machine", "shard"))


def meeting():
    """Return where the ranks find each other, as arguments of init_process_group: torchrun's store, new per attempt.

    torchrun keeps one store over its restarts (torch 2.13). Without the prefix a restarted rank reads the address that
    a dead one left there, and waits for it. On several machines the attempts are counted apart, so README's command
    for them switches the keeping off.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=BACKSTOP))
    return {"store": dist.PrefixStore(attempt(), store), "rank": rank, "world_size": size}


def attempt():
    """Return the name of torchrun's present attempt, the same on every rank."""
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if one_machine else "attempt"


def die_with_launcher():
    """Have the kernel kill this process when torchrun dies: alone it would train on and hold the folder and the GPU."""
    if sys.platform != "linux":
        return
    system.end_with_parent()
    # torchrun may have died while this process was importing; its children then belong to init or systemd. An orphan
    # would join the next run on the same port.
    try:
        parent = os.path.basename(os.readlink(f"/proc/{os.getppid()}/exe"))
    except OSError:  # another user's process
        parent = "init"
    if "python" not in parent:
        raise SystemExit(f"torchrun has died: this process belongs to {parent} now. Run the same command again.")


# ==== Agreement ====


def end_all(sentence):
    """End every rank with exit code 1, after rank 0 has said why. All ranks call it with the same `sentence`."""
    if dist.get_rank() == 0:
        print(sentence, file=sys.stderr, flush=True)
    on_every_rank(None)  # torchrun stops the others as soon as one has ended
    raise SystemExit(1)


def on_rank0(action):
    """Run `action()` on rank 0 and return its result there, None elsewhere. Its refusal ends all ranks, said once."""
    result = refusal = None
    if dist.get_rank() == 0:
        try:
            result = action()
        except (SystemExit, OSError) as error:
            refusal = str(error)
    if refusal := on_every_rank(refusal)[0]:
        end_all(refusal)
    return result


def agree_on(facts):
    """End all ranks, with the difference named, unless `facts` (dict of name to value) are the same on each."""
    everyone = on_every_rank(facts)
    different = [
        f"{name} is {everyone[0].get(name)} on rank 0 and {value} on rank {rank}"
        for rank, theirs in enumerate(everyone)
        for name, value in theirs.items()
        if value != everyone[0].get(name)
    ]
    if different:
        end_all(f"The ranks differ: {'; '.join(different)}. Start all of them with the same files and flags.")


def check_shared(folder, name):
    """End all ranks if one of them does not see the file `name` that rank 0 has in `folder`."""
    seen = on_every_rank((Path(folder) / name).exists())
    if not all(seen):
        end_all(
            f"Rank {seen.index(False)} does not see {folder}/{name}, which rank 0 wrote: the folder must be on a disk "
            "that all machines share."
        )


# ==== Stopping in order ====


class Stop:
    """Notes that this run was asked to end after its step: SIGTERM, SIGINT, or a file STOP in its folder."""

    def __init__(self, folder):
        self.file = Path(folder) / "STOP"
        self.signalled = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame):
        """Take the wish down; a second SIGINT then ends the process at once.

        torchrun hands a second Ctrl-C on as SIGTERM. After a SIGTERM another one is no second wish: systemd sends one
        to every process, and torchrun passes on its own.
        """
        self.signalled = True
        for again in (signal.SIGINT, signal.SIGTERM) if number == signal.SIGINT else (signal.SIGINT,):
            signal.signal(again, signal.SIG_DFL)

    def asked(self):
        """Return whether this rank knows of a wish to stop; the ranks still have to agree on it."""
        return self.signalled or (dist.get_rank() == 0 and self.file.exists())

    def done(self):
        """Remove the file and return the command that continues the run."""
        if dist.get_rank() == 0:
            self.file.unlink(missing_ok=True)
        try:
            launcher = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
        except OSError:  # no Linux
            return "the same torchrun command"
        # The name of an older checkpoint would be refused now that there are newer ones; the last flag wins.
        return shlex.join(launcher + ["--resume", "newest"] * ("--resume" in " ".join(launcher)))


# ==== A rank that died or hangs ======


class Place:
    """Where this rank is, for `Watch`: set by `at`, read from the watching thread."""

    name, part, patient, moves = "start", "", True, 0


def at(name=None, part="", patient=False):
    """Say where this rank is now: a new place, or only a new `part` of the place it is in.

    patient: the place takes as long as its disk needs (loading, saving): only a rank that fell silent counts there.
    """
    if name:
        Place.name, Place.patient = name, patient
    Place.part = part
    Place.moves += 1


class Watch:
    """Tells the other ranks once a second that this one lives and where it is, and ends it when they do not move.

    A rank is lost when nothing is heard from it (killed, stopped, its machine gone) for `limit_seconds`, anywhere. All
    ranks hang when none of them comes to a new place for so long, except where a place is patient. The thread talks
    through torchrun's store: a collective could not report that collectives hang.
    """

    def __init__(self, limit_seconds):
        self.limit, self.beat = limit_seconds, min(1.0, limit_seconds / 10)
        self.me, self.size = dist.get_rank(), dist.get_world_size()
        self.heard = {rank: (time.monotonic(), ["start", True, 0, 0]) for rank in range(self.size)}
        self.moved, self.ended = time.monotonic(), threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self):
        if self.size > 1:
            self.thread.start()
        return self

    def __exit__(self, kind, error, trace):
        if kind and issubclass(kind, Exception) and self.size > 1:
            time.sleep(4 * self.beat)  # long enough to notice whose beats are missing
            self.say("failed", 3 * self.beat)
        self.ended.set()
        if self.size > 1:  # a thread that is inside torch when Python ends aborts the process
            self.thread.join(timeout=10)

    def run(self):
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = dist.PrefixStore(f"watch_{attempt()}", dist.TCPStore(address, port, is_master=False))
            beats = 0
            while not self.ended.wait(self.beat):
                place = ", ".join(filter(None, (Place.name, Place.part)))
                store.set(str(self.me), json.dumps([place, Place.patient, Place.moves, beats := beats + 1]))
                self.listen(store)
                still = time.monotonic() - self.moved
                if self.silent(self.limit) or (still > self.limit and not Place.patient):
                    self.say("stops", self.limit)
                    os._exit(1)  # the main thread is inside a collective that never ends
        except (RuntimeError, dist.DistError) as error:
            if not self.ended.is_set():
                print(f"Rank {self.me} lost torchrun's store and is no longer watched: {error}", file=sys.stderr)

    def listen(self, store):
        """Note what is new from each rank, and when."""
        for rank, (_, last) in self.heard.items():
            now = json.loads(store.get(str(rank))) if store.check([str(rank)]) else last
            if now != last:
                self.heard[rank] = time.monotonic(), now
                if now[2] != last[2]:
                    self.moved = time.monotonic()

    def silent(self, seconds):
        """Return the ranks that were not heard for `seconds`."""
        return [rank for rank, (when, _) in self.heard.items() if time.monotonic() - when > seconds and rank != self.me]

    def say(self, what, seconds):
        """Print why this rank ends, and where it and the others are."""
        silent = self.silent(seconds)
        now = time.monotonic()
        lost = [
            f"rank {r} was last heard {now - self.heard[r][0]:.0f} s ago in {self.heard[r][1][0]!r}" for r in silent
        ]
        rest = [
            f"rank {r} is in {text[0]!r}" for r, (_, text) in self.heard.items() if r not in silent and r != self.me
        ]
        cause = "Look at the lost process, its GPU and its machine" if lost else "See the error of the rank that failed"
        if what == "stops" and not lost:
            rest.append(f"none moved for {now - self.moved:.0f} s")
            cause = "Raise COLLECTIVE_TIMEOUT_SECONDS if one micro-batch may take that long here"
        where = ", ".join(filter(None, (Place.name, Place.part)))
        print(
            f"Rank {self.me} {what} in {where!r}: {'; '.join(lost + rest)}. {cause}; then run the same command again.",
            file=sys.stderr,
            flush=True,
        )


def on_every_rank(value):
    """Return the list of every rank's `value` (any small picklable object), in rank order. All ranks must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def together(action):
    """Run `action()` on every rank; if it fails anywhere, raise OSError with every rank's reason on all of them."""
    reason = None
    try:
        result = action()
    except (Exception, dcp.CheckpointException) as error:  # the others would wait for a rank that failed alone
        reason = f"{type(error).__name__}: {error}"
    reasons = [f"rank {rank}: {text}" for rank, text in enumerate(on_every_rank(reason)) if text]
    if reasons:
        raise OSError("; ".join(reasons))
    return result
