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
import json
import math

import numpy as np
import torch
from tqdm import tqdm

from data import Encoded, batches_in_order, decode_answer, encode_prompt
from runtime.cli import command, only_one_process, set_up
from runtime.errors import UserError
from runtime.files import cache_key, cached, make_folder, write_json
from runtime.parallel import all_gather, process_rank, world_size
from runtime.report import final_report, names_of, side_by_side
from runtime.statistics import clustered_means, means, wilson
from tasks import held_out_pairs, held_out_prompts, task_of
from tasks.checkpoint import open_checkpoint, open_policies, open_with_reference
from tasks.flags import parse_sample_flags
from tasks.tokenizers import EOT, check_export_folder, write_tokenizer

# ------------------------------------------------------------------------------------------------
# Sampling and scoring
# ------------------------------------------------------------------------------------------------


def sample_answers(model, prompts, max_new_tokens, seed, eot, temperature=1.0, top_k=None,
                   top_p=None, progress="sampling"):
    """Sample one answer (a list of ids) to each of a list of prompts (lists of ids).

    Prompts of similar length are sampled together, in batches of at most 2^16 tokens, and fewer if
    their keys and values would have more than 2^29 numbers, two gigabytes in float32. Each batch
    has its own generator, so the answers do not depend on the number of processes.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    longest = min(len(prompts[order[-1]]) + max_new_tokens, model.config.block_size)
    most_tokens = min(2**16, 2**29 // (2 * model.config.n_layer * model.config.n_embd))
    size = max(1, most_tokens // longest)
    batches = [order[start:start + size] for start in range(0, len(order), size)]
    mine = range(process_rank(), len(batches), world_size())
    sampled = []
    total = sum(len(batches[k]) for k in mine)
    with tqdm(total=total, desc=progress, delay=1, disable=None) as bar:
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


def logps_of(model, items, row_length, progress="scoring"):
    """log pi(y|x) of every answer: a list of floats for each of a list of Encoded."""
    return numbers_of(model, model.logps, items, row_length, progress)


def add_reference(reference, items, args):
    """Set ref_logps of a list of Encoded, their log-probs under the reference. They are kept in
    reference.json. Raises UserError if one is NaN or infinite."""
    key = cache_key(reference, items, args.row_length, reference.device.type, reference.precision,
                    reference.compiled)
    logps = json.loads(cached(args.out / "reference.json", key, lambda: json.dumps(
        logps_of(reference, items, args.row_length, "reference log-probs"))))
    if not all(math.isfinite(logp) for of_item in logps for logp in of_item):
        raise UserError("a log-prob of the model that DPO starts from is NaN or infinite; start "
                        "from another one, or use --precision float32")
    for item, ref_logps in zip(items, logps):
        item.ref_logps = ref_logps


@torch.no_grad()
def numbers_of(model, of_batch, items, row_length, progress):
    """A number of every answer: a list of floats for each of a list of Encoded. of_batch: a
    function from a packed Batch to the numbers of its answers, (N,)."""
    most_answers = max((len(item.answers) for item in items), default=1)
    size = min(32, max(1, 128 // most_answers))
    numbers, n_answers = [], sum(len(item.answers) for item in items)
    with tqdm(total=n_answers, desc=progress, delay=1, disable=None) as bar:
        for batch in batches_in_order(items, row_length, model, size):
            numbers.append(of_batch(batch).tolist())
            bar.update(batch.n_answers * world_size())
    flat = itertools.chain.from_iterable(all_gather(numbers))       # of all answers, in order
    return [list(itertools.islice(flat, len(item.answers))) for item in items]


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------


def evaluate(policies, reference, prompts, tokenizer, max_new_tokens, seed,
             grades=None, baseline=None):
    """Measure policies ({name: model}) on prompts (texts); see the top of this file.

    grades: {measure: a function from texts to numbers, both lists}, as Task.grades returns them.
    baseline: the name of the policy that win_rate compares to, by default the first;
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
        answers = sample_answers(model, encoded, max_new_tokens, own_seed, tokenizer.eot_token,
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
    pi_logps = torch.tensor(logps_of(model, items, row_length, progress)).flatten()
    ref_logps = torch.tensor(logps_of(reference, items, row_length, progress)).flatten()
    return pi_logps.double() - ref_logps.double()


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
    logps = logps_of(model, items, model.config.block_size, f"scoring pairs, {name}")
    return differences(logps, items)


def differences(numbers, items):
    """(P,) the chosen answer's number minus the rejected one's, for all pairs of a list of
    Encoded. numbers: one of each answer, as numbers_of returns them."""
    return torch.tensor([of_item[w] - of_item[l] for of_item, item in zip(numbers, items)
                         for w, l in item.pairs], dtype=torch.float64)


def means_over_pairs(columns, items):
    """{measure: values, one per pair of a list of Encoded} to {measure: mean, measure_se: its
    standard error, clustered by prompt}."""
    return clustered_means(columns, [tuple(item.prompt) for item in items for _ in item.pairs])


def measure(path, policies, reference, prompts, tokenizer, args, **facts):
    """Evaluate policies on held-out prompts (texts) and report the result; facts go to the file."""
    if len(prompts) < 2:
        print("fewer than two held-out prompts, so nothing is measured")
        return
    grades = task_of(args).grades(args, reference, tokenizer)
    measures, texts = evaluate(policies, reference, prompts, tokenizer, args.max_new_tokens,
                               args.seed + 1, grades)
    report(path, prompts, texts, measures, grades, "", args, **facts)


def report(path, prompts, texts, measures, grades, note, args, **facts):
    """Print the answers to the first four prompts (not picked) and the table, and write the
    measures to `path`. texts, measures: what evaluate returned. note: a line about the measures."""
    note += "; win rate with its 95 % interval" if "reward" in grades else ""
    print(final_report(prompts, texts, measures, grades.get("reward"), note))
    write_json(path, {"task": args.task or args.data.name, "seed": args.seed,
                      "prompts": len(prompts), **facts, "policies": measures})
    print(f"\nwrote {path}")


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
        evaluate_checkpoints(args.evaluate or [sft, dpo], device, args)
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
    ids = encode_prompt(task_of(args).as_prompt(prompt, args), tokenizer)
    block_size = min(model.config.block_size for model in policies.values())
    if len(ids) >= block_size:
        raise UserError(f"a prompt of {len(ids)} tokens; the model reads at most {block_size - 1}")
    texts = {}
    for name, model in policies.items():
        answers = sample_answers(model, [ids] * args.n, args.max_new_tokens, args.seed,
                                 tokenizer.eot_token, args.temperature, args.top_k, args.top_p)
        texts[name] = [decode_answer(answer, tokenizer) for answer in answers]
    return texts


def evaluate_checkpoints(paths, device, args):
    """--evaluate: print the table, write evaluation.json."""
    reference_path = args.reference or args.out / "sft.pt"
    paths = paths + ([args.baseline] if args.baseline else [])
    policies, reference, tokenizer, betas = open_with_reference(paths, reference_path, device, args)
    baseline = names_of([*paths, reference_path])[args.baseline or paths[0]]
    items = held_out_pairs(tokenizer, reference.config.block_size, args)
    prompts = held_out_prompts(items, tokenizer, args)
    grades = task_of(args).grades(args, reference, tokenizer)
    measures, texts = evaluate(policies, reference, prompts, tokenizer, args.max_new_tokens,
                               args.seed + 1, grades, baseline)
    for name in policies:
        measures[name] |= {f"distinct_{n}": distinct(texts[name], tokenizer, n) for n in (1, 2)}
    if items:
        for name, on_pairs in rate_pairs(policies, reference, items, betas).items():
            measures[name] |= on_pairs
    make_folder(args.out)
    report(args.out / "evaluation.json", prompts, texts, measures, grades,
           f"\nKL to {reference_path}; baseline {baseline}", args,
           reference=str(reference_path), baseline=baseline)


def parse_args(argv):
    return parse_sample_flags(__doc__, argv)


if __name__ == "__main__":
    main()
