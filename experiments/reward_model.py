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


import torch

from data import Batches, Encoded, decode_answer
from runtime.cli import Parser, begin_run, command, path_type
from runtime.errors import UserError
from runtime.files import write_json
from runtime.flags import add_evaluation_flag, add_training_flags, check_intervals, fill_in
from runtime.parallel import set_precision
from runtime.report import table
from runtime.run import Run
from sample import (
    differences,
    means_over_pairs,
    numbers_of,
    ranked_correctly,
    rate_pairs,
    sample_answers,
)
from tasks import TASKS, task_of
from tasks.checkpoint import load_checkpoint, open_start, open_with_reference, save_checkpoint
from tasks.flags import add_answer_length_flag, add_task_flags, choose_task
from tasks.scalar_gpt import ScalarGPT
from train_dpo import bradley_terry
from train_sft import cosine, grad_scaler, update, warmup

# lr is the peak for a pretrained model; it decays to a tenth. A task may have another: `reward_lr`.
DEFAULTS = {"batch": 64, "epochs": 3.0, "lr": 1e-5, "warmup": 30, "clip": 1.0, "weight_decay": 0.0}
N_NORMALISE = 1024          # answers of the SFT model on which the rewards have mean 0, deviation 1

COLUMNS = {"loss": ("loss", ".4f"), "accuracy": ("accuracy", ".3f"),
           "grad_norm": ("grad norm", ".2f"), "lr": ("lr", ".1e"),
           "held_out_accuracy": ("held out", ".3f")}


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
    optimizer, scaler = model.optimizer(args.lr, args.weight_decay), grad_scaler(model)
    best = Best()
    run = Run("reward", COLUMNS, args, batches, held_out, model=model, optimizer=optimizer,
              scaler=scaler, best=best)

    def evaluate():
        accuracy = accuracy_of(model, held_out, args, run.log)
        best.keep_if_better(model, run.step, accuracy)
    for step in run.steps(evaluate if held_out else None):              # evaluates, logs, saves
        for batch in run.micro_batches(step):                           # their gradients add up
            rewards = model.rewards(batch)                              # (N,)
            losses = reward_loss(rewards, batch.chosen, batch.rejected)         # (P,)
            scaler.scale(losses.sum() / args.batch).backward()
            margins = (rewards[batch.chosen] - rewards[batch.rejected]).detach()
            run.log.add(len(losses), loss=losses.detach().sum(),
                        accuracy=ranked_correctly(margins, 0.0).sum())
        lr = args.lr * min(warmup(step, run.n_warmup), cosine(step, run.n_steps))
        grad_norm = update(model, optimizer, scaler, lr, args.clip)
        run.log.note_update(step, grad_norm, lr)
    if not held_out:
        return run.n_steps
    model.load_state_dict(best.weights)
    return best.step


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
    correct = ranked_correctly(reward_margins(model, items, args.row_length), 0.0)
    log.add(len(correct), held_out_accuracy=correct.sum())
    return correct.double().mean().item()


def reward_margins(model, items, row_length):
    """(P,) reward of the chosen minus that of the rejected answer, for all pairs of a list of
    Encoded."""
    rewards = numbers_of(model, model.rewards, items, row_length, "rewards")
    return differences(rewards, items)


@torch.no_grad()
def normalise(model, items, row_length):
    """Shift and scale a reward model in place, so that its rewards of the answers of a list of
    Encoded, one each, have mean 0 and standard deviation 1. Raises UserError if all are the same.
    """
    rewards = torch.tensor(numbers_of(model, model.rewards, items, row_length, "rewards")).flatten()
    mean, std = rewards.mean(), rewards.std()
    if not std > 0:
        raise UserError("the reward model gives all answers the same reward: it needs more --steps "
                        "or a higher --lr")
    model.scalar.weight.div_(std)
    model.scalar.bias.sub_(mean).div_(std)


