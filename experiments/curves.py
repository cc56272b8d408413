"""The curves of a run: what a DPO run's metrics.csv says, as a picture.

    python -m experiments.curves out/reviews               # writes out/reviews/curves.svg
    python -m experiments.curves out/hh --out hh.svg

Four panels over the steps: the loss and the accuracy, on training batches (solid) and on held-out
preferences (dots); the implicit rewards beta log(pi / pi_ref) of chosen and rejected answers, the
band between them being the margin; and their log-probabilities. The README's glossary says what
each number is. Left out on purpose: smoothing. What jumps in the picture jumped in the run.
"""

import csv
import math
from pathlib import Path

from experiments.plot import BLUE, GREY, ORANGE, pyplot, save
from runtime.cli import Parser, command
from runtime.errors import UserError
from train_dpo import COLUMNS


def read_metrics(path):
    """{column: ([steps], [values])} of a metrics.csv, without the cells that are empty. Raises
    UserError."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        columns = {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]]
                   for name in COLUMNS}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; train_dpo.py writes it "
                        "to the folder of its run") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a metrics.csv of train_dpo.py") from error
    if not rows:
        raise UserError(f"{path}: no step is in it yet")
    return {name: tuple(zip(*points)) for name, points in columns.items() if points}


def draw(metrics, path):
    """metrics: as read_metrics returns them. Writes an SVG."""
    plt = pyplot()
    figure, panels = plt.subplots(2, 2, figsize=(9.5, 6))
    loss, accuracy, rewards, logps = panels.flat

    def line(ax, name, label, colour, style="-", scale=1, **more):
        if name in metrics:
            steps, values = metrics[name]
            ax.plot(steps, [scale * v for v in values], style, color=colour, label=label, **more)
    dots = {"marker": "o", "markersize": 5, "linewidth": 0.8}
    line(loss, "loss", "training", BLUE)
    line(loss, "held_out_loss", "held out", ORANGE, ":", **dots)
    loss.set_ylabel("loss, nats a pair or ranking")
    line(accuracy, "accuracy", "training", BLUE, scale=100)
    line(accuracy, "held_out_accuracy", "held out", ORANGE, ":", 100, **dots)
    accuracy.axhline(50, color=GREY, linestyle=(0, (1, 2)), linewidth=1)
    accuracy.set_ylabel("pairs ranked rightly, %")
    line(rewards, "chosen_reward", "chosen", BLUE)
    line(rewards, "rejected_reward", "rejected", ORANGE, "--")
    rewards.fill_between(metrics["chosen_reward"][0], metrics["chosen_reward"][1],
                         metrics["rejected_reward"][1], color=GREY, alpha=0.2, linewidth=0,
                         label="margin")
    rewards.set_ylabel("implicit reward, beta × nats")
    line(logps, "chosen_logp", "chosen", BLUE)
    line(logps, "rejected_logp", "rejected", ORANGE, "--")
    logps.set_ylabel("log π(y|x), nats")
    if math.isclose(metrics["loss"][1][0], math.log(2), abs_tol=0.01):
        loss.axhline(math.log(2), color=GREY, linestyle=(0, (1, 2)), linewidth=1)
        loss.annotate("log 2", (metrics["loss"][0][-1], math.log(2)), ha="right", va="bottom",
                      xytext=(0, 2), textcoords="offset points", fontsize=9)
    for ax in panels.flat:
        ax.set_xlabel("step")
        ax.legend(fontsize=9)
    figure.tight_layout()
    save(figure, path)


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="of a run of train_dpo.py, such as out/reviews")
    add("--out", type=Path, help="the picture's file (default curves.svg in that folder)")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    draw(read_metrics(args.folder / "metrics.csv"), args.out or args.folder / "curves.svg")


if __name__ == "__main__":
    main()
