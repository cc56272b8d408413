"""The first experiment of the paper (C.1) on real film reviews: 25,000 of IMDb to train on and
25,000 to test, half of them favourable (Maas et al. 2011). No film is in both.

    imdb          GPT-2, as in the paper
    imdb-small    a model from random weights, small enough for a CPU

SFT trains on reviews, cut to the length of a row. A prompt is the first 2 to 8 tokens of a review:
a training review for the preferences, a test review for evaluation. An answer is what the model
writes next, at most 60 tokens by default, so most answers are cut before they end. The reward is
the log-odds that a text is favourable, by a classifier. The table shows the probability instead,
and beside it that of a judge, a second classifier that ranked no answers; tasks/sentiment.py has
both.
"""

import functools
import hashlib
import random
import re
import tarfile
import zlib
from collections import namedtuple
from pathlib import Path

import torch

from data import Preference
from runtime.errors import UserError
from runtime.files import cache_folder, download, fingerprint, load_tensors, reading, replacing
from runtime.parallel import choose_device
from runtime.rows import read_and_report
from tasks import sentiment
from tasks.prefixes import draw_prefixes
from tasks.sampled import SampledTask
from tasks.scalar_gpt import ScalarGPT

ARCHIVE = "aclImdb_v1.tar.gz"
URL = f"https://ai.stanford.edu/~amaas/data/sentiment/{ARCHIVE}"
MD5 = "7c2ac02c03563afcf9b574c7e56c153a"
REVIEW = re.compile(r"(?:aclImdb/)?(train|test)/(pos|neg)/(\d+)_(\d+)\.txt")
LARGEST = 2**20                 # bytes of a review; the longest has 14,000
PREFIX_FROM = 200               # characters of a review, which have far more than 8 tokens

# A review as text, whether it is favourable, and its number. The favourable reviews of a film have
# consecutive numbers, and so have the unfavourable ones.
Review = namedtuple("Review", "text favourable number")

HELD_OUT = 128                  # test reviews on which SFT is evaluated


# ------------------------------------------------------------------------------------------------
# The reviews
# ------------------------------------------------------------------------------------------------


@functools.cache
def reviews_of(split, folder, strict):
    """The reviews of the "train" or the "test" split, as load_reviews returns them."""
    return read_and_report(f"imdb, {split}", strict, load_reviews, split, folder)


def load_reviews(split, folder, skipped):
    """The reviews of a split, a list of Review. Favourable and unfavourable ones alternate.

    folder: contains the archive, or what it unpacks to, a folder aclImdb. None is torch's cache,
    to which the archive is downloaded once. Raises UserError.
    """
    folder = folder or cache_folder()
    path = folder if folder.name == "aclImdb" else folder / "aclImdb"
    if path.is_dir():
        files = files_of_folder(path, split)
    else:
        archives = sorted(folder.glob("aclImdb*.tar.gz"))
        path = archives[0] if archives else download(URL, folder / ARCHIVE, md5=MD5)
        files = files_of_archive(path, split)
    found = []
    for name, content in files:
        _, label, number, rating = REVIEW.fullmatch(name).groups()
        favourable = label == "pos"
        if favourable != (int(rating) > 5):
            raise UserError(f"{path}: {name} has {rating} of 10 points, but its folder is {label}")
        try:
            text = content.decode().replace("<br />", "\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: {name} is not UTF-8 text") from error
        if text.strip():
            found.append(Review(text, favourable, int(number)))
        else:
            skipped.add("empty review", f"{path}: {name}")
    if len({review.favourable for review in found}) < 2:
        raise UserError(f"{path}: expected reviews in both {split}/pos and {split}/neg")
    return sorted(found, key=lambda review: (review.number, review.favourable))


def files_of_folder(path, split):
    """Yield (name, content) of the reviews of a split in an unpacked folder."""
    for file in sorted(path.glob(f"{split}/*/*.txt")):
        name = file.relative_to(path).as_posix()
        if REVIEW.fullmatch(name):
            yield name, file.read_bytes()


