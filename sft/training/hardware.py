"""What this process runs on: memory, peak FLOP/s, versions, commit."""

import math
import os
import platform
import resource
import subprocess
import time
from pathlib import Path

import datasets
import torch
import transformers

from sft import system

ROOT = Path(__file__).resolve().parents[2]

# Dense bfloat16 operations per second with float32 sums, from NVIDIA's data sheets.
# The first name that is in the card's counts.
PEAKS = {
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12,
    "A100": 312e12,
    "L40S": 362e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
}


def memory(device):
    """Return the bytes of memory that this rank can use: on a GPU what is free or already torch's, else its share.

    After `distributed.join` the CUDA context and NCCL have taken theirs; a desktop has what it shows now. On a CPU the
    ranks share the machine's memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_memory():
    """Return the bytes of this machine's memory that programs can still take, as Linux estimates; inf elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))


def memory_use(device):
    """Return the most memory that this rank has used so far, as metrics (dict).

    "allocated_gib": in tensors; "reserved_gib": taken from the GPU by torch's allocator, for tensors and the gaps
    between them; "allocation_retries": how often it found none left and had to give its gaps back first, which stops
    the GPU. On a CPU both are the whole process, without retries.
    """
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        allocated, reserved = stats["allocated_bytes.all.peak"], stats["reserved_bytes.all.peak"]
        retries = stats["num_alloc_retries"]
    else:
        allocated = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        retries = 0
    return {
        "allocated_gib": round(allocated / 2**30, 2),
        "reserved_gib": round(reserved / 2**30, 2),
        "allocation_retries": retries,
    }


def listed_peak(card):
    """Return the floating-point operations per second in PEAKS of the GPU with the name `card`, or None."""
    if "Laptop" in card:  # a smaller chip under a larger one's name
        return None
    return next((peak for name, peak in PEAKS.items() if name in card), None)


def peak_flops(device, dtype):
    """Return the most floating-point operations per second of this rank's device, from PEAKS or else measured now."""
    if device.type == "cuda" and (listed := listed_peak(torch.cuda.get_device_name(device))):
        return listed
    size = 4096 if device.type == "cuda" else 1024
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        (matrix @ matrix).sum().item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def compute_deterministically():
    """Make torch take only operations that give the same bits each time, before this process's first matmul on a GPU.

    What changes is flash attention's backward, which otherwise adds up the queries' gradients in the order in which its
    blocks finish; it needs memory for several copies of them. Torch raises RuntimeError for an operation that cannot.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS may take another workspace, and sum otherwise
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    torch.use_deterministic_algorithms(True)


def versions():
    """Return the versions, hardware and commit of this process as a dict."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "device": device,
        "commit": commit or "unknown",
        "code": system.folder_digest(ROOT, "*.py", "sft/**/*.py", "sft/**/*.jinja"),
    }
