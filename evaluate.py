"""What each stage bought: gold scores at every temperature, win rates, KL, what alignment cost.

    win rate = P(gold(y) > gold(y_SFT)) + ½ P(equal)                       → rollout.win_rate

Reads the stages of a Tinytown run (`base sft rm ppo dpo …` inside --run), answers the test prompts
with every policy at temperatures 0, 0.5, 0.7 and 1, and asks the gold score, which nothing that
trained has seen. A policy's own best temperature is chosen on validation prompts. The base model is
asked in chat form and in plain text (`base_prompted`, in the form that does best on validation
prompts); a larger base in --run/base_large, if there is one, in plain text only. Best-of-n of the
SFT model stands beside them (→ systems/best_of_n.py).

    python evaluate.py --run out/tinytown
"""
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.files import progress, read_log
from common.run import DeviceFlags, InputError, load_gpt, main, start
from data.batches import Prompt, read_prompt_rows
from data.text import text_stream
from data.tinytown.gold import gold_parts, gold_score
from data.tinytown.plain import FORMS, plain_prompts, plain_tasks
from data.tinytown.report import CURVES, write_report
from data.tinytown.town import understand
from data.tokenizer import Tokenizer
from model import GPT
from rollout import Response, Reward, kl_from_samples, load_reward, respond, win_rate
from systems.best_of_n import best_of_n, best_of_n_kl, seed_of
from train_base import evaluate as pretraining_evaluate

POLICIES = ("base", "sft", "ppo", "dpo", "ppo_no_mix", "ppo_no_kl")
PROMPTED = {"base_prompted": "base", "large_prompted": "base_large"}     # asked in plain text
STAGES = ("base", "sft", "rank", "rm", "ppo", "ppo_no_mix", "ppo_no_kl", "dpo")
TEMPERATURES = (0.0, 0.5, 0.7, 1.0)
GOOD = 0.9                         # gold from which an answer counts as the good one
SHOTS = (0, 3)                     # answered examples before a prompt in plain text


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # folder with the stages' folders
    also: tuple = ()               # further policies: folders inside run, asked in chat form
    data: str = ""                 # test prompts; empty: data/test.jsonl inside run
    val: str = ""                  # prompts that choose; empty: data/rank_val.jsonl inside run
    harmful: str = ""              # requests to decline; empty: data/harmful.jsonl inside run
    text: str = ""                 # held-out pretraining text; empty: data/base_val.txt inside run
    opponents: int = 4             # SFT responses that each response is compared with
    n: int = 16                    # of best-of-n
    kl_prompts: int = 60           # prompts on which the KL of best-of-n is measured
    kl_samples: int = 32           # further samples of each of them
    missing_end_score: float = -3.0   # of best-of-n's response that never ends, as in PPO
    max_new_tokens: int = 48


LIMITS = dict(opponents=(1, 1000), n=(2, 1000), kl_prompts=(1, 10**6), kl_samples=(2, 10**6))


# ----------------------------------------------------------------------------- asking and grading

class Policy(NamedTuple):
    """A model and how it is asked."""
    model: GPT
    form: str = ""           # of plain text, one of FORMS; empty: the chat form
    shots: int = 0           # answered examples before each prompt, in plain text
    system: str = ""         # what the system's turn says, in chat form: a control token

    def asked(self, prompts: list[Prompt], tokenizer: Tokenizer) -> list[Prompt]:
        """The prompts as this policy reads them in chat form; they are graded without its system's
        turn."""
        turn = [{"role": "system", "content": self.system}] * bool(self.system)
        return [prompt._replace(ids=tokenizer.render_prompt(turn + prompt.messages)) if turn
                else prompt for prompt in prompts]

    def answer(self, prompts: list[Prompt], temperature: float, tokenizer: Tokenizer, title: str,
               config: Config) -> list[Response]:
        """A response to each prompt, from random numbers of its own (title)."""
        sampling = dict(seed=seed_of(config.seed, f"{title} {temperature}"),
                        temperature=temperature)
        most = config.max_new_tokens
        if not self.form:
            return respond(self.model, self.asked(prompts, tokenizer), tokenizer, most, **sampling)
        room = self.model.config.block_size - most
        asked = plain_prompts(prompts, self.form, self.shots, tokenizer, room, config.seed)
        plain = respond(self.model, asked, tokenizer, most, stop=tokenizer.endoftext, **sampling)
        # As if it had been written in chat form, for the reward model.
        ends = [[tokenizer.end] * response.ended for response in plain]
        return [Response(tokenizer.encode(response.text.strip()) + end, response.text.strip(),
                         response.ended) for response, end in zip(plain, ends)]


@dataclass(slots=True)
class Answers:
    """What one policy answered to the test prompts at one temperature, and what it is worth."""
    responses: list[Response]
    parts: dict[str, Tensor]       # gold, helpful, honest, harmless, well_formed: (n,) in [0, 1]
    proxy: Tensor                  # (n,) of the reward model
    length: float                  # mean tokens, end token included

    def means(self) -> dict[str, float]:
        means = {name: values.mean().item() for name, values in self.parts.items()}
        return means | {"proxy": self.proxy.mean().item(), "length": self.length}


