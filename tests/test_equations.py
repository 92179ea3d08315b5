"""Every equation of the lectures, held to three things:

1. numbers worked out by hand, in a comment beside each test;
2. the properties that wrong implementations break while their loss curves stay plausible;
3. a second definition, plain Python loops over float64 numbers, on random input of odd shapes.

Functions are called through their module (`train_ppo.gae`), so that test_mutants.py can put a
wrong one in their place.
"""
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import model
import rollout
import train_base
import train_dpo
import train_ppo
import train_rm
import train_sft
from data import batches
from data.tokenizer import get_tokenizer

NAN, INF = math.nan, math.inf
SHAPES = ((1, 2), (2, 3), (5, 7), (3, 17), (7, 1))          # (B, T)
close = partial(assert_close, rtol=1e-10, atol=1e-12)       # two float64 routes to one number


def row(*numbers: float) -> Tensor:
    """One row, (1, T), in float64."""
    return torch.tensor([numbers], dtype=torch.float64)


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, dtype=torch.float64)


def stretches(B: int, T: int) -> Tensor:
    """A response mask (B, T): in every row one unbroken stretch of at least one token, anywhere."""
    mask = torch.zeros(B, T, dtype=torch.bool)
    for b in range(B):
        start = int(torch.randint(T, ()))
        mask[b, start:start + 1 + int(torch.randint(T - start, ()))] = True
    return mask


def spoiled(x: Tensor, mask: Tensor, *values: float) -> Tensor:
    """x with `values` in turn at the places outside the mask."""
    x = x.clone()
    outside = x[~mask.bool()]
    x[~mask.bool()] = torch.tensor(values, dtype=x.dtype).repeat(len(outside))[:len(outside)]
    return x


def gradient(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of function(*inputs).sum() for each input."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs).sum(), inputs)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def tiny_gpt(seed: int = 0) -> model.GPT:
    """A model of 2 layers whose weights are large enough that every token matters."""
    torch.manual_seed(seed)
    gpt = model.GPT(model.GPTConfig(32, 64, 2, 2, 16)).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.mul_(8 if p.dim() == 2 else 1)
    return gpt


def tiny_reward_model(seed: int = 0) -> model.RewardModel:
    return model.RewardModel(tiny_gpt(seed)).eval()


# -------------------------------------------------------------------- definitions, number by number

def loop_masked_mean(x, mask):
    kept = [x[i][j].item() for i in range(len(x)) for j in range(len(x[i])) if mask[i][j]]
    return sum(kept) / len(kept) if kept else 0.0


def loop_token_logprobs(hidden, weight, targets, temperature):
    logprobs, entropies = [], []
    for state, target in zip(hidden.tolist(), targets.tolist()):
        logits = [sum(h * w for h, w in zip(state, column)) / temperature
                  for column in weight.tolist()]
        z = sum(math.exp(logit) for logit in logits)
        p = [math.exp(logit) / z for logit in logits]
        logprobs.append(math.log(p[target]))
        entropies.append(-sum(q * math.log(q) for q in p))
    return vector(*logprobs), vector(*entropies)


def loop_ranking_loss(rewards, scores, mask, margin=0.0):
    per_prompt = []
    for r, s, m in zip(rewards.tolist(), scores.tolist(), mask.tolist()):
        responses = [k for k in range(len(r)) if m[k]]
        losses = [-math.log(sigmoid(r[i] - r[j] - margin))
                  for i in responses for j in responses if s[i] > s[j]]
        if losses:
            per_prompt.append(sum(losses) / len(losses))
    return sum(per_prompt) / len(per_prompt) if per_prompt else 0.0


def loop_dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing):
    losses = []
    for a, b, c, d in zip(*(x.tolist() for x in (policy_chosen, policy_rejected,
                                                 ref_chosen, ref_rejected))):
        h = (a - c) - (b - d)
        p, q = sigmoid(beta * h), sigmoid(-beta * h)        # P(chosen ≻ rejected) and the reverse
        losses.append(-(1 - label_smoothing) * math.log(p) - label_smoothing * math.log(q))
    return vector(*losses)


def loop_kl_penalized_rewards(scores, logprobs, ref_logprobs, mask, beta):
    B, T = mask.shape
    rewards = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        places = [t for t in range(T) if mask[b][t]]
        for t in places:
            rewards[b, t] = -beta * (logprobs[b][t].item() - ref_logprobs[b][t].item())
        rewards[b, places[-1]] += scores[b].item()
    return rewards


def loop_gae(rewards, values, mask, gamma, lam):
    """A_t as Σ_k (γλ)^k δ_{t+k}: no recursion, so that nothing is shared with the function."""
    B, T = mask.shape
    advantages, returns = torch.zeros(2, B, T, dtype=torch.float64)
    for b in range(B):
        places = [t for t in range(T) if mask[b][t]]
        R, V = [rewards[b][t].item() for t in places], [values[b][t].item() for t in places] + [0.0]
        delta = [R[i] + gamma * V[i + 1] - V[i] for i in range(len(places))]
        for i, t in enumerate(places):
            advantages[b, t] = sum((gamma * lam) ** (k - i) * delta[k]
                                   for k in range(i, len(places)))
            returns[b, t] = advantages[b, t] + V[i]
    return advantages, returns


def loop_whiten(x, mask, shift_mean):
    kept = [x[b][t].item() for b in range(len(x)) for t in range(len(x[b])) if mask[b][t]]
    mean = sum(kept) / len(kept)
    std = math.sqrt(sum((v - mean) ** 2 for v in kept) / len(kept) + 1e-8)
    out = torch.zeros_like(x)
    for b in range(len(x)):
        for t in range(len(x[b])):
            if mask[b][t]:
                out[b, t] = (x[b][t].item() - mean) / std + (0.0 if shift_mean else mean)
    return out


def loop_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange):
    terms = []
    for b in range(len(mask)):
        for t in range(len(mask[b])):
            if mask[b][t]:
                ratio, A = (math.exp(logprobs[b][t].item() - old_logprobs[b][t].item()),
                            advantages[b][t].item())
                terms.append(min(ratio * A, min(max(ratio, 1 - cliprange), 1 + cliprange) * A))
    return -sum(terms) / len(terms)


def loop_value_loss(values, old_values, returns, mask, cliprange_value):
    terms = []
    for b in range(len(mask)):
        for t in range(len(mask[b])):
            if mask[b][t]:
                V, old, G = values[b][t].item(), old_values[b][t].item(), returns[b][t].item()
                clipped = min(max(V, old - cliprange_value), old + cliprange_value)
                terms.append(max((V - G) ** 2, (clipped - G) ** 2))
    return sum(terms) / len(terms) / 2


# ----------------------------------------------------------------------------- the contract

SIGNATURES = {
    kernels: {"token_logprobs": "hidden weight targets temperature equal_weights",
              "masked_mean": "x mask"},
    train_base: {"pretraining_loss": "logprobs mask"},
    train_sft: {"sft_loss": "logprobs mask"},
    train_rm: {"pairwise_loss": "chosen_rewards rejected_rewards margin",
               "ranking_loss": "rewards scores mask", "ranking_accuracy": "rewards scores mask"},
    train_ppo: {"kl_estimates": "logprobs ref_logprobs",
                "kl_penalized_rewards": "scores logprobs ref_logprobs mask beta",
                "gae": "rewards values mask gamma lam", "whiten": "x mask shift_mean",
                "policy_loss": "logprobs old_logprobs advantages mask cliprange",
                "value_loss": "values old_values returns mask cliprange_value",
                "adapted_beta": "beta kl target_kl episodes horizon",
                "explained_variance": "values returns mask"},
    train_dpo: {"dpo_loss": "policy_chosen_logprobs policy_rejected_logprobs "
                            "ref_chosen_logprobs ref_rejected_logprobs beta label_smoothing"},
}


def test_argument_names_are_the_lecture_s():
    for module, functions in SIGNATURES.items():
        for name, expected in functions.items():
            parameters = list(inspect.signature(getattr(module, name)).parameters.values())
            expected = expected.split()
            assert [p.name for p in parameters[:len(expected)]] == expected, name
            # Additions are optional.
            assert all(p.default is not p.empty for p in parameters[len(expected):]), name


# ----------------------------------------------------------------- every function that takes a mask

@dataclass(frozen=True)
class Masked:
    """One function under test: `call(*tensors, mask)` returns tensors.

    The `tensors` that it takes are (B, T) and masked alike.
    """
    call: Callable
    tensors: int
    is_loss: bool = False        # a mean over the mask: 0 if the mask is


