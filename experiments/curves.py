"""The training curves of a DPO run, or of two runs: dpo_metrics.csv as a picture.

    python -m experiments.curves out/reviews               # writes out/reviews/curves.svg
    python -m experiments.curves out/hh --out hh.svg
    python -m experiments.curves out/a out/b --out ab.svg  # two runs in one picture

The picture has four panels, over the training steps, with lines for training batches and dots for
held-out preferences:

    loss        and where DPO starts, at log 2
    accuracy    the share of pairs that are ranked correctly
    rewards     the implicit rewards beta log(pi / pi_ref) of chosen and rejected answers; the band
                between them is the margin
    log-probs   log pi(y|x) of chosen and rejected answers: of held-out ones if the run logged them,
                because in training they differ more from batch to batch than they change

docs/measuring.md explains these numbers. Left out on purpose: smoothing. A jump in the picture is a
jump in the run.
"""

import csv
import math
from collections import namedtuple

from experiments.plot import BLUE, GREEN, GREY, ORANGE, PURPLE, pyplot, save
from runtime.cli import Parser, command, only_one_process, path_type
from runtime.errors import UserError
from train_dpo import COLUMNS

ALWAYS_LOGGED = {name for name in COLUMNS if not name.startswith("held_out")}

# A run to draw: what read_metrics returned; what is added to its labels; its two colours; the width
# of its lines and the marker of its dots, which tell two runs apart without colour.
Run = namedtuple("Run", "metrics suffix colours width marker")
RUN_STYLES = [((BLUE, ORANGE), 1.5, "o"), ((GREEN, PURPLE), 0.8, "s")]
GUIDE = {"color": GREY, "linestyle": (0, (1, 2)), "linewidth": 1}


def read_metrics(path):
    """Read a dpo_metrics.csv. Returns {column: (steps, values)}, without cells that are empty and
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
        raise UserError(f"{path}: not a dpo_metrics.csv of train_dpo.py") from error
    return metrics


def read_row(row, metrics, where):
    """Add a row of a dpo_metrics.csv to metrics. where: file and line, for the message. Raises
    UserError."""
    try:
        step = int(row.pop("step"))
        if not ALWAYS_LOGGED <= set(row):
            raise KeyError
        for name, cell in row.items():
            if cell == "" and (step == 0 or name not in ALWAYS_LOGGED):
                continue
            value = float(cell)
            if not math.isfinite(step + value):
                raise ValueError
            steps, values = metrics.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: not a row of a dpo_metrics.csv of train_dpo.py") from error


# ------------------------------------------------------------------------------------------------
# The picture
# ------------------------------------------------------------------------------------------------


def draw_curves(metrics, path):
    """Draw the four panels as an SVG file. metrics: {name of a run: what read_metrics returned}, of
    one run or two."""
    plt = pyplot()
    figure, panels = plt.subplots(2, 2, figsize=(9.5, 6.4))
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
    draw_line(ax, run, "loss", "training batches")
    draw_dots(ax, run, "held_out_loss", "held out")
    ax.set_title("Loss")
    ax.set_ylabel("nats per pair or ranking")
    steps, losses = run.metrics.get("held_out_loss", run.metrics["loss"])
    if math.isclose(losses[0], math.log(2), abs_tol=0.01) and not ax.texts:
        # Where DPO on pairs starts, once for two runs.
        ax.axhline(math.log(2), **GUIDE)
        ax.annotate("log 2", (steps[-1], math.log(2)), ha="right", va="bottom", xytext=(0, 2),
                    textcoords="offset points", fontsize=9)


def draw_accuracy(ax, run):
    draw_line(ax, run, "accuracy", "training batches", scale=100)
    draw_dots(ax, run, "held_out_accuracy", "held out", scale=100)
    ax.set_title("Accuracy: pairs ranked correctly")
    ax.set_ylabel("%")


def draw_rewards(ax, run):
    draw_line(ax, run, "chosen_reward", "chosen")
    draw_line(ax, run, "rejected_reward", "rejected", 1, "--")
    steps, chosen = run.metrics["chosen_reward"]
    _, rejected = run.metrics["rejected_reward"]
    ax.fill_between(steps, chosen, rejected, color=GREY, alpha=0.2, linewidth=0,
                    label=None if ax.collections else "margin")         # once for two runs
    draw_dots(ax, run, "held_out_chosen_reward", "held out")
    draw_dots(ax, run, "held_out_rejected_reward", None, 1)
    ax.set_title("Implicit rewards")
    ax.set_ylabel("β log(π / π_ref)")


def draw_logps(ax, run):
    if "held_out_chosen_logp" in run.metrics:
        draw_dots(ax, run, "held_out_chosen_logp", "chosen, held out")
        draw_dots(ax, run, "held_out_rejected_logp", "rejected, held out", 1)
    else:
        draw_line(ax, run, "chosen_logp", "chosen")
        draw_line(ax, run, "rejected_logp", "rejected", 1, "--")
    ax.set_title("Log-probs of the answers")
    ax.set_ylabel("log π(y|x), nats")


def draw_line(ax, run, name, label, colour=0, style="-", scale=1, **marks):
    """One metric over the steps, in the run's first or second colour (0 or 1); nothing if the run
    did not log it."""
    if name in run.metrics:
        steps, values = run.metrics[name]
        marks = {"linewidth": run.width, **marks}
        ax.plot(steps, [scale * value for value in values], style, color=run.colours[colour],
                label=label and label + run.suffix, **marks)


def draw_dots(ax, run, name, label, colour=0, scale=1):
    """The same for a metric of held-out data: a dot for each value, hollow in the second colour."""
    draw_line(ax, run, name, label, colour, ":", scale, linewidth=0.8, marker=run.marker,
              markersize=4.5, fillstyle="none" if colour else "full")


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", type=path_type, nargs="+",
        help="folder of a run of train_dpo.py, such as out/reviews; or two, to compare them")
    add("--out", type=path_type,
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
    metrics = {str(folder): read_metrics(folder / "dpo_metrics.csv") for folder in args.folder}
    for folder, of_run in metrics.items():
        if "loss" not in of_run:
            raise UserError(f"{folder}/dpo_metrics.csv: it has no steps yet")
    draw_curves(metrics, args.out or args.folder[0] / "curves.svg")


if __name__ == "__main__":
    main()
