"""Data: the tasks, preference files, and the packed row that every objective trains on.

The one idea: a preference is one row. A prompt and all its answers share it,

    tokens     <eot> The acting was | great !  <eot> | dull .  <eot> |  next prompt ...
    position     0    1    2     3  |   4   5    6   |   4  5    6   |  0 ...
    answer       0    0    0     0  |   1   1    1   |   2  2    2   |  0 ...        0 = prompt

each answer's positions restart right after the prompt, and an answer sees its prompt and itself,
never its siblings. So the prompt is computed once, nothing is padded but the end of a row, and
pairs, rankings of K answers and plain supervised text are all the same batch.

    python data.py                            # prints such a row, its mask, and counts

Reading order: the reviews task, tokenizers, files, the published tasks hh and tldr, the packed
row, batches.
Left out on purpose: worker processes and streaming. Preference data fits in memory, and packing
the batch of a step takes a few milliseconds.
"""

import gzip
import json
import random
import re
import shutil
import sys
import zlib
from collections import Counter, namedtuple
from dataclasses import dataclass, fields

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from model import HUB, UserError, cache, download

# ------------------------------------------------------------------------------------------------
# The reviews task: C.1 in miniature. A grammar writes film reviews, half of them favourable.
#
#     review   = [opener] sentence sentence verdict
#     sentence = clause "." | clause ", and" clause "." | clause ", but" clause "."
#     clause   = "The plot was" quality | "I" feeling "the plot"
#     opener   = "We saw it on Sunday."
#     verdict  = "A very good film." | "I would not recommend it." | "I would watch it again." | ...
#
# A quality is "good", "very good", "not good", ...; a feeling "liked", "really liked", "did not
# like". A verb agrees with its noun, "a" or "an" with the word after it. All this the grammar
# demands; what it writes makes sense besides: "and" joins two clauses of one sign, "but" two of
# opposite signs, most clauses are of the tone of the review, and the verdict always is.
# ------------------------------------------------------------------------------------------------

SINGULAR = "acting plot music script ending pacing dialogue humour photography story".split()
PLURAL = "actors jokes songs effects characters costumes".split()
WHO = ["I", "We", "My sister and I", "My friends and I"]
WHEN = ["last night", "on Sunday", "on a plane", "at home", "in May", "twice", "by chance"]
WORDS = {"superb": 0.8, "lovely": 0.7, "great": 0.6, "impressive": 0.6, "good": 0.4,
         "enjoyable": 0.4, "awful": -0.8, "poor": -0.7, "dull": -0.6, "annoying": -0.6,
         "weak": -0.4, "uneven": -0.4}
DEGREES = {"rather": 0.75, "very": 1.15, "extremely": 1.25}
NOT = -0.5      # negation flips and softens: "not superb" is mildly bad, "not awful" mildly good

# Every phrase that carries an opinion, and what it is worth, in [-1, 1].
FILM_QUALITIES = WORDS | {f"{d} {w}": n * v for d, n in DEGREES.items() for w, v in WORDS.items()}
QUALITIES = FILM_QUALITIES | {f"not {w}": NOT * v for w, v in WORDS.items()}
FEELINGS = {feeling: value for verb, past, v in [
    ("love", "loved", 0.8), ("enjoy", "enjoyed", 0.6), ("like", "liked", 0.4),
    ("dislike", "disliked", -0.6), ("hate", "hated", -0.8)]
    for feeling, value in [(past, v), (f"really {past}", 1.25 * v), (f"did not {verb}", NOT * v)]}
VERDICTS = {f"{'An' if q[0] in 'aeiou' else 'A'} {q} film": v
            for q, v in FILM_QUALITIES.items()} | {
    "I would recommend it": 0.8, "I would not recommend it": NOT * 0.8,
    "I would watch it again": 0.6, "I would not watch it again": NOT * 0.6}
BEFORE_BUT, AFTER_BUT, VERDICT = 0.5, 1.5, 2.0      # weights in the mean; any other clause has 1


def _any(phrases):
    return "(?:" + "|".join(phrases) + ")"


# An opinion wherever it stands, in well-formed text or not ...
OPINION = re.compile(
    rf"(?P<but>, but )?(?:[Tt]he (?P<subject>{_any(SINGULAR + PLURAL)}) (?:was|were) "
    rf"(?P<quality>{_any(QUALITIES)})|I (?P<feeling>{_any(FEELINGS)}) the "
    rf"(?P<object>{_any(SINGULAR + PLURAL)})|(?P<verdict>{_any(VERDICTS)}))\b"
    rf"(?P<next>(?=, but ))?")
