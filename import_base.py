"""Step 0: turn a pretraining checkpoint into the base model's Hugging Face folder, and prove that it reads.

Reads   a checkpoint of a pretraining script: a DCP folder (FSDP1 or FSDP2), a `torch.save` file or safetensors, with
        Hugging Face's or Meta's names; and its tokenizer.
Writes  models/base/: config, generation_config, safetensors in the checkpoint's precision, tokenizer.

    python import_base.py --checkpoint pretrain/step_040000 --tokenizer pretrain/tokenizer.model

The model's shape stands below. The two ways to lay out rotary pairs in a head, halves (Hugging Face) and neighbours
(Meta), cannot be told from the file: the model is measured on plain text both ways, and the better one is kept. A
model that cannot read is refused. Skip this step if the base is a Hugging Face folder already.
"""

import json
import pickle
import re
import warnings
from pathlib import Path

import huggingface_hub
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from sft import hf_folder, settings, system
from sft.data import sentencepiece_tokenizer
from sft.evaluation import reading_check

# ---- Files ----
CHECKPOINT = "pretrain/step_040000"  # DCP folder | torch.save file | .safetensors file or a folder of them
TOKENIZER = "pretrain/tokenizer.model"  # SentencePiece file | tokenizer.json; a tokenizer_config.json beside it is read
OUTPUT_DIR = "models/base"  # folder to write; it must not hold anything yet
# ---- The model's shape: Genesis 1B ----
VOCAB_SIZE = 49_152  # rows of the embedding
HIDDEN_SIZE = 1536  # width of the residual stream
LAYERS = 32  # blocks
HEADS = 12  # query heads; HIDDEN_SIZE / HEADS is the width of a head
KV_HEADS = 6  # key and value heads
INTERMEDIATE_SIZE = 4736  # width of SwiGLU
ROPE_THETA = 500_000.0  # base of the rotary frequencies; plain text hardly shows a wrong one
RMS_NORM_EPS = 1e-5  # added under the root of the norms; Meta's is 1e-5
CONTEXT = 2048  # tokens, the length it was trained on
# ---- Special tokens ----
ADD_BOS = True  # a tokenizer.model: put the BOS in front of a text, as pretraining did
BOS_TOKEN = "<s>"  # of a tokenizer.json without tokenizer_config.json; "" for none
EOS_TOKEN = "</s>"  # likewise: the token that ends a document
# ---- Proof ----
EXPECTED_LOSS = 1.93  # nats per token at the end of pretraining, to be compared with; 0 = unknown
IGNORE = ("inv_freq", "freqs_cis", "freqs_cos", "freqs_sin", "mask")  # last parts of names that hold no weights

