"""Ask the demo's base and its export the same questions and print their greedy answers one below the other.

Reads two Hugging Face folders with chat templates and a JSON list of questions; writes nothing.

    python demo/ask.py
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parent.parent))

from sft import hf_folder, settings

# ---- Files ----
BASE_MODEL = "demo/work/base"  # Hugging Face folder, the model before fine-tuning
EXPORT_DIR = "demo/work/export"  # Hugging Face folder, the model after it
QUESTIONS = "demo/questions.json"  # JSON list of strings
# ---- Answers ----
DTYPE = "bfloat16"  # of both models: "bfloat16" | "float32", faster on a CPU without bfloat16 instructions
MAX_NEW_TOKENS = 80  # tokens; a longer answer is cut, and the output says so

# ==== Asking ====


def answers(folder, questions, args):
    """Return for each question (greedy answer of the model in `folder`, whether it ended by itself)."""
    model = hf_folder.load_model(folder, "Run demo/run.sh.", getattr(torch, args["DTYPE"]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [hf_folder.answer(model, tokenizer, question, args["MAX_NEW_TOKENS"]) for question in questions]


def main(args):
    """Print each question with the answer before and the answer after."""
    questions = json.loads(Path(args["QUESTIONS"]).read_text(encoding="utf-8"))
    before = answers(args["BASE_MODEL"], questions, args)
    after = answers(args["EXPORT_DIR"], questions, args)
    for index, question in enumerate(questions):
        print(f"\nQ: {question}")
        for name, (text, ended) in (("before", before[index]), ("after", after[index])):
            ending = "ended by itself" if ended else f"cut at {args['MAX_NEW_TOKENS']} tokens"
            print(f"  {name} ({ending}): {text}")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
