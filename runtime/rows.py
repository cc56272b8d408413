"""Rows of JSON lines files: the layouts of a preference or a text, what is left out and why.

docs/preferences.md has a table of the layouts. A parsed row is (prompt, answers, levels) or
(prompt, answers, levels, unfinished). levels: lists of indices of answers, the best level first.
Each answer of a level is better than all answers of the levels after it; those of one level tie.
"""

import json
from collections import Counter

from runtime.errors import UserError
from runtime.json_lines import read_objects

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"       # the turns of Anthropic's dialogues


def as_dialogue(text):
    """A question as a dialogue of one turn, unless it is a dialogue."""
    return text if text.startswith(HUMAN) else f"{HUMAN} {text}{ASSISTANT}"


class Skipped(Counter):
    """How many rows were left out or cut, by reason. With strict, the first one is an error. Also
    what the user should know of the rows that were read: sentences in `notes`, and the keys that
    were not read in `ignored`."""

    def __init__(self, strict=False):
        super().__init__()
        self.strict = strict
        self.notes, self.ignored = [], set()
        self.rankings = set()           # what "ranking" lists in this file; see levels_of_ranking

    def add(self, reason, where):
        """where: the file and line, or the beginning of the prompt. Raises UserError if strict."""
        if self.strict:
            raise UserError(f"{where}: {reason}, and --strict is set")
        self[reason] += 1

    def note(self, sentence):
        """Add a sentence to the notes, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)


def read_and_report(name, strict, read, *arguments):
    """Call read(*arguments, skipped), a reader of rows. If some were skipped or cut, print how many
    and why, and how many rows were kept; print its notes. Returns the rows."""
    skipped = Skipped(strict)
    found = read(*arguments, skipped)
    reasons = "; ".join(f"{count:,} x {reason}" for reason, count in skipped.items() if count)
    if reasons:
        print(f"{name}: {len(found):,} rows; skipped or cut: {reasons}")
    for note in skipped.notes:
        print(f"{name}: {note}")
    if skipped.ignored:
        print(f"{name}: ignored keys: {quoted(sorted(skipped.ignored))}; text that belongs to the "
              "prompt must be part of it")
    return found


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


# ------------------------------------------------------------------------------------------------
# Layouts of a preference
# ------------------------------------------------------------------------------------------------


def parse_preference(row, skipped=None):
    """A JSON object as a parsed row, or the reason (a str) why it teaches nothing. Adds to the
    notes of `skipped`, a Skipped. Raises ValueError for a malformed row."""
    skipped = Skipped() if skipped is None else skipped
    used = {"prompt", "chosen", "rejected"}
    if "chosen" in row and "rejected" in row:
        if any(is_chat(row.get(key)) for key in used):
            parsed = parse_chats(row, skipped)
        elif "prompt" in row:
            parsed = parse_pair(row)
        else:
            parsed = parse_dialogues(row)
    elif "answers" in row or "responses" in row:
        # Our own preferences.jsonl also has "rewards", from which the ranking was made.
        used = {"prompt", "answers", "responses", "ranking", "unfinished", "rewards"}
        if "ranking" not in row:
            used.add("scores")
        parsed = parse_answers(row, skipped)
    elif "summaries" in row:
        used = {"info", "summaries", "choice"}
        parsed = parse_summaries(row)
    else:
        raise ValueError(what_to_do(row))
    return checked(parsed, row, used, skipped)


def checked(parsed, row, used, skipped):
    """A parsed row, or the reason why it teaches nothing. used: the keys that were read."""
    skipped.ignored |= {key for key in row.keys() - used if row[key] not in (None, "", [], {})}
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


def parse_pair(row):
    """The layout {"prompt", "chosen", "rejected"}, where one of the last two may be a list."""
    prompt = string_at(row, "prompt")
    chosen, rejected = [row[key] if is_list_of(str, row[key]) else [string_at(row, key)]
                        for key in ("chosen", "rejected")]
    if min(len(chosen), len(rejected)) != 1:
        raise ValueError('expected one string under "chosen" or "rejected", and one or several '
                         'under the other')
    indices = list(range(len(chosen + rejected)))
    return prompt, chosen + rejected, [indices[:len(chosen)], indices[len(chosen):]]


def parse_answers(row, skipped):
    """The layout {"prompt", "answers" or "responses", "ranking" or "scores"}, with or without
    "unfinished"."""
    key = "answers" if "answers" in row else "responses"
    prompt, answers, unfinished = string_at(row, "prompt"), row[key], row.get("unfinished", [])
    if not (is_list_of(str, answers) and len(answers) > 1):
        raise ValueError(f'expected a list of at least two strings under "{key}"')
    if not (is_list_of(int, unfinished) and set(unfinished) <= set(range(len(answers)))):
        raise ValueError(f'expected a list of some of 0 to {len(answers) - 1} under "unfinished"')
    if "scores" in row and "ranking" not in row:
        levels = levels_of_scores(row["scores"], len(answers))
    else:
        levels = levels_of_ranking(row.get("ranking"), len(answers), skipped)
    if len(levels) == 1:
        return "answers that all tie"
    return prompt, answers, levels, unfinished


def levels_of_ranking(ranking, n_answers, skipped):
    """A ranking lists the indices of the answers, best first; or, if numbers are equal, the rank of
    each answer, from 0 or 1. Raises ValueError if a file may have both."""
    indices = list(range(n_answers))
    equal = is_list_of(int, ranking) and len(set(ranking)) < len(ranking) == n_answers
    if equal and 0 <= min(ranking) <= max(ranking) <= n_answers:
        skipped.rankings.add("ranks")
        skipped.note('"ranking" has equal numbers: read as the rank of each answer, lowest is best')
        levels = levels_of_scores([-rank for rank in ranking], n_answers)
    elif is_list_of(int, ranking) and sorted(ranking) == indices:
        if [ranking[i] for i in ranking] != indices:
            skipped.rankings.add("indices")     # as ranks, [1, 2, 0] would mean another order
        levels = [[i] for i in ranking]
    else:
        raise ValueError(f'expected each of 0 to {n_answers - 1} once, best first, under "ranking"')
    if len(skipped.rankings) > 1:
        raise ValueError('"ranking" has equal numbers in some rows, as ranks do, but may list '
                         'indices in others: write "scores" instead, highest is best')
    return levels


def levels_of_scores(scores, n_answers):
    """Scores of the answers, the highest the best. Equal scores tie."""
    if not (isinstance(scores, list) and len(scores) == n_answers
            and all(type(score) in (int, float) and score - score == 0 for score in scores)):
        raise ValueError(f'expected a list of {n_answers} finite numbers under "scores"')
    return [[i for i in range(n_answers) if scores[i] == level]
            for level in sorted(set(scores), reverse=True)]


DIFFER = "dialogues that differ before the last answer"


def parse_dialogues(row):
    """The layout {"chosen", "rejected"}: two dialogues that differ in their last turn."""
    chosen, rejected = string_at(row, "chosen"), string_at(row, "rejected")
    if ASSISTANT not in chosen or ASSISTANT not in rejected:
        raise ValueError(what_to_do(row))
    start = chosen.rindex(ASSISTANT) + len(ASSISTANT)
    prompt, answers = chosen[:start], [chosen[start:], rejected[start:]]
    if not rejected.startswith(prompt) or any(turn in answer for answer in answers
                                              for turn in (HUMAN, ASSISTANT)):
        return DIFFER
    return prompt, answers, [[0], [1]]


def parse_summaries(row):
    """The layout {"info", "summaries", "choice"}."""
    info, summaries, choice = row.get("info"), row["summaries"], row.get("choice")
    if not (is_list_of(dict, summaries) and len(summaries) == 2):
        raise ValueError('expected a list of two objects under "summaries"')
    if not (type(choice) is int and choice in (0, 1) and isinstance(info, dict)):
        raise ValueError('expected 0 or 1 under "choice", and an object under "info"')
    answers = [tldr_answer(string_at(summary, "text")) for summary in summaries]
    return tldr_prompt(info), answers, [[choice], [1 - choice]]


def tldr_prompt(post):
    """The prompt for a Reddit post, a JSON object with "subreddit", "title" and "post"."""
    return (f"SUBREDDIT: r/{string_at(post, 'subreddit')}\n\nTITLE: {string_at(post, 'title')}\n\n"
            f"POST: {string_at(post, 'post')}\n\nTL;DR:")


def tldr_answer(summary):
    """A summary as it follows "TL;DR:", after one space. Some files have the space and others do
    not, and SFT and DPO must agree."""
    return f" {summary.strip()}"


# ------------------------------------------------------------------------------------------------
# Layouts of a text for SFT, and chats
# ------------------------------------------------------------------------------------------------


def parse_example(row, skipped):
    """A JSON object with one answer, for SFT, as a parsed row; all others as parse_preference."""
    if "chosen" in row or "label" in row and "completion" in row:
        return parse_preference(row, skipped)
    if "messages" in row:
        used, parsed = {"prompt", "messages"}, parse_chat(row, "messages", skipped)
    elif is_chat(row.get("completion")):
        used, parsed = {"prompt", "completion"}, parse_chat(row, "completion", skipped)
    elif "completion" in row:
        used = {"prompt", "completion"}
        parsed = string_at(row, "prompt"), [string_at(row, "completion")], [[0]]
    elif "text" in row:
        used, parsed = {"text"}, ("", [string_at(row, "text")], [[0]])
    else:
        return parse_preference(row, skipped)
    return checked(parsed, row, used, skipped)


NO_TURNS = 'chat whose roles do not alternate, "prompt" included'
TURNS = {"system": "", "user": f"{HUMAN} ", "assistant": f"{ASSISTANT} "}


def is_chat(value):
    """Whether a value is a list of messages."""
    return is_list_of(dict, value) and value != []


def parse_chats(row, skipped):
    """The layout {"chosen", "rejected"}, each a list of messages, with or without "prompt"."""
    chosen, rejected = parse_chat(row, "chosen", skipped), parse_chat(row, "rejected", skipped)
    if isinstance(chosen, str) or isinstance(rejected, str):
        return NO_TURNS
    if chosen[0] != rejected[0]:
        return DIFFER
    return chosen[0], chosen[1] + rejected[1], [[0], [1]]


def parse_chat(row, key, skipped):
    """The messages under a key as a parsed row: the last one, the assistant's, is the answer. Those
    under "prompt" go before them, unless they are repeated there."""
    prompt, messages = messages_at(row, "prompt", "user"), messages_at(row, key, "assistant")
    if not all(message in messages for message in prompt):
        messages = prompt + messages
    roles = [role for role, _ in messages]
    if "user" not in roles or roles[-1] != "assistant":
        raise ValueError(f'found the keys {quoted(row)}; expected a user message, and one of the '
                         f'assistant at the end of "{key}"')
    turns = roles[1:] if roles[0] == "system" else roles
    if "system" in turns or any(a == b for a, b in zip(turns, turns[1:])):
        return NO_TURNS
    skipped.note('chats are written as "\\n\\nHuman:" and "\\n\\nAssistant:" turns, a system '
                 'message as the text before them')
    text = "".join(TURNS[role] + content for role, content in messages[:-1])
    return text + ASSISTANT, [f" {messages[-1][1]}"], [[0]]


def messages_at(row, key, role):
    """The messages under a key, as (role, content). A string is one message of that role."""
    value = row.get(key) or []
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not is_list_of(dict, messages):
        raise ValueError(f'expected a string or a list of messages under "{key}"')
    for message in messages:
        if message.get("role") not in list(TURNS):
            raise ValueError('expected messages with "content" and "role" ("system", "user" or '
                             f'"assistant"), not {json.dumps(message)[:40]}')
    return [(message["role"], string_at(message, "content")) for message in messages]


# ------------------------------------------------------------------------------------------------
# Keys and values
# ------------------------------------------------------------------------------------------------


def what_to_do(row):
    """What to do about a row of no known layout, in one sentence that names its keys."""
    known = ["prompt", "chosen", "rejected", "answers", "completion", "messages", "text"]
    misspelt = [key for key in row if key not in known and key.strip().lower() in known]
    if misspelt:
        hint = f"rename {quoted(misspelt)} to {quoted(key.strip().lower() for key in misspelt)}"
    elif "chosen" in row and "rejected" in row:
        hint = 'expected a "prompt", or dialogues with "\\n\\nAssistant:" turns'
    elif "label" in row and "completion" in row:
        hint = 'a label of a single answer (KTO) is no comparison; expected "chosen" and "rejected"'
    elif row.keys() & {"completion", "messages", "text"}:
        hint = 'one answer is enough for SFT, but DPO needs "chosen" and "rejected"'
    else:
        hint = ('expected "prompt", "chosen" and "rejected" (for SFT, "prompt" and "completion"), '
                'or another layout of docs/preferences.md')
    return f"found {f'the keys {quoted(row)}' if row else 'no keys'}; {hint}"


def quoted(keys):
    """The first eight keys, as they stand in JSON and at most 20 characters each."""
    return ", ".join(f'"{json.dumps(key)[1:-1][:20]}"' for key in list(keys)[:8])


def is_list_of(kind, value):
    """Whether a value is a list of values of exactly this type."""
    return isinstance(value, list) and all(type(item) is kind for item in value)


def string_at(row, key):
    """The string under a key of a JSON object. Raises ValueError if there is none."""
    if isinstance(row.get(key), list):
        raise ValueError(f'expected a string under "{key}", not a list; a file of columns must be '
                         'written as one object per line')
    if not isinstance(row.get(key), str):
        raise ValueError(f'expected a string under "{key}"')
    return row[key]


# ------------------------------------------------------------------------------------------------
# Notes on a whole file
# ------------------------------------------------------------------------------------------------

ENDS = ["<|endoftext|>", "</s>", "<|im_end|>", "<eos>", "<|eot_id|>", "<end_of_turn>", "<|end|>",
        "<|end_of_text|>"]
TEMPLATES = ["<|im_start|>", "[INST]", "<|user|>", "<|start_header_id|>", "<start_of_turn>",
             "<|endoftext|>"]


def note_markers(preferences, skipped):
    """Note the control tokens of other models' files if half of the answers end with one or half of
    the prompts contain one. preferences: a list of data.Preference."""
    prompts = [preference.prompt for preference in preferences]
    answers = [answer.rstrip() for preference in preferences for answer in preference.answers]
    for marker in ENDS:
        n = sum(answer.endswith(marker) for answer in answers)
        if n >= len(answers) / 2:
            skipped.note(f'{n:,} of {len(answers):,} answers end with "{marker}", which is learned '
                         "as text: remove it, since end-of-text is added to each answer")
    for marker in TEMPLATES:
        n = sum(marker in prompt for prompt in prompts)
        if n >= len(prompts) / 2:
            skipped.note(f'{n:,} of {len(prompts):,} prompts contain "{marker}", which is text to '
                         'GPT-2: write them without the template, or as messages')


def note_repetitions(preferences, skipped):
    """Note how many pairs repeat or contradict another. All of them are kept."""
    stated = Counter((preference.prompt, preference.answers[w], preference.answers[l])
                     for preference in preferences for w, l in preference.pairs)
    repeated = sum(stated.values()) - len(stated)
    contradicted = sum((prompt, l, w) in stated for prompt, w, l in stated) // 2
    if repeated:
        skipped.note(f"{repeated:,} x a pair that repeats another (kept)")
    if contradicted:
        skipped.note(f"{contradicted:,} x two answers preferred in both directions (kept)")
