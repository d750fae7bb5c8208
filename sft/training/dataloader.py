"""From the prepared sequences to the micro-batches of one rank, in the order in which it happens.

1. Order: which sequences an optimizer step trains. Seed and step alone decide it.
2. Layout: which rank and micro-batch each of them goes to. That changes the speed and nothing else.
3. MicroBatch: sequences end to end, with the positions and targets of the loss.
4. PackedLoader: reads and lays out one step ahead of the training.
"""

import math
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
import torch.distributed as dist

from sft import system
from sft.data import writer

# ==== Data ====


def load_data(data_dir):
    """Return the `datasets` splits "train" and "validation" of the folder. Raises: SystemExit if they do not load."""
    columns = ["input_ids", "assistant_masks", "source"]
    try:
        data = datasets.load_from_disk(data_dir)
        return {name: data[name].select_columns(columns) for name in ("train", "validation")}
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"{data_dir} holds no finished data ({error}). Run prepare_data.py again.") from None


def sequence_lengths(dataset):
    """Return the length in tokens of each sequence of a `datasets` split, int64 [sequences], without reading them."""
    return pc.list_value_length(dataset.data.column("input_ids")).to_numpy().astype(np.int64)


def read_report(data_dir):
    """Return the dict of report.json in the folder `data_dir` that prepare_data.py wrote."""
    return system.read_json(Path(data_dir) / "report.json", "prepare_data.py")


def check_digests(data, report, data_dir):
    """Raise SystemExit, naming source and split, unless the sequences are those that the `report` describes.

    data: the splits of `load_data`. All their bytes are read, in threads, a batch of each file in memory at a time.
    """
    again = f"Run prepare_data.py again, or copy {data_dir} again."
    files, expected = [], []
    try:
        for split, dataset in data.items():
            paths = [file["filename"] for file in dataset.cache_files]
            digests = [source["digest"][split] for source in report["sources"]]
            if len(paths) != len(digests) or writer.digest_of_digests(digests) != report["digest"][split]:
                raise KeyError
            names = [source["name"] for source in report["sources"]]
            files += paths
            expected += zip(digests, names, [split] * len(names), strict=True)
    except (KeyError, TypeError):
        raise SystemExit(f"{data_dir}: its report.json does not describe its {split} split. {again}") from None
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures = [pool.submit(writer.file_digest, path) for path in files]
        for path, future, (digest, name, split) in zip(files, futures, expected, strict=True):
            try:
                found = future.result()
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # pyarrow's are among them
                raise SystemExit(f"{path} ({name}, {split} split) cannot be read ({error}). {again}") from None
            if found != digest:
                raise SystemExit(
                    f"{path}: the ids, lengths or masks of {name} ({split} split) are not what prepare_data.py wrote: "
                    f"their SHA-256 is {found[:12]}..., the report's {digest[:12]}... {again}"
                )


