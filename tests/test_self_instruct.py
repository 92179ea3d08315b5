"""Self-Instruct: ROUGE-L, the filters in their order, what a model proposes, nothing held out."""
import json
import random
import re
from functools import lru_cache, partial
from itertools import combinations

import pytest
from test_mutants import Edit, catching

from common.errors import InputError
from common.run import load_gpt
from data.tinytown import talk, town
from data.tinytown import tasks as tasks_of_town
from rollout import Response
from systems import self_instruct as system
from systems.self_instruct import PAPER, TOWN, Task

# ----------------------------------------------------------------------------- ROUGE-L


def test_rouge_l_by_hand():
    # Of "where does live" each has four words: P = R = 3/4.
    assert system.rouge_l("Where does Ada live?", "Where does Ben live?") == 0.75
    # "the cat" of five and of two: 2 · 2/7. P = 1, R = 0.4.
    assert system.rouge_l("the cat sat on mats", "the cat") == pytest.approx(4 / 7)
    # In this order at most two: "a c" (or "b c"), 2 · 2/6; as a set it would be three.
    assert system.rouge_l("a b c", "b a c") == pytest.approx(2 / 3)
    assert system.rouge_l("a a b", "a b b") == pytest.approx(2 / 3)        # a b
    assert system.rouge_l("one two three", "three two one") == pytest.approx(1 / 3)


def test_words_are_lower_case_letters_and_digits_unstemmed():
    assert system.rouge_l("Draw 3 MAPS, now!", "draw  3 maps\tnow") == 1
    assert system.rouge_l("cats run", "cat runs") == 0
    assert system.rouge_l("item 1", "item 2") == 0.5
    assert system.rouge_l("well-known", "well known") == 1


@pytest.mark.parametrize("target, prediction", [("", ""), ("a", ""), ("", "a"), ("a", "?!"),
                                                ("é", "é")])
def test_a_side_without_words_gives_0(target, prediction):
    assert system.rouge_l(target, prediction) == 0


def brute_force(a: list[str], b: list[str]) -> int:
    """The longest sequence of a, of all of them, that is one of b too."""
    parts = [{tuple(words[i] for i in places) for size in range(len(words) + 1)
              for places in combinations(range(len(words)), size)} for words in (a, b)]
    return max(map(len, parts[0] & parts[1]))


def test_the_longest_common_sequence_is_that_of_all_of_them():
    draw = random.Random(0)
    for _ in range(300):
        a, b = (draw.choices("abcd", k=draw.randint(1, 7)) for _ in range(2))
        f = 2 * brute_force(a, b) / (len(a) + len(b))
        assert system.rouge_l(" ".join(a), " ".join(b)) == pytest.approx(f)
        assert system.rouge_l(" ".join(b), " ".join(a)) == pytest.approx(f)


# ----------------------------------------------------------------------------- filters

def verdicts(*candidates: str, pool: tuple = (), **options) -> list[str]:
    found = system.filter_instructions(list(candidates), list(pool), **options)
    assert [text for text, _ in found] == list(candidates)
    return [verdict for _, verdict in found]


@pytest.mark.parametrize("text, verdict", [
    ("Name three colours", "too short"), ("Name three warm colours", "keep"), ("", "too short"),
    ("word " * 151, "too long"), ("word " * 150, "keep"),
    ("Describe this image of me", "word: image"), ("Find the MAP of town", "word: map"),
    ("Tell me where to go to eat", "word: go to"), ("Say what a mapping is", "keep"),
    ("Write a program that sorts numbers", "a program"),
    ("Please write a program that sorts", "keep"), ("Write a programme for the fair", "a program"),
    ("- name three warm colours", "punctuation"), ("\"Name three warm colours\"", "punctuation"),
    ("Élan is a word in French", "not ASCII"), ("Say what élan is in French", "keep")])
def test_each_filter_by_hand(text, verdict):
    assert verdicts(text) == [verdict]


def test_filters_stand_in_the_papers_order():
    """Of several reasons the first is named."""
    assert verdicts("- map") == ["too short"]
    assert verdicts("map " * 151) == ["too long"]
    assert verdicts("Write a program that draws a map") == ["word: map"]
    assert verdicts("- a b c d", pool=["a b c d"]) == ["punctuation"]
    assert verdicts("é a b c d", pool=["a b c d"]) == ["not ASCII"]


