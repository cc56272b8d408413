"""Direct Preference Optimization: the mathematics, the step, the loop.

    python train_dpo.py                           # the reviews task: SFT if needed, then DPO
    python train_dpo.py --task hh                 # GPT-2 on Anthropic's dialogues, or --task tldr
    python train_dpo.py --data pairs.jsonl        # your own preferences
    torchrun --nproc_per_node 8 train_dpo.py --task hh            # on eight GPUs

    loss = -log sigma( beta log pi(y_w|x)/pi_ref(y_w|x) - beta log pi(y_l|x)/pi_ref(y_l|x) )

People compare two answers to a prompt x and prefer y_w to y_l. RLHF fits a reward model to such
pairs and then optimizes a policy for that reward. DPO skips the reward model: every policy is the
optimal one for some reward, its implicit reward, so the policy itself can be fitted to the pairs,
with the loss above. The reference pi_ref is the SFT model. It never changes, so its log-probs are
computed once, before training.

Writes to out/<task>/: preferences.jsonl (if the task samples its own), reference.json, dpo.pt,
metrics.csv, results.json. Left out on purpose: the reward model and PPO, which DPO replaces.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import train_sft
from data import Batches, batches_in_order, micro_batches, rank_answers
from runtime.checkpoint import check_sft_checkpoint, data_source, open_checkpoint, save_checkpoint
from runtime.cli import (
    Parser,
    add_measuring_flags,
    add_shared_flags,
    add_training_flags,
    check_row_length,
    choose_task,
    command,
    flags_for_sft,
    number_type,
    set_up,
    warn_of_large_lr,
)
from runtime.errors import UserError
from runtime.files import make_folder, read_cached, write_cached, write_json
from runtime.parallel import compiled_logps, set_compiled, sum_gradients
from runtime.report import side_by_side, table
from runtime.run import Log, TrainingState, fingerprint, is_time
from sample import decode_answer, encode_prompt, evaluate, sample, score
from tasks import encode_splits, reviews, task_of
from train_sft import grad_scaler, update, warmup

# Defaults that depend on the task. Appendix B has beta 0.1 (0.5 for TL;DR) and learning rate 1e-6.
# The model of the reviews is 260 times smaller than the smallest GPT-2, so its few weights have to
# move further, and beta 0.1 would cost it too much of its grammar.
PAPER_LR = 1e-6
BETA = {"reviews": 0.5, "hh": 0.1, "tldr": 0.5, "--data": 0.1}
LR = {"reviews": 3.5e-5, "hh": PAPER_LR, "tldr": PAPER_LR, "--data": PAPER_LR}


# ------------------------------------------------------------------------------------------------
# The mathematics that training uses. Pure functions of log-probabilities.
# ------------------------------------------------------------------------------------------------


def bradley_terry(r_w, r_l):
    """Eq. 16: log p(y_w > y_l | x) = log sigma(r_w - r_l), the log-probability that y_w is
    preferred.

    r_w, r_l: rewards of the winner and the loser, of any shapes that broadcast.
    """
    return F.logsigmoid(r_w - r_l)


def implicit_reward(pi_logps, ref_logps, beta):
    """Eq. 17 without beta log Z(x): rhat(x, y) = beta log(pi(y|x) / pi_ref(y|x)).

    The language model is secretly a reward model: pi is optimal for the reward rhat + beta log Z.
    The second term is the same for all answers to a prompt, so no preference depends on it
    (Lemma 1).
    """
    return beta * (pi_logps - ref_logps)


def dpo_loss(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Appendix B: the negative log-likelihood of the pairs under the Bradley-Terry model of the
    implicit rewards, -log sigma(rhat_w - rhat_l).

    pi_logps, ref_logps: (N,) log pi(y|x) of each answer under policy and reference.
    yw_idxs, yl_idxs: (P,) indices of the preferred and the dispreferred answer of each pair.
    beta: strength of the KL penalty; a larger one keeps the policy closer to the reference.
    Returns (losses (P,), rewards (N,)); the rewards are detached. (Appendix B writes B for N and T
    for P.)
    """
    rewards = implicit_reward(pi_logps, ref_logps, beta)
    losses = -bradley_terry(rewards[yw_idxs], rewards[yl_idxs])
    return losses, rewards.detach()


