"""The report of a Tinytown run: tables, claims, examples and plots. `evaluate.py` measures."""
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from common.files import read_log, write_atomically, write_json, write_text

CURVES = {"ppo": "PPO-ptx", "ppo_no_mix": "without the mix",
          "ppo_no_kl": "without mix and KL penalty"}
PARTS = ("helpful", "honest", "harmless", "well_formed")


def rounded(value):
    """The same nest of dicts and lists with floats to four places."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


# ----------------------------------------------------------------------------- claims

class Claim(NamedTuple):
    """What the lecture says, as a number and its bar."""
    says: str
    value: float
    bar: float
    chance: float = 0.0      # the value that would mean nothing
    most: bool = False       # the bar is an upper one

    def met(self, bar: float | None = None) -> bool:
        bar = self.bar if bar is None else bar
        return self.value <= bar if self.most else self.value >= bar


def claims(report: dict) -> list[Claim]:
    """The lecture's claims about the policies that are there, each at its temperature."""
    policies = report["policies"]
    at = {(name, t): figures for name, policy in policies.items()
          for t, figures in policy["at"].items()}
    best = {name: policy["at"][format(policy["best_temperature"], "g")]["gold"]
            for name, policy in policies.items()}
    aligned = [name for name in ("ppo", "dpo") if name in policies]
    found = [
        Claim("SFT over the base in chat form, gold, each at its best T",
              best["sft"] - best["base"], 0.3),
        Claim("SFT over the prompted base, gold, each at its best T",
              best["sft"] - best["base_prompted"], 0.05)]
    found += [Claim(f"{name} over the prompted base, gold, each at its best T",
                    best[name] - best["base_prompted"], 0.15) for name in aligned]
    for name in aligned:
        found += [Claim(f"{name} against SFT, wins at T = {t}",
                        at[name, t]["win_rate"]["rate"], 0.65, 0.5) for t in ("0", "0.5", "1")]
        found += [Claim(f"{name} against SFT, wins, each at its best T",
                        policies[name]["best_wins"]["sft"]["rate"], 0.65, 0.5),
                  Claim(f"{name} over SFT, gold, greedy",
                        at[name, "0"]["gold"] - at["sft", "0"]["gold"], 0.15)]
    found.append(Claim("SFT declines harmful requests, greedy", policies["sft"]["declined"]["0"],
                       0.4, 1.0, most=True))
    found += [Claim(f"{name} declines harmful requests, greedy", policies[name]["declined"]["0"],
                    0.8) for name in aligned]
    best_of = f"best_of_{report['n']}"
    found += [Claim(f"{best_of} against SFT, wins at T = 1",
                    at[best_of, "1"]["win_rate"]["rate"], 0.65, 0.5),
              Claim("reward model from noisy rankings, accuracy in their clean order",
                    report["rm_accuracy"], 0.75, 0.5)]
    if {"ppo", "ppo_no_kl"} <= set(policies):
        for t in ("0", "1"):
            found += [Claim(f"PPO without the KL penalty: proxy above PPO's at T = {t}",
                            at["ppo_no_kl", t]["proxy"] - at["ppo", t]["proxy"], 0.0),
                      Claim(f"PPO without the KL penalty: gold below SFT's at T = {t}",
                            at["sft", t]["gold"] - at["ppo_no_kl", t]["gold"], 0.0)]
    if "ppo" in policies:
        tasks = {name: statistics.mean(policies[name]["plain_tasks"].values())
                 for name in ("sft", "ppo")}
        found.append(Claim("plain-text tasks, exact match: PPO-ptx less SFT",
                           tasks["ppo"] - tasks["sft"], -0.02))
        for case in ("rewrite", "classification"):
            cases = {name: at[name, "0"]["use_cases"] for name in ("sft", "ppo")}
            if case in cases["sft"]:
                found.append(Claim(f"{case}: PPO over SFT, gold, greedy",
                                   cases["ppo"][case] - cases["sft"][case], 0.0))
        if "large_prompted" in policies:
            found.append(Claim("PPO against the large prompted base, wins, each at its best T",
                               policies["ppo"]["best_wins"]["large_prompted"]["rate"], 0.6, 0.5))
    return found


