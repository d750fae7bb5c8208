"""The checkpoint protocol: copy, write, manifest, rename, verify, load, the latest whole one and the best.

A checkpoint is a folder `step_NNNNNN` with the sharded files that `torch.distributed.checkpoint` (DCP) writes, the
run's `state.json`, and `manifest.json` with the size and SHA-256 of every other file. It is written as
`step_NNNNNN.unfinished`, made durable, and renamed last, so a folder without a manifest that matches does not exist for
resume. `Saver` does that beside training. The best checkpoint is the one whose `state.json` has the lowest validation
loss; it is recorded nowhere else, so no kill can tear that apart. The manifest shows damage, not who wrote the folder:
whoever changes a file can change its digest there, too.
DCP's `.metadata` is a pickle, which could run any program, so every script reads it through `Reader`.
"""

import json
import math
import os
import pickle
import re
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from sft import system
from sft.training import distributed, hardware

MANIFEST = "manifest.json"
STATE = "state.json"
RUN = "run.json"  # of the run's folder
LONG_WAIT = 1.0  # seconds that a save may wait for the one before it without a word
SHOWN_DIFFERENCES = 6  # of fingerprints, in a message
OTHER_VERSION = "another version of this suite wrote it"

# ==== Names ====


def checkpoint_name(step):
    """Return the name of the checkpoint folder of `step`."""
    return f"step_{step:06d}"


def step_of(checkpoint):
    """Return the step in the name of a checkpoint folder (Path)."""
    return int(checkpoint.name.removeprefix("step_"))


def listed(folder, last=math.inf):
    """Return the Paths of the `step_NNNNNN` folders in `folder` up to step `last`, latest first, whole or not."""
    checkpoints = [path for path in Path(folder).glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted((path for path in checkpoints if step_of(path) <= last), key=step_of, reverse=True)


# ==== The best one ====


def loss_of(checkpoint):
    """Return the validation loss at the step of a checkpoint folder: a finite float, or None without a readable one."""
    try:
        loss = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("validation_loss")
    except (*system.JSON_ERRORS, AttributeError):  # a save of a killed run that is half deleted, JSON of another shape
        return None
    return loss if isinstance(loss, float) and math.isfinite(loss) else None


def by_loss(checkpoints):
    """Return those of `checkpoints` (Paths) that were validated, lowest loss first; of two equal ones, the earlier."""
    validated = [path for path in checkpoints if loss_of(path) is not None]
    return sorted(validated, key=lambda path: (loss_of(path), step_of(path)))


def best(folder, step):
    """Return {"checkpoint": name, "validation_loss": float} of the best checkpoint up to `step`; None, None without."""
    first = next(iter(by_loss(listed(folder, step))), None)
    return {"checkpoint": first and first.name, "validation_loss": first and loss_of(first)}


def write_run(folder, state):
    """Write run.json: `state` (dict) and the best checkpoint, as the folder has it; return `best`. Raises: OSError."""
    found = best(folder, state["step"])
    system.write_whole(Path(folder) / RUN, json.dumps(state | {"best": found}, indent=1) + "\n")
    return found


# ==== Saving ====


def save(folder, step, tensors, state, group=None):
    """Write the checkpoint of `step` into `folder`. All ranks call it.

    tensors: flat dict of str to DTensor or tensor; each rank writes and hashes its own shards, nothing is gathered.
    state: dict for `state.json`; group: the process group of the collectives, None for the default one.
    Returns: Path of the finished checkpoint. Raises: OSError, with the older checkpoints untouched, if a write fails.
    """
    final = Path(folder) / checkpoint_name(step)
    staging = system.unfinished(final)
    rank = dist.get_rank() if dist.is_initialized() else 0

    def prepare():
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            check_room(folder, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))

    def write():
        # Copying ahead from a GPU would wait for the stream that trains, every 10 MB, also for copies in host memory.
        writer = dcp.FileSystemWriter(str(staging), per_thread_copy_ahead=0)
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=distributed.alone())
        return manifest_entries(staging.glob(f"__{rank}_*"))  # dcp.save has put each file on the disk

    def finish():
        if rank == 0:
            seal(staging, state, entries)
            shutil.rmtree(final, ignore_errors=True)  # only ever one that failed verification
            staging.rename(final)
            system.durable(final.parent)

    try:
        distributed.together(prepare, group)
        entries = {name: entry for shards in distributed.together(write, group) for name, entry in shards.items()}
        distributed.together(finish, group)
    except OSError:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)  # its bytes may be what fills the disk
        raise
    return final


