"""On a GPU: check every kernel against float64, then time the head, training, generation and a PPO
step, and stop and resume every stage. One command.

    python -m bench.gpu              writes bench/GPU.md and prints it
    python -m bench.gpu --rehearse   the same, tiny and on the CPU: only whether it runs; nothing is
                                     written

Peers for the head: the three products alone, whole logits with F.cross_entropy, PyTorch's
linear_cross_entropy in chunks, a compiled plain version in chunks, Liger and QuACK where they are
installed; for generation: transformers, where it is installed.
"""
import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
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

REHEARSAL = not torch.cuda.is_available()
DEVICE = "cpu" if REHEARSAL else "cuda"
PEAK = 989e12          # bf16 products without sparsity of an H100 or H200 (SXM), FLOP/s, NVIDIA
# tokens, width, vocabulary of a head; rows of (layers, heads, width, vocabulary, context, batch)
HEADS = [(64, 32, 300)] if REHEARSAL else [(8192, 768, 50304), (8192, 4096, 151936)]
MODELS = ({"tiny": (2, 2, 32, 512, 64, 2)} if REHEARSAL else
          {"124 M": (12, 12, 768, 50304, 1024, 32), "350 M": (24, 16, 1024, 50304, 1024, 16)})
BATCHES = (1, 4) if REHEARSAL else (1, 64, 512)
NEW = 8 if REHEARSAL else 64
LINES: list[str] = []


def say(*cells) -> None:
    """One row of the table, printed as it comes."""
    LINES.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    print(LINES[-1], flush=True)


# ----------------------------------------------------------------------------- measuring

def wait() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


def seconds(function, rounds: int = 7) -> float:
    """Median time of a call, after two unmeasured ones."""
    times = []
    for _ in range(2 + (1 if REHEARSAL else rounds)):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def peak(function) -> float:
    """MiB that a call adds to the memory in use, at its peak; 0 in a rehearsal."""
    if REHEARSAL:
        return 0.0
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    wait()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def matmul_rate() -> float:
    """Floating-point operations a second of a large bf16 matrix product."""
    size = 64 if REHEARSAL else 8192
    a, b = torch.randn(2, size, size, device=DEVICE).bfloat16()
    return 2 * size ** 3 / seconds(lambda: a @ b)


def bandwidth() -> float:
    """Bytes a second read and written by a copy."""
    a = torch.empty(2 ** (10 if REHEARSAL else 30), dtype=torch.bfloat16, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * 2 * a.numel() / seconds(lambda: b.copy_(a))


# ----------------------------------------------------------------------------- right

def relative_errors(found: tuple, exact: tuple) -> list[float]:
    """‖x − y‖ / ‖y‖ of each tensor."""
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, exact)]


def check_kernels() -> None:
    """Errors of the kernels against float64, beside those of plain PyTorch in the same type; no
    log-probability above 0, where one token has nearly all of it either."""
    shapes = [(1, 16, 129), (33, 20, 257)] if REHEARSAL else [
        (1, 64, 50257), (333, 768, 50257), (2048, 128, 1025), (1000, 776, 151936)]
    for dtype in (torch.bfloat16, torch.float16):
        for N, C, V in shapes:
            torch.manual_seed(N)
            hidden = torch.randn(N, C, device=DEVICE).to(dtype)
            weight = (0.1 * torch.randn(V, C, device=DEVICE)).to(dtype)
            targets = torch.randint(V, (N,), device=DEVICE)
            if N > 1:
                weight[targets[0]] = 4 * hidden[0]                   # p ≈ 1
            upstream = torch.randn(2, N, device=DEVICE)

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
            right = (all(mine <= 2 * other + 1e-6 for mine, other in zip(ours, theirs))
                     and bool((found[0] <= 0).all()))
            name = str(dtype).removeprefix("torch.")
            say(f"token_logprobs {N} × {C} × {V}, {name}: error against float64",
                "log p, entropy, ∂hidden, ∂weight", ", ".join(f"{x:.1e}" for x in ours),
                "plain: " + ", ".join(f"{x:.1e}" for x in theirs), "right" if right else "WRONG")


