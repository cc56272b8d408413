"""PPO, the reinforcement-learning stage of RLHF. DPO replaces both stages.

    python train_dpo.py                              # first: writes sft.pt and the preferences
    python -m experiments.reward_model               # the first stage: writes reward.pt
    python -m experiments.ppo                        # PPO with that reward model
    python -m experiments.ppo --reward ground_truth  # PPO-GT: with the ground-truth reward

PPO maximises the KL-constrained objective of Eq. 3,

    E[ r(x, y) ] - beta KL(pi || pi_ref)                                  E over answers y ~ pi

Each token of an answer is an action, and each action has a reward: the penalty

    r_t = -beta ( log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t) )

plus r(x, y) at the last token. The expected sum over an answer is Eq. 3. The return of a token is
the reward still to come, from that token on. A second network, the critic, predicts it before the
token is chosen; the advantage is how much better it turned out. A step of the loop calls

    rollout                 sample an answer to each prompt of a batch; keep the log-probs of its
                            tokens under policy and reference, the critic's values, and r(x, y)
    advantages_and_returns  by GAE
    improve                 four passes over the answers in minibatches: raise the probability of
                            tokens with a positive advantage and lower that of the others. A token
                            gets no gradient once the ratio of its new to its old probability has
                            left the range 1 +- 0.2 in that direction (the clipped objective). Fit
                            the critic to the returns
    penalty.adapt           with --target-kl: steer beta

So a step, which --steps and --epochs count, is one rollout with its updates, 16 by default, and
--accumulate cuts a minibatch. The critic is a separate ScalarGPT, initialised with the policy's
weights. `--reward learned` needs reward.pt. An answer that does not end within --max-new-tokens has
the reward UNFINISHED.

Writes ppo.pt, ppo_metrics.csv and ppo.json to the folder of the run. Left out on purpose: an
entropy bonus; dropout; a decay of the learning rate; whitening of the rewards; a critic that starts
from the reward model; a weight of the critic's loss, since the critic shares no weights with the
policy; torch.compile; a sampling temperature other than 1, which rollout, reference and update
would all have to divide their logits by.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch

from data import Batches, Encoded, batches_in_order, deal, decode_answer, pack_for_model
from experiments.reward_model import open_reward_model
from runtime.cli import Parser, begin_run, command, number_type, path_type
from runtime.errors import UserError
from runtime.files import fingerprint
from runtime.flags import add_training_flags, fill_in
from runtime.parallel import all_gather
from runtime.run import Run
from sample import measure, numbers_of, sample_answers
from tasks import held_out_prompts, task_of
from tasks.checkpoint import open_start, save_checkpoint
from tasks.flags import add_measuring_flags, add_task_flags, choose_task
from tasks.scalar_gpt import ScalarGPT
from train_sft import grad_scaler, update, warmup

# Answers per step and per minibatch, learning rates, the penalty beta, a target for the KL (None:
# beta is fixed), the horizon (beta changes by at most about a fifth per so many answers), and
# passes over the prompts. "small" is for the models of reviews and imdb-small. "trl" has the
# settings of TRL 0.8 to 0.11, for pretrained models; C.1 compares with TRL, and its own PPO had
# 1,024 answers per step.
PRESETS = {
    "small": {"batch": 256, "minibatch": 64, "lr": 1e-4, "critic_lr": 1e-3, "beta": 0.2,
                "target_kl": None, "horizon": 300, "epochs": 2},
    "pretrained": {"batch": 1024, "minibatch": 128, "lr": 1.41e-5, "critic_lr": 1.41e-5,
                   "beta": 0.1, "target_kl": None, "horizon": 10_000, "epochs": 1},
    "trl": {"batch": 128, "minibatch": 128, "lr": 1.41e-5, "critic_lr": 1.41e-5, "beta": 0.2,
            "target_kl": 6.0, "horizon": 10_000, "epochs": 1},
}
DEFAULTS = {"warmup": 3, "clip": 1.0, "weight_decay": 0.0}        # of every preset
PASSES = 4                  # over the answers of a step
RATIO_CLIP = 0.2            # of ratios of probabilities, and of changes of the critic's values
GAMMA, LAMBDA = 1.0, 0.95
UNFINISHED = -1.0           # reward of an answer without end-of-text: the least of the reviews, and
                            # one standard deviation below the SFT model's mean for a reward model

# reward, kl, length: means over the sampled answers. clipped: share of tokens without gradient.
# explained: 1 - Var(returns - values) / Var(returns), at most 1. grad_norm: of the policy.
COLUMNS = {"reward": ("reward", ".3f"), "kl": ("kl", ".3f"), "beta": ("beta", ".3f"),
           "length": ("length", ".1f"), "clipped": ("clipped", ".3f"),
           "value_loss": ("value loss", ".4f"), "explained": ("explained", ".3f"),
           "grad_norm": ("grad norm", ".2f")}


# ------------------------------------------------------------------------------------------------
# The mathematics: N answers of at most L tokens
# ------------------------------------------------------------------------------------------------


def token_rewards(logps, ref_logps, scores, mask, beta):
    """Eq. 3, token by token: -beta (log pi - log pi_ref), and the score r(x, y) on top at the last
    token, which is end-of-text unless the answer was cut.

    logps, ref_logps: (N, L), zero at padding. scores: (N,). mask: (N, L) bool, True for the tokens
    of an answer, end-of-text included. Returns (N, L), zero at padding.
    """
    rewards = -beta * (logps - ref_logps)
    last = mask.sum(1) - 1
    rewards[torch.arange(len(rewards), device=last.device), last] += scores
    return rewards


def gae(rewards, values, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016), a sum over this and later tokens:

        A_t = sum_k (gamma lam)^k delta_(t+k)         delta_t = r_t + gamma V_(t+1) - V_t

    With lam = 1 (and gamma = 1) it is the sum of the rewards from token t on, minus V_t; with
    lam = 0 it is delta_t, which trusts the critic after one token. rewards, values: (N, L), zero at
    padding. So the value after the last token is zero, also if the answer was cut: the episode ends
    there. Returns advantages (N, L), zero at padding.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages


def whiten(advantages, mask):
    """Shift and scale to mean 0 and standard deviation 1 over the tokens of the mask. (N, L)."""
    kept = advantages[mask]
    return torch.where(mask, (advantages - kept.mean()) / (kept.std() + 1e-8), 0.0)


def clipped_loss(logps, old_logps, advantages, clip):
    """The clipped objective of PPO (Schulman et al. 2017, Eq. 7), negated: per token,
    -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) with ratio = pi / pi_old.

    It has no gradient where the ratio has already moved further than `clip` in the direction that
    the advantage A asks for. logps (with gradient), old_logps (of the policy that sampled),
    advantages: all of one shape, which is that of the losses.
    """
    ratios = (logps - old_logps).exp()
    clipped = ratios.clamp(1 - clip, 1 + clip)
    return -torch.min(ratios * advantages, clipped * advantages)


def clipped_value_loss(values, old_values, returns, clip):
    """Half the squared error of the critic: the larger of the errors of `values` and of `values`
    clipped to within `clip` of `old_values` (Ziegler et al. 2019). All of one shape."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


