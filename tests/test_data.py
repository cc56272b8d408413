"""The data, claim by claim: the reviews task, files, tokens, the packed row, batches.

    pytest tests/test_data.py

The reviews task and its tokenizer come first; then the tests follow data.py from top to bottom.
Claims about any text, any lengths or any row are properties: hypothesis draws the cases, the same
ones in every run. Expected results are computed here with plain loops. Two tests need files from
outside and are skipped without them: DPO_HH_FILE is Anthropic's helpful-base/test.jsonl.gz, and
TIKTOKEN_CACHE_DIR is a folder with GPT-2's BPE.

Left out on purpose: what a model makes of a batch. That is in test_model.py.
"""

import contextlib
import gzip
import io
import json
import math
import os
import random
import re
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import tiktoken
import torch
from hypothesis import given, settings, strategies as st

from data import (
    Batches,
    Encoded,
    Preference,
    best_answers,
    best_row_length,
    check_rankings,
    encode,
    encode_all,
    is_held_out,
    load_examples,
    load_preferences,
    pack,
    ranking_to_pairs,
    select_pairs,
)
from runtime.errors import UserError
from runtime.rows import Skipped, read_and_report
from runtime.run import fingerprint
from tasks import OWN_FILE
from tasks.reviews import (
    DEGREES,
    FEELINGS,
    PLURAL,
    QUALITIES,
    SINGULAR,
    VERDICTS,
    WORDS,
    prefixes,
    reward,
    well_formed,
    write_review,
)
from tasks.sampled import rank_answers
from tasks.tokenizers import get_tokenizer

ROOT = Path(__file__).parent.parent
for_all = settings(deadline=None, max_examples=40, derandomize=True)

TOKENIZER = get_tokenizer("reviews")
EOT = TOKENIZER.eot_token


def reviews(count, seed):
    rng = random.Random(seed)
    return [write_review(rng) for _ in range(count)]


REVIEWS = reviews(2000, seed=0)


def ids(text):
    return TOKENIZER.encode_ordinary(text)


def same(got, expected):
    """Assert that a tensor holds exactly these integers, in the same shape."""
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.int64), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------
# The reviews task: what the grammar writes
# ------------------------------------------------------------------------------------------------


def test_every_written_review_is_well_formed():
    """Otherwise `well_formed` would measure the grammar's own mistakes."""
    assert [review for review in REVIEWS if not well_formed(review)] == []


def test_about_half_of_the_reviews_are_favourable_and_none_is_undecided():
    """The SFT policy starts in the middle, with room to move in both directions."""
    # 2000 fair coin tosses have mean 1000 and standard deviation sqrt(2000 / 4) = 22.4; four
    # standard deviations are 89.
    assert abs(sum(reward(review) > 0 for review in REVIEWS) - 1000) < 4 * math.sqrt(2000 / 4)
    assert all(reward(review) != 0 for review in REVIEWS)


def test_thousands_of_reviews_are_thousands_of_different_texts():
    """More than 95 % of 2,000 reviews are distinct, so a model cannot memorize them."""
    assert len(set(REVIEWS)) > 0.95 * len(REVIEWS)


def test_a_review_has_14_to_48_tokens_and_about_25():
    """Short enough for a CPU, and always longer than the longest prefix, 8 tokens."""
    # Shortest: "I liked the plot." (5 tokens) twice and "An awful film." (4): 14.
    # Longest: "My friends and I watched this film on a plane." (11); "I did not like the plot, and
    # I did not like the songs." (6 + 2 + 6 + 1 = 15) twice; "I would not watch it again." (7):
    # 11 + 2 x 15 + 7 = 48.
    lengths = [len(ids(review)) for review in REVIEWS]
    assert 14 <= min(lengths) and max(lengths) <= 48
    assert 20 < sum(lengths) / len(lengths) < 40


def test_the_same_seed_writes_the_same_reviews():
    """A run is reproducible, and another seed gives other reviews."""
    assert reviews(50, seed=0) == REVIEWS[:50] != reviews(50, seed=1)


def test_and_joins_clauses_of_one_sign_and_but_of_opposite_signs():
    """Reviews make sense, so there is more to learn than which words occur."""
    joined = Counter()
    for review in REVIEWS:
        for sentence in review.split(". "):
            clauses = re.split(", (and|but) ", sentence)
            if len(clauses) == 3:
                first, joint, second = clauses
                assert (reward(first) * reward(second) > 0) == (joint == "and"), sentence
                joined[joint] += 1
    assert min(joined["and"], joined["but"]) > 500


def test_the_verdict_agrees_with_the_whole_review():
    """A review that ends with "I would recommend it." is favourable."""
    for review in REVIEWS:
        assert reward(review) * reward(review.split(". ")[-1]) > 0, review


# ------------------------------------------------------------------------------------------------
# The reviews task: the reward and the grammar as judges
# ------------------------------------------------------------------------------------------------

BY_HAND = {
    # A word, a degree, a "not".
    "The plot was good.": 0.4,
    "The jokes were awful.": -0.8,
    "The plot was very good.": 0.46,                    # 1.15 * 0.4
    "The plot was rather dull.": -0.45,                 # 0.75 * -0.6
    "The plot was extremely superb.": 1.0,              # 1.25 * 0.8
    "The plot was not superb.": -0.4,                   # -0.5 * 0.8: flipped and softer
    "The plot was not awful.": 0.4,                     # -0.5 * -0.8
    # Feelings.
    "I liked the plot.": 0.4,
    "I really liked the plot.": 0.5,                    # 1.25 * 0.4
    "I did not like the plot.": -0.2,                   # -0.5 * 0.4
    "I did not hate the songs.": 0.4,                   # -0.5 * -0.8
    # Verdicts.
    "An awful film.": -0.8,
    "A very good film.": 0.46,
    "I would recommend it.": 0.8,
    "I would not recommend it.": -0.4,
    "I would not watch it again.": -0.3,                # -0.5 * 0.6
    # Weighted means: a clause has weight 1, before "but" 0.5, after it 1.5; a verdict has 2.
    "The plot was good. The jokes were awful.": -0.2,               # (0.4 - 0.8) / 2
    "The plot was good, and the jokes were awful.": -0.2,           # the same
    "The plot was good, but the jokes were awful.": -0.5,           # (0.2 - 1.2) / 2
    "I hated the plot, but I loved the songs.": 0.4,                # (-0.4 + 1.2) / 2
    "The plot was awful. A superb film.": 0.266667,  # (-0.8 + 1.6) / 3
    "We saw it on Sunday. The plot was good, but I hated the jokes. I enjoyed the ending. "
    "I would recommend it.": 0.24,                      # (0.2 - 1.2 + 0.6 + 1.6) / (2 + 1 + 2)
    # Opinions count even in broken text; other text does not count.
    "the plot were good good the": 0.4,
    "": 0.0,
    "We saw it on Sunday.": 0.0,
    "Good. Very good. The weather was lovely.": 0.0,
}


@pytest.mark.parametrize("text", BY_HAND)
def test_the_reward_of_a_text_is_the_mean_worked_out_on_paper(text):
    """The reward is the ground truth of the reviews task. Here it is computed by hand."""
    assert reward(text) == pytest.approx(BY_HAND[text], abs=1e-6)


def test_every_phrase_is_read_whole_and_is_worth_what_its_table_says():
    """"very good" is not read as "good", and "An extremely dull film" is not overlooked."""
    for quality, value in QUALITIES.items():
        assert reward(f"The plot was {quality}.") == pytest.approx(value, abs=1e-6), quality
    for feeling, value in FEELINGS.items():
        assert reward(f"I {feeling} the songs.") == pytest.approx(value, abs=1e-6), feeling
    for verdict, value in VERDICTS.items():
        assert reward(f"{verdict}.") == pytest.approx(value, abs=1e-6), verdict


def test_not_flips_and_halves_every_phrase_that_can_take_it():
    """Negation multiplies a value by -0.5, so counting words is not enough."""
    verbs = {"love": "loved", "enjoy": "enjoyed", "like": "liked", "dislike": "disliked",
             "hate": "hated"}
    negated = {f"The plot was {word}.": f"The plot was not {word}." for word in WORDS}
    negated |= {f"I {past} the plot.": f"I did not {verb} the plot."
                for verb, past in verbs.items()}
    negated |= {f"I would {act}.": f"I would not {act}."
                for act in ["recommend it", "watch it again"]}
    assert len(negated) == 12 + 5 + 2
    for plain, flipped in negated.items():
        assert reward(plain) != 0
        assert reward(flipped) == pytest.approx(-reward(plain) / 2, abs=1e-6), flipped


