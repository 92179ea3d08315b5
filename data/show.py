"""What is in a data file: its layout, its lengths in tokens, what does not fit or is broken, and
three rows as trained on.

    python -m data.show FILE                              GPT-2's vocabulary, context 1,024
    python -m data.show FILE --tokenizer tinytown --block_size 96
"""
import random
import statistics
import sys
from collections import Counter
from dataclasses import dataclass

from common.cli import check_flags, main
from common.errors import InputError
from data.batches import response_row
from data.readers import demonstration, path_and_weight, prompt, ranking, read_as
from data.rows import read_rows
from data.tokenizer import Tokenizer, get_tokenizer, show

# The richest reading first.
KINDS = {"rankings": ranking, "demonstrations": demonstration, "prompts": prompt}


@dataclass(slots=True)
class Config:
    data: tuple = ()               # files
    tokenizer: str = "gpt2"        # gpt2 or tinytown
    block_size: int = 1024         # rows longer than this are counted, tokens
    examples: int = 3              # rows to print
    seed: int = 1                  # which rows


def kind_of(rows: list[tuple[str, dict]]) -> str:
    """What the rows are: the richest kind as which half of the first 200 or more can be read, or
    else the one as which most can. InputError, with each kind's first reason, if none can."""
    first = rows[:200]
    readings = {kind: read_as(convert, first) for kind, convert in KINDS.items()}
    counts = {kind: len(first) - len(reading.broken) for kind, reading in readings.items()}
    if not any(counts.values()):
        raise InputError("\n  ".join(["no row can be read", *(
            f"as {kind}: {reading.broken[0]}" for kind, reading in readings.items())]))
    return next((kind for kind, count in counts.items() if 2 * count >= len(first)),
                max(counts, key=counts.get))


# Name → the keys that show it; the first that fits.
LAYOUTS = {"Self-Instruct": {"instances"}, "Dolly": {"instruction", "context", "response"},
           "ShareGPT": {"conversations"}, "AlpacaFarm": {"output_1", "output_2", "preference"},
           "LLMBar": {"output_1", "output_2", "label"},
           "UltraFeedback": {"instruction", "completions"},
           "this project's rankings": {"responses"},
           "Alpaca pairs": {"instruction", "chosen", "rejected"},
           "prompt, chosen, rejected": {"prompt", "chosen", "rejected"},
           "HH-RLHF or dialogues": {"chosen", "rejected"}, "Alpaca": {"instruction", "output"},
           "messages": {"messages"}, "MT-Bench": {"turns"},
           "KTO": {"prompt", "completion", "label"},
           "prompt, completion": {"prompt", "completion"},
           "prompt, response": {"prompt", "response"}}


def name_of(row: dict) -> str:
    """The layout that a row's keys show, in the words of readers.py."""
    return next((name for name, needed in LAYOUTS.items() if needed <= row.keys()),
                "keys " + ", ".join(sorted(row.keys())))


def rendered(item, kind: str, tokenizer: Tokenizer) -> list[tuple[list[int], list[bool]]]:
    """(ids, response mask) of every row of text that an item gives: one, or, for a ranking, one for
    each response."""
    if kind == "prompts":
        ids = tokenizer.render_prompt(item)
        return [(ids, [False] * len(ids))]
    if kind == "demonstrations":
        return [tokenizer.render(item)]
    start = tokenizer.render_prompt(item.messages)
    return [response_row(start, [*tokenizer.encode(text), tokenizer.end])
            for text in item.responses]


def distribution(name: str, lengths: list[int]) -> str:
    """One line of the table: mean, standard deviation, quartiles, largest."""
    quartiles = (statistics.quantiles(lengths, n=4, method="inclusive") if len(lengths) > 1
                 else [lengths[0]] * 3)
    figures = [statistics.fmean(lengths), statistics.pstdev(lengths), *quartiles, max(lengths)]
    return f"{name:10}" + "".join(f"{figure:10.1f}" if i < 2 else f"{figure:10.0f}"
                                  for i, figure in enumerate(figures))


def describe_file(path: str, tokenizer: Tokenizer, config: Config) -> None:
    """Print all of it for one file."""
    rows = read_rows(path)
    kind = kind_of(rows)
    reading = read_as(KINDS[kind], rows)
    items = reading.items
    layouts = Counter(name_of(row) for _, row in rows)
    print(f"{path}: {len(rows):,} rows, read as {kind} "
          f"({', '.join(f'{name}: {n:,}' for name, n in layouts.most_common(3))})")
    if kind == "rankings" and items:
        sizes = Counter(len(item.scores) for item in items)
        tied = sum(len(set(item.scores)) < len(item.scores) for item in items)
        print(f"  K: {', '.join(f'{k} ({n:,})' for k, n in sorted(sizes.items())[:8])}; "
              f"{tied:,} with ties")
    if reading.broken:
        print(f"  {len(reading.broken):,} broken, the first:\n    "
              + "\n    ".join(reading.broken[:5]))
    for note in reading.notes():
        print(f"  {note}")
    if not items:
        return
    texts = [text for item in items for text in rendered(item, kind, tokenizer)]
    over = sum(len(ids) > config.block_size for ids, _ in texts)
    print(f"  tokens ({tokenizer.name}) {'mean':>6}{'std':>10}"
          f"{'25 %':>10}{'50 %':>10}{'75 %':>10}{'max':>10}")
    print("  " + distribution("prompt", [mask.index(True) if any(mask) else len(mask)
                                         for _, mask in texts]))
    if kind != "prompts":
        print("  " + distribution("response", [sum(mask) for _, mask in texts]))
        print("  " + distribution("whole", [len(mask) for mask, _ in texts]))
    print(f"  {over:,} of {len(texts):,} texts are over {config.block_size} tokens")
    for item in random.Random(config.seed).sample(items, min(config.examples, len(items))):
        print()
        for ids, mask in rendered(item, kind, tokenizer)[:4]:
            show(tokenizer, ids, mask, sys.stdout)


def describe(config: Config) -> None:
    """Describe every file."""
    check_flags(config, dict(block_size=(1, 10**7), examples=(0, 10**4)),
                dict(data="name one or more files"))
    tokenizer = get_tokenizer(config.tokenizer)
    for path, _ in map(path_and_weight, config.data):
        describe_file(str(path), tokenizer, config)


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):       # python -m data.show FILE …
        sys.argv.insert(1, "--data")
    main(describe, Config)
