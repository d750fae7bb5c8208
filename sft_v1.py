"""Step 3: fine-tune the resized base model on the prepared conversations, with FSDP2 over any number of processes.

Reads   data/sft_v1/ (prepare_data.py) and models/resized/ (resize_vocab.py).
Writes  checkpoints/sft_v1/: step_NNNNNN/ (sharded DCP checkpoints), run.json, metrics.jsonl, skipped.jsonl,
        spikes.jsonl, answers.jsonl, loss.png, tensorboard/.

    torchrun --nproc-per-node 2 sft_v1.py       two GPUs (or, without a GPU, two CPU processes)
    torchrun --nproc-per-node 1 sft_v1.py       one
    python sft_v1.py --plan-only                memory, time and traffic of the run, without a GPU or weights
    the same command again                      continues from the latest whole checkpoint
    touch checkpoints/sft_v1/STOP               ends the run after its step, with a checkpoint; so do Ctrl-C and SIGTERM
                                                (a STOP from before the start is removed)
    torchrun --max-restarts 3 ...               continues by itself after a rank was killed

    torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 sft_v1.py
                                                on each of two machines: sharded inside each, replicated across; for
                                                --max-restarts set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on both

torchrun waits 30 seconds after a signal before it kills; a run whose step and checkpoint take longer needs its flag
`--shutdown-timeout 120`. A STOP file has no such limit.

An optimizer step is SEQUENCES_PER_STEP sequences however many processes there are. Sequences lie end to end without
padding, attention never crosses from one to the next, and the loss is the sum of the cross-entropy over the step's
trainable tokens divided by their number, over all ranks and micro-batches.
"""

import contextlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import export_hf
from sft import hf_folder, settings, system
from sft.training import checkpoints, dataloader, distributed, hardware, memory_plan, training_log, validation
from sft.training import model as sft_model
from sft.training.schedule import Schedule, change_of_rate

# ---- Files ----
DATA_DIR = "data/sft_v1"  # folder, from prepare_data.py
RESIZED_MODEL = "models/resized"  # folder, from resize_vocab.py
CHECKPOINT_DIR = "checkpoints/sft_v1"  # folder of this run: checkpoints, metrics, curves
RESUME = "latest"  # "latest" whole checkpoint in CHECKPOINT_DIR if there is one | a name such as "step_000500"
# ---- Optimisation: the Genesis recipe ----
SEQUENCES_PER_STEP = 32  # sequences; the batch size: the recipe's 2 per GPU x 8 gradient accumulation x 2 GPUs
EPOCHS = 1  # passes over the training split; 510,577 sequences are 15,955 steps
MAX_STEPS = 0  # optimizer steps; 0 = all of EPOCHS. The schedule ends there too
LEARNING_RATE = 2e-5  # peak, after the warm-up
MIN_LEARNING_RATE = 2e-6  # end of the cosine
WARMUP_STEPS = 200  # optimizer steps from 0 to the peak, linear; fewer than the run has
ADAM_BETA1 = 0.9  # decay of the first moment
ADAM_BETA2 = 0.95  # decay of the second moment
WEIGHT_DECAY = 0.01  # decoupled, on matrices and embeddings; none on norms and biases
MAX_GRAD_NORM = 1.0  # global L2 norm to which larger gradients are scaled
SEED = 42  # order of the sequences
# ---- Memory and speed ----
TOKENS_PER_MICRO_BATCH = 0  # tokens per forward on one rank; 0 = auto: memory_plan.py takes the fastest that fits
ACTIVATION_CHECKPOINTING = "auto"  # recompute blocks in the backward, a third more work: "on" | "off" | "auto"
COMMUNICATE = "auto"  # gather and reduce "per_step" | "per_micro_batch": slower, 3 GiB less at 1B | "auto"
COMPILE = "auto"  # torch.compile on the blocks, minutes at start: "on" | "off" | "auto": on a GPU with a C compiler
COMPUTE_DTYPE = "bfloat16"  # of forward and backward; "float32" is for the tests, on a CPU. Masters are always float32
DETERMINISTIC = "off"  # on a GPU the same bits each time, slower: "on" | "off": up to the order of sums in attention
RESERVED_GIB = 2.5  # of the poorest card's free memory, for kernels' workspaces and a desktop; the plan takes the rest
DEVICE = "auto"  # "auto" (a GPU per process if there is one) | "cuda" | "cpu"
# ---- Validation, log and checkpoints ----
VALIDATE_EVERY = 500  # optimizer steps between validations; also before the first step and after the last; 0 = never
PROMPTS = ("Who are you?", "What is 17 + 25?", "Name three fruits.")  # answered at each validation; "" = none
SAVE_EVERY = 500  # optimizer steps between checkpoints; a failed save is retried then. The last step is always saved
KEEP_CHECKPOINTS = 3  # latest ones kept, and the one with the lowest validation loss; one of Genesis takes 11.2 GiB
ASYNC_SAVE = "on"  # write beside training, from a copy in host memory (Genesis: 11.2 GiB) | "off": training waits
COLLECTIVE_TIMEOUT_SECONDS = 300  # seconds a rank may be dead or silent before the others exit; above one micro-batch
EXPECTED_TOKENS_PER_SECOND = 19_000  # tokens/s of all ranks, for the time printed at start; 2x RTX 4090 in pretraining
# ---- Planning without a run ----
PLAN_ONLY = False  # print the plan for PLAN_RANKS GPUs of PLAN_GIB each and stop; needs only config.json and the data
PLAN_RANKS = 2  # GPUs of one machine
PLAN_GIB = 23.65  # GiB of memory that torch sees of each; an RTX 4090's

