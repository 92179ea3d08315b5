"""On a GPU: check every kernel against float64, then time kernels, training, generation and a PPO
step. One command.

    python -m bench.gpu           writes bench/GPU.md and prints it; under eight minutes

Peers for the kernel: whole logits with F.cross_entropy, PyTorch's linear_cross_entropy with and
without its chunks, and Liger where it is installed.
"""
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import kernels
import train_ppo
from bench.kernel import PYTORCH
from bench.trainers_data import checkpoints, written
from common.run import adamw
from model import GPT, GPTConfig
from train_base import pretraining_loss

SIZES = {"124 M": (12, 12, 768), "350 M": (24, 16, 1024)}          # layers, heads, width
VOCABULARY, CONTEXT = 50304, 1024
LINES: list[str] = []


def say(*cells) -> None:
    """One row of the table, printed as it comes."""
    LINES.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    print(LINES[-1], flush=True)


def seconds(function, rounds: int = 7) -> float:
    """Median time of a call on the GPU, after two unmeasured ones."""
    times = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def peak(function) -> float:
    """MiB that a call adds to the memory in use, at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def relative_errors(found: tuple, exact: tuple) -> list[float]:
    """‖x − y‖ / ‖y‖ of each tensor."""
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, exact)]


def short(errors: list[float]) -> str:
    return ", ".join(f"{error:.1e}" for error in errors)


def check_kernels() -> None:
    """Errors of the Triton pair against float64, beside those of plain PyTorch at its precision."""
    for N, C, V in ((1, 64, 50257), (333, 768, 50257), (2048, 128, 1025)):
        torch.manual_seed(N)
        hidden = torch.randn(N, C, device="cuda").bfloat16()
        weight = (0.1 * torch.randn(V, C, device="cuda")).bfloat16()
        targets, upstream = torch.randint(V, (N,), device="cuda"), torch.randn(2, N, device="cuda")

        def run(function, h, w, up):
            h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
            logprobs, entropy = function(h, w, targets, 0.8)
            (logprobs * up[0] + entropy * up[1]).sum().backward()
            return logprobs.detach(), entropy.detach(), h.grad, w.grad

        found = run(kernels.token_logprobs, hidden, weight, upstream)
        plain = run(kernels.token_logprobs_reference, hidden, weight, upstream)
        exact = run(kernels.token_logprobs_reference, hidden.double(), weight.double(),
                    upstream.double())
        ours, theirs = relative_errors(found, exact), relative_errors(plain, exact)
        right = all(mine <= 2 * plain_error for mine, plain_error in zip(ours, theirs))
        say(f"token_logprobs {N} × {C} × {V}, error against float64",
            "log p, entropy, ∂hidden, ∂weight", short(ours), "plain bf16: " + short(theirs),
            "right" if right else "WRONG")


def time_kernels() -> None:
    """Forward and backward of the head at GPT-2's size on 8,192 tokens, bf16."""
    torch.manual_seed(0)
    N, C = 8192, 768
    hidden = torch.randn(N, C, device="cuda").bfloat16().requires_grad_()
    weight = (0.02 * torch.randn(VOCABULARY, C, device="cuda")).bfloat16().requires_grad_()
    targets = torch.randint(VOCABULARY, (N,), device="cuda")

    def ours(hidden, weight, targets):
        return -kernels.token_logprobs(hidden, weight, targets)[0].mean()

    def whole_logits(hidden, weight, targets):
        return F.cross_entropy((hidden @ weight.T).float(), targets)

    contestants = {"ours": ours, "F.cross_entropy on whole logits": whole_logits, **PYTORCH}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        liger = LigerFusedLinearCrossEntropyLoss()
        contestants["Liger"] = lambda hidden, weight, targets: liger(weight, hidden, targets)
    except ImportError:
        pass

    def step(loss):
        def run():
            loss(hidden, weight, targets).backward()
            hidden.grad = weight.grad = None
        return run

    for name, loss in contestants.items():
        say(f"head, {N} tokens × {VOCABULARY}, bf16, forward + backward", name,
            f"{seconds(step(loss)) * 1e3:.2f} ms", f"{peak(step(loss)):.0f} MiB", "")