MASKED = {
    "masked_mean": Masked(lambda x, mask: [kernels.masked_mean(x, mask)], 1, True),
    "sft_loss": Masked(lambda x, mask: [train_sft.sft_loss(x, mask)], 1, True),
    "pretraining_loss": Masked(lambda x, mask: [train_base.pretraining_loss(x, mask)], 1, True),
    "ranking_loss": Masked(lambda r, s, mask: [train_rm.ranking_loss(r, s, mask)], 2, True),
    "ranking_accuracy": Masked(
        lambda r, s, mask: [torch.tensor(train_rm.ranking_accuracy(r, s, mask))], 2),
    "kl_penalized_rewards": Masked(lambda x, y, mask: [train_ppo.kl_penalized_rewards(
        torch.linspace(-1, 1, len(x), dtype=x.dtype), x, y, mask, 0.3)], 2),
    "gae": Masked(lambda r, v, mask: list(train_ppo.gae(r, v, mask, 0.9, 0.8)), 2),
    "whiten": Masked(lambda x, mask: [train_ppo.whiten(x, mask)], 1),
    "whiten, mean kept": Masked(lambda x, mask: [train_ppo.whiten(x, mask, shift_mean=False)], 1),
    "policy_loss": Masked(
        lambda x, y, a, mask: [train_ppo.policy_loss(x, y, a, mask, 0.2)], 3, True),
    "value_loss": Masked(lambda v, w, g, mask: [train_ppo.value_loss(v, w, g, mask, 0.2)], 3, True),
    "explained_variance": Masked(lambda v, g, mask: [train_ppo.explained_variance(v, g, mask)], 2),
}


def outputs_and_gradients(case: Masked, tensors: list[Tensor],
                          mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradient of a fixed uneven weighting of them for each tensor."""
    tensors = [x.clone().requires_grad_() for x in tensors]
    outputs = case.call(*tensors, mask)
    total = sum((out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum()
                for out in outputs)
    if not total.requires_grad:
        return outputs, []
    grads = torch.autograd.grad(total, tensors, allow_unused=True)
    return ([out.detach() for out in outputs],
            [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, grads)])


@pytest.mark.parametrize("name", MASKED)
def test_masked_nan_and_infinity_reach_neither_value_nor_gradient(name):
    check_outside_is_not_read(name, NAN, INF, -INF)


@pytest.mark.parametrize("name", MASKED)
def test_nothing_outside_the_mask_contributes(name):
    """Finite numbers too: neither the prompt nor what follows the end token changes a statistic."""
    check_outside_is_not_read(name, 1e6, -3.0, 7.0)


def check_outside_is_not_read(name: str, *rubbish: float) -> None:
    torch.manual_seed(1)
    case = MASKED[name]
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1],
                         [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]]).bool()
    tensors = [spoiled(normal(4, 6), mask, 0.0) for _ in range(case.tensors)]
    outputs, grads = outputs_and_gradients(case, tensors, mask)
    assert all(out.isfinite().all() and out.abs().max() > 0 for out in outputs)
    # Each input by itself, then all at once: a guard on one may not lean on another's.
    for which in [*([i] for i in range(case.tensors)), list(range(case.tensors))]:
        dirty = [spoiled(x, mask, *rubbish) if i in which else x for i, x in enumerate(tensors)]
        outputs_dirty, grads_dirty = outputs_and_gradients(case, dirty, mask)
        for out, expected in zip(outputs_dirty, outputs):
            assert torch.equal(out, expected)
        for grad, expected in zip(grads_dirty, grads):
            assert torch.equal(grad, expected)
            assert (grad[~mask] == 0).all()


@pytest.mark.parametrize("name", MASKED)
def test_masks_may_be_bool_or_numbers(name):
    torch.manual_seed(2)
    case = MASKED[name]
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    tensors = [normal(3, 5) for _ in range(case.tensors)]
    expected = case.call(*tensors, mask.bool())
    for dtype in (torch.long, torch.uint8, torch.float32):
        for out, right in zip(case.call(*tensors, mask.to(dtype)), expected):
            assert torch.equal(out, right)


@pytest.mark.parametrize("name", [name for name, case in MASKED.items() if case.is_loss])
def test_fully_masked_is_0_not_nan(name):
    case = MASKED[name]
    tensors = [torch.full((2, 3), value, dtype=torch.float64)
               for value in (NAN, 1.0, INF)[:case.tensors]]
    (loss,), grads = outputs_and_gradients(case, tensors, torch.zeros(2, 3))
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("name",
                         sorted(MASKED.keys() - {"kl_penalized_rewards", "explained_variance"}))
def test_a_fully_masked_row_is_as_if_it_were_not_there(name):
    torch.manual_seed(3)
    case = MASKED[name]
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]).bool()
    tensors = [normal(3, 5) for _ in range(case.tensors)]
    without = case.call(*(x[[0, 2]] for x in tensors), mask[[0, 2]])
    for out, expected in zip(case.call(*tensors, mask), without):
        if out.shape == mask.shape:
            assert (out[1] == 0).all()
            out = out[[0, 2]]
        close(out, expected)


# -------------------------------------------------------------------------- kernels.py: masked_mean

def test_masked_mean_by_hand():
    x, mask = torch.tensor([[1., 2., 3.], [4., 5., 6.]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    # (1 + 2 + 4)/3 = 7/3. Padding counted: 7/6. Mean of row means: (3/2 + 4)/2 = 11/4.
    assert_close(kernels.masked_mean(x, mask), torch.tensor(7 / 3))


def test_masked_mean_equals_its_definition():
    torch.manual_seed(4)
    for B, T in SHAPES:
        x, mask = normal(B, T), torch.rand(B, T) < 0.5
        close(kernels.masked_mean(x, mask).item(), loop_masked_mean(x, mask))


# ----------------------------------------------------------------------- kernels.py: token_logprobs

def test_token_logprobs_by_hand():
    # One state (1), output rows ln 1, ln 2, ln 5: p = 1/8, 2/8, 5/8. The second token has log 1/4;
    # the entropy is ⅛ ln 8 + ¼ ln 4 + ⅝ ln(8/5) = 0.900256.
    hidden, weight = vector(1.)[None], vector(1., 2., 5.).log()[:, None]
    logprobs, entropy = kernels.token_logprobs(hidden, weight, torch.tensor([1]))
    close(logprobs, vector(math.log(1 / 4)))
    close(entropy, vector(0.900256), atol=1e-6, rtol=0)


def test_temperature_divides_logits_not_log_probabilities():
    # At temperature ½ the same logits double: p = 1/30, 4/30, 25/30.
    # Log p divided instead would give 2 ln ¼ = ln 1/16.
    hidden, weight = vector(1.)[None], vector(1., 2., 5.).log()[:, None]
    logprobs, entropy = kernels.token_logprobs(hidden, weight, torch.tensor([1]), temperature=0.5)
    close(logprobs, vector(math.log(4 / 30)))
    # ln 30 − (4·ln 4 + 25·ln 25)/30 = 3.401197 − 2.867235
    close(entropy, vector(0.533962), atol=1e-6, rtol=0)


def test_token_logprobs_equal_their_definition():
    torch.manual_seed(5)
    for N, C, V in ((1, 1, 2), (3, 5, 7), (6, 2, 33)):
        hidden, weight, targets = normal(N, C), normal(V, C), torch.randint(V, (N,))
        for temperature in (0.5, 1.0, 1.7):
            for out, expected in zip(kernels.token_logprobs(hidden, weight, targets, temperature),
                                     loop_token_logprobs(hidden, weight, targets, temperature)):
                close(out, expected)


def both_routes(hidden, weight, targets, temperature, weights):
    """Outputs and gradients, each as (the kernel's, its reference's).

    The gradients are those of Σ weights[0]·logprobs + weights[1]·entropy.
    """
    results = []
    for function in (kernels.token_logprobs, kernels.token_logprobs_reference):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = function(h, w, targets, temperature)
        (logprobs * weights[0] + entropy * weights[1]).sum().backward()
        results.append((logprobs.detach(), entropy.detach(), h.grad, w.grad))
    return zip(*results)


def test_token_logprobs_equal_the_reference_forward_and_backward():
    torch.manual_seed(6)
    # One token; odd shapes; rows that do not divide by the chunk; a vocabulary bigger than a chunk;
    # leading axes.
    for shape, C, V, chunk in (((1,), 3, 5, 2 ** 20), ((13,), 7, 11, 33), ((5, 3), 4, 17, 40),
                               ((9,), 5, 65, 64), ((2, 3, 4), 3, 10, 1), ((0,), 3, 5, 64)):
        hidden, weight, targets = normal(*shape, C), normal(V, C), torch.randint(V, shape)
        # All probabilities kept for the backward pass, none, or those of the first 2 chunks.
        for kept in (2 ** 20, 0, 2 * max(V, chunk)):
            with mock.patch.multiple(kernels, CHUNK_ELEMENTS=chunk, CHUNK_ROWS=1,
                                     KEPT_ELEMENTS=kept):
                for temperature in (0.6, 1.0, 2.5):
                    for weights in ((normal(*shape), normal(*shape)), (normal(*shape), 0.0),
                                    (0.0, normal(*shape))):
                        for out, expected in both_routes(hidden, weight, targets, temperature,
                                                         weights):
                            close(out, expected)


def test_token_logprobs_have_the_gradient_of_finite_differences():
    torch.manual_seed(7)
    hidden, weight = normal(5, 3).requires_grad_(), normal(7, 3).requires_grad_()
    targets = torch.tensor([0, 6, 2, 2, 5])
    for temperature, kept in ((0.7, 100), (1.0, 100), (0.7, 0), (1.0, 14)):
        # 2 rows at a time, 1 in the last chunk. The probabilities of all chunks are kept, of none,
        # or of the first.
        with mock.patch.multiple(kernels, CHUNK_ELEMENTS=14, CHUNK_ROWS=1, KEPT_ELEMENTS=kept):
            assert torch.autograd.gradcheck(
                lambda h, w: kernels.token_logprobs(h, w, targets, temperature),
                (hidden, weight), raise_exception=False)


def test_token_logprobs_in_bfloat16_err_no_more_than_the_reference():
    torch.manual_seed(8)
    hidden, weight = normal(37, 64).bfloat16(), normal(101, 64, scale=0.3).bfloat16()
    targets, weights = torch.randint(101, (37,)), (torch.randn(37), torch.randn(37))
    exact = [right for _, right in both_routes(hidden.double(), weight.double(), targets, 0.8,
                                               weights)]
    with mock.patch.multiple(kernels, CHUNK_ELEMENTS=1, CHUNK_ROWS=10):
        for (out, reference), right in zip(both_routes(hidden, weight, targets, 0.8, weights),
                                           exact):
            error, allowed = (out.double() - right).norm(), (reference.double() - right).norm()
            assert allowed > 0
            # Each chunk's share of the weight gradient is rounded as well.
            assert error <= 1.2 * allowed


def test_log_probabilities_are_fp32_in_low_precision():
    torch.manual_seed(9)
    hidden, weight, targets = torch.randn(4, 8), torch.randn(11, 8), torch.randint(11, (4,))
    for logprobs in kernels.token_logprobs(hidden.bfloat16(), weight.bfloat16(), targets):
        assert logprobs.dtype == torch.float32
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy = kernels.token_logprobs(hidden, weight, targets)
        expected, _ = kernels.token_logprobs_reference(hidden, weight, targets)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    assert all(grad.dtype == torch.float32
               for grad in torch.autograd.grad(logprobs.sum(), (hidden, weight)))


def test_token_logprobs_are_finite_at_logits_of_1e4():
    # Logits 10⁴, 0, −10⁴: log p = 0, −10⁴, −2·10⁴ up to e^−10000, and the entropy is 0.
    hidden = torch.tensor([[1e4]] * 3, requires_grad=True)
    weight = torch.tensor([[1.], [0.], [-1.]], requires_grad=True)
    logprobs, entropy = kernels.token_logprobs(hidden, weight, torch.arange(3))
    assert logprobs.tolist() == [0, -1e4, -2e4] and entropy.tolist() == [0, 0, 0]
    (logprobs + entropy).sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    # weight of the target − weight of the certain token
    assert hidden.grad[:, 0].tolist() == [0, -1, -2]


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation returns, views included."""
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_over_all_tokens_and_the_vocabulary_is_built():
    torch.manual_seed(10)
    N, C, V = 64, 4, 50
    hidden, weight, targets = torch.randn(N, C), torch.randn(V, C), torch.randint(V, (N,))
    built = {}
    for function in (kernels.token_logprobs, kernels.token_logprobs_reference):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with mock.patch.multiple(kernels, CHUNK_ELEMENTS=3 * V, CHUNK_ROWS=2), Largest() as largest:
            logprobs, entropy = function(h, w, targets)
            (logprobs + entropy).sum().backward()
        built[function.__name__] = largest.elements
    assert built["token_logprobs_reference"] == N * V           # the probe sees what it should
    assert built["token_logprobs"] == max(N * C, V * C, 3 * V)  # the input, the weight or a chunk


def test_no_more_than_the_stated_probabilities_wait_for_the_backward_pass():
    torch.manual_seed(10)
    N, C, V = 64, 4, 50
    hidden, weight, targets = (torch.randn(N, C, requires_grad=True), torch.randn(V, C),
                               torch.randint(V, (N,)))
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(tuple(x.shape)) or x,
                                                  lambda x: x):
        # room for 2 chunks of 3
        with mock.patch.multiple(kernels, CHUNK_ELEMENTS=3 * V, CHUNK_ROWS=2, KEPT_ELEMENTS=8 * V):
            kernels.token_logprobs(hidden, weight, targets)
    assert sorted(held) == sorted([(N, C), (V, C), (N,), (N,), (N,), (V, 3), (V, 3)])
    held.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x,
                                                                   lambda x: x):
        kernels.token_logprobs(hidden, weight, targets)
    assert not held


