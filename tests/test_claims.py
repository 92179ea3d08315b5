"""Claims about data, against tables small enough to count by hand."""
import pytest
from test_mutants import Edit, catching

from systems import claims
from systems.claims import Claim, columns


def gold(*values: float) -> dict:
    """A row of the common table, gold at T = 0, T = 1 and the best T."""
    return {"gold": dict(zip(("0", "1", "best"), values))}


def test_over_by_hand():
    table = {"a": gold(0.75, 0.5, 0.75), "b": gold(0.5, 0.25, 0.625)}
    assert claims.over(table, "a", "b") == {"T = 0": 0.25, "T = 1": 0.25, "best T": 0.125}
    assert claims.over(table, "b", "a")["T = 0"] == -0.25


def test_columns_takes_the_temperatures_that_are_there():
    one, other = {"all, T = 0": 0.75, "lists, T = 0": 1.0}, {"all, T = 0": 0.5, "lists, T = 0": 0.0}
    assert columns(one, other, "all, ") == {"T = 0": 0.25}


def test_a_claim_holds_at_every_temperature_or_not():
    assert Claim("", {"T = 0": 0.1, "T = 1": 0.0}).holds()
    assert not Claim("", {"T = 0": 0.1, "T = 1": -0.01}).holds()
    assert not Claim("", {"": 0.89}, 0.9).holds()


def test_summary_by_hand():
    runs = [[Claim("it is more", {"T = 0": value, "T = 1": 1.0}, 0.25), Claim("one", {"": value})]
            for value in (0.75, 0.125, 0.25)]
    assert claims.summary(runs) == [
        ["it is more", "0.25", "0.250 (0.125 to 0.750)", "1.000 (1.000 to 1.000)", None, "2 of 3"],
        ["one", "0", "0.250 (0.125 to 0.750)", None, None, "3 of 3"]]


def test_lima_by_hand():
    """Curation is worth 0.25, 250 rows cost 0.125, 8,000 gain nothing; loss goes the other way."""
    table = {"voted_1000": gold(0.75, 0.5, 0.75), "all_10000": gold(0.5, 0.25, 0.5),
             "random_1000": gold(0.5, 0.25, 0.5), "stories_1000": gold(0.0, 0.0, 0.0),
             "voted_250": gold(0.625, 0.375, 0.625), "voted_8000": gold(0.75, 0.5, 0.75)}
    shown = {"val_loss": 0.5, "turns, T = 0": 0.5, "turns, T = 1": 0.25, "lists, T = 0": 0.5,
             "lists, T = 1": 0.5}
    none = dict.fromkeys(shown, 0.25)
    sets = {"voted_1000": shown, "all_10000": none, "turns_100": shown, "turns_0": none,
            "lists_30": shown, "lists_0": none}
    found = claims.lima({"table": table, "sets": sets})
    assert [claim.at.get("T = 0", claim.at.get("")) for claim in found] == [
        0.25, 0, 0.5, 0.125, 0.25, 0.25, 0.25]
    assert all(claim.holds() for claim in found)


def test_a_specialist_and_the_mixtures_by_hand():
    means = {"T = 1": 0.5, "best T": 0.5}
    mixture = {"chat alone": {"mean, T = 0": 0.25, **means, "chat": 0.75},
               "edits alone": {"mean, T = 0": 0.125, **means, "chat": 0.0, "edits": 1.0}}
    mixture |= {name: {"mean, T = 0": 0.75, **means, "chat": 0.5, "edits": 0.5}
                for name in ("proportional", "capped", "equal")}
    boxes = {f"{count}, {kind}": {"median": count / 8, "standard deviation": 0.125}
             for count in (1, 8) for kind in ("seen", "held out")}
    clusters = {"2": {"held out": 0.0}, "32": {"held out": 0.5}}
    found = {"mixture": mixture, "phrasings": boxes, "clusters": clusters,
             "schema": {"definition, avoid": {"held out": 0.5}, "definition": {"held out": 0.25}}}
    said = {claim.says: claim.at for claim in claims.flan(found)}
    assert said["the least mixture over the best single source"] == {
        "T = 0": 0.5, "T = 1": 0.0, "best T": 0.0}
    assert list(said.values())[-1] == {"T = 0": 0.375}         # (0.75 − 0.5 + 1 − 0.5)/2
    assert len(said) == 7
    found["clusters"]["32, larger"] = {"held out": 0.75}
    assert claims.flan(found)[1].at == {"T = 0": 0.25}


def test_the_largest_set_is_meant():
    """By number, not by letters: 1457 comes after 250."""
    rows = {name: {"all, T = 0": value, "other kinds, T = 0": value}
            for name, value in (("seeds", 0.25), ("own_250", 0.375), ("own_1457", 0.5))}
    novelty = [["0.7", "99", "0.50"], ["0.9", "99", "0.75"]]
    found = claims.self_instruct({"kinds": rows, "novelty": novelty})
    assert [list(claim.at.values()) for claim in found] == [[0.25], [0.25], [0.25]]


MUTANTS = [
    (claims, "over", "the wrong way round", Edit("table[one]", "table[other]"), test_over_by_hand),
    (claims, "summary", "mean for median", Edit("statistics.median", "statistics.mean"),
     test_summary_by_hand),
    (Claim, "holds", "at some temperature", Edit("all(", "any("),
     test_a_claim_holds_at_every_temperature_or_not),
    (claims, "self_instruct", "by letters", Edit("int(name.removeprefix(\"own_\"))", "name"),
     test_the_largest_set_is_meant),
    (claims, "flan", "the best mixture", Edit("min(row[key] for row in mixed)", "1.0"),
     test_a_specialist_and_the_mixtures_by_hand),
]
test_mutants_are_caught = catching(MUTANTS)


@pytest.mark.parametrize("system", claims.SYSTEMS, ids=lambda system: system.__name__)
def test_each_is_named_as_its_system(system):
    """Its table is looked for under this name."""
    import importlib
    assert importlib.import_module(f"systems.{system.__name__}").measure