class Penalty:
    """The strength beta of the KL penalty: fixed, or with a target, steered towards it (Ziegler et
    al. 2019). A KL above the target raises beta and one below lowers it, by at most 0.2 / horizon
    of its value for each answer."""

    def __init__(self, beta, target, horizon):
        self.beta, self.target, self.horizon = beta, target, horizon

    def adapt(self, kl, n_answers):
        """Update beta after a step. kl: the mean KL of its n_answers answers, in nats."""
        if self.target is not None:
            error = min(0.2, max(-0.2, kl / self.target - 1))
            self.beta *= 1 + error * n_answers / self.horizon

    def state_dict(self):
        return {"beta": self.beta}

    def load_state_dict(self, state):
        self.beta = state["beta"]


# ------------------------------------------------------------------------------------------------
# The three functions of a step
# ------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """N sampled answers, of which the longest has L tokens. Tensors are zero at padding."""

    items: list                 # of N Encoded, a prompt with one answer each
    mask: torch.Tensor          # (N, L) bool, True for the tokens of an answer
    logps: torch.Tensor         # (N, L) log pi of each token, under the policy that sampled it
    ref_logps: torch.Tensor     # (N, L) log pi_ref of each token
    values: torch.Tensor        # (N, L) what the critic expected before each token
    scores: torch.Tensor        # (N,) r(x, y)

    def kl(self):
        """(N,) log pi(y|x) - log pi_ref(y|x): its mean estimates the KL of policy to reference."""
        return (self.logps - self.ref_logps).sum(1)


