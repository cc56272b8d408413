"""The reward model of RLHF: GPT-2 with a scalar head, trained on the same preferences as DPO.

    python train_dpo.py                          # first: writes sft.pt and the preferences
    python -m experiments.reward_model           # trains the reward model on them
    python -m experiments.reward_model --task hh # or --data pairs.jsonl

RLHF, which DPO replaces, has two stages. This is the first one: fit a reward r(x, y) to the
preferences by maximum likelihood under the Bradley-Terry model (Eq. 2),

    loss = -log sigma( r(x, y_w) - r(x, y_l) )

experiments/ppo.py is the second stage, which maximises that reward. In DPO, beta log(pi / pi_ref)
takes the place of r. This script prints the share of held-out pairs that each ranks correctly.

The model starts from the SFT model (C.1 starts from the pretrained one). As in C.1, it is trained
for three epochs, and the weights with the highest validation accuracy are kept. Half of the
held-out prompts are used for this choice; accuracy is reported on the other half. Finally the
reward is shifted and scaled to mean 0 and standard deviation 1 on answers of the SFT model. The
shift changes no preference and no optimal policy (Lemmas 1 and 2; but PPO gives unfinished answers
a fixed reward, which it moves relative to the others). The scale changes both: r / s with beta is r
with s beta. It is fixed so that one beta means about the same for every reward model.

Reads sft.pt of the run, and dpo.pt if there is one. Writes reward.pt, reward_metrics.csv and
reward.json to the same folder. Left out on purpose: torch.compile.
"""

import math
from pathlib import Path

import torch

from data import Batches, Encoded, micro_batches
from model import ScalarGPT
from runtime.checkpoint import (
    check_sft_checkpoint,
    data_source,
    load_checkpoint,
    open_checkpoint,
    open_policies,
    save_checkpoint,
)
from runtime.cli import Parser, choose_row_length, command, number_type, set_up
from runtime.errors import UserError
from runtime.files import claim_folder, write_json
from runtime.flags import (
    add_answer_length_flag,
    add_evaluation_flag,
    add_shared_flags,
    add_training_flags,
    choose_task,
)
from runtime.parallel import set_precision, sum_gradients
from runtime.report import table
from runtime.run import Log, TrainingState, is_due
from sample import (
    decode_answer,
    differences,
    means_over_pairs,
    ranked_correctly,
    rate_pairs,
    sample,
    score,
)
from tasks import encode_splits, evaluated, task_of
from train_dpo import bradley_terry
from train_sft import cosine, grad_scaler, update, warmup

LR = {"reviews": 3e-3, "imdb-small": 3e-4}      # the peak; it decays to a tenth
PRETRAINED_LR = 1e-5                            # of other tasks
N_NORMALISE = 1024          # answers of the SFT model on which the rewards have mean 0, deviation 1

COLUMNS = {"loss": ".4f", "accuracy": ".3f", "grad_norm": ".2f", "lr": ".1e",
           "held_out_accuracy": ".3f"}


# ------------------------------------------------------------------------------------------------
# The loss and the loop
# ------------------------------------------------------------------------------------------------


def reward_loss(rewards, yw_idxs, yl_idxs):
    """Eq. 2: -log p(y_w > y_l | x) under the Bradley-Terry model of the rewards.

    rewards: (N,) r(x, y) of each answer. yw_idxs, yl_idxs: (P,) indices of the chosen and the
    rejected answer of each pair. Returns losses (P,).
    """
    return -bradley_terry(rewards[yw_idxs], rewards[yl_idxs])


