"""How rewards or margins are distributed over held-out data, not only their mean: a picture.

    python -m experiments.distribution                          # rewards of answers, SFT and DPO
    python -m experiments.distribution --example 2              # with an answer of each
    python -m experiments.distribution --task imdb-small --of reward judge
    python -m experiments.distribution --of margin              # margins of held-out pairs, DPO
    python -m experiments.distribution --checkpoint out/a/dpo.pt --checkpoint out/b/dpo.pt

A mean reward can rise because all answers become a little better, or because fewer of them are bad.
The same mean margin can be that of many pairs that are a little ahead, or of a few that are far
ahead while others are ranked wrongly. The picture has a histogram for each policy, above one
another on the same axis, and --of says of what:

    reward, judge, well_formed    a grade of one sampled answer to each held-out prompt; for imdb,
                                  the judge ranked no answers: where the reward is high and the
                                  judge's grade is not, the policy has learned to please the reward
    margin                        of each held-out pair, the difference of its implicit rewards,
                                  beta log(pi / pi_ref) of the chosen answer minus the rejected one

To see margins over training, train with several --steps: the learning rate of DPO does not decay,
so a run of at least twice as many steps as --warmup is the beginning of every longer one.
"""

import textwrap

import torch

from data import decode_answer, encode_prompt
from experiments.plot import BLUE, GOLD, GREEN, GREY, PURPLE, pyplot, save
from runtime.cli import Parser, command, number_type, only_one_process, path_type, set_up
from runtime.errors import UserError
from runtime.files import make_folder
from sample import log_ratios_of_pairs, sample_answers
from tasks import held_out_pairs, held_out_prompts, task_of
from tasks.checkpoint import open_with_reference
from tasks.flags import add_measuring_flags, add_task_flags, choose_task

AXIS_LABELS = {"reward": "reward: how favourable the text is",
          "judge": "the same, according to the judge",
          "well_formed": "1 if the text follows the grammar, else 0",
          "margin": "margin of a held-out pair, β × nats"}
TITLES = {"sft": "SFT, before DPO", "dpo": "after DPO"}         # others keep their names
COLOURS = [BLUE, GREEN, PURPLE, GOLD]                           # SFT is grey
QUANTILES = [0.05, 0.25, 0.5, 0.75, 0.95]


# ------------------------------------------------------------------------------------------------
# The numbers. columns: {what: {policy: (N,) float64}}
# ------------------------------------------------------------------------------------------------


def graded_answers(policies, reference, tokenizer, args):
    """(columns, example) of --of and --example; see draw_distributions. The seeds are those of the
    table that train_dpo.py ends with, so sft.pt and dpo.pt write the answers that it is about."""
    prompts = held_out_prompts([], tokenizer, args)
    grades = task_of(args).grades(args, reference, tokenizer)
    if not set(args.of) <= set(grades):
        raise UserError(f"--of {' '.join(args.of)}: the grades of this task are "
                        f"{', '.join(grades)}")
    if args.example and args.example > len(prompts):
        raise UserError(f"--example {args.example}: there are {len(prompts)} prompts")
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    columns, example = {what: {} for what in args.of}, {}
    for i, (name, model) in enumerate(policies.items()):
        seed = args.seed + (2 if i == 0 else 1)
        answers = [decode_answer(ids, tokenizer) for ids in sample_answers(
            model, encoded, args.max_new_tokens, seed, tokenizer.eot_token,
            progress=f"sampling {name}")]
        texts = [prompt + answer for prompt, answer in zip(prompts, answers)]
        for what in args.of:
            columns[what][name] = torch.tensor(grades[what](texts), dtype=torch.float64)
        if args.example:
            n = args.example - 1
            example[name] = prompts[n], answers[n], columns[args.of[0]][name][n].item()
    return columns, example


