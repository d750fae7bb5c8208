"""Is it a better assistant? A check without a judge: two models on the same held-out conversations and plain text.

Reads   the validation split of DATA_DIR and its tokenizer, and two model folders with that same tokenizer: the resized
        base, which is the pretrained model with rows for the chat markers, and the fine-tuned one.
Writes  OUTPUT_DIR/assistant.json, each item's number before and after, for compare_evals.py, and
        OUTPUT_DIR/answers.jsonl, both models' answers for reading.

    python assistant_check.py          run_eval.sh does it after the tasks of `after`

Measured are: the loss on the held-out answers, for each source; the loss on plain text, where what was forgotten shows;
the share of greedy answers that end by themselves within MAX_NEW_TOKENS; the share whose reasoning, if there is any,
is one <think> block at the start, closed and followed by an answer.
"""

import json
import math
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sft import settings, system
from sft.evaluation import reading_check

# ---- Files ----
DATA_DIR = "data/sft_v1"  # folder written by prepare_data.py
BEFORE_MODEL = "checkpoints/base"  # Hugging Face folder written by resize_vocab.py
AFTER_MODEL = "exports/sft_v1"  # Hugging Face folder written by export_hf.py
PLAIN_TEXT = ""  # UTF-8 text that neither model was trained on; empty: the passage of plain_text.py
OUTPUT_DIR = "eval-results/after"  # folder for the two files; earlier ones are replaced
# ---- How much ----
ANSWERS = 100  # first questions of held-out conversations that both models answer
MAX_NEW_TOKENS = 512  # tokens of an answer; one that is longer is cut, and did not end by itself
# ---- How ----
DEVICE = "cpu"  # "cpu" | "cuda:N"
DTYPE = "bfloat16"  # of the weights: "bfloat16" | "float32"
BATCH_SIZE = 16  # answers generated at a time; losses are taken one sequence at a time

# ==== Facts read from the folders ====

PIECE = 10  # tokens of plain text that count as one item: their losses are not independent of each other


def other_tokenizer(data, before, after):
    """Return a sentence that says which of three folders has no tokenizer.json or another one, or None."""
    digests = {}
    for folder, made_by in ((data, "prepare_data.py"), (before, "resize_vocab.py"), (after, "export_hf.py")):
        if not (Path(folder) / "tokenizer.json").is_file():
            return f"{folder} holds no tokenizer.json, {made_by} has not written it."
        digests[folder] = system.sha256(Path(folder) / "tokenizer.json")
    other = [str(folder) for folder in (before, after) if digests[folder] != digests[data]]
    return f"{' and '.join(other)}: the tokenizer is not that of {data}." if other else None


def load_rows(data_dir):
    """Return the validation split's columns input_ids, assistant_masks, source. Raises: SystemExit if it has none."""
    try:
        rows = datasets.load_from_disk(data_dir)["validation"]
        return rows.select_columns(["input_ids", "assistant_masks", "source"])
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"{data_dir} holds no finished data ({error}). Run prepare_data.py again.") from None


