"""Find training conversations that contain questions of the evaluation.

A conversation overlaps if it shares NGRAM consecutive words with the text of a question and one of its answers. Case,
punctuation and white space do not count. The questions come from lm_eval: each text as the model will see it, without
few-shot examples. Used by prepare_data.py.
"""

import contextlib
import hashlib
import io
import itertools
import logging
import multiprocessing
import os
import re
import signal
import textwrap
import unicodedata
import zipfile
from pathlib import Path

import numpy as np

from sft import system

# ==== Constants ====

NGRAM = 13  # words in a row shared with a question; 13 as in Brown et al. 2020 (GPT-3), appendix C
# An n-gram is boilerplate, a formula of the prompts, if it is in the questions about more than BOILERPLATE different
# texts and about more than BOILERPLATE_SHARE of the task's texts. A passage is one text, however many questions ask
# about it; so a shared passage is compared, and a formula around different texts isn't.
BOILERPLATE = 10
BOILERPLATE_SHARE = 0.05
COUNTS = ("questions", "ngrams", "too_short", "boilerplate")
BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial over the words of an n-gram; odd, so no word is shifted out
WITHOUT = '--decontaminate-against "" (contaminated scores may then look better than they are)'


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
    for offset in range(n):  # wraps around at 64 bits
        result = result * BASE + hashes[offset : offset + len(result)]
    return result


class Overlap:
    """The evaluation's n-grams in the file `path`. `counts`: for each task, {"task", "parts", "questions", ...}.

    "parts": of a group its own name and those of the tasks and groups in it, of a single task its own.

    Raises: SystemExit if the file cannot be read.
    """

    def __init__(self, path):
        try:
            with np.load(path, allow_pickle=False) as file:
                self.n, self.hashes, self.task_of = int(file["n"]), file["hashes"], file["task_of"]
                self.tasks, words = file["tasks"].tolist(), file["words"].tobytes().decode().split("\n")
                rows = zip(self.tasks, file["counts"].tolist(), file["parts"].tolist(), strict=True)
                self.counts = []
                for task, row, parts in rows:
                    counts = dict(zip(COUNTS, row, strict=True))
                    self.counts.append({"task": task, "parts": parts.split("\n"), **counts})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise SystemExit(f"{path} cannot be read ({error}). Run prepare_data.py again.") from None
        self.hash_of = {word: word_hash(word) for word in words}
        # A test of the hash's leading bits rules out most windows: 280 microseconds for 700 words instead of 500,
        # because a binary search among 2.7 million n-grams misses the cache at most of its steps.
        self.shift = np.uint64(64 - max(16, len(self.hashes).bit_length() + 4))
        self.maybe = np.zeros(2 ** (64 - int(self.shift)), bool)
        self.maybe[self.hashes >> self.shift] = True

    def find(self, texts):
        """Look for n-grams of the evaluation in a conversation. texts: list of its turns' texts, taken as one text.

        Returns: (task, the shared words as a string) of the first n-gram that is shared, or None. Equal 64-bit hashes
        are taken for equal words: wrong once in 6,000 times that 300 million words meet 10 million n-grams.
        """
        words = words_of(" ".join(texts))
        if len(words) < self.n:
            return None
        hashes = np.fromiter(map(self.hash_of.get, words, itertools.repeat(0)), np.uint64, len(words))
        unknown = np.cumsum(np.concatenate(([0], hashes == 0)))
        starts = np.flatnonzero(unknown[self.n :] == unknown[: -self.n])  # of windows of known words only
        if not len(starts):
            return None
        windows = ngram_hashes(hashes, self.n)[starts]
        likely = np.flatnonzero(self.maybe[windows >> self.shift])
        positions = np.searchsorted(self.hashes, windows[likely])
        for i, position in zip(likely.tolist(), positions.tolist(), strict=True):
            if position < len(self.hashes) and self.hashes[position] == windows[i]:
                return self.tasks[self.task_of[position]], " ".join(words[starts[i] : starts[i] + self.n])
        return None


# ==== The evaluation's questions ====


def longest_text(data):
    """Return the longest string in a question's data (nested dicts and lists): its passage, or the question itself."""
    if isinstance(data, str):
        return data
    if isinstance(data, dict):
        data = data.values()
    elif not isinstance(data, list | tuple):
        return ""
    return max(map(longest_text, data), key=len, default="")


def question_texts(task):
    """Yield, for each question of lm_eval's `task`, (the text that it is about, list of its texts).

    Its texts are the question with each of its answers, as the model will see them.
    """
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
        yield longest_text(request.doc) or texts[0], texts
    task._instances = None  # of a group's tasks, only one holds its requests


