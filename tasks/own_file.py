"""Your own preferences: --data FILE, in any form that data.load_preferences reads. One prompt in
ten is held out (what_decides), and SFT trains on the best answers."""

from data import best_answers, is_held_out, load_preferences
from runtime.rows import ASSISTANT, HUMAN, read_and_report
from tasks.task import Task


class OwnFile(Task):
    name = "own file"

    def preferences(self, args):
        return read_split(args.data, args)

    def sft_examples(self, args):
        training, held_out = self.preferences(args)
        return best_answers(training), best_answers(held_out)

    def source(self, args):
        return args.data


def read_split(path, args):
    """(training, held-out) lists of Preference from a file."""
    rows = read_and_report(path, args.strict, load_preferences, path)
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
    the prompt is empty. Of a dialogue the first human turn, so that its continuations go with it.
    """
    if preference.prompt.startswith(HUMAN):
        return preference.prompt.split(ASSISTANT)[0]
    return preference.prompt or preference.answers[0]