# ... and a whole review, as the grammar writes it.
_CLAUSE = (rf"(?:[Tt]he (?:{_any(SINGULAR)} was|{_any(PLURAL)} were) {_any(QUALITIES)}"
           rf"|I {_any(FEELINGS)} the {_any(SINGULAR + PLURAL)})")
_SENTENCE = rf"(?=[TI]){_CLAUSE}(?:, (?:and|but) (?=[tI]){_CLAUSE})?\. "
REVIEW = re.compile(rf"(?:{_any(WHO)} (?:saw|watched) (?:it|this film) {_any(WHEN)}\. )?"
                    rf"{_SENTENCE}{_SENTENCE}{_any(VERDICTS)}\.")


def _value(opinion):
    """What one match of OPINION says of the film, in [-1, 1]."""
    return (QUALITIES.get(opinion["quality"]) or FEELINGS.get(opinion["feeling"])
            or VERDICTS.get(opinion["verdict"]))


def reward(text):
    """The ground truth: how favourable a review is, in [-1, 1]; text without an opinion has 0.

    The weighted mean of its opinions. In "A, but B" the stress is on B: A weighs a half, B one and
    a half. A verdict on the whole film weighs 2, any other clause 1. A mean, so that a policy
    gains nothing by writing more.
    """
    total = weight = 0.0
    for opinion in OPINION.finditer(text):
        w = (VERDICT if opinion["verdict"] else AFTER_BUT if opinion["but"]
             else BEFORE_BUT if opinion["next"] is not None else 1.0)
        total, weight = total + w * _value(opinion), weight + w
    return round(total / weight, 6) if weight else 0.0      # equal sums tie, in whatever order


def well_formed(text):
    """Whether the grammar accepts a review, to the letter."""
    return REVIEW.fullmatch(text) is not None


def write_review(rng):
    """One review, from a random.Random. A coin decides whether it is favourable (reward > 0)."""
    tone = rng.choice([1, -1])

    def phrase(table, sign):
        return rng.choice([p for p, value in table.items() if value * sign > 0])

    def clause(aspect, sign):
        if rng.random() < 0.3:
            return f"I {phrase(FEELINGS, sign)} the {aspect}"
        return f"the {aspect} {'was' if aspect in SINGULAR else 'were'} {phrase(QUALITIES, sign)}"

    while True:
        aspects = rng.sample(SINGULAR + PLURAL, 4)
        text = ""
        if rng.random() < 0.3:
            text = (f"{rng.choice(WHO)} {rng.choice(['saw', 'watched'])} "
                    f"{rng.choice(['it', 'this film'])} {rng.choice(WHEN)}. ")
        for _ in range(2):
            sign = tone if rng.random() < 0.93 else -tone
            sentence = clause(aspects.pop(), sign)
            if rng.random() < 0.6:
                joint = rng.choice(["and", "and", "but"])
                sign = sign if joint == "and" else -sign
                sentence += f", {joint} " + clause(aspects.pop(), sign)
            text += sentence[0].upper() + sentence[1:] + ". "
        text += phrase(VERDICTS, tone) + "."
        if reward(text) * tone > 0:
            return text


def prefixes(count, held_out, tokenizer, seed):
    """`count` distinct beginnings of fresh reviews, each 2 to 8 tokens long, as texts; all of them
    held out or none (see is_held_out), so that training and evaluation never share a prompt.
    Raises UserError where there are hardly so many."""
    rng, found, draws = random.Random(f"prefixes {seed}"), {}, 0
    while len(found) < count:
        draws += 1
        if draws > 1000 * (len(found) + 100):
            raise UserError(f"the reviews have hardly {count:,} different beginnings; lower "
                            f"{'--eval-prompts' if held_out else '--prefixes'}")
        ids = tokenizer.encode_ordinary(write_review(rng))[:rng.randint(2, 8)]
        text = tokenizer.decode(ids)
        if is_held_out(text) == held_out:
            found[text] = None
    return list(found)


def is_held_out(prompt):
    """One prompt in ten is kept for evaluation. Decided by the prompt alone, so that DPO, and SFT
    on a preference file, never train on it, whatever their seeds and the order of the file. (SFT
    on reviews learns to write whole ones from nothing; some begin like any prompt there is.)"""
    return zlib.crc32(prompt.encode("utf-8", "replace")) % 10 == 0


# ------------------------------------------------------------------------------------------------
# Tokenizers
# ------------------------------------------------------------------------------------------------

