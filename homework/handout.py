"""The handout: what the slide says, what to write, how to check it, what to ask oneself before."""
import html
import re

from common.errors import InputError
from homework.exercises import EXERCISES, FINALE, Exercise
from homework.grade import RUNGS

INTRO = (
    "Each exercise is one or a few functions of the project, taken out: their signature, shapes "
    "and units stand where they stood. Put them back. A command that runs into a blank says which "
    "exercise it is; a function of yours that calls `masked_mean` wants exercise 2 done first.",
    "Set up with `python -m venv .venv && . .venv/bin/activate && pip install -r "
    "requirements.txt`. Answer the two questions of an exercise *before* you run anything, in a "
    "sentence each. Then write, and check yourself with `python -m homework check N`: numbers "
    "worked by hand.",
    "The grader climbs four rungs: shapes and gradients; the numbers by hand ({0}); properties "
    "({1}), such as that padding is never read, ties are no pair and nothing overflows; behaviour "
    "({2}): a small model learns with your function and must arrive. A rung counts only if those "
    "before it do. All other exercises' functions are the right ones there: a mistake costs once.",
    "The commands under *then run* read a finished Tinytown run, `out/tinytown`, which your "
    "instructor gives you (`make run` in the project without blanks makes it in less than ten "
    "minutes, on two cores and 1 GiB of memory), and need the exercises of the script they run.")


def intro() -> list[str]:
    shares = [f"{RUNGS[name]:.0%}" for name in ("numbers by hand", "properties", "behaviour")]
    return [text.format(*shares) for text in INTRO]


def sums(exercises: list[Exercise]) -> str:
    points, minutes = (sum(getattr(one, name) for one in exercises)
                       for name in ("points", "minutes"))
    return f"{len(exercises)} exercises, {points} points, about {minutes} minutes."


def facts(one: Exercise) -> str:
    """Points, minutes, and where to write."""
    where = ", ".join(f"`{name}` in `{file}`" for file, name in one.functions)
    return f"{one.points} points, about {one.minutes} minutes: {where}"


def markdown(exercises: list[Exercise], formulas: bool = True) -> str:
    """The handout as Markdown, equations as LaTeX, or, without `formulas`, without the answers."""
    parts = ["# RLHF, line by line: homework", sums(exercises), *intro()]
    for one in exercises:
        parts += [f"## {one.number}. {one.title}", f"*{one.slide}.* {facts(one)}.", one.idea,
                  *(f"$${equation}$$" for equation in one.equations if formulas),
                  "**Before you run anything**\n\n"
                  + "\n".join(f"{i}. {text}" for i, text in enumerate(one.questions, 1)),
                  f"**Write** {one.write}", f"**Check** `{check_of(one)}`"]
        if one.command != check_of(one):
            parts.append(f"**Then run** `{one.command}`")
    if len(exercises) == len(EXERCISES):
        title, idea, equations, write, command = FINALE
        parts += [f"## Finale. {title}", "*No blanks; graded by hand.*", idea,
                  *(f"$${equation}$$" for equation in equations), write, f"**Run** `{command}`"]
    return "\n\n".join(parts) + "\n"


def check_of(one: Exercise) -> str:
    return f"python -m homework check {one.number}"


STYLE = """
:root { color-scheme: light dark; }
body { font: 17px/1.55 Georgia, serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { font-family: system-ui, sans-serif; line-height: 1.2; }
h2 { margin-top: 2.6rem; border-top: 1px solid #8886; padding-top: 1.2rem; }
code { font: 0.86em ui-monospace, monospace; background: #8882; padding: 0.1em 0.3em;
       border-radius: 4px; }
pre { background: #8882; padding: 0.7em 1em; border-radius: 6px; overflow-x: auto; }
pre code { background: none; padding: 0; }
.facts { color: #777; font-family: system-ui, sans-serif; font-size: 0.85em; }
.equation { margin: 1em 0; padding: 0.2em 0; overflow: auto hidden; }
@media print { h2 { break-inside: avoid; } body { margin: 0; } }
"""


def inline(text: str) -> str:
    """Markdown's `code` and *stress* as HTML; all else is text."""
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*([^*\s][^*]*[^*\s])\*(?!\()", r"<em>\1</em>", text)


def mathml(equation: str) -> str:
    """LaTeX as MathML, which browsers typeset themselves."""
    try:
        from latex2mathml.converter import convert
    except ImportError:
        raise InputError("the handout's equations need latex2mathml: pip install latex2mathml") \
            from None
    return f'<div class="equation">{convert(equation, display="block")}</div>'


def page(exercises: list[Exercise], formulas: bool = True) -> str:
    """The handout as one HTML file that needs nothing else."""
    parts = [f"<p>{inline(text)}</p>" for text in (sums(exercises), *intro())]

    def run(says: str, command: str) -> str:
        return f"<p><strong>{says}</strong></p><pre><code>{html.escape(command)}</code></pre>"
    for one in exercises:
        parts += [f'<h2 id="e{one.number}">{one.number}. {html.escape(one.title)}</h2>',
                  f'<p class="facts">{inline(one.slide)}. {inline(facts(one))}.</p>',
                  f"<p>{inline(one.idea)}</p>", *map(mathml, one.equations if formulas else ()),
                  "<p><strong>Before you run anything</strong></p><ol>"
                  + "".join(f"<li>{inline(text)}</li>" for text in one.questions) + "</ol>",
                  f"<p><strong>Write</strong> {inline(one.write)}</p>",
                  run("Check", check_of(one))]
        if one.command != check_of(one):
            parts.append(run("Then run", one.command))
    if len(exercises) == len(EXERCISES):
        title, idea, equations, write, command = FINALE
        parts += [f"<h2>Finale. {html.escape(title)}</h2>",
                  '<p class="facts">No blanks; graded by hand.</p>', f"<p>{inline(idea)}</p>",
                  *map(mathml, equations), f"<p>{inline(write)}</p>", run("Run", command)]
    title = "RLHF, line by line: homework"
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title><style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n"
            + "\n".join(parts) + "\n</body></html>\n")
