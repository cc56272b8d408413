"""Measuring: what the numbers of --evaluate and of best of N mean, and which flags are refused.

    pytest tests/test_sample.py
"""

import gzip
import itertools
import json
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

import sample
from data import Encoded, Preference, encode, is_held_out, pack
from experiments import best_of as best_of_py
from model import GPT, GPTConfig
from runtime.report import names_of, side_by_side, table
from runtime.statistics import wilson
from tasks.checkpoint import save_checkpoint
from tasks.tokenizers import get_tokenizer

TOKENIZER = get_tokenizer("reviews")
for_all = settings(deadline=None, max_examples=50, derandomize=True)
FLAGS = "--eval-prompts 12 --max-new-tokens 6 --device cpu".split()


LENGTH = {"reward": lambda texts: [len(text) for text in texts]}      # a reward for tests


def small_gpt(seed, block_size=64):
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size, TOKENIZER.n_vocab, 1, 2, 16), 0.3)


def some_items(n):
    rows = [Preference(f"The plot {i}", [f" was good {i}.", " was dull.", " is"][:2 + i % 2],
                       [(0, 1), (0, 2), (1, 2)][:1 + 2 * (i % 2)]) for i in range(n)]
    return [encode(row, TOKENIZER, 64) for row in rows]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with sft.pt, dpo.pt, other.pt and two equal files of sixty preferences."""
    out = tmp_path_factory.mktemp("run")
    for seed, name in enumerate(["sft", "dpo", "other"]):
        facts = {"beta": 0.5} if name == "dpo" else {}
        save_checkpoint(out / f"{name}.pt", small_gpt(seed), tokenizer="reviews", **facts)
    rows = [{"prompt": f"The plot {i}", "chosen": " was good.", "rejected": " was dull."}
            for i in range(60)]
    for name in ("preferences.jsonl", "pairs.jsonl"):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def evaluation(run):
    return json.loads((run / "evaluation.json").read_text())


# ------------------------------------------------------------------------------------------------
# Wilson's interval
# ------------------------------------------------------------------------------------------------


@for_all
@given(wins=st.integers(0, 2000), ties=st.integers(0, 2000), losses=st.integers(0, 2000))
def test_wilsons_bounds_are_the_rates_at_which_the_share_is_just_not_surprising(wins, ties, losses):
    """The definition: |share - p| = z sqrt(variance / n) at both ends, the share in between.

    Without ties the variance of a score is p (1 - p). Scores of 0, 1/2 and 1 with mean p have
    E[score^2] = p - (share of ties) / 4, so their variance is p (1 - p) - (share of ties) / 4.
    The share of ties is counted out of n + z^2, so that it never reaches 1.
    """
    n, z = wins + ties + losses, 1.959964
    assume(n)
    share = (wins + ties / 2) / n
    low, high = wilson([1] * wins + [0.5] * ties + [0] * losses)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1 and low < high
    for p in (low, high):
        if 1e-9 < p < 1 - 1e-9:
            variance = p * (1 - p) - ties / (n + z**2) / 4
            assert abs(share - p) == pytest.approx(z * math.sqrt(variance / n), abs=1e-7)


def test_wilsons_interval_of_8_in_10_is_that_of_the_textbook():
    """With z^2 = 3.8415, the centre is (0.8 + z^2 / 20) / (1 + z^2 / 10) = 0.7167, and the interval
    is 0.7167 +- 0.2266. The plain one, 0.8 +- 1.96 sqrt(0.016), would end at 1.05."""
    assert wilson([1] * 8 + [0] * 2) == pytest.approx((0.4902, 0.9433), abs=2e-4)


def test_all_won_does_not_mean_certain():
    """With a share of 1, the lower end is n / (n + z^2)."""
    low, high = wilson([1] * 10)
    assert high == pytest.approx(1) and low == pytest.approx(10 / (10 + 3.8415), abs=1e-4)


@pytest.mark.parametrize("rate, tied, n", [
    (0.5, 0, 20), (0.9, 0, 30), (0.98, 0, 100),
    (0.5, 0.6, 50), (0.6, 0.6, 100), (0.9, 0.6, 50), (0.6, 0.3, 30)])
def test_wilsons_interval_covers_the_truth_in_about_19_of_20_cases(rate, tied, n):
    """rate: the share of wins among what is no tie. If ties were counted as p (1 - p) counts them,
    99.8 % of the intervals would contain the truth with 60 % ties, because they would be 1.6 times
    (1 / sqrt(0.4)) as wide as they need to be."""
    rng = random.Random(0)
    truth = tied / 2 + (1 - tied) * rate
    hits = []
    for _ in range(4000):
        scores = [0.5 if rng.random() < tied else float(rng.random() < rate) for _ in range(n)]
        low, high = wilson(scores)
        hits.append(low <= truth <= high)
    assert 0.93 < sum(hits) / len(hits) < 0.98


def test_few_decided_among_many_ties_do_not_make_an_interval_of_no_width():
    """One comparison in ten is decided, and always won, so of ten comparisons all tie in 35 % of
    the cases. The interval around one half still has to contain the truth, 0.55."""
    low, high = wilson([0.5] * 10)
    assert low < 0.45 and 0.55 < high and low + high == pytest.approx(1)


# ------------------------------------------------------------------------------------------------
# Best of N
# ------------------------------------------------------------------------------------------------


@for_all
@given(m=st.integers(1, 7), data=st.data())
def test_best_of_n_is_the_mean_over_every_subset_of_n_answers(m, data):
    """Against a loop over all C(M, N) subsets, which picks by one column and averages another."""
    n = data.draw(st.integers(1, m))
    scores = data.draw(st.lists(st.integers(-9, 9), min_size=m, max_size=m, unique=True))
    worth = data.draw(st.lists(st.floats(-1, 1), min_size=m, max_size=m))
    picks = [max(subset, key=lambda i: scores[i]) for subset in itertools.combinations(range(m), n)]
    columns = {"score": torch.tensor([scores, scores]).double(),
               "worth": torch.tensor([worth, worth], dtype=torch.float64)}
    found = best_of_py.best_of(columns, [n], "score")[f"N = {n}"]
    assert found["worth"] == pytest.approx(sum(worth[i] for i in picks) / len(picks), abs=1e-9)
    assert found["score"] == pytest.approx(sum(scores[i] for i in picks) / len(picks), abs=1e-9)


def test_best_of_n_has_the_expectation_of_the_maximum_of_n_fresh_draws():
    """The maximum of N uniform numbers has mean N / (N + 1). 2,000 prompts have 8 draws each."""
    draws = torch.rand(2000, 8, generator=torch.Generator().manual_seed(0)).double()
    found = best_of_py.best_of({"r": draws}, [1, 2, 5, 8], "r")
    for n, measures in zip((1, 2, 5, 8), found.values()):
        assert measures["r"] == pytest.approx(n / (n + 1), abs=4 * measures["r_se"])
        assert measures["r_se"] < 0.01


def test_the_kl_bound_is_log_n_minus_n_minus_1_over_n():
    """Best of 1 is the model itself. For a continuous score the bound is exact: the best answer has
    density N u^(N - 1) at quantile u, so KL is the integral of N u^(N - 1) log(N u^(N - 1))."""
    found = best_of_py.best_of({"r": torch.zeros(2, 128).double()}, [1, 4, 128], "r")
    u = (torch.arange(10**6).double() + 0.5) / 10**6
    for n in (1, 4, 128):
        density = n * u ** (n - 1)
        exact = (density * density.clamp(min=1e-300).log()).mean().item()
        assert found[f"N = {n}"]["kl_bound"] == pytest.approx(exact, abs=1e-4)


@for_all
@given(m=st.integers(1, 200), data=st.data())
def test_shares_of_best_sum_to_one_and_favour_the_better(m, data):
    shares = best_of_py.shares_of_best(m, data.draw(st.integers(1, m)))
    assert shares.sum().item() == pytest.approx(1) and (shares.diff() >= 0).all()


def test_answers_are_judged_by_the_log_ratio_and_stay_with_their_prompt():
    """Implicit rewards are beta (log judge - log model), answer by answer."""
    model, judge, prompts = small_gpt(0), small_gpt(1), ["The plot", "I liked"]
    columns = best_of_py.sample_and_measure(model, prompts, TOKENIZER, 3, 5, 0, LENGTH,
                                            judge=judge, beta=0.5)
    ids = [[TOKENIZER.eot_token] + TOKENIZER.encode_ordinary(p) for p in prompts]
    drawn = sample.sample_answers(model, [i for i in ids for _ in range(3)], 5, 0,
                                  TOKENIZER.eot_token)
    for i, prompt in enumerate(ids):
        batch = pack([Encoded(prompt, drawn[3 * i:3 * i + 3], [])], 64)
        with torch.no_grad():
            expected = 0.5 * (judge.logps(batch) - model.logps(batch))
        torch.testing.assert_close(columns["implicit_reward"][i].float(), expected,
                                   atol=1e-4, rtol=0)
        for k, answer in enumerate(drawn[3 * i:3 * i + 3]):
            text = TOKENIZER.decode([t for t in answer if t != TOKENIZER.eot_token])
            assert columns["reward"][i, k] == len(prompts[i] + text)
            assert columns["length"][i, k] == len(answer)


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_layer, n_embd, expected", [
    (6, 256, 65_536 // 100), (12, 768, 291), (48, 1600, 34)])
def test_large_models_sample_fewer_answers_at_a_time(n_layer, n_embd, expected):
    """A token has a key and a value of n_embd numbers in each layer, and those of a batch have at
    most 2^29 numbers. Of texts of 100 tokens, GPT-2 124M samples 2^29 / (2 x 12 x 768 x 100) = 291
    at once and gpt2-xl 2^29 / (2 x 48 x 1600 x 100) = 34. Smaller models sample 2^16 tokens."""
    sizes = []
    model = SimpleNamespace(
        config=GPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=1), device=torch.device("cpu"),
        generate=lambda prompts, *rest: sizes.append(len(prompts)) or [[0]] * len(prompts))
    sample.sample_answers(model, [[1] * 90] * 1000, 10, 0, 0)
    assert sizes[0] == max(sizes) == expected and sum(sizes) == 1000


def test_the_reference_is_sampled_but_never_scored(monkeypatch):
    """Its KL to itself is 0 without any computation. For each other policy, that policy and the
    reference are scored once, on the answers of that policy."""
    calls = []
    monkeypatch.setattr(sample, "logps_of", lambda model, items, *_: calls.append(model) or
                        [[0.0] for _ in items])
    a, b = small_gpt(0), small_gpt(1)
    measures, _ = sample.evaluate({"sft": a, "dpo": b}, a, ["The plot", "I"], TOKENIZER, 3, 0)
    assert calls == [b, a] and measures["sft"]["kl"] == measures["sft"]["kl_se"] == 0


def test_the_win_rate_is_against_the_baseline_that_is_named():
    """By default the first."""
    policies = {"a": small_gpt(0), "b": small_gpt(1)}
    args = policies["a"], ["The plot"] * 50, TOKENIZER, 4, 0
    for ours, baseline in ("ba", "ab"):
        measures, texts = sample.evaluate(policies, *args, LENGTH, baseline=baseline)
        scores = [(len(x) > len(y)) + (len(x) == len(y)) / 2
                  for x, y in zip(texts[ours], texts[baseline])]
        assert measures[ours]["win_rate"] == pytest.approx(sum(scores) / 50) and 0.5 in scores
        assert measures[baseline]["win_rate"] == 0.5
        assert measures[ours]["win_rate_95"] == wilson(scores)
        assert "win_rate_95" not in measures[baseline]
    default, _ = sample.evaluate(policies, *args, LENGTH)
    assert default["a"]["win_rate"] == 0.5 and "win_rate_95" in default["b"]


def test_the_answers_that_are_compared_are_independent():
    """Two policies with the same weights, and answers of one token: the chance that both write the
    same text is the sum of p^2 over texts. With common random numbers it would be 1."""
    model = small_gpt(0)
    _, texts = sample.evaluate({"a": model, "b": model}, model, ["The plot"] * 2000, TOKENIZER, 1,
                               0, LENGTH)
    same = sum(x == y for x, y in zip(texts["a"], texts["b"])) / 2000
    ids = torch.tensor([sample.encode_prompt("The plot", TOKENIZER)])
    p_of = Counter()                            # several tokens are half a letter, of one text
    for token, p in enumerate(model(ids)[0, -1].softmax(-1).tolist()):
        p_of[sample.decode_answer([token], TOKENIZER)] += p
    expected = sum(p**2 for p in p_of.values())
    assert same == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 2000))


def test_finished_is_the_share_of_answers_that_reached_end_of_text(monkeypatch):
    """Of four answers three end with end-of-text, the last of them after no other token; one was
    cut. The share is not in the table, for which a sixth column is too wide."""
    eot, model = TOKENIZER.eot_token, small_gpt(0)
    answers = [[5, eot], [5, 6, eot], [5, 6, 7], [eot]]
    monkeypatch.setattr(sample, "sample_answers", lambda *_, **__: answers)
    measures, _ = sample.evaluate({"sft": model}, model, ["The plot"] * 4, TOKENIZER, 3, 0,
                                  LENGTH)
    assert measures["sft"]["finished"] == 0.75
    assert measures["sft"]["finished_se"] == pytest.approx(0.25)        # sqrt(0.1875 / 3)
    assert "finished" not in table(measures) and "length" in table(measures)


def test_accuracy_is_of_the_log_ratio_and_logp_accuracy_of_the_log_prob_alone():
    """Against a loop over pairs. The two differ, and the reference ties with itself on all."""
    items, ref, policy = some_items(30), small_gpt(0), small_gpt(1)
    found = sample.rate_pairs({"ref": ref, "pi": policy}, ref, items, {"pi": 0.5})
    ratio, plain = [], []
    for item in items:
        with torch.no_grad():
            pi, r = (m.logps(pack([item], 64)).tolist() for m in (policy, ref))
        ratio += [(pi[w] - r[w]) - (pi[l] - r[l]) for w, l in item.pairs]
        plain += [pi[w] - pi[l] for w, l in item.pairs]
    n = len(ratio)
    assert n == 15 + 3 * 15
    assert found["pi"]["accuracy"] == pytest.approx(sum(d > 0 for d in ratio) / n)
    assert found["pi"]["logp_accuracy"] == pytest.approx(sum(d > 0 for d in plain) / n)
    assert found["pi"]["accuracy"] != found["pi"]["logp_accuracy"]
    assert found["pi"]["margin"] == pytest.approx(0.5 * sum(ratio) / n, abs=1e-4)
    assert found["ref"]["accuracy"] == 0.5 and found["ref"]["accuracy_se"] == 0
    assert found["ref"]["logp_accuracy"] != 0.5 and "margin" not in found["ref"]


def test_the_standard_error_of_accuracy_counts_prompts_not_pairs():
    """Four prompts have three pairs each, which are all right or all wrong: 4 draws, not 12. The
    deviations of a prompt add up to 3 x +-1/2, so the error is sqrt(4 x 2.25) / 12 = 0.25. If the
    pairs were independent, it would be 0.5 / sqrt(12) = 0.14."""
    items = [Encoded([g], [[2], [3], [4]], [(0, 1), (0, 2), (1, 2)]) for g in range(4)]
    found = rated(items, [[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]] * 2)
    assert found["accuracy"] == 0.5 and found["accuracy_se"] == pytest.approx(0.25)


def test_the_standard_error_does_not_depend_on_how_a_file_groups_its_pairs():
    """The pairs above are now twelve rows, three per prompt: still four independent draws."""
    items = [Encoded([g], [[2], [3]], [(0, 1)]) for g in range(4) for _ in range(3)]
    found = rated(items, [[2.0, 1.0]] * 3 + [[1.0, 2.0]] * 3 + [[2.0, 1.0]] * 3 + [[1.0, 2.0]] * 3)
    assert found["accuracy"] == 0.5 and found["accuracy_se"] == pytest.approx(0.25)


def rated(items, logps):
    """The result of rate_pairs for a policy with these log-probs and a reference with zeros."""
    policy = SimpleNamespace(config=GPTConfig(64), precision=None)
    reference = SimpleNamespace(config=GPTConfig(64), precision=None)
    with pytest.MonkeyPatch.context() as patch:
        zeros = [[0.0] * len(item.answers) for item in items]
        patch.setattr(sample, "logps_of", lambda model, *_: logps if model is policy else zeros)
        return sample.rate_pairs({"pi": policy}, reference, items, {})["pi"]


def test_margins_within_rounding_are_ties_in_each_precision():
    """Margins of up to 2e-4 nats in float32, or 0.02 in half precision, count as half right,
    whatever their sign. In training, margins are rewards, so both are multiplied by beta."""
    margins = torch.tensor([3e-4, -3e-4, 1e-4, -1e-4, 0.0])
    float32, half = sample.tie_in_nats(None), sample.tie_in_nats(torch.bfloat16)
    assert sample.ranked_correctly(margins, float32).tolist() == [1, 0, 0.5, 0.5, 0.5]
    assert sample.ranked_correctly(margins, half).tolist() == [0.5] * 5
    assert sample.ranked_correctly(1e-4 * margins, 1e-4 * float32).tolist() == [1, 0, .5, .5, .5]


@pytest.mark.parametrize("flags", [["--evaluate"], ["--prompt", "The plot"]])
def test_a_checkpoint_that_was_trained_on_something_else_earns_a_warning(tmp_path, capsys, flags):
    """With --data forgotten, the reviews task would be measured."""
    for name in ("sft", "dpo"):
        save_checkpoint(tmp_path / f"{name}.pt", small_gpt(0), tokenizer="reviews", source="x.jl")
    sample.main(["--out", str(tmp_path), *FLAGS, *flags])
    assert "dpo.pt was trained on x.jl, not on reviews" in capsys.readouterr().err


def test_distinct_n_counts_n_grams_within_answers():
    """"The| plot| was|.| The| plot| was|." has 8 tokens. " plot", " was" and "." come twice, so 5
    are distinct. N-grams do not reach from one answer into the next."""
    assert sample.distinct(["The plot was. The plot was."], TOKENIZER, 1) == 5 / 8
    assert sample.distinct(["The plot", "The plot"], TOKENIZER, 2) == 1 / 2
    assert sample.distinct(["The", ""], TOKENIZER, 2) == 0


@for_all
@given(st.lists(st.text(alphabet="ab ", max_size=12), max_size=5), st.integers(1, 3))
def test_distinct_n_is_a_share_and_repeating_all_answers_halves_it(texts, n):
    once, twice = (sample.distinct(texts * k, TOKENIZER, n) for k in (1, 2))
    assert 0 <= once <= 1 and twice == pytest.approx(once / 2)


def test_scoring_many_answers_to_a_prompt_is_scoring_each(monkeypatch):
    """Prompts with many answers are scored in smaller batches, of about 128 answers. The log-probs
    are those of one item at a time."""
    model, item = small_gpt(0), some_items(2)[1]
    many = [Encoded(item.prompt, item.answers * 30, []), item]
    one = sample.logps_of(model, [item], 64)[0]
    first, second = sample.logps_of(model, many, 64)
    assert first == pytest.approx(one * 30, abs=1e-4) and second == pytest.approx(one, abs=1e-4)


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------


def test_asking_for_more_tokens_than_fit_makes_no_smaller_batches(monkeypatch):
    """A row ends at the model's 64 tokens, whatever is asked for, so 60 rows are one batch."""
    model, calls = small_gpt(0), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *a: calls.append(1) or generate(*a))
    answers = sample.sample_answers(model, [[1, 2]] * 60, 10**6, 0, TOKENIZER.eot_token)
    assert len(calls) == 1 and max(map(len, answers)) <= 62


