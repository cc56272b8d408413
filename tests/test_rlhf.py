"""RLHF, which DPO replaces: the reward model (experiments/reward_model.py) and PPO (ppo.py).

    pytest tests/test_rlhf.py

First the mathematics, as in test_mathematics.py; then what a rollout and an update are made of;
then both commands. In the mathematics, N answers have up to L tokens, and padding is zero.
"""

import copy
import hashlib
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from data import Encoded, pack
from experiments import ppo, reward_model
from experiments.ppo import (
    GAMMA,
    LAMBDA,
    RATIO_CLIP,
    UNFINISHED,
    Learner,
    Penalty,
    by_token,
    clipped_loss,
    clipped_value_loss,
    gae,
    token_rewards,
    whiten,
)
from experiments.reward_model import normalise, reward_loss
from model import GPT, GPTConfig
from runtime.errors import UserError
from sample import logps_of, numbers_of
from tasks.checkpoint import load_checkpoint, save_checkpoint
from tasks.scalar_gpt import ScalarGPT
from tasks.tokenizers import get_tokenizer
from train_dpo import dpo_loss, optimal_policy

for_all = settings(deadline=None, max_examples=40, derandomize=True)
EOT = 0


def float64(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def vectors(n, low=-3.0, high=3.0):
    return st.lists(st.floats(low, high), min_size=n, max_size=n).map(float64)


@st.composite
def padded(draw, how_many=1):
    """Matrices (N, L), zero at padding, and the mask of the answers' tokens."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    matrices = [draw(vectors(mask.numel())).view_as(mask) * mask for _ in range(how_many)]
    return *matrices, mask


def gpt(seed=0, vocabulary=20, block_size=32):
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size, vocabulary, n_layer=1, n_head=2, n_embd=8), 0.3).double()


def scalar_gpt(seed=0):
    """A reward model or critic whose head is not zero."""
    model = ScalarGPT.from_gpt(gpt(seed)).double()
    torch.nn.init.normal_(model.scalar.weight)
    return model


@st.composite
def encoded(draw, most_answers=3):
    """A list of Encoded with prompts and answers of random lengths."""
    ids = lambda least: st.lists(st.integers(0, 19), min_size=least, max_size=7)        # noqa: E731
    answers = st.lists(ids(1), min_size=1, max_size=most_answers)
    items = draw(st.lists(st.tuples(ids(1), answers), min_size=1, max_size=5))
    return [Encoded(prompt, replies, []) for prompt, replies in items]


# ------------------------------------------------------------------------------------------------
# The reward model's loss
# ------------------------------------------------------------------------------------------------


@for_all
@given(vectors(4), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_reward_loss_is_equation_2_written_out(rewards, pairs):
    """-log of the probability that the Bradley-Terry model gives to what was preferred."""
    chosen, rejected = torch.tensor(pairs).T
    expected = [-math.log(1 / (1 + math.exp(rewards[l] - rewards[w]))) for w, l in pairs]
    torch.testing.assert_close(reward_loss(rewards, chosen, rejected), float64(expected))


@for_all
@given(vectors(2), st.floats(-50, 50))
def test_a_shift_of_all_rewards_of_a_prompt_changes_no_loss_but_a_scale_does(rewards, shift):
    """Lemma 1: with f(x) added to the rewards of both answers the loss is the same. Twice the
    rewards, on the other hand, are twice as sure of every pair."""
    w, l = torch.tensor([0]), torch.tensor([1])
    loss = reward_loss(rewards, w, l)
    torch.testing.assert_close(reward_loss(rewards + shift, w, l), loss, atol=1e-9, rtol=1e-9)
    margin = rewards[0] - rewards[1]
    if abs(margin) > 0.01:
        assert (reward_loss(2 * rewards, w, l) < loss) == (margin > 0)


@for_all
@given(vectors(3), vectors(3), st.floats(0.05, 5))
def test_the_loss_of_the_implicit_reward_is_the_dpo_loss(logps, ref_logps, beta):
    """DPO is this loss with beta log(pi / pi_ref) in place of the reward model."""
    w, l = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    implicit = beta * (logps - ref_logps)
    torch.testing.assert_close(reward_loss(implicit, w, l),
                               dpo_loss(logps, ref_logps, w, l, beta)[0])


# ------------------------------------------------------------------------------------------------
# The mathematics of PPO
# ------------------------------------------------------------------------------------------------


@for_all
@given(padded(2), st.floats(-5, 5), st.floats(0, 2))
def test_rewards_of_the_tokens_sum_to_the_kl_constrained_reward(drawn, scored, beta):
    """Over an answer: r(x, y) - beta (log pi(y|x) - log pi_ref(y|x)), whose mean is Eq. 3."""
    logps, ref_logps, mask = drawn
    scores = torch.full((len(mask),), scored, dtype=torch.float64)
    rewards = token_rewards(logps, ref_logps, scores, mask, beta)
    expected = scores - beta * (logps.sum(1) - ref_logps.sum(1))
    torch.testing.assert_close(rewards.sum(1), expected)


def test_the_score_is_on_the_last_token_and_never_on_padding():
    """Answers of one and three tokens; with beta 0 nothing else has a reward."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    zeros = torch.zeros(2, 3)
    rewards = token_rewards(zeros, zeros, torch.tensor([5.0, 7.0]), mask, beta=0.0)
    assert rewards.tolist() == [[5, 0, 0], [0, 0, 7]]


def test_a_token_more_likely_than_under_the_reference_is_penalised():
    """It is twice as likely under the policy: -beta log 2. The other one is as likely."""
    logps, ref_logps = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.5]]).log()
    mask = torch.ones(1, 2, dtype=torch.bool)
    rewards = token_rewards(logps, ref_logps, torch.zeros(1), mask, beta=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1 * math.log(2), 0.0]]))


