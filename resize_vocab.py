"""Step 2: give the base model a row for each token that prepare_data.py added.

Reads   the base model's folder (config, safetensors, tokenizer) and the prepared tokenizer, data/sft_v1/tokenizer/.
Writes  models/resized/: the same model with the new rows, the prepared tokenizer, resize.json.

    python resize_vocab.py

A new row is the mean of the rows of the base tokenizer's real tokens, computed in float32: a new token then starts as
an average word instead of noise that would dominate the softmax. Every other value keeps its bits.
"""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

from sft import hf_folder, settings, system
from sft.data import chatml
from sft.hf_folder import EMBEDDING, HEAD

# ---- Folders ----
BASE_MODEL = "models/base"  # Hugging Face folder with safetensors and the base's tokenizer
DATA_DIR = "data/sft_v1"  # folder written by prepare_data.py; its tokenizer/ is read
RESIZED_MODEL = "models/resized"  # folder to write; must be empty or missing

# ==== Reading and checking ====

RESIZE_AGAIN = "Run resize_vocab.py again."


def check_extension(base, extended, folder):
    """Return {token: id}, by id, of what the `Tokenizer` extended, from `folder`, adds to the base's.

    Raises: SystemExit if it changes anything else.
    """
    old, new = base.get_vocab(with_added_tokens=True), extended.get_vocab(with_added_tokens=True)
    for token, token_id in old.items():
        if new.get(token) != token_id:
            raise SystemExit(
                f"{folder} doesn't extend the base's tokenizer: token {token!r} is {token_id} there and "
                f"{new.get(token, 'missing')} here. Run prepare_data.py again with this base."
            )
    before, after = json.loads(base.to_str()), json.loads(extended.to_str())
    for part in ("model", "normalizer", "pre_tokenizer", "decoder"):
        if before[part] != after[part]:
            raise SystemExit(
                f"{folder} doesn't extend the base's tokenizer: its {part} differs. Run prepare_data.py again with "
                "this base."
            )
    added = {token: new[token] for token in sorted(new, key=new.get) if token not in old}
    owners = {token_id: token for token, token_id in [*added.items(), *old.items()]}
    for token, token_id in added.items():
        # The tokenizers library counts tokens to find the next id; a vocabulary with holes has that id already.
        if owners[token_id] != token:
            raise SystemExit(
                f"{folder}: the new token {token!r} has the id {token_id} of {owners[token_id]!r}, so one row would "
                "mean both. Fill the holes in the base tokenizer's ids, then run prepare_data.py again."
            )
    return added


def check_base(config, layout, folder):
    """Return (rows of the embedding, whether the head is tied to it) of the base model in `folder`.

    config: dict of its config.json; layout: {file name: [tensor names]} of its safetensors.
    Raises: SystemExit if the folder is not a Llama-like model, or its config.json does not describe its tensors.
    """
    tied = hf_folder.load_config(folder, "Name the folder of a model that transformers knows.").tie_word_embeddings
    tables = {}
    for file_name, names in layout.items():
        with safe_open(folder / file_name, "pt") as file:
            tables |= {name: file.get_tensor(name) for name in names if name in (EMBEDDING, HEAD)}
    if EMBEDDING not in tables:
        raise SystemExit(
            f"{folder} has no tensor {EMBEDDING}: it is not a Llama-like model. Name one with --base-model."
        )
    if not tied and HEAD not in tables:
        raise SystemExit(
            f"{folder}: config.json says untied embeddings, but there is no tensor {HEAD}. Set tie_word_embeddings to "
            "true if the model has no head of its own; otherwise get the model again."
        )
    for name, table in tables.items():
        if len(table) != config.get("vocab_size"):
            raise SystemExit(
                f"{folder}: {name} has {len(table)} rows, but config.json says vocab_size {config.get('vocab_size')}. "
                "Correct config.json, or export the base again."
            )
    if tied and HEAD in tables and not hf_folder.same_bits(tables[HEAD], tables[EMBEDDING]):
        raise SystemExit(
            f"{folder}: config.json says tied embeddings, but {HEAD} differs from {EMBEDDING}. Set tie_word_embeddings "
            f"to false if the model has a head of its own; otherwise remove {HEAD} from the safetensors."
        )
    return len(tables[EMBEDDING]), tied