def task_ngrams(tasks, n, hash_of):
    """Return (sorted unique uint64 n-grams, numbers in the order of COUNTS) of a list of lm_eval's tasks.

    hash_of: dict of word to hash, which gets the words that are new.
    """
    everything, formulas, questions, too_short = [], [], 0, 0
    for task in tasks:
        windows_of = {}  # the text that questions are about: their n-grams
        for about, texts in question_texts(task):
            windows = windows_of.setdefault(about, [np.empty(0, np.uint64)])
            before = len(windows)
            for words in map(words_of, texts):
                if len(words) >= n:
                    hash_of.update((word, word_hash(word)) for word in words if word not in hash_of)
                    windows.append(ngram_hashes(np.array([hash_of[word] for word in words], np.uint64), n))
            questions += 1
            too_short += len(windows) == before
        per_text = [np.unique(np.concatenate(windows)) for windows in windows_of.values()]
        ngrams, texts_with_it = np.unique(np.concatenate(per_text), return_counts=True)
        everything.append(ngrams)
        formulas.append(ngrams[texts_with_it > max(BOILERPLATE, BOILERPLATE_SHARE * len(per_text))])
    boilerplate = np.unique(np.concatenate(formulas))
    kept = np.setdiff1d(np.concatenate(everything), boilerplate)
    return kept, (questions, len(kept), too_short, len(boilerplate))


def save_ngrams(path, n, parts, ngrams, counts, words):
    """Write the file in one step.

    parts: {task: names of its parts}; ngrams: for each task its uint64 n-grams; counts: for each task those of COUNTS.
    Its arrays: n; hashes, sorted uint64; task_of, uint16: the first task that has the n-gram; tasks, str; parts, str,
    one name a line; counts, int64 [task, COUNTS]; words: the UTF-8 bytes of the sorted vocabulary, one word a line.
    Raises: SystemExit if the file cannot be written.
    """
    owners = np.repeat(np.arange(len(parts), dtype=np.uint16), [len(part) for part in ngrams])
    hashes, first = np.unique(np.concatenate(ngrams), return_index=True)
    arrays = {
        "n": n,
        "hashes": hashes,
        "task_of": owners[first],
        "tasks": np.array(list(parts)),
        "parts": np.array(list(map("\n".join, parts.values()))),
        "counts": np.array(counts),
        "words": np.frombuffer("\n".join(sorted(words)).encode(), np.uint8),
    }
    content = io.BytesIO()
    np.savez(content, **arrays)
    try:
        system.write_whole(path, content.getvalue())
    except OSError as error:
        raise SystemExit(f"{path} cannot be written ({error}). Free disk space.") from None


def write_ngrams(names, include_path, path):
    """Write the n-grams of lm_eval's tasks, groups or tags `names` to the file `path`; print a line for each.

    include_path: folder with more task definitions, or "". Raises: SystemExit with the task that cannot be read.
    """
    logging.disable(logging.CRITICAL)  # a failure is reported below, once
    names = list(dict.fromkeys(names))
    parts, ngrams, counts, hash_of = {}, [], [], {}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # progress bars of three libraries
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=include_path or None)  # reads 14,000 YAML files: 5 to 15 seconds
        for name in names:
            try:
                known = manager.match_tasks([name])
                if not known and not Path(name).is_file():
                    raise ValueError("lm_eval knows no task of this name; TASKS_INCLUDE_PATH names a folder of yours")
                loaded = manager.load(known or [name])
                task_hashes, numbers = task_ngrams(loaded["tasks"].values(), NGRAM, hash_of)
            except Exception as error:  # whatever task definitions and data sets raise
                cause = str(error) if isinstance(error, (OSError, ValueError)) else repr(error)
                cause = textwrap.shorten(cause, 300).rstrip(".")
                raise SystemExit(
                    f"{name} cannot be compared: {cause}. Make it reachable, or continue without it: {WITHOUT}."
                ) from None
            parts[name] = [*loaded["groups"], *loaded["tasks"]]
            ngrams.append(task_hashes)
            counts.append(numbers)
            line = "{:,} questions, {:,} n-grams, {:,} questions too short, {:,} n-grams of boilerplate"
            print(f"{name}: {line.format(*numbers)}", flush=True)
    save_ngrams(path, NGRAM, parts, ngrams, counts, hash_of)


# ==== The process that reads the questions ====


def find_overlap(names, include_path, path):
    """Collect the n-grams of the tasks `names` in the file `path`; return the Overlap, or None if there are no tasks.

    In a spawned process: lm_eval would stay in this one's memory, and in that of each worker.
    Raises: SystemExit if a task cannot be read (the child has printed the sentence) or the child was killed.
    """
    if not names:
        return None
    if include_path and not Path(include_path).is_dir():
        raise SystemExit(f"No folder {include_path}. Name a folder with task definitions with --tasks-include-path.")
    child = multiprocessing.get_context("spawn").Process(target=child_main, args=(names, include_path, path))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child inherits this: Ctrl-C is left to its parent
    try:
        child.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        child.join()
    finally:
        child.kill()
        child.join()
    if child.exitcode < 0:
        raise SystemExit(
            f"Reading the evaluation's questions was ended by signal {-child.exitcode}, most likely out of memory. "
            f"Free some, or continue without them: {WITHOUT}."
        )
    if child.exitcode:
        raise SystemExit(child.exitcode)
    return Overlap(path)


def child_main(names, include_path, path):
    """The spawned process: write_ngrams, unless its parent ended while it started."""
    system.leave_to_parent()
    if multiprocessing.parent_process().is_alive():
        write_ngrams(names, include_path, path)
