"""How fast a DPO step is, and what makes it so: a ladder of measured rungs, and TRL beside it.

    python -m experiments.benchmark                           # HH-like pairs, GPT-2 124M, all rungs
    python -m experiments.benchmark --workload hh tldr c1 --json result.json
    python -m experiments.benchmark --data pairs.jsonl        # your own pairs, in GPT-2's tokens
    python -m experiments.benchmark --rungs shared trl shared trl-best shared --warmup 1 --steps 2
    python -m experiments.benchmark --against trl             # all rungs, and TRL where installed
    python -m experiments.benchmark --n-layer 2 --n-head 2 --n-embd 64 --pairs 4      # a look

Each rung adds one idea to the one above it and computes the same loss on the same pairs:

    naive            one row for each answer of each pair, padded to the longest of the batch; a
                     second model scores the batch again each step; float32 logits at every place
    reference-once   log pi_ref(y|x) is known before the step
    answer-logits    only the places that predict an answer's token go through the output head
    packed           the same sequences one after the other in rows, without padding between them;
                     rows of each batch are as long as is best for it (data.best_row_length)
    shared           a prompt once for all its answers: the step of train_dpo.py
    bf16             its products in bfloat16
    compile          its forward and backward through torch.compile, in rows of one length for all
                     steps; float32 on CPU, bf16 on CUDA

Every rung runs in a process of its own, so that peak memory is its own; --rounds goes through all
of them again, so that a slow minute of the machine hits all. A step is timed from the list of id
lists to the updated weights: packing or padding, forward, backward, clipping, AdamW, and what is
logged. Of TRL's DPOTrainer the time between its own on_step_begin and on_step_end is taken:
forward, backward, clipping, AdamW and its metrics, but neither its collator nor its data loader.
It trains on the same ids from the same weights; its loss and log-probs at step 0 must be ours, or
nothing is reported.

    useful FLOPs    what the gradient of the loss needs when nothing is computed twice: each
                    prompt and answer once, the keys a token may see, logits at answers, and a
                    backward of twice the forward
    executed FLOPs  what a rung multiplies: padding, second passes, logits nobody reads, hidden
                    keys
    MFU             FLOPs a second over the machine's peak: --peak-tflops, or the fastest square
                    matrix product in the rung's precision, measured just before the steps

Left out on purpose: more than one GPU, and any number that was not measured.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Batch, Batches, Encoded, best_row_length, encode_all, load_preferences, pack
from model import GPT, GPTConfig
from runtime.cli import Parser, command, number_type
from runtime.errors import UserError
from runtime.parallel import allow_any_size, compiled_logps, set_precision
from runtime.rows import Skipped
from tasks.tokenizers import get_tokenizer
from train_dpo import describe, dpo_loss
from train_sft import grad_scaler, update

BETA, LR, CLIP = 0.1, 1e-6, 1.0     # Appendix B's, and TRL's defaults


# ------------------------------------------------------------------------------------------------
# Workloads: id lists of the lengths that matter, their content random
# ------------------------------------------------------------------------------------------------


@dataclass
class Workload:
    """prompt, answer: median tokens, and standard deviation of the logarithm of the length. The
    prompts of c1 are uniform from 2 to 8 tokens instead. An end-of-text is counted in each."""

    prompt: tuple
    answer: tuple
    answers: int = 2


WORKLOADS = {"hh": Workload((150, 0.55), (60, 0.55)),
             "tldr": Workload((350, 0.25), (35, 0.35)),
             "c1": Workload(None, (48, 0.2), answers=4)}


def synthetic(workload, count, config, seed):
    """`count` Encoded of a workload, every pair of whose answers is one of its pairs. A prompt may
    take half a block and an answer a quarter, so that each prompt fits with two answers."""
    rng, eot, half = np.random.default_rng(seed), config.vocab_size - 1, config.block_size // 2

    def length(shape, most):
        return int(np.clip(round(rng.lognormal(math.log(shape[0]), shape[1])), 2, most))

    def ids(n):
        return rng.integers(0, eot, n).tolist()
    items = []
    for _ in range(count):
        n = length(workload.prompt, half) if workload.prompt else int(rng.integers(2, 9)) + 1
        answers = [ids(length(workload.answer, half // 2) - 1) + [eot]
                   for _ in range(workload.answers)]
        pairs = list(itertools.combinations(range(workload.answers), 2))
        items.append(Encoded([eot] + ids(n - 1), answers, pairs))
    return items


def load_steps(args, config):
    """The batches to time, the same for every rung: lists of Encoded with args.pairs pairs. The
    answers of a c1 prompt stay together, so there the pairs are rounded up to sixes."""
    n_steps = args.warmup + args.steps
    if args.data:
        items = encode_all(load_preferences(args.data), get_tokenizer("gpt2"), config.block_size,
                           Skipped())
    else:
        workload = WORKLOADS[args.workload[0]]
        pairs = math.comb(workload.answers, 2)
        args.pairs = math.ceil(args.pairs / pairs) * pairs
        items = synthetic(workload, n_steps * args.pairs // pairs, config, args.seed)
    batches = Batches(items, args.pairs, args.seed)
    return [batches[step] for step in range(n_steps)]


# ------------------------------------------------------------------------------------------------
# The rungs
# ------------------------------------------------------------------------------------------------


@dataclass
class Rung:
    layout: str                 # "padded", "packed" or "shared"
    reference: str = "once"     # or "each step"
    logits: str = "answers"     # or "all"
    bf16: bool = False
    compile: bool = False


def rungs(device):
    """{name: Rung} from the naive step to ours."""
    return {"naive": Rung("padded", "each step", "all"),
            "reference-once": Rung("padded", logits="all"),
            "answer-logits": Rung("padded"),
            "packed": Rung("packed"),
            "shared": Rung("shared"),
            "bf16": Rung("shared", bf16=True),
            "compile": Rung("shared", bf16=device == "cuda", compile=True)}


def sequences(items):
    """Each pair as two sequences that share nothing, the chosen one first: a list of Encoded with
    one answer each. An answer that stands in three pairs comes three times."""
    return [Encoded(item.prompt, [item.answers[i]], [],
                    item.ref_logps and [item.ref_logps[i]])
            for item in items for pair in item.pairs for i in pair]


def pad(encoded):
    """A Batch of one row for each Encoded of one answer, as long as the longest of them. Padding
    stands to the right, where a causal model never sees it, so no mask is needed."""
    rows = [item.prompt + item.answers[0] for item in encoded]
    T = max(map(len, rows))
    tokens, scored = np.zeros((len(rows), T), dtype=np.int64), []
    for row, (item, ids) in enumerate(zip(encoded, rows)):
        tokens[row, :len(ids)] = ids
        source = np.arange(len(item.prompt) - 1, len(ids) - 1) + row * T
        scored.append((source, item.answers[0], np.full(len(source), row)))
    source, target, owner = (torch.from_numpy(np.concatenate(column)) for column in zip(*scored))
    ref_logps = torch.tensor([(item.ref_logps or [0.0])[0] for item in encoded])
    return Batch(torch.from_numpy(tokens), None, None, None, source, target, owner, None, None,
                 None, ref_logps)


def collate(items, rung, config, row_length=None, accumulate=1):
    """The Batches of a step of a rung, one after the other: its list of Encoded in `accumulate`
    parts. row_length: of packed rows; None is the best for each part."""
    for i in range(accumulate):
        part = items[i * len(items) // accumulate:(i + 1) * len(items) // accumulate]
        packed = part if rung.layout == "shared" else sequences(part)
        if rung.layout == "padded":
            batch = pad(packed)
        else:
            batch = pack(packed, row_length or best_row_length(packed, config.block_size,
                                                               config.n_embd))
        if rung.layout != "shared":
            batch.winners, batch.losers = torch.arange(len(packed)).view(-1, 2).T.contiguous()
        yield batch


def log_probs(model, batch, rung):
    """(N,) log pi(y|x) of each answer, the way the rung computes it."""
    if rung.layout != "padded":
        if model.compiled:
            allow_any_size(batch)
        return compiled_logps(model)(batch)
    if rung.logits == "all":
        logits = model(batch.tokens).flatten(0, 1)                              # (B T, V)
        token_logps = logits.log_softmax(-1)[batch.source, batch.target]        # (S,)
    else:
        hidden = model.hidden(batch.tokens).flatten(0, 1)[batch.source]         # (S, C)
        token_logps = -F.cross_entropy(model.head(hidden), batch.target, reduction="none")
    return token_logps.new_zeros(batch.n_answers).index_add(0, batch.owner, token_logps)


def gradients(model, reference, items, rung, row_length=None, accumulate=1):
    """Forward and backward of a step; arguments as in collate. Returns the mean loss, a tensor.
    reference: the second model of the naive rung, else None."""
    n_pairs, total = sum(len(item.pairs) for item in items), 0
    for batch in collate(items, rung, model.config, row_length, accumulate):
        batch = batch.to(model.device)
        if rung.reference == "each step":
            with torch.no_grad():
                batch.ref_logps = log_probs(reference, batch, rung)
        logps = log_probs(model, batch, rung)
        losses, rewards = dpo_loss(logps, batch.ref_logps, batch.winners, batch.losers, BETA)
        (losses.sum() / n_pairs).backward()
        describe(logps.detach(), rewards, batch)        # what train_dpo.py logs
        total = total + losses.detach().sum() / n_pairs
    return total


# ------------------------------------------------------------------------------------------------
# FLOPs
# ------------------------------------------------------------------------------------------------


def forward_flops(config, tokens, keys, scored):
    """Multiplications and additions of the matrix products of one forward pass.

    tokens: places through the blocks, whose matrices have 12 C^2 weights. keys: summed over those
    places, the places each looks at, once for the scores and once for the values. scored: places
    through the output head.
    """
    L, C, V = config.n_layer, config.n_embd, config.vocab_size
    return 24 * L * C**2 * tokens + 4 * L * C * keys + 2 * C * V * scored


def useful_flops(config, items):
    """Of a step on a list of Encoded; see the top of this file."""
    tokens = keys = scored = 0
    for item in items:
        prompt, lengths = len(item.prompt), [len(answer) for answer in item.answers]
        tokens += prompt + sum(lengths)
        keys += prompt * (prompt + 1) // 2
        keys += sum(n * prompt + n * (n + 1) // 2 for n in lengths)
        scored += sum(lengths)
    return 3 * forward_flops(config, tokens, keys, scored)


def executed_flops(model, batch, rung):
    """Of a rung's forward and backward on a batch of its own. A dense mask hides keys after they
    were multiplied; a plain causal kernel leaves them out. GPT.logps may pad the vocabulary."""
    B, T = batch.tokens.shape
    config, keys = model.config, B * T * (T + 1) // 2
    if rung.layout != "padded":
        V = math.ceil(config.vocab_size / model.vocab_multiple) * model.vocab_multiple
        config, keys = replace(config, vocab_size=V), B * T * T
    scored = B * T if rung.logits == "all" else len(batch.target)
    passes = 4 if rung.reference == "each step" else 3
    return passes * forward_flops(config, B * T, keys, scored)


def peak_flops(device, dtype):
    """FLOPs a second of the fastest of some square matrix products."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


