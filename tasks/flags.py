"""Flags that depend on the task: where the data comes from, the model, what is sampled."""

from pathlib import Path

from runtime.cli import Parser, number_type, path_type
from runtime.errors import UserError
from runtime.flags import (
    add_compile_flag,
    add_evaluation_flag,
    add_speed_flags,
    add_training_flags,
    as_flags,
    check_intervals,
    default_of,
    fill_in,
)
from runtime.hub import RELEASED
from tasks import TASKS, task_of
from tasks.tokenizers import TOKENIZERS


def add_task_flags(parser):
    """Flags of every command that works in the folder of a run."""
    add = parser.group("the data")
    add("--task", choices=TASKS,
        help="; ".join(f"{name}, {task.summary}" for name, task in TASKS.items())
             + " (default reviews)")
    add("--data", type=path_type,
        help="your own preferences instead, .jsonl or .jsonl.gz (see docs/preferences.md); to talk "
             "to a model, only the name is needed, to find the run")
    add = parser.group("the run")
    add("--out", type=path_type,
        help="folder of the run (default out/<task>, or out/<name of --data>)")
    add("--seed", type=number_type(int, 0, most=2**31), default=0,
        help="same seed, same machine: same run (default 0)")
    add = parser.group("the data")
    add("--data-dir", type=path_type,
        help="imdb, hh and tldr: folder for the published files (default: the cache of torch.hub)")
    add("--labeller", choices=["own", "siebert"], default="own",
        help="imdb: the classifier whose log-odds are the reward: own is trained on the reviews; "
             "siebert is the paper's, and needs the package transformers (default own)")
    add_speed_flags(parser)


def add_model_flags(parser):
    """Flags of train_sft.py and train_dpo.py about the model."""
    add = parser.group("the model")
    add("--init",
        help=f"weights SFT starts from: random, {', '.join(RELEASED)}, or a folder with "
             "config.json and model.safetensors or pytorch_model.bin (default gpt2; random for "
             "tasks with a tokenizer of their own)")
    add("--tokenizer", choices=TOKENIZERS,
        help="default gpt2; " + "; ".join(f"{task.tokenizer} for {name}" for name, task
                                           in TASKS.items() if task.tokenizer != "gpt2"))
    add_compile_flag(parser)


def add_measuring_flags(parser):
    """Flags of the final table of train_dpo.py and of sample.py --evaluate, which show the same."""
    add_answer_length_flag(parser)
    parser.group("sampling and measuring")(
        "--eval-prompts", type=number_type(int, 2), default=1024,
        help="held-out prompts to evaluate on (default 1,024)")


def add_answer_length_flag(parser):
    parser.group("sampling and measuring")(
        "--max-new-tokens", type=number_type(int, 1),
        help="longest sampled answer, in tokens (default 96; 60 for imdb)")


def choose_task(args):
    """Check --task against --data and set the defaults that depend on them. Exactly one of the two
    is None afterwards, and --out is set."""
    if args.task and args.data:
        raise UserError(f"--task {args.task} and --data {args.data}: choose one")
    if not args.data:
        args.task = args.task or "reviews"
    if "max_new_tokens" in args and args.max_new_tokens is None:
        args.max_new_tokens = task_of(args).max_new_tokens
    if args.out is None:
        name = args.task or args.data.name.removesuffix(".gz").removesuffix(".jsonl")
        if args.data and name in ("", *TASKS):
            raise UserError(f"--data {args.data}: name a folder for this run with --out")
        args.out = Path("out") / name


def flags_of_sft(args):
    """The flags of a run of train_dpo.py that its SFT run shares."""
    names = ["task", "data", "data_dir", "labeller", "out", "seed", "device", "precision",
             "compile", "init", "tokenizer", "row_length", "save_every"]
    return as_flags(args, names) + [f"--{name}" for name in ("resume", "strict")
                                    if getattr(args, name)]


# ------------------------------------------------------------------------------------------------
# train_sft.py
# ------------------------------------------------------------------------------------------------


