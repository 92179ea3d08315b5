"""data/tinytown: claims and their bars, the summary over seeds, the annotators' agreement."""
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data.tinytown import specification
from data.tinytown.annotators import Annotator
from data.tinytown.report import Claim, claim_lines, claims, markdown, tables
from data.tinytown.seeds import gold_over_seeds, summary
from data.tinytown.specification import Pair, agreement, lengths, pairs_of, task_shares
from data.tinytown.town import prompts
from data.readers import Ranking
from data.tokenizer import get_tokenizer

ROOT = Path(__file__).parent.parent


# ----------------------------------------------------------------------------- claims

def figures(gold, rate=0.7, proxy=0.3, **more):
    return {"gold": gold, "win_rate": {"rate": rate, "standard_error": 0.01}, "proxy": proxy,
            "helpful": 0.9, "honest": 0.9, "harmless": 0.9, "well_formed": 0.9, "length": 12.0,
            "use_cases": {"rewrite": gold, "classification": gold},
            "passes": {"rewrite": 0.2, "classification": 0.1}} | more


def policy(golds, best, declined=1.0, tasks=0.9, **more):
    """golds: at T = 0, 0.5, 0.7 and 1."""
    return {"best_temperature": best, "asked": "chat", "kl": 1.0, "pretraining_loss": 0.7,
            "at": {t: figures(gold, **more) for t, gold in zip(("0", "0.5", "0.7", "1"), golds)},
            "best_wins": {"sft": {"rate": 0.7, "standard_error": 0.01},
                          "large_prompted": {"rate": 0.61, "standard_error": 0.01}},
            "declined": {"0": declined, "1": declined},
            "plain_tasks": dict.fromkeys(("fact", "question", "summary"), tasks)}


def report_of(**changes):
    policies = {
        "base": policy([0.01] * 4, 0.0), "sft": policy([0.6, 0.62, 0.6, 0.4], 0.5, declined=0.3),
        "ppo": policy([0.8, 0.82, 0.8, 0.7], 0.5), "dpo": policy([0.8, 0.85, 0.8, 0.7], 0.5),
        "ppo_no_kl": policy([0.4] * 4, 0.0, proxy=0.6),
        "base_prompted": policy([0.5, 0.55, 0.4, 0.3], 0.5),
        "large_prompted": policy([0.6] * 4, 0.5),
        "best_of_16": {"best_temperature": 1.0, "at": {"1": figures(0.6)}, "kl": 1.5,
                       "kl_bound": 1.84, "best_wins": {"sft": {"rate": 0.6,
                                                               "standard_error": 0.01}}}}
    return {"n": 16, "rm_accuracy": 0.8, "policies": policies | changes, "over_optimisation": {
        "ppo": [{"kl": 0.0, "proxy": 0.0, "gold": 0.4}, {"kl": 1.0, "proxy": 0.4, "gold": 0.7}]}}


def value_of(report, words):
    claim, = [claim for claim in claims(report) if words in claim.says]
    return claim


def test_claims_are_these_numbers():
    report = report_of()
    assert value_of(report, "SFT over the prompted base").value == pytest.approx(0.62 - 0.55)
    assert value_of(report, "SFT over the base in chat form").value == pytest.approx(0.61)
    assert value_of(report, "dpo over the prompted base").value == pytest.approx(0.85 - 0.55)
    assert value_of(report, "ppo over SFT, gold, greedy").value == pytest.approx(0.2)
    assert value_of(report, "ppo against SFT, wins at T = 0.5").value == 0.7
    assert value_of(report, "the large prompted base").value == 0.61
    assert value_of(report, "gold below SFT's at T = 0").value == pytest.approx(0.2)
    assert value_of(report, "proxy above PPO's at T = 1").value == pytest.approx(0.3)
    assert all(claim.met() for claim in claims(report))


