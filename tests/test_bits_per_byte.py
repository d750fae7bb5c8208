"""bits_per_byte.py: the bytes are those of the answers as they were written, whatever the tokenizer.

Alone: bash tests/run.sh tests/test_bits_per_byte.py
"""

import math

import numpy as np
import pytest
from helpers import write_tokenizer
from tokenizers import Tokenizer

from sft.bits_per_byte import bits_per_nat, trained_bytes
from sft.data import chatml

CONVERSATIONS = (
    ("Who are you?", "I'm Genesis — nice to meet you.", "And in Chinese?", "你好 🙂"),
    ("Is it far?", "<think>\nnot very\n</think>\n\nNo."),
    ("def?", "def add(first, second):\n    return first + second"),
)


def encoded(folder, train_on_special):
    """Return (the tokenizer in `folder` extended as prepare_data.py does, the conversations' ids and masks)."""
    tokenizer, adds_bos = chatml.extend_tokenizer(folder, train_on_special, True)
    tokenizer.save_pretrained(folder.parent / f"extended_{train_on_special}")
    encoder = chatml.Encoder(tokenizer, adds_bos, train_on_special, True)
    turns = [[(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)] for texts in CONVERSATIONS]
    rows = [chatml.concatenate(encoder.bos, segments) for segments in encoder.encode(turns)]
    return Tokenizer.from_file(str(folder.parent / f"extended_{train_on_special}" / "tokenizer.json")), rows


@pytest.mark.parametrize("train_on_special", [True, False])
def test_two_tokenizers_count_the_bytes_of_the_same_text(tmp_path, spm_tokenizer_dir, train_on_special):
    """A byte-level tokenizer and one of SentencePiece's pieces: other numbers of tokens, the same bytes."""
    text_bytes = [len("".join(texts[1::2]).encode()) for texts in CONVERSATIONS]
    if not train_on_special:
        text_bytes[1] -= len("<think></think>")
    tokens = []
    for folder in (write_tokenizer(tmp_path / "base"), spm_tokenizer_dir):
        tokenizer, rows = encoded(folder, train_on_special)
        assert trained_bytes(tokenizer, rows) == text_bytes
        tokens.append(sum(int(mask.sum()) for _, mask in rows))
    assert tokens[0] != tokens[1]


def test_a_code_of_one_length_is_one_number_of_bits_per_byte_for_both_tokenizers(tmp_path, spm_tokenizer_dir):
    """A model that spends 3 bits on each byte of the text and 20 on each end, put into either's tokens."""
    text_bytes, ends = sum(len("".join(texts[1::2]).encode()) for texts in CONVERSATIONS), 4
    nats = (3 * text_bytes + 20 * ends) * math.log(2)
    for folder in (write_tokenizer(tmp_path / "base"), spm_tokenizer_dir):
        tokenizer, rows = encoded(folder, True)
        tokens = sum(int(mask.sum()) for _, mask in rows)
        loss = nats / tokens
        bits = loss * bits_per_nat(tokens, sum(trained_bytes(tokenizer, rows)))
        assert bits == pytest.approx(3 + 20 * ends / text_bytes)


def test_a_first_token_and_what_is_masked_count_no_byte(tmp_path):
    tokenizer = Tokenizer.from_file(str(write_tokenizer(tmp_path / "base") / "tokenizer.json"))
    ids = np.array(tokenizer.encode("the cat sat").ids, np.uint16)
    pieces = [len(tokenizer.decode([token])) for token in ids.tolist()]
    everything = np.ones(len(ids), bool)
    assert trained_bytes(tokenizer, [(ids, everything)]) == [sum(pieces) - pieces[0]]
    assert trained_bytes(tokenizer, [(ids, ~everything), (ids, np.arange(len(ids)) == 1)]) == [0, pieces[1]]
