"""Rows of random words and checkpoints of random weights, for timing whole scripts."""
import json
import random
from pathlib import Path

import train_rm
import train_sft
from common.run import save_model
from data.tokenizer import SPECIALS, get_tokenizer
from model import GPT, GPTConfig, RewardModel

LAYERS = HEADS = 4
WIDTH, CONTEXT = 128, 256
PROMPT = RESPONSE = 64                        # tokens, those of the chat template included
TOKENIZER = get_tokenizer("tinytown")
ORDINARY = range(TOKENIZER.encoding.n_vocab - len(SPECIALS))          # ids of text
WORDS = [word for word in (TOKENIZER.decode([id]) for id in ORDINARY)
         if word.startswith(" ") and word[1:].isalpha() and len(TOKENIZER.encode(word)) == 1]


def text(draw: random.Random, tokens: int) -> str:
    """Words that take exactly this many tokens."""
    return "".join(draw.choice(WORDS) for _ in range(tokens))


def written(folder: Path, count: int) -> tuple[Path, Path, list[dict]]:
    """(file of pairs, file of one pair, the pairs)."""
    draw = random.Random(0)
    rows = [{"prompt": text(draw, PROMPT - 3), "chosen": text(draw, RESPONSE - 1),
             "rejected": text(draw, RESPONSE - 1)} for _ in range(count)]
    for name, part in (("pairs.jsonl", rows), ("one.jsonl", rows[:1])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder / "pairs.jsonl", folder / "one.jsonl", rows


def checkpoints(folder: Path) -> None:
    """A random language model and reward model for our scripts to start from."""
    gpt = GPT(GPTConfig(CONTEXT, TOKENIZER.vocab_size, LAYERS, HEADS, WIDTH))
    save_model(folder / "sft", gpt, train_sft.Config(), TOKENIZER)
    save_model(folder / "rm", RewardModel(gpt), train_rm.Config(), TOKENIZER)
