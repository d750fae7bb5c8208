"""Step 4: turn a training checkpoint into a Hugging Face folder that any tool loads, and prove it equal.

Reads   a checkpoint of checkpoints/sft_v1/ and the base folder (config, generation_config, tokenizer).
Writes  exports/sft_v1/: safetensors, config, generation_config, tokenizer with its template, a model card.

    python export_hf.py                                  the newest whole checkpoint
    python export_hf.py --checkpoint step_000500 --output-dir exports/early

One process, no GPU. The weights are streamed shard by shard. The result is loaded again and compared with the
checkpoint, tensor by tensor and by its logits, before it gets its name; then it answers two questions.
"""

import json
import math
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import checkpoints
import files
import resize_vocab
import settings

# ---- Files ----
CHECKPOINT_DIR = "checkpoints/sft_v1"  # folder of the run, written by sft_v1.py
CHECKPOINT = "latest"  # "latest" (the newest whole one) | a name such as "step_000500" | a checkpoint's folder
BASE_MODEL = "checkpoints/base"  # folder that the run started from, written by resize_vocab.py
OUTPUT_DIR = "exports/sft_v1"  # folder to write; it must not hold anything yet
# ---- Format ----
DTYPE = "bfloat16"  # of the weights: "bfloat16" (2 bytes each) | "float32" (4)
MAX_SHARD_GIB = 5.0  # GiB; the largest safetensors file, and about the memory that writing takes
# ---- Samples ----
MAX_NEW_TOKENS = 100  # tokens of each sample answer

# ==== Reading the checkpoint ====

QUESTIONS = ("Who are you?", "What is the capital of France?")
PROMPTS = ("The sea is", "def add(a, b):", "In 1969, people")


def choose(folder, name):
    """Return (Path, facts) of the checkpoint `name` of the run in `folder`, verified against its manifest."""
    if name != "latest":
        chosen = Path(name) if Path(name).is_dir() else Path(folder) / name
        return chosen, checkpoints.verify(chosen)
    found = checkpoints.newest_whole(folder)
    if found is None:
        raise SystemExit(f"{folder} holds no whole checkpoint. Run sft_v1.py first, or name its --checkpoint-dir.")
    return found, files.read_json(found / "facts.json", "sft_v1.py")


