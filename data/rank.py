"""Collect rankings: K responses of a model to each prompt, ranked by Tinytown's annotators.

    python -m data.rank --init out/tinytown/sft --data out/tinytown/data/rank.jsonl --out out/tinytown/data/rankings.jsonl

InstructGPT's labelers ranked K = 4 to 9 responses at once. Each output row holds the prompt and its responses with the
annotator's `score` (what trains) and `gold` (what a test may compare with, and no training script reads).
"""
import json
import random
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
    out: str = "out/rankings.jsonl"
    least: int = 4                 # smallest K (InstructGPT: 4)
    most: int = 9                  # largest K (InstructGPT: 9)
    flip: float = 0.25             # share of pairs in the wrong order beyond the annotator's own taste (AlpacaFarm)
    max_new_tokens: int = 48
    seed: int = 1
    device: str = "auto"
    dtype: str = "auto"


def train(config: Config) -> dict:
    """Sample, rank and write. Returns counts of rankings, responses and pairs."""
    check_range(config, least=(2, 100), most=(config.least, 100), flip=(0, 0.5), max_new_tokens=(1, 10**5))
    if not config.data:
        raise InputError("--data: name one or more files of prompts")
    machine = setup(config)
    model, tokenizer = load_gpt(config.init)
    model.to(machine.device)
    conversations, prompts = prompt_rows(read_prompts(*config.data), tokenizer,
                                         model.config.block_size - config.max_new_tokens)
    draw = random.Random(config.seed)
    sizes = [draw.randint(config.least, config.most) for _ in prompts]
    with machine.autocast():
        sampled = iter(generate_many(
            model, [prompt for prompt, k in zip(prompts, sizes) for _ in range(k)], config.max_new_tokens,
            stop_token=tokenizer.end, title="sample K responses",
            generator=torch.Generator(machine.device).manual_seed(config.seed)))
    lines, pairs = [], 0
    for messages, k in zip(conversations, sizes):
        answers = [tokenizer.response_text(next(sampled)) for _ in range(k)]
        texts, ended = [text or " " for text, _ in answers], [end for _, end in answers]
        scores = rank(draw, messages, texts, ended, config.flip)
        pairs += sum(a > b for a in scores for b in scores)
        responses = [{"text": text, "score": score, "gold": round(gold_score(messages, text, end), 4)}
                     for text, end, score in zip(texts, ended, scores)]
        lines.append(json.dumps({"messages": messages, "responses": responses}) + "\n")
    write_atomically(Path(config.out), lambda path: path.write_text("".join(lines)))
    counts = {"rankings": len(lines), "responses": sum(sizes), "pairs": pairs}
    print(" ".join(f"{name}={count}" for name, count in counts.items()))
    return counts


if __name__ == "__main__":
    main(train, Config)
