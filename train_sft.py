"""Stage 1, instruction tuning (SFT): the model imitates demonstrations of good answers.

    L(θ) = −Σ_{t ∈ response} log π_θ(x_t | x_<t) / N                       → sft_loss
    N = response tokens in the step. Every assistant turn is a response, its end token included;
        the rest is context, never a target                                → Tokenizer.render

With `--ptx_data` the step adds the pretraining loss of plain text, as InstructGPT did for the model
that PPO starts from: otherwise what was learned in pretraining is forgotten here already.

Differences from InstructGPT: none in the objective. The schedule of `--preset lima` is LIMA's
(AdamW β = (0.9, 0.95), weight decay 0.1, no warm-up, linear decay to a tenth, end-of-turn token,
residual dropout rising over the layers).

    python train_sft.py --preset tinytown --init out/tinytown/base \\
                        --data out/tinytown/data/sft.jsonl --out out/tinytown/sft
    python train_sft.py --data FILE.json --out out/mine/sft   # a new small model
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from common.run import Flags, adamw, learning_rate, load_gpt, main, start
from data.batches import Row, buckets, demonstration_splits, pad_rows
from data.text import mix_stream
from kernels import masked_mean
from model import GPT
from train_base import pretraining_loss


@dataclass(slots=True)
class Config(Flags):
    data: tuple = ()               # demonstrations: Alpaca rows, messages, prompt and response, …
    val: str = ""                  # held-out demonstrations; empty: every twentieth row of data
    ptx_data: tuple = ()           # plain text to mix in (InstructGPT: a tenth of the data)
    ptx_windows: int = 4           # windows of it a step
    ptx_window: int = 64           # tokens of such a window
    init: str = ""                 # model to start from; empty: a new small one
    out: str = "out/sft"           # folder for the checkpoint and metrics
    epochs: int = 3                # LIMA: 15; InstructGPT: 16
    lr: float = 1e-3               # peak; LIMA: 1e-5 for 65 B parameters
    final_lr: float = 0.1          # share of the peak at the end, linear decay (LIMA)
    warmup: int = 0                # steps (LIMA: none)
    batch_size: int = 32           # conversations a step (LIMA: 32, or 64 for smaller models)
    max_tokens: int = 0            # longest row, prompt included; 0: the model's context
    lora_rank: int = 0             # low-rank adapters of this rank, merged at the end; 0: none
    weight_decay: float = 0.1      # LIMA
    dropout: float = 0.0           # residual dropout of the last block (LIMA: 0.3)
    eval_every: int = 0            # steps between held-out losses (best: out/best); 0: at the end


PRESETS = {
    "tinytown": dict(epochs=4, lr=2e-3, batch_size=32),
    "lima": dict(epochs=15, lr=1e-5, final_lr=0.1, warmup=0, batch_size=32, weight_decay=0.1,
                 dropout=0.3),
    "cpu": dict(device="cpu", dtype="float32"),           # the others: GPT-2's weights
    "gpt2": dict(device="cuda", dtype="bfloat16", init="gpt2", lr=2e-5),
    "t4": dict(device="cuda", dtype="float16", init="gpt2", lr=2e-5, micro_batch=8),
    "mps": dict(device="mps", dtype="float32", init="gpt2", lr=2e-5, micro_batch=4)}
LIMITS = dict(epochs=(1, 10**4), dropout=(0, 0.99), ptx_windows=(1, 10**6),
              ptx_window=(2, 10**6), final_lr=(0, 1))
NEEDED = dict(data="name one or more files of demonstrations")


# ----------------------------------------------------------------------------- equation

def sft_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of response tokens, in nats: −Σ mask·logprob / Σ mask. Scalar.

    logprobs (B, T): log π(x_t | x_<t). mask (B, T): 1 = response token, end token included. One
    division by the tokens of the whole batch, so long responses weigh more than short ones; an
    all-zero mask gives 0.
    """
    return -masked_mean(logprobs, mask)


# ----------------------------------------------------------------------------- training

@torch.no_grad()
def evaluate(model: GPT, rows: list[Row], pad: int, device, batch_size: int = 64) -> float:
    """SFT loss over all rows, nats per response token."""
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row.ids))
    total = count = 0.0
    for first in range(0, len(ordered), batch_size):
        tokens, mask, _ = pad_rows(ordered[first:first + batch_size], pad, device)
        loss = sft_loss(model.logprobs(tokens, mask)[0], mask)
        total += loss.item() * mask.sum().item()
        count += mask.sum().item()
    model.train()
    return total / count


def train(config: Config) -> dict:
    """Fine-tune and save. Returns the final metrics: val_loss (nats per response token), …"""
    run = start(config, LIMITS, NEEDED)
    model, tokenizer = load_gpt(config.init, config.dropout)
    model = run.train(model)
    context = model.config.block_size
    rows, held_out = demonstration_splits(config.data, config.val, tokenizer, context,
                                          config.max_tokens)
    text = mix_stream(config, tokenizer, context, run.device)
    plan = buckets(rows, config.batch_size, config.epochs, run.draw, run.dealt)
    optimizer = adamw(model, config.lr, weight_decay=config.weight_decay)
    run.expect([[row.shape for row in batch] for batch in plan]
               + [[(config.ptx_windows, config.ptx_window)]] * bool(text), likelihood=True)

    for step, batch in run.steps(plan, tokenizer, model=model, optimizer=optimizer):
        targets = max(1, sum(sum(row.mask) for row in batch))     # of the whole step
        for part in run.passes(batch):
            tokens, mask, _ = pad_rows(part, tokenizer.pad, run.device)     # (b, T)
            loss = sft_loss(model.loglikelihood(tokens, mask), mask)
            run.backward(loss, weight=mask.sum() / targets, loss=loss)
        if text:
            tokens, mask = run.share(*text.random_windows(           # in one pass
                config.ptx_windows, config.ptx_window, run.text_generator))
            loss = pretraining_loss(model.loglikelihood(tokens, mask), mask)
            run.backward(loss, weight=len(tokens) / config.ptx_windows,
                         pretraining_loss=loss)
        lr = learning_rate(step, len(plan), config.lr, config.warmup, config.final_lr,
                           shape="linear")
        run.update({optimizer: lr}, batch)
        if run.due(config.eval_every):
            val_loss = evaluate(model, held_out, tokenizer.pad, run.device)
            run.best(model, val_loss, loss=val_loss)

    return run.finish(model, val_loss=evaluate(model, held_out, tokenizer.pad, run.device))


if __name__ == "__main__":
    main(train, Config, PRESETS)
