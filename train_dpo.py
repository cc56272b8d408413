"""Direct Preference Optimization (DPO): the mathematics, the step, the loop.

    python train_dpo.py                           # the reviews task: SFT if needed, then DPO
    python train_dpo.py --task imdb-small         # the same on real reviews, an hour on a CPU
    python train_dpo.py --task hh                 # GPT-2 on Anthropic's dialogues; or imdb, tldr
    python train_dpo.py --data pairs.jsonl        # your own preferences
    torchrun --nproc_per_node 8 train_dpo.py --task hh            # on eight GPUs

People compare two answers to a prompt x and prefer y_w to y_l. RLHF fits a reward model r to such
pairs and then looks for the policy pi (a language model) that maximises

    E[r(x, y)] - beta KL(pi || pi_ref)                                    E over answers y ~ pi

where the reference pi_ref is the model to stay close to, here the SFT model. The optimum is known:

    pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x)                     Z(x) makes it sum to 1
    r(x, y)  = beta log( pi*(y|x) / pi_ref(y|x) ) + beta log Z(x)         solved for r

The Bradley-Terry model says that y_w is preferred to y_l with probability sigma(r(x, y_w) -
r(x, y_l)), where sigma is the logistic function. Z(x) cancels in the difference. So DPO needs no
reward model: it fits the policy itself to the pairs, by maximum likelihood:

    loss = -log sigma( beta log[pi(y_w|x)/pi_ref(y_w|x)] - beta log[pi(y_l|x)/pi_ref(y_l|x)] )

The log-probs under pi_ref never change, so they are computed once, before training.

Writes to out/<task>/: preferences.jsonl (if the task samples its own), reference.json, dpo.pt,
dpo_metrics.csv, results.json. Not needed here: the reward model and PPO, which DPO replaces;
experiments/ has them.
Equations, sections and appendices named here are those of the paper, arXiv 2305.18290. The paper
writes y_w and y_l (winner and loser) for what is called the chosen and the rejected answer here.
"""

import copy
import math

import torch
import torch.nn.functional as F

import train_sft
from data import Batches, batches_in_order
from runtime.cli import begin_run, command
from runtime.errors import UserError
from runtime.parallel import set_compiled
from runtime.run import Run
from sample import add_reference, measure, ranked_correctly, sample_answers, tie_in_nats
from tasks import task_of
from tasks.checkpoint import open_start, plan_sft, save_checkpoint
from tasks.flags import parse_dpo_flags
from train_sft import grad_scaler, update, warmup

# The numbers that decide the result, those of Appendix B. It does not mention clipping; 10 is the
# value in the authors' code. Tasks with a reward sample four answers to each of 25,000 prompts, as
# in C.1. A task may have other numbers: its attribute `dpo`.
DEFAULTS = {"batch": 64, "epochs": 1.0, "lr": 1e-6, "warmup": 150, "beta": 0.1, "clip": 10.0,
            "weight_decay": 0.0, "samples": 4, "prefixes": 25_000, "gap": 0.0}
LOSSES = ["dpo", "plackett_luce", "unlikelihood"]
ON_RANKINGS = ["plackett_luce"]         # those whose batches are whole rankings, not pairs


# ------------------------------------------------------------------------------------------------
# The mathematics used in training: pure functions of log-probabilities
# ------------------------------------------------------------------------------------------------


def bradley_terry(r_w, r_l):
    """Eq. 16: log p(y_w > y_l | x) = log sigma(r_w - r_l), the log-probability that y_w is
    preferred. It is also exact where sigma underflows to 0: -1000 for r_w - r_l = -1000.

    r_w, r_l: rewards of the chosen and the rejected answer, of any shapes that broadcast.
    """
    return F.logsigmoid(r_w - r_l)


def implicit_reward(pi_logps, ref_logps, beta):
    """Eq. 17 without beta log Z(x): rhat(x, y) = beta log(pi(y|x) / pi_ref(y|x)). pi_logps,
    ref_logps: the two log-probs, of the same shape; the result has that shape too.

    The language model is secretly a reward model: pi is the optimum for the reward rhat(x, y) +
    beta log Z(x). The second term is the same for all answers to a prompt, so no preference depends
    on it (Lemma 1).
    """
    return beta * (pi_logps - ref_logps)