def held_out_margins(policies, reference, betas, tokenizer, args):
    """{policy: (P,) margins of all held-out pairs}. policies, betas: by name. Raises UserError."""
    for name in policies:
        if name not in betas:
            raise UserError(f"{name} was not trained by train_dpo.py, so it has no beta")
    items = held_out_pairs(tokenizer, reference.config.block_size, args)
    if not items:
        raise UserError("there are no held-out pairs to measure margins on")
    ref_logratios = log_ratios_of_pairs(reference, items, "reference")
    return {name: betas[name] * (log_ratios_of_pairs(policy, items, name) - ref_logratios)
            for name, policy in policies.items()}


def quantile_table(columns):
    """Mean and quantiles of every histogram, and the share below 0, as text."""
    headings = ["mean", *(f"{q:.0%}" for q in QUANTILES), "< 0"]
    rows = {}
    for what, policies in columns.items():
        for name, values in policies.items():
            quantiles = values.quantile(torch.tensor(QUANTILES, dtype=values.dtype)).tolist()
            numbers = "".join(f"{number:8.2f}" for number in [values.mean().item(), *quantiles])
            below = (values < 0).double().mean().item()
            rows[f"{what}, {name}"] = f"{numbers}{below:8.1%}"
    width = max(map(len, rows))
    head = " " * width + "".join(f"{heading:>8}" for heading in headings)
    return "\n".join([head, *(f"{name:{width}}{row}" for name, row in rows.items())])


# ------------------------------------------------------------------------------------------------
# The picture
# ------------------------------------------------------------------------------------------------


def bins_of(what, policies):
    """(edges of the bins that all policies share, the number of bins below the middle). Grades have
    a range, and their middle is its middle. Margins have none: their axis ends where 1 % of all are
    beyond it, at either end, and their middle is 0."""
    together = torch.cat(list(policies.values()))
    if what == "margin":
        low, high = together.quantile(torch.tensor([0.01, 0.99], dtype=together.dtype)).tolist()
        low, high = min(low, 0.0), max(high, 0.0)
        width = max(high - low, 1e-6) / 40
        first, last = int(low / width) - 1, int(high / width) + 1
        return [width * i for i in range(first, last + 1)], -first
    low = -1.0 if together.min() < 0 else 0.0
    return [low + (1 - low) * i / 20 for i in range(21)], 10


def draw_distributions(columns, example, path):
    """Draw a column of histograms for each key of `columns`, as an SVG file. example: {policy:
    (prompt, answer, reward)}, shown on the right, or empty."""
    plt = pyplot()
    policies = list(next(iter(columns.values())))
    widths = [1] * len(columns) + [0.9] * bool(example)
    figure, rows = plt.subplots(len(policies), len(widths), sharex="col", sharey=True,
                                squeeze=False, width_ratios=widths,
                                figsize=(max(8, 4.9 * sum(widths)), 1.8 * len(policies) + 0.6))
    colours = iter(COLOURS * len(policies))
    for row, name in zip(rows, policies):
        colour = GREY if name == "sft" else next(colours)
        for ax, (what, values) in zip(row, columns.items()):
            draw_histogram(ax, values, name, colour, *bins_of(what, values))
        row[0].set_ylabel("% of pairs" if "margin" in columns else "% of answers")
        if example:
            draw_example(row[-1], *example[name], colour)
    for ax, what in zip(rows[-1], columns):
        ax.set_xlabel(AXIS_LABELS[what])
        ax.locator_params("x", nbins=5)
    figure.tight_layout()
    save(figure, path)


