"""Supervised fine-tuning: maximum likelihood on good answers. The loop to learn first; DPO has the
same one with another loss, and starts where this one ends.

    python train_sft.py                                # reviews, written by the task's own grammar
    python train_sft.py --task hh                      # GPT-2, on Anthropic's chosen answers
    python train_sft.py --data pairs.jsonl             # the best answers of your own preferences

    loss = - sum over answers of log pi(y|x)  /  number of their tokens

Writes sft.pt and sft_metrics.csv to out/<task>/. Below the loop stands what all three scripts need
and none is about: flags, device and precision, the update, the log.
"""

import argparse
import csv
import functools
import math
import random
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from data import (TASKS, TOKENIZERS, Batches, Preference, encode_all, get_tokenizer, is_held_out,
                  load_comparisons, load_preferences, load_summaries, pack, write_review)
from model import RELEASED, GPT, GPTConfig, UserError, load_checkpoint, save_checkpoint

PARTS = ["training", "held out"]
COLUMNS = {"loss": ".4f", "grad_norm": ".2f", "lr": ".1e", "held_out_loss": ".4f"}


def train(model, examples, held_out, args):
    """Maximise the likelihood of examples, a list of Encoded with one answer each; in place."""
    batches = Batches(examples, args.batch, args.seed, whole=True)
    steps = args.steps or math.ceil(args.epochs * batches.per_epoch / args.batch)
    # A short run from scratch has to forget the large gradients of its first steps soon.
    optimizer = model.optimizer(args.lr, args.weight_decay, betas=(0.9, 0.99))
    scaler = grad_scaler(model)
    log = Log(args.out / "sft_metrics.csv", COLUMNS)
    for step in tqdm(range(steps), "SFT"):
        items = batches[step]
        n_tokens = sum(len(item.answers[0]) for item in items)
        for batch in micro_batches(items, args, model):
            logps = model.logps(batch)                              # (N,) log pi(y|x)
            loss = -logps.sum() / n_tokens
            scaler.scale(loss).backward()
            log.add(len(batch.target), loss=-logps.detach().sum())
        lr = args.lr * min(warmup(step, args.warmup), cosine(step, steps))
        grad_norm = update(model, optimizer, scaler, lr, args.clip)
        if held_out and is_time(step, steps, args.eval_every):
            log.add(1, held_out_loss=evaluate(model, held_out, args))
        if is_time(step, steps, args.log_every):
            log.write(step, grad_norm=grad_norm, lr=lr)


@torch.no_grad()
def evaluate(model, held_out, args):
    """Mean loss a token over all held-out answers."""
    total = tokens = 0
    for batch in in_batches(held_out, args.row_length, model.device):
        total, tokens = total - model.logps(batch).sum().item(), tokens + len(batch.target)
    return total / tokens


def load_examples(args):
    """(training, held-out) lists of Preference with one answer each: whole reviews after an empty
    prompt, the summaries of tldr, or the best answer of each preference there is."""
    if args.task == "reviews":
        rng = random.Random(f"reviews {args.seed}")
        reviews = [Preference("", [write_review(rng)], []) for _ in range(args.reviews + 256)]
        return reviews[:args.reviews], reviews[args.reviews:]
    if args.task == "tldr":
        return [load(f"tldr summaries, {part}", load_summaries, args.data_dir, part == "held out")
                for part in PARTS]
    return [[Preference(p.prompt, [p.answers[p.pairs[0][0]]], []) for p in part]
            for part in load_training(args)]


# ------------------------------------------------------------------------------------------------
# What all scripts need: the update
# ------------------------------------------------------------------------------------------------


def warmup(step, steps):
    """Linear from 1 / steps up to 1, where it stays (Appendix B)."""
    return min(1.0, (step + 1) / max(1, steps))


def cosine(step, steps):
    """Half a cosine from 1 down to a tenth: from scratch, the last bits of likelihood come from the
    small steps at the end."""
    return 0.55 + 0.45 * math.cos(math.pi * step / steps)


