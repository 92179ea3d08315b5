"""What a right answer has to give: numbers worked by hand, and properties on drawn inputs.

HAND holds for every exercise small cases with their results, in the order in which a student should
meet them; the arithmetic stands in the label. PROPERTIES draws cases whose label says what a
plausible wrong answer gets wrong; the right functions give their results. All numbers are float64.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor

NAN, INF, LOG2, LOG3 = math.nan, math.inf, math.log(2), math.log(3)


class Case(NamedTuple):
    """One call: file, function, arguments; those with a gradient; the result, if known by hand."""
    label: str
    file: str
    name: str
    args: tuple
    grad: tuple[int, ...] = ()
    expected: object = None      # a nested list or number; None: what the right function gives
    tiny: bool = False           # compare numbers near 0 relatively, too
    raises: bool = False         # an error is the right answer

    @property
    def module(self) -> str:
        return self.file.removesuffix(".py").replace("/", ".")


def t(*numbers) -> Tensor:
    """A float64 tensor."""
    return torch.tensor(numbers, dtype=torch.float64)


def b(*bits) -> Tensor:
    """A mask."""
    return torch.tensor(bits).bool()


def normal(draw: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, dtype=torch.float64, generator=draw)


def ragged(draw: torch.Generator, rows: int, columns: int) -> Tensor:
    """A response mask: in every row one stretch of at least one token, anywhere."""
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for row in mask:
        start = int(torch.randint(columns, (), generator=draw))
        row[start:start + 1 + int(torch.randint(columns - start, (), generator=draw))] = True
    return mask


def spoiled(x: Tensor, mask: Tensor) -> Tensor:
    """x with NaN and infinities at the places outside the mask."""
    x, outside = x.clone(), ~mask.bool()
    x[outside] = t(NAN, INF, -INF).repeat(int(outside.sum()))[:int(outside.sum())]
    return x


# ----------------------------------------------------------------------------- 1: shift and mask

def conversation() -> tuple[list[dict], list]:
    """A conversation of two rounds and what `render` makes of it, put together by hand."""
    from data.tokenizer import Tokenizer
    tokenizer, ids, mask = Tokenizer("tinytown"), [], []
    messages = [{"role": role, "content": text} for role, text in (
        ("user", "Where does Ada live?"), ("assistant", "In the red house."),
        ("user", "Thanks."), ("assistant", "Of course."))]
    for message in messages:
        text = [*tokenizer.encode(message["content"]), tokenizer.end]
        ids += [tokenizer.role_ids[message["role"]], *text]
        mask += [False] + [message["role"] == "assistant"] * len(text)
    return messages, [ids, mask]


def shift_by_hand() -> list[Case]:
    messages, rendered = conversation()
    return [
        Case("the place before each 1", "model.py", "before",
             (b([0, 1, 1, 0], [0, 0, 0, 1]),), expected=[[1, 1, 0, 0], [0, 0, 1, 0]]),
        Case("prompt 0, response 1", "data/batches.py", "response_row", ([5, 6], [7, 3]),
             expected=[[5, 6, 7, 3], [0, 0, 1, 1]]),
        Case("the assistant's text and its end token, nothing else", "data/tokenizer.py",
             "Tokenizer.render", (messages,), expected=rendered)]


def shift_properties(draw) -> list[Case]:
    messages, _ = conversation()
    return [
        Case("nothing stands before the first token", "model.py", "before",
             (b([1, 1, 0], [1, 0, 0]),)),
        Case("every row by itself", "model.py", "before", (ragged(draw, 7, 9),)),
        Case("a response of one token", "data/batches.py", "response_row", ([4, 5, 6], [3])),
        Case("a conversation that ends with a question", "data/tokenizer.py", "Tokenizer.render",
             (messages[:3],))]


# ----------------------------------------------------------------------------- 2, 4: means

RAGGED, KEPT = t([1, 2, 9], [3, 9, 9]), b([1, 1, 0], [1, 0, 0])


def mean_by_hand() -> list[Case]:
    return [Case("(1 + 2 + 3)/3, three tokens in two rows", "kernels.py", "masked_mean",
                 (RAGGED, KEPT), (0,), 2.0)]


def sft_by_hand() -> list[Case]:
    return [Case("log-probabilities −1, −2, −3, in two rows: (1 + 2 + 3)/3", "train_sft.py",
                 "sft_loss", (-RAGGED, KEPT), (0,), 2.0)]


def mean_properties_of(file: str, name: str, draw) -> list[Case]:
    x, mask = normal(draw, 5, 7), ragged(draw, 5, 7)
    empty = mask.clone()
    empty[2] = False
    return [
        Case("padding is not read: NaN and infinity there reach neither value nor gradient", file,
             name, (spoiled(x, mask), mask), (0,)),
        Case("a row without a token is as if it were not there", file, name, (x, empty), (0,)),
        Case("no token at all gives 0, not NaN", file, name, (x, torch.zeros_like(mask)), (0,)),
        Case("a mask of the numbers 0 and 1", file, name, (x, mask.double()), (0,)),
        Case("long rows weigh more than short ones", file, name,
             (normal(draw, 3, 17), ragged(draw, 3, 17)), (0,))]


def mean_properties(draw) -> list[Case]:
    return mean_properties_of("kernels.py", "masked_mean", draw)


def sft_properties(draw) -> list[Case]:
    return mean_properties_of("train_sft.py", "sft_loss", draw)


# ----------------------------------------------------------------------------- 3: token_logprobs

def logprobs_by_hand() -> list[Case]:
    def case(label, temperature, expected):
        # Two words, logits (log 3, 0): probabilities (3/4, 1/4).
        return Case(label, "kernels.py", "token_logprobs_reference",
                    (t([LOG3], [LOG3]), t([1.0], [0.0]), torch.tensor([0, 1]), temperature),
                    (0, 1), expected)
    p, q = 3 / 4, 1 / 4
    entropy = -p * math.log(p) - q * math.log(q)
    warm = math.sqrt(3) / (1 + math.sqrt(3))
    flat = -warm * math.log(warm) - (1 - warm) * math.log(1 - warm)
    return [
        case("logits (log 3, 0): log 3/4 and log 1/4; entropy ¾ log 4/3 + ¼ log 4", 1.0,
             [[math.log(p), math.log(q)], [entropy, entropy]]),
        case("at temperature 2 the logits are halved: √3 : 1", 2.0,
             [[math.log(warm), math.log(1 - warm)], [flat, flat]])]


def logprobs_properties(draw) -> list[Case]:
    file, name = "kernels.py", "token_logprobs_reference"
    targets = torch.randint(11, (2, 3), generator=draw)
    hidden, weight = normal(draw, 2, 3, 5), normal(draw, 11, 5)
    return [
        Case("any leading shape, both gradients", file, name, (hidden, weight, targets, 1.0),
             (0, 1)),
        Case("the temperature divides logits, before they are normalised", file, name,
             (hidden, weight, targets, 0.7), (0, 1)),
        Case("logits of a thousand do not overflow", file, name,
             (200 * hidden, weight, targets, 1.0))]


# ----------------------------------------------------------------------------- 5: the reward model

def ranking_by_hand() -> list[Case]:
    def pair(label, chosen, rejected, margin, expected):
        return Case(label, "train_rm.py", "pairwise_loss", (t(chosen), t(rejected), margin),
                    (0, 1), [expected])

    def ranking(label, rewards, scores, expected, mask=None):
        mask = torch.ones(len(rewards), len(rewards[0])).bool() if mask is None else mask
        return Case(label, "train_rm.py", "ranking_loss", (t(*rewards), t(*scores), mask), (0,),
                    expected)
    win = math.log(4 / 3)                                # −log σ(log 3)
    return [
        pair("equal rewards: log 2", 1.0, 1.0, 0.0, LOG2),
        pair("ahead by log 3: −log ¾", 1 + LOG3, 1.0, 0.0, win),
        pair("ahead by 1 + log 3, of which a margin of 1 is due: −log ¾", 2 + LOG3, 1.0, 1.0, win),
        Case("who was ranked above whom", "train_rm.py", "better_pairs",
             (t([3, 1, 1]), b([1, 1, 1])), expected=[[[0, 1, 1], [0, 0, 0], [0, 0, 0]]]),
        ranking("three pairs: (−log ¾ − log ¾ + log 2)/3", [[LOG3, 0, 0]], [[3, 2, 1]],
                (2 * win + LOG2) / 3),
        ranking("a tie is no pair: (log 2 − log ¾)/2", [[0, LOG3, 0]], [[1, 1, 0]],
                (LOG2 + win) / 2),
        ranking("three pairs of log 2 beside one of −log ¾ weigh the same", [[0, 0, 0],
                                                                            [LOG3, 0, 0]],
                [[3, 2, 1], [2, 1, 0]], (LOG2 + win) / 2, b([1, 1, 1], [1, 1, 0]))]


def ranking_properties(draw) -> list[Case]:
    file = "train_rm.py"
    rewards, scores = normal(draw, 4, 5), torch.randint(-2, 3, (4, 5), generator=draw).double()
    mask = torch.arange(5) < torch.tensor([5, 4, 3, 2])[:, None]
    tied = scores.clone()
    tied[1] = 1.0
    far = t(1000.0, -1000.0, 0.0)
    return [
        Case("differences of a thousand do not overflow", file, "pairwise_loss",
             (far, -far, 0.0), (0, 1)),
        Case("shapes that broadcast, a margin of each", file, "pairwise_loss",
             (normal(draw, 3, 1), normal(draw, 1, 4), normal(draw, 3, 1).abs()), (0, 1)),
        Case("a constant added to both changes nothing", file, "pairwise_loss",
             (normal(draw, 6) + 50, normal(draw, 6) + 50, 0.0), (0, 1)),
        Case("higher is better, ties and padding are no pair, 0 is a score", file, "better_pairs",
             (scores, mask)),
        Case("all have one score: no pair", file, "better_pairs",
             (torch.zeros(2, 3), mask[:2, :3])),
        Case("unequal K, ties", file, "ranking_loss", (rewards, scores, mask), (0,)),
        Case("padding is not read: NaN and infinity there reach neither value nor gradient", file,
             "ranking_loss", (spoiled(rewards, mask), spoiled(scores, mask), mask), (0,)),
        Case("a prompt without a pair is left out of the mean", file, "ranking_loss",
             (rewards, tied, mask), (0,)),
        Case("no pair at all gives 0", file, "ranking_loss",
             (rewards, torch.zeros(4, 5).double(), mask), (0,)),
        Case("K = 9 beside K = 2", file, "ranking_loss",
             (normal(draw, 2, 9), normal(draw, 2, 9),
              torch.arange(9) < torch.tensor([9, 2])[:, None]), (0,)),
        Case("one response has nothing to be compared with: a ValueError", file, "ranking_loss",
             (t([1.0]), t([1.0]), b([1])), raises=True)]


# ----------------------------------------------------------------------------- 6, 7: KL and rewards

def kl_by_hand() -> list[Case]:
    def case(label, logprob, ref, expected):
        return Case(label, "train_ppo.py", "kl_estimates", (t([logprob]), t([ref])), (0,),
                    [[[one]] for one in expected])
    return [
        case("twice as likely: log 2, (log 2)²/2, ½ − 1 + log 2", LOG2 - 3, -3.0,
             (LOG2, LOG2 ** 2 / 2, LOG2 - 0.5)),
        case("half as likely: k1 is negative; k3 = 2 − 1 − log 2 is not", -LOG2 - 3, -3.0,
             (-LOG2, LOG2 ** 2 / 2, 1 - LOG2))]


def kl_properties(draw) -> list[Case]:
    file, name = "train_ppo.py", "kl_estimates"
    return [
        Case("the same policy: 0, and no gradient of k2 and k3", file, name,
             (t([-1.0, -2.0]), t([-1.0, -2.0])), (0,)),
        Case("any shape, both gradients", file, name, (normal(draw, 3, 4), normal(draw, 3, 4)),
             (0, 1)),
        Case("k3 of nearly equal policies is tiny, and not rounding: expm1", file, name,
             (t([-1.0, -2.0, -3.0]), t([-1.0 - 1e-7, -2.0 + 3e-8, -3.0 + 1e-6])), tiny=True)]


def rewards_by_hand() -> list[Case]:
    return [Case("−0.1 · (½, −1), and the score of 2 on the last token", "train_ppo.py",
                 "kl_penalized_rewards",
                 (t(2.0), t([-5, -1, -2, -7]), t([-6, -1.5, -1, -9]), b([0, 1, 1, 0]), 0.1), (),
                 [[0, -0.05, 2.1, 0]])]


def rewards_properties(draw) -> list[Case]:
    file, name = "train_ppo.py", "kl_penalized_rewards"
    mask, scores = ragged(draw, 5, 8), normal(draw, 5)
    logprobs, ref = normal(draw, 5, 8), normal(draw, 5, 8)
    none = mask.clone()
    none[1] = False
    return [
        Case("responses of unequal length, anywhere in the row", file, name,
             (scores, logprobs, ref, mask, 0.3)),
        Case("prompt and padding are not read", file, name,
             (scores, spoiled(logprobs, mask), spoiled(ref, mask), mask, 0.3)),
        Case("a score of 0 is a score", file, name,
             (torch.zeros(5).double(), logprobs, ref, mask, 0.3)),
        Case("β = 0: the score alone", file, name, (scores, logprobs, ref, mask, 0.0)),
        Case("a row without a response token: a ValueError", file, name,
             (scores, logprobs, ref, none, 0.3), raises=True)]


# ----------------------------------------------------------------------------- 8, 9: advantages

def gae_by_hand() -> list[Case]:
    def case(label, gamma, lam, advantages):
        values = [0.5, 0.5, 0.5]
        return Case(label, "train_ppo.py", "gae",
                    (t([0, 0, 1]), t(values), b([1, 1, 1]), gamma, lam), (),
                    [[advantages], [[a + v for a, v in zip(advantages, values)]]])
    return [
        case("γ = 1, λ = ½: δ = 0, 0, ½", 1.0, 0.5, [0.125, 0.25, 0.5]),
        case("γ = 0.9, λ = ½: δ = −0.05, −0.05, ½", 0.9, 0.5, [0.02875, 0.175, 0.5])]


def gae_properties(draw) -> list[Case]:
    file, name = "train_ppo.py", "gae"
    mask = ragged(draw, 6, 9)
    mask[0] = b(0, 0, 1, 1, 1, 1, 0, 0, 0)
    rewards, values = normal(draw, 6, 9), normal(draw, 6, 9)
    return [
        Case("the value after the last token is 0, whatever stands there; the prompt gets none",
             file, name, (rewards, values, mask, 1.0, 0.95)),
        Case("prompt and padding are not read", file, name,
             (spoiled(rewards, mask), spoiled(values, mask), mask, 0.97, 0.95)),
        Case("λ = 1: all rewards to come, less the value", file, name,
             (rewards, values, mask, 0.9, 1.0)),
        Case("λ = 0: one step", file, name, (rewards, values, mask, 0.9, 0.0)),
        Case("γ below 1", file, name, (rewards, values, mask, 0.5, 0.7))]


def whiten_by_hand() -> list[Case]:
    s = math.sqrt(3 / 2)                                 # 1/√(2/3)
    args = (t([1, 2, 9], [3, 9, 9]), KEPT)
    return [
        Case("1, 2, 3: mean 2, variance ⅔", "train_ppo.py", "whiten", (*args, True), (),
             [[-s, 0, 0], [s, 0, 0]]),
        Case("the same with its mean kept", "train_ppo.py", "whiten", (*args, False), (),
             [[2 - s, 2, 0], [2 + s, 0, 0]])]


def whiten_properties(draw) -> list[Case]:
    file, name = "train_ppo.py", "whiten"
    x, mask = normal(draw, 4, 6, scale=3.0) + 2, ragged(draw, 4, 6)
    return [
        Case("padding is not read: NaN and infinity there reach neither value nor gradient", file,
             name, (spoiled(x, mask), mask, True), (0,)),
        Case("the same, mean kept", file, name, (spoiled(x, mask), mask, False), (0,)),
        Case("one mean and one variance for all rows", file, name, (x, mask, True)),
        Case("all equal: 0, not NaN", file, name, (torch.ones(2, 3).double(), KEPT, True)),
        Case("all equal, mean kept", file, name, (torch.ones(2, 3).double(), KEPT, False))]


# ----------------------------------------------------------------------------- 10, 11: PPO's losses

def policy_by_hand() -> list[Case]:
    def case(label, ratio, advantage, expected):
        return Case(label, "train_ppo.py", "policy_loss",
                    (t([math.log(ratio) - 1]), t([-1.0]), t([advantage]), b([1]), 0.2), (0,),
                    expected)
    return [
        case("ρ = 1.5, A = 1: clipped to 1.2", 1.5, 1.0, -1.2),
        case("ρ = 0.5, A = 1: moved the wrong way, not clipped", 0.5, 1.0, -0.5),
        case("ρ = 0.5, A = −1: clipped to 0.8", 0.5, -1.0, 0.8),
        case("ρ = 1.5, A = −1: moved the wrong way, not clipped", 1.5, -1.0, 1.5),
        case("ρ = 1: −A, and its gradient is not 0", 1.0, 2.0, -2.0)]


def policy_properties(draw) -> list[Case]:
    file, name = "train_ppo.py", "policy_loss"
    mask, old = ragged(draw, 5, 7), normal(draw, 5, 7) - 2
    new, advantages = old + normal(draw, 5, 7, scale=0.4), normal(draw, 5, 7)
    return [
        Case("a mean over response tokens, with its gradient", file, name,
             (new, old, advantages, mask, 0.2), (0,)),
        Case("padding is not read: NaN and infinity there reach neither value nor gradient", file,
             name, (spoiled(new, mask), spoiled(old, mask), spoiled(advantages, mask), mask, 0.2),
             (0,)),
        Case("another clip range", file, name, (new, old, advantages, mask, 0.05), (0,)),
        Case("the first pass, ρ ≡ 1", file, name, (old, old, advantages, mask, 0.2), (0,))]


def value_by_hand() -> list[Case]:
    def case(label, value, old, target, expected):
        return Case(label, "train_ppo.py", "value_loss",
                    (t([value]), t([old]), t([target]), b([1]), 0.2), (0,), expected)
    return [
        case("0.9 from 0.5, return 1: clipped to 0.7, 0.3² counts, not 0.1²", 0.9, 0.5,
             1.0, 0.045),
        case("0.6 from 0.5, return 1: not clipped, ½ · 0.4²", 0.6, 0.5, 1.0, 0.08),
        case("0.1 from 0.5, return 1: the wrong way, 0.9² counts", 0.1, 0.5, 1.0, 0.405)]


def value_properties(draw) -> list[Case]:
    file, name = "train_ppo.py", "value_loss"
    mask, old = ragged(draw, 5, 7), normal(draw, 5, 7)
    new, returns = old + normal(draw, 5, 7, scale=0.4), normal(draw, 5, 7)
    return [
        Case("a mean over response tokens, with its gradient", file, name,
             (new, old, returns, mask, 0.2), (0,)),
        Case("padding is not read: NaN and infinity there reach neither value nor gradient", file,
             name, (spoiled(new, mask), spoiled(old, mask), spoiled(returns, mask), mask, 0.2),
             (0,)),
        Case("no clipping at all in a wide range", file, name, (new, old, returns, mask, 100.0),
             (0,))]


# ----------------------------------------------------------------------------- 12 to 14

def dpo_by_hand() -> list[Case]:
    def case(label, policy, ref, beta, smoothing, expected):
        return Case(label, "train_dpo.py", "dpo_loss",
                    (*(t(one) for one in (*policy, *ref)), beta, smoothing), (0, 1),
                    [[one] for one in expected])
    loss = math.log(1 + math.exp(-1))                   # −log σ(1)
    return [
        case("policy = reference: log 2, and a gradient", (-3.0, -4.0), (-3.0, -4.0), 0.5, 0.0,
             (LOG2, 0, 0)),
        case("h = ½ + ½, β = 1: −log σ(1)", (-1.0, -2.0), (-1.5, -1.5), 1.0, 0.0,
             (loss, 0.5, -0.5)),
        case("h = 5 + 5, β = 0.1: the same", (-5.0, -15.0), (-10.0, -10.0), 0.1, 0.0,
             (loss, 0.5, -0.5)),
        case("ε = ¼: ¾ · −log σ(1) + ¼ · −log σ(−1)", (-1.0, -2.0), (-1.5, -1.5), 1.0, 0.25,
             (0.75 * loss + 0.25 * (1 + loss), 0.5, -0.5))]


def dpo_properties(draw) -> list[Case]:
    file, name = "train_dpo.py", "dpo_loss"
    four = [normal(draw, 6, scale=3.0) - 20 for _ in range(4)]
    far = [t(0.0, -20_000.0), t(-20_000.0, 0.0), t(-9000.0, -9000.0), t(-9000.0, -9000.0)]
    return [
        Case("the reference counts; the rewards carry no gradient", file, name, (*four, 0.2, 0.0),
             (0, 1)),
        Case("label smoothing", file, name, (*four, 0.2, 0.1), (0, 1)),
        Case("differences of thousands do not overflow", file, name, (*far, 1.0, 0.0), (0, 1)),
        Case("β → 0 gives log 2 whatever the policy", file, name, (*four, 1e-9, 0.0), (0, 1))]


def best_by_hand() -> list[Case]:
    file = "systems/best_of_n.py"
    return [
        Case("the best of one is a sample: 0", file, "best_of_n_kl", (1,), expected=0.0),
        Case("log 4 − ¾", file, "best_of_n_kl", (4,), expected=math.log(4) - 0.75),
        Case("the worse of two coins is kept only if both show it: ¼, ¾", file,
             "best_of_n_distribution", (t(0.5, 0.5), t(0, 1), 2), expected=[0.25, 0.75])]


def best_properties(draw) -> list[Case]:
    file, name = "systems/best_of_n.py", "best_of_n_distribution"
    probs = normal(draw, 6).softmax(0)
    return [
        Case("many draws", file, "best_of_n_kl", (256,)),
        Case("any distribution", file, name, (probs, normal(draw, 6), 5)),
        Case("equal rewards share in proportion to p", file, name, (probs, t(1, 0, 1, 2, 0, 2), 3)),
        Case("the best of one is p", file, name, (probs, t(5, 1, 2, 3, 4, 0), 1))]


def win_by_hand() -> list[Case]:
    return [
        Case("one win, one loss: ½ ± √½/√2", "rollout.py", "win_rate",
             (t(1.0, 0.0), t([0.0], [1.0])), expected=[0.5, 0.5]),
        Case("a win, a tie: (1 + ½)/2, ± √⅛/√2", "rollout.py", "win_rate",
             (t(1.0, 1.0), t([0.0], [1.0])), expected=[0.75, 0.25])]


def win_properties(draw) -> list[Case]:
    scores = torch.randint(3, (40,), generator=draw).double()
    baseline = torch.randint(3, (40, 4), generator=draw).double()
    return [
        Case("the error is over prompts, not over comparisons", "rollout.py", "win_rate",
             (scores, baseline)),
        Case("ties alone: ½ ± 0", "rollout.py", "win_rate",
             (torch.ones(5).double(), torch.ones(5, 2).double()))]


HAND = {1: shift_by_hand, 2: mean_by_hand, 3: logprobs_by_hand, 4: sft_by_hand, 5: ranking_by_hand,
        6: kl_by_hand, 7: rewards_by_hand, 8: gae_by_hand, 9: whiten_by_hand, 10: policy_by_hand,
        11: value_by_hand, 12: dpo_by_hand, 13: best_by_hand, 14: win_by_hand}
PROPERTIES = {1: shift_properties, 2: mean_properties, 3: logprobs_properties, 4: sft_properties,
              5: ranking_properties, 6: kl_properties, 7: rewards_properties, 8: gae_properties,
              9: whiten_properties, 10: policy_properties, 11: value_properties,
              12: dpo_properties, 13: best_properties, 14: win_properties}
