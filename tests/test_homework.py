"""The homework: sources score 100 %, blanks and nonsense 0, every classic mistake costs its
exercise and is named, and no submission takes the grader down."""
import json
import math
import re
import shutil
import subprocess
import sys
import time
import zipfile
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from test_mutants import Edit, catching

import train_sft
from common.errors import InputError
from homework import check as checking
from homework import compare, source
from homework import grade as grading
from homework.cases import HAND, PROPERTIES
from homework.compare import plain
from homework.exercises import EXERCISES, by_number
from homework.grade import grade
from homework.handout import markdown, page
from homework.make import chosen, make
from homework.mistakes import all_mistakes, mistakes_of
from homework.process import Failed, Here, Process
from homework.submission import grade_one, write_results
from homework.worker import decode

EACH = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda one: f"{one.number}")


def points(rungs) -> float:
    return sum(rung.points for rung in rungs)


def said(rungs) -> str:
    return next((rung.message for rung in rungs if rung.message), "")


# ----------------------------------------------------------------------------- what scores what

@EACH
def test_the_right_functions_score_everything(exercise):
    rungs = grade(exercise, Here())
    assert points(rungs) == exercise.points and said(rungs) == ""


def changed(value, to: float):
    """An answer with every number replaced."""
    if isinstance(value, torch.Tensor):
        whole = not value.is_floating_point()
        return torch.zeros_like(value) if whole else torch.full_like(value, to)
    if isinstance(value, (list, tuple)):
        return type(value)(changed(one, to) for one in value) if type(value) in (list, tuple) else [
            changed(one, to) for one in value]
    return type(value)(0) if isinstance(value, int) else to


@lru_cache
def nonsense(exercise, kind: str) -> Here:
    """Functions that return zeros or NaN in the right form, or their first argument."""
    from homework.worker import find
    found = {}
    for file, name in exercise.functions:
        right = find(file.removesuffix(".py").replace("/", "."), name)

        def wrong(*args, right=right):
            if kind == "input":
                return args[0]
            value = changed(right(*args), 0.0 if kind == "zeros" else math.nan)
            grown = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]
            # Of zeros or NaN, but with a gradient to show.
            return value + 0 * sum(arg.sum() for arg in grown) if grown and isinstance(
                value, torch.Tensor) else value
        found[name] = wrong
    return Here(found)


@pytest.mark.parametrize("kind", ["zeros", "nan", "input"])
@EACH
def test_zeros_nan_and_the_input_score_nothing(exercise, kind):
    assert points(grade(exercise, nonsense(exercise, kind))) == 0


def test_every_classic_mistake_costs_points_and_most_are_named():
    """On its exercise; no other exercise reads this function (see the next test)."""
    named = []
    for exercise, mistake in all_mistakes():
        rungs = grade(exercise, Here({mistake.name: mistake.function}), mistakes_of(exercise))
        assert points(rungs) < exercise.points, (exercise.number, mistake.says)
        named.append(mistake.says in said(rungs))
    assert len(named) >= 90 and sum(named) / len(named) > 0.95


def test_exercises_share_no_function():
    """So a mistake in one costs no other: all others' functions are the right ones when it is
    graded (source.stage)."""
    functions = [one for exercise in EXERCISES for one in exercise.functions]
    assert len(set(functions)) == len(functions)
    assert {exercise.number for exercise, _ in all_mistakes()} == {
        one.number for one in EXERCISES}
    assert sum(one.points for one in EXERCISES) == 100


@EACH
def test_hand_cases_have_results_by_hand_and_drawn_ones_labels(exercise):
    assert all(case.expected is not None for case in HAND[exercise.number]())
    drawn = PROPERTIES[exercise.number](torch.Generator().manual_seed(0))
    assert all(len(case.label) > 8 for case in drawn) and len(drawn) >= 2
    called = {(case.file, case.name) for case in HAND[exercise.number]() + drawn}
    assert called == set(exercise.functions)


# ----------------------------------------------------------------------------- a folder

@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("homework") / "made"
    make(out, list(EXERCISES), formulas=True)
    return out


@pytest.fixture
def filled(made, tmp_path) -> Path:
    """A student's folder with the solutions in it: of the files alone that are graded."""
    shutil.copytree(made / "solutions", tmp_path / "filled")
    return tmp_path / "filled"


def spoil(folder: Path, file: str, name: str, body: str) -> None:
    """Replace the body of a function."""
    text = (folder / file).read_text()
    head = re.match(r"\s*def [^\n]*?(?:\n[^\n]*?)*?:\n", source.function_of(text, name, file))[0]
    (folder / file).write_text(source.with_function(text, name, f"{head}    {body}", file))