def test_a_likelihoods_gradients_equal_those_of_any_loss():
    torch.manual_seed(12)
    for shape, C, V, chunk in (((1,), 3, 5, 2 ** 20), ((13,), 7, 11, 33), ((5, 3), 4, 17, 40),
                               ((0,), 3, 5, 64)):
        targets = torch.randint(V, shape)
        for temperature in (0.6, 1.0):
            for scale in (1.0, -0.25):
                hidden, weight, results = normal(*shape, C), normal(V, C), []
                for function in (partial(kernels.token_logprobs, equal_weights=True),
                                 kernels.token_logprobs_reference):
                    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
                    with mock.patch.multiple(kernels, CHUNK_ELEMENTS=chunk, CHUNK_ROWS=1):
                        logprobs, entropy = function(h, w, targets, temperature)
                        (scale * logprobs.sum()).backward()
                    results.append((logprobs.detach(), entropy.detach(), h.grad, w.grad))
                for out, expected in zip(*results):
                    close(out, expected)


def test_a_broken_promise_of_equal_weights_is_an_error():
    hidden, weight = normal(3, 4).requires_grad_(), normal(6, 4).requires_grad_()
    for loss in (lambda logprobs, entropy: logprobs[:2].sum(),
                 lambda logprobs, entropy: (logprobs + entropy).sum()):
        with pytest.raises(RuntimeError, match="equal_weights"):
            loss(*kernels.token_logprobs(hidden, weight, torch.tensor([0, 1, 5]),
                                         equal_weights=True)).backward()
    logprobs, _ = kernels.token_logprobs(hidden, weight, torch.tensor([0, 1, 5]),
                                         equal_weights=True)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        logprobs.sum().backward()


def test_targets_of_another_shape_than_the_states_are_refused():
    with pytest.raises(ValueError, match="targets"):
        kernels.token_logprobs(torch.zeros(2, 3, 4), torch.zeros(5, 4),
                               torch.zeros(2, 4, dtype=torch.long))


# ------------------------------------------------------------------------- kernels.py: linear, gelu

def test_gelu_is_the_tanh_form_forward_and_backward():
    x = torch.tensor([-30., -3., -1., 0., 1., 3., 30.], dtype=torch.float64, requires_grad=True)
    with mock.patch.object(kernels, "GELU_ELEMENTS", 0):
        out = kernels.gelu(x)
        assert torch.autograd.gradcheck(kernels.gelu, (x,), raise_exception=False)
    close(out, vector(*(0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v ** 3)))
                        for v in x.tolist())))
    close(torch.autograd.grad(out.sum(), x)[0],
          torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x)[0])
    x = torch.randn(300, 400, dtype=torch.float32)              # more than GELU_ELEMENTS
    assert_close(kernels.gelu(x), F.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6)


def test_linear_is_the_same_for_few_rows():
    torch.manual_seed(13)
    for shape in ((1, 4), (3, 1, 4), (32, 4), (33, 4)):
        x, weight, bias = normal(*shape), normal(6, 4), normal(6)
        with torch.no_grad():
            for b in (bias, None):
                out = kernels.linear(x, weight, b)
                assert out.is_contiguous()
                close(out, F.linear(x, weight, b))
    x = normal(2, 4).requires_grad_()
    assert kernels.linear(x, weight, bias).requires_grad


# ----------------------------------------------------------------------------- SFT and pretraining

def test_sft_loss_by_hand():
    logprobs = torch.tensor([[-9., -1., -2., -3.], [-9., -9., -6., -9.]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]])
    # (1 + 2 + 3 + 6)/4 = 3. A mean of row means would be (2 + 6)/2 = 4; with padding counted, 12/8.
    assert train_sft.sft_loss(logprobs, mask) == 3
    assert train_base.pretraining_loss(logprobs, mask) == 3


def test_likelihood_losses_equal_their_definition():
    torch.manual_seed(11)
    for B, T in SHAPES:
        logprobs, mask = -normal(B, T).square(), stretches(B, T)
        for loss in (train_sft.sft_loss, train_base.pretraining_loss):
            close(loss(logprobs, mask).item(), -loop_masked_mean(logprobs, mask))