def plackett_luce(rewards, ranking):
    """Eq. 18: the log-probability of a ranking, if answers are drawn one after the other, best
    first, each with probability proportional to exp(reward) among those that are left.

    rewards: (N,) one per answer. ranking: (..., K) indices into rewards, best first; a ranking of
    fewer than K answers is padded with -1. Returns (...).
    """
    r = rewards[ranking.clamp(min=0)]                               # (..., K)
    not_padding = r.masked_fill(ranking < 0, -math.inf)
    logp = torch.zeros_like(r[..., 0])
    for k in range(ranking.size(-1)):
        # Those that are left: the k-th answer and all after it. A -1 is left alone and adds 0.
        left = torch.cat([r[..., k:k + 1], not_padding[..., k + 1:]], dim=-1)
        logp = logp + r[..., k] - left.logsumexp(-1)
    return logp


def plackett_luce_loss(pi_logps, ref_logps, rankings, beta):
    """Eq. 20: DPO for rankings, -log p(ranking) under Plackett-Luce and the implicit rewards.

    rankings: (G, K) indices into the log-probs, best first, padded with -1. Returns (losses (G,),
    rewards (N,)); the rewards are detached. With K = 2 this is dpo_loss.
    """
    rewards = implicit_reward(pi_logps, ref_logps, beta)
    return -plackett_luce(rewards, rankings), rewards.detach()


def unlikelihood_loss(pi_logps, yw_idxs, yl_idxs):
    """C.3: -(log pi(y_w|x) - log pi(y_l|x)), raise one and lower the other.

    The baseline that degenerates: without a sigmoid no pair is ever ranked well enough, and without
    a reference nothing preserves the language. Returns losses (P,), unbounded below.
    """
    return -(pi_logps[yw_idxs] - pi_logps[yl_idxs])


# ------------------------------------------------------------------------------------------------
# The mathematics behind it, which the tests and experiments use
# ------------------------------------------------------------------------------------------------


def log_partition(ref_logps, rewards, beta):
    """A.1: log Z(x) = log sum_y pi_ref(y|x) exp(r(x, y) / beta). The sum is over the last
    dimension, which must contain every possible answer y. Returns the shape without it."""
    return (ref_logps + rewards / beta).logsumexp(-1)


def optimal_policy(ref_logps, rewards, beta):
    """Eq. 15: log pi*(y|x) = log pi_ref(y|x) + r(x, y) / beta - log Z(x), the policy that maximizes
    E[r] - beta KL(pi || pi_ref). Last dimension: every possible answer y. Returns the same shape.
    """
    return ref_logps + rewards / beta - log_partition(ref_logps, rewards, beta)[..., None]


