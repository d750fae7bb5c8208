"""RMSNorm and SwiGLU of an HF model with fewer reads, writes and kept tensors: what a run on a GPU uses.

Used by model.py, for a run and for its plan of the memory. On a CPU a model runs as transformers wrote it, bit for bit.
torch.compile fuses what is left: the pieces of swiglu and swiglu_backward, and the rotary embedding.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")  # transformers' names of a SwiGLU's three matrices


def fuse(model):
    """Give each RMSNorm and SwiGLU in `model` (nn.Module, on any device) the class of that name here, in place.

    Which modules those are is found by their output on a random input, not by their class. Others stay as they are:
    norms that multiply by 1 + weight, MLPs with a bias or another activation. Modules and parameters keep their names.
    The class changes and not the instance's forward: torch.compile would compile each instance for itself.
    """
    for module in model.modules():
        if is_rms_norm(module):
            module.eps = epsilon(module)
            module.__class__ = RMSNorm
        elif is_swiglu(module):
            module.__class__ = SwiGLU


# ==== RMSNorm ====


class RMSNorm(nn.Module):
    """hidden / sqrt(mean(hidden^2) + eps) * weight (Zhang & Sennrich 2019), with transformers' parameter `weight`.

    One kernel each way, which keeps its input and a float32 per row; transformers' takes six and keeps three tensors.
    It rounds to bfloat16 once, transformers' twice: they differ by at most 2^-7 of a value.
    """

    def forward(self, hidden):
        """Return the normed `hidden` [..., width], in its dtype."""
        if hidden.device.type == "meta":
            return RMSNormShapes.apply(hidden, self.weight)
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class RMSNormShapes(torch.autograd.Function):
    """The tensors that the CUDA kernel of F.rms_norm makes and keeps; on the meta device it would fall into pieces."""

    @staticmethod
    def forward(ctx, hidden, weight):
        scale = torch.empty(hidden.shape[:-1], dtype=torch.float32, device=hidden.device)
        ctx.save_for_backward(hidden, weight, scale)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, _ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight)


def epsilon(module):
    """Return the epsilon (float) that a norm of transformers or torch has, or None."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def takes_one_input(module):
    """Return whether the module's forward takes one tensor and nothing else."""
    return len(inspect.signature(module.forward).parameters) == 1


@torch.no_grad()
def is_rms_norm(module):
    """Return whether `module` computes what F.rms_norm does, seen with random weights on a CPU in float32."""
    parameters = [(name, p.ndim) for name, p in module.named_parameters()]
    if parameters != [("weight", 1)] or not epsilon(module) or not takes_one_input(module):
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(module.weight.shape, generator=generator)
    hidden = torch.randn(4, len(weight), generator=generator)
    hidden[2:] *= epsilon(module) ** 0.5  # rows so small that the epsilon counts
    expected = F.rms_norm(hidden, weight.shape, weight, epsilon(module))
    return torch.allclose(functional_call(module, {"weight": weight}, hidden), expected, rtol=1e-5, atol=1e-6)


# ==== SwiGLU ====


class SwiGLU(nn.Module):
    """down(silu(gate(hidden)) * up(hidden)) (Shazeer 2020), with transformers' parameters."""

    def forward(self, hidden):
        """Return the MLP's output [..., width] for `hidden` [..., width]."""
        return SwiGLUDown.apply(self.gate_proj(hidden), self.up_proj(hidden), self.down_proj.weight)


class SwiGLUDown(torch.autograd.Function):
    """down(silu(gate) * up) that keeps gate and up; silu and the product are computed again in the backward."""

    @staticmethod
    def forward(ctx, gate, up, down):
        ctx.save_for_backward(gate, up, down)
        return F.linear(swiglu(gate, up), down)

    @staticmethod
    def backward(ctx, grad):
        gate, up, down = ctx.saved_tensors
        gate_grad, up_grad, product = swiglu_backward(grad @ down, gate, up)
        return gate_grad, up_grad, grad.flatten(0, -2).T @ product.flatten(0, -2)


def swiglu(gate, up):
    """Return silu(gate) * up; compiled, one kernel that reads both and writes one."""
    return F.silu(gate) * up


def swiglu_backward(grad, gate, up):
    """Return (gate's gradient, up's gradient, silu(gate) * up); compiled, one kernel that reads and writes three."""
    activated = F.silu(gate)
    return torch.ops.aten.silu_backward(grad * up, gate), grad * activated, activated * up


@torch.no_grad()
def is_swiglu(module):
    """Return whether `module` is an MLP of three matrices that computes what SwiGLU does, seen with small ones."""
    names = [f"{name}.weight" for name in PROJECTIONS]
    if sorted(name for name, _ in module.named_parameters()) != sorted(names) or not takes_one_input(module):
        return False
    if any(type(getattr(module, name, None)) is not nn.Linear for name in PROJECTIONS):
        return False
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(shape, generator=generator) for shape in ((6, 4), (6, 4), (4, 6)))
    hidden = torch.randn(3, 4, generator=generator)
    expected = (F.silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T
    output = functional_call(module, dict(zip(names, (gate, up, down), strict=True)), hidden)
    return torch.allclose(output, expected, rtol=1e-5, atol=1e-6)