def test_a_solution_scores_everything_and_a_blank_nothing(made, filled, tmp_path):
    for number in (1, 8):                    # a method, a function; the others in .ci/run
        exercise = by_number(number)
        assert points(grade_one(filled, exercise)) == exercise.points
        rungs = grade_one(made / "student", exercise)
        assert points(rungs) == 0 and f"exercise {number}" in said(rungs)
    write_results(tmp_path / "results.json", {exercise: rungs}, 1.4)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["score"] == 0 and [test["max_score"] for test in found["tests"]] == [6, 3.6, 2.4]


HOSTILE = {
    "an endless loop": ("while True: pass", "no answer within 2 s"),
    "sys.exit": ("import sys; sys.exit(0)", "the code called sys.exit"),
    "os._exit": ("import os; os._exit(0)", "ended by itself with status 0"),
    "a huge tensor": ("return torch.zeros(10**12)", "alloc|memory"),
    "a reply of its own": (
        "import os, stat; [os.write(fd, b'[]\\n') for fd in range(3, 9) if os.path.exists("
        "f'/proc/self/fd/{fd}') and os.readlink(f'/proc/self/fd/{fd}').startswith('pipe') "
        "and open(f'/proc/self/fdinfo/{fd}').read().split()[3].endswith('1')]",
        "pipe of its replies"),
    "printing": ("print('x' * 10**6); return logprobs", "expected"),
    "torch replaced": ("torch.Tensor.__eq__ = lambda *_: True; torch.allclose = lambda *_, **__: "
                       "True; return logprobs", "expected"),
    "a number without end": ("return 10**400", "returns nothing"),
    "lists without end": ("x = []\n    for _ in range(500): x = [x]\n    return x",
                          "recursion|returns"),
    "a process that stops": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
                             "no answer within 2 s"),
    "another type": ("return 'fine'", "returns str"),
    "no gradient": ("return -logprobs.detach()[mask].mean()", "was it detached"),
    "in place": ("logprobs.data.zero_(); return -logprobs[mask].mean()", "writes into|expected"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_function_scores_nothing_in_one_line(name, filled, tmp_path):
    body, message = HOSTILE[name]
    spoil(filled, "train_sft.py", "sft_loss", body)
    source.stage(filled, by_number(4), tmp_path / "stage")
    try:
        with Process(tmp_path / "stage", seconds=2) as student:
            rungs = grade(by_number(4), student)
            assert points(rungs) == 0
            line = said(rungs)
    except Failed as error:
        line = str(error)
    assert re.search(message, line) and "\n" not in line, line


@pytest.mark.parametrize("text, message", [
    ("def broken(:", "train_sft.py, line 1: "), ("import sys\nsys.exit()", "no function sft_loss"),
    ("\0", "train_sft.py"), (None, "train_sft.py: not handed in"),
    ("x = 1\n" * 2 ** 18, "larger than 1 MiB")])
def test_a_file_that_can_not_be_graded_is_one_line(filled, text, message):
    path = filled / "train_sft.py"
    path.unlink()
    if text is not None:
        path.write_text(text)
    rungs = grade_one(filled, by_number(4))
    assert points(rungs) == 0 and message in said(rungs) and "\n" not in said(rungs)
    assert points(grade_one(filled, by_number(2))) == 4          # the others go on


def test_a_link_to_the_solution_is_not_read(filled):
    (filled / "train_sft.py").unlink()
    (filled / "train_sft.py").symlink_to(source.PROJECT / "train_sft.py")
    assert "a link to another place" in said(grade_one(filled, by_number(4)))


def test_a_process_that_reads_no_more_ends_at_the_deadline(filled, tmp_path):
    """A request larger than the pipe holds blocks nobody."""
    spoil(filled, "train_sft.py", "sft_loss",
          "import os, signal, threading; threading.Timer(0.2, os.kill, (os.getpid(), "
          "signal.SIGSTOP)).start(); return logprobs.sum()")
    source.stage(filled, by_number(4), tmp_path / "stage")
    with Process(tmp_path / "stage", seconds=2) as student:
        ones = torch.ones(2, 2)
        student.call("train_sft", "sft_loss", ones, ones)
        time.sleep(0.5)
        with pytest.raises(Failed, match="no answer within 2 s"):
            student.call("train_sft", "sft_loss", torch.ones(300, 300), torch.ones(300, 300))


def test_an_answer_of_no_numbers_and_a_billion_rows_is_not_unpacked():
    assert decode({"tensor": [], "shape": [10**9, 0], "dtype": "float64"}) is None


def test_code_that_ends_the_process_on_import_is_one_line(filled):
    path = filled / "train_sft.py"
    path.write_text(path.read_text() + "\nimport os\nos._exit(3)\n")
    assert "status 3" in said(grade_one(filled, by_number(4)))


def test_helpers_beside_a_function_are_kept_and_other_mistakes_cost_nothing(filled):
    path = filled / "train_ppo.py"
    path.write_text(path.read_text().replace("def whiten(", "def whiten_of_old(") + (
        "\n\ndef minus(x):\n    return -x\n"))
    spoil(filled, "train_ppo.py", "gae", "return 1")
    spoil(filled, "train_ppo.py", "policy_loss",
          "ratio = (torch.where(mask.bool(), logprobs - old_logprobs, 0.0)).exp()\n"
          "    return minus(masked_mean(torch.minimum(ratio * advantages, ratio.clamp("
          "1 - cliprange, 1 + cliprange) * advantages), mask))")
    assert points(grade_one(filled, by_number(10))) == 10
    assert "no function whiten" in said(grade_one(filled, by_number(9)))


def test_a_wrong_mean_costs_its_exercise_alone(filled):
    """Though the losses call it."""
    spoil(filled, "kernels.py", "masked_mean",
          "return (torch.where(mask.bool(), x, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)).mean()")
    assert "mean of row means" in said(grade_one(filled, by_number(2)))
    for number in (4, 11):
        assert points(grade_one(filled, by_number(number))) == by_number(number).points


def test_a_hidden_kernel_does_not_answer(filled):
    spoil(filled, "kernels.py", "token_logprobs_reference",
          "return token_logprobs(hidden, weight, targets, temperature)")
    assert "RecursionError" in said(grade_one(filled, by_number(3)))


# ----------------------------------------------------------------------------- what is handed out

@EACH
def test_a_blank_keeps_signature_and_units(exercise, made):
    for file, name in exercise.functions:
        path = made / "student" / file
        given = source.function_of(path.read_text(), name, file)
        right = source.function_of((source.PROJECT / file).read_text(), name, file)
        assert given.endswith(f'raise NotImplementedError("exercise {exercise.number}: {name}")')
        assert right.startswith(given[:given.rindex("raise")].rstrip())
        assert right.split("\n")[-1] not in given


def test_without_formulas_the_answer_is_gone(tmp_path):
    make(tmp_path / "made", list(EXERCISES), formulas=False)
    ppo = (tmp_path / "made/student/train_ppo.py").read_text()
    given = source.function_of(ppo, "gae", "train_ppo.py")
    assert "δ_t" not in given and "V_t is the value of the state" in given
    assert "$$" not in (tmp_path / "made/handout.md").read_text().split("## Finale")[0]
    assert (tmp_path / "made/handout.html").read_text().count("<math") == 1
    assert "−log σ" not in source.function_of(
        (tmp_path / "made/student/train_rm.py").read_text(), "pairwise_loss", "train_rm.py")


def test_what_a_student_gets_holds_no_right_answer(made):
    files = {str(path.relative_to(made / "student")) for path in (made / "student").rglob("*")}
    assert not any(name.startswith(("tests", "homework/mistakes", "homework/grade", "bench"))
                   for name in files)
    assert json.loads((made / "student/homework/chosen.json").read_text()) == list(range(1, 15))
    text = "".join(path.read_text() for path in (made / "student").rglob("*.py"))
    assert "next_value = next_advantage" not in text


def test_a_student_checks_and_sees_numbers(made):
    found = subprocess.run([sys.executable, "-m", "homework", "check", "9"], text=True,
                           cwd=made / "student", capture_output=True)
    assert found.returncode == 1 and "WRONG  whiten, 1, 2, 3: mean 2, variance ⅔" in found.stdout
    assert "exercise 9: whiten" in found.stdout and "shift_mean=True" in found.stdout
    assert "0 of 2 right" in found.stdout
    found = subprocess.run([sys.executable, "-m", "homework", "grade", "."], text=True,
                           cwd=made / "student", capture_output=True)
    assert found.returncode == 2 and "invalid choice: 'grade'" in found.stderr


def test_a_gradient_that_is_cut_off_is_seen_by_the_student(monkeypatch):
    case = HAND[4]()[0]
    assert checking.wrong(case) == ""
    right = train_sft.sft_loss
    monkeypatch.setattr(train_sft, "sft_loss", lambda *args: right(*args).detach())
    assert "no gradient" in checking.wrong(case)


def test_the_finale_arrives(capsys):
    """PPO nearer with more answers a step, DPO nearest."""
    checking.finale(0.3, 0.1)
    lines = capsys.readouterr().out.splitlines()[1:]
    reference, few, _, many, dpo = (float(line.split()[-1]) for line in lines)
    assert reference > 0.5 and few < 0.02 and many < few and dpo < many


def test_trained_models_run_while_the_kernel_is_hidden(made):
    """The blank of the kernel calls the reference; only that one is missing."""
    text = (made / "student/kernels.py").read_text()
    given = source.function_of(text, "token_logprobs", "kernels.py")
    assert given.endswith("return token_logprobs_reference(hidden, weight, targets, temperature)")


def test_some_exercises_alone(tmp_path):
    make(tmp_path / "made", chosen("rm,9"), formulas=True)
    student = tmp_path / "made/student"
    assert json.loads((student / "homework/chosen.json").read_text()) == [5, 9]
    ppo = (student / "train_ppo.py").read_text()
    assert "exercise 9" in ppo and "exercise 8" not in ppo
    assert "## 5." in (tmp_path / "made/handout.md").read_text()
    assert "Finale" not in (tmp_path / "made/handout.md").read_text()
    with pytest.raises(InputError, match="--only nonsense: expected some of .*rm.*ppo"):
        chosen("nonsense")
    with pytest.raises(InputError, match="something is in it"):
        make(tmp_path / "made", chosen("rm"), formulas=True)


def test_the_handout_has_every_part_and_the_page_needs_nothing():
    text, sheet = markdown(list(EXERCISES)), page(list(EXERCISES))
    for exercise in EXERCISES:
        assert f"## {exercise.number}. {exercise.title}" in text and exercise.command in text
        for equation in exercise.equations:
            assert f"$${equation}$$" in text
    assert sheet.count("<math") == sum(len(one.equations) for one in EXERCISES) + 1
    assert "\\frac" not in sheet and not re.search(r'(src|href)="(?!#)', sheet)


@EACH
def test_commands_of_the_handout_exist(exercise):
    """Their script and their flags."""
    words = exercise.command.split()
    assert words[0] == "python"
    script = words[2].replace(".", "/") if words[1] == "-m" else words[1].removesuffix(".py")
    path = next(path for path in (source.PROJECT / f"{script}.py",
                                  source.PROJECT / script / "__main__.py") if path.exists())
    text = path.read_text() + (source.PROJECT / "common/run.py").read_text()
    for flag in re.findall(r"--(\w+)", exercise.command):
        assert re.search(rf"\b{flag}\b", text), flag


def test_another_user_can_read_the_stage_of_a_grader_that_it_can_not_read(made, tmp_path,
                                                                          monkeypatch):
    """As after setup.sh: the project is root's alone."""
    with zipfile.ZipFile(made / "autograder.zip") as archive:
        archive.extractall(tmp_path / "grader")
    for path in (tmp_path / "grader").rglob("*"):
        path.chmod(0o700)
    monkeypatch.setattr(source, "PROJECT", tmp_path / "grader")
    (tmp_path / "stage").mkdir(mode=0o700)
    source.stage(made / "solutions", by_number(2), tmp_path / "stage")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "stage").rglob("*")}
    assert modes == {0o755, 0o644} and (tmp_path / "stage").stat().st_mode & 0o777 == 0o755