def test_the_blocklist_may_be_another_one():
    assert verdicts("Draw me a small map", blocklist=()) == ["keep"]
    assert verdicts("Draw me a small key", blocklist=("key",)) == ["word: key"]


def test_only_what_is_below_the_threshold_is_new():
    # Seven of ten words: F = 0.7, which the paper drops and its code keeps.
    ten = "a b c d e f g h i j"
    assert verdicts("a b c d e f g x y z", pool=[ten]) == ["too similar"]
    assert verdicts("a b c d e f w x y z", pool=[ten]) == ["keep"]
    assert verdicts("a b c d e f g x y z", pool=[ten], threshold=0.71) == ["keep"]
    # Any of the pool, not the last or the mean.
    assert verdicts("a b c d e", pool=["a b c d e", "k l m n o"]) == ["too similar"]
    assert verdicts("k l m n o", pool=["a b c d e", "k l m n o"]) == ["too similar"]


def test_what_is_kept_joins_the_pool_and_what_is_dropped_does_not():
    assert verdicts("a b c d e", "a b c d e") == ["keep", "too similar"]
    assert verdicts("a b c d e f g h i j", "a b c d e f g w x y", "u v c d e f g w x y") == [
        "keep", "too similar", "keep"]
    assert verdicts("map a b c d", "a b c d e") == ["word: map", "keep"]


def test_the_bound_changes_nothing():
    """Against ROUGE-L of every pair, in every order, at many thresholds."""
    draw, some = random.Random(1), []
    for _ in range(60):
        some.append(" ".join(draw.choices("abcdef", k=draw.randint(4, 8))))
    for threshold in (0.5, 0.6, 2 / 3, 0.7, 0.75, 0.8, 0.9, 1):
        pool, slow = [], []
        for text in some:
            new = all(system.rouge_l(text, other) < threshold for other in pool)
            slow.append("keep" if new else "too similar")
            pool += [text] * new
        assert verdicts(*some, threshold=threshold) == slow


# ----------------------------------------------------------------------------- instances

@pytest.mark.parametrize("task, ended, fault", [
    (Task("i", "", "Ada eats jam."), True, ""), (Task("i", "", "Ada eats"), False, "endless"),
    (Task("i", "a b", ""), True, "no output"), (Task("i", "a b", "a b"), True,
                                                "output is the input"),
    (Task("i", "a b:", "c"), True, "ends in a colon"), (Task("i", "", "c:"), True,
                                                        "ends in a colon"),
    (Task("i", "", "w " * 41), True, "too long"), (Task("i", "", "w " * 40), True, ""),
    (Task("i", "", "a\nText: b"), True, "another field"),
    (Task("i", "Answer: b", "c"), True, "another field"),
    (Task("i", "", "Ada is sad. Ben is sad. Ada is sad."), True, "repeats"),
    (Task("i", "", "1. a fox\n2. a fox"), True, "")])
def test_each_fault_of_an_instance(task, ended, fault):
    assert system.instance_fault(task, ended, TOWN) == fault


def test_one_input_with_two_outputs_drops_the_task():
    def row(instruction, given, answer, verdict="keep"):
        return Task(instruction, given, answer)._asdict() | {"verdict": verdict}
    rows = [row("a", "x", "1"), row("a", "x", "2"), row("a", "y", "1"),
            row("b", "x", "1"), row("b", "x", "1"),           # the same again
            row("c", "", "1"), row("c", "", "2"),             # without input nothing contradicts
            row("d", "x", "1"), row("d", "x", "2", "endless")]
    assert [one["verdict"] for one in system.without_contradictions(rows)] == [
        "two outputs"] * 3 + ["keep", "twice", "keep", "keep", "keep", "endless"]


def test_cards_put_the_output_of_a_choice_first():
    task = Task("Good or bad?", "The pie was cold.", "Bad.", True)
    assert TOWN.card(task) == "A task. Good or bad?\nAnswer: Bad.\nText: The pie was cold."
    assert PAPER.card(task) == "Task: Good or bad?\nClass label: Bad.\nInput: The pie was cold."
    task = task._replace(choice=False)
    assert TOWN.card(task) == "A task. Good or bad?\nText: The pie was cold.\nAnswer: Bad."
    assert PAPER.card(task._replace(given="")) == "Task: Good or bad?\nOutput: Bad."


# ----------------------------------------------------------------------------- the town

