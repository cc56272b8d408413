"""How the margins of held-out pairs are distributed, for one policy or several side by side.

    python -m experiments.margins                   # dpo.pt of the run: out/reviews/margins.svg
    python -m experiments.margins --checkpoint out/a/dpo.pt --checkpoint out/b/dpo.pt

The margin of a pair is the difference of its two implicit rewards,

    beta log[pi(y_w|x) / pi_ref(y_w|x)] - beta log[pi(y_l|x) / pi_ref(y_l|x)]

and dpo_metrics.csv has its mean. The same mean can be that of many pairs that are all a little
ahead, or of a few that are far ahead while others are ranked wrongly; here is the whole
distribution.

To see it over training, train with several --steps: the learning rate of DPO does not decay, so the
first 40 steps of a long run are the run of --steps 40. Left out on purpose: logging it during
training, which would need every margin of every process at each evaluation, not just sums.
"""

from pathlib import Path

import torch

from experiments.plot import BLUE, GREY, ORANGE, pyplot, save
from runtime.cli import Parser, command, only_one_process, set_up
from runtime.errors import UserError
from runtime.files import make_folder
from runtime.report import names_of
from sample import log_ratios_of_pairs
from tasks import held_out_pairs
from tasks.checkpoint import open_with_reference
from tasks.flags import add_task_flags, choose_task

QUANTILES = [0.05, 0.25, 0.5, 0.75, 0.95]


def margins_of(policies, reference, items, betas):
    """{name: (P,) margins of all pairs of a list of Encoded}. policies, betas: by name."""
    ref_logratios = log_ratios_of_pairs(reference, items, "reference")
    return {name: betas[name] * (log_ratios_of_pairs(policy, items, name) - ref_logratios)
            for name, policy in policies.items()}


def as_table(margins):
    """Mean and quantiles of the margins of each policy, as text."""
    width = max(map(len, margins))
    headings = ["mean", *(f"{q:.0%}" for q in QUANTILES), "< 0"]
    lines = [" " * width + "".join(f"{heading:>8}" for heading in headings)]
    for name, values in margins.items():
        quantiles = values.quantile(torch.tensor(QUANTILES, dtype=values.dtype)).tolist()
        numbers = "".join(f"{number:8.2f}" for number in [values.mean().item(), *quantiles])
        wrong = (values < 0).double().mean().item()
        lines.append(f"{name:{width}}{numbers}{wrong:8.1%}")
    return "\n".join(lines)


def draw(margins, path):
    """Draw a histogram for each policy, above one another on the same axis, as an SVG file. Pairs
    that are ranked wrongly are orange. What is beyond the axis is counted in its last bars."""
    plt = pyplot(letters="none")
    together = torch.cat(list(margins.values()))
    low, high = together.quantile(torch.tensor([0.01, 0.99], dtype=together.dtype)).tolist()
    width = max(high - low, 1e-6) / 50
    first, last = min(int(low / width), 0) - 1, max(int(high / width), 0) + 1
    edges = [width * i for i in range(first, last + 1)]             # 0 is one of them
    figure, rows = plt.subplots(len(margins), 1, figsize=(8, 1.5 * len(margins) + 0.5),
                                sharex=True, squeeze=False)
    for ax, (name, values) in zip(rows.flat, margins.items()):
        shown = values.clamp(edges[0], edges[-1])
        sides = [(shown[shown < 0], [edge for edge in edges if edge <= 0], ORANGE),
                 (shown[shown >= 0], [edge for edge in edges if edge >= 0], BLUE)]
        for part, of_side, colour in sides:
            ax.hist(part.tolist(), of_side, color=colour, histtype="stepfilled",
                    weights=[100 / len(values)] * len(part))
        ax.axvline(values.median().item(), color=GREY, linewidth=1, linestyle="--")
        ax.set_title(name, fontsize=10)
        ax.set_ylabel("% of pairs")
    rows[-1, 0].set_xlabel("margin of a held-out pair; dashed: the median")
    figure.tight_layout()
    save(figure, path)


def parse_args(argv):
    parser = Parser(__doc__)
    add_task_flags(parser)
    add = parser.add_argument
    add("--checkpoint", type=Path, action="append", metavar="FILE",
        help="a policy; may be given several times (default dpo.pt of the run)")
    add("--reference", type=Path, help="default: sft.pt of the run")
    add("--svg", type=Path, metavar="FILE", help="the picture (default: margins.svg of the run)")
    parser.set_defaults(strict=False)       # rows that teach nothing are counted
    args = parser.parse_args(argv)
    choose_task(args)
    if args.svg and args.svg.suffix != ".svg":
        raise UserError(f"--svg {args.svg}: expected a name that ends in .svg")
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    only_one_process("drawing")
    device = set_up(args)
    paths = args.checkpoint or [args.out / "dpo.pt"]
    reference_path = args.reference or args.out / "sft.pt"
    policies, reference, tokenizer, betas = open_with_reference(paths, reference_path, device, args)
    names = names_of([*paths, reference_path])
    for path in paths:
        if names[path] not in betas:
            raise UserError(f"{path} was not trained by train_dpo.py, so it has no beta")
    items = held_out_pairs(tokenizer, reference.config.block_size, args)
    if not items:
        raise UserError("there are no held-out pairs to measure margins on")
    margins = margins_of(policies, reference, items, betas)
    print(as_table(margins))
    make_folder(args.out)
    draw(margins, args.svg or args.out / "margins.svg")


if __name__ == "__main__":
    main()
