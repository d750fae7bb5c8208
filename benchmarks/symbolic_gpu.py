"""What two RTX 4090s would do with Genesis 1B, counted without a GPU: roofline, bounds of MFU, memory, waits.

    python benchmarks/symbolic_gpu.py            Genesis's full shape, the plan's own choice; needs g++
    python benchmarks/symbolic_gpu.py --quick    a tiny shape, to see that the benchmark itself runs

The trainer's own code (join, plan, load, shard, rehearse, steps over real layouts, validate, answer, the checkpoint's
tensors) runs on fake tensors on "cuda:0" with a fake process group: fake_cuda.py. What is counted, not measured:
- roofline: of each kernel the larger of operations / 165.2 TFLOP/s and bytes / 1,008 GB/s, summed over parts of the
  model, for micro-batches that are full and hold 12,288 tokens on a card together;
- mfu_bound_L: the useful operations of STEPS real steps / (the time that a timeline gives for them x peak), with every
  kernel at its roofline and L GB/s between the cards. The timeline has both ranks' streams, events and collectives, so
  it knows what overlaps. Kernels reach 80 to 90% of a roofline, so a run stays below the bound;
- alive and reserved: the most bytes in tensors, and in the simulated caching allocator, over rehearsal and steps.

torch.compile can't be traced without a device. SwiGLU, its gradient and the rotary embedding count as the one kernel
that it makes of each (`compiled`); all else is counted as eager code runs it, so compiled code is better than that.
It cannot show: numbers, NCCL, a kernel's own checks, launch gaps.
"""

import collections
import contextlib
import json
import os
import sys
import time
from dataclasses import asdict

import common
import fake_cuda
import numpy as np
import torch
import transformers
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.models.llama import modeling_llama

from sft import settings
from sft.training import dataloader, distributed, fused, memory_plan, validation
from sft.training import model as sft_model

# ---- Run ----
STEPS = 4  # optimizer steps over real layouts, on both ranks
COMMUNICATE = "auto"  # "per_step" | "per_micro_batch" | "auto": the plan's choice
ACTIVATION_CHECKPOINTING = "auto"  # "on" | "off" | "auto"
TOKENS_PER_MICRO_BATCH = 0  # tokens; 0 = the plan's choice
COMPILED = True  # count what torch.compile fuses of SwiGLU and the rotary embedding as one kernel each
QUICK = False  # a tiny shape
RECORD = ""  # file for the record as JSON; "" = none

# ==== The trainer's own code on the fake card ====

LINKS = (6, 10, 16, 22)  # GB/s between the cards, each way
CARD_TOKENS = 12_288  # of the roofline
DOCUMENT_TOKENS = 1536  # at most, of each document there
SEQUENCES_PER_STEP = 32


