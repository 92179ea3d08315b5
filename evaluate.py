"""What each stage bought: gold scores, win rates, KL, lengths, over-optimisation → one table, report files and plots.

    win rate = P(gold(y) > gold(y_SFT)) + ½ P(equal)                              → win_rate
    KL(best-of-n ‖ π) ≤ log n − (n − 1)/n                                         → best_of_n_kl

Reads the stages of a Tinytown run (`base sft rm ppo ppo_no_mix ppo_no_kl dpo` inside --run), answers the test prompts
with every policy and asks the gold score, which nothing that trained has seen.

    python evaluate.py --run out/tinytown
"""
import json
import math
import random
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common import InputError, check_range, main, read_log, setup, write_atomically
from data.batches import by_length, pad_rows, prompt_rows, response_row
from data.gold import gold_score
from data.readers import read_prompts
from data.text import text_stream
from data.tokenizer import Tokenizer
from model import GPT, generate_many, load_gpt, load_reward_model
from train_base import evaluate as pretraining_evaluate
from train_ppo import Reward, model_reward

POLICIES = ("base", "sft", "ppo", "dpo", "ppo_no_mix", "ppo_no_kl")
CURVES = {"ppo": "PPO-ptx", "ppo_no_mix": "without the mix", "ppo_no_kl": "without mix and KL penalty"}
STAGES = ("data", "base", "sft", "rank", "rm", "ppo", "ppo_no_mix", "ppo_no_kl", "dpo")


@dataclass(slots=True)
class Config:
    run: str = "out/tinytown"      # folder with the stages' folders
    data: str = ""                 # test prompts; empty: data/test.jsonl inside run
    text: str = ""                 # held-out pretraining text; empty: data/base_val.txt inside run
    opponents: int = 4             # SFT responses that each response is compared with: more of them, less noise
    n: int = 16                    # of best-of-n
    kl_prompts: int = 60           # prompts on which the KL of best-of-n is measured
    kl_samples: int = 32           # further samples of each of them
    max_new_tokens: int = 48
    seed: int = 1
    device: str = "auto"
    dtype: str = "auto"


# ----------------------------------------------------------------------------- equations

def win_rate(scores: Tensor, baseline: Tensor) -> tuple[float, float]:
    """(share of comparisons where score > baseline, ties counted half; standard error over prompts, std/√n with n − 1).

    scores (n,): of one response to each prompt. baseline (n, m): of m responses to it that it is compared with.
    """
    wins = (scores[:, None] > baseline).double() + 0.5 * (scores[:, None] == baseline).double()     # (n, m)
    per_prompt = wins.mean(dim=1)                                                           # (n,)
    return per_prompt.mean().item(), (per_prompt.std(correction=1) / math.sqrt(len(per_prompt))).item()


def best_of_n_kl(n: int) -> float:
    """KL(best-of-n ‖ policy) = log n − (n − 1)/n nats for rewards without ties; an upper bound with them."""
    return math.log(n) - (n - 1) / n


def best_of_n_distribution(probs: Tensor, rewards: Tensor, n: int) -> Tensor:
    """Distribution of the best of n draws by reward: P(y) = p(y)/P(r = r_y) · [P(r ≤ r_y)ⁿ − P(r < r_y)ⁿ].

    probs, rewards (R,): of every possible response. Responses of equal reward share in proportion to p. Returns (R,).
    """
    at_most = (probs * (rewards <= rewards[:, None])).sum(-1)                               # (R,)
    below = (probs * (rewards < rewards[:, None])).sum(-1)
    return probs / (at_most - below) * (at_most ** n - below ** n)


def measured_best_of_n_kl(logprobs: Tensor, below: Tensor, n: int) -> Tensor:
    """Mean over chosen responses of log P_best-of-n(y)/p(y) = log[((F + p)ⁿ − Fⁿ)/p] = log Σ_k (F + p)ᵏ Fⁿ⁻¹⁻ᵏ.

    p = π(y|x) is exact. The sum is the difference without its cancellation: p may be far below F's last digit.

    logprobs (B,): log π(y|x) of the response chosen from n. below (B,): estimate of F = P(r < r_y) from other samples.
    """
    p = logprobs.double().exp()
    below = torch.minimum(below.double(), 1 - p)
    k = torch.arange(n, dtype=torch.float64, device=p.device)
    return ((below + p)[:, None] ** k * below[:, None] ** (n - 1 - k)).sum(-1).log().mean()


# ----------------------------------------------------------------------------- measuring

@dataclass(slots=True)
class Answers:
    """What one policy answered to the test prompts, and what it is worth."""
    texts: list[str]
    ids: list[list[int]]
    gold: Tensor             # (n,) in [0, 1]
    proxy: Tensor            # (n,) of the reward model
    length: float            # mean tokens, end token included


