"""experiments/: the frontier, the curves, the distributions, and the judges of C.2 and D.3.

    pytest tests/test_experiments.py
"""

import errno
import html
import importlib.util
import json
import math
import os
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings, strategies as st

import sample
import train_dpo
from data import Encoded, is_held_out
from experiments import (
    best_of,
    curves,
    distribution,
    frontier,
    online,
    ppo,
    probe,
    reward_model,
    symptoms,
    win_rate,
)
from experiments.plot import BLUE, GREEN, pyplot, save
from model import GPT, GPTConfig
from runtime.statistics import wilson
from tasks import held_out_pairs, held_out_prompts, reviews, sampled
from tasks.checkpoint import load_checkpoint, save_checkpoint
from tasks.tokenizers import get_tokenizer

TOKENIZER = get_tokenizer("reviews")
for_all = settings(deadline=None, max_examples=50, derandomize=True)
needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"),
                                      reason="matplotlib is not installed")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with two small checkpoints and a file of preferences."""
    out = tmp_path_factory.mktemp("run")
    for seed, name in enumerate(["sft", "dpo"]):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(64, TOKENIZER.n_vocab, 1, 2, 16), 0.3)
        save_checkpoint(out / f"{name}.pt", model, tokenizer="reviews", source="reviews")
    write_lines(out / "pairs.jsonl", [{"prompt": f"The plot {i}", "ranking": [1, 0],
                                       "answers": [" was dull.", " was good."]}
                                      for i in range(100)])
    return out


def refused(main, argv, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in argv])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.count("\n") == 1, message
    return message


@pytest.mark.parametrize("module", [best_of, frontier, curves, distribution,
                                    win_rate, reward_model, ppo, symptoms, online, probe])
def test_every_flag_is_read(module):
    source = Path(module.__file__).read_text()
    root = Path(sample.__file__).parent
    shared = "\n".join(path.read_text() for path in [*root.glob("*.py"), *root.glob("*/*.py")])
    for flag, rest in re.findall(r'\badd\("([\w-]+)"((?:.|\n)*?)\n    (?=add|\w)', source):
        name = re.search(r'dest="(\w+)"', rest)
        name = name[1] if name else flag.lstrip("-").replace("-", "_")
        assert re.search(rf"\b(args|own)\.{name}\b", source + shared), flag


# ------------------------------------------------------------------------------------------------
# What all pictures share
# ------------------------------------------------------------------------------------------------


def assert_has_no_background(picture):
    """Assert that the picture has no filled background, so it is readable on light and on dark."""
    patch = picture[picture.index('<g id="patch_1">'):]
    assert "fill: none" in patch[:patch.index("</g>")]


@needs_matplotlib
def test_a_saved_picture_has_few_lines_and_is_the_one_that_matplotlib_draws(tmp_path, capsys):
    """The same elements with the same attributes and texts. Only blanks differ, which mean nothing
    between elements, and as much as a line break between the numbers of a path."""
    figure, ax = pyplot(letters="none").subplots()
    ax.plot(range(99), [(i * i) % 7 for i in range(99)], label="two\nlines  and $x_0^2$")
    ax.legend()
    figure.savefig(tmp_path / "drawn.svg", transparent=True, bbox_inches="tight",
                   metadata={"Date": None})
    save(figure, tmp_path / "saved.svg")
    drawn, saved = [
        [(node.tag, (node.text or "").strip(),
          {name: value.split() for name, value in node.attrib.items()})
         for node in ElementTree.parse(tmp_path / name).iter()]
        for name in ("drawn.svg", "saved.svg")]
    assert saved == drawn
    assert len((tmp_path / "drawn.svg").read_text().splitlines()) > 400
    assert len((tmp_path / "saved.svg").read_text().splitlines()) < 30


# ------------------------------------------------------------------------------------------------
# The frontier
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch, run):
    """A grid of one run per method, with preferences copied from a file instead of sampled."""
    for name, value in {"BETAS": [0.5], "STEPS": [2], "EPOCHS": [1], "NUMBERS": [1, 2],
                        "TARGETS": [1], "ONLINE_BETAS": [0.5]}.items():
        monkeypatch.setattr(frontier, name, value)
    small = ppo.PRESETS["small"] | {"batch": 32, "minibatch": 32, "epochs": 1}
    monkeypatch.setattr(ppo, "PRESETS", {"small": small})

    def copied(task, model, tokenizer, sample_answers, args):
        task.source(args).write_bytes((run / "pairs.jsonl").read_bytes())
    monkeypatch.setattr(sampled.SampledTask, "sample_preferences", copied)
    # An untrained model's answers do not end and have no opinion.
    monkeypatch.setattr(sampled.SampledTask, "answers_must_end", False)
    monkeypatch.setattr(reviews.Reviews, "reward",
                        lambda task, args: lambda texts: [len(text) % 5 / 5 for text in texts])
    return ("--seeds 1 --eval-prompts 6 --max-new-tokens 6 --warmup 1 --device cpu --sft "
            f"{run / 'sft.pt'}").split()


def no_picture(monkeypatch):
    monkeypatch.setattr(frontier, "draw_frontier", lambda *_: None)


METHODS = ["dpo", "plackett_luce", "unlikelihood", "sft_chosen", "ppo", "ppo_gt", "online"]


def without_seconds(path):
    """The content of a frontier.json, without what the clock says."""
    return re.sub(r'"seconds": [\d.e+-]+', "", path.read_text())


def test_the_frontier_trains_each_method_from_one_start_and_measures_it(small, tmp_path,
                                                                        monkeypatch):
    no_picture(monkeypatch)
    started, real = [], frontier.train_method

    def train(start, *rest):
        started.append(start.model.wte.weight.clone())
        return real(start, *rest)
    monkeypatch.setattr(frontier, "train_method", train)
    frontier.main([*small, "--out", str(tmp_path)])
    numbers = json.loads((tmp_path / "frontier.json").read_text())
    assert list(numbers["runs"]) == ["dpo, beta 0.5, 0", "plackett_luce, beta 0.5, 0",
                                     "unlikelihood, 2 steps, 0", "sft_chosen, 1 epochs, 0",
                                     "ppo, KL 1, 0", "ppo_gt, KL 1, 0", "online, beta 0.5, 0"]
    assert len(started) == 7 and all(torch.equal(started[0], other) for other in started)
    found = [run["measures"] for run in numbers["runs"].values()]
    assert len({m["kl"] for m in found}) == 7         # seven policies, none of them the reference
    assert all(m["kl"] != 0 and {"reward", "reward_se", "kl_se", "well_formed"} <= set(m)
               and "win_rate" not in m for m in found)
    assert list(numbers["reference"]["best_of"]) == ["N = 1", "N = 2"]
    assert 0 <= numbers["reward_model"]["accuracy"] <= 1
    for run in numbers["runs"].values():
        samples_while_it_trains = run["method"] in ("ppo", "ppo_gt", "online")
        assert run["seconds"] > 0 and (run["sampled_tokens"] > 0) == samples_while_it_trains


def test_only_the_methods_asked_for_are_run(small, tmp_path, monkeypatch, capsys):
    no_picture(monkeypatch)
    frontier.main([*small, "--out", str(tmp_path), "--only", "ppo_gt,unlikelihood"])
    numbers = json.loads((tmp_path / "frontier.json").read_text())
    assert [run["method"] for run in numbers["runs"].values()] == ["unlikelihood", "ppo_gt"]
    assert numbers["reward_model"] is None              # PPO-GT does not need one
    message = refused(frontier.main, ["--only", "dpo,grpo"], capsys)
    assert "expected some of dpo" in message and "grpo" in message


def test_the_cheapest_run_is_the_fastest_of_those_that_reach_the_goal():
    """Of three runs of DPO with rewards 0.2, 0.3 and 0.4, the second takes the fewest seconds of
    those with 0.3 or more."""
    runs = {f"dpo, beta {i}, 0": {"method": "dpo", "measures": {"reward": reward},
                                  "seconds": seconds, "sampled_tokens": 0}
            for i, (reward, seconds) in enumerate([(0.2, 1), (0.3, 2), (0.4, 3)])}
    assert frontier.cheapest(runs, 0.3) == {
        "dpo, beta 1, 0": {"reward": 0.3, "seconds": 2, "sampled_tokens": 0}}


def test_an_interrupted_frontier_goes_on_and_a_changed_one_starts_again(small, tmp_path,
                                                                        monkeypatch):
    """A run is known by its settings: finished ones are read, an interrupted one is run again, and
    with other settings all are run again."""
    no_picture(monkeypatch)
    trained, real = [], frontier.train_method

    def train(start, method, *rest):
        if len(trained) == broken_at:
            raise KeyboardInterrupt
        trained.append(method)
        return real(start, method, *rest)
    monkeypatch.setattr(frontier, "train_method", train)
    methods = ["dpo", "unlikelihood", "sft_chosen"]
    flags, broken_at = [*small, "--out", str(tmp_path), "--only", ",".join(methods)], 1
    with pytest.raises(SystemExit):                     # how the command ends after Ctrl-C
        frontier.main(flags)
    assert trained == methods[:1]
    trained, broken_at = [], None
    frontier.main(flags)
    assert trained == methods[1:]
    whole = without_seconds(tmp_path / "frontier.json")
    trained = []
    frontier.main(flags)
    assert trained == [] and without_seconds(tmp_path / "frontier.json") == whole
    (tmp_path / "unlikelihood-2_steps-0" / "result.json").write_text("{")
    frontier.main(flags)
    assert trained == ["unlikelihood"]
    assert without_seconds(tmp_path / "frontier.json") == whole
    trained = []
    frontier.main([*flags, "--lr", "1e-3"])
    assert trained == methods


def test_the_sft_on_chosen_answers_reads_the_best_answers_only(small, tmp_path, monkeypatch):
    no_picture(monkeypatch)
    seen = []
    monkeypatch.setattr(frontier.train_sft, "train", lambda model, items, held, args: seen.extend(
        items))
    frontier.main([*small, "--out", str(tmp_path), "--only", "sft_chosen"])
    texts = {TOKENIZER.decode(answer[:-1]) for item in seen for answer in item.answers}
    assert texts == {" was good."} and all(len(item.answers) == 1 for item in seen)


@for_all
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6), st.floats(0.05, 20))
def test_the_optimum_is_equation_15_over_the_answers_drawn(rewards, beta):
    """Each of M answers has probability 1 / M under the reference, so pi* is a softmax of r / beta,
    and no other distribution over them has a higher E[r] - beta KL."""
    r = torch.tensor([rewards], dtype=torch.float64)
    found = frontier.optimum(r, beta)
    p = (r[0] / beta).softmax(0)
    kl = (p * (p * len(rewards)).log()).sum().item()
    assert found["reward"] == pytest.approx((p * r[0]).sum().item(), abs=1e-9)
    assert found["kl"] == pytest.approx(kl, abs=1e-9)
    other = torch.rand(len(rewards), generator=torch.Generator().manual_seed(0)).double()
    q = other / other.sum()
    score = (q * r[0]).sum() - beta * (q * (q * len(rewards)).log()).sum()
    assert score.item() <= found["reward"] - beta * found["kl"] + 1e-9


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_optimum_over_few_answers_is_an_estimate_from_below(beta):
    """Rewards are uniform on [0, 1], so Z = E exp(r / beta) = beta (exp(1 / beta) - 1), and the
    optimum is worth E r - beta KL = beta log Z. Over M answers the estimate is below that and rises
    with M: by Jensen's inequality E log(mean of M) <= log E."""
    truth = beta * math.log(beta * (math.exp(1 / beta) - 1))
    worth = []
    for m in (2, 8, 32, 128):
        rewards = torch.rand(4000, m, generator=torch.Generator().manual_seed(0)).double()
        found = frontier.optimum(rewards, beta)
        worth.append(found["reward"] - beta * found["kl"])
    assert worth == sorted(worth) and worth[-1] < truth
    assert worth[-1] == pytest.approx(truth, abs=0.01)


