"""Step 0: turn a pretraining checkpoint into the base model's Hugging Face folder, and check that it reads.

Reads   a checkpoint of a pretraining script: a DCP folder (FSDP1 or FSDP2), a `torch.save` file or safetensors, with
        Hugging Face's or Meta's names; and its tokenizer.
Writes  models/base/: config, generation_config, safetensors in the checkpoint's precision, tokenizer.

    python import_base.py --checkpoint pretrain/step_040000 --tokenizer pretrain/tokenizer.model

The tensors show the vocabulary, the width, the layers and the size of the MLP; the settings below give what they do not
show. A file doesn't say which of two rotary layouts it uses, halves (Hugging Face) or neighbours (Meta): the script
measures the model on plain text both ways and keeps the better one. A model that cannot read ends with an error. Skip
this step if the base is a Hugging Face folder already.
"""

import json
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
from sft.training import checkpoints

# ---- Files ----
CHECKPOINT = "pretrain/step_040000"  # DCP folder | torch.save file | .safetensors file or a folder of them
TOKENIZER = "pretrain/tokenizer.model"  # SentencePiece file | tokenizer.json; tokenizer_config.json next to it is read
BASE_MODEL = "models/base"  # folder to write; must be empty or missing
# ---- What the tensors do not show: Genesis 1B ----
HEADS = 12  # query heads; the model's width / HEADS is the width of a head
KV_HEADS = 6  # key and value heads
ROPE_THETA = 500_000.0  # base of the rotary frequencies; plain text hardly shows a wrong one
RMS_NORM_EPS = 1e-5  # added under the root of the norms; Meta's is 1e-5
CONTEXT = 2048  # tokens, the length it was trained on
# ---- Special tokens ----
ADD_BOS = True  # a tokenizer.model: put the BOS in front of a text, as pretraining did
BOS_TOKEN = "<s>"  # of a tokenizer.json without tokenizer_config.json; "" for none
EOS_TOKEN = "</s>"  # likewise: the token that ends a document
# ---- Reading check ----
EXPECTED_LOSS = 1.93  # nats per token at the end of pretraining, to compare with; 0 = unknown
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
    if not core.endswith(".weight"):
        return name
    layer, part = re.fullmatch(r"(layers\.\d+\.)?(.*)", core.removesuffix(".weight")).groups(default="")
    return f"model.{layer}{META.get(part, part)}.weight"


def layer_of(name):
    """Return the layer in the Hugging Face name of a weight of a Llama's layer, as digits, or None for another name."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    return match[1] if match and match[2] in META.values() else None


def is_llama_name(name):
    """Return whether a Hugging Face Llama has a weight `name`."""
    return name in (hf_folder.EMBEDDING, "model.norm.weight", hf_folder.HEAD) or layer_of(name) is not None


# ==== Reading a checkpoint ====
#
# A tensor's key is (group, name): group is the dotted path of the dict that holds it, "" at the top. Each function that
# opens a checkpoint returns its entries, {key: (shape, dtype)}, and a function that reads the tensors of some keys.


def check_sizes(folder, metadata):
    """Raise SystemExit if a file of the DCP `folder` is missing or shorter than its `Metadata` says."""
    expected = {}
    for stored in metadata.storage_data.values():
        end = stored.offset + stored.length
        expected[stored.relative_path] = max(expected.get(stored.relative_path, 0), end)
    for name, size in expected.items():
        actual = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if actual < size:
            raise SystemExit(
                f"{folder} is half-written: its file {name} has {actual:,} bytes of {size:,}. Choose another."
            )


def open_dcp(folder):
    """Return (entries, read) of a DCP folder. Raises: SystemExit if a file is missing or cut short."""
    reader = checkpoints.Reader(str(folder))
    metadata = reader.read_metadata()
    check_sizes(folder, metadata)
    paths = metadata.planner_data or {}
    stored_names, entries = {}, {}
    for stored_name, entry in metadata.state_dict_metadata.items():
        *group, name = paths.get(stored_name, (stored_name,))
        key = ".".join(map(str, group)), str(name)
        stored_names[key] = stored_name
        entries[key] = entry.size, entry.properties.dtype

    def read(keys):
        tensors = {stored_names[key]: torch.empty(entries[key][0], dtype=entries[key][1]) for key in keys}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is ")  # a single process is intended
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        return {key: tensors[stored_names[key]] for key in keys}

    return entries, read


def flattened(value, group=""):
    """Yield ((group, name), tensor) of nested dicts."""
    for name, part in value.items():
        if isinstance(part, dict):
            yield from flattened(part, f"{group}.{name}".lstrip("."))
        elif isinstance(part, torch.Tensor):
            yield (group, str(name)), part


def open_files(path):
    """Return (entries, read) of a torch.save file, which may run no code, or of safetensors."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise SystemExit(
            f"{path} has neither .metadata nor *.safetensors: its save never finished, or it isn't "
            "a model. Choose another one."
        )
    tensors = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                tensors |= {("", name): tensor for name, tensor in load_file(file).items()}
            else:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                tensors |= dict(flattened(content if isinstance(content, dict) else {}))
        except Exception as error:  # torch, pickle, zipfile and safetensors raise their own
            raise SystemExit(f"{file} cannot be read ({str(error).splitlines()[0]}). Choose another one.") from None
    entries = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
    return entries, lambda keys: {key: tensors[key] for key in keys}


