#!/usr/bin/env bash
# Measure a model folder with lm_eval, before or after fine-tuning, and show what changed.
#
#   bash run_eval.sh before            the base model, as it was before its vocabulary was resized
#   bash run_eval.sh after             the fine-tuned model; then the before/after table (compare_evals.py)
#   bash run_eval.sh NAME MODEL_DIR    any other model folder, under its own name
#
# Reads a Hugging Face model folder. Writes OUTPUT/NAME/: lm_eval's results and every answered question, and run.json,
# the facts that lm_eval does not record. A folder OUTPUT/NAME exists only when its run finished.
# Every setting below can be given in the environment: LIMIT=20 DEVICE=cpu bash run_eval.sh before
set -euo pipefail

# ---- Models ----
BEFORE_MODEL=${BEFORE_MODEL:-models/base}    # the "before" model folder
AFTER_MODEL=${AFTER_MODEL:-exports/sft_v1}   # the "after" model folder, written by export_hf.py
# ---- What is measured ----
TASKS=${TASKS:-hellaswag,piqa,winogrande,arc_easy,arc_challenge,lambada_openai,mmlu}   # lm_eval's names, by commas
INCLUDE_PATH=${INCLUDE_PATH:-}      # a folder with task definitions of your own; empty: only lm_eval's
LIMIT=${LIMIT:-}                    # questions per task for a quick look; empty: all of them
CHAT_TEMPLATE=${CHAT_TEMPLATE:-0}   # 1: prompts go through the model's chat template; never compare 1 with 0
# ---- How ----
DEVICE=${DEVICE:-cuda:0}            # cuda:N or cpu
DTYPE=${DTYPE:-bfloat16}            # of the weights; the same for before and after
BATCH_SIZE=${BATCH_SIZE:-auto:2}    # auto:N looks for the largest batch N times; scores move a little with it
MODEL_ARGS=${MODEL_ARGS:-}          # further lm_eval model arguments, such as max_length=2048,add_bos_token=True
# ---- Where ----
OUTPUT=${OUTPUT:-eval-results}      # results stand in OUTPUT/NAME, the comparison in OUTPUT

refuse() { echo "run_eval.sh: $*" >&2; exit 1; }

# ---- The request ----
case "$#:${1:-}" in
    1:before) name=before model=$BEFORE_MODEL ;;
    1:after)  name=after  model=$AFTER_MODEL ;;
    2:*)      name=$1     model=$2 ;;
    *)        sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
[[ $name =~ ^[A-Za-z0-9][A-Za-z0-9_-]*$ ]] || refuse "the name '$name' must be letters, digits, '_' and '-'."
[[ $model != *[,=]* ]] || refuse "lm_eval cannot read a folder with ',' or '=' in its name: $model"
result=$OUTPUT/$name
staging=$OUTPUT/.$name.unfinished

# ---- Everything that can fail early ----
# lm_eval works for hours; what is wrong is said before that. Unknown tasks lm_eval itself refuses, before it loads the
# model (its index of tasks takes 7 seconds to build, so it is not built twice).
if [ -d .venv/bin ]; then PATH=$PWD/.venv/bin:$PATH; fi
command -v lm_eval > /dev/null || refuse "no lm_eval on the path. Activate the environment that holds it, or make" \
    "one here: python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"
python=$(dirname "$(command -v lm_eval)")/python
if [ -n "$(ls -A "$result" 2> /dev/null)" ]; then
    refuse "$result already holds results. Move them away first (mv $result $result-old) or choose another name."
fi
for file in config.json tokenizer_config.json; do
    [ -f "$model/$file" ] || refuse "no $file in the model folder $model. It must be a Hugging Face folder such as" \
        "export_hf.py writes; BEFORE_MODEL and AFTER_MODEL say where."
done
compgen -G "$model/*.safetensors" > /dev/null || refuse "no *.safetensors in the model folder $model: its weights" \
    "are missing."
