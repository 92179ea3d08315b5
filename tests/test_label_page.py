"""The pages in a real browser, headless: the crowdworker's, and the one of rollouts."""
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from browser import MISSING, open_browser
from test_mutants import Edit, check_caught

import sample
import train_rm
from common.errors import InputError
from data.batches import Prompt
from data.readers import read_rankings
from data.tokenizer import get_tokenizer
from rollout import Response, sequence_logprobs
from systems import agreement, page, rollouts
from systems.desk import Desk, Labels

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "systems/label.html").read_text("utf-8")
HOSTILE = ("<script>document.title = 'taken'</script><img src=x onerror=\"document.title="
           "'taken'\"></script><!-- <b>bold</b> &lt;")
in_a_browser = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def browser():
    with open_browser() as one:
        yield one


def begin(browser, url: str, name: str) -> None:
    """Open the page as somebody who was not there before."""
    browser.faults()                                       # those of others
    browser.go(url)
    browser.run("localStorage.clear(); sessionStorage.clear(); location.reload()")
    browser.see("Who is labelling?")
    browser.press(name, "Enter")
    browser.see(name, "#who")


def rows_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ----------------------------------------------------------------------------- talking

# The command; with a file named "kill" beside the labels it dies where a label is on the disk and
# the page has no answer yet.
SERVER = """
import os, sys
from pathlib import Path
from systems import desk, label
kill, keep = Path(sys.argv[2]).with_name("kill"), desk.Desk.keep
def killed(self, session):
    if kill.exists():
        kill.unlink()
        os._exit(9)
    return keep(self, session)
desk.Desk.keep = killed
label.label(label.Config(init=sys.argv[1], out=sys.argv[2], port=int(sys.argv[3]), device="cpu",
                         max_new_tokens=12))
"""


