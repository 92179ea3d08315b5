"""FLAN and its like: mixing weights, word games and their clusters, the schema, the command."""
import json
import math
import random
import re
from collections import Counter

import pytest
from test_mutants import Edit, catching

from common.errors import InputError
from data.tinytown import games
from data.tinytown.town import FAMILIES, conversation, instructions, split_of, understand
from data.tokenizer import get_tokenizer
from systems import flan

# ----------------------------------------------------------------------------- mixing weights


def test_mixing_weights_by_hand():
    # 100 and 300 stay, 9000 counts as 600: of 1,000 in all.
    assert flan.mixing_weights([100, 300, 9000], cap=600) == pytest.approx([0.1, 0.3, 0.6])
    assert flan.mixing_weights([100, 300, 9000], cap=9000) == pytest.approx(
        [1 / 94, 3 / 94, 90 / 94])
    # Square roots: 10, 20, 30.
    assert flan.mixing_weights([100, 400, 900], temperature=2) == pytest.approx(
        [1 / 6, 2 / 6, 3 / 6])
    assert flan.mixing_weights([1, 4], cap=2, temperature=0.5) == pytest.approx([1 / 5, 4 / 5])


def test_the_published_cap():
    assert flan.mixing_weights([1000, 3000, 30_000, 500_000]) == pytest.approx(
        [0.1, 0.3, 0.3, 0.3])


def test_mixing_weights_are_shares_as_large_as_the_powers_say():
    draw = random.Random(0)
    for _ in range(50):
        sizes = [draw.randint(1, 10**draw.randint(1, 7)) for _ in range(draw.randint(1, 9))]
        cap, temperature = draw.randint(1, 10**6), draw.uniform(0.2, 5)
        found = flan.mixing_weights(sizes, cap, temperature)
        powers = [min(size, cap) ** (1 / temperature) for size in sizes]
        assert found == pytest.approx([power / sum(powers) for power in powers])
        assert sum(found) == pytest.approx(1)
        back = flan.mixing_weights(sizes[::-1], cap, temperature)
        assert back[::-1] == pytest.approx(found)


def test_mixing_weights_at_the_ends():
    assert flan.mixing_weights([7]) == [1]
    assert flan.mixing_weights([5, 50, 500], cap=1) == pytest.approx([1 / 3] * 3)
    assert flan.mixing_weights([5, 50, 500], temperature=math.inf) == pytest.approx([1 / 3] * 3)
    # Too cold for powers of the sizes themselves.
    assert flan.mixing_weights([10, 1000], temperature=0.001) == pytest.approx([0, 1])


@pytest.mark.parametrize("bad, words", [
    (dict(sizes=[]), r"sizes \[\]"), (dict(sizes=[3, 0]), r"sizes \[3, 0\].*at least 1"),
    (dict(sizes=[3, -1]), "at least 1"), (dict(sizes=[math.nan, 2]), "at least 1"),
    (dict(sizes=[3], cap=0), "cap 0"), (dict(sizes=[3], cap=math.nan), "cap nan"),
    (dict(sizes=[3], temperature=0), "temperature 0"),
    (dict(sizes=[3], temperature=-1.0), "temperature -1"),
    (dict(sizes=[3], temperature=math.nan), "temperature nan")])
def test_what_can_not_be_mixed(bad, words):
    with pytest.raises(ValueError, match=words):
        flan.mixing_weights(**bad)


def test_threshold_by_hand():
    assert flan.threshold({2: 0.1, 4: 0.2, 8: 0.5, 16: 0.6}) == 8
    assert flan.threshold({2: 0.1, 4: 0.4, 8: 0.3, 16: 0.6}) == 4
    assert flan.threshold({2: 0.3, 4: 0.6, 8: 0.7, 16: 0.8}) == 4
    assert flan.threshold({1: 0.9, 2: 0.3, 4: 0.1}) == 2           # a fall has one, too


# ----------------------------------------------------------------------------- games

