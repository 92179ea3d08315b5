#!/usr/bin/env bash
# The line on a real model and real files, for one GPU: SmolLM2-135M-Instruct (`make smollm2`), SFT,
# reward model, PPO-ptx, DPO, and answers of each. DATA: a folder with the files named below.
#   DATA=folder bash runs/real.sh
#   STEPS=1 DATA=folder bash runs/real.sh      one rollout: with few rows in the files, on any machine
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:?"a folder with instruction_data.json, alpaca_eval_rankings.jsonl.gz and so on"}
OUT=${OUT:-out/real_line}
. runs/stage.sh
STEPS=${STEPS:-100}

train "$OUT/sft" train_sft.py --init smollm2 --data "$DATA/instruction_data.json" \
    --epochs 2 --lr 2e-5 --batch_size 16
train "$OUT/rm" train_rm.py --init "$OUT/sft" --data "$DATA/alpaca_eval_rankings.jsonl.gz" \
    --epochs 2 --lr 2e-5 --batch_size 8 --micro_batch 4
train "$OUT/ppo" train_ppo.py --init "$OUT/sft" --reward "$OUT/rm" \
    --data "$DATA/alpaca_eval_rankings.jsonl.gz" --ptx_data "$DATA/tinyshakespeare.txt" \
    --steps "$STEPS" --max_new_tokens 96 --micro_batch 16 --lr 2e-6 --value_lr 5e-6
train "$OUT/dpo" train_dpo.py --init "$OUT/sft" \
    --data "$DATA/instruction_data_with_preference.json" --epochs 2 --lr 5e-6 --batch_size 16
for policy in sft ppo dpo; do
    echo "# $policy"
    $PYTHON sample.py --init "$OUT/$policy" --data "$DATA/user_oriented_instructions.jsonl" \
        --count 5 --temperature 0 --max_new_tokens 96
done
