#!/usr/bin/env bash
# Every claim on four seeds, the larger base included: median, range, and whether it holds. What
# `make seeds` runs; the runs are in out/seeds/1 to 4, two of them side by side.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=out/seeds
. runs/stage.sh
mkdir -p $OUT

# seeds SEED…: the whole line on each of these
seeds() {
    local seed
    for seed in "$@"; do
        SEED=$seed OUT=out/seeds/$seed LARGE=1 bash runs/tinytown.sh
    done
}
odd() { seeds 1 3; }
even() { seeds 2 4; }
two_lanes odd even
$PYTHON -m data.tinytown.seeds $OUT/[0-9]*
