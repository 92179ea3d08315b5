"""Arithmetic that several scripts share and that must be fast.

Each function has its definition in plain PyTorch beside it, or is that definition; a kernel for one
device stands below under the same arithmetic. `token_logprobs` picks: Triton for 16-bit products on
a GPU, chunks of PyTorch elsewhere.
"""
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

# On the CPU Triton runs only interpreted, for the tests. The question is not whether there is a
# GPU, only whether there could be one.
try:
    if not (torch.backends.cuda.is_built() or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ImportError
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Logits that token_logprobs forms at once: 4 MiB in fp32, but never fewer than 256 rows of them,
# because every chunk reads and updates the whole head.
CHUNK_ELEMENTS, CHUNK_ROWS = 2 ** 20, 256
GELU_ELEMENTS = 2 ** 16       # from here on the form by σ is faster
# Probabilities that the forward pass of token_logprobs keeps for the backward pass: 256 MiB in
# fp32. What goes beyond is formed again.
KEPT_ELEMENTS = 2 ** 26


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask` is 1: one division by the number of such places in the whole tensor.

    x, mask: any equal shapes; mask bool or 0/1. A masked NaN or infinity reaches neither value nor
    gradient, and an all-zero mask gives 0. Note that this is not the mean of per-row means when
    rows differ in length.
    """
    mask = mask.bool()
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias, as F.linear: x (..., C), weight (N, C), bias (N,) → (..., N).

    For the few rows of a decoding step on the CPU in fp32 it computes (weight·xᵀ)ᵀ, as the library
    reads the weights faster in that form: 8 rows through GPT-2's head of 50,304 × 768 take about
    half of the time. bench/tricks.py measures this, as it does the other gains in this project's
    comments.
    """
    rows = x.numel() // x.shape[-1]
    low_precision = x.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu")
    if rows > 32 or x.device.type != "cpu" or low_precision or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    y = torch.mm(weight, x.reshape(rows, -1).T).T.contiguous()                   # (rows, N)
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], len(weight))


def gelu(x: Tensor) -> Tensor:
    """GELU as GPT-2 has it, ½x(1 + tanh u) with u = √(2/π)·(x + 0.044715x³).

    x has any shape; the result has the same shape and type.

    On the CPU in fp32 it uses the identity ½(1 + tanh u) = σ(2u), as PyTorch's tanh is slow there:
    forward and backward for (1000, 512) are 1.0 to 1.9 times faster on two cores without AVX-512.
    Small x gain nothing.
    """
    if (x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
            and x.numel() > GELU_ELEMENTS):
        return _Gelu.apply(x)
    return F.gelu(x, approximate="tanh")


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0,
                   equal_weights: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probability of given tokens, and entropy, straight from hidden states.

        logits = hidden·weightᵀ / temperature
        logprob = logits[target] − logsumexp(logits)
        entropy = −Σ_v p_v log p_v                   (both in nats, both differentiable)

    hidden (..., C): state *before* each target. weight (V, C): the output head. targets (...):
    token ids. Returns (logprobs, entropy), each (...), fp32 (float64 for float64 input). Under
    autocast the product is taken in the autocast type and everything after it in fp32.

    (..., V) logits are never held. Memory beyond inputs and gradients is bounded, whatever the
    number of tokens: up to KEPT_ELEMENTS probabilities wait for the backward pass, all others are
    formed a second time.

    equal_weights: a promise that the loss will weigh these log-probabilities all alike and the
    entropies not at all, as a likelihood does. Both gradients are then formed in the forward pass,
    chunk by chunk, up to that one weight, and nothing is kept or formed twice. A loss that breaks
    the promise raises RuntimeError in its backward pass.
    """
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)} must match hidden {tuple(hidden.shape)} "
                         f"without its last axis")
    kind = hidden.device.type
    product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    # The casts are part of the graph, so that each gradient comes back in the type of its input.
    rows, head, wanted = (hidden.reshape(-1, hidden.shape[-1]).to(product), weight.to(product),
                          targets.reshape(-1))
    if triton and kind == "cuda" and product.itemsize == 2:
        logprobs, entropy = _TritonTokenLogprobs.apply(rows, head, wanted, temperature)
    else:
        gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        if equal_weights and gradients:
            logprobs, entropy = _LikelihoodLogprobs.apply(rows, head, wanted, temperature)
        else:
            logprobs, entropy = _TokenLogprobs.apply(rows, head, wanted, temperature,
                                                     KEPT_ELEMENTS if gradients else 0)
    return logprobs.view(targets.shape), entropy.view(targets.shape)


def token_logprobs_reference(hidden: Tensor, weight: Tensor, targets: Tensor,
                             temperature: float = 1.0):
    """The definition of `token_logprobs`, with the whole (..., V) tensor in memory."""
    logits = ((hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
              / temperature)                                                     # (..., V)
    log_p = logits.log_softmax(-1)
    return log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


# ----------------------------------------------------------------------------- CPU: GELU

class _Gelu(torch.autograd.Function):
    # 2u = x·(A + B·x²)
    A, B = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715

    @staticmethod
    def forward(ctx, x):
        s = (x * x).mul_(_Gelu.B).add_(_Gelu.A).mul_(x).sigmoid_()
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, s = ctx.saved_tensors
        slope = (x * x).mul_(3 * _Gelu.B).add_(_Gelu.A).mul_(x)              # x·∂(2u)/∂x
        # (1 + slope·(1 − s))·s·grad
        return slope.addcmul_(slope, s, value=-1).add_(1).mul_(s).mul_(grad)


# -------------------------------------------------------------------- any device: chunks of PyTorch

class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, room):
        # hidden (N, C), weight (V, C), targets (N,); room: how many elements to keep
        logprobs, entropy, log_z = _results(hidden)
        kept = []
        for rows in _chunks(len(hidden), len(weight)):
            p = _probabilities(hidden, weight, targets, temperature, rows,
                               logprobs, entropy, log_z)                         # (V, n)
            room -= p.numel()
            if room >= 0:
                kept.append(p)
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy, *kept)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, log_z, entropy, *kept = ctx.saved_tensors
        grad_hidden, grad_weight = (torch.empty_like(hidden),
                                    torch.zeros_like(weight, dtype=log_z.dtype))
        # Usually the entropy is only a statistic, which saves a pass over the logits.
        with_entropy = bool((grad_entropy != 0).any())
        for i, rows in enumerate(_chunks(len(hidden), len(weight))):
            p = (kept[i] if i < len(kept) else                                   # (V, n)
                 _logits(hidden[rows], weight, ctx.temperature).sub_(log_z[rows]).exp_())
            # ∂logprob/∂logits = onehot(target) − p
            # ∂entropy/∂logits = −p·(log p + entropy)
            grad = p * -grad_logprobs[rows]
            grad.scatter_add_(0, targets[None, rows], grad_logprobs[None, rows])
            if with_entropy:
                grad -= grad_entropy[rows] * (torch.xlogy(p, p) + p * entropy[rows])
            _add_gradients(grad, hidden, weight, ctx.temperature, rows, grad_hidden, grad_weight)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


class _LikelihoodLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        logprobs, entropy, log_z = _results(hidden)
        grad_hidden, grad_weight = (torch.empty_like(hidden),
                                    torch.zeros_like(weight, dtype=log_z.dtype))
        for rows in _chunks(len(hidden), len(weight)):
            grad = _probabilities(hidden, weight, targets, temperature, rows,
                                  logprobs, entropy, log_z).neg_()
            # onehot(target) − p, (V, n)
            grad.scatter_add_(0, targets[None, rows], grad.new_ones(1, grad.shape[1]))
            _add_gradients(grad, hidden, weight, temperature, rows, grad_hidden, grad_weight)
        ctx.gradients = grad_hidden, grad_weight.to(weight.dtype)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        scale = grad_logprobs[:1].sum()                      # of no tokens, 0
        if ctx.gradients is None or (grad_logprobs != scale).any() or grad_entropy.any():
            raise RuntimeError("token_logprobs(equal_weights=True) serves one backward pass of a "
                               "loss that weighs all tokens alike and entropies not at all; call "
                               "it without equal_weights")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        return grad_hidden.mul_(scale), grad_weight.mul_(scale), None, None


def _results(hidden: Tensor) -> Tensor:
    """Room for log-probabilities, entropies and log-normalisers of N tokens, (3, N)."""
    return torch.empty(3, len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32),
                       device=hidden.device)


def _probabilities(hidden, weight, targets, temperature, rows, logprobs, entropy, log_z) -> Tensor:
    """softmax(logits) of these rows, (V, n).

    Writes their log-probabilities, entropies and log-normalisers on the way.
    """
    logits = _logits(hidden[rows], weight, temperature)
    top = logits.amax(0)
    logits.sub_(top)
    chosen = logits.gather(0, targets[None, rows])[0]
    p = logits.exp()                                        # the only exp, backward included
    total = p.sum(0)
    logprobs[rows] = chosen - total.log()
    entropy[rows] = total.log() - logits.mul_(p).sum(0) / total
    log_z[rows] = top + total.log()
    return p.div_(total)


def _add_gradients(grad, hidden, weight, temperature, rows, grad_hidden, grad_weight) -> None:
    """From ∂loss/∂(logits / temperature) of these rows, (V, n), to gradients.

    Writes the gradient of their states and adds their share of the head's gradient.
    """
    grad = (grad if temperature == 1 else grad.div_(temperature)).to(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        torch.mm(grad.T, weight, out=grad_hidden[rows])
        if grad_weight.dtype == hidden.dtype:
            grad_weight.addmm_(grad, hidden[rows])          # in place: no second (V, C) tensor
        else:
            grad_weight += grad @ hidden[rows]              # 16-bit products, summed in fp32


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Logits in at least fp32, a tensor of its own, as (V, n).

    With few rows and a large vocabulary the CPU's library takes two thirds of the time that it
    takes for (n, V).
    """
    with torch.autocast(hidden.device.type, enabled=False):
        logits = (weight @ hidden.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return logits if temperature == 1 else logits.div_(temperature)


def _chunks(rows: int, columns: int) -> list[slice]:
    size = max(CHUNK_ROWS, CHUNK_ELEMENTS // columns)
    return [slice(start, start + size) for start in range(0, rows, size)]


# -------------------------------------------------------------------- GPU: a pair of Triton kernels

# Elements of ∂loss/∂logits that the backward pass holds at once: 128 MiB in bf16.
GRADIENT_ELEMENTS = 2 ** 26
# Parts of the vocabulary that run side by side, so that few tokens fill a GPU as well.
SPLITS = 16

if triton:
    # The interpreter multiplies the bits of bf16 numbers; a GPU multiplies the numbers, and sums in
    # fp32 either way.
    INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

    @triton.jit
    def _tile(hidden, weight, n, v, N, V, C, temperature,
              BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr):
        """Logits of tokens n (BLOCK_N,) × entries v (BLOCK_V,), summed in fp32; −inf beyond V."""
        logits = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        n, v = n.to(tl.int64), v.to(tl.int64)               # places in memory may exceed 32 bits
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            h = tl.load(hidden + n[:, None] * C + c[None, :],
                        mask=(n[:, None] < N) & (c[None, :] < C), other=0.0)
            w = tl.load(weight + v[None, :] * C + c[:, None],
                        mask=(v[None, :] < V) & (c[:, None] < C), other=0.0)
            if INTERPRETED:
                h, w = h.to(tl.float32), w.to(tl.float32)
            logits = tl.dot(h, w, logits, input_precision="ieee")
        return tl.where(v[None, :] < V, logits / temperature, float("-inf"))

    @triton.jit
    def _forward_kernel(hidden, weight, targets, top, total, weighted, chosen, N, V, C,
                        temperature, per_split,
                        BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr):
        """For BLOCK_N tokens and one split of the vocabulary, in one pass (online log-sum-exp).

        With l the logits, each (SPLITS, N):

            top = max l                              total = Σ exp(l − top)
            weighted = Σ exp(l − top)·(l − top)      chosen = l[target] or 0
        """
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        first = tl.program_id(1) * per_split
        target = tl.load(targets + n, mask=n < N, other=-1)
        m = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        s, e, t = (tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32),
                   tl.zeros((BLOCK_N,), tl.float32))
        for start in range(first, tl.minimum(first + per_split, V), BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            l = _tile(hidden, weight, n, v, N, V, C, temperature, BLOCK_N, BLOCK_V, BLOCK_C)
            t += tl.sum(tl.where(v[None, :] == target[:, None], l, 0.0), 1)
            higher = tl.maximum(m, tl.max(l, 1))
            # The first block has nothing to rescale.
            old = tl.where(m == float("-inf"), 0.0, m)
            scale = tl.where(m == float("-inf"), 0.0, tl.exp(old - higher))
            p = tl.exp(l - higher[:, None])
            e = (scale * (e + s * (old - higher))
                 + tl.sum(p * tl.where(v[None, :] < V, l - higher[:, None], 0.0), 1))
            s = scale * s + tl.sum(p, 1)
            m = higher
        place = tl.program_id(1) * N + n
        tl.store(top + place, m, mask=n < N)
        tl.store(total + place, s, mask=n < N)
        tl.store(weighted + place, e, mask=n < N)
        tl.store(chosen + place, t, mask=n < N)

    @triton.jit
    def _backward_kernel(hidden, weight, targets, log_z, entropy, grad_logprobs, grad_entropy, grad,
                         N, V, C, temperature,
                         BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr):
        """∂loss/∂logits of BLOCK_N tokens × BLOCK_V entries, from logits formed again.

        It is rounded once, into grad (N, V).
        """
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        real = n < N
        target = tl.load(targets + n, mask=real, other=-1)
        z, H = (tl.load(log_z + n, mask=real, other=0.0),
                tl.load(entropy + n, mask=real, other=0.0))
        up, up_entropy = (tl.load(grad_logprobs + n, mask=real, other=0.0),
                          tl.load(grad_entropy + n, mask=real, other=0.0))
        log_p = _tile(hidden, weight, n, v, N, V, C, temperature,
                      BLOCK_N, BLOCK_V, BLOCK_C) - z[:, None]
        p = tl.exp(log_p)
        onehot = tl.where(v[None, :] == target[:, None], 1.0, 0.0)
        entropy_part = p * tl.where(v[None, :] < V, log_p + H[:, None], 0.0)
        g = (up[:, None] * (onehot - p) - up_entropy[:, None] * entropy_part) / temperature
        tl.store(grad + n[:, None].to(tl.int64) * V + v[None, :], g.to(grad.dtype.element_ty),
                 mask=real[:, None] & (v[None, :] < V))


class _TritonTokenLogprobs(torch.autograd.Function):
    BLOCKS = dict(BLOCK_N=64, BLOCK_V=128, BLOCK_C=32)

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):           # (N, C), (V, C), (N,)
        hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
        (N, C), V, blocks = hidden.shape, len(weight), _TritonTokenLogprobs.BLOCKS
        per_split = triton.cdiv(triton.cdiv(V, SPLITS), blocks["BLOCK_V"]) * blocks["BLOCK_V"]
        splits = triton.cdiv(V, per_split)
        top, total, weighted, chosen = torch.empty(4, splits, N, dtype=torch.float32,
                                                   device=hidden.device)
        _forward_kernel[triton.cdiv(N, blocks["BLOCK_N"]), splits](
            hidden, weight, targets, top, total, weighted, chosen, N, V, C, float(temperature),
            per_split, **blocks)
        highest = top.amax(0)                                         # (N,)
        scale = torch.exp(top - highest)                              # (splits, N)
        all_total = (scale * total).sum(0)
        log_z = highest + all_total.log()
        # E[l] − highest
        expected = (scale * (weighted + total * (top - highest))).sum(0) / all_total
        entropy = all_total.log() - expected
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy)
        ctx.temperature = float(temperature)
        return chosen.sum(0) - log_z, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, log_z, entropy = ctx.saved_tensors
        (N, C), V, blocks = hidden.shape, len(weight), _TritonTokenLogprobs.BLOCKS
        grad_hidden, grad_weight = (torch.empty_like(hidden),
                                    torch.zeros_like(weight, dtype=torch.float32))
        grad_logprobs, grad_entropy = grad_logprobs.contiguous(), grad_entropy.contiguous()
        size = max(blocks["BLOCK_N"], GRADIENT_ELEMENTS // V)
        for start in range(0, N, size):
            rows = slice(start, start + size)
            n = len(hidden[rows])
            grad = torch.empty(n, V, dtype=hidden.dtype, device=hidden.device)
            _backward_kernel[triton.cdiv(n, blocks["BLOCK_N"]), triton.cdiv(V, blocks["BLOCK_V"])](
                hidden[rows], weight, targets[rows], log_z[rows], entropy[rows],
                grad_logprobs[rows], grad_entropy[rows], grad, n, V, C, ctx.temperature, **blocks)
            grad_hidden[rows] = grad @ weight         # the library's matrix products are the best
            grad_weight += grad.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None
