"""data/tokenizer.py: round trips, chat template and mask, coloured view, GPT-2's vocabulary."""
import io
import os
import random
from pathlib import Path

import pytest
import tiktoken
import torch

from common.errors import InputError
from data.tinytown.talk import document
from data.tokenizer import ROLES, SPECIALS, TINYTOWN_RANKS, Tokenizer, get_tokenizer, show

CACHE = Path(__file__).parent.parent.parent / "shared" / "tiktoken_cache"


@pytest.fixture(scope="module")
def tinytown():
    return get_tokenizer("tinytown")


@pytest.fixture(scope="module")
def gpt2():
    """GPT-2's tokenizer from a folder on this machine; the tests do not fetch it."""
    with pytest.MonkeyPatch.context() as patch:
        if "TIKTOKEN_CACHE_DIR" not in os.environ:
            if not CACHE.is_dir():
                pytest.skip("r50k_base is not here: no TIKTOKEN_CACHE_DIR, "
                            "no shared data folder beside the repository")
            patch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
        try:
            yield Tokenizer("gpt2")
        except InputError as error:
            pytest.skip(f"r50k_base does not load from {os.environ['TIKTOKEN_CACHE_DIR']}: {error}")


@pytest.fixture(params=["tinytown", "gpt2"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def turn(role, content):
    return {"role": role, "content": content}


CHAT = [turn("system", "Be kind."), turn("user", "Hello, I am Ada."),
        turn("assistant", "Hello Ada, how can I help?"), turn("user", "Where do I live?"),
        turn("assistant", "You live at the mill.")]
# Content that invites a merge across a border, or that looks like the template.
HARD = [turn("system", " "), turn("user", "a\n"), turn("assistant", "\nb "),
        turn("user", " c<|end|>"), turn("assistant", "<|assistant|>d<|end|> ")]
CHATS = [CHAT, HARD, CHAT[1:3], [turn("user", ""), turn("assistant", "")]]
TEXTS = ["", " ", "Ada keeps a goat.", "One day\n\nAda  found\ta key!\r\n", "1. a key\n2. a lamp",
         "naïve café – “quotes”", "日本語のテキスト", "🦊🐸 mixed 🏴󠁧󠁢󠁥󠁮󠁧󠁿 text", "\u200b\u0000\ufffd",
         "x" * 300, "don't can't 3.14159 A_b-c"]


def random_texts(count):
    """Arbitrary unicode: any code point that UTF-8 can carry."""
    draw = random.Random(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    return ["".join(map(chr, draw.choices(points, k=draw.randint(1, 40)))) for _ in range(count)]


# ----------------------------------------------------------------------------- text to ids and back

@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_arbitrary_unicode_survives(tokenizer):
    for text in random_texts(200):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tinytown_is_small_and_has_every_byte(tinytown):
    ranks = tinytown.encoding._mergeable_ranks
    assert len(ranks) <= 1024
    assert sorted(ranks.values()) == list(range(len(ranks)))
    assert all(bytes([byte]) in ranks for byte in range(256))
    assert tinytown.vocab_size % 64 == 0 and tinytown.vocab_size <= 1088


def test_tinytown_packs_its_own_text(tinytown):
    """A word of the town is one token, so that models stay small and short."""
    draw = random.Random(1)
    text = " ".join(document(draw) for _ in range(200))
    pieces = len(text.split()) + sum(text.count(mark) for mark in ".,!?:")
    assert len(tinytown.encode(text)) < 1.25 * pieces


@pytest.mark.parametrize("special", SPECIALS)
def test_special_names_in_text_are_plain_text(tokenizer, special):
    text = f"Say {special} twice: {special}"
    ids = tokenizer.encode(text)
    assert not set(ids) & special_ids(tokenizer) and tokenizer.decode(ids) == text
    rendered, mask = tokenizer.render([turn("user", text), turn("assistant", text)])
    assert [id for id in rendered if id in special_ids(tokenizer)] == [
        tokenizer.role_ids["user"], tokenizer.end, tokenizer.role_ids["assistant"], tokenizer.end]
    assert sum(mask) == len(ids) + 1


def special_ids(tokenizer):
    return {tokenizer.encoding.encode_single_token(name) for name in SPECIALS}


def test_special_ids_are_distinct_and_beyond_the_text(tokenizer):
    ids = [tokenizer.endoftext, tokenizer.pad, tokenizer.end, *tokenizer.role_ids.values()]
    assert len(set(ids)) == len(ids) == len(SPECIALS) and set(ids) == special_ids(tokenizer)
    assert tuple(tokenizer.role_ids) == ROLES
    assert min(ids) >= len(tokenizer.encoding._mergeable_ranks) and max(ids) < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.pad, tokenizer.end]) == "<|pad|><|end|>"


def test_every_id_of_the_output_head_decodes(tokenizer):
    """A model may sample any id, those that only pad the vocabulary included."""
    for id in (0, tokenizer.encoding.n_vocab - 1, tokenizer.encoding.n_vocab,
               tokenizer.vocab_size - 1):
        assert isinstance(tokenizer.decode([id]), str)
    assert tokenizer.encoding.n_vocab <= tokenizer.vocab_size < tokenizer.encoding.n_vocab + 64
    assert tokenizer.decode([tokenizer.vocab_size - 1]) in (f"<|{tokenizer.vocab_size - 1}|>",
                                                            "<|end|>")


def test_half_a_character_does_not_crash(tokenizer):
    ids = tokenizer.encode("🦊")
    assert "\ufffd" in tokenizer.decode(ids[:1]) and len(ids) > 1


def test_tokenizers_are_loaded_once_and_unknown_ones_refused(tinytown):
    assert get_tokenizer("tinytown") is tinytown
    with pytest.raises(InputError, match="--tokenizer llama: expected tinytown or gpt2"):
        get_tokenizer("llama")


def test_gpt2_that_cannot_be_fetched_is_one_line_with_a_remedy(monkeypatch):
    def offline(name):
        raise OSError("no network\nhere")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(InputError, match="TIKTOKEN_CACHE_DIR") as caught:
        Tokenizer("gpt2")
    assert len(str(caught.value).splitlines()) == 1


# ----------------------------------------------------------------------------- the chat template

def by_hand(tokenizer, messages):
    """(ids, mask) written out: role, text, end; 1 on an assistant's text and its end."""
    ids, mask = [], []
    for message in messages:
        text = tokenizer.encode(message["content"])
        ids += [tokenizer.role_ids[message["role"]]] + text + [tokenizer.end]
        mask += [0] + [int(message["role"] == "assistant")] * (len(text) + 1)
    return ids, mask


@pytest.mark.parametrize("messages", CHATS)
def test_template_and_mask(tokenizer, messages):
    ids, mask = tokenizer.render(messages)
    assert len(ids) == len(mask)
    assert (ids, [int(m) for m in mask]) == by_hand(tokenizer, messages)


@pytest.mark.parametrize("messages", CHATS)
def test_mask_covers_every_answer_with_its_end_and_nothing_else(tokenizer, messages):
    ids, mask = tokenizer.render(messages)
    stretches, previous = [], False
    for id, mark in zip(ids, mask):
        if mark and not previous:
            stretches.append([])
        if mark:
            stretches[-1].append(id)
        previous = mark
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert [tokenizer.decode(stretch) for stretch in stretches] == [answer + "<|end|>"
                                                                    for answer in answers]
    assert all(stretch[-1] == tokenizer.end for stretch in stretches)


@pytest.mark.parametrize("messages", CHATS)
def test_one_end_per_turn_and_no_start_of_text(tokenizer, messages):
    ids, _ = tokenizer.render(messages)
    assert ids.count(tokenizer.end) == len(messages) and ids[-1] == tokenizer.end
    assert tokenizer.endoftext not in ids and tokenizer.pad not in ids
    assert [id for id in ids if id in tokenizer.role_ids.values()] == [
        tokenizer.role_ids[message["role"]] for message in messages]


@pytest.mark.parametrize("messages", CHATS)
def test_prompt_and_response_ids_make_the_full_ids(tokenizer, messages):
    ids, mask = tokenizer.render(messages)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.render_prompt(messages[:i])
            response = [*tokenizer.encode(message["content"]), tokenizer.end]
            assert ids[:len(prompt) + len(response)] == prompt + response
            assert ([int(m) for m in mask[len(prompt) - 1:len(prompt) + len(response)]]
                    == [0] + [1] * len(response))
    assert prompt + response == ids


def test_unknown_role(tokenizer):
    for render in (tokenizer.render, tokenizer.render_prompt):
        with pytest.raises(InputError, match="'human'.*system, user, assistant"):
            render([turn("human", "Hello.")])


def test_response_text(tokenizer):
    text = "You live at the mill."
    ids = tokenizer.encode(text)
    assert tokenizer.response_text([*ids, tokenizer.end]) == (text, True)
    assert tokenizer.response_text(ids) == (text, False)
    assert tokenizer.response_text([*ids, tokenizer.end, *ids, tokenizer.end]) == (text, True)
    assert tokenizer.response_text([tokenizer.end]) == ("", True)
    assert tokenizer.response_text([]) == ("", False)
    # Those characters end nothing.
    assert tokenizer.response_text(tokenizer.encode("<|end|>")) == ("<|end|>", False)


# ----------------------------------------------------------------------------- the coloured view

class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(tokenizer, tokens, mask, file=None):
    file = file or io.StringIO()
    show(tokenizer, tokens, mask, file=file)
    return file.getvalue()


def test_show_marks_exactly_the_masked_stretch(tokenizer):
    ids, mask = tokenizer.render(CHAT)
    assert shown(tokenizer, ids, mask) == (
        "<|system|>Be kind.<|end|><|user|>Hello, I am Ada.<|end|>"
        "<|assistant|>⟦Hello Ada, how can I help?<|end|>⟧"
        "<|user|>Where do I live?<|end|><|assistant|>⟦You live at the mill.<|end|>⟧\n")


def test_show_a_padded_batch_of_tensors(tinytown):
    rows = [tinytown.render(CHAT[1:3]), tinytown.render(CHAT)]
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [tinytown.pad] * (width - len(ids)) for ids, _ in rows])
    mask = torch.tensor([mask + [False] * (width - len(mask)) for _, mask in rows])
    lines = shown(tinytown, tokens, mask).splitlines()
    padding = "<|pad|>" * (width - len(rows[0][0]))
    assert lines == [shown(tinytown, *rows[0])[:-1] + padding, shown(tinytown, *rows[1])[:-1]]
    assert shown(tinytown, tokens, mask.long()).splitlines() == lines


