"""Find training conversations that contain questions of the evaluation.

A conversation overlaps if it shares NGRAM consecutive words with the text of a question and one of its answers. Case,
punctuation and white space do not count. As a script it writes the questions' n-grams; prepare_data.py looks them up.

Reads   the tasks' own data, through lm_eval: each text as the model will see it, without few-shot examples.
Writes  OUTPUT: numpy arrays (see `save`).

    python decontamination.py --tasks hellaswag,arc_easy
    python decontamination.py --tasks demo_persona --include-path demo/tasks --output data/demo_ngrams.npz
"""

import contextlib
import hashlib
import itertools
import logging
import os
import re
import textwrap
import unicodedata
import zipfile
from pathlib import Path

import numpy as np

from sft import settings

# ---- What is compared ----
TASKS = ()  # lm_eval's names of tasks, groups or tags
INCLUDE_PATH = ""  # folder with task definitions of your own; empty: only lm_eval's
NGRAM = 13  # words that must be shared in a row; 13 as in Brown et al. 2020 (GPT-3), appendix C
# ---- Files ----
OUTPUT = "data/evaluation_ngrams.npz"  # file to write; an earlier one is replaced

# ==== Facts ====

BOILERPLATE = 10  # an n-gram in more questions of a task than this is a formula of its prompts
COUNTS = ("questions", "ngrams", "too_short", "boilerplate")
BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial over the words of an n-gram; odd, so no word is shifted out


# ==== Words and n-grams ====


def words_of(text):
    """Return the list of the words in `text`, case-folded, without punctuation."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def word_hash(word):
    """Return the word's 64-bit hash as an int: the same in every process and on every machine, never 0."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest()) or 1


def ngram_hashes(hashes, n):
    """Return the uint64 hash of each window of `n` words. hashes: uint64 array of at least `n` word hashes."""
    result = np.zeros(len(hashes) - n + 1, np.uint64)
    for place in range(n):  # wraps around at 64 bits
        result = result * BASE + hashes[place : place + len(result)]
    return result


class Overlap:
    """The evaluation's n-grams in the file `path`. `counts`: for each task, {"task", "questions", "ngrams", ...}.

    Raises: SystemExit if the file cannot be read.
    """

    def __init__(self, path):
        try:
            with np.load(path, allow_pickle=False) as file:
                self.n, self.hashes, self.task_of = int(file["n"]), file["hashes"], file["task_of"]
                self.tasks, words = file["tasks"].tolist(), file["words"].tobytes().decode().split("\n")
                rows = zip(self.tasks, file["counts"].tolist(), strict=True)
                self.counts = [{"task": task, **dict(zip(COUNTS, row, strict=True))} for task, row in rows]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise SystemExit(f"{path} cannot be read ({error}). Write it again with decontamination.py.") from None
        self.hash_of = {word: word_hash(word) for word in words}
        # One look at the hash's first bits rules out most windows: 280 microseconds for 700 words instead of 500,
        # because a binary search among 2.7 million n-grams misses the cache at most of its steps.
        self.shift = np.uint64(64 - max(16, len(self.hashes).bit_length() + 4))
        self.maybe = np.zeros(2 ** (64 - int(self.shift)), bool)
        self.maybe[self.hashes >> self.shift] = True

    def find(self, texts):
        """Look for n-grams of the evaluation in a conversation. texts: list of its turns' texts, taken as one text.

        Returns: (task, the shared words as a string) of the first n-gram found, or None. Equal 64-bit hashes are taken
        for equal words: wrong once in 6,000 times that 300 million words meet 10 million n-grams.
        """
        words = words_of(" ".join(texts))
        if len(words) < self.n:
            return None
        hashes = np.fromiter(map(self.hash_of.get, words, itertools.repeat(0)), np.uint64, len(words))
        unknown = np.cumsum(np.concatenate(([0], hashes == 0)))
        starts = np.flatnonzero(unknown[self.n :] == unknown[: -self.n])
        if not len(starts):
            return None
        found = ngram_hashes(hashes, self.n)[starts]
        likely = np.flatnonzero(self.maybe[found >> self.shift])
        places = np.searchsorted(self.hashes, found[likely])
        for i, place in zip(likely.tolist(), places.tolist(), strict=True):
            if place < len(self.hashes) and self.hashes[place] == found[i]:
                return self.tasks[self.task_of[place]], " ".join(words[starts[i] : starts[i] + self.n])
        return None


# ==== The evaluation's questions ====


