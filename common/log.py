"""`metrics.jsonl` of a run and its progress bar, `final.json` at its end."""
import json
import os
import time
from pathlib import Path

from common.files import progress, read_log, write_json
from common.machine import peak_memory
from common.parallel import all_gather, rank

SHOWN = 4        # numbers of a row that stand beside the progress bar: its first ones


class Log:
    """One row of numbers a step, in OUT/metrics.jsonl; other rows in logs of other names."""

    def __init__(self, folder: Path, steps: int, title: str, start: int):
        self.folder, self.files, self.start_step = folder, {}, start
        self.bar = progress(steps, title, "step", start)
        self.steps, self.start, self.tokens, self.earlier = steps, time.time(), 0, 0.0
        if start:                       # seconds of the run before it was interrupted
            self.earlier = max((row["seconds"] for row in self.rows()), default=0.0)
        self.append("metrics", [])

    def append(self, name: str, rows: list[dict]) -> None:
        """Append rows to OUT/name.jsonl, a new file unless the run was resumed. Rank 0 writes."""
        if name not in self.files:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{name}.jsonl" if rank() == 0 else os.devnull
            self.files[name] = open(path, "a" if self.start_step else "w")
        self.files[name].write("".join(json.dumps(row) + "\n" for row in rows))
        self.files[name].flush()

    def step(self, step: int, numbers: dict[str, float], sums: dict[str, tuple] = {},
             tokens: int = 0) -> None:
        """Append the row of a step (from 1), show its first numbers, move the bar.

        sums: further numbers as (sum, count) of this process; the row has the ratio of all
        processes' sums. A sum of weights is their number of updates but for rounding.
        """
        self.tokens += tokens
        every = all_gather([sums])                  # a process without rows has seen no names
        found = {name: [each[name] for each in every if name in each] for name in sums}
        for name in sums:
            total, count = (sum(column) for column in zip(*found[name]))
            numbers = numbers | {name: total / (round(count, 3) or 1)}
        seconds = round(self.earlier + time.time() - self.start, 2)
        self.append("metrics", [{"step": step, "seconds": seconds, **numbers}])
        shown = {name: f"{value:.3g}" for name, value in list(numbers.items())[:SHOWN]}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def rows(self) -> list[dict]:
        """The rows of metrics.jsonl; none in the other processes than rank 0."""
        path = self.folder / "metrics.jsonl"
        return read_log(path) if rank() == 0 and path.exists() else []

    def tail_means(self) -> dict[str, float]:
        """Every number of a step's row, averaged over the last tenth of the steps."""
        tail = self.rows()[-max(1, self.steps // 10):]
        return {name: sum(row[name] for row in tail) / len(tail)
                for name in tail[0] if name not in ("step", "seconds")} if tail else {}

    def close(self, final: dict[str, float]) -> dict:
        """End the bar, write `final.json`, and return what is in it: `final`, wall seconds, tokens
        per second, this process's peak memory, and, if there were any, the number of steps whose
        gradient was zero, as no token or pair in them was a target."""
        self.bar.close()
        for file in self.files.values():
            file.close()
        seconds = time.time() - self.start
        result = {**final, "seconds": round(self.earlier + seconds, 1),
                  "tokens_per_second": round(self.tokens / seconds),
                  "memory_gib": round(peak_memory(), 2)}
        if rank() == 0:
            if empty := sum(row.get("grad_norm") == 0 for row in self.rows()):
                result["empty_steps"] = empty
            write_json(self.folder / "final.json", result)
        print(" ".join(f"{name}={value}" for name, value in result.items()))
        return result
