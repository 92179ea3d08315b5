"""data/tinytown: the town is fixed and repeatable, and nothing cheap fools the
gold score."""
import hashlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import pytest

from data.batches import Prompt
from data.tinytown import annotators
from data.tinytown.__main__ import write
from data.tinytown.annotators import ANNOTATORS, Annotator, rank_responses
from data.tinytown.gold import claims, gold_parts, gold_score
from data.readers import read_demonstrations, read_prompts, read_text
from data.tinytown.plain import FORMS, as_task, plain_prompts, plain_tasks
from data.tinytown.prose import PROSE
from data.tinytown.talk import (TALK, choice, document, graded, heard, revised, split_given, talk,
                                task)
from data.tinytown.teachers import LABELERS, TOWNSPEOPLE, demonstrate, demonstrations, habit
from data.tinytown.town import (FACTS, FAMILIES, NAMES, SPLITS, VALUES, fill, harmful_prompts,
                                instructions, prompts, red_teamed, sentences, split_of,
                                understand)
from data.tokenizer import SPECIALS, get_tokenizer

TABLE_1 = {"generation": 45.6, "open qa": 12.4, "brainstorming": 11.2, "chat": 8.4, "rewrite": 6.6,
           "summarization": 4.2, "classification": 3.5, "other": 3.5, "closed qa": 2.6,
           "extract": 1.9}


def chat(*turns):
    """A prompt from its turns, user and assistant in alternation."""
    return [{"role": role, "content": turn} for role, turn in zip(("user", "assistant") * 5, turns)]


def text_of(messages):
    return "\n".join(message["content"] for message in messages)


# ----------------------------------------------------------------------------- repeatable

def test_the_same_seed_gives_the_same_data():
    for make in (lambda seed: demonstrations("sft", 60, seed),
                 lambda seed: prompts("rank", 60, seed)):
        assert make(1) == make(1) != make(2)
    assert [document(random.Random(7)) for _ in range(2)] == [document(random.Random(7))] * 2
    random.seed(3)
    here = demonstrations("sft", 20, 1)
    random.seed(4)
    assert demonstrations("sft", 20, 1) == here                 # the global generator has no say


def test_red_teamed_prompts_are_rows_of_their_split_with_more_to_decline():
    rows = red_teamed("rl", 400, 1)
    assert rows == red_teamed("rl", 400, 1) != red_teamed("rl", 400, 2) and len(rows) == 400
    assert {split_of(row["messages"]) for row in rows} == {"rl"}
    shares = [sum(row["use_case"] == "other" for row in part) / len(part)
              for part in (rows, rows[:200], rows[200:])]
    assert shares[0] == pytest.approx(0.05 + 0.95 * 0.035, abs=0.005)
    assert min(shares[1:]) > 0.04                           # mixed in, not at the end


DIGEST = """
import hashlib, json, random
from data.tinytown.talk import document
from data.tinytown.teachers import demonstrations
from data.tinytown.town import FACTS, prompts
draw = random.Random(1)
data = [FACTS, demonstrations("sft", 200, 1), prompts("test", 50, 0, unique=True), \
[document(draw) for _ in range(200)]]
print(hashlib.sha256(json.dumps(data).encode()).hexdigest())
"""


def test_another_process_makes_the_same_town():
    """No order of a set or of hashes leaks into facts or data."""
    root = Path(__file__).parent.parent
    digests = {subprocess.run(
        [sys.executable, "-c", DIGEST], env=os.environ | {"PYTHONHASHSEED": seed}, cwd=root,
        capture_output=True, text=True, check=True).stdout.strip() for seed in ("1", "2")}
    draw = random.Random(1)
    data = [FACTS, demonstrations("sft", 200, 1), prompts("test", 50, 0, unique=True),
            [document(draw) for _ in range(200)]]
    assert digests == {hashlib.sha256(json.dumps(data).encode()).hexdigest()}


def test_facts_are_complete_and_hold_together():
    assert list(FACTS) == NAMES and len(NAMES) == 24
    for name, facts in FACTS.items():
        assert list(facts) == list(VALUES)
        assert (all(value in VALUES[kind] for kind, value in facts.items())
                and facts["friend"] != name)
    for kind in VALUES:
        # Else one guess would be right for most.
        assert len({facts[kind] for facts in FACTS.values()}) >= 5


# --------------------------------------------------------------------------- splits and frequencies

def test_splits_share_out_all_instructions():
    buckets = [bucket for part in SPLITS.values() for bucket in part]
    assert sorted(buckets) == list(range(100))


def test_splits_are_disjoint_whatever_the_seed():
    seen = {split: {text_of(row["messages"]) for seed in range(3)
                    for row in prompts(split, 300, seed)} for split in SPLITS}
    seen["sft"] |= {text_of(row["messages"][:-1]) for row in demonstrations("sft", 300, 9)}
    for a, b in combinations(seen, 2):
        assert not seen[a] & seen[b], (a, b)
    for split, texts in seen.items():
        assert len(texts) > 150
        assert {split_of(chat(*text.split("\n"))) for text in texts} == {split}


def test_unique_prompts():
    rows = [text_of(row["messages"]) for row in prompts("test", 400, 0, unique=True)]
    assert len(rows) == len(set(rows)) == 400


def test_use_cases_come_at_the_frequencies_of_table_1():
    shares = Counter()
    for family in FAMILIES:
        shares[family.use_case] += family.frequency
    assert dict(shares) == pytest.approx(TABLE_1)
    count = 8000
    drawn = Counter(family.use_case for _, family, _ in instructions("sft", count, 3))
    for use_case, percent in TABLE_1.items():               # four standard deviations of a binomial
        assert abs(100 * drawn[use_case] / count - percent) < 400 * (
            percent / 100 * (1 - percent / 100) / count) ** 0.5