def test_loss_of_a_uniform_guess_is_the_log_of_the_vocabulary():
    logprobs, _ = kernels.token_logprobs(torch.zeros(2, 3, 4), torch.randn(64, 4),
                                         torch.zeros(2, 3, dtype=torch.long))
    assert_close(train_base.pretraining_loss(logprobs, torch.ones(2, 3)),
                 torch.tensor(math.log(64)))


def test_micro_batches_give_the_gradient_of_one_batch():
    """Weighted by each mean's divisor: tokens (SFT), rankings with a pair (RM), pairs (DPO)."""
    torch.manual_seed(12)
    logprobs, mask = normal(6, 5), stretches(6, 5)
    parts = [slice(0, 1), slice(1, 3), slice(3, 6)]
    whole = gradient(lambda x: train_sft.sft_loss(x, mask), logprobs)
    pieces = gradient(lambda x: sum(train_sft.sft_loss(x[i], mask[i]) * mask[i].sum() / mask.sum()
                                    for i in parts), logprobs)
    close(pieces, whole)

    rewards, scores, mask = normal(6, 4), normal(6, 4), torch.ones(6, 4)
    mask[:3, 2:] = 0                                        # rankings of 2 and of 4
    scores[4] = 1.0                                         # all tied: no pair, not in the mean
    weights = torch.tensor([1, 1, 1, 1, 0, 1.], dtype=torch.float64)
    whole = gradient(lambda x: train_rm.ranking_loss(x, scores, mask), rewards)
    pieces = gradient(lambda x: sum(train_rm.ranking_loss(x[i], scores[i], mask[i])
                                    * weights[i].sum() / 5 for i in parts), rewards)
    close(pieces, whole)
    assert whole[0][4].abs().max() == 0 and whole[0][5].abs().max() > 0

    logprobs, ref = normal(6, 2), normal(6, 2)
    whole = gradient(lambda x: train_dpo.dpo_loss(*x.T, *ref.T, 0.3)[0].mean(), logprobs)
    pieces = gradient(lambda x: sum(train_dpo.dpo_loss(*x[i].T, *ref[i].T, 0.3)[0].sum() / 6
                                    for i in parts), logprobs)
    close(pieces, whole)


# ----------------------------------------------------------------------------- reward model

def test_pairwise_loss_by_hand():
    # σ(ln 3) = 3/4. Equal rewards: σ(0) = 1/2. A lead of ln 9 with a margin of ln 3 counts as ln 3.
    # A lag of ln 3: 1/4.
    chosen, rejected = (vector(math.log(3), 5.0, math.log(9), 0.0),
                        vector(0.0, 5.0, 0.0, math.log(3)))
    margin = vector(0.0, 0.0, math.log(3), 0.0)
    close(train_rm.pairwise_loss(chosen, rejected, margin),
          -vector(3 / 4, 1 / 2, 3 / 4, 1 / 4).log())
    close(train_rm.pairwise_loss(chosen, rejected), -vector(3 / 4, 1 / 2, 9 / 10, 1 / 4).log())


def test_equal_rewards_give_log_2():
    rewards = torch.full((3, 4), -7.5)
    assert_close(train_rm.pairwise_loss(rewards, rewards), torch.full((3, 4), math.log(2)))
    assert_close(train_rm.ranking_loss(rewards, torch.arange(12.).view(3, 4)),
                 torch.tensor(math.log(2)))


def test_a_constant_added_to_every_reward_changes_nothing():
    torch.manual_seed(13)
    rewards, scores = normal(3, 5), normal(3, 5)
    close(train_rm.ranking_loss(rewards + 100, scores), train_rm.ranking_loss(rewards, scores))
    close(train_rm.pairwise_loss(rewards + 100, scores + 100),
          train_rm.pairwise_loss(rewards, scores))
    (grad,) = gradient(lambda x: train_rm.ranking_loss(x, scores), rewards)
    # What one response gains, the others lose.
    close(grad.sum(1), torch.zeros(3, dtype=torch.float64))
    assert grad.abs().max() > 0.01


def test_rewards_follow_the_higher_score():
    # −∂loss/∂reward points up for the better response, down for the worse, whichever stands first.
    (grad,) = gradient(lambda x: train_rm.ranking_loss(x, row(2., 1.)), row(0., 0.))
    close(grad, row(-0.5, 0.5))
    (grad,) = gradient(lambda x: train_rm.ranking_loss(x, row(1., 2.)), row(0., 0.))
    close(grad, row(0.5, -0.5))


def test_a_ranking_of_two_is_a_pair():
    torch.manual_seed(14)
    rewards = normal(5, 2)
    close(train_rm.ranking_loss(rewards, torch.tensor([[1, 0]] * 5)),
          train_rm.pairwise_loss(*rewards.T).mean())
    close(train_rm.ranking_loss(rewards, torch.tensor([[0, 1]] * 5)),
          train_rm.pairwise_loss(*rewards.flip(1).T).mean())


