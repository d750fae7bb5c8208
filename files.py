"""Files and folders with care: digests, JSON, a file or folder replaced in one step, a lock. None of it needs torch."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

LOCK = ".lock"


def sha256(path):
    """Return the SHA-256 of the file `path` as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder, pattern):
    """Return one SHA-256 over the names and contents of the files in `folder` that match the glob `pattern`."""
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(Path(folder).glob(pattern))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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


def durable(path):
    """Ask the operating system to put the file or folder `path` on the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
