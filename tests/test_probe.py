"""The probe (experiments/probe.py): correlations of log(pi / pi_ref) with the reward.

    pytest tests/test_probe.py
"""

import importlib.util
import json

import pytest
import torch
from hypothesis import given, settings, strategies as st

from experiments import probe
from experiments.probe import correlations, effective_share
from model import GPT, GPTConfig
from sample import logps_of
from tasks.checkpoint import save_checkpoint
from tasks.tokenizers import get_tokenizer
from train_dpo import optimal_policy

for_all = settings(deadline=None, max_examples=40, derandomize=True)
EOT = 0


def float64(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def matrices(P, M):
    row = st.lists(st.floats(-3, 3), min_size=M, max_size=M)
    return st.lists(row, min_size=P, max_size=P).map(float64)


@for_all
@given(matrices(4, 6), matrices(4, 1))
def test_the_log_ratio_of_the_optimal_policy_is_fully_correlated_with_the_reward(rewards, ref):
    """beta log(pi* / pi_ref) = r - beta log Z(x), whatever Z(x) of a prompt is."""
    rewards = rewards.round(decimals=3)
    ref_logps = (ref + torch.arange(6.0)).log_softmax(1)
    log_ratios = optimal_policy(ref_logps, rewards, 0.5) - ref_logps
    found = correlations(log_ratios, rewards)
    assert len(found) == sum(len(set(row)) > 1 for row in rewards.tolist())
    torch.testing.assert_close(found, torch.ones_like(found))


def test_a_correlation_is_among_answers_to_one_prompt():
    """Two prompts with correlations of 1 and -1, and rewards so far apart that over both together
    it would be near 1. The third prompt has only one reward, so it has none."""
    rewards = float64([[0, 1, 2], [100, 101, 102], [5, 5, 5]])
    log_ratios = float64([[0, 1, 2], [102, 101, 100], [1, 2, 3]])
    torch.testing.assert_close(correlations(log_ratios, rewards), float64([1, -1]))


def test_a_correlation_worked_out_on_paper():
    """Deviations (-1, 0, 1) and (-1, 1, 0): 1 / sqrt(2 * 2)."""
    torch.testing.assert_close(correlations(float64([[1, 2, 3]]), float64([[0, 2, 1]])),
                               float64([0.5]))


@for_all
@given(st.integers(1, 50), st.integers(0, 49), st.floats(-500, 500))
def test_the_effective_share_is_that_of_equal_weights(n, others, shift):
    """k equal weights among n, all others 0, are k / n, whatever their size."""
    k = max(1, n - others)
    log_ratios = torch.full((n,), -5000.0, dtype=torch.float64)
    log_ratios[:k] = shift
    assert effective_share(log_ratios) == pytest.approx(k / n)


def gpt(seed):
    torch.manual_seed(seed)
    return GPT(GPTConfig(32, 20, n_layer=1, n_head=2, n_embd=8), 0.3).double()


def test_a_reward_that_is_the_log_ratio_is_found_on_both_kinds_of_answers():
    """And its opposite. The reference among the policies has no correlation, for its log-ratio is 0
    for all answers."""
    args = probe.parse_args(["--samples", "4", "--max-new-tokens", "5"])
    policy, reference = gpt(0), gpt(1)

    def log_ratio(items):
        pi, ref = (float64(logps_of(model, items, 32))[:, 0] for model in (policy, reference))
        return (pi - ref).tolist()
    for sign in (1, -1):
        found = probe.probe({"dpo": policy}, reference, [[1, 2], [3]], lambda items: [
            sign * number for number in log_ratio(items)], EOT, args)["dpo"]
        assert found["on_reference"] == pytest.approx(sign)
        assert found["on_own"] == pytest.approx(sign) and 0.125 <= found["effective"] < 1
    with pytest.raises(Exception, match="sft, on_reference: fewer than two prompts"):
        probe.probe({"sft": reference}, reference, [[1, 2], [3]], log_ratio, EOT, args)


def test_each_kind_of_answers_is_sampled_from_its_own_model():
    """The log-ratio has its mean, the KL of one to the other, below 0 on answers of the reference
    and above 0 on those of the policy."""
    args = probe.parse_args(["--samples", "64", "--max-new-tokens", "5"])
    policy, reference, means = gpt(0), gpt(1), []
    for model in (reference, policy):
        items = probe.sampled_from(model, [[1, 2], [3]], EOT, 0, args)
        assert items[0].prompt == items[63].prompt == [1, 2] and items[64].prompt == [3]
        ratios = probe.log_ratios_of(policy, reference, items, 64)
        alone = logps_of(policy, items[64:65], 32)[0][0] - logps_of(reference, items[64:65],
                                                                    32)[0][0]
        assert ratios.shape == (2, 64) and ratios[1, 0].item() == pytest.approx(alone, abs=1e-5)
        means.append(ratios.mean().item())
    assert means[0] < 0 < means[1]


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    tokenizer, picture = get_tokenizer("reviews"), []
    if importlib.util.find_spec("matplotlib"):
        picture = ["--svg", str(tmp_path / "probe.svg")]
    for seed, name in enumerate(["sft", "dpo", "other"]):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(64, tokenizer.n_vocab, 1, 2, 16), 0.3)
        save_checkpoint(tmp_path / f"{name}.pt", model, tokenizer="reviews", source="reviews")
    small = f"--out {tmp_path} --samples 4 --eval-prompts 20 --max-new-tokens 9 --device cpu"
    probe.main([*small.split(), "--checkpoint", str(tmp_path / "dpo.pt"), "--checkpoint",
                str(tmp_path / "other.pt"), *picture])
    found = json.loads((tmp_path / "probe.json").read_text())
    assert list(found["policies"]) == ["dpo", "other"] and found["reward"] == "ground_truth"
    printed = capsys.readouterr().out
    for measures in found["policies"].values():
        assert f"{measures['on_own']:.3f} +-{measures['on_own_se']:.3f}" in printed
        if picture:
            assert f"<!-- {measures['on_own']:.2f} -->" in (tmp_path / "probe.svg").read_text()
