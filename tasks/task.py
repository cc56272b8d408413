"""What a task is. tasks/hh.py is a short example; CONTRIBUTING.md says how to add one."""

import zlib

from data import best_answers, check_rankings, encode_all
from runtime.errors import UserError
from runtime.rows import read_and_report

MOST_EVALUATED = 2500       # held-out prompts; about as many as hh has


class Task:
    """Where texts and preferences come from, and the settings that differ from the paper's.

    `args` are the parsed flags of a script. Methods that read files raise UserError.
    """

    name = ""                   # as --task has it
    summary = ""                # one line for --help

    # -- settings --------------------------------------------------------------------------------

    tokenizer = "gpt2"          # with gpt2, SFT starts from GPT-2, which is downloaded; with one of
                                # the other tasks.tokenizers, from random weights
    random = {}                 # differences from train_sft.RANDOM, for random weights
    dpo = {}                    # differences from train_dpo.DEFAULTS
    reward_lr = 1e-5            # of experiments.reward_model
    ppo_preset = "pretrained"   # of experiments.ppo
    max_new_tokens = 96         # of a sampled answer
    least_block_size = 2        # of a model that has room for the task's texts
    answers_must_end = True     # whether a sampled answer without end-of-text is unusable

    # -- texts and preferences -------------------------------------------------------------------

    def sft_examples(self, args):
        """(training, held-out) lists of data.Preference, one answer each and no pairs. Here, the
        best answers of the preferences."""
        training, held_out = self.preferences(args)
        return best_answers(training), best_answers(held_out)

    def preferences(self, args):
        """(training, held-out) lists of data.Preference."""
        raise NotImplementedError

    def check(self, args):
        """Raise UserError if files are missing that only DPO needs. Called before SFT, which takes
        time, and which reads its own files first."""

    def held_out(self, args):
        """The second of these alone."""
        return self.preferences(args)[1]

    def encoded(self, splits, name, tokenizer, args):
        """(training, held-out) lists of Preference as lists of Encoded, for rows of
        args.row_length; of many held-out ones a fixed part. Prints what was left out or cut; `name`
        says of what. Raises UserError if nothing is left to train on."""
        training, held_out = [
            read_and_report(f"{name}, {split}", args.strict, encode_all, rows, tokenizer,
                            args.row_length)
            for split, rows in zip(["training", "held out"], splits)]
        if not training:
            raise UserError(f"{name}: no row is left to train on")
        return training, evaluation_subset(held_out)

    def encoded_preferences(self, tokenizer, args):
        """The same of the preferences. Raises UserError if --loss needs rankings without ties and
        some are not."""
        splits = self.encoded(self.preferences(args), self.source(args), tokenizer, args)
        if getattr(args, "on_rankings", False):
            check_rankings(splits[0] + splits[1], self.source(args))
        return splits

    def source(self, args):
        """What messages call the preferences: a name or the path of their file."""
        return self.name

    def prompts(self, items, tokenizer, args):
        """At most --eval-prompts held-out prompts to measure on, as texts. items: the held-out
        preferences, a list of Encoded. Here, their prompts without repetitions."""
        distinct = dict.fromkeys(tokenizer.decode(item.prompt[1:]) for item in items)
        return list(distinct)[:args.eval_prompts]

    def as_prompt(self, text, args):
        """What a user typed, in the form of the task's prompts."""
        return text

    # -- the reward ------------------------------------------------------------------------------

    # Whether the task has a ground-truth reward. Such a task has no preferences of its own: they
    # are sampled and ranked; see tasks/sampled.py.
    has_reward = False

    def sample_preferences(self, model, tokenizer, sample_answers, args):
        """If the task has a reward, sample and rank answers; see tasks/sampled.py."""

    def grades(self, args, reference, tokenizer):
        """{measure: function} for the table at the end. The function takes a list of texts, each a
        prompt with its answer, and returns a number for each. "reward" is one of the measures if
        the task has a reward."""
        return {}


def evaluation_subset(held_out):
    """At most MOST_EVALUATED of a list of Encoded, chosen by a checksum, so that evaluations of a
    large file do not make training wait."""
    if len(held_out) <= MOST_EVALUATED:
        return held_out
    print(f"evaluating on {MOST_EVALUATED:,} of {len(held_out):,} held-out prompts")
    checksums = [zlib.crc32(repr(item.prompt).encode()) for item in held_out]
    chosen = sorted(range(len(held_out)), key=lambda i: (checksums[i], i))[:MOST_EVALUATED]
    return [held_out[i] for i in sorted(chosen)]
