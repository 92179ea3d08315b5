"""Stage 1, instruction tuning (SFT): the model imitates demonstrations of good answers.

    L(θ) = −Σ_{t ∈ response} log π_θ(x_t | x_<t) / N                              → sft_loss
    N = response tokens in the step, end tokens included; the prompt is context, never a target

With `--ptx_data` the step also sees plain text, as InstructGPT did for the model that PPO starts from: otherwise what was
learned in pretraining is forgotten here already.

Differences from InstructGPT: none in the objective. The schedule of `--preset lima` is LIMA's (AdamW β = (0.9, 0.95),
weight decay 0.1, no warm-up, linear decay to a tenth, end-of-turn token, residual dropout rising over the layers).

    python train_sft.py --preset tinytown --init out/tinytown/base --data out/tinytown/data/sft.jsonl --out out/tinytown/sft
    python train_sft.py --data FILE.json --out out/mine/sft         # a new small model on GPT-2's vocabulary
"""
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint import Run
from common import InputError, Log, adamw, check_range, learning_rate, main, optimizer_step, setup
from data.batches import Row, buckets, demonstration_rows, even, pad_rows
from data.readers import read_demonstrations
from data.text import text_stream
from kernels import masked_mean
from lora import add_lora, merge_lora
from memory import most_tokens, report_memory
from model import GPT, load_gpt, save_model
from parallel import parts, place, share, summed, world
from train_base import pretraining_loss


@dataclass(slots=True)
class Config:
    data: tuple = ()               # demonstrations: Alpaca rows, messages, prompt and response, …
    val: str = ""                  # held-out demonstrations; empty: every twentieth row of data
    ptx_data: tuple = ()           # plain text to mix in (InstructGPT: a tenth of what PPO's start is trained on)
    ptx_windows: int = 4           # windows of it a step
    ptx_window: int = 64           # tokens of such a window
    init: str = ""                 # checkpoint to start from; empty: a new small model on GPT-2's vocabulary
    out: str = "out/sft"           # folder for the checkpoint and metrics
    epochs: int = 3                # LIMA: 15; InstructGPT: 16
    lr: float = 1e-3               # peak; LIMA: 1e-5 for 65 B parameters
    final_lr: float = 0.1          # share of the peak at the end, linear decay (LIMA)
    warmup: int = 0                # steps (LIMA: none)
    batch_size: int = 32           # conversations a step (LIMA: 32, or 64 for smaller models)
    micro_batch: int = 0           # conversations a forward pass; 0: all of the step's at once
    max_tokens: int = 0            # longest row, prompt included; 0: the model's context
    lora_rank: int = 0             # train low-rank adapters of this rank, merged at the end; 0: all weights
    weight_decay: float = 0.1      # LIMA
    dropout: float = 0.0           # residual dropout of the last block, rising linearly from the first (LIMA: 0.3)
    max_norm: float = 1.0          # gradient clipping
    eval_every: int = 0            # steps between looks at the held-out loss, whose best model stays in out/best; 0: at the end
    save_every: int = 0            # steps between checkpoints for --resume; 0: every ten minutes
    resume: bool = False           # go on from the last checkpoint in out
    shard: bool = False            # under torchrun: each process keeps a part of weights, gradients and moments
    seed: int = 1
    device: str = "auto"           # auto, cuda, mps, cpu
    dtype: str = "auto"            # auto, float32, bfloat16, float16


PRESETS = {"tinytown": dict(epochs=2, lr=1e-3, batch_size=32),
           "lima": dict(epochs=15, lr=1e-5, final_lr=0.1, warmup=0, batch_size=32, weight_decay=0.1, dropout=0.3),
           "cpu": dict(device="cpu", dtype="float32"),                   # the others: GPT-2's weights on one device
           "gpt2": dict(device="cuda", dtype="bfloat16", init="gpt2", lr=2e-5),
           "t4": dict(device="cuda", dtype="float16", init="gpt2", lr=2e-5, micro_batch=8),
           "mps": dict(device="mps", dtype="float32", init="gpt2", lr=2e-5, micro_batch=4)}


