"""How fast a DPO step is, and what makes it fast: a ladder of measured rungs, with TRL beside it.

    python -m experiments.benchmark                           # HH-like pairs, GPT-2 124M, all rungs
    python -m experiments.benchmark --workload hh tldr c1 --json result.json
    python -m experiments.benchmark --data pairs.jsonl        # your own pairs, in GPT-2's tokens
    python -m experiments.benchmark --rungs shared trl shared trl-best shared --warmup 1 --steps 2
    python -m experiments.benchmark --against trl             # all rungs, and TRL if installed
    python -m experiments.benchmark --n-layer 2 --n-head 2 --n-embd 64 --pairs 4      # a quick try

Each rung adds one idea to the one above it and computes the same loss on the same pairs:

    naive            one row for each answer of each pair, padded to the longest in the batch; in
                     every step, a second model scores the batch again; float32 logits at every
                     position
    reference-once   log pi_ref(y|x) is computed before the first step
    answer-logits    only the positions that predict an answer's token go through the output head
    packed           the same sequences one after the other in rows, without padding between them;
                     each batch gets the row length that is best for it (runtime.packing)
    shared           each prompt once for all its answers: the step of train_dpo.py
    bf16             shared, with matrix products in bfloat16
    compile          shared, with forward and backward through torch.compile, in rows of a few
                     lengths, as in train_dpo.py --compile on; float32 on CPU, bf16 on CUDA

On CUDA the rungs in float32 use TF32. Every rung runs in its own process, so the peak memory is its
own. A step is timed from the lists of token ids to the updated weights: packing or padding,
forward, backward, clipping, AdamW and the computation of what is logged. TRL's DPOTrainer is timed
from its on_step_begin to its on_step_end: forward, backward, clipping, AdamW and its metrics, but
not its collator and its data loader. It trains on the same ids from the same weights. If its loss
and log-probs at step 0 differ from ours, no time is reported.

    useful FLOPs    what the gradient of the loss needs if nothing is computed twice: each prompt
                    and each answer once, only the keys that a token may attend to, logits only
                    where they predict an answer's token, and a backward pass of twice the forward
    executed FLOPs  what a rung really multiplies, including padding, second passes, unused logits
                    and masked keys
    MFU             model FLOPs utilization: FLOPs per second as a share of the machine's peak,
                    which is --peak-tflops, or else that of the fastest square matrix product in
                    the rung's precision, measured just before the steps

Left out on purpose: more than one GPU, micro-batches, and any number that was not measured.
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

from data import Batch, Batches, Encoded, encode_all, load_preferences, pack
from model import GPT, GPTConfig
from runtime.cli import Parser, command, number_type, only_one_process, path_type
from runtime.errors import UserError
from runtime.files import write_json
from runtime.packing import best_row_length, compiled_row_length
from runtime.parallel import allow_any_size, choose_device, set_precision
from runtime.rows import Skipped
from tasks.tokenizers import get_tokenizer
from train_dpo import describe, dpo_loss
from train_sft import grad_scaler, update

try:
    import resource
except ImportError:         # Windows does not have it
    resource = None

ROOT = Path(__file__).resolve().parent.parent
BETA, LR, CLIP = 0.1, 1e-6, 1.0     # Appendix B's, and TRL's defaults
SEED = 0                            # of lengths, ids and weights


# ------------------------------------------------------------------------------------------------
# Workloads: lists of random ids with realistic lengths
# ------------------------------------------------------------------------------------------------


@dataclass
class Workload:
    """Lengths in tokens: the median, and the standard deviation of the logarithm. Both prompts and
    answers include one end-of-text token."""

    prompt: tuple           # None: uniform from 2 to 8 tokens, without the end-of-text
    answer: tuple
    answers: int = 2        # per prompt


WORKLOADS = {"hh": Workload((150, 0.55), (60, 0.55)),
             "tldr": Workload((350, 0.25), (35, 0.35)),
             "c1": Workload(None, (48, 0.2), answers=4)}


def synthetic(workload, count, config, seed):
    """`count` Encoded of a workload; every two answers to a prompt make a pair. A prompt has at
    most half a block and an answer at most a quarter, so each prompt fits with two answers."""
    rng = np.random.default_rng(seed)
    eot = config.vocab_size - 1
    half = config.block_size // 2

    def length(shape, most):
        median, deviation = shape
        return int(np.clip(round(rng.lognormal(math.log(median), deviation)), 2, most))

    def ids(n):
        return rng.integers(0, eot, n).tolist()
    items = []
    for _ in range(count):
        if workload.prompt:
            n = length(workload.prompt, half)
        else:
            n = int(rng.integers(2, 9)) + 1
        answers = [ids(length(workload.answer, half // 2) - 1) + [eot]
                   for _ in range(workload.answers)]
        pairs = list(itertools.combinations(range(workload.answers), 2))
        items.append(Encoded([eot] + ids(n - 1), answers, pairs))
    return items


def load_steps(args, config):
    """The batches to time, the same for every rung: lists of Encoded with args.pairs pairs each,
    rounded up to a multiple of the pairs of a prompt, which is six for c1."""
    n_steps, size = args.warmup + args.steps, args.pairs
    if args.data:
        items = encode_all(load_preferences(args.data), get_tokenizer("gpt2"), config.block_size,
                           Skipped())
    else:
        workload = WORKLOADS[args.workload[0]]
        per_prompt = math.comb(workload.answers, 2)
        size = math.ceil(size / per_prompt) * per_prompt
        items = synthetic(workload, n_steps * size // per_prompt, config, SEED)
    batches = Batches(items, size, SEED)
    return [batches[step] for step in range(n_steps)]


def count_pairs(items):
    return sum(len(item.pairs) for item in items)


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
    """{name: Rung}, from the naive step to that of train_dpo.py and beyond. device: its type."""
    return {"naive": Rung("padded", "each step", "all"),
            "reference-once": Rung("padded", logits="all"),
            "answer-logits": Rung("padded"),
            "packed": Rung("packed"),
            "shared": Rung("shared"),
            "bf16": Rung("shared", bf16=True),
            "compile": Rung("shared", bf16=device == "cuda", compile=True)}


def sequences(items):
    """The pairs as sequences that share nothing: a list of Encoded with one answer each, the chosen
    and the rejected one of each pair in turn. An answer in three pairs occurs three times."""
    encoded = []
    for item in items:
        for pair in item.pairs:
            for i in pair:
                ref_logps = item.ref_logps and [item.ref_logps[i]]
                encoded.append(Encoded(item.prompt, [item.answers[i]], [], ref_logps))
    return encoded


def pad(encoded):
    """A Batch with one row for each of a list of Encoded with one answer, as long as the longest of
    them. Padding is on the right, where a causal model never sees it, so no mask is needed."""
    rows = [item.prompt + item.answers[0] for item in encoded]
    T = max(map(len, rows))
    tokens = np.zeros((len(rows), T), dtype=np.int64)
    source, target, answer_of, ref_logps = [], [], [], []
    for row, (item, ids) in enumerate(zip(encoded, rows)):
        answer = item.answers[0]
        tokens[row, :len(ids)] = ids
        source.append(np.arange(len(item.prompt) - 1, len(ids) - 1) + row * T)
        target.append(answer)
        answer_of.append(np.full(len(answer), row))
        ref_logps.append(item.ref_logps[0] if item.ref_logps else 0.0)
    return Batch(tokens=torch.from_numpy(tokens), positions=None, group=None, answer=None,
                 source=torch.from_numpy(np.concatenate(source)),
                 target=torch.from_numpy(np.concatenate(target, dtype=np.int64)),
                 answer_of=torch.from_numpy(np.concatenate(answer_of)), last=None,
                 chosen=None, rejected=None, rankings=None, ref_logps=torch.tensor(ref_logps))


def collate(items, rung, config):
    """The Batch of one step of a rung, from its list of Encoded."""
    encoded = items if rung.layout == "shared" else sequences(items)
    if rung.layout == "padded":
        batch = pad(encoded)
    else:
        length = best_row_length(encoded, config.block_size, config.n_embd)
        if rung.compile:
            length = compiled_row_length(length, config.block_size)
        batch = pack(encoded, length)
    if rung.layout != "shared":         # the chosen and the rejected answers take turns
        batch.chosen = torch.arange(0, len(encoded), 2)
        batch.rejected = torch.arange(1, len(encoded), 2)
    return batch


def log_probs(model, batch, rung):
    """(N,) log pi(y|x) of each answer, as the rung computes it."""
    if rung.layout != "padded":
        if model.compiled:
            allow_any_size(batch)
        return model.logps(batch)
    if rung.logits == "all":
        logits = model(batch.tokens).flatten(0, 1)                              # (B T, V)
        token_logps = logits.log_softmax(-1)[batch.source, batch.target]        # (S,)
    else:
        hidden = model.hidden(batch.tokens).flatten(0, 1)[batch.source]         # (S, C)
        token_logps = -F.cross_entropy(model.head(hidden), batch.target, reduction="none")
    return token_logps.new_zeros(batch.n_answers).index_add(0, batch.answer_of, token_logps)


def gradients(model, reference, items, rung):
    """Forward and backward of one step, a list of Encoded. Returns the mean loss, a tensor.
    reference: the second model of the naive rung; the other rungs do not use it."""
    batch = collate(items, rung, model.config).to(model.device)
    if rung.reference == "each step":
        with torch.no_grad():
            batch.ref_logps = log_probs(reference, batch, rung)
    logps = log_probs(model, batch, rung)
    losses, rewards = dpo_loss(logps, batch.ref_logps, batch.chosen, batch.rejected, BETA)
    loss = losses.mean()
    loss.backward()
    describe(logps.detach(), rewards, batch, tie=0.0)           # what train_dpo.py logs
    return loss.detach()


# ------------------------------------------------------------------------------------------------
# FLOPs
# ------------------------------------------------------------------------------------------------


def forward_flops(config, tokens, keys, scored):
    """Multiplications and additions in the matrix products of one forward pass.

    tokens: positions that go through the blocks, whose matrices have 12 C^2 weights each. keys: the
    number of keys that each of these positions is multiplied with, in total; each key takes part
    twice, in the scores and in the weighted sum of the values. scored: positions that go through
    the output head.
    """
    L, C, V = config.n_layer, config.n_embd, config.vocab_size
    return 24 * L * C**2 * tokens + 4 * L * C * keys + 2 * C * V * scored


def useful_flops(config, items):
    """Useful FLOPs of a step on a list of Encoded; see the top of this file."""
    tokens = keys = scored = 0
    for item in items:
        prompt = len(item.prompt)
        tokens += prompt
        keys += prompt * (prompt + 1) // 2
        for answer in item.answers:
            n = len(answer)
            tokens += n
            keys += n * prompt + n * (n + 1) // 2
            scored += n
    return 3 * forward_flops(config, tokens, keys, scored)


def executed_flops(model, batch, rung):
    """Executed FLOPs of a rung's forward and backward on one of its batches.

    Padded rows use a plain causal kernel, which leaves out the future. Packed rows use a dense
    mask, which hides keys only after they have been multiplied, and GPT.logps, which may pad the
    vocabulary.
    """
    B, T = batch.tokens.shape
    config = model.config
    if rung.layout == "padded":
        keys = B * T * (T + 1) // 2
    else:
        keys = B * T * T
        V = math.ceil(config.vocab_size / model.vocab_multiple) * model.vocab_multiple
        config = replace(config, vocab_size=V)
    scored = B * T if rung.logits == "all" else len(batch.target)
    passes = 4 if rung.reference == "each step" else 3      # a backward pass counts as two
    return passes * forward_flops(config, B * T, keys, scored)


def peak_tflops(args, dtype):
    """--peak-tflops, or TFLOPs per second of a square matrix product, the fastest of eight."""
    if args.peak_tflops:
        return args.peak_tflops
    n = 8192 if args.device == "cuda" else 2048
    a = torch.randn(n, n, device=args.device, dtype=dtype)
    b = torch.randn(n, n, device=args.device, dtype=dtype)
    best = min(seconds_of(lambda: a @ b, args.device) for _ in range(8))
    return 2 * n**3 / best / 1e12


# ------------------------------------------------------------------------------------------------
# Measuring one rung, in this process
# ------------------------------------------------------------------------------------------------


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work, device):
    """How long a call of work() takes, with everything that it launches on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def peak_memory(device):
    """Peak memory in bytes: of tensors on a CUDA device, or else of this process. NaN on Windows,
    which does not tell."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@torch.no_grad()
def set_reference(model, items, rung):
    """Compute the reference log-probs of a list of Encoded, in packed rows with shared prompts."""
    rung = replace(rung, layout="shared", logits="answers")
    batch = collate(items, rung, model.config).to(model.device)
    remaining = iter(log_probs(model, batch, rung).tolist())
    for item in items:
        item.ref_logps = [next(remaining) for _ in item.answers]


def model_for(rung, args, config):
    """A GPT with random weights, in the precision of a rung; the same weights for every rung."""
    torch.manual_seed(SEED)
    model = GPT(config).to(args.device)
    set_precision(model, "bfloat16")            # and on CUDA, TF32 for what is in float32
    if not rung.bf16:
        model.precision = None
    model.compiled = rung.compile
    return model


def measure_rung(name, args, config):
    """Time the steps of one of our rungs. Returns a dict of what was measured."""
    rung, steps = rungs(args.device)[name], load_steps(args, config)
    model, reference, reference_seconds = model_for(rung, args, config), None, None
    if rung.reference == "each step":
        reference = copy.deepcopy(model)
    else:
        reference_seconds = [seconds_of(lambda: set_reference(model, items, rung), args.device)
                             for items in steps]
    optimizer, scaler = model.optimizer(LR), grad_scaler(model)
    peak = peak_tflops(args, model.precision or torch.float32)
    seconds, losses = [], []

    def step(items):
        losses.append(gradients(model, reference, items, rung))
        update(model, optimizer, scaler, LR, CLIP)
    for items in tqdm(steps, f"{args.workload[0]} {name}", leave=False):
        seconds.append(seconds_of(lambda: step(items), args.device))
    batches = [collate(items, rung, config) for items in steps]
    return {"pairs": count_pairs(steps[0]), "seconds": seconds, "peak_tflops": peak,
            "losses": torch.stack(losses).tolist(), "memory": peak_memory(args.device),
            "reference_seconds": reference_seconds,
            "row_lengths": [batch.tokens.size(1) for batch in batches],
            "useful": [useful_flops(config, items) for items in steps],
            "executed": [executed_flops(model, batch, rung) for batch in batches]}


# ------------------------------------------------------------------------------------------------
# TRL, on the same ids from the same weights
# ------------------------------------------------------------------------------------------------

# TRL's defaults, and its fastest settings. On CPU all run in float32, like our rungs but bf16.
BEST = dict(precompute_ref_log_probs=True, gradient_checkpointing=False)
TRL = {"trl": {}, "trl-best": BEST, "trl-best-compile": BEST | dict(torch_compile=True)}


def measure_trl(name, args, config):
    """Time the steps of TRL's DPOTrainer. Returns a dict of what was measured."""
    steps = load_steps(args, config)
    torch.manual_seed(SEED)
    model = GPT(config).to(args.device)
    ours = [math.log(2), *first_logps(model, steps[0])]
    peak = peak_tflops(args, torch.bfloat16 if args.device == "cuda" else torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
        weights = Path(folder) / "model"
        weights.mkdir()
        model.cpu().save_pretrained(weights)
        del model
        trainer, clock = trl_trainer(name, steps, args, Path(folder))
        trainer.train()
    first = trainer.state.log_history[0]
    theirs = [first["loss"], first["logps/chosen"], first["logps/rejected"]]
    check_same(name, theirs, ours, args.device)
    return {"pairs": count_pairs(steps[0]), "seconds": clock.seconds, "peak_tflops": peak,
            "check": {"found": theirs, "expected": ours},
            "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
            "memory": peak_memory(args.device),
            "useful": [useful_flops(config, items) for items in steps]}


def first_logps(model, items):
    """Our mean log-probs of the chosen and of the rejected answers over the pairs of a step."""
    batch = collate(items, Rung("shared"), model.config)
    with torch.no_grad():
        logps = model.logps(batch.to(model.device)).cpu()
    return logps[batch.chosen].mean().item(), logps[batch.rejected].mean().item()


def check_same(name, theirs, ours, device):
    """Raises UserError if TRL did not start from our weights on our ids.

    theirs, ours: the loss, and the mean log-probs of chosen and rejected answers, at step 0.
    """
    tolerance = 1e-2 if device == "cpu" else 1.0        # in nats per answer; TRL is bf16 on CUDA
    if any(abs(a - b) > tolerance for a, b in zip(theirs, ours)):
        raise UserError(f"{name}: at step 0, its loss and mean log-probs are {theirs}, and ours "
                        f"are {ours}: not the same computation, so no time is reported")


def trl_trainer(name, steps, args, folder):
    """(trainer, clock): a DPOTrainer on the pairs of the steps, in their order, and a callback
    whose `seconds` are the times of the steps. Written for TRL 1.16, which trains on the columns
    prompt_ids, chosen_ids and rejected_ids."""
    warnings.simplefilter("ignore")
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)

    class OnIds(DPOTrainer):
        """Takes token ids as they are, in the order given."""

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

    clock, on_cuda = Clock(), args.device == "cuda"
    precision = {} if on_cuda else {"bf16": False}
    settings = DPOConfig(
        output_dir=str(folder / "out"), max_steps=len(steps), report_to="none", seed=SEED,
        save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=not on_cuda,
        dataloader_pin_memory=on_cuda, per_device_train_batch_size=count_pairs(steps[0]),
        gradient_accumulation_steps=1, **precision, **TRL[name])
    open_model = transformers.GPT2LMHeadModel.from_pretrained
    reference = None
    if name == "trl":
        reference = open_model(folder / "model", dtype=torch.float32)
    trainer = OnIds(open_model(folder / "model", dtype=torch.float32), reference, settings,
                    train_dataset=Dataset.from_list(trl_rows(steps)),
                    processing_class=trl_tokenizer(), callbacks=[clock])
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, clock


