"""Step 3: fine-tune the resized base model on the prepared conversations, with FSDP2 over any number of processes.

Reads   data/sft_v1/ (prepare_data.py) and checkpoints/base/ (resize_vocab.py).
Writes  checkpoints/sft_v1/: step_NNNNNN/ (sharded DCP checkpoints), run.json, metrics.jsonl, skipped.jsonl,
        spikes.jsonl, loss.png, tensorboard/.

    torchrun --nproc-per-node 2 sft_v1.py       two GPUs (or, without a GPU, two CPU processes)
    torchrun --nproc-per-node 1 sft_v1.py       one
    python sft_v1.py --plan-only                memory, time and traffic of the run, without a GPU or weights
    the same command again                      continues from the newest whole checkpoint
    touch checkpoints/sft_v1/STOP               ends the run after its step, with a checkpoint; so do Ctrl-C and SIGTERM
    torchrun --max-restarts 3 ...               goes on by itself after a rank was killed

    torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 sft_v1.py
                                                on each of two machines: sharded inside each, replicated across

torchrun waits 30 seconds after a signal before it kills; a run whose step and checkpoint take longer needs its flag
`--shutdown-timeout 120`. A STOP file has no such limit.

An optimizer step is SEQUENCES_PER_STEP sequences however many processes there are. Sequences lie end to end without
padding, attention never crosses from one to the next, and the loss is the sum of the cross-entropy over the step's
trainable tokens divided by their number, over all ranks and micro-batches.
"""

import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig

import export_hf
from sft import settings, system
from sft.training import checkpoints, dataloader, distributed, hardware, memory_plan, training_log, validation
from sft.training import model as sft_model

# ---- Files ----
DATA_DIR = "data/sft_v1"  # folder, from prepare_data.py
BASE_MODEL = "models/resized"  # folder, from resize_vocab.py
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
TOKENS_PER_MICRO_BATCH = 0  # tokens per forward on one rank; 0 = auto: memory_plan.py takes the fastest that fits
ACTIVATION_CHECKPOINTING = "auto"  # recompute blocks in the backward, a third more work: "on" | "off" | "auto"
MEMORY_POLICY = "auto"  # ranks communicate "per_step" | "per_micro_batch": slower, 3 GiB less at 1B | "auto"
COMPILE = "off"  # torch.compile each block, "on" | "off": little gain on a CPU; benchmarks/gpu.py measures a GPU
COMPUTE_DTYPE = "bfloat16"  # "bfloat16" | "float32" of forward and backward; masters and moments are always float32
LOSS_CHUNK_TOKENS = 1024  # trainable positions whose logits exist at once: 1024 x 49,156 x 4 bytes = 0.2 GB
RESERVED_GIB = 2.5  # of each card for the CUDA context, NCCL, fragmentation and a desktop; the plan fits into the rest
DEVICE = "auto"  # "auto" (a GPU per process if there is one) | "cuda" | "cpu"
# ---- Validation, log and checkpoints ----
VALIDATE_EVERY = 500  # optimizer steps between validations; also before the first step and after the last; 0 = never
PROMPTS = ("Who are you?", "What is 17 + 25?", "Name three fruits.")  # answered at each validation; "" = none
ANSWER_TOKENS = 64  # tokens after which an answer is broken off
SAVE_EVERY = 500  # optimizer steps between checkpoints, and to the next try after a failed one; also after the last
KEEP_CHECKPOINTS = 3  # newest ones kept; one of Genesis has 12 GB
COLLECTIVE_TIMEOUT_SECONDS = 300  # seconds after which a rank that died or hangs ends the others; above one micro-batch
EXPECTED_TOKENS_PER_SECOND = 19_000  # tokens/s of all ranks, for the time printed at start; 2x RTX 4090 in pretraining
# ---- Planning without a run ----
PLAN_ONLY = False  # print the plan for PLAN_RANKS GPUs of PLAN_GIB each and stop; needs only config.json and the data
PLAN_RANKS = 2  # GPUs of one machine
PLAN_GIB = 24.0  # GiB of memory of each


# ==== Model and optimizer ====


