"""What a run needs, from shapes alone: bytes per rank, bytes sent per step, operations per step.

Used by sft_v1.py before each run and by its --plan-only. No weights are loaded: the model is on the meta device, where
a tensor has a shape and no memory, and runs one forward and backward of the largest micro-batch there.
"""

import copy
import dataclasses
import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM

from sft.training import dataloader
from sft.training import model as sft_model
from sft.training.schedule import Schedule

GIB = 2**30
BUDGETS = (8192, 6144, 5120, 4096, 3072, 2048, 1024)  # tokens per micro-batch that "auto" tries
# Bytes that torch's allocator keeps on a GPU in gaps between tensors, as a share of the tensors. A simulated allocator
# took 0.5% more than the planned tensors in one step of Genesis on two cards; sizes that change over many steps add.
GAPS = 0.03

# ==== The model's shapes and the machine ====


@dataclass(frozen=True)
class Shapes:
    """Numbers of parameters of a model, by FSDP unit, and of multiply-adds."""

    block: int  # the largest block
    blocks: int  # all of them
    root: int  # embedding, last norm, head; a tied head once
    matrices: int  # parameters of the blocks that each token is multiplied with
    head: int  # parameters of the head: vocabulary x hidden
    attention: int  # layers x heads x head_dim

    @property
    def all(self):
        return self.blocks + self.root


@dataclass(frozen=True)
class Topology:
    """The ranks of a run. Those of one machine share a model; each machine has a copy."""

    ranks: int
    machines: int
    device: str  # "cuda" | "cpu"

    @property
    def shards(self):
        return self.ranks // self.machines


def on_meta(config, dtype, layers=None):
    """Return the causal LM of a transformers `config` on the meta device, with only `layers` blocks if given."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="packed")


def shapes(config):
    """Return the Shapes of a transformers `config`."""
    causal_lm = on_meta(config, torch.float32)
    layers = causal_lm.base_model.layers
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shapes(
        block=max(blocks),
        blocks=sum(blocks),
        root=sum(p.numel() for p in causal_lm.parameters()) - sum(blocks),
        matrices=sum(p.numel() for p in layers.parameters() if p.ndim == 2),
        head=causal_lm.get_output_embeddings().weight.numel(),
        attention=config.num_hidden_layers * config.num_attention_heads * head_dim,
    )


# ==== Activations: what one forward and backward holds ====


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive: `peak` is the most there was at once, without those of `known`.

    known: tensors that were there before; what is a view of them costs nothing.
    Summing over all tensors after each operation would take most of the time, so `bound` is kept instead: the last sum
    and all growth since. While it is below the peak, so is the sum.
    """

    def __init__(self, known):
        super().__init__()
        self.before = WeakIdKeyDictionary((t.untyped_storage(), None) for t in known)
        self.alive = WeakIdKeyDictionary()  # storage -> its bytes when last seen: FSDP resizes storages
        self.bound = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                self.see(local.untyped_storage())
        if self.bound > self.peak:
            for storage in self.alive:
                self.alive[storage] = storage.nbytes()
            self.bound = sum(self.alive.values())
            self.peak = max(self.peak, self.bound)
        return result

    def see(self, storage):
        """Add the growth of `storage` since it was last seen to the bound."""
        if storage not in self.before:
            growth = storage.nbytes() - self.alive.get(storage, 0)
            if growth > 0:
                self.alive[storage] = storage.nbytes()
                self.bound += growth


def activation_bytes(config, dtype, lengths, checkpointing, device_type):
    """Return the peak bytes of one forward and backward, without parameters and their gradients.

    lengths: tokens of each document of the micro-batch; all of them are trained; device_type: of the run.
    The peak of a model grows by the same bytes with each block, so two small models give that of any number of blocks.
    """
    batch = dataloader.concatenate([(np.zeros(n, np.int64), np.ones(n, bool)) for n in lengths]).to("meta")
    peaks = []
    for layers in (2, 3):
        model = sft_model.SFTModel(on_meta(config, dtype, layers)).train()
        sft_model.prepare_blocks(model, checkpointing, False, device_type)
        for p in model.parameters():  # FSDP takes a gradient away as soon as it is there
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            model(batch).backward()
        peaks.append(live.peak)
    per_block = peaks[1] - peaks[0]
    return peaks[0] + (config.num_hidden_layers - 2) * per_block


# ==== The plan ====


@dataclass(frozen=True)
class Plan:
    """The choices that decide speed and memory, and the bytes of one rank that follow from them."""

    communicate: str  # "per_step" | "per_micro_batch"
    checkpointing: bool
    tokens: int  # of the largest micro-batch allowed
    masters: int  # bytes of the fp32 parameters' shard
    moments: int  # of AdamW's two
    gathered: int  # parameters in the compute dtype, and the buffers they come in: a pool that nothing else can use
    gradients: int  # unsharded ones, or the shard that they are reduced to, and the buffers of the reduction
    activations: int  # the most that one forward and backward holds
    gaps: int  # between tensors, in the memory of a GPU
    staging: int = 0  # of host memory, for saves beside training; not in the total

    @property
    def total(self):
        return sum(getattr(self, part) for part in PARTS)


