"""Training that survives its interruption: the whole state of a run in `OUT/resume/step_*.pt`.

A state holds everything that changes during a run: weights, moments, loss scale, random generators,
PPO's β. What is fixed by config and data, as the order of the batches, is computed again. So on the
CPU a run that was interrupted anywhere and resumed ends with the same bits as one that was not. Of
several processes rank 0 writes, and any number of them can read.
"""
import hashlib
import inspect
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import weakref
from dataclasses import asdict
from pathlib import Path

import torch

from common.checkpoint import room_for
from common.errors import InputError, Stopped, first_line, is_out_of_memory
from common.files import checksum, read_log, try_lock, write_and_flush, write_text
from common.parallel import (all_gather, all_reduce, full_tensors, rank, shard_like, share, world)

KEEP = 2         # states: if the last one is damaged there is one before it
MINUTES = 10     # between them, where --save_every does not say how many steps
# Flags that may differ between a run and its continuation.
FREE = ("resume", "overwrite", "save_every", "device", "shard", "out", "micro_batch", "max_kl",
        "sample_every")


class Resume:
    """The resumable state of a training run.

    state: name → model, optimizer, loss scaler (anything with state_dict), torch.Generator,
    random.Random, or a dict of plain values that the loop changes. With config.resume they are set
    to the last saved state's; `start` is the step to go on with. Raises InputError.
    """

    def __init__(self, config, steps: int, **state):
        self.config, self.steps, self.state = config, steps, state
        self.start, self.lowest = 0, float("inf")
        self.folder = Path(config.out) / "resume"
        self.saved_at, self.inputs = time.monotonic(), fingerprints(config)
        old, final = self.saved(), self.folder.parent / "final.json"   # written when all is done
        self.refuse(old, final.exists())
        self.lock = try_lock(self.folder / "lock") if rank() == 0 else True
        if all_reduce(float(self.lock is None)):
            raise InputError(f"{config.out}: another run is writing to it; wait for its end, or "
                             f"choose another --out")
        if config.resume:
            self.load()
        all_reduce(0)                       # nothing is removed before all processes have looked
        if not config.resume and rank() == 0:               # what an earlier run left here
            for path in old:
                path.unlink()
            final.unlink(missing_ok=True)
            shutil.rmtree(self.folder.parent / "best", ignore_errors=True)
        self.signals = Signals()
        self.give_back = weakref.finalize(self, self.signals.give_back)

    def refuse(self, old: list[Path], finished: bool) -> None:
        """InputError where --resume, or its absence, does not fit what is there."""
        config = self.config
        if config.resume and finished:
            raise InputError(f"{config.out}: this run is finished; choose another --out, or begin "
                             f"anew with --overwrite and without --resume")
        if finished and not config.overwrite:
            raise InputError(f"{config.out}: holds a finished run; another --out leaves it alone, "
                             f"--overwrite replaces its model, log and best/")
        if config.resume and not old:
            raise InputError(f"--resume: no checkpoint in {self.folder}; leave --resume out to "
                             f"begin anew")
        if old and not (config.resume or finished):
            raise InputError(f"{self.folder}: holds an unfinished run ({old[-1].name}); --resume "
                             f"goes on with it, another --out leaves it alone, deleting the folder "
                             f"gives it up")

    def after(self, step: int) -> None:
        """Call at the end of step `step` (from 0). Saves at every config.save_every-th step, or
        every ten minutes, when told to stop, and at the end, lest the last evaluation or the saving
        of the model lose it all. Raises Stopped."""
        done, last, every = step + 1, step + 1 == self.steps, self.config.save_every
        asked = every and done % every == 0
        timely = last or not every and time.monotonic() - self.saved_at > 60 * MINUTES
        # One process was told to stop, or rank 0 finds that it is time: all do it after this step.
        flags = [self.signals.told, asked and rank() == 0, timely and rank() == 0]
        flags = all_reduce(torch.tensor(flags, dtype=torch.float32)).tolist()
        stop, asked, timely = (number > 0 for number in flags)
        if stop and world() > 1:
            self.signals.ignore()               # nothing interrupts the saving
        if stop or asked:
            self.save(done)
        elif timely:
            try:
                self.save(done)
            except InputError as error:         # nobody has asked for this one: no reason to end
                print(f"\nwarning: {error}", file=sys.stderr)
                self.saved_at = time.monotonic()
        if stop:
            all_reduce(0)     # all wait for rank 0: torchrun ends a run as soon as one has ended
        if stop or last:
            self.give_back()
        if stop and not last and rank() > 0:
            raise SystemExit(1)                 # rank 0 says it for all
        if stop and not last:
            raise Stopped(f"stopped after step {done} of {self.steps}, saved in {self.folder}; to "
                          f"go on, run the same command with --resume")

    def save(self, done: int) -> None:
        """Write the state after `done` steps, then remove all but the last ones. The checksum is
        in the file's name."""
        random_states = [(torch.get_rng_state(), device_random(self.state))]
        content = {"step": done, "steps": self.steps, "lowest": self.lowest,
                   "stage": stage(self.config), "config": asdict(self.config),
                   "inputs": self.inputs,
                   "state": {name: state_of(item) for name, item in self.state.items()},
                   "random": all_gather(random_states)}            # of each process
        if rank() > 0:
            return
        remedy = ("the one before it is whole: make room, then --resume" if self.saved()
                  else "make room, or choose another --out")
        with room_for(content, self.folder, "the checkpoint", remedy):
            self.folder.mkdir(parents=True, exist_ok=True)
            written = self.folder / "saving"
            write_and_flush(written, lambda path: torch.save(content, path))
            name = f"step_{done:09d}_of_{self.steps}_{checksum(written)}.pt"
            os.replace(written, self.folder / name)
        self.saved_at = time.monotonic()
        for old in self.saved()[:-KEEP]:
            old.unlink()

    def is_lowest(self, figure: float) -> bool:
        """Whether this is the lowest figure of the run so far: rank 0's for all, as they save
        together."""
        figure = all_reduce(figure if rank() == 0 else 0.0)
        if not figure < self.lowest:            # not a number is no lower either
            return False
        self.lowest = figure
        return True

    def saved(self) -> list[Path]:
        """The states in the folder, from the earliest to the latest."""
        name = re.compile(r"step_\d{9}_of_\d+_[0-9a-f]{16}")
        return sorted(path for path in self.folder.glob("step_*.pt") if name.fullmatch(path.stem))

    def load(self) -> None:
        """Take over the latest saved state, and cut the logs to its step."""
        paths = self.saved()
        found = read(paths[-1], paths[-2] if len(paths) > 1 else None)
        self.refuse_another_run(found, paths[-1])
        anew = "begin anew in another --out"
        try:
            if found["steps"] != self.steps:
                raise ValueError(f"{found['steps']} steps then, {self.steps} now, or another "
                                 f"number of processes with --shard")
            for name, item in self.state.items():
                set_state(item, found["state"][name])
        except (RuntimeError, LookupError, ValueError, TypeError) as error:
            raise InputError(f"{paths[-1]}: does not fit what --init and --data hold now "
                             f"({first_line(error)}); {anew}") from error
        for cpu, device in share(found["random"])[:1]:   # a process that is new has drawn its own
            torch.set_rng_state(cpu)
            device_random(self.state, device)
        self.start, self.lowest = found["step"], found["lowest"]
        for path in self.folder.parent.glob("*.jsonl") if rank() == 0 else ():
            kept = [row for row in read_log(path) if row["step"] <= self.start]   # the rest recurs
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def refuse_another_run(self, found: dict, path: Path) -> None:
        """InputError if a state is of another stage, of other flags or of other data."""
        own = stage(self.config)
        if found["stage"] != own:
            raise InputError(f"{path}: is of {found['stage']}.py; name the folder that {own}.py "
                             f"had as --out")
        for field, value in asdict(self.config).items():
            then = found["config"].get(field)
            if field not in FREE and then != value:
                raise InputError(f"--{field} {value}: the run in {self.folder} had {then}; pass "
                                 f"that, or leave --resume out and choose another --out")
        for name, digest in found["inputs"].items():
            if name in self.inputs and self.inputs[name] != digest:
                raise InputError(f"{name}: has changed since the run in {self.folder} began; begin "
                                 f"anew in another --out")