def dpo_loss(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Eq. 7 and Appendix B: the negative log-likelihood of the pairs under the Bradley-Terry model
    of the implicit rewards, -log sigma(rhat_w - rhat_l).

    pi_logps, ref_logps: (N,) log pi(y|x) of each answer under policy and reference.
    yw_idxs, yl_idxs: (P,) indices of the chosen and the rejected answer of each pair.
    beta: strength of the KL penalty; a larger one keeps the policy closer to the reference.
    Returns (losses (P,), rewards (N,)); the rewards are detached. (Appendix B writes B for N and T
    for P; they are not the rows B and tokens T of a batch.)
    """
    rewards = implicit_reward(pi_logps, ref_logps, beta)
    losses = -bradley_terry(rewards[yw_idxs], rewards[yl_idxs])
    return losses, rewards.detach()


def plackett_luce(rewards, ranking):
    """Eq. 18: the log-probability of a ranking, if answers are drawn one after the other, best
    first, each with probability proportional to exp(reward) among those that are left.

    rewards: (N,) one per answer. ranking: (..., K) indices into rewards, best first; a ranking of
    fewer than K answers is padded with -1. Returns (...), a log-probability for each ranking.
    """
    r = rewards[ranking.clamp(min=0)]                               # (..., K)
    later = r.masked_fill(ranking < 0, -math.inf)                   # padding is never drawn
    logp = torch.zeros_like(r[..., 0])
    for k in range(ranking.size(-1)):
        # The k-th answer is drawn among itself and all later ones. At padding there is only itself,
        # so the term is r - r = 0.
        candidates = torch.cat([r[..., k:k + 1], later[..., k + 1:]], dim=-1)
        logp = logp + r[..., k] - candidates.logsumexp(-1)
    return logp


def plackett_luce_loss(pi_logps, ref_logps, rankings, beta):
    """Eq. 20: DPO for rankings, -log p(ranking) under Plackett-Luce and the implicit rewards.

    rankings: (G, K) indices into the log-probs, best first, padded with -1. Returns (losses (G,),
    rewards (N,)); the rewards are detached. With K = 2 this is dpo_loss.
    """
    rewards = implicit_reward(pi_logps, ref_logps, beta)
    return -plackett_luce(rewards, rankings), rewards.detach()


def unlikelihood_loss(pi_logps, yw_idxs, yl_idxs):
    """C.3: -(log pi(y_w|x) - log pi(y_l|x)), which raises one and lowers the other.

    The baseline that degenerates: without a sigmoid no pair is ever ranked well enough, and without
    a reference nothing keeps the policy near fluent text. Returns losses (P,), unbounded below.
    (Elsewhere, "unlikelihood" is the loss -log(1 - p) of a token.)
    """
    return -(pi_logps[yw_idxs] - pi_logps[yl_idxs])


# ------------------------------------------------------------------------------------------------
# The mathematics used only by tests and experiments
# ------------------------------------------------------------------------------------------------


def log_partition(ref_logps, rewards, beta):
    """A.1: log Z(x) = log sum_y pi_ref(y|x) exp(r(x, y) / beta). The sum is over the last
    dimension, which must contain every possible answer y; the result lacks that dimension."""
    return (ref_logps + rewards / beta).logsumexp(-1)


def optimal_policy(ref_logps, rewards, beta):
    """Eq. 15: log pi*(y|x) = log pi_ref(y|x) + r(x, y) / beta - log Z(x), the policy that maximises
    E[r] - beta KL(pi || pi_ref). Last dimension: every possible answer y. Returns the same shape.
    """
    return ref_logps + rewards / beta - log_partition(ref_logps, rewards, beta)[..., None]


def dpo_gradient(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """A.4: d(sum of dpo_loss) / d pi_logps in closed form, (N,).

    Each pair adds -beta sigma(rhat_l - rhat_w) to its chosen answer and the opposite to its
    rejected one. Sigma is near 1 if the pair is ranked wrongly and near 0 if correctly.
    (A.4 prints it with w and l swapped.)
    """
    rewards = implicit_reward(pi_logps, ref_logps, beta)
    weights = beta * torch.sigmoid(rewards[yl_idxs] - rewards[yw_idxs])     # (P,)
    gradient = torch.zeros_like(pi_logps)                                   # (N,)
    return gradient.index_add(0, yw_idxs, -weights).index_add(0, yl_idxs, weights)


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


def train(policy, preferences, held_out, args):
    """DPO on preferences, a list of Encoded with their ref_logps. Trains the policy in place.
    held_out: more of them, for evaluation only. args: the flags of parse_args.

    The loss of a step is the sum of the losses of `objective` over all its micro-batches, divided
    by args.batch: every batch has exactly so many pairs (or rankings; the last one of an epoch
    takes some of the next). Adam's rate warms up
    to args.lr and then stays there. At step 0, the rewards go through check_start.
    """
    batches = Batches(preferences, args.batch, args.seed, whole=args.loss in ON_RANKINGS)
    optimizer, scaler = policy.optimizer(args.lr, args.weight_decay), grad_scaler(policy)
    run = Run("dpo", COLUMNS, args, batches, held_out, model=policy, optimizer=optimizer,
              scaler=scaler)
    tie = args.beta * tie_in_nats(policy.precision)                 # what rounding alone can cause

    def evaluate():
        evaluate_preferences(policy, held_out, args, run.log)
    for step in run.steps(evaluate):                                # evaluates, logs, saves
        for batch in run.micro_batches(step):                       # their gradients add up
            logps = policy.logps(batch)                             # (N,) log pi(y|x)
            losses, rewards = objective(logps, batch, args)         # per pair (ranking), per answer
            if step == 0:
                check_start(rewards, args, policy.precision)
            loss = losses.sum() / args.batch                        # its share of the batch mean
            scaler.scale(loss).backward()
            run.log.add(len(losses), loss=losses.detach().sum())    # a sum, and its count
            run.log.add(len(batch.chosen), **describe(logps.detach(), rewards, batch, tie))
        lr = args.lr * warmup(step, run.n_warmup)
        grad_norm = update(policy, optimizer, scaler, lr, args.clip)
        run.log.note_update(step, grad_norm, lr)


def objective(logps, batch, args):
    """(losses, rewards) of --loss: one loss per pair (or ranking), one reward per answer,
    detached."""
    if args.loss == "plackett_luce":
        return plackett_luce_loss(logps, batch.ref_logps, batch.rankings, args.beta)
    if args.loss == "unlikelihood":
        rewards = implicit_reward(logps, batch.ref_logps, args.beta).detach()
        return unlikelihood_loss(logps, batch.chosen, batch.rejected), rewards
    return dpo_loss(logps, batch.ref_logps, batch.chosen, batch.rejected, args.beta)


def describe(logps, rewards, batch, tie, prefix=""):
    """Sums over the pairs of a batch, for the log. A margin of at most `tie` counts as a tie."""
    w, l = batch.chosen, batch.rejected
    margins = rewards[w] - rewards[l]
    sums = {"accuracy": ranked_correctly(margins, tie).sum(), "margin": margins.sum(),
            "chosen_reward": rewards[w].sum(), "rejected_reward": rewards[l].sum(),
            "chosen_logp": logps[w].sum(), "rejected_logp": logps[l].sum()}
    return {prefix + name: total for name, total in sums.items()}


def check_start(rewards, args, precision):
    """Check that the policy equals the reference before the first update, so that every implicit
    reward is 0 (and the loss of DPO is log 2). If it does not, the two were computed differently,
    and every later number would be wrong. Raises UserError."""
    # What rounding can do to the longest answer of a batch, in nats, with room to spare. (None is
    # float32.)
    nats = 0.01 if precision is None else 1.0
    largest = rewards.abs().max()
    if not largest <= args.beta * nats:                             # NaN is refused too
        raise UserError(f"step 0: the largest implicit reward is {largest:.5f}, not 0: the policy "
                        "does not start at its reference")


@torch.no_grad()
def evaluate_preferences(policy, held_out, args, log):
    """Log the loss and what `describe` returns for all held-out preferences."""
    tie = args.beta * tie_in_nats(policy.precision)
    for batch in batches_in_order(held_out, args.row_length, policy):
        logps = policy.logps(batch)
        losses, rewards = objective(logps, batch, args)
        log.add(len(losses), held_out_loss=losses.sum())
        log.add(len(batch.chosen), **describe(logps, rewards, batch, tie, "held_out_"))


# {column of dpo_metrics.csv: (header, format) on the screen, or None}
COLUMNS = {"loss": ("loss", ".4f"), "accuracy": ("accuracy", ".1%"), "margin": ("margin", "+z.3f"),
           "chosen_reward": ("chosen", "+z.3f"), "rejected_reward": ("rejected", "+z.3f"),
           "chosen_logp": None, "rejected_logp": None, "grad_norm": ("grad norm", ".2f"),
           "lr": None, "held_out_loss": ("held out", ".4f"),
           "held_out_accuracy": ("accuracy", ".1%"), "held_out_margin": ("margin", "+z.3f"),
           "held_out_chosen_reward": None, "held_out_rejected_reward": None,
           "held_out_chosen_logp": None, "held_out_rejected_logp": None}
LEGEND = """\
Means over the steps since the line above. chosen, rejected: implicit rewards; margin: the first
minus the second; accuracy: share of pairs with a margin above 0 (a tie counts half); grad norm: of
the last step. On the right: loss, accuracy and margin now, on pairs that are not trained on."""


# ------------------------------------------------------------------------------------------------
# The experiment of C.1: an SFT model, sampled and ranked answers, reference log-probs, DPO, a table
# ------------------------------------------------------------------------------------------------

WRITES = ["dpo.pt", "dpo_metrics.csv", "reference.json", "preferences.jsonl", "results.json"]


@command
def main(argv=None):
    args = parse_args(argv)
    device = begin_run(args, reads=["sft", "data"], writes=WRITES)
    task = task_of(args)
    task.check(args)                                        # before SFT: files may be missing
    sft_flags, plan = plan_sft(args)
    print(f"1 of 5: {plan}")
    if sft_flags:
        train_sft.main(sft_flags)
    policy, tokenizer, facts = open_start(args, device, DEFAULTS["lr"])

    print("\n2 of 5: preferences" + (", sampled from the SFT model and ranked by the reward"
                                     if task.has_reward else f" of {task.source(args)}"))
    task.sample_preferences(policy, tokenizer, sample_answers, args)
    preferences, held_out = task.encoded_preferences(tokenizer, args)
    prompts = task.prompts(held_out, tokenizer, args)       # for the table at the end

    print("\n3 of 5: the log-probs of all answers under the reference, computed once")
    set_compiled(policy, preferences, args)
    reference = copy.deepcopy(policy)                       # it stays as it is
    add_reference(reference, preferences + held_out, args)

    print(f"\n4 of 5: DPO on {sum(len(item.pairs) for item in preferences):,} pairs of "
          f"{len(preferences):,} prompts ({len(held_out):,} held out), {args.loss}, "
          f"beta {args.beta:g}, on {device}\n{LEGEND}\n")
    train(policy, preferences, held_out, args)
    save_checkpoint(args.out / "dpo.pt", policy, reference, **facts, stage="dpo", beta=args.beta,
                    loss=args.loss)
    print(f"wrote {args.out / 'dpo.pt'}")

    print("\n5 of 5: both models measured on prompts that were not trained on")
    measure(args.out / "results.json", {"sft": reference, "dpo": policy}, reference, prompts,
            tokenizer, args, beta=args.beta)
    print(f"try: python sample.py --compare {args.sft} {args.out / 'dpo.pt'}")
    (args.out / "dpo_state.pt").unlink(missing_ok=True)     # the run has finished


def parse_args(argv):
    return parse_dpo_flags(__doc__, argv, DEFAULTS, LOSSES, ON_RANKINGS)


if __name__ == "__main__":
    main()