PARTS = ("masters", "moments", "gathered", "gradients", "activations", "gaps")  # of Plan.total


def estimate(sizes, shards, dtype, communicate, checkpointing, tokens, activations, device_type):
    """Return the Plan of one rank among `shards` that share a model.

    dtype: torch.dtype of the compute; activations: bytes of the micro-batch's, from activation_bytes.
    FSDP2 keeps a unit's gathered parameters in the compute dtype and reduces its gradients in fp32. On a GPU the total
    is what torch's allocator takes from it ("reserved"), not only what is in tensors.
    """
    if communicate == "per_step":  # everything is gathered once and kept; gradients add up unsharded, in fp32
        gathered = dtype.itemsize * (sizes.all + max(sizes.block, sizes.root))
        gradients = 4 * (sizes.all + max(2 * sizes.block, sizes.root)) + dtype.itemsize * sizes.block
    else:  # the root, the block at work and the one fetched ahead, each next to the buffer it comes in
        gathered = dtype.itemsize * (sizes.root + 4 * sizes.block)
        gradients = 4 * sizes.all // shards + (4 + dtype.itemsize) * max(sizes.block, sizes.root) + 4 * sizes.block
    masters, moments = 4 * sizes.all // shards, 8 * sizes.all // shards
    tensors = masters + moments + gathered + gradients + activations
    return Plan(
        communicate=communicate,
        checkpointing=checkpointing,
        tokens=tokens,
        masters=masters,
        moments=moments,
        gathered=gathered,
        gradients=gradients,
        activations=activations,
        gaps=int(GAPS * tensors) if device_type == "cuda" else 0,
    )


