#!/usr/bin/env bash
# What the slides claim beyond the line itself, on the run that `make run` left in OUT: every other
# way to learn from feedback, on noisy labels and on gold ones; over-optimisation; what a thousand
# chosen demonstrations do; a larger base, prompted, against the small PPO model; PPO at four doses
# of the KL penalty and of the pretraining mix. What `make lectures` runs; methods and sets that are
# done are left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/stage.sh

# dose FOLDER FLAGS: PPO-ptx with other coefficients
dose() {
    local folder=$OUT/$1; shift
    train "$folder" train_ppo.py --preset tinytown --init "$OUT/sft" --reward "$OUT/rm" \
        --data "$OUT/data/rl.jsonl" --ptx_data "$OUT/data/base.txt" "$@"
}
betas() {
    dose doses/beta_0.05 --beta 0.05
    dose doses/beta_0.45 --beta 0.45
    dose doses/beta_1.35 --beta 1.35
}
gammas() {
    dose ppo_no_mix --ptx_coef 0
    dose doses/gamma_4 --ptx_coef 4
    dose doses/gamma_16 --ptx_coef 16
}

# farm KIND: every method on one kind of labels
farm() { $PYTHON -m systems.alpaca_farm --run "$OUT" --seed "$SEED" --labels "$1"; }
noisy() { farm noisy; }
gold() { farm gold; }
over_optimisation() { $PYTHON -m systems.over_optimisation --run "$OUT" --seed "$SEED"; }
lima() { $PYTHON -m systems.lima --run "$OUT" --seed "$SEED"; }

two_lanes noisy gold
$PYTHON -m systems.alpaca_farm --run "$OUT" --seed "$SEED"
two_lanes over_optimisation lima
$PYTHON -m systems.best_of_n --run "$OUT" --seed "$SEED"
for form in "" --verifier; do
    $PYTHON -m systems.grpo --run "$OUT" --seed "$SEED" $form --overwrite
done
train_large
two_lanes betas gammas
$PYTHON evaluate.py --run "$OUT" --seed "$SEED"
$PYTHON -m data.tinytown.doses --run "$OUT" --seed "$SEED"
