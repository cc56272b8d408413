"""The benchmark: its rungs compute the same step, and its FLOPs are those counted by hand.

    pytest tests/test_benchmark.py
"""

import importlib.util
import io
import json
import math
import os
import statistics
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import Encoded, pack, pack_for_model
from experiments import benchmark
from experiments.benchmark import (
    WORKLOADS,
    collate,
    executed_flops,
    gradients,
    load_steps,
    pad,
    parse_args,
    rungs,
    sequences,
    set_reference,
    synthetic,
    useful_flops,
)
from model import GPT, GPTConfig
from tasks.tokenizers import get_tokenizer
from train_dpo import dpo_loss

SMALL = GPTConfig(block_size=64, vocab_size=50, n_layer=2, n_head=2, n_embd=8)
TINY = ["--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--device", "cpu",
        "--peak-tflops", "0.1"]
ITEMS = [Encoded([49, 1, 2], [[3, 4, 49], [5, 49]], [(0, 1)]),
         Encoded([49, 6], [[7, 49], [8, 9, 10, 49], [11, 49]], [(0, 1), (2, 0)])]


def small_gpt(seed):
    """A GPT with weights large enough that no two answers have the same log-prob."""
    torch.manual_seed(seed)
    return GPT(SMALL, init_std=0.3)


# ------------------------------------------------------------------------------------------------
# Workloads
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, prompt, answer", [("hh", 150, 60), ("tldr", 350, 35),
                                                  ("c1", None, 48)])
def test_a_workload_has_the_medians_it_claims(name, prompt, answer):
    """The median of n draws is off by about 1.25 sigma / sqrt(n) of itself: with sigma 0.55 and
    2,000 draws by 1.5 %. Four times that is allowed."""
    items = synthetic(WORKLOADS[name], 2000, GPTConfig(), seed=0)
    answers = [len(ids) for item in items for ids in item.answers]
    assert statistics.median(answers) == pytest.approx(answer, rel=0.06)
    if prompt:
        lengths = [len(item.prompt) for item in items]
        assert statistics.median(lengths) == pytest.approx(prompt, rel=0.06)
        assert {len(item.answers) for item in items} == {2}


def test_c1_has_four_answers_six_pairs_and_prompts_of_two_to_eight_tokens():
    for item in synthetic(WORKLOADS["c1"], 200, GPTConfig(), seed=0):
        assert 2 <= len(item.prompt[1:]) <= 8 and len(item.answers) == 4
        assert item.pairs == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize("workload, asked, pairs", [("hh", 8, 8), ("c1", 8, 12)])
def test_every_step_has_the_pairs_it_says_and_every_process_gets_the_same(workload, asked, pairs):
    args = parse_args(["--workload", workload, "--pairs", str(asked), "--device", "cpu"])
    found = load_steps(args, GPTConfig())
    assert len(found) == args.warmup + args.steps
    assert all(sum(len(item.pairs) for item in items) == pairs for items in found)
    assert found == load_steps(args, GPTConfig())


def test_ids_begin_and_end_as_encoded_text_does_and_fit_in_a_block():
    for workload in WORKLOADS.values():
        for item in synthetic(workload, 500, GPTConfig(), seed=1):
            for answer in item.answers:
                assert item.prompt[0] == answer[-1] == 50256
                assert 50256 not in item.prompt[1:] + answer[:-1]
                assert len(item.prompt) + len(answer) <= 1024


