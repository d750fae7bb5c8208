"""cpu.py: attention from matmuls against torch's own kernel.

bash tests/run.sh tests/test_cpu.py
"""

import math

import pytest
import torch
import torch.nn.functional as F

from sft.training import dataloader
from sft.training import model as sft_model


@pytest.mark.parametrize("kv_heads, head_dim", [(4, 16), (2, 16), (1, 80)])
def test_attention_on_a_cpu_equals_torchs_kernel_in_each_document_and_holds_no_square(kv_heads, head_dim):
    torch.manual_seed(0)
    lengths = [1, 63, 200, 64, 65, 7]  # around the 64 queries of a block
    tensors = [torch.randn(1, sum(lengths), heads, head_dim) for heads in (4, kv_heads, kv_heads)]
    output_grad = torch.randn(1, sum(lengths), 4, head_dim)
    scores = []

    class RecordScores(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._softmax.default:
                scores.append(tuple(result.shape))
            return result

    def of_torch(query, key, value):
        parts = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
        outputs = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def of_ours(*parts):
        with RecordScores():
            documents = dataloader.Documents(lengths, None)
            return sft_model.packed_attention(None, *parts, None, scaling=head_dim**-0.5, documents=documents)[0]

    def gradients(attention, dtype):
        inputs = [part.to(dtype).transpose(1, 2).requires_grad_() for part in tensors]
        output = attention(*inputs)
        output.backward(output_grad.to(dtype))
        return [output.float(), *(part.grad.float() for part in inputs)]

    exact = gradients(of_torch, torch.float32)
    torch.testing.assert_close(gradients(of_ours, torch.float32), exact, rtol=2e-5, atol=2e-5)

    def errors(attention):
        pairs = zip(gradients(attention, torch.bfloat16), exact, strict=True)
        return [((part - true).norm() / true.norm()).item() for part, true in pairs]

    ours, torchs = errors(of_ours), errors(of_torch)
    assert all(mine < 1.5 * theirs for mine, theirs in zip(ours, torchs, strict=True)), (ours, torchs)
    assert max(scores, key=math.prod) == (kv_heads, 4 // kv_heads * 64, 192)
