"""The record of a run: metrics.jsonl, skipped steps, loss spikes, answers, TensorBoard, loss curve and progress bar.

Used by sft_v1.py.
"""

import io
import itertools
import json
import math
import statistics
import sys
from collections import deque
from pathlib import Path

import torch.distributed as dist
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sft import system
from sft.training import hardware

RECORDS = ("metrics", "skipped", "spikes", "answers")
SPIKE_SIGMA = 6.0  # standard deviations above the mean of the last losses from which a loss is a spike
SPIKE_WINDOW = 200  # losses that a spike is compared with
SPIKE_LEAST = 20  # fewer losses say nothing yet
MAX_SKIPPED_IN_A_ROW = 10  # steps without a finite loss and gradient after which the run stops
RISES = 3  # validations in a row with a higher loss than the one before, from which the loss is said to rise
BAR = {"loss": ".4f", "lr": ".2e", "grad_norm": ".2f", "tokens_per_second": ",.0f", "mfu": ".0%"}  # shown at the bar


class Log:
    """Writes the record on rank 0 and does nothing on the other ranks.

    metrics.jsonl has a line for each step; skipped.jsonl the steps that updated nothing and spikes.jsonl those with an
    outlying loss, both with their sequences (indices of the training split); answers.jsonl the answers to the prompts.
    A continued run drops the lines after the step it continues from, in all of them.
    """

    def __init__(self, folder, step, total_steps, device, peak_flops):
        """step: the one that the run continues from, 0 at the start; peak_flops: per second, of all ranks."""
        self.path = Path(folder) / "metrics.jsonl"
        self.device = device
        self.peak_flops = peak_flops
        self.warning = ""
        self.skipped = 0  # steps in a row
        self.retries = None  # of allocations, up to the first step; that one fills the allocator's pools
        self.is_rank0 = dist.get_rank() == 0
        if not self.is_rank0:
            return
        for name in RECORDS:
            self.drop_after(name, step)
        lines = system.read_lines(self.path)
        losses = [line["loss"] for line in lines if line.get("loss") is not None]
        self.losses = deque(losses, maxlen=SPIKE_WINDOW)
        self.validated = [line for line in lines if line.get("validation_loss") is not None]
        self.board = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=step + 1)
        self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    # ---- Files ----

    def file(self, name):
        return self.path.with_name(f"{name}.jsonl")

    def drop_after(self, name, step):
        """Write a record again without the lines after `step`; step 0 keeps none."""
        kept = [line for line in system.read_lines(self.file(name)) if line["step"] <= step] if step else []
        if kept or self.file(name).exists():
            system.write_whole(self.file(name), "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, name, line):
        """Add `line` to a record; a number that is not finite becomes null. Returns the line as written."""
        line = dict(line)
        for key, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[key] = None
        try:
            with self.file(name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk costs a line of the record, not the run
            self.say(f"WARNING: step {line['step']} is missing in {self.file(name)}: {error}")
        return line

    def sync(self):
        """Put the record on the disk, so that no checkpoint is newer than its metrics after a power cut."""
        if not self.is_rank0:
            return
        for name in RECORDS:
            try:
                if self.file(name).exists():
                    system.durable(self.file(name))
            except OSError as error:
                self.say(f"WARNING: {self.file(name)} is not on the disk: {error}")

    # ---- A step ----

    def metrics(self, step, loss, grad_norm, lr, batch, seconds):
        """Return the line (dict) of an optimizer step that took `seconds`. batch: dataloader.StepBatch."""
        stats = batch.stats
        return {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": stats["tokens"],
            "trainable_tokens": stats["trainable_tokens"],
            "idle_share": stats["idle_share"],
            "data_seconds": stats["data_seconds"],
            "micro_batches": len(batch.micro_batches),
            "step_seconds": round(seconds, 4),
            "tokens_per_second": round(stats["tokens"] / seconds, 1),
            "trainable_tokens_per_second": round(stats["trainable_tokens"] / seconds, 1),
            "mfu": round(stats["flops"] / seconds / self.peak_flops, 4),
        } | hardware.memory_use(self.device)

    def write(self, line):
        """Record `line`: {"step": int, name: number, ...}."""
        if not self.is_rank0:
            return
        if self.warning:
            line = line | {"warning": self.warning}
        line = self.append("metrics", line)
        if line.get("validation_loss") is not None:
            self.check_rising(line)
        try:
            for name, value in line.items():
                if name not in ("step", "warning") and value is not None:
                    self.board.add_scalar(name, value, line["step"])
        except OSError as error:
            self.say(f"WARNING: step {line['step']} is missing in TensorBoard: {error}")

    def check_skipped(self, line, indices, updated):
        """Record and print a step that updated nothing, with its sequences. Raises: SystemExit after too many in a row.

        updated: whether the step had a finite loss and gradient; all ranks know.
        """
        self.skipped = 0 if updated else self.skipped + 1
        if not updated and self.is_rank0:
            self.append("skipped", self.summary(line, indices))
            self.say(
                f"WARNING: {self.sentence(line)}; the step was skipped, nothing was updated. Its sequences: "
                "skipped.jsonl."
            )
        if self.skipped == MAX_SKIPPED_IN_A_ROW:
            raise SystemExit(
                f"{self.skipped} steps in a row had no finite loss and gradient, up to step {line['step']}. The "
                "checkpoints before them stay. Look at the resized model, COMPUTE_DTYPE and LEARNING_RATE."
            )

    def check_spike(self, line, indices):
        """Record and print a step whose loss is SPIKE_SIGMA deviations above the last ones, with its sequences."""
        if not self.is_rank0 or not math.isfinite(line["loss"]):
            return
        if len(self.losses) >= SPIKE_LEAST:
            mean, deviation = statistics.fmean(self.losses), statistics.stdev(self.losses)
            if line["loss"] > mean + SPIKE_SIGMA * deviation:
                self.append("spikes", self.summary(line, indices) | {"mean": mean, "deviation": deviation})
                self.say(
                    f"WARNING: {self.sentence(line)}; the last losses were {mean:.4f} +- {deviation:.4f}: see "
                    "spikes.jsonl."
                )
        self.losses.append(line["loss"])

    def check_rising(self, line):
        """Print, once for each rise, that the validation loss has risen RISES times in a row up to `line`."""
        self.validated.append(line)
        losses = [line["validation_loss"] for line in self.validated]
        rising = [later > earlier for earlier, later in itertools.pairwise(losses)]
        if rising[-RISES:] == [True] * RISES and rising[-RISES - 1 : -RISES] != [True]:
            first = self.validated[-RISES - 1]
            self.say(
                f"WARNING: the validation loss has risen {RISES} times in a row, from {losses[-RISES - 1]:.4f} at step "
                f"{first['step']} to {losses[-1]:.4f} at step {line['step']}. The best checkpoint is kept: stop here "
                "and export it with --checkpoint best; another time, fewer EPOCHS or a lower LEARNING_RATE."
            )

    def check_memory(self, line):
        """Warn once, on any rank, when torch's allocator had to retry after the run's first step."""
        if self.retries is None:
            self.retries = line["allocation_retries"]
        elif line["allocation_retries"] > self.retries:
            self.retries = math.inf
            warning = (
                f"WARNING: step {line['step']}: the GPU of rank {dist.get_rank()} has too little memory left: torch "
                f"gave cached memory back to allocate more ({line['allocation_retries']} times so far), which makes "
                "steps slow. Stop, then run the same command with a higher --reserved-gib."
            )
            if self.is_rank0:
                self.say(warning)
            else:
                print(warning, file=sys.stderr, flush=True)

    @staticmethod
    def summary(line, indices):
        return {
            "step": line["step"],
            "loss": line["loss"],
            "grad_norm": line["grad_norm"],
            "sequences": [int(i) for i in indices],
        }

    @staticmethod
    def sentence(line):
        return f"step {line['step']}: loss {line['loss']:.4f}, gradient norm {line['grad_norm']:.4f}"

    def answers(self, step, prompts, texts):
        """Record and print what the model answers to each prompt at `step`."""
        if not self.is_rank0:
            return
        answers = dict(zip(prompts, texts, strict=True))
        self.append("answers", {"step": step, "answers": answers})
        for prompt, text in answers.items():
            self.say(f"    {prompt} -> {text!r}")
        try:
            self.board.add_text("answers", "\n\n".join(f"{prompt}: {text}" for prompt, text in answers.items()), step)
        except OSError as error:
            self.say(f"WARNING: the answers of step {step} are missing in TensorBoard: {error}")

    # ---- Terminal ----

    def warn(self, text):
        """Put `text` on every line from here on; "" ends it."""
        self.warning = text

    def advance(self, line):
        """Move the bar by one step and show `line`'s loss, learning rate, gradient norm and speed."""
        if not self.is_rank0:
            return
        shown = {name: format(line[name], form) for name, form in BAR.items()}
        if self.warning:
            shown["WARNING"] = self.warning
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def say(self, text):
        """Print `text` above the bar."""
        if self.is_rank0:
            self.bar.write(text)

    def close(self):
        """Finish the bar and draw loss.png from metrics.jsonl."""
        if not self.is_rank0:
            return
        self.bar.close()
        self.board.close()
        lines = system.read_lines(self.path)
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for name, style in (("loss", "-"), ("validation_loss", "o-")):
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "), linewidth=1, markersize=4)
        axes.set(xlabel="optimizer step", ylabel="cross-entropy per trainable token (nats)")
        axes.legend()
        picture = io.BytesIO()
        figure.savefig(picture, dpi=120)
        try:
            system.write_whole(self.path.with_name("loss.png"), picture.getvalue())
        except OSError as error:
            print(f"WARNING: loss.png could not be drawn: {error}")
