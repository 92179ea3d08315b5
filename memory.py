"""How much memory a run will take, said before it starts rather than by an error an hour later.

    weights, fp32                 4 bytes a parameter, of frozen models too
    gradients and AdamW           4 + 8 bytes a trained parameter
    activations                   what autograd keeps for the backward pass of one forward pass: measured on a few tokens
    logits                        two chunks of them, the gradient of the head's matrix, probabilities that wait (kernels.py)
    keys, values and logits       of what generation holds (PPO), instead of the two lines above

An estimate: libraries, the data and fragmentation come on top, some hundred megabytes.
"""
import sys

import torch
from torch import nn

from common import InputError, Machine, available
from kernels import CHUNK_ELEMENTS, CHUNK_ROWS, KEPT_ELEMENTS
from model import GPT, RewardModel
from parallel import local, parts, reshard, sharded

GIB = 2 ** 30


def most_tokens(batches: list[list[int]], shapes: list[tuple[int, int]], micro_batch: int = 0) -> int:
    """Tokens of this process's largest forward pass, padding included. batches: of numbers of items, cut as `parts` does;
    shapes: (rows, tokens of the longest) that each item takes."""
    return max((sum(shapes[i][0] for i in part) * max(shapes[i][1] for i in part)
                for batch in batches for part in parts(batch, micro_batch)), default=0)


def report_memory(machine: Machine, tokens: int, trained: list[nn.Module], frozen: list[nn.Module] = [], cached: int = 0,
                  rows: int = 0, likelihood: bool = False) -> float:
    """Print on stderr what a run will need, in GiB; warn if that is more than there is, and raise InputError from half as much again on.
    Returns the GiB.

    tokens: of the largest forward pass. trained, frozen: models, which are on the device already. cached: tokens that
    generation holds, in `rows` rows. likelihood: all losses weigh log-probabilities alike, so that no probabilities are kept (kernels.py).
    """
    weights = sum(4 * local(p).numel() for model in (*trained, *frozen) for p in model.parameters())
    states = sum(12 * local(p).numel() for model in trained for p in model.parameters() if p.requires_grad)
    work = sum(activation_bytes(model, tokens, machine, likelihood) for model in trained)
    config = trained[0].config
    width = (config.n_kv_head or config.n_head) * (config.n_embd // config.n_head)
    sampling = 2 * config.n_layer * width * cached * machine.dtype.itemsize + 4 * 4 * rows * config.vocab_size    # four times logits
    work = max(work, sampling)
    room = available(machine.device) / GIB
    print(f"memory: about {(weights + states + work) / GIB:.1f} GiB on {machine.device} (weights {weights / GIB:.1f}, gradients and "
          f"AdamW {states / GIB:.1f}, at most {work / GIB:.1f} for {tokens:,} tokens at once); beside the weights {room:.1f} GiB "
          f"are free", file=sys.stderr)
    if (states + work) / GIB > 1.5 * room:
        raise InputError("that cannot fit: take a smaller model, --micro_batch 1, shorter rows (--max_tokens, --max_new_tokens or "
                         "--window), fewer of them (--batch_size of PPO), or --lora_rank 8")
    if (states + work) / GIB > room:
        print("this may not fit: --micro_batch 1, shorter rows (--max_tokens, --max_new_tokens or --window) and --lora_rank 8 "
              "take less, as far as this script has them", file=sys.stderr)
    return (weights + states + work) / GIB


def activation_bytes(model: nn.Module, tokens: int, machine: Machine, likelihood: bool = False) -> float:
    """Bytes that autograd keeps for a forward pass over `tokens` tokens, logits included; 16-bit copies of weights too.

    Measured on rows of 64 tokens: attention that keeps its T × T weights, as on MPS, takes more in longer ones.
    """
    gpt: GPT = model.gpt if isinstance(model, RewardModel) else model
    weights = {local(p).untyped_storage().data_ptr() for p in gpt.parameters()}
    length = min(64, gpt.config.block_size)

    def kept(rows: int) -> int:
        sizes = {}

        def keep(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), machine.autocast():
            states = (gpt.hidden if model is gpt else model.scalars)(torch.zeros(rows, length, dtype=torch.long, device=machine.device))    # noqa: F841 holds the graph
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    # Dropout must not draw what training would have drawn.
    with torch.random.fork_rng(devices=[machine.device] if machine.device.type == "cuda" else []):
        few, more = kept(4), kept(8)                         # what grows with the tokens, and what does not
    size = (more - few) * tokens / (4 * length)
    if not sharded(model):                                   # there the rest is weights that stand together for a moment
        size += few - (more - few)
    reshard(model)
    if model is gpt:
        V = gpt.config.vocab_size
        rows = min(tokens, max(CHUNK_ROWS, CHUNK_ELEMENTS // V))
        size += 2 * 4 * rows * V + 4 * gpt.output_weight.numel() + (0 if likelihood else 4 * min(tokens * V, KEPT_ELEMENTS))
    return max(size, 0)
