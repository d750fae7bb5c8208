"""Is it a better assistant? A check without a judge: two models on the same held-out conversations and plain text.

Reads   the validation split of DATA_DIR and its tokenizer, and two model folders with that same tokenizer: the resized
        model, which is the pretrained model with rows for the chat markers, and the fine-tuned one.
Writes  RESULT_DIR/assistant.json, each item's number before and after, for compare_evals.py, and
        RESULT_DIR/answers.jsonl, both models' answers, for you to read.

    python -m sft.evaluation.assistant_check          run_eval.sh runs it after the tasks of `after`

It measures the loss on the held-out answers, for each source; the loss on plain text, which shows what was forgotten;
both also in bits per byte of the text, which other tokenizers' models can be compared by (sft/bits_per_byte.py);
the share of greedy answers that end by themselves within MAX_NEW_TOKENS; and the share of answers whose reasoning, if
there is any, is one <think> block at the start that is closed and followed by an answer.
"""

import json
import math
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoTokenizer

from sft import hf_folder, settings, system
from sft.bits_per_byte import bits_per_nat, trained_bytes
from sft.data import chatml
from sft.evaluation import compare_evals, reading_check

# ---- Files ----
DATA_DIR = "data/sft_v1"  # folder written by prepare_data.py
RESIZED_MODEL = "models/resized"  # Hugging Face folder written by resize_vocab.py: "before"
EXPORT_DIR = "exports/sft_v1"  # Hugging Face folder written by export_hf.py: "after"
PLAIN_TEXT = ""  # UTF-8 text that neither model was trained on; empty: the passage of reading_check.py
RESULT_DIR = "eval-results/after"  # folder for the two files; earlier ones are replaced
# ---- How much ----
ANSWERS = 100  # first questions of held-out conversations that both models answer
MAX_NEW_TOKENS = 512  # tokens of an answer; one that is longer is cut, and did not end by itself
# ---- How ----
DEVICE = "cpu"  # "cpu" | "cuda:N"
DTYPE = "bfloat16"  # of the weights: "bfloat16" | "float32"
BATCH_SIZE = 16  # answers generated at a time; losses are computed one sequence at a time

# ==== Reading the folders ====

TOKENS_PER_ITEM = 10  # tokens of plain text that count as one item: their losses are not independent of each other


def other_tokenizer(data_tokenizer, resized_model, export_dir):
    """Return a sentence that says which of three folders has no tokenizer.json or another one, or None."""
    writers = {data_tokenizer: "prepare_data.py", resized_model: "resize_vocab.py", export_dir: "export_hf.py"}
    digests = {}
    for folder, script in writers.items():
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            return f"{folder} holds no tokenizer.json, {script} has not written it."
        digests[folder] = system.sha256(path)
    others = [str(folder) for folder in writers if digests[folder] != digests[data_tokenizer]]
    if others:
        return f"{' and '.join(others)}: the tokenizer is not that of {data_tokenizer}."
    return None


def load_rows(data_dir):
    """Return the validation split's columns input_ids, assistant_masks, source. Raises: SystemExit if it has none."""
    try:
        rows = datasets.load_from_disk(data_dir)["validation"]
        return rows.select_columns(["input_ids", "assistant_masks", "source"])
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"{data_dir} holds no finished data ({error}). Run prepare_data.py again.") from None


def is_document(mask):
    """Return whether a sequence is plain text, trained from its second token at the latest: it has no markers."""
    return mask.index(True) < 2


def first_prompt(ids, mask, header):
    """Return the ids up to the first answer, as a server sends them. ids, mask: lists; header: ids that open it."""
    first = mask.index(True)
    for start in range(first - len(header), -1, -1):  # an untrained <think> may stand between
        if ids[start : start + len(header)] == header:
            return ids[: start + len(header)]
    raise AssertionError("an answer without its header")


