"""Processes that end together."""

import ctypes
import signal
import sys

libc = ctypes.CDLL(None)


def end_with_parent():
    """Have the kernel kill this process when the one that started it dies, however that ends (Linux; else nothing)."""
    if sys.platform == "linux":
        libc.prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


def leave_to_parent():
    """End with the parent, and leave Ctrl-C to it."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