def test_a_stronger_degree_is_a_stronger_opinion():
    """rather < no degree < very < extremely, for praise and for blame."""
    for word in WORDS:
        strengths = [abs(reward(f"The plot was {degree}{word}."))
                     for degree in ["rather ", "", "very ", "extremely "]]
        assert strengths == sorted(set(strengths)), word
    assert set(DEGREES) == {"rather", "very", "extremely"}


opinions = st.sampled_from(
    [f"{the} {noun} was {quality}" for the in ["The", "the"] for noun in SINGULAR + PLURAL
     for quality in QUALITIES]
    + [f"I {feeling} the {noun}" for feeling in FEELINGS for noun in SINGULAR + PLURAL]
    + list(VERDICTS))


@for_all
@given(st.lists(st.tuples(opinions, st.sampled_from([". ", ", but ", ", and ", " ", ""]))
                .map("".join)).map("".join) | st.text())
def test_the_reward_of_any_text_is_between_minus_one_and_one(text):
    """Whatever a policy writes, its reward is bounded."""
    assert -1 <= reward(text) <= 1


@for_all
@given(st.lists(opinions, min_size=1, max_size=6), st.integers(2, 4))
def test_writing_the_same_again_gains_nothing(phrases, times):
    """The reward is a mean, not a sum, so length alone is not rewarded."""
    text = "".join(f"{phrase}. " for phrase in phrases)
    assert reward(text * times) == pytest.approx(reward(text), abs=1e-6)


REVIEW = ("The jokes were poor. I liked the plot, but the ending was dull. "
          "I would not recommend it.")


def test_these_reviews_are_well_formed():
    """The broken reviews below are made from the first of these."""
    assert well_formed(REVIEW)
    assert well_formed(f"My sister and I watched this film on a plane. {REVIEW}")
    assert well_formed("I hated the plot. I loved the plot. An awful film.")


@pytest.mark.parametrize("old, new", [
    pytest.param("jokes were", "jokes was", id="a plural with was"),
    pytest.param("ending was", "ending were", id="a singular with were"),
    pytest.param("I would not recommend it", "A awful film", id="a awful"),
    pytest.param("I would not recommend it", "An poor film", id="an poor"),
    pytest.param("I would not recommend it", "An very awful film", id="an very"),
    pytest.param(" I would not recommend it.", "", id="no verdict"),
    pytest.param("it.", "it. ", id="a space at the end"),
    pytest.param("it.", "it.\n", id="a line break at the end"),
    pytest.param("it.", "it. It rained.", id="more text at the end"),
    pytest.param("it.", "it. I would not recommend it.", id="two verdicts"),
    pytest.param("poor.", "poor. The songs were great.", id="three sentences"),
    pytest.param("The jokes were poor. ", "", id="one sentence"),
    pytest.param("The jokes", "the jokes", id="lower case at the start"),
    pytest.param("the ending", "The ending", id="upper case after a comma"),
    pytest.param("it.", "it", id="no full stop at the end"),
    pytest.param("poor.", "poor", id="no full stop in the middle"),
    pytest.param(", but", " but", id="no comma before but"),
    pytest.param("plot,", "plot, and I liked the songs,", id="three clauses"),
    pytest.param("The jokes", "We saw it. The jokes", id="an opener without a when"),
    pytest.param("jokes", "weather", id="a word the grammar does not know"),
    pytest.param("poor", "not very poor", id="not with a degree"),
    pytest.param(". I", ".  I", id="two spaces"),
])
def test_a_review_with_one_mistake_is_not_well_formed(old, new):
    """One mistake is enough, so it is noticed at once if a policy loses the grammar."""
    broken = REVIEW.replace(old, new, 1)
    assert broken != REVIEW and not well_formed(broken)


def test_no_words_at_all_are_not_a_review():
    """A policy that ends at once has not written a review."""
    assert not well_formed("")


# ------------------------------------------------------------------------------------------------
# Prefixes, and which prompts are held out
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [False, True])
def test_prefixes_are_so_many_different_beginnings_of_2_to_8_tokens(held_out):
    """These are the prompts of C.1. (There are few prefixes of 2 tokens, such as "The plot", and
    none of them is held out, so length 2 may be missing.)"""
    found = prefixes(200, held_out, TOKENIZER, seed=3)
    assert len(set(found)) == len(found) == 200
    assert {len(ids(prefix)) for prefix in found} | {2} == set(range(2, 9))


def test_a_prefix_begins_as_reviews_begin():
    """A prefix is the beginning of a review, so its first two or three tokens also begin one of
    3,000 other reviews."""
    words = {tuple(ids(review)[:n]) for review in reviews(3000, seed=5) for n in (2, 3)}
    for prefix in prefixes(200, False, TOKENIZER, seed=3):
        assert tuple(ids(prefix)[:3]) in words


def test_training_and_held_out_prefixes_never_meet():
    """Even across seeds, evaluation uses only prompts that are never trained on."""
    training = {p for seed in (0, 1) for p in prefixes(300, False, TOKENIZER, seed)}
    evaluation = {p for seed in (0, 2) for p in prefixes(100, True, TOKENIZER, seed)}
    assert not training & evaluation
    assert not any(map(is_held_out, training)) and all(map(is_held_out, evaluation))


def test_prefixes_depend_on_their_seed_alone():
    """They do not depend on Python's global generator or on earlier draws, and asking for fewer
    gives the first ones of a longer list."""
    random.seed(1)
    found = prefixes(50, False, TOKENIZER, seed=3)
    random.seed(2)
    prefixes(10, True, TOKENIZER, seed=9)
    assert prefixes(50, False, TOKENIZER, seed=3) == found
    assert prefixes(20, False, TOKENIZER, seed=3) == found[:20]
    assert prefixes(50, False, TOKENIZER, seed=4) != found


def test_about_one_prompt_in_ten_is_held_out():
    """That is enough to evaluate on, and leaves nine tenths for training."""
    # 2000 draws of probability 1/10 have mean 200 and standard deviation
    # sqrt(2000 * 0.1 * 0.9) = 13.4; four standard deviations are 54.
    held_out = sum(map(is_held_out, REVIEWS))
    assert abs(held_out - 200) < 4 * math.sqrt(2000 * 0.1 * 0.9)


def test_whether_a_prompt_is_held_out_is_the_same_in_every_run():
    """Python's hash of a string changes from run to run, but CRC-32 does not. The expected answers
    are written out here."""
    # The CRC-32 of "123456789" is the standard's check value, 0xCBF43926 = 3421780262, which ends
    # in 2. That of "" is 0, a multiple of 10; that of "a" is 3904355907.
    assert [is_held_out(prompt) for prompt in ["123456789", "", "a"]] == [False, True, False]
    # Of the prompts "0" to "99", these are held out:
    assert [n for n in range(100) if is_held_out(str(n))] == [
        6, 29, 37, 40, 48, 81, 82, 88, 94]


@for_all
@given(st.text(st.characters(), max_size=5))
def test_any_text_is_held_out_or_not(prompt):
    """No text raises an error, not even half a surrogate pair, which JSON can spell and UTF-8
    cannot encode."""
    assert is_held_out(prompt) in (True, False)
    assert is_held_out("\ud800") in (True, False)


# ------------------------------------------------------------------------------------------------
# The reviews tokenizer
# ------------------------------------------------------------------------------------------------


@for_all
@given(st.text() | st.lists(st.sampled_from(REVIEWS[:50])).map("\n".join))
def test_any_text_comes_back_as_it_went_in(text):
    """Every byte is a token, so there are no unknown words."""
    assert TOKENIZER.decode(ids(text)) == text


@for_all
@given(st.text(), st.text())
def test_text_that_spells_end_of_text_stays_text(before, after):
    """A user cannot type a control token."""
    text = f"{before}<|endoftext|>{after}"
    assert EOT not in ids(text)
    assert TOKENIZER.decode(ids(text)) == text


def test_end_of_text_is_one_id_of_its_own_the_last():
    """As a special token, end-of-text encodes to a single id, the last of the vocabulary."""
    assert TOKENIZER.encode("<|endoftext|>", allowed_special="all") == [EOT]
    assert EOT == TOKENIZER.n_vocab - 1


def test_each_word_and_each_mark_of_a_review_is_one_token():
    """So a small model soon learns to write, and its tokens are readable."""
    for review in REVIEWS[:300] + [REVIEW]:
        assert [TOKENIZER.decode([i]) for i in ids(review)] == re.findall(r" ?\w+|[.,]", review)


def test_a_text_that_tiktoken_cannot_encode_is_one_sentence(monkeypatch):
    """A million blanks and a letter make it panic with an exception that `except Exception` does
    not catch. Other exceptions, such as Ctrl-C, are none of the tokenizer's business."""
    class PanicException(BaseException):
        pass
    for error, expected in [(PanicException("StackOverflow"), UserError),
                            (KeyboardInterrupt(), KeyboardInterrupt)]:
        monkeypatch.setattr(tiktoken.Encoding, "encode_ordinary", Mock(side_effect=error))
        with pytest.raises(expected) as caught:
            encode(Preference(" " * 10**6 + "x", ["a", "b"], [(0, 1)]), TOKENIZER, 32)
        if expected is UserError:
            assert "cannot encode this text of 1,000,001 characters" in str(caught.value)