@lru_cache
def seeds() -> list[Task]:
    return system.town_seeds(1)


def test_seeds_are_good_and_of_the_kinds_that_are_shown():
    tasks = seeds()
    assert len(tasks) == len({task[:2] for task in tasks}) == system.SEEDS
    assert {tasks_of_town.kind_of(task.instruction) for task in tasks} == {
        family.name for family in tasks_of_town.single_turn()} - set(tasks_of_town.UNSEEN)
    assert set(tasks_of_town.UNSEEN) < {family.name for family in tasks_of_town.single_turn()}
    assert not any(map(tasks_of_town.leaks, tasks)) and system.town_seeds(2) != tasks
    assert tasks_of_town.validity(tasks) == [1, 1, 1, 1]
    # A false answer spoils its task alone; an instruction that is none, its input and output too.
    found = tasks_of_town.validity([tasks[0]._replace(answer="No."), *tasks[1:4]])
    assert found == [1, 1, 0.75, 0.75]
    found = tasks_of_town.validity([tasks[0]._replace(instruction="Where is my?"), *tasks[1:4]])
    assert found == [0.75, 0.75, 1, 0.75]


def test_every_stem_of_the_town_is_of_its_kind():
    draw = random.Random(3)
    for _ in range(300):
        heard = talk.heard(draw, single=True)
        assert tasks_of_town.kind_of(heard.stem) == heard.family.name
    assert tasks_of_town.kind_of("What is the job of two ideas?") is None


def test_no_demonstration_is_held_out():
    """With any beginning, with its input on either side, and without them."""
    draw = random.Random(0)
    tasks = seeds() + [Task(f"{draw.choice(town.PREFIXES)}{one.stem}", one.given, "No.")
                       for one in (talk.heard(draw, single=True) for _ in range(300))]
    kept = [task for task in tasks if not tasks_of_town.leaks(task)]
    for task in kept:
        for _ in range(4):
            asked = system.conversation(task, draw)["messages"][0]["content"]
            assert not talk.held_out(asked) and not talk.held_out(talk.without_prefix(asked))
        for text in (task.instruction, talk.without_prefix(task.instruction)):
            for form in (text, f"{text} {task.given}".strip(), f"{task.given} {text}".strip()):
                assert not talk.held_out(form)
    assert len(kept) > 200


def test_a_demonstration_may_begin_in_any_way_with_its_input_on_either_side():
    task = next(task for task in seeds() if task.given)
    found = {system.conversation(task, random.Random(i))["messages"][0]["content"]
             for i in range(100)}
    forms = {prefix + form for prefix in town.PREFIXES
             for form in (f"{task.instruction} {task.given}", f"{task.given} {task.instruction}")}
    assert found == {form for form in forms if not talk.held_out(form)} and len(found) > 2


def test_seeds_are_repeated_to_their_share():
    # A share of 3/8 is 0.6 seeds to one of its own: 0, 0.6, 1.5, 3 and 6 times a hundred.
    assert [system.repeats(own, 100, 0.375) for own in (0, 100, 250, 500, 1000)] == [1, 1, 2, 3, 6]
    assert system.repeats(10 ** 6, 100, 0) == 1                      # each once


# ----------------------------------------------------------------------------- the writer

@pytest.fixture(scope="module")
def writer(town, tmp_path_factory) -> system.Writer:
    model, tokenizer = load_gpt(str(town / "base"))
    config = system.Config(run=str(town), lists=6, max_new_tokens=24)
    return system.Writer(model.requires_grad_(False), tokenizer, TOWN, seeds(), config)


def test_what_it_prefers_is_what_is_more_probable(writer):
    import torch
    texts = ["A task. Where does Ada live?\n", "A task. Sum up in one sentence:\n"]
    prompts = [writer.prompt([], lambda _: text) for text in texts]
    found = []
    for prompt in prompts:
        logits = writer.model(torch.tensor([prompt.ids]))[0, -1]
        ids = [writer.tokenizer.encode(word) for word in ("Text", "Answer")]
        assert list(map(len, ids)) == [1, 1]
        found.append(bool(logits[ids[0][0]] > logits[ids[1][0]]))
    assert writer.prefers(prompts, "Text", "Answer") == found
    assert writer.prefers(prompts, "Answer", "Text") == [not one for one in found]