# ==== Names and shapes ====


def find_weights(entries, ignore, checkpoint):
    """Return {Hugging Face name: [its keys in the checkpoint]} of the group with the most names of a Llama.

    ignore: last parts of names that hold no weights. The optimizer and other groups next to the weights are left out.
    Raises: SystemExit if there is no tensor with a name.
    """
    groups = {}
    for group, name in entries:
        if name.rpartition(".")[2] not in ignore:
            groups.setdefault(group, {}).setdefault(hugging_face_name(name), []).append((group, name))
    if not groups:
        raise SystemExit(f"{checkpoint} holds no tensors with names. Name the checkpoint of the model.")

    def rank(group):
        return sum(is_llama_name(name) for name in groups[group]), group.endswith("model")

    return groups[max(groups, key=rank)]


def shape_of(name, candidates, entries):
    """Return the shape of the tensor with the Hugging Face name `name`, or () if there is none."""
    return entries[candidates[name][0]][0] if name in candidates else ()


def read_shape(candidates, entries, checkpoint):
    """Return what the tensors show of the model's shape, as keyword arguments of LlamaConfig.

    candidates: from `find_weights`. Raises: SystemExit, with all names, without an embedding or an MLP to read it from.
    """
    gates = [name for name in candidates if name.endswith(".mlp.gate_proj.weight")]
    gate = gates[0] if gates else "model.layers.0.mlp.gate_proj.weight"
    shapes = {}
    for name in (hf_folder.EMBEDDING, gate):
        shapes[name] = shape_of(name, candidates, entries)
        if len(shapes[name]) != 2 or 0 in shapes[name]:
            defect = f"has the shape {[*shapes[name]]}" if name in candidates else "is missing"
            listed = "\n  ".join(sorted(key[1] for keys in candidates.values() for key in keys))
            raise SystemExit(
                f"{checkpoint} does not show the shape of a Llama: {name} {defect}. Name the checkpoint of a Llama, "
                f"with Hugging Face's or Meta's names. All names there:\n  {listed}"
            )
    vocab_size, hidden_size = shapes[hf_folder.EMBEDDING]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len({layer_of(name) for name in candidates} - {None}),
        "intermediate_size": shapes[gate][0],
    }


def check_settings(args):
    """Raise SystemExit for a number of heads or a context that no model has."""
    for name in ("HEADS", "KV_HEADS", "CONTEXT"):
        if args[name] < 1:
            raise SystemExit(f"{name} is {args[name]}; it must be at least 1.")
    if args["HEADS"] % args["KV_HEADS"]:
        raise SystemExit(f"HEADS is {args['HEADS']}; it must be a multiple of KV_HEADS, which is {args['KV_HEADS']}.")


def make_config(shape, args):
    """Return the LlamaConfig of the `shape` that the tensors show and the settings `args`."""
    width, heads = shape["hidden_size"], args["HEADS"]
    if width % heads or width // heads % 2:
        raise SystemExit(f"HEADS is {heads}; the model's width, {width}, must be HEADS times an even number.")
    return LlamaConfig(
        **shape,
        num_attention_heads=heads,
        num_key_value_heads=args["KV_HEADS"],
        rope_parameters={"rope_theta": args["ROPE_THETA"], "rope_type": "default"},
        rms_norm_eps=args["RMS_NORM_EPS"],
        max_position_embeddings=args["CONTEXT"],
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )


def expected_shapes(config):
    """Return {name: shape} of the weights of a Llama with this `config` and a head of its own."""
    with torch.device("meta"):
        return {name: part.shape for name, part in LlamaForCausalLM(config).named_parameters()}


def heads_hint(candidates, entries, config):
    """Return a sentence with the ratio of HEADS to KV_HEADS that the key matrix of layer 0 shows, if it is another one.

    A key matrix has width * KV_HEADS / HEADS rows. Returns "" if the ratio is right or the rows show none.
    """
    width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    rows, *_ = shape_of("model.layers.0.self_attn.k_proj.weight", candidates, entries) or [0]
    if rows == 0 or width % rows or rows == width // heads * kv_heads:
        return ""
    return (
        f"Its k_proj has {rows} rows at a width of {width}, so HEADS must be {width // rows} times KV_HEADS; they are "
        f"{heads} and {kv_heads}. "
    )


