"""Talk to a model, compare two, and measure what training did.

    python sample.py                                   # type a prompt, read what the policy writes
    python sample.py --prompt "The acting was" -n 5    # five answers
    python sample.py --compare                         # SFT and DPO side by side, same seed
    python sample.py --evaluate                        # SFT and DPO, or any checkpoints, measured
    python sample.py --task hh --export folder         # the policy, for transformers to open

train_dpo.py ends with `evaluate`, which measures each policy on answers to held-out prompts,
sampled at temperature 1:

    reward       mean ground-truth reward of prompt + answer, if the task has one; for imdb, the
                 probability that the text is favourable, by the classifier that ranks answers
    kl           mean of log pi(y|x) - log pi_ref(y|x) over answers y ~ pi, scored on the sampled
                 ids: an unbiased estimate, in nats, of the KL between the distributions over
                 answers of at most --max-new-tokens tokens
    win_rate     share of prompts on which the answer has a higher reward than the baseline's, which
                 is sampled independently; ties count as half; with a 95 % interval
    well_formed  reviews: share of texts that the task's grammar accepts
    judge        imdb: mean probability that a text is favourable, by a judge that ranked no answers
    length       mean tokens of an answer, end-of-text included
    finished     share of answers that reached end-of-text; in the JSON file only

--evaluate adds

    distinct_n     distinct n-grams as a share of all n-grams of all answers: low if a policy
                   repeats itself. It falls as prompts are added, so compare equal numbers of them
    accuracy       share of held-out pairs whose chosen answer has the higher implicit reward
                   beta (log pi - log pi_ref); ties count as half
    logp_accuracy  share of those pairs whose chosen answer has the higher log pi. Papers often call
                   this accuracy. For the reference it is not 50 %; compare with that value
    margin         mean implicit reward of chosen minus rejected held-out answers

Left out on purpose: beam search. DPO trains a distribution, so we look at samples of it.
"""

import itertools
import math

import numpy as np
import torch
from tqdm import tqdm

from data import Encoded, batches_in_order
from runtime.checkpoint import common_block_size, open_checkpoint, open_policies
from runtime.cli import command, only_one_process, set_up
from runtime.errors import UserError
from runtime.files import make_folder, write_json
from runtime.flags import parse_sample_flags
from runtime.parallel import all_gather, compiled_logps, process_rank, world_size
from runtime.report import final_report, names_of, side_by_side
from tasks import held_out_pairs, held_out_prompts, task_of
from tasks.tokenizers import EOT, check_export_folder, write_tokenizer

Z_95 = 1.959964     # 95 % of a normal distribution lie within this many standard deviations


# ------------------------------------------------------------------------------------------------
# Sampling and scoring
# ------------------------------------------------------------------------------------------------


