"""Ask two models the same questions and print their greedy answers side by side.

Reads two Hugging Face folders with chat templates and a JSON list of questions; writes nothing.

    python demo/ask.py
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parent.parent))


import export_hf
from sft import settings

# ---- Files ----
BEFORE_MODEL = "demo/work/base"  # Hugging Face folder
AFTER_MODEL = "demo/work/export"  # Hugging Face folder
QUESTIONS = "demo/questions.json"  # JSON list of strings
# ---- Answers ----
MAX_NEW_TOKENS = 80  # tokens; an answer that is longer is cut and said to be

# ==== Asking ====


def answers(folder, questions, max_new_tokens):
    """Return for each question (greedy answer of the model in `folder`, whether it ended by itself)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return [export_hf.sample(model, tokenizer, question, max_new_tokens) for question in questions]


def main(run):
    """Print question, answer before, answer after."""
    questions = json.loads(Path(QUESTIONS).read_text(encoding="utf-8"))
    both = [answers(folder, questions, MAX_NEW_TOKENS) for folder in (BEFORE_MODEL, AFTER_MODEL)]
    for question, *pair in zip(questions, *both, strict=True):
        print(f"\nQ: {question}")
        for name, (text, ended) in zip(("before", "after"), pair, strict=True):
            print(f"  {name} ({'ended by itself' if ended else f'cut at {MAX_NEW_TOKENS} tokens'}): {text}")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
