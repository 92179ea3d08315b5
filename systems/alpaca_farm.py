"""AlpacaFarm: every method that learns from feedback, on labels of noisy annotators and once more
on labels of people (here the gold order), same responses, same prompts. Do the two orders agree?

    p_ann: a label is replaced by a fair coin half of the time             → noisy_labels
    ρ: correlation of the methods' places in the two tables                → spearman
    bias = how often the annotators' majority is wrong;
    variance = how often one of them disagrees with the others' majority   → bias_and_variance

The methods are those of systems/methods.py; all learn from the same rankings, reward models too.
PPO's β is given in standard deviations of the reward, which differ from labels to labels.

Differences from AlpacaFarm: the gold score judges both tables, where its simulated annotators judge
what they trained; 13 annotators vote on bias and variance instead of 4, so that flips hardly reach
the majority; `noisy_labels` is used there alone, the rankings have flips of their own. Best-of-16
is compared with other samples of SFT than the rest, and its proxy is its own reward model's.

    python -m systems.alpaca_farm --run out/tinytown               # both kinds of labels, then all
    python -m systems.alpaca_farm --run out/tinytown --only dpo ipo
    python -m systems.alpaca_farm --seeds out/seeds/1 out/seeds/2  # medians of finished runs
"""
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.run import DeviceFlags, InputError, load_gpt, main, start, write_json
from data.readers import read_rankings
from data.tinytown.annotators import ANNOTATORS
from data.tinytown.report import load_pyplot, markdown, rounded, save_plot
from data.tinytown.specification import pairs_of, picks
from evaluate import Policy
from systems import best_of_n, plots
from systems.methods import ASKED_FOR, METHODS, Labels, prepare
from systems.table import compare, over_seeds, table

KINDS = ("noisy", "gold")


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # Tinytown run: its sft, rankings and prompts are read
    labels: tuple = KINDS          # noisy, gold, or both; with both the comparison follows
    only: tuple = ()               # these methods alone; empty: all
    rankings: int = 2000           # for each method and each reward model
    seeds: tuple = ()              # print medians over these finished runs, train nothing


LIMITS = dict(rankings=(2, 10**6))


# ----------------------------------------------------------------------------- equations

def noisy_labels(labels: Tensor, replace: Tensor, coin: Tensor) -> Tensor:
    """AlpacaFarm's label noise: the coin where replace < ½, else the label. Any equal shapes.

    labels, coin: 0 or 1. replace: uniform in [0, 1). A quarter of the labels comes out flipped, not
    half, as the coin is right half of the time; agreement a becomes a/2 + ¼.
    """
    return torch.where(replace < 0.5, coin, labels)


def spearman(first: list[float], second: list[float]) -> float:
    """Spearman's ρ: Pearson's correlation of the ranks, equal values at their mean rank. NaN where
    all values of one list are equal, and of fewer than two."""
    if len(first) < 2:
        return math.nan

    def ranks(values: list[float]) -> Tensor:
        x = torch.tensor(values, dtype=torch.float64)
        below, equal = (x[:, None] > x).sum(1), (x[:, None] == x).sum(1)
        return below + (equal - 1) / 2
    return torch.corrcoef(torch.stack([ranks(first), ranks(second)]))[0, 1].item()


def bias_and_variance(votes: Tensor, truth: Tensor) -> tuple[float, float]:
    """(share of pairs on which the majority is wrong, mean share on which one of the annotators
    disagrees with the majority of the others).

    votes (A, P) and truth (P,): 0 or 1, the preferred response. A majority that is split counts
    half wrong.
    """
    def wrong(share: Tensor, right: Tensor) -> Tensor:
        return torch.where(share == 0.5, 0.5, ((share > 0.5) != right.bool()).double())
    others = (votes.sum(0) - votes) / (len(votes) - 1)                      # (A, P)
    bias = wrong(votes.double().mean(0), truth).mean()
    return bias.item(), wrong(others, votes).mean().item()


# ----------------------------------------------------------------------------- a kind of labels

def run_methods(config: Config, kind: str) -> dict[str, dict]:
    """Train every method on one kind of labels, those that are done left alone; then the table."""
    names = list(config.only or METHODS)
    for name in names:
        if name not in METHODS:
            raise InputError(f"--only {name}: expected some of {', '.join(METHODS)}")
    at = prepare(config, kind)
    path, shown = (Path(at.folder) / name for name in ("seconds.json", "table.json"))
    done = json.loads(path.read_text()) if path.exists() else {}    # method → policy → seconds
    left = [name for name in names if name not in done]
    if not left and shown.exists():
        found = json.loads(shown.read_text())
        if {policy for some in done.values() for policy in some} <= found.keys():
            return found
    for name in left:
        found = METHODS[name](at, name)
        done[name] = {Path(folder).name: spent for folder, spent in found.items()}
        write_json(path, done)
    spent = {policy: seconds for found in done.values() for policy, seconds in found.items()}
    policies = {name: Policy(load_gpt(f"{at.folder}/{name}")[0], system=ASKED_FOR.get(name, ""))
                for name in spent}
    print(f"{kind} labels, {config.rankings} rankings; one reward spread is {at.spread:.2f}")
    found = compare(config, policies, spent)
    found["best_of_16"] = best_of_16(at)
    write_json(shown, found, indent=1)
    return found