def files_of_archive(path, split):
    """Yield (name, content) of the reviews of a split in the archive, which is not unpacked. Raises
    UserError if it is damaged, or has a member that such an archive would not have."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                parts = member.name.split("/")
                if parts[0] != "aclImdb" or ".." in parts:
                    raise UserError(f"{path}: its member {member.name!r} is not in aclImdb/")
                if not (member.isfile() or member.isdir()):
                    raise UserError(f"{path}: its member {member.name!r} is not a regular file")
                match = REVIEW.fullmatch(member.name)
                if match and match[1] == split:
                    if member.size > LARGEST:
                        raise UserError(f"{path}: its member {member.name!r} is too large for a "
                                        "review")
                    yield member.name, archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path}: a damaged archive ({error})") from error


# ------------------------------------------------------------------------------------------------
# The reward and the judge
# ------------------------------------------------------------------------------------------------


@functools.cache
def labeller_of(folder, strict):
    """A Labeller of the first half of the training reviews, which takes seconds to train."""
    training = reviews_of("train", folder, strict)
    labeller = sentiment.train_labeller(training[:len(training) // 2])
    print_accuracy("labeller", labeller.log_odds, some_of(reviews_of("test", folder, strict), 5000))
    return labeller


def open_judge(reference, tokenizer, lr, args):
    """The judge, a function from texts to log-odds: the SFT model with a scalar head, trained on
    the second half of the training reviews. judge.pt keeps it for later runs on that model."""
    path = args.out / "judge.pt"
    key = f"{fingerprint(reference)} {reference.precision} {digest_of_rewards(args)}"
    judge = ScalarGPT.from_gpt(reference)

    def log_odds(texts):
        return sentiment.log_odds_of_judge(judge, texts, tokenizer)
    if not restore(judge, path, key):
        training = reviews_of("train", args.data_dir, args.strict)
        sentiment.train_judge(judge, training[len(training) // 2:], tokenizer, lr)
        with replacing(path) as file:
            torch.save({"key": key, "model": judge.state_dict()}, file)
        print_accuracy("judge", log_odds,
                       some_of(reviews_of("test", args.data_dir, args.strict), 1000))
    return log_odds


def restore(judge, path, key):
    """Load the weights of a judge from the file at `path` if they are stored under this key.
    Returns whether they were."""
    if not path.exists():
        return False
    with reading(path, "a judge"):
        saved = load_tensors(path, judge.device)
        if saved["key"] != key:
            return False
        judge.load_state_dict(saved["model"])
        return True


def some_of(reviews, n):
    """About n reviews from all over a list, or all if there are fewer. The stride is odd, so that
    half of them are favourable, as in the list."""
    stride = max(1, len(reviews) // n)
    return reviews[::stride + 1 - stride % 2]


def print_accuracy(name, log_odds, reviews):
    """Print how many reviews a classifier gets right: whole, and only their first words."""
    favourable = [review.favourable for review in reviews]
    whole = [review.text for review in reviews]
    first = [" ".join(text.split()[:sentiment.WORDS]) for text in whole]
    print(f"{name}: {sentiment.accuracy(log_odds, whole, favourable):.1%} of {len(reviews):,} test "
          f"reviews right, {sentiment.accuracy(log_odds, first, favourable):.1%} from their first "
          f"{sentiment.WORDS} words")


def probability(log_odds):
    """A function from texts to probabilities, from one to log-odds."""
    return lambda texts: torch.tensor(log_odds(texts), dtype=torch.float64).sigmoid().tolist()


def digest_of_rewards(args):
    """A digest of what the rewards depend on: the code, the labeller and the reviews."""
    found = hashlib.sha256(args.labeller.encode())
    for file in (__file__, sentiment.__file__):
        found.update(Path(file).read_bytes())
    for review in reviews_of("train", args.data_dir, args.strict):
        found.update(repr(review).encode())
    return found.hexdigest()


# ------------------------------------------------------------------------------------------------
# The tasks
# ------------------------------------------------------------------------------------------------


class IMDb(SampledTask):
    name = "imdb"
    summary = "real film reviews"
    dpo = {"gap": 0.5}
    max_new_tokens = 60
    answers_must_end = False        # most are cut
    judge_lr = 5e-5

    def sft_examples(self, args):
        """Whole reviews, after an empty prompt."""
        training = reviews_of("train", args.data_dir, args.strict)[:args.reviews]
        held_out = some_of(reviews_of("test", args.data_dir, args.strict), HELD_OUT)
        return [[Preference("", [review.text], []) for review in reviews]
                for reviews in (training, held_out)]

    def sampling_prompts(self, tokenizer, args):
        """Beginnings of training reviews and, held out, of test reviews."""
        n_held_out = max(1, args.prefixes // 10)
        return (prefixes_of("train", args.prefixes - n_held_out, tokenizer, args.seed, "--prefixes",
                            args)
                + prefixes_of("test", n_held_out, tokenizer, args.seed, "--prefixes", args))

    def prompts(self, items, tokenizer, args):
        """Beginnings of test reviews; the held-out preferences are not needed."""
        return prefixes_of("test", args.eval_prompts, tokenizer, args.seed + 1, "--eval-prompts",
                           args)

    def reward(self, args):
        """The log-odds of --labeller that a text is favourable."""
        if args.labeller == "siebert":
            return sentiment.siebert(choose_device(args.device))
        return labeller_of(args.data_dir, args.strict).log_odds

    def grades(self, args, reference, tokenizer):
        judge = open_judge(reference, tokenizer, self.judge_lr, args)
        return {"reward": probability(self.reward(args)), "judge": probability(judge)}

    def digest(self, args):
        return digest_of_rewards(args)


class IMDbSmall(IMDb):
    name = "imdb-small"
    summary = "the same with a small model from random weights"
    tokenizer = "gpt2-8k"
    random = {"lr": 2e-3, "n_layer": 6, "n_head": 8, "n_embd": 256, "init_std": 0.03}
    dpo = {"beta": 0.5, "lr": 1e-4, "clip": 1.0, "prefixes": 4000, "gap": 0.5}
    reward_lr = 3e-4
    ppo_preset = "small"
    judge_lr = 1e-3


def prefixes_of(split, count, tokenizer, seed, flag, args):
    """`count` distinct prefixes of the reviews of a split. Those of test reviews are held out."""
    reviews = reviews_of(split, args.data_dir, args.strict)

    def draw(rng):
        return rng.choice(reviews).text[:PREFIX_FROM]
    return draw_prefixes(draw, random.Random(f"prefixes {seed}"), count, split == "test",
                         tokenizer, flag)
