"""Which answer goes into which row: bin packing, and the row length that costs least.

data.pack turns the result into tensors. Everything here counts tokens only; an item is a
data.Encoded, of which the lists `prompt` and `answers` are used.
"""

import math
from collections import namedtuple

# A prompt with as many of its answers as fit in a row, as ids. numbers: those of these answers in
# the batch. length: the number of tokens of them all.
Piece = namedtuple("Piece", "prompt answers numbers length")


def count_tokens(item):
    """The number of tokens of a prompt and all its answers."""
    return len(item.prompt) + sum(map(len, item.answers))


def cut_into_pieces(encoded, row_length):
    """Split prompts whose answers do not fit in one row. Returns a list of Piece, in the order
    given. Raises ValueError if a single answer does not fit."""
    pieces, n = [], 0                                   # n: answers of the prompts before this one
    for item in encoded:
        prompt, answers = item.prompt, item.answers
        first, length = 0, len(prompt)                  # of the current piece
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
    """Put each piece into the first row with room for it. Returns a list of (row, column)."""
    shortest = min(lengths)
    n_rows, places = 0, []
    ends = {}                       # {row: its first empty column}, of rows that are not full
    for length in lengths:
        row = next((r for r, end in ends.items() if end + length <= row_length), n_rows)
        start = ends.get(row, 0)
        places.append((row, start))
        ends[row] = start + length
        n_rows = max(n_rows, row + 1)
        if ends[row] + shortest > row_length:
            del ends[row]
    return places


def best_row_length(encoded, longest, n_embd):
    """The row length, at most `longest`, at which packing these Encoded costs a model of n_embd
    channels the fewest multiplications. Found by counting, without packing.

    Each token costs, per block, 12 C^2 multiplications in the weights and 2 T C in attention, whose
    mask is dense: B rows of T tokens cost a constant times B T (6 C + T). Long rows have less
    padding; in short ones, fewer multiplications are masked, but a prompt may be repeated. We try
    `longest` and all smaller multiples of 16 (of `longest` / 64, if `longest` is above 1024), each
    shortened to its fullest row. Raises ValueError if a single answer does not fit.
    """
    totals = [count_tokens(item) for item in encoded]
    shortest = max(len(item.prompt) + max(map(len, item.answers)) for item in encoded)
    unit = max(16, longest // 64)
    found, limit = [], longest
    while limit >= shortest or not found:
        split = [item for item, total in zip(encoded, totals) if total > limit]
        lengths = [total for total in totals if total <= limit]
        lengths += [piece.length for piece in cut_into_pieces(split, limit)]
        lengths.sort(reverse=True)
        places = first_fit(lengths, limit)
        B = 1 + max(row for row, _ in places)
        T = max(column + length for (_, column), length in zip(places, lengths))
        found.append((B * T * (6 * n_embd + T), T))
        limit = (T - 1) // unit * unit      # limits in between give the same rows
    return min(found)[1]


def compiled_row_length(best, longest):
    """The row length for a compiled model: 256, 512, 1024, ..., at least `best`, at most `longest`.
    Each row length needs a graph of its own, so there are only a few."""
    return min(longest, max(256, 2 ** math.ceil(math.log2(best))))
