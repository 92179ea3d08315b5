"""What is claimed of data that models select, write and judge, over one run or several: median,
range, and on how many runs a claim holds at every temperature.

Reads systems/NAME/table.json of each run, as far as all of the runs have it.

    python -m systems.claims out/seeds/1 out/seeds/2 out/seeds/3 out/seeds/4
"""
import argparse
import json
import statistics
from pathlib import Path
from typing import NamedTuple

from data.tinytown.report import markdown

TEMPERATURES = {"0": "T = 0", "1": "T = 1", "best": "best T"}


class Claim(NamedTuple):
    """Values by temperature ("T = 0", "T = 1", "best T"; "" where there is none), a least one."""
    says: str
    at: dict[str, float]
    least: float = 0.0

    def holds(self) -> bool:
        return all(value >= self.least for value in self.at.values())


def over(table: dict, one: str, other: str) -> dict[str, float]:
    """Gold of one policy over another's by temperature; each at its own best one."""
    return {says: table[one]["gold"][t] - table[other]["gold"][t]
            for t, says in TEMPERATURES.items()}


def columns(one: dict, other: dict, start: str = "") -> dict[str, float]:
    """The same from rows whose columns are named "conversations, T = 0" and the like."""
    return {t: one[start + t] - other[start + t] for t in ("T = 0", "T = 1", "best T")
            if start + t in one}


# ----------------------------------------------------------------------------- by system

def lima(found: dict) -> list[Claim]:
    table, sets = found["table"], found["sets"]
    small, large = over(table, "voted_1000", "voted_250"), over(table, "voted_8000", "voted_1000")
    random = over(table, "random_1000", "all_10000")
    return [
        Claim("1,000 voted over 10,000 as they come", over(table, "voted_1000", "all_10000")),
        Claim("10,000 as they come over 1,000 at random",
              {t: -value for t, value in random.items()}, -0.03),
        Claim("10,000 as they come over 1,000 good stories",
              over(table, "all_10000", "stories_1000")),
        Claim("gain from 250 to 1,000 over that from 1,000 to 8,000",
              {t: small[t] - large[t] for t in small}),
        Claim("held-out loss of 1,000 voted over that of 10,000",
              {"": sets["voted_1000"]["val_loss"] - sets["all_10000"]["val_loss"]}),
        Claim("on conversations, 100 of them over none",
              columns(sets["turns_100"], sets["turns_0"], "turns, ")),
        Claim("on lists, 30 of them over none",
              columns(sets["lists_30"], sets["lists_0"], "lists, "))]


def flan(found: dict) -> list[Claim]:
    clusters, boxes, schema = (found[name] for name in ("clusters", "phrasings", "schema"))
    mixture = found["mixture"]
    alone = {name.removesuffix(" alone"): row for name, row in mixture.items()
             if name.endswith(" alone")}
    mixed = [mixture[name] for name in ("proportional", "capped", "equal")]
    short = {"mean, T = 0": "T = 0", "T = 1": "T = 1", "best T": "best T"}
    claims = [
        Claim("held-out clusters, tuned on 32 over 2",
              {"T = 0": clusters["32"]["held out"] - clusters["2"]["held out"]}),
        Claim("unseen phrasings, tuned on 8 over 1, held-out clusters, median",
              {"T = 0": boxes["8, held out"]["median"] - boxes["1, held out"]["median"]}),
        Claim("the same, seen clusters",
              {"T = 0": boxes["8, seen"]["median"] - boxes["1, seen"]["median"]}),
        Claim("the same, standard deviation of 1 over 8", {
            "T = 0": boxes["1, seen"]["standard deviation"]
            - boxes["8, seen"]["standard deviation"]}),
        Claim("held-out clusters, what to avoid is told over the definition alone", {
            "T = 0": schema["definition, avoid"]["held out"] - schema["definition"]["held out"]}),
        Claim("the least mixture over the best single source", {
            t: min(row[key] for row in mixed) - max(row[key] for row in alone.values())
            for key, t in short.items()}),
        Claim("a single source over the mean of mixtures, in its own group, mean of three", {
            "T = 0": statistics.mean(row[group] - statistics.mean(one[group] for one in mixed)
                                     for group, row in alone.items())})]
    if "32, larger" in clusters:
        claims.insert(1, Claim("held-out clusters, the larger base over the small one, 32", {
            "T = 0": clusters["32, larger"]["held out"] - clusters["32"]["held out"]}))
    return claims


