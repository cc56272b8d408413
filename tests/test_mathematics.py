"""The mathematics of DPO, claim by claim: the appendix of the paper against train_dpo.py.

    pytest tests/test_mathematics.py

The tests follow the paper (Rafailov et al., 2023, appendices A.1-A.6, B, C.3), then its errata,
then training to the known optimum, then extreme numbers. Claims about all rewards, policies and
beta are properties: hypothesis draws the numbers, the same ones in every run. Expected values are
written out here with exp, sums and loops over permutations.

Left out on purpose: where log pi(y|x) comes from. A policy here is a short list of log-probs, one
for each possible answer; only one test computes them with a Transformer.
"""

import math
from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from model import GPT, GPTConfig
from train_dpo import (
    bradley_terry,
    dpo_gradient,
    dpo_loss,
    implicit_reward,
    log_partition,
    optimal_policy,
    plackett_luce,
    plackett_luce_loss,
    unlikelihood_loss,
)

for_all = settings(deadline=None, max_examples=40, derandomize=True)


# ------------------------------------------------------------------------------------------------
# What hypothesis draws
# ------------------------------------------------------------------------------------------------


def float64(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def vectors(n, low=-5.0, high=5.0):
    return st.lists(st.floats(low, high), min_size=n, max_size=n).map(float64)


def policies(n):
    """log pi(y|x) of all n possible answers, (n,); their exp sums to 1."""
    return vectors(n).map(lambda logits: logits.log_softmax(-1))


betas = st.floats(0.05, 5.0)
shifts = st.floats(-50.0, 50.0)                 # f(x): the same number for all answers to x


@st.composite
def prompts(draw):
    """A prompt with N = 2 to 6 possible answers: log pi, log pi_ref and rewards, each (N,)."""
    n = draw(st.integers(2, 6))
    return draw(policies(n)), draw(policies(n)), draw(vectors(n))


@st.composite
def rankings(draw, n):
    """A ranking of K = 2 to n of n answers, best first, (K,)."""
    return torch.tensor(draw(st.permutations(range(n)))[:draw(st.integers(2, n))])


@st.composite
def ranked_rewards(draw):
    """Rewards of N = 2 to 5 answers, (N,), and a ranking of K <= N of them, (K,)."""
    n = draw(st.integers(2, 5))
    return draw(vectors(n)), draw(rankings(n))


@st.composite
def ranked_answers(draw):
    """Log-probs of N = 2 to 5 answers, policy and reference, each (N,), and G rankings, (G, N)."""
    n = draw(st.integers(2, 5))
    orders = draw(st.lists(st.permutations(range(n)), min_size=1, max_size=4))
    return draw(vectors(n, -60, 0)), draw(vectors(n, -60, 0)), torch.tensor(orders)


@st.composite
def paired_answers(draw):
    """Log-probs of N = 2 to 5 answers under policy and reference, each (N,), and indices of the
    chosen and rejected answers of P pairs, each (P,). An answer may be in many pairs, and be
    chosen in some and rejected in others."""
    n = draw(st.integers(2, 5))
    pair = st.sampled_from(list(permutations(range(n), 2)))
    pairs = torch.tensor(draw(st.lists(pair, min_size=1, max_size=8)))
    return draw(vectors(n, -60, 0)), draw(vectors(n, -60, 0)), pairs[:, 0], pairs[:, 1]


# ------------------------------------------------------------------------------------------------
# The paper's formulas, written out
# ------------------------------------------------------------------------------------------------


def sigma(z):
    return 1 / (1 + math.exp(-z))


def kl(p, q):
    """KL(p || q) = sum_y p(y) log(p(y) / q(y)), from log-probs."""
    return sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist()))


def objective(pi, ref, rewards, beta):
    """Eq. 11: J(pi) = E_pi[r] - beta KL(pi || pi_ref)."""
    expected_reward = sum(math.exp(a) * r for a, r in zip(pi.tolist(), rewards.tolist()))
    return expected_reward - beta * kl(pi, ref)


def partition_by_hand(ref, rewards, beta):
    """A.1: Z = sum_y pi_ref(y) exp(r(y) / beta)."""
    return sum(math.exp(q) * math.exp(r / beta) for q, r in zip(ref.tolist(), rewards.tolist()))


def plackett_luce_by_hand(rewards, ranking):
    """Eq. 18: prod_k exp(r_tau(k)) / sum_{j >= k} exp(r_tau(j))."""
    e = [math.exp(rewards[i]) for i in ranking]
    return math.prod(e[k] / sum(e[k:]) for k in range(len(e)))


def project(rewards, ref, beta):
    """Theorem 1: f(r, pi_ref, beta) = r - beta log Z."""
    return rewards - beta * log_partition(ref, rewards, beta)


