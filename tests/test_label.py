"""The crowdworker's page without a browser: what a label is, what survives, what is refused, how
far annotators agree. In a browser: test_label_page.py."""
import errno
import http.client
import inspect
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from functools import wraps
from itertools import product
from pathlib import Path

import pytest
import torch
from test_mutants import Edit, catching

import train_dpo
import train_rm
from common.errors import InputError
from data.batches import ranking_rows
from data.readers import read_rankings
from data.tokenizer import get_tokenizer
from rollout import Response
from systems import agreement, desk, label, page
from systems.desk import TIE, Desk, Labels

ROOT = Path(__file__).parent.parent
WORDS = ("fox", "owl", "cat", "dog", "hen", "crow", "goat", "frog", "bee", "ant", "mole", "crab")


def words(messages, k, seed):
    """k different answers, as a model might give them."""
    chosen = random.Random(seed).sample(WORDS, k)
    return [{"text": f"The {word}.", "ended": True, "model": "m"} for word in chosen]


def prompts(n: int) -> list[tuple]:
    return [([{"role": "user", "content": f"Question {i}?"}], None) for i in range(n)]


def given(*answers: tuple[str, ...]) -> list[tuple]:
    return [(messages, [{"text": text, "ended": True} for text in texts])
            for (messages, _), texts in zip(prompts(len(answers)), answers)]


class Person:
    """One annotator before a desk, as the page is."""

    def __init__(self, at: Desk, name: str = "Ada"):
        self.at, self.name = at, name
        _, self.screen = at.act({"annotator": name})

    def do(self, action: str, expect: int = 200, **fields):
        status, answer = self.at.act({"annotator": self.name, "id": self.screen["id"],
                                      "action": action, **fields})
        assert status == expect, answer
        if status == 200:
            self.screen = answer
        return answer

    @property
    def texts(self) -> list[str]:
        return [answer["text"] for answer in self.screen["answers"]]


def rows_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "labels.jsonl"


# ----------------------------------------------------------------------------- equations

def test_the_scale_by_hand():
    assert [desk.scores_of(rating) for rating in (1, 4, TIE, 5, 8)] == [
        [1, 0], [1, 0], [0, 0], [0, 1], [0, 1]]
    assert [3 * desk.margin_of(rating) for rating in desk.RATINGS] == pytest.approx(
        [3, 2, 1, 0, 0, 0, 1, 2, 3])


def test_scores_of_ranks_by_hand():
    assert desk.scores_of_ranks([3, 1, 2, 1, 4]) == [1, 3, 2, 3, 0]
    assert desk.scores_of_ranks([1, 1, 1]) == [0, 0, 0]
    assert desk.scores_of_ranks([9, 2, 9]) == [0, 1, 0]


def test_kappa_by_hand():
    """One says tie in half of the pairs, the other in a fifth: 0.1 + 0.5·0.8/2 = 0.3."""
    assert agreement.by_chance(0, 0) == 0.5 and agreement.by_chance(1, 1) == 1
    assert agreement.by_chance(0.5, 0.2) == pytest.approx(0.3)
    assert agreement.kappa(0.7, 0.5) == pytest.approx(0.4)
    assert agreement.kappa(1, 0.5) == 1 and agreement.kappa(0.5, 0.5) == 0
    assert agreement.kappa(0.25, 0.5) == -0.5 and math.isnan(agreement.kappa(1, 1))


def test_chance_is_cohens_with_every_pair_in_both_orders():
    """P_e = Σ_c p₁(c)·p₂(c) counted out over verdicts and their mirror images."""
    draw = random.Random(0)
    said = [(draw.choice((-1, 0, 1)), draw.choice((-1, 1, 1, 0))) for _ in range(200)]
    both = said + [(-a, -b) for a, b in said]
    shares = [[sum(pair[who] == c for pair in both) / len(both) for c in (-1, 0, 1)]
              for who in (0, 1)]
    expected = sum(a * b for a, b in zip(*shares))
    assert agreement.figures([said])["chance"] == pytest.approx(expected)


def test_verdicts_by_hand():
    one, other = {"a": 2, "b": 1, "c": 1}, {"a": 0.1, "c": 0.3, "b": 0.1}
    assert agreement.verdicts(one, other) == [(1, 0), (1, -1), (0, -1)]


def test_figures_by_hand():
    """Three rows: 1 of 1, 0 of 1, 2 of 4 pairs agree: 3 of 6. Deviations ½, −½, 0; √(3/2·½)/6. Of
    six pairs the one ties 1, the other 2: P_e = 1/18 + (5/6)(4/6)/2 = 1/3; κ = ¼. Without ties: 2
    of 4."""
    rows = [[(1, 1)], [(1, -1)], [(-1, -1), (0, 0), (1, 0), (1, -1)]]
    found = agreement.figures(rows)
    assert (found["rows"], found["pairs"], found["agree"], found["untied"]) == (3, 6, 0.5, 0.5)
    assert found["error"] == pytest.approx(math.sqrt(0.75) / 6)
    assert found["chance"] == pytest.approx(1 / 3) and found["kappa"] == pytest.approx(0.25)
    assert math.isnan(agreement.figures(rows[:1])["error"])


def test_pooled_by_hand():
    """One couple of 2 pairs without ties (P_e ½), one of 1 pair, both a tie (P_e 1): P_o = 2/3,
    P_e = 2/3, κ = 0."""
    found = agreement.pooled([[[(1, 1)], [(1, -1)]], [[(0, 0)]]])
    assert (found["rows"], found["pairs"]) == (3, 3) and math.isnan(found["error"])
    assert found["agree"] == pytest.approx(2 / 3) == found["chance"]
    assert found["kappa"] == pytest.approx(0)


