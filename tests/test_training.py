"""The training loops and the commands: what a run writes, each part of a step, flags.

    pytest tests/test_training.py

The runs here are real, on models of a few thousand parameters. What they learn is not the point;
that is what `python train_dpo.py` shows.
"""

import ast
import copy
import csv
import json
import math
import os
import re
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import hypothesis
import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import data
import runtime.memory
import runtime.run
import sample
import tasks.task
import train_dpo
import train_sft
from data import Batches, Encoded, micro_batches, pack
from model import GPT, GPTConfig
from runtime.errors import UserError
from runtime.log import Log
from runtime.packing import compiled_row_length
from runtime.parallel import worth_compiling
from runtime.run import Run
from tasks.checkpoint import load_checkpoint, set_precision
from tasks.tokenizers import get_tokenizer
from train_sft import grad_scaler, update, warmup

ROOT = Path(__file__).parent.parent
TINY = ("--n-layer 1 --n-head 2 --n-embd 16 --block-size 128 --steps 3 --reviews 100 "
        "--device cpu").split()
QUICK = ("--prefixes 40 --samples 3 --eval-prompts 20 --max-new-tokens 8 --steps 4 --log-every 1 "
         "--eval-every 2 --device cpu").split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run on a preference file: three steps of SFT, then four of DPO."""
    out = tmp_path_factory.mktemp("run")
    pairs = write_pairs(out / "pairs.jsonl", 60)
    data = ["--data", str(pairs), "--tokenizer", "reviews", "--out", str(out)]
    train_sft.main([*data, *TINY])
    train_dpo.main([*data, *QUICK])
    return out


def write_pairs(path, n):
    rows = [{"prompt": f"The plot {i}", "chosen": f" was good {i}.", "rejected": f" was dull {i}."}
            for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def small_gpt(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size=32, vocab_size=20, n_layer=1, n_head=2, n_embd=8), 0.3).double()


def ranked_items(n, reference=None):
    """n prompts with three ranked answers each. reference: a model to compute ref_logps."""
    numbers = torch.Generator().manual_seed(1)
    items = [Encoded(draw[:2], [draw[2:4], draw[4:7], draw[7:]], [(0, 1), (0, 2), (1, 2)])
             for draw in torch.randint(0, 20, (n, 12), generator=numbers).tolist()]
    for item in items:
        item.ref_logps = reference.logps(pack([item], 32)).tolist() if reference else None
    return items


def settings(tmp_path, loop=train_dpo, **changes):
    """The default flags of train_dpo.py, or of another loop, with a few changed."""
    args = loop.parse_args([])
    args.out, args.row_length, args.lr, args.warmup = tmp_path, 32, 1e-2, 1
    for name, value in changes.items():
        assert hasattr(args, name)
        setattr(args, name, value)
    return args


# ------------------------------------------------------------------------------------------------
# What a run writes
# ------------------------------------------------------------------------------------------------


def test_a_run_starts_at_log_2_and_logs_every_number(run):
    """Before the first update the policy equals the reference: the loss is log 2 = 0.693147, every
    pair is a tie (half right), and rewards are 0; on held-out pairs (row 0) and on the batch of the
    first update (row 1)."""
    start, first, *rest = rows_of(run / "dpo_metrics.csv")
    assert [row["step"] for row in [start, first, *rest]] == ["0", "1", "2", "3", "4"]
    for row, of in ((start, "held_out_"), (first, "")):
        assert float(row[f"{of}loss"]) == pytest.approx(math.log(2), abs=1e-5)
        assert float(row[f"{of}accuracy"]) == 0.5
        for name in ("margin", "chosen_reward", "rejected_reward"):
            assert float(row[of + name]) == pytest.approx(0, abs=1e-4)
        for name in ("chosen_logp", "rejected_logp"):
            assert math.isfinite(float(row[of + name]))
    assert start["loss"] == start["grad_norm"] == "" and float(first["grad_norm"]) > 0


def test_results_have_a_mean_and_a_standard_error_for_each_measure(run):
    results = json.loads((run / "results.json").read_text())
    assert results["beta"] == 0.1 and results["prompts"] >= 2
    assert list(results["policies"]) == ["sft", "dpo"]
    for measures in results["policies"].values():
        assert set(measures) == {"kl", "kl_se", "length", "length_se", "finished", "finished_se"}
    assert results["policies"]["sft"]["kl"] == results["policies"]["sft"]["kl_se"] == 0


def test_the_reviews_task_goes_from_sampling_to_results(tmp_path, capsys):
    """Both commands of the default task, with small numbers. DPO finds the SFT model, samples and
    ranks answers, and measures both policies."""
    train_sft.main([*TINY, "--out", str(tmp_path), "--steps", "120", "--lr", "1e-2"])
    flags = [*QUICK, "--out", str(tmp_path), "--max-new-tokens", "96"]
    train_dpo.main(flags)
    assert "starting from" in capsys.readouterr().out
    for row in map(json.loads, (tmp_path / "preferences.jsonl").read_text().splitlines()):
        best_first = [row["rewards"][i] for i in row["ranking"]]
        assert best_first == sorted(set(best_first), reverse=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["task"] == "reviews" and results["prompts"] == 20
    names = {"reward", "kl", "win_rate", "well_formed", "length", "finished"}
    for policy, measures in results["policies"].items():
        interval = {"win_rate_95"} if policy == "dpo" else set()
        assert set(measures) == names | {name + "_se" for name in names} | interval
    assert results["policies"]["sft"]["win_rate"] == 0.5


def test_dpo_trains_sft_where_there_is_none_and_says_so(tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(train_sft, "main", lambda argv: calls.append(argv))
    with pytest.raises(SystemExit):                         # our stand-in writes no sft.pt
        train_dpo.main(["--out", str(tmp_path), "--seed", "7", "--device", "cpu"])
    assert "no " + str(tmp_path / "sft.pt") in capsys.readouterr().out
    given = train_sft.parse_args(calls[0])
    assert (given.out, given.seed, given.task) == (tmp_path, 7, "reviews")


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(run, tmp_path):
    before = {name: (run / name).read_bytes() for name in
              ("sft.pt", "dpo.pt", "dpo_metrics.csv", "sft_metrics.csv", "results.json")}
    data = ["--data", str(run / "pairs.jsonl"), "--tokenizer", "reviews", "--out", str(run)]
    train_sft.main([*data, *TINY])
    train_dpo.main([*data, *QUICK])
    for name, content in before.items():
        assert (run / name).read_bytes() == content, name
    data[-1] = str(tmp_path)
    train_dpo.main([*data, *QUICK, "--sft", str(run / "sft.pt"), "--seed", "1"])
    assert (tmp_path / "dpo_metrics.csv").read_bytes() != before["dpo_metrics.csv"]


def test_watching_changes_nothing(run, tmp_path):
    """Whether a run evaluates and logs often or seldom, its weights are the same, bit for bit."""
    data = ["--data", str(run / "pairs.jsonl"), "--out", str(tmp_path)]
    train_dpo.main([*data, "--sft", str(run / "sft.pt"), *QUICK, "--eval-every", "1000",
                    "--log-every", "1000"])
    a, b = (load_checkpoint(folder / "dpo.pt")[0] for folder in (run, tmp_path))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_held_out_prompts_are_never_trained_on(run, monkeypatch):
    seen = []
    monkeypatch.setattr(train_dpo, "train", lambda _, items, held, args: seen.append((items, held)))
    train_dpo.main(["--data", str(run / "pairs.jsonl"), "--out", str(run / "x"),
                    "--sft", str(run / "sft.pt"), *QUICK])
    (items, held), = seen
    trained, kept = ({tuple(item.prompt) for item in part} for part in (items, held))
    assert trained and kept and not trained & kept and len(trained) + len(kept) == 60


# ------------------------------------------------------------------------------------------------
# The step
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", train_dpo.LOSSES)
@pytest.mark.parametrize("accumulate", [2, 3, 100])
def test_accumulation_changes_nothing_but_memory(tmp_path, loss, accumulate):
    """A batch in 1, 2, 3 or as many micro-batches as it has prompts has the same gradient, even if
    they are uneven or a prompt straddles two batches. So the weights are the same after three
    steps, up to rounding, which Adam amplifies."""
    trained = []
    for parts in (1, accumulate):
        policy = small_gpt()
        args = settings(tmp_path, loss=loss, batch=7, steps=3, accumulate=parts)
        train_dpo.train(policy, ranked_items(9, policy), [], args)
        trained.append(policy)
    for p, q in zip(*(policy.parameters() for policy in trained)):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_sft_accumulation_weighs_tokens_alike_whatever_part_they_are_in(tmp_path):
    trained = []
    for parts in (1, 3):
        model, args = small_gpt(), settings(tmp_path, batch=5, steps=3, accumulate=parts)
        items = [Encoded(item.prompt, item.answers[i % 3:i % 3 + 1], [])
                 for i, item in enumerate(ranked_items(9))]
        train_sft.train(model, items, [], args)
        trained.append(model)
    for p, q in zip(*(model.parameters() for model in trained)):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("loss", train_dpo.LOSSES)
def test_training_lowers_the_loss_and_ranks_the_answers(tmp_path, loss):
    """Thirty steps on six prompts are enough for every objective to rank the answers correctly."""
    policy = small_gpt()
    args = settings(tmp_path, loss=loss, batch=6, steps=30, log_every=1)
    train_dpo.train(policy, ranked_items(6, policy), [], args)
    first, *_, last = rows_of(tmp_path / "dpo_metrics.csv")
    start = {"dpo": math.log(2), "plackett_luce": math.log(6)}      # 3! rankings of three answers
    if loss in start:
        assert float(first["loss"]) == pytest.approx(start[loss], abs=1e-6)
    assert float(last["loss"]) < float(first["loss"]) - 0.1
    assert float(last["accuracy"]) > 0.9


def test_a_batch_of_rankings_holds_whole_rankings(tmp_path):
    """The first loss of four rankings of three answers is log 3!. A batch of four pairs would be
    one ranking and a third of another, with a mean loss of (log 6 + log 2) / 2 = 1.24."""
    policy = small_gpt()
    args = settings(tmp_path, loss="plackett_luce", batch=4, steps=1)
    train_dpo.train(policy, ranked_items(9, policy), [], args)
    first, = rows_of(tmp_path / "dpo_metrics.csv")
    assert float(first["loss"]) == pytest.approx(math.log(6), abs=1e-5)


def test_the_learning_rate_of_dpo_warms_up_and_then_stays(tmp_path):
    """Over two steps to --lr. (That of SFT then falls again, by a cosine.)"""
    policy = small_gpt()
    args = settings(tmp_path, batch=4, steps=5, lr=1e-2, warmup=2, log_every=1)
    train_dpo.train(policy, ranked_items(4, policy), [], args)
    rates = [float(row["lr"]) for row in rows_of(tmp_path / "dpo_metrics.csv")]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.01])


def test_the_reference_is_used_and_belongs_to_its_answer(tmp_path):
    """With a reference log-prob that is off by 0.5 nats, a reward at step 0 is 0.5 beta instead of
    0, and the run stops."""
    policy = small_gpt()
    items = ranked_items(6, policy)
    items[3].ref_logps[1] += 0.5
    with pytest.raises(UserError, match="reward is 0.25000, not 0: the policy does not start"):
        train_dpo.train(policy, items, [], settings(tmp_path, batch=18, steps=1))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_reference_that_is_not_finite_is_said_as_such(tmp_path, value, monkeypatch):
    """Comparing with it would give the sentence that the largest reward is nan, not 0."""
    policy = small_gpt()
    items = ranked_items(6, policy)
    items[3].ref_logps[1] = value
    args = settings(tmp_path, batch=18, steps=1)
    monkeypatch.setattr(sample, "logps_of", lambda *_: [item.ref_logps for item in items])
    with pytest.raises(UserError, match="a log-prob of the model .* is NaN or infinite"):
        sample.add_reference(policy, items, args)


def test_the_reference_does_not_move_with_the_policy(tmp_path):
    """After training, ref_logps are still those of the model that DPO started from."""
    policy = small_gpt()
    items = ranked_items(4, policy)
    train_dpo.train(policy, items, [], settings(tmp_path, batch=4, steps=5))
    for item in items:
        noted = torch.tensor(item.ref_logps, dtype=torch.float64)
        torch.testing.assert_close(small_gpt().logps(pack([item], 32)), noted, rtol=0, atol=1e-12)
        assert not torch.allclose(policy.logps(pack([item], 32)), noted)


def test_evaluation_counts_every_held_out_pair_once(tmp_path):
    """Means are over all pairs, not means of batch means: 70 prompts make batches of 32, 32 and 6,
    and have 70 x 3 = 210 pairs."""
    policy, other = small_gpt(0), small_gpt(1)
    items, args = ranked_items(70, other), settings(tmp_path)
    log = Log(tmp_path / "log.csv", {})
    train_dpo.evaluate_preferences(policy, items, args, log)
    losses = [train_dpo.dpo_loss(policy.logps(pack([item], 32)), torch.tensor(item.ref_logps),
                                 torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2]), args.beta)[0]
              for item in items]
    assert log.counts["held_out_loss"] == log.counts["held_out_accuracy"] == 210
    expected = torch.cat(losses).mean().item()
    assert float(log.sums["held_out_loss"]) / 210 == pytest.approx(expected, abs=1e-6)


def test_a_tie_is_half_right():
    """Four pairs have rewards (1, 0), (0, 1), (2, 2) and (0, 5e-5). One is right, one is wrong, and
    two are ties, the last within the tolerance: 1 + 0 + 1/2 + 1/2 = 2 of 4."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 0.0, 5e-5])
    items = [Encoded([1], [[2], [3]], [(0, 1)])] * 4
    numbers = train_dpo.describe(torch.zeros(8), rewards, pack(items, 8), tie=1e-4)
    assert float(numbers["accuracy"]) == 2 and abs(float(numbers["margin"])) < 1e-4


