"""hardware.py: what the ranks of a machine share.

bash tests/run.sh tests/test_hardware.py
"""

import torch

from sft.training import hardware


def test_ranks_share_the_memory_of_a_machine(monkeypatch):
    whole = hardware.memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert hardware.memory(torch.device("cpu")) == whole // 2
