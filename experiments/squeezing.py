"""What one step of DPO does to the probability of every answer: a small and exact picture.

    python -m experiments.squeezing                     # writes out/squeezing.svg
    python -m experiments.squeezing --lr 1

A policy is here one softmax over twelve answers, with a logit for each, and it starts at the
reference. A step of gradient descent on the DPO loss changes the logits by

    + d for the chosen answer, - d for the rejected one     d = lr beta sigma(rhat_l - rhat_w),
                                                            which is lr beta / 2 at the reference

and no others. Later in an answer, the chosen and the rejected one no longer share a softmax: each
of their tokens follows a text of its own. There, the rejected token moves the logits alone:

    - d (1 - pi_l) for it, + d pi_i for every other token i

docs/squeezing.md says what follows. The picture shows how the probability of each answer changes in
both cases, from a flat and from a peaked reference, in which each answer is half as likely as the
one before.
Left out on purpose: a model, whose parameters act on all logits at once.
"""

from pathlib import Path

import torch

from experiments.plot import BLUE, GREEN, GREY, ORANGE, pyplot, save
from runtime.cli import Parser, command, number_type, only_one_process, path_type
from runtime.errors import UserError
from runtime.files import make_folder
from train_dpo import dpo_loss

N = 12
REJECTED, CHOSEN = 2, 8             # indices of answers, of which the likeliest is the first
REFERENCES = {"flat": torch.zeros(N, dtype=torch.float64).log_softmax(0),
              "peaked": (0.5 ** torch.arange(N, dtype=torch.float64)).log().log_softmax(0)}
PLACES = {"chosen and rejected in one softmax": CHOSEN, "the rejected alone": None}


def dpo_step(ref_logps, chosen, rejected, beta, lr):
    """The log-probs of all answers after one step of gradient descent from the reference.

    ref_logps: (N,) those before it. chosen, rejected: indices of the pair. If chosen is None, it is
    not among these answers, so that its log-prob does not depend on their logits. Returns (N,).
    """
    logits = ref_logps.clone().requires_grad_()
    elsewhere = logits.new_zeros(1)                             # log-prob of such an answer
    logps = torch.cat([logits.log_softmax(0), elsewhere])
    before = torch.cat([ref_logps, elsewhere])
    chosen = len(logits) if chosen is None else chosen
    losses, _ = dpo_loss(logps, before, torch.tensor([chosen]), torch.tensor([rejected]), beta)
    losses.sum().backward()
    return (logits - lr * logits.grad).detach().log_softmax(0)


def name_of(i, chosen, reference):
    """What answer i is called, and its colour."""
    if i == chosen:
        return "chosen", BLUE
    if i == REJECTED:
        return "rejected", ORANGE
    if i == 0 and reference == "peaked":
        return "likeliest", GREEN
    return "", GREY


def draw_squeezing(beta, lr, path):
    """Draw the panels as an SVG file."""
    plt = pyplot()
    figure, panels = plt.subplots(2, 2, figsize=(9.5, 6.2), sharey="row")
    for row, (reference, before) in zip(panels, REFERENCES.items()):
        for ax, (place, chosen) in zip(row, PLACES.items()):
            after = dpo_step(before, chosen, REJECTED, beta, lr)
            draw_changes(ax, before, after, chosen, reference)
            ax.set_title(f"{reference} reference, {place}", fontsize=11)
        row[0].set_ylabel("change, points of percent")
    for ax in panels[1]:
        ax.set_xlabel("answers, by their probability before the step, %")
    figure.tight_layout()
    save(figure, path)


def draw_changes(ax, before, after, chosen, reference):
    """A bar for each answer: the change of its probability, in points of percent."""
    changes = 100 * (after.exp() - before.exp())
    for i, change in enumerate(changes.tolist()):
        name, colour = name_of(i, chosen, reference)
        ax.bar(i, change, color=colour, width=0.7)
        up = change > 0
        number = f"{change:+.1f}" if abs(change) >= 0.05 else f"{change:+.1f}"[0]   # or its sign
        label = f"{name}\n{number}" if up else f"{number}\n{name}"
        ax.annotate(label.strip(), (i, change), color=colour, fontsize=8, ha="center",
                    va="bottom" if up else "top", xytext=(0, 2 if up else -2),
                    textcoords="offset points")
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.margins(y=0.2)
    ax.grid(visible=False, axis="x")
    percents = (100 * before.exp()).tolist()
    ax.set_xticks(range(N), [f"{p:.1f}" if p > 1 else f"{p:.1g}" for p in percents], fontsize=8)


def steps_as_text(beta, lr):
    """The same numbers as text: probabilities before and after the step, in percent."""
    lines = []
    for reference, before in REFERENCES.items():
        for place, chosen in PLACES.items():
            after = dpo_step(before, chosen, REJECTED, beta, lr)
            lines.append(f"\n{reference} reference, {place}")
            percents = zip((100 * before.exp()).tolist(), (100 * after.exp()).tolist())
            for i, (p, q) in enumerate(percents):
                name, _ = name_of(i, chosen, reference)
                lines.append(f"  {name:<10}{p:7.3f} -> {q:7.3f} %   {q - p:+.3f}")
    return "\n".join(lines)


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--beta", type=number_type(float, 0, above=True), default=0.5, help="default 0.5")
    add("--lr", type=number_type(float, 0, above=True), default=4.0,
        help="of the logits, so larger than that of weights (default 4, which makes d = 1)")
    add("--out", type=path_type, default=Path("out/squeezing.svg"),
        help="where to write the picture (default out/squeezing.svg)")
    args = parser.parse_args(argv)
    if args.out.suffix != ".svg":
        raise UserError(f"--out {args.out}: expected a name that ends in .svg")
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    only_one_process("drawing")
    print(steps_as_text(args.beta, args.lr) + "\n")
    make_folder(args.out.parent)
    draw_squeezing(args.beta, args.lr, args.out)


if __name__ == "__main__":
    main()
