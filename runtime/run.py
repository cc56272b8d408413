"""The bookkeeping of a training loop: the log, the training state that --resume needs, Ctrl-C.

A loop uses it in three places:

    log = Log(args.out / "metrics.csv", COLUMNS, batches, scaler)
    state = TrainingState(args.out / "dpo_state.pt", args, policy, optimizer, scaler, log, batches,
                          held_out)
    for step in state.steps(n_steps, "DPO"):        # restores what --resume asks for
        log.add(count, loss=total)                  # for each micro-batch
        log.note_update(step, grad_norm, lr)        # once a step
        log.write(step)                             # every so many steps
        state.save_if_due(step)

With several processes, all of them call log.write and state.save_if_due at the same steps.
"""

import math
import os
import time
from collections import Counter
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tqdm import tqdm

from runtime.errors import Interrupted, UserError
from runtime.files import fingerprint, handling_signals, load_tensors, reading, replacing
from runtime.memory import fewest_micro_batches
from runtime.parallel import all_reduce, barrier, process_rank, world_size


def is_due(step, n_steps, every):
    """Whether this step is the first, an `every`-th after it, or the last."""
    return step % every == 0 or step == n_steps - 1


# ------------------------------------------------------------------------------------------------
# The log
# ------------------------------------------------------------------------------------------------

PATIENCE = 25       # overflows in a row; GradScaler starts at 2^16 and halves its scale at each


