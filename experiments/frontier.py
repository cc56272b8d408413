"""The frontier: what reward each method buys at what distance from the reference.

    python -m experiments.frontier              # trains, measures, draws; interrupted, it goes on
    python -m experiments.frontier --seeds 1    # half the time

The paper's central picture, on the embedded reviews task. From one SFT model and one set of
preferences this trains, --seeds times each (the seed orders the batches),

    dpo             on pairs, for several beta
    plackett_luce   on rankings (A.3), for the same beta
    unlikelihood    the baseline of C.3, which has no beta, for several numbers of steps
    sft_chosen      maximum likelihood on the best answer to each prompt, for several epochs

and measures them as train_dpo.py does: ground-truth reward and sampled KL to the SFT model, on
held-out prompts at temperature 1. Beside them, from 128 answers of the SFT model to each of 256
prompts, best of N at its KL bound log N - (N - 1) / N, and the best that any policy can do,

    pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x)                                  (Eq. 15)

with pi_ref replaced by those answers: over them KL and reward of pi* are sums, for any beta.

Writes to out/frontier/: a folder with result.json for each run, which is not run again while its
settings are the same; frontier.json with all numbers; frontier.svg, where matplotlib is installed.
Any flag of train_dpo.py that is not named here is passed on to it. Left out on purpose: PPO.
"""

import copy
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

import train_dpo
import train_sft
from data import Encoded
from experiments.best_of import best_of, draw_answers
from experiments.plot import BLUE, GREEN, GREY, ORANGE, PURPLE, pyplot, save
from runtime.checkpoint import open_checkpoint
from runtime.cli import Parser, command, number_type, set_up
from runtime.errors import UserError
from runtime.files import make_folder, write_json
from runtime.report import side_by_side, table
from runtime.run import fingerprint
from sample import evaluate
from tasks import encode_splits, reviews
from tasks.reviews import prefixes, reward, well_formed

BETAS = [0.05, 0.15, 0.5, 1.5, 5]
STEPS = [180, 270, 352, 450, 600]       # of unlikelihood; 352 is the one epoch of the others
EPOCHS = [1, 4, 16]                     # of sft_chosen
NUMBERS = [1, 2, 4, 8, 16, 32, 64, 128]
GRADES = {"reward": reward, "well_formed": well_formed}


def grid(seeds):
    """Every run as (name, loss, its flags), the first seed of all before the second of any."""
    for seed in range(seeds):
        tail = ["--seed", str(seed)]
        for beta in BETAS:
            yield f"dpo, beta {beta}, {seed}", "dpo", ["--beta", str(beta), *tail]
            # 11 rankings of four answers are 66 pairs: about the 64 of a batch of the others.
            yield (f"plackett_luce, beta {beta}, {seed}", "plackett_luce",
                   ["--beta", str(beta), "--batch", "11", *tail])
        for steps in STEPS:
            yield (f"unlikelihood, {steps} steps, {seed}", "unlikelihood",
                   ["--steps", str(steps), *tail])
        for epochs in EPOCHS:
            yield (f"sft_chosen, {epochs} epochs, {seed}", "sft_chosen",
                   ["--epochs", str(epochs), "--lr", "5e-4", *tail])


class Start:
    """What all runs start from: the SFT model, its tokenizer, and preferences with their reference
    log-probs."""

    def __init__(self, args):
        """args: those of train_dpo.py."""
        device, sft = set_up(args), args.sft or Path("out/reviews/sft.pt")
        if not (args.sft or sft.exists()):
            train_sft.main([])
        self.model, self.tokenizer, _ = open_checkpoint(sft, device, args)
        args.row_length = self.row_length = self.model.config.block_size
        train_dpo.sample_preferences(self.model, self.tokenizer, args)
        self.training, self.held_out = encode_splits(
            reviews.preferences(args), reviews.name(args), self.tokenizer, args)
        self.key = [fingerprint(self.model), fingerprint(self.training + self.held_out)]
        train_dpo.add_reference(self.model, self.training + self.held_out, args)


