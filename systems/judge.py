"""LLM-as-a-judge: a model says which of two answers is better, and whom it favours besides.

    graded alone      E[grade] = Σ_g g · P(g) / Σ_g P(g), g = 1 … 5        → expected_grade
    compared          ℓ(a, b) = log P(first) − log P(second)               → next_logprobs
    in both orders    (ℓ(a, b) − ℓ(b, a)) / 2                              → both_orders
    does it agree with itself when the answers change places?              → swap_agreement

A judge with a taste c for the first place says ℓ(a, b) = d + c and ℓ(b, a) = −d + c: the average is
d, whatever c is. Verdicts without their odds can only agree or cancel out.

Several judges see the same pairs of answers, samples of the SFT model to test prompts:

    RUN/rank's samples → an annotator's vote on each two → "One said: … Dan said: One is better."
        → the base goes on with such texts (train_base.py): the One/Two judge      → comparisons
    the base grades each alone, as in its texts; the reward model; one annotator; the longer wins

On LLMBar's items any chat model judges: systems/llmbar.py. MT-Bench's grading of second turns is
left out.

    python -m systems.judge --run out/tinytown
"""
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import train_base
from common.run import DeviceFlags, InputError, load_gpt, main, start, write_json, write_text
from data.batches import Prompt, Row, by_length, pad_rows, read_prompt_rows
from data.readers import read_rankings
from data.tinytown.annotators import ANNOTATORS, Annotator
from data.tinytown.gold import gold_score
from data.tinytown.report import markdown, rounded
from data.tokenizer import Tokenizer
from model import GPT
from rollout import Response, Reward, load_reward
from systems.best_of_n import several
from systems.table import again

# Texts of the town, up to where the judge goes on. Ordinals: it does not bind answers to names.
GRADED, DIGITS = "Ada asked: {}\nBen said: {}\nCora gave it", (" 1", " 2", " 3", " 4", " 5")
COMPARED, PLACES = "Ada asked: {}\nOne said: {}\nTwo said: {}\nDan said:", (" One", " Two")


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # Tinytown run: its base, sft, rm, rank and test prompts are read
    out: str = ""                  # empty: systems/judge inside run
    steps: int = 600               # of the One/Two judge, from the base
    lr: float = 1e-3               # its peak
    samples: int = 8               # responses to each test prompt
    gap: float = 0.02              # pairs whose gold is not further apart are left out
    max_new_tokens: int = 48


LIMITS = dict(steps=(1, 10**6), samples=(2, 1000), gap=(0, 1))


# ----------------------------------------------------------------------------- equations

def swap_agreement(first: list[int], swapped: list[int],
                   gold: list[int] | None = None) -> dict[str, float]:
    """How verdicts hold when the two outputs change places. Shares in [0, 1].

    first: 1 or 2, the place of the better output, in the order of the data. swapped: the same in
    the other order, where 1 is output 2; it is mapped back, 3 − v. gold: the better output, 1 or 2.
    All (n,). Raises ValueError for other values, for other lengths, and for none.

        agreement      both orders name the same output
        picks_first    verdicts for the first place, of both orders; ½ without a taste for a place
        accuracy       right verdicts, of both orders                                (with gold)
        both_correct   right in both orders                                          (with gold)

    A pair on which the orders disagree is a tie, not an error: one of its two verdicts is right, so
    accuracy = both_correct + (1 − agreement)/2. A judge that always picks the first has accuracy ½,
    agreement 0. Where a judge agrees with itself it is right in both_correct / agreement.
    """
    columns = [list(column) for column in (first, swapped, gold) if column is not None]
    sizes = [len(column) for column in columns]
    if not sizes[0] or len(set(sizes)) > 1:
        raise ValueError(f"{sizes} verdicts: expected equally many of each order, at least one")
    for value in sum(columns, []):
        if value not in (1, 2):
            raise ValueError(f"verdict {value!r}: expected 1 or 2, the place of the better output")
    n, (shown, other, *best) = sizes[0], [list(map(int, column)) for column in columns]
    back = [3 - verdict for verdict in other]
    found = {"agreement": sum(a == b for a, b in zip(shown, back)) / n,
             "picks_first": (shown.count(1) + other.count(1)) / (2 * n)}
    if best:
        right = [(a == c) + (b == c) for a, b, c in zip(shown, back, best[0])]
        found |= {"accuracy": sum(right) / (2 * n), "both_correct": right.count(2) / n}
    return found


def both_orders(shown: Tensor, swapped: Tensor) -> Tensor:
    """How far output 1 leads, (ℓ(a, b) − ℓ(b, a)) / 2, without any taste for a place. (n,)

    shown, swapped (n,): log-odds of the *first place*, in the order of the data and in the other.
    """
    return (shown - swapped) / 2


def expected_grade(logprobs: Tensor) -> Tensor:
    """Σ_g g · P(g) / Σ_g P(g) over the grades g = 1 … G, (..., G) → (...), in [1, G].

    logprobs: of the digits as the next token; what the model gives to other words is left out. It
    tells answers apart whose likeliest grade is the same.
    """
    grades = torch.arange(1, logprobs.shape[-1] + 1, dtype=logprobs.dtype)          # (G,)
    return (logprobs.softmax(-1) * grades).sum(-1)