def trl_rows(steps):
    """The pairs of the steps, in their order, as rows of a dataset."""
    return [{"prompt_ids": list(item.prompt), "chosen_ids": list(item.answers[w]),
             "rejected_ids": list(item.answers[l])}
            for items in steps for item in items for w, l in item.pairs]


def trl_tokenizer():
    """A tokenizer that only knows the end-of-text token. DPOTrainer requires one, although it gets
    token ids."""
    import transformers
    from tokenizers import Tokenizer, models
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


# ------------------------------------------------------------------------------------------------
# All rungs, each in its own process, and the table
# ------------------------------------------------------------------------------------------------


def run_apart(argv, workload, rung):
    """Measure one rung in its own process. Returns what was measured, or why nothing was."""
    command_line = [sys.executable, "-m", "experiments.benchmark", *argv, "--workload", workload,
                    "--rungs", rung, "--one-process"]
    # In front of what is already there, where TRL may be.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.run(command_line, stdout=subprocess.PIPE, text=True,
                             env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    if process.returncode == -9:
        return {"failed": "out of memory"}
    return {"failed": f"exit code {process.returncode}"}


def summary(workload, rung, runs, warmup):
    """One line of the table, as a dict, over the steps after the warm-up of all runs.

    runs: what run_apart returned, each time that the rung was measured.
    """
    good = [run for run in runs if "failed" not in run]
    if not good:
        return {"workload": workload, "rung": rung, "failed": runs[0]["failed"], "runs": runs}

    def measured(name):
        """One value per step; none if the rung does not measure this."""
        return [value for run in good for value in (run.get(name) or [])[warmup:]]
    pairs, seconds = good[0]["pairs"], measured("seconds")
    median = statistics.median(seconds)
    peaks = [run["peak_tflops"] * 1e12 for run in good for _ in run["seconds"][warmup:]]
    line = {"workload": workload, "rung": rung, "pairs": pairs, "pairs_per_second": pairs / median,
            "step": median, "fastest": min(seconds), "slowest": max(seconds),
            "steps": len(seconds), "memory": max(run["memory"] for run in good), "runs": runs}
    for kind in ("useful", "executed"):
        if flops := measured(kind):
            shares = [n / s / peak for n, s, peak in zip(flops, seconds, peaks)]
            line[f"mfu_{kind}"] = statistics.median(shares)
            line[f"gflops_{kind}"] = statistics.mean(flops) / pairs / 1e9
    if lengths := measured("row_lengths"):
        line["shortest_row"], line["longest_row"] = min(lengths), max(lengths)
    if reference := measured("reference_seconds"):
        line["reference"] = statistics.median(reference)
    return line


