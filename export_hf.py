"""Step 4: turn a training checkpoint into a Hugging Face folder that any tool loads, and check that they are equal.

Reads   a checkpoint of checkpoints/sft_v1/, and models/resized/ (config, generation_config, tokenizer).
Writes  exports/sft_v1/: safetensors, config, generation_config, tokenizer with its template, training.json, and the
        model card README.md.

    python export_hf.py                                  the latest whole checkpoint
    python export_hf.py --checkpoint best                the one with the lowest validation loss
    python export_hf.py --checkpoint step_000500 --export-dir exports/early
    python export_hf.py --verify-only exports/sft_v1     compare an export with its checkpoint again

One process, no GPU. It streams the weights shard by shard, loads the result again, and compares it with the checkpoint,
tensor by tensor and by its logits, before the folder gets its name. Then the export reads plain text and answers two
questions.
"""

import json
import math
import shutil
import tempfile
import warnings
from hashlib import sha256
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sft import hf_folder, settings, system, text
from sft.data import chatml
from sft.evaluation import model_card, reading_check
from sft.training import checkpoints

# ---- Folders ----
CHECKPOINT_DIR = "checkpoints/sft_v1"  # folder of the run, written by sft_v1.py
CHECKPOINT = "latest"  # "latest" whole one | "best": lowest validation loss | a name, "step_000500" | its folder
RESIZED_MODEL = "models/resized"  # folder that the run started from, written by resize_vocab.py
EXPORT_DIR = "exports/sft_v1"  # folder to write; must be empty or missing
# ---- Format ----
DTYPE = "bfloat16"  # of the weights: "bfloat16" (2 bytes each) | "float32" (4)
# ---- Instead of an export ----
VERIFY_ONLY = ""  # folder of an export to compare with the checkpoint again; nothing is written
# ---- Answers ----
MAX_NEW_TOKENS = 100  # tokens of each of the two sample answers

# ==== Reading the checkpoint ====

MAX_SHARD_BYTES = 5 * 10**9  # of a safetensors file; writing takes about as much memory
READ_BYTES = 2**28  # of the checkpoint, in float32, per call of DCP: each call takes about 40 ms, however much it reads
PROMPTS = ("The sea is", "def add(a, b):", "In 1969, people")  # texts at which the logits must be equal
QUESTIONS = ("Who are you?", "What is the capital of France?")
STATE = {  # what an export needs of a checkpoint's state.json, and of the dicts in it
    "step": int,
    "updates": int,
    "world_size": int,
    "versions": dict,
    "settings": dict.fromkeys(model_card.RECIPE, object) | {"DATA_DIR": str, "RESIZED_MODEL": str},
    "fingerprints": {"data": str},
}
WITH_ITS_VERSION = "Export with that version, or choose another one with --checkpoint."
CONFIG_FILES = ("config.json", "generation_config.json")
SHOWN_LENGTH = 60  # characters of a value in these files, in a message
EXPORT_AGAIN = "Run export_hf.py again."


def unreadable(state):
    """Return the names in STATE, "NAME KEY" inside a dict, that the dict `state` lacks or has in another form."""
    names = []
    for name, form in STATE.items():
        value, keys = state.get(name), form if isinstance(form, dict) else {}
        if not isinstance(value, dict if keys else form):
            names.append(name)
            continue
        names += [f"{name} {key}" for key, kind in keys.items() if key not in value or not isinstance(value[key], kind)]
    return names


def choose_checkpoint(folder, name):
    """Return (Path, its state) of the checkpoint `name` of the run in `folder`, verified against its manifest.

    name: "latest", "best" (of the lowest validation loss), the name of a checkpoint in `folder`, or its own folder.
    Raises: SystemExit if there is no such whole checkpoint, or its state has not what an export needs.
    """
    if name in ("latest", "best"):
        checkpoint = checkpoints.latest_whole(folder) if name == "latest" else checkpoints.best_whole(folder)
        if checkpoint is None:
            kind = "whole checkpoint" if name == "latest" else "whole checkpoint of a step that was validated"
            raise SystemExit(f"{folder} holds no {kind}. Run sft_v1.py first, or name its --checkpoint-dir.")
        state = system.read_json(checkpoint / checkpoints.STATE, "sft_v1.py")
    else:
        checkpoint = Path(name) if Path(name).is_dir() else Path(folder) / name
        state = checkpoints.verify(checkpoint)
    if names := unreadable(state):
        raise SystemExit(
            f"{checkpoint / checkpoints.STATE} has no readable {', '.join(names)}: {checkpoints.OTHER_VERSION}, or it "
            f"was edited. {WITH_ITS_VERSION}"
        )
    return checkpoint, state


