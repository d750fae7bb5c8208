"""A small Llama written the other way: Meta's names, rotary pairs of neighbours, complex rotation; and its training
script's last act, a sharded checkpoint. `torchrun tests/meta_model.py fsdp1|fsdp2 WEIGHTS FOLDER` writes one.
"""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn

WIDTH, LAYERS, HEADS, KV_HEADS, INNER, VOCABULARY, THETA, EPS = 64, 2, 4, 2, 128, 400, 10_000.0, 1e-6


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        head = WIDTH // HEADS
        self.wq, self.wo = (nn.Linear(WIDTH, HEADS * head, bias=False) for _ in range(2))
        self.wk, self.wv = (nn.Linear(WIDTH, KV_HEADS * head, bias=False) for _ in range(2))

    def forward(self, x, freqs_cis):
        length = x.shape[0]
        q, k, v = (part(x).view(length, -1, WIDTH // HEADS) for part in (self.wq, self.wk, self.wv))
        pairs = (torch.view_as_complex(part.view(length, part.shape[1], -1, 2)) for part in (q, k))
        q, k = (torch.view_as_real(part * freqs_cis[:, None]).flatten(2) for part in pairs)
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (k, v))
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        return self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.w2 = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(WIDTH, eps=EPS), nn.RMSNorm(WIDTH, eps=EPS)

    def forward(self, x, freqs_cis):
        x = x + self.attention(self.attention_norm(x), freqs_cis)
        return x + self.feed_forward(self.ffn_norm(x))


class MetaModel(nn.Module):
    """ids int64 [tokens] -> logits float32 [tokens, VOCABULARY]."""

    def __init__(self):
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=EPS)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)
        angles = THETA ** (-torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
        angles = torch.outer(torch.arange(2048), angles)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, ids):
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x, self.freqs_cis[: len(ids)])
        return self.output(self.norm(x))


def save_sharded(kind, weights, folder):
    """Load `weights`, wrap the model as `kind` says, make one step of AdamW at rate 0, and save as its users do."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, StateDictType, fully_shard

    dist.init_process_group("gloo")
    model = MetaModel()
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    if kind == "fsdp1":
        model = FullyShardedDataParallel(
            model, sharding_strategy=ShardingStrategy.FULL_SHARD, use_orig_params=True, device_id=torch.device("cpu")
        )
        FullyShardedDataParallel.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT)
    else:
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(torch.arange(8)).sum().backward()
    optimizer.step()
    if kind == "fsdp1":
        state = {"model": model.state_dict(), "step": torch.tensor(40_000)}
        state["optimizer"] = FullyShardedDataParallel.optim_state_dict(model, optimizer)
        dcp.save(state, checkpoint_id=folder)
    else:
        dcp.save(model.state_dict() | {"optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    save_sharded(*sys.argv[1:])
