"""The tokenizers: GPT-2's, its smaller version, and the small one of the reviews task."""

import re

import tiktoken

from runtime.errors import UserError
from tasks.reviews import FEELINGS, PLURAL, QUALITIES, SINGULAR, VERDICTS, WHEN, WHO

TOKENIZERS = ["reviews", "gpt2", "gpt2-8k"]
TOKENIZER = {"reviews": "reviews", "imdb-small": "gpt2-8k"}         # that of other tasks is gpt2
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
EOT = "<|endoftext|>"


class Tokenizer(tiktoken.Encoding):
    """A byte-pair encoding that raises UserError for a text on which tiktoken gives up."""

    def encode_ordinary(self, text):
        """The ids of a text. What looks like end-of-text in it stays text. Raises UserError."""
        try:
            return super().encode_ordinary(text)
        except BaseException as error:      # a million blanks and a letter: PanicException, which
            if type(error).__name__ != "PanicException":        # is not an Exception
                raise
            raise UserError(f"tiktoken cannot encode this text of {len(text):,} characters: "
                            f"{text[:40]!r}...") from error


def get_tokenizer(name):
    """A Tokenizer, which can encode any text. Raises UserError.

    "gpt2": GPT-2's 50,257 tokens. "gpt2-8k": the first 8,192 of its merges only, for models from
    random weights on a CPU, which would spend most of their time on the output head of 50,257
    tokens. "reviews": the 256 bytes and the words of the reviews task.
    """
    if name == "reviews":
        return reviews_tokenizer()
    try:
        gpt2 = tiktoken.get_encoding("gpt2" if name == "gpt2-8k" else name)
    except Exception as error:      # any kind of network error, or a cache that is not writable
        raise UserError(
            f"--tokenizer {name}: tiktoken could not load it ({type(error).__name__}); it needs "
            "the network once, or its files in the folder that TIKTOKEN_CACHE_DIR names") from error
    if name == "gpt2-8k":
        return first_merges(gpt2, 8192)
    return byte_pairs(name, gpt2._mergeable_ranks, gpt2._pat_str)


def byte_pairs(name, ranks, pattern=GPT2_PATTERN):
    """A Tokenizer. ranks: {bytes of a token: its id}, in the order of the merges. End-of-text comes
    after them."""
    return Tokenizer(name, pat_str=pattern, mergeable_ranks=ranks,
                     special_tokens={EOT: len(ranks)})


def first_merges(gpt2, n):
    """The first n merges of GPT-2's tokenizer, a byte-pair encoding of their own: each merge joins
    two tokens of earlier merges. A token's rank is the order of its merge, after the 256 bytes."""
    ranks = {token: rank for token, rank in gpt2._mergeable_ranks.items() if rank < 256 + n}
    return byte_pairs(f"gpt2-{n}", ranks)


def reviews_tokenizer():
    phrases = [*SINGULAR, *PLURAL, *WHO, *WHEN, *QUALITIES, *FEELINGS, *VERDICTS,
               "the was were and but saw watched this"]
    words = {word for phrase in phrases for word in re.findall(r"\w+", phrase)}
    tokens = sorted({f" {word}" for word in words | {"The"}} | {"The", "My", "We"})
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {token.encode(): 256 + i for i, token in enumerate(tokens)}
    return byte_pairs("reviews", ranks)
