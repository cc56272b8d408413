"""What only a GPU can answer, asked by one command that takes at most nine minutes.

    python -m experiments.gpu_questions --json gpu.json             # on one H100, say
    python -m experiments.gpu_questions --device cpu --tiny         # a rehearsal, within a minute

Nothing in this repository has run on CUDA yet. Each question below is a function that yields what
it measures, line by line; the decision that hangs on it stands beside it in QUESTIONS. Every
question runs in its own process, so that an error, or a lack of memory, ends only that question.
Its seconds are a budget: what the questions before it did not use is added. The file of --json is
written anew after every line, so it is complete if the command is stopped.

The models have random weights and the pairs random ids (experiments/benchmark.py); neither changes
a time. Left out on purpose: more than one GPU.
"""

import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from data import pack
from experiments import benchmark
from experiments.benchmark import synchronize, synthetic
from experiments.captured import Decoder
from model import GPT, GPTConfig
from runtime.cli import Parser, command, number_type, only_one_process
from runtime.files import write_json
from runtime.parallel import compiled_logps, set_precision
from train_dpo import dpo_loss
from train_sft import grad_scaler, update

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Sizes:
    model: list                 # flags of experiments.benchmark, and of the config
    pairs: dict                 # per step, of each workload
    rows: list                  # row lengths at which attention is compared
    attention_pairs: int
    scored: int                 # places that the output head is timed on
    batches: list               # of prompts that are decoded together
    new_tokens: int
    steps: int                  # timed, after two for warming up


FULL = Sizes([], {"hh": 64, "tldr": 64, "c1": 66}, [512, 1024, 2048], 64, 7680,
             [512, 256, 1024, 64], 60, 6)
TINY = Sizes(["--n-layer", "1", "--n-head", "1", "--n-embd", "16"], {"hh": 2, "c1": 6}, [512], 2,
             120, [4], 9, 1)


# ------------------------------------------------------------------------------------------------
# What the questions share
# ------------------------------------------------------------------------------------------------


def benchmark_args(args, workload):
    """Arguments for the functions of experiments.benchmark."""
    return benchmark.parse_args(["--device", args.device, "--workload", workload, "--pairs",
                                 str(args.sizes.pairs[workload]), "--warmup", "2", "--steps",
                                 str(args.sizes.steps), *args.sizes.model])


def config_of(args):
    flags = benchmark_args(args, "hh")
    return GPTConfig(n_layer=flags.n_layer, n_head=flags.n_head, n_embd=flags.n_embd)


def model_of(args):
    """A GPT in the precision that --precision auto means on the device."""
    torch.manual_seed(0)
    model = GPT(config_of(args)).to(args.device)
    set_precision(model, "auto")
    return model


def seconds_of(work, device, times=5):
    """The fastest of some calls, after two for warming up."""
    found = []
    for _ in range(2 + times):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found[2:])


def hh_batches(args, model):
    """(the steps, a function that packs one for the model's device), of HH-like pairs."""
    steps = benchmark.load_steps(benchmark_args(args, "hh"), model.config)

    def packed(items):
        [batch] = benchmark.collate(items, benchmark.Rung("shared"), model.config)
        return batch.to(model.device)
    return steps, packed


def trainer(model):
    """A function that makes one step of DPO on a packed Batch."""
    optimizer, scaler = model.optimizer(benchmark.LR), grad_scaler(model)

    def step(batch):
        logps = compiled_logps(model)(batch)
        losses, _ = dpo_loss(logps, batch.ref_logps, batch.winners, batch.losers, benchmark.BETA)
        scaler.scale(losses.mean()).backward()
        update(model, optimizer, scaler, benchmark.LR, benchmark.CLIP)
    return step


# ------------------------------------------------------------------------------------------------
# The questions: generators of dicts
# ------------------------------------------------------------------------------------------------


def machine(args):
    """The card, the versions, and the speed of a bare matrix product in each precision."""
    yield {"card": benchmark.device_name(args.device), "torch": torch.__version__,
           "cuda": torch.version.cuda, "python": platform.python_version(),
           "cores": os.cpu_count()}
    for name, dtype, precision in [("bfloat16", torch.bfloat16, "high"),
                                   ("TF32", torch.float32, "high"),
                                   ("float32", torch.float32, "highest")]:
        if name != "TF32" or args.device == "cuda":
            torch.set_float32_matmul_precision(precision)
            yield {"product": name, "tflops": benchmark.peak_flops(args.device, dtype) / 1e12}


