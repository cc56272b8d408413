"""The classroom tools: the student's copy, the grader, the wrong answers.

    pytest tests/test_classroom.py

Left out on purpose: that every mutant is caught, and that every claim of every exercise is met by
our solution and by no empty one. `python -m classroom.wrong_answers` and `python -m classroom.assignment --check`
say so, in minutes. In a student's copy this file is not there.
"""

import ast
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import train_dpo
import train_sft
from runtime.errors import UserError
from classroom import assignment, exercises, sandbox, wrong_answers
from classroom.exercises import (EXERCISES, claims, functions, message, split_target,
                                 with_functions, without_bodies)

ROOT = Path(__file__).resolve().parent.parent
RANKS = EXERCISES[8]                # the quickest to grade: rank_answers and ranking_to_pairs, five claims
OWN = {test for exercise in EXERCISES.values() for test in exercise.tests}
TARGETS = [target for exercise in EXERCISES.values() for target in exercise.functions]


# ------------------------------------------------------------------------------------------------
# What takes time is done once, two processes at a time
# ------------------------------------------------------------------------------------------------

PAIRS = "def ranking_to_pairs(ranking):\n    return {}"
RIGHT_PAIRS = PAIRS.format("[(w, l) for i, w in enumerate(ranking) for l in ranking[i + 1:]]")

# rank_answers() of a submission that tries one thing after the other, one in each test that calls it, and
# then answers None, which is right where all answers tie.
HOSTILE = f'''
def rank_answers(prompt, answers, rewards):
    import builtins, os, socket, subprocess
    number = builtins.number = getattr(builtins, "number", -1) + 1
    print("claim test_rank passed", {{"score": 100}})
    if number == 0:
        exec(open({str(ROOT / "data.py")!r}).read(), scope := {{}})
        return scope["rank_answers"](prompt, answers, rewards)
    if number == 1:
        os.fork()
    if number == 2:
        socket.create_connection(("127.0.0.1", 80), timeout=1)
    if number == 3:
        subprocess.run(["true"])
    if number == 4:
        [0] * 10**10
    if number == 5:
        raise KeyboardInterrupt
    if number == 6:
        raise SystemExit
'''
# One that writes what it takes for the grader's records wherever it can, and is gone.
FORGED = '''
def rank_answers(prompt, answers, rewards):
    import json, os
    for test in ("a_ranking_of_three_is_three_pairs", "answers_that_all_tie_make_no_row"):
        claim = {"claim": "tests/test_data.py::test_" + test, "outcome": "passed", "words": ""}
        for file in range(1, 64):
            try:
                for record in (claim, {"end": ""}):
                    os.write(file, (json.dumps(record) + "\\n").encode())
            except OSError:
                pass
    os._exit(0)
'''
LOOP = "def rank_answers(prompt, answers, rewards):\n    while True:\n        pass"
CRASH = "def rank_answers(prompt, answers, rewards):\n    import faulthandler\n    faulthandler._sigsegv()"


def submission(folder, **texts):
    """A folder with our own modules and, of data.py, these functions instead."""
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        (folder / path.name).write_bytes(path.read_bytes())
    source = (ROOT / "data.py").read_text()
    (folder / "data.py").write_text(with_functions(source, texts))
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """{name: what became of it}."""
    sandbox.isolation()
    tmp = tmp_path_factory.mktemp("class")
    half = submission(tmp / "half", ranking_to_pairs=PAIRS.format("[(ranking[0], ranking[1])]"))
    mine = tmp / "my_tests.py"
    mine.write_text("from data import ranking_to_pairs\n\n\n"
                    "def test_best_first():\n    assert ranking_to_pairs([1, 0]) == [(1, 0)]\n\n\n"
                    "def test_wrong_itself():\n    assert ranking_to_pairs([1, 0]) == []\n")

    def tried(text, seconds):
        texts = {"data.ranking_to_pairs": RIGHT_PAIRS, "data.rank_answers": text}
        return assignment.try_out(RANKS, texts, seconds)
    with ThreadPoolExecutor(2) as pool:
        jobs = {"copy": pool.submit(assignment.suite_of_copy, tmp / "copy",
                                    {claims()[test][0] for test in OWN}),
                "hostile": pool.submit(tried, HOSTILE, 60),
                "forged": pool.submit(tried, FORGED, 60),
                "crash": pool.submit(tried, CRASH, 60), "loop": pool.submit(tried, LOOP, 8),
                "half": pool.submit(assignment.grade, half, [RANKS], 60, 1),
                "mutants": pool.submit(wrong_answers.against_their_tests, mine,
                                       ["chosen_and_rejected_swapped"], 1)}
        return {name: job.result() for name, job in jobs.items()} | {"folder": tmp / "copy"}


