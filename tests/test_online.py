"""Online DPO (experiments/online.py): what a round is made of, and the loop.

    pytest tests/test_online.py
"""

import copy
import csv
import json

import pytest
import torch
from hypothesis import given, settings, strategies as st

import train_dpo
from data import Encoded
from experiments import online
from experiments.online import round_of, sample_round
from experiments.ppo import UNFINISHED
from model import GPT, GPTConfig
from runtime.errors import UserError
from sample import logps_of, sample_answers
from tasks import task_of
from tasks.checkpoint import load_checkpoint, save_checkpoint
from tasks.scalar_gpt import ScalarGPT
from tasks.tokenizers import get_tokenizer

EOT = 0
PROMPTS = [[1, 1 + n % 7, 2 + n % 5] for n in range(12)]


def gpt(seed=0, vocabulary=20, block_size=32):
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size, vocabulary, n_layer=1, n_head=2, n_embd=8), 0.3).double()


def flags(tmp_path, **changes):
    args = online.parse_args(["--reward", "ground_truth"])
    changes = dict(out=tmp_path, row_length=32, max_new_tokens=6, batch=8, lr=1e-2, warmup=2,
                   steps=6, rounds=3, log_every=1, save_every=0.0) | changes
    for name, value in changes.items():
        assert hasattr(args, name), name
        setattr(args, name, value)
    return args


def content(items):
    """A reward that tells all answers apart: their ids, read as the digits of a number."""
    return [sum(token / 20 ** k for k, token in enumerate(item.answers[0])) for item in items]


def answers_of(model, number, args):
    """The answers to PROMPTS that round `number` of args.seed 0 samples from a model."""
    repeated = [prompt for prompt in PROMPTS for _ in range(args.samples)]
    sampled = sample_answers(model, repeated, args.max_new_tokens, 10**6 + number, EOT)
    return [sampled[i:i + args.samples] for i in range(0, len(sampled), args.samples)]


# ------------------------------------------------------------------------------------------------
# A round
# ------------------------------------------------------------------------------------------------


def test_a_round_compares_answers_of_the_policy_as_it_is_now(tmp_path):
    """Not of the reference, and not those of an earlier round."""
    args, policy = flags(tmp_path), gpt(1)
    items, *_ = sample_round(policy, gpt(), PROMPTS, content, EOT, 2, args)
    for item in items:
        sampled = answers_of(policy, 2, args)[PROMPTS.index(item.prompt)]
        assert all(answer in sampled for answer in item.answers)
    assert len(items) > 8


def test_fresh_answers_have_the_log_probs_of_the_reference(tmp_path):
    """Of these answers, in this order, and of the model that does not move."""
    args, reference = flags(tmp_path), gpt()
    items, *_ = sample_round(gpt(1), reference, PROMPTS, content, EOT, 2, args)
    for item, ref_logps in zip(items, logps_of(reference, items, 32)):
        assert item.ref_logps == pytest.approx(ref_logps, abs=1e-4)


def test_the_judge_reads_each_prompt_once_followed_by_an_answer(tmp_path):
    """As it read them in the preferences that it was fitted to."""
    args, policy, read = flags(tmp_path), gpt(1), []

    def judge(items):
        read.extend((item.prompt, item.answers) for item in items)
        return content(items)
    sample_round(policy, gpt(), PROMPTS, judge, EOT, 0, args)
    assert read == [(prompt, [answer]) for prompt, answers in
                    zip(PROMPTS, answers_of(policy, 0, args)) for answer in answers]


def test_every_round_draws_other_answers_and_the_same_in_another_run(tmp_path):
    """Even from a policy that has not changed."""
    args, policy = flags(tmp_path), gpt(1)
    first, again, later = (sample_round(policy, gpt(), PROMPTS, content, EOT, number, args)[0]
                           for number in (0, 0, 1))
    assert first == again and first != later


def test_the_better_answer_of_every_pair_is_the_chosen_one_and_ties_make_no_pair(tmp_path):
    """The reward has three values, and an answer that does not end has UNFINISHED, so of four
    answers some tie. All others are compared."""
    args = flags(tmp_path)

    def judge(items):
        return [float(item.answers[0][0] % 3) for item in items]

    def reward(answer):
        return answer[0] % 3 if answer[-1] == EOT else UNFINISHED
    items, _, rewards = sample_round(gpt(1), gpt(), PROMPTS, judge, EOT, 0, args)
    for item in items:
        assert all(reward(item.answers[w]) > reward(item.answers[l]) for w, l in item.pairs)
        n = len({reward(answer) for answer in item.answers})
        assert n == len(item.answers) and len(item.pairs) == n * (n - 1) / 2
    assert {len(item.answers) for item in items} >= {2, 3}
    assert rewards == [reward(answer) for answers in answers_of(gpt(1), 0, args)
                       for answer in answers]


