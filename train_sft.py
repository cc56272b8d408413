"""Supervised fine-tuning: maximum likelihood on good answers. The loop to learn first; DPO has the
same one with another loss, and starts where this one ends.

    python train_sft.py                                # reviews, written by the task's own grammar
    python train_sft.py --task hh                      # GPT-2, on Anthropic's chosen answers
    python train_sft.py --data pairs.jsonl             # the best answers of your own preferences
    torchrun --nproc_per_node 8 train_sft.py --task hh # on eight GPUs

    loss = - sum over answers of log pi(y|x)  /  number of their tokens

Writes sft.pt and sft_metrics.csv to out/<task>/. Below the loop stands what all three scripts need
and none is about: the update, the log, how a run stops and goes on, flags, device and precision.
"""

import argparse
import functools
import hashlib
import io
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (TASKS, TOKENIZERS, Batches, Preference, Skipped, best_row_length, encode_all,
                  get_tokenizer, is_held_out, load_comparisons, load_preferences, load_summaries,
                  pack, tokens_of, write_review)
from model import (RELEASED, GPT, GPTConfig, UserError, load_checkpoint, rank, reading, reduced,
                   replacing, save_checkpoint, wait, world_size)

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
    run = Run(args.out / "sft_state.pt", args, model, batches, held_out, optimizer, scaler, log)
    for step in run.steps(steps, "SFT"):
        items = batches[step]
        n_tokens = sum(len(item.answers[0]) for item in items)
        for batch in micro_batches(items, args, model):
            logps = model.logps(batch)                              # (N,) log pi(y|x)
            loss = -logps.sum() / n_tokens
            scaler.scale(loss).backward()
            log.add(len(batch.target), loss=-logps.detach().sum())
        lr = args.lr * min(warmup(step, args.warmup), cosine(step, steps))
        grad_norm = update(model, optimizer, scaler, lr, args.clip)
        run.watch(step, grad_norm)
        looked = held_out and is_time(step, steps, args.eval_every)
        if looked:
            evaluate(model, held_out, args, log)
        if looked or is_time(step, steps, args.log_every):
            run.check()
            log.write(step, grad_norm=grad_norm, lr=lr)


@torch.no_grad()
def evaluate(model, held_out, args, log):
    """Loss of a token over all held-out answers, to the log."""
    for batch in in_batches(held_out, args.row_length, model):
        log.add(len(batch.target), held_out_loss=-model.logps(batch).sum())


