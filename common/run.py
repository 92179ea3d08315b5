"""The door: all that a script may import from here, and one object under a script's own loop.

    run = start(config, LIMITS, NEEDED)
    model = run.train(model)
    for step, batch in run.steps(plan, tokenizer, model=model, optimizer=optimizer):
        for part in run.passes(batch):                    # … the script's own statements
            run.backward(objective, weight, shown=number)
        run.update({optimizer: lr}, batch)
    return run.finish(model, figure=…)

It survives interruption, shares work with other processes, keeps the books.
"""
import copy
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from common.checkpoint import load_gpt, new_gpt, save_model  # noqa: F401
from common.cli import DeviceFlags, Flags, check_flags, main  # noqa: F401
from common.errors import InputError
from common.estimate import gpt_of, most_tokens, report_memory
from common.files import write_json, write_text  # noqa: F401
from common.log import Log
from common.machine import find_machine
from common.optimizer import adamw, learning_rate, take_step  # noqa: F401
from common.parallel import all_gather, all_reduce, place, rank, share, unsharded, world
from common.resume import Resume, stage
from lora import Reference, add_lora, merge_lora


def start(config, limits: dict[str, tuple] = {}, needed: dict[str, str] = {}) -> "Run":
    """Check the flags, find device and precision, seed every generator, print the config.

    limits: field → (lowest, highest). needed: field → what to name there. Raises InputError.
    """
    check_flags(config, limits, needed)
    torch.manual_seed(config.seed)
    run = Run(config)
    print(*(f"{name}={value}" for name, value in asdict(config).items()), file=sys.stderr)
    return run