def parse_verdict(reply: str) -> int | None:
    """1 or 2, the place that a written reply names last, as "Output (a)" or "[[A]]", in any case;
    None if it names none so. The one that another is better *than* is not named."""
    named = re.findall(r"(?<!than )(?:output \(([ab])\)|\[\[([ab])\]\])", reply.lower())
    return "ab".index("".join(named[-1])) + 1 if named else None


@torch.no_grad()
def next_logprobs(model: GPT, tokenizer: Tokenizer, contexts: list[list[int]],
                  replies: tuple[str, ...]) -> Tensor:
    """log P of the token that tells each reply from the others, (n, replies): the words that all
    begin with stand behind the context (n lists of ids); those after it are not read."""
    ids, same = [tokenizer.encode(reply) for reply in replies], 0
    while len({reply[same] for reply in ids}) == 1:
        same += 1
    asked = [context + ids[0][:same] for context in contexts]
    rows = [Row(row, [False] * (len(row) - 1) + [True]) for row in asked]
    found = torch.zeros(len(rows), len(replies))
    for places in by_length(rows, 16):
        tokens, last, _ = pad_rows([rows[i] for i in places], tokenizer.pad,
                                   model.wte.weight.device)                         # (b, T)
        with model.autocast():
            logits = model.hidden(tokens, wanted=last) @ model.output_weight.T      # (b, V)
        logprobs = logits.float().log_softmax(-1)
        found[places] = logprobs[:, [reply[same] for reply in ids]].cpu()
    return found


# ----------------------------------------------------------------------------- figures

COLUMNS = {"accuracy": "accuracy", "averaged": "both orders averaged",
           "agreement": "agrees with itself", "both_correct": "right in both",
           "picks_first": "picks the first", "picks_longer": "picks the longer",
           "length_r": "r with length"}


def figures(shown: Tensor, swapped: Tensor, gold: Tensor, longer: Tensor) -> dict[str, float]:
    """What the tables show of a judge. All (n,): log-odds of the first place in both orders, the
    better output (1 or 2), by how many words output 1 is longer.

    `averaged`: accuracy of `both_orders`, a lead of 0 counted ½. `picks_longer`: of the verdicts on
    outputs of different length. `length_r`: correlation of the lead with `longer`; None without any
    variance.
    """
    verdicts = [torch.where(leads > 0, 1, 2) for leads in (shown, swapped)]
    lead, better = both_orders(shown, swapped), 3 - 2 * gold            # +1: output 1 is better
    picked = torch.stack([3 - 2 * verdicts[0], 2 * verdicts[1] - 3])    # +1: output 1, (2, n)
    right = (1 + lead.sign() * better) / 2
    to_longer = (picked == longer.sign())[:, longer != 0].double()
    x, y = (values.double() - values.double().mean() for values in (lead, longer))
    found = swap_agreement(*(x.tolist() for x in (*verdicts, gold))) | {
        "averaged": right.mean().item(), "picks_longer": to_longer.mean().item(),
        "length_r": (x @ y / (x.norm() * y.norm())).item()}
    return {name: None if value != value else value for name, value in found.items()}


def more_words(one: str, other: str) -> float:
    """By how many words `one` is longer."""
    return float(len(one.split()) - len(other.split()))


# ----------------------------------------------------------------------------- Tinytown

def text_of(template: str, messages: list[dict], *answers: Response) -> str:
    """GRADED or COMPARED, filled in: a conversation in one line, and answers to it."""
    asked = " ".join(message["content"] for message in messages)
    return template.format(asked, *(answer.text for answer in answers))


def vote(draw: random.Random, one: Annotator, messages: list[dict], *answers: Response) -> float:
    """How far the first of two answers leads in the eyes of one annotator, in units of gold."""
    first, second = (one.utility(draw, gold_score(messages, answer.text), answer.text, place)
                     for place, answer in enumerate(answers))
    return first - second


def comparisons(path: str, seed: int) -> list[str]:
    """A text for each two responses of a file of rankings, with the vote of an annotator drawn for
    it. The rankings themselves, a quarter flipped, are not read."""
    draw, found = random.Random(f"comparisons-{seed}"), []
    for ranking in read_rankings(path):
        some = [Response([], text, True) for i, text in enumerate(ranking.responses)
                if i not in ranking.cut]
        draw.shuffle(some)
        for two in zip(some[::2], some[1::2]):
            if two[0].text != two[1].text:
                lead = vote(draw, draw.choice(ANNOTATORS), ranking.messages, *two)
                found.append(text_of(COMPARED, ranking.messages, *two)
                             + f"{PLACES[0] if lead > 0 else PLACES[1]} is better.")
    draw.shuffle(found)
    return found