def check_lengths(lengths, split, need, config, budget):
    """Refuse a split with fewer than `need` sequences or with one that no micro-batch or the model cannot hold."""
    if len(lengths) < need:
        remedy = "lower SEQUENCES_PER_STEP" if split == "training" else "set VALIDATE_EVERY to 0"
        raise SystemExit(
            f"The {split} split has {len(lengths)} sequences, fewer than the {need} needed. Prepare more data with "
            f"prepare_data.py, or {remedy}."
        )
    longest = int(lengths.max(initial=0))
    if 0 < budget < longest:
        raise SystemExit(
            f"Sequence {int(lengths.argmax())} of the {split} split has {longest} tokens, more than "
            f"TOKENS_PER_MICRO_BATCH = {budget}. Raise it to at least {longest}."
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    context = min(config.max_position_embeddings, window or math.inf)
    if longest > context:
        raise SystemExit(
            f"The {split} split has a sequence of {longest} tokens, the model's context or window is {context}. "
            f"Run prepare_data.py with --max-seq-len {context}."
        )


def warn_of_limit(report):
    """Print a warning if the data is only a quick look. report: dict of the data's report.json."""
    if limit := report.get("limit"):
        print(f"WARNING: the data was prepared with --limit {limit}. Don't take this run for the real one.")


# ==== 1. Order ====


@lru_cache(maxsize=2)
def epoch_order(sequences, seed, epoch):
    """Return the order (int64 array of `sequences` indices) in which `epoch` visits the data."""
    return np.random.default_rng([seed, epoch]).permutation(sequences)


def steps_per_epoch(sequences, sequences_per_step):
    """Return the number of whole steps in one epoch. The few sequences left over are not trained in that epoch."""
    return sequences // sequences_per_step


def sequences_of_step(sequences, seed, step, sequences_per_step):
    """Return the indices (list of `sequences_per_step` ints) that optimizer step `step` (from 0) trains on."""
    epoch, step_of_epoch = divmod(step, steps_per_epoch(sequences, sequences_per_step))
    start = step_of_epoch * sequences_per_step
    return epoch_order(sequences, seed, epoch)[start : start + sequences_per_step].tolist()


# ==== 2. Layout over ranks and micro-batches ====


def cost(tokens, matrices, attention):
    """Return the floating-point operations of a sequence in the blocks, forward and backward.

    tokens: int or int64 array; matrices: parameters that each token is multiplied with; attention: layers x heads x
    head_dim. Two operations per multiply-add; the backward is twice the forward; causal attention needs half of the
    pairs (Chowdhery et al. 2022, appendix B, counts all of them). Recomputation is not counted.
    """
    return tokens * (6 * matrices + 6 * attention * tokens)


def pack(indices, lengths, budget):
    """Return `indices` in as few micro-batches (lists) of at most `budget` tokens as first-fit-decreasing finds."""
    micro_batches, room = [], []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        number = next((n for n, free in enumerate(room) if free >= lengths[index]), None)
        if number is None:
            number = len(micro_batches)
            micro_batches.append([])
            room.append(budget)
        micro_batches[number].append(index)
        room[number] -= lengths[index]
    return micro_batches


def spread(indices, values, bins):
    """Return `indices` in `bins` lists with sums of `values` as equal as largest-first into the emptiest makes them.

    values: indexable by the indices. Longest-processing-time-first (Graham 1969); ties go to the lower number.
    """
    lists, loads = [[] for _ in range(bins)], [0] * bins
    for index in sorted(indices, key=lambda i: (-values[i], i)):
        emptiest = min(range(bins), key=lambda n: (loads[n], n))
        lists[emptiest].append(index)
        loads[emptiest] += values[index]
    return lists


def full_micro_batches(indices, lengths, budget, least):
    """Return `indices` in as few micro-batches as `pack` finds, or `least`: the fullest last, the next fullest first.

    The first one's forward hides the gathers of the parameters and the last one's backward the reductions of the
    gradients; on a slow link both take longer than that, and what is between the two hides nothing.
    """

    def tokens(micro_batch):
        return sum(lengths[i] for i in micro_batch)

    micro_batches = pack(indices, lengths, budget)
    micro_batches += [[] for _ in range(least - len(micro_batches))]
    micro_batches.sort(key=tokens)
    return micro_batches[-2:-1] + micro_batches[:-2] + micro_batches[-1:]


def lay_out(indices, lengths, ranks, budget, costs, equal_counts):
    """Lay the sequences of one step out over ranks and micro-batches.

    indices: the sequences of the step; lengths, costs: indexable by them, in tokens and relative time; equal_counts:
    give all ranks the same number of micro-batches, as they need whose every forward gathers parameters.
    Returns: list of `ranks` lists of micro-batches, each a list of indices; none has more than `budget` tokens. A rank
    has at least one, because the first forward and the last backward of a step are collective; it is empty where a rank
    has no sequence. With `equal_counts` others may be empty, too.
    At 32 sequences the ranks' times differ by a few percent.
    """
    shares = spread(indices, costs, ranks)
    least = max(len(pack(share, lengths, budget)) for share in shares) if equal_counts else 0
    return [full_micro_batches(share, lengths, budget, max(1, least)) for share in shares]


def idle_share(layout, costs):
    """Return the share of the ranks' time spent waiting for the slowest: 1 - sum of cost / (ranks x largest cost)."""
    loads = [sum(costs[i] for micro_batch in rank for i in micro_batch) for rank in layout]
    return 1 - sum(loads) / (len(loads) * max(loads))


@dataclass
class Survey:
    """What the layouts of many steps have in common."""

    micro_batches: float  # mean number per rank and step
    idle_share: float  # mean share of the ranks' time that is spent waiting
    largest: list  # indices of the sequences in the micro-batch with the most tokens


def survey(lengths, ranks, budget, costs, equal_counts, seed, steps, sequences_per_step):
    """Lay out the first `steps` steps of a run and return their Survey."""
    count, idle = 0, 0.0
    largest, largest_tokens = [], 0
    for step in range(steps):
        indices = sequences_of_step(len(lengths), seed, step, sequences_per_step)
        layout = lay_out(indices, lengths, ranks, budget, costs, equal_counts)
        count += sum(len(micro_batches) for micro_batches in layout)
        idle += idle_share(layout, costs)
        for micro_batches in layout:
            for micro_batch in micro_batches:
                tokens = sum(lengths[i] for i in micro_batch)
                if tokens > largest_tokens:
                    largest, largest_tokens = micro_batch, tokens
    return Survey(count / (steps * ranks), float(idle / steps), largest)


# ==== 3. Micro-batch ====


@dataclass(eq=False)
class Documents:
    """Where the documents of a micro-batch are. One opaque object: torch.compile would guard each length of a list."""

    lengths: list  # of int, in order; their sum is the number of tokens
    bounds: torch.Tensor  # int32 [documents + 1], the starts and the end


@dataclass(eq=False)
class MicroBatch:
    """The input of SFTModel.forward: documents end to end, without padding.

    Not frozen: FSDP2 makes a copy of a dataclass with its floating-point tensors cast, and there are none here.
    """

    input_ids: torch.Tensor  # int64 [1, tokens]
    position_ids: torch.Tensor  # int64 [1, tokens], from 0 in each document
    predictors: torch.Tensor  # int64 [trainable tokens], the positions whose outputs predict the targets
    targets: torch.Tensor | None  # int64 [trainable tokens]; None to get the logits at the predictors
    documents: Documents

    @property
    def tokens(self):
        return self.input_ids.numel()

    def to(self, device):
        """Return the MicroBatch on `device`; from pinned memory the copy does not wait."""
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):
        """Return the MicroBatch in pinned memory, from which a GPU copies without waiting."""
        return self._each_tensor(torch.Tensor.pin_memory)

    def _each_tensor(self, action):
        return MicroBatch(
            input_ids=action(self.input_ids),
            position_ids=action(self.position_ids),
            predictors=action(self.predictors),
            targets=None if self.targets is None else action(self.targets),
            documents=Documents(self.documents.lengths, action(self.documents.bounds)),
        )


