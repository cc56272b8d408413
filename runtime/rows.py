"""Rows of JSON lines files: the four forms of a preference, and what is left out and why.

data.load_preferences documents the forms. A parsed row is (prompt, answers, ranking), or for the
form with a ranking, (prompt, answers, ranking, unfinished).
"""

import gzip
import json
import zlib
from collections import Counter

from runtime.errors import UserError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"       # the turns of Anthropic's dialogues


class Skipped(Counter):
    """How many rows were left out or cut, by reason. With strict, the first one is an error."""

    def __init__(self, strict=False):
        super().__init__()
        self.strict = strict

    def add(self, reason, where):
        """where: the file and line, or the beginning of the prompt. Raises UserError if strict."""
        if self.strict:
            raise UserError(f"{where}: {reason}, and --strict is set")
        self[reason] += 1


def read_and_report(name, strict, read, *arguments):
    """Call read(*arguments, skipped), a reader of rows. If some were skipped or cut, print how many
    and why, and how many rows were kept. Returns the rows."""
    skipped = Skipped(strict)
    found = read(*arguments, skipped)
    reasons = "; ".join(f"{count:,} x {reason}" for reason, count in skipped.items() if count)
    if reasons:
        print(f"{name}: {len(found):,} rows; skipped or cut: {reasons}")
    return found


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def read_rows(path, parse, skipped):
    """Read a file and return what parse(row) makes of each of its rows. parse returns None for a
    row that is not wanted or the reason (a str) for one that teaches nothing, which is counted in
    `skipped`; it raises ValueError for a malformed row. Raises UserError, with the line."""
    parsed = []
    for line_number, row in read_objects(path):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, not {json.dumps(row)[:40]}")
            result = parse(row)
        except ValueError as error:
            raise UserError(f"{path}, line {line_number}: {error}") from error
        if isinstance(result, str):
            skipped.add(result, f"{path}, line {line_number}")
        elif result is not None:
            parsed.append(result)
    return parsed


def read_objects(path):
    """Yield (line number, object) for each line of a JSON lines file, gzipped or not."""
    line_number = 0
    open_file = gzip.open if str(path).endswith(".gz") else open
    try:
        with open_file(path, "rb") as file:
            for line_number, line in enumerate(file, 1):
                line = line.decode("utf-8-sig" if line_number == 1 else "utf-8")
                if line.strip():
                    yield line_number, json.loads(line, object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {line_number}: not UTF-8 text") from error
    except KeyError as error:
        raise UserError(f"{path}, line {line_number}: the key {error} appears twice") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {line_number}: not JSON; expected one object per line") \
            from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read: {reason}") from error


def unique_keys(pairs):
    """A JSON object as a dict. By default, json silently keeps the last of two equal keys."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise KeyError(key)
        found[key] = value
    return found


# ------------------------------------------------------------------------------------------------
# Forms of a preference
# ------------------------------------------------------------------------------------------------


def string_at(row, key):
    """The string under a key of a JSON object. Raises ValueError if there is none."""
    if isinstance(row.get(key), list):
        raise ValueError(f'expected a string under "{key}", not a list: join the messages of a '
                         'chat to one text each for "prompt", "chosen" and "rejected"')
    if not isinstance(row.get(key), str):
        raise ValueError(f'expected a string under "{key}"')
    return row[key]


def parse_preference(row):
    """A JSON object as a parsed row, or the reason (a str) why it teaches nothing. Raises
    ValueError for a malformed row."""
    if "answers" in row:
        parsed = parse_ranking(row)
    elif "prompt" in row:
        prompt = string_at(row, "prompt")
        parsed = prompt, [string_at(row, "chosen"), string_at(row, "rejected")], [0, 1]
    elif "summaries" in row:
        parsed = parse_summaries(row)
    else:
        parsed = parse_dialogues(row)
    if isinstance(parsed, str):
        return parsed
    prompt, answers = parsed[:2]
    if prompt.strip() and all(answer.startswith(prompt) for answer in answers):
        raise ValueError("all answers repeat the prompt: leave it out of them, since they are "
                         "appended to it")
    return unusable(prompt, answers) or parsed


def unusable(prompt, answers):
    """Why a prompt with answers is left out, or None."""
    if not all(answer.strip() for answer in answers):
        return "empty answer"
    if len(set(answers)) < len(answers):
        return "equal answers"
    try:
        "".join([prompt, *answers]).encode()
    except UnicodeEncodeError:
        return "half a character (a lone surrogate)"
    return None


def parse_ranking(row):
    """The form {"prompt", "answers", "ranking"}, with or without "unfinished"."""
    prompt, answers, ranking = string_at(row, "prompt"), row["answers"], row.get("ranking")
    unfinished = row.get("unfinished", [])
    if not (isinstance(answers, list) and len(answers) > 1
            and all(isinstance(answer, str) for answer in answers)):
        raise ValueError('expected a list of at least two strings under "answers"')
    if not (isinstance(ranking, list) and all(type(i) is int for i in ranking)
            and sorted(ranking) == list(range(len(answers)))):
        raise ValueError(f'expected each of 0 to {len(answers) - 1} once, best first, '
                         'under "ranking"')
    if not (isinstance(unfinished, list) and all(type(i) is int for i in unfinished)
            and set(unfinished) <= set(ranking)):
        raise ValueError(f'expected a list of some of 0 to {len(answers) - 1} under "unfinished"')
    return prompt, answers, ranking, unfinished


def parse_dialogues(row):
    """The form {"chosen", "rejected"}: two dialogues that differ in their last turn."""
    chosen, rejected = string_at(row, "chosen"), string_at(row, "rejected")
    if ASSISTANT not in chosen or ASSISTANT not in rejected:
        raise ValueError('expected a "prompt", or dialogues with "\\n\\nAssistant:" turns')
    start = chosen.rindex(ASSISTANT) + len(ASSISTANT)
    prompt, answers = chosen[:start], [chosen[start:], rejected[start:]]
    if not rejected.startswith(prompt) or any(turn in answer for answer in answers
                                              for turn in (HUMAN, ASSISTANT)):
        return "dialogues that differ before the last answer"
    return prompt, answers, [0, 1]


def parse_summaries(row):
    """The form {"info", "summaries", "choice"}."""
    info, summaries, choice = row.get("info"), row["summaries"], row.get("choice")
    if not (isinstance(summaries, list) and len(summaries) == 2
            and all(isinstance(summary, dict) for summary in summaries)):
        raise ValueError('expected a list of two objects under "summaries"')
    if not (type(choice) is int and choice in (0, 1) and isinstance(info, dict)):
        raise ValueError('expected 0 or 1 under "choice", and an object under "info"')
    answers = [tldr_answer(string_at(summary, "text")) for summary in summaries]
    return tldr_prompt(info), answers, [choice, 1 - choice]


def tldr_prompt(post):
    """The prompt for a Reddit post, a JSON object with "subreddit", "title" and "post"."""
    return (f"SUBREDDIT: r/{string_at(post, 'subreddit')}\n\nTITLE: {string_at(post, 'title')}\n\n"
            f"POST: {string_at(post, 'post')}\n\nTL;DR:")


def tldr_answer(summary):
    """A summary as it follows "TL;DR:", after one space. Some files have the space and others do
    not, and SFT and DPO must agree."""
    return f" {summary.strip()}"