def describe_resized(resized):
    """Return ({name: shape}, {"bos" | "eos" | "pad": id or None}) of the folder `resized`.

    Raises: SystemExit if it cannot end a turn or has no template: an export from it could not either.
    """
    layout = hf_folder.shards(resized)
    ids = chatml.special_ids(resized, hf_folder.load_tokenizer(resized))
    stops = hf_folder.stop_ids(system.read_json(Path(resized) / "generation_config.json", "resize_vocab.py"))
    if ids["eos"] not in stops:
        raise SystemExit(f"{resized}: generation stops at {stops}, not at {chatml.STOP}. Run resize_vocab.py again.")
    if not (Path(resized) / "chat_template.jinja").is_file():
        raise SystemExit(f"{resized} has no chat_template.jinja. Run resize_vocab.py again.")
    shapes = {}
    for file_name, names in layout.items():
        with safe_open(Path(resized) / file_name, "pt") as file:
            for name in names:
                shapes[name] = torch.Size(file.get_slice(name).get_shape())
    return shapes, ids


def match_checkpoint(checkpoint, state, resized):
    """Return {name: shape} of the weights in `checkpoint`, in the order of the folder `resized`.

    state: of `choose_checkpoint`. Raises: SystemExit if the folder's weights, configuration or tokenizer are not the
    run's, if it cannot end a turn, or if the names or shapes in the checkpoint are others.
    """
    hf_folder.shards(resized)  # a folder without a model gets its own message
    trained_from = {name: value for name, value in state["fingerprints"].items() if name != "data"}
    different = checkpoints.fingerprint_differences(trained_from, hf_folder.fingerprint(resized))
    if different == checkpoints.OTHER_VERSION:
        raise SystemExit(f"{checkpoint}: {different}. {WITH_ITS_VERSION}")
    if different:
        raise SystemExit(
            f"{resized} is not the base that {checkpoint} was trained from: {different}. Name the folder that the run "
            "started from with --resized-model, or bring it back."
        )
    expected, _ = describe_resized(resized)
    stored = {}
    for key, entry in checkpoints.Reader(str(checkpoint)).read_metadata().state_dict_metadata.items():
        if key.startswith("model."):
            stored[key.removeprefix("model.")] = entry.size
    different = [name for name in sorted(stored | expected) if stored.get(name) != expected.get(name)]
    if different:
        shapes = [f"{name} {[*stored.get(name, '-')]} there, {[*expected.get(name, '-')]} here" for name in different]
        raise SystemExit(
            f"{checkpoint} and {resized} differ in {len(different)} tensors: {'; '.join(shapes)}. Name the folder that "
            "the run started from with --resized-model."
        )
    return expected


def group_by_size(shapes, dtype, max_bytes):
    """Return lists of names whose tensors fill at most `max_bytes` each (a larger tensor has its own list)."""
    groups, room = [], 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(name)
        room -= size
    return groups


def read_weights(checkpoint, names, shapes, dtype):
    """Return {name: tensor} of some of the checkpoint's weights, rounded to `dtype`.

    Besides the result, it holds READ_BYTES, or one larger tensor, at a time.
    Raises: SystemExit if a value is not finite.
    """
    weights = {}
    for group in group_by_size({name: shapes[name] for name in names}, torch.float32, READ_BYTES):
        state = {f"model.{name}": torch.empty(shapes[name], dtype=torch.float32) for name in group}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is ")  # a single process is intended
            dcp.load(state, storage_reader=checkpoints.Reader(str(checkpoint)), no_dist=True)
        for key, tensor in state.items():
            weights[key.removeprefix("model.")] = tensor.to(dtype)
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise SystemExit(f"{checkpoint}: {name} is not finite in {dtype}. Choose an earlier one with --checkpoint.")
    return weights


# ==== Writing ====


