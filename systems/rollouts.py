"""A page of rollouts: every token of a response coloured by what PPO would make of it.

    KL          k1 = log π(a_t) − log π_ref(a_t), nats      → train_ppo.kl_estimates
    reward      R_t = −β·k1 + 1[t = last]·score             → train_ppo.kl_penalized_rewards
    advantage   A_t, γ = 1, λ = 0.95, not whitened          → train_ppo.gae

V is the reward model read before each token, which is where PPO's value model begins; a score is
the reward model's, whether or not the response ended. `python sample.py --html FILE` writes it.
"""
import codecs
import json
from pathlib import Path

import torch
from torch import Tensor

from common.run import InputError, write_text
from data.batches import Prompt, pad_rows, response_row
from data.tokenizer import Tokenizer
from model import GPT, RewardModel
from rollout import Response
from train_ppo import gae, kl_estimates, kl_penalized_rewards, state_values


@torch.no_grad()
def token_numbers(policy: GPT, ref: GPT | None, value_model: RewardModel | None,
                  scores: list[float], prompts: list[Prompt], responses: list[Response], pad: int,
                  beta: float, temperature: float = 1.0) -> dict[str, list[list[float]]]:
    """Name → a number for each token of each response, end token included.

    log π always; with ref also its log π and KL; with a value model (and scores, of whole
    responses) value, reward and advantage. Without ref the reward has no penalty. temperature: of
    log π, as PPO's rollouts have it.
    """
    rows = [response_row(prompt.ids, response.ids) for prompt, response in zip(prompts, responses)]
    tokens, mask, _ = pad_rows(rows, pad, policy.wte.weight.device)         # (B, T)
    logprobs, _ = policy.logprobs(tokens, mask, temperature)                # (B, T)
    found, ref_logprobs = {"log π": logprobs}, logprobs
    if ref:
        ref_logprobs, _ = ref.logprobs(tokens, mask, temperature)           # (B, T)
        found |= {"log π_ref": ref_logprobs, "KL": kl_estimates(logprobs, ref_logprobs)[0]}
    if value_model:
        values = state_values(value_model, tokens, mask)                    # (B, T)
        rewards = kl_penalized_rewards(torch.tensor(scores, device=tokens.device), logprobs,
                                       ref_logprobs, mask, beta)            # (B, T)
        advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=0.95)     # (B, T)
        found |= {"value": values, "reward": rewards, "advantage": advantages}
    return {name: of_responses(numbers, mask) for name, numbers in found.items()}


def of_responses(numbers: Tensor, mask: Tensor) -> list[list[float]]:
    """(B, T) numbers where mask is 1, a list for each row, to four places."""
    return [[round(value, 4) for value in row[kept].tolist()] for row, kept in zip(numbers, mask)]


def pieces(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token. A character of several tokens stands at its last one, the others
    have none; what is no character at the end is �."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    found = [decoder.decode(tokenizer.token_bytes(id)) for id in ids]
    return [*found[:-1], found[-1] + decoder.decode(b"", final=True)]


def write_page(path: str, title: dict[str, str], prompts: list[Prompt], responses: list[Response],
               tokenizer: Tokenizer, numbers: dict[str, list[list[float]]]) -> None:
    """Write the page. title: name → value, shown at its top. numbers: as of `token_numbers`.

    Texts are data in it, never HTML: no < of theirs is left in the file.
    """
    if not {"KL", "reward"} & numbers.keys():
        raise InputError(f"--html {path}: name --ref, --reward or both; without them there is "
                         f"nothing to colour by")
    rows = [{"messages": prompt.messages, "ended": response.ended,
             "tokens": pieces(response.ids, tokenizer),
             "numbers": {name: values[i] for name, values in numbers.items()}}
            for i, (prompt, response) in enumerate(zip(prompts, responses))]
    data = json.dumps({"title": title, "rows": rows}).replace("<", "\\u003c")
    page = Path(__file__).with_suffix(".html").read_text("utf-8")
    write_text(Path(path), page.replace("{}/* rollouts */", data))