def test_a_tokenizer_that_cannot_be_had_is_named():
    """A wrong name is for the user to fix, so it raises a UserError that repeats the name."""
    with pytest.raises(UserError, match="no-such-tokenizer"):
        get_tokenizer("no-such-tokenizer")


# ------------------------------------------------------------------------------------------------
# Preference files
# ------------------------------------------------------------------------------------------------


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path, content):
    """Write bytes to a file, gzipped if its name ends in .gz."""
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


PAIR = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
RANKING = {"prompt": "Q", "answers": ["a", "b", "c"], "ranking": [2, 0, 1]}
DIALOGUES = {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why\n\nAssistant: Because",
             "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why\n\nAssistant: No"}
THREE_FORMS = [
    Preference("Q", ["yes", "no"], [(0, 1)]),
    Preference("Q", ["a", "b", "c"], [(2, 0), (2, 1), (0, 1)]),
    Preference("\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why\n\nAssistant:", [" Because", " No"],
               [(0, 1)]),
]


def chat(*turns):
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


SYSTEM = {"role": "system", "content": "Be kind."}
HI = Preference("\n\nHuman: Hi\n\nAssistant:", [" yes", " no"], [(0, 1)])
WHY = Preference("Be kind.\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why\n\nAssistant:",
                 [" Because", " No"], [(0, 1)])
LAYOUTS = {                                             # a row, and what it says
    "several rejected": (PAIR | {"rejected": ["no", "never"]},
                         Preference("Q", ["yes", "no", "never"], [(0, 1), (0, 2)])),
    "several chosen": (PAIR | {"chosen": ["yes", "sure"]},
                       Preference("Q", ["yes", "sure", "no"], [(0, 2), (1, 2)])),
    "one rejected in a list": (PAIR | {"rejected": ["no"]}, THREE_FORMS[0]),
    "ranks from 0": (RANKING | {"ranking": [1, 0, 1]},
                     Preference("Q", ["a", "b", "c"], [(1, 0), (1, 2)])),
    "ranks from 1, two best": (RANKING | {"ranking": [1, 3, 1]},
                               Preference("Q", ["a", "b", "c"], [(0, 1), (2, 1)])),
    "scores": ({"prompt": "Q", "answers": ["a", "b", "c", "d"], "scores": [1, 2.5, 1.0, -3]},
               Preference("Q", ["a", "b", "c", "d"], [(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)])),
    "responses": ({"prompt": "Q", "responses": ["a", "b"], "scores": [1, 2]},
                  Preference("Q", ["a", "b"], [(1, 0)])),
    "a chat": ({"prompt": chat("Hi"), "chosen": chat("Hi", "yes")[1:],
                "rejected": chat("Hi", "no")[1:]}, HI),
    "a chat without a prompt": ({"chosen": chat("Hi", "yes"), "rejected": chat("Hi", "no")}, HI),
    "a chat and an empty prompt": ({"prompt": "", "chosen": chat("Hi", "yes"),
                                    "rejected": chat("Hi", "no")}, HI),
    "a chat and its prompt": ({"prompt": "Hi", "chosen": chat("Hi", "yes"),
                               "rejected": chat("Hi", "no")}, HI),
    "a chat with all its messages": (
        {"prompt": "Hi", "messages": chat("Hi", "yes"), "text": "Hi yes", "completion": "yes",
         "chosen": chat("Hi", "yes"), "rejected": chat("Hi", "no")}, HI),
    "a chat, the answers as text": ({"prompt": chat("Hi"), "chosen": "yes", "rejected": "no"}, HI),
    "a chat with a system message": (
        {"prompt": [SYSTEM, *chat("Hi", "Yes?", "Why")], "chosen": chat("", "Because")[1:],
         "rejected": chat("", "No")[1:]}, WHY),
    "the same without a prompt": (
        {"chosen": [SYSTEM, *chat("Hi", "Yes?", "Why", "Because")],
         "rejected": [SYSTEM, *chat("Hi", "Yes?", "Why", "No")]}, WHY),
    "a prompt after a system message": (
        {"prompt": "Hi", "chosen": [SYSTEM, *chat("Hi", "Yes?", "Why", "Because")],
         "rejected": [SYSTEM, *chat("Hi", "Yes?", "Why", "No")]}, WHY),
}
TEXTS = {                                               # one answer: enough for SFT
    "completion": ({"prompt": "Q", "completion": " a"}, Preference("Q", [" a"], [])),
    "text": ({"text": "A text."}, Preference("", ["A text."], [])),
    "messages": ({"messages": [SYSTEM, *chat("Hi", "Yes?", "Why", "Because")]},
                 Preference(WHY.prompt, [" Because"], [])),
    "a completion of messages": ({"prompt": chat("Hi"), "completion": chat("Hi", "yes")[1:]},
                                 Preference(HI.prompt, [" yes"], [])),
}


@pytest.mark.parametrize("name", ["plain.jsonl", "zipped.jsonl.gz"])
def test_the_three_forms_of_a_preference_are_read(tmp_path, name):
    """A pair of answers, a ranking, two dialogues; HH is split at its last "\\n\\nAssistant:"."""
    path, skipped = write(tmp_path / name, lines(PAIR, RANKING, DIALOGUES)), Skipped()
    assert load_preferences(path, skipped) == THREE_FORMS
    assert load_preferences(str(path)) == THREE_FORMS
    assert skipped == Skipped() and not skipped.notes


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_layout_is_read_as_exactly_the_pairs_that_it_states(tmp_path, kind):
    """Answers that tie have no pair, and a pair of the best answer comes first."""
    row, expected = LAYOUTS[kind]
    path = write(tmp_path / "file.jsonl", lines(row))
    assert load_preferences(path) == load_examples(path) == [expected]


@pytest.mark.parametrize("kind", TEXTS)
def test_a_row_with_one_answer_is_read_for_sft_and_refused_for_dpo(tmp_path, kind):
    row, expected = TEXTS[kind]
    path = write(tmp_path / "file.jsonl", lines(row))
    assert load_examples(path) == [expected] == best_answers([expected])
    with pytest.raises(UserError, match="one answer is enough for SFT, but DPO needs \"chosen\""):
        load_preferences(path)


def test_every_row_in_the_table_of_layouts_is_read(tmp_path):
    """The first column of the table in docs/preferences.md, whose prompts and answers are Q, a, b
    and c. The second one says which rows are for SFT only."""
    table = (ROOT / "docs" / "preferences.md").read_text()
    rows = re.findall(r"^\| `(\{.*?\})` \| (.*) \|$", table, re.MULTILINE)
    assert len(rows) == 12
    for row, words in rows:
        path = write(tmp_path / "file.jsonl", row.encode())
        [found] = load_examples(path)
        assert "Q" in found.prompt or "text without a prompt" in words
        assert [answer.strip() for answer in found.answers] == ["a", "b", "c"][:len(found.answers)]
        assert (found.pairs == []) == words.startswith("for SFT only")
        assert found.pairs == [] or load_preferences(path) == [found]


def test_ranks_and_indices_in_one_file_are_refused(tmp_path):
    """[1, 2, 0] as indices puts answer 1 first, as ranks answer 2; ties show that these are ranks.
    [0, 2, 1] means the same either way."""
    tied, either, indices = ([0, 1, 1], [0, 2, 1], [1, 2, 0])
    path = write(tmp_path / "file.jsonl", lines(*[RANKING | {"ranking": ranking}
                                                  for ranking in (tied, either, tied)]))
    skipped = Skipped()
    assert [p.pairs for p in load_preferences(path, skipped)] == [
        [(0, 1), (0, 2)], [(0, 2), (0, 1), (2, 1)], [(0, 1), (0, 2)]]
    assert '"ranking" has equal numbers: read as the rank of each answer' in skipped.notes[0]
    for pair in [(tied, indices), (indices, tied)]:
        write(path, lines(*[RANKING | {"ranking": ranking} for ranking in pair]))
        with pytest.raises(UserError, match='line 2: "ranking" has equal numbers in some rows'):
            load_preferences(path)


def test_plackett_luce_refuses_ties():
    """The ranking of a batch is rebuilt from the pairs, which ties do not allow."""
    whole = encode(Preference("Q", ["a", "b", "c"], [(0, 1), (0, 2), (1, 2)]), TOKENIZER, 64)
    tied = encode(Preference("Q", ["a", "b", "c"], [(0, 1), (0, 2)]), TOKENIZER, 64)
    check_rankings([whole, whole], "file")
    with pytest.raises(UserError, match="file: in 1 of 2 rows some answers tie, and --loss plack"):
        check_rankings([whole, tied], "file")


