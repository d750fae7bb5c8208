"""fused.py: the same results as transformers' modules, which modules are replaced, and what they keep.

bash tests/run.sh tests/test_fused.py
"""

import numpy as np
import pytest
import torch
import transformers
from helpers import sequences, tiny_config
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from sft.training import dataloader, fused, memory_plan
from sft.training import model as sft_model


def random_weights(module, dtype):
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.to(dtype)


def output_and_gradients(module, hidden):
    """Return the output of `module` and the gradients of its input and parameters, for a fixed random gradient."""
    hidden = hidden.clone().requires_grad_()
    module.zero_grad()
    output = module(hidden)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype))
    return [output.detach(), hidden.grad, *(p.grad.clone() for p in module.parameters())]


# In bfloat16 transformers rounds the normed value and its product with the weight, the fused norm only the product:
# that may be one unit of the last place, 2^-7. Gradients are sums of such; they are compared with their largest value.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize(
    "make", [lambda: LlamaRMSNorm(64, eps=1e-5), lambda: LlamaMLP(tiny_config())], ids=["norm", "mlp"]
)
def test_a_fused_module_computes_what_transformers_does(make, dtype, tolerance):
    module = make()
    hidden = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    holder = nn.ModuleList([random_weights(module, dtype)])
    expected = output_and_gradients(module, hidden)
    fused.fuse(holder)
    assert type(module) in (fused.RMSNorm, fused.SwiGLU)
    torch.testing.assert_close(module(hidden), expected[0], rtol=tolerance, atol=1e-6)
    for ours, theirs in zip(output_and_gradients(module, hidden), expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def gradients(config, device_type, checkpointing):
    torch.manual_seed(0)
    causal_lm = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="packed")
    model = sft_model.SFTModel(causal_lm).train()
    sft_model.prepare_blocks(model, checkpointing, False, device_type)
    loss = model(dataloader.concatenate(list(zip(*sequences(6, 515), strict=True))))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}, model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "norms"), [(transformers.LlamaConfig, 2 * 2 + 1), (transformers.Qwen3Config, 4 * 2 + 1)]
)
def test_a_whole_model_has_the_same_loss_gradients_and_names(kind, norms, checkpointing):
    config = tiny_config(kind, head_dim=16)
    loss, plain, _ = gradients(config, "cpu", checkpointing)
    fused_loss, ours, model = gradients(config, "cuda", checkpointing)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=2e-5, atol=2e-5 * gradient.abs().max().item(), msg=name)
    classes = [type(module) for module in model.modules()]
    assert classes.count(fused.RMSNorm) == norms and classes.count(fused.SwiGLU) == 2


def test_on_a_cpu_no_module_is_replaced():
    *_, model = gradients(tiny_config(), "cpu", False)
    assert not [module for module in model.modules() if type(module) in (fused.RMSNorm, fused.SwiGLU)]


@pytest.mark.parametrize(
    "module",
    [
        GemmaRMSNorm(64),  # multiplies by 1 + weight
        nn.LayerNorm(64, bias=False),
        LlamaMLP(tiny_config(hidden_act="gelu")),
        LlamaMLP(tiny_config(mlp_bias=True)),
        nn.Linear(64, 64, bias=False),
    ],
    ids=["gemma-norm", "layer-norm", "gelu", "mlp-bias", "linear"],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_module_that_computes_something_else_is_left_alone(module, device):
    holder = nn.ModuleList([module.to(device)])
    fused.fuse(holder)
    assert type(holder[0]) not in (fused.RMSNorm, fused.SwiGLU)


def kept(module, hidden):
    """Return the bytes that `module` keeps for its backward, without its parameters."""
    parameters = {p.data_ptr() for p in module.parameters()}
    storages = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(hidden.requires_grad_())
    return sum(storages.values())


def test_a_swiglu_keeps_the_two_projections_and_not_what_follows_from_them():
    module = random_weights(LlamaMLP(tiny_config()), torch.bfloat16)
    hidden = torch.randn(1, 50, 64, dtype=torch.bfloat16)
    inner = 50 * 160 * 2
    assert kept(module, hidden) == 50 * 64 * 2 + 4 * inner
    fused.fuse(nn.ModuleList([module]))
    assert kept(module, hidden) == 50 * 64 * 2 + 2 * inner


def test_the_plan_counts_a_norm_as_one_kernel():
    norm = LlamaRMSNorm(64).to("meta", torch.bfloat16)
    fused.fuse(nn.ModuleList([norm]))
    hidden = torch.empty(1, 50, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with memory_plan.LiveBytes([hidden, norm.weight]) as live:
        output = norm(hidden)
    assert live.peak == 50 * 64 * 2 + 50 * 4  # its output, and a float32 of each row
    output.sum().backward()
    assert hidden.grad.shape == hidden.shape and norm.weight.grad.shape == norm.weight.shape


def test_a_plan_for_gpus_needs_less_memory_than_one_for_cpus():
    lengths = np.array([100, 50])
    ours, plain = (
        memory_plan.activation_bytes(tiny_config(), torch.bfloat16, lengths, False, device)
        for device in ("cuda", "cpu")
    )
    assert ours < 0.8 * plain
