"""Your own preferences: --data FILE, in any layout that data.load_preferences reads. One prompt in
ten is held out (what_decides), and SFT trains on the best answers. A file of texts is enough for
SFT."""

import functools

from data import best_answers, is_held_out, load_examples, load_preferences
from runtime.rows import ASSISTANT, HUMAN, as_dialogue, read_and_report
from tasks.task import Task


class OwnFile(Task):
    name = "own file"

    def preferences(self, args):
        return read_split(args.data, args)

    def sft_examples(self, args):
        training, held_out = read_split(args.data, args, load_examples)
        return best_answers(training), best_answers(held_out)

    def check(self, args):
        load_preferences(args.data)         # SFT can use files that DPO cannot

    def source(self, args):
        return args.data

    def as_prompt(self, text, args):
        """A question as a dialogue of one turn, if the file is there and has dialogues."""
        return as_dialogue(text) if has_dialogues(args.data) else text


@functools.cache
def has_dialogues(path):
    return path.is_file() and load_examples(path)[0].prompt.startswith(HUMAN)


def read_split(path, args, load=load_preferences):
    """(training, held-out) lists of Preference from a file."""
    rows = read_and_report(path, args.strict, load, path)
    training, held_out = [], []
    for row in rows:
        split = held_out if is_held_out(what_decides(row)) else training
        split.append(row)
    share = len(held_out) / len(rows)
    if len(rows) >= 100 and not 0.05 < share < 0.2:
        print(f"{path}: {share:.0%} of the rows are held out, not a tenth: prompts decide, and "
              "many rows have the same one")
    return training, held_out


def what_decides(preference):
    """The text that decides whether a preference is held out: the prompt, or the first answer if
    the prompt is empty. Of a dialogue, only what comes before the answer to the first human turn,
    so that its continuations go with it."""
    before, human, dialogue = preference.prompt.partition(HUMAN)
    return before + human + dialogue.split(ASSISTANT)[0] or preference.answers[0]
