"""The table that every system here ends with: what a policy's answers are worth beside SFT's.

Gold on the test prompts greedily, at T = 1 and at the policy's own best temperature (chosen on
validation prompts); wins against SFT at the same temperature, or each at its best; at T = 1 also
the reward model's score, the KL from SFT in nats a response, the length in tokens and the share
that never ends.
"""
import json
import statistics
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from common.run import InputError, load_gpt, start, write_json, write_text
from data.batches import read_prompt_rows
from data.tinytown.report import markdown, rounded
from evaluate import Config, Policy, Sitting, figures, sit
from rollout import load_reward, sequence_logprobs

HEAD = ["method", "gold, T = 0", "T = 1", "best T", "wins, T = 0", "T = 1", "best T", "proxy",
        "KL", "length", "endless", "seconds"]


def compare(of, policies: dict[str, Policy | str],
            seconds: dict[str, float] = {}) -> dict[str, dict]:
    """Measure policies (or folders of them) beside the SFT model of a Tinytown run, print the table
    and return its figures by name. of: a config with run and DeviceFlags. seconds: what each cost,
    for the table."""
    home = Path(of.run)
    config = Config(run=of.run, seed=of.seed, device=of.device, dtype=of.dtype)
    run = start(config)
    policies = {"sft": str(home / "sft"), **policies}
    policies = {name: Policy(load_gpt(policy)[0]) if isinstance(policy, str) else policy
                for name, policy in policies.items()}
    for policy in policies.values():
        run.freeze(policy.model)
    tokenizer = load_gpt(str(home / "sft"))[1]
    reward, _ = load_reward(str(home / "rm"), tokenizer, run)
    room = policies["sft"].model.config.block_size - config.max_new_tokens
    test, val = (read_prompt_rows((str(home / "data" / f"{name}.jsonl"),), tokenizer, room)
                 for name in ("test", "rank_val"))
    sitting = sit({name: [policy] for name, policy in policies.items()}, test, val, reward,
                  tokenizer, config)
    found = {name: rounded(summary(sitting, name, test, tokenizer)
                           | {"seconds": seconds.get(name)}) for name in policies}
    print(f"{len(test)} test prompts, seed {config.seed}; wins against SFT in %, ± one standard "
          f"error:\n\n{table(found)}")
    return found


def summary(sitting: Sitting, name: str, prompts: list, tokenizer) -> dict:
    """One policy's figures at T = 0, T = 1 and its best T, and what else the table shows."""
    all_of_it = figures(sitting, name, prompts)
    policy, sft = sitting.policies[name], sitting.policies["sft"]
    own = sitting.answers[name, 1.0]
    asked = policy.asked(prompts, tokenizer)
    kl = (sequence_logprobs(policy.model, asked, own.responses, tokenizer.pad)
          - sequence_logprobs(sft.model, prompts, own.responses, tokenizer.pad)).mean().item()
    best = format(all_of_it["best_temperature"], "g")
    gold = {t: all_of_it["at"][t]["gold"] for t in all_of_it["at"]}
    wins = {t: all_of_it["at"][t]["win_rate"] for t in all_of_it["at"]}
    return {"gold": gold | {"best": gold[best]}, "best_temperature": all_of_it["best_temperature"],
            "wins": wins | {"best": all_of_it["best_wins"]["sft"]},
            "proxy": all_of_it["at"]["1"]["proxy"], "kl": kl, "length": own.length,
            "endless": sum(not response.ended for response in own.responses) / len(prompts),
            "use_cases": all_of_it["at"]["0"]["use_cases"]}


def table(found: dict[str, dict]) -> str:
    """The figures of `compare` as a table."""
    rows = []
    for name, one in found.items():
        wins = [f"{100 * win['rate']:.1f} ± {100 * win['standard_error']:.1f}" if win else None
                for win in (one["wins"].get(t) for t in ("0", "1", "best"))]
        gold = [one["gold"].get("0"), one["gold"]["1"],
                f"{one['gold']['best']:.3f} ({one['best_temperature']:g})"
                if "best" in one["gold"] else None]
        cost = "" if one["seconds"] is None else f"{one['seconds']:.0f}"
        rows.append([name, *gold, *wins, *(one[key] for key in ("proxy", "kl", "length",
                                                                 "endless")), cost])
    return markdown(HEAD, rows)