def best_of_16(at: Labels) -> dict:
    """The row of a choice without training, at T = 1 alone."""
    one = best_of_n.measure(best_of_n.Config(run=at.run, reward=f"{at.folder}/rm", **at.machine))
    win = {"rate": one["win_rate"], "standard_error": one["standard_error"]}
    return rounded({"gold": {"1": one["gold"]}, "wins": {"1": win}, "proxy": one["proxy"],
                    "kl": one["kl"], "length": one["length"], "endless": None, "seconds": None})


# ----------------------------------------------------------------------------- both kinds

def report(config: Config) -> dict:
    """What both tables say together; writes methods.json and two plots into RUN/lectures."""
    home = Path(config.run) / "lectures"
    tables = {kind: json.loads((home / kind / "table.json").read_text()) for kind in KINDS}
    found = {"tables": tables, "spearman": orders_agree(tables),
             "annotators": annotators(config)}
    write_json(home / "methods.json", found, indent=1)
    for kind in KINDS:
        print(f"{kind} labels:\n\n{table(tables[kind])}")
    print(agreement_lines(found))
    if pyplot := load_pyplot():
        save_plot(plots.method_plot(pyplot, tables), home / "methods.png")
        save_plot(plots.scatter_plot(pyplot, found), home / "orders.png")
        pyplot.close("all")
    return found


def orders_agree(tables: dict[str, dict]) -> dict[str, dict]:
    """Spearman's ρ between the methods' wins at each temperature with both kinds of labels: over
    all methods, and over those alone that beat SFT with both."""
    found = {}
    for t in ("0", "1", "best"):
        wins = {kind: {name: row["wins"][t]["rate"] for name, row in rows.items()
                       if name != "sft" and t in row["wins"]} for kind, rows in tables.items()}
        names = [name for name in wins["noisy"] if name in wins["gold"]]
        good = [name for name in names if min(wins[kind][name] for kind in KINDS) > 0.5]
        found[t] = {label: {"rho": spearman(*([wins[kind][name] for name in some]
                                              for kind in KINDS)), "methods": len(some)}
                    for label, some in (("all", names), ("those better than SFT", good))}
    return found


def annotators(config: Config, count: int = 1000) -> dict[str, dict[str, float]]:
    """Bias and variance on pairs of the collected rankings: of the 13 annotators, of one of them
    thirteen times, and of both behind AlpacaFarm's noise."""
    draw, generator = random.Random(config.seed), torch.Generator().manual_seed(config.seed)
    pairs = pairs_of(read_rankings(f"{config.run}/rank/rankings.jsonl"), count, draw)
    truth = torch.tensor([pair.gold[1] > pair.gold[0] for pair in pairs]).long()
    found = {}
    for name, pool in (("all 13", ANNOTATORS), ("one, 13 times", ANNOTATORS[:1] * 13)):
        votes = torch.tensor([picks(annotator, pairs, draw) for annotator in pool])     # (A, P)
        replaced, coin = torch.rand(2, *votes.shape, generator=generator)
        noisy = noisy_labels(votes, replaced, (coin < 0.5).long())
        for label, some in ((name, votes), (f"{name}, noisy", noisy)):
            found[label] = dict(zip(("bias", "variance"), bias_and_variance(some, truth)))
    return found


def agreement_lines(found: dict) -> str:
    """Spearman's ρ, and the annotators' bias and variance."""
    lines = [f"order of wins, noisy against gold labels, T = {t}: " + ", ".join(
        f"{one['rho']:.2f} over {label}, {one['methods']} methods" for label, one in some.items())
        for t, some in found["spearman"].items()]
    rows = [[name, one["bias"], one["variance"]] for name, one in found["annotators"].items()]
    return "\n".join(lines) + "\n\n" + markdown(["annotators", "bias", "variance"], rows)


def farm(config: Config) -> None:
    """What the command line asks for."""
    start(config, LIMITS)
    if config.seeds:
        return over_seeds(config.seeds, KINDS)
    for kind in config.labels:
        if kind not in KINDS:
            raise InputError(f"--labels {kind}: expected some of {', '.join(KINDS)}")
        run_methods(config, kind)
    if all((Path(config.run) / "lectures" / kind / "table.json").exists() for kind in KINDS):
        report(config)


if __name__ == "__main__":
    main(farm, Config)
