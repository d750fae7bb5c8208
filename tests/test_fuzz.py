"""tests/long/fuzz.py in short: nothing from outside ends in a traceback, and a traceback would be counted.

bash tests/run.sh tests/test_fuzz.py
"""

import datasets
import fuzz
import pytest


def test_no_input_from_outside_ends_in_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)  # as they were, for the other tests
    fed, failed = fuzz.fuzz(2_000, 7, tmp_path)
    assert fed >= 2_000 and failed == 0, capsys.readouterr().out


def test_what_is_no_sentence_counts_and_the_same_number_is_the_same_input(monkeypatch):
    def refuse(world, error):
        raise error

    monkeypatch.setattr(fuzz, "feed_texts", refuse)
    errors = (SystemExit("Do this."), SystemExit(1), KeyError("x"))
    problems = [fuzz.feed(None, "texts", (error,)) for error in errors]
    assert problems[0] is None and "SystemExit" in problems[1] and "KeyError" in problems[2]
    for kind in fuzz.SHARES:
        assert repr(fuzz.make(kind, 1, 5)) == repr(fuzz.make(kind, 1, 5))


@pytest.mark.parametrize("kind", ["files", "mixture", "results", "tokenizer"])
def test_most_damage_is_damage(kind):
    inputs = {repr(fuzz.make(kind, 1, number)) for number in range(100)}
    assert len(inputs) > 60