def test_agreement_does_not_depend_on_the_order_in_a_file():
    draw, scores = random.Random(1), (0, 1, 1, 2)
    one, other = ({text: draw.choice(scores) for text in WORDS} for _ in range(2))
    found = agreement.figures([agreement.verdicts(one, other)])
    turned = dict(reversed(one.items()))
    assert agreement.figures([agreement.verdicts(turned, other)]) == found


# ----------------------------------------------------------------------------- talking

def test_a_conversation(out):
    person = Person(Desk(Labels(out), words))
    assert person.screen["messages"] == [] and person.screen["answers"] == []
    person.do("say", text="  Which animal? ")
    first, second = person.texts
    person.do("label", rating=7, comment="more to it")
    assert person.screen["messages"] == [
        {"role": "user", "content": "Which animal?"}, {"role": "assistant", "content": second}]
    person.do("say", text="And then?")
    kept = person.texts[0]
    person.do("label", rating=TIE)                        # the first of equals goes on
    assert person.screen["messages"][-1] == {"role": "assistant", "content": kept}
    assert person.screen["labels"] == 2
    row, tie = rows_in(out)
    assert row == {
        "messages": [{"role": "user", "content": "Which animal?"}],
        "responses": [{"text": first, "ended": True, "model": "m", "score": 0.0},
                      {"text": second, "ended": True, "model": "m", "score": 1.0}],
        "margin": 0.6667, "rating": 7, "annotator": "Ada", "id": row["id"],
        "comment": "more to it"}
    assert [one["score"] for one in tie["responses"]] == [0, 0] and len(tie["messages"]) == 3
    first, second = read_rankings(out)
    assert first.margin == 0.6667 and first.scores == [0, 1] and not second.untied


def test_undo_brings_the_label_back(out):
    person = Person(Desk(Labels(out), words))
    for rating in (2, 5):
        person.do("say", text="Which?")
        seen = person.texts
        person.do("label", rating=rating, comment="because")
    person.do("undo")
    assert person.texts == seen and len(person.screen["messages"]) == 3
    assert person.screen["said"]["rating"] == 5 and person.screen["said"]["comment"] == "because"
    assert len(rows_in(out)) == 1 == person.screen["labels"]
    person.do("label", rating=1)
    assert [row["rating"] for row in rows_in(out)] == [2, 1]
    person.do("undo")
    person.do("undo")
    assert out.read_text() == "" and len(person.screen["messages"]) == 1
    assert person.do("undo", 400) == {"error": "there is nothing to undo"}


def test_undo_of_what_was_no_label(out):
    """Of two other answers, of a new conversation, of a message, each before any label."""
    person = Person(Desk(Labels(out), words))
    person.do("say", text="Which?")
    person.do("undo")
    assert person.screen["said"] == {"text": "Which?"} and person.screen["messages"] == []
    person.do("say", text="Which?")
    seen = person.texts
    person.do("skip")
    assert person.texts != seen
    person.do("undo")
    assert person.texts == seen
    person.do("label", rating=1)
    before = person.screen["messages"]
    person.do("fresh")
    assert person.screen["messages"] == []
    person.do("undo")
    assert person.screen["messages"] == before and len(rows_in(out)) == 1


def test_equal_answers_are_a_tie(out):
    same = [{"text": "Yes.", "ended": True, "model": name} for name in "ab"]
    person = Person(Desk(Labels(out), lambda *_: same))
    person.do("say", text="Yes?")
    assert "that is a tie" in person.do("label", 400, rating=1)["error"]
    person.do("label", rating=TIE)
    assert len(rows_in(out)) == 1


@pytest.mark.parametrize("fields, words_", [
    (dict(action="label", rating=0), "rating 0: expected 1 to 8"),
    (dict(action="label", rating=True), "rating True"),
    (dict(action="label", rating=[1]), "rating [1]"),
    (dict(action="label"), "rating None"),
    (dict(action="label", rating=1, comment=7), "comment: expected text"),
    (dict(action="label", rating=1, comment="x" * 10_001), "comment: expected text"),
    (dict(action="label", rating=1, comment="half a \ud800 pair"), "half of a surrogate pair"),
    (dict(action="say", text="more"), "nothing to be said now"),
    (dict(action="format"), "action 'format'"), (dict(action=["say"]), "action ['say']"),
    (dict(annotator=""), "annotator ''"), (dict(annotator="a\x00b"), "annotator 'a\\x00b'"),
    (dict(annotator="x" * 61), "at most 60"), (dict(annotator=None), "annotator None")])
def test_bad_requests_change_nothing(out, fields, words_):
    person = Person(Desk(Labels(out), words))
    person.do("say", text="Which?")
    request = {"annotator": "Ada", "id": person.screen["id"]} | fields
    status, answer = person.at.act(request)
    assert status == 400 and words_ in answer["error"]
    assert person.at.act({"annotator": "Ada"})[1] == person.screen and not out.exists()


@pytest.mark.parametrize("text, words_", [
    ("  ", "field text: expected text"), (7, "expected text"), ("\udfff", "surrogate"),
    ('[{"role": "user"}]', "messages written as text")])
