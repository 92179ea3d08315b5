"""What tasks are worth that a model of the town wrote: field by field, kind by kind, to learn from.

    counted   proposals by verdict                    novelty   kept, valid, kinds, by threshold
    people    what people's demonstrations are worth  by_kind   gold on kinds that seeds show or not
    report    all tables of self_instruct.py
"""
import json
from collections import Counter, defaultdict
from pathlib import Path

from common.run import DeviceFlags, load_gpt, write_json
from data.batches import read_prompt_rows
from data.tinytown import town
from data.tinytown.gold import gold_score, gold_scores
from data.tinytown.report import load_pyplot, markdown, rounded, save_plot
from data.tinytown.tasks import UNSEEN, Task, kind_of, validity
from evaluate import GOOD
from rollout import respond
from systems import plots
from systems.table import compare


def counted(rows: list[dict], by: str) -> str:
    """How many rows of each verdict, a line for each value of `by`, as a table."""
    verdicts = [verdict for verdict, _ in Counter(row["verdict"] for row in rows).most_common()]
    found = Counter((row[by], row["verdict"]) for row in rows)
    return markdown([by, *verdicts], [[str(value), *(str(found[value, one]) for one in verdicts)]
                                      for value in dict.fromkeys(row[by] for row in rows)])


def people(path: str, count: int = 2000) -> list[float]:
    """The shares of `validity` for people's demonstrations: what they ask is right by itself."""
    rows = [json.loads(line)["messages"] for line in open(path)][:count]
    right = sum(gold_score(asked, one["content"]) >= GOOD for *asked, one in rows) / len(rows)
    return [1.0, 1.0, right, right]


def novelty(rows: list[dict]) -> list[list[str]]:
    """A line for each threshold: instructions kept, share of them that is valid, kinds of task."""
    lines = []
    for threshold in dict.fromkeys(row["threshold"] for row in rows):
        kinds = [kind_of(row["instruction"]) for row in rows
                 if row["threshold"] == threshold and row["verdict"] == "keep"]
        known = set(kinds) - {None}
        valid = sum(kind is not None for kind in kinds) / max(1, len(kinds))
        lines.append([f"{threshold:g}", str(len(kinds)), f"{valid:.2f}", str(len(known)),
                      str(len(known & set(UNSEEN)))])
    return lines


def by_kind(folders: dict[str, str], config: DeviceFlags, run) -> dict[str, dict[str, float]]:
    """Gold of each policy at T = 0 and T = 1 on kinds of task that the seeds show, on the others,
    and on conversations."""
    found = {}
    for name, folder in folders.items():
        model, tokenizer = load_gpt(folder)
        model, found[name] = run.freeze(model), {}
        prompts = read_prompt_rows((f"{config.run}/data/test.jsonl",), tokenizer, 80)
        for t in (0.0, 1.0):
            answers = respond(model, prompts, tokenizer, 48, seed=config.seed, temperature=t)
            gold = defaultdict(list)
            for prompt, score in zip(prompts, gold_scores(prompts, answers)):
                kind = ("conversations" if len(prompt.messages) > 1 else "other kinds"
                        if town.understand(prompt.messages)[0].name in UNSEEN else "seed kinds")
                gold[kind].append(score)
            for kind in ("seed kinds", "other kinds", "conversations"):
                found[name][f"{kind}, T = {t:g}"] = sum(gold[kind]) / max(1, len(gold[kind]))
    return rounded(found)


def report(tasks: list[Task], thresholds: list[dict], folders: dict[int, str], config: DeviceFlags,
           run) -> dict[str, dict]:
    """Prints every table of Self-Instruct; writes table.json and gold.png into config.out.

    tasks: its own that passed. thresholds: what was proposed, a row each with "threshold" and
    "verdict". folders: number of its own instructions → the model tuned on them.
    """
    home = Path(config.out)
    print("The first rounds, by the threshold of ROUGE-L:\n\n" + markdown(
        ["kept below", "kept", "valid", "kinds", "of them without a seed"], novelty(thresholds)))
    fields = {"own": validity(tasks), "people's": people(f"{config.run}/data/sft.jsonl"),
              "GPT-3's, in the paper": [0.92, 0.79, 0.58, 0.54]}
    print("Shares that are right (the paper's outputs: of all):\n\n" + markdown(
        ["tasks", "instruction", "with input", "output, of these", "all"],
        [[name, *shares] for name, shares in fields.items()]))
    names = {Path(folder).name: folder for folder in folders.values()}
    seconds = {name: json.loads((home / name / "final.json").read_text())["seconds"]
               for name in names}
    found = compare(config, names, seconds)
    kinds = by_kind({"sft": f"{config.run}/sft", **names}, config, run)
    kinds = {name: {f"all, T = {t}": found[name]["gold"][t] for t in ("0", "1")} | row
             for name, row in kinds.items()}
    print(markdown(["gold", *kinds["sft"]], [[name, *row.values()] for name, row in kinds.items()]))
    write_json(home / "table.json", rounded({"table": found, "kinds": kinds, "fields": fields,
                                             "novelty": novelty(thresholds)}), indent=1)
    if pyplot := load_pyplot():
        sizes = {size: kinds[Path(folder).name] for size, folder in folders.items()}
        save_plot(plots.size_curve(pyplot, sizes, kinds["sft"]), home / "gold.png")
        pyplot.close("all")
    return found
