"""Homework: hand it out, check it, grade it.

    python -m homework make --out DIR [--only rm,ppo] [--formulas false]   # for instructors
    python -m homework grade DIR [--only 8] [--results results.json]      # of a student's folder
    python -m homework check [N …]                                        # for students
    python -m homework finale [--beta 0.3] [--lr 0.1]
"""
import argparse
import json
import pwd
import sys
import time
from pathlib import Path

import torch

from common.errors import InputError
from homework.exercises import EXERCISES, Exercise, by_number


def numbers() -> list[Exercise]:
    """The exercises that were handed out: those of chosen.json, all without one."""
    path = Path(__file__).with_name("chosen.json")
    return list(map(by_number, json.loads(path.read_text()))) if path.exists() else list(EXERCISES)


def user_id(name: str) -> int | None:
    """The id of a user to run student code as; None for ""."""
    if not name:
        return None
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise InputError(f"--user {name}: no such user") from None


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit status."""
    if arguments.what == "make":
        from homework.make import chosen, make
        make(arguments.out, chosen(arguments.only), arguments.formulas == "true")
        print(f"written: {arguments.out}/student, solutions, handout.md, handout.html, "
              f"autograder.zip")
    elif arguments.what == "grade":
        from homework.make import chosen
        from homework.submission import grade_folder, write_results
        if not arguments.folder.is_dir():
            raise InputError(f"{arguments.folder}: no such folder; name a student's")
        began = time.monotonic()
        exercises = chosen(arguments.only) if arguments.only else numbers()
        found = grade_folder(arguments.folder, exercises, user_id(arguments.user))
        if arguments.results:
            write_results(arguments.results, found, time.monotonic() - began)
    elif arguments.what == "check":
        from homework.check import check
        known = {one.number: one for one in numbers()}
        for number in arguments.numbers:
            if number not in known:
                raise InputError(f"check {number}: expected some of {', '.join(map(str, known))}")
        some = [known[number] for number in arguments.numbers] or known.values()
        return 0 if all([check(one) for one in some]) else 1
    else:
        from homework.check import finale
        if not (arguments.beta > 0 and arguments.lr > 0):
            raise InputError("--beta and --lr must be above 0")
        finale(arguments.beta, arguments.lr)
    return 0


def for_instructors(commands) -> None:
    """Add `make` and `grade`."""
    make = commands.add_parser("make", help="write what is handed out")
    make.add_argument("--out", type=Path, required=True, help="a new folder")
    grade = commands.add_parser("grade", help="grade a student's folder")
    for one in (make, grade):
        one.add_argument("--only", default="", help="scripts (rm,ppo) or numbers (5,8)")
    make.add_argument("--formulas", choices=("true", "false"), default="true",
                      help="whether docstrings and handout keep the formulas")
    grade.add_argument("folder", type=Path)
    grade.add_argument("--results", type=Path, help="also write Gradescope's results.json")
    grade.add_argument("--user", default="", help="run student code as this user (root only)")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m homework", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    if Path(__file__).with_name("grade.py").exists():         # not in a student's folder
        for_instructors(commands)
    check = commands.add_parser("check", help="hold your functions against numbers by hand")
    check.add_argument("numbers", type=int, nargs="*", metavar="N", help="exercises; none: all")
    finale = commands.add_parser("finale", help="PPO and DPO against the optimum")
    finale.add_argument("--beta", type=float, default=0.3)
    finale.add_argument("--lr", type=float, default=0.1)
    torch.set_num_threads(1)
    try:
        return run(parser.parse_args())
    except (InputError, NotImplementedError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
