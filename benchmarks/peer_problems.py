"""Problems with one right answer, from reasoning-gym; benchmarks/learning.py runs it in .venv-benchmarks.

Writes  OUTPUT/problems.jsonl, conversations to train on (`messages`), and OUTPUT/held_out/held_out.jsonl, other
        problems of the same generators (`task`, `question`, `answer`). No question is in both.
"""

import json

import common
import reasoning_gym

from sft import settings

# ---- Files ----
OUTPUT = "benchmarks/work/learning"  # folder, from the repository's root
# ---- How many ----
PROBLEMS = 1500  # of each generator to train on, fewer where it has not so many different ones
HELD_OUT = 50  # of each generator to be scored on
SEED = 1  # of the problems to train on; the held-out ones have the next

# ==== Generators ====

GENERATORS = {  # such that a model of 135M parameters can learn them in minutes
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "leg_counting": {"min_animals": 1, "max_animals": 3, "min_instances": 1, "max_instances": 5},
    "family_relationships": {"min_family_size": 4, "max_family_size": 5},
    "word_sorting": {"min_words": 3, "max_words": 4, "max_word_length": 6},
    "word_sequence_reversal": {"min_words": 3, "max_words": 5},
    "number_filtering": {"min_numbers": 3, "max_numbers": 5, "max_decimals": 0},
}


def problems(name, number, seed):
    """Return `number` problems of a generator as a list of (question, answer)."""
    made = reasoning_gym.create_dataset(name, size=number, seed=seed, **GENERATORS[name])
    return [(entry["question"].strip(), str(entry["answer"])) for entry in made]


def main(args):
    """Write both files."""
    folder = common.ROOT / OUTPUT
    (folder / "held_out").mkdir(parents=True, exist_ok=True)
    with (folder / "problems.jsonl").open("w") as train, (folder / "held_out/held_out.jsonl").open("w") as test:
        for name in GENERATORS:
            held_out = dict(problems(name, HELD_OUT, SEED + 1))
            for question, answer in held_out.items():
                test.write(json.dumps({"task": name, "question": question, "answer": answer}) + "\n")
            for question, answer in dict(problems(name, PROBLEMS, SEED)).items():
                if question not in held_out:
                    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                    train.write(json.dumps({"messages": turns}) + "\n")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
