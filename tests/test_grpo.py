"""GRPO: group advantages and the loss by hand, by loops and by their properties; where a whole run
ends; its classic mistakes."""
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_closed_form import ToyTokenizer, distance, optimum, sequence_probs, toy_policy
from test_closed_form import reward as toy_reward
from test_equations import INF, NAN, close, gradient, normal, row, spoiled, stretches, vector
from test_mutants import Edit, check_caught
from torch import Tensor

import evaluate
from common import run as door
from common.checkpoint import load_gpt
from common.errors import InputError
from data.tinytown.gold import gold_score
from systems import grpo

# -------------------------------------------------------------------- definitions, number by number

def loop_group_advantages(scores, group):
    advantages = []
    for start in range(0, len(scores), group):
        r = scores[start:start + group].tolist()
        mean = sum(r) / group
        std = math.sqrt(sum((x - mean) ** 2 for x in r) / (group - 1))
        advantages += [(x - mean) / (std + 1e-4) for x in r]
    return vector(*advantages)


def loop_grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, cliprange, beta):
    of_responses = []
    for lp, old, ref, advantage, m in zip(*(x.tolist() for x in (
            logprobs, old_logprobs, ref_logprobs, advantages, mask))):
        losses = []
        for t in range(len(lp)):
            if m[t]:
                ratio = math.exp(lp[t] - old[t])
                clipped = min(max(ratio, 1 - cliprange), 1 + cliprange)
                k3 = math.exp(ref[t] - lp[t]) - 1 - (ref[t] - lp[t])
                losses.append(-min(ratio * advantage, clipped * advantage) + beta * k3)
        if losses:
            of_responses.append(sum(losses) / len(losses))
    return sum(of_responses) / len(of_responses) if of_responses else 0.0


# -------------------------------------------------------------------- group_advantages

def test_group_advantages_by_hand():
    # Group 1, 3: mean 2, deviations −1, 1, std √(2/1) = √2: ∓1/(√2 + 1e-4). Group 0, 10: ∓5/√50.
    # The whole's mean, 3.5, is nowhere.
    small, large = 1 / (math.sqrt(2) + 1e-4), 5 / (math.sqrt(50) + 1e-4)
    close(grpo.group_advantages(vector(1, 3, 0, 10), 2), vector(-small, small, -large, large))
    # 0, 0, 0, 8: mean 2, squares 4 + 4 + 4 + 36 = 48, std √(48/3) = 4: −½, −½, −½, 3/2.
    found = grpo.group_advantages(vector(0, 0, 0, 8), 4)
    close(found * 4.0001 / 4, vector(-0.5, -0.5, -0.5, 1.5))


@pytest.mark.parametrize("prompts, group", [(1, 2), (3, 2), (2, 5), (4, 8)])
def test_group_advantages_are_those_of_the_loop(prompts, group):
    torch.manual_seed(0)
    scores = normal(prompts * group, scale=3.0)
    close(grpo.group_advantages(scores, group), loop_group_advantages(scores, group))


@pytest.mark.parametrize("score", [0.1, -3.0, 17.3, 1e4 / 3, 0.0])
def test_equal_scores_give_exactly_nothing(score):
    """In fp32, where the mean of equal numbers may be rounded to another one."""
    for group in (3, 7, 8, 10):
        scores = torch.full((2 * group,), score)
        scores[:group] = torch.arange(group)
        found = grpo.group_advantages(scores, group)
        assert torch.equal(found[group:], torch.zeros(group)) and found[:group].abs().min() >= 0
        assert found[:group].std() > 0.9


def test_neither_a_prompt_s_level_nor_its_scale_matters():
    """Each group may have its own: prompts are not compared. Up to 1e-4, which is small here."""
    torch.manual_seed(0)
    scores = normal(3, 4, scale=5.0)
    expected = grpo.group_advantages(scores.flatten(), 4)
    shifted = scores + vector(7, -100, 0.5)[:, None]
    scaled = scores * vector(3, 0.7, 20)[:, None]
    close(grpo.group_advantages(shifted.flatten(), 4), expected, atol=1e-10)
    close(grpo.group_advantages(scaled.flatten(), 4), expected, atol=1e-3, rtol=0)
    close(grpo.group_advantages(-scores.flatten(), 4), -expected)
    by_group = expected.view(3, 4)
    close(by_group.mean(1), vector(0, 0, 0), atol=1e-12)
    close(by_group.std(1), vector(1, 1, 1), atol=1e-3, rtol=0)


