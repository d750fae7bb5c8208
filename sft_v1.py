"""Step 3: fine-tune the resized base model on the prepared conversations, with FSDP2 over any number of processes.

Reads   data/sft_v1/ (prepare_data.py) and checkpoints/base/ (resize_vocab.py).
Writes  checkpoints/sft_v1/: step_NNNNNN/ (sharded DCP checkpoints), run.json, metrics.jsonl, skipped.jsonl,
        spikes.jsonl, loss.png, tensorboard/.

    torchrun --nproc-per-node 2 sft_v1.py       two GPUs (or, without a GPU, two CPU processes)
    torchrun --nproc-per-node 1 sft_v1.py       one
    the same command again                      continues from the newest whole checkpoint
    touch checkpoints/sft_v1/STOP               ends the run after its step, with a checkpoint; so do Ctrl-C and SIGTERM
    torchrun --max-restarts 3 ...               goes on by itself after a rank was killed

torchrun waits 30 seconds after a signal before it kills; a run whose step and checkpoint take longer needs its flag
`--shutdown-timeout 120`. A STOP file has no such limit.

An optimizer step is SEQUENCES_PER_STEP sequences however many processes there are. Sequences lie end to end without
padding, attention never crosses from one to the next, and the loss is the sum of the cross-entropy over the step's
trainable tokens divided by their number, over all ranks and micro-batches.
"""

import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

import checkpoints
import ranks
import settings
import step_plan
import training_log

# ---- Files ----
DATA_DIR = "data/sft_v1"  # folder, from prepare_data.py
BASE_MODEL = "checkpoints/base"  # folder, from resize_vocab.py
OUTPUT_DIR = "checkpoints/sft_v1"  # folder of this run: checkpoints, metrics, curves
RESUME = "newest"  # "newest" whole checkpoint in OUTPUT_DIR if there is one | a name such as "step_000500"
# ---- Optimisation: the Genesis recipe ----
SEQUENCES_PER_STEP = 32  # sequences; the recipe's 2 per GPU x 8 accumulation x 2 GPUs
EPOCHS = 1  # passes over the training split; 510,577 sequences are 15,955 steps
MAX_STEPS = 0  # optimizer steps; 0 = all of EPOCHS. The schedule ends here, too
LEARNING_RATE = 2e-5  # peak, after the warm-up
MIN_LEARNING_RATE = 2e-6  # end of the cosine
WARMUP_STEPS = 200  # optimizer steps from 0 to the peak, linear
ADAM_BETA1 = 0.9  # decay of the first moment
ADAM_BETA2 = 0.95  # decay of the second moment
ADAM_EPS = 1e-8  # added to the root of the second moment
WEIGHT_DECAY = 0.01  # decoupled, on matrices and embeddings; none on norms and biases
MAX_GRAD_NORM = 1.0  # global L2 norm to which larger gradients are scaled
MAX_SKIPPED_IN_A_ROW = 10  # steps without a finite loss and gradient after which the run stops
SPIKE_SIGMA = 6.0  # standard deviations over the mean of the last 200 losses from which a loss is put in spikes.jsonl
SEED = 42  # order of the sequences
# ---- Memory and speed ----
TOKENS_PER_MICRO_BATCH = 8192  # tokens per forward on one rank; lower it first when memory runs out
ACTIVATION_CHECKPOINTING = True  # recompute each block in the backward: about a third more work, far less memory
MEMORY_POLICY = "per_step"  # how often ranks communicate: "per_step" | "per_micro_batch" (slower, 6 GB less at 1B)
COMPUTE_DTYPE = "bfloat16"  # "bfloat16" | "float32" of forward and backward; masters and moments are always float32
LOSS_CHUNK_TOKENS = 1024  # trainable positions whose logits exist at once: 1024 x 49,156 x 4 bytes = 0.2 GB
DEVICE = "auto"  # "auto" (a GPU per process if there is one) | "cuda" | "cpu"
# ---- Validation, log and checkpoints ----
VALIDATE_EVERY = 500  # optimizer steps between validations; also before the first step and after the last; 0 = never
SAVE_EVERY = 500  # optimizer steps between checkpoints, and to the next try after a failed one; also after the last
KEEP_CHECKPOINTS = 3  # newest ones kept; one of Genesis has 12 GB
COLLECTIVE_TIMEOUT_SECONDS = 300  # seconds after which a rank that died or hangs ends the others; above one micro-batch
EXPECTED_TOKENS_PER_SECOND = 19_000  # tokens/s of all ranks, for the time printed at start; 2x RTX 4090 in pretraining


