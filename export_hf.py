"""Step 4: turn a training checkpoint into a Hugging Face folder that any tool loads, and prove it equal.

Reads   a checkpoint of checkpoints/sft_v1/ and the base folder (config, generation_config, tokenizer).
Writes  exports/sft_v1/: safetensors, config, generation_config, tokenizer with its template, a model card.

    python export_hf.py                                  the newest whole checkpoint
    python export_hf.py --checkpoint step_000500 --output-dir exports/early
    python export_hf.py --verify-only exports/sft_v1     compare an export with its checkpoint again
    python export_hf.py --card exports/sft_v1            write its card again, with the evaluation's table
    python export_hf.py --chat exports/sft_v1            talk to it

One process, no GPU. The weights are streamed shard by shard. The result is loaded again and compared with the
checkpoint, tensor by tensor and by its logits, before it gets its name; then it reads plain text and answers two
questions.
"""

import contextlib
import json
import math
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer

from sft import hf_folder, settings, system
from sft.data import chatml
from sft.evaluation import model_card, reading_check
from sft.training import checkpoints

# ---- Files ----
CHECKPOINT_DIR = "checkpoints/sft_v1"  # folder of the run, written by sft_v1.py
CHECKPOINT = "latest"  # "latest" (the newest whole one) | a name such as "step_000500" | a checkpoint's folder
BASE_MODEL = "checkpoints/base"  # folder that the run started from, written by resize_vocab.py
OUTPUT_DIR = "exports/sft_v1"  # folder to write; it must not hold anything yet
EVAL_RESULTS = "eval-results"  # folder of run_eval.sh; the card shows its comparison if it measured this export
# ---- Format ----
DTYPE = "bfloat16"  # of the weights: "bfloat16" (2 bytes each) | "float32" (4)
MAX_SHARD_GB = 5.0  # GB of 10^9 bytes; the largest safetensors file, and about the memory that writing takes
# ---- Instead of an export ----
VERIFY_ONLY = ""  # folder of an export to compare with the checkpoint again; nothing is written
CARD = ""  # folder of an export whose README.md to write again
CHAT = ""  # folder of an export, or any other with a chat template, to talk to
# ---- Answers ----
MAX_NEW_TOKENS = 100  # tokens of each sample answer
TEMPERATURE = 0.7  # of the chat; 0 = always the likeliest token

# ==== Reading the checkpoint ====

QUESTIONS = ("Who are you?", "What is the capital of France?")
READ_BYTES = 2**28  # of the checkpoint at a time, in float32: one tensor at a time took 40 ms more for each
PROMPTS = ("The sea is", "def add(a, b):", "In 1969, people")


def choose(folder, name):
    """Return (Path, facts) of the checkpoint `name` of the run in `folder`, verified against its manifest."""
    if name != "latest":
        chosen = Path(name) if Path(name).is_dir() else Path(folder) / name
        return chosen, checkpoints.verify(chosen)
    found = checkpoints.newest_whole(folder)
    if found is None:
        raise SystemExit(f"{folder} holds no whole checkpoint. Run sft_v1.py first, or name its --checkpoint-dir.")
    return found, system.read_json(found / "facts.json", "sft_v1.py")


def describe_base(base):
    """Return ({name: shape}, {"bos" | "eos" | "pad": id or None}) of the resized `base`.

    Raises: SystemExit if it cannot end a turn or has no template: what is exported from it could not either.
    """
    layout, ids = hf_folder.shards(base), chatml.special_ids(base, hf_folder.load_tokenizer(base))
    stops = system.read_json(Path(base) / "generation_config.json", "resize_vocab.py").get("eos_token_id")
    if ids["eos"] not in (stops if isinstance(stops, list) else [stops]):
        raise SystemExit(f"{base}: generation stops at {stops}, not at {chatml.STOP}. Resize the base again.")
    if not (Path(base) / "chat_template.jinja").is_file():
        raise SystemExit(f"{base} has no chat_template.jinja. Run resize_vocab.py again.")
    shapes = {}
    for file_name, names in layout.items():
        with safe_open(Path(base) / file_name, "pt") as file:
            shapes |= {name: torch.Size(file.get_slice(name).get_shape()) for name in names}
    return shapes, ids