def grade(conversations: list[list[dict]], prompts: list[list[int]], ids: list[list[int]], tokenizer: Tokenizer, reward: Reward) -> Answers:
    """Gold and proxy scores of one response to each conversation."""
    texts, ended = zip(*(tokenizer.response_text(response) for response in ids))
    gold = torch.tensor([gold_score(*row) for row in zip(conversations, texts, ended)])
    proxy = torch.tensor(reward(prompts, ids))
    return Answers(list(texts), ids, gold, proxy, sum(map(len, ids)) / len(ids))


@torch.no_grad()
def response_logprobs(model: GPT, prompts: list[list[int]], ids: list[list[int]], pad: int, device) -> Tensor:
    """log π(y|x) of whole responses, (n,)."""
    sums = torch.zeros(len(prompts))
    for part in by_length([len(p) + len(y) for p, y in zip(prompts, ids)], 64):
        tokens, mask, _ = pad_rows([response_row(prompts[i], ids[i]) for i in part], pad, device)
        sums[part] = model.logprobs(tokens, mask)[0].sum(-1).cpu()
    return sums


def kl_from_samples(model: GPT, ref: GPT, prompts: list[list[int]], ids: list[list[int]], pad: int, device) -> float:
    """KL(model ‖ ref) in nats a response, estimated from the model's own responses (k1)."""
    own, other = (response_logprobs(m, prompts, ids, pad, device) for m in (model, ref))
    return (own - other).mean().item()


def best_of_n(pool: list[list[int]], proxy: Tensor, n: int) -> tuple[list[list[int]], Tensor]:
    """(the response of highest proxy score among each n in a row, its score)."""
    best = proxy.view(-1, n).argmax(-1)
    return [pool[i * n + j] for i, j in enumerate(best.tolist())], proxy.view(-1, n).max(-1).values


def over_optimisation(folder: Path, window: int = 5) -> list[dict[str, float]]:
    """KL, proxy and gold score along a PPO run, means over `window` rollouts; gold is computed here, afterwards."""
    metrics = read_log(folder / "metrics.jsonl")
    gold: dict[int, list[float]] = {}
    for row in read_log(folder / "rollouts.jsonl"):
        gold.setdefault(row["step"], []).append(gold_score(row["messages"], row["response"], row["ended"]))
    curve, window = [], min(window, len(metrics))
    for start in range(0, len(metrics) - window + 1, window):
        part = metrics[start:start + window]
        golds = [score for row in part for score in gold[row["step"]]]
        curve.append({"kl": sum(row["kl"] for row in part) / window, "proxy": sum(row["score"] for row in part) / window,
                      "gold": sum(golds) / len(golds)})
    return curve