def test_of_a_long_dialogue_the_end_is_shown():
    """A prompt of 300 characters is shown whole; of a longer one, the last 300 are shown."""
    shown = side_by_side(["a" * 300, "b" * 10 + "c" * 300], {"dpo": ["d", "e"]})
    assert "'" + "a" * 300 + "'" in shown and "'... " + "c" * 300 + "'" in shown
    assert "b" not in shown


def test_the_table_shows_every_number_once_and_keeps_within_its_width():
    measures = {"sft": {"reward": 0.25, "reward_se": 0.5, "win_rate": 0.5, "win_rate_se": 0.0},
                "dpo": {"reward": 0.75, "reward_se": 0.125, "win_rate": 0.625, "win_rate_se": 0.1,
                        "win_rate_95": (0.5, 0.75), "margin": 1.5}}
    for width in (100, 60, 10):
        text = table(measures, width)
        words = text.split()
        for word in ("0.250", "+-0.500", "0.750", "+-0.125", "0.625", "0.500-0.750", "1.500", "-"):
            assert words.count(word) == 1, (word, width)
        assert max(map(len, text.splitlines())) <= max(width, 24)


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def test_evaluate_measures_every_checkpoint_named_and_writes_the_same_numbers_again(run, capsys):
    flags = ["--out", str(run), *FLAGS, "--evaluate",
             *(str(run / f"{name}.pt") for name in ("sft", "dpo", "other"))]
    sample.main(flags)
    first = (run / "evaluation.json").read_bytes()
    results, out = evaluation(run), capsys.readouterr().out
    assert list(results["policies"]) == ["sft", "dpo", "other"] and results["baseline"] == "sft"
    assert results["prompts"] == 12 and results["task"] == "reviews"
    measures = {"reward", "kl", "win_rate", "well_formed", "length", "finished", "accuracy",
                "logp_accuracy"}
    expected = measures | {f"{m}_se" for m in measures} | {"distinct_1", "distinct_2"}
    assert set(results["policies"]["sft"]) == expected
    assert set(results["policies"]["other"]) == expected | {"win_rate_95"}
    assert set(results["policies"]["dpo"]) == expected | {"win_rate_95", "margin", "margin_se"}
    assert all(f"{results['policies']['other'][m]:.3f}" in out for m in measures)
    assert "baseline sft; win rate with its 95 % interval" in out
    sample.main([*flags, "--eval-prompts", "13"])
    assert (run / "evaluation.json").read_bytes() != first
    sample.main(flags)
    assert (run / "evaluation.json").read_bytes() == first


