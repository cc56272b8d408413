"""The tasks: where texts, preferences and, for reviews and imdb, the reward come from.

    reviews     a grammar writes film reviews; C.1 in miniature, and the default
    imdb        real film reviews; C.1 itself
    hh          Anthropic's helpful dialogues
    tldr        summaries of Reddit posts
    own_file    your own preferences, --data

A task is a module of plain functions with the same names; adding a task means writing such a module
and naming it in the table below. `args` are the parsed flags of a script.

    sft_examples(args)        (training, held-out) lists of Preference, one answer each and no pairs
    preferences(args)         (training, held-out) lists of Preference
    held_out(args)            the second of these alone
    prompts(items, tokenizer, args)
                              at most --eval-prompts held-out prompts, as texts; items are the
                              held-out preferences, a list of Encoded
    name(args)                what the printed lines and error messages call these preferences
    as_prompt(text)           what a user typed, in the form of the task's prompts
    open_grades(args, reference, tokenizer)
                              {measure: function} for the table at the end. The function takes a
                              list of texts, each a prompt with its answer, and returns a number for
                              each. "reward" is one of the measures if there is a ground-truth
                              reward
    open_reward(args)         returns such a function, the reward that ranks sampled answers. The
                              name open_reward is None if the task comes with preferences

A task with a reward has no preferences of its own: train_dpo.py samples answers and ranks them. For
that, it also has

    sampling_prompts(tokenizer, args)
                              the prompts to sample answers for, as texts
    answers_must_end          whether an answer without end-of-text is left out of the preferences
    digest(args)              a digest of what the rewards depend on
"""

import zlib

from data import encode_all
from runtime.errors import UserError
from runtime.rows import read_and_report
from tasks import hh, imdb, own_file, reviews, tldr

TASKS = {"reviews": reviews, "imdb": imdb, "imdb-small": imdb, "hh": hh, "tldr": tldr}


def task_of(args):
    """The module of --task, or of --data."""
    return own_file if args.data else TASKS[args.task]


MOST_EVALUATED = 2500       # about as many held-out prompts as hh has


def evaluated(held_out):
    """What the evaluations during training use of a list of Encoded: at most MOST_EVALUATED, chosen
    by a checksum, so that a large file does not make training wait for them."""
    if len(held_out) <= MOST_EVALUATED:
        return held_out
    print(f"evaluating on {MOST_EVALUATED:,} of {len(held_out):,} held-out prompts during training")
    checksums = [zlib.crc32(repr(item.prompt).encode()) for item in held_out]
    chosen = sorted(range(len(held_out)), key=lambda i: (checksums[i], i))[:MOST_EVALUATED]
    return [held_out[i] for i in sorted(chosen)]


def encode_splits(splits, name, tokenizer, args):
    """Encode (training, held-out) lists of Preference for rows of args.row_length and print how
    many were kept. Returns two lists of Encoded. Raises UserError if nothing is left to train on.
    """
    training, held_out = [
        read_and_report(f"{name}, {split}", args.strict, encode_all, rows, tokenizer,
                        args.row_length)
        for split, rows in zip(["training", "held out"], splits)]
    if not training:
        raise UserError(f"{name}: no row is left to train on")
    return training, held_out


def held_out_pairs(tokenizer, row_length, args):
    """The held-out preferences, a list of Encoded; empty if train_dpo.py has not sampled them."""
    task = task_of(args)
    name = task.name(args)
    if task.open_reward and not name.exists():
        print(f"no {name} yet, so no pairs to measure accuracy on: train_dpo.py writes them")
        return []
    return read_and_report(f"{name}, held out", args.strict, encode_all, task.held_out(args),
                           tokenizer, row_length)


def held_out_prompts(items, tokenizer, args):
    """At most --eval-prompts held-out prompts to measure on, as texts; items are those of
    held_out_pairs. Raises UserError if there are fewer than two, which have no standard error."""
    prompts = task_of(args).prompts(items, tokenizer, args)
    if len(prompts) < 2:
        raise UserError(f"{args.task or args.data}: fewer than two held-out prompts to measure on")
    return prompts