def write_weights(checkpoint, shapes, dtype, max_bytes, output):
    """Write the weights as safetensors of at most `max_bytes`, with an index if they are several."""
    groups = group_by_size(shapes, dtype, max_bytes)
    layout = {"model.safetensors": groups[0]}
    if len(groups) > 1:
        layout = {f"model-{n:05d}-of-{len(groups):05d}.safetensors": names for n, names in enumerate(groups, start=1)}
    for file_name, names in layout.items():
        hf_folder.save_weights(read_weights(checkpoint, names, shapes, dtype), output / file_name)
    hf_folder.write_index(output, layout, count_parameters(shapes) * dtype.itemsize)


def count_parameters(shapes):
    """Return the number of parameters of tensors with these `shapes` {name: shape}."""
    return sum(math.prod(shape) for shape in shapes.values())


def older_names(config):
    """Return what transformers 4, and servers built on it, must find in `config` (dict of config.json) in addition.

    Without `rope_theta` they take 10,000 and compute nonsense, without a warning.
    """
    rope = config.get("rope_parameters") or {}
    names = {"torch_dtype": config["dtype"]}
    if "rope_theta" in rope:
        names["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            names["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return names


def write_configs(resized, output, dtype_name):
    """Copy configuration and tokenizer, and add what older readers look for: names, the template, a class they know."""
    for name in (*CONFIG_FILES, *hf_folder.TOKENIZER_FILES):
        path = Path(resized) / name
        if path.is_symlink():
            raise SystemExit(f"{path} is a link, and an export publishes no file from elsewhere. Put the file here.")
        if path.is_file():
            shutil.copyfile(path, output / name)
    config = system.read_json(output / "config.json", "resize_vocab.py") | {"dtype": dtype_name}
    config |= older_names(config)
    tokenizer = system.read_json(output / "tokenizer_config.json", "resize_vocab.py")
    tokenizer["chat_template"] = (output / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 refuses "TokenizersBackend"
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        (output / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ==== Verification ====


def described(folder):
    """Return {"FILE KEY": its JSON as text, or the SHA-256 of a long one} and the digests of the other tokenizer files.

    folder: an export; FILE: one of CONFIG_FILES, or tokenizer_config.json. The form of the JSON does not count, all
    that a reader may find does: also what this transformers, or a short text, does not use.
    """
    parts = hf_folder.tokenizer_digests(folder)
    del parts["tokenizer_config.json"]
    for name in (*CONFIG_FILES, "tokenizer_config.json"):
        for key, value in system.read_json(Path(folder) / name, "export_hf.py").items():
            content = json.dumps(value, sort_keys=True)
            parts[f"{name} {key}"] = content if len(content) <= SHOWN_LENGTH else sha256(content.encode()).hexdigest()
    return parts


def check_files(resized, output, dtype_name):
    """Raise SystemExit unless `output` has all that an export from `resized` writes of configuration and tokenizer.

    It has nothing else of them, either, and no other safetensors than those of its model: a reader might take them.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_configs(resized, Path(folder), dtype_name)
        different = checkpoints.fingerprint_differences(described(folder), described(output))
    if different:
        raise SystemExit(f"{output} is not an export from {resized}: {text.one_line(different)}. {EXPORT_AGAIN}")
    if others := {path.name for path in Path(output).glob("*.safetensors")} - hf_folder.shards(output).keys():
        raise SystemExit(f"{output} holds {min(others)}, which is no part of the export. Move it away.")


def check_tokenizer(resized, output):
    """Return the tokenizer of `output`. Raises: SystemExit unless it has `resized`'s template, and one BOS at most."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    template = (Path(resized) / "chat_template.jinja").read_text(encoding="utf-8")
    legacy = system.read_json(Path(output) / "tokenizer_config.json", "export_hf.py").get("chat_template")
    if not tokenizer.chat_template == legacy == template:
        raise SystemExit(f"{output}: its chat template is not the one of {resized}. {EXPORT_AGAIN}")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    served_ids = tokenizer(written, add_special_tokens=False).input_ids  # how servers encode the template's text
    if served_ids != ids:
        raise SystemExit(
            f"{output}: the template's text gives {served_ids}, the template itself {ids}. Run prepare_data.py again."
        )
    if ids[:2] == [tokenizer.bos_token_id] * 2:  # further on it may be <|im_start|>, as in SmolLM
        raise SystemExit(f"{output}: its template begins with two BOS tokens. Run prepare_data.py again.")
    return tokenizer


def check_configs(output, shapes, ids):
    """Raise SystemExit unless config and generation_config of `output` describe `shapes` and stop at `ids`["eos"]."""
    config = hf_folder.load_config(output, EXPORT_AGAIN)
    try:
        generation = GenerationConfig.from_pretrained(output)
        generation.validate(strict=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises several kinds
        raise SystemExit(
            f"{output}: transformers refuses its configuration ({error}). Correct config.json or "
            "generation_config.json."
        ) from None
    described = {name: part.shape for name, part in model.named_parameters()}
    different = sorted(name for name in described | shapes if described.get(name) != shapes.get(name))
    if different:
        raise SystemExit(
            f"{output}: config.json and the weights disagree about {len(different)} tensors, first {different[0]}. "
            "Correct config.json."
        )
    stops = hf_folder.stop_ids(generation)
    if ids["eos"] not in stops or generation.pad_token_id in (None, ids["eos"]):
        raise SystemExit(
            f"{output}: generation stops at {stops} and pads with {generation.pad_token_id}; it must stop at "
            f"{ids['eos']} and pad with another token. Correct its generation_config.json."
        )


def dry_run(resized):
    """Do all of an export from the folder `resized` but the weights, in a temporary folder: before days of training.

    Raises: SystemExit with what would make the export fail.
    """
    shapes, ids = describe_resized(resized)
    with tempfile.TemporaryDirectory() as folder:
        try:
            write_configs(resized, Path(folder), "bfloat16")
            check_configs(folder, shapes, ids)
            check_tokenizer(resized, folder)
        except SystemExit as error:
            message = str(error).replace(folder, str(resized))
            raise SystemExit(f"An export from {resized} would fail. {message}") from None


def compare_weights(checkpoint, shapes, dtype, resized, output):
    """Compare the tensors in `output` with the checkpoint's, bit by bit after rounding, and the sets of names.

    Returns: the reference model: the configuration of `resized`, filled with the checkpoint's weights.
    Raises: SystemExit naming what differs.
    """
    layout = hf_folder.shards(output)
    written = {name for names in layout.values() for name in names}
    if different := sorted(written ^ shapes.keys()):
        raise SystemExit(
            f"{output} and the checkpoint differ in {len(different)} names, first {different[0]}. {EXPORT_AGAIN}"
        )
    config = hf_folder.load_config(resized, "Run resize_vocab.py again.")
    reference = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    tied = reference.get_input_embeddings().weight is reference.get_output_embeddings().weight
    if tied is (hf_folder.HEAD in shapes):
        raise SystemExit(
            f"{resized}: input and output embedding are tied in one of checkpoint and config.json only. Name the "
            "folder that the run started from with --resized-model."
        )
    parameters = dict(reference.named_parameters())
    for file_name, names in layout.items():
        expected = read_weights(checkpoint, names, shapes, dtype)
        with safe_open(Path(output) / file_name, "pt") as file:
            for name in names:
                if not hf_folder.same_bits(file.get_tensor(name), expected[name]):
                    raise SystemExit(f"{Path(output) / file_name}: {name} differs from the checkpoint. {EXPORT_AGAIN}")
                if name not in parameters:
                    raise SystemExit(f"{resized}: config.json describes no tensor {name}. Run resize_vocab.py again.")
                parameters[name].data.copy_(expected[name])
    return reference


@torch.no_grad()
def logits(model, tokenizer):
    """Return the logits of PROMPTS, a list of float tensors [1, tokens, vocabulary]."""
    return [model(tokenizer(prompt, return_tensors="pt").input_ids).logits for prompt in PROMPTS]


def verify(checkpoint, shapes, dtype, resized, output):
    """Compare `output` with the checkpoint, with one model in memory at a time. Returns: (its model, tokenizer).

    It compares configurations, tokenizer and template, before anything is loaded; each tensor's bits after rounding,
    the exact set of names, the tie, and the logits of three prompts with those of `resized`'s configuration with the
    checkpoint's weights.
    Raises: SystemExit naming what differs.
    """
    check_files(resized, output, str(dtype).removeprefix("torch."))
    tokenizer = check_tokenizer(resized, output)
    reference = compare_weights(checkpoint, shapes, dtype, resized, output)
    expected = logits(reference, tokenizer)
    del reference
    model = hf_folder.load_model(output, EXPORT_AGAIN, dtype)
    for prompt, ours, theirs in zip(PROMPTS, logits(model, tokenizer), expected, strict=True):
        if not torch.equal(ours, theirs):
            raise SystemExit(f"{output}: logits of {prompt!r} differ from the checkpoint's. {EXPORT_AGAIN}")
    check_configs(output, shapes, chatml.special_ids(output, hf_folder.load_tokenizer(output)))
    return model, tokenizer


def sample_answers(model, tokenizer, output, max_new_tokens):
    """Print how the verified `model` reads plain text and answers two questions, with a warning where it does not."""
    nats = reading_check.loss(model, tokenizer)
    line, reads = reading_check.verdict(nats, model.get_input_embeddings().num_embeddings)
    print(line)
    if not reads:
        print(f"WARNING: {output} is what was trained, but it cannot read plain text. {reading_check.CAUSES}")
    any_ended = False
    for question in QUESTIONS:
        answer, ended = hf_folder.answer(model, tokenizer, question, max_new_tokens)
        any_ended |= ended
        ending = "ended by itself" if ended else f"cut at {max_new_tokens} tokens"
        print(f"\nQ: {question}\nA: {text.printable(answer)}\n   ({ending})")
    if not any_ended:
        print("WARNING: no answer ended by itself: trained too little, or without TRAIN_ON_SPECIAL_TOKENS.")


# ==== Main ====


def export(checkpoint, state, shapes, args):
    """Write and verify the folder EXPORT_DIR of the settings `args`. Returns: (its model, tokenizer)."""
    dtype, resized = getattr(torch, args["DTYPE"]), args["RESIZED_MODEL"]
    with system.staged(args["EXPORT_DIR"], "--export-dir") as staging:
        write_weights(checkpoint, shapes, dtype, MAX_SHARD_BYTES, staging)
        write_configs(resized, staging, args["DTYPE"])
        training = model_card.describe(checkpoint, state, resized, count_parameters(shapes), args["DTYPE"])
        model_card.write_first(staging, checkpoint, training)
        return verify(checkpoint, shapes, dtype, resized, staging)


def main(args):
    """Export, or verify an export again, as the settings `args` (dict) say."""
    if args["DTYPE"] not in ("bfloat16", "float32"):
        raise SystemExit(f"DTYPE is {args['DTYPE']!r}; it must be bfloat16 or float32.")
    if args["MAX_NEW_TOKENS"] < 1:
        raise SystemExit(f"MAX_NEW_TOKENS is {args['MAX_NEW_TOKENS']}; it must be at least 1.")
    transformers.utils.logging.disable_progress_bar()
    checkpoint, state = choose_checkpoint(args["CHECKPOINT_DIR"], args["CHECKPOINT"])
    shapes = match_checkpoint(checkpoint, state, args["RESIZED_MODEL"])
    output, dtype_name = Path(args["EXPORT_DIR"]), args["DTYPE"]
    if args["VERIFY_ONLY"]:
        output = Path(args["VERIFY_ONLY"])
        dtype_name = system.read_json(output / "config.json", "export_hf.py").get("dtype")
        if dtype_name not in ("bfloat16", "float32"):
            raise SystemExit(f"{output} says dtype {dtype_name!r}: it is not an export of this script. Name one.")
        model, tokenizer = verify(checkpoint, shapes, getattr(torch, dtype_name), args["RESIZED_MODEL"], output)
    else:
        model, tokenizer = export(checkpoint, state, shapes, args)
    files = list(output.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    print(f"{checkpoint} -> {output}: {len(shapes)} tensors, {size / 1e9:.2f} GB in {dtype_name}, {len(files)} file(s)")
    print("verified: every tensor and the logits of three prompts equal the checkpoint's")
    sample_answers(model, tokenizer, output, args["MAX_NEW_TOKENS"])


if __name__ == "__main__":
    main(settings.from_flags(globals()))