# ==== Constants ====

ADAM_EPS = 1e-8  # added to the root of the second moment
CONTEXT_GIB = 0.8  # of a card for the CUDA context and NCCL, estimated, in a plan without a card; a run measures it

CHOICES = {
    "ACTIVATION_CHECKPOINTING": ("auto", "on", "off"),
    "ASYNC_SAVE": ("on", "off"),
    "COMMUNICATE": ("auto", "per_step", "per_micro_batch"),
    "COMPILE": ("auto", "on", "off"),
    "COMPUTE_DTYPE": ("bfloat16", "float32"),
    "DETERMINISTIC": ("on", "off"),
    "DEVICE": ("auto", "cuda", "cpu"),
}
AT_LEAST = {
    "MAX_STEPS": 0,
    "MIN_LEARNING_RATE": 0,
    "WARMUP_STEPS": 0,
    "WEIGHT_DECAY": 0,
    "SEED": 0,
    "TOKENS_PER_MICRO_BATCH": 0,
    "RESERVED_GIB": 0,
    "VALIDATE_EVERY": 0,
    "SEQUENCES_PER_STEP": 1,
    "EPOCHS": 1,
    "SAVE_EVERY": 1,
    "KEEP_CHECKPOINTS": 1,
    "COLLECTIVE_TIMEOUT_SECONDS": 1,
    "EXPECTED_TOKENS_PER_SECOND": 1,
    "PLAN_RANKS": 1,
}
ABOVE_0 = ("LEARNING_RATE", "ADAM_BETA1", "ADAM_BETA2", "MAX_GRAD_NORM", "PLAN_GIB")
BELOW_1 = ("ADAM_BETA1", "ADAM_BETA2")


@dataclass
class State:
    """Where a run is and what it was started with: state.json of a checkpoint, and run.json."""

    settings: dict  # every setting's name and value, as JSON gives them back
    fingerprints: dict  # "data": the report's digests; the rest is hf_folder.fingerprint of the base
    versions: dict  # of hardware.versions()
    world_size: int
    plan: dict = field(default_factory=dict)  # of memory_plan.Plan
    total_steps: int = 0
    step: int = 0  # optimizer steps done
    updates: int = 0  # of them, those that were not skipped
    validation_loss: float | None = None  # at this step; None where it was not validated
    history: list = field(default_factory=list)  # {"after_step", "changed" settings} of each time the run continued


# ==== Model and optimizer ====