def train(config: Config) -> dict:
    """Measure everything and write report.json, report.md and the plots into the run's folder. Returns the report."""
    check_range(config, opponents=(1, 1000), n=(2, 1000), kl_prompts=(1, 10**6), kl_samples=(2, 10**6), max_new_tokens=(1, 10**5))
    started, run = time.time(), Path(config.run)
    machine = setup(config)
    models = {name: load_gpt(str(run / name))[0].to(machine.device).eval() for name in POLICIES if (run / name).exists()}
    for name in ("base", "sft"):
        if name not in models:
            raise InputError(f"{run}/{name}: missing; the others are compared with it; train that stage first")
    finals = {stage: json.loads(path.read_text()) for stage in STAGES if (path := run / stage / "final.json").exists()}
    if "accuracy_clean" not in finals.get("rm", {}):
        raise InputError(f"{run}/rm/final.json: no accuracy_clean; train the reward model there with --clean")
    reward_model, tokenizer = load_reward_model(str(run / "rm"))
    reward = model_reward(reward_model.to(machine.device).eval(), tokenizer)
    conversations, prompts = prompt_rows(read_prompts(config.data or run / "data" / "test.jsonl"), tokenizer,
                                         reward_model.config.block_size - config.max_new_tokens)

    def sample(model: GPT, prompts: list[list[int]], title: str) -> list[list[int]]:
        # Random numbers of its own for every sample: what one policy answers does not depend on which others are measured.
        generator = torch.Generator(machine.device).manual_seed(zlib.crc32(f"{config.seed} {title}".encode()))
        with machine.autocast():
            return generate_many(model, prompts, config.max_new_tokens, stop_token=tokenizer.end, generator=generator, title=title)

    answers = {name: grade(conversations, prompts, sample(model, prompts, name), tokenizer, reward) for name, model in models.items()}

    def several(indices, count: int, title: str) -> Answers:
        """`count` responses of the SFT model to each of these prompts, one after the other."""
        rows = [i for i in indices for _ in range(count)]
        asked = [prompts[i] for i in rows]
        return grade([conversations[i] for i in rows], asked, sample(models["sft"], asked, title), tokenizer, reward)

    n, everything = config.n, range(len(prompts))
    baseline = several(everything, config.opponents, "opponents").gold.view(-1, config.opponents)
    pool = several(everything, n, f"best of {n}")
    chosen, chosen_proxy = best_of_n(pool.ids, pool.proxy, n)
    answers[f"best_of_{n}"] = grade(conversations, prompts, chosen, tokenizer, reward)

    pad, device = tokenizer.pad, machine.device
    kl = {name: kl_from_samples(model, models["sft"], prompts, answers[name].ids, pad, device) for name, model in models.items()}
    some = random.Random(config.seed).sample(everything, min(config.kl_prompts, len(prompts)))
    others = several(some, config.kl_samples, "kl")
    below = (others.proxy.view(len(some), -1) < chosen_proxy[some][:, None] - 1e-5).double().mean(-1)
    logprobs = response_logprobs(models["sft"], [prompts[i] for i in some], [chosen[i] for i in some], pad, device)
    kl[f"best_of_{n}"] = measured_best_of_n_kl(logprobs, below, n).item()

    text = text_stream((config.text or str(run / "data" / "base_val.txt"),), tokenizer, device)
    windows = text.all_windows(64, most=256)
    report = {
        "prompts": len(prompts),
        "gold": {name: answer.gold.mean().item() for name, answer in answers.items()},
        # SFT's own row compares it with other responses of its own: what no improvement looks like.
        "win_rate_vs_sft": {name: dict(zip(("rate", "standard_error"), win_rate(answer.gold, baseline)))
                            for name, answer in answers.items()},
        "rm_accuracy": finals["rm"]["accuracy_clean"], "rm_accuracy_noisy": finals["rm"]["accuracy"],
        "kl": kl, "kl_best_of_n_bound": best_of_n_kl(n),
        "proxy": {name: answer.proxy.mean().item() for name, answer in answers.items()},
        "length": {name: answer.length for name, answer in answers.items()},
        "pretraining_loss": {name: pretraining_evaluate(model, windows) for name, model in models.items()},
        "seconds": {stage: final["seconds"] for stage, final in finals.items()} | {"evaluate": round(time.time() - started, 1)},
        "tokens_per_second": {stage: final["tokens_per_second"] for stage, final in finals.items() if "tokens_per_second" in final},
        "memory_gib": {stage: final["memory_gib"] for stage, final in finals.items() if "memory_gib" in final},
        "over_optimisation": {name: over_optimisation(run / name) for name in CURVES if name in models},
    }
    write_report(run, report, conversations, answers)
    return report


# ----------------------------------------------------------------------------- showing

def rounded(value):
    """The same nest of dicts and lists with floats to four places."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def table(report: dict) -> str:
    """One row a policy, in Markdown."""
    lines = ["| policy | gold | wins against SFT | proxy | KL from SFT, nats | length, tokens | pretraining loss |",
             "|---|---|---|---|---|---|---|"]
    for name, gold in report["gold"].items():
        win, loss = report["win_rate_vs_sft"][name], report["pretraining_loss"].get(name)
        lines.append(f"| {name} | {gold:.3f} | {100 * win['rate']:.1f} ± {100 * win['standard_error']:.1f} % | "
                     f"{report['proxy'][name]:.2f} | {report['kl'][name]:.2f} | {report['length'][name]:.1f} | "
                     f"{'' if loss is None else format(loss, '.3f')} |")
    return "\n".join(lines) + "\n"


def checks(report: dict) -> str:
    """The lecture's claims with the numbers that bear them out, or do not."""
    gold, wins, loss = report["gold"], report["win_rate_vs_sft"], report["pretraining_loss"]
    best = next(name for name in gold if name.startswith("best_of"))
    rows = [("instruction tuning makes a chat agent: gold of SFT over base ≥ 0.20", gold["sft"] - gold["base"], 0.20),
            ("the reward model learns from noisy rankings: clean accuracy ≥ 0.75", report["rm_accuracy"], 0.75)]
    rows += [(f"{name} beats SFT: win rate ≥ 0.65", wins[name]["rate"], 0.65) for name in ("ppo", "dpo", best) if name in wins]
    lines = [f"{'met ' if value >= bar else 'MISSED'} {claim}: {value:.3f}" for claim, value, bar in rows]
    lines.append(f"     KL of {best}: measured {report['kl'][best]:.2f}, log n − (n−1)/n = {report['kl_best_of_n_bound']:.2f}")
    if "ppo" in loss and "ppo_no_mix" in loss:
        ratio, without = loss["ppo"] / loss["sft"], loss["ppo_no_mix"] / loss["sft"]
        lines.append(f"{'met ' if ratio <= 1.05 and ratio < without else 'MISSED'} the mix holds the language model: pretraining "
                     f"loss of PPO-ptx / SFT {ratio:.3f} ≤ 1.05, and below {without:.3f} without the mix")
    for name, curve in report["over_optimisation"].items():
        best_gold = max(point["gold"] for point in curve)
        lines.append(f"     {name}: proxy {curve[0]['proxy']:.2f} → {curve[-1]['proxy']:.2f}, gold {curve[0]['gold']:.2f} → best "
                     f"{best_gold:.2f} → end {curve[-1]['gold']:.2f}, KL → {curve[-1]['kl']:.1f}")
    return "\n".join(lines) + "\n"


