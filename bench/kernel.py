"""`token_logprobs` at GPT-2's head, 2,048 tokens × 50,257 entries, width 768, fp32, forward and backward: time and extra
peak memory, against the whole logits and PyTorch's own `linear_cross_entropy`.

    python -m bench.kernel                  every contestant, in turn
    python -m bench.kernel --memory NAME    one contestant once: megabytes that its process grew by
"""
import argparse
import ctypes
import subprocess
import sys

import torch
import torch.nn.functional as F

from bench.compare import emit, interleave, missing, row
from kernels import token_logprobs

TOKENS, WIDTH, VOCABULARY, ROUNDS = 2048, 768, 50257, 7


def inputs():
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = (0.02 * torch.randn(VOCABULARY, WIDTH)).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,))


def ours(hidden, weight, targets):
    return -token_logprobs(hidden, weight, targets, equal_weights=True)[0].mean()


def ours_any_loss(hidden, weight, targets):
    return -token_logprobs(hidden, weight, targets)[0].mean()


def whole_logits(hidden, weight, targets):
    return F.cross_entropy(hidden @ weight.T, targets)


def linear_cross_entropy(hidden, weight, targets):
    return F.linear_cross_entropy(hidden, weight, targets)


CONTESTANTS = {function.__name__: function for function in (ours, ours_any_loss, whole_logits, linear_cross_entropy)
               if function is not linear_cross_entropy or hasattr(F, "linear_cross_entropy")}


def resident(what: str) -> float:
    """VmRSS, the memory of this process now, or VmHWM, its peak; MiB. (getrusage would count the parent's peak.)"""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what)) / 1024


def memory(name: str) -> float:
    """MiB by which this process's peak grows over inputs when the contestant runs once, forward and backward."""
    arguments = inputs()
    small = [torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True), torch.randint(9, (4,))]
    CONTESTANTS[name](*small).backward()                        # libraries loaded
    ctypes.CDLL(None).malloc_trim(0)
    now = resident("VmRSS")
    CONTESTANTS[name](*arguments).backward()
    return resident("VmHWM") - now


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
    peaks = {name: float(subprocess.run([sys.executable, "-m", "bench.kernel", "--memory", name], capture_output=True, text=True,
                                        check=True).stdout) for name in CONTESTANTS}
    for mine, what in (("ours", "a likelihood's weights"), ("ours_any_loss", "any loss")):
        for peer, label in (("whole_logits", "F.cross_entropy on whole logits"), ("linear_cross_entropy", "F.linear_cross_entropy")):
            if peer not in CONTESTANTS:
                emit(missing(f"token_logprobs, {what}", label, "this PyTorch has none"))
                continue
            barred = mine == "ours" and peer == "whole_logits"
            emit(row(f"token_logprobs 50,257 × 768, 2,048 tokens, forward + backward, {what}: time", label, seconds[mine],
                     seconds[peer], TOKENS, "tokens/s", *((1.0, 1 / 0.9) if barred else (None, None))))
            less = peaks[peer] / peaks[mine]
            emit({"piece": "the same: extra peak memory, times less", "against": label, "ratio": round(less, 3), "range": None,
                  "bar": 2.5 if barred else None, "aim": 5.0 if barred else None, "ours": round(peaks[mine]),
                  "theirs": round(peaks[peer]), "unit": "MiB", "note": f"{1 / less:.2f} of the peer's memory"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", choices=list(CONTESTANTS))
    name = parser.parse_args().memory
    print(memory(name)) if name else main()