def update(model, optimizer, scaler, lr, clip):
    """One optimizer step on the gradients at hand. Returns their norm before clipping, a tensor; 0
    where a float16 gradient overflowed, and the step is left out."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)          # first to true size, then clip
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm.where(norm.isfinite(), 0) if scaler.is_enabled() else norm


def grad_scaler(model):
    """float16 gradients underflow, so they are scaled up; every other precision needs none."""
    return torch.amp.GradScaler(model.device.type, enabled=model.precision == torch.float16)


def micro_batches(items, args, model):
    """A batch in --accumulate packed parts of about as many prompts, on the model's device. Losses
    are divided by the size of the whole batch, so it changes memory and nothing else."""
    n = min(args.accumulate, len(items))
    for i in range(n):
        part = items[i * len(items) // n:(i + 1) * len(items) // n]
        yield pack(part, args.row_length).to(model.device)


def in_batches(items, row_length, device, size=32):
    """All items, packed, `size` prompts at a time, on a device."""
    for start in range(0, len(items), size):
        yield pack(items[start:start + size], row_length).to(device)


def is_time(step, steps, every):
    """At the first step, every so many after it, and at the last."""
    return step % every == 0 or step == steps - 1


class Log:
    """Means since the last line: a line on the screen and a row in a CSV file."""

    def __init__(self, path, columns):
        """columns: {name: format on the screen}."""
        self.columns, self.lines, self.sums, self.counts = columns, 0, Counter(), Counter()
        self.file = open(path, "w", newline="")
        self.csv = csv.writer(self.file, lineterminator="\n")
        self.csv.writerow(["step", *columns])

    def add(self, count, **sums):
        """Sums over `count` things; sums and counts are kept, never means of means. Tensors stay
        on their device until the line is written, so a step need not wait for them."""
        for name, value in sums.items():
            self.sums[name] += value
            self.counts[name] += count

    def write(self, step, **values):
        """values: what is shown as it is. Raises UserError where a number is not finite."""
        values |= {name: self.sums[name] / self.counts[name] for name in self.sums}
        values = {name: float(value) for name, value in values.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(f"step {step}: the {name} is {value}; stopped, nothing was saved; "
                                "a lower --lr may help")
        if self.lines % 25 == 0:
            tqdm.write("  step  " + "  ".join(f"{name:>8}" for name in self.columns))
        tqdm.write(f"{step:6d}  " + "  ".join(
            f"{format(values[name], form) if name in values else '':>{max(8, len(name))}}"
            for name, form in self.columns.items()))
        self.csv.writerow([step, *(f"{values[name]:.6g}" if name in values else ""
                                   for name in self.columns)])
        self.file.flush()
        self.lines, self.sums, self.counts = self.lines + 1, Counter(), Counter()


# ------------------------------------------------------------------------------------------------
# What all scripts need: the command line, device and precision
# ------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse that answers a wrong flag with one sentence and prints the module's text as help."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def number(kind, least, above=False, most=math.inf):
    """An argparse type: a finite int or float of at least (or above) `least`, at most `most`."""
    wanted = (f"{'a whole number' if kind is int else 'a number'} "
              f"{'above' if above else 'of at least'} {least}"
              + (f" and at most {most}" if most < math.inf else ""))

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf or above and value == least:
            raise argparse.ArgumentTypeError(f"expected {wanted}, not {text!r}")
        return value
    return parse


def command(main):
    """main(argv) as a command: a UserError, or a file that can't be written, becomes one sentence
    on stderr and exit code 2."""
    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except UserError as error:
            message = str(error)
        except OSError as error:
            message = f"{error.filename or 'a file'}: {error.strerror or error}"
        print(f"{Path(sys.modules[main.__module__].__file__).name}: {message}", file=sys.stderr)
        sys.exit(2)
    return run


def add_shared_flags(parser):
    """Flags of all three scripts."""
    add = parser.add_argument
    add("--task", choices=TASKS,
        help="reviews, written by a grammar; hh, Anthropic's helpful dialogues; tldr, summaries of "
             "Reddit posts (default reviews)")
    add("--data", type=Path,
        help="your preferences instead, .jsonl or .jsonl.gz (see README); sample.py only needs its "
             "name, to find the run")
    add("--data-dir", type=Path,
        help="hh and tldr: folder that has the published files, or gets them (default: the cache "
             "of torch.hub)")
    add("--out", type=Path, help="folder of the run (default out/<task>, or out/<name of --data>)")
    add("--seed", type=number(int, 0, most=2**31), default=0,
        help="same seed, same machine: same run (default 0)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"],
        help="default: cuda if there is one")
    add("--precision", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of matrix products; parameters stay float32 (default: on CUDA bfloat16, or float16 "
             "where the card lacks it; float32 on CPU)")


def add_training_flags(parser, batch, batch_unit, warmup):
    """Flags of both training scripts; the batch and the length of the warm-up differ."""
    add = parser.add_argument
    add("--init",
        help=f"weights SFT starts from: random, {', '.join(RELEASED)}, or a folder with "
             "config.json and model.safetensors or pytorch_model.bin (default gpt2; random for "
             "reviews)")
    add("--tokenizer", choices=TOKENIZERS,
        help="default: reviews for the task of that name, else gpt2")
    add("--compile", default="auto", choices=["auto", "on", "off"],
        help="torch.compile (default: on CUDA for models of 10M parameters or more; compiling "
             "takes longer than the whole reviews run)")
    add("--batch", type=number(int, 1), default=batch,
        help=f"{batch_unit} a step (default {batch})")
    add("--accumulate", type=number(int, 1), default=1,
        help="micro-batches of a step; more save memory and change nothing else (default 1)")
    add("--row-length", type=number(int, 2),
        help="tokens of a packed row, at most the model's block size, which is the default")
    add("--epochs", type=number(float, 0, above=True, most=10**6), default=1.0, help="default 1")
    add("--steps", type=number(int, 1), help="optimizer steps, instead of --epochs")
    add("--warmup", type=number(int, 0), default=warmup,
        help=f"steps over which the learning rate rises linearly to --lr (default {warmup})")
    add("--weight-decay", type=number(float, 0), default=0.0,
        help="of matrices (default 0: plain Adam)")
    add("--clip", type=number(float, 0, above=True), default=1.0, help="gradient norm (default 1)")
    add("--log-every", type=number(int, 1), default=20,
        help="steps between log lines (default 20)")
    add("--eval-every", type=number(int, 1), default=100,
        help="steps between evaluations on held-out data (default 100)")


def settle_task(args):
    """--task or --data: after this one of the two is None."""
    if args.task and args.data:
        raise UserError(f"--task {args.task} and --data {args.data}: choose one")
    if not args.data:
        args.task = args.task or "reviews"


def settle(args):
    """Fill in the run's folder, which depends on other flags. Returns the device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that torch can use")
    if args.out is None:
        name = args.task or args.data.name.removesuffix(".gz").removesuffix(".jsonl")
        if args.data and name in ("", *TASKS):
            raise UserError(f"--data {args.data}: name a folder for this run with --out")
        args.out = Path("out") / name
    if args.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(args.device)