def graded(prompts: list[Prompt], responses: list[Response]) -> dict[str, Tensor]:
    """Gold and its parts of one response to each prompt, (n,) each."""
    rows = [gold_parts(prompt.messages, response.text, response.ended)
            for prompt, response in zip(prompts, responses)]
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def grade(prompts: list[Prompt], responses: list[Response], reward: Reward) -> Answers:
    """Gold and proxy scores of one response to each prompt."""
    length = sum(len(response.ids) for response in responses) / len(responses)
    return Answers(responses, graded(prompts, responses), torch.tensor(reward(prompts, responses)),
                   length)


def best_setting(candidates: list[Policy], prompts: list[Prompt], tokenizer: Tokenizer,
                 config: Config, bar) -> tuple[Policy, float]:
    """The candidate and the temperature of highest mean gold on validation prompts."""
    found = {}
    for candidate in candidates:
        for temperature in TEMPERATURES:
            responses = candidate.answer(prompts, temperature, tokenizer, "choose", config)
            found[candidate, temperature] = graded(prompts, responses)["gold"].mean().item()
            bar.update()
    return max(found, key=found.get)


def by_use_case(prompts: list[Prompt], scores: Tensor) -> dict[str, float]:
    """Mean score of the prompts of each use case."""
    cases: dict[str, list[float]] = {}
    for prompt, score in zip(prompts, scores.tolist()):
        cases.setdefault(understand(prompt.messages)[0].use_case, []).append(score)
    return {case: sum(part) / len(part) for case, part in cases.items()}


def exact_match(model: GPT, tokenizer: Tokenizer) -> dict[str, float]:
    """Share of plain-text tasks of each kind whose next sentence, greedily, is a right one."""
    rows = plain_tasks()
    prompts = [Prompt([], [tokenizer.endoftext, *tokenizer.encode(row["text"])]) for row in rows]
    responses = respond(model, prompts, tokenizer, 16, seed=0, temperature=0,
                        stop=tokenizer.endoftext)
    right: dict[str, list[bool]] = {}
    for row, response in zip(rows, responses):
        sentence = response.text.strip().partition(".")[0] + "."
        right.setdefault(row["kind"], []).append(sentence in row["answers"])
    return {kind: sum(part) / len(part) for kind, part in right.items()}


def costs(model: GPT, sft: GPT, prompts: list[Prompt], own: list[Response],
          windows: list[tuple[Tensor, Tensor]], tokenizer: Tokenizer) -> dict:
    """What alignment may cost: KL from SFT by the model's own responses at T = 1, in nats; loss on
    pretraining text; plain-text tasks."""
    return {"kl": kl_from_samples(model, sft, prompts, own, tokenizer.pad),
            "pretraining_loss": pretraining_evaluate(model, windows),
            "plain_tasks": exact_match(model, tokenizer)}


def declined(policy: Policy, harmful: list[Prompt], tokenizer: Tokenizer,
             config: Config) -> dict[str, float]:
    """Share of the harmful requests that are declined, greedily and at T = 1."""
    answers = {t: policy.answer(harmful, t, tokenizer, "harmful", config) for t in (0.0, 1.0)}
    return {format(t, "g"): (graded(harmful, some)["harmless"] > 0).double().mean().item()
            for t, some in answers.items()}


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


# ----------------------------------------------------------------------------- the report

@dataclass(slots=True)
class Sitting:
    """Every policy's answers to the test prompts."""
    policies: dict[str, Policy]
    best: dict[str, float]                         # name → its best temperature
    answers: dict[tuple[str, float], Answers]      # (name, temperature) → …
    opponents: dict[tuple[str, float], Tensor]     # gold (n, m) of what others are compared with

    def wins(self, name: str, temperature: float, other: str, other_temperature: float) -> dict:
        rate, error = win_rate(self.answers[name, temperature].parts["gold"],
                               self.opponents[other, other_temperature])
        return {"rate": rate, "standard_error": error}


def sit(candidates: dict[str, list[Policy]], prompts: list[Prompt], val: list[Prompt],
        reward: Reward, tokenizer: Tokenizer, config: Config) -> Sitting:
    """Choose how each is asked and at which temperature, on val; answer prompts at all of them."""
    sitting = Sitting({}, {}, {}, {})
    total = len(TEMPERATURES) * (1 + sum(len(some) + 1 for some in candidates.values()))
    with progress(total, "answer", "round") as bar:
        for name, some in candidates.items():
            policy, sitting.best[name] = best_setting(some, val, tokenizer, config, bar)
            sitting.policies[name] = policy
            for temperature in TEMPERATURES:
                responses = policy.answer(prompts, temperature, tokenizer, name, config)
                sitting.answers[name, temperature] = grade(prompts, responses, reward)
                bar.update()
        # Other responses of SFT than its own row's: compared with these it wins about half.
        for temperature in TEMPERATURES:
            count = config.opponents if temperature else 1
            asked = [prompt for prompt in prompts for _ in range(count)]
            responses = sitting.policies["sft"].answer(asked, temperature, tokenizer, "opponents",
                                                       config)
            gold = graded(asked, responses)["gold"].view(-1, count)
            sitting.opponents["sft", temperature] = gold
            bar.update()
    for name in PROMPTED:
        if name in sitting.best:
            gold = sitting.answers[name, sitting.best[name]].parts["gold"]
            sitting.opponents[name, sitting.best[name]] = gold[:, None]
    return sitting