# ==== Writing ====


def mean_row(rows, real):
    """Return the mean [hidden] of the rows at `real` (int64 ids), computed in float32, in the dtype of `rows`."""
    return rows[real].float().mean(dim=0).to(rows.dtype)


def resize(rows, real, new_ids, vocab_size):
    """Return `rows` [old rows, hidden] with at least `vocab_size` rows; those at `new_ids` get the mean of `real`.

    rows: any float dtype, which is kept; real: int64 ids of the base tokenizer's tokens.
    """
    mean = mean_row(rows, real)
    result = mean.repeat(max(len(rows), vocab_size), 1)
    result[: len(rows)] = rows
    result[new_ids] = mean
    return result


def write_weights(base, layout, output, change):
    """Copy the shards one by one from `base` to `output`, passing each tensor through `change(name, tensor)`.

    change: returns the tensor to write, or None to leave it out.
    """
    total_size, written = 0, {}
    for file_name, names in layout.items():
        tensors = {}
        with safe_open(base / file_name, "pt") as file:
            for name in names:
                tensor = change(name, file.get_tensor(name))
                if tensor is not None:
                    tensors[name] = tensor.contiguous()
        hf_folder.save_weights(tensors, output / file_name)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
        written[file_name] = list(tensors)
    hf_folder.write_index(output, written, total_size)


def write_configs(base, output, config, ids, rows):
    """Write config.json and generation_config.json with the prepared tokenizer's `ids` and the number of `rows`.

    Generation stops at <|im_end|> and wherever the base stops.
    """
    path = base / "generation_config.json"
    generation = system.read_json(path) if path.is_file() else {}
    base_stops = hf_folder.stop_ids(generation if "eos_token_id" in generation else config)
    token_ids = {f"{kind}_token_id": token_id for kind, token_id in ids.items() if token_id is not None}
    generation |= token_ids
    generation["eos_token_id"] = list(dict.fromkeys([ids["eos"], *base_stops]))
    generation.pop("_from_model_config", None)
    resized_config = config | token_ids | {"vocab_size": rows}
    for name, content in (("config.json", resized_config), ("generation_config.json", generation)):
        (output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(folder, output):
    """Copy the files of the prepared tokenizer, and nothing else, from `folder` to `output`."""
    for name in hf_folder.TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, output / name)


# ==== Verification ====


