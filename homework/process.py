"""The grader's side of a student's process: calls with limits of time and memory."""
import json
import os
import pwd
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from homework.worker import call, decode, encode, find

MEMORY = 6 * 2 ** 30         # bytes of address space; importing torch takes two or three
SECONDS = 20.0               # of an exercise
REPLY = 64 * 2 ** 20         # bytes


class Failed(Exception):
    """The student's code did not answer; one line says why."""


class Answer(NamedTuple):
    """What a function returned, tensors inside lists; gradients by argument; whether it wrote to an
    argument."""
    value: object
    grads: list
    changed: bool


class Process:
    """A student's repository in a process of its own. The grader sends arrays and gets arrays; the
    process can neither reach the grader's memory nor say what it scores.

    folder: the repository. seconds: for all calls together, after torch is there. user: an id to
    run as, where the grader is root.
    """

    def __init__(self, folder: Path, seconds: float = SECONDS, user: int | None = None):
        self.seconds, self.buffer = seconds, b""

        def limits() -> None:
            for what, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 2 ** 20),
                               (resource.RLIMIT_CPU, int(seconds) + 30),
                               (resource.RLIMIT_CORE, 0)):
                resource.setrlimit(what, (most, most))
            if user is not None:
                os.setgroups([])                       # root's groups, too, are given up
                os.setgid(pwd.getpwuid(user).pw_gid)
                os.setuid(user)
        source = Path(__file__).with_name("worker.py").read_text()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", source, str(folder)], cwd=folder, preexec_fn=limits,
                env={"PATH": os.defpath, "HOME": str(folder), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise RuntimeError(f"--user: this user can not run {sys.executable} ({error}); install "
                               f"Python and torch where all may read them") from None
        os.set_blocking(self.process.stdin.fileno(), False)
        self.deadline = time.monotonic() + 60
        self.line()                                                # "ready"
        self.deadline = time.monotonic() + seconds

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def call(self, module: str, name: str, *args, grad: tuple[int, ...] = (),
             pull: int | None = None) -> Answer:
        """The student's function on these arguments, with gradients for some. Raises Failed."""
        asked = {"module": module, "name": name, "args": list(map(encode, args)),
                 "grad": list(grad), "pull": pull}
        self.send((json.dumps(asked) + "\n").encode())
        try:
            reply = json.loads(self.line())
            if "error" in reply:
                raise Failed("".join(letter if letter.isprintable() else " "
                                     for letter in str(reply["error"])[:300]))
            return Answer(decode(reply["value"]), [decode(one) for one in reply["grads"]],
                          bool(reply["changed"]))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError):
            raise Failed("the process wrote into the pipe of its replies") from None

    def send(self, text: bytes) -> None:
        """Write a line. Raises Failed at the deadline, as of a process that no longer reads."""
        while text:
            _, ready, _ = select.select([], [self.process.stdin], [],
                                        max(0.0, self.deadline - time.monotonic()))
            if not ready:
                raise Failed(f"no answer within {self.seconds:g} s: an endless loop?")
            try:
                text = text[os.write(self.process.stdin.fileno(), text):]
            except BrokenPipeError:
                raise Failed(self.ended()) from None

    def line(self) -> bytes:
        """The next line of the replies. Raises Failed at the deadline or the process's end."""
        while b"\n" not in self.buffer:
            left = self.deadline - time.monotonic()
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, left))
            if not ready:
                raise Failed(f"no answer within {self.seconds:g} s: an endless loop?")
            more = os.read(self.process.stdout.fileno(), 2 ** 20)
            if not more:
                raise Failed(self.ended())
            self.buffer += more
            if len(self.buffer) > REPLY:
                raise Failed(f"more than {REPLY // 2 ** 20} MiB of reply")
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def ended(self) -> str:
        """Why there is no process any more."""
        try:
            code = self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            return "the process closed its replies"
        return (f"the process was ended by signal {-code} (too much memory?)" if code < 0 else
                f"the process ended by itself with status {code} (os._exit?)")


class Here:
    """Functions in this process, with `Process.call`'s signature: the right ones, or wrong ones
    that stand for a student's. functions: name → function, before those of the modules."""

    def __init__(self, functions: dict = {}):
        self.functions = functions

    def call(self, module: str, name: str, *args, grad: tuple[int, ...] = (),
             pull: int | None = None) -> Answer:
        function = self.functions.get(name) or find(module, name)
        try:
            reply = call(function, [decode(encode(arg)) for arg in args], list(grad), pull)
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from None
        return Answer(decode(reply["value"]), [decode(one) for one in reply["grads"]],
                      reply["changed"])
