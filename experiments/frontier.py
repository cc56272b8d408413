"""The frontier: how much reward each method gains at which KL divergence from the reference.

    python -m experiments.frontier              # train, measure and draw; continues if interrupted
    python -m experiments.frontier --seeds 1    # half the time
    python -m experiments.frontier --only dpo,ppo
    python -m experiments.frontier --task imdb-small --seeds 1 --out out/frontier-imdb

This is the paper's central figure, for the embedded reviews task or the real reviews. All runs
start from one SFT model and one set of preferences. Each setting is trained --seeds times, with the
batches in a different order each time:

    dpo             on pairs, for several values of beta
    plackett_luce   on rankings (A.3), for the same values of beta
    unlikelihood    the baseline of C.3, which has no beta, for several numbers of steps
    sft_chosen      maximum likelihood on the best answer to each prompt, for several epochs
    ppo             RLHF: PPO with a reward model of the same pairs, for several targets of the KL
    ppo_gt          PPO with the ground-truth reward, for the same targets
    online          DPO on the policy's own answers, ranked by that reward model, for several betas

Each policy is measured as in train_dpo.py: ground-truth reward, well-formedness (or what the judge
of imdb says) and sampled KL to the SFT model, on held-out prompts at temperature 1. For comparison,
128 answers of the SFT model to each of 256 prompts give best of N, at its KL bound log N - (N - 1)
/ N, and the best that any policy can do,

    pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x)                                  (Eq. 15)

Here pi_ref is replaced by a uniform draw from those answers, so the reward and the KL of pi* are
finite sums for any beta. Answers better than those are missing, so it is an estimate from below:
the mean of reward - beta KL = beta log Z over draws is at most its true value (Jensen).

Writes to out/frontier/: a folder with result.json for each run, which is reused as long as the
settings of the run stay the same; frontier.json with all numbers; and frontier.svg, if matplotlib
is installed. Flags that are not listed below are passed on to train_dpo.py, for the runs of its
losses.
"""

import argparse
import copy
import csv
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import train_dpo
import train_sft
from data import Encoded
from experiments import online, ppo, reward_model
from experiments.best_of import best_of, sample_and_measure
from experiments.plot import BLUE, GOLD, GREEN, GREY, ORANGE, PURPLE, pyplot, save
from model import GPT
from runtime.cli import Parser, command, number_type, only_one_process, path_type, set_up
from runtime.files import cached, fingerprint, make_folder, write_json
from runtime.flags import as_flags
from runtime.report import side_by_side, table
from sample import add_reference, evaluate, sample_answers
from tasks import TASKS, task_of
from tasks.checkpoint import open_checkpoint
from tasks.flags import flags_of_sft

# Settings were tuned on the reviews task, seed 100 and, for DPO, two more. DPO has the default
# learning rate of train_dpo.py; twice that rate gains more reward at a KL of 5 nats, but in some
# runs the KL doubles. PPO needs twice the number of epochs of its preset to reach a target.
SFT_LR, PPO_EPOCHS = "5e-4", "4"
BETAS = [0.15, 0.25, 0.5, 1.5, 5]
STEPS = [90, 120, 135, 176, 300]        # of unlikelihood; an epoch of pairs has about 176
EPOCHS = [1, 4, 16]                     # of sft_chosen
TARGETS = [1, 2, 4]                     # KL of ppo and ppo_gt, in nats
ONLINE_BETAS = [0.3, 0.5, 1]            # of online
GOAL = 0.3                              # reward, for the comparison of costs
NUMBERS = [1, 2, 4, 8, 16, 32, 64, 128]     # N of best of N


# ------------------------------------------------------------------------------------------------
# The runs
# ------------------------------------------------------------------------------------------------


def grid(seeds, only):
    """Yield every run of the methods in `only` as (name, method, flags): the first seed of all
    settings, then the second."""
    for seed in range(seeds):
        for method, setting, flags in settings():
            if method in only:
                yield f"{method}, {setting}, {seed}", method, [*flags, "--seed", str(seed)]