TEXT = {"food": "soup", "name": "Ada", "animal": "fox", "place": "mill"}


@pytest.mark.parametrize("cluster, wanted, answer", [
    ("pick animal", "the animal", "So: fox."),
    ("twice animal", "the animal two times", "So: fox fox."),
    ("add animal", "the animal, then key", "So: fox key."),
    ("before animal", "key, then the animal", "So: key fox."),
    ("pair animal", "the animal, then the name", "So: fox Ada.")])
def test_games_by_hand(cluster, wanted, answer):
    game = games.Game(cluster, "name", "key")
    assert games.instruction(game, TEXT, 0) == f"Say {wanted}. Text: soup Ada fox mill."
    assert game.answer(TEXT) == answer
    other = game._replace(form="It is").answer(TEXT)
    assert other == answer.replace("So:", "It is")


def test_every_rule_is_a_line_above():
    assert set(games.RULES) == {"pick", "twice", "add", "before", "pair"}


def test_whole_clusters_are_held_out_by_name():
    assert games.HELD_OUT == ("pick food", "pick verb", "twice job", "twice thing", "add name",
                              "before colour", "pair place", "pair animal")
    assert len(games.SEEN) == 32 == flan.CLUSTERS[-1]
    assert set(games.SEEN) | set(games.HELD_OUT) == set(games.CLUSTERS)
    assert not set(games.SEEN) & set(games.HELD_OUT)
    # Each rule and each kind of those held out is taught elsewhere.
    for place in (0, 1):
        taught = {cluster.split()[place] for cluster in games.SEEN}
        assert taught >= {cluster.split()[place] for cluster in games.HELD_OUT}


def asked_of(rows: list[dict]) -> list[str]:
    return [row["messages"][0]["content"] for row in rows]


def test_no_game_of_a_seen_cluster_wants_what_one_held_out_wants():
    ways, draw = (0, 1, 2, games.NEW_WAY), random.Random(0)
    held = {games.Game(cluster, other, word).wanted(way)
            for cluster in games.HELD_OUT for way in ways
            for other in games.KINDS if other != cluster.split()[1] for word in games.WORDS}
    seen = {games.draw_game(draw, cluster).wanted(way)
            for cluster in games.SEEN for way in ways for _ in range(50)}
    assert not seen & held


def test_clusters_and_phrasings_have_equal_shares():
    clusters, draw = ["pick job", "twice job"], random.Random(0)
    asked = asked_of(games.rows_of(draw, clusters, 2 * 8 * 3, range(8)))
    for frame in games.TRAINED:
        start, end = frame.replace("{1}", "").strip().split("{0}")
        some = [text for text in asked if start in text and text.endswith(end.strip() or ".")]
        of = [text for text in some if re.search(
            rf"(^|\. ){start}(the|what|two)", text)]
        assert len(of) == 6, frame
        assert sum("and again" in text or "two" in text for text in of) == 3
    assert not set(games.TRAINED) & set(games.UNSEEN) and len(set(games.UNSEEN)) == 10


def test_new_ways_of_saying_stand_in_the_last_unseen_phrasings_alone():
    game = games.Game("add animal", "name", "key")
    ways = [game.wanted(phrasing) for phrasing in range(18)]
    assert ways[15:] == ["the animal and at the end key"] * 3
    assert len(set(ways[:8])) == 3 and ways[15] not in ways[:15]


def test_the_same_numbers_make_the_same_rows():
    one, two = (games.rows_of(random.Random(3), games.SEEN, 50, range(8)) for _ in range(2))
    assert one == two and len(set(asked_of(one))) == 50


def test_words_are_a_token_each_and_a_text_has_one_of_a_kind():
    tokenizer, draw = get_tokenizer("tinytown"), random.Random(0)
    assert {len(tokenizer.encode(f" {word}")) for word in games.WORDS} == {1}
    assert len(set(games.WORDS)) == len(games.WORDS)
    for cluster in games.CLUSTERS:
        game = games.draw_game(draw, cluster)
        text = games.draw_text(draw, game)
        assert len(text) == 4 and {game.kind, game.other} <= set(text)
        assert all(word in games.KINDS[kind] for kind, word in text.items())


