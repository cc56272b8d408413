"""What the steps of a training loop share: the log, micro-batches, the training state, Ctrl-C.

    run = Run("dpo", COLUMNS, args, batches, held_out, model=policy, optimizer=optimizer,
              scaler=scaler)
    for step in run.steps(evaluate):                # evaluates, logs, saves; --resume; Ctrl-C
        for batch in run.micro_batches(step):
            ...
            run.log.add(count, loss=total)
        run.log.note_update(step, grad_norm, lr)

With several processes, all of them take the same steps.
"""

import math
import os
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tqdm import tqdm

from runtime.errors import Interrupted, UserError
from runtime.files import fingerprint, handling_signals, load_tensors, reading, replacing
from runtime.log import Log
from runtime.memory import fewest_micro_batches
from runtime.parallel import all_reduce, barrier, process_rank, world_size

# The flags that a run and its resumption must share.
SAME_ON_RESUME = ["batch", "epochs", "steps", "seed", "lr", "warmup", "weight_decay", "clip",
                  "beta", "loss", "row_length", "compile", "log_every", "eval_every",
                  "reward", "minibatch", "critic_lr", "target_kl", "horizon",      # of PPO
                  "rounds", "samples"]                                             # of online DPO


class Run:
    """A training run. Its log is args.out/<name>_metrics.csv. args.out/<name>_state.pt has all that
    the next step depends on; while it exists, the run has not finished.

    The order of the data depends only on the seed and the step (data.Batches), and training draws
    no random numbers. Files are complete or absent. So a run that was killed and resumed ends, on
    the same CPU, with the same bytes as one that was not.
    """

    def __init__(self, name, columns, args, batches, held_out=(), digests=None, *, model, optimizer,
                 scaler, **more):
        """columns: what the log shows, as for Log. batches: a data.Batches. held_out: the list of
        Encoded that `evaluate` will use. digests: {what: digest} of other things that a resumed run
        must share. more: other objects with state_dict and load_state_dict that the next step
        depends on."""
        self.name, self.args, self.batches, self.model = name, args, batches, model
        self.path = args.out / f"{name}_state.pt"
        self.log = Log(args.out / f"{name}_metrics.csv", columns, batches, scaler)
        self.saved_objects = {"model": model, "optimizer": optimizer, "scaler": scaler,
                              "log": self.log, **more}
        self.held_out, self.more_digests = held_out, digests or {}
        self.step = 0                                   # the number of updates so far
        self.n_steps = args.steps or math.ceil(args.epochs * batches.per_epoch / args.batch)
        self.n_warmup = min(args.warmup, self.n_steps // 2)
        self.log_every, self.eval_every = intervals(args, self.n_steps)
        self.signals = []                               # those that this process received
        self.saved_at = time.monotonic()

    def steps(self, evaluate=None):
        """Yield the steps that are left, under a progress bar. Before the first step, between steps
        and after the last one: call evaluate(), write a line of the log, and save, where due.

        Ctrl-C and SIGTERM end the loop after the step under way, once it is saved. A second Ctrl-C
        ends it at once.
        """
        resumed = self.begin()
        if self.n_warmup < self.args.warmup:
            print(f"the learning rate warms up over {self.n_warmup} steps, half of the run, not "
                  f"over {self.args.warmup}")
        with noting_signals(self.signals):
            if not resumed:
                self.pause(evaluate)
            for step in tqdm(range(self.step, self.n_steps), self.name, initial=self.step,
                             total=self.n_steps, disable=None):
                yield step
                self.step = step + 1
                self.pause(evaluate)

    def micro_batches(self, step):
        """The batch of a step as this process's packed micro-batches. Their gradients add up."""
        return self.batches.micro_batches(step, self.n_micro_batches, self.args.row_length,
                                          self.model)

    def pause(self, evaluate):
        """Evaluate, log and save, where due. Raises Interrupted if a signal came."""
        if evaluate and self.is_due(self.eval_every):
            evaluate()
        if self.is_due(self.log_every):
            self.log.write(self.step)
        due = time.monotonic() - self.saved_at >= 60 * self.args.save_every
        # All processes save and stop at the same step.
        signalled, due = all_reduce([max(self.signals, default=0), due], dist.ReduceOp.MAX)
        if signalled or due or self.step in (0, self.n_steps):
            self.save()
        if signalled:
            raise Interrupted(int(signalled), f"stopped after {self.step} steps; the same "
                              "command with --resume, without --fresh, goes on from there")

    def is_due(self, every):
        return self.step % every == 0 or self.step == self.n_steps

    # -- the training state ----------------------------------------------------------------------

    def begin(self):
        """Load the training state if --resume asks for it. Returns whether it did. Raises UserError
        if the file is of a different run."""
        resuming = self.args.resume and self.path.exists()
        saved = load_state(self.path) if resuming else None
        barrier()                           # until all processes have looked
        self.n_micro_batches = self.choose_n_micro_batches(saved)       # per process
        self.flags = {name: getattr(self.args, name) for name in SAME_ON_RESUME
                      if hasattr(self.args, name)}
        self.flags |= {"device": self.model.device.type, "precision": str(self.model.precision)}
        self.digests = {**self.more_digests, "weights to start from": fingerprint(self.model),
                        "data": fingerprint(self.batches.encoded),
                        "held-out data": fingerprint(self.held_out)}
        if resuming:
            self.load(saved)
        elif self.args.resume:
            print(f"{self.path}: no unfinished run to resume; starting from the first step (for a "
                  "longer run, raise --epochs or --steps)")
        elif self.path.exists():
            self.move_aside()
        return resuming

    def choose_n_micro_batches(self, saved):
        """The number of the run that is resumed; else --accumulate, or as many as the free memory
        asks for. Raises UserError if there are fewer prompts than processes."""
        if world_size() > 1:
            fewest = min(map(len, self.batches.first_epoch()))
            if fewest < world_size():
                raise UserError(f"--batch {self.args.batch} is {fewest} prompts in some step, and "
                                f"there are {world_size()} processes: each needs a prompt")
        if self.args.accumulate is not None:
            return self.args.accumulate
        if saved:
            n = math.ceil(saved["micro_batches"] / world_size())
        else:
            n = fewest_micro_batches(self.model, self.batches, self.args.row_length)
        if n > 1:
            print(f"{n} micro-batches per step, to fit in the free memory")
        return n

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


def intervals(args, n_steps):
    """(steps between lines of the log, steps between evaluations): those of the flags, or about a
    tenth of the run. The second is a multiple of the first, so every evaluation has its line."""
    log_every = args.log_every or math.ceil(n_steps / 10)
    eval_every = getattr(args, "eval_every", None)
    if eval_every is None:
        return log_every, log_every * max(1, round(n_steps / 10 / log_every))
    return args.log_every or eval_every, eval_every


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
    """The content of a file that Run.save wrote. Raises UserError for others."""
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
