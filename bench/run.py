"""Every comparison, one process after the other; writes bench/results.json, bench/RESULTS.md and
bench/growth.png and prints the table.

    python -m bench.run                          all, twenty minutes on two cores: `make bench`
    python -m bench.run --only kernel training   these again; the other rows stay as they were
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bench.compare import machine, matmul_rate
from bench.scaling import growth_plot
from data.tinytown.report import load_pyplot, save_plot

FOLDER = Path(__file__).parent
TRL_WITH_PPO = FOLDER.parent / ".venv" / "trl-1.12"            # made by `make bench`
PIECES = {"generation": ["bench.generation"], "training": ["bench.training"],
          "trainers": ["bench.trainers"], "rankings": ["bench.rankings"],
          "ppo": ["bench.trainers", "--ppo"], "kernel": ["bench.kernel"],
          "tricks": ["bench.tricks"], "scaling": ["bench.scaling"],
          "profile": ["bench.profile"]}
TABLES = ("tricks", "scaling", "profile")                   # pieces with tables of their own


def measure(name: str) -> list[dict]:
    """The rows that one piece prints, or one row that says why there are none."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")
    if name == "ppo":
        if not TRL_WITH_PPO.exists():
            return [{"piece": "PPO", "against": "TRL 1.12.0", "ratio": None,
                     "note": "not measured: run `make bench`, which installs it"}]
        environment["PYTHONPATH"] = str(TRL_WITH_PPO)
    done = subprocess.run([sys.executable, "-m", *PIECES[name]], stdout=subprocess.PIPE, text=True,
                          env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        rows.append({"piece": name, "against": "", "ratio": None,
                     "note": f"not measured: ended with status {done.returncode}"})
    return rows


def bar_of(row: dict) -> str:
    """The ratio that a row aimed for, and whether it got there."""
    if not row.get("bar"):
        return ""
    if not row["ratio"]:
        return f"{row['bar']:g}×"
    return f"{row['bar']:g}× " + ("met" if row["ratio"] >= row["bar"] else "MISSED")


def markdown(results: dict) -> str:
    """The tables as text."""
    machine = results["machine"]
    lines = ["# Measured side by side", "",
             f"{machine['cpu']}, {machine['capability']}, {machine['threads']} threads, "
             f"{'with' if machine['bf16'] else 'without'} bf16 instructions; a matrix product of "
             f"1,024 × 1,024 in fp32 runs at {machine['matmul_gflops']} GFLOP/s. "
             f"Python {machine['python']}, torch {machine['torch']}, "
             f"transformers {machine['transformers']}, TRL {machine['trl']}. "
             f"Command: `make bench`, {results['date']}.", "",
             "Ratio: how many times faster than the peer, in turn in one process; median over the "
             "rounds [least … most]. Random weights of one shape on both sides, dropout 0. Bar: "
             "the ratio aimed for before measuring.", "",
             "| piece | against | bar | ratio | ours | theirs | note |",
             "|---|---|---|---|---|---|---|"]
    for row in results["rows"]:
        spread = f" [{row['range'][0]:.2f} … {row['range'][1]:.2f}]" if row.get("range") else ""
        ratio = f"**{row['ratio']:.2f}×**{spread}" if row["ratio"] else "not measured"
        ours, theirs = (f"{row[side]:,} {row['unit']}" if side in row else ""
                        for side in ("ours", "theirs"))
        lines.append(f"| {row['piece']} | {row['against']} | {bar_of(row)} | {ratio} | "
                     f"{ours} | {theirs} | {row.get('note', '')} |")
    lines += ["", "## What each trick gains", "", "With it against without it, all else equal.", "",
              "| trick | times faster |", "|---|---|"]
    lines += [f"| {row['piece']} | {row['ratio']:.2f}× "
              f"[{row['range'][0]:.2f} … {row['range'][1]:.2f}] |"
              for row in results["tricks"] if row["ratio"]]
    lines += ["", "## How a training step grows", "", "![µs a token over context and rows, ms a "
              "ranking over K](growth.png)", "",
              "Forward, backward and AdamW, fp32. With K: the reward model on rankings, prompt and "
              "response half of the tokens each, packed. FLOP utilisation: against the matrix "
              "product in the same process. Memory: the whole process.", "",
              "| model | rows | tokens a row | K | seconds | tokens/s | FLOP utilisation "
              "| peak MiB |",
              "|---|---|---|---|---|---|---|---|"]
    for case in results["scaling"]:
        share = f"{case['flop_utilisation']:.0%}" if case["flop_utilisation"] else ""
        lines.append(f"| {case['size']} | {case['rows']} | {case['length']} | {case.get('K', '')} "
                     f"| {case['seconds']} | {case['tokens_per_second']:,} | {share} "
                     f"| {case['peak_MiB']:,} |")
    lines += ["", "## Where the time goes", "",
              "Milliseconds of a step inside each group's kernels, and the least that this machine "
              "could need (bench/profile.py says how that is reckoned).", "",
              "| step | whole | products | attention | moving | rest |",
              "|---|---|---|---|---|---|"]
    steps: dict[str, list[dict]] = {}
    for case in results["profile"]:
        steps.setdefault(case["piece"], []).append(case)
    for piece, groups in steps.items():
        cells = [f"{case['group_ms']}" + (f" (floor {case['floor_ms']})" if case["floor_ms"]
                                          else "") for case in groups]
        lines.append(f"| {piece} | {groups[0]['ms']} | " + " | ".join(cells) + " |")
    gpu = FOLDER / "GPU.md"
    lines += ["", "## On a GPU", "", gpu.read_text() if gpu.exists() else
              "Not measured: no GPU was at hand. "
              "`python -m bench.gpu` checks the kernels and measures there."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PIECES), default=list(PIECES))
    only = parser.parse_args().only
    path = FOLDER / "results.json"
    pieces = json.loads(path.read_text())["pieces"] if path.exists() else {}
    for name in only:
        start = time.time()
        pieces[name] = measure(name)
        print(f"{name}: {time.time() - start:.0f} s", file=sys.stderr)
        rows = [row for name in PIECES if name not in TABLES
                for row in pieces.get(name, [])]
        results = {"date": time.strftime("%Y-%m-%d"), "command": "make bench",
                   "machine": {**machine(), "matmul_gflops": round(matmul_rate() / 1e9)},
                   "rows": rows, "tricks": pieces.get("tricks", []),
                   "scaling": [row["scaling"] for row in pieces.get("scaling", [])],
                   "profile": [row["profile"] for row in pieces.get("profile", [])],
                   "pieces": pieces}
        path.write_text(json.dumps(results, indent=1) + "\n")
        (FOLDER / "RESULTS.md").write_text(markdown(results))
    if results["scaling"] and (pyplot := load_pyplot()):
        save_plot(growth_plot(pyplot, results["scaling"]), FOLDER / "growth.png")
    print((FOLDER / "RESULTS.md").read_text())


if __name__ == "__main__":
    main()