@for_all
@given(padded(2), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_discounted_sum_of_later_temporal_differences(drawn, gamma, lam):
    """The definition, with its two sums; after the last token of an answer the value is 0."""
    rewards, values, mask = drawn
    N, L = rewards.shape
    after = torch.cat([values, torch.zeros(N, 1, dtype=values.dtype)], dim=1)
    expected = torch.zeros_like(rewards)
    for n in range(N):
        for t in range(L):
            for k in range(L - t):
                delta = (rewards[n, t + k] + gamma * after[n, t + k + 1] - after[n, t + k])
                expected[n, t] += (gamma * lam) ** k * delta
    torch.testing.assert_close(gae(rewards, values, gamma, lam), expected)
    assert (gae(rewards, values, gamma, lam)[~mask] == 0).all()


@for_all
@given(padded(2))
def test_with_lambda_1_the_advantage_is_what_followed_minus_what_was_expected(drawn):
    """And the return, advantage + value, is the sum of the rewards from this token on."""
    rewards, values, mask = drawn
    to_come = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(gae(rewards, values, 1.0, 1.0) + values, to_come)


@for_all
@given(padded(), st.integers(1, 3))
def test_whitened_advantages_have_mean_0_and_deviation_1_over_the_tokens_alone(drawn, more):
    """Further columns of padding change nothing, and padding stays zero."""
    advantages, mask = drawn
    kept = advantages[mask]
    if mask.sum() < 2 or kept.std() < 1e-3:
        return
    white = whiten(advantages, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].std().item() == pytest.approx(1, abs=1e-4)
    wider = torch.nn.functional.pad
    torch.testing.assert_close(whiten(wider(advantages, (0, more)), wider(mask, (0, more))),
                               wider(white, (0, more)))
    assert (white[~mask] == 0).all()


@for_all
@given(vectors(5), vectors(5), vectors(5), st.floats(0.05, 0.5))
def test_clipped_loss_is_the_smaller_of_two_objectives_written_out(logps, old, advantages, clip):
    """The smaller one is a lower bound of the objective without a clip, in either direction."""
    expected = []
    for new, before, advantage in zip(logps.tolist(), old.tolist(), advantages.tolist()):
        ratio = math.exp(new - before)
        clipped = min(max(ratio, 1 - clip), 1 + clip)
        expected.append(-min(ratio * advantage, clipped * advantage))
    torch.testing.assert_close(clipped_loss(logps, old, advantages, clip), float64(expected))


@for_all
@given(vectors(5), vectors(5))
def test_where_nothing_has_moved_the_gradient_is_that_of_reinforce(logps, advantages):
    """At ratio 1 the gradient of the loss is -A grad log pi. The old log-probs are constants: with
    a gradient of their own, the ratio would have none."""
    logps.requires_grad_()
    clipped_loss(logps, logps, advantages, 0.2).sum().backward()
    shared = logps.grad.clone()
    logps.grad = None
    clipped_loss(logps, logps.detach(), advantages, 0.2).sum().backward()
    torch.testing.assert_close(logps.grad, -advantages)
    assert shared.abs().max() == 0


def test_a_token_that_moved_far_enough_is_not_pushed_further_but_may_come_back():
    """Ratio 1.5, clip 0.2: no gradient where the advantage is positive, all of it where it is
    negative. And the mirror image at ratio 0.5."""
    logps = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0])
    clipped_loss(logps, torch.zeros(4), advantages, 0.2).sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([0.0, 1.5, 0.0, -0.5]))


