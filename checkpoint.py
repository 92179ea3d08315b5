"""What survives a run: its model, and with --resume the whole state of its training, both verified before they are used.

    save_checkpoint, load_checkpoint     OUT/model.pt and OUT/config.json: what the next stage reads
    Run                                  OUT/resume/step_*.pt: what the same stage needs to go on

    run = Run(config, steps, model=model, optimizer=optimizer, …)      with --resume, the state is the saved one from here on
    for step in range(run.start, steps):
        …
        run.after(step)                                                saves where it is due; ends here after Ctrl-C

A state holds everything that changes during a run: weights, moments, loss scale, random generators, PPO's β. What is
fixed by config and data, as the order of the batches, is computed again. So on the CPU a run that was interrupted
anywhere and resumed ends with the same bits as one that was not. Of several processes rank 0 writes, and any number of them
can read.
"""
import contextlib
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
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:                                 # Windows
    fcntl = None

from common import InputError, is_out_of_memory, read_log, write_and_flush, write_atomically
from parallel import gathered, like, rank, share, summed, whole, world

KEEP = 2                                            # checkpoints: if the last one is damaged there is one before it
MINUTES = 10                                        # between them, where --save_every does not say how many steps
# Fields that may differ between a run and its continuation.
FREE = ("resume", "save_every", "device", "shard", "out", "micro_batch", "max_kl", "sample_every")


# ----------------------------------------------------------------------------- models

def save_checkpoint(folder: str | Path, model: torch.nn.Module, kind: str, config, **extra) -> None:
    """Write `model.pt` (a plain dict of fp32 tensors) and `config.json` (kind, model shape, run config) to a folder."""
    folder = Path(folder)
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in whole(dict(model.state_dict())).items()}
    if rank() > 0:
        return

    def write(path: Path) -> None:
        torch.save(state, path)
        description = {"kind": kind, "model": asdict(model.config), "run": asdict(config), **extra, "sha256": checksum(path)}
        write_and_flush(folder / "config.json.partial", lambda path: path.write_text(json.dumps(description, indent=2) + "\n"))

    if list(folder.glob("resume/step_*.pt")):
        remedy = "make room: the run's last state is saved, and --resume goes on from there"
    else:
        remedy = "the one that was there before is whole" if (folder / "model.pt").exists() else "make room"
    with room_for(state, folder, "model.pt", remedy):
        write_atomically(folder / "model.pt", write)         # killed here, `load_checkpoint` does the next line
        os.replace(folder / "config.json.partial", folder / "config.json")


def load_checkpoint(folder: str | Path, kind: str) -> tuple[dict, dict]:
    """Return (state, description) of a checkpoint of `kind`; InputError if it is absent, broken or of another kind."""
    folder = Path(folder)
    finish_saving(folder)
    if list(folder.glob("resume/step_*.pt")) and not (folder / "final.json").exists() and (folder / "model.pt").exists():
        print(f"note: {folder} holds an unfinished run; the model that is read here is of an earlier one", file=sys.stderr)
    try:
        description = json.loads((folder / "config.json").read_text())
        found = description["kind"]
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no checkpoint here (config.json is missing); train that stage first, or pass "
                         f"the folder that its --out named") from error
    except (ValueError, RecursionError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{folder}/config.json: not a checkpoint's description; pass a folder written by a "
                         f"train_*.py script") from error
    if found != kind:
        raise InputError(f"{folder}: holds a {found} checkpoint, but a {kind} is needed here; pass the --out folder "
                         f"of {'train_rm.py' if kind == 'reward model' else 'train_base.py or train_sft.py'}")
    try:
        if "sha256" in description and checksum(folder / "model.pt") != description["sha256"]:
            raise ValueError("its checksum is not the one in config.json")
        return torch.load(folder / "model.pt", map_location="cpu", weights_only=True), description
    except Exception as error:        # torch.load raises a dozen types; to the reader they are all one fault
        if is_out_of_memory(error):
            raise
        raise InputError(f"{folder}/model.pt: cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:100]}); "
                         f"train that stage again") from error


def finish_saving(folder: Path) -> None:
    """Do the last line of a `save_checkpoint` that was killed before it."""
    partial = folder / "config.json.partial"
    try:
        if json.loads(partial.read_text())["sha256"] == checksum(folder / "model.pt"):
            os.replace(partial, folder / "config.json")
    except (OSError, ValueError, RecursionError, KeyError, TypeError):       # nothing there, or it never got that far
        pass


