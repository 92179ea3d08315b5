"""AlpacaFarm's noise and orders, over-optimisation's forms, expert iteration, and the table."""
import itertools
import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from test_mutants import Edit, catching

from common.errors import InputError
from data.tinytown.gold import gold_scores
from systems import alpaca_farm, best_of_n, expert_iteration, over_optimisation, table

# ----------------------------------------------------------------------------- label noise


def test_noisy_labels_by_hand():
    labels, coin = torch.tensor([1, 1, 0, 0, 1, 0]), torch.tensor([0, 1, 1, 0, 0, 1])
    replace = torch.tensor([0.0, 0.49, 0.2, 0.1, 0.5, 0.99])
    assert alpaca_farm.noisy_labels(labels, replace, coin).tolist() == [0, 1, 1, 0, 1, 0]


def test_a_quarter_is_flipped_and_agreement_halves_towards_chance():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(40_000, generator=generator) < 0.7).long()
    other = torch.where(torch.rand(40_000, generator=generator) < 0.9, labels, 1 - labels)
    replace, coin = torch.rand(2, 40_000, generator=generator)
    noisy = alpaca_farm.noisy_labels(labels, replace, (coin < 0.5).long())
    assert (noisy != labels).double().mean().item() == pytest.approx(0.25, abs=0.01)
    agreement = (labels == other).double().mean().item()
    assert (noisy == other).double().mean().item() == pytest.approx(agreement / 2 + 0.25, abs=0.01)


# ----------------------------------------------------------------------------- orders

def test_spearman_by_hand():
    assert alpaca_farm.spearman([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert alpaca_farm.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Ranks 0 1 2 3 and 1 0 3 2: 1 − 6 Σd²/(n (n² − 1)) = 1 − 6 · 4/60.
    assert alpaca_farm.spearman([5, 6, 7, 8], [2, 1, 4, 3]) == pytest.approx(0.6)
    # Ties share the mean rank: 0.5 0.5 2 against 0 1 2, Pearson 1.5/√(1.5 · 2); 0 1 1 3 against
    # 0 2 1 3 would be that of places, 0 1.5 1.5 3 is right: 4.5/√(4.5 · 5).
    assert alpaca_farm.spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / 22.5 ** 0.5)
    assert alpaca_farm.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert math.isnan(alpaca_farm.spearman([1, 1], [1, 2]))


def test_spearman_over_all_orders_averages_0():
    values = [alpaca_farm.spearman([1, 2, 3, 4], list(order))
              for order in itertools.permutations(range(4))]
    assert sum(values) == pytest.approx(0, abs=1e-9) and max(values) == pytest.approx(1)


def test_bias_and_variance_by_hand():
    truth = torch.tensor([1, 0, 1])
    # Majorities of three: 1 (right), 1 (wrong), 1 (right): bias 1/3. Left out in turn, against the
    # two others: pair 0, votes 1 1 0: others 1/2, 1/2, 1 → ½, ½, 1 wrong; pair 1, votes 1 1 1:
    # none; pair 2, votes 0 1 1: others 1, ½, ½ → 1, ½, ½. Sum 4 of 9.
    votes = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]])
    bias, variance = alpaca_farm.bias_and_variance(votes, truth)
    assert bias == pytest.approx(1 / 3) and variance == pytest.approx(4 / 9)


def test_a_split_majority_is_half_wrong():
    bias, variance = alpaca_farm.bias_and_variance(torch.tensor([[1, 1], [0, 1]]),
                                                   torch.tensor([1, 1]))
    assert bias == 0.25 and variance == 0.5


def test_only_methods_that_beat_sft_with_both_are_in_the_second_order():
    def row(rate: float) -> dict:
        return {"wins": {t: {"rate": rate} for t in ("0", "1", "best")}}
    tables = {"noisy": {"sft": row(0.5), "a": row(0.6), "b": row(0.7), "c": row(0.2),
                        "d": row(0.8)},
              "gold": {"sft": row(0.5), "a": row(0.7), "b": row(0.6), "c": row(0.3), "d": row(0.4)}}
    found = alpaca_farm.orders_agree(tables)["1"]
    assert found["all"]["methods"] == 4 and found["those better than SFT"]["methods"] == 2
    assert found["those better than SFT"]["rho"] == pytest.approx(-1)
    # Places 1 2 0 3 against 3 2 0 1: 1 − 6 · 8/60.
    assert found["all"]["rho"] == pytest.approx(0.2)


