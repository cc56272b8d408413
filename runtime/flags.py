"""Flags that commands share, whatever the task, and how --help states their defaults.

The numbers that decide a result are not here: each training script has a table DEFAULTS, and a task
may differ from it; see tasks/task.py.
"""

import math

from runtime.cli import number_type
from runtime.errors import UserError


def add_speed_flags(parser):
    add = parser.group("speed and memory")
    add("--device", default="auto", metavar="NAME",
        help="cpu, cuda, or another accelerator that PyTorch sees, such as mps on a Mac, which is "
             "untested (default: cuda if there is one, else cpu)")
    add("--precision", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of matrix products; parameters stay float32 (default: bfloat16 on CUDA, or float16 "
             "if the card lacks it; float32 elsewhere)")


def add_compile_flag(parser):
    parser.group("speed and memory")(
        "--compile", default="auto", choices=["auto", "on", "off"],
        help="torch.compile (default: on CUDA, in runs so long that it should save time)")


def add_training_flags(parser, defaults, unit, tasks=None):
    """Flags of all training loops. defaults: the script's table. unit: what a batch consists of.
    tasks: {task: its differences from the table}, for --help."""
    def default(name):
        return default_of(name, defaults, tasks or {})
    add = parser.group("training")
    add("--lr", type=number_type(float, 0, above=True), help=f"learning rate ({default('lr')})")
    add("--batch", type=number_type(int, 1, most=10**6),
        help=f"{unit} per step ({default('batch')})")
    add("--epochs", type=number_type(float, 0, above=True, most=10**6), help=default("epochs"))
    add("--steps", type=number_type(int, 1, most=10**9),
        help="optimizer steps, instead of --epochs")
    add("--warmup", type=number_type(int, 0),
        help="steps over which the learning rate rises linearly, at most half of the run "
             f"({default('warmup')})")
    add("--clip", type=number_type(float, 0, above=True, most=math.inf),
        help=f"largest gradient norm ({default('clip')})")
    add("--weight-decay", type=number_type(float, 0),
        help=f"of matrices ({default('weight_decay')}: plain Adam)")
    add = parser.group("saving and logging")
    add("--resume", action="store_true",
        help="continue a run that was stopped or killed; give the same flags")
    add("--save-every", type=number_type(float, 0), default=5.0,
        help="minutes between saves of the training state, for --resume (default 5; 0: every step)")
    add("--log-every", type=number_type(int, 1),
        help="steps between log lines (default: about a tenth of the run)")
    parser.group("the data")(
        "--strict", action="store_true",
        help="treat rows that are skipped or cut as errors (default: count them)")
    add = parser.group("speed and memory")
    add("--accumulate", type=number_type(int, 1),
        help="micro-batches per step; more take less memory and change no result (default: as few "
             "as fit in the free memory, by an estimate; --resume keeps their number)")
    add("--row-length", type=number_type(int, 2),
        help="longest packed row, in tokens, at most the model's block size, which is the default")


def add_evaluation_flag(parser):
    """The flag of the training loops that evaluate on held-out data."""
    parser.group("saving and logging")(
        "--eval-every", type=number_type(int, 1),
        help="steps between evaluations on held-out data, a multiple of --log-every (default: "
             "about a tenth of the run)")


def check_intervals(args):
    """Raise UserError if evaluations would have no line in the log."""
    if args.eval_every and args.log_every and args.eval_every % args.log_every:
        raise UserError(f"--eval-every {args.eval_every} is not a multiple of --log-every "
                        f"{args.log_every}: every evaluation needs its line in the log")


def default_of(name, defaults, tasks):
    """The default of a flag in words, from the script's table and the tasks' differences from it:
    "default 0.1; 0.5 for reviews, tldr"."""
    tasks_of = {}                       # {another default: the tasks that have it}
    for task, differences in tasks.items():
        value = differences.get(name, defaults.get(name))
        if value is not None and value != defaults.get(name):
            tasks_of.setdefault(value, []).append(task)
    words = [f"{as_typed(value)} for {', '.join(names)}" for value, names in tasks_of.items()]
    if name in defaults:
        words = [as_typed(defaults[name]), *words]
    return "default " + "; ".join(words)


def as_typed(value):
    """A number as people write it: 1e-6, 0.5, 150, 25,000."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.0e}".replace("e-0", "e-") if 0 < value < 1e-3 else f"{value:g}"


def fill_in(args, *tables):
    """Set the flags that were not given. The first table that names a flag decides."""
    for table in tables:
        for name, value in table.items():
            if getattr(args, name) is None:
                setattr(args, name, value)


def as_flags(args, names):
    """These of the parsed flags, those that have a value, as they would be typed."""
    return [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names
            if getattr(args, name) is not None]