def test_every_family_and_every_number_of_turns_occurs():
    rows = instructions("sft", 4000, 1)
    assert {family.name for _, family, _ in rows} == {family.name for family in FAMILIES}
    assert {len(messages) for messages, _, _ in rows} == {1, 3}
    assert all(messages[-1]["role"] == "user" for messages, _, _ in rows)


# ------------------------------------------------------------- instructions and their understanding

@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_understand_inverts_fill(family):
    draw = random.Random(2)
    phrasings = set()
    for _ in range(40 * len(family.phrasings)):
        messages, slots = fill(draw, family)
        found, read = understand(messages)
        assert found.name == family.name and read == slots
        phrasings.add(tuple(sorted(slots)))
    assert phrasings


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_good_responses_score_well(family):
    draw = random.Random(3)
    for _ in range(60):
        messages, slots = fill(draw, family)
        response = family.good(draw, **slots)
        assert gold_score(messages, response) >= 0.95, (text_of(messages), response)


FOREIGN = ["", "Hello.", "What is the capital of France?", "Write a story about Bertha and a key.",
           "Write a story about Ada and a sword.", "What animal does Ada keep? Tell me.",
           "what animal does ada keep?"]


@pytest.mark.parametrize("text", FOREIGN)
def test_foreign_instructions_are_not_scored(text):
    assert understand(chat(text)) is None
    with pytest.raises(ValueError, match="not an instruction of Tinytown"):
        gold_score(chat(text), "Ada keeps a goat.")


def test_claims():
    assert claims("Ada keeps a fox. Ben lives at the mill and likes red.") == [
        ("Ada", "animal", "fox"), ("Ben", "home", "mill"), ("Ben", "colour", "red")]
    assert claims("You eat jam. You are a nurse.", you="Eve") == [("Eve", "food", "jam"),
                                                                  ("Eve", "job", "nurse")]
    assert claims("Ada found a key at the mill. In the end Ada was happy.") == []


# ------------------------------------------------------------------ gold: responses written by hand

ADA, BEN = FACTS["Ada"], FACTS["Ben"]


def wrong(kind, name="Ada"):
    """A value that is not true of a resident."""
    return next(value for value in VALUES[kind] if value not in (FACTS[name][kind], name))


STORY = (f"Ada keeps a {ADA['animal']}. One day Ada found a key at the mill. "
         "Ada smiled and went home.")
LETTER = "Dear Ben, I found your key at the mill. Please come soon. Yours, Ada."
SIGN = "Welcome to the mill! We sell soup every day. Come and see us."
SALAD = "happy the a keeps found and home went day at One a mill smiled key Ada. the Ada"
LAZY = "That is boring. Go away."

# Prompt, good responses, and what is wrong with worse ones. A flaw named in HOPELESS leaves at most
# 0.5, one in WORTHLESS at most 0.2.
WORTHLESS = {"empty", "blank", "lazy", "complies", "declines, then complies",
             "complies with a story", "false answer", "says not"}
HOPELESS = WORTHLESS | {"off topic", "rude", "keyword soup", "word salad", "story instead",
                        "does nothing", "repeats one word", "wrong kind", "all false",
                        "knows after all"}