def draw_histogram(ax, values, name, colour, edges, below):
    """The histogram of one policy, pale in its first `below` bins, and the outline of the first
    policy's. What lies beyond the axis is not drawn but counted. values: {policy: (N,)}."""
    heights = {}
    for policy, numbers in values.items():
        counts, _ = numbers.histogram(torch.tensor(edges, dtype=numbers.dtype))
        heights[policy] = (100 * counts / len(numbers)).tolist()
    ax.stairs(heights[name][:below], edges[:below + 1], fill=True, color=colour, alpha=0.35)
    ax.stairs(heights[name][below:], edges[below:], fill=True, color=colour, alpha=0.9)
    first, own = next(iter(values)), values[name]
    if name != first:
        ax.stairs(heights[first], edges, color=GREY, linestyle=(0, (2, 2)))
    share = 100 * (own > edges[below]).double().mean().item()
    ax.set_title(TITLES.get(name, name), loc="left", color=colour, weight="bold")
    ax.set_title(f"mean {two_digits(own.mean().item())}, {share:.0f} % above {edges[below]:g}",
                 loc="right", color=colour, fontsize=11)
    ax.set_xlim(edges[0], edges[-1])
    for beyond, x, form in ((own < edges[0], 0, "◂ {:.1f} %"), (own > edges[-1], 1, "{:.1f} % ▸")):
        if beyond.any():
            ax.text(x, 0.9, form.format(100 * beyond.double().mean().item()), fontsize=9,
                    transform=ax.transAxes, ha=("left", "right")[x])


def draw_example(ax, prompt, answer, reward, colour):
    """A prompt and an answer to it, as text."""
    ax.axis("off")
    asked = textwrap.fill(f"{prompt} ...", 44, max_lines=2, placeholder=" ...")
    told = textwrap.fill(f"... {answer.strip()}", 36, max_lines=3, placeholder=" ...")
    ax.text(0.06, 0.62, asked, va="bottom", transform=ax.transAxes, style="italic", fontsize=10)
    ax.text(0.06, 0.52, told, va="top", transform=ax.transAxes, color=colour, weight="bold")
    ax.text(0.06, 0.05, f"reward {two_digits(reward)}", transform=ax.transAxes, color=colour)


def two_digits(number):
    return f"{number:.2f}".replace("-", "−")


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = Parser(__doc__)
    add_task_flags(parser)
    add_measuring_flags(parser)
    add = parser.add_argument
    add("--of", nargs="+", choices=AXIS_LABELS, default=["reward"], metavar="WHAT",
        help="reward, judge, well_formed, or several of them; or margin (default reward)")
    add("--checkpoint", type=path_type, action="append", metavar="FILE",
        help="a policy; may be given several times (default sft.pt and dpo.pt of the run; for "
             "margins, which sft.pt has none of, dpo.pt)")
    add("--reference", type=path_type, help="default: sft.pt of the run")
    add("--example", type=number_type(int, 1), metavar="N",
        help="also show the answers to one prompt: 1 is the first one that train_dpo.py prints")
    add("--svg", type=path_type, metavar="FILE",
        help="the picture (default: reward.svg or margin.svg of the run, and so on)")
    parser.set_defaults(strict=False)       # rows that teach nothing are counted
    args = parser.parse_args(argv)
    choose_task(args)
    if "margin" in args.of and (len(args.of) > 1 or args.example):
        raise UserError("--of margin is about pairs, not sampled answers: it stands alone")
    if "margin" not in args.of and not task_of(args).has_reward:
        raise UserError(f"{args.task or args.data}: only reviews and imdb have a reward; "
                        "try --of margin")
    if args.svg and args.svg.suffix != ".svg":
        raise UserError(f"--svg {args.svg}: expected a name that ends in .svg")
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    only_one_process("drawing")
    device = set_up(args)
    sft, dpo = args.out / "sft.pt", args.out / "dpo.pt"
    paths = args.checkpoint or ([dpo] if "margin" in args.of else [sft, dpo])
    policies, reference, tokenizer, betas = open_with_reference(
        paths, args.reference or sft, device, args)
    example = {}
    if "margin" in args.of:
        columns = {"margin": held_out_margins(policies, reference, betas, tokenizer, args)}
    else:
        columns, example = graded_answers(policies, reference, tokenizer, args)
    print(quantile_table(columns))
    path = args.svg or args.out / f"{'-'.join(args.of)}.svg"
    make_folder(path.parent)
    draw_distributions(columns, example, path)


if __name__ == "__main__":
    main()
