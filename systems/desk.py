"""The desk behind the crowdworker's page: who has what before them, and the file of what they say.

Two answers are rated on eight steps from "A is better" to "B is better", or tie (Bai et al. 2022):

    rating        1 2 3 4 · 5 6 7 8         tie 4.5
    better        A A A A   B B B B         none                           → scores_of
    margin        1 ⅔ ⅓ 0   0 ⅓ ⅔ 1         0                              → margin_of

A label is a line of OUT, a ranking in the project's layout. It is on the disk, whole, before the
page goes on. Where each annotator is stands in OUT.state, so that a killed server goes on there;
OUT.lock keeps a second process away.
"""
import json
import os
import random
import secrets
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from common.files import try_lock, write_atomically
from common.run import InputError, write_json
from data.readers import converted, ranking
from data.rows import describe, is_objects, parse_json
from data.turns import text
from systems.best_of_n import seed_of

TIE = 4.5                          # the rating of a tie
RATINGS = (1, 2, 3, 4, TIE, 5, 6, 7, 8)
BEGINS = b'{"messages": '          # as every label does

# (messages, K, seed) → up to K answers, at least two, {"text", "ended", "model"} each. InputError.
Write = Callable[[list[dict], int, int], list[dict]]
# A prompt of --rank and the answers that are given, or None where they are to be written.
Item = tuple[list[dict], list[dict] | None]


# ----------------------------------------------------------------------------- equations

def scores_of(rating: float) -> list[float]:
    """Scores of A and B, higher = better, from a rating: 1 to 4 A, 5 to 8 B, 4.5 a tie."""
    return [float(rating < TIE), float(rating > TIE)]


def margin_of(rating: float) -> float:
    """Llama 2's margin m(r), small variant (Touvron et al. 2023, table 27), of a rating: 1
    significantly better, ⅔ better, ⅓ slightly better, 0 negligibly better or a tie. It enters
    −log σ(r_w − r_l − m(r)), so it is in units of reward."""
    return max(0.0, abs(rating - TIE) - 0.5) / 3


def scores_of_ranks(ranks: list[int]) -> list[float]:
    """Scores from ranks, 1 = best, ties allowed: how many ranks are below."""
    order = sorted(set(ranks), reverse=True)
    return [float(order.index(rank)) for rank in ranks]


# ----------------------------------------------------------------------------- the file

def line_of(row: dict) -> bytes:
    """A row as its line in the file."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


class Labels:
    """The rows of a file of labels that this process alone may change. InputError if another one
    has it, or if it holds something else."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        self.lock = try_lock(path.with_name(path.name + ".lock"))
        if self.lock is None:
            raise InputError(f"{path}: another process is writing to it; end that one, or choose "
                             f"another --out")
        if path.is_dir():
            raise InputError(f"{path}: a folder; name a file for the labels")
        if path.exists():
            self.rows = self.read()

    def read(self) -> list[dict]:
        """The rows that are there. A last line that was cut off, as the machine went down while it
        was written, is left out, and said: the page had not gone on from it."""
        *lines, rest = self.path.read_bytes().split(b"\n")
        rows = [self.checked(line, number) for number, line in enumerate(lines, start=1)
                if line.strip()]
        try:
            json.loads(rest or b"0")
        except ValueError:
            if rest[:len(BEGINS)] != BEGINS[:len(rest)]:
                self.checked(rest, len(lines) + 1)                     # says what is wrong
            print(f"{self.path}: its last line is cut off and is left out: {rest!r}",
                  file=sys.stderr)
            os.truncate(self.path, self.path.stat().st_size - len(rest))
        else:
            if rest:                   # a whole row, without the end of its line
                rows.append(self.checked(rest, len(lines) + 1))
                with open(self.path, "ab") as file:
                    file.write(b"\n")
        return rows

    def checked(self, line: bytes, number: int) -> dict:
        """The row on a line; InputError for one that is no label."""
        where = f"{self.path}, line {number}"
        try:
            row = parse_json(line.decode(), self.path, number)
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: expected UTF-8 text; name another --out") from error
        if not isinstance(row, dict) or not is_objects(row.get("responses")):
            raise InputError(f"{where}: expected a label (messages, responses), found "
                             f"{describe(row)}; name another --out")
        converted(ranking, row, where)
        return row

    def add(self, row: dict) -> None:
        """Append a row; it is on the disk, whole, when this returns. OSError, as of a full disk:
        the file is as before."""
        converted(ranking, row, "the label")           # what is written can be read
        line = line_of(row)
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            try:
                while line:
                    line = line[file.write(line):]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
        self.rows.append(row)

    def remove(self, id: str) -> None:
        """Take back a row. OSError: the file is as before."""
        rows = [row for row in self.rows if row.get("id") != id]
        try:
            write_atomically(self.path, lambda partial: partial.write_bytes(
                b"".join(map(line_of, rows))))
        except OSError:
            self.path.with_name(self.path.name + ".partial").unlink(missing_ok=True)
            raise
        self.rows = rows

    def of(self, annotator: str) -> list[dict]:
        """The labels of one annotator, in the order in which they were given."""
        return [row for row in self.rows if row.get("annotator") == annotator and "id" in row]


