"""Published byte-level BPE vocabularies as tiktoken encodings, and ours as the tokenizer.json that
transformers loads.

tiktoken joins the pair whose token has the lowest rank; a merges list joins the pair that stands
first. They agree where tokens are numbered in the order of their merges, as GPT-2's, Llama 3's,
Qwen's and SmolLM2's are; others are refused.
"""
import hashlib
import json
import re
from pathlib import Path

from common.errors import InputError
from common.files import write_atomically
from data.tokenizer import SPECIALS, Tokenizer, Vocabulary

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2: every digit alone, split off before GPT-2's pattern sees the text, so that spaces before
# a digit stay together.
SMOLLM = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
# The field of tokenizer_config.json that saves parsing the chat template.
SYSTEM_FIELD = "default_system_message"
PATTERNS = {"smollm": SMOLLM, "gpt-2": GPT2, "gpt2": GPT2}

# GPT-2 writes a byte as a printable character: itself where it is printable, else from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in PRINTABLE]
CHARACTER = ({byte: chr(byte) for byte in PRINTABLE}
             | {byte: chr(256 + i) for i, byte in enumerate(HIDDEN)})
BYTE = {character: byte for byte, character in CHARACTER.items()}


# ----------------------------------------------------------------------------- in

def vocabulary(tokens: dict[str, int], merges: list, pattern: str, specials: dict[str, int],
               template: str, where: str) -> Vocabulary:
    """The vocabulary that a tokenizer.json describes. Raises InputError.

    tokens: id of each token, its bytes written as characters. merges: "a b" or [a, b], the first
    joined first. pattern: one of PATTERNS by name, or a regular expression. template: the published
    chat template, of which only ChatML's kind (<|im_start|>role…<|im_end|>) is known; with another
    the project's own is used.

    The project's special tokens and bytes that the vocabulary lacks get ids behind it.
    """
    ranks = {bytes(BYTE[c] for c in token): id for token, id in tokens.items()
             if token not in specials and all(c in BYTE for c in token)}
    joined = ["".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    order = [tokens.get(token, -1) for token in joined]
    # Equal: a token that can be joined in several ways.
    if any(a > b for a, b in zip(order, order[1:])):
        raise InputError(f"{where}: its tokens are not numbered in the order of its merges, which "
                         "tiktoken needs; use --init with another model")
    following = max(tokens.values()) + 1
    for byte in range(256):
        if bytes([byte]) not in ranks:
            ranks[bytes([byte])] = following
            following += 1
    chatml = "<|im_start|>" in specials and "<|im_end|>" in specials
    specials = dict(specials)
    for name in SPECIALS[:2] if chatml else SPECIALS:
        if name not in specials:
            specials[name] = following
            following += 1
    return Vocabulary(ranks, PATTERNS.get(pattern, pattern), specials,
                      default_system(template) if chatml else "")


def default_system(template: str) -> str:
    """The system message that a ChatML template puts before a conversation without one, or "".

    It is the only message that such a template spells out.
    """
    found = re.findall(r"<\|im_start\|>system\n([^{}'\"]+)<\|im_end\|>",
                       template.replace("\\n", "\n"))
    return found[0] if found else ""


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder: its tokenizer.json, or the project's "gpt2" for a GPT-2.

    None where there is neither. Raises InputError for a tokenizer that is not byte-level BPE.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        config = json.loads((folder / "config.json").read_text())
        is_gpt2 = (config.get("model_type") == "gpt2"
                   and 50257 <= config.get("vocab_size", 0) <= 50304)
        return Tokenizer("gpt2") if is_gpt2 else None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model = content["model"]
        specials = {token["content"]: token["id"] for token in content["added_tokens"]}
        # GPT-2's own file is from before types.
        kind = model.get("type", "BPE" if "merges" in model else "unknown")
        normalizer = (content.get("normalizer") or {}).get("type")
        if kind != "BPE" or model.get("byte_fallback") or normalizer not in (None, "NFC"):
            raise InputError(f"{path}: {kind} tokenizer, normalizer {normalizer}: expected "
                             "byte-level BPE, as GPT-2, Llama 3, Qwen2 and SmolLM2 have; the "
                             "weights load without it through GPT.from_pretrained")
        pattern = split_pattern(content["pre_tokenizer"], path)
        beside, jinja = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        template = (jinja.read_text(encoding="utf-8") if jinja.exists()
                    else config.get("chat_template"))
        words = vocabulary({**model["vocab"], **specials}, model["merges"], pattern, specials,
                           template if isinstance(template, str) else "", str(path))
        return make_tokenizer(words._replace(system=config.get(SYSTEM_FIELD, words.system),
                                             nfc=normalizer == "NFC"))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a tokenizer.json ({type(error).__name__}: {error}); "
                         "download it again") from error