def over_seeds(folders: tuple[str, ...], kinds: tuple[str, ...]) -> None:
    """Median and range over finished runs: gold and wins of every method, and Spearman's ρ."""
    runs = [json.loads((Path(folder) / "lectures" / "methods.json").read_text())
            for folder in folders]

    def cell(values: list[float], scale: float = 1, form: str = ".3f") -> str:
        low, middle, high = min(values), statistics.median(values), max(values)
        return f"{scale * middle:{form}} ({scale * low:{form}}–{scale * high:{form}})"
    for kind in kinds:
        rows = []
        for name in runs[0]["tables"][kind]:
            of = [run["tables"][kind][name] for run in runs]
            at = [t if t in of[0]["gold"] else None for t in ("0", "1", "best")]
            rows.append([name, *(t and cell([one["gold"][t] for one in of]) for t in at),
                         *(t and cell([one["wins"][t]["rate"] for one in of], 100, ".1f")
                           for t in at),
                         *(cell([one[key] for one in of], 1, ".2f") for key in ("kl", "length"))])
        head = [*HEAD[:7], "KL", "length"]
        print(f"{kind} labels, median of {len(runs)} runs (range):\n\n{markdown(head, rows)}")
    for t in ("0", "1", "best"):
        for label in runs[0]["spearman"][t]:
            some = [run["spearman"][t][label] for run in runs]
            print(f"Spearman at T = {t}, {label}: {cell([one['rho'] for one in some], 1, '.2f')}, "
                  f"{min(one['methods'] for one in some)} methods or more")


# ----------------------------------------------------------------------------- places

def inside(config, name: str):
    """The config with the places inside its Tinytown run for those that it leaves empty."""
    places = {"data": (f"{config.run}/rank/some.jsonl",), "init": f"{config.run}/sft",
              "reward": f"{config.run}/rm", "out": f"{config.run}/systems/{name}"}
    return replace(config, **{field: place for field, place in places.items()
                              if getattr(config, field, True) in ("", ())})


def again(out: str) -> dict[str, bool]:
    """Flags for a folder in which something may be: a finished run is replaced, one that was cut
    off goes on."""
    begun = any((Path(out) / "resume").glob("step_*.pt"))
    return {"overwrite": True} if (Path(out) / "final.json").exists() else {"resume": begun}


def fresh(path: str | Path, *sources: str | Path) -> bool:
    """Whether a file is there, and no older than what it comes from."""
    path = Path(path)
    return path.exists() and all(Path(source).stat().st_mtime <= path.stat().st_mtime
                                 for source in sources)


def made(path: Path, make: Callable[[], list[dict]]) -> list[dict]:
    """The rows of a file, made if it is not there."""
    if not path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in make()))
    return [json.loads(line) for line in path.read_text().splitlines()]


def refuse_others(config, source: str) -> None:
    """InputError if what is in the folder was made with other settings or by another model."""
    weights, path = Path(source) / "model.pt", Path(config.out) / "settings.json"
    places = ("run", "out", "device", "dtype")
    now = {"model": zlib.crc32(weights.read_bytes()) if weights.exists() else source}
    now |= {field: value for field, value in asdict(config).items() if field not in places}
    before = json.loads(path.read_text()) if path.exists() else now
    for field, value in now.items():
        if before.get(field) != value:
            raise InputError(f"{config.out}: made with {field} {before.get(field)}, not {value}; "
                             f"remove that folder, or name another --out")
    write_json(path, now)


def measured(train, config, name: str) -> dict[str, dict]:
    """Train by `train(config)`, in places inside the run, then compare the policy with SFT's."""
    config = inside(config, name)
    final = train(replace(config, run=""))      # --resume asks whether what is read has changed
    found = compare(config, {name: config.out}, {name: final["seconds"]})
    write_json(Path(config.out) / "table.json", found, indent=1)
    return found
