"""A Hugging Face model folder: configuration, tokenizer, shards and index, the model loaded strictly, its answers.

It imports torch where it computes: prepare_data.py reads token names here, and torch would cost it 0.2 GiB.
"""

import json
import re
from pathlib import Path

import transformers
from safetensors import safe_open
from tokenizers import Tokenizer

from sft import system

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
WITHOUT_EFFECT = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}  # on what is computed

# ==== Configuration and tokenizer ====


def check_is_folder(folder, remedy):
    """Raise SystemExit, ending with `remedy`, unless `folder` exists: transformers would take its name for a hub id."""
    if not Path(folder).is_dir():
        raise SystemExit(f"{folder} is not a folder. {remedy}")


def load_config(folder, remedy):
    """Return the transformers config of `folder`. Raises: SystemExit, ending with `remedy`, if there is none."""
    check_is_folder(folder, remedy)
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and huggingface_hub raise several kinds
        raise SystemExit(f"{folder} has no config.json that transformers can read ({error}). {remedy}") from None


def token_names(config, folder):
    """Return {"bos" | "eos" | "unk" | "pad": its text or None} of `config`, the tokenizer_config.json in `folder`.

    Raises: SystemExit if one is not text.
    """
    names = {}
    for kind in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{kind}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None and (not isinstance(token, str) or re.search("[\ud800-\udfff]", token)):
            raise SystemExit(f"{folder}: the {kind}_token of its tokenizer_config.json is not text. Correct it.")
        names[kind] = token
    return names


def stop_ids(generation):
    """Return the list of ids at which generation stops, from a GenerationConfig or the dict of its JSON; may be []."""
    ids = generation.get("eos_token_id") if isinstance(generation, dict) else generation.eos_token_id
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def load_tokenizer(folder):
    """Return the `Tokenizer` of the file tokenizer.json in `folder`."""
    try:
        return Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise SystemExit(f"{folder}: no readable tokenizer.json ({error}). Get it again.") from None


# ==== What a model is ====


def tokenizer_digests(folder):
    """Return {name: SHA-256, or None without such a file} of the TOKENIZER_FILES in `folder`."""
    paths = {name: Path(folder) / name for name in TOKENIZER_FILES}
    return {name: system.sha256(path) if path.is_file() else None for name, path in paths.items()}


def configuration(folder):
    """Return all but the weights that decides what the model in `folder` reads, computes and stops at, a flat dict.

    It has "config.json KEY" for each key with an effect, "generation_config.json KEY" for the special tokens (the rest
    is how to sample, which is the user's choice), and the tokenizer's digests by file name.
    Raises: SystemExit if one of the two files is missing or damaged.
    """
    parts = {}
    for name in ("config.json", "generation_config.json"):
        for key, value in system.read_json(Path(folder) / name, "resize_vocab.py").items():
            if key.endswith("_token_id") or (name == "config.json" and key not in WITHOUT_EFFECT):
                parts |= flattened(f"{name} {key}", value)
    return parts | tokenizer_digests(folder)


def flattened(name, value):
    """Return {dotted name: value} of a JSON value: a dict inside it gives one entry for each of its keys."""
    if not isinstance(value, dict):
        return {name: value}
    entries = {}
    for key, part in value.items():
        entries |= flattened(f"{name}.{key}", part)
    return entries


def fingerprint(folder, weights=None):
    """Return `configuration` and "weights", the SHA-256 of the safetensors: two folders with the same are one model.

    weights: their `system.weight_digests`, where the caller has them already.
    """
    weights = system.weight_digests(folder) if weights is None else weights
    return {"weights": system.joint_digest(weights)} | configuration(folder)


# ==== Weights ====


