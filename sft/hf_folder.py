"""A Hugging Face model folder: shards and index, token names and stop ids, the model loaded strictly.

torch is imported where it computes: prepare_data.py reads token names here, and torch would cost it 0.2 GiB.
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

# ==== Configuration and tokenizer ====


def load_config(folder, remedy):
    """Return the transformers config of `folder`. Raises: SystemExit, ending with `remedy`, if there is none."""
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and huggingface_hub raise several kinds
        raise SystemExit(f"{folder} has no config.json that transformers can read ({error}). {remedy}") from None


def token_names(config, folder):
    """Return {"bos" | "eos" | "unk" | "pad": its text or None} of `config`, the tokenizer_config.json in `folder`.

    Raises: SystemExit if one is no text.
    """
    named = {name: config.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    named = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    for name, token in named.items():
        if token is not None and (not isinstance(token, str) or re.search("[\ud800-\udfff]", token)):
            raise SystemExit(f"{folder}: the {name}_token of its tokenizer_config.json is no text. Correct it.")
    return named


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
        raise SystemExit(f"{folder}: no readable tokenizer.json ({error}).") from None


# ==== Weights ====


def shards(folder):
    """Return {file name: [tensor names]} of the safetensors in `folder`, one file or several with an index.

    Raises: SystemExit if there are none or one that the index names is missing.
    """
    folder = Path(folder)
    index, promised = folder / "model.safetensors.index.json", None
    parts = ["model.safetensors"]
    if index.is_file():
        promised = system.read_json(index, "your download").get("weight_map")
        if not isinstance(promised, dict) or any(Path(name).name != name for name in map(str, promised.values())):
            raise SystemExit(f"{index} holds no map from tensors to files of that folder. Download the model again.")
        parts = sorted(set(promised.values()))
    if missing := [name for name in parts if not (folder / name).is_file()]:
        if found := sorted(path.name for path in folder.glob("*.bin")):
            raise SystemExit(f"{folder} has {found[0]}, but no {missing[0]}. Only safetensors are read: save it so.")
        raise SystemExit(f"{folder} has no {missing[0]}. Name the folder that holds the model.")
    names = {}
    for name in parts:
        try:
            with safe_open(folder / name, "pt") as file:
                names[name] = list(file.keys())
        except Exception as error:  # safetensors raises its own SafetensorError
            raise SystemExit(f"{folder / name} is no readable safetensors file ({error}).") from None
    held = {tensor: name for name, tensors in names.items() for tensor in tensors}
    if promised is not None and held != promised:
        wrong = sorted(held.items() ^ promised.items())[0][0]
        raise SystemExit(f"{index} and the files disagree about the tensor {wrong}. Download the model again.")
    return names


def write_index(folder, layout, total_size):
    """Write the index of several safetensors files into `folder`; one file needs none.

    layout: {file name: [tensor names]}; total_size: bytes of all tensors.
    """
    if len(layout) > 1:
        weight_map = {name: file_name for file_name, names in layout.items() for name in names}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def same_bits(first, second):
    """Return whether two tensors have the same dtype, shape and bits (0.0 and -0.0 differ, NaN equals itself)."""
    import torch

    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(*(tensor.detach().contiguous().view(torch.uint8) for tensor in (first, second)))


def load_model(folder, remedy, dtype="auto", **options):
    """Return the causal model in `folder`, in evaluation mode, on the CPU.

    dtype: a torch.dtype or "auto"; options: more of `from_pretrained`; remedy: the sentence that ends a refusal.
    Raises: SystemExit unless it loads and every tensor finds its place.
    """
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:  # transformers, safetensors and json each raise their own
        raise SystemExit(
            f"{folder} is no model folder that loads ({type(error).__name__}: {error}). {remedy}"
        ) from None
    if problems := {kind.replace("_", " "): sorted(names) for kind, names in info.items() if names}:
        raise SystemExit(f"{folder} does not load strictly: {problems}. {remedy}")
    return model.eval()
