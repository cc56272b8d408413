"""Look at the data: counts, and the first row of the first batch, packed.

    python -m experiments.packed_row                       # the reviews task
    python -m experiments.packed_row --task hh             # published preferences
    python -m experiments.packed_row --data pairs.jsonl    # your own preferences

Shown is what train_dpo.py trains on, or what train_sft.py trains on if the reviews have not been
sampled and ranked yet.
"""

import json
import shutil
import sys

import torch

from data import Batches, encode_all, pack
from runtime.cli import Parser, command, number_type, set_up
from runtime.errors import UserError
from runtime.rows import read_and_report
from tasks import task_of
from tasks.flags import add_task_flags, choose_task
from tasks.tokenizers import TOKENIZERS, get_tokenizer

DIM, RESET = "\033[2m", "\033[0m"
BRIGHT = [f"\033[1;{n}m" for n in (36, 33, 35, 32, 34, 31)]
LABELS = ("tokens", "position", "answer")


def show_row(batch, row, tokenizer, width=100, colour=False):
    """One row of a Batch as text: tokens, positions and answers below each other, then its mask as
    a small picture. colour: dim prompts, and answers (which are scored) in bright colours."""
    filled = int((batch.group[row] >= 0).sum())
    group = batch.group[row, :filled].tolist()
    answer = batch.answer[row, :filled].tolist()
    positions = batch.positions[row, :filled].tolist()
    cells = []                                  # (token, position, answer, begins a new prompt)
    for i, token in enumerate(batch.tokens[row, :filled].tolist()):
        text = "<eot>"
        if token != tokenizer.eot_token:
            text = json.dumps(tokenizer.decode([token]))[1:-1].replace(" ", "_")
        new_prompt = i > 0 and group[i] != group[i - 1]
        cells.append((text, str(positions[i]), str(answer[i]), new_prompt))
    lines = [[], [], []]
    blocks, used = [lines], 10
    for i, (*texts, new_prompt) in enumerate(cells):
        size = max(map(len, texts)) + 1
        if used + size + 2 * new_prompt > width:
            lines, used = [[], [], []], 10
            blocks.append(lines)
        style = ""
        if colour:
            style = BRIGHT[(answer[i] - 1) % len(BRIGHT)] if answer[i] else DIM
        for line, text in zip(lines, texts):
            line.append("| " * new_prompt + style + text.rjust(size - 1) + RESET * bool(style)
                        + " ")
        used += size + 2 * new_prompt
    shown = ["\n".join(f"{label:<10}" + "".join(line).rstrip()
                       for label, line in zip(LABELS, lines)) for lines in blocks]
    return "\n\n".join([*shown, show_mask(batch.mask()[row, :filled, :filled])])


def show_mask(mask):
    """A (T, T) mask as text, at most 64 characters wide."""
    step = -(-len(mask) // 64)                  # tokens per character; twice as many per line
    pooled = torch.nn.functional.max_pool2d(mask.float()[None, None], (2 * step, step),
                                            ceil_mode=True)[0, 0]
    picture = "\n".join("          " + "".join(".#"[int(seen)] for seen in line)
                        for line in pooled.tolist())
    return (f"mask: which token (down) attends to which (across), {step} tokens per character "
            f"across and {2 * step} down\n{picture}")


def show_counts(encoded):
    """The numbers of prompts, answers and pairs, and their lengths, as text."""
    def spread(lengths):
        lengths = sorted(lengths)
        return f"{lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}"
    answers = [answer for item in encoded for answer in item.answers]
    return (f"{len(encoded):,} prompts of {spread([len(item.prompt) for item in encoded])}\n"
            f"{len(answers):,} answers of {spread([len(answer) for answer in answers])}\n"
            f"{sum(len(item.pairs) for item in encoded):,} pairs")


def parse_args(argv):
    parser = Parser(__doc__)
    add_task_flags(parser)
    add = parser.add_argument
    add("--tokenizer", choices=TOKENIZERS, help="default: as for train_sft.py")
    add("--row-length", type=number_type(int, 2),
        help="tokens of a packed row (default 256 for reviews and imdb-small, else 1024)")
    parser.set_defaults(strict=False, reviews=1000)     # rows that teach nothing are counted
    args = parser.parse_args(argv)
    choose_task(args)
    args.tokenizer = args.tokenizer or task_of(args).tokenizer
    args.row_length = args.row_length or (256 if args.task in ("reviews", "imdb-small") else 1024)
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    set_up(args)
    task, tokenizer = task_of(args), get_tokenizer(args.tokenizer)
    name = task.source(args)
    if task.has_reward and not name.exists():
        print(f"no {name} yet, which train_dpo.py samples: this is what train_sft.py trains on")
        training, _ = task.sft_examples(args)
    else:
        training, _ = task.preferences(args)
    encoded = read_and_report("training", args.strict, encode_all, training, tokenizer,
                              args.row_length)
    if not encoded:
        raise UserError(f"{name}: no row is left to train on")
    n = min(16, len(encoded))
    batch = pack(Batches(encoded, n, args.seed, whole=True)[0], args.row_length)
    width = shutil.get_terminal_size((100, 24)).columns
    print(f"{show_counts(encoded)}\n\nthe first of {len(batch.tokens)} rows of a batch of 16 "
          f"prompts; _ is a space, | begins another prompt, answer 0 is the prompt\n\n"
          + show_row(batch, 0, tokenizer, width, sys.stdout.isatty()))


if __name__ == "__main__":
    main()
