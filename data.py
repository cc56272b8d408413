"""Data for preference learning: preferences, the packed row, batches.

The one idea: a prompt is stored once, followed by all its answers, in a row of tokens,

    tokens     <eot> The acting was | great !  <eot> | dull .  <eot> |  next prompt ...
    position     0    1    2     3  |   4   5    6   |   4  5    6   |  0 ...
    answer       0    0    0     0  |   1   1    1   |   2  2    2   |  0 ...        0 = prompt

The positions of each answer restart right after the prompt. An answer attends to its prompt and to
itself, never to the other answers. So the prompt is computed once, only the ends of rows are
padded, and pairs, rankings of K answers and plain text (one answer, no pairs) all make the same
kind of batch.

    preference = Preference("The acting was", [" great!", " dull."], [(0, 1)])    # text
    encoded = encode(preference, tokenizer, row_length)                           # ids
    batch = pack([encoded, ...], row_length)                                      # tensors

`python -m experiments.packed_row` prints such a row and its mask. Letters: B rows, T tokens of a
row, N answers, P pairs, G prompts, K answers of one prompt, S scored tokens. C.1 and the other
sections and equations named in the code are those of the DPO paper, arXiv 2305.18290.

Left out on purpose: worker processes and streaming. Preference data fits in memory, and packing a
batch takes a few milliseconds.
"""

import math
import zlib
from array import array
from collections import Counter, namedtuple
from dataclasses import dataclass, fields

import numpy as np
import torch
from tqdm import tqdm

from runtime.errors import UserError
from runtime.packing import (
    best_row_length,
    compiled_row_length,
    count_tokens,
    cut_into_pieces,
    first_fit,
)
from runtime.parallel import allow_any_size, process_rank, world_size
from runtime.rows import (
    Skipped,
    note_markers,
    note_repetitions,
    parse_example,
    parse_preference,
    read_rows,
)

# ------------------------------------------------------------------------------------------------
# Preferences: text
# ------------------------------------------------------------------------------------------------

# A prompt, its answers, and which answer is better than which: pairs of (chosen, rejected)
# indices. Answers that tie have no pair. Pairs of which the best answer is the chosen one come
# first. A text for SFT is one answer without pairs. unfinished: indices of answers that were cut,
# so that no end-of-text follows them.
Preference = namedtuple("Preference", "prompt answers pairs unfinished", defaults=[()])


def load_preferences(path, skipped=None):
    """Read preferences from a .jsonl or .jsonl.gz file, one object per line, in any of these
    layouts (docs/preferences.md has all variants):

        {"prompt": "...", "chosen": "...", "rejected": "..."}
        {"prompt": "...", "answers": ["...", ...], "ranking": [2, 0, 1]}      indices, best first
        {"prompt": "...", "answers": ["...", ...], "scores": [0.1, 3, 0.1]}   equal scores tie
        {"prompt": [{"role": "user", "content": "..."}], "chosen": [...], "rejected": [...]}
        {"chosen": "...", "rejected": "..."}      dialogues of "\\n\\nHuman:" and "\\n\\nAssistant:"
                                                  turns, equal up to the last (Anthropic's HH)
        {"info": {"subreddit": "...", "title": "...", "post": "..."},             (OpenAI's TL;DR)
         "summaries": [{"text": "..."}, {"text": "..."}], "choice": 1}

    Returns a list of Preference. Rows without a usable comparison (empty or equal answers, say) are
    left out and counted by reason in `skipped`, a runtime.rows.Skipped, which also gets notes on
    the file. Raises UserError, with the line, for a malformed row, and if no row is left.
    """
    return read_preferences(path, parse_preference, Skipped() if skipped is None else skipped)


def load_examples(path, skipped=None):
    """Read a file for SFT: preferences as above, or rows with one answer, {"prompt", "completion"},
    {"messages"} or {"text"}. Returns a list of Preference."""
    return read_preferences(path, parse_example, Skipped() if skipped is None else skipped)