def test_a_prompt_leaves_room_and_keeps_the_last(writer):
    items = [f"item {i} and more" for i in range(60)]
    prompt = writer.prompt(items, "\n".join)
    room = writer.model.config.block_size - 24
    assert room - 12 < len(prompt.ids) <= room
    assert writer.tokenizer.decode(prompt.ids).endswith(items[-1])


def proposing(monkeypatch, writer, *texts: tuple[str, bool]) -> list[tuple[str, str]]:
    """What is made of these continuations of a list."""
    monkeypatch.setattr(system.Writer, "go_on", lambda self, prompts, *_: [
        Response([], *texts[i % len(texts)]) for i in range(len(prompts))])
    writer = writer._replace(config=system.Config(lists=len(texts)))
    return [(row["instruction"], row["verdict"]) for row in
            system.write_instructions(writer, 1, writer.form.threshold)]


def test_every_whole_line_of_a_list_is_an_instruction(monkeypatch, writer):
    a, b, c = [one.stem for one in map(lambda i: talk.heard(random.Random(i), single=True),
                                       (1, 2, 3))]
    writer = writer._replace(seeds=[])
    assert proposing(monkeypatch, writer, (f" {a}\n6. {b}\n7. {c}", False)) == [
        (a, "keep"), (b, "keep"), (c, "cut off")]
    assert proposing(monkeypatch, writer, (f" {a}\nAnd so on", True)) == [(a, "keep")]
    assert proposing(monkeypatch, writer._replace(form=PAPER), (
        f" {a}\nTask 10: {b}\nTask eleven", True), (f" {a}", True)) == [
        (a, "keep"), (b, "keep"), (a, "too similar")]


def test_what_is_held_out_is_neither_kept_nor_in_the_pool(monkeypatch, writer):
    writer = writer._replace(seeds=[])
    forms = ("Tell a story about {} at the {}.".format(name, place)
             for name in town.NAMES for place in town.VALUES["home"])
    lines = [form for form in forms if talk.held_out(form)][:20]
    assert proposing(monkeypatch, writer, *((line, True) for line in lines)) == [
        (line, "held out") for line in lines]


def answering(replies: dict[str, str]):
    """A writer that goes on with the reply to the last line but its first field."""
    def go_on(self, prompts, temperature, title):
        asked = [self.tokenizer.decode(prompt.ids) for prompt in prompts]
        return [Response([], replies[re.search(r"(?s).*A task\. (.*)\n", text)[1]], True)
                for text in asked]
    return go_on


def test_instances_are_read_field_by_field(monkeypatch, writer):
    replies = {"Where does Ada live?": " Ada lives at the mill.",
               "Make it short.": " One day Ada found a key.\nAnswer: Ada found a key.",
               "Good or bad?": " Bad.\nText: The pie was cold."}
    monkeypatch.setattr(system.Writer, "go_on", answering(replies))
    monkeypatch.setattr(system.Writer, "prefers", lambda self, prompts, first, _: [
        {" Yes": "Good" in text, "Text": "short" in text}[first]
        for text in (self.tokenizer.decode(prompt.ids) for prompt in prompts)])
    monkeypatch.setattr(tasks_of_town, "held_out", lambda text: False)
    rows = system.write_instances(writer, list(replies))
    assert [tuple(row.values()) for row in rows] == [
        ("Where does Ada live?", "", "Ada lives at the mill.", False, "keep"),
        ("Make it short.", "One day Ada found a key.", "Ada found a key.", False, "keep"),
        ("Make it short.", "One day Ada found a key.", "Ada found a key.", False, "twice"),
        ("Good or bad?", "The pie was cold.", "Bad.", True, "keep"),
        ("Good or bad?", "The pie was cold.", "Bad.", True, "twice")]


def test_the_papers_prompts(monkeypatch, writer):
    """Examples of the right kind before the new task, none that is long, a blank line between."""
    tasks = [Task(f"Name {i} things", "", f"thing {i}") for i in range(4)]
    tasks += [Task(f"Is {i} odd or even?", str(i), "odd", True) for i in range(4)]
    tasks += [Task("Write a saga", "", "saga " * 100)]
    prompts = []
    monkeypatch.setattr(system.Writer, "prompt", lambda self, before, text: prompts.append(
        text(before).split("\n\n")))
    asking = writer._replace(form=PAPER, seeds=tasks)
    for about in range(3):
        asking.shown(random.Random(0), about, "Task: New\nX:")
    assert [len(one) for one in prompts] == [1 + 6 + 1, 1 + 4 + 1, 1 + 4 + 1]
    assert [one[0] for one in prompts] == list(PAPER.about)
    assert {one[-1] for one in prompts} == {"Task: New\nX:"}
    assert set(prompts[1][1:-1]) == {PAPER.card(task) for task in tasks[:4]}
    assert set(prompts[2][1:-1]) == {PAPER.card(task) for task in tasks[4:8]}
    assert "Task: Is 0 odd or even?\nIs it classification? Yes" in sum(
        [asking.shown(random.Random(i), 0, "") or prompts[-1] for i in range(9)], [])
    assert "saga" not in str(prompts)