def matmul_rate() -> float:
    """Floating-point operations a second of a large bf16 matrix product."""
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    return 2 * 8192 ** 3 / seconds(lambda: a @ b)


def bandwidth() -> float:
    """Bytes a second read and written by a copy of 2 GiB."""
    a = torch.empty(2 ** 30, dtype=torch.bfloat16, device="cuda")
    b = torch.empty_like(a)
    return 2 * 2 ** 31 / seconds(lambda: b.copy_(a))


def training(rate: float) -> None:
    """A training step in bf16 autocast with fp32 weights, eager and compiled block by block."""
    for name, (layers, heads, width) in SIZES.items():
        for compiled in (False, True):
            model = GPT(GPTConfig(CONTEXT, VOCABULARY, layers, heads, width)).cuda()
            model.compute_dtype = torch.bfloat16
            if compiled:
                for block in model.blocks:
                    block.compile()
            optimizer = adamw(model, 1e-4)
            tokens = torch.randint(0, 50000, (8, CONTEXT), device="cuda")
            mask = torch.ones_like(tokens, dtype=torch.bool)
            mask[:, 0] = False

            def step():
                pretraining_loss(model.loglikelihood(tokens, mask), mask).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            took = seconds(step, 5)
            weights = layers * 12 * width ** 2 + VOCABULARY * width
            flops = tokens.numel() * (6 * weights + 12 * layers * width * CONTEXT)
            say(f"training step {name}, 8 × {CONTEXT}, bf16" + (", compiled" if compiled else ""),
                "", f"{tokens.numel() / took:,.0f} tokens/s", f"{peak(step):,.0f} MiB",
                f"{flops / took / rate:.0%} of a matrix product ({rate / 1e12:.0f} TFLOP/s)")


def generation(rate: float) -> None:
    """64 new tokens after 64, bf16 weights; the limit is to read all weights and the cache once a
    step."""
    layers, heads, width = SIZES["124 M"]
    model = GPT(GPTConfig(CONTEXT, VOCABULARY, layers, heads, width)).cuda().bfloat16().eval()
    for batch in (1, 16, 64):
        prompts = torch.randint(1, 50000, (batch, 64)).tolist()
        took = seconds(lambda: model.generate(prompts, 64, temperature=0.7), 3)
        weights = 2 * sum(p.numel() for p in model.parameters())               # bytes in bf16
        cache = 2 * batch * 96 * layers * 2 * width         # keys and values of 96 tokens, the mean
        say(f"generation 124 M, batch {batch}, bf16", "", f"{batch * 64 / took:,.0f} tokens/s", "",
            f"{64 * (weights + cache) / rate / took:.0%} of the bandwidth limit "
            f"({rate / 1e9:.0f} GB/s)")


def ppo() -> None:
    """A PPO step of the script on a small model, whole."""
    folder = Path(tempfile.mkdtemp())
    pairs, _, _ = written(folder, 256)
    checkpoints(folder)
    steps = 6
    start = time.perf_counter()
    train_ppo.train(train_ppo.Config(
        data=(str(pairs),), init=str(folder / "sft"), reward=str(folder / "rm"),
        out=str(folder / "ppo"), overwrite=True, steps=steps, batch_size=256, minibatches=1,
        inner_epochs=4, max_new_tokens=32, ptx_coef=0.0, device="cuda"))
    say("PPO, 256 episodes of 64 + 32 tokens, 4 inner epochs", "whole run, loading included",
        f"{steps * 256 / (time.perf_counter() - start):,.0f} episodes/s", "", "")


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("no GPU here: nothing measured, nothing written")
    LINES.append("| measured | against | figure | memory | note |")
    LINES.append("|---|---|---|---|---|")
    check_kernels()
    time_kernels()
    rate = matmul_rate()
    training(rate)
    generation(bandwidth())
    ppo()
    text = (f"{torch.cuda.get_device_name()}, torch {torch.__version__}. "
            "`python -m bench.gpu`.\n\n" + "\n".join(LINES) + "\n")
    (Path(__file__).parent / "GPU.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