def read_preferences(path, parse, skipped):
    """A list of Preference from the rows of a file, as parse(row, skipped) reads them."""
    rows = read_rows(path, lambda row: parse(row, skipped), skipped)
    if not rows:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in skipped.items())
        raise UserError(f"{path}: no usable row ({reasons or 'the file is empty'})")
    preferences = [to_preference(*row) for row in rows]
    note_markers(preferences, skipped)
    note_repetitions(preferences, skipped)
    return preferences


def to_preference(prompt, answers, levels, unfinished=()):
    """A Preference from levels of answers, lists of indices, best first: each answer is better than
    all those of later levels, [[0], [1, 2]] becomes [(0, 1), (0, 2)]."""
    pairs = [(w, l) for better, worse in ranking_to_pairs(levels) for w in better for l in worse]
    return Preference(prompt, answers, pairs, tuple(unfinished))


def ranking_to_pairs(ranking):
    """All (chosen, rejected) pairs of a ranking, which lists indices of answers, best first:
    [2, 0, 1] becomes [(2, 0), (2, 1), (0, 1)]."""
    return [(w, l) for i, w in enumerate(ranking) for l in ranking[i + 1:]]


def best_answers(preferences):
    """What SFT learns from: each prompt with its best answer, as a Preference without pairs. (Of
    several best answers that tie, the first.)"""
    found = []
    for preference in preferences:
        best = preference.pairs[0][0] if preference.pairs else 0
        unfinished = (0,) if best in preference.unfinished else ()
        found.append(Preference(preference.prompt, [preference.answers[best]], [], unfinished))
    return found


def is_held_out(text):
    """Whether the prompt `text` is kept for evaluation; one in ten is. The text alone decides, so
    neither DPO nor SFT on a preference file ever trains on it, whatever the seed and the order of
    the file. (SFT on reviews trains on whole reviews, some of which begin like a held-out prompt.
    Published tasks have held-out files of their own.)"""
    return zlib.crc32(text.encode("utf-8", "replace")) % 10 == 0


# ------------------------------------------------------------------------------------------------
# Encoded preferences: ids
# ------------------------------------------------------------------------------------------------


@dataclass
class Encoded:
    """A Preference in ids. The prompt begins with end-of-text, as GPT-2's training texts did, so an
    empty prompt is possible. Each answer ends with end-of-text unless it was cut. Ids are lists, or
    arrays as in encode_all. ref_logps: log pi_ref(y|x) of each answer, once it has been computed.
    """

    prompt: list
    answers: list
    pairs: list
    ref_logps: list = None


def encode(preference, tokenizer, row_length, skipped=None):
    """Encode a Preference. Returns an Encoded, or None if no comparison is left.

    Prompt and answers are encoded separately and their ids joined, as in sampling, so no token
    merges across the boundary. Text that looks like a special token stays text. An answer may have
    row_length - len(prompt) tokens. A longer one is cut and, like one that is unfinished, gets no
    end-of-text, because that would teach the model to stop mid-sentence. `skipped`, a Skipped,
    counts what was left out or cut; under --strict it raises UserError instead.
    """
    skipped = Skipped() if skipped is None else skipped
    where = f"the prompt {preference.prompt[:40]!r}"
    eot = tokenizer.eot_token
    prompt = [eot] + tokenizer.encode_ordinary(preference.prompt)
    room = row_length - len(prompt)
    if room < 1:
        skipped.add("prompt as long as a row", where)
        return None
    answers = [tokenizer.encode_ordinary(answer) for answer in preference.answers]
    answers = [ids if i in preference.unfinished else ids + [eot] for i, ids in enumerate(answers)]
    for answer in answers:
        if len(answer) > room:
            skipped.add("answer cut (kept, without end-of-text)", where)
    answers = [answer[:room] for answer in answers]
    item = Encoded(prompt, answers, list(preference.pairs))
    if len(set(map(tuple, answers))) == len(answers):
        return item
    skipped.add("answers equal after the cut", where)
    item = select_pairs(item, clear_pairs(item))
    return item if item.pairs else None


def encode_prompt(prompt, tokenizer):
    """The ids of a prompt alone, a list that begins with end-of-text."""
    return [tokenizer.eot_token] + tokenizer.encode_ordinary(prompt)


def decode_answer(ids, tokenizer):
    """The text of an answer, without end-of-text."""
    return tokenizer.decode([i for i in ids if i != tokenizer.eot_token])


