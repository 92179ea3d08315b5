"""Every claim over several Tinytown runs: median, range, and whether it holds.

A claim holds if the median meets its bar and the worst run meets 0.9 of the bar's distance from
chance.

    python -m data.tinytown.seeds out/seeds/1 out/seeds/2 out/seeds/3 out/seeds/4
"""
import argparse
import json
import statistics
from pathlib import Path

from data.tinytown.report import Claim, claims, markdown


def summary(runs: list[list[Claim]]) -> list[list[str]]:
    """One row a claim: what it says, its bar, the median, the range, met or MISSED."""
    rows = []
    for same in zip(*runs, strict=True):
        first, values = same[0], [claim.value for claim in same]
        middle = first._replace(value=statistics.median(values))
        worst = first._replace(value=max(values) if first.most else min(values))
        holds = middle.met() and worst.met(first.chance + 0.9 * (first.bar - first.chance))
        rows.append([first.says, f"{'≤' if first.most else '≥'} {first.bar:g}",
                     f"{middle.value:.3f}", f"{min(values):.3f} to {max(values):.3f}",
                     "met" if holds else "MISSED"])
    return rows


def gold_over_seeds(reports: list[dict]) -> list[list[str]]:
    """One row a policy: median and range of gold at every temperature."""
    rows = []
    for name, policy in reports[0]["policies"].items():
        row = [name]
        for t in reports[0]["policies"]["sft"]["at"]:
            values = [report["policies"][name]["at"][t]["gold"] for report in reports
                      if t in report["policies"][name]["at"]]
            row.append(f"{statistics.median(values):.3f} ({min(values):.3f}–{max(values):.3f})"
                       if values else "")
        rows.append(row)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that hold a report.json")
    folders = parser.parse_args().runs
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    heads = [f"T = {t}" for t in reports[0]["policies"]["sft"]["at"]]
    print(f"Gold, median of {len(reports)} runs (range):\n\n"
          + markdown(["policy", *heads], gold_over_seeds(reports)))
    print(markdown(["claim", "bar", "median", "range", ""],
                   summary([claims(report) for report in reports])))
