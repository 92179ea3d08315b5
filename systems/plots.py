"""The figures of systems/: one function a figure, from what the files beside it measured."""
import math
from collections.abc import Callable
from pathlib import Path

import torch

from evaluate import over_optimisation as ppo_curve

COLORS = {"noisy": "tab:red", "careful": "tab:green", "gold": "tab:blue",
          "noisy, all": "tab:orange"}


def method_plot(pyplot, tables: dict[str, dict]):
    """Wins against SFT at T = 0 and T = 1, a bar a method, noisy beside gold labels."""
    names = sorted((name for name in tables["noisy"] if name != "sft"),
                   key=lambda name: tables["noisy"][name]["wins"]["1"]["rate"])
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 6), sharey=True, constrained_layout=True)
    for axis, t in zip(axes, ("0", "1")):
        for shift, kind in ((-0.2, "noisy"), (0.2, "gold")):
            wins = {place: tables[kind][name]["wins"][t] for place, name in enumerate(names)
                    if name in tables[kind] and t in tables[kind][name]["wins"]}
            axis.barh([place + shift for place in wins],
                      [100 * win["rate"] for win in wins.values()], height=0.38,
                      xerr=[100 * win["standard_error"] for win in wins.values()],
                      label=f"{kind} labels")
        axis.axvline(50, color="black", linewidth=1)
        axis.set(title=f"wins against SFT at T = {t}, %", xlim=(0, 100))
        axis.set_yticks(range(len(names)), names)
        axis.grid(alpha=0.3, axis="x")
    axes[0].legend(loc="lower right")
    return figure


def scatter_plot(pyplot, found: dict):
    """Each method's wins with noisy labels against those with gold ones, at T = 1."""
    figure, axis = pyplot.subplots(figsize=(8, 6), constrained_layout=True)
    noisy, gold = (found["tables"][kind] for kind in ("noisy", "gold"))
    points = sorted((100 * gold[name]["wins"]["1"]["rate"], 100 * noisy[name]["wins"]["1"]["rate"],
                     name) for name in noisy if name in gold and name != "sft")
    # Names stand in a column at the right, evenly spaced, in the order of their points.
    low, high, right = points[0][0], points[-1][0] + 1e-6, max(x for _, x, _ in points) + 5
    for place, (y, x, name) in enumerate(points):
        height = low + (high - low) * place / max(1, len(points) - 1)
        axis.plot(x, y, "o", color="tab:blue")
        axis.annotate(name, (x, y), (right, height), fontsize=8, va="center",
                      arrowprops=dict(arrowstyle="-", linewidth=0.4, color="gray"))
    axis.set_xlim(right=right + 9)
    axis.axline((50, 50), slope=1, color="black", linewidth=0.8)
    axis.set(title=f"Spearman {found['spearman']['1']['all']['rho']:.2f}",
             xlabel="wins with noisy labels, T = 1, %", ylabel="wins with gold labels, T = 1, %")
    axis.grid(alpha=0.3)
    return figure


def over_optimisation_plot(pyplot, found: dict, fitted: Callable):
    """Gold over √KL with the fitted forms, best-of-n left, PPO right; proxies dashed, scaled.
    fitted: (form, √KL, of RL or not) → gold."""
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True, sharey=True)
    for axis, key, reinforced in ((axes[0], "curves", False), (axes[1], "ppo", True)):
        for judge, rows in found[key].items():
            d = [math.sqrt(max(0.0, row["kl"])) for row in rows]
            axis.plot(d, [row["gold"] for row in rows], "o", color=COLORS[judge], markersize=4,
                      label=f"gold, judge: {judge}")
            form = found["fits"][f"{'PPO' if reinforced else 'best-of-n'}, {judge}"]
            x = torch.linspace(1e-3, max(d), 100, dtype=torch.float64)
            axis.plot(x, fitted(form, x, reinforced), color=COLORS[judge])
            low = rows[0]["proxy"]
            half = 2 * (rows[-1]["proxy"] - low) or 1.0
            axis.plot(d, [form["at_0"] + (row["proxy"] - low) / half for row in rows], "--",
                      color=COLORS[judge], linewidth=0.8)
        axis.set(xlabel="√KL from SFT, √nats (best-of-n: its bound)", ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set(title="best-of-n: d (α − β d)", ylabel="gold (dashed: proxy, its gain scaled to ½)")
    axes[1].set(title="PPO without KL penalty: d (α − β log d)")
    return figure


def beside_ppo(pyplot, home: Path):
    """Gold and KL along rollouts of PPO-ptx and of both forms of GRPO, as far as they are there."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for label, place in {"PPO-ptx, reward model": "ppo", "GRPO, reward model": "systems/grpo",
                         "GRPO, gold score as verifier": "systems/grpo_verifier"}.items():
        if (home / place / "rollouts.jsonl").exists():
            points = ppo_curve(home / place, window=4)
            for axis, key in zip(axes, ("gold", "kl")):
                axis.plot([4 * i + 2.5 for i in range(len(points))],
                          [point[key] for point in points], "o-", markersize=3, label=label)
    for axis, title in zip(axes, ("gold, mean of 4 rollouts", "KL from SFT, nats a response")):
        axis.set(title=title, xlabel="rollouts of 64 episodes")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


def bars(pyplot, rows: dict[str, dict]):
    """Gold of every row of a table at T = 0 and T = 1, a bar each."""
    figure, axis = pyplot.subplots(figsize=(8, 0.34 * len(rows) + 1.2), constrained_layout=True)
    for shift, t in ((-0.2, "0"), (0.2, "1")):
        axis.barh([place + shift for place in range(len(rows))],
                  [row["gold"][t] for row in rows.values()], height=0.38, label=f"T = {t}")
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set(title="gold, mean over test prompts", xlim=(0, 1))
    axis.grid(alpha=0.3, axis="x")
    axis.legend()
    return figure


def size_curve(pyplot, rows: dict[int, dict[str, float]], sft: dict[str, float]):
    """Gold over the number of added instructions, a panel for each temperature; people's
    demonstrations dashed. rows: size → "kind, T = t" → gold; sft: the same of SFT."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    for axis, t in zip(axes, ("T = 0", "T = 1")):
        labels = [label for label in sft if label.endswith(t)]
        for i, label in enumerate(labels):
            axis.plot(list(rows), [row[label] for row in rows.values()], "o-", color=f"C{i}",
                      label=label.removesuffix(f", {t}"))
            axis.axhline(sft[label], color=f"C{i}", linestyle="--", linewidth=0.8)
        axis.set(title=t, xlabel="instructions of its own", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="gold (dashed: people's demonstrations)")
    axes[1].legend(fontsize=8)
    return figure
