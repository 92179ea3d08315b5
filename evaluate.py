"""What each stage bought: gold scores, win rates, KL, lengths, over-optimisation → one report.

    win rate = P(gold(y) > gold(y_SFT)) + ½ P(equal)                       → rollout.win_rate

Reads the stages of a Tinytown run (`base sft rm ppo ppo_no_mix ppo_no_kl dpo` inside --run),
answers the test prompts with every policy and asks the gold score, which nothing that trained has
seen. Best-of-n of the SFT model stands beside them (→ systems/best_of_n.py).

    python evaluate.py --run out/tinytown
"""
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.files import read_log
from common.run import DeviceFlags, InputError, load_gpt, main, start
from data.batches import Prompt, read_prompt_rows
from data.text import text_stream
from data.tinytown.gold import gold_score, gold_scores
from data.tinytown.report import CURVES, write_report
from rollout import Response, Reward, kl_from_samples, load_reward, win_rate
from systems.best_of_n import best_of_n, best_of_n_kl, several
from train_base import evaluate as pretraining_evaluate

POLICIES = ("base", "sft", "ppo", "dpo", "ppo_no_mix", "ppo_no_kl")
STAGES = ("data", "base", "sft", "rank", "rm", "ppo", "ppo_no_mix", "ppo_no_kl", "dpo")


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # folder with the stages' folders
    data: str = ""                 # test prompts; empty: data/test.jsonl inside run
    text: str = ""                 # held-out pretraining text; empty: data/base_val.txt inside run
    opponents: int = 4             # SFT responses that each response is compared with
    n: int = 16                    # of best-of-n
    kl_prompts: int = 60           # prompts on which the KL of best-of-n is measured
    kl_samples: int = 32           # further samples of each of them
    max_new_tokens: int = 48


LIMITS = dict(opponents=(1, 1000), n=(2, 1000), kl_prompts=(1, 10**6), kl_samples=(2, 10**6))


@dataclass(slots=True)
class Answers:
    """What one policy answered to the test prompts, and what it is worth."""
    responses: list[Response]
    gold: Tensor             # (n,) in [0, 1]
    proxy: Tensor            # (n,) of the reward model
    length: float            # mean tokens, end token included


def grade(prompts: list[Prompt], responses: list[Response], reward: Reward) -> Answers:
    """Gold and proxy scores of one response to each prompt."""
    length = sum(len(response.ids) for response in responses) / len(responses)
    return Answers(responses, torch.tensor(gold_scores(prompts, responses)),
                   torch.tensor(reward(prompts, responses)), length)


def over_optimisation(folder: Path, window: int = 5) -> list[dict[str, float]]:
    """KL, proxy and gold score along a PPO run, means over `window` rollouts; gold is computed
    here, afterwards."""
    metrics = read_log(folder / "metrics.jsonl")
    gold: dict[int, list[float]] = {}
    for row in read_log(folder / "rollouts.jsonl"):
        score = gold_score(row["messages"], row["response"], row["ended"])
        gold.setdefault(row["step"], []).append(score)
    curve, window = [], min(window, len(metrics))
    for first in range(0, len(metrics) - window + 1, window):
        part = metrics[first:first + window]
        golds = [score for row in part for score in gold[row["step"]]]
        curve.append({"kl": sum(row["kl"] for row in part) / window,
                      "proxy": sum(row["score"] for row in part) / window,
                      "gold": sum(golds) / len(golds)})
    return curve


def evaluate(config: Config) -> dict:
    """Measure everything and write report.json, report.md and the plots into the run's folder.
    Returns the report."""
    started, folder, run = time.time(), Path(config.run), start(config, LIMITS)
    models = {name: run.freeze(load_gpt(str(folder / name))[0])
              for name in POLICIES if (folder / name).exists()}
    for name in ("base", "sft"):
        if name not in models:
            raise InputError(f"{folder}/{name}: missing; the others are compared with it; train "
                             f"that stage first")
    finals = {stage: json.loads(path.read_text()) for stage in STAGES
              if (path := folder / stage / "final.json").exists()}
    if "accuracy_clean" not in finals.get("rm", {}):
        raise InputError(f"{folder}/rm/final.json: no accuracy_clean; train the reward model there "
                         f"with --clean")
    sft, tokenizer = models["sft"], load_gpt(str(folder / "sft"))[1]
    reward, _ = load_reward(str(folder / "rm"), tokenizer, run)
    prompts = read_prompt_rows((config.data or str(folder / "data" / "test.jsonl"),), tokenizer,
                               sft.config.block_size - config.max_new_tokens)

    answers = {name: grade(prompts, several(model, prompts, 1, tokenizer, name, config), reward)
               for name, model in models.items()}
    kl = {name: kl_from_samples(model, sft, prompts, answers[name].responses, tokenizer.pad)
          for name, model in models.items()}
    best = f"best_of_{config.n}"
    chosen, kl[best] = best_of_n(sft, reward, prompts, tokenizer, config)
    answers[best] = grade(prompts, chosen, reward)

    opponents = several(sft, prompts, config.opponents, tokenizer, "opponents", config)
    repeated = [prompt for prompt in prompts for _ in range(config.opponents)]
    baseline = torch.tensor(gold_scores(repeated, opponents)).view(len(prompts), -1)
    wins = {name: win_rate(answer.gold, baseline) for name, answer in answers.items()}

    text = text_stream((config.text or str(folder / "data" / "base_val.txt"),), tokenizer,
                       run.device)
    windows = text.all_windows(64, most=256)
    seconds = {stage: final["seconds"] for stage, final in finals.items()}
    report = {
        "prompts": len(prompts),
        "gold": {name: answer.gold.mean().item() for name, answer in answers.items()},
        # SFT's own row compares it with other responses of its own: no improvement looks so.
        "win_rate_vs_sft": {name: {"rate": rate, "standard_error": error}
                            for name, (rate, error) in wins.items()},
        "rm_accuracy": finals["rm"]["accuracy_clean"],
        "rm_accuracy_noisy": finals["rm"]["accuracy"],
        "kl": kl, "kl_best_of_n_bound": best_of_n_kl(config.n),
        "proxy": {name: answer.proxy.mean().item() for name, answer in answers.items()},
        "length": {name: answer.length for name, answer in answers.items()},
        "pretraining_loss": {name: pretraining_evaluate(model, windows)
                             for name, model in models.items()},
        "seconds": seconds | {"evaluate": round(time.time() - started, 1)},
        "tokens_per_second": {stage: final["tokens_per_second"] for stage, final in finals.items()
                              if "tokens_per_second" in final},
        "memory_gib": {stage: final["memory_gib"] for stage, final in finals.items()
                       if "memory_gib" in final},
        "over_optimisation": {name: over_optimisation(folder / name) for name in CURVES
                              if name in models},
    }
    write_report(folder, report, prompts, answers)
    return report


if __name__ == "__main__":
    main(evaluate, Config)