def train(start, loss, flags, folder):
    """Train a policy. Returns it."""
    policy = copy.deepcopy(start.model)
    module = train_sft if loss == "sft_chosen" else train_dpo
    args = module.parse_args(flags if loss == "sft_chosen" else [*flags, "--loss", loss])
    args.out, args.row_length, args.log_every = folder, start.row_length, 10**9
    for state in folder.glob("*_state.*"):      # an interrupted run starts again
        state.unlink()
    training, held_out = start.training, start.held_out
    if loss == "sft_chosen":
        training, held_out = best_answers(training), best_answers(held_out)
    module.train(policy, training, held_out, args)
    for state in folder.glob("*_state.*"):      # the run has finished
        state.unlink()
    return policy


def best_answers(items):
    """The best answer of each of a list of Encoded, as what SFT trains on."""
    return [Encoded(item.prompt, [item.answers[item.pairs[0][0]]], []) for item in items]


def once(folder, config, compute):
    """compute(), a dict, kept in result.json with its settings; read from there the next time."""
    path = folder / "result.json"
    try:
        found = json.loads(path.read_text())
        if found["config"] == config:
            return found["result"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    make_folder(folder)
    result = compute()
    # Complete or not there: an interrupted run runs again.
    write_json(path, {"config": config, "result": result})
    return result


def measure(policy, start, args):
    """{"measures": reward, KL, ..., "answers": to the first two held-out prompts}."""
    prompts = prefixes(args.eval_prompts, True, start.tokenizer, args.seed + 1)
    measures, texts = evaluate({"policy": policy}, start.model, prompts, start.tokenizer,
                               args.max_new_tokens, args.seed + 1, **GRADES)
    measures = {name: value for name, value in measures["policy"].items()
                if not name.startswith("win_rate")}             # it would be against itself
    return {"measures": measures, "prompts": prompts[:2], "answers": texts["policy"][:2]}


def of_reference(start, args, numbers):
    """{"best_of": measures by N, "optimum": [{beta, reward, kl}, ...]} from answers of SFT."""
    prompts = prefixes(min(256, args.eval_prompts), True, start.tokenizer, args.seed + 1)
    columns = draw_answers(start.model, prompts, start.tokenizer, max(numbers),
                           args.max_new_tokens, args.seed + 1, **GRADES)
    return {"best_of": best_of(columns, numbers, "reward"),
            "optimum": [optimum(columns["reward"], beta)
                        for beta in torch.logspace(1, -1.7, 55).tolist()]}


def optimum(rewards, beta):
    """Reward and KL of Eq. 15 where the reference is a draw among (P, M) answers of each prompt."""
    ref_logps = torch.full_like(rewards, -math.log(rewards.size(1)))
    logps = train_dpo.optimal_policy(ref_logps, rewards, beta)
    kl = (logps.exp() * (logps - ref_logps)).sum(1).mean()
    return {"beta": beta, "reward": (logps.exp() * rewards).sum(1).mean().item(), "kl": kl.item()}


# ------------------------------------------------------------------------------------------------
# The picture
# ------------------------------------------------------------------------------------------------

STYLES = {"dpo": (BLUE, "o", "-", "DPO, pairs"),
          "plackett_luce": (GREEN, "^", "--", "DPO, rankings (Plackett-Luce)"),
          "sft_chosen": (PURPLE, "s", ":", "SFT on the chosen answers"),
          "unlikelihood": (ORANGE, "X", "-.", "unlikelihood")}


FURTHEST = 7.5          # nats at which the picture ends; runs beyond it are marked at its edge


def draw(runs, reference, path):
    """Reward and well-formed share against KL. runs: {name: result with its loss and setting}."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8))
    for ax, measure in zip(panels, ("reward", "well_formed")):
        for loss in STYLES:
            draw_loss(ax, measure, loss, [run for run in runs.values() if run["loss"] == loss])
        picks = list(reference["best_of"].values())
        ax.errorbar([p["kl_bound"] for p in picks], [p[measure] for p in picks],
                    yerr=[p[f"{measure}_se"] for p in picks], fmt="D", color=GREY, fillstyle="none",
                    linestyle=(0, (1, 3)), markersize=5, label="best of N of SFT, at its KL bound")
        ax.set_xlabel("KL to the SFT model, nats")
        ax.set_xlim(-0.15, FURTHEST)
    best = [p for p in reference["optimum"] if p["kl"] < 3.5]
    panels[0].plot([p["kl"] for p in best], [p["reward"] for p in best], color=GREY, linewidth=1,
                   label="the best possible (Eq. 15)")
    for name in ("N = 4", "N = 16", "N = 128"):
        pick = reference["best_of"].get(name)
        if pick:
            panels[0].annotate(name, (pick["kl_bound"], pick["reward"]), xytext=(-8, 4),
                               textcoords="offset points", ha="right", fontsize=9)
    panels[0].set_ylabel("ground-truth reward, from -1 to 1")
    panels[1].set_ylabel("share of well-formed texts")
    panels[1].set_ylim(-0.03, 1.03)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=3,
                  bbox_to_anchor=(0.5, -0.12))
    figure.tight_layout()
    save(figure, path)


def draw_loss(ax, measure, loss, runs):
    """The runs of one loss: each with its error bars, a line through the means of the settings."""
    colour, marker, line, label = STYLES[loss]
    means = {}
    for setting in {run["setting"]: None for run in runs}:
        points = [run["measures"] for run in runs if run["setting"] == setting]
        ax.errorbar([p["kl"] for p in points], [p[measure] for p in points],
                    xerr=[p["kl_se"] for p in points], yerr=[p[f"{measure}_se"] for p in points],
                    fmt=marker, color=colour, markersize=5, elinewidth=0.8, alpha=0.7)
        means[setting] = [sum(p[m] for p in points) / len(points) for m in ("kl", measure)]
    ax.plot(*zip(*sorted(means.values())), line, color=colour, alpha=0.6)
    ax.plot([], [], line, marker=marker, markersize=5, color=colour, label=label)
    for setting, (kl, y) in means.items():
        if kl > FURTHEST:
            ax.plot([FURTHEST], [y], ">", color=colour, clip_on=False)
            ax.annotate(f"{setting}: KL {kl:.0f}", (FURTHEST, y), xytext=(-8, -5), ha="right",
                        va="center", textcoords="offset points", color=colour, fontsize=9)
        elif measure == "reward" and loss == "dpo":
            above = kl > 3                      # where the line no longer rises
            ax.annotate(setting, (kl, y), xytext=(0, 9) if above else (10, -3), color=colour,
                        ha="center" if above else "left", va="bottom" if above else "center",
                        textcoords="offset points", fontsize=9)


def parse_args(argv):
    """Returns (args of train_dpo.py, number of seeds, the flags passed on)."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/frontier"), help="default out/frontier")
    add("--seeds", type=number_type(int, 1), default=2, help="runs of each setting (default 2)")
    own, rest = parser.parse_known_args(argv)
    args = train_dpo.parse_args([*rest, "--out", str(own.out)])
    if args.data:
        raise UserError("--data: a file of preferences has no ground truth to draw")
    return args, own.seeds, rest