def shard(model, mesh, compute_dtype, memory_policy):
    """Shard `model` in place over `mesh`: each block is a unit, the root holds embedding, last norm, head and loss."""
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    reshard = memory_policy == "per_micro_batch"  # a block between its forward and its backward; never the root
    for layer in model.causal_lm.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)


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


# ==== Gates: what must hold before any long work ====


def validate_settings(run):
    """Raise SystemExit with a sentence for a value that no run can have. run: dict of all settings."""
    for name, values in {
        "MEMORY_POLICY": ("auto", "per_step", "per_micro_batch"),
        "ACTIVATION_CHECKPOINTING": ("auto", "on", "off"),
        "COMPILE": ("on", "off"),
        "COMPUTE_DTYPE": ("bfloat16", "float32"),
        "DEVICE": ("auto", "cuda", "cpu"),
    }.items():
        if run[name] not in values:
            raise SystemExit(f"{name} is {run[name]!r}; it must be one of {', '.join(values)}.")
    at_least_0 = ("MAX_STEPS", "WARMUP_STEPS", "VALIDATE_EVERY", "MIN_LEARNING_RATE", "WEIGHT_DECAY", "SEED")
    at_least_0 += ("TOKENS_PER_MICRO_BATCH", "RESERVED_GIB")
    for name, value in run.items():
        if isinstance(value, bool | str | tuple):
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

    Returns: their fingerprints, a dict of SHA-256 digests under "data", "tokenizer" and "base".
    Raises: SystemExit naming the script to run again.
    """
    report = system.read_json(Path(data_dir) / "report.json", "prepare_data.py")
    config = system.read_json(Path(base_model) / "config.json", "resize_vocab.py")
    if not any(Path(base_model).glob("*.safetensors")):
        raise SystemExit(f"{base_model} has no safetensors. Run resize_vocab.py again.")
    digests = {}
    for folder, script in ((Path(data_dir) / "tokenizer", "prepare_data.py"), (Path(base_model), "resize_vocab.py")):
        if not (folder / "tokenizer.json").is_file():
            raise SystemExit(f"{folder} has no tokenizer.json. Run {script} again.")
        digests[script] = system.sha256(folder / "tokenizer.json")
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
    return {
        "data": json.dumps(report.get("digest"), sort_keys=True),
        "tokenizer": digests["prepare_data.py"],
        "base": system.folder_digest(base_model, "*.safetensors"),
    }


def check_output(output_dir, facts):
    """Refuse a folder that holds something else, or a run of other data, tokenizer, base, seed or step size."""
    output_dir = Path(output_dir)
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    if not (output_dir / "run.json").is_file():
        if (output_dir / system.LOCK).is_file():
            return  # a run that was killed before it had written anything
        raise SystemExit(f"{output_dir} is not empty and holds no run of sft_v1.py. Name another --output-dir.")
    before = system.read_json(output_dir / "run.json", "sft_v1.py")
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


def check_lengths(lengths, split, need, config, budget):
    """Refuse a split with fewer than `need` sequences or with one that no micro-batch or the model cannot hold."""
    if len(lengths) < need:
        raise SystemExit(f"The {split} split has {len(lengths)} sequences, fewer than the {need} needed.")
    longest = int(lengths.max(initial=0))
    if 0 < budget < longest:
        raise SystemExit(
            f"Sequence {int(lengths.argmax())} of the {split} split has {longest} tokens, more than "
            f"TOKENS_PER_MICRO_BATCH = {budget}. Raise it to at least {longest}."
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
    facts = system.read_json(checkpoint / "facts.json", "sft_v1.py")
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
        if facts["updates"] and not any(distributed.on_every_rank(any(bool(part.any()) for part in parts))):
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


def forward_backward(model, batch, scale, communicate):
    """Add a micro-batch's gradients, times `scale`, to the step's; return its summed cross-entropy (detached).

    communicate: reduce the gradients over the ranks now, and give the gathered parameters back.
    """
    model.set_requires_gradient_sync(communicate)
    model.set_reshard_after_backward(communicate)
    loss = model(**batch)
    (loss * scale).backward()
    return loss.detach()


def train_step(model, optimizer, batches, trainable_tokens, memory_policy, max_grad_norm, stop=False):
    """Run one optimizer step over this rank's micro-batches.

    stop: whether this rank knows of a wish to stop.
    Returns: (loss per trainable token, grad_norm, updated, stop: whether any rank knows of one), the same on all ranks.
    A non-finite loss or gradient norm leaves parameters and moments as they are, on all ranks alike.
    """
    total = torch.zeros((), dtype=torch.float32, device=batches[0]["input_ids"].device)
    # FSDP averages gradients over the ranks; times world_size makes that the sum.
    scale = dist.get_world_size() / trainable_tokens
    for number, batch in enumerate(batches, start=1):
        distributed.at(part=f"micro-batch {number} of {len(batches)}")
        communicate = number == len(batches) or memory_policy == "per_micro_batch"
        total += forward_backward(model, batch, scale, communicate)
    distributed.at(part="sum over the ranks")
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


def rehearse(model, optimizer, batch, plan):
    """Run the largest micro-batch as in the middle and at the end of a step, so that too little memory shows now.

    Raises: SystemExit with the setting to change. Parameters and moments stay as they are.
    """
    try:
        for last in (False, True):
            communicate = last or plan.memory_policy == "per_micro_batch"
            forward_backward(model, batch, 1.0, communicate)
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            f"The largest micro-batch ({batch['input_ids'].numel()} tokens) does not fit into this GPU ({error}). "
            "Raise RESERVED_GIB, so that a smaller plan is chosen, or lower TOKENS_PER_MICRO_BATCH."
        ) from None
    optimizer.zero_grad(set_to_none=True)


def train(model, optimizer, batches, look, run, facts, log, stop):
    """Train from facts["step"] to facts["total_steps"] or a wish to stop; validate and save. The loop of the run.

    look: called between steps, returns what the validation found (a dict for the log), or None without validation.
    """
    step, updates, saved, skipped, stopped = facts["step"], facts["updates"], facts["step"], 0, False
    if step == 0 and look:
        distributed.at("the validation before step 1")
        log.write({"step": 0} | look(0))
    peak = dist.get_world_size() * hardware.peak_flops(batches.device, getattr(torch, run["COMPUTE_DTYPE"]))
    order = (
        dataloader.sequences_of_step(len(batches.lengths), run["SEED"], number, run["SEQUENCES_PER_STEP"])
        for number in range(step, facts["total_steps"])
    )
    began = time.perf_counter()
    for indices, parts, line in batches.each(order):
        distributed.at(f"step {step + 1}")
        lr = learning_rate(
            step, facts["total_steps"], run["LEARNING_RATE"], run["MIN_LEARNING_RATE"], run["WARMUP_STEPS"]
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        policy = facts["plan"]["memory_policy"]
        loss, grad_norm, updated, stopped = train_step(
            model, optimizer, parts, line["trainable_tokens"], policy, run["MAX_GRAD_NORM"], stop.asked()
        )
        step, updates, skipped = step + 1, updates + updated, 0 if updated else skipped + 1
        seconds = time.perf_counter() - began
        line = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm} | line
        line |= {"micro_batches": len(parts), "step_seconds": round(seconds, 4)}
        line |= {"tokens_per_second": round(line["tokens"] / seconds, 1)}
        line |= {"trainable_tokens_per_second": round(line["trainable_tokens"] / seconds, 1)}
        line |= {"mfu": round(line.pop("flops") / seconds / peak, 4), "peak_gib": hardware.peak_gib(batches.device)}
        log.judge(line, indices, updated, run["SPIKE_SIGMA"])
        if skipped == run["MAX_SKIPPED_IN_A_ROW"]:
            raise SystemExit(
                f"{skipped} steps in a row had no finite loss and gradient, up to step {step}. The checkpoints before "
                "them stay. Look at the base model, COMPUTE_DTYPE and LEARNING_RATE."
            )
        last = step == facts["total_steps"]
        if look and (step % run["VALIDATE_EVERY"] == 0 or last):
            line |= look(step)
        log.write(line)
        log.advance(line)
        if step % run["SAVE_EVERY"] == 0 or last or stopped:
            saved = save(model, optimizer, run, facts | {"step": step, "updates": updates}, log, saved)
        if stopped:
            break
        began = time.perf_counter()
    if saved != step:
        raise SystemExit("The last checkpoint could not be written. Make room and run the same command again.")
    if stopped:
        log.say(f"Stopped after step {step}, as asked. To continue, in {Path.cwd()}:\n{stop.done()}")


def save(model, optimizer, run, facts, log, saved):
    """Write the checkpoint of facts["step"]; a failing write is told and the run goes on. Returns the last step saved.

    The next try is at the next SAVE_EVERY: where a write fails late, one after each step would stall the run.
    """
    step = facts["step"]
    distributed.at(f"saving step {step}", patient=True)
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
    lock = system.lock(run["OUTPUT_DIR"], "--output-dir")
    checkpoints.clear_staging(run["OUTPUT_DIR"])
    return lock


def announce(run, facts, lines, parameters, changed):
    """Refuse a disk too small for the run, record the facts in run.json, and print what will happen (`lines`)."""
    output_dir, step = Path(run["OUTPUT_DIR"]), facts["step"]
    if step < facts["total_steps"]:
        count = max(1, run["KEEP_CHECKPOINTS"] + 1 - len(checkpoints.listed(output_dir)))
        checkpoints.check_room(output_dir, parameters * 12 * count)
    system.write_whole(output_dir / "run.json", json.dumps(facts, indent=1) + "\n")
    if changed:
        print(f"WARNING: settings changed after step {step}: {'; '.join(changed)}.")
    print(lines)
    print(f"continue   {output_dir}/step_{step:06d}, {step:,} steps done" if step else "start      from the base")
    if step >= facts["total_steps"]:
        print(f"Nothing to do: {step:,} of {facts['total_steps']:,} steps are done.")
    sys.stdout.flush()


def make_plan(run, config, lengths, place, limit):
    """Choose how the run uses its memory, and lay out its first epoch.

    place: (number of ranks, of machines, "cuda" or "cpu"); limit: bytes a rank may use.
    Returns: (memory_plan.Plan, what step_plan.survey finds, total steps, the lines to print).
    """
    world_size, machines, _ = place
    one_epoch = dataloader.steps_per_epoch(len(lengths), run["SEQUENCES_PER_STEP"])
    total_steps = run["MAX_STEPS"] or run["EPOCHS"] * one_epoch
    sizes, dtype = memory_plan.shapes(config), getattr(torch, run["COMPUTE_DTYPE"])
    plan = memory_plan.choose(config, world_size // machines, dtype, run, int(lengths.max()), limit)
    costs = dataloader.cost(lengths, sizes.matrices, sizes.attention)
    steps = min(one_epoch, total_steps)
    survey = dataloader.survey(lengths, world_size, plan.tokens, costs, run["SEED"], steps, run["SEQUENCES_PER_STEP"])
    lines = memory_plan.describe(plan, config, run, lengths, survey, total_steps, limit, place)
    return plan, survey, total_steps, lines


def read_config(base_model):
    """Return the transformers config of the folder `base_model`. Raises: SystemExit if there is none."""
    try:
        return AutoConfig.from_pretrained(base_model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(
            f"{base_model} has no config that transformers can read ({error}). Run resize_vocab.py."
        ) from None


def main(run):
    """Train as the settings `run` (dict) say, or print the plan of it."""
    validate_settings(run)
    transformers.utils.logging.disable_progress_bar()
    if PLAN_ONLY:
        config, data = read_config(BASE_MODEL), dataloader.load_data(DATA_DIR)
        check_lengths(
            dataloader.sequence_lengths(data["train"]), "training", SEQUENCES_PER_STEP, config, TOKENS_PER_MICRO_BATCH
        )
        limit = (PLAN_GIB - RESERVED_GIB) * memory_plan.GIB
        print(make_plan(run, config, dataloader.sequence_lengths(data["train"]), (PLAN_RANKS, 1, "cuda"), limit)[-1])
        return
    device, mesh = distributed.join(DEVICE)
    if device.type == "cuda" and COMPUTE_DTYPE == "float32":
        raise SystemExit("COMPUTE_DTYPE is float32; flash attention on a GPU needs bfloat16.")
    with distributed.Watch(COLLECTIVE_TIMEOUT_SECONDS):
        distributed.at("loading", patient=True)
        fingerprints = agree(DATA_DIR, BASE_MODEL)
        chosen = json.loads(json.dumps(run))  # as a checkpoint gives them back: a tuple is a list there
        facts = {"fingerprints": fingerprints, "settings": chosen, "versions": hardware.versions()}
        facts |= {"step": 0, "updates": 0, "world_size": dist.get_world_size(), "base_model": BASE_MODEL, "history": []}
        distributed.agree_on(run | fingerprints | {name: facts["versions"][name] for name in ("torch", "code")})
        lock = distributed.on_rank0(lambda: claim(run, facts))
        distributed.check_shared(OUTPUT_DIR, system.LOCK)

        data, config = dataloader.load_data(DATA_DIR), read_config(BASE_MODEL)
        for split, need in (("train", SEQUENCES_PER_STEP), ("validation", 1)):
            if split == "train" or VALIDATE_EVERY:
                check_lengths(dataloader.sequence_lengths(data[split]), split, need, config, TOKENS_PER_MICRO_BATCH)
        place = (dist.get_world_size(), dist.get_world_size() // mesh.size(-1), device.type)
        limit = hardware.memory(device) - RESERVED_GIB * memory_plan.GIB
        lengths = dataloader.sequence_lengths(data["train"])
        planned = distributed.on_rank0(lambda: make_plan(run, config, lengths, place, limit))
        plan, survey, facts["total_steps"], lines = distributed.on_every_rank(planned)[0]
        facts["plan"] = dataclasses.asdict(plan)

        model = sft_model.load_model(BASE_MODEL, LOSS_CHUNK_TOKENS)
        sft_model.prepare_blocks(model, plan.checkpointing, COMPILE == "on")
        sizes = memory_plan.shapes(config)
        batches = dataloader.Batches(data["train"], sizes, plan.tokens, device)
        held_out = dataloader.Batches(data["validation"], sizes, plan.tokens, device) if VALIDATE_EVERY else None
        shard(model, mesh, getattr(torch, COMPUTE_DTYPE), plan.memory_policy)
        optimizer = make_optimizer(model, (ADAM_BETA1, ADAM_BETA2), ADAM_EPS, WEIGHT_DECAY)
        checkpoint = distributed.on_rank0(lambda: choose_checkpoint(OUTPUT_DIR, RESUME))
        changed = []
        if checkpoint := distributed.on_every_rank(checkpoint)[0]:
            stored = resume(checkpoint, training_state(model, optimizer), fingerprints)
            changed = segment(stored, facts)
            told = [{"after_step": stored["step"], "changed": changed}] if changed else []
            facts |= {name: stored[name] for name in ("step", "updates")} | {"history": stored["history"] + told}
        distributed.on_rank0(lambda: export_hf.dry_run(BASE_MODEL))
        distributed.agree_on({"step": facts["step"], "training tokens": int(lengths.sum())})
        distributed.on_rank0(lambda: announce(run, facts, lines, sizes.all, changed))
        if facts["step"] < facts["total_steps"]:
            distributed.at("the largest micro-batch, tried first")
            largest = dataloader.micro_batch(list(batches.rows(survey["largest"]).values()))
            rehearse(model, optimizer, dataloader.each_tensor(largest, batches.to_device), plan)
            log = training_log.Log(OUTPUT_DIR, facts["step"], facts["total_steps"])
            look = validation.looker(model, data, held_out, log, run, device)
            train(model, optimizer, batches, look, run, facts, log, distributed.Stop(OUTPUT_DIR))
            log.close()
    del lock  # held to here
    dist.destroy_process_group()


if __name__ == "__main__":
    main(settings.from_flags(globals()))