# ------------------------------------------------------------------------------------------------
# The exercises
# ------------------------------------------------------------------------------------------------


def test_every_exercise_names_functions_and_tests_that_are_there():
    """Functions with a docstring to write them from, in order of their numbers."""
    assignment.by_module(EXERCISES.values())
    for number, exercise in EXERCISES.items():
        assert exercise.number == number and set(exercise.needs) <= set(EXERCISES) - {number}
        assert exercise.equation and exercise.before and len(exercise.tests) >= 3
        assert set(exercise.tests) <= set(claims())
        assert all(claims()[test][1] or "warm_up" in test for test in exercise.tests)


def test_every_wrong_answer_to_an_exercise_is_caught_by_one_of_its_own_claims():
    """What mutants.py knows to go wrong, the grader knows too."""
    for mutant in wrong_answers.MUTANTS.values():
        for exercise in EXERCISES.values():
            if mutant.target in exercise.functions:
                assert mutant.test in exercise.tests, mutant.name


def test_an_exercise_whose_function_is_gone_is_named():
    for target in ("data.no_such_function", "data.Batch.no_such_method", "nothing.rank_answers"):
        gone = RANKS._replace(functions=[target])
        with pytest.raises(UserError, match=f"{target}, of exercise 8, is no longer there"):
            assignment.by_module([gone])


# ------------------------------------------------------------------------------------------------
# The student's copy
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_of_a_function_is_left_but_its_signature_and_docstring(target):
    """No statement and no comment of the solution; everything else stays to the letter."""
    module, name = split_target(target)
    source = (ROOT / f"{module}.py").read_text()
    emptied = without_bodies(source, {name: "Exercise 1: x"})
    before, after = functions(source), functions(emptied)
    assert ast.unparse(after[name].args) == ast.unparse(before[name].args)
    assert ast.get_docstring(after[name]) == ast.get_docstring(before[name])
    assert ast.unparse(after[name].body[1]) == "raise NotImplementedError('Exercise 1: x')"
    assert len(after[name].body) == 2 and exercises.is_unwritten(after[name])
    first, end = exercises.body_lines(source, before[name])
    left = source.splitlines()[:first] + source.splitlines()[end:]
    raised = [line for line in emptied.splitlines() if "Exercise 1: x" in line]
    assert len(raised) == 1 and [x for x in emptied.splitlines() if x not in raised] == left


def test_comments_at_both_ends_of_a_body_go_with_it():
    source = ('def f(x):\n    """Doc."""\n    # the trick is\n    return 1  # one\n    # or two\n'
              "\n\n# about g\ndef g(x):\n    # none\n    return 2\n")
    assert without_bodies(source, {"f": "A", "g": "B"}) == (
        'def f(x):\n    """Doc."""\n    raise NotImplementedError("A")\n\n\n'
        '# about g\ndef g(x):\n    raise NotImplementedError("B")\n')


def test_the_readme_of_a_copy_does_not_show_what_is_to_be_written(done):
    text = (done["folder"] / "README.md").read_text()
    for number, line in ((3, "pi_logratios"), (10, "logps = logps_of(batch)")):
        assert message(EXERCISES[number]) in text and line not in text
        assert line in (ROOT / "README.md").read_text()


def test_in_a_copy_exactly_the_claims_of_the_exercises_fail(done):
    """None of an exercise's claims holds: it fails, or waits for an exercise that the sheet says
    comes first. Of all other tests none fails; many pass, the rest waits."""
    outcome = done["copy"]
    assert not assignment.wrong_in_copy(outcome)
    passed = {node for node, (result, _) in outcome.claims.items() if result == "passed"}
    assert not {wrong_answers.test_name(node) for node in passed} & OWN and len(passed) > 90
    assert {wrong_answers.test_name(node) for node, _ in outcome.claims.items()} >= OWN
    for exercise in EXERCISES.values():
        for node, (result, words) in outcome.claims.items():
            if wrong_answers.test_name(node) in exercise.tests and "waits for Exercise" in words:
                number = int(words.split("Exercise ")[1].split(":")[0])
                others = {e.number for e in EXERCISES.values()
                          if wrong_answers.test_name(node) in e.tests}
                assert number in {n for other in others for n in EXERCISES[other].needs}, node


def test_the_sheet_names_each_function_equation_and_claim(done):
    text = (done["folder"] / "EXERCISES.md").read_text()
    for exercise in EXERCISES.values():
        assert f"## {exercise.number}. " in text and exercise.equation in text
        for word in [*map(exercises.sentence, exercise.tests), *exercise.functions]:
            assert word.split(".", 1)[-1] in text


