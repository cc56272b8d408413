"""The log of a training loop: means since the last line, on the screen and in a CSV file."""

import math
from collections import Counter

import torch
from tqdm import tqdm

from runtime.errors import UserError
from runtime.parallel import all_reduce, process_rank

PATIENCE = 25       # overflows in a row; GradScaler starts at 2^16 and halves its scale at each


class Log:
    """Means since the last line, written as a line on the screen and a row in a CSV file.

    Tensors stay on their device until a line is written, so a step never waits for a GPU. Hence a
    gradient that is not finite is noticed only then, but the step that had it is named.
    """

    def __init__(self, path, columns, batches=None, scaler=None):
        """columns: {column of the file: (header, format) on the screen, or None if it is not
        shown}. batches: to name the prompts of a step. scaler: if it is enabled, gradients may
        overflow now and then."""
        self.path, self.columns, self.batches, self.scaler = path, columns, batches, scaler
        self.text, self.header_shown = "", False
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
        """Write a line after `step` updates, unless nothing happened since the last one. Raises
        UserError if a gradient or a mean is not finite."""
        self.check_gradients()
        sums, counts = self.totals()
        if not sums:
            return
        values = {name: float(value) for name, value in self.latest.items()}
        for name in sums:
            values[name] = sums[name] / counts[name]
            if not math.isfinite(values[name]):
                raise UserError(f"step {step}: the {name} is {values[name]}; stopped, nothing was "
                                "saved; a lower --lr may help")
        self.show(step, values)
        row = [str(step), *(f"{values[name]:.6g}" if name in values else ""
                            for name in self.columns)]
        header = "" if self.text else ",".join(["step", *self.columns]) + "\n"
        self.append_text(header + ",".join(row) + "\n")
        self.sums, self.counts = Counter(), Counter()

    def show(self, step, values):
        """Print a line, the first one under a header."""
        shown = {name: column for name, column in self.columns.items() if column}
        if not self.header_shown:
            tqdm.write("  step" + "".join(f"{header:>10}" for header, _ in shown.values()))
            self.header_shown = True
        cells = [format(values[name], form) if name in values else ""
                 for name, (_, form) in shown.items()]
        tqdm.write(f"{step:6d}" + "".join(f"{cell:>10}" for cell in cells))

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
        return {"text": self.text, "sums": sums, "counts": counts,
                "overflows": self.overflows, "latest": latest}

    def load_state_dict(self, state):
        self.overflows, self.text = int(state["overflows"]), ""
        sums = {name: float(value) for name, value in state["sums"].items()}
        counts = {name: float(value) for name, value in state["counts"].items()}
        self.latest = {name: float(value) for name, value in state["latest"].items()}
        if process_rank() == 0:             # the saved sums are those of all processes
            self.sums, self.counts = Counter(sums), Counter(counts)
        self.append_text(state["text"])     # restore the file, whatever happened to it since