@for_all
@given(vectors(4), vectors(4), vectors(4), st.floats(0.05, 0.5))
def test_clipped_value_loss_is_the_larger_of_two_errors_written_out(values, old, returns, clip):
    """So a value gains nothing by moving further than the clip from the old one."""
    expected = []
    for value, before, wanted in zip(values.tolist(), old.tolist(), returns.tolist()):
        clipped = min(max(value, before - clip), before + clip)
        expected.append(max((value - wanted) ** 2, (clipped - wanted) ** 2) / 2)
    torch.testing.assert_close(clipped_value_loss(values, old, returns, clip), float64(expected))


@for_all
@given(st.floats(0.01, 1), st.floats(0.1, 10), st.floats(0, 50), st.integers(1, 2000))
def test_beta_goes_up_when_the_kl_is_above_its_target_and_by_a_bounded_factor(beta, target, kl, n):
    fixed, adaptive = Penalty(beta, None, 10_000), Penalty(beta, target, 10_000)
    fixed.adapt(kl, n)
    adaptive.adapt(kl, n)
    assert fixed.beta == beta
    assert abs(adaptive.beta / beta - 1) <= 0.2 * n / 10_000 + 1e-12
    if abs(kl - target) > 1e-6 * target:
        assert (adaptive.beta > beta) == (kl > target)


# ------------------------------------------------------------------------------------------------
# The scalar head on packed rows
# ------------------------------------------------------------------------------------------------


@for_all
@given(encoded())
def test_a_reward_is_read_at_the_last_token_of_its_answer(items):
    batch = pack(items, 32)
    answers = [answer for item in items for answer in item.answers]
    assert batch.tokens.flatten()[batch.last].tolist() == [answer[-1] for answer in answers]


@for_all
@given(encoded())
def test_packed_rewards_are_those_of_one_row_a_sequence(items):
    """No answer's reward depends on its siblings or neighbours."""
    model = scalar_gpt()
    alone = []
    for item in items:
        for answer in item.answers:
            tokens = torch.tensor([item.prompt + answer])
            alone.append(model.scalar(model.hidden(tokens))[0, -1, 0])
    torch.testing.assert_close(model.rewards(pack(items, 32)), torch.stack(alone))


@for_all
@given(encoded())
def test_the_value_of_a_token_is_read_before_it(items):
    """The critic must not see the token whose outcome it predicts: the value is that of the prompt
    and the tokens before."""
    model = scalar_gpt()
    items = [Encoded(item.prompt, item.answers[:1], []) for item in items]
    values = by_token(model, model.values, items)
    for row, item in zip(values, items):
        n, answer = len(item.prompt), item.answers[0]
        hidden = model.hidden(torch.tensor([item.prompt + answer[:-1]]))
        expected = model.scalar(hidden)[0, n - 1:, 0]
        torch.testing.assert_close(row[:len(answer)], expected)


def test_a_reward_model_starts_with_reward_0_for_every_answer():
    """So its loss starts at log 2, whatever the SFT model it is made of."""
    model = ScalarGPT.from_gpt(gpt(seed=3))
    items = [Encoded([1, 2], [[3, EOT], [4, 5, EOT]], [(0, 1)])]
    batch = pack(items, 32)
    assert model.rewards(batch).tolist() == [0, 0]
    assert reward_loss(model.rewards(batch), batch.chosen, batch.rejected).item() == \
        pytest.approx(math.log(2))
    torch.testing.assert_close(model.wte.weight, gpt(seed=3).wte.weight.float())


@for_all
@given(encoded())
def test_numbers_of_tokens_stand_in_the_row_of_their_answer_in_its_order(items):
    """With the tokens themselves for numbers, the rows are the answers."""
    items = [Encoded(item.prompt, item.answers[:1], []) for item in items]
    rows = by_token(gpt(), lambda batch: batch.target + 1.0, items)
    for row, item in zip(rows.tolist(), items):
        answer = [token + 1 for token in item.answers[0]]
        assert row == answer + [0] * (len(row) - len(answer))


# ------------------------------------------------------------------------------------------------
# A rollout and an update
# ------------------------------------------------------------------------------------------------


def flags(tmp_path, module=ppo, **changes):
    args = module.parse_args(["--reward", "ground_truth"] if module is ppo else [])
    args.out, args.row_length = tmp_path, 32
    for name, value in changes.items():
        assert hasattr(args, name), name
        setattr(args, name, value)
    return args


def zero_scores(items):
    return [0.0] * len(items)


