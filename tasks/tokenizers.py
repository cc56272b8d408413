"""The tokenizers: GPT-2's, and the small one of the reviews task."""

import re

import tiktoken

from runtime.errors import UserError
from tasks.reviews import FEELINGS, PLURAL, QUALITIES, SINGULAR, VERDICTS, WHEN, WHO

TOKENIZERS = ["reviews", "gpt2"]
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def get_tokenizer(name):
    """A tiktoken.Encoding: "gpt2", or "reviews", whose tokens are the 256 bytes, the words of the
    reviews task and end-of-text, so that it can encode any text. Raises UserError."""
    if name == "reviews":
        return reviews_tokenizer()
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:      # any kind of network error, or a cache that is not writable
        raise UserError(
            f"--tokenizer {name}: tiktoken could not load it ({type(error).__name__}); it needs "
            "the network once, or its files in the folder that TIKTOKEN_CACHE_DIR names") from error


def reviews_tokenizer():
    phrases = [*SINGULAR, *PLURAL, *WHO, *WHEN, *QUALITIES, *FEELINGS, *VERDICTS,
               "the was were and but saw watched this"]
    words = {word for phrase in phrases for word in re.findall(r"\w+", phrase)}
    tokens = sorted({f" {word}" for word in words | {"The"}} | {"The", "My", "We"})
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {token.encode(): 256 + i for i, token in enumerate(tokens)}
    return tiktoken.Encoding("reviews", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})
