"""Talk to any checkpoint, or print samples with their reward and KL.

    python sample.py --init out/tinytown/ppo                                     # chat
    python sample.py --init out/tinytown/ppo --prompt "Where does Ada live?"     # one answer
    python sample.py --init out/tinytown/base --raw true --prompt "Ada lives"    # plain text
    python sample.py --init out/tinytown/ppo --data out/tinytown/data/test.jsonl --count 5 \\
                     --reward out/tinytown/rm --ref out/tinytown/sft
        # with --html rollouts.html also a page: tokens coloured by KL, advantage and reward

An empty line ends the chat.
"""
import codecs
from dataclasses import dataclass

import torch

from common.checkpoint import load_reward_model
from common.run import DeviceFlags, InputError, load_gpt, main, start
from data.batches import prompt_rows
from data.readers import read_prompts
from data.tokenizer import Tokenizer
from model import GPT, stream
from rollout import model_reward, respond, sequence_logprobs
from systems.rollouts import token_numbers, write_page


@dataclass(slots=True)
class Config(DeviceFlags):
    init: str = ""                 # checkpoint of a language model
    prompt: str = ""               # one question; empty: chat, or --data
    raw: bool = False              # go on with the prompt, or from nothing, as plain text
    data: tuple = ()               # files of prompts to answer instead of chatting
    count: int = 8                 # how many of them
    reward: str = ""               # reward-model checkpoint that scores the answers
    ref: str = ""                  # reference checkpoint that their KL is measured from
    html: str = ""                 # page of data's answers, token by token (systems/rollouts.py)
    beta: float = 0.05             # KL coefficient of that page's rewards, as in train_ppo.py
    max_new_tokens: int = 48
    temperature: float = 1.0       # 0 takes the most likely token each time
    top_k: int = 0                 # 0: all
    top_p: float = 1.0


LIMITS = dict(count=(1, 10**9), max_new_tokens=(1, 10**6), temperature=(0, 100),
              top_k=(0, 10**9), top_p=(1e-9, 1), beta=(0, 100))
NEEDED = dict(init="name a checkpoint folder, such as out/tinytown/ppo")


def sampling(config: Config) -> dict:
    """How tokens are chosen, as `GPT.generate` takes it."""
    return dict(temperature=config.temperature, top_k=config.top_k or None, top_p=config.top_p)


def stream_text(model: GPT, prompt: list[int], tokenizer: Tokenizer, stop: int, config: Config,
                generator) -> str:
    """Print the answer to one prompt as it comes; returns its text."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")    # a character: some tokens
    ids: list[int] = []
    with model.autocast():
        for _, (token,) in stream(model, [prompt], config.max_new_tokens, stop_token=stop,
                                  generator=generator, **sampling(config)):
            if token != stop:
                ids.append(token)
                print(decoder.decode(tokenizer.token_bytes(token)), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return tokenizer.decode(ids)


def chat(model: GPT, tokenizer: Tokenizer, config: Config, generator) -> None:
    """Turns from standard input; the conversation so far is the prompt. Oldest turns go when the
    context is full."""
    messages: list[dict] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        messages.append({"role": "user", "content": line})
        room = model.config.block_size - config.max_new_tokens
        while len(messages) > 1 and len(tokenizer.render_prompt(messages)) > room:
            del messages[:2]
        prompt = tokenizer.render_prompt(messages)
        if len(prompt) > room:
            print(f"(too long: {len(prompt)} tokens, and the context leaves room for {room}; say "
                  f"it shorter)")
            messages.pop()
            continue
        answer = stream_text(model, prompt, tokenizer, tokenizer.end, config, generator)
        messages.append({"role": "assistant", "content": answer})


def print_samples(run, model: GPT, tokenizer: Tokenizer, config: Config) -> None:
    """Prompt, response, reward and KL estimate (k1, nats) of the first prompts of a file."""
    prompts = prompt_rows(read_prompts(*config.data)[:config.count], tokenizer,
                          model.config.block_size - config.max_new_tokens)
    responses = respond(model, prompts, tokenizer, config.max_new_tokens, seed=config.seed,
                        **sampling(config))
    columns: dict[str, list[float]] = {}
    ref = reward_model = None
    if config.reward:
        reward_model, its_tokenizer = load_reward_model(config.reward)
        if config.html and its_tokenizer.name != tokenizer.name:
            raise InputError(f"--reward {config.reward}: reads the {its_tokenizer.name} "
                             f"vocabulary, and cannot value {tokenizer.name} token by token; "
                             f"leave --html or --reward out")
        reward = model_reward(run.freeze(reward_model), its_tokenizer, tokenizer)
        columns["reward"] = reward(prompts, responses)
    if config.ref:
        ref = run.freeze(load_gpt(config.ref)[0])
        own, other = (sequence_logprobs(m, prompts, responses, tokenizer.pad)
                      for m in (model, ref))
        columns["kl"] = (own - other).tolist()
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        print(" / ".join(message["content"] for message in prompt.messages))
        numbers = "".join(f"   {name} {values[i]:.2f}" for name, values in columns.items())
        print(f"  → {response.text}{numbers}")
    if config.html:
        names = dict(init=config.init, ref=config.ref, reward=config.reward, β=str(config.beta))
        each = token_numbers(model, ref, reward_model, columns.get("reward", []), prompts,
                             responses, tokenizer.pad, config.beta, config.temperature or 1.0)
        write_page(config.html, names, prompts, responses, tokenizer, each)
        print(f"wrote {config.html}")


def talk(config: Config) -> None:
    """Answer as the config says."""
    run = start(config, LIMITS, NEEDED)
    model, tokenizer = load_gpt(config.init)
    model = run.freeze(model)
    room = model.config.block_size - config.max_new_tokens
    if room <= 0:
        raise InputError(f"--max_new_tokens {config.max_new_tokens}: the model's context is "
                         f"{model.config.block_size} tokens")
    generator = torch.Generator(run.device).manual_seed(config.seed)
    if config.html and not config.data:
        raise InputError("--html: shows answers to --data; name one or more files of prompts")
    if config.data:
        print_samples(run, model, tokenizer, config)
    elif config.prompt or config.raw:
        prompt = tokenizer.render_prompt([{"role": "user", "content": config.prompt}])
        stop = tokenizer.end
        if config.raw:
            prompt = [tokenizer.endoftext, *tokenizer.encode(config.prompt)]
            stop = tokenizer.endoftext
        if len(prompt) > room:
            raise InputError(f"--prompt: {len(prompt)} tokens, but the context leaves room for "
                             f"{room}; shorten it or lower --max_new_tokens")
        stream_text(model, prompt, tokenizer, stop, config, generator)
    else:
        chat(model, tokenizer, config, generator)


if __name__ == "__main__":
    main(talk, Config)