def test_best_of_n_is_never_above_the_optimum_at_its_kl_bound():
    """KL(best of N) <= log N - (N - 1) / N, and Eq. 15 has the highest reward at any KL."""
    rewards = torch.rand(500, 64, generator=torch.Generator().manual_seed(0)).double()
    line = [frontier.optimum(rewards, beta) for beta in torch.logspace(1, -2, 60).tolist()]
    for measures in best_of.best_of({"r": rewards}, [2, 4, 8], "r").values():
        beyond = [p for p in line if p["kl"] >= measures["kl_bound"]]
        assert min(p["reward"] for p in beyond) >= measures["r"] - 0.01


@needs_matplotlib
def test_the_frontier_is_drawn_with_axes_and_names_and_is_the_same_every_time(tmp_path, capsys):
    def at(kl):
        return {"kl": kl, "kl_se": 0.1, "kl_bound": kl, "reward": 0.1 * kl, "reward_se": 0.01,
                "well_formed": 0.9, "well_formed_se": 0.01}
    runs = {f"{method}, {setting}, 0": {"method": method, "setting": setting, "measures": at(kl)}
            for method in METHODS for setting, kl in [("beta 0.5", 1.0), ("beta 0.1", 9.0)]}
    reference = {"best_of": {"N = 1": at(0.0), "N = 2": at(0.2)},
                 "optimum": [{"beta": 1.0, "reward": 0.1 * kl, "kl": kl} for kl in (0, 1, 2)]}
    for name in ("once", "again"):
        frontier.draw_frontier(runs, reference, "well_formed", tmp_path / f"{name}.svg")
    picture = (tmp_path / "once.svg").read_text()
    for words in ("KL to the SFT model, nats", "ground-truth reward, from -1 to 1",
                  "share of well-formed texts", "best of", "unlikelihood", "beta 0.5",
                  "beta 0.1: KL 9", "the best possible", "PPO, true reward",
                  "PPO, learned reward", "DPO, own answers"):
        assert f"<!-- {words}" in picture, words
    assert_has_no_background(picture)
    assert (tmp_path / "again.svg").read_text() == picture


