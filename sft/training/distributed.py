"""The ranks of one run: how they find each other, exchange values, stop in order, and end when one died or hangs.

Used by sft_v1.py under torchrun. Nothing here knows what is trained.
"""

import json
import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from sft import system
from sft.training import cpu

# Torch's own limit of one collective. It has to outlast what a slow disk needs to load or save; `Watchdog` is the one
# that sees a dead or hanging rank early.
BACKSTOP = timedelta(hours=1)
STOP = "STOP"  # file in the run's folder that ends the run
CARD_SETTINGS = ("NCCL_P2P_DISABLE", "PYTORCH_ALLOC_CONF")  # environment that join() sets unless you did
# How torch and NCCL, cuBLAS, and torch on a CPU spell it. Only the first has a class of its own.
OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")

# torch 2.13 has new names for both and warns of the ones that 2.11 has.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# ==== Start ====


def join(device):
    """Join the other processes of torchrun; return (torch.device of this rank, device mesh).

    The mesh has one dimension on one machine: "shard". On several it has two: "machine" (of torchrun's --nnodes), over
    which FSDP2 replicates, and "shard" inside each, so that the slow network carries one sum of gradients.
    device: "auto" | "cuda" | "cpu". Raises: SystemExit if there are too few GPUs, torch cannot use them, or the ranks'
    links do not add up.
    """
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("Start this script with torchrun: torchrun --nproc-per-node 2 sft_v1.py")
    end_with_launcher()
    if system.choose_device(device, "--device cpu") == "cuda":
        device = set_up_card()
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, timeout=BACKSTOP, **rendezvous())
    else:
        device = torch.device("cpu")
        cpu.set_up_memory()
        dist.init_process_group("gloo", timeout=BACKSTOP, **rendezvous())
    check_links(device)
    machines, ranks = int(os.environ.get("GROUP_WORLD_SIZE", "1")), dist.get_world_size()
    if machines == 1:
        return device, init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    if ranks != machines * int(os.environ["LOCAL_WORLD_SIZE"]):
        raise SystemExit(f"{ranks} ranks on {machines} machines: start the same --nproc-per-node on each.")
    return device, init_device_mesh(device.type, (machines, ranks // machines), mesh_dim_names=("machine", "shard"))


def set_up_card():
    """Choose and configure this rank's GPU; return its torch.device."""
    local_rank, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= cards:
        raise SystemExit(f"torchrun started more processes than the {cards} GPUs here; lower --nproc-per-node.")
    # Micro-batches of changing size would fragment fixed segments. Torch reads this when it makes the first tensor.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    torch.set_float32_matmul_precision("highest")  # no TF32: float32 is used here for precision
    torch.cuda.set_device(local_rank)
    name = torch.cuda.get_device_name()
    if "RTX 40" in name:  # these cards have no peer-to-peer; NCCL may hang trying it
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
    if local_rank == 0:
        values = [f"{setting}={os.environ[setting]}" for setting in CARD_SETTINGS if setting in os.environ]
        print(f"{name}: {', '.join(values)}", flush=True)
    return torch.device("cuda", local_rank)


def check_links(device):
    """Raise SystemExit unless sums over the ranks are right: broken links between GPUs have given wrong ones.

    It runs each collective of a step, so that NCCL has its memory before the free memory is planned.
    """
    ranks = dist.get_world_size()
    probe = torch.full((1024 * ranks,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(probe)
    share = torch.empty(1024, device=device)
    reduce_scatter(share, probe)
    all_gather(probe, share)
    expected = ranks * ranks * (ranks + 1) / 2
    if not bool((probe == expected).all()):
        raise SystemExit(
            f"A test sum over the ranks is wrong: {probe[0]} instead of {expected}. Check the GPUs' links."
        )


def rendezvous():
    """Return where the ranks find each other, as arguments of init_process_group: torchrun's store, new per attempt.

    torchrun keeps one store over its restarts (torch 2.13). Without the prefix a restarted rank reads the address that
    a dead one left there, and waits for it. On several machines each counts its own attempts, so set
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 there.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=BACKSTOP))
    return {"store": dist.PrefixStore(attempt_prefix(), store), "rank": rank, "world_size": size}


def attempt_prefix():
    """Return the name of torchrun's present attempt, the same on every rank."""
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if one_machine else "attempt"


def end_with_launcher():
    """Make the kernel kill this process when torchrun dies: alone it would train on and keep the folder and the GPU."""
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


# ==== What all ranks do together ====


def alone():
    """Return whether this process is the run's only rank."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def on_every_rank(value, group=None):
    """Return the list of every rank's `value` (any small picklable object), in rank order. All ranks must call it.

    group: the process group that carries it, of all ranks: in another thread than training's, one of its own.
    """
    if alone():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def on_rank0(action):
    """Run `action()` on rank 0 and return its result (a small picklable object) on every rank. All ranks must call it.

    A refusal of the action (SystemExit or OSError) ends all ranks and is printed once.
    """
    return run_where(dist.get_rank() == 0, action)[0]


def on_each_machine(action):
    """Run `action()` on one rank of each machine. All ranks must call it; a refusal ends them, as in `on_rank0`."""
    run_where(os.environ.get("LOCAL_RANK", "0") == "0", action)


def run_where(here, action):
    """Run `action()` on the ranks whose `here` is true; return every rank's result. The first refusal ends all."""
    result = refusal = None
    if here:
        try:
            result = action()
        except (SystemExit, OSError) as error:
            refusal = str(error)
    answers = on_every_rank((result, refusal))
    for rank, (_, refusal) in enumerate(answers):
        if refusal is not None:
            end_all(refusal if rank == 0 else f"Rank {rank}: {refusal}")
    return [result for result, _ in answers]


def together(action, group=None):
    """Run `action()` on every rank; return the list of their results (small picklable objects), in rank order.

    If it fails anywhere, raise OSError with every rank's reason on all of them. group: as in `on_every_rank`.
    """
    result, failures = None, {}
    try:
        result = action()
    except (Exception, dcp.CheckpointException) as error:  # the others would wait for a rank that failed alone
        if own := memory_error(error):
            raise own from None  # `Watchdog.end_all` ends the others
        failures = {rank: f"{type(reason).__name__}: {reason}" for rank, reason in errors_of(error).items()}
    answers = on_every_rank((result, failures), group)
    if failures := {rank: text for _, reported in answers for rank, text in reported.items()}:
        raise OSError("; ".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
    return [result for result, _ in answers]


def errors_of(error):
    """Return {rank: its exception}: `error` of this rank, or those of all ranks that DCP has collected in it."""
    if isinstance(error, dcp.CheckpointException):
        return {rank: reason for rank, (reason, _) in error.failures.items()}
    return {dist.get_rank() if dist.is_initialized() else 0: error}


def memory_error(error):
    """Return the error of this rank that says that memory ran out: `error`, one inside of DCP's, or None."""
    own = errors_of(error).get(dist.get_rank() if dist.is_initialized() else 0)
    ran_out = isinstance(own, RuntimeError) and any(words in str(own) for words in OUT_OF_MEMORY)
    return own if ran_out else None


def end_all(sentence):
    """End every rank with exit code 1, after rank 0 has said why. All ranks call it with the same `sentence`."""
    if dist.get_rank() == 0:
        print(sentence, file=sys.stderr, flush=True)
    on_every_rank(None)  # torchrun stops the others as soon as one has ended
    raise SystemExit(1)


def check_same(values):
    """End all ranks, with the differences named, unless `values` (dict of name to value) are the same on each."""
    everyone = on_every_rank(values)
    different = []
    for rank, theirs in enumerate(everyone):
        different += system.differences(everyone[0], theirs, "on rank 0", f"on rank {rank}")
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


class ReduceInOnePool:
    """FSDP2's reduction of gradients, with its result in the memory pool of the stream that computes.

    torch's allocator keeps a pool for each stream. FSDP2 allocates the sharded gradients under the stream of the
    reductions: 1.9 GiB at 1B on two cards that no other tensor can use, next to the unsharded gradients that a block
    has just freed. That stream has waited for the computing one right before, and the computing stream waits for it
    before the gradients are used or freed, so no memory is written while another stream still reads it.
    Only for one reduction in a step: the results of further ones are added to the gradients and freed at once, and the
    computing stream, which has not waited for that sum, would write to their memory.
    """

    def allocate(self, size, *, dtype, device):
        """Return an empty tensor of `size`: the buffers of a reduction."""
        with torch.cuda.stream(torch.cuda.default_stream(device)):
            return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        """Sum `input_tensor` over the ranks of `group`, this rank's share of it into `output_tensor`."""
        return reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


# ==== Stopping in order ====


class Stop:
    """Notes a request to end the run after its step: SIGTERM, SIGINT, or a file STOP in its folder."""

    def __init__(self, folder):
        self.file = Path(folder) / STOP
        self.signalled = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame):
        """Note the request; a second SIGINT then ends the process at once.

        torchrun passes a second Ctrl-C on as SIGTERM. After a SIGTERM another one is no second request: systemd sends
        one to every process, and torchrun passes on its own.
        """
        self.signalled = True
        at_once = (signal.SIGINT, signal.SIGTERM) if number == signal.SIGINT else (signal.SIGINT,)
        for again in at_once:
            signal.signal(again, signal.SIG_DFL)

    def requested(self):
        """Return whether this rank knows of a request to stop; the ranks still have to agree on it."""
        return self.signalled or (dist.get_rank() == 0 and self.file.is_file())


def clear_stop(folder):
    """Remove the file STOP in `folder`; a folder of that name is no request, and stays."""
    if (Path(folder) / STOP).is_file():
        (Path(folder) / STOP).unlink()


def restarted():
    """Return whether torchrun's --max-restarts started this rank again: it goes on with what the first start began."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def resume_command():
    """Return the command that continues this run: torchrun's own, as a line for the shell."""
    try:
        launcher = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
    except OSError:  # not Linux
        return "the same torchrun command"
    if "--resume" in " ".join(launcher):
        # The name of an older checkpoint would be refused now that there are later ones; the last flag wins.
        launcher += ["--resume", "latest"]
    return shlex.join(launcher)


# ==== A rank that died or hangs ======


class Progress:
    """What this rank is doing, for `Watchdog`: set by `heartbeat` and `beside`, read from the watching thread."""

    phase, part, patient, count = "start", "", True, 0
    beside = ""  # what another thread of this rank does meanwhile
    failed = False  # this rank has said why it ends, and the others end with it

    @classmethod
    def text(cls):
        return ", ".join(text for text in (cls.phase, cls.part, cls.beside) if text)


def heartbeat(phase=None, part="", patient=False):
    """Report progress: a new phase of this rank, or only a new `part` of its present phase.

    patient: the phase takes as long as its disk needs (loading, saving): only a silent rank counts as lost.
    """
    if phase:
        Progress.phase, Progress.patient = phase, patient
    Progress.part = part
    Progress.count += 1


def beside(text):
    """Report what another thread of this rank does from now on, beside the phases of training; "" ends it."""
    Progress.beside = text


@dataclass
class Seen:
    """The last report of a rank: when it came and what it said."""

    when: float  # time.monotonic()
    text: str = "start"
    patient: bool = True
    count: int = 0  # of heartbeats: a rank whose count stays does not move
    beat: int = 0  # of the watching thread: a rank whose beat stays is silent


class Watchdog:
    """Reports once a second to the other ranks that this one is alive, and ends it when they are dead or hang.

    A rank is lost when it has been silent (killed, stopped, its machine gone) for `limit_seconds`, in any phase. All
    ranks hang when none of them reports progress for so long, except in a patient phase. The thread talks through
    torchrun's store: a collective could not report that collectives hang.
    """

    def __init__(self, limit_seconds):
        self.limit = limit_seconds
        self.interval = min(1.0, limit_seconds / 10)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.seen = {rank: Seen(time.monotonic()) for rank in range(self.size)}
        self.moved = time.monotonic()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self):
        if self.size > 1:
            self.thread.start()
        return self

    def __exit__(self, kind, error, trace):
        if self.size == 1:
            return
        if kind and issubclass(kind, Exception):
            time.sleep(4 * self.interval)  # long enough to notice whose reports are missing
            self.explain("failed", 3 * self.interval)
        self.ended.set()
        self.thread.join(timeout=10)  # a thread that is inside torch when Python ends aborts the process

    def end_all(self, sentence):
        """Print why this rank alone cannot go on, and end all ranks with exit code 1. The others need not call it."""
        print(sentence, file=sys.stderr, flush=True)
        Progress.failed = True
        if self.size > 1:
            time.sleep(4 * self.interval)  # long enough for the others to see it and end before a link breaks
        raise SystemExit(1)

    def watch(self):
        """Report and listen until the end of the run. Runs in the thread."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        beat = 0
        try:
            store = dist.PrefixStore(f"watch_{attempt_prefix()}", dist.TCPStore(address, port, is_master=False))
            while not self.ended.wait(self.interval):
                beat += 1
                report = [Progress.text(), Progress.patient, Progress.count, beat, Progress.failed]
                store.set(str(self.rank), json.dumps(report))
                self.listen(store)
                still = time.monotonic() - self.moved
                if self.silent(self.limit) or (still > self.limit and not Progress.patient):
                    self.explain("stops", self.limit)
                    os._exit(1)  # the main thread is inside a collective that never ends
        except (RuntimeError, dist.DistError) as error:
            if not self.ended.is_set():
                print(f"Rank {self.rank} lost torchrun's store and is no longer watched: {error}", file=sys.stderr)

    def listen(self, store):
        """Note what is new from each rank, and when it came."""
        for rank, last in self.seen.items():
            if not store.check([str(rank)]):
                continue
            text, patient, count, beat, failed = json.loads(store.get(str(rank)))
            if failed and rank != self.rank:
                os._exit(1)  # that rank has said why; the main thread waits for it in a collective
            if (count, beat) == (last.count, last.beat):
                continue
            self.seen[rank] = Seen(time.monotonic(), text, patient, count, beat)
            if count != last.count:
                self.moved = time.monotonic()

    def silent(self, seconds):
        """Return the other ranks that have not reported for `seconds`."""
        now = time.monotonic()
        return [rank for rank, seen in self.seen.items() if rank != self.rank and now - seen.when > seconds]

    def explain(self, what, seconds):
        """Print why this rank ends, and what it and the others are doing."""
        silent, now = self.silent(seconds), time.monotonic()
        others = []
        for rank in silent:
            seen = self.seen[rank]
            others.append(f"rank {rank} last reported {now - seen.when:.0f} s ago, in {seen.text!r}")
        for rank, seen in self.seen.items():
            if rank not in silent and rank != self.rank:
                others.append(f"rank {rank} is in {seen.text!r}")
        if silent:
            remedy = "Look at the lost process, its GPU and its machine"
        elif what == "stops":
            others.append(f"none moved for {now - self.moved:.0f} s")
            remedy = "Raise COLLECTIVE_TIMEOUT_SECONDS if one micro-batch may take that long here"
        else:
            remedy = "See the error of the rank that failed"
        print(
            f"Rank {self.rank} {what} in {Progress.text()!r}: {'; '.join(others)}. {remedy}; then run the same command "
            "again.",
            file=sys.stderr,
            flush=True,
        )