def noted(tmp_path, *rows, load=load_preferences):
    """What read_and_report prints of a file with these rows, after the line with the counts."""
    path = write(tmp_path / "file.jsonl", lines(*rows))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        read_and_report("file", False, load, path)
    return out.getvalue().splitlines()


def test_other_keys_are_ignored_and_listed_once(tmp_path):
    """A "system" beside a prompt changes what the answers mean. Empty values change nothing, nor do
    the rewards that our own rankings were made from."""
    more = {"id": 7, "source": None, "history": [], "system": "Be kind."}
    assert noted(tmp_path, PAIR | more, DIALOGUES | more, RANKING) == [
        'file: ignored keys: "id", "system"; text that belongs to the prompt must be part of it']
    assert noted(tmp_path, RANKING | {"scores": [1, 2, 3]})[0].startswith(
        'file: ignored keys: "scores"')
    assert noted(tmp_path, RANKING | {"rewards": [1, 2, 3], "source": ""}, PAIR) == []
    path = tmp_path / "file.jsonl"
    assert load_preferences(path) == [THREE_FORMS[1], THREE_FORMS[0]]
    for row, _ in TEXTS.values():
        note = noted(tmp_path, row | more, load=load_examples)[-1]
        assert note.startswith('file: ignored keys: "id", "system";')


def test_that_chats_are_rewritten_is_said_once(tmp_path):
    rows = [LAYOUTS[kind][0] for kind in ("a chat", "a chat with a system message")]
    [note] = noted(tmp_path, *rows)
    assert note.startswith('file: chats are written as "\\n\\nHuman:" and "\\n\\nAssistant:" turns')


@pytest.mark.parametrize("marker", ["<|endoftext|>", "</s>", "<|im_end|>", "<eos>"])
def test_markers_at_the_end_of_most_answers_are_mentioned(tmp_path, marker):
    """They are learned as letters, and every sample then ends with them. A third is not most."""
    marked = {"prompt": "Q", "chosen": f"yes{marker}\n", "rejected": f"no{marker}"}
    assert noted(tmp_path, marked, PAIR | {"prompt": "P"}) == [
        f'file: 2 of 4 answers end with "{marker}", which is learned as text: remove it, since '
        "end-of-text is added to each answer"]
    assert noted(tmp_path, *[PAIR | {"prompt": f"P {i}"} for i in range(2)], marked) == []


@pytest.mark.parametrize("prompt", ["<|im_start|>user\nHi<|im_end|>\n", "[INST] Hi [/INST]",
                                    "<|endoftext|>Hi", "<start_of_turn>user"])
def test_the_template_of_another_model_in_the_prompts_is_mentioned(tmp_path, prompt):
    marked, other = PAIR | {"prompt": prompt}, PAIR | {"prompt": "P"}
    [note] = noted(tmp_path, marked, other)
    assert note.startswith("file: 1 of 2 prompts contain ") and "without the template" in note
    assert noted(tmp_path, marked, other, PAIR) == []


def test_repeated_and_contradicting_pairs_are_counted_and_kept(tmp_path):
    """Three times yes over no is two repetitions; the opposite twice is one more, and the two
    answers are preferred in both directions. Of the ranking, c over a is repeated."""
    opposite = {"prompt": "Q", "chosen": "no", "rejected": "yes"}
    other = {"prompt": "Q", "chosen": "c", "rejected": "a"}
    assert noted(tmp_path, PAIR, PAIR, opposite, RANKING, PAIR, opposite, other) == [
        "file: 4 x a pair that repeats another (kept)",
        "file: 1 x two answers preferred in both directions (kept)"]
    assert len(load_preferences(tmp_path / "file.jsonl")) == 7


@pytest.mark.parametrize("content", [
    pytest.param(b"\n \n" + lines(PAIR, RANKING) + b"\n\t\n" + lines(DIALOGUES) + b"\n",
                 id="blank lines"),
    pytest.param(b"\xef\xbb\xbf" + lines(PAIR, RANKING, DIALOGUES), id="byte order mark"),
    pytest.param(lines(PAIR, RANKING, DIALOGUES).replace(b"\n", b"\r\n"), id="lines of Windows"),
    pytest.param(lines(PAIR, RANKING, DIALOGUES)[:-1], id="no line break at the end"),
])
def test_blank_lines_and_the_marks_of_editors_do_no_harm(tmp_path, content):
    """A file means the same with blank lines, a byte order mark or Windows line ends."""
    assert load_preferences(write(tmp_path / "file.jsonl", content)) == THREE_FORMS


def test_text_is_kept_to_the_letter(tmp_path):
    """Spaces, line breaks and other scripts are part of an answer, and a prompt may be empty."""
    row = {"prompt": "", "chosen": " Grüße\n\n日本 \u2028 ", "rejected": "<|endoftext|>"}
    text = json.dumps(row, ensure_ascii=False).encode()
    assert load_preferences(write(tmp_path / "file.jsonl", text)) == [
        Preference("", [" Grüße\n\n日本 \u2028 ", "<|endoftext|>"], [(0, 1)])]


EMPTY, EQUAL = "empty answer", "equal answers"
DIFFER = "dialogues that differ before the last answer"


@pytest.mark.skipif("DPO_HH_FILE" not in os.environ, reason="DPO_HH_FILE is not set")
def test_of_the_2354_rows_of_helpful_base_2339_can_teach():
    """In Anthropic's test file, 2 rows differ before the last answer, in 7 the rejected dialogue
    goes on for more turns than the chosen one, 2 have equal answers, and 4 have an empty answer."""
    skipped = Skipped()
    preferences = load_preferences(os.environ["DPO_HH_FILE"], skipped)
    assert skipped == {DIFFER: 2 + 7, EQUAL: 2, EMPTY: 4}
    assert len(preferences) == 2354 - (2 + 7 + 2 + 4) == 2339
    assert all(p.prompt.startswith("\n\nHuman:") for p in preferences)
    assert all(p.prompt.endswith("\n\nAssistant:") for p in preferences)
    assert all(turn not in answer for p in preferences for answer in p.answers
               for turn in ("\n\nAssistant:", "\n\nHuman:"))


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_dialogues_that_end_after_different_turns_are_skipped_on_either_side(tmp_path, longer):
    """Otherwise DPO would raise or lower the log-prob of the human's words."""
    start = "\n\nHuman: Hi\n\nAssistant: "
    row = {"chosen": start + "Hello.", "rejected": start + "Go away."}
    row[longer] += "\n\nHuman: Why?\n\nAssistant: Because."
    good = {"chosen": start + "Hello.", "rejected": start + "Go away."}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(good) + "\n")
    skipped = Skipped()
    assert len(load_preferences(tmp_path / "a.jsonl", skipped)) == 1 and skipped == {DIFFER: 1}


def test_answers_that_repeat_their_prompt_are_refused_with_what_to_do(tmp_path):
    """A common layout, in which the model would be trained with the prompt twice."""
    row = {"prompt": "The plot", "chosen": "The plot was good.", "rejected": "The plot was dull."}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="line 1: all answers repeat the prompt: leave it out"):
        load_preferences(tmp_path / "a.jsonl")
    row["rejected"] = " was dull."                      # one answer may quote it
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert len(load_preferences(tmp_path / "a.jsonl")) == 1


