"""Online DPO: the policy learns from preferences between its own answers, fresh in every round.

    python train_dpo.py                                # first: writes sft.pt and the preferences
    python -m experiments.reward_model                 # a judge, reward.pt
    python -m experiments.online                       # eight rounds, each ranked by that judge
    python -m experiments.online --reward ground_truth # ranked by the task's own reward
    python -m experiments.online --rounds 1            # offline: all answers are the SFT model's

train_dpo.py learns from answers that the SFT model wrote. They say little about what the policy
writes once it has moved away from that model (docs/online.md). Here, the same number of steps is
divided into --rounds. Each begins with

    sample      --samples answers to its share of the prompts, from the policy as it is now
    judge       their rewards, by a reward model or by the ground truth
    rank, pair  as in C.1: K answers make K (K - 1) / 2 pairs; of answers that tie, one is kept

and goes on with one pass over these pairs, with the loss and the steps of train_dpo.py. The
reference stays the SFT model in all rounds.

Writes online.pt, online_metrics.csv and online.json to the folder of the run. Left out on purpose:
torch.compile; a KL penalty besides that of the loss; learning from the answers of earlier rounds.
"""

import copy
import math

import train_dpo
from data import Batches, Encoded, ranking_to_pairs
from experiments.ppo import add_reward_flags, check_reward, judged, reward_function
from runtime.cli import Parser, begin_run, command, number_type, path_type
from runtime.errors import UserError
from runtime.flags import add_training_flags, default_of, fill_in
from runtime.run import Run
from sample import logps_of, measure, sample_answers, tie_in_nats
from tasks import TASKS, held_out_prompts, task_of
from tasks.checkpoint import open_start, save_checkpoint
from tasks.flags import add_measuring_flags, add_task_flags, choose_task
from tasks.sampled import rank_answers
from train_dpo import check_start, describe, dpo_loss
from train_sft import grad_scaler, update, warmup

# The defaults are those of train_dpo.py, with eight rounds.
# answers: sampled for a round. reward, by the judge, and length: means over them.
COLUMNS = {"answers": None, "reward": ("reward", ".3f"), "length": ("length", ".1f"), **{
    name: column for name, column in train_dpo.COLUMNS.items() if "held_out" not in name}}


# ------------------------------------------------------------------------------------------------
# A round, and the loop
# ------------------------------------------------------------------------------------------------


def sample_round(policy, reference, prompts, score_answers, eot, number, args):
    """The preferences of a round: --samples answers of the policy to each of a list of prompts
    (ids), sampled with seed 10^6 (args.seed + 1) + number and ranked by score_answers, which maps
    a list of Encoded with one answer each to rewards. Equal answers are never compared. Returns
    (a list of Encoded with their ref_logps, all answers, their rewards). Raises UserError, with
    number + 1, if all answers tie."""
    repeated = [prompt for prompt in prompts for _ in range(args.samples)]
    seed = 10**6 * (args.seed + 1) + number             # other random numbers than before
    sampled = sample_answers(policy, repeated, args.max_new_tokens, seed, eot)
    rewards = judged([Encoded(prompt, [answer], []) for prompt, answer in zip(repeated, sampled)],
                     score_answers, eot, args)
    items = []
    for i in range(0, len(sampled), args.samples):
        reward_of = {}                                  # a reward for each distinct answer
        for answer, reward in zip(sampled[i:i + args.samples], rewards[i:i + args.samples]):
            reward_of.setdefault(tuple(answer), reward)
        row = rank_answers(repeated[i], list(map(list, reward_of)), list(reward_of.values()))
        if row:                                         # None if all tie
            items.append(Encoded(row["prompt"], row["answers"], ranking_to_pairs(row["ranking"])))
    if not items:
        raise UserError(f"round {number + 1}: no prompt got two answers of different reward")
    ref_logps = logps_of(reference, items, args.row_length)             # of the fresh answers
    items = [Encoded(item.prompt, item.answers, item.pairs, logps)
             for item, logps in zip(items, ref_logps)]
    return items, sampled, rewards


