"""Name the mistake in a function of an exercise, if it is a known one.

Each graded function is called once with fixed arguments (PROBES). What it returns is compared with
what each wrong answer to it returns (wrong_answers.py). Only these results are in a copy, in
mistakes.json, so that no copy has a wrong answer, from which the right one could be read.
"""

import functools
import importlib
import json
import math
from pathlib import Path

import torch

from classroom.exercises import split_target
from data import Encoded, pack
from model import GPT, Attention, GPTConfig

FILE = Path(__file__).resolve().parent / "mistakes.json"

PI = torch.tensor([-1.0, -4.0, -2.5, -7.0], dtype=torch.float64)        # log-probs of four answers
REF = torch.tensor([-3.0, -3.2, -2.0, -6.0], dtype=torch.float64)
REWARDS = torch.tensor([0.4, -1.0, 2.0, 0.7], dtype=torch.float64)
CHOSEN, REJECTED = torch.tensor([0, 0, 2]), torch.tensor([1, 2, 1])     # an answer is in two pairs
RANKINGS = torch.tensor([[2, 0, 3, 1], [1, 3, -1, -1]])
CONFIG = GPTConfig(block_size=16, vocab_size=7, n_layer=1, n_head=2, n_embd=8)
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()                      # of two answers
A = torch.tensor([[0.5, -1.0, 2.0], [0.7, 0.0, 0.0]], dtype=torch.float64)
B = torch.tensor([[0.1, -0.4, 1.5], [-0.3, 0.0, 0.0]], dtype=torch.float64)


def fixed(module):
    """A module in float64 with weights that are the same in every version of PyTorch."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            numbers = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_(numbers.mul(1.7).sin().view_as(parameter))
    return module


def packed():
    return pack([Encoded([1, 2, 3], [[4, 5, 6], [1, 6]], [(0, 1)]),
                 Encoded([2, 2], [[3, 6], [5, 5, 5, 6]], [(0, 1)])], 16)


def probe_attention(forward):
    x = torch.arange(2 * 4 * 8, dtype=torch.float64).sin().view(2, 4, 8)
    return forward(fixed(Attention(CONFIG)), x)


def probe_dpo_loss(dpo_loss):
    """With one pair of an extreme margin, at which exp overflows."""
    pi = torch.cat([PI, PI.new_tensor([-5000.0])]).requires_grad_()
    ref = torch.cat([REF, REF.new_tensor([-10.0])])
    chosen, rejected = torch.cat([CHOSEN, torch.tensor([4])]), torch.cat([REJECTED, CHOSEN[:1]])
    losses, rewards = dpo_loss(pi, ref, chosen, rejected, 0.3)
    return losses, rewards, rewards.requires_grad


def probe_ranking_loss(plackett_luce_loss):
    losses, rewards = plackett_luce_loss(PI.clone().requires_grad_(), REF, RANKINGS, 0.3)
    return losses, rewards, rewards.requires_grad


def probe_update(update):
    """Two steps of plain SGD with scaled gradients, one below the limit of the norm, one above."""
    weight = fixed(torch.nn.Linear(2, 1, bias=False))
    optimizer, results = torch.optim.SGD(weight.parameters(), lr=9), []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for size, lr in ((0.1, 0.3), (3.0, 0.5)):
        scaler.scale(size * weight.weight.sum()).backward()
        norm = update(weight, optimizer, scaler, lr, 0.5)
        results += [norm, weight.weight.detach().clone()]
    return results


# {function: what calls it with fixed arguments}
PROBES = {
    "model.Attention.forward": probe_attention,
    "model.GPT.logps": lambda logps: logps(fixed(GPT(CONFIG)), packed()),
    "model.GPT.token_logps": lambda token_logps: token_logps(fixed(GPT(CONFIG)), packed()),
    "train_dpo.bradley_terry": lambda f: f(REWARDS[CHOSEN], REWARDS[REJECTED]),
    "train_dpo.implicit_reward": lambda f: f(PI, REF, 0.3),
    "train_dpo.dpo_loss": probe_dpo_loss,
    "train_dpo.dpo_gradient": lambda f: f(PI, REF, CHOSEN, REJECTED, 0.3),
    "train_dpo.plackett_luce": lambda f: f(REWARDS, RANKINGS),
    "train_dpo.plackett_luce_loss": probe_ranking_loss,
    "train_dpo.log_partition": lambda f: f(PI.view(2, 2), REWARDS.view(2, 2), 0.3),
    "train_dpo.optimal_policy": lambda f: f(PI.view(2, 2), REWARDS.view(2, 2), 0.3),
    "data.Batch.mask": lambda mask: mask(packed()),
    "tasks.sampled.rank_answers": lambda f: f("Q", list("abcd"), [0.1, 0.7, 0.1, -0.5]),
    "data.ranking_to_pairs": lambda f: f([2, 0, 1]),
    "train_sft.warmup": lambda f: [f(step, 4) for step in range(6)],
    "train_sft.update": probe_update,
    "experiments.reward_model.reward_loss": lambda f: f(REWARDS, CHOSEN, REJECTED),
    "experiments.ppo.token_rewards": lambda f: f(A.clone(), B, torch.tensor([5.0, 7.0]).double(),
                                                 MASK, 0.3),
    "experiments.ppo.gae": lambda f: f(A.clone(), B, 0.9, 0.8),
    "experiments.ppo.whiten": lambda f: f(A.clone(), MASK),
    "experiments.ppo.clipped_loss": lambda f: f(A[0], B[0], torch.tensor([1.0, 1.0, -1.0]), 0.2),
    "experiments.ppo.clipped_value_loss": lambda f: f(A[0], B[0], torch.tensor([0.2, 0.3, 0.4]),
                                                      0.2),
}


def result_of(target, function):
    """What a function returns for its probe, as JSON, or None if it raises an error."""
    try:
        return as_json(PROBES[target](function))
    except Exception:
        return None


def as_json(value):
    if isinstance(value, torch.Tensor):
        return as_json(value.detach().tolist())
    if isinstance(value, (list, tuple)):
        return [as_json(one) for one in value]
    if isinstance(value, dict):
        return {name: as_json(one) for name, one in value.items()}
    return value


def are_close(a, b):
    """Whether two results are equal, up to rounding."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(are_close, a, b))
    if type(a) is float and type(b) is float:
        return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7) or math.isnan(a) and math.isnan(b)
    return a == b


@functools.cache
def known_mistakes():
    """{function: [[what a wrong answer returns, which mistake that is]]}, from mistakes.json."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


@functools.cache
def likely_mistakes(targets):
    """The known mistakes in these functions ("module.function", a tuple of them), as sentences. A
    function that is right, that raises an error or has an unknown mistake adds none."""
    found = []
    for target in targets:
        module, path = split_target(target)
        if target not in PROBES:
            continue
        function = importlib.import_module(module)
        for name in path.split("."):
            function = getattr(function, name)
        result = result_of(target, function)
        found += [f"this mistake in {path} gives exactly what yours returns: {mistake}"
                  for wrong, mistake in known_mistakes().get(target, [])
                  if result is not None and are_close(result, wrong)]
    return found