# ------------------------------------------------------------------------------------------------
# Measuring one rung, in this process
# ------------------------------------------------------------------------------------------------


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device):
    """Bytes: of tensors on a CUDA device, or resident in this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def add_reference(model, steps, row_length=None):
    """Note the reference log-probs in every Encoded. Returns the seconds of each step."""
    seconds = []
    for items in steps:
        start = time.perf_counter()
        with torch.no_grad():
            logps = iter([logp for batch in collate(items, Rung("shared"), model.config, row_length)
                          for logp in log_probs(model, batch.to(model.device),
                                                Rung("shared")).tolist()])
        for item in items:
            item.ref_logps = [next(logps) for _ in item.answers]
        seconds.append(time.perf_counter() - start)
    return seconds


def measure_rung(name, args, config):
    """Time the steps of one of our rungs. Returns what is written of it."""
    rung, steps = rungs(args.device)[name], load_steps(args, config)
    torch.manual_seed(args.seed)
    model = GPT(config).to(args.device)
    set_precision(model, "bfloat16" if rung.bf16 else "float32")
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
    length = args.row_length
    if rung.compile:
        model.compiled = True
        length = length or best_row_length([item for items in steps for item in items],
                                           config.block_size, config.n_embd)
    reference = copy.deepcopy(model) if rung.reference == "each step" else None
    reference_seconds = None if reference else add_reference(model, steps, length)
    optimizer, scaler = model.optimizer(LR), grad_scaler(model)
    peak = args.peak_tflops or peak_flops(args.device, model.precision or torch.float32) / 1e12
    seconds, losses, load = [], [], os.getloadavg()[0]
    for items in tqdm(steps, f"{args.workload[0]} {name}", leave=False):
        synchronize(args.device)
        start = time.perf_counter()
        loss = gradients(model, reference, items, rung, length, args.accumulate)
        update(model, optimizer, scaler, LR, CLIP)
        synchronize(args.device)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if rung.compile else None
    batches = [list(collate(items, rung, config, length, args.accumulate)) for items in steps]
    return {"seconds": seconds, "losses": losses, "load": load, "peak_tflops": peak,
            "memory": peak_memory(args.device), "reference_seconds": reference_seconds,
            "row_lengths": [[batch.tokens.size(1) for batch in parts] for parts in batches],
            "graphs": graphs, "useful": [useful_flops(config, items) for items in steps],
            "executed": [sum(executed_flops(model, batch, rung) for batch in parts)
                         for parts in batches]}


# ------------------------------------------------------------------------------------------------
# TRL, on the same ids from the same weights
# ------------------------------------------------------------------------------------------------

# Its defaults, and the fastest it can be told to be. On CPU all are float32, as our rungs are.
BEST = dict(precompute_ref_log_probs=True, gradient_checkpointing=False)
TRL = {"trl": {}, "trl-best": BEST, "trl-best-compile": BEST | dict(torch_compile=True)}


def measure_trl(name, args, config):
    """Time the steps of TRL's DPOTrainer. Returns what is written of it."""
    steps = load_steps(args, config)
    torch.manual_seed(args.seed)
    model = GPT(config).to(args.device)
    expected = [math.log(2), *first_logps(model, steps[0])]
    peak = args.peak_tflops or peak_flops(
        args.device, torch.bfloat16 if args.device == "cuda" else torch.float32) / 1e12
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
        model.cpu().save_pretrained(make(folder, "model"))
        del model
        trainer, clock = trl_trainer(name, steps, args, Path(folder))
        load = os.getloadavg()[0]
        trainer.train()
    seen = trainer.state.log_history[0]
    found = [seen["loss"], seen["logps/chosen"], seen["logps/rejected"]]
    check_same(name, found, expected, args.device)
    return {"seconds": clock.seconds, "load": load, "peak_tflops": peak,
            "check": {"found": found, "expected": expected},
            "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
            "memory": peak_memory(args.device),
            "useful": [useful_flops(config, items) for items in steps]}


