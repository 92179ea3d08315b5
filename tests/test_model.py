"""model.py: padding, cache, sampling, tied head, reward head, log-probabilities, checkpoints."""
import json
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from common.checkpoint import load_gpt, load_reward_model, new_gpt, save_checkpoint
from common.errors import InputError
from data.batches import Prompt
from model import GPT, GPTConfig, KVCache, RewardModel, before, sample_token, stream
from rollout import respond

V = 23                                                        # vocabulary of the small model
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [5, 3], [8, 9, 7, 9, 3], [2, 7, 1, 8, 2, 8], [11, 22, 0]]


def small(seed=0, **changes):
    """A random model in evaluation mode, with random biases and gains too.

    The values that biases and gains start from would hide mistakes.
    """
    torch.manual_seed(seed)
    config = dict(block_size=32, vocab_size=V, n_layer=3, n_head=2, n_embd=16) | changes
    model = GPT(GPTConfig(**config))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn(p.shape))
            else:
                p.mul_(8)           # sharp, varied distributions: flat ones would hide a mistake
    return model.eval()


@pytest.fixture(scope="module")
def gpt():
    return small()


def left_padded(rows, pad=0, extra=0):
    """(tokens, attention_mask), padded on the left to the longest row and `extra` columns more."""
    width = max(map(len, rows)) + extra
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return tokens, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def right_padded(rows, pad=0, extra=0):
    """(tokens, lengths), padded on the right."""
    width = max(map(len, rows)) + extra
    return (torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
            torch.tensor([len(row) for row in rows]))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---------------------------------------------------------------------------- padding and positions

@pytest.mark.parametrize("extra", [0, 1, 7])
@pytest.mark.parametrize("pad", [0, 5, V - 1])
def test_left_padding_changes_nothing(gpt, pad, extra):
    tokens, mask = left_padded(PROMPTS, pad, extra)
    hidden, logits = gpt.hidden(tokens, attention_mask=mask), gpt(tokens, attention_mask=mask)
    assert hidden.isfinite().all()
    for i, prompt in enumerate(PROMPTS):
        alone = torch.tensor([prompt])
        close(hidden[i, -len(prompt):], gpt.hidden(alone)[0])
        close(logits[i, -len(prompt):], gpt(alone)[0])


def test_left_padding_without_a_mask_would_change_something(gpt):
    tokens, _ = left_padded([[5, 3]], extra=2)
    assert (gpt(tokens)[0, -2:] - gpt(torch.tensor([[5, 3]]))[0]).abs().max() > 0.1


def test_bool_mask_equals_0_1_mask(gpt):
    tokens, mask = left_padded(PROMPTS)
    close(gpt(tokens, attention_mask=mask.bool()), gpt(tokens, attention_mask=mask), 0)


def test_positions_follow_the_mask(gpt):
    tokens, mask = left_padded(PROMPTS, extra=3)
    by_hand = torch.tensor([[max(0, sum(row[:t + 1]) - 1) for t in range(len(row))]
                            for row in mask.tolist()])
    real = mask.bool()
    close(gpt.hidden(tokens, attention_mask=mask)[real], gpt.hidden(tokens, by_hand, mask)[real])
    later = gpt.hidden(tokens, by_hand + 1, mask)[real]
    assert (gpt.hidden(tokens, by_hand, mask)[real] - later).abs().max() > 0.1


@pytest.mark.parametrize("pad", [0, 5])
def test_right_padding_changes_nothing(gpt, pad):
    tokens, lengths = right_padded(PROMPTS, pad, extra=4)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    for hidden in (gpt.hidden(tokens), gpt.hidden(tokens, attention_mask=mask)):
        for i, prompt in enumerate(PROMPTS):
            close(hidden[i, :len(prompt)], gpt.hidden(torch.tensor([prompt]))[0])


def test_right_padding_leaves_the_gradient_alone():
    gradients = []
    for extra, pad in ((0, 0), (6, 9)):
        gpt = small().double()
        tokens, lengths = right_padded(PROMPTS, pad, extra)
        columns = torch.arange(tokens.shape[1])
        gpt.logprobs(tokens, (columns >= 1) & (columns < lengths[:, None]))[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in gpt.parameters()]))
    assert gradients[0].norm() > 1
    close(*gradients, atol=1e-9)