def test_warm_up_is_linear_from_zero_and_then_constant():
    """Appendix B: 150 steps. The k-th step, counted from 1, has k / 150 of the learning rate."""
    assert [warmup(step, 150) for step in (0, 74, 149, 150, 10**6)] == [1 / 150, 0.5, 1, 1, 1]
    assert warmup(0, 0) == 1


def test_gradients_are_clipped_to_the_norm_asked_for():
    """A step of plain SGD with learning rate 1 moves the weights by exactly the clipped norm."""
    model = small_gpt()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    model(torch.tensor([[1, 2, 3]])).square().sum().backward()
    norm = update(model, torch.optim.SGD(model.parameters(), lr=9), grad_scaler(model), 1.0, 0.5)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert norm > 0.5, "the norm that is returned is that before clipping"
    assert (after - before).norm().item() == pytest.approx(0.5, rel=1e-4)
    assert all(p.grad is None for p in model.parameters()), "the gradients have to be cleared"


def test_gradients_are_clipped_at_their_true_size():
    """Gradients that are scaled by 1024, for float16, are scaled back before clipping. With a limit
    of 0.5, one of norm 0.1 is not clipped, and one of norm 2 is clipped to 0.5."""
    for size, step in ((0.1, 0.1), (2.0, 0.5)):
        weight = torch.nn.Linear(1, 1, bias=False)
        before = weight.weight.item()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(size * weight.weight.sum()).backward()
        norm = update(weight, torch.optim.SGD(weight.parameters(), lr=9), scaler, 1.0, clip=0.5)
        assert norm.item() == pytest.approx(size)
        assert before - weight.weight.item() == pytest.approx(step, rel=1e-3)


