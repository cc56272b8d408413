"""Direct Preference Optimization: the mathematics, the step, the loop.

    python train_dpo.py                           # the reviews task: SFT if there is none, then DPO
    python train_dpo.py --task hh                 # GPT-2 on Anthropic's dialogues, or --task tldr
    python train_dpo.py --data pairs.jsonl        # your own preferences
    torchrun --nproc_per_node 8 train_dpo.py --task hh            # on eight GPUs

    loss = -log sigma( beta log pi(y_w|x)/pi_ref(y_w|x) - beta log pi(y_l|x)/pi_ref(y_l|x) )

People compare two answers to a prompt x and prefer y_w to y_l. RLHF fits a reward to such pairs
and then optimizes a policy for it. DPO turns the optimum around: every policy *is* the optimum for
some reward, so the pairs can be fitted by the policy itself, with the logistic loss above. The
reference pi_ref is the SFT model; its log-probs never change, so they are computed once.

Writes to out/<task>/: preferences.jsonl (where the task samples its own), dpo.pt, metrics.csv,
results.json. Left out on purpose: the reward model and PPO, which DPO is there to do without.
"""

import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import train_sft
from data import Batches, encode_all, prefixes, rank, reward
from model import UserError, replacing, save_checkpoint, write_json
from sample import (add_measuring_flags, evaluate, held_out_prompts, sample, score, side_by_side,
                    table)
from train_sft import (PARTS, Log, Parser, Run, add_shared_flags, add_training_flags, command,
                       compile_logps, fingerprint, grad_scaler, in_batches, is_time, load,
                       load_training, make_folder, micro_batches, number, open_checkpoint,
                       row_length, settle, settle_task, source, update, warmup, warn_of_large_lr)


# ------------------------------------------------------------------------------------------------
# The mathematics. Pure functions of log-probabilities; nothing here knows what a Transformer is.
# ------------------------------------------------------------------------------------------------


def bradley_terry(r_w, r_l):
    """Eq. 16: log p(y_w > y_l | x) = log sigma(r_w - r_l).

    r_w, r_l: rewards of the winner and the loser, any shapes that broadcast.
    """
    return F.logsigmoid(r_w - r_l)


def plackett_luce(rewards, ranking):
    """Eq. 18: log p(ranking | answers, x), the answers being drawn one after the other, best first,
    each with probability proportional to exp(reward) among those not drawn yet.

    rewards: (B,) one per answer. ranking: (..., K) indices into rewards, best first; a ranking of
    fewer than K answers ends in -1s, which count for nothing. Returns (...).
    """
    drawn = ranking >= 0                                            # (..., K)
    r = rewards[ranking.clamp(min=0)]                               # (..., K) in order of rank
    k = torch.arange(ranking.size(-1), device=ranking.device)
    later = k[None, :] >= k[:, None]                                # (K, K) row k: not drawn yet
    alone = k[None, :] == k[:, None]                                # so that a -1 adds r - r = 0
    left = later & drawn[..., None, :] | alone                      # (..., K, K)
    of_left = r[..., None, :].masked_fill(~left, -math.inf)         # (..., K, K)
    return (r - of_left.logsumexp(-1)).sum(-1)


def log_partition(ref_logps, rewards, beta):
    """A.1: log Z(x) = log sum_y pi_ref(y|x) exp(r(x, y) / beta), summed over the last dimension,
    which runs over every answer y there is. Returns the shape without it.
    """
    return (ref_logps + rewards / beta).logsumexp(-1)


def optimal_policy(ref_logps, rewards, beta):
    """Eq. 15: log pi*(y|x) = log pi_ref(y|x) + r(x, y) / beta - log Z(x), the policy that maximises
    E[r] - beta KL(pi || pi_ref). Last dimension: every answer y there is. Same shape out as in.
    """
    return ref_logps + rewards / beta - log_partition(ref_logps, rewards, beta)[..., None]


def implicit_reward(pi_logps, ref_logps, beta):
    """Eq. 17 without beta log Z(x): rhat(x, y) = beta log(pi(y|x) / pi_ref(y|x)).

    The language model is secretly a reward model: rhat differs from the reward that pi is optimal
    for by beta log Z(x) alone, which is the same for all answers of a prompt, so no preference
    depends on it (Lemma 1).
    """
    return beta * (pi_logps - ref_logps)


