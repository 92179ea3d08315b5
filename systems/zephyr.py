"""Zephyr: a chat model from other models' answers alone, without a human label of its own.

    dSFT     a teacher answers prompts                   → SFT of the base           → distil
    AIF      four models answer others, a judge scores each answer                   → four_answers
             the best against a *random* other           → pairs                     → feedback
    dDPO     DPO on the pairs, from dSFT: L = −log σ(β h)                            → prefer

    paper    ChatGPT wrote UltraChat; four models of UltraFeedback answer; GPT-4 judges
    here     the run's SFT model; its PPO and SFT models, the base in plain text, dSFT; the run's
             reward model

What a student learns hangs on its judge, so the last two steps are made with each of several:
chance, the base's own grades, the reward model, one annotator a prompt, the gold score as oracle.
The figure shows what dDPO gains over dSFT against how often its judge is right.

As in the paper dSFT's teacher is not the best of the four. With `--teacher ppo` it is, and even the
oracle's pairs gain next to nothing: what dSFT then does wrong it can not do better.

Differences from the paper: the judge is no larger than the student, who is one of the four; one
epoch of dDPO, not three; β 0.5, not 0.1; the pretraining mix of stage 1 goes on in dSFT.

    python -m systems.zephyr --run out/tinytown
"""
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import train_dpo
from common.run import DeviceFlags, InputError, load_gpt, main, start, write_json, write_text
from data.batches import Prompt, read_prompt_rows
from data.tinytown.annotators import ANNOTATORS
from data.tinytown.gold import gold_scores
from data.tinytown.rank import ranking_line
from data.tinytown.report import load_pyplot, markdown, rounded, save_plot
from data.tokenizer import Tokenizer
from evaluate import Policy
from model import GPT
from rollout import Response, Reward, ended_scores, load_reward
from systems.judge import DIGITS, GRADED, expected_grade, next_logprobs, text_of
from systems.lima import fit
from systems.table import again, compare, fresh, inside


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # Tinytown run: its base, sft, rm, ppo and prompts are read
    out: str = ""                  # empty: systems/zephyr inside run
    teacher: str = "sft"           # whose answers dSFT imitates: a folder inside run
    answers: int = 3000            # of the teacher (paper: 200,000 dialogues)
    prompts: int = 2000            # that four models answer (paper: 64,000)
    steps: int = 320               # updates of dSFT
    lr: float = 2e-3               # its peak
    beta: float = 0.5              # of dDPO (paper: 0.1, which gains less here)
    dpo_lr: float = 2e-4           # its peak (paper: 5e-7 for 7 billion weights)
    max_new_tokens: int = 48


LIMITS = dict(answers=(1, 10**6), prompts=(20, 10**6), steps=(1, 10**6), beta=(1e-6, 100))
Answers = list[tuple[Response, ...]]     # to each prompt, one of each model


# ----------------------------------------------------------------------------- choosing

def best_against_random(scores: list[float], draw: random.Random) -> tuple[int, int]:
    """(place of the highest score, place of any other, each as likely). scores (K,): of one judge,
    higher = better; of equal highest ones any is the best. ValueError for fewer than two."""
    if len(scores) < 2:
        raise ValueError(f"{len(scores)} answers: a pair needs two")
    best = draw.choice([k for k, score in enumerate(scores) if score == max(scores)])
    return best, draw.choice([k for k in range(len(scores)) if k != best])


def best_against_worst(scores: list[float], draw: random.Random) -> tuple[int, int]:
    """(place of the highest score, place of the lowest of the others): what Zephyr does not do."""
    best, _ = best_against_random(scores, draw)
    return best, min((k for k in range(len(scores)) if k != best), key=scores.__getitem__)


# ----------------------------------------------------------------------------- the three steps