# ==== Names ====

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
META = {
    "tok_embeddings": "embed_tokens",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def hugging_face_name(name):
    """Return what `name` of a checkpoint is called in a Hugging Face Llama; any other name stays as it is."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    core = re.sub(r"^(model\.)+", "", name)
    if core in ("output.weight", hf_folder.HEAD):
        return hf_folder.HEAD
    layer, part = re.fullmatch(r"(layers\.\d+\.)?(.+?)", core.removesuffix(".weight")).groups(default="")
    return f"model.{layer}{META.get(part, part)}.weight" if core.endswith(".weight") else name


# ==== Reading: {(state, name): shape and dtype}, and a function that reads some of them ====

PICKLED = {  # all that the `.metadata` of a DCP folder is made of, beside the dtypes
    "torch.distributed.checkpoint.metadata": (
        "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties MetadataIndex "
        "StorageMeta _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed._shard.sharded_tensor.metadata": "TensorProperties MEM_FORMAT_ENCODING",
    "torch.serialization": "_get_layout",
    "torch": "Size",
    "pathlib": "PosixPath",
    "collections": "OrderedDict",
}


class MetadataUnpickler(pickle.Unpickler):
    """Reads a `.metadata` that someone else wrote: a pickle may name any function to run, this one may not."""

    def find_class(self, module, name):
        if name in PICKLED.get(module, "").split() or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no DCP metadata needs")


class ForeignReader(dcp.FileSystemReader):
    """DCP's reader of a folder, with the restricted unpickler."""

    def read_metadata(self, *args, **kwargs):
        """Return the `Metadata` of the folder. Raises: SystemExit if it is none or names what it must not."""
        try:
            with (Path(self.path) / ".metadata").open("rb") as file:
                metadata = MetadataUnpickler(file).load()
            stored = {index.fqn for index in metadata.storage_data}
            if stored != metadata.state_dict_metadata.keys():
                raise ValueError("its lists of names differ")
        except Exception as error:  # a damaged pickle raises whatever its bytes spell
            raise SystemExit(f"{self.path}: its .metadata cannot be read ({error}). Choose another one.") from None
        return metadata


def open_dcp(folder):
    """Return (entries, read) of a DCP folder. Raises: SystemExit if a file is missing or cut short."""
    reader = ForeignReader(str(folder))
    metadata = reader.read_metadata()
    ends = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size < end:
            raise SystemExit(
                f"{folder} is half-written: its file {name} has {size:,} bytes of {end:,}. Choose another."
            )
    paths = metadata.planner_data or {}
    keys = {}
    for key, entry in metadata.state_dict_metadata.items():
        if hasattr(entry, "size"):
            *state, name = paths.get(key, (key,))
            keys[".".join(map(str, state)), str(name)] = key
    stored = {place: metadata.state_dict_metadata[key] for place, key in keys.items()}

    def read(places):
        tensors = {keys[p]: torch.empty(stored[p].size, dtype=stored[p].properties.dtype) for p in places}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is ")  # one process is what is meant
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        return {p: tensors[keys[p]] for p in places}

    return {p: (entry.size, entry.properties.dtype) for p, entry in stored.items()}, read


def flattened(value, state=""):
    """Yield ((state, name), tensor) of nested dicts; `state` is the dotted path of a tensor's dict."""
    for name, part in value.items():
        if isinstance(part, dict):
            yield from flattened(part, f"{state}.{name}".lstrip("."))
        elif isinstance(part, torch.Tensor):
            yield (state, str(name)), part


def open_files(path):
    """Return (entries, read) of a torch.save file, which may run no code, or of safetensors."""
    parts = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not parts:
        raise SystemExit(f"{path} has neither .metadata nor *.safetensors: its save never finished, or it is no model.")
    held = {}
    for file in parts:
        try:
            if file.suffix == ".safetensors":
                held |= {("", name): tensor for name, tensor in load_file(file).items()}
            else:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                held |= dict(flattened(content if isinstance(content, dict) else {}))
        except Exception as error:  # torch, pickle, zipfile and safetensors raise their own
            raise SystemExit(f"{file} cannot be read ({str(error).splitlines()[0]}). Choose another one.") from None
    entries = {place: (part.shape, part.dtype) for place, part in held.items()}
    return entries, lambda places: {place: held[place] for place in places}


def choose(entries, expected, ignore, checkpoint):
    """Return {Hugging Face name: place in the checkpoint} of the weights in `entries`.

    expected: {name: shape}; ignore: last parts of names that hold no weights. The weights are where most names fit; the
    optimizer and other state beside them are left out.
    Raises: SystemExit with the full list of names that do not fit, are missing, or have another shape.
    """
    states = {}
    for state, name in entries:
        if name.rpartition(".")[2] not in ignore:
            states.setdefault(state, {}).setdefault(hugging_face_name(name), []).append((state, name))
    if not states:
        raise SystemExit(f"{checkpoint} holds no tensors with names. Name the checkpoint of the model.")
    fitting = {state: (len(names.keys() & expected.keys()), state.endswith("model")) for state, names in states.items()}
    found = states[max(fitting, key=fitting.get)]
    problems = [f"twice: {', '.join(name for _, name in places)}" for places in found.values() if len(places) > 1]
    problems += [f"unmatched: {places[0][1]}" for name, places in found.items() if name not in expected]
    # Without a head of its own the model is tied.
    problems += [f"missing: {name}" for name in expected if name not in found and name != hf_folder.HEAD]
    for name in expected.keys() & found.keys():
        shape, dtype = entries[found[name][0]]
        if shape != expected[name] or not dtype.is_floating_point:
            problems.append(f"shape: {found[name][0][1]} {[*shape]} {dtype} there, {[*expected[name]]} here")
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise SystemExit(
            f"{checkpoint} does not fit the shape at the top of import_base.py. Correct the shape, or name the state's "
            f"own names in IGNORE. All {len(problems)} differences:\n  {listed}"
        )
    return {name: places[0] for name, places in found.items()}


# ==== Model and tokenizer ====


def make_config(run):
    """Return the LlamaConfig of the settings `run`. Raises: SystemExit if they are no shape."""
    head, rest = divmod(run["HIDDEN_SIZE"], max(1, run["HEADS"]))
    if min(run[name] for name in ("VOCAB_SIZE", "LAYERS", "HEADS", "KV_HEADS", "INTERMEDIATE_SIZE", "CONTEXT")) < 1:
        raise SystemExit("every number of the model's shape must be at least 1.")
    if rest or head % 2 or run["HEADS"] % run["KV_HEADS"]:
        raise SystemExit("HIDDEN_SIZE must be HEADS times an even number, and HEADS a multiple of KV_HEADS.")
    return LlamaConfig(
        vocab_size=run["VOCAB_SIZE"],
        hidden_size=run["HIDDEN_SIZE"],
        num_hidden_layers=run["LAYERS"],
        num_attention_heads=run["HEADS"],
        num_key_value_heads=run["KV_HEADS"],
        intermediate_size=run["INTERMEDIATE_SIZE"],
        rope_parameters={"rope_theta": run["ROPE_THETA"], "rope_type": "default"},
        rms_norm_eps=run["RMS_NORM_EPS"],
        max_position_embeddings=run["CONTEXT"],
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )


def read_tokenizer(path, run):
    """Return (`Tokenizer`, {"bos_token" and so on: its name}) of a tokenizer.model or tokenizer.json."""
    if not path.is_file():
        raise SystemExit(f"{path} is missing. Name the tokenizer.model or tokenizer.json with --tokenizer.")
    if path.suffix == ".json":
        tokenizer = hf_folder.load_tokenizer(path.parent)
        names = {"bos_token": run["BOS_TOKEN"] or None, "eos_token": run["EOS_TOKEN"]}
        if (path.parent / "tokenizer_config.json").is_file():
            config = system.read_json(path.parent / "tokenizer_config.json", "your tokenizer's script")
            names = {f"{kind}_token": token for kind, token in hf_folder.token_names(config, path.parent).items()}
    else:
        tokenizer, names = sentencepiece_tokenizer.convert(
            path, run["ADD_BOS"], reading_check.PASSAGE.read_text("utf-8")
        )
    names = {kind: token for kind, token in names.items() if token}
    if unknown := [f"{kind} {token!r}" for kind, token in names.items() if tokenizer.token_to_id(token) is None]:
        raise SystemExit(f"{path} has no {', '.join(unknown)}. Name its own with --bos-token and --eos-token.")
    if "eos_token" not in names:
        raise SystemExit(f"{path} names no token that ends a document. Name it with --eos-token.")
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if size > run["VOCAB_SIZE"]:
        raise SystemExit(f"{path} has {size:,} tokens, VOCAB_SIZE is {run['VOCAB_SIZE']:,}: it is another model's.")
    return tokenizer, names


def other_layout(weight, heads):
    """Return a query or key matrix [heads * width, hidden] from neighbours (Meta) to halves (Hugging Face)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def to_halves(state, config):
    """Return the `state` {name: tensor} with every query and key matrix changed from neighbours to halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    kinds = {name: name.split(".")[-2] for name in state}
    return {n: other_layout(part, heads[kinds[n]]) if kinds[n] in heads else part for n, part in state.items()}


def write(state, config, folder):
    """Write `state` {name: tensor} as safetensors, and its config, into `folder`."""
    huggingface_hub.save_torch_state_dict({name: part.contiguous() for name, part in state.items()}, folder)
    config.save_pretrained(folder)


def write_tokenizer(tokenizer, names, ids, context, folder):
    """Write tokenizer.json, tokenizer_config.json and generation_config.json into `folder`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
    config |= {"clean_up_tokenization_spaces": False} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    GenerationConfig(**ids).save_pretrained(folder)


def better_layout(state, config, folder):
    """Return (`state` in the rotary layout in which the model reads better, what was measured), written on the way."""
    write(state, config, folder)
    model, tokenizer = hf_folder.load_model(folder, "", torch.float32), AutoTokenizer.from_pretrained(folder)
    halves, changed = reading_check.loss(model, tokenizer), to_halves(state, config)
    model.load_state_dict(changed, strict=False)
    neighbours = reading_check.loss(model, tokenizer)
    told = f"{halves:.2f} nats per token read as halves, {neighbours:.2f} as neighbours"
    if neighbours < halves:
        return changed, f"{told}: neighbours, permuted to halves"
    return state, f"{told}: halves"


# ==== Main ====


def main(run):
    """Import as the settings `run` (dict) say."""
    transformers.utils.logging.disable_progress_bar()
    checkpoint, output = Path(CHECKPOINT), Path(OUTPUT_DIR)
    system.refuse_unless_empty(output, "--output-dir")
    config = make_config(run)
    tokenizer, names = read_tokenizer(Path(TOKENIZER), run)
    if not checkpoint.exists():
        raise SystemExit(f"{checkpoint} does not exist. Name the pretraining checkpoint with --checkpoint.")
    entries, read = (open_dcp if (checkpoint / ".metadata").is_file() else open_files)(checkpoint)
    with torch.device("meta"):
        expected = {name: part.shape for name, part in LlamaForCausalLM(config).named_parameters()}
    places = choose(entries, expected, IGNORE, checkpoint)
    try:
        tensors = read(list(places.values()))
    except (Exception, dcp.CheckpointException) as error:
        raise SystemExit(f"{checkpoint} cannot be read ({error}). Choose another one.") from None
    dtype = max((entries[place][1] for place in places.values()), key=lambda dtype: dtype.itemsize)
    state = {name: tensors[place].to(dtype) for name, place in places.items()}
    if wrong := [name for name, part in state.items() if not part.isfinite().all()]:
        raise SystemExit(f"{checkpoint}: {wrong[0]} is not finite. Choose an earlier checkpoint.")
    tied = torch.equal(state.get(hf_folder.HEAD, state[hf_folder.EMBEDDING]), state[hf_folder.EMBEDDING])
    if tied:
        state.pop(hf_folder.HEAD, None)
    ids = {f"{kind}_token_id": tokenizer.token_to_id(names.get(f"{kind}_token", "")) for kind in ("bos", "eos")}
    config.update(ids | {"tie_word_embeddings": tied, "dtype": str(dtype).removeprefix("torch.")})

    with system.staged(output, "--output-dir") as staging:
        write_tokenizer(tokenizer, names, ids, CONTEXT, staging)
        state, told = better_layout(state, config, staging)
        write(state, config, staging)
        nats = reading_check.loss(
            hf_folder.load_model(staging, "", torch.float32), AutoTokenizer.from_pretrained(staging)
        )
        line, reads = reading_check.verdict(nats, VOCAB_SIZE, EXPECTED_LOSS)
        print(f"rotary pairs: {told}\n{line}")
        if not reads:
            raise SystemExit(f"{checkpoint}: this model cannot read; nothing was written. {reading_check.CAUSES}")
    count, rows = sum(part.numel() for part in state.values()), VOCAB_SIZE - tokenizer.get_vocab_size()
    print(
        f"{CHECKPOINT} -> {OUTPUT_DIR}: {len(state)} tensors, {count:,} parameters in {config.dtype}, "
        f"{'tied' if tied else 'untied'}; {len(entries) - len(places)} other tensors left out"
        + (f"; {rows:,} rows without a token" if rows else "")
    )


if __name__ == "__main__":
    main(settings.from_flags(globals()))