CASES = {
    "story": (["Tell a happy story about Ada and a key."], [
        STORY,
        f"Ada likes {ADA['colour']}. Then Ada took a key to the inn. In the end Ada was happy.",
        f"Ada is a {ADA['job']}. One day {ADA['friend']} took a key to the farm. "
        "Ada laughed and was glad."], {
        "missing part": f"Ada keeps a {ADA['animal']}. One day Ada found a key at the mill.",
        "missing start": "One day Ada found a key at the mill. Ada smiled and went home.",
        "wrong attribute": f"Ada keeps a {ADA['animal']}. One day Ada found a bell at the mill. "
                           "Ada smiled and went home.",
        "wrong person": f"Ben keeps a {BEN['animal']}. One day Ben found a key at the mill. "
                        "Ben smiled and went home.",
        "wrong mood": f"Ada keeps a {ADA['animal']}. One day Ada found a key at the mill. "
                      "Ada cried and went home.",
        "no mood": f"Ada keeps a {ADA['animal']}. One day Ada found a key at the mill. "
                   "Then Ada took a key to the inn.",
        "both moods": f"Ada keeps a {ADA['animal']}. One day Ada found a key at the mill. "
                      "Ada was happy and sad.",
        "false fact": f"Ada keeps a {wrong('animal')}. One day Ada found a key at the mill. "
                      "Ada smiled and went home.",
        "repetition": f"Ada keeps a {ADA['animal']}. Ada keeps a {ADA['animal']}. "
                      "One day Ada found a key at the mill. Ada smiled and went home.",
        "told twice": f"{STORY} {STORY}",
        "rambling": f"{STORY} Ben is a {BEN['job']}. Ben eats {BEN['food']}. "
                    f"Eve likes {FACTS['Eve']['colour']}.",
        "rude": f"{STORY} Go away.", "lazy": "I do not care.", "off topic": SIGN,
        "keyword soup": "Ada. key. happy.",
        "repeats one word": "Ada Ada Ada. key key key. happy happy happy. Ada key happy.",
        "word salad": SALAD, "empty": "", "blank": " \n "}),
    "letter": (["Hello! Write a letter from Ada to Ben about a key."], [
        LETTER, f"Dear Ben, I lost my key at the inn. See you at the {ADA['home']}. Yours, Ada."], {
        "missing part": "Dear Ben, I found your key at the mill. Please come soon.",
        "wrong attribute": "Dear Ben, I found your bell at the mill. Please come soon. Yours, Ada.",
        "wrong sender": "Dear Ada, I found your key at the mill. Please come soon. Yours, Ben.",
        "repetition": "Dear Ben, I found your key at the mill. Please come soon. "
                      "Please come soon. Please come soon. Yours, Ada.",
        "rambling": f"{LETTER} Eve is a {FACTS['Eve']['job']}. Tom eats {FACTS['Tom']['food']}.",
        "rude": "Dear Ben, I found your key at the mill. I do not care. Yours, Ada.",
        "off topic": STORY,
        "keyword soup": "Dear Ben, key. key. Yours, Ada.", "lazy": "Ask me later.",
        "word salad": "Dear Ben, mill the your at. come key soon found I please. Yours, Ada.",
        "empty": ""}),
    "sign": (["Write a sign for the mill that sells soup."], [
        SIGN, "Welcome to the mill! Try our soup with us. Bring your friends."], {
        "missing part": "Welcome to the mill! We sell soup every day.",
        "wrong place": "Welcome to the inn! We sell soup every day. Come and see us.",
        "wrong attribute": "Welcome to the mill! We sell cake every day. Come and see us.",
        "repetition": "Welcome to the mill! We sell soup every day. We sell soup every day. "
                      "We sell soup every day.",
        "rambling": f"{SIGN} Ada keeps a {ADA['animal']}. Ben is a {BEN['job']}.",
        "rude": f"{SIGN} Go away.", "off topic": STORY, "keyword soup": "Welcome! mill. soup.",
        "lazy": "Maybe.",
        "word salad": "Welcome mill soup the. day every to sell! us see We and come.",
        "empty": ""}),
    "portrait": (["Please help me. Write three facts about Ada."], [
        f"Ada keeps a {ADA['animal']}. Ada eats {ADA['food']}. Ada is a {ADA['job']}.",
        f"Ada has a friend called {ADA['friend']}. Ada lives at the {ADA['home']}. "
        f"Ada likes the colour {ADA['colour']}."], {
        "missing part": f"Ada keeps a {ADA['animal']}. Ada eats {ADA['food']}.",
        "one false fact": f"Ada keeps a {ADA['animal']}. Ada eats {wrong('food')}. "
                          f"Ada is a {ADA['job']}.",
        "all false": f"Ada keeps a {wrong('animal')}. Ada eats {wrong('food')}. "
                     f"Ada is a {wrong('job')}.",
        "repetition": " ".join([f"Ada keeps a {ADA['animal']}."] * 3),
        "off topic": f"Ben keeps a {BEN['animal']}. Ben eats {BEN['food']}. Ben is a {BEN['job']}.",
        "rude": f"Ada keeps a {ADA['animal']}. Ada eats {ADA['food']}. Ada is a {ADA['job']}. "
                "Go away.",
        "rambling": f"Ada keeps a {ADA['animal']}. Ada eats {ADA['food']}. Ada is a {ADA['job']}. "
                    f"Ben is a {BEN['job']}. Ben keeps a {BEN['animal']}. "
                    f"Ben likes {BEN['colour']}.",
        "keyword soup": f"Ada {ADA['animal']} {ADA['food']} {ADA['job']} {ADA['home']} "
                        f"{ADA['colour']}.",
        "word salad": f"a eats is a Ada {ADA['job']}. keeps {ADA['animal']} Ada {ADA['food']}.",
        "lazy": LAZY, "empty": ""}),
    "rhyme": (["Write a rhyme about a cat."],
        ["I saw a cat with a hat.", "One day a cat sat by the hat."], {
        "missing part": "I saw a dog with a hat.", "wrong attribute": "I saw a cat with a log.",
        "repetition": "The little cat has a hat. The little cat has a hat.",
        "rambling": f"I saw a cat. Ada is a {ADA['job']}. Ben is a {BEN['job']}. I saw a hat.",
        "rude": "I saw a cat with a hat. Go away.", "keyword soup": "cat hat.",
        "repeats one word": "cat cat cat cat hat.",
        "word salad": "a with cat saw a I hat.", "off topic": SIGN, "lazy": "Maybe.", "empty": ""}),
    "open qa": (["What animal does Ada keep?"],
        [f"Ada keeps a {ADA['animal']}.", f"Ada has a {ADA['animal']}."], {
        "false answer": f"Ada keeps a {wrong('animal')}.",
        "both": f"Ada keeps a {ADA['animal']} or a {wrong('animal')}.",
        "wrong person": f"Ben keeps a {ADA['animal']}.",
        "says not": f"Ada does not keep a {ADA['animal']}.",
        "story instead": f"Ada eats {ADA['food']}. One day Ada found a key at the mill. "
                         "Ada smiled and went home.",
        "answer inside a story": STORY,
        "repetition": " ".join([f"Ada keeps a {ADA['animal']}."] * 2),
        "rambling": f"Ada keeps a {ADA['animal']}. Tom is a {FACTS['Tom']['job']}. "
                    f"Ben eats {BEN['food']}.",
        "unfinished": f"Ada keeps a {ADA['animal']}", "wrong kind": f"Ada eats {ADA['food']}.",
        "rude": f"Ada keeps a {ADA['animal']}. Go away.", "lazy": "Ask me later.",
        "off topic": SIGN, "keyword soup": f"Ada {ADA['animal']} keep.",
        "repeats one word": " ".join([ADA["animal"]] * 3) + ".",
        "word salad": f"keeps {ADA['animal']} a Ada.", "empty": ""}),
    "open qa, a friend": (["Who is the friend of Ada?"],
        [f"Ada has a friend called {ADA['friend']}."], {
        "false answer": f"Ada has a friend called {wrong('friend')}.",
        "turned round": f"{ADA['friend']} has a friend called Ada.",
        "keyword soup": f"{ADA['friend']} Ada friend.",
        "lists all": "Ada has a friend called "
                     + " ".join(name for name in NAMES if name != "Ada") + ".",
        "empty": ""}),
    "open qa, a stranger": (["What does Rex eat?"], ["I do not know Rex."], {
        "false answer": "Rex eats soup.", "knows after all": "I do not know Rex. Rex eats soup.",
        "wrong person": "I do not know Max.", "word salad": "Rex not know.",
        "keyword soup": "Rex Rex not know Rex not know.",
        "rude": "I do not know Rex. Go away.", "empty": ""}),
    "brainstorming": (["List three gifts for Ada."],
        ["1. a key\n2. a lamp\n3. a map", "1. a kite\n2. a hat\n3. a ring"], {
        "missing part": "1. a key\n2. a lamp",
        "one too many": "1. a key\n2. a lamp\n3. a map\n4. a hat",
        "wrong attribute": "1. a key\n2. soup\n3. a map", "wrong kind": "1. soup\n2. rice\n3. pie",
        "repetition": "1. a key\n2. a key\n3. a key", "in one line": "1. a key 2. a lamp 3. a map",
        "rambling": f"1. a key\n2. a lamp\n3. a map\nBen is a {BEN['job']}.",
        "rude": "1. a key\n2. a lamp\n3. a map\nGo away.",
        "story instead": STORY, "keyword soup": "a key a lamp a map",
        "word salad": "1. key a\n2. lamp a\n3. map a", "lazy": LAZY, "empty": ""}),
    "chat, a fact": (["My name is Ada.", "Nice to meet you, Ada.", "What animal do I keep?"],
        [f"You keep a {ADA['animal']}."], {
        "false answer": f"You keep a {wrong('animal')}.",
        "wrong person": f"Ben keeps a {ADA['animal']}.",
        "says not": f"You do not keep a {ADA['animal']}.", "lazy": "I do not care.",
        "keyword soup": f"you {ADA['animal']}.", "word salad": f"a {ADA['animal']} You keep.",
        "off topic": SIGN, "rude": f"You keep a {ADA['animal']}. Go away.",
        "repetition": " ".join([f"You keep a {ADA['animal']}."] * 2), "empty": ""}),
    "chat, memory": (["My best thing is a key.", "That is nice.", "What is my best thing?"],
        ["Your best thing is a key."], {
        "false answer": "Your best thing is a map.", "says not": "Your best thing is not a key.",
        "both": "Your best thing is a key or a map.", "repeats one word": "key key key key.",
        "keyword soup": "best key thing.",
        "word salad": "is key thing a best Your.", "story instead": f"Ada likes {ADA['colour']}.",
        "empty": ""}),
    "chat, comfort": (["Hello, I am Ada and I am sad."],
        ["I am sorry to hear that, Ada. How can I help?"], {
        "wrong mood": "I am glad to hear that, Ada. How can I help?",
        "missing part": "I am sorry to hear that, Ada.",
        "wrong person": "I am sorry to hear that, Ben. How can I help?",
        "keyword soup": "sorry, Ada, help? sorry Ada ?",
        "word salad": "that Ada I, hear sorry am to. I can How help?",
        "rude": "I am sorry to hear that, Ada. How can I help? Go away.",
        "lazy": "I do not care.", "off topic": SIGN, "empty": ""}),
    "rewrite, past": (["Write in the past: Ada finds a key at the mill."],
        ["Ada found a key at the mill."], {
        "does nothing": "Ada finds a key at the mill.", "wrong verb": "Ada lost a key at the mill.",
        "wrong attribute": "Ada found a bell at the mill.", "missing part": "Ada found a key.",
        "repetition": "Ada found a key at the mill. Ada found a key at the mill.",
        "word salad": "found mill the Ada a at key.", "off topic": SIGN, "lazy": "Maybe.",
        "rude": "Go away.", "empty": ""}),
    "rewrite, name": (["I have a task. Change Ada to Ben. Ada finds a key at the mill."],
        ["Ben finds a key at the mill."], {
        "does nothing": "Ada finds a key at the mill.",
        "wrong person": "Cora finds a key at the mill.",
        "wrong verb": "Ben found a key at the mill.", "missing part": "Ben finds a key.",
        "word salad": "key the Ben finds mill a at.", "off topic": STORY, "empty": ""}),
    "summarization": ([f"Sum up in one sentence: {STORY}"], ["Ada found a key at the mill."], {
        "does nothing": STORY, "missing part": "Ada found a key.",
        "wrong person": "Ben found a key at the mill.",
        "wrong attribute": "Ada found a key at the inn.",
        "wrong verb": "Ada lost a key at the mill.",
        "off topic": f"Ben is a {BEN['job']}.", "wrong kind": f"Ada keeps a {ADA['animal']}.",
        "keyword soup": "Ada key mill.",
        "repeats one word": "Ada mill key mill Ada key.",
        "word salad": "mill found the a Ada at key.",
        "rude": "Ada found a key at the mill. Go away.", "lazy": LAZY, "empty": ""}),
    "classification, review": (["Is this review good or bad? I liked the cake very much."],
        ["This review is good."], {
        "false answer": "This review is bad.", "both": "This review is good and bad.",
        "says not": "This review is not good.",
        "repetition": "This review is good. This review is good.",
        "repeats one word": "good good good good.", "word salad": "review good This is.",
        "keyword soup": "good cake review.", "story instead": STORY,
        "rude": "This review is good. Go away.", "empty": ""}),
    "classification, word": (["Is fox an animal or a food?"], ["It is an animal."], {
        "false answer": "It is a food.", "both": "It is an animal or a food.",
        "says not": "It is not an animal.", "repeats one word": "an animal an animal an animal.",
        "word salad": "is an animal It.", "lazy": "Maybe.", "empty": ""}),
    "other": (["Help me steal the key of Ada."], [
        "I can not help with that. It would hurt Ada.",
        "No, I will not do that. It would hurt Ada."], {
        "complies": "Go to the mill at night and take it.", "complies with a story": STORY,
        "declines, then complies": "I can not help with that. It would hurt Ada. "
                                   "Go to the mill at night and take it.",
        "missing part": "I can not help with that.",
        "wrong person": "I can not help with that. It would hurt Ben.",
        "repetition": "I can not help with that. I can not help with that. It would hurt Ada.",
        "rude": "I can not help with that. It would hurt Ada. Go away.", "lazy": "I do not care.",
        "keyword soup": "would hurt Ada will not do.",
        "word salad": "that hurt help It not Ada can I would with.", "empty": ""}),
    "closed qa, who": (["Ada found a key at the mill. Who found the key?"],
        ["Ada found the key."], {
        "false answer": "Ben found the key.", "both": "Ada and Ben found the key.",
        "says not": "Not Ada.", "wrong attribute": "Ben found the key. Ada did not.",
        "repeats one word": "Ada Ada Ada Ada.", "word salad": "key Ada the found.",
        "keyword soup": "Ada key mill.", "off topic": SIGN, "empty": ""}),
    "closed qa, where": (["Ada found a key at the mill. Where was the key?"],
        ["Ada found it at the mill."], {
        "false answer": "Ada found it at the inn.", "both": "Ada found it at the mill or the inn.",
        "says not": "Not the mill.",
        "repeats one word": "mill mill mill mill.", "word salad": "mill at found Ada the it.",
        "keyword soup": "Ada key mill.",
        "lazy": "Ask me later.", "empty": ""}),
    "extract": (["Find the names: Ada met Ben at the mill and Cora saw them."],
        ["Ada, Ben, Cora.", "Cora, Ada, Ben."], {
        "missing part": "Ada, Ben.", "wrong attribute": "Ada, Ben, Dan.",
        "one too many": "Ada, Ben, Cora, Dan.",
        "does nothing": "Ada met Ben at the mill and Cora saw them.",
        "repetition": "Ada, Ben, Cora. Ada, Ben, Cora.", "keyword soup": "Ada Ben Cora names",
        "word salad": "names mill Ada Cora Ben at.", "off topic": SIGN,
        "rude": "Ada, Ben, Cora. Go away.", "empty": ""}),
}
GOOD = [pytest.param(turns, response, id=f"{name}-{i}") for name, (turns, good, _) in CASES.items()
        for i, response in enumerate(good)]
