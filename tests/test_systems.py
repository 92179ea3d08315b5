"""The systems that learn from rankings: SLiC, RRHF, PRO, RSO, IPO and best-of-n.

Their equations are held to what test_equations.py holds the lessons' to, their classic mistakes
are put in place as in test_mutants.py, and each trains for a few steps.
"""
import inspect
import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_equations import INF, NAN, close, gradient, normal, row, spoiled, vector
from test_mutants import Edit, catching, ties_broken_by_index, without_reference
from torch import Tensor

import train_dpo
import train_rm
from common.checkpoint import load_checkpoint, load_gpt, load_reward_model
from common.errors import InputError
from data import batches, readers
from data.batches import Prompt
from data.tinytown import rank
from data.tinytown.gold import gold_score
from data.tokenizer import get_tokenizer
from data.turns import Unusable
from rollout import Response
from systems import best_of_n, pro, rrhf, rso, slic

# -------------------------------------------------------------------- definitions, number by number

def loop_responses(scores: list[float], mask: list[bool]) -> tuple[list[int], list[tuple]]:
    """(places that hold a response, (better, worse) of each pair)."""
    places = [k for k in range(len(scores)) if mask[k]]
    return places, [(i, j) for i in places for j in places if scores[i] > scores[j]]


def loop_best(scores: list[float], places: list[int]) -> int:
    return next(k for k in places if all(scores[k] >= scores[i] for i in places))


def loop_ranking_slic_loss(logprobs, scores, mask, delta, lam):
    per_ranking = []
    for lp, r, m in zip(logprobs.tolist(), scores.tolist(), mask.tolist()):
        places, pairs = loop_responses(r, m)
        if pairs:
            target = lp[loop_best(r, places)]
            losses = [max(0.0, delta - lp[i] + lp[j]) - lam * target for i, j in pairs]
            per_ranking.append(sum(losses) / len(losses))
    return sum(per_ranking) / len(per_ranking) if per_ranking else 0.0


def loop_rrhf_loss(logprobs, lengths, scores, mask):
    rank, sft = [], []
    for lp, n, r, m in zip(*(x.tolist() for x in (logprobs, lengths, scores, mask))):
        places, pairs = loop_responses(r, m)
        rank.append(sum(max(0.0, lp[j] / n[j] - lp[i] / n[i]) for i, j in pairs))
        sft.append(-lp[loop_best(r, places)] if places else 0.0)
    return vector(*rank), vector(*sft)


def loop_pro_loss(logprobs, lengths, scores, mask):
    rank, sft = [], []
    for lp, n, r, m in zip(*(x.tolist() for x in (logprobs, lengths, scores, mask))):
        places, pairs = loop_responses(r, m)
        total = 0.0
        for k in places:
            worse = [j for i, j in pairs if i == k]
            if worse:
                rate = max(r[k] - r[j] for j in worse)
                own = math.exp(lp[k] / n[k] * rate)
                others = sum(math.exp(lp[j] / n[j] * (r[k] - r[j])) for j in worse)
                total -= math.log(own / (own + others))
        rank.append(total)
        sft.append(-lp[loop_best(r, places)] if places else 0.0)
    return vector(*rank), vector(*sft)


def loop_h(policy_chosen, policy_rejected, ref_chosen, ref_rejected):
    return [(a - c) - (b - d) for a, b, c, d in zip(*(x.tolist() for x in (
        policy_chosen, policy_rejected, ref_chosen, ref_rejected)))]


def loop_ipo_loss(h, beta, label_smoothing):
    goal = 1 / (2 * beta)
    return vector(*((1 - label_smoothing) * (x - goal) ** 2 + label_smoothing * (x + goal) ** 2
                    for x in h))


def loop_rejection_sample(scores, count, beta, uniforms):
    """(places taken, how many uniforms that took)."""
    taken, used = [], 0
    while len(taken) < count:
        left = [i for i in range(len(scores)) if i not in taken]
        highest = max(scores[i] for i in left)
        for i in left:
            if len(taken) < count:
                if uniforms[used] < math.exp((scores[i] - highest) / beta):
                    taken.append(i)
                used += 1
    return taken, used


def loop_best_of_n_mean(proxy, values, n):
    """The best of every subset of n; where several are best, the mean of their values."""
    means = []
    for subset in itertools.combinations(range(len(proxy)), n):
        highest = max(proxy[i].item() for i in subset)
        best = [values[i].item() for i in subset if proxy[i] == highest]
        means.append(sum(best) / len(best))
    return sum(means) / len(means)


