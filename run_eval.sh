#!/usr/bin/env bash
# Measure a model folder with lm_eval, before or after fine-tuning, and report what changed.
#
#   bash run_eval.sh before              the base model, as it was before its vocabulary was resized
#   bash run_eval.sh after               the fine-tuned model; then the before/after report and the export's model card
#   bash run_eval.sh NAME MODEL_DIR      any other model folder, under its own name
#   bash run_eval.sh compare [NAME...]   write report and card again; each NAME is the same recipe with another seed
#
# Reads a Hugging Face model folder. Writes EVAL_RESULTS/NAME/: for each task lm_eval's results and every answered
# question, and run.json, the settings and versions that lm_eval does not record. The folder EVAL_RESULTS/NAME exists
# only when its run finished. Until then finished tasks are in EVAL_RESULTS/NAME.unfinished, and the same command
# continues after them. With CHAT_TEMPLATE=1, NAME becomes NAME-chat.
# Set any of these in the environment: LIMIT=20 DEVICE=cpu bash run_eval.sh before
set -euo pipefail

# ---- Folders ----
BASE_MODEL=${BASE_MODEL:-models/base}            # the "before" model
EXPORT_DIR=${EXPORT_DIR:-exports/sft_v1}         # the "after" model, written by export_hf.py; its card gets the report
RESIZED_MODEL=${RESIZED_MODEL:-models/resized}   # "before" where chat markers are needed, written by resize_vocab.py
DATA_DIR=${DATA_DIR-data/sft_v1}                 # for assistant_check.py, and the tasks that it is clear of; empty: neither
EVAL_RESULTS=${EVAL_RESULTS:-eval-results}       # results are in EVAL_RESULTS/NAME, the report in EVAL_RESULTS
# ---- What to measure ----
CHAT_TEMPLATE=${CHAT_TEMPLATE:-0}   # 1: a second pass, which asks through the chat template and reads the answers
TASKS=${TASKS:-}                    # lm_eval's names, comma-separated; empty: those of sft/eval_tasks.py
INCLUDE_PATH=${INCLUDE_PATH:-}      # a folder with your own task definitions; empty: only lm_eval's
FEWSHOT=${FEWSHOT:-}                # solved examples before each question; empty: none in the chat pass, else as the
[ "$CHAT_TEMPLATE" != 1 ] || FEWSHOT=${FEWSHOT:-0}   # task has it (the seven: none)
LIMIT=${LIMIT:-}                    # questions per task for a quick look, or their share below 1; empty: all of them
ASSISTANT_FLAGS=${ASSISTANT_FLAGS:-}   # further flags of assistant_check.py, such as "--answers 20"
CHECK_READING=${CHECK_READING:-1}   # 0: measure even a model that cannot read plain text
# ---- How ----
DEVICE=${DEVICE:-gpus}              # gpus: all of them | cpu | cuda:N; each of several, comma-separated, takes a task
DTYPE=${DTYPE:-bfloat16}            # of the weights; the same for before and after
BATCH_SIZE=${BATCH_SIZE:-auto:2}    # auto:N looks for the largest batch N times; scores move a little with it
SEEDS=${SEEDS:-0,1234,1234,1234}    # Python's, numpy's, torch's, and that of the solved examples
MODEL_ARGS=${MODEL_ARGS:-}          # further lm_eval model arguments, such as max_length=2048,add_bos_token=True

refuse() { echo "run_eval.sh: $*" >&2; exit 1; }

# Run a command that ends when this script does, however that ends, and wait for it.
# 9>&-: the child must not inherit the lock, or it would hold the folder after this script's death.
run_attended() { setpriv --pdeathsig KILL "$@" 9>&- & wait $!; }

# What happens before and after lm_eval: sft/evaluation/run_eval.py. $1: start | finish | compare
python_part() {
    PYTHONPATH=$HERE${PYTHONPATH:+:$PYTHONPATH} \
        run_attended "$PYTHON" -m sft.evaluation.run_eval "$@"
}