@command
def main(argv=None):
    args, seeds, rest = parse_args(argv)
    make_folder(args.out)
    start, runs = Start(args), {}
    shared = {"start": start.key, "prompts": args.eval_prompts, "flags": rest}
    reference = once(args.out / "reference", {**shared, "numbers": NUMBERS},
                     lambda: of_reference(start, args, NUMBERS))
    for name, loss, flags in tqdm(list(grid(seeds)), "runs"):
        folder = args.out / name.replace(", ", "-").replace(" ", "_")
        result = once(folder, {**shared, "loss": loss, "own": flags}, lambda: measure(
            train(start, loss, flags if loss == "sft_chosen" else [*rest, *flags], folder),
            start, args))
        runs[name] = {"loss": loss, "setting": name.split(", ")[1], **result}
    print(f"{table({name: run['measures'] for name, run in runs.items()})}\n\n"
          f"best of N of SFT\n{table(reference['best_of'])}")
    prompts = next(iter(runs.values()))["prompts"]
    print(side_by_side(prompts, {f"{name}:": run["answers"] for name, run in runs.items()
                                 if name.endswith(", 0")}, reward))
    write_json(args.out / "frontier.json", {"runs": runs, "reference": reference})
    print(f"\nwrote {args.out / 'frontier.json'}")
    draw(runs, reference, args.out / "frontier.svg")


if __name__ == "__main__":
    main()
