"""The flags of the scripts: names, help, checks, and defaults that depend on other flags.

Defaults that a reader looks for, learning rate and beta, are in tables at the top of the scripts.
"""

from pathlib import Path

from runtime.cli import Parser, number_type
from runtime.errors import UserError
from runtime.hub import RELEASED
from tasks import TASKS, task_of
from tasks.tokenizers import TOKENIZER, TOKENIZERS

# ------------------------------------------------------------------------------------------------
# Flags that scripts share
# ------------------------------------------------------------------------------------------------


def add_shared_flags(parser):
    """Flags of every script that works in the folder of a run."""
    add = parser.add_argument
    add("--task", choices=TASKS,
        help="reviews, written by a grammar; imdb, real film reviews; imdb-small, the same with a "
             "small model from random weights; hh, Anthropic's helpful dialogues; tldr, summaries "
             "of Reddit posts (default reviews)")
    add("--data", type=Path,
        help="your own preferences instead, .jsonl or .jsonl.gz (see docs/preferences.md); to talk "
             "to a model, sample.py only needs the name, to find the run")
    add("--data-dir", type=Path,
        help="imdb, hh and tldr: folder for the published files (default: the cache of torch.hub)")
    add("--labeller", choices=["own", "siebert"], default="own",
        help="imdb: the classifier whose log-odds are the reward: own is trained on the reviews; "
             "siebert is the paper's, and needs the package transformers (default own)")
    add("--out", type=Path, help="folder of the run (default out/<task>, or out/<name of --data>)")
    add("--seed", type=number_type(int, 0, most=2**31), default=0,
        help="same seed, same machine: same run (default 0)")
    add("--device", default="auto", metavar="NAME",
        help="cpu, cuda, or another accelerator that PyTorch sees, such as mps on a Mac, which is "
             "untested (default: cuda if there is one, else cpu)")
    add("--precision", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of matrix products; parameters stay float32 (default: bfloat16 on CUDA, or float16 "
             "if the card lacks it; float32 elsewhere)")


def add_model_flags(parser):
    """Flags of train_sft.py and train_dpo.py about the model."""
    add = parser.add_argument
    add("--init",
        help=f"weights SFT starts from: random, {', '.join(RELEASED)}, or a folder with "
             "config.json and model.safetensors or pytorch_model.bin (default gpt2; random for "
             "reviews and imdb-small)")
    add("--tokenizer", choices=TOKENIZERS,
        help="default: reviews for that task, gpt2-8k for imdb-small, else gpt2")
    add("--compile", default="auto", choices=["auto", "on", "off"],
        help="torch.compile (default: on CUDA, for models of at least 10M parameters)")


def add_training_flags(parser, batch, batch_unit, warmup, warmup_help=None):
    """Flags of all training loops, with their default batch and warm-up. warmup_help: how --help
    describes the default warm-up, if that depends on the task."""
    add = parser.add_argument
    add("--batch", type=number_type(int, 1, most=10**6), default=batch,
        help=f"{batch_unit} per step (default {batch})")
    add("--accumulate", type=number_type(int, 1),
        help="micro-batches per step; more save memory and change nothing else (default: as few as "
             "fit in the free memory, by an estimate; --resume keeps their number)")
    add("--row-length", type=number_type(int, 2),
        help="longest packed row, in tokens, at most the model's block size, which is the default")
    add("--epochs", type=number_type(float, 0, above=True, most=10**6), default=1.0,
        help="default 1")
    add("--steps", type=number_type(int, 1, most=10**9),
        help="optimizer steps, instead of --epochs")
    add("--warmup", type=number_type(int, 0), default=warmup,
        help="steps over which the learning rate rises linearly to --lr (default "
             f"{warmup_help or warmup})")
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


def add_evaluation_flag(parser):
    """The flag of the training loops that evaluate on held-out data."""
    parser.add_argument("--eval-every", type=number_type(int, 1), default=100,
                        help="steps between evaluations on held-out data (default 100)")


def add_measuring_flags(parser):
    """Flags of the final table of train_dpo.py and of sample.py --evaluate, which show the same."""
    add = parser.add_argument
    add_answer_length_flag(parser)
    add("--eval-prompts", type=number_type(int, 2), default=1024,
        help="held-out prompts to evaluate on (default 1,024)")


def add_answer_length_flag(parser):
    parser.add_argument("--max-new-tokens", type=number_type(int, 1),
                        help="longest sampled answer (default 96; 60 for imdb)")


def choose_task(args):
    """Check --task against --data and set the default, and the other defaults that depend on it.
    Exactly one of the two is None afterwards."""
    if args.task and args.data:
        raise UserError(f"--task {args.task} and --data {args.data}: choose one")
    if not args.data:
        args.task = args.task or "reviews"
    if "max_new_tokens" in args and args.max_new_tokens is None:
        args.max_new_tokens = 60 if args.task in ("imdb", "imdb-small") else 96


def needs_sft(path, args):
    """Whether train_dpo.py has to run SFT first, to write the checkpoint `path`. Says why."""
    unfinished = (args.out / "sft_state.pt").exists() and not args.sft
    if args.fresh:
        print("--fresh: running SFT first")
    elif args.resume and unfinished:
        print(f"{path} is from an unfinished run; running SFT first")
    elif not args.sft and not path.exists():
        print(f"no {path} yet; running SFT first")
    else:
        later = ", but a later SFT run did not finish; --resume would continue it"
        print(f"starting from {path}" + (later if unfinished else ""))
        return False
    return True


def flags_for_sft(args):
    """The flags of a run of train_dpo.py that its SFT run shares."""
    names = ["task", "data", "data_dir", "labeller", "out", "seed", "device", "precision",
             "compile", "init", "tokenizer", "row_length", "save_every"]
    return as_flags(args, names) + [f"--{name}" for name in ("resume", "strict")
                                    if getattr(args, name)]


def as_flags(args, names):
    """These of the parsed flags, those that have a value, as they would be typed."""
    return [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names
            if getattr(args, name) is not None]


# ------------------------------------------------------------------------------------------------
# train_sft.py
# ------------------------------------------------------------------------------------------------


def parse_sft_flags(doc, argv, lr, sizes):
    """The flags of train_sft.py. lr: default learning rates; sizes: those of a random model. Both
    may have their own for a task."""
    parser = Parser(doc)
    add_shared_flags(parser)
    add_model_flags(parser)
    add_training_flags(parser, 32, "answers", warmup=30)
    add_evaluation_flag(parser)
    add = parser.add_argument
    add("--lr", type=number_type(float, 0, above=True),
        help="peak learning rate (default 2e-5 from pretrained weights; 5e-3 from random ones, for "
             "the small default model; 2e-3 for imdb-small; 124M random parameters need 6e-4)")
    add("--reviews", type=number_type(int, 1), default=40_000,
        help="reviews, imdb: how many reviews to train on (default 40,000, written first, or all "
             "25,000 of imdb)")
    add("--block-size", type=number_type(int, 2, most=2**17),
        help="--init random: longest prompt and answer together, in tokens (default 256)")
    add("--n-layer", type=number_type(int, 1, most=1000),
        help="--init random: blocks (default 2; 6 for imdb-small; GPT-2 124M has 12)")
    add("--n-head", type=number_type(int, 1, most=1000),
        help="--init random: attention heads (default 2; 8 for imdb-small; GPT-2 124M has 12)")
    add("--n-embd", type=number_type(int, 1, most=2**16),
        help="--init random: channels, a multiple of the heads (default 64; 256 for imdb-small; "
             "GPT-2 124M has 768)")
    add("--init-std", type=number_type(float, 0, above=True),
        help="--init random: standard deviation of the initial weights (default 0.085 for the 64 "
             "channels of the default, 0.03 for the 256 of imdb-small; GPT-2's 0.02 is for 768)")
    args = parser.parse_args(argv)
    choose_task(args)
    args.tokenizer = args.tokenizer or TOKENIZER.get(args.task, "gpt2")
    args.init = args.init or ("gpt2" if args.tokenizer == "gpt2" else "random")
    if args.init == "random":
        choose_sizes(args, sizes.get(args.task, sizes["random"]))
        args.lr = args.lr or lr.get(args.task, lr["random"])
        return args
    args.lr = args.lr or lr["pretrained"]
    if args.init in RELEASED and args.tokenizer != "gpt2":
        raise UserError(f"--init {args.init} was trained on GPT-2's tokens: it needs --tokenizer "
                        "gpt2")
    if args.init not in RELEASED:
        args.init = str(Path(args.init).resolve())      # one name for a folder, however it is given
    for name in sizes["random"]:
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for --init random: {args.init} has its "
                            "own sizes")
    return args