def read(path: Path, previous: Path | None) -> dict:
    """The content of a saved state, its checksum verified before anything in it is unpacked; no
    code in it is run."""
    if not path.stem.endswith(checksum(path)):
        remedy = (f"delete it to go on from {previous.name}" if previous
                  else "delete it and begin anew, without --resume")
        raise InputError(f"{path}: damaged (its checksum does not fit its name); {remedy}")
    other = f"{path}: holds something else than a run's state"
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:        # as in `load_checkpoint`
        if is_out_of_memory(error):
            raise
        raise InputError(f"{other} ({type(error).__name__}); delete it") from error
    keys = {"step", "steps", "lowest", "stage", "config", "inputs", "state", "random"}
    if not (isinstance(content, dict) and content.keys() >= keys):
        raise InputError(f"{other}, or that of another version; delete it")
    return content


def stage(config) -> str:
    """The name of the script that a config belongs to."""
    return Path(inspect.getfile(type(config))).stem


def fingerprints(config) -> dict[str, str]:
    """Path → digest of every file and model that a run reads."""
    names = [name for value in asdict(config).values()
             for name in (value if isinstance(value, tuple) else (value,))
             if isinstance(name, str) and name not in ("", config.out)]
    found = {}
    for name in names:
        path = Path(re.sub(r":[\d.]+$", "", name))           # FILE:0.7 of a mixture
        if path.is_file():
            found[name] = checksum(path)
        elif path.is_dir():
            found[name] = folder_digest(path)
    return found


