"""`token_logprobs` at GPT-2's head, 2,048 tokens × 50,257 entries, width 768, fp32, forward and
backward: time and extra peak memory, against the whole logits and PyTorch's own
`linear_cross_entropy`, with and without its chunks.

    python -m bench.kernel                  every contestant, in turn
    python -m bench.kernel --memory NAME    one contestant once: megabytes that its process grew by
"""
import argparse
import ctypes
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import nn

from bench.compare import emit, interleave, missing, row
from kernels import CHUNK_ROWS, token_logprobs

TOKENS, WIDTH, VOCABULARY, ROUNDS = 2048, 768, 50257, 7


def inputs():
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = (0.02 * torch.randn(VOCABULARY, WIDTH)).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,))


# ----------------------------------------------------------------------------- contestants

def ours(hidden, weight, targets):
    return -token_logprobs(hidden, weight, targets, equal_weights=True)[0].mean()


def ours_any_loss(hidden, weight, targets):
    return -token_logprobs(hidden, weight, targets)[0].mean()


def whole_logits(hidden, weight, targets):
    return F.cross_entropy(hidden @ weight.T, targets)


def in_chunks(rows: int | None = None):
    """PyTorch's own loss in chunks of so many rows; None: as many as it chooses for the shape."""
    def loss(hidden, weight, targets):
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return F.linear_cross_entropy(hidden, weight, targets, options=options)
    return loss


# What PyTorch has of its own, where it has it. Without options it forms the whole logits, as
# F.cross_entropy does.
PYTORCH = {}
NAMES = ("F.linear_cross_entropy without options (whole logits)",
         "F.linear_cross_entropy in chunks that it chooses",
         f"F.linear_cross_entropy in chunks of {CHUNK_ROWS} rows")
if hasattr(F, "linear_cross_entropy"):
    PYTORCH[NAMES[0]] = F.linear_cross_entropy
if hasattr(nn, "LinearCrossEntropyOptions"):
    PYTORCH |= {NAMES[1]: in_chunks(), NAMES[2]: in_chunks(CHUNK_ROWS)}

WHOLE = "F.cross_entropy on whole logits"
OURS = {"a likelihood's weights": ours, "any loss": ours_any_loss}
CONTESTANTS = {**OURS, WHOLE: whole_logits, **PYTORCH}


# ----------------------------------------------------------------------------- memory

def resident(what: str) -> float:
    """MiB of this process: VmRSS, its memory now, or VmHWM, its peak.

    (getrusage would count the parent's peak.)
    """
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what)) / 1024


def memory(name: str) -> float:
    """MiB by which this process's peak grows over inputs in one run of the contestant, forward and
    backward."""
    arguments = inputs()
    small = [torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True),
             torch.randint(9, (4,))]
    CONTESTANTS[name](*small).backward()                        # libraries loaded
    ctypes.CDLL(None).malloc_trim(0)
    now = resident("VmRSS")
    CONTESTANTS[name](*arguments).backward()
    return resident("VmHWM") - now


def memory_alone(name: str) -> float:
    """`memory` of a contestant in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "bench.kernel", "--memory", name],
                          stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


# ----------------------------------------------------------------------------- all of it

def main() -> None:
    arguments = inputs()

    def timed(function):
        def run():
            function(*arguments).backward()
            arguments[0].grad = arguments[1].grad = None
        return run

    values = {name: function(*arguments).item() for name, function in CONTESTANTS.items()}
    assert max(values.values()) - min(values.values()) < 1e-4, values
    seconds = interleave({name: timed(function) for name, function in CONTESTANTS.items()}, ROUNDS)
    peaks = {name: memory_alone(name) for name in CONTESTANTS}
    for mine in OURS:
        for peer in (WHOLE, *NAMES):
            if peer not in CONTESTANTS:
                emit(missing(f"token_logprobs, {mine}", peer, "this PyTorch has none"))
                continue
            barred = OURS[mine] is ours and peer == WHOLE
            bar, aim = (1.0, 1 / 0.9) if barred else (None, None)
            emit(row(f"token_logprobs 50,257 × 768, 2,048 tokens, forward + backward, {mine}: time",
                     peer, seconds[mine], seconds[peer], TOKENS, "tokens/s", bar, aim))
            less = peaks[peer] / peaks[mine]
            bar, aim = (2.5, 5.0) if barred else (None, None)
            emit({"piece": "the same: extra peak memory, times less", "against": peer,
                  "ratio": round(less, 3), "range": None, "bar": bar, "aim": aim,
                  "ours": round(peaks[mine]), "theirs": round(peaks[peer]), "unit": "MiB",
                  "note": f"{1 / less:.2f} of the peer's memory"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", choices=list(CONTESTANTS))
    name = parser.parse_args().memory
    print(memory(name)) if name else main()
