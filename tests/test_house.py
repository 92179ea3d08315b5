"""The house: imports only go down, nothing on top but lessons, one door, lines that fit."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up. A room (a folder with a slash) stands for all of its modules that are not
# named elsewhere. Within a layer modules may import each other, as long as there is no cycle.
LAYERS = [
    ["common.errors", "common.files", "kernels"],
    ["data/", *(f"data.tinytown.{name}" for name in (
        "town", "teachers", "prose", "talk", "plain", "gold", "annotators")), "model",
     "common.cli", "common.machine", "common.parallel", "common.optimizer", "common.log"],
    ["lora", "hub/", "common.checkpoint", "common.resume", "common.estimate"],
    ["common.run", "rollout"],
    ["train_base"], ["train_sft"], ["train_rm"], ["train_ppo"], ["train_dpo"],
    ["data.show", "data.prepare", "data.tinytown.", "hub.export", "systems/", "evaluate",
     "sample"],
    ["bench/"]]
TOP = {"train_base", "train_sft", "train_rm", "train_ppo", "train_dpo", "model", "kernels", "lora",
       "rollout", "sample", "evaluate"}
LESSONS = ("train_base", "train_sft", "train_rm", "train_ppo", "train_dpo")
# The contract names `GPT.from_pretrained` and `save_pretrained`: model.py asks hub/ for them.
LAZY = {("model", "hub.weights")}


def modules() -> dict[str, Path]:
    """Every module of the project but the tests, by its dotted name."""
    rooms = ("common", "data", "hub", "systems", "bench")
    files = [*ROOT.glob("*.py"), *(path for room in rooms for path in (ROOT / room).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files
            if path.name != "__init__.py"}


def layer(module: str) -> int:
    """The layer of a module: of its own name, else of the longest room that holds it."""
    for number, names in enumerate(LAYERS):
        if module in names:
            return number
    rooms = [(len(name), number) for number, names in enumerate(LAYERS) for name in names
             if module.replace(".", "/").startswith(name) or (name[-1] == "."
                                                              and module.startswith(name))]
    assert rooms, f"{module}: in no layer; give it a place in LAYERS"
    return max(rooms)[1]


def imports(source: str, known: set[str]) -> set[str]:
    """The project's modules that a source imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & known


def faults(sources: dict[str, str]) -> list[str]:
    """Upward imports and cycles."""
    edges = {name: {other for other in imports(source, set(sources)) if (name, other) not in LAZY}
             for name, source in sources.items()}
    up = [f"{name} imports {other}, which is above it" for name, others in edges.items()
          for other in others if layer(other) > layer(name)]
    cycles, done = [], set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            cycles.append(" → ".join(path[path.index(name):] + (name,)))
        elif name not in done:
            for other in edges[name]:
                visit(other, path + (name,))
            done.add(name)

    for name in edges:
        visit(name, ())
    return up + cycles


SOURCES = {name: path.read_text() for name, path in modules().items()}


def test_imports_only_go_down():
    assert faults(SOURCES) == []


@pytest.mark.parametrize("name, line, words", [
    ("model", "from common.checkpoint import load_gpt", "model imports common.checkpoint"),
    ("data.text", "import common.run", "data.text imports common.run"),
    ("train_sft", "from train_ppo import gae", "train_sft imports train_ppo"),
    ("common.log", "def f():\n    from rollout import respond", "common.log imports rollout"),
    ("common.files", "from common import errors\nfrom common import parallel", "common.parallel"),
    ("common.errors", "from common import files", ""),
    ("common.machine", "from common import cli\nimport common.log", "→")])
def test_an_upward_import_is_found(name, line, words):
    """`words` "": an import within the layer is none of these, as long as it makes no cycle."""
    found = faults(SOURCES | {name: SOURCES[name] + "\n" + line})
    assert any(words in fault for fault in found) if words else found == []


def test_only_lessons_and_their_tools_are_on_top():
    assert {path.stem for path in ROOT.glob("*.py")} == TOP


@pytest.mark.parametrize("name", [*LESSONS, "systems.best_of_n"])
def test_scripts_come_in_by_the_door(name):
    """Of common/ they import the door alone."""
    found = {other for other in imports(SOURCES[name], set(SOURCES)) if other.startswith("common.")}
    assert found == {"common.run"}


@pytest.mark.parametrize("name", LESSONS)
def test_a_loop_fits_beside_a_slide(name):
    """Code lines of train(), names imported from the project, columns of equations and loops."""
    source, tree = SOURCES[name], ast.parse(SOURCES[name])
    lines, ppo = source.splitlines(), name == "train_ppo"
    train = next(node for node in tree.body if getattr(node, "name", "") == "train")
    body = [lines[i] for i in range(train.lineno - 1, train.end_lineno)
            if i + 1 > train.body[0].end_lineno or i + 1 < train.body[0].lineno]
    code = [line for line in body if line.strip() and not line.strip().startswith("#")]
    assert len(code) <= (55 if ppo else 40)
    imported = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom)
                and node.module.split(".")[0] in TOP | {"common", "data", "hub", "systems"}
                for alias in node.names]
    assert len(imported) <= (20 if ppo else 14)
    assert max(map(len, body)) <= 92


def test_the_door_is_small_and_speaks_of_no_lesson():
    source = SOURCES["common.run"]
    assert len(source.splitlines()) <= 200
    words = set(re.findall(r"[a-z]+", source.lower()))
    assert not words & {"loss", "reward", "policy", "mask", "kl", "callback", "hook", "registry",
                        "register", "trainer", "dpo", "ppo", "sft"}


def test_lines_fit_the_screen():
    files = [*modules().values(), *(ROOT / "tests").glob("*.py")]
    wide = [f"{path.relative_to(ROOT)}:{i}" for path in files
            for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert wide == []
