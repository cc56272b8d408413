"""How well log(pi / pi_ref) ranks answers: those of the reference, and those of the policy itself.

    python -m experiments.probe                                    # dpo.pt of the run
    python -m experiments.probe --checkpoint out/reviews/dpo.pt --checkpoint out/reviews/ppo.pt
    python -m experiments.probe --reward learned                   # a task without its own reward

The implicit reward of a policy is beta log(pi / pi_ref). For the optimal policy (Eq. 15), it is the
reward, up to a term that all answers to a prompt share, wherever the answers come from. DPO fits it
on answers of the reference. This script measures, for --samples answers to each prompt,

    on_reference   the correlation of log(pi / pi_ref) with the reward among answers that the
                   reference wrote to one prompt: the mean over prompts
    on_own         the same among answers that the policy wrote
    effective      the effective sample size, as a share, of the reference's answers weighted by
                   pi / pi_ref, (sum w)^2 / (n sum w^2): near 1 if they say what the policy writes,
                   near 0 if a few of them have all the weight. The estimate itself is unreliable,
                   and too large, when it is small

A prompt whose answers all have the same reward, or all the same log-ratio, has no correlation and
is left out. Writes probe.json to the folder of the run and, with --svg, a picture of the
correlations. docs/online.md shows what they explain.
"""


import torch

from data import Encoded, encode_prompt
from experiments.plot import BLUE, GREY, ORANGE, pyplot, save
from experiments.ppo import add_reward_flags, check_reward, reward_function
from runtime.cli import Parser, command, number_type, path_type, set_up
from runtime.errors import UserError
from runtime.files import make_folder, write_json
from runtime.report import table
from runtime.statistics import means
from sample import logps_of, sample_answers
from tasks import held_out_pairs, held_out_prompts
from tasks.checkpoint import open_with_reference
from tasks.flags import add_measuring_flags, add_task_flags, choose_task


def correlations(log_ratios, rewards):
    """Pearson's correlation of two numbers of the M answers to each of P prompts, for the prompts
    that have one. log_ratios, rewards: (P, M). Returns a tensor of at most P."""
    x = log_ratios - log_ratios.mean(1, keepdim=True)               # (P, M)
    y = rewards - rewards.mean(1, keepdim=True)
    norms = x.norm(dim=1) * y.norm(dim=1)
    return ((x * y).sum(1) / norms)[norms > 1e-9]


def effective_share(log_ratios):
    """(sum w)^2 / (n sum w^2) of n weights w = exp(log_ratios), a tensor of any shape."""
    doubled = (2 * log_ratios).flatten().logsumexp(0)
    return (2 * log_ratios.flatten().logsumexp(0) - doubled).exp().item() / log_ratios.numel()


def sampled_from(model, prompts, eot, seed, args):
    """--samples answers of a model to each of a list of prompts (ids): a list of Encoded, one
    answer each."""
    repeated = [prompt for prompt in prompts for _ in range(args.samples)]
    answers = sample_answers(model, repeated, args.max_new_tokens, seed, eot)
    return [Encoded(prompt, [answer], []) for prompt, answer in zip(repeated, answers)]


def log_ratios_of(policy, reference, items, n):
    """(P, n) log(pi / pi_ref) of answers as sampled_from returns them."""
    pi, ref = (torch.tensor(logps_of(model, items, model.config.block_size), dtype=torch.float64)
               for model in (policy, reference))
    return (pi - ref).view(-1, n)