TOKENIZERS = ["reviews", "gpt2"]
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def get_tokenizer(name):
    """"gpt2", or "reviews": a tiktoken.Encoding of the 256 bytes, the words of the reviews task and
    end-of-text, so any text at all comes back as it went in. Raises UserError."""
    if name == "reviews":
        phrases = [*SINGULAR, *PLURAL, *WHO, *WHEN, *QUALITIES, *FEELINGS, *VERDICTS,
                   "the was were and but saw watched this"]
        words = {word for phrase in phrases for word in re.findall(r"\w+", phrase)}
        tokens = sorted({f" {word}" for word in words | {"The"}} | {"The", "My", "We"})
        ranks = {bytes([b]): b for b in range(256)}
        ranks |= {token.encode(): 256 + i for i, token in enumerate(tokens)}
        return tiktoken.Encoding("reviews", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": len(ranks)})
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:      # a network error of whatever kind, or an unwritable cache
        raise UserError(
            f"--tokenizer {name}: tiktoken could not load it ({type(error).__name__}); it needs "
            "the network once, or its files in the folder that TIKTOKEN_CACHE_DIR names") from error


# ------------------------------------------------------------------------------------------------
# Preferences: from files, and from sampled answers
# ------------------------------------------------------------------------------------------------

# A prompt, its answers, and which is better than which: pairs of (winner, loser) indices.
Preference = namedtuple("Preference", "prompt answers pairs")


class Skipped(Counter):
    """How many rows were left out or cut, by reason. strict: the first of them is an error."""

    def __init__(self, strict=False):
        super().__init__()
        self.strict = strict

    def add(self, reason, where):
        """where: the file and line, or the beginning of the prompt. Raises UserError if strict."""
        if self.strict:
            raise UserError(f"{where}: {reason}, and --strict is set")
        self[reason] += 1


def load_preferences(path, skipped=None):
    """Read a .jsonl or .jsonl.gz file with one of these objects a line; other keys are ignored:

        {"prompt": "...", "chosen": "...", "rejected": "..."}
        {"prompt": "...", "answers": ["...", ...], "ranking": [2, 0, 1]}      indices, best first
        {"chosen": "...", "rejected": "..."}      dialogues of "\\n\\nHuman:" and "\\n\\nAssistant:"
                                                  turns, alike up to the last (Anthropic's HH)
        {"info": {"subreddit": "...", "title": "...", "post": "..."},             (OpenAI's TL;DR)
         "summaries": [{"text": "..."}, {"text": "..."}], "choice": 1}

    Returns a list of Preference. A row that cannot teach anything is left out and counted by its
    reason in `skipped`, a Skipped. Raises UserError with the line of anything else that is wrong,
    or where no row is left.
    """
    skipped = Skipped() if skipped is None else skipped
    preferences = _read(path, _preference, skipped)
    if not preferences:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in skipped.items())
        raise UserError(f"{path}: no usable row ({reasons or 'the file is empty'})")
    return preferences


def _read(path, parse, skipped):
    """All that parse(row) makes of the rows of a file. It returns None for a row not asked for, a
    reason (a str) for one to be left out and counted, and raises ValueError for a broken one."""
    kept = []
    for number, row in _read_objects(path):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, not {json.dumps(row)[:40]}")
            found = parse(row)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        if isinstance(found, str):
            skipped.add(found, f"{path}, line {number}")
        elif found is not None:
            kept.append(found)
    return kept


