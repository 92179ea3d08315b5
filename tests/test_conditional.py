"""Conditional tokens: quantiles, the exact KL, what policy and reference read, what is learned.

As in test_systems.py, classic mistakes are put in place of the right functions and must be caught.
"""
import inspect
import json
import math
from functools import partial

import pytest
import torch
from test_closed_form import ToyTokenizer, distance
from test_equations import INF, NAN, close, gradient, normal, row, spoiled, tiny_gpt, vector
from test_mutants import Edit, check_caught

from common import run as door
from common.checkpoint import load_gpt
from common.errors import InputError
from common.files import read_log
from data.batches import Prompt, RankingRow, Row, response_row
from data.readers import read_rankings
from data.tokenizer import get_tokenizer
from evaluate import Policy
from model import GPT, GPTConfig
from systems import conditional
from systems.conditional import BINARY, QUANTILES, Config, Example

TOKENIZER = get_tokenizer("tinytown")
LN2 = math.log(2)


def places(scores: list[float], count: int) -> list[int]:
    return conditional.quantile_places(torch.tensor(scores), count).tolist()


def test_argument_names_are_the_lecture_s():
    for name, expected in {"quantile_places": "scores count",
                           "exact_kl": "ref_logprobs logprobs mask"}.items():
        assert " ".join(inspect.signature(getattr(conditional, name)).parameters) == expected


# ----------------------------------------------------------------------------- quantiles

def test_quantile_places_by_hand():
    # In order: 0, 1 | 2, 3 | 4, 5.
    assert places([5., 1., 3., 2., 4., 0.], 3) == [2, 0, 1, 1, 2, 0]
    # ⌊3·rank/7⌋ of ranks 0 … 6: three, two and two.
    assert places([-1., 0., 1., 2., 3., 4., 5.], 3) == [0, 0, 0, 1, 1, 2, 2]
    assert places([7., -7.], 1) == [0, 0]
    assert places([3., 1., 2.], 3) == [2, 0, 1]


def test_equal_scores_rank_in_the_order_in_which_they_stand():
    assert places([1., 1., 1., 1.], 2) == [0, 0, 1, 1]
    assert places([2., 1., 2., 1., 2., 2.], 3) == [1, 0, 1, 0, 2, 2]
    # Many, as a sort that is not stable keeps the order of a few.
    scores = [0.0, 1.0] * 500
    assert places(scores, 4) == [2 * (i % 2) + (i >= 500) for i in range(1000)]


def test_quantile_places_equal_their_definition():
    torch.manual_seed(0)
    for N in (1, 2, 5, 12, 37):
        for scores in (normal(N), torch.randint(4, (N,)).double()):
            order = sorted(range(N), key=lambda i: (scores[i].item(), i))
            for count in range(1, N + 1):
                found = places(scores.tolist(), count)
                assert found == [order.index(i) * count // N for i in range(N)]
                sizes = [found.count(k) for k in range(count)]
                assert max(sizes) - min(sizes) <= 1
                # Nothing but the order counts.
                assert places((scores ** 3 - 64).tolist(), count) == found


def test_quantiles_without_a_score_are_an_error():
    for scores, count in (([], 1), ([1.0, 2.0], 3), ([1.0], 0)):
        with pytest.raises(ValueError):
            places(scores, count)


# ----------------------------------------------------------------------------- the exact KL

def test_exact_kl_by_hand():
    # π_ref = ½, ¼, ¼ and π = ¼, ½, ¼: ½ ln 2 − ¼ ln 2.
    # π_ref = ¾, ¼, 0+ and π = ½, ½, 0+: ¾ ln 3/2 + ¼ ln ½; the other way it is ½ ln 4/3.
    ref = torch.stack([vector(.5, .25, .25), vector(.75, .25, 1e-30), vector(.2, .3, .5)])[None]
    own = torch.stack([vector(.25, .5, .25), vector(.5, .5, 1e-30), vector(.6, .3, .1)])[None]
    expected = row(LN2 / 4, 0.75 * math.log(1.5) - 0.25 * LN2, 0.)
    mask = torch.tensor([[1, 1, 0]])
    for given in (mask, mask.bool(), mask.float()):
        close(conditional.exact_kl(ref.log(), own.log(), given), expected)
    # Tokens one after the other, as in training.
    close(conditional.exact_kl(ref[0].log(), own[0].log(), mask[0]), expected[0])


def test_exact_kl_equals_its_definition():
    torch.manual_seed(1)
    for B, T, V in ((1, 1, 2), (3, 5, 7), (2, 4, 33)):
        ref, own = (normal(B, T, V, scale=2).log_softmax(-1) for _ in range(2))
        mask = torch.rand(B, T) < 0.7
        found = conditional.exact_kl(ref, own, mask)
        for b in range(B):
            for t in range(T):
                total = sum(math.exp(p) * (p - q)
                            for p, q in zip(ref[b, t].tolist(), own[b, t].tolist()))
                close(found[b, t].item(), total if mask[b, t] else 0.0)
        other = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=ref),
                                                  torch.distributions.Categorical(logits=own))
        close(found, torch.where(mask, other, 0.0))
        assert (found[mask] > 0).all() and (found[~mask] == 0).all()


