"""training_log.py: loss spikes, and what a continued run keeps of its record.

bash tests/run.sh tests/test_training_log.py
"""

import json

import numpy as np
import pytest
import torch

from sft.training import training_log


@pytest.fixture
def log(tmp_path, alone):
    """A function that opens the log of a run with one rank, continued from a step."""
    return lambda step: training_log.Log(tmp_path, step, 100, torch.device("cpu"), 1e9)


def test_a_loss_far_above_the_last_ones_is_recorded_with_its_sequences_also_after_a_restart(log, tmp_path):
    def steps(record, first, last):
        for step in range(first, last):
            line = {"step": step, "loss": 9.0 if step == 50 else 2.0 + step % 3 / 100, "grad_norm": 1.0}
            record.check_spike(line, np.array([step, step + 1]))
            record.write(line)

    steps(log(0), 1, 60)
    spikes = tmp_path / "spikes.jsonl"
    (spike,) = [json.loads(line) for line in spikes.read_text().splitlines()]
    assert spike["step"] == 50 and spike["sequences"] == [50, 51] and spike["mean"] == pytest.approx(2.01, abs=0.001)
    before = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(before + "\0\0\n" + '{"step": 60')  # as a power cut leaves it
    again = log(40)
    assert spikes.read_text() == ""
    steps(again, 41, 60)
    assert [json.loads(line) for line in spikes.read_text().splitlines()] == [spike]
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_allocations_that_the_gpu_had_to_retry_are_warned_of_once_and_not_those_of_the_first_step(log, capsys):
    record = log(0)
    for step, retries in enumerate((3, 3, 4, 9), start=1):
        record.check_memory({"step": step, "allocation_retries": retries})
    warnings = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(warnings) == 1 and warnings[0].startswith(
        "WARNING: step 3: the GPU of rank 0 has too little memory left"
    )
    assert "--reserved-gib" in warnings[0]


def test_a_run_killed_before_its_first_checkpoint_leaves_no_line_behind(log, tmp_path):
    log(0).write({"step": 0, "validation_loss": 3.0})
    log(0).write({"step": 0, "validation_loss": 3.0})
    assert (tmp_path / "metrics.jsonl").read_text().count("validation_loss") == 1


def test_a_validation_loss_that_rises_three_times_in_a_row_is_warned_about_once_also_after_a_restart(log, capsys):
    def validate(record, losses, first):
        for number, loss in enumerate(losses):
            record.write({"step": first + 10 * number, "loss": 1.0, "validation_loss": loss})
        return capsys.readouterr().out.count("has risen 3 times in a row")

    assert validate(log(0), [3.0, 2.0, 2.1, 2.05, 2.2, 2.3], 0) == 0
    again = log(50)
    assert validate(again, [2.4], 60) == 1
    assert validate(again, [2.5, 2.6], 70) == 0  # the same rise
    assert validate(log(80), [2.7, 1.0, 1.1, 1.2], 90) == 0
    assert validate(log(120), [1.3, 1.4], 130) == 1
