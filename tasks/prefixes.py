"""The prompts of C.1: the first 2 to 8 tokens of a review."""

from data import is_held_out
from runtime.errors import UserError


def draw_prefixes(draw_review, rng, count, held_out, tokenizer, flag):
    """`count` distinct prefixes, as texts. Either all of them are held out or none is
    (data.is_held_out), so training and evaluation share no prompt.

    draw_review: a function of rng, a random.Random, that returns the text of a review. flag: the
    one that asked for the prefixes. Raises UserError if there are not that many.
    """
    found, draws = {}, 0
    while len(found) < count:
        draws += 1
        if draws > 1000 * (len(found) + 100):
            raise UserError(f"the reviews do not have {count:,} different beginnings; lower "
                            f"{flag}")
        ids = tokenizer.encode_ordinary(draw_review(rng))[:rng.randint(2, 8)]
        text = tokenizer.decode(ids)
        # A cut inside a word or a character may give a text that has other tokens.
        if is_held_out(text) == held_out and tokenizer.encode_ordinary(text) == ids:
            found[text] = None
    return list(found)