def parse_sft_flags(doc, argv, defaults, random):
    """The flags of train_sft.py. defaults, random: its tables DEFAULTS and RANDOM."""
    parser = Parser(doc)
    add_task_flags(parser)
    add_model_flags(parser)
    tasks = {name: random | task.random for name, task in TASKS.items() if task.tokenizer != "gpt2"}
    add_training_flags(parser, defaults, "answers", tasks)
    add_evaluation_flag(parser)
    parser.group("the run")(
        "--reviews", type=number_type(int, 1), default=40_000,
        help="reviews, imdb: how many reviews to train on (default 40,000, written first, or all "
             "25,000 of imdb)")
    add = parser.group("the size of a model from random weights (--init random)")
    sizes = {"block_size": (2**17, "longest prompt and answer together, in tokens"),
             "n_layer": (1000, "blocks"), "n_head": (1000, "attention heads"),
             "n_embd": (2**16, "channels, a multiple of the heads")}
    for name, (most, words) in sizes.items():
        least = 2 if name == "block_size" else 1
        add(f"--{name.replace('_', '-')}", type=number_type(int, least, most=most),
            help=f"{words} ({default_of(name, random, tasks)})")
    add("--init-std", type=number_type(float, 0, above=True),
        help=f"standard deviation of the initial weights ({default_of('init_std', random, tasks)}; "
             "GPT-2's 0.02 is for 768 channels)")
    args = parser.parse_args(argv)
    choose_task(args)
    choose_initial_model(args, random)
    fill_in(args, defaults)
    check_intervals(args)
    return args


def choose_initial_model(args, random):
    """Set --tokenizer, --init and, for random weights, their sizes and rate, where not given.
    Raises UserError if flags contradict each other."""
    task = task_of(args)
    args.tokenizer = args.tokenizer or task.tokenizer
    args.init = args.init or ("gpt2" if args.tokenizer == "gpt2" else "random")
    if args.init == "random":
        fill_in(args, task.random, random)
        if args.n_embd % args.n_head:
            raise UserError(f"--n-embd {args.n_embd} is not a multiple of --n-head {args.n_head}")
        return
    if args.init in RELEASED and args.tokenizer != "gpt2":
        raise UserError(f"--init {args.init} was trained on GPT-2's tokens: it needs --tokenizer "
                        "gpt2")
    if args.init not in RELEASED:
        args.init = str(Path(args.init).resolve())      # one name for a folder, however it is given
    for name in random:
        if name != "lr" and getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for --init random: {args.init} has its "
                            "own sizes")


# ------------------------------------------------------------------------------------------------
# train_dpo.py
# ------------------------------------------------------------------------------------------------


def parse_dpo_flags(doc, argv, defaults, losses, on_rankings):
    """The flags of train_dpo.py. defaults: its table DEFAULTS. losses: the choices of --loss;
    on_rankings: those that need whole rankings."""
    parser = Parser(doc)
    tasks = {name: task.dpo for name, task in TASKS.items()}

    def default(name):
        return default_of(name, defaults, tasks)
    add_task_flags(parser)
    add = parser.group("the run")
    add("--sft", type=path_type,
        help="checkpoint to start from, or a folder as for --init (default: sft.pt of the run, "
             "trained first if there is none, with the defaults of train_sft.py)")
    add("--fresh", action="store_true", help="train SFT again even if there is an sft.pt")
    add = parser.group("DPO")
    add("--beta", type=number_type(float, 0, above=True),
        help="strength of the KL penalty; a larger one stays closer to the reference "
             f"({default('beta')})")
    add("--loss", default=next(iter(losses)), choices=losses,
        help="the functions <loss>_loss of train_dpo.py: dpo on pairs, Plackett-Luce on rankings "
             "(A.3), the baseline of C.3 (default dpo)")
    add_training_flags(parser, defaults, "pairs (or rankings with plackett_luce)", tasks)
    add_evaluation_flag(parser)
    add = parser.group("sampling and measuring")
    add("--prefixes", type=number_type(int, 10),
        help=f"tasks with a reward: prompts to sample answers for ({default('prefixes')})")
    add("--samples", type=number_type(int, 2),
        help=f"tasks with a reward: answers sampled for each prompt ({default('samples')})")
    add("--gap", type=number_type(float, 0),
        help="tasks with a reward: answers to one prompt are a tie if their rewards differ by less "
             f"than this; only the best of them is kept ({default('gap')})")
    add_measuring_flags(parser)
    add_model_flags(parser)
    args = parser.parse_args(argv)
    choose_task(args)
    fill_in(args, task_of(args).dpo, defaults)
    args.on_rankings = args.loss in on_rankings
    check_intervals(args)
    if args.sft and (args.fresh or args.init):
        raise UserError("--fresh and --init are for a new SFT model, but --sft names an existing "
                        "one: choose one of the two")
    if args.fresh and args.resume:
        raise UserError("--fresh starts again, but --resume continues: choose one of the two")
    return args