def test_the_scaler_is_ready_for_the_next_step():
    """The scaler is updated after each step. Otherwise, with an enabled scaler, the next step
    raises an error, and after an overflow the scale would never get smaller."""
    weight = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(weight.parameters(), lr=9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for size, scale in ((1.0, 1024.0), (math.inf, 512.0), (1.0, 512.0)):
        scaler.scale(size * weight.weight.sum()).backward()
        update(weight, optimizer, scaler, 0.1, clip=1.0)
        assert scaler.get_scale() == scale


def test_an_update_uses_the_learning_rate_it_is_given():
    """Plain SGD moves a weight of gradient 1 by the learning rate of this step."""
    weight = torch.nn.Linear(1, 1, bias=False).double()
    optimizer = torch.optim.SGD(weight.parameters(), lr=9)
    for lr in (0.25, 0.5):
        before = weight.weight.item()
        weight.weight.sum().backward()
        update(weight, optimizer, torch.amp.GradScaler("cpu", enabled=False), lr, clip=9.0)
        assert before - weight.weight.item() == pytest.approx(lr)


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_only_float16_gradients_are_scaled(precision):
    """Only float16 underflows; in other precisions, a scaler would skip steps for nothing."""
    model = small_gpt()
    model.precision = precision
    assert grad_scaler(model).is_enabled() == (precision == torch.float16)


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16", "float16"])
def test_parameters_stay_float32_in_every_precision(precision):
    """bfloat16 weights would lose updates of DPO's size: 1 + 0.001 rounds to 1."""
    model = small_gpt().float()
    set_precision(model, precision)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    if precision != "auto":
        assert model.precision == (None if precision == "float32" else getattr(torch, precision))


def test_only_on_cuda_is_the_vocabulary_padded():
    """Elsewhere, padding would cost a copy of the embedding in each step and gain nothing."""
    for device, multiple in (("cpu", 1), ("cuda", 64)):
        model = SimpleNamespace(device=torch.device(device))
        set_precision(model, "float32")
        assert model.vocab_multiple == multiple


@pytest.mark.parametrize("device, n_weights, n_tokens, worth", [
    ("cuda", 124e6, 25_000 * 295, False), ("cuda", 124e6, 80e6, False), ("cuda", 124e6, 81e6, True),
    ("cuda", 1.5e9, 7e6, True), ("cuda", 60_000, 1e10, False), ("cpu", 1.5e9, 1e10, False)])
def test_only_long_runs_of_large_models_on_cuda_are_compiled(device, n_weights, n_tokens, worth):
    """Saving a minute, a quarter, takes four: 240 s at 250 TFLOP/s are 6e16 FLOPs, which are
    6 x 124M weights x 80.6M tokens. An epoch of IMDb has 25,000 reviews of 295 tokens."""
    weights = [torch.empty(int(n_weights), device="meta")]
    model = SimpleNamespace(device=torch.device(device), parameters=lambda: weights)
    assert worth_compiling(model, n_tokens) == worth


@pytest.mark.parametrize("flags, expected", [
    ("--epochs 2", 2 * 3 * 8), ("--steps 5 --batch 6", 5 * 6 / 9 * 3 * 8)])
def test_compiling_is_decided_by_all_tokens_of_a_run(flags, expected, monkeypatch):
    """Three prompts of 8 tokens with three pairs each: an epoch has 24 tokens and 9 pairs."""
    seen = []
    monkeypatch.setattr(runtime.parallel, "worth_compiling",
                        lambda model, n_tokens: seen.append(n_tokens) or True)
    items = [Encoded([1, 2], [[3, 4], [5, 6], [7, 8]], [(0, 1), (0, 2), (1, 2)])] * 3
    for choice, compiled in (("auto", True), ("off", False), ("on", True)):
        model = small_gpt()
        runtime.parallel.set_compiled(model, items, train_dpo.parse_args(
            [*flags.split(), "--compile", choice]))
        assert model.compiled == compiled
    assert seen == pytest.approx([expected])


def test_the_first_step_of_training_moves_the_policy(tmp_path):
    """Although policy and reference are equal, there is a gradient, -beta/2 for the chosen answer,
    so after one step the pairs are ranked. If the reference took part in it, it would be zero."""
    policy = small_gpt()
    items = ranked_items(4, policy)
    train_dpo.train(policy, items, [], settings(tmp_path, batch=12, steps=1, lr=1e-3))
    batch = pack(items, 32)
    ratios = (policy.logps(batch) - batch.ref_logps).detach()
    assert (ratios[batch.chosen] - ratios[batch.rejected]).mean() > 1e-3


def test_each_number_on_the_screen_is_the_sum_of_its_column():
    """Of each of two pairs, the first answer is chosen; its numbers must be logged as chosen."""
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0])
    rewards = torch.tensor([0.5, 0.25, -1.0, -3.0])
    batch = pack([Encoded([1], [[2], [3]], [(0, 1)])] * 2, 8)
    numbers = train_dpo.describe(logps, rewards, batch, tie=0.0)
    # The margins are 0.5 - 0.25 and -1 + 3, so both pairs are ranked correctly.
    expected = {"accuracy": 2, "margin": 2.25, "chosen_reward": -0.5, "rejected_reward": -2.75,
                "chosen_logp": -5, "rejected_logp": -10}
    assert {name: float(value) for name, value in numbers.items()} == expected