def test_frontier_refuses_what_has_no_ground_truth(capsys, tmp_path, run):
    for flags in (["--data", run / "pairs.jsonl"], ["--task", "hh"]):
        assert flags[0] in refused(frontier.main, [*flags, "--out", tmp_path], capsys)
    assert "--seeds" in refused(frontier.main, ["--seeds", "0"], capsys)
    assert "--bet" in refused(frontier.main, ["--bet", "1", "--out", tmp_path], capsys)


# ------------------------------------------------------------------------------------------------
# The curves
# ------------------------------------------------------------------------------------------------

METRICS = """\
step,loss,accuracy,margin,chosen_reward,rejected_reward,chosen_logp,rejected_logp,grad_norm,lr,\
held_out_loss,held_out_accuracy,held_out_margin,held_out_chosen_reward,held_out_rejected_reward,\
held_out_chosen_logp,held_out_rejected_logp
0,,,,,,,,,,0.693147,0.5,0,0,0,-20,-21
20,0.5,0.75,0.5,0.1,-0.4,-20,-23,1.5,1e-06,,,,,,,
40,0.4,0.8,0.75,0.15,-0.6,-20,-24,1.5,1e-06,0.45,0.7,0.8,0.2,-0.6,-20,-24
"""


def test_metrics_are_read_with_the_steps_at_which_they_were_logged(tmp_path):
    (tmp_path / "dpo_metrics.csv").write_text(METRICS)
    metrics = curves.read_metrics(tmp_path / "dpo_metrics.csv")
    assert metrics["held_out_loss"] == ([0, 40], [0.693147, 0.45])
    assert metrics["rejected_logp"] == ([20, 40], [-23, -24])
    assert set(metrics) == set(train_dpo.COLUMNS)


def test_a_picture_has_to_be_named_as_an_svg(tmp_path, capsys):
    """Otherwise matplotlib would append .svg to the name."""
    (tmp_path / "dpo_metrics.csv").write_text(METRICS)
    with pytest.raises(SystemExit) as caught:
        curves.main([str(tmp_path), "--out", str(tmp_path / "pic")])
    assert caught.value.code == 2 and "a name that ends in .svg" in capsys.readouterr().err


@needs_matplotlib
def test_a_picture_that_cannot_be_finished_leaves_the_one_before(tmp_path, monkeypatch, capsys):
    (tmp_path / "dpo_metrics.csv").write_text(METRICS)
    curves.main([str(tmp_path)])
    before = (tmp_path / "curves.svg").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("runtime.files.os.fsync", full)
    assert "curves.svg: cannot be written: No space" in refused(curves.main, [tmp_path], capsys)
    assert (tmp_path / "curves.svg").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"dpo_metrics.csv", "curves.svg"}


@needs_matplotlib
def test_curves_name_what_they_show_and_in_which_unit(tmp_path, capsys):
    (tmp_path / "dpo_metrics.csv").write_text(METRICS)
    curves.main([str(tmp_path)])
    picture = (tmp_path / "curves.svg").read_text()
    for words in ("Loss", "Accuracy: pairs ranked correctly", "Implicit rewards",
                  "Log-probs of the answers", "nats per pair or ranking", "β log(π / π_ref)",
                  "log π(y|x), nats", "step", "chosen -->", "rejected -->", "margin", "held out",
                  "log 2"):
        assert f"<!-- {words}" in picture, words
    assert_has_no_background(picture)
    curves.main([str(tmp_path), "--out", str(tmp_path / "again.svg")])
    assert (tmp_path / "again.svg").read_text() == picture
    header, _, *rows = METRICS.splitlines()             # a run without held-out prompts
    rows = [row[:row.index("1e-06") + 5] + 7 * "," for row in rows]
    (tmp_path / "dpo_metrics.csv").write_text("\n".join([header, *rows, ""]))
    curves.main([str(tmp_path)])


