"""Collect rankings: K responses of a model to each prompt, ranked by Tinytown's annotators.

    python -m data.rank --init out/tinytown/sft --data out/tinytown/data/rank.jsonl --out out/tinytown/rank

InstructGPT's labelers ranked K = 4 to 9 responses at once. With `--clean true` the same responses are also written in
their true order, for held-out prompts: a measure of what the reward model learned behind the noise.
"""
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common import InputError, check_range, main, setup, write_atomically
from data.batches import prompt_rows
from data.gold import gold_score, rank
from data.readers import read_prompts
from model import generate_many, load_gpt


@dataclass(slots=True)
class Config:
    data: tuple = ()               # prompts
    init: str = ""                 # the model that answers them
    out: str = "out/rank"          # folder for rankings.jsonl
    clean: bool = False            # also write clean.jsonl: the same responses in their true order, never for training
    least: int = 4                 # smallest K (InstructGPT: 4)
    most: int = 9                  # largest K (InstructGPT: 9)
    flip: float = 0.25             # share of pairs in the wrong order beyond the annotator's own taste (AlpacaFarm)
    max_new_tokens: int = 48
    seed: int = 1
    device: str = "auto"
    dtype: str = "auto"


def ranking_line(messages: list[dict], texts: list[str], scores: list[float]) -> str:
    """One ranking in the project's layout, see `readers.py`."""
    responses = [{"text": text, "score": round(score, 4)} for text, score in zip(texts, scores)]
    return json.dumps({"messages": messages, "responses": responses}) + "\n"


def train(config: Config) -> dict:
    """Sample, rank and write. Returns counts of rankings, responses and pairs."""
    check_range(config, least=(2, 100), most=(config.least, 100), flip=(0, 0.5), max_new_tokens=(1, 10**5))
    if not config.data:
        raise InputError("--data: name one or more files of prompts")
    if not config.init:
        raise InputError("--init: name the folder of the checkpoint that answers them")
    machine, started = setup(config), time.time()
    model, tokenizer = load_gpt(config.init)
    model.to(machine.device)
    conversations, prompts = prompt_rows(read_prompts(*config.data), tokenizer,
                                         model.config.block_size - config.max_new_tokens)
    draw = random.Random(config.seed)
    sizes = [draw.randint(config.least, config.most) for _ in prompts]
    with machine.autocast():
        sampled = generate_many(
            model, [prompt for prompt, k in zip(prompts, sizes) for _ in range(k)], config.max_new_tokens,
            stop_token=tokenizer.end, title="sample K responses",
            generator=torch.Generator(machine.device).manual_seed(config.seed))
    generated = sum(map(len, sampled))
    sampled = iter(sampled)
    noisy, clean, pairs = [], [], 0
    for messages, k in zip(conversations, sizes):
        answers = [tokenizer.response_text(next(sampled)) for _ in range(k)]
        texts, ended = [text if text.strip() else "." for text, _ in answers], [end for _, end in answers]
        scores = rank(draw, messages, texts, ended, config.flip)
        pairs += sum(a > b for a in scores for b in scores)
        noisy.append(ranking_line(messages, texts, scores))
        clean.append(ranking_line(messages, texts, [gold_score(messages, *answer) for answer in zip(texts, ended)]))
    write_atomically(Path(config.out) / "rankings.jsonl", lambda path: path.write_text("".join(noisy)))
    if config.clean:
        write_atomically(Path(config.out) / "clean.jsonl", lambda path: path.write_text("".join(clean)))
    seconds = time.time() - started
    final = {"rankings": len(noisy), "responses": sum(sizes), "pairs": pairs, "seconds": round(seconds, 1),
             "tokens_per_second": round(generated / seconds)}
    write_atomically(Path(config.out) / "final.json", lambda path: path.write_text(json.dumps(final, indent=2) + "\n"))
    print(" ".join(f"{name}={count}" for name, count in final.items()))
    return final


if __name__ == "__main__":
    main(train, Config)