def one_two_judge(config: Config, home: Path) -> str:
    """Let the base go on with comparisons. Returns the folder of the judge."""
    texts = comparisons(f"{config.run}/rank/rankings.jsonl", config.seed)
    write_text(home / "comparisons.txt", "\n<|endoftext|>\n".join(texts))
    train_base.train(train_base.Config(
        data=(str(home / "comparisons.txt"),), init=f"{config.run}/base",
        out=str(home / "one_two"), steps=config.steps, lr=config.lr, warmup=20, window=80,
        eval_every=0, seed=config.seed, device=config.device, dtype=config.dtype,
        **again(str(home / "one_two"))))
    return str(home / "one_two")


def in_pairs(prompts: list[Prompt], flat: list[Response], config: Config) -> list[tuple]:
    """(prompt, one answer, another, by how much gold the one is better), answers two at a time, as
    far as gold is further apart than `gap`; flat: `samples` to each prompt.

    An answer that never ended is left out: a judge reads texts, which would not show it.
    """
    found = []
    for place, prompt in enumerate(prompts):
        some = flat[place * config.samples:(place + 1) * config.samples]
        some = [answer for answer in some if answer.ended]
        for one, two in zip(some[::2], some[1::2]):
            apart = gold_score(prompt.messages, one.text) - gold_score(prompt.messages, two.text)
            if abs(apart) > config.gap:
                found.append((prompt, one, two, apart))
    if not found:
        raise InputError(f"--gap {config.gap:g}: no two answers are further apart; lower it, or "
                         f"raise --samples")
    return found


def town_judges(base: GPT, one_two: GPT, reward: Reward, tokenizer: Tokenizer,
                seed: int) -> dict[str, Callable]:
    """Functions of (prompts, ones, twos) that say how far the answer in the first place leads."""
    looks = random.Random(f"looks-{seed}")

    def ask(model: GPT, template: str, replies: tuple[str, ...], *columns) -> Tensor:
        texts = [text_of(template, prompt.messages, *answers) for prompt, *answers in zip(*columns)]
        contexts = [[tokenizer.endoftext, *tokenizer.encode(text)] for text in texts]
        return next_logprobs(model, tokenizer, contexts, replies)

    def grades(prompts, answers) -> Tensor:
        return expected_grade(ask(base, GRADED, DIGITS, prompts, answers))

    def alone(score, prompts, ones, twos) -> Tensor:      # no taste for a place is possible
        return torch.as_tensor(score(prompts, ones)) - torch.as_tensor(score(prompts, twos))

    def compared(prompts, ones, twos) -> Tensor:
        first, second = ask(one_two, COMPARED, PLACES, prompts, ones, twos).unbind(-1)
        return first - second

    def people(prompts, ones, twos) -> Tensor:            # the same one for a pair in both orders
        return torch.tensor([vote(looks, ANNOTATORS[i % len(ANNOTATORS)], prompt.messages, *two)
                             for i, (prompt, *two) in enumerate(zip(prompts, ones, twos))])

    def length(_, ones, twos) -> Tensor:
        return torch.tensor([more_words(one.text, two.text) for one, two in zip(ones, twos)])
    return {"grade each": partial(alone, grades), "One/Two": compared,
            "reward model": partial(alone, reward), "one annotator": people, "the longer": length}


def measure(config: Config) -> dict:
    """Train the One/Two judge, then put every judge before the same pairs; writes table.json."""
    home, run = Path(config.out or f"{config.run}/systems/judge"), start(config, LIMITS)
    policy, tokenizer = load_gpt(f"{config.run}/sft")
    prompts = read_prompt_rows((f"{config.run}/data/test.jsonl",), tokenizer,
                               policy.config.block_size - config.max_new_tokens)
    flat = several(run.freeze(policy), prompts, config.samples, tokenizer, "answers", config)
    prompts, ones, twos, apart = zip(*in_pairs(prompts, flat, config))
    base, one_two = (run.freeze(load_gpt(folder)[0])
                     for folder in (f"{config.run}/base", one_two_judge(config, home)))
    judges = town_judges(base, one_two, load_reward(f"{config.run}/rm", tokenizer, run)[0],
                         tokenizer, config.seed)
    apart, longer = torch.tensor(apart), judges["the longer"](prompts, ones, twos)
    gold, far, found = torch.where(apart > 0, 1, 2), apart.abs() > 0.3, {}
    for name, judge in judges.items():
        columns = judge(prompts, ones, twos), judge(prompts, twos, ones), gold, longer
        found[name] = {"all": figures(*columns)}
        found[name]["far"] = figures(*(column[far] for column in columns)) if far.any() else {}
    print(f"{len(gold)} pairs, {int(far.sum())} of them over 0.3 apart; standard error at most "
          f"{0.5 / len(gold) ** 0.5:.3f}\n")
    print(markdown(["judge", *COLUMNS.values(), "over 0.3 apart", "averaged"],
                   [[name, *(one["all"][key] for key in COLUMNS),
                     *(one["far"].get(key) for key in ("accuracy", "averaged"))]
                    for name, one in found.items()]))
    write_json(home / "table.json", rounded(found), indent=1)
    return found


if __name__ == "__main__":
    main(measure, Config)
