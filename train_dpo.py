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
metrics.csv, results.json. Not needed here: the reward model and PPO, which DPO replaces;
experiments/ has them.
Equations, sections and appendices named here are those of the paper, arXiv 2305.18290. The paper
writes y_w and y_l (winner and loser) for what is called the chosen and the rejected answer here.
"""

import json
import math

import torch
import torch.nn.functional as F

import train_sft
from data import (
    Batches,
    batches_in_order,
    check_rankings,
    micro_batches,
    rank_answers,
    separate,
)
from runtime.checkpoint import check_sft_checkpoint, data_source, open_checkpoint, save_checkpoint
from runtime.cli import choose_row_length, command, set_up, warn_of_large_lr
from runtime.errors import UserError
from runtime.files import cache_key, cached, claim_folder, write_json
from runtime.flags import flags_for_sft, needs_sft, parse_dpo_flags
from runtime.parallel import compiled_logps, sum_gradients
from runtime.report import final_report
from runtime.run import Log, TrainingState, is_due
from sample import (
    decode_answer,
    encode_prompt,
    evaluate,
    ranked_correctly,
    sample,
    score,
    tie_in_nats,
)
from tasks import encode_splits, evaluated, task_of
from train_sft import grad_scaler, update, warmup

# Defaults that depend on the task; all others are in runtime/flags.py. Appendix B has Adam with
# learning rate 1e-6, 150 steps of warm-up and beta 0.1 (0.5 for TL;DR). The reviews need others:
# their model is 900 times smaller than the smallest GPT-2, so its few weights have to move further;
# the run has only 176 steps; and with beta 0.1, fewer of the texts would be well-formed.
# Tasks with a reward sample answers and rank them: `prefixes` is the number of prompts (25,000 in
# C.1). If the rewards of two answers differ by less than `gap`, only the better one is kept.
PAPER_LR = 1e-6
DEFAULTS = {
    "reviews": dict(beta=0.5, lr=1e-4, warmup=50, prefixes=2100, gap=0.0),
    "imdb-small": dict(beta=0.5, lr=1e-4, warmup=150, prefixes=4000, gap=0.5),
    "imdb": dict(beta=0.1, lr=PAPER_LR, warmup=150, prefixes=25_000, gap=0.5),
    "hh": dict(beta=0.1, lr=PAPER_LR, warmup=150),
    "tldr": dict(beta=0.5, lr=PAPER_LR, warmup=150),
    "own file": dict(beta=0.1, lr=PAPER_LR, warmup=150),
}


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

COLUMNS = {"loss": ".4f", "accuracy": ".1%", "margin": "+.3f", "chosen_reward": "+.3f",
           "rejected_reward": "+.3f", "chosen_logp": ".1f", "rejected_logp": ".1f",
           "grad_norm": ".2f", "lr": ".1e", "held_out_loss": ".4f", "held_out_accuracy": ".1%"}


def train(policy, preferences, held_out, args):
    """DPO on preferences, a list of Encoded with their ref_logps. Trains the policy in place.
    held_out: more of them, for evaluation only. args: the flags of parse_args.

    The loss of a step is the sum of the losses of `objective` over all its micro-batches, divided
    by args.batch, the number of pairs (for plackett_luce, of whole rankings). The optimizer is that
    of GPT.optimizer; its rate warms up to args.lr and then stays there. At step 0, the rewards of
    every micro-batch go through check_start before the first update. Logs the losses and what
    `describe` returns to args.out/metrics.csv; the state for --resume is args.out/dpo_state.pt.
    """
    batches = Batches(preferences, args.batch, args.seed, whole=args.loss == "plackett_luce")
    n_steps = args.steps or math.ceil(args.epochs * batches.per_epoch / args.batch)
    optimizer = policy.optimizer(args.lr, args.weight_decay)
    scaler = grad_scaler(policy)
    # The log needs batches and scaler to report a gradient that is not finite. The state is saved
    # for --resume, which needs the data to check that it is still the same.
    log = Log(args.out / "metrics.csv", COLUMNS, batches, scaler)
    state = TrainingState(args.out / "dpo_state.pt", args, policy, optimizer, scaler, log, batches,
                          held_out)
    logps_of = compiled_logps(policy)                               # policy.logps, perhaps compiled
    tie = args.beta * tie_in_nats(policy.precision)                 # smaller margins are ties
    for step in state.steps(n_steps, "DPO"):                        # from 0, or with --resume later
        # At some steps, evaluate on held-out pairs, with the weights that this step starts from.
        evaluating = held_out and is_due(step, n_steps, args.eval_every)
        if evaluating:
            evaluate_preferences(policy, held_out, args, log)
        # One batch of args.batch pairs, forward and backward. The gradients of its micro-batches
        # (state.n_micro_batches of them, --accumulate or as few as fit in memory) add up.
        for micro_batch in micro_batches(batches[step], state.n_micro_batches, args.row_length,
                                         policy):
            logps = logps_of(micro_batch)                           # (N,) log pi(y|x)
            losses, rewards = objective(logps, micro_batch, args)   # per pair (ranking), per answer
            loss = losses.sum() / args.batch                        # its share of the batch mean
            scaler.scale(loss).backward()
            log.add(len(losses), loss=losses.detach().sum())        # a sum, and its count
            log.add(len(micro_batch.chosen), **describe(logps.detach(), rewards, micro_batch, tie))
            if step == 0:
                check_start(rewards, args, policy.precision)
        # One update.
        sum_gradients(policy)                                       # of all processes
        lr = args.lr * warmup(step, args.warmup)
        grad_norm = update(policy, optimizer, scaler, lr, args.clip)
        log.note_update(step, grad_norm, lr)
        # At some steps, the same for all processes, write a line of the log or save the state.
        if evaluating or is_due(step, n_steps, args.log_every):
            log.write(step)
        state.save_if_due(step)


def objective(logps, batch, args):
    """(losses, rewards) of --loss: one loss per pair (or ranking), one reward per answer,
    detached."""
    if args.loss == "plackett_luce":
        return plackett_luce_loss(logps, batch.ref_logps, batch.rankings, args.beta)
    if args.loss == "unlikelihood":
        rewards = implicit_reward(logps, batch.ref_logps, args.beta).detach()
        return unlikelihood_loss(logps, batch.chosen, batch.rejected), rewards
    return dpo_loss(logps, batch.ref_logps, batch.chosen, batch.rejected, args.beta)


def describe(logps, rewards, batch, tie):
    """Sums over the pairs of a batch, for the log. A margin of at most `tie` counts as a tie."""
    w, l = batch.chosen, batch.rejected
    margins = rewards[w] - rewards[l]
    return {"accuracy": ranked_correctly(margins, tie).sum(),
            "margin": margins.sum(),
            "chosen_reward": rewards[w].sum(), "rejected_reward": rewards[l].sum(),
            "chosen_logp": logps[w].sum(), "rejected_logp": logps[l].sum()}


def check_start(rewards, args, precision):
    """Check that the policy equals the reference before the first update, so that every implicit
    reward is 0 (and the loss of DPO is log 2). If it does not, the two were computed differently,
    and every later number would be wrong. Raises UserError."""
    if not rewards.isfinite().all():
        raise UserError("step 0: a log-prob of the model that DPO starts from is NaN or infinite; "
                        "start from another one, or use --precision float32")
    # What rounding can do to the longest answer of a batch, in nats, with room to spare.
    nats = 0.01 if precision is None else 1.0
    largest = rewards.abs().max()
    if largest > args.beta * nats:
        raise UserError(f"step 0: the largest implicit reward is {largest:.5f}, not 0: the policy "
                        "does not start at its reference")


@torch.no_grad()
def evaluate_preferences(policy, held_out, args, log):
    """Log the loss and the accuracy over all held-out preferences."""
    logps_of, tie = compiled_logps(policy), args.beta * tie_in_nats(policy.precision)
    for batch in batches_in_order(held_out, args.row_length, policy):
        logps = logps_of(batch)
        losses, rewards = objective(logps, batch, args)
        log.add(len(losses), held_out_loss=losses.sum())
        described = describe(logps, rewards, batch, tie)
        log.add(len(batch.chosen), held_out_accuracy=described["accuracy"])


# ------------------------------------------------------------------------------------------------
# The experiment of C.1: an SFT model, sampled and ranked answers, reference log-probs, DPO, a table
# ------------------------------------------------------------------------------------------------


@command
def main(argv=None):
    args = parse_args(argv)
    device = set_up(args)                                   # also sets args.out
    claim_folder(args.out)
    task, source = task_of(args), data_source(args)
    if task.open_reward:
        task.open_reward(args)                              # if it is missing, say so before SFT
    sft_path = args.sft or args.out / "sft.pt"
    if needs_sft(sft_path, args):
        train_sft.main(flags_for_sft(args))
    policy, tokenizer, facts = open_checkpoint(sft_path, device, args)
    check_sft_checkpoint(sft_path, policy, facts, source, args)
    choose_row_length(args, policy.config.block_size)

    if task.open_reward:                                    # a task without preferences
        sample_preferences(policy, tokenizer, args)
    preferences, held_out = encode_splits(task.preferences(args), task.name(args), tokenizer, args)
    if args.loss == "plackett_luce":
        check_rankings(preferences + held_out, task.name(args))
    prompts = task.prompts(held_out, tokenizer, args)       # for the table at the end
    add_reference(policy, preferences + held_out, args)
    warn_of_large_lr(args, PAPER_LR, facts.get("init", "random"))
    print(f"DPO of {sft_path} on {sum(len(item.pairs) for item in preferences):,} pairs of "
          f"{len(preferences):,} prompts, {args.loss}, beta {args.beta:g}, on {device}")
    train(policy, preferences, evaluated(held_out), args)
    save_checkpoint(args.out / "dpo.pt", policy, tokenizer=facts["tokenizer"], stage="dpo",
                    init=facts.get("init", "random"), seed=args.seed, beta=args.beta,
                    loss=args.loss, **source)
    print(f"wrote {args.out / 'dpo.pt'}")
    reference, _, _ = open_checkpoint(sft_path, device, args)
    report(policy, reference, prompts, tokenizer, sft_path, args)
    (args.out / "dpo_state.pt").unlink(missing_ok=True)     # the run has finished


def sample_preferences(sft, tokenizer, args):
    """Sample --samples answers to each of --prefixes prefixes from the SFT model, rank them by the
    ground-truth reward, and write them to preferences.jsonl. One prefix in ten is held out."""
    key = cache_key(sft, sft.device.type, sft.precision, task_of(args).digest(args), args.seed,
                    args.prefixes, args.samples, args.max_new_tokens, args.gap)
    cached(args.out / "preferences.jsonl", key, lambda: ranked_samples(sft, tokenizer, args))


def ranked_samples(sft, tokenizer, args):
    """The content of preferences.jsonl: a JSON object per prompt, as rank_answers makes it, and
    which of its answers are unfinished."""
    task = task_of(args)
    prompts = task.sampling_prompts(tokenizer, args)
    repeated = [prompt for prompt in prompts for _ in range(args.samples)]
    sampled = sample(sft, [encode_prompt(prompt, tokenizer) for prompt in repeated],
                     args.max_new_tokens, args.seed, tokenizer.eot_token,
                     progress="sampling answers")
    texts = [decode_answer(ids, tokenizer) for ids in sampled]
    ended = [ids[-1] == tokenizer.eot_token for ids in sampled]
    usable = [text.strip() != "" and (end or not task.answers_must_end)
              for text, end in zip(texts, ended)]
    rewards = task.open_reward(args)([prompt + text for prompt, text in zip(repeated, texts)])
    ranked, n_near_ties = [], 0
    for k, prompt in enumerate(prompts):
        mine = [i for i in range(k * args.samples, (k + 1) * args.samples) if usable[i]]
        kept = [mine[j] for j in separate([rewards[i] for i in mine], args.gap)]
        n_near_ties += len(mine) - len(kept)
        row = rank_answers(prompt, [texts[i] for i in kept], [rewards[i] for i in kept])
        unfinished = {texts[i] for i in kept if not ended[i]}
        if row and unfinished:
            row["unfinished"] = [j for j, text in enumerate(row["answers"]) if text in unfinished]
        if row:
            ranked.append(row)
    if not ranked:
        raise UserError("no prompt got two usable answers of different reward: train SFT for "
                        "longer, lower --gap, or raise --max-new-tokens")
    left_out = [f"{len(prompts) - len(ranked)} prompts (fewer than two rewards)",
                f"{len(usable) - sum(usable)} answers (empty or unfinished)"]
    if args.gap:
        left_out.append(f"{n_near_ties} answers (within {args.gap:g} of a better one)")
    print(f"sampled and ranked the answers to {len(ranked):,} prompts; left out "
          + ", ".join(left_out))
    return "".join(json.dumps(row) + "\n" for row in ranked)


def add_reference(policy, items, args):
    """Set ref_logps of a list of Encoded to the log-probs under the reference, which is the policy
    before its first update. They are kept in reference.json."""
    key = cache_key(policy, items, args.row_length, policy.device.type, policy.precision,
                    policy.compiled)
    logps = cached(args.out / "reference.json", key, lambda: json.dumps(
        score(policy, items, args.row_length, "reference log-probs")))
    for item, ref_logps in zip(items, json.loads(logps)):
        item.ref_logps = ref_logps


def report(policy, reference, prompts, tokenizer, sft_path, args):
    """Measure both models on held-out prompts (texts), print samples and the table, write
    results.json."""
    task = task_of(args)
    if len(prompts) < 2:
        print(f"{task.name(args)}: fewer than two held-out prompts, so no samples are measured")
        return
    grades = task.open_grades(args, reference, tokenizer)
    measures, texts = evaluate({"sft": reference, "dpo": policy}, reference, prompts, tokenizer,
                               args.max_new_tokens, args.seed + 1, grades)
    write_json(args.out / "results.json", {
        "task": args.task or args.data.name, "beta": args.beta, "prompts": len(prompts),
        "policies": measures})
    print(final_report(prompts, texts, measures, grades.get("reward"),
                       "; win rate with its 95 % interval" if grades else ""))
    print(f"\nwrote {args.out / 'results.json'}; try: "
          f"python sample.py --compare {sft_path} {args.out / 'dpo.pt'}")


def parse_args(argv):
    return parse_dpo_flags(__doc__, argv, DEFAULTS)


if __name__ == "__main__":
    main()
