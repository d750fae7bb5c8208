"""The learning rate of each optimizer step, and what a run says of it before it starts."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up to the peak, then a cosine down to the floor, which the last step has."""

    total_steps: int
    peak: float
    floor: float
    warmup_steps: int

    @classmethod
    def of(cls, args, total_steps):
        """Return the Schedule of the settings `args` (dict)."""
        return cls(total_steps, args["LEARNING_RATE"], args["MIN_LEARNING_RATE"], args["WARMUP_STEPS"])

    def rate(self, step):
        """Return the learning rate of optimizer step `step` (from 0)."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - 1 - self.warmup_steps)
        return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    def describe(self):
        """Return the phrase of the plan. Raises: SystemExit if the warm-up leaves no step at the peak."""
        if self.warmup_steps >= self.total_steps:
            raise SystemExit(
                f"WARMUP_STEPS is {self.warmup_steps:,}, but the run has only {self.total_steps:,} steps: it would end "
                f"before the learning rate reaches {self.peak:g}. Set --warmup-steps below {self.total_steps:,} "
                f"(a twentieth is {self.total_steps // 20:,}), or train more steps."
            )
        last = self.rate(self.total_steps - 1)
        return (
            f"learning rate up to {self.peak:g} in {self.warmup_steps:,} steps of warm-up, down to {last:g} "
            "at the last step"
        )


def change_of_rate(then, now, step):
    """Return a list with the phrase that says how the rate goes on after `step` steps, if another Schedule began it.

    then, now: the Schedule of the checkpoint and of this run.
    """
    if then == now or not 0 < step < now.total_steps:
        return []
    return [f"learning rate: {then.rate(step - 1):.3g} at step {step:,}, {now.rate(step):.3g} at the next"]