def head(args):
    """Output head and loss, forward and backward, for answers of 60 tokens: the time, and the
    largest error of an answer's log-prob against float64, with logits around -100 as in GPT-2."""
    config, n = config_of(args), args.sizes.scored
    torch.manual_seed(0)
    hidden = torch.randn(n, config.n_embd, device=args.device)
    weight = 0.14 * torch.randn(config.vocab_size, config.n_embd, device=args.device)
    hidden[:, 0], weight[:, 0] = 10.0, -10.0
    target = torch.randint(0, config.vocab_size, (n,), device=args.device)
    few = slice(0, min(n, 960))
    exact = -F.cross_entropy(hidden[few].double() @ weight.double().T, target[few],
                             reduction="none").view(-1, 60).sum(1)
    names = ["float32", "TF32", "bfloat16 inputs"]
    if args.device == "cpu":
        names.remove("TF32")
    for name in names:
        for multiple in (1, 64):
            logps = head_of(name, target, multiple)
            x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            seconds = seconds_of(lambda: logps(x, w).sum().backward(), args.device)
            with torch.no_grad():
                found = logps(x[few], w).view(-1, 60).sum(1)
            yield {"head": name, "vocabulary multiple": multiple, "ms": 1000 * seconds,
                   "largest error, nats": (found - exact).abs().max().item()}


def head_of(name, target, multiple):
    """A function of hidden states and weight that returns the log-probs of the targets."""
    def logps(x, weight):
        torch.set_float32_matmul_precision("highest" if name == "float32" else "high")
        missing, bias = -len(weight) % multiple, None
        if missing:
            bias = F.pad(weight.new_zeros(len(weight)), (0, missing), value=-torch.inf)
            weight = F.pad(weight, (0, 0, 0, missing))
        if name != "bfloat16 inputs":
            logits = F.linear(x, weight, bias)
        else:
            logits = HalfInputs.apply(x, weight)
            logits = logits if bias is None else logits + bias
        return -F.cross_entropy(logits, target[:len(x)], reduction="none")
    return logps


class HalfInputs(torch.autograd.Function):
    """x @ weight.T with bfloat16 inputs, summed and returned in float32."""

    @staticmethod
    def forward(ctx, x, weight):
        x, weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, weight)
        return half_product(x, weight.T)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = gradient.bfloat16()
        return half_product(gradient, weight), half_product(gradient.T, x)


def half_product(a, b):
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()            # the same numbers; the CPU has no such product


def attention(args):
    """One layer, forward and backward, with a dense mask and with compiled flex_attention, and the
    time to make the mask, which all layers share. The same pairs in rows of several lengths."""
    config, cuda = config_of(args), args.device == "cuda"
    items = synthetic(benchmark.WORKLOADS["hh"], args.sizes.attention_pairs,
                      GPTConfig(block_size=512), 0)
    for T in args.sizes.rows:
        batch = pack(items, T).to(args.device)
        shape = (len(batch.tokens), config.n_head, T, config.n_embd // config.n_head)
        q, k, v = (torch.randn(shape, device=args.device, dtype=torch.bfloat16, requires_grad=cuda)
                   for _ in range(3))
        outputs = {}
        for name, make_mask, attend in ways_of_attention(batch, cuda):
            mask = make_mask()

            def work():
                outputs[name] = attend(q, k, v, mask)
                if cuda:                    # flex_attention has no backward pass on the CPU
                    outputs[name].sum().backward()
            yield {"row length": T, "rows": len(batch.tokens), "attention": name,
                   "ms": 1000 * seconds_of(work, args.device),
                   "mask, ms": 1000 * seconds_of(make_mask, args.device, 2)}
        dense, flex = (output.detach().float() for output in outputs.values())
        yield {"row length": T, "largest difference": (dense - flex).abs().max().item()}


def ways_of_attention(batch, compiled):
    """(name, a function that makes the mask, a function of q, k, v and the mask) of both."""
    B, T = batch.tokens.shape
    group, answer = batch.group, batch.answer

    def dense_mask():
        return torch.where(batch.mask()[:, None], 0.0, -torch.inf).bfloat16()

    def may_attend(b, h, i, j):
        same = group[b, i] == group[b, j]
        visible = (answer[b, j] == 0) | (answer[b, i] == answer[b, j])
        return (i >= j) & same & visible

    make, flex = create_block_mask, flex_attention
    if compiled:
        make, flex = torch.compile(make), torch.compile(flex)

    def block_mask():
        return make(may_attend, B, None, T, T, device=batch.tokens.device)
    yield "dense", dense_mask, lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask)
    yield "flex", block_mask, lambda q, k, v, mask: flex(q, k, v, block_mask=mask)