def sample(model, prompts, max_new_tokens, seed, eot, temperature=1.0, top_k=None, top_p=None,
           progress="sampling"):
    """Sample one answer (a list of ids) to each of a list of prompts (lists of ids).

    Prompts of similar length are sampled together, in batches of at most 2^16 tokens, and fewer if
    their keys and values would have more than 2^31 numbers. Each batch has its own generator, so
    the answers do not depend on the number of processes.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    longest = min(len(prompts[order[-1]]) + max_new_tokens, model.config.block_size)
    most_tokens = min(2**16, 2**31 // (2 * model.config.n_layer * model.config.n_embd))
    size = max(1, most_tokens // longest)
    batches = [order[start:start + size] for start in range(0, len(order), size)]
    mine = range(process_rank(), len(batches), world_size())
    sampled = []
    with tqdm(total=sum(len(batches[k]) for k in mine), desc=progress, delay=1) as bar:
        for k in mine:
            seed_of_k = np.random.SeedSequence([seed, k]).generate_state(1, np.uint64)
            generator = torch.Generator(model.device).manual_seed(int(seed_of_k[0]))
            sampled.append(model.generate([prompts[i] for i in batches[k]], max_new_tokens,
                                          temperature, top_k, top_p, eot, generator))
            bar.update(len(batches[k]))
    answers = [None] * len(prompts)
    for indices, batch in zip(batches, all_gather(sampled)):
        for i, answer in zip(indices, batch):
            answers[i] = answer
    return answers


@torch.no_grad()
def score(model, items, row_length, progress="scoring", number_of=None):
    """log pi(y|x) of every answer: a list of floats for each of a list of Encoded. number_of: a
    function of a Batch that returns another number of each answer, (N,), instead."""
    number_of = number_of or compiled_logps(model)
    most_answers = max((len(item.answers) for item in items), default=1)
    size = min(32, max(1, 128 // most_answers))
    numbers = []
    with tqdm(total=sum(len(item.answers) for item in items), desc=progress, delay=1) as bar:
        for batch in batches_in_order(items, row_length, model, size):
            numbers.append(number_of(batch).tolist())
            bar.update(batch.n_answers * world_size())
    flat = itertools.chain.from_iterable(all_gather(numbers))       # of all answers, in order
    return [list(itertools.islice(flat, len(item.answers))) for item in items]


def encode_prompt(prompt, tokenizer):
    return [tokenizer.eot_token] + tokenizer.encode_ordinary(prompt)


def decode_answer(ids, tokenizer):
    return tokenizer.decode([i for i in ids if i != tokenizer.eot_token])


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------


def evaluate(policies, reference, prompts, tokenizer, max_new_tokens, seed,
             grades=None, baseline=None):
    """Measure policies ({name: model}) on prompts (texts); see the top of this file.

    grades: {measure: a function from texts to numbers, both lists}, as open_grades of the task
    returns them. baseline: the name of the policy that win_rate compares to, by default the first;
    it is sampled with seed + 1, and all others with seed.
    Returns ({name: {measure: mean, measure_se: standard error, win_rate_95: (low, high)}},
    {name: texts}).
    """
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    baseline = baseline or next(iter(policies))
    texts, columns = {}, {}
    for name, model in policies.items():
        # The baseline has random numbers of its own. With the same ones, a similar policy would
        # often write the same text, and the win rate would not be that of independent answers.
        own_seed = seed + 1 if name == baseline else seed
        answers = sample(model, encoded, max_new_tokens, own_seed, tokenizer.eot_token,
                         progress=f"sampling {name}")
        texts[name] = [decode_answer(answer, tokenizer) for answer in answers]
        whole = [prompt + text for prompt, text in zip(prompts, texts[name])]
        graded = {measure: torch.tensor(grade(whole), dtype=torch.float64)
                  for measure, grade in (grades or {}).items()}
        columns[name] = {}                      # {measure: one value per prompt}, as in the table
        if "reward" in graded:
            columns[name]["reward"] = graded.pop("reward")
        columns[name]["kl"] = log_ratios(model, reference, encoded, answers, name)
        if "reward" in columns[name]:
            columns[name]["win_rate"] = None    # filled in below: it needs the baseline's rewards
        columns[name] |= graded
        columns[name]["length"] = torch.tensor([float(len(answer)) for answer in answers])
        columns[name]["finished"] = torch.tensor([float(tokenizer.eot_token in answer)
                                                  for answer in answers])
    measures = {}
    for name, values in columns.items():
        if "reward" in values:
            ahead = values["reward"] - columns[baseline]["reward"]
            values["win_rate"] = (ahead.sign() + 1) / 2
        measures[name] = means(values)
        if "reward" in values and name != baseline:
            measures[name]["win_rate_95"] = wilson(values["win_rate"].tolist())
    return measures, texts


def log_ratios(model, reference, prompts, answers, name):
    """(N,) log pi(y|x) - log pi_ref(y|x) of one answer to each prompt, all as ids."""
    if model is reference:
        return torch.zeros(len(answers), dtype=torch.float64)
    items = [Encoded(prompt, [answer], []) for prompt, answer in zip(prompts, answers)]
    row_length, progress = reference.config.block_size, f"scoring {name}"
    pi_logps = torch.tensor(score(model, items, row_length, progress)).flatten()
    ref_logps = torch.tensor(score(reference, items, row_length, progress)).flatten()
    return pi_logps.double() - ref_logps.double()


def means(columns):
    """{measure: values, one per prompt} to {measure: mean, measure_se: its standard error}."""
    found = {}
    for measure, values in columns.items():
        found[measure] = values.double().mean().item()
        found[f"{measure}_se"] = (values.double().std() / len(values) ** 0.5).item()
    return found


def wilson(scores):
    """(low, high): the 95 % interval of the mean of n scores from 0 to 1. A win is 1, a tie 1/2.

    Without ties it is Wilson's interval, which contains every rate p for which
    |share - p| <= z sqrt(p (1 - p) / n), where z = 1.96. Unlike the share +- 2 standard errors, it
    stays within 0 and 1 and does not shrink to a point if all were won. Ties vary less than wins
    and losses do: with them, the mean of score (1 - score) is subtracted from p (1 - p).
    """
    n = len(scores)
    share, z2 = sum(scores) / n, Z_95**2 / n
    # Divided by n + z^2 rather than n, so that the interval of ties alone is not a point.
    ties = sum(s * (1 - s) for s in scores) / (n + Z_95**2)
    half = math.sqrt((share * (1 - share) - ties) * z2 + (1 - 4 * ties) * z2**2 / 4)
    return (max(0.0, (share + z2 / 2 - half) / (1 + z2)),
            min(1.0, (share + z2 / 2 + half) / (1 + z2)))


def distinct(texts, tokenizer, n):
    """Distinct-n: distinct n-grams of tokens as a share of all n-grams; 0 if there are none."""
    n_grams = [tuple(ids[i:i + n]) for ids in map(tokenizer.encode_ordinary, texts)
               for i in range(len(ids) - n + 1)]
    return len(set(n_grams)) / max(1, len(n_grams))


def ranked_correctly(margins, tie):
    """1 for each pair whose margin is positive, 0 if it is negative, 1/2 if it is a tie. So the
    accuracy of a policy that equals its reference is 50 %, rather than noise from rounding."""
    decided = margins.abs() > tie
    return ((margins > 0) & decided) + 0.5 * ~decided


def tie_in_nats(precision):
    """Margins of at most this many nats count as ties, because rounding alone can cause them. (With
    answers of 20 tokens it caused up to 1.3e-5 in float32 and 1.5e-3 in bfloat16.)"""
    return 2e-4 if precision is None else 0.02


def rate_pairs(policies, reference, items, betas):
    """How policies ({name: model}) rank the pairs of a list of Encoded: {name: measures}, which are
    accuracy, logp_accuracy and margin as at the top of this file, over all pairs.

    betas: {name: beta}; a policy without one has no margin. Standard errors are clustered by
    prompt.
    """
    measures = {}
    ref_logratios = log_ratios_of_pairs(reference, items, "reference")
    for name, model in policies.items():
        pi_logratios = ref_logratios
        if model is not reference:
            pi_logratios = log_ratios_of_pairs(model, items, name)
        margins = pi_logratios - ref_logratios                          # in nats
        columns = {"accuracy": ranked_correctly(margins, tie_in_nats(model.precision)),
                   "logp_accuracy": ranked_correctly(pi_logratios, 0.0)}
        if name in betas:
            columns["margin"] = betas[name] * margins
        measures[name] = means_over_pairs(columns, items)
    return measures


def log_ratios_of_pairs(model, items, name):
    """(P,) log pi(y_w|x) - log pi(y_l|x) of all pairs of a list of Encoded."""
    logps = score(model, items, model.config.block_size, f"scoring pairs, {name}")
    return differences(logps, items)


def differences(numbers, items):
    """(P,) the chosen answer's number minus the rejected one's, for all pairs of a list of
    Encoded. numbers: one of each answer, as `score` returns them."""
    return torch.tensor([of_item[w] - of_item[l] for of_item, item in zip(numbers, items)
                         for w, l in item.pairs], dtype=torch.float64)


def means_over_pairs(columns, items):
    """{measure: values, one per pair of a list of Encoded} to {measure: mean, measure_se: its
    standard error, clustered by prompt}."""
    clusters = {}                                       # {prompt: its index}
    cluster_of = [clusters.setdefault(tuple(item.prompt), len(clusters)) for item in items]
    cluster_of = torch.tensor([c for c, item in zip(cluster_of, items) for _ in item.pairs])
    found = {}
    for measure, values in columns.items():
        # Pairs of one prompt are not independent, so their deviations are added up first.
        deviations = torch.zeros(len(clusters), dtype=torch.float64)
        deviations.index_add_(0, cluster_of, (values - values.mean()).double())
        found[measure] = values.mean().item()
        found[f"{measure}_se"] = deviations.norm().item() / len(values)
    return found


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


@command
def main(argv=None):
    args = parse_args(argv)
    device = set_up(args)
    sft, dpo = args.out / "sft.pt", args.out / "dpo.pt"
    policy = args.checkpoint or (dpo if dpo.exists() else sft)
    if args.evaluate is not None:
        measure(args.evaluate or [sft, dpo], device, args)
    elif args.export:
        model, tokenizer, _ = open_checkpoint(policy, device, args)
        export(model, tokenizer, args.export)
    elif args.compare is not None:
        talk(args.compare or [sft, dpo], device, args)
    else:
        talk([policy], device, args)


def export(model, tokenizer, folder):
    """--export: write a model and its tokenizer for transformers."""
    check_export_folder(folder)
    model.save_pretrained(folder)
    write_tokenizer(folder, tokenizer, model.config.block_size)
    print(f"wrote {folder}: open it with AutoModelForCausalLM and AutoTokenizer of transformers. "
          f"Every prompt begins with {EOT}, which this tokenizer adds and GPT-2's own does not.")


def talk(paths, device, args):
    """Answer --prompt, or prompts that are typed until the end of input."""
    only_one_process("talking")
    policies, tokenizer, _ = open_policies(paths, device, args)
    if args.prompt is not None:
        print(side_by_side([args.prompt] * args.n, answer(policies, tokenizer, args.prompt, args)))
        return
    while True:
        try:
            prompt = input("prompt> ")
            print(side_by_side([prompt] * args.n, answer(policies, tokenizer, prompt, args)))
        except UserError as error:                          # a bad prompt: ask for another
            print(error)
        except EOFError:
            print()
            return


def answer(policies, tokenizer, prompt, args):
    """{name: texts}, -n answers of each policy to one prompt, with the same seed for all."""
    ids = encode_prompt(task_of(args).as_prompt(prompt), tokenizer)
    block_size = min(model.config.block_size for model in policies.values())
    if len(ids) >= block_size:
        raise UserError(f"a prompt of {len(ids)} tokens; the model reads at most {block_size - 1}")
    texts = {}
    for name, model in policies.items():
        answers = sample(model, [ids] * args.n, args.max_new_tokens, args.seed,
                         tokenizer.eot_token, args.temperature, args.top_k, args.top_p)
        texts[name] = [decode_answer(answer, tokenizer) for answer in answers]
    return texts


def measure(paths, device, args):
    """--evaluate: print the table, write evaluation.json."""
    task, reference = task_of(args), args.reference or args.out / "sft.pt"
    paths = paths + ([args.baseline] if args.baseline else [])
    models, tokenizer, betas = open_policies([*paths, reference], device, args)
    names = names_of([*paths, reference])
    policies = {names[path]: models[names[path]] for path in paths}
    baseline, pi_ref = names[args.baseline or paths[0]], models[names[reference]]
    items = held_out_pairs(tokenizer, common_block_size(models), args)
    prompts = held_out_prompts(items, tokenizer, args)
    grades = task.open_grades(args, pi_ref, tokenizer)
    measures, texts = evaluate(policies, pi_ref, prompts, tokenizer, args.max_new_tokens,
                               args.seed + 1, grades, baseline)
    for name in policies:
        measures[name] |= {f"distinct_{n}": distinct(texts[name], tokenizer, n) for n in (1, 2)}
    if items:
        for name, on_pairs in rate_pairs(policies, pi_ref, items, betas).items():
            measures[name] |= on_pairs
    against = f"; win rate against {baseline}, with its 95 % interval" if grades else ""
    print(final_report(prompts, texts, measures, grades.get("reward"),
                       f"\nKL to {reference}{against}"))
    make_folder(args.out)
    write_json(args.out / "evaluation.json", {
        "task": args.task or args.data.name, "seed": args.seed, "reference": str(reference),
        "prompts": len(prompts), "baseline": baseline, "policies": measures})
    print(f"\nwrote {args.out / 'evaluation.json'}")


def parse_args(argv):
    return parse_sample_flags(__doc__, argv)


if __name__ == "__main__":
    main()