def test_the_same_policy_has_no_kl_and_no_gradient():
    torch.manual_seed(2)
    logits, mask = normal(2, 3, 5), torch.ones(2, 3)
    ref = logits.log_softmax(-1)
    assert (conditional.exact_kl(ref, ref, mask) == 0).all()
    grad, = gradient(lambda x: conditional.exact_kl(ref, x.log_softmax(-1), mask), logits)
    close(grad, torch.zeros_like(grad))


def test_the_gradient_by_logits_is_policy_minus_reference():
    torch.manual_seed(3)
    logits, ref = normal(2, 3, 5), normal(2, 3, 5).log_softmax(-1)
    mask = torch.tensor([[1, 1, 0]] * 2)
    grad, = gradient(lambda x: conditional.exact_kl(ref, x.log_softmax(-1), mask), logits)
    close(grad, (logits.softmax(-1) - ref.exp()) * mask[..., None])
    assert torch.autograd.gradcheck(
        lambda x: conditional.exact_kl(ref, x.log_softmax(-1), mask), logits.requires_grad_())


def test_nothing_outside_the_mask_reaches_value_or_gradient():
    torch.manual_seed(4)
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    everywhere = mask[..., None].expand(3, 4, 5)
    clean = [normal(3, 4, 5).log_softmax(-1) for _ in range(2)]

    def found(*inputs):
        kl = conditional.exact_kl(*inputs, mask)
        return [kl, *gradient(lambda *x: conditional.exact_kl(*x, mask), *inputs)]

    expected = found(*clean)
    assert (expected[0][~mask] == 0).all() and (expected[1][~mask] == 0).all()
    for rubbish in ((NAN, INF, -INF), (1e6, -3.0, 7.0)):
        for which in ([0], [1], [0, 1]):
            dirty = [spoiled(x, everywhere, *rubbish) if i in which else x
                     for i, x in enumerate(clean)]
            assert all(torch.equal(x, y) for x, y in zip(found(*dirty), expected))


def test_beside_the_likelihood_the_minimum_is_a_mixture():
    torch.manual_seed(5)
    data, ref = normal(6).softmax(0), normal(6).softmax(0)
    for beta in (0.05, 1.0):
        def loss(logits):
            own = logits.log_softmax(-1)[None]
            return (-(data * own[0]).sum()
                    + beta * conditional.exact_kl(ref.log()[None], own, torch.ones(1)).sum())

        minimum = ((data + beta * ref) / (1 + beta)).log()
        close(gradient(loss, minimum)[0], torch.zeros(6).double())
        assert all(loss(minimum + 0.1 * normal(6)) > loss(minimum) for _ in range(20))


# ----------------------------------------------------------------------------- rows

ASKED = [{"role": "user", "content": "Where does Ada live?"}]
RANKINGS = [
    {"messages": ASKED, "responses": [
        {"text": "Ada lives at the mill.", "score": 0.5}, {"text": "At the mill.", "score": 2.0},
        {"text": "Ada keeps a", "score": -3.0, "ended": False}]},
    {"prompt": "Who is Rex?", "responses": ["No.", "I do not know Rex.", "Rex is a dog."],
     "scores": [1.0, 1.5, 1.0]}]
