"""Training by a peer, timed; benchmarks/train.py, golden.py and gpu.py run it, for TRL in .venv-benchmarks.

    --recipe trl      TRL's SFTTrainer at MICRO_BATCH x ACCUMULATION
    --recipe padded   plain PyTorch and transformers: sequences padded to PAD_TO, logits and loss at every position

Both read the split "ordered" of a prepared folder from its first row on and update after MICRO_BATCH x ACCUMULATION
sequences, summed over the processes: under torchrun TRL trains on several. float32 weights and moments, bfloat16
autocast, AdamW as in sft_v1.py, activation checkpointing only with --checkpointing. Prints one line of JSON:
step_seconds, losses (per trainable token), peak_gib.
"""

import json
import os
import resource
import tempfile
import time

import common
import datasets
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from sft import settings
from sft.training.schedule import Schedule

# ---- Peer ----
RECIPE = "trl"  # "trl" | "padded"
DATA_DIR = ""  # folder with a split "ordered", from common.write_data
RESIZED_MODEL = ""  # HF folder
# ---- Steps ----
STEPS = 2  # optimizer steps
MAX_SECONDS = 0.0  # TRL ends after the step that reaches them, counted from its first step; 0 = after STEPS
MICRO_BATCH = 2  # sequences per forward and process
ACCUMULATION = 16  # micro-batches per step and process
LEARNING_RATE = common.TRAINER["--learning-rate"]  # peak
MIN_LEARNING_RATE = 0.0  # of TRL: end of the cosine as in sft_v1.py; 0 = the rate stays at the peak
WARMUP_STEPS = 0  # of TRL: optimizer steps to the peak, as in sft_v1.py
WEIGHT_DECAY = 0.01  # on matrices and embeddings
PAD_TO = 2048  # tokens to which the recipe "padded" pads
SHORT_CUT = 0  # tokens to which it pads a micro-batch that has no longer sequence
PADDING_FREE = False  # TRL's option of that name
CHECKPOINTING = False  # recompute each block in the backward
MODEL_DTYPE = "float32"  # of weights and moments: "float32" | "bfloat16"
COMPUTE_DTYPE = "bfloat16"  # of TRL's forward and backward: "bfloat16", by autocast | "float32"
DEVICE = "cpu"  # "cpu" | "cuda"
# ---- Snapshots, of TRL ----
OUTPUT = ""  # folder of the weights
SAVE_EVERY = 0  # optimizer steps between two; with MAX_SECONDS also after the last; 0 = none


# ==== TRL ====


def train_trl(model, rows):
    """Return (seconds of each step, its losses) of SFTTrainer; the rest of its settings is TRL's default."""
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    schedule = Schedule(STEPS, LEARNING_RATE, MIN_LEARNING_RATE or LEARNING_RATE, WARMUP_STEPS)

    class Clock(TrainerCallback):
        ends = ()

        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(state.global_step)

        def on_train_begin(self, *args, **kwargs):
            self.ends = [time.perf_counter()]

        def on_step_end(self, args, state, control, **kwargs):
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
            if MAX_SECONDS and self.ends[-1] - self.ends[0] >= MAX_SECONDS:
                control.should_training_stop = True
                control.should_save = SAVE_EVERY > 0

    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            output_dir=OUTPUT or scratch,
            max_length=None if PADDING_FREE else PAD_TO,  # our sequences are cut already
            max_steps=STEPS,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            padding_free=PADDING_FREE,
            gradient_checkpointing=CHECKPOINTING,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",  # Clock sets each step's rate: TRL's warm-up would begin at 0
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=WEIGHT_DECAY,
            train_sampling_strategy="sequential",
            bf16=(MODEL_DTYPE, COMPUTE_DTYPE) == ("float32", "bfloat16"),
            use_cpu=DEVICE == "cpu",
            ddp_backend="gloo" if DEVICE == "cpu" and "WORLD_SIZE" in os.environ else None,
            logging_steps=1,
            save_strategy="steps" if SAVE_EVERY else "no",
            save_steps=SAVE_EVERY or 1,
            save_only_model=True,
            report_to="none",
            disable_tqdm=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(f"{DATA_DIR}/tokenizer")
        trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
        trainer.add_callback(clock := Clock())
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return [end - begin for begin, end in zip(clock.ends, clock.ends[1:], strict=False)], losses


# ==== The padded recipe ====


def padded(rows, length):
    """Return (ids, labels, attention mask), int64 [sequences, length], of rows with input_ids and assistant_masks."""
    ids, labels, attended = (torch.full((len(rows), length), fill) for fill in (0, -100, 0))
    for line, row in enumerate(rows):
        tokens, mask = torch.tensor(row["input_ids"]), torch.tensor(row["assistant_masks"])
        ids[line, : len(tokens)], attended[line, : len(tokens)] = tokens, 1
        labels[line, : len(tokens)] = tokens.where(mask, -100)
    return ids, labels, attended


def train_padded(model, rows):
    """Return (seconds of each step, its losses) of the plain loop."""
    if CHECKPOINTING:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train().to(DEVICE)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
    seconds, losses, size = [], [], MICRO_BATCH * ACCUMULATION
    for step in range(STEPS):
        begin = time.perf_counter()
        part = [rows[i] for i in range(step * size, (step + 1) * size)]
        trained = sum(sum(row["assistant_masks"][1:]) for row in part)
        total = torch.zeros((), device=DEVICE)
        for start in range(0, size, MICRO_BATCH):
            together = part[start : start + MICRO_BATCH]
            short = max(len(row["input_ids"]) for row in together) <= SHORT_CUT
            inputs = padded(together, SHORT_CUT if short else PAD_TO)
            ids, labels, attended = (tensor.to(DEVICE) for tensor in inputs)
            with torch.autocast(DEVICE, torch.bfloat16):
                logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits
            flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
            loss = F.cross_entropy(flat, labels[:, 1:].reshape(-1), reduction="sum") / trained
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total.item())
        seconds.append(time.perf_counter() - begin)
    return seconds, losses


def main(args):
    """Train STEPS steps and print the figures."""
    datasets.disable_progress_bars()
    rows = datasets.load_from_disk(DATA_DIR)["ordered"].select_columns(["input_ids", "assistant_masks"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(RESIZED_MODEL, dtype=getattr(torch, MODEL_DTYPE))
    seconds, losses = {"trl": train_trl, "padded": train_padded}[RECIPE](model, rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # all of the process, without a GPU
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated()
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"step_seconds": seconds, "losses": losses, "peak_gib": peak / 2**30}))


if __name__ == "__main__":
    main(settings.from_flags(globals()))
