"""hardware.py: the memory of a rank, what a run records of it, and the peaks of cards.

bash tests/run.sh tests/test_hardware.py
"""

import torch

from sft.training import hardware

GIB = 2**30


def test_ranks_share_the_memory_of_a_machine(monkeypatch):
    whole = hardware.memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert hardware.memory(torch.device("cpu")) == whole // 2


def test_a_cards_memory_is_what_others_left_free_and_what_torch_holds_already(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    assert hardware.memory(torch.device("cuda", 0)) == 22 * GIB


def test_a_card_reports_what_is_in_tensors_what_is_reserved_and_how_often_it_had_to_retry(monkeypatch):
    stats = {"allocated_bytes.all.peak": 3 * GIB, "reserved_bytes.all.peak": 4 * GIB, "num_alloc_retries": 5}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    expected = {"allocated_gib": 3.0, "reserved_gib": 4.0, "allocation_retries": 5}
    assert hardware.memory_use(torch.device("cuda", 0)) == expected
    assert hardware.memory_use(torch.device("cpu")).keys() == expected.keys()


def test_a_card_is_not_taken_for_a_faster_one_of_a_similar_name():
    assert hardware.listed_peak("NVIDIA GeForce RTX 4090") == 165.2e12
    assert hardware.listed_peak("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert hardware.listed_peak("NVIDIA H100 PCIe") == 756e12
    assert hardware.listed_peak("NVIDIA H100 80GB HBM3") == 989e12