class Run:
    """What a script has to do with this machine, these processes and these files.

    device: where tensors belong. draw, generator, text_generator: random numbers, the same in all
    processes, part of the saved state. dealt: how many processes must get equally many rows.
    """

    def __init__(self, config):
        self.config, self.trained, self.frozen = config, [], []
        self.device, self.dtype, self.scaler = find_machine(config)
        self.draw = random.Random(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.text_generator = torch.Generator().manual_seed(config.seed)
        self.shard = getattr(config, "shard", False)
        self.lora_rank = getattr(config, "lora_rank", 0)
        self.dealt = world() if self.shard else 1
        self.objective, self.tokens, self.sums, self.row = 0.0, 0, {}, {}

    # ----------------------------------------------------------------------- models

    def train(self, model):
        """The model, on this device and in this precision, ready to learn: all of it, or, with
        --lora_rank, adapters; with --shard the part that this process keeps."""
        model.requires_grad_(True).train()
        if self.lora_rank:
            add_lora(gpt_of(model), self.lora_rank)
        gpt_of(model).compute_dtype = self.dtype
        self.trained.append(place(model, self.device, self.config.seed, self.shard))
        return self.trained[-1]

    def freeze(self, model):
        """The model, on this device and in this precision, not to be changed."""
        gpt_of(model).compute_dtype = self.dtype
        self.frozen.append(model.requires_grad_(False).eval().to(self.device))
        return model

    def reference(self, model):
        """What the model is before it learns: a copy, or, with --lora_rank, itself unadapted."""
        return Reference(model) if self.lora_rank else self.freeze(copy.deepcopy(model))

    def expect(self, plan: list[list[tuple[int, int]]], **more) -> None:
        """Say how much memory the run will take; InputError if there is far less. plan: the (rows,
        tokens) of every batch's items. more: as `report_memory`."""
        tokens = most_tokens(plan, self.config.micro_batch)
        report_memory(tokens, self.trained, self.frozen, **more)

    # ----------------------------------------------------------------------- steps

    def steps(self, plan, tokenizer, **state) -> Iterator:
        """The steps of a run: (step, plan[step]), or the step alone where plan is their number.

            for step in range(first, steps):      # first: 0, or where a saved state left off
                yield step, plan[step]            # the body of the script's loop
                …                                 # log its row, save where due, stop if told
        state: all that changes during the run; with --resume it is set to what was saved.
        """
        steps = plan if isinstance(plan, int) else len(plan)
        self.tokenizer, self.out = tokenizer, Path(self.config.out)
        self.state = Resume(self.config, steps, scaler=self.scaler, draw=self.draw,
                            generator=self.generator, text_generator=self.text_generator, **state)
        title = stage(self.config).removeprefix("train_")
        self.book = Log(self.out, steps, title, self.state.start)
        for self.step in range(self.state.start, steps):
            yield self.step if isinstance(plan, int) else (self.step, plan[self.step])
            self.book.step(self.step + 1, self.row, self.sums, self.tokens)
            self.tokens, self.sums, self.row = 0, {}, {}
            self.state.after(self.step)

    def share(self, *rows) -> list:
        """This process's share of each of these lists or tensors, for one pass."""
        return [share(each) for each in rows]

    def passes(self, *rows) -> Iterator:
        """This process's share of a step's rows, in forward passes of up to --micro_batch. Several
        lists or tensors are cut alike."""
        mine = self.share(*rows)
        size = self.config.micro_batch or len(mine[0]) or 1
        for first in range(0, len(mine[0]), size):
            parts = [each[first:first + size] for each in mine]
            yield parts if len(parts) > 1 else parts[0]

    def map(self, function, *rows, model=None) -> list:
        """What `function(*rows)` makes of the rows, one item a row: every process computes its
        share, then all have the whole. model: one whose sharded weights are whole meanwhile."""
        with unsharded(model):
            return all_gather(list(function(*(share(each) for each in rows))))

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """A tensor that every process has filled in part, 0 elsewhere, made whole in all."""
        return all_reduce(numbers)

    def backward(self, objective: torch.Tensor, weight=1.0, **shown) -> None:
        """Add the gradient of weight · objective, which is minimised. The weights of an update's
        passes, in all processes, add up to 1: means over passes become the whole batch's mean.

        shown: numbers for the log, each a mean, weighted likewise, or a ratio as (sum, count).
        """
        weighted = objective * weight
        self.scaler.scale(weighted).backward()
        self.objective += weighted.item()
        for name, value in shown.items():
            total, count = value if isinstance(value, tuple) else (value.detach() * weight, weight)
            sums = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = sums[0] + float(total), sums[1] + float(count)
            self.row.setdefault(name, 0.0)                  # its place in the row

    def update(self, rates: dict[torch.optim.Optimizer, float], batch) -> None:
        """Move the weights along the gradients of all processes, clipped to --max_norm. Where one
        is not finite nothing moves: InputError, and the batch is in OUT/bad_batch.json. batch: for
        that, and to count tokens; rows that have `ids`, or a tensor."""
        try:
            norm = take_step(rates, self.scaler, self.config.max_norm, all_reduce(self.objective))
        except FloatingPointError as error:
            path = self.out / "bad_batch.json"
            if rank() == 0:
                rows = [row.ids if hasattr(row, "ids") else row.tolist() for row in batch]
                write_json(path, list(map(self.tokenizer.decode, rows)))
            raise InputError(f"{error}. The batch is in {path}. Look for what is odd in it, or "
                             f"begin anew, in another --out, with a lower --lr, a longer --warmup "
                             f"or --dtype float32") from error
        self.objective = 0.0
        self.tokens += sum(len(getattr(row, "ids", row)) for row in batch)
        self.log(lr=next(iter(rates.values())), grad_norm=norm)

    # ----------------------------------------------------------------------- books

    def due(self, every: int) -> bool:
        """Whether this step is one of every `every`; of 0 none is."""
        return every > 0 and (self.step + 1) % every == 0

    def log(self, **numbers: float) -> None:
        """Numbers of this step's row in OUT/metrics.jsonl."""
        self.row |= numbers

    def append(self, name: str, rows: list[dict]) -> None:
        """Append rows to OUT/name.jsonl, each with this step."""
        self.book.append(name, [{"step": self.step + 1, **row} for row in rows])

    def best(self, model, figure: float, **numbers: float) -> None:
        """Log held-out numbers; keep the model of the lowest figure so far in OUT/best."""
        self.log(**{f"val_{name}": value for name, value in numbers.items()})
        if self.state.is_lowest(figure):
            try:
                save_model(self.out / "best", model, self.config, self.tokenizer)
            except InputError as error:                     # no room: no reason to end
                print(f"\nwarning: {error}", file=sys.stderr)

    def finish(self, model, **final: float) -> dict:
        """Save the model, adapters merged, and write OUT/final.json: these numbers, or, without
        any, the means of the last tenth of the log; to four places. Returns what is in it."""
        merge_lora(model)
        save_model(self.out, model, self.config, self.tokenizer)
        final = final or self.book.tail_means()
        return self.book.close({name: round(value, 4) for name, value in final.items()})
