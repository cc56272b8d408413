"""What broken runs look like: one small run of DPO for each mistake, beside a healthy one.

    python -m experiments.symptoms                         # train, measure and draw all of them
    python -m experiments.symptoms --only lr_too_small     # one of them, or several: a,b
    python -m experiments.symptoms --list                  # print what each of them changes

docs/reading-curves.md explains the pictures. All runs start from one SFT model and one file of
preferences, and each one changes one thing: a flag of train_dpo.py, a few lines of the code (one of
the wrong answers of classroom/wrong_answers.py), or the preferences.

Each run is trained by train_dpo.py in a process of its own, because a wrong answer stays in place
until its process ends. What that run logs, it logs with the mistake. Afterwards, sample.py measures
the policy without the mistake: ground-truth reward, KL and so on, on held-out prompts.

Writes to out/symptoms/: a folder for each run, with dpo_metrics.csv, log.txt, samples.txt and
result.json; symptoms.md, a table of the results; and a picture for each group of symptoms. If the
command is interrupted, it continues with the missing runs. A run is also made again if its line in
SYMPTOMS changes. Left out on purpose: several seeds. These pictures are to be recognised, not
compared in the second digit.
"""

import json
import math
import multiprocessing
import os
import random
import shlex
import shutil
from collections import namedtuple
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import sample
import train_dpo
import train_sft
from classroom import wrong_answers
from data import is_held_out
from experiments.curves import GUIDE, read_metrics
from experiments.frontier import computed_once, remove_training_state
from experiments.plot import BLUE, GREY, ORANGE, pyplot, save
from runtime.cli import Parser, command, number_type, only_one_process, path_type
from runtime.errors import UserError
from runtime.files import claim_folder, make_folder
from runtime.flags import as_flags

# group: the picture. label: what was changed, in words. flags: of train_dpo.py, for this run; {out}
# stands for --out. wrong: names of wrong answers. rows: a function of the rows of the preferences
# file that returns those to train on instead.
Symptom = namedtuple("Symptom", "name group label flags wrong rows", defaults=["", (), None])

# The defaults of train_dpo.py for the reviews, which are not those of --data, and a denser log.
HEALTHY = (" ".join(as_flags(train_dpo.parse_args([]), ["beta", "lr", "warmup", "clip"]))
           + " --log-every 5 --eval-every 40")


# ------------------------------------------------------------------------------------------------
# Changed preferences. rows: dicts with prompt, answers and ranking, as train_dpo.py writes them
# ------------------------------------------------------------------------------------------------


def same_opening(rows):
    """All answers begin with the same long text, so that a short row cuts off where they differ."""
    opening = " The plot was good. I liked the acting." * 4
    return [row | {"answers": [opening + answer for answer in row["answers"]]} for row in rows]


def longest_first(rows):
    """A judge who prefers the longer answer, whatever it says."""
    ranked = []
    for row in rows:
        of_length = {len(answer): answer for answer in row["answers"]}      # one of each length
        if len(of_length) > 1:
            answers = [of_length[length] for length in sorted(of_length, reverse=True)]
            ranked.append({"prompt": row["prompt"], "answers": answers,
                           "ranking": list(range(len(answers)))})
    return ranked


def few_prompts(rows):
    """40 prompts to train on, and all those that are held out."""
    training = [row for row in rows if not is_held_out(row["prompt"])]
    return training[:40] + [row for row in rows if is_held_out(row["prompt"])]


def random_rankings(rows):
    """The same 40 prompts, with labels that say nothing; the held-out labels are the true ones."""
    rng = random.Random(0)
    changed = []
    for row in few_prompts(rows):
        if not is_held_out(row["prompt"]):
            row = row | {"ranking": rng.sample(row["ranking"], len(row["ranking"]))}
        changed.append(row)
    return changed


# ------------------------------------------------------------------------------------------------
# The symptoms
# ------------------------------------------------------------------------------------------------