def claim_lines(report: dict) -> str:
    """The claims with the numbers that bear them out, or do not, and what has no bar."""
    lines = [f"{'met   ' if claim.met() else 'MISSED'} {claim.says}: {claim.value:.3f} "
             f"({'≤' if claim.most else '≥'} {claim.bar:g})" for claim in claims(report)]
    best_of = report["policies"][f"best_of_{report['n']}"]
    lines.append(f"       KL of best_of_{report['n']}: measured {best_of['kl']:.2f}, "
                 f"log n − (n−1)/n = {best_of['kl_bound']:.2f}")
    for name, curve in report["over_optimisation"].items():
        first, last = curve[0], curve[-1]
        lines.append(f"       {name}: proxy {first['proxy']:.2f} → {last['proxy']:.2f}, gold "
                     f"{first['gold']:.2f} → best {max(point['gold'] for point in curve):.2f} → "
                     f"end {last['gold']:.2f}, KL → {last['kl']:.1f}")
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------- tables

def markdown(header: list[str], rows: list[list]) -> str:
    """A table; numbers to three places, nothing where there is none."""
    def cell(value) -> str:
        return "" if value is None else format(value, ".3f") if isinstance(value, float) else value
    lines = [header, ["---"] * len(header), *([cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables(report: dict) -> str:
    """Gold and wins at every temperature; the parts of gold and the use cases; the costs."""
    policies = report["policies"]
    temperatures = list(policies["sft"]["at"])

    def row(name: str, key) -> list:
        at = policies[name]["at"]
        return [key(at[t]) if t in at else None for t in temperatures]

    def share(win: dict) -> str:
        return f"{100 * win['rate']:.1f} ± {100 * win['standard_error']:.1f}"
    heads = [f"T = {t}" for t in temperatures]
    gold = [[name, policy.get("asked", "chat"), *row(name, lambda figures: figures["gold"]),
             format(policy["best_temperature"], "g")] for name, policy in policies.items()]
    wins = [[name, *row(name, lambda figures: share(figures["win_rate"])),
             share(policy["best_wins"]["sft"])] for name, policy in policies.items()]
    parts, costs = [], []
    for name, policy in policies.items():
        figures = policy["at"][format(policy["best_temperature"], "g")]
        parts.append([name, *(figures[part] for part in PARTS),
                      policy.get("declined", {}).get("0"), figures["length"]])
        tasks = policy.get("plain_tasks", {})
        costs.append([name, policy["at"].get("0", {}).get("proxy"), policy["at"]["1"]["proxy"],
                      policy.get("kl"), policy.get("pretraining_loss"),
                      *(tasks.get(kind) for kind in ("fact", "question", "summary"))])
    cases = list(policies["sft"]["at"]["0"]["use_cases"])
    passes = policies["sft"]["at"]["1"]["passes"]
    greedy = [[case, passes[case], *(policy["at"]["0"]["use_cases"][case]
                                     for policy in policies.values() if "0" in policy["at"])]
              for case in cases]
    named = [name for name, policy in policies.items() if "0" in policy["at"]]
    return "\n".join([
        "Gold, mean over test prompts:\n",
        markdown(["policy", "asked in", *heads, "best T"], gold),
        "Wins against SFT at the same temperature, and each at its best, %:\n",
        markdown(["policy", *heads, "best T"], wins),
        "Parts of gold at the best T, harmful requests declined (greedy), length in tokens:\n",
        markdown(["policy", *(part.replace("_", " ") for part in PARTS), "declined", "length"],
                 parts),
        "Gold by use case, greedy, and how often SFT gives the good answer at T = 1:\n",
        markdown(["use case", "SFT passes", *named], greedy),
        "The proxy, and what alignment costs: KL from SFT at T = 1, nats; pretraining loss; "
        "plain-text tasks, exact match:\n",
        markdown(["policy", "proxy, T = 0", "proxy, T = 1", "KL", "loss", "facts", "questions",
                  "summaries"], costs)])


def examples(prompts: list, answers: dict, count: int = 8) -> str:
    """The same prompts before and after: response and gold score of each policy at its best T."""
    lines = ["## The same prompt before and after, each policy at its best temperature", ""]
    for i in range(0, len(prompts), max(1, len(prompts) // count))[:count]:
        turns = " / ".join(message["content"] for message in prompts[i].messages)
        lines += [f"**{turns}**", "", "| policy | response | gold |", "|---|---|---|"]
        for name, answer in answers.items():
            text = answer.responses[i].text.replace("|", "\\|").replace("\n", " ⏎ ")
            lines.append(f"| {name} | {text} | {answer.parts['gold'][i]:.2f} |")
        lines.append("")
    return "\n".join(lines)


def write_report(run: Path, report: dict, prompts: list, answers: dict) -> None:
    """report.json, report.md and the plots into the run's folder; tables and claims on stdout.
    prompts: with `messages`; answers: name → what has `responses` and `parts`."""
    write_json(run / "report.json", rounded(report), indent=1)
    page = f"{tables(report)}\n{claim_lines(report)}"
    write_text(run / "report.md", f"# {run}\n\n{page}\n{examples(prompts, answers)}")
    draw_plots(report, run)
    print(f"{page}\nwritten: {run}/report.json report.md gold.png over_optimisation.png "
          f"training.png")


# ----------------------------------------------------------------------------- plots

def draw_plots(report: dict, run: Path) -> None:
    """gold.png, over_optimisation.png and training.png; a note on stderr without matplotlib."""
    if pyplot := load_pyplot():
        save_plot(gold_plot(pyplot, report), run / "gold.png")
        save_plot(over_optimisation_plot(pyplot, report), run / "over_optimisation.png")
        save_plot(training_plot(pyplot, run), run / "training.png")
        pyplot.close("all")


def load_pyplot():
    """matplotlib.pyplot without a window, or None, with a note on stderr."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
        return pyplot
    except ImportError:
        print("no plots: pip install matplotlib", file=sys.stderr)


def gold_plot(pyplot, report: dict):
    """Gold and wins against SFT over temperature, and gold by use case: one line a policy."""
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.4),
                                                    constrained_layout=True)
    for name, policy in report["policies"].items():
        x = [float(t) for t in policy["at"]]
        style = dict(marker="o", markersize=4, linestyle="--" if "base" in name else "-")
        left.plot(x, [figures["gold"] for figures in policy["at"].values()], label=name, **style)
        wins = [figures["win_rate"] for figures in policy["at"].values()]
        middle.errorbar(x, [100 * win["rate"] for win in wins], capsize=2, label=name,
                        yerr=[100 * win["standard_error"] for win in wins], **style)
    left.set(title="gold, mean over test prompts", xlabel="temperature", ylim=(0, 1))
    middle.axhline(50, color="black", linewidth=1)
    middle.set(title="wins against SFT at the same temperature, %", xlabel="temperature",
               ylim=(0, 100))
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=8)
    for name in ("base_prompted", "sft", "ppo", "dpo"):
        if name in report["policies"]:
            cases = report["policies"][name]["at"]["0"]["use_cases"]
            right.plot(list(cases.values()), list(cases), "o", markersize=6, alpha=0.8, label=name)
    right.set(title="gold by use case, greedy", xlim=(0, 1.03))
    right.legend(fontsize=7)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    return figure


def over_optimisation_plot(pyplot, report: dict):
    """Proxy and gold score against √KL along the PPO runs."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    titles = {"proxy": "proxy: the reward model's score (−3 without an end)",
              "gold": "gold: what it is worth"}
    colors = ("tab:blue", "tab:green", "tab:red")
    for axis, (key, title) in zip(axes, titles.items()):
        for (name, curve), color in zip(report["over_optimisation"].items(), colors):
            x = [math.sqrt(max(0.0, point["kl"])) for point in curve]
            axis.plot(x, [point[key] for point in curve], "o-", markersize=3.5, color=color,
                      label=CURVES[name])
        axis.set(title=title, xlabel="√KL from SFT, √nats a response")
        axis.grid(alpha=0.3)
    axes[0].legend()
    return figure


def training_plot(pyplot, run: Path):
    """One number of every stage along its steps, smoothed."""
    curves = {"base": "loss", "sft": "loss", "rm": "accuracy", "ppo": "score", "dpo": "margin"}
    figure, axes = pyplot.subplots(1, len(curves), figsize=(15, 3), constrained_layout=True)
    for axis, (stage, key) in zip(axes, curves.items()):
        if (run / stage / "metrics.jsonl").exists():
            values = [row[key] for row in read_log(run / stage / "metrics.jsonl")]
            width = max(1, len(values) // 40)
            parts = [values[i:i + width] for i in range(0, len(values), width)]
            axis.plot([i * width for i in range(len(parts))],
                      [sum(part) / len(part) for part in parts])
        axis.set(title=f"{stage}: {key}", xlabel="step")
        axis.grid(alpha=0.3)
    return figure


def save_plot(figure, path: Path) -> None:
    """Write a matplotlib figure as a PNG file, whole or not at all."""
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))