def pick_prompts(rows, tokenizer, max_tokens, number):
    """Return at most `number` prompts (lists of ids) of at most `max_tokens`, evenly from all of `rows`."""
    turn = [{"role": "user", "content": "a"}]
    without = tokenizer.apply_chat_template(turn, return_dict=True)["input_ids"]
    with_header = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    header = with_header[len(without) :]
    prompts = []
    for ids, mask in zip(rows["input_ids"], rows["assistant_masks"], strict=True):
        if is_document(mask):
            continue
        prompt = first_prompt(ids, mask, header)
        if len(prompt) <= max_tokens:
            prompts.append(prompt)
    number = min(number, len(prompts))
    return [prompts[index * len(prompts) // number] for index in range(number)]


# ==== Measuring ====


@torch.no_grad()
def losses(model, ids, chosen):
    """Return the cross-entropy of single tokens in nats, float32 [chosen tokens] on the CPU.

    ids: int64 [tokens]; chosen: bool [tokens], which tokens are predicted, each from those before it.
    """
    logits = model(input_ids=ids[None].to(model.device)).logits[0, :-1]
    chosen = chosen[1:].to(model.device)
    return F.cross_entropy(logits[chosen].float(), ids[1:].to(model.device)[chosen], reduction="none").cpu()


def conversation_losses(model, rows):
    """Return the mean loss of the trained tokens of each row, list of floats."""
    means = []
    for row in rows:
        ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["assistant_masks"])
        means.append(losses(model, ids.long(), mask).mean().item())
    return means


def text_losses(model, tokenizer, text):
    """Return (mean loss of each piece of TOKENS_PER_ITEM tokens, their lengths, the UTF-8 bytes of all of them).

    The text is cut at the model's context.
    """
    ids = torch.tensor(tokenizer(text).input_ids)
    context = getattr(model.config, "max_position_embeddings", None) or len(ids)
    parts = [(part, torch.ones(len(part), dtype=torch.bool)) for part in ids.split(context) if len(part) > 1]
    pieces = [piece for part in parts for piece in losses(model, *part).split(TOKENS_PER_ITEM)]
    text_bytes = sum(trained_bytes(tokenizer.backend_tokenizer, parts))
    return [piece.mean().item() for piece in pieces], [len(piece) for piece in pieces], text_bytes


@torch.no_grad()
def answers(model, tokenizer, prompts, max_new_tokens, batch_size):
    """Return for each prompt (list of ids) its greedy answer: (list of ids without what ended it, whether it ended)."""
    stops = set(hf_folder.stop_ids(model.generation_config))
    results = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": part}, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(
            **batch, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
        )
        for ids in output[:, batch["input_ids"].shape[1] :].tolist():
            end = next((index for index, token_id in enumerate(ids) if token_id in stops), None)
            results.append((ids[:end], end is not None))
    return results


def well_formed(ids, think, unthink, blank):
    """Return whether an answer has no reasoning, or one block of it at the start, closed and followed by an answer.

    ids: list of the answer's ids; think, unthink: ids of the markers; blank: function that says whether a list of ids
    is white space.
    """
    if think not in ids and unthink not in ids:
        return True
    once = ids.count(think) == ids.count(unthink) == 1
    return once and ids[0] == think and not blank(ids[ids.index(unthink) + 1 :])


def measure(folder, rows, prompts, tokenizer, text, args):
    """Return what one model gives: dict of `held_out`, `plain` (see `text_losses`), `answers`, `marked`, `sound`.

    The last three have an entry for each prompt; `marked` says whether the answer has a <think> or </think>.
    """
    model = hf_folder.load_model(folder, "Write it again.", getattr(torch, args["DTYPE"])).to(args["DEVICE"])
    held_out = conversation_losses(model, rows)
    plain = text_losses(model, tokenizer, text)
    if not all(map(math.isfinite, held_out + plain[0])):
        raise SystemExit(
            f"{folder}: a loss is not finite; its weights or its dtype are broken. Try DTYPE = float32; if that "
            "fails too, run the script again that wrote the folder."
        )
    answered = answers(model, tokenizer, prompts, args["MAX_NEW_TOKENS"], args["BATCH_SIZE"])
    think, unthink = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])

    def blank(ids):
        return not tokenizer.decode(ids).strip()

    return {
        "held_out": held_out,
        "plain": plain,
        "answers": answered,
        "marked": [think in ids or unthink in ids for ids, _ in answered],
        "sound": [well_formed(ids, think, unthink, blank) for ids, _ in answered],
    }


# ==== Writing ====


def entry(label, metric, before, after, weights):
    """Return one entry of assistant.json; the last three are lists with a number for each item."""
    return {"label": label, "metric": metric, "before": before, "after": after, "weights": weights}


def with_bits(loss, text_bytes):
    """Return the `loss` (an entry) and, unless it is of tokens that spell no text, the same in bits per byte.

    text_bytes: of all its items together. Every item has the same factor: so their mean is the quotient of the sums,
    and its error and verdict the loss's.
    """
    if not text_bytes:  # such as unknown tokens, where the tokenizer lacks the text's script
        return [loss]
    factor = bits_per_nat(sum(loss["weights"]), text_bytes)
    before, after = ([factor * number for number in loss[side]] for side in ("before", "after"))
    return [loss, entry(loss["label"], compare_evals.BITS, before, after, loss["weights"])]


def table(before, after, rows, tokenizer):
    """Return the entries for compare_evals.py. before, after: of `measure`; rows: of `load_rows`."""
    sources, masks = rows["source"], rows["assistant_masks"]
    weights = [sum(mask[1:]) for mask in masks]
    text_bytes = trained_bytes(tokenizer.backend_tokenizer, zip(rows["input_ids"], masks, strict=True))
    texts = {source for source, mask in zip(sources, masks, strict=True) if is_document(mask)}
    groups = []
    for name in sorted(set(sources)):
        groups.append((name, [index for index, source in enumerate(sources) if source == name]))
    if len(groups) - len(texts) > 1:
        groups.append(("all", [index for index, source in enumerate(sources) if source not in texts]))
    entries = []
    for name, chosen in groups:
        columns = [[column[index] for index in chosen] for column in (before["held_out"], after["held_out"], weights)]
        label = f"Held-out {'text' if name in texts else 'answers'}: {name}"
        entries += with_bits(entry(label, "loss", *columns), sum(text_bytes[index] for index in chosen))
    plain_losses, lengths, plain_bytes = before["plain"]
    entries += with_bits(entry("Plain text", "loss", plain_losses, after["plain"][0], lengths), plain_bytes)
    if before["answers"]:
        ones = [1] * len(before["answers"])
        ended = [[int(ended) for _, ended in side["answers"]] for side in (before, after)]
        sound = [[int(sound) for sound in side["sound"]] for side in (before, after)]
        entries.append(entry("Answers that end by themselves", "share", *ended, ones))
        entries.append(entry("Answers with a sound think block, or none", "share", *sound, ones))
    return entries