def verify(base, output, new_ids, real, tied):
    """Load both folders with transformers and compare them. Raises: SystemExit naming what differs.

    It compares the tie, every old row's bits, every new row with the mean, all other tensors' bits, and old logits.
    """
    old = hf_folder.load_model(base, "Correct its config.json or its safetensors, or download the model again.")
    new = hf_folder.load_model(output, RESIZE_AGAIN)
    embedding, head = new.get_input_embeddings().weight, new.get_output_embeddings().weight
    if (embedding.data_ptr() == head.data_ptr()) is not tied:
        expected = "tied to" if tied else "apart from"
        raise SystemExit(f"{output}: after reloading, the head is not {expected} the embedding. {RESIZE_AGAIN}")
    check_stray(base, output, new)
    kept = torch.ones(old.get_input_embeddings().num_embeddings, dtype=torch.bool)  # old rows that are to stay
    kept[[token_id for token_id in new_ids if token_id < len(kept)]] = False
    parts = dict(new.named_parameters())
    for name, tensor in old.named_parameters():
        result = parts[name]
        if name in (EMBEDDING, HEAD):
            if not (result[new_ids] == mean_row(tensor, real)).all():
                raise SystemExit(f"{output}: a new row of {name} is not the mean of the old ones. {RESIZE_AGAIN}")
            tensor, result = tensor[kept], result[: len(kept)][kept]
        if not hf_folder.same_bits(tensor, result):
            raise SystemExit(f"{output}: {name} changed. {RESIZE_AGAIN}")
    prompt = real[:: max(1, len(real) // 16)][None]
    with torch.no_grad():
        before = old(input_ids=prompt).logits
        after = new(input_ids=prompt).logits
    if not hf_folder.same_bits(before[..., kept], after[..., : len(kept)][..., kept]):
        raise SystemExit(f"{output}: logits of old tokens changed. {RESIZE_AGAIN}")


def check_stray(base, output, model):
    """Raise SystemExit if the safetensors in `output` hold a tensor that is not a parameter of the loaded `model`."""
    names = {name for names in hf_folder.shards(output).values() for name in names}
    if stray := names - dict(model.named_parameters()).keys():
        raise SystemExit(
            f"{base}: the tensor {min(stray)} is not a parameter of its model. Remove it from the safetensors."
        )


# ==== Main ====


def report(args, record, vocab_size):
    """Print what was written: the `record` (dict of resize.json)."""
    print(
        f"{args['BASE_MODEL']} -> {args['RESIZED_MODEL']}: {record['base_rows']:,} -> {record['rows']:,} rows, "
        f"{'tied' if record['tied'] else 'untied'}"
    )
    for token, token_id in record["new_ids"].items():
        print(f"  {token_id:>6}  {token}  = mean of {record['averaged_rows']:,} rows")
    if record["rows"] > vocab_size:
        print(f"  {record['rows'] - vocab_size:,} rows beyond the last token are the base's own padding and stay")
    print("verified: old rows and old logits bit-identical, new rows the mean, tie kept, configs and tokenizer agree")


def main(args):
    """Write the resized model as the settings `args` (dict) say, and verify it."""
    transformers.utils.logging.disable_progress_bar()
    base, output = Path(args["BASE_MODEL"]), Path(args["RESIZED_MODEL"])
    tokenizer_folder = Path(args["DATA_DIR"]) / "tokenizer"
    config = system.read_json(base / "config.json")
    base_tokenizer, tokenizer = hf_folder.load_tokenizer(base), hf_folder.load_tokenizer(tokenizer_folder)
    new_tokens = check_extension(base_tokenizer, tokenizer, tokenizer_folder)
    ids = chatml.special_ids(tokenizer_folder, tokenizer)
    layout = hf_folder.shards(base)
    base_rows, tied = check_base(config, layout, base)
    new_ids = list(new_tokens.values())
    old_ids = sorted(base_tokenizer.get_vocab(with_added_tokens=True).values())
    if old_ids[-1] >= base_rows:
        raise SystemExit(
            f"{base}: its tokenizer has the id {old_ids[-1]}, its model only {base_rows} rows. Name the base with the "
            "tokenizer that it was trained with."
        )
    real = torch.tensor(old_ids)
    vocab_size = max(old_ids[-1], *new_ids, 0) + 1
    rows = max(base_rows, vocab_size)

    def change(name, tensor):
        if tied and name == HEAD:
            return None  # the same tensor as the embedding; a second copy could drift apart
        return resize(tensor, real, new_ids, vocab_size) if name in (EMBEDDING, HEAD) else tensor

    record = {
        "base": args["BASE_MODEL"],
        "base_rows": base_rows,
        "rows": rows,
        "tied": tied,
        "new_ids": new_tokens,
        "averaged_rows": len(old_ids),
        "tokenizer_sha256": hf_folder.tokenizer_digests(tokenizer_folder),
    }
    with system.staged(output, "--resized-model") as staging:
        write_weights(base, layout, staging, change)
        write_configs(base, staging, config, ids, rows)
        copy_tokenizer(tokenizer_folder, staging)
        (staging / "resize.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        verify(base, staging, new_ids, real, tied)
    report(args, record, vocab_size)


if __name__ == "__main__":
    main(settings.from_flags(globals()))