def sft_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of response tokens, in nats: −Σ mask·logprob / Σ mask. Scalar.

    logprobs (B, T): log π(x_t | x_<t). mask (B, T): 1 = response token, end token included. One division by the tokens
    of the whole batch, so long responses weigh more than short ones; an all-zero mask gives 0.
    """
    return -masked_mean(logprobs, mask)


@torch.no_grad()
def evaluate(model: GPT, rows: list[Row], pad: int, device, batch_size: int = 64) -> float:
    """SFT loss over all rows, nats per response token."""
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row[0]))
    total, count = 0.0, 0
    for start in range(0, len(ordered), batch_size):
        tokens, mask, _ = pad_rows(ordered[start:start + batch_size], pad, device)
        total += sft_loss(model.logprobs(tokens, mask)[0], mask).item() * mask.sum().item()
        count += mask.sum().item()
    model.train()
    return total / count


def train(config: Config) -> dict:
    """Fine-tune and save. Returns the final metrics: val_loss (nats per response token), seconds, …"""
    check_range(config, epochs=(1, 10**4), lr=(0, 1), batch_size=(1, 10**6), micro_batch=(0, 10**6), dropout=(0, 0.99),
                ptx_windows=(world() if config.ptx_data else 1, 10**6), max_tokens=(0, 10**7), lora_rank=(0, 10**5), final_lr=(0, 1))
    if not config.data:
        raise InputError("--data: name one or more files of demonstrations")
    machine = setup(config)
    model, tokenizer = load_gpt(config.init, config.dropout)
    if config.lora_rank:
        add_lora(model, config.lora_rank)
    model = place(model, machine.device, config.seed, config.shard).train()
    limit = min(config.max_tokens or model.config.block_size, model.config.block_size)
    rows = demonstration_rows(read_demonstrations(*config.data), tokenizer, limit)
    if config.val:
        val_rows = demonstration_rows(read_demonstrations(config.val), tokenizer, limit)
    else:
        rows, val_rows = [row for i, row in enumerate(rows) if i % 20 or len(rows) == 1], rows[::20]
    text = text_stream(config.ptx_data, tokenizer, machine.device) if config.ptx_data else None
    check_range(config, ptx_window=(2, model.config.block_size if text else 10**6))
    text_generator = torch.Generator().manual_seed(config.seed)
    lengths = [len(tokens) for tokens, _ in rows]
    draw = random.Random(config.seed)
    batches = even([batch for _ in range(config.epochs) for batch in buckets(lengths, config.batch_size, draw)], config.shard)
    optimizer = adamw(model, config.lr, weight_decay=config.weight_decay)
    largest = most_tokens(batches, [(1, length) for length in lengths], config.micro_batch)
    report_memory(machine, max(largest, config.ptx_windows * config.ptx_window if text else 0), trained=[model], likelihood=True)
    run = Run(config, len(batches), model=model, optimizer=optimizer, scaler=machine.scaler, text_generator=text_generator)
    log = Log(config.out, len(batches), "sft", run.start)

    for step, batch in list(enumerate(batches))[run.start:]:
        targets = max(1, sum(sum(rows[i][1]) for i in batch))             # response tokens in the whole step
        step_loss = 0.0
        for part in parts(batch, config.micro_batch):
            tokens, mask, _ = pad_rows([rows[i] for i in part], tokenizer.pad, machine.device)
            with machine.autocast():
                logprobs, _ = model.logprobs(tokens, mask, equal_weights=True)              # (B, T)
                loss = sft_loss(logprobs, mask) * (mask.sum() / targets)  # sums over micro-batches to one mean
            machine.backward(loss)
            step_loss += loss.item()
            log.tokens += tokens.numel()
        numbers = {"loss": summed(step_loss)}
        if text:
            tokens, mask = map(share, text.random_windows(config.ptx_windows, config.ptx_window, text_generator))
            with machine.autocast():
                loss = pretraining_loss(model.logprobs(tokens, mask, equal_weights=True)[0], mask) * (len(tokens) / config.ptx_windows)
            machine.backward(loss)
            numbers["pretraining_loss"] = summed(loss.item())
            log.tokens += tokens.numel()
        lr = learning_rate(step, len(batches), config.lr, config.warmup, config.final_lr, shape="linear")
        norm = optimizer_step(machine, config.max_norm, {optimizer: lr}, sum(numbers.values()),
                              lambda: [tokenizer.decode(rows[i][0]) for i in batch])
        if config.eval_every and (step + 1) % config.eval_every == 0:
            with machine.autocast():
                numbers["val_loss"] = evaluate(model, val_rows, tokenizer.pad, machine.device)
            run.best(numbers["val_loss"], lambda folder: save_model(folder, model, config, tokenizer))
        log.write(step + 1, show=tuple(numbers), **numbers, lr=lr, grad_norm=norm)
        log.bar.update()
        run.after(step)

    with machine.autocast():
        val_loss = evaluate(model, val_rows, tokenizer.pad, machine.device)
    merge_lora(model)
    save_model(config.out, model, config, tokenizer)
    return log.close(val_loss=round(val_loss, 4))


if __name__ == "__main__":
    main(train, Config, PRESETS)