def agree(checkpoint, facts, base):
    """Return {name: shape} of the weights in `checkpoint`, in the order of the folder `base`.

    Raises: SystemExit if base or tokenizer are not the run's, if they cannot end a turn, or if names or shapes differ
    from the base's.
    """
    layout = resize_vocab.shards(base)
    digests = {"base": files.folder_digest(base, "*.safetensors")}
    digests["tokenizer"] = files.sha256(Path(base) / "tokenizer.json")
    for kind, digest in digests.items():
        if facts["fingerprints"][kind] != digest:
            raise SystemExit(f"{base} is not the {kind} that {checkpoint} was trained from. Name it with --base-model.")
    ids = resize_vocab.special_ids(base, resize_vocab.load_tokenizer(base))
    stops = files.read_json(Path(base) / "generation_config.json", "resize_vocab.py").get("eos_token_id")
    if ids["eos"] not in (stops if isinstance(stops, list) else [stops]):
        raise SystemExit(f"{base}: generation stops at {stops}, not at {resize_vocab.STOP}. Resize the base again.")
    if not (Path(base) / "chat_template.jinja").is_file():
        raise SystemExit(f"{base} has no chat_template.jinja. Run resize_vocab.py again.")
    stored = dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    stored = {key.removeprefix("model."): entry.size for key, entry in stored.items() if key.startswith("model.")}
    expected = {}
    for file_name, names in layout.items():
        with safe_open(Path(base) / file_name, "pt") as file:
            expected |= {name: torch.Size(file.get_slice(name).get_shape()) for name in names}
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

    Beside the result it holds 256 MiB in float32 at a time: one tensor at a time took 40 ms more for each.
    Raises: SystemExit if a value is not finite.
    """
    result = {}
    for part in shard_names({name: shapes[name] for name in names}, torch.float32, 2**28):
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
    config = files.read_json(output / "config.json", "resize_vocab.py") | {"dtype": dtype_name}
    tokenizer = files.read_json(output / "tokenizer_config.json", "resize_vocab.py")
    tokenizer["chat_template"] = (output / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 refuses "TokenizersBackend"
    for name, content in (("config.json", config | older_names(config)), ("tokenizer_config.json", tokenizer)):
        (output / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def metrics(run_folder, step):
    """Return (last training loss, [validation losses in order]) up to `step` from metrics.jsonl, or (None, [])."""
    path = Path(run_folder) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    lines = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last one off
    lines = [line for line in lines if line["step"] <= step]
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    held_out = [line["validation_loss"] for line in lines if line.get("validation_loss") is not None]
    return (losses[-1] if losses else None), held_out


def model_card(facts, checkpoint, shapes, dtype_name):
    """Return the model card (Markdown): what the run was, its data, its recipe, how to chat with the result."""
    run, loss, held_out = facts["settings"], *metrics(checkpoint.parent, facts["step"])
    lines = [
        "---",
        "pipeline_tag: text-generation",
        "library_name: transformers",
        "---",
        "# A chat model by supervised fine-tuning",
        "",
        f"{sum(math.prod(shape) for shape in shapes.values()):,} parameters, {dtype_name}; "
        f"from `{facts['base_model']}`, checkpoint `{checkpoint.name}` ({facts['updates']:,} optimizer steps).",
        "",
    ]
    report = Path(run["DATA_DIR"]) / "report.md"
    if report.is_file() and facts["fingerprints"]["data"] == json.dumps(
        files.read_json(report.with_suffix(".json"), "prepare_data.py").get("digest"), sort_keys=True
    ):
        lines += ["## Data", "", report.read_text(encoding="utf-8")]
    names = ("SEQUENCES_PER_STEP", "EPOCHS", "MAX_STEPS", "LEARNING_RATE", "MIN_LEARNING_RATE", "WARMUP_STEPS")
    names += ("ADAM_BETA1", "ADAM_BETA2", "WEIGHT_DECAY", "MAX_GRAD_NORM", "COMPUTE_DTYPE", "SEED")
    lines += ["## Recipe", "", *(f"- {name}: {run[name]}" for name in names)]
    if loss is not None:
        lines.append(f"- last training loss: {loss:.4f}")
    if held_out:
        lines.append(f"- validation loss: {held_out[0]:.4f} at first, {held_out[-1]:.4f} at last")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return "\n".join(
        [
            *lines,
            f"- versions: {versions}; {facts['world_size']} processes",
            "",
            "## Chat",
            "",
            "ChatML; the template is in the tokenizer, and generation stops at `<|im_end|>`.",
            "",
            "```python",
            "from transformers import pipeline",
            'chat = pipeline("text-generation", model=".")',
            'print(chat([{"role": "user", "content": "Who are you?"}], max_new_tokens=200)[0]["generated_text"][-1])',
            "```",
            "",
        ]
    )


# ==== Verification ====


def verify(checkpoint, shapes, dtype, base, layout, output):
    """Compare what was written with the checkpoint. Returns: (the loaded model, its tokenizer).

    Checked: a strict load, the tie, each tensor's bits after rounding, logits of three prompts against the `base`'s
    configuration filled with the checkpoint's weights, the template. Raises: SystemExit naming what differs.
    """
    model = resize_vocab.load(output, dtype)
    head = model.get_output_embeddings().weight
    if (model.get_input_embeddings().weight is head) is (resize_vocab.HEAD in shapes):
        raise SystemExit(f"{output}: input and output embedding are tied in one of checkpoint and config.json only.")
    reference = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=dtype).eval()
    parts = dict(reference.named_parameters())
    for file_name, names in layout.items():
        expected = read_weights(checkpoint, names, shapes, dtype)
        with safe_open(output / file_name, "pt") as file:
            if wrong := [name for name in names if not torch.equal(file.get_tensor(name), expected[name])]:
                raise SystemExit(f"{output / file_name}: {wrong[0]} differs from the checkpoint.")
        for name in names:
            parts.pop(name).data.copy_(expected[name])
    if parts:
        raise SystemExit(f"{output} lacks the tensor {next(iter(parts))}.")
    tokenizer = AutoTokenizer.from_pretrained(output)
    if tokenizer.chat_template != (Path(base) / "chat_template.jinja").read_text(encoding="utf-8"):
        raise SystemExit(f"{output}: its chat template is not the one of {base}.")
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            ours, theirs = model(ids).logits, reference(ids).logits
        if not torch.equal(ours, theirs):
            raise SystemExit(f"{output}: logits of {prompt!r} differ from the checkpoint's.")
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


# ==== Main ====


def main(run):
    """Export as the settings `run` (dict) say."""
    if DTYPE not in ("bfloat16", "float32"):
        raise SystemExit(f"DTYPE is {DTYPE!r}; it must be bfloat16 or float32.")
    if not 0 < MAX_SHARD_GIB < math.inf or MAX_NEW_TOKENS < 1:
        raise SystemExit("MAX_SHARD_GIB must be above 0 and MAX_NEW_TOKENS at least 1.")
    transformers.utils.logging.disable_progress_bar()
    checkpoint, facts = choose(CHECKPOINT_DIR, CHECKPOINT)
    shapes = agree(checkpoint, facts, BASE_MODEL)
    dtype, output = getattr(torch, DTYPE), Path(OUTPUT_DIR)
    with files.staged(output) as staging:
        layout = write_weights(checkpoint, shapes, dtype, int(MAX_SHARD_GIB * 2**30), staging)
        write_configs(BASE_MODEL, staging, DTYPE)
        (staging / "README.md").write_text(model_card(facts, checkpoint, shapes, DTYPE), encoding="utf-8")
        model, tokenizer = verify(checkpoint, shapes, dtype, BASE_MODEL, layout, staging)
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    print(f"{checkpoint} -> {output}: {len(shapes)} tensors, {size / 2**30:.2f} GiB in {DTYPE}, {len(layout)} file(s)")
    print("verified: every tensor and the logits of three prompts equal the checkpoint's")
    for question in QUESTIONS:
        answer, ended = sample(model, tokenizer, question, MAX_NEW_TOKENS)
        print(f"\nQ: {question}\nA: {answer}\n   ({'ended by itself' if ended else f'cut at {MAX_NEW_TOKENS} tokens'})")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