def shard(model, mesh, compute_dtype, communicate):
    """Shard `model` in place over `mesh`: each block is a unit, the root holds embedding, last norm, head and loss."""
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    reshard = communicate == "per_micro_batch"  # a block between its forward and its backward; never the root
    for layer in model.causal_lm.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    if mesh.device_type == "cuda" and communicate == "per_step":
        for unit in (*model.causal_lm.base_model.layers, model):
            unit.set_custom_reduce_scatter(distributed.ReduceInOnePool())


def make_optimizer(model, betas, weight_decay):
    """Return AdamW with fp32 moments that exist from the start, so that every checkpoint has the same tensors."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=ADAM_EPS, fused=True)
    for p in params:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def build(args, mesh, plan, compile_blocks):
    """Return (SFTModel of RESIZED_MODEL, sharded over `mesh` as the memory_plan.Plan says; its optimizer)."""
    model = sft_model.load_model(args["RESIZED_MODEL"])
    sft_model.prepare_blocks(model, plan.checkpointing, compile_blocks, mesh.device_type)
    shard(model, mesh, getattr(torch, args["COMPUTE_DTYPE"]), plan.communicate)
    return model, make_optimizer(model, (args["ADAM_BETA1"], args["ADAM_BETA2"]), args["WEIGHT_DECAY"])


# ==== Gates: what must hold before any long work ====


def validate_settings(args):
    """Raise SystemExit with a sentence for a value that no run can have. args: dict of all settings."""
    settings.check_bounds(args, CHOICES, AT_LEAST)
    for name in ABOVE_0:
        if not 0 < args[name] < math.inf:
            raise SystemExit(f"{name} is {args[name]}; it must be above 0.")
    for name in BELOW_1:
        if args[name] >= 1:
            raise SystemExit(f"{name} is {args[name]}; it must be below 1.")
    if args["MIN_LEARNING_RATE"] > args["LEARNING_RATE"]:
        raise SystemExit(f"MIN_LEARNING_RATE ({args['MIN_LEARNING_RATE']}) is above LEARNING_RATE; swap or lower it.")


def check_inputs(data_dir, report, resized_model):
    """Check that data, tokenizer and model belong together. report: dict of the data's report.json.

    Returns: their fingerprints, for State.
    Raises: SystemExit naming the script to run again.
    """
    data_dir, resized_model = Path(data_dir), Path(resized_model)
    config = system.read_json(resized_model / "config.json", "resize_vocab.py")
    if not any(resized_model.glob("*.safetensors")):
        raise SystemExit(f"{resized_model} has no safetensors. Run resize_vocab.py again.")
    for folder, script in ((data_dir / "tokenizer", "prepare_data.py"), (resized_model, "resize_vocab.py")):
        if not (folder / "tokenizer.json").is_file():
            raise SystemExit(f"{folder} has no tokenizer.json. Run {script} again.")
    digests, named = hf_folder.tokenizer_digests(data_dir / "tokenizer"), report.get("tokenizer_sha256")
    if digests != named:
        different = system.differences(named if isinstance(named, dict) else {}, digests, "in the report", "here")
        raise SystemExit(
            f"{data_dir}/tokenizer is not the one its report names: {'; '.join(different)}. Run prepare_data.py again."
        )
    rows, tokens = config.get("vocab_size"), report.get("vocab_size")
    if not (isinstance(rows, int) and isinstance(tokens, int) and rows >= tokens):
        raise SystemExit(
            f"{resized_model} has {rows} rows in its vocabulary, but the tokenizer of {data_dir} has {tokens} tokens: "
            "this base was not resized. Run resize_vocab.py, then name its output with --resized-model."
        )
    if different := system.differences(digests, hf_folder.tokenizer_digests(resized_model), "there", "here"):
        raise SystemExit(
            f"The tokenizers of {data_dir} (there) and {resized_model} (here) differ: {'; '.join(different)}. Run "
            "resize_vocab.py again for this data."
        )
    return {"data": json.dumps(report.get("digest"), sort_keys=True)} | hf_folder.fingerprint(resized_model)


def check_folder(folder, state):
    """Exit unless `folder` is empty or holds this run: the same data, base, seed and step size."""
    folder = Path(folder)
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / checkpoints.RUN).is_file():
        if (folder / system.LOCK).is_file():
            return  # a run that was killed before it had written anything
        raise SystemExit(f"{folder} is not empty and holds no run of sft_v1.py. Name another --checkpoint-dir.")
    stored = system.read_json(folder / checkpoints.RUN, "sft_v1.py")
    stored_fingerprints, stored_settings = stored.get("fingerprints"), stored.get("settings")
    then = dict(stored_fingerprints) if isinstance(stored_fingerprints, dict) else {}
    now = dict(state.fingerprints)
    for name in ("SEED", "SEQUENCES_PER_STEP"):
        then[name] = stored_settings.get(name) if isinstance(stored_settings, dict) else None
        now[name] = state.settings[name]
    if different := checkpoints.fingerprint_differences(then, now):
        raise SystemExit(
            f"{folder} holds another run: {different}. Name another --checkpoint-dir, or go back to what that run used."
        )


# ==== Checkpoints: the model and the moments, by the model's own names ====


def checkpoint_tensors(model, optimizer):
    """Return the flat dict of what a checkpoint holds, sharing memory with the run: DTensors and step counts, fp32."""
    tensors = {}
    for name, p in model.named_parameters():
        name = name.removeprefix("causal_lm.")
        tensors[f"model.{name}"] = p.detach()
        for key, tensor in optimizer.state[p].items():
            tensors[f"optimizer.{key}.{name}"] = tensor
    return tensors


def changed_settings(stored, state):
    """Return what a continued run changes against the state.json `stored` (dict), as a list of phrases."""
    now = state.settings | {"ranks": state.world_size} | state.versions
    then = stored["settings"] | {"ranks": stored["world_size"]} | stored["versions"]
    names = [name for name in now if name != "RESUME"]
    return system.differences({name: then.get(name) for name in names}, {name: now[name] for name in names})


def resume(checkpoint, model, optimizer, state):
    """Fill model, optimizer and `state` in place from a verified `checkpoint`; return the list of changed settings."""
    stored = checkpoints.load(checkpoint, checkpoint_tensors(model, optimizer), state.fingerprints)
    changed = changed_settings(stored, state)
    then = Schedule.of(stored["settings"], stored["total_steps"])
    changed += change_of_rate(then, Schedule.of(state.settings, state.total_steps), stored["step"])
    state.step, state.updates, state.history = stored["step"], stored["updates"], stored["history"]
    state.history.append({"after_step": state.step, "changed": changed})
    return changed


# ==== Training ====


def forward_backward(model, micro_batch, scale, communicate):
    """Add a micro-batch's gradients, times `scale`, to the step's; return its summed cross-entropy (detached).

    communicate: reduce the gradients over the ranks now, and give the gathered parameters back.
    """
    model.set_requires_gradient_sync(communicate)
    model.set_reshard_after_backward(communicate)
    loss = model(micro_batch)
    (loss * scale).backward()
    return loss.detach()


def train_step(model, optimizer, micro_batches, trainable_tokens, communicate, max_grad_norm, stop=False):
    """Run one optimizer step over this rank's micro-batches.

    communicate: "per_step" | "per_micro_batch"; stop: whether this rank knows of a request to stop.
    Returns: (loss per trainable token, grad_norm, updated, stop: whether any rank knows of one), the same on all ranks.
    A non-finite loss or gradient norm leaves parameters and moments as they are, on all ranks alike.
    """
    total = torch.zeros((), dtype=torch.float32, device=micro_batches[0].input_ids.device)
    # FSDP averages gradients over the ranks; times world_size makes that the sum.
    scale = dist.get_world_size() / trainable_tokens
    for number, micro_batch in enumerate(micro_batches, start=1):
        distributed.heartbeat(part=f"micro-batch {number} of {len(micro_batches)}")
        last = number == len(micro_batches)
        total += forward_backward(model, micro_batch, scale, last or communicate == "per_micro_batch")
    distributed.heartbeat(part="sum over the ranks")
    shared = torch.stack([total, torch.full_like(total, float(stop))])
    dist.all_reduce(shared)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]  # a frozen one has none
    norm = nn.utils.get_total_norm(gradients).full_tensor()
    # The step's one wait for the device.
    loss, stop, grad_norm = torch.stack([shared[0] / trainable_tokens, shared[1], norm]).tolist()
    updated = math.isfinite(loss) and math.isfinite(grad_norm)
    if updated:
        nn.utils.clip_grads_with_norm_(model.parameters(), max_grad_norm, norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm, updated, stop > 0


def rehearse(model, optimizer, micro_batch, communicate):
    """Run the largest micro-batch once, so that running out of memory happens now and not hours in.

    It runs as in the middle of a step and as at its end. Between them, and without gradients as in a validation, run a
    few tokens and the single one of an empty micro-batch: torch.compile makes each of these four apart, and now.
    Parameters and moments stay as they are.
    """
    few = dataloader.concatenate([(np.arange(3), np.ones(3, bool))]).to(micro_batch.input_ids.device)
    empty = dataloader.concatenate([]).to(micro_batch.input_ids.device)
    for batch, last in ((micro_batch, False), (few, False), (empty, False), (micro_batch, True)):
        forward_backward(model, batch, 1.0, last or communicate == "per_micro_batch")
    model.eval()
    with torch.no_grad():
        for batch in (few, empty):
            model(batch)
    validation.reshard(model)
    model.train()
    optimizer.zero_grad(set_to_none=True)


def train(model, optimizer, loader, validator, saver, args, state, log, stop):
    """Train to state.total_steps or a request to stop; validate and save. The loop of the run.

    validator: validation.Validator, or None without validation; saver: checkpoints.Saver. `state` is updated in place.
    Returns: whether the run was stopped.
    """
    if validator and state.step == 0:
        distributed.heartbeat("the validation before step 1")
        log.write({"step": 0} | validator.validate(0))
    total_steps, communicate = state.total_steps, state.plan["communicate"]
    schedule = Schedule.of(args, total_steps)
    stopped = False
    start = time.perf_counter()
    for batch in loader.steps(args["SEED"], args["SEQUENCES_PER_STEP"], state.step, total_steps):
        distributed.heartbeat(f"step {state.step + 1}")
        lr = schedule.rate(state.step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, grad_norm, updated, stopped = train_step(
            model, optimizer, batch.micro_batches, batch.stats["trainable_tokens"], communicate,
            args["MAX_GRAD_NORM"], stop.requested(),
        )  # fmt: skip
        state.step += 1
        state.updates += updated
        metrics = log.metrics(state.step, loss, grad_norm, lr, batch, time.perf_counter() - start)
        log.check_spike(metrics, batch.indices)
        log.check_memory(metrics)
        log.check_skipped(metrics, batch.indices, updated)
        last = state.step == total_steps
        if validator and (state.step % args["VALIDATE_EVERY"] == 0 or last):
            metrics |= validator.validate(state.step)
        state.validation_loss = metrics.get("validation_loss")
        saver.check()
        log.write(metrics)
        log.advance(metrics)
        if state.step % args["SAVE_EVERY"] == 0 or last or stopped:
            saver.save(state.step, checkpoint_tensors(model, optimizer), asdict(state), wait=last or stopped)
        if stopped:
            break
        start = time.perf_counter()
    if saver.last_saved != state.step:
        raise SystemExit("The last checkpoint could not be written. Make room and run the same command again.")
    return stopped


# ==== Start and end ====


def load_inputs(args):
    """Return (the data's splits, the model's config, int64 lengths of the training split), checked for the run."""
    config = hf_folder.load_config(args["RESIZED_MODEL"], "Run resize_vocab.py.")
    data = dataloader.load_data(args["DATA_DIR"])
    lengths = dataloader.sequence_lengths(data["train"])
    budget = args["TOKENS_PER_MICRO_BATCH"]
    dataloader.check_lengths(lengths, "training", args["SEQUENCES_PER_STEP"], config, budget)
    if args["VALIDATE_EVERY"]:
        dataloader.check_lengths(dataloader.sequence_lengths(data["validation"]), "validation", 1, config, budget)
    return data, config, lengths


def print_plan(args):
    """Print the plan of a run on PLAN_RANKS GPUs of PLAN_GIB, without a GPU or weights."""
    _, config, lengths = load_inputs(args)
    dataloader.warn_of_limit(dataloader.read_report(args["DATA_DIR"]))
    limit = (args["PLAN_GIB"] - CONTEXT_GIB - args["RESERVED_GIB"]) * memory_plan.GIB
    topology = memory_plan.Topology(args["PLAN_RANKS"], 1, "cuda")
    *_, lines = memory_plan.plan_run(args, config, memory_plan.shapes(config), lengths, topology, limit)
    print(lines)


def initial_state(args, report, world_size):
    """Return the State of a run that starts from the base. report: dict of the data's report.json."""
    return State(
        settings=json.loads(json.dumps(args)),  # a tuple becomes a list, as it comes back from a checkpoint
        fingerprints=check_inputs(args["DATA_DIR"], report, args["RESIZED_MODEL"]),
        versions=hardware.versions(),
        world_size=world_size,
    )


