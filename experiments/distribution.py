"""How the rewards of sampled answers are distributed, before and after DPO, as a picture.

    python -m experiments.distribution                       # the reviews task
    python -m experiments.distribution --task imdb-small     # labeller and judge

A mean reward can rise because all answers become a little better or because more of them are good.
This picture shows which: a histogram of the reward of the answers of sft.pt and of dpo.pt to the
same held-out prompts. For imdb it has a second panel with the judge, which ranked no answers. Where
the labeller is certain and the judge is not, the policy has learned to please the labeller.

Writes distribution.svg to the folder of the run. Needs matplotlib.
"""

from pathlib import Path

import torch

from data import decode_answer, encode_prompt
from experiments.plot import BLUE, ORANGE, pyplot, save
from runtime.cli import Parser, command, only_one_process, set_up
from runtime.errors import UserError
from sample import sample_answers
from tasks import held_out_prompts, task_of
from tasks.checkpoint import open_with_reference
from tasks.flags import add_measuring_flags, add_task_flags, choose_task

LABELS = {"reward": "reward", "judge": "probability of a favourable text, by the judge"}
N_BINS = 20


def graded_answers(policies, prompts, grades, tokenizer, args):
    """{measure: {policy: grades, one per prompt}} of one sampled answer to each prompt (a text)."""
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    found = {measure: {} for measure in grades}
    for name, model in policies.items():
        answers = sample_answers(model, encoded, args.max_new_tokens, args.seed + 1,
                                 tokenizer.eot_token, progress=f"sampling {name}")
        texts = [prompt + decode_answer(answer, tokenizer)
                 for prompt, answer in zip(prompts, answers)]
        for measure, grade in grades.items():
            found[measure][name] = grade(texts)
    return found


def histograms(values, n_bins=N_BINS):
    """(edges, {policy: shares}) of {policy: numbers}, in n_bins bins of equal width that all
    policies share."""
    every = [value for numbers in values.values() for value in numbers]
    low, high = min(every), max(every)
    edges = torch.linspace(low, high if high > low else low + 1, n_bins + 1)
    shares = {}
    for name, numbers in values.items():
        counts = torch.histc(torch.tensor(numbers), n_bins, edges[0].item(), edges[-1].item())
        shares[name] = (counts / len(numbers)).tolist()
    return edges.tolist(), shares


def draw(found, path):
    """Draw {measure: {policy: numbers}}, a panel for each measure, as an SVG file."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(found), figsize=(5.5 * len(found), 3.6), squeeze=False)
    for ax, (measure, values) in zip(panels[0], found.items()):
        edges, shares = histograms(values)
        for (name, heights), colour, line in zip(shares.items(), (BLUE, ORANGE), ("--", "-")):
            mean = sum(values[name]) / len(values[name])
            ax.stairs(heights, edges, color=colour, linestyle=line, linewidth=1.8,
                      label=f"{name}, mean {mean:.2f}")
        ax.set_xlabel(LABELS[measure])
        ax.legend(loc="upper center")
    panels[0][0].set_ylabel("share of answers")
    figure.tight_layout()
    save(figure, path)


def parse_args(argv):
    parser = Parser(__doc__)
    add_task_flags(parser)
    add_measuring_flags(parser)
    parser.add_argument("--policies", nargs=2, type=Path, metavar="FILE",
                        help="two checkpoints (default sft.pt and dpo.pt of the run)")
    parser.set_defaults(strict=False)       # rows that teach nothing are counted
    args = parser.parse_args(argv)
    choose_task(args)
    if not task_of(args).has_reward:
        raise UserError(f"{args.task or args.data}: only reviews and imdb have a reward")
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    only_one_process("the distribution")
    device = set_up(args)
    sft = args.out / "sft.pt"
    paths = args.policies or [sft, args.out / "dpo.pt"]
    policies, reference, tokenizer, _ = open_with_reference(paths, sft, device, args)
    if len(policies) < 2:
        raise UserError("--policies needs two different checkpoints")
    prompts = held_out_prompts([], tokenizer, args)
    grades = task_of(args).grades(args, reference, tokenizer)
    shown = {measure: grade for measure, grade in grades.items() if measure in LABELS}
    draw(graded_answers(policies, prompts, shown, tokenizer, args), args.out / "distribution.svg")


if __name__ == "__main__":
    main()