def agree(checkpoint, facts, base):
    """Return {name: shape} of the weights in `checkpoint`, in the order of the folder `base`.

    Raises: SystemExit if base or tokenizer are not the run's, if they cannot end a turn, or if names or shapes differ
    from the base's.
    """
    hf_folder.shards(base)  # a folder without a model is told as such
    digests = {"base": system.folder_digest(base, "*.safetensors")}
    digests["tokenizer"] = system.sha256(Path(base) / "tokenizer.json")
    for kind, digest in digests.items():
        if facts["fingerprints"][kind] != digest:
            raise SystemExit(f"{base} is not the {kind} that {checkpoint} was trained from. Name it with --base-model.")
    expected, _ = describe_base(base)
    stored = dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    stored = {key.removeprefix("model."): entry.size for key, entry in stored.items() if key.startswith("model.")}
    wrong = [name for name in sorted(stored | expected) if stored.get(name) != expected.get(name)]
    if wrong:
        shapes = (f"{name} {[*stored.get(name, '-')]} there, {[*expected.get(name, '-')]} here" for name in wrong)
        raise SystemExit(f"{checkpoint} and {base} differ in {len(wrong)} tensors: {'; '.join(shapes)}.")
    return expected


def shard_names(shapes, dtype, max_bytes):
    """Return lists of names whose tensors fill at most `max_bytes` each (a larger tensor has its own list)."""
    shards, room = [], 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def read_weights(checkpoint, names, shapes, dtype):
    """Return {name: tensor} of some of the checkpoint's weights, rounded to `dtype`.

    Beside the result it holds READ_BYTES, or one larger tensor, at a time.
    Raises: SystemExit if a value is not finite.
    """
    result = {}
    for part in shard_names({name: shapes[name] for name in names}, torch.float32, READ_BYTES):
        state = {f"model.{name}": torch.empty(shapes[name], dtype=torch.float32) for name in part}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is ")  # one process is what is meant
            dcp.load(state, checkpoint_id=str(checkpoint), no_dist=True)
        result |= {key.removeprefix("model."): tensor.to(dtype) for key, tensor in state.items()}
    if wrong := [name for name, tensor in result.items() if not tensor.isfinite().all()]:
        raise SystemExit(f"{checkpoint}: {wrong[0]} is not finite in {dtype}. Choose an earlier one with --checkpoint.")
    return result


# ==== Writing ====


def write_weights(checkpoint, shapes, dtype, max_bytes, output):
    """Write the weights as safetensors; return {file name: [tensor names]}."""
    shards = shard_names(shapes, dtype, max_bytes)
    parts = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    layout = dict(zip(parts if len(shards) > 1 else ["model.safetensors"], shards, strict=True))
    for file_name, names in layout.items():
        save_file(read_weights(checkpoint, names, shapes, dtype), output / file_name, metadata={"format": "pt"})
    if len(layout) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}}
        index["weight_map"] = {name: file_name for file_name, names in layout.items() for name in names}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return layout