def claim(args, state, locks):
    """Check this run's folder, lock it against a second run until `locks` closes, and clear what earlier ones left.

    That is what a killed save left, and a STOP from before this start; one that is made from here on counts.
    """
    folder = args["CHECKPOINT_DIR"]
    check_folder(folder, state)
    Path(folder).mkdir(parents=True, exist_ok=True)
    locks.enter_context(system.lock(folder, "--checkpoint-dir"))
    checkpoints.clear_unfinished(folder)
    if not distributed.restarted():
        distributed.clear_stop(folder)


def announce(args, state, report, lines, parameters, changed):
    """Refuse a disk too small for the run, record its state in run.json, and print what will happen (`lines`)."""
    folder = Path(args["CHECKPOINT_DIR"])
    if state.step < state.total_steps:
        most = args["KEEP_CHECKPOINTS"] + 1 + (args["VALIDATE_EVERY"] > 0)  # one being written, and the best
        checkpoints.check_room(folder, parameters * 12 * max(1, most - len(checkpoints.listed(folder))))
    checkpoints.write_run(folder, asdict(state))
    if changed:
        print(f"WARNING: settings changed after step {state.step}: {'; '.join(changed)}.")
    dataloader.warn_of_limit(report)
    print(lines)
    if state.step:
        print(f"continue   {folder}/{checkpoints.checkpoint_name(state.step)}, {state.step:,} steps done")
    else:
        print("start      from the base")
    if state.step >= state.total_steps:
        print(f"Nothing to do: {state.step:,} of {state.total_steps:,} steps are done.")
    sys.stdout.flush()