def rollout(policy, value_model, reference, prompts, score_answers, eot, step, args):
    """Sample one answer to each of a list of prompts (ids) and keep what `improve` needs to know.
    score_answers: maps a list of Encoded to their rewards, a list. Returns a Rollout."""
    seed = 10**6 * (args.seed + 1) + step               # other answers in every step
    answers = sample_answers(policy, prompts, args.max_new_tokens, seed, eot)
    items = [Encoded(prompt, [answer], []) for prompt, answer in zip(prompts, answers)]
    scores = judged(items, score_answers, eot, args)
    logps = by_token(policy, policy.token_logps, items)                     # (N, L)
    ref_logps = by_token(reference, reference.token_logps, items)
    values = by_token(value_model, value_model.values, items)
    lengths = torch.tensor([len(answer) for answer in answers], device=policy.device)
    mask = torch.arange(logps.size(1), device=policy.device) < lengths[:, None]
    return Rollout(items, mask, logps, ref_logps, values, logps.new_tensor(scores))


def judged(items, score_answers, eot, args):
    """The rewards of the answers of a list of Encoded, one each, with that of unfinished answers. A
    list."""
    rewards = score_answers(items)
    if task_of(args).answers_must_end:
        rewards = [r if item.answers[0][-1] == eot else UNFINISHED
                   for r, item in zip(rewards, items)]
    return rewards


def advantages_and_returns(rolled, beta):
    """(advantages, returns) of a Rollout, both (N, L). The returns are what the critic learns, so
    they have the true scale. The advantages are whitened: afterwards, positive means better than
    the average token of this rollout, not better than the critic expected."""
    rewards = token_rewards(rolled.logps, rolled.ref_logps, rolled.scores, rolled.mask, beta)
    advantages = gae(rewards, rolled.values, GAMMA, LAMBDA)
    return whiten(advantages, rolled.mask), advantages + rolled.values


def improve(policy, critic, rolled, advantages, returns, step, log, args, factor=1.0):
    """Four passes over a Rollout, in minibatches, with an update of policy and critic for each.
    policy, critic: Learners. factor: of their learning rates."""
    for chosen in minibatches(len(rolled.items), args, step):       # an array of indices
        n_tokens = rolled.mask[chosen].sum()
        for batch, at in packed_parts(rolled, chosen, policy.model, args):
            # The policy: compare the current log-probs with those of the rollout.
            logps = policy.model.token_logps(batch)                         # (S,)
            losses = clipped_loss(logps, rolled.logps[at], advantages[at], RATIO_CLIP)
            policy.scaler.scale(losses.sum() / n_tokens).backward()
            # The critic: fit its values to the returns.
            values = critic.model.values(batch)                             # (S,)
            value_losses = clipped_value_loss(values, rolled.values[at], returns[at], RATIO_CLIP)
            critic.scaler.scale(value_losses.sum() / n_tokens).backward()
            ratios = (logps.detach() - rolled.logps[at]).exp()
            beyond = torch.where(advantages[at] > 0, ratios > 1 + RATIO_CLIP,
                                 ratios < 1 - RATIO_CLIP)
            log.add(len(logps), clipped=beyond.sum(), value_loss=value_losses.detach().sum())
        log.note_update(step, critic.step(factor, args.clip), factor * critic.lr)
        log.note_update(step, policy.step(factor, args.clip), factor * policy.lr)


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------


class Learner:
    """A model with its optimizer."""

    def __init__(self, model, lr, weight_decay):
        self.model, self.lr = model, lr
        self.optimizer = model.optimizer(lr, weight_decay)
        self.scaler = grad_scaler(model)

    def step(self, factor, clip):
        """One update at lr * factor. Returns the gradient norm before clipping."""
        return update(self.model, self.optimizer, self.scaler, factor * self.lr, clip)


def minibatches(n_answers, args, step):
    """Yield the answers of each minibatch, an array of indices, PASSES times over in a new order
    each time. It depends only on --seed and the step."""
    rng = np.random.default_rng([args.seed, step])
    for _ in range(PASSES):
        order = rng.permutation(n_answers)
        for start in range(0, n_answers, args.minibatch):
            yield order[start:start + args.minibatch]


