"""Step 4: turn a training checkpoint into a Hugging Face folder that any tool loads, and check that they are equal.

Reads   a checkpoint of checkpoints/sft_v1/, and models/resized/ (config, generation_config, tokenizer; its weights for
        --base-share).
Writes  exports/sft_v1/: safetensors, config, generation_config, tokenizer with its template, training.json, the model
        card README.md, and Ollama's Modelfile.

    python export_hf.py                                  the latest whole checkpoint
    python export_hf.py --checkpoint best                the one with the lowest validation loss
    python export_hf.py --checkpoint step_000500 --export-dir exports/early
    python export_hf.py --average 3 --base-share 0.25    the mean of the last three, a quarter of the way to the base
    python export_hf.py --verify-only exports/sft_v1     compare an export with its checkpoint again

One process, no GPU. It streams the weights shard by shard, loads the result again, and compares it with the checkpoint,
tensor by tensor and by its logits, before the folder gets its name. A mean is compared with the same mean in float64.
Then the export reads plain text and answers two questions.
"""

import json
import math
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sft import hf_folder, ollama, settings, system, text
from sft.data import chatml, sentencepiece_tokenizer
from sft.evaluation import model_card, reading_check
from sft.training import checkpoints

# ---- Folders ----
CHECKPOINT_DIR = "checkpoints/sft_v1"  # folder of the run, written by sft_v1.py
CHECKPOINT = "latest"  # "latest" whole one | "best": lowest validation loss | a name, "step_000500" | its folder
RESIZED_MODEL = "models/resized"  # folder that the run started from, written by resize_vocab.py
EXPORT_DIR = "exports/sft_v1"  # folder to write; must be empty or missing
# ---- Averaging ----
AVERAGE = 1  # checkpoints whose mean is exported: CHECKPOINT and those saved before it; 1 = CHECKPOINT alone
BASE_SHARE = 0.0  # 0 to 1, of RESIZED_MODEL in the weights: (1 - share) * trained + share * base; forgets less
# ---- Format ----
DTYPE = "bfloat16"  # of the weights: "bfloat16" (2 bytes each) | "float32" (4)
# ---- Instead of an export ----
VERIFY_ONLY = ""  # folder of an export to compare with its checkpoints again; it says which, its dtype and its share
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
    "total_steps": int,
    "history": list,
    "world_size": int,
    "versions": dict,
    "settings": dict.fromkeys(model_card.RECIPE, object) | {"DATA_DIR": str, "RESIZED_MODEL": str},
    "fingerprints": {"data": str},
}
DTYPES = ("bfloat16", "float32")
WITH_ITS_VERSION = "Export with that version, or choose another one with --checkpoint."
SENTENCEPIECE = "tokenizer.model"
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


def choose_checkpoints(folder, name, number):
    """Return `number` pairs (Path, its state), latest first: `choose_checkpoint`'s, and those saved before it.

    Raises: SystemExit if there are fewer, or one of them is damaged or of another run.
    """
    latest, state = choose_checkpoint(folder, name)
    earlier = [path for path in checkpoints.listed(latest.parent) if checkpoints.step_of(path) < state["step"]]
    if len(earlier) + 1 < number:
        raise SystemExit(
            f"{latest.parent} holds {len(earlier) + 1} checkpoints up to {latest.name}, too few for a mean of "
            f"{number}. Lower --average, or train with a higher --keep-checkpoints."
        )
    chosen = [(latest, state)] + [choose_checkpoint(folder, path) for path in earlier[: number - 1]]
    for path, other in chosen[1:]:
        if different := checkpoints.fingerprint_differences(state["fingerprints"], other["fingerprints"]):
            raise SystemExit(f"{path} and {latest} are of different runs: {different}. Lower --average.")
    return chosen


def check_base(checkpoint, state, resized, fingerprint):
    """Raise SystemExit unless the folder `resized`, with this fingerprint, is what `checkpoint` was trained from.

    state: of `choose_checkpoint`.
    """
    trained_from = {name: value for name, value in state["fingerprints"].items() if name != "data"}
    different = checkpoints.fingerprint_differences(trained_from, fingerprint)
    if different == checkpoints.OTHER_VERSION:
        raise SystemExit(f"{checkpoint}: {different}. {WITH_ITS_VERSION}")
    if different:
        raise SystemExit(
            f"{resized} is not the base that {checkpoint} was trained from: {different}. Name the folder that the run "
            "started from with --resized-model, or bring it back."
        )


