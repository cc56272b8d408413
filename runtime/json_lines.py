"""Files of JSON lines: one object per line, gzipped or not. A file of another format is named."""

import gzip
import json
import re
import zlib
from pathlib import Path

from runtime.errors import UserError

# How files of other formats begin, and what to do.
FORMATS = [
    (b"version https://git-lfs", "a Git LFS pointer, not the data: run git lfs pull"),
    (b"<", "a web page (HTML or XML): download the file itself"),
    (b"PK\3\4", "a zip file: unpack it"), (b"\x1f\x8b", "a gzip file: let its name end in .gz"),
    (b"\xff\xfe", "UTF-16 text: save it as UTF-8"), (b"\xfe\xff", "UTF-16 text: save it as UTF-8"),
    (b"[", "a JSON array"), (b"PAR1", "a Parquet file"),
]


def check_is_a_file(path):
    """Raise UserError if path is a URL or a folder."""
    if re.match(r"\w\w+:/", str(path)):
        raise UserError(f"{path}: a URL; download the file and give its path")
    if Path(path).is_dir():
        raise UserError(f"{path}: a folder; expected a .jsonl or .jsonl.gz file")


def check_format(path, head):
    """Raise UserError if a file with these first bytes is of another format, and name it."""
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    found = next((name for start, name in FORMATS if head.startswith(start)), None)
    first_line = head.partition(b"\n")[0]
    if not found and not head.startswith(b"{") and re.search(b"[,;\t]", first_line):
        found = "it looks like CSV"
    if found:
        raise UserError(f"{path}: {found}; expected JSON lines, one object per line "
                        "(docs/preferences.md shows how to convert a file)")


def read_objects(path):
    """Yield (line number, object) for each line of a JSON lines file, gzipped or not."""
    check_is_a_file(path)
    line_number = 0
    open_file = gzip.open if str(path).endswith(".gz") else open
    try:
        with open_file(path, "rb") as file:
            check_format(path, file.peek(1000))
            for line_number, line in enumerate(file, 1):
                line = line.decode("utf-8-sig" if line_number == 1 else "utf-8")
                if line.strip():
                    yield line_number, json.loads(line, object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {line_number}: not UTF-8 text") from error
    except KeyError as error:
        raise UserError(f"{path}, line {line_number}: the key {error} appears twice") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {line_number}: not JSON; expected one whole object per "
                        "line") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read: {reason}") from error


def unique_keys(pairs):
    """A JSON object as a dict. By default, json silently keeps the last of two equal keys."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise KeyError(key)
        found[key] = value
    return found
