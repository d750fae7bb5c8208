"""Step 2: give the base model a row for each token that prepare_data.py added.

Reads   the base model's folder (config, safetensors, tokenizer) and the prepared tokenizer.
Writes  checkpoints/base/: the same model with the new rows, the prepared tokenizer, resize.json.

    python resize_vocab.py

A new row is the mean of the rows of the base tokenizer's real tokens, computed in float32: a new token then starts as
an average word instead of noise that would dominate the softmax. Every other value keeps its bits.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import checkpoints
import settings

# ---- Files ----
BASE_MODEL = "models/base"  # Hugging Face folder with safetensors and the base's tokenizer
TOKENIZER = "data/sft_v1/tokenizer"  # folder written by prepare_data.py
OUTPUT_DIR = "checkpoints/base"  # folder to write; it must not hold anything yet

# ==== Reading ====

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def load_tokenizer(folder):
    """Return the `Tokenizer` of the file tokenizer.json in `folder`."""
    try:
        return Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise SystemExit(f"{folder}: no readable tokenizer.json ({error}).") from None


def check_extension(base, extended, folder):
    """Return {token: id} of what `extended` adds to `base`. Raises: SystemExit if it changes anything else."""
    old, new = base.get_vocab(with_added_tokens=True), extended.get_vocab(with_added_tokens=True)
    moved = next((token for token, place in old.items() if new.get(token) != place), None)
    if moved is not None:
        raise SystemExit(
            f"{folder} is no extension of the base's tokenizer: token {moved!r} is {old[moved]} there and "
            f"{new.get(moved, 'missing')} here. Run prepare_data.py again with this base."
        )
    before, after = (json.loads(tokenizer.to_str()) for tokenizer in (base, extended))
    for part in ("model", "normalizer", "pre_tokenizer", "decoder"):
        if before[part] != after[part]:
            raise SystemExit(f"{folder} is no extension of the base's tokenizer: its {part} differs.")
    return {token: place for token, place in sorted(new.items(), key=lambda item: item[1]) if token not in old}


def shards(folder):
    """Return {file name: [tensor names]} of the safetensors in `folder`, one file or several with an index.

    Raises: SystemExit if there are none or one that the index names is missing.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        files = sorted(set(checkpoints.read_json(index, "your download").get("weight_map", {}).values()))
    if missing := [name for name in files if not (folder / name).is_file()]:
        found = sorted(path.name for path in folder.glob("*.bin")) or ["no weights"]
        raise SystemExit(f"{folder} has no {missing[0]}, but {found[0]}. Only safetensors are read: save it as such.")
    names = {}
    for name in files:
        try:
            with safe_open(folder / name, "pt") as file:
                names[name] = list(file.keys())
        except Exception as error:  # safetensors raises its own SafetensorError
            raise SystemExit(f"{folder / name} is no readable safetensors file ({error}).") from None
    return names


def check_base(config, layout, folder):
    """Return whether both embeddings are tied. Raises: SystemExit if the folder is not a Llama-like model."""
    names = [name for tensors in layout.values() for name in tensors]
    tied = config.get("tie_word_embeddings", False)
    if EMBEDDING not in names:
        raise SystemExit(f"{folder} has no tensor {EMBEDDING}: it is not a Llama-like model.")
    if not tied and HEAD not in names:
        raise SystemExit(f"{folder}: config.json says untied embeddings, but there is no tensor {HEAD}.")
    return tied


# ==== Writing ====


def resized(rows, real, new_ids, vocabulary):
    """Return `rows` [old rows, hidden] with at least `vocabulary` rows, those at `new_ids` set to the mean of `real`.

    rows: any float dtype, which is kept; real: int64 ids of the base tokenizer's tokens. The mean is taken in float32.
    """
    result = rows.new_zeros(max(len(rows), vocabulary), rows.shape[1])
    result[: len(rows)] = rows
    result[new_ids] = rows[real].float().mean(dim=0).to(rows.dtype)
    return result


def write_weights(base, layout, output, change):
    """Copy the shards one by one from `base` to `output`, passing each tensor through `change(name, tensor)`."""
    total, weight_map = 0, {}
    for file_name, names in layout.items():
        with safe_open(base / file_name, "pt") as file:
            tensors = {name: change(name, file.get_tensor(name)) for name in names}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        save_file(tensors, output / file_name, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, file_name)
    if len(layout) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_configs(base, output, config, tokenizer_dir, tokenizer, rows):
    """Write config.json and generation_config.json that agree with the prepared tokenizer, and copy that tokenizer."""
    names = checkpoints.read_json(Path(tokenizer_dir) / "tokenizer_config.json", "prepare_data.py")
    ids = {kind: tokenizer.token_to_id(names[f"{kind}_token"]) for kind in ("eos", "pad")}
    before = config.get("eos_token_id")
    generation = base / "generation_config.json"
    generation = checkpoints.read_json(generation, "your download") if generation.is_file() else {}
    stops = generation.get("eos_token_id", before)
    stops = stops if isinstance(stops, list) else [stops]
    generation["eos_token_id"] = list(dict.fromkeys([ids["eos"], *(stop for stop in stops if stop is not None)]))
    generation["pad_token_id"] = ids["pad"]
    generation.pop("_from_model_config", None)
    config = config | {"vocab_size": rows, "eos_token_id": ids["eos"], "pad_token_id": ids["pad"]}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in Path(tokenizer_dir).iterdir():
        shutil.copyfile(path, output / path.name)