def packed_parts(rolled, chosen, model, args):
    """Yield this process's parts of a minibatch, the answers `chosen` of a Rollout: a packed Batch
    on the model's device, and the index of each of its scored tokens in tensors (N, L)."""
    items = [rolled.items[i] for i in chosen]
    for share in deal(items, args.accumulate):
        batch = pack_for_model([items[i] for i in share], model.config.block_size, model)
        row_of_answer = torch.tensor(chosen[share], device=model.device)
        answer, column = token_places(batch)
        yield batch, (row_of_answer[answer], column)


def token_places(batch):
    """For each scored token of a packed Batch: the index of its answer, and its own index within
    that answer, both (S,).

    The positions of an answer continue those of its prompt. So the position of the token before a
    scored one, minus that of the prompt's last token, counts 0, 1, 2, ...
    """
    before = batch.positions.flatten()[batch.source]                # (S,)
    larger = batch.tokens.size(1)                                   # than any position
    last_of_prompt = before.new_full((batch.n_answers,), larger)
    last_of_prompt = last_of_prompt.scatter_reduce(0, batch.answer_of, before, "amin")      # (N,)
    return batch.answer_of, before - last_of_prompt[batch.answer_of]


@torch.no_grad()
def by_token(model, numbers_of, items):
    """A number per token of the answer of each of a list of Encoded: (N, L), zero at padding.
    numbers_of: maps a packed Batch to a tensor (S,)."""
    L = max(len(item.answers[0]) for item in items)
    padded = []
    for batch in batches_in_order(items, model.config.block_size, model, size=128):
        numbers = numbers_of(batch)                                         # (S,)
        rows = numbers.new_zeros(batch.n_answers, L)
        rows[token_places(batch)] = numbers
        padded.append(rows.cpu())                                   # travels between processes
    return torch.cat(all_gather(padded)).to(model.device)


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


def train(model, reference, prompts, score_answers, eot, args, reward_digest=""):
    """Run PPO on a list of prompts (lists of ids). Trains the model in place. score_answers: as in
    rollout. reward_digest: of the reward model, which a resumed run must share. Returns the last
    beta."""
    batches = Batches([Encoded(prompt, [], []) for prompt in prompts], args.batch, args.seed,
                      whole=True)
    policy = Learner(model, args.lr, args.weight_decay)
    critic = Learner(ScalarGPT.from_gpt(model), args.critic_lr, args.weight_decay)
    penalty = Penalty(args.beta, args.target_kl, args.horizon)
    digests = {"reward model": reward_digest, "--max-new-tokens": args.max_new_tokens}
    run = Run("ppo", COLUMNS, args, batches, digests=digests, model=model,
              optimizer=policy.optimizer, scaler=policy.scaler, critic=critic.model,
              critic_optimizer=critic.optimizer, critic_scaler=critic.scaler, penalty=penalty)
    for step in run.steps():                                                # logs, saves
        rolled = rollout(model, critic.model, reference, [item.prompt for item in batches[step]],
                         score_answers, eot, step, args)
        advantages, returns = advantages_and_returns(rolled, penalty.beta)
        log_rollout(rolled, returns, penalty.beta, run.log)
        improve(policy, critic, rolled, advantages, returns, step, run.log, args,
                warmup(step, run.n_warmup))
        penalty.adapt(rolled.kl().mean().item(), len(rolled.items))
    return penalty.beta


def log_rollout(rolled, returns, beta, log):
    """Log a Rollout; see COLUMNS."""
    log.add(len(rolled.items), reward=rolled.scores.sum(), kl=rolled.kl().sum(),
            length=rolled.mask.sum())
    missed = (returns - rolled.values)[rolled.mask].var(correction=0)
    variance = returns[rolled.mask].var(correction=0)
    log.add(1, beta=beta, explained=1 - missed / variance.clamp(min=1e-12))


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


