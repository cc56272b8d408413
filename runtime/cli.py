"""The command line: flags shared by the scripts, their checks, and errors as one sentence."""

import argparse
import functools
import io
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.errors import Interrupted, UserError
from runtime.hub import RELEASED
from runtime.parallel import choose_device, join_processes
from tasks import TASKS
from tasks.tokenizers import TOKENIZERS


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that prints the module's docstring as help and answers a wrong flag with
    one sentence."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


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
# How a command ends
# ------------------------------------------------------------------------------------------------


def command(main):
    """Decorate main(argv) as a command. A UserError, a file that cannot be written and a lack of
    memory become one sentence on stderr and exit code 2. Ctrl-C ends with 130 and SIGTERM with 143,
    as in a shell. Characters that the terminal cannot show are escaped. Of several processes, only
    the first one prints; the others print only why they ended, if it was an error."""
    @functools.wraps(main)
    def run(argv=None):
        def terminate(number, frame):
            raise Interrupted(number, "stopped; what was finished is kept")
        before = signal.signal(signal.SIGTERM, terminate)
        streams = sys.stdout, sys.stderr
        nested, rank = dist.is_initialized(), int(os.environ.get("RANK", 0))
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        if rank > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            result = main(argv)
            if dist.is_initialized() and not nested:
                dist.destroy_process_group()
            return result
        except (Exception, KeyboardInterrupt) as error:
            code, message = explain(error)
            if code is None:
                raise
        finally:
            signal.signal(signal.SIGTERM, before)
            sys.stdout, sys.stderr = streams
        script = Path(sys.modules[main.__module__].__file__).name
        if rank > 0 and code == 2:      # the first process often reports the same; it goes first
            time.sleep(2)
            script = f"{script}, process {rank}"
        if rank == 0 or code == 2:
            print(f"{script}: {message}", file=sys.stderr)
        sys.exit(code)
    return run


def explain(error):
    """(exit code, sentence) for an exception that ends a command; (None, None) if it is a bug."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, OSError):
        place = "the output" if isinstance(error, BrokenPipeError) else "a file"
        return 2, f"{error.filename or place}: {error.strerror or error}"
    if (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        return 2, ("not enough memory; a larger --accumulate, a smaller --row-length or a smaller "
                   "model needs less")
    if isinstance(error, RuntimeError) and (
            isinstance(error, dist.DistError) or "gloo" in str(error)):
        return 2, "another process of this run ended, and this one with it"
    if isinstance(error, KeyboardInterrupt):
        number, message = error.args or (signal.SIGINT, "stopped; what was finished is kept")
        return 128 + number, message
    return None, None


# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------


def add_shared_flags(parser):
    """Flags of all three scripts."""
    add = parser.add_argument
    add("--task", choices=TASKS,
        help="reviews, written by a grammar; hh, Anthropic's helpful dialogues; tldr, summaries of "
             "Reddit posts (default reviews)")
    add("--data", type=Path,
        help="your own preferences instead, .jsonl or .jsonl.gz (see docs/preferences.md); to talk "
             "to a model, sample.py only needs the name, to find the run")
    add("--data-dir", type=Path,
        help="hh and tldr: folder for the published files (default: the cache of torch.hub)")
    add("--out", type=Path, help="folder of the run (default out/<task>, or out/<name of --data>)")
    add("--seed", type=number_type(int, 0, most=2**31), default=0,
        help="same seed, same machine: same run (default 0)")
    add("--device", default="auto", metavar="NAME",
        help="cpu, cuda, or another accelerator that PyTorch sees, such as mps on a Mac, which is "
             "untested (default: cuda if there is one, else cpu)")
    add("--precision", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of matrix products; parameters stay float32 (default: bfloat16 on CUDA, or float16 "
             "if the card lacks it; float32 elsewhere)")


def add_training_flags(parser, batch, batch_unit, warmup):
    """Flags of both training scripts, with their default batch and warm-up."""
    add = parser.add_argument
    add("--init",
        help=f"weights SFT starts from: random, {', '.join(RELEASED)}, or a folder with "
             "config.json and model.safetensors or pytorch_model.bin (default gpt2; random for "
             "reviews)")
    add("--tokenizer", choices=TOKENIZERS, help="default: reviews for that task, else gpt2")
    add("--compile", default="auto", choices=["auto", "on", "off"],
        help="torch.compile (default: on CUDA, for models of at least 10M parameters)")
    add("--batch", type=number_type(int, 1), default=batch,
        help=f"{batch_unit} per step (default {batch})")
    add("--accumulate", type=number_type(int, 1),
        help="micro-batches per step; more save memory and change nothing else (default: as few as "
             "fit in the free memory, by an estimate; --resume keeps their number)")
    add("--row-length", type=number_type(int, 2),
        help="longest packed row, in tokens, at most the model's block size, which is the default")
    add("--epochs", type=number_type(float, 0, above=True, most=10**6), default=1.0,
        help="default 1")
    add("--steps", type=number_type(int, 1), help="optimizer steps, instead of --epochs")
    add("--warmup", type=number_type(int, 0), default=warmup,
        help=f"steps over which the learning rate rises linearly to --lr (default {warmup})")
    add("--weight-decay", type=number_type(float, 0), default=0.0,
        help="of matrices (default 0: plain Adam)")
    add("--clip", type=number_type(float, 0, above=True), default=1.0,
        help="largest gradient norm (default 1)")
    add("--resume", action="store_true",
        help="continue a run with the same flags that was stopped or killed")
    add("--save-every", type=number_type(float, 0), default=5.0,
        help="minutes between saves of the training state, for --resume (default 5; 0: every step)")
    add("--strict", action="store_true",
        help="treat rows that are skipped or cut as errors (default: count them)")
    add("--log-every", type=number_type(int, 1), default=20,
        help="steps between log lines (default 20)")
    add("--eval-every", type=number_type(int, 1), default=100,
        help="steps between evaluations on held-out data (default 100)")


def add_measuring_flags(parser):
    """Flags of the final table of train_dpo.py and of sample.py --evaluate, which show the same."""
    add = parser.add_argument
    add("--max-new-tokens", type=number_type(int, 1), default=96,
        help="longest sampled answer (default 96)")
    add("--eval-prompts", type=number_type(int, 2), default=1024,
        help="held-out prompts to evaluate on (default 1,024)")


def choose_task(args):
    """Check --task against --data and set the default. Exactly one of the two is None afterwards.
    """
    if args.task and args.data:
        raise UserError(f"--task {args.task} and --data {args.data}: choose one")
    if not args.data:
        args.task = args.task or "reviews"


def set_up(args):
    """Set the run's folder, connect to the other processes if there are any, return the device."""
    choose_folder(args)
    device = choose_device(args.device)
    join_processes(device)
    return device


def choose_folder(args):
    """Set --out to its default if it was not given."""
    if args.out is not None:
        return
    name = args.task or args.data.name.removesuffix(".gz").removesuffix(".jsonl")
    if args.data and name in ("", *TASKS):
        raise UserError(f"--data {args.data}: name a folder for this run with --out")
    args.out = Path("out") / name


def check_row_length(args, block_size):
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


def flags_for_sft(args):
    """The flags of a run of train_dpo.py that its SFT run shares."""
    names = ["task", "data", "data_dir", "out", "seed", "device", "precision", "compile", "init",
             "tokenizer", "row_length", "save_every"]
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names
             if getattr(args, name) is not None]
    return flags + [f"--{name}" for name in ("resume", "strict") if getattr(args, name)]