def test_equal_answers_are_never_compared_whatever_the_judge_says(tmp_path):
    """A learned reward differs in the last digit if an answer stands elsewhere in a row."""
    args = flags(tmp_path, max_new_tokens=1, samples=8)

    def judge(items):
        return [float(i) for i in range(len(items))]
    items, *_ = sample_round(gpt(vocabulary=3), gpt(vocabulary=3), [[1]] * 9, judge, EOT, 0, args)
    for item in items:
        assert len(set(map(tuple, item.answers))) == len(item.answers) <= 2


def test_a_round_in_which_all_answers_tie_is_refused(tmp_path):
    """There is nothing to learn from it."""
    with pytest.raises(UserError, match="round 3: no prompt got two answers of different reward"):
        sample_round(gpt(), gpt(), PROMPTS, lambda items: [UNFINISHED] * len(items), EOT, 2,
                     flags(tmp_path))


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(1, 200), st.integers(1, 250))
def test_rounds_share_the_steps_out_evenly(n_steps, rounds):
    """Every step is in one round. (If there are more rounds than steps, each step is a round.)"""
    found = dict.fromkeys(round_of(step, n_steps, rounds) for step in range(n_steps))
    assert [step for _, steps in found for step in steps] == list(range(n_steps))
    sizes = {len(steps) for _, steps in found}
    assert max(sizes) - min(sizes) <= 1 and len(found) == min(rounds, n_steps)


def losses(path):
    with open(path, newline="") as file:
        return [(row["loss"], row["margin"], row["grad_norm"]) for row in csv.DictReader(file)]


def test_one_round_is_the_run_of_train_dpo_on_the_same_pairs(tmp_path, monkeypatch):
    """The answers are then all of the SFT model. Losses and weights agree to the last digit."""
    args = flags(tmp_path, rounds=1)
    policy, rounds = gpt(), []

    def recorded(*arguments):
        rounds.append(sample_round(*arguments))
        return rounds[-1]
    monkeypatch.setattr(online, "sample_round", recorded)
    online.train(policy, gpt(), PROMPTS, content, EOT, args)
    offline = gpt()
    dpo_args = train_dpo.parse_args([])
    vars(dpo_args).update({name: getattr(args, name) for name in (
        "out", "row_length", "batch", "lr", "warmup", "steps", "log_every", "clip", "beta")})
    train_dpo.train(offline, rounds[0][0], [], dpo_args)
    assert losses(tmp_path / "online_metrics.csv") == losses(tmp_path / "dpo_metrics.csv")
    for weight, expected in zip(policy.parameters(), offline.parameters()):
        assert torch.equal(weight, expected)


def test_each_round_samples_from_the_policy_that_the_last_one_left(tmp_path, monkeypatch):
    """Three rounds of two steps: the first samples from the SFT model, the second from the policy
    after two steps, the third from that after four. The reference stays as it was."""
    rounds = []

    def recorded(policy, reference, *more):
        rounds.append((copy.deepcopy(policy.state_dict()), copy.deepcopy(reference.state_dict())))
        return sample_round(policy, reference, *more)
    monkeypatch.setattr(online, "sample_round", recorded)
    online.train(gpt(), gpt(), PROMPTS, content, EOT, flags(tmp_path))
    sft = gpt().state_dict()
    expected = [sft] + [stopped_after(n, tmp_path, monkeypatch) for n in (2, 4)]
    for (policy, reference), weights in zip(rounds, expected, strict=True):
        assert all(torch.equal(policy[name], weights[name]) for name in sft)
        assert all(torch.equal(reference[name], sft[name]) for name in sft)


def stopped_after(n_steps, tmp_path, monkeypatch):
    """The weights in the training state of a run that was killed in the step after n_steps."""
    steps = iter(range(n_steps))
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(online, "sample_round", sample_round)
        right = online.update
        patch.setattr(online, "update", lambda *arguments: (next(steps), right(*arguments))[1])
        online.train(gpt(), gpt(), PROMPTS, content, EOT, flags(tmp_path))
    return torch.load(tmp_path / "online_state.pt")["model"]


@pytest.mark.parametrize("n_steps", [0, 1, 2, 3])
def test_a_killed_run_resumes_to_the_same_bytes(n_steps, tmp_path, monkeypatch):
    """Killed in the first or the second step of a round of two. The policy has moved on since the
    answers of the second were sampled, so they are part of the training state."""
    whole, killed = gpt(), gpt()
    (tmp_path / "whole").mkdir()
    online.train(whole, gpt(), PROMPTS, content, EOT, flags(tmp_path / "whole"))
    stopped_after(n_steps, tmp_path, monkeypatch)
    online.train(killed, gpt(), PROMPTS, content, EOT, flags(tmp_path, resume=True))
    for weight, expected in zip(killed.parameters(), whole.parameters()):
        assert torch.equal(weight, expected)
    name = "online_metrics.csv"
    assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("changed, words", [
    ({"rounds": 2}, "that run had --rounds 3"), ({"samples": 3}, "that run had --samples 4"),
    ({"max_new_tokens": 5}, "the --max-new-tokens changed")])
