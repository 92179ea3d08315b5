"""Functions in the text of a file: taken out, put in, left blank."""
import ast
import shutil
import textwrap
from pathlib import Path

from common.errors import InputError
from homework.exercises import EXERCISES, Exercise

PROJECT = Path(__file__).parent.parent
FOLDERS = ("common", "data", "hub", "systems", "runs")
SKIPPED = shutil.ignore_patterns("__pycache__", ".*", "out")


def place(source: str, name: str, path: str) -> tuple[ast.FunctionDef, int, int]:
    """(node, first line, line after the last) of a function or Class.method, decorators included.
    InputError if the file does not parse or has no such function."""
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}; nothing of this file can be "
                         f"graded until it parses") from None
    except (ValueError, RecursionError, MemoryError) as error:     # a null byte, deep nesting
        raise InputError(f"{path}: {error}") from None
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part]
        if not found:
            raise InputError(f"{path}: no function {name}; keep its name")
        node, body = found[-1], getattr(found[-1], "body", [])
    first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
    return node, first - 1, node.end_lineno


def function_of(source: str, name: str, path: str) -> str:
    """The text of a function."""
    _, first, end = place(source, name, path)
    return "\n".join(source.split("\n")[first:end])


def with_function(source: str, name: str, text: str, path: str) -> str:
    """The file's text with another text for a function."""
    _, first, end = place(source, name, path)
    lines = source.split("\n")
    return "\n".join([*lines[:first], *text.split("\n"), *lines[end:]])


def blank(source: str, name: str, exercise: Exercise, formulas: bool, path: str,
          body: str = "") -> str:
    """The file's text with a function's body replaced, by `raise NotImplementedError` if by nothing
    else. Signature and docstring stay; of the docstring, without `formulas`, not the pieces that
    hold the answer."""
    node, first, _ = place(source, name, path)
    lines = function_of(source, name, path).split("\n")
    indent = " " * (node.col_offset + 4)
    has_text = ast.get_docstring(node) is not None
    until = (node.body[0].end_lineno if has_text else node.body[0].lineno - 1) - first
    head = "\n".join(lines[:until])
    if not formulas:
        for function, piece, instead in exercise.formula:
            if function == name:
                if head.count(piece) != 1:
                    raise InputError(f"exercise {exercise.number}: the docstring of {name} no "
                                     f"longer holds {piece!r}")
                head = head.replace(piece, instead)
    body = body or f'raise NotImplementedError("exercise {exercise.number}: {name}")'
    return with_function(source, name, f"{head}\n{indent}{body}", path)


def hidden(source: str, exercise: Exercise, file: str) -> str:
    """The file's text without what else would do an exercise's work."""
    for path, name, body in exercise.hide:
        if path == file:
            source = blank(source, name, exercise, True, file, body)
    return source


def copy_project(out: Path) -> None:
    """Scripts and their libraries, nothing that tests them."""
    for folder in FOLDERS:
        shutil.copytree(PROJECT / folder, out / folder, ignore=SKIPPED, dirs_exist_ok=True)
    for pattern in ("*.py", "requirements*.txt", "pyproject.toml", "Makefile"):
        for path in PROJECT.glob(pattern):
            shutil.copy(path, out / path.name)


def handed_in(folder: Path, file: str) -> Path:
    """A student's file, where it belongs or by its name alone. InputError if it is missing."""
    for path in (folder / file, folder / Path(file).name):
        if path.is_file():
            if not path.resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{file}: a link to another place; hand in the file itself")
            return path
    raise InputError(f"{file}: not handed in")


def stage(folder: Path, exercise: Exercise, out: Path) -> None:
    """The project in `out` with a student's files of an exercise, in which all other exercises'
    functions are the right ones: one mistake costs one exercise. InputError in one line."""
    copy_project(out)
    for file in dict.fromkeys(file for file, _ in exercise.functions):
        path = handed_in(folder, file)
        if path.stat().st_size > 2 ** 20:
            raise InputError(f"{file}: larger than 1 MiB")
        source, right = path.read_text(errors="replace"), (PROJECT / file).read_text()
        for own, name in exercise.functions:
            if own == file:
                place(source, name, file)
        for other in EXERCISES:
            for own, name in other.functions:
                if own == file and other.number != exercise.number:
                    try:
                        source = with_function(source, name, function_of(right, name, file), file)
                    except InputError:
                        source += "\n\n" + textwrap.dedent(function_of(right, name, file)) + "\n"
        (out / file).write_text(hidden(source, exercise, file))
    for path in (out, *out.rglob("*")):      # for a user who may not read the grader's own files
        path.chmod(0o755 if path.is_dir() else 0o644)