@needs_matplotlib
def test_log_probs_are_those_of_held_out_answers_if_they_were_logged(tmp_path, capsys):
    """In training batches, they differ more from batch to batch than they change."""
    (tmp_path / "dpo_metrics.csv").write_text(METRICS)
    metrics = curves.read_metrics(tmp_path / "dpo_metrics.csv")
    assert metrics["held_out_rejected_logp"] == ([0, 40], [-21, -24])
    curves.main([str(tmp_path)])
    picture = (tmp_path / "curves.svg").read_text()
    assert "<!-- chosen, held out -->" in picture and "<!-- rejected, held out -->" in picture
    assert picture.count("<!-- chosen -->") == 1            # that of the rewards


@needs_matplotlib
def test_two_runs_are_drawn_in_one_picture_and_told_apart_without_colour(tmp_path, capsys):
    """By the width of their lines and their markers; labels name the folder, whatever it is
    called."""
    folders = [tmp_path / "a", tmp_path / "$b_{"]
    for folder in folders:
        folder.mkdir()
        (folder / "dpo_metrics.csv").write_text(METRICS)
    assert "with --out" in refused(curves.main, folders, capsys)
    assert "one run or two" in refused(curves.main, [*folders, tmp_path], capsys)
    curves.main([*map(str, folders), "--out", str(tmp_path / "both.svg")])
    picture = (tmp_path / "both.svg").read_text()
    assert picture.count("<!-- log 2 -->") == picture.count("<!-- margin -->") == 1
    for label in ("training batches", "held out", "chosen", "rejected"):
        for name in folders:
            assert f"<!-- {label}, {name} -->" in picture, label
    widths = {colour: re.findall(rf"fill: none; (?:stroke-dasharray: \S+; stroke-dashoffset: 0; )?"
                                 rf"stroke: {colour}; stroke-width: ([\d.]+)", picture)
              for colour in (BLUE, GREEN)}
    assert set(widths[BLUE]) != set(widths[GREEN])


def test_without_matplotlib_one_sentence_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    (tmp_path / "dpo_metrics.csv").write_text(METRICS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused(curves.main, [tmp_path], capsys)


@pytest.mark.parametrize("content, words", [
    (None, "train_dpo.py writes it"), ("", "it has no steps"),
    ("step,loss\n0,1\n", "line 2: not a row"), ("a,b\n1,2\n", "line 2: not a row"),
    (METRICS.replace("0.75", "much"), "line 3: not a row"),
    (METRICS.replace("40,0.4,0.8,0.75,0.15,", "40,0.4,0.8,0.75,,"), "line 4: not a row"),
    (METRICS + "60,0.4", "line 5: not a row"),
    (METRICS.replace("\n20,", "\n,"), "line 3: not a row"),
    (METRICS.replace("0.693147", "inf"), "line 2: not a row"),
    (METRICS.replace("\n40,", "\n4" + 400 * "0" + ","), "line 4: not a row"),
    (METRICS.replace("0.693147", "0" * 200_000), "not a dpo_metrics.csv"),
    (b"\xff\xfe", "not a dpo_metrics.csv"), (METRICS.splitlines()[0], "it has no steps yet"),
    ("\n".join(METRICS.splitlines()[:2]), "it has no steps yet")])         # row 0: held out only
def test_a_folder_without_metrics_is_refused(tmp_path, capsys, content, words):
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "dpo_metrics.csv").write_bytes(content)
    message = refused(curves.main, [tmp_path], capsys)
    assert words in message and str(tmp_path / "dpo_metrics.csv") in message


# ------------------------------------------------------------------------------------------------
# The distributions of rewards and of margins
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def of_margins(run, tmp_path):
    """The flags for the margins of the run, whose policy now says that its beta is 0.5."""
    policy, _ = load_checkpoint(run / "dpo.pt")
    save_checkpoint(tmp_path / "dpo.pt", policy, tokenizer="reviews", beta=0.5)
    reference, _ = load_checkpoint(run / "sft.pt")
    save_checkpoint(tmp_path / "sft.pt", reference, tokenizer="reviews")
    return ["--of", "margin", "--data", str(run / "pairs.jsonl"), "--device", "cpu",
            "--out", str(tmp_path)]


@needs_matplotlib
def test_margins_have_the_mean_and_the_accuracy_that_sample_reports(of_margins, tmp_path, capsys):
    """The printed mean is that of rate_pairs, and the share below 0 is 1 - accuracy if no pair
    ties. The picture has no background."""
    distribution.main(of_margins)
    row = capsys.readouterr().out.split("< 0\n")[1].splitlines()[0].split()
    policy, _ = load_checkpoint(tmp_path / "dpo.pt")
    reference, _ = load_checkpoint(tmp_path / "sft.pt")
    items = held_out_pairs(TOKENIZER, 64, distribution.parse_args(of_margins))
    rated = sample.rate_pairs({"pi": policy}, reference, items, {"pi": 0.5})["pi"]
    assert row[:2] == ["margin,", "dpo"]
    assert float(row[2]) == pytest.approx(rated["margin"], abs=0.006)
    assert float(row[-1].rstrip("%")) / 100 == pytest.approx(1 - rated["accuracy"], abs=1e-3)
    assert_has_no_background((tmp_path / "margin.svg").read_text())


