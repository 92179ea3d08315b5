"""Write the files that runs/tinytown.sh reads.

    python -m data.tinytown --out out/tinytown/data --seed 1
"""
import argparse
from pathlib import Path

from data.tinytown.town import write

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    write(arguments.out, arguments.seed)