# ==== Attention: documents laid end to end, none sees another ====


def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Causal attention inside each document; the function that the HF model calls.

    query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim]; document_lengths (in kwargs):
    list of int, in order, summing to tokens; cumulative_lengths (there, too): int32 [documents + 1], from 0.
    Returns: ([1, tokens, heads, head_dim], None).
    Raises: ValueError for a model whose attention does more than this (a soft cap, a window shorter than a document).
    """
    lengths = kwargs["document_lengths"]
    window = kwargs.get("sliding_window")
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None or (window and max(lengths) > window):
        raise ValueError("this model's attention has a soft cap, sinks or a sliding window, which sft_v1.py has not.")
    if query.is_cuda:  # torch's variable-length flash attention; equal head counts, as torch 2.11 asks
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
        bounds, longest = kwargs["cumulative_lengths"], max(lengths)
        output = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0))
        return output.unsqueeze(0), None
    parts = [part.split(lengths, dim=2) for part in (query, key, value)]
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)


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
            logits = (rows @ weight.T).float()
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            total += (log_sum - logits.gather(1, wanted)).sum()
            if with_grad:
                slope = logits.sub_(log_sum).exp_().scatter_add_(1, wanted, torch.full_like(log_sum, -1.0))
                slope = slope.to(weight.dtype)
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

    def forward(self, input_ids, position_ids, document_lengths, cumulative_lengths, predictors, targets):
        """Return the summed cross-entropy (fp32 scalar) of `targets` as predicted at the positions `predictors`.

        input_ids, position_ids: int64 [1, tokens]; predictors, targets: int64 [trainable tokens], possibly empty.
        """
        hidden = self.causal_lm.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            document_lengths=document_lengths,
            cumulative_lengths=cumulative_lengths,
        ).last_hidden_state[0, predictors]
        weight = self.causal_lm.get_output_embeddings().weight
        return ChunkedCrossEntropy.apply(hidden, weight, targets, self.loss_chunk_tokens, torch.is_grad_enabled())


def load_model(base_model, loss_chunk_tokens, activation_checkpointing):
    """Return the SFTModel of the HF folder `base_model`, on the CPU, in float32."""
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
    if activation_checkpointing:
        for layer in causal_lm.base_model.layers:  # inside the unit that shard() makes of the layer
            layer.forward = partial(recompute_in_backward, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return model.train()


@torch.no_grad()
def check_loss(model, base_model):
    """Refuse a model whose own logits are not its head times its last hidden state (scaled, capped, biased heads)."""
    ids = torch.arange(24)
    batch = micro_batch([(ids.numpy(), np.ones(24, bool)), (ids.numpy(), np.ones(24, bool))], "cpu")
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


def shard(model, mesh, compute_dtype, memory_policy):
    """Shard `model` in place over `mesh`: each block is a unit, the root holds embedding, last norm, head and loss."""
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    reshard = memory_policy == "per_micro_batch"
    for layer in model.causal_lm.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)


def make_optimizer(model, betas, eps, weight_decay):
    """Return AdamW with fp32 moments that exist from the start, so that a checkpoint always has a place for them."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)
    for p in params:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def learning_rate(step, total_steps, peak, floor, warmup_steps):
    """Return the learning rate of optimizer step `step` (from 0): linear warm-up, then a cosine from peak to floor."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


# ==== Data ====


def load_data(data_dir):
    """Return the `datasets` splits "train" and "validation" of the folder. Raises: SystemExit if they do not load."""
    try:
        data = datasets.load_from_disk(data_dir)
        return {name: data[name].select_columns(["input_ids", "assistant_masks"]) for name in ("train", "validation")}
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"{data_dir} holds no finished data ({error}). Run prepare_data.py again.") from None


def sequence_lengths(dataset):
    """Return the length in tokens of each sequence of a `datasets` split, int64 [sequences], without reading them."""
    return pc.list_value_length(dataset.data.column("input_ids")).to_numpy().astype(np.int64)


def micro_batch(rows, device):
    """Lay sequences end to end. rows: list of (input_ids, assistant_masks) arrays; returns SFTModel.forward's inputs.

    An empty list becomes one token with nothing to train, so that this rank still takes part in the collectives.
    """
    rows = rows or [(np.zeros(1, np.int64), np.zeros(1, bool))]
    ids = np.concatenate([ids for ids, _ in rows]).astype(np.int64)
    lengths = [len(ids) for ids, _ in rows]
    trained = np.concatenate([mask for _, mask in rows])
    starts = np.cumsum([0, *lengths])
    trained[starts[:-1]] = False  # a sequence's first token has nothing before it that could predict it
    targets = np.flatnonzero(trained)
    tensor = {
        "input_ids": ids[None],
        "position_ids": np.concatenate([np.arange(length) for length in lengths])[None],
        "cumulative_lengths": starts.astype(np.int32),
        "predictors": targets - 1,
        "targets": ids[targets],
    }
    return {"document_lengths": lengths} | {
        name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in tensor.items()
    }


class Batches:
    """Turns a list of sequence indices into this rank's micro-batches of it."""

    def __init__(self, dataset, config, tokens_per_micro_batch, device):
        self.dataset = dataset.with_format("numpy")
        self.lengths = sequence_lengths(dataset)
        self.costs = step_plan.cost(self.lengths, config.hidden_size, config.intermediate_size)
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.device = device

    def of(self, indices):
        """Return (this rank's micro-batches, {"tokens", "trainable_tokens", "idle_share"} over all ranks)."""
        indices = [int(i) for i in indices]
        plan = step_plan.lay_out(indices, self.lengths, dist.get_world_size(), self.tokens_per_micro_batch, self.costs)
        rows = self.dataset[indices]
        by_index = dict(zip(indices, zip(rows["input_ids"], rows["assistant_masks"], strict=True), strict=True))
        batches = [micro_batch([by_index[i] for i in batch], self.device) for batch in plan[dist.get_rank()]]
        facts = {
            "tokens": int(self.lengths[indices].sum()),
            "trainable_tokens": sum(int(mask[1:].sum()) for _, mask in by_index.values()),
            "idle_share": round(float(step_plan.idle_share(plan, self.costs)), 4),
        }
        return batches, facts