@needs_matplotlib
def test_rewards_are_those_of_the_table_that_train_dpo_ends_with(run, tmp_path, monkeypatch,
                                                                 capsys):
    """The same seeds, so the same answers and the same mean reward. The answers to one prompt can
    be shown beside them."""
    drawn = []
    monkeypatch.setattr(distribution, "draw_distributions", lambda *found: drawn.append(found))
    flags = ["--out", str(run), "--eval-prompts", "8", "--max-new-tokens", "6", "--device", "cpu"]
    distribution.main([*flags, "--of", "reward", "well_formed", "--example", "3",
                       "--svg", str(tmp_path / "a.svg")])
    [(columns, example, path)] = drawn
    args = distribution.parse_args(flags)
    prompts = held_out_prompts([], TOKENIZER, args)
    models = {name: load_checkpoint(run / f"{name}.pt")[0] for name in ("sft", "dpo")}
    grades = reviews.Reviews().grades(args, None, TOKENIZER)
    measures, texts = sample.evaluate(models, models["sft"], prompts, TOKENIZER, 6, args.seed + 1,
                                      grades)
    for name in models:
        for what in ("reward", "well_formed"):
            assert columns[what][name].mean().item() == pytest.approx(measures[name][what])
        assert example[name][:2] == (prompts[2], texts[name][2])
    assert path == tmp_path / "a.svg"


@needs_matplotlib
def test_the_picture_names_each_policy_its_mean_and_what_lies_beyond_its_axis(tmp_path, capsys):
    """Of 200 margins, those at -1000 and 1000 are beyond an axis that shows 98 %: 0.5 % each.
    Grades have a whole axis. Of the rewards of dpo, two in three are above 0."""
    margins = torch.tensor([0.5, 1.5] * 100, dtype=torch.float64)
    far = margins.clone()
    far[0], far[-1] = -1000, 1000               # the mean is (200 - 0.5 - 1.5) / 200
    path = tmp_path / "a.svg"
    distribution.draw_distributions({"margin": {"out/a": margins, "out/b": far}}, {}, path)
    picture = path.read_text()
    for words in ("out/a", "out/b", "mean 1.00, 100 % above 0", "mean 0.99, 100 % above 0",
                  "◂ 0.5 %", "0.5 % ▸", "% of pairs", "margin of a held-out pair"):
        assert f"<!-- {words}" in picture, words
    assert picture.count("▸") == picture.count("◂") == 1
    grades = {"sft": torch.tensor([-0.5, 0.5], dtype=torch.float64),
              "dpo": torch.tensor([-0.5, 0.5, 1], dtype=torch.float64)}
    example = {"sft": ("The plot", " was dull.", -0.5), "dpo": ("The plot", " was good.", 0.5)}
    distribution.draw_distributions({"reward": grades}, example, path)
    picture = path.read_text()
    for words in ("SFT, before DPO", "after DPO", "mean 0.33, 67 % above 0", "% of answers",
                  "The plot ...", "... was dull.", "... was good.", "reward −0.50", "reward 0.50"):
        assert f"<!-- {words}" in picture, words
    assert "◂" not in picture and "▸" not in picture


@for_all
@given(values=st.lists(st.floats(-9, 9), min_size=1, max_size=30), margins=st.booleans())
def test_the_bins_are_of_equal_width_and_one_edge_is_the_middle(values, margins):
    """So that no bar mixes pairs ranked rightly and wrongly, or good and bad texts. All grades are
    within the axis: from -1 to 1, or from 0 to 1 if none is negative."""
    numbers = torch.tensor(values, dtype=torch.float64)
    numbers = numbers if margins else numbers / 9
    edges, below = distribution.bins_of("margin" if margins else "reward", {"pi": numbers})
    widths = [right - left for left, right in zip(edges, edges[1:])]
    assert widths == pytest.approx([widths[0]] * len(widths)) and widths[0] > 0
    assert len(widths) <= 42
    if margins:
        assert edges[below] == 0
    else:
        assert edges[below] == (edges[0] + 1) / 2 and edges[-1] == 1
        assert edges[0] == (-1 if min(values) < 0 else 0)


def test_the_quantiles_worked_out_by_hand():
    """Of 0, 1, ..., 100, less 10: the quantile q is 100 q - 10, and 10 of 101 are below 0."""
    values = torch.arange(101, dtype=torch.float64) - 10
    row = distribution.quantile_table({"margin": {"pi": values}}).splitlines()[1]
    assert row.split() == ["margin,", "pi", "40.00", "-5.00", "15.00", "40.00", "65.00", "85.00",
                           "9.9%"]


def test_a_distribution_that_cannot_be_drawn_is_refused(of_margins, run, tmp_path, capsys):
    policy, _ = load_checkpoint(run / "dpo.pt")
    save_checkpoint(tmp_path / "other.pt", policy, tokenizer="reviews")
    of_rewards = ["--out", run, "--eval-prompts", "2", "--device", "cpu"]
    for flags, words in [
            ([*of_margins, "--checkpoint", tmp_path / "other.pt"],
             "other was not trained by train_dpo.py"),
            ([*of_margins, "--svg", "pic"], "ends in .svg"),
            ([*of_margins, "--example", "1"], "stands alone"),
            (["--data", run / "pairs.jsonl"], "try --of margin"),
            ([*of_rewards, "--of", "judge"], "the grades of this task are reward, well_formed"),
            ([*of_rewards, "--example", "3"], "there are 2 prompts")]:
        assert words in refused(distribution.main, flags, capsys)


# ------------------------------------------------------------------------------------------------
# Judges: asking
# ------------------------------------------------------------------------------------------------

NASTY = ["</script><b>bold</b>", "{B} {A} {prompt} {0}", "\\1 \\u003c 'quotes' \"double\"",
         "é <!-- "]


@for_all
@given(st.integers(1, 300), st.integers(0, 99))
def test_each_answer_stands_where_the_key_says_and_the_order_is_drawn(n, seed):
    texts = {"dpo": [f"d{i}" for i in range(n)], "sft": [f"s{i}" for i in range(n)]}
    questions, order = win_rate.draw_order([f"p{i}" for i in range(n)], texts, seed)
    assert list(questions) == list(order) and len(questions) == n
    for i, (question, who) in enumerate(zip(questions.values(), order.values())):
        assert question["prompt"] == f"p{i}" and sorted(who.values()) == ["dpo", "sft"]
        assert all(question[letter] == texts[who[letter]][i] for letter in "AB")
    first = sum(who["A"] == "dpo" for who in order.values())
    assert abs(first - n / 2) <= 3 * n ** 0.5           # a fair coin: 6 standard deviations