def packing(args):
    """A step in which the next batch is packed before, or meanwhile in another thread; and how
    often a step makes the host wait for the device."""
    model = model_of(args)
    steps, packed = hh_batches(args, model)
    step = trainer(model)
    start = time.perf_counter()
    batches = [packed(items) for items in steps]
    yield {"packing, ms a step": 1000 * (time.perf_counter() - start) / len(steps)}
    for batch in batches[:2]:
        step(batch)

    def inline():
        for items in steps:
            step(packed(items))

    def overlapped():
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(packed, steps[0])
            for following in [*steps[1:], steps[0]]:
                batch = coming.result()
                coming = pool.submit(packed, following)
                step(batch)
    for name, work in (("inline", inline), ("overlapped", overlapped)):
        yield {"packing": name, "ms": 1000 * seconds_of(work, args.device, 1) / len(steps)}
    yield {"host syncs a step": host_syncs(lambda: step(packed(steps[0])), args.device)}


def host_syncs(work, device):
    """How often the host waits for the device in `work`, as CUDA reports it; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def vocabulary(args):
    """A step with the vocabulary padded to a multiple of 64, and without."""
    model = model_of(args)
    steps, packed = hh_batches(args, model)
    step = trainer(model)
    for multiple in (1, 64, 1, 64):
        model.vocab_multiple = multiple
        batch = packed(steps[0])
        yield {"vocabulary multiple": multiple,
               "ms": 1000 * seconds_of(lambda: step(batch), args.device, args.sizes.steps)}


def ladder(args):
    """Whole steps of train_dpo.py on each workload, eager and compiled."""
    peak = ["--peak-tflops", "0.1"] if args.tiny else []
    compiled = [] if args.tiny else ["compile"]
    for rung in ["bf16", *compiled]:
        for workload in args.sizes.pairs:
            yield from one_rung(args, workload, rung, peak)


def trl(args):
    """TRL's DPOTrainer on the same pairs, at its defaults and at its best."""
    if not benchmark.importlib.util.find_spec("trl"):
        yield {"note": "TRL is not installed"}
        return
    for rung in ("trl", "trl-best"):
        yield from one_rung(args, "hh", rung, [])


def one_rung(args, workload, rung, flags):
    """A rung of experiments.benchmark, in a process of its own."""
    pairs = args.sizes.pairs[workload]
    argv = ["--device", args.device, "--pairs", str(pairs), "--warmup", "2", "--steps",
            str(args.sizes.steps), *args.sizes.model, *flags]
    line = benchmark.summary(workload, rung, [benchmark.run_apart(argv, workload, rung)], 2)
    names = {"failed": "failed", "pairs_per_second": "pairs/s", "step": "step, s",
             "memory": "peak bytes", "mfu_useful": "MFU useful", "mfu_executed": "MFU executed"}
    found = {shown: line[name] for name, shown in names.items() if name in line}
    yield {"workload": workload, "rung": rung, **found, "graphs": line["runs"][0].get("graphs")}


def decoding(args):
    """Tokens per second of GPT.generate and of the captured step, from prompts of nine tokens."""
    model, n = model_of(args), args.sizes.new_tokens
    options = {} if args.device == "cuda" else {"backend": "eager"}
    numbers = random.Random(0)
    ways = [("eager", model.generate), ("captured", Decoder(model, **options).generate)]
    for name, generate in ways:
        for B in args.sizes.batches:
            prompts = [[numbers.randrange(1000) for _ in range(9)] for _ in range(B)]
            seconds = seconds_of(lambda: generate(prompts, n), args.device, 1)
            yield {"decoding": name, "batch": B, "tokens/s": B * n / seconds,
                   "C.1's 100,000 answers, s": 100_000 / B * seconds}


