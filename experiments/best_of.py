"""Best of N (D.1): sample N answers of the reference, keep the best.

    python -m experiments.best_of                              # N = 1, 4, 16, 64, 128
    python -m experiments.best_of --numbers 1,4 --judge implicit
    python -m experiments.best_of --task hh                    # judged by the implicit reward

The judge is the task's ground-truth reward if it has one, or with --judge implicit the implicit
reward beta (log pi - log pi_ref) of --checkpoint. The table shows the score by the judge, reward
and well_formed if the task has them, length, and

    kl_bound     log N - (N - 1) / N, which the KL of best of N to the reference never exceeds

Writes best_of.json, or best_of_implicit.json, to the folder of the run.
"""

import argparse
import math

import torch

from data import Encoded, decode_answer, encode_prompt
from runtime.cli import Parser, command, path_type, set_up
from runtime.errors import UserError
from runtime.files import make_folder, write_json
from runtime.report import table
from runtime.statistics import means
from sample import logps_of, sample_answers
from tasks import held_out_pairs, held_out_prompts, task_of
from tasks.checkpoint import open_with_reference
from tasks.flags import add_measuring_flags, add_task_flags, choose_task


def sample_and_measure(model, prompts, tokenizer, count, max_new_tokens, seed,
                       grades=None, judge=None, beta=1.0):
    """Sample `count` answers of a model to each of G prompts (texts) and measure them. Returns
    {measure: (G, count)}. grades: as for sample.evaluate. judge: a policy trained from this model;
    its implicit reward is beta (log judge - log model)."""
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    repeated = [ids for ids in encoded for _ in range(count)]
    answers = sample_answers(model, repeated, max_new_tokens, seed, tokenizer.eot_token,
                             progress=f"sampling {count} answers to each prompt")
    whole = [prompts[i // count] + decode_answer(answer, tokenizer)
             for i, answer in enumerate(answers)]
    columns = {}
    if judge:
        items = [Encoded(ids, answers[i * count:(i + 1) * count], [])
                 for i, ids in enumerate(encoded)]
        row_length = model.config.block_size
        pi_logps = torch.tensor(logps_of(judge, items, row_length, "judging"))
        ref_logps = torch.tensor(logps_of(model, items, row_length, "judging"))
        columns["implicit_reward"] = beta * (pi_logps - ref_logps)
    for measure, grade in (grades or {}).items():
        columns[measure] = torch.tensor(grade(whole), dtype=torch.float64)
    columns["length"] = torch.tensor([len(answer) for answer in answers])
    return {name: values.double().view(len(prompts), count) for name, values in columns.items()}


def best_of(columns, numbers, judge):
    """The mean of each measure over the best of N answers, for each N: {"N = ...": measures}.

    columns: {measure: (G, M)} of M answers to each of G prompts. judge: the measure that picks the
    best. Every subset of N of the M answers is an equally likely sample of N, so the estimate is
    the mean over all subsets (see shares_of_best): unbiased, and on the same answers for all N.
    """
    order = columns[judge].argsort(dim=1, stable=True)              # (G, M) worst first
    measures = {}
    for n in numbers:
        shares = shares_of_best(order.size(1), n)                   # (M,)
        measures[f"N = {n}"] = {"kl_bound": math.log(n) - (n - 1) / n} | means(
            {name: values.gather(1, order) @ shares for name, values in columns.items()})
    return measures


def shares_of_best(m, n):
    """(m,) the share of all subsets of n out of m answers, worst first, in which answer i is the
    best: the other n - 1 come from the i below it, so C(i, n - 1) / C(m, n), counted from 0."""
    return torch.tensor([math.comb(i, n - 1) / math.comb(m, n) for i in range(m)],
                        dtype=torch.float64)


def list_of_counts(text):
    """An argparse type: "1,4,16" to [1, 4, 16]."""
    try:
        counts = sorted({int(word) for word in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise argparse.ArgumentTypeError(f"expected whole numbers like 1,4,16, not {text!r}")
    return counts


def parse_args(argv):
    parser = Parser(__doc__)
    add_task_flags(parser)
    add_measuring_flags(parser)
    add = parser.add_argument
    add("--numbers", type=list_of_counts, default=[1, 4, 16, 64, 128], metavar="N,N,...",
        help="which N (default 1,4,16,64,128, the paper's)")
    add("--reference", type=path_type, help="what is sampled (default sft.pt of the run)")
    add("--judge", choices=["reward", "implicit"],
        help="what picks the best: the task's reward or the implicit reward of --checkpoint "
             "(default: reward if the task has one)")
    add("--checkpoint", type=path_type, help="--judge implicit: whose (default dpo.pt of the run)")
    parser.set_defaults(strict=False)       # rows that teach nothing are counted
    args = parser.parse_args(argv)
    choose_task(args)
    has_reward = task_of(args).has_reward
    if args.judge == "reward" and not has_reward:
        raise UserError("--judge reward: only reviews and imdb have one; use --judge implicit")
    args.judge = args.judge or ("reward" if has_reward else "implicit")
    if args.checkpoint and args.judge == "reward":
        raise UserError("--checkpoint is for --judge implicit, and has no effect without it")
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    device, task = set_up(args), task_of(args)
    reference = args.reference or args.out / "sft.pt"
    checkpoint = args.checkpoint or args.out / "dpo.pt"
    paths = [checkpoint] if args.judge == "implicit" else []
    policies, pi_ref, tokenizer, betas = open_with_reference(paths, reference, device, args)
    judge, by, measure = {}, "the task's reward", "reward"
    for name, policy in policies.items():                   # the one of --judge implicit
        judge = {"judge": policy, "beta": betas.get(name, 1.0)}
        by, measure = f"the implicit reward of {checkpoint}", "implicit_reward"
    row_length = pi_ref.config.block_size
    items = [] if task.has_reward else held_out_pairs(tokenizer, row_length, args)
    prompts = held_out_prompts(items, tokenizer, args)
    grades = task.grades(args, pi_ref, tokenizer)
    columns = sample_and_measure(pi_ref, prompts, tokenizer, max(args.numbers),
                                 args.max_new_tokens, args.seed + 1, grades, **judge)
    measures = best_of(columns, args.numbers, measure)
    print(f"\n{len(prompts):,} held-out prompts, the best of N answers of {reference} by {by}\n"
          f"{table(measures)}")
    make_folder(args.out)
    path = args.out / ("best_of.json" if args.judge == "reward" else "best_of_implicit.json")
    write_json(path, {
        "task": args.task or args.data.name, "seed": args.seed, "reference": str(reference),
        "prompts": len(prompts), "judge": args.judge, "best_of": measures})
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