def question_texts(task):
    """Yield, for each question of lm_eval's `task`, the list of its texts: the question with each of its answers."""
    task.set_config("num_fewshot", 0)
    task.set_config("description", "")  # the same line before every question
    task.set_fewshot_seed(0)  # tasks written as a class draw even when they draw nothing
    task.build_all_requests(limit=None, rank=0, world_size=1)
    for _, requests in itertools.groupby(task.instances, key=lambda request: request.doc_id):
        texts = []
        for request in requests:
            text = "".join(part for part in request.args if isinstance(part, str))
            answers = [""]
            if request.request_type == "generate_until":  # the request holds no answer
                answers = task.doc_to_target(request.doc)
                if isinstance(answers, int) and task.get_config("doc_to_choice") is not None:
                    answers = task.doc_to_choice(request.doc)[answers]
                answers = (answers or [""]) if isinstance(answers, list) else [answers]
            texts += [f"{text} {answer}" for answer in answers]
        yield texts
    task._instances = None  # of a group's tasks, only one holds its requests


def task_ngrams(tasks, n, hash_of):
    """Return (sorted unique uint64 n-grams, numbers in the order of COUNTS) of a list of lm_eval's tasks.

    hash_of: dict of word to hash, which gets the words that are new.
    """
    found, too_short = [], 0
    for texts in itertools.chain.from_iterable(map(question_texts, tasks)):
        windows = [np.empty(0, np.uint64)]
        for words in map(words_of, texts):
            if len(words) >= n:
                hash_of.update((word, word_hash(word)) for word in words if word not in hash_of)
                windows.append(ngram_hashes(np.array([hash_of[word] for word in words], np.uint64), n))
        too_short += len(windows) == 1
        found.append(np.unique(np.concatenate(windows)))
    ngrams, questions = np.unique(np.concatenate(found), return_counts=True)
    kept = ngrams[questions <= BOILERPLATE]
    return kept, (len(found), len(kept), too_short, len(ngrams) - len(kept))


def save(path, n, names, ngrams, counts, words):
    """Write the file in one step. ngrams: for each task its uint64 n-grams; counts: for each task those of COUNTS.

    Its arrays: n; hashes, sorted uint64; task_of, uint16: the first task that has the n-gram; tasks, str; counts,
    int64 [task, COUNTS]; words: the UTF-8 bytes of the sorted vocabulary, one word a line.
    Raises: SystemExit if the file cannot be written.
    """
    owners = np.repeat(np.arange(len(names), dtype=np.uint16), [len(part) for part in ngrams])
    hashes, first = np.unique(np.concatenate(ngrams), return_index=True)
    arrays = {"n": n, "hashes": hashes, "task_of": owners[first], "tasks": np.array(names), "counts": np.array(counts)}
    arrays["words"] = np.frombuffer("\n".join(sorted(words)).encode(), np.uint8)
    staging = Path(f"{path}.unfinished")
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        with staging.open("wb") as file:
            np.savez(file, **arrays)
        staging.replace(path)
    except OSError as error:
        raise SystemExit(f"{path} cannot be written ({error}). Free disk space, or name another --output.") from None
    finally:
        with contextlib.suppress(OSError):
            staging.unlink()


# ==== Main ====


def main():
    """Write the n-grams of TASKS to OUTPUT and print a line per task."""
    names = list(dict.fromkeys(TASKS))
    if not names:
        raise SystemExit("TASKS is empty; name lm_eval's tasks with --tasks, by commas.")
    if NGRAM < 1:
        raise SystemExit(f"NGRAM is {NGRAM}; it must be at least 1.")
    if INCLUDE_PATH and not Path(INCLUDE_PATH).is_dir():
        raise SystemExit(f"no folder {INCLUDE_PATH}; --include-path names a folder with task definitions.")
    os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    logging.disable(logging.CRITICAL)  # what fails is said below, once
    from lm_eval.tasks import TaskManager  # takes 10 seconds; prepare_data.py imports this file without it

    manager = TaskManager(include_path=INCLUDE_PATH or None)
    ngrams, counts, hash_of = [], [], {}
    for name in names:
        try:
            if not (known := manager.match_tasks([name])) and not Path(name).is_file():
                raise ValueError("lm_eval knows no task of this name; --include-path names a folder of your own")
            found, numbers = task_ngrams(manager.load(known or [name])["tasks"].values(), NGRAM, hash_of)
        except Exception as error:  # whatever task definitions and data sets raise
            cause = textwrap.shorten(str(error) if isinstance(error, (OSError, ValueError)) else repr(error), 300)
            raise SystemExit(
                f"{name} cannot be compared: {cause.rstrip('.')}. Make it reachable, or go on without it: "
                '--decontaminate-against "" (the comparison before/after then proves less).'
            ) from None
        ngrams.append(found)
        counts.append(numbers)
        told = "{:,} questions, {:,} n-grams, {:,} questions too short, {:,} n-grams of boilerplate".format(*numbers)
        print(f"{name}: {told}", flush=True)
    save(OUTPUT, NGRAM, names, ngrams, counts, hash_of)


if __name__ == "__main__":
    settings.from_flags(globals())
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("Stopped; nothing was written.") from None
