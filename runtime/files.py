"""Files that are complete or absent, text that is cached under a key, and downloads."""

import hashlib
import json
import os
import signal
import threading
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

import torch

from runtime.errors import UserError
from runtime.parallel import barrier, first_process_first, process_rank

try:
    import fcntl
except ImportError:             # Windows has no such locks
    fcntl = None


@contextmanager
def replacing(path):
    """Open a binary file for writing in a with block. The file is complete or unchanged: the block
    writes to a temporary file beside it, which is flushed to disk and renamed to `path` (or to the
    file that a link at `path` points to). A device or a pipe, such as /dev/null, is written in
    place. With several processes, only the first one writes, and all wait for it. Raises UserError
    if the disk is full or the file cannot be written."""
    if process_rank() > 0:
        path = os.devnull
    if path == os.devnull or Path(path).is_char_device() or Path(path).is_fifo():
        with open(path, "wb") as file:
            yield file
        barrier()
        return
    path = Path(os.path.realpath(path))
    temporary = Path(f"{path}.tmp")
    try:
        with signals_deferred():
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):      # torch.save hides an OSError behind its own error
            raise
        raise UserError(f"{path}: cannot be written: {cause.strerror or cause}; what was there "
                        "before is kept") from error
    finally:
        temporary.unlink(missing_ok=True)
    barrier()


@contextmanager
def signals_deferred():
    """A with block during which Ctrl-C and SIGTERM wait: what they ask for is done after it."""
    waiting = []
    try:
        with handling_signals(lambda number, frame: waiting.append(number)):
            yield
    finally:
        for number in waiting[:1]:
            signal.raise_signal(number)


@contextmanager
def handling_signals(handler, numbers=(signal.SIGINT, signal.SIGTERM)):
    """A with block in which Ctrl-C and SIGTERM call handler(number, frame). Outside of the main
    thread (in a notebook server, say), where Python allows no handlers, it changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def write_json(path, content):
    """Write content as indented JSON."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


@contextmanager
def reading(path, what):
    """A with block that reads a file of PyTorch's or safetensors' and reports any error as one
    sentence. No file can run code: every reader here loads weights only."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise                       # said better already, or the file may be fine
    except Exception as error:      # a foreign or damaged file may raise anything in its reader
        raise UserError(f"{path}: not {what}, or a damaged one") from error


def load_tensors(path, device="cpu"):
    """The content of a file that torch.save wrote. Such a file is a zip archive. torch.load does
    not compare the checksums in it with what it reads, so that is done first. (Files that old
    versions of PyTorch wrote have none.) To be called within `reading`."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            folders = [member for member in archive.infolist() if member.external_attr & 0x10]
        if damaged or folders:              # of a "folder", torch.load returns unset memory
            raise ValueError("a checksum does not hold, or a member is marked as a folder")
    return torch.load(path, map_location=device, weights_only=True)


def make_folder(path):
    """Create the run's folder if needed. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: cannot make this folder: {error.strerror}") from error


CLAIMED = {}            # {folder: file descriptor that holds its lock}


def claim_folder(path):
    """Create the run's folder if needed and lock it until the command ends, so that no other run
    writes to it. The system releases the lock of a process that dies. Raises UserError."""
    make_folder(path)
    folder = path.resolve()
    if fcntl is None or process_rank() > 0 or folder in CLAIMED:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"--out {path}: another run is writing to this folder; wait for it, or "
                        "choose another") from None
    CLAIMED[folder] = descriptor


def release_folders(keep):
    """Release the locks that this process holds, but those on the folders in `keep`. A folder in
    which a run has left nothing is removed."""
    for folder in set(CLAIMED) - keep:
        with suppress(OSError):             # it is not empty
            folder.rmdir()
        os.close(CLAIMED.pop(folder))


# ------------------------------------------------------------------------------------------------
# Results that are computed once
# ------------------------------------------------------------------------------------------------


def cached(path, key, compute):
    """compute(), a text, which is kept in the file at `path`. Beside it, a .key file has a digest
    of the text and of the key, which says what the text is computed from. The file is used again
    until one of the two changes."""
    text = read_cached(path, key)
    if text is not None:
        print(f"{path}: already computed from the same model, data and flags")
        return text
    text = compute()
    for where, content in [(path, text), (path.with_suffix(".key"), digest_of(key, text))]:
        with replacing(where) as file:
            file.write(content.encode())
    return text


def read_cached(path, key):
    """The text that `cached` wrote to `path` for this key, else None."""
    try:
        text = path.read_text(encoding="utf-8")
        digest = path.with_suffix(".key").read_text()
    except (OSError, ValueError):
        return None
    return text if digest == digest_of(key, text) else None


def digest_of(key, text):
    return hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()


def cache_key(*parts):
    """A key for `cached` from models, lists of Encoded and plain values."""
    return " ".join(fingerprint(part) if isinstance(part, (torch.nn.Module, list)) else str(part)
                    for part in parts)


def fingerprint(content):
    """A digest of the exact weights of a model, or the exact content of a list of Encoded."""
    digest = hashlib.sha256()
    if isinstance(content, torch.nn.Module):
        for name, weight in content.state_dict().items():
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.cpu().contiguous().view(torch.uint8).numpy().data)
    else:
        for item in content:                # the same for ids in lists and in arrays
            item = replace(item, prompt=list(item.prompt), answers=list(map(list, item.answers)))
            digest.update(repr(item).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------
# Downloads
# ------------------------------------------------------------------------------------------------


def cache_folder():
    """Where downloads are kept: beside those of torch.hub (TORCH_HOME moves both). Raises UserError
    for a user without a home folder, as in a container that runs under an unknown id."""
    folder = Path(torch.hub.get_dir()) / "dpo"
    if folder.parts[0].startswith("~"):
        raise UserError(f"{folder}: this user has no home folder; set TORCH_HOME to a folder for "
                        "downloads")
    return folder


def download(url, path, sha256=None, md5=None):
    """Download url to path with a progress bar, unless the file exists. Returns the path.

    torch.hub writes to a partial file and compares the SHA-256 checksum if there is one. It takes a
    broken connection for the end of the file and a proxy's error page for its content, so the
    length and the first bytes are checked here before the file is renamed. Raises UserError, which
    says what to download by hand and where to put it.
    """
    with first_process_first():
        if not path.exists():
            download_now(url, path, sha256, md5)
    return path


def download_now(url, path, sha256, md5):
    """The part of `download` that uses the network."""
    partial = Path(f"{path}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot make this folder: {error.strerror}; choose "
                        "another with TORCH_HOME (or --data-dir, for data)") from error
    try:
        print(f"downloading {url} to {path}")
        with urlopen(Request(url, method="HEAD"), timeout=60) as reply:
            length = reply.headers["Content-Length"]
        torch.hub.download_url_to_file(url, str(partial), hash_prefix=sha256)
        size = partial.stat().st_size
        with open(partial, "rb") as file:
            start = file.read(64).lstrip().lower()
        if length is not None and size != int(length):
            raise OSError(f"the connection broke after {size:,} of {int(length):,} bytes")
        if start.startswith((b"<!doctype", b"<html")):
            raise OSError("the answer is a web page, not the file")
        if md5 is not None:
            with open(partial, "rb") as file:
                found = hashlib.file_digest(file, "md5").hexdigest()
            if found != md5:
                raise OSError(f"its MD5 is {found}, not {md5}")
        os.replace(partial, path)
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        raise UserError(f"{path}: not there, and it could not be downloaded ({error}); fetch {url} "
                        "by hand and put it there") from error
    finally:
        partial.unlink(missing_ok=True)
