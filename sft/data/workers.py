"""From the rows of a source to token ids with masks, in worker processes.

Used by prepare_data.py. Which rows are kept is decided by conversations.py, what their ids are by chatml.py.
"""

import gc
import itertools
import multiprocessing
import multiprocessing.connection
import os
import traceback
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft import system
from sft.data import chatml, conversations, decontamination
from sft.data.sources import Source

BATCH = 500  # rows of a worker's task: enough for the tokenizer, and little to wait for at the end


# ==== Rows in, sequences out ====


@dataclass
class Work:
    """What a worker needs for the rows of one source. It is inherited by fork, never pickled."""

    source: Source
    rows: object  # with a length and `take`, from sources.find_source
    encoder: chatml.Encoder
    overlap: decontamination.Overlap | None
    args: dict  # the settings


@dataclass(slots=True)
class RowResult:
    """What became of one row."""

    row: int
    reason: str | None = None  # why it was rejected; None: kept
    detail: str = ""  # the words, the row or the byte that triggered the rejection
    start: str = ""  # the row's first words
    changes: list = field(default_factory=list)
    key: bytes = b""  # equal for duplicates
    control_text: bool = False  # it spells a control token, as text
    sequences: int = 0


@dataclass(slots=True)
class RowBatch:
    """The results of a batch of rows, and the sequences of the kept ones, concatenated in the order of the rows."""

    results: list  # RowResult of each row
    lengths: np.ndarray  # int32 [sequences]
    ids: np.ndarray  # the vocabulary's unsigned type [tokens]
    mask: np.ndarray  # bool [tokens]


def prepare_rows(work, numbers):
    """Read, check, encode and cut the rows `numbers` (list of int) of the source of `work`. Returns: RowBatch."""
    results, conversations_kept = read_rows(work, numbers)
    reject_identities(work, conversations_kept)
    kept = [(result, turns) for result, turns in conversations_kept if not result.reason]
    mark_control_text(work.encoder, kept)
    sequences = []
    if work.source.schema == "text":
        encoded = work.encoder.encode_documents([text for _, [(_, text)] in kept])
    else:
        encoded = work.encoder.encode([turns for _, turns in kept])
    for (result, turns), segments in zip(kept, encoded, strict=True):
        sequences += cut_row(work, result, turns, segments)
    empty = work.encoder.array([])
    segments = [*itertools.chain.from_iterable(sequences), (empty, False)]
    ids = np.concatenate([ids for ids, _ in segments])
    mask = np.repeat([trained for _, trained in segments], [len(ids) for ids, _ in segments])
    lengths = np.array([chatml.length(sequence) for sequence in sequences], np.int32)
    return RowBatch(results, lengths, ids, mask)


def read_rows(work, numbers):
    """Apply the rules of conversations.py. Returns: (RowResult of each row, (RowResult, turns) of those that hold)."""
    results, kept = [], []
    for number, (row, unreadable) in zip(numbers, work.rows.take(numbers), strict=True):
        result = RowResult(number)
        results.append(result)
        if unreadable:
            result.reason, result.detail, result.start = unreadable
            continue
        turns, result.reason = conversations.read_turns(row, work.source)
        result.start = conversations.first_words(turns)
        result.reason = result.reason or conversations.reason_to_reject(turns, work.source.schema)
        if result.reason:
            continue
        repaired, result.changes = conversations.repair(turns)
        if repaired:
            kept.append((result, repaired))
        else:
            result.reason = "no assistant turn after a user turn"
    return results, kept


def reject_identities(work, kept):
    """Reject those (RowResult, turns) of which an assistant turn matches the source's identity patterns."""
    patterns = work.source.identity_patterns
    if patterns is None:
        patterns = work.args["IDENTITY_PATTERNS"]
    answers = [(result, text) for result, turns in kept for role, text in turns if role == "assistant"]
    texts = pa.array([text for _, text in answers], pa.large_string())
    for pattern in patterns:
        matches = pc.match_substring_regex(texts, pattern, ignore_case=True).to_numpy(False)
        for index in np.flatnonzero(matches):
            result, text = answers[index]
            result.reason = "another model's identity"
            result.detail = pc.extract_regex([text], f"(?i)(?P<match>{pattern})")[0]["match"].as_py()