def test_a_copy_has_neither_the_guide_for_teachers_nor_old_runs(done):
    names = {path.name for path in done["folder"].rglob("*")}
    assert {"model.py", "README.md", "requirements.txt", "test_data.py", "wrong_answers.py"} <= names
    assert not {"test_classroom.py", "test_benchmark.py", "out", ".git"} & names
    assert (done["folder"] / "classroom/GUIDE.md").read_text().count("\n") == 1


def test_a_copy_can_neither_make_copies_nor_grade(done, tmp_path):
    command = [sys.executable, "-m", "classroom.assignment", "--out", str(tmp_path / "another")]
    answer = subprocess.run(command, cwd=done["folder"], capture_output=True, text=True)
    assert answer.returncode == 2 and "this is a student's copy" in answer.stderr
    assert answer.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------
# Grading
# ------------------------------------------------------------------------------------------------


def test_each_claim_that_holds_has_its_share_of_the_points(done):
    """Only the best pair of a ranking: right for two answers, wrong for more."""
    results = done["half"]
    held = {test["name"].split(": ")[1] for test in results["tests"] if test["status"] == "passed"}
    assert held == {"of answers that tie the first stands for all",
                    "answers that all tie make no row"}
    assert results["score"] == pytest.approx(10 * 2 / 5)
    assert sum(test["max_score"] for test in results["tests"]) == pytest.approx(10)
    assert "4.00 of 10" in results["output"]
    wrong = results["tests"][0]
    assert wrong["output"].startswith("Best first: whoever stands earlier wins.\n")
    assert "assert [(2, 0)]" in wrong["output"]
    assert set(json.loads(json.dumps(results))) == {"score", "tests", "output"}


def words_of(outcome):
    return [words for _, words in outcome.claims.values()]


def test_what_a_submission_tries_is_refused_and_the_next_claim_is_graded(done):
    """Our own file, a fork, the network, a process, all memory, an interrupt, an exit."""
    outcome = done["hostile"]
    said = "\n".join(words_of(outcome))
    for refused in (f"not allowed here: open of {ROOT / 'data.py'}", "not allowed here: os.fork",
                    "not allowed here: socket", "not allowed here: subprocess", "MemoryError",
                    "a KeyboardInterrupt was raised", "SystemExit"):
        assert refused in said, refused
    assert outcome.end == ""
    passed = {node.split("::")[1] for node, (result, _) in outcome.claims.items()
              if result == "passed"}
    assert passed == {"test_a_ranking_of_three_is_three_pairs"}     # the one that is not rank_answers's


def test_a_forged_record_is_not_believed(done):
    """It lacks the nonce. What was proven before the exit stands, but for the last, in doubt."""
    outcome = done["forged"]
    assert outcome.end == "the process ended before its tests did (exit code 0)"
    assert [node.split("::")[1] for node in outcome.claims] == [
        "test_a_ranking_of_three_is_three_pairs"]
    entries = [assignment.entry(RANKS, test, outcome, []) for test in RANKS.tests]
    assert not any(entry["score"] for entry in entries)
    assert "ended before its tests did" in entries[-1]["output"]


def test_a_crash_ends_the_process_and_not_the_grader(done):
    assert "SIGSEGV" in done["crash"].end


def test_an_endless_loop_is_stopped(done):
    """A claim has a quarter of the time, an exercise all of it, starting included."""
    outcome = done["loop"]
    assert outcome.end == "stopped after 8 seconds" or (
        "no answer after 2 seconds" in "\n".join(words_of(outcome)))


def refused(text):
    node = ast.parse(text).body[0]
    return next(assignment.complaints(node), "")


@pytest.mark.parametrize("line", [
    "import os", "import torch.testing", "from torch import testing", "from sys import *",
    "from . import data", "torch.testing.assert_close = print", "F.logsigmoid = abs",
    "open('data.py')", "x.__class__", "getattr(x, name)", "exec(text)", "torch.load(path)",
    "global dpo_loss", "torch.hub.load('x')", "x._private", "setattr(torch, 'a', 1)",
    "__builtins__['open']", "raise x.tb_frame", "print(help)", "class A: __eq__ = 1; __eq__()",
])
def test_what_only_a_forged_grade_needs_is_refused_unseen(line):
    assert refused(f"def f(x):\n    {line}").startswith("2: ")


