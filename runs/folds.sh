# Ten-fold cross-validation: every row is held out once, so that the figure rests on all rows, not
# on a tenth of them.
#   bash runs/folds.sh train_rm.py --init out/real/sft --data FILE --out out/real/rm_folds
# --out comes last; the ten runs are in its folders 0 to 9. Prints each fold's accuracy and their
# mean.
set -euo pipefail
if [ $# -lt 3 ] || [ "${@: -2:1}" != --out ]; then
    echo "usage: bash runs/folds.sh train_rm.py|train_dpo.py FLAGS --out FOLDER" >&2
    exit 2
fi
out="${@: -1}"
for fold in 0 1 2 3 4 5 6 7 8 9; do
    "${PYTHON:-python}" "$@/$fold" --fold "$fold"
done
"${PYTHON:-python}" - "$out" <<'END'
import json, statistics, sys
from pathlib import Path
found = [json.loads((Path(sys.argv[1]) / str(fold) / "final.json").read_text())["accuracy"]
         for fold in range(10)]
print("accuracy of the folds:", *found)
print(f"mean {statistics.mean(found):.4f} ± {statistics.stdev(found) / 10 ** 0.5:.4f} "
      f"(standard error over folds)")
END