def check_shapes(checkpoint, expected, resized):
    """Raise SystemExit unless `checkpoint` holds the tensors of the folder `resized`. expected: their {name: shape}."""
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


@dataclass
class Source:
    """The weights of an export: the mean of the checkpoints, moved by `base_share` of the way towards the base."""

    checkpoints: list  # of Paths, latest first
    resized: str  # folder of the base, resized
    base_share: float  # 0 to 1
    shapes: dict  # {name: torch.Size} of every tensor

    def is_mean(self):
        """Return whether it is more than the weights of one checkpoint."""
        return len(self.checkpoints) > 1 or self.base_share > 0

    def __str__(self):
        names = str(self.checkpoints[0])
        if len(self.checkpoints) > 1:
            names = f"the mean of {', '.join(map(str, self.checkpoints))}"
        return f"{1 - self.base_share:g} x {names} + {self.base_share:g} x {self.resized}" if self.base_share else names


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


def load_weights(checkpoint, names, shapes):
    """Return {name: float32 tensor} of some of the weights in the folder `checkpoint`."""
    state = {f"model.{name}": torch.empty(shapes[name], dtype=torch.float32) for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is ")  # a single process is intended
        dcp.load(state, storage_reader=checkpoints.Reader(str(checkpoint)), no_dist=True)
    return {key.removeprefix("model."): tensor for key, tensor in state.items()}


def groups_to_read(names, shapes):
    """Return `names` in lists of READ_BYTES, or one larger tensor."""
    return group_by_size({name: shapes[name] for name in names}, torch.float32, READ_BYTES)


def read_weights(source, names, dtype):
    """Return {name: tensor} of some of the weights of `source`: computed in float32, rounded to `dtype`.

    Besides the result, it holds READ_BYTES, or one larger tensor, at a time; twice that of several checkpoints.
    Raises: SystemExit if a value is not finite.
    """
    weights = {}
    for group in groups_to_read(names, source.shapes):
        total = load_weights(source.checkpoints[0], group, source.shapes)
        for checkpoint in source.checkpoints[1:]:
            for name, tensor in load_weights(checkpoint, group, source.shapes).items():
                total[name] += tensor
        for name, tensor in total.items():
            tensor /= len(source.checkpoints)
            if source.base_share:
                tensor.lerp_(hf_folder.read_tensor(source.resized, name).float(), source.base_share)
            weights[name] = tensor.to(dtype)
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise SystemExit(f"{source}: {name} is not finite in {dtype}. Choose an earlier one with --checkpoint.")
    return weights


def check_mean(source, weights):
    """Raise SystemExit unless `weights` {name: tensor} are those of `source`, computed again in another way.

    Here each term is multiplied by its share and added in float64, the base and the oldest checkpoint first. Float32
    may differ from that by its rounding in each operation, of the sum of the terms' sizes, and by the last rounding.
    """
    share = (1 - source.base_share) / len(source.checkpoints)
    for group in groups_to_read(weights, source.shapes):
        base = {name: hf_folder.read_tensor(source.resized, name).double() * source.base_share for name in group}
        total, size = base, {name: term.abs() for name, term in base.items()}
        for checkpoint in reversed(source.checkpoints):
            for name, tensor in load_weights(checkpoint, group, source.shapes).items():
                total[name] += tensor.double() * share
                size[name] += tensor.double().abs() * share
        for name in group:
            rounding = (len(source.checkpoints) + 4) * torch.finfo(torch.float32).eps * size[name]
            rounding += torch.finfo(weights[name].dtype).eps / 2 * total[name].abs() + torch.finfo(torch.float32).tiny
            if not ((weights[name].double() - total[name]).abs() <= rounding).all():
                raise SystemExit(f"{name} is not {source}, computed in float64. {EXPORT_AGAIN}")


# ==== Writing ====


def write_weights(source, dtype, max_bytes, output):
    """Write the weights as safetensors of at most `max_bytes`, with an index if they are several."""
    groups = group_by_size(source.shapes, dtype, max_bytes)
    layout = {"model.safetensors": groups[0]}
    if len(groups) > 1:
        layout = {f"model-{n:05d}-of-{len(groups):05d}.safetensors": names for n, names in enumerate(groups, start=1)}
    for file_name, names in layout.items():
        hf_folder.save_weights(read_weights(source, names, dtype), output / file_name)
    hf_folder.write_index(output, layout, count_parameters(source.shapes) * dtype.itemsize)


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


def write_sentencepiece(output):
    """Write the tokenizer.model that llama.cpp's converter needs of a tokenizer from SentencePiece, if it can exist.

    Returns: what that converter reads besides it in tokenizer_config.json (dict): the added tokens, and whether text
    after a control token gets a space in front.
    """
    tokenizer = hf_folder.load_tokenizer(output)
    content = sentencepiece_tokenizer.restore(tokenizer)
    if content is None:
        return {}
    (output / SENTENCEPIECE).write_bytes(content)
    added = json.loads(tokenizer.to_str())["added_tokens"]
    after_control = tokenizer.encode(f"{chatml.STOP}a", add_special_tokens=False).tokens[1]
    return {
        "added_tokens_decoder": {str(token.pop("id")): token for token in added},
        "add_prefix_space": after_control.startswith(sentencepiece_tokenizer.SPACE),
    }


def write_configs(resized, output, dtype_name):
    """Copy configuration and tokenizer, and add what older readers look for: names, the template, a class they know.

    Ollama's Modelfile comes with them.
    """
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
    tokenizer |= write_sentencepiece(output)
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        (output / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (output / ollama.MODELFILE).write_text(ollama.modelfile(output), encoding="utf-8")


# ==== Verification ====


def described(folder):
    """Return {"FILE KEY": its JSON as text, or the SHA-256 of a long one} and the digests of the other tokenizer files.

    folder: an export; FILE: one of CONFIG_FILES, or tokenizer_config.json. The form of the JSON does not count, all
    that a reader may find does: also what this transformers, or a short text, does not use.
    """
    parts = hf_folder.tokenizer_digests(folder)
    del parts["tokenizer_config.json"]
    path = Path(folder) / SENTENCEPIECE
    parts[SENTENCEPIECE] = system.sha256(path) if path.is_file() else None
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


def check_tokenizer(output):
    """Return the tokenizer of `output`. Raises: SystemExit if its template's text gives other ids, or two BOS."""
    tokenizer = AutoTokenizer.from_pretrained(output)
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
            check_tokenizer(folder)
        except SystemExit as error:
            message = str(error).replace(folder, str(resized))
            raise SystemExit(f"An export from {resized} would fail. {message}") from None


def compare_weights(source, dtype, output):
    """Compare the tensors in `output` with those of `source`, bit by bit after rounding, and the sets of names.

    Returns: the reference model: the configuration of the resized base, filled with the weights of `source`.
    Raises: SystemExit naming what differs.
    """
    shapes, resized = source.shapes, source.resized
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
        expected = read_weights(source, names, dtype)
        if source.is_mean():
            check_mean(source, expected)
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


def verify(source, dtype, output):
    """Compare `output` with `source`, with one model in memory at a time. Returns: (its model, tokenizer).

    It compares configurations, tokenizer and template, before anything is loaded; each tensor's bits after rounding,
    the exact set of names, the tie, and the logits of three prompts with those of the resized base's configuration with
    the weights of `source`. A mean is computed twice.
    Raises: SystemExit naming what differs.
    """
    check_files(source.resized, output, str(dtype).removeprefix("torch."))
    tokenizer = check_tokenizer(output)
    reference = compare_weights(source, dtype, output)
    expected = logits(reference, tokenizer)
    del reference
    model = hf_folder.load_model(output, EXPORT_AGAIN, dtype)
    for prompt, ours, theirs in zip(PROMPTS, logits(model, tokenizer), expected, strict=True):
        if not torch.equal(ours, theirs):
            raise SystemExit(f"{output}: logits of {prompt!r} differ from the checkpoint's. {EXPORT_AGAIN}")
    check_configs(output, source.shapes, chatml.special_ids(output, hf_folder.load_tokenizer(output)))
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


def match(chosen, base_share, resized, weights):
    """Return the `Source` of an export from the checkpoints `chosen`, which all belong to the folder `resized`.

    chosen: of `choose_checkpoints`; weights: {file name: SHA-256} of the folder's safetensors.
    Raises: SystemExit if its weights, configuration or tokenizer are not the run's, if it cannot end a turn, or if the
    names or shapes in a checkpoint are others.
    """
    hf_folder.shards(resized)  # a folder without a model gets its own message
    fingerprint = hf_folder.fingerprint(resized, weights)
    for checkpoint, state in chosen:
        check_base(checkpoint, state, resized, fingerprint)
    shapes, _ = describe_resized(resized)
    for checkpoint, _ in chosen:
        check_shapes(checkpoint, shapes, resized)
    return Source([checkpoint for checkpoint, _ in chosen], resized, base_share, shapes)


def recorded(output):
    """Return (dtype's name, names of the checkpoints, base share) of the export `output`.

    Raises: SystemExit if its files do not say them.
    """
    dtype_name = system.read_json(output / "config.json", "export_hf.py").get("dtype")
    if dtype_name not in DTYPES:
        raise SystemExit(f"{output} says dtype {dtype_name!r}: it is not an export of this script. Name one.")
    record = system.read_json(output / model_card.TRAINING, "export_hf.py")
    names, share = record.get("averaged"), record.get("base_share")
    named = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    if not named or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise SystemExit(f"{output / model_card.TRAINING} does not say what was averaged. {EXPORT_AGAIN}")
    return dtype_name, names, share


def export(source, state, weights, args):
    """Write and verify the folder EXPORT_DIR of the settings `args`. Returns: (its model, tokenizer).

    state: of the latest checkpoint; weights: {file name: SHA-256} of the resized base.
    """
    dtype = getattr(torch, args["DTYPE"])
    with system.staged(args["EXPORT_DIR"], "--export-dir") as staging:
        write_weights(source, dtype, MAX_SHARD_BYTES, staging)
        write_configs(source.resized, staging, args["DTYPE"])
        training = model_card.describe(source, state, weights, count_parameters(source.shapes), args["DTYPE"])
        model_card.write_first(staging, source.checkpoints[0], training)
        return verify(source, dtype, staging)


def main(args):
    """Export, or verify an export again, as the settings `args` (dict) say."""
    settings.check_bounds(args, {"DTYPE": DTYPES}, {"MAX_NEW_TOKENS": 1, "AVERAGE": 1, "BASE_SHARE": 0})
    if args["BASE_SHARE"] > 1:
        raise SystemExit(f"BASE_SHARE is {args['BASE_SHARE']}; it must be at most 1, which is the base alone.")
    transformers.utils.logging.disable_progress_bar()
    output, dtype_name, share = Path(args["EXPORT_DIR"]), args["DTYPE"], args["BASE_SHARE"]
    if args["VERIFY_ONLY"]:
        output = Path(args["VERIFY_ONLY"])
        dtype_name, names, share = recorded(output)
        chosen = [choose_checkpoint(args["CHECKPOINT_DIR"], name) for name in names]
    else:
        chosen = choose_checkpoints(args["CHECKPOINT_DIR"], args["CHECKPOINT"], args["AVERAGE"])
    weights = system.weight_digests(args["RESIZED_MODEL"])
    source = match(chosen, share, args["RESIZED_MODEL"], weights)
    if args["VERIFY_ONLY"]:
        model, tokenizer = verify(source, getattr(torch, dtype_name), output)
    else:
        model, tokenizer = export(source, chosen[0][1], weights, args)
    files = list(output.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    tensors = len(source.shapes)
    print(f"{source} -> {output}: {tensors} tensors, {size / 1e9:.2f} GB in {dtype_name}, {len(files)} file(s)")
    if source.is_mean():
        print("verified: every tensor equals this mean, computed again in float64, and the logits of three prompts its")
    else:
        print("verified: every tensor and the logits of three prompts equal the checkpoint's")
    if sentencepiece_tokenizer.SPACE in tokenizer.get_vocab() and not (output / SENTENCEPIECE).is_file():
        print("WARNING: llama.cpp and Ollama would encode text differently: they know neither this tokenizer's")
        print("normaliser nor a unigram model. transformers, vLLM and chat.py are right. docs/using-the-model.md")
    sample_answers(model, tokenizer, output, args["MAX_NEW_TOKENS"])


if __name__ == "__main__":
    main(settings.from_flags(globals()))
