"""Files, folders, processes and the device: digests, JSON, a file or folder that appears in one step, a lock, a GPU.

Nothing here imports torch but `choose_device`. A file or folder X that is not whole yet has the name `X.unfinished`.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
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
    return joint_digest({path.relative_to(folder): sha256(path) for path in paths})


def joint_digest(digests):
    """Return one SHA-256 over `digests` {file name: SHA-256}, in their order."""
    lines = [f"{digest}  {name}\n" for name, digest in digests.items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def weight_digests(folder):
    """Return {file name: SHA-256} of the safetensors in the model folder `folder`."""
    return {path.name: sha256(path) for path in sorted(Path(folder).glob("*.safetensors"))}


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


def read_lines(path):
    """Return the JSON objects (list of dict) that are the lines of the file `path`; [] if there is no such file.

    A last line without its end, which a kill cut off, is left out, and so is a damaged one, such as the zeros that a
    power failure leaves.
    """
    values = []
    if Path(path).exists():
        for line in Path(path).read_bytes().split(b"\n")[:-1]:
            with contextlib.suppress(*JSON_ERRORS):
                values.append(json.loads(line))
    return [value for value in values if isinstance(value, dict)]


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


def stage(path, content):
    """Write `content` (bytes) to `unfinished(path)` and put it on the disk. Returns: that Path. Raises: OSError."""
    staging = unfinished(path)
    staging.unlink(missing_ok=True)  # of a killed run, or a link, which leads to a file of somebody else
    with staging.open("xb") as file:
        file.write(content)
    durable(staging)
    return staging


def write_whole(path, text):
    """Replace the file `path` by `text` (str or bytes) in one step: a kill or a full disk leaves the old file."""
    try:
        stage(path, text.encode() if isinstance(text, str) else text).replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished(path).unlink()  # a full disk stays usable
        raise


# ==== Folders ====


def refuse_unless_empty(folder, flag):
    """Return the path of the folder to write, without links. flag: the flag that names it, for the message.

    Raises: SystemExit if it already holds something, or is a mount point, which no finished folder can replace.
    """
    folder = Path(os.path.realpath(folder))
    try:
        if os.path.ismount(folder):
            raise SystemExit(f"{folder} is a mount point. Name a folder inside it with {flag}.")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise SystemExit(f"{folder} is not empty. Move it away, or name another {flag}.")
    except OSError as error:
        raise SystemExit(f"{folder} cannot be read ({error}). Name another {flag}.") from None
    return folder


def claim(folder, flag):
    """Make `unfinished(folder)`, or take the one of a killed run. Returns: (its Path, the handle that locks it).

    Raises: SystemExit if another process works in it, or it is not one of these scripts; OSError.
    """
    staging = unfinished(folder)
    staging.mkdir(parents=True, exist_ok=True)
    if staging.is_symlink() or (any(staging.iterdir()) and not os.path.lexists(staging / LOCK)):
        raise SystemExit(
            f"{staging} is a link, or holds files and no {LOCK}, so no script of this suite made it. Move it away, or "
            f"name another {flag}."
        )
    return staging, lock(staging, flag)


def remove_claimed(staging):
    """Remove a folder that `claim` returned, its lock last: without it, no later run would take what is left."""
    for path in list(staging.glob("*")):
        if path.name != LOCK:
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def staged(folder, flag):
    """Yield an empty folder inside `unfinished(folder)`; rename it to `folder` after the block, which may fail.

    flag: the flag that names `folder`, for the message.
    Raises: SystemExit if `folder` already holds something, another process writes it, or the disk is full.
    """
    folder = refuse_unless_empty(folder, flag)
    try:
        staging, handle = claim(folder, flag)
        with handle:
            try:
                whole = staging / folder.name
                shutil.rmtree(whole, ignore_errors=True)  # of a run that was killed
                whole.mkdir()
                yield whole
                if folder.exists():
                    folder.rmdir()
                whole.rename(folder)
            finally:
                remove_claimed(staging)  # a full disk stays usable
    except (OSError, SafetensorError) as error:
        raise SystemExit(
            f"{folder} cannot be written ({error}). Free disk space, or name another {flag}; nothing was kept."
        ) from None


def lock(folder, flag):
    """Lock the folder for this process; return the file handle that holds the lock until it or the process ends.

    The kernel keeps the lock, so a crash of its owner frees it; only a child that was forked without exec keeps it.
    flag: the flag that names `folder`, for the message. Raises: SystemExit if another process holds the lock, or there
    can be none; OSError if the lock's file cannot be opened.
    """
    path = Path(folder) / LOCK
    try:
        handle = open(path, "r+", opener=open_without_links, encoding="utf-8", errors="replace")
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SystemExit(f"{path} is a link. Remove it, or name another {flag}.") from None
        raise
    owner = handle.read(100).strip("\0 \n")  # zeros, where the power failed before it was on the disk
    if owner and not owner.isdecimal():
        raise SystemExit(f"{path} isn't a lock: it holds more than a process number. Move it away.")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(
            f"{folder} is in use by another run (process {owner or 'unknown'}). Wait for it or name another {flag}."
        ) from None
    except OSError as error:
        raise SystemExit(
            f"{folder}: its file system has no locks ({error}), so a second run could not be kept out. Name another "
            f"{flag}, on a disk that has them."
        ) from None
    handle.seek(0)
    handle.truncate()
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle


def open_without_links(path, flags):
    """Open or make the file `path`, for `open`; a link is refused: it would lead to a file of somebody else."""
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)


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


# ==== The device ====

LOADED_DRIVER = Path("/proc/driver/nvidia/version")  # text of the kernel's module
PCI_DEVICES = Path("/sys/bus/pci/devices")
NVIDIA_DISPLAY = ("0x10de", "0x03")  # vendor and class of a graphics card on the PCI bus
# Major version of CUDA -> the oldest driver that runs programs built with it; NVIDIA, "CUDA minor version
# compatibility", table 1.
OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}


def nvidia_driver():
    """Return the version of the NVIDIA driver here ("535.183.01"), "" for a card without one, None for neither.

    WSL2 has a driver and no /proc/driver/nvidia: there nvidia-smi names it.
    """
    try:
        text = LOADED_DRIVER.read_text()
    except OSError:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
            text = answer.stdout if answer.returncode == 0 else ""
        except (OSError, subprocess.TimeoutExpired):
            text = ""
    if version := re.search(r"\b\d{3,}\.\d+(\.\d+)*", text):
        return version[0]
    for device in PCI_DEVICES.glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text()
            if vendor == NVIDIA_DISPLAY[0] and kind.startswith(NVIDIA_DISPLAY[1]):
                return ""
    return None


def unused_card(torch):
    """Return the sentences that say why `torch`, which sees no GPU, cannot use the NVIDIA card here; None without one.

    torch: the imported module.
    """
    driver, version, cuda = nvidia_driver(), torch.__version__, torch.version.cuda
    if driver is None:
        return None
    card = f"an NVIDIA card with driver {driver}" if driver else "an NVIDIA card without a driver"
    if cuda is None:
        plain = version.partition("+")[0]
        return (
            f"This machine has {card}, but torch {version} is built without CUDA. Install a build with it: "
            f"pip install --force-reinstall torch=={plain}."
        )
    oldest = OLDEST_DRIVER.get(cuda.partition(".")[0], max(OLDEST_DRIVER.values()))
    if not driver or int(driver.partition(".")[0]) < oldest:
        return (
            f"This machine has {card}, but torch {version} is built for CUDA {cuda}, which needs driver {oldest} or "
            "newer. Install that driver."
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        f"This machine has {card}, which is new enough, but torch {version} sees no GPU "
        f"(CUDA_VISIBLE_DEVICES is {visible!r}). Unset that variable, give a container its GPUs (docker run --gpus "
        "all), or restart the machine after a driver's update."
    )


def choose_device(setting, for_cpu):
    """Return "cuda" or "cpu" for a setting "auto" | "cuda" | "cpu". for_cpu: how to ask for the CPU, for the message.

    Raises: SystemExit if there is an NVIDIA card that torch cannot use, or none where one is asked for: a run that
    silently takes the CPU would take weeks instead of hours.
    """
    import torch

    if setting == "cpu" or torch.cuda.is_available():
        return "cpu" if setting == "cpu" else "cuda"
    problem = unused_card(torch)
    if problem is None and setting == "auto":
        return "cpu"
    raise SystemExit(f"{problem or 'Torch sees no GPU here.'} To run on the CPU instead: {for_cpu}.")