# ----------------------------------------------------------------------------- who is where

@dataclass(slots=True)
class Session:
    """What one annotator has before them. Actions make a new one, with an id of its own."""
    annotator: str
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    messages: list[dict] = field(default_factory=list)   # the conversation, or the prompt
    answers: list[dict] = field(default_factory=list)    # to be judged; none: the person speaks
    skipped: list[str] = field(default_factory=list)     # keys of prompts that were set aside
    said: dict = field(default_factory=dict)   # what undo brings back: rating, ranks, comment, text
    back: dict | None = None       # what was there before, if that was no label
    asked: int = 0                 # times that answers were sampled: part of the seed

    def next(self, **changes) -> "Session":
        """Another screen: with these changes, and with nothing to bring back."""
        return replace(self, **dict(id=secrets.token_hex(8), said={}, back=None) | changes)

    def here(self, **said) -> dict:
        """This screen, for `back`."""
        return dict(messages=self.messages, answers=self.answers, skipped=self.skipped, said=said)


def key_of(messages: list[dict], answers: list[dict] | None = None) -> str:
    """What makes two items of --rank the same: the prompt, and the answers if they are given."""
    return json.dumps([messages, sorted(answer["text"] for answer in answers or [])])


class Desk:
    """What the page can do.

    `act` is one action of one annotator: {"annotator"} alone shows where they are; with "id" (of
    the screen that they see) and "action" it is one of say, label, skip, fresh, undo. An action
    names its screen, so that none is taken twice: not by two clicks, not by a page that asks again
    as the server was killed before it answered.

    write: where answers come from; None: they are given. items: the prompts of --rank; None: talk.
    kind: talk, compare or rank. what: all that says what is labelled; where an annotator was in
    something else is forgotten. seed: of answers and of their order.
    """

    def __init__(self, labels: Labels, write: Write | None, items: list[Item] | None = None,
                 kind: str = "talk", what=None, seed: int = 1, least: int = 4, most: int = 9):
        self.labels, self.write, self.kind, self.seed = labels, write, kind, seed
        self.sizes = least, most
        self.items = None if items is None else {key_of(*item): item for item in items}
        self.path, self.busy = labels.path.with_name(labels.path.name + ".state"), threading.Lock()
        self.state = {"token": secrets.token_urlsafe(16), "what": what, "sessions": {}}
        try:
            old = parse_json(self.path.read_text(), self.path, 1) if self.path.exists() else {}
            self.state["token"] = old.get("token", self.state["token"])
            if old and old["what"] == json.loads(json.dumps(what)):
                self.state = old
            self.sessions = {name: Session(**one) for name, one in self.state["sessions"].items()}
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path}: not what this page writes; remove it: it holds no "
                             f"label, only where each annotator was") from error
        write_json(self.path, self.state)              # its token stays, whatever happens

    # ------------------------------------------------------------------- requests

    def act(self, request: dict) -> tuple[int, dict]:
        """(status, screen), or (status, {"error": words}): nothing is lost by an error."""
        actions = dict(say=self.say, label=self.label, skip=self.skip, fresh=self.fresh,
                       undo=self.undo)
        action = request.get("action")
        with self.busy:
            try:
                session = self.session(name_of(request.get("annotator")))
                if action is None:
                    return 200, self.screen(session)
                if not isinstance(action, str) or action not in actions:
                    raise InputError(f"action {action!r:.40}: expected {', '.join(actions)}")
                if request.get("id") != session.id:
                    return 409, {"error": "That step was already taken, here or in another window. "
                                          "This is where you are.", "screen": self.screen(session)}
                return 200, self.screen(self.keep(actions[action](session, request)))
            except InputError as error:
                return 400, {"error": str(error)}
            except OSError as error:
                return 507, {"error": f"Not saved: {error.strerror} ({self.labels.path}). Nothing "
                                      f"is lost: make room, then do it again."}

    def session(self, name: str) -> Session:
        """Where an annotator is. A screen whose id is in the file is one whose label was on the
        disk when the server was killed: there it goes on."""
        session = self.sessions.get(name)
        if session is None:
            return self.keep(self.following(Session(name)) if self.items is not None
                             else Session(name))
        label = next((row for row in self.labels.of(name) if row["id"] == session.id), None)
        return self.keep(self.after(session, label)) if label else session

    def keep(self, session: Session) -> Session:
        """Write down where an annotator is, then let it be so."""
        sessions = self.sessions | {session.annotator: session}
        self.state["sessions"] = {name: asdict(one) for name, one in sessions.items()}
        write_json(self.path, self.state)
        self.sessions = sessions
        return session

    def screen(self, session: Session) -> dict:
        """What the page shows: no name of a model."""
        mine = self.labels.of(session.annotator)
        answers = [{"text": one["text"], "ended": one["ended"]} for one in session.answers]
        return {"kind": self.kind, "id": session.id, "messages": session.messages,
                "answers": answers, "said": session.said, "labels": len(mine),
                "skipped": len(session.skipped), "undo": bool(mine or session.back),
                "items": None if self.items is None else len(self.items)}

    # ------------------------------------------------------------------- actions

    def say(self, session: Session, request: dict) -> Session:
        """The person speaks; two answers come."""
        if self.items is not None or session.answers:
            raise InputError("there is nothing to be said now")
        words = text(request.get("text"), "text", "your message").strip()
        messages = [*session.messages, {"role": "user", "content": words}]
        return session.next(**self.two(session, messages), back=session.here(text=words))

    def label(self, session: Session, request: dict) -> Session:
        """What the person says of the answers goes into the file; then the page goes on."""
        comment = request.get("comment") or ""
        if not isinstance(comment, str) or len(comment) > 10_000:
            raise InputError("comment: expected text of at most 10,000 characters")
        row = {"messages": session.messages, **judged(session.answers, request),
               "annotator": session.annotator, "id": session.id}
        if comment.strip():
            row["comment"] = text(comment, "comment", "the label")
        self.labels.add(row)
        return self.after(session, row)

    def skip(self, session: Session, request: dict) -> Session:
        """Other answers, or, with --rank, another prompt: this one comes again at the end."""
        if not session.answers:
            raise InputError("there is nothing to skip")
        if self.items is None:
            return session.next(**self.two(session, session.messages), back=session.here())
        key = key_of(session.messages, None if self.write else session.answers)
        return self.following(replace(session, skipped=[*session.skipped, key]),
                              back=session.here())

    def fresh(self, session: Session, request: dict) -> Session:
        """A new conversation, or, with --rank, what was skipped."""
        if self.items is None:
            return session.next(messages=[], answers=[], back=session.here())
        return self.following(replace(session, skipped=[]), back=session.here())

    def undo(self, session: Session, request: dict) -> Session:
        """Back to the screen before, or to the last label, which is taken from the file."""
        if session.back:
            return session.next(**session.back)
        labels = self.labels.of(session.annotator)
        if not labels:
            raise InputError("there is nothing to undo")
        row = labels[-1]
        answers = [{key: value for key, value in one.items() if key != "score"}
                   for one in row["responses"]]
        scores = [one["score"] for one in row["responses"]]
        said = {"rating": row.get("rating"), "comment": row.get("comment", ""),
                "ranks": [int(max(scores) - score) + 1 for score in scores]}
        # Killed after this line, it has not happened: see `session`.
        session = self.keep(session.next(id=row["id"], messages=row["messages"], answers=answers,
                                         said=said))
        self.labels.remove(row["id"])
        return session

    # ------------------------------------------------------------------- what comes next

    def two(self, session: Session, messages: list[dict]) -> dict:
        """Two new answers, as changes of a session."""
        seed = seed_of(self.seed, f"{session.annotator} {session.asked}")
        return dict(messages=messages, answers=self.write(messages, 2, seed),
                    asked=session.asked + 1)

    def after(self, session: Session, row: dict) -> Session:
        """Where an annotator is after a label: the better answer goes on, the first of equals; with
        --rank the next prompt comes."""
        if self.items is not None:
            return self.following(session)
        best = max(row["responses"], key=lambda one: one["score"])
        turn = {"role": "assistant", "content": best["text"]}
        return session.next(messages=[*row["messages"], turn], answers=[])

    def following(self, session: Session, **changes) -> Session:
        """The first prompt that this annotator has neither labelled nor skipped; [] if none is
        left. One that cannot be answered is skipped, and said."""
        done = {key_of(row["messages"], None if self.write else row["responses"])
                for row in self.labels.of(session.annotator)}
        skipped = [key for key in session.skipped if key not in done]
        for key, item in self.items.items():
            if key in done or key in skipped:
                continue
            try:
                answers = self.answers(session.annotator, key, *item)
            except InputError as error:
                print(f"skipped: {error}", file=sys.stderr)
                skipped.append(key)
                continue
            return session.next(messages=item[0], answers=answers, skipped=skipped, **changes)
        return session.next(messages=[], answers=[], skipped=skipped, **changes)

    def answers(self, annotator: str, key: str, messages: list[dict],
                given: list[dict] | None) -> list[dict]:
        """The answers to a prompt: those given, in an order of each annotator's own, or K new ones,
        the same for all annotators."""
        if given is not None:
            draw = random.Random(seed_of(self.seed, annotator + key))
            return draw.sample(given, len(given))
        seed = seed_of(self.seed, key)
        return self.write(messages, random.Random(seed).randint(*self.sizes), seed)


