"""experiments.symptoms: the broken runs, and the page that explains them.

    pytest tests/test_symptoms.py
"""

import csv
import importlib.util
import json
import math
import multiprocessing
import pickle
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_dpo
from classroom.exercises import is_a_students_copy
from classroom.wrong_answers import MUTANTS
from data import is_held_out, load_preferences
from experiments import symptoms
from experiments.plot import BLUE
from experiments.symptoms import SYMPTOMS, Symptom, flags_of
from model import GPT, GPTConfig
from tasks.checkpoint import save_checkpoint
from tasks.tokenizers import get_tokenizer

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reading-curves.md").read_text(encoding="utf-8")
TOKENIZER = get_tokenizer("reviews")
NAMES = [symptom.name for symptom in SYMPTOMS]
trains_in_a_child = pytest.mark.skipif(
    is_a_students_copy(), reason="another process cannot say which exercise is not written yet")


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symptom", SYMPTOMS, ids=lambda symptom: symptom.name)
def test_a_symptom_names_only_wrong_answers_and_flags_that_exist(symptom):
    train_dpo.parse_args(flags_of(symptom, Path("out")))
    assert set(symptom.wrong) <= set(MUTANTS)


def test_each_symptom_changes_something_and_the_healthy_run_nothing():
    unchanged = [s.name for s in SYMPTOMS if not (s.flags or s.wrong or s.rows)]
    assert unchanged == ["healthy"]
    assert len(set(NAMES)) == len(NAMES)


def test_the_flags_of_a_symptom_replace_those_of_the_healthy_run():
    args = train_dpo.parse_args(flags_of(Symptom("x", "", "", "--lr 3e-3"), Path("out")))
    assert args.lr == 3e-3 and args.beta == 0.5 and args.sft == Path("out/sft.pt")


# ------------------------------------------------------------------------------------------------
# Changed preferences
# ------------------------------------------------------------------------------------------------


def rows_of(count):
    """Rows like those that train_dpo.py writes: the answers have different lengths, and the
    shortest is the best."""
    return [{"prompt": f"The plot {i}", "answers": [" was dull.", " was good", " was not good."],
             "ranking": [1, 0, 2], "rewards": [-0.6, 0.4, -0.2]} for i in range(count)]


def test_with_the_same_opening_all_answers_are_equal_after_the_cut():
    """The flags of equal_answers cut rows to --row-length tokens, prompt included."""
    symptom = SYMPTOMS[NAMES.index("equal_answers")]
    room = train_dpo.parse_args(flags_of(symptom, Path("out"))).row_length
    for row in symptoms.same_opening(rows_of(1)):
        tokens = [tuple(TOKENIZER.encode_ordinary(answer)[:room]) for answer in row["answers"]]
        assert len(set(tokens)) == 1 and len(tokens[0]) == room
        assert len(set(row["answers"])) == 3                        # they differ further on


def test_longest_first_ranks_by_length_and_keeps_one_answer_of_each():
    """The lengths are 10, 9 and 14 characters. Of two answers of one length one is left, and then
    there is no pair in the row."""
    row, = rows_of(1)
    assert symptoms.longest_first([row])[0]["answers"] == [" was not good.", " was dull.",
                                                           " was good"]
    assert symptoms.longest_first([{"prompt": "x", "answers": [" a.", " b."]}]) == []
    ranked, = symptoms.longest_first([{"prompt": "x", "answers": [" a.", " b.", " longer."]}])
    assert ranked["answers"] == [" longer.", " b."] and ranked["ranking"] == [0, 1]


@pytest.mark.parametrize("change", [symptoms.few_prompts, symptoms.random_rankings])
def test_few_prompts_keep_all_that_are_held_out_as_they_are(change):
    rows = rows_of(500)
    changed = change(rows)
    assert [row for row in changed if is_held_out(row["prompt"])] == [
        row for row in rows if is_held_out(row["prompt"])]
    training = [row for row in changed if not is_held_out(row["prompt"])]
    assert len(training) == 40
    rankings = {tuple(row["ranking"]) for row in training}
    # All six orders of three answers should occur among 40 random ones: 6 (5/6)^40 = 0.4 % miss.
    assert len(rankings) == (6 if change is symptoms.random_rankings else 1)