def load_examples(args):
    """(training, held-out) lists of Preference with one answer each: whole reviews after an empty
    prompt, the summaries of tldr, or the best answer of each preference there is."""
    if args.task == "reviews":
        rng = random.Random(f"reviews {args.seed}")
        reviews = [Preference("", [write_review(rng)], []) for _ in range(args.reviews + 256)]
        return reviews[:args.reviews], reviews[args.reviews:]
    if args.task == "tldr":
        return [load(f"tldr summaries, {part}", args, load_summaries, args.data_dir,
                     part == "held out") for part in PARTS]
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
    """One optimizer step on the gradients at hand. Returns their norm before clipping, a tensor;
    where it is not finite and the scaler is on, float16 overflowed and the step was left out."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)          # first to true size, then clip
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def grad_scaler(model):
    """float16 gradients underflow, so they are scaled up; every other precision needs none."""
    return torch.amp.GradScaler(model.device.type, enabled=model.precision == torch.float16)


def micro_batches(items, args, model):
    """This process's share of a batch, in --accumulate packed parts on the model's device. Each
    loss is divided by the size of the whole batch, so the gradient is the same however many
    processes share it and however many parts each of them makes.

    Prompts are dealt out by length, so that all parts take about as long; within a part they keep
    their order. Raises UserError where there are more processes than prompts.
    """
    if len(items) < world_size():
        raise UserError(f"a batch of {len(items)} prompts for {world_size()} processes: a larger "
                        "--batch, or fewer of them, gives each a share")
    n = min(args.accumulate * world_size(), len(items))
    by_length = sorted(range(len(items)), key=lambda i: -tokens_of(items[i]))
    for number in range(rank(), n, world_size()):
        # DistributedDataParallel adds up gradients over processes during backward. Once a step is
        # enough: in that of this process's last part; until then they only collect here.
        if world_size() > 1:
            model.logps.parallel.require_backward_grad_sync = number + world_size() >= n
        yield packed([items[i] for i in sorted(by_length[number::n])], args.row_length, model)


def in_batches(items, row_length, model, size=32):
    """All items, packed, `size` prompts at a time, on the model's device; of several processes
    each gets its share of these batches, for `gathered` to put together."""
    for start in range(rank() * size, len(items), world_size() * size):
        yield packed(items[start:start + size], row_length, model)


def packed(items, row_length, model):
    """A packed Batch on the model's device, with rows of the length that costs least; or, if the
    model is compiled for one length, of that."""
    if not model.compiled:
        row_length = best_row_length(items, row_length, model.config.n_embd)
    return pack(items, row_length).to(model.device)


def bytes_of_step(config, tokens, scored):
    """What forward and backward of a micro-batch hold at their peak, beside weights, gradients and
    optimizer: twenty floats a token, layer and channel; a scored token's logits, their log-softmax
    and its gradient; the gradient of the embedding twice. An estimate, measured in float32; half
    precision and compiled code hold less."""
    L, C, V = config.n_layer, config.n_embd, config.vocab_size
    return 4 * (20 * L * C * tokens + 3 * V * scored + 2 * V * C)


def free_memory(device):
    """Bytes that a process may still take on a device: of a CPU its share, where Linux says how
    much there is for all (it does not know of a container's own limit)."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return math.inf
    free = 1024 * int(re.search(r"MemAvailable: +(\d+)", meminfo)[1])
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def fewest_micro_batches(model, batches, row_length):
    """How many micro-batches, a power of two, let each step of an epoch fit in four fifths of the
    memory that is free, by `bytes_of_step`, with a fifth of each row empty."""
    steps = batches.of_an_epoch()
    tokens = max(sum(map(tokens_of, items)) for items in steps)
    scored = max(sum(len(answer) for item in items for answer in item.answers) for items in steps)
    later = 12 * sum(p.numel() for p in model.parameters())         # gradients, and Adam's moments
    room, n = 0.8 * (free_memory(model.device) - later), 1
    while n < batches.size and bytes_of_step(
            model.config, max(row_length, 1.25 * tokens / n / world_size()),
            scored / n / world_size()) > room:
        n *= 2
    return int(reduced([n], dist.ReduceOp.MAX)[0])


def is_time(step, steps, every):
    """At the first step, every so many after it, and at the last."""
    return step % every == 0 or step == steps - 1


class Log:
    """Means since the last line: a line on the screen and a row in a CSV file."""

    def __init__(self, path, columns):
        """columns: {name: format on the screen}."""
        self.path, self.columns = path, columns
        self.lines, self.text, self.sums, self.counts = 0, "", Counter(), Counter()

    def state_dict(self):
        sums, counts = self.totals()
        return {"lines": self.lines, "text": self.text, "sums": sums, "counts": counts}

    def load_state_dict(self, state):
        self.lines, self.text = state["lines"], ""
        if rank() == 0:                     # the sums are those of all processes
            self.sums, self.counts = Counter(state["sums"]), Counter(state["counts"])
        self.append(state["text"])          # the file of before, whatever became of it since

    def totals(self):
        """(sums, counts) by name, over all processes."""
        names = list(self.columns)
        numbers = reduced([float(self.sums[name]) for name in names]
                          + [self.counts[name] for name in names])
        sums, counts = dict(zip(names, numbers)), dict(zip(names, numbers[len(names):]))
        return tuple({name: of[name] for name in names if counts[name]} for of in (sums, counts))

    def append(self, text):
        """Write to the file, from its beginning where nothing of this log stands in it yet. Of
        several processes the first one does."""
        try:
            if rank() == 0:
                with open(self.path, "a" if self.text else "w", newline="") as file:
                    file.write(text)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error
        self.text += text

    def add(self, count, **sums):
        """Sums over `count` things; sums and counts are kept, never means of means. Tensors stay
        on their device until the line is written, so a step need not wait for them."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value       # not in place: one may be on the CPU
            self.counts[name] += count

    def write(self, step, **values):
        """values: what is shown as it is. Raises UserError where a mean is not finite."""
        sums, counts = self.totals()
        values = {name: float(value) for name, value in values.items()}
        values |= {name: sums[name] / counts[name] for name in sums}
        for name, value in values.items():
            if name in sums and not math.isfinite(value):
                raise UserError(f"step {step}: the {name} is {value}; stopped, nothing was saved; "
                                "a lower --lr may help")
        if self.lines % 25 == 0:
            tqdm.write("  step  " + "  ".join(f"{name:>8}" for name in self.columns))
        tqdm.write(f"{step:6d}  " + "  ".join(
            f"{format(values[name], form) if name in values else '':>{max(8, len(name))}}"
            for name, form in self.columns.items()))
        row = [str(step), *(f"{values[name]:.6g}" if name in values else ""
                            for name in self.columns)]
        header = "" if self.text else ",".join(["step", *self.columns]) + "\n"
        self.append(header + ",".join(row) + "\n")
        self.lines, self.sums, self.counts = self.lines + 1, Counter(), Counter()


# ------------------------------------------------------------------------------------------------
# What both loops need: to stop at any moment, and to go on from there
# ------------------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """SIGINT (Ctrl-C) or SIGTERM: the arguments are its number and what to tell the person."""


# The flags that a run and its resumption must share. Data and weights are compared by content.
SHARED = ["batch", "epochs", "steps", "seed", "lr", "warmup", "weight_decay", "clip",
          "beta", "loss", "row_length", "compile", "log_every", "eval_every"]
PATIENCE = 25       # overflows of float16 in a row: 2**25 is more than the scaler begins with


class Run:
    """What of a training loop is on disk: everything that the next step depends on.

    The order of the data depends on seed and step alone (data.Batches), training draws no random
    number, and the state is written like a checkpoint, whole or not at all. So a run that was
    killed and goes on ends, on the same CPU, with the same bytes as one that was not.
    """

    def __init__(self, path, args, model, batches, held_out, optimizer, scaler, log):
        """Load the state at `path` if args.resume asks for it; else write the first one. Raises
        UserError where the state is of another run."""
        self.path, self.batches, self.scaler = path, batches, scaler
        self.parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "log": log}
        self.step, self.norms, self.overflows = 0, [], 0
        self.seconds, self.saved_at = 60 * args.save_every, time.monotonic()
        state = load_state(path) if args.resume and path.exists() else None
        wait()                  # until all processes have looked
        if world_size() > 1:
            fewest = min(map(len, batches.of_an_epoch()))
            if fewest < world_size():
                raise UserError(f"--batch {args.batch} is {fewest} prompts in some step, and there "
                                f"are {world_size()} processes: expected one for each")
        if args.accumulate is None:
            args.accumulate = (math.ceil(state["parts"] / world_size()) if state else
                               fewest_micro_batches(model, batches, args.row_length))
            if args.accumulate > 1:
                print(f"{args.accumulate} micro-batches a step, for the memory that is free")
        self.n_parts = args.accumulate * world_size()
        self.settings = {name: getattr(args, name) for name in SHARED if hasattr(args, name)}
        self.settings |= {"device": model.device.type, "precision": str(model.precision),
                          "weights to start from": fingerprint(model),
                          "data": fingerprint(batches.encoded),
                          "held-out data": fingerprint(held_out)}
        if state:
            self.load(state)
            return
        if args.resume:
            print(f"{path}: nothing to resume; starting from the first step")
        elif path.exists():
            old = path.with_suffix(".old")
            wait()              # until all processes have looked
            if rank() == 0:
                os.replace(path, old)
            print(f"{path} was of a run that stopped early, and --resume would have gone on with "
                  f"it; it is {old} now, and this run starts from the first step")
        self.save()     # as long as there is a state the run has not ended, from the first moment

    def load(self, state):
        for name, now in self.settings.items():
            then = state["settings"].get(name)
            if then != now:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{self.path}: cannot resume, " + (
                    f"the {name} changed since" if len(str(now)) == 64 else
                    f"that run had {flag} {then}, this one has {now}"))
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step, self.overflows = state["step"], state["overflows"]
        print(f"{self.path}: going on with step {self.step}")

    def save(self):
        self.check()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"settings": self.settings, "step": self.step, "overflows": self.overflows,
                  "parts": self.n_parts}
        with replacing(self.path) as file:
            torch.save(state, file)
        self.saved_at = time.monotonic()

    def steps(self, total, name):
        """The steps that are still to do, under a progress bar. The state is written every
        --save-every minutes, after the last step, and when Ctrl-C or SIGTERM ask to stop: then the
        step at hand is finished first. A second Ctrl-C stops at once. Several processes do each of
        these after the same step."""
        asked = []

        def ask(number, frame):
            asked.append(number)
            if len(asked) > 1:
                raise Interrupted(number, "stopped at once; the last state that was saved is kept")
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for step in tqdm(range(self.step, total), name, initial=self.step, total=total):
                yield step
                self.step = step + 1
                due = time.monotonic() - self.saved_at >= self.seconds
                signalled, due = reduced([max(asked, default=0), due], dist.ReduceOp.MAX)
                if signalled or due or self.step == total:
                    self.save()
                if signalled:
                    raise Interrupted(int(signalled), f"stopped after step {step}; the same "
                                      "command with --resume, without --fresh, goes on from there")
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def watch(self, step, norm):
        """Note a step's gradient norm, a tensor, without waiting for it: that is for `check`."""
        self.norms.append((step, norm))

    def check(self):
        """Raise UserError, naming the step and its rows, if a gradient was not finite."""
        norms, self.norms = self.norms, []
        values = torch.stack([norm for _, norm in norms]).tolist() if norms else []
        for (step, _), value in zip(norms, values):
            if math.isfinite(value):
                self.overflows = 0
            elif not self.scaler.is_enabled():
                raise UserError(f"step {step}: the gradient is {value}; stopped, nothing was saved "
                                f"over what was; a lower --lr may help, or a look at the step's "
                                f"rows, the prompts {self.rows(step)}")
            else:
                self.overflows += 1
                if self.overflows >= PATIENCE:
                    raise UserError(f"step {step}: float16 overflowed {PATIENCE} times in a row; "
                                    "stopped, nothing was saved over what was; a lower --lr or "
                                    "--precision float32 may help")

    def rows(self, step):
        """The prompts of a step, by their number among those trained on, counted from 0."""
        found = sorted({i for _, i, _ in self.batches.units_of(step)})
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        return ", ".join(map(str, found[:8])) + more


def fingerprint(content):
    """64 letters that stand for the exact weights of a model, or the exact content of a list of
    Encoded."""
    digest = hashlib.sha256()
    if isinstance(content, torch.nn.Module):
        for name, weight in content.state_dict().items():
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.cpu().contiguous().view(torch.uint8).numpy().data)
    else:
        for item in content:
            digest.update(repr(item).encode())
    return digest.hexdigest()