def split_of(tmp_path, rows):
    """(training, held-out) of a file with these rows."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = SimpleNamespace(data=tmp_path / "a.jsonl", strict=False)
    return OWN_FILE.preferences(args)


def test_rows_without_a_prompt_are_split_by_their_first_answer(tmp_path):
    """The checksum of an empty text is 0, so they were all held out. Of 200 about 20 are."""
    training, held_out = split_of(tmp_path, [
        {"prompt": "", "chosen": f"Good {i}.", "rejected": f"Bad {i}."} for i in range(200)])
    assert len(training) + len(held_out) == 200 and 8 < len(held_out) < 40


def test_sft_learns_texts_and_the_best_answers_and_holds_out_a_tenth(tmp_path):
    rows = [PAIR | {"prompt": f"Q{i}", "chosen": ["yes", "sure"]} for i in range(100)]
    rows += [{"prompt": f"Q{i}", "completion": "no"} for i in range(100, 200)]
    (tmp_path / "a.jsonl").write_bytes(lines(*rows))
    training, held_out = OWN_FILE.sft_examples(SimpleNamespace(data=tmp_path / "a.jsonl",
                                                               strict=False))
    assert 8 < len(held_out) < 40 and sorted(training + held_out) == sorted(
        [Preference(f"Q{i}", ["yes" if i < 100 else "no"], []) for i in range(200)])


@pytest.mark.parametrize("before", ["", "Be kind.", "\n\nAssistant: Hello!"])
def test_no_dialogue_is_held_out_whose_beginning_or_continuation_is_trained_on(tmp_path, before):
    """The first human turn decides for all its continuations, whatever was said before it."""
    rows = []
    for i in range(60):
        start = f"\n\nHuman: Question {i}\n\nAssistant:"
        start = before + start
        for _ in range(3):
            rows.append({"chosen": start + " Yes.", "rejected": start + " No."})
            start += " Yes.\n\nHuman: And then?\n\nAssistant:"
    training, held_out = split_of(tmp_path, rows)
    trained = [p.prompt for p in training]
    assert len(held_out) > 5 and len(training) + len(held_out) == 180
    for p in held_out:
        assert not any(p.prompt.startswith(other) or other.startswith(p.prompt)
                       for other in trained)


def test_a_split_far_from_a_tenth_is_mentioned(tmp_path, capsys):
    split_of(tmp_path, [{"prompt": "One prompt", "chosen": f"{i}", "rejected": f"no {i}"}
                        for i in range(200)])
    assert "0% of the rows are held out, not a tenth" in capsys.readouterr().out
    split_of(tmp_path, [{"prompt": f"Prompt {i}", "chosen": "a", "rejected": "b"}
                        for i in range(200)])
    assert "not a tenth" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Rankings and rewards to pairs
# ------------------------------------------------------------------------------------------------


def test_a_ranking_of_three_is_three_pairs():
    """Best first: whoever stands earlier wins."""
    assert ranking_to_pairs([2, 0, 1]) == [(2, 0), (2, 1), (0, 1)]
    assert ranking_to_pairs([1, 0]) == [(1, 0)]
    assert ranking_to_pairs([0]) == []


def test_four_answers_with_four_rewards_make_six_pairs_best_first(tmp_path):
    """C.1 ranks four answers to each prompt. The row is written to a file and read back."""
    row = rank_answers("Q", ["bad", "best", "worst", "good"], [-0.5, 0.9, -0.8, 0.3])
    # 0.9 > 0.3 > -0.5 > -0.8: best, good, bad, worst.
    assert row["ranking"] == [1, 3, 0, 2]
    [preference] = load_preferences(write(tmp_path / "file.jsonl", lines(row)))
    assert preference.prompt == "Q" and len(preference.pairs) == 4 * 3 / 2
    assert [tuple(preference.answers[i] for i in pair) for pair in preference.pairs] == [
        ("best", "good"), ("best", "bad"), ("best", "worst"),
        ("good", "bad"), ("good", "worst"), ("bad", "worst")]


def test_of_answers_that_tie_the_first_stands_for_all():
    """There is no preference between answers of equal reward, so only the first of them is kept."""
    row = rank_answers("Q", ["a", "b", "c", "d"], [0.1, 0.7, 0.1, 0.7])
    assert row == {"prompt": "Q", "answers": ["a", "b"], "ranking": [1, 0], "rewards": [0.1, 0.7]}


@pytest.mark.parametrize("rewards", [[], [0.3], [0.3, 0.3], [0.0, -0.0, 0.0]])
def test_answers_that_all_tie_make_no_row(rewards):
    """If no answer is better than another, there is no preference."""
    assert rank_answers("Q", list("abcd")[:len(rewards)], rewards) is None


@for_all
@given(st.lists(st.integers(-3, 3), max_size=6))
def test_rank_is_all_pairs_of_answers_whose_rewards_differ(rewards):
    """rank_answers against two loops over all answers, keeping only the first of each reward."""
    answers = [f"answer {i}" for i in range(len(rewards))]
    expected = set()
    for i, a in enumerate(rewards):
        for j, b in enumerate(rewards):
            if a > b and a not in rewards[:i] and b not in rewards[:j]:
                expected.add((answers[i], answers[j]))
    row = rank_answers("Q", answers, rewards)
    pairs = [(row["answers"][w], row["answers"][l])
             for w, l in ranking_to_pairs(row["ranking"])] if row else []
    assert set(pairs) == expected and len(pairs) == len(expected)


# ------------------------------------------------------------------------------------------------
# Preferences to ids
# ------------------------------------------------------------------------------------------------

texts = st.text(max_size=8) | st.sampled_from(
    ["The plot was", " very good.", "<|endoftext|>", " ok<|endoftext|>", "The act", "ing"])


@for_all
@given(texts, st.lists(texts, min_size=2, max_size=4, unique=True))
def test_prompt_and_answers_are_encoded_apart_with_one_end_of_text_each(prompt, answers):
    """End-of-text opens the prompt and closes each answer. Text that looks like it stays text."""
    pairs = ranking_to_pairs(range(len(answers)))
    item = encode(Preference(prompt, answers, pairs), TOKENIZER, row_length=1000)
    assert item.prompt == [EOT] + ids(prompt)
    assert item.answers == [ids(answer) + [EOT] for answer in answers]
    assert [part.count(EOT) for part in [item.prompt] + item.answers] == [1] * (1 + len(answers))
    assert item.pairs == pairs and item.ref_logps is None


def test_no_token_merges_across_the_end_of_the_prompt():
    """"The acting" is two tokens, "The" and " acting". But a model that answers "The act" with
    "ing" never writes " acting", so it must not be trained on that token."""
    item = encode(Preference("The act", ["ing", "or"], [(0, 1)]), TOKENIZER, row_length=100)
    assert len(ids("The acting")) == 2
    assert item.prompt + item.answers[0] != [EOT] + ids("The acting") + [EOT]
    assert item.answers[0] == [ord("i"), ord("n"), ord("g"), EOT]


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR is not set")
def test_with_gpt2_an_answer_keeps_its_first_word():
    """Encoding prompt and answer together, then cutting at the length of the prompt, loses it."""
    gpt2 = tiktoken.get_encoding("gpt2")
    prompt, answer = "Answer: ", "Paris is nice"
    # Alone, "Answer: " ends with a token for the space; in the whole text it is part of " Paris".
    whole, n = gpt2.encode_ordinary(prompt + answer), len(gpt2.encode_ordinary(prompt))
    assert "Paris" not in gpt2.decode(whole[n:])
    item = encode(Preference(prompt, [answer, "no"], [(0, 1)]), gpt2, row_length=100)
    assert gpt2.decode(item.prompt[1:]) == prompt
    assert gpt2.decode(item.answers[0][:-1]) == answer
    assert item.prompt[0] == item.answers[0][-1] == gpt2.eot_token == 50256


@for_all
@given(texts, st.lists(texts, min_size=1, max_size=3), st.integers(1, 30))
def test_an_answer_has_all_the_row_after_its_prompt(prompt, answers, row_length):
    """An answer may use every token of the row after its prompt. A longer one is cut to exactly
    that length and gets no end-of-text."""
    skipped = Skipped()
    room = row_length - 1 - len(ids(prompt))
    for answer in answers:
        item = encode(Preference(prompt, [answer], []), TOKENIZER, row_length, skipped)
        if room < 1:
            assert item is None
        elif len(ids(answer)) + 1 <= room:
            assert item.answers == [ids(answer) + [EOT]]
        else:
            assert item.answers == [ids(answer)[:room]] and len(item.answers[0]) == room
            assert EOT not in item.answers[0]
    long = sum(len(ids(answer)) + 1 > room for answer in answers)
    assert skipped == Counter({"prompt as long as a row": len(answers)} if room < 1 else
                              {"answer cut (kept, without end-of-text)": long})


def test_an_answer_that_only_just_fits_is_not_cut():
    """An off-by-one error would show here: the prompt has 4 tokens and the answer 4 with its
    end-of-text, so it fits in a row of 8 and is cut in a row of 7."""
    #   <eot> The plot was | very good . <eot>     4 + 4 = 8
    preference = Preference("The plot was", [" very good.", " dull."], [(0, 1)])
    in_8, in_7 = (encode(preference, TOKENIZER, row_length) for row_length in (8, 7))
    assert in_8.answers[0] == ids(" very good.") + [EOT]
    assert in_7.answers[0] == ids(" very good.")
    assert in_7.answers[1] == ids(" dull.") + [EOT]


def test_a_prompt_that_leaves_no_room_is_dropped_and_counted():
    """If both answers were cut to nothing, the loss of their pair would stay at log 2 forever."""
    preference, skipped = Preference("The plot was", [" good.", " dull."], [(0, 1)]), Skipped()
    assert encode(preference, TOKENIZER, 4, skipped) is None
    assert encode(preference, TOKENIZER, 3, skipped) is None
    assert skipped == {"prompt as long as a row": 2}
    assert encode(preference, TOKENIZER, 5).answers == [ids(" good"), ids(" dull")]


def test_answers_that_are_equal_after_the_cut_are_dropped_and_the_pairs_renumbered():
    """Nothing can be learned from a pair of equal answers, nor from a copy of a pair."""
    # There is room for two tokens: " very good", the same again, " dull.". Best first: 0, 1, 2.
    answers = [" very good.", " very good, but", " dull."]
    preference = Preference("The plot was", answers, [(0, 1), (0, 2), (1, 2)])
    skipped = Skipped()
    item = encode(preference, TOKENIZER, 4 + 2, skipped)
    assert item.answers == [ids(" very good"), ids(" dull.")]
    assert item.pairs == [(0, 1)]
    assert skipped == {"answer cut (kept, without end-of-text)": 3,
                       "answers equal after the cut": 1}


def test_what_is_left_of_a_ranking_after_the_cut_is_a_ranking():
    """Of four answers, best first 2, 0, 3, 1, the answers 0 and 1 became equal: on both sides of 3.
    Without them, 2 > 3 is left, and no order of 3 and what was dropped."""
    answers = [" very good.", " very good, but", " dull.", " weak."]
    ranking = [2, 0, 3, 1]
    pairs = [(w, l) for i, w in enumerate(ranking) for l in ranking[i + 1:]]
    item = encode(Preference("The plot was", answers, pairs), TOKENIZER, 4 + 2)
    assert item.answers == [ids(" dull."), ids(" weak.")] and item.pairs == [(0, 1)]
    assert pack([item], 16).rankings.tolist() == [[0, 1]]


@pytest.mark.parametrize("pairs", [[(0, 2), (0, 1), (2, 1)], [(1, 2), (1, 0), (2, 0)]])
def test_answers_that_became_equal_and_were_ranked_both_ways_say_nothing(pairs):
    """One copy of " very good" is better than " dull." and the other is worse. Which of them comes
    first in the file must not decide."""
    answers = [" very good.", " very good, but", " dull."]
    assert encode(Preference("The plot was", answers, pairs), TOKENIZER, 4 + 2) is None


def test_a_pair_whose_answers_are_equal_after_the_cut_is_dropped():
    """encode returns None for it; encode_all leaves it out and keeps the order of the others."""
    gone = Preference("The plot was", [" very good.", " very good, but"], [(1, 0)])
    kept = [Preference("The", [f" {a}", f" {b}"], [(0, 1)]) for a, b in [("plot", "jokes"),
                                                                        ("songs", "plot")]]
    skipped = Skipped()
    assert encode(gone, TOKENIZER, 4 + 2, skipped) is None
    assert skipped["answers equal after the cut"] == 1
    found = encode_all([kept[0], gone, kept[1]], TOKENIZER, 4 + 2, skipped)
    assert found == encode_all(kept, TOKENIZER, 4 + 2, Skipped())
    assert skipped["answers equal after the cut"] == 2


class FarIds:
    """A tokenizer that makes an id above 256 of each character. Below, Python keeps one int of each
    number, which would hide what a list costs."""
    eot_token = 50256

    def encode_ordinary(self, text):
        return [1000 + ord(character) for character in text]


def test_a_million_pairs_of_250_tokens_fit_in_two_gigabytes():
    """That is 2,000 bytes for each pair, which as lists of 38 bytes per token would take 9,500. The
    ids themselves are 4 x 250 of them; the rest is Python's objects."""
    preferences = [Preference("a" * 99, ["b" * 74, "c" * 74], [(0, 1)]) for _ in range(500)]
    tracemalloc.start()
    items = encode_all(preferences, FarIds(), 250, Skipped())
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(len(ids) for ids in [items[0].prompt, *items[0].answers]) == 250
    assert used / len(items) < 2000