# ----------------------------------------------------------------------------- Gao et al.'s forms

@pytest.mark.parametrize("reinforced", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_the_fit_finds_the_coefficients_that_made_the_curve(reinforced, first):
    """Where it begins at no KL, and where its first point has some."""
    kl = [0.0, 0.5, 1.0, 2.0, 4.0, 9.0, 16.0]
    d = [math.sqrt(x) for x in kl]
    gain = [0 if x == 0 else x * (0.4 - 0.1 * (math.log(x) if reinforced else x)) for x in d]
    form = over_optimisation.fit(kl[first:], [0.3 + x for x in gain[first:]], 0.3, reinforced)
    assert form["alpha"] == pytest.approx(0.4, abs=1e-4)
    assert form["beta"] == pytest.approx(0.1, abs=1e-4)
    assert form["r2"] == pytest.approx(1) and form["at_0"] == 0.3
    again = over_optimisation.fitted(form, torch.tensor(d[1:], dtype=torch.float64), reinforced)
    assert again.tolist() == pytest.approx([0.3 + x for x in gain[1:]], abs=1e-4)


def test_the_fit_wants_three_points():
    with pytest.raises(ValueError):
        over_optimisation.fit([0, 1], [0, 1], 0, False)


def test_length_correlation_is_within_prompts():
    """Prompts of different lengths, whose rewards differ, are no correlation by themselves."""
    lengths = torch.tensor([[1., 2., 3.], [11., 12., 13.], [5., 5., 5.]])
    scores = torch.tensor([[3., 2., 1.], [30., 20., 10.], [1., 2., 3.]])
    mask = torch.ones(3, 3, dtype=torch.bool)
    assert over_optimisation.within_correlation(scores, lengths, mask) == pytest.approx(-1)
    # One that never ended, longest and lowest, says nothing.
    more = [torch.cat([x, torch.full((3, 1), value)], 1) for x, value in ((scores, -9.),
                                                                          (lengths, 48.))]
    mask = torch.tensor([[True, True, True, False]]).expand(3, 4)
    more[0][:, 2] += 3 * (torch.arange(3) < 2)
    ended = over_optimisation.within_correlation(more[0][:, :3], more[1][:, :3], mask[:, :3])
    assert over_optimisation.within_correlation(*more, mask) == pytest.approx(ended)


# ----------------------------------------------------------------------------- the commands

def test_expert_iteration_trains_on_winners_that_ended(town, tmp_path, monkeypatch):
    asked = []

    def alternating(policy, prompts, config, name):
        assert policy == (policies or [str(town / "sft")])[-1]
        asked.append([prompt.messages for prompt in prompts])
        return [best_of_n.Response([1], "Yes.", i % 2 == 0) for i in range(len(prompts))]
    monkeypatch.setattr(expert_iteration, "winners", alternating)
    monkeypatch.setattr(expert_iteration, "imitate", lambda data, out, _: policies.append(out))
    policies = []
    config = expert_iteration.Config(run=str(town), out=str(tmp_path), rounds=2, prompts=6)
    seconds = expert_iteration.expert_iteration(config)
    assert list(seconds) == [str(tmp_path / "expert_1"), str(tmp_path / "expert_2")]
    assert not [messages for messages in asked[0] if messages in asked[1]]
    rows = [json.loads(line) for line in (tmp_path / "round_2.jsonl").read_text().splitlines()]
    assert [row["messages"][:-1] for row in rows] == asked[1][::2]
    assert {row["messages"][-1]["content"] for row in rows} == {"Yes."}
    assert policies == list(seconds)


def test_winners_are_the_best_by_the_reward_model(town, tmp_path, monkeypatch):
    monkeypatch.setattr(expert_iteration, "load_reward", lambda *_: (
        lambda prompts, responses: [float(len(response.ids)) for response in responses], None))
    config = expert_iteration.Config(run=str(town), n=4, max_new_tokens=8)
    prompts = best_of_n.read_prompt_rows((str(town / "data/rl.jsonl"),),
                                         best_of_n.load_gpt(str(town / "sft"))[1], 80)[:5]
    found = expert_iteration.winners(str(town / "sft"), prompts, config, "round 1")
    model, tokenizer = best_of_n.load_gpt(str(town / "sft"))
    pool = best_of_n.several(model, prompts, 4, tokenizer, "round 1", config)
    for place, winner in enumerate(found):
        scores = [len(one.ids) if one.ended else -3.0 for one in pool[4 * place:4 * place + 4]]
        assert winner == pool[4 * place + scores.index(max(scores))]


def test_the_curve_of_best_of_n(town):
    model, tokenizer = best_of_n.load_gpt(str(town / "sft"))
    config = best_of_n.Config(run=str(town), max_new_tokens=8)
    prompts = best_of_n.read_prompt_rows((str(town / "data/test.jsonl"),), tokenizer, 80)[:3]
    pool = best_of_n.sample_pool(model, prompts, 5, tokenizer, config)
    assert pool.gold.flatten().tolist() == pytest.approx(
        gold_scores([prompt for prompt in prompts for _ in range(5)], pool.responses))
    proxy = torch.arange(15.).view(3, 5)
    rows = best_of_n.curve(pool, proxy)
    assert [row["n"] for row in rows] == [1, 2, 4]
    assert rows[0]["gold"] == pytest.approx(pool.gold.mean().item())
    highest = max(rows, key=lambda row: row["gold"])
    best = best_of_n.best_of_n_mean(proxy, pool.gold, highest["n"])
    for row in rows:
        less = best - best_of_n.best_of_n_mean(proxy, pool.gold, row["n"])
        assert row["below_peak"] == pytest.approx(highest["gold"] - row["gold"], abs=1e-6)
        assert row["below_peak_error"] == pytest.approx(less.std().item() / 3 ** 0.5, abs=1e-6)
    # Best of 4 of 5: the last with chance 4/5, else the one before it.
    assert rows[2]["proxy"] == pytest.approx(proxy.mean(0)[4] - 0.2)
    assert rows[2]["gold"] == pytest.approx((0.8 * pool.gold[:, 4] + 0.2 * pool.gold[:, 3]).mean())


@pytest.fixture(scope="module")
def farm(town, tmp_path_factory) -> Path:
    """A copy of the town with two methods on both kinds of labels."""
    run = tmp_path_factory.mktemp("farm")
    for name in ("base", "sft", "rank", "rm"):
        (run / name).symlink_to(town / name)
    (run / "rank_val").symlink_to(town / "rank")
    shutil.copytree(town / "data", run / "data")
    shutil.copy(town / "data/sft.jsonl", run / "data/sft_val.jsonl")
    alpaca_farm.farm(alpaca_farm.Config(run=str(run), only=("dpo", "slic"), rankings=8))
    return run


def test_the_farm_learns_from_both_kinds_of_labels(farm, capsys):
    home = farm / "lectures"
    lines = {kind: (home / kind / "rankings.jsonl").read_text().splitlines()
             for kind in alpaca_farm.KINDS}
    source = (farm / "rank/rankings.jsonl").read_text().splitlines()
    assert lines["noisy"] == source[:8]
    for noisy, gold in zip(*(map(json.loads, lines[kind]) for kind in alpaca_farm.KINDS)):
        assert [one["text"] for one in noisy["responses"]] == [one["text"]
                                                              for one in gold["responses"]]
        prompt = best_of_n.Prompt(noisy["messages"], [])
        ended = [best_of_n.Response([], one["text"], one["ended"]) for one in gold["responses"]]
        true = [round(score, 4) for score in gold_scores([prompt] * len(ended), ended)]
        assert [one["score"] for one in gold["responses"]] == [
            sorted(set(true)).index(score) for score in true]           # places, not values
    found = json.loads((home / "methods.json").read_text())
    assert set(found["tables"]["noisy"]) == {"sft", "dpo", "slic", "best_of_16"}
    assert set(found["annotators"]) == {"all 13", "all 13, noisy", "one, 13 times",
                                        "one, 13 times, noisy"}
    assert (home / "methods.png").exists() and (home / "orders.png").exists()
    alpaca_farm.farm(alpaca_farm.Config(seeds=(str(farm), str(farm))))
    assert "median of 2 runs" in capsys.readouterr().out


def test_labels_of_another_sft_model_are_refused(farm, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(farm, run, symlinks=True)
    (run / "sft").unlink()
    shutil.copytree(farm / "base", run / "sft")
    for mark in (False, True):                              # a folder without the mark is refused
        if mark:
            (run / "lectures/noisy/labels/sft.txt").unlink()
        with pytest.raises(InputError, match="made from another SFT model"):
            alpaca_farm.farm(alpaca_farm.Config(run=str(run), rankings=8, only=("dpo",)))


def test_what_is_done_is_not_done_again(farm, monkeypatch):
    monkeypatch.setitem(alpaca_farm.METHODS, "dpo", None)
    monkeypatch.setitem(alpaca_farm.METHODS, "slic", None)
    alpaca_farm.farm(alpaca_farm.Config(run=str(farm), only=("dpo", "slic"), rankings=8,
                                        labels=("gold",)))


@pytest.mark.parametrize("flags", [dict(only=("dpo", "nonsense")), dict(labels=("silver",))])
def test_unknown_names_are_refused(farm, flags):
    with pytest.raises(InputError, match="expected some of"):
        alpaca_farm.farm(alpaca_farm.Config(run=str(farm), rankings=8, **flags))


def test_over_optimisation_end_to_end(farm, capsys):
    found = over_optimisation.measure(over_optimisation.Config(
        run=str(farm), rankings=8, pool=4, prompts=3, steps=12, max_new_tokens=8))
    assert set(found["curves"]) == {"noisy", "careful", "gold", "noisy, all"}
    assert set(found["ppo"]) == {"noisy", "careful"} and len(found["ppo"]["noisy"]) == 3
    assert (farm / "lectures/over_optimisation.png").exists()
    assert "gold peaks at n = " in capsys.readouterr().out


def test_the_table_leaves_out_what_is_not_measured():
    row = {"gold": {"0": 0.5, "1": 0.25, "best": 0.5}, "best_temperature": 0.0, "proxy": 1.0,
           "wins": {t: {"rate": 0.5, "standard_error": 0.01} for t in ("0", "1", "best")},
           "kl": 0.1, "length": 14.0, "endless": 0.0, "seconds": None}
    line = table.table({"some": row}).splitlines()[-1]
    assert line.startswith("| some | 0.500 | 0.250 | 0.500 (0) | 50.0 ± 1.0 |")
    assert line.endswith("|  |")


# ----------------------------------------------------------------------------- mutants

MUTANTS = [
    (alpaca_farm, "noisy_labels", "half flipped", Edit("coin, labels", "1 - labels, labels"),
     test_noisy_labels_by_hand, test_a_quarter_is_flipped_and_agreement_halves_towards_chance),
    (alpaca_farm, "noisy_labels", "a quarter replaced", Edit("0.5", "0.25"),
     test_a_quarter_is_flipped_and_agreement_halves_towards_chance),
    (alpaca_farm, "spearman", "Pearson of the values",
     Edit("ranks(first), ranks(second)",
          "torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)"),
     test_spearman_by_hand),
    (alpaca_farm, "spearman", "ties by place", Edit("(equal - 1) / 2", "0"), test_spearman_by_hand),
    (alpaca_farm, "bias_and_variance", "itself among the others",
     Edit("(votes.sum(0) - votes) / (len(votes) - 1)",
          "votes.double().mean(0).expand(votes.shape)"),
     test_bias_and_variance_by_hand),
    (alpaca_farm, "bias_and_variance", "a split counts for the first",
     Edit("share == 0.5, 0.5,", "share > 2, 0.5,"),
     test_bias_and_variance_by_hand, test_a_split_majority_is_half_wrong),
    (over_optimisation, "fit", "over the KL, not its root", Edit(".clamp(min=1e-12).sqrt()", ""),
     partial(test_the_fit_finds_the_coefficients_that_made_the_curve, False, 1)),
    (over_optimisation, "fit", "forms exchanged", Edit("d.log() if reinforced else d",
                                                       "d if reinforced else d.log()"),
     partial(test_the_fit_finds_the_coefficients_that_made_the_curve, True, 1)),
    (over_optimisation, "within_correlation", "over all prompts at once",
     Edit("z.sum(1, keepdim=True) / count", "z.sum() / count.sum()"),
     test_length_correlation_is_within_prompts)]


test_a_classic_wrong_answer_is_caught = catching(MUTANTS)