def dpo_gradient(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """A.4: d(sum of dpo_loss) / d pi_logps in closed form, (N,).

    Each pair adds -beta sigma(rhat_l - rhat_w) to its winner and the opposite to its loser. The
    weight is large if the pair is ranked wrongly. (A.4 prints it with w and l swapped.)
    """
    rewards = implicit_reward(pi_logps, ref_logps, beta)
    weights = beta * torch.sigmoid(rewards[yl_idxs] - rewards[yw_idxs])     # (P,)
    gradient = torch.zeros_like(pi_logps)                                   # (N,)
    return gradient.index_add(0, yw_idxs, -weights).index_add(0, yl_idxs, weights)


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------

COLUMNS = {"loss": ".4f", "accuracy": ".1%", "margin": "+.3f", "chosen_reward": "+.3f",
           "rejected_reward": "+.3f", "chosen_logp": ".1f", "rejected_logp": ".1f",
           "grad_norm": ".2f", "lr": ".1e", "held_out_loss": ".4f", "held_out_accuracy": ".1%"}


def train(policy, preferences, held_out, args):
    """DPO on preferences, a list of Encoded with their ref_logps. Trains the policy in place."""
    batches = Batches(preferences, args.batch, args.seed, whole=args.loss == "plackett_luce")
    n_steps = args.steps or math.ceil(args.epochs * batches.per_epoch / args.batch)
    optimizer = policy.optimizer(args.lr, args.weight_decay)
    scaler = grad_scaler(policy)
    log = Log(args.out / "metrics.csv", COLUMNS, batches, scaler)
    state = TrainingState(args.out / "dpo_state.pt", args, policy, optimizer, scaler, log, batches,
                          held_out)
    logps_of = compiled_logps(policy)                               # policy.logps, perhaps compiled
    for step in state.steps(n_steps, "DPO"):
        # One batch: forward and backward, a micro-batch at a time. Gradients add up.
        for batch in micro_batches(batches[step], state.micro_batches, args.row_length, policy):
            logps = logps_of(batch)                                 # (N,) log pi(y|x)
            losses, rewards = objective(logps, batch, args)         # (P,) and (N,)
            scaler.scale(losses.sum() / args.batch).backward()      # mean over the whole batch
            log.add(len(losses), loss=losses.detach().sum())
            log.add(len(batch.winners), **describe(logps.detach(), rewards, batch))
            if step == 0:
                check_start(logps.detach(), batch, args, policy.precision)
        # One update.
        sum_gradients(policy)                                       # over all processes
        lr = args.lr * warmup(step, args.warmup)
        grad_norm = update(policy, optimizer, scaler, lr, args.clip)
        log.end_step(step, grad_norm, lr)
        # Evaluate on held-out pairs, write a line of the log, save what the next step depends on.
        evaluating = held_out and is_time(step, n_steps, args.eval_every)
        if evaluating:
            evaluate_preferences(policy, held_out, args, log)
        if evaluating or is_time(step, n_steps, args.log_every):
            log.write(step)
        state.save_if_due(step)


def objective(logps, batch, args):
    """(losses, rewards) of --loss: one loss per pair (or ranking), one reward per answer,
    detached."""
    if args.loss == "plackett_luce":
        return plackett_luce_loss(logps, batch.ref_logps, batch.rankings, args.beta)
    if args.loss == "unlikelihood":
        rewards = implicit_reward(logps, batch.ref_logps, args.beta).detach()
        return unlikelihood_loss(logps, batch.winners, batch.losers), rewards
    return dpo_loss(logps, batch.ref_logps, batch.winners, batch.losers, args.beta)


TIE = 1e-4          # in float32, margins of long answers are not exact to more than this


def describe(logps, rewards, batch):
    """What to log: sums over the pairs of a batch. A tie counts as half right, so the accuracy is
    50 % before the first update, rather than noise from rounding."""
    w, l = batch.winners, batch.losers
    margins = rewards[w] - rewards[l]
    ahead = margins.sign() * (margins.abs() > TIE)                  # 1, 0 or -1
    return {"accuracy": (ahead + 1).sum() / 2, "margin": margins.sum(),
            "chosen_reward": rewards[w].sum(), "rejected_reward": rewards[l].sum(),
            "chosen_logp": logps[w].sum(), "rejected_logp": logps[l].sum()}


def check_start(logps, batch, args, precision):
    """Check that before the first update the policy equals the reference: every reward is 0, and
    the loss is that of equal models (log 2 for DPO). Otherwise the two were computed differently,
    and every later number would be off. Raises UserError."""
    losses, rewards = objective(logps, batch, args)
    expected, _ = objective(batch.ref_logps, batch, args)
    tolerance = args.beta * (0.01 if precision is None else 1.0)    # nats, times beta
    loss_off = (losses - expected).mean().abs()
    if args.loss == "unlikelihood":                                 # has no reference
        loss_off = 0
    if not (rewards.abs().max() <= tolerance and loss_off <= tolerance):
        raise UserError(f"step 0: the loss is {losses.mean():.5f}, not {expected.mean():.5f}: the "
                        "policy does not start at its reference")


@torch.no_grad()
def evaluate_preferences(policy, held_out, args, log):
    """Log the loss and the accuracy over all held-out preferences."""
    logps_of = compiled_logps(policy)
    for batch in batches_in_order(held_out, args.row_length, policy):
        logps = logps_of(batch)
        losses, rewards = objective(logps, batch, args)
        log.add(len(losses), held_out_loss=losses.sum())
        log.add(len(batch.winners), held_out_accuracy=describe(logps, rewards, batch)["accuracy"])


# ------------------------------------------------------------------------------------------------
# The pipeline of C.1: an SFT model, sampled and ranked answers, reference log-probs, DPO, a table
# ------------------------------------------------------------------------------------------------


@command
def main(argv=None):
    args = parse_args(argv)
    device, task = set_up(args), task_of(args)
    make_folder(args.out)
    sft_path = find_or_train_sft(args)
    policy, tokenizer, facts = open_checkpoint(sft_path, device, args)
    check_sft_checkpoint(sft_path, policy, facts, args)
    check_row_length(args, policy.config.block_size)
    set_compiled(policy, args.compile)

    if task is reviews:
        sample_preferences(policy, tokenizer, args)
    preferences, held_out = encode_splits(task.preferences(args), task.name(args), tokenizer, args)
    add_reference(policy, preferences + held_out, args)
    warn_of_large_lr(args, PAPER_LR, facts.get("init", "random"))
    print(f"DPO of {sft_path} on {sum(len(item.pairs) for item in preferences):,} pairs of "
          f"{len(preferences):,} prompts, {args.loss}, beta {args.beta:g}, on {device}")
    train(policy, preferences, held_out, args)
    save_checkpoint(args.out / "dpo.pt", policy, tokenizer=facts["tokenizer"], stage="dpo",
                    init=facts.get("init", "random"), seed=args.seed, beta=args.beta,
                    loss=args.loss, **data_source(args))
    print(f"wrote {args.out / 'dpo.pt'}")
    reference, _, _ = open_checkpoint(sft_path, device, args)
    report(policy, reference, held_out, tokenizer, sft_path, args)
    (args.out / "dpo_state.pt").unlink(missing_ok=True)     # the run has finished


def find_or_train_sft(args):
    """The path of the SFT model to start from. Runs SFT first if there is none."""
    if args.sft:
        print(f"starting from {args.sft}")
        return args.sft
    path = args.out / "sft.pt"
    unfinished = (args.out / "sft_state.pt").exists()
    if args.fresh:
        print("--fresh: running SFT first")
    elif args.resume and unfinished:
        print(f"{path} is from an unfinished run; running SFT first")
    elif not path.exists():
        print(f"no {path} yet; running SFT first")
    else:
        later = ", but a later SFT run did not finish; --resume would continue it"
        print(f"starting from {path}" + (later if unfinished else ""))
        return path
    train_sft.main(flags_for_sft(args))
    return path


def sample_preferences(sft, tokenizer, args):
    """Sample --samples answers to each of --prefixes prefixes from the SFT model, rank them by the
    ground-truth reward, and write them to preferences.jsonl. One prefix in ten is held out.

    The file is reused if the same model and flags wrote it (see runtime.files.read_cached).
    """
    path = args.out / "preferences.jsonl"
    key = " ".join(map(str, (fingerprint(sft), sft.device.type, sft.precision, args.seed,
                             args.prefixes, args.samples, args.max_new_tokens)))
    if read_cached(path, key) is not None:
        print(f"{path}: already sampled by the same model with the same flags")
        return
    n_held_out = max(1, args.prefixes // 10)
    prompts = (reviews.prefixes(args.prefixes - n_held_out, False, tokenizer, args.seed)
               + reviews.prefixes(n_held_out, True, tokenizer, args.seed))
    repeated = [encode_prompt(prompt, tokenizer) for prompt in prompts for _ in range(args.samples)]
    answers = sample(sft, repeated, args.max_new_tokens, args.seed, tokenizer.eot_token,
                     progress="sampling answers")
    n_unfinished, rows = 0, []
    for i, prompt in enumerate(prompts):
        sampled = answers[i * args.samples:(i + 1) * args.samples]
        finished = [decode_answer(ids, tokenizer) for ids in sampled
                    if ids[-1] == tokenizer.eot_token and len(ids) > 1]
        n_unfinished += len(sampled) - len(finished)
        rewards = [reviews.reward(prompt + answer) for answer in finished]
        rows.append(rank_answers(prompt, finished, rewards))
    ranked = [row for row in rows if row]
    if not ranked:
        raise UserError("no prompt got two finished answers of different reward: train SFT for "
                        "longer, or raise --max-new-tokens")
    write_cached(path, key, "".join(json.dumps(row) + "\n" for row in ranked))
    print(f"{path}: ranked the answers to {len(ranked):,} prompts; left out "
          f"{len(rows) - len(ranked)} prompts (all rewards equal) and {n_unfinished} answers "
          "(empty or unfinished)")


def add_reference(policy, items, args):
    """Compute the reference log-probs: those of the policy before its first update. They are cached
    in reference.json, for the same weights, data and precision."""
    path = args.out / "reference.json"
    key = " ".join(map(str, (fingerprint(policy), fingerprint(items), args.row_length,
                             policy.device.type, policy.precision, policy.compiled)))
    cached = read_cached(path, key)
    if cached is not None:
        print(f"{path}: already computed by the same model for the same answers")
        logps = json.loads(cached)
    else:
        logps = score(policy, items, args.row_length, "reference log-probs")
        write_cached(path, key, json.dumps(logps))
    for item, ref_logps in zip(items, logps):
        item.ref_logps = ref_logps


def report(policy, reference, held_out, tokenizer, sft_path, args):
    """Measure both models on held-out prompts, print samples and the table, write results.json."""
    task = task_of(args)
    prompts = task.prompts(held_out, tokenizer, args)
    if len(prompts) < 2:
        print(f"{task.name(args)}: fewer than two held-out prompts, so no samples are measured")
        return
    measures, texts = evaluate({"sft": reference, "dpo": policy}, reference, prompts, tokenizer,
                               args.max_new_tokens, args.seed + 1, task.reward, task.well_formed)
    write_json(args.out / "results.json", {
        "task": args.task or args.data.name, "beta": args.beta, "prompts": len(prompts),
        "policies": measures})
    print(side_by_side(prompts[:4], texts, task.reward))
    interval = "; win rate with its 95 % interval" if task.reward else ""
    print(f"\n{len(prompts):,} held-out prompts, one sample each, mean +- standard error{interval}"
          f"\n{table(measures)}")
    print(f"\nwrote {args.out / 'results.json'}; try: "
          f"python sample.py --compare {sft_path} {args.out / 'dpo.pt'}")


def parse_args(argv):
    parser = Parser(__doc__)
    add_shared_flags(parser)
    add_training_flags(parser, 64, "pairs (or rankings with plackett_luce)", warmup=150)
    add_measuring_flags(parser)
    add = parser.add_argument
    add("--loss", default="dpo", choices=["dpo", "plackett_luce", "unlikelihood"],
        help="dpo on pairs, Plackett-Luce on rankings (A.3), or the baseline of C.3 (default dpo)")
    add("--beta", type=number_type(float, 0, above=True),
        help="strength of the KL penalty; a larger one stays closer to the reference (default 0.1; "
             "0.5 for tldr and reviews)")
    add("--lr", type=number_type(float, 0, above=True),
        help="learning rate after warm-up (default 1e-6; 3.5e-5 for reviews)")
    add("--sft", type=Path,
        help="checkpoint to start from, or a folder as for --init (default: sft.pt of the run, "
             "trained first if there is none)")
    add("--fresh", action="store_true", help="train SFT again even if there is an sft.pt")
    add("--prefixes", type=number_type(int, 10), default=4200,
        help="reviews: prompts to sample answers for (default 4,200; C.1 has 25,000)")
    add("--samples", type=number_type(int, 2), default=4,
        help="reviews: answers sampled for each prompt (default 4)")
    args = parser.parse_args(argv)
    choose_task(args)
    args.lr = args.lr or LR[args.task or "--data"]
    args.beta = args.beta or BETA[args.task or "--data"]
    if args.sft and (args.fresh or args.init):
        raise UserError("--fresh and --init are for a new SFT model, --sft names one: choose")
    if args.fresh and args.resume:
        raise UserError("--fresh starts again, --resume continues: choose")
    return args


if __name__ == "__main__":
    main()
