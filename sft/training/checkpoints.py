"""The checkpoint protocol: stage, manifest, rename, verify, latest whole one.

A checkpoint is a folder `step_NNNNNN` with the sharded files that `torch.distributed.checkpoint` (DCP) writes, the
run's `state.json`, and `manifest.json` with the size and SHA-256 of every other file. It is written as
`step_NNNNNN.unfinished`, made durable, and renamed last, so a folder without a manifest that matches does not exist for
resume. The manifest shows damage, not who wrote the folder: whoever changes a file can change its digest there, too.
DCP's `.metadata` is a pickle, which could run any program, so every script reads it through `Reader`.
"""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from sft import system
from sft.training import distributed

MANIFEST = "manifest.json"
STATE = "state.json"
SHOWN_DIFFERENCES = 6  # of fingerprints, in a message

# ==== Names ====


def checkpoint_name(step):
    """Return the name of the checkpoint folder of `step`."""
    return f"step_{step:06d}"


def step_of(checkpoint):
    """Return the step in the name of a checkpoint folder (Path)."""
    return int(checkpoint.name.removeprefix("step_"))


def listed(folder):
    """Return the Paths of the `step_NNNNNN` folders in `folder`, latest first, whole or not."""
    checkpoints = [path for path in Path(folder).glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(checkpoints, key=step_of, reverse=True)


# ==== Saving ====


def save(folder, step, tensors, state, keep):
    """Write the checkpoint of `step` into `folder` and delete all but the latest `keep`. All ranks call it.

    tensors: flat dict of str to DTensor or tensor; each rank writes its own shards, nothing is gathered.
    state: dict for `state.json`.
    Folders of later steps are left alone and not counted: the run was not continued from them, so they are not whole.
    Returns: Path of the finished checkpoint. Raises: OSError, with the older checkpoints untouched, if a write fails.
    """
    final = Path(folder) / checkpoint_name(step)
    staging = system.unfinished(final)
    rank0 = not dist.is_initialized() or dist.get_rank() == 0

    def prepare():
        if rank0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            check_room(folder, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))

    def finish():
        if rank0:
            seal(staging, state)
            shutil.rmtree(final, ignore_errors=True)  # only ever one that failed verification
            staging.rename(final)
            system.durable(final.parent)
            delete_old(folder, step, keep)

    try:
        distributed.together(prepare)
        distributed.together(lambda: dcp.save(tensors, checkpoint_id=str(staging)))
        distributed.together(finish)
    except OSError:
        if rank0:
            shutil.rmtree(staging, ignore_errors=True)  # its bytes may be what fills the disk
        raise
    return final


def seal(staging, state):
    """Write `state` and the manifest into the folder `staging`, and put all of it on the disk."""
    (staging / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    entries = {path.name: [path.stat().st_size, system.sha256(path)] for path in sorted(staging.iterdir())}
    (staging / MANIFEST).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    for path in [*staging.iterdir(), staging]:
        system.durable(path)


def delete_old(folder, step, keep):
    """Delete all but the latest `keep` checkpoints up to `step`."""
    up_to_now = [path for path in listed(folder) if step_of(path) <= step]
    for path in up_to_now[keep:]:
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
        shutil.rmtree(path)


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

    def find_class(self, module, name):
        if name in PICKLED.get(module, "").split():
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no DCP metadata needs")


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


def fingerprint_differences(then, now):
    """Return in a phrase how two fingerprints (dicts) differ, in SHOWN_DIFFERENCES names at most; "" if they do not."""
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
    for checkpoint in listed(folder):
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
