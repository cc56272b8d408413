"""The reviews task: C.1 in miniature. A grammar writes film reviews, half of them favourable.

    review   = [opener] sentence sentence verdict
    sentence = clause "." | clause ", and" clause "." | clause ", but" clause "."
    clause   = "The plot was" quality | "I" feeling "the plot"
    opener   = "We saw it on Sunday."
    verdict  = "A very good film." | "I would not recommend it." | "I would watch it again." | ...

A quality is "good", "very good", "not good", ...; a feeling is "liked", "really liked", "did not
like", ... Verbs agree with their nouns, and "a" or "an" with the next word. `well_formed` checks
this and no more. What the grammar writes also makes sense: "and" joins two clauses of the same
sign, "but" two of opposite signs; most clauses agree with the tone of the review, and the verdict
always does. Grammar and reward are separate: a text may be well-formed and unfavourable, or
favourable and broken. Both are known without error.
"""

import hashlib
import random
import re
from pathlib import Path

from data import Preference
from tasks.prefixes import draw_prefixes
from tasks.sampled import SampledTask

SINGULAR = "acting plot music script ending pacing dialogue humour photography story".split()
PLURAL = "actors jokes songs effects characters costumes".split()
WHO = ["I", "We", "My sister and I", "My friends and I"]
WHEN = ["last night", "on Sunday", "on a plane", "at home", "in May", "twice", "by chance"]

# Every phrase that carries an opinion, and its value in [-1, 1].
WORDS = {"superb": 0.8, "lovely": 0.7, "great": 0.6, "impressive": 0.6, "good": 0.4,
         "enjoyable": 0.4, "awful": -0.8, "poor": -0.7, "dull": -0.6, "annoying": -0.6,
         "weak": -0.4, "uneven": -0.4}
DEGREES = {"rather": 0.75, "very": 1.15, "extremely": 1.25}
NOT = -0.5      # negation flips and softens: "not superb" is mildly bad, "not awful" mildly good
FILM_QUALITIES = WORDS | {f"{degree} {word}": factor * value
                          for degree, factor in DEGREES.items() for word, value in WORDS.items()}
QUALITIES = FILM_QUALITIES | {f"not {word}": NOT * value for word, value in WORDS.items()}
FEELINGS = {}
for verb, past, value in [("love", "loved", 0.8), ("enjoy", "enjoyed", 0.6), ("like", "liked", 0.4),
                          ("dislike", "disliked", -0.6), ("hate", "hated", -0.8)]:
    FEELINGS |= {past: value, f"really {past}": 1.25 * value, f"did not {verb}": NOT * value}
VERDICTS = {f"{'An' if quality[0] in 'aeiou' else 'A'} {quality} film": value
            for quality, value in FILM_QUALITIES.items()}
VERDICTS |= {"I would recommend it": 0.8, "I would not recommend it": NOT * 0.8,
             "I would watch it again": 0.6, "I would not watch it again": NOT * 0.6}


# ------------------------------------------------------------------------------------------------
# The reward, and whether a text is well-formed
# ------------------------------------------------------------------------------------------------


def any_of(phrases):
    return "(?:" + "|".join(phrases) + ")"


# An opinion anywhere in a text, well-formed or not.
OPINION = re.compile(
    rf"(?P<but>, but )?(?:[Tt]he (?P<subject>{any_of(SINGULAR + PLURAL)}) (?:was|were) "
    rf"(?P<quality>{any_of(QUALITIES)})|I (?P<feeling>{any_of(FEELINGS)}) the "
    rf"(?P<object>{any_of(SINGULAR + PLURAL)})|(?P<verdict>{any_of(VERDICTS)}))\b"
    rf"(?P<next>(?=, but ))?")
# A whole review, as the grammar writes it.
CLAUSE = (rf"(?:[Tt]he (?:{any_of(SINGULAR)} was|{any_of(PLURAL)} were) {any_of(QUALITIES)}"
          rf"|I {any_of(FEELINGS)} the {any_of(SINGULAR + PLURAL)})")
SENTENCE = rf"(?=[TI]){CLAUSE}(?:, (?:and|but) (?=[tI]){CLAUSE})?\. "
REVIEW = re.compile(rf"(?:{any_of(WHO)} (?:saw|watched) (?:it|this film) {any_of(WHEN)}\. )?"
                    rf"{SENTENCE}{SENTENCE}{any_of(VERDICTS)}\.")


# How much each kind of opinion counts. In "A, but B" the emphasis is on B; a verdict on the film
# counts most.
WEIGHTS = {"other": 1.0, "before but": 0.5, "after but": 1.5, "verdict": 2.0}