def load_state(path):
    """The content of a file that Run.save wrote. Raises UserError for another."""
    with reading(path, "the state of a run"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"settings", "step", "parts", "model", "optimizer", "scaler",
                "log"} <= state.keys():
            raise ValueError("a part is missing")
        return state


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
    """main(argv) as a command. A UserError, a file that can't be written or too little memory
    becomes one sentence on stderr and exit code 2. Ctrl-C ends it with 130, SIGTERM with 143, as
    the shell counts. A letter that the terminal can't show is written as its number. Of several
    processes the first one speaks for all; the others only say why they end, if they must."""
    @functools.wraps(main)
    def run(argv=None):
        def terminate(number, frame):
            raise Interrupted(number, "stopped; what was finished is kept")
        before, streams = signal.signal(signal.SIGTERM, terminate), (sys.stdout, sys.stderr)
        nested, number = dist.is_initialized(), int(os.environ.get("RANK", 0))
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        if number > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            result = main(argv)
            if dist.is_initialized() and not nested:
                dist.destroy_process_group()
            return result
        except UserError as error:
            message, code = str(error), 2
        except OSError as error:
            place = "the output" if isinstance(error, BrokenPipeError) else "a file"
            message, code = f"{error.filename or place}: {error.strerror or error}", 2
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
                    "DefaultCPUAllocator" in str(error)):
                message = ("not enough memory; a larger --accumulate, a smaller --row-length or a "
                           "smaller model needs less")
            elif isinstance(error, dist.DistError) or "gloo" in str(error):
                message = "another process of this run ended, and this one with it"
            else:
                raise
            code = 2
        except KeyboardInterrupt as stop:
            signalled, message = stop.args or (signal.SIGINT, "stopped; what was finished is kept")
            code = 128 + signalled
        finally:
            signal.signal(signal.SIGTERM, before)
            sys.stdout, sys.stderr = streams
        script = Path(sys.modules[main.__module__].__file__).name
        if number > 0 and code == 2:    # the first one often says the same; then torchrun ends this
            time.sleep(2)
            script = f"{script}, process {number}"
        if number == 0 or code == 2:
            print(f"{script}: {message}", file=sys.stderr)
        sys.exit(code)
    return run