def run(args):
    """The tests marked gpu, and beside them the default run from SFT to the table."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--out", folder, "--device", args.device]
        tests, commands = ["tests"], [["train_dpo.py", *flags]]
        if args.tiny:
            tests = ["tests/test_model.py"]
            commands = [["train_sft.py", *flags, "--reviews", "2000"],
                        ["train_dpo.py", *flags, "--prefixes", "40", "--steps", "1",
                         "--eval-prompts", "2"]]
        pytest = subprocess.Popen([sys.executable, "-m", "pytest", "-q", "-m", "gpu", *tests],
                                  stdout=subprocess.PIPE, text=True, cwd=ROOT)
        start = time.perf_counter()
        codes = [subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL)
                 .returncode for words in commands]
        yield {"default run, s": time.perf_counter() - start, "exit codes": codes}
        results = Path(folder) / "results.json"
        if results.exists():
            yield {"its table": json.loads(results.read_text())["policies"]["dpo"]}
        out, _ = pytest.communicate()
        yield {"gpu tests": out.strip().splitlines()[-1], "exit code": pytest.returncode,
               "failed": [line for line in out.splitlines() if line.startswith("FAILED")]}


Question = namedtuple("Question", "ask seconds decision")
QUESTIONS = [
    Question(machine, 30, "the peak that every share is of"),
    Question(head, 30, "the fastest head that is off by less than 0.02 nats is CUDA's default"),
    Question(attention, 60, "flex_attention replaces the dense mask if it is faster, mask "
                            "included, at the row length of the default"),
    Question(packing, 30, "pack in another thread if that gains over 3 %; no sync may be left"),
    Question(vocabulary, 20, "vocab_multiple is deleted if 64 gains under 2 %"),
    Question(ladder, 160, "--compile auto stays on for GPT-2 if it pays within one epoch; the "
                          "target on an H100 is 2,000 HH-like pairs/s"),
    Question(decoding, 80, "sample() uses the captured step on CUDA if it is 1.2 times as fast, "
                           "and batches of the size that is fastest"),
    Question(run, 80, "a failing test is repaired before anything else; --device auto stays CUDA "
                      "for the default run if it is faster than 2 CPU cores"),
    Question(trl, 40, "the factor against TRL that the README may name"),
]


# ------------------------------------------------------------------------------------------------
# Asking them
# ------------------------------------------------------------------------------------------------

MARK = "found: "            # begins the lines in which a question's process reports


def ask(question, argv, limit, note):
    """Ask a question in its own process group, for at most `limit` seconds. note: a function that
    is called with each dict it yields. Returns why it did not end well, or None."""
    command_line = [sys.executable, "-m", "experiments.gpu_questions", *argv, "--only",
                    question.ask.__name__, "--here"]
    process = subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors="replace", start_new_session=True, cwd=ROOT,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    timer = threading.Timer(limit, stop, [process])
    start, last = time.monotonic(), ""
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith(MARK):
                note(json.loads(line.removeprefix(MARK)))
            elif line.strip():
                last = line.strip()
        process.wait()
    finally:
        timer.cancel()
        stop(process)
    if process.returncode == 0:
        return None
    if time.monotonic() - start >= limit:
        return f"stopped after {limit:.0f} s"
    return f"exit code {process.returncode}: {last}"


def stop(process):
    """Kill a process with its children, if they are still there."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def text_of(found):
    """One line of what a question found."""
    def shown(value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    return ", ".join(f"{name} {shown(value)}" for name, value in found.items())


def ask_all(questions, argv, args):
    """Ask every question, print and write down what it finds. Returns those that failed."""
    report = {"device": args.device, "tiny": args.tiny, "questions": []}
    end = time.monotonic() + args.seconds
    for i, question in enumerate(questions):
        later = sum(other.seconds for other in questions[i + 1:])
        limit = max(question.seconds, end - time.monotonic() - later)
        limit = min(limit, end - time.monotonic())
        name = question.ask.__name__
        entry = {"question": name, "decision": question.decision, "found": [], "error": None}
        report["questions"].append(entry)
        print(f"\n{name}: {' '.join(question.ask.__doc__.split())}\n  decides: "
              f"{question.decision}", flush=True)

        def note(found):
            entry["found"].append(found)
            print(f"  {text_of(found)}", flush=True)
            if args.json:
                write_json(args.json, report)
        start = time.monotonic()
        entry["error"] = ask(question, argv, limit, note) if limit > 0 else "no time was left"
        entry["seconds"] = time.monotonic() - start
        print(f"  {entry['error'] or 'done'}, {entry['seconds']:.0f} s", flush=True)
        if args.json:
            write_json(args.json, report)
    return [entry["question"] for entry in report["questions"] if entry["error"]]


def parse_args(argv):
    names = [question.ask.__name__ for question in QUESTIONS]
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one, else cpu")
    add("--tiny", action="store_true", help="a model and batches as small as possible")
    add("--only", nargs="+", choices=names, default=names, metavar="QUESTION",
        help=f"which to ask, of {', '.join(names)} (default: all)")
    add("--seconds", type=number_type(float, 0, above=True), default=540.0,
        help="time for all of them (default 540)")
    add("--json", type=Path, help="file to write everything that was found to")
    add("--here", action="store_true", help="ask in this process, for debugging; no time limit")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.sizes = TINY if args.tiny else FULL
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    only_one_process("a question")
    questions = [question for question in QUESTIONS if question.ask.__name__ in args.only]
    if args.here:
        for question in questions:
            for found in question.ask(args):
                print(MARK + json.dumps(found), flush=True)
        return
    argv = ["--device", args.device] + ["--tiny"] * args.tiny
    failed = ask_all(questions, argv, args)
    if failed:
        print(f"\nnot answered in full: {', '.join(failed)}")


if __name__ == "__main__":
    main()
