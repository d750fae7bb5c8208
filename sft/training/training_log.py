"""The trainer's record: metrics.jsonl, skipped and outlying steps, TensorBoard, loss curve and progress bar.

Used by sft_v1.py.
"""

import json
import math
import statistics
from collections import deque
from pathlib import Path

import torch.distributed as dist
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sft import system

RECORDS = ("metrics", "skipped", "spikes", "answers")
SPIKE_WINDOW = 200  # losses that a spike is compared with
SPIKE_LEAST = 20  # fewer losses say nothing yet


class Log:
    """Writes metrics.jsonl, TensorBoard events, the loss curve and the progress bar, on rank 0; else nothing.

    Steps that were skipped stand in skipped.jsonl, those with an outlying loss in spikes.jsonl, with their sequences
    (indices of the training split); answers to the prompts in answers.jsonl. A continued run drops the lines after the
    step it continues from, in all of them.
    """

    def __init__(self, folder, step, total_steps):
        self.path = Path(folder) / "metrics.jsonl"
        self.on = dist.get_rank() == 0
        self.warning = ""
        if not self.on:
            return
        for name in RECORDS:
            kept = [line for line in self.read(name) if line["step"] <= step] if step else []
            if kept or self.file(name).exists():
                system.write_whole(self.file(name), "".join(json.dumps(line) + "\n" for line in kept))
        losses = [line["loss"] for line in self.read("metrics") if line.get("loss") is not None]
        self.losses = deque(losses, maxlen=SPIKE_WINDOW)
        self.board = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=step + 1)
        self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def file(self, name):
        return self.path.with_name(f"{name}.jsonl")

    def read(self, name):
        """Return the lines of a record as dicts; one cut off by a kill or a power cut is left out."""
        found = []
        if self.file(name).exists():
            for line in self.file(name).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
                try:
                    found += [json.loads(line)] if line.endswith("\n") else []
                except ValueError:  # zeros, where the power failed before the file was on the disk
                    continue
        return found

    def append(self, name, line):
        """Add `line` to a record; a number that is not finite becomes null. Returns the line as written."""
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            with self.file(name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk costs a line of the record, not the run
            self.say(f"WARNING: step {line['step']} is missing in {self.file(name)}: {error}")
        return line

    def write(self, line):
        """Record `line`: {"step": int, name: number, ...}."""
        if not self.on:
            return
        line = self.append("metrics", line | ({"warning": self.warning} if self.warning else {}))
        try:
            for name, value in line.items():
                if name not in ("step", "warning") and value is not None:
                    self.board.add_scalar(name, value, line["step"])
        except OSError as error:
            self.say(f"WARNING: step {line['step']} is missing in TensorBoard: {error}")

    def judge(self, line, indices, updated, sigma):
        """Record and tell a step that was not `updated`, or whose loss is `sigma` deviations above the last ones."""
        if not self.on:
            return
        named = {name: line[name] for name in ("step", "loss", "grad_norm")} | {"sequences": [int(i) for i in indices]}
        where = "step {step}: loss {loss:.4f}, gradient norm {grad_norm:.4f}".format(**line)
        if not updated:
            self.append("skipped", named)
            self.say(f"WARNING: {where}; the step was skipped, nothing was updated. Its sequences: skipped.jsonl.")
        if not math.isfinite(line["loss"]):
            return
        if len(self.losses) >= SPIKE_LEAST:
            mean, deviation = statistics.fmean(self.losses), statistics.stdev(self.losses)
            if line["loss"] > mean + sigma * deviation:
                self.append("spikes", named | {"mean": mean, "deviation": deviation})
                self.say(f"WARNING: {where}; the last losses were {mean:.4f} +- {deviation:.4f}: see spikes.jsonl.")
        self.losses.append(line["loss"])

    def answers(self, step, prompts, texts):
        """Record and show what the model answers to each prompt at `step`."""
        if not self.on:
            return
        self.append("answers", {"step": step, "answers": dict(zip(prompts, texts, strict=True))})
        for prompt, text in zip(prompts, texts, strict=True):
            self.say(f"    {prompt} -> {text!r}")
        try:
            self.board.add_text("answers", "\n\n".join(map(": ".join, zip(prompts, texts, strict=True))), step)
        except OSError as error:
            self.say(f"WARNING: the answers of step {step} are missing in TensorBoard: {error}")

    def warn(self, text):
        """Put `text` on every line from here on; "" ends it."""
        self.warning = text

    def sync(self):
        """Put the record on the disk, so that no checkpoint is newer than its metrics after a power cut."""
        for name in RECORDS if self.on else ():
            try:
                if self.file(name).exists():
                    system.durable(self.file(name))
            except OSError as error:
                self.say(f"WARNING: {self.file(name)} is not on the disk: {error}")

    def advance(self, line):
        """Move the bar by one step and show `line`'s loss, learning rate, gradient norm and speed."""
        if self.on:
            names = {"loss": ".4f", "lr": ".2e", "grad_norm": ".2f", "tokens_per_second": ",.0f", "mfu": ".0%"}
            shown = {name: format(line[name], form) for name, form in names.items()}
            shown |= {"WARNING": self.warning} if self.warning else {}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()

    def say(self, text):
        """Print `text` above the bar."""
        if self.on:
            self.bar.write(text)

    def close(self):
        """Finish the bar and draw loss.png from metrics.jsonl."""
        if not self.on:
            return
        self.bar.close()
        self.board.close()
        lines = self.read("metrics")
        axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).add_subplot()
        for name, style in (("loss", "-"), ("validation_loss", "o-")):
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "), linewidth=1, markersize=4)
        axes.set(xlabel="optimizer step", ylabel="cross-entropy per trainable token (nats)")
        axes.legend()
        try:
            figure.savefig(self.path.with_name("loss.png"), dpi=120)
        except OSError as error:
            print(f"WARNING: loss.png could not be drawn: {error}")