SYMPTOMS = [
    Symptom("healthy", "", "nothing"),
    Symptom("healthy_60", "", "60 steps, 30 of them warm-up", "--steps 60"),
    Symptom("healthy_120", "", "nothing; its first 120 steps", "--steps 120"),
    # The loss stays at log 2.
    Symptom("lr_too_small", "stuck", "learning rate 1e-6", "--lr 1e-6"),
    Symptom("equal_answers", "stuck", "answers equal after the cut", "--row-length 32",
            ("pairs_of_equal_answers_kept",), same_opening),
    Symptom("prompt_alone_scored", "stuck", "the prompt scored, not the answer", "",
            ("loss_mask_inverted",)),
    Symptom("live_reference", "stuck", "the reference is the policy itself", "",
            ("reference_is_the_live_policy",)),
    # It does not start there, or is no number.
    Symptom("wrong_start", "start", "reference forgotten", "", ("reference_forgotten",)),
    Symptom("wrong_start_unchecked", "start", "reference forgotten, no check", "",
            ("reference_forgotten", "a_wrong_start_goes_unnoticed")),
    Symptom("overflow", "start", "log(sigmoid(z)), rate 5e-3, beta 20",
            "--lr 5e-3 --beta 20 --steps 60", ("logarithm_of_a_sigmoid",)),
    Symptom("no_overflow", "start", "logsigmoid(z), rate 5e-3, beta 20",
            "--lr 5e-3 --beta 20 --steps 60"),
    # The language.
    Symptom("lr_of_sft", "language", "learning rate of SFT, 5e-3", "--lr 5e-3"),
    Symptom("beta_too_small", "language", "beta 0.01", "--beta 0.01"),
    Symptom("beta_too_large", "language", "beta 20", "--beta 20"),
    Symptom("sft_skipped", "language", "SFT skipped", "--sft {out}/untrained/sft.pt"),
    Symptom("no_sigmoid", "language", "unlikelihood", "--loss unlikelihood --steps 351"),
    # The labels.
    Symptom("swapped_labels", "labels", "labels swapped in the file", "",
            ("chosen_and_rejected_swapped",)),
    Symptom("swapped_loss", "labels", "labels swapped in the loss", "",
            ("swapped_in_the_loss",)),
    Symptom("longer_wins", "labels", "the longer answer wins", "", (), longest_first),
    Symptom("few_prompts", "labels", "40 prompts, 94 epochs", "--steps 351", (), few_prompts),
    Symptom("random_labels", "labels", "40 prompts, random labels", "--steps 351", (),
            random_rankings),
    # What is scored.
    Symptom("mean_for_sum", "scored", "mean, not sum", "", ("mean_for_sum",)),
    Symptom("prompt_scored", "scored", "prompt scored as well", "", ("prompt_scored",)),
    Symptom("no_end_of_text", "scored", "no end-of-text", "", ("no_end_of_text",)),
]


# ------------------------------------------------------------------------------------------------
# The runs
# ------------------------------------------------------------------------------------------------


def prepare_shared_files(out):
    """Make what all runs share: the SFT model, the preferences, and a model without SFT."""
    if not (out / "preferences.jsonl").exists():
        train_dpo.main(["--out", str(out), "--steps", "1", "--eval-prompts", "2", "--resume"])
    if not (out / "untrained" / "sft.pt").exists():
        train_sft.main(["--out", str(out / "untrained"), "--reviews", "100", "--steps", "1",
                        "--lr", "1e-9"])            # a step that leaves the weights as they are


def flags_of(symptom, out):
    """The flags of train_dpo.py for a run, as a list. Those of the symptom come last and count."""
    data = out / symptom.name / "changed.jsonl" if symptom.rows else out / "preferences.jsonl"
    return shlex.split(f"--data {data} --tokenizer reviews --sft {out}/sft.pt --out "
                       f"{out}/{symptom.name} --eval-prompts 2 {HEALTHY} "
                       + symptom.flags.format(out=out))