def test_the_archive_grades(made, tmp_path):
    with zipfile.ZipFile(made / "autograder.zip") as archive:
        archive.extractall(tmp_path)
        assert archive.getinfo("run_autograder").external_attr >> 16 == 0o755
    (tmp_path / "submission").mkdir()
    shutil.copy(made / "solutions/rollout.py", tmp_path / "submission/rollout.py")
    found = subprocess.run(
        [sys.executable, "-m", "homework", "grade", "submission", "--only", "14",
         "--results", "results/results.json"], cwd=tmp_path, text=True, capture_output=True)
    assert found.returncode == 0, found.stderr
    assert json.loads((tmp_path / "results/results.json").read_text())["score"] == 5


MUTANTS = [
    (compare, "equal", "relative alone is forgotten near 0", Edit("0.0 if tiny else 1e-8", "1e-8"),
     lambda: check_tiny()),
    (grading, "grade", "properties count without numbers", Edit(
        "messages[\"properties\"] = say(more, []) if ready else below",
        "messages[\"properties\"] = \"\""),
     lambda: check_zeros()),
]


def check_tiny():
    assert not compare.equal([4.9e-15], [5e-15], tiny=True) and compare.equal([4.9e-15], [5e-15])


def check_zeros():
    assert points(grading.grade(by_number(9), nonsense(by_number(9), "zeros"))) == 0


test_mutants_are_caught = catching(MUTANTS)


def test_plain():
    assert plain([torch.tensor([True]), (1, None)]) == [[1.0], [1.0, None]]