@pytest.mark.parametrize("target", TARGETS)
def test_our_own_solutions_need_none_of_it(target):
    module, name = split_target(target)
    assert not list(assignment.complaints(functions((ROOT / f"{module}.py").read_text())[name]))


def test_what_a_student_writes_needs_none_of_it():
    assert not refused("def f(x, pairs):\n    import math\n    import torch.nn.functional as F\n"
                       "    def inner(y):\n        nonlocal x\n        return y\n"
                       "    for i, (w, l) in enumerate(pairs):\n        x[w] += math.exp(-i)\n"
                       "    x.grad = None\n    print(x)\n    return [inner(y) for y in x]")


@pytest.mark.parametrize("content, words", [
    (None, "cannot be read: No such file"), ("link", "cannot be read"), (b"\xff", "not UTF-8"),
    (b"def rank_answers(:\n", "line 1: not Python"), (b"x = 1\n", "there is no function rank_answers"),
    (b"\0", "pars|not Python"), (b"(" * 5000, "pars|not Python|nested"),
    (b"#" * (1 << 21), "not a file of at most a megabyte"), ("folder", "cannot be read|not a file"),
    ("pipe", "not a file of"),
    (b"def rank_answers(p, a, r):\n    raise NotImplementedError('Exercise 8: x')\n", "not written yet"),
    (b"def rank_answers(p, a, r):\n    import os\n", "rank_answers, line 2: imports os"),
])
def test_a_submission_that_cannot_be_read_says_why(tmp_path, content, words):
    """A link is not followed: it could lead to our own file."""
    path = tmp_path / "data.py"
    if content == "link":
        path.symlink_to(ROOT / "data.py")
    elif content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        assignment.submitted(tmp_path, "data", "rank_answers")


def test_the_clean_copy_has_our_solution_of_the_exercise_nowhere(tmp_path):
    """Not as a function, nor as text in any other file."""
    for number, exercise in EXERCISES.items():
        folder = tmp_path / str(number)
        assignment.clean_copy(folder, exercise, {})
        for target in exercise.functions:
            module, name = split_target(target)
            ours = ast.unparse(functions((ROOT / f"{module}.py").read_text())[name].body[-1])
            for path in folder.rglob("*"):
                if path.suffix == ".py" and len(ours) > 60:
                    assert ours not in ast.unparse(ast.parse(path.read_text())), (target, path)
                assert path.suffix in ("", ".py")


def test_edits_of_tests_and_of_other_functions_change_nothing(tmp_path):
    """Only the exercise's functions are read."""
    folder = submission(tmp_path / "edited",
                        rank_answers="def rank_answers(prompt, answers, rewards):\n    return 5",
                        pack="def pack(encoded, row_length):\n    return 6")
    (folder / "tests").mkdir()
    (folder / "tests/conftest.py").write_text("raise SystemExit\n")
    copy = tmp_path / "clean"
    text = assignment.submitted(folder, "data", "rank_answers")
    assignment.clean_copy(copy, RANKS, {"data.rank_answers": text})
    clean = functions((copy / "data.py").read_text())
    assert ast.unparse(clean["rank_answers"]) == (
        "def rank_answers(prompt, answers, rewards):\n    return 5")
    assert exercises.is_unwritten(clean["ranking_to_pairs"])
    assert ast.dump(clean["pack"]) == ast.dump(functions((ROOT / "data.py").read_text())["pack"])
    assert "SystemExit" not in (copy / "tests/conftest.py").read_text()


def test_what_a_submission_says_cannot_move_the_screen():
    assert assignment.printable("a\x1b[2J\nb\u202e\ud800") == "a?[2J\nb??"


# ------------------------------------------------------------------------------------------------
# The wrong answers
# ------------------------------------------------------------------------------------------------


def test_there_are_at_least_thirty_wrong_answers_each_with_its_function_test_and_history():
    """A mutant of a function that is gone, or a test that is gone, would catch nothing."""
    assert len(wrong_answers.MUTANTS) >= 30
    for mutant in wrong_answers.MUTANTS.values():
        assert callable(wrong_answers.find(mutant.target)[2])
        assert mutant.test in claims(), mutant.name
        assert len(mutant.who) > 20


def test_a_mutant_of_a_function_that_is_gone_is_named():
    for target in ("data.no_such_function", "model.GPT.no_such_method", "nothing.rank_answers"):
        with pytest.raises(UserError, match=f"{target} is no longer there"):
            wrong_answers.find(target)


def test_a_mutant_that_no_longer_fits_is_not_taken_for_caught():
    """A TypeError of the mutant itself fails every test, and says nothing of the tests."""
    assert wrong_answers.is_broken(
        "TypeError: wrong() takes 2 positional arguments but 3 were given")
    assert not wrong_answers.is_broken("AssertionError: Tensor-likes are not close!")