def concatenate(rows):
    """Return the MicroBatch of `rows`, a list of (input_ids, assistant_masks) arrays, on the CPU.

    An empty list becomes one token with nothing to train, so that this rank still takes part in the collectives.
    """
    if not rows:
        rows = [(np.zeros(1, np.int64), np.zeros(1, bool))]
    ids = np.concatenate([ids for ids, _ in rows]).astype(np.int64)
    trained = np.concatenate([mask for _, mask in rows])
    lengths = [len(ids) for ids, _ in rows]
    bounds = np.cumsum([0, *lengths])
    trained[bounds[:-1]] = False  # a sequence's first token has nothing before it that could predict it
    targets = np.flatnonzero(trained)
    positions = np.concatenate([np.arange(length) for length in lengths])
    return MicroBatch(
        input_ids=torch.from_numpy(ids[None]),
        position_ids=torch.from_numpy(positions[None]),
        predictors=torch.from_numpy(targets - 1),
        targets=torch.from_numpy(ids[targets]),
        documents=Documents(lengths, torch.from_numpy(bounds.astype(np.int32))),
    )


# ==== 4. Loader ====


@dataclass
class StepBatch:
    """This rank's part of one optimizer step, or of a step of the validation.

    stats: "tokens", "trainable_tokens", "idle_share" and "flops" (forward and backward) over all ranks, and
    "data_seconds", for which this rank waited for the batch.
    """

    indices: list  # of int, the sequences of all ranks
    micro_batches: list  # of MicroBatch, of this rank, on its device
    stats: dict


