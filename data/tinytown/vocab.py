"""Train Tinytown's byte-pair vocabulary and write its ranks file, `ranks.tiktoken`.

Start from the 256 bytes; again and again join the most frequent pair of neighbours within a word.
The file has one line per token, base64 and rank, as tiktoken reads it. Run again only if the town's
words change:

    python -m data.tinytown.vocab
"""
import argparse
import base64
import random
from collections import Counter

import regex

from data.tinytown.talk import document
from data.tinytown.teachers import demonstrations
from data.tokenizer import SPECIALS, TINYTOWN_PATTERN, TINYTOWN_RANKS

SIZE = 1024 - len(SPECIALS)      # with the special tokens the ids fill 16 × 64


def train_bpe(words: Counter[bytes], size: int) -> list[bytes]:
    """Tokens in order of rank: 256 bytes, then one per merge.

    Equal counts go to the smaller pair, so runs agree.
    """
    tokens = [bytes([i]) for i in range(256)]
    splits = {word: [bytes([b]) for b in word] for word in words}
    while len(tokens) < size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in splits.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(best[0] + best[1])
        for word, parts in splits.items():
            if best[0] in parts:
                splits[word] = merge(parts, best)
    return tokens


def merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """Join every occurrence of the pair, from left to right."""
    joined: list[bytes] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def town_words() -> Counter[bytes]:
    """How often each word stands in a sample of the town's documents and demonstrations."""
    draw = random.Random(0)
    texts = [document(draw) for _ in range(20_000)]
    texts += [message["content"] for row in demonstrations("sft", 10_000, 0)
              for message in row["messages"]]
    return Counter(word.encode() for text in texts
                   for word in regex.findall(TINYTOWN_PATTERN, text))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()       # takes no flags but -h
    tokens = train_bpe(town_words(), SIZE)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    TINYTOWN_RANKS.write_text("".join(lines))
    print(f"{len(tokens)} tokens in {TINYTOWN_RANKS}")