def match_names(candidates, entries, config, checkpoint):
    """Return {Hugging Face name: its key} of all weights of a Llama with this `config`.

    candidates: from `find_weights`. A head may be missing: the model is then tied.
    Raises: SystemExit with the full list of names that do not fit, are missing, or have another shape.
    """
    expected = expected_shapes(config)
    problems = []
    for name, keys in candidates.items():
        stored_name, (shape, dtype) = keys[0][1], entries[keys[0]]
        if len(keys) > 1:
            problems.append(f"twice: {', '.join(stored_name for _, stored_name in keys)}")
        if name not in expected:
            problems.append(f"unmatched: {stored_name}")
        elif shape != expected[name] or not dtype.is_floating_point:
            problems.append(f"shape: {stored_name} {[*shape]} {dtype} there, {[*expected[name]]} expected")
    for name in expected:
        if name not in candidates and name != hf_folder.HEAD:
            problems.append(f"missing: {name}")
    if problems:
        listed = "\n  ".join(sorted(problems))
        hint = heads_hint(candidates, entries, config)
        raise SystemExit(
            f"{checkpoint} is not the Llama that its embedding, its MLP and the settings describe. {hint}Correct "
            f"--heads and --kv-heads, or name what holds no weights in --ignore. All {len(problems)} differences:\n"
            f"  {listed}"
        )
    return {name: keys[0] for name, keys in candidates.items()}


def read_weights(read, names, checkpoint):
    """Return {Hugging Face name: tensor}, all in the widest of their dtypes.

    read: from `open_dcp` or `open_files`; names: from `match_names`. Raises: SystemExit if a value is not finite.
    """
    try:
        tensors = read(list(names.values()))
    except (Exception, dcp.CheckpointException) as error:
        raise SystemExit(f"{checkpoint} cannot be read ({error}). Choose another one.") from None
    dtype = max((tensor.dtype for tensor in tensors.values()), key=lambda dtype: dtype.itemsize)
    weights = {name: tensors[key].to(dtype) for name, key in names.items()}
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise SystemExit(f"{checkpoint}: {name} is not finite. Choose an earlier checkpoint.")
    return weights


# ==== Tokenizer ====


def read_tokenizer(path, args):
    """Return (`Tokenizer`, {"bos_token" and so on: its text}) of a tokenizer.model or tokenizer.json."""
    if not path.is_file():
        raise SystemExit(f"{path} is missing. Name the tokenizer.model or tokenizer.json with --tokenizer.")
    if path.suffix == ".json":
        tokenizer = hf_folder.load_tokenizer(path.parent)
        names = {"bos_token": args["BOS_TOKEN"], "eos_token": args["EOS_TOKEN"]}
        if (path.parent / "tokenizer_config.json").is_file():
            config = system.read_json(path.parent / "tokenizer_config.json")
            names = {f"{kind}_token": token for kind, token in hf_folder.token_names(config, path.parent).items()}
    else:
        text = reading_check.PASSAGE.read_text("utf-8")
        tokenizer, names = sentencepiece_tokenizer.convert(path, args["ADD_BOS"], text)
    names = {kind: token for kind, token in names.items() if token}
    if unknown := [f"{kind} {token!r}" for kind, token in names.items() if tokenizer.token_to_id(token) is None]:
        raise SystemExit(f"{path} has no {', '.join(unknown)}. Name its own with --bos-token and --eos-token.")
    if "eos_token" not in names:
        raise SystemExit(f"{path} names no token that ends a document. Name it with --eos-token.")
    return tokenizer, names


def check_vocabulary(tokenizer, rows, path):
    """Raise SystemExit if the `tokenizer`, from the file `path`, has ids beyond the `rows` of the embedding."""
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if size > rows:
        raise SystemExit(
            f"{path} has {size:,} tokens, but the model's embedding has {rows:,} rows: this tokenizer belongs to "
            "another model. Name the right one with --tokenizer."
        )


