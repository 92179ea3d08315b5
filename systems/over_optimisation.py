"""Over-optimisation (Gao et al. 2022): gold against what is optimised, over the distance √KL.

    R_bon(d) = d (α − β d)        best-of-n                                → fit
    R_rl(d) = d (α − β log d)     RL,  d = √KL(π ‖ π_SFT)                  → fit

R is the gain of gold over SFT's. Gold peaks at d = α/(2β) for best-of-n, at exp(α/β − 1) for RL,
whose form does not hold near d = 0: its slope is infinite there. Both are linear in α and β: least
squares.

The question of AlpacaFarm's figure on label noise: does only the noisy reward model turn over? One
pool of samples, four judges: learned from labels of which a quarter is flipped, from the same
annotators' careful labels, from the gold order, and from 3.5 times as many noisy ones. Beside it
PPO without KL penalty and mix against the first two. Last, what optimisation does to length.

    python -m systems.over_optimisation --run out/tinytown
"""
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import train_ppo
from common.files import read_log
from common.run import DeviceFlags, load_gpt, main, start, write_json
from data.batches import read_prompt_rows
from data.tinytown.report import load_pyplot, save_plot
from evaluate import over_optimisation as ppo_curve
from rollout import load_reward
from systems import plots
from systems.best_of_n import curve, curve_table, pool_scores, sample_pool
from systems.methods import prepare
from systems.table import again

JUDGES = ("noisy", "careful", "gold")


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # Tinytown run: its sft, rankings, rm and prompts are read
    rankings: int = 2000           # of each judge's labels, as in alpaca_farm.py
    pool: int = 256                # samples of each prompt
    prompts: int = 200             # test prompts of the pool
    steps: int = 40                # rollouts of PPO without KL penalty
    missing_end_score: float = -3.0   # of a response that never ends, as in PPO
    max_new_tokens: int = 48


LIMITS = dict(rankings=(2, 10**6), pool=(2, 1000), prompts=(1, 10**6), steps=(5, 10**6))


def fit(kl: list[float], gold: list[float], at_0: float, reinforced: bool) -> dict[str, float]:
    """α, β and R² of Gao et al.'s form by least squares: of RL if `reinforced`, else of best-of-n.

    kl: nats. gold: mean gold score there. at_0: gold at no KL, where R = 0. A negative β means that
    the curve has not begun to bend. Raises ValueError for under three points.
    """
    if len(kl) < 3:
        raise ValueError(f"two coefficients from {len(kl)} points")
    d = torch.tensor(kl, dtype=torch.float64).clamp(min=1e-12).sqrt()       # (N,)
    gain = torch.tensor(gold, dtype=torch.float64) - at_0                   # (N,)
    columns = torch.stack([d, -d * (d.log() if reinforced else d)], dim=1)  # (N, 2)
    alpha, beta = torch.linalg.lstsq(columns, gain[:, None]).solution[:, 0].tolist()
    left = (gain - columns @ columns.new_tensor([alpha, beta])).square().sum()
    return {"alpha": alpha, "beta": beta, "at_0": at_0,
            "r2": 1 - (left / (gain - gain.mean()).square().sum()).item()}


def fitted(form: dict[str, float], d: Tensor, reinforced: bool) -> Tensor:
    """Gold at distances d > 0 by a fitted form."""
    return form["at_0"] + d * (form["alpha"] - form["beta"] * (d.log() if reinforced else d))


def within_correlation(scores: Tensor, lengths: Tensor, mask: Tensor) -> float:
    """Mean over prompts of the correlation between reward and length, (P, N) each, over responses
    where mask is 1, those that ended; prompts whose scores or lengths do not vary are left out."""
    count = mask.sum(1, keepdim=True).clamp(min=1)                          # (P, 1)
    x, y = (torch.where(mask, z.double(), 0.0) for z in (scores, lengths))
    x, y = (torch.where(mask, z - z.sum(1, keepdim=True) / count, 0.0) for z in (x, y))
    norm = x.norm(dim=1) * y.norm(dim=1)                                    # (P,)
    return ((x * y).sum(1)[norm > 0] / norm[norm > 0]).mean().item()