# ==== Verification ====


def verify(base, output, new_ids, real, tied):
    """Load both folders with transformers and compare them. Raises: SystemExit naming what differs.

    Checked: the tie, every old row's bits, every new row against the mean, all other tensors' bits, old logits.
    """
    old, new = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval() for folder in (base, output))
    embeddings = new.get_input_embeddings().weight
    if (embeddings.data_ptr() == new.get_output_embeddings().weight.data_ptr()) is not tied:
        raise SystemExit(
            f"{output}: input and output embedding are {'not ' if tied else ''}one tensor after reloading."
        )
    parts = dict(new.named_parameters())
    kept = torch.ones(old.get_input_embeddings().num_embeddings, dtype=torch.bool)
    kept[[place for place in new_ids if place < len(kept)]] = False
    for name, tensor in old.named_parameters():
        result = parts.pop(name)
        if name in (EMBEDDING, HEAD):
            mean = tensor[real].float().mean(dim=0).to(tensor.dtype)
            if not (result[new_ids] == mean).all():
                raise SystemExit(f"{output}: a new row of {name} is not the mean of the old ones.")
            tensor, result = tensor[kept], result[: len(kept)][kept]
        if not torch.equal(tensor, result):
            raise SystemExit(f"{output}: {name} changed.")
    if parts:
        raise SystemExit(f"{output} has a tensor more than the base: {next(iter(parts))}.")
    prompt = real[:: max(1, len(real) // 16)][None]
    with torch.no_grad():
        before, after = (model(input_ids=prompt).logits for model in (old, new))
    if not torch.equal(before[..., kept], after[..., : len(kept)][..., kept]):
        raise SystemExit(f"{output}: logits of old tokens changed.")
    return embeddings.shape[0]


# ==== Main ====


def main(run):
    """Write the resized model as the settings `run` (dict) say, and verify it."""
    base, output = Path(BASE_MODEL), Path(OUTPUT_DIR)
    staging = checkpoints.start_folder(output)
    config = checkpoints.read_json(base / "config.json", "import_base.py or your download")
    base_tokenizer, tokenizer = load_tokenizer(base), load_tokenizer(TOKENIZER)
    new = check_extension(base_tokenizer, tokenizer, TOKENIZER)
    layout = shards(base)
    tied = check_base(config, layout, base)
    new_ids, old_ids = list(new.values()), sorted(base_tokenizer.get_vocab(with_added_tokens=True).values())
    real = torch.tensor(old_ids)
    if old_ids[-1] >= config["vocab_size"]:
        raise SystemExit(f"{base}: its tokenizer has the id {old_ids[-1]}, its model only {config['vocab_size']} rows.")
    vocabulary = max(old_ids[-1], *new_ids) + 1 if new_ids else old_ids[-1] + 1
    rows = max(config["vocab_size"], vocabulary)

    def change(name, tensor):
        if tied and name == HEAD:
            return None  # the same tensor as the embedding; a second copy could drift apart
        return resized(tensor, real, new_ids, vocabulary) if name in (EMBEDDING, HEAD) else tensor

    write_weights(base, layout, staging, change)
    write_configs(base, staging, config, TOKENIZER, tokenizer, rows)
    facts = {
        "base": BASE_MODEL,
        "base_rows": config["vocab_size"],
        "rows": rows,
        "tied": tied,
        "new_ids": new,
        "averaged_rows": len(old_ids),
        "tokenizer_sha256": checkpoints.sha256(staging / "tokenizer.json"),
    }
    (staging / "resize.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    verify(base, staging, new_ids, real, tied)
    checkpoints.finish_folder(staging, output)
    print(f"{BASE_MODEL} -> {OUTPUT_DIR}: {facts['base_rows']:,} -> {rows:,} rows, {'tied' if tied else 'untied'}")
    for token, place in new.items():
        print(f"  {place:>6}  {token}  = mean of {len(old_ids):,} rows")
    if rows > vocabulary:
        print(f"  {rows - vocabulary:,} rows beyond the last token are the base's own padding and stay")
    print("verified: old rows and old logits bit-identical, new rows the mean, tie kept, configs and tokenizer agree")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
