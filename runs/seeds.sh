#!/usr/bin/env bash
# Every claim on four seeds, the larger base included: median, range, and whether it holds. What
# `make seeds` runs; the runs are in out/seeds/1 to 4.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
for seed in ${SEEDS:-1 2 3 4}; do
    SEED=$seed OUT=out/seeds/$seed LARGE=1 bash runs/tinytown.sh
done
$PYTHON -m data.tinytown.seeds out/seeds/*