def checksum(path: Path) -> str:
    """Sixteen hexadecimal digits of a file's SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2 ** 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------- runs

class Stopped(InputError):
    """A run that was told to stop and has saved its state."""


class Run:
    """The resumable state of a training run, in `OUT/resume/step_*.pt`.

    parts: name → model, optimizer, loss scaler (anything with state_dict), torch.Generator, random.Random, or a dict of plain
    values that the loop changes. With config.resume they are set to the last checkpoint's; `start` is the step to go on with.
    """

    def __init__(self, config, steps: int, **parts):
        self.config, self.steps, self.parts, self.start, self.lowest = config, steps, parts, 0, float("inf")
        self.folder = Path(config.out) / "resume"
        self.saved, self.inputs = time.monotonic(), fingerprints(config)
        old, finished = self.checkpoints(), (self.folder.parent / "final.json").exists()      # written when all is done
        if config.resume and finished:
            raise InputError(f"{config.out}: this run is finished; leave --resume out to begin anew")
        if config.resume and not old:
            raise InputError(f"--resume: no checkpoint in {self.folder}; leave --resume out to begin anew")
        if old and not (config.resume or finished):
            raise InputError(f"{self.folder}: holds an unfinished run ({old[-1].name}); --resume goes on with it, another --out "
                             f"leaves it alone, deleting the folder gives it up")
        if summed(float(self.taken())):
            raise InputError(f"{config.out}: another run is writing to it; wait for its end, or choose another --out")
        if config.resume:
            self.load()
        summed(0)                           # nothing is removed before all processes have looked
        if not config.resume and rank() == 0:                   # what an earlier run left here
            for path in old:
                path.unlink()
            (self.folder.parent / "final.json").unlink(missing_ok=True)
            shutil.rmtree(self.folder.parent / "best", ignore_errors=True)
        self.signals = Signals()
        self.give_back = weakref.finalize(self, self.signals.give_back)

    def taken(self) -> bool:
        """Whether another process trains in this folder. If none does, it is this one's until it ends, however it ends."""
        if rank() > 0 or fcntl is None:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "w")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):          # which of them, is the system's choice
            return True
        return False

    def after(self, step: int) -> None:
        """Call at the end of step `step` (from 0). Saves at every config.save_every-th step, or every ten minutes, when told to stop,
        and at the end, lest the last evaluation or the saving of the model lose it all."""
        done, last, every = step + 1, step + 1 == self.steps, self.config.save_every
        asked = every and done % every == 0
        timely = last or not every and time.monotonic() - self.saved > 60 * MINUTES
        # One process was told to stop, rank 0 finds that it is time: all do it after the same step.
        flags = torch.tensor([self.signals.told, asked and rank() == 0, timely and rank() == 0], dtype=torch.float32)
        stop, asked, timely = (number > 0 for number in summed(flags).tolist())
        if stop and world() > 1:
            self.signals.ignore()               # nothing interrupts the saving
        if stop or asked:
            self.save(done)
        elif timely:
            try:
                self.save(done)
            except InputError as error:         # nobody has asked for this one: no reason to end
                print(f"\nwarning: {error}", file=sys.stderr)
                self.saved = time.monotonic()
        if stop:
            summed(0)                           # all wait for rank 0: torchrun ends a run as soon as one process has ended
        if stop or last:
            self.give_back()
        if stop and not last and rank() > 0:
            raise SystemExit(1)                 # rank 0 says it for all
        if stop and not last:
            raise Stopped(f"stopped after step {done} of {self.steps}, saved in {self.folder}; to go on, run the same command "
                          f"with --resume")

    def save(self, done: int) -> None:
        """Write the state after `done` steps, then remove all but the last checkpoints. The checksum is in the name."""
        state = {"step": done, "steps": self.steps, "lowest": self.lowest,
                 "stage": stage(self.config), "config": asdict(self.config), "inputs": self.inputs,
                 "parts": {name: state_of(part) for name, part in self.parts.items()},
                 "random": gathered([(torch.get_rng_state(), device_random(self.parts))])}           # of each process
        if rank() > 0:
            return
        remedy = "the one before it is whole: make room, then --resume" if self.checkpoints() else "make room, or choose another --out"
        with room_for(state, self.folder, "the checkpoint", remedy):
            self.folder.mkdir(parents=True, exist_ok=True)
            written = self.folder / "saving"
            write_and_flush(written, lambda path: torch.save(state, path))
            path = self.folder / f"step_{done:09d}_of_{self.steps}_{checksum(written)}.pt"
            os.replace(written, path)
        self.saved = time.monotonic()
        for old in self.checkpoints()[:-KEEP]:
            old.unlink()

    def best(self, loss: float, save: Callable[[str], None]) -> None:
        """Keep the model of the lowest held-out loss so far: `save(folder)` writes it to OUT/best."""
        loss = summed(loss if rank() == 0 else 0.0)             # rank 0's for all, as they save together
        if loss < self.lowest:
            self.lowest = loss
            try:
                save(f"{self.config.out}/best")
            except InputError as error:                         # no room: no reason to end
                print(f"\nwarning: {error}", file=sys.stderr)

    def checkpoints(self) -> list[Path]:
        """From the earliest to the latest."""
        return sorted(path for path in self.folder.glob("step_*.pt") if re.fullmatch(r"step_\d{9}_of_\d+_[0-9a-f]{16}", path.stem))

    def load(self) -> None:
        """Set the parts to the latest checkpoint's state, and cut the logs to its step."""
        paths = self.checkpoints()
        state = read(paths[-1], paths[-2] if len(paths) > 1 else None)
        if state["stage"] != stage(self.config):
            raise InputError(f"{paths[-1]}: is of {state['stage']}.py; name the folder that {stage(self.config)}.py had as --out")
        for field, value in asdict(self.config).items():
            before = state["config"].get(field)
            if field not in FREE and before != value:
                raise InputError(f"--{field} {value}: the run in {self.folder} had {before}; pass that, or leave --resume out and "
                                 f"choose another --out")
        for path, digest in state["inputs"].items():
            if path in self.inputs and self.inputs[path] != digest:
                raise InputError(f"{path}: has changed since the run in {self.folder} began; begin anew in another --out")
        try:
            if state["steps"] != self.steps:
                raise ValueError(f"{state['steps']} steps then, {self.steps} now, or another number of processes with --shard")
            for name, part in self.parts.items():
                set_state(part, state["parts"][name])
        except (RuntimeError, LookupError, ValueError, TypeError) as error:
            raise InputError(f"{paths[-1]}: does not fit what --init and --data hold now ({str(error).splitlines()[0]}); begin anew in "
                             f"another --out") from error
        for cpu, device in share(state["random"])[:1]:          # a process that was not there before has drawn its own
            torch.set_rng_state(cpu)
            device_random(self.parts, device)
        self.start, self.lowest = state["step"], state["lowest"]
        logs = [path for name in ("metrics.jsonl", "rollouts.jsonl") if (path := self.folder.parent / name).exists()]
        for path in logs if rank() == 0 else ():                # what was logged later happens again
            kept = [row for row in read_log(path) if row["step"] <= self.start]
            write_atomically(path, lambda partial: partial.write_text("".join(json.dumps(row) + "\n" for row in kept)))   # noqa: B023