def folder_digest(folder: Path) -> str:
    """A model of this project: the checksum in its description. Published weights: theirs. A
    folder of text: names, sizes and dates of its files."""
    config = folder / "config.json"
    own = re.search(r'"sha256": "(\w+)"', config.read_text()) if config.is_file() else None
    if own:
        return own[1]
    weights = [checksum(file) for pattern in ("*.safetensors", "*.bin")
               for file in sorted(folder.glob(pattern))]
    files = [] if weights else sorted(
        (str(file), file.stat().st_size, file.stat().st_mtime_ns)
        for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return hashlib.sha256(repr((weights, files)).encode()).hexdigest()[:16]


class Signals:
    """Ctrl-C and SIGTERM: the first one sets `told`, the second ends the process at once."""

    def __init__(self):
        self.told, self.handlers = False, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                old = signal.signal(number, self.tell)
                # A run that failed in this process may have left its own.
                if isinstance(getattr(old, "__self__", None), Signals):
                    old = old.__self__.handlers[number]
                self.handlers[number] = old

    def tell(self, number, frame) -> None:
        """The handler."""
        if self.told and world() == 1:
            raise KeyboardInterrupt
        if not self.told and rank() == 0:       # print might be in the middle of a line
            again = b" (once more: at once, without saving)\n" * (world() == 1)
            os.write(2, b"\nstopping after this step" + again)
        self.told = True       # torchrun passes on what the terminal has sent to all already

    def ignore(self) -> None:
        """From here on nothing interrupts this process but kill −9."""
        for number in self.handlers:
            signal.signal(number, signal.SIG_IGN)

    def give_back(self) -> None:
        """Set the handlers that were there before, unless somebody else has taken over."""
        for number, handler in self.handlers.items():
            if signal.getsignal(number) in (self.tell, signal.SIG_IGN):
                signal.signal(number, handler)


def device_random(state: dict, content: torch.Tensor | None = None) -> torch.Tensor | None:
    """The random state of the GPU that a run's model is on, set first if one is given; None on the
    CPU, whose state is kept apart."""
    device = next(p.device for item in state.values() if isinstance(item, torch.nn.Module)
                  for p in item.parameters())
    if device.type == "cuda":
        if content is not None and len(content) == len(torch.cuda.get_rng_state(device)):
            torch.cuda.set_rng_state(content, device)
        return torch.cuda.get_rng_state(device)
    if device.type == "mps":
        if content is not None and len(content) == len(torch.mps.get_rng_state()):
            torch.mps.set_rng_state(content)
        return torch.mps.get_rng_state()
    return None


def state_of(item):
    """What an item has to remember, in types that load without running code."""
    if isinstance(item, torch.Generator):
        return item.get_state()
    if isinstance(item, random.Random):
        return item.getstate()
    return full_tensors(dict(item) if isinstance(item, dict) else dict(item.state_dict()))


def set_state(item, state) -> None:
    """The opposite of `state_of`."""
    if isinstance(item, torch.Generator):
        item.set_state(state)
    elif isinstance(item, random.Random):
        item.setstate(state)
    elif isinstance(item, dict):
        item.update(state)
    elif isinstance(item, torch.optim.Optimizer):
        parameters = [p for group in item.param_groups for p in group["params"]]
        cut = {i: {name: shard_like(value, parameters[i]) for name, value in moments.items()}
               for i, moments in state["state"].items()}
        item.load_state_dict(state | {"state": cut})
    elif isinstance(item, torch.nn.Module):
        now = item.state_dict()
        item.load_state_dict({name: shard_like(x, now.get(name)) for name, x in state.items()})
    elif state:                                 # a loss scaler that was not needed then has none
        item.load_state_dict(state)
