"""The training curves of a DPO run, or of two runs: metrics.csv as a picture.

    python -m experiments.curves out/reviews               # writes out/reviews/curves.svg
    python -m experiments.curves out/hh --out hh.svg
    python -m experiments.curves out/a out/b --out ab.svg  # two runs in one picture

The picture has four panels, over the training steps:

    loss        on training batches (solid) and on held-out preferences (dotted)
    accuracy    the same
    reward      the implicit rewards beta log(pi / pi_ref) of chosen and rejected answers; the band
                between them is the margin
    log-prob    log pi(y|x) of chosen and rejected answers

docs/measuring.md explains these numbers. Left out on purpose: smoothing. A jump in the picture is a
jump in the run.
"""

import csv
import math
from collections import namedtuple
from pathlib import Path

from experiments.plot import BLUE, GREEN, GREY, ORANGE, PURPLE, pyplot, save
from runtime.cli import Parser, command, only_one_process
from runtime.errors import UserError
from train_dpo import COLUMNS

# A run to draw: what read_metrics returned; what is added to its labels; its two colours; the width
# of its lines and the marker of its dots, which tell two runs apart without colour.
Run = namedtuple("Run", "metrics suffix colours width marker")
RUN_STYLES = [((BLUE, ORANGE), 1.5, "o"), ((GREEN, PURPLE), 0.8, "s")]
GUIDE = {"color": GREY, "linestyle": (0, (1, 2)), "linewidth": 1}


def read_metrics(path):
    """Read a metrics.csv. Returns {column: (steps, values)}, without cells that are empty and
    without columns that have no values. Raises UserError."""
    metrics = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            for row in rows:
                read_row(row, metrics, f"{path}, line {rows.line_num}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; train_dpo.py writes it "
                        "to the folder of its run") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a metrics.csv of train_dpo.py") from error
    if not metrics:
        raise UserError(f"{path}: it has no steps yet")
    return metrics


def read_row(row, metrics, where):
    """Add a row of a metrics.csv to metrics. Only the columns of held-out data have empty cells.
    where: file and line, for the message. Raises UserError."""
    try:
        step = int(row["step"])
        for name in COLUMNS:
            if row[name] == "" and name.startswith("held_out"):
                continue
            value = float(row[name])
            if not math.isfinite(step + value):
                raise ValueError
            steps, values = metrics.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: not a row of a metrics.csv of train_dpo.py") from error


# ------------------------------------------------------------------------------------------------
# The picture
# ------------------------------------------------------------------------------------------------


def draw_curves(metrics, path):
    """Draw the four panels as an SVG file. metrics: {name of a run: what read_metrics returned}, of
    one run or two."""
    plt = pyplot()
    figure, panels = plt.subplots(2, 2, figsize=(9.5, 6))
    loss, accuracy, rewards, logps = panels.flat
    for (name, of_run), style in zip(metrics.items(), RUN_STYLES):
        suffix = f", {name}".replace("$", r"\$") if len(metrics) > 1 else ""    # $ begins formulas
        run = Run(of_run, suffix, *style)
        draw_loss(loss, run)
        draw_accuracy(accuracy, run)
        draw_rewards(rewards, run)
        draw_logps(logps, run)
    accuracy.axhline(50, **GUIDE)
    for ax in panels.flat:
        ax.set_xlabel("step")
        ax.legend(fontsize=9)
    figure.tight_layout()
    save(figure, path)


def draw_loss(ax, run):
    draw_line(ax, run, "loss", "training", 0)
    draw_line(ax, run, "held_out_loss", "held out", 1, ":", dots=True)
    ax.set_ylabel("loss, nats per pair or ranking")
    steps, losses = run.metrics["loss"]
    if math.isclose(losses[0], math.log(2), abs_tol=0.01) and not ax.texts:
        # Where DPO on pairs starts, once for two runs.
        ax.axhline(math.log(2), **GUIDE)
        ax.annotate("log 2", (steps[-1], math.log(2)), ha="right", va="bottom", xytext=(0, 2),
                    textcoords="offset points", fontsize=9)


def draw_accuracy(ax, run):
    draw_line(ax, run, "accuracy", "training", 0, scale=100)
    draw_line(ax, run, "held_out_accuracy", "held out", 1, ":", scale=100, dots=True)
    ax.set_ylabel("pairs ranked correctly, %")


def draw_rewards(ax, run):
    draw_line(ax, run, "chosen_reward", "chosen", 0)
    draw_line(ax, run, "rejected_reward", "rejected", 1, "--")
    steps, chosen = run.metrics["chosen_reward"]
    _, rejected = run.metrics["rejected_reward"]
    ax.fill_between(steps, chosen, rejected, color=GREY, alpha=0.2, linewidth=0,
                    label=None if ax.collections else "margin")         # once for two runs
    ax.set_ylabel("implicit reward, beta × nats")


def draw_logps(ax, run):
    draw_line(ax, run, "chosen_logp", "chosen", 0)
    draw_line(ax, run, "rejected_logp", "rejected", 1, "--")
    ax.set_ylabel("log π(y|x), nats")


def draw_line(ax, run, name, label, colour, style="-", scale=1, dots=False):
    """One metric over the steps, in the run's first or second colour (0 or 1); nothing if the run
    did not log it. dots: mark each value, on a thin line."""
    if name not in run.metrics:
        return
    steps, values = run.metrics[name]
    scaled = [scale * value for value in values]
    options = {"linewidth": run.width}
    if dots:
        options = {"marker": run.marker, "markersize": 5, "linewidth": 0.8}
    ax.plot(steps, scaled, style, color=run.colours[colour], label=label + run.suffix, **options)


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, nargs="+",
        help="folder of a run of train_dpo.py, such as out/reviews; or two, to compare them")
    add("--out", type=Path,
        help="where to write the picture (default: curves.svg in the folder; two runs need a name)")
    args = parser.parse_args(argv)
    if len(args.folder) > 2:
        raise UserError(f"{len(args.folder)} folders: a picture shows one run or two")
    if len(args.folder) == 2 and not args.out:
        raise UserError("name the picture of two runs with --out")
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    only_one_process("drawing")
    if args.out and args.out.suffix != ".svg":
        raise UserError(f"--out {args.out}: expected a name that ends in .svg")
    metrics = {str(folder): read_metrics(folder / "metrics.csv") for folder in args.folder}
    draw_curves(metrics, args.out or args.folder[0] / "curves.svg")


if __name__ == "__main__":
    main()