def test_reference_and_baseline_are_those_that_are_named(run):
    sample.main(["--out", str(run), *FLAGS, "--evaluate", str(run / "dpo.pt"),
                 "--reference", str(run / "other.pt"), "--baseline", str(run / "sft.pt")])
    results = evaluation(run)
    assert results["reference"] == str(run / "other.pt") and results["baseline"] == "sft"
    assert list(results["policies"]) == ["dpo", "sft"]
    assert results["policies"]["sft"]["win_rate"] == 0.5 and results["policies"]["sft"]["kl"] != 0


def test_best_of_writes_a_row_for_each_n_and_best_of_1_is_the_model_itself(run, capsys):
    best_of_py.main(["--out", str(run), *FLAGS, "--numbers", "4,1,2"])
    results = json.loads((run / "best_of.json").read_text())
    assert list(results["best_of"]) == ["N = 1", "N = 2", "N = 4"] and results["judge"] == "reward"
    rewards = [measures["reward"] for measures in results["best_of"].values()]
    assert rewards == sorted(rewards)
    assert "the best of N answers" in capsys.readouterr().out


def test_the_trained_policys_implicit_reward_can_judge(run):
    flags = ["--out", str(run), *FLAGS, "--numbers", "1,4", "--judge", "implicit"]
    best_of_py.main(flags)
    first = json.loads((run / "best_of_implicit.json").read_text())
    picked = [m["implicit_reward"] for m in first["best_of"].values()]
    assert first["judge"] == "implicit" and picked[0] < picked[1]
    assert {"reward", "well_formed", "length"} <= set(first["best_of"]["N = 4"])
    best_of_py.main([*flags, "--checkpoint", str(run / "other.pt")])
    again = json.loads((run / "best_of_implicit.json").read_text())
    assert again["best_of"] != first["best_of"]