def settings():
    """Yield (method, setting, flags)."""
    for beta in BETAS:
        flags = ["--beta", str(beta)]
        yield "dpo", f"beta {beta}", flags
        # 11 rankings of four answers are 66 pairs, about as many as the 64 of the other runs.
        yield "plackett_luce", f"beta {beta}", [*flags, "--batch", "11"]
    for steps in STEPS:
        yield "unlikelihood", f"{steps} steps", ["--steps", str(steps)]
    for epochs in EPOCHS:
        yield "sft_chosen", f"{epochs} epochs", ["--epochs", str(epochs), "--lr", SFT_LR]
    for target in TARGETS:
        flags = ["--target-kl", str(target), "--epochs", PPO_EPOCHS]
        yield "ppo", f"KL {target}", ["--reward", "learned", *flags]
        yield "ppo_gt", f"KL {target}", ["--reward", "ground_truth", *flags]
    for beta in ONLINE_BETAS:
        yield "online", f"beta {beta}", ["--beta", str(beta)]


@dataclass
class Start:
    """What all runs start from."""

    model: GPT              # the SFT model
    tokenizer: object
    tokenizer_name: str
    prompts: list           # of texts, to measure on
    grades: dict            # as for sample.evaluate
    flags: list             # --task and other flags that all scripts have
    row_length: int
    training: list          # of Encoded, with their reference log-probs
    held_out: list          # of Encoded, with their reference log-probs
    key: list               # fingerprints of the model and of the preferences


def prepare_start(args):
    """Open the SFT model, sample preferences and compute their reference log-probs. Returns a
    Start. If no SFT model is named and the default run has none, it is trained first.

    args: those of train_dpo.py. Sets args.sft, and args.row_length to the block size of the model.
    """
    device = set_up(args)
    if args.sft is None:
        args.sft = Path("out") / args.task / "sft.pt"
        if not args.sft.exists():
            train_sft.main([*flags_of_sft(args), f"--out={args.sft.parent}"])
    model, tokenizer, facts = open_checkpoint(args.sft, device, args)
    args.row_length = model.config.block_size
    task = task_of(args)
    task.sample_preferences(model, tokenizer, sample_answers, args)
    training, held_out = task.encoded_preferences(tokenizer, args)
    key = [fingerprint(model), fingerprint(training + held_out)]
    add_reference(model, training + held_out, args)
    prompts = task.prompts(held_out, tokenizer, args)
    grades = task.grades(args, model, tokenizer)
    flags = as_flags(args, ["task", "data_dir", "labeller", "device", "precision"])
    return Start(model, tokenizer, facts["tokenizer"], prompts, grades, flags, args.row_length,
                 training, held_out, key)


def fit_reward_model(start, args):
    """Train the reward model of `ppo` on the preferences of the grid. Returns its reward.json."""
    began = time.process_time()
    reward_model.main([*start.flags, f"--out={args.out}", f"--sft={args.sft}"])
    return {"seconds": time.process_time() - began,
            **json.loads((args.out / "reward.json").read_text())}


def train_method(start, method, flags, folder):
    """Train a copy of the SFT model with one of the methods. Returns the policy."""
    policy = copy.deepcopy(start.model)
    remove_training_state(folder)   # an interrupted run starts over
    if method in ("ppo", "ppo_gt", "online"):
        train_on_own_answers(policy, start, method, flags, folder)
    else:
        train_on_preferences(policy, start, method, flags, folder)
    remove_training_state(folder)   # the run has finished
    return policy


def train_on_preferences(policy, start, method, flags, folder):
    """Train the policy with a loss of train_dpo.py, or with SFT on the chosen answers, in place."""
    training, held_out = start.training, start.held_out
    if method == "sft_chosen":
        module = train_sft
        args = train_sft.parse_args(flags)
        training, held_out = [[Encoded(item.prompt, [item.answers[item.pairs[0][0]]], [])
                               for item in items] for items in (training, held_out)]
    else:
        module = train_dpo
        args = train_dpo.parse_args([*flags, "--loss", method])
    args.out = folder
    args.row_length = start.row_length
    args.log_every = 10**9          # log the first and the last step only
    module.train(policy, training, held_out, args)


def train_on_own_answers(policy, start, method, flags, folder):
    """Train the policy with PPO or online DPO on the prompts of the preferences, in place."""
    module = online if method == "online" else ppo
    args = module.parse_args(flags)
    args.out, args.log_every = folder, 1
    args.row_length = start.row_length
    args.reward_model = folder.parent / "reward.pt"
    prompts = [list(item.prompt) for item in start.training]
    score_answers, _ = ppo.reward_function(start.tokenizer, start.tokenizer_name, policy.device,
                                           args)
    module.train(policy, start.model, prompts, score_answers, start.tokenizer.eot_token, args)


def remove_training_state(folder):
    for state in folder.glob("*_state.*"):
        state.unlink()