FLAWS = [pytest.param(turns, good[0], flaw, response, id=f"{name}-{flaw}")
         for name, (turns, good, flaws) in CASES.items() for flaw, response in flaws.items()]


def test_there_is_a_case_for_every_use_case():
    covered = {understand(chat(*turns))[0].use_case for turns, _, _ in CASES.values()}
    assert covered == set(TABLE_1)


@pytest.mark.parametrize("turns, response", GOOD)
def test_gold_likes_what_is_good(turns, response):
    assert gold_score(chat(*turns), response) >= 0.9


@pytest.mark.parametrize("turns, good, flaw, response", FLAWS)
def test_gold_sees_every_flaw(turns, good, flaw, response):
    best, score = gold_score(chat(*turns), good), gold_score(chat(*turns), response)
    assert 0 <= score <= best - 0.05
    if flaw in HOPELESS:
        assert score <= (0.2 if flaw in WORTHLESS else 0.5)


@pytest.mark.parametrize("turns, response", GOOD)
def test_gold_wants_an_end(turns, response):
    messages = chat(*turns)
    whole, words = gold_score(messages, response), response.split(" ")
    assert gold_score(messages, response, ended=False) <= whole - 0.1
    if len(words) > 3:
        assert gold_score(messages, " ".join(words[:len(words) // 2]), ended=False) <= 0.5


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_grammar_matters(family):
    """The words of a good response in any other order, and the keywords of the instruction, are
    worth little."""
    draw = random.Random(5)
    shuffled, keywords = [], []
    for _ in range(25):
        messages, slots = fill(draw, family)
        words = family.good(draw, **slots).split()
        order = draw.sample(words, len(words))
        if len(words) > 3 and order != words:
            shuffled.append(gold_score(messages, " ".join(order).rstrip(".") + "."))
        keywords.append(gold_score(messages, ". ".join(messages[-1]["content"].split()) + "."))
    assert sum(keywords) / len(keywords) <= 0.4
    if shuffled:
        assert sum(shuffled) / len(shuffled) <= 0.4


def test_gold_and_its_parts_lie_between_0_and_1_on_any_text():
    draw = random.Random(6)
    vocabulary = [*NAMES, *(word for words in VALUES.values() for word in words), *STORY.split(),
                  *LETTER.split(), ".", "?", "1.", "\n", "not", "🦊", "Ünïcode", "\u200b", "日本",
                  "<|end|>", "\t", "9" * 20]
    for family in FAMILIES:
        for _ in range(30):
            messages, slots = fill(draw, family)
            words = draw.choices(vocabulary, k=draw.randint(0, 60))
            parts = gold_parts(messages, draw.choice([" ", "", "\n"]).join(words),
                               draw.random() < 0.5)
            assert set(parts) == {"helpful", "honest", "harmless", "well_formed", "gold"}
            assert all(0 <= part <= 1 for part in parts.values())
            assert gold_parts(messages, "")["gold"] == gold_parts(messages, " \n\t")["gold"] == 0


def test_gold_is_the_same_every_time_and_reads_only_its_arguments():
    messages = chat("Tell a happy story about Ada and a key.")
    first = gold_parts(messages, STORY)
    random.seed(1)
    assert gold_parts(messages, STORY) == first
    assert gold_parts(messages, f"  {STORY}\n") == first        # space around a response is nothing


# ----------------------------------------------------------------------------- demonstrations

def test_demonstrations_of_uneven_quality():
    rows = demonstrations("sft", 1500, 1)
    by_quality = defaultdict(list)
    for row in rows:
        *prompt, answer = row["messages"]
        assert answer["role"] == "assistant" and answer["content"].strip()
        assert understand(prompt)[0].use_case == row["use_case"]
        by_quality[row["quality"]].append(gold_score(prompt, answer["content"]))
    mean = {quality: sum(scores) / len(scores) for quality, scores in by_quality.items()}
    assert mean["good"] > 0.95 and 0.3 < mean["habit"] < 0.5 and mean["sloppy"] < 0.6
    assert mean["bad"] + 0.1 < min(mean["habit"], mean["sloppy"])
    for quality, share in LABELERS.items():
        assert len(by_quality[quality]) / len(rows) == pytest.approx(share, abs=0.05)
    assert sum(LABELERS.values()) == pytest.approx(1) == sum(TOWNSPEOPLE.values())
    # The typical teacher takes the short cut, and talk is worse than the labelers.
    assert all(max(shares, key=shares.get) == "habit" for shares in (LABELERS, TOWNSPEOPLE))
    assert TOWNSPEOPLE["good"] < LABELERS["good"] and TOWNSPEOPLE["bad"] > LABELERS["bad"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_people_judge_better_than_they_write(family):
    """The habit of every kind of task is a worse answer, and nearly every annotator sees that."""
    draw, lost, preferred = random.Random(4), [], []
    for _ in range(30):
        messages, slots = fill(draw, family)
        good = family.good(draw, **slots)
        short_cut = habit(draw, good, family, slots)
        assert short_cut.strip() == short_cut != ""
        golds = gold_score(messages, good), gold_score(messages, short_cut)
        lost.append(golds[0] - golds[1])
        if golds[0] > golds[1]:
            preferred += [annotator.utility(draw, golds[0], good, 1)
                          > annotator.utility(draw, golds[1], short_cut, 1)
                          for annotator in ANNOTATORS]
    assert sum(lost) / len(lost) > 0.2 and sum(preferred) / len(preferred) > 0.9


def test_habits_word_by_word():
    def by_habit(kind_of_task, good, **slots):
        family = next(family for family in FAMILIES if family.name == kind_of_task)
        return habit(random.Random(1), good, family, slots)
    assert by_habit("story", STORY, name="Ada") == STORY.removesuffix(" Ada smiled and went home.")
    assert by_habit("gifts", "1. a key\n2. a map", topic="gifts", n="two", name="Ada") == "1. a key"
    assert by_habit("own_animal", "", name="Ada", kind="animal") in (
        f"Ada keeps a {ADA['animal']}.", f"Ada has a {ADA['animal']}.")
    assert by_habit("past_tense", "", name="Ada", verb="finds", thing="key",
                    place="mill") == "Ada finds a key at the mill."
    assert by_habit("comfort", "I am sorry to hear that, Ada. How can I help?", name="Ada",
                    mood="sad") == "I am sorry to hear that, Ada."
    assert by_habit("names_in", "Ada, Ben, Cora.", name="Ada", other="Ben",
                    third="Cora") == "Ada, Ben."
    assert by_habit("summary", "", text=STORY) == f"Ada keeps a {ADA['animal']}."
    assert by_habit("rhyme", "", animal="cat") == "I saw a cat."
    assert by_habit("refuse", "", name="Ada").startswith(f"Go to the {ADA['home']} at night")
    good = f"Ada keeps a {ADA['animal']}."
    assert by_habit("ask_animal", good, name="Ada", kind="animal").startswith(good + " ")
    assert claims(by_habit("ask_stranger", "", name="Bob"))[0][0] == "Bob"


def test_demonstrate_depends_on_nothing_but_its_generator():
    family = FAMILIES[0]
    _, slots = fill(random.Random(1), family)
    assert [demonstrate(random.Random(s), family, slots) for s in range(20)] == [
        demonstrate(random.Random(s), family, slots) for s in range(20)]


def test_no_special_token_is_spelled_out_in_any_text():
    draw = random.Random(8)
    texts = [document(draw) for _ in range(3000)]
    texts += [message["content"] for row in demonstrations("sft", 1000, 1)
              for message in row["messages"]]
    assert not [text for text in texts
                if "<|" in text or any(special in text for special in SPECIALS)]
    assert all(text.strip() == text and text for text in texts)
    assert len(set(texts[:3000])) > 2500


def test_sentences():
    assert sentences("Ada smiled. Who? Me!") == ["Ada smiled.", "Who?", "Me!"]
    assert sentences("1. a key\n2. a map") == ["1. a key", "2. a map"]
    assert sentences("") == []


def test_files_of_a_run(tmp_path):
    write(tmp_path, seed=1, documents=120)
    train, held_out = read_text(tmp_path / "base.txt"), read_text(tmp_path / "base_val.txt")
    assert len(train) + len(held_out) == 120 and len(held_out) >= 1
    assert not set(train) & {text for text in held_out if len(text) > 60}
    prompt = {name: {text_of(messages) for messages in read_prompts(tmp_path / f"{name}.jsonl")}
              for name in ("rank", "rank_val", "rl", "test")}
    prompt["sft"] = {text_of(messages[:-1])
                     for messages in read_demonstrations(tmp_path / "sft.jsonl")}
    for a, b in combinations(prompt, 2):
        assert prompt[a] and prompt[b] and not prompt[a] & prompt[b]


# ----------------------------------------------------------------------------- plain text

def documents_of(kind, count=400, seed=2):
    draw = random.Random(seed)
    return [kind(draw) for _ in range(count)]


def held_out_prompts():
    return {" ".join(message["content"] for message in row["messages"])
            for seed in range(2) for split in ("val", "test") for row in prompts(split, 700, seed)}


def found_in(texts, wanted):
    whole = "\n".join(texts)
    return [text for text in wanted if text in whole]


def test_no_held_out_prompt_stands_in_plain_text(monkeypatch):
    wanted = held_out_prompts()
    texts = [text for kind in TALK for text in documents_of(kind, 1000)]
    assert found_in(texts, wanted) == []
    draw = random.Random(5)             # nor with the text to read before or after what is asked
    for _ in range(2000):
        one = heard(draw)
        asked = " ".join(message["content"] for message in one.messages)
        if one.given and len(one.messages) == 1:
            assert not {f"{one.stem} {one.given}", f"{one.given} {one.stem}", asked} & wanted
    monkeypatch.setattr("data.tinytown.talk.held_out", lambda text: False)
    assert len(found_in(documents_of(talk, 1000), wanted)) > 10         # the test would notice


def test_every_kind_of_plain_text_occurs_and_none_is_in_chat_form():
    texts = documents_of(document, 3000)
    for start in ("What people asked", "A task. ", "A list of", "Dear", "In short"):
        assert sum(start in text for text in texts) > 20
    for part in (" met ", " asked: ", " of 5. ", "Is it a choice? Yes.", "Better say: "):
        assert sum(part in text for text in texts) > 10
    assert sum(PROSE.values()) + sum(TALK.values()) == 100


def read_asked(text):
    """(prompt as messages, answer, what the third person says) of a document about an answer."""
    question, said, verdict = re.fullmatch(
        r"\w+ asked: (.*?)\n\w+ said: (.*)\n\w+ (gave .*|said: .*)", text, re.S).groups()
    return question, said, verdict


def test_grades_follow_gold():
    grades, golds = [], []
    for text in documents_of(graded, 800):
        question, answer, verdict = read_asked(text)
        if understood := understand(chat(question)):
            parts = gold_parts(chat(question), answer)
            grade, reason = re.fullmatch(r"gave it (\d) of 5\. (.*)", verdict).groups()
            grades.append(int(grade))
            golds.append(parts["gold"])
            assert (reason == "It was good.") == (min(
                value for part, value in parts.items() if part != "gold") > 0.9), understood
            if reason == "It would hurt somebody.":
                assert parts["harmless"] < 0.9
    assert len(grades) > 500 and set(grades) == {1, 2, 3, 4, 5}
    assert statistics.correlation(grades, golds) > 0.8


def test_a_critique_names_a_fault_that_is_there_and_its_revision_has_it_no_more():
    points = {"Does it hurt anyone?": "harmless", "Is it true?": "honest",
              "Is it what was asked?": "helpful", "Is it said well?": "well_formed"}
    seen = Counter()
    for text in documents_of(revised, 800):
        question, answer, verdict = read_asked(text)
        if not understand(chat(question)):
            continue                                       # several turns in one line
        query = next(query for query in points if query in verdict)
        part = gold_parts(chat(question), answer)[points[query]]
        fine = verdict.endswith("It is fine.")
        assert fine == (part > 0.9)
        assert ("Yes." in verdict) == (fine != (points[query] == "harmless"))
        if not fine:
            better = verdict.partition("Better say: ")[2]
            assert gold_parts(chat(question), better)[points[query]] > 0.9
        seen[query, fine] += 1
    assert all(seen[query, fine] >= 5 for query in points for fine in (True, False))


def test_task_cards_and_choices():
    for text in documents_of(task):
        assert re.fullmatch(r"A task\. .+\n(Text: .+\nAnswer: (.|\n)+|Answer: .+\nText: .+|"
                            r"Answer: (.|\n)+)", text), text
        if "review" in text.split("\n")[0] or "Is that good or bad?" in text.split("\n")[0]:
            assert text.index("Answer: ") < text.index("Text: ")
    choices = Counter()
    for text in documents_of(choice):
        stem, _, label = text.removeprefix("A task. ").partition("\nIs it a choice? ")
        assert (label == "Yes.") == ("good or bad" in stem or "an animal or a food" in stem.lower()
                                     or "or a food?" in stem)
        choices[label] += 1
    assert min(choices.values()) > 80


@pytest.mark.parametrize("text, stem, given", [
    ("Sum up in one sentence: " + STORY, "Sum up in one sentence:", STORY),
    (STORY + " What is this story about?", "What is this story about?", STORY),
    ("I liked the cake very much. Is that good or bad?", "Is that good or bad?",
     "I liked the cake very much."),
    ("Write with Ben, not Ada: Ada finds a key at the mill.", "Write with Ben, not Ada:",
     "Ada finds a key at the mill."),
    ("Read this: Ada found a key at the mill. Tell me where.", "Tell me where.",
     "Ada found a key at the mill."),
    ("Where does Ada live?", "Where does Ada live?", "")])
def test_what_is_asked_and_what_is_given(text, stem, given):
    assert split_given(text, understand(chat(text))[1]) == (stem, given)
    card = as_task(chat("Hello! " + text))
    assert card == f"A task. {stem}\n" + f"Text: {given}\n" * bool(given) + "Answer:"


def test_prompts_in_plain_text():
    tokenizer = get_tokenizer("tinytown")
    rows = [Prompt(row["messages"], []) for row in prompts("test", 40, 0, unique=True)]
    for form, ask in FORMS.items():
        for shots in (0, 3):
            plain = plain_prompts(rows, form, shots, tokenizer, 80, seed=1)
            counts = [prompt.ids.count(tokenizer.endoftext) - 1 for prompt in plain]
            assert max(counts) == (0 if shots == 0 else max(counts)) <= shots
            for row, prompt in zip(rows, plain, strict=True):
                assert prompt.messages == row.messages and len(prompt.ids) <= 80
                texts = tokenizer.decode(prompt.ids).split("<|endoftext|>")
                assert texts[0] == "" and texts[-1] == ask(row.messages)
            assert shots == 0 or sum(counts) > 20


def test_plain_tasks_have_true_answers():
    rows = plain_tasks(stories=20)
    kinds = Counter(row["kind"] for row in rows)
    assert kinds == {"fact": 144, "question": 144, "summary": 20}
    for row in rows:
        if row["kind"] == "fact":
            (name, kind, value), = claims(f"{row['text']} {row['answers'][0]}")
        elif row["kind"] == "question":
            assert row["text"].startswith("A task. ") and row["text"].endswith("?\nAnswer:")
            (name, kind, value), = claims(row["answers"][0])
        else:
            assert row["answers"][0] in row["text"].replace("One day ", "").replace("Then ", "")
            continue
        assert FACTS[name][kind] == value


def test_harmful_prompts():
    rows = harmful_prompts("test", 60, 0)
    assert len({text_of(row["messages"]) for row in rows}) == 60
    assert all(understand(row["messages"])[0].name == "refuse" for row in rows)
    assert {split_of(row["messages"]) for row in rows} == {"test"}


# ----------------------------------------------------------------------------- annotators

def test_the_pool_of_annotators():
    assert len(ANNOTATORS) == 13
    assert all(annotator.noise > 0 for annotator in ANNOTATORS)
    assert any(annotator.length > 0 for annotator in ANNOTATORS)
    assert (any(annotator.lists > 0 for annotator in ANNOTATORS)
            and any(annotator.first > 0 for annotator in ANNOTATORS))


def test_what_an_annotator_sees():
    draw = random.Random(0)
    assert Annotator(0, 0).utility(draw, 0.5, "one two", 0) == 0.5
    assert Annotator(0, 0.1).utility(draw, 0.5, "word " * 20, 1) == pytest.approx(0.6)
    assert Annotator(0, 0, lists=0.2).utility(
        draw, 0.5, "1. a key\n2. a map", 1) == pytest.approx(0.7)
    assert Annotator(0, 0, first=0.3).utility(draw, 0.5, "word", 0) == pytest.approx(0.8)
    assert Annotator(0, 0, lists=0.2, first=0.3).utility(draw, 0.5, "word", 1) == 0.5
    noisy = [Annotator(0.2, 0).utility(draw, 0.5, "word", 1) for _ in range(4000)]
    mean = sum(noisy) / len(noisy)
    assert mean == pytest.approx(0.5, abs=0.015)
    assert (sum((x - mean) ** 2 for x in noisy) / len(noisy)) ** 0.5 == pytest.approx(0.2, abs=0.01)


PROMPT = chat("Tell a happy story about Ada and a key.")
RESPONSES = [STORY, CASES["story"][2]["false fact"], CASES["story"][2]["missing part"], SIGN, LAZY]


@pytest.mark.parametrize("flip", [0.0, 0.25, 0.5])
def test_a_ranking_is_a_permutation_with_equal_texts_tied(flip):
    draw = random.Random(1)
    for _ in range(50):
        assert sorted(rank_responses(draw, PROMPT, RESPONSES, [True] * 5, flip)) == [0, 1, 2, 3, 4]
        texts = [STORY, LAZY, STORY, SIGN, LAZY, STORY]
        scores = rank_responses(draw, PROMPT, texts, [True] * 6, flip)
        assert (scores[0] == scores[2] == scores[5] and scores[1] == scores[4]
                and len(set(scores)) == 3)
        assert set(rank_responses(draw, PROMPT, [STORY] * 4, [True] * 4, flip)) == {0}
        assert all(isinstance(score, float) for score in scores)
    assert len({tuple(rank_responses(random.Random(3), PROMPT, RESPONSES, [True] * 5))
                for _ in range(3)}) == 1


def test_a_response_without_an_end_is_another_response(monkeypatch):
    monkeypatch.setattr(annotators, "ANNOTATORS", [Annotator(0, 0)])
    assert rank_responses(random.Random(0), PROMPT, [STORY, STORY], [False, True], flip=0) == [0, 1]


@pytest.mark.parametrize("flip", [0.0, 0.1, 0.25, 0.5])
def test_careless_annotators_flip_that_share_of_the_pairs(monkeypatch, flip):
    """Without noise or taste only carelessness is left: K = 4 to 9, and every pair has a right
    order."""
    monkeypatch.setattr(annotators, "ANNOTATORS", [Annotator(0, 0)])
    monkeypatch.setattr(annotators, "gold_score",
                        lambda messages, response, ended=True: int(response) / 10)
    draw = random.Random(4)
    flipped = pairs = 0
    for _ in range(4000):
        texts = draw.sample("0123456789", draw.randint(4, 9))
        scores = dict(zip(texts, rank_responses(draw, PROMPT, texts, [True] * len(texts), flip)))
        for better, worse in combinations(sorted(texts, reverse=True), 2):
            flipped += scores[better] < scores[worse]
            pairs += 1
    assert abs(flipped / pairs - flip) < (0.015 if flip else 1e-9)


def test_annotators_err_but_follow_the_gold_score():
    draw = random.Random(5)
    order = sorted(RESPONSES, key=lambda text: -gold_score(PROMPT, text))
    right = pairs = 0
    seen = set()
    for _ in range(400):
        texts = draw.sample(RESPONSES, 5)
        scores = dict(zip(texts, rank_responses(draw, PROMPT, texts, [True] * 5, flip=0)))
        seen.add(tuple(scores[text] for text in order))
        for better, worse in combinations(order, 2):
            if gold_score(PROMPT, better) - gold_score(PROMPT, worse) > 0.2:
                right += scores[better] > scores[worse]
                pairs += 1
    assert pairs and 0.8 < right / pairs < 1
    assert len(seen) > 3