def add_shared_flags(parser):
    """Flags of all three scripts."""
    add = parser.add_argument
    add("--task", choices=TASKS,
        help="reviews, written by a grammar; hh, Anthropic's helpful dialogues; tldr, summaries of "
             "Reddit posts (default reviews)")
    add("--data", type=Path,
        help="your preferences instead, .jsonl or .jsonl.gz (see README); to talk, sample.py only "
             "needs the name, to find the run")
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
    add("--accumulate", type=number(int, 1),
        help="micro-batches of a step; more save memory and change nothing else (default: as few "
             "as fit in the memory that is free, by an estimate; --resume keeps their number)")
    add("--row-length", type=number(int, 2),
        help="tokens that a packed row may have, at most the model's block size, which is the "
             "default; compiled, all have so many")
    add("--epochs", type=number(float, 0, above=True, most=10**6), default=1.0, help="default 1")
    add("--steps", type=number(int, 1), help="optimizer steps, instead of --epochs")
    add("--warmup", type=number(int, 0), default=warmup,
        help=f"steps over which the learning rate rises linearly to --lr (default {warmup})")
    add("--weight-decay", type=number(float, 0), default=0.0,
        help="of matrices (default 0: plain Adam)")
    add("--clip", type=number(float, 0, above=True), default=1.0, help="gradient norm (default 1)")
    add("--resume", action="store_true",
        help="go on with a run of the same flags that was stopped or killed")
    add("--save-every", type=number(float, 0), default=5.0,
        help="minutes between writing the state that --resume needs (default 5; 0: each step)")
    add("--strict", action="store_true",
        help="rows that cannot teach, or must be cut, are errors; without it they are counted")
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
    """Fill in the run's folder, which depends on other flags; meet the other processes, if torchrun
    started several. Returns the device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that torch can use")
    if args.out is None:
        name = args.task or args.data.name.removesuffix(".gz").removesuffix(".jsonl")
        if args.data and name in ("", *TASKS):
            raise UserError(f"--data {args.data}: name a folder for this run with --out")
        args.out = Path("out") / name
    device = torch.device("cpu")
    if args.device != "cpu" and torch.cuda.is_available():
        number, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= devices:
            raise UserError(f"more processes than the {devices} CUDA devices of this machine: a "
                            "smaller --nproc_per_node, or --device cpu")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # Gradients go from GPU to GPU, all else by way of the CPU. The first process may take
        # hours for a download, and when one ends torchrun ends all: no need to end sooner.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(days=1))
    return device


def source(args):
    """What a run trains on, for its checkpoints: the task, or the file's name and content."""
    if not args.data:
        return {"source": args.task}
    try:
        digest = hashlib.sha256(args.data.read_bytes()).hexdigest()
        return {"source": args.data.name, "digest": digest}
    except OSError as error:
        raise UserError(f"{args.data}: cannot be read: {error.strerror}") from error


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
    """Give a model on its device the precision that the flags ask for, and what makes it fast
    there. Returns the model."""
    cuda = model.device.type == "cuda"
    model.vocab_multiple = 64 if cuda else 1        # it costs a copy of the embedding
    if cuda and args.precision != "float32":
        torch.set_float32_matmul_precision("high")      # TF32 for what stays in float32
    if args.precision == "auto":
        has_bf16 = cuda and torch.cuda.get_device_capability() >= (8, 0)    # older ones emulate it
        model.precision = (torch.bfloat16 if has_bf16 else torch.float16) if cuda else None
    elif args.precision != "float32":
        model.precision = getattr(torch, args.precision)
    return model