def make(folder, name):
    path = Path(folder) / name
    path.mkdir()
    return path


def first_logps(model, items):
    """Our mean log-probs of the chosen and of the rejected answers of a step's pairs."""
    [batch] = collate(items, Rung("shared"), model.config)
    with torch.no_grad():
        logps = model.logps(batch.to(model.device)).cpu()
    return logps[batch.winners].mean().item(), logps[batch.losers].mean().item()


def check_same(name, found, expected, device):
    """Raises UserError where TRL did not start from our weights on our ids."""
    tolerance = 1e-2 if device == "cpu" else 1.0        # nats a whole answer; bf16 on CUDA
    if any(abs(a - b) > tolerance for a, b in zip(found, expected)):
        raise UserError(f"{name}: at step 0 its loss and mean log-probs are {found}, ours "
                        f"{expected}: not the same computation, so no time is reported")


def trl_trainer(name, steps, args, folder):
    """(trainer, clock) of DPOTrainer on the pairs of the steps, in their order. Written for TRL
    1.16: what it trains on are the columns prompt_ids, chosen_ids and rejected_ids."""
    warnings.simplefilter("ignore")
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import DPOConfig, DPOTrainer
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)

    class OnIds(DPOTrainer):
        """Takes tokenised pairs as they are, in the order given."""

        def _prepare_dataset(self, dataset, *others):
            return dataset

        def _get_train_sampler(self, *others):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *others, **kwargs):
            self.seconds = []
            self.bar = tqdm(total=len(steps), desc=f"{args.workload[0]} {name}", leave=False)

        def on_step_begin(self, *others, **kwargs):
            synchronize(args.device)
            self.start = time.perf_counter()

        def on_step_end(self, *others, **kwargs):
            synchronize(args.device)
            self.seconds.append(time.perf_counter() - self.start)
            self.bar.update()

    rows = [{"prompt_ids": item.prompt, "chosen_ids": item.answers[w],
             "rejected_ids": item.answers[l]}
            for items in steps for item in items for w, l in item.pairs]
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    cuda, clock = args.device == "cuda", Clock()
    settings = DPOConfig(
        output_dir=str(folder / "out"), max_steps=len(steps), report_to="none", seed=args.seed,
        save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=not cuda,
        dataloader_pin_memory=cuda, per_device_train_batch_size=args.pairs // args.accumulate,
        gradient_accumulation_steps=args.accumulate, **({} if cuda else {"bf16": False}),
        **TRL[name])
    open_model = transformers.GPT2LMHeadModel.from_pretrained
    reference = None if name != "trl" else open_model(folder / "model", dtype=torch.float32)
    trainer = OnIds(open_model(folder / "model", dtype=torch.float32), reference, settings,
                    train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                    callbacks=[clock])
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, clock