def read(path: Path, previous: Path | None) -> dict:
    """The state in a checkpoint, its checksum verified before anything in it is unpacked; no code in it is run."""
    if not path.stem.endswith(checksum(path)):
        remedy = f"delete it to go on from {previous.name}" if previous else "delete it and begin anew, without --resume"
        raise InputError(f"{path}: damaged (its checksum does not fit its name); {remedy}")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:        # as in `load_checkpoint`
        if is_out_of_memory(error):
            raise
        raise InputError(f"{path}: holds something else than a run's state ({type(error).__name__}); delete it") from error
    if not (isinstance(state, dict) and state.keys() >= {"step", "steps", "lowest", "stage", "config", "inputs", "parts", "random"}):
        raise InputError(f"{path}: holds something else than a run's state, or that of another version; delete it")
    return state


def stage(config) -> str:
    """The name of the script that a config belongs to."""
    return Path(inspect.getfile(type(config))).stem


def fingerprints(config) -> dict[str, str]:
    """Path → digest of the files and models that a run reads: contents; of a model of this project the checksum that its description
    holds; of a folder of text the names, sizes and dates of its files."""
    found = {}
    for value in asdict(config).values():
        for name in value if isinstance(value, tuple) else (value,):
            path = Path(re.sub(r":[\d.]+$", "", name)) if isinstance(name, str) and name not in ("", config.out) else None
            if path and path.is_file():
                found[name] = checksum(path)
            elif path and path.is_dir():
                own = re.search(r'"sha256": "(\w+)"', (path / "config.json").read_text()) if (path / "config.json").is_file() else None
                weights = [checksum(file) for pattern in ("*.safetensors", "*.bin") for file in sorted(path.glob(pattern))]
                files = [] if own or weights else sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in path.rglob("*")
                                                         if file.is_file() and not file.name.startswith("."))
                found[name] = own[1] if own else hashlib.sha256(repr((weights, files)).encode()).hexdigest()[:16]
    return found


