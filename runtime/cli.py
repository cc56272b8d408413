"""The command line: the parser, how a command begins, and how it ends with one sentence."""

import argparse
import functools
import io
import math
import os
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.errors import Interrupted, UserError
from runtime.files import CLAIMED, claim_folder, handling_signals, release_folders
from runtime.parallel import choose_device, is_first_to_say, join_processes


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that prints the module's docstring as help and answers a wrong flag with
    one sentence."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)
        self.groups = {}

    def group(self, title):
        """add_argument of the group of flags with this title; --help lists groups in the order in
        which they are first asked for."""
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title)
        return self.groups[title].add_argument

    def format_help(self):
        """The help, with the flags that change no result at the end."""
        self._action_groups.sort(key=lambda group: group.title == "speed and memory")
        return super().format_help()

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def path_type(text):
    """An argparse type: a Path. A "~" is the home folder; in --out=~/x, the shell leaves it."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: this user has no home folder") from error


def number_type(kind, least, above=False, most=math.inf):
    """An argparse type: a finite int or float, at least (or above) `least` and at most `most`."""
    wanted = "a whole number" if kind is int else "a number"
    wanted += f" {'above' if above else 'of at least'} {least}"
    if most < math.inf:
        wanted += f" and at most {most}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        in_range = least <= value <= most and value != math.inf
        if not in_range or (above and value == least):
            raise argparse.ArgumentTypeError(f"expected {wanted}, not {text!r}")
        return value
    return parse


# ------------------------------------------------------------------------------------------------
# How a command begins
# ------------------------------------------------------------------------------------------------


def set_up(args):
    """Connect to the other processes, if there are any, and return the device."""
    device = choose_device(args.device)
    join_processes(device)
    return device


def begin_run(args, reads, writes):
    """set_up for a run that writes to args.out: create and lock that folder. Raises UserError if
    another run holds it, or if this run would overwrite a file that it reads, under whatever name.
    reads: names of flags with paths. writes: names of files in args.out."""
    device = set_up(args)
    claim_folder(args.out)
    for name in reads:
        path = getattr(args, name)
        for output in (args.out / name for name in writes):
            if path and path.exists() and output.exists() and output.samefile(path):
                raise UserError(f"--{name.replace('_', '-')} {path}: this run would overwrite it; "
                                "choose another folder with --out")
    return device


def only_one_process(what):
    """Raise UserError if torchrun started several processes: `what` cannot be shared among them."""
    if dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        raise UserError(f"{what} takes one process: start it without torchrun")


def choose_row_length(args, block_size):
    """Set --row-length to the block size if it was not given. Raises UserError if it is larger."""
    args.row_length = args.row_length or block_size
    if args.row_length > block_size:
        raise UserError(f"--row-length {args.row_length} is above the block size, {block_size}")


def warn_of_large_lr(args, usual, init):
    """Warn if pretrained weights are about to be trained at a rate that ruins them."""
    if init != "random" and args.lr / usual > 10.1:
        print(f"warning: --lr {args.lr:g} is {args.lr / usual:.0f} times the usual {usual:g} for "
              "pretrained weights; watch the samples, the model may lose its language",
              file=sys.stderr)


# ------------------------------------------------------------------------------------------------
# How a command ends
# ------------------------------------------------------------------------------------------------


def command(main):
    """Decorate main(argv) as a command. A UserError, a file that cannot be written and a lack of
    memory become one sentence on stderr and exit code 2. Ctrl-C ends with 130 and SIGTERM with 143,
    as in a shell. Characters that the terminal cannot show are escaped. Of several processes, only
    the first one prints; of the others, only an error that no other process has printed."""
    @functools.wraps(main)
    def run(argv=None):
        prepare_streams()
        streams = sys.stdout, sys.stderr
        nested, locked_before = dist.is_initialized(), set(CLAIMED)
        rank = int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0
        if rank > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            with terminating():
                result = main(argv)
            if dist.is_initialized() and not nested:
                dist.destroy_process_group()
            return result
        except (Exception, KeyboardInterrupt) as error:
            code, message = explain(error)
            if code is None:
                raise
        finally:
            release_folders(keep=locked_before)     # by the command that runs this one
            sys.stdout, sys.stderr = streams
        script = Path(sys.modules[main.__module__].__file__).name
        if is_first_to_say(message) if code == 2 else rank == 0:
            if rank > 0:
                script = f"{script}, process {rank}"
            with suppress(OSError):     # stderr may be what cannot be written
                print(f"{script}: {printable(message)}",     # within a command, stderr is devnull
                      file=sys.__stderr__ if rank > 0 else sys.stderr)
        sys.exit(code)
    return run


@contextmanager
def terminating():
    """A with block in which SIGTERM raises Interrupted, as Ctrl-C raises KeyboardInterrupt. Outside
    of the main thread, where Python allows no handlers, it does nothing."""
    def terminate(number, frame):
        raise Interrupted(number, "stopped; what was finished is kept")
    with handling_signals(terminate, [signal.SIGTERM]):
        yield


def prepare_streams():
    """Replace streams that the shell closed, as in 2>&-, and let no byte that is read or character
    that is printed end a command."""
    for name, mode in [("stdin", "r"), ("stdout", "w"), ("stderr", "w")]:
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream, errors in [(sys.stdin, "replace"), (sys.stdout, "backslashreplace")]:
        if isinstance(stream, io.TextIOWrapper) and stream.errors != errors:
            stream.reconfigure(errors=errors)


def printable(message):
    """A message with control characters escaped, since names of files may contain any."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


def explain(error):
    """(exit code, sentence) for an exception that ends a command; (None, None) if it is a bug."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, OSError):
        place = "the output" if isinstance(error, BrokenPipeError) else "the output or a file"
        return 2, f"{error.filename or place}: {error.strerror or error}"
    if (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        return 2, ("not enough memory; training needs less with a larger --accumulate or a smaller "
                   "--row-length, sampling with --precision bfloat16, both with a smaller model")
    if isinstance(error, RuntimeError) and (
            isinstance(error, dist.DistError) or "gloo" in str(error)):
        return 2, "another process of this run ended, and this one with it"
    if isinstance(error, KeyboardInterrupt):
        number, message = error.args or (signal.SIGINT, "stopped; what was finished is kept")
        return 128 + number, message
    return None, None