def train_and_measure(start, args, method, flags, folder):
    """Train and measure one run. Returns what `measure_policy` returns, and the cost: seconds of
    CPU time of the training, and the tokens sampled in it."""
    began = time.process_time()
    policy = train_method(start, method, flags, folder)
    seconds = time.process_time() - began
    tokens = 0
    if method in ("ppo", "ppo_gt"):
        answers = ppo.parse_args(flags).batch
        tokens = sum(answers * float(row["length"]) for row in rows_of(folder / "ppo_metrics.csv"))
    elif method == "online":
        tokens = sum(float(row["answers"]) * float(row["length"])
                     for row in rows_of(folder / "online_metrics.csv") if row["answers"])
    return {**measure_policy(policy, start, args), "seconds": seconds,
            "sampled_tokens": round(tokens)}


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def computed_once(folder, config, compute, *arguments):
    """compute(*arguments), a dict. It is saved in result.json, and read from there as long as
    config, the settings it depends on, stays the same."""
    make_folder(folder)
    return json.loads(cached(folder / "result.json", json.dumps(config),
                             lambda: json.dumps(compute(*arguments), indent=2) + "\n"))


# ------------------------------------------------------------------------------------------------
# The measurements
# ------------------------------------------------------------------------------------------------


def measure_policy(policy, start, args):
    """Measure a policy on held-out prompts. Returns {"measures": reward, kl and so on, "prompts":
    the first two prompts, "answers": the answers to these}."""
    measures, texts = evaluate({"policy": policy}, start.model, start.prompts, start.tokenizer,
                               args.max_new_tokens, args.seed, start.grades)
    measures = {name: value for name, value in measures["policy"].items()
                if not name.startswith("win_rate")}     # that would be against the policy itself
    return {"measures": measures, "prompts": start.prompts[:2], "answers": texts["policy"][:2]}


def measure_reference(start, args, numbers):
    """Measure best of N, for each N of `numbers`, and the optimum, both over answers of the SFT
    model. Returns {"best_of": {"N = ...": measures}, "optimum": [{beta, reward, kl}, ...]}."""
    columns = sample_and_measure(start.model, start.prompts[:256], start.tokenizer, max(numbers),
                                 args.max_new_tokens, args.seed + 1, start.grades)
    betas = torch.logspace(1, -1.7, 55).tolist()
    return {"best_of": best_of(columns, numbers, "reward"),
            "optimum": [optimum(columns["reward"], beta) for beta in betas]}


def optimum(rewards, beta):
    """Reward and KL of the optimal policy of Eq. 15, if the reference draws uniformly from M
    answers to each of P prompts: an estimate from below. rewards: (P, M). Returns {"beta",
    "reward", "kl"}."""
    ref_logps = torch.full_like(rewards, -math.log(rewards.size(1)))        # (P, M)
    logps = train_dpo.optimal_policy(ref_logps, rewards, beta)              # (P, M)
    expected_reward = (logps.exp() * rewards).sum(1).mean()
    kl = (logps.exp() * (logps - ref_logps)).sum(1).mean()
    return {"beta": beta, "reward": expected_reward.item(), "kl": kl.item()}


# ------------------------------------------------------------------------------------------------
# The picture
# ------------------------------------------------------------------------------------------------

# Colour, marker, line style and name of each method.
STYLES = {"dpo": (BLUE, "o", "-", "DPO, pairs"),
          "plackett_luce": (GREEN, "^", "--", "DPO, rankings"),
          "sft_chosen": (PURPLE, "s", ":", "SFT on the chosen answers"),
          "unlikelihood": (ORANGE, "X", "-.", "unlikelihood"),
          "ppo": (GOLD, "v", "-", "PPO, learned reward"),
          "ppo_gt": (GOLD, "P", "--", "PPO, true reward"),
          "online": (BLUE, "D", "--", "DPO, own answers")}
# Where the names stand for the reviews task: KL and reward, or KL and share of well-formed texts.
NAME_PLACES = {
    "reward": {"dpo": (5.9, 0.46), "plackett_luce": (4.95, 0.43), "sft_chosen": (1.25, 0.222),
               "unlikelihood": (4.6, 0.355), "ppo": (4.75, 0.575), "ppo_gt": (4.75, 0.64),
               "online": (3.55, 0.52)},
    "well_formed": {"dpo": (5.5, 0.65), "plackett_luce": (4.95, 0.78), "sft_chosen": (0.1, 0.74),
                    "unlikelihood": (6.9, 0.57), "ppo": (4.85, 0.975), "ppo_gt": (4.75, 0.92),
                    "online": (3.6, 0.885)}}