def check_stages() -> None:
    """Every stage on this device: stopped in the middle and resumed, it ends; one process under
    torchrun ends with the figures of one without."""
    folder = Path(tempfile.mkdtemp())
    pairs, one, _ = written(folder, 64)
    checkpoints(folder)
    text = folder / "text.txt"
    text.write_text("Ada lives in the mill.\n\n" * 2000)
    steps = "--steps 120".split()
    base = ["train_base.py", "--tokenizer", "tinytown", "--block_size", "64", "--data", str(text)]
    tuned = ["--init", str(folder / "sft"), "--data", str(pairs)]
    held_out = ["--val", str(one), "--epochs", "20"]
    stages = {"base": [*base, *steps], "sft": ["train_sft.py", *tuned, *held_out],
              "rm": ["train_rm.py", *tuned, *held_out], "dpo": ["train_dpo.py", *tuned, *held_out],
              "ppo": ["train_ppo.py", *tuned, "--reward", str(folder / "rm"), "--ptx_coef", "0",
                      *steps]}
    for name, command in stages.items():
        command = [sys.executable, *command, "--device", DEVICE,
                   "--out", str(folder / "new" / name)]
        with open(folder / f"{name}.log", "w") as log:
            first = subprocess.Popen(command, stderr=log, stdout=log)
        metrics = folder / "new" / name / "metrics.jsonl"
        while first.poll() is None and not (metrics.exists()
                                            and metrics.read_text().count("\n") > 5):
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)
        stopped = first.wait() != 0
        again = subprocess.run([*command, "--resume"], capture_output=True, text=True)
        right = stopped and again.returncode == 0
        say(f"{name}: stopped after some steps, resumed", "", "", "",
            "right" if right else "WRONG: " + again.stderr[-300:].replace("\n", " "))
    for preset in () if REHEARSAL else ("gpt2", "t4"):
        done = subprocess.run([sys.executable, *base[:1], "--preset", preset, "--tokenizer",
                               "tinytown", *base[5:], "--steps", "2", "--out",
                               str(folder / preset)], capture_output=True, text=True)
        say(f"base, --preset {preset}, two steps", "", done.stdout.strip()[-60:], "",
            "right" if done.returncode == 0 else "WRONG: " + done.stderr[-300:])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1"]
    found = []
    for place, launcher in (("alone", [sys.executable]), ("torchrun", torchrun)):
        done = subprocess.run([*launcher, *base, "--steps", "20", "--device", DEVICE, "--out",
                               str(folder / place)], capture_output=True, text=True)
        found.append(done.stdout.split(" ")[0])                     # val_loss=…
    say("base under torchrun, one process, against none", found[0], found[1], "",
        "right" if found[0] == found[1] != "" else "WRONG")


# ----------------------------------------------------------------------------- fast

def plain_in_chunks(hidden, weight, targets):
    """The mean loss in chunks of 1,024 tokens, each formed again in the backward pass."""
    def chunk(h, t):
        return F.cross_entropy((h @ weight.T).float(), t, reduction="sum")
    parts = [torch.utils.checkpoint.checkpoint(chunk, h, t, use_reentrant=False)
             for h, t in zip(hidden.split(1024), targets.split(1024))]
    return sum(parts) / len(targets)


def heads() -> dict:
    """Name → loss of (hidden, weight, targets): who computes a head's loss and its gradients."""
    def ours(hidden, weight, targets):
        return -kernels.token_logprobs(hidden, weight, targets)[0].mean()

    def with_entropy(hidden, weight, targets):
        logprobs, entropy = kernels.token_logprobs(hidden, weight, targets)
        return -(logprobs + 0.01 * entropy).mean()

    def whole_logits(hidden, weight, targets):
        return F.cross_entropy((hidden @ weight.T).float(), targets)

    found = {"ours": ours, "ours, the entropy's gradient too": with_entropy,
             "F.cross_entropy on whole logits": whole_logits, **PYTORCH,
             "plain in chunks, compiled": torch.compile(plain_in_chunks)}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        liger = LigerFusedLinearCrossEntropyLoss()
        found[f"Liger {metadata.version('liger-kernel')}"] = (
            lambda hidden, weight, targets: liger(weight, hidden, targets))
    except ImportError:
        pass
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
        found[f"QuACK {metadata.version('quack-kernels')}"] = (
            lambda hidden, weight, targets: chunked_linear_cross_entropy(hidden, weight, targets))
    except ImportError:
        pass
    return found


def time_heads() -> None:
    """Forward and backward in bf16, beside the three products that no head can do without."""
    for N, C, V in HEADS:
        torch.manual_seed(0)
        hidden = torch.randn(N, C, device=DEVICE).bfloat16().requires_grad_()
        weight = (0.02 * torch.randn(V, C, device=DEVICE)).bfloat16().requires_grad_()
        targets = torch.randint(V, (N,), device=DEVICE)
        piece = f"head, {N} × {C} × {V}, bf16, forward + backward"

        def products():
            with torch.no_grad():
                logits = hidden @ weight.T
                return logits @ weight, logits.T @ hidden

        bare = seconds(products)
        say(piece, "the three products alone", f"{bare * 1e3:.2f} ms", "", "")
        whole = None
        for name, loss in heads().items():
            def run():
                loss(hidden, weight, targets).backward()
                hidden.grad = weight.grad = None
            try:
                took, memory = seconds(run), peak(run)
            except Exception as error:             # a peer that this machine does not suit
                say(piece, name, "", "", f"{type(error).__name__}: {str(error)[:80]}")
                continue
            if name.startswith("F.cross_entropy"):
                whole = memory
            share = f", {memory / whole:.2f} of whole logits" if whole else ""
            say(piece, name, f"{took * 1e3:.2f} ms", f"{memory:,.0f} MiB{share}",
                f"{took / bare:.2f} × the products")


