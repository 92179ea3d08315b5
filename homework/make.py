"""Writes what an instructor hands out, and what grades it: student/, solutions/, handout.md,
handout.html, autograder.zip (Gradescope's layout)."""
import json
import shutil
import zipfile
from pathlib import Path

from common.errors import InputError
from homework.exercises import EXERCISES, Exercise
from homework.handout import markdown, page
from homework.source import FOLDERS, PROJECT, blank, copy_project, hidden

# Of this package, what a student needs: not what holds right answers.
STUDENTS = ("__init__.py", "__main__.py", "exercises.py", "cases.py", "compare.py", "behaviour.py",
            "process.py", "worker.py", "check.py")
SETUP = """#!/usr/bin/env bash
# Gradescope runs this once, to build the machine that grades.
set -e
apt-get update -qq && apt-get install -y -qq python3 python3-pip
pip3 install -q torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
pip3 install -q numpy tiktoken tqdm pytest
chmod -R go-rwx /autograder/source
"""
RUN = """#!/usr/bin/env bash
# Gradescope runs this for every submission. Student code runs as nobody, who can not read this.
cd /autograder/source
python3 -m homework grade /autograder/submission --results /autograder/results/results.json \\
    --user nobody
"""


def chosen(only: str) -> list[Exercise]:
    """The exercises of "rm,ppo" (of these scripts) or "5,8" (numbers), all of "". InputError names
    what is not there."""
    if not only:
        return list(EXERCISES)
    scripts = {Path(file).stem.removeprefix("train_"): [] for one in EXERCISES
               for file, _ in one.functions}
    for one in EXERCISES:
        for file in {file for file, _ in one.functions}:
            scripts[Path(file).stem.removeprefix("train_")].append(one)
    known = scripts | {str(one.number): [one] for one in EXERCISES}
    found = []
    for name in only.split(","):
        if name not in known:
            raise InputError(f"--only {name}: expected some of {', '.join(known)}")
        found += known[name]
    return [one for one in EXERCISES if one in found]


def make(out: Path, exercises: list[Exercise], formulas: bool) -> None:
    """Write everything into a folder that is empty or not there yet. InputError otherwise."""
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out}: something is in it; name another folder")
    student = out / "student"
    student.mkdir(parents=True)
    copy_project(student)
    (student / "homework").mkdir()
    for name in STUDENTS:
        shutil.copy(PROJECT / "homework" / name, student / "homework" / name)
    (student / "homework" / "chosen.json").write_text(
        json.dumps([one.number for one in exercises]) + "\n")
    for exercise in exercises:
        for file, name in exercise.functions:
            path, right = student / file, out / "solutions" / file
            right.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / file, right)
            path.write_text(blank(path.read_text(), name, exercise, formulas, file))
        for file in dict.fromkeys(file for file, *_ in exercise.hide):
            path = student / file
            path.write_text(hidden(path.read_text(), exercise, file))
    text, sheet = markdown(exercises, formulas), page(exercises, formulas)
    for folder in (out, student):
        (folder / "handout.md").write_text(text)
        (folder / "handout.html").write_text(sheet)
    pack(out / "autograder.zip", exercises)


def pack(path: Path, exercises: list[Exercise]) -> None:
    """The grader as Gradescope takes it: setup.sh and run_autograder beside the project."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (("setup.sh", SETUP), ("run_autograder", RUN)):
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o755 << 16
            archive.writestr(entry, text)
        archive.writestr("homework/chosen.json", json.dumps([one.number for one in exercises]))
        for folder in (*FOLDERS, "homework", "tests"):
            for file in sorted((PROJECT / folder).rglob("*")):
                parts = file.relative_to(PROJECT).parts
                if file.is_file() and "__pycache__" not in parts and file.name != "chosen.json":
                    archive.write(file, "/".join(parts))
        for pattern in ("*.py", "requirements*.txt", "pyproject.toml", "Makefile", "README.md"):
            for file in sorted(PROJECT.glob(pattern)):
                archive.write(file, file.name)
