"""Talk to a checkpoint, compare two, and measure what training did.

    python sample.py                                   # type a prompt, read what the policy writes
    python sample.py --prompt "The acting was" -n 5    # five answers
    python sample.py --compare                         # SFT and DPO side by side, same seed
    python sample.py --evaluate                        # SFT and DPO, or any checkpoints, measured
    python sample.py --best-of 1,4,16,64,128           # D.1: the best of N answers of SFT
    python sample.py --task hh --export folder         # the policy, for transformers to open

`evaluate` is also the end of train_dpo.py: for each policy, on held-out prompts and sampled at
temperature 1,

    reward       mean ground-truth reward of prompt + answer, where the task has one
    kl           mean of log pi(y|x) - log pi_ref(y|x) over answers y ~ pi: an unbiased estimate
                 of KL(pi || pi_ref) in nats, taken on the very ids that were sampled
    win_rate     share of prompts on which its answer has the higher reward beside that of the
                 baseline; ties half; with Wilson's 95 % interval
    well_formed  share of texts that the task's grammar accepts
    length       mean tokens of an answer, end-of-text included

--evaluate adds

    distinct_n   n-grams that differ, as a share of all n-grams of all answers: low where a policy
                 repeats itself; it also falls with more prompts, so compare equal numbers of them
    accuracy     share of held-out pairs whose chosen answer has the higher implicit reward
                 beta (log pi - log pi_ref); ties half
    logp_accuracy    the same without the reference: the higher log pi; often what is shown as
                 "accuracy", and another thing: the reference has one of its own
    margin       mean implicit reward of chosen minus rejected held-out answers

and --best-of, for the best of N answers of the reference by a judge's score, reward, well_formed,
length, and beside them

    kl_bound     log N - (N - 1) / N, which the KL of best of N to the reference never exceeds

Left out on purpose: beam search. DPO trains a distribution, so we look at samples of it.
"""

import argparse
import itertools
import math
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (Encoded, as_prompt, encode_all, load_comparisons, prefixes, reward,
                  well_formed)
from model import UserError, gathered, rank, world_size, write_json
from train_sft import (Parser, add_shared_flags, command, in_batches, load, load_training,
                       make_folder, number, open_checkpoint, settle, settle_task)

Z_95 = 1.959964     # 95 % of a normal distribution lie within so many standard deviations