# ----------------------------------------------------------------------------- files of seeds

def write_lines(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SEED = {"instruction": "Add the numbers.", "instances": [{"input": "1 2", "output": "3 "}],
        "is_classification": False}


def test_seed_tasks_in_the_papers_layout(tmp_path):
    two = [{"input": "1", "output": "odd"}, {"input": "2", "output": "even"}]
    choice = {"instruction": "Odd or even?", "instances": two, "is_classification": True}
    path = write_lines(tmp_path / "seeds.jsonl", SEED, choice)
    assert system.read_seeds(path) == [Task("Add the numbers.", "1 2", "3", False),
                                       Task("Odd or even?", "1", "odd", True)]


def test_the_papers_own_seeds(shared_data):
    tasks = system.read_seeds(str(shared_data / "self_instruct_seed_tasks.jsonl"))
    assert len(tasks) == 175 and sum(task.choice for task in tasks) in (25, 26)


@pytest.mark.parametrize("row", [
    {"instruction": "Add.", "input": "1 2", "output": "3"}, {"prompt": "Add.", "response": "3"},
    SEED | {"instances": []}, SEED | {"instances": ["3"]}, SEED | {"instances": [{"input": "3"}]},
    SEED | {"instruction": 3}])
def test_another_layout_is_one_line_that_names_file_and_line(tmp_path, row):
    path = write_lines(tmp_path / "seeds.jsonl", SEED, row)
    with pytest.raises(InputError, match=r"seeds.jsonl, line 2: .*expected a") as error:
        system.read_seeds(path)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------- the command

def fluent(seed: int = 0):
    """A writer that knows the town: lists of what is asked there, answers as people give them."""
    draw, known = random.Random(seed), {}

    def go_on(self, prompts, temperature, title):
        found = []
        for prompt in prompts:
            if title.startswith("round"):
                some = [talk.heard(draw, single=True) for _ in range(2)]
                known.update({one.stem: one for one in some})
                found.append(Response([], f" {some[0].stem}\n6. {some[1].stem}", True))
                continue
            *_, task, first = self.tokenizer.decode(prompt.ids).split("\n")
            one = known[task.split("A task. ")[1]]
            answer = talk.answered(draw, one)
            text = f" {one.given}\nAnswer: {answer}" if first == "Text:" else f" {answer}"
            found.append(Response([], text, True))
        return found
    return go_on


@pytest.fixture(scope="module")
def run(town, tmp_path_factory):
    """A folder that shares a tiny run."""
    home = tmp_path_factory.mktemp("run")
    for stage in ("base", "sft", "rm"):
        (home / stage).symlink_to(town / stage)
    (home / "data").mkdir()
    for name in ("test.jsonl", "rank_val.jsonl", "base.txt", "sft.jsonl"):
        (home / "data" / name).symlink_to(town / "data" / name)
    (home / "data/sft_val.jsonl").symlink_to(town / "data/sft.jsonl")
    return home


def test_the_command_end_to_end(run, monkeypatch, capsys):
    monkeypatch.setattr(system.Writer, "go_on", fluent())
    monkeypatch.setattr(system, "SIZES", (10, 10_000))
    config = system.Config(run=str(run), rounds=2, lists=20, steps=2, max_new_tokens=24)
    system.measure(config)
    home, said = run / "systems/self_instruct", capsys.readouterr().out
    found = json.loads((home / "table.json").read_text())
    rows = [json.loads(line) for line in (home / "instances.jsonl").read_text().splitlines()]
    own = {row["instruction"] for row in rows if row["verdict"] == "keep"}
    assert set(found["table"]) == set(found["kinds"]) == {"sft", "seeds", "own_10",
                                                          f"own_{len(own)}"}
    assert (home / "gold.png").exists() and found["fields"]["own"][0] == 1
    assert "| round | keep |" in said and "| own | 1.000 |" in said and "| 0.9 |" in said
    # What is trained on: seeds, then more and more; nothing of it is held out.
    sets = {name: [json.loads(line)["messages"] for line in
                   (home / f"{name}.jsonl").read_text().splitlines()] for name in found["kinds"]
            if name != "sft"}
    assert len(sets["seeds"]) == system.SEEDS < len(sets["own_10"]) < len(sets[f"own_{len(own)}"])
    for asked, _ in sum(sets.values(), []):
        assert town.split_of([asked]) not in ("val", "test")

    def nothing_left(self, prompts, *_):
        assert not prompts, "made anew"
        return []
    monkeypatch.setattr(system.Writer, "go_on", nothing_left)
    stamp = (home / "seeds/model.pt").stat().st_mtime_ns
    system.measure(config)                                      # what is there is not made anew
    assert (home / "seeds/model.pt").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="made with rounds 2, not 3; remove that folder"):
        system.measure(system.Config(run=str(run), rounds=3, lists=20, steps=2, max_new_tokens=24))


