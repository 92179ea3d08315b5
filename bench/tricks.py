"""What each trick in model.py, kernels.py and data/batches.py gains: with it against without it,
all else equal, on the CPU.

    python -m bench.tricks
"""
import random
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import model as model_module
from bench.compare import SIZES, emit, interleave, row
from common.run import adamw
from data import batches
from data.batches import RankingRow, buckets, pad_rows, ranking_batch, response_row
from kernels import gelu, linear, token_logprobs
from model import GPT, GPTConfig, KVCache, RewardModel, attend_once, before, sample_token
from train_rm import ranking_loss, ranking_rewards
from train_sft import sft_loss

ROUNDS = 7
draw = random.Random(0)


def small() -> GPT:
    """Tinytown's model, with a context that all cases fit into."""
    layers, heads, width, vocabulary, context = SIZES["0.86 M"]
    return GPT(GPTConfig(context, vocabulary, layers, heads, width))


def compare(what: str, with_it, without, unit: str, amount: float = 1, repeat: int = 1) -> None:
    """Print the row of one trick: each side is called `repeat` times a round. amount: units of
    work a call."""
    def repeated(function):
        def run():
            for _ in range(repeat):
                function()
        return run

    seconds = interleave({"with": repeated(with_it), "without": repeated(without)}, ROUNDS)
    emit(row(what, "the same without it", seconds["with"], seconds["without"], amount * repeat,
             unit))


def ids(length: int) -> list[int]:
    return [draw.randrange(1, 500) for _ in range(length)]


def backward(loss: Tensor, *parameters: Tensor) -> None:
    """The backward pass, its gradients thrown away."""
    loss.backward()
    for parameter in parameters:
        parameter.grad = None


# ----------------------------------------------------------------------------- kernels.py

def few_rows() -> None:
    x, weight = torch.randn(8, 768), torch.randn(50304, 768)
    with torch.no_grad():
        compare("linear as (W·xᵀ)ᵀ: 8 rows, GPT-2's head", lambda: linear(x, weight),
                lambda: F.linear(x, weight), "products/s", repeat=8)


def logits_of_a_chunk() -> None:
    hidden, weight = torch.randn(256, 768), torch.randn(50257, 768)
    compare("logits as W·hᵀ, (V, n): 256 tokens, GPT-2's head", lambda: weight @ hidden.T,
            lambda: hidden @ weight.T, "products/s", repeat=2)


def gelu_by_sigmoid() -> None:
    x = torch.randn(1000, 512, requires_grad=True)
    compare("gelu by σ: 1,000 × 512, forward and backward",
            lambda: backward(gelu(x).sum(), x),
            lambda: backward(F.gelu(x, approximate="tanh").sum(), x), "calls/s", repeat=30)


# ----------------------------------------------------------------------------- model.py: training

def last_block() -> None:
    model = RewardModel(small())
    tokens, parameters = torch.randint(0, 500, (32, 96)), list(model.parameters())
    ends = (torch.arange(96) == 95).expand(32, 96)
    compare("last block only where it is read: reward model, 32 × 96",
            lambda: backward(model.scalars(tokens, wanted=ends).sum(), *parameters),
            lambda: backward(model.scalars(tokens)[ends].sum(), *parameters), "steps/s", repeat=4)


def head_only_where_masked() -> None:
    model = GPT(GPTConfig(256, 50304, 2, 2, 64))
    tokens, parameters = torch.randint(0, 500, (8, 96)), list(model.parameters())
    columns = torch.arange(96).expand(8, 96)

    def step(mask: Tensor) -> None:    # the whole last block on both sides
        states = model.hidden(tokens)[before(mask)]
        logprobs, _ = token_logprobs(states, model.output_weight, tokens[mask], equal_weights=True)
        backward(-logprobs.mean(), *parameters)

    compare("output head only at response tokens: 8 × (64 + 32), GPT-2's vocabulary",
            lambda: step(columns >= 64), lambda: step(columns >= 1), "steps/s")


def fused_adamw() -> None:
    models = [small(), small()]
    for model in models:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    fused, plain = adamw(models[0], 1e-4), torch.optim.AdamW(models[1].parameters(), 1e-4)
    compare("AdamW fused: 0.86 M parameters", fused.step, plain.step, "steps/s", repeat=50)


# ----------------------------------------------------------------------------- data/batches.py