def choose(config, sizes, shards, dtype, args, longest, limit, device_type):
    """Return the fastest Plan that fits into `limit` bytes, or the smallest one if none does.

    args: the settings; "auto" and 0 are chosen here. In this order: communicating once per step saves the most time
    between cards without NVLink, then not recomputing blocks (a third more work), then larger micro-batches.
    """
    ways = [args["COMMUNICATE"]]
    if args["COMMUNICATE"] == "auto":
        ways = ["per_step", "per_micro_batch"]
    recompute = [args["ACTIVATION_CHECKPOINTING"] == "on"]
    if args["ACTIVATION_CHECKPOINTING"] == "auto":
        recompute = [False, True]
    budgets = [args["TOKENS_PER_MICRO_BATCH"]]
    if args["TOKENS_PER_MICRO_BATCH"] == 0:
        budgets = [budget for budget in BUDGETS if budget >= longest] or [longest]

    @functools.cache
    def activations(tokens, checkpointing):
        lengths = [longest] * (tokens // longest)  # the longest documents need the most
        if tokens % longest:
            lengths.append(tokens % longest)
        return activation_bytes(config, dtype, lengths, checkpointing, device_type)

    plans = []
    for communicate, checkpointing, tokens in itertools.product(ways, recompute, budgets):
        size = activations(tokens, checkpointing)
        plan = estimate(sizes, shards, dtype, communicate, checkpointing, tokens, size, device_type)
        if plan.total <= limit:
            return plan
        plans.append(plan)
    return min(plans, key=lambda plan: plan.total)


def staging_bytes(args, sizes, topology, total_steps):
    """Return the bytes of host memory into which a save beside training copies one rank's weights and moments.

    0 if training waits for each save: with ASYNC_SAVE "off", or if the only one is the last.
    """
    if args["ASYNC_SAVE"] == "off" or args["SAVE_EVERY"] >= total_steps:
        return 0
    return 12 * sizes.all // topology.shards


def sent_per_step(sizes, topology, dtype, communicate, micro_batches):
    """Return the bytes that one rank sends in an optimizer step, in rings: gathers, reductions, the sum over machines.

    Once per step, each unit is gathered once and its gradients reduced once. Else in each micro-batch a block is
    gathered twice (forward, backward), the root once, and all gradients are reduced.
    """
    shards, machines = topology.shards, topology.machines
    gathered, reductions = sizes.all, 1
    if communicate == "per_micro_batch":
        gathered, reductions = (2 * sizes.blocks + sizes.root) * micro_batches, micro_batches
    inside = (gathered * dtype.itemsize + reductions * 4 * sizes.all) * (shards - 1) / shards
    across = reductions * 2 * 4 * sizes.all / shards * (machines - 1) / machines
    return inside + across


# ==== At the start of a run ====


def describe(plan, sizes, args, lengths, survey, total_steps, limit, topology):
    """Return the lines that say what the run will train, hold, send and take.

    survey: dataloader.Survey; limit: bytes a rank may use; topology: Topology.
    """
    mean, longest = lengths.mean(), int(lengths.max())
    per_step, speed = args["SEQUENCES_PER_STEP"], args["EXPECTED_TOKENS_PER_SECOND"]
    real, slots = per_step * mean, per_step * longest
    dtype = getattr(torch, args["COMPUTE_DTYPE"])
    parts = ", ".join(f"{name} {getattr(plan, name) / GIB:.1f}" for name in PARTS)
    sent = {}
    for way in ("per_step", "per_micro_batch"):
        sent[way] = sent_per_step(sizes, topology, dtype, way, survey.micro_batches) / 1e9
    spread = ""
    if topology.machines > 1:
        spread = f", sharded over {topology.shards}, on {topology.machines} machines"
    recompute = "on" if plan.checkpointing else "off"
    checkpoint, kept, best = sizes.all * 12 / GIB, args["KEEP_CHECKPOINTS"], int(args["VALIDATE_EVERY"] > 0)
    saving = "training waits for each save"
    if plan.staging:
        saving = f"written beside training from {plan.staging / GIB:.1f} GiB of host memory per rank"
    left_over, epoch = len(lengths) % per_step, ""
    if left_over and total_steps >= dataloader.steps_per_epoch(len(lengths), per_step):
        epoch = f"; {left_over:,} of {len(lengths):,} sequences are left over at the end of each epoch"
    lines = {
        "model": f"{args['RESIZED_MODEL']}: {sizes.all:,} parameters, {args['COMPUTE_DTYPE']} compute, float32 masters",
        "ranks": f"{topology.ranks} on {topology.device}{spread}",
        "data": f"{len(lengths):,} sequences, {int(lengths.sum()):,} tokens, mean {mean:.0f}, longest {longest}",
        "step": f"{per_step} sequences = about {real:,.0f} real tokens (padded to {longest} each, it would be "
        f"{slots:,} slots, {1 - real / slots:.0%} of them padding)",
        "layout": f"{plan.tokens:,} tokens per micro-batch, {survey.micro_batches:.1f} of them per rank and step; "
        f"ranks wait {survey.idle_share:.1%}; activation checkpointing {recompute}",
        "memory": f"{plan.total / GIB:.1f} of {limit / GIB:.1f} GiB per rank: {parts}",
        "traffic": f"{plan.communicate}: {sent[plan.communicate]:.1f} GB sent per rank and step (per_step "
        f"{sent['per_step']:.1f}, per_micro_batch {sent['per_micro_batch']:.1f})",
        "run": f"{total_steps:,} steps, about {total_steps * real:,.0f} tokens; "
        f"{total_steps * real / speed / 3600:.1f} h at {speed:,} tokens/s{epoch}",
        "schedule": Schedule.of(args, total_steps).describe(),
        "checkpoint": f"{checkpoint:.1f} GiB each, {kept} kept{', the best' * best} and one being written: "
        f"{checkpoint * (kept + best + 1):.0f} GiB of disk in {args['CHECKPOINT_DIR']}; {saving}",
    }
    if plan.total > limit:
        lines["WARNING"] = "the plan does not fit. Use more GPUs, or shorter sequences (prepare_data.py, MAX_SEQ_LEN)"
    return "\n".join(f"{name:<10} {line}" for name, line in lines.items())


def plan_run(args, config, sizes, lengths, topology, limit):
    """Choose how the run uses its memory, and lay out its first epoch.

    lengths: int64 tokens of each training sequence; limit: bytes a rank may use.
    Returns: (Plan, dataloader.Survey, total steps, the lines to print).
    Raises: SystemExit if the warm-up outlasts the run.
    """
    seed, per_step = args["SEED"], args["SEQUENCES_PER_STEP"]
    one_epoch = dataloader.steps_per_epoch(len(lengths), per_step)
    total_steps = args["MAX_STEPS"] or args["EPOCHS"] * one_epoch
    dtype = getattr(torch, args["COMPUTE_DTYPE"])
    staging = staging_bytes(args, sizes, topology, total_steps)
    if topology.device == "cpu":
        limit -= staging  # it is the same memory
    plan = choose(config, sizes, topology.shards, dtype, args, int(lengths.max()), limit, topology.device)
    plan = dataclasses.replace(plan, staging=staging)
    costs = dataloader.cost(lengths, sizes.matrices, sizes.attention)
    steps = min(one_epoch, total_steps)
    equal = plan.communicate == "per_micro_batch"
    survey = dataloader.survey(lengths, topology.ranks, plan.tokens, costs, equal, seed, steps, per_step)
    return plan, survey, total_steps, describe(plan, sizes, args, lengths, survey, total_steps, limit, topology)
