"""Best-of-n: sample n responses, keep the one that the reward model likes best. No training.

    P(y) = p(y)/P(r = r_y) · [P(r ≤ r_y)ⁿ − P(r < r_y)ⁿ]                   → best_of_n_distribution
    KL(best-of-n ‖ π) ≤ log n − (n − 1)/n, equal without ties              → best_of_n_kl
    E[x of the best of n] = Σ_{i≥n} C(i−1, n−1)/C(N, n) · x_(i)            → best_of_n_mean

The KL is also measured: π(y|x) of the chosen response is exact, P(r < r_y) is estimated from other
samples of the same prompt (→ measured_best_of_n_kl).

The curve over n = 1, 2, 4, … comes from one pool of N samples a prompt, for a reward model, for
the gold score itself, and for a choice at random: what the proxy promises, and what it is worth.

    python -m systems.best_of_n --run out/tinytown
"""
import math
import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.run import DeviceFlags, load_gpt, main, start, write_json
from data.batches import Prompt, read_prompt_rows
from data.tinytown.gold import gold_scores
from data.tinytown.report import markdown
from data.tokenizer import Tokenizer
from model import GPT
from rollout import (Response, Reward, ended_scores, load_reward, respond, sequence_logprobs,
                     win_rate)


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # folder of a Tinytown run: its sft and rm are read
    reward: str = ""               # reward model; empty: rm inside run
    data: str = ""                 # test prompts; empty: data/test.jsonl inside run
    pool: int = 256                # N, samples of each prompt, for the curve
    curve_prompts: int = 200       # prompts of the curve
    n: int = 16                    # samples from which the best is chosen, for wins and KL
    opponents: int = 4             # SFT responses that each chosen one is compared with
    kl_prompts: int = 60           # prompts on which the KL is measured
    kl_samples: int = 32           # further samples of each of them
    missing_end_score: float = -3.0   # of a response that never ends, as in PPO
    max_new_tokens: int = 48


LIMITS = dict(pool=(2, 1000), curve_prompts=(1, 10**6), n=(2, 1000), opponents=(1, 1000),
              kl_prompts=(1, 10**6), kl_samples=(2, 10**6))


# ----------------------------------------------------------------------------- equations

def best_of_n_kl(n: int) -> float:
    """KL(best-of-n ‖ policy) = log n − (n − 1)/n nats for rewards without ties; an upper bound with
    them."""
    return math.log(n) - (n - 1) / n


def best_of_n_distribution(probs: Tensor, rewards: Tensor, n: int) -> Tensor:
    """Distribution of the best of n draws by reward: P(y) = p(y)/P(r = r_y) · [P(r ≤ r_y)ⁿ −
    P(r < r_y)ⁿ].

    probs, rewards (R,): of every possible response. Responses of equal reward share in proportion
    to p. Returns (R,).
    """
    at_most = (probs * (rewards <= rewards[:, None])).sum(-1)               # (R,)
    below = (probs * (rewards < rewards[:, None])).sum(-1)                  # (R,)
    return probs / (at_most - below) * (at_most ** n - below ** n)


def best_of_n_mean(proxy: Tensor, values: Tensor, n: int) -> Tensor:
    """Mean of `values` over the best of n by `proxy`, over all C(N, n) ways to draw n of the N
    samples:

        Σ_{i=n}^{N} C(i−1, n−1)/C(N, n) · x_(i),   x_(i): the value at the i-th lowest proxy

    proxy, values (N,) or (…, N), of one prompt each. Returns a scalar or (…). The i-th lowest is
    the best of n if the others come from the i − 1 below it. Equal proxies share their value evenly
    (a choice at random among them). Unbiased, and from all samples; the best of the first n would
    use n of them. Raises ValueError unless 1 ≤ n ≤ N.
    """
    N = proxy.shape[-1]
    if not 1 <= n <= N:
        raise ValueError(f"the best of {n} of {N} samples")
    log_ways = [math.lgamma(i) - math.lgamma(n) - math.lgamma(i - n + 1) if i >= n else -math.inf
                for i in range(1, N + 1)]                                   # log C(i−1, n−1)
    all_ways = math.lgamma(N + 1) - math.lgamma(n + 1) - math.lgamma(N - n + 1)     # log C(N, n)
    weights = (torch.tensor(log_ways, dtype=torch.float64) - all_ways).exp()        # (N,)
    # The i-th lowest of several equal ones is any of them: their values' mean stands at each.
    equal = (proxy[..., :, None] == proxy[..., None, :]).double()           # (…, N, N)
    shared = (equal @ values.double()[..., None])[..., 0] / equal.sum(-1)   # (…, N)
    return (shared.gather(-1, proxy.argsort(-1)) * weights).sum(-1)


