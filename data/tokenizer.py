"""Text to token ids and back, the chat template, and a coloured view of what is trained on.

A conversation is rendered by one function, which emits token ids and response mask together:

    <|system|>text<|end|> <|user|>text<|end|> <|assistant|>text<|end|>    (spaces for the eye only)
                                              mask:        1   1

Every text is encoded by itself, between special tokens, so no merge crosses a border: the ids of a
whole conversation are the ids of its prompt followed by the ids of its response.

Published models that were trained on ChatML (`hub/tokenizers.py`) keep it:

    <|im_start|>user⏎text<|im_end|>⏎ <|im_start|>assistant⏎text<|im_end|>⏎
                                     mask:                 1   1
"""
import base64
import sys
import unicodedata
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import tiktoken

from common.errors import InputError

# Words with their leading space, numbers, punctuation, line ends: enough for a town's sentences.
TINYTOWN_PATTERN = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s"
TINYTOWN_RANKS = Path(__file__).with_name("tinytown") / "ranks.tiktoken"
SPECIALS = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
ROLES = ("system", "user", "assistant")
OWN_VOCABULARIES = ("tinytown", "gpt2")


class Vocabulary(NamedTuple):
    """What a tiktoken encoding is made of.

    system: the system message that its template puts first where there is none. nfc: whether text
    is brought into Unicode's composed form (NFC) before it is encoded, as Qwen2's is.
    """
    ranks: dict[bytes, int]
    pattern: str
    specials: dict[str, int]
    system: str = ""
    nfc: bool = False


def own_vocabulary(name: str) -> Vocabulary:
    """Tinytown's or GPT-2's, with the project's special tokens; InputError for another name."""
    if name == "tinytown":
        # Read here, not by tiktoken: that caches by path, and would not see a file trained again.
        lines = (line.split() for line in TINYTOWN_RANKS.read_text().splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        return Vocabulary(ranks, TINYTOWN_PATTERN,
                          {token: len(ranks) + i for i, token in enumerate(SPECIALS)})
    if name != "gpt2":
        raise InputError(f"--tokenizer {name}: expected tinytown or gpt2")
    try:
        base = tiktoken.get_encoding("r50k_base")
    except Exception as error:       # requests raises its own families of errors
        raise InputError("GPT-2's vocabulary (r50k_base, 1.6 MB) is not on this machine and could "
                         "not be fetched: go online once, or set TIKTOKEN_CACHE_DIR to a folder "
                         "that holds it") from error
    return Vocabulary(base._mergeable_ranks, base._pat_str, base._special_tokens | {
        token: 50257 + i for i, token in enumerate(SPECIALS[1:])})


class Tokenizer:
    """A tiktoken encoding with special tokens and a chat template.

    name: "tinytown" or "gpt2", or, with a vocabulary of its own, any. vocab_size: ids padded to a
    multiple of 64, so that the output head has a convenient shape. pad, end, endoftext: special
    ids.
    """

    def __init__(self, name: str, vocabulary: Vocabulary | None = None):
        self.name = name
        ranks, pattern, specials, self.system, self.nfc = vocabulary or own_vocabulary(name)
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=specials)
        self.vocab_size = -(-self.encoding.n_vocab // 64) * 64
        self.chatml = "<|im_start|>" in specials
        self.endoftext, self.pad = specials["<|endoftext|>"], specials["<|pad|>"]
        self.end = specials["<|im_end|>" if self.chatml else "<|end|>"]
        self.role_ids = {role: specials["<|im_start|>" if self.chatml else f"<|{role}|>"]
                         for role in ROLES}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; the names of special tokens inside it count as ordinary characters."""
        return self.encoding.encode_ordinary(
            unicodedata.normalize("NFC", text) if self.nfc else text)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens by name; ids that only pad the vocabulary show as <|id|>."""
        return b"".join(self.token_bytes(id) for id in ids).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one id stands for."""
        if id >= self.encoding.n_vocab:
            return f"<|{id}|>".encode()
        return self.encoding.decode_single_token_bytes(id)

    def render(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        """(ids, response_mask) of a conversation; mask 1: the assistant's text and its end token,
        which are trained on."""
        ids: list[int] = []
        mask: list[bool] = []
        if self.system and messages and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        for message in messages:
            if message["role"] not in self.role_ids:
                raise InputError(f"unknown role {message['role']!r}: "
                                 f"expected one of {', '.join(ROLES)}")
            # ChatML writes the role as text. Before an answer it is encoded alone: from there on
            # the model writes.
            if message["role"] == "assistant":
                opening, text = self.opening, message["content"]
            else:
                opening = [self.role_ids[message["role"]]]
                text = (f"{message['role']}\n{message['content']}" if self.chatml
                        else message["content"])
            text, closing = [*self.encode(text), self.end], self.encode("\n") if self.chatml else []
            ids += [*opening, *text, *closing]
            mask += ([False] * len(opening) + [message["role"] == "assistant"] * len(text)
                     + [False] * len(closing))
        return ids, mask

    @property
    def opening(self) -> list[int]:
        """What stands before an answer."""
        return [self.role_ids["assistant"], *(self.encode("assistant\n") if self.chatml else [])]

    def render_prompt(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation up to where the assistant's answer begins."""
        return [*self.render(messages)[0], *self.opening]

    def response_text(self, ids: list[int], stop: int | None = None) -> tuple[str, bool]:
        """(text before the first end token, whether there is one). stop: another end token."""
        stop = self.end if stop is None else stop
        return self.decode(ids[:ids.index(stop)] if stop in ids else ids), stop in ids


@lru_cache(maxsize=None)
def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name, loaded once."""
    return Tokenizer(name)


def show(tokenizer: Tokenizer, tokens, mask, file=sys.stdout) -> None:
    """Print one row or a batch token by token: trained on in green, padding dimmed, the rest plain.

    tokens, mask: (T,) or (B, T), lists or tensors. Without a terminal, trained-on stretches stand
    in ⟦ ⟧.
    """
    tokens, mask = ([x.tolist() if hasattr(x, "tolist") else x for x in (tokens, mask)])
    if not isinstance(tokens[0], list):
        tokens, mask = [tokens], [mask]
    on, off, dim = ("\033[32m", "\033[0m", "\033[2m") if file.isatty() else ("⟦", "⟧", "")
    for row, marks in zip(tokens, mask):
        line, open_mark = "", False
        # Decoded stretch by stretch, not token by token: a character may span several tokens.
        for (mark, is_pad), stretch in groupby(zip(row, marks), key=lambda pair: (
                bool(pair[1]), pair[0] == tokenizer.pad)):
            if mark != open_mark:
                line += on if mark else off
                open_mark = mark
            text = tokenizer.decode([id for id, _ in stretch])
            line += f"{dim}{text}{off}" if dim and is_pad else text
        print(line + (off if open_mark else ""), file=file)
