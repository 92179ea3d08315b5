"""Collect rankings: K responses of a model to each prompt, ranked by Tinytown's annotators.

    python -m data.tinytown.rank --init out/tinytown/sft --data out/tinytown/data/rank.jsonl \\
                                 --out out/tinytown/rank

InstructGPT's labelers ranked K = 4 to 9 responses at once. With `--clean true` the same responses
are also written in their true order, for held-out prompts: a measure of what the reward model
learned behind the noise.
"""
import json
import time
from dataclasses import dataclass
from pathlib import Path

from common.files import write_json, write_text
from common.run import DeviceFlags, load_gpt, main, start
from data.batches import read_prompt_rows
from data.tinytown.annotators import rank_responses
from data.tinytown.gold import gold_score
from rollout import respond


@dataclass(slots=True)
class Config(DeviceFlags):
    data: tuple = ()               # prompts
    init: str = ""                 # the model that answers them
    out: str = "out/rank"          # folder for rankings.jsonl
    clean: bool = False            # also write clean.jsonl, in the true order, never for training
    least: int = 4                 # smallest K (InstructGPT: 4)
    most: int = 9                  # largest K (InstructGPT: 9)
    flip: float = 0.25             # share of pairs flipped beyond annotators' taste (AlpacaFarm)
    max_new_tokens: int = 48


NEEDED = dict(data="name one or more files of prompts",
              init="name the folder of the checkpoint that answers them")


def ranking_line(messages: list[dict], texts: list[str], scores: list[float]) -> str:
    """One ranking in the project's layout, see `readers.py`."""
    responses = [{"text": text, "score": round(score, 4)} for text, score in zip(texts, scores)]
    return json.dumps({"messages": messages, "responses": responses}) + "\n"


def collect(config: Config) -> dict:
    """Sample, rank and write. Returns counts of rankings, responses and pairs."""
    limits = dict(least=(2, 100), most=(config.least, 100), flip=(0, 0.5))
    run, started = start(config, limits, NEEDED), time.time()
    model, tokenizer = load_gpt(config.init)
    model = run.freeze(model)
    room = model.config.block_size - config.max_new_tokens
    prompts = read_prompt_rows(config.data, tokenizer, room)
    sizes = [run.draw.randint(config.least, config.most) for _ in prompts]
    asked = [prompt for prompt, k in zip(prompts, sizes) for _ in range(k)]
    responses = respond(model, asked, tokenizer, config.max_new_tokens,
                        title="sample K responses", seed=config.seed)
    following = iter(responses)
    noisy, clean, pairs = [], [], 0
    for (messages, _), k in zip(prompts, sizes):
        answers = [next(following) for _ in range(k)]
        texts = [answer.text if answer.text.strip() else "." for answer in answers]
        ended = [answer.ended for answer in answers]
        scores = rank_responses(run.draw, messages, texts, ended, config.flip)
        pairs += sum(a > b for a in scores for b in scores)
        noisy.append(ranking_line(messages, texts, scores))
        true_scores = [gold_score(messages, *answer) for answer in zip(texts, ended)]
        clean.append(ranking_line(messages, texts, true_scores))
    out, seconds = Path(config.out), time.time() - started
    write_text(out / "rankings.jsonl", "".join(noisy))
    if config.clean:
        write_text(out / "clean.jsonl", "".join(clean))
    generated = sum(len(response.ids) for response in responses)
    final = {"rankings": len(noisy), "responses": sum(sizes), "pairs": pairs,
             "seconds": round(seconds, 1), "tokens_per_second": round(generated / seconds)}
    write_json(out / "final.json", final)
    print(" ".join(f"{name}={count}" for name, count in final.items()))
    return final


if __name__ == "__main__":
    main(collect, Config)