class Logps(torch.nn.Module):
    """log pi(y|x) as the forward of a module, which is what DistributedDataParallel can wrap."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return GPT.logps(self.model, batch)     # model.logps is soon what calls this


def add_up(group, bucket):
    """DistributedDataParallel collects gradients in buckets of about 25 MB, and calls this as soon
    as one is full, while the backward computes the next. It would take the mean over processes;
    this is the sum, since each has divided its losses by the size of the whole batch already."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def compile_logps(model, args):
    """Make ready what a training step spends its time in: compiled, if the flags ask for it, and
    with several processes such that the backward adds up their gradients while it goes on.

    The first dimensions of a batch (rows, scored tokens, answers) are left open from the start, the
    length of a row is not: all steps with gradients share one graph, those without another. (A
    batch of one row, or of one answer, has its own: PyTorch tells 1 from more.) Padding them to
    constant sizes would execute 15 to 20 % more, for graphs that were no faster when measured.
    """
    large = sum(p.numel() for p in model.parameters()) >= 10_000_000
    model.compiled = args.compile == "on" or (
        args.compile == "auto" and model.device.type == "cuda" and large)
    parallel, run = None, model.logps
    if world_size() > 1:
        run = parallel = DistributedDataParallel(Logps(model), gradient_as_bucket_view=True)
        parallel.register_comm_hook(None, add_up)
    if model.compiled:
        run = torch.compile(run)

    def logps(batch):
        if model.compiled:
            for value in vars(batch).values():
                if isinstance(value, torch.Tensor):
                    torch._dynamo.maybe_mark_dynamic(value, 0)
        return run(batch)
    logps.parallel = parallel       # for micro_batches
    model.logps = logps             # instead of the method, from now on


