"""What a run needs, from shapes alone: bytes per rank, bytes sent per step, operations per step.

Used by sft_v1.py before each run and by its --plan-only. No weights are loaded: the model stands on the meta device,
where a tensor has a shape and no memory, and runs one forward and backward of the largest micro-batch there.
"""

import copy
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM

from sft.training import dataloader
from sft.training import model as sft_model

GIB = 2**30
BUDGETS = (8192, 6144, 4096, 3072, 2048, 1024)  # tokens per micro-batch that "auto" tries


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


def on_meta(config, dtype, layers=None):
    """Return the SFTModel of a transformers `config` on the meta device, with only `layers` blocks if given."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="packed")
    return causal_lm


def shapes(config):
    """Return the Shapes of a transformers `config`."""
    causal_lm = on_meta(config, torch.float32)
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in causal_lm.base_model.layers]
    matrices = sum(p.numel() for layer in causal_lm.base_model.layers for p in layer.parameters() if p.ndim == 2)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shapes(
        block=max(blocks),
        blocks=sum(blocks),
        root=sum(p.numel() for p in causal_lm.parameters()) - sum(blocks),
        matrices=matrices,
        head=causal_lm.get_output_embeddings().weight.numel(),
        attention=config.num_hidden_layers * config.num_attention_heads * head_dim,
    )


# ==== Activations: what one forward and backward holds ====


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive: `peak` is the most there was at once, without those of `known`.

    known: tensors that were there before; what is a view of them costs nothing.
    """

    def __init__(self, known):
        super().__init__()
        self.before = WeakIdKeyDictionary((t.untyped_storage(), None) for t in known)
        self.alive, self.peak = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                if (storage := local.untyped_storage()) not in self.before:
                    self.alive[storage] = None
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.alive))
        return made


def activation_bytes(config, dtype, lengths, checkpointing, loss_chunk_tokens):
    """Return the peak bytes of one forward and backward beside parameters and their gradients.

    lengths: tokens of each document of the micro-batch; all of them are trained. The peak of a model grows by the same
    bytes with each block, so two small models give that of any number of blocks.
    """
    batch = dataloader.micro_batch([(np.zeros(n, np.int64), np.ones(n, bool)) for n in lengths])
    batch = dataloader.each_tensor(batch, lambda tensor: tensor.to("meta"))
    peaks = []
    for layers in (2, 3):
        model = sft_model.SFTModel(on_meta(config, dtype, layers), loss_chunk_tokens).train()
        sft_model.prepare_blocks(model, checkpointing, compile_blocks=False)
        for p in model.parameters():  # FSDP takes a gradient away as soon as it is there
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            model(**batch).backward()
        peaks.append(live.peak)
    return peaks[0] + (config.num_hidden_layers - 2) * (peaks[1] - peaks[0])


# ==== The plan ====


@dataclass(frozen=True)
class Plan:
    """The choices that decide speed and memory, and the bytes of one rank that follow from them."""

    memory_policy: str  # "per_step" | "per_micro_batch"
    checkpointing: bool
    tokens: int  # of the largest micro-batch allowed
    masters: int  # bytes of the fp32 parameters' shard
    moments: int  # of AdamW's two
    gathered: int  # parameters in the compute dtype
    gradients: int  # unsharded ones, or the shard that they are reduced to, and the buffers of the reduction
    activations: int  # the most that one forward and backward holds

    @property
    def total(self):
        return self.masters + self.moments + self.gathered + self.gradients + self.activations


def plan(config, sizes, shards, dtype, memory_policy, checkpointing, tokens, longest, loss_chunk_tokens):
    """Return the Plan of one rank among `shards` that share a model.

    dtype: torch.dtype of the compute; longest: tokens of the longest document, which the micro-batch is made of.
    FSDP2 keeps a unit's gathered parameters in the compute dtype and reduces its gradients in fp32.
    """
    lengths = [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)
    if memory_policy == "per_step":  # everything is gathered once and kept; gradients add up unsharded, in fp32
        gathered = dtype.itemsize * (sizes.all + max(sizes.block, sizes.root))
        gradients = 4 * (sizes.all + max(2 * sizes.block, sizes.root)) + dtype.itemsize * sizes.block
    else:  # the root, the block at work and the one fetched ahead, each beside the buffer it comes in
        gathered = dtype.itemsize * (sizes.root + 4 * sizes.block)
        gradients = 4 * sizes.all // shards + (4 + dtype.itemsize) * max(sizes.block, sizes.root) + 4 * sizes.block
    return Plan(
        memory_policy=memory_policy,
        checkpointing=checkpointing,
        tokens=tokens,
        masters=4 * sizes.all // shards,
        moments=8 * sizes.all // shards,
        gathered=gathered,
        gradients=gradients,
        activations=activation_bytes(config, dtype, lengths, checkpointing, loss_chunk_tokens),
    )


