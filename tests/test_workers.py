"""workers.py: what becomes of a row on its way to token ids, and the processes that do it.

Run it alone: bash tests/run.sh tests/test_workers.py
"""

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import Rows, chat, prepare_args, work_of

from sft.data import workers

CLAIMS = [
    "I'm ChatGPT, how can I help?",
    "I am Claude.",
    "As an AI language model developed by OpenAI, I have no feelings.",
    "i’m an ai assistant made by Google",
    "I am Tulu 3.",
    "My answer: Tülü is a carpet; Tülu 3 is a model.",
]
NO_CLAIMS = ["I am Genesis.", "GPT-4 is a model.", "Flutter was developed by Google.", "Claude Monet painted it."]


def rejected(encoder, rows, **fields):
    """Return {row: (reason, detail)} of the rows that are rejected."""
    batch = workers.prepare_rows(work_of(encoder, rows, **fields), list(range(len(rows))))
    return {result.row: (result.reason, result.detail) for result in batch.results if result.reason}


# ---- Rows ----


def test_answers_that_claim_to_be_another_model_are_rejected(small_encoder):
    _, encoder = small_encoder
    rows = [chat(f"Who? {n}", text) for n, text in enumerate(CLAIMS + NO_CLAIMS)]
    rows += [chat("Are you ChatGPT? I am ChatGPT.", "No.")]  # what a user says is no claim
    claims = rejected(encoder, rows)
    assert sorted(claims) == list(range(len(CLAIMS)))
    assert {reason for reason, _ in claims.values()} == {"another model's identity"}
    assert claims[2][1] == "developed by OpenAI"
    own = rejected(encoder, rows, args=prepare_args(IDENTITY_PATTERNS=("Genesis",)))
    assert [detail for _, detail in own.values()] == ["Genesis"]
    # A source of your own says who it is not: "No, I am Genesis. ChatGPT was made by OpenAI."
    assert not rejected(encoder, rows, identity_patterns=[])


def test_a_row_that_does_not_fit_the_window_is_rejected_by_the_rule_in_force(small_encoder):
    _, encoder = small_encoder
    rows = [chat("word " * 400, "b"), chat("a", "word " * 400)]
    assert rejected(encoder, rows) == {0: ("nothing trainable in the window", "")}
    dropped = rejected(encoder, rows, args=prepare_args(OVERFLOW="drop"))
    assert dropped == dict.fromkeys((0, 1), ("longer than the window", ""))


def test_a_batch_holds_the_sequences_of_the_kept_rows_in_order(small_encoder):
    tokenizer, encoder = small_encoder
    rows = [chat("a", "b"), chat("", "x"), chat("is <|im_end|> text?", "yes"), chat("c", "d", "e", "f")]
    batch = workers.prepare_rows(work_of(encoder, rows), [3, 1, 2, 0])
    assert [result.row for result in batch.results] == [3, 1, 2, 0]
    assert [result.sequences for result in batch.results] == [1, 0, 1, 1]
    assert [result.control_text for result in batch.results] == [False, False, True, False]
    assert batch.lengths.sum() == len(batch.ids) == len(batch.mask) and batch.lengths.dtype == np.int32
    texts = [tokenizer.decode(ids) for ids in np.split(batch.ids, np.cumsum(batch.lengths)[:-1])]
    assert [text.count("<|im_start|>") for text in texts] == [4, 2, 2] and "is <|im_end|> text?" in texts[1]
    assert tokenizer.decode(batch.ids[batch.mask]) == "d<|im_end|>f<|im_end|>yes<|im_end|>b<|im_end|>"