def manifest_entries(paths):
    """Return {file name: [bytes, SHA-256]} of the files `paths`."""
    return {path.name: [path.stat().st_size, system.sha256(path)] for path in sorted(paths)}


def seal(staging, state, entries):
    """Write `state` and the manifest into the folder `staging`, and put all of it on the disk.

    entries: of `manifest_entries` for the files that the ranks have hashed; the others are hashed here.
    """
    (staging / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    entries = entries | manifest_entries(path for path in staging.iterdir() if path.name not in entries)
    (staging / MANIFEST).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    for path in [*staging.iterdir(), staging]:
        system.durable(path)


def delete_old(folder, step, keep):
    """Delete the checkpoints up to `step`, but for the latest `keep` and the best. Raises: OSError.

    Folders of later steps are left alone and not counted: the run was not continued from them, so they are not whole.
    """
    up_to_now = listed(folder, step)
    kept = {*up_to_now[:keep], *by_loss(up_to_now)[:1]}
    for path in up_to_now:
        if path not in kept:
            shutil.rmtree(path)


def check_room(folder, size):
    """Raise OSError unless the disk of `folder` has room for `size` bytes and 2% for what is not tensors."""
    need, free = int(size * 1.02), shutil.disk_usage(folder).free
    if free < need:
        raise OSError(
            f"{folder}: the checkpoints to come need {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free. Make room "
            "or lower KEEP_CHECKPOINTS."
        )


def clear_unfinished(folder):
    """Remove what killed saves left in `folder`: each may be as large as a checkpoint."""
    for path in Path(folder).glob(system.unfinished("step_*").name):
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)


# ==== Saving beside training ====


def check_host(tensors):
    """Raise SystemExit unless this machine's memory has room for the copies of `tensors` of all ranks on it."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors.values()]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    need, free = ranks * sum(t.numel() * t.element_size() for t in local), hardware.available_memory()
    if free < need:
        raise SystemExit(
            f"Saving beside training needs {need / 2**30:.1f} GiB of this machine's memory for a copy of the state, "
            f"{free / 2**30:.1f} are free. Free some, or save with the run waiting: --async-save off."
        )


def make_stager(device):
    """Return DCP's stager: it copies a state into host memory, pinned for a GPU, and keeps that memory."""
    gpu = device.type == "cuda"
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu
        )
    )


@dataclass
class Writing:
    """A save whose write has begun."""

    step: int
    state: dict
    future: Future  # of what `Saver.write` returns
    start: float  # time.perf_counter()
    stopped: float = 0.0  # seconds for which training stood still