def examples(conversations: list[list[dict]], answers: dict[str, Answers], count: int = 8) -> str:
    """The same prompts before and after: response and gold score of each policy."""
    lines = ["## The same prompt before and after", ""]
    for i in range(0, len(conversations), max(1, len(conversations) // count))[:count]:
        turns = " / ".join(message["content"] for message in conversations[i])
        lines += [f"**{turns}**", "", "| policy | response | gold |", "|---|---|---|"]
        for name in ("base", "sft", "ppo", "dpo"):
            if name in answers:
                text = answers[name].texts[i].replace("|", "\\|").replace("\n", " ⏎ ")
                lines.append(f"| {name} | {text} | {answers[name].gold[i]:.2f} |")
        lines.append("")
    return "\n".join(lines)


def write_report(run: Path, report: dict, conversations: list[list[dict]], answers: dict[str, Answers]) -> None:
    """report.json, report.md and the plots into the run's folder; the table and the claims on stdout."""
    write_atomically(run / "report.json", lambda path: path.write_text(json.dumps(rounded(report), indent=1) + "\n"))
    page = f"# {run}\n\n{table(report)}\n{checks(report)}\n{examples(conversations, answers)}"
    write_atomically(run / "report.md", lambda path: path.write_text(page))
    draw_plots(report, run)
    print(f"{table(report)}\n{checks(report)}\nwritten: {run}/report.json report.md gold.png over_optimisation.png training.png")


def draw_plots(report: dict, run: Path) -> None:
    """gold.png, over_optimisation.png and training.png; a note on stderr if matplotlib is not installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plots: pip install matplotlib", file=sys.stderr)
        return
    names = list(report["gold"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    left.barh(names[::-1], [report["gold"][name] for name in names[::-1]], color="tab:blue")
    left.set(title="gold score, mean over test prompts", xlim=(0, 1))
    rates = [report["win_rate_vs_sft"][name] for name in names[::-1]]
    right.barh(names[::-1], [100 * r["rate"] for r in rates], xerr=[100 * r["standard_error"] for r in rates], color="tab:green")
    right.axvline(50, color="black", linewidth=1)
    right.set(title="wins against SFT, % (ties half)", xlim=(0, 100))
    save_plot(figure, run / "gold.png")

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    titles = {"proxy": "proxy: the reward model's score (−3 without an end)", "gold": "gold: what it is worth"}
    for axis, (key, title) in zip(axes, titles.items()):
        for (name, curve), color in zip(report["over_optimisation"].items(), ("tab:blue", "tab:green", "tab:red")):
            x = [math.sqrt(max(0.0, point["kl"])) for point in curve]
            axis.plot(x, [point[key] for point in curve], "o-", markersize=3.5, color=color, label=CURVES[name])
        axis.set(title=title, xlabel="√KL from SFT, √nats a response")
        axis.grid(alpha=0.3)
    axes[0].legend()
    save_plot(figure, run / "over_optimisation.png")

    curves = {"base": "loss", "sft": "loss", "rm": "accuracy", "ppo": "score", "dpo": "margin"}
    figure, axes = pyplot.subplots(1, len(curves), figsize=(15, 3), constrained_layout=True)
    for axis, (stage, key) in zip(axes, curves.items()):
        if (run / stage / "metrics.jsonl").exists():
            values = [row[key] for row in read_log(run / stage / "metrics.jsonl")]
            width = max(1, len(values) // 40)
            smooth = [sum(part) / len(part) for part in (values[i:i + width] for i in range(0, len(values), width))]
            axis.plot([i * width for i in range(len(smooth))], smooth)
        axis.set(title=f"{stage}: {key}", xlabel="step")
        axis.grid(alpha=0.3)
    save_plot(figure, run / "training.png")
    pyplot.close("all")


def save_plot(figure, path: Path) -> None:
    """Write a matplotlib figure as a PNG file, whole or not at all."""
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))


if __name__ == "__main__":
    main(train, Config)