def test_what_the_readers_refuse_is_not_said(out, text, words_):
    person = Person(Desk(Labels(out), words))
    assert words_ in person.do("say", 400, text=text)["error"]


def test_an_action_on_another_screen_is_not_taken(out):
    """The same click twice, or two windows: one label, and the second sees where it is."""
    person = Person(Desk(Labels(out), words))
    person.do("say", text="Which?")
    request = {"annotator": "Ada", "id": person.screen["id"], "action": "label", "rating": 1}
    status, after = person.at.act(request)
    assert status == 200
    status, answer = person.at.act(request | {"rating": 8})
    assert status == 409 and answer["screen"] == after and len(rows_in(out)) == 1


# ----------------------------------------------------------------------------- ranking

def test_rankings_in_order(out):
    at = Desk(Labels(out), words, prompts(3), "rank", least=5, most=5)
    person = Person(at)
    assert person.screen["items"] == 3 and len(person.texts) == 5
    person.do("label", ranks=[2, 1, 3, 1, 4], comment="")
    row, = rows_in(out)
    assert [one["score"] for one in row["responses"]] == [2, 3, 1, 3, 0]
    assert "margin" not in row and "rating" not in row and "comment" not in row
    assert person.screen["messages"][0]["content"] == "Question 1?"
    for ranks in ([1, 2], [1, 2, 3, 4, 5.5], [1, 2, 3, 4, True], "abcde", None):
        assert "expected 5 whole numbers" in person.do("label", 400, ranks=ranks)["error"]
    person.do("undo")
    assert person.screen["said"]["ranks"] == [2, 1, 3, 1, 4]


def test_skipped_prompts_come_again_at_the_end(out):
    person = Person(Desk(Labels(out), words, prompts(3), "rank"))

    def now() -> str:
        return person.screen["messages"] and person.screen["messages"][0]["content"]
    person.do("skip")
    assert now() == "Question 1?" and person.screen["skipped"] == 1
    person.do("undo")
    assert now() == "Question 0?" and person.screen["skipped"] == 0
    person.do("skip")
    for place in (1, 2):
        assert now() == f"Question {place}?"
        person.do("label", ranks=list(range(len(person.texts))))
    assert person.screen["messages"] == [] and person.screen["skipped"] == 1
    assert "nothing to rate" in person.do("label", 400)["error"]
    assert "nothing to skip" in person.do("skip", 400)["error"]
    person.do("fresh")
    assert now() == "Question 0?"
    person.do("label", ranks=list(range(len(person.texts))))
    assert person.screen["messages"] == [] and person.screen["labels"] == 3


def test_two_annotators_see_the_same_answers(out):
    at = Desk(Labels(out), words, prompts(4), "rank")
    people = Person(at), Person(at, "Ben")
    sizes = set()
    for _ in range(4):
        one, other = people
        assert one.texts == other.texts
        sizes.add(len(one.texts))
        for person in people:
            person.do("label", ranks=[1] * len(person.texts))
    assert len(sizes) > 1 and sizes <= set(range(4, 10)) and len(rows_in(out)) == 8


def test_given_answers_come_in_an_order_of_each_annotators_own(out):
    """Pairs have the chosen one first: where it stands must not give it away."""
    at = Desk(Labels(out), None, given(*[("Good.", "Bad.")] * 30), "rank")
    people = [Person(at, name) for name in ("Ada", "Ben")]
    first = [[], []]
    for _ in range(30):
        for person, seen in zip(people, first):
            seen.append(person.texts[0])
            person.do("label", rating=1 if person.texts[0] == "Good." else 8)
    assert first[0] != first[1] and all(4 < seen.count("Good.") < 26 for seen in first)
    found = agreement.agreement((str(out),))["Ada", "Ben"]
    assert found["agree"] == 1 == found["kappa"] and found["pairs"] == 30


def test_a_prompt_without_answers_is_skipped_and_said(out, capsys):
    def write(messages, k, seed):
        if messages[0]["content"] == "Question 0?":
            raise InputError("the model says the same each time")
        return words(messages, k, seed)
    person = Person(Desk(Labels(out), write, prompts(2), "rank"))
    assert person.screen["messages"][0]["content"] == "Question 1?"
    assert person.screen["skipped"] == 1 and "says the same" in capsys.readouterr().err


