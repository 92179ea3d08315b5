"""Answers to prompts and what they are worth: sampling, rewards, log π of responses, KL, wins.

    respond              a response of a model to each prompt
    load_reward          what `--reward` names: a trained reward model or a Python function
    ended_scores         rewards, and a score of its own for a response that never ends
    sequence_logprobs    log π(y|x) of whole responses
    kl_from_samples      KL(π‖π_ref) from π's own responses
    win_rate             how often one response scores higher than another to the same prompt
"""
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.checkpoint import load_reward_model
from common.errors import InputError, first_line
from common.files import progress
from data.batches import Prompt, Row, by_length, pad_rows, response_row
from data.tokenizer import Tokenizer
from model import GPT, RewardModel


class Response(NamedTuple):
    """What a model answered: its ids as they were sampled, its text, whether it ended by itself."""
    ids: list[int]           # end token included, if there is one
    text: str                # up to the end token
    ended: bool


# One number for each response to its prompt.
Reward = Callable[[list[Prompt], list[Response]], list[float]]


# ----------------------------------------------------------------------------- sampling

def respond(model: GPT, prompts: list[Prompt], tokenizer: Tokenizer, max_new_tokens: int, *,
            seed: int, title: str = "", batch_size: int = 0, stop: int | None = None,
            **sampling) -> list[Response]:
    """A response to each of any number of prompts, in batches of similar length, with a progress
    bar if it has a title. seed: of the random numbers that choose the tokens. batch_size: prompts
    at once; 0: up to `rows_at_once`. stop: the id that ends a response; None: the chat's end token.
    sampling: as `GPT.generate`."""
    # Two batches, so that shorter prompts are not padded to the longest.
    batch_size = batch_size or min(rows_at_once(model), max(256, -(-len(prompts) // 2)))
    stop = tokenizer.end if stop is None else stop
    responses: list[Response] = [None] * len(prompts)
    sampling["generator"] = torch.Generator(model.wte.weight.device).manual_seed(seed)
    with progress(len(prompts), title, "response", quiet=not title) as bar:
        for places in by_length(prompts, batch_size):
            asked = [prompts[i].ids for i in places]
            ids = model.generate(asked, max_new_tokens, stop_token=stop, **sampling)
            for i, answer in zip(places, ids):
                responses[i] = Response(answer, *tokenizer.response_text(answer, stop))
            bar.update(len(places))
    return responses


def rows_at_once(model: GPT) -> int:
    """How many responses to sample at once: up to 1,024 (Tinytown: 1.3 times as fast as 512), fewer
    where their keys and values would take over 2 GiB."""
    config = model.config
    width = config.n_embd // config.n_head * (config.n_kv_head or config.n_head)
    row = 2 * 4 * config.n_layer * width * config.block_size       # bytes, in fp32
    return max(1, min(1024, 2 ** 31 // row))


# ----------------------------------------------------------------------------- rewards

def model_reward(model: RewardModel, tokenizer: Tokenizer, policy: Tokenizer) -> Reward:
    """A trained reward model as a reward. tokenizer: its own; policy: that of the responses.

    Where both are the same it reads the ids that were sampled: text encoded anew may be cut into
    other tokens. A response that did not end has no end token; too long a one is scored at its cut.
    """
    same, most = tokenizer.name == policy.name, model.config.block_size

    def row(prompt: Prompt, response: Response) -> Row:
        if same:
            return response_row(prompt.ids, response.ids)
        ids = tokenizer.encode(response.text) + [tokenizer.end] * response.ended
        return response_row(tokenizer.render_prompt(prompt.messages), ids)

    @torch.no_grad()
    def reward(prompts: list[Prompt], responses: list[Response]) -> list[float]:
        rows = [row(*pair) for pair in zip(prompts, responses)]
        rows = [Row(ids[:most], mask[:most]) for ids, mask in rows]
        scores = torch.zeros(len(rows))
        for places in by_length(rows, 32):
            part, device = [rows[i] for i in places], model.head.weight.device
            tokens, _, lengths = pad_rows(part, tokenizer.pad, device)
            scores[places] = model(tokens, lengths).cpu()
        return scores.tolist()
    return reward


def text_reward(function: Callable[[list[list[dict]], list[str]], list[float]],
                name: str = "") -> Reward:
    """A Python function of (conversations, response texts) as a reward. Its answers are checked:
    InputError by its name."""
    name = name or getattr(function, "__name__", "the reward function")
    warned: list[str] = []             # a constant reward is said once

    def reward(prompts: list[Prompt], responses: list[Response]) -> list[float]:
        if not responses:
            return []
        conversations = [prompt.messages for prompt in prompts]
        answer = function(conversations, [response.text for response in responses])
        scores = checked_scores(name, answer, responses)
        if len(scores) > 1 and len(set(scores)) == 1 and not warned:
            warned.append(name)
            print(f"warning: --reward {name}: {scores[0]:g} for each of {len(scores)} responses; "
                  f"from a reward that is always the same nothing can be learned", file=sys.stderr)
        return scores
    return reward


def checked_scores(name: str, answer, responses: list[Response]) -> list[float]:
    """A reward function's answer as one finite float for each response; else InputError."""
    try:
        answer = list(answer)
    except TypeError as error:
        raise InputError(f"--reward {name}: answered {answer!r:.60}; expected a list of "
                         f"{len(responses)} numbers, one for each response") from error
    if len(answer) != len(responses):
        raise InputError(f"--reward {name}: {len(answer)} numbers for {len(responses)} responses; "
                         f"expected one for each")
    scores = []
    for value, response in zip(answer, responses):
        try:
            scores.append(float("nan") if isinstance(value, str) else float(value))
        except (TypeError, ValueError):
            scores.append(float("nan"))
        if not math.isfinite(scores[-1]):
            raise InputError(f"--reward {name}: {value!r:.40} for the response "
                             f"{response.text[:60]!r}; expected a finite number")
    return scores


def find_function(name: str) -> Callable:
    """The function that module:function or path/to/file.py:function names. A module is looked for
    in the folder where the command is run, too. InputError in one line."""
    place, _, function = name.rpartition(":")
    try:
        if place.endswith(".py"):
            found = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
        else:
            sys.path.insert(0, str(Path.cwd()))
            try:
                module = importlib.import_module(place)
            finally:
                sys.path.pop(0)
        return getattr(module, function)
    except Exception as error:       # whatever the module does when it is imported
        raise InputError(f"--reward {name}: {type(error).__name__}: {first_line(error)}; expected "
                         f"module:function, or FILE.py:function, a module in this folder or "
                         f"installed") from error


def load_reward(name, policy: Tokenizer, run) -> tuple[Reward, RewardModel | None]:
    """The reward that `--reward` names, and the model behind it if there is one. name: a folder,
    module:function, or such a function itself, of (conversations, response texts).

    A model must share the policy's vocabulary, as the value model, its copy, reads the policy's
    token ids. Raises InputError.
    """
    if callable(name):
        return text_reward(name), None
    if not name:
        raise InputError("--reward: name a reward-model folder, or module:function")
    if ":" in name and not Path(name).exists():
        return text_reward(find_function(name), name), None
    model, tokenizer = load_reward_model(name)
    if tokenizer.name != policy.name:
        raise InputError(f"--reward {name}: reads the {tokenizer.name} vocabulary, but the policy "
                         f"of --init writes {policy.name}; train the reward model from the same "
                         f"SFT model")
    return model_reward(run.freeze(model), tokenizer, policy), model


def ended_scores(reward: Reward, prompts: list[Prompt], responses: list[Response],
                 missing_end_score: float) -> list[float]:
    """Scores of responses; one that never ended gets missing_end_score, unread."""
    scores = [missing_end_score] * len(responses)
    ended = [i for i, response in enumerate(responses) if response.ended]
    if ended:
        found = reward([prompts[i] for i in ended], [responses[i] for i in ended])
        for i, score in zip(ended, found, strict=True):
            scores[i] = score
    return scores


# ----------------------------------------------------------------------------- log π and KL

@torch.no_grad()
def sequence_logprobs(model: GPT, prompts: list[Prompt], responses: list[Response],
                      pad: int) -> Tensor:
    """log π(y|x) of whole responses, (n,)."""
    rows = [response_row(prompt.ids, response.ids) for prompt, response in zip(prompts, responses)]
    sums = torch.zeros(len(rows))
    for places in by_length(rows, 64):
        tokens, mask, _ = pad_rows([rows[i] for i in places], pad, model.wte.weight.device)
        sums[places] = model.logprobs(tokens, mask)[0].sum(-1).cpu()
    return sums


def kl_from_samples(model: GPT, ref: GPT, prompts: list[Prompt], responses: list[Response],
                    pad: int) -> float:
    """KL(model ‖ ref) in nats a response, estimated from the model's own responses (k1)."""
    own, other = (sequence_logprobs(m, prompts, responses, pad) for m in (model, ref))
    return (own - other).mean().item()


# ----------------------------------------------------------------------------- comparisons

def win_rate(scores: Tensor, baseline: Tensor) -> tuple[float, float]:
    """(share of comparisons where score > baseline, ties counted half; standard error over prompts,
    std/√n with n − 1).

    scores (n,): of one response to each prompt. baseline (n, m): of m responses to it that it is
    compared with.
    """
    more, equal = scores[:, None] > baseline, scores[:, None] == baseline           # (n, m)
    per_prompt = (more.double() + 0.5 * equal).mean(dim=1)                          # (n,)
    error = per_prompt.std(correction=1) / math.sqrt(len(per_prompt))
    return per_prompt.mean().item(), error.item()