# ------------------------------------------------------------------------------------------------
# All rungs, each in its own process, and the table
# ------------------------------------------------------------------------------------------------


def run_apart(argv, workload, rung):
    """One rung in a process of its own: what it measured, or why there is nothing, as a dict."""
    command_line = [sys.executable, "-m", "experiments.benchmark", *argv, "--workload", workload,
                    "--rungs", rung, "--one-process"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(command_line, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = "out of memory" if done.returncode == -9 else f"exit code {done.returncode}"
    return {"failed": reason}


def summary(workload, rung, runs, warmup):
    """The numbers of one line of the table, over the steps of all rounds after their warm-up."""
    good = [run for run in runs if "failed" not in run]
    if not good:
        return {"workload": workload, "rung": rung, "failed": runs[0]["failed"], "runs": runs}
    pairs = good[0]["pairs"]

    def values(number_of):
        return [number_of(run, k) for run in good for k in range(warmup, len(run["seconds"]))]
    seconds = values(lambda run, k: run["seconds"][k])
    median = statistics.median(seconds)
    line = {"workload": workload, "rung": rung, "pairs": pairs, "pairs_per_second": pairs / median,
            "step": median, "fastest": min(seconds), "slowest": max(seconds),
            "steps": len(seconds), "memory": max(run["memory"] for run in good)}
    for kind in ("useful", "executed"):
        if kind in good[0]:
            line[f"mfu_{kind}"] = statistics.median(values(
                lambda run, k: run[kind][k] / run["seconds"][k] / run["peak_tflops"] / 1e12))
            flops = statistics.mean(values(lambda run, k: run[kind][k]))
            line[f"gflops_{kind}"] = flops / pairs / 1e9
    if "row_lengths" in good[0]:
        lengths = [T for step in good[0]["row_lengths"][warmup:] for T in step]
        line["shortest_row"], line["longest_row"] = min(lengths), max(lengths)
    if good[0].get("reference_seconds"):
        line["reference"] = statistics.median(values(lambda run, k: run["reference_seconds"][k]))
    return line | {"runs": runs}


def table(lines, baseline):
    """All lines as text. baseline: the rung whose step is 1.0 in the last column."""
    heads = ["workload", "rung", "pairs/s", "step s", "fastest-slowest", "memory GB",
             "row length", "GFLOP a pair", "MFU useful", "executed", "reference s", "x faster"]
    rows = [heads]
    first = {line["workload"]: line["step"] for line in lines
             if line["rung"] == baseline and "step" in line}
    for line in lines:
        if "failed" in line:
            rows.append([line["workload"], line["rung"], line["failed"]] + [""] * (len(heads) - 3))
            continue
        speed = first.get(line["workload"])
        executed = "mfu_executed" in line
        rows.append([
            line["workload"], line["rung"], f"{line['pairs_per_second']:.3g}",
            f"{line['step']:.3f}", f"{line['fastest']:.3f}-{line['slowest']:.3f}",
            f"{line['memory'] / 1e9:.2f}",
            "-".join(map(str, sorted({line["shortest_row"], line["longest_row"]})))
            if executed else "",
            f"{line['gflops_executed']:.0f}" if executed else "",
            f"{line['mfu_useful']:.1%}", f"{line['mfu_executed']:.1%}" if executed else "",
            f"{line['reference']:.3f}" if "reference" in line else "",
            f"{speed / line['step']:.2f}" if speed else ""])
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return "\n".join("  ".join(
        cell.ljust(width) if i < 2 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows)


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    names = [*rungs("cpu"), *TRL]
    add("--workload", nargs="+", default=["hh"], choices=[*WORKLOADS, "data"],
        help="hh: prompts and answers of median 150 and 60 tokens; tldr: 350 and 35; c1: 2 to 8 "
             "and four answers of 48, all six pairs (default hh)")
    add("--data", type=Path, help="preferences, .jsonl or .jsonl.gz, instead of a workload")
    add("--rungs", nargs="+", choices=names, metavar="RUNG",
        help=f"which to measure, of {', '.join(names)}; one named twice is measured twice, in "
             "the order given (default all of ours)")
    add("--against", choices=["trl"],
        help="measure TRL's DPOTrainer too, where it is installed: trl at its defaults, trl-best "
             "with the reference computed before and no gradient checkpointing")
    add("--compile-trl", action="store_true", help="and trl-best-compile, the same compiled")
    add("--pairs", type=number_type(int, 1), help="pairs a step (default 8 on CPU, 64 on CUDA)")
    add("--accumulate", type=number_type(int, 1), default=1,
        help="micro-batches of a step, for every rung and TRL; more need less memory (default 1)")
    add("--warmup", type=number_type(int, 1), default=2, help="steps not counted (default 2)")
    add("--steps", type=number_type(int, 1), default=5, help="steps counted, a round (default 5)")
    add("--rounds", type=number_type(int, 1), default=1,
        help="how often all rungs are gone through (default 1)")
    add("--row-length", type=number_type(int, 2),
        help="tokens of a packed row (default: what is best for each batch; compiled, for all of "
             "them together)")
    add("--n-layer", type=number_type(int, 1), default=12, help="default 12, GPT-2 124M's")
    add("--n-head", type=number_type(int, 1), default=12, help="default 12")
    add("--n-embd", type=number_type(int, 1), default=768, help="default 768")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--threads", type=number_type(int, 1), help="CPU threads (default: torch's own choice)")
    add("--peak-tflops", type=number_type(float, 0, above=True),
        help="the machine's peak, for MFU (default: measured with matrix products)")
    add("--seed", type=number_type(int, 0), default=0, help="of lengths, ids and weights (default 0)")
    add("--json", type=Path, help="write all that was measured here")
    add("--one-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.pairs = args.pairs or (64 if args.device == "cuda" else 8)
    if args.data:
        args.workload = ["data"]
    elif "data" in args.workload:
        raise UserError("--workload data: name the file with --data")
    if args.pairs % args.accumulate:
        raise UserError(f"--pairs {args.pairs} is not a multiple of --accumulate "
                        f"{args.accumulate}")
    args.rungs = args.rungs or [*rungs(args.device)]
    if args.against:
        args.rungs += [name for name in TRL if name not in args.rungs
                       and (args.compile_trl or name != "trl-best-compile")]
    if set(args.rungs) & set(TRL) and not importlib.util.find_spec("trl"):
        raise UserError("--against trl: TRL is not installed here; pip install trl puts it and "
                        "what it needs beside the packages of requirements.txt")
    return args


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines()
             if line.startswith("model name")] if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def machine(args):
    """What a number means nothing without."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for name in ("trl", "transformers") if set(args.rungs) & set(TRL) else ():
        versions[name] = importlib.metadata.version(name)
    return {"device": args.device, "name": device_name(args.device), "versions": versions,
            "threads": args.threads or torch.get_num_threads(), "load": os.getloadavg()[0]}


@command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    config = GPTConfig(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.one_process:
        name = args.rungs[0]
        result = (measure_trl if name in TRL else measure_rung)(name, args, config)
        print("\n" + json.dumps(result | {"pairs": args.pairs}))
        return
    facts, runs = machine(args), {}
    plan = [(workload, rung) for _ in range(args.rounds) for workload in args.workload
            for rung in args.rungs]
    for workload, rung in tqdm(plan, "rungs"):
        runs.setdefault((workload, rung), []).append(run_apart(argv, workload, rung))
    lines = [summary(workload, rung, found, args.warmup)
             for (workload, rung), found in runs.items()]
    baseline = "trl" if "trl" in args.rungs else args.rungs[0]
    print(table(lines, baseline))
    n = sum(p.numel() for p in GPT(config).parameters())
    print(f"\n{n / 1e6:.0f}M parameters, {facts['name']}, {args.device}, {facts['threads']} "
          f"threads; {', '.join(f'{k} {v}' for k, v in facts['versions'].items())}; median of "
          f"{args.rounds} x {args.steps} steps after {args.warmup}; x faster than {baseline}; "
          f"load {facts['load']:.1f} before, {os.getloadavg()[0]:.1f} after")
    for line in lines:
        for run in line["runs"][:1]:
            if "check" in run:
                loss, chosen, rejected = run["check"]["found"]
                _, ours, ours_rejected = run["check"]["expected"]
                print(f"{line['workload']} {line['rung']} at step 0: loss {loss:.6f}, mean "
                      f"log-probs {chosen:.4f} and {rejected:.4f}; ours {ours:.4f} and "
                      f"{ours_rejected:.4f}")
    if args.json:
        settings = {key: str(value) if isinstance(value, Path) else value
                    for key, value in vars(args).items()}
        args.json.write_text(json.dumps({"machine": facts, "settings": settings, "lines": lines},
                                        indent=1) + "\n")


if __name__ == "__main__":
    main()