# From the lowest score to the highest; of equal ones the first.
IN_ORDER = ["Ada keeps a", "Ada lives at the mill.", "No.", "Rex is a dog.", "I do not know Rex.",
            "At the mill."]


@pytest.fixture(scope="module")
def rankings(tmp_path_factory):
    path = tmp_path_factory.mktemp("rankings") / "rankings.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in RANKINGS))
    return str(path)


def said(example: Example) -> tuple[str, str]:
    """(the word, the response) of an example, as text."""
    text = TOKENIZER.decode(example.row.ids)
    response = [id for id, mask in zip(*example.row) if mask]
    return (text.removeprefix("<|system|>").partition("<|end|>")[0],
            TOKENIZER.decode(response).removesuffix("<|end|>"))


def check_rows(path: str) -> None:
    for quark in (False, True):
        words = QUANTILES if quark else BINARY
        found = conditional.examples(Config(data=(path,), quark=quark), TOKENIZER, 64)
        assert len(found) == (6 if quark else 4)
        for example in found:
            word, response = said(example)
            assert word in words
            ranking = next(ranking for ranking in read_rankings(path)
                           if response in ranking.responses)
            cut = ranking.responses.index(response) in ranking.cut
            prompt = Prompt(ranking.messages, TOKENIZER.render_prompt(ranking.messages))
            answer = TOKENIZER.encode(response) + [TOKENIZER.end] * (not cut)
            # The reference reads no word, and the policy what it will be asked.
            assert example.ref_row == response_row(prompt.ids, answer)
            [asked] = Policy(None, system=word).asked([prompt], TOKENIZER)
            assert example.row == response_row(asked.ids, answer)
            turn = TOKENIZER.render([{"role": "system", "content": word}])[0]
            assert example.row.ids == example.ids == turn + example.ref_row.ids
            assert sum(example.row.mask) == sum(example.ref_row.mask) == len(answer)


def test_the_policy_reads_the_word_and_the_reference_does_not(rankings):
    check_rows(rankings)


def check_words(path: str) -> None:
    found = conditional.examples(Config(data=(path,)), TOKENIZER, 64)
    assert list(map(said, found)) == [("bad", "Ada keeps a"), ("good", "At the mill."),
                                      ("bad", "No."), ("good", "I do not know Rex.")]
    found = dict(map(reversed, map(said, conditional.examples(
        Config(data=(path,), quark=True), TOKENIZER, 64))))
    # ⌊5·rank/6⌋ = 0, 0, 1, 2, 3, 4
    assert [found[text] for text in IN_ORDER] == ["awful", *QUANTILES]


def test_good_is_the_best_and_quantiles_are_of_all_prompts_together(rankings):
    check_words(rankings)


def test_words_are_told_apart_by_their_tokens():
    for words in (BINARY, QUANTILES):
        assert len({tuple(TOKENIZER.encode(word)) for word in words}) == len(words)


def test_what_does_not_fit_after_the_word_is_left_out_and_counted(tmp_path, capsys):
    path = tmp_path / "rankings.jsonl"
    longest = {"prompt": "Who?", "responses": ["No.", "Rex is a dog. " * 4], "scores": [1, 0]}
    path.write_text("".join(json.dumps(line) + "\n" for line in [*RANKINGS, longest]))
    for quark, words in ((False, BINARY), (True, QUANTILES)):
        turn = max(len(TOKENIZER.render([{"role": "system", "content": word}])[0])
                   for word in words)
        fits = (turn + len(TOKENIZER.render_prompt(read_rankings(path)[2].messages))
                + len(TOKENIZER.encode(longest["responses"][1])) + 1)
        for context, max_tokens, kept in ((fits, 0, 3), (fits - 1, 0, 2), (99, fits - 1, 2),
                                          (fits, 99, 3)):
            found = conditional.examples(Config(data=(str(path),), quark=quark,
                                                max_tokens=max_tokens), TOKENIZER, context)
            assert len(found) == (6 if quark else 4) + 2 * (kept == 3)
            assert max(len(example.ids) for example in found) <= min(max_tokens or context, context)
            assert ("3 rows: 1 dropped" in capsys.readouterr().err) == (kept == 2)
        with pytest.raises(InputError, match="no row fits"):
            conditional.examples(Config(data=(str(path),), quark=quark), TOKENIZER, 12)