class Saver:
    """Saves a run's checkpoints in a thread of each rank, one at a time: a save waits for the one before it.

    A save beside training stops it only while its state is copied into host memory ("staged"). The collectives of the
    thread have a gloo group of their own: those of training go on meanwhile, and must not mix with them.

    Nothing of a save may stay that has used OpenMP: each such thread keeps OpenMP threads of its own, and once those of
    a process are more than the cores, libgomp's threads sleep instead of spin while they wait for work. Each operation
    of training on a CPU starts later then; steps took up to twice as long. So each save has a thread of its own, which
    ends with it, and a single rank saves and loads without collectives (`no_dist`): gloo's threads copy DCP's plans.
    """

    def __init__(self, args, beside, tensors, device, log, step):
        """Take the memory for the copies, if saves are to be written `beside` training and not while it waits.

        args: the settings; tensors: as for `save`, of the run as it starts; step: that of its last checkpoint.
        """
        self.args, self.log, self.last_saved = args, log, step
        self.group = dist.new_group(backend="gloo", timeout=distributed.BACKSTOP)
        self.writing = None  # the Writing in flight
        self.card = {"initializer": torch.cuda.set_device, "initargs": (device,)} if device.type == "cuda" else {}
        self.stager = None
        if beside:
            distributed.on_each_machine(lambda: check_host(tensors))
            self.stager = make_stager(device)
            distributed.run_where(True, lambda: self.reserve(tensors))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.writing:
            self.writing.future.exception()  # waits: whatever ended the run, a write in flight becomes whole

    def reserve(self, tensors):
        """Stage `tensors` once, so that too little memory shows now and not at the first save."""
        try:
            self.stager.stage(tensors)
        except RuntimeError as error:
            raise SystemExit(f"No host memory for saving beside training ({error}): --async-save off.") from None

    def save(self, step, tensors, state, wait):
        """Save the checkpoint of `step`; return when its state is staged, or with `wait` when it is whole or failed.

        state: dict for `state.json`. A failed save is reported and leaves `last_saved` as it is. The next try is at the
        next SAVE_EVERY: where a write fails late, one after each step would stall the run.
        """
        start = time.perf_counter()
        distributed.heartbeat(f"saving step {step}", patient=True)
        self.finish()
        waited = time.perf_counter() - start
        if waited > LONG_WAIT and not wait:
            self.log.say(f"step {step}: waited {waited:.0f} s for the save before it; raise SAVE_EVERY.")
        if self.stager:  # also with `wait`: DCP would hold a second copy of what it writes from a GPU
            tensors = self.stager.stage(tensors)
        thread = ThreadPoolExecutor(1, "save", **self.card)
        self.writing = Writing(step, state, thread.submit(self.write, step, tensors, state), start)
        thread.shutdown(wait=False)  # it ends with the write
        distributed.beside(f"step {step} being written")
        wait = wait or not self.stager
        if wait:
            self.writing.future.exception()
        self.writing.stopped = time.perf_counter() - start
        if wait:
            self.report()

    def write(self, step, tensors, state):
        """Write the checkpoint, after the record up to its step is on the disk; delete old ones. Runs in the thread.

        Returns: (its Path, time.perf_counter() at its end, why an old one could not be deleted: OSError or None).
        """
        self.log.sync()
        folder, stays = self.args["CHECKPOINT_DIR"], None
        path = save(folder, step, tensors, state, self.group)
        end = time.perf_counter()
        if dist.get_rank() == 0:
            try:
                delete_old(folder, step, self.args["KEEP_CHECKPOINTS"])
            except OSError as error:
                stays = error
        return path, end, stays

    def check(self):
        """Report the write in flight if it has ended."""
        if self.writing and self.writing.future.done():
            self.report()

    def finish(self):
        """Wait for the write in flight, if there is one, and report it."""
        if self.writing:
            self.writing.future.exception()  # waits
            self.report()

    def report(self):
        """Say what came of the write that has ended, and record in run.json which checkpoint is the best."""
        writing, self.writing = self.writing, None
        try:
            path, end, stays = writing.future.result()
        except OSError as error:
            distributed.beside("")
            self.log.warn(f"no checkpoint since step {self.last_saved}")
            every = self.args["SAVE_EVERY"]
            self.log.say(f"WARNING: no checkpoint at step {writing.step}, next try in {every} steps: {error}")
            return
        distributed.beside("")
        self.last_saved = writing.step
        self.log.warn("")
        self.log.say(f"saved {path} in {end - writing.start:.3f} s; training stood still for {writing.stopped:.3f} s")
        if stays:
            self.log.say(f"WARNING: an old checkpoint stays, and its bytes with it: {stays}")
        if writing.state.get("validation_loss") is not None:
            self.record_best(path.parent, writing)

    def record_best(self, folder, writing):
        """Name the best checkpoint up to a validated step in the log and in run.json, on rank 0."""
        if dist.get_rank() != 0:
            return
        try:
            name, loss = write_run(folder, writing.state).values()
            if name:
                self.log.say(f"best  {folder}/{name}: validation loss {loss:.4f}")
        except OSError as error:
            self.log.say(f"WARNING: {RUN} does not name the best checkpoint: {error}")


# ==== Reading ====

