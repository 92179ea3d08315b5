"""The optimizer, its learning rate, and one step of it."""
import math

import torch

from common import parallel


def learning_rate(step: int, steps: int, peak: float, warmup: int = 0, final: float = 0.1,
                  shape: str = "cosine") -> float:
    """Peak after `warmup` linear steps, then cosine or linear decay to `final` × peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if shape == "cosine" else 1 - progress
    return peak * (final + (1 - final) * decay)


def adamw(model: torch.nn.Module, lr: float, betas=(0.9, 0.95), weight_decay=0.1,
          eps=1e-8) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves biases and gains alone; fused (0.9 M parameters: 6
    times faster)."""
    parallel.reshard(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def take_step(rates: dict[torch.optim.Optimizer, float], scaler: torch.amp.GradScaler,
              max_norm: float, objective: float = 0.0) -> float:
    """For each optimizer: sum its gradient over processes, clip it to `max_norm`, step at its
    learning rate, clear. Returns the first one's norm before clipping.

    Where a gradient is zero nothing moves, by momentum or decay either: the batch had no target.
    An objective or gradient that is not finite raises FloatingPointError before anything has moved.
    In fp16 gradients may overflow: then the step is left out, and the scale halved.
    """
    norms = {}
    for optimizer in rates:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        parallel.sum_gradients(parameters)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        sharded = type(norm) is not torch.Tensor
        norms[optimizer] = float(norm.full_tensor() if sharded else norm)
    overflow = scaler.is_enabled() and scaler.get_scale() > 1
    finite = overflow or all(map(math.isfinite, norms.values()))
    if not (math.isfinite(objective) and finite):
        found = " and ".join(map(str, norms.values()))
        raise FloatingPointError(f"objective {objective}, norm of the gradient {found}: not "
                                 f"finite, so this step was not taken")
    for optimizer, lr in rates.items():
        for group in optimizer.param_groups:
            group["lr"] = lr
        if norms[optimizer] != 0:
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return next(iter(norms.values()))