def test_a_preference_file_is_measured_without_a_reward(run, capsys):
    flags = ["--data", str(run / "pairs.jsonl"), "--out", str(run), *FLAGS]
    sample.main([*flags, "--evaluate"])
    results = evaluation(run)
    assert "reward" not in results["policies"]["dpo"]
    assert {"kl", "accuracy", "logp_accuracy", "margin"} <= set(results["policies"]["dpo"])
    assert "win rate" not in capsys.readouterr().out
    best_of_py.main([*flags, "--numbers", "1,2"])
    assert json.loads((run / "best_of_implicit.json").read_text())["judge"] == "implicit"


def test_a_published_task_is_measured_on_the_file_that_is_held_out(run, tmp_path):
    """The training file does not exist here, and it is not needed."""
    path = tmp_path / "helpful-base" / "test.jsonl.gz"
    path.parent.mkdir()
    with gzip.open(path, "wt") as file:
        for i in range(5):
            start = f"\n\nHuman: Film {i}?\n\nAssistant:"
            file.write(json.dumps({"chosen": start + " good", "rejected": start + " dull"}) + "\n")
    flags = ["--task", "hh", "--data-dir", str(tmp_path), "--out", str(run), *FLAGS]
    sample.main([*flags, "--evaluate"])
    results = evaluation(run)
    assert (results["task"], results["prompts"]) == ("hh", 5)
    best_of_py.main([*flags, "--numbers", "1,2"])
    assert json.loads((run / "best_of_implicit.json").read_text())["prompts"] == 5
    assert {"kl", "accuracy", "logp_accuracy"} <= set(results["policies"]["dpo"])


