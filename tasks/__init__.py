"""The tasks: where texts, preferences and, for some, the reward come from.

    reviews     a grammar writes film reviews; C.1 in miniature, and the default
    imdb        real film reviews; C.1 itself. imdb-small: the same with a small model
    hh          Anthropic's helpful dialogues
    tldr        summaries of Reddit posts
    own_file    your own preferences, --data

A task is a class; tasks/task.py says what it has to offer, and sampled.py how the tasks with a
reward make their preferences.
"""

from data import encode_all
from runtime.errors import UserError
from runtime.rows import read_and_report
from tasks.hh import HH
from tasks.imdb import IMDb, IMDbSmall
from tasks.own_file import OwnFile
from tasks.reviews import Reviews
from tasks.tldr import TLDR

TASKS = {task.name: task for task in [Reviews(), IMDb(), IMDbSmall(), HH(), TLDR()]}
OWN_FILE = OwnFile()


def task_of(args):
    """The task of --task, or of --data."""
    return OWN_FILE if args.data else TASKS[args.task]


def held_out_pairs(tokenizer, row_length, args):
    """The held-out preferences, a list of Encoded; empty if train_dpo.py has not sampled them."""
    task = task_of(args)
    source = task.source(args)
    if task.has_reward and not source.exists():
        print(f"no {source} yet, so no pairs to measure accuracy on: train_dpo.py writes them")
        return []
    return read_and_report(f"{source}, held out", args.strict, encode_all, task.held_out(args),
                           tokenizer, row_length)


def held_out_prompts(items, tokenizer, args):
    """At most --eval-prompts held-out prompts to measure on, as texts; items are those of
    held_out_pairs. Raises UserError if there are fewer than two, which have no standard error."""
    prompts = task_of(args).prompts(items, tokenizer, args)
    if len(prompts) < 2:
        raise UserError(f"{args.task or args.data}: fewer than two held-out prompts to measure on")
    return prompts
