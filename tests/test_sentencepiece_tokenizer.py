"""sentencepiece_tokenizer.py: a tokenizer.model converts to a tokenizer with the same ids.

Run it alone: bash tests/run.sh tests/test_sentencepiece_tokenizer.py
"""

import helpers
import pytest
import sentencepiece

from sft.data import sentencepiece_tokenizer


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
        },
        {
            "add_dummy_prefix": False,
            "bos_id": 3,
            "eos_id": 1,
            "unk_id": 0,
            "pad_id": 2,
            "byte_fallback": False,
            "vocab_size": 200,
        },
        {"split_digits": True, "user_defined_symbols": ["[INST]"]},
    ],
)
def test_a_sentencepiece_model_converts_to_the_same_ids(tmp_path, kind, options):
    path = helpers.train_sentencepiece(
        tmp_path, **({"vocab_size": 380, "model_type": kind, "byte_fallback": True} | options)
    )
    tokenizer, names = sentencepiece_tokenizer.convert(path, True, helpers.PASSAGE.read_text())
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    text = "Anna said that it rained."
    assert tokenizer.encode(text).ids == [original.bos_id(), *original.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id(names["eos_token"]) == original.eos_id()
    assert tokenizer.get_vocab_size() == original.get_piece_size()