@pytest.mark.parametrize("changes, words", [
    (dict(sft=policy([0.6, 0.58, 0.6, 0.4], 0.5, declined=0.3)), "SFT over the prompted base"),
    (dict(sft=policy([0.6, 0.62, 0.6, 0.4], 0.5, declined=0.45)), "SFT declines"),
    (dict(ppo=policy([0.8, 0.82, 0.8, 0.7], 0.5, declined=0.75)), "ppo declines"),
    (dict(dpo=policy([0.7, 0.85, 0.8, 0.7], 0.5)), "dpo over SFT, gold, greedy"),
    (dict(ppo=policy([0.8, 0.82, 0.8, 0.7], 0.5, tasks=0.87)), "plain-text tasks"),
    (dict(ppo_no_kl=policy([0.4, 0.4, 0.4, 0.45], 0.0, proxy=0.6)), "gold below SFT's at T = 1"),
    (dict(ppo_no_kl=policy([0.4] * 4, 0.0, proxy=0.2)), "proxy above PPO's at T = 0")])
def test_a_missed_bar_is_missed(changes, words):
    report = report_of(**changes)
    missed = [claim.says for claim in claims(report) if not claim.met()]
    assert any(words in says for says in missed)
    assert "MISSED" in claim_lines(report) and "MISSED" not in claim_lines(report_of())


def test_claims_speak_only_of_what_is_there():
    report = report_of()
    for name in ("large_prompted", "dpo", "ppo_no_kl"):
        del report["policies"][name]
    says = " ".join(claim.says for claim in claims(report))
    assert "large" not in says and "dpo" not in says and "without the KL" not in says


