"""From the rows of a source to token ids with masks, in worker processes.

Used by prepare_data.py. Which rows hold is decided in conversations.py, what their ids are in chatml.py.
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

BATCH = 500  # rows of a worker's task: enough for the tokenizer, little to wait for at the end
WORK = None  # in a worker process: the Work it was forked for


# ==== Workers: rows in, sequences out ====


@dataclass
class Work:
    """What a worker needs for the rows of one source. It is inherited by fork, never pickled."""

    source: dict
    rows: object  # with a length and `take`, from conversations.find_source
    encoder: chatml.Encoder
    overlap: decontamination.Overlap | None
    run: dict  # the settings


@dataclass(slots=True)
class Fate:
    """What became of one row."""

    row: int
    reason: str | None = None  # why it was rejected; None: kept
    found: str = ""  # what made the reason hold
    start: str = ""  # the row's first words
    changes: list = field(default_factory=list)
    key: bytes = b""  # equal for duplicates
    control_text: bool = False  # it spells a control token, as text
    sequences: int = 0


def serve(work, pipe):
    """A worker process: answer each list of row numbers that comes through `pipe` with (its place, its prepare_rows).

    What goes wrong is answered in place of the rows, as the exception.
    """
    global WORK
    WORK = work
    system.leave_to_parent()
    gc.freeze()  # what was inherited is neither searched for garbage nor copied
    # One Rust thread in each process: 1.0 million tokens/s, against 0.76 on the calling thread and 0.75 per core when
    # one process has two (SmolLM2's tokenizer, two cores).
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "1"}
    while True:
        place, numbers = pipe.recv()
        try:
            pipe.send((place, prepare_rows(numbers)))
        except BaseException as error:
            error.add_note(traceback.format_exc())
            pipe.send((place, error))


def prepare_rows(numbers):
    """Read, judge, encode and cut the rows `numbers` (list of int) of this worker's source.

    Returns: (list of Fate, one per row; lengths: int32 [sequences]; ids [tokens]; mask: bool [tokens]), the sequences
    in the order of the rows and laid end to end.
    """
    fates, good = judge(numbers)
    reject_identities(good)
    good = [(fate, turns) for fate, turns in good if not fate.reason]
    encoder, run = WORK.encoder, WORK.run
    head = [(encoder.array(encoder.bos), False)]
    texts = pa.array([encoder.visible_text(*turn) for _, turns in good for turn in turns], pa.large_string())
    named = pc.match_substring_regex(texts, "|".join(rf"\Q{name}\E" for name in encoder.names)).to_numpy(False)
    place, sequences = 0, []
    for (fate, turns), encoded in zip(good, encoder.encode([turns for _, turns in good]), strict=True):
        fate.control_text, place = bool(named[place : place + len(turns)].any()), place + len(turns)
        pieces, lost = chatml.cut(head, encoded, run["MAX_SEQ_LEN"], run["OVERFLOW"]) if encoded else ([], [])
        fate.changes += lost
        if not encoded:
            fate.reason = "text became a control token"
        elif not pieces:
            fate.reason = "longer than the window" if run["OVERFLOW"] == "drop" else "nothing trainable in the window"
        elif WORK.overlap and (hit := WORK.overlap.find([text for _, text in turns])):
            fate.reason, fate.found = f"contaminated: {hit[0]}", hit[1]
        else:
            fate.sequences = len(pieces)
            sequences += pieces
            if run["DEDUPLICATE"] != "off":
                fate.key = conversations.key(turns, run["DEDUPLICATE"])
    segments = [*itertools.chain.from_iterable(sequences), (encoder.array([]), False)]
    ids = np.concatenate([ids for ids, _ in segments])
    mask = np.repeat([trained for _, trained in segments], [len(ids) for ids, _ in segments])
    return fates, np.array([chatml.length(piece) for piece in sequences], np.int32), ids, mask


def judge(numbers):
    """Apply the rules of conversations.py. Returns: (Fate of each row, (Fate, turns) of those that hold)."""
    fates, good = [], []
    for number, (row, unreadable) in zip(numbers, WORK.rows.take(numbers), strict=True):
        fate = Fate(number)
        fates.append(fate)
        if unreadable:
            fate.reason, fate.found, fate.start = unreadable
            continue
        turns, fate.reason = conversations.read_turns(row, WORK.source)
        fate.start = conversations.first_words(turns)
        fate.reason = fate.reason or next((text for text, holds in conversations.REJECTIONS if holds(turns)), None)
        if not fate.reason:
            repaired, fate.changes = conversations.repair(turns)
            if repaired:
                good.append((fate, repaired))
            else:
                fate.reason = "no assistant turn after a user turn"
    return fates, good


def reject_identities(good):
    """Reject those (Fate, turns) of which an assistant turn matches the source's identity patterns."""
    answers = [(fate, text) for fate, turns in good for role, text in turns if role == "assistant"]
    texts = pa.array([text for _, text in answers], pa.large_string())
    for pattern in WORK.source.get("identity_patterns", WORK.run["IDENTITY_PATTERNS"]):
        for place in np.flatnonzero(pc.match_substring_regex(texts, pattern, ignore_case=True).to_numpy(False)):
            fate, text = answers[place]
            fate.reason = "another model's identity"
            fate.found = pc.extract_regex([text], f"(?i)(?P<found>{pattern})")[0]["found"].as_py()


def results(work, order, workers):
    """Yield prepare_rows() of `order` (array of row numbers), in that order, as `workers` forked processes make it.

    Each worker has a pipe of its own, whose far end only it holds, so that its end is heard even in the middle of an
    answer; behind the one queue of concurrent.futures the reader would wait for the rest for ever.
    Raises: ChildProcessError if a worker was killed, and what prepare_rows() raised.
    """
    context = multiprocessing.get_context("fork")
    crew = {}  # our end of each pipe: its worker
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            crew[ours] = worker = context.Process(target=serve, args=(work, theirs))
            worker.start()
            theirs.close()
        starts, asked, done = range(0, len(order), BATCH), 0, {}
        free = deque([*crew] * 2)  # one list of rows to work on and one that waits
        for place in range(len(starts)):
            while place not in done:
                try:
                    while free and asked < min(len(starts), place + 4 * workers):  # the rest would fill the memory
                        free.popleft().send((asked, order[starts[asked] :][:BATCH].tolist()))
                        asked += 1
                    for pipe in multiprocessing.connection.wait(crew):
                        number, done[number] = pipe.recv()
                        free.append(pipe)
                except (EOFError, ConnectionError):
                    raise ChildProcessError("a worker process was killed") from None
            if isinstance(made := done.pop(place), BaseException):
                raise made
            yield made
    finally:
        for pipe, worker in crew.items():
            worker.kill()
            worker.join()
            pipe.close()