def roll(args, n=64, score_answers=zero_scores, policy=None, step=0):
    policy = policy or gpt()
    prompts = [[1 + i % 7, 2][:1 + i % 2] for i in range(n)]
    return ppo.rollout(policy, scalar_gpt(1), gpt(seed=2), prompts, score_answers, EOT, step, args)


def test_the_kl_over_an_answers_tokens_is_its_sequence_log_ratio(tmp_path):
    args = flags(tmp_path, max_new_tokens=6)
    rolled = roll(args)
    pi, ref = (torch.tensor(logps_of(model, rolled.items, 32)).flatten()
               for model in (gpt(), gpt(seed=2)))
    torch.testing.assert_close(rolled.kl().double(), (pi - ref).double(), atol=1e-4, rtol=1e-4)
    assert rolled.kl().abs().max() > 0.1


def test_end_of_text_is_scored_and_padding_is_not(tmp_path):
    """Every token of an answer has a log-prob below 0, end-of-text included."""
    rolled = roll(flags(tmp_path, max_new_tokens=6))
    lengths = [len(item.answers[0]) for item in rolled.items]
    assert rolled.mask.sum(1).tolist() == lengths and min(lengths) < max(lengths)
    assert any(item.answers[0][-1] == EOT for item in rolled.items)
    assert ((rolled.logps < 0) == rolled.mask).all()
    for numbers in (rolled.ref_logps, rolled.values):
        assert (numbers[~rolled.mask] == 0).all() and (numbers[rolled.mask] != 0).all()


def test_an_unfinished_answer_has_the_stated_reward_and_a_finished_one_its_own(tmp_path):
    rolled = roll(flags(tmp_path, max_new_tokens=3),
                  score_answers=lambda items: [float(i) for i in range(len(items))])
    finished = [item.answers[0][-1] == EOT for item in rolled.items]
    assert True in finished and False in finished
    assert rolled.scores.tolist() == [i if ended else UNFINISHED
                                      for i, ended in enumerate(finished)]


def test_the_log_probs_noted_are_those_of_the_distribution_that_was_sampled(tmp_path):
    """4,096 answers to one prompt: each first token is as frequent as its log-prob says, within
    five standard errors. A sampling temperature that the log-probs do not have would show."""
    policy = gpt(vocabulary=5)
    args = flags(tmp_path, max_new_tokens=1)
    n = 4096
    rolled = ppo.rollout(policy, ScalarGPT.from_gpt(policy), policy, [[1]] * n, zero_scores, EOT, 0,
                         args)
    first = torch.tensor([item.answers[0][0] for item in rolled.items])
    for token in range(5):
        p = rolled.logps[first == token, 0].exp().mean().item()
        share = (first == token).double().mean().item()
        assert share == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))


def test_what_a_rollout_notes_is_constant(tmp_path):
    """Nothing of it has a gradient: the policy's loss must not train the critic through the
    advantages, nor the log-probs that the ratio is divided by."""
    rolled = roll(flags(tmp_path, max_new_tokens=6))
    for numbers in (rolled.logps, rolled.ref_logps, rolled.values, rolled.scores):
        assert not numbers.requires_grad


def test_every_step_samples_other_answers_and_the_same_in_another_run(tmp_path):
    args = flags(tmp_path, max_new_tokens=6)
    first, again, next_step = (roll(args, step=step).items for step in (0, 0, 1))
    assert first == again and first != next_step


def test_sampling_and_updating_leave_the_random_numbers_of_training_alone(tmp_path):
    args, before = flags(tmp_path, max_new_tokens=4), torch.get_rng_state()
    policy, critic = gpt(), scalar_gpt(1)
    before = torch.get_rng_state()
    rolled = ppo.rollout(policy, critic, policy, [[1]] * 8, zero_scores, EOT, 0, args)
    ppo.improve(Learner(policy, 1e-3, 0), Learner(critic, 1e-3, 0), rolled,
                *ppo.advantages_and_returns(rolled, 0.1), 0, Noted(), args)
    assert torch.equal(torch.get_rng_state(), before)


class Noted:
    """A log that keeps what it is told."""

    def __init__(self):
        self.added = []

    def add(self, count, **sums):
        self.added.append({name: float(value) / count for name, value in sums.items()})

    def note_update(self, step, grad_norm, lr):
        pass


def test_returns_have_the_scale_of_the_rewards_and_advantages_are_whitened_after_that(tmp_path):
    """The return of a token is its unwhitened advantage plus its value."""
    rolled = roll(flags(tmp_path, max_new_tokens=6),
                  score_answers=lambda items: [100.0] * len(items))
    advantages, returns = ppo.advantages_and_returns(rolled, 0.1)
    rewards = token_rewards(rolled.logps, rolled.ref_logps, rolled.scores, rolled.mask, 0.1)
    raw = gae(rewards, rolled.values, GAMMA, LAMBDA)
    torch.testing.assert_close(returns, raw + rolled.values)
    torch.testing.assert_close(advantages, whiten(raw, rolled.mask))
    assert returns.max() > 50 and advantages.abs().max() < 20


