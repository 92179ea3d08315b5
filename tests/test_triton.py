"""The GPU kernels of `kernels.py` on the CPU, by Triton's interpreter: right to the bit that fp32 sums allow, not fast.

Skipped where Triton is not installed (`pip install triton`).
"""
from unittest import mock

import pytest
import torch

import kernels

if not kernels.triton:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"           # where there is a GPU, the kernels run on it
# (N, C, V): one token; one vocabulary entry more than a block; nothing divides by a block; several splits; no token at all.
SHAPES = ((1, 8, 5), (3, 16, 129), (65, 33, 130), (130, 48, 2049), (0, 8, 5))


def inputs(N, C, V, dtype):
    torch.manual_seed(N + V)
    tensors = torch.randn(N, C).to(dtype), (0.5 * torch.randn(V, C)).to(dtype), torch.randint(V, (N,)), torch.randn(2, N)
    return [x.to(DEVICE) for x in tensors]


def run(function, hidden, weight, targets, temperature, upstream):
    """(log-probabilities, entropies, gradients of both arguments) for upstream[0]·logprobs + upstream[1]·entropy."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropy = function(hidden, weight, targets, temperature)
    (logprobs * upstream[0] + entropy * upstream[1]).sum().backward()
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("temperature", (1.0, 0.6))
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_equals_the_float64_definition(shape, temperature):
    hidden, weight, targets, upstream = inputs(*shape, torch.float32)
    found = run(kernels._TritonTokenLogprobs.apply, hidden, weight, targets, temperature, upstream)
    exact = run(kernels.token_logprobs_reference, hidden.double(), weight.double(), targets, temperature, upstream.double())
    for x, y in zip(found, exact):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > 1])
def test_bf16_errs_no_more_than_the_reference(shape):
    hidden, weight, targets, upstream = inputs(*shape, torch.bfloat16)
    found = run(kernels._TritonTokenLogprobs.apply, hidden, weight, targets, 0.8, upstream)
    plain = run(kernels.token_logprobs_reference, hidden, weight, targets, 0.8, upstream)
    exact = run(kernels.token_logprobs_reference, hidden.double(), weight.double(), targets, 0.8, upstream.double())
    for x, reference, y in zip(found, plain, exact):
        error, allowed = (x.double() - y).norm(), (reference.double() - y).norm()
        assert 0 < allowed and error <= 2 * allowed              # a few dozen roundings, in another order


def test_gradient_blocks_add_up():
    hidden, weight, targets, upstream = inputs(150, 16, 40, torch.float32)
    whole = run(kernels._TritonTokenLogprobs.apply, hidden, weight, targets, 1.0, upstream)
    with mock.patch.object(kernels, "GRADIENT_ELEMENTS", 1):                     # 64 tokens at a time
        parts = run(kernels._TritonTokenLogprobs.apply, hidden, weight, targets, 1.0, upstream)
    for x, y in zip(parts, whole):
        torch.testing.assert_close(x, y)


def test_a_token_without_weight_in_the_loss_gets_no_gradient():
    hidden, weight, targets, upstream = inputs(70, 16, 200, torch.float32)
    *_, grad_hidden, grad_weight = run(kernels._TritonTokenLogprobs.apply, hidden, weight, targets, 1.0, upstream * 0)
    assert not grad_hidden.any() and not grad_weight.any()


def test_logits_of_1e4_stay_finite():
    hidden = torch.tensor([[1e4]] * 3, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1.], [0.], [-1.]], device=DEVICE, requires_grad=True)
    logprobs, entropy = kernels._TritonTokenLogprobs.apply(hidden, weight, torch.arange(3, device=DEVICE), 1.0)
    assert logprobs.tolist() == [0, -1e4, -2e4] and entropy.tolist() == [0, 0, 0]
    (logprobs + entropy).sum().backward()
    assert hidden.grad[:, 0].tolist() == [0, -1, -2] and weight.grad.isfinite().all()
