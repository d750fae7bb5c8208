"""step_plan.py: the set of a step depends on seed and step alone; the layout covers it, in budget and in balance."""

import numpy as np
import pytest
from common import genesis_lengths
from hypothesis import given
from hypothesis import strategies as st

from sft.training import dataloader


def test_an_epoch_visits_each_sequence_once_and_epochs_differ():
    steps = dataloader.steps_per_epoch(1000, 32)
    assert steps == 31
    first = np.concatenate([dataloader.sequences_of_step(1000, 7, step, 32) for step in range(steps)])
    second = np.concatenate([dataloader.sequences_of_step(1000, 7, step, 32) for step in range(steps, 2 * steps)])
    assert len(set(first.tolist())) == len(first) == 31 * 32
    assert (first != second).any()
    assert (first[:32] != dataloader.sequences_of_step(1000, 8, 0, 32)).any()


def test_genesis_has_15955_steps():
    assert dataloader.steps_per_epoch(510_577, 32) == 15_955


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=40),
    ranks=st.integers(1, 5),
    budget=st.integers(100, 300),
)
def test_a_layout_holds_each_sequence_once_within_the_budget_on_ranks_of_equal_forwards(lengths, ranks, budget):
    plan = dataloader.lay_out(range(len(lengths)), lengths, ranks, budget, lengths)
    assert sorted(i for rank in plan for batch in rank for i in batch) == list(range(len(lengths)))
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1
    assert all(sum(lengths[i] for i in batch) <= budget for rank in plan for batch in rank)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_wait_less_than_5_percent_on_genesis_lengths(ranks):
    lengths = genesis_lengths(6400)
    assert 680 < lengths.mean() < 750
    costs = dataloader.cost(lengths, matrices=924_844_032, attention=32 * 12 * 128)
    waits = []
    for step in range(200):
        indices = dataloader.sequences_of_step(len(lengths), 42, step, 32)
        waits.append(dataloader.idle_share(dataloader.lay_out(indices, lengths, ranks, 8192, costs), costs))
    assert np.mean(waits) < 0.05