def choose_sizes(args, sizes):
    """Set the sizes of a random model that were not given."""
    for name, default in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.n_embd % args.n_head:
        raise UserError(f"--n-embd {args.n_embd} is not a multiple of --n-head {args.n_head}")


# ------------------------------------------------------------------------------------------------
# train_dpo.py
# ------------------------------------------------------------------------------------------------


def parse_dpo_flags(doc, argv, defaults):
    """The flags of train_dpo.py. defaults: those that depend on the task, {task: {flag: value}}."""
    parser = Parser(doc)
    add_shared_flags(parser)
    add_model_flags(parser)
    add_training_flags(parser, 64, "pairs (or rankings with plackett_luce)", warmup=None,
                       warmup_help="150; 50 for reviews")
    add_evaluation_flag(parser)
    add_measuring_flags(parser)
    add = parser.add_argument
    add("--loss", default="dpo", choices=["dpo", "plackett_luce", "unlikelihood"],
        help="dpo on pairs, Plackett-Luce on rankings (A.3), or the baseline of C.3 (default dpo)")
    add("--beta", type=number_type(float, 0, above=True),
        help="strength of the KL penalty; a larger one stays closer to the reference (default 0.1; "
             "0.5 for tldr, reviews and imdb-small)")
    add("--lr", type=number_type(float, 0, above=True),
        help="learning rate after warm-up (default 1e-6; 1e-4 for reviews and imdb-small)")
    add("--sft", type=Path,
        help="checkpoint to start from, or a folder as for --init (default: sft.pt of the run, "
             "trained first if there is none)")
    add("--fresh", action="store_true", help="train SFT again even if there is an sft.pt")
    add("--prefixes", type=number_type(int, 10),
        help="reviews, imdb: prompts to sample answers for (default 2,100 for reviews, 4,000 for "
             "imdb-small, 25,000 for imdb, as in C.1)")
    add("--samples", type=number_type(int, 2), default=4,
        help="reviews, imdb: answers sampled for each prompt (default 4)")
    add("--gap", type=number_type(float, 0),
        help="reviews, imdb: answers to one prompt are a tie if their rewards differ by less than "
             "this; only the best of them is kept (default 0.5 for imdb, 0 for reviews)")
    args = parser.parse_args(argv)
    choose_task(args)
    for name, default in defaults[args.task or "own file"].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
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
    add_shared_flags(parser)
    add_measuring_flags(parser)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="default: dpo.pt of the run, or sft.pt if there is none")
    add("--prompt", help="default: ask for prompts until the end of input (Ctrl-D)")
    add("-n", type=number_type(int, 1), default=1, help="answers to each prompt (default 1)")
    add("--temperature", type=number_type(float, 0), default=1.0,
        help="1 samples the trained distribution, 0 takes the most likely token (default 1)")
    add("--top-k", type=number_type(int, 1), help="sample from the k most likely tokens only")
    add("--top-p", type=number_type(float, 0, above=True, most=1),
        help="sample from the fewest most likely tokens whose probabilities add up to p")
    add("--compare", nargs="*", type=Path, metavar="FILE",
        help="two checkpoints side by side (default: sft.pt and dpo.pt of the run)")
    add("--export", type=Path, metavar="FOLDER",
        help="write the checkpoint's weights in the layout of the Hugging Face hub, and exit")
    add("--evaluate", nargs="*", type=Path, metavar="FILE",
        help="measure any number of checkpoints (default: sft.pt and dpo.pt of the run)")
    add("--reference", type=Path,
        help="--evaluate: the reference of KL and implicit reward (default sft.pt of the run)")
    add("--baseline", type=Path,
        help="--evaluate: what the win rate compares to, sampled with random numbers of its own "
             "(default: the first checkpoint)")
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
    if args.baseline and not task_of(args).open_reward:
        raise UserError("--baseline: a win rate needs a reward, which only reviews and imdb have; "
                        "python -m experiments.win_rate asks people or a model")