def load_model(folder, dtype, device):
    """Return the model in `folder`, in evaluation mode. Raises: SystemExit if it does not load."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    except Exception as error:  # transformers and safetensors each raise their own
        raise SystemExit(f"{folder} is no model folder that loads ({type(error).__name__}: {error}).") from None


def first_prompt(ids, mask, header):
    """Return the ids up to the first answer, as a server sends them. ids, mask: lists; header: ids that open it."""
    first = mask.index(True)
    for start in range(first - len(header), -1, -1):  # an untrained <think> may stand between
        if ids[start : start + len(header)] == header:
            return ids[: start + len(header)]
    raise AssertionError("an answer without its header")


# ==== Measuring ====


@torch.no_grad()
def losses(model, ids, picked):
    """Return the cross-entropy of single tokens in nats, float32 [picked] on the CPU.

    ids: int64 [tokens]; picked: bool [tokens], which tokens are predicted, each from those before it.
    """
    logits = model(input_ids=ids[None].to(model.device)).logits[0, :-1]
    picked = picked[1:].to(model.device)
    return F.cross_entropy(logits[picked].float(), ids[1:].to(model.device)[picked], reduction="none").cpu()


def conversation_losses(model, rows):
    """Return the mean loss of the trained tokens of each row, list of floats."""
    tensors = ((torch.tensor(row["input_ids"]), torch.tensor(row["assistant_masks"])) for row in rows)
    return [losses(model, ids.long(), mask).mean().item() for ids, mask in tensors]


def text_losses(model, tokenizer, text):
    """Return (mean loss of each piece of PIECE tokens, their lengths); the text is cut into the model's contexts."""
    found, ids = [], torch.tensor(tokenizer(text).input_ids)
    for part in ids.split(getattr(model.config, "max_position_embeddings", None) or len(ids)):
        if len(part) > 1:
            found += losses(model, part, torch.ones(len(part), dtype=torch.bool)).split(PIECE)
    return [piece.mean().item() for piece in found], [len(piece) for piece in found]


@torch.no_grad()
def answers(model, tokenizer, prompts, max_new_tokens, batch_size):
    """Return for each prompt (list of ids) its greedy answer: (list of ids without what ended it, whether it ended)."""
    stops = model.generation_config.eos_token_id
    stops, found = set(stops if isinstance(stops, list) else [stops]), []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": part}, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(
            **batch, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
        )
        for ids in output[:, batch["input_ids"].shape[1] :].tolist():
            end = next((place for place, token in enumerate(ids) if token in stops), None)
            found.append((ids[:end], end is not None))
    return found


def well_formed(ids, think, unthink, blank):
    """Return whether an answer (list of ids) thinks not at all, or first, once, to the end, and then says something.

    think, unthink: ids of the markers; blank: function that says whether a list of ids is white space.
    """
    if think not in ids and unthink not in ids:
        return True
    once = ids.count(think) == ids.count(unthink) == 1
    return once and ids[0] == think and not blank(ids[ids.index(unthink) + 1 :])


def pick_prompts(rows, tokenizer, longest, number):
    """Return at most `number` prompts (lists of ids) of at most `longest` tokens, evenly from all of `rows`."""
    turn = [{"role": "user", "content": "a"}]
    shorter, longer = (
        tokenizer.apply_chat_template(turn, add_generation_prompt=asked, return_dict=True)["input_ids"]
        for asked in (False, True)
    )
    pairs = zip(rows["input_ids"], rows["assistant_masks"], strict=True)
    prompts = [first_prompt(ids, mask, longer[len(shorter) :]) for ids, mask in pairs]
    prompts = [prompt for prompt in prompts if len(prompt) <= longest]
    return prompts[:: math.ceil(len(prompts) / number) or 1]


def measure(folder, rows, prompts, tokenizer, text, run):
    """Return what one model gives: dict of `held_out`, `plain` (losses, lengths), `answers`, `thinks`, `sound`.

    The last three have an entry for each prompt; `thinks` says whether the answer has a marker.
    """
    model = load_model(folder, getattr(torch, run["DTYPE"]), run["DEVICE"])
    found = {"held_out": conversation_losses(model, rows), "plain": text_losses(model, tokenizer, text)}
    if not all(map(math.isfinite, found["held_out"] + found["plain"][0])):
        raise SystemExit(f"{folder}: a loss is not finite; its weights or its dtype are broken.")
    found["answers"] = answers(model, tokenizer, prompts, run["MAX_NEW_TOKENS"], run["BATCH_SIZE"])
    markers = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    found["thinks"] = [any(marker in ids for marker in markers) for ids, _ in found["answers"]]
    found["sound"] = [
        well_formed(ids, *markers, lambda rest: not tokenizer.decode(rest).strip()) for ids, _ in found["answers"]
    ]
    return found


# ==== Writing ====