def test_what_was_cut_off_goes_on_with_the_next_round(run, tmp_path):
    """To the letter as if it had not been, and no round is written twice."""
    model, tokenizer = load_gpt(str(run / "base"))
    config = system.Config(run=str(run), lists=6, max_new_tokens=16)
    writer = system.Writer(model.eval(), tokenizer, TOWN, tasks_of_town.town_seeds(1, 30), config)
    whole = system.write_instructions(writer, 3, 2.0, tmp_path / "whole.jsonl")
    path = tmp_path / "cut.jsonl"
    system.write_instructions(writer, 2, 2.0, path)
    with open(path, "a") as file:
        file.write('{"round": 3, "instr')                       # a line that was cut off
    asked = []
    go_on = system.Writer.go_on

    def counted(self, prompts, *rest):
        asked.append(len(prompts))
        return go_on(self, prompts, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system.Writer, "go_on", counted)
        assert system.write_instructions(writer, 3, 2.0, path) == whole
    assert asked == [0, 0, 6] and path.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_model_that_writes_nothing_of_use_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr(system.Writer, "go_on", lambda self, prompts, *_: [
        Response([], "Well", True)] * len(prompts))
    with pytest.raises(InputError, match="none of 3 instructions passed all filters"):
        system.measure(system.Config(run=str(run), out=str(tmp_path), rounds=1, lists=3))


def test_a_file_of_seeds_wants_a_model():
    with pytest.raises(InputError, match="--init: name the model"):
        system.measure(system.Config(seeds="some.jsonl"))


def test_answers_longer_than_half_of_the_context_are_refused(run, tmp_path):
    with pytest.raises(InputError, match="--max_new_tokens 60: more than half of the context, 96"):
        system.measure(system.Config(run=str(run), out=str(tmp_path), max_new_tokens=60))


def test_a_file_of_seeds_end_to_end(town, tmp_path, monkeypatch, capsys):
    """The same code with the paper's prompts: writes only."""
    seeds = write_lines(tmp_path / "seeds.jsonl", *(
        SEED | {"instruction": f"Add the {i} numbers here.", "is_classification": i % 2 == 0}
        for i in range(8)))
    asked = []

    def go_on(self, prompts, temperature, title):
        asked.extend(self.tokenizer.decode(prompt.ids) for prompt in prompts)
        if title.startswith("round"):
            text = " Name three warm colours\nTask 6: Draw me a small map"
            return [Response([], text, True)] * len(prompts)
        return [Response([], " a wall\nOutput: red" if text.endswith("Input:") else " red", True)
                for text in asked[-len(prompts):]]
    monkeypatch.setattr(system.Writer, "go_on", go_on)
    found = system.measure(system.Config(init=str(town / "base"), seeds=seeds, out=str(
        tmp_path / "out"), rounds=1, lists=2, max_new_tokens=16))
    rows = [json.loads(line) for line in
            (tmp_path / "out/instructions.jsonl").read_text().splitlines()]
    assert [row["verdict"] for row in rows] == ["keep", "word: map",
                                                "too similar", "word: map"]
    assert found["tasks"] == 1 and ": red\n" in capsys.readouterr().out
    # Of four seeds as many as the context holds.
    assert re.search(r"a series of tasks:\nTask 1: Add .*\nTask 4:$", asked[0], re.DOTALL)