PICKLED = {  # all that the `.metadata` of a DCP folder consists of, besides the dtypes
    "torch.distributed.checkpoint.metadata": (
        "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties MetadataIndex "
        "StorageMeta _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed._shard.sharded_tensor.metadata": "TensorProperties MEM_FORMAT_ENCODING",
    "torch.serialization": "_get_layout",
    "torch": "Size",
    "pathlib": "PosixPath",
    "collections": "OrderedDict",
}


class MetadataUnpickler(pickle.Unpickler):
    """Reads a `.metadata` that someone else wrote: a pickle may name any function to run, this one may not."""

    def __init__(self, file):
        super().__init__(file)
        self.classes = {}  # each class that the pickle names, with its attributes

    def find_class(self, module, name):
        if name in PICKLED.get(module, "").split():
            found = super().find_class(module, name)
            if isinstance(found, type):
                self.classes.setdefault(found, dict(vars(found)))
            return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no DCP metadata needs")

    def load(self):
        value = super().load()
        for found, attributes in self.classes.items():
            if dict(vars(found)) != attributes:
                raise pickle.UnpicklingError(f"it changes the class {found.__name__}")
        return value


class Reader(dcp.FileSystemReader):
    """DCP's reader of a folder, for one that someone else wrote: it reads tensors, in the folder, and runs no code."""

    def read_metadata(self, *args, **kwargs):
        """Return the `Metadata` of the folder, without what is not a tensor: DCP unpickles that without a restriction.

        Raises: SystemExit if it isn't valid metadata, or names forbidden objects or files elsewhere.
        """
        try:
            with (Path(self.path) / ".metadata").open("rb") as file:
                metadata = MetadataUnpickler(file).load()
            entries, stored = metadata.state_dict_metadata, metadata.storage_data
            if {index.fqn for index in stored} != entries.keys():
                raise ValueError("its lists of names differ")
            if elsewhere := [info.relative_path for info in stored.values() if "/" in info.relative_path]:
                raise ValueError(f"it names the file {elsewhere[0]}, which is not in this folder")
            tensors = {name: entry for name, entry in entries.items() if isinstance(entry, dcp.TensorStorageMetadata)}
        except Exception as error:  # a damaged pickle raises whatever its bytes spell
            raise SystemExit(f"{self.path}: its .metadata cannot be read ({error}). Choose another one.") from None
        metadata.state_dict_metadata = tensors
        return metadata


# ==== Verification ====


def parts_of(fingerprint):
    """Return the set of the names in a fingerprint (dict) that are no keys of a JSON file."""
    return {name for name in fingerprint if " " not in name}


def fingerprint_differences(then, now):
    """Return in a phrase how two fingerprints (dicts) differ, in SHOWN_DIFFERENCES names at most; "" if they do not.

    then: as it was stored, maybe by older code, which named other parts: then the phrase is OTHER_VERSION. The keys of
    a JSON file ("config.json KEY") are no parts: they are the base's own. An empty `then` names no version.
    """
    if not isinstance(then, dict) or (then and parts_of(then) != parts_of(now)):
        return OTHER_VERSION
    phrases = system.differences(then, now)
    more = len(phrases) - SHOWN_DIFFERENCES
    return "; ".join(phrases[:SHOWN_DIFFERENCES] + [f"{more} more"] * (more > 0))


def defect(checkpoint):
    """Return why the folder `checkpoint` is not a whole checkpoint, as a phrase, or None if it is whole."""
    checkpoint = Path(checkpoint)
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        entries = {str(name): (int(size), str(digest)) for name, (size, digest) in entries.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}: its save never finished"
    except (*system.JSON_ERRORS, AttributeError, TypeError, OverflowError) as error:  # JSON of another shape
        return f"its {MANIFEST} cannot be read ({error})"
    if not {".metadata", STATE} <= entries.keys():
        return f"its {MANIFEST} names no .metadata or no {STATE}"
    for name, (size, digest) in entries.items():
        path = checkpoint / name
        if Path(name).name != name or not os.path.isfile(path):  # Path.is_file raises for a name that is too long
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes instead of {size}"
        if system.sha256(path) != digest:
            return f"its file {name} was changed after it was written (SHA-256 differs)"
    return None


def verify(checkpoint):
    """Return the state (dict) of a whole checkpoint. Raises: SystemExit, with what is wrong, if it is not whole."""
    if not Path(checkpoint).is_dir():
        raise SystemExit(f"{checkpoint}: no such checkpoint folder.")
    problem = defect(checkpoint)
    if problem:
        raise SystemExit(f"{checkpoint} is not a whole checkpoint: {problem}. Choose another one.")
    return system.read_json(Path(checkpoint) / STATE, "sft_v1.py")


def latest_whole(folder, say=print):
    """Return the Path of the latest whole checkpoint in `folder`, or None. `say` gets a line for each one skipped."""
    return first_whole(listed(folder), say)


def best_whole(folder, say=print):
    """Return the Path of the whole checkpoint in `folder` with the lowest validation loss, or None; as latest_whole."""
    return first_whole(by_loss(listed(folder)), say)


def first_whole(checkpoints, say):
    """Return the first whole one of `checkpoints` (Paths), or None. `say` gets a line for each one skipped."""
    for checkpoint in checkpoints:
        problem = defect(checkpoint)
        if problem is None:
            return checkpoint
        say(f"WARNING: {checkpoint} is skipped: {problem}.")
    return None


def choose(folder, resume):
    """Return the Path of the verified checkpoint to continue from, or None for a fresh start.

    resume: "latest" or the name of a checkpoint. A rank that torchrun restarted takes the latest one in any case.
    Raises: SystemExit if the one with that name is not whole, or not the latest: that would mix two runs in one folder.
    """
    if resume == "latest" or distributed.restarted():
        return latest_whole(folder)
    checkpoint = Path(folder) / resume
    verify(checkpoint)
    if listed(folder)[0].name != resume:
        raise SystemExit(
            f"{folder} holds checkpoints later than {resume}. Move them away to go back to it: a run that continued "
            "next to them would mix two runs in one folder."
        )
    return checkpoint


# ==== Continuing ====


def load(checkpoint, tensors, fingerprints):
    """Fill `tensors` in place from a verified `checkpoint`; return its state.json (dict). All ranks call it.

    Raises: SystemExit if a tensor is missing or has another shape, or if the moments do not belong to the weights.
    """
    stored = system.read_json(checkpoint / STATE, "sft_v1.py")
    if different := fingerprint_differences(stored["fingerprints"], fingerprints):
        raise SystemExit(
            f"{checkpoint} was trained on other data or from another base: {different}. Name another --checkpoint-dir."
        )
    right_name = checkpoint_name(stored["step"])
    if checkpoint.name != right_name:
        raise SystemExit(f"{checkpoint} holds step {stored['step']}: it was renamed. Rename it to {right_name}.")
    reader = Reader(str(checkpoint))
    entries = reader.read_metadata().state_dict_metadata
    missing = [name for name in tensors if name not in entries]
    if missing:
        kind = "optimizer state" if all(name.startswith("optimizer.") for name in missing) else "tensors"
        raise SystemExit(
            f"{checkpoint} lacks {kind}: {len(missing)} of {len(tensors)}, first {missing[0]}. A run that continued "
            "without it would drift; name a whole checkpoint with --resume."
        )
    for name, tensor in tensors.items():
        if entries[name].size != tensor.shape:
            raise SystemExit(
                f"{checkpoint}: {name} is {tuple(entries[name].size)}, the model's {tuple(tensor.shape)}. Move this "
                "checkpoint away to continue from an earlier one, or name another --checkpoint-dir."
            )
    dcp.load(tensors, storage_reader=reader, no_dist=distributed.alone())
    check_moments(checkpoint, tensors, stored["updates"])
    return stored


def check_moments(checkpoint, tensors, updates):
    """Exit unless the moments come from the same update as the weights, and are not all zero."""
    counts = {float(tensor) for name, tensor in tensors.items() if name.startswith("optimizer.step.")}
    if counts != {float(updates)}:
        moment_updates = ", ".join(f"{count:g}" for count in sorted(counts))
        raise SystemExit(
            f"{checkpoint}: the optimizer's moments are from update {moment_updates}, the weights from update "
            f"{updates}; choose another checkpoint."
        )
    for moment in ("optimizer.exp_avg.", "optimizer.exp_avg_sq."):
        parts = [tensor for name, tensor in tensors.items() if name.startswith(moment)]
        local = [part.to_local() if hasattr(part, "to_local") else part for part in parts]
        moved = any(bool(part.any()) for part in local)
        if updates and not any(distributed.on_every_rank(moved)):
            raise SystemExit(
                f"{checkpoint}: all of {moment}* is zero after {updates} updates; choose another checkpoint."
            )