def test_micro_batches_hold_every_prompt_once():
    batches = list(micro_batches(ranked_items(7), 3, 32, small_gpt()))
    assert [batch.n_answers for batch in batches] == [9, 6, 6]      # 3, 2 and 2 prompts
    assert sum(len(batch.chosen) for batch in batches) == 21


def test_rows_are_as_long_as_costs_least_and_a_few_lengths_where_they_are_compiled():
    """Three prompts of 20 tokens with their answers, 8 channels: in three rows of 20 they cost
    3 x 20 x (6 x 8 + 20) = 4,080, in one row of 60, with masked keys, 60 x (6 x 8 + 60) = 6,480. A
    compiled graph is for one row length, so there are few: a power of two from 256, or the longest
    allowed. A prompt of 300 tokens with its answer gets 512, or 400 if that is the longest."""
    items, model = [Encoded([1] * 10, [[2] * 10], [])] * 3, small_gpt()
    long = [Encoded([1] * 200, [[2] * 100], [])]

    def row_length(items, longest):
        return data.pack_for_model(items, longest, model).tokens.size(1)
    assert row_length(items, 64) == 20 and row_length(long, 1024) == 300
    model.compiled = True
    assert [row_length(items, longest) for longest in (64, 256, 1024)] == [64, 256, 256]
    assert [row_length(long, longest) for longest in (400, 1024)] == [400, 512]


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_compiled_rows_have_one_of_few_lengths_and_room_for_every_prompt(a, b):
    """Up to 1,024 tokens there are three, 256, 512 and 1,024, besides the longest that is allowed;
    each is less than twice as long as necessary, unless 256 are enough."""
    best, longest = sorted((a, b))
    length = compiled_row_length(best, longest)
    assert best <= length <= longest and length < max(2 * best, 257)
    assert length in (longest, 256, 512, 1024, 2048, 4096)


