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
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from sft import hf_folder, settings, system
from sft.data import chatml
from sft.hf_folder import EMBEDDING, HEAD

# ---- Files ----
BASE_MODEL = "models/base"  # Hugging Face folder with safetensors and the base's tokenizer
TOKENIZER = "data/sft_v1/tokenizer"  # folder written by prepare_data.py
OUTPUT_DIR = "checkpoints/base"  # folder to write; it must not hold anything yet

# ==== Reading ====

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


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
    added = {token: place for token, place in sorted(new.items(), key=lambda item: item[1]) if token not in old}
    taken = {place: token for token, place in [*added.items(), *old.items()]}
    if clash := next((token for token, place in added.items() if taken[place] != token), None):
        # The tokenizers library counts tokens to find the next id; a vocabulary with holes has that id already.
        raise SystemExit(
            f"{folder}: the new token {clash!r} has the id {added[clash]} of {taken[added[clash]]!r}, so one row would "
            "mean both. Fill the holes in the base tokenizer's ids, then run prepare_data.py again."
        )
    return added


def check_base(config, layout, folder):
    """Return (rows of the embedding, whether the head is tied to it).

    Raises: SystemExit if the folder is not a Llama-like model, or its config.json does not describe its tensors.
    """
    try:
        tied = AutoConfig.from_pretrained(folder).tie_word_embeddings
    except Exception as error:  # whatever transformers raises about a config.json that it cannot read
        raise SystemExit(f"{folder / 'config.json'} describes no model that transformers knows ({error}).") from None
    tables = {}
    for file_name, names in layout.items():
        with safe_open(folder / file_name, "pt") as file:
            tables |= {name: file.get_tensor(name) for name in names if name in (EMBEDDING, HEAD)}
    if EMBEDDING not in tables:
        raise SystemExit(f"{folder} has no tensor {EMBEDDING}: it is not a Llama-like model.")
    if not tied and HEAD not in tables:
        raise SystemExit(f"{folder}: config.json says untied embeddings, but there is no tensor {HEAD}.")
    for name, table in tables.items():
        if len(table) != config.get("vocab_size"):
            raise SystemExit(
                f"{folder}: {name} has {len(table)} rows, but config.json says vocab_size {config.get('vocab_size')}. "
                "Correct config.json, or export the base again."
            )
    if tied and HEAD in tables and not hf_folder.same_bits(tables[HEAD], tables[EMBEDDING]):
        raise SystemExit(
            f"{folder}: config.json says tied embeddings, but {HEAD} differs from {EMBEDDING}. Set tie_word_embeddings "
            "to false if the model has a head of its own."
        )
    return len(tables[EMBEDDING]), tied


# ==== Writing ====


def resized(rows, real, new_ids, vocabulary):
    """Return `rows` [old rows, hidden] with at least `vocabulary` rows, those at `new_ids` set to the mean of `real`.

    rows: any float dtype, which is kept; real: int64 ids of the base tokenizer's tokens. The mean is taken in float32.
    """
    mean = rows[real].float().mean(dim=0).to(rows.dtype)
    result = mean.repeat(max(len(rows), vocabulary), 1)
    result[: len(rows)] = rows
    result[new_ids] = mean
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


