"""Every way to learn from feedback in one table: what each trains, from a folder of labels.

A folder of labels holds `rankings.jsonl` and the reward model `rm` that learned from them. A method
is a function of it and of a name; it trains into folders inside and returns what each took, in
seconds. A further method takes a file of its own in systems/ and a line in METHODS.

What is equal: the rankings and the SFT model; labels of all kinds are places, not values. What is
not: sampled prompts and responses (RSO 1,000 × 32, Quark 500 × 16, experts 1,000 × 16 a round, PPO
and GRPO 64 × 64), and updates (about 125 on rankings and of PPO and GRPO, 62 on RSO's pairs). ε = ¼
of cDPO and rDPO is right for noisy labels alone.
"""
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import train_dpo
import train_ppo
import train_rm
from common.run import DeviceFlags, InputError, load_gpt, start, write_text
from data.batches import read_prompt_rows
from data.tinytown import rank
from rollout import load_reward, respond
from systems import conditional, expert_iteration, grpo, pro, rdpo, rrhf, rso, slic
from systems.table import again


class Labels(NamedTuple):
    """A folder of one kind of labels, and what methods need to know of the run."""
    run: str                       # of Tinytown
    folder: str                    # holds rankings.jsonl, rm, and the methods' folders
    spread: float                  # standard deviation of rm's scores over samples of SFT
    machine: dict                  # seed, device, dtype

    def flags(self, name: str) -> dict:
        """What all training scripts are told."""
        out = f"{self.folder}/{name}"
        return dict(init=f"{self.run}/sft", out=out, **self.machine, **again(out))

    def sampling(self, name: str) -> dict:
        """What pipelines are told that sample and ask the reward model."""
        return dict(run=self.run, reward=f"{self.folder}/rm", out=f"{self.folder}/{name}",
                    **self.machine)


def direct(pair_loss: Callable, **flags) -> Callable:
    """DPO's loop with a loss on pairs."""
    def method(at: Labels, name: str) -> dict[str, float]:
        config = train_dpo.Config(data=(f"{at.folder}/rankings.jsonl",), batch_size=16,
                                  val=f"{at.run}/rank_val/rankings.jsonl", **at.flags(name),
                                  **flags)
        return {name: train_dpo.train(config, pair_loss)["seconds"]}
    return method


def on_rankings(module, **flags) -> Callable:
    """A loss on whole rankings, with a loop of its own."""
    def method(at: Labels, name: str) -> dict[str, float]:
        config = module.Config(run="", data=(f"{at.folder}/rankings.jsonl",), **at.flags(name),
                               **flags)
        return {name: module.train(config)["seconds"]}
    return method


def ppo(at: Labels, name: str) -> dict[str, float]:
    """PPO-ptx; β in units of the reward's spread."""
    config = train_ppo.Config(**train_ppo.PRESETS["tinytown"] | dict(beta=0.3 * at.spread),
                              reward=f"{at.folder}/rm", data=(f"{at.run}/data/rl.jsonl",),
                              ptx_data=(f"{at.run}/data/base.txt",), **at.flags(name))
    return {name: train_ppo.train(config)["seconds"]}


def group_ppo(at: Labels, name: str) -> dict[str, float]:
    """GRPO, which divides by the spread of each group itself."""
    config = grpo.Config(run="", reward=f"{at.folder}/rm", data=(f"{at.run}/data/rl.jsonl",),
                         **at.flags(name))
    return {name: grpo.train(config)["seconds"]}


def quark(at: Labels, name: str) -> dict[str, float]:
    """Quantile tokens, on samples that the reward model scores."""
    config = conditional.Config(run=at.run, reward=f"{at.folder}/rm", quark=True, **at.flags(name))
    return {name: conditional.train(config)["seconds"]}


def sampled_pairs(at: Labels, _: str) -> dict[str, float]:
    """Pairs of samples: sft_sampled, rso_sigmoid, rso_hinge."""
    return rso.rso(rso.Config(**at.sampling("")))


def experts(at: Labels, _: str) -> dict[str, float]:
    """expert_1 and expert_2."""
    return expert_iteration.expert_iteration(expert_iteration.Config(**at.sampling("")))