def test_rankings_that_are_tied_have_no_best_but_have_a_quantile():
    rows = [RankingRow([1], [[2], [3]], [4.0, 4.0]), RankingRow([1], [[5], [6], [7]], [0.0] * 3)]
    assert [word for word, *_ in conditional.by_quantile(rows)] == [
        "good", "great", "awful", "poor", "fair"]


# ----------------------------------------------------------------------------- predictions

def test_predictions_are_those_of_the_column_before_row_by_row():
    model = tiny_gpt()
    torch.manual_seed(6)
    V = model.config.vocab_size
    rows = [response_row(torch.randint(V, (p,)).tolist(), torch.randint(V, (r,)).tolist())
            for p, r in ((3, 2), (1, 6), (5, 1))]
    logprobs, tokens = conditional.predictions(model, rows, 0, "cpu")
    assert logprobs.shape == (9, V)
    assert tokens.tolist() == [id for one in rows for id, mask in zip(*one) if mask]
    expected = []
    for ids, mask in rows:
        start = mask.index(True)
        expected.append(model(torch.tensor([ids]))[0, start - 1:-1].log_softmax(-1))
    torch.testing.assert_close(logprobs, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_two_prompts_of_other_lengths_stand_side_by_side():
    """A model that forgets what was before the last token says the same after both."""
    model = tiny_gpt()
    with torch.no_grad():
        model.wpe.weight.zero_()
        for block in model.blocks:
            block.attention.proj.weight.zero_()
            block.attention.proj.bias.zero_()
    responses = [[4, 2, 7], [1], [3, 3]]
    told = [response_row([5, 6, 1, 2], answer) for answer in responses]
    plain = [response_row([2], answer) for answer in responses]
    found, tokens = conditional.predictions(model, told, 0, "cpu")
    alone, same = conditional.predictions(model, plain, 0, "cpu")
    assert torch.equal(tokens, same)
    kl = conditional.exact_kl(alone, found, torch.ones(len(tokens)))
    torch.testing.assert_close(kl, torch.zeros_like(kl), atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------- what is learned

class WordTokenizer(ToyTokenizer):
    """The toy's letters, and the words, one id each from 8 on."""
    vocab_size = 16
    words = list(dict.fromkeys(BINARY + QUANTILES))

    def render(self, messages):
        ids = []
        for message in messages:
            system = message["role"] == "system"
            ids += ([8 + self.words.index(message["content"]), 3] if system
                    else [1, *self.encode(message["content"]), 3])
        return ids, [False] * len(ids)

    def render_prompt(self, messages):
        return [*self.render(messages)[0], 2]


def toy_policy() -> GPT:
    torch.manual_seed(3)
    gpt = GPT(GPTConfig(16, 16, 2, 2, 32))
    with torch.no_grad():
        gpt.wte.weight *= 0.3                    # flat: the reference is far from the data
    return gpt


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """`learn(rankings, **flags)` trains the toy policy on all of them in each step, and returns
    π(next token | word, prompt, letters so far) as a function of the word and the letters."""
    saved = []
    monkeypatch.setattr(conditional, "load_gpt", lambda folder: (toy_policy(), WordTokenizer()))
    monkeypatch.setattr(door, "save_model", lambda out, model, *_: saved.append(model))

    def learn(rankings: list[dict], **flags):
        path = tmp_path / "rankings.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in rankings))
        conditional.train(Config(data=(str(path),), out=str(tmp_path / "out"), device="cpu",
                                 batch_size=1000, epochs=250, lr=1e-2, overwrite=True, **flags))
        return partial(next_token, saved[-1].eval())

    return learn


def next_token(policy: GPT, word: str, letters: str = "") -> torch.Tensor:
    tokenizer = WordTokenizer()
    turn = [{"role": "system", "content": word}] * bool(word)
    ids = tokenizer.render_prompt(turn + [{"role": "user", "content": "a"}])
    with torch.no_grad():
        logits = policy(torch.tensor([ids + tokenizer.encode(letters)]))
    return logits[0, -1].double().softmax(-1)


def ordered(*texts: str) -> dict:
    """A ranking, best first."""
    return {"prompt": "a", "responses": list(texts), "scores": list(range(len(texts), 0, -1))}


def test_a_word_teaches_bayes_rule(toy):
    """Of ten rankings: best b in 7, c in 2, d in 1; worst b in 1, c in 3, d in 6."""
    policy = toy([ordered("b", "c", "d")] * 4 + [ordered("b", "d", "c")] * 3
                 + [ordered("c", "b", "d")] * 2 + [ordered("d", "c", "b")])
    best, worst = vector(7, 2, 1), vector(1, 3, 6)
    marginal = (best + worst) / 20                                   # π(y) of what is trained on
    letters = slice(5, 8)
    for word, count in (("good", best), ("bad", worst)):
        says = count / (best + worst)                                # P(word|y)
        bayes = says * marginal / (says * marginal).sum()
        close(bayes, count / 10)
        assert distance(policy(word)[letters], bayes) < 0.02
        assert policy(word, "b")[3] > 0.98                           # and there it ends
    assert distance(policy("good"), policy("bad")) > 0.5


def test_quark_s_kl_mixes_the_reference_in_as_it_is_without_the_word(toy):
    """b is k of the four responses of quantile k. With β = 1 every next token has half of its
    probability from the data, half from the reference, asked without a word."""
    order = "cccc" "bccc" "bbcc" "bbbc" "bbbb"
    ranks = {letter: [rank for rank, one in enumerate(order) if one == letter] for letter in "bc"}
    rankings = [{"prompt": "a", "responses": ["b", "c"], "scores": scores}
                for scores in zip(ranks["b"], ranks["c"])]
    assert len(rankings) == 10
    policy, ref = toy(rankings, quark=True, kl_coef=1.0), partial(next_token, toy_policy().eval())
    for k, word in enumerate(QUANTILES):
        data = torch.zeros(16).double()
        data[5], data[6] = k / 4, 1 - k / 4
        assert distance(policy(word), (data + ref("")) / 2) < 0.03
        assert distance(policy(word), data) > 0.3
        for letter in "bc" if 0 < k < 4 else "c" if k == 0 else "b":
            ends = torch.zeros(16).double()
            ends[3] = 1.0
            assert distance(policy(word, letter), (ends + ref("", letter)) / 2) < 0.03


# ----------------------------------------------------------------------------- training

def first_step(town, quark: bool) -> tuple[float, float]:
    """(loss, KL) of the SFT model, response by response."""
    model, tokenizer = load_gpt(str(town / "sft"))
    rankings = read_rankings(str(town / "rank/rankings.jsonl"))
    words = QUANTILES if quark else BINARY
    scores = sorted(score for ranking in rankings for score in ranking.scores)
    assert not quark or len(set(scores)) < len(scores)
    loss = kl = count = 0.0
    for example in conditional.examples(Config(data=(str(town / "rank/rankings.jsonl"),),
                                               quark=quark), tokenizer, 96):
        assert said(example)[0] in words
        own, ref = (model(torch.tensor([ids]))[0, mask.index(True) - 1:-1].double().log_softmax(-1)
                    for ids, mask in example)
        answer = [id for id, mask in zip(*example.row) if mask]
        loss -= sum(own[t, id].item() for t, id in enumerate(answer))
        kl += (ref.exp() * (ref - own)).sum().item()
        count += len(answer)
    return loss / count, kl / count


@pytest.mark.parametrize("quark", [False, True], ids=["binary", "quark"])
def test_training_starts_at_the_definition_and_lowers_the_loss(town, tmp_path, quark):
    with torch.no_grad():
        loss, kl = first_step(town, quark)
    norms = []
    for micro in (0, 7):
        out = tmp_path / str(micro)
        final = conditional.train(Config(
            data=(str(town / "rank/rankings.jsonl"),), init=str(town / "sft"), out=str(out),
            quark=quark, kl_coef=0.5, micro_batch=micro, epochs=5 if micro == 0 else 1,
            batch_size=1000, lr=3e-3, warmup=1, dtype="float32"))
        rows = read_log(out / "metrics.jsonl")
        assert rows[0]["loss"] == pytest.approx(loss, rel=1e-3)
        assert rows[0]["kl"] == pytest.approx(kl if quark else 0, rel=2e-3)
        assert math.isfinite(final["seconds"])
        norms.append(rows[0]["grad_norm"])
        if micro == 0:
            total = [each["loss"] + 0.5 * each["kl"] for each in rows]
            assert len(rows) == 5 and total[-1] < 0.95 * total[0]
    assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_the_weight_of_the_kl_keeps_the_policy_near_its_reference(town, tmp_path):
    kl = {}
    for kl_coef in (0.0, 10.0):
        conditional.train(Config(
            data=(str(town / "rank/rankings.jsonl"),), init=str(town / "sft"), quark=True,
            out=str(tmp_path / str(kl_coef)), kl_coef=kl_coef, epochs=8, batch_size=1000, lr=3e-3,
            warmup=1))
        kl[kl_coef] = read_log(tmp_path / str(kl_coef) / "metrics.jsonl")[-1]["kl"]
    assert kl[10.0] < 0.7 * kl[0.0]


def test_responses_that_differ_are_not_compared(town, tmp_path, monkeypatch):
    right = conditional.examples

    def other(config, tokenizer, context):
        found = right(config, tokenizer, context)
        ids, mask = found[0].ref_row
        return [found[0]._replace(ref_row=Row(ids[:-1], mask[:-1])), *found[1:]]

    monkeypatch.setattr(conditional, "examples", other)
    with pytest.raises(RuntimeError, match="different responses"):
        conditional.train(Config(data=(str(town / "rank/rankings.jsonl"),), quark=True,
                                 init=str(town / "sft"), out=str(tmp_path), batch_size=1000))


def test_quark_samples_where_it_is_given_no_data(town, tmp_path):
    flags = dict(run=str(town), init=str(town / "sft"), out=str(tmp_path / "quark"), quark=True,
                 prompts=6, samples=5, epochs=1)
    final = conditional.train(Config(**flags))
    found = read_rankings(str(tmp_path / "quark_samples.jsonl"))
    assert [len(ranking.responses) for ranking in found] == [5] * 6
    # What is in the folder is a log of steps, which --resume cuts where it goes on.
    assert all("step" in row for path in (tmp_path / "quark").glob("*.jsonl")
               for row in read_log(path))
    # The reward model's score, or that of a response that never ends.
    scores = [[ranking.scores[k] for k in ranking.cut] for ranking in found]
    assert {score for some in scores for score in some} <= {-3.0}
    assert len({score for ranking in found for score in ranking.scores}) > 5
    assert final["kl"] > 0 and (tmp_path / "quark/model.pt").exists()


@pytest.mark.parametrize("quark", [False, True], ids=["binary", "quark"])
def test_one_policy_is_asked_three_ways(town, tmp_path, capsys, quark):
    name = "quark" if quark else "conditional"
    found = conditional.compared(Config(
        run=str(town), out=str(tmp_path), quark=quark, prompts=6, samples=5, epochs=2, lr=1e-2,
        data=() if quark else (str(town / "rank/rankings.jsonl"),), warmup=1))
    assert list(found) == ["sft", f"{name}_good", f"{name}_none", f"{name}_bad"]
    printed = capsys.readouterr().out
    assert all(asked in printed for asked in found)
    assert json.loads((tmp_path / "table.json").read_text()) == json.loads(json.dumps(found))
    # The KL from SFT is that of the policy's own responses to what it was asked.
    assert all(math.isfinite(one["kl"]) for one in found.values())
    assert found[f"{name}_good"]["seconds"] > 0 and found[f"{name}_bad"]["seconds"] is None


def test_flags_out_of_range_are_refused(town, tmp_path):
    for field, value in (("kl_coef", -1.0), ("samples", 1), ("prompts", 0), ("epochs", 0)):
        with pytest.raises(InputError, match=f"--{field}"):
            conditional.train(Config(init=str(town / "sft"), data=("none",), out=str(tmp_path),
                                     **{field: value}))


# ----------------------------------------------------------------------------- mutants

def quantiles_of_each_ranking(rows):
    found = []
    for one in rows:
        order = sorted(range(len(one.scores)), key=lambda k: one.scores[k])
        found += [(QUANTILES[order.index(k) * 5 // len(order)], one.prompt, response)
                  for k, response in enumerate(one.responses)]
    return found


def sampled_kl(ref_logprobs, logprobs, mask):
    """The log-ratio of the likeliest token instead of the whole vocabulary's mean."""
    at = ref_logprobs.argmax(-1, keepdim=True)
    return torch.where(mask.bool(), (ref_logprobs - logprobs).gather(-1, at)[..., 0], 0.0)


BY_HAND, DEFINITION = test_exact_kl_by_hand, test_exact_kl_equals_its_definition
ROWS, WORDS = check_rows, check_words                        # of a file of rankings
# (name, what is wrong, the wrong function or edit, the tests that catch it)
MUTANTS = [
    ("quantile_places", "quantiles reversed",
     Edit("argsort(stable=True)", "argsort(stable=True, descending=True)"),
     test_quantile_places_by_hand, WORDS),
    ("quantile_places", "order for ranks",
     Edit("argsort(stable=True).argsort()", "argsort(stable=True)"),
     test_quantile_places_by_hand, WORDS),
    ("quantile_places", "equal scores in any order",
     Edit("argsort(stable=True)", "flip(0).argsort(stable=True).sub(len(scores) - 1).neg()"),
     test_equal_scores_rank_in_the_order_in_which_they_stand),
    ("quantile_places", "equal widths for equal sizes",
     Edit("return ranks * count // len(scores)",
          "return ((scores - scores.min()) / (scores.max() - scores.min() + 1e-9) * count).long()"),
     test_quantile_places_by_hand, test_quantile_places_equal_their_definition),
    ("quantile_places", "all that is left over in the highest",
     Edit("ranks * count // len(scores)", "(ranks // (len(scores) // count)).clamp(max=count - 1)"),
     test_quantile_places_equal_their_definition),
    ("exact_kl", "the other direction",
     Edit("ref_logprobs.exp() * (ref_logprobs - logprobs)",
          "logprobs.exp() * (logprobs - ref_logprobs)"),
     BY_HAND, DEFINITION, test_the_gradient_by_logits_is_policy_minus_reference,
     test_beside_the_likelihood_the_minimum_is_a_mixture),
    ("exact_kl", "sign flipped",
     Edit("(ref_logprobs - logprobs)", "(logprobs - ref_logprobs)"), BY_HAND, DEFINITION),
    ("exact_kl", "mean over the vocabulary for the sum", Edit(".sum(-1)", ".mean(-1)"),
     BY_HAND, DEFINITION, test_beside_the_likelihood_the_minimum_is_a_mixture),
    ("exact_kl", "one token for the vocabulary", sampled_kl, BY_HAND, DEFINITION),
    ("exact_kl", "multiply instead of where",
     Edit("torch.where(mask, logprobs, 0.0)", "logprobs * mask"),
     test_nothing_outside_the_mask_reaches_value_or_gradient),
    ("exact_kl", "reference not masked",
     Edit("torch.where(mask, ref_logprobs, 0.0)", "ref_logprobs"),
     BY_HAND, DEFINITION, test_nothing_outside_the_mask_reaches_value_or_gradient),
    ("examples", "the word left in the reference's input",
     Edit("response_row(prompt, response))", "response_row(turns[word] + prompt, response))"),
     ROWS),
    ("examples", "the word left out of the policy's", Edit("turns[word] + prompt", "prompt"), ROWS),
    ("examples", "the word after the prompt",
     Edit("turns[word] + prompt", "prompt + turns[word]"), ROWS),
    ("best_and_worst", "good and bad swapped",
     Edit("(min(row.scores), max(row.scores))", "(max(row.scores), min(row.scores))"), WORDS),
    ("by_quantile", "quantiles of each ranking", quantiles_of_each_ranking, WORDS),
    ("before", "states of the token itself", lambda mask: mask,
     test_predictions_are_those_of_the_column_before_row_by_row)]


@pytest.mark.parametrize("name, mistake, mutant, tests", [(*one[:3], one[3:]) for one in MUTANTS],
                         ids=[f"{one[0]}: {one[1]}" for one in MUTANTS])
def test_a_classic_wrong_answer_is_caught(monkeypatch, rankings, name, mistake, mutant, tests):
    tests = [partial(test, rankings) if test in (ROWS, WORDS) else test for test in tests]
    check_caught(monkeypatch, conditional, name, mistake, mutant, tests)