def write_configs(base, output, config, tokenizer_dir, ids, rows):
    """Write config.json and generation_config.json with the prepared tokenizer's `ids`, and copy that tokenizer."""
    generation = base / "generation_config.json"
    generation = system.read_json(generation, "your download") if generation.is_file() else {}
    stops = generation.get("eos_token_id", config.get("eos_token_id"))
    stops = stops if isinstance(stops, list) else [stops]
    ids = {f"{kind}_token_id": place for kind, place in ids.items() if place is not None}
    generation |= ids
    generation["eos_token_id"] = list(dict.fromkeys(stop for stop in [ids["eos_token_id"], *stops] if stop is not None))
    generation.pop("_from_model_config", None)
    for name, content in (("config.json", config | ids | {"vocab_size": rows}), ("generation_config.json", generation)):
        (output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (Path(tokenizer_dir) / name).is_file():
            shutil.copyfile(Path(tokenizer_dir) / name, output / name)


def verify(base, output, new_ids, real, tied):
    """Load both folders with transformers and compare them. Raises: SystemExit naming what differs.

    Checked: the tie, every old row's bits, every new row against the mean, all other tensors' bits, old logits.
    """
    old, new = hf_folder.load_model(base, ""), hf_folder.load_model(output, "")
    embeddings = new.get_input_embeddings().weight
    if (embeddings.data_ptr() == new.get_output_embeddings().weight.data_ptr()) is not tied:
        raise SystemExit(
            f"{output}: input and output embedding are {'not ' if tied else ''}one tensor after reloading."
        )
    parts = dict(new.named_parameters())
    if stray := {name for names in hf_folder.shards(output).values() for name in names} - parts.keys():
        raise SystemExit(
            f"{base}: the tensor {min(stray)} is no parameter of its model. Remove it from the safetensors."
        )
    kept = torch.ones(old.get_input_embeddings().num_embeddings, dtype=torch.bool)
    kept[[place for place in new_ids if place < len(kept)]] = False
    for name, tensor in old.named_parameters():
        result = parts[name]
        if name in (EMBEDDING, HEAD):
            mean = tensor[real].float().mean(dim=0).to(tensor.dtype)
            if not (result[new_ids] == mean).all():
                raise SystemExit(f"{output}: a new row of {name} is not the mean of the old ones.")
            tensor, result = tensor[kept], result[: len(kept)][kept]
        if not hf_folder.same_bits(tensor, result):
            raise SystemExit(f"{output}: {name} changed.")
    prompt = real[:: max(1, len(real) // 16)][None]
    with torch.no_grad():
        before, after = (model(input_ids=prompt).logits for model in (old, new))
    if not hf_folder.same_bits(before[..., kept], after[..., : len(kept)][..., kept]):
        raise SystemExit(f"{output}: logits of old tokens changed.")


# ==== Main ====


def main(run):
    """Write the resized model as the settings `run` (dict) say, and verify it."""
    transformers.utils.logging.disable_progress_bar()
    base, output = Path(BASE_MODEL), Path(OUTPUT_DIR)
    config = system.read_json(base / "config.json", "your download")
    base_tokenizer, tokenizer = hf_folder.load_tokenizer(base), hf_folder.load_tokenizer(TOKENIZER)
    new, ids = check_extension(base_tokenizer, tokenizer, TOKENIZER), chatml.special_ids(TOKENIZER, tokenizer)
    layout = hf_folder.shards(base)
    base_rows, tied = check_base(config, layout, base)
    new_ids, old_ids = list(new.values()), sorted(base_tokenizer.get_vocab(with_added_tokens=True).values())
    real = torch.tensor(old_ids)
    if old_ids[-1] >= base_rows:
        raise SystemExit(f"{base}: its tokenizer has the id {old_ids[-1]}, its model only {base_rows} rows.")
    vocabulary = max(old_ids[-1], *new_ids, 0) + 1
    rows = max(base_rows, vocabulary)

    def change(name, tensor):
        if tied and name == HEAD:
            return None  # the same tensor as the embedding; a second copy could drift apart
        return resized(tensor, real, new_ids, vocabulary) if name in (EMBEDDING, HEAD) else tensor

    facts = {"base": BASE_MODEL, "base_rows": base_rows, "rows": rows, "tied": tied, "new_ids": new}
    facts |= {"averaged_rows": len(old_ids), "tokenizer_sha256": system.sha256(Path(TOKENIZER) / "tokenizer.json")}
    with system.staged(output, "--output-dir") as staging:
        write_weights(base, layout, staging, change)
        write_configs(base, staging, config, TOKENIZER, ids, rows)
        (staging / "resize.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        verify(base, staging, new_ids, real, tied)
    print(f"{BASE_MODEL} -> {OUTPUT_DIR}: {base_rows:,} -> {rows:,} rows, {'tied' if tied else 'untied'}")
    for token, place in new.items():
        print(f"  {place:>6}  {token}  = mean of {len(old_ids):,} rows")
    if rows > vocabulary:
        print(f"  {rows - vocabulary:,} rows beyond the last token are the base's own padding and stay")
    print("verified: old rows and old logits bit-identical, new rows the mean, tie kept, configs and tokenizer agree")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