def self_instruct(found: dict) -> list[Claim]:
    kinds = found["kinds"]
    valid = {row[0]: float(row[2]) for row in found["novelty"]}
    own = kinds[max((name for name in kinds if name.startswith("own_")),
                    key=lambda name: int(name.removeprefix("own_")))]
    return [
        Claim("with its own tasks over seeds alone", columns(own, kinds["seeds"], "all, ")),
        Claim("the same, on kinds of task without a seed",
              columns(own, kinds["seeds"], "other kinds, ")),
        Claim("instructions valid, kept below ROUGE-L 0.9 over 0.7",
              {"": valid["0.9"] - valid["0.7"]})]


def backtranslation(found: dict) -> list[Claim]:
    table, rounds = found["table"], found["rounds"]
    curated = max((name for name in table if name.startswith("curated_")),
                  key=lambda name: int(name.removeprefix("curated_")))
    return [
        Claim("curated over uncurated of equal size", over(table, curated, f"un{curated}")),
        Claim("curated over seeds alone", over(table, curated, "seeds")),
        Claim("precision of the second rater over the first",
              {"": rounds["M_1"]["precision"] - rounds["M_0"]["precision"]}),
        Claim("recall of the second rater over the first",
              {"": rounds["M_1"]["recall"] - rounds["M_0"]["recall"]})]


def constitutional(found: dict) -> list[Claim]:
    before, after, alone = (found["outcomes"][name] for name in
                            ("helpful_only", "sl_cai_rlaif", "rlaif_alone"))
    none = {name: 0.0 for name in after}
    ts = ("T = 0", "T = 1")
    return [
        Claim("harmful requests not helped with, after both stages",
              {t: 1 - after[f"helped, {t}"] for t in ts}, 0.9),
        Claim("harmful requests helped with, RLAIF alone",
              {t: alone[f"helped, {t}"] for t in ts}, 0.9),
        Claim("ordinary requests not refused", {t: 1 - after[f"others refused, {t}"] for t in ts},
              0.99),
        Claim("gold on ordinary requests over the helpful-only model",
              columns(after, before, "gold of others, "), -0.03),
        Claim("harmful requests declined, after both stages", columns(after, none, "declined, "))]


def zephyr(found: dict) -> list[Claim]:
    table, judges = found["table"], found["judges"]
    return [
        Claim("dSFT + dDPO over dSFT", over(table, "ddpo_reward_model", "dsft")),
        Claim("dSFT over dDPO without dSFT", over(table, "dsft", "no_dsft")),
        Claim("dSFT + dDPO over its teacher", over(table, "ddpo_reward_model", "sft")),
        Claim("gain with the best judge over that with the worst",
              columns(judges["oracle"], judges["chance"], "gain, "))]


def ultrachat(found: dict) -> list[Claim]:
    single, simulated = found["gold"]["single"], found["gold"]["simulated"]
    kinds = {name.rpartition(", ")[0] for name in single}
    talks, turns = (next(kind for kind in kinds if kind.endswith(end)) + ", "
                    for end in ("conversations", "single turns"))
    return [
        Claim("on conversations, simulated dialogues over single turns",
              columns(simulated, single, talks)),
        Claim("on single turns, the same", columns(simulated, single, turns), -0.05)]


def judge(found: dict) -> list[Claim]:
    both = found["One/Two"]["all"]
    return [
        Claim("One/Two, both orders averaged over one", {"": both["averaged"] - both["accuracy"]}),
        Claim("One/Two changes its verdict with the order", {"": 1 - both["agreement"]}, 0.05)]


# ----------------------------------------------------------------------------- the command

SYSTEMS = (lima, flan, self_instruct, backtranslation, constitutional, zephyr, ultrachat, judge)


def summary(runs: list[list[Claim]]) -> list[list[str]]:
    """One row a claim: what it says, its least value, median (range) by temperature, on how many
    runs it holds."""
    rows = []
    for same in zip(*runs, strict=True):
        def cell(t: str) -> str:
            values = [claim.at[t] for claim in same]
            return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
        first = same[0]
        rows.append([first.says, f"{first.least:g}",
                     *(cell(t) if t in first.at else cell("") if t == "T = 0" and "" in first.at
                       else None for t in TEMPERATURES.values()),
                     f"{sum(claim.holds() for claim in same)} of {len(same)}"])
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of Tinytown runs")
    folders, rows = parser.parse_args().runs, []
    for system in SYSTEMS:
        paths = [run / "systems" / system.__name__ / "table.json" for run in folders]
        if all(path.exists() for path in paths):
            several = summary([system(json.loads(path.read_text())) for path in paths])
            rows += [[system.__name__, *row] for row in several]
    if not rows:
        parser.error(f"{', '.join(map(str, folders))}: no systems/NAME/table.json that all of them "
                     f"have; run python -m systems.lima --run FOLDER and others first")
    print(markdown(["system", "claim", "at least", *TEMPERATURES.values(), "runs"], rows))
