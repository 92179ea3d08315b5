#!/usr/bin/env bash
# The whole line on Tinytown, from plain text to an aligned model: what `make run` runs.
#   SEED=2 OUT=out/tinytown-2 bash runs/tinytown.sh        another seed, another folder
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
SEED=${SEED:-1}
OUT=${OUT:-out/tinytown}
RL="--preset tinytown --init $OUT/sft --reward $OUT/rm --data $OUT/data/rl.jsonl"

# train FOLDER SCRIPT FLAGS: a stage; one that Ctrl-C stopped in that folder goes on
train() {
    local out=$1 resume=; shift
    if ls "$out"/resume/step_*.pt > /dev/null 2>&1 && [ ! -e "$out/final.json" ]; then
        resume=--resume
    fi
    $PYTHON "$@" --seed "$SEED" --out "$out" $resume
}

$PYTHON -m data.tinytown --out "$OUT/data" --seed "$SEED"
# 0  pretraining: plain text about the town
train "$OUT/base" train_base.py --preset tinytown --data "$OUT/data/base.txt" \
    --val "$OUT/data/base_val.txt"
# 1  instruction tuning on demonstrations of uneven quality, some plain text mixed in
train "$OUT/sft" train_sft.py --preset tinytown --init "$OUT/base" --data "$OUT/data/sft.jsonl" \
    --val "$OUT/data/sft_val.jsonl" --ptx_data "$OUT/data/base.txt"
# 2  4 to 9 answers to each prompt, ranked by noisy annotators; a reward model learns their order
$PYTHON -m data.tinytown.rank --seed "$SEED" --init "$OUT/sft" --data "$OUT/data/rank.jsonl" \
    --out "$OUT/rank"
$PYTHON -m data.tinytown.rank --seed "$SEED" --init "$OUT/sft" --data "$OUT/data/rank_val.jsonl" \
    --out "$OUT/rank_val" --clean true
train "$OUT/rm" train_rm.py --preset tinytown --init "$OUT/sft" --data "$OUT/rank/rankings.jsonl" \
    --val "$OUT/rank_val/rankings.jsonl" --clean "$OUT/rank_val/clean.jsonl" \
    --demonstrations "$OUT/data/sft_val.jsonl"
# 3  Four runs that need only what is there now. Models so small leave a second core half idle, so
#    two lanes run side by side on half of the cores each; the second one's progress is in
#    $OUT/side.log.
export OMP_NUM_THREADS=$(( ($(getconf _NPROCESSORS_ONLN) + 1) / 2 ))
set -m     # makes the second lane a process group, so that Ctrl-C or a fault here ends all of it
{
    # over-optimisation: RLHF without the KL penalty
    train "$OUT/ppo_no_kl" train_ppo.py $RL --ptx_coef 0 --beta 0
    # preferences without RL: two fifths of the rankings are enough for DPO
    head -n 3000 "$OUT/rank/rankings.jsonl" > "$OUT/rank/some.jsonl"
    train "$OUT/dpo" train_dpo.py --preset tinytown --init "$OUT/sft" \
        --data "$OUT/rank/some.jsonl" --val "$OUT/rank_val/rankings.jsonl"
} 2> "$OUT/side.log" &
side=$!
set +m
trap 'kill -- -$side 2> /dev/null || true' EXIT
# RLHF; then the same without the pretraining mix
train "$OUT/ppo" train_ppo.py $RL --ptx_data "$OUT/data/base.txt"
train "$OUT/ppo_no_mix" train_ppo.py $RL --ptx_coef 0
wait $side || { tail -n 5 "$OUT/side.log" >&2; exit 1; }
unset OMP_NUM_THREADS
# 4  what each step bought
$PYTHON evaluate.py --run "$OUT" --seed "$SEED"
