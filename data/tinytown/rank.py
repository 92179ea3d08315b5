"""Collect rankings: K responses to each prompt, ranked by Tinytown's annotators.

    python -m data.tinytown.rank --init out/tinytown/sft --data out/tinytown/data/rank.jsonl \\
                                 --out out/tinytown/rank

InstructGPT's labelers ranked K = 4 to 9 responses at once, sampled from a model. With `--given
true` the responses that the data holds are ranked anew, with `--reward FOLDER` a reward model
ranks. With `--clean true` the same responses are also written in their true order: for held-out
prompts a measure of what was learned behind the noise; for others what training is like without it.
"""
import json
import time
from dataclasses import dataclass
from pathlib import Path

from common.files import write_json, write_text
from common.run import DeviceFlags, load_gpt, main, start
from data.batches import Prompt, read_prompt_rows
from data.readers import read_rankings
from data.tinytown.annotators import rank_responses
from data.tinytown.gold import gold_score
from data.tokenizer import Tokenizer
from rollout import Response, ended_scores, load_reward, respond


@dataclass(slots=True)
class Config(DeviceFlags):
    data: tuple = ()               # prompts; with --given rankings
    init: str = ""                 # the model that answers them, or whose tokens they are read in
    out: str = "out/rank"          # folder for rankings.jsonl
    given: bool = False            # rank the responses of data, not new ones
    reward: str = ""               # folder of a reward model that ranks; empty: annotators do
    missing_end_score: float = -3.0   # its score of a response that never ended, as in PPO
    clean: bool = False            # also write clean.jsonl, in the true order
    least: int = 4                 # smallest K (InstructGPT: 4)
    most: int = 9                  # largest K (InstructGPT: 9)
    flip: float = 0.25             # share of pairs flipped beyond annotators' taste (AlpacaFarm)
    temperature: float = 1.0
    max_new_tokens: int = 48


LIMITS = dict(least=(2, 100), most=(2, 100), flip=(0, 0.5), temperature=(0.01, 10))
NEEDED = dict(data="name one or more files of prompts",
              init="name the folder of the checkpoint that answers them")

# A prompt and the K responses to it.
Answered = tuple[Prompt, list[Response]]


def sampled(config: Config, run, model, tokenizer: Tokenizer) -> list[Answered]:
    """K new responses of the model to each prompt, K at random from least to most."""
    room = model.config.block_size - config.max_new_tokens
    prompts = read_prompt_rows(config.data, tokenizer, room)
    sizes = [run.draw.randint(config.least, config.most) for _ in prompts]
    asked = [prompt for prompt, k in zip(prompts, sizes) for _ in range(k)]
    following = iter(respond(run.freeze(model), asked, tokenizer, config.max_new_tokens,
                             title="sample K responses", seed=config.seed,
                             temperature=config.temperature))
    return [(prompt, [next(following) for _ in range(k)]) for prompt, k in zip(prompts, sizes)]


def given(config: Config, tokenizer: Tokenizer) -> list[Answered]:
    """The responses that the rankings of data hold."""
    found = []
    for ranking in read_rankings(*config.data):
        prompt = Prompt(ranking.messages, tokenizer.render_prompt(ranking.messages))
        ended = [i not in ranking.cut for i in range(len(ranking.responses))]
        found.append((prompt, [
            Response(tokenizer.encode(text) + [tokenizer.end] * whole, text, whole)
            for text, whole in zip(ranking.responses, ended)]))
    return found


def ranking_line(messages: list[dict], responses: list[Response], scores: list[float]) -> str:
    """One ranking in the project's layout, see `readers.py`, which has no use for empty texts."""
    rows = [{"text": response.text if response.text.replace("<|endoftext|>", "").strip() else ".",
             "score": round(score, 4), "ended": response.ended}
            for response, score in zip(responses, scores)]
    return json.dumps({"messages": messages, "responses": rows}) + "\n"


def collect(config: Config) -> dict:
    """Sample, rank and write. Returns counts of rankings, responses and pairs."""
    run, started = start(config, LIMITS | dict(most=(config.least, 100)), NEEDED), time.time()
    model, tokenizer = load_gpt(config.init)
    if config.given:
        answered = given(config, tokenizer)
    else:
        answered = sampled(config, run, model, tokenizer)
    asked = [prompt for prompt, responses in answered for _ in responses]
    everything = [response for _, responses in answered for response in responses]
    if config.reward:
        reward, _ = load_reward(config.reward, tokenizer, run)
        scores = iter(ended_scores(reward, asked, everything, config.missing_end_score))
    noisy, clean, pairs = [], [], 0
    for (messages, _), responses in answered:
        texts, ended = zip(*((response.text, response.ended) for response in responses))
        if config.reward:
            order = [next(scores) for _ in responses]
        else:
            order = rank_responses(run.draw, messages, list(texts), list(ended), config.flip)
        pairs += sum(a > b for a in order for b in order)
        noisy.append(ranking_line(messages, responses, order))
        if config.clean:
            true = [gold_score(messages, *answer) for answer in zip(texts, ended)]
            clean.append(ranking_line(messages, responses, true))
    out, seconds = Path(config.out), time.time() - started
    write_text(out / "rankings.jsonl", "".join(noisy))
    if config.clean:
        write_text(out / "clean.jsonl", "".join(clean))
    generated = sum(len(response.ids) for response in everything)
    final = {"rankings": len(noisy), "responses": len(everything), "pairs": pairs,
             "seconds": round(seconds, 1), "tokens_per_second": round(generated / seconds)}
    write_json(out / "final.json", final)
    print(" ".join(f"{name}={count}" for name, count in final.items()))
    return final


if __name__ == "__main__":
    main(collect, Config)
