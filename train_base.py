"""Stage 0, pretraining: a GPT learns to predict the next token of plain text.

    L(θ) = −E_x (1/T) Σ_t log π_θ(x_t | x_<t)                                     → pretraining_loss

Differences from GPT-2: none in the objective; windows are drawn at random from one stream of documents, and AdamW
decays matrices only.

    python train_base.py --preset tinytown --data out/tinytown/data/base.txt --val out/tinytown/data/base_val.txt \\
                         --out out/tinytown/base
    python train_base.py --data FILE.txt --out out/mine/base         # GPT-2's vocabulary, a small model
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint import Run
from common import InputError, Log, adamw, check_range, learning_rate, main, optimizer_step, setup
from data.text import TextStream, text_stream
from data.tokenizer import Tokenizer, get_tokenizer
from kernels import masked_mean
from memory import report_memory
from model import GPT, GPTConfig, load_gpt, save_model
from parallel import place, share, summed, world


@dataclass(slots=True)
class Config:
    data: tuple = ()               # plain text: .txt, .gz of it, .jsonl rows with "text", or a folder of such files
    val: str = ""                  # held-out text; empty: the last twentieth of the documents, or of the one document
    init: str = ""                 # checkpoint or published weights to go on from; empty: a new model of the shape below
    out: str = "out/base"          # folder for the checkpoint and metrics
    tokenizer: str = "gpt2"        # gpt2 or tinytown; of a new model, as block_size and n_layer to n_embd
    block_size: int = 256          # context, tokens
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128              # width
    dropout: float = 0.0           # residual dropout of the last block
    lr: float = 1e-3               # peak; cosine to a tenth
    warmup: int = 50               # steps
    steps: int = 500
    window: int = 0                # tokens of a training window; 0: block_size
    batch_size: int = 16           # windows a step
    micro_batch: int = 0           # windows a forward pass; 0: all of the step's at once
    weight_decay: float = 0.1
    max_norm: float = 1.0          # gradient clipping
    eval_every: int = 100          # steps between looks at the held-out loss, whose best model stays in out/best; 0: at the end
    compile: bool = False          # torch.compile: half a minute's wait, then faster steps for wide models (bench/RESULTS.md)
    save_every: int = 0            # steps between checkpoints for --resume; 0: every ten minutes
    resume: bool = False           # go on from the last checkpoint in out
    shard: bool = False            # under torchrun: each process keeps a part of weights, gradients and moments
    seed: int = 1
    device: str = "auto"           # auto, cuda, mps, cpu
    dtype: str = "auto"            # auto, float32, bfloat16, float16


PRESETS = {"tinytown": dict(tokenizer="tinytown", block_size=96, window=64, n_layer=3, lr=3e-3, steps=1300,
                            batch_size=24, eval_every=300),
           "cpu": dict(device="cpu", dtype="float32"),
           # GPT-2's shape with the learning rate and batch of GPT-3's model of this size, 20 tokens a parameter (Chinchilla)
           "gpt2": dict(device="cuda", dtype="bfloat16", block_size=1024, n_layer=12, n_head=12, n_embd=768, lr=6e-4,
                        warmup=250, steps=5000, batch_size=480, micro_batch=16, eval_every=250),
           # the same for 30 M parameters
           "t4": dict(device="cuda", dtype="float16", block_size=512, n_layer=6, n_head=6, n_embd=384, lr=1e-3,
                      warmup=250, steps=5000, batch_size=240, micro_batch=24, eval_every=250),
           "mps": dict(device="mps", dtype="float32", block_size=512, n_layer=6, n_head=6, n_embd=384, lr=1e-3,
                       warmup=250, steps=5000, batch_size=240, micro_batch=12, eval_every=250)}


def pretraining_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next token, in nats: −Σ mask·logprob / Σ mask. Scalar.

    logprobs (B, T): log π(x_t | x_<t). mask (B, T): 1 = a token that is predicted (all but each window's first).
    The pretraining mix of PPO-ptx is minus this number times its coefficient.
    """
    return -masked_mean(logprobs, mask)


