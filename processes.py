"""What a process asks of the system for itself: to end with its parent, to keep its memory."""

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


def keep_memory():
    """Have glibc keep what is freed for the next tensor, which the kernel would map and clear anew (else nothing)."""
    if hasattr(libc, "mallopt"):  # mallopt(3)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes free at the heap's end above which it shrinks
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes of a block above which it is mapped by itself