def served(town: Path, out: Path, port: int = 0) -> tuple[subprocess.Popen, int]:
    """(the command's process, the port that it has printed)."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(town / "sft"), str(out), str(port)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"))
    for line in process.stdout:
        if found := re.search(r"open http://127\.0\.0\.1:(\d+)/ ", line):
            return process, int(found[1])
    raise AssertionError("the server has not come up")


@in_a_browser
def test_a_conversation_and_a_server_that_is_killed(browser, town, tmp_path):
    """Three turns, a reload, an undo, a server that dies between a click and its answer; then a
    reward model is trained on the file."""
    out = tmp_path / "labels.jsonl"
    process, port = served(town, out)
    try:
        begin(browser, f"http://127.0.0.1:{port}/", "Ada Lovelace")
        browser.press("Where does Ada live?", "Enter")
        browser.see("Choose the most helpful")
        browser.press("2")
        browser.see("A is better", "#words")
        browser.press("/", "plain & <b>true</b>", "Escape")
        first, second = browser.run(
            "return [...document.querySelectorAll('#pair .said')].map(x => x.innerText)")
        browser.run("location.reload()")                   # in the middle: nothing is lost
        browser.see("A is better", "#words")
        assert browser.run("return document.getElementById('comment').value") == (
            "plain & <b>true</b>")
        browser.press("Enter")
        browser.see("1 label", "#progress")
        browser.press("And", "Enter")
        browser.see("Choose the most")
        browser.click("#scale label:nth-of-type(5)")
        browser.see("neither is better", "#words")
        browser.click("#save")
        browser.see("2 labels", "#progress")
        browser.run("sessionStorage.clear()")              # as in another window
        browser.press("Escape", "u")                       # the tie again, as it was
        browser.see("neither is better", "#words")
        assert len(rows_in(out)) == 1
        browser.press("8", "Enter")
        browser.see("2 labels", "#progress")
        browser.press("So", "Enter")
        browser.see("Choose the most")
        (tmp_path / "kill").touch()
        browser.press("7", "Enter")
        browser.wait("return document.getElementById('note').innerText.includes('Nothing is "
                     "lost: this page keeps trying')")
        assert process.wait(60) == 9 and len(rows_in(out)) == 3
        process, _ = served(town, out, port)
        browser.see("3 labels", "#progress")
        assert browser.run("return document.getElementById('note').hidden")
        assert all("Failed to load resource" in fault for fault in browser.faults())
        process.terminate()
        assert "3 labels by 1 annotator" in process.stdout.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    rows = rows_in(out)
    assert [row["rating"] for row in rows] == [2, 8, 7]
    assert [row["annotator"] for row in rows] == ["Ada Lovelace"] * 3
    assert rows[0]["comment"] == "plain & <b>true</b>"
    assert [one["text"].split() for one in rows[0]["responses"]] == [
        text.replace("… cut off here", "").split() for text in (first, second)]
    assert [len(row["messages"]) for row in rows] == [1, 3, 5]
    assert rows[1]["messages"][1]["content"] == rows[0]["responses"][0]["text"]
    assert rows[2]["messages"][3]["content"] == rows[1]["responses"][1]["text"]
    assert [one.margin for one in read_rankings(out)] == [0.6667, 1.0, 0.6667]
    found = train_rm.train(train_rm.Config(data=(str(out),), init=str(town / "sft"), batch_size=2,
                                           out=str(tmp_path / "rm"), device="cpu"))
    assert found["loss"] > 0 and (tmp_path / "rm/model.pt").exists()


# ----------------------------------------------------------------------------- ranking

@pytest.fixture
def ranked(tmp_path):
    """(address, file) of a page of three rankings: K = 5 with a hostile answer, K = 2, K = 4."""
    texts = [("one", "two", "three", "four", HOSTILE), ("yes", HOSTILE), tuple("abcd")]
    items = [([{"role": "user", "content": f"Question {i}? {HOSTILE}"}],
              [{"text": text, "ended": True} for text in some]) for i, some in enumerate(texts)]
    out = tmp_path / "ranked.jsonl"
    web = page.server(PAGE, Desk(Labels(out), None, items, "rank").act, "127.0.0.1", 0)
    threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}/", out
    web.shutdown()
    web.server_close()


LEVELS = """return [...document.querySelectorAll('.level')].map(level =>
    [...level.querySelectorAll('.letter')].map(letter => letter.innerText[0]).join(''))"""


def card(browser, text: str) -> str:
    """The letter of the card that says so."""
    return browser.run("return [...document.querySelectorAll('.level .answer')].find(card => "
                       "card.querySelector('.said').innerText === arguments[0])"
                       ".querySelector('.letter').innerText[0]", text)


@in_a_browser
def test_rankings_by_keys_and_mouse(browser, ranked):
    """K = 5 with a tie: keys, then the mouse; a reload in the middle, undo, a second annotator."""
    url, out = ranked
    begin(browser, url, "Ada")
    browser.see("all are tied")
    assert browser.run(LEVELS) == ["ABCDE"]
    # three > one > two = four > the hostile one, by keys
    letters = {text: card(browser, text) for text in ("one", "two", "three", "four", HOSTILE)}
    browser.press(letters["one"].lower(), "Up", letters["three"].lower(), "Up", "Up", "Up")
    browser.press(letters[HOSTILE].lower(), "Down")
    middle = "".join(sorted(letters["two"] + letters["four"]))
    wanted = [letters["three"], letters["one"], middle, letters[HOSTILE]]
    assert browser.run(LEVELS) == wanted
    browser.run("location.reload()")
    browser.see("the most helpful and honest first")
    assert browser.run(LEVELS) == wanted
    browser.press("Enter")
    browser.see("1 of 3 label", "#progress")
    # two answers have the scale; a text that would be a script is a text
    browser.see("B is better", "#scale")
    assert sorted(browser.run("return [...document.querySelectorAll('#pair .said')].map(said => "
                              "said.textContent)")) == sorted(["yes", HOSTILE])
    browser.press("s")
    browser.see("1 skipped", "#progress")
    browser.press("u")
    browser.see("B is better", "#scale")
    browser.press("u")
    browser.wait("return document.querySelectorAll('.level').length === 4")
    assert browser.run(LEVELS) == wanted and not rows_in(out)
    # by the mouse: the last one onto the first (a tie), then the second below the last
    browser.drag(f"#card{'ABCDE'.index(letters[HOSTILE])} .handle", (".level", 0.5))
    first = "".join(sorted(letters["three"] + letters[HOSTILE]))
    assert browser.run(LEVELS) == [first, letters["one"], middle]
    browser.drag(f"#card{'ABCDE'.index(letters['one'])} .handle", (".gap:last-child", 1.0))
    assert browser.run(LEVELS) == [first, middle, letters["one"]]
    arrows = f"#card{'ABCDE'.index(letters['one'])} .arrows button"
    browser.click(arrows)                                  # up: a tie with the middle
    assert browser.run("return document.querySelectorAll('.level').length") == 2
    browser.click(f"{arrows}:last-child")
    browser.click("#save")
    browser.see("1 of 3 label", "#progress")
    assert {one["text"]: one["score"] for one in rows_in(out)[0]["responses"]} == {
        "three": 2, HOSTILE: 2, "two": 1, "four": 1, "one": 0}
    assert browser.run("return document.title") == "Which answer is better?"
    assert browser.run("return document.querySelectorAll('main img, main script').length") == 0
    assert browser.faults() == []
    begin(browser, url, "Ben")
    browser.see("all are tied")
    letters = {text: card(browser, text) for text in ("one", "two", "three", "four", HOSTILE)}
    browser.press(letters["three"].lower(), "Up", letters["one"].lower(), "Down")
    browser.wait("return document.querySelectorAll('.level').length === 3")
    browser.press("Enter")
    browser.see("1 of 3 label", "#progress")
    found = agreement.agreement((str(out),))["Ada", "Ben"]
    # Of ten pairs seven are said alike: all over the one that Ben, too, has last, "three" over
    # "two" and "four", and these two as a tie.
    assert (found["pairs"], found["agree"]) == (10, 0.7)


@in_a_browser
def test_all_is_done_and_what_was_skipped_comes_again(browser, ranked):
    url, out = ranked
    begin(browser, url, "Cora")
    browser.press("s")
    browser.see("A is better")
    browser.press("0", "Enter")
    browser.see("1 of 3 label", "#progress")
    browser.press("Enter")
    browser.see("All but what was skipped")
    browser.press("u")                                     # from the end, too, there is a way back
    browser.see("all are tied")
    browser.press("Enter")
    browser.see("Show the 1 skipped")
    browser.click(".done button")
    browser.see("Question 0?")
    browser.press("Enter")
    browser.see("All done")
    browser.see("3 of 3 labels", "#progress")
    assert len(rows_in(out)) == 3 and browser.faults() == []


@in_a_browser
def test_a_narrow_window_in_the_dark(ranked):
    """Nothing is wider than the window, and the page has its dark colours."""
    url, _ = ranked
    with open_browser((500, 800), dark=True) as narrow:
        begin(narrow, url, "Ada")
        for words in ("all are tied", "B is better"):
            narrow.see(words)
            assert narrow.run("return document.documentElement.scrollWidth <= innerWidth")
            assert narrow.run("return matchMedia('(prefers-color-scheme: dark)').matches")
            narrow.press("Enter" if words == "all are tied" else "1")


@in_a_browser
def test_a_token_that_is_missing_is_said(browser, tmp_path):
    web = page.server(PAGE, Desk(Labels(tmp_path / "x.jsonl"), None, [], "rank").act, "127.0.0.1",
                      0, "secret")
    threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
    browser.go(f"http://127.0.0.1:{web.server_port}/")
    browser.see("Who is labelling?")
    browser.press("Ada", "Enter")
    browser.see("this address needs its token", "#note")
    browser.go(f"http://127.0.0.1:{web.server_port}/#secret")
    browser.run("location.reload()")
    browser.see("All done")
    web.shutdown()
    web.server_close()


# ----------------------------------------------------------------------------- rollouts

@pytest.fixture(scope="module")
def rolled(town):
    """(policy, ref, reward model, prompts, responses): a response that ended and one that did
    not."""
    from common.checkpoint import load_gpt, load_reward_model
    (policy, tokenizer), (ref, _) = load_gpt(str(town / "sft")), load_gpt(str(town / "base"))
    ended, cut = tokenizer.encode("Ada lives at the mill."), tokenizer.encode("No")
    messages = [[{"role": "user", "content": "Where is <b>Ada</b>?"}],
                [{"role": "user", "content": "Who?"}]]
    prompts = [Prompt(some, tokenizer.render_prompt(some)) for some in messages]
    responses = [Response([*ended, tokenizer.end], "Ada lives at the mill.", True),
                 Response(cut, "No", False)]
    return policy, ref, load_reward_model(str(town / "rm"))[0], prompts, responses


def numbers_of(rolled, beta: float = 0.5, temperature: float = 1.0) -> dict:
    policy, ref, reward_model, prompts, responses = rolled
    pad = get_tokenizer("tinytown").pad
    return rollouts.token_numbers(policy, ref, reward_model, [2.0, -1.0], prompts, responses, pad,
                                  beta, temperature)


def check_numbers(rolled) -> None:
    """One number a token; KL and rewards add up; with V the advantages are GAE's, λ = 0.95, and
    V + A of the last token is its reward."""
    policy, ref, _, prompts, responses = rolled
    found = numbers_of(rolled)
    for values in found.values():
        assert [len(row) for row in values] == [len(response.ids) for response in responses]
    pad = get_tokenizer("tinytown").pad
    own, other = (sequence_logprobs(m, prompts, responses, pad) for m in (policy, ref))
    for i, score in enumerate((2.0, -1.0)):
        kl, reward, value, advantage = (found[name][i] for name in (
            "KL", "reward", "value", "advantage"))
        assert sum(kl) == pytest.approx((own - other)[i].item(), abs=1e-3)
        assert sum(reward) == pytest.approx(score - 0.5 * sum(kl), abs=1e-3)
        assert value[-1] + advantage[-1] == pytest.approx(reward[-1], abs=1e-3)
        deltas = [r + after - v for r, v, after in zip(reward, value, [*value[1:], 0.0])]
        expected = sum(0.95 ** k * delta for k, delta in enumerate(deltas))
        assert advantage[0] == pytest.approx(expected, abs=1e-3)


def test_the_numbers_of_a_rollout(rolled):
    check_numbers(rolled)


def test_log_probabilities_are_of_the_temperature(rolled):
    assert numbers_of(rolled)["log π"] != numbers_of(rolled, temperature=0.5)["log π"]


def test_pieces_of_characters_that_span_tokens():
    tokenizer = get_tokenizer("tinytown")
    ids = tokenizer.encode("a né ☃")
    found = rollouts.pieces(ids, tokenizer)
    assert "".join(found) == "a né ☃" and len(found) == len(ids) and "" in found
    assert rollouts.pieces(ids[:-1], tokenizer)[-1] == "\ufffd"


def test_the_page_of_sample(town, tmp_path, capsys):
    path = tmp_path / "rollouts.html"
    config = sample.Config(init=str(town / "sft"), ref=str(town / "base"), reward=str(town / "rm"),
                           data=(str(town / "data/test.jsonl"),), count=3, max_new_tokens=12,
                           html=str(path), device="cpu")
    sample.talk(config)
    assert f"wrote {path}" in capsys.readouterr().out
    data, = re.findall(r'<script type="application/json" id="data">(.*?)</script>',
                       path.read_text("utf-8"))
    rows = json.loads(data)["rows"]
    assert len(rows) == 3 and set(rows[0]["numbers"]) == {
        "log π", "log π_ref", "KL", "value", "reward", "advantage"}
    for changes, words in ((dict(data=()), "--html: shows answers to --data"),
                           (dict(ref="", reward=""), "name --ref, --reward or both")):
        for name, value in changes.items():
            setattr(config, name, value)
        with pytest.raises(InputError, match=words):
            sample.talk(config)
        config.data = (str(town / "data/test.jsonl"),)


@in_a_browser
def test_rollouts_in_a_browser(browser, rolled, tmp_path):
    """Texts are text; colours follow the number that is chosen; values stand at the pointer."""
    *_, prompts, responses = rolled
    tokenizer, found = get_tokenizer("tinytown"), numbers_of(rolled)
    hostile = Response([*tokenizer.encode(HOSTILE), tokenizer.end], HOSTILE, True)
    some = {name: [rows[0], [0.5] * len(hostile.ids)] for name, rows in found.items()}
    path = tmp_path / "rollouts.html"
    rollouts.write_page(str(path), {"init": HOSTILE}, prompts, [responses[0], hostile], tokenizer,
                        some)
    browser.faults()
    browser.go(path.as_uri())
    browser.see(HOSTILE, "#title")
    assert browser.text("article:nth-child(2) .response") == HOSTILE + "<|end|>"
    assert browser.run("return document.querySelectorAll('main img, main script').length") == 0
    assert browser.run("return document.title") == "Rollouts, token by token"
    colours = "return [...document.querySelectorAll('.response span')].map(x => x.style.background)"
    before = browser.run(colours)
    browser.click("#by label:nth-child(3)")
    assert browser.run(colours) != before
    browser.see("advantage: how much better", "#means")
    browser.run("document.querySelector('.response span').dispatchEvent(new PointerEvent("
                "'pointerover', {bubbles: true}))")
    shown = browser.text("#values").replace("−", "-")
    assert f"{found['advantage'][0][0]:.3f}" in shown and "1 of" in shown
    assert browser.faults() == []


MUTANTS = [
    (rollouts, "token_numbers", "a penalty without β", Edit("mask, beta)", "mask, 1.0)")),
    (rollouts, "token_numbers", "the sign of KL", Edit("(logprobs, ref_logprobs)[0]",
                                                       "(ref_logprobs, logprobs)[0]")),
    (rollouts, "token_numbers", "λ = 1", Edit("lam=0.95", "lam=1.0")),
    (rollouts, "of_responses", "one token early", Edit("row[kept]", "row.roll(1)[kept]")),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[row[2] for row in MUTANTS])
def test_a_classic_wrong_answer_is_caught(rolled, monkeypatch, mutant):
    def numbers():
        check_numbers(rolled)
    check_caught(monkeypatch, *mutant, [numbers])