def notes(args, before, after, rows, tokenizer, passage):
    """Return the sentences that the report shows below the table. before, after: of `measure`; passage: Path."""
    think = tokenizer.convert_tokens_to_ids("<think>")
    in_data = sum(think in ids for ids in rows["input_ids"])
    return [
        f"before is `{args['RESIZED_MODEL']}`, after is `{args['EXPORT_DIR']}`, {args['DTYPE']}. Losses are in nats "
        f"per token; in {compare_evals.BITS} only text counts as bytes, but every trained token with its loss, the "
        "closing <|im_end|> too. The items are conversations of the validation split of "
        f"`{args['DATA_DIR']}`, and pieces of {TOKENS_PER_ITEM} tokens of {passage.name}.",
        f"{len(before['answers'])} first questions were answered, greedily, in at most {args['MAX_NEW_TOKENS']} "
        f"tokens. A think marker is in {sum(before['marked'])} answers before, {sum(after['marked'])} after, and in "
        f"{in_data} of {len(rows)} held-out conversations.",
    ]


def messages(prompt, tokenizer):
    """Return a prompt's turns as dicts of `role` and `content`, without the header at its end that asks for the answer.

    prompt: list of ids. It is cut at the ids of the markers, so a text that spells a marker stays text.
    """
    start, end = tokenizer.convert_tokens_to_ids(list(chatml.CHATML))
    turns, first = [], 0
    for index, token_id in enumerate(prompt):
        if token_id == start:
            first = index + 1
        elif token_id == end:
            role, _, content = tokenizer.decode(prompt[first:index]).partition("\n")
            turns.append({"role": role, "content": content})
    return turns


def write_answers(path, prompts, before, after, tokenizer):
    """Write a line for each prompt with both models' answers, and whether they ended by themselves."""
    lines = []
    for prompt, first, second in zip(prompts, before["answers"], after["answers"], strict=True):
        line = {"messages": messages(prompt, tokenizer)}
        for name, (ids, ended) in (("before", first), ("after", second)):
            line[name] = tokenizer.decode(ids)
            line[f"{name}_ended"] = ended
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    system.write_whole(path, "".join(lines))


# ==== Main ====


def main(args):
    """Check the two models that the settings `args` (dict) name."""
    transformers.utils.logging.disable_progress_bar()
    if args["DTYPE"] not in ("bfloat16", "float32"):
        raise SystemExit(f"DTYPE is {args['DTYPE']!r}; it must be bfloat16 or float32.")
    for name in ("ANSWERS", "MAX_NEW_TOKENS", "BATCH_SIZE"):
        if args[name] < 1:
            raise SystemExit(f"{name} is {args[name]}; it must be at least 1.")
    data_tokenizer = Path(args["DATA_DIR"]) / "tokenizer"
    problem = other_tokenizer(data_tokenizer, args["RESIZED_MODEL"], args["EXPORT_DIR"])
    if problem:
        raise SystemExit(problem)
    passage = Path(args["PLAIN_TEXT"] or reading_check.PASSAGE)
    try:
        text = passage.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise SystemExit(f"PLAIN_TEXT: {passage} cannot be read ({error}).") from None
    rows, tokenizer = load_rows(args["DATA_DIR"]), AutoTokenizer.from_pretrained(data_tokenizer)
    context = hf_folder.load_config(args["EXPORT_DIR"], "Run export_hf.py again.").max_position_embeddings
    prompts = pick_prompts(rows, tokenizer, context - args["MAX_NEW_TOKENS"], args["ANSWERS"])
    folders = {"before": args["RESIZED_MODEL"], "after": args["EXPORT_DIR"]}
    weights = {side: system.weight_digests(folder) for side, folder in folders.items()}
    sides = []
    for folder in folders.values():
        print(f"{folder}: {len(rows)} held-out conversations, plain text, {len(prompts)} answers", flush=True)
        sides.append(measure(folder, rows, prompts, tokenizer, text, args))
    before, after = sides
    output = Path(args["RESULT_DIR"])
    check = {
        "settings": args,
        "weights_sha256": weights,
        "notes": notes(args, before, after, rows, tokenizer, passage),
        "rows": table(before, after, rows, tokenizer),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_answers(output / "answers.jsonl", prompts, before, after, tokenizer)
        system.write_whole(output / "assistant.json", json.dumps(check, indent=1) + "\n")
    except OSError as error:
        raise SystemExit(f"{output} cannot be written ({error}). Free disk space, or name another folder.") from None


if __name__ == "__main__":
    main(settings.from_flags(globals()))
