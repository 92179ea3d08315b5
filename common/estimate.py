"""How much memory a run will take, said before it starts rather than by an error an hour later.

    weights, fp32                 4 bytes a parameter, of frozen models too
    gradients and AdamW           4 + 8 bytes a trained parameter
    activations                   what autograd keeps of one forward pass: measured on a few tokens
    logits                        two chunks of them, the gradient of the head's matrix,
                                  probabilities that wait (kernels.py)
    keys, values and logits       of what generation holds (PPO), instead of the two lines above

An estimate: libraries, the data and fragmentation come on top, some hundred megabytes.
"""
import sys

import torch
from torch import nn

from common.errors import InputError
from common.machine import available
from common.parallel import reshard, sharded_modules, share, to_local
from kernels import CHUNK_ELEMENTS, CHUNK_ROWS, KEPT_ELEMENTS
from model import GPT

GIB = 2 ** 30
SMALLER = "shorter rows (--max_tokens, --max_new_tokens or --window)"


def most_tokens(plan: list[list[tuple[int, int]]], micro_batch: int = 0) -> int:
    """Tokens of this process's largest forward pass, padding included. plan: for every batch, the
    (rows, tokens of the longest) that each of its items takes."""
    most = 0
    for batch in plan:
        mine = share(batch)
        size = micro_batch or len(mine) or 1
        for start in range(0, len(mine), size):
            rows, lengths = zip(*mine[start:start + size])
            most = max(most, sum(rows) * max(lengths))
    return most


def report_memory(tokens: int, trained: list[nn.Module], frozen: list[nn.Module] = [],
                  cached: int = 0, rows: int = 0, likelihood: bool = False) -> float:
    """Print on stderr what a run will need, in GiB; warn if that is more than there is, and raise
    InputError from half as much again on. Returns the GiB.

    tokens: of the largest forward pass. trained, frozen: models, which are on the device already.
    cached: tokens that generation holds, in `rows` rows. likelihood: all losses weigh
    log-probabilities alike, so that no probabilities are kept (kernels.py).
    """
    weights = sum(4 * to_local(p).numel() for model in (*trained, *frozen)
                  for p in model.parameters())
    states = sum(12 * to_local(p).numel() for model in trained
                 for p in model.parameters() if p.requires_grad)
    work = sum(activation_bytes(model, tokens, likelihood) for model in trained)
    gpt = gpt_of(trained[0])
    config, device = gpt.config, gpt.wte.weight.device
    width = (config.n_kv_head or config.n_head) * (config.n_embd // config.n_head)
    keys_and_values = 2 * config.n_layer * width * cached * gpt.compute_dtype.itemsize
    work = max(work, keys_and_values + 4 * 4 * rows * config.vocab_size)       # four times logits
    total, room = (weights + states + work) / GIB, available(device) / GIB
    print(f"memory: about {total:.1f} GiB on {device} (weights {weights / GIB:.1f}, gradients and "
          f"AdamW {states / GIB:.1f}, at most {work / GIB:.1f} for {tokens:,} tokens at once); "
          f"beside the weights {room:.1f} GiB are free", file=sys.stderr)
    if (states + work) / GIB > 1.5 * room:
        raise InputError(f"that cannot fit: take a smaller model, --micro_batch 1, {SMALLER}, "
                         f"fewer of them (--batch_size of PPO), or --lora_rank 8")
    if (states + work) / GIB > room:
        print(f"this may not fit: --micro_batch 1, {SMALLER} and --lora_rank 8 take less, as far "
              f"as this script has them", file=sys.stderr)
    return total


def activation_bytes(model: nn.Module, tokens: int, likelihood: bool = False) -> float:
    """Bytes that autograd keeps for a forward pass over `tokens` tokens, logits included; 16-bit
    copies of weights too.

    Measured on rows of 64 tokens: attention that keeps its T × T weights, as on MPS, takes more in
    longer ones.
    """
    gpt = gpt_of(model)
    weights = {to_local(p).untyped_storage().data_ptr() for p in gpt.parameters()}
    length, device = min(64, gpt.config.block_size), gpt.wte.weight.device
    forward = gpt.hidden if model is gpt else model.scalars

    def kept(rows: int) -> int:
        storages = {}

        def keep(x):                       # not x itself, which would hold the graph that holds it
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()

        row = torch.zeros(rows, length, dtype=torch.long, device=device)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), gpt.autocast():
            forward(row)
        return sum(storage.nbytes() for pointer, storage in storages.items()
                   if pointer not in weights)

    # Dropout must not draw what training would have drawn.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        few, more = kept(4), kept(8)                         # what grows with the tokens, or not
    size = (more - few) * tokens / (4 * length)
    if not sharded_modules(model):              # else the rest is weights, together for a moment
        size += few - (more - few)
    reshard(model)
    if model is gpt:
        V = gpt.config.vocab_size
        rows = min(tokens, max(CHUNK_ROWS, CHUNK_ELEMENTS // V))
        size += 2 * 4 * rows * V + 4 * gpt.output_weight.numel()
        size += 0 if likelihood else 4 * min(tokens * V, KEPT_ELEMENTS)
    return max(size, 0)


def gpt_of(model: nn.Module) -> GPT:
    """The language model in a model with a scalar head; the model itself if it is one."""
    return getattr(model, "gpt", model)
