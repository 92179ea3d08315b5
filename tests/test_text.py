"""data/text.py: windows of text, held-out text, folders of text encoded once."""
import gzip
import json

import numpy as np
import pytest
import torch

from common.errors import InputError
from data import text as text_module
from data.text import TextStream, folder_ids, text_stream
from data.tokenizer import get_tokenizer

TOKENIZER = get_tokenizer("tinytown")
DOCUMENTS = ["Ada keeps a goat.", "Ben is a baker. Ben eats jam.", "Write <|endoftext|> here.",
             "Eve likes blue."] * 25
EOT = TOKENIZER.endoftext


def stream_ids(documents):
    return [id for text in documents for id in [EOT, *TOKENIZER.encode(text)]]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_stream_is_the_documents_with_a_mark_before_each():
    stream = TextStream(DOCUMENTS, TOKENIZER)
    ids = stream_ids(DOCUMENTS)
    (tokens, _), = stream.all_windows(len(ids), 1)
    assert tokens.tolist() == [ids]
    assert ids.count(EOT) == len(DOCUMENTS)             # the name inside a document is plain text


def test_all_but_the_first_column_is_predicted():
    stream = TextStream(DOCUMENTS, TOKENIZER)
    for tokens, mask in [stream.random_windows(50, 16, generator()), *stream.all_windows(16, 30)]:
        assert (tokens.shape == mask.shape and mask.dtype == torch.bool
                and tokens.dtype == torch.long)
        assert not mask[:, 0].any() and mask[:, 1:].all()


def test_windows_begin_with_a_document_where_documents_are_short():
    stream = TextStream(DOCUMENTS, TOKENIZER)
    ids, length = stream_ids(DOCUMENTS), 16
    assert max(len(TOKENIZER.encode(text)) + 1 for text in DOCUMENTS) <= length
    tokens, _ = stream.random_windows(500, length, generator())
    rows = tokens.tolist()
    last = ids[-length:]                        # only the end of the text leaves no room for that
    assert all(row[0] == EOT or row == last for row in rows)
    assert sum(row[0] == EOT for row in rows) > 450
    text = {tuple(ids[i:i + length]) for i in range(len(ids))}
    assert all(tuple(row) in text for row in rows)          # and each is a stretch of the stream
    assert {tuple(row[:4]) for row in rows if row[0] == EOT} == {
        tuple([EOT, *TOKENIZER.encode(document)][:4]) for document in DOCUMENTS}


def test_long_documents_are_read_everywhere():
    document = " ".join(f"Ada {i}." for i in range(300))
    stream = TextStream([document, "Ben."], TOKENIZER)
    tokens, _ = stream.random_windows(300, 8, generator())
    assert len({tuple(row) for row in tokens.tolist()}) > 150
    ids = stream_ids([document, "Ben."])
    text = {tuple(ids[i:i + 8]) for i in range(len(ids) - 7)}
    assert all(tuple(row) in text for row in tokens.tolist())


def test_windows_are_decided_by_the_generator():
    stream = TextStream(DOCUMENTS, TOKENIZER)
    same, other = (stream.random_windows(20, 16, generator()),
                   stream.random_windows(20, 16, generator(1)))
    assert torch.equal(stream.random_windows(20, 16, generator())[0], same[0])
    assert not torch.equal(other[0], same[0])
    again = generator()
    stream.random_windows(20, 16, again)
    # The next batch is another one.
    assert not torch.equal(stream.random_windows(20, 16, again)[0], same[0])


def test_all_windows_cover_the_text_from_its_start():
    document = " ".join(f"Ada {i}." for i in range(300))
    stream = TextStream([document], TOKENIZER)
    ids = stream_ids([document])
    batches = stream.all_windows(10, 1000)
    rows = [row for tokens, _ in batches for row in tokens.tolist()]
    assert all(len(tokens) <= 64 for tokens, _ in batches) and len(rows) == len(ids) // 10
    assert rows[0] == ids[:10]
    # The second window begins less than a window behind the document's start and is moved back to
    # it; no other is.
    assert rows[2:] == [ids[i:i + 10] for i in range(20, len(ids) - 9, 10)]
    assert sum(len(tokens) for tokens, _ in stream.all_windows(10, 7)) == 7
    for a, b in zip(stream.all_windows(10, 20), stream.all_windows(10, 20)):
        assert torch.equal(a[0], b[0])


def test_too_little_text():
    stream = TextStream(["Ada keeps a goat."], TOKENIZER)
    size = len(stream_ids(["Ada keeps a goat."]))
    with pytest.raises(InputError, match=f"{size} tokens, fewer than one window of {size + 1}"):
        stream.random_windows(1, size + 1, generator())
    (tokens, mask), = stream.all_windows(size + 5, 9)   # for evaluation a shorter window will do
    assert tokens.shape == mask.shape == (1, size)