# ==== Gates: what must hold before any long work ====


def validate_settings(run):
    """Raise SystemExit with a sentence for a value that no run can have. run: dict of all settings."""
    for name, values in {
        "MEMORY_POLICY": ("per_step", "per_micro_batch"),
        "COMPUTE_DTYPE": ("bfloat16", "float32"),
        "DEVICE": ("auto", "cuda", "cpu"),
    }.items():
        if run[name] not in values:
            raise SystemExit(f"{name} is {run[name]!r}; it must be one of {', '.join(values)}.")
    at_least_0 = ("MAX_STEPS", "WARMUP_STEPS", "VALIDATE_EVERY", "MIN_LEARNING_RATE", "WEIGHT_DECAY", "SEED")
    for name, value in run.items():
        if isinstance(value, bool | str):
            continue
        above_0 = isinstance(value, float) and name not in at_least_0
        least = 0 if above_0 or name in at_least_0 else 1
        if not least <= value < math.inf or (above_0 and value == 0):
            raise SystemExit(f"{name} is {value}; it must be {'above 0' if above_0 else f'at least {least}'}.")
    for name in ("ADAM_BETA1", "ADAM_BETA2"):
        if run[name] >= 1:
            raise SystemExit(f"{name} is {run[name]}; it must be below 1.")
    if run["MIN_LEARNING_RATE"] > run["LEARNING_RATE"]:
        raise SystemExit(f"MIN_LEARNING_RATE ({run['MIN_LEARNING_RATE']}) is above LEARNING_RATE; swap or lower it.")