def test_ranking_loss_by_hand():
    # First prompt: two responses (the third is padding) with equal rewards: ln 2.
    # Second: rewards ln 3, 0, 0 and scores 2, 1, 1: two pairs of ln 4/3 each; the tie is no pair.
    # Mean over prompts: (ln 2 + ln 4/3)/2. A mean over the three pairs: (ln 2 + 2 ln 4/3)/3.
    rewards = torch.tensor([[4., 4., 9.], [math.log(3), 0., 0.]], dtype=torch.float64)
    scores, mask = torch.tensor([[1., 0., 5.], [2., 1., 1.]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    close(train_rm.ranking_loss(rewards, scores, mask).item(), (math.log(2) + math.log(4 / 3)) / 2)


def test_ranking_loss_with_a_margin_by_hand():
    # Rewards 0, 0 with a margin of ln 3: σ(−ln 3) = 1/4. The second prompt has none: ln 2.
    loss = train_rm.ranking_loss(torch.zeros(2, 2, dtype=torch.float64),
                                 torch.tensor([[1, 0], [0, 1]]),
                                 margin=vector(math.log(3), 0.)[:, None])
    close(loss.item(), (math.log(4) + math.log(2)) / 2)


def test_ranking_loss_equals_its_definition():
    torch.manual_seed(15)
    for B, K in ((1, 2), (3, 4), (5, 9), (4, 3)):
        rewards, scores = normal(B, K), torch.randint(4, (B, K))    # with ties
        mask = torch.arange(K) < torch.randint(1, K + 1, (B, 1))    # some rankings have no pair
        close(train_rm.ranking_loss(rewards, scores, mask).item(),
              loop_ranking_loss(rewards, scores, mask))
        close(train_rm.ranking_loss(rewards, scores, mask, 0.5).item(),
              loop_ranking_loss(rewards, scores, mask, 0.5))
        close(train_rm.ranking_loss(rewards, scores).item(),
              loop_ranking_loss(rewards, scores, torch.ones(B, K)))


def test_rankings_of_nine_and_of_four_weigh_the_same():
    torch.manual_seed(16)
    rewards, scores = normal(2, 9), torch.arange(9).expand(2, 9)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    alone = [train_rm.ranking_loss(rewards[b:b + 1], scores[b:b + 1], mask[b:b + 1])
             for b in range(2)]
    assert (alone[0] - alone[1]).abs() > 0.01
    close(train_rm.ranking_loss(rewards, scores, mask), (alone[0] + alone[1]) / 2)


def test_ties_count_for_no_pair():
    rewards, tied = row(3., -1., 0.5), row(1., 1., 1.)
    assert train_rm.ranking_loss(rewards, tied) == 0
    assert train_rm.ranking_accuracy(rewards, tied, torch.ones(1, 3)) == (0, 0)
    (grad,) = gradient(lambda x: train_rm.ranking_loss(x, row(1., 1., 0.)), rewards)
    # two pairs
    expected = [-sigmoid(-2.5) / 2, -sigmoid(1.5) / 2, (sigmoid(-2.5) + sigmoid(1.5)) / 2]
    close(grad, row(*expected))


def test_a_score_of_0_is_a_score():
    rewards = vector(0., 0., 0.)[None]
    assert train_rm.ranking_accuracy(rewards, row(1., 0., -1.), torch.ones(1, 3))[1] == 3
    (grad,) = gradient(lambda x: train_rm.ranking_loss(x, row(1., 0., -1.)), rewards)
    close(grad, row(-1 / 3, 0., 1 / 3))             # three pairs of gradient ∓½ each, over 3
    rewards = train_ppo.kl_penalized_rewards(vector(0.), row(-1., -1.), row(-1., -2.),
                                             torch.ones(1, 2), 0.5)
    close(rewards, row(0., -0.5))                   # the penalty alone, no default in place of 0


def test_one_response_raises():
    for mask in (None, torch.ones(2, 1)):
        with pytest.raises(ValueError, match="K"):
            train_rm.ranking_loss(torch.zeros(2, 1), torch.zeros(2, 1), mask)


def test_ranking_accuracy_by_hand():
    # Pairs by score: 0>1, 0>2, 1>2; rewards 1, 2, 2: wrong, wrong, equal (a half).
    # The fourth response is padding.
    hits, pairs = train_rm.ranking_accuracy(row(1., 2., 2., 0.), row(3., 2., 1., 9.),
                                            torch.tensor([[1, 1, 1, 0]]))
    assert (hits, pairs) == (0.5, 3)
    # Three pairs in order, and none in the second row, which is a tie.
    rewards, scores = (torch.tensor([[3., 2., 1.], [5., 4., 3.]]),
                       torch.tensor([[9., 5., 1.], [2., 2., 2.]]))
    assert train_rm.ranking_accuracy(rewards, scores, torch.ones(2, 3)) == (3, 3)


def test_losses_and_gradients_are_finite_at_1e4():
    big = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = train_rm.pairwise_loss(big, torch.zeros(2))
    assert losses.tolist() == [0, 1e4]              # −log σ(x) → −x; log(σ(x)) is −inf from −104 on
    assert torch.autograd.grad(losses.sum(), big)[0].tolist() == [0, -1]
    rewards = torch.tensor([[1e4, -1e4, 0.]], requires_grad=True)
    loss = train_rm.ranking_loss(rewards, torch.tensor([[0, 1, 2]]))
    assert loss == (2e4 + 1e4 + 0) / 3      # wrong by 2·10⁴ (1 ≻ 0), by 10⁴ (2 ≻ 0); right (2 ≻ 1)
    assert torch.autograd.grad(loss, rewards)[0].isfinite().all()
    losses, *_ = train_dpo.dpo_loss(big, -big, torch.zeros(2), torch.zeros(2), beta=1.0,
                                    label_smoothing=0.1)
    assert_close(losses, torch.tensor([0.1 * 2e4, 0.9 * 2e4]))
    assert_close(torch.autograd.grad(losses.sum(), big)[0], torch.tensor([0.2, -1.8]))


def test_the_score_is_read_at_the_last_real_token():
    reward_model = tiny_reward_model()
    # 7 also pads; inside a row and at its end it is text.
    rows = [[3, 9, 4], [5, 7, 7, 2, 11, 7], [8]]
    alone = torch.cat([reward_model(torch.tensor([tokens]), torch.tensor([len(tokens)]))
                       for tokens in rows])
    tokens, _, lengths = batches.pad_rows([(tokens, [False] * len(tokens)) for tokens in rows],
                                          pad=7)
    assert_close(reward_model(tokens, lengths), alone)
    assert alone.std() > 0.1
    # Other padding, other score of the padding, same score of the row.
    assert_close(reward_model(torch.where(torch.arange(6) < lengths[:, None], tokens, 40), lengths),
                 alone)
    # It is the head on the state after the last token: changing that token changes the score.
    changed = tokens.clone()
    changed[torch.arange(3), lengths - 1] = 33
    assert ((reward_model(changed, lengths) - alone).abs() > 1e-3).all()


# ----------------------------------------------------------------------------- DPO

def test_dpo_loss_by_hand():
    # log-ratios: chosen −10 − (−12) = 2; rejected 2 − 2 ln 3. h = 2 ln 3, βh = ln 3, σ = 3/4.
    # Implicit rewards: ½·2 = 1 and ½·(2 − 2 ln 3) = 1 − ln 3.
    inputs = vector(-10.), vector(-14.), vector(-12.), vector(-16. + 2 * math.log(3))
    losses, chosen_rewards, rejected_rewards = train_dpo.dpo_loss(*inputs, beta=0.5)
    close(losses, vector(math.log(4 / 3)))
    close(chosen_rewards, vector(1.))
    close(rejected_rewards, vector(1 - math.log(3)))
    # 10 % believed flipped: 0.9·ln 4/3 + 0.1·ln 4
    losses, *_ = train_dpo.dpo_loss(*inputs, beta=0.5, label_smoothing=0.1)
    close(losses, vector(0.9 * math.log(4 / 3) + 0.1 * math.log(4)))


def test_dpo_loss_equals_its_definition():
    torch.manual_seed(17)
    for B in (1, 5):
        inputs = [normal(B, scale=3) for _ in range(4)]
        for beta in (0.1, 0.5, 2.0):
            for label_smoothing in (0.0, 0.2):
                losses, chosen, rejected = train_dpo.dpo_loss(*inputs, beta, label_smoothing)
                close(losses, loop_dpo_loss(*inputs, beta, label_smoothing))
                close(chosen, beta * (inputs[0] - inputs[2]))
                close(rejected, beta * (inputs[1] - inputs[3]))


def test_policy_equal_to_reference_gives_log_2_and_a_gradient():
    chosen, rejected = vector(-50., -3.), vector(-20., -4.)
    losses, chosen_rewards, rejected_rewards = train_dpo.dpo_loss(chosen, rejected,
                                                                  chosen, rejected, beta=0.1)
    close(losses, torch.full((2,), math.log(2), dtype=torch.float64))
    assert (chosen_rewards == 0).all() and (rejected_rewards == 0).all()
    grads = gradient(lambda x, y: train_dpo.dpo_loss(x, y, chosen, rejected, 0.1)[0],
                     chosen, rejected)
    close(grads, (vector(-0.05, -0.05), vector(0.05, 0.05)))    # ∓β·σ(0): chosen up, rejected down


def test_dpo_gradient_is_beta_times_how_wrong_the_implicit_rewards_are():
    torch.manual_seed(18)
    chosen, rejected, ref_chosen, ref_rejected = (normal(5, scale=4) for _ in range(4))
    beta = 0.3
    grads = gradient(lambda x, y: train_dpo.dpo_loss(x, y, ref_chosen, ref_rejected, beta)[0],
                     chosen, rejected)
    weight = beta * torch.sigmoid(-beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))
    close(grads, (-weight, weight))


def test_beta_towards_0_gives_log_2_whatever_the_policy():
    losses, *_ = train_dpo.dpo_loss(vector(-1., -80.), vector(-90., -2.),
                                    vector(-5., -5.), vector(-5., -5.), beta=1e-9)
    close(losses, torch.full((2,), math.log(2), dtype=torch.float64), atol=1e-6, rtol=0)


def test_implicit_rewards_carry_no_gradient():
    torch.manual_seed(34)
    inputs = [normal(3).requires_grad_() for _ in range(4)]
    losses, chosen_rewards, rejected_rewards = train_dpo.dpo_loss(*inputs, beta=0.1)
    assert losses.requires_grad
    assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad


def test_dpo_on_a_ranking_by_hand():
    # β = 1, log π/π_ref: ln 2, 0, 0 and score order 2 > 1 = 1. Pairs (0,1), (0,2): σ(ln 2) = 2/3
    # each, mean −ln(2/3). The second prompt has one pair, on which policy and reference agree:
    # ln 2. Its third place holds no response.
    ln2 = math.log(2)
    logprobs, ref_logprobs = (torch.stack([vector(ln2 - 3, -4., -5.), vector(-1., -2., NAN)]),
                              torch.stack([vector(-3., -4., -5.), vector(-1., -2., 7.)]))
    loss, pairs = train_dpo.ranking_dpo_loss(
        logprobs, ref_logprobs, torch.stack([vector(2., 1., 1.), vector(0., 1., 9.)]),
        torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(), 1.0)
    close(loss.item(), (math.log(3 / 2) + ln2) / 2)
    close(pairs, torch.tensor([[ln2 - 3, ln2 - 3, -2], [-4, -5, -1], [ln2, ln2, 0], [0, 0, 0]],
                              dtype=torch.float64))


def test_dpo_on_rankings_is_the_ranking_loss_of_the_implicit_rewards():
    torch.manual_seed(35)
    for B, K in ((1, 2), (3, 4), (5, 9)):
        # The scores have ties, and some rankings have no pair.
        logprobs, ref_logprobs, scores = normal(B, K), normal(B, K), torch.randint(4, (B, K))
        mask = torch.arange(K) < torch.randint(1, K + 1, (B, 1))
        losses = [lambda x: train_dpo.ranking_dpo_loss(x, ref_logprobs, scores, mask, 0.3)[0],
                  lambda x: train_rm.ranking_loss(0.3 * (x - ref_logprobs), scores, mask)]
        close(losses[0](logprobs), losses[1](logprobs))
        close(*(gradient(loss, logprobs) for loss in losses))


def test_dpo_on_pairs_is_the_mean_of_their_losses():
    torch.manual_seed(37)
    chosen, rejected, ref_chosen, ref_rejected = (normal(5) for _ in range(4))
    loss, pairs = train_dpo.ranking_dpo_loss(
        torch.stack([rejected, chosen], 1), torch.stack([ref_rejected, ref_chosen], 1),
        torch.tensor([[0, 1]] * 5), torch.ones(5, 2).bool(), 0.2, 0.1)
    losses, *rewards = train_dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.2, 0.1)
    close(loss, losses.mean())
    close(pairs, torch.stack([chosen, rejected, *rewards]))
    summary = {name: total / count for name, (total, count) in train_dpo.pair_sums(pairs).items()}
    right = (rewards[0] > rewards[1]).double().mean().item()
    assert 0 < right < 1 and summary["accuracy"] == pytest.approx(right)
    assert summary["margin"] == pytest.approx((rewards[0] - rewards[1]).mean().item())
    assert train_dpo.pair_sums(torch.zeros(4, 3))["accuracy"] == (1.5, 3)