def shards(folder):
    """Return {file name: [tensor names]} of the safetensors in `folder`, one file or several with an index.

    Raises: SystemExit if there are none, one that the index names is missing, or index and files disagree.
    """
    folder = Path(folder)
    weight_map = read_index(folder)
    file_names = ["model.safetensors"] if weight_map is None else sorted(set(weight_map.values()))
    if missing := [name for name in file_names if not (folder / name).is_file()]:
        if pickles := sorted(path.name for path in folder.glob("*.bin")):
            raise SystemExit(
                f"{folder} has {pickles[0]}, but no {missing[0]}. Only safetensors are read: save the model in that "
                "format."
            )
        raise SystemExit(f"{folder} has no {missing[0]}. Name the folder that holds the model.")
    layout = {}
    for name in file_names:
        try:
            with safe_open(folder / name, "pt") as file:
                layout[name] = list(file.keys())
        except Exception as error:  # safetensors raises its own SafetensorError
            raise SystemExit(f"{folder / name} is not a readable safetensors file ({error}). Get it again.") from None
    in_files = {tensor: name for name, tensors in layout.items() for tensor in tensors}
    if weight_map is not None and in_files != weight_map:
        tensor = min(in_files.items() ^ weight_map.items())[0]
        raise SystemExit(
            f"{folder / INDEX} and the files disagree about the tensor {tensor}. Download the model again."
        )
    return layout


def read_tensor(folder, name):
    """Return the tensor `name` of the model in `folder`, as it is stored."""
    weight_map = read_index(folder)
    file_name = "model.safetensors" if weight_map is None else weight_map[name]
    with safe_open(Path(folder) / file_name, "pt") as file:
        return file.get_tensor(name)


def read_index(folder):
    """Return {tensor name: file name} of the index in `folder`, or None if it has none."""
    path = Path(folder) / INDEX
    if not path.is_file():
        return None
    weight_map = system.read_json(path).get("weight_map")
    file_names = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in file_names):
        raise SystemExit(f"{path} has no map from tensors to files of that folder. Download the model again.")
    return weight_map


def write_index(folder, layout, total_size):
    """Write the index of several safetensors files into `folder`; one file needs none.

    layout: {file name: [tensor names]}; total_size: bytes of all tensors.
    """
    if len(layout) > 1:
        weight_map = {name: file_name for file_name, names in layout.items() for name in names}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (Path(folder) / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def save_weights(tensors, path):
    """Write `tensors` {name: tensor} as the safetensors file `path`, with the mode of any other new file of this user.

    The library alone would make it readable to this user only.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def same_bits(first, second):
    """Return whether two tensors have the same dtype, shape and bits (0.0 and -0.0 differ, NaN equals itself)."""
    import torch

    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(*(tensor.detach().contiguous().view(torch.uint8) for tensor in (first, second)))


def load_model(folder, remedy, dtype="auto", **options):
    """Return the causal model in `folder`, in evaluation mode, on the CPU.

    dtype: a torch.dtype or "auto"; options: more of `from_pretrained`; remedy: the sentence that ends a refusal.
    Raises: SystemExit unless it loads with exactly the tensors that its configuration describes.
    """
    check_is_folder(folder, remedy)
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:  # transformers, safetensors and json each raise their own
        raise SystemExit(f"{folder} can't be loaded as a model ({type(error).__name__}: {error}). {remedy}") from None
    if problems := {kind.replace("_", " "): sorted(names) for kind, names in info.items() if names}:
        raise SystemExit(f"{folder} does not load strictly: {problems}. {remedy}")
    return model.eval()


# ==== Answers ====


def prompt(tokenizer, turns, device):
    """Return the ids [1, tokens] and attention mask of a conversation that the assistant is to continue, on `device`.

    turns: list of {"role": str, "content": str}; they go through the tokenizer's chat template.
    """
    encoding = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return encoding.to(device)


def answer(model, tokenizer, question, max_new_tokens):
    """Return (greedy answer to `question` through the chat template, whether it ended by itself)."""
    import torch

    inputs = prompt(tokenizer, [{"role": "user", "content": question}], model.device)
    with torch.no_grad():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    ids = output[0, inputs["input_ids"].shape[1] :]
    ended = ids[-1].item() in stop_ids(model.generation_config)
    return tokenizer.decode(ids, skip_special_tokens=True).strip(), ended
