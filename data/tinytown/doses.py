"""How much KL penalty, how much pretraining mix: PPO at four values of β and of γ_ptx.

    python -m data.tinytown.doses --run out/tinytown      # after runs/lectures.sh has trained them

Prints a table and draws doses.png: gold at T = 0 and 1, KL, pretraining loss and plain-text tasks
of each policy.
"""
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from common.files import write_json
from common.run import DeviceFlags, InputError, load_gpt, main, start
from data.batches import read_prompt_rows
from data.text import text_stream
from data.tinytown.report import load_pyplot, markdown, rounded, save_plot
from evaluate import Policy, costs, graded

BETAS = {"0.05": "doses/beta_0.05", "0.15": "ppo", "0.45": "doses/beta_0.45",
         "1.35": "doses/beta_1.35"}
GAMMAS = {"0": "ppo_no_mix", "1": "ppo", "4": "doses/gamma_4", "16": "doses/gamma_16"}


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # folder of a Tinytown run
    max_new_tokens: int = 48


def measure(config: Config) -> dict:
    """Print the table, write doses.json and doses.png. Returns dose → value → figures."""
    run, folder = start(config), Path(config.run)
    sft, tokenizer = load_gpt(str(folder / "sft"))
    sft = run.freeze(sft)
    prompts = read_prompt_rows((str(folder / "data/test.jsonl"),), tokenizer,
                               sft.config.block_size - config.max_new_tokens)
    windows = text_stream((str(folder / "data/base_val.txt"),), tokenizer,
                          run.device).all_windows(64, most=256)
    measured: dict[str, dict[str, float]] = {}
    for place in dict.fromkeys((*BETAS.values(), *GAMMAS.values())):
        if not (folder / place).exists():
            raise InputError(f"{folder / place}: missing; runs/lectures.sh trains it")
        model = run.freeze(load_gpt(str(folder / place))[0])
        answers = {t: Policy(model).answer(prompts, t, tokenizer, place, config)
                   for t in (0.0, 1.0)}
        cost = costs(model, sft, prompts, answers[1.0], windows, tokenizer)
        measured[place] = {
            "gold, T = 0": graded(prompts, answers[0.0])["gold"].mean().item(),
            "gold, T = 1": graded(prompts, answers[1.0])["gold"].mean().item(),
            "KL, nats": cost["kl"], "pretraining loss": cost["pretraining_loss"],
            "plain-text tasks": statistics.mean(cost["plain_tasks"].values())}
        print(place, json.dumps(rounded(measured[place])), flush=True)
    doses = {dose: {value: measured[place] for value, place in places.items()}
             for dose, places in (("β", BETAS), ("γ_ptx", GAMMAS))}
    names = list(next(iter(measured.values())))
    rows = [[dose, value, *(figures[name] for name in names)]
            for dose, values in doses.items() for value, figures in values.items()]
    print("\n" + markdown(["dose", "value", *names], rows))
    write_json(folder / "doses.json", rounded(doses), indent=1)
    if pyplot := load_pyplot():
        save_plot(doses_plot(pyplot, doses), folder / "doses.png")
        pyplot.close("all")
    return doses


def doses_plot(pyplot, doses: dict):
    """One row a dose, one column a pair of figures."""
    columns = (("gold, T = 0", "gold, T = 1"), ("KL, nats",), ("pretraining loss",),
               ("plain-text tasks",))
    figure, axes = pyplot.subplots(2, len(columns), figsize=(14, 6), constrained_layout=True)
    for row, (dose, values) in zip(axes, doses.items()):
        for axis, names in zip(row, columns):
            for name in names:
                axis.plot(list(values), [figures[name] for figures in values.values()], "o-",
                          label=name)
            axis.set(xlabel=dose, title=names[0] if len(names) == 1 else "gold")
            axis.grid(alpha=0.3)
        row[0].legend()
    return figure


if __name__ == "__main__":
    main(measure, Config)