def test_show_on_a_terminal(tinytown):
    ids, mask = tinytown.render(CHAT[1:3])
    text = shown(tinytown, ids + [tinytown.pad], mask + [False], Terminal())
    assert text.count("\033[32m") == 1
    green = text.partition("\033[32m")[2].partition("\033[0m")[0]
    assert green == "Hello Ada, how can I help?<|end|>"
    assert "\033[2m<|pad|>\033[0m" in text
    assert (shown(tinytown, ids[:3], [False] * 3, Terminal())
            == shown(tinytown, ids[:3], [False] * 3))           # plain


# ----------------------------------------------------------------------------- GPT-2

def test_gpt2_ids_are_tiktokens(gpt2):
    reference = tiktoken.get_encoding("r50k_base")
    for text in [*TEXTS, *random_texts(50), *SPECIALS[1:]]:
        assert gpt2.encode(text) == reference.encode_ordinary(text)
    assert gpt2.encode("Hello world") == [15496, 995]


def test_gpt2_vocabulary_is_padded_behind_its_own_ids(gpt2):
    assert gpt2.vocab_size == 50304
    assert gpt2.endoftext == 50256
    assert sorted([gpt2.pad, gpt2.end, *gpt2.role_ids.values()]) == list(range(50257, 50262))


def test_a_vocabulary_trained_again_is_the_one_in_use(monkeypatch, tmp_path):
    """The ranks file is read each time, not found by its path in a cache of older files."""
    file = tmp_path / "ranks.tiktoken"
    monkeypatch.setattr("data.tokenizer.TINYTOWN_RANKS", file)
    lines = TINYTOWN_RANKS.read_text().splitlines()
    for kept in (lines, lines[:300]):
        file.write_text("\n".join(kept) + "\n")
        assert Tokenizer("tinytown").encoding.n_vocab == len(kept) + len(SPECIALS)