def test_your_own_pairs_are_a_workload_too(tmp_path, monkeypatch):
    """Any file of preferences will do. (The reviews tokenizer needs no network.) Its ids are in
    arrays, which make the same batches as lists."""
    monkeypatch.setattr(benchmark, "get_tokenizer", lambda name: get_tokenizer("reviews"))
    rows = [{"prompt": f"The {i}", "chosen": " was good", "rejected": " was dull"}
            for i in range(5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = parse_args(["--data", str(tmp_path / "pairs.jsonl"), "--pairs", "2"])
    steps = load_steps(args, GPTConfig())
    assert args.workload == ["data"] and {len(items) for items in steps} == {2}
    padded, packed = (collate(steps[0], rungs("cpu")[name], GPTConfig())
                      for name in ("answer-logits", "packed"))
    assert sorted(padded.target.tolist()) == sorted(packed.target.tolist())
    assert len(benchmark.trl_rows(steps)) == 2 * len(steps)


# ------------------------------------------------------------------------------------------------
# The rungs
# ------------------------------------------------------------------------------------------------


def step_by_hand(policy, reference, items):
    """The mean DPO loss of packed rows, with another model as the reference."""
    batch = pack(items, 32)
    with torch.no_grad():
        ref_logps = reference.logps(batch)
    return dpo_loss(policy.logps(batch), ref_logps, batch.chosen, batch.rejected, 0.1)[0].mean()


@pytest.mark.parametrize("name", [name for name in rungs("cpu") if name != "compile"])
def test_every_rung_computes_the_loss_and_gradient_of_our_step(name):
    """No rung may win by computing something else. The reference is another model, so the loss is
    not simply log 2. (test_model.py shows that compiling changes nothing.)"""
    policy, twin, reference = small_gpt(0), small_gpt(0), small_gpt(1)
    expected = step_by_hand(twin, reference, ITEMS)
    expected.backward()
    assert abs(expected.item() - math.log(2)) > 1e-3
    rung = rungs("cpu")[name]
    set_reference(reference, ITEMS, rung)
    policy.precision = torch.bfloat16 if rung.bf16 else None
    tolerance = dict(rtol=0.05, atol=0.05) if rung.bf16 else dict(rtol=1e-4, atol=1e-5)
    loss = gradients(policy, reference, ITEMS, rung)
    torch.testing.assert_close(loss, expected.detach(), **tolerance)
    for p, q in zip(policy.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, **tolerance)


def test_an_answer_of_three_pairs_is_padded_three_times_and_packed_once():
    """ITEMS have 3 pairs, so 6 sequences, the longest of 2 + 4 tokens; but only 5 answers."""
    batch = pad(sequences(ITEMS))
    assert batch.tokens.tolist() == [
        [49, 1, 2, 3, 4, 49], [49, 1, 2, 5, 49, 0], [49, 6, 7, 49, 0, 0], [49, 6, 8, 9, 10, 49],
        [49, 6, 11, 49, 0, 0], [49, 6, 7, 49, 0, 0]]
    assert batch.n_answers == 6 and pack(ITEMS, 32).n_answers == 5


@pytest.mark.parametrize("name, lengths", [
    ("packed", [60, 10]), ("shared", [90, 11]), ("compile", [256, 256])])
def test_each_batch_has_rows_of_its_own_best_length(name, lengths):
    """The first batch, a prompt of 30 tokens with two answers of 30, is one row of 90, or two rows
    of 60 if nothing is shared. The second, a prompt of 9 tokens with two answers of 1, is one row
    of 11, or two of 10. Compiled rows have the lengths of training."""
    steps = [[Encoded([1] * 30, [[1] * 30, [1] * 30], [(0, 1)])],
             [Encoded([1] * 9, [[1], [1]], [(0, 1)])]]
    config, rung = GPTConfig(block_size=1024), rungs("cpu")[name]
    assert [collate(items, rung, config).tokens.size(1) for items in steps] == lengths
    model = GPT(replace(config, vocab_size=2, n_layer=1))
    model.compiled = name == "compile"
    if name != "packed":
        assert [pack_for_model(items, 1024, model).tokens.size(1) for items in steps] == lengths


# ------------------------------------------------------------------------------------------------
# FLOPs
# ------------------------------------------------------------------------------------------------


def test_useful_flops_are_those_counted_by_hand():
    """One prompt of 3 tokens, answers of 3 and 2; 2 layers, 8 channels, 50 ids. The forward pass:

        blocks: 8 tokens x 2 layers x 12 C^2 weights (3 C^2 for query, key and value, 1 C^2 for the
                projection, 8 C^2 for the MLP) x 2 operations = 8 x 2 x 768 x 2 = 24,576
        keys:   1 + 2 + 3 in the prompt, 4 + 5 + 6 and 4 + 5 in the answers = 30, each multiplied by
                a query and by a weight, in C channels: 30 x 2 layers x 2 x 2 C = 1,920
        head:   5 answer tokens x 8 x 50 x 2 = 4,000

    The backward pass takes twice as much, so a step takes 3 times as much.
    """
    assert useful_flops(SMALL, ITEMS[:1]) == 3 * (24_576 + 1_920 + 4_000)


def test_executed_flops_are_those_counted_by_hand():
    """The same pair, in 3 passes (the backward counts twice), or 4 with a second model:

        padded  2 rows of 6 places: blocks 12 x 2 x 768 x 2 = 36,864; keys 2 x (1 + 2 + ... + 6) =
                42, so 42 x 2 x 32 = 2,688; all logits 12 x 8 x 50 x 2 = 9,600, at answers 4,000
        packed  a row of 11, or of 8 if the prompt is shared, with a dense mask: blocks
                11 x 2 x 768 x 2 = 33,792 and 24,576; keys 11 x 11 x 64 = 7,744 and 4,096; with the
                vocabulary padded from 50 to 64 columns, the head has 5 x 8 x 64 x 2 = 5,120
    """
    model = GPT(SMALL)

    def executed(name):
        rung = rungs("cpu")[name]
        return executed_flops(model, collate(ITEMS[:1], rung, SMALL), rung)
    assert executed("naive") == 4 * (36_864 + 2_688 + 9_600)
    assert executed("reference-once") == 3 * (36_864 + 2_688 + 9_600)
    assert executed("answer-logits") == 3 * (36_864 + 2_688 + 4_000)
    assert executed("packed") == 3 * (33_792 + 7_744 + 4_000)
    assert executed("shared") == 3 * (24_576 + 4_096 + 4_000)
    model.vocab_multiple = 64
    assert executed("answer-logits") == 3 * (36_864 + 2_688 + 4_000)
    assert executed("shared") == 3 * (24_576 + 4_096 + 5_120)


@pytest.mark.parametrize("name", ["reference-once", "answer-logits", "packed", "shared"])
def test_executed_flops_are_what_torch_counts(name):
    """Torch's counter sees every matrix product of forward and backward. It is run with plain
    attention, which multiplies all T keys, whereas the kernel of the padded rungs leaves out the
    future ones, T (T - 1) / 2 per row."""
    rung, model = rungs("cpu")[name], GPT(SMALL)
    model.vocab_multiple = 16
    batch = collate(ITEMS, rung, SMALL)
    B, T = batch.tokens.shape
    future = B * T * (T - 1) // 2 if rung.layout == "padded" else 0
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        gradients(model, None, ITEMS, rung)
    assert counter.get_total_flops() == (executed_flops(model, batch, rung)
                                         + 3 * future * 4 * SMALL.n_layer * SMALL.n_embd)


# ------------------------------------------------------------------------------------------------
# The script
# ------------------------------------------------------------------------------------------------


def run_here(command_line, env, **more):
    """In place of subprocess.run: the command that a process of its own would run."""
    assert command_line[:3] == [sys.executable, "-m", "experiments.benchmark"]
    with redirect_stdout(io.StringIO()) as out:
        benchmark.main(command_line[3:])
    return SimpleNamespace(returncode=0, stdout=out.getvalue())


def test_each_rung_is_measured_by_itself_and_written_down(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark.subprocess, "run", run_here)
    out = tmp_path / "result.json"
    benchmark.main([*TINY, "--workload", "c1", "--pairs", "6", "--warmup", "1", "--steps", "1",
                    "--rungs", "answer-logits", "shared", "shared", "--json", str(out)])
    lines = json.loads(out.read_text())["lines"]
    assert [line["rung"] for line in lines] == ["answer-logits", "shared"]
    assert [line["steps"] for line in lines] == [1, 2]          # shared was asked for twice
    for line in lines:
        assert line["pairs"] == 6
        assert line["fastest"] <= line["step"] <= line["slowest"]
        assert line["pairs_per_second"] == pytest.approx(6 / line["step"])
        assert line["runs"][0]["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
        lengths = line["runs"][0]["row_lengths"][1:]            # after the warm-up
        assert [line["shortest_row"], line["longest_row"]] == [min(lengths), max(lengths)]
    padded, ours = (line["runs"][0]["losses"] for line in lines)
    assert padded == pytest.approx(ours, abs=1e-5)
    shown = capsys.readouterr().out
    assert "pairs/s" in shown and "answer-logits" in shown and "torch" in shown


def test_a_rung_that_fails_is_a_line_without_a_number():
    line = benchmark.summary("hh", "naive", [{"failed": "out of memory"}], 1)
    assert "out of memory" in benchmark.benchmark_table([line], "naive") and "step" not in line


def test_a_rung_finds_packages_that_are_on_the_python_path(monkeypatch):
    """TRL may be in a folder of its own. Its process looks there too, after this repository."""
    seen = []
    monkeypatch.setenv("PYTHONPATH", "/trl")
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *args, env, **more: (
        seen.append(env["PYTHONPATH"]), SimpleNamespace(returncode=3))[1])
    assert benchmark.run_apart([], "hh", "trl") == {"failed": "exit code 3"}
    assert seen == [str(benchmark.ROOT) + os.pathsep + "/trl"]


def test_without_the_resource_module_memory_is_nan(monkeypatch):
    """Windows has no such module. Elsewhere, a Python with torch takes more than 50 MB."""
    assert benchmark.resource is None or benchmark.peak_memory("cpu") > 5e7
    monkeypatch.setattr(benchmark, "resource", None)
    assert math.isnan(benchmark.peak_memory("cpu"))


def test_without_trl_it_says_so_in_one_sentence_and_ends_with_2(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        benchmark.main([*TINY, "--against", "trl"])
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2 and message.startswith("benchmark.py: --against trl: TRL is not")
    assert "\n" not in message


def test_other_weights_or_ids_in_trl_would_be_noticed():
    """If a loss is not log 2 or a log-prob is off by a tenth, the two are not comparable."""
    ours = [math.log(2), -650.0, -640.0]
    benchmark.check_same("trl", [0.6931, -650.001, -640.001], ours, "cpu")
    for found in ([0.72, *ours[1:]], [ours[0], -650.1, ours[2]]):
        with pytest.raises(benchmark.UserError, match="not the same computation"):
            benchmark.check_same("trl", found, ours, "cpu")


def test_trl_starts_from_our_loss_and_log_probs(tmp_path):
    """This runs only where TRL is installed. measure_trl compares them and fails if they differ."""
    pytest.importorskip("trl")
    out = tmp_path / "result.json"
    benchmark.main([*TINY, "--pairs", "2", "--rungs", "shared", "trl", "trl-best", "--warmup", "1",
                    "--steps", "1", "--json", str(out)])
    ours, *theirs = json.loads(out.read_text())["lines"]
    for line in theirs:
        assert line["runs"][0]["losses"] == pytest.approx(ours["runs"][0]["losses"], abs=1e-3)
