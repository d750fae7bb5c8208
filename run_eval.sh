#!/usr/bin/env bash
# Measure a model folder with lm_eval, before or after fine-tuning, and show what changed.
#
#   bash run_eval.sh before            the base model, as it was before its vocabulary was resized
#   bash run_eval.sh after             the fine-tuned model; then the before/after report (compare_evals.py)
#   bash run_eval.sh NAME MODEL_DIR    any other model folder, under its own name
#
# Reads a Hugging Face model folder. Writes OUTPUT/NAME/: for each task lm_eval's results and every answered question,
# and run.json, the facts that lm_eval does not record. A folder OUTPUT/NAME exists only when its run finished; until
# then finished tasks stand in OUTPUT/.NAME.unfinished, and the same command goes on after them. With CHAT_TEMPLATE=1
# NAME becomes NAME-chat. This file holds the settings; the work is in measure.py.
# Every setting below can be given in the environment: LIMIT=20 DEVICE=cpu bash run_eval.sh before
set -euo pipefail

# ---- Models ----
BEFORE_MODEL=${BEFORE_MODEL:-models/base}      # the "before" model folder
AFTER_MODEL=${AFTER_MODEL:-exports/sft_v1}     # the "after" model folder, written by export_hf.py
RESIZED_MODEL=${RESIZED_MODEL:-checkpoints/base}   # "before" where chat markers are needed, written by resize_vocab.py
# ---- What is measured ----
SEVEN=hellaswag,piqa,winogrande,arc_easy,arc_challenge,lambada_openai,mmlu
CHAT_TEMPLATE=${CHAT_TEMPLATE:-0}   # 1: a second pass through the model's chat template, beside the first
[ "$CHAT_TEMPLATE" != 1 ] || SEVEN+=,ifeval
TASKS=${TASKS:-$SEVEN}              # lm_eval's names, by commas; the chat pass follows verifiable instructions too
INCLUDE_PATH=${INCLUDE_PATH:-}      # a folder with task definitions of your own; empty: only lm_eval's
FEWSHOT=${FEWSHOT:-}                # solved examples before each question; empty: each task's own number (these seven: 0)
LIMIT=${LIMIT:-}                    # questions per task for a quick look, or their share below 1; empty: all of them
ASSISTANT_DATA=${ASSISTANT_DATA-data/sft_v1}   # of the built-in check after training (assistant_check.py); empty: none
ASSISTANT_FLAGS=${ASSISTANT_FLAGS:-}   # further flags of assistant_check.py, such as "--answers 20"
CHECK_READING=${CHECK_READING:-1}   # 0: measure even a model that cannot read plain text
# ---- How ----
DEVICE=${DEVICE:-gpus}              # gpus: all there are | cpu | cuda:N; several by commas take a task each, side by side
DTYPE=${DTYPE:-bfloat16}            # of the weights; the same for before and after
BATCH_SIZE=${BATCH_SIZE:-auto:2}    # auto:N looks for the largest batch N times; scores move a little with it
SEEDS=${SEEDS:-0,1234,1234,1234}    # Python's, numpy's, torch's, and that of the solved examples
MODEL_ARGS=${MODEL_ARGS:-}          # further lm_eval model arguments, such as max_length=2048,add_bos_token=True
# ---- Where ----
OUTPUT=${OUTPUT:-eval-results}      # results stand in OUTPUT/NAME, the comparison in OUTPUT

refuse() { echo "run_eval.sh: $*" >&2; exit 1; }

[ "$CHAT_TEMPLATE" != 1 ] || BEFORE_MODEL=$RESIZED_MODEL
case "$#:${1:-}" in
    1:before) name=before model=$BEFORE_MODEL ;;
    1:after)  name=after  model=$AFTER_MODEL ;;
    2:*)      name=$1     model=$2 ;;
    *)        sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
[[ $name =~ ^[A-Za-z0-9][A-Za-z0-9_-]*$ ]] || refuse "the name '$name' must be letters, digits, '_' and '-'."
[[ $model != *[,=]* ]] || refuse "lm_eval cannot read a folder with ',' or '=' in its name: $model"
if [ -d .venv/bin ]; then PATH=$PWD/.venv/bin:$PATH; fi
command -v lm_eval > /dev/null || refuse "no lm_eval on the path. Activate the environment that holds it, or make" \
    "one here: python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"

export RESIZED_MODEL TASKS INCLUDE_PATH FEWSHOT LIMIT CHAT_TEMPLATE ASSISTANT_DATA ASSISTANT_FLAGS CHECK_READING
export DEVICE DTYPE BATCH_SIZE SEEDS MODEL_ARGS OUTPUT
export PYTHONPATH="$(cd "$(dirname "$0")" && pwd)${PYTHONPATH:+:$PYTHONPATH}"
exec "$(dirname "$(command -v lm_eval)")/python" -m sft.evaluation.run_eval "$name" "$model"