def table(before, after, rows):
    """Return the rows for compare_evals.py. before, after: of `measure`."""
    made = []

    def add(label, metric, first, second, weights):
        made.append({"label": label, "metric": metric, "before": first, "after": second, "weights": weights})

    weights = [sum(mask) for mask in rows["assistant_masks"]]
    names = sorted(set(rows["source"]))
    for name in [*names, None] if len(names) > 1 else names:
        chosen = [place for place, source in enumerate(rows["source"]) if name in (source, None)]
        parts = [[part[i] for i in chosen] for part in (before["held_out"], after["held_out"], weights)]
        add(f"Held-out answers: {name or 'all'}", "loss", *parts)
    add("Plain text", "loss", before["plain"][0], after["plain"][0], before["plain"][1])
    if before["answers"]:
        ones = [1] * len(before["answers"])
        add(
            "Answers that end by themselves",
            "share",
            *([int(e) for _, e in s["answers"]] for s in (before, after)),
            ones,
        )
        add(
            "Answers with sound <think>, or none", "share", *(list(map(int, s["sound"])) for s in (before, after)), ones
        )
    return made


def write_answers(path, prompts, found, tokenizer):
    """Write a line for each prompt with both models' answers, and whether they ended by themselves."""
    with path.open("w", encoding="utf-8") as file:
        for prompt, *pair in zip(prompts, *(side["answers"] for side in found), strict=True):
            line = {"prompt": tokenizer.decode(prompt)}
            for name, (ids, ended) in zip(("before", "after"), pair, strict=True):
                line |= {name: tokenizer.decode(ids), f"{name}_ended": ended}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


# ==== Main ====


def main(run):
    """Check the models of the settings `run` (dict)."""
    transformers.utils.logging.disable_progress_bar()
    if DTYPE not in ("bfloat16", "float32") or min(ANSWERS, MAX_NEW_TOKENS, BATCH_SIZE) < 1:
        raise SystemExit("DTYPE must be bfloat16 or float32; ANSWERS, MAX_NEW_TOKENS and BATCH_SIZE at least 1.")
    if problem := other_tokenizer(Path(DATA_DIR) / "tokenizer", BEFORE_MODEL, AFTER_MODEL):
        raise SystemExit(problem)
    passage = Path(PLAIN_TEXT or reading_check.PASSAGE)
    try:
        text = passage.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise SystemExit(f"PLAIN_TEXT: {passage} cannot be read ({error}).") from None
    rows, tokenizer = load_rows(DATA_DIR), AutoTokenizer.from_pretrained(Path(DATA_DIR) / "tokenizer")
    context = AutoConfig.from_pretrained(AFTER_MODEL).max_position_embeddings
    prompts = pick_prompts(rows, tokenizer, context - MAX_NEW_TOKENS, ANSWERS)
    found = []
    for folder in (BEFORE_MODEL, AFTER_MODEL):
        print(f"{folder}: {len(rows)} held-out conversations, plain text, {len(prompts)} answers", flush=True)
        found.append(measure(folder, rows, prompts, tokenizer, text, run))
    thinking = [sum(side["thinks"]) for side in found]
    learnt = sum(tokenizer.convert_tokens_to_ids("<think>") in ids for ids in rows["input_ids"])
    notes = [
        f"before is `{BEFORE_MODEL}`, after is `{AFTER_MODEL}`, {DTYPE}. Losses are in nats per token; the items are "
        f"conversations of the validation split of `{DATA_DIR}`, and pieces of {PIECE} tokens of {passage.name}.",
        f"{len(prompts)} first questions were answered, greedily, in at most {MAX_NEW_TOKENS} tokens. <think> or its "
        f"end is in {thinking[0]} answers before, {thinking[1]} after, and <think> in {learnt} of {len(rows)} held-out "
        "conversations.",
    ]
    output = Path(OUTPUT_DIR)
    output.mkdir(parents=True, exist_ok=True)
    write_answers(output / "answers.jsonl", prompts, found, tokenizer)
    facts = {"settings": run, "notes": notes, "rows": table(*found, rows)}
    system.write_whole(output / "assistant.json", json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