def probe(policies, reference, prompts, score_answers, eot, args):
    """{name: measures} of policies ({name: model}) on prompts (ids); see the top of this file.
    score_answers: maps a list of Encoded with one answer each to their rewards."""
    def rewards_of(items):
        return torch.tensor(score_answers(items), dtype=torch.float64).view(-1, args.samples)
    of_reference = sampled_from(reference, prompts, eot, args.seed + 1, args)
    rewards = rewards_of(of_reference)
    measures = {}
    for name, policy in policies.items():
        own = sampled_from(policy, prompts, eot, args.seed + 2, args)
        log_ratios = log_ratios_of(policy, reference, of_reference, args.samples)
        on_own = correlations(log_ratios_of(policy, reference, own, args.samples), rewards_of(own))
        found = {"on_reference": correlations(log_ratios, rewards), "on_own": on_own}
        for where, values in found.items():
            if len(values) < 2:
                raise UserError(f"{name}, {where}: fewer than two prompts have a correlation; use "
                                "more --samples or more --eval-prompts")
        measures[name] = {**means(found), "effective": effective_share(log_ratios)}
    return measures


def draw_probe(measures, path):
    """Draw the two correlations of each policy as a pair of bars with standard errors, as an SVG
    file. measures: as probe returns them."""
    figure, ax = pyplot().subplots(figsize=(1.6 + 1.5 * len(measures), 3.4))
    for shift, where, colour, hatch, words in [
            (-0.2, "on_reference", BLUE, "", "answers of the reference"),
            (0.2, "on_own", ORANGE, "//", "answers of the policy itself")]:
        values = [found[where] for found in measures.values()]
        errors = [found[f"{where}_se"] for found in measures.values()]
        places = [i + shift for i in range(len(values))]
        ax.bar(places, values, 0.38, yerr=errors, color="none" if hatch else colour, hatch=hatch,
               edgecolor=colour, ecolor=GREY, label=words)
        for place, value, error in zip(places, values, errors):
            ax.text(place, max(value, 0) + error + 0.02, f"{value:.2f}", ha="center", fontsize=9)
    ax.set_xticks(range(len(measures)), measures)
    ax.set_ylabel("correlation of\nlog(π / π_ref) with the reward")
    ax.set_ylim(min(0, *ax.get_ylim()), 1.2)
    ax.legend(loc="upper left", ncols=2, fontsize=9)
    figure.tight_layout()
    save(figure, path)


@command
def main(argv=None):
    args = parse_args(argv)
    device = set_up(args)
    policies, reference, tokenizer, _ = open_with_reference(
        args.checkpoint or [args.out / "dpo.pt"], args.reference or args.out / "sft.pt", device,
        args)
    score_answers, _ = reward_function(tokenizer, tokenizer.name, device, args)
    items = held_out_pairs(tokenizer, reference.config.block_size, args)
    texts = held_out_prompts(items, tokenizer, args)
    prompts = [encode_prompt(text, tokenizer) for text in texts]
    measures = probe(policies, reference, prompts, score_answers, tokenizer.eot_token, args)
    print(f"{len(prompts):,} held-out prompts, {args.samples} answers each, {args.reward} reward"
          f"\n{table(measures)}")
    make_folder(args.out)
    write_json(args.out / "probe.json", {"prompts": len(prompts), "samples": args.samples,
                                         "reward": args.reward, "policies": measures})
    print(f"\nwrote {args.out / 'probe.json'}")
    if args.svg:
        draw_probe(measures, args.svg)


def parse_args(argv):
    parser = Parser(__doc__)
    add_task_flags(parser)
    add = parser.group("the run")
    add("--checkpoint", type=path_type, action="append", metavar="FILE",
        help="a policy; may be given several times (default dpo.pt of the run)")
    add("--reference", type=path_type, help="default: sft.pt of the run")
    add("--svg", type=path_type, metavar="FILE", help="draw the correlations")
    add_reward_flags(parser)
    add_measuring_flags(parser)
    parser.group("sampling and measuring")(
        "--samples", type=number_type(int, 2), default=16,
        help="answers to each prompt (default 16)")
    parser.set_defaults(reward="ground_truth", eval_prompts=200, strict=False)
    args = parser.parse_args(argv)
    choose_task(args)
    check_reward(args)
    return args


if __name__ == "__main__":
    main()
