"""The checkpoint protocol: stage, manifest, rename, verify, newest whole one.

A checkpoint is a folder `step_NNNNNN` with the sharded files that `torch.distributed.checkpoint` (DCP) writes, the
run's `facts.json`, and `manifest.json` with the size and SHA-256 of every other file. It is written as
`staging_step_NNNNNN`, made durable, and renamed last, so a folder without a manifest that matches does not exist for
resume. DCP's `.metadata` is a pickle: nothing here opens it before its digest is verified.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from sft import system
from sft.training import distributed

MANIFEST = "manifest.json"
STATE = "facts.json"
STAGING = "staging_"


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
            entries = {path.name: [path.stat().st_size, system.sha256(path)] for path in sorted(staging.iterdir())}
            (staging / MANIFEST).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
            for path in [*staging.iterdir(), staging]:
                system.durable(path)
            shutil.rmtree(final, ignore_errors=True)  # only ever one that failed verification
            staging.rename(final)
            system.durable(final.parent)
            for old in [path for path in listed(folder) if step_of(path) <= step][keep:]:
                shutil.rmtree(old)

    try:
        distributed.together(prepare)
        distributed.together(lambda: dcp.save(state, checkpoint_id=str(staging)))
        distributed.together(finish)
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
        if system.sha256(path) != digest:
            return f"its file {name} was changed after it was written (SHA-256 differs)"
    return None


def verify(checkpoint):
    """Return the facts (dict) of a whole checkpoint. Raises: SystemExit, with what is wrong, if it is not whole."""
    if not Path(checkpoint).is_dir():
        raise SystemExit(f"{checkpoint}: no such checkpoint folder.")
    problem = defect(checkpoint)
    if problem:
        raise SystemExit(f"{checkpoint} is not a whole checkpoint: {problem}. Choose another one.")
    return system.read_json(Path(checkpoint) / "facts.json", "sft_v1.py")


def latest_whole(folder, say=print):
    """Return what `newest_whole` returns."""
    return newest_whole(folder, say)


def newest_whole(folder, say=print):
    """Return the Path of the newest whole checkpoint in `folder`, or None; `say` is told of each one passed over."""
    for checkpoint in listed(folder):
        problem = defect(checkpoint)
        if problem is None:
            return checkpoint
        say(f"WARNING: {checkpoint} is passed over: {problem}.")
    return None