def dpo_loss(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Appendix B: -log sigma(rhat_w - rhat_l), the Bradley-Terry likelihood of the pairs under the
    implicit reward.

    pi_logps, ref_logps: (B,) log pi(y|x) of each answer under policy and reference.
    yw_idxs, yl_idxs: (T,) pairs of indices into them: preferred, dispreferred.
    beta: strength of the KL penalty; larger keeps the policy closer to the reference.
    Returns (losses (T,), rewards (B,)); the rewards are detached.
    """
    pi_logratios = pi_logps[yw_idxs] - pi_logps[yl_idxs]
    ref_logratios = ref_logps[yw_idxs] - ref_logps[yl_idxs]
    losses = -F.logsigmoid(beta * (pi_logratios - ref_logratios))
    return losses, implicit_reward(pi_logps, ref_logps, beta).detach()


def dpo_gradient(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """A.4: d(sum of dpo_loss) / d pi_logps in closed form, (B,).

    Each pair adds -beta sigma(rhat_l - rhat_w) to its winner and the opposite to its loser. The
    weight is large while the pair is ranked wrongly; A.4 prints w and l the other way round.
    """
    r = implicit_reward(pi_logps, ref_logps, beta)
    weights = beta * torch.sigmoid(r[yl_idxs] - r[yw_idxs])         # (T,)
    gradient = torch.zeros_like(pi_logps)                           # (B,)
    return gradient.index_add(0, yw_idxs, -weights).index_add(0, yl_idxs, weights)


def plackett_luce_loss(pi_logps, ref_logps, rankings, beta):
    """Eq. 20: DPO for rankings, -log p(ranking) under Plackett-Luce and the implicit reward.

    rankings: (T, K) indices into the log-probs, best first, -1 where a ranking is shorter than K.
    Returns (losses (T,), rewards (B,)); the rewards are detached. With K = 2 this is dpo_loss.
    """
    r = implicit_reward(pi_logps, ref_logps, beta)
    return -plackett_luce(r, rankings), r.detach()


def unlikelihood_loss(pi_logps, yw_idxs, yl_idxs):
    """C.3: -(log pi(y_w|x) - log pi(y_l|x)): raise the one, lower the other.

    The baseline that falls apart. Without a sigmoid no pair is ever ranked well enough, and without
    a reference nothing holds the language together. Returns losses (T,), unbounded below.
    """
    return -(pi_logps[yw_idxs] - pi_logps[yl_idxs])


# ------------------------------------------------------------------------------------------------
# The step and the loop
# ------------------------------------------------------------------------------------------------

COLUMNS = {"loss": ".4f", "accuracy": ".1%", "margin": "+.3f", "chosen_reward": "+.3f",
           "rejected_reward": "+.3f", "chosen_logp": ".1f", "rejected_logp": ".1f",
           "grad_norm": ".2f", "lr": ".1e", "held_out_loss": ".4f", "held_out_accuracy": ".1%"}


def objective(logps, batch, args):
    """(losses, rewards) of the --loss at hand: losses one a pair (or a ranking), rewards one an
    answer, detached."""
    if args.loss == "plackett_luce":
        return plackett_luce_loss(logps, batch.ref_logps, batch.rankings, args.beta)
    if args.loss == "unlikelihood":
        return (unlikelihood_loss(logps, batch.winners, batch.losers),
                implicit_reward(logps, batch.ref_logps, args.beta).detach())
    return dpo_loss(logps, batch.ref_logps, batch.winners, batch.losers, args.beta)


def train(policy, preferences, held_out, args):
    """DPO of a policy on a list of Encoded that carry their ref_logps; in place."""
    batches = Batches(preferences, args.batch, args.seed, whole=args.loss == "plackett_luce")
    steps = args.steps or math.ceil(args.epochs * batches.per_epoch / args.batch)
    optimizer, scaler = policy.optimizer(args.lr, args.weight_decay), grad_scaler(policy)
    log = Log(args.out / "metrics.csv", COLUMNS)
    run = Run(args.out / "dpo_state.pt", args, policy, batches, held_out, optimizer, scaler, log)
    for step in run.steps(steps, "DPO"):
        for batch in micro_batches(batches[step], args, policy):
            logps = policy.logps(batch)                             # (N,) log pi(y|x)
            losses, rewards = objective(logps, batch, args)         # (P,) and (N,)
            scaler.scale(losses.sum() / args.batch).backward()      # mean over the whole batch
            log.add(len(losses), loss=losses.detach().sum())
            log.add(len(batch.winners), **describe(logps.detach(), rewards, batch))
            if step == 0:
                check_start(logps.detach(), batch, args, policy.precision)
        lr = args.lr * warmup(step, args.warmup)
        grad_norm = update(policy, optimizer, scaler, lr, args.clip)
        run.watch(step, grad_norm)
        looked = held_out and is_time(step, steps, args.eval_every)
        if looked:
            evaluate_preferences(policy, held_out, args, log)
        if looked or is_time(step, steps, args.log_every):
            run.check()
            log.write(step, grad_norm=grad_norm, lr=lr)


TIE = 1e-4          # margins that float32 cannot tell from 0 in answers of hundreds of tokens


def describe(logps, rewards, batch):
    """What to watch: sums over the pairs of a batch. Tied pairs count as half right, so the
    accuracy of a policy that is still its reference is 50 %, not a coin that rounding tosses."""
    w, l = batch.winners, batch.losers
    margins = rewards[w] - rewards[l]
    ahead = margins.sign() * (margins.abs() > TIE)                  # 1, 0 or -1
    return {"accuracy": (ahead + 1).sum() / 2, "margin": margins.sum(),
            "chosen_reward": rewards[w].sum(), "rejected_reward": rewards[l].sum(),
            "chosen_logp": logps[w].sum(), "rejected_logp": logps[l].sum()}


def check_start(logps, batch, args, precision):
    """Before the first update the policy is the reference: every reward is 0 and the loss what it
    is for equal models, log 2 for DPO. If not, the two were not computed alike, and all that
    follows would be off by as much. Raises UserError."""
    losses, rewards = objective(logps, batch, args)
    expected, _ = objective(batch.ref_logps, batch, args)
    tolerance = args.beta * (0.01 if precision is None else 1.0)    # nats, times beta
    loss_off = 0 if args.loss == "unlikelihood" else (losses - expected).mean().abs()
    if not (rewards.abs().max() <= tolerance and loss_off <= tolerance):
        raise UserError(f"step 0: the loss is {losses.mean():.5f}, not {expected.mean():.5f}: the "
                        "policy does not start at its reference")


@torch.no_grad()
def evaluate_preferences(policy, held_out, args, log):
    """Loss and accuracy over all held-out preferences, to the log."""
    for batch in in_batches(held_out, args.row_length, policy):
        logps = policy.logps(batch)
        losses, rewards = objective(logps, batch, args)
        log.add(len(losses), held_out_loss=losses.sum())
        log.add(len(batch.winners), held_out_accuracy=describe(logps, rewards, batch)["accuracy"])


# ------------------------------------------------------------------------------------------------
# C.1: prefixes, sampled answers, ranked pairs
# ------------------------------------------------------------------------------------------------


def sample_preferences(sft, tokenizer, args):
    """Sample --samples answers to each of --prefixes prefixes from the SFT model, rank them by the
    ground-truth reward of the whole review, and write them to preferences.jsonl. One prefix in ten
    is a held-out one. Returns the file's path.

    A file that the same model and flags have written is used again; see `keep`.
    """
    eot, path = tokenizer.eot_token, args.out / "preferences.jsonl"
    key = " ".join(map(str, (fingerprint(sft), sft.device.type, sft.precision, args.seed,
                             args.prefixes, args.samples, args.max_new_tokens)))
    if kept(path, key) is not None:
        print(f"{path}: sampled before, by the same model with the same flags")
        return path
    n_held_out = max(1, args.prefixes // 10)
    prompts = (prefixes(args.prefixes - n_held_out, False, tokenizer, args.seed)
               + prefixes(n_held_out, True, tokenizer, args.seed))
    ids = [[eot] + tokenizer.encode_ordinary(prompt)
           for prompt in prompts for _ in range(args.samples)]
    answers = sample(sft, ids, args.max_new_tokens, args.seed, eot, progress="sampling answers")
    unfinished, rows = 0, []
    for i, prompt in enumerate(prompts):
        mine = answers[i * args.samples:(i + 1) * args.samples]
        done = [tokenizer.decode(ids[:-1]) for ids in mine if ids[-1] == eot and len(ids) > 1]
        unfinished += len(mine) - len(done)
        rows.append(rank(prompt, done, [reward(prompt + answer) for answer in done]))
    ranked = [row for row in rows if row]
    if not ranked:
        raise UserError("no prompt got two finished answers of different reward: train SFT for "
                        "longer, or raise --max-new-tokens")
    keep(path, key, "".join(json.dumps(row) + "\n" for row in ranked))
    print(f"{path}: answers of {len(ranked):,} prompts ranked; left out "
          f"{len(rows) - len(ranked)} prompts (no two rewards differ) and {unfinished} answers "
          "(empty or without an end)")
    return path


def keep(path, key, text):
    """Write a text file, and beside it, as .key, a digest of the text and of what it was made from:
    kept(path, key) returns the text until one of the two changes."""
    for where, content in [(path, text), (path.with_suffix(".key"), digest_of(key, text))]:
        with replacing(where) as file:
            file.write(content.encode())


def kept(path, key):
    """The text of the file at `path` if it is what `keep` wrote for this key, else None."""
    try:
        text = path.read_text(encoding="utf-8")
        return text if path.with_suffix(".key").read_text() == digest_of(key, text) else None
    except (OSError, ValueError):
        return None


def digest_of(key, text):
    return hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()


def add_reference(policy, items, args):
    """Before its first step the policy is the reference: note its log-probs, once. They are kept in
    reference.json, for the same weights on the same data at the same precision."""
    path = args.out / "reference.json"
    key = " ".join(map(str, (fingerprint(policy), fingerprint(items), args.row_length,
                             policy.device.type, policy.precision, policy.compiled)))
    text = kept(path, key)
    if text is not None:
        print(f"{path}: computed before, by the same model on the same answers")
        logps = json.loads(text)
    else:
        logps = score(policy, items, args.row_length, "reference log-probs")
        keep(path, key, json.dumps(logps))
    for item, of_item in zip(items, logps):
        item.ref_logps = of_item


def report(policy, reference, prompts, tokenizer, grades, sft_path, args):
    """Measure both on held-out prompts; print the table and some samples, write results.json."""
    measures, texts = evaluate({"sft": reference, "dpo": policy}, reference, prompts, tokenizer,
                               args.max_new_tokens, args.seed + 1, **grades)
    results = {"task": args.task or args.data.name, "beta": args.beta, "prompts": len(prompts),
               "policies": measures}
    write_json(args.out / "results.json", results)
    print(side_by_side(prompts[:4], texts, grades.get("reward")))
    interval = "; win rate with its 95 % interval" if "reward" in grades else ""
    print(f"\n{len(prompts):,} held-out prompts, one sample each, mean +- standard error{interval}"
          f"\n{table(measures)}")
    print(f"\nwrote {args.out / 'results.json'}; try: "
          f"python sample.py --compare {sft_path} {args.out / 'dpo.pt'}")


def sft_flags(args):
    """The flags of this run that its SFT shares."""
    names = ["task", "data", "data_dir", "out", "seed", "device", "precision", "compile", "init",
             "tokenizer", "row_length", "save_every"]
    return [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names
            if getattr(args, name) is not None] + [
        f"--{name}" for name in ("resume", "strict") if getattr(args, name)]


PAPER_LR = 1e-6     # Appendix B


def parse_args(argv):
    parser = Parser(__doc__)
    add_shared_flags(parser)
    add_training_flags(parser, 64, "pairs (rankings with plackett_luce)", warmup=150)
    add_measuring_flags(parser)
    add = parser.add_argument
    add("--loss", default="dpo", choices=["dpo", "plackett_luce", "unlikelihood"],
        help="dpo on pairs, on rankings (A.3), or the baseline of C.3 (default dpo)")
    add("--beta", type=number(float, 0, above=True),
        help="strength of the KL penalty: larger stays closer to the reference (default 0.1, and "
             "0.5 for tldr, Appendix B's; 0.5 too for reviews, whose small model pays for reward "
             "with its grammar)")
    add("--lr", type=number(float, 0, above=True),
        help="learning rate after warm-up (default 1e-6, Appendix B's, for pretrained models; "
             "3.5e-5 for reviews, whose model is 260 times smaller than the smallest GPT-2: its "
             "few weights have to move further for the same change of the policy)")
    add("--sft", type=Path,
        help="checkpoint to start from, or a folder as --init takes them (default sft.pt of the "
             "run, trained if missing)")
    add("--fresh", action="store_true", help="train SFT again even if there is one")
    add("--prefixes", type=number(int, 10), default=4200,
        help="reviews: prompts to sample answers for (default 4,200; C.1 has 25,000)")
    add("--samples", type=number(int, 2), default=4,
        help="reviews: answers sampled for each prompt (default 4)")
    args = parser.parse_args(argv)
    settle_task(args)
    args.lr = args.lr or (3.5e-5 if args.task == "reviews" else PAPER_LR)
    args.beta = args.beta or (0.5 if args.task in ("reviews", "tldr") else 0.1)
    if args.sft and (args.fresh or args.init):
        raise UserError("--fresh and --init are for a new SFT model, --sft names one: choose")
    if args.fresh and args.resume:
        raise UserError("--fresh starts again, --resume goes on with what there is: choose")
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    device = settle(args)
    make_folder(args.out)
    sft_path, stopped = args.sft or args.out / "sft.pt", (args.out / "sft_state.pt").exists()
    if args.fresh or not args.sft and (args.resume and stopped or not sft_path.exists()):
        print("--fresh: SFT first" if args.fresh else
              f"{sft_path} did not end: SFT first" if stopped else f"no {sft_path} yet: SFT first")
        train_sft.main(sft_flags(args))
    else:
        later = ", but a later SFT run did not end: --resume would go on with that"
        print(f"starting from {sft_path}" + (later if stopped and not args.sft else ""))
    policy, tokenizer, facts = open_checkpoint(sft_path, device, args)
    if args.tokenizer not in (None, facts["tokenizer"]):
        raise UserError(f"{sft_path} was trained with --tokenizer {facts['tokenizer']}, "
                        f"not {args.tokenizer}")
    wanted = source(args)
    if not args.sft and {name: facts.get(name) for name in wanted} != wanted:
        other = "other content of " if facts.get("source") == wanted["source"] else ""
        raise UserError(f"{sft_path} was trained on {other}{facts.get('source')}, not on "
                        f"{args.data or args.task}: name it with --sft to start from it, or train "
                        "another with --fresh")
    init = facts.get("init", "random")
    if args.init and init not in (args.init, str(Path(args.init).resolve())):
        raise UserError(f"{sft_path} was trained from {init} weights, not {args.init}: train "
                        "another with --fresh")
    if args.task == "reviews" and policy.config.block_size < 64:
        raise UserError(f"{sft_path}: a block size of {policy.config.block_size} has no room for "
                        "reviews; train SFT with --block-size 64 or more")
    compile_logps(policy, args)
    args.row_length = row_length(args, policy.config.block_size)

    path = sample_preferences(policy, tokenizer, args) if args.task == "reviews" else args.data
    name = path or args.task
    encoded, held_out = (load(f"{name}, {part}", args, encode_all, rows, tokenizer, args.row_length)
                         for part, rows in zip(PARTS, load_training(args, path)))
    if not encoded:
        raise UserError(f"{name}: no row is left to train on")
    warn_of_large_lr(args, PAPER_LR, init)
    add_reference(policy, encoded + held_out, args)
    print(f"DPO of {sft_path} on {sum(len(item.pairs) for item in encoded):,} pairs of "
          f"{len(encoded):,} prompts, {args.loss}, beta {args.beta:g}, on {device}")
    train(policy, encoded, held_out, args)
    save_checkpoint(args.out / "dpo.pt", policy, tokenizer=facts["tokenizer"], stage="dpo",
                    init=init, seed=args.seed, beta=args.beta, loss=args.loss, **wanted)
    print(f"wrote {args.out / 'dpo.pt'}")

    prompts, grades = held_out_prompts(held_out, tokenizer, args)
    if len(prompts) < 2:
        print(f"{name}: fewer than two held-out prompts, so no samples are measured")
    else:
        reference, _, _ = open_checkpoint(sft_path, device, args)
        report(policy, reference, prompts, tokenizer, grades, sft_path, args)
    (args.out / "dpo_state.pt").unlink(missing_ok=True)     # all is done: it is needed no more


if __name__ == "__main__":
    main()