def test_one_terrible_response_has_a_bounded_advantage():
    """(group − 1)/√group, however far below the others it is, and they have little left."""
    scores = torch.tensor([-1e6, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    found = grpo.group_advantages(scores, 8)
    assert found[0].item() == pytest.approx(-7 / math.sqrt(8), abs=1e-5)
    assert found[1:].tolist() == pytest.approx([1 / math.sqrt(8)] * 7, abs=1e-5)


# -------------------------------------------------------------------- grpo_loss

def test_grpo_loss_by_hand():
    # Two responses, of one and of two tokens, ε 0.2, β 0.5; A = 2 and −1.
    # Row 1: ρ = 1.5, clipped to 1.2: −min(3, 2.4) = −2.4. π_ref = π/2: k3 = ½ − 1 + log 2 = 0.1931…
    #        −2.4 + 0.5·0.19315 = −2.30343
    # Row 2: ρ = 1.5: −min(−1.5, −1.2) = 1.5, not clipped, as it moved the wrong way;
    #        ρ = 0.5: −min(−0.5, −0.8) = 0.8, clipped. π_ref = 3π: k3 = 3 − 1 − log 3 = 0.90139;
    #        0 where they are equal: (1.5 + 0.8 + 0.5·0.90139)/2 = 1.37535
    # Mean: (−2.30343 + 1.37535)/2. Over all tokens it would be (−2.30343 + 2.75069)/3 = 0.149.
    log = math.log
    logprobs = torch.stack([vector(0, -1, 0), vector(-1, -2, 0)])
    old = torch.stack([vector(0, -1 - log(1.5), 0), vector(-1 - log(1.5), -2 - log(0.5), 0)])
    ref = torch.stack([vector(0, -1 - log(2), 0), vector(-1 + log(3), -2, 0)])
    mask = torch.tensor([[0, 1, 0], [1, 1, 0]])
    found = grpo.grpo_loss(logprobs, old, ref, vector(2, -1), mask, 0.2, 0.5)
    one = -2.4 + 0.5 * (log(2) - 0.5)
    two = (1.5 + 0.8 + 0.5 * (2 - log(3))) / 2
    close(found, torch.tensor((one + two) / 2, dtype=torch.float64))
    assert found.item() == pytest.approx(-0.46404, abs=1e-5)


def some_batch(B: int, T: int, scale: float = 0.3):
    """logprobs, old_logprobs, ref_logprobs, advantages, mask: ratios well beyond the clip."""
    torch.manual_seed(10 * B + T)
    logprobs = -normal(B, T).abs()
    mask = stretches(B, T)
    return (logprobs, logprobs + normal(B, T, scale=scale), logprobs + normal(B, T), normal(B),
            mask)


@pytest.mark.parametrize("B, T", [(1, 1), (2, 3), (5, 7), (3, 17)])
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_grpo_loss_is_that_of_the_loop(B, T, beta):
    batch = some_batch(B, T)
    found = grpo.grpo_loss(*batch, 0.2, beta)
    assert found.item() == pytest.approx(loop_grpo_loss(*batch, 0.2, beta), rel=1e-10, abs=1e-12)
    batch = [*batch[:4], batch[4].float()]      # a mask of numbers
    close(grpo.grpo_loss(*batch, 0.2, beta), found)


def test_grpo_loss_has_the_slope_of_its_finite_differences():
    logprobs, *others = some_batch(3, 5)
    slope, = gradient(lambda x: grpo.grpo_loss(x, *others, 0.2, 0.7), logprobs)
    for b, t in itertools.product(range(3), range(5)):
        step = torch.zeros_like(logprobs)
        step[b, t] = 1e-6
        ahead, behind = (grpo.grpo_loss(logprobs + x, *others, 0.2, 0.7) for x in (step, -step))
        assert slope[b, t].item() == pytest.approx(((ahead - behind) / 2e-6).item(), abs=1e-7)


def test_at_the_policy_that_sampled_it_is_reinforce_with_the_group_as_baseline():
    """ρ = 1, β = 0: the gradient of −mean_i A_i · mean_t log π(a_t), while the loss is −mean A."""
    logprobs, _, ref, _, mask = some_batch(6, 7)
    advantages = grpo.group_advantages(normal(6), 3)

    def reinforce(logprobs):
        sums = torch.where(mask, logprobs, 0.0).sum(1)
        return -(advantages * sums / mask.sum(1)).mean()

    old = logprobs.clone()
    found = gradient(lambda x: grpo.grpo_loss(x, old, ref, advantages, mask, 0.2, 0.0), logprobs)
    close(found, gradient(reinforce, logprobs))
    assert found[0].abs().max() > 0.01
    close(grpo.grpo_loss(logprobs, old, ref, advantages, mask, 0.2, 0.0), -advantages.mean())


def test_equal_scores_leave_the_kl_alone():
    logprobs, old, ref, _, mask = some_batch(4, 6)
    nothing = grpo.group_advantages(torch.full((4,), 0.1, dtype=torch.float64), 4)
    slope, = gradient(lambda x: grpo.grpo_loss(x, old, ref, nothing, mask, 0.2, 0.0), logprobs)
    assert not slope.any()
    slope, = gradient(lambda x: grpo.grpo_loss(x, old, ref, nothing, mask, 0.2, 1.0), logprobs)
    # Downhill is towards the reference, at every token.
    assert (slope[mask].sign() == (logprobs - ref)[mask].sign()).all()


def test_what_has_moved_far_enough_is_left_alone():
    """ρ beyond 1 ± ε in the direction of A: no gradient; in the other: pulled back."""
    old, ref, mask = row(-1, -1), row(-1, -1), torch.ones(1, 2)
    for advantage, expected in ((1.0, (False, True)), (-1.0, (True, False))):
        slope, = gradient(lambda x: grpo.grpo_loss(x, old, ref, vector(advantage), mask, 0.2, 0.0),
                          row(-0.7, -1.3))      # ρ = 1.35 and 0.74
        assert tuple((slope[0] != 0).tolist()) == expected


def test_every_response_counts_alike_however_long():
    """Four tokens or one: their tokens' gradients add up to the same."""
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 0]])
    logprobs = -torch.ones(2, 4, dtype=torch.float64)
    slope, = gradient(lambda x: grpo.grpo_loss(x, logprobs, logprobs, vector(1, 1), mask, 0.2,
                                               0.0), logprobs)
    close(slope.sum(1), vector(-0.5, -0.5))
    close(slope[0], vector(*[-0.125] * 4))