def answers_of(sft, prompts, tokenizer, args):
    """One sampled answer to each of a list of prompts (ids), as a list of Encoded."""
    answers = sample_answers(sft, prompts, args.max_new_tokens, args.seed + 2, tokenizer.eot_token,
                             progress="sampling sft")
    return [Encoded(prompt, [answer], []) for prompt, answer in zip(prompts, answers)]


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


@command
def main(argv=None):
    args = parse_args(argv)
    device = begin_run(args, reads=["sft", "data"], writes=["reward.pt", "reward_metrics.csv"])
    sft, tokenizer, facts = open_start(args, device, DEFAULTS["lr"])
    preferences, held_out = task_of(args).encoded_preferences(tokenizer, args)
    choosing, reporting = halves(held_out)

    model = ScalarGPT.from_gpt(sft)
    print(f"reward model from {args.sft} on {sum(len(item.pairs) for item in preferences):,} pairs "
          f"of {len(preferences):,} prompts, on {device}")
    best_step = train(model, preferences, choosing, args)
    prompts = [item.prompt for item in preferences[:N_NORMALISE]]
    normalise(model, answers_of(sft, prompts, tokenizer, args), sft.config.block_size)
    save_checkpoint(args.out / "reward.pt", model, **facts | {"stage": "reward"})
    print(f"wrote {args.out / 'reward.pt'}, the weights of step {best_step}")
    epoch = best_step * args.batch / sum(len(item.pairs) for item in preferences)
    report_accuracy(model, sft, reporting, tokenizer, epoch, args)
    (args.out / "reward_state.pt").unlink(missing_ok=True)      # the run has finished


def halves(items):
    """Two halves of a list of Encoded that share no prompt: every second distinct one."""
    number = {}                                     # {prompt: its index among the distinct ones}
    parts = [], []
    for item in items:
        i = number.setdefault(tuple(item.prompt), len(number))
        parts[i % 2].append(item)
    return parts


def report_accuracy(model, sft, items, tokenizer, epoch, args):
    """Measure the reward model on held-out pairs (a list of Encoded), beside the implicit reward of
    dpo.pt, and its correlation with the ground truth. Prints and writes reward.json."""
    found = {"epoch": epoch, "pairs": sum(len(item.pairs) for item in items), "correlation": None}
    if items:
        correct = ranked_correctly(reward_margins(model, items, args.row_length), 0.0)
        found |= means_over_pairs({"accuracy": correct}, items)
        rows = {"reward model": {name: found[name] for name in ("accuracy", "accuracy_se")}}
        dpo_path = args.out / "dpo.pt"
        if dpo_path.exists():
            policies, reference, _, betas = open_with_reference([dpo_path], args.sft, sft.device,
                                                                args)
            rated = rate_pairs(policies, reference, items, betas)["dpo"]
            found["implicit_reward"] = {name: rated[name] for name in ("accuracy", "accuracy_se")}
            rows["implicit reward of dpo.pt"] = found["implicit_reward"]
        print(f"\npairs ranked correctly, of {found['pairs']:,} held-out pairs that the choice of "
              f"the weights did not see\n{table(rows)}")
    task = task_of(args)
    if items and task.has_reward:
        found["correlation"] = correlation_with_truth(model, items, task.reward(args), tokenizer,
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
    all_rewards = numbers_of(model, model.rewards, items, args.row_length, "rewards")
    for item, rewards in zip(items, all_rewards):
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
    add_task_flags(parser)
    parser.group("the run")(
        "--sft", type=path_type, help="checkpoint to start from (default: sft.pt of the run)")
    tasks = {name: {"lr": task.reward_lr} for name, task in TASKS.items()}
    add_training_flags(parser, DEFAULTS, "pairs", tasks)
    add_evaluation_flag(parser)
    add_answer_length_flag(parser)          # of the answers that normalise the rewards
    parser.set_defaults(init=None, tokenizer=None)
    args = parser.parse_args(argv)
    choose_task(args)
    fill_in(args, {"lr": task_of(args).reward_lr}, DEFAULTS)
    check_intervals(args)
    return args


if __name__ == "__main__":
    main()
