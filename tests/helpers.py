"""What several test files use. Nothing heavy is imported before a function needs it."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSAGE = ROOT / "sft" / "evaluation" / "plain_text.txt"

# ==== Model folders ====


def make_reader(tokenizer, folder, tied=True):
    """Write a tiny Llama, float32, that knows plain_text.py's passage by heart in the ids of an HF `tokenizer`."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_theta": 10_000.0, "rope_type": "default"},
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = transformers.LlamaForCausalLM(config), tokenizer(PASSAGE.read_text(), return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ==== Data ====


def prepare_args(**changes):
    """Return prepare_data.py's settings (dict): no decontamination, a window of 256 tokens, and `changes`."""
    import prepare_data
    from sft import settings

    args = {name: getattr(prepare_data, name) for _, name, _ in settings.constants(prepare_data.__file__)}
    return args | {"MAX_SEQ_LEN": 256, "DECONTAMINATE_AGAINST": ()} | changes


def chat(*texts, first="user"):
    """Return a `messages` row whose roles alternate from `first`."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}


def source(**fields):
    """Return a Source with the name "s", the schema `messages` and all of its rows unless `fields` say otherwise."""
    from sft.data.sources import Source

    location = {} if "hub" in fields else {"path": "s.jsonl"}
    return Source(**({"name": "s", "schema": "messages", "examples": "all"} | location | fields))


class Rows(list):
    """Rows in memory, for a Work."""

    damage = None

    def take(self, numbers):
        return [(self[number], None) for number in numbers]


def work_of(encoder, rows, args=None, **fields):
    """Return the Work of a source whose `rows` are in memory. args: settings; fields: of the Source."""
    from sft.data import workers

    return workers.Work(source(**fields), Rows(rows), encoder, None, args or prepare_args())


def write_dataset(root, name, configs):
    """Write configs = {config: {split: rows}} as a folder that load_dataset(name, config) reads."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            file = root / name / config / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (root / name / "README.md").write_text("\n".join([*lines, "---", ""]))


# ==== Training ====


# ==== Evaluation ====
