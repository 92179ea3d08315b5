"""Files to rows: `.json`, `.jsonl`, `.txt`, `.gz` of any of these, or `.parquet` → objects.

The content decides, never the extension: the first bytes show gzip, parquet, a Git LFS pointer or
a web page; the text shows a JSON list, an object that holds rows, or one object per line.
"""
import gzip
import importlib.util
import io
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

from common.errors import InputError
from common.files import free_memory

# Any of these shows that an object is a row, not a wrapper around rows.
ROW_KEYS = {"messages", "prompt", "instruction", "chosen", "rejected", "responses", "text",
            "conversations", "conversation", "dialog", "output_1", "turns", "row", "question",
            "problem", "query", "inputs", "output", "completion", "response"}
# How a file begins that is something else: what it is, what to do.
NOT_DATA = ((rb"version https://git-lfs", "a Git LFS pointer", "fetch it: git lfs pull"),
            (rb"\s*<(!doctype html|html)\b", "an HTML page",
             "download the file itself (on a hub: the raw or resolve link)"),
            (rb"PK\x03\x04", "a zip archive or an Excel sheet",
             "unpack it, or save the sheet as .jsonl"),
            (rb"ARROW1", "an Arrow file", "write the set with to_json or to_parquet"),
            (rb"\x80[\x02-\x05]", "a pickle", "load it where it was made and write .jsonl"),
            (rb"\x28\xb5\x2f\xfd|BZh|\xfd7zXZ", "a zstd, bzip2 or xz archive", "unpack it"),
            (rb"\xff\xfe|\xfe\xff", "UTF-16 text", "save it as UTF-8"))


# ----------------------------------------------------------------------------- bytes to text

def read_content(path: str | Path) -> str:
    """The text of a file, decompressed if it begins as gzip does, without a byte-order mark;
    parquet as JSON lines."""
    # A text is held as bytes, as a string and as rows: four times its size or more.
    room = free_memory() / 4
    try:
        if Path(path).stat().st_size > room:
            raise too_large(path, Path(path).stat().st_size)
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            pieces, size = [], 0
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                while piece := file.read(2 ** 24):
                    pieces.append(piece)
                    size += len(piece)
                    if size > room:
                        raise too_large(path, size)
            data = b"".join(pieces)
        data = parquet_lines(path, data) if data[:4] == b"PAR1" else data
        for pattern, what, remedy in NOT_DATA:
            if re.match(pattern, data.removeprefix(b"\xef\xbb\xbf")[:200], re.IGNORECASE):
                raise InputError(f"{path}: {what}, not the data; {remedy}")
        return data.decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: expected a whole gzip file, found one that is cut short or "
                         "damaged; download or compress it again") from error
    except OSError as error:
        raise InputError(f"{path}: expected a file, found: {error.strerror}; name a file that can "
                         "be read, not a folder") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: expected UTF-8 text, found the byte "
                         f"0x{error.object[error.start]:02x}; save the file as UTF-8") from error


def too_large(path: str | Path, size: int) -> InputError:
    """The error for a file that would not fit into memory."""
    return InputError(f"{path}: {size / 2 ** 20:,.1f} MiB or more, too much for the memory that is "
                      "free; split the file (plain text: into a folder of files, of which only "
                      "one is read at a time)")


# Run in a process of its own: beside torch, pyarrow may abort the process that ends.
PARQUET = """
import json, os, sys
from pyarrow import BufferReader, parquet
def plain(value):
    if isinstance(value, bytes):
        return value.decode()
    return str(value)
for batch in parquet.ParquetFile(BufferReader(sys.stdin.buffer.read())).iter_batches():
    for row in batch.to_pylist():
        print(json.dumps(row, default=plain))
sys.stdout.flush()
os._exit(0)
"""


def parquet_lines(path: str | Path, data: bytes) -> bytes:
    """The rows of a parquet file as JSON lines; InputError without pyarrow, an optional extra."""
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"{path}: a parquet file; pip install pyarrow reads it, or save it as "
                         f".jsonl")
    damaged = InputError(f"{path}: expected a whole parquet file, found one that is cut short or "
                         f"damaged; download it again")
    if data[-4:] != b"PAR1":                               # no process is needed to see that
        raise damaged
    done = subprocess.run([sys.executable, "-c", PARQUET], input=data, capture_output=True)
    if done.returncode == 0:
        return done.stdout
    if b"UnicodeDecodeError" in done.stderr:
        raise InputError(f"{path}: expected columns of text, found one of bytes that are no text; "
                         f"leave it out")
    raise damaged


# ----------------------------------------------------------------------------- text to rows