def test_no_token_sees_a_later_one(gpt):
    tokens = torch.tensor([PROMPTS[0]])
    changed = tokens.clone()
    changed[0, 5] = 12
    a, b = gpt.hidden(tokens)[0], gpt.hidden(changed)[0]
    close(a[:5], b[:5], 1e-6)
    assert ((a[5:] - b[5:]).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("shape", [(1, 33), (2, 40)])
def test_more_tokens_than_positions(gpt, shape):
    tokens = torch.zeros(shape, dtype=torch.long)
    for call in (gpt, gpt.hidden):
        with pytest.raises(ValueError, match=rf"{shape[1]}.*block_size.*32"):
            call(tokens)
    assert gpt(tokens[:, :32]).shape == (shape[0], 32, V)


# ----------------------------------------------------------------------------- generation

def greedy_by_hand(gpt, prompt, count):
    """The largest logit of a full forward pass, computed from scratch for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(gpt(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt):]


def cut(response, stop):
    """Up to and including the first stop token."""
    return response[:response.index(stop) + 1] if stop in response else response


@pytest.mark.parametrize("seed", range(3))
def test_cached_generation_equals_uncached(seed):
    gpt = small(seed)
    expected = [greedy_by_hand(gpt, prompt, 12) for prompt in PROMPTS]
    # Else a swapped row would not show.
    assert len({tuple(response) for response in expected}) == len(PROMPTS)
    assert gpt.generate(PROMPTS, 12, temperature=0) == expected


def test_generation_fills_the_block_to_its_last_position():
    gpt = small()
    assert gpt.generate([PROMPTS[0]], 24, temperature=0) == [greedy_by_hand(gpt, PROMPTS[0], 24)]


@pytest.mark.parametrize("seed", range(3))
def test_stop_token_is_kept_and_ends_the_response(seed):
    gpt = small(seed)
    free = gpt.generate(PROMPTS, 20, temperature=0)
    lengths_seen = set()
    for stop in range(V):
        expected = [cut(response, stop) for response in free]
        assert gpt.generate(PROMPTS, 20, temperature=0, stop_token=stop) == expected
        lengths_seen.add(len(set(map(len, expected))))
    # For some stop token the rows finish at three different times at least.
    assert max(lengths_seen) >= 3


def test_stop_token_in_sampled_responses():
    gpt, stop = small(), 4
    responses = gpt.generate([PROMPTS[0]] * 200 + [PROMPTS[1]] * 200, 15, temperature=3.0,
                             stop_token=stop, generator=torch.Generator().manual_seed(0))
    ended = [response for response in responses if stop in response]
    assert 20 < len(ended) < 400
    assert all(response.index(stop) == len(response) - 1 for response in ended)
    assert all(len(response) == 15 for response in responses if stop not in response)


def test_stop_token_in_the_prompt_stops_nothing(gpt):
    stop = 1
    prompt = [3, stop, 4]
    assert gpt.generate([prompt], 6, temperature=0, stop_token=stop) == [
        cut(greedy_by_hand(gpt, prompt, 6), stop)]


@pytest.mark.parametrize("stop", [None, 13, 21])
def test_batch_mates_change_nothing(gpt, stop):
    together = gpt.generate(PROMPTS, 16, temperature=0, stop_token=stop)
    assert together == [gpt.generate([prompt], 16, temperature=0, stop_token=stop)[0]
                        for prompt in PROMPTS]
    twice = gpt.generate(PROMPTS + PROMPTS[::-1], 16, temperature=0, stop_token=stop)
    assert twice == together + together[::-1]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sampled_tokens_replay_through_logprobs(monkeypatch, temperature):
    """The cached pass that draws a token and the training pass that scores it agree on its
    log-probability."""
    # In double precision the two differ by a mistake or not at all.
    gpt, drawn = small().double(), []

    def record(logits, *arguments, **keywords):
        tokens = sample_token(logits, *arguments, **keywords)
        drawn.append((logits / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0])
        return tokens
    monkeypatch.setattr(model_module, "sample_token", record)
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    responses = gpt.generate(prompts, 10, temperature=temperature,
                             generator=torch.Generator().manual_seed(1))
    assert len({tuple(response) for response in responses}) > len(PROMPTS)
    tokens, _ = right_padded([prompt + response for prompt, response in zip(prompts, responses)],
                             pad=6)
    start = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    columns = torch.arange(tokens.shape[1])
    mask = (columns >= start) & (columns < start + 10)
    logprobs, _ = gpt.logprobs(tokens, mask, temperature)
    close(logprobs[mask].view(len(prompts), 10), torch.stack(drawn, 1), 1e-9)


def test_generation_under_autocast_follows_the_model(gpt):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        responses = gpt.generate(PROMPTS, 8, temperature=0)
    assert all(len(response) == 8 for response in responses)
    for prompt, response in zip(PROMPTS, responses):
        logits = gpt(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1]
        chosen = logits.gather(1, torch.tensor(response)[:, None])[:, 0]
        assert (logits.amax(-1) - chosen).max() < 0.2           # logits here spread over about 10


def draw(gpt, seed=0, count=50, **keywords):
    return gpt.generate(PROMPTS[:1] * count, 6, generator=torch.Generator().manual_seed(seed),
                        **keywords)


def test_the_generator_decides(gpt):
    assert draw(gpt, 0) == draw(gpt, 0) != draw(gpt, 1)
    torch.manual_seed(5)
    before_it = torch.rand(3)
    torch.manual_seed(5)
    draw(gpt, 0)
    assert torch.equal(torch.rand(3), before_it)            # the global generator was left alone


@pytest.mark.parametrize("keywords", [
    {"temperature": 0}, {"temperature": 0.0, "top_k": 3}, {"top_k": 1}, {"top_p": 1e-6},
    {"temperature": 1e-4}])
def test_ways_to_be_greedy(gpt, keywords):
    expected = [greedy_by_hand(gpt, prompt, 6) for prompt in PROMPTS]
    assert gpt.generate(PROMPTS, 6, **keywords) == expected


def chi_square(counts, probs):
    """(statistic, upper bound five standard deviations above its mean).

    Outcomes that are expected under 5 times are merged.
    """
    total = sum(counts.values())
    probs = probs.detach().double()
    observed = torch.tensor([counts.get(i, 0) for i in range(len(probs))], dtype=torch.double)
    expected = probs * total
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None].clamp(min=1)])
    freedom = len(observed) - 1
    return (float(((observed - expected) ** 2 / expected).sum()),
            freedom + 5 * math.sqrt(2 * freedom))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_samples_follow_the_distribution_that_logprobs_scores(temperature):
    """The frequencies of all responses of two tokens over six ids agree with exp(sum of log-probs),
    at one temperature."""
    gpt = small(1, vocab_size=6)
    prompt, count = [3, 1], 20_000
    responses = gpt.generate([prompt] * count + [[5, 4, 3, 2, 1]], 2, temperature=temperature,
                             generator=torch.Generator().manual_seed(0))[:-1]
    counts = Counter(6 * a + b for a, b in responses)
    tokens = torch.tensor([prompt + [a, b] for a in range(6) for b in range(6)])
    mask = torch.tensor([[0, 0, 1, 1]]).expand(36, 4)
    probs = gpt.logprobs(tokens, mask, temperature)[0].sum(1).exp()
    close(probs.sum(), torch.tensor(1.0))
    assert (probs > 0.002).sum() >= 6                           # not all on one response
    statistic, bound = chi_square(counts, probs)
    assert statistic < bound
    statistic, bound = chi_square(counts,
                                  gpt.logprobs(tokens, mask, temperature * 1.15)[0].sum(1).exp())
    assert statistic > bound                # and the same counts refute a temperature 15 % higher


@pytest.mark.parametrize("keywords", [
    {"top_k": 3}, {"top_p": 0.8}, {"top_p": 0.5}, {"top_k": 4, "top_p": 0.6}, {"top_k": 100}])
def test_top_k_and_top_p_renormalise_the_set_they_keep(keywords):
    gpt, temperature, count = small(1, vocab_size=12), 3.0, 20_000
    drawn = gpt.generate([[3, 1]] * count, 1, temperature=temperature,
                         generator=torch.Generator().manual_seed(0), **keywords)
    probs = (gpt(torch.tensor([[3, 1]]))[0, -1] / temperature).softmax(-1).tolist()
    kept = sorted(range(12), key=lambda i: -probs[i])[:keywords.get("top_k")]
    # Of what top_k left, top_p keeps the likeliest: the fewest that reach it.
    if "top_p" in keywords:
        reached, goal, order = 0.0, keywords["top_p"] * sum(probs[i] for i in kept), kept
        kept = []
        for i in order:
            if reached >= goal:
                break
            kept.append(i)
            reached += probs[i]
    assert {token for token, in drawn} == set(kept) and len(kept) > 1
    wanted = torch.tensor([p if i in kept else 0.0 for i, p in enumerate(probs)])
    statistic, bound = chi_square(Counter(token for token, in drawn), wanted / wanted.sum())
    assert statistic < bound


def test_no_token_of_probability_zero_is_drawn(monkeypatch):
    logits = torch.full((20_000, 9), -math.inf)
    logits[:, [2, 3, 6]] = torch.tensor([0.0, 1.0, -1.0])
    drawn = sample_token(logits,
                         torch.rand(len(logits), generator=torch.Generator().manual_seed(0)),
                         1.0, None, 1.0)
    assert set(drawn.tolist()) == {2, 3, 6}
    # The two ends of the uniform distribution, which 20,000 draws do not reach; 1 stands for a
    # product that is rounded up.
    for u in (0.0, 1 - 2 ** -24, 1.0):
        monkeypatch.setattr(torch, "rand", lambda *shape, u=u, dtype=None, **_: torch.full(
            shape, u, dtype=dtype))
        assert (set(sample_token(logits, torch.rand(len(logits)), 1.0, None, 1.0).tolist())
                <= {2, 3, 6})
        assert set(sample_token(logits, torch.rand(len(logits)), 1.0, 2, 1.0).tolist()) <= {2, 3}
        assert set(sample_token(logits, torch.rand(len(logits)), 1.0, None, 0.5).tolist()) == {3}


def test_a_response_depends_on_its_own_random_numbers_alone(gpt):
    """Its neighbours, and how early they end, change nothing: so processes can share a batch of
    prompts."""
    prompts = [prompt for prompt in PROMPTS for _ in range(5)]
    uniforms = torch.rand(len(prompts), 12, generator=torch.Generator().manual_seed(4))
    together = gpt.generate(prompts, 12, stop_token=13, uniforms=uniforms)
    assert len(set(map(len, together))) > 1
    for i, prompt in enumerate(prompts):
        assert (gpt.generate([prompt], 12, stop_token=13, uniforms=uniforms[i:i + 1])
                == [together[i]])
    assert gpt.generate(prompts, 12, stop_token=13,
                        generator=torch.Generator().manual_seed(4)) == together


@pytest.mark.parametrize("shape", [dict(n_layer=10 ** 9), dict(block_size=10 ** 12),
                                   dict(vocab_size=10 ** 12), dict(n_embd=10 ** 7)])
def test_a_model_too_large_for_the_memory_is_refused_before_it_is_made(shape):
    with pytest.raises(InputError, match="GiB for its weights alone"):
        new_gpt(GPTConfig(**dict(block_size=32, vocab_size=50, n_layer=2, n_head=2,
                                 n_embd=32) | shape))


def test_best_of_n_has_the_distribution_of_an_order_statistic():
    """P(best of n = y) = F(y)ⁿ − F(< y)ⁿ, with F the distribution function along the score."""
    gpt, n, rounds = small(1, vocab_size=6), 4, 5000
    score = torch.tensor([0.3, -1.0, 2.0, 0.9, -0.2, 1.1])
    drawn = gpt.generate([[3, 1]] * (n * rounds), 1, temperature=3.0,
                         generator=torch.Generator().manual_seed(2))
    best = torch.tensor(drawn).view(rounds, n)
    best = best.gather(1, score[best].argmax(1, keepdim=True))[:, 0]
    probs = (gpt(torch.tensor([[3, 1]]))[0, -1] / 3.0).softmax(-1).double()
    order = score.argsort()
    below = probs[order].cumsum(0) - probs[order]
    exact = torch.zeros(6, dtype=torch.double)
    exact[order] = (below + probs[order]) ** n - below ** n
    close(exact.sum(), torch.tensor(1.0, dtype=torch.double), 1e-6)
    statistic, bound = chi_square(Counter(best.tolist()), exact)
    assert statistic < bound
    statistic, bound = chi_square(Counter(best.tolist()), probs)
    assert statistic > bound


def test_what_generate_refuses_and_what_is_empty(gpt):
    assert gpt.generate([], 5) == []
    assert gpt.generate(PROMPTS, 0) == [[] for _ in PROMPTS]
    with pytest.raises(ValueError, match="empty prompt"):
        gpt.generate([[1, 2], []], 5)
    with pytest.raises(ValueError, match="30.*3.*block_size.*32"):
        gpt.generate([[1], [1] * 30], 3)
    assert len(gpt.generate([[1] * 30], 2)[0]) == 2


def test_dropout_is_off_while_generating_and_the_mode_comes_back():
    gpt = small(dropout=0.9)
    expected = gpt.generate(PROMPTS, 8, temperature=0)
    assert not any(module.training for module in gpt.modules())
    gpt.train()
    with torch.no_grad():
        # Dropout is on.
        assert (gpt(torch.tensor([PROMPTS[0]])) - gpt(torch.tensor([PROMPTS[0]]))).abs().max() > 0.1
    assert gpt.generate(PROMPTS, 8, temperature=0) == expected
    assert all(module.training for module in gpt.modules())
    with pytest.raises(ValueError):
        gpt.generate([[]], 8)
    steps = stream(gpt, PROMPTS, 8)
    next(steps)
    steps.close()                                               # a reader who has seen enough
    assert all(module.training for module in gpt.modules())


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_one_query(heads, kv_heads, masked):
    """By its definition, head by head: head h reads key-value head h // (H/G); what the mask hides
    has no weight. Keys and values in either order in memory."""
    torch.manual_seed(heads)
    q = torch.randn(2, heads, 1, 5, dtype=torch.double)
    k, v = torch.randn(2, 2, kv_heads, 7, 5, dtype=torch.double)
    visible = torch.ones(2, 7, dtype=torch.bool)
    if masked:
        visible[0, :3] = visible[1, 2:6] = False
    expected = torch.zeros_like(q)
    for b in range(2):
        for h in range(heads):
            g = h * kv_heads // heads
            weights = [math.exp(q[b, h, 0] @ k[b, g, s] / math.sqrt(5)) * float(visible[b, s])
                       for s in range(7)]
            expected[b, h, 0] = sum(w * v[b, g, s] for s, w in enumerate(weights)) / sum(weights)
    mask = visible[:, None, None] if masked else None
    for order in (lambda x: x, lambda x: x.mT.contiguous().mT):
        close(model_module.attend_once(q, order(k), order(v), mask), expected, 1e-12)


def test_stream_is_generate_step_by_step(gpt):
    responses = [[] for _ in PROMPTS]
    for rows, tokens in stream(gpt, PROMPTS, 9, temperature=0, stop_token=13):
        for row, token in zip(rows, tokens, strict=True):
            responses[row].append(token)
    assert responses == gpt.generate(PROMPTS, 9, temperature=0, stop_token=13)


def test_respond_keeps_the_order_of_the_prompts(gpt, capfd):
    class Words:
        end = 13

        def response_text(self, ids, stop):
            return " ".join(map(str, ids)), self.end in ids

    expected = gpt.generate(PROMPTS, 5, temperature=0, stop_token=13)
    responses = respond(gpt, [Prompt([], ids) for ids in PROMPTS], Words(), 5, seed=1, title="t",
                        batch_size=2, temperature=0)
    assert [response.ids for response in responses] == expected
    assert [response.ended for response in responses] == [13 in ids for ids in expected]
    assert "t:" in capfd.readouterr().err


def test_the_seed_of_respond_decides(gpt):
    class Words:
        end = 13

        def response_text(self, ids, stop):
            return "", True

    first, again, other = (respond(gpt, [Prompt([], ids) for ids in PROMPTS], Words(), 5, seed=seed)
                           for seed in (1, 1, 2))
    assert first == again != other


def test_generation_leaves_no_gradient(gpt):
    gpt.generate(PROMPTS, 3)
    assert all(p.grad is None for p in gpt.parameters())


# -------------------------------------------------------------------- initialisation, head, dropout

def test_the_output_head_is_the_input_embedding():
    gpt = small()
    assert [name for name, p in gpt.named_parameters() if V in p.shape] == ["wte.weight"]
    tokens = torch.tensor(PROMPTS[:1])
    weight = gpt.wte.weight

    def gradient(logits):
        return torch.autograd.grad(logits.logsumexp(-1).sum(), weight)[0]
    total = gradient(gpt(tokens))
    as_input = gradient(F.linear(gpt.hidden(tokens), weight.detach()))
    as_output = gradient(F.linear(gpt.hidden(tokens).detach(), weight))
    assert as_input.norm() > 0.1 and as_output.norm() > 0.1
    assert as_input[12].norm() == 0 and as_output[12].norm() > 0        # id 12 is not in the prompt
    close(total, as_input + as_output, 1e-4)


@pytest.mark.parametrize("layers", [2, 8])
def test_residual_projections_start_smaller(layers):
    gpt = GPT(GPTConfig(64, 64, layers, 2, 64))
    for block in gpt.blocks:
        inner = torch.cat([block.attention.qkv.weight.flatten(),
                           block.up.weight.flatten()]).std().item()
        for residual in (block.attention.proj.weight, block.down.weight):
            assert residual.std().item() / inner == pytest.approx(
                1 / math.sqrt(2 * layers), rel=0.06)
    assert all((p == 0).all() for name, p in gpt.named_parameters() if name.endswith("bias"))
    # 0.02 is GPT-2's.
    assert GPT(GPTConfig(8, 64, 1, 2, 768)).wte.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="n_embd 16.*n_head 3"):
        small(n_head=3)


def test_no_bias_means_none():
    gpt = small(bias=False)
    assert not [name for name, _ in gpt.named_parameters() if "bias" in name]
    assert gpt.generate([[1, 2]], 3, temperature=0) == [greedy_by_hand(gpt, [1, 2], 3)]


def test_dropout_rises_linearly_over_the_layers(monkeypatch):
    """0 at the first block, config.dropout at the last, for both residual branches."""
    seen, dropout = [], F.dropout

    def record(x, p=0.5, training=True, inplace=False):
        seen.append((float(p), bool(training)))
        return dropout(x, p, training, inplace)
    monkeypatch.setattr(F, "dropout", record)
    gpt = small(n_layer=4, dropout=0.3).train()
    gpt(torch.tensor(PROMPTS[:1]))
    active = [p for p, training in seen if training and p > 0]  # the first block may skip the call
    assert active == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    seen.clear()
    gpt.eval()(torch.tensor(PROMPTS[:1]))
    assert not any(training and p > 0 for p, training in seen)


# ----------------------------------------------------------------------- logprobs and the one shift

def test_before_is_one_place_earlier():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    assert before(mask).tolist() == [[True, True, False, False], [False, True, True, False]]
    assert before(mask).dtype == torch.bool
    gpt = small()
    with pytest.raises(ValueError, match="must match"):     # nothing comes before the first token
        gpt.logprobs(torch.tensor(PROMPTS[:1]), torch.ones(1, 8))


@pytest.mark.parametrize("situation", ["right padding", "left padding", "several texts in a row",
                                       "behind a cache"])
@pytest.mark.parametrize("wanted", [
    [[4], [], [1, 5, 6], [7]], [[0], [0], [0], [0]], [[], [], [], []],
    [[1, 2, 3, 4, 5, 6], [0, 7], [3], []]])
def test_wanted_states_are_those_of_the_whole_pass(situation, wanted):
    """With few wanted states the last block computes no others: numbers and gradients of every
    parameter are the same."""
    gpt = small(n_layer=3).double()
    torch.manual_seed(5)
    tokens = torch.randint(0, V, (4, 8))
    at = torch.zeros(4, 8, dtype=torch.bool)
    for row, columns in enumerate(wanted):
        at[row, columns] = True
    kwargs = {}
    if situation == "left padding":
        kwargs["attention_mask"] = torch.arange(8) >= torch.tensor([3, 0, 1, 2])[:, None]
    elif situation == "several texts in a row":
        part = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
        kwargs["attention_mask"] = ((part[:, None] == part) | (part == 0)).expand(4, 8, 8)
        kwargs["positions"] = torch.tensor([0, 1, 2, 3, 4, 2, 3, 4]).expand(4, 8)

    def states(**more):
        cache = None
        if situation == "behind a cache":
            cache = KVCache(gpt.config, 4, 12, gpt.wte.weight)
            with torch.no_grad():
                gpt.hidden(tokens[:, :3], cache=cache)
        found = gpt.hidden(tokens, **kwargs, cache=cache, **more)
        assert cache is None or cache.length == 11
        return found

    def gradients(chosen):
        gpt.zero_grad()
        if situation != "behind a cache":                   # written in place: for sampling only
            (chosen * torch.linspace(-1, 1, chosen.numel(), dtype=torch.double)
             .view_as(chosen)).sum().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in gpt.parameters()]

    few, all_ = states(wanted=at), states()[at]
    assert few.shape == (int(at.sum()), 16)
    close(few, all_, 1e-12)
    for a, b in zip(gradients(few), gradients(all_)):
        close(a, b, 1e-10)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_by_hand(gpt, temperature):
    tokens, lengths = right_padded(PROMPTS[:1] + PROMPTS[3:5], pad=9, extra=2)
    mask = torch.zeros_like(tokens)
    mask[0, [1, 3, 7]] = mask[2, 4:6] = 1                       # row 1 has no response at all
    logprobs, entropies = gpt.logprobs(tokens, mask, temperature)
    log_p = (gpt(tokens) / temperature).log_softmax(-1)
    for b in range(3):
        for t in range(tokens.shape[1]):
            if mask[b, t]:
                close(logprobs[b, t], log_p[b, t - 1, tokens[b, t]])
                close(entropies[b, t], -(log_p[b, t - 1].exp() * log_p[b, t - 1]).sum())
            else:
                assert logprobs[b, t] == 0 and entropies[b, t] == 0         # exactly
    assert (logprobs[mask.bool()] < 0).all() and (entropies[mask.bool()] > 0).all()
    assert torch.equal(gpt.logprobs(tokens, mask.bool(), temperature)[0], logprobs)


def test_logprobs_of_nothing_are_zero_with_a_gradient_of_zero():
    gpt = small()
    logprobs, entropies = gpt.logprobs(torch.tensor(PROMPTS[:1]), torch.zeros(1, 8))
    assert (logprobs.shape == entropies.shape == (1, 8)
            and not logprobs.any() and not entropies.any())
    (logprobs.sum() + entropies.sum()).backward()
    assert all(p.grad is None or not p.grad.any() for p in gpt.parameters())


def test_logprobs_have_the_gradient_of_the_definition():
    gradients = []
    tokens = torch.tensor(PROMPTS[:1])
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1]])
    for by_hand in (False, True):
        gpt = small().double()
        if by_hand:
            log_p = gpt(tokens)[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
            (log_p * mask[:, 1:]).sum().backward()
        else:
            gpt.logprobs(tokens, mask)[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in gpt.parameters()]))
    assert gradients[0].norm() > 1
    close(*gradients, atol=1e-9)


def test_logprobs_are_the_same_twice_under_autocast(gpt):
    """The ratio of the first minibatch is 1 exactly, in low precision too."""
    tokens, mask = torch.tensor(PROMPTS[:1]), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            old, _ = gpt.logprobs(tokens, mask)
        new, _ = gpt.logprobs(tokens, mask)
    assert torch.equal(old, new) and old.dtype == torch.float32
    close(old, gpt.logprobs(tokens, mask)[0], 0.2)


# ----------------------------------------------------------------------------- reward model

@pytest.fixture(scope="module")
def reward_model():
    gpt = small()
    torch.manual_seed(3)
    return RewardModel(gpt).eval()


EOS = 13
DIALOGUES = [[3, EOS, 4, 1, 5, 9, EOS], [EOS, 8, EOS], [7, EOS], [2, EOS, EOS, 1, 8, 2, 8, 1, 8],
             [EOS]]


@pytest.mark.parametrize("pad", [EOS, 0, 8])
def test_score_reads_the_last_real_token(reward_model, pad):
    """Whatever stands behind it (padding may be the EOS itself), and with EOS inside the prompt."""
    tokens, lengths = right_padded(DIALOGUES, pad, extra=5)
    scores = reward_model(tokens, lengths)
    assert scores.shape == (len(DIALOGUES),)
    for i, row in enumerate(DIALOGUES):
        states = reward_model.gpt.hidden(torch.tensor([row]))[0]
        close(scores[i], states[-1] @ reward_model.head.weight[0])
        close(scores[i], reward_model.scalars(torch.tensor([row]))[0, -1])
    tokens[:, -5:] = 17
    close(reward_model(tokens, lengths), scores)
    tokens[torch.arange(len(tokens)), lengths - 1] = 19
    assert ((reward_model(tokens, lengths) - scores).abs() > 1e-3).all()


def test_score_does_not_depend_on_the_batch(reward_model):
    tokens, lengths = right_padded(DIALOGUES)
    scores = reward_model(tokens, lengths)
    assert scores.std() > 0.1
    order = torch.tensor([4, 2, 0, 3, 1])
    close(reward_model(tokens[order], lengths[order]), scores[order])
    close(torch.cat([reward_model(tokens[i:i + 1], lengths[i:i + 1]) for i in range(len(tokens))]),
          scores)
    close(reward_model(tokens.repeat(7, 1), lengths.repeat(7)), scores.repeat(7))


def test_head_is_one_scalar_and_the_seed_decides_it():
    def head(seed):
        gpt = small()
        torch.manual_seed(seed)
        return RewardModel(gpt).head.weight
    assert head(1).shape == (1, 16)
    assert torch.equal(head(1), head(1)) and not torch.equal(head(1), head(2))
    wide = RewardModel(GPT(GPTConfig(4, 8, 1, 1, 2048))).head.weight
    assert wide.std().item() == pytest.approx(1 / math.sqrt(2049), rel=0.1)


def test_bias_is_subtracted_everywhere():
    reward_model = RewardModel(small()).eval()
    tokens, lengths = right_padded(DIALOGUES)
    scores, scalars = reward_model(tokens, lengths), reward_model.scalars(tokens)
    reward_model.bias.fill_(1.5)
    close(reward_model(tokens, lengths), scores - 1.5)
    close(reward_model.scalars(tokens), scalars - 1.5)
    assert reward_model.scalars(tokens).shape == tokens.shape
    assert ("bias" in reward_model.state_dict()
            and "bias" not in dict(reward_model.named_parameters()))


# ----------------------------------------------------------------------------- checkpoints

def saved(folder, kind="language model", seed=0):
    """A checkpoint and the model it holds."""
    gpt = small(seed)
    model = gpt if kind == "language model" else RewardModel(gpt).eval()
    if kind == "reward model":
        model.bias.fill_(0.75)
    save_checkpoint(folder, model, kind, gpt.config, tokenizer="tinytown")
    return model


def test_language_model_survives_the_disk(tmp_path):
    gpt = saved(tmp_path / "a")
    loaded, tokenizer = load_gpt(str(tmp_path / "a"), dropout=0.25)
    tokens = torch.tensor(PROMPTS[:1])
    assert torch.equal(loaded.eval()(tokens), gpt(tokens))
    assert tokenizer.name == "tinytown" and loaded.config.dropout == 0.25
    assert load_gpt(str(tmp_path / "a"))[0].config.dropout == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.json", "model.pt"]
    state = torch.load(tmp_path / "a" / "model.pt", weights_only=True)
    assert type(state) is dict and all(tensor.dtype == torch.float32 for tensor in state.values())


def test_reward_model_survives_the_disk(tmp_path):
    reward_model = saved(tmp_path, "reward model")
    loaded, tokenizer = load_reward_model(str(tmp_path))
    tokens, lengths = right_padded(DIALOGUES)
    assert torch.equal(loaded.eval()(tokens, lengths), reward_model(tokens, lengths))
    assert float(loaded.bias) == 0.75 and tokenizer.name == "tinytown"


def test_low_precision_is_saved_as_fp32(tmp_path):
    gpt = small().to(torch.bfloat16)
    save_checkpoint(tmp_path, gpt, "language model", gpt.config, tokenizer="tinytown")
    assert {x.dtype for x in torch.load(tmp_path / "model.pt",
                                        weights_only=True).values()} == {torch.float32}
    loaded, _ = load_gpt(str(tmp_path))
    assert (torch.equal(loaded.wte.weight, gpt.wte.weight.float())
            and loaded.wte.weight.dtype == torch.float32)


def complaint(load, folder):
    """The one line with which `load` refuses `folder`."""
    with pytest.raises(InputError) as caught:
        load(str(folder))
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and str(folder) in message
    return message


def test_checkpoint_of_the_wrong_kind(tmp_path):
    saved(tmp_path / "lm")
    saved(tmp_path / "rm", "reward model")
    assert "language model" in complaint(load_reward_model, tmp_path / "lm")
    assert "reward model" in complaint(load_gpt, tmp_path / "rm")


@pytest.mark.parametrize("load", [load_gpt, load_reward_model])
def test_missing_checkpoint(tmp_path, load):
    complaint(load, tmp_path / "nowhere")
    complaint(load, tmp_path)                                   # a folder with nothing in it
    (tmp_path / "file").write_text("")
    complaint(load, tmp_path / "file")


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint\n", "half"])
def test_broken_weights(tmp_path, content):
    saved(tmp_path)
    path = tmp_path / "model.pt"
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[:len(whole) // 2] if content == "half" else content)
    complaint(load_gpt, tmp_path)


def test_weights_that_would_run_code_are_refused(tmp_path):
    saved(tmp_path)
    torch.save({"wte.weight": print}, tmp_path / "model.pt")    # a pickled function
    complaint(load_gpt, tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"3", b"\xff\xfe"])
def test_broken_description(tmp_path, content):
    saved(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    complaint(load_gpt, tmp_path)


def test_description_that_does_not_fit_the_weights(tmp_path):
    saved(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    for change in ({"n_layer": 2}, {"n_embd": 32}):
        changed = description | {"model": description["model"] | change}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        complaint(load_gpt, tmp_path)
    for gone in ("model", "tokenizer"):
        (tmp_path / "config.json").write_text(
            json.dumps({k: v for k, v in description.items() if k != gone}))
        complaint(load_gpt, tmp_path)
