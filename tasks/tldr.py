"""OpenAI's summaries of Reddit posts (TL;DR). A prompt is

    SUBREDDIT: r/...

    TITLE: ...

    POST: ...

    TL;DR:

SFT trains on 116,722 summaries that people wrote of their own posts. The comparisons are those of
batches 3 to 10, split "train"; held out are the validation splits, also of batch 11.
"""

from data import Preference, to_preference
from runtime.files import cache_folder, download
from runtime.rows import (
    parse_preference,
    read_and_report,
    read_rows,
    string_at,
    tldr_answer,
    tldr_prompt,
    unusable,
)
from tasks.task import Task

URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
MOST_HELD_OUT = 2500    # about as many as hh has; all of them, tens of thousands, would be too slow


class TLDR(Task):
    name = "tldr"
    summary = "summaries of Reddit posts"
    dpo = {"beta": 0.5}         # Appendix B

    def preferences(self, args):
        training = read_and_report("tldr, training", args.strict, load_comparisons, False,
                                   args.data_dir)
        return training, self.held_out(args)

    def check(self, args):
        for batch in range(3, 12):
            comparisons_file(batch, args.data_dir)

    def held_out(self, args):
        return read_and_report("tldr, held out", args.strict, load_comparisons, True,
                               args.data_dir)

    def sft_examples(self, args):
        training = read_and_report("tldr summaries, training", args.strict, load_summaries, False,
                                   args.data_dir)
        held_out = read_and_report("tldr summaries, held out", args.strict, load_summaries, True,
                                   args.data_dir)
        return training, held_out

    def as_prompt(self, text, args):
        """A text as the post of a prompt."""
        if text.endswith("TL;DR:"):
            return text
        return tldr_prompt({"subreddit": "AskReddit", "title": "", "post": text})


def load_comparisons(held_out, folder, skipped):
    """The comparisons that are held out, or the others; each file is downloaded once.

    folder: where the files are or will be downloaded to; None is torch's cache. Returns a list of
    Preference. Raises UserError.
    """
    def parse(row):
        is_held_out = string_at(row, "split") != "train"
        return parse_preference(row) if is_held_out == held_out else None
    found = []
    for batch in [*range(3, 12)] if held_out else [*range(3, 11)]:
        found += read_rows(comparisons_file(batch, folder), parse, skipped)
    return [to_preference(*row) for row in limit_held_out(found, held_out, skipped)]


def comparisons_file(batch, folder):
    """The path of a file of comparisons, which is downloaded once; folder as above."""
    file_name = f"comparisons/batch{batch}.json"
    return download(f"{URL}/dataset/{file_name}", (folder or cache_folder()) / file_name)


def load_summaries(held_out, folder, skipped):
    """The summaries that SFT learns from, a list of Preference without pairs; folder as above."""
    file_name = f"tldr_3_filtered/{'valid' if held_out else 'train'}.jsonl"
    path = download(f"{URL}/datasets/{file_name}", (folder or cache_folder()) / file_name)

    def parse(row):
        prompt, answer = tldr_prompt(row), tldr_answer(string_at(row, "summary"))
        reason = unusable(prompt, [answer])
        return reason or Preference(prompt, [answer], [])
    return limit_held_out(read_rows(path, parse, skipped), held_out, skipped)


def limit_held_out(rows, held_out, skipped):
    """The first MOST_HELD_OUT held-out rows; the others are counted as skipped."""
    if not held_out:
        return rows
    skipped[f"held-out row beyond the first {MOST_HELD_OUT:,}"] += max(0, len(rows) - MOST_HELD_OUT)
    return rows[:MOST_HELD_OUT]
