"""The lecture pages name files, functions, flags and figures that exist.

A page is `##` sections of bullets, `- **Label**: …`. Figures in **Paper** are the papers' own; all
in **Tinytown** stand in the report sections that the bullet links; elsewhere decimals and
percentages stand in some report. No figure is left to be filled in.
"""
import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "lectures"
PAGES = sorted(FOLDER.glob("*.md"))
REPORTS = [ROOT / "docs" / f"{name}.md" for name in ("results", "methods", "selection")]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
RANGE = r"(?: \(-?\d[\d.,]*(?:–| to )-?[\d.,]*\d\))?"          # 0.861 (0.825–0.893) is one figure
FIGURE = re.compile(rf"(?<![\w.,-])-?\d+(?:[.,]\d+)*{RANGE}(?: %)?")
TODO = re.compile(r"TODO[\w-]*(?:\[[^\]]*\])?")


@functools.cache
def names(path: Path) -> frozenset[str]:
    """Functions, classes, constants, Class.method and Class.field of a file."""
    found = set()

    def visit(body: list[ast.stmt], start: str) -> None:
        for node in body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            found.update(start + one.id for one in targets if isinstance(one, ast.Name))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(start + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, start + node.name + ".")

    visit(ast.parse(path.read_text()).body, "")
    return frozenset(found)


@functools.cache
def flags(path: Path) -> set[str]:
    """Flags of a script: the fields of its Config and what that inherits, or argparse's."""
    source, cli = path.read_text(), names(ROOT / "common" / "cli.py")
    base = re.search(r"^class Config\((\w+)\)", source, re.M)
    bases = {"DeviceFlags", base[1]} if base else set()
    found = {name.partition(".")[2] for name in cli if name.partition(".")[0] in bases}
    found |= {name.removeprefix("Config.") for name in names(path) if name.startswith("Config.")}
    found |= set(re.findall(r'add_argument\(\s*"--(\w+)"', source))
    return found | ({"preset"} if "PRESETS" in names(path) else set())


@functools.cache
def sections(path: Path) -> dict[str, str]:
    """Anchor → text below a heading, up to the next of its level; "": all of the file."""
    text = path.read_text().replace("−", "-").replace("**", "")
    bare = re.sub(r"^```.*?^```", lambda code: code[0].replace("\n#", "\n "), text,
                  flags=re.M | re.S)
    found = {"": re.sub(r"\s+", " ", text)}
    for head in re.finditer(r"^(#+) (.*)$", bare, re.M):
        end = re.search(rf"^#{{1,{len(head[1])}}} ", bare[head.end():], re.M)
        anchor = re.sub(r"[^\w\- ]", "", head[2].lower()).replace(" ", "-")
        below = text[head.end():][:end.start() if end else None]
        found[anchor] = re.sub(r"\s+", " ", below)
    return found


def script_of(command: str) -> Path | None:
    """The file that a command runs; None if there is no such file, or no such target of make."""
    words = command.split()
    if words[0] == "make":
        return ROOT / "Makefile" if f"\n{words[1]}: " in (ROOT / "Makefile").read_text() else None
    module = words[2].replace(".", "/") if words[1] == "-m" else words[1].removesuffix(".py")
    paths = [ROOT / f"{module}{end}" for end in (".py", "/__main__.py", "")]
    return next((path for path in paths if path.is_file()), None)


def code_faults(text: str, folder: Path = FOLDER) -> list[str]:
    """Links, names, commands and flags that lead nowhere. A lone `--flag` or `name` must be one of
    a script that the text links or runs; a name may be a report's, too."""
    found, sources = [], []
    for says, target in LINK.findall(text):
        path, anchor = folder / target.partition("#")[0], target.partition("#")[2]
        if not path.exists() or anchor and anchor not in sections(path):
            found.append(f"dead link {target}")
        elif path.suffix == ".py":
            sources.append(path)
            found += [f"{target} has no {name}" for name in re.findall(r"`([^`]+)`", says)
                      if name not in names(path)]
    spans = re.findall(r"`([^`]+)`", LINK.sub("", re.sub(r"\*\*Equation\*\*.*", "", text)))
    for command in (span for span in spans if span.split()[0] in ("python", "make", "bash")):
        path = script_of(command)
        sources += [path] if path else []
        found += [] if path else [f"nothing to run: {command}"]
        found += [f"{path.name} has no flag --{flag}" for flag in re.findall(r" --(\w+)", command)
                  if path and flag not in flags(path)]
    known = set().union(*(flags(path) for path in sources if path.suffix == ".py"))
    words = "\n".join(path.read_text() for path in [*sources, *REPORTS])
    return found + [f"nothing here knows {span}" for span in spans
                    if span.startswith("--") and span.split()[0][2:] not in known
                    or re.fullmatch(r"[\w.]+", span) and not re.search(rf"\b{span}\b", words)]