REWARD = {"well_formed": "ground-truth reward, from -1 to 1",
          "judge": "probability of a favourable text, labeller"}
SECOND = {"well_formed": "share of well-formed texts",
          "judge": "probability of a favourable text, judge"}
FURTHEST = 8.5          # KL in nats at the right edge, where runs beyond it are marked


def draw_frontier(runs, reference, second, path):
    """Draw reward and a second measure against KL, as an SVG file.

    runs: {name: a result of `measure_policy`, with its method and setting}. reference: what
    measure_reference returns. second: well_formed or judge.
    """
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8))
    for ax, measure in zip(panels, ("reward", second)):
        for method in STYLES:
            drawn = [run for run in runs.values() if run["method"] == method]
            if drawn:
                draw_method(ax, measure, method, drawn)
            if drawn and second == "well_formed":
                ax.text(*NAME_PLACES[measure][method], STYLES[method][-1], fontsize=9,
                        color=STYLES[method][0])
        draw_best_of(ax, measure, reference["best_of"])
        ax.set_xlabel("KL to the SFT model, nats")
        ax.set_xlim(-0.15, FURTHEST)
    left, right = panels
    draw_optimum(left, reference["optimum"])
    label_best_of(left, reference["best_of"])
    left.set_ylabel(REWARD[second])
    right.set_ylabel(SECOND[second])
    right.set_ylim(-0.03, 1.03)
    if second == "judge":
        right.legend()
    figure.tight_layout()
    save(figure, path)


def draw_method(ax, measure, method, runs):
    """The runs of one method with their error bars, and a line through the means of the settings.
    """
    colour, marker, line, name = STYLES[method]
    means = {}                          # {setting: (mean KL, mean of the measure)}
    for setting in dict.fromkeys(run["setting"] for run in runs):
        points = [run["measures"] for run in runs if run["setting"] == setting]
        kls = [point["kl"] for point in points]
        values = [point[measure] for point in points]
        ax.errorbar(kls, values, xerr=[point["kl_se"] for point in points],
                    yerr=[point[f"{measure}_se"] for point in points],
                    fmt=marker, color=colour, markersize=5, elinewidth=0.8, alpha=0.7)
        means[setting] = (sum(kls) / len(kls), sum(values) / len(values))
    curve = sorted(means.values())
    ax.plot([kl for kl, _ in curve], [value for _, value in curve], line, color=colour, alpha=0.6,
            label=name)
    for setting, (kl, value) in means.items():
        if kl > FURTHEST and method != "plackett_luce":         # whose points are those of DPO
            mark_at_edge(ax, setting, kl, value, colour)
        elif measure == "reward" and method == "dpo":
            label_setting(ax, setting, kl, value, colour)


def mark_at_edge(ax, setting, kl, value, colour):
    """An arrow at the right edge for a setting whose KL is beyond it."""
    ax.plot([FURTHEST], [value], ">", color=colour, clip_on=False)
    ax.annotate(f"{setting}: KL {kl:.0f}", (FURTHEST, value), xytext=(-8, -10), ha="right",
                va="center", textcoords="offset points", color=colour, fontsize=9)


def label_setting(ax, setting, kl, value, colour):
    """The name of a setting: right of its point, or where others are there, below or above."""
    place = {"xytext": (10, -4), "ha": "left", "va": "center"}
    if kl > 3:
        place = {"xytext": (0, 6), "ha": "center", "va": "bottom"}
    elif kl > 2:
        place = {"xytext": (12, -16), "ha": "left", "va": "center"}
    ax.annotate(setting, (kl, value), color=colour, textcoords="offset points", fontsize=9, **place)


def draw_best_of(ax, measure, measures_by_n):
    """Best of N with its error bars. measures_by_n: {"N = ...": measures}."""
    points = list(measures_by_n.values())
    ax.errorbar([point["kl_bound"] for point in points], [point[measure] for point in points],
                yerr=[point[f"{measure}_se"] for point in points],
                fmt="D", color=GREY, fillstyle="none", linestyle=(0, (1, 3)), markersize=5)


def label_best_of(ax, measures_by_n):
    """The name of its last point."""
    name, point = list(measures_by_n.items())[-1]
    ax.annotate(f"best of\n{name}", (point["kl_bound"], point["reward"]), xytext=(-8, 4),
                textcoords="offset points", ha="right", fontsize=9)