def open_run(args, report, locks):
    """Return the State of a run from the base; all ranks have the same inputs and see its folder, locked by rank 0."""
    state = initial_state(args, report, dist.get_world_size())
    versions = {name: state.versions[name] for name in ("torch", "code")}
    distributed.check_same(args | state.fingerprints | versions)
    distributed.on_rank0(lambda: claim(args, state, locks))
    distributed.check_shared(args["CHECKPOINT_DIR"], system.LOCK)
    return state


def plan_run(args, config, sizes, lengths, device, mesh):
    """Return rank 0's memory_plan.plan_run, made for the poorest rank's memory, on every rank."""
    world_size = dist.get_world_size()
    topology = memory_plan.Topology(world_size, world_size // mesh.size(-1), device.type)
    limit = min(distributed.on_every_rank(hardware.memory(device))) - args["RESERVED_GIB"] * memory_plan.GIB
    return distributed.on_rank0(lambda: memory_plan.plan_run(args, config, sizes, lengths, topology, limit))


def run(args, device, mesh, locks):
    """Prepare model, data and state on this rank, continue from a checkpoint if there is one, and train."""
    distributed.heartbeat("loading", patient=True)
    if args["DETERMINISTIC"] == "on":
        hardware.compute_deterministically()
    folder = args["CHECKPOINT_DIR"]
    report = dataloader.read_report(args["DATA_DIR"])
    state = open_run(args, report, locks)
    data, config, lengths = load_inputs(args)
    distributed.on_each_machine(lambda: dataloader.check_digests(data, report, args["DATA_DIR"]))
    sizes = memory_plan.shapes(config)
    plan, survey, state.total_steps, lines = plan_run(args, config, sizes, lengths, device, mesh)
    state.plan = asdict(plan)

    compile_blocks, reason = sft_model.choose_compile(args["COMPILE"], device.type)
    lines += f"\n{'compile':<10} {reason}"
    model, optimizer = build(args, mesh, plan, compile_blocks)
    checkpoint = distributed.on_rank0(lambda: checkpoints.choose(folder, args["RESUME"]))
    changed = resume(checkpoint, model, optimizer, state) if checkpoint else []
    distributed.on_rank0(lambda: export_hf.dry_run(args["RESIZED_MODEL"]))
    distributed.check_same({"step": state.step, "training tokens": int(lengths.sum())})
    distributed.on_rank0(lambda: announce(args, state, report, lines, sizes.all, changed))
    if state.step >= state.total_steps:
        return

    distributed.heartbeat("the largest micro-batch, tried first", patient=True)  # torch.compile may take minutes
    equal_counts = plan.communicate == "per_micro_batch"  # there each forward gathers, which is collective
    loader = dataloader.PackedLoader(data["train"], sizes, plan.tokens, device, equal_counts)
    largest = dataloader.concatenate(list(loader.rows(survey.largest).values())).to(device)
    rehearse(model, optimizer, largest, plan.communicate)
    peak = dist.get_world_size() * hardware.peak_flops(device, getattr(torch, args["COMPUTE_DTYPE"]))
    log = training_log.Log(folder, state.step, state.total_steps, device, peak)
    validator = None
    if args["VALIDATE_EVERY"]:
        held_out = dataloader.PackedLoader(data["validation"], sizes, plan.tokens, device, equal_counts)
        validator = validation.Validator(model, data["validation"], held_out, log, args)
    stop = distributed.Stop(folder)
    tensors = checkpoint_tensors(model, optimizer)
    with checkpoints.Saver(args, plan.staging > 0, tensors, device, log, state.step) as saver:
        stopped = train(model, optimizer, loader, validator, saver, args, state, log, stop)
    if stopped:
        distributed.on_rank0(lambda: distributed.clear_stop(folder))
        log.say(f"Stopped after step {state.step}, as requested. To continue, in {Path.cwd()}:")
        log.say(distributed.resume_command())
    log.close()


def main(args):
    """Train as the settings `args` (dict) say, or print the plan of it."""
    validate_settings(args)
    transformers.utils.logging.disable_progress_bar()
    if args["PLAN_ONLY"]:
        print_plan(args)
        return
    device, mesh = distributed.join(args["DEVICE"])
    if device.type == "cuda" and args["COMPUTE_DTYPE"] == "float32":
        raise SystemExit("COMPUTE_DTYPE is float32; flash attention on a GPU needs bfloat16.")
    with contextlib.ExitStack() as locks, distributed.Watchdog(args["COLLECTIVE_TIMEOUT_SECONDS"]) as watchdog:
        try:
            run(args, device, mesh, locks)
        except RuntimeError as error:
            if not distributed.memory_error(error):
                raise
            reason = ". ".join(str(error).splitlines()[0].split(". ")[:3])  # torch adds advice on its own settings
            watchdog.end_all(
                f"Rank {dist.get_rank()} ran out of memory in {distributed.Progress.text()!r} ({reason}). Raise "
                "RESERVED_GIB, so that a smaller plan is chosen, or lower TOKENS_PER_MICRO_BATCH; then run the same "
                "command again: it continues from the latest checkpoint."
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(settings.from_flags(globals()))