# Measure the task $1 on the device $2. The task's folder gets its name when all results are written.
evaluate() {
    local unfinished=$STAGING/$1.unfinished options=()
    [ -z "$INCLUDE_PATH" ] || options+=(--include_path "$INCLUDE_PATH")
    [ -z "$FEWSHOT" ] || options+=(--num_fewshot "$FEWSHOT")
    [ -z "$LIMIT" ] || options+=(--limit "$LIMIT")
    [ "$CHAT_TEMPLATE" = 0 ] || options+=(--apply_chat_template)
    rm -rf "$unfinished"   # of a run that was killed: nothing in it is a result
    setpriv --pdeathsig KILL "$PYTHON" -P -m lm_eval run --model hf \
        --model_args "pretrained=$MODEL,dtype=$DTYPE${MODEL_ARGS:+,$MODEL_ARGS}" --tasks "$1" --device "$2" \
        --batch_size "$BATCH_SIZE" --seed "$SEEDS" "${options[@]}" --log_samples --output_path "$unfinished" || return
    compgen -G "$unfinished/*/results_*.json" > /dev/null || return   # lm_eval only warns when it cannot write
    mv "$unfinished" "$STAGING/$1"
}

# Measure the task $1 on a free device. xargs calls this in a new process, with the device's number in $SLOT.
measure() {
    local device log=$STAGING/device_$SLOT.log
    device=$(sed -n "$((SLOT + 1))p" "$STAGING/devices")
    if [ "$(wc -l < "$STAGING/devices")" = 1 ]; then
        echo "run_eval.sh: $1 on $device"
        evaluate "$1" "$device"
    else
        echo "run_eval.sh: $1 on $device, log in $log"
        evaluate "$1" "$device" &>> "$log"
    fi || { echo "run_eval.sh: $1 failed; the last lines of its output say why" >&2; return 1; }
    echo "run_eval.sh: $1: $SECONDS s"
}

[ "$CHAT_TEMPLATE" != 1 ] || BASE_MODEL=$RESIZED_MODEL
case "$#:${1:-}" in
    [1-9]*:compare) NAME=compare MODEL= ;;
    1:before)       NAME=before  MODEL=$BASE_MODEL ;;
    1:after)        NAME=after   MODEL=$EXPORT_DIR ;;
    2:*)            NAME=$1      MODEL=$2 ;;
    *)              sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
[[ $NAME =~ ^[A-Za-z0-9][A-Za-z0-9_-]*$ ]] || refuse "the name '$NAME' must be letters, digits, '_' and '-'."
[[ $MODEL != *[,=]* ]] || refuse "lm_eval cannot read a folder with ',' or '=' in its name: $MODEL"
[ "$CHAT_TEMPLATE" != 1 ] || NAME+=-chat
if [ -d .venv/bin ]; then PATH=$PWD/.venv/bin:$PATH; fi
PYTHON=$(command -v python || command -v python3) || refuse "no python on the path."
"$PYTHON" -P -c 'import sys; from importlib import util; sys.exit(not util.find_spec("lm_eval"))' ||
    refuse "$PYTHON has no lm_eval. Activate the environment that holds it, or make one here: python3 -m venv .venv" \
        "&& .venv/bin/pip install -r requirements.txt"

HERE=$(cd "$(dirname "$0")" && pwd)
STAGING=$EVAL_RESULTS/$NAME.unfinished
export BASE_MODEL EXPORT_DIR RESIZED_MODEL DATA_DIR EVAL_RESULTS CHAT_TEMPLATE TASKS INCLUDE_PATH FEWSHOT LIMIT
export ASSISTANT_FLAGS CHECK_READING DEVICE DTYPE BATCH_SIZE SEEDS MODEL_ARGS NAME MODEL STAGING PYTHON
export -f evaluate measure
trap 'refuse "stopped; the same command continues."' INT TERM
if [ "$1" = compare ]; then
    python_part "$@"
    exit
fi

mkdir -p "$STAGING" && exec 9>> "$STAGING/.lock" || refuse "$STAGING cannot be written; name another EVAL_RESULTS."
flock --nonblock --conflict-exit-code 9 9 || case $? in
    9) refuse "$STAGING is in use by another run. Wait for it, or choose another name." ;;
    *) refuse "$STAGING cannot be locked: its file system has no locks. Name an EVAL_RESULTS on another disk." ;;
esac
trap 'rm -f "$STAGING/.lock"; rmdir "$STAGING" 2> /dev/null || true' EXIT   # it is still empty if `start` refused
python_part start
run_attended xargs --arg-file="$STAGING/todo" --no-run-if-empty --max-args=1 --process-slot-var=SLOT \
    --max-procs="$(wc -l < "$STAGING/devices")" \
    setpriv --pdeathsig KILL bash -c 'measure "$1"' measure || true   # `finish` names failures
python_part finish
