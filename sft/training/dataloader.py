"""Which sequence in which micro-batch on which rank: pure functions of lengths, seed, step, ranks and token budget.

An optimizer step is a set of `sequences_per_step` sequences, fixed by the seed and the step alone. How they are laid
out over ranks and micro-batches changes the speed and nothing else. Each rank runs the same number of micro-batches,
because every forward is a collective operation under FSDP.
"""

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
import torch.distributed as dist


@lru_cache(maxsize=2)
def epoch_order(sequences, seed, epoch):
    """Return the order (int64 array of `sequences` indices) in which `epoch` visits the data."""
    return np.random.default_rng([seed, epoch]).permutation(sequences)


def steps_per_epoch(sequences, sequences_per_step):
    """Return the number of whole steps in one epoch; the few sequences left over are not trained in that epoch."""
    return sequences // sequences_per_step


def sequences_of_step(sequences, seed, step, sequences_per_step):
    """Return the indices (int64 array of `sequences_per_step`) that optimizer step `step` (from 0) trains on."""
    epoch, position = divmod(step, steps_per_epoch(sequences, sequences_per_step))
    start = position * sequences_per_step
    return epoch_order(sequences, seed, epoch)[start : start + sequences_per_step]


def cost(tokens, matrices, attention):
    """Return the floating-point operations of a sequence in the blocks, forward and backward.

    tokens: int or int64 array; matrices: parameters that each token is multiplied with; attention: layers x heads x
    head_dim. Two operations per multiply-add; the backward is twice the forward; causal attention needs half of the
    pairs (Chowdhery et al. 2022, appendix B, counts all of them). Recomputation is not counted.
    """
    return tokens * (6 * matrices + 6 * attention * tokens)


