#!/usr/bin/env bash
# The whole line on Tinytown, from plain text to an aligned model: what `make run` runs.
#   SEED=2 OUT=out/tinytown-2 bash runs/tinytown.sh        another seed, another folder
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/stage.sh

$PYTHON -m data.tinytown --out "$OUT/data" --seed "$SEED"
# 0  pretraining: plain text about the town
train "$OUT/base" train_base.py --preset tinytown --data "$OUT/data/base.txt" \
    --val "$OUT/data/base_val.txt"
# 1  instruction tuning on demonstrations of uneven quality, some plain text mixed in
train "$OUT/sft" train_sft.py --preset tinytown --init "$OUT/base" --data "$OUT/data/sft.jsonl" \
    --val "$OUT/data/sft_val.jsonl" --ptx_data "$OUT/data/base.txt"
# 2  4 to 9 answers to each prompt, ranked by noisy annotators; a reward model learns their order,
$PYTHON -m data.tinytown.rank --seed "$SEED" --init "$OUT/sft" --data "$OUT/data/rank.jsonl" \
    --out "$OUT/rank"
$PYTHON -m data.tinytown.rank --seed "$SEED" --init "$OUT/sft" --data "$OUT/data/rank_val.jsonl" \
    --out "$OUT/rank_val" --clean true
reward_model() {
    train "$OUT/rm" train_rm.py --preset tinytown --init "$OUT/sft" \
        --data "$OUT/rank/rankings.jsonl" --val "$OUT/rank_val/rankings.jsonl" \
        --clean "$OUT/rank_val/clean.jsonl" --demonstrations "$OUT/data/sft_val.jsonl"
    # what the data is like
    $PYTHON -m data.tinytown.specification --run "$OUT" --seed "$SEED"
}
#    beside it preferences without RL, which four sevenths of the rankings are enough for
preferences() {
    head -n 4000 "$OUT/rank/rankings.jsonl" > "$OUT/rank/some.jsonl"
    train "$OUT/dpo" train_dpo.py --preset tinytown --init "$OUT/sft" \
        --data "$OUT/rank/some.jsonl" --val "$OUT/rank_val/rankings.jsonl"
}
two_lanes reward_model preferences
# 3  RLHF; beside it without KL penalty and pretraining mix, in larger and more steps, so that
#    over-optimisation shows in a minute
RL="--preset tinytown --init $OUT/sft --reward $OUT/rm --data $OUT/data/rl.jsonl"
restrained() { train "$OUT/ppo" train_ppo.py $RL --ptx_data "$OUT/data/base.txt"; }
unrestrained() {
    train "$OUT/ppo_no_kl" train_ppo.py $RL --ptx_coef 0 --beta 0 --steps 64 --lr 6e-4 --max_kl 1000000
}
two_lanes restrained unrestrained
# 4  what each step bought; LARGE=1: beside a larger base, ten minutes
if [ -n "${LARGE:-}" ]; then train_large; fi
$PYTHON evaluate.py --run "$OUT" --seed "$SEED"