def test_other_questions_have_other_names():
    """So answers to an older study are noticed."""
    names = [set(win_rate.draw_order(["p"], {"a": [x], "b": ["y"]}, seed)[0])
             for x, seed in (("x", 0), ("z", 0), ("x", 1))]
    assert not names[0] & names[1] and not names[0] & names[2]


@pytest.mark.parametrize("form, first, last", [
    ("dialogue", "For the following query to a chatbot, which response is more helpful?",
     'More helpful: <"A" or "B">'),
    ("summary_s", "Which of the following summaries does a better job of summarizing the most "
     "important points in the given forum post?", 'Preferred: <"A" or "B">'),
    ("summary_c", "Which of the following summaries does a better job of summarizing the most "
     "important points in the given forum post, without including unimportant or irrelevant "
     "details? A good summary is both precise and concise.", 'Preferred: <"A" or "B">')])
def test_requests_are_chat_batch_lines_with_the_papers_words(form, first, last):
    questions = {"q1": {"prompt": NASTY[1], "A": NASTY[0], "B": NASTY[2]}}
    line, = win_rate.requests(questions, form, "judge")
    request = json.loads(line)
    assert set(request) == {"custom_id", "method", "url", "body"}
    assert (request["custom_id"], request["method"]) == ("q1", "POST")
    assert request["url"] == "/v1/chat/completions" and request["body"]["model"] == "judge"
    message, = request["body"]["messages"]
    assert message["role"] == "user" and message["content"].startswith(first + "\n")
    assert message["content"].endswith(last)
    for text in (*NASTY[:3], "FIRST provide a one-sentence comparison of the two"):
        assert message["content"].count(text) == 1      # braces in an answer are not filled in