def split_pattern(pre: dict, path: Path) -> str:
    """The regular expression that a tokenizer.json splits text by."""
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds = [step["type"] for step in steps]
    if kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"]:
            return GPT2
        if (kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]
                and steps[1].get("use_regex", True)):
            return SMOLLM
        if (kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True)
                and "Regex" in steps[0]["pattern"]):
            return steps[0]["pattern"]["Regex"].replace(r"\z", "$")
    raise InputError(f"{path}: splits text by {kinds}, for which tiktoken has no pattern here; "
                     "use a model with GPT-2's, Llama 3's or SmolLM2's")


def make_tokenizer(words: Vocabulary) -> Tokenizer:
    """A tokenizer named after its content, so that checkpoints can tell whether they share it."""
    content = repr((sorted(words.ranks.items()), words.pattern, sorted(words.specials.items()),
                    words.system, words.nfc))
    return Tokenizer(f"bpe-{hashlib.sha256(content.encode()).hexdigest()[:12]}", words)


# ----------------------------------------------------------------------------- out

def write_tokenizer(tokenizer: Tokenizer, folder: Path, block_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, with the chat template, as AutoTokenizer and
    `read_tokenizer` read them."""
    name = lambda id: tokenizer.token_bytes(id).decode()                              # noqa: E731
    files = {"tokenizer.json": tokenizer_json(tokenizer), "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_max_length": block_size, "bos_token": name(tokenizer.endoftext),
        "eos_token": name(tokenizer.end), "pad_token": name(tokenizer.pad),
        "chat_template": chat_template(tokenizer), SYSTEM_FIELD: tokenizer.system}}
    for file, content in files.items():
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / file,
                         lambda path: path.write_text(text, encoding="utf-8"))        # noqa: B023


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """The content of tokenizer.json for a tokenizer of ours: same ids for any text."""
    ranks, specials = tokenizer.encoding._mergeable_ranks, tokenizer.encoding._special_tokens
    write = lambda token: "".join(CHARACTER[byte] for byte in token)                  # noqa: E731
    pairs = [list(map(write, parts(token, ranks))) for token in sorted(ranks, key=ranks.get)
             if len(token) > 1]
    # A token that no merge makes is only found whole.
    merges = [pair for pair in pairs if len(pair) == 2]
    # Oniguruma's $ also matches before a line end, tiktoken's only at the end of the text.
    pattern = tokenizer.encoding._pat_str.replace("$", r"\z")
    return {"version": "1.0", "truncation": None, "padding": None,
            "normalizer": {"type": "NFC"} if tokenizer.nfc else None, "post_processor": None,
            "added_tokens": [{"id": id, "content": name, "single_word": False, "lstrip": False,
                              "rstrip": False, "normalized": False, "special": True}
                             for name, id in sorted(specials.items(), key=lambda x: x[1])],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                 "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": False}]},
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                        "use_regex": False},
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": len(merges) < len(pairs),
                      # Special tokens too: the library gives new ids, behind the vocabulary, to
                      # those that the vocabulary lacks.
                      "vocab": {write(token): id for token, id in ranks.items()} | specials,
                      "merges": merges}}


def parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that the last merge of `token` joins.

    Its byte pairs are merged by rank, as far as ranks lower than its own go.
    """
    pieces = [bytes([byte]) for byte in token]
    while len(pieces) > 2:
        rank, i = min((ranks.get(a + b, len(ranks) * 2), i)
                      for i, (a, b) in enumerate(zip(pieces, pieces[1:])))
        if rank >= ranks[token]:
            break
        pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def chat_template(tokenizer: Tokenizer) -> str:
    """The tokenizer's chat template in Jinja."""
    if not tokenizer.chatml:
        return ("{% for message in messages %}{{ '<|' + message['role'] + '|>' + "
                "message['content'] + '<|end|>' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
    system = ""
    if tokenizer.system:
        text = json.dumps(f"<|im_start|>system\n{tokenizer.system}<|im_end|>\n")
        system = "{% if loop.first and message['role'] != 'system' %}{{ " + text + " }}{% endif %}"
    return ("{% for message in messages %}" + system + "{{ '<|im_start|>' + message['role'] "
            "+ '\\n' + message['content'] + '<|im_end|>\\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
