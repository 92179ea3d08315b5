"""Several processes, one run: `torchrun --nproc_per_node=2 train_sft.py …` trains what one would.

    share(batch)          the rows of a step's batch that this process computes
    all_gather(items)     its opposite: what the processes made of their rows, back in order
    all_reduce(number)    a sum, over all processes, of what each computed from its rows
    place(model, …)       a model on this process's device; with --shard, only its part of it

Every process reads the same data and draws the same random numbers, so each knows the whole batch
of a step and divides its loss by the whole batch's tokens, rankings or windows; gradients are then
sums over processes (`sum_gradients`), not means. Rank 0 alone writes. In a run of one process all
of this does nothing.
"""
import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ           # by torchrun
if LAUNCHED:              # these imports take almost a second, which one process need not wait for
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor, distribute_tensor


def world() -> int:
    """How many processes this run has."""
    return dist.get_world_size() if LAUNCHED and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if LAUNCHED and dist.is_initialized() else 0


@contextlib.contextmanager
def processes():
    """Inside, the processes that torchrun has started know each other: gloo between CPUs, NCCL
    between GPUs. Only rank 0 talks."""
    if not LAUNCHED:
        yield
        return
    if torch.cuda.is_available():                        # more processes than GPUs: on CPUs only
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # One process may encode text for hours; a dead one is noticed at once.
    dist.init_process_group(timeout=timedelta(days=1))
    streams = sys.stdout, sys.stderr
    try:
        if rank() > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
        yield
        dist.destroy_process_group()
    finally:
        sys.stdout, sys.stderr = streams


def leave() -> None:
    """End a process that torchrun has started, at once.

    Sharding keeps gloo's threads beyond their group, and one of them that still lets go of a tensor
    while Python shuts down aborts the process: torchrun would call a finished run failed.
    """
    if LAUNCHED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# ----------------------------------------------------------------------------- rows and numbers

def share(rows):
    """This process's rows of a list or tensor: every world-th one. Shares may differ by a row."""
    return rows[rank()::world()]


def all_gather(items: list) -> list:
    """The items of all processes in the order in which `share` dealt them out."""
    if world() == 1:
        return items
    lists = [None] * world()
    dist.all_gather_object(lists, items)
    longest = max(map(len, lists))
    return [each[i] for i in range(longest) for each in lists if i < len(each)]


def all_reduce(x):
    """A number or tensor, summed over all processes."""
    if world() == 1:
        return x
    total = x.clone() if torch.is_tensor(x) else torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(total)
    return total if torch.is_tensor(x) else total.item()


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum each gradient over all processes.

    A gradient that is missing everywhere stays so; here alone, it counts as zero. Those of sharded
    weights have been summed by the backward pass.
    """
    if world() == 1:
        return
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    if not plain:
        return
    there = torch.tensor([float(p.grad is not None) for p in plain], device=plain[0].device)
    gradients = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in plain]
    flat = torch.cat([*gradients, there])
    dist.all_reduce(flat)
    *gradients, there = flat.split([p.numel() for p in plain] + [len(plain)])
    for p, gradient, count in zip(plain, gradients, there.tolist()):
        p.grad = gradient.view_as(p) if count else None


# ----------------------------------------------------------------------------- models

def place(model: nn.Module, device: torch.device, seed: int, shard: bool = False) -> nn.Module:
    """The model on this process's device, with rank 0's weights.

    shard: fully_shard, each process keeping its part of weights, gradients and moments; blocks are
    put together when they compute. Dropout draws other numbers on every process.
    """
    if world() == 1:
        return model.to(device)
    if not shard:
        model.to(device)
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.data, 0)
    if shard:
        mesh = init_device_mesh(device.type, (world(),))
        for block in (model.gpt if hasattr(model, "gpt") else model).blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh).to(device)
        for method in ("hidden", "scalars"):              # where computation enters a model
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)
        for module in sharded_modules(model):
            module.set_gradient_divide_factor(1.0)        # sums, as above
            module.set_force_sum_reduction_for_comms(True)
    if rank() > 0:
        torch.manual_seed(seed + rank())
    return model


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that keep their weights in pieces."""
    return [m for m in model.modules() if isinstance(m, FSDPModule)] if world() > 1 else []


def reshard(model: nn.Module) -> None:
    """Take a sharded model apart again after passes without a backward pass, which leave some
    weights together."""
    for module in sharded_modules(model):
        module.reshard()


@contextlib.contextmanager
def unsharded(model: nn.Module | None):
    """Inside, the weights of a sharded model are whole, so that processes may call it a different
    number of times."""
    modules = [] if model is None else sharded_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


def to_local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if world() > 1 and isinstance(tensor, DTensor) else tensor


def full_tensors(state):
    """The same nested dicts and lists, sharded tensors in them put together on rank 0's CPU, one
    at a time, and empty elsewhere. To be called by all processes."""
    if world() == 1:
        return state
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if rank() == 0 else torch.empty(0)
    if isinstance(state, dict):
        return {key: full_tensors(value) for key, value in state.items()}
    return type(state)(map(full_tensors, state)) if isinstance(state, (list, tuple)) else state


def shard_like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, cut as `other` is if that is sharded."""
    if world() > 1 and isinstance(other, DTensor) and value.shape == other.shape:
        return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)
    return value
