"""Files that are whole or absent, logs of JSON rows, progress bars, free memory. No torch here."""
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

try:
    import fcntl
except ImportError:                                 # Windows
    fcntl = None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)`, flush to disk, then rename: `path` is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    write_and_flush(temporary, write)
    os.replace(temporary, path)


def write_and_flush(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(path)` and flush the file to disk."""
    write(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_atomically(path, lambda partial: partial.write_text(text))


def write_json(path: Path, content, indent: int = 2) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def read_log(path: Path) -> list[dict]:
    """The rows of a log of JSON lines; a last one that was cut off in the middle is left out."""
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def checksum(path: Path) -> str:
    """Sixteen hexadecimal digits of a file's SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2 ** 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def try_lock(path: Path, wait: bool = False):
    """The open file that locks `path` until it is closed or its process ends, or None if another
    process holds the lock. wait: until that one lets go. Where there is no locking: an open file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")
    if fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):          # which of them, is the system's choice
            file.close()
            return None
    return file


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process is; the file stays, as removing it would let two in."""
    with try_lock(path, wait=True):
        yield


def progress(total: int, title: str, unit: str, start: int = 0, quiet: bool = False) -> tqdm:
    """A progress bar with the time left; every second on a terminal, twice a minute in a file."""
    return tqdm(total=total, initial=start, desc=title, unit=unit, dynamic_ncols=True,
                disable=quiet, mininterval=1 if sys.stderr.isatty() else 30)


def free_memory() -> float:
    """Bytes of main memory that are free; infinity where nothing says."""
    try:
        with open("/proc/meminfo") as file:
            return 1024 * next(int(line.split()[1]) for line in file
                               if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        if not hasattr(os, "sysconf"):
            return float("inf")
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
