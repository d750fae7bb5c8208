"""tests/long/faults.py in short: a run killed at every point of a save and its checkpoints damaged ends the same.

bash tests/run.sh tests/test_faults.py
"""

import re
import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.torchrun
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened():
    # A process of its own: it forks its ranks, which must not inherit the threads of other tests.
    command = [sys.executable, ROOT / "tests" / "long" / "faults.py", "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    counts = {name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", result.stdout.splitlines()[-1])}
    assert counts["kills"] >= 8 and counts["saves_interrupted"] >= 4 and counts["corruptions"] >= 1
    assert counts["caught"] == counts["corruptions"] and counts["lost"] == counts["wrong"] == 0