def test_nothing_outside_the_mask_is_read():
    logprobs, old, ref, advantages, mask = some_batch(4, 6)
    inputs = [spoiled(x, mask, 0.0) for x in (logprobs, old, ref)]

    def value_and_slopes(inputs):
        def loss(*inputs):
            return grpo.grpo_loss(*inputs, advantages, mask, 0.2, 0.7)
        return loss(*inputs), *gradient(loss, *inputs)

    expected = value_and_slopes(inputs)
    for which in ([0], [1], [2], [0, 1, 2]):
        for rubbish in ((NAN, INF, -INF), (1e6, -3.0, 7.0)):
            dirty = [spoiled(x, mask, *rubbish) if i in which else x for i, x in enumerate(inputs)]
            for found, right in zip(value_and_slopes(dirty), expected, strict=True):
                assert torch.equal(found, right)
    assert all((slope[~mask] == 0).all() for slope in expected[1:])
    nothing = grpo.grpo_loss(*(torch.full((2, 3), NAN) for _ in range(3)), torch.ones(2),
                             torch.zeros(2, 3), 0.2, 0.7)
    assert nothing == 0


def test_a_row_without_a_token_is_as_if_it_were_not_there():
    batch = some_batch(3, 5)
    without = grpo.grpo_loss(*(x[[0, 2]] for x in batch), 0.2, 0.7)
    batch[4][1] = False
    close(grpo.grpo_loss(*batch, 0.2, 0.7), without)


