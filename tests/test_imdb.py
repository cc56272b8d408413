"""The imdb task: its archive, prompts, classifiers and tokenizer, and a run from start to end.

    pytest tests/test_imdb.py

With the real archive in the folder that DPO_IMDB_DIR names, the last test reads it.
"""

import gzip
import io
import json
import os
import random
import sys
import tarfile
import types
from pathlib import Path

import pytest
import tiktoken
import torch
from hypothesis import given, settings, strategies as st

import data
import sample
import train_dpo
from classroom.exercises import is_a_students_copy
from data import Preference, encode
from experiments import frontier, ppo, reward_model
from model import GPT, GPTConfig
from runtime import files
from runtime.errors import UserError
from runtime.rows import Skipped
from tasks import imdb, sentiment
from tasks.sampled import Answer, separate
from tasks.scalar_gpt import ScalarGPT
from tasks.tokenizers import first_merges, get_tokenizer

TOKENIZER = get_tokenizer("reviews")
TASK = imdb.IMDbSmall()
for_all = settings(deadline=None, derandomize=True)
GOOD = "I loved the wonderful plot , and the acting was great".split()
BAD = "I hated the terrible plot , and the acting was awful".split()


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Reviews and labellers are kept in memory for the length of a command."""
    for function in (imdb.reviews_of, imdb.labeller_of, sentiment.siebert):
        function.cache_clear()


def write_text(rng, favourable):
    """A made-up review of 30 to 60 words, most of which say whether it is favourable."""
    words = GOOD if favourable else BAD
    return " ".join(rng.choice(words) for _ in range(rng.randint(30, 60))) + ".<br /><br />The end."


def write_archive(path, n=30, change=None):
    """An archive with 2 n reviews per split, in the layout of the real one. change: a function of
    {name: content} that edits it before it is written."""
    rng = random.Random(0)
    content = {"aclImdb/README": b"read me", "aclImdb/train/unsup/0_0.txt": b"unlabelled"}
    for split in ("train", "test"):
        for label, rating in (("pos", 9), ("neg", 2)):
            for i in range(n):
                text = write_text(rng, label == "pos")
                content[f"aclImdb/{split}/{label}/{i}_{rating}.txt"] = text.encode()
    if change:
        change(content)
    with tarfile.open(path, "w:gz") as archive:
        for name, text in content.items():
            member = text if isinstance(text, tarfile.TarInfo) else tarfile.TarInfo(name)
            if member is not text:
                member.size = len(text)
            archive.addfile(member, None if member is text else io.BytesIO(text))
    return path


def load(folder, split="train"):
    skipped = Skipped()
    return imdb.load_reviews(split, folder, skipped), skipped


# ------------------------------------------------------------------------------------------------
# The archive
# ------------------------------------------------------------------------------------------------


def test_labels_come_from_the_folder_and_line_breaks_from_the_markup(tmp_path):
    write_archive(tmp_path / "aclImdb_v1.tar.gz", n=3)
    reviews, _ = load(tmp_path)
    assert [(review.number, review.favourable) for review in reviews] == [
        (0, False), (0, True), (1, False), (1, True), (2, False), (2, True)]
    for review in reviews:
        assert review.text.endswith(".\n\nThe end.") and "<br" not in review.text
        assert ("great" in review.text or "loved" in review.text) == review.favourable


def test_an_unpacked_folder_gives_the_same_reviews_as_the_archive(tmp_path):
    write_archive(tmp_path / "aclImdb_v1.tar.gz", n=3)
    from_archive, _ = load(tmp_path, "test")
    with tarfile.open(tmp_path / "aclImdb_v1.tar.gz") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert load(tmp_path / "unpacked", "test")[0] == from_archive


def test_an_empty_review_is_left_out_and_counted(tmp_path):
    def blank(content):
        content["aclImdb/train/pos/1_9.txt"] = b" <br />\n"
    write_archive(tmp_path / "aclImdb_v1.tar.gz", n=3, change=blank)
    reviews, skipped = load(tmp_path)
    assert len(reviews) == 5 and skipped == {"empty review": 1}


def link(content):
    member = tarfile.TarInfo("aclImdb/train/pos/9_9.txt")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    content["aclImdb/train/pos/9_9.txt"] = member


@pytest.mark.parametrize("change, message", [
    (lambda content: content.update({"aclImdb/../../evil.txt": b"x"}), "is not in aclImdb/"),
    (lambda content: content.update({"/etc/evil.txt": b"x"}), "is not in aclImdb/"),
    (link, "is not a regular file"),
    (lambda content: content.update({"aclImdb/train/pos/9_9.txt": b"x" * 2**21}), "is too large"),
    (lambda content: content.update({"aclImdb/train/pos/9_2.txt": b"Bad."}),
     "has 2 of 10 points, but its folder is pos"),
    (lambda content: content.update({"aclImdb/train/pos/9_9.txt": b"\xff\xfe"}), "is not UTF-8"),
    (lambda content: [content.pop(name) for name in list(content) if "/train/neg/" in name],
     "expected reviews in both train/pos and train/neg"),
])
def test_an_archive_that_is_not_the_reviews_gets_one_sentence(tmp_path, change, message):
    path = write_archive(tmp_path / "aclImdb_v1.tar.gz", n=3, change=change)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [lambda content: content[:-200], lambda content: b"not gzip",
                                    lambda content: gzip.compress(b"not tar")])
def test_a_broken_archive_gets_one_sentence(tmp_path, damage):
    path = write_archive(tmp_path / "aclImdb_v1.tar.gz", n=3)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="a damaged archive|expected reviews"):
        load(tmp_path, "test")


def test_a_download_with_another_md5_is_refused_and_not_kept(tmp_path, monkeypatch):
    """The published checksum is compared before the file gets its name."""
    def write(url, partial, hash_prefix):
        Path(partial).write_bytes(b"something else")
    monkeypatch.setattr(files, "urlopen", lambda *_, **__: Reply())
    monkeypatch.setattr(torch.hub, "download_url_to_file", write)
    with pytest.raises(UserError, match=f"not {imdb.MD5}"):
        load(tmp_path)
    assert list(tmp_path.iterdir()) == []


class Reply:
    """What urlopen returns, without a length."""

    headers = {"Content-Length": None}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


# ------------------------------------------------------------------------------------------------
# Prompts and preferences
# ------------------------------------------------------------------------------------------------


def flags(folder, *more):
    return train_dpo.parse_args(["--task", "imdb-small", "--data-dir", str(folder), *more])


def test_prompts_have_2_to_8_tokens_and_no_prompt_is_in_both_splits(tmp_path):
    write_archive(tmp_path / "aclImdb_v1.tar.gz")
    args = flags(tmp_path, "--prefixes", "50")
    prompts = TASK.sampling_prompts(TOKENIZER, args)
    assert len(set(prompts)) == len(prompts) == 50
    assert all(2 <= len(TOKENIZER.encode_ordinary(prompt)) <= 8 for prompt in prompts)
    training = [review.text for review in imdb.reviews_of("train", tmp_path, False)]
    test = [review.text for review in imdb.reviews_of("test", tmp_path, False)]
    for prompt in prompts[:45]:
        assert any(text.startswith(prompt) for text in training) and not data.is_held_out(prompt)
    evaluation = TASK.prompts([], TOKENIZER, flags(tmp_path, "--eval-prompts", "20"))
    for prompt in prompts[45:] + evaluation:
        assert any(text.startswith(prompt) for text in test) and data.is_held_out(prompt)


def test_sft_trains_on_training_reviews_and_is_evaluated_on_test_reviews(tmp_path):
    write_archive(tmp_path / "aclImdb_v1.tar.gz", n=3)
    args = flags(tmp_path)
    args.reviews = 4
    training, held_out = TASK.sft_examples(args)
    assert [p.answers for p in training] == [[r.text] for r in load(tmp_path)[0][:4]]
    assert [p.answers for p in held_out] == [[r.text] for r in load(tmp_path, "test")[0]]
    assert all(p.prompt == "" and p.pairs == [] for p in training + held_out)


@for_all
@given(half=st.integers(1, 300), n=st.integers(1, 400))
def test_some_of_the_reviews_are_half_favourable(half, n):
    """A measure on a part of the test reviews is off if one kind is missing from it."""
    reviews = [imdb.Review("A film.", i % 2 == 1, i // 2) for i in range(2 * half)]
    found = imdb.some_of(reviews, n)
    n_favourable = sum(review.favourable for review in found)
    assert abs(2 * n_favourable - len(found)) <= 1
    assert n >= 2 * half and found == reviews or len(found) <= 2 * n


@for_all
@given(rewards=st.lists(st.floats(-5, 5), min_size=1, max_size=8), gap=st.floats(0, 2))
def test_kept_rewards_differ_by_the_gap_and_every_other_is_near_a_better_one(rewards, gap):
    answers = [Answer("", reward, True) for reward in rewards]
    kept = [answers.index(answer) for answer in separate(answers, gap)]
    assert kept == sorted(kept) and max(rewards) in [rewards[i] for i in kept]
    for i in kept:
        assert all(i == j or abs(rewards[i] - rewards[j]) >= gap for j in kept)
    for i in set(range(len(rewards))) - set(kept):
        assert any(0 <= rewards[j] - rewards[i] < gap for j in kept)


def test_an_unfinished_answer_gets_no_end_of_text():
    """Otherwise the policy would learn to stop in the middle of a sentence. In the file, such
    answers are listed under "unfinished"."""
    row = {"prompt": "The", "answers": [" plot", " acting was"], "ranking": [1, 0],
           "unfinished": [1]}
    preference = data.to_preference(*data.parse_preference(row))
    assert preference == Preference("The", [" plot", " acting was"], [(1, 0)], (1,))
    item = encode(preference, TOKENIZER, 64)
    eot = TOKENIZER.eot_token
    assert item.answers[0][-1] == eot and eot not in item.answers[1]
    [best] = data.best_answers([preference])
    assert encode(best, TOKENIZER, 64).answers == [item.answers[1]]


@pytest.mark.parametrize("unfinished", ["1", [2], [True], [0.0], [-1]])
def test_unfinished_must_be_a_list_of_answers(unfinished):
    row = {"prompt": "The", "answers": [" a", " b"], "ranking": [0, 1], "unfinished": unfinished}
    with pytest.raises(ValueError, match='some of 0 to 1 under "unfinished"'):
        data.parse_preference(row)


# ------------------------------------------------------------------------------------------------
# The classifiers
# ------------------------------------------------------------------------------------------------


def made_up_reviews(n=40, seed=0):
    rng = random.Random(seed)
    return [imdb.Review(write_text(rng, i % 2 == 1), i % 2 == 1, i // 2) for i in range(n)]


@pytest.fixture(scope="module")
def labeller():
    return sentiment.train_labeller(made_up_reviews(2000))


def test_the_labeller_learns_what_favourable_reviews_say(labeller):
    new = made_up_reviews(60, seed=1)
    assert sentiment.accuracy(labeller.log_odds, [r.text for r in new],
                              [r.favourable for r in new]) == 1
    assert labeller.weight("loved") > 0 > labeller.weight("hated")
    assert labeller.weight("the wonderful") > 0 > labeller.weight("the terrible")
    assert labeller.weight("a word of no review") == 0


def test_log_odds_are_the_bias_and_the_weights_of_words_and_pairs(labeller):
    """"loved it" has three features: two words and their pair. A repeated word counts once."""
    total = sum(labeller.weight(n_gram) for n_gram in ("loved", "it", "loved it"))
    assert labeller.log_odds(["Loved it"]) == [pytest.approx(labeller.bias + total / 3**0.5)]
    assert labeller.log_odds(["loved loved"]) != labeller.log_odds(["loved"])       # a new pair
    assert labeller.log_odds(["loved"]) == labeller.log_odds(["LOVED"]) != labeller.log_odds(["it"])
    assert labeller.log_odds([""]) == [labeller.bias]


@for_all
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=6), at=st.integers(0, 5))
def test_a_reward_does_not_depend_on_the_other_texts(labeller, texts, at):
    """Otherwise the same answer would be worth more in one batch than in another."""
    text = texts[at % len(texts)]
    assert labeller.log_odds(texts)[at % len(texts)] == labeller.log_odds([text])[0]


@for_all
@given(words=st.lists(st.integers(), max_size=200), n=st.integers(1, 60))
def test_pieces_are_consecutive_and_only_a_short_end_is_left_out(words, n):
    found = sentiment.pieces(words, n)
    together = [word for piece in found for word in piece]
    assert together == words[:len(together)]
    assert len(words) - len(together) <= n // 2
    assert all(len(piece) == n for piece in found[:-1])


def small_gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(64, TOKENIZER.n_vocab, 1, 2, 32), 0.1)


def test_the_judge_learns_it_too_and_does_not_depend_on_the_other_texts():
    judge = ScalarGPT.from_gpt(small_gpt())
    sentiment.train_judge(judge, made_up_reviews(400), TOKENIZER, 3e-3)
    new = made_up_reviews(40, seed=1)
    texts = [review.text for review in new]

    def log_odds(texts):
        return sentiment.log_odds_of_judge(judge, texts, TOKENIZER)
    assert sentiment.accuracy(log_odds, texts, [review.favourable for review in new]) >= 0.9
    assert log_odds(texts)[7] == pytest.approx(log_odds([texts[7]])[0], abs=1e-4)


def test_labeller_and_judge_share_no_training_review(tmp_path, monkeypatch):
    """The labeller has the first half of the training reviews and the judge the second."""
    write_archive(tmp_path / "aclImdb_v1.tar.gz")
    trained_on = {}

    def train_labeller(reviews):
        trained_on["labeller"] = reviews
        return sentiment.Labeller(torch.zeros(sentiment.N_WEIGHTS).numpy(), 0.0)

    def train_judge(judge, reviews, *_):
        trained_on["judge"] = reviews
    monkeypatch.setattr(sentiment, "train_labeller", train_labeller)
    monkeypatch.setattr(sentiment, "train_judge", train_judge)
    args = flags(tmp_path, "--out", str(tmp_path))
    grades = TASK.grades(args, small_gpt(), TOKENIZER)
    assert list(grades) == ["reward", "judge"]
    training, _ = load(tmp_path)
    assert trained_on["labeller"] + trained_on["judge"] == training
    assert len(trained_on["labeller"]) == len(trained_on["judge"]) == 30
    assert all(trained_on["labeller"][-1].number < review.number for review in trained_on["judge"])


def test_the_judge_is_kept_for_the_same_sft_model_only(tmp_path, monkeypatch):
    write_archive(tmp_path / "aclImdb_v1.tar.gz")
    trained = []

    def train_judge(judge, *_):
        trained.append(judge)
        torch.nn.init.ones_(judge.scalar.bias)
    monkeypatch.setattr(sentiment, "train_judge", train_judge)
    args, model = flags(tmp_path, "--out", str(tmp_path)), small_gpt()
    first = imdb.open_judge(model, TOKENIZER, 1e-3, args)(["The plot"])
    assert imdb.open_judge(model, TOKENIZER, 1e-3, args)(["The plot"]) == first == [1.0]
    assert len(trained) == 1
    with torch.no_grad():
        model.wte.weight[0, 0] += 1
    imdb.open_judge(model, TOKENIZER, 1e-3, args)
    assert len(trained) == 2
    (tmp_path / "judge.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="not a judge, or a damaged one"):
        imdb.open_judge(model, TOKENIZER, 1e-3, args)


def test_the_table_shows_probabilities(tmp_path):
    assert imdb.probability(lambda texts: [0.0, torch.inf, -1.0])([""] * 3) == [
        0.5, 1.0, pytest.approx(1 / (1 + torch.e))]


def test_siebert_without_transformers_gets_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="needs the package transformers: pip install"):
        sentiment.siebert("cpu")


def test_siebert_gives_the_difference_of_its_two_logits(monkeypatch):
    """The second of the two classes is the favourable one. 40 texts are two batches."""
    class Inputs(dict):
        def to(self, device):
            return self

    class Model:
        def to(self, device):
            return self

        def eval(self):
            return self

        def __call__(self, lengths):
            return types.SimpleNamespace(logits=torch.stack([lengths * 0 + 1, lengths], 1))

    class Load:
        def __init__(self, loaded):
            self.loaded = loaded

        def from_pretrained(self, name):
            assert name == "siebert/sentiment-roberta-large-english"
            return self.loaded

    def tokenizer(texts, **_):
        return Inputs(lengths=torch.tensor([float(len(text)) for text in texts]))
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(
        AutoTokenizer=Load(tokenizer), AutoModelForSequenceClassification=Load(Model())))
    texts = ["x" * n for n in range(40)]
    assert sentiment.siebert("cpu")(texts) == [n - 1.0 for n in range(40)]


# ------------------------------------------------------------------------------------------------
# The tokenizer
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2():
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception:
        pytest.skip("GPT-2's tokenizer is not in tiktoken's cache")


@for_all
@given(text=st.text(max_size=80))
def test_the_first_merges_encode_any_text_without_loss(gpt2, text):
    small = first_merges(gpt2, 8192)
    assert small.decode(small.encode_ordinary(text)) == text.encode("utf-8", "replace").decode()


def test_the_first_merges_agree_with_gpt2_where_it_uses_no_later_one(gpt2):
    """Merges happen in the order of their ranks, so a word of which GPT-2 ends with tokens from the
    first n merges is encoded in the same way. Where GPT-2 uses a later merge, that token falls into
    the tokens of earlier ones, which decode to the same text."""
    small = first_merges(gpt2, 8192)
    assert small.n_vocab == 256 + 8192 + 1 and small.eot_token == 256 + 8192
    n_same = 0
    for token_bytes in list(gpt2._mergeable_ranks)[256:20_000:7]:
        if not token_bytes.isascii():
            continue
        word = token_bytes.decode()
        ids, few = gpt2.encode_ordinary(word), small.encode_ordinary(word)
        if max(ids) < 256 + 8192:
            assert few == ids
            n_same += 1
        else:
            assert max(few) < 256 + 8192 and len(few) > len(ids)
    assert n_same > 1000


# ------------------------------------------------------------------------------------------------
# From nothing to the table
# ------------------------------------------------------------------------------------------------

TINY = "--max-new-tokens 12 --eval-prompts 12 --device cpu".split()
SAMPLING = "--prefixes 60 --samples 3 --gap 0.001".split()
STEPS = "--steps 2 --warmup 1 --batch 8".split()
needs_all_exercises = pytest.mark.skipif(is_a_students_copy(),
                                         reason="trains with functions that are exercises")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(flags, folder) of a run of train_dpo.py on a made-up archive."""
    folder = tmp_path_factory.mktemp("imdb")
    write_archive(folder / "aclImdb_v1.tar.gz")
    sizes = {"lr": 5e-3, "block_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 16, "init_std": 0.1}
    shared = ["--task", "imdb-small", "--data-dir", str(folder), *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imdb.IMDbSmall, "random", sizes)
        train_dpo.main([*shared, "--out", str(folder / "out"), "--tokenizer", "reviews",
                        *SAMPLING, *STEPS])
    return shared, folder / "out"


def measures_of(path):
    return json.loads(path.read_text())["policies"]


@needs_all_exercises
def test_the_imdb_task_goes_from_the_archive_to_the_table(run):
    _, out = run
    for measures in measures_of(out / "results.json").values():
        assert {"reward", "judge", "win_rate", "kl", "length"} <= set(measures)
        assert 0 < measures["reward"] < 1 and 0 < measures["judge"] < 1
    rows = [json.loads(line) for line in (out / "preferences.jsonl").read_text().splitlines()]
    assert any(row.get("unfinished") for row in rows)
    for row in rows:
        assert all(abs(a - b) >= 0.001 for i, a in enumerate(row["rewards"])
                   for b in row["rewards"][:i])


@needs_all_exercises
def test_what_a_run_computed_is_used_again(run, capsys):
    """The sampled answers and the judge, which take minutes. With another --gap other answers are a
    tie, so they are ranked again."""
    shared, out = run
    before = measures_of(out / "results.json")
    times = [(out / name).stat().st_mtime_ns for name in ("preferences.jsonl", "judge.pt")]
    train_dpo.main([*shared, "--out", str(out), *SAMPLING, *STEPS])
    assert "already computed from the same model" in capsys.readouterr().out
    assert measures_of(out / "results.json") == before
    sample.main([*shared, "--out", str(out), "--evaluate"])
    again = measures_of(out / "evaluation.json")["dpo"]
    assert again["judge"] == before["dpo"]["judge"] and "accuracy" in again
    assert times == [(out / name).stat().st_mtime_ns for name in ("preferences.jsonl", "judge.pt")]
    other = [*shared, "--out", str(out.parent / "other"), "--sft", str(out / "sft.pt"), *SAMPLING,
             "--gap", "0.002", *STEPS]
    train_dpo.main(other)
    assert "that tie with a better one (within --gap 0.002)" in capsys.readouterr().out


@needs_all_exercises
def test_reward_model_and_ppo_run_on_imdb_as_on_reviews(run, tmp_path, monkeypatch):
    """With the reward model, and with the labeller's log-odds as the ground truth. Answers that are
    cut keep their reward; on the reviews task they would get UNFINISHED."""
    shared, out = run
    monkeypatch.setattr(reward_model, "halves", lambda items: ([], items))      # the last weights
    reward_model.main([*shared[:4], "--out", str(out), "--device", "cpu", "--max-new-tokens", "12",
                       "--steps", "8", "--warmup", "1", "--batch", "8", "--lr", "0.03"])
    found = json.loads((out / "reward.json").read_text())
    assert found["correlation"] is None or -1 <= found["correlation"] <= 1
    scores = []
    monkeypatch.setattr(ppo, "advantages_and_returns", lambda rolled, beta, real=(
        ppo.advantages_and_returns): scores.extend(rolled.scores.tolist()) or real(rolled, beta))
    for reward in ("learned", "ground_truth"):
        ppo.main([*shared, "--out", str(out), "--reward", reward, "--steps", "1", "--batch", "8",
                  "--minibatch", "8"])
        assert {"reward", "judge", "kl"} <= set(measures_of(out / "ppo.json")["ppo"])
    assert len(scores) == 16 and ppo.UNFINISHED not in scores


@needs_all_exercises
def test_the_frontier_runs_on_imdb_and_draws_the_judge(run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    shared, out = run
    for name, value in {"BETAS": [0.5], "TARGETS": [1], "NUMBERS": [1, 2]}.items():
        monkeypatch.setattr(frontier, name, value)
    monkeypatch.setitem(ppo.PRESETS, "small", ppo.PRESETS["small"] | {"batch": 20,
                                                                       "minibatch": 20})
    frontier.main([*shared, "--out", str(tmp_path), "--sft", str(out / "sft.pt"), *SAMPLING,
                   "--seeds", "1", "--only", "dpo,ppo_gt"])
    runs = json.loads((tmp_path / "frontier.json").read_text())["runs"]
    assert [run["method"] for run in runs.values()] == ["dpo", "ppo_gt"]
    assert all("judge" in run["measures"] for run in runs.values())
    assert "probability of a favourable text, judge" in (tmp_path / "frontier.svg").read_text()


def test_the_real_archive_has_25_000_reviews_per_split():
    """Skipped unless DPO_IMDB_DIR names a folder with the archive."""
    folder = os.environ.get("DPO_IMDB_DIR")
    if not folder:
        pytest.skip("DPO_IMDB_DIR is not set")
    for split in ("train", "test"):
        reviews, skipped = load(Path(folder), split)
        assert len(reviews) == 25_000 and not skipped
        assert sum(review.favourable for review in reviews) == 12_500
        assert not any("<br />" in review.text for review in reviews)