@torch.no_grad()
def evaluate(model: GPT, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Pretraining loss over all windows, nats per token."""
    model.eval()
    totals = [(pretraining_loss(model.logprobs(tokens, mask)[0], mask).item() * mask.sum().item(), mask.sum().item())
              for tokens, mask in batches]
    model.train()
    return sum(loss for loss, _ in totals) / sum(count for _, count in totals)


def text_streams(config: Config, tokenizer: Tokenizer, device) -> tuple[TextStream, TextStream]:
    """(text to train on, held-out text) as the config says."""
    training = text_stream(config.data, tokenizer, device)
    return (training, text_stream((config.val,), tokenizer, device)) if config.val else training.split()


def train(config: Config) -> dict:
    """Train a model, new or from `init`, and save it. Returns the final metrics: val_loss (nats per token), seconds, …"""
    check_range(config, block_size=(2, 65536), n_layer=(1, 200), n_head=(1, 200),
                n_embd=(2, 65536), dropout=(0, 0.99), lr=(0, 1), steps=(1, 10**9), batch_size=(world(), 10**6), micro_batch=(0, 10**6))
    if not config.data:
        raise InputError("--data: name one or more text files to train on")
    machine = setup(config)
    if config.init:
        model, tokenizer = load_gpt(config.init, config.dropout)
    else:
        tokenizer = get_tokenizer(config.tokenizer)
        model = GPT(GPTConfig(config.block_size, tokenizer.vocab_size, config.n_layer, config.n_head, config.n_embd, config.dropout))
    model = place(model, machine.device, config.seed, config.shard).train()
    training, held_out = text_streams(config, tokenizer, machine.device)
    window = config.window or model.config.block_size
    if not 2 <= window <= model.config.block_size:
        raise InputError(f"--window {window}: must lie between 2 and the model's context of {model.config.block_size}")
    val_windows = held_out.all_windows(window, most=256)
    optimizer = adamw(model, config.lr, weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    micro = config.micro_batch or -(-config.batch_size // world())
    report_memory(machine, micro * window, trained=[model], likelihood=True)
    if config.compile:
        model.hidden = torch.compile(model.hidden)          # the head's chunks stay as they are
    run = Run(config, config.steps, model=model, optimizer=optimizer, scaler=machine.scaler, generator=generator)
    log = Log(config.out, config.steps, "base", run.start)

    for step in range(run.start, config.steps):
        tokens, mask = training.random_windows(config.batch_size, window, generator)
        step_loss = 0.0
        for x, m in zip(share(tokens).split(micro), share(mask).split(micro)):
            with machine.autocast():
                logprobs, _ = model.logprobs(x, m, equal_weights=True)                      # (b, T)
                loss = pretraining_loss(logprobs, m) * (len(x) / config.batch_size)
            machine.backward(loss)
            step_loss += loss.item()
        step_loss = summed(step_loss)
        lr = learning_rate(step, config.steps, config.lr, config.warmup)
        norm = optimizer_step(machine, config.max_norm, {optimizer: lr}, step_loss, lambda: list(map(tokenizer.decode, tokens.tolist())))
        log.tokens += share(tokens).numel()
        numbers = {"loss": step_loss, "lr": lr, "grad_norm": norm}
        if config.eval_every and (step + 1) % config.eval_every == 0:
            with machine.autocast():
                numbers["val_loss"] = evaluate(model, val_windows)
            run.best(numbers["val_loss"], lambda folder: save_model(folder, model, config, tokenizer))
        log.write(step + 1, show=("loss",), **numbers)
        log.bar.update()
        run.after(step)

    with machine.autocast():
        val_loss = evaluate(model, val_windows)
    save_model(config.out, model, config, tokenizer)
    return log.close(val_loss=round(val_loss, 4))


if __name__ == "__main__":
    main(train, Config, PRESETS)
