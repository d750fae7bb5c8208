"""The trainer's record: metrics.jsonl, TensorBoard events, the loss curve and the progress bar. Used by sft_v1.py."""

import json
import math
from pathlib import Path

import torch.distributed as dist
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import checkpoints


class Log:
    """Writes metrics.jsonl, TensorBoard events, the loss curve and the progress bar, on rank 0; else nothing."""

    def __init__(self, folder, step, total_steps):
        self.path = Path(folder) / "metrics.jsonl"
        self.on = dist.get_rank() == 0
        if not self.on:
            return
        kept = [line for line in self.read() if line["step"] <= step]
        checkpoints.write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.board = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=step + 1)
        self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def read(self):
        """Return the lines of metrics.jsonl as dicts; a last line cut off by a kill is left out."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def write(self, line):
        """Record `line`: {"step": int, name: number, ...}; a number that is not finite becomes null."""
        if not self.on:
            return
        line = {name: value if math.isfinite(value) else None for name, value in line.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            for name, value in line.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(name, value, line["step"])
        except OSError as error:  # a full disk costs a line of the record, not the run
            self.say(f"WARNING: step {line['step']} is missing in {self.path}: {error}")

    def advance(self, line):
        """Move the bar by one step and show `line`'s loss, learning rate, gradient norm and speed."""
        if self.on:
            names = {"loss": ".4f", "lr": ".2e", "grad_norm": ".2f", "tokens_per_second": ",.0f"}
            self.bar.set_postfix({name: format(line[name], form) for name, form in names.items()}, refresh=False)
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
        lines = self.read()
        axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).add_subplot()
        for name, style in (("loss", "-"), ("validation_loss", "o-")):
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "), linewidth=1, markersize=4)
        axes.set(xlabel="optimizer step", ylabel="cross-entropy per trainable token (nats)")
        axes.legend()
        figure.savefig(self.path.with_name("loss.png"), dpi=120)