def clear_pairs(item):
    """The indices of the pairs of an Encoded that are still clear although some of its answers are
    equal: of several pairs of the same two answers, the first. If one copy of an answer was better
    than another answer and a second copy was worse, all pairs of that answer are dropped."""
    answers = [tuple(answer) for answer in item.answers]
    pairs = [(answers[w], answers[l]) for w, l in item.pairs]
    unclear = set()
    for chosen, rejected in pairs:
        if chosen != rejected and (rejected, chosen) in pairs:          # once better, once worse
            unclear |= {answer for answer in (chosen, rejected) if answers.count(answer) > 1}
    kept = []
    for i, (chosen, rejected) in enumerate(pairs):
        repeated = (chosen, rejected) in pairs[:i]
        if chosen != rejected and not repeated and not unclear & {chosen, rejected}:
            kept.append(i)
    return kept


def encode_all(preferences, tokenizer, row_length, skipped):
    """Encode a list of Preference, without those that have no comparison left. Ids are kept in
    arrays, which take 4 bytes per id; lists take 38."""
    encoded = []
    for preference in tqdm(preferences, "encoding", delay=1, disable=None):
        item = encode(preference, tokenizer, row_length, skipped)
        if item is not None:
            item.prompt = array("i", item.prompt)
            item.answers = [array("i", answer) for answer in item.answers]
            encoded.append(item)
    return encoded


def select_pairs(item, indices):
    """An Encoded with only these of its pairs, and only the answers that those pairs compare."""
    if len(indices) == len(item.pairs):
        return item
    pairs = [item.pairs[i] for i in indices]
    needed = sorted({answer for pair in pairs for answer in pair})
    new_index = {answer: i for i, answer in enumerate(needed)}
    ref_logps = None
    if item.ref_logps:
        ref_logps = [item.ref_logps[answer] for answer in needed]
    return Encoded(item.prompt, [item.answers[answer] for answer in needed],
                   [(new_index[w], new_index[l]) for w, l in pairs], ref_logps)