def _read_objects(path):
    """Yields (line number, object) of a JSON lines file, gzipped or not."""
    number = 0
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if line.strip():
                    yield number, json.loads(line, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 text") from error
    except KeyError as error:
        raise UserError(f"{path}, line {number}: the key {error} stands twice in it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not JSON; expected one object a line") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read: {reason}") from error


def _object(pairs):
    """A JSON object as a dict. Of two values under one key json would keep the last in silence."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise KeyError(key)
        found[key] = value
    return found


def _text(row, key):
    """The string under a key of a JSON object; ValueError where there is none."""
    if not isinstance(row.get(key), str):
        raise ValueError(f'expected a string under "{key}"')
    return row[key]


def _preference(row):
    """A Preference, or why this row cannot teach (a str); ValueError for a broken row."""
    if "answers" in row:
        prompt, answers, ranking = _text(row, "prompt"), row["answers"], row.get("ranking")
        if not (isinstance(answers, list) and len(answers) > 1
                and all(isinstance(answer, str) for answer in answers)):
            raise ValueError('expected a list of at least two strings under "answers"')
        if not (isinstance(ranking, list) and all(type(i) is int for i in ranking)
                and sorted(ranking) == list(range(len(answers)))):
            raise ValueError(f'expected each of 0 to {len(answers) - 1} once, best first, '
                             'under "ranking"')
    elif "prompt" in row:
        prompt, ranking = _text(row, "prompt"), [0, 1]
        answers = [_text(row, "chosen"), _text(row, "rejected")]
    elif "summaries" in row:
        info, summaries, choice = row.get("info"), row["summaries"], row.get("choice")
        if not (isinstance(summaries, list) and len(summaries) == 2
                and all(isinstance(summary, dict) for summary in summaries)):
            raise ValueError('expected a list of two objects under "summaries"')
        if not (type(choice) is int and choice in (0, 1) and isinstance(info, dict)):
            raise ValueError('expected 0 or 1 under "choice", and an object under "info"')
        prompt, ranking = tldr_prompt(info), [choice, 1 - choice]
        answers = [tldr_answer(_text(summary, "text")) for summary in summaries]
    else:
        if ASSISTANT not in _text(row, "chosen") or ASSISTANT not in _text(row, "rejected"):
            raise ValueError('expected a "prompt", or dialogues with "\\n\\nAssistant:" turns')
        start = row["chosen"].rindex(ASSISTANT) + len(ASSISTANT)
        prompt = row["chosen"][:start]
        if not row["rejected"].startswith(prompt):
            return "dialogues that differ before the last answer"
        answers, ranking = [row["chosen"][start:], row["rejected"][start:]], [0, 1]
    if not all(answer.strip() for answer in answers):
        return "empty answer"
    if len(set(answers)) < len(answers):
        return "equal answers"
    try:
        "".join([prompt, *answers]).encode()
    except UnicodeEncodeError:
        return "half a character (a lone surrogate)"
    return Preference(prompt, answers, ranking_to_pairs(ranking))


def ranking_to_pairs(ranking):
    """[2, 0, 1], best first, to all its pairs: [(2, 0), (2, 1), (0, 1)]."""
    return [(w, l) for i, w in enumerate(ranking) for l in ranking[i + 1:]]


def rank(prompt, answers, rewards):
    """C.1: rank sampled answers by their reward, best first. Returns a row for a preferences file
    (a dict), or None where fewer than two rewards differ.

    Answers with the same reward have no preference between them; the first of them stands for all.
    So K answers make K (K - 1) / 2 pairs, six for C.1's four, unless two of them tie.
    """
    first = {}
    for answer, r in zip(answers, rewards):
        first.setdefault(r, answer)
    if len(first) < 2:
        return None
    kept = list(first)
    return {"prompt": prompt, "answers": [first[r] for r in kept],
            "ranking": sorted(range(len(kept)), key=lambda i: -kept[i]), "rewards": kept}


# ------------------------------------------------------------------------------------------------
# Published preferences: the tasks hh and tldr
#
# hh    Anthropic's helpful-base. Prompt: the dialogue up to the last "\n\nAssistant:". SFT on the
#       chosen answers. 43,835 pairs, and 2,354 of a test file, held out.
# tldr  OpenAI's comparisons of summaries of Reddit posts, batches 3 to 10, of which the rows of the
#       split "train" are trained on. SFT on 116,722 summaries that people wrote of their own
#       posts. Prompt:
#
#           SUBREDDIT: r/...
#
#           TITLE: ...
#
#           POST: ...
#
#           TL;DR:
#
#       Held out: the rows of the validation splits, of batch 11 too, which has no others.
# ------------------------------------------------------------------------------------------------

TASKS = ["reviews", "hh", "tldr"]
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
HH = f"{HUB}/datasets/Anthropic/hh-rlhf/resolve/main"
HH_SHA256 = {"train": "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
             "test": "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b"}
TLDR = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
MOST_HELD_OUT = 2500    # as many as hh has; tldr has tens of thousands, too many for every look


def fetch(folder, name, url, sha256=None):
    """The path of a published file under `folder`; downloaded to that place if it is not there."""
    return download(url, (folder or cache()) / name, sha256)


def load_comparisons(task, folder, held_out, skipped):
    """The preferences of hh or tldr, a list of Preference: those held out, or the others.

    folder: where the files are, or are downloaded to; None is the cache of torch. Raises UserError.
    """
    if task == "hh":
        part = "test" if held_out else "train"
        name = f"helpful-base/{part}.jsonl.gz"
        return load_preferences(fetch(folder, name, f"{HH}/{name}", HH_SHA256[part]), skipped)

    def parse(row):
        return _preference(row) if (_text(row, "split") != "train") == held_out else None
    found = []
    for batch in [*range(3, 11)] + [11] * held_out:
        name = f"comparisons/batch{batch}.json"
        found += _read(fetch(folder, name, f"{TLDR}/dataset/{name}"), parse, skipped)
    return _at_most(found, held_out, skipped)


def load_summaries(folder, held_out, skipped):
    """The summaries that tldr's SFT learns from: a list of Preference with one answer, no pair."""
    name = f"tldr_3_filtered/{'valid' if held_out else 'train'}.jsonl"

    def parse(row):
        answer = tldr_answer(_text(row, "summary"))
        return Preference(tldr_prompt(row), [answer], []) if answer.strip() else "empty answer"
    found = _read(fetch(folder, name, f"{TLDR}/datasets/{name}"), parse, skipped)
    return _at_most(found, held_out, skipped)


def _at_most(found, held_out, skipped):
    """The first MOST_HELD_OUT of what is held out, the rest being counted; all of what is not."""
    most = MOST_HELD_OUT if held_out else len(found)
    skipped[f"held-out row beyond the first {most:,}"] += max(0, len(found) - most)
    return found[:most]


def tldr_prompt(post):
    """The prompt for a Reddit post: a JSON object with "subreddit", "title" and "post"."""
    return (f"SUBREDDIT: r/{_text(post, 'subreddit')}\n\nTITLE: {_text(post, 'title')}\n\n"
            f"POST: {_text(post, 'post')}\n\nTL;DR:")


def tldr_answer(summary):
    """A summary as it follows "TL;DR:", after one space: some files have it and others do not, and
    SFT and DPO must not disagree about it."""
    return f" {summary.strip()}"


def as_prompt(text, task):
    """What a person typed, in the form of the prompts that the task's model has read."""
    if task == "hh" and not text.startswith(HUMAN):
        return f"{HUMAN} {text}{ASSISTANT}"
    if task == "tldr" and not text.endswith("TL;DR:"):
        return tldr_prompt({"subreddit": "AskReddit", "title": "", "post": text})
    return text


# ------------------------------------------------------------------------------------------------
# The packed row
# ------------------------------------------------------------------------------------------------


@dataclass
class Encoded:
    """A Preference in ids. The prompt begins with end-of-text; each answer ends with it, unless it
    was cut. ref_logps: log pi_ref(y|x) of each answer, once it is known."""

    prompt: list
    answers: list
    pairs: list
    ref_logps: list = None


def encode(preference, tokenizer, row_length, skipped=None):
    """A Preference to an Encoded, or None where nothing is left that could be learned from.

    Prompt and answer are encoded apart and joined as ids: that is what the model sees when it
    samples, and no merge crosses the boundary. Text that looks like a control token stays text. An
    answer may have row_length - len(prompt) tokens; a longer one is cut, and then has no
    end-of-text, which would teach the model to stop in mid-sentence. Reasons are counted in
    `skipped`, a Skipped.
    """
    skipped = Skipped() if skipped is None else skipped
    where, eot = f"the prompt {preference.prompt[:40]!r}", tokenizer.eot_token
    prompt = [eot] + tokenizer.encode_ordinary(preference.prompt)
    room = row_length - len(prompt)
    if room < 1:
        skipped.add("prompt as long as a row", where)
        return None
    answers = [tokenizer.encode_ordinary(answer) + [eot] for answer in preference.answers]
    for answer in answers:
        if len(answer) > room:
            skipped.add("answer cut (kept, without end-of-text)", where)
    answers = [answer[:room] for answer in answers]
    item = Encoded(prompt, answers, list(preference.pairs))
    distinct = [i for i, answer in enumerate(answers) if answer not in answers[:i]]
    if len(distinct) < len(answers):
        skipped.add("answers equal after the cut", where)
        item = take(item, [pair for pair in range(len(item.pairs))
                           if set(item.pairs[pair]) <= set(distinct)])
        return item if item.pairs else None
    return item


def encode_all(preferences, tokenizer, row_length, skipped):
    """All that encode makes of a list of Preference."""
    encoded = [encode(preference, tokenizer, row_length, skipped)
               for preference in tqdm(preferences, "encoding", delay=1)]
    return [item for item in encoded if item is not None]


def take(item, numbers):
    """The part of an Encoded with only these of its pairs (numbers into item.pairs), and only the
    answers they need."""
    if len(numbers) == len(item.pairs):
        return item
    pairs = [item.pairs[n] for n in numbers]
    kept = sorted({i for pair in pairs for i in pair})
    new = {old: i for i, old in enumerate(kept)}
    return Encoded(item.prompt, [item.answers[i] for i in kept],
                   [(new[w], new[l]) for w, l in pairs],
                   item.ref_logps and [item.ref_logps[i] for i in kept])


@dataclass
class Batch:
    """Packed rows: B rows of T tokens hold G prompts with N answers, K at most to one prompt;
    S tokens are scored, P pairs compared.

    Answers are numbered in the order they were given to `pack`; a place is row * T + column.
    """

    tokens: torch.Tensor        # (B, T) ids
    positions: torch.Tensor     # (B, T) from 0 in each prompt, and on from it in each answer
    group: torch.Tensor         # (B, T) one number for a prompt and its answers; -1 = empty place
    answer: torch.Tensor        # (B, T) 0 = prompt, else 1, 2, ...
    source: torch.Tensor        # (S,) place that predicts a scored token: the token before it
    target: torch.Tensor        # (S,) id of the scored token
    owner: torch.Tensor         # (S,) answer in [0, N - 1] to which it belongs
    winners: torch.Tensor       # (P,) answers in [0, N - 1]
    losers: torch.Tensor        # (P,)
    rankings: torch.Tensor      # (G, K) answers of each prompt by pairs won, best first, then -1s
    ref_logps: torch.Tensor     # (N,) float32, zeros where they are not known yet

    @property
    def n_answers(self):
        """N; in a compiled graph it may vary, which a number kept beside the tensors may not."""
        return len(self.ref_logps)

    def mask(self):
        """(B, T, T) bool: which tokens (second dimension) may look at which (third)."""
        T, group, answer = self.tokens.size(1), self.group, self.answer
        causal = torch.ones(T, T, dtype=torch.bool, device=group.device).tril()
        same_group = group[:, :, None] == group[:, None, :]
        visible = (answer[:, None, :] == 0) | (answer[:, :, None] == answer[:, None, :])
        return causal & same_group & visible

    def to(self, device):
        """A copy on a device; from pinned memory it does not wait for the host."""
        def move(value):
            if not isinstance(value, torch.Tensor):
                return value
            if torch.device(device).type == "cuda":
                value = value.pin_memory()
            return value.to(device, non_blocking=True)
        return Batch(**{field.name: move(getattr(self, field.name)) for field in fields(self)})


# A prompt with as many of its answers as fit in a row: lists of ids; numbers: those answers in the
# batch; length: of them all.
Piece = namedtuple("Piece", "prompt answers numbers length")


def pack(encoded, row_length):
    """A list of Encoded to a Batch: every prompt with all its answers, in as few rows as first-fit
    over the longest first finds.

    A prompt whose answers don't fit in one row together is repeated in as many as it takes, which
    changes nothing: answers are blind to each other. Raises ValueError where a single answer does
    not fit.
    """
    pieces = cut_into_pieces(encoded, row_length)
    pieces.sort(key=lambda piece: piece.length, reverse=True)
    places = first_fit([piece.length for piece in pieces], row_length)
    return Batch(*write_rows(pieces, places, row_length), *number_pairs(encoded))


def best_row_length(encoded, most, n_embd):
    """The row length, `most` or less, at which a model of n_embd channels C multiplies least over
    these Encoded; found by counting, without packing them.

    B rows of T tokens take B T (6 C + T) times a constant: each place meets the 12 C^2 weights of a
    block and, under a dense mask, the T places of its row, twice in C channels. Long rows leave
    fewer places empty; short ones hide fewer keys, though a prompt may come twice. Tried are `most`
    and the multiples of 16 below it (beyond 1024, of a 64th of `most`), each then cut to its
    fullest row. Raises ValueError where a single answer does not fit.
    """
    whole = [tokens_of(item) for item in encoded]
    least = max(len(item.prompt) + max(map(len, item.answers)) for item in encoded)
    unit, found, limit = max(16, most // 64), [], most
    while limit >= least or not found:
        parted = [item for item, length in zip(encoded, whole) if length > limit]
        lengths = [length for length in whole if length <= limit]
        lengths += [piece.length for piece in cut_into_pieces(parted, limit)]
        lengths.sort(reverse=True)
        places = first_fit(lengths, limit)
        B = 1 + max(row for row, _ in places)
        T = max(column + length for (_, column), length in zip(places, lengths))
        found.append((B * T * (6 * n_embd + T), T))
        limit = (T - 1) // unit * unit      # any limit between makes the same rows
    return min(found)[1]


def tokens_of(item):
    """How many tokens a prompt and all its answers have."""
    return len(item.prompt) + sum(map(len, item.answers))


def cut_into_pieces(encoded, row_length):
    """A list of Piece, in the order given: answers stay with the one before as long as there is
    room. Raises ValueError where a single answer has none."""
    pieces, n = [], 0
    for item in encoded:
        prompt, answers, first, length = item.prompt, item.answers, 0, len(item.prompt)
        for i, answer in enumerate(answers):
            if len(prompt) + len(answer) > row_length:
                raise ValueError(f"a prompt of {len(prompt)} tokens and an answer of "
                                 f"{len(answer)} do not fit in a row of {row_length}")
            if length + len(answer) > row_length:
                pieces.append(Piece(prompt, answers[first:i], range(n + first, n + i), length))
                first, length = i, len(prompt)
            length += len(answer)
        pieces.append(Piece(prompt, answers[first:], range(n + first, n + len(answers)), length))
        n += len(answers)
    return pieces


def first_fit(lengths, row_length):
    """Where pieces of these lengths go, each into the first row that has room for it: a list of
    (row, column)."""
    shortest, B, places = min(lengths), 0, []
    ends = {}                       # of the rows that have room for the shortest, in their order
    for length in lengths:
        row = next((r for r, end in ends.items() if end + length <= row_length), B)
        start = ends.get(row, 0)
        places.append((row, start))
        ends[row], B = start + length, max(B, row + 1)
        if ends[row] + shortest > row_length:
            del ends[row]
    return places


def write_rows(pieces, places, row_length):
    """The first seven fields of a Batch, from tokens to owner."""
    B = 1 + max(row for row, _ in places)
    tokens, positions, group, answer_of = np.zeros((4, B, row_length), dtype=np.int64)
    group -= 1
    scored = []                                         # (source, target, owner), each an array
    for number, (piece, (row, start)) in enumerate(zip(pieces, places)):
        T = len(piece.prompt)
        at = start + T
        tokens[row, start:at], positions[row, start:at] = piece.prompt, np.arange(T)
        last_of_prompt = row * row_length + at - 1
        for k, (answer, owner) in enumerate(zip(piece.answers, piece.numbers), 1):
            end = at + len(answer)
            tokens[row, at:end], answer_of[row, at:end] = answer, k
            positions[row, at:end] = np.arange(T, T + len(answer))
            source = np.arange(at - 1, end - 1) + row * row_length
            source[0] = last_of_prompt                  # a first token is predicted by the prompt
            scored.append((source, answer, np.full(len(answer), owner)))
            at = end
        group[row, start:at] = number
    source, target, owner = map(np.concatenate, zip(*scored))
    return map(torch.from_numpy, (tokens, positions, group, answer_of, source, target, owner))


def number_pairs(encoded):
    """winners, losers, rankings and ref_logps of a Batch: all numbered over the whole of it."""
    first = np.cumsum([0] + [len(item.answers) for item in encoded])
    pairs = np.array([(f + w, f + l) for f, item in zip(first, encoded) for w, l in item.pairs],
                     dtype=np.int64).reshape(-1, 2)
    rankings = np.full((len(encoded), max(len(item.answers) for item in encoded)), -1)
    for g, item in enumerate(encoded):
        won = Counter(w for w, _ in item.pairs)
        order = sorted(range(len(item.answers)), key=lambda i: -won[i])
        rankings[g, :len(order)] = first[g] + np.array(order)
    ref_logps = [r for item in encoded for r in item.ref_logps or [0.0] * len(item.answers)]
    winners, losers, rankings = map(torch.from_numpy, (*pairs.T.copy(), rankings))
    return winners, losers, rankings, torch.tensor(ref_logps)


class Batches:
    """Endless batches of exactly `size` units each: batches[step] depends on seed and step alone.

    A unit is a pair, or with whole=True an Encoded with all it has (a text, a ranking). The data
    is gone through in a new order each epoch; pairs of one prompt stay next to each other, so that
    its answers are computed once. Where a prompt straddles two batches, each gets its own pairs.
    """

    def __init__(self, encoded, size, seed, whole=False):
        self.encoded, self.size, self.seed, self.whole = encoded, size, seed, whole
        self.units = [1 if whole else len(item.pairs) for item in encoded]
        self.per_epoch, self.orders = sum(self.units), {}

    def order(self, epoch):
        """All (item, unit) of the epoch in their order; that of the last two epochs is kept."""
        if epoch not in self.orders:
            self.orders.pop(epoch - 2, None)
            rng = np.random.default_rng([self.seed, epoch])
            self.orders[epoch] = [(i, unit) for i in rng.permutation(len(self.encoded)).tolist()
                                  for unit in range(self.units[i])]
        return self.orders[epoch]

    def units_of(self, step):
        """(epoch, number of the item, unit) of each unit of a step."""
        for k in range(step * self.size, (step + 1) * self.size):
            epoch, at = divmod(k, self.per_epoch)
            yield epoch, *self.order(epoch)[at]

    def of_an_epoch(self):
        """The batches of the first epoch, a list."""
        return [self[step] for step in range(-(-self.per_epoch // self.size))]

    def __getitem__(self, step):
        """A list of Encoded."""
        wanted = {}
        for epoch, item, unit in self.units_of(step):
            wanted.setdefault((epoch, item), []).append(unit)
        return [self.encoded[item] if self.whole else take(self.encoded[item], units)
                for (_, item), units in wanted.items()]


# ------------------------------------------------------------------------------------------------
# python data.py: look at a packed row
# ------------------------------------------------------------------------------------------------

DIM, RESET, BRIGHT = "\033[2m", "\033[0m", [f"\033[1;{n}m" for n in (36, 33, 35, 32, 34, 31)]


def show_row(batch, row, tokenizer, width=100, colour=False):
    """Row number `row` of a Batch as text: tokens, positions and answers under each other, then
    its mask as a small picture. colour: prompts dim, each answer in its own bright colour, which
    are the tokens that are scored."""
    filled = int((batch.group[row] >= 0).sum())
    group, answer, positions, tokens = (x[row, :filled].tolist() for x in (
        batch.group, batch.answer, batch.positions, batch.tokens))
    cells = []                                  # (text of token, position, answer, start of group)
    for i, token in enumerate(tokens):
        text = "<eot>" if token == tokenizer.eot_token else json.dumps(
            tokenizer.decode([token]))[1:-1].replace(" ", "_")
        new = i > 0 and group[i] != group[i - 1]
        cells.append((text, str(positions[i]), str(answer[i]), new))
    lines = [[], [], []]
    blocks, used = [lines], 10
    for i, (*texts, new) in enumerate(cells):
        size = max(map(len, texts)) + 1
        if used + size + 2 * new > width:
            lines, used = [[], [], []], 10
            blocks.append(lines)
        style = (BRIGHT[(answer[i] - 1) % len(BRIGHT)] if answer[i] else DIM) if colour else ""
        for line, text in zip(lines, texts):
            line.append("| " * new + style + text.rjust(size - 1) + RESET * bool(style) + " ")
        used += size + 2 * new
    names = ("tokens", "position", "answer")
    out = ["\n".join(f"{name:<10}" + "".join(line).rstrip() for name, line in zip(names, lines))
           for lines in blocks]
    step = -(-filled // 64)                     # a character stands for so many tokens, twice down
    mask = batch.mask()[row, :filled, :filled].float()[None, None]
    seen = torch.nn.functional.max_pool2d(mask, (2 * step, step), ceil_mode=True)[0, 0].tolist()
    picture = "\n".join("          " + "".join(".#"[int(see)] for see in line) for line in seen)
    return "\n\n".join([*out, f"mask: who (down) sees whom (across), {step} tokens a character "
                              f"across and {2 * step} down\n{picture}"])


def show_counts(encoded):
    """How many prompts, answers and pairs, and how long they are, as text."""
    def spread(lengths):
        lengths = sorted(lengths)
        return f"{lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}"
    answers = [answer for item in encoded for answer in item.answers]
    return (f"{len(encoded):,} prompts of {spread([len(item.prompt) for item in encoded])}\n"
            f"{len(answers):,} answers of {spread([len(answer) for answer in answers])}\n"
            f"{sum(len(item.pairs) for item in encoded):,} pairs")


def parse_args(argv):
    import train_sft as shared                  # here, since train_sft.py imports this file
    parser = shared.Parser("Look at the data: counts, and the first row of the first batch, packed."
                           "\n\n    python data.py                       # the reviews task"
                           "\n    python data.py --task hh             # published preferences"
                           "\n    python data.py --data pairs.jsonl    # your own preferences")
    shared.add_shared_flags(parser)
    parser.add_argument("--tokenizer", choices=TOKENIZERS,
                        help="default: reviews for the task of that name, gpt2 for others")
    parser.add_argument("--row-length", type=shared.number(int, 2),
                        help="tokens of a packed row (default 256 for reviews, else 1024)")
    parser.set_defaults(strict=False)           # what cannot teach is counted, not an error
    args = parser.parse_args(argv)
    shared.settle_task(args)
    return args


def look(argv):
    """Print counts and the first packed row of what train_dpo.py would train on; of what
    train_sft.py would, where the task has no preferences yet."""
    import train_sft as shared
    args = parse_args(argv)
    shared.settle(args)
    tokenizer = get_tokenizer(args.tokenizer or ("reviews" if args.task == "reviews" else "gpt2"))
    args.row_length = args.row_length or (256 if args.task == "reviews" else 1024)
    path = args.out / "preferences.jsonl" if args.task == "reviews" else args.data
    if args.task == "reviews" and not path.exists():
        print(f"no {path} yet, which train_dpo.py samples: this is what train_sft.py reads")
        args.reviews = 1000
        rows, _ = shared.load_examples(args)
    else:
        rows, _ = shared.load_training(args, path)
    encoded = shared.load("training", args, encode_all, rows, tokenizer, args.row_length)
    if not encoded:
        raise UserError(f"{path or args.task}: no row is left to train on")
    batch = pack(Batches(encoded, min(16, len(encoded)), args.seed, whole=True)[0], args.row_length)
    print(f"{show_counts(encoded)}\n\nthe first of {len(batch.tokens)} rows of a batch of 16 "
          f"prompts; _ is a space, | begins another prompt, answer 0 is the prompt\n\n"
          + show_row(batch, 0, tokenizer, shutil.get_terminal_size((100, 24)).columns,
                     sys.stdout.isatty()))


def main(argv=None):
    from train_sft import command
    command(look)(argv)


if __name__ == "__main__":
    main()