def test_on_the_first_minibatch_every_ratio_is_1_and_nothing_is_clipped(tmp_path):
    """The log-probs of the update are computed as those of the rollout were. Later minibatches of
    this large a learning rate are clipped."""
    args = flags(tmp_path, max_new_tokens=6, minibatch=16, warmup=1)
    policy, critic, log = gpt(), scalar_gpt(1), Noted()
    seen = []
    original = ppo.clipped_loss

    def noting(logps, old_logps, advantages, clip):
        seen.append((logps.detach() - old_logps).abs().max().item())
        return original(logps, old_logps, advantages, clip)
    rolled = roll(args, policy=policy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "clipped_loss", noting)
        ppo.improve(Learner(policy, 0.1, 0), Learner(critic, 1e-3, 0), rolled,
                    *ppo.advantages_and_returns(rolled, 0.1), 0, log, args)
    assert len(seen) == 4 * 4       # four passes over 64 answers in minibatches of 16
    assert seen[0] < 1e-5 and seen[1] > 1e-3
    assert log.added[0]["clipped"] == 0 and log.added[-1]["clipped"] > 0


def test_an_update_raises_the_better_answer_and_the_policys_loss_never_moves_the_critic(tmp_path):
    """One answer was better than the others and than expected. After a step its log-prob is higher.
    The critic, at a learning rate of 0, is the same as before."""
    policy, critic, args = gpt(), scalar_gpt(1), flags(tmp_path, max_new_tokens=6, warmup=1)
    rolled = roll(args, policy=policy, n=8)
    rolled.scores, rolled.values = torch.tensor([1.0] + [0.0] * 7), torch.zeros_like(rolled.values)
    before, critic_before = rolled.logps.sum(1)[0], copy.deepcopy(critic.state_dict())
    ppo.improve(Learner(policy, 1e-3, 0), Learner(critic, 0.0, 0), rolled,
                *ppo.advantages_and_returns(rolled, 0.0), 0, Noted(), args)
    assert logps_of(policy, rolled.items[:1], 32)[0][0] > before
    assert all(torch.equal(weight, critic_before[name])
               for name, weight in critic.state_dict().items())


def test_clipped_is_the_share_of_tokens_without_gradient(tmp_path, monkeypatch):
    """A token beyond the clip in the direction of its advantage has none; on the other side it has.
    The log-probs of the rollout are moved, so that half of the ratios are 1.5 and half 0.5."""
    policy, log = gpt(), Noted()
    args = flags(tmp_path, max_new_tokens=6, minibatch=64)
    rolled = roll(args, policy=policy)
    up = torch.rand(rolled.logps.shape) < 0.5
    rolled.logps = rolled.logps - torch.where(up, 1.5, 0.5).log()
    advantages, returns = ppo.advantages_and_returns(rolled, 0.1)
    monkeypatch.setattr(ppo, "PASSES", 1)
    ppo.improve(Learner(policy, 1e-3, 0), Learner(scalar_gpt(1), 1e-3, 0), rolled, advantages,
                returns, 0, log, args)
    without = (up == (advantages > 0))[rolled.mask].double().mean()
    assert log.added[0]["clipped"] == pytest.approx(without.item())


def test_parts_of_a_minibatch_change_nothing_but_memory(tmp_path):
    """The mean is over the tokens of the whole minibatch, however it is cut."""
    weights = []
    for accumulate in (1, 3):
        policy, critic = gpt(), scalar_gpt(1)
        args = flags(tmp_path, max_new_tokens=6, warmup=1, accumulate=accumulate)
        rolled = roll(args, policy=policy)
        ppo.improve(Learner(policy, 1e-2, 0), Learner(critic, 1e-2, 0), rolled,
                    *ppo.advantages_and_returns(rolled, 0.1), 0, Noted(), args)
        weights.append([*policy.parameters(), *critic.parameters()])
    for whole, parts in zip(*weights):
        torch.testing.assert_close(whole, parts, atol=1e-9, rtol=1e-7)


# ------------------------------------------------------------------------------------------------
# To the known optimum
# ------------------------------------------------------------------------------------------------


