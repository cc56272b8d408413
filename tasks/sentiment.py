"""Two classifiers of film reviews as favourable or not: the labeller, whose log-odds are the
reward, and the judge, which measures what a policy has learned from the labeller's preferences.

A policy that is trained on the preferences of a classifier learns to please that classifier,
mistakes included. Measured by the same classifier, such a policy looks better than it is. So the
judge is a model of another kind, trained on other reviews, and no preference depends on it.

    labeller    logistic regression on words and pairs of words. Its weights can be read: `weight`.
                Or the classifier of the paper, with --labeller siebert
    judge       GPT-2 with a scalar head, the architecture of a reward model

Both are trained on pieces of reviews that are about as long as a prompt with its answer: the
labeller on all of a review, piece by piece, the judge on its beginning.
"""

import functools
import re
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Encoded, pack_for_model
from runtime.errors import UserError

WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")      # or a punctuation mark
N_WEIGHTS = 2**18
WORDS, TOKENS = 50, 64          # length of a piece of a review: for the labeller, the judge
SIEBERT = "siebert/sentiment-roberta-large-english"


def pieces(words, n):
    """Cut a list into consecutive pieces of length n. The last may be shorter; if it has at most
    n // 2 elements, it is dropped, unless it is the only piece."""
    starts = range(0, max(1, len(words) - n // 2), n)
    return [words[start:start + n] for start in starts]


def accuracy(log_odds, texts, favourable):
    """The share of texts that a classifier, a function from texts to log-odds, gets right."""
    right = [(odds > 0) == truth for odds, truth in zip(log_odds(texts), favourable)]
    return sum(right) / len(right)


# ------------------------------------------------------------------------------------------------
# The labeller
# ------------------------------------------------------------------------------------------------


def words_of(text):
    return WORD.findall(text.lower())


def hashed(n_gram):
    """The index of the weight of an n-gram, its words separated by blanks. Some n-grams share a
    weight, since there are more than N_WEIGHTS of them."""
    return zlib.crc32(n_gram.encode("utf-8", "replace")) % N_WEIGHTS


def features(words):
    """The weights that a text uses: the distinct indices of its words and pairs of words."""
    n_grams = words + [f"{first} {second}" for first, second in zip(words, words[1:])]
    return np.unique([hashed(n_gram) for n_gram in n_grams]).astype(np.int64)


class Labeller:
    """Logistic regression: log-odds = bias + sum of the weights of n features / sqrt(n)."""

    def __init__(self, weights, bias):
        self.weights, self.bias = weights, bias                 # (N_WEIGHTS,) and a float

    def log_odds(self, texts):
        """A list of the log-odds that each of the texts is favourable."""
        used = [features(words_of(text)) for text in texts]
        return [self.bias + float(self.weights[indices].sum()) / max(1, len(indices)) ** 0.5
                for indices in used]

    def weight(self, n_gram):
        """The weight of a word, or of two with a blank between them: positive if favourable. It
        is divided by sqrt(n) before it is added to the log-odds."""
        return float(self.weights[hashed(n_gram.lower())])


def train_labeller(reviews):
    """Fit a Labeller to a list of tasks.imdb.Review, by maximum likelihood, in two epochs."""
    examples = [(features(piece), review.favourable)
                for review in tqdm(reviews, "labeller: features", delay=1, disable=None)
                for piece in pieces(words_of(review.text), WORDS)]
    weights = torch.zeros(N_WEIGHTS, 1, requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([weights, bias], lr=0.02)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(examples), generator=generator) for _ in range(2)])
    for indices in tqdm(order.split(256), "labeller", delay=1, disable=None):
        batch = [examples[i] for i in indices]
        lengths = torch.tensor([len(used) for used, _ in batch])
        starts = lengths.cumsum(0) - lengths
        used = torch.from_numpy(np.concatenate([used for used, _ in batch]))
        sums = F.embedding_bag(used, weights, starts, mode="sum")[:, 0]             # (256,)
        log_odds = bias + sums / lengths.sqrt()
        favourable = torch.tensor([float(favourable) for _, favourable in batch])
        loss = F.binary_cross_entropy_with_logits(log_odds, favourable)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Labeller(weights.detach()[:, 0].numpy(), bias.item())


@functools.cache
def siebert(device):
    """The classifier of the paper as a function from texts to log-odds. Raises UserError if
    transformers is not installed or the model cannot be loaded."""
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as error:
        raise UserError("--labeller siebert needs the package transformers: pip install "
                        "transformers") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(SIEBERT)
        model = AutoModelForSequenceClassification.from_pretrained(SIEBERT).to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"--labeller siebert: {SIEBERT} could not be loaded ({error})") from error

    @torch.no_grad()
    def log_odds(texts):
        found = []
        for start in tqdm(range(0, len(texts), 32), "siebert", delay=1, disable=None):
            inputs = tokenizer(texts[start:start + 32], padding=True, truncation=True,
                               max_length=512, return_tensors="pt").to(device)
            logits = model(**inputs).logits                     # (32, 2): unfavourable, favourable
            found += (logits[:, 1] - logits[:, 0]).tolist()
        return found
    return log_odds


# ------------------------------------------------------------------------------------------------
# The judge
# ------------------------------------------------------------------------------------------------


def train_judge(judge, reviews, tokenizer, lr):
    """Fit a ScalarGPT, in place, to the first TOKENS tokens of each of a list of tasks.imdb.Review,
    by maximum likelihood, in one epoch.

    The scalar at a token is the log-odds after that token. It is fitted at every token but the
    last, because a review has one label and many tokens. The learning rate decays to a tenth.
    """
    length = min(TOKENS, judge.config.block_size - 1)
    items = [Encoded([tokenizer.eot_token], [tokenizer.encode_ordinary(review.text)[:length]], [])
             for review in reviews]
    favourable = torch.tensor([float(review.favourable) for review in reviews], device=judge.device)
    optimizer = judge.optimizer(lr)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0))
    batches = order.split(32)
    for step, indices in enumerate(tqdm(batches, "judge", disable=None)):
        batch = pack_for_model([items[i] for i in indices], judge.config.block_size, judge)
        log_odds = judge.values(batch)                                  # (S,)
        labels = favourable[indices.to(judge.device)][batch.answer_of]      # (S,)
        F.binary_cross_entropy_with_logits(log_odds, labels).backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - 0.9 * step / len(batches))
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def log_odds_of_judge(judge, texts, tokenizer):
    """A list of the log-odds that each of the texts is favourable. Of a long text, only the
    beginning is read."""
    room, found = judge.config.block_size - 1, []
    items = [Encoded([tokenizer.eot_token], [tokenizer.encode_ordinary(text)[:room]], [])
             for text in texts]
    for start in range(0, len(items), 32):
        packed = pack_for_model(items[start:start + 32], room + 1, judge)
        found += judge.rewards(packed).tolist()
    return found