@command
def main(argv=None):
    args = parse_args(argv)
    device = begin_run(args, reads=["sft", "reward_model", "data"],
                       writes=["ppo.pt", "ppo_metrics.csv", "ppo.json"])
    policy, tokenizer, facts = open_start(args, device, PRESETS["pretrained"]["lr"])
    preferences, held_out = task_of(args).encoded_preferences(tokenizer, args)
    held_out = held_out_prompts(held_out, tokenizer, args)      # for the table at the end
    score_answers, digest = reward_function(tokenizer, facts["tokenizer"], device, args)
    reference = copy.deepcopy(policy)
    prompts = [item.prompt for item in preferences]
    print(f"PPO of {args.sft} on {len(prompts):,} prompts, {args.reward} reward, {device}")
    beta = train(policy, reference, prompts, score_answers, tokenizer.eot_token, args, digest)
    save_checkpoint(args.out / "ppo.pt", policy, reference, **facts, stage="ppo", beta=beta,
                    reward=args.reward)
    print(f"wrote {args.out / 'ppo.pt'}")
    measure(args.out / "ppo.json", {"sft": reference, "ppo": policy}, reference, held_out,
            tokenizer, args, reward=args.reward, beta=beta, target_kl=args.target_kl)
    (args.out / "ppo_state.pt").unlink(missing_ok=True)         # the run has finished


def reward_function(tokenizer, tokenizer_name, device, args):
    """(function, digest) of --reward: it maps a list of Encoded with one answer each to a list of
    rewards; the digest is of the reward model's weights."""
    if args.reward == "ground_truth":
        reward = task_of(args).reward(args)
        return lambda items: reward([decode_answer([*item.prompt, *item.answers[0]], tokenizer)
                                     for item in items]), ""
    path = args.reward_model or args.out / "reward.pt"
    model, facts = open_reward_model(path, device, args)
    if facts["tokenizer"] != tokenizer_name:
        raise UserError(f"{path} is for the {facts['tokenizer']} tokenizer, but the policy has the "
                        f"{tokenizer_name} tokenizer")
    row_length = model.config.block_size
    return lambda items: [rewards[0] for rewards in numbers_of(
        model, model.rewards, items, row_length, "rewards")], fingerprint(model)


def add_reward_flags(parser):
    """The flags of reward_function."""
    add = parser.group("the run")
    add("--reward", choices=["learned", "ground_truth"], default="learned",
        help="the reward model, or the task's own reward if it has one (default learned)")
    add("--reward-model", type=path_type, help="default: reward.pt of the run")


def parse_args(argv):
    parser = Parser(__doc__)
    add_task_flags(parser)
    parser.group("the run")(
        "--sft", type=path_type, help="checkpoint to start from (default: sft.pt of the run)")
    add_reward_flags(parser)
    add = parser.group("PPO")
    add("--preset", choices=PRESETS,
        help="a row of the table PRESETS in this file, with --batch, --lr, --epochs and the flags "
             "below (default: small for reviews and imdb-small, else pretrained)")
    add("--minibatch", type=number_type(int, 1), help="answers per update (small: 64)")
    add("--critic-lr", type=number_type(float, 0, above=True), help="of the critic (small: 1e-3)")
    add("--beta", type=number_type(float, 0),
        help="strength of the KL penalty, as in DPO; with --target-kl, at the start (small: 0.2)")
    add("--target-kl", type=number_type(float, 0, above=True),
        help="adapt beta towards this KL, in nats (small: fixed beta)")
    add("--horizon", type=number_type(int, 1),
        help="--target-kl: beta changes by at most about a fifth per so many answers (small: 300)")
    add_training_flags(parser, PRESETS["small"] | DEFAULTS, "answers")
    add_measuring_flags(parser)
    parser.set_defaults(accumulate=1, init=None, tokenizer=None)
    args = parser.parse_args(argv)
    choose_task(args)
    fill_in(args, PRESETS[args.preset or task_of(args).ppo_preset], DEFAULTS)
    check_flags(args)
    return args


def check_reward(args):
    """Raise UserError if the task does not have the reward of --reward."""
    if args.reward == "ground_truth" and not task_of(args).has_reward:
        raise UserError("--reward ground_truth: only reviews and imdb have one")


def check_flags(args):
    """Raise UserError for flags that contradict each other."""
    check_reward(args)
    if args.batch % args.minibatch:
        raise UserError(f"--batch {args.batch} is not a multiple of --minibatch {args.minibatch}")
    if args.target_kl and (args.beta == 0 or args.batch >= 5 * args.horizon):
        raise UserError("--target-kl needs a --beta above 0 and a --horizon above a fifth of "
                        f"--batch {args.batch}: beta could not change, or could become negative")


if __name__ == "__main__":
    main()
