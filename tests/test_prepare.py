"""data/prepare.py against a hub of our own on 127.0.0.1: what it prints, fetches, verifies, refuses
and converts."""
import gzip
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub",
                                      reason="huggingface_hub (extra hub) is not installed")

from huggingface_hub import constants

from common.errors import InputError
from data import prepare
from data.prepare import SETS, Config, from_lima, from_oasst, is_whole, next_steps, tally
from data.readers import read_demonstrations, read_rankings, read_text

ROOT = Path(__file__).resolve().parents[1]
API = huggingface_hub.HfApi
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DOLLY = [{"instruction": f"Name the number {i}.", "context": "", "response": "x" * 50 + str(i)}
         for i in range(40)]


def lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that a download of a data set uses.

    `server` holds what the hub serves and does wrong.
    """
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", cut: int = 0, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:len(body) - cut])
        self.close_connection = bool(cut)

    def do_HEAD(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.seen.append((self.command, path, self.headers["Range"]))
        if path.startswith("/api/datasets/"):
            hub.revisions.append(path.split("/revision/")[1])
            files = [{"rfilename": name, "size": len(body), **hub.digests(name, body)}
                     for name, body in hub.files.items()]
            return self.answer(
                200, json.dumps({"id": "a/b", "sha": COMMIT, "siblings": files}).encode())
        if hub.refuse or path.startswith("/api/"):
            return self.answer(hub.refuse or 404, **hub.refusal)
        name = path.split(f"/resolve/{COMMIT}/" if "/resolve/" in path else "/storage/")[1]
        body, digests = hub.sent.get(name, hub.files[name]), hub.digests(name, hub.files[name])
        if "lfs" in digests and "/resolve/" in path:            # large files lie on another host
            place = f"http://localhost:{hub.server_port}/storage/{name}"
            return self.answer(302, Location=place, X_Repo_Commit=COMMIT,
                               X_Linked_Size=str(len(body)),
                               X_Linked_Etag=f'"{digests["lfs"]["sha256"]}"')
        headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{digests["blobId"]}"',
                   "Accept_Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if start:
            first = int(start[1])
            return self.answer(206, body[first:], **headers,
                               Content_Range=f"bytes {first}-{len(body) - 1}/{len(body)}")
        cut, hub.cut = (hub.cut, 0) if self.command == "GET" else (0, hub.cut)
        self.answer(200, body, cut, **headers)

    do_GET = do_HEAD


def digests(name: str, body: bytes) -> dict:
    """The listing's digests of a file: SHA-256 of a large one (here: compressed or parquet), git's
    SHA-1 of a small one."""
    found = {"blobId": hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()}
    if name.endswith((".gz", ".parquet")):
        found["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body),
                        "pointerSize": 130}
    return found


def point_to(url: str, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", partial(API, endpoint=url, token=False))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub; huggingface_hub is pointed to it, without a token and with a cache of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    vars(server).update(files={}, sent={}, seen=[], revisions=[], digests=digests, cut=0, refuse=0,
                        refusal={})
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.gets = lambda: [(path, span) for verb, path, span in server.seen
                           if verb == "GET" and "/api/" not in path]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01},
                     daemon=True).start()
    for name, value in {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": True,
                        "HF_HUB_OFFLINE": False, "DOWNLOAD_CHUNK_SIZE": 500}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    point_to(server.url, monkeypatch)
    yield server
    server.shutdown()
    server.server_close()


def run(name: str, out: Path, **fields) -> dict:
    return prepare.prepare(Config(name=name, out=str(out), **fields))


def complaint(name: str, out: Path, **fields) -> str:
    """The one-line message with which the program refuses."""
    with pytest.raises(InputError) as caught:
        run(name, out, **fields)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ----------------------------------------------------------------------------- a whole run

def test_a_whole_run_prints_what_it_does(hub, tmp_path, capsys, monkeypatch):
    body = lines(*DOLLY)
    hub.files = {"README.md": b"card", "databricks-dolly-15k.jsonl": body}
    file = tmp_path / "data" / "databricks-dolly-15k.jsonl"
    monkeypatch.setitem(SETS, "dolly",
                        replace(SETS["dolly"], files={"databricks-dolly-15k.jsonl": 40}))
    assert run("dolly", tmp_path / "data") == {"databricks-dolly-15k.jsonl": 40}
    assert file.read_bytes() == body
    printed = capsys.readouterr().out
    for part in ("CC BY-SA 3.0", "databricks/databricks-dolly-15k", COMMIT,
                 f"{len(body):,} bytes, files: 1", f"folder   {tmp_path}", f"verified {file}\n",
                 "40 rows, as published", f"python -m data.show {file}\n",
                 f"python train_sft.py --data {file}\n"):
        assert part in printed
    assert hub.revisions == ["main"] and len(hub.gets()) == 1, "the card was fetched too"
    assert not (tmp_path / "cache").exists()


def test_what_is_printed_comes_before_what_is_fetched(hub, tmp_path, capsys):
    hub.files = {"databricks-dolly-15k.jsonl": lines(*DOLLY)}
    hub.refuse, hub.refusal = 404, {"X_Error_Code": "EntryNotFound"}
    assert "did not give it" in complaint("dolly", tmp_path / "data")
    assert "CC BY-SA 3.0" in capsys.readouterr().out


def test_a_file_that_is_here_and_whole_is_not_fetched_again(hub, tmp_path, capsys):
    hub.files = {
        f"harmless-base/{part}.jsonl.gz": gzip.compress(lines({
            "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}))
        for part in ("train", "test")}
    run("hh_harmless", tmp_path)
    assert len(hub.gets()) == 2 and all("/storage/" in path for path, _ in hub.gets())
    hub.seen.clear()
    assert run("hh_harmless", tmp_path) == {"harmless-base/train.*": 1, "harmless-base/test.*": 1}
    assert hub.gets() == []
    printed = capsys.readouterr().out
    assert ("1 rows, 42,537 published: the set has changed" in printed
            and "which was here" in printed)
    train, test = (tmp_path / "harmless-base" / "train.jsonl.gz",
                   tmp_path / "harmless-base" / "test.jsonl.gz")
    assert f"python train_rm.py --data {train} --val {test}\n" in printed
    assert f"python train_dpo.py --init SFT_CHECKPOINT --data {train} --val {test}\n" in printed


def test_a_damaged_file_is_fetched_anew(hub, tmp_path):
    body = lines(*DOLLY)
    hub.files, file = {"databricks-dolly-15k.jsonl": body}, tmp_path / "databricks-dolly-15k.jsonl"
    run("dolly", tmp_path)
    for damaged in (body[:-1], body.replace(b"Name", b"name")):
        file.write_bytes(damaged)
        run("dolly", tmp_path)
        assert file.read_bytes() == body
    assert len(hub.gets()) == 3


def test_a_dropped_connection_is_taken_up_where_it_broke(hub, tmp_path):
    hub.files, hub.cut = {"databricks-dolly-15k.jsonl": lines(*DOLLY)}, 1300
    run("dolly", tmp_path)
    (_, first), (_, second) = hub.gets()
    size = len(lines(*DOLLY))
    assert (first is None
            and size - 1300 - 500 <= int(re.fullmatch(r"bytes=(\d+)-", second)[1]) <= size - 1300)
    assert (tmp_path / "databricks-dolly-15k.jsonl").read_bytes() == lines(*DOLLY)


@pytest.mark.parametrize("name, source", [("databricks-dolly-15k.jsonl", "dolly"),
                                          ("2023-04-12_oasst_ready.trees.jsonl.gz", "oasst")])
def test_a_wrong_digest_is_refused_and_the_file_removed(hub, tmp_path, name, source):
    body = lines(*DOLLY) if source == "dolly" else gzip.compress(lines(TREE))
    hub.files, hub.sent = {name: body}, {name: body[:-2] + b"?" + body[-1:]}
    message = complaint(source, tmp_path)
    assert "digest" in message and "run this again" in message and str(tmp_path / name) in message
    assert not (tmp_path / name).exists()
    hub.sent = {}
    run(source, tmp_path)
    assert (tmp_path / name).read_bytes() == body


def test_parquet_in_shards_from_the_hubs_own_branch(hub, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow
    for i in range(2):
        rows = [{"prompt": f"Add {i} and {j}.\n\nOutput:", "completion": f" {i + j}"}
                for j in range(3)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "shard.parquet")
        hub.files[f"self_instruct/train/000{i}.parquet"] = (tmp_path / "shard.parquet").read_bytes()
    hub.files["human_eval/train/0000.parquet"] = b"not asked for"
    assert run("self_instruct", tmp_path / "out") == {"self_instruct/train/*.parquet": 6}
    assert hub.revisions == ["refs%2Fconvert%2Fparquet"] and len(hub.gets()) == 2
    files = [tmp_path / "out" / "self_instruct" / "train" / f"000{i}.parquet" for i in range(2)]
    assert len(read_demonstrations(*files)) == 6
    assert f"python train_sft.py --data {files[0]} {files[1]}\n" in capsys.readouterr().out


def test_text_is_counted_unless_that_takes_too_much_memory(hub, tmp_path, capsys, monkeypatch):
    hub.files = {"TinyStoriesV2-GPT4-train.txt": b"One.\n<|endoftext|>\nTwo.\n" * 3,
                 "TinyStoriesV2-GPT4-valid.txt": b"Three.\n"}
    train, valid = (tmp_path / f"TinyStoriesV2-GPT4-{part}.txt" for part in ("train", "valid"))
    assert list(run("tinystories", tmp_path).values()) == [len(read_text(train)), 1] == [4, 1]
    printed = capsys.readouterr().out
    assert (f"python train_base.py --data {train} --val {valid}\n" in printed
            and "data.show" not in printed)
    monkeypatch.setattr(prepare, "LARGEST", 10)
    run("tinystories", tmp_path)
    assert "TinyStoriesV2-GPT4-train.txt: not counted" in capsys.readouterr().out


def test_rows_that_the_readers_refuse_are_left_out_of_a_copy(hub, tmp_path, capsys):
    hub.files = {"databricks-dolly-15k.jsonl": lines(DOLLY[0], {**DOLLY[1], "response": ""},
                                                     DOLLY[2])}
    assert run("dolly", tmp_path) == {"databricks-dolly-15k.jsonl": 3}
    copy, printed = tmp_path / "databricks-dolly-15k.usable.jsonl", capsys.readouterr().out
    assert (f"{copy}: 2 demonstrations; 1 left out, the first: "
            f"{tmp_path}/databricks-dolly-15k.jsonl, line 2" in printed)
    assert f"python train_sft.py --data {copy}\n" in printed
    with pytest.raises(InputError):
        read_demonstrations(tmp_path / "databricks-dolly-15k.jsonl")
    assert [turns[-1]["content"] for turns in read_demonstrations(copy)] == [
        DOLLY[0]["response"], DOLLY[2]["response"]]


# ----------------------------------------------------------------------------- refusals

def test_an_unknown_name_lists_the_sets(capsys, tmp_path):
    for name in ("", "dollie"):
        assert "python -m data.prepare dolly" in complaint(name, tmp_path)
        listed = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in listed] == list(SETS)


def test_an_unreachable_hub(monkeypatch, tmp_path, hub):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch)
    message = complaint("dolly", tmp_path)
    assert "databricks/databricks-dolly-15k" in message and "check the network" in message


@pytest.mark.parametrize("status, headers", [
    (401, {"X_Error_Code": "GatedRepo"}), (403, {"X_Error_Code": "GatedRepo"}), (403, {})])
def test_a_gated_set_without_a_token(hub, tmp_path, status, headers):
    hub.files, hub.refuse, hub.refusal = {"train.jsonl": b"secret"}, status, headers
    message = complaint("lima", tmp_path)
    assert ("hf auth login" in message and "HF_TOKEN" in message
            and "https://huggingface.co/datasets/GAIR/lima" in message)


def test_a_set_whose_files_have_moved(hub, tmp_path):
    hub.files = {"dolly.parquet": b""}
    assert "databricks-dolly-15k.jsonl is not there any more" in complaint("dolly", tmp_path)


def test_no_room_and_no_folder(hub, tmp_path, monkeypatch):
    hub.files = {"databricks-dolly-15k.jsonl": lines(*DOLLY)}
    (tmp_path / "file").write_text("in the way")
    assert "cannot be used" in complaint("dolly", tmp_path / "file")
    assert "cannot be used" in complaint("dolly", tmp_path / "file" / "folder")
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    message = complaint("dolly", tmp_path / "data")
    assert "1,000 are free" in message and "--out" in message and hub.gets() == []


@pytest.mark.parametrize("package, name, file", [
    ("huggingface_hub", "dolly", "databricks-dolly-15k.jsonl"),
    ("pyarrow", "alpaca", "data/train-0.parquet")])
def test_a_missing_package_is_named_before_anything_is_fetched(hub, tmp_path, monkeypatch, package,
                                                               name, file):
    hub.files = {file: b"PAR1"}
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in complaint(name, tmp_path)
    assert hub.gets() == []


# ----------------------------------------------------------------------------- conversions

def message(role: str, text: str, *replies: dict, **fields) -> dict:
    return {"text": text, "role": role, "lang": "en", "replies": list(replies), **fields}


TREE = {"message_tree_id": "1", "tree_state": "ready_for_export", "prompt": message(
    "prompter", "Hue?",
    message("assistant", "Green.", rank=2),
    message("assistant", "Red.",
            message("prompter", "Why?", message("assistant", "Unranked."),
                    message("assistant", "Warm.", rank=None), rank=1),
            message("prompter", "Name another.", message("assistant", "No.", rank=1),
                    message("assistant", "Blue.", rank=0), rank=0),
            rank=0),
    message("assistant", "A hue.",
            message("prompter", "Which?", message("assistant", "Any.", rank=0)), rank=1),
    message("assistant", "Not ranked."))}
OPEN = {"prompt": message(
    "prompter", "Hi.", message("assistant", "Hello.", message("prompter", "Bye."), rank=0))}
SILENT = {"prompt": message("prompter", "Anyone?")}
SPANISH = {"prompt": message(
    "prompter", "Hola.", message("assistant", "¡Hola!", lang="es", rank=0), lang="es")}


def texts(turns: list[dict]) -> list[str]:
    return [turn["content"] for turn in turns]


def test_oasst_trees_become_demonstrations_and_rankings(hub, tmp_path, capsys):
    hub.files = {"2023-04-12_oasst_ready.trees.jsonl.gz":
                 gzip.compress(lines(TREE, OPEN, SILENT, SPANISH))}
    run("oasst", tmp_path)
    demonstrations, rankings = tmp_path / "demonstrations.jsonl", tmp_path / "rankings.jsonl"
    read = read_demonstrations(demonstrations)
    assert [texts(turns) for turns in read] == [["Hue?", "Red.", "Name another.", "Blue."],
                                                ["Hi.", "Hello."]]
    assert [turn["role"] for turn in read[0]] == ["user", "assistant"] * 2
    first, second = read_rankings(rankings)
    assert texts(first.messages) == ["Hue?"]
    assert first.responses == ["Green.", "Red.", "A hue."] and first.scores == [-2, 0, -1]
    assert texts(second.messages) == ["Hue?", "Red.", "Name another."]
    assert second.responses == ["No.", "Blue."] and second.scores == [-1, 0]
    printed = capsys.readouterr().out
    assert "4 rows, 10,364 published" in printed
    assert f"{demonstrations}: 2 demonstrations\n{rankings}: 2 rankings\n" in printed
    assert f"python train_sft.py --data {demonstrations}\n" in printed
    assert f"python train_rm.py --data {rankings}\n" in printed


def test_oasst_in_other_languages():
    rows = [TREE, SPANISH]
    assert len(from_oasst(rows, "")["demonstrations"]) == 2
    assert [texts(row["messages"]) for row in from_oasst(rows, "es")["demonstrations"]] == [
        ["Hola.", "¡Hola!"]]
    with pytest.raises(InputError, match="en, es"):
        from_oasst(rows, "xx")


def test_lima_dialogues_become_messages(hub, tmp_path, capsys):
    rows = [{"conversations": ["Why?", "Because."], "source": "wikihow"},
            {"conversations": ["a", "b", "c", "d", "e"]}, {"conversations": ["unanswered"]}]
    hub.files = {"train.jsonl": lines(*rows)}
    run("lima", tmp_path)
    read = read_demonstrations(tmp_path / "demonstrations.jsonl")
    assert [texts(turns) for turns in read] == [["Why?", "Because."], ["a", "b", "c", "d"]]
    assert [turn["role"] for turn in read[1]] == ["user", "assistant"] * 2
    assert "2 demonstrations; 1 left out" in capsys.readouterr().out
    assert from_lima(rows[:1], "")["demonstrations"][0]["messages"][0] == {
        "role": "user", "content": "Why?"}


# --------------------------------------------------------------------- small parts, and the command

def test_tally():
    assert tally(15_011, 15_011) == "15,011 rows, as published"
    assert tally(15_020, 15_011) == "15,020 rows, 15,011 published: the set has changed"
    assert tally(7, 0) == "7 rows"


def test_next_steps_quote_a_folder_with_a_space():
    assert list(next_steps([("text", Path("my data/a.txt"))])) == [
        "python train_base.py --data 'my data/a.txt'"]


def test_git_digest_is_gits_own(tmp_path):
    (tmp_path / "hello").write_bytes(b"hello\n")                # git hash-object prints this for it
    file = SimpleNamespace(size=6, lfs=None, blob_id="ce013625030ba8dba906f756967f9e9ca394464a")
    assert is_whole(tmp_path / "hello", file) and not is_whole(tmp_path / "absent", file)


def test_the_table_is_complete():
    for source in SETS.values():
        assert re.fullmatch(r"[\w-]+/[\w-]+", source.repo) and source.licence and source.about
        assert (source.kind in prepare.SCRIPTS
                and all(pattern.count("*") <= 1 for pattern in source.files))
        for script in prepare.SCRIPTS[source.kind]:
            assert (ROOT / script.split()[0]).is_file()


def test_from_the_command_line(hub, tmp_path):
    """As a module it fetches; as a script, in the same folder, it finds everything there."""
    hub.files = {"databricks-dolly-15k.jsonl": lines(*DOLLY)}
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1",
                                "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    for start, expected in ((["-m", "data.prepare"], "verified"),
                            (["data/prepare.py"], "which was here")):
        done = subprocess.run([sys.executable, *start, "dolly", "--out", str(tmp_path / "data")],
                              cwd=ROOT, env=environment, capture_output=True, text=True,
                              timeout=120, check=False)
        assert done.returncode == 0 and expected in done.stdout, done.stderr
    assert len(hub.gets()) == 1
