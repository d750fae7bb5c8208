"""What several test files use. Nothing heavy is imported before a function needs it."""

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


# ==== Training ====


# ==== Evaluation ====
