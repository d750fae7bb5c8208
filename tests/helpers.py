"""What several test files use. Nothing heavy is imported before a function needs it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSAGE = ROOT / "sft" / "evaluation" / "plain_text.txt"

# ==== Model folders ====


def make_reader(tokenizer, folder, tied=True):
    """Write a tiny Llama, float32, that knows reading_check.py's passage by heart in the ids of an HF `tokenizer`."""
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


# ==== Training ====


# ==== Evaluation ====

CONVERSATIONS = [  # (source, turns)
    ("a", [("user", "Who are you?"), ("assistant", "I am Genesis.")]),
    ("a", [("system", "Be brief."), ("user", "Say yes"), ("assistant", "yes"), ("user", "No?"), ("assistant", "no")]),
    ("b", [("user", "1 + 1"), ("assistant", "<think>\none and one\n</think>\n\ntwo")]),
    ("b", [("user", "2 + 2"), ("assistant", "four")]),
]


def defaults(module, **changes):
    """Return the settings at the top of a script's `module` as a dict, with some changed: what `main` takes."""
    from sft import settings

    args = {name: getattr(module, name) for _, name, _ in settings.constants(module.__file__)}
    assert changes.keys() <= args.keys()
    return args | changes


def write_tokenizer(folder):
    """Write a byte-level tokenizer without chat markers, as a base has it. Returns: the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the cat sat on the mat"], trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def write_conversations(folder, base):
    """Write CONVERSATIONS as prepare_data.py does, with the tokenizer in `base` extended. Returns: that tokenizer."""
    import datasets

    from sft.data import chatml

    tokenizer, _ = chatml.extend_tokenizer(base, True, False)
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = []
    for source, turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        row = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        masks = [bool(mask) for mask in row["assistant_masks"]]
        rows.append({"input_ids": row["input_ids"], "assistant_masks": masks, "source": source})
    split = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": split, "validation": split}).save_to_disk(folder)
    return tokenizer


def write_model(folder, tokenizer, seed, rows=None, context=512):
    """Write a tiny Llama, bfloat16; with `rows` (of the data) it is trained until it knows them by heart."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    names = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=context, **names, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(60 if rows else 0):
        for row in rows:
            ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["assistant_masks"])
            model(input_ids=ids[None], labels=ids.where(mask, -100)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config = GenerationConfig(**names)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