class Signals:
    """Ctrl-C and SIGTERM: the first one sets `told`, the second ends the process at once."""

    def __init__(self):
        self.told = False
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.tell) for number in (signal.SIGINT, signal.SIGTERM)}
            for number, handler in self.before.items():         # a run that failed in this process may have left its own
                if isinstance(getattr(handler, "__self__", None), Signals):
                    self.before[number] = handler.__self__.before[number]
        else:
            self.before = {}

    def tell(self, number, frame) -> None:
        """The handler."""
        if self.told and world() == 1:
            raise KeyboardInterrupt
        if not self.told and rank() == 0:       # print might be in the middle of a line
            os.write(2, b"\nstopping after this step" + b" (once more: at once, without saving)\n" * (world() == 1))
        self.told = True                        # several processes: torchrun passes on what the terminal has sent to all already

    def ignore(self) -> None:
        """From here on nothing interrupts this process but kill −9."""
        for number in self.before:
            signal.signal(number, signal.SIG_IGN)

    def give_back(self) -> None:
        """The handlers that were there before, unless somebody else has taken over."""
        for number, handler in self.before.items():
            if signal.getsignal(number) in (self.tell, signal.SIG_IGN):
                signal.signal(number, handler)


def device_random(parts: dict, state: torch.Tensor | None = None) -> torch.Tensor | None:
    """The random state of the GPU that a run's model is on, set first if one is given; None on the CPU, whose state is kept apart."""
    device = next(p.device for part in parts.values() if isinstance(part, torch.nn.Module) for p in part.parameters())
    if device.type == "cuda":
        if state is not None and len(state) == len(torch.cuda.get_rng_state(device)):
            torch.cuda.set_rng_state(state, device)
        return torch.cuda.get_rng_state(device)
    if device.type == "mps":
        if state is not None and len(state) == len(torch.mps.get_rng_state()):
            torch.mps.set_rng_state(state)
        return torch.mps.get_rng_state()
    return None


@contextlib.contextmanager
def room_for(state: dict, folder: Path, what: str, remedy: str):
    """Inside, a disk that is full or read-only becomes one line that says how much room is needed."""
    try:
        yield
    except (OSError, RuntimeError) as error:            # torch.save raises RuntimeError where the disk is full
        for partial in (folder / "saving", folder / "model.pt.partial", folder / "config.json.partial"):
            with contextlib.suppress(OSError):
                partial.unlink()
        need = sum(x.numel() * x.element_size() for x in tensors(state)) / 2 ** 20
        free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free / 2 ** 20
        reason = "no space left" if free < need else str(error).splitlines()[0]        # PyTorch's own words do not say so
        raise InputError(f"{folder}: {what} could not be written ({reason}); it needs {need:,.1f} MiB and {free:,.1f} are free; "
                         f"{remedy}") from error


def tensors(state) -> Iterator[torch.Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if torch.is_tensor(state):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for part in state.values() if isinstance(state, dict) else state:
            yield from tensors(part)


def state_of(part):
    """What a part has to remember, in types that load without running code."""
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, random.Random):
        return part.getstate()
    return whole(dict(part) if isinstance(part, dict) else dict(part.state_dict()))


def set_state(part, state) -> None:
    """The opposite of `state_of`."""
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, random.Random):
        part.setstate(state)
    elif isinstance(part, dict):
        part.update(state)
    elif isinstance(part, torch.optim.Optimizer):
        parameters = [p for group in part.param_groups for p in group["params"]]
        cut = {i: {name: like(value, parameters[i]) for name, value in moments.items()} for i, moments in state["state"].items()}
        part.load_state_dict(state | {"state": cut})
    elif isinstance(part, torch.nn.Module):
        now = part.state_dict()
        part.load_state_dict({name: like(tensor, now.get(name)) for name, tensor in state.items()})
    elif state:                                 # a loss scaler that was not needed then has none
        part.load_state_dict(state)
