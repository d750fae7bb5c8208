"""TRL's SFTTrainer trains on a folder of prepare_data.py as it is, on the same tokens.

.venv-benchmarks/bin/python -m pytest benchmarks/test_trl.py
"""

import subprocess
import sys

import common
import datasets
import peer_trl
import pytest
import torch
from transformers import AutoTokenizer
from trl import SFTTrainer

STEPS, BATCH = 2, 2
SUITE = common.ROOT / ".venv" / "bin" / "python"  # prepare_data.py may need what only the suite's environment has


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A finished folder, made by prepare_data.py from the demo's mixture."""
    output = tmp_path_factory.mktemp("trl") / "data"
    python = str(SUITE if SUITE.exists() else sys.executable)
    command = [python, "prepare_data.py", "--base-model", str(common.base_folder())]
    command += ["--mixture", "demo/mixture.json", "--data-dir", str(output), "--max-seq-len", "256"]
    command += ["--validation-conversations", "2", *common.DECONTAMINATION_OFF]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return output


class Recorder(SFTTrainer):
    """SFTTrainer that keeps what reaches the model."""

    def compute_loss(self, model, inputs, *args, **options):
        self.batches = [*getattr(self, "batches", []), {key: value.clone() for key, value in inputs.items()}]
        return super().compute_loss(model, inputs, *args, **options)


def test_sft_trainer_trains_on_our_folder_on_exactly_our_tokens(prepared, tmp_path):
    rows = datasets.load_from_disk(str(prepared))["train"]
    assert rows.features["input_ids"].feature.dtype == "uint16"
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    steps = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1}
    # TRL refuses assistant_only_loss on a tokenised dataset: there it applies assistant_masks by default.
    config = peer_trl.trl_config(tmp_path, save_strategy="no", disable_tqdm=True, **steps)
    model = peer_trl.tiny_model(tokenizer)
    before = model.model.embed_tokens.weight.detach().clone()
    trainer = Recorder(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()

    assert len(trainer.train_dataset) == len(rows)
    assert len(trainer.batches) == STEPS and not torch.equal(before, model.model.embed_tokens.weight)
    masks = {tuple(row["input_ids"]): row["assistant_masks"] for row in rows}
    seen = 0
    for batch in trainer.batches:
        for ids, labels, attended in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            length = int(attended.sum())
            mask = masks[tuple(ids[:length].tolist())]  # a KeyError: other tokens than ours
            expected = [token if trained else -100 for token, trained in zip(ids[:length].tolist(), mask, strict=True)]
            assert labels.tolist() == expected + [-100] * (len(ids) - length)
            seen += 1
    assert seen == STEPS * BATCH
