#!/usr/bin/env bash
# What the slides claim beyond the line itself, on the run that `make run` left in OUT: every other
# way to learn from feedback, on noisy labels and on gold ones; over-optimisation; data that models
# select, write and judge; a larger base, prompted, against the small PPO model; PPO at four doses
# of the KL penalty and of the pretraining mix. What `make lectures` runs; all tables come together
# in OUT/lectures/report.md. What is done is left alone, one system alone is
# `bash runs/lectures.sh NAME`, such as lima.
set -euo pipefail
cd "$(dirname "$0")/.."
. runs/stage.sh
PAGES=$OUT/lectures/pages
mkdir -p "$PAGES"

# made FILE: whether it was made from the SFT model that is there now
made() { [ -e "$1" ] && [ "$1" -nt "$OUT/sft/model.pt" ]; }
# page NAME MODULE FLAGS: a system; what it prints is kept
page() {
    local page=$PAGES/$1.md; shift
    if made "$page"; then return; fi
    $PYTHON -m "$@" --run "$OUT" --seed "$SEED" | tee "$page.part"
    mv "$page.part" "$page"
}
system() {
    case $1 in
        grpo) page grpo systems.grpo --overwrite ;;
        verifier) page verifier systems.grpo --verifier --overwrite ;;
        *) page "$1" "systems.$1" ;;
    esac
}

# dose FOLDER FLAGS: PPO-ptx with other coefficients
dose() {
    local folder=$OUT/$1; shift
    if made "$folder/final.json"; then return; fi
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

# every method on one kind of labels
noisy() { $PYTHON -m systems.alpaca_farm --run "$OUT" --seed "$SEED" --labels noisy; }
gold() { $PYTHON -m systems.alpaca_farm --run "$OUT" --seed "$SEED" --labels gold; }
feedback() {
    local name
    if ! made "$OUT/base_large/final.json"; then train_large; fi
    for name in over_optimisation best_of_n grpo verifier lima; do system $name; done
}
data() {
    local name                       # flan last: it looks for the larger base of the other lane
    for name in self_instruct judge backtranslation constitutional zephyr ultrachat flan; do
        system $name
    done
}

if [ $# -gt 0 ]; then
    for name in "$@"; do system "$name"; done
    exit
fi
two_lanes noisy gold
page alpaca_farm systems.alpaca_farm
two_lanes feedback data
two_lanes betas gammas
$PYTHON evaluate.py --run "$OUT" --seed "$SEED"
page doses data.tinytown.doses
$PYTHON -m systems.claims "$OUT" > "$PAGES/claims.md"
{
    echo "# Beyond the line, seed $SEED"
    for file in "$PAGES"/*.md; do
        printf '\n## %s\n\n' "$(basename "$file" .md)"
        cat "$file"
    done
    printf '\n## Figures\n\n'
    for figure in "$OUT"/{doses.png,lectures/*.png,systems/*.png,systems/*/*.png}; do
        if [ -e "$figure" ]; then echo "![${figure#"$OUT"/}](../${figure#"$OUT"/})"; fi
    done
} > "$OUT/lectures/report.md"
echo "all tables and figures: $OUT/lectures/report.md"