def agree(data_dir, base_model):
    """Check that data, tokenizer and base belong together.

    Returns: (report.json as a dict, fingerprints: dict of SHA-256 digests under "data", "tokenizer" and "base").
    Raises: SystemExit naming the script to run again.
    """
    report = checkpoints.read_json(Path(data_dir) / "report.json", "prepare_data.py")
    config = checkpoints.read_json(Path(base_model) / "config.json", "resize_vocab.py")
    if not any(Path(base_model).glob("*.safetensors")):
        raise SystemExit(f"{base_model} has no safetensors. Run resize_vocab.py again.")
    digests = {}
    for folder, script in ((Path(data_dir) / "tokenizer", "prepare_data.py"), (Path(base_model), "resize_vocab.py")):
        if not (folder / "tokenizer.json").is_file():
            raise SystemExit(f"{folder} has no tokenizer.json. Run {script} again.")
        digests[script] = checkpoints.sha256(folder / "tokenizer.json")
    if digests["prepare_data.py"] != report.get("tokenizer_sha256"):
        raise SystemExit(f"{data_dir}/tokenizer is not the one its report names. Run prepare_data.py again.")
    rows, tokens = config.get("vocab_size"), report.get("vocab_size")
    if not (isinstance(rows, int) and isinstance(tokens, int) and rows >= tokens):
        raise SystemExit(
            f"{base_model} has {rows} rows in its vocabulary, but the tokenizer of {data_dir} has {tokens} "
            "tokens: this base was not resized. Run resize_vocab.py, then name its output."
        )
    if len(set(digests.values())) > 1:
        raise SystemExit(
            f"The tokenizers of {data_dir} and {base_model} differ. Run resize_vocab.py again for this data."
        )
    return report, {
        "data": json.dumps(report.get("digest"), sort_keys=True),
        "tokenizer": digests["prepare_data.py"],
        "base": checkpoints.folder_digest(base_model, "*.safetensors"),
    }


def check_output(output_dir, facts):
    """Refuse a folder that holds something else, or a run of other data, tokenizer, base, seed or step size."""
    output_dir = Path(output_dir)
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    if not (output_dir / "run.json").is_file():
        if (output_dir / checkpoints.LOCK).is_file():
            return  # a run that was killed before it had written anything
        raise SystemExit(f"{output_dir} is not empty and holds no run of sft_v1.py. Name another --output-dir.")
    before = checkpoints.read_json(output_dir / "run.json", "sft_v1.py")
    before = {kind: value for kind, value in before.items() if isinstance(value, dict)}
    changed = [
        f"{name} (then {before.get(kind, {}).get(name)}, now {facts[kind][name]})"
        for kind, names in (("fingerprints", facts["fingerprints"]), ("settings", ("SEED", "SEQUENCES_PER_STEP")))
        for name in names
        if before.get(kind, {}).get(name) != facts[kind][name]
    ]
    if changed:
        raise SystemExit(
            f"{output_dir} holds a run that differs in {', '.join(changed)}. Name another --output-dir, or go back to "
            "what that run used."
        )