[ -z "$INCLUDE_PATH" ] || [ -d "$INCLUDE_PATH" ] || refuse "no folder $INCLUDE_PATH (INCLUDE_PATH)."
rm -rf "$staging"   # of a run that was killed: nothing in it is a result
mkdir -p "$staging"
trap 'rm -rf "$staging"' EXIT
echo "run_eval.sh: $model as '$name'; tasks $TASKS; $DTYPE on $DEVICE, batch size $BATCH_SIZE${LIMIT:+; LIMIT=$LIMIT}"

"$python" - "$model" "$DEVICE" "$staging/run.json" "$TASKS" "$INCLUDE_PATH" "$CHAT_TEMPLATE" <<'PYTHON'
import hashlib, importlib.metadata, json, platform, shutil, sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

model, device, run_json, tasks, include_path, chat_template = sys.argv[1:]


def refuse(sentence):
    sys.exit(f"run_eval.sh: {sentence}")


if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
    refuse(f"DEVICE={device}, but torch sees {torch.cuda.device_count()} GPUs. DEVICE=cpu works too, slowly.")
if shutil.disk_usage(Path(run_json).parent).free < 2**30:
    refuse(f"less than 1 GiB free for {Path(run_json).parent}; the logged questions of the seven tasks need that.")
try:
    config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
except Exception as error:
    refuse(f"the config or tokenizer in {model} does not load: {error}")
if len(tokenizer) > config.vocab_size:
    refuse(f"the tokenizer in {model} has {len(tokenizer):,} tokens, but the model {config.vocab_size:,} rows. Write "
           "the folder again with the script that made it.")
if chat_template == "1" and not tokenizer.chat_template:
    refuse(f"CHAT_TEMPLATE=1, but the tokenizer in {model} has no chat template.")
files = sorted([*Path(model).glob("*.safetensors"), *Path(model).glob("*.json"), *Path(model).glob("*.jinja")])
facts = {
    "model": model,
    "files_sha256": {f.name: hashlib.file_digest(f.open("rb"), "sha256").hexdigest() for f in files},
    "adds_bos": tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id],  # lm_eval does as the tokenizer does
    "tasks": tasks.split(","),
    "include_path": include_path,
    "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or device,
    "versions": {"python": platform.python_version()}
    | {p: importlib.metadata.version(p) for p in ("lm_eval", "torch", "transformers", "tokenizers", "datasets")},
}
Path(run_json).write_text(json.dumps(facts, indent=2) + "\n")
PYTHON

# ---- The measurement ----
arguments=(
    --model hf --model_args "pretrained=$model,dtype=$DTYPE${MODEL_ARGS:+,$MODEL_ARGS}" --tasks "$TASKS"
    --device "$DEVICE" --batch_size "$BATCH_SIZE" --log_samples --output_path "$staging"
)
[ -z "$LIMIT" ] || arguments+=(--limit "$LIMIT")
[ -z "$INCLUDE_PATH" ] || arguments+=(--include_path "$INCLUDE_PATH")
[ "$CHAT_TEMPLATE" != 1 ] || arguments+=(--apply_chat_template)
lm_eval "${arguments[@]}" || {
    code=$?
    echo "run_eval.sh: lm_eval ended with exit code $code; there is no result of '$name'. Its message stands above." >&2
    exit "$code"
}
# lm_eval only warns when it cannot write.
compgen -G "$staging/*/results_*.json" > /dev/null || refuse "lm_eval ended, but wrote no results into $OUTPUT: is" \
    "the disk full?"
mkdir -p "$result" && rmdir "$result"   # an empty folder of that name may stand there; mv would move into it
mv "$staging" "$result"
echo "run_eval.sh: results in $result"

# ---- The comparison ----
compare=("$python" "$(dirname "$0")/compare_evals.py" --before "$OUTPUT/before" --after "$result" --output "$OUTPUT")
if [ "$name" = after ] && [ -d "$OUTPUT/before" ]; then
    "${compare[@]}"
elif [ "$name" != before ]; then
    echo "run_eval.sh: to compare it with 'before': ${compare[*]:1}"
fi