def run_symptom(symptom, out, eval_prompts):
    """Train and measure. Returns the measures of sample.py --evaluate, and the seconds of CPU time;
    of a run that stopped, its last sentence instead of the measures."""
    folder, began = out / symptom.name, sum(os.times()[:4])
    shutil.rmtree(folder)                   # an interrupted run starts over
    make_folder(folder)
    if symptom.rows:
        lines = (out / "preferences.jsonl").read_text(encoding="utf-8").splitlines()
        changed = symptom.rows([json.loads(line) for line in lines])
        text = "".join(json.dumps(row) + "\n" for row in changed)
        (folder / "changed.jsonl").write_text(text, encoding="utf-8")
    process = multiprocessing.get_context("spawn").Process(
        target=train_with_mistakes, daemon=True,
        args=(symptom.wrong, flags_of(symptom, out), folder / "log.txt"))
    process.start()
    process.join()
    remove_training_state(folder)
    if process.exitcode == 0:
        found = measure_run(out, folder, eval_prompts)
    elif process.exitcode == 2:
        log = (folder / "log.txt").read_text(encoding="utf-8")
        found = {"stopped": log.split("train_dpo.py: ")[-1].strip()}
    else:
        raise UserError(f"{symptom.name}: the run failed; {folder / 'log.txt'} says why")
    return found | {"seconds": sum(os.times()[:4]) - began}