def test_a_run_is_not_resumed_with_other_rounds(changed, words, tmp_path, monkeypatch):
    stopped_after(2, tmp_path, monkeypatch)
    with pytest.raises(UserError, match=f"cannot resume, {words}"):
        online.train(gpt(), gpt(), PROMPTS, content, EOT, flags(tmp_path, resume=True, **changed))


@pytest.mark.parametrize("rounds", [1, 6])
def test_offline_and_online_come_to_the_optimal_policy_of_equation_15(rounds, tmp_path,
                                                                      monkeypatch):
    """Five answers of one token. The judge adds Gumbel noise to the true rewards, so it prefers
    y_w to y_l with probability sigma(r_w - r_l), as Bradley and Terry say. Where enough such pairs
    are, it makes no difference whose answers they are."""
    args = flags(tmp_path, rounds=rounds, samples=4, max_new_tokens=1, batch=128, steps=60,
                 lr=1e-2, beta=0.5, warmup=1, log_every=1000, save_every=60.0, clip=10.0)
    monkeypatch.setattr(type(task_of(args)), "answers_must_end", False)
    policy, reference = gpt(vocabulary=5), gpt(vocabulary=5)
    true = torch.tensor([0.5, -0.5, 1.0, 0.0, -1.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def judge(items):
        uniform = torch.rand(len(items), generator=generator, dtype=torch.float64)
        noise = -(-uniform.log()).log()
        return (true[[item.answers[0][0] for item in items]] + noise).tolist()

    def log_probs(model):
        one_each = [Encoded([1], [[token] for token in range(5)], [])]
        return torch.tensor(logps_of(model, one_each, 32)[0], dtype=torch.float64)
    best = train_dpo.optimal_policy(log_probs(reference), true, args.beta)
    online.train(policy, reference, [[1]] * 1300, judge, EOT, args)

    def divergence(logps):
        return (logps.exp() * (logps - best)).sum().item()
    assert divergence(log_probs(reference)) > 0.5
    assert divergence(log_probs(policy)) < 0.05


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run: an untrained sft.pt, a reward model, preferences, and then online DPO.
    """
    out, tokenizer = tmp_path_factory.mktemp("run"), get_tokenizer("reviews")
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, tokenizer.n_vocab, 1, 2, 16), 0.3)
    with torch.no_grad():           # most answers end
        model.ln_f.bias += 2 * model.wte.weight[tokenizer.eot_token]
    save_checkpoint(out / "sft.pt", model, tokenizer="reviews", source="reviews")
    judge = ScalarGPT.from_gpt(model)
    torch.nn.init.normal_(judge.scalar.weight)
    save_checkpoint(out / "reward.pt", judge, tokenizer="reviews", source="reviews")
    rows = [{"prompt": f"The {aspect} was{' ' * n}", "ranking": [1, 0],
             "answers": [" dull. A bad film.", " good. A good film."]}
            for n, aspect in enumerate(10 * "plot music script ending story".split())]
    (out / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    online.main(command(out))
    return out


def command(out, *more):
    flags = ("--steps 4 --rounds 2 --batch 8 --max-new-tokens 50 --eval-prompts 12 --device cpu "
             "--log-every 1")
    return [*flags.split(), "--out", str(out), *more]


def test_a_finished_run_leaves_a_checkpoint_a_log_and_the_table(run):
    facts = load_checkpoint(run / "online.pt")[1]
    assert (facts["stage"], facts["reward"], facts["beta"]) == ("online", "learned", 0.5)
    found = json.loads((run / "online.json").read_text())
    assert list(found["policies"]) == ["sft", "online"] and found["rounds"] == 2
    assert found["policies"]["online"]["kl"] != 0
    rows = (run / "online_metrics.csv").read_text().splitlines()
    assert rows[0] == "step," + ",".join(online.COLUMNS) and len(rows) == 5
    assert not (run / "online_state.pt").exists()


def test_the_reward_of_a_round_is_logged_where_it_was_sampled(run):
    """Rounds of two steps: the lines after steps 1 and 3."""
    with open(run / "online_metrics.csv", newline="") as file:
        assert [bool(row["reward"]) for row in csv.DictReader(file)] == [True, False, True, False]


def test_what_online_dpo_needs_and_does_not_find_is_one_sentence(run, tmp_path, capsys):
    (tmp_path / "sft.pt").write_bytes((run / "sft.pt").read_bytes())
    (tmp_path / "preferences.jsonl").write_bytes((run / "preferences.jsonl").read_bytes())
    for argv, words in [(command(tmp_path), "reward.pt"),
                        (["--data", str(run / "preferences.jsonl"), "--reward", "ground_truth"],
                         "only reviews and imdb"),
                        (command(tmp_path, "--samples", "1"), "--samples")]:
        with pytest.raises(SystemExit) as caught:
            online.main(argv)
        message = capsys.readouterr().err
        assert caught.value.code == 2 and words in message and message.count("\n") == 1