def test_ppo_comes_to_the_optimal_policy_of_equation_15(tmp_path):
    """Answers of at most two of three tokens: 1 + 2 finished ones and 4 that do not end, whose
    reward is UNFINISHED. With exact rewards PPO has to end near pi* = pi_ref exp(r / beta) / Z,
    from which the reference is far, as DPO does with exact preferences."""
    policy, beta = gpt(vocabulary=3, block_size=4), 0.5
    reference = copy.deepcopy(policy)
    finished = {(EOT,): 0.5, (1, EOT): -0.5, (2, EOT): 1.0}
    answers = [*finished, *itertools.product([1, 2], repeat=2)]
    rewards = float64([finished.get(answer, UNFINISHED) for answer in answers])
    every_answer = [Encoded([1], [list(answer) for answer in answers], [])]

    def log_probs(model):
        return float64(logps_of(model, every_answer, 32)[0])
    best = optimal_policy(log_probs(reference), rewards, beta)
    args = flags(tmp_path, max_new_tokens=2, batch=128, minibatch=64, lr=1e-3, critic_lr=1e-2,
                 beta=beta, steps=60, log_every=1000)
    ppo.train(policy, reference, [[1]], lambda items: [finished.get(tuple(item.answers[0]), 0.0)
                                                       for item in items], EOT, args)

    def divergence(logps):
        return (logps.exp() * (logps - best)).sum().item()
    assert divergence(log_probs(reference)) > 0.3
    assert divergence(log_probs(policy)) < 0.02


# ------------------------------------------------------------------------------------------------
# The reward model: training and the command
# ------------------------------------------------------------------------------------------------


def pairs_by_a_rule(n):
    """n prompts with a chosen answer that contains token 7 and a rejected one that does not."""
    numbers = torch.randint(8, 20, (n, 6), generator=torch.Generator().manual_seed(1)).tolist()
    return [Encoded(draw[:2], [[draw[2], 7, EOT], [*draw[3:], EOT]], [(0, 1)]) for draw in numbers]


def test_a_reward_model_learns_what_chosen_answers_have_in_common(tmp_path):
    args = flags(tmp_path, reward_model, lr=1e-2, warmup=1, batch=16, steps=30, eval_every=10)
    model, held_out = ScalarGPT.from_gpt(gpt()), pairs_by_a_rule(60)[40:]
    reward_model.train(model, pairs_by_a_rule(40), held_out, args)
    assert (reward_model.reward_margins(model, held_out, 32) > 0).all()


def test_the_weights_with_the_highest_accuracy_are_kept(tmp_path, monkeypatch):
    """The accuracies at steps 0, 2, 4, 5 and after the last are given; the best is at step 4. A run
    of four steps ends with just these weights, for a step does not depend on what is evaluated."""
    accuracies = iter([0.5, 0.6, 0.9, 0.7, 0.8])
    monkeypatch.setattr(reward_model, "accuracy_of", lambda model, held_out, args, log:
                        next(accuracies))
    monkeypatch.setattr(reward_model, "cosine", lambda step, n_steps: 1.0)
    args = flags(tmp_path, reward_model, lr=1e-2, warmup=1, batch=16, steps=6, eval_every=2)
    model, shorter = ScalarGPT.from_gpt(gpt()), ScalarGPT.from_gpt(gpt())
    assert reward_model.train(model, pairs_by_a_rule(40), pairs_by_a_rule(2), args) == 4
    args.steps = 4
    reward_model.train(shorter, pairs_by_a_rule(40), [], args)
    for weight, expected in zip(model.parameters(), shorter.parameters()):
        assert torch.equal(weight, expected)


@for_all
@given(encoded(most_answers=1))
def test_normalised_rewards_have_mean_0_and_deviation_1_and_the_same_order(items):
    model = scalar_gpt()

    def of():
        return torch.tensor(numbers_of(model, model.rewards, items, 32, "rewards"))[:, 0]
    before = of()
    if len(items) < 2 or before.std() < 1e-3:
        return
    normalise(model, items, 32)
    assert of().mean().item() == pytest.approx(0, abs=1e-4)
    assert of().std().item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(of().argsort(), before.argsort())


def test_a_reward_model_that_tells_no_answers_apart_is_refused():
    with pytest.raises(UserError, match="the same reward"):
        normalise(ScalarGPT.from_gpt(gpt()), pairs_by_a_rule(3), 32)