def source(args):
    """What a run trains on, for its checkpoints: the name of the task or of the file."""
    return args.data.name if args.data else args.task


def make_folder(path):
    """Make the run's folder where there is none. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: cannot make this folder: {error.strerror}") from error


def row_length(args, block_size):
    """--row-length, checked against the longest sequence the model can read."""
    if (args.row_length or block_size) > block_size:
        raise UserError(f"--row-length {args.row_length} is above the block size, {block_size}")
    return args.row_length or block_size


def prepare(model, args):
    """Give a model on its device the precision that the flags ask for. Returns the model."""
    cuda = model.device.type == "cuda"
    if cuda and args.precision != "float32":
        torch.set_float32_matmul_precision("high")      # TF32 for what stays in float32
    if args.precision == "auto":
        has_bf16 = cuda and torch.cuda.get_device_capability() >= (8, 0)    # older ones emulate it
        model.precision = (torch.bfloat16 if has_bf16 else torch.float16) if cuda else None
    elif args.precision != "float32":
        model.precision = getattr(torch, args.precision)
    return model


def compile_logps(model, args):
    """Compile what a training step spends its time in, if the flags ask for it."""
    large = sum(p.numel() for p in model.parameters()) >= 10_000_000
    if args.compile == "on" or args.compile == "auto" and model.device.type == "cuda" and large:
        model.logps = torch.compile(model.logps, dynamic=True)


def open_checkpoint(path, device, args):
    """(model ready for use, tokenizer, facts) of a checkpoint, or of a folder in the layout of the
    Hugging Face hub, whose tokenizer is then GPT-2's. Raises UserError."""
    if path.is_dir():
        model = GPT.from_pretrained(path).to(device)
        facts = {"tokenizer": "gpt2", "init": str(path)}
    else:
        model, facts = load_checkpoint(path, device)
    name = facts.get("tokenizer") if isinstance(facts, dict) else None
    if name not in TOKENIZERS:
        raise UserError(f"{path}: a checkpoint that does not say which tokenizer it is for")
    tokenizer = get_tokenizer(name)
    if tokenizer.n_vocab != model.config.vocab_size:
        raise UserError(f"{path}: made for {model.config.vocab_size} ids, but the {name} tokenizer "
                        f"has {tokenizer.n_vocab}")
    return prepare(model, args), tokenizer, facts


def load(what, read, *arguments):
    """read(*arguments, skipped), and say what was found, and what was skipped or cut, and why."""
    skipped = Counter()
    found = read(*arguments, skipped)
    notes = "; ".join(f"{count:,} x {reason}" for reason, count in skipped.items() if count)
    print(f"{what}: {len(found):,} rows" + (f"; skipped or cut: {notes}" if notes else ""))
    return found