def train_with_mistakes(wrong, flags, path):
    """Run train_dpo.py with wrong answers in place; what it prints goes to a file."""
    with open(path, "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        for name in wrong:
            wrong_answers.apply(name)
        train_dpo.main(flags)


def measure_run(out, folder, eval_prompts):
    """What sample.py measures of the policy in a folder, compared to the SFT model, on the true
    labels. Its samples go to a file."""
    shutil.copy(out / "preferences.jsonl", folder)      # where sample.py looks for held-out pairs
    with (open(folder / "samples.txt", "w", encoding="utf-8") as file, redirect_stdout(file),
          redirect_stderr(file)):
        sample.main(["--out", str(folder), "--eval-prompts", str(eval_prompts), "--evaluate",
                     str(out / "sft.pt"), str(folder / "dpo.pt"), "--reference",
                     str(out / "sft.pt")])
    return json.loads((folder / "evaluation.json").read_text())["policies"]["dpo"]


# ------------------------------------------------------------------------------------------------
# The table and the pictures
# ------------------------------------------------------------------------------------------------

MEASURES = {"reward": "z.2f", "kl": "z.2f", "win_rate": ".2f", "well_formed": ".2f",
            "length": ".1f", "finished": ".2f", "distinct_2": ".4f", "accuracy": ".2f"}
# {title: (columns of dpo_metrics.csv, what they are multiplied by, where a run starts)}
PANELS = {"loss": (["loss"], 1, math.log(2)), "accuracy, %": (["accuracy"], 100, 50),
          "implicit reward": (["chosen_reward", "rejected_reward"], 1, 0),
          "log-probs, nats": (["chosen_logp", "rejected_logp"], 1, None)}
# Twenty panels in a picture: no grid and no tick marks, which would make most of the file.
SMALL = {"font.size": 8, "axes.grid": False, "xtick.bottom": False, "ytick.left": False}


def as_table(results):
    """The measures of all runs as a table in markdown. results: {name: what run_symptom
    returned}."""
    lines = ["| run | " + " | ".join(f"`{name}`" for name in MEASURES) + " |",
             "|---" * (len(MEASURES) + 1) + "|"]
    for name, found in results.items():
        if "stopped" in found:
            cells = ["stopped"] + [""] * (len(MEASURES) - 1)
        else:
            cells = [format(found[measure], form) for measure, form in MEASURES.items()]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_symptoms(symptoms, out, path):
    """Draw the curves of several runs as an SVG file, a row for each, with the healthy run in
    grey behind them."""
    plt = pyplot(letters="none")
    plt.rcParams |= SMALL
    healthy = read_metrics(out / "healthy" / "dpo_metrics.csv")
    figure, rows = plt.subplots(len(symptoms), len(PANELS), squeeze=False,
                                figsize=(11, 1.9 * len(symptoms) + 0.3))
    for row, symptom in zip(rows, symptoms):
        broken = read_metrics(out / symptom.name / "dpo_metrics.csv")
        for ax, (title, (names, scale, start)) in zip(row, PANELS.items()):
            if start is not None:
                ax.axhline(start, **GUIDE)
            draw_metrics(ax, names, scale, healthy, [GREY, GREY])
            draw_metrics(ax, names, scale, broken, [BLUE, ORANGE])
            ax.set_title(title, fontsize=8)
            ax.locator_params(nbins=3)
        row[0].set_ylabel(symptom.label.replace(", ", ",\n"))
    for ax in rows[-1]:
        ax.set_xlabel("step")
    figure.tight_layout()
    keys = {"healthy run": dict(color=GREY), "this run; chosen answers": dict(color=BLUE),
            "rejected answers": dict(color=ORANGE, linestyle="--"),
            "held out": dict(color=GREY, linestyle="", marker="o", markersize=3)}
    figure.legend([plt.Line2D([], [], **key) for key in keys.values()], keys, ncols=len(keys),
                  loc="lower center", bbox_to_anchor=(0.5, 1))
    save(figure, path)


def draw_metrics(ax, names, scale, metrics, colours):
    """One or two metrics of a run over its steps: the first solid, the second dashed. Held-out
    values are dots. Of log-probs only they are shown, if they were logged: those of a training
    batch say more about the batch than about the run. Neither is the last training value, if it is
    the mean of fewer steps than the others."""
    for name, colour, line in zip(names, colours, ["-", "--"]):
        steps, values = metrics.get(name, ([], []))
        if len(steps) > 1 and steps[-1] - steps[-2] < steps[0]:
            steps, values = steps[:-1], values[:-1]
        held_out_steps, held_out = metrics.get(f"held_out_{name}", ([], []))
        dots = "o"
        if held_out and name.endswith("logp"):
            steps, values, dots = [], [], f"o{line}"
        ax.plot(steps, [scale * value for value in values], line, color=colour, linewidth=1.2)
        ax.plot(held_out_steps, [scale * value for value in held_out], dots, color=colour,
                linewidth=1.2, markersize=3)


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--only", metavar="NAMES", help="runs to make, separated by commas (default: all)")
    add("--list", action="store_true", help="print the runs and what each changes, and stop")
    add("--out", type=path_type, default=Path("out/symptoms"), help="default out/symptoms")
    add("--assets", type=path_type, help="folder of the pictures (default: that of --out)")
    add("--eval-prompts", type=number_type(int, 2), default=256,
        help="held-out prompts to measure each policy on (default 256)")
    args = parser.parse_args(argv)
    names = [symptom.name for symptom in SYMPTOMS]
    args.names = args.only.split(",") if args.only else names
    for name in args.names:
        if name not in names:
            raise UserError(f"--only {name}: no such run; --list prints all of them")
    return args


def config_of(symptom, args):
    """What the result of a run depends on."""
    return {"flags": flags_of(symptom, args.out), "wrong": list(symptom.wrong),
            "rows": symptom.rows.__name__ if symptom.rows else None,
            "eval_prompts": args.eval_prompts}


@command
def main(argv=None):
    args = parse_args(argv)
    if args.list:
        for symptom in SYMPTOMS:
            print(f"{symptom.name:22} {symptom.label}")
        return
    only_one_process("comparing runs")
    chosen = [symptom for symptom in SYMPTOMS if symptom.name in ["healthy", *args.names]]
    claim_folder(args.out)
    prepare_shared_files(args.out)
    results = {}
    for symptom in chosen:
        print(f"{symptom.name}: {symptom.label}")
        results[symptom.name] = computed_once(args.out / symptom.name, config_of(symptom, args),
                                              run_symptom, symptom, args.out, args.eval_prompts)
    (args.out / "symptoms.md").write_text(as_table(results), encoding="utf-8")
    print(as_table(results))
    draw_groups(chosen, args)


def draw_groups(chosen, args):
    """A picture for each group of the chosen runs. A run that stopped at step 0 has no curves, only
    what was held out before."""
    make_folder(args.assets or args.out)
    for group in dict.fromkeys(symptom.group for symptom in chosen if symptom.group):
        symptoms = [symptom for symptom in chosen if symptom.group == group
                    and "loss" in read_metrics(args.out / symptom.name / "dpo_metrics.csv")]
        if symptoms:
            draw_symptoms(symptoms, args.out, (args.assets or args.out) / f"symptoms-{group}.svg")


if __name__ == "__main__":
    main()
