"""The checkpoint protocol: stage, manifest, rename, verify, newest whole one; and the same care for other folders.

A checkpoint is a folder `step_NNNNNN` with the sharded files that `torch.distributed.checkpoint` (DCP) writes, the
run's `facts.json`, and `manifest.json` with the size and SHA-256 of every other file. It is written as
`staging_step_NNNNNN`, made durable, and renamed last, so a folder without a manifest that matches does not exist for
resume. DCP's `.metadata` is a pickle: nothing here opens it before its digest is verified.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError

MANIFEST = "manifest.json"
STAGING = "staging_"
LOCK = ".lock"


def sha256(path):
    """Return the SHA-256 of the file `path` as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path, made_by):
    """Return the JSON object in the file `path`. Raises: SystemExit naming the script that makes it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"{path} is missing. Run {made_by} first, or name its folder with the flag.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path} is not readable JSON ({error}). Run {made_by} again.") from None
    if not isinstance(value, dict):
        raise SystemExit(f"{path} holds a {type(value).__name__}, not an object. Run {made_by} again.")
    return value


def write_whole(path, text):
    """Replace the file `path` by `text` in one step: a kill or a full disk leaves the old one."""
    path = Path(path)
    staging = path.with_name(f"{path.name}.unfinished")
    staging.write_text(text, encoding="utf-8")
    durable(staging)
    staging.replace(path)


def refuse_unless_empty(output):
    """Raise SystemExit if the path `output` already holds something."""
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SystemExit(f"{output} is not empty. Move it away, or name another --output-dir.")


@contextlib.contextmanager
def staged(output):
    """Give an empty folder beside `output` that gets its name at the end of the block, or is removed if that fails.

    Raises: SystemExit if `output` already holds something or the disk is full.
    """
    refuse_unless_empty(output)
    output = Path(output)
    staging = output.with_name(f"{output.name}.unfinished")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        if output.exists():
            output.rmdir()
        staging.rename(output)
    except (OSError, SafetensorError) as error:
        raise SystemExit(
            f"{output} cannot be written ({error}). Free disk space, or name another --output-dir; nothing was kept."
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # a full disk stays usable


def folder_digest(folder, pattern):
    """Return one SHA-256 over the names and contents of the files in `folder` that match the glob `pattern`."""
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(Path(folder).glob(pattern))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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


def durable(path):
    """Ask the operating system to put the file or folder `path` on the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder, step, state, facts, keep):
    """Write the checkpoint of `step` into `folder` and delete all but the newest `keep`. All ranks call it.

    state: flat dict of str to DTensor or tensor; each rank writes its own shards, nothing is gathered.
    facts: dict for `facts.json`.
    Folders of later steps are left alone and not counted: the run was not continued from them, so they are not whole.
    Returns: Path of the finished checkpoint. Raises: OSError, with the older checkpoints untouched, if a write fails.
    """
    final = Path(folder) / f"step_{step:06d}"
    staging = Path(folder) / f"{STAGING}{final.name}"
    rank0 = not dist.is_initialized() or dist.get_rank() == 0

    def prepare():
        if rank0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            check_room(folder, sum(tensor.numel() * tensor.element_size() for tensor in state.values()))

    def finish():
        if rank0:
            (staging / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            entries = {path.name: [path.stat().st_size, sha256(path)] for path in sorted(staging.iterdir())}
            (staging / MANIFEST).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
            for path in [*staging.iterdir(), staging]:
                durable(path)
            shutil.rmtree(final, ignore_errors=True)  # only ever one that failed verification
            staging.rename(final)
            durable(final.parent)
            for old in [path for path in listed(folder) if step_of(path) <= step][keep:]:
                shutil.rmtree(old)

    try:
        together(prepare)
        together(lambda: dcp.save(state, checkpoint_id=str(staging)))
        together(finish)
    except OSError:
        if rank0:
            shutil.rmtree(staging, ignore_errors=True)  # its bytes may be what fills the disk
        raise
    return final


def check_room(folder, size):
    """Raise OSError unless the disk of `folder` has room for `size` bytes and 2% for what is not tensors."""
    need, free = int(size * 1.02), shutil.disk_usage(folder).free
    if free < need:
        raise OSError(
            f"{folder}: the checkpoints to come need {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free. Make room "
            "or lower KEEP_CHECKPOINTS."
        )


def clear_staging(folder):
    """Remove what saves that were killed left in `folder`: each may be as large as a checkpoint."""
    for path in Path(folder).glob(f"{STAGING}*"):
        shutil.rmtree(path)


def step_of(checkpoint):
    """Return the step in the name of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step_"))


def listed(folder):
    """Return the Paths of the `step_NNNNNN` folders in `folder`, newest first, whole or not."""
    found = [path for path in Path(folder).glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(found, key=step_of, reverse=True)


def defect(checkpoint):
    """Return why the folder `checkpoint` is not a whole checkpoint, as a phrase, or None if it is whole."""
    checkpoint = Path(checkpoint)
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        entries = {str(name): (int(size), str(digest)) for name, (size, digest) in entries.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}: its save never finished"
    except (ValueError, AttributeError, TypeError, OSError, OverflowError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    if not {".metadata", "facts.json"} <= entries.keys():
        return f"its {MANIFEST} names no .metadata or no facts.json"
    for name, (size, digest) in entries.items():
        path = checkpoint / name
        if Path(name).name != name or not os.path.isfile(path):  # Path.is_file raises for a name that is too long
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes instead of {size}"
        if sha256(path) != digest:
            return f"its file {name} was changed after it was written (SHA-256 differs)"
    return None


def verify(checkpoint):
    """Return the facts (dict) of a whole checkpoint. Raises: SystemExit, with what is wrong, if it is not whole."""
    if not Path(checkpoint).is_dir():
        raise SystemExit(f"{checkpoint}: no such checkpoint folder.")
    problem = defect(checkpoint)
    if problem:
        raise SystemExit(f"{checkpoint} is not a whole checkpoint: {problem}. Choose another one.")
    return read_json(Path(checkpoint) / "facts.json", "sft_v1.py")


def newest_whole(folder, say=print):
    """Return the Path of the newest whole checkpoint in `folder`, or None; `say` is told of each one passed over."""
    for checkpoint in listed(folder):
        problem = defect(checkpoint)
        if problem is None:
            return checkpoint
        say(f"WARNING: {checkpoint} is passed over: {problem}.")
    return None


def lock(folder):
    """Take the folder for this process alone; return the handle that holds it until it is closed or the process ends.

    The lock is the kernel's, so a crash of its owner frees it; only a child that was forked without exec would keep it.
    Raises: SystemExit if another process holds it.
    """
    handle = open(Path(folder) / LOCK, "a+", encoding="utf-8")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        raise SystemExit(
            f"{folder} is in use by another run (process {handle.read().strip() or 'unknown'}). Wait for it or name "
            "another --output-dir."
        ) from None
    handle.truncate(0)
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle
