"""The report of a Tinytown run: table, claims, examples and plots. `evaluate.py` measures."""
import math
import sys
from pathlib import Path

from common.files import read_log, write_atomically, write_json, write_text

CURVES = {"ppo": "PPO-ptx", "ppo_no_mix": "without the mix",
          "ppo_no_kl": "without mix and KL penalty"}


def rounded(value):
    """The same nest of dicts and lists with floats to four places."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def table(report: dict) -> str:
    """One row a policy, in Markdown."""
    lines = ["| policy | gold | wins against SFT | proxy | KL from SFT, nats | length, tokens | "
             "pretraining loss |",
             "|---|---|---|---|---|---|---|"]
    for name, gold in report["gold"].items():
        win, loss = report["win_rate_vs_sft"][name], report["pretraining_loss"].get(name)
        wins = f"{100 * win['rate']:.1f} ± {100 * win['standard_error']:.1f} %"
        lines.append(f"| {name} | {gold:.3f} | {wins} | {report['proxy'][name]:.2f} | "
                     f"{report['kl'][name]:.2f} | {report['length'][name]:.1f} | "
                     f"{'' if loss is None else format(loss, '.3f')} |")
    return "\n".join(lines) + "\n"


def checks(report: dict) -> str:
    """The lecture's claims with the numbers that bear them out, or do not."""
    gold, wins, loss = report["gold"], report["win_rate_vs_sft"], report["pretraining_loss"]
    best = next(name for name in gold if name.startswith("best_of"))
    rows = [("instruction tuning makes a chat agent: gold of SFT over base ≥ 0.20",
             gold["sft"] - gold["base"], 0.20),
            ("the reward model learns from noisy rankings: clean accuracy ≥ 0.75",
             report["rm_accuracy"], 0.75)]
    rows += [(f"{name} beats SFT: win rate ≥ 0.65", wins[name]["rate"], 0.65)
             for name in ("ppo", "dpo", best) if name in wins]
    lines = [f"{'met ' if value >= bar else 'MISSED'} {claim}: {value:.3f}"
             for claim, value, bar in rows]
    lines.append(f"     KL of {best}: measured {report['kl'][best]:.2f}, log n − (n−1)/n = "
                 f"{report['kl_best_of_n_bound']:.2f}")
    if "ppo" in loss and "ppo_no_mix" in loss:
        ratio, without = loss["ppo"] / loss["sft"], loss["ppo_no_mix"] / loss["sft"]
        met = "met " if ratio <= 1.05 and ratio < without else "MISSED"
        lines.append(f"{met} the mix holds the language model: pretraining loss of PPO-ptx / SFT "
                     f"{ratio:.3f} ≤ 1.05, and below {without:.3f} without the mix")
    for name, curve in report["over_optimisation"].items():
        best_gold = max(point["gold"] for point in curve)
        first, last = curve[0], curve[-1]
        lines.append(f"     {name}: proxy {first['proxy']:.2f} → {last['proxy']:.2f}, gold "
                     f"{first['gold']:.2f} → best {best_gold:.2f} → end {last['gold']:.2f}, KL → "
                     f"{last['kl']:.1f}")
    return "\n".join(lines) + "\n"


def examples(prompts: list, answers: dict, count: int = 8) -> str:
    """The same prompts before and after: response and gold score of each policy."""
    lines = ["## The same prompt before and after", ""]
    for i in range(0, len(prompts), max(1, len(prompts) // count))[:count]:
        turns = " / ".join(message["content"] for message in prompts[i].messages)
        lines += [f"**{turns}**", "", "| policy | response | gold |", "|---|---|---|"]
        for name in ("base", "sft", "ppo", "dpo"):
            if name in answers:
                text = answers[name].responses[i].text
                text = text.replace("|", "\\|").replace("\n", " ⏎ ")
                lines.append(f"| {name} | {text} | {answers[name].gold[i]:.2f} |")
        lines.append("")
    return "\n".join(lines)


def write_report(run: Path, report: dict, prompts: list, answers: dict) -> None:
    """report.json, report.md and the plots into the run's folder; the table and the claims on
    stdout. prompts: with `messages`; answers: name → what has `responses` and `gold`."""
    write_json(run / "report.json", rounded(report), indent=1)
    page = f"# {run}\n\n{table(report)}\n{checks(report)}\n{examples(prompts, answers)}"
    write_text(run / "report.md", page)
    draw_plots(report, run)
    print(f"{table(report)}\n{checks(report)}\nwritten: {run}/report.json report.md gold.png "
          f"over_optimisation.png training.png")


def draw_plots(report: dict, run: Path) -> None:
    """gold.png, over_optimisation.png and training.png; a note on stderr without matplotlib."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plots: pip install matplotlib", file=sys.stderr)
        return
    save_plot(gold_plot(pyplot, report), run / "gold.png")
    save_plot(over_optimisation_plot(pyplot, report), run / "over_optimisation.png")
    save_plot(training_plot(pyplot, run), run / "training.png")
    pyplot.close("all")


def gold_plot(pyplot, report: dict):
    """Bars: gold score and wins against SFT of every policy."""
    names = list(report["gold"])[::-1]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    left.barh(names, [report["gold"][name] for name in names], color="tab:blue")
    left.set(title="gold score, mean over test prompts", xlim=(0, 1))
    wins = [report["win_rate_vs_sft"][name] for name in names]
    right.barh(names, [100 * win["rate"] for win in wins],
               xerr=[100 * win["standard_error"] for win in wins], color="tab:green")
    right.axvline(50, color="black", linewidth=1)
    right.set(title="wins against SFT, % (ties half)", xlim=(0, 100))
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
