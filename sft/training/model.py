"""What is ours in the model: the attention over documents laid end to end, the loss, and the inputs of both.

Used by sft_v1.py, and by memory_plan.py on the meta device. The model itself is transformers' AutoModelForCausalLM.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from transformers import AttentionInterface, AutoModelForCausalLM

from sft.training import cpu, dataloader


def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Causal attention inside each document; the function that the HF model calls.

    query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim]; documents (in kwargs): Documents.
    Returns: ([1, tokens, heads, head_dim], None).
    Raises: ValueError for a model whose attention does more than this (a soft cap, a window shorter than a document).
    """
    lengths, bounds = kwargs["documents"].lengths, kwargs["documents"].bounds
    window = kwargs.get("sliding_window")
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None or (window and max(lengths) > window):
        raise ValueError("this model's attention has a soft cap, sinks or a sliding window, which sft_v1.py has not.")
    if query.device.type != "cpu":  # torch's variable-length flash attention; equal head counts, as torch 2.11 asks
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
        longest = max(lengths)
        output = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0))
        return output.unsqueeze(0), None
    grouped = query[0].unflatten(0, (key.shape[1], -1))
    parts = [part.split(lengths, dim=-2) for part in (grouped, key[0], value[0])]
    outputs = [
        cpu.CausalAttention.apply(*document, scaling or query.shape[-1] ** -0.5)
        for document in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=2).flatten(0, 1).transpose(0, 1).unsqueeze(0), None


# No mask is registered beside it: transformers then makes none, and does not look for documents in position_ids, which
# would wait for the device in each forward.
AttentionInterface.register("packed", packed_attention)


# ==== Model and loss ====


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T` whose logits exist for one chunk of rows at a time.

    The gradients are made in the forward, where the chunk's probabilities are at hand, so nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, with_grad):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if with_grad else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if with_grad else None
        for start in range(0, len(hidden), chunk):
            rows, wanted = hidden[start : start + chunk], targets[start : start + chunk, None]
            log_probs = torch.log_softmax(rows @ weight.T, dim=1, dtype=torch.float32)
            chosen = log_probs.gather(1, wanted)
            total -= chosen.sum()
            if with_grad:
                slope = log_probs.exp_().scatter_add_(1, wanted, torch.full_like(chosen, -1.0)).to(weight.dtype)
                hidden_grad[start : start + chunk] = slope @ weight
                weight_grad += slope.T @ rows
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx, grad):
        hidden_grad, weight_grad = ctx.saved_tensors
        # In float32: the scale rounded to bfloat16 would be off by up to 0.4%, by another factor in each layout.
        weight_grad = weight_grad.mul_(grad).to(hidden_grad.dtype)
        return (hidden_grad.float() * grad).to(hidden_grad.dtype), weight_grad, None, None, None


class SFTModel(nn.Module):
    """Trunk, head and loss in one module: FSDP's root then owns the (tied) embedding and gathers it for the loss."""

    def __init__(self, causal_lm, loss_chunk_tokens):
        super().__init__()
        self.causal_lm = causal_lm
        self.loss_chunk_tokens = loss_chunk_tokens

    def forward(self, input_ids, position_ids, documents, predictors, targets):
        """Return the summed cross-entropy (fp32 scalar) of `targets` as predicted at the positions `predictors`.

        input_ids, position_ids: int64 [1, tokens]; predictors, targets: int64 [trainable tokens], possibly empty.
        Without targets (None), return the logits there: [len(predictors), vocabulary].
        """
        hidden = self.causal_lm.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, documents=documents
        ).last_hidden_state[0, predictors]
        weight = self.causal_lm.get_output_embeddings().weight
        if targets is None:
            return hidden @ weight.T
        return ChunkedCrossEntropy.apply(hidden, weight, targets, self.loss_chunk_tokens, torch.is_grad_enabled())


def load_model(base_model, loss_chunk_tokens):
    """Return the SFTModel of the HF folder `base_model`, on the CPU, in float32.

    Raises: SystemExit if it does not load, lacks a tensor, or computes another loss than its head's.
    """
    try:
        causal_lm, loading = AutoModelForCausalLM.from_pretrained(
            base_model,
            dtype=torch.float32,
            attn_implementation="packed",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, safetensors and json each raise their own
        raise SystemExit(
            f"{base_model} does not load ({type(error).__name__}: {error}). Run resize_vocab.py."
        ) from None
    if missing := sorted(loading["missing_keys"]):
        raise SystemExit(f"{base_model} lacks {len(missing)} tensors, first {missing[0]}. Run resize_vocab.py again.")
    model = SFTModel(causal_lm, loss_chunk_tokens)
    check_loss(model, base_model)
    return model.train()


def prepare_blocks(model, activation_checkpointing, compile_blocks):
    """Compile each block of an SFTModel, recompute it in the backward, both or neither; in place.

    Compiled are the pieces before and after the attention call, for any number of tokens: one compilation serves all
    blocks and steps. The forward is replaced, not the block, so that names of parameters stay.
    """
    if compile_blocks:
        AttentionInterface.register("packed", torch.compiler.disable(packed_attention))
    for layer in model.causal_lm.base_model.layers:
        if compile_blocks:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if activation_checkpointing:
            layer.forward = partial(recompute_in_backward, layer.forward, use_reentrant=False, preserve_rng_state=False)


@torch.no_grad()
def check_loss(model, base_model):
    """Refuse a model whose own logits are not its head times its last hidden state (scaled, capped, biased heads)."""
    ids = torch.arange(24)
    batch = dataloader.micro_batch([(ids.numpy(), np.ones(24, bool)), (ids.numpy(), np.ones(24, bool))])
    try:
        ours = model(**batch)
        theirs = model.causal_lm(**{k: v for k, v in batch.items() if k not in ("predictors", "targets")}).logits
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{base_model}: sft_v1.py cannot train this architecture: {error}") from None
    theirs = F.cross_entropy(theirs[0, batch["predictors"]].float(), batch["targets"], reduction="sum")
    if not torch.isclose(ours, theirs, rtol=1e-4):
        raise SystemExit(
            f"{base_model}: its own loss on a test text is {theirs:.4f}, sft_v1.py's is {ours:.4f}: the model does "
            "more to its logits than multiply by the head. Only Llama-like models are trained here."
        )