def choose(config, shards, dtype, run, longest, limit):
    """Return the fastest Plan that fits into `limit` bytes, or the smallest one if none does.

    run: the settings; "auto" and 0 are chosen here. In this order: communicating once per step saves the most time
    between cards without NVLink, then not recomputing blocks (a third more work), then larger micro-batches.
    """
    policy, checkpointing, tokens = (
        run[name] for name in ("MEMORY_POLICY", "ACTIVATION_CHECKPOINTING", "TOKENS_PER_MICRO_BATCH")
    )
    sizes, plans = shapes(config), []
    for choice in itertools.product(
        ("per_step", "per_micro_batch") if policy == "auto" else (policy,),
        (False, True) if checkpointing == "auto" else (checkpointing == "on",),
        [tokens] if tokens else [budget for budget in BUDGETS if budget >= longest] or [longest],
    ):
        plans.append(plan(config, sizes, shards, dtype, *choice, longest, run["LOSS_CHUNK_TOKENS"]))
        if plans[-1].total <= limit:
            return plans[-1]
    return min(plans, key=lambda made: made.total)


def sent_per_step(sizes, shards, machines, dtype, memory_policy, micro_batches):
    """Return the bytes that one rank sends in an optimizer step, in rings: gathers, reductions, the sum over machines.

    Once per step, each unit is gathered once and its gradients reduced once; else twice (forward, backward) and once in
    each micro-batch.
    """
    gathers, reductions = (1, 1) if memory_policy == "per_step" else (2 * micro_batches, micro_batches)
    inside = (gathers * dtype.itemsize + reductions * 4) * sizes.all * (shards - 1) / shards
    return inside + reductions * 2 * 4 * sizes.all / shards * (machines - 1) / machines


def describe(made, config, run, lengths, survey, total_steps, limit, place):
    """Return the lines that say what the run will train, hold, send and take.

    made: the Plan; survey: of step_plan; limit: bytes a rank may use; place: (number of ranks, of machines, "cuda" or
    "cpu").
    """
    (ranks, machines, device), sizes, dtype = place, shapes(config), getattr(torch, run["COMPUTE_DTYPE"])
    shards, per_step, mean = ranks // machines, run["SEQUENCES_PER_STEP"], lengths.mean()
    context = int(lengths.max())
    real, slots = per_step * mean, per_step * context
    sent = {
        policy: sent_per_step(sizes, shards, machines, dtype, policy, survey["micro_batches"])
        for policy in ("per_step", "per_micro_batch")
    }
    parts = ", ".join(
        f"{name} {getattr(made, name) / GIB:.1f}"
        for name in ("masters", "moments", "gathered", "gradients", "activations")
    )
    hours = total_steps * real / run["EXPECTED_TOKENS_PER_SECOND"] / 3600
    size = sizes.all * 12 / GIB
    spread = f", sharded over {shards}, on {machines} machines" if machines > 1 else ""
    lines = {
        "model": f"{run['BASE_MODEL']}: {sizes.all:,} parameters, {run['COMPUTE_DTYPE']} compute, float32 masters",
        "ranks": f"{ranks} on {device}{spread}",
        "data": f"{len(lengths):,} sequences, {int(lengths.sum()):,} tokens, mean {mean:.0f}, longest {context}",
        "step": f"{per_step} sequences = about {real:,.0f} real tokens (padded to {context} each, it would be "
        f"{slots:,} slots, {1 - real / slots:.0%} of them padding)",
        "layout": f"{made.tokens:,} tokens per micro-batch, {survey['micro_batches']:.1f} of them per rank and step; "
        f"ranks wait {survey['idle_share']:.1%}; activation checkpointing {'on' if made.checkpointing else 'off'}",
        "memory": f"{made.total / GIB:.1f} of {limit / GIB:.1f} GiB per rank: {parts}",
        "traffic": f"{made.memory_policy}: {sent[made.memory_policy] / 1e9:.1f} GB sent per rank and step (per_step "
        f"{sent['per_step'] / 1e9:.1f}, per_micro_batch {sent['per_micro_batch'] / 1e9:.1f})",
        "run": f"{total_steps:,} steps, about {total_steps * real:,.0f} tokens; {hours:.1f} h at "
        f"{run['EXPECTED_TOKENS_PER_SECOND']:,} tokens/s",
        "checkpoint": f"{size:.1f} GiB each, {run['KEEP_CHECKPOINTS']} kept and one on its way: "
        f"{size * (run['KEEP_CHECKPOINTS'] + 1):.0f} GiB of disk in {run['OUTPUT_DIR']}",
    }
    if made.total > limit:
        lines["WARNING"] = "the plan does not fit. Use more GPUs, or shorter sequences (prepare_data.py, MAX_SEQ_LEN)"
    return "\n".join(f"{name:<10} {line}" for name, line in lines.items())
