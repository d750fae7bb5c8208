"""Files, folders and processes: digests, JSON, a file or folder that appears in one step, a lock.

Nothing here needs torch. A file or folder X that is not whole yet has the name `X.unfinished`.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

from safetensors import SafetensorError

LOCK = ".lock"
JSON_ERRORS = (OSError, ValueError, RecursionError)  # what reading and parsing a JSON file raises

# ==== Files ====


def sha256(path):
    """Return the SHA-256 of the file `path` as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder, *patterns):
    """Return one SHA-256 over the names and contents of the files in `folder` that match one of the glob `patterns`."""
    paths = sorted(path for pattern in patterns for path in Path(folder).glob(pattern))
    lines = [f"{sha256(path)}  {path.relative_to(folder)}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_json(path, made_by=None):
    """Return the JSON object in the file `path`. made_by: the script that writes it; None: it comes from elsewhere.

    Raises: SystemExit, with the remedy, if it is missing or damaged.
    """
    first = f"Run {made_by} first" if made_by else "Get it again"
    again = f"Run {made_by} again." if made_by else "Get it again."
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"{path} is missing. {first}, or name its folder with the flag.") from None
    except JSON_ERRORS as error:
        raise SystemExit(f"{path} is not readable JSON ({error}). {again}") from None
    if not isinstance(value, dict):
        raise SystemExit(f"{path} holds a {type(value).__name__}, not an object. {again}")
    return value


def differences(then, now, then_label="then", now_label="now"):
    """Return a phrase "name: value then, value now" for each name whose value differs between two dicts.

    A name that only one of them has also differs; its value in the other is None. A SHA-256 is shortened.
    """
    phrases = []
    for name in dict.fromkeys([*then, *now]):
        values = then.get(name), now.get(name)
        if values[0] != values[1]:
            old, new = (re.sub(r"^([0-9a-f]{12})[0-9a-f]{52}$", r"\1...", str(value)) for value in values)
            phrases.append(f"{name}: {old} {then_label}, {new} {now_label}")
    return phrases


def unfinished(path):
    """Return the Path at which the file or folder `path` is written until it is whole."""
    path = Path(path)
    return path.with_name(f"{path.name}.unfinished")


def durable(path):
    """Make the operating system write the file or folder `path` to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path, text):
    """Replace the file `path` by `text` (str or bytes) in one step: a kill or a full disk leaves the old file."""
    staging = unfinished(path)
    try:
        staging.write_bytes(text.encode() if isinstance(text, str) else text)
        durable(staging)
        staging.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            staging.unlink()  # a full disk stays usable
        raise


# ==== Folders ====


def refuse_unless_empty(folder, flag):
    """Raise SystemExit if the path `folder` already holds something. flag: the flag that names it, for the message."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"{folder} is not empty. Move it away, or name another {flag}.")


@contextlib.contextmanager
def staged(folder, flag):
    """Yield an empty folder next to `folder`; rename it to `folder` after the block, or remove it if the block fails.

    flag: the flag that names `folder`, for the message.
    Raises: SystemExit if `folder` already holds something or the disk is full.
    """
    refuse_unless_empty(folder, flag)
    folder, staging = Path(folder), unfinished(folder)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        if folder.exists():
            folder.rmdir()
        staging.rename(folder)
    except (OSError, SafetensorError) as error:
        raise SystemExit(
            f"{folder} cannot be written ({error}). Free disk space, or name another {flag}; nothing was kept."
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # a full disk stays usable


def lock(folder, flag):
    """Lock the folder for this process; return the file handle that holds the lock until it or the process ends.

    The kernel keeps the lock, so a crash of its owner frees it; only a child that was forked without exec keeps it.
    flag: the flag that names `folder`, for the message. Raises: SystemExit if another process holds the lock.
    """
    handle = open(Path(folder) / LOCK, "a+", encoding="utf-8")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        raise SystemExit(
            f"{folder} is in use by another run (process {handle.read().strip() or 'unknown'}). Wait for it or name "
            f"another {flag}."
        ) from None
    handle.truncate(0)
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle


# ==== Processes ====

libc = ctypes.CDLL(None)


def end_with_parent():
    """Have the kernel kill this process when its parent dies, however it dies (Linux; elsewhere this does nothing)."""
    if sys.platform == "linux":
        libc.prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


def leave_to_parent():
    """End this process with its parent, and let the parent alone react to Ctrl-C."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
