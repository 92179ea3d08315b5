"""Expert iteration: best-of-n by the reward model, then imitate the winners; and FeedME, which
imitates the winners that people chose.

    y* = argmax over n samples of π_k of r(x, y);   π_{k+1} = SFT of π_SFT on all (x, y*)

Each round samples from the last policy, trains from the SFT model again with SFT's loss
(→ train_sft.sft_loss), and takes the next part of rl.jsonl, each prompt once; evaluation asks none
of its prompts. What it imitates is as over-optimised as best-of-n is: what the reward model is
wrong about is selected.

FeedME is the same without a reward model: the best response of each ranking is a demonstration
(OpenAI's text-davinci-001 and -002: human demonstrations, and samples rated 7 of 7). One best of K
by noisy labels is often not the best; a pairwise loss averages the noise out.

Differences from AlpacaFarm's: several rounds; the pretraining mix of stage 1 goes on.

    python -m systems.expert_iteration --run out/tinytown              # rounds 1 and 2, and FeedME
"""
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import train_sft
from common.run import DeviceFlags, load_gpt, main, start, write_json, write_text
from data.batches import Prompt, read_prompt_rows
from rollout import Response, ended_scores, load_reward
from systems.best_of_n import choose, several
from systems.table import again, compare


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # Tinytown run: its sft, rm and prompts are read
    reward: str = ""               # reward model; empty: rm inside run
    rankings: str = ""             # what FeedME learns from; empty: rank/some.jsonl inside run
    out: str = ""                  # folder of what is made; empty: systems/expert inside run
    rounds: int = 2
    prompts: int = 1000            # a round, of rl.jsonl
    n: int = 16                    # samples from which the best is chosen (AlpacaFarm: 16)
    epochs: int = 2
    lr: float = 3e-4               # peak
    missing_end_score: float = -3.0   # of a response that never ends, as in PPO
    max_new_tokens: int = 48


LIMITS = dict(rounds=(1, 100), prompts=(1, 10**6), n=(1, 1000), epochs=(1, 1000))


def winners(policy: str, prompts: list[Prompt], config: Config, title: str) -> list[Response]:
    """The best of n responses of a policy to each prompt, by the reward model."""
    run = start(config, LIMITS)
    model, tokenizer = load_gpt(policy)
    model = run.freeze(model)
    reward, _ = load_reward(config.reward or f"{config.run}/rm", tokenizer, run)
    pool = several(model, prompts, config.n, tokenizer, title, config)
    asked = [prompt for prompt in prompts for _ in range(config.n)]
    scores = torch.tensor(ended_scores(reward, asked, pool, config.missing_end_score))
    return choose(pool, scores, config.n)[0]


def imitate(demonstrations: str, out: str, config: Config) -> dict:
    """SFT from the SFT model on a file of demonstrations, or the best responses of rankings."""
    return train_sft.train(train_sft.Config(
        data=(demonstrations,), init=f"{config.run}/sft", out=out, seed=config.seed,
        val=f"{config.run}/data/sft_val.jsonl", ptx_data=(f"{config.run}/data/base.txt",),
        device=config.device, dtype=config.dtype, epochs=config.epochs, lr=config.lr, **again(out)))


def expert_iteration(config: Config) -> dict[str, float]:
    """All rounds. Returns the folder of each round's policy → seconds up to it."""
    started, home = time.time(), Path(config.out or f"{config.run}/systems/expert")
    policy, seconds = f"{config.run}/sft", {}
    model, tokenizer = load_gpt(policy)
    room = model.config.block_size - config.max_new_tokens
    prompts = read_prompt_rows((f"{config.run}/data/rl.jsonl",), tokenizer, room)
    prompts = list({tuple(prompt.ids): prompt for prompt in prompts}.values())
    for k in range(1, config.rounds + 1):
        some = prompts[(k - 1) * config.prompts:k * config.prompts]
        rows = [prompt.messages + [{"role": "assistant", "content": winner.text}]
                for prompt, winner in zip(some, winners(policy, some, config, f"round {k}"))
                if winner.ended and winner.text.strip()]         # never a truncated winner
        lines = [json.dumps({"messages": messages}) + "\n" for messages in rows]
        write_text(home / f"round_{k}.jsonl", "".join(lines))
        policy = str(home / f"expert_{k}")
        imitate(str(home / f"round_{k}.jsonl"), policy, config)
        seconds[policy] = time.time() - started
    return seconds


def feedme(config: Config) -> dict[str, float]:
    """SFT on the best response of each ranking. Returns its folder → seconds."""
    out = f"{config.out or f'{config.run}/systems/expert'}/feedme"
    final = imitate(config.rankings or f"{config.run}/rank/some.jsonl", out, config)
    return {out: final["seconds"]}


def compared(config: Config) -> None:
    """Both, and the table."""
    seconds = expert_iteration(config) | feedme(config)
    policies = {Path(folder).name: folder for folder in seconds}
    found = compare(config, policies, {Path(folder).name: spent
                                       for folder, spent in seconds.items()})
    home = Path(config.out or f"{config.run}/systems/expert")
    write_json(home / "table.json", found, indent=1)


if __name__ == "__main__":
    main(compared, Config)