# ids of the tiny model; 7 ends, 0 pads
PROMPT, CHOSEN, REJECTED = [5, 9, 9, 2], [11, 3, 60, 7], [11, 8]


def packed(*groups: tuple) -> batches.RankingBatch:
    """Rankings of (prompt, responses) in ids, the first response of each the best."""
    return batches.ranking_batch(ranking_rows(*groups), 0)


def ranking_rows(*groups: tuple) -> list[batches.RankingRow]:
    """The same as rows."""
    return [batches.RankingRow(prompt, responses, [float(-k) for k in range(len(responses))])
            for prompt, responses in groups]


GROUPS = [(PROMPT, [CHOSEN, REJECTED, [4, 7]]), ([6, 2], [[12, 13, 14, 7], [2, 7]]),
          ([2], [[1], [3, 3, 3]])]


@pytest.mark.parametrize("row_length", [1, 12, 256])
def test_log_probabilities_of_responses_are_sums(row_length):
    """Each response has the same log-probability in a shared row as alone behind its prompt."""
    gpt = tiny_gpt()
    with mock.patch.object(batches, "PACKED", row_length):
        sums = train_dpo.response_logprobs(gpt, packed(*GROUPS))
    for (prompt, responses), found in zip(GROUPS, sums):
        alone = torch.zeros(3)
        for k, response in enumerate(responses):
            log_p = gpt(torch.tensor([prompt + response]))[0].log_softmax(-1)
            alone[k] = sum(log_p[len(prompt) - 1 + i, id] for i, id in enumerate(response))
        assert_close(found, alone)


@pytest.mark.parametrize("row_length", [1, 12, 256])
def test_rewards_of_responses_are_those_they_have_alone(row_length):
    model = tiny_reward_model()
    model.bias += 0.5
    with mock.patch.object(batches, "PACKED", row_length):
        rewards = train_rm.ranking_rewards(model, packed(*GROUPS))
    for (prompt, responses), found in zip(GROUPS, rewards):
        alone = [model(torch.tensor([prompt + response]), torch.tensor([len(prompt + response)]))
                 for response in responses]
        assert_close(found, F.pad(torch.cat(alone), (0, 3 - len(alone))))


def test_tokens_of_the_shared_prompt_cancel():
    def losses(chosen_start, rejected_start):      # mask 1 from there on; nothing predicts token 0
        sums = []
        for gpt in (tiny_gpt(0), tiny_gpt(1)):
            for response, start in ((CHOSEN, chosen_start), (REJECTED, rejected_start)):
                tokens = torch.tensor([PROMPT + response])
                sums.append(gpt.logprobs(
                    tokens, torch.arange(tokens.shape[1])[None] >= start)[0].sum(-1))
        return train_dpo.dpo_loss(*sums, beta=0.02)[0]

    right = losses(4, 4)
    assert_close(losses(1, 1), right)
    # The prompt masked in one of the two only: a loss that looks healthy and is not.
    assert (losses(4, 1) - right).abs() > 0.05 and (losses(1, 4) - right).abs() > 0.05


def test_the_reference_stands_still():
    """The reference's log-probabilities, stored before training, equal those of the live model.

    No gradient reaches them.
    """
    gpt = tiny_gpt()
    rows = ranking_rows((PROMPT, [CHOSEN, REJECTED, [4, 7]]), (PROMPT, [[12, 13, 14, 7], [1, 7]]))
    train_dpo.set_reference(gpt, rows, 0, "cpu")
    batch = batches.ranking_batch(rows, 0)
    live = train_dpo.response_logprobs(gpt, batch)
    assert_close(batch.ref_logprobs, live.detach())
    assert (live != 0).sum() == 5 and live.requires_grad and not batch.ref_logprobs.requires_grad


# ----------------------------------------------------------------------------- PPO: KL and rewards

def test_kl_estimates_by_hand():
    # ℓ = ln 2: k1 = 0.693147, k2 = ℓ²/2 = 0.240227, k3 = ½ − 1 + ln 2 = 0.193147.
    # ℓ = −ln 2: k3 = 2 − 1 − ln 2 = 0.306853.
    ln2 = math.log(2)
    k1, k2, k3 = train_ppo.kl_estimates(vector(ln2 - 5, -5 - ln2, -5.), vector(-5., -5., -5.))
    close(k1, vector(ln2, -ln2, 0.))
    close(k2, vector(ln2 ** 2 / 2, ln2 ** 2 / 2, 0.))
    close(k3, vector(ln2 - 0.5, 1 - ln2, 0.))


def vocabulary_of_four() -> tuple[Tensor, Tensor, float]:
    """log π and log π_ref over a vocabulary of 4, and KL(π‖π_ref) = Σ π·(log π − log π_ref)."""
    p, q = [0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]
    return vector(*p).log(), vector(*q).log(), sum(a * math.log(a / b) for a, b in zip(p, q))


def test_k1_and_k3_equal_the_exact_kl_in_expectation_and_k1_is_not_clamped():
    log_p, log_q, exact = vocabulary_of_four()
    k1, k2, k3 = train_ppo.kl_estimates(log_p, log_q)
    close((log_p.exp() * k1).sum().item(), exact)
    close((log_p.exp() * k3).sum().item(), exact)
    assert abs((log_p.exp() * k2).sum().item() - exact) > 0.01      # biased
    assert k1.min() < -1 and k3.min() >= 0 and k2.min() >= 0
    # A whole response's KL is likewise the sum over its tokens: here π² over 16 responses of two
    # independent tokens.
    pairs = log_p[:, None] + log_p
    k1_sum = k1[:, None] + k1
    close((pairs.exp() * k1_sum).sum().item(), 2 * exact)


def test_k3_is_never_negative():
    for dtype in (torch.float64, torch.float32):
        logratio = torch.cat([torch.linspace(-1e-3, 1e-3, 2001),
                              torch.linspace(-5, 5, 2001)]).to(dtype)
        assert train_ppo.kl_estimates(logratio, torch.zeros_like(logratio))[2].min() >= 0


def test_as_a_loss_k1_teaches_nothing_and_k2_teaches_the_kl():
    """Expected gradients of Monte-Carlo losses: π draws the tokens and is not differentiated."""
    log_p, log_q, _ = vocabulary_of_four()
    p = log_p.exp()
    of_k1, of_k2, of_kl = (gradient(f, log_p)[0] for f in (
        lambda logits: (p * train_ppo.kl_estimates(logits.log_softmax(-1), log_q)[0]).sum(),
        lambda logits: (p * train_ppo.kl_estimates(logits.log_softmax(-1), log_q)[1]).sum(),
        lambda logits: (logits.softmax(-1) * (logits.log_softmax(-1) - log_q)).sum()))
    close(of_k1, torch.zeros(4, dtype=torch.float64))
    close(of_k2, of_kl)
    assert of_kl.abs().max() > 0.1


def test_kl_penalized_rewards_by_hand():
    # ℓ = 0.5, −1, 0 over the three response tokens; β = 0.1, score 2: −0.05, 0.1, and 2 − 0 on the
    # last of them, not in the last column.
    mask = torch.tensor([[0, 1, 1, 1, 0]])
    logprobs, ref_logprobs = row(-7., -1., -2., -0.5, -7.), row(-8., -1.5, -1., -0.5, -9.)
    rewards = train_ppo.kl_penalized_rewards(vector(2.), logprobs, ref_logprobs, mask, beta=0.1)
    close(rewards, row(0., -0.05, 0.1, 2., 0.))


def test_kl_penalized_rewards_equal_their_definition():
    torch.manual_seed(19)
    for B, T in SHAPES:
        scores, logprobs, ref_logprobs, mask = (normal(B), normal(B, T), normal(B, T),
                                                stretches(B, T))
        for beta in (0.0, 0.3):
            close(train_ppo.kl_penalized_rewards(scores, logprobs, ref_logprobs, mask, beta),
                  loop_kl_penalized_rewards(scores, logprobs, ref_logprobs, mask, beta))


def test_rewards_of_a_response_sum_to_score_minus_beta_kl():
    torch.manual_seed(20)
    scores, logprobs, ref_logprobs, mask = normal(6), normal(6, 9), normal(6, 9), stretches(6, 9)
    rewards = train_ppo.kl_penalized_rewards(scores, logprobs, ref_logprobs, mask, 0.2)
    kl = torch.where(mask, logprobs - ref_logprobs, 0.0).sum(1)
    assert kl.min() < 0 < kl.max()
    close(rewards.sum(1), scores - 0.2 * kl)


