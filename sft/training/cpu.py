"""What a CPU needs: attention from matmuls, and memory that is kept but does not grow. A GPU uses none of it."""

import os

import torch

from sft import system

# Kernels that the two caches of oneDNN hold; it multiplies bfloat16 matrices, and needs another kernel for each shape.
# With its own 1024, micro-batches of many lengths add gigabytes over the first hundred steps.
CACHED_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}


def set_up_memory():
    """Make glibc reuse freed memory for the next tensor, and oneDNN keep few kernels. Call it before the first tensor.

    Without the first, Linux maps and clears new pages each time.
    """
    for name, value in CACHED_KERNELS.items():
        os.environ.setdefault(name, value)
    if hasattr(system.libc, "mallopt"):  # mallopt(3); other C libraries have none
        system.libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, free bytes at the heap's end above which it shrinks
        system.libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes of a block above which it gets its own mapping


class CausalAttention(torch.autograd.Function):
    """Causal attention of one document on a CPU, one block of queries at a time. The backward recomputes the scores.

    torch's own CPU kernel multiplies in smaller tiles and takes about twice as long: benchmarks/step_profile.py.
    """

    QUERIES = 64  # per block: its scores over 2,048 keys stay in a core's cache

    @classmethod
    def scores(cls, query, key):
        """Yield (begin, end, scores [kv_heads, group x (end - begin), end]) of each block; the future scores -inf.

        query: [kv_heads, group, tokens, head_dim], scaled; key: [kv_heads, tokens, head_dim].
        """
        future = torch.full((cls.QUERIES, cls.QUERIES), float("-inf"), dtype=query.dtype).triu_(1)
        for begin in range(0, query.shape[2], cls.QUERIES):
            end = min(begin + cls.QUERIES, query.shape[2])
            scores = query[:, :, begin:end].flatten(1, 2) @ key[:, :end].transpose(1, 2)
            scores.unflatten(1, (-1, end - begin))[..., begin:] += future[: end - begin, : end - begin]
            yield begin, end, scores

    @classmethod
    def forward(cls, ctx, query, key, value, scaling):
        """Return a tensor like query. query: [kv_heads, group, tokens, head_dim]; key, value: without the group."""
        query = query * scaling
        output = torch.empty_like(query)
        for begin, end, scores in cls.scores(query, key):
            output[:, :, begin:end] = (scores.softmax(2) @ value[:, :end]).unflatten(1, (-1, end - begin))
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors
        query_grad = torch.empty_like(query)
        key_grad = torch.zeros_like(key, dtype=torch.float32)
        value_grad = torch.zeros_like(value, dtype=torch.float32)
        for begin, end, scores in CausalAttention.scores(query, key):
            block_query = query[:, :, begin:end].flatten(1, 2)
            block_grad = grad[:, :, begin:end].flatten(1, 2)
            with torch.enable_grad():  # for softmax's own gradient
                weights = scores.requires_grad_().softmax(2)
            (score_grad,) = torch.autograd.grad(weights, scores, block_grad @ value[:, :end].transpose(1, 2))
            value_grad[:, :end] += weights.detach().transpose(1, 2) @ block_grad
            key_grad[:, :end] += score_grad.transpose(1, 2) @ block_query
            query_grad[:, :, begin:end] = (score_grad @ key[:, :end]).unflatten(1, (-1, end - begin))
        return query_grad * ctx.scaling, key_grad.to(key.dtype), value_grad.to(value.dtype), None