def test_k3_as_a_loss_has_the_gradient_of_the_other_kl():
    """E_π[∇k3] = ∇KL(π_ref‖π) ≠ ∇KL(π‖π_ref), for one token of a vocabulary of 6."""
    torch.manual_seed(0)
    logits, ref = normal(6), torch.log_softmax(normal(6), 0)

    def expected_k3(logits):
        logprobs = torch.log_softmax(logits, 0)
        each = torch.stack([grpo.grpo_loss(logprobs[None, [a]], logprobs.detach()[None, [a]],
                                           ref[None, [a]], vector(0), torch.ones(1, 1), 0.2, 1.0)
                            for a in range(6)])
        return (logprobs.detach().exp() * each).sum()      # samples do not move with the policy

    def kl_from_ref(logits):
        return (ref.exp() * (ref - torch.log_softmax(logits, 0))).sum()

    def kl_to_ref(logits):
        logprobs = torch.log_softmax(logits, 0)
        return (logprobs.exp() * (logprobs - ref)).sum()

    close(gradient(expected_k3, logits), gradient(kl_from_ref, logits))
    assert (gradient(expected_k3, logits)[0] - gradient(kl_to_ref, logits)[0]).abs().max() > 0.05


# -------------------------------------------------------------------- where a whole run ends

def balanced(reference: Tensor, values: Tensor, weights: Tensor, beta: float) -> Tensor:
    """π where no token gains from any other: w (A − β + β π_ref/π) = λ for all, by bisection of λ.
    All (…, 8); with equal weights it is β π_ref/(λ − A)."""
    gains = weights * (values - beta)
    low = gains.amax(-1, keepdim=True)
    high = low + beta * weights.amax(-1, keepdim=True)
    for _ in range(60):
        middle = (low + high) / 2
        too_much = (beta * weights * reference / (middle - gains)).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return beta * weights * reference / (high - gains)


def grpo_optimum(reference: Tensor, scores: Tensor, beta: float) -> Tensor:
    """Where the expected gradient of `grpo_loss` vanishes, for large groups: all (57,), the toy's
    responses, first the one that ends at once, then 7 × 8 of two tokens, of weight ½ each."""
    weights = torch.tensor([1.0] + [0.5] * 7, dtype=torch.float64)
    pairs = reference[1:].view(7, 8)
    first = torch.cat([reference[:1], pairs.sum(1)])
    policy = reference
    for _ in range(200):
        mean = (policy * scores).sum()
        advantages = (scores - mean) / (policy * (scores - mean) ** 2).sum().sqrt()
        of_pairs = advantages[1:].view(7, 8)
        seconds = balanced(pairs / pairs.sum(1, keepdim=True), of_pairs, torch.ones(7, 8), beta)
        values = torch.cat([advantages[:1], (seconds * of_pairs).sum(1)])
        firsts = balanced(first, values, weights, beta)
        policy = (policy + torch.cat([firsts[:1],
                                      (firsts[1:, None] * seconds).flatten()])) / 2
    return policy


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_a_run_reaches_its_own_optimum_which_is_not_ppo_s(monkeypatch, tmp_path, beta):
    saved = []
    monkeypatch.setattr(grpo, "load_gpt", lambda folder: (toy_policy(), ToyTokenizer()))
    monkeypatch.setattr(door, "save_model", lambda out, model, *_: saved.append(model))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    responses = [[3]] + [[x, y] for x, y in itertools.product(range(8), range(8)) if x != 3]
    scores = vector(*(toy_reward(text) if ended else -0.5
                      for text, ended in map(ToyTokenizer().response_text, responses)))
    grpo.train(grpo.Config(
        run="", data=(str(tmp_path / "prompts.jsonl"),), init="toy", out=str(tmp_path / "grpo"),
        steps=60, prompts=1, group=256, micro_batch=0, max_new_tokens=2, beta=beta, lr=1e-2,
        missing_end_score=-0.5, device="cpu"),
        reward=lambda conversations, texts: [toy_reward(text) for text in texts])
    reference, trained = sequence_probs(toy_policy(), responses), sequence_probs(saved[-1],
                                                                                 responses)
    expected = grpo_optimum(reference, scores, beta)
    assert expected.sum().item() == pytest.approx(1, abs=1e-6)
    std = (expected * (scores - (expected * scores).sum()) ** 2).sum().sqrt().item()
    ppo_s = optimum(reference, scores / std, beta)
    assert distance(reference, expected) > 0.3 and distance(ppo_s, expected) > 0.15
    assert distance(trained, expected) < 0.06


