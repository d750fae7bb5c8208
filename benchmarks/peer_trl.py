"""TRL's own preparation of a JSONL file of `messages`, timed; benchmarks/prepare.py runs it in .venv-benchmarks.

The time goes from load_dataset to the tokenised dataset that SFTTrainer's constructor leaves; the model is tiny.
Prints one line of JSON: tokens, sequences, seconds.
"""

import json
import tempfile
import time

import common
import datasets
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from sft import settings

# ---- Inputs ----
MESSAGES = "benchmarks/work/messages.jsonl"  # the conversations
TOKENIZER = "benchmarks/work/prepared/tokenizer"  # its template has generation marks
MAX_SEQ_LEN = 2048  # tokens


# ==== Functions ====


def tiny_model(tokenizer):
    """Return a random Llama too small to cost anything, with the tokenizer's vocabulary."""
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=MAX_SEQ_LEN, tie_word_embeddings=True, **shape)
    )


def trl_config(folder, **options):
    """Return the SFTConfig that the benchmark and benchmarks/test_trl.py share; the rest is TRL's default."""
    defaults = {"max_length": MAX_SEQ_LEN, "report_to": "none", "use_cpu": True}
    return SFTConfig(output_dir=str(folder), bf16=False, **defaults, **options)


def main(args):
    """Prepare MESSAGES once, with nothing cached, and print the figures."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model = tiny_model(tokenizer)
    datasets.disable_caching()
    with tempfile.TemporaryDirectory(dir=common.WORK) as scratch:
        config = trl_config(scratch, assistant_only_loss=True, dataset_num_proc=common.CORES)
        begin = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=MESSAGES, split="train", cache_dir=scratch)
        trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
        seconds = time.perf_counter() - begin
        lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
        print(json.dumps({"tokens": sum(lengths), "sequences": len(lengths), "seconds": seconds}))


if __name__ == "__main__":
    main(settings.from_flags(globals()))