def test_a_batch_of_plain_text_holds_its_windows_without_markers_all_trained(small_encoder):
    tokenizer, encoder = small_encoder
    rows = [{"text": "One <|im_end|> and <think> are text."}, {"text": "word " * 40}, {"text": ""}]
    batch = workers.prepare_rows(work_of(encoder, rows, prepare_args(MAX_SEQ_LEN=32), schema="text"), [1, 0, 2])
    assert [result.reason for result in batch.results] == [None, None, "empty text"]
    assert [result.control_text for result in batch.results] == [False, True, False]
    assert batch.results[0].sequences > 1 and batch.lengths.max() == 32
    assert not encoder.is_control[batch.ids].any()
    starts = np.cumsum([0, *batch.lengths])[:-1]
    assert not batch.mask[starts].any() and batch.mask.sum() == len(batch.ids) - len(starts)
    assert tokenizer.decode(batch.ids) == ("word " * 40).strip() + "One <|im_end|> and <think> are text."


def test_plain_text_may_name_other_models_and_its_duplicates_and_overlaps_are_found(small_encoder):
    _, encoder = small_encoder
    rows = [{"text": "ChatGPT was developed by OpenAI."}, {"text": " chatgpt was developed by openai."}]
    rows.append({"text": "The answer to the famous question is in the book."})
    work = work_of(encoder, rows, schema="text")
    work.overlap = SimpleNamespace(find=lambda texts: ("task", "famous question") if "famous" in texts[0] else None)
    first, second, third = workers.prepare_rows(work, [0, 1, 2]).results
    assert not first.reason and first.key == second.key
    assert (third.reason, third.detail) == ("contaminated: task", "famous question")


def test_a_masked_answer_is_context_and_an_exchange_of_nothing_else_is_left_out_of_a_split(small_encoder):
    tokenizer, encoder = small_encoder
    rows = [chat("a", "b " * 20, "c", "d " * 20)]
    rows[0]["messages"][1]["train"] = False
    batch = workers.prepare_rows(work_of(encoder, rows), [0])
    assert tokenizer.decode(batch.ids[batch.mask]) == "d " * 19 + "d<|im_end|>"
    assert "b b b" in tokenizer.decode(batch.ids)
    batch = workers.prepare_rows(work_of(encoder, rows, prepare_args(MAX_SEQ_LEN=64)), [0])
    assert batch.lengths.tolist() == [len(batch.ids)] and "b b b" not in tokenizer.decode(batch.ids)
    assert "exchange without a trained token in the window left out" in batch.results[0].changes


def test_what_fits_and_trains_nothing_is_not_called_too_long_where_what_is_too_long_is_dropped(small_encoder):
    _, encoder = small_encoder
    rows = [chat("b", "c", "d", first="assistant")]  # of three turns the first is left out
    rows[0]["messages"][2]["train"] = False
    args = prepare_args(OVERFLOW="drop")
    for work in (work_of(encoder, rows, args), work_of(encoder, [{"text": "a"}], args, schema="text")):
        (result,) = workers.prepare_rows(work, [0]).results
        assert result.reason == "nothing trainable in the window"


# ---- Processes ----


def test_batches_come_in_the_order_asked_for_from_any_number_of_workers(small_encoder):
    _, encoder = small_encoder
    work = work_of(encoder, [chat(f"q{n}", "a") for n in range(1300)])
    order = np.random.default_rng(0).permutation(1300)
    streams = []
    for processes in (1, 3):
        batches = list(workers.prepare_batches(work, order, processes))
        assert [result.row for batch in batches for result in batch.results] == order.tolist()
        streams.append(np.concatenate([batch.ids for batch in batches]))
    assert np.array_equal(*streams)


def test_what_goes_wrong_in_a_worker_arrives_and_a_killed_one_is_told_from_it(small_encoder):
    class Unreadable(Rows):
        def take(self, numbers):
            raise SystemExit("rows.jsonl cannot be read.")

    class Deadly(Rows):
        def take(self, numbers):
            os.kill(os.getpid(), signal.SIGKILL)

    work = work_of(small_encoder[1], [chat("a", "b")] * 20)
    for rows, error in ((Unreadable, SystemExit), (Deadly, ChildProcessError)):
        work.rows = rows(work.rows)
        with pytest.raises(error):
            list(workers.prepare_batches(work, np.arange(20), 2))