def test_only_held_out_prompts_and_pairs_are_measured(run, monkeypatch):
    seen = []
    for name in ("rate_pairs", "evaluate"):
        monkeypatch.setattr(sample, name, lambda *args, real=getattr(sample, name), **more: (
            seen.append(args[2]), real(*args, **more))[1])
    sample.main(["--data", str(run / "pairs.jsonl"), "--out", str(run), *FLAGS, "--evaluate"])
    prompts, items = seen
    assert prompts and all(map(is_held_out, prompts))
    assert {TOKENIZER.decode(item.prompt[1:]) for item in items} == set(prompts)


def test_without_preferences_accuracy_is_left_out_and_said(run, tmp_path, capsys):
    sample.main(["--out", str(tmp_path), *FLAGS, "--evaluate", str(run / "sft.pt"),
                 "--reference", str(run / "sft.pt")])
    assert "no pairs to measure accuracy on" in capsys.readouterr().out
    assert "accuracy" not in evaluation(tmp_path)["policies"]["sft"]


def test_two_files_of_one_name_are_told_apart_and_one_file_is_opened_once(run, tmp_path):
    other = tmp_path / "sft.pt"
    save_checkpoint(other, small_gpt(5), tokenizer="reviews")
    names = names_of([run / "sft.pt", other, run / "dpo.pt", run / "." / "sft.pt"])
    assert names == {run / "sft.pt": str(run / "sft.pt"), other: str(other), run / "dpo.pt": "dpo"}