def rankings(B: int, K: int, ties: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, lengths, scores with ties, and a mask with gaps; (B, K) each.

    Among the rows are some without a pair, and some without a response.
    """
    lengths = torch.randint(1, 6, (B, K))
    return (-lengths * normal(B, K).exp(), lengths, torch.randint(ties, (B, K)).double(),
            torch.rand(B, K) < 0.75)


SHAPES = [(5, K) for K in range(2, 7)]


# ----------------------------------------------------------------------------- the contract

PAIR = "policy_chosen_logprobs policy_rejected_logprobs ref_chosen_logprobs ref_rejected_logprobs"
SIGNATURES = {
    slic: {"slic_loss": "chosen_logprobs rejected_logprobs target_logprobs delta lam",
           "ranking_slic_loss": "logprobs scores mask delta lam"},
    rrhf: {"rrhf_loss": "logprobs lengths scores mask"},
    pro: {"pro_loss": "logprobs lengths scores mask", "plackett_luce_loss": "s rates worse"},
    rso: {"rejection_sample": "scores count beta uniforms", "hinge_loss": f"{PAIR} gamma"},
    train_dpo: {"ipo_loss": f"{PAIR} beta label_smoothing"},
    best_of_n: {"best_of_n_kl": "n", "best_of_n_distribution": "probs rewards n",
                "best_of_n_mean": "proxy values n"},
}


def test_argument_names_are_the_lecture_s():
    for module, functions in SIGNATURES.items():
        for name, expected in functions.items():
            parameters = list(inspect.signature(getattr(module, name)).parameters.values())
            expected = expected.split()
            assert [p.name for p in parameters[:len(expected)]] == expected, name
            assert all(p.default is not p.empty for p in parameters[len(expected):]), name
    defaults = inspect.signature(slic.slic_loss).parameters
    assert (defaults["delta"].default, defaults["lam"].default) == (1.0, 0.5)


# ----------------------------------------------------------------- every loss of (B, K) with a mask

@dataclass(frozen=True)
class Ranked:
    """A loss under test: `call(logprobs, lengths, scores, mask)` returns tensors."""
    call: Callable
    definition: Callable
    per_row: bool        # (B,) each, or a mean over the rankings with a pair


def ipo_on_rankings(logprobs, lengths, scores, mask):
    """The reference is −1 a token."""
    return [train_dpo.ranking_dpo_loss(logprobs, -lengths.double(), scores, mask, 0.3, 0.1,
                                       pair_loss=train_dpo.ipo_loss)[0]]


def loop_ipo_on_rankings(logprobs, lengths, scores, mask):
    per_ranking = []
    for lp, n, r, m in zip(*(x.tolist() for x in (logprobs, lengths, scores, mask))):
        losses = [loop_ipo_loss([lp[i] + n[i] - lp[j] - n[j]], 0.3, 0.1).item()
                  for i, j in loop_responses(r, m)[1]]
        if losses:
            per_ranking.append(sum(losses) / len(losses))
    return [sum(per_ranking) / len(per_ranking) if per_ranking else 0.0]


RANKED = {
    "slic": Ranked(lambda lp, n, r, mask: [slic.ranking_slic_loss(lp, r, mask, 1.0, 0.3)],
                   lambda lp, n, r, mask: [loop_ranking_slic_loss(lp, r, mask, 1.0, 0.3)], False),
    "rrhf": Ranked(lambda *batch: list(rrhf.rrhf_loss(*batch)), loop_rrhf_loss, True),
    "pro": Ranked(lambda *batch: list(pro.pro_loss(*batch)), loop_pro_loss, True),
    "ipo": Ranked(ipo_on_rankings, loop_ipo_on_rankings, False),
}


def check_definition(name: str) -> None:
    torch.manual_seed(0)
    case = RANKED[name]
    for B, K in SHAPES:
        for ties in (2, 4, 20):
            batch = rankings(B, K, ties)
            for mask in (batch[3], torch.ones(B, K).bool()):
                found = case.call(*batch[:3], mask)
                for out, expected in zip(found, case.definition(*batch[:3], mask), strict=True):
                    close(out, torch.as_tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", RANKED)
def test_ranked_losses_equal_their_definitions(name):
    check_definition(name)


@pytest.mark.parametrize("name", RANKED)
def test_ranked_losses_have_the_gradient_of_finite_differences(name):
    torch.manual_seed(1)
    case = RANKED[name]
    for B, K in ((3, 2), (4, 5)):
        logprobs, *rest = rankings(B, K)
        assert torch.autograd.gradcheck(lambda x: tuple(case.call(x, *rest)),
                                        logprobs.requires_grad_())


def check_outside_is_not_read(name: str, *rubbish: float) -> None:
    torch.manual_seed(2)
    case, mask = RANKED[name], torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 0, 0],
                                             [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]]).bool()
    clean = [spoiled(x.double(), mask, 0.0) for x in rankings(5, 5, 1000)[:3]]

    def outputs_and_gradient(logprobs, *rest):
        logprobs = logprobs.clone().requires_grad_()
        outputs = case.call(logprobs, *rest, mask)
        total = sum((out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum()
                    for out in outputs)
        return [*outputs, torch.autograd.grad(total, logprobs)[0]]

    expected = outputs_and_gradient(*clean)
    assert all(x.isfinite().all() and x.abs().max() > 0 for x in expected)
    for which in ([0], [1], [2], [0, 1, 2]):
        dirty = [spoiled(x, mask, *rubbish) if i in which else x for i, x in enumerate(clean)]
        found = outputs_and_gradient(*dirty)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        assert (found[-1][~mask] == 0).all()


@pytest.mark.parametrize("name", RANKED)
def test_nan_and_infinity_outside_the_mask_reach_neither_value_nor_gradient(name):
    check_outside_is_not_read(name, NAN, INF, -INF)


@pytest.mark.parametrize("name", RANKED)
def test_no_number_outside_the_mask_contributes(name):
    check_outside_is_not_read(name, 1e6, -3.0, 7.0)


@pytest.mark.parametrize("name", RANKED)
def test_rankings_without_a_response_give_0_and_no_gradient(name):
    logprobs = torch.full((2, 3), NAN, dtype=torch.float64, requires_grad=True)
    outputs = RANKED[name].call(logprobs, torch.zeros(2, 3), torch.ones(2, 3),
                                torch.zeros(2, 3).bool())
    assert all((out == 0).all() for out in outputs)
    grad, = torch.autograd.grad(sum(out.sum() for out in outputs), logprobs)
    assert (grad == 0).all()


@pytest.mark.parametrize("name", RANKED)
def test_the_order_of_responses_and_the_padding_change_nothing(name):
    torch.manual_seed(3)
    case, (logprobs, lengths, _, mask) = RANKED[name], rankings(4, 5)
    scores = torch.stack([torch.randperm(5) for _ in range(4)]).double()
    batch, order = [logprobs, lengths, scores, mask], torch.randperm(5)
    expected = case.call(*batch)
    for other in ([x[:, order] for x in batch], [F.pad(x, (1, 2)) for x in batch]):
        for out, right in zip(case.call(*other), expected):
            close(out, right)


@pytest.mark.parametrize("name", RANKED)
def test_a_constant_added_to_the_scores_changes_nothing(name):
    torch.manual_seed(4)
    logprobs, lengths, scores, mask = rankings(4, 5)
    for out, right in zip(RANKED[name].call(logprobs, lengths, scores - 64, mask),
                          RANKED[name].call(logprobs, lengths, scores, mask)):
        close(out, right)


@pytest.mark.parametrize("name", RANKED)
def test_each_ranking_counts_by_itself(name):
    """Its row of a (B,) loss is that of the ranking alone; a mean is over rankings with a pair."""
    torch.manual_seed(5)
    case, batch = RANKED[name], rankings(6, 4, ties=2)
    batch[3][4] = False
    alone = [case.call(*(x[b:b + 1] for x in batch)) for b in range(6)]
    if case.per_row:
        for out, parts in zip(case.call(*batch), zip(*alone)):
            assert out.shape == (6,)
            close(out, torch.cat(parts))
    else:
        with_pair = [loop_responses(r, m)[1] != [] for r, m in zip(batch[2].tolist(),
                                                                   batch[3].tolist())]
        assert 0 < sum(with_pair) < 6
        parts = [out for (out,), counts in zip(alone, with_pair) if counts]
        close(case.call(*batch)[0], sum(parts) / len(parts))


@pytest.mark.parametrize("loss", ["rrhf_loss", "pro_loss"])
def test_no_mask_means_that_every_place_is_a_response(loss):
    torch.manual_seed(6)
    function = getattr(rrhf if loss == "rrhf_loss" else pro, loss)
    *batch, mask = rankings(3, 4)
    for out, right in zip(function(*batch), function(*batch, torch.ones(3, 4))):
        assert torch.equal(out, right)
    for dtype in (torch.long, torch.uint8, torch.float32):
        for out, right in zip(function(*batch, mask.to(dtype)), function(*batch, mask)):
            assert torch.equal(out, right)


@pytest.mark.parametrize("name", RANKED)
def test_scores_may_be_integers(name):
    torch.manual_seed(19)
    logprobs, lengths, scores, mask = rankings(4, 5)
    for out, right in zip(RANKED[name].call(logprobs, lengths, scores.long(), mask),
                          RANKED[name].call(logprobs, lengths, scores, mask)):
        close(out, right)


@pytest.mark.parametrize("name", RANKED)
def test_losses_of_very_unlikely_responses_are_finite(name):
    logprobs = torch.tensor([[-1e4, -3e4, -2e4]], requires_grad=True)
    for scores in ([[2.0, 1.0, 0.0]], [[0.0, 1.0, 2.0]]):
        outputs = RANKED[name].call(logprobs, torch.tensor([[1, 2, 3]]), torch.tensor(scores),
                                    torch.ones(1, 3).bool())
        grad, = torch.autograd.grad(sum(out.sum() for out in outputs), logprobs)
        assert all(out.isfinite().all() for out in outputs) and grad.isfinite().all()


# ----------------------------------------------------------------------------- SLiC

def test_slic_loss_by_hand():
    # Gaps w − l of 3, 0.5, 1 and −2 at δ = 1: hinge 0, 0.5, 0 and 3.
    # Targets −2, −4, −6, −8 at λ = ½ add 1, 2, 3, 4.
    chosen, rejected = vector(-2., -4., -6., -8.), vector(-5., -4.5, -7., -6.)
    close(slic.slic_loss(chosen, rejected, chosen), vector(1., 2.5, 3., 7.))
    # δ = 4 gives hinge 1, 3.5, 3, 6; λ = 1/4 of targets −4 adds 1 each; λ = 0 nothing.
    target = torch.full((4,), -4.0, dtype=torch.float64)
    close(slic.slic_loss(chosen, rejected, target, delta=4.0, lam=0.25), vector(2., 4.5, 4., 7.))
    close(slic.slic_loss(chosen, rejected, target, delta=4.0, lam=0.0), vector(1., 3.5, 3., 6.))


def test_a_pair_delta_apart_moves_only_its_target():
    # Gaps 3, 1, 0.5, −2 at δ = 1: the first two are far enough apart.
    chosen, rejected = vector(-2., -4., -4., -8.), vector(-5., -5., -4.5, -6.)
    grads = gradient(lambda *x: slic.slic_loss(*x, delta=1.0, lam=0.3), chosen, rejected, chosen)
    close(grads, (vector(0., 0., -1., -1.), vector(0., 0., 1., 1.), torch.full_like(chosen, -0.3)))


def test_slic_does_not_notice_how_far_the_policy_moves():
    """The hinge knows differences alone: λ is what keeps responses likely."""
    torch.manual_seed(7)
    chosen, rejected = normal(4), normal(4)
    hinge = partial(slic.slic_loss, delta=1.0, lam=0.0)
    close(hinge(chosen - 500, rejected - 500, chosen - 500), hinge(chosen, rejected, chosen))
    close(slic.slic_loss(chosen - 500, rejected - 500, chosen - 500, lam=0.3)
          - slic.slic_loss(chosen, rejected, chosen, lam=0.3), torch.full((4,), 150.0).double())


def test_ranking_slic_loss_by_hand():
    # log π −2, −3, −7; scores 3, 2, 1; δ = 2: pairs (0,1) gap 1: 1; (0,2) gap 5: 0;
    # (1,2) gap 4: 0. Mean 1/3. The target −2 at λ = ½ adds 1: 4/3.
    # Second: scores 1, 5, 5, log π −1, −4, −2: pairs (1,0) gap −3: 5; (2,0) gap −1: 3. Mean 4; the
    # target is the first of the two best, −4, and adds 2: 6.
    # Third: tied, counts for nothing. Mean of the two: (4/3 + 6)/2 = 11/3.
    logprobs = torch.cat([row(-2., -3., -7.), row(-1., -4., -2.), row(-9., -9., -1.)])
    scores = torch.cat([row(3., 2., 1.), row(1., 5., 5.), row(2., 2., 8.)])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]]).bool()
    loss = partial(slic.ranking_slic_loss, scores=scores, mask=mask, delta=2.0, lam=0.5)
    close(loss(logprobs).item(), 11 / 3)
    # Halved over two rankings. First: one pair of three is nearer than δ, and the target has −½.
    # Second: two pairs of two, and the target has −½.
    (grad,) = gradient(loss, logprobs)
    close(grad, torch.cat([row(-1 / 3 - 1 / 2, 1 / 3, 0.), row(1., -1 / 2 - 1 / 2, -1 / 2),
                           row(0., 0., 0.)]) / 2)


def test_slic_of_one_pair_is_slic_of_the_ranking():
    torch.manual_seed(8)
    chosen, rejected = normal(5), normal(5)
    loss = slic.ranking_slic_loss(torch.stack([rejected, chosen], 1), torch.tensor([[0, 1]] * 5),
                                  torch.ones(5, 2).bool(), 0.7, 0.2)
    close(loss, slic.slic_loss(chosen, rejected, chosen, 0.7, 0.2).mean())


# ----------------------------------------------------------------------------- RRHF

def rrhf_row(logprobs, lengths, scores, mask=None):
    return rrhf.rrhf_loss(row(*logprobs), torch.tensor([lengths]), row(*scores),
                          None if mask is None else torch.tensor([mask]))


def test_rrhf_loss_by_hand():
    # p = −4/2, −3/3, −6/2 = −2, −1, −3 in the order of the scores: (0,1) has p_1 − p_0 = 1; (0,2)
    # and (1,2) are in order. The best has log π −4.
    close(rrhf_row((-4., -3., -6.), (2, 3, 2), (3., 2., 1.)), (vector(1.), vector(4.)))
    # p = −6/6, −4/2 = −1, −2: in order, though the sums are not.
    close(rrhf_row((-6., -4.), (6, 2), (1., 0.)), (vector(0.), vector(6.)))
    # p = −1, −4, −3, −2 with scores 1, 5, 5, 3. Pairs (1,0): 3, (2,0): 2, (3,0): 1, (1,3): 2,
    # (2,3): 1. The tie is no pair, and its first is imitated.
    close(rrhf_row((-2., -8., -6., -4.), (2, 2, 2, 2), (1., 5., 5., 3.)),
          (vector(9.), vector(8.)))
    # Without the last place: 3 + 2.
    close(rrhf_row((-2., -8., -6., -4.), (2, 2, 2, 2), (1., 5., 5., 9.), (1, 1, 1, 0)),
          (vector(5.), vector(8.)))
    # One response is no pair, and still the best one.
    close(rrhf_row((-2., -6.), (2, 3), (7., 0.), (0, 1)), (vector(0.), vector(6.)))


def test_rrhf_gradient_by_hand():
    # From above: (1,0), (2,0), (3,0), (1,3), (2,3) out of order, a difference of p's each. −grad
    # raises better responses, and lowers worse ones; all lengths 2.
    logprobs, lengths, scores = (row(-2., -8., -6., -4.), torch.tensor([[2, 2, 2, 2]]),
                                 row(1., 5., 5., 3.))
    (grad,) = gradient(lambda x: rrhf.rrhf_loss(x, lengths, scores)[0], logprobs)
    close(grad, row(3., -2., -2., 1.) / 2)
    (grad,) = gradient(lambda x: rrhf.rrhf_loss(x, lengths, scores)[1], logprobs)
    close(grad, row(0., -1., 0., 0.))


def test_rrhf_compares_means_and_imitates_sums():
    torch.manual_seed(9)
    logprobs, lengths, scores, mask = rankings(4, 5)
    rank, sft = rrhf.rrhf_loss(logprobs, lengths, scores, mask)
    twice = rrhf.rrhf_loss(2 * logprobs, 2 * lengths, scores, mask)
    close(twice, (rank, 2 * sft))
    # Of the scores only the order matters.
    close(rrhf.rrhf_loss(logprobs, lengths, scores ** 3 - 5, mask), (rank, sft))


def minimum(f: Callable[[float], float], low: float, high: float) -> float:
    """Where a convex function is smallest."""
    for _ in range(120):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if f(a) <= f(b) else (a, high)
    return (low + high) / 2


@pytest.mark.parametrize("q", [0.1, 0.25, 0.4])
def test_flipped_labels_pull_rrhf_to_equal_likelihoods_and_slic_to_its_margin(q):
    """A share q of the labels flipped: (1 − q) of the loss with one order, q with the other."""
    def rrhf_at(d):
        right, flipped = (rrhf_row((d - 2., -4.), (1, 2), scores)[0].item()
                          for scores in ((1., 0.), (0., 1.)))
        return (1 - q) * right + q * flipped

    def slic_at(d):
        better, worse = vector(d - 2.), vector(-2.)
        return ((1 - q) * slic.slic_loss(better, worse, worse, 0.8, 0.5)
                + q * slic.slic_loss(worse, better, worse, 0.8, 0.5)).item()

    assert minimum(rrhf_at, -3, 2) == pytest.approx(0, abs=1e-6)
    assert minimum(slic_at, -3, 2) == pytest.approx(0.8, abs=1e-6)


# ----------------------------------------------------------------------------- PRO

def pro_row(s, scores, lengths=None, mask=None):
    """pro_loss of a row with these mean log-probabilities."""
    lengths = torch.tensor([lengths or [1] * len(s)])
    return pro.pro_loss(row(*s) * lengths, lengths, row(*scores),
                        None if mask is None else torch.tensor([mask]))


LN2, LN3 = math.log(2), math.log(3)


def test_pro_loss_by_hand():
    # s = −ln 2, −ln 3, −ln 2 with scores 2, 1, 0.
    # Best of three: rates 1 and 2, its own the larger, 2: ¼ / (¼ + ⅓ + ¼) = 3/10.
    # Best of two: rate 1: ⅓ / (⅓ + ½) = 2/5. −log of the product: ln 25/3.
    # The best response has log π = 2·(−ln 2) over two tokens.
    s, lengths = (-LN2, -LN3, -LN2), [2, 5, 3]
    close(pro_row(s, (2., 1., 0.), lengths), (vector(math.log(25 / 3)), vector(2 * LN2)))
    # The same responses in another order, a fourth place without a response.
    close(pro_row((-LN2, -9., -LN2, -LN3), (0., 9., 2., 1.), [3, 1, 2, 5], (1, 0, 1, 1)),
          (vector(math.log(25 / 3)), vector(2 * LN2)))
    # Two tied best ones, each against the worst alone: ½ / (½ + ½) · ⅓ / (⅓ + ½) = 1/5.
    # The first of them is imitated.
    close(pro_row(s, (1., 1., 0.), lengths), (vector(math.log(5)), vector(2 * LN2)))
    # Two tied worst ones: ½ / (½ + ⅓ + ½) = 3/8, and no factor for them.
    close(pro_row(s, (1., 0., 0.)), (vector(math.log(8 / 3)), vector(LN2)))
    # One response, or none better than another: no factor.
    close(pro_row(s, (4., 4., 4.)), (vector(0.), vector(LN2)))
    close(pro_row(s, (4., 1., 0.), mask=(0, 1, 0)), (vector(0.), vector(LN3)))


def test_pro_of_two_is_bradley_terry_with_the_difference_of_the_scores():
    torch.manual_seed(10)
    logprobs, lengths, scores = normal(6, 2), torch.randint(1, 9, (6, 2)), normal(6, 2)
    s, best = logprobs / lengths, scores.argmax(1)
    difference = (s[:, 0] - s[:, 1]) * (scores[:, 0] - scores[:, 1])
    rank, sft = pro.pro_loss(logprobs, lengths, scores)
    close(rank, -F.logsigmoid(difference))
    close(sft, -logprobs[torch.arange(6), best])


def test_a_factor_of_the_scores_is_a_temperature():
    torch.manual_seed(11)
    logprobs, lengths, scores, mask = rankings(5, 4)
    close(pro.pro_loss(logprobs, lengths, 3 * scores, mask)[0],
          pro.pro_loss(3 * logprobs, lengths, scores, mask)[0])
    # Scores close to each other say nothing: each factor is one among those left.
    rank, _ = pro_row((-1., -7., -2., -4.), (3e-9, 2e-9, 1e-9, 0.))
    close(rank.item(), math.log(4 * 3 * 2), atol=1e-6, rtol=0)


def test_pro_raises_the_best_and_lowers_the_worst():
    torch.manual_seed(12)
    logprobs, lengths = normal(5, 6), torch.randint(1, 5, (5, 6))
    scores = torch.stack([torch.randperm(6) for _ in range(5)]).double()
    (grad,) = gradient(lambda x: pro.pro_loss(x, lengths, scores)[0], logprobs)
    assert (grad[scores == 5] < 0).all() and (grad[scores == 0] > 0).all()
    (grad,) = gradient(lambda x: pro.pro_loss(x, lengths, scores)[1], logprobs)
    assert torch.equal(grad, -(scores == 5).double())


def unit(s: Tensor) -> Tensor:
    """plackett_luce_loss of the order in which s (B, K) stands, rates 1."""
    B, K = s.shape
    return pro.plackett_luce_loss(s, torch.ones(B, K, K, dtype=s.dtype),
                                  torch.ones(K, K).triu(1).bool().expand(B, K, K))


@pytest.mark.parametrize("K", [2, 3, 4, 5, 6])
def test_plackett_luce_over_all_orders_sums_to_1(K):
    torch.manual_seed(13)
    s, orders = normal(K, scale=2), list(itertools.permutations(range(K)))
    probability = (-unit(s[torch.tensor(orders)])).exp()
    close(probability.sum().item(), 1.0)
    # The probability that a response comes first is its softmax.
    first = torch.tensor([order[0] for order in orders])
    close(torch.zeros(K).double().index_add(0, first, probability), s.softmax(0))
    # Written out: the product of its own weight over what is left.
    for order, found in itertools.islice(zip(orders, probability.tolist()), 50):
        left = [math.exp(s[i]) for i in order]
        close(found, math.prod(left[k] / sum(left[k:]) for k in range(K)))


def test_plackett_luce_of_two_is_bradley_terry():
    torch.manual_seed(14)
    s = normal(5, 2, scale=3)
    close(unit(s), -F.logsigmoid(s[:, 0] - s[:, 1]))
    close(unit(row(LN3, 0.)), vector(math.log(4 / 3)))


# ----------------------------------------------------------------------------- IPO and hinge-norm

# log-ratios: chosen −10 − (−12) = 2, rejected −14 − (−13) = −1: h = 3
# and −3 − (−3) = 0, −5 − (−7) = 2: h = −2
PAIRS = vector(-10., -3.), vector(-14., -5.), vector(-12., -3.), vector(-13., -7.)


def test_ipo_loss_by_hand():
    # β = ¼: 1/(2β) = 2. (3 − 2)² = 1 and (−2 − 2)² = 16. Implicit rewards: log-ratios times ¼.
    losses, chosen_rewards, rejected_rewards = train_dpo.ipo_loss(*PAIRS, beta=0.25)
    close(losses, vector(1., 16.))
    close(chosen_rewards, vector(0.5, 0.))
    close(rejected_rewards, vector(-0.25, 0.5))
    # A fifth believed flipped: 0.8·1 + 0.2·(3 + 2)² = 5.8 and 0.8·16 + 0.2·0 = 12.8.
    losses, *_ = train_dpo.ipo_loss(*PAIRS, beta=0.25, label_smoothing=0.2)
    close(losses, vector(5.8, 12.8))
    # ∂L/∂h = 2(h − 2) = 2, −8: beyond the goal the chosen one comes down again.
    grads = gradient(lambda x, y: train_dpo.ipo_loss(x, y, *PAIRS[2:], 0.25)[0], *PAIRS[:2])
    close(grads, (vector(2., -8.), vector(-2., 8.)))


def test_ipo_loss_equals_its_definition():
    torch.manual_seed(15)
    inputs = [normal(7, scale=3) for _ in range(4)]
    for beta in (0.1, 0.5, 2.0):
        for label_smoothing in (0.0, 0.2):
            losses, chosen, rejected = train_dpo.ipo_loss(*inputs, beta, label_smoothing)
            close(losses, loop_ipo_loss(loop_h(*inputs), beta, label_smoothing))
            close(chosen, beta * (inputs[0] - inputs[2]))
            close(rejected, beta * (inputs[1] - inputs[3]))
    assert torch.autograd.gradcheck(lambda *x: train_dpo.ipo_loss(*x, 0.3, 0.1)[0],
                                    [x.requires_grad_() for x in inputs])
    _, *rewards = train_dpo.ipo_loss(*inputs, 0.3)
    assert not any(reward.requires_grad for reward in rewards)


def test_policy_equal_to_reference_starts_at_the_goal_squared():
    chosen, rejected = vector(-50., -3.), vector(-20., -4.)
    losses, *rewards = train_dpo.ipo_loss(chosen, rejected, chosen, rejected, beta=0.1)
    close(losses, vector(25., 25.))
    assert all((reward == 0).all() for reward in rewards)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("q", [0.0, 0.1, 0.25, 0.5])
def test_ipo_s_optimum_is_finite_and_shrinks_with_flipped_labels(q, beta):
    zero = vector(0.)

    def flipped(h):
        """Flipping a label swaps chosen and rejected."""
        right, wrong = vector(h), vector(-h)
        return ((1 - q) * train_dpo.ipo_loss(right, zero, zero, zero, beta)[0]
                + q * train_dpo.ipo_loss(wrong, zero, zero, zero, beta)[0]).item()

    def smoothed(h):
        return train_dpo.ipo_loss(vector(h), zero, zero, zero, beta, label_smoothing=q)[0].item()

    for loss in (flipped, smoothed):
        assert minimum(loss, -20, 20) == pytest.approx((1 - 2 * q) / (2 * beta), abs=1e-5)


def test_hinge_loss_by_hand():
    # h = 3, −2. γ = ¼: 1 − ¾ = ¼, 1 + ½ = 3/2. γ = ½: 1 − 3/2 < 0: 0; 2.
    close(rso.hinge_loss(*PAIRS, gamma=0.25), vector(0.25, 1.5))
    close(rso.hinge_loss(*PAIRS, gamma=0.5), vector(0., 2.))
    same = vector(-50., -3.)
    close(rso.hinge_loss(same, same - 7, same, same - 7, gamma=0.3), vector(1., 1.))


def test_hinge_loss_equals_its_definition():
    torch.manual_seed(16)
    inputs = [normal(20, scale=3) for _ in range(4)]
    for gamma in (0.05, 0.3, 2.0):
        close(rso.hinge_loss(*inputs, gamma),
              vector(*(max(0.0, 1 - gamma * h) for h in loop_h(*inputs))))
    assert torch.autograd.gradcheck(lambda *x: rso.hinge_loss(*x, 0.3),
                                    [x.requires_grad_() for x in inputs])


def test_a_pair_beyond_1_over_gamma_has_no_gradient():
    # γ = ¼: h = 4.5, 4, 3.9, −2 against 1/γ = 4.
    chosen, zero = vector(4.5, 4., 3.9, -2.), torch.zeros(4).double()
    grads = gradient(partial(rso.hinge_loss, gamma=0.25), chosen, zero, zero, zero)
    push = vector(0., 0., 0.25, 0.25)
    close(grads, (-push, push, push, -push))


def test_hinge_norm_returns_what_dpo_does():
    losses, *rewards = rso.hinge_norm(*PAIRS, 0.25, 0.0)
    close(losses, vector(0.25, 1.5))
    _, *right = train_dpo.dpo_loss(*PAIRS, 0.25)
    close(rewards, right)


# ----------------------------------------------------------------------------- rejection sampling

def visits(scores, count, beta, uniforms) -> tuple[list[int], int] | None:
    """(places taken, how many uniforms that took); None if there were too few."""
    left = iter(uniforms)
    try:
        taken = rso.rejection_sample(list(scores), count, beta, left)
    except ValueError:
        return None
    return taken, len(uniforms) - len(list(left))


def test_rejection_sample_by_hand():
    # β = 1/ln 2: r_max − r nats below the best halve the chance that often.
    # Scores 0, 2, 1: first pass, r_max 2: chances ¼, 1, ½.
    beta = 1 / LN2
    assert visits([0., 2., 1.], 1, beta, [0.2, 0.9, 0.4]) == ([0], 1)
    assert visits([0., 2., 1.], 3, beta, [0.2, 0.9, 0.4]) == ([0, 1, 2], 3)
    assert visits([0., 2., 1.], 1, beta, [0.3, 0.9, 0.4]) == ([1], 2)
    # 0 is left over. A second pass over it alone has r_max 0: it is taken whatever u.
    assert visits([0., 2., 1.], 3, beta, [0.3, 0.9, 0.4, 0.99]) == ([1, 2, 0], 4)
    # 0 and 2 are left over: r_max 1: chances ½ and 1. u = 0.4 takes place 0 first.
    assert visits([0., 2., 1.], 3, beta, [0.3, 0.9, 0.6, 0.4, 0.9]) == ([1, 0, 2], 5)
    # u = 0.6 does not: 2 is taken, and a third pass takes 0.
    assert visits([0., 2., 1.], 3, beta, [0.3, 0.9, 0.6, 0.6, 0.9, 0.99]) == ([1, 2, 0], 6)
    # r_max is that of the start of the pass, though place 0 is gone when place 1 is visited.
    assert visits([2., 1.], 2, beta, [0.9, 0.6, 0.9]) == ([0, 1], 3)
    # u < chance: 0 takes what has any, and a chance of ½ is not met by u = ½.
    assert visits([1., 0.], 2, beta, [0.5, 0.5, 0.0]) == ([0, 1], 3)
    assert visits([1., 0.], 2, beta, [0.5, 0.0, 0.0]) == ([0, 1], 2)


def test_rejection_sample_equals_its_definition():
    draw = random.Random(0)
    for trial in range(400):
        N = draw.randint(1, 9)
        # Few values: with ties.
        scores = [draw.choice((0.0, 0.5, 1.0, 3.0, -2.0)) for _ in range(N)]
        count, beta = draw.randint(1, N), draw.choice((0.1, 0.5, 1.0, 5.0))
        uniforms = [draw.random() for _ in range(N * (N + 1) // 2)]
        assert (visits(scores, count, beta, uniforms)
                == loop_rejection_sample(scores, count, beta, uniforms))


def test_beta_towards_0_takes_the_best_in_order_and_towards_infinity_the_first():
    draw = random.Random(1)
    scores = [0.3, -1.0, 2.0, 0.7, 2.5, -3.0]
    uniforms = [draw.random() for _ in range(100)]
    for count in range(1, 7):
        best = sorted(range(6), key=lambda i: -scores[i])
        assert rso.rejection_sample(scores, count, 1e-6, uniforms) == best[:count]
        for beta in (1e9, INF):
            assert rso.rejection_sample(scores, count, beta, uniforms) == list(range(count))
    # u = 0 is below no chance of exp(−10⁶) = 0; equal ones are taken in one pass.
    assert visits([1., 2., 2.], 2, 1e-6, [0.0, 0.9, 0.9]) == ([1, 2], 3)


def test_every_candidate_is_taken_once_equal_ones_too():
    draw = random.Random(2)
    for scores in ([1.0] * 5, [1.0, 0.0, 1.0, 0.0, 1.0]):
        taken = rso.rejection_sample(scores, 5, 0.5, (draw.random() for _ in range(99)))
        assert sorted(taken) == list(range(5))
    # The chances of one do not depend on another of the same score.
    assert visits([0., 0., 1.], 3, 1 / LN2, [0.6, 0.4, 0.9, 0.9]) == ([1, 2, 0], 4)


def test_what_cannot_be_taken_is_an_error():
    with pytest.raises(ValueError):
        rso.rejection_sample([1.0, 2.0], 3, 1.0, [0.5] * 99)
    with pytest.raises(ValueError):
        rso.rejection_sample([], 1, 1.0, [0.5])
    # The second visit finds no uniform.
    with pytest.raises(ValueError):
        rso.rejection_sample([0.0, 9.0], 1, 0.1, [0.5])
    assert rso.rejection_sample([0.0, 9.0], 1, 0.1, [0.5, 0.5]) == [1]


def test_what_is_taken_first_follows_the_optimum():
    """π*(y) ∝ π(y) exp(r(y)/β) over a vocabulary of five responses, exactly.

    A best response that stands last makes r_max the same in every pass. It is not counted where it
    is taken itself.
    """
    generator, draw = torch.Generator().manual_seed(0), random.Random(0)
    probs, rewards = vector(0.4, 0.3, 0.15, 0.1, 0.05), vector(0.0, -0.5, 1.0, 1.0, 1.5)
    beta, trials, N = 0.5, 6000, 40
    optimum = probs * (rewards / beta).exp()
    optimum /= optimum.sum()
    counts = torch.zeros(5).double()
    for pool in torch.multinomial(probs.expand(trials, 5), N, replacement=True,
                                  generator=generator):
        scores = [*rewards[pool].tolist(), 1.5]
        first, = rso.rejection_sample(scores, 1, beta, iter(draw.random, None))
        if first < N:
            counts[pool[first]] += 1
    assert counts.sum() > 0.99 * trials

    def chi_square(expected: Tensor) -> float:
        expected = expected * counts.sum()
        return ((counts - expected).square() / expected).sum().item()

    assert chi_square(optimum) < 18.5            # of 4 degrees of freedom: one in a thousand above
    # Neither the SFT model nor another β.
    assert chi_square(probs) > 1000
    for other in (0.4, 0.65):
        tilted = probs * (rewards / other).exp()
        assert chi_square(tilted / tilted.sum()) > 50


# ----------------------------------------------------------------------------- best of n

def test_best_of_n_kl_by_hand():
    # log 1 − 0 = 0; log 2 − ½; log 4 − ¾ = 0.636294.
    for n, expected in ((1, 0.0), (2, LN2 - 1 / 2), (4, 0.636294)):
        assert best_of_n.best_of_n_kl(n) == pytest.approx(expected, abs=1e-6)


def test_best_of_n_mean_by_hand():
    # By proxy 1, 2, 3, 4 the values are 5, 0, 2, 8. Of the six pairs the second is best in one, the
    # third in two, the fourth in three: (0 + 2·2 + 3·8)/6 = 14/3.
    proxy, values = vector(3., 1., 4., 2.), vector(2., 5., 8., 0.)
    close(best_of_n.best_of_n_mean(proxy, values, 2).item(), 14 / 3)
    # Of the four threes the third is best in one, the fourth in three: (2 + 24)/4.
    close(best_of_n.best_of_n_mean(proxy, values, 3).item(), 6.5)
    close(best_of_n.best_of_n_mean(proxy, values, 1).item(), 15 / 4)
    close(best_of_n.best_of_n_mean(proxy, values, 4).item(), 8.0)
    # Proxies 1, 2, 2 with values 6, 0, 4: pairs of the first with each: 0, 4; the tied pair: 2.
    for order in itertools.permutations(range(3)):
        found = best_of_n.best_of_n_mean(vector(1., 2., 2.)[list(order)],
                                         vector(6., 0., 4.)[list(order)], 2)
        close(found.item(), 2.0)


def test_best_of_n_mean_is_the_mean_over_all_subsets():
    torch.manual_seed(17)
    for N in range(1, 8):
        for proxy in (normal(N), torch.randint(3, (N,)), torch.zeros(N)):
            values = normal(N)
            for n in range(1, N + 1):
                close(best_of_n.best_of_n_mean(proxy, values, n).item(),
                      loop_best_of_n_mean(proxy, values, n))
            close(best_of_n.best_of_n_mean(proxy, values, 1), values.mean())
            close(best_of_n.best_of_n_mean(proxy, values, N), values[proxy == proxy.max()].mean())


def test_best_of_n_mean_is_unbiased():
    """Its mean over all samples of N is the mean under the exact distribution of the best of n."""
    probs, rewards, gold = vector(0.5, 0.3, 0.2), vector(0., 1., 1.), vector(0.2, 0.9, -0.4)
    for n, N in ((1, 3), (2, 2), (2, 4), (3, 5), (4, 5)):
        expected = (best_of_n.best_of_n_distribution(probs, rewards, n) * gold).sum()
        mean = sum(probs[list(draws)].prod()
                   * best_of_n.best_of_n_mean(rewards[list(draws)], gold[list(draws)], n)
                   for draws in itertools.product(range(3), repeat=N))
        close(mean, expected)


def test_best_of_n_mean_of_many_samples():
    """C(64, 32) and beyond are finite; the mean of the best of the best rises with n."""
    torch.manual_seed(18)
    proxy = normal(400)
    means = [best_of_n.best_of_n_mean(proxy, proxy, n).item() for n in (1, 4, 64, 200, 400)]
    assert all(math.isfinite(mean) for mean in means) and means == sorted(means)
    assert means[-1] == pytest.approx(proxy.max().item())


def test_best_of_more_than_there_are_is_an_error():
    with pytest.raises(ValueError):
        best_of_n.best_of_n_mean(vector(1., 2.), vector(1., 2.), 3)


def test_best_of_n_mean_of_many_prompts():
    torch.manual_seed(20)
    proxy, values = torch.randint(3, (2, 4, 6)), normal(2, 4, 6)
    found = best_of_n.best_of_n_mean(proxy, values, 3)
    assert found.shape == (2, 4)
    for i, j in itertools.product(range(2), range(4)):
        close(found[i, j].item(), loop_best_of_n_mean(proxy[i, j], values[i, j], 3))


# ----------------------------------------------------------------- responses that never ended

TOKENIZER = get_tokenizer("tinytown")
ASKED = [{"role": "user", "content": "Where does Ada live?"}]
CUT_ROW = {"messages": ASKED, "responses": [
    {"text": "Ada lives at", "score": 2, "ended": False},
    {"text": "At the mill.", "score": 1, "ended": True},
    {"text": "Ada lives at", "score": 0},
    {"text": "No.", "score": -1, "ended": None},
    {"text": "The mill, the", "score": -2, "ended": False}]}


def read_ranking(row: dict) -> readers.Ranking:
    return readers.converted(readers.ranking, row, "here")[0]


def test_what_never_ended_is_known_and_has_no_end_token():
    ranking = read_ranking(CUT_ROW)
    assert ranking.cut == (0, 4)
    found, = batches.ranking_rows([ranking], TOKENIZER, 99)
    assert found.responses == [
        TOKENIZER.encode(text) + end for text, end in zip(ranking.responses, (
            [], [TOKENIZER.end], [TOKENIZER.end], [TOKENIZER.end], []))]
    # The same text, cut and whole, is two responses: each keeps its score.
    assert found.scores == [2, 1, 0, -1, -2]
    both = [dict(one, ended=False) for one in CUT_ROW["responses"][:3:2]]
    found, = batches.ranking_rows([read_ranking(CUT_ROW | {"responses": both})], TOKENIZER, 99)
    assert found.scores == [2, 2]


def test_rankings_say_nothing_of_an_end_where_all_ended():
    for extra in ({}, {"ended": True}, {"ended": None}):
        ranking = read_ranking({"prompt": "a", "responses": [
            {"text": "b", "score": 1, **extra}, {"text": "c", "score": 0, **extra}]})
        assert ranking == readers.Ranking([{"role": "user", "content": "a"}], ["b", "c"],
                                          [1.0, 0.0])
    assert read_ranking({"prompt": "a", "chosen": "b", "rejected": "c"}).cut == ()


def test_a_best_response_that_never_ended_is_no_demonstration():
    def demonstrated(row):
        try:
            return readers.converted(readers.demonstration, row, "here")[0][-1]["content"]
        except Unusable:
            return None

    assert demonstrated(CUT_ROW) is None
    # Not the best: the best one that ended is whole.
    first, *rest = CUT_ROW["responses"]
    assert demonstrated(CUT_ROW | {"responses": [dict(first, score=0.5), *rest]}) == "At the mill."


def test_dropped_demonstrations_are_counted(tmp_path, capsys):
    whole = CUT_ROW | {"responses": CUT_ROW["responses"][1:]}
    path = tmp_path / "rankings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (CUT_ROW, whole, CUT_ROW)))
    assert [turns[-1]["content"] for turns in readers.read_demonstrations(path)] == ["At the mill."]
    assert capsys.readouterr().err == (
        "rankings.jsonl: dropped 2 of 3 rows: the best response never ended (2)\n")
    # For what they are otherwise all rows serve.
    assert [len(ranking.cut) for ranking in readers.read_rankings(path)] == [2, 1, 2]
    assert readers.read_prompts(path) == [ASKED] * 3


def test_a_line_of_a_ranking_is_read_as_it_was_written():
    responses = [Response([1], "At the", False), Response([1], "The mill.", True)]
    ranking = read_ranking(json.loads(rank.ranking_line(ASKED, responses, [0.25, -1.0])))
    assert ranking == readers.Ranking(ASKED, ["At the", "The mill."], [0.25, -1.0], cut=(0,))


def test_lengths_count_the_tokens_of_a_response_and_its_end():
    rows = batches.ranking_rows([read_ranking(row) for row in (
        CUT_ROW, {"prompt": "Who is Rex?", "responses": ["No.", "I do not know Rex."],
                  "scores": [0, 1]})], TOKENIZER, 99)
    expected = [[len(response) for response in row.responses] for row in rows]
    texts = [ranked["text"] for ranked in CUT_ROW["responses"]]
    assert expected[0] == [len(TOKENIZER.encode(text)) + end
                           for text, end in zip(texts, (0, 1, 1, 1, 0))]
    for row_length, several in ((1, True), (30, True), (batches.PACKED, False)):
        with mock.patch.object(batches, "PACKED", row_length):
            batch = batches.ranking_batch(rows, TOKENIZER.pad)
        assert (len(batch.tokens) > len(rows)) == several
        assert batch.lengths.tolist() == [expected[0], expected[1] + [0, 0, 0]]
    alone = batches.ranking_batch([batches.RankingRow([5], [[7], [6] * 300], [1.0, 0.0])], 0)
    assert alone.lengths.tolist() == [[1, 300]]


# ----------------------------------------------------------------------------- rankings made anew

def test_given_responses_are_ranked_anew(town, tmp_path):
    before = readers.read_rankings(town / "rank/rankings.jsonl")
    found = []
    for seed in (1, 2):
        final = rank.collect(rank.Config(
            data=(str(town / "rank/rankings.jsonl"),), init=str(town / "sft"), given=True,
            clean=True, out=str(tmp_path / str(seed)), seed=seed))
        after = readers.read_rankings(tmp_path / str(seed) / "rankings.jsonl")
        assert any(ranking.cut for ranking in before)
        for old, new in zip(before, after, strict=True):
            assert (new.messages, new.responses, new.cut) == (old.messages, old.responses, old.cut)
        assert final["rankings"] == len(before)
        assert final["responses"] == sum(len(ranking.responses) for ranking in before)
        assert final["pairs"] == sum(a > b for ranking in after for a in ranking.scores
                                     for b in ranking.scores)
        for ranking in readers.read_rankings(tmp_path / str(seed) / "clean.jsonl"):
            true = [gold_score(ranking.messages, text, i not in ranking.cut)
                    for i, text in enumerate(ranking.responses)]
            assert ranking.scores == pytest.approx(true, abs=1e-4)
        found.append([ranking.scores for ranking in after])
    assert found[0] != found[1]


def test_a_reward_model_ranks(town, tmp_path):
    rank.collect(rank.Config(
        data=(str(town / "rank/rankings.jsonl"),), init=str(town / "sft"), given=True,
        reward=str(town / "rm"), out=str(tmp_path)))
    assert not (tmp_path / "clean.jsonl").exists()
    after = readers.read_rankings(tmp_path / "rankings.jsonl")
    model, tokenizer = load_reward_model(str(town / "rm"))
    rows = batches.ranking_rows(after, tokenizer, 96)
    assert len(rows) == len(after)
    with torch.no_grad():
        rewards = train_rm.ranking_rewards(model.eval(), batches.ranking_batch(rows, tokenizer.pad))
    for ranking, expected in zip(after, rewards.tolist()):
        expected = [-3.0 if i in ranking.cut else expected[i] for i in range(len(ranking.scores))]
        assert ranking.scores == pytest.approx(expected, abs=1e-3)


def test_new_responses_have_k_between_the_limits(town, tmp_path):
    rank.collect(rank.Config(
        data=(str(town / "data/rank_val.jsonl"),), init=str(town / "sft"), least=3, most=5,
        temperature=0.5, max_new_tokens=8, out=str(tmp_path)))
    found = readers.read_rankings(tmp_path / "rankings.jsonl")
    sizes = [len(ranking.responses) for ranking in found]
    assert len(sizes) == 6 and set(sizes) <= {3, 4, 5} and len(set(sizes)) > 1


def test_flags_of_rankings_out_of_range_are_refused(town, tmp_path):
    good = dict(data=(str(town / "data/rank_val.jsonl"),), init=str(town / "sft"),
                out=str(tmp_path))
    for field, value in (("temperature", 0.0), ("temperature", 11.0), ("flip", 0.6), ("least", 1),
                         ("most", 3)):
        with pytest.raises(InputError, match=f"--{field}"):
            rank.collect(rank.Config(**good | {field: value}))
    # Prompts without responses are no rankings.
    with pytest.raises(InputError, match="expected a ranking"):
        rank.collect(rank.Config(**good, given=True))
    assert not list(tmp_path.iterdir())


def a_pool(scores: list[list[float]]) -> rso.Pool:
    responses = [[Response([k], f"answer {k}", k != 1) for k in range(len(row))] for row in scores]
    return rso.Pool([Prompt(ASKED, [])] * len(scores), responses, torch.tensor(scores))


def test_rankings_of_rso_hold_what_was_taken(tmp_path):
    pool = a_pool([[0.5, -1.0, 2.0, 1.0], [4.0, 3.0, 2.0, 0.0]])
    config = rso.Config(taken=2)

    def taken(beta):
        path = rso.write_rankings(pool, config, beta, tmp_path / "pairs.jsonl")
        return [(ranking.responses, ranking.scores, ranking.cut)
                for ranking in readers.read_rankings(path)]

    # β = ∞: the first two, one of which never ended; β → 0: the two best.
    assert taken(INF) == [(["answer 0", "answer 1"], [0.5, -1.0], (1,)),
                          (["answer 0", "answer 1"], [4.0, 3.0], (1,))]
    assert taken(1e-6) == [(["answer 2", "answer 3"], [2.0, 1.0], ()),
                           (["answer 0", "answer 1"], [4.0, 3.0], (1,))]


@pytest.mark.parametrize("text", ["", " \n", "<|endoftext|>", " <|endoftext|>\n"])
def test_a_line_of_a_ranking_holds_no_empty_text(text):
    """A sample may end at once, or be nothing but what the readers leave out."""
    responses = [Response([1], text, True), Response([1], "At the mill.", True)]
    ranking = read_ranking(json.loads(rank.ranking_line(ASKED, responses, [1.0, 0.5])))
    assert ranking.scores == [1.0, 0.5] and ranking.responses[0].strip()


@pytest.mark.parametrize("scores", [[[1.0, 1.0, 1.0]], [[-3.0, -3.0, 1.0]], [[-3.0, -3.0, -3.0]]])
@pytest.mark.parametrize("beta", [1.0, INF])
def test_rso_ends_where_scores_have_no_spread(tmp_path, monkeypatch, scores, beta):
    """All equal, or no two that ended: there is no standard deviation to measure β in."""
    right = rso.rejection_sample
    monkeypatch.setattr(rso, "rejection_sample", lambda scores, count, beta, uniforms: right(
        scores, count, beta, itertools.islice(uniforms, 1000)))
    path = rso.write_rankings(a_pool(scores), rso.Config(taken=2), beta, tmp_path / "pairs.jsonl")
    assert len(readers.read_rankings(path)) == 1


# ----------------------------------------------------------------------------- training

def town_rankings(town: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log π of every response alone behind its prompt, lengths, scores, mask) of the fixture's
    rankings and SFT model, (B, K) each."""
    gpt, tokenizer = load_gpt(str(town / "sft"))
    rows = batches.read_untied((str(town / "rank/rankings.jsonl"),), tokenizer, 96)
    K = max(len(row.responses) for row in rows)
    found = torch.zeros(4, len(rows), K, dtype=torch.float64)
    for b, ranked in enumerate(rows):
        tokens, mask, _ = batches.pad_rows([batches.response_row(ranked.prompt, response)
                                            for response in ranked.responses], tokenizer.pad)
        k = len(ranked.responses)
        with torch.no_grad():
            found[0, b, :k] = gpt.eval().logprobs(tokens, mask)[0].sum(-1)
        found[1, b, :k] = torch.tensor([len(response) for response in ranked.responses])
        found[2, b, :k], found[3, b, :k] = torch.tensor(ranked.scores), 1
    return found[0], found[1], found[2], found[3].bool()


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def moved(folder: Path, town: Path) -> bool:
    states = [load_checkpoint(place, "language model")[0] for place in (folder, town / "sft")]
    return any(not torch.equal(states[0][name], states[1][name]) for name in states[1])


SHARED = dict(batch_size=32, lr=3e-3, warmup=1, dtype="float32")


@pytest.mark.parametrize("system", [slic, rrhf, pro], ids=["slic", "rrhf", "pro"])
def test_training_starts_at_the_loss_s_definition_and_lowers_it(town, tmp_path, system):
    logprobs, lengths, scores, mask = town_rankings(town)
    if system is slic:
        first = {"loss": loop_ranking_slic_loss(logprobs, scores, mask, 1.0, 0.3)}
    else:
        loop = loop_rrhf_loss if system is rrhf else loop_pro_loss
        means = [loss.mean().item() for loss in loop(logprobs, lengths, scores, mask)]
        first = dict(zip(("rank_loss", "sft_loss"), means))
    # All rankings in one step, at once and in passes of seven.
    norms = []
    for micro in (0, 7):
        out = tmp_path / str(micro)
        final = system.train(system.Config(
            data=(str(town / "rank/rankings.jsonl"),), init=str(town / "sft"), out=str(out),
            micro_batch=micro, epochs=4 if micro == 0 else 1, **SHARED))
        rows = log_of(out)
        assert {name: rows[0][name] for name in first} == pytest.approx(first, rel=1e-3)
        assert final.keys() > first.keys() and math.isfinite(final["seconds"])
        norms.append(rows[0]["grad_norm"])
        if micro == 0:
            coefs = {"loss": 1.0, "rank_loss": 1.0, "sft_loss": getattr(
                system.Config(), "sft_coef", 0.0)}
            losses = [sum(coefs[name] * each[name] for name in first) for each in rows]
            assert len(losses) == 4 and losses[-1] < 0.95 * losses[0]
            assert moved(out, town)
    assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.parametrize("pair_loss, beta, start", [(train_dpo.ipo_loss, 0.25, 4.0),
                                                    (rso.hinge_norm, 0.3, 1.0)],
                         ids=["ipo", "hinge_norm"])
def test_pairs_are_trained_on_with_another_loss(town, tmp_path, pair_loss, beta, start):
    """(0 − 1/(2β))² = 4 with β = ¼, and max(0, 1 − 0): where policy and reference are the same."""
    config = train_dpo.Config(
        data=(str(town / "rank/rankings.jsonl"),), val=str(town / "rank/rankings.jsonl"),
        init=str(town / "sft"), out=str(tmp_path), beta=beta, epochs=8, **SHARED | {"lr": 3e-4})
    final = train_dpo.train(config, pair_loss)
    rows = log_of(tmp_path)
    assert rows[0]["loss"] == pytest.approx(start, abs=1e-3)
    assert rows[0]["margin"] == pytest.approx(0, abs=1e-3) and rows[-1]["margin"] > 0.01
    # Held out is what it was trained on: of IPO, not the log 2 of DPO.
    assert rows[-1]["loss"] < 0.95 * start and final["loss"] < 0.95 * start
    assert moved(tmp_path, town)


def test_rso_makes_pairs_and_fits_them(town, tmp_path):
    config = rso.Config(run=str(town), out=str(tmp_path), prompts=8, samples=8, taken=3,
                        max_new_tokens=16, missing_end_score=-9.0)
    assert set(rso.rso(config)) == {"sft_sampled", "rso_sigmoid", "rso_hinge"}
    sampled, accepted = (readers.read_rankings(tmp_path / f"{name}_pairs.jsonl")
                         for name in ("sft", "rso"))
    assert [len(ranking.responses) for ranking in sampled + accepted] == [3] * 16
    means = [sum(sum(ranking.scores) for ranking in each) for each in (sampled, accepted)]
    assert means[1] > means[0]
    assert all(moved(tmp_path / name, town) for name in ("sft_sampled", "rso_sigmoid", "rso_hinge"))


# ----------------------------------------------------------------------------- mutants

DEFINITION = {name: partial(check_definition, name) for name in RANKED}
NAN_LEAKS = test_nan_and_infinity_outside_the_mask_reach_neither_value_nor_gradient
OUTSIDE = test_no_number_outside_the_mask_contributes
ALONE = test_each_ranking_counts_by_itself


def without_lengths(right: Callable) -> Callable:
    return lambda logprobs, lengths, scores, mask=None: right(
        logprobs, torch.ones_like(lengths), scores, mask)


def imitates_the_mean(right: Callable) -> Callable:
    def loss(logprobs, lengths, scores, mask=None):
        return right(logprobs, lengths, scores, mask)[0], right(
            logprobs / lengths, lengths, scores, mask)[1]
    return loss


def hinge_without_reference(chosen, rejected, ref_chosen, ref_rejected, gamma,
                            right=rso.hinge_loss):
    return right(chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(chosen), gamma)


def best_of_the_first_n(proxy, values, n):
    return values[..., :n].gather(-1, proxy[..., :n].argmax(-1, keepdim=True))[..., 0]


def with_replacement(proxy, values, n):
    """(i/N)ⁿ − ((i − 1)/N)ⁿ: the best of n draws from the samples, each put back."""
    N = proxy.shape[-1]
    share = (torch.arange(N + 1, dtype=torch.float64) / N) ** n
    return (values.double().gather(-1, proxy.argsort(-1)) * share.diff()).sum(-1)


def tied_proxies_by_place(proxy, values, n):
    N = proxy.shape[-1]
    weights = vector(*(math.comb(i - 1, n - 1) / math.comb(N, n) for i in range(1, N + 1)))
    order = proxy.argsort(dim=-1, stable=True)
    return (values.double().gather(-1, order) * weights).sum(-1)


def best_by_value(proxy, values, n, right=best_of_n.best_of_n_mean):
    return right(values, values, n)


# (where, name, what is wrong, the wrong function or edit, the tests that catch it)
MUTANTS = [
    # slic.py
    (slic, "slic_loss", "sign of the gap flipped",
     Edit("delta - chosen_logprobs + rejected_logprobs",
          "delta + chosen_logprobs - rejected_logprobs"),
     test_slic_loss_by_hand, test_a_pair_delta_apart_moves_only_its_target,
     test_ranking_slic_loss_by_hand),
    (slic, "slic_loss", "λ forgotten", Edit("- lam * target_logprobs", "- target_logprobs"),
     test_slic_loss_by_hand, test_a_pair_delta_apart_moves_only_its_target, DEFINITION["slic"]),
    (slic, "slic_loss", "target made unlikely", Edit("- lam *", "+ lam *"),
     test_slic_loss_by_hand, test_a_pair_delta_apart_moves_only_its_target),
    (slic, "slic_loss", "δ forgotten", Edit("delta - chosen_logprobs", "-chosen_logprobs"),
     test_slic_loss_by_hand, test_ranking_slic_loss_by_hand),
    (slic, "slic_loss", "gap without hinge",
     Edit("return hinge", "return delta - chosen_logprobs + rejected_logprobs"),
     test_slic_loss_by_hand, test_a_pair_delta_apart_moves_only_its_target),
    (slic, "slic_loss", "target inside the hinge",
     Edit("return hinge - lam * target_logprobs",
          "return (delta - chosen_logprobs + rejected_logprobs - lam * target_logprobs)"
          ".clamp(min=0)"),
     test_slic_loss_by_hand, test_a_pair_delta_apart_moves_only_its_target),
    (slic, "ranking_slic_loss", "all pairs weighted equally over rankings of different K",
     Edit("1 / prompt.bincount()[prompt].to(losses.dtype)", "torch.ones_like(losses)"),
     test_ranking_slic_loss_by_hand, DEFINITION["slic"], partial(ALONE, "slic")),
    (slic, "ranking_slic_loss", "sum over rankings", Edit(" / weight.sum().clamp(min=1)", ""),
     test_ranking_slic_loss_by_hand, partial(ALONE, "slic")),
    (slic, "ranking_slic_loss", "rankings without a pair counted in the mean",
     Edit("weight.sum().clamp(min=1)", "len(scores)"),
     test_ranking_slic_loss_by_hand, partial(ALONE, "slic")),
    (slic, "ranking_slic_loss", "worst response as the target",
     Edit("best = ", "best = scores.masked_fill(~mask.bool(), torch.inf).argmin(1) if True else "),
     test_ranking_slic_loss_by_hand, DEFINITION["slic"]),
    (slic, "ranking_slic_loss", "last of several best as the target",
     Edit("best = ", "best = scores.shape[1] - 1 - torch.where(mask, scores, -torch.inf).flip(1)"
                     ".argmax(1) if True else "),
     test_ranking_slic_loss_by_hand, DEFINITION["slic"]),
    (slic, "ranking_slic_loss", "padding as the target",
     Edit("best = ", "best = scores.argmax(1) if True else "),
     DEFINITION["slic"], partial(OUTSIDE, "slic")),
    (slic, "ranking_slic_loss", "each pair's chosen response as the target",
     Edit("logprobs[prompt, best[prompt]]", "logprobs[prompt, chosen]"),
     test_ranking_slic_loss_by_hand, DEFINITION["slic"]),
    (slic, "better_pairs", "ties broken by index", ties_broken_by_index,
     test_ranking_slic_loss_by_hand, DEFINITION["slic"]),

    # rrhf.py
    (rrhf, "rrhf_loss", "sums compared instead of means", without_lengths(rrhf.rrhf_loss),
     test_rrhf_loss_by_hand, test_rrhf_compares_means_and_imitates_sums, DEFINITION["rrhf"]),
    (rrhf, "rrhf_loss", "sign flipped",
     Edit("p[:, None, :] - p[:, :, None]", "p[:, :, None] - p[:, None, :]"),
     test_rrhf_loss_by_hand, test_rrhf_gradient_by_hand),
    (rrhf, "rrhf_loss", "mean over pairs", Edit(".sum((1, 2))", ".mean((1, 2))"),
     test_rrhf_loss_by_hand, test_rrhf_gradient_by_hand,
     partial(test_the_order_of_responses_and_the_padding_change_nothing, "rrhf")),
    (rrhf, "rrhf_loss", "gap without hinge", Edit("gaps.clamp(min=0)", "gaps"),
     test_rrhf_loss_by_hand,
     partial(test_flipped_labels_pull_rrhf_to_equal_likelihoods_and_slic_to_its_margin, 0.1)),
    (rrhf, "rrhf_loss", "with a margin", Edit("gaps.clamp(min=0)", "(gaps + 1).clamp(min=0)"),
     test_rrhf_loss_by_hand,
     partial(test_flipped_labels_pull_rrhf_to_equal_likelihoods_and_slic_to_its_margin, 0.1)),
    (rrhf, "rrhf_loss", "mean of the best response imitated", imitates_the_mean(rrhf.rrhf_loss),
     test_rrhf_loss_by_hand, test_rrhf_compares_means_and_imitates_sums),
    (rrhf, "rrhf_loss", "best response made unlikely", Edit("return rank, -", "return rank, "),
     test_rrhf_loss_by_hand, test_rrhf_gradient_by_hand),
    (rrhf, "rrhf_loss", "most likely response imitated",
     Edit("best = ", "best = p.argmax(1, keepdim=True) if True else "),
     test_rrhf_loss_by_hand, test_rrhf_gradient_by_hand),
    (rrhf, "rrhf_loss", "padding imitated",
     Edit("best = ", "best = scores.argmax(1, keepdim=True) if True else "),
     test_rrhf_loss_by_hand, partial(OUTSIDE, "rrhf")),
    (rrhf, "rrhf_loss", "multiply instead of where",
     Edit("torch.where(mask, logprobs, 0.0)", "mask * logprobs"), partial(NAN_LEAKS, "rrhf")),
    (rrhf, "better_pairs", "ties broken by index", ties_broken_by_index,
     test_rrhf_loss_by_hand, DEFINITION["rrhf"]),

    # pro.py
    (pro, "pro_loss", "taken for sorted",
     Edit("better_pairs(scores, mask)",
          "better_pairs(-torch.arange(scores.shape[1]).expand(scores.shape), mask)"),
     test_pro_loss_by_hand, test_pro_raises_the_best_and_lowers_the_worst, DEFINITION["pro"]),
    (pro, "pro_loss", "worst first",
     Edit("better_pairs(scores, mask)", "better_pairs(-scores, mask)"),
     test_pro_loss_by_hand, test_pro_raises_the_best_and_lowers_the_worst, DEFINITION["pro"]),
    (pro, "pro_loss", "padding compared",
     Edit("better_pairs(scores, mask)", "better_pairs(scores, torch.ones_like(mask))"),
     test_pro_loss_by_hand, partial(OUTSIDE, "pro")),
    (pro, "pro_loss", "no temperatures",
     Edit("scores[:, :, None] - scores[:, None, :], 0.0", "1.0, 0.0"),
     test_pro_loss_by_hand, test_a_factor_of_the_scores_is_a_temperature),
    (pro, "pro_loss", "sums compared instead of means", without_lengths(pro.pro_loss),
     test_pro_loss_by_hand, DEFINITION["pro"]),
    (pro, "pro_loss", "mean of the best response imitated", imitates_the_mean(pro.pro_loss),
     test_pro_loss_by_hand, DEFINITION["pro"]),
    (pro, "pro_loss", "best response made unlikely", Edit("return rank, -", "return rank, "),
     test_pro_loss_by_hand, test_pro_raises_the_best_and_lowers_the_worst),
    (pro, "pro_loss", "multiply instead of where",
     Edit("torch.where(mask, logprobs, 0.0)", "mask * logprobs"), partial(NAN_LEAKS, "pro")),
    (pro, "plackett_luce_loss", "sign flipped",
     Edit("left.logsumexp(2) - own * s", "own * s - left.logsumexp(2)"),
     test_pro_loss_by_hand, partial(test_plackett_luce_over_all_orders_sums_to_1, 3)),
    (pro, "plackett_luce_loss", "the best left out of the sum",
     Edit("torch.cat([(own * s)[:, :, None], rivals], dim=2)", "rivals"),
     test_plackett_luce_of_two_is_bradley_terry, test_pro_loss_by_hand),
    (pro, "plackett_luce_loss", "smallest difference for its own temperature",
     Edit("torch.where(worse, rates, 0.0).amax(2)",
          "torch.where(worse, rates, 1e9).amin(2) * worse.any(2)"),
     test_pro_loss_by_hand, DEFINITION["pro"]),
    (pro, "plackett_luce_loss", "only the first factor", Edit(".sum(1)", "[:, 0]"),
     test_pro_loss_by_hand, partial(test_plackett_luce_over_all_orders_sums_to_1, 3)),
    (pro, "plackett_luce_loss", "mean of the factors", Edit(".sum(1)", ".mean(1)"),
     test_pro_loss_by_hand, partial(test_plackett_luce_over_all_orders_sums_to_1, 3)),
    (pro, "plackett_luce_loss", "everything always left",
     Edit("masked_fill(~worse, -torch.inf)", "masked_fill(~worse & (rates == 0), -torch.inf)"),
     partial(test_plackett_luce_over_all_orders_sums_to_1, 3)),
    (pro, "plackett_luce_loss", "exp before the maximum is taken out",
     Edit("left.logsumexp(2)", "left.exp().sum(2).log()"),
     partial(test_losses_of_very_unlikely_responses_are_finite, "pro")),

    # train_dpo.py: IPO
    (train_dpo, "ipo_loss", "goal of 1/β", Edit("1 / (2 * beta)", "1 / beta"),
     test_ipo_loss_by_hand, test_policy_equal_to_reference_starts_at_the_goal_squared,
     partial(test_ipo_s_optimum_is_finite_and_shrinks_with_flipped_labels, 0.1, 0.5)),
    (train_dpo, "ipo_loss", "goal of β/2", Edit("1 / (2 * beta)", "beta / 2"),
     test_ipo_loss_by_hand,
     partial(test_ipo_s_optimum_is_finite_and_shrinks_with_flipped_labels, 0.1, 0.1)),
    (train_dpo, "ipo_loss", "β times h",
     Edit("(logits_diff - target)", "(beta * logits_diff - target)"),
     test_ipo_loss_by_hand,
     partial(test_ipo_s_optimum_is_finite_and_shrinks_with_flipped_labels, 0.1, 0.1)),
    (train_dpo, "ipo_loss", "sign flipped",
     Edit("chosen_logratios - rejected_logratios", "rejected_logratios - chosen_logratios"),
     test_ipo_loss_by_hand,
     partial(test_ipo_s_optimum_is_finite_and_shrinks_with_flipped_labels, 0.1, 0.1)),
    (train_dpo, "ipo_loss", "smoothing without effect",
     Edit("logits_diff + target", "logits_diff - target"),
     test_ipo_loss_by_hand, test_ipo_loss_equals_its_definition,
     partial(test_ipo_s_optimum_is_finite_and_shrinks_with_flipped_labels, 0.1, 0.1)),
    (train_dpo, "ipo_loss", "reference forgotten",
     partial(without_reference, right=train_dpo.ipo_loss),
     test_ipo_loss_by_hand, test_policy_equal_to_reference_starts_at_the_goal_squared),
    (train_dpo, "ipo_loss", "no gradient beyond the goal, as with a hinge",
     Edit("(logits_diff - target)", "(logits_diff - target).clamp(max=0)"),
     test_ipo_loss_by_hand, test_ipo_loss_equals_its_definition),
    (train_dpo, "ipo_loss", "rewards not detached",
     Edit("chosen_logratios.detach()", "chosen_logratios"),
     test_ipo_loss_equals_its_definition),
    (train_dpo, "ranking_dpo_loss", "the other loss forgotten",
     Edit("rewards = pair_loss(", "rewards = dpo_loss("), DEFINITION["ipo"]),

    # rso.py
    (rso, "hinge_loss", "reference forgotten", hinge_without_reference,
     test_hinge_loss_by_hand, test_hinge_loss_equals_its_definition),
    (rso, "hinge_loss", "sign flipped",
     Edit("return ", "return (1 + gamma * logits_diff).clamp(min=0) if True else "),
     test_hinge_loss_by_hand, test_a_pair_beyond_1_over_gamma_has_no_gradient),
    (rso, "hinge_loss", "γ forgotten",
     Edit("return ", "return (1 - logits_diff).clamp(min=0) if True else "),
     test_hinge_loss_by_hand, test_a_pair_beyond_1_over_gamma_has_no_gradient),
    (rso, "hinge_loss", "γ outside the hinge",
     Edit("return ", "return gamma * (1 - logits_diff).clamp(min=0) if True else "),
     test_hinge_loss_by_hand, test_a_pair_beyond_1_over_gamma_has_no_gradient),
    (rso, "hinge_loss", "no hinge",
     Edit("return ", "return 1 - gamma * logits_diff if True else "),
     test_hinge_loss_by_hand, test_a_pair_beyond_1_over_gamma_has_no_gradient),
    (rso, "rejection_sample", "maximum over all instead of what is left",
     Edit("max(scores[i] for i in left)", "max(scores)"),
     test_rejection_sample_by_hand, test_rejection_sample_equals_its_definition),
    (rso, "rejection_sample", "maximum taken anew at each visit",
     Edit("(scores[i] - highest)", "(scores[i] - max(scores[j] for j in left))"),
     test_rejection_sample_by_hand, test_rejection_sample_equals_its_definition),
    (rso, "rejection_sample", "one uniform a pass",
     Edit("for i in list(left):\n            u = next(following, None)",
          "u = next(following, None)\n        for i in list(left):"),
     test_rejection_sample_by_hand, test_rejection_sample_equals_its_definition),
    (rso, "rejection_sample", "u ≤ the chance", Edit("u < ", "u <= "),
     test_rejection_sample_by_hand),
    (rso, "rejection_sample", "times β", Edit("/ beta", "* beta"),
     test_rejection_sample_by_hand, test_what_is_taken_first_follows_the_optimum),
    (rso, "rejection_sample", "β forgotten", Edit(" / beta", ""),
     test_rejection_sample_by_hand, test_what_is_taken_first_follows_the_optimum),
    (rso, "rejection_sample", "equal scores taken for one response",
     Edit("taken.append(i)", "taken.append(scores.index(scores[i]))"),
     test_every_candidate_is_taken_once_equal_ones_too,
     test_rejection_sample_equals_its_definition),
    (rso, "rejection_sample", "visited from the best on",
     Edit("in list(left)", "in sorted(left, key=lambda i: -scores[i])"),
     test_rejection_sample_by_hand, test_what_is_taken_first_follows_the_optimum),
    (rso, "rejection_sample", "the pass goes on when there are enough",
     Edit("if len(taken) == count:", "if False:"),
     test_beta_towards_0_takes_the_best_in_order_and_towards_infinity_the_first),
    (rso, "rejection_sample", "what was taken stays", Edit("left.remove(i)", "pass"),
     test_beta_towards_0_takes_the_best_in_order_and_towards_infinity_the_first),

    # best_of_n.py
    (best_of_n, "best_of_n_kl", "without the 1 − 1/n", lambda n: math.log(n),
     test_best_of_n_kl_by_hand),
    (best_of_n, "best_of_n_distribution", "best of n + 1",
     lambda probs, rewards, n, right=best_of_n.best_of_n_distribution: right(probs, rewards, n + 1),
     test_best_of_n_mean_is_unbiased),
    (best_of_n, "best_of_n_mean", "best of the first n", best_of_the_first_n,
     test_best_of_n_mean_by_hand, test_best_of_n_mean_is_the_mean_over_all_subsets),
    (best_of_n, "best_of_n_mean", "draws put back", with_replacement,
     test_best_of_n_mean_by_hand, test_best_of_n_mean_is_the_mean_over_all_subsets,
     test_best_of_n_mean_is_unbiased),
    (best_of_n, "best_of_n_mean", "tied proxies by place", tied_proxies_by_place,
     test_best_of_n_mean_by_hand, test_best_of_n_mean_is_the_mean_over_all_subsets),
    (best_of_n, "best_of_n_mean", "best by value", best_by_value,
     test_best_of_n_mean_by_hand, test_best_of_n_mean_is_the_mean_over_all_subsets,
     test_best_of_n_mean_is_unbiased),

    # data/
    (batches.RankingBatch, "lengths", "end token not counted",
     property(lambda batch: batch.sums((~batch.ends).float())),
     test_lengths_count_the_tokens_of_a_response_and_its_end),
    (batches.RankingBatch, "lengths", "the prompt's last token counted",
     property(lambda batch: batch.sums(torch.ones(batch.tokens.shape)) + batch.mask),
     test_lengths_count_the_tokens_of_a_response_and_its_end),
    (batches, "ranking_rows", "an end token for what never ended",
     Edit("[tokenizer.end] * (i not in ranking.cut)", "[tokenizer.end]"),
     test_what_never_ended_is_known_and_has_no_end_token,
     test_lengths_count_the_tokens_of_a_response_and_its_end),
    (readers, "ranked_responses", "no end not read", Edit("tuple(cut)", "()"),
     test_what_never_ended_is_known_and_has_no_end_token,
     test_a_best_response_that_never_ended_is_no_demonstration,
     test_a_line_of_a_ranking_is_read_as_it_was_written),
    (readers, "demonstration", "a cut response shown as whole",
     Edit("best in ranked.cut", "False"),
     test_a_best_response_that_never_ended_is_no_demonstration),
    (rank, "ranking_line", "what never ended written as whole",
     Edit('"ended": response.ended', '"ended": True'),
     test_a_line_of_a_ranking_is_read_as_it_was_written),
]


test_a_classic_wrong_answer_is_caught = catching(MUTANTS)


def test_every_equation_has_a_mutant():
    mutated = {name for _, name, *_ in MUTANTS}
    assert mutated >= {name for functions in SIGNATURES.values() for name in functions}
