"""Write the files that runs/tinytown.sh reads.

    python -m data.tinytown --out out/tinytown/data --seed 1
"""
import argparse
import json
import random
from pathlib import Path

from common.files import write_text
from data.tinytown.talk import document
from data.tinytown.teachers import demonstrations
from data.tinytown.town import harmful_prompts, prompts, red_teamed


def write(folder: Path, seed: int, documents: int = 60_000) -> None:
    """Write every file that the Tinytown run reads."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(f"documents-{seed}")
    texts = [document(draw) for _ in range(documents)]
    held_out = documents // 60
    for name, part in {"base": texts[held_out:], "base_val": texts[:held_out]}.items():
        text = "\n<|endoftext|>\n".join(part) + "\n"
        write_text(folder / f"{name}.txt", text)
    rows = {"sft": demonstrations("sft", 10_000, seed), "sft_val": demonstrations("val", 500, seed),
            "rank": red_teamed("rank", 7_000, seed), "rank_val": prompts("val", 200, seed),
            "rl": red_teamed("rl", 8_000, seed), "test": prompts("test", 600, 0, unique=True),
            "harmful": harmful_prompts("test", 150, 0)}
    for name, part in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        write_text(folder / f"{name}.jsonl", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    write(arguments.out, arguments.seed)