# ------------------------------------------------------------------------------------------------
# The packed row: tensors
# ------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Packed rows: B rows of T tokens hold G prompts and their N answers, at most K to a prompt.
    S tokens are scored, all those of the answers, and P pairs compared.

    Answers are numbered in the order they were given to `pack`. `source` holds flat indices into
    the B * T tokens.
    """

    tokens: torch.Tensor        # (B, T) ids
    positions: torch.Tensor     # (B, T) from 0 in each prompt, continued in each of its answers
    group: torch.Tensor         # (B, T) one number per prompt with its answers (if a prompt is
                                # repeated, one per repetition); -1 = padding
    answer: torch.Tensor        # (B, T) 1, 2, ... in each group; 0 = prompt or padding
    source: torch.Tensor        # (S,) flat index of the token whose logits predict a scored token
    target: torch.Tensor        # (S,) id of the scored token
    answer_of: torch.Tensor     # (S,) answer it belongs to, in [0, N - 1]
    last: torch.Tensor          # (N,) flat index of each answer's last token
    chosen: torch.Tensor        # (P,) answers in [0, N - 1]
    rejected: torch.Tensor      # (P,)
    rankings: torch.Tensor      # (G, K) each prompt's answers, best first, padded with -1; valid
                                # if all pairs of a ranking are there, as with Batches(whole=True)
    ref_logps: torch.Tensor     # (N,) float32, zeros until they have been computed

    @property
    def n_answers(self):
        """N. (Not a field, because torch.compile would take a number for a constant.)"""
        return len(self.ref_logps)

    def mask(self):
        """(B, T, T) bool: True where a token (second dimension) may attend to another (third).
        Padding attends to padding, so that no row of attention is empty."""
        T, group, answer = self.tokens.size(1), self.group, self.answer
        causal = torch.ones(T, T, dtype=torch.bool, device=group.device).tril()
        same_group = group[:, :, None] == group[:, None, :]
        visible = (answer[:, None, :] == 0) | (answer[:, :, None] == answer[:, None, :])
        return causal & same_group & visible

    def to(self, device):
        """A copy on a device. Copies to CUDA start from pinned memory and do not block."""
        def move(tensor):
            if tensor is None:          # a field that experiments.benchmark leaves out
                return None
            if torch.device(device).type == "cuda":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)
        return Batch(**{field.name: move(getattr(self, field.name)) for field in fields(self)})


def pack(encoded, row_length):
    """Pack a list of Encoded into a Batch by first-fit decreasing bin packing.

    If a prompt and all its answers do not fit in one row, the prompt is repeated in several rows
    with some of the answers each. That changes no result, because answers do not see each other.
    Raises ValueError if a single answer does not fit.
    """
    pieces = cut_into_pieces(encoded, row_length)
    pieces.sort(key=lambda piece: piece.length, reverse=True)
    starts = first_fit([piece.length for piece in pieces], row_length)
    return Batch(**write_rows(pieces, starts, row_length), **number_pairs(encoded))


def write_rows(pieces, starts, row_length):
    """The fields of a Batch from `tokens` to `last`.

    pieces: prompts with some of their answers, as runtime.packing.Piece. starts: (row, column) at
    which each begins.
    """
    shape = (1 + max(row for row, _ in starts), row_length)
    tokens = np.zeros(shape, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    group = np.full(shape, -1)
    in_group = np.zeros(shape, dtype=np.int64)
    source, target, answer_of = [], [], []              # an array for each answer
    last = {}                                           # {answer: flat index of its last token}
    for g, (piece, (row, start)) in enumerate(zip(pieces, starts)):
        n = len(piece.prompt)
        column = start + n                              # the first after the prompt
        tokens[row, start:column] = piece.prompt
        positions[row, start:column] = np.arange(n)
        last_of_prompt = row * row_length + column - 1
        for k, (answer, number) in enumerate(zip(piece.answers, piece.numbers), 1):
            end = column + len(answer)
            tokens[row, column:end] = answer
            in_group[row, column:end] = k
            positions[row, column:end] = np.arange(n, n + len(answer))
            # A token is predicted at the one before it. Before the first token of an answer stands
            # the last token of the prompt, wherever the answer is in the row.
            predicted_at = row * row_length + np.arange(column - 1, end - 1)
            predicted_at[0] = last_of_prompt
            source.append(predicted_at)
            target.append(answer)
            answer_of.append(np.full(len(answer), number))
            last[number] = row * row_length + end - 1
            column = end
        group[row, start:column] = g
    arrays = {"tokens": tokens, "positions": positions, "group": group, "answer": in_group,
              "source": np.concatenate(source), "target": np.concatenate(target, dtype=np.int64),
              "answer_of": np.concatenate(answer_of),
              "last": np.array([last[n] for n in sorted(last)])}
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def number_pairs(encoded):
    """The fields of a Batch from `chosen` to `ref_logps`, with answers numbered over the batch."""
    counts = [len(item.answers) for item in encoded]
    first = np.cumsum([0, *counts]).tolist()            # the first answer of each prompt
    K = max(counts)
    pairs, rankings, ref_logps = [], [], []
    for g, item in enumerate(encoded):
        pairs += [(first[g] + w, first[g] + l) for w, l in item.pairs]
        ref_logps += item.ref_logps or [0.0] * len(item.answers)
        # In a ranking of K answers the k-th wins K - k pairs, so the wins give the ranking back.
        wins = Counter(w for w, _ in item.pairs)
        best_first = sorted(range(len(item.answers)), key=lambda i: -wins[i])
        rankings.append([first[g] + i for i in best_first] + [-1] * (K - len(best_first)))
    pairs = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return {"chosen": pairs[:, 0].contiguous(), "rejected": pairs[:, 1].contiguous(),
            "rankings": torch.tensor(rankings), "ref_logps": torch.tensor(ref_logps)}


def pack_for_model(items, row_length, model):
    """Pack a list of Encoded for a model, on its device, in rows of the cheapest length up to
    row_length. For a compiled model, the length is rounded up to one of a few."""
    length = best_row_length(items, row_length, model.config.n_embd)
    if not model.compiled:
        return pack(items, length).to(model.device)
    batch = pack(items, compiled_row_length(length, row_length)).to(model.device)
    allow_any_size(batch)                   # of any number of rows, answers and pairs
    return batch


# ------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------


def check_rankings(items, name):
    """Raise UserError unless the answers of each Encoded are ranked from best to worst without
    ties, as Plackett-Luce requires."""
    n = sum(len(item.pairs) < math.comb(len(item.answers), 2) for item in items)
    if n:
        raise UserError(f"{name}: in {n:,} of {len(items):,} rows some answers tie, and --loss "
                        "plackett_luce needs whole rankings; use --loss dpo")


class Batches:
    """Endless batches of exactly `size` units: batches[step] depends only on the seed and the step.

    A unit is a pair, or with whole=True a whole Encoded (a text or a ranking). Each epoch has a new
    order, in which the pairs of one prompt stay together, so that a step computes its answers once.
    If a prompt straddles two batches, each gets some of its pairs.
    """

    def __init__(self, encoded, size, seed, whole=False):
        self.encoded, self.size, self.seed, self.whole = encoded, size, seed, whole
        self.units = [1 if whole else len(item.pairs) for item in encoded]
        self.per_epoch = sum(self.units)
        self.orders = {}                            # of the last two epochs

    def order(self, epoch):
        """All (item, unit) indices of an epoch, in its order."""
        if epoch not in self.orders:
            self.orders.pop(epoch - 2, None)
            rng = np.random.default_rng([self.seed, epoch])
            self.orders[epoch] = [(i, unit) for i in rng.permutation(len(self.encoded)).tolist()
                                  for unit in range(self.units[i])]
        return self.orders[epoch]

    def units_of(self, step):
        """The (epoch, item, unit) indices of a step."""
        for k in range(step * self.size, (step + 1) * self.size):
            epoch, at = divmod(k, self.per_epoch)
            yield epoch, *self.order(epoch)[at]

    def __getitem__(self, step):
        """The batch of a step, a list of Encoded."""
        units = {}
        for epoch, i, unit in self.units_of(step):
            units.setdefault((epoch, i), []).append(unit)
        if self.whole:
            return [self.encoded[i] for _, i in units]
        return [select_pairs(self.encoded[i], chosen) for (_, i), chosen in units.items()]

    def micro_batches(self, step, n, row_length, model):
        """The batch of a step in packed micro-batches; see the function of that name."""
        return micro_batches(self[step], n, row_length, model)

    def first_epoch(self):
        """The batches of the first epoch, a list."""
        return [self[step] for step in range(math.ceil(self.per_epoch / self.size))]


def micro_batches(items, n, row_length, model):
    """Cut a batch, a list of Encoded, into n micro-batches per process to save memory. Yields those
    of this process, packed, on the model's device.

    The caller divides each loss by the size of the whole batch, so that the gradients of all
    micro-batches add up to the gradient of the batch. Raises UserError if there are fewer prompts
    than processes.
    """
    for share in deal(items, n):
        yield pack_for_model([items[i] for i in share], row_length, model)


def deal(items, n):
    """The items of each of the n micro-batches of this process: lists of indices. Prompts are dealt
    out by length, like cards, so that all micro-batches take about equally long."""
    if len(items) < world_size():
        raise UserError(f"a batch of {len(items)} prompts for {world_size()} processes: use a "
                        "larger --batch or fewer processes, so that each gets a prompt")
    n_all = min(n * world_size(), len(items))               # of all processes
    longest_first = sorted(range(len(items)), key=lambda i: -count_tokens(items[i]))
    return [sorted(longest_first[k::n_all])
            for k in range(process_rank(), n_all, world_size())]


def batches_in_order(items, row_length, model, size=32):
    """Yield all items in order, packed, on the model's device. A batch has at most `size` prompts,
    and fewer if their logits would have more than 2^27 numbers, half a gigabyte. With several
    processes, each yields every world_size()-th of these batches; runtime.parallel.all_gather puts
    the results together again."""
    batches, scored = [], 0
    for item in items:
        n = sum(len(answer) for answer in item.answers)
        scored += n
        if not batches or len(batches[-1]) == size or scored * model.config.vocab_size > 2**27:
            batches.append([])
            scored = n
        batches[-1].append(item)
    for batch in batches[process_rank()::world_size()]:
        yield pack_for_model(batch, row_length, model)