def asked(name: str, count: int, model: GPT, tokenizer: Tokenizer, config: Config) -> list[Prompt]:
    """The first different prompts of a file of the run."""
    room = model.config.block_size - config.max_new_tokens
    prompts = read_prompt_rows((f"{config.run}/data/{name}.jsonl",), tokenizer, room)
    return list({tuple(prompt.ids): prompt for prompt in prompts}.values())[:count]


def distil(teacher: GPT, tokenizer: Tokenizer, config: Config) -> str:
    """dSFT: the base imitates the teacher's answers at T = 1. Returns its folder."""
    prompts = asked("sft", config.answers, teacher, tokenizer, config)
    answers = Policy(teacher).answer(prompts, 1.0, tokenizer, "teacher", config)
    rows = [{"messages": [*prompt.messages, {"role": "assistant", "content": answer.text}]}
            for prompt, answer in zip(prompts, answers) if answer.ended and answer.text.strip()]
    return fit("dsft", rows, config)


def four_answers(four: dict[str, Policy], prompts: list, tokenizer, config: Config) -> Answers:
    """What each of the models answers to the same prompts at T = 1."""
    return list(zip(*(policy.answer(prompts, 1.0, tokenizer, name, config)
                      for name, policy in four.items())))


def judges(base: GPT, tokenizer: Tokenizer, reward: Reward, seed: int) -> dict[str, Reward]:
    """Judges, each a score for every answer, from the one that knows nothing to the oracle."""
    draw = random.Random(f"judges-{seed}")

    def grades(prompts: list[Prompt], answers: list[Response]) -> list[float]:
        """E[n] of "Cora gave it n of 5", as the base goes on with a text of its own kind."""
        texts = (text_of(GRADED, *one) for one in zip((x.messages for x in prompts), answers))
        contexts = [[tokenizer.endoftext, *tokenizer.encode(text)] for text in texts]
        return expected_grade(next_logprobs(base, tokenizer, contexts, DIGITS)).tolist()

    def people(prompts: list[Prompt], answers: list[Response]) -> list[float]:
        who = {tuple(prompt.ids): draw.choice(ANNOTATORS) for prompt in prompts}
        return [who[tuple(prompt.ids)].utility(draw, gold, answer.text, place=1) for
                prompt, answer, gold in zip(prompts, answers, gold_scores(prompts, answers))]
    return {"chance": lambda prompts, answers: [draw.random() for _ in answers],
            "base_grades": grades, "reward_model": reward, "annotator": people,
            "oracle": gold_scores}


def scored(judge: Reward, prompts: list[Prompt], answers: Answers) -> list[list[float]]:
    """A judge's scores, (prompts, models); what never ended is below all else, unread."""
    repeated = [prompt for prompt, some in zip(prompts, answers) for _ in some]
    found = ended_scores(judge, repeated, [one for some in answers for one in some], -math.inf)
    return [[found.pop(0) for _ in some] for some in answers]


def feedback(prompts: list[Prompt], answers: Answers, scores: list[list[float]], choose: Callable,
             seed: int) -> tuple[str, dict[str, float]]:
    """(pairs as the text of a file of rankings with K = 2, what they are worth). Pairs of equal
    texts or scores are left out. Accuracy: how often the chosen answer is the better one, of pairs
    whose gold differs. choose: `best_against_random` or the like."""
    draw, lines, gold = random.Random(f"pairs-{seed}"), [], []
    for prompt, some, row in zip(prompts, answers, scores):
        best, other = choose(row, draw)
        two = [some[best], some[other]]
        if row[best] > row[other] and two[0].text.strip() and two[0].text != two[1].text:
            lines.append(ranking_line(prompt.messages, two, [1.0, 0.0]))
            gold.append(gold_scores([prompt] * 2, two))
    if not gold:
        raise InputError("--prompts: no pair of unlike answers came of them; raise it")
    right = [chosen > rejected for chosen, rejected in gold if abs(chosen - rejected) > 0.02]
    chosen, rejected = (sum(column) / len(gold) for column in zip(*gold))
    return "".join(lines), {"pairs": len(gold), "accuracy": sum(right) / max(1, len(right)),
                            "gold of chosen": chosen, "of rejected": rejected}


