"""A student's folder, graded exercise by exercise, each in a process of its own."""
import json
import tempfile
from pathlib import Path

from common.errors import InputError
from homework.exercises import Exercise
from homework.grade import RUNGS, Rung, grade
from homework.mistakes import mistakes_of
from homework.process import Failed, Process
from homework.source import stage


def grade_one(folder: Path, exercise: Exercise, user: int | None = None) -> list[Rung]:
    """The rungs of one exercise. Whatever is wrong with the folder, the answer is rungs."""
    with tempfile.TemporaryDirectory(prefix="homework-") as place:
        try:
            stage(folder, exercise, Path(place))
            with Process(Path(place), user=user) as student:
                return grade(exercise, student, mistakes_of(exercise))
        except (Failed, InputError) as error:
            return [Rung(name, 0.0, share * exercise.points, str(error))
                    for name, share in RUNGS.items()]


def grade_folder(folder: Path, exercises: list[Exercise],
                 user: int | None = None) -> dict[Exercise, list[Rung]]:
    """All exercises; prints a line for each, and under it what cost points."""
    found, width = {}, max(len(one.title) for one in exercises)
    for one in exercises:
        rungs = found[one] = grade_one(folder, one, user)
        got = sum(rung.points for rung in rungs)
        print(f"{one.number:2}  {one.title:{width}}  {got:5.1f} of {one.points}", flush=True)
        for message in dict.fromkeys(rung.message for rung in rungs if rung.message
                                     and not rung.message.startswith("not looked at")):
            print(f"    {message}")
    total, most = (sum(map(count, found.items())) for count in (
        lambda item: sum(rung.points for rung in item[1]), lambda item: item[0].points))
    print(f"total {total:.1f} of {most}, {total / most:.0%}")
    return found


def write_results(path: Path, found: dict[Exercise, list[Rung]], seconds: float) -> None:
    """Gradescope's results.json: a test for each rung that has points."""
    tests = [{"name": f"{one.title}: {rung.name}", "number": f"{one.number}.{i}",
              "score": round(rung.points, 2), "max_score": round(rung.most, 2),
              "output": rung.message or "right", "visibility": "visible"}
             for one, rungs in found.items() for i, rung in enumerate(rungs) if rung.most]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"score": round(sum(test["score"] for test in tests), 2),
                                "execution_time": round(seconds), "tests": tests}, indent=1) + "\n")