def best_of_n_curves(config: Config, home: Path) -> dict[str, list[dict]]:
    """One curve a judge, from one pool; and how each judge's score goes with length."""
    run, folder = start(config, LIMITS), Path(config.run)
    policy, tokenizer = load_gpt(str(folder / "sft"))
    policy = run.freeze(policy)
    room = policy.config.block_size - config.max_new_tokens
    prompts = read_prompt_rows((str(folder / "data" / "test.jsonl"),), tokenizer, room)
    pool = sample_pool(policy, prompts[:config.prompts], config.pool, tokenizer, config)
    places = {judge: home / judge / "rm" for judge in JUDGES} | {"noisy, all": folder / "rm"}
    ended = torch.tensor([one.ended for one in pool.responses]).view_as(pool.gold)
    found, correlations = {}, {}
    for judge, place in places.items():
        reward, _ = load_reward(str(place), tokenizer, run)
        proxy = pool_scores(pool, reward, config.missing_end_score)
        found[judge] = curve(pool, proxy)
        correlations[judge] = within_correlation(proxy, pool.length, ended)
    correlations["the gold score"] = within_correlation(pool.gold, pool.length, ended)
    return {"curves": found, "length_correlation": correlations}


def reinforced_curves(config: Config, home: Path) -> dict[str, list[dict]]:
    """KL, proxy and gold along PPO without KL penalty and mix, against the noisy and the careful
    judge. Runs that are there are kept."""
    found = {}
    for judge in JUDGES[:2]:
        out = home / judge / "ppo_no_kl"
        if not (out / "final.json").exists():
            train_ppo.train(train_ppo.Config(
                **train_ppo.PRESETS["tinytown"] | dict(beta=0.0, steps=config.steps, lr=6e-4),
                max_kl=1e6, ptx_coef=0.0, init=f"{config.run}/sft", reward=str(home / judge / "rm"),
                data=(f"{config.run}/data/rl.jsonl",), out=str(out), seed=config.seed,
                device=config.device, dtype=config.dtype, **again(out)))
        found[judge] = ppo_curve(out, window=4)
        lengths = [row["length"] for row in read_log(out / "metrics.jsonl")]
        for point, place in zip(found[judge], range(0, len(lengths), 4)):
            point["length"] = sum(lengths[place:place + 4]) / len(lengths[place:place + 4])
    return found


def measure(config: Config) -> dict:
    """Everything; prints the tables, writes over_optimisation.json and .png into RUN/lectures."""
    home = Path(config.run) / "lectures"
    for judge in JUDGES:
        prepare(config, judge)
    found = best_of_n_curves(config, home) | {"ppo": reinforced_curves(config, home)}
    found["fits"] = fits(found)
    write_json(home / "over_optimisation.json", found, indent=1)
    print(lines(found))
    if pyplot := load_pyplot():
        figure = plots.over_optimisation_plot(pyplot, found, fitted)
        save_plot(figure, home / "over_optimisation.png")
        pyplot.close("all")
    return found


def fits(found: dict) -> dict[str, dict[str, float]]:
    """Gao et al.'s forms, fitted to every curve; SFT's own gold is that of n = 1."""
    at_0 = found["curves"]["noisy"][0]["gold"]
    return {f"{way}, {judge}": fit([row["kl"] for row in rows], [row["gold"] for row in rows], at_0,
                                   key == "ppo")
            for way, key in (("best-of-n", "curves"), ("PPO", "ppo"))
            for judge, rows in found[key].items()}


def lines(found: dict) -> str:
    """What is printed: the curves, where each turns, the fits, the lengths."""
    said = [curve_table(found["curves"])]
    for judge, rows in found["curves"].items():
        peak = max(rows, key=lambda row: row["gold"])
        said.append(f"best-of-n, {judge}: gold peaks at n = {peak['n']}: {peak['gold']:.3f}, at "
                    f"n = {rows[-1]['n']} {rows[-1]['below_peak']:.3f} ± "
                    f"{rows[-1]['below_peak_error']:.3f} less; {proxy_and_length(rows)}")
    for judge, rows in found["ppo"].items():
        peak = max(rows, key=lambda row: row["gold"])
        said.append(f"PPO without KL, {judge}: gold {rows[0]['gold']:.3f} → {peak['gold']:.3f} at "
                    f"{peak['kl']:.1f} nats → {rows[-1]['gold']:.3f} at {rows[-1]['kl']:.1f}; "
                    f"{proxy_and_length(rows)}")
    said += [f"{name}: α {form['alpha']:.3f}, β {form['beta']:.3f}, R² {form['r2']:.2f}"
             for name, form in found["fits"].items()]
    said += [f"reward and length, correlation within a prompt, {judge}: {value:.2f}"
             for judge, value in found["length_correlation"].items()]
    return "\n".join(said)


def proxy_and_length(rows: list[dict]) -> str:
    """First and last of both."""
    return (f"proxy {rows[0]['proxy']:.2f} → {rows[-1]['proxy']:.2f}, length "
            f"{rows[0]['length']:.1f} → {rows[-1]['length']:.1f}")


if __name__ == "__main__":
    main(measure, Config)
