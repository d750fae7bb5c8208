"""How fast do the cards exchange what training exchanges? One gather and one reduction of a block, as FSDP2 makes them.

    torchrun --nproc-per-node 2 benchmarks/link_speed.py

benchmarks/gpu.py runs it. The ranks join as sft_v1.py's do, with its environment (NCCL_P2P_DISABLE on RTX 40 cards).
A gather collects every rank's shard of the parameters in bfloat16, a reduction leaves each rank its shard of the sum of
the float32 gradients. The speed is what a rank receives over the links, in 1e9 bytes, by the fastest of REPEATS calls.
Rank 0 prints one line of JSON: gather_gb_per_s, reduce_gb_per_s; null with one rank, where nothing is sent.
"""

import json
import math
import time

import common  # noqa: F401, puts the suite's modules on the path
import torch
import torch.distributed as dist

from sft import settings
from sft.training import distributed

PARAMETERS = 29_000_000  # of the block; Genesis's has 28.9 million
REPEATS = 20  # calls of each kind, after a first one
DEVICE = "auto"  # "auto" | "cuda" | "cpu"

# ==== Measurement ====


def fastest(collective, device):
    """Return the seconds of the fastest of REPEATS calls of `collective`."""
    best = math.inf
    for _ in range(REPEATS + 1):
        dist.barrier()
        begin = time.perf_counter()
        collective()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


def measure(device):
    """Return {"gather_gb_per_s", "reduce_gb_per_s"}."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return {"gather_gb_per_s": None, "reduce_gb_per_s": None}
    shard = math.ceil(PARAMETERS / ranks)
    part = torch.ones(shard, dtype=torch.bfloat16, device=device)
    whole = torch.empty(shard * ranks, dtype=torch.bfloat16, device=device)
    gradients = torch.ones(shard * ranks, dtype=torch.float32, device=device)
    gradient = torch.empty(shard, dtype=torch.float32, device=device)
    gather = fastest(lambda: distributed.all_gather(whole, part), device)
    reduction = fastest(lambda: distributed.reduce_scatter(gradient, gradients), device)
    received = shard * (ranks - 1) / 1e9
    return {
        "gather_gb_per_s": received * part.element_size() / gather,
        "reduce_gb_per_s": received * gradient.element_size() / reduction,
    }


def main(args):
    """Join the ranks, measure, and print the line on rank 0."""
    device, _ = distributed.join(args["DEVICE"])
    figures = measure(device)
    if dist.get_rank() == 0:
        print(json.dumps(figures), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(settings.from_flags(globals()))
