# What the scripts of runs/ share: where, which seed, how a stage is run. Read by them, not run.
PYTHON=${PYTHON:-python}
SEED=${SEED:-1}
OUT=${OUT:-out/tinytown}

# train FOLDER SCRIPT FLAGS: a stage; one that Ctrl-C stopped in that folder goes on, a finished one
# is replaced
train() {
    local out=$1 again=; shift
    if [ -e "$out/final.json" ]; then
        echo "$out: replaces the finished run there" >&2
        again=--overwrite
    elif ls "$out"/resume/step_*.pt > /dev/null 2>&1; then
        again=--resume
    fi
    $PYTHON "$@" --seed "$SEED" --out "$out" $again
}

# train_large: a base of over five times the parameters, on the same text; 2.5 times as wide, at a
# rate 2.5 times lower
train_large() {
    train "$OUT/base_large" train_base.py --preset tinytown --n_embd 320 --n_head 5 --lr 1.6e-3 \
        --data "$OUT/data/base.txt" --val "$OUT/data/base_val.txt"
}

# two_lanes FIRST SECOND: two functions side by side on half of the cores each, as models so small
# leave a second core half idle; the second one's progress is in $OUT/side.log
two_lanes() {
    local threads=${OMP_NUM_THREADS:-$(getconf _NPROCESSORS_ONLN)}
    export OMP_NUM_THREADS=$(( (threads + 1) / 2 ))
    set -m   # makes the second lane a process group, so that Ctrl-C or a fault here ends all of it
    "$2" 2> "$OUT/side.log" &
    local side=$!
    set +m
    trap "kill -- -$side 2> /dev/null || true" EXIT
    "$1"
    wait $side || { tail -n 5 "$OUT/side.log" >&2; exit 1; }
    trap - EXIT
    export OMP_NUM_THREADS=$threads
}