def time_training(rate: float) -> None:
    """A training step in bf16 autocast with fp32 weights, eager and compiled block by block."""
    for name, (layers, heads_, width, vocabulary, context, batch) in MODELS.items():
        for compiled in (False, True):
            model = GPT(GPTConfig(context, vocabulary, layers, heads_, width)).to(DEVICE)
            model.compute_dtype = torch.bfloat16
            if compiled:
                for block in model.blocks:
                    block.compile()
            optimizer = adamw(model, 1e-4)
            tokens = torch.randint(0, vocabulary, (batch, context), device=DEVICE)
            mask = torch.ones_like(tokens, dtype=torch.bool)
            mask[:, 0] = False

            def step():
                pretraining_loss(model.loglikelihood(tokens, mask), mask).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            took = seconds(step, 5)
            weights = layers * 12 * width ** 2 + vocabulary * width
            flops = tokens.numel() * (6 * weights + 12 * layers * width * context)
            say(f"training step {name}, {batch} × {context}, bf16"
                + (", compiled" if compiled else ""), "", f"{tokens.numel() / took:,.0f} tokens/s",
                f"{peak(step):,.0f} MiB",
                f"{flops / took / PEAK:.0%} of {PEAK / 1e12:.0f} TFLOP/s (MFU), "
                f"{flops / took / rate:.0%} of a product's {rate / 1e12:.0f}")


def time_generation(rate: float) -> None:
    """New tokens after as many, bf16 weights; the limit is to read all weights and the cache once a
    step. Greedily, the tokens are those of the model's whole forward pass."""
    layers, heads_, width, vocabulary, context, _ = next(iter(MODELS.values()))
    model = GPT(GPTConfig(context, vocabulary, layers, heads_, width)).to(DEVICE).bfloat16().eval()
    for batch in BATCHES:
        prompts = torch.randint(1, vocabulary, (batch, NEW)).tolist()
        took = seconds(lambda: model.generate(prompts, NEW, temperature=0.7), 3)
        weights = 2 * sum(p.numel() for p in model.parameters())               # bytes in bf16
        cache = 2 * batch * 1.5 * NEW * layers * 2 * width      # keys and values, in the mean
        say(f"generation, batch {batch}, bf16", "", f"{batch * NEW / took:,.0f} tokens/s", "",
            f"{NEW * weights / rate / took:.0%} of the copy bandwidth ({rate / 1e9:.0f} GB/s) by "
            f"weights read, {NEW * (weights + cache) / rate / took:.0%} with the cache")
    exact = GPT(GPTConfig(context, vocabulary, layers, heads_, width)).to(DEVICE).eval()    # fp32
    prompt = torch.randint(1, vocabulary, (NEW,)).tolist()
    ids = list(prompt)
    for _ in range(NEW):
        ids.append(exact(torch.tensor([ids], device=DEVICE))[0, -1].argmax().item())
    same = exact.generate([prompt], NEW, temperature=0)[0] == ids[len(prompt):]
    say("generation, greedy, fp32, against whole forward passes", "", "", "",
        "right" if same else "WRONG")
    try:
        from bench.generation import theirs
    except ImportError:
        return
    if not REHEARSAL:
        peer = theirs("124 M").to(DEVICE).bfloat16()
        prompts = torch.randint(1, vocabulary, (64, NEW), device=DEVICE)
        took = seconds(lambda: peer.generate(prompts, attention_mask=torch.ones_like(prompts),
                                             do_sample=True, temperature=0.7, top_k=0,
                                             max_new_tokens=NEW, pad_token_id=0), 3)
        say("generation, batch 64, bf16", "transformers generate",
            f"{64 * NEW / took:,.0f} tokens/s", "", "")


def time_ppo() -> None:
    """A PPO step of the script on a small model, whole."""
    folder = Path(tempfile.mkdtemp())
    pairs, _, _ = written(folder, 256)
    checkpoints(folder)
    steps, episodes = (1, 8) if REHEARSAL else (6, 256)
    start = time.perf_counter()
    train_ppo.train(train_ppo.Config(
        data=(str(pairs),), init=str(folder / "sft"), reward=str(folder / "rm"),
        out=str(folder / "ppo"), overwrite=True, steps=steps, batch_size=episodes, minibatches=1,
        inner_epochs=4, max_new_tokens=32, ptx_coef=0.0, device=DEVICE))
    say(f"PPO, {episodes} episodes of 64 + 32 tokens, 4 inner epochs", "whole run, with loading",
        f"{steps * episodes / (time.perf_counter() - start):,.0f} episodes/s", "", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, writes nothing")
    if REHEARSAL and not parser.parse_args().rehearse:
        sys.exit("no GPU here: nothing measured, nothing written (--rehearse: only try it)")
    LINES.append("| measured | against | figure | memory | note |")
    LINES.append("|---|---|---|---|---|")
    check_kernels()
    check_stages()
    time_heads()
    rate = matmul_rate()
    time_training(rate)
    time_generation(bandwidth())
    time_ppo()
    if REHEARSAL:
        sys.exit(any("WRONG" in line for line in LINES))
    text = (f"{torch.cuda.get_device_name()}, torch {torch.__version__}. "
            "`python -m bench.gpu`.\n\n" + "\n".join(LINES) + "\n")
    (Path(__file__).parent / "GPU.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