def open_checkpoint(path, device, args):
    """(model ready for use, tokenizer, facts) of a checkpoint, or of a folder in the layout of the
    Hugging Face hub, whose tokenizer is then GPT-2's. Raises UserError."""
    if path.is_dir():
        model = GPT.from_pretrained(path).to(device)
        facts = {"tokenizer": "gpt2", "init": str(path.resolve())}
    else:
        model, facts = load_checkpoint(path, device)
    name = facts.get("tokenizer") if isinstance(facts, dict) else None
    if name not in TOKENIZERS:
        raise UserError(f"{path}: a checkpoint that does not say which tokenizer it is for")
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError(f"{path}: there are weights in it that are no numbers")
    tokenizer = get_tokenizer(name)
    if tokenizer.n_vocab != model.config.vocab_size:
        raise UserError(f"{path}: made for {model.config.vocab_size} ids, but the {name} tokenizer "
                        f"has {tokenizer.n_vocab}")
    return prepare(model, args), tokenizer, facts


def load(what, args, read, *arguments):
    """read(*arguments, skipped), and say what was found, and what was skipped or cut, and why."""
    skipped = Skipped(args.strict)
    found = read(*arguments, skipped)
    notes = "; ".join(f"{count:,} x {reason}" for reason, count in skipped.items() if count)
    print(f"{what}: {len(found):,} rows" + (f"; skipped or cut: {notes}" if notes else ""))
    return found


def load_training(args, path=None):
    """(training, held-out) lists of Preference: those of a file (default --data), one prompt in ten
    held out; or of a published task, which says itself what is."""
    path = path or args.data
    if path:
        found = load(path, args, load_preferences, path)
        return ([p for p in found if not is_held_out(p.prompt)],
                [p for p in found if is_held_out(p.prompt)])
    return [load(f"{args.task}, {part}", args, load_comparisons, args.task, args.data_dir,
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
    add("--reviews", type=number(int, 1), default=52_000,
        help="reviews: how many to write and train on (default 52,000)")
    add("--block-size", type=number(int, 2, most=2**17),
        help="--init random: longest prompt and answer together, in tokens (default 256)")
    add("--n-layer", type=number(int, 1, most=1000),
        help="--init random: blocks (default 2; GPT-2 124M 12)")
    add("--n-head", type=number(int, 1, most=1000),
        help="--init random: attention heads (default 4; 12)")
    add("--n-embd", type=number(int, 1, most=2**16),
        help="--init random: channels, a multiple of the heads (default 128; 768)")
    add("--init-std", type=number(float, 0, above=True),
        help="--init random: standard deviation of initial weights (default 0.06, for 128 "
             "channels; GPT-2's 0.02 is for 768, and ends the default run with a few per cent "
             "fewer well-formed texts)")
    args = parser.parse_args(argv)
    settle_task(args)
    args.tokenizer = args.tokenizer or ("reviews" if args.task == "reviews" else "gpt2")
    args.init = args.init or ("random" if args.tokenizer == "reviews" else "gpt2")
    if args.init != "random" and args.init not in RELEASED:
        args.init = str(Path(args.init).resolve())      # the same folder, however it was written
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
    examples, held_out = (
        load(f"{name}, {part}", args, encode_all, rows, tokenizer, args.row_length)
        for part, rows in zip(PARTS, load_examples(args)))
    if not examples:
        raise UserError(f"{name}: no row is left to train on")

    compile_logps(model, args)
    warn_of_large_lr(args, 2e-5, args.init)
    print(f"SFT of {sum(p.numel() for p in model.parameters()):,} parameters ({args.init}) on "
          f"{device}")
    train(model, examples, held_out, args)
    save_checkpoint(args.out / "sft.pt", model, tokenizer=args.tokenizer, stage="sft",
                    init=args.init, seed=args.seed, **source(args))
    (args.out / "sft_state.pt").unlink(missing_ok=True)     # all is done: it is needed no more
    print(f"wrote {args.out / 'sft.pt'}")


if __name__ == "__main__":
    main()
