"""The tokenizers: GPT-2's, its smaller version, and the small one of the reviews task."""

import re

import tiktoken

from runtime.errors import UserError
from tasks.reviews import FEELINGS, PLURAL, QUALITIES, SINGULAR, VERDICTS, WHEN, WHO

TOKENIZERS = ["reviews", "gpt2", "gpt2-8k"]
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def get_tokenizer(name):
    """A tiktoken.Encoding, which can encode any text. Raises UserError.

    "gpt2": GPT-2's 50,257 tokens. "gpt2-8k": the first 8,192 of its merges only, for models from
    random weights on a CPU, which would spend most of their time on the output head of 50,257
    tokens. "reviews": the 256 bytes and the words of the reviews task.
    """
    if name == "reviews":
        return reviews_tokenizer()
    try:
        encoding = tiktoken.get_encoding("gpt2" if name == "gpt2-8k" else name)
    except Exception as error:      # any kind of network error, or a cache that is not writable
        raise UserError(
            f"--tokenizer {name}: tiktoken could not load it ({type(error).__name__}); it needs "
            "the network once, or its files in the folder that TIKTOKEN_CACHE_DIR names") from error
    return first_merges(encoding, 8192) if name == "gpt2-8k" else encoding


def first_merges(gpt2, n):
    """The first n merges of GPT-2's tokenizer, a byte-pair encoding of their own: each merge joins
    two tokens of earlier merges. A token's rank is the order of its merge, after the 256 bytes."""
    ranks = {token: rank for token, rank in gpt2._mergeable_ranks.items() if rank < 256 + n}
    return tiktoken.Encoding(f"gpt2-{n}", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def reviews_tokenizer():
    phrases = [*SINGULAR, *PLURAL, *WHO, *WHEN, *QUALITIES, *FEELINGS, *VERDICTS,
               "the was were and but saw watched this"]
    words = {word for phrase in phrases for word in re.findall(r"\w+", phrase)}
    tokens = sorted({f" {word}" for word in words | {"The"}} | {"The", "My", "We"})
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {token.encode(): 256 + i for i, token in enumerate(tokens)}
    return tiktoken.Encoding("reviews", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})
