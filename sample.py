"""Talk to a checkpoint, compare two, and measure what training did.

    python sample.py                                   # type a prompt, read what the policy writes
    python sample.py --prompt "The acting was" -n 5    # five answers
    python sample.py --compare                         # SFT and DPO side by side, same seed
    python sample.py --task hh --export folder         # the policy, for transformers to open

`evaluate` is the end of train_dpo.py: for each policy, on held-out prompts and sampled at
temperature 1,

    reward       mean ground-truth reward of prompt + answer, where the task has one
    kl           mean of log pi(y|x) - log pi_ref(y|x) over answers y ~ pi: an unbiased estimate
                 of KL(pi || pi_ref) in nats, taken on the very ids that were sampled
    win_rate     share of prompts on which its answer has the higher reward beside that of `sft`;
                 ties half
    well_formed  share of texts that the task's grammar accepts
    length       mean tokens of an answer, end-of-text included

Left out on purpose: beam search. DPO trains a distribution, so we look at samples of it.
"""

import textwrap
from pathlib import Path

import torch
from tqdm import tqdm

from data import Encoded, as_prompt
from model import UserError
from train_sft import (Parser, add_shared_flags, command, in_batches, number, open_checkpoint,
                       settle, settle_task)


def sample(model, prompts, max_new_tokens, seed, eot, temperature=1.0, top_k=None, top_p=None,
           progress="sampling"):
    """One answer (a list of ids) to each of a list of prompts (lists of ids): as many at a time as
    make 2**16 tokens, prompts of like length together."""
    generator = torch.Generator(model.device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batch = max(1, 2**16 // (len(prompts[order[-1]]) + max_new_tokens))
    answers = [None] * len(prompts)
    with tqdm(total=len(prompts), desc=progress, delay=1) as bar:
        for start in range(0, len(prompts), batch):
            part = order[start:start + batch]
            drawn = model.generate([prompts[i] for i in part], max_new_tokens, temperature,
                                   top_k, top_p, eot, generator)
            for i, ids in zip(part, drawn):
                answers[i] = ids
            bar.update(len(part))
    return answers


@torch.no_grad()
def score(model, items, row_length, progress="scoring"):
    """log pi(y|x) of every answer: a list of floats for each of a list of Encoded."""
    logps = []
    with tqdm(total=sum(len(item.answers) for item in items), desc=progress, delay=1) as bar:
        for batch in in_batches(items, row_length, model.device):
            logps += model.logps(batch).tolist()
            bar.update(batch.n_answers)
    flat = iter(logps)
    return [[next(flat) for _ in item.answers] for item in items]


def evaluate(policies, reference, prompts, tokenizer, max_new_tokens, seed,
             reward=None, well_formed=None):
    """Measure policies ({name: model}) on prompts (texts); see the top of this file.

    reward, well_formed: functions of a text, for tasks that have them. The first policy is the
    baseline of win_rate. Returns ({name: {measure: mean, measure_se: standard error}},
    {name: texts}).
    """
    eot, row_length = tokenizer.eot_token, reference.config.block_size
    encoded = [[eot] + tokenizer.encode_ordinary(prompt) for prompt in prompts]
    measures, texts, baseline = {}, {}, None
    for name, model in policies.items():
        answers = sample(model, encoded, max_new_tokens, seed, eot, progress=f"sampling {name}")
        items = [Encoded(prompt, [answer], []) for prompt, answer in zip(encoded, answers)]
        pi, ref = (torch.tensor(score(m, items, row_length, f"scoring {name}")).double().flatten()
                   for m in (model, reference))
        texts[name] = [tokenizer.decode([i for i in answer if i != eot]) for answer in answers]
        columns = {"kl": pi - ref, "length": torch.tensor([float(len(ids)) for ids in answers])}
        whole = [prompt + text for prompt, text in zip(prompts, texts[name])]
        if reward:
            columns["reward"] = torch.tensor([reward(text) for text in whole], dtype=torch.float64)
            baseline = columns["reward"] if baseline is None else baseline
            columns["win_rate"] = ((columns["reward"] - baseline).sign() + 1) / 2
        if well_formed:
            columns["well_formed"] = torch.tensor([float(well_formed(text)) for text in whole])
        measures[name] = {}
        for measure in ("reward", "kl", "win_rate", "well_formed", "length"):
            if measure in columns:
                values = columns[measure].double()
                measures[name][measure] = values.mean().item()
                measures[name][measure + "_se"] = (values.std() / len(values) ** 0.5).item()
    return measures, texts


def table(measures):
    """The measures of `evaluate` as text: a row for each policy, mean +- standard error."""
    names = [m for m in next(iter(measures.values())) if not m.endswith("_se")]
    lines = [" " * 6 + "".join(f"{name:>18}" for name in names)]
    for policy, values in measures.items():
        lines.append(f"{policy:<6}" + "".join(
            f"{values[m]:.3f} +-{values[m + '_se']:.3f}".rjust(18) for m in names))
    return "\n".join(lines)


def side_by_side(prompts, texts, reward=None):
    """Answers of each policy ({name: texts}) under their prompts, as text to print."""
    lines = []
    for i, prompt in enumerate(prompts):
        lines.append(f"\nprompt  {prompt!r}")
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


def parse_args(argv):
    parser = Parser(__doc__)
    add_shared_flags(parser)
    add = parser.add_argument
    add("--checkpoint", type=Path,
        help="default: dpo.pt of the run, or sft.pt where there is none")
    add("--compare", nargs="*", type=Path, metavar="FILE",
        help="two checkpoints side by side (default: sft.pt and dpo.pt of the run)")
    add("--export", type=Path, metavar="FOLDER",
        help="write the checkpoint's weights in the layout of the Hugging Face hub, and end")
    add("--prompt", help="default: ask for prompts until end of input (Ctrl-D)")
    add("-n", type=number(int, 1), default=1, help="answers to each prompt (default 1)")
    add("--max-new-tokens", type=number(int, 1), default=128, help="longest answer (default 128)")
    add("--temperature", type=number(float, 0), default=1.0,
        help="1 samples what was trained, 0 takes the likeliest token (default 1)")
    add("--top-k", type=number(int, 1), help="only the k likeliest tokens")
    add("--top-p", type=number(float, 0, above=True, most=1),
        help="only the fewest likeliest tokens whose probabilities reach p")
    args = parser.parse_args(argv)
    settle_task(args)
    if args.compare is not None and (len(args.compare) not in (0, 2) or args.checkpoint):
        raise UserError("--compare takes two checkpoints, or none for sft.pt and dpo.pt of the "
                        "run, and no --checkpoint beside it")
    if args.export and args.compare is not None:
        raise UserError("--export writes one checkpoint: name it with --checkpoint, not --compare")
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    device = settle(args)
    sft, dpo = args.out / "sft.pt", args.out / "dpo.pt"
    paths = [sft, dpo] if args.compare == [] else args.compare or [
        args.checkpoint or (dpo if dpo.exists() else sft)]
    policies, tokenizers = {}, set()
    for path in paths:
        model, tokenizer, facts = open_checkpoint(path, device, args)
        policies[path.stem if path.stem not in policies else str(path)] = model
        tokenizers.add(facts["tokenizer"])
    if len(tokenizers) > 1:
        raise UserError(f"{' and '.join(map(str, paths))} have different tokenizers")
    if args.export:
        model.save_pretrained(args.export)
        print(f"wrote {args.export}: open it with transformers' GPT2LMHeadModel.from_pretrained")
        return
    if args.prompt is not None:
        print(side_by_side([args.prompt] * args.n, answer(policies, tokenizer, args.prompt, args)))
        return
    while True:
        try:
            prompt = input("prompt> ")
            print(side_by_side([prompt] * args.n, answer(policies, tokenizer, prompt, args)))
        except UserError as error:      # too long a prompt; the next one may do
            print(error)
        except EOFError:
            print()
            return


if __name__ == "__main__":
    main()