def figure_faults(label: str, bullet: str, folder: Path = FOLDER) -> list[str]:
    """Figures of a bullet that stand in no report."""
    figures = FIGURE.findall(TODO.sub("", re.sub(r"`[^`]*`", "", LINK.sub("", bullet))))
    reports = [sections(path)[""] for path in REPORTS]
    if label == "Tinytown":
        targets = [target.partition("#") for _, target in LINK.findall(bullet)]
        reports = [sections(folder / path).get(anchor, "") for path, _, anchor in targets
                   if (folder / path).resolve() in REPORTS]
        if not reports:
            return [f"names no report: {bullet[:60]}"]
        figures = [figure.removesuffix(" %") for figure in figures]
    else:
        figures = [one for one in figures if label != "Paper" and re.search(r"[.%]", one)]
    return [f"in no report: {one}" for one in figures if not any(re.search(
        rf"(?<![\w.-]){re.escape(one)}(?![\d%]|[.,]\d)", report) for report in reports)]


def faults(page: str) -> list[str]:
    """What is wrong with a page, each with the heading of its section."""
    found = []
    for number, section in enumerate(page.replace("−", "-").split("\n## ")):
        title, *bullets = (re.sub(r"\s+", " ", part) for part in section.split("\n- "))
        labels = [(re.match(r"\*\*([\w ]+)\*\*: ", bullet) or [""] * 2)[1] for bullet in bullets]
        here = code_faults("\n".join([title, *bullets]))
        here += [f"a bullet without a label: {bullet[:60]}"
                 for label, bullet in zip(labels, bullets) if not label]
        for label, bullet in zip(labels, bullets) if number else ():
            here += figure_faults(label, bullet)
        if number and not {"Tinytown", "Not shown"} & set(labels):
            here.append("neither what Tinytown shows nor that nothing does")
        here += TODO.findall(" ".join(bullets))
        found += [f"{title.strip()}: {fault}" for fault in here]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_exists(page):
    assert faults(page.read_text()) == []


def test_every_page_is_in_the_index():
    index = (FOLDER / "README.md").read_text()
    rows = re.findall(r"^\| \[(\w+\.md)\]\(\1\) \|.*\| (\d+) \|$", index, re.M)
    assert {name: int(count) for name, count in rows} == {
        page.name: page.read_text().count("\n## ") for page in PAGES if page.stem != "README"}


GOOD = """# A page

## 1. Bradley–Terry

- **Idea**: rewards order answers.
- **Function**: [`pairwise_loss`, `Config.lr`](../../train_rm.py)
- **Command**: `python train_rm.py --preset tinytown
  --data out/rank.jsonl`
- **Tinytown**: 0.861 (0.825–0.893) of gold ([four seeds](../results.md#four-seeds)).
- **Paper**: 99.9 %.
"""


@pytest.mark.parametrize("old, new, fault", [
    ("", "", None),
    ("pairwise_loss", "pair_loss", "has no pair_loss"),
    ("Config.lr", "Config.rate", "has no Config.rate"),
    ("train_rm.py)", "train_reward.py)", "dead link"),
    ("#four-seeds", "#five-seeds", "dead link"),
    ("--data", "--dataset", "no flag --dataset"),
    ("answers.", "answers, `--margin`.", "nothing here knows --margin"),
    ("answers.", "answers of `no_such_model`.", "nothing here knows no_such_model"),
    ("python train_rm.py", "python train_reward.py", "nothing to run"),
    ("python train_rm.py", "python -m systems.reward", "nothing to run"),
    ("0.861 (0.825–0.893)", "0.862", "in no report: 0.862"),
    ("(0.825–0.893)", "(0.825–0.896)", "in no report: 0.861 (0.825–0.896)"),
    ("#four-seeds", "#speed", "in no report: 0.861 (0.825–0.893)"),
    ("answers.", "answers, 99.9 %.", "in no report: 99.9 %"),
    ("([four seeds](../results.md#four-seeds))", "", "names no report"),
    ("0.861 (0.825–0.893)", "TODO-FIGURE[ppo: gold]", "TODO-FIGURE[ppo: gold]"),
    ("**Idea**: ", "", "a bullet without a label"),
    ("**Tinytown**", "**Here**", "neither what Tinytown shows")])
def test_a_fault_is_found(old, new, fault):
    assert old in GOOD
    found = faults(GOOD.replace(old, new, 1) if old else GOOD)
    assert any(fault in one for one in found) if fault else found == []


@pytest.mark.parametrize("name", ["ranking_loss", "gae", "dpo_loss", "Tokenizer.render"])
def test_pages_notice_a_function_that_is_renamed(name, monkeypatch):
    """As if its file called it otherwise."""
    really = names
    monkeypatch.setattr("test_pages.names", lambda path: really(path) - {name})
    found = [fault for page in PAGES for fault in code_faults(page.read_text())]
    assert any(f"has no {name}" in fault for fault in found)
