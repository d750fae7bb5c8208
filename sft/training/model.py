"""The trained model: transformers' AutoModelForCausalLM with our attention over packed documents and our loss.

Used by sft_v1.py, and by memory_plan.py on the meta device.
"""

import importlib.util
import inspect
import os
import shutil
import sysconfig
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from transformers import AttentionInterface

from sft import hf_folder
from sft.training import cpu, dataloader, fused

LOSS_CHUNK_TOKENS = 1024  # trainable positions whose logits exist at once: 1024 x 49,156 x 4 bytes = 0.2 GB

# ==== Attention ====

# torch 2.13's kernel lets several query heads share a key head; 2.11's asks for equal numbers of both.
SHARED_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@torch.compiler.disable
def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Causal attention inside each document; the function that the HF model calls.

    query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim]; documents (in kwargs): Documents.
    Returns: ([1, tokens, heads, head_dim], None).
    Raises: ValueError for a model whose attention does more than this (a soft cap, a window shorter than a document).
    """
    lengths, bounds = kwargs["documents"].lengths, kwargs["documents"].bounds
    longest = max(lengths)
    window = kwargs.get("sliding_window")
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None or (window and longest > window):
        raise ValueError(
            "its attention has a soft cap, sinks or a sliding window, which packed_attention doesn't support."
        )
    if query.device.type == "cpu":
        return cpu_attention(query, key, value, lengths, scaling), None
    if not SHARED_HEADS:
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    query, key, value = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    options = {"scale": scaling, "window_size": (-1, 0)} | SHARED_HEADS
    output = varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)
    return output.unsqueeze(0), None


def cpu_attention(query, key, value, lengths, scaling):
    """Return packed_attention's output [1, tokens, heads, head_dim] on a CPU, one document after another."""
    query, key, value = (part.squeeze(0) for part in (query, key, value))
    grouped = query.unflatten(0, (len(key), -1))
    queries, keys, values = (part.split(lengths, dim=-2) for part in (grouped, key, value))
    scaling = scaling or query.shape[-1] ** -0.5
    outputs = [cpu.CausalAttention.apply(q, k, v, scaling) for q, k, v in zip(queries, keys, values, strict=True)]
    return torch.cat(outputs, dim=2).flatten(0, 1).transpose(0, 1).unsqueeze(0)


# No mask function is registered next to it: transformers then builds no mask, and does not look for documents in
# position_ids, which would wait for the device in each forward.
AttentionInterface.register("packed", packed_attention)