def test_the_score_lands_on_a_trained_position():
    torch.manual_seed(21)
    same, mask = normal(8, 9), stretches(8, 9)
    rewards = train_ppo.kl_penalized_rewards(torch.ones(8, dtype=torch.float64), same, same, mask,
                                             0.2)
    assert (rewards[mask].sum(), rewards[~mask].abs().sum()) == (8, 0)
    last = [max(t for t in range(9) if mask[b, t]) for b in range(8)]
    assert rewards.argmax(1).tolist() == last


def test_a_row_without_response_tokens_raises():
    with pytest.raises(ValueError, match="response token"):
        train_ppo.kl_penalized_rewards(torch.ones(2), torch.zeros(2, 3), torch.zeros(2, 3),
                                       torch.tensor([[0, 1, 1], [0, 0, 0]]), 0.1)


def test_moving_away_from_the_reference_costs_reward():
    rewards = train_ppo.kl_penalized_rewards(vector(0.), row(-0.1), row(-3.), torch.ones(1, 1),
                                             beta=0.5)
    close(rewards, row(-1.45))                          # −½·(−0.1 + 3): surer than the reference


def test_the_reported_kl_is_the_penalised_kl():
    torch.manual_seed(22)
    mask, scores = stretches(4, 6), normal(4)
    logprobs, ref_logprobs, entropy, values = (normal(4, 6) for _ in range(4))
    rewards = train_ppo.kl_penalized_rewards(scores, logprobs, ref_logprobs, mask, 0.25)
    _, returns = train_ppo.gae(rewards, values, mask, 1.0, 0.95)
    episodes = [train_ppo.Episode(None, rollout.Response([], "", i != 2), 0.0, i) for i in range(4)]
    batch = train_ppo.Rollout(
        episodes, scores=scores, tokens=torch.zeros(4, 6), mask=mask, logprobs=logprobs,
        ref_logprobs=ref_logprobs, entropy=entropy, values=values,
        advantages=torch.zeros(4, 6), returns=returns)
    numbers = train_ppo.evaluate(batch, rewards)
    close(numbers["kl"], ((scores - rewards.sum(1)) / 0.25).mean().item())
    close(numbers["objective"], numbers["score"] - 0.25 * numbers["kl"])
    close(numbers["entropy"], loop_masked_mean(entropy, mask))
    close(numbers["length"], sum(map(sum, mask.tolist())) / 4, rtol=1e-6)
    assert numbers["end_rate"] == 0.75


# ----------------------------------------------------------------------------- PPO: advantages

def test_gae_by_hand():
    # γ = λ = ½ over three response tokens with R = 1, 0, 2 and V = ½, 1, 1½.
    # Beyond the last token V = 0.
    # δ = 1 + ½·1 − ½ = 1;  0 + ½·1½ − 1 = −¼;  2 + 0 − 1½ = ½.
    # A = 1 − ¼·⅛ = 0.96875;  −¼ + ¼·½ = −⅛;  ½.    G = A + V = 1.46875, 0.875, 2.
    mask = torch.tensor([[0, 1, 1, 1, 0]])
    advantages, returns = train_ppo.gae(row(9., 1., 0., 2., 9.), row(9., 0.5, 1., 1.5, 9.), mask,
                                        gamma=0.5, lam=0.5)
    close(advantages, row(0., 0.96875, -0.125, 0.5, 0.))
    close(returns, row(0., 1.46875, 0.875, 2., 0.))


def test_gae_equals_its_definition():
    torch.manual_seed(23)
    for B, T in SHAPES:
        rewards, values, mask = normal(B, T), normal(B, T), stretches(B, T)
        for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (0.7, 0.0), (0.0, 0.9)):
            close(train_ppo.gae(rewards, values, mask, gamma, lam),
                  loop_gae(rewards, values, mask, gamma, lam))


def test_lambda_1_is_monte_carlo_and_lambda_0_the_td_error():
    torch.manual_seed(24)
    rewards, values = normal(3, 6), normal(3, 6)
    mask = torch.ones(3, 6)
    gamma = 0.9
    to_come = torch.stack([sum(gamma ** k * rewards[:, t + k] for k in range(6 - t))
                           for t in range(6)], dim=1)
    advantages, returns = train_ppo.gae(rewards, values, mask, gamma, lam=1.0)
    close(advantages, to_come - values)
    close(returns, to_come)                                         # whatever the values are
    next_values = torch.cat([values[:, 1:], torch.zeros(3, 1, dtype=torch.float64)], dim=1)
    advantages, _ = train_ppo.gae(rewards, values, mask, gamma, lam=0.0)
    close(advantages, rewards + gamma * next_values - values)


def test_returns_are_advantages_plus_values():
    torch.manual_seed(25)
    rewards, values, mask = normal(4, 7), normal(4, 7), stretches(4, 7)
    advantages, returns = train_ppo.gae(rewards, values, mask, 1.0, 0.95)
    close(returns, torch.where(mask, advantages + values, 0.0))
    # A perfect value model has nothing to learn: advantages 0 and returns equal to the values.
    to_come = torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    advantages, returns = train_ppo.gae(rewards, to_come, mask, 1.0, 0.95)
    close(advantages, torch.zeros_like(advantages))
    close(returns, torch.where(mask, to_come, 0.0))


def test_a_row_s_advantages_do_not_depend_on_its_place_in_the_batch():
    torch.manual_seed(26)
    rewards, values = normal(1, 4), normal(1, 4)
    alone, _ = train_ppo.gae(rewards, values, torch.ones(1, 4), 0.9, 0.8)
    # The same episode behind a prompt and before padding, beside a longer one.
    wide = [torch.stack([torch.cat([normal(2), x[0], normal(3)]), normal(9)])
            for x in (rewards, values)]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0], [1] * 9])
    close(train_ppo.gae(*wide, mask, 0.9, 0.8)[0][:1, 2:6], alone)