def train(policy, reference, prompts, score_answers, eot, args, reward_digest=""):
    """Train the policy in place on its own answers to a list of prompts (ids). score_answers: as in
    sample_round. reward_digest: of the reward model, which a resumed run must share."""
    # Which prompts each step is about: stand-ins for the answers to come, as long as they can get.
    stand_ins = [[eot] * args.max_new_tokens] * args.samples
    pairs = ranking_to_pairs(range(args.samples))
    plan = Batches([Encoded(prompt, stand_ins, pairs) for prompt in prompts], args.batch, args.seed)
    optimizer, scaler = policy.optimizer(args.lr, args.weight_decay), grad_scaler(policy)
    current, tie = Round(), args.beta * tie_in_nats(policy.precision)
    digests = {"reward model": reward_digest, "--max-new-tokens": args.max_new_tokens}
    run = Run("online", COLUMNS, args, plan, digests=digests, model=policy, optimizer=optimizer,
              scaler=scaler, round=current)
    for step in run.steps():                                            # logs, saves
        if step not in current.steps:                                   # a new round
            number, current.steps = round_of(step, run.n_steps, args.rounds)
            asked = prompts_of(plan, current.steps)
            current.items, answers, judgements = sample_round(policy, reference, asked,
                                                              score_answers, eot, number, args)
            run.log.add(len(answers), reward=sum(judgements), length=sum(map(len, answers)))
            run.log.add(1, answers=len(answers))
        batches = Batches(current.items, args.batch, args.seed)
        for batch in batches.micro_batches(step - current.steps.start, run.n_micro_batches,
                                           args.row_length, policy):
            logps = policy.logps(batch)                                 # (N,) log pi(y|x)
            losses, rewards = dpo_loss(logps, batch.ref_logps, batch.chosen, batch.rejected,
                                       args.beta)                       # (P,) and (N,)
            scaler.scale(losses.sum() / args.batch).backward()
            run.log.add(len(losses), loss=losses.detach().sum(),
                        **describe(logps.detach(), rewards, batch, tie))
            if step == 0:
                check_start(rewards, args, policy.precision)
        lr = args.lr * warmup(step, run.n_warmup)
        grad_norm = update(policy, optimizer, scaler, lr, args.clip)
        run.log.note_update(step, grad_norm, lr)


class Round:
    """The round under way: its steps, a range, and its preferences, a list of Encoded."""

    def __init__(self):
        self.steps, self.items = range(0), []

    def state_dict(self):
        return {"steps": [self.steps.start, self.steps.stop],
                "items": [dict(vars(item)) for item in self.items]}

    def load_state_dict(self, state):
        self.steps = range(*state["steps"])
        self.items = [Encoded(**item) for item in state["items"]]


def round_of(step, n_steps, rounds):
    """(number, steps) of the round that a step belongs to; steps is a range. All rounds have the
    same number of steps, or some have one more."""
    number = step * rounds // n_steps
    return number, range(math.ceil(number * n_steps / rounds),
                         math.ceil((number + 1) * n_steps / rounds))


def prompts_of(plan, steps):
    """The prompts (ids) that steps of a plan, a data.Batches, are about, each once."""
    distinct = dict.fromkeys(i for step in steps for _, i, _ in plan.units_of(step))
    return [plan.encoded[i].prompt for i in distinct]


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


@command
def main(argv=None):
    args = parse_args(argv)
    device = begin_run(args, reads=["sft", "reward_model", "data"],
                       writes=["online.pt", "online_metrics.csv", "online.json"])
    policy, tokenizer, facts = open_start(args, device, train_dpo.DEFAULTS["lr"])
    preferences, held_out = task_of(args).encoded_preferences(tokenizer, args)
    held_out = held_out_prompts(held_out, tokenizer, args)      # for the table at the end
    score_answers, digest = reward_function(tokenizer, facts["tokenizer"], device, args)
    reference = copy.deepcopy(policy)                           # it stays as it is
    prompts = [list(item.prompt) for item in preferences]
    print(f"online DPO of {args.sft} on {len(prompts):,} prompts in {args.rounds} rounds, "
          f"{args.reward} reward, beta {args.beta:g}, {device}")
    train(policy, reference, prompts, score_answers, tokenizer.eot_token, args, digest)
    save_checkpoint(args.out / "online.pt", policy, reference, **facts, stage="online",
                    beta=args.beta, reward=args.reward)
    print(f"wrote {args.out / 'online.pt'}")
    measure(args.out / "online.json", {"sft": reference, "online": policy}, reference, held_out,
            tokenizer, args, reward=args.reward, beta=args.beta, rounds=args.rounds)
    (args.out / "online_state.pt").unlink(missing_ok=True)      # the run has finished


def parse_args(argv):
    parser = Parser(__doc__)
    tasks = {name: task.dpo for name, task in TASKS.items()}
    add_task_flags(parser)
    parser.group("the run")(
        "--sft", type=path_type, help="checkpoint to start from (default: sft.pt of the run)")
    add_reward_flags(parser)
    add = parser.group("DPO")
    add("--rounds", type=number_type(int, 1, most=10**6), default=8,
        help="how often the policy writes new answers (default 8; 1: offline)")
    add("--samples", type=number_type(int, 2), help="answers to each prompt (default 4)")
    add("--beta", type=number_type(float, 0, above=True),
        help="strength of the KL penalty, as in train_dpo.py "
             f"({default_of('beta', train_dpo.DEFAULTS, tasks)})")
    add_training_flags(parser, train_dpo.DEFAULTS, "pairs", tasks)
    add_measuring_flags(parser)
    parser.set_defaults(init=None, tokenizer=None)
    args = parser.parse_args(argv)
    choose_task(args)
    defaults = {**train_dpo.DEFAULTS, **task_of(args).dpo}
    fill_in(args, {name: value for name, value in defaults.items() if hasattr(args, name)})
    check_reward(args)
    return args


if __name__ == "__main__":
    main()
