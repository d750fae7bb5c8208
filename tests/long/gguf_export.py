"""Convert exports with llama.cpp's own converter, and compare what llama.cpp and transformers read and answer.

Writes  benchmarks/work/gguf/: an environment with llama-cpp-python, which pip builds from source the first time (20
        minutes on two busy CPU cores; needs a C++ compiler), the source with the converter, and the models.

    python tests/long/gguf_export.py                                two models that it makes itself
    python tests/long/gguf_export.py --export-dirs exports/sft_v1   exports that you have

Its own two are SmolLM2-135M-Instruct after one small step, and a tiny Llama with a SentencePiece tokenizer and a BOS,
which knows a few answers by heart.

In float32, with greedy decoding: each question must get the same answer, with the same end; the text of Ollama's
Modelfile must have the ids that the chat template gives, with one BOS where there is one.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
import transformers

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS.parent / "benchmarks"), str(TESTS)]
import common  # puts the suite on the path
import helpers
import test_export_hf

from sft import hf_folder, settings
from sft.data import sentencepiece_tokenizer

# ---- GGUF ----
EXPORT_DIRS = ()  # exports to convert; none: two models that are made here
MAX_NEW_TOKENS = 60  # of an answer

# ==== What it needs ====

WORK = common.WORK / "gguf"
PACKAGE = "llama-cpp-python==0.3.36"
SOURCE = WORK / PACKAGE.replace("-", "_").replace("==", "-")
CONVERTER = SOURCE / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
PYTHON = WORK / "venv" / "bin" / "python"
QUESTIONS = (*test_export_hf.ANSWERS, "Write one sentence about the sea.", "What is 12 * 12?  Café, naïve, 漢字!")


def install():
    """Download the source, with the converter in it, and build llama-cpp-python in its own environment."""
    WORK.mkdir(parents=True, exist_ok=True)
    if not CONVERTER.is_file():
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", WORK)
        common.run(*pip, PACKAGE)
        with tarfile.open(next(WORK.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(WORK, filter="data")
    if not PYTHON.exists():
        common.run(sys.executable, "-m", "venv", WORK / "venv")
    if subprocess.run([PYTHON, "-c", "import llama_cpp"], capture_output=True).returncode:
        print(f"building {PACKAGE}", flush=True)
        common.run(PYTHON, "-m", "pip", "install", "--quiet", SOURCE, env={"CMAKE_BUILD_PARALLEL_LEVEL": "2"})


def smollm(folder):
    """Write an export of SmolLM2-135M-Instruct after one small step into `folder`; return its path."""
    base, data, resized, run, export = (str(folder / name) for name in ("base", "data", "resized", "run", "export"))
    shutil.copytree(common.base_folder(), base)
    prepare = "--mixture demo/mixture.json --limit 8 --max-seq-len 256 --deduplicate off --validation-conversations 2"
    train = "--max-steps 1 --sequences-per-step 2 --validate-every 0 --warmup-steps 0 --compute-dtype float32"
    common.run(
        *(sys.executable, "prepare_data.py", "--base-model", base, "--data-dir", data, *shlex.split(prepare)),
        *common.DECONTAMINATION_OFF,
    )
    folders = ("--data-dir", data, "--resized-model", resized)
    common.run(sys.executable, "resize_vocab.py", "--base-model", base, *folders)
    common.run(*common.TORCHRUN, "1", "sft_v1.py", *folders, "--checkpoint-dir", run, *shlex.split(train))
    command = (sys.executable, "export_hf.py", "--checkpoint-dir", run, "--resized-model", resized)
    common.run(*command, "--export-dir", export, "--max-new-tokens", "1")
    return Path(export)


def by_heart(folder):
    """Write an export that knows ANSWERS, of a tiny Llama with a SentencePiece tokenizer; return its path."""
    folder.mkdir()
    rules = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}  # as Llama's
    path = helpers.train_sentencepiece(folder, model_type="bpe", vocab_size=380, byte_fallback=True, **rules)
    tokenizer, names = sentencepiece_tokenizer.convert(path, True, helpers.PASSAGE.read_text())
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(names))
    test_export_hf.build(folder / "work", False, folder / "tokenizer")
    return folder / "work" / "exports" / "sft_v1"


# ==== Comparison ====


def transformers_says(export):
    """Return {"ids", "ollama", "answers"}: of QUESTIONS the template's ids, the Modelfile's text, [answer, ended]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    model = hf_folder.load_model(export, "Name an export with --export-dirs.", torch.float32)
    said = {"ids": [], "ollama": [], "answers": []}
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        said["ids"].append(hf_folder.prompt(tokenizer, turns, "cpu")["input_ids"][0].tolist())
        said["ollama"].append(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        said["answers"].append([*hf_folder.answer(model, tokenizer, question, MAX_NEW_TOKENS)])
    return said


def llama_says(export, texts):
    """Return what gguf_answers.py prints about the export: of `texts` the ids, and of QUESTIONS the answers."""
    path = WORK / "model.gguf"
    environment = {"PYTHONPATH": ""}
    common.run(sys.executable, CONVERTER, export, "--outfile", path, "--outtype", "f32", env=environment)
    asked = {"path": str(path), "texts": texts, "questions": QUESTIONS, "max_tokens": MAX_NEW_TOKENS}
    command = [PYTHON, Path(__file__).with_name("gguf_answers.py")]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"llama.cpp failed on {export}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(export):
    """Print each question with both answers; return (number of differences, number of answers that ended)."""
    ours = transformers_says(export)
    theirs = llama_says(export, ours["ollama"])
    differences = ended = 0
    print(f"\n{os.path.relpath(export)}, {'with' if theirs['bos'] else 'without'} a BOS")
    for number, question in enumerate(QUESTIONS):
        ids = ours["ids"][number] == theirs["ids"][number]
        answers = [said["answers"][number] for said in (ours, theirs)]
        equal = answers[0] == answers[1]
        differences += (not ids) + (not equal)
        ended += answers[0][1]
        print(f"  {question!r}: ids {'equal' if ids else 'DIFFER'}, answer {'equal' if equal else 'DIFFERS'}")
        print(f"    transformers {answers[0]}\n    llama.cpp    {answers[1]}")
    return differences, ended


def main(_):
    """Compare every export, and print RESULT; exit with 1 if anything differs or no answer ended by itself."""
    install()
    transformers.utils.logging.disable_progress_bar()
    machine = common.machine()
    exports = [Path(folder) for folder in EXPORT_DIRS]
    if not exports:
        shutil.rmtree(WORK / "models", ignore_errors=True)
        (WORK / "models").mkdir()
        exports = [by_heart(WORK / "models" / "by-heart"), smollm(WORK / "models" / "smollm")]
    counts = [compare(export) for export in exports]
    differences, ended = (sum(count) for count in zip(*counts, strict=True))
    common.result(models=len(exports), questions=len(QUESTIONS), ended=ended, differences=differences)
    return 1 if differences or not ended or not machine else 0


if __name__ == "__main__":
    sys.exit(main(settings.from_flags(globals())))
