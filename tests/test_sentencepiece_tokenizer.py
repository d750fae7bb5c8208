"""sentencepiece_tokenizer.py: a tokenizer.model converts to a tokenizer with the same ids.

Run it alone: bash tests/run.sh tests/test_sentencepiece_tokenizer.py
"""

import helpers
import pytest
import sentencepiece
from tokenizers import Tokenizer, normalizers

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


LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}  # its rules: none


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("fallback", [True, False])
def test_a_converted_bpe_with_control_tokens_turns_back_into_a_file_with_the_same_ids(tmp_path, prefix, fallback):
    options = LLAMA | {"add_dummy_prefix": prefix, "byte_fallback": fallback, "vocab_size": 380 if fallback else 200}
    path = helpers.train_sentencepiece(tmp_path, model_type="bpe", **options)
    tokenizer, _ = sentencepiece_tokenizer.convert(path, True, helpers.PASSAGE.read_text())
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.add_tokens(["<think>"])
    restored = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_tokenizer.restore(tokenizer))
    text = helpers.PASSAGE.read_text() + "\n\n  x = 1\n<think>"
    assert restored.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids
    end = tokenizer.token_to_id("<|im_end|>")
    assert restored.id_to_piece(end) == "<|im_end|>" and restored.is_control(end) and restored.is_control(1)
    assert [restored.is_unknown(0), restored.is_byte(3)] == [True, fallback]


def test_the_older_form_of_such_a_tokenizer_turns_back_too(tmp_path):
    path = helpers.train_sentencepiece(tmp_path, model_type="bpe", vocab_size=380, byte_fallback=True, **LLAMA)
    tokenizer, _ = sentencepiece_tokenizer.convert(path, True, helpers.PASSAGE.read_text())
    rules = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Sequence(rules), None
    restored = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_tokenizer.restore(tokenizer))
    text = helpers.PASSAGE.read_text()
    assert restored.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_what_llama_cpp_could_not_read_from_such_a_file_has_none(tmp_path, small_tokenizer_dir):
    byte_level = Tokenizer.from_file(str(small_tokenizer_dir / "tokenizer.json"))
    assert sentencepiece_tokenizer.restore(byte_level) is None
    for kind, rules in (("unigram", LLAMA), ("bpe", {})):  # {}: SentencePiece's own normaliser
        path = helpers.train_sentencepiece(tmp_path, model_type=kind, vocab_size=380, byte_fallback=True, **rules)
        tokenizer, _ = sentencepiece_tokenizer.convert(path, True, helpers.PASSAGE.read_text())
        assert sentencepiece_tokenizer.restore(tokenizer) is None