def test_a_model_goes_on_with_lists_and_cards(writer):
    """The tiny model itself: whatever it writes has a verdict, and the same seed writes it again.
    """
    rows = system.write_instructions(writer, 2, 0.9)
    assert rows and {row["round"] for row in rows} == {1, 2}
    assert rows == system.write_instructions(writer, 2, 0.9)
    instances = system.write_instances(writer, ["Where does Ada live?", "Make this short."])
    assert [row["instruction"] for row in instances][:1] == ["Where does Ada live?"]
    assert all(row["verdict"] for row in rows + instances)


# ----------------------------------------------------------------------------- mutants

def as_set(a: list[str], b: list[str]) -> int:
    return len(set(a) & set(b))


def stemmed(text: str) -> list[str]:
    return [word.rstrip("s") for word in re.findall(r"[a-z0-9]+", text.lower())]


CASES = {text: partial(test_each_filter_by_hand, text, verdict) for text, verdict in (
    ("Name three colours", "too short"), ("word " * 151, "too long"),
    ("Say what a mapping is", "keep"), ("Find the MAP of town", "word: map"))}
MUTANTS = [
    (system, "rouge_l", "precision", Edit("2 * longest_common(a, b) / (len(a) + len(b))",
                                          "longest_common(a, b) / len(b)"),
     test_rouge_l_by_hand, test_the_longest_common_sequence_is_that_of_all_of_them),
    (system, "longest_common", "of sets", as_set,
     test_rouge_l_by_hand, test_the_longest_common_sequence_is_that_of_all_of_them),
    (system, "longest_common", "without gaps", Edit("max(above[j + 1], row[j])", "0"),
     test_rouge_l_by_hand, test_the_longest_common_sequence_is_that_of_all_of_them),
    (system, "words", "case kept", Edit("text.lower()", "text"),
     test_words_are_lower_case_letters_and_digits_unstemmed),
    (system, "words", "stemmed", stemmed, test_words_are_lower_case_letters_and_digits_unstemmed),
    (system, "words", "digits lost", Edit("[a-z0-9]", "[a-z]"),
     test_words_are_lower_case_letters_and_digits_unstemmed),
    (system, "filter_instructions", "the pool does not grow",
     Edit("known.append(words(text))", "pass"),
     test_what_is_kept_joins_the_pool_and_what_is_dropped_does_not),
    (system, "filter_instructions", "what is dropped joins the pool",
     Edit("if not verdict:\n            known", "if True:\n            known"),
     test_what_is_kept_joins_the_pool_and_what_is_dropped_does_not),
    (system, "too_similar", "equal is new", Edit("/ total >= threshold:\n                return",
                                                 "/ total > threshold:\n                return"),
     test_only_what_is_below_the_threshold_is_new, test_the_bound_changes_nothing),
    (system, "too_similar", "a bound that is too low", Edit("2 * most", "most"),
     test_only_what_is_below_the_threshold_is_new, test_the_bound_changes_nothing),
    (system, "too_similar", "the first of the pool alone",
     Edit("    return False", "        return False\n    return False"),
     test_only_what_is_below_the_threshold_is_new, test_the_bound_changes_nothing),
    (system, "fault", "three words are enough", Edit("count < 4", "count < 3"),
     CASES["Name three colours"]),
    (system, "fault", "no longest", Edit("count > 150", "False"), CASES["word " * 151]),
    (system, "fault", "parts of words", Edit(r"\b{re.escape(word)}\b", "{re.escape(word)}"),
     CASES["Say what a mapping is"]),
    (system, "fault", "of one case", Edit(", re.IGNORECASE", ""), CASES["Find the MAP of town"]),
    (tasks_of_town, "leaks", "nothing is held out", lambda task: False,
     test_no_demonstration_is_held_out),
    (system, "conversation", "beginnings that are held out",
     Edit("for form in forms if not held_out(form)", "for form in forms"),
     test_no_demonstration_is_held_out),
    (system, "without_contradictions", "instances dropped, not the task",
     Edit("instruction for (instruction, _), answers", "pair for pair, answers"),
     test_one_input_with_two_outputs_drops_the_task)]


test_a_classic_wrong_answer_is_caught = catching(MUTANTS)