def load_training(args, path=None):
    """(training, held-out) lists of Preference: those of a file (default --data), one prompt in ten
    held out; or of a published task, which says itself what is."""
    path = path or args.data
    if path:
        found = load(path, load_preferences, path)
        return ([p for p in found if not is_held_out(p.prompt)],
                [p for p in found if is_held_out(p.prompt)])
    return [load(f"{args.task}, {part}", load_comparisons, args.task, args.data_dir,
                 part == "held out") for part in PARTS]


def warn_of_large_lr(args, usual, init):
    """One line where pretrained weights are about to be trained with a rate that ruins them."""
    if init != "random" and args.lr / usual > 10.1:
        print(f"warning: --lr {args.lr:g} is {args.lr / usual:.0f} times the {usual:g} that "
              "pretrained weights bear well: watch the samples, the language may fall apart",
              file=sys.stderr)


def parse_args(argv):
    parser = Parser(__doc__)
    add_shared_flags(parser)
    add_training_flags(parser, 32, "answers", warmup=30)
    add = parser.add_argument
    add("--lr", type=number(float, 0, above=True),
        help="peak learning rate (default 2e-5 from pretrained weights; 3e-3 from random ones, for "
             "the small default model: the larger a model, the lower, 6e-4 for 124M parameters)")
    add("--reviews", type=number(int, 1), default=40_000,
        help="reviews: how many to write and train on (default 40,000)")
    add("--block-size", type=number(int, 2),
        help="--init random: longest prompt and answer together, in tokens (default 256)")
    add("--n-layer", type=number(int, 1), help="--init random: blocks (default 2; GPT-2 124M 12)")
    add("--n-head", type=number(int, 1), help="--init random: attention heads (default 4; 12)")
    add("--n-embd", type=number(int, 1),
        help="--init random: channels, a multiple of the heads (default 128; 768)")
    add("--init-std", type=number(float, 0, above=True),
        help="--init random: standard deviation of initial weights (default 0.06, for 128 "
             "channels; GPT-2's 0.02 is for 768, and ends the default run with a few per cent "
             "fewer well-formed texts)")
    args = parser.parse_args(argv)
    settle_task(args)
    args.tokenizer = args.tokenizer or ("reviews" if args.task == "reviews" else "gpt2")
    args.init = args.init or ("random" if args.tokenizer == "reviews" else "gpt2")
    if args.init != "random" and args.tokenizer != "gpt2":
        raise UserError(f"--init {args.init} has read text in GPT-2's tokens: it needs --tokenizer "
                        "gpt2")
    for name, value in dict(block_size=256, n_layer=2, n_head=4, n_embd=128, init_std=0.06).items():
        if args.init == "random":
            setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
        elif getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for --init random: {args.init} has its "
                            "own sizes")
    args.lr = args.lr or (3e-3 if args.init == "random" else 2e-5)
    if args.init == "random" and args.n_embd % args.n_head:
        raise UserError(f"--n-embd {args.n_embd} is not a multiple of --n-head {args.n_head}")
    return args


def initial_model(args, tokenizer):
    """The model that training starts from: random weights of the sizes asked for, or --init."""
    if args.init != "random":
        model = GPT.from_pretrained(args.init)
        if model.config.vocab_size != tokenizer.n_vocab:
            raise UserError(f"--init {args.init} has {model.config.vocab_size} ids, but the "
                            f"{args.tokenizer} tokenizer {tokenizer.n_vocab}")
        return model
    torch.manual_seed(args.seed)
    return GPT(GPTConfig(args.block_size, tokenizer.n_vocab, args.n_layer, args.n_head,
                         args.n_embd), args.init_std)


@command
def main(argv=None):
    args = parse_args(argv)
    device = settle(args)
    make_folder(args.out)
    tokenizer = get_tokenizer(args.tokenizer)
    model = prepare(initial_model(args, tokenizer).to(device), args)
    args.row_length = row_length(args, model.config.block_size)
    name = args.data or args.task
    examples, held_out = (load(f"{name}, {part}", encode_all, rows, tokenizer, args.row_length)
                          for part, rows in zip(PARTS, load_examples(args)))
    if not examples:
        raise UserError(f"{name}: no row is left to train on")

    compile_logps(model, args)
    warn_of_large_lr(args, 2e-5, args.init)
    print(f"SFT of {sum(p.numel() for p in model.parameters()):,} parameters ({args.init}) on "
          f"{device}")
    train(model, examples, held_out, args)
    save_checkpoint(args.out / "sft.pt", model, tokenizer=args.tokenizer, stage="sft",
                    source=source(args), init=args.init, seed=args.seed)
    print(f"wrote {args.out / 'sft.pt'}")


if __name__ == "__main__":
    main()
