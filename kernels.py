"""Arithmetic that several scripts share and that must be fast.

Each function is the plain definition in PyTorch; a kernel for one device stands beside it under the same signature.
"""
import torch
from torch import Tensor

# Logits that token_logprobs holds at once: 4 MiB in fp32, but never fewer than 128 rows of them, because every chunk
# reads the whole head (1,024 tokens at V = 50,304, C = 128, two cores: 0.8 s; with 20 rows a chunk 1.4 s).
CHUNK_ELEMENTS, CHUNK_ROWS = 2 ** 20, 128


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` over the places where `mask` is 1: one division by their count in the whole tensor.

    x, mask: any equal shapes; mask bool or 0/1. A masked NaN or infinity reaches neither value nor gradient, and an
    all-zero mask gives 0. Note that this is not the mean of per-row means when rows differ in length.
    """
    mask = mask.bool()
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of given tokens, and entropy, straight from hidden states; never holds (..., V) at once.

        logits = hidden·weightᵀ / temperature      logprob = logits[target] − logsumexp(logits)
        entropy = −Σ_v p_v log p_v                 (both in nats, both differentiable)

    hidden (..., C): state *before* each target. weight (V, C): the output head. targets (...): token ids.
    Returns (logprobs, entropy), each (...), fp32 (float64 for float64 input). Under autocast the product is taken in
    the autocast type and everything after it in fp32. Time goes into two matrix products forward and three backward:
    logits are formed again in the backward pass instead of being kept.
    """
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)} must match hidden {tuple(hidden.shape)} without its last axis")
    logprobs, entropy = _TokenLogprobs.apply(hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1),
                                             temperature)
    return logprobs.view(targets.shape), entropy.view(targets.shape)


def token_logprobs_reference(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0):
    """The definition of `token_logprobs`, with the whole (..., V) tensor in memory."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature   # (..., V)
    log_p = logits.log_softmax(-1)
    return log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):                      # (N, C), (V, C), (N,)
        kind = hidden.device.type
        product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.temperature = temperature
        hidden, weight = hidden.to(product), weight.to(product)
        exact = torch.promote_types(product, torch.float32)
        logprobs, entropy, log_z = torch.empty(3, len(hidden), dtype=exact, device=hidden.device)
        with torch.autocast(kind, enabled=False):
            for rows in _chunks(len(hidden), len(weight)):
                logits = (hidden[rows] @ weight.T).to(exact).div_(temperature)   # (n, V)
                log_z[rows] = logits.logsumexp(-1)
                log_p = logits.sub_(log_z[rows, None])
                logprobs[rows] = log_p.gather(-1, targets[rows, None])[:, 0]
                entropy[rows] = -torch.linalg.vecdot(log_p, log_p.exp())
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, log_z, entropy = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=log_z.dtype)
        with_entropy = bool((grad_entropy != 0).any())       # usually only a statistic: saves a third of the work
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(len(hidden), len(weight)):
                log_p = (hidden[rows] @ weight.T).to(log_z.dtype).div_(ctx.temperature).sub_(log_z[rows, None])
                # ∂logprob/∂logits = onehot(target) − p        ∂entropy/∂logits = −p·(log p + entropy)
                p = log_p.exp()                                                  # (n, V)
                scale = grad_logprobs[rows, None]
                if with_entropy:
                    grad_logits = -p * (scale + grad_entropy[rows, None] * (log_p + entropy[rows, None]))
                else:
                    grad_logits = p.mul_(-scale)
                grad_logits.scatter_add_(-1, targets[rows, None], scale)
                grad_logits = grad_logits.div_(ctx.temperature).to(hidden.dtype)
                grad_hidden[rows] = grad_logits @ weight
                grad_weight += grad_logits.T @ hidden[rows]
        return grad_hidden.to(ctx.dtypes[0]), grad_weight.to(ctx.dtypes[1]), None, None


def _chunks(rows: int, columns: int) -> list[slice]:
    size = max(CHUNK_ROWS, CHUNK_ELEMENTS // columns)
    return [slice(start, start + size) for start in range(0, rows, size)]