def same(got, expected, tolerance=1e-9):
    """Assert equality up to float64 rounding, shape included."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, msg=lambda text: (
        text if "not close" not in text else f"expected {expected.tolist()}, got {got.tolist()}"))


def gradient(loss, logps, *arguments):
    """d(sum of losses) / d logps by autograd; loss returns the losses, or (losses, rewards)."""
    logps = logps.clone().requires_grad_()
    losses = loss(logps, *arguments)
    losses = losses[0] if isinstance(losses, tuple) else losses
    return torch.autograd.grad(losses.sum(), logps)[0]


# ------------------------------------------------------------------------------------------------
# A.1: the optimum of E[r] - beta KL, Eq. 11-15
# ------------------------------------------------------------------------------------------------


def test_partition_and_optimal_policy_of_two_answers_worked_out_on_paper():
    """Z = sum_y pi_ref exp(r / beta) and pi* = pi_ref exp(r / beta) / Z, in the smallest case."""
    # beta = 1/2 and r = (0, log(3)/2) give exp(r / beta) = (1, 3). With pi_ref = (1/2, 1/2):
    # Z = 1/2 + 3/2 = 2, and pi* = (1/4, 3/4).
    ref, rewards = float64([0.5, 0.5]).log(), float64([0.0, math.log(3) / 2])
    same(log_partition(ref, rewards, 0.5), math.log(2))
    same(optimal_policy(ref, rewards, 0.5).exp(), [0.25, 0.75])


@for_all
@given(prompt=prompts(), beta=betas)
def test_partition_is_the_sum_over_all_answers(prompt, beta):
    """A.1: Z = sum_y pi_ref(y) exp(r(y) / beta). The reward is divided by beta."""
    _, ref, rewards = prompt
    same(log_partition(ref, rewards, beta), math.log(partition_by_hand(ref, rewards, beta)))


@for_all
@given(prompt=prompts(), beta=betas)
def test_optimal_policy_is_equation_15_written_out(prompt, beta):
    """Eq. 15: pi*(y) = pi_ref(y) exp(r(y) / beta) / Z."""
    _, ref, rewards = prompt
    z = partition_by_hand(ref, rewards, beta)
    expected = [math.exp(q) * math.exp(r / beta) / z
                for q, r in zip(ref.tolist(), rewards.tolist())]
    same(optimal_policy(ref, rewards, beta), float64(expected).log())


@for_all
@given(prompt=prompts(), beta=betas)
def test_optimal_policy_is_a_distribution(prompt, beta):
    """sum_y pi*(y) = 1: without Z it would be a score, not a policy."""
    _, ref, rewards = prompt
    same(optimal_policy(ref, rewards, beta).exp().sum(), 1.0)


@for_all
@given(prompt=prompts(), other=prompts(), beta=betas)
def test_every_prompt_has_its_own_partition(prompt, other, beta):
    """Z(x) and pi*(.|x) of two prompts in one call are those of each prompt alone."""
    n = min(prompt[1].numel(), other[1].numel())
    refs = torch.stack([prompt[1][:n], other[1][:n]])                   # (2, n)
    rewards = torch.stack([prompt[2][:n], other[2][:n]])                # (2, n)
    log_z, best = log_partition(refs, rewards, beta), optimal_policy(refs, rewards, beta)
    for x in range(2):
        same(log_z[x], log_partition(refs[x], rewards[x], beta))
        same(best[x], optimal_policy(refs[x], rewards[x], beta))


@for_all
@given(prompt=prompts(), beta=betas)
def test_no_policy_scores_higher_than_the_optimal_one(prompt, beta):
    """J(pi) <= J(pi*): Eq. 15 really is the maximum of Eq. 11."""
    pi, ref, rewards = prompt
    best = optimal_policy(ref, rewards, beta)
    assert objective(pi, ref, rewards, beta) <= objective(best, ref, rewards, beta) + 1e-9


@for_all
@given(prompt=prompts(), direction=vectors(6), beta=betas)
def test_a_small_step_away_from_the_optimum_loses(prompt, direction, beta):
    """J is lower near pi*, too: a harder test than random policies, which are far from pi*."""
    _, ref, rewards = prompt
    best = optimal_policy(ref, rewards, beta)
    near = (best + 0.01 * direction[:best.numel()]).log_softmax(-1)
    assert objective(near, ref, rewards, beta) <= objective(best, ref, rewards, beta) + 1e-12


@for_all
@given(prompt=prompts(), beta=betas)
def test_what_a_policy_loses_is_beta_times_its_divergence_from_the_optimum(prompt, beta):
    """Eq. 13: J(pi) = beta log Z - beta KL(pi || pi*), so pi* is the only optimum."""
    pi, ref, rewards = prompt
    best, log_z = optimal_policy(ref, rewards, beta), log_partition(ref, rewards, beta).item()
    assert objective(pi, ref, rewards, beta) == pytest.approx(beta * (log_z - kl(pi, best)))


@for_all
@given(prompt=prompts(), beta=betas)
def test_the_optimum_is_worth_beta_log_partition(prompt, beta):
    """J(pi*) = beta log Z, since KL(pi* || pi*) = 0."""
    _, ref, rewards = prompt
    value = objective(optimal_policy(ref, rewards, beta), ref, rewards, beta)
    assert value == pytest.approx(beta * log_partition(ref, rewards, beta).item(), abs=1e-9)


@for_all
@given(prompt=prompts(), beta=betas, factor=st.floats(1.0, 10.0))
def test_larger_beta_keeps_the_optimal_policy_closer_to_the_reference(prompt, beta, factor):
    """KL(pi*_beta || pi_ref) falls as beta grows; this is often explained backwards."""
    _, ref, rewards = prompt
    near = kl(optimal_policy(ref, rewards, factor * beta), ref)
    far = kl(optimal_policy(ref, rewards, beta), ref)
    assert near <= far + 1e-9


def test_beta_runs_from_the_best_answer_alone_to_the_reference():
    """As beta -> 0, all mass is on the highest reward; as beta -> infinity, pi* is pi_ref."""
    ref, rewards = float64([0.7, 0.2, 0.1]).log(), float64([0.0, 1.0, 2.0])
    same(optimal_policy(ref, rewards, 1e-3).exp(), [0.0, 0.0, 1.0])
    same(optimal_policy(ref, rewards, 1e9).exp(), [0.7, 0.2, 0.1], tolerance=1e-8)
    divergences = [kl(optimal_policy(ref, rewards, beta), ref) for beta in (0.1, 0.5, 1.0, 5.0)]
    assert divergences[0] > divergences[1] > divergences[2] > divergences[3] > 0


# ------------------------------------------------------------------------------------------------
# A.2: Bradley-Terry, Eq. 16-17
# ------------------------------------------------------------------------------------------------


def test_bradley_terry_of_rewards_log_three_and_zero_is_three_quarters():
    """Eq. 16: exp(r_w) / (exp(r_w) + exp(r_l)) = 3 / (3 + 1)."""
    same(bradley_terry(float64(math.log(3)), float64(0.0)).exp(), 0.75)


@for_all
@given(r=vectors(2))
def test_bradley_terry_is_equation_16_written_out(r):
    """Eq. 16: log p(y_1 > y_2) = log(exp(r_1) / (exp(r_1) + exp(r_2)))."""
    e1, e2 = math.exp(r[0]), math.exp(r[1])
    same(bradley_terry(r[0], r[1]), math.log(e1 / (e1 + e2)))


@for_all
@given(r=vectors(2))
def test_one_of_two_answers_is_preferred(r):
    """p(y_1 > y_2) + p(y_2 > y_1) = 1: the model has no ties."""
    same(bradley_terry(r[0], r[1]).exp() + bradley_terry(r[1], r[0]).exp(), 1.0)


@for_all
@given(prompt=prompts(), beta=betas)
def test_reward_is_the_log_ratio_of_its_optimal_policy_plus_beta_log_partition(prompt, beta):
    """Eq. 17: r = beta log(pi* / pi_ref) + beta log Z, which turns a policy into a reward."""
    _, ref, rewards = prompt
    best = optimal_policy(ref, rewards, beta)
    rhat = implicit_reward(best, ref, beta)
    same(rhat + beta * log_partition(ref, rewards, beta), rewards)


@for_all
@given(prompt=prompts(), beta=betas)
def test_the_partition_cancels_in_every_preference(prompt, beta):
    """Eq. 17 in Eq. 16: the DPO loss at pi* is -log p*(y_w > y_l) of the true reward."""
    _, ref, rewards = prompt
    pairs = torch.tensor(list(permutations(range(rewards.numel()), 2)))
    chosen, rejected = pairs[:, 0], pairs[:, 1]
    losses, _ = dpo_loss(optimal_policy(ref, rewards, beta), ref, chosen, rejected, beta)
    expected = [-math.log(plackett_luce_by_hand(rewards, pair)) for pair in pairs.tolist()]
    same(losses, expected)


# ------------------------------------------------------------------------------------------------
# A.3: Plackett-Luce, Eq. 18-20
# ------------------------------------------------------------------------------------------------


def test_plackett_luce_of_three_answers_worked_out_on_paper():
    """Eq. 18 with exp(r) = 1, 2, 3: each answer is drawn from those that are left, best first."""
    rewards = float64([1.0, 2.0, 3.0]).log()
    # Answer 2, then 1, then 0: 3/(3+2+1) * 2/(2+1) * 1/1 = 1/3.
    same(plackett_luce(rewards, torch.tensor([2, 1, 0])).exp(), 1 / 3)
    # Answer 0, then 1, then 2: 1/(1+2+3) * 2/(2+3) * 3/3 = 1/15.
    same(plackett_luce(rewards, torch.tensor([0, 1, 2])).exp(), 1 / 15)


@for_all
@given(ranked=ranked_rewards())
def test_plackett_luce_is_equation_18_written_out(ranked):
    """Eq. 18: prod_k exp(r_tau(k)) / sum_{j >= k} exp(r_tau(j)), for any K and ranking."""
    rewards, ranking = ranked
    same(plackett_luce(rewards, ranking), math.log(plackett_luce_by_hand(rewards, ranking)))


@for_all
@given(r=vectors(2))
def test_plackett_luce_with_two_answers_is_bradley_terry(r):
    """Eq. 18 at K = 2 is Eq. 16, so DPO on pairs is a special case of DPO on rankings."""
    same(plackett_luce(r, torch.tensor([0, 1])), bradley_terry(r[0], r[1]))
    same(plackett_luce(r, torch.tensor([1, 0])), bradley_terry(r[1], r[0]))


@for_all
@given(n=st.integers(1, 5), rewards=vectors(5))
def test_plackett_luce_sums_to_one_over_all_rankings(n, rewards):
    """sum_tau p(tau) = 1 over all K! rankings: it is a distribution."""
    every_ranking = torch.tensor(list(permutations(range(n))))          # (n!, n)
    probabilities = plackett_luce(rewards[:n], every_ranking).exp()
    assert probabilities.shape == (math.factorial(n),)
    same(probabilities.sum(), 1.0)


@for_all
@given(ranked=ranked_rewards())
def test_leaving_answers_out_of_a_ranking_keeps_the_odds_of_the_rest(ranked):
    """The probability of a short ranking is the sum over all full rankings that agree with it, so
    pairs or shorter rankings may be used in place of full ones, under the same model."""
    rewards, short = ranked
    short = short.tolist()
    total = sum(plackett_luce_by_hand(rewards, full) for full in permutations(range(len(rewards)))
                if [i for i in full if i in short] == short)
    same(plackett_luce(rewards, torch.tensor(short)).exp(), total)


@for_all
@given(ranked=ranked_rewards(), padding=st.integers(1, 3))
def test_a_ranking_padded_with_minus_one_is_the_shorter_ranking(ranked, padding):
    """-1 adds nothing to value or gradient, so rankings of different lengths can share a tensor."""
    rewards, ranking = ranked
    padded = torch.cat([ranking, torch.full((padding,), -1)])
    same(plackett_luce(rewards, padded), plackett_luce(rewards, ranking))
    got = gradient(plackett_luce, rewards, padded)
    assert got.isfinite().all()
    same(got, gradient(plackett_luce, rewards, ranking))


@pytest.mark.parametrize("ranking", [[2, -1, -1], [-1, -1, -1]])
def test_a_ranking_of_one_answer_or_none_says_nothing(ranking):
    """With nothing to choose between, p = 1 and the gradient is 0; 0 * inf would make it NaN."""
    rewards = float64([1.0, -2.0, 3.0])
    same(plackett_luce(rewards, torch.tensor(ranking)), 0.0)
    same(gradient(plackett_luce, rewards, torch.tensor(ranking)), [0.0, 0.0, 0.0])


def test_rankings_of_any_batch_shape_are_scored_one_by_one():
    """(..., K) rankings of mixed lengths give (...) log-probabilities."""
    rewards = float64([0.3, -1.0, 2.0])
    rankings = torch.tensor([[[0, 1, 2], [2, 1, 0]], [[1, 2, -1], [2, 0, -1]]])     # (2, 2, 3)
    expected = [[plackett_luce_by_hand(rewards, order) for order in row]
                for row in ([[0, 1, 2], [2, 1, 0]], [[1, 2], [2, 0]])]
    same(plackett_luce(rewards, rankings).exp(), expected)


@for_all
@given(ranked=ranked_answers(), beta=betas)
def test_ranking_loss_is_plackett_luce_of_the_implicit_rewards(ranked, beta):
    """Eq. 20: -log prod_k exp(rhat_tau(k)) / sum_{j >= k} exp(rhat_tau(j)), per ranking."""
    pi, ref, orders = ranked
    losses, rewards = plackett_luce_loss(pi, ref, orders, beta)
    rhat = [beta * (a - b) for a, b in zip(pi.tolist(), ref.tolist())]
    # -log of each factor is log sum_{j >= k} exp(rhat_j - rhat_k), which cannot underflow.
    expected = [sum(math.log(sum(math.exp(rhat[j] - rhat[order[k]]) for j in order[k:]))
                    for k in range(len(order))) for order in orders.tolist()]
    same(losses, expected)
    same(rewards, rhat)


def test_rewards_of_rankings_carry_no_gradient_and_losses_do():
    """The rewards are logged and must not keep the graph alive, let alone be trained on."""
    pi = float64([-1.0, -2.0, -3.0]).requires_grad_()
    losses, rewards = plackett_luce_loss(pi, float64([-1.5, -1.5, -1.5]),
                                         torch.tensor([[0, 2, 1]]), 0.1)
    assert losses.requires_grad and not rewards.requires_grad


@for_all
@given(paired=paired_answers(), beta=betas)
def test_ranking_loss_of_two_answers_is_the_dpo_loss(paired, beta):
    """Eq. 20 at K = 2: the same losses, rewards and gradient as Appendix B."""
    pi, ref, chosen, rejected = paired
    pairs = torch.stack([chosen, rejected], dim=1)                       # (P, 2), best first
    losses, rewards = plackett_luce_loss(pi, ref, pairs, beta)
    dpo_losses, dpo_rewards = dpo_loss(pi, ref, chosen, rejected, beta)
    same(losses, dpo_losses)
    same(rewards, dpo_rewards)
    same(gradient(plackett_luce_loss, pi, ref, pairs, beta),
         gradient(dpo_loss, pi, ref, chosen, rejected, beta))


@for_all
@given(prompt=prompts(), beta=betas)
def test_the_partition_cancels_in_every_ranking(prompt, beta):
    """Eq. 19: at pi*, the ranking loss is -log p*(tau) of the true reward, whatever Z is."""
    _, ref, rewards = prompt
    every_ranking = torch.tensor(list(permutations(range(min(4, rewards.numel())))))
    losses, _ = plackett_luce_loss(optimal_policy(ref, rewards, beta), ref, every_ranking, beta)
    expected = [-math.log(plackett_luce_by_hand(rewards, tau)) for tau in every_ranking.tolist()]
    same(losses, expected)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_ranking_loss_starts_at_log_of_the_number_of_rankings(k):
    """At pi = pi_ref all K! rankings are equally likely: the loss is log K!, every reward is 0."""
    logps = float64([-3.0, -80.0, -7.5, -0.1, -12.0])
    losses, rewards = plackett_luce_loss(logps, logps, torch.arange(k)[None], 0.1)
    same(losses, [math.log(math.factorial(k))])
    assert rewards.tolist() == [0.0] * 5


@for_all
@given(ranked=ranked_answers(), beta=betas)
def test_ranking_gradient_is_the_share_in_each_draw_minus_one(ranked, beta):
    """d(loss) / d log pi(y) = beta (the sum of y's shares in the draws it takes part in, minus 1).

    The loss is sum_k [log sum_{j >= k} exp(rhat_j) - rhat_k]. Differentiated by rhat_y, the first
    term gives y's softmax share among the answers left at draw k, and the second gives -1 once, at
    the draw that takes y.
    """
    pi, ref, orders = ranked
    rhat = [beta * (a - b) for a, b in zip(pi.tolist(), ref.tolist())]
    expected = [0.0] * len(rhat)
    for order in orders.tolist():
        for k, taken in enumerate(order):
            expected[taken] -= beta
            for y in order[k:]:
                expected[y] += beta / sum(math.exp(rhat[j] - rhat[y]) for j in order[k:])
    same(gradient(plackett_luce_loss, pi, ref, orders, beta), expected)


# ------------------------------------------------------------------------------------------------
# A.4: the gradient, Eq. 21-22
# ------------------------------------------------------------------------------------------------


@for_all
@given(paired=paired_answers(), beta=betas)
def test_closed_form_gradient_is_the_one_autograd_finds(paired, beta):
    """A.4: a pair adds -beta sigma(rhat_l - rhat_w) to its chosen answer, the opposite to the
    rejected one."""
    pi, ref, chosen, rejected = paired
    same(dpo_gradient(pi, ref, chosen, rejected, beta),
         gradient(dpo_loss, pi, ref, chosen, rejected, beta))


def test_closed_form_gradient_is_the_slope_of_the_loss():
    """Central differences, (L(pi + h) - L(pi - h)) / 2h per answer, need no derivative rule."""
    pi, ref = float64([-2.0, -3.5, -1.0]), float64([-2.5, -3.0, -1.5])
    chosen, rejected, beta, h = torch.tensor([0, 0, 2]), torch.tensor([1, 2, 1]), 0.7, 1e-5
    slopes = []
    for i in range(3):
        step = torch.zeros_like(pi)
        step[i] = h
        above = dpo_loss(pi + step, ref, chosen, rejected, beta)[0].sum()
        below = dpo_loss(pi - step, ref, chosen, rejected, beta)[0].sum()
        slopes.append((above - below).item() / (2 * h))
    same(dpo_gradient(pi, ref, chosen, rejected, beta), slopes, tolerance=1e-8)


def test_closed_form_gradient_is_the_one_autograd_finds_through_a_transformer():
    """Chain rule: backward from log pi(y|x) with A.4 equals backward from the loss, for every
    parameter of a GPT."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)).double()
    tokens = torch.randint(11, (4, 8))                                  # (B, T), 4 answers
    ref, beta = float64([-15.0, -16.0, -17.0, -18.0]), 0.5
    chosen, rejected = torch.tensor([0, 0, 2, 3]), torch.tensor([1, 2, 3, 1])

    def parameter_gradients(scalar_of):
        logits = gpt(tokens)[:, :-1].log_softmax(-1)                    # (B, T - 1, V)
        pi = logits.gather(-1, tokens[:, 1:, None]).sum(dim=(1, 2))     # (B,)
        return torch.autograd.grad(scalar_of(pi), list(gpt.parameters()))

    by_autograd = parameter_gradients(
        lambda pi: dpo_loss(pi, ref, chosen, rejected, beta)[0].sum())
    by_hand = parameter_gradients(
        lambda pi: (dpo_gradient(pi.detach(), ref, chosen, rejected, beta) * pi).sum())
    assert any(g.abs().max() > 1e-3 for g in by_autograd)
    for got, expected in zip(by_hand, by_autograd):
        same(got, expected, tolerance=1e-12)


def test_the_first_gradient_is_half_of_beta():
    """At pi = pi_ref the gradient is -beta/2 (grad log pi_w - grad log pi_l). It is not zero
    although the models are equal, and with a small beta it is small."""
    logps, chosen, rejected = float64([-3.0, -40.0]), torch.tensor([0]), torch.tensor([1])
    for beta in (0.1, 0.5):
        # sigma(0) = 1/2.
        same(dpo_gradient(logps, logps, chosen, rejected, beta), [-beta / 2, beta / 2])
        same(gradient(dpo_loss, logps, logps, chosen, rejected, beta), [-beta / 2, beta / 2])


def test_gradients_of_the_pairs_of_four_ranked_answers_add_up():
    """C.1 makes six pairs of four answers. Their gradients are added, not averaged."""
    logps = float64([-5.0, -6.0, -7.0, -8.0])
    pairs = torch.tensor(list(combinations(range(4), 2)))               # 0 beats all, 3 beats none
    # Wins minus losses are 3, 1, -1, -3, and each counts beta/2 = 1 at pi = pi_ref.
    same(dpo_gradient(logps, logps, pairs[:, 0], pairs[:, 1], 2.0), [-3.0, -1.0, 1.0, 3.0])
    same(gradient(dpo_loss, logps, logps, pairs[:, 0], pairs[:, 1], 2.0), [-3.0, -1.0, 1.0, 3.0])


def test_a_wrongly_ranked_pair_pulls_harder_than_a_rightly_ranked_one():
    """The weight sigma(rhat_l - rhat_w) is the model's error, so DPO comes to rest."""
    ref, chosen, rejected = float64([-5.0, -5.0]), torch.tensor([0]), torch.tensor([1])
    wrong = dpo_gradient(float64([-8.0, -5.0]), ref, chosen, rejected, 1.0)   # rhat_w - rhat_l = -3
    right = dpo_gradient(float64([-5.0, -8.0]), ref, chosen, rejected, 1.0)   # rhat_w - rhat_l = +3
    same(wrong, [-sigma(3), sigma(3)])                                      # 0.953
    same(right, [-sigma(-3), sigma(-3)])                                    # 0.047


@for_all
@given(paired=paired_answers(), beta=betas)
def test_gradient_moves_chosen_and_rejected_by_opposite_amounts(paired, beta):
    """The gradient sums to zero: the loss depends on differences, not on a level."""
    same(dpo_gradient(*paired, beta).sum(), 0.0)


# ------------------------------------------------------------------------------------------------
# A.5: Lemma 1 and Lemma 2
# ------------------------------------------------------------------------------------------------


@for_all
@given(ranked=ranked_rewards(), f=shifts)
def test_lemma_1_rewards_that_differ_by_a_function_of_the_prompt_rank_alike(ranked, f):
    """p_{r + f(x)}(tau) = p_r(tau) for any K, ranking and f; Bradley-Terry is the case K = 2."""
    rewards, ranking = ranked
    same(plackett_luce(rewards + f, ranking), plackett_luce(rewards, ranking))
    a, b = rewards[ranking[0]], rewards[ranking[1]]
    same(bradley_terry(a + f, b + f), bradley_terry(a, b))


@for_all
@given(pi=vectors(6, -60, 0), ref=vectors(6, -60, 0), f=vectors(2, -50, 50), beta=betas)
def test_lemma_1_loss_does_not_see_a_level_shared_by_the_answers_of_a_prompt(pi, ref, f, beta):
    """log pi + f(x) has the same losses and gradient as log pi, so the chosen log-prob may fall if
    the rejected one falls with it."""
    shifted = pi + f.repeat_interleave(3)               # two prompts, answers 0-2 and 3-5
    pairs = torch.tensor([[0, 1], [0, 2], [2, 1], [3, 4], [5, 3]])
    chosen, rejected = pairs[:, 0], pairs[:, 1]
    same(dpo_loss(shifted, ref, chosen, rejected, beta)[0],
         dpo_loss(pi, ref, chosen, rejected, beta)[0])
    same(dpo_gradient(shifted, ref, chosen, rejected, beta),
         dpo_gradient(pi, ref, chosen, rejected, beta))
    orders = torch.tensor([[1, 0, 2], [5, 3, 4]])
    same(plackett_luce_loss(shifted, ref, orders, beta)[0],
         plackett_luce_loss(pi, ref, orders, beta)[0])


@for_all
@given(prompt=prompts(), f=shifts, beta=betas)
def test_lemma_2_rewards_that_differ_by_a_function_of_the_prompt_have_one_optimum(prompt, f, beta):
    """pi*_{r + f(x)} = pi*_r: log Z grows by f / beta, which cancels f."""
    _, ref, rewards = prompt
    same(optimal_policy(ref, rewards + f, beta), optimal_policy(ref, rewards, beta))
    same(log_partition(ref, rewards + f, beta), log_partition(ref, rewards, beta) + f / beta)


# ------------------------------------------------------------------------------------------------
# A.6: Theorem 1 and Proposition 1
# ------------------------------------------------------------------------------------------------


@for_all
@given(prompt=prompts(), beta=betas)
def test_theorem_1_every_class_of_rewards_holds_one_that_is_a_log_ratio(prompt, beta):
    """r - beta log Z = beta log(pi* / pi_ref), which differs from r by a function of x alone."""
    _, ref, rewards = prompt
    projected = project(rewards, ref, beta)
    same(projected, implicit_reward(optimal_policy(ref, rewards, beta), ref, beta))
    same(rewards - projected, [beta * math.log(partition_by_hand(ref, rewards, beta))] * len(ref))


@for_all
@given(prompt=prompts(), beta=betas)
def test_theorem_1_projection_is_idempotent(prompt, beta):
    """f(f(r)) = f(r), since the projected reward has Z = 1."""
    _, ref, rewards = prompt
    projected = project(rewards, ref, beta)
    assert partition_by_hand(ref, projected, beta) == pytest.approx(1.0)
    same(project(projected, ref, beta), projected)


@for_all
@given(prompt=prompts(), f=shifts, beta=betas)
def test_theorem_1_projection_is_constant_on_a_class(prompt, f, beta):
    """r + f(x) has the same projection as r: each class of rewards has one representative."""
    _, ref, rewards = prompt
    same(project(rewards + f, ref, beta), project(rewards, ref, beta))


@for_all
@given(prompt=prompts(), beta=betas)
def test_theorem_1_a_policy_is_optimal_for_its_own_implicit_reward(prompt, beta):
    """The optimal policy for the reward beta log(pi / pi_ref) is pi: your language model is
    secretly a reward model."""
    pi, ref, _ = prompt
    same(optimal_policy(ref, implicit_reward(pi, ref, beta), beta), pi)


@for_all
@given(prompt=prompts(), f=shifts, beta=betas)
def test_proposition_1_a_shifted_log_ratio_is_a_log_ratio_only_for_f_zero(prompt, f, beta):
    """beta log(pi / pi_ref) + f(x) is the log ratio of pi exp(f / beta), which sums to
    exp(f / beta) and so is a distribution only for f = 0."""
    pi, ref, _ = prompt
    shifted = implicit_reward(pi, ref, beta) + f
    log_sum = log_partition(ref, shifted, beta)         # log sum_y pi_ref exp(r' / beta)
    same(log_sum, f / beta)                             # 0, a distribution, only for f = 0


@for_all
@given(pi=policies(4), other=policies(4), ref=policies(4), beta=betas)
def test_proposition_1_two_log_ratios_of_one_class_are_equal(pi, other, ref, beta):
    """rhat' - rhat = f(x) for all y implies f = 0: no policy is above another everywhere, so the
    difference is never positive for all answers, nor negative for all."""
    difference = implicit_reward(other, ref, beta) - implicit_reward(pi, ref, beta)
    assert difference.min() <= 1e-12 and difference.max() >= -1e-12


# ------------------------------------------------------------------------------------------------
# Appendix B: the loss
# ------------------------------------------------------------------------------------------------


def test_dpo_loss_takes_the_arguments_of_appendix_b_by_name():
    """One pair, rhat = (0.2, -0.1): rewards include beta, the loss is log(1 + exp(-0.3))."""
    pi, ref = float64([-1.0, -4.0]), float64([-3.0, -3.0])
    losses, rewards = dpo_loss(pi_logps=pi, ref_logps=ref, yw_idxs=torch.tensor([0]),
                               yl_idxs=torch.tensor([1]), beta=0.1)
    # Log-ratios: -1 + 3 = 2 and -4 + 3 = -1; times beta: 0.2 and -0.1.
    same(rewards, [0.2, -0.1])
    same(losses, [math.log(1 + math.exp(-0.3))])


@for_all
@given(paired=paired_answers(), beta=betas)
def test_dpo_loss_is_appendix_b_written_out(paired, beta):
    """-log(1 / (1 + exp(-beta ((log pi_w - log pi_l) - (log ref_w - log ref_l))))), per pair."""
    pi, ref, chosen, rejected = paired
    losses, _ = dpo_loss(pi, ref, chosen, rejected, beta)
    expected = []
    for w, l in zip(chosen.tolist(), rejected.tolist()):
        margin = beta * ((pi[w] - pi[l]) - (ref[w] - ref[l])).item()
        expected.append(-math.log(1 / (1 + math.exp(-margin))))
    same(losses, expected)


@for_all
@given(paired=paired_answers(), beta=betas)
def test_each_pair_has_its_own_loss_whatever_else_is_in_the_batch(paired, beta):
    """(P,) losses, neither summed nor averaged: the caller knows how many pairs a batch has."""
    pi, ref, chosen, rejected = paired
    together = dpo_loss(pi, ref, chosen, rejected, beta)[0]
    one_by_one = [dpo_loss(pi, ref, chosen[p:p + 1], rejected[p:p + 1], beta)[0]
                  for p in range(len(chosen))]
    same(together, torch.cat(one_by_one))


@for_all
@given(paired=paired_answers(), beta=betas)
def test_dpo_loss_is_bradley_terry_of_the_implicit_rewards(paired, beta):
    """-log sigma(rhat_w - rhat_l): DPO fits a reward model, and the reward model is the policy."""
    pi, ref, chosen, rejected = paired
    losses, rewards = dpo_loss(pi, ref, chosen, rejected, beta)
    same(losses, -bradley_terry(rewards[chosen], rewards[rejected]))


@for_all
@given(paired=paired_answers(), beta=betas)
def test_rewards_are_beta_times_the_log_ratio_of_every_answer(paired, beta):
    """rhat = beta (log pi - log pi_ref), also for answers in no pair. (beta is often forgotten.)"""
    pi, ref, chosen, rejected = paired
    expected = [beta * (a - b) for a, b in zip(pi.tolist(), ref.tolist())]
    same(implicit_reward(pi, ref, beta), expected)
    same(dpo_loss(pi, ref, chosen, rejected, beta)[1], expected)


def test_rewards_carry_no_gradient_and_losses_do():
    """Rewards are only logged; a gradient through them would change what is trained on."""
    pi = float64([-1.0, -2.0]).requires_grad_()
    ref, pair = float64([-1.5, -1.5]), torch.tensor([[0, 1]])
    for losses, rewards in (dpo_loss(pi, ref, pair[:, 0], pair[:, 1], 0.1),
                            plackett_luce_loss(pi, ref, pair, 0.1)):
        assert losses.requires_grad and not rewards.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_starts_at_exactly_log_two_and_rewards_at_zero(dtype):
    """At pi = pi_ref the loss is -log sigma(0) = log 2 = 0.6931, whatever the log-probs. Any other
    first loss means that the two models were scored differently."""
    logps = torch.tensor([-1.0, -123.456, -9876.5], dtype=dtype)
    chosen, rejected = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    losses, rewards = dpo_loss(logps, logps, chosen, rejected, 0.1)
    assert losses.dtype == rewards.dtype == dtype
    assert losses.tolist() == [torch.tensor(math.log(2), dtype=dtype).item()] * 3
    assert rewards.tolist() == [0.0] * 3


@for_all
@given(paired=paired_answers(), level=vectors(5, -60, 60), beta=betas)
def test_only_the_ratio_of_policy_to_reference_counts(paired, level, beta):
    """Adding the same number to log pi(y) and log pi_ref(y) changes nothing: the reference alone
    has no influence, and an answer is not rewarded for being likely under both."""
    pi, ref, chosen, rejected = paired
    level = level[:pi.numel()]                          # one number per answer
    losses, rewards = dpo_loss(pi + level, ref + level, chosen, rejected, beta)
    expected_losses, expected_rewards = dpo_loss(pi, ref, chosen, rejected, beta)
    same(losses, expected_losses)
    same(rewards, expected_rewards)


@for_all
@given(paired=paired_answers(), beta=betas)
def test_log_probs_are_taken_as_they_come(paired, beta):
    """Doubling all log-ratios is the same as doubling beta. The loss divides by no length or
    spread, so the caller decides that log pi(y|x) is a sum over tokens."""
    pi, ref, chosen, rejected = paired
    doubled = dpo_loss(2 * pi, 2 * ref, chosen, rejected, beta)[0]
    same(doubled, dpo_loss(pi, ref, chosen, rejected, 2 * beta)[0])


# ------------------------------------------------------------------------------------------------
# C.3: unlikelihood, the baseline that collapses
# ------------------------------------------------------------------------------------------------


@for_all
@given(paired=paired_answers())
def test_unlikelihood_is_minus_the_difference_of_log_probs(paired):
    """-(log pi_w - log pi_l) for each pair."""
    pi, _, chosen, rejected = paired
    expected = [-(pi[w] - pi[l]).item() for w, l in zip(chosen.tolist(), rejected.tolist())]
    same(unlikelihood_loss(pi, chosen, rejected), expected)


@for_all
@given(pi=vectors(2, -1e6, 0))
def test_unlikelihood_pulls_just_as_hard_whatever_the_log_probs(pi):
    """It is -1 for the chosen answer, +1 for the rejected one: no pair is ranked well enough."""
    same(gradient(unlikelihood_loss, pi, torch.tensor([0]), torch.tensor([1])), [-1.0, 1.0])


def test_unlikelihood_is_unbounded_below_where_dpo_stops_at_zero():
    """As log pi_l falls, unlikelihood falls without bound; DPO's loss and gradient go to 0."""
    ref, chosen, rejected = float64([-5.0, -5.0]), torch.tensor([0]), torch.tensor([1])
    for logp in (-1e2, -1e4, -1e6):
        pi = float64([0.0, logp])
        same(unlikelihood_loss(pi, chosen, rejected), [logp])
        losses, _ = dpo_loss(pi, ref, chosen, rejected, 0.5)
        assert 0 <= losses.item() < 1e-20
        assert dpo_gradient(pi, ref, chosen, rejected, 0.5).abs().max() < 1e-20


def test_unlikelihood_is_blind_to_the_reference():
    """Its gradient stays at 1 even for a margin that the reference already had; DPO's depends only
    on the margin gained since."""
    pi, chosen, rejected = float64([-1.0, -5.0]), torch.tensor([0]), torch.tensor([1])
    # DPO, beta 1: rhat_w - rhat_l = 4 - (reference's margin).
    for ref, margin in ((float64([-1.0, -5.0]), 0), (float64([-3.0, -3.0]), 4)):
        same(dpo_gradient(pi, ref, chosen, rejected, 1.0), [-sigma(-margin), sigma(-margin)])
    same(gradient(unlikelihood_loss, pi, chosen, rejected), [-1.0, 1.0])


# ------------------------------------------------------------------------------------------------
# Errata of the paper: the printed form fails and the corrected one holds
# ------------------------------------------------------------------------------------------------


def test_erratum_equation_14_needs_minus_log_partition_not_plus_partition():
    """-J(pi) / beta = KL(pi || pi*) - log Z (Eq. 13); Eq. 14 prints KL(pi || pi*) + Z."""
    # The example of A.1: Z = 2 and pi* = (1/4, 3/4). At pi = pi* the divergence is 0, so
    # -J / beta is -log 2 = -0.693 as corrected, and 2 as printed.
    ref, rewards, beta = float64([0.5, 0.5]).log(), float64([0.0, math.log(3) / 2]), 0.5
    best, log_z = optimal_policy(ref, rewards, beta), log_partition(ref, rewards, beta).item()
    for pi in (best, ref, float64([0.9, 0.1]).log()):
        truth = -objective(pi, ref, rewards, beta) / beta
        assert truth == pytest.approx(kl(pi, best) - log_z)                         # corrected
        # As printed it is too large by Z + log Z, here 2 + log 2 = 2.693, for every policy.
        printed = kl(pi, best) + math.exp(log_z)
        assert printed - truth == pytest.approx(2 + math.log(2))                    # printed


def test_erratum_last_line_of_a2_needs_a_sigmoid():
    """p*(y_1 > y_2) = sigma(beta log pi*_1/ref_1 - beta log pi*_2/ref_2); the paper omits sigma."""
    ref, rewards, beta = float64([0.2, 0.5, 0.3]).log(), float64([2.0, -1.0, 0.5]), 0.4
    rhat = implicit_reward(optimal_policy(ref, rewards, beta), ref, beta)
    printed, printed_reverse = (rhat[0] - rhat[1]).item(), (rhat[1] - rhat[0]).item()
    # Eq. 16 with r = 2 and -1: e^2 / (e^2 + e^-1) = 0.953. As printed, it is r_1 - r_2 = 3.
    truth = math.exp(2) / (math.exp(2) + math.exp(-1))
    assert printed == pytest.approx(3.0)                                            # above 1
    assert printed + printed_reverse == 0                                           # must be 1
    assert sigma(printed) == pytest.approx(truth)                                   # corrected
    assert sigma(printed) + sigma(printed_reverse) == pytest.approx(1.0)
    same(bradley_terry(rhat[0], rhat[1]).exp(), truth)


def test_erratum_equation_21_prints_the_loss_of_the_reversed_preference():
    """The loss is -log sigma(rhat_w - rhat_l); Eq. 21 prints -log sigma(rhat_l - rhat_w)."""
    ref, chosen, rejected, beta = float64([-5.0, -5.0]), torch.tensor([0]), torch.tensor([1]), 1.0
    right, wrong = float64([-4.0, -6.0]), float64([-6.0, -4.0])         # rhat_w - rhat_l = +-2

    def printed(pi):
        rhat = implicit_reward(pi, ref, beta)
        return -bradley_terry(rhat[rejected], rhat[chosen])

    def corrected(pi):
        return dpo_loss(pi, ref, chosen, rejected, beta)[0]

    assert corrected(right) < corrected(wrong) and printed(right) > printed(wrong)
    # A step against the gradient must raise the chosen answer.
    assert gradient(corrected, ref)[0] < 0 and gradient(printed, ref)[0] > 0
    # Corrected, it is -log of Eq. 16 with the implicit rewards 1 and -1.
    same(corrected(right), [-math.log(math.exp(1) / (math.exp(1) + math.exp(-1)))])


@for_all
@given(paired=paired_answers(), beta=betas)
def test_erratum_equation_22_has_the_wrong_sign_of_u(paired, beta):
    """The gradient is -(sigma'(u) / sigma(u)) du with u = rhat_w - rhat_l; Eq. 22 prints
    u = rhat_l - rhat_w, which favours the rejected answer."""
    pi, ref, chosen, rejected = paired
    chosen, rejected = chosen[:1], rejected[:1]
    r = implicit_reward(pi, ref, beta)
    truth = gradient(dpo_loss, pi, ref, chosen, rejected, beta)[chosen]
    u = r[chosen] - r[rejected]
    # sigma'(u) / sigma(u) = 1 - sigma(u); d u / d log pi_w = +beta, and -beta as printed.
    same(truth, -(1 - torch.sigmoid(u)) * beta)                                     # corrected
    printed = -(1 - torch.sigmoid(-u)) * -beta
    same(printed - truth, [beta])           # (1 - sigma(-u)) + (1 - sigma(u)) = 1: never equal


@for_all
@given(margin=st.floats(0.1, 20.0), beta=betas)
def test_erratum_final_gradient_of_a4_has_chosen_and_rejected_swapped(margin, beta):
    """The weight is beta sigma(rhat_l - rhat_w), the model's error; A.4 prints
    beta sigma(rhat_w - rhat_l), which is largest for pairs that are ranked correctly."""
    ref, chosen, rejected = float64([-30.0, -30.0]), torch.tensor([0]), torch.tensor([1])
    weights = {}
    for name, m in (("right", margin), ("wrong", -margin)):             # m = rhat_w - rhat_l
        pi = ref + float64([m / beta, 0.0])
        truth = -gradient(dpo_loss, pi, ref, chosen, rejected, beta)[0].item()
        assert truth == pytest.approx(beta * sigma(-m))                             # corrected
        assert truth != pytest.approx(beta * sigma(m), rel=0.01)                    # printed
        weights[name] = -dpo_gradient(pi, ref, chosen, rejected, beta)[0].item()
        assert weights[name] == pytest.approx(truth)
    assert weights["wrong"] > weights["right"]                          # as printed: smaller
    assert sigma(-margin) < sigma(margin)


# ------------------------------------------------------------------------------------------------
# From end to end: training a table of log-probs finds the optimum of A.1
# ------------------------------------------------------------------------------------------------

# Two prompts with four possible answers each: answers 0-3 are prompt 0's, 4-7 prompt 1's.
REF = float64([[0.4, 0.3, 0.2, 0.1], [0.05, 0.15, 0.3, 0.5]]).log()
REWARDS = float64([[-1.0, 0.5, 1.0, 0.0], [2.0, 1.0, -0.5, 0.2]])


def preferences(k):
    """Every ranking of k answers to each prompt, (G, k), and its probability by Eq. 18, (G,)."""
    orders = [order for first in (0, 4) for order in permutations(range(first, first + 4), k)]
    rewards = REWARDS.flatten().tolist()
    return torch.tensor(orders), float64([plackett_luce_by_hand(rewards, o) for o in orders])


def train(loss_of):
    """Minimise loss_of(log pi of the 8 answers, (8,)), starting at REF; returns log pi, (2, 4)."""
    logits = REF.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = loss_of(logits.log_softmax(-1).flatten())
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().log_softmax(-1)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_dpo_on_exact_preferences_finds_the_optimal_policy(beta):
    """Minimising the expected DPO loss gives pi* of Eq. 15, with no reward model and no sampling:
    the claim of the paper's title."""
    pairs, probabilities = preferences(2)

    def expected_loss(pi):
        losses, _ = dpo_loss(pi, REF.flatten(), pairs[:, 0], pairs[:, 1], beta)
        return (probabilities * losses).sum()

    best = optimal_policy(REF, REWARDS, beta)
    assert (best - REF).abs().max() > 0.5                               # far from the start
    same(train(expected_loss), best, tolerance=1e-6)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_dpo_on_exact_rankings_finds_the_same_optimal_policy(beta):
    """Minimising the expected loss of Eq. 20 over all 4! rankings gives the same pi*."""
    orders, probabilities = preferences(4)

    def expected_loss(pi):
        losses, _ = plackett_luce_loss(pi, REF.flatten(), orders, beta)
        return (probabilities * losses).sum()

    same(train(expected_loss), optimal_policy(REF, REWARDS, beta), tolerance=1e-6)


@for_all
@given(prompt=prompts(), beta=betas)
def test_at_the_optimum_preferences_pull_in_balance_and_unlikelihood_does_not(prompt, beta):
    """At pi*, p(w > l) sigma(rhat_l - rhat_w) = p(l > w) sigma(rhat_w - rhat_l), so DPO's expected
    gradient is zero. Unlikelihood's, p(l > w) - p(w > l), is zero only for equal rewards."""
    _, ref, rewards = prompt
    best, w, l = optimal_policy(ref, rewards, beta), torch.tensor([0]), torch.tensor([1])
    p = plackett_luce_by_hand(rewards, [0, 1])
    dpo = p * dpo_gradient(best, ref, w, l, beta) + (1 - p) * dpo_gradient(best, ref, l, w, beta)
    same(dpo, torch.zeros_like(best))
    unlikelihood = (p * gradient(unlikelihood_loss, best, w, l)
                    + (1 - p) * gradient(unlikelihood_loss, best, l, w))
    same(unlikelihood[0], 1 - 2 * p)


# ------------------------------------------------------------------------------------------------
# Extreme numbers: right and finite in both precisions
# ------------------------------------------------------------------------------------------------

both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@both_precisions
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_losses_and_gradients_are_right_at_huge_margins(dtype, margin):
    """beta margin = +-1000: the loss is 0 or 1000 and the weight 0 or beta. exp(1000) is infinite
    even in float64, so a loss computed through exp would be inf or NaN."""
    beta = 0.1
    pi, ref = torch.tensor([margin, 0.0], dtype=dtype), torch.zeros(2, dtype=dtype)
    pair = torch.tensor([[0, 1]])
    # -log sigma(z) is exp(-z) = 0 for z = 1000, and -z = 1000 for z = -1000.
    expected_loss = torch.tensor([max(0.0, -beta * margin)], dtype=dtype)
    expected_weight = beta if margin < 0 else 0.0
    expected_gradient = torch.tensor([-expected_weight, expected_weight], dtype=dtype)
    for losses in (dpo_loss(pi, ref, pair[:, 0], pair[:, 1], beta)[0],
                   plackett_luce_loss(pi, ref, pair, beta)[0],
                   -bradley_terry(beta * pi[:1], beta * pi[1:])):
        torch.testing.assert_close(losses, expected_loss)
    for got in (dpo_gradient(pi, ref, pair[:, 0], pair[:, 1], beta),
                gradient(dpo_loss, pi, ref, pair[:, 0], pair[:, 1], beta),
                gradient(plackett_luce_loss, pi, ref, pair, beta)):
        torch.testing.assert_close(got, expected_gradient)


@both_precisions
def test_losses_are_right_when_every_log_prob_is_hugely_negative(dtype):
    """Long answers have log pi = -10000, whose exp is 0: only differences may be exponentiated."""
    pi = torch.tensor([-10000.0, -10003.0], dtype=dtype)
    ref = torch.tensor([-10000.5, -10001.5], dtype=dtype)
    pair, beta = torch.tensor([[0, 1]]), 0.1
    # Log-ratios 0.5 and -1.5, so the margin is 2; times beta: 0.2.
    expected = torch.tensor([math.log(1 + math.exp(-0.2))], dtype=dtype)
    torch.testing.assert_close(dpo_loss(pi, ref, pair[:, 0], pair[:, 1], beta)[0], expected)
    torch.testing.assert_close(plackett_luce_loss(pi, ref, pair, beta)[0], expected)


@both_precisions
def test_padded_rankings_are_right_and_finite_at_huge_margins(dtype):
    """Three answers with rhat = 1000, 0, -1000: a correct ranking, its reverse, a padded pair."""
    pi = torch.tensor([1e4, 0.0, -1e4], dtype=dtype)
    orders = torch.tensor([[0, 1, 2], [2, 1, 0], [1, 0, -1]])
    losses, _ = plackett_luce_loss(pi, torch.zeros_like(pi), orders, 0.1)
    # Correct: 0. Reversed: 1000 + 1000 for taking -1000 first, then 1000 for taking 0 before 1000.
    # The pair (1, 0): 1000. float32 is spaced 6e-5 apart at 1000, so each term may be off by that.
    tolerance = {"rtol": 1e-6, "atol": 2e-4 if dtype == torch.float32 else 1e-7}
    torch.testing.assert_close(losses, torch.tensor([0.0, 3000.0, 1000.0], dtype=dtype),
                               **tolerance)
    got = gradient(plackett_luce_loss, pi, torch.zeros_like(pi), orders, 0.1)
    # Each wrong draw adds -beta = -0.1 to the answer taken and +0.1 to the best of those left:
    # 2 is taken before 0, 1 before 0, and 1 before 0 again in the pair.
    torch.testing.assert_close(got, torch.tensor([0.3, -0.2, -0.1], dtype=dtype), **tolerance)


@both_precisions
def test_optimal_policy_is_right_when_rewards_are_huge_beside_beta(dtype):
    """r / beta = +-10000: log Z = log pi_ref(best) + 10000 and pi* puts all mass on the best."""
    ref = torch.tensor([0.5, 0.25, 0.25], dtype=dtype).log()
    rewards = torch.tensor([-1000.0, 1000.0, 0.0], dtype=dtype)
    expected = torch.tensor(math.log(0.25) + 10000, dtype=dtype)
    torch.testing.assert_close(log_partition(ref, rewards, 0.1), expected)
    best = optimal_policy(ref, rewards, 0.1)
    assert best.isfinite().all()
    torch.testing.assert_close(best.exp(), torch.tensor([0.0, 1.0, 0.0], dtype=dtype),
                               rtol=0, atol=2e-3)       # float32 is spaced 1e-3 apart at 10000
