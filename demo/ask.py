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
import settings

# ---- Files ----
BEFORE_MODEL = "demo/work/base"  # Hugging Face folder
AFTER_MODEL = "demo/work/export"  # Hugging Face folder
QUESTIONS = "demo/questions.json"  # JSON list of strings
# ---- Answers ----
MAX_NEW_TOKENS = 80  # tokens; an answer that is longer is cut and said to be


def answer(folder, questions, max_new_tokens):
    """Return for each question (answer text, whether the model ended it by itself)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    answers = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            ids = model.generate(**prompt, do_sample=False, max_new_tokens=max_new_tokens)[0]
        new = ids[prompt["input_ids"].shape[1] :]
        answers.append((tokenizer.decode(new, skip_special_tokens=True).strip(), len(new) < max_new_tokens))
    return answers


def main(run):
    """Print question, answer before, answer after."""
    questions = json.loads(Path(QUESTIONS).read_text(encoding="utf-8"))
    answers = [answer(folder, questions, MAX_NEW_TOKENS) for folder in (BEFORE_MODEL, AFTER_MODEL)]
    for question, *pair in zip(questions, *answers, strict=True):
        print(f"\nQ: {question}")
        for name, (text, ended) in zip(("before", "after"), pair, strict=True):
            print(f"  {name} ({'ended by itself' if ended else f'cut at {MAX_NEW_TOKENS} tokens'}): {text}")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
