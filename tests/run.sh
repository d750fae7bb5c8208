#!/usr/bin/env bash
# All tests: bash tests/run.sh [pytest's arguments]. Makes .venv if it is missing and installs what the tests need.
set -euo pipefail
cd "$(dirname "$0")/.."

for list in requirements.txt tests/requirements.txt; do
    installed=.venv/${list//\//_}
    if ! cmp -s $list "$installed"; then
        echo "Installing $list into .venv"
        [ -x .venv/bin/python ] || python3 -m venv .venv
        .venv/bin/python -m pip install --quiet -r $list
        cp $list "$installed"
    fi
done
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec .venv/bin/python -m pytest "$@"