@pytest.mark.parametrize("symptom", [symptom for symptom in SYMPTOMS if symptom.rows],
                         ids=lambda symptom: symptom.name)
def test_a_changed_file_is_one_that_train_dpo_reads(symptom, tmp_path):
    """Also if two answers have one length."""
    rows = rows_of(60)
    rows[0]["answers"][1] = " was good."
    path = tmp_path / "changed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in symptom.rows(rows)))
    assert all(preference.pairs for preference in load_preferences(path))


# ------------------------------------------------------------------------------------------------
# The runs
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The flags for a folder with a tiny SFT model and preferences, and a table of two runs of two
    steps, one of which is stopped by the check that policy and reference start equal. Their
    processes are forks, which need not import PyTorch. Their arguments are such that those of new
    processes could be."""
    def fork(target, args, daemon):
        return context.Process(target=pickle.loads(pickle.dumps(target)), daemon=daemon,
                               args=pickle.loads(pickle.dumps(args)))
    if not torch.cuda.is_available():               # with a card, a fork cannot train
        context = multiprocessing.get_context("fork")
        monkeypatch.setattr(symptoms, "multiprocessing", SimpleNamespace(
            get_context=lambda method: {"spawn": SimpleNamespace(Process=fork)}[method]))
    monkeypatch.setattr(symptoms, "HEALTHY", "--steps 2 --max-new-tokens 4 --device cpu")
    monkeypatch.setattr(symptoms, "SYMPTOMS", [
        Symptom("healthy", "", "nothing"),
        Symptom("wrong_start", "start", "reference forgotten", "", ("reference_forgotten",))])
    monkeypatch.setattr(symptoms, "draw_groups", lambda *_: None)
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "sft.pt", GPT(GPTConfig(64, TOKENIZER.n_vocab, 1, 2, 16), 0.3),
                    tokenizer="reviews", source="reviews")
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "sft.pt").write_bytes((tmp_path / "sft.pt").read_bytes())
    (tmp_path / "preferences.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows_of(60)))
    return ["--out", str(tmp_path), "--eval-prompts", "2"]


@trains_in_a_child
def test_each_run_is_trained_with_its_mistake_and_measured_without(small, tmp_path, monkeypatch):
    """The wrong answer stays in the process of its run: the loss of this one is still right. A
    second start trains nothing, and trains again what is changed in the table."""
    symptoms.main(small)
    results = {name: json.loads((tmp_path / name / "result.json").read_text())
               for name in ("healthy", "wrong_start")}
    assert {"reward", "kl", "win_rate", "accuracy", "seconds"} <= set(results["healthy"])
    assert "the policy does not start at its reference" in results["wrong_start"]["stopped"]
    losses, _ = train_dpo.dpo_loss(torch.zeros(2), torch.tensor([5.0, 0.0]), torch.tensor([0]),
                                   torch.tensor([1]), 0.1)
    assert losses.item() == pytest.approx(math.log(1 + math.exp(0.5)))      # rewards -0.5 and 0
    assert "| `wrong_start` | stopped |" in (tmp_path / "symptoms.md").read_text()

    trained = []
    monkeypatch.setattr(symptoms, "run_symptom", lambda symptom, *_: trained.append(symptom.name)
                        or {"stopped": ""})
    symptoms.main(small)
    assert trained == []
    symptoms.SYMPTOMS[0] = Symptom("healthy", "", "nothing", "--lr 1e-5")
    symptoms.main(small)
    assert trained == ["healthy"]


@trains_in_a_child
def test_only_the_runs_asked_for_are_made_and_the_healthy_one(small, monkeypatch):
    trained = []
    monkeypatch.setattr(symptoms, "run_symptom", lambda symptom, *_: trained.append(symptom.name)
                        or {"stopped": ""})
    symptoms.main([*small, "--only", "healthy"])
    assert trained == ["healthy"]
    symptoms.main([*small, "--only", "wrong_start"])
    assert trained == ["healthy", "wrong_start"]


def test_the_model_without_sft_has_learned_nothing(tmp_path):
    """train_sft.py wants a step; after it, the loss is what it was. The default rate
    would lower it by 0.8."""
    (tmp_path / "preferences.jsonl").touch()
    symptoms.prepare_shared_files(tmp_path)
    with open(tmp_path / "untrained" / "sft_metrics.csv", newline="") as file:
        before, after = [float(row["held_out_loss"]) for row in csv.DictReader(file)]
    assert after == pytest.approx(before, abs=1e-4)


def test_a_name_that_is_not_in_the_table_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        symptoms.main(["--only", "healthy,sick"])
    assert caught.value.code == 2 and "--only sick" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# The pictures
# ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="no matplotlib")
def test_the_pictures_say_what_their_axes_lines_and_dots_are(tmp_path, capsys):
    """The last row names the x-axis, once for each of the four panels; the legend names the rest.
    If held-out log-probs were logged, the noisy ones of the training batches are not drawn."""
    header = ",".join(["step", *train_dpo.COLUMNS])
    row = {name: -2.0 for name in train_dpo.COLUMNS}
    for name in ("healthy", "a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dpo_metrics.csv").write_text("".join(
            f"{line}\n" for line in [header, *(",".join(map(str, [step, *row.values()]))
                                               for step in (0, 5))]))
    path = tmp_path / "a.svg"
    symptoms.draw_symptoms([Symptom("a", "x", "one"), Symptom("b", "x", "two")], tmp_path, path)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())
    assert texts.count("step") == 4
    assert {"healthy run", "this run; chosen answers", "rejected answers", "held out", "one",
            "two"} <= set(texts)

    drawn = []
    ax = SimpleNamespace(plot=lambda steps, values, *_, **__: drawn.append(values))
    metrics = {"chosen_logp": ([0, 5], [-20.0, -25.0]), "held_out_chosen_logp": ([0], [-21.0])}
    symptoms.draw_metrics(ax, ["chosen_logp"], 1, metrics, [BLUE])
    assert drawn == [[], [-21.0]]

    drawn.clear()                           # 10 steps, 10 steps, and a last one
    symptoms.draw_metrics(ax, ["loss"], 1, {"loss": ([10, 20, 21], [0.7, 0.5, 0.9])}, [BLUE])
    assert drawn == [[0.7, 0.5], []]


def test_a_run_that_stopped_at_step_0_is_not_drawn(tmp_path, monkeypatch):
    """Its log has held-out values, from before the first step, and no loss."""
    header = ",".join(["step", *train_dpo.COLUMNS])
    before = "0" + "".join("," + "-2.0" * name.startswith("held_out") for name in train_dpo.COLUMNS)
    after = "5" + ",-2.0" * len(train_dpo.COLUMNS)
    for name, lines in (("stopped", [header, before]), ("went_on", [header, before, after])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dpo_metrics.csv").write_text("\n".join(lines) + "\n")
    drawn = []
    monkeypatch.setattr(symptoms, "draw_symptoms",
                        lambda runs, *_: drawn.append([run.name for run in runs]))
    symptoms.draw_groups([Symptom("stopped", "x", ""), Symptom("went_on", "x", ""),
                          Symptom("stopped", "y", "")], SimpleNamespace(out=tmp_path, assets=None))
    assert drawn == [["went_on"]]


# ------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------


def test_the_page_has_the_measures_of_every_run_and_of_no_other():
    """Its table is the one that the command writes, symptoms.md."""
    header = symptoms.as_table({}).splitlines()[0]
    assert header in PAGE
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.split(header)[1], re.M)
    assert rows == NAMES


def test_the_page_says_of_every_run_what_changes():
    """Outside of the table, each is named where it is explained; a picture of its group is shown,
    and the commands of the page are of runs that exist."""
    text = re.sub(r"^\|.*$", "", PAGE, flags=re.M)
    for symptom in SYMPTOMS:
        assert f"`{symptom.name}`" in text, symptom.name
        assert not symptom.group or f"symptoms-{symptom.group}.svg" in text, symptom.group
    for line in re.findall(r"python -m experiments\.symptoms.*", PAGE):
        symptoms.parse_args(shlex.split(line.strip("`").split("#")[0].split("`")[0])[3:])