def sample(model, prompts, max_new_tokens, seed, eot, temperature=1.0, top_k=None, top_p=None,
           progress="sampling"):
    """One answer (a list of ids) to each of a list of prompts (lists of ids): as many at a time as
    make 2**16 tokens at most, prompts of like length together. Each such batch has a generator of
    its own, so the answers are the same whichever process of how many draws them."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    longest = min(len(prompts[order[-1]]) + max_new_tokens, model.config.block_size)
    size = max(1, 2**16 // longest)
    batches = [order[start:start + size] for start in range(0, len(order), size)]
    drawn, mine = [], range(rank(), len(batches), world_size())
    with tqdm(total=sum(len(batches[k]) for k in mine), desc=progress, delay=1) as bar:
        for k in mine:
            seed_of_k = np.random.SeedSequence([seed, k]).generate_state(1, np.uint64)
            generator = torch.Generator(model.device).manual_seed(int(seed_of_k[0]))
            drawn.append(model.generate([prompts[i] for i in batches[k]], max_new_tokens,
                                        temperature, top_k, top_p, eot, generator))
            bar.update(len(batches[k]))
    answers = [None] * len(prompts)
    for part, ids in zip(batches, gathered(drawn)):
        for i, answer in zip(part, ids):
            answers[i] = answer
    return answers


@torch.no_grad()
def score(model, items, row_length, progress="scoring"):
    """log pi(y|x) of every answer: a list of floats for each of a list of Encoded."""
    logps = []
    size = min(32, max(1, 128 // max((len(item.answers) for item in items), default=1)))
    with tqdm(total=sum(len(item.answers) for item in items), desc=progress, delay=1) as bar:
        for batch in in_batches(items, row_length, model, size):
            logps.append(model.logps(batch).tolist())
            bar.update(batch.n_answers * world_size())
    flat = itertools.chain.from_iterable(gathered(logps))
    return [[next(flat) for _ in item.answers] for item in items]


def wilson(wins, n):
    """(low, high): Wilson's 95 % interval of a share, given wins (ties count as half) out of n.

    The rates p whose own standard error reaches the observed share:
    |wins / n - p| <= z sqrt(p (1 - p) / n). Unlike share +- 2 standard errors it stays within 0 and
    1, and says something where all were won.
    """
    share, z2 = wins / n, Z_95**2 / n
    half = math.sqrt(share * (1 - share) * z2 + z2**2 / 4)
    return (max(0.0, (share + z2 / 2 - half) / (1 + z2)),
            min(1.0, (share + z2 / 2 + half) / (1 + z2)))


def evaluate(policies, reference, prompts, tokenizer, max_new_tokens, seed,
             reward=None, well_formed=None, baseline=None):
    """Measure policies ({name: model}) on prompts (texts); see the top of this file.

    reward, well_formed: functions of a text, for tasks that have them. baseline: the policy that
    win_rate is against, by name; the first if not given. Returns ({name: {measure: mean,
    measure_se: standard error, win_rate_95: (low, high)}}, {name: texts}).
    """
    eot, row_length = tokenizer.eot_token, reference.config.block_size
    encoded = [[eot] + tokenizer.encode_ordinary(prompt) for prompt in prompts]
    texts, columns = {}, {}
    for name, model in policies.items():
        answers = sample(model, encoded, max_new_tokens, seed, eot, progress=f"sampling {name}")
        items = [Encoded(prompt, [answer], []) for prompt, answer in zip(encoded, answers)]
        pi, ref = (torch.zeros(len(items)) if model is reference else
                   torch.tensor(score(m, items, row_length, f"scoring {name}")).flatten()
                   for m in (model, reference))
        texts[name] = [tokenizer.decode([i for i in answer if i != eot]) for answer in answers]
        whole = [prompt + text for prompt, text in zip(prompts, texts[name])]
        columns[name] = {"reward": reward and torch.tensor(
                             [reward(text) for text in whole], dtype=torch.float64),
                         "kl": pi.double() - ref.double(), "win_rate": None,
                         "well_formed": well_formed and torch.tensor(
                             [float(well_formed(text)) for text in whole]),
                         "length": torch.tensor([float(len(answer)) for answer in answers])}
    baseline, measures = baseline or next(iter(policies)), {}
    for name, column in columns.items():
        if reward:
            ahead = column["reward"] - columns[baseline]["reward"]
            column["win_rate"] = (ahead.sign() + 1) / 2
        measures[name] = means(column)
        if reward and name != baseline:
            measures[name]["win_rate_95"] = wilson(column["win_rate"].sum().item(), len(prompts))
    return measures, texts


def means(columns):
    """{name: values, a number for each prompt, or None} to {name: mean, name_se: its standard
    error}, without the Nones."""
    found = {}
    for name, values in columns.items():
        if values is not None:
            found[name] = values.double().mean().item()
            found[f"{name}_se"] = (values.double().std() / len(values) ** 0.5).item()
    return found


def distinct(texts, tokenizer, n):
    """Distinct-n: n-grams of tokens that differ, over all there are; 0 where there are none."""
    grams = [tuple(ids[i:i + n]) for ids in map(tokenizer.encode_ordinary, texts)
             for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def rate_pairs(policies, reference, items, betas):
    """What policies ({name: model}) think of preferences (a list of Encoded with pairs): {name:
    measures}; accuracy, logp_accuracy and margin as at the top of this file, each over all pairs.

    betas: {name: beta}; a policy that was trained without one has no margin. Pairs of one prompt
    share answers, so the standard errors are those of whole prompts drawn anew.
    """
    row_length, measures = reference.config.block_size, {}
    ref = score(reference, items, row_length, "scoring pairs, reference")
    group = torch.tensor([g for g, item in enumerate(items) for _ in item.pairs])

    def differences(logps):         # (P,) of winner minus loser
        return torch.tensor([row[w] - row[l] for row, item in zip(logps, items)
                             for w, l in item.pairs], dtype=torch.float64)
    for name, model in policies.items():
        pi = ref if model is reference else score(model, items, row_length,
                                                  f"scoring pairs, {name}")
        of_pi, of_ref = differences(pi), differences(ref)
        columns = {"accuracy": ((of_pi - of_ref).sign() + 1) / 2,
                   "logp_accuracy": (of_pi.sign() + 1) / 2}
        if name in betas:
            columns["margin"] = betas[name] * (of_pi - of_ref)
        measures[name] = {}
        for measure, values in columns.items():
            off = torch.zeros(len(items), dtype=torch.float64)
            off.index_add_(0, group, values - values.mean())        # (G,) sums over each prompt
            measures[name] |= {measure: values.mean().item(),
                               f"{measure}_se": off.norm().item() / len(values)}
    return measures


def draw_answers(model, prompts, tokenizer, count, max_new_tokens, seed,
                 reward=None, well_formed=None, judge=None, beta=1.0):
    """`count` answers of a model to each of P prompts (texts), and what they are worth: {measure:
    (P, count)}. judge: a policy trained from this model; its implicit reward is
    beta (log judge - log model)."""
    eot, row_length = tokenizer.eot_token, model.config.block_size
    encoded = [[eot] + tokenizer.encode_ordinary(prompt) for prompt in prompts]
    answers = sample(model, [ids for ids in encoded for _ in range(count)], max_new_tokens, seed,
                     eot, progress=f"sampling {count} answers to each prompt")
    whole = [prompts[i // count] + tokenizer.decode([t for t in answer if t != eot])
             for i, answer in enumerate(answers)]
    columns = {}
    if judge:
        items = [Encoded(ids, answers[i * count:(i + 1) * count], [])
                 for i, ids in enumerate(encoded)]
        pi, ref = (torch.tensor(score(m, items, row_length, "judging")) for m in (judge, model))
        columns["implicit_reward"] = beta * (pi - ref)
    if reward:
        columns["reward"] = torch.tensor([reward(text) for text in whole], dtype=torch.float64)
    if well_formed:
        columns["well_formed"] = torch.tensor([well_formed(text) for text in whole])
    columns["length"] = torch.tensor([len(answer) for answer in answers])
    return {name: values.double().view(len(prompts), count) for name, values in columns.items()}


def best_of(columns, numbers, judge):
    """D.1: what the best of N answers is worth, for each N of numbers: {"N = ...": measures}.

    columns: {measure: (P, M)} of M answers to each of P prompts; judge: the measure that picks.
    Every subset of N of the M answers is a fair draw of N, so each counts alike (see
    shares_of_best): all N are measured on the same answers, without bias.
    """
    order = columns[judge].argsort(dim=1, stable=True)              # (P, M) worst first
    measures = {}
    for n in numbers:
        shares = shares_of_best(order.size(1), n)                   # (M,)
        measures[f"N = {n}"] = {"kl_bound": math.log(n) - (n - 1) / n} | means(
            {name: values.gather(1, order) @ shares for name, values in columns.items()})
    return measures


def shares_of_best(m, n):
    """(m,): of all subsets of n among m answers, worst first, the share whose best is answer i:
    the other n - 1 come from the i below it, so C(i, n - 1) / C(m, n) from i = 0."""
    return torch.tensor([math.comb(i, n - 1) / math.comb(m, n) for i in range(m)],
                        dtype=torch.float64)


def table(measures, width=100):
    """Measures by name as text: a row for each policy, mean +- standard error, or for a win rate
    the 95 % interval; as many columns side by side as fit in the width."""
    names = list(dict.fromkeys(m for values in measures.values() for m in values
                               if not m.endswith(("_se", "_95"))))

    def cell(values, name):
        if name not in values:
            return "-"
        if f"{name}_95" in values:
            return "{:.3f} {:.3f}-{:.3f}".format(values[name], *values[f"{name}_95"])
        error = f" +-{values[f'{name}_se']:.3f}" if f"{name}_se" in values else ""
        return f"{values[name]:.3f}{error}"
    first = max(6, *(len(policy) + 1 for policy in measures))
    abreast = max(1, (width - first) // 18)
    lines = []
    for start in range(0, len(names), abreast):
        part = names[start:start + abreast]
        lines += [""] * bool(lines) + [" " * first + "".join(f"{name:>18}" for name in part)]
        lines += [policy.ljust(first) + "".join(f"{cell(values, name):>18}" for name in part)
                  for policy, values in measures.items()]
    return "\n".join(lines)


def side_by_side(prompts, texts, reward=None):
    """Answers of each policy ({name: texts}) under their prompts, as text to print."""
    lines = []
    for i, prompt in enumerate(prompts):
        shown = prompt if len(prompt) <= 300 else "... " + prompt[-300:]    # of a dialogue, its end
        lines.append(f"\nprompt  {shown!r}")
        for name, answers in texts.items():
            grade = f"{reward(prompt + answers[i]):+.2f}  " if reward else ""
            text = f"{grade}...{answers[i]}".replace("\n", "\\n")
            lines.append(textwrap.fill(text, 100, initial_indent=f"{name:<7} ",
                                       subsequent_indent=" " * 8))
    return "\n".join(lines)


def answer(policies, tokenizer, prompt, args):
    """{name: texts}, -n answers of each policy to one prompt; the same seed for all."""
    prompt = as_prompt(prompt, args.task)
    ids, eot = [tokenizer.eot_token] + tokenizer.encode_ordinary(prompt), tokenizer.eot_token
    block_size = min(model.config.block_size for model in policies.values())
    if len(ids) >= block_size:
        raise UserError(f"a prompt of {len(ids)} tokens; the model reads at most {block_size - 1}")
    texts = {}
    for name, model in policies.items():
        answers = sample(model, [ids] * args.n, args.max_new_tokens, args.seed, eot,
                         args.temperature, args.top_k, args.top_p)
        texts[name] = [tokenizer.decode([i for i in answer if i != eot]) for answer in answers]
    return texts


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def talk(paths, device, args):
    """Answer --prompt, or one prompt after the other until the end of input."""
    if world_size() > 1:
        raise UserError("to talk takes one process: start it without torchrun")
    policies, tokenizer, _ = open_policies(paths, device, args)
    if args.prompt is not None:
        print(side_by_side([args.prompt] * args.n, answer(policies, tokenizer, args.prompt, args)))
        return
    while True:
        try:
            prompt = input("prompt> ")
            print(side_by_side([prompt] * args.n, answer(policies, tokenizer, prompt, args)))
        except (UserError, UnicodeDecodeError) as error:    # too long, or no text; the next may do
            print(error)
        except EOFError:
            print()
            return


def measure(device, args):
    """--evaluate and --best-of: print the tables, write evaluation.json."""
    reference = args.reference or args.out / "sft.pt"
    paths = [args.out / "sft.pt", args.out / "dpo.pt"] if args.evaluate == [] else args.evaluate
    judges = [args.checkpoint or args.out / "dpo.pt"] if args.judge == "implicit" else []
    paths = [*(paths or []), *([args.baseline] if args.baseline else [])]
    opened, tokenizer, betas = open_policies([*paths, reference, *judges], device, args)
    names = names_of([*paths, reference, *judges])
    pi_ref = opened[names[reference]]
    sizes = sorted({model.config.block_size for model in opened.values()})
    if len(sizes) > 1:
        raise UserError(f"checkpoints for {' and '.join(map(str, sizes))} tokens: to be measured "
                        "together they must have one block size")
    items = held_out_pairs(tokenizer, pi_ref.config.block_size, args)
    prompts, grades = held_out_prompts(items, tokenizer, args)
    if len(prompts) < 2:
        raise UserError(f"{args.task or args.data}: fewer than two held-out prompts to measure on")
    results = {"task": args.task or args.data.name, "seed": args.seed, "reference": str(reference),
               "prompts": len(prompts)}
    if paths:
        policies = {names[path]: opened[names[path]] for path in paths}
        baseline = names[args.baseline or paths[0]]
        found, texts = evaluate_all(policies, pi_ref, prompts, items, tokenizer, grades, baseline,
                                    betas, args)
        print(side_by_side(prompts[:4], texts, grades.get("reward")))
        against = f"; win rate against {baseline}, with its 95 % interval" if grades else ""
        print(f"\n{len(prompts):,} held-out prompts, one sample each, mean +- standard error\n"
              f"KL to {reference}{against}\n{table(found)}")
        results |= {"baseline": baseline, "policies": found}
    if args.best_of:
        judge = {"judge": opened[names[path]] for path in judges}
        judge |= {"beta": betas.get(names[path], 1.0) for path in judges}
        columns = draw_answers(pi_ref, prompts, tokenizer, max(args.best_of), args.max_new_tokens,
                               args.seed + 1, **grades, **judge)
        found = best_of(columns, args.best_of, "implicit_reward" if judges else "reward")
        by = f"the implicit reward of {judges[0]}" if judges else "the task's reward"
        print(f"\n{len(prompts):,} held-out prompts, the best of N answers of {reference} by {by}\n"
              f"{table(found)}")
        results |= {"judge": args.judge, "best_of": found}
    make_folder(args.out)
    write_json(args.out / "evaluation.json", results)
    print(f"\nwrote {args.out / 'evaluation.json'}")


def evaluate_all(policies, reference, prompts, items, tokenizer, grades, baseline, betas, args):
    """What evaluate returns, with distinct-n and what the policies think of held-out items."""
    measures, texts = evaluate(policies, reference, prompts, tokenizer, args.max_new_tokens,
                               args.seed + 1, **grades, baseline=baseline)
    on_pairs = rate_pairs(policies, reference, items, betas) if items else {}
    for name in policies:
        measures[name] |= {f"distinct_{n}": distinct(texts[name], tokenizer, n) for n in (1, 2)}
        measures[name] |= on_pairs.get(name, {})
    return measures, texts


def has_reward(args):
    """Whether the task knows what a text is worth."""
    return args.task == "reviews"


def held_out_pairs(tokenizer, row_length, args):
    """The held-out preferences of --data or of a published task, or those that train_dpo.py sampled
    for the reviews; none where it has not run yet."""
    path = args.out / "preferences.jsonl" if has_reward(args) else args.data
    if path and not args.data and not path.exists():
        print(f"no {path} yet, so no pairs to measure accuracy on: train_dpo.py writes them")
        return []
    if path:
        _, held_out = load_training(args, path)
    else:                               # of a published task, only the file that is held out
        held_out = load(f"{args.task}, held out", args, load_comparisons, args.task, args.data_dir,
                        True)
    return load(f"{path or args.task}, held out", args, encode_all, held_out, tokenizer, row_length)


def held_out_prompts(items, tokenizer, args):
    """(at most --eval-prompts texts, functions that grade a text): fresh prompts of a task that has
    a reward; else the prompts of held-out items, a list of Encoded, and no grades."""
    if has_reward(args):
        return (prefixes(args.eval_prompts, True, tokenizer, args.seed + 1),
                {"reward": reward, "well_formed": well_formed})
    prompts = {tokenizer.decode(item.prompt[1:]): None for item in items}
    return list(prompts)[:args.eval_prompts], {}


def names_of(paths):
    """{path: name} of checkpoints: the stem, or the path where two files have the same stem."""
    files = {}
    for path in paths:
        files.setdefault(path.resolve(), path)
    stems = Counter(path.stem for path in files.values())
    named = {key: path.stem if stems[path.stem] == 1 else str(path) for key, path in files.items()}
    return {path: named[path.resolve()] for path in paths}


def open_policies(paths, device, args):
    """({name: model}, tokenizer, {name: beta}) of checkpoints; each file is opened once."""
    policies, betas, tokenizers = {}, {}, set()
    for path, name in names_of(paths).items():
        if name in policies:
            continue
        policies[name], tokenizer, facts = open_checkpoint(path, device, args)
        tokenizers.add(facts["tokenizer"])
        if "beta" in facts:
            betas[name] = facts["beta"]
    if len(tokenizers) > 1:
        raise UserError(f"{' and '.join(map(str, paths))} have different tokenizers")
    return policies, tokenizer, betas


def counts(text):
    """An argparse type: "1,4,16" to [1, 4, 16]."""
    try:
        found = sorted({int(word) for word in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise argparse.ArgumentTypeError(f"expected whole numbers like 1,4,16, not {text!r}")
    return found


def add_measuring_flags(parser):
    """Flags of the final table of train_dpo.py and of --evaluate, so that both show the same."""
    add = parser.add_argument
    add("--max-new-tokens", type=number(int, 1), default=96,
        help="longest sampled answer (default 96)")
    add("--eval-prompts", type=number(int, 2), default=1024,
        help="held-out prompts to measure on (default 1,024)")


def parse_args(argv):
    parser = Parser(__doc__)
    add_shared_flags(parser)
    add_measuring_flags(parser)
    add = parser.add_argument
    add("--checkpoint", type=Path,
        help="default: dpo.pt of the run, or sft.pt where there is none")
    add("--compare", nargs="*", type=Path, metavar="FILE",
        help="two checkpoints side by side (default: sft.pt and dpo.pt of the run)")
    add("--export", type=Path, metavar="FOLDER",
        help="write the checkpoint's weights in the layout of the Hugging Face hub, and end")
    add("--prompt", help="default: ask for prompts until end of input (Ctrl-D)")
    add("-n", type=number(int, 1), default=1, help="answers to each prompt (default 1)")
    add("--temperature", type=number(float, 0), default=1.0,
        help="1 samples what was trained, 0 takes the likeliest token (default 1)")
    add("--top-k", type=number(int, 1), help="only the k likeliest tokens")
    add("--top-p", type=number(float, 0, above=True, most=1),
        help="only the fewest likeliest tokens whose probabilities reach p")
    add("--evaluate", nargs="*", type=Path, metavar="FILE",
        help="measure any number of checkpoints (default: sft.pt and dpo.pt of the run)")
    add("--best-of", type=counts, metavar="N,N,...",
        help="measure the best of N answers of the reference, as many as the largest N to each "
             "prompt: 1,4,16,64,128 in the paper")
    add("--reference", type=Path,
        help="what KL and implicit reward are measured to (default sft.pt of the run)")
    add("--baseline", type=Path,
        help="what the win rate is against (default the first of --evaluate)")
    add("--judge", choices=["reward", "implicit"],
        help="who says which of N is best: the task's reward, or the implicit reward of "
             "--checkpoint (default: reward where the task has one)")
    parser.set_defaults(strict=False)       # data that cannot teach is counted, not an error
    args = parser.parse_args(argv)
    settle_task(args)
    if args.compare is not None and (len(args.compare) not in (0, 2) or args.checkpoint):
        raise UserError("--compare takes two checkpoints, or none for sft.pt and dpo.pt of the "
                        "run, and no --checkpoint beside it")
    if args.export and args.compare is not None:
        raise UserError("--export writes one checkpoint: name it with --checkpoint, not --compare")
    measured = args.evaluate is not None or args.best_of is not None
    talking = {"--compare": args.compare is not None, "--export": args.export,
               "--prompt": args.prompt is not None,
               "-n": args.n != 1, "--temperature": args.temperature != 1,
               "--top-k": args.top_k is not None, "--top-p": args.top_p is not None}
    for flag, given in talking.items():
        if measured and given:
            raise UserError(f"{flag} is not for --evaluate and --best-of, which sample held-out "
                            "prompts at temperature 1")
    for flag, given, needed in [("--reference", args.reference, measured),
                                ("--baseline", args.baseline, args.evaluate is not None),
                                ("--judge", args.judge, args.best_of is not None)]:
        if given and not needed:
            raise UserError(f"{flag} is for --evaluate or --best-of, and nothing here reads it")
    if args.baseline and not has_reward(args):
        raise UserError("--baseline: a win rate needs a reward, which only the reviews task has; "
                        "python -m experiments.win_rate asks people or a model")
    if args.best_of and args.judge == "reward" and not has_reward(args):
        raise UserError("--judge reward: only the reviews task has one; use --judge implicit")
    if args.best_of and not args.judge:
        args.judge = "reward" if has_reward(args) else "implicit"
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    device = settle(args)
    if args.evaluate is not None or args.best_of:
        measure(device, args)
        return
    sft, dpo = args.out / "sft.pt", args.out / "dpo.pt"
    paths = [sft, dpo] if args.compare == [] else args.compare or [
        args.checkpoint or (dpo if dpo.exists() else sft)]
    if args.export:
        model, _, _ = open_checkpoint(paths[0], device, args)
        model.save_pretrained(args.export)
        print(f"wrote {args.export}: open it with transformers' GPT2LMHeadModel.from_pretrained")
    else:
        talk(paths, device, args)


if __name__ == "__main__":
    main()