# -------------------------------------------------------------------- the whole of it

def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def config_of(town: Path, out: Path, **changes) -> grpo.Config:
    return grpo.Config(**dict(
        run="", data=(str(town / "data/rl.jsonl"),), init=str(town / "sft"),
        reward=str(town / "rm"), out=str(out), steps=3, prompts=6, group=4, micro_batch=5,
        max_new_tokens=12, lr=1e-3, warmup=0) | changes)


def test_a_run_starts_at_the_reference_and_leaves_what_evaluation_reads(town, tmp_path):
    final = grpo.train(config_of(town, tmp_path, minibatches=1))
    rows, episodes = lines(tmp_path / "metrics.jsonl"), lines(tmp_path / "rollouts.jsonl")
    assert rows[0]["kl"] == 0 and rows[0]["clip_fraction"] == 0 and rows[1]["kl"] != 0
    # At ρ = 1 the loss is −mean A, and a group's advantages add up to 0; k3 is 0 at first.
    assert rows[0]["loss"] == pytest.approx(0, abs=1e-6)
    assert all(math.isfinite(value) for one in rows for value in one.values())
    for one in rows:
        own = [episode for episode in episodes if episode["step"] == one["step"]]
        assert len(own) == 24
        # Groups stand in a row, each to one prompt.
        assert all(len({str(episode["messages"]) for episode in own[i:i + 4]}) == 1
                   for i in range(0, 24, 4))
        assert one["score"] == pytest.approx(sum(e["score"] for e in own) / 24, abs=1e-4)
        assert one["end_rate"] == pytest.approx(sum(e["ended"] for e in own) / 24)
    assert final["score"] == pytest.approx(rows[-1]["score"], abs=1e-4)
    curve = evaluate.over_optimisation(tmp_path, window=1)
    assert [point["proxy"] for point in curve] == [one["score"] for one in rows]
    assert load_gpt(str(tmp_path))[0].config.n_embd == 32


def test_micro_batches_change_nothing_and_a_seed_is_a_run(town, tmp_path):
    found = []
    for name, micro_batch in (("all", 0), ("again", 0), ("few", 5)):
        grpo.train(config_of(town, tmp_path / name, micro_batch=micro_batch))
        found.append([[one[key] for key in ("score", "length", "kl", "loss", "grad_norm")]
                      for one in lines(tmp_path / name / "metrics.jsonl")])
    assert found[0] == found[1]
    for one, other in zip(found[0], found[2]):
        assert one == pytest.approx(other, rel=5e-3, abs=1e-5)


def test_old_logprobs_that_are_not_the_policy_s_are_refused(town, tmp_path, monkeypatch):
    right = grpo.as_sampled

    def wrong(*args):
        tokens, mask, old_logprobs, ref_logprobs = right(*args)
        return tokens, mask, torch.where(mask, old_logprobs + 0.01, 0.0), ref_logprobs
    monkeypatch.setattr(grpo, "as_sampled", wrong)
    with pytest.raises(RuntimeError, match="ratio"):
        grpo.train(config_of(town, tmp_path))