def train(model, preferences, held_out, args):
    """Fit a ScalarGPT to preferences, a list of Encoded, in place. Afterwards it has the weights
    that ranked most pairs of held_out correctly. Returns the step they are from."""
    batches = Batches(preferences, args.batch, args.seed)
    n_steps = args.steps or math.ceil(args.epochs * batches.per_epoch / args.batch)
    optimizer = model.optimizer(args.lr, args.weight_decay)
    scaler = grad_scaler(model)
    log = Log(args.out / "reward_metrics.csv", COLUMNS, batches, scaler)
    best = Best()
    state = TrainingState(args.out / "reward_state.pt", args, model, optimizer, scaler, log,
                          batches, held_out, best=best)
    for step in state.steps(n_steps, "reward model"):
        # At some steps, check whether these are the best weights so far.
        evaluating = held_out and is_due(step, n_steps, args.eval_every)
        if evaluating:
            accuracy = accuracy_of(model, held_out, args, log)
            best.keep_if_better(model, step, accuracy)
        # One batch of args.batch pairs, forward and backward.
        for micro_batch in micro_batches(batches[step], state.n_micro_batches, args.row_length,
                                         model):
            rewards = model.rewards(micro_batch)                            # (N,)
            losses = reward_loss(rewards, micro_batch.chosen, micro_batch.rejected)      # (P,)
            scaler.scale(losses.sum() / args.batch).backward()
            margins = (rewards[micro_batch.chosen] - rewards[micro_batch.rejected]).detach()
            log.add(len(losses), loss=losses.detach().sum(),
                    accuracy=ranked_correctly(margins, 0.0).sum())
        # One update.
        sum_gradients(model)                                                # of all processes
        lr = args.lr * min(warmup(step, args.warmup), cosine(step, n_steps))
        grad_norm = update(model, optimizer, scaler, lr, args.clip)
        log.note_update(step, grad_norm, lr)
        if evaluating or is_due(step, n_steps, args.log_every):
            log.write(step)
        state.save_if_due(step)
    if held_out:
        accuracy = accuracy_of(model, held_out, args, log)
        best.keep_if_better(model, n_steps, accuracy)
        log.write(n_steps)
        model.load_state_dict(best.weights)
        return best.step
    return n_steps


class Best:
    """The best weights so far: `weights`, a state_dict, which had `accuracy` at `step`."""

    def __init__(self):
        self.step, self.accuracy, self.weights = 0, -1.0, {}

    def keep_if_better(self, model, step, accuracy):
        """Keep a copy of the model's weights if their accuracy is the highest so far."""
        if accuracy > self.accuracy:
            self.step, self.accuracy = step, accuracy
            self.weights = {name: weight.clone() for name, weight in model.state_dict().items()}

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


def accuracy_of(model, items, args, log):
    """Log and return the share of all pairs of a list of Encoded that a reward model ranks
    correctly."""
    correct = ranked_correctly(margins_of(model, items, args.row_length), 0.0)
    log.add(len(correct), held_out_accuracy=correct.sum())
    return correct.double().mean().item()


def margins_of(model, items, row_length):
    """(P,) reward of the chosen minus that of the rejected answer, for all pairs of a list of
    Encoded."""
    rewards = score(model, items, row_length, progress="rewards", number_of=model.rewards)
    return differences(rewards, items)


@torch.no_grad()
def normalise(model, items, row_length):
    """Shift and scale a reward model in place, so that its rewards of the answers of a list of
    Encoded, one each, have mean 0 and standard deviation 1. Raises UserError if all are the same.
    """
    rewards = torch.tensor(score(model, items, row_length, progress="rewards",
                                 number_of=model.rewards)).flatten()
    mean, std = rewards.mean(), rewards.std()
    if not std > 0:
        raise UserError("the reward model gives all answers the same reward: it needs more --steps "
                        "or a higher --lr")
    model.scalar.weight.div_(std)
    model.scalar.bias.sub_(mean).div_(std)


def answers_of(sft, prompts, tokenizer, args):
    """One sampled answer to each of a list of prompts (ids), as a list of Encoded."""
    answers = sample(sft, prompts, args.max_new_tokens, args.seed + 2, tokenizer.eot_token,
                     progress="sampling sft")
    return [Encoded(prompt, [answer], []) for prompt, answer in zip(prompts, answers)]


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


@command
def main(argv=None):
    args = parse_args(argv)
    device = set_up(args)
    claim_folder(args.out)
    sft, tokenizer, facts, (preferences, held_out) = open_run(device, args)
    choosing, reporting = halves(held_out)

    model = ScalarGPT.from_gpt(sft)
    print(f"reward model from {args.sft} on {sum(len(item.pairs) for item in preferences):,} pairs "
          f"of {len(preferences):,} prompts, on {device}")
    best_step = train(model, preferences, evaluated(choosing), args)
    prompts = [item.prompt for item in preferences[:N_NORMALISE]]
    normalise(model, answers_of(sft, prompts, tokenizer, args), sft.config.block_size)
    save_checkpoint(args.out / "reward.pt", model, **facts | {"stage": "reward"})
    print(f"wrote {args.out / 'reward.pt'}, the weights of step {best_step}")
    epoch = best_step * args.batch / sum(len(item.pairs) for item in preferences)
    report(model, sft, reporting, tokenizer, epoch, args)
    (args.out / "reward_state.pt").unlink(missing_ok=True)      # the run has finished


