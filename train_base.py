"""Stage 0, pretraining: a GPT learns to predict the next token of plain text.

    L(θ) = −E_x (1/T) Σ_t log π_θ(x_t | x_<t)                              → pretraining_loss

Differences from GPT-2: none in the objective; windows are drawn at random from one stream of
documents, and AdamW decays matrices only.

    python train_base.py --preset tinytown --data out/tinytown/data/base.txt \\
                         --val out/tinytown/data/base_val.txt --out out/tinytown/base
    python train_base.py --data FILE.txt --out out/mine/base     # GPT-2's vocabulary, a small model
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from common.run import Flags, InputError, adamw, learning_rate, load_gpt, main, new_gpt, start
from data.text import text_streams
from data.tokenizer import get_tokenizer
from kernels import masked_mean
from model import GPT, GPTConfig


@dataclass(slots=True)
class Config(Flags):
    data: tuple = ()               # plain text: .txt, .gz, .jsonl rows with "text", or a folder
    val: str = ""                  # held-out text; empty: the last twentieth of the documents
    init: str = ""                 # model to go on from; empty: a new one of the shape below
    out: str = "out/base"          # folder for the checkpoint and metrics
    tokenizer: str = "gpt2"        # gpt2 or tinytown; of a new model, as what follows
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
    weight_decay: float = 0.1
    eval_every: int = 100          # steps between held-out losses (best: out/best); 0: at the end
    compile: bool = False          # torch.compile: half a minute's wait, then faster wide models


# GPT-2's shape takes the learning rate and batch of GPT-3's model of this size, and 20 tokens a
# parameter (Chinchilla); t4 and mps do the same for 30 M parameters.
PRESETS = {
    "tinytown": dict(tokenizer="tinytown", block_size=128, window=96, n_layer=3, lr=4e-3,
                     warmup=150, steps=1300, batch_size=16, eval_every=300),
    "cpu": dict(device="cpu", dtype="float32"),
    "gpt2": dict(device="cuda", dtype="bfloat16", block_size=1024, n_layer=12, n_head=12,
                 n_embd=768, lr=6e-4, warmup=250, steps=5000, batch_size=480, micro_batch=16,
                 eval_every=250),
    "t4": dict(device="cuda", dtype="float16", block_size=512, n_layer=6, n_head=6, n_embd=384,
               lr=1e-3, warmup=250, steps=5000, batch_size=240, micro_batch=24, eval_every=250),
    "mps": dict(device="mps", dtype="float32", block_size=512, n_layer=6, n_head=6, n_embd=384,
                lr=1e-3, warmup=250, steps=5000, batch_size=240, micro_batch=12, eval_every=250)}
LIMITS = dict(block_size=(2, 65536), n_layer=(1, 200), n_head=(1, 200), n_embd=(2, 65536),
              dropout=(0, 0.99), steps=(1, 10**9), window=(0, 65536))
NEEDED = dict(data="name one or more text files to train on")


# ----------------------------------------------------------------------------- equation

def pretraining_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next token, in nats: −Σ mask·logprob / Σ mask. Scalar.

    logprobs (B, T): log π(x_t | x_<t). mask (B, T): 1 = a token that is predicted (all but each
    window's first). The pretraining mix of PPO-ptx is minus this number times its coefficient.
    """
    return -masked_mean(logprobs, mask)


# ----------------------------------------------------------------------------- training

@torch.no_grad()
def evaluate(model: GPT, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Pretraining loss over all windows, nats per token."""
    model.eval()
    total = count = 0.0
    for tokens, mask in batches:
        loss = pretraining_loss(model.logprobs(tokens, mask)[0], mask)
        total += loss.item() * mask.sum().item()
        count += mask.sum().item()
    model.train()
    return total / count


def train(config: Config) -> dict:
    """Train a model, new or from `init`, and save it. Returns val_loss (nats a token), …"""
    run = start(config, LIMITS, NEEDED)
    if config.init:
        model, tokenizer = load_gpt(config.init, config.dropout)
    else:
        tokenizer = get_tokenizer(config.tokenizer)
        model = new_gpt(GPTConfig(config.block_size, tokenizer.vocab_size, config.n_layer,
                                  config.n_head, config.n_embd, config.dropout))
    model = run.train(model)
    text, held_out = text_streams(config.data, config.val, tokenizer, run.device)
    window = config.window or model.config.block_size
    if not 2 <= window <= model.config.block_size:
        raise InputError(f"--window {window}: must lie between 2 and the model's context "
                         f"of {model.config.block_size}")
    held_out = held_out.all_windows(window, most=256)
    optimizer = adamw(model, config.lr, weight_decay=config.weight_decay)
    run.expect([[(1, window)] * config.batch_size], likelihood=True)
    if config.compile:
        model.hidden = torch.compile(model.hidden)      # the head's chunks stay as they are

    for step in run.steps(config.steps, tokenizer, model=model, optimizer=optimizer):
        windows, mask = text.random_windows(config.batch_size, window, run.generator)
        for tokens, mask in run.passes(windows, mask):                      # (b, T) each
            logprobs = model.loglikelihood(tokens, mask)                       # (b, T)
            loss = pretraining_loss(logprobs, mask)
            run.backward(loss, weight=len(tokens) / config.batch_size, loss=loss)
        lr = learning_rate(step, config.steps, config.lr, config.warmup)
        run.update({optimizer: lr}, windows)
        if run.due(config.eval_every):
            val_loss = evaluate(model, held_out)
            run.best(model, val_loss, loss=val_loss)

    return run.finish(model, val_loss=evaluate(model, held_out))


if __name__ == "__main__":
    main(train, Config, PRESETS)