def check_batches(batches, split, need, config):
    """Refuse a split with fewer than `need` sequences or with one that no micro-batch or the model cannot hold."""
    if len(batches.lengths) < need:
        raise SystemExit(f"The {split} split has {len(batches.lengths)} sequences, fewer than the {need} needed.")
    longest = int(batches.lengths.max(initial=0))
    if longest > batches.tokens_per_micro_batch:
        raise SystemExit(
            f"Sequence {int(batches.lengths.argmax())} of the {split} split has {longest} tokens, more than "
            f"TOKENS_PER_MICRO_BATCH = {batches.tokens_per_micro_batch}. Raise it to at least {longest}."
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    context = min(config.max_position_embeddings, window or math.inf)
    if longest > context:
        raise SystemExit(
            f"The {split} split has a sequence of {longest} tokens, the model's context or window is {context}. "
            f"Run prepare_data.py with --max-seq-len {context}."
        )


# ==== Checkpoints: the model and the moments, by the model's own names ====


def training_state(model, optimizer):
    """Return the flat dict of what a checkpoint holds, sharing memory with the run: DTensors and step counts, fp32."""
    state = {}
    for name, p in model.named_parameters():
        name = name.removeprefix("causal_lm.")
        state[f"model.{name}"] = p.detach()
        for key, tensor in optimizer.state[p].items():
            state[f"optimizer.{key}.{name}"] = tensor
    return state


def resume(checkpoint, state, fingerprints):
    """Fill `state` in place from a verified `checkpoint`; return its facts. All ranks call it.

    Raises: SystemExit if a tensor is missing or has another shape, or if the moments do not belong to the weights.
    """
    facts = checkpoints.read_json(checkpoint / "facts.json", "sft_v1.py")
    if facts["fingerprints"] != fingerprints:
        raise SystemExit(f"{checkpoint} was trained on other data, tokenizer or base. Name another --output-dir.")
    if checkpoint.name != f"step_{facts['step']:06d}":
        raise SystemExit(f"{checkpoint} holds step {facts['step']}: it was renamed. Give it back its name.")
    stored = dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    missing = [name for name in state if name not in stored]
    if missing:
        lost = "optimizer state" if all(name.startswith("optimizer.") for name in missing) else "tensors"
        raise SystemExit(
            f"{checkpoint} lacks {lost}: {len(missing)} of {len(state)}, first {missing[0]}. A run that continued "
            "without it would drift; name a whole checkpoint with --resume."
        )
    for name, tensor in state.items():
        if stored[name].size != tensor.shape:
            raise SystemExit(f"{checkpoint}: {name} is {tuple(stored[name].size)}, the model's {tuple(tensor.shape)}.")
    dcp.load(state, checkpoint_id=str(checkpoint))
    counts = {float(t) for name, t in state.items() if name.startswith("optimizer.step.")}
    if counts != {float(facts["updates"])}:
        raise SystemExit(f"{checkpoint}: moments of {sorted(counts)} updates beside weights of {facts['updates']}.")
    for moment in ("optimizer.exp_avg.", "optimizer.exp_avg_sq."):
        parts = [t.to_local() if hasattr(t, "to_local") else t for n, t in state.items() if n.startswith(moment)]
        if facts["updates"] and not any(checkpoints.on_every_rank(any(bool(part.any()) for part in parts))):
            raise SystemExit(
                f"{checkpoint}: all of {moment}* is zero after {facts['updates']} updates; choose another."
            )
    return facts


def segment(stored, facts):
    """Return what a continued run changes against the facts `stored` in its checkpoint, as a list of phrases."""
    then, now = (f["settings"] | {"ranks": f["world_size"]} | f["versions"] for f in (stored, facts))
    return [
        f"{name} was {then.get(name)}, is {now[name]}"
        for name in now
        if name != "RESUME" and then.get(name) != now[name]
    ]


# ==== Training ====


def train_step(model, optimizer, batches, trainable_tokens, memory_policy, max_grad_norm, stop=False):
    """Run one optimizer step over this rank's micro-batches.

    stop: whether this rank knows of a wish to stop.
    Returns: (loss per trainable token, grad_norm, updated, stop: whether any rank knows of one), the same on all ranks.
    A non-finite loss or gradient norm leaves parameters and moments as they are, on all ranks alike.
    """
    total = torch.zeros((), dtype=torch.float32, device=batches[0]["input_ids"].device)
    for number, batch in enumerate(batches, start=1):
        ranks.at(part=f"micro-batch {number} of {len(batches)}")
        communicate = number == len(batches) or memory_policy == "per_micro_batch"
        model.set_requires_gradient_sync(communicate)
        model.set_reshard_after_backward(communicate)
        loss = model(**batch)
        # FSDP averages gradients over the ranks; times world_size makes that the sum.
        (loss * (dist.get_world_size() / trainable_tokens)).backward()
        total += loss.detach()
    ranks.at(part="sum over the ranks")
    shared = torch.stack([total, torch.full_like(total, float(stop))])
    dist.all_reduce(shared)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    norm = norm.full_tensor()
    # The step's one wait for the device.
    loss, stop, grad_norm = torch.stack([shared[0] / trainable_tokens, shared[1], norm]).tolist()
    updated = math.isfinite(loss) and math.isfinite(grad_norm)
    if updated:
        nn.utils.clip_grads_with_norm_(model.parameters(), max_grad_norm, norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm, updated, stop > 0


@torch.no_grad()
def validate(model, batches, sequences_per_step):
    """Return the loss per trainable token over the whole validation split, the same on every rank."""
    model.eval()
    total, trainable = torch.zeros((), dtype=torch.float64), 0
    for start in range(0, len(batches.lengths), sequences_per_step):
        part, facts = batches.of(range(start, min(start + sequences_per_step, len(batches.lengths))))
        trainable += facts["trainable_tokens"]
        for batch in part:
            ranks.at(part=f"validation from sequence {start}")
            total += model(**batch).double().cpu()
    total = total.to(batches.device)
    dist.all_reduce(total)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # else a checkpoint would read the gathered bf16 copies
    model.train()
    return total.item() / trainable


def describe(batches, run, total_steps, model, max_seq_len):
    """Return the start-up lines: what will be trained, and the step as sequences, real tokens and padded slots."""
    per_step, mean = run["SEQUENCES_PER_STEP"], batches.lengths.mean()
    slots, real = per_step * max_seq_len, per_step * mean
    tokens = total_steps * real
    hours = tokens / run["EXPECTED_TOKENS_PER_SECOND"] / 3600
    params = sum(p.numel() for p in model.parameters())
    return "\n".join(
        (
            f"model      {run['BASE_MODEL']}: {params:,} parameters, {run['COMPUTE_DTYPE']} compute, float32 masters",
            f"ranks      {dist.get_world_size()} on {batches.device.type}, {run['TOKENS_PER_MICRO_BATCH']:,} tokens "
            f"per micro-batch, communication {run['MEMORY_POLICY']}",
            f"data       {len(batches.lengths):,} sequences, {int(batches.lengths.sum()):,} tokens, mean {mean:.0f}",
            f"step       {per_step} sequences = about {real:,.0f} real tokens (padded to {max_seq_len} each, it would "
            f"be {slots:,} slots, {1 - real / slots:.0%} of them padding)",
            f"run        {total_steps:,} steps, about {tokens:,.0f} tokens; {hours:.1f} h at "
            f"{run['EXPECTED_TOKENS_PER_SECOND']:,} tokens/s",
            f"checkpoint {params * 12 / 2**30:.1f} GiB each, {run['KEEP_CHECKPOINTS']} kept in {run['OUTPUT_DIR']}",
        )
    )


def train(model, optimizer, batches, held_out, run, facts, log, stop):
    """Train from facts["step"] to facts["total_steps"] or a wish to stop; validate and save. The loop of the run."""
    step, updates, saved, skipped, stopped = facts["step"], facts["updates"], facts["step"], 0, False
    if step == 0 and held_out:
        ranks.at("the validation before step 1")
        log.write({"step": 0, "validation_loss": validate(model, held_out, run["SEQUENCES_PER_STEP"])})
    while step < facts["total_steps"] and not stopped:
        ranks.at(f"step {step + 1}")
        started = time.perf_counter()
        indices = step_plan.sequences_of_step(len(batches.lengths), run["SEED"], step, run["SEQUENCES_PER_STEP"])
        parts, line = batches.of(indices)
        lr = learning_rate(
            step, facts["total_steps"], run["LEARNING_RATE"], run["MIN_LEARNING_RATE"], run["WARMUP_STEPS"]
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, grad_norm, updated, stopped = train_step(
            model, optimizer, parts, line["trainable_tokens"], run["MEMORY_POLICY"], run["MAX_GRAD_NORM"], stop.asked()
        )
        step, updates, skipped = step + 1, updates + updated, 0 if updated else skipped + 1
        seconds = time.perf_counter() - started
        line = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm} | line
        line |= {"micro_batches": len(parts), "step_seconds": round(seconds, 4)}
        line |= {"tokens_per_second": round(line["tokens"] / seconds, 1)}
        log.judge(line, indices, updated, run["SPIKE_SIGMA"])
        if skipped == run["MAX_SKIPPED_IN_A_ROW"]:
            raise SystemExit(
                f"{skipped} steps in a row had no finite loss and gradient, up to step {step}. The checkpoints before "
                "them stay. Look at the base model, COMPUTE_DTYPE and LEARNING_RATE."
            )
        last = step == facts["total_steps"]
        if held_out and (step % run["VALIDATE_EVERY"] == 0 or last):
            line["validation_loss"] = validate(model, held_out, run["SEQUENCES_PER_STEP"])
            log.say(f"step {step}: validation loss {line['validation_loss']:.4f}")
        log.write(line)
        log.advance(line)
        if step % run["SAVE_EVERY"] == 0 or last or stopped:
            saved = save(model, optimizer, run, facts | {"step": step, "updates": updates}, log, saved)
    if saved != step:
        raise SystemExit("The last checkpoint could not be written. Make room and run the same command again.")
    if stopped:
        log.say(f"Stopped after step {step}, as asked. To continue, in {Path.cwd()}:\n{stop.done()}")


def save(model, optimizer, run, facts, log, saved):
    """Write the checkpoint of facts["step"]; a failing write is told and the run goes on. Returns the last step saved.

    The next try is at the next SAVE_EVERY: where a write fails late, one after each step would stall the run.
    """
    step = facts["step"]
    ranks.at(f"saving step {step}", patient=True)
    try:
        log.sync()
        state = training_state(model, optimizer)
        path = checkpoints.save(run["OUTPUT_DIR"], step, state, facts, run["KEEP_CHECKPOINTS"])
    except OSError as error:
        log.warn(f"no checkpoint since step {saved}")
        log.say(f"WARNING: no checkpoint at step {step}, next try in {run['SAVE_EVERY']} steps: {error}")
        return saved
    log.warn("")
    log.say(f"saved {path}")
    return step


# ==== Start and end ====


def choose_checkpoint(output_dir, wanted):
    """Return the Path of the verified checkpoint to continue from, or None for a fresh start."""
    if wanted == "newest" or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # torchrun --max-restarts
        return checkpoints.newest_whole(output_dir)
    checkpoints.verify(found := Path(output_dir) / wanted)
    if checkpoints.listed(output_dir)[0].name != wanted:
        raise SystemExit(
            f"{output_dir} holds checkpoints newer than {wanted}. Move them away to go back to it: a run that "
            "continued beside them would leave two histories in one folder."
        )
    return found


def claim(run, facts):
    """Check this run's folder, lock it against a second one, and clear what a killed save left. Returns the lock."""
    check_output(run["OUTPUT_DIR"], facts)
    Path(run["OUTPUT_DIR"]).mkdir(parents=True, exist_ok=True)
    lock = checkpoints.lock(run["OUTPUT_DIR"])
    checkpoints.clear_staging(run["OUTPUT_DIR"])
    return lock


def announce(run, facts, batches, model, max_seq_len, changed):
    """Refuse a disk too small for the run, record the facts in run.json, and print what will happen."""
    output_dir, step = Path(run["OUTPUT_DIR"]), facts["step"]
    if step < facts["total_steps"]:
        count = max(1, run["KEEP_CHECKPOINTS"] + 1 - len(checkpoints.listed(output_dir)))
        checkpoints.check_room(output_dir, sum(p.numel() for p in model.parameters()) * 12 * count)
    checkpoints.write_whole(output_dir / "run.json", json.dumps(facts, indent=1) + "\n")
    if changed:
        print(f"WARNING: settings changed after step {step}: {'; '.join(changed)}.")
    print(describe(batches, run, facts["total_steps"], model, max_seq_len))
    print(f"continue   {output_dir}/step_{step:06d}, {step:,} steps done" if step else "start      from the base")
    if step >= facts["total_steps"]:
        print(f"Nothing to do: {step:,} of {facts['total_steps']:,} steps are done.")
    sys.stdout.flush()


def main(run):
    """Train as the settings `run` (dict) say."""
    validate_settings(run)
    transformers.utils.logging.disable_progress_bar()
    device, mesh = ranks.join(DEVICE)
    if device.type == "cuda" and COMPUTE_DTYPE == "float32":
        raise SystemExit("COMPUTE_DTYPE is float32; flash attention on a GPU needs bfloat16.")
    with ranks.Watch(COLLECTIVE_TIMEOUT_SECONDS):
        ranks.at("loading", patient=True)
        report, fingerprints = agree(DATA_DIR, BASE_MODEL)
        facts = {
            "fingerprints": fingerprints,
            "settings": run,
            "versions": training_log.versions(),
            "step": 0,
            "updates": 0,
        }
        facts |= {"world_size": dist.get_world_size(), "base_model": BASE_MODEL, "history": []}
        ranks.agree_on(run | fingerprints | {name: facts["versions"][name] for name in ("torch", "code")})
        lock = ranks.on_rank0(lambda: claim(run, facts))

        data = load_data(DATA_DIR)
        model = load_model(BASE_MODEL, LOSS_CHUNK_TOKENS, ACTIVATION_CHECKPOINTING)
        config = model.causal_lm.config
        batches = Batches(data["train"], config, TOKENS_PER_MICRO_BATCH, device)
        check_batches(batches, "training", SEQUENCES_PER_STEP, config)
        held_out = Batches(data["validation"], config, TOKENS_PER_MICRO_BATCH, device) if VALIDATE_EVERY else None
        if held_out:
            check_batches(held_out, "validation", 1, config)
        one_epoch = step_plan.steps_per_epoch(len(batches.lengths), SEQUENCES_PER_STEP)
        facts["total_steps"] = MAX_STEPS or EPOCHS * one_epoch

        shard(model, mesh, getattr(torch, COMPUTE_DTYPE), MEMORY_POLICY)
        optimizer = make_optimizer(model, (ADAM_BETA1, ADAM_BETA2), ADAM_EPS, WEIGHT_DECAY)
        checkpoint = ranks.on_rank0(lambda: choose_checkpoint(OUTPUT_DIR, RESUME))
        changed = []
        if checkpoint := checkpoints.on_every_rank(checkpoint)[0]:
            stored = resume(checkpoint, training_state(model, optimizer), fingerprints)
            changed = segment(stored, facts)
            told = [{"after_step": stored["step"], "changed": changed}] if changed else []
            facts |= {name: stored[name] for name in ("step", "updates")} | {"history": stored["history"] + told}
        ranks.agree_on({"step": facts["step"], "training tokens": int(batches.lengths.sum())})
        ranks.on_rank0(lambda: announce(run, facts, batches, model, report["max_seq_len"], changed))
        if facts["step"] < facts["total_steps"]:
            log = training_log.Log(OUTPUT_DIR, facts["step"], facts["total_steps"])
            train(model, optimizer, batches, held_out, run, facts, log, ranks.Stop(OUTPUT_DIR))
            log.close()
    del lock  # held to here
    dist.destroy_process_group()


if __name__ == "__main__":
    main(settings.from_flags(globals()))