def draw_optimum(ax, points):
    """The reward of the optimal policies, estimated from below, up to a KL of 3.5. points: [{beta,
    reward, kl}, ...]."""
    shown = [point for point in points if point["kl"] < 3.5]
    ax.plot([point["kl"] for point in shown], [point["reward"] for point in shown], color=GREY,
            linewidth=1)
    ax.text(0.05, 0.6, "the best possible,\nestimated from below", fontsize=9)


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def list_of_methods(text):
    """An argparse type: "dpo,ppo" to ["dpo", "ppo"]."""
    methods = text.split(",")
    if not set(methods) <= set(STYLES):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(STYLES)}, not {text!r}")
    return methods


def parse_args(argv):
    """Returns (args of train_dpo.py, the flags listed here, the flags passed on)."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=path_type, default=Path("out/frontier"),
        help="folder for the runs, the numbers and the picture (default out/frontier)")
    add("--seeds", type=number_type(int, 1), default=2, help="runs of each setting (default 2)")
    add("--only", type=list_of_methods, default=list(STYLES), metavar="METHOD,METHOD,...",
        help="which methods to run and to draw (default all)")
    add("--task", choices=[name for name, task in TASKS.items() if task.has_reward],
        default="reviews", help="a task with a ground-truth reward (default reviews)")
    own, rest = parser.parse_known_args(argv)
    args = train_dpo.parse_args([*rest, "--task", own.task, "--out", str(own.out)])
    return args, own, rest


@command
def main(argv=None):
    args, own, rest = parse_args(argv)
    only_one_process("the frontier")
    make_folder(args.out)
    start = prepare_start(args)
    shared = {"start": start.key, "prompts": args.eval_prompts, "flags": rest,
              "defaults": train_dpo.DEFAULTS | task_of(args).dpo}
    reference = computed_once(args.out / "reference", {**shared, "numbers": NUMBERS},
                              measure_reference, start, args, NUMBERS)
    learned = None
    if {"ppo", "online"} & set(own.only):
        learned = computed_once(args.out / "reward_model", shared, fit_reward_model, start, args)
    runs = {}
    for name, method, own_flags in tqdm(list(grid(own.seeds, own.only)), "runs", disable=None):
        folder = args.out / name.replace(", ", "-").replace(" ", "_")
        config = {**shared, "method": method, "own": own_flags}
        flags = [*(rest if method in train_dpo.LOSSES else start.flags), *own_flags]
        result = computed_once(folder, config, train_and_measure, start, args, method, flags,
                               folder)
        _, setting, _ = name.split(", ")
        runs[name] = {"method": method, "setting": setting, **result}
    print_frontier(runs, reference, start.grades["reward"])
    write_json(args.out / "frontier.json", {"runs": runs, "reference": reference,
                                            "reward_model": learned})
    print(f"\nwrote {args.out / 'frontier.json'}")
    second = next(measure for measure in start.grades if measure != "reward")
    draw_frontier(runs, reference, second, args.out / "frontier.svg")


def print_frontier(runs, reference, reward):
    """Print the measures of all runs, two answers of the first run of each setting with their
    rewards, and the costs."""
    measures = {name: run["measures"] for name, run in runs.items()}
    print(f"{table(measures)}\n\nbest of N of SFT\n{table(reference['best_of'])}")
    prompts = next(iter(runs.values()))["prompts"]
    answers = {f"{name}:": run["answers"] for name, run in runs.items() if name.endswith(", 0")}
    print(side_by_side(prompts, answers, reward))
    print(f"\nthe cheapest run of each method with a reward of {GOAL} or more: seconds of CPU time "
          "and tokens sampled in\ntraining, without what methods share: the preferences and the "
          f"reward model\n{table(cheapest(runs, GOAL))}")


def cheapest(runs, goal):
    """Of each method, the run with at least this reward that took the fewest seconds: {name:
    {reward, seconds, sampled_tokens}}. Methods without such a run are left out."""
    found = {}
    for method in STYLES:
        good = [(run["seconds"], name) for name, run in runs.items()
                if run["method"] == method and run["measures"]["reward"] >= goal]
        if good:
            seconds, name = min(good)
            found[name] = {"reward": runs[name]["measures"]["reward"], "seconds": seconds,
                           "sampled_tokens": runs[name]["sampled_tokens"]}
    return found or {"none": {}}


if __name__ == "__main__":
    main()