def test_a_plain_python_reward_rises(town, tmp_path):
    def reward(conversations, texts):
        return [float("o" in text) - 0.02 * len(text) for text in texts]
    grpo.train(config_of(town, tmp_path, steps=25, prompts=4, group=8, micro_batch=0, lr=3e-3,
                         beta=0.0, missing_end_score=-2.0), reward)
    rows = lines(tmp_path / "metrics.jsonl")
    assert sum(one["score"] for one in rows[-4:]) > sum(one["score"] for one in rows[:4]) + 1.0


def test_a_reward_that_is_always_the_same_moves_nothing(town, tmp_path):
    final = grpo.train(config_of(town, tmp_path, missing_end_score=0.1),
                       lambda conversations, texts: [0.1] * len(texts))
    start, end = (load_gpt(str(folder))[0].state_dict() for folder in (town / "sft", tmp_path))
    assert final["empty_steps"] == 3 and all(torch.equal(start[name], end[name]) for name in start)


def test_a_verifier_is_the_gold_score_and_needs_no_reward_model(town, tmp_path):
    grpo.train(config_of(town, tmp_path, steps=2, reward="", verifier=True))
    episodes = lines(tmp_path / "rollouts.jsonl")
    assert {episode["ended"] for episode in episodes} == {True, False}
    for episode in episodes:                     # what never ended is the gold score's business
        gold = gold_score(episode["messages"], episode["response"], episode["ended"])
        assert episode["score"] == round(gold, 4)


def test_the_command_finds_its_places_and_prints_a_table(town, tmp_path, capsys):
    for stage in ("data", "sft", "rm"):
        (tmp_path / stage).symlink_to(town / stage)
    grpo.compared(grpo.Config(run=str(tmp_path), steps=1, prompts=2, group=2, max_new_tokens=12,
                              verifier=True))
    folder = tmp_path / "systems/grpo_verifier"
    assert set(json.loads((folder / "table.json").read_text())) == {"sft", "grpo_verifier"}
    assert json.loads((folder / "config.json").read_text())["run"]["data"] == [
        str(tmp_path / "data/rl.jsonl")]
    assert "| grpo_verifier |" in capsys.readouterr().out


@pytest.mark.parametrize("changes, words", [
    (dict(group=1), "--group 1: must lie between 2"),
    (dict(minibatches=25), "--minibatches 25: must lie between 1 and 24"),
    (dict(beta=-0.1), "--beta -0.1"), (dict(reward=""), "--reward")])