# ==== Model and loss ====


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T` whose logits exist for one chunk of rows at a time.

    The forward computes the gradients, too, while it has the chunk's probabilities: nothing is computed twice. One
    buffer holds the logits of each chunk and then their gradient. Its rows are as long as 16 bytes divide, which is
    what a GPU's fast matmuls ask for; the logits of the padding are -inf, so that its probability and gradient are 0.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, with_grad):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if with_grad else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if with_grad else None
        vocabulary, unit = len(weight), 16 // weight.element_size()
        buffer = hidden.new_empty(min(chunk, len(hidden)), -(-vocabulary // unit) * unit)
        for start in range(0, len(hidden), chunk):
            rows = hidden[start : start + chunk]
            chunk_targets = targets[start : start + chunk, None]
            padded = buffer[: len(rows)]
            logits = padded[:, :vocabulary]
            torch.mm(rows, weight.T, out=logits)
            padded[:, vocabulary:] = float("-inf")
            log_probs = torch.log_softmax(padded, dim=1, dtype=torch.float32)
            target_log_probs = log_probs.gather(1, chunk_targets)
            total -= target_log_probs.sum()
            if with_grad:
                minus_one = torch.full_like(target_log_probs, -1.0)
                padded.copy_(log_probs.exp_().scatter_add_(1, chunk_targets, minus_one))  # the logits' gradient
                del log_probs  # not while the head's gradient is computed
                torch.mm(logits, weight, out=hidden_grad[start : start + chunk])
                weight_grad += logits.T @ rows
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx, grad):
        hidden_grad, weight_grad = ctx.saved_tensors
        # In float32: the scale rounded to bfloat16 would be off by up to 0.4%, by a different factor in each layout.
        weight_grad = weight_grad.mul_(grad).to(hidden_grad.dtype)
        return (hidden_grad.float() * grad).to(hidden_grad.dtype), weight_grad, None, None, None


class SFTModel(nn.Module):
    """Trunk, head and loss in one module: FSDP's root then owns the (tied) embedding and gathers it for the loss."""

    def __init__(self, causal_lm):
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, batch):
        """Return the summed cross-entropy (fp32 scalar) of the targets of `batch`, a dataloader.MicroBatch.

        Without targets (None), return the logits at its predictors: [len(predictors), vocabulary].
        """
        output = self.causal_lm.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, documents=batch.documents
        )
        hidden = output.last_hidden_state[0, batch.predictors]
        weight = self.causal_lm.get_output_embeddings().weight
        if batch.targets is None:
            return hidden @ weight.T
        return ChunkedCrossEntropy.apply(hidden, weight, batch.targets, LOSS_CHUNK_TOKENS, torch.is_grad_enabled())


# ==== Loading ====


def load_model(folder):
    """Return the SFTModel of the HF folder `folder`, on the CPU, in float32.

    Raises: SystemExit if it does not load strictly, or computes another loss than its head's.
    """
    remedy = "Run resize_vocab.py again."
    causal_lm = hf_folder.load_model(folder, remedy, torch.float32, attn_implementation="packed")
    model = SFTModel(causal_lm)
    check_loss(model, folder)
    return model.train()


@torch.no_grad()
def check_loss(model, folder):
    """Refuse a model whose own logits are not its head times its last hidden state (scaled, capped, biased heads)."""
    row = np.arange(24), np.ones(24, bool)
    batch = dataloader.concatenate([row, row])
    try:
        ours = model(batch)
        theirs = model.causal_lm(
            input_ids=batch.input_ids, position_ids=batch.position_ids, documents=batch.documents
        ).logits
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{folder}: sft_v1.py cannot train this architecture: {error}") from None
    theirs = F.cross_entropy(theirs[0, batch.predictors].float(), batch.targets, reduction="sum")
    if not torch.isclose(ours, theirs, rtol=1e-4):
        raise SystemExit(
            f"{folder}: its own loss on a test text is {theirs:.4f}, sft_v1.py's is {ours:.4f}: the model does more to "
            "its logits than multiply by the head. sft_v1.py trains only Llama-like models."
        )


def lacking_for_compile(device_type):
    """Return what torch.compile needs for "cuda" or "cpu" and this machine lacks, as a phrase; "" if nothing.

    Triton starts each GPU kernel from C, and the CPU's kernels are C++; both are built against Python's headers.
    """
    names, variable, language = ("gcc", "clang"), "CC", "C"
    if device_type == "cpu":
        names, variable, language = ("g++",), "CXX", "C++"
    if variable in os.environ:
        names = (os.environ[variable],)
    if not any(shutil.which(name) for name in names):
        return f"{language} compiler ({' or '.join(names)})"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return f"Python.h in {sysconfig.get_path('include')} (package python3-dev)"
    if device_type == "cuda" and not importlib.util.find_spec("triton"):
        return "Python package triton"
    return ""


def choose_compile(setting, device_type):
    """Return (whether to compile the blocks, why) for COMPILE = `setting` on "cuda" or "cpu".

    Raises: SystemExit if it is "on" and this machine has no compiler.
    """
    lacking = lacking_for_compile(device_type)
    if setting == "on" and lacking:
        raise SystemExit(f"COMPILE is on, but this machine has no {lacking}. Install it, or take --compile off.")
    if setting == "off" or (setting == "auto" and device_type == "cpu"):
        return False, "off" if setting == "off" else "off, as it gains little on a CPU"
    if lacking:
        return False, f"off: no {lacking}. Install it for a faster run"
    return True, "on; before the first step it takes some minutes"


def prepare_blocks(model, activation_checkpointing, compile_blocks, device_type):
    """Compile and/or checkpoint each block of an SFTModel in place; for "cuda" first fuse its norms and MLPs.

    torch.compile gets the pieces before and after the attention call, for any number of tokens: one compilation serves
    all blocks and steps. The forward is replaced, not the block, so that the names of parameters stay.
    """
    if device_type == "cuda":
        fused.fuse(model)
    for layer in model.causal_lm.base_model.layers:
        if compile_blocks:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if activation_checkpointing:
            layer.forward = partial(recompute_in_backward, layer.forward, use_reentrant=False, preserve_rng_state=False)