def refused(argv, capsys, main=sample.main):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in argv])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.count("\n") == 1 and "Traceback" not in message
    return message


@pytest.mark.parametrize("flags, words", [
    (["--evaluate", "--temperature", "0.5"], "--temperature is not for --evaluate"),
    (["--evaluate", "--prompt", "a"], "--prompt is not for --evaluate"),
    (["--evaluate", "-n", "2"], "-n is not for"),
    (["--evaluate", "--top-k", "1"], "--top-k is not for"),
    (["--evaluate", "--compare"], "--compare is not for"),
    (["--reference", "a.pt"], "--reference is for --evaluate"),
    (["--baseline", "a.pt"], "--baseline is for"),
    (["--data", "a.jsonl", "--evaluate", "--baseline", "a.pt"], "--baseline: a win rate needs"),
    (["--eval-prompts", "1"], "--eval-prompts"),
    (["--evaluate", "no.pt"], "no.pt: "),
])
def test_flags_that_contradict_or_that_nothing_would_read_are_refused(flags, words, capsys):
    assert words in refused(flags, capsys)


@pytest.mark.parametrize("flags, words", [
    (["--checkpoint", "a.pt"], "--checkpoint is for --judge implicit"),
    (["--data", "a.jsonl", "--judge", "reward"], "--judge reward"),
    (["--numbers", "1,x"], "--numbers"), (["--numbers", "0"], "--numbers"),
    (["--numbers", ""], "--numbers"), (["--reference", "no.pt"], "no.pt: "),
])
def test_flags_of_best_of_that_make_no_sense_are_refused(flags, words, capsys):
    assert words in refused(flags, capsys, best_of_py.main)


def test_checkpoints_that_cannot_be_measured_together_are_refused(run, tmp_path, capsys):
    save_checkpoint(tmp_path / "long.pt", small_gpt(0, 128), tokenizer="reviews")
    assert "checkpoints for 64 and 128 tokens" in refused(
        ["--out", run, *FLAGS, "--evaluate", run / "sft.pt", tmp_path / "long.pt"], capsys)