def test_the_last_twentieth_of_the_documents_is_held_out():
    for count, held_out in ((100, 5), (21, 2), (20, 1), (2, 1)):
        parts = TextStream(DOCUMENTS[:count], TOKENIZER).split()
        assert [part.ids.tolist() for part in parts] == [
            stream_ids(DOCUMENTS[:count][:-held_out]), stream_ids(DOCUMENTS[:count][-held_out:])]
        assert parts[1].first[0] == 0 and len(parts[1].first) == held_out


def test_of_a_single_document_the_last_twentieth_of_its_tokens_is_held_out():
    document = " ".join(f"Ada {i}." for i in range(300))
    ids = stream_ids([document])
    training, held_out = TextStream([document], TOKENIZER).split()
    assert (training.ids.tolist() + held_out.ids.tolist() == ids
            and len(training.ids) == len(ids) * 19 // 20)
    assert held_out.all_windows(8, 3)[0][0].tolist() == [ids[len(training.ids):][i:i + 8]
                                                         for i in (0, 8, 16)]


def test_text_too_short_to_hold_any_out():
    with pytest.raises(InputError, match="too few to hold out a twentieth: add text, "
                                         "or name some with --val"):
        TextStream(["Ada."], TOKENIZER).split()


def test_marks_are_found_across_slices(monkeypatch):
    first = TextStream(DOCUMENTS, TOKENIZER).first
    monkeypatch.setattr(text_module, "SLICE", 7)
    assert (torch.equal(TextStream(DOCUMENTS, TOKENIZER).first, first)
            and len(first) == len(DOCUMENTS))


# ----------------------------------------------------------------------------- folders

@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "CACHE", tmp_path / "cache")
    root = tmp_path / "texts"
    (root / "b").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "a.txt").write_text("Ada keeps a goat.\n<|endoftext|>\nBen eats jam.\n")
    (root / "b/c.txt.gz").write_bytes(gzip.compress(b"Eve likes blue."))
    (root / "b/d.jsonl").write_text(json.dumps({"text": "Write <|endoftext|> here."}))
    (root / ".git/config").write_bytes(b"\xff\xfe")
    return root


FOLDER = ["Ada keeps a goat.", "Ben eats jam.", "Eve likes blue.", "Write", "here."]


def test_a_folder_is_its_files_in_the_order_of_their_names(folder):
    stream = text_stream([str(folder)], TOKENIZER)
    assert stream.ids.tolist() == stream_ids(FOLDER)
    assert isinstance(stream.ids, np.memmap) and stream.ids.dtype == np.uint16
    assert torch.equal(stream.random_windows(9, 6, generator())[0],
                       TextStream(FOLDER, TOKENIZER).random_windows(9, 6, generator())[0])
    assert (isinstance(stream.split()[0].ids, np.memmap)
            and stream.split()[1].ids.tolist() == stream_ids(FOLDER[-1:]))


def test_a_folder_is_encoded_once_and_again_when_it_changes(folder, monkeypatch):
    first = folder_ids(folder, TOKENIZER).tolist()
    monkeypatch.setattr(text_module, "read_text", None)         # would fail if it read a file again
    assert folder_ids(folder, TOKENIZER).tolist() == first
    monkeypatch.undo()
    monkeypatch.setattr(text_module, "CACHE", folder.parent / "cache")
    (folder / "e.txt").write_text("Ben.")
    assert folder_ids(folder, TOKENIZER).tolist() == first + stream_ids(["Ben."])
    assert len(list((folder.parent / "cache").glob("texts-*.bin"))) == 2


def test_a_large_vocabulary_takes_four_bytes_an_id(folder):
    class Large:
        name, vocab_size, endoftext = "large", 70_000, 69_999

        def encode(self, text):
            return [68_000, len(text)]

    ids = folder_ids(folder, Large())
    assert ids.dtype == np.uint32 and ids.tolist() == [
        id for text in FOLDER for id in (69_999, 68_000, len(text))]


def test_a_folder_that_cannot_be_read_leaves_nothing_behind(folder):
    (folder / "z.txt").write_bytes(b"good\n\xff\xfe")
    with pytest.raises(InputError, match=r"z.txt, line 2: expected UTF-8"):
        folder_ids(folder, TOKENIZER)
    assert not list((folder.parent / "cache").glob("*.bin"))
    with pytest.raises(InputError, match="single folder"):
        text_stream([str(folder), str(folder / "a.txt")], TOKENIZER)
    (folder.parent / "empty").mkdir()
    with pytest.raises(InputError, match="no files in this folder"):
        text_stream([str(folder.parent / "empty")], TOKENIZER)