def test_arrays_of_ids_are_packed_like_lists():
    preferences = [Preference("The plot", [" was good.", " was dull."], [(0, 1)]),
                   Preference("I", [" liked it.", " did not", " fell"], [(2, 0), (1, 0)])]
    in_arrays = pack(encode_all(preferences, TOKENIZER, 16, Skipped()), 16)
    in_lists = pack([encode(preference, TOKENIZER, 16) for preference in preferences], 16)
    for name, tensor in vars(in_lists).items():
        assert torch.equal(getattr(in_arrays, name), tensor), name
        assert getattr(in_arrays, name).dtype == tensor.dtype, name
    assert fingerprint(encode_all(preferences, TOKENIZER, 16, Skipped())) == fingerprint(
        [encode(preference, TOKENIZER, 16) for preference in preferences])


# ------------------------------------------------------------------------------------------------
# Selecting pairs
# ------------------------------------------------------------------------------------------------


def test_taking_one_pair_of_a_ranking_takes_its_two_answers():
    """Their reference log-probs come with them, and the pair is renumbered in a copy."""
    item = Encoded([9], [[1], [2], [3]], [(2, 0), (2, 1), (0, 1)], [-1.0, -2.0, -3.0])
    assert select_pairs(item, [1]) == Encoded([9], [[2], [3]], [(1, 0)], [-2.0, -3.0])
    assert select_pairs(item, [0, 1, 2]) == item
    assert item == Encoded([9], [[1], [2], [3]], [(2, 0), (2, 1), (0, 1)], [-1.0, -2.0, -3.0])


@for_all
@given(st.integers(2, 5).flatmap(lambda n: st.permutations(range(n))), st.data())
def test_what_is_taken_are_the_same_pairs_of_the_same_answers(ranking, data):
    """select_pairs keeps the pairs it is given, with the same answers, and drops answers that none
    of them compares."""
    item = Encoded([9], [[i, i] for i in range(len(ranking))], ranking_to_pairs(ranking))
    numbers = data.draw(st.lists(st.sampled_from(range(len(item.pairs))), min_size=1, unique=True))
    part = select_pairs(item, sorted(numbers))
    expected = [item.pairs[n] for n in sorted(numbers)]
    assert [(part.answers[w][0], part.answers[l][0]) for w, l in part.pairs] == expected
    assert sorted(a[0] for a in part.answers) == sorted({i for pair in expected for i in pair})
    assert part.prompt == [9] and part.ref_logps is None


# ------------------------------------------------------------------------------------------------
# The packed row
# ------------------------------------------------------------------------------------------------