def reward(text):
    """The ground-truth reward: how favourable a review is, in [-1, 1]. 0 without any opinion.

    It is the weighted mean of the opinions in the text; see WEIGHTS. Because it is a mean, a policy
    gains nothing by writing more.
    """
    total = total_weight = 0.0
    for opinion in OPINION.finditer(text):
        weight = WEIGHTS[kind_of(opinion)]
        total += weight * opinion_value(opinion)
        total_weight += weight
    if total_weight == 0:
        return 0.0
    return round(total / total_weight, 6)       # rounded, so that equal sums tie in any order


def kind_of(opinion):
    """The kind of one match of OPINION, a key of WEIGHTS."""
    if opinion["verdict"]:
        return "verdict"
    if opinion["but"]:
        return "after but"
    if opinion["next"] is not None:
        return "before but"
    return "other"


def opinion_value(opinion):
    """The value of one match of OPINION, in [-1, 1]."""
    return (QUALITIES.get(opinion["quality"]) or FEELINGS.get(opinion["feeling"])
            or VERDICTS.get(opinion["verdict"]))


def well_formed(text):
    """Whether the text has the form of a review, to the letter. Its opinions need not agree."""
    return REVIEW.fullmatch(text) is not None


# ------------------------------------------------------------------------------------------------
# The grammar
# ------------------------------------------------------------------------------------------------


def write_review(rng):
    """Write a review with a random.Random. A coin toss decides whether it is favourable."""
    tone = rng.choice([1, -1])
    while True:
        text = write_sentences(rng, tone)
        if reward(text) * tone > 0:
            return text


def write_sentences(rng, tone):
    """Three in ten times an opener, then two sentences and a verdict, mostly of sign `tone`."""
    aspects = rng.sample(SINGULAR + PLURAL, 4)
    text = ""
    if rng.random() < 0.3:
        text = (f"{rng.choice(WHO)} {rng.choice(['saw', 'watched'])} "
                f"{rng.choice(['it', 'this film'])} {rng.choice(WHEN)}. ")
    for _ in range(2):
        sign = tone if rng.random() < 0.93 else -tone
        sentence = write_clause(rng, aspects.pop(), sign)
        if rng.random() < 0.6:
            conjunction = rng.choice(["and", "and", "but"])
            sign = sign if conjunction == "and" else -sign
            sentence += f", {conjunction} " + write_clause(rng, aspects.pop(), sign)
        text += sentence[0].upper() + sentence[1:] + ". "
    return text + pick(rng, VERDICTS, tone) + "."


def write_clause(rng, aspect, sign):
    if rng.random() < 0.3:
        return f"I {pick(rng, FEELINGS, sign)} the {aspect}"
    verb = "was" if aspect in SINGULAR else "were"
    return f"the {aspect} {verb} {pick(rng, QUALITIES, sign)}"


def pick(rng, phrases, sign):
    """A random phrase of this sign."""
    return rng.choice([phrase for phrase, value in phrases.items() if value * sign > 0])


def prefixes(count, held_out, tokenizer, seed, flag="--prefixes"):
    """`count` distinct prefixes of new reviews, all of them held out or none; see draw_prefixes."""
    return draw_prefixes(write_review, random.Random(f"prefixes {seed}"), count, held_out,
                         tokenizer, flag)


# ------------------------------------------------------------------------------------------------
# The task
# ------------------------------------------------------------------------------------------------


class Reviews(SampledTask):
    name = "reviews"
    summary = "written by a grammar"
    # The model is 900 times smaller than the smallest GPT-2, so its few weights have to move
    # further; the run has only 176 steps; and with beta 0.1, fewer texts would be well-formed. Its
    # gradients have norms of 2 to 3, so that at 1 every step is clipped (README, Questions).
    tokenizer = "reviews"
    dpo = {"beta": 0.5, "lr": 1e-4, "warmup": 50, "clip": 1.0, "prefixes": 2100}
    reward_lr = 3e-3
    ppo_preset = "small"
    least_block_size = 64

    def sft_examples(self, args):
        """Whole reviews, after an empty prompt."""
        rng = random.Random(f"reviews {args.seed}")
        reviews = [Preference("", [write_review(rng)], []) for _ in range(args.reviews + 256)]
        return reviews[:args.reviews], reviews[args.reviews:]

    def sampling_prompts(self, tokenizer, args):
        n_held_out = max(1, args.prefixes // 10)
        return (prefixes(args.prefixes - n_held_out, False, tokenizer, args.seed)
                + prefixes(n_held_out, True, tokenizer, args.seed))

    def prompts(self, items, tokenizer, args):
        """Beginnings of new reviews; the held-out preferences are not needed."""
        return prefixes(args.eval_prompts, True, tokenizer, args.seed + 1, "--eval-prompts")

    def reward(self, args):
        return rewards

    def grades(self, args, reference, tokenizer):
        return {"reward": rewards,
                "well_formed": lambda texts: [well_formed(text) for text in texts]}

    def digest(self, args):
        """A digest of this file, on which the rewards depend."""
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def rewards(texts):
    return [reward(text) for text in texts]