def judged(answers: list[dict], request: dict) -> dict:
    """The part of a label that says what the answers are worth: `rating` of two of them, `ranks` of
    more. InputError."""
    rating, ranks = request.get("rating"), request.get("ranks")
    if not answers:
        raise InputError("there is nothing to rate")
    if len(answers) == 2:
        if isinstance(rating, bool) or rating not in RATINGS:
            raise InputError(f"rating {rating!r:.40}: expected 1 to 8, or {TIE} for a tie")
        if answers[0]["text"] == answers[1]["text"] and rating != TIE:
            raise InputError("the two answers are the same: that is a tie")
        scores = scores_of(rating)
        more = {"margin": round(margin_of(rating), 4), "rating": rating}
    else:
        if not isinstance(ranks, list) or len(ranks) != len(answers) or not all(
                type(rank) is int for rank in ranks):
            raise InputError(f"ranks: expected {len(answers)} whole numbers, 1 for the best")
        scores, more = scores_of_ranks(ranks), {}
    return {"responses": [{**answer, "score": score} for answer, score in zip(answers, scores)],
            **more}


def name_of(value) -> str:
    """An annotator's name, checked."""
    name = " ".join(value.split()) if isinstance(value, str) else ""
    if not name or len(name) > 60 or not name.isprintable():
        raise InputError(f"annotator {value!r:.80}: expected a name of at most 60 characters")
    return name