def test_the_example_at_the_top_of_the_module_down_to_every_number():
    """One row holds a prompt with two answers, a prompt with one, and one place of padding."""
    the, acting, was, great, mark = ids("The acting was great!")
    dull, stop, i, saw, it = ids(" dull.") + ids("I saw it")
    encoded = [
        encode(Preference("The acting was", [" great!", " dull."], [(0, 1)]), TOKENIZER, 16),
        encode(Preference("I", [" saw it"], []), TOKENIZER, 16)]
    batch = pack(encoded, 16)
    same(batch.tokens, [[EOT, the, acting, was, great, mark, EOT, dull, stop, EOT,
                         EOT, i, saw, it, EOT, 0]])
    same(batch.positions, [[0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 0, 1, 2, 3, 4, 0]])
    same(batch.answer, [[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 1, 1, 1, 0]])
    same(batch.group, [[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1]])
    # "great" and "dull" are both predicted by "was", in column 3; "saw" by "I", in column 11.
    same(batch.source, [3, 4, 5, 3, 7, 8, 11, 12, 13])
    same(batch.target, [great, mark, EOT, dull, stop, EOT, saw, it, EOT])
    same(batch.answer_of, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    same(batch.chosen, [0])
    same(batch.rejected, [1])
    same(batch.rankings, [[0, 1], [2, -1]])
    assert batch.ref_logps.dtype == torch.float32 and batch.ref_logps.tolist() == [0, 0, 0]
    assert batch.n_answers == 3


@st.composite
def batches_to_pack(draw, ref_logps=False):
    """Draw 1 to 5 Encoded with 1 to 4 answers each, their rankings, and a row length in which each
    answer fits. Ids are 0 to 3, and 0 is both end-of-text and padding, so ids tell nothing."""
    words = st.lists(st.integers(0, 3), min_size=1, max_size=6)
    encoded, rankings = [], []
    for _ in range(draw(st.integers(1, 5))):
        answers = draw(st.lists(words, min_size=1, max_size=4))
        rankings.append(draw(st.permutations(range(len(answers)))))
        pairs = draw(st.permutations(ranking_to_pairs(rankings[-1])))
        known = [draw(st.integers(-99, 0)) / 4 for _ in answers] if draw(st.booleans()) else None
        encoded.append(Encoded([0] + draw(words), answers, pairs, known))
    needed = max(len(item.prompt) + len(answer) for item in encoded for answer in item.answers)
    return encoded, rankings, needed + draw(st.integers(0, 20))


def read_back(batch):
    """The scored tokens of each answer, in order: (the tokens visible where it is predicted, their
    positions, the token). What is visible is read from mask(), entry by entry."""
    T, mask = batch.tokens.size(1), batch.mask()
    found = [[] for _ in range(batch.n_answers)]
    for source, target, answer_of in zip(*map(torch.Tensor.tolist,
                                          (batch.source, batch.target, batch.answer_of))):
        row, column = divmod(source, T)
        seen = [j for j in range(T) if mask[row, column, j]]
        found[answer_of].append((batch.tokens[row, seen].tolist(),
                             batch.positions[row, seen].tolist(), target))
    return found


@for_all
@given(batches_to_pack())
def test_each_token_of_each_answer_is_predicted_once_from_its_prompt_and_what_came_before(case):
    """The central claim of the packed row: each answer is scored as if it had a row of its own."""
    encoded, _, row_length = case
    expected = []
    for item in encoded:
        for answer in item.answers:
            expected.append([])
            for k, token in enumerate(answer):
                seen = item.prompt + answer[:k]
                expected[-1].append((seen, list(range(len(seen))), token))
    assert read_back(pack(encoded, row_length)) == expected


@for_all
@given(batches_to_pack())
def test_an_answer_sees_its_prompt_and_itself_never_its_siblings_nor_other_groups(case):
    """mask() against loops over rows, tokens i that attend and tokens j attended to."""
    encoded, _, row_length = case
    batch = pack(encoded, row_length)
    group, answer, mask = batch.group.tolist(), batch.answer.tolist(), batch.mask()
    expected = torch.zeros(len(group), row_length, row_length, dtype=torch.bool)
    for row in range(len(group)):
        for i in range(row_length):
            for j in range(i + 1):                              # never a later token
                if group[row][i] == group[row][j]:              # never another group
                    if answer[row][j] == 0:                     # the prompt
                        expected[row, i, j] = True
                    elif answer[row][j] == answer[row][i]:      # the same answer
                        expected[row, i, j] = True
    assert mask.shape == expected.shape and mask.dtype == torch.bool
    for row, i, j in (mask != expected).nonzero().tolist()[:1]:
        allowed = "may attend" if expected[row, i, j] else "must not attend"
        places = [f"token {k} (group {group[row][k]}, answer {answer[row][k]})" for k in (i, j)]
        raise AssertionError(f"{places[0]} {allowed} to {places[1]}")
    assert mask.diagonal(dim1=1, dim2=2).all()                  # no softmax over an empty set


@for_all
@given(batches_to_pack())
def test_a_row_is_whole_groups_one_after_the_other_and_then_nothing(case):
    """A row is a sequence of groups, each a prompt and its answers, followed by padding. Together,
    the groups are exactly what was packed."""
    encoded, _, row_length = case
    batch = pack(encoded, row_length)
    expected = Counter((tuple(item.prompt), tuple(a)) for item in encoded for a in item.answers)
    found, groups_seen = Counter(), []
    for tokens, positions, group, answer in zip(*map(torch.Tensor.tolist, (
            batch.tokens, batch.positions, batch.group, batch.answer))):
        column = 0
        while column < row_length and group[column] >= 0:
            number, parts = group[column], []           # parts: the prompt, then each answer
            groups_seen.append(number)
            while column < row_length and group[column] == number:
                if answer[column] == len(parts):
                    parts.append([])
                    restart = len(parts[0]) if len(parts) > 1 else 0
                assert answer[column] == len(parts) - 1
                assert positions[column] == restart + len(parts[-1])
                parts[-1].append(tokens[column])
                column += 1
            found.update((tuple(parts[0]), tuple(a)) for a in parts[1:])
        assert group[column:] == [-1] * (row_length - column)
        assert answer[column:] == tokens[column:] == [0] * (row_length - column)
    assert found == expected
    assert sorted(groups_seen) == list(range(len(groups_seen)))


def test_end_of_text_and_padding_inside_an_answer_are_scored_like_any_token():
    """Masks come from lengths, never from ids, so any id may be used as padding."""
    batch = pack([Encoded([0], [[0, 0, 7, 0], [5, 0]], [(0, 1)])], 10)
    #   0 | 0 0 7 0 | 5 0 | and three places of padding
    same(batch.tokens, [[0, 0, 0, 7, 0, 5, 0, 0, 0, 0]])
    same(batch.group, [[0, 0, 0, 0, 0, 0, 0, -1, -1, -1]])
    same(batch.target, [0, 0, 7, 0, 5, 0])
    same(batch.source, [0, 1, 2, 3, 0, 5])
    same(batch.answer_of, [0, 0, 0, 0, 1, 1])


def test_an_answer_has_exactly_one_end_of_text_and_it_is_scored():
    """It is the last token that each answer is scored on, so the model learns where to stop."""
    preferences = [Preference("The plot was", [f" {a}.", f" very {a}, but"], [(0, 1)])
                   for a in ("good", "dull", "weak")]
    batch = pack(encode_all(preferences, TOKENIZER, 24, Skipped()), 24)
    for n in range(batch.n_answers):
        scored = batch.target[batch.answer_of == n].tolist()
        assert scored.count(EOT) == 1 and scored[-1] == EOT


@for_all
@given(batches_to_pack(), st.integers(1, 30))
def test_a_longer_row_changes_nothing_but_padding(case, more):
    """If anything depended on the amount of padding, it would show here."""
    encoded, _, row_length = case
    short, long = pack(encoded, row_length), pack(encoded, row_length + more)
    assert read_back(short) == read_back(long)
    for name in ("chosen", "rejected", "rankings", "ref_logps"):
        assert torch.equal(getattr(short, name), getattr(long, name))


def test_a_prompt_is_repeated_when_its_answers_do_not_fit_in_a_row_together():
    """After a prompt of 2 tokens come three answers of 2. Two of them fit in a row of 7; the third
    goes to a second row, where the prompt is repeated."""
    batch = pack([Encoded([9, 8], [[1, 1], [2, 2], [3, 3]], [(2, 0), (2, 1), (0, 1)])], 7)
    same(batch.tokens, [[9, 8, 1, 1, 2, 2, 0],
                        [9, 8, 3, 3, 0, 0, 0]])
    same(batch.positions, [[0, 1, 2, 3, 2, 3, 0], [0, 1, 2, 3, 0, 0, 0]])
    same(batch.answer, [[0, 0, 1, 1, 2, 2, 0], [0, 0, 1, 1, 0, 0, 0]])
    same(batch.group, [[0, 0, 0, 0, 0, 0, -1], [1, 1, 1, 1, -1, -1, -1]])
    same(batch.source, [1, 2, 1, 4, 7 + 1, 7 + 2])
    same(batch.answer_of, [0, 0, 1, 1, 2, 2])
    same(batch.chosen, [2, 2, 0])
    same(batch.rejected, [0, 1, 1])
    same(batch.rankings, [[2, 0, 1]])


def test_a_prompt_whose_answers_fit_is_written_once():
    """The point of the packed row is that a prompt is computed once. Here 2 + 3 x 2 = 8 tokens
    exactly fill a row of 8."""
    batch = pack([Encoded([9, 8], [[1, 1], [2, 2], [3, 3]], [])], 8)
    same(batch.tokens, [[9, 8, 1, 1, 2, 2, 3, 3]])


def test_an_answer_that_does_not_fit_in_a_row_is_refused():
    """Cutting is the job of encode; if pack cut an answer, nobody would notice."""
    item = Encoded([9, 8], [[1], [2, 2, 2]], [(0, 1)])
    assert pack([item], 5).tokens.size(1) == 5
    with pytest.raises(ValueError, match="2 tokens .* 3 .* row of 4"):
        pack([item], 4)


@for_all
@given(batches_to_pack())
def test_rows_are_no_more_than_first_fit_needs(case):
    """No row is empty and no two would fit into one, so there are never more rows than pieces."""
    encoded, _, row_length = case
    batch = pack(encoded, row_length)
    filled = (batch.group >= 0).sum(1).tolist()
    for r in range(len(filled)):
        assert filled[r] > 0
        for s in range(r):
            assert filled[s] + filled[r] > row_length
    # A prompt is repeated only if needed. Count the pieces with a loop over the answers, in order.
    pieces = 0
    for item in encoded:
        left = -1
        for answer in item.answers:
            if left < len(answer):
                pieces, left = pieces + 1, row_length - len(item.prompt)
            left -= len(answer)
    assert batch.group.max() + 1 == pieces and len(filled) <= pieces


def executed(encoded, row_length, n_embd):
    """(cost, length T of the fullest row) of what pack makes at this row length, with its rows cut
    to the fullest one. The cost is that of a block, up to a constant: 24 C^2 per place for 12 C^2
    weights, and 4 C T for the T places of its row, together 4 C (6 C + T)."""
    filled = (pack(encoded, row_length).group >= 0).sum(1)
    T = int(filled.max())
    return len(filled) * T * (6 * n_embd + T), T


lengths = st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1,
                                                          max_size=4)), min_size=1, max_size=8)