def write_tokenizer(tokenizer, names, token_ids, context, folder):
    """Write tokenizer.json, tokenizer_config.json and generation_config.json into `folder`.

    names: from `read_tokenizer`; token_ids: {"bos_token_id" | "eos_token_id": id or None}; context: tokens.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config | names, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    GenerationConfig(**token_ids).save_pretrained(folder)


# ==== Rotary layout ====


def swap_layout(weight, heads):
    """Return a query or key matrix [heads * width, hidden] from neighbours (Meta) to halves (Hugging Face)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def to_halves(weights, config):
    """Return `weights` {name: tensor} with every query and key matrix changed from neighbours to halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    changed = {}
    for name, tensor in weights.items():
        kind = name.split(".")[-2]
        changed[name] = swap_layout(tensor, heads[kind]) if kind in heads else tensor
    return changed


def write_model(weights, config, folder):
    """Write `weights` {name: tensor} as safetensors, and their config, into `folder`."""
    huggingface_hub.save_torch_state_dict({name: part.contiguous() for name, part in weights.items()}, folder)
    config.save_pretrained(folder)


def load_written(folder):
    """Return (model in float32, tokenizer) of the folder that was just written."""
    model = hf_folder.load_model(folder, "Correct the settings of import_base.py.", torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def choose_layout(weights, config, folder):
    """Return (`weights` in the rotary layout in which the model reads better, line with both losses).

    folder: holds the tokenizer already; the model is written into it on the way.
    """
    write_model(weights, config, folder)
    model, tokenizer = load_written(folder)
    halves_loss = reading_check.loss(model, tokenizer)
    changed = to_halves(weights, config)
    model.load_state_dict(changed, strict=False)  # a tied head is not among them
    neighbours_loss = reading_check.loss(model, tokenizer)
    line = f"rotary pairs: {halves_loss:.2f} nats per token read as halves, {neighbours_loss:.2f} as neighbours"
    if neighbours_loss < halves_loss:
        return changed, f"{line}: neighbours, permuted to halves"
    return weights, f"{line}: halves"


# ==== Main ====


def report(args, config, weights, left_out, tokenizer):
    """Print what was written. left_out: number of tensors of the checkpoint that are not among the `weights`."""
    parameters = sum(part.numel() for part in weights.values())
    line = (
        f"{args['CHECKPOINT']} -> {args['BASE_MODEL']}: {config.num_hidden_layers} layers of width "
        f"{config.hidden_size:,}, {len(weights)} tensors, {parameters:,} parameters in {config.dtype}, "
        f"{'tied' if config.tie_word_embeddings else 'untied'}; {left_out} other tensors left out"
    )
    if rows := config.vocab_size - tokenizer.get_vocab_size():
        line += f"; {rows:,} rows without a token"
    print(line)


def main(args):
    """Import as the settings `args` (dict) say."""
    transformers.utils.logging.disable_progress_bar()
    checkpoint, output = Path(args["CHECKPOINT"]), Path(args["BASE_MODEL"])
    system.refuse_unless_empty(output, "--base-model")
    check_settings(args)
    tokenizer, names = read_tokenizer(Path(args["TOKENIZER"]), args)
    if not checkpoint.exists():
        raise SystemExit(f"{checkpoint} does not exist. Name the pretraining checkpoint with --checkpoint.")
    open_checkpoint = open_dcp if (checkpoint / ".metadata").is_file() else open_files
    entries, read = open_checkpoint(checkpoint)
    candidates = find_weights(entries, args["IGNORE"], checkpoint)
    config = make_config(read_shape(candidates, entries, checkpoint), args)
    keys = match_names(candidates, entries, config, checkpoint)
    check_vocabulary(tokenizer, config.vocab_size, args["TOKENIZER"])
    weights = read_weights(read, keys, checkpoint)
    embedding = weights[hf_folder.EMBEDDING]
    tied = torch.equal(weights.get(hf_folder.HEAD, embedding), embedding)
    if tied:
        weights.pop(hf_folder.HEAD, None)
    token_ids = {f"{kind}_token_id": tokenizer.token_to_id(names.get(f"{kind}_token", "")) for kind in ("bos", "eos")}
    config.update(token_ids | {"tie_word_embeddings": tied, "dtype": str(embedding.dtype).removeprefix("torch.")})

    with system.staged(output, "--base-model") as staging:
        write_tokenizer(tokenizer, names, token_ids, args["CONTEXT"], staging)
        weights, line = choose_layout(weights, config, staging)
        print(line)
        write_model(weights, config, staging)
        line, reads = reading_check.verdict(
            reading_check.loss(*load_written(staging)), config.vocab_size, args["EXPECTED_LOSS"]
        )
        print(line)
        if not reads:
            raise SystemExit(
                f"{checkpoint}: this model cannot read; nothing was written. {reading_check.CAUSES} HEADS and KV_HEADS "
                "that are both wrong by the same factor fit the tensors and show only here."
            )
    report(args, config, weights, len(entries) - len(keys), tokenizer)


if __name__ == "__main__":
    main(settings.from_flags(globals()))