def prefer(name: str, init: str, pairs: str, config: Config) -> str:
    """dDPO from a model; not anew where the same pairs were learned from. Returns its folder."""
    out, path = f"{config.out}/{name}", Path(f"{config.out}/{name}.jsonl")
    same = path.exists() and path.read_text() == pairs
    if not same or not fresh(f"{out}/final.json", f"{init}/model.pt"):
        write_text(path, pairs)
        train_dpo.train(train_dpo.Config(
            data=(str(path),), init=init, out=out, beta=config.beta, lr=config.dpo_lr,
            batch_size=16, seed=config.seed, device=config.device, dtype=config.dtype,
            **again(out)))
    return out


# ----------------------------------------------------------------------------- measuring

def measure(config: Config) -> dict:
    """All steps, with every judge; writes table.json and zephyr.png into out."""
    run, config = start(config, LIMITS), inside(config, "zephyr")
    tokenizer = load_gpt(f"{config.run}/base")[1]
    base, sft, ppo, teacher = (run.freeze(load_gpt(f"{config.run}/{name}")[0])
                               for name in ("base", "sft", "ppo", config.teacher))
    reward, _ = load_reward(f"{config.run}/rm", tokenizer, run)
    known = judges(base, tokenizer, reward, config.seed)
    dsft = distil(teacher, tokenizer, config)
    four = {"ppo": Policy(ppo), "sft": Policy(sft), "base": Policy(base, "talk"),
            "dsft": Policy(run.freeze(load_gpt(dsft)[0]))}
    prompts = asked("rl", config.prompts, base, tokenizer, config)
    answers = four_answers(four, prompts, tokenizer, config)
    scores = {name: scored(judge, prompts, answers) for name, judge in known.items()}
    pairs = {name: feedback(prompts, answers, rows, best_against_random, config.seed)
             for name, rows in scores.items()}
    pairs["worst_other"] = feedback(prompts, answers, scores["reward_model"], best_against_worst,
                                    config.seed)
    policies = {f"ddpo_{name}": prefer(f"ddpo_{name}", dsft, text, config)
                for name, (text, _) in pairs.items()}
    alone = prefer("no_dsft", f"{config.run}/base", pairs["reward_model"][0], config)
    policies = {"dsft": dsft, "no_dsft": alone, **policies, "ppo": f"{config.run}/ppo"}
    found = compare(config, policies)

    worth = rounded({name: one | {
        f"gain, T = {t}": found[f"ddpo_{name}"]["gold"][t] - found["dsft"]["gold"][t]
        for t in ("0", "1")} for name, (_, one) in pairs.items()})
    print(markdown(["judge", *worth["chance"]], [[name, str(one["pairs"]), *list(one.values())[1:]]
                                                 for name, one in worth.items()]))
    found = {"table": found, "judges": worth}
    write_json(Path(config.out) / "table.json", found, indent=1)
    if pyplot := load_pyplot():
        save_plot(gain_plot(pyplot, {name: worth[name] for name in known}),
                  Path(config.out) / "zephyr.png")
        pyplot.close("all")
    return found


def gain_plot(pyplot, worth: dict[str, dict[str, float]]):
    """What dDPO gains over dSFT against its judge's accuracy, a point a judge."""
    figure, axis = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
    for t, marker in (("0", "s"), ("1", "o")):
        points = [(one["accuracy"], one[f"gain, T = {t}"]) for one in worth.values()]
        axis.plot(*zip(*points), marker, label=f"T = {t}")
    for name, point, up in zip(worth, points, (7, -14) * len(points)):   # names do not overlap
        axis.annotate(name, point, (0, up), textcoords="offset points", fontsize=8, ha="center")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="share of pairs in which the judge is right", ylabel="gold, gain over dSFT")
    axis.legend()
    return figure


if __name__ == "__main__":
    main(measure, Config)