def test_given_items(tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": "A hue?", "chosen": "Red.", "rejected": "No."},
            {"prompt": "A?", "responses": ["Yes.", "Yes."], "scores": [1, 0]},
            {"prompt": "B?", "responses": [{"text": "1.", "score": 1, "ended": False},
                                           {"text": "2.", "score": 1}, {"text": "2.", "score": 0}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert label.given_items((str(path),)) == [
        ([{"role": "user", "content": "A hue?"}],
         [{"text": "Red.", "ended": True}, {"text": "No.", "ended": True}]),
        ([{"role": "user", "content": "B?"}],
         [{"text": "1.", "ended": False}, {"text": "2.", "ended": True}])]
    assert "3 rankings: 1 left out" in capsys.readouterr().err
    path.write_text(json.dumps({"prompt": "C?", "responses": list("abcdefghij"),
                                "scores": [0] * 10}))
    with pytest.raises(InputError, match="10 answers to 'C.'; a page shows 9"):
        label.given_items((str(path),))


# ----------------------------------------------------------------------------- what survives

def rated(out: Path, count: int = 2) -> Person:
    person = Person(Desk(Labels(out), words))
    for _ in range(count):
        person.do("say", text="Which?")
        person.do("label", rating=2)
    return person


def test_a_new_server_goes_on_where_each_annotator_was(out):
    people = [rated(out), None]
    people[1] = Person(people[0].at, "Ben")
    people[0].do("say", text="And?")
    people[1].do("say", text="Ben's?")
    people[1].do("skip")
    again = Desk(Labels(out), words)
    for person in people:
        assert again.act({"annotator": person.name}) == (200, person.screen)
    assert again.state["token"] == people[0].at.state["token"]
    other = Desk(Labels(out), words, prompts(2), "rank", what=["rank"])     # another task: anew
    assert other.act({"annotator": "Ada"})[1]["messages"] == prompts(2)[0][0]


def test_killed_between_the_label_and_the_next_screen(out, monkeypatch):
    """The label is on the disk, where the annotator is is not: the page asks again, and there is
    one label."""
    person = rated(out)
    person.do("say", text="Which?")
    request = {"annotator": "Ada", "id": person.screen["id"], "action": "label", "rating": 8}
    monkeypatch.setattr(Desk, "keep", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        person.at.act(request)
    monkeypatch.undo()
    assert len(rows_in(out)) == 3
    again = Desk(Labels(out), words)
    status, answer = again.act(request)
    assert status == 409 and len(rows_in(out)) == 3
    assert answer["screen"]["messages"][-1]["content"] == person.texts[1]
    assert answer["screen"]["answers"] == []


def test_killed_in_the_middle_of_undo(out, monkeypatch):
    """Before the row is taken from the file nothing has happened, and nothing happens twice."""
    person = rated(out)
    request = {"annotator": "Ada", "id": person.screen["id"], "action": "undo"}
    monkeypatch.setattr(Labels, "remove", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        person.at.act(request)
    monkeypatch.undo()
    again = Desk(Labels(out), words)
    status, answer = again.act(request)
    assert status == 409 and len(rows_in(out)) == 2
    assert answer["screen"]["messages"] == person.screen["messages"]


def test_a_last_line_that_was_cut_off(out, capsys):
    rated(out)
    whole = out.read_bytes()
    for cut in (1, 12, 60):
        out.write_bytes(whole + whole.splitlines()[0][:cut])
        labels = Labels(out)
        assert len(labels.rows) == 2 and out.read_bytes() == whole
        assert "its last line is cut off" in capsys.readouterr().err
    out.write_bytes(whole[:-1])                          # whole, but for the end of its line
    assert len(Labels(out).rows) == 2 and out.read_bytes() == whole


@pytest.mark.parametrize("content, words_", [
    (b"plain text", "line 1: expected JSON"), (b'{"a": 1}\n', "line 1: expected a label"),
    (b'[{"messages": []}]', "expected a label"), (b"\x1f\x8b\x08\xff", "line 1: expected UTF-8"),
    (b'{"prompt": "A?", "responses": [{"text": "a"}]}\n', "a list of at least 2"),
    (b'{"prompt": "A?", "responses": ["a", "b"], "scores": [1, 0]}\n', "expected a label"),
    (b'{"prompt": "A?", "resp', "expected JSON")])
def test_a_file_of_something_else_is_left_as_it_is(out, content, words_):
    out.write_bytes(content)
    with pytest.raises(InputError, match=words_):
        Labels(out)
    assert out.read_bytes() == content


def test_a_folder_and_a_state_that_is_none(out):
    out.mkdir()
    with pytest.raises(InputError, match="a folder; name a file"):
        Labels(out)
    out.rmdir()
    for content in ("[]", "{}x", '{"token": 1}', '{"what": null, "sessions": {"a": {"b": 1}}}'):
        out.with_name("labels.jsonl.state").write_text(content)
        with pytest.raises(InputError, match="labels.jsonl.state"):
            Desk(Labels(out), words)


def test_a_second_process_may_not_write(out):
    code = f"from systems.desk import Labels\nfrom pathlib import Path\nLabels(Path({str(out)!r}))"
    first = Labels(out)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "another process is writing to it" in done.stderr
    first.lock.close()


class Room:
    """No file of this process may grow beyond so many bytes: a disk that is full after a part of
    what is written."""

    def __init__(self):
        self.resource = pytest.importorskip("resource")
        self.before = self.resource.getrlimit(self.resource.RLIMIT_FSIZE)

    def only(self, size: int):
        self.resource.setrlimit(self.resource.RLIMIT_FSIZE, (size, self.before[1]))

    def enough(self):
        self.resource.setrlimit(self.resource.RLIMIT_FSIZE, self.before)


@pytest.fixture
def short_of_room():
    room = Room()
    yield room
    room.enough()


def test_a_full_disk_loses_nothing_and_says_so(out, short_of_room):
    person = rated(out)
    person.do("say", text="Which?")
    before, state = out.read_bytes(), person.at.path.read_bytes()
    short_of_room.only(len(before) + 40)                  # a part of the line fits
    answer = person.do("label", 507, rating=1)
    short_of_room.enough()
    assert answer["error"].startswith("Not saved: ") and str(out) in answer["error"]
    assert out.read_bytes() == before and person.at.path.read_bytes() == state
    person.do("label", rating=1)                          # the same screen, once there is room
    assert out.read_bytes().startswith(before) and len(rows_in(out)) == 3


def test_a_disk_that_is_full_after_the_label(out, monkeypatch):
    """There is room for the label, not for where the annotator is: it is not written twice."""
    person = rated(out, 0)
    person.do("say", text="Which?")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(desk, "write_json", full)
    assert "No space left" in person.do("label", 507, rating=1)["error"]
    assert person.do("label", 507, rating=1) and len(rows_in(out)) == 1
    monkeypatch.undo()
    assert len(rows_in(out)) == 1
    assert person.do("label", 409, rating=1)["screen"]["labels"] == 1
    assert len(rows_in(out)) == 1


def test_undo_on_a_full_disk(out, short_of_room):
    person = rated(out, 6)
    before = out.read_bytes()
    short_of_room.only(max(person.at.path.stat().st_size + 600, len(before) // 2))
    assert len(before) * 5 / 6 > max(person.at.path.stat().st_size + 600, len(before) // 2), "test"
    person.do("undo", 507)
    short_of_room.enough()
    assert out.read_bytes() == before and not out.with_name("labels.jsonl.partial").exists()
    _, screen = person.at.act({"annotator": "Ada"})
    assert screen["labels"] == 6 and screen["messages"] == person.screen["messages"]


# ----------------------------------------------------------------------------- the server

@pytest.fixture
def serve():
    """A function that serves a desk, or any `act`, and gives its port."""
    served = []

    def start(act, token: str = "", text: str = "<script>1</script><style>2</style>") -> int:
        web = page.server(text, act, "127.0.0.1", 0, token)
        threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
        served.append(web)
        return web.server_port
    yield start
    for web in served:
        web.shutdown()
        web.server_close()


def ask(port: int, method: str = "POST", path: str = "/", body=b"{}", pause: float = 0, **headers):
    """(status, headers, body); a header of None is not sent. pause: seconds in the middle."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    link.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    sent = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json",
            "Content-Length": str(len(body))}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    for name, value in sent.items():
        if value is not None:
            link.putheader(name, value)
    link.endheaders()
    if pause:
        link.send(body[:9])
        time.sleep(pause)
    link.send(body[9:] if pause else body)
    answer = link.getresponse()
    return answer.status, answer.headers, answer.read()


def fine(request: dict) -> tuple[int, dict]:
    return 200, {"heard": request}


def test_the_page_and_its_function(serve):
    port = serve(fine)
    assert ask(port, body=b'{"a": "<b>"}')[::2] == (200, b'{"heard": {"a": "<b>"}}')
    status, headers, body = ask(port, "GET", Content_Type=None)
    assert status == 200 and body == b"<script>1</script><style>2</style>"
    rules = headers["Content-Security-Policy"]
    assert "default-src 'none'" in rules and "frame-ancestors 'none'" in rules
    assert "'sha256-a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s='" in rules       # of "1"
    assert "unsafe" not in rules and headers["X-Content-Type-Options"] == "nosniff"
    assert ask(port, "GET", "/etc/passwd")[0] == 404 and ask(port, "PUT")[0] == 501


def test_refusal_by_hand():
    right = {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000",
             "Content-Type": "application/json", "Content-Length": "2"}
    assert page.refusal(right, "") is None
    assert page.refusal(right | {"Authorization": "Bearer secret"}, "secret") is None
    for wrong, token, status in [
            ({"Host": "evil.example", "Origin": "http://evil.example"}, "", 403),
            ({"Origin": "http://evil.example"}, "", 403), ({"Content-Type": "text/plain"}, "", 415),
            ({"Authorization": "Bearer secre"}, "secret", 401), ({}, "secret", 401),
            ({"Content-Length": str(page.LIMIT + 1)}, "", 413)]:
        refused = page.refusal(right | wrong, token)
        assert refused and refused[0] == status, wrong


@pytest.mark.parametrize("headers, status", [
    (dict(Host="evil.example:8000"), 403), (dict(Host="127.0.0.1.evil.example"), 403),
    (dict(Host=None), 403), (dict(Host="localhost:9"), 200), (dict(Host="localhost"), 200),
    (dict(Origin="http://evil.example"), 403), (dict(Origin="null"), 403),
    (dict(Content_Type="text/plain"), 415), (dict(Content_Type=None), 415),
    (dict(Content_Type="application/x-www-form-urlencoded"), 415),
    (dict(Content_Type="application/json; charset=utf-8"), 200),
    (dict(Content_Length=None), 411), (dict(Content_Length="-1"), 411),
    (dict(Content_Length=str(2 ** 18 + 1)), 413), (dict(Content_Length="9" * 30), 411)])
def test_forged_requests_are_refused(serve, headers, status):
    assert ask(serve(fine), **headers)[0] == status


def test_the_page_itself_is_of_the_same_origin(serve):
    port = serve(fine)
    assert ask(port, Origin=f"http://127.0.0.1:{port}")[0] == 200
    assert ask(port, Origin=f"http://127.0.0.1:{port + 1}")[0] == 403
    assert ask(port, "GET", Host="evil.example")[0] == 404


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b"[" * 100_000, b"\xff"])
def test_junk_is_refused(serve, body):
    status, _, answer = ask(serve(fine), body=body)
    assert status == 400 and "expected" in json.loads(answer)["error"]


def test_a_token_for_everybody_else(serve):
    port = serve(fine, token="a-secret-é")
    for given_ in (None, "Bearer ", "Bearer a-secret", "a-secret-x"):
        assert ask(port, Authorization=given_)[0] == 401
    sent = "Bearer a-secret-é".encode().decode("latin-1")
    assert ask(port, Authorization=sent)[0] == 401             # latin-1 is what a header holds
    port = serve(fine, token="a-secret")
    assert ask(port, Authorization="Bearer a-secret", Host="lab.example:80")[0] == 200


def test_a_refusal_of_a_long_request_is_heard(serve):
    """By a client that is slow to send, too: the server listens to the end."""
    port = serve(fine, token="a-secret")
    assert ask(port, body=b" " * page.LIMIT, pause=0.2)[0] == 401


def test_one_requests_fault_ends_no_server(serve, capsys):
    def act(request):
        raise RuntimeError("out of luck")
    port = serve(act)
    for _ in range(2):
        status, _, answer = ask(port)
        assert status == 500 and b"RuntimeError: out of luck" in answer
    assert "Traceback" in capsys.readouterr().err


def test_an_address_that_is_taken(serve):
    with pytest.raises(InputError, match=r"--port \d+: .*name another port"):
        page.server("", fine, "127.0.0.1", serve(fine))


def test_text_is_never_html():
    """The pages make nodes; nothing in them reads text as HTML or as code."""
    for name in ("label", "rollouts"):
        source = (ROOT / f"systems/{name}.html").read_text("utf-8")
        for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(",
                     "Function(", "srcdoc", "DOMParser", "http:", "https:", "//cdn"):
            assert word not in source, f"{name}.html: {word}"


# ----------------------------------------------------------------------------- models

@pytest.fixture(scope="module")
def policy(town):
    from common.checkpoint import load_gpt
    return load_gpt(str(town / "sft"))


def config_of(town: Path, out: Path, **changes) -> label.Config:
    return label.Config(**dict(init=str(town / "sft"), out=str(out), max_new_tokens=16, port=0,
                               device="cpu") | changes)


ASKED = [{"role": "user", "content": "Where does Ada live?"}]


def test_answers_differ_and_can_be_read(policy, town, out, monkeypatch):
    model, tokenizer = policy
    config = config_of(town, out)
    found = label.answers_of(model, tokenizer, ASKED, 6, 3, config, "m")
    assert len({one["text"] for one in found}) == 6
    assert found == label.answers_of(model, tokenizer, ASKED, 6, 3, config, "m")
    assert found != label.answers_of(model, tokenizer, ASKED, 6, 4, config, "m")
    said = iter(["", " ", "<|endoftext|>", "Yes.<|endoftext|>", "Yes.", "No.",
                 '[{"role": "user"}]', "So."] * 8)
    monkeypatch.setattr(label, "respond", lambda model, prompts, *_, **__: [
        Response([], next(said), True) for _ in prompts])
    texts = [one["text"] for one in label.answers_of(model, tokenizer, ASKED, 3, 3, config, "m")]
    assert texts == ["Yes.", "No.", "So."]
    monkeypatch.setattr(label, "respond", lambda model, prompts, *_, **__: [
        Response([], "", True) for _ in prompts])
    with pytest.raises(InputError, match="m: no answer with text in it in 16 samples"):
        label.answers_of(model, tokenizer, ASKED, 2, 3, config, "m")
    with pytest.raises(InputError, match=r"\d+ tokens, .* leaves room for 80: say it shorter"):
        label.answers_of(model, tokenizer, [{"role": "user", "content": "Ada " * 90}], 2, 3,
                         config, "m")


def test_a_model_that_always_says_the_same(policy, town, out):
    write = label.writer([("m", *policy)], config_of(town, out, temperature=0.0))
    with pytest.raises(InputError, match="says the same each time; raise --temperature"):
        write(ASKED, 2, 1)


def test_the_file_trains(town, out):
    """A reward model, margins included, and DPO read it as it is."""
    at = label.desk_of(config_of(town, out))
    person = Person(at)
    for place, rating in enumerate((1, TIE, 3, 8, 5, 2)):
        person.do("say", text=f"Where does {('Ada', 'Ben', 'Cora')[place % 3]} live?")
        person.do("label", rating=rating, comment="as it is" * (place == 2))
        person.do("fresh")
    rows = ranking_rows(read_rankings(out), get_tokenizer("tinytown"), 96)
    assert [3 * row.margin for row in rows] == pytest.approx([3, 0, 1, 3, 0, 2], abs=1e-3)
    assert all(response[-1] == get_tokenizer("tinytown").end or not one["ended"]
               for row, label_ in zip(rows, rows_in(out))
               for response, one in zip(row.responses, label_["responses"]))
    common = dict(data=(str(out),), init=str(town / "sft"), batch_size=2, device="cpu")
    found = train_rm.train(train_rm.Config(out=str(out.with_name("rm")), **common))
    assert 0 <= found["accuracy"] <= 1
    train_dpo.train(train_dpo.Config(out=str(out.with_name("dpo")), **common))
    assert (out.with_name("dpo") / "model.pt").exists()


def test_two_checkpoints_are_compared_blind(town, out):
    for name in "ab":
        shutil.copytree(town / "sft", out.with_name(name))
    names = tuple(str(out.with_name(name)) for name in "ab")
    at = label.desk_of(config_of(town, out, init="", compare=names))
    person, sides = Person(at), []
    for place in range(12):
        person.do("say", text="Where does Ada live?")
        assert not any(name in json.dumps(person.screen) for name in names)
        sides.append([one["model"] for one in at.sessions["Ada"].answers])
        same = person.texts[0] == person.texts[1]
        person.do("label", rating=TIE if same else 1)
        person.do("fresh")
    assert {tuple(side) for side in sides} == {names, names[::-1]}
    assert label.summary(at.labels.rows, names).splitlines()[1].startswith(
        f"{names[0]} against {names[1]}: ")


def test_the_win_rate_by_hand():
    """Of four comparisons 2 won, 1 tied, 1 lost: 2.5/4; std of (1, 1, ½, 0) is 0.4787, by √4."""
    def row(a: float, b: float, names=("a", "b")) -> dict:
        return {"annotator": "x", "responses": [{"model": name, "score": score}
                                                for name, score in zip(names, (a, b))]}
    rows = [row(1, 0), row(0, 1, ("b", "a")), row(0, 0), row(0, 1), row(1, 0, ("a", "c"))]
    assert label.summary(rows, ("a", "b")) == (
        "5 labels by 1 annotator\na against b: 62.5 ± 23.9 % of 4 comparisons (2 won, 1 tied, "
        "1 lost)")
    assert label.summary(rows[:1], ("a", "b")) == "1 label by 1 annotator"
    assert label.summary(rows[:2], ()) == "2 labels by 1 annotator"
    assert label.summary([], ("a", "b")) == "0 labels by 0 annotators"


@pytest.mark.parametrize("flags, words_", [
    (dict(out=""), "--out: name a file"), (dict(init=""), "--init: name the folder"),
    (dict(compare=("a",), init=""), "--compare: name two different"),
    (dict(compare=("a", "a"), init=""), "--compare: name two different"),
    (dict(compare=("a", "b")), "--compare: goes without"),
    (dict(rank=True), "--rank and --data: go together"), (dict(data=("a",)), "with --rank alone"),
    (dict(least=6, most=5), "--least 6"), (dict(most=10), "--most 10"),
    (dict(port=70000), "--port 70000"), (dict(max_new_tokens=96), "--max_new_tokens 96: the con")])
def test_bad_flags(town, out, flags, words_):
    with pytest.raises(InputError, match=words_):
        label.desk_of(replace(config_of(town, out), **flags))


def test_loopback_by_default_and_a_token_elsewhere(town, out, monkeypatch, capsys):
    """The link that is printed has the token after #, which browsers keep to themselves."""
    made, real = [], page.server

    def server(text, act, host, port, token=""):
        made.append((host, token))
        web = real(text, act, "127.0.0.1", port, token)
        monkeypatch.setattr(web, "serve_forever", lambda: os.kill(os.getpid(), signal.SIGTERM))
        return web
    monkeypatch.setattr(label, "server", server)
    before = signal.getsignal(signal.SIGTERM)
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "0.0.0.0"):
        label.label(config_of(town, out, host=host))
    signal.signal(signal.SIGTERM, before)
    tokens = [token for _, token in made]
    assert label.Config().host == "127.0.0.1" and tokens[:2] == ["", ""]
    assert len(tokens[2]) >= 20 and tokens[3] == tokens[2]       # of this file, for good
    assert f"/#{tokens[2]} " in capsys.readouterr().out


# ----------------------------------------------------------------------------- agreement of files

def test_agreement_of_files(tmp_path):
    """Rows of two annotators in one file, of a third in another; a file without names is one."""
    def row(prompt: str, scores: dict[str, float], **more) -> dict:
        return {"prompt": prompt, "responses": [{"text": text, "score": score}
                                                for text, score in scores.items()], **more}
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    rows = [row("A?", {"x": 1, "y": 0}, annotator="Ada"), row("A?", {"y": 0, "x": 1},
                                                             annotator="Ben"),
            row("B?", {"x": 0, "y": 0, "z": 1}, annotator="Ada"),
            row("C?", {"x": 0, "y": 1}, annotator="Ben"),
            row("A?", {"x": 0, "y": 1}, annotator="Ada")]               # the last one counts
    one.write_text("".join(json.dumps(one_) + "\n" for one_ in rows))
    two.write_text(json.dumps(row("B?", {"z": 5, "y": 1, "x": 0})) + "\n" + json.dumps(
        {"prompt": "A?", "chosen": "x", "rejected": "y"}) + "\n")
    found = agreement.agreement((str(one), str(two)))
    assert set(found) == {("Ada", "Ben"), ("Ada", "two.jsonl"), ("Ben", "two.jsonl"), ("all", "")}
    assert found["Ada", "Ben"]["agree"] == 0 and found["Ada", "Ben"]["pairs"] == 1
    assert found["Ben", "two.jsonl"]["agree"] == 1
    assert found["Ada", "two.jsonl"]["agree"] == 0.5 and found["all", ""]["pairs"] == 6
    assert "| Ada and Ben | 1 | 1 | 0.000 |  | 0.000 | 0.500 | -1.000 |" in agreement.table(found)
    two.write_text(json.dumps(row("D?", {"x": 1, "y": 0})))
    with pytest.raises(InputError, match="no two annotators have judged the same answers .*two.js"):
        agreement.agreement((str(two),))


def test_the_agreement_is_printed(town, capsys):
    label.label(label.Config(agreement=(str(town / "rank/rankings.jsonl"),
                                        str(town / "rank/clean.jsonl"))))
    assert "| clean.jsonl and rankings.jsonl | 20 |" in capsys.readouterr().out


def test_agreement_of_labels_drawn_at_random_is_none():
    draw = random.Random(3)
    for ties in (0.0, 0.3, 0.6):
        rows = [[tuple(0 if draw.random() < ties else draw.choice((-1, 1)) for _ in range(2))]
                for _ in range(4000)]
        assert abs(agreement.figures(rows)["kappa"]) < 0.05


def test_the_margin_is_one_of_rewards():
    """−log σ(r_w − r_l − m): a rating of 1 asks for a lead of 1, one of 4 for none."""
    rewards = torch.tensor([[2.0, 1.0]])
    losses = [train_rm.ranking_loss(rewards, torch.tensor([desk.scores_of(rating)]),
                                    margin=torch.tensor([[desk.margin_of(rating)]])).item()
              for rating in (1, 4)]
    assert losses == pytest.approx([math.log(2), math.log1p(math.exp(-1))])


def test_every_rating_has_a_place_on_the_scale():
    source = (ROOT / "systems/label.html").read_text("utf-8")
    assert "RATINGS = [1, 2, 3, 4, TIE, 5, 6, 7, 8]" in source and "TIE = 4.5" in source
    assert len(set(product(desk.RATINGS))) == 9


def alone(test):
    """A test that brings its own folder, patches and room, for the table of mutants."""
    @wraps(test)
    def run():
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            room = Room()
            parts = dict(out=Path(folder) / "labels.jsonl", monkeypatch=patch, short_of_room=room)
            try:
                test(**{name: parts[name] for name in inspect.signature(test).parameters})
            finally:
                room.enough()
    return run


TALK, KILLED = alone(test_a_conversation), alone(
    test_killed_between_the_label_and_the_next_screen)
MUTANTS = [
    (Desk, "after", "the worse goes on", Edit("max(row", "min(row"), TALK),
    (Desk, "act", "whatever is on the screen", Edit('request.get("id") != session.id', "False"),
     alone(test_an_action_on_another_screen_is_not_taken), KILLED),
    (Desk, "session", "asked again after a crash", Edit("if label else", "if not name else"),
     KILLED),
    (Desk, "undo", "a new id, so that a crash leaves both", Edit('id=row["id"], ', ""),
     alone(test_killed_in_the_middle_of_undo)),
    (Desk, "answers", "in the order of the data", Edit("draw.sample(given, len(given))", "given"),
     alone(test_given_answers_come_in_an_order_of_each_annotators_own)),
    (Desk, "answers", "other answers for each annotator",
     Edit("seed = seed_of(self.seed, key)", "seed = seed_of(self.seed, annotator + key)"),
     alone(test_two_annotators_see_the_same_answers)),
    (Labels, "add", "a part of a line stays", Edit("file.truncate(end)", "pass"),
     alone(test_a_full_disk_loses_nothing_and_says_so)),
    (Labels, "remove", "in memory before on the disk",
     Edit("    try:", "    self.rows = rows\n    try:"),
     alone(test_undo_on_a_full_disk)),
    (page, "refusal", "any host", Edit("not token and", "False and"), test_refusal_by_hand),
    (page, "refusal", "any origin", Edit("if origin and", "if False and"),
     test_refusal_by_hand),
    (page, "refusal", "any content", Edit('!= "application/json"', '== ""'), test_refusal_by_hand),
    (page, "refusal", "the beginning of a token",
     Edit("hmac.compare_digest(given.encode(), token.encode())",
          "token.startswith(given)"), test_refusal_by_hand),
    (page, "refusal", "any size", Edit("int(size) > LIMIT", "int(size) < 0"),
     test_refusal_by_hand),
    (desk, "scores_of", "sides changed", Edit("float(rating < TIE)", "float(rating > TIE)"),
     test_the_scale_by_hand),
    (desk, "margin_of", "a step too much", Edit("- 0.5", "+ 0.5"), test_the_scale_by_hand),
    (desk, "margin_of", "a negative margin for a tie", Edit("max(0.0, ", "sum([0.0], "),
     test_the_scale_by_hand),
    (desk, "scores_of_ranks", "1 is worst", Edit("reverse=True", "reverse=False"),
     test_scores_of_ranks_by_hand),
    (agreement, "by_chance", "as if nobody said tie", Edit("one * other + ", "0 * one + "),
     test_kappa_by_hand, test_chance_is_cohens_with_every_pair_in_both_orders),
    (agreement, "by_chance", "one of the two never chosen", Edit(" / 2", ""), test_kappa_by_hand),
    (agreement, "kappa", "not divided by what is open", Edit("/ (1 - chance)", "/ 1"),
     test_kappa_by_hand),
    (agreement, "verdicts", "a tie counts for the first", Edit("scores[a] > scores[b]",
                                                               "scores[a] >= scores[b]"),
     test_verdicts_by_hand),
    (agreement, "verdicts", "by place, not by answer",
     Edit("said(other, a, b)", "said(dict(zip(one, other.values())), a, b)"),
     test_verdicts_by_hand),
    (agreement, "figures", "errors over pairs", Edit("n / (n - 1)", "pairs / (pairs - 1)"),
     test_figures_by_hand),
    (agreement, "figures", "ties kept", Edit("if a and b", "if a or b"), test_figures_by_hand),
    (agreement, "pooled", "couples weigh the same",
     Edit('one["chance"] * one["pairs"] for one in each) / found["pairs"]',
          'one["chance"] for one in each) / len(each)'), test_pooled_by_hand),
    (label, "summary", "by side, not by model",
     Edit('one.get("model"): one["score"] for one in row["responses"]',
          'name: one["score"] for name, one in zip(compared, row["responses"])'),
     test_the_win_rate_by_hand),
]


test_a_classic_wrong_answer_is_caught = catching(MUTANTS)
