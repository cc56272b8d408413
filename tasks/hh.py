r"""Anthropic's helpful-base dialogues (HH): 43,835 pairs, and a test file of 2,354, held out.

The prompt is the dialogue up to its last "\n\nAssistant:". SFT trains on the chosen answers.
"""

from data import load_preferences
from runtime.files import cache_folder, download
from runtime.hub import HUB
from runtime.rows import as_dialogue, read_and_report
from tasks.task import Task

URL = f"{HUB}/datasets/Anthropic/hh-rlhf/resolve/main"
SHA256 = {"train": "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
          "test": "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b"}


class HH(Task):
    name = "hh"
    summary = "Anthropic's helpful dialogues"

    def preferences(self, args):
        training = read_and_report("hh, training", args.strict, load_dialogues, "train",
                                   args.data_dir)
        return training, self.held_out(args)

    def held_out(self, args):
        return read_and_report("hh, held out", args.strict, load_dialogues, "test", args.data_dir)

    def as_prompt(self, text, args):
        """A question as a dialogue of one turn."""
        return as_dialogue(text)


def load_dialogues(part, folder, skipped):
    """The preferences of the "train" or the "test" file, which is downloaded once.

    folder: where the files are or will be downloaded to; None is torch's cache. Raises UserError.
    """
    file_name = f"helpful-base/{part}.jsonl.gz"
    path = (folder or cache_folder()) / file_name
    return load_preferences(download(f"{URL}/{file_name}", path, SHA256[part]), skipped)