def packing() -> None:
    model, rows = RewardModel(small()), []
    parameters = list(model.parameters())
    for _ in range(16):
        K = draw.randint(4, 9)
        prompt, responses = ids(draw.randint(8, 40)), [ids(draw.randint(4, 30)) for _ in range(K)]
        rows.append(RankingRow(prompt, responses, [float(k) for k in range(K)]))

    def step() -> None:
        batch = ranking_batch(rows, pad=0)
        backward(ranking_loss(ranking_rewards(model, batch), batch.scores, batch.mask), *parameters)

    compare("a ranking in one row: 16 rankings of K = 4 to 9", step,
            patched(batches, "PACKED", 1, step), "steps/s", repeat=3)


def bucketing() -> None:
    model = small()
    parameters = list(model.parameters())
    lengths = [draw.randint(10, 120) for _ in range(256)]
    rows = [response_row(ids(length // 2), ids(length - length // 2)) for length in lengths]
    similar, shuffled = buckets(rows, 32, 1, draw), draw.sample(rows, len(rows))
    mixed = [shuffled[first:first + 32] for first in range(0, len(rows), 32)]

    def epoch(plan) -> None:
        for batch in plan:
            tokens, mask, _ = pad_rows(batch, pad=0)
            backward(sft_loss(model.loglikelihood(tokens, mask), mask), *parameters)

    compare("batches of similar length: SFT, rows of 10 to 120 tokens", lambda: epoch(similar),
            lambda: epoch(mixed), "rows/s", len(rows))


# ----------------------------------------------------------------------------- model.py: generation

def sampling() -> None:
    logits = torch.randn(16, 50304)
    compare("a token by the inverse of the distribution: 16 × 50,304",
            lambda: sample_token(logits, torch.rand(16), 1.0, None, 1.0),
            lambda: torch.multinomial(logits.softmax(-1), 1), "tokens/s", 16, repeat=4)


class GrowingCache(KVCache):
    """The cache as it is usually written: grown by concatenation."""

    def __init__(self, config: GPTConfig, batch: int, size: int, like: Tensor):
        super().__init__(config, batch, 0, like)
        self.layers = list(zip(self.keys, self.values))                # (B, G, D, 0) each

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        both = zip(self.layers[layer], (key, value))
        self.layers[layer] = tuple(torch.cat([old, new.mT], 3) for old, new in both)
        return tuple(x.mT for x in self.layers[layer])

    def take(self, rows: Tensor) -> None:
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]


def one_query() -> None:
    q, k, v = torch.randn(64, 4, 1, 32), *torch.randn(2, 64, 4, 32, 96).mT     # as KVCache has them
    plain_k, plain_v = k.contiguous(), v.contiguous()
    with torch.no_grad():
        compare("attention of one query by two products: 64 rows, 4 heads, 96 tokens",
                lambda: attend_once(q, k, v, None),
                lambda: F.scaled_dot_product_attention(q, plain_k, plain_v), "steps/s", repeat=100)


def take_by_copy(self: KVCache, rows: Tensor) -> None:
    """`KVCache.take` without its care for rows that stay."""
    self.keys, self.values = self.keys[:, rows], self.values[:, rows]


def patched(place, name: str, value, function):
    """The function, called while place.name is another value."""
    def run():
        with mock.patch.object(place, name, value):
            function()
    return run


def generation() -> None:
    model = small().eval()
    same, different = [ids(64)] * 64, [ids(64) for _ in range(64)]
    tokens = 64 * 32
    compare("a prompt sampled 64 times read once: 64 + 32 tokens",
            lambda: model.generate(same, 32), lambda: model.generate(different, 32),
            "tokens/s", tokens)
    compare("cache written in place: 64 × (64 + 32)", lambda: model.generate(different, 32),
            patched(model_module, "KVCache", GrowingCache, lambda: model.generate(different, 32)),
            "tokens/s", tokens)


def finished_rows() -> None:
    model = small().eval()
    # A logit of 4 everywhere for token 7, so that rows end after some 20 tokens, as Tinytown's do.
    with torch.no_grad():
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[7] = 4 / model.config.n_embd
    prompts = [ids(24) for _ in range(512)]

    def until_end() -> int:
        torch.manual_seed(0)
        return sum(map(len, model.generate(prompts, 48, stop_token=7)))

    written = until_end()
    compare(f"finished rows leave the batch in place: 512 responses of {written / 512:.0f} tokens",
            until_end, patched(KVCache, "take", take_by_copy, until_end), "tokens/s", written)


def main() -> None:
    torch.manual_seed(0)
    for trick in (few_rows, logits_of_a_chunk, gelu_by_sigmoid, last_block, head_only_where_masked,
                  fused_adamw, packing, bucketing, sampling, one_query, generation,
                  finished_rows):
        trick()


if __name__ == "__main__":
    main()