class Page(HTMLParser):
    """The tags of an HTML page, the addresses it refers to, and its data."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses = [], []
        self.feed(text)
        self.data = json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.S)[1])

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "action")]


def test_the_page_needs_no_other_file_and_shows_text_as_text():
    questions = {f"q{i}": {"prompt": p, "A": "a", "B": "b"} for i, p in enumerate(NASTY)}
    text = win_rate.page(questions, "summary_c")
    page = Page(text)
    assert page.data == questions and page.addresses == [] and page.tags.count("script") == 2
    assert "b" not in page.tags[page.tags.index("script"):] and "http" not in text
    assert "innerHTML" not in text and "I can't tell" in html.unescape(text)
    assert "A good summary is both precise and concise." in text


def test_asking_writes_questions_and_a_key_and_only_the_key_tells(run, tmp_path, capsys):
    for name in ("judge.jsonl", "study.html"):
        flags = ["--out", str(run), "--ask", str(tmp_path / name), "--questions", "8",
                 "--max-new-tokens", "5", "--device", "cpu"]
        win_rate.main(flags)
        written = (tmp_path / name).read_bytes()
        key = json.loads((tmp_path / f"{name}.key.json").read_text())
        assert key["policies"] == ["dpo", "sft"] and len(key["order"]) == 8
        assert b"dpo" not in written and b"sft" not in written
        assert "keep it from the judges" in capsys.readouterr().out
        win_rate.main(flags)
        assert (tmp_path / name).read_bytes() == written
    asked = [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
    assert [row["custom_id"] for row in asked] == list(key["order"])
    assert list(Page((tmp_path / "study.html").read_text()).data) == list(key["order"])


def test_two_studies_whose_files_differ_only_in_their_extension_have_two_keys(run, tmp_path):
    """Each key has the names of the questions in its own file."""
    for name, questions in (("j.jsonl", "4"), ("j.html", "6")):
        win_rate.main(["--out", str(run), "--ask", str(tmp_path / name), "--questions", questions,
                       "--max-new-tokens", "2", "--device", "cpu"])
    asked = [json.loads(line) for line in (tmp_path / "j.jsonl").read_text().splitlines()]
    key = json.loads((tmp_path / "j.jsonl.key.json").read_text())
    assert [row["custom_id"] for row in asked] == list(key["order"])
    assert len(list(tmp_path.iterdir())) == 4


def test_a_preference_file_is_asked_about_with_its_own_prompts(run, tmp_path):
    win_rate.main(["--data", str(run / "pairs.jsonl"), "--out", str(run), "--ask",
                   str(tmp_path / "q.jsonl"), "--form", "summary_s", "--device", "cpu"])
    lines = (tmp_path / "q.jsonl").read_text().splitlines()
    assert 2 <= len(lines) <= 25 and all("Post:\\n\\nThe plot" in line or "Post:\\nThe plot" in line
                                        for line in lines)


@pytest.mark.parametrize("main, flags", [
    (sample.main, ["--evaluate"]), (best_of.main, ["--judge", "implicit"]),
    (win_rate.main, ["--ask", "{out}/q.jsonl"])])
@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_prompts_are_too_few_to_measure_on(run, tmp_path, capsys, main, flags,
                                                          count):
    """One value has no standard error."""
    prompts = [f"The plot {i}" for i in range(60)]
    held_out = [prompt for prompt in prompts if is_held_out(prompt)]
    kept = [prompt for prompt in prompts if not is_held_out(prompt)] + held_out[:count]
    data = write_lines(tmp_path / "few.jsonl", [
        {"prompt": prompt, "chosen": " was good.", "rejected": " was dull."} for prompt in kept])
    flags = [flag.format(out=tmp_path) for flag in flags]
    with pytest.raises(SystemExit) as caught:
        main([*flags, "--data", str(data), "--out", str(run), "--device", "cpu"])
    message = capsys.readouterr().err.splitlines()[-1]      # after warnings: another task's policy
    assert caught.value.code == 2
    assert message.endswith(f"{data}: fewer than two held-out prompts to measure on")
    items = [Encoded([0, *TOKENIZER.encode_ordinary(prompt)], [], []) for prompt in held_out[:2]]
    args = SimpleNamespace(data=data, eval_prompts=9)
    assert held_out_prompts(items, TOKENIZER, args) == held_out[:2]         # two are enough


# ------------------------------------------------------------------------------------------------
# Judges: reading
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reply, letter", [
    ("Comparison: A is better.\nMore helpful: A", "A"), ('Comparison: x\nMore helpful: "B"', "B"),
    ("More helpful: B\n\n", "B"), ("Comparison: x\r\n  More helpful: A  \r\n", "A"),
    ("More helpful: A or B", None), ("More helpful: C", None), ("More helpful: a", None),
    ('More helpful: "A', None), ("A", None), ("", None), ("Preferred: A", None),
    ("More helpful: A\nMore helpful: B", None), ("More helpful: A\nOr maybe not.", None),
    ("I find it More helpful: A", None), ("**More helpful: A**", None),
    ('More helpful: <"A" or "B">', None)])
def test_only_the_verdict_line_that_was_asked_for_counts(reply, letter):
    assert win_rate.read_verdict(reply, "dialogue") == letter


def test_summaries_are_preferred_not_more_helpful():
    assert win_rate.read_verdict("Comparison: x\nPreferred: B", "summary_c") == "B"
    assert win_rate.read_verdict("Comparison: x\nMore helpful: B", "summary_s") is None


def a_key(n):
    """The key of questions q0, q1, ...: dpo is A in the even ones, B in the odd ones."""
    return {"form": "dialogue", "policies": ["dpo", "sft"],
            "order": {f"q{i}": dict(zip("AB", ["dpo", "sft"][::1 - 2 * (i % 2)]))
                      for i in range(n)}}


def reply(name, text):
    return {"custom_id": name, "response": {"body": {"choices": [{"message": {"content": text}}]}}}


def numbers(report, words):
    """[share, low, high, count, n, questions], as text, of the first line with these words."""
    line = next(line for line in report.splitlines() if words in line)
    return re.findall(r"[\d.]+", line.split(words)[1].replace("-", " "))


def test_win_rate_bias_and_unparsable_share_are_told_apart(tmp_path, capsys):
    """A judge always says A to ten questions, of which dpo is A in five. Two replies cannot be
    read: q8 failed, and q9 says C. So A was chosen in 8 of 8, and dpo won the even ones, 4 of 8."""
    (tmp_path / "k.json").write_text(json.dumps(a_key(10)))
    rows = [reply(f"q{i}", "Comparison: x\nMore helpful: A") for i in range(8)]
    rows += [{"custom_id": "q8", "response": None, "error": {"code": "late"}},
             reply("q9", "More helpful: C")]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    win_rate.main(["--read", str(tmp_path / "k.json"), str(path)])
    report = capsys.readouterr().out
    low, high = wilson([1] * 4 + [0] * 4)
    assert numbers(report, "dpo over sft") == ["0.500", f"{low:.3f}", f"{high:.3f}", "4", "8",
                                                 "8"]
    assert numbers(report, "A was chosen")[::3] == ["1.000", "8"]
    assert numbers(report, "unparsable")[::3] == ["0.200", "2"]
    assert numbers(report, "can't tell")[::3] == ["0.000", "0"]
    assert "raters" not in report and "agreement" not in report


def test_agreement_is_over_what_both_decided_and_ties_are_left_out(tmp_path, capsys):
    """Raters 1 and 2 both decide q0 to q2 and agree on two. Raters 1 and 3 have only q0 in common
    (3 cannot tell q1), and agree; so do 2 and 3. That is 3 of 3 for q0, 0 of 1 for q1, 1 of 1 for
    q2, and 2/3 on average. The model says A to q0 and q1. Of the raters' six answers to those, five
    are letters: A A A to q0, B A to q1. So they agree 3 of 3 and 1 of 2 times, 3/4 on average."""
    (tmp_path / "k.json").write_text(json.dumps(a_key(4)))
    raters = [{"q0": "A", "q1": "B", "q2": "A"}, {"q0": "A", "q1": "A", "q2": "A", "q3": "tie"},
              {"q0": "A", "q1": "tie"}]
    files = [tmp_path / f"r{i}.json" for i in range(3)]
    for path, answers in zip(files, raters):
        path.write_text(json.dumps({"rater": path.stem, "answers": answers}))
    files.insert(1, write_lines(tmp_path / "m.jsonl", [reply(f"q{i}", "More helpful: A")
                                                       for i in range(2)]))
    win_rate.main(["--read", str(tmp_path / "k.json"), *map(str, files)])
    report = capsys.readouterr().out
    assert "raters: 3 files, 9 answers" in report and "model: 1 file, 2 answers" in report
    assert numbers(report, "agreement between raters")[::3] == ["0.667", "4"]
    assert numbers(report, "raters with the model")[::3] == ["0.750", "4"]
    # One of three cannot tell q1, and the only one who is asked cannot tell q3: (1/3 + 1) / 4.
    assert numbers(report, "can't tell")[::3] == ["0.333", "2"]
    # dpo is A in q0 and q2, B in q1. Of 3 answers to q0, 2 to q2 and 2 to q1, it wins 3 + 2 + 1.
    assert numbers(report, "dpo over sft")[::3] == ["0.833", "6"]
    assert numbers(report, "dpo over sft")[4:] == ["7", "3"]


def rater_file(path, answers, **facts):
    path.write_text(json.dumps({"rater": path.stem, "answers": answers} | facts))
    return str(path)


def test_ten_raters_who_agree_know_no_more_than_one(tmp_path, capsys):
    """The interval is over questions. Ten raters with the same 25 verdicts, of which 15 are for
    dpo, have the interval of 15 in 25, not that of 150 in 250."""
    (tmp_path / "k.json").write_text(json.dumps(a_key(25)))
    verdicts = {f"q{i}": "AB"[(i % 2) ^ (i >= 15)] for i in range(25)}
    paths = [rater_file(tmp_path / f"r{i}.json", verdicts) for i in range(10)]
    low, high = wilson([1] * 15 + [0] * 10)
    for files, answers in ((paths[:1], "25"), (paths, "250")):
        win_rate.main(["--read", str(tmp_path / "k.json"), *files])
        report = capsys.readouterr().out
        found = numbers(report, "dpo over sft")
        assert found[:3] == ["0.600", f"{low:.3f}", f"{high:.3f}"] and found[4:] == [answers, "25"]
    low, high = wilson([1] * 25)         # of ten raters, 45 pairs agree on each question
    assert numbers(report, "agreement between raters") == [
        "1.000", f"{low:.3f}", f"{high:.3f}", str(45 * 25), str(45 * 25), "25"]


def test_the_interval_over_questions_covers_the_truth_in_about_19_of_20_studies():
    """Raters who share an opinion of each question: they like dpo's answer with a probability that
    is uniform over the questions, so its true win rate is 1/2."""
    rng, hits = random.Random(0), 0
    for _ in range(1000):
        chances = [rng.random() for _ in range(25)]
        line = win_rate.share("x", [(i, rng.random() < chances[i])
                                    for _ in range(10) for i in range(25)])
        _, low, high, *_ = numbers(line, "x")
        hits += float(low) <= 0.5 <= float(high)
    assert 0.93 < hits / 1000 < 0.98


def test_of_two_downloads_of_one_rater_the_later_one_counts(tmp_path, capsys):
    """A rater downloads after one answer, and again after changing it and answering the other. The
    two files must not agree with each other, and their order on the command line, in which a
    browser's "r (1).json" stands before "r.json", does not matter."""
    (tmp_path / "k.json").write_text(json.dumps(a_key(2)))
    early = rater_file(tmp_path / "r.json", {"q0": "B"}, downloaded="2024-05-01T10:00:00.000Z")
    late = rater_file(tmp_path / "r (1).json", {"q0": "A", "q1": "B"}, rater="r",
                      downloaded="2024-05-01T10:20:00.000Z")
    for files in ([early, late], [late, early]):
        win_rate.main(["--read", str(tmp_path / "k.json"), *files])
        first, *report = capsys.readouterr().out.splitlines()
        assert first == (f"{early}: left out, because {late} is a later download of the same rater")
        assert report[0] == "raters: 1 file, 2 answers"
        assert numbers("\n".join(report), "dpo over sft")[::3] == ["1.000", "2"]
        assert "agreement" not in "\n".join(report)
    no_time = [rater_file(tmp_path / f"{name}.json", {"q0": name}, rater="r") for name in "AB"]
    win_rate.main(["--read", str(tmp_path / "k.json"), *no_time])
    report = capsys.readouterr().out            # the one that was named last counts: B
    assert "1 file, 1 answers" in report and numbers(report, "dpo over sft")[0] == "0.000"
    no_id = [rater_file(tmp_path / f"{name}.json", {"q0": name}, rater=None) for name in "AB"]
    win_rate.main(["--read", str(tmp_path / "k.json"), *no_id])
    assert "raters: 2 files, 2 answers" in capsys.readouterr().out


