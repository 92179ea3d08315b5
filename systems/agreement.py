"""How often annotators say the same of the same answers, and how often beyond chance.

    P_o = share of pairs of answers on which two annotators say the same: one, the other, or tie
    P_e = t₁·t₂ + (1 − t₁)(1 − t₂)/2,  t: how often each of them says tie      → by_chance
    κ   = (P_o − P_e)/(1 − P_e),  0 = no more than chance, 1 = always          → kappa

κ is Cohen's (1960), whose P_e is Σ_c p₁(c)·p₂(c) over what can be said. Which of two answers is
called the first is arbitrary: every pair counts in both orders, so both are said equally often, and
κ does not depend on the order in which a file has them.

    python -m systems.label --agreement FILE FILE     # rankings or pairs, of any layout
"""
import json
import math
from itertools import combinations
from pathlib import Path

from common.run import InputError
from data.readers import converted, ranking
from data.rows import read_rows
from data.tinytown.report import markdown
from data.turns import Unusable

# One prompt with its answers → what each answer scored with one annotator.
Judged = dict[str, dict[str, float]]


# ----------------------------------------------------------------------------- equations

def by_chance(one: float, other: float) -> float:
    """P_e: how often two annotators say the same if they do not look. one, other: share of pairs on
    which each says tie, in [0, 1]. Without ties ½; with nothing but ties 1."""
    return one * other + (1 - one) * (1 - other) / 2


def kappa(observed: float, chance: float) -> float:
    """κ = (P_o − P_e)/(1 − P_e): of the agreement that chance leaves open, the share that is there.
    NaN where chance leaves none, P_e = 1. Below 0: they agree less than chance would."""
    return (observed - chance) / (1 - chance) if chance < 1 else math.nan


def verdicts(one: dict[str, float], other: dict[str, float]) -> list[tuple[int, int]]:
    """What two annotators say of each pair of the same answers: 1 the first is better, −1 the
    second, 0 a tie. one, other: answer → score, higher = better, of the same K answers.
    C(K,2) tuples."""
    def said(scores: dict[str, float], a: str, b: str) -> int:
        return (scores[a] > scores[b]) - (scores[a] < scores[b])
    return [(said(one, a, b), said(other, a, b)) for a, b in combinations(one, 2)]


def figures(rows: list[list[tuple[int, int]]]) -> dict[str, float]:
    """Agreement over rows that two annotators both judged; `verdicts` of each row.

    agree: P_o. error: its standard error over rows, as pairs of one row are not independent:
    √(n/(n − 1) · Σ_rows (same − P_o·pairs)²)/Σ pairs; NaN for one row. untied: agreement on pairs
    of which neither says tie (NaN if none), as InstructGPT's 72.6 %. chance, kappa: P_e and κ.
    """
    counts = [(sum(a == b for a, b in row), len(row)) for row in rows]     # same, pairs
    pairs = sum(size for _, size in counts)
    agree = sum(same for same, _ in counts) / pairs
    squares = sum((same - agree * size) ** 2 for same, size in counts)
    n, said = len(rows), [pair for row in rows for pair in row]
    untied = [a == b for a, b in said if a and b]
    chance = by_chance(*(sum(pair[who] == 0 for pair in said) / pairs for who in (0, 1)))
    return {"rows": n, "pairs": pairs, "agree": agree,
            "error": math.sqrt(n / (n - 1) * squares) / pairs if n > 1 else math.nan,
            "untied": sum(untied) / len(untied) if untied else math.nan,
            "chance": chance, "kappa": kappa(agree, chance)}


def pooled(couples: list[list[list[tuple[int, int]]]]) -> dict[str, float]:
    """`figures` over the rows of several couples of annotators, P_e being the mean of theirs,
    weighted by pairs. No error: couples share annotators and rows."""
    found, each = figures(sum(couples, [])), [figures(rows) for rows in couples]
    chance = sum(one["chance"] * one["pairs"] for one in each) / found["pairs"]
    return found | {"error": math.nan, "chance": chance, "kappa": kappa(found["agree"], chance)}


# ----------------------------------------------------------------------------- files

def read_judged(paths: tuple[str, ...]) -> dict[str, Judged]:
    """Annotator → what they said. A row without `annotator` is by its file; of an annotator's
    rows on the same answers the last counts. Equal answers of a row count once. InputError."""
    found: dict[str, Judged] = {}
    for path in paths:
        for where, row in read_rows(path):
            try:
                item, _ = converted(ranking, row, where)
            except Unusable:
                continue
            scores: dict[str, float] = {}
            for text, score in zip(item.responses, item.scores):
                scores[text] = max(score, scores.get(text, score))
            who = str(row.get("annotator") or Path(path).name)
            found.setdefault(who, {})[json.dumps([item.messages, sorted(scores)])] = scores
    return found


def agreement(paths: tuple[str, ...]) -> dict[tuple[str, str], dict[str, float]]:
    """`figures` of each two annotators with answers in common; of more than two annotators also
    `pooled`, as ("all", ""). InputError if none have any."""
    judged, couples = read_judged(paths), {}
    for one, other in combinations(sorted(judged), 2):
        rows = [verdicts(judged[one][key], judged[other][key]) for key in judged[one]
                if key in judged[other] and len(judged[one][key]) > 1]
        if rows:
            couples[one, other] = rows
    if not couples:
        raise InputError(f"{', '.join(paths)}: no two annotators have judged the same answers "
                         f"(annotators: {', '.join(sorted(judged))}); let a second one label the "
                         f"rows of the first: python -m systems.label --rank --data FIRST --out "
                         f"SECOND")
    found = {who: figures(rows) for who, rows in couples.items()}
    return found | ({("all", ""): pooled(list(couples.values()))} if len(found) > 1 else {})


def table(found: dict[tuple[str, str], dict[str, float]]) -> str:
    """A line for each two annotators."""
    def cell(value: float) -> float | None:
        return None if math.isnan(value) else value
    rows = [[" and ".join(filter(None, who)), str(one["rows"]), str(one["pairs"]),
             *(cell(one[name]) for name in ("agree", "error", "untied", "chance", "kappa"))]
            for who, one in found.items()]
    return markdown(["annotators", "rows", "pairs", "agree", "±", "without ties", "by chance",
                     "κ"], rows)