def measured_best_of_n_kl(logprobs: Tensor, below: Tensor, n: int) -> Tensor:
    """Mean over chosen responses of log P_best-of-n(y)/p(y) = log[((F + p)ⁿ − Fⁿ)/p] =
    log Σ_k (F + p)ᵏ Fⁿ⁻¹⁻ᵏ.

    p = π(y|x) is exact. The sum is the difference without its cancellation: p may be far below F's
    last digit. logprobs (B,): log π(y|x) of the response chosen from n. below (B,): estimate of
    F = P(r < r_y) from other samples.
    """
    p = logprobs.double().exp()                                             # (B,)
    below = torch.minimum(below.double(), 1 - p)                            # (B,)
    k = torch.arange(n, dtype=torch.float64, device=p.device)                       # (n,)
    terms = (below + p)[:, None] ** k * below[:, None] ** (n - 1 - k)               # (B, n)
    return terms.sum(-1).log().mean()


def choose(pool: list, proxy: Tensor, n: int) -> tuple[list, Tensor]:
    """(the response of highest proxy score among each n in a row, its score). proxy (P · n,)."""
    proxy = proxy.view(-1, n)                                                       # (P, n)
    best = proxy.argmax(-1).tolist()
    return [pool[i * n + k] for i, k in enumerate(best)], proxy.max(-1).values


# ----------------------------------------------------------------------------- measuring

class Chosen(NamedTuple):
    """The best of n responses to each prompt, and KL(best-of-n ‖ policy), measured, in nats."""
    responses: list[Response]
    kl: float


def several(policy: GPT, prompts: list[Prompt], count: int, tokenizer: Tokenizer, title: str,
            config) -> list[Response]:
    """`count` responses to each prompt, one after the other, from random numbers of their own."""
    asked = [prompt for prompt in prompts for _ in range(count)]
    return respond(policy, asked, tokenizer, config.max_new_tokens, title=title,
                   seed=seed_of(config.seed, title))


def seed_of(seed: int, title: str) -> int:
    """A seed for one sample of a run: what is sampled beside it does not change it."""
    return zlib.crc32(f"{seed} {title}".encode())


def best_of_n(policy: GPT, reward: Reward, prompts: list[Prompt], tokenizer: Tokenizer,
              config) -> Chosen:
    """Choose, and measure the KL on some of the prompts. config: of this file, or one with its n,
    kl_prompts, kl_samples, missing_end_score, max_new_tokens and seed."""
    n = config.n
    pool = several(policy, prompts, n, tokenizer, f"best of {n}", config)
    asked = [prompt for prompt in prompts for _ in range(n)]
    proxy = torch.tensor(ended_scores(reward, asked, pool, config.missing_end_score))
    chosen, highest = choose(pool, proxy, n)

    count = min(config.kl_prompts, len(prompts))
    some = random.Random(config.seed).sample(range(len(prompts)), count)
    few = [prompts[i] for i in some]
    others = several(policy, few, config.kl_samples, tokenizer, "kl", config)
    asked = [prompt for prompt in few for _ in range(config.kl_samples)]
    other_proxy = torch.tensor(ended_scores(reward, asked, others, config.missing_end_score))
    other_proxy = other_proxy.view(len(some), -1)                                   # (S, m)
    # A response that was drawn twice is scored twice, to the last digit or not.
    below = (other_proxy < highest[some][:, None] - 1e-5).double().mean(-1)
    logprobs = sequence_logprobs(policy, few, [chosen[i] for i in some], tokenizer.pad)
    return Chosen(chosen, measured_best_of_n_kl(logprobs, below, n).item())


class Pool(NamedTuple):
    """N samples of the policy to each of P prompts: what they are worth, (P, N) each."""
    gold: Tensor
    length: Tensor                     # tokens
    responses: list[Response]          # prompt after prompt
    prompts: list[Prompt]


def sample_pool(policy: GPT, prompts: list[Prompt], count: int, tokenizer: Tokenizer,
                config) -> Pool:
    """Sample, and grade by the gold score; no reward model is asked."""
    responses = several(policy, prompts, count, tokenizer, "pool", config)
    asked = [prompt for prompt in prompts for _ in range(count)]
    gold = torch.tensor(gold_scores(asked, responses)).view(-1, count)
    length = torch.tensor([float(len(response.ids)) for response in responses]).view(-1, count)
    return Pool(gold, length, responses, prompts)


def pool_scores(pool: Pool, reward: Reward, missing_end_score: float) -> Tensor:
    """A reward model's scores of the pool, (P, N)."""
    count = pool.gold.shape[1]
    asked = [prompt for prompt in pool.prompts for _ in range(count)]
    found = ended_scores(reward, asked, pool.responses, missing_end_score)
    return torch.tensor(found).view(-1, count)