@for_all
@given(lengths, st.integers(70, 300), st.sampled_from([1, 8, 768]))
def test_the_best_row_length_multiplies_least_of_all_it_may_try(lengths, most, n_embd):
    """The expected value comes from packing at every length that may be tried, the longest and all
    multiples of 16 below it, and taking the cheapest (of equal costs, the shortest). Packing at the
    length that was found must cost the same, so its counting agrees with pack."""
    encoded = [Encoded([0] * prompt, [[0] * n for n in answers], []) for prompt, answers in lengths]
    least = max(prompt + max(answers) for prompt, answers in lengths)
    expected = min(executed(encoded, limit, n_embd) for limit in [most, *range(0, most, 16)]
                   if limit >= least)
    T = best_row_length(encoded, most, n_embd)
    assert (len(pack(encoded, T).tokens) * T * (6 * n_embd + T), T) == expected


def test_short_rows_for_few_channels_and_long_ones_for_many():
    """Two prompts of 30 tokens have two answers of 30 each. With at most 192 tokens per row, all
    fit in one row of 180; with 128, in two rows of 90; with 64, in four of 60, each prompt twice.
    The costs are 180 (6 C + 180), 180 (6 C + 90) and 240 (6 C + 60):

        C = 6    38,880   22,680   23,040    so rows of 90
        C = 4    36,720   20,520   20,160    so rows of 60

    (There is no padding here, so masked keys decide.)"""
    encoded = [Encoded([1] * 30, [[1] * 30, [1] * 30], [(0, 1)])] * 2
    assert [best_row_length(encoded, 192, n_embd) for n_embd in (6, 4)] == [90, 60]


def test_a_row_length_is_at_least_what_a_prompt_and_one_answer_need():
    """A row that is just long enough is accepted; a shorter one raises the same error as pack."""
    item = Encoded([9, 8], [[1], [2, 2, 2]], [(0, 1)])
    assert best_row_length([item], 5, 768) == 5
    # Two rows of 16 cost 2 x 16 x (6 + 16) = 704, one row of 31 costs 31 x (6 + 31) = 1,147.
    apart = Encoded([9], [[1] * 15, [2] * 15], [(0, 1)])
    assert best_row_length([apart], 40, 1) == 16
    with pytest.raises(ValueError, match="2 tokens .* 3 .* row of 4"):
        best_row_length([item], 4, 768)


@for_all
@given(batches_to_pack())
def test_pairs_rankings_and_reference_follow_the_numbers_of_the_answers(case):
    """Answers are numbered in the order given, wherever pack has put them."""
    encoded, orders, row_length = case
    batch = pack(encoded, row_length)
    chosen, rejected, rankings, ref_logps, n = [], [], [], [], 0
    for item, order in zip(encoded, orders):
        for w, l in item.pairs:
            chosen.append(n + w)
            rejected.append(n + l)
        rankings.append([n + i for i in order])
        for i in range(len(item.answers)):
            ref_logps.append(item.ref_logps[i] if item.ref_logps else 0.0)
        n += len(item.answers)
    most = max(map(len, rankings))
    same(batch.chosen, chosen)
    same(batch.rejected, rejected)
    same(batch.rankings, [order + [-1] * (most - len(order)) for order in rankings])
    assert batch.ref_logps.dtype == torch.float32 and batch.ref_logps.tolist() == ref_logps
    assert batch.n_answers == n


def test_a_batch_without_pairs_has_no_pairs():
    """Text for SFT is packed the same way, with one answer and no pairs."""
    batch = pack([Encoded([9], [[1, 2]], []), Encoded([9], [[3]], [])], 8)
    same(batch.chosen, [])
    same(batch.rejected, [])
    same(batch.rankings, [[0], [1]])


def test_a_batch_moved_to_a_device_is_the_same_batch():
    """Every field is moved, and none is mixed up with another."""
    batch = pack([Encoded([9], [[1, 2], [3]], [(1, 0)], [-1.0, -2.0])], 8)
    moved = batch.to("cpu")
    for name, value in vars(batch).items():
        other = getattr(moved, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


# ------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------


def numbered(sizes):
    """Items with these numbers of answers, which carry their names: answer j of item i is the ids
    [100 i + j, 0], and its reference log-prob is -(100 i + j). All answers of an item are compared,
    and the higher j wins."""
    items = []
    for i, n in enumerate(sizes, 1):
        answers = [100 * i + j for j in range(n)]
        items.append(Encoded([0, i], [[name, 0] for name in answers],
                             ranking_to_pairs(range(n)[::-1]), [-float(name) for name in answers]))
    return items


def names(item):
    """The pairs of an item, in order, as pairs of the names of their answers."""
    return [(item.answers[w][0], item.answers[l][0]) for w, l in item.pairs]


def all_names(encoded):
    return [pair for item in encoded for pair in names(item)]


groups = st.lists(st.integers(2, 5), min_size=1, max_size=6)
sizes = st.integers(1, 12)


@for_all
@given(groups, sizes, st.integers(0, 5))
def test_every_step_has_exactly_so_many_pairs_and_every_epoch_each_pair_once(groups, size, seed):
    """This holds for any numbers of answers, and if an epoch ends in the middle of a batch."""
    encoded = numbered(groups)
    pairs = all_names(encoded)
    batches = Batches(encoded, size, seed)
    steps = 3 * len(pairs) // size + 1                      # a little more than three epochs
    stream = []
    for step in range(steps):
        found = all_names(batches[step])
        assert len(found) == size
        stream += found
    for epoch in range(3):
        assert sorted(stream[epoch * len(pairs):(epoch + 1) * len(pairs)]) == sorted(pairs)


@for_all
@given(groups, sizes, st.integers(0, 5), st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_a_batch_depends_on_seed_and_step_alone(groups, size, seed, steps):
    """So a resumed run continues with the same data, whichever batches were asked for before."""
    encoded = numbered(groups)
    used = Batches(encoded, size, seed)
    for step in steps:
        assert used[step] == Batches(encoded, size, seed)[step]


@for_all
@given(groups, sizes, st.integers(0, 5))
def test_answers_and_their_reference_go_with_the_pairs_they_belong_to(groups, size, seed):
    """With the reference log-prob of another answer, the loss would be silently wrong."""
    encoded = numbered(groups)
    batches = Batches(encoded, size, seed)
    for step in range(8):
        for item in batches[step]:
            i = item.prompt[1]
            assert item.ref_logps == [-float(answer[0]) for answer in item.answers]
            assert all(answer[0] // 100 == i for answer in item.answers)
            assert set(names(item)) <= set(names(encoded[i - 1]))
            assert {a[0] for a in item.answers} == {name for pair in names(item) for name in pair}


@for_all
@given(groups, sizes, st.integers(0, 5))
def test_pairs_of_one_prompt_stay_together(groups, size, seed):
    """So its answers are computed once per batch. A prompt comes again only in the next epoch."""
    encoded = numbered(groups)
    batches, epoch = Batches(encoded, size, seed), len(all_names(encoded))
    stream = [w // 100 for step in range(2 * epoch // size + 1)
              for w, _ in all_names(batches[step])]
    for start in (0, epoch):
        prompts = stream[start:start + epoch]
        changes = sum(a != b for a, b in zip(prompts, prompts[1:]))
        assert changes == len(encoded) - 1
    for step in range(epoch // size):                       # batches inside the first epoch
        prompts = [item.prompt[1] for item in batches[step]]
        assert len(set(prompts)) == len(prompts)


def test_another_seed_and_another_epoch_have_another_order():
    """With 50 items, two orders are never equal by chance."""
    encoded = numbered([2] * 50)
    orders = [all_names(Batches(encoded, 50, seed)[epoch]) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == sorted(all_names(encoded)) for order in orders)


@for_all
@given(groups, sizes, st.integers(0, 5))
def test_whole_items_come_with_all_they_have(groups, size, seed):
    """With whole=True the unit is the item, as for rankings and SFT texts, which have no pairs."""
    encoded = numbered(groups)
    for item in encoded[::2]:
        item.pairs = []
    batches, stream = Batches(encoded, size, seed, whole=True), []
    for step in range(3 * len(encoded) // size + 1):
        assert len(batches[step]) == size
        stream += batches[step]
    for start in range(0, 3 * len(encoded), len(encoded)):
        epoch = stream[start:start + len(encoded)]
        assert sorted(epoch, key=lambda item: item.prompt) == encoded


def test_a_batch_larger_than_the_data_goes_through_it_again():
    """A batch of five from two pairs is two whole epochs and half of the third."""
    encoded = numbered([2, 2])
    pairs = all_names(encoded)
    found = all_names(Batches(encoded, 5, seed=0)[0])
    assert sorted(found[:2]) == sorted(found[2:4]) == sorted(pairs) and found[4] in pairs
    packed = pack(Batches(encoded, 5, seed=0)[0], 16)
    assert packed.chosen.numel() == 5 and packed.n_answers == 10
