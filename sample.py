"""Talk to any checkpoint, or print samples with their reward and KL.

    python sample.py --init out/tinytown/ppo                                     # chat; an empty line ends it
    python sample.py --init out/tinytown/ppo --prompt "Where does Ada live?"     # one answer, streamed
    python sample.py --init out/tinytown/base --raw true --prompt "Ada lives"    # go on with plain text
    python sample.py --init out/tinytown/ppo --data out/tinytown/data/test.jsonl --count 5 \\
                     --reward out/tinytown/rm --ref out/tinytown/sft
"""
import codecs
from dataclasses import dataclass

import torch

from common import InputError, Machine, check_range, main, setup
from data.batches import prompt_rows
from data.readers import read_prompts
from data.tokenizer import Tokenizer
from evaluate import response_logprobs
from model import GPT, load_gpt, load_reward_model
from train_ppo import model_reward


@dataclass(slots=True)
class Config:
    init: str = ""                 # checkpoint of a language model
    prompt: str = ""               # one question; empty: chat, or --data
    raw: bool = False              # go on with the prompt as plain text, without the chat template
    data: tuple = ()               # files of prompts to answer instead of chatting
    count: int = 8                 # how many of them
    reward: str = ""               # reward-model checkpoint that scores the answers
    ref: str = ""                  # reference checkpoint that their KL is measured from
    max_new_tokens: int = 48
    temperature: float = 1.0       # 0 takes the most likely token each time
    top_k: int = 0                 # 0: all
    top_p: float = 1.0
    seed: int = 1
    device: str = "auto"
    dtype: str = "auto"


def stream_text(model: GPT, prompt: list[int], tokenizer: Tokenizer, stop: int, config: Config, generator) -> str:
    """Print the answer to one prompt as it comes; returns its text."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")     # a character may span several tokens
    ids: list[int] = []
    for _, (token,) in model.stream([prompt], config.max_new_tokens, temperature=config.temperature,
                                    top_k=config.top_k or None, top_p=config.top_p, stop_token=stop, generator=generator):
        if token != stop:
            ids.append(token)
            print(decoder.decode(tokenizer.token_bytes(token)), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return tokenizer.decode(ids)


def chat(model: GPT, tokenizer: Tokenizer, config: Config, generator) -> None:
    """Turns from standard input; the conversation so far is the prompt. Oldest turns go when the context is full."""
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
            print(f"(too long: {len(prompt)} tokens, and the context leaves room for {room}; say it shorter)")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": stream_text(model, prompt, tokenizer, tokenizer.end, config, generator)})


def print_samples(model: GPT, tokenizer: Tokenizer, machine: Machine, config: Config, generator) -> None:
    """Prompt, response, reward and KL estimate (k1, nats) of the first prompts of a file."""
    conversations, prompts = prompt_rows(read_prompts(*config.data)[:config.count], tokenizer,
                                         model.config.block_size - config.max_new_tokens)
    ids = model.generate(prompts, config.max_new_tokens, temperature=config.temperature, top_k=config.top_k or None,
                         top_p=config.top_p, stop_token=tokenizer.end, generator=generator)
    texts = [tokenizer.response_text(response)[0] for response in ids]
    columns: dict[str, list[float]] = {}
    if config.reward:
        reward_model, _ = load_reward_model(config.reward)
        columns["reward"] = model_reward(reward_model.to(machine.device).eval(), tokenizer)(prompts, ids)
    if config.ref:
        ref = load_gpt(config.ref)[0].to(machine.device).eval()
        own, other = (response_logprobs(m, prompts, ids, tokenizer.pad, machine.device) for m in (model, ref))
        columns["kl"] = (own - other).tolist()
    for i, (messages, text) in enumerate(zip(conversations, texts)):
        print(" / ".join(message["content"] for message in messages))
        print(f"  → {text}" + "".join(f"   {name} {values[i]:.2f}" for name, values in columns.items()))


def train(config: Config) -> dict:
    """Answer as the config says (named as in the other scripts; nothing is trained)."""
    check_range(config, count=(1, 10**9), max_new_tokens=(1, 10**6), temperature=(0, 100), top_k=(0, 10**9), top_p=(1e-9, 1))
    if not config.init:
        raise InputError("--init: name a checkpoint folder, such as out/tinytown/ppo")
    machine = setup(config)
    model, tokenizer = load_gpt(config.init)
    model.to(machine.device).eval()
    if config.max_new_tokens >= model.config.block_size:
        raise InputError(f"--max_new_tokens {config.max_new_tokens}: the model's context is {model.config.block_size} tokens")
    generator = torch.Generator(machine.device).manual_seed(config.seed)
    with machine.autocast():
        if config.data:
            print_samples(model, tokenizer, machine, config, generator)
        elif config.prompt:
            messages = [{"role": "user", "content": config.prompt}]
            prompt = [tokenizer.endoftext, *tokenizer.encode(config.prompt)] if config.raw else tokenizer.render_prompt(messages)
            room = model.config.block_size - config.max_new_tokens
            if len(prompt) > room:
                raise InputError(f"--prompt: {len(prompt)} tokens, but the context leaves room for {room}; shorten it or "
                                 f"lower --max_new_tokens")
            stream_text(model, prompt, tokenizer, tokenizer.endoftext if config.raw else tokenizer.end, config, generator)
        else:
            chat(model, tokenizer, config, generator)
    return {}


if __name__ == "__main__":
    main(train, Config)