def test_games_are_no_instructions_of_the_town():
    """So that none is held out for validation or test."""
    for asked in asked_of(games.rows_of(random.Random(0), games.CLUSTERS, 2000, range(18))):
        assert understand(conversation(asked)) is None


# ----------------------------------------------------------------------------- the schema

def test_a_description_by_hand():
    game, draw = games.Game("add animal", "name", "key"), random.Random(5)
    found = games.described(draw, game, TEXT, ("definition", "avoid", "good", "bad"))
    again = random.Random(5)
    good, bad = games.draw_text(again, game), games.draw_text(again, game)
    third = next(word for kind, word in bad.items() if kind not in ("animal", "name"))
    assert found == (f"Say the animal, then key. Do not begin with It is. "
                     f"Good: {' '.join(good.values())}. So: {good['animal']} key. "
                     f"Bad: {' '.join(bad.values())}. So: {third} key. Text: soup Ada fox mill.")
    assert games.described(random.Random(5), game, TEXT, ("avoid",)) == (
        "Do not begin with It is. Text: soup Ada fox mill.")


def test_descriptions_fit_and_bad_examples_are_wrong():
    draw, tokenizer = random.Random(1), get_tokenizer("tinytown")
    rows = games.described_rows(draw, games.CLUSTERS, 400, flan.SCHEMAS[3])
    assert max(len(tokenizer.render(row["messages"])[0]) for row in rows) <= 128
    starts = {row["messages"][1]["content"].split()[0] for row in rows}
    assert starts == {"So:", "It"}
    for row in rows:
        asked, answer = (message["content"] for message in row["messages"])
        avoided = asked.partition("begin with ")[2]
        assert not answer.startswith(avoided[:3])


# ----------------------------------------------------------------------------- the town's mixtures

def test_every_use_case_is_in_one_group():
    assert set(flan.GROUPS) == {family.use_case for family in FAMILIES}
    assert set(flan.ALONE) <= set(flan.GROUPS.values())


def test_the_cap_stands_between_proportional_and_equal():
    """It cuts the largest group and no other."""
    config = flan.Config()
    cases = [family.use_case for _, family, _ in instructions("sft", config.pool, config.seed)]
    sizes = sorted(Counter(flan.GROUPS[case] for case in cases).values())
    assert sizes[-2] < config.cap < sizes[-1]


# ----------------------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def measured(town, tmp_path_factory):
    """(figures, folder, config) of a run of two updates a model."""
    out, home = tmp_path_factory.mktemp("flan"), tmp_path_factory.mktemp("run")
    for name, source in {"base": "base", "base_large": "base", "data": "data"}.items():
        (home / name).symlink_to(town / source)
    config = flan.Config(run=str(home), out=str(out), steps=2, mix_steps=2, asked=16, pool=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flan, "CLUSTERS", (2, 32))
        patch.setattr(flan, "LARGER", (32,))
        patch.setattr(flan, "PHRASINGS", (1, 8))
        patch.setattr(flan, "SCHEMAS", flan.SCHEMAS[3:4])
        patch.setattr(flan, "ALONE", ("edits",))
        patch.setattr(flan, "TEMPERATURES", (0.0, 1.0))
        found = flan.measure(config)
        stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/model.pt")}
        assert flan.measure(config) == found             # what is trained is not trained anew
        assert stamps == {path: path.stat().st_mtime_ns for path in out.glob("*/model.pt")}
    return found, out, config