def test_the_page_says_who_downloaded_and_when():
    """As read_answers reads it."""
    assert "JSON.stringify({rater, downloaded: new Date().toISOString(), answers}" in " ".join(
        win_rate.PAGE.split())


@pytest.mark.parametrize("content, words", [
    ("", "it has no answers"), ("[1]\n", "line 1: neither a reply"), ("{]\n", "line 1: neither"),
    ('{"custom_id": "q0"}\n{"custom_id": ["q1"]}\n', "line 2: neither a reply"),
    ('{"custom_id": "q0"}\n' + "[" * 10**5 + "\n", "line 2: neither a reply"),
    ('{"rater": "x", "answers": 5}\n', "line 1: neither a reply"),
    ('{"answers": {"other": "A"}}', "other questions than those of the key"),
    ('{"custom_id": "q0"}\n{"custom_id": "q0"}\n', "line 2: a second answer to q0"),
    (b"\xff\xfe", "not UTF-8"), (None, "No such file")])
def test_files_that_are_no_answers_are_refused(tmp_path, capsys, content, words):
    (tmp_path / "k.json").write_text(json.dumps(a_key(2)))
    path = tmp_path / "answers"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(win_rate.main, ["--read", tmp_path / "k.json", path], capsys)
    assert words in message and str(path) in message


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"form": "x", "policies": [1, 2], "order": {}}',
    '{"form": "dialogue", "policies": ["a"], "order": {}}', "[" * 10**5,
    '{"form": "dialogue", "policies": ["a", "b"], "order": {"q": "AB"}}',
    '{"form": "dialogue", "policies": ["a", "b"], "order": {"q": {"A": "a", "B": "c"}}}'])
def test_the_key_goes_first_and_has_to_be_one(tmp_path, capsys, content):
    (tmp_path / "k.json").write_text(content)
    assert "not a key that --ask wrote" in refused(
        win_rate.main, ["--read", tmp_path / "k.json", tmp_path / "k.json"], capsys)


def test_asking_and_reading_are_two_things(run, capsys, tmp_path):
    sft = run / "sft.pt"
    for flags, words in [([], "choose: --ask"),
                         (["--ask", "a.jsonl", "--read", "k", "a"], "choose: --ask"),
                         (["--ask", "a.txt"], "--ask a.txt: the name must end in .jsonl"),
                         (["--read", "k"], "--read needs the key"),
                         (["--questions", "0"], "--questions"),
                         (["--ask", "a.jsonl", "--between", sft, sft], "two different")]:
        assert words in refused(win_rate.main, [*flags, "--out", tmp_path], capsys)