def kinds(config):
    """Return the function that names the part of the model a kernel belongs to, from its largest tensor's shape."""
    head_dim = config.hidden_size // config.num_attention_heads

    def kind_of(name, largest, multiplies):
        shape, fp32 = tuple(largest.shape), largest.dtype == torch.float32
        if "varlen" in name:
            return "attention"
        if name == "rotary":
            return "rotary, views of heads"
        if name.startswith(("_fused_adam", "_foreach_norm", "_foreach_mul")):
            return "AdamW, norm and clip"
        if name in ("all_gather_copy_in", "split_with_sizes_copy", "chunk_cat") or name.startswith("_foreach_copy"):
            return "FSDP's copies"
        if len(shape) == 2 and 0 <= shape[-1] - config.vocab_size < 8:  # the logits' rows are padded
            return "loss"
        if multiplies:
            return "matmul"
        if "rms_norm" in name:
            return "RMSNorm"
        if shape[-1:] == (config.intermediate_size,) and len(shape) == 3:
            return "SwiGLU"
        if (len(shape) >= 3 and shape[-1] in (head_dim, head_dim // 2)) or shape[-1:] == (head_dim // 2,):
            return "rotary, views of heads"
        if len(shape) == 3 and shape[-1] == config.hidden_size:
            return "RMSNorm in float32" if fp32 else "norm and residual in bfloat16"
        if len(shape) <= 2 and fp32:
            return "gradients added up in float32"
        return "else"

    return kind_of


def compiled(run):
    """Put one operator in the place of each piece that torch.compile makes one kernel of; they have shapes only.

    run: FakeRun, built: fused.fuse has to see the real pieces.
    """

    def operator(name, shapes):
        """Register `name` with the type hints of the function `shapes`, which returns empty results."""
        one = torch.library.custom_op(f"compiled::{name}", shapes, mutates_args=())
        one.register_fake(shapes)
        return one

    def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(gate)

    def swiglu_backward(
        grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)

    def rotary(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(heads)

    fused.swiglu = operator("swiglu", swiglu)
    fused.swiglu_backward = operator("swiglu_backward", swiglu_backward)
    one = operator("rotary", rotary)
    one.register_autograd(  # the gradient turns the other way
        lambda ctx, grad: (one(grad, *ctx.saved_tensors), None, None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
    )
    modeling_llama.apply_rotary_pos_emb = lambda query, key, cos, sin: (one(query, cos, sin), one(key, cos, sin))


def real_fuse(model, fuse=fused.fuse):
    """fused.fuse, which looks at what modules compute, with real tensors."""
    with unset_fake_temporarily():
        fuse(model)


def real_mesh(*args, **kwargs):
    """init_device_mesh, whose table of ranks has to be a real tensor."""
    with unset_fake_temporarily():
        return torch.distributed.init_device_mesh(*args, **kwargs)


@contextlib.contextmanager
def fake_ranks(ranks, machines=1):
    """Make this process rank 0 of `ranks` on `machines`: fake collectives, every rank answers what this one does."""
    fake_cuda.install()
    real_init, real_answers = torch.distributed.init_process_group, distributed.on_every_rank
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(ranks // machines), "GROUP_WORLD_SIZE": str(machines)}
    torch.distributed.init_process_group = fake_cuda.fake_process_group(real_init, ranks)
    distributed.on_every_rank = lambda value: [value] * ranks
    distributed.init_device_mesh = real_mesh
    fused.fuse = real_fuse
    distributed.rendezvous = dict
    distributed.end_with_launcher = lambda: None
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch.distributed.init_process_group, distributed.on_every_rank = real_init, real_answers


def note_phases(tracker):
    """Take the trainer's own reports of progress as the tracker's phases; the innermost is what counts."""
    real = distributed.heartbeat

    def heartbeat(phase=None, part="", patient=False):
        tracker.phase = part or phase
        real(phase, part, patient)

    distributed.heartbeat = heartbeat


def dataset(lengths, vocabulary):
    """Return a `datasets` split of random sequences, in memory."""
    import datasets

    rows = common.random_rows(lengths, vocabulary)
    columns = {"input_ids": datasets.Value("uint16"), "assistant_masks": datasets.Value("bool")}
    features = {name: datasets.List(kind) for name, kind in columns.items()} | {"source": datasets.Value("string")}
    parts = {"input_ids": [ids for ids, _ in rows], "assistant_masks": [mask for _, mask in rows]}
    parts["source"] = ["x"] * len(rows)
    return datasets.Dataset.from_dict(parts, features=datasets.Features(features))


class FakeRun:
    """The trainer on the fake card. Make it inside `fake_ranks`; `with run:` makes all tensors fake and counts."""

    def __init__(self, config, lengths, ranks, **chosen):
        """lengths: int64 of the training sequences; chosen: settings of sft_v1.py over its own."""
        import sft_v1

        self.trainer, self.config, self.ranks = sft_v1, config, ranks
        defaults = {name: getattr(sft_v1, name) for _, name, _ in settings.constants(sft_v1.__file__)}
        self.args = (
            defaults
            | {"SEED": common.SEED, "WARMUP_STEPS": 0, "COMPILE": "off", "RESIZED_MODEL": "random weights"}
            | chosen
        )
        self.tracker, self.mode = fake_cuda.Tracker(kinds(config)), fake_cuda.FakeTensors(allow_non_fake_inputs=True)
        with self:
            self.device, self.mesh = distributed.join("cuda")
        self.sizes = memory_plan.shapes(config)
        planned = sft_v1.plan_run(self.args, config, self.sizes, lengths, self.device, self.mesh)
        self.plan, self.survey, _, self.lines = planned
        self.data = dataset(lengths, config.vocab_size)
        self.loader = self.load(self.data)
        note_phases(self.tracker)

    def __enter__(self):
        self.mode.__enter__()
        self.tracker.__enter__()
        return self

    def __exit__(self, *exc):
        self.tracker.__exit__(*exc)
        self.mode.__exit__(*exc)

    def load(self, data):
        """Return the loader of a `datasets` split, as sft_v1.run makes it."""
        equal_counts = self.plan.communicate == "per_micro_batch"
        return dataloader.PackedLoader(data, self.sizes, self.plan.tokens, self.device, equal_counts)

    def build(self):
        """Load, shard, make the optimizer."""
        self.tracker.phase = "load and shard"
        sft_model.load_model = self.load_model
        self.model, self.optimizer = self.trainer.build(self.args, self.mesh, self.plan, compile_blocks=False)
        self.model.register_forward_pre_hook(self.note_documents)

    def load_model(self, folder):
        """Instead of model.load_model: there are no weights to read."""
        causal_lm = transformers.AutoModelForCausalLM.from_config(
            self.config, dtype=torch.float32, attn_implementation="packed"
        )
        return sft_model.SFTModel(causal_lm).train()

    def note_documents(self, module, inputs):
        self.tracker.squares = sum(n * n for n in inputs[0].documents.lengths)

    def rehearse(self):
        self.tracker.phase = "rehearse"
        largest = dataloader.concatenate(list(self.loader.rows(self.survey.largest).values())).to(self.device)
        self.trainer.rehearse(self.model, self.optimizer, largest, self.plan.communicate)

    def step(self, micro_batches, trainable_tokens):
        """Run one optimizer step; return its events for the timeline."""
        self.tracker.forget()
        self.trainer.train_step(
            self.model, self.optimizer, micro_batches, trainable_tokens, self.plan.communicate,
            self.args["MAX_GRAD_NORM"],
        )  # fmt: skip
        return self.tracker.trace.events

    def micro_batches(self, indices, rank):
        """Return the micro-batches of one rank in the step of the sequences `indices`, as the loader makes them."""
        with as_rank(rank):
            return self.loader.receive(Done(self.loader.build(indices)))

    def full(self):
        """Return micro-batches that are full, the last one first, and hold CARD_TOKENS; all tokens are trained."""
        micro_batches, left = [], CARD_TOKENS
        while left:
            tokens = min(self.plan.tokens, left)
            documents = np.split(np.zeros(tokens, np.int64), range(DOCUMENT_TOKENS, tokens, DOCUMENT_TOKENS))
            rows = [(ids, np.ones(len(ids), bool)) for ids in documents]
            micro_batches.insert(0, dataloader.concatenate(rows).pin_memory().to(self.device))
            left -= tokens
        return micro_batches

    def validate(self):
        self.tracker.phase = "validate"
        held_out = self.load(self.data.select(range(16)))
        return validation.validation_loss(self.model, held_out, ["x"] * 8 + ["y"] * 8, SEQUENCES_PER_STEP)

    def answer(self):
        self.tracker.phase = "answer"
        return validation.answer(self.model, [[5, 6, 7], [8, 9]], 2, 4, self.device)


class Done:
    """A future that is done."""

    def __init__(self, value):
        self.value = value

    def result(self):
        return self.value


@contextlib.contextmanager
def as_rank(rank):
    """Let the loader lay out for another rank than 0."""
    real = torch.distributed.get_rank
    torch.distributed.get_rank = lambda *args: rank
    try:
        yield
    finally:
        torch.distributed.get_rank = real


# ==== What is counted ====


def kernels(events):
    """Return {part of the model: [calls, operations, bytes, seconds at the roofline]} of a step's events."""
    parts = collections.defaultdict(lambda: [0, 0.0, 0.0, 0.0])
    for _, what, _, detail in events:
        if what == "run":
            for n, value in enumerate((1, detail.flops, detail.bytes, detail.seconds)):
                parts[detail.kind][n] += value
    return dict(parts)


def traffic(events):
    """Return [[phase, collective, bytes that this rank sends]] of a step's events."""
    sent = collections.Counter()
    for phase, what, _, detail in events:
        if what == "send":
            sent[phase, detail.name] += detail.bytes
    return [[phase, name, size] for (phase, name), size in sent.items()]


def count_step(run, step, traced_ranks, lengths):
    """Run optimizer step `step` (from 0) as each of `traced_ranks`; return what was counted (dict)."""
    indices = dataloader.sequences_of_step(len(lengths), common.SEED, step, SEQUENCES_PER_STEP)
    record = {"micro_batches": [], "waits": [], "sent": [], "alive": 0, "alive_by_phase": {}, "left_behind": []}
    traces = []
    for rank in traced_ranks:
        batch = run.micro_batches(indices, rank)
        before = run.tracker.alive
        traces.append(run.step(batch.micro_batches, batch.stats["trainable_tokens"]))
        record["micro_batches"].append([micro_batch.tokens for micro_batch in batch.micro_batches])
        record["waits"].append(list(run.tracker.waits))
        record["sent"].append(traffic(traces[-1]))
        record["alive"] = max(record["alive"], run.tracker.peak)
        record["alive_by_phase"] |= run.tracker.phase_peaks
        record["left_behind"].append(run.tracker.alive - before)
    record |= {"tokens": batch.stats["tokens"], "flops": batch.stats["flops"]}
    if len(traced_ranks) == run.ranks:
        record["seconds"] = {link: fake_cuda.timeline(traces, link * 1e9) for link in LINKS}
    return record


def count_rest(run):
    """Validate, answer, gather what a checkpoint holds; return what came out (dict)."""
    losses, answers = run.validate(), run.answer()
    state = run.trainer.checkpoint_tensors(run.model, run.optimizer)
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in state.values()]
    return {
        "validation": losses,
        "answers": answers,
        "state_dtypes": sorted({str(tensor.dtype) for tensor in state.values()}),
        "state_devices": sorted({str(tensor.device) for tensor in state.values()}),
        "state_bytes": sum(tensor.nbytes for tensor in local),
    }


def count(config, steps, traced_ranks, ranks=2, machines=1, prepare=None, **chosen):
    """Run the trainer on the fake card through `steps` optimizer steps and all around them; return the record (dict).

    traced_ranks: the ranks whose share of each step is run; all of them for a timeline. prepare: called with the
    FakeRun once it is built. chosen: settings of sft_v1.py.
    """
    lengths = common.genesis_lengths(40 * SEQUENCES_PER_STEP, cut=config.max_position_embeddings)
    with fake_ranks(ranks, machines), FakeRun(config, lengths, ranks, **chosen) as run:
        print(run.lines, flush=True)
        run.build()
        if prepare:
            prepare(run)
        run.rehearse()
        record = {"plan": asdict(run.plan) | {"total": run.plan.total}, "alive": run.tracker.peak}
        record["steps"] = [count_step(run, step, traced_ranks, lengths) for step in range(steps)]
        record["alive"] = max(record["alive"], *(step["alive"] for step in record["steps"]))
        pools = fake_cuda.reserved(run.tracker.trace.memory)
        record["reserved"] = {" ".join(name): size for name, size in pools.items()}
        topology = memory_plan.Topology(ranks, machines, "cuda")
        for step in record["steps"]:
            step["sent_planned"] = memory_plan.sent_per_step(
                run.sizes, topology, torch.bfloat16, run.plan.communicate, len(step["micro_batches"][0])
            )
        if len(traced_ranks) == ranks:
            record["parts"] = kernels(run.step(run.full(), CARD_TOKENS))
        record |= count_rest(run)
        record["races"] = sorted(run.tracker.races)
    return record


# ==== Report ====


def report(record):
    """Print the parts and the RESULT line of a `count`."""
    for number, step in enumerate(record["steps"]):
        times = ", ".join(f"{seconds * 1e3:.0f} ms at {link}" for link, seconds in step["seconds"].items())
        print(f"step {number}: tokens {step['micro_batches']}, {times} GB/s")
    print("\nroofline of full micro-batches, 12,288 tokens on a card")
    print(f"  {'part':44} {'calls':>6} {'TFLOP':>7} {'GB':>7} {'ms':>7}")
    for kind, (calls, flops, moved, seconds) in sorted(record["parts"].items(), key=lambda item: -item[1][3]):
        print(f"  {kind:44} {calls:6} {flops / 1e12:7.2f} {moved / 1e9:7.1f} {seconds * 1e3:7.1f}")
    print("\nreserved by stream and pool, GiB:")
    for name, size in record["reserved"].items():
        print(f"  {name:20} {size / fake_cuda.GIB:6.2f}")
    flops = sum(step["flops"] for step in record["steps"])
    tokens = sum(step["tokens"] for step in record["steps"])
    print(f"\n{tokens / len(record['steps']):,.0f} tokens a step")
    bounds = {}
    for link in LINKS:
        seconds = sum(step["seconds"][link] for step in record["steps"])
        bounds[f"mfu_bound_{link}"] = round(flops / seconds / (2 * fake_cuda.PEAK_FLOPS), 3)
        print(
            f"  {link:2} GB/s: {seconds / len(record['steps']) * 1e3:.0f} ms, at most {tokens / seconds:,.0f} tokens/s"
        )
    common.result(
        roofline_ms=round(sum(values[3] for values in record["parts"].values()) * 1e3),
        **bounds,
        alive_gib=round(record["alive"] / fake_cuda.GIB, 2),
        reserved_gib=round(sum(record["reserved"].values()) / fake_cuda.GIB, 2),
        host_waits=max(len(waits) for step in record["steps"] for waits in step["waits"]),
    )


def main(args):
    """Count and print, as the settings `args` say."""
    began = time.perf_counter()
    common.machine()
    shape = common.TINY if args["QUICK"] else common.GENESIS
    names = ("COMMUNICATE", "ACTIVATION_CHECKPOINTING", "TOKENS_PER_MICRO_BATCH")
    chosen = {name: args[name] for name in names}
    chosen["prepare"] = compiled if args["COMPILED"] else None
    record = count(transformers.LlamaConfig(**shape), args["STEPS"], traced_ranks=(0, 1), **chosen)
    if args["RECORD"]:
        with open(args["RECORD"], "w") as file:
            json.dump(record, file)
    report(record)
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main(settings.from_flags(globals()))