class PackedLoader:
    """Turns lists of sequence indices into this rank's StepBatch of each, one list ahead of the training."""

    def __init__(self, dataset, sizes, budget, device, equal_counts=False):
        """dataset: a `datasets` split; sizes: memory_plan.Shapes; budget: tokens per micro-batch.

        equal_counts: see `lay_out`.
        """
        self.dataset = dataset.select_columns(["input_ids", "assistant_masks"]).with_format("numpy")
        self.lengths = sequence_lengths(dataset)
        self.costs = cost(self.lengths, sizes.matrices, sizes.attention)
        self.head = sizes.head
        self.budget = budget
        self.device = device
        self.equal_counts = equal_counts

    def steps(self, seed, sequences_per_step, first, last):
        """Yield the StepBatch of each optimizer step from `first` (from 0) to before `last`."""
        count = len(self.lengths)
        steps = range(first, last)
        return self.batches(sequences_of_step(count, seed, step, sequences_per_step) for step in steps)

    def batches(self, lists):
        """Yield the StepBatch of each of `lists` of indices. A thread prepares the next one meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            ahead = deque()
            for indices in lists:
                ahead.append(pool.submit(self.build, indices))
                if len(ahead) > 1:
                    yield self.receive(ahead.popleft())
            while ahead:
                yield self.receive(ahead.popleft())

    def receive(self, future):
        """Wait for the StepBatch of `build` and move it to the device."""
        start = time.perf_counter()
        batch = future.result()
        batch.stats["data_seconds"] = round(time.perf_counter() - start, 4)
        batch.micro_batches = [micro_batch.to(self.device) for micro_batch in batch.micro_batches]
        return batch

    def build(self, indices):
        """Return the StepBatch of a list of `indices`, on the CPU (in pinned memory if a GPU will take it)."""
        ranks = dist.get_world_size()
        layout = lay_out(indices, self.lengths, ranks, self.budget, self.costs, self.equal_counts)
        rows = self.rows(indices)
        micro_batches = [concatenate([rows[i] for i in part]) for part in layout[dist.get_rank()]]
        if self.device.type == "cuda":
            micro_batches = [micro_batch.pin_memory() for micro_batch in micro_batches]
        trainable_tokens = sum(int(mask[1:].sum()) for _, mask in rows.values())
        stats = {
            "tokens": int(self.lengths[indices].sum()),
            "trainable_tokens": trainable_tokens,
            "idle_share": round(float(idle_share(layout, self.costs)), 4),
            "flops": int(self.costs[indices].sum()) + 6 * self.head * trainable_tokens,
        }
        return StepBatch(indices, micro_batches, stats)

    def rows(self, indices):
        """Return {index: (input_ids, assistant_masks)} of some sequences, as arrays."""
        rows = self.dataset[indices]
        pairs = zip(rows["input_ids"], rows["assistant_masks"], strict=True)
        return dict(zip(indices, pairs, strict=True))
