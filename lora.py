"""Low-rank adapters (LoRA): learn W + (α/r)·B·A with A (r, in), B (out, r) and W frozen, for large
models on small machines.

    add_lora(model, rank)         freezes the model and adapts its blocks' matrices; the optimizer
                                  is made after it
    with adapters_off(model):     the model as it was: DPO's and PPO's reference without a copy
    merge_lora(model)             plain weights again (`save_model` merges a copy)

B starts at zero, so at first the adapted model is the model. AdamW then keeps its two moments for A
and B alone.

Embeddings and output head stay as they are. A base model whose chat tokens are new learns them
badly this way (Tinytown's base: after SFT with rank 8 six responses of ten end by themselves, after
SFT of all weights all but a few): train its SFT in full, or begin with a model that has chat
tokens; the later stages can do with adapters.
"""
import contextlib
import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, Block


class Adapted(nn.Module):
    """A linear layer with a low-rank addition, (..., in) → (..., out)."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.linear, self.scale, self.on = linear, alpha / rank, True
        out, width = linear.weight.shape
        like = dict(dtype=linear.weight.dtype, device=linear.weight.device)
        self.a = nn.Parameter(torch.randn(rank, width, **like) / math.sqrt(width))
        self.b = nn.Parameter(torch.zeros(out, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + self.scale * F.linear(F.linear(x, self.a), self.b) if self.on else y


def add_lora(model: GPT, rank: int, alpha: float = 0.0) -> None:
    """Freeze the model and put an adapter on every matrix of its blocks. alpha 0: 2·rank."""
    model.requires_grad_(False)
    for block in model.modules():
        if isinstance(block, Block):
            places = ((block.attention, "qkv"), (block.attention, "proj"), (block, "up"),
                      (block, "down"))
            for parent, name in places:
                setattr(parent, name, Adapted(getattr(parent, name), rank, alpha or 2 * rank))


@contextlib.contextmanager
def adapters_off(model: nn.Module):
    """Inside, the model computes what it did before `add_lora`."""
    adapted = [module for module in model.modules() if isinstance(module, Adapted)]
    for module in adapted:
        module.on = False
    try:
        yield
    finally:
        for module in adapted:
            module.on = True


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the weights and take them away: the same function, without them."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Adapted):
                module.linear.weight += module.scale * module.b @ module.a
                setattr(parent, name, module.linear)
    model.requires_grad_(True)


def without_lora(model: nn.Module) -> nn.Module:
    """A merged copy of a model with adapters; the model itself if it has none."""
    if not any(isinstance(module, Adapted) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    merge_lora(model)
    return model


class Reference:
    """The model without its adapters, as a reference for KL: log-probabilities only."""

    def __init__(self, model: GPT):
        self.model = model

    def logprobs(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        with adapters_off(self.model):
            return self.model.logprobs(*args, **kwargs)
