"""Your own preferences: --data FILE, in any form that data.load_preferences reads. One prompt in
ten is held out (data.is_held_out), and SFT trains on the best answers."""

from data import best_answers, is_held_out, load_preferences
from runtime.rows import read_and_report

reward = well_formed = None


def preferences(args):
    return read_split(args.data, args)


def read_split(path, args):
    """(training, held-out) lists of Preference from a file."""
    found = read_and_report(path, args.strict, load_preferences, path)
    return ([p for p in found if not is_held_out(p.prompt)],
            [p for p in found if is_held_out(p.prompt)])


def sft_examples(args):
    training, held_out = preferences(args)
    return best_answers(training), best_answers(held_out)


def held_out(args):
    return preferences(args)[1]


def prompts(items, tokenizer, args):
    """The prompts of held-out preferences, without repetitions."""
    distinct = dict.fromkeys(tokenizer.decode(item.prompt[1:]) for item in items)
    return list(distinct)[:args.eval_prompts]


def name(args):
    return args.data


def as_prompt(text):
    return text