HEADS = ["workload", "rung", "pairs/s", "step s", "fastest-slowest", "memory GB", "row length",
         "GFLOP/pair", "MFU useful", "executed", "reference s", "x faster"]


def benchmark_table(lines, baseline):
    """All lines as text. baseline: the rung whose speed is 1.0 in the last column."""
    baseline_steps = {line["workload"]: line["step"] for line in lines
                      if line["rung"] == baseline and "step" in line}
    rows = [HEADS] + [cells(line, baseline_steps.get(line["workload"])) for line in lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    text = []
    for row in rows:
        names = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2])]
        values = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:])]
        text.append("  ".join(names + values).rstrip())
    return "\n".join(text)


def cells(line, baseline_step):
    """One line of the table as a list of texts, one per column; empty if not measured.

    baseline_step: the seconds of a step of the baseline, or None.
    """
    if "failed" in line:
        return [line["workload"], line["rung"], line["failed"]] + [""] * (len(HEADS) - 3)
    row_length = gflops = executed = reference = faster = ""
    if "mfu_executed" in line:
        lengths = sorted({line["shortest_row"], line["longest_row"]})
        row_length = "-".join(map(str, lengths))
        gflops = f"{line['gflops_executed']:.0f}"
        executed = f"{line['mfu_executed']:.1%}"
    if "reference" in line:
        reference = f"{line['reference']:.3f}"
    if baseline_step:
        faster = f"{baseline_step / line['step']:.2f}"
    return [line["workload"], line["rung"], f"{line['pairs_per_second']:.3g}",
            f"{line['step']:.3f}", f"{line['fastest']:.3f}-{line['slowest']:.3f}",
            f"{line['memory'] / 1e9:.2f}", row_length, gflops, f"{line['mfu_useful']:.1%}",
            executed, reference, faster]


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    names = [*rungs("cpu"), *TRL]
    add("--workload", nargs="+", default=["hh"], choices=[*WORKLOADS, "data"],
        help="hh: prompts and answers with medians of 150 and 60 tokens; tldr: 350 and 35; c1: "
             "prompts of 2 to 8 tokens with four answers of 48, all six pairs (default hh)")
    add("--data", type=path_type, help="preferences, .jsonl or .jsonl.gz, instead of a workload")
    add("--rungs", nargs="+", choices=names, metavar="RUNG",
        help=f"which rungs to measure, of {', '.join(names)}; a rung that is named twice is "
             "measured twice, in the order given (default: all of ours)")
    add("--against", choices=["trl"],
        help="also measure TRL's DPOTrainer, which has to be installed: trl with its defaults, "
             "trl-best with the reference computed beforehand and no gradient checkpointing")
    add("--pairs", type=number_type(int, 1),
        help="pairs per step; fewer need less memory (default 8 on CPU, 64 on CUDA)")
    add("--warmup", type=number_type(int, 1), default=2,
        help="steps at the start that are not counted (default 2)")
    add("--steps", type=number_type(int, 1), default=5, help="steps that are counted (default 5)")
    add("--n-layer", type=number_type(int, 1), default=12,
        help="layers (default 12, as in GPT-2 124M)")
    add("--n-head", type=number_type(int, 1), default=12, help="attention heads (default 12)")
    add("--n-embd", type=number_type(int, 1), default=768, help="channels (default 768)")
    add("--device", choices=["cpu", "cuda"], default="auto",
        help="default: cuda if there is one, else cpu")
    add("--peak-tflops", type=number_type(float, 0, above=True),
        help="the machine's peak, for MFU (default: measured with matrix products)")
    add("--json", type=path_type, help="file to write everything that was measured to")
    add("--one-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.device = choose_device(args.device).type
    args.pairs = args.pairs or (64 if args.device == "cuda" else 8)
    if args.data:
        args.workload = ["data"]
    elif "data" in args.workload:
        raise UserError("--workload data: name the file with --data")
    args.rungs = args.rungs or [*rungs(args.device)]
    if args.against:
        args.rungs += [name for name in ("trl", "trl-best") if name not in args.rungs]
    if set(args.rungs) & set(TRL) and not importlib.util.find_spec("trl"):
        raise UserError("--against trl: TRL is not installed; pip install trl adds it to the "
                        "packages of requirements.txt, with everything it needs")
    return args


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def machine(args):
    """The device, versions and threads, without which a time means nothing."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if set(args.rungs) & set(TRL):
        for name in ("trl", "transformers"):
            versions[name] = importlib.metadata.version(name)
    return {"device": args.device, "name": device_name(args.device), "versions": versions,
            "threads": torch.get_num_threads()}


@command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    only_one_process("the benchmark")
    config = GPTConfig(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
    if args.one_process:                # what was measured is the last line of the output
        name = args.rungs[0]
        measure = measure_trl if name in TRL else measure_rung
        print("\n" + json.dumps(measure(name, args, config)))
        return
    facts, runs = machine(args), {}
    plan = [(workload, rung) for workload in args.workload for rung in args.rungs]
    for workload, rung in tqdm(plan, "rungs"):
        runs.setdefault((workload, rung), []).append(run_apart(argv, workload, rung))
    lines = [summary(*names, found, args.warmup) for names, found in runs.items()]
    print_report(lines, facts, args, config)
    if args.json:
        settings = {key: str(value) if isinstance(value, Path) else value
                    for key, value in vars(args).items()}
        write_json(args.json, {"machine": facts, "settings": settings, "lines": lines})
    failed = [f"{line['workload']} {line['rung']}" for line in lines if "failed" in line]
    if failed:
        raise UserError(f"not measured: {', '.join(failed)}")


def print_report(lines, facts, args, config):
    """Print the table, the machine and, for TRL, its loss and log-probs at step 0 beside ours."""
    baseline = "trl" if "trl" in args.rungs else args.rungs[0]
    print(benchmark_table(lines, baseline))
    n = sum(p.numel() for p in GPT(config).parameters())
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(f"\n{n / 1e6:.0f}M parameters, {facts['name']}, {args.device}, {facts['threads']} "
          f"threads; {versions}; median of {args.steps} steps after {args.warmup}; x faster than "
          f"{baseline}")
    for line in lines:
        check = line["runs"][0].get("check")
        if check:
            loss, chosen, rejected = check["found"]
            _, our_chosen, our_rejected = check["expected"]
            print(f"{line['workload']} {line['rung']} at step 0: loss {loss:.6f}, mean "
                  f"log-probs {chosen:.4f} and {rejected:.4f}; ours {our_chosen:.4f} and "
                  f"{our_rejected:.4f}")


if __name__ == "__main__":
    main()
