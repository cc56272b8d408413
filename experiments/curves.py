"""The training curves of a DPO run: its metrics.csv as a picture.

    python -m experiments.curves out/reviews               # writes out/reviews/curves.svg
    python -m experiments.curves out/hh --out hh.svg

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
from pathlib import Path

from experiments.plot import BLUE, GREY, ORANGE, pyplot, save
from runtime.cli import Parser, command, only_one_process
from runtime.errors import UserError
from train_dpo import COLUMNS

DOTS = {"marker": "o", "markersize": 5, "linewidth": 0.8}
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


def draw(metrics, path):
    """Draw the four panels as an SVG file. metrics: as read_metrics returns them."""
    plt = pyplot()
    figure, panels = plt.subplots(2, 2, figsize=(9.5, 6))
    loss, accuracy, rewards, logps = panels.flat
    draw_loss(loss, metrics)
    draw_accuracy(accuracy, metrics)
    draw_rewards(rewards, metrics)
    draw_logps(logps, metrics)
    for ax in panels.flat:
        ax.set_xlabel("step")
        ax.legend(fontsize=9)
    figure.tight_layout()
    save(figure, path)


def draw_loss(ax, metrics):
    draw_line(ax, metrics, "loss", "training", BLUE)
    draw_line(ax, metrics, "held_out_loss", "held out", ORANGE, ":", **DOTS)
    ax.set_ylabel("loss, nats per pair or ranking")
    steps, losses = metrics["loss"]
    if math.isclose(losses[0], math.log(2), abs_tol=0.01):      # where DPO on pairs starts
        ax.axhline(math.log(2), **GUIDE)
        ax.annotate("log 2", (steps[-1], math.log(2)), ha="right", va="bottom", xytext=(0, 2),
                    textcoords="offset points", fontsize=9)


def draw_accuracy(ax, metrics):
    draw_line(ax, metrics, "accuracy", "training", BLUE, scale=100)
    draw_line(ax, metrics, "held_out_accuracy", "held out", ORANGE, ":", scale=100, **DOTS)
    ax.axhline(50, **GUIDE)
    ax.set_ylabel("pairs ranked correctly, %")


def draw_rewards(ax, metrics):
    draw_line(ax, metrics, "chosen_reward", "chosen", BLUE)
    draw_line(ax, metrics, "rejected_reward", "rejected", ORANGE, "--")
    steps, chosen = metrics["chosen_reward"]
    _, rejected = metrics["rejected_reward"]
    ax.fill_between(steps, chosen, rejected, color=GREY, alpha=0.2, linewidth=0, label="margin")
    ax.set_ylabel("implicit reward, beta × nats")


def draw_logps(ax, metrics):
    draw_line(ax, metrics, "chosen_logp", "chosen", BLUE)
    draw_line(ax, metrics, "rejected_logp", "rejected", ORANGE, "--")
    ax.set_ylabel("log π(y|x), nats")


def draw_line(ax, metrics, name, label, colour, style="-", scale=1, **options):
    """One metric over the steps; nothing if the run did not log it."""
    if name not in metrics:
        return
    steps, values = metrics[name]
    scaled = [scale * value for value in values]
    ax.plot(steps, scaled, style, color=colour, label=label, **options)


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="folder of a run of train_dpo.py, such as out/reviews")
    add("--out", type=Path, help="where to write the picture (default: curves.svg in that folder)")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    only_one_process("drawing")
    if args.out and args.out.suffix != ".svg":
        raise UserError(f"--out {args.out}: expected a name that ends in .svg")
    metrics = read_metrics(args.folder / "metrics.csv")
    draw(metrics, args.out or args.folder / "curves.svg")


if __name__ == "__main__":
    main()