def test_the_command_end_to_end(measured):
    found, out, _ = measured
    written = json.loads((out / "table.json").read_text())
    assert list(written["clusters"]) == ["2", "32", "32, larger"]
    assert list(written["phrasings"]) == ["1, seen", "1, held out", "8, seen", "8, held out"]
    assert all(len(values) == 10 for values in written["unseen"].values())
    assert list(written["mixture"]) == ["edits alone", "proportional", "capped", "equal"]
    assert all({"mean, T = 0", "T = 1", "best T"} <= set(row) for row in found["mixture"].values())
    assert (out / "flan.png").exists()


def rows_in(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_points_of_a_part_have_equally_many_rows(measured):
    _, out, _ = measured
    files = [path for path in out.glob("*.jsonl") if path.name != "val.jsonl"]
    assert len(files) == 3 + 1 + 1 + 4 and {len(rows_in(path)) for path in files} == {64}


def test_the_larger_base_is_tuned_on_the_same_rows(measured):
    _, out, _ = measured
    assert (out / "clusters_32.jsonl").read_text() == (out / "clusters_32_larger.jsonl").read_text()
    written = json.loads((out / "clusters_32_larger/config.json").read_text())["run"]
    assert written["init"].endswith("base_large") and written["lr"] == flan.Config().large_lr


def test_no_prompt_of_validation_or_test_is_trained_on(measured):
    _, out, _ = measured
    prompts = [row["messages"][:-1] for path in out.glob("mixture_*.jsonl")
               for row in rows_in(path)]
    assert prompts and {split_of(messages) for messages in prompts} == {"sft"}
    assert all(understand(row["messages"][:-1])[0].use_case in ("rewrite", "summarization")
               for row in rows_in(out / "mixture_edits_alone.jsonl"))


def test_exact_match_asks_for_the_letter(measured, monkeypatch):
    _, out, config = measured
    model = flan.load_gpt(f"{config.run}/base")[0]
    rows = [games.demonstration("Say it.", "So: fox.")] * 4
    for texts, share in ((["So: fox."] * 4, 1), (["So: fox.", "so: fox.", "So: fox", ""], 0.25)):
        monkeypatch.setattr(flan, "respond", lambda *_, **__: [
            flan_response(text) for text in texts])
        assert flan.exact_match(model, rows, config) == share
    monkeypatch.setattr(flan, "respond", lambda *_, **__: [flan_response("So: fox.", False)] * 4)
    assert flan.exact_match(model, rows, config) == 0


def flan_response(text: str, ended: bool = True):
    from rollout import Response
    return Response([], text, ended)


@pytest.mark.parametrize("bad, words", [
    (dict(cap=0), "--cap 0"), (dict(steps=0), "--steps 0"), (dict(asked=0), "--asked 0")])
def test_bad_flags(town, tmp_path, bad, words):
    with pytest.raises(InputError, match=words):
        flan.measure(flan.Config(run=str(town), out=str(tmp_path), **bad))


MUTANTS = [
    (flan, "mixing_weights", "no cap", Edit("min(size, cap)", "size"), test_mixing_weights_by_hand),
    (flan, "mixing_weights", "a temperature the wrong way round",
     Edit("/ temperature", "* temperature"), test_mixing_weights_by_hand),
    (flan, "mixing_weights", "no sum of 1", Edit("/ sum(parts)", "/ len(parts)"),
     test_mixing_weights_by_hand),
    (flan, "threshold", "half of the last value", Edit("abs(last - first) / 2", "abs(last) / 2"),
     test_threshold_by_hand),
    (flan, "threshold", "the first that is higher", Edit("/ 2)", "* 0)"), test_threshold_by_hand),
    (games, "rows_of", "phrasings go with clusters", Edit("i // len(clusters) %", "i %"),
     test_clusters_and_phrasings_have_equal_shares),
    (games, "described", "a bad example that is right",
     Edit("| {game.kind: spoiled[third]}", "| {}"), test_a_description_by_hand),
    (games, "described", "the form that is wanted is avoided",
     Edit("form != game.form", "form == game.form"), test_a_description_by_hand),
]


test_a_classic_wrong_answer_is_caught = catching(MUTANTS)