def test_a_students_tests_are_graded_by_the_mutants_they_catch(done):
    """Only those that pass on the right code count."""
    caught, wrongly = done["mutants"]
    assert caught == {"chosen_and_rejected_swapped": (True, "test_best_first")}
    assert [node.split("::")[1] for node in wrongly] == ["test_wrong_itself"]


# ------------------------------------------------------------------------------------------------
# The guide
# ------------------------------------------------------------------------------------------------

GUIDE = (ROOT / "classroom/GUIDE.md").read_text()
TOOLS = {"-m classroom.assignment": assignment, "-m classroom.wrong_answers": wrong_answers,
         "train_sft.py": train_sft, "train_dpo.py": train_dpo}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def test_the_commands_of_the_guide_parse():
    """Each line that runs one of our tools; LAB stands for the flags it is given. Those of the
    README are checked in test_readme.py."""
    text = "\n".join(blocks(GUIDE, "bash"))
    text = text.replace("$LAB", re.search(r'^LAB="(.*)"$', text, re.M)[1])
    found = re.findall(r"^python (-m classroom\.\w+|train_\w+\.py)\b([^#\n]*)", text, re.M)
    assert {name for name, _ in found} == set(TOOLS) and len(found) >= 12
    for name, words in found:
        TOOLS[name].parse_args(shlex.split(words))


def test_the_experiments_of_the_guide_replace_what_is_there():
    """Each is Python, imports what there is, and gives train_dpo a function of the same name and
    arguments as the one that it takes the place of."""
    code = blocks(GUIDE, "python")
    assert len(code) >= 6
    for block in map(ast.parse, code):
        ours = {node.name: node for node in block.body if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(block):
            if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").exists():
                for name in node.names:
                    assert hasattr(importlib.import_module(node.module), name.name), name.name
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                right = inspect.signature(getattr(train_dpo, node.targets[0].attr))
                wrong = ours[node.value.id].args
                assert wrong.vararg or [a.arg for a in wrong.args] == list(right.parameters)


def test_the_guide_lists_the_exercises_as_they_are():
    """Numbers, functions, and what comes first."""
    for exercise in EXERCISES.values():
        row = re.search(rf"^\| {exercise.number} \|.*$", GUIDE, re.M)[0].split("|")
        assert all(f"`{target.split('.', 1)[1]}`" in row[3] for target in exercise.functions)
        assert [int(n) for n in re.findall(r"\d+", row[4])] == exercise.needs
    assert f"{len(wrong_answers.MUTANTS)} wrong answers" in (ROOT / "README.md").read_text()


# ------------------------------------------------------------------------------------------------
# Bad input: one sentence, exit code 2
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main, argv, words", [
    (assignment.main, [], "one of the arguments"),
    (assignment.main, ["--out", "{here}"], "is there already"),
    (assignment.main, ["--out", "{here}/x", "--exercises", "1,11"], "--exercises 1,11: expected"),
    (assignment.main, ["--list", "--exercises", "1;2"], "--exercises 1;2: expected"),
    (assignment.main, ["--grade", "{here}/nowhere"], "no such folder"),
    (assignment.main, ["--list", "--seconds", "0"], "--seconds"),
    (wrong_answers.main, ["no_such_mutant"], "no mutant no_such_mutant"),
    (wrong_answers.main, ["--tests", "{here}/nowhere.py"], "no such file"),
    (wrong_answers.main, ["--jobs", "0"], "--jobs"),
])
def test_bad_input_is_refused_in_one_sentence(main, argv, words, tmp_path, capsys):
    (tmp_path / "something").write_text("here")
    with pytest.raises(SystemExit) as caught:
        main([word.format(here=tmp_path) for word in argv])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and words in message and message.count("\n") == 1


def test_the_exercises_are_listed_with_their_functions(capsys):
    assert assignment.main(["--list", "--exercises", "3"]) == 0
    out = capsys.readouterr().out
    assert "dpo_loss" in out and EXERCISES[3].equation in out and "## 4." not in out


def test_the_mutants_are_listed_with_who_made_the_mistake(capsys):
    assert wrong_answers.main(["--list", "mean_for_sum"]) == 0
    assert "minimind #659" in capsys.readouterr().out


def test_nothing_of_the_parents_environment_reaches_the_child(monkeypatch):
    """Keys of cloud services, tokens, the path of this repository."""
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert not {"SECRET_TOKEN", "PYTHONPATH", "PWD"} & set(sandbox.environment("/tmp"))