def pack(indices, lengths, budget):
    """Return `indices` in as few micro-batches (lists) of at most `budget` tokens as first-fit-decreasing finds."""
    bins, room = [], []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        place = next((b for b, free in enumerate(room) if free >= lengths[index]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(budget)
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def lay_out(indices, lengths, ranks, budget, costs):
    """Lay the sequences of one step out over ranks and micro-batches.

    indices: the sequences of the step; lengths, costs: indexable by them, in tokens and relative time.
    Returns: list of `ranks` lists of micro-batches, each a list of indices; all ranks have the same number. A
    micro-batch is empty where a rank has fewer sequences than another has micro-batches.
    Longest-processing-time-first (Graham 1969) balances the ranks to within a few percent at 32 sequences.
    """
    shares, load = [[] for _ in range(ranks)], [0] * ranks
    for index in sorted(indices, key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        shares[rank].append(index)
        load[rank] += costs[index]
    plan = [pack(share, lengths, budget) for share in shares]
    micro_batches = max(len(bins) for bins in plan)
    for bins in plan:
        while len(bins) < micro_batches:
            fullest = max(bins, key=len, default=[])
            bins.append([fullest.pop()] if len(fullest) > 1 else [])
    return plan


def idle_share(plan, costs):
    """Return the share of the ranks' time that waits for the slowest: 1 - sum of cost / (ranks x largest cost)."""
    loads = [sum(costs[i] for bins in rank for i in bins) for rank in plan]
    return 1 - sum(loads) / (len(loads) * max(loads))


def survey(lengths, ranks, budget, costs, seed, steps, sequences_per_step):
    """Lay out the first `steps` steps of a run and look at them.

    Returns: {"micro_batches": mean number per rank and step, "idle_share": mean, "largest": the indices in the
    micro-batch with the most tokens}.
    """
    forwards, idle, largest, most = 0, 0.0, [], 0
    for step in range(steps):
        indices = sequences_of_step(len(lengths), seed, step, sequences_per_step).tolist()
        plan = lay_out(indices, lengths, ranks, budget, costs)
        forwards += len(plan[0])
        idle += idle_share(plan, costs)
        for bins in plan:
            for micro_batch in bins:
                if (tokens := sum(lengths[i] for i in micro_batch)) > most:
                    largest, most = micro_batch, tokens
    return {"micro_batches": forwards / steps, "idle_share": float(idle / steps), "largest": largest}


# ==== Attention: documents laid end to end, none sees another ====


@dataclass(eq=False)
class Documents:
    """Where the documents of a micro-batch are. One opaque object: torch.compile would guard each length of a list."""

    lengths: list  # of int, in order, summing to the tokens
    bounds: torch.Tensor  # int32 [documents + 1], the starts and the end


# ==== Inputs ====


def micro_batch(rows):
    """Lay sequences end to end. rows: list of (input_ids, assistant_masks) arrays; returns SFTModel.forward's inputs.

    An empty list becomes one token with nothing to train, so that this rank still takes part in the collectives.
    """
    rows = rows or [(np.zeros(1, np.int64), np.zeros(1, bool))]
    ids = np.concatenate([ids for ids, _ in rows]).astype(np.int64)
    lengths = [len(ids) for ids, _ in rows]
    trained = np.concatenate([mask for _, mask in rows])
    starts = np.cumsum([0, *lengths])
    trained[starts[:-1]] = False  # a sequence's first token has nothing before it that could predict it
    targets = np.flatnonzero(trained)
    tensor = {
        "input_ids": ids[None],
        "position_ids": np.concatenate([np.arange(length) for length in lengths])[None],
        "predictors": targets - 1,
        "targets": ids[targets],
    }
    tensors = {name: torch.from_numpy(array) for name, array in tensor.items()}
    return tensors | {"documents": Documents(lengths, torch.from_numpy(starts.astype(np.int32)))}


def each_tensor(batch, action):
    """Return the inputs `batch` of SFTModel.forward with `action(tensor)` in place of each tensor."""
    documents = batch["documents"]
    changed = {name: t if t is None else action(t) for name, t in batch.items() if name != "documents"}
    return changed | {"documents": Documents(documents.lengths, action(documents.bounds))}


# ==== Data ====


def load_data(data_dir):
    """Return the `datasets` splits "train" and "validation" of the folder. Raises: SystemExit if they do not load."""
    try:
        data = datasets.load_from_disk(data_dir)
        wanted = ["input_ids", "assistant_masks", "source"]
        return {name: data[name].select_columns(wanted) for name in ("train", "validation")}
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"{data_dir} holds no finished data ({error}). Run prepare_data.py again.") from None


def sequence_lengths(dataset):
    """Return the length in tokens of each sequence of a `datasets` split, int64 [sequences], without reading them."""
    return pc.list_value_length(dataset.data.column("input_ids")).to_numpy().astype(np.int64)


class Batches:
    """Turns lists of sequence indices into this rank's micro-batches of them, one list ahead of the training."""

    def __init__(self, dataset, sizes, budget, device):
        self.dataset = dataset.select_columns(["input_ids", "assistant_masks"]).with_format("numpy")
        self.lengths = sequence_lengths(dataset)
        self.costs = cost(self.lengths, sizes.matrices, sizes.attention)
        self.head, self.budget, self.device = sizes.head, budget, device

    def each(self, lists):
        """Yield (indices, this rank's micro-batches, facts) for each of `lists` of indices.

        A thread reads and lays out the next list meanwhile. facts: "tokens", "trainable_tokens", "idle_share" and
        "flops" (forward and backward) over all ranks, "data_seconds" that the training waited.
        """
        with ThreadPoolExecutor(1) as pool:
            ahead = deque()
            for indices in lists:
                ahead.append(pool.submit(self.build, indices))
                if len(ahead) > 1:
                    yield self.ready(ahead.popleft())
            while ahead:
                yield self.ready(ahead.popleft())

    def ready(self, promise):
        """Wait for what `build` made and move it to the device."""
        began = time.perf_counter()
        indices, batches, facts = promise.result()
        waited = {"data_seconds": round(time.perf_counter() - began, 4)}
        return indices, [each_tensor(batch, self.to_device) for batch in batches], facts | waited

    def to_device(self, tensor):
        return tensor.to(self.device, non_blocking=True)

    def build(self, indices):
        """Return what `each` yields for `indices`, on the CPU (in pinned memory if a GPU will take it)."""
        indices = [int(i) for i in indices]
        plan = lay_out(indices, self.lengths, dist.get_world_size(), self.budget, self.costs)
        rows = self.rows(indices)
        batches = [micro_batch([rows[i] for i in batch]) for batch in plan[dist.get_rank()]]
        if self.device.type == "cuda":
            batches = [each_tensor(batch, torch.Tensor.pin_memory) for batch in batches]
        trainable = sum(int(mask[1:].sum()) for _, mask in rows.values())
        facts = {
            "tokens": int(self.lengths[indices].sum()),
            "trainable_tokens": trainable,
            "idle_share": round(float(idle_share(plan, self.costs)), 4),
            "flops": int(self.costs[indices].sum()) + 6 * self.head * trainable,
        }
        return indices, batches, facts

    def rows(self, indices):
        """Return {index: (input_ids, assistant_masks)} of some sequences."""
        rows = self.dataset[indices]
        return dict(zip(indices, zip(rows["input_ids"], rows["assistant_masks"], strict=True), strict=True))