def test_values_are_read_before_the_token():
    """V_t values the choice of token t and must not see it; V_t is the head on what came before."""
    value_model = tiny_reward_model()
    tokens = torch.tensor([[5, 9, 2, 11, 3, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()
    values = train_ppo.state_values(value_model, tokens, mask)
    prefixes = [value_model(tokens[:, :t], torch.tensor([t])) for t in range(2, 6)]
    assert_close(values, torch.cat([torch.zeros(2), *prefixes])[None])
    changed = tokens.clone()
    changed[0, 4] = 33
    moved = (train_ppo.state_values(value_model, changed, mask) - values).abs()[0]
    assert (moved[:5] == 0).all() and moved[5] > 1e-3               # token 4 is first seen by V_5


def test_log_probabilities_are_read_before_the_token():
    gpt = tiny_gpt()
    tokens, mask = torch.tensor([[5, 9, 2, 11, 3, 7]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    logprobs, entropy = gpt.logprobs(tokens, mask, temperature=0.7)
    for t in range(2, 6):
        log_p = (gpt(tokens[:, :t])[0, -1] / 0.7).log_softmax(-1)
        assert_close(logprobs[0, t], log_p[tokens[0, t]])
        assert_close(entropy[0, t], -(log_p.exp() * log_p).sum())
    assert (logprobs[0, :2] == 0).all() and (entropy[0, :2] == 0).all()


def test_whiten_by_hand():
    # Over 0 and 4: mean 2, population variance 4. (The unbiased one, 8, would give ∓0.707.)
    x, mask = (torch.tensor([[0., 100.], [4., 100.]], dtype=torch.float64),
               torch.tensor([[1, 0], [1, 0]]))
    close(train_ppo.whiten(x, mask)[:, 0], vector(-1., 1.), rtol=1e-8, atol=0)
    close(train_ppo.whiten(x, mask, shift_mean=False)[:, 0], vector(1., 3.), rtol=1e-8, atol=0)
    assert (train_ppo.whiten(x, mask)[:, 1] == 0).all()


def test_whiten_equals_its_definition():
    torch.manual_seed(27)
    for B, T in SHAPES:
        x, mask = normal(B, T, scale=3) + 1, stretches(B, T)
        for shift_mean in (True, False):
            close(train_ppo.whiten(x, mask, shift_mean), loop_whiten(x, mask, shift_mean))


def test_whitened_numbers_have_mean_0_and_variance_1_over_the_mask():
    torch.manual_seed(28)
    x, mask = normal(6, 9, scale=5) + 3 + 10 * torch.arange(6)[:, None], stretches(6, 9)
    kept = train_ppo.whiten(x, mask)[mask]
    close(kept.mean().item(), 0.0)
    close(kept.var(correction=0).item(), 1.0, rtol=1e-8)
    # One mean and one deviation for the whole batch: the order of rows survives.
    assert (kept.argsort() == x[mask].argsort()).all()
    kept = train_ppo.whiten(x, mask, shift_mean=False)[mask]
    close(kept.mean(), x[mask].mean())
    close(kept.var(correction=0).item(), 1.0, rtol=1e-8)


def test_whitening_constants_gives_no_nan():
    x = torch.full((2, 3), 5.0)
    assert (train_ppo.whiten(x, torch.ones(2, 3)) == 0).all()
    assert (train_ppo.whiten(x, torch.ones(2, 3), shift_mean=False) == 5).all()


def test_explained_variance_by_hand():
    returns, mask = row(1., 3., 50.), torch.tensor([[1, 1, 0]])
    # Var(G) = 1 over 1 and 3. Foreseen: 1. Always the mean: 0.
    # Reversed: errors ∓2 of variance 4, 1 − 4 = −3.
    for values, expected in ((row(1., 3., 0.), 1.0), (row(2., 2., 0.), 0.0),
                             (row(3., 1., 0.), -3.0)):
        close(train_ppo.explained_variance(values, returns, mask).item(), expected)


# ----------------------------------------------------------------------------- PPO: losses

def test_policy_loss_by_hand():
    # ρ = 1.5, 0.5, 1.1, 0.5 with A = 2, 2, −1, −1 and ε = 0.2.
    # ρA = 3, 1, −1.1, −0.5; clipped 2.4, 1.6, −1.1, −0.8; smaller of the two 2.4, 1, −1.1, −0.8:
    # sum 1.5, mean 0.375.
    logprobs, advantages = row(1.5, 0.5, 1.1, 0.5, 9.).log(), row(2., 2., -1., -1., 9.)
    old_logprobs, mask = torch.zeros_like(logprobs), torch.tensor([[1, 1, 1, 1, 0]])
    loss = partial(train_ppo.policy_loss, old_logprobs=old_logprobs, advantages=advantages,
                   mask=mask, cliprange=0.2)
    close(loss(logprobs).item(), -0.375)
    # ∂L/∂logprob = −ρA/4 where the clip does not bind. A good token already raised (first) and a
    # bad one already lowered (fourth) get no more push; a good token lowered by mistake (second)
    # is pulled back.
    (grad,) = gradient(loss, logprobs)
    close(grad, row(0., -0.25, 0.275, 0., 0.))


def test_policy_loss_equals_its_definition():
    torch.manual_seed(29)
    for B, T in SHAPES:
        logprobs, old_logprobs, advantages, mask = (normal(B, T), normal(B, T), normal(B, T),
                                                    stretches(B, T))
        for cliprange in (0.0, 0.2, 5.0):
            close(train_ppo.policy_loss(logprobs, old_logprobs, advantages, mask, cliprange).item(),
                  loop_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange))


def test_the_first_minibatch_has_loss_minus_mean_advantage_and_gradient_minus_advantage():
    torch.manual_seed(30)
    logprobs, advantages, mask = normal(4, 7), normal(4, 7), stretches(4, 7)
    loss = partial(train_ppo.policy_loss, old_logprobs=logprobs, advantages=advantages, mask=mask,
                   cliprange=0.2)
    close(loss(logprobs).item(), -loop_masked_mean(advantages, mask))
    (grad,) = gradient(loss, logprobs)
    close(grad, torch.where(mask, -advantages / mask.sum(), 0.0))
    # Whitened advantages make this loss 0, and yet it teaches: the loss of PPO does not measure
    # progress.
    whitened = train_ppo.whiten(advantages, mask)
    loss = partial(train_ppo.policy_loss, old_logprobs=logprobs, advantages=whitened, mask=mask,
                   cliprange=0.2)
    close(loss(logprobs).item(), 0.0)
    assert gradient(loss, logprobs)[0].abs().sum() > 0.5


def test_clipping_never_raises_the_objective():
    torch.manual_seed(31)
    inputs, mask = [normal(5, 8) for _ in range(3)], stretches(5, 8)
    free = train_ppo.policy_loss(*inputs, mask, cliprange=1e6)
    close(free.item(), -loop_masked_mean((inputs[0] - inputs[1]).exp() * inputs[2], mask))
    assert train_ppo.policy_loss(*inputs, mask, cliprange=0.1) > free + 0.01


def test_value_loss_by_hand():
    # V = 1, 0, 0.5, 3; V_old = 0, 0, 0.6, 2; G = 2, 1, 0.5, 2.5; ε = 0.2.
    # Clipped: 0.2, 0, 0.5, 2.2. Squared errors 1, 1, 0, 0.25 against 3.24, 1, 0, 0.09.
    # The larger of each: 3.24 + 1 + 0 + 0.25 = 4.49, over 4, halved.
    values, old_values, returns = (row(1., 0., 0.5, 3., 7.), row(0., 0., 0.6, 2., -7.),
                                   row(2., 1., 0.5, 2.5, 0.))
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    loss = partial(train_ppo.value_loss, old_values=old_values, returns=returns, mask=mask,
                   cliprange_value=0.2)
    close(loss(values).item(), 4.49 / 8)
    # (V − G)/4 where V itself counts; the first has moved far enough for one rollout and gets none.
    (grad,) = gradient(loss, values)
    close(grad, row(0., -0.25, 0., 0.125, 0.))


def test_value_loss_equals_its_definition():
    torch.manual_seed(32)
    for B, T in SHAPES:
        values, old_values, returns, mask = (normal(B, T), normal(B, T), normal(B, T),
                                             stretches(B, T))
        for cliprange_value in (0.0, 0.2, 5.0):
            close(train_ppo.value_loss(values, old_values, returns, mask, cliprange_value).item(),
                  loop_value_loss(values, old_values, returns, mask, cliprange_value))


def test_clipping_never_lowers_the_value_loss():
    torch.manual_seed(33)
    (values, old_values, returns), mask = (normal(5, 8) for _ in range(3)), stretches(5, 8)
    free = 0.5 * loop_masked_mean((values - returns).square(), mask)
    close(train_ppo.value_loss(values, old_values, returns, mask, cliprange_value=1e6).item(), free)
    assert (train_ppo.value_loss(values, old_values, returns, mask, cliprange_value=0.1)
            > free + 0.01)


def test_adapted_beta_by_hand():
    # KL 12 at target 6: error 1, clipped to 0.2; 64 episodes of 10,000:
    # β·(1 + 0.2·0.0064) = 0.1·1.00128.
    assert train_ppo.adapted_beta(
        0.1, kl=12.0, target_kl=6.0, episodes=64, horizon=10_000) == pytest.approx(0.100128)
    # KL 6.6: error 0.1. KL 0: error −1, clipped to −0.2. On target β stays.
    assert train_ppo.adapted_beta(
        0.1, kl=6.6, target_kl=6.0, episodes=64, horizon=10_000) == pytest.approx(0.100064)
    assert train_ppo.adapted_beta(
        0.1, kl=0.0, target_kl=6.0, episodes=64, horizon=10_000) == pytest.approx(0.099872)
    assert train_ppo.adapted_beta(0.1, kl=6.0, target_kl=6.0, episodes=64, horizon=10_000) == 0.1


# --------------------------------------------------------------------------- masks of conversations

def test_the_response_and_its_end_are_trained_on_and_the_prompt_is_not():
    tokenizer = get_tokenizer("tinytown")
    question, answer = tokenizer.encode("Who has a cat?"), tokenizer.encode(" Mia has.")
    messages = [{"role": "user", "content": "Who has a cat?"},
                {"role": "assistant", "content": " Mia has."}]
    ids, mask = tokenizer.render(messages * 2)
    turn = [tokenizer.role_ids["user"], *question, tokenizer.end,
            tokenizer.role_ids["assistant"], *answer, tokenizer.end]
    # Marked from the first token of the answer to its end token.
    marks = [False] * (len(question) + 3) + [True] * (len(answer) + 1)
    assert ids == turn * 2
    assert list(mask) == marks * 2
    # Whole ids are the prompt's and the response's, with the same mask; exactly one end a response.
    prompt = tokenizer.render_prompt(messages[:1])
    assert batches.response_row(prompt, [*answer, tokenizer.end]) == (turn, marks)
    assert [id for id, mark in zip(*tokenizer.render(messages)) if mark].count(tokenizer.end) == 1


def test_padding_is_never_trained_on_even_if_it_has_the_id_of_the_end():
    rows = [batches.response_row([1, 2], [3, 7]), batches.response_row([1], [7])]
    tokens, mask, lengths = batches.pad_rows(rows, pad=7)
    assert tokens.tolist() == [[1, 2, 3, 7], [1, 7, 7, 7]]
    assert mask.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert lengths.tolist() == [4, 2]


# ----------------------------------------------------------------------------- evaluation

def test_win_rate_by_hand():
    # Against (1, 1) and (0, ½): ½·(½ + 1) and ½·(0 + ½), mean (¾ + ¼)/2 = ½.
    # The standard deviation is ¼·√2, over √2.
    rate, error = rollout.win_rate(vector(1., 0.), torch.stack([vector(1., 0.5), vector(0.5, 0.)]))
    assert rate == 0.5 and error == pytest.approx(0.25)
    assert rollout.win_rate(vector(2., 2., 0., 0.), torch.ones(4, 1))[0] == 0.5
    assert rollout.win_rate(vector(2., 1., 1.), torch.ones(3, 2))[0] == pytest.approx(2 / 3)