def curve(pool: Pool, proxy: Tensor) -> list[dict[str, float]]:
    """One row for each n = 1, 2, 4, … up to N: the proxy's promise, gold, its standard error over
    prompts, how far gold is below its highest mean of all n, the error of that difference (prompt
    by prompt), length, and the bound on the KL in nats, when the best of n by `proxy` is taken."""
    sizes = [2 ** k for k in range(proxy.shape[1].bit_length())]
    golds = [best_of_n_mean(proxy, pool.gold, n) for n in sizes]            # (P,) each
    peak, rows = max(golds, key=lambda gold: gold.mean().item()), []
    for n, gold in zip(sizes, golds):
        rows.append({"n": n, "kl": best_of_n_kl(n), "proxy": best_of_n_mean(proxy, proxy, n).mean(),
                     "gold": gold.mean(), "error": gold.std() / math.sqrt(len(gold)),
                     "below_peak": (peak - gold).mean(),
                     "below_peak_error": (peak - gold).std() / math.sqrt(len(gold)),
                     "length": best_of_n_mean(proxy, pool.length, n).mean()})
    return [{name: value if name == "n" else float(value) for name, value in row.items()}
            for row in rows]


def loaded(config: Config) -> tuple[GPT, Tokenizer, Reward, list[Prompt]]:
    """The SFT model of a run, its tokenizer, a reward model and the test prompts."""
    run, folder = start(config, LIMITS), Path(config.run)
    policy, tokenizer = load_gpt(str(folder / "sft"))
    policy = run.freeze(policy)
    reward, _ = load_reward(config.reward or str(folder / "rm"), tokenizer, run)
    prompts = read_prompt_rows((config.data or str(folder / "data" / "test.jsonl"),), tokenizer,
                               policy.config.block_size - config.max_new_tokens)
    return policy, tokenizer, reward, prompts


def curves(config: Config) -> dict[str, list[dict[str, float]]]:
    """The curve by the reward model, by gold itself and by chance; prints a table."""
    policy, tokenizer, reward, prompts = loaded(config)
    pool = sample_pool(policy, prompts[:config.curve_prompts], config.pool, tokenizer, config)
    chance = torch.rand(pool.gold.shape, generator=torch.Generator().manual_seed(config.seed))
    found = {"reward model": curve(pool, pool_scores(pool, reward, config.missing_end_score)),
             "gold itself": curve(pool, pool.gold), "at random": curve(pool, chance)}
    print(f"best of n on {len(pool.prompts)} prompts, temperature 1, seed {config.seed}:\n\n"
          + curve_table(found))
    return found


def curve_table(found: dict[str, list[dict[str, float]]]) -> str:
    """Gold by who chooses, and the first chooser's proxy and lengths, over n."""
    first = next(iter(found))
    head = ["n", "KL at most", *(f"gold, by {name}" for name in found), "its proxy", "its length"]
    rows = []
    for place, row in enumerate(found[first]):
        cells = [f"{one[place]['gold']:.3f} ± {one[place]['error']:.3f}"
                 for one in found.values()]
        rows.append([str(row["n"]), f"{row['kl']:.2f}", *cells, f"{row['proxy']:.2f}",
                     f"{row['length']:.1f}"])
    return markdown(head, rows)


def measure(config: Config) -> dict[str, float]:
    """Print and return what choosing among n responses of the SFT model buys, by the gold score."""
    policy, tokenizer, reward, prompts = loaded(config)
    chosen, kl = best_of_n(policy, reward, prompts, tokenizer, config)
    opponents = several(policy, prompts, config.opponents, tokenizer, "opponents", config)
    repeated = [prompt for prompt in prompts for _ in range(config.opponents)]
    gold = torch.tensor(gold_scores(prompts, chosen))
    baseline = torch.tensor(gold_scores(repeated, opponents)).view(len(prompts), -1)
    rate, error = win_rate(gold, baseline)
    found = {"gold": gold.mean().item(), "win_rate": rate, "standard_error": error,
             "proxy": torch.tensor(reward(prompts, chosen)).mean().item(), "kl": kl,
             "kl_bound": best_of_n_kl(config.n),
             "length": sum(len(response.ids) for response in chosen) / len(chosen)}
    print(f"best of {config.n} on {len(prompts)} prompts, temperature 1, seed {config.seed}: gold "
          f"{found['gold']:.3f}, wins against SFT {100 * rate:.1f} ± {100 * error:.1f} %, proxy "
          f"{found['proxy']:.2f}, length {found['length']:.1f}")
    print(f"KL of best of {config.n}: measured {kl:.2f}, log n − (n−1)/n = "
          f"{found['kl_bound']:.2f}")
    return found


def both(config: Config) -> None:
    """The curve, then wins and KL of one n."""
    folder = Path(config.run) / "systems" / "best_of_n"
    found = curves(config)
    write_json(folder / "table.json", {"curves": found} | measure(config), indent=1)


if __name__ == "__main__":
    main(both, Config)