# ------------------------------------------------------------------------------------------------
# sample.py
# ------------------------------------------------------------------------------------------------


def parse_sample_flags(doc, argv):
    """The flags of sample.py."""
    parser = Parser(doc)
    add_task_flags(parser)
    add = parser.group("talking")
    add("--checkpoint", type=path_type,
        help="default: dpo.pt of the run, or sft.pt if there is none")
    add("--prompt", help="default: ask for prompts until the end of input (Ctrl-D)")
    add("-n", type=number_type(int, 1), default=1, help="answers to each prompt (default 1)")
    add("--temperature", type=number_type(float, 0), default=1.0,
        help="1 samples the trained distribution, 0 takes the most likely token (default 1)")
    add("--top-k", type=number_type(int, 1), help="sample from the k most likely tokens only")
    add("--top-p", type=number_type(float, 0, above=True, most=1),
        help="sample from the fewest most likely tokens whose probabilities add up to p")
    add("--compare", nargs="*", type=path_type, metavar="FILE",
        help="two checkpoints side by side (default: sft.pt and dpo.pt of the run)")
    add = parser.group("exporting")
    add("--export", type=path_type, metavar="FOLDER",
        help="write the checkpoint's weights in the layout of the Hugging Face hub, and exit")
    add = parser.group("sampling and measuring")
    add("--evaluate", nargs="*", type=path_type, metavar="FILE",
        help="measure any number of checkpoints (default: sft.pt and dpo.pt of the run)")
    add("--reference", type=path_type,
        help="--evaluate: the reference of KL and implicit reward (default sft.pt of the run)")
    add("--baseline", type=path_type,
        help="--evaluate: what the win rate compares to, sampled with random numbers of its own "
             "(default: the first checkpoint)")
    add_measuring_flags(parser)
    parser.set_defaults(strict=False)       # rows that teach nothing are counted
    args = parser.parse_args(argv)
    choose_task(args)
    check_sample_flags(args)
    return args


def check_sample_flags(args):
    """Raise UserError for flags that contradict each other or would have no effect."""
    comparing, evaluating = args.compare is not None, args.evaluate is not None
    if comparing and (len(args.compare) not in (0, 2) or args.checkpoint):
        raise UserError("--compare takes two checkpoints, or none for sft.pt and dpo.pt of the "
                        "run, and no --checkpoint")
    if args.export and comparing:
        raise UserError("--export writes one checkpoint: name it with --checkpoint, not --compare")
    for_talking = {"--compare": comparing, "--export": args.export,
                   "--prompt": args.prompt is not None, "-n": args.n != 1,
                   "--temperature": args.temperature != 1, "--top-k": args.top_k is not None,
                   "--top-p": args.top_p is not None, "--checkpoint": args.checkpoint}
    for flag, given in for_talking.items():
        if evaluating and given:
            raise UserError(f"{flag} is not for --evaluate, which samples answers to held-out "
                            "prompts at temperature 1")
    for flag, given in [("--reference", args.reference), ("--baseline", args.baseline)]:
        if given and not evaluating:
            raise UserError(f"{flag} is for --evaluate, and has no effect without it")
    if args.baseline and not task_of(args).has_reward:
        raise UserError("--baseline: a win rate needs a reward, which only some tasks have; "
                        "python -m experiments.win_rate asks people or a model")