def read_rows(path: str | Path) -> list[tuple[str, dict]]:
    """(where, row) for each row of a JSON list, of an object that holds one, or of JSON lines."""
    content = read_content(path)
    # Not splitlines: it also cuts at U+2028 and the like, which may stand unescaped in a string.
    lines = [(n, line.strip()) for n, line in enumerate(content.split("\n"), start=1)
             if line.strip()]
    if lines and (lines[0][1].startswith("[") or not lines[0][1].endswith("}")):
        rows = [(f"{path}, row 1", parse_json(content, path, 1))]       # one value over all lines
    else:
        rows = [(f"{path}, line {n}", parse_json(line, path, n)) for n, line in lines]
    if len(rows) == 1 and isinstance(inner := unwrapped(rows[0][1], path), list):
        rows = [(f"{path}, row {n}", row) for n, row in enumerate(inner, start=1)]
    if not rows:
        raise InputError(f"{path}: expected at least one row, found none; "
                         "name a file with rows in it")
    return [(where, flat) for where, row in rows for flat in flatten(row, where)]


def unwrapped(value, path: str | Path):
    """The rows that a file's only value holds: the list itself; of an object that is no row, its
    `train` split, its only list of objects, its columns, or the objects it names; else the value.
    """
    if not isinstance(value, dict) or value.keys() & ROW_KEYS and not is_columns(value):
        return value
    lists = {key: rows for key, rows in value.items() if is_objects(rows) and rows}
    if "rows" in lists and all("row" in row for row in lists["rows"]):      # a dataset viewer's
        return lists["rows"]
    if len(lists) > 1:
        if "train" not in lists:
            raise InputError(f"{path}: expected one list of rows, found {', '.join(lists)}; write "
                             f"the one you mean into a file of its own")
        left = ", ".join(name for name in lists if name != "train")
        print(f"{Path(path).name}: read its list train, left out {left}", file=sys.stderr)
        return lists["train"]
    if lists or [] in value.values():
        return next(iter(lists.values()), [])
    if is_columns(value):
        return [dict(zip(value, row)) for row in zip(*value.values())]
    inner = [item for item in value.values() if isinstance(item, dict)]
    if len(inner) == 1 and not inner[0].keys() & ROW_KEYS:
        return unwrapped(inner[0], path)                    # {"data": {"train": …}}
    if inner and len(inner) == len(value) and all(item.keys() & ROW_KEYS for item in inner):
        return inner                                        # {"0": row, "1": row}
    return value


def is_columns(value: dict) -> bool:
    """True for a table by columns: a list of texts for each name, all of one length."""
    columns = list(value.values())
    return (len(value.keys() & ROW_KEYS) > 1 and all(isinstance(column, list) and not any(
        isinstance(item, (list, dict)) for item in column) for column in columns)
            and len({len(column) for column in columns}) == 1)


def flatten(row, where: str) -> list[dict]:
    """The row itself, without null fields; what a dataset viewer has around it taken off; one row
    for each of its `instances`: that is where Self-Instruct keeps input and output."""
    if isinstance(row, dict) and isinstance(row.get("row"), dict):
        if row.get("truncated_cells"):
            raise wrong(where, "truncated_cells", "whole fields", describe(row["truncated_cells"]),
                        "download the file itself instead of the viewer's page")
        row = row["row"]
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, found {describe(row)}; "
                         f"write fields in {{}}")
    instances = [{}] if row.get("instances") is None else row["instances"]
    if not instances or not is_objects(instances):
        raise wrong(where, "instances", "a list of objects", describe(instances),
                    "write an object for each")
    return [{key: value for key, value in (row | instance).items() if value is not None}
            for instance in instances]


def is_objects(value) -> bool:
    """True for a list that holds nothing but objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def parse_json(content: str, path: str | Path, line: int):
    """The value of the JSON text that begins on `line` of a file."""
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        head = content.lstrip().split("\n")[0]
        table = re.fullmatch(r"[\w \"]+([,;\t][\w \"]+)+\s*", head) and "\n" in content.strip()
        remedy = ("save the table as .jsonl, one object per line" if table else
                  "write a JSON list or one object per line")
        raise InputError(f"{path}, line {line + error.lineno - 1}: expected JSON, found "
                         f"{'a table of columns (CSV or TSV)' if table else 'a fault'} in column "
                         f"{error.colno} ({error.msg}); {remedy}") from error
    except (RecursionError, ValueError) as error:   # ValueError: a number of thousands of digits
        raise InputError(f"{path}, line {line}: expected rows of plain fields, found JSON nested "
                         "too deeply or a number too long; check what wrote the file") from error


# ----------------------------------------------------------------------------- errors

def describe(value) -> str:
    """A value in a few words, on one line."""
    if isinstance(value, (list, dict)):
        return f"a list of {len(value)}" if isinstance(value, list) else "an object"
    shown = "nothing (missing or null)" if value is None else repr(value)
    return shown if len(shown) <= 40 else shown[:40] + "…"


def wrong(where: str, field: str, expected: str, found: str, remedy: str) -> InputError:
    """The error for one field of one row."""
    return InputError(f"{where}: field {field}: expected {expected}, found {found}; {remedy}")