def open_run(device, args):
    """What both stages of RLHF start from: (SFT model, tokenizer, facts for the checkpoints to
    come, (training, held-out) lists of Encoded). Sets args.sft and args.row_length. Raises
    UserError if the SFT model does not fit the flags or the data."""
    task, source = task_of(args), data_source(args)
    args.sft = args.sft or args.out / "sft.pt"
    sft, tokenizer, facts = open_checkpoint(args.sft, device, args)
    check_sft_checkpoint(args.sft, sft, facts, source, args)
    choose_row_length(args, sft.config.block_size)
    splits = encode_splits(task.preferences(args), task.name(args), tokenizer, args)
    facts = {"tokenizer": facts["tokenizer"], "init": facts.get("init", "random"),
             "seed": args.seed, **source}
    return sft, tokenizer, facts, splits


def halves(items):
    """Two halves of a list of Encoded that share no prompt: every second distinct one."""
    number = {}                                     # {prompt: its index among the distinct ones}
    parts = [], []
    for item in items:
        i = number.setdefault(tuple(item.prompt), len(number))
        parts[i % 2].append(item)
    return parts


def report(model, sft, items, tokenizer, epoch, args):
    """Measure the reward model on held-out pairs (a list of Encoded), beside the implicit reward of
    dpo.pt, and its correlation with the ground truth. Prints and writes reward.json."""
    found = {"epoch": epoch, "pairs": sum(len(item.pairs) for item in items), "correlation": None}
    if items:
        correct = ranked_correctly(margins_of(model, items, args.row_length), 0.0)
        found |= means_over_pairs({"accuracy": correct}, items)
        rows = {"reward model": {name: found[name] for name in ("accuracy", "accuracy_se")}}
        dpo_path = args.out / "dpo.pt"
        if dpo_path.exists():
            policies, _, betas = open_policies([dpo_path], sft.device, args)
            rated = rate_pairs(policies, sft, items, betas)["dpo"]
            found["implicit_reward"] = {name: rated[name] for name in ("accuracy", "accuracy_se")}
            rows["implicit reward of dpo.pt"] = found["implicit_reward"]
        print(f"\npairs ranked correctly, of {found['pairs']:,} held-out pairs that the choice of "
              f"the weights did not see\n{table(rows)}")
    open_reward = task_of(args).open_reward
    if items and open_reward:
        found["correlation"] = correlation_with_truth(model, items, open_reward(args), tokenizer,
                                                      args)
        print("\ncorrelation with the ground-truth reward, among answers to one prompt: "
              f"{found['correlation']:.3f}")
    write_json(args.out / "reward.json", found)
    print(f"\nwrote {args.out / 'reward.json'}; next: python -m experiments.ppo")


def correlation_with_truth(model, items, reward, tokenizer, args):
    """Pearson's correlation of learned and true rewards over the answers of a list of Encoded. The
    mean over the answers to a prompt is subtracted first, since preferences do not determine it
    (Lemma 1)."""
    learned, true = [], []
    scored = score(model, items, args.row_length, progress="rewards", number_of=model.rewards)
    for item, rewards in zip(items, scored):
        texts = [decode_answer([*item.prompt, *answer], tokenizer) for answer in item.answers]
        truth = reward(texts)
        learned.append(torch.tensor(rewards) - sum(rewards) / len(rewards))
        true.append(torch.tensor(truth) - sum(truth) / len(truth))
    return torch.corrcoef(torch.stack([torch.cat(learned), torch.cat(true)]))[0, 1].item()


def open_reward_model(path, device, args):
    """(ScalarGPT ready for use, facts) of a reward.pt. Raises UserError for other files."""
    model, facts = load_checkpoint(path, device, ScalarGPT)
    set_precision(model, args.precision)
    return model, facts


def parse_args(argv):
    parser = Parser(__doc__)
    add_shared_flags(parser)
    add_training_flags(parser, 64, "pairs", warmup=30)
    add_evaluation_flag(parser)
    add = parser.add_argument
    add_answer_length_flag(parser)          # of the answers that normalise the rewards
    add("--lr", type=number_type(float, 0, above=True),
        help="peak learning rate (default 1e-5; 3e-3 for reviews, 3e-4 for imdb-small)")
    add("--sft", type=Path, help="checkpoint to start from (default: sft.pt of the run)")
    parser.set_defaults(epochs=3.0, init=None, tokenizer=None)      # C.1: three epochs
    args = parser.parse_args(argv)
    choose_task(args)
    args.lr = args.lr or LR.get(args.task, PRETRAINED_LR)
    return args


if __name__ == "__main__":
    main()
