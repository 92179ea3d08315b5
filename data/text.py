"""Plain text as one stream of token ids, cut into windows for next-token training.

Files are read and encoded in memory. A folder is encoded once, file by file, into a file of ids
under out/tokens that later runs map into memory, so that only each single file must fit there. That
file is named after the folder's files, their sizes and dates, and the tokenizer, so that a change
of any of them makes a new one.
"""
import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from common.files import locked, progress, write_atomically
from data.readers import read_text
from data.tokenizer import Tokenizer

CACHE = Path("out/tokens")
SLICE = 2 ** 24                # ids that are searched for marks at once


class TextStream:
    """Documents as one stream of ids, <|endoftext|> before each. documents: their texts, or their
    ids as an array."""

    def __init__(self, documents: list[str] | np.ndarray, tokenizer: Tokenizer, device="cpu"):
        if isinstance(documents, list):
            documents = np.concatenate([ids_of(text, tokenizer) for text in documents])
        self.ids = documents
        self.tokenizer, self.device = tokenizer, device
        marks = [start + np.flatnonzero(self.ids[start:start + SLICE] == tokenizer.endoftext)
                 for start in range(0, len(self.ids), SLICE)]
        first = np.concatenate([[0], *marks]).astype(np.int64)      # where each document begins
        self.first = torch.from_numpy(np.unique(first))

    def split(self) -> tuple["TextStream", "TextStream"]:
        """(all but the last twentieth of the documents, the last twentieth); of one document, of
        its tokens."""
        documents = len(self.first)
        cut = len(self.ids) * 19 // 20
        if documents > 1:
            cut = int(self.first[-(-documents // 20) * -1])
        if min(cut, len(self.ids) - cut) < 2:
            raise InputError(f"the text has {len(self.ids)} tokens, too few to hold out a "
                             f"twentieth: add text, or name some with --val")
        return tuple(TextStream(part, self.tokenizer, self.device)
                     for part in (self.ids[:cut], self.ids[cut:]))

    def random_windows(self, count: int, length: int,
                       generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(tokens (count, length), mask): windows at random places; all but each first token are
        predicted.

        A window begins with a document where it can: one that would begin less than a window into a
        document is moved back to its start, so that short documents are read from their first word,
        as prompts are.
        """
        if len(self.ids) <= length:
            raise InputError(f"the text has {len(self.ids)} tokens, fewer than one window of "
                             f"{length}: add text")
        if count * length > 2 ** 30:
            raise InputError(f"{count} windows of {length} tokens: over a billion tokens in one "
                             f"step; lower --batch_size or --window")
        starts = torch.randint(len(self.ids) - length, (count,), generator=generator)
        return self._windows(starts, length)

    def all_windows(self, length: int, most: int) -> list[tuple[Tensor, Tensor]]:
        """Up to `most` windows from the first on, a window apart, in batches of 64."""
        length = min(length, len(self.ids))
        starts = torch.arange(0, len(self.ids) - length + 1, length)[:most]
        return [self._windows(part, length) for part in starts.split(64)]

    def _windows(self, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
        document = self.first[torch.searchsorted(self.first, starts, right=True) - 1]
        starts = torch.where(starts - document < length, document, starts)
        starts = starts.clamp(max=len(self.ids) - length)
        places = starts[:, None] + torch.arange(length)
        tokens = torch.from_numpy(self.ids[places.numpy()].astype(np.int64)).to(self.device)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[:, 0] = False
        return tokens, mask


def text_stream(paths: tuple[str, ...] | list[str], tokenizer: Tokenizer,
                device="cpu") -> TextStream:
    """The text of these files, or of all files of one folder and the folders in it. Raises
    InputError as `read_text`."""
    if any(Path(path).is_dir() for path in paths):
        if len(paths) > 1:
            raise InputError(f"{', '.join(paths)}: name either files or a single folder")
        return TextStream(folder_ids(Path(paths[0]), tokenizer), tokenizer, device)
    return TextStream(read_text(*paths), tokenizer, device)


def text_streams(data: tuple[str, ...], val: str, tokenizer: Tokenizer,
                 device="cpu") -> tuple[TextStream, TextStream]:
    """(text to train on, held-out text): the files of data and of val, or data split."""
    text = text_stream(data, tokenizer, device)
    return (text, text_stream((val,), tokenizer, device)) if val else text.split()


def mix_stream(config, tokenizer: Tokenizer, block_size: int, device) -> TextStream | None:
    """The pretraining text of `config.ptx_data`, or None without it or with `ptx_coef` 0.

    Raises InputError if its windows exceed the model's context, or if `ptx_coef` asks for a text
    that is not named.
    """
    if getattr(config, "ptx_coef", 0) > 0 and not config.ptx_data:
        raise InputError("--ptx_data: name the pretraining text, or set --ptx_coef 0 for PPO "
                         "without the mix")
    if not config.ptx_data or getattr(config, "ptx_coef", 1) == 0:
        return None
    if not 2 <= config.ptx_window <= block_size:
        raise InputError(f"--ptx_window {config.ptx_window}: must lie between 2 and {block_size}")
    return text_stream(config.ptx_data, tokenizer, device)


def folder_ids(folder: Path, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a folder's files in the order of their names, <|endoftext|> before each document,
    mapped into memory.

    Hidden files are left out; every other is read as `read_text` reads it.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file()
                   and not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not files:
        raise InputError(f"{folder}: no files in this folder; name one that holds text")
    stats = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
             for path in files]
    key = hashlib.sha256(repr((tokenizer.name, tokenizer.vocab_size, stats)).encode()).hexdigest()
    cached = CACHE / f"{folder.resolve().name}-{key[:16]}.bin"

    def write(temporary: Path) -> None:
        total = sum(size for _, size, _ in stats)
        with open(temporary, "wb") as out, progress(total, f"encode {folder}", "byte") as bar:
            for path, (_, size, _) in zip(files, stats):
                for document in read_text(path):
                    ids_of(document, tokenizer).tofile(out)
                bar.update(size)

    with locked(cached.with_suffix(".lock")):     # of several processes one encodes, others wait
        if not cached.exists():
            write_atomically(cached, write)
    return np.memmap(cached, id_type(tokenizer), mode="r")


def ids_of(document: str, tokenizer: Tokenizer) -> np.ndarray:
    """<|endoftext|> and the ids of a document."""
    return np.array([tokenizer.endoftext, *tokenizer.encode(document)], id_type(tokenizer))


def id_type(tokenizer: Tokenizer) -> type:
    """The smallest type that holds every id."""
    return np.uint16 if tokenizer.vocab_size <= 2 ** 16 else np.uint32