def figures(sitting: Sitting, name: str, prompts: list[Prompt]) -> dict:
    """What one policy's answers are worth at each temperature, and its wins."""
    best = sitting.best[name]
    gold = {t: sitting.answers[name, t].parts["gold"] for t in TEMPERATURES
            if (name, t) in sitting.answers}
    return {
        "best_temperature": best,
        "at": {format(t, "g"): sitting.answers[name, t].means() | {
            "win_rate": sitting.wins(name, t, "sft", t),
            "use_cases": by_use_case(prompts, gold[t]),
            # How often the good answer is there to be found: what exploration has to go by.
            "passes": by_use_case(prompts, (gold[t] >= GOOD).float())} for t in gold},
        "best_wins": {other: sitting.wins(name, best, other, temperature)
                      for other, temperature in sitting.best.items()
                      if (other, temperature) in sitting.opponents}}


def finals_of(folder: Path) -> dict[str, dict]:
    """What each stage that is there wrote at its end; InputError without the reward model's."""
    finals = {stage: json.loads(path.read_text()) for stage in STAGES
              if (path := folder / stage / "final.json").exists()}
    if "accuracy_clean" not in finals.get("rm", {}):
        raise InputError(f"{folder}/rm/final.json: no accuracy_clean; train the reward model there "
                         f"with --clean")
    return finals


def evaluate(config: Config) -> dict:
    """Measure everything and write report.json, report.md and the plots into the run's folder.
    Returns the report."""
    started, folder, run = time.time(), Path(config.run), start(config, LIMITS)
    names = (*POLICIES, *config.also)
    models = {name: run.freeze(load_gpt(str(folder / name))[0])
              for name in (*names, "base_large") if name in config.also or (folder / name).exists()}
    for name in ("base", "sft"):
        if name not in models:
            raise InputError(f"{folder}/{name}: missing; the others are compared with it; train "
                             f"that stage first")
    finals = finals_of(folder)
    sft, tokenizer = models["sft"], load_gpt(str(folder / "sft"))[1]
    reward, _ = load_reward(str(folder / "rm"), tokenizer, run)
    room = sft.config.block_size - config.max_new_tokens
    prompts, val, harmful = (
        read_prompt_rows((path or str(folder / "data" / f"{name}.jsonl"),), tokenizer, room)
        for path, name in ((config.data, "test"), (config.val, "rank_val"),
                           (config.harmful, "harmful")))
    text = text_stream((config.text or str(folder / "data" / "base_val.txt"),), tokenizer,
                       run.device)
    windows = text.all_windows(64, most=256)

    candidates = {name: [Policy(models[name])] for name in names if name in models}
    candidates |= {name: [Policy(models[of], form, shots) for form in FORMS for shots in SHOTS]
                   for name, of in PROMPTED.items() if of in models}
    sitting = sit(candidates, prompts, val, reward, tokenizer, config)
    best_of = f"best_of_{config.n}"
    chosen, best_of_kl = best_of_n(sft, reward, prompts, tokenizer, config)
    sitting.answers[best_of, 1.0] = grade(prompts, chosen, reward)
    sitting.best[best_of] = 1.0

    found = {name: figures(sitting, name, prompts) for name in sitting.best}
    found[best_of] |= {"kl": best_of_kl, "kl_bound": best_of_n_kl(config.n)}
    for name, policy in sitting.policies.items():
        found[name] |= {
            "declined": declined(policy, harmful, tokenizer, config),
            "asked": f"{policy.form}, {policy.shots} examples" if policy.form else "chat",
            "parameters": sum(p.numel() for p in policy.model.parameters())}
        if not policy.form:
            own = sitting.answers[name, 1.0].responses
            found[name] |= costs(policy.model, sft, prompts, own, windows, tokenizer)
    report = {
        "prompts": len(prompts), "n": config.n, "seed": config.seed, "policies": found,
        "rm_accuracy": finals["rm"]["accuracy_clean"],
        "rm_accuracy_noisy": finals["rm"]["accuracy"],
        "over_optimisation": {name: over_optimisation(folder / name) for name in CURVES
                              if name in models},
        **{key: {stage: final[key] for stage, final in finals.items() if key in final}
           for key in ("seconds", "tokens_per_second", "memory_gib")},
    }
    report["seconds"]["evaluate"] = round(time.time() - started, 1)
    write_report(folder, report, prompts, {name: sitting.answers[name, sitting.best[name]]
                                           for name in sitting.policies})
    return report


if __name__ == "__main__":
    main(evaluate, Config)