REWARD_MODEL = ["--batch", "8", "--eval-every", "2"]
PPO = ["--batch", "8", "--minibatch", "4", "--eval-prompts", "12"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a small run: an untrained sft.pt, a dpo.pt, preferences, and then the reward
    model and PPO."""
    out, tokenizer = tmp_path_factory.mktemp("run"), get_tokenizer("reviews")
    for seed, name in enumerate(["sft", "dpo"]):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(64, tokenizer.n_vocab, 1, 2, 16), 0.3)
        save_checkpoint(out / f"{name}.pt", model, tokenizer="reviews", source="reviews", beta=0.1)
    rows = [{"prompt": f"The {aspect} was", "ranking": [1, 0],
             "answers": [f" {bad}. A bad film.", f" {good}. A good film."]}
            for aspect in "plot music script ending story".split()
            for bad in ("dull", "weak", "poor", "awful") for good in ("good", "great", "lovely")]
    for i, row in enumerate(rows):
        row["prompt"] += " " * i        # so that every prompt is different
    (out / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward_model.main(command(out, *REWARD_MODEL))
    ppo.main(command(out, *PPO))
    return out


def command(out, *more):
    common = "--steps 4 --max-new-tokens 6 --device cpu --save-every 0 --log-every 1"
    return [*more, *common.split(), "--out", str(out)]


def test_both_stages_work_on_a_file_of_preferences(run, tmp_path):
    """Without a ground truth there is no correlation, and no reward in the table of PPO."""
    data = tmp_path / "pairs.jsonl"
    data.write_bytes((run / "preferences.jsonl").read_bytes())
    model, facts = load_checkpoint(run / "sft.pt")
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    save_checkpoint(tmp_path / "sft.pt", model, **facts | {"source": data.name, "digest": digest})
    reward_model.main(command(tmp_path, *REWARD_MODEL, "--data", str(data)))
    ppo.main(command(tmp_path, *PPO, "--data", str(data)))
    found = json.loads((tmp_path / "reward.json").read_text())
    assert found["correlation"] is None and 0 <= found["accuracy"] <= 1
    measures = json.loads((tmp_path / "ppo.json").read_text())["policies"]["ppo"]
    assert "kl" in measures and "reward" not in measures


def test_reward_json_has_both_accuracies_on_pairs_that_chose_nothing(run):
    found = json.loads((run / "reward.json").read_text())
    for measures in (found, found["implicit_reward"]):
        assert 0 <= measures["accuracy"] <= 1 and measures["accuracy_se"] >= 0
    assert -1 <= found["correlation"] <= 1 and 0 <= found["epoch"] <= 4 * 8 / 40
    header = (run / "reward_metrics.csv").read_text().splitlines()[0]
    assert header == "step," + ",".join(reward_model.COLUMNS)


def test_ppo_json_has_the_form_of_results_json(run):
    found = json.loads((run / "ppo.json").read_text())
    assert list(found["policies"]) == ["sft", "ppo"]
    assert found["policies"]["sft"]["kl"] == 0
    assert {"reward", "reward_se", "kl", "kl_se", "win_rate", "length"} <= \
        set(found["policies"]["ppo"])
    rows = (run / "ppo_metrics.csv").read_text().splitlines()
    assert rows[0] == "step," + ",".join(ppo.COLUMNS) and len(rows) == 5


def test_files_of_a_finished_run_are_checkpoints_and_no_state_is_left(run):
    assert isinstance(load_checkpoint(run / "ppo.pt")[0], GPT)
    assert isinstance(load_checkpoint(run / "reward.pt", kind=ScalarGPT)[0], ScalarGPT)
    assert not list(run.glob("*_state.pt"))


@for_all
@given(encoded())
def test_the_pairs_that_choose_the_weights_share_no_prompt_with_those_that_are_reported(items):
    choosing, reporting = reward_model.halves(items + items)
    prompts = [{tuple(item.prompt) for item in half} for half in (choosing, reporting)]
    assert not prompts[0] & prompts[1] and abs(len(prompts[0]) - len(prompts[1])) <= 1
    assert len(choosing) + len(reporting) == 2 * len(items)


def test_a_reward_model_killed_after_its_last_step_is_finished_by_resuming(run, tmp_path,
                                                                           monkeypatch):
    """No step is left, but the last evaluation, its line in the log and the choice of the weights
    are."""
    for file in ("sft.pt", "preferences.jsonl"):
        (tmp_path / file).write_bytes((run / file).read_bytes())

    def deadly(*arguments):
        raise SystemExit(9)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(reward_model, "normalise", deadly)
        reward_model.main(command(tmp_path, *REWARD_MODEL))
    reward_model.main([*command(tmp_path, *REWARD_MODEL), "--resume"])
    for name in ("reward.pt", "reward_metrics.csv"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize("module, result, more", [
    (reward_model, "reward.pt", REWARD_MODEL), (ppo, "ppo.pt", [*PPO, "--target-kl", "0.01"])])
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bytes(run, tmp_path, module, result,
                                                                   more, monkeypatch):
    """Killed in an update of the third step. The best weights, the critic and the adaptive beta
    go on from where they were."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        for file in ("sft.pt", "preferences.jsonl", "reward.pt"):
            (tmp_path / name / file).write_bytes((run / file).read_bytes())
    module.main(command(tmp_path / "whole", *more))
    before, calls = module.update, itertools.count(1)
    steps = 2 if module is reward_model else 2 * 4 * 2 * 2      # passes, minibatches, models

    def deadly(*arguments):
        if next(calls) > steps:
            raise SystemExit(9)
        return before(*arguments)
    monkeypatch.setattr(module, "update", deadly)
    with pytest.raises(SystemExit):
        module.main(command(tmp_path / "killed", *more))
    monkeypatch.setattr(module, "update", before)
    (tmp_path / "killed" / result).unlink(missing_ok=True)
    module.main(command(tmp_path / "killed", *more, "--resume"))
    for name in (result, result.replace(".pt", "_metrics.csv")):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_of_ppo_is_not_resumed_with_other_settings(run, tmp_path, capsys, monkeypatch):
    """Neither with another reward, nor with longer answers, nor with another reward model."""
    for file in ("sft.pt", "preferences.jsonl", "reward.pt"):
        (tmp_path / file).write_bytes((run / file).read_bytes())

    def deadly(*arguments):
        raise SystemExit(9)
    monkeypatch.setattr(ppo, "update", deadly)
    with pytest.raises(SystemExit):
        ppo.main(command(tmp_path, *PPO))
    for changed in (["--reward", "ground_truth"], ["--max-new-tokens", "9"]):
        message = refused(ppo.main, [*command(tmp_path, *PPO), *changed, "--resume"], capsys)
        assert changed[0] in message and "cannot resume" in message
    model, facts = load_checkpoint(tmp_path / "reward.pt", kind=ScalarGPT)
    torch.nn.init.normal_(model.scalar.weight)
    save_checkpoint(tmp_path / "reward.pt", model, **facts)
    message = refused(ppo.main, [*command(tmp_path, *PPO), "--resume"], capsys)
    assert "the reward model changed" in message


def refused(main, argv, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in argv])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.count("\n") == 1, message
    return message