def mark_control_text(encoder, kept):
    """Set control_text where a turn of the (RowResult, turns) spells the name of a control token."""
    owners = [result for result, turns in kept for _ in turns]
    texts = pa.array([encoder.visible_text(*turn) for _, turns in kept for turn in turns], pa.large_string())
    any_name = "|".join(rf"\Q{name}\E" for name in encoder.names)
    for index in np.flatnonzero(pc.match_substring_regex(texts, any_name).to_numpy(False)):
        owners[index].control_text = True


def cut_row(work, result, turns, encoded):
    """Return the sequences of one row (lists of segments), or [] after setting the reason for rejection.

    turns: list of (role, content); encoded: their segments or, of a document, its ids; None where text became a control
    token.
    """
    if encoded is None:
        result.reason = "text became a control token"
        return []
    encoder, overflow = work.encoder, work.args["OVERFLOW"]
    head = [(encoder.array(encoder.bos), False)]
    cut = chatml.cut_document if work.source.schema == "text" else chatml.cut
    sequences, lost = cut(head, encoded, work.args["MAX_SEQ_LEN"], overflow)
    result.changes += lost
    if not sequences:
        result.reason = "longer than the window" if sequences is None else "nothing trainable in the window"
        return []
    match = work.overlap and work.overlap.find([text for _, text in turns])
    if match:
        task, result.detail = match
        result.reason = f"contaminated: {task}"
        return []
    result.sequences = len(sequences)
    if work.args["DEDUPLICATE"] != "off":
        result.key = conversations.duplicate_key(turns, work.args["DEDUPLICATE"])
    return sequences


# ==== Worker processes ====


def prepare_batches(work, order, workers):
    """Yield the RowBatches of `order` (array of row numbers), in that order. workers: number of forked processes.

    Each worker has a pipe of its own, whose far end only it holds, so its death shows at once, even in the middle of an
    answer; with one shared queue, as in concurrent.futures, the reader would hang.
    Raises: ChildProcessError if a worker was killed, and what prepare_rows() raised.
    """
    pool = {}  # our end of each pipe: its worker
    try:
        for _ in range(workers):
            pipe, worker = start_worker(work)
            pool[pipe] = worker
        yield from receive_in_order(pool, order)
    finally:
        for pipe, worker in pool.items():
            worker.kill()
            worker.join()
            pipe.close()


def start_worker(work):
    """Fork a worker for `work`; return (our end of its pipe, the process)."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=serve, args=(work, theirs))
    worker.start()
    theirs.close()
    return ours, worker


def serve(work, pipe):
    """A worker process: answer each (task, row numbers) that comes through `pipe` with (task, its RowBatch).

    An exception is answered in place of the RowBatch.
    """
    system.leave_to_parent()
    gc.freeze()  # what was inherited is neither searched for garbage nor copied
    # One Rust thread in each process is 1.3 times as fast as the calling thread, and per core as two threads in one
    # process (SmolLM2's tokenizer, two cores).
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "1"}
    while True:
        task, numbers = pipe.recv()
        try:
            answer = prepare_rows(work, numbers)
        except BaseException as error:
            error.add_note(traceback.format_exc())
            answer = error
        pipe.send((task, answer))


def receive_in_order(pool, order):
    """Send the rows of `order` to the workers of `pool` ({pipe: process}), BATCH at a time; yield their RowBatches."""
    tasks = range(0, len(order), BATCH)  # the first row of each
    sent, answers = 0, {}
    free = deque([*pool] * 2)  # each worker has one task to work on and one that waits
    for task in range(len(tasks)):
        while task not in answers:
            try:
                while free and sent < min(len(tasks), task + 4 * len(pool)):  # more would fill the memory
                    numbers = order[tasks[sent] :][:BATCH].tolist()
                    free.popleft().send((sent, numbers))
                    sent += 1
                for pipe in multiprocessing.connection.wait(pool):
                    finished, answer = pipe.recv()
                    answers[finished] = answer
                    free.append(pipe)
            except (EOFError, ConnectionError):
                raise ChildProcessError("a worker process was killed") from None
        answer = answers.pop(task)
        if isinstance(answer, BaseException):
            raise answer
        yield answer