def test_what_cannot_be_is_said(town, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        grpo.train(config_of(town, tmp_path, **changes))


# -------------------------------------------------------------------- mutants

def baseline_forgotten(scores, group):
    std = scores.view(-1, group).std(1, keepdim=True)
    return (scores.view(-1, group) / (std + 1e-4)).flatten()


def equal_scores():
    test_equal_scores_give_exactly_nothing(0.1)


def loops(B=5, T=7, beta=0.7):
    test_grpo_loss_is_that_of_the_loop(B, T, beta)


LEVEL = test_neither_a_prompt_s_level_nor_its_scale_matters
MUTANTS: list[tuple[str, str, object, list[Callable]]] = [
    ("group_advantages", "std of all scores",
     Edit("scores.std(1, keepdim=True, correction=1)", "scores.std()"),
     [test_group_advantages_by_hand, LEVEL]),
    ("group_advantages", "mean of all scores",
     Edit("scores.mean(1, keepdim=True)", "scores.mean()"), [test_group_advantages_by_hand]),
    ("group_advantages", "baseline forgotten", baseline_forgotten,
     [test_group_advantages_by_hand, LEVEL, equal_scores]),
    ("group_advantages", "the first response as baseline",
     Edit("(scores - scores.mean(1, keepdim=True))", "scores"),
     [test_group_advantages_by_hand, LEVEL]),
    ("group_advantages", "population std", Edit("correction=1", "correction=0"),
     [test_group_advantages_by_hand, test_one_terrible_response_has_a_bounded_advantage]),
    ("group_advantages", "variance for std", Edit("scores.std(", "scores.var("),
     [test_group_advantages_by_hand, LEVEL]),
    ("group_advantages", "std of 0 not provided for", Edit("(std + 1e-4)", "std"), [equal_scores]),
    ("group_advantages", "rounded mean of equal scores",
     Edit("scores = scores - scores[:, :1]", "pass"), [equal_scores]),
    ("group_advantages", "groups dealt out instead of in a row",
     Edit("scores.view(-1, group)", "scores.view(group, -1).T"), [test_group_advantages_by_hand]),
    ("grpo_loss", "sign of k3", Edit("+ beta * k3", "- beta * k3"),
     [test_grpo_loss_by_hand, test_equal_scores_leave_the_kl_alone, loops]),
    ("grpo_loss", "k1 instead of k3", Edit("_, _, k3 =", "k3, _, _ ="),
     [test_grpo_loss_by_hand, test_k3_as_a_loss_has_the_gradient_of_the_other_kl]),
    ("grpo_loss", "k3 of π_ref's samples",
     Edit("kl_estimates(logprobs, ref_logprobs)", "kl_estimates(ref_logprobs, logprobs)"),
     [test_grpo_loss_by_hand, test_k3_as_a_loss_has_the_gradient_of_the_other_kl]),
    ("grpo_loss", "k3 of the policy that sampled",
     Edit("kl_estimates(logprobs, ref_logprobs)", "kl_estimates(old_logprobs, ref_logprobs)"),
     [test_grpo_loss_by_hand, test_equal_scores_leave_the_kl_alone]),
    ("grpo_loss", "mean over the batch's tokens",
     Edit("masked_mean(means, mask.any(1))", "masked_mean(losses, mask)"),
     [test_grpo_loss_by_hand, test_every_response_counts_alike_however_long, loops]),
    ("grpo_loss", "divided by the padded length",
     Edit("mask.sum(1).clamp(min=1)", "mask.shape[1]"),
     [test_grpo_loss_by_hand, test_every_response_counts_alike_however_long]),
    ("grpo_loss", "sums over tokens", Edit(" / mask.sum(1).clamp(min=1)", ""),
     [test_grpo_loss_by_hand, test_every_response_counts_alike_however_long]),
    ("grpo_loss", "clip missing", Edit("ratio.clamp(1 - cliprange, 1 + cliprange)", "ratio"),
     [test_grpo_loss_by_hand, test_what_has_moved_far_enough_is_left_alone]),
    ("grpo_loss", "clipped always", Edit("torch.minimum(unclipped, clipped)", "clipped"),
     [test_grpo_loss_by_hand, test_what_has_moved_far_enough_is_left_alone]),
    ("grpo_loss", "maximum for minimum", Edit("torch.minimum", "torch.maximum"),
     [test_grpo_loss_by_hand, test_what_has_moved_far_enough_is_left_alone]),
    ("grpo_loss", "sign of the objective", Edit("-torch.minimum", "torch.minimum"),
     [test_at_the_policy_that_sampled_it_is_reinforce_with_the_group_as_baseline]),
    ("grpo_loss", "ratio to the reference",
     Edit("logprobs - old_logprobs", "logprobs - ref_logprobs"),
     [test_at_the_policy_that_sampled_it_is_reinforce_with_the_group_as_baseline]),
    ("grpo_loss", "ratio upside down", Edit("logprobs - old_logprobs", "old_logprobs - logprobs"),
     [test_grpo_loss_by_hand,
      test_at_the_policy_that_sampled_it_is_reinforce_with_the_group_as_baseline]),
    ("grpo_loss", "masked in the mean only", Edit("torch.where(mask, x, 0.0) for x", "x for x"),
     [test_nothing_outside_the_mask_is_read]),
    ("grpo_loss", "empty rows counted", Edit("masked_mean(means, mask.any(1))", "means.mean()"),
     [test_a_row_without_a_token_is_as_if_it_were_not_there]),
]


@pytest.mark.parametrize("name, mistake, mutant, tests", MUTANTS,
                         ids=[f"{row[0]}: {row[1]}" for row in MUTANTS])
def test_a_classic_wrong_answer_is_caught(monkeypatch, name, mistake, mutant, tests):
    check_caught(monkeypatch, grpo, name, mistake, mutant, tests)