@given(st.integers(1, 3), st.integers(1, 2), st.sampled_from([32, 64, 128]),
       st.sampled_from([8, 64, 500]), st.integers(1, 6), st.sampled_from([64, 1024]),
       st.booleans())
@hypothesis.settings(deadline=None, max_examples=30, derandomize=True)
def test_the_estimate_of_memory_is_above_what_a_step_keeps_and_not_by_much(
        layers, heads, channels, vocabulary, n, row_length, long):
    """The tensors that autograd saves between forward and backward are most of the peak. Counted
    one by one, they are below the estimate, and more than a third of it. In rows of 1,024 tokens
    the mask is a large part of them: with 32 channels and one layer, 4 x 1,024 bytes for a token,
    beside 4 x 20 x 32. Each layer has the same one."""
    config = GPTConfig(row_length, vocabulary, layers, heads, channels)
    n_long = row_length - 4 if long else 9
    batch = pack([Encoded([1], [[2] * n_long, [3]], [(0, 1)])] * n, row_length)
    model, kept = GPT(config), {}
    weights = {weight.data_ptr() for weight in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor      # so no address is reused
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = model.logps(batch).sum()
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    estimate = runtime.memory.bytes_of_step(config, batch.tokens.numel(), len(batch.target),
                                            row_length)
    assert graph.requires_grad and estimate / 3 <= found <= estimate


@pytest.mark.parametrize("room, expected", [(106_880, 1), (106_879, 2), (54_079, 4),
                                            (27_679, 8), (0, 8)])
def test_micro_batches_are_as_few_as_fit_in_the_memory_that_is_free(monkeypatch, room, expected):
    """A step has eight prompts of 12 tokens, 10 of them scored. With a fifth of each row empty,
    that is 120 places and 80 rows of 20 logits. In one micro-batch, it is 4 (20 x 8 x 120 + 60 x 80
    + 2 x 20 x 8) + 5 x 120 x 16 = 106,880 bytes; in two 54,080, in four 27,680. The free memory is
    set to `room` / 0.8 plus 12 bytes per weight, so that `room` bytes may be used."""
    model = GPT(GPTConfig(16, 20, 1, 2, 8))
    free = room / 0.8 + 12 * sum(weight.numel() for weight in model.parameters())
    monkeypatch.setattr(runtime.memory, "free_memory", lambda device: free)
    items = [Encoded([1, 2], [[3] * 5, [4] * 5], [(0, 1)])] * 30
    batches = Batches(items, 8, seed=0)
    assert runtime.memory.fewest_micro_batches(model, batches, 16) == expected


def test_free_memory_is_more_than_a_megabyte_and_less_than_there_is():
    free = runtime.memory.free_memory(torch.device("cpu"))
    assert 2**20 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("folder, limit, used", [
    (".", "memory.max", "memory.current"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes")])
def test_the_memory_limit_of_a_container_is_known(folder, limit, used, tmp_path):
    """In both versions of control groups. Of 1,000 bytes 700 are used, 50 of them for files that
    can be read again. Without a limit or outside of Linux, only MemAvailable counts."""
    assert runtime.memory.left_in_container(tmp_path) == math.inf
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / used).write_text("700\n")
    (tmp_path / folder / "memory.stat").write_text("anon 600\ninactive_file 50\nfile 90\n")
    for text, expected in [("1000", 350), ("600", 0), ("max", math.inf)]:
        (tmp_path / folder / limit).write_text(text + "\n")
        assert runtime.memory.left_in_container(tmp_path) == expected


def test_evaluations_during_training_read_a_bounded_part_of_the_held_out_prompts(monkeypatch,
                                                                                capsys):
    """The same one each time, whatever the order of the file; and all of them if they are few."""
    monkeypatch.setattr(tasks.task, "MOST_EVALUATED", 4)
    items = [Encoded([i], [[1]], []) for i in range(10)]
    chosen = tasks.task.evaluation_subset(items)
    assert len(chosen) == 4 and "evaluating on 4 of 10 held-out prompts" in capsys.readouterr().out
    again = tasks.task.evaluation_subset(items[::-1])
    assert sorted(item.prompt for item in again) == sorted(item.prompt for item in chosen)
    assert tasks.task.evaluation_subset(items[:4]) == items[:4]


@pytest.mark.parametrize("vocabulary, expected", [(50, [3, 3, 1]), (2**27 // 20, [2, 2, 2, 1]),
                                                  (2**27 // 5, [1] * 7)])
def test_passes_without_gradients_take_as_many_prompts_as_their_logits_allow(vocabulary, expected):
    """Seven prompts with ten scored tokens each, at most three at a time, and at most 2^27 logits:
    those of 20 tokens are two prompts; of 5 not even one, which then goes alone."""
    model = SimpleNamespace(compiled=False, device=torch.device("cpu"),
                            config=SimpleNamespace(vocab_size=vocabulary, n_embd=8))
    items = [Encoded([1], [[2] * 4, [3] * 6], [(0, 1)])] * 7
    batches = list(data.batches_in_order(items, 16, model, size=3))
    assert [batch.n_answers // 2 for batch in batches] == expected


class NeverWaits(TorchDispatchMode):
    """A mode in which whatever makes the host wait for a device raises AssertionError, on the CPU
    too: any operation whose output size or Python value depends on the content of a tensor."""

    TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.strip("_").startswith("index"):     # by a mask: any size
            indices = args[1] if isinstance(args[1], (list, tuple)) else []
            waits = any(i is not None and i.dtype == torch.bool for i in indices)
        else:
            waits = self.TAGS & set(func.tags)
        assert not waits, f"{func} waits for the device"
        return func(*args, **kwargs or {})

    def __enter__(self):
        self.patches = ExitStack()
        for name in ("tolist", "numpy", "cpu"):         # these dispatch nothing on the CPU
            self.patches.enter_context(mock.patch.object(torch.Tensor, name, self.refuse(name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)

    def refuse(self, name):
        def refused(*arguments, **named):
            raise AssertionError(f"{name} waits for the device")
        return refused


@contextmanager
def cuda_never_waits():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def steps_under(guard, loop, model, items, args, monkeypatch):
    """Run a loop with each step after the first under a guard, from its data to its update. Returns
    the number of guarded steps."""
    guarded, micro_batches, note_update, first = 0, Run.micro_batches, Log.note_update, True
    with ExitStack() as stack:
        def from_here(*arguments):
            if not first:
                stack.enter_context(guard())
            yield from micro_batches(*arguments)

        def to_here(*arguments):
            nonlocal guarded, first
            note_update(*arguments)
            stack.close()
            guarded, first = guarded + (not first), False
        monkeypatch.setattr(Run, "micro_batches", from_here)
        monkeypatch.setattr(Log, "note_update", to_here)
        loop.train(model, items, [], args)
    return guarded


LOOPS = [(train_sft, {}), *((train_dpo, {"loss": loss}) for loss in train_dpo.LOSSES)]


def watched_steps(guard, loop, changes, device, precision, tmp_path, monkeypatch):
    model = small_gpt().float().to(device)
    set_precision(model, precision)
    items = ranked_items(8, model.cpu())
    if loop is train_sft:
        items = [Encoded(item.prompt, item.answers[:1], []) for item in items]
    args = settings(tmp_path, loop, batch=4, steps=4, accumulate=2, **changes)
    return steps_under(guard, loop, model.to(device), items, args, monkeypatch)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("loop, changes", LOOPS)
def test_a_step_never_waits_for_the_device(loop, changes, precision, tmp_path, monkeypatch):
    """After an .item() in a step, a GPU is idle until the next kernels are launched. Of four steps
    the last three are watched, from packing to AdamW; in float16 with its scaler, because the fused
    AdamW checks for overflows on the device. (Step 0 waits, because it is compared with log 2.)"""
    assert watched_steps(NeverWaits, loop, changes, "cpu", precision, tmp_path, monkeypatch) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("loop, changes", LOOPS)
def test_on_cuda_a_step_never_waits(loop, changes, precision, tmp_path, monkeypatch):
    """The same claim, checked by CUDA itself."""
    assert watched_steps(cuda_never_waits, loop, changes, "cuda", precision, tmp_path,
                         monkeypatch) == 3


@pytest.mark.parametrize("waits", [
    torch.Tensor.item, float, bool, lambda x: x.tolist(), lambda x: x.numpy(), lambda x: x.cpu(),
    torch.Tensor.nonzero, torch.Tensor.unique, lambda x: torch.equal(x, x), lambda x: x[x > 0],
    lambda x: torch.masked_select(x, x > 0), lambda x: x.repeat_interleave(x.long()),
    lambda x: torch.where(x > 0), lambda x: x.index_put_((x > 0,), x[0])])
def test_what_waits_is_noticed(waits):
    """NeverWaits refuses operations that wait, and lets others pass."""
    x = torch.ones(1)
    waits(x)
    with NeverWaits():
        (x[torch.zeros(1, dtype=torch.int64)] * x.sum()).clamp(0)
        with pytest.raises(AssertionError, match="waits for the device"):
            waits(x)


def test_log_means_are_sums_over_counts_since_the_last_line(tmp_path, capsys):
    """(1 + 1 + 7) / 3 = 3, whereas the mean of the batch means would be (1 + 7) / 2 = 4."""
    log = Log(tmp_path / "log.csv", {"loss": ("loss", ".4f"), "lr": ("rate", ".1e")})
    log.add(2, loss=torch.tensor(2.0))
    log.add(1, loss=torch.tensor(7.0))
    log.note_update(0, torch.tensor(1.0), lr=0.5)
    log.write(0)
    log.add(1, loss=5.0)
    log.note_update(1, torch.tensor(1.0), lr=0.25)
    log.write(1)
    assert (tmp_path / "log.csv").read_text() == "step,loss,lr\n0,3,0.5\n1,5,0.25\n"
    assert "3.0000" in capsys.readouterr().out


def test_an_evaluation_stands_in_the_line_of_its_own_step(run, tmp_path):
    """A line every second step and an evaluation at every second line, the last step included."""
    flags = ["--data", str(run / "pairs.jsonl"), "--tokenizer", "reviews", "--device", "cpu",
             "--sft", str(run / "sft.pt"), "--steps", "7", "--eval-prompts", "2", "--lr", "1e-3",
             "--max-new-tokens", "2", "--warmup", "1"]
    losses = []
    for name, every in [("a", ("2", "4")), ("b", ("1", "1"))]:
        train_dpo.main([*flags, "--log-every", every[0], "--eval-every", every[1],
                        "--out", str(tmp_path / name)])
        losses.append({row["step"]: row["held_out_loss"]
                       for row in rows_of(tmp_path / name / "dpo_metrics.csv")})
    rare, each = losses
    assert {step for step, loss in rare.items() if loss} == {"0", "4", "7"}
    assert set(rare) == {"0", "2", "4", "6", "7"}
    assert all(loss == each[step] for step, loss in rare.items() if loss)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_stops_the_run(tmp_path, bad):
    log = Log(tmp_path / "log.csv", {"loss": ("loss", ".4f")})
    log.add(1, loss=torch.tensor(bad))
    log.note_update(5, torch.tensor(1.0), lr=0.5)
    with pytest.raises(UserError, match="step 5: the loss is"):
        log.write(5)


def test_nothing_is_saved_over_a_good_checkpoint_when_training_breaks(run, monkeypatch):
    before = (run / "dpo.pt").read_bytes()
    monkeypatch.setattr(train_dpo, "dpo_loss", lambda pi, *_: (pi * math.nan, pi.detach()))
    monkeypatch.setattr(train_dpo, "check_start", lambda *_: None)
    with pytest.raises(SystemExit):
        train_dpo.main(["--data", str(run / "pairs.jsonl"), "--out", str(run), *QUICK])
    assert (run / "dpo.pt").read_bytes() == before


def test_kl_and_win_rate_are_what_their_names_say():
    """For answers of one token, the KL can be summed over the vocabulary. Against itself a policy
    has KL 0 and a win rate of one half; another policy's win rate is its share of better answers,
    with ties counted as half."""
    tokenizer = get_tokenizer("reviews")
    torch.manual_seed(0)
    config = GPTConfig(16, tokenizer.n_vocab, 1, 2, 16)
    a, b = GPT(config, 0.3), GPT(config, 0.3)
    prompts = ["The plot", "The music"] * 1000
    grades = {"reward": lambda texts: [len(text) for text in texts],
              "well_formed": lambda texts: [text.isascii() for text in texts]}
    measures, texts = sample.evaluate({"sft": a, "dpo": b}, a, prompts, tokenizer, 1, 0, grades)
    assert measures["sft"]["kl"] == 0 and measures["sft"]["win_rate"] == 0.5
    ids = torch.tensor([[tokenizer.eot_token] + tokenizer.encode_ordinary(p) for p in prompts[:2]])
    p, q = (model(ids)[:, -1].log_softmax(-1) for model in (b, a))
    exact = (p.exp() * (p - q)).sum(-1).mean().item()
    assert measures["dpo"]["kl"] == pytest.approx(exact, abs=5 * measures["dpo"]["kl_se"])
    assert measures["dpo"]["length"] == 1
    lengths = [(len(x), len(y)) for x, y in zip(texts["sft"], texts["dpo"])]
    better = [(y > x) + (y == x) / 2 for x, y in lengths]
    assert measures["dpo"]["win_rate"] == pytest.approx(sum(better) / 2000)
    n, share = 2000, measures["dpo"]["well_formed"]
    assert measures["dpo"]["well_formed_se"] == pytest.approx(
        math.sqrt(share * (1 - share) / (n - 1)), rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_cuda_runs_start_at_log_2_in_every_precision(run, tmp_path, precision):
    train_dpo.main(["--data", str(run / "pairs.jsonl"), "--out", str(tmp_path),
                    "--sft", str(run / "sft.pt"), *QUICK, "--device", "cuda",
                    "--precision", precision])
    _, first, *_ = rows_of(tmp_path / "dpo_metrics.csv")
    tolerance = 1e-4 if precision == "float32" else 0.02
    assert float(first["loss"]) == pytest.approx(math.log(2), abs=tolerance)


# ------------------------------------------------------------------------------------------------
# sample.py
# ------------------------------------------------------------------------------------------------


def test_sample_prints_as_many_answers_as_asked_for_and_the_same_for_the_same_seed(run, capsys):
    flags = ["--out", str(run), "--prompt", "The plot", "-n", "3", "--max-new-tokens", "5"]
    sample.main(flags)
    first = capsys.readouterr().out
    sample.main(flags)
    assert capsys.readouterr().out == first and first.count("prompt  'The plot'") == 3


def test_compare_shows_both_policies_side_by_side(run, capsys):
    sample.main(["--out", str(run), "--compare", "--prompt", "The plot", "--max-new-tokens", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line and not line.startswith(" ")][:3] == [
        "prompt", "sft", "dpo"]


def test_without_a_prompt_sample_asks_until_the_end_of_input(run, capsys, monkeypatch):
    lines = iter(["The plot", "The cast"])

    def answer(_):
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line
    monkeypatch.setattr("builtins.input", answer)
    sample.main(["--out", str(run), "--max-new-tokens", "5"])
    out = capsys.readouterr().out
    assert "'The plot'" in out and "'The cast'" in out


def test_an_overflow_of_float16_leaves_the_step_out_and_goes_on():
    """If the scaler finds an infinite gradient, no weight moves, and the norm is not finite."""
    model = small_gpt().float()
    before = copy.deepcopy(model)
    optimizer, scaler = model.optimizer(1.0), torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.tensor([[1]])).sum() * math.inf).backward()
    assert not math.isfinite(update(model, optimizer, scaler, 1.0, 1.0))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))


# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------

SCRIPTS = {"train_sft": train_sft, "train_dpo": train_dpo, "sample": sample}


def test_every_flag_is_read():
    """A flag that the code never reads would silently do nothing."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("runtime/*.py"), *ROOT.glob("tasks/*.py")]
    sources = "\n".join(path.read_text() for path in files)
    flags = {node.args[0].value for node in ast.walk(ast.parse(sources))
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add"
             and isinstance(node.args[0], ast.Constant)}
    assert len(flags) > 30
    for flag in flags:
        name = flag.lstrip("-").replace("-", "_")
        assert re.search(rf"args\.{name}\b", sources) or f'"{name}"' in sources, flag


def test_defaults_are_those_of_appendix_b():
    """On real data: beta 0.1, batch 64, learning rate 1e-6, linear warm-up over 150 steps. The
    small model of the reviews task has a beta and a learning rate of its own."""
    args = train_dpo.parse_args(["--data", "pairs.jsonl"])
    assert (args.beta, args.batch, args.lr, args.warmup, args.weight_decay) == (
        0.1, 64, 1e-6, 150, 0)
    args = train_dpo.parse_args([])
    assert (args.beta, args.batch, args.lr, args.warmup) == (0.5, 64, 1e-4, 50)


def test_batches_do_not_depend_on_what_was_asked_before():
    items = ranked_items(5)
    batches, fresh = Batches(items, 4, 0), Batches(items, 4, 0)
    for step in (9, 0, 3, 9):
        assert batches[step] == fresh[step]