def test_what_ppo_cannot_do_is_one_sentence(run, tmp_path, capsys):
    (tmp_path / "sft.pt").write_bytes((run / "sft.pt").read_bytes())
    (tmp_path / "preferences.jsonl").write_bytes((run / "preferences.jsonl").read_bytes())
    assert "reward.pt" in refused(ppo.main, command(tmp_path), capsys)
    assert "only reviews and imdb" in refused(
        ppo.main, ["--data", tmp_path / "preferences.jsonl", "--reward", "ground_truth"], capsys)
    (tmp_path / "reward.pt").write_bytes((run / "sft.pt").read_bytes())
    assert "reward.pt" in refused(ppo.main, command(tmp_path), capsys)


def test_a_reward_model_without_an_sft_model_says_what_is_missing(tmp_path, capsys):
    assert "sft.pt" in refused(reward_model.main, ["--out", tmp_path], capsys)


@pytest.mark.parametrize("argv, words", [
    (["--batch", "10", "--minibatch", "4"], "not a multiple of --minibatch 4"),
    (["--target-kl", "1", "--beta", "0"], "a --beta above 0"),
    (["--target-kl", "1", "--horizon", "50"], "a --horizon above a fifth")])
def test_flags_that_cannot_work_together_are_refused(argv, words, capsys):
    """With 256 answers per step and a horizon of 50, a KL of 0 would make beta negative: 1 - 0.2 *
    256 / 50."""
    assert words in refused(ppo.main, argv, capsys)


def test_ppo_saves_the_beta_that_it_ended_with(run, tmp_path):
    """Under --target-kl that is not the one it started with."""
    for file in ("sft.pt", "preferences.jsonl", "reward.pt"):
        (tmp_path / file).write_bytes((run / file).read_bytes())
    ppo.main(command(tmp_path, *PPO, "--target-kl", "0.01", "--row-length", "48"))
    beta = load_checkpoint(tmp_path / "ppo.pt")[1]["beta"]
    assert beta != 0.2 and beta == json.loads((tmp_path / "ppo.json").read_text())["beta"]


def test_the_trl_preset_has_the_settings_of_trl_0_8():
    args = ppo.parse_args(["--preset", "trl", "--lr", "1e-6"])
    assert (args.batch, args.beta, args.target_kl, args.horizon) == (128, 0.2, 6, 10_000)
    assert args.lr == 1e-6          # a flag goes before a preset
    assert (ppo.PASSES, RATIO_CLIP, GAMMA, LAMBDA) == (4, 0.2, 1.0, 0.95)
