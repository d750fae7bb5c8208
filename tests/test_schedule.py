"""schedule.py: the warm-up and the cosine, what a plan says of them, and the jump where a run changes them.

bash tests/run.sh tests/test_schedule.py
"""

import itertools

import pytest

from sft.training.schedule import Schedule, change_of_rate


def test_learning_rate_warms_up_and_ends_at_the_floor():
    schedule = Schedule(total_steps=1000, peak=2e-5, floor=2e-6, warmup_steps=200)
    rates = [schedule.rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-7) and rates[199] == rates[200] == 2e-5
    assert rates[-1] == pytest.approx(2e-6) and rates[599] == pytest.approx(1.1e-5, rel=5e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[200:]))
    assert schedule.describe() == "learning rate up to 2e-05 in 200 steps of warm-up, down to 2e-06 at the last step"


def test_a_warm_up_that_outlasts_the_run_is_refused_with_both_numbers():
    for steps in (18, 200):  # 18 are the demo's 606 sequences with the recipe's defaults
        with pytest.raises(
            SystemExit, match=f"WARMUP_STEPS is 200, but the run has only {steps} steps.* below {steps}"
        ):
            Schedule(steps, 2e-5, 2e-6, 200).describe()
    assert "200 steps of warm-up, down to 2e-05 at the last step" in Schedule(201, 2e-5, 2e-6, 200).describe()


def test_a_longer_schedule_on_a_finished_run_says_that_the_rate_rises_again():
    then, now = Schedule(18, 2e-5, 2e-6, 4), Schedule(36, 2e-5, 2e-6, 4)
    assert change_of_rate(then, now, 18) == ["learning rate: 2e-06 at step 18, 1.24e-05 at the next"]
    assert change_of_rate(then, then, 9) == change_of_rate(now, then, 18) == []