class Log:
    """Means since the last line, written as a line on the screen and a row in a CSV file.

    Tensors stay on their device until a line is written, so a step never waits for a GPU. Hence a
    gradient that is not finite is noticed only then, but the step that had it is named.
    """

    def __init__(self, path, columns, batches=None, scaler=None):
        """columns: {name: format on the screen}. batches: to name the prompts of a step. scaler: if
        it is enabled, gradients may overflow now and then."""
        self.path, self.columns, self.batches, self.scaler = path, columns, batches, scaler
        self.lines, self.text = 0, ""
        self.sums, self.counts = Counter(), Counter()
        self.norms, self.overflows = [], 0          # (step, gradient norm) since the last check
        self.latest = {}                            # gradient norm and learning rate

    def add(self, count, **sums):
        """Add sums over `count` things. Means are formed from total sums and counts when a line is
        written, so they are never means of means."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value       # not in place: devices may differ
            self.counts[name] += count

    def note_update(self, step, grad_norm, lr):
        """Note the gradient norm, a tensor, and the learning rate of a step."""
        self.norms.append((step, grad_norm))
        self.latest = {"grad_norm": grad_norm, "lr": lr}

    def write(self, step):
        """Write a line. Raises UserError if a gradient or a mean is not finite."""
        self.check_gradients()
        sums, counts = self.totals()
        values = {name: float(value) for name, value in self.latest.items()}
        for name in sums:
            values[name] = sums[name] / counts[name]
            if not math.isfinite(values[name]):
                raise UserError(f"step {step}: the {name} is {values[name]}; stopped, nothing was "
                                "saved; a lower --lr may help")
        if self.lines % 25 == 0:
            tqdm.write("  step  " + "  ".join(f"{name:>8}" for name in self.columns))
        cells = []
        for name, form in self.columns.items():
            cell = format(values[name], form) if name in values else ""
            cells.append(cell.rjust(max(8, len(name))))
        tqdm.write(f"{step:6d}  " + "  ".join(cells))
        row = [str(step), *(f"{values[name]:.6g}" if name in values else ""
                            for name in self.columns)]
        header = "" if self.text else ",".join(["step", *self.columns]) + "\n"
        self.append_text(header + ",".join(row) + "\n")
        self.lines += 1
        self.sums, self.counts = Counter(), Counter()

    def check_gradients(self):
        """Raise UserError, naming the step and its prompts, if a gradient was not finite."""
        noted, self.norms = self.norms, []
        if not noted:
            return
        values = torch.stack([norm for _, norm in noted]).tolist()
        for (step, _), value in zip(noted, values):
            if math.isfinite(value):
                self.overflows = 0
                continue
            if not self.scaler.is_enabled():
                raise UserError(f"step {step}: the gradient is {value}; stopped, and no file was "
                                "overwritten; a lower --lr may help, or look at the rows of this "
                                f"step, the prompts {self.prompts_of(step)}")
            self.overflows += 1
            if self.overflows >= PATIENCE:
                raise UserError(f"step {step}: float16 overflowed {PATIENCE} times in a row; "
                                "stopped, and no file was overwritten; a lower --lr or --precision "
                                "float32 may help")

    def prompts_of(self, step):
        """The prompts of a step, by their index among those trained on."""
        indices = sorted({i for _, i, _ in self.batches.units_of(step)})
        more = f" and {len(indices) - 8} more" if len(indices) > 8 else ""
        return ", ".join(map(str, indices[:8])) + more

    def totals(self):
        """(sums, counts) by name, over all processes."""
        names = list(self.columns)
        numbers = all_reduce([float(self.sums[name]) for name in names]
                             + [self.counts[name] for name in names])
        sums, counts = dict(zip(names, numbers)), dict(zip(names, numbers[len(names):]))
        seen = [name for name in names if counts[name]]
        return {name: sums[name] for name in seen}, {name: counts[name] for name in seen}

    def append_text(self, text):
        """Append to the CSV file, which the first line overwrites. Only the first process writes.
        """
        try:
            if process_rank() == 0:
                with open(self.path, "a" if self.text else "w", newline="") as file:
                    file.write(text)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error
        self.text += text

    def state_dict(self):
        sums, counts = self.totals()
        latest = {name: float(value) for name, value in self.latest.items()}
        return {"lines": self.lines, "text": self.text, "sums": sums, "counts": counts,
                "overflows": self.overflows, "latest": latest}

    def load_state_dict(self, state):
        self.lines, self.overflows, self.text = int(state["lines"]), int(state["overflows"]), ""
        sums = {name: float(value) for name, value in state["sums"].items()}
        counts = {name: float(value) for name, value in state["counts"].items()}
        self.latest = {name: float(value) for name, value in state["latest"].items()}
        if process_rank() == 0:             # the saved sums are those of all processes
            self.sums, self.counts = Counter(sums), Counter(counts)
        self.append_text(state["text"])     # restore the file, whatever happened to it since


# ------------------------------------------------------------------------------------------------
# The training state
# ------------------------------------------------------------------------------------------------

# The flags that a run and its resumption must share.
SAME_ON_RESUME = ["batch", "epochs", "steps", "seed", "lr", "warmup", "weight_decay", "clip",
                  "beta", "loss", "row_length", "compile", "log_every", "eval_every",
                  "reward", "minibatch", "critic_lr", "target_kl", "horizon"]      # of PPO


class TrainingState:
    """What the next step depends on, and its file.

    The order of the data depends only on the seed and the step (data.Batches), and training draws
    no random numbers. The file is written completely or not at all. So a run that was killed and
    resumed ends, on the same CPU, with the same bytes as one that was not. While the file exists,
    the run has not finished.
    """

    def __init__(self, path, args, model, optimizer, scaler, log, batches, held_out, digests=None,
                 **more):
        """digests: {what: digest}, of further things that a resumed run must share. more: further
        objects with state_dict and load_state_dict that the next step depends on."""
        self.path, self.args, self.batches, self.log = path, args, batches, log
        self.saved_objects = {"model": model, "optimizer": optimizer, "scaler": scaler, "log": log,
                              **more}
        self.held_out, self.more_digests = held_out, digests or {}
        self.step = 0
        self.n_micro_batches = args.accumulate          # per process; None until steps() begins
        self.signals, self.stop_signal = [], 0          # those of this process; that of any process
        self.saved_at = time.monotonic()

    def steps(self, n_steps, name):
        """Yield the steps that are left, under a progress bar.

        Ctrl-C and SIGTERM end the loop after the step under way, once save_if_due has saved it. A
        second Ctrl-C ends it at once.
        """
        self.begin()
        self.n_steps = n_steps
        with noting_signals(self.signals):
            for step in tqdm(range(self.step, n_steps), name, initial=self.step, total=n_steps):
                yield step
                if self.stop_signal:
                    raise Interrupted(self.stop_signal, f"stopped after step {step}; the same "
                                      "command with --resume, without --fresh, goes on from there")

    def save_if_due(self, step):
        """Save after a step: every --save-every minutes, after the last step, and before stopping.
        All processes save after the same step."""
        self.step = step + 1
        due = time.monotonic() - self.saved_at >= 60 * self.args.save_every
        signalled, due = all_reduce([max(self.signals, default=0), due], dist.ReduceOp.MAX)
        self.stop_signal = int(signalled)
        if self.stop_signal or due or self.step == self.n_steps:
            self.save()

    def begin(self):
        """Load the file if --resume asks for it, else write the first one. Raises UserError if the
        file is of a different run."""
        resuming = self.args.resume and self.path.exists()
        saved = load_state(self.path) if resuming else None
        barrier()                           # until all processes have looked
        self.choose_n_micro_batches(saved)
        model = self.saved_objects["model"]
        self.flags = {name: getattr(self.args, name) for name in SAME_ON_RESUME
                      if hasattr(self.args, name)}
        self.flags |= {"device": model.device.type, "precision": str(model.precision)}
        self.digests = {"weights to start from": fingerprint(model),
                        "data": fingerprint(self.batches.encoded),
                        "held-out data": fingerprint(self.held_out), **self.more_digests}
        if resuming:
            self.load(saved)
            return
        if self.args.resume:
            print(f"{self.path}: nothing to resume; starting from the first step")
        elif self.path.exists():
            self.move_aside()
        self.save()                         # from the first moment on, the run can be resumed

    def choose_n_micro_batches(self, saved):
        """Keep the number of the run that is resumed; else take --accumulate, or as many as the
        free memory asks for. Raises UserError if there are fewer prompts than processes."""
        if world_size() > 1:
            fewest = min(map(len, self.batches.first_epoch()))
            if fewest < world_size():
                raise UserError(f"--batch {self.args.batch} is {fewest} prompts in some step, and "
                                f"there are {world_size()} processes: each needs a prompt")
        if self.n_micro_batches is None and saved:
            self.n_micro_batches = math.ceil(saved["micro_batches"] / world_size())
        elif self.n_micro_batches is None:
            self.n_micro_batches = fewest_micro_batches(
                self.saved_objects["model"], self.batches, self.args.row_length)
        if self.args.accumulate is None and self.n_micro_batches > 1:
            print(f"{self.n_micro_batches} micro-batches per step, to fit in the free memory")

    def load(self, saved):
        for name, now in self.flags.items():
            then = saved["flags"].get(name)
            if then != now:
                raise UserError(f"{self.path}: cannot resume, that run had "
                                f"--{name.replace('_', '-')} {then}, this one has {now}; without "
                                "--resume a new run starts")
        for name, now in self.digests.items():
            if saved["digests"].get(name) != now:
                raise UserError(f"{self.path}: cannot resume, the {name} changed since; without "
                                "--resume a new run starts")
        with reading(self.path, A_STATE):
            check_optimizer(saved["optimizer"], self.saved_objects["optimizer"])
            for name, saved_object in self.saved_objects.items():
                saved_object.load_state_dict(saved[name])
        self.step = saved["step"]
        print(f"{self.path}: going on with step {self.step}")

    def save(self):
        self.log.check_gradients()          # never save weights after a NaN
        state = {name: value.state_dict() for name, value in self.saved_objects.items()}
        state |= {"flags": self.flags, "digests": self.digests, "step": self.step,
                  "micro_batches": self.n_micro_batches * world_size()}
        with replacing(self.path) as file:
            torch.save(state, file)
        self.saved_at = time.monotonic()

    def move_aside(self):
        """Keep the file of a run that stopped early under a name that is free."""
        n = 1
        while (old := self.path.with_suffix(f".old{n}")).exists():
            n += 1
        barrier()                           # until all processes have looked
        if process_rank() == 0:
            os.replace(self.path, old)
        print(f"{self.path} is from a run that stopped early, which --resume would have continued; "
              f"it is now {old}, and this run starts from the first step")


@contextmanager
def noting_signals(noted):
    """A with block in which SIGINT and SIGTERM append their number to the list `noted`; the second
    one raises Interrupted."""
    def note(number, frame):
        noted.append(number)
        if len(noted) > 1:
            raise Interrupted(number, "stopped at once; the last saved state is kept")
    with handling_signals(note):
        yield


A_STATE = "the training state of a run"
FIELDS = {"flags": dict, "digests": dict, "step": int, "micro_batches": int, "model": dict,
          "optimizer": dict, "scaler": dict, "log": dict}


def load_state(path):
    """The content of a file that TrainingState wrote. Raises UserError for others."""
    with reading(path, A_STATE):
        state = load_tensors(path)
        for name, kind in FIELDS.items():
            if not isinstance(state[name], kind):
                raise ValueError(f"{name} has another type")
        if state["step"] < 0 or state["micro_batches"] < 1:
            raise ValueError("a number is too small")
        return state


def check_optimizer(saved, optimizer):
    """Raise an exception if a saved state dict does not fit an AdamW. Its own load_state_dict
    accepts any settings and shapes."""
    def settings(groups):
        return [group | {"lr": None} for group in groups]       # every step sets the lr
    if settings(saved["param_groups"]) != settings(optimizer.state_dict()["param_groups"]):
        raise ValueError("other settings")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for i, moments in saved["state"].items():
        shapes = {name: tuple(moment.shape) for name, moment in moments.items()}
        shape = tuple(weights[i].shape)
        if shapes != {"step": (), "exp_avg": shape, "exp_avg_sq": shape}:
            raise ValueError("other weights")
