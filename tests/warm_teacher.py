"""A run of generate_constitutional.py for tests to kill: forks of a process that has imported this file start in 20 ms.

What a run loads late is loaded here. The module itself imports nothing heavy in pytest's own process.
"""

import contextlib
import multiprocessing
import os


def warm():
    """Load what a run loads."""
    import anthropic
    import matplotlib.figure  # noqa: F401

    import generate_constitutional  # noqa: F401
    from sft.generation import checks

    client = anthropic.Anthropic(api_key="none", base_url="http://127.0.0.1:9", max_retries=0)
    assert client.messages.batches
    checks.language_of("load the languages")
    checks.mark_duplicates([], "question", str)
    checks.sketch("a b c d")


def run(args):
    """Run the script silently."""
    import generate_constitutional

    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        generate_constitutional.main(args)


if "PRELOAD_TEACHER" in os.environ and multiprocessing.parent_process() is None:
    warm()