def older_names(config):
    """Return what transformers 4, and servers built on it, must find in `config` (dict of config.json) besides.

    Without `rope_theta` they take 10,000 and compute nonsense, without a warning.
    """
    rope = config.get("rope_parameters") or {}
    names = {"torch_dtype": config["dtype"]}
    if "rope_theta" in rope:
        names["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            names["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return names


def write_configs(base, output, dtype_name):
    """Copy configuration and tokenizer, and add what older readers look for: names, the template, a class they know."""
    for path in Path(base).iterdir():
        if path.is_file() and not path.name.startswith("model") and path.name != "resize.json":
            shutil.copyfile(path, output / path.name)
    config = system.read_json(output / "config.json", "resize_vocab.py") | {"dtype": dtype_name}
    tokenizer = system.read_json(output / "tokenizer_config.json", "resize_vocab.py")
    tokenizer["chat_template"] = (output / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 refuses "TokenizersBackend"
    for name, content in (("config.json", config | older_names(config)), ("tokenizer_config.json", tokenizer)):
        (output / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ==== Verification ====


def check_tokenizer(base, output):
    """Return the tokenizer of `output`. Raises: SystemExit unless it has `base`'s template, and one BOS at most."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    template = (Path(base) / "chat_template.jinja").read_text(encoding="utf-8")
    legacy = system.read_json(Path(output) / "tokenizer_config.json", "export_hf.py").get("chat_template")
    if not tokenizer.chat_template == legacy == template:
        raise SystemExit(f"{output}: its chat template is not the one of {base}.")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    served = tokenizer(text, add_special_tokens=False).input_ids  # how servers encode what the template rendered
    if served != ids:
        raise SystemExit(f"{output}: the template's text gives {served}, the template itself {ids}.")
    if ids[:2] == [tokenizer.bos_token_id] * 2:  # further on it may be <|im_start|>, as in SmolLM
        raise SystemExit(f"{output}: its template begins with two BOS tokens. Run prepare_data.py again.")
    return tokenizer


def check_configs(output, shapes, ids):
    """Raise SystemExit unless config and generation_config of `output` describe `shapes` and stop at `ids`["eos"]."""
    try:
        generation = GenerationConfig.from_pretrained(output)
        generation.validate(strict=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(output))
    except Exception as error:  # transformers raises several kinds
        raise SystemExit(f"{output}: its configuration is refused by transformers ({error}).") from None
    described = {name: part.shape for name, part in model.named_parameters()}
    if wrong := sorted(name for name in described | shapes if described.get(name) != shapes.get(name)):
        raise SystemExit(
            f"{output}: config.json and the weights disagree about {len(wrong)} tensors, first {wrong[0]}."
        )
    stops = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    if ids["eos"] not in stops or generation.pad_token_id in (None, ids["eos"]):
        raise SystemExit(f"{output}: generation stops at {stops} and pads with {generation.pad_token_id}.")


def dry_run(base):
    """Do all of an export from the folder `base` but the weights, in a temporary folder: before days of training.

    Raises: SystemExit with what would make the export fail.
    """
    shapes, ids = describe_base(base)
    with tempfile.TemporaryDirectory() as folder:
        write_configs(base, Path(folder), "bfloat16")
        check_configs(folder, shapes, ids)
        check_tokenizer(base, folder)


@torch.no_grad()
def logits(model, tokenizer):
    """Return the logits of PROMPTS, a list of float tensors [1, tokens, vocabulary]."""
    return [model(tokenizer(prompt, return_tensors="pt").input_ids).logits for prompt in PROMPTS]


def verify(checkpoint, shapes, dtype, base, output):
    """Compare what was written with the checkpoint, one model in memory at a time. Returns: (model, tokenizer).

    Checked: each tensor's bits after rounding, the exact set of names, the tie, configurations, tokenizer and template,
    logits of three prompts against the `base`'s configuration filled with the checkpoint's weights.
    Raises: SystemExit naming what differs.
    """
    layout = hf_folder.shards(output)
    held = [name for names in layout.values() for name in names]
    if wrong := sorted(set(held) ^ shapes.keys()):
        raise SystemExit(f"{output} and the checkpoint differ in {len(wrong)} names, first {wrong[0]}.")
    tokenizer = check_tokenizer(base, output)
    reference = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=dtype).eval()
    head = reference.get_output_embeddings().weight
    if (reference.get_input_embeddings().weight is head) is (hf_folder.HEAD in shapes):
        raise SystemExit(f"{output}: input and output embedding are tied in one of checkpoint and config.json only.")
    parts = dict(reference.named_parameters())
    for file_name, names in layout.items():
        expected = read_weights(checkpoint, names, shapes, dtype)
        with safe_open(Path(output) / file_name, "pt") as file:
            if wrong := [n for n in names if not hf_folder.same_bits(file.get_tensor(n), expected[n])]:
                raise SystemExit(f"{Path(output) / file_name}: {wrong[0]} differs from the checkpoint.")
        for name in names:
            if name not in parts:
                raise SystemExit(f"{base}: config.json describes no tensor {name}. Resize the base again.")
            parts[name].data.copy_(expected[name])
    theirs = logits(reference, tokenizer)
    del reference, parts, head, expected
    model = hf_folder.load_model(output, "", dtype)
    for prompt, ours, expected in zip(PROMPTS, logits(model, tokenizer), theirs, strict=True):
        if not torch.equal(ours, expected):
            raise SystemExit(f"{output}: logits of {prompt!r} differ from the checkpoint's.")
    check_configs(output, shapes, chatml.special_ids(output, hf_folder.load_tokenizer(output)))
    return model, tokenizer


def sample(model, tokenizer, question, max_new_tokens):
    """Return (greedy answer to `question` through the template, whether it ended by itself)."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = model.generate(**prompt, do_sample=False, max_new_tokens=max_new_tokens)
    answer = output[0, prompt["input_ids"].shape[1] :]
    stops = model.generation_config.eos_token_id
    ended = answer[-1].item() in (stops if isinstance(stops, list) else [stops])
    return tokenizer.decode(answer, skip_special_tokens=True).strip(), ended


def prove(model, tokenizer, output):
    """Print how the verified `model` reads plain text and answers two questions, with a warning where it does not."""
    line, reads = reading_check.verdict(
        reading_check.loss(model, tokenizer), model.get_input_embeddings().num_embeddings
    )
    print(line)
    if not reads:
        print(f"WARNING: {output} is what was trained, but it cannot read plain text. {reading_check.CAUSES}")
    ended = []
    for question in QUESTIONS:
        answer, stopped = sample(model, tokenizer, question, MAX_NEW_TOKENS)
        ended.append(stopped)
        print(
            f"\nQ: {question}\nA: {answer}\n   ({'ended by itself' if stopped else f'cut at {MAX_NEW_TOKENS} tokens'})"
        )
    if not any(ended):
        print("WARNING: no answer ended by itself: trained too little, or without TRAIN_ON_SPECIAL_TOKENS.")


# ==== Chat ====


def chat(folder, temperature):
    """Talk to the model in `folder` in this terminal until Ctrl-D; an empty line starts anew."""
    model = hf_folder.load_model(folder, "").to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise SystemExit(f"{folder} has no chat template: it is no chat model.")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {"do_sample": False}
    window = model.config.max_position_embeddings
    print(f"{folder}: an empty line starts a new conversation, Ctrl-D ends.")
    turns = []
    while True:
        try:
            question = input("\nYou: ").strip()
        except EOFError:
            return
        turns = [*turns, {"role": "user", "content": question}] if question else []
        if not turns:
            print("(a new conversation)")
            continue
        prompt = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        length = prompt["input_ids"].shape[1]
        if length >= window:
            print(f"(the conversation fills the window of {window:,} tokens; an empty line starts a new one)")
            turns.pop()
            continue
        print("Model: ", end="", flush=True)
        output = model.generate(**prompt, streamer=streamer, max_new_tokens=window - length, **sampling)
        answer = tokenizer.decode(output[0, length:], skip_special_tokens=True)
        turns.append({"role": "assistant", "content": answer.strip()})


# ==== Main ====


def main(run):
    """Export, or verify, or chat, as the settings `run` (dict) say."""
    if DTYPE not in ("bfloat16", "float32"):
        raise SystemExit(f"DTYPE is {DTYPE!r}; it must be bfloat16 or float32.")
    if not 0 < MAX_SHARD_GB < math.inf or MAX_NEW_TOKENS < 1 or not 0 <= TEMPERATURE < math.inf:
        raise SystemExit("MAX_SHARD_GB must be above 0, MAX_NEW_TOKENS at least 1 and TEMPERATURE at least 0.")
    transformers.utils.logging.disable_progress_bar()
    if CHAT:
        with contextlib.suppress(KeyboardInterrupt):
            chat(CHAT, TEMPERATURE)
        return print()
    checkpoint, facts = choose(CHECKPOINT_DIR, CHECKPOINT)
    shapes = agree(checkpoint, facts, BASE_MODEL)
    output = Path(CARD or VERIFY_ONLY or OUTPUT_DIR)
    dtype_name = DTYPE
    if CARD or VERIFY_ONLY:
        dtype_name = system.read_json(output / "config.json", "export_hf.py").get("dtype")
        if dtype_name not in ("bfloat16", "float32"):
            raise SystemExit(f"{output} says dtype {dtype_name!r}: it is no export of this script.")
    dtype = getattr(torch, dtype_name)
    if VERIFY_ONLY or CARD:
        model, tokenizer = verify(checkpoint, shapes, dtype, BASE_MODEL, output)
    else:
        with system.staged(output, "--output-dir") as staging:
            write_weights(checkpoint, shapes, dtype, int(MAX_SHARD_GB * 1e9), staging)
            write_configs(BASE_MODEL, staging, DTYPE)
            model_card.write(staging, facts, checkpoint, shapes, DTYPE, EVAL_RESULTS)
            model, tokenizer = verify(checkpoint, shapes, dtype, BASE_MODEL, staging)
    if CARD:
        model_card.write(output, facts, checkpoint, shapes, dtype_name, EVAL_RESULTS)
        print(f"{output / 'README.md'} is written anew")
        return
    parts = list(output.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in parts)
    print(f"{checkpoint} -> {output}: {len(shapes)} tensors, {size / 1e9:.2f} GB in {dtype_name}, {len(parts)} file(s)")
    print("verified: every tensor and the logits of three prompts equal the checkpoint's")
    prove(model, tokenizer, output)


if __name__ == "__main__":
    main(settings.from_flags(globals()))