def test_tables_name_every_policy_and_temperature():
    page = tables(report_of())
    for name in report_of()["policies"]:
        assert page.count(f"| {name} |") >= 3
    assert "| policy | asked in | T = 0 | T = 0.5 | T = 0.7 | T = 1 | best T |" in page
    assert "| sft | chat | 0.600 | 0.620 | 0.600 | 0.400 | 0.5 |" in page
    assert "| best_of_16 | chat |  |  |  | 0.600 | 1 |" in page
    widths = {}
    for table in page.split("\n\n"):
        lines = [line for line in table.split("\n") if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1, table
        widths[table] = len(lines)
    assert markdown(["a", "b"], [["x", 0.12345], ["y", None]]) == (
        "| a | b |\n| --- | --- |\n| x | 0.123 |\n| y |  |\n")


# ----------------------------------------------------------------------------- seeds

@pytest.mark.parametrize("values, claim, holds", [
    ([0.66, 0.7, 0.64, 0.67], Claim("wins", 0, 0.65, 0.5), True),      # worst ≥ 0.635
    ([0.66, 0.7, 0.63, 0.67], Claim("wins", 0, 0.65, 0.5), False),
    ([0.64, 0.64, 0.66, 0.7], Claim("wins", 0, 0.65, 0.5), True),      # median 0.65
    ([0.64, 0.64, 0.65, 0.7], Claim("wins", 0, 0.65, 0.5), False),
    ([0.3, 0.4, 0.45, 0.2], Claim("declines", 0, 0.4, 1.0, most=True), True),     # worst ≤ 0.46
    ([0.3, 0.4, 0.47, 0.2], Claim("declines", 0, 0.4, 1.0, most=True), False),
    ([0.1, 0.2, -0.1, 0.1], Claim("above", 0, 0.0), False)])
def test_a_claim_over_seeds(values, claim, holds):
    row, = summary([[claim._replace(value=value)] for value in values])
    assert row[-1] == ("met" if holds else "MISSED")
    assert row[3] == f"{min(values):.3f} to {max(values):.3f}"


def test_the_summary_of_four_runs(tmp_path):
    for seed in range(4):
        (tmp_path / str(seed)).mkdir()
        report = report_of(sft=policy([0.6, 0.62 + seed / 100, 0.6, 0.4], 0.5, declined=0.3))
        (tmp_path / str(seed) / "report.json").write_text(json.dumps(report))
    done = subprocess.run([sys.executable, "-m", "data.tinytown.seeds",
                           *map(str, sorted(tmp_path.iterdir()))], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    assert "| sft | 0.600 (0.600–0.600) | 0.635 (0.620–0.650) |" in done.stdout
    assert ("| ppo against SFT, wins at T = 0 | ≥ 0.65 | 0.700 | 0.700 to 0.700 | met |"
            in done.stdout)
    assert gold_over_seeds([report_of()])[0][0] == "base"


# ----------------------------------------------------------------------------- specification

PROMPT = [{"role": "user", "content": "What animal does Ada keep?"}]


def some_pairs(count):
    """Pairs of which the first and the longer is the better one in every second."""
    draw = random.Random(1)
    texts, gold = ("Ada keeps a goat.", "I do not care."), (1.0, 0.0)
    return [Pair(PROMPT, *((texts, gold) if draw.random() < 0.5 else (texts[::-1], gold[::-1])))
            for _ in range(count)]


def test_annotators_without_noise_or_taste_agree_in_everything(monkeypatch):
    monkeypatch.setattr(specification, "ANNOTATORS", [Annotator(0, 0), Annotator(0, 0)])
    found = agreement(some_pairs(200), random.Random(0))
    assert found["matrix"] == [[1, 1], [1, 1]] and found["gold"] == [1, 1]
    assert found["first"][0] == pytest.approx(0.5, abs=0.1)


def test_a_taste_shows_and_noise_shows(monkeypatch):
    monkeypatch.setattr(specification, "ANNOTATORS", [
        Annotator(0, 0), Annotator(0, 0, first=2.0), Annotator(0, -30.0), Annotator(1e6, 0)])
    pairs = [Pair(PROMPT, ("Ada keeps a goat.", "No."), (1.0, 0.5)),
             Pair(PROMPT, ("No.", "Ada keeps a goat."), (0.5, 1.0))] * 200
    found = agreement(pairs, random.Random(0))
    assert found["first"][1] == 1 and found["gold"][1] == 0.5 and found["longer"][2] == 0
    assert found["matrix"][0][1] == 0.5 and found["matrix"][0][2] == 0
    assert found["matrix"][3][3] == pytest.approx(0.5, abs=0.1)         # not even with itself
    assert found["gold"][3] == pytest.approx(0.5, abs=0.1)


def test_a_quarter_of_the_labels_is_flipped(monkeypatch):
    monkeypatch.setattr("data.tinytown.annotators.ANNOTATORS", [Annotator(0, 0)])
    found = agreement(some_pairs(3000), random.Random(0))
    assert found["unflipped"] == 0 and found["flipped"] == pytest.approx(0.25, abs=0.03)


def test_pairs_differ_in_worth():
    rankings = [Ranking(PROMPT, ["Ada keeps a goat.", "Maybe.", "Maybe."], [2, 1, 0])] * 40
    pairs = pairs_of(rankings, 25, random.Random(0))
    assert 10 < len(pairs) <= 25 and all(pair.gold[0] != pair.gold[1] for pair in pairs)


def test_tasks_and_lengths():
    shares = task_shares([row["messages"] for row in prompts("rank", 1000, 1)])
    assert sum(shares.values()) == pytest.approx(100)
    assert list(shares)[0] == "generation" and abs(shares["generation"] - 45.6) < 2
    assert lengths(["Ada.", "Ada. Ada.", "Ada. Ada. Ada. Ada."], get_tokenizer("tinytown")) == [
        "3", pytest.approx(14 / 3), pytest.approx(3.055, abs=0.01), "2", "3", "4", "6", "8"]


def test_the_specification_of_a_run(town, tmp_path, capsys):
    for part in ("data", "rank"):
        (tmp_path / part).symlink_to(town / part)
    specification.specify(specification.Config(run=str(tmp_path), pairs=10))
    shown = capsys.readouterr().out
    assert "Tasks, %" in shown and "Lengths, tokens" in shown
    assert len(re.findall(r"^\| \d+ \|", shown, re.M)) == 13
    assert len(json.loads((tmp_path / "specification.json").read_text())["matrix"]) == 13