def feedme(at: Labels, _: str) -> dict[str, float]:
    """SFT on the best of each ranking."""
    return expert_iteration.feedme(expert_iteration.Config(
        rankings=f"{at.folder}/rankings.jsonl", **at.sampling("")))


METHODS = {
    "dpo": direct(train_dpo.dpo_loss, beta=0.15),
    "ipo": direct(train_dpo.ipo_loss, beta=0.05),
    "cdpo": direct(train_dpo.dpo_loss, beta=0.15, label_smoothing=0.25),
    "rdpo": direct(rdpo.rdpo_loss, beta=0.15, label_smoothing=0.25),
    "hinge": direct(rso.hinge_norm, beta=0.3),
    "slic": on_rankings(slic, lam=0.3), "slic_plain": on_rankings(slic, lam=0.0),
    "rrhf": on_rankings(rrhf), "pro": on_rankings(pro),
    "conditional": on_rankings(conditional), "quark": quark,
    "feedme": feedme, "expert": experts, "rso": sampled_pairs, "ppo": ppo, "grpo": group_ppo}
ASKED_FOR = {"conditional": conditional.BINARY[-1], "quark": conditional.QUANTILES[-1]}


# ----------------------------------------------------------------------------- a kind of labels

def prepare(config, kind: str) -> Labels:
    """The first rankings of a run with one kind of labels, and their reward model; nothing anew
    that is there. config: with run, rankings and DeviceFlags. kind: noisy, gold, or careful, the
    annotators without a flip. InputError if what is there comes of another SFT model."""
    run, machine = config.run, dict(seed=config.seed, device=config.device, dtype=config.dtype)
    folder = Path(run) / "lectures" / kind
    rankings, labels = folder / "rankings.jsonl", folder / "labels"
    mark, sft = labels / "sft.txt", str(zlib.crc32((Path(run) / "sft" / "model.pt").read_bytes()))
    if rankings.exists() and (mark.read_text() if mark.exists() else "") != sft:
        raise InputError(f"{folder}: made from another SFT model than {run}/sft; remove that "
                         f"folder, or name another run")
    if not rankings.exists():
        first = (Path(run) / "rank" / "rankings.jsonl").read_text().splitlines(True)
        write_text(labels / "noisy.jsonl", "".join(first[:config.rankings]))
        rank.collect(rank.Config(data=(str(labels / "noisy.jsonl"),), init=f"{run}/sft",
                                 out=str(labels), given=True, clean=True, flip=0.0, **machine))
        names = {"noisy": "noisy", "careful": "rankings", "gold": "clean"}
        write_text(mark, sft)
        write_text(rankings, places(labels / f"{names[kind]}.jsonl"))
    if not (folder / "rm" / "final.json").exists():
        train_rm.train(train_rm.Config(
            **train_rm.PRESETS["tinytown"], data=(str(rankings),), init=f"{run}/sft",
            val=f"{run}/rank_val/rankings.jsonl", clean=f"{run}/rank_val/clean.jsonl",
            demonstrations=f"{run}/data/sft_val.jsonl", out=str(folder / "rm"), **machine,
            **again(folder / "rm")))
    return Labels(run, str(folder), spread(run, str(folder / "rm"), machine), machine)


def places(path: Path) -> str:
    """The rankings of a file with places for scores: 0 the worst, equal scores one place."""
    lines = []
    for line in path.read_text().splitlines():
        ranking = json.loads(line)
        order = sorted({row["score"] for row in ranking["responses"]})
        for row in ranking["responses"]:
            row["score"] = float(order.index(row["score"]))
        lines.append(json.dumps(ranking) + "\n")
    return "".join(lines)


def spread(home: str, rm: str, machine: dict) -> float:
    """Standard deviation of a reward model's scores over samples of SFT to validation prompts."""
    run = start(DeviceFlags(**machine))
    policy, tokenizer = load_gpt(f"{home}/sft")
    policy = run.freeze(policy)
    reward, _ = load_reward(rm, tokenizer, run)
    asked = read_prompt_rows((f"{home}/data/rank_val.jsonl",), tokenizer, 80)
    responses = respond(policy, asked, tokenizer, 48, seed=run.config.seed)
    return torch.tensor(reward(asked, responses)).std().item()
