"""The classroom tools: the student's copy, the grader, the wrong answers.

    pytest tests/test_classroom.py

Left out on purpose: that every mutant is caught, and that our solution meets every claim of every
exercise and an empty one meets none. `python -m classroom.wrong_answers` and
`python -m classroom.assignment --check` check this in a few minutes. A student's copy does not
contain this file.
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
from classroom import assignment, course, exercises, sandbox, wrong_answers
from classroom.exercises import (
    EXERCISES,
    claims,
    functions,
    message,
    name_of_test,
    split_target,
    with_functions,
    without_bodies,
)
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
# The exercise that is graded fastest: rank_answers and ranking_to_pairs, with five claims.
RANKS = EXERCISES[8]
OWN = {test for exercise in EXERCISES.values() for test in exercise.tests}
TARGETS = [target for exercise in EXERCISES.values() for target in exercise.functions]


# ------------------------------------------------------------------------------------------------
# Everything that takes time runs only once, two processes at a time
# ------------------------------------------------------------------------------------------------

PAIRS = "def ranking_to_pairs(ranking):\n    return {}"
RIGHT_PAIRS = PAIRS.format("[(w, l) for i, w in enumerate(ranking) for l in ranking[i + 1:]]")

# A rank_answers() that makes a different attempt in each test that calls it. After that it returns
# None, which is correct if all answers tie.
HOSTILE = f'''
def rank_answers(prompt, answers, rewards):
    import builtins, os, socket, subprocess
    attempt = builtins.attempt = getattr(builtins, "attempt", -1) + 1
    print("claim test_rank passed", {{"score": 100}})
    if attempt == 0:
        exec(open({str(ROOT / "data.py")!r}).read(), scope := {{}})
        return scope["rank_answers"](prompt, answers, rewards)
    if attempt == 1:
        os.fork()
    if attempt == 2:
        socket.create_connection(("127.0.0.1", 80), timeout=1)
    if attempt == 3:
        subprocess.run(["true"])
    if attempt == 4:
        [0] * 10**10
    if attempt == 5:
        raise KeyboardInterrupt
    if attempt == 6:
        raise SystemExit
'''
# A rank_answers() that writes forged records to every file descriptor that it can, and then exits.
FORGED = '''
def rank_answers(prompt, answers, rewards):
    import json, os
    for test in ("a_ranking_of_three_is_three_pairs", "answers_that_all_tie_make_no_row"):
        claim = {"claim": "tests/test_data.py::test_" + test, "outcome": "passed", "details": ""}
        for file in range(1, 64):
            try:
                for record in (claim, {"end": ""}):
                    os.write(file, (json.dumps(record) + "\\n").encode())
            except OSError:
                pass
    os._exit(0)
'''
LOOP = """
def rank_answers(prompt, answers, rewards):
    while True:
        pass
"""
CRASH = """
def rank_answers(prompt, answers, rewards):
    import faulthandler
    faulthandler._sigsegv()
"""
THEIR_TESTS = """
from data import ranking_to_pairs


def test_best_first():
    assert ranking_to_pairs([1, 0]) == [(1, 0)]


def test_wrong_itself():
    assert ranking_to_pairs([1, 0]) == []
"""


def submission(folder, **texts):
    """A folder with our own modules, in which these functions of data.py are replaced."""
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        (folder / path.name).write_bytes(path.read_bytes())
    source = (ROOT / "data.py").read_text()
    (folder / "data.py").write_text(with_functions(source, texts))
    return folder


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{name: outcome} of all slow runs, and under "folder" the path of a student's copy."""
    sandbox.isolation()
    tmp = tmp_path_factory.mktemp("class")
    half = submission(tmp / "half", ranking_to_pairs=PAIRS.format("[(ranking[0], ranking[1])]"))
    their_tests = tmp / "my_tests.py"
    their_tests.write_text(THEIR_TESTS)

    def try_out(text, seconds):
        texts = {"data.ranking_to_pairs": RIGHT_PAIRS, "data.rank_answers": text.strip()}
        return assignment.try_out(RANKS, texts, seconds)
    with ThreadPoolExecutor(2) as pool:
        jobs = {"copy": pool.submit(assignment.suite_of_copy, tmp / "copy",
                                    {claims()[test][0] for test in OWN}),
                "hostile": pool.submit(try_out, HOSTILE, 60),
                "forged": pool.submit(try_out, FORGED, 60),
                "crash": pool.submit(try_out, CRASH, 60),
                "loop": pool.submit(try_out, LOOP, 8),
                "half": pool.submit(assignment.grade, half, [RANKS], 60, 1),
                "mutants": pool.submit(wrong_answers.against_their_tests, their_tests,
                                       ["chosen_and_rejected_swapped"], 1)}
        return {name: job.result() for name, job in jobs.items()} | {"folder": tmp / "copy"}


# ------------------------------------------------------------------------------------------------
# The exercises
# ------------------------------------------------------------------------------------------------


def test_every_exercise_names_functions_and_tests_that_are_there():
    """The exercises are in the order of their numbers, and each function has a docstring."""
    assignment.by_module(EXERCISES.values())
    for number, exercise in EXERCISES.items():
        assert exercise.number == number and set(exercise.needs) <= set(EXERCISES) - {number}
        assert exercise.equation and exercise.before and len(exercise.tests) >= 3
        assert set(exercise.tests) <= set(claims())
        assert all(claims()[test][1] or "warm_up" in test for test in exercise.tests)


def test_every_wrong_answer_to_an_exercise_is_caught_by_one_of_its_own_claims():
    """A mistake that wrong_answers.py knows must also cost points in the grader."""
    for mutant in wrong_answers.MUTANTS.values():
        for exercise in EXERCISES.values():
            if mutant.target in exercise.functions:
                assert mutant.test in exercise.tests, mutant.name


def test_an_exercise_whose_function_is_gone_is_named():
    for target in ("data.no_such_function", "data.Batch.no_such_method", "nothing.rank_answers"):
        gone = RANKS._replace(functions=[target])
        words = f"{target}, which classroom/exercises.py names for exercise 8, no longer exists"
        with pytest.raises(UserError, match=words):
            assignment.by_module([gone])


# ------------------------------------------------------------------------------------------------
# The student's copy
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_of_a_function_is_left_but_its_signature_and_docstring(target):
    """Statements and comments of the solution are removed; everything else stays the same."""
    module, name = split_target(target)
    source = exercises.path_of(module).read_text()
    emptied = without_bodies(source, {name: "Exercise 1: x"})
    before, after = functions(source), functions(emptied)
    assert ast.unparse(after[name].args) == ast.unparse(before[name].args)
    assert ast.get_docstring(after[name]) == ast.get_docstring(before[name])
    assert ast.unparse(after[name].body[1]) == "raise NotImplementedError('Exercise 1: x')"
    assert len(after[name].body) == 2 and exercises.is_unwritten(after[name])
    first, end = exercises.body_lines(source, before[name])
    left = source.splitlines()[:first] + source.splitlines()[end:]
    raised = [line for line in emptied.splitlines() if "Exercise 1: x" in line]
    assert len(raised) == 1
    assert [line for line in emptied.splitlines() if line not in raised] == left


def test_comments_at_both_ends_of_a_body_go_with_it():
    source = ('def f(x):\n    """Doc."""\n    # the trick is\n    return 1  # one\n    # or two\n'
              "\n\n# about g\ndef g(x):\n    # none\n    return 2\n")
    assert without_bodies(source, {"f": "A", "g": "B"}) == (
        'def f(x):\n    """Doc."""\n    raise NotImplementedError("A")\n\n\n'
        '# about g\ndef g(x):\n    raise NotImplementedError("B")\n')


def test_the_readme_of_a_copy_does_not_show_what_is_to_be_written(outcomes):
    text = (outcomes["folder"] / "README.md").read_text()
    shown = {3: "losses = -bradley_terry(rewards[yw_idxs], rewards[yl_idxs])",
             10: "logps = logps_of(micro_batch)"}
    for exercise_number, line in shown.items():
        assert message(EXERCISES[exercise_number]) in text and line not in text
        assert line in (ROOT / "README.md").read_text()


def test_in_a_copy_exactly_the_claims_of_the_exercises_fail(outcomes):
    """No claim of an exercise holds in a copy: it fails, or it is skipped because it needs an
    exercise that comes first according to the sheet. No other test fails; many pass, and the others
    are skipped."""
    outcome = outcomes["copy"]
    assert not assignment.wrong_in_copy(outcome)
    passed = [node for node, (result, _) in outcome.claims.items() if result == "passed"]
    assert not set(map(name_of_test, passed)) & OWN and len(passed) > 90
    assert set(map(name_of_test, outcome.claims)) >= OWN
    for node, (_, details) in outcome.claims.items():
        test = name_of_test(node)
        if test in OWN and "needs Exercise" in details:
            needed = int(details.split("Exercise ")[1].split(":")[0])
            assert any(needed in exercise.needs for exercise in EXERCISES.values()
                       if test in exercise.tests), node


def test_the_sheet_names_each_function_equation_and_claim(outcomes):
    text = (outcomes["folder"] / "EXERCISES.md").read_text()
    for exercise in EXERCISES.values():
        assert f"## {exercise.number}. " in text and exercise.equation in text
        names = [split_target(target)[1] for target in exercise.functions]
        for word in [*map(exercises.sentence, exercise.tests), *names]:
            assert word in text


def test_a_copy_has_neither_the_guide_for_teachers_nor_old_runs(outcomes):
    names = {path.name for path in outcomes["folder"].rglob("*")}
    assert {"model.py", "README.md", "requirements.txt", "test_data.py",
            "wrong_answers.py"} <= names
    assert not {"test_classroom.py", "test_benchmark.py", "out", ".git"} & names
    assert (outcomes["folder"] / "classroom/GUIDE.md").read_text().count("\n") == 1


def test_a_copy_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    """Above all not a folder that still has our solutions."""
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(assignment, "without_bodies", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assignment.make_copy(tmp_path / "class", [EXERCISES[1]])
    assert not list(tmp_path.iterdir())


def test_a_copy_can_neither_make_copies_nor_grade(outcomes, tmp_path):
    command = [sys.executable, "-m", "classroom.assignment", "--out", str(tmp_path / "another")]
    answer = subprocess.run(command, cwd=outcomes["folder"], capture_output=True, text=True)
    assert answer.returncode == 2 and "this is a student's copy" in answer.stderr
    assert answer.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------
# Grading
# ------------------------------------------------------------------------------------------------


def test_each_claim_that_holds_has_its_share_of_the_points(outcomes):
    """The submission returns only the best pair of a ranking, which is right for two answers and
    wrong for more. It meets 2 of the 5 claims, so it gets 10 * 2 / 5 points."""
    results = outcomes["half"]
    held = {test["name"].split(": ")[1] for test in results["tests"] if test["status"] == "passed"}
    assert held == {"of answers that tie the first stands for all",
                    "answers that all tie make no row"}
    assert results["score"] == pytest.approx(10 * 2 / 5)
    assert sum(test["max_score"] for test in results["tests"]) == pytest.approx(10)
    assert "4.00 of 10" in results["output"]
    wrong = results["tests"][0]
    _, docstring = claims()[RANKS.tests[0]]
    assert docstring and wrong["output"].startswith(f"{docstring}\n")
    assert "assert [(2, 0)]" in wrong["output"]
    assert "Right contains 2 more items" in wrong["output"]     # a later line of the message
    assert set(json.loads(json.dumps(results))) == {"score", "tests", "output"}


def details_of(outcome):
    """The details of all claims, as one text."""
    return "\n".join(details for _, details in outcome.claims.values())


def test_what_a_submission_tries_is_refused_and_the_next_claim_is_graded(outcomes):
    """It tries to read our own file, to fork, to use the network, to start a process, to use all
    memory, to interrupt the tests and to exit."""
    outcome = outcomes["hostile"]
    for refused in (f"not allowed here: open of {ROOT / 'data.py'}", "not allowed here: os.fork",
                    "not allowed here: socket", "not allowed here: subprocess", "MemoryError",
                    "a KeyboardInterrupt was raised", "SystemExit"):
        assert refused in details_of(outcome), refused
    assert outcome.end == ""
    passed = {name_of_test(node) for node, (result, _) in outcome.claims.items()
              if result == "passed"}
    assert passed == {"test_a_ranking_of_three_is_three_pairs"}     # does not call rank_answers


# Each attempt on a file that may be read, but not written, and on what may be written.
ATTEMPTS = """
import os, sys
from classroom.sandbox import guard
inside, package = sys.argv[1:]
os.chdir(inside)
sys.path.append(package)
guard(inside, inside)
for name, attempt in {
        "open": lambda path: open(path, "a").close(),
        "os.open": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_CREAT)),
        "truncate": lambda path: os.close(os.open(path, os.O_RDONLY | os.O_TRUNC)),
        "rename from": lambda path: os.rename(path, "other"),
        "rename to": lambda path: os.rename("other", path),
        "remove": os.remove}.items():
    for path in ("a", package + "/a"):
        try:
            attempt(path)
            print(name, path == "a")
        except PermissionError as error:
            assert str(error).startswith("not allowed here: ")
    open("other", "w").close()
    open("a", "w").close()
print(open(package + "/a").read())
"""


def test_only_its_own_folder_can_be_written_by_guarded_code(tmp_path):
    """Python's own packages can be read, but in no way written, and the own folder in any way."""
    inside, package = tmp_path / "inside", tmp_path / "site-packages"
    for folder in (inside, package):
        folder.mkdir()
        (folder / "a").write_text("as it was")
        (folder / "other").write_text("")
    done = subprocess.run([sys.executable, "-c", ATTEMPTS, str(inside), str(package)], cwd=ROOT,
                          capture_output=True, text=True)
    allowed = ["open", "os.open", "truncate", "rename from", "rename to", "remove"]
    assert done.stdout.splitlines() == [f"{name} True" for name in allowed] + ["as it was"], (
        done.stderr)


def test_a_forged_record_is_not_believed(outcomes):
    """The forged records lack the nonce. Claims that passed before the exit count, except the last
    one, because the process may have ended during it."""
    outcome = outcomes["forged"]
    assert outcome.end == "the process ended before its tests did (exit code 0)"
    assert list(map(name_of_test, outcome.claims)) == ["test_a_ranking_of_three_is_three_pairs"]
    entries = [assignment.entry(RANKS, test, outcome, []) for test in RANKS.tests]
    assert not any(entry["score"] for entry in entries)
    assert "ended before its tests did" in entries[-1]["output"]


def test_a_crash_ends_the_process_and_not_the_grader(outcomes):
    assert "SIGSEGV" in outcomes["crash"].end


def test_an_endless_loop_is_stopped(outcomes):
    """A claim has a quarter of the time of an exercise, which includes starting the process."""
    outcome = outcomes["loop"]
    assert (outcome.end == "stopped after 8 seconds"
            or "no answer after 2 seconds" in details_of(outcome))


def first_complaint(text):
    """The first complaint about a function, or ""."""
    return next(assignment.complaints(ast.parse(text).body[0]), "")


@pytest.mark.parametrize("line", [
    "import os", "import torch.testing", "from torch import testing", "from sys import *",
    "from . import data", "torch.testing.assert_close = print", "F.logsigmoid = abs",
    "open('data.py')", "x.__class__", "getattr(x, name)", "exec(text)", "torch.load(path)",
    "global dpo_loss", "torch.hub.load('x')", "x._private", "setattr(torch, 'a', 1)",
    "__builtins__['open']", "raise x.tb_frame", "print(help)", "class A: __eq__ = 1; __eq__()",
])
def test_what_only_a_forged_grade_needs_is_refused_unseen(line):
    """Such code is refused before anything runs."""
    assert first_complaint(f"def f(x):\n    {line}").startswith("2: ")


@pytest.mark.parametrize("target", TARGETS)
def test_our_own_solutions_need_none_of_it(target):
    module, name = split_target(target)
    assert not list(assignment.complaints(functions(exercises.path_of(module).read_text())[name]))


def test_what_a_student_writes_needs_none_of_it():
    text = """
def f(x, pairs):
    import math
    import torch.nn.functional as F
    def inner(y):
        nonlocal x
        return y
    for i, (w, l) in enumerate(pairs):
        x[w] += math.exp(-i)
    x.grad = None
    print(x)
    return [inner(y) for y in x]
"""
    assert not first_complaint(text)


@pytest.mark.parametrize("content, words", [
    (None, "cannot be read: No such file"),
    ("link", "cannot be read"),
    ("folder", "cannot be read|not a file"),
    ("pipe", "not a file of"),
    (b"\xff", "not UTF-8"),
    (b"\0", "pars|not Python"),
    (b"(" * 5000, "pars|not Python|nested"),
    (b"#" * (1 << 21), "not a file of at most a megabyte"),
    (b"x = 1\n", "there is no function rank_answers"),
    (b"def rank_answers(:\n", "line 1: not Python"),
    (b"def rank_answers(p, a, r):\n    raise NotImplementedError('Exercise 8: x')\n",
     "not written yet"),
    (b"def rank_answers(p, a, r):\n    import os\n", "rank_answers, line 2: imports os"),
])
def test_a_submission_that_cannot_be_read_says_why(tmp_path, content, words):
    """Links are not followed, because they could lead to our own file."""
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
    """Neither as the function nor in any other file."""
    for exercise in EXERCISES.values():
        folder = tmp_path / str(exercise.number)
        assignment.clean_copy(folder, exercise, {})
        for target in exercise.functions:
            module, name = split_target(target)
            ours = ast.unparse(functions(exercises.path_of(module).read_text())[name].body[-1])
            for path in folder.rglob("*"):
                if path.suffix == ".py" and len(ours) > 60:
                    assert ours not in ast.unparse(ast.parse(path.read_text())), (target, path)
                assert path.suffix in ("", ".py")


def test_edits_of_tests_and_of_other_functions_change_nothing(tmp_path):
    """The grader reads only the functions of the exercise."""
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
    """Every target, every test and every description exists."""
    assert len(wrong_answers.MUTANTS) >= 30
    for mutant in wrong_answers.MUTANTS.values():
        assert callable(wrong_answers.find(mutant.target)[2])
        assert mutant.test in claims(), mutant.name
        assert len(mutant.description) > 20


def test_a_mutant_of_a_function_that_is_gone_is_named():
    for target in ("data.no_such_function", "model.GPT.no_such_method", "nothing.rank_answers"):
        with pytest.raises(UserError, match=f"{target} no longer exists"):
            wrong_answers.find(target)


def test_a_mutant_that_no_longer_fits_is_not_taken_for_caught():
    """If the mutant itself raises a TypeError, every test fails, whatever it checks."""
    assert wrong_answers.is_broken(
        "TypeError: wrong() takes 2 positional arguments but 3 were given")
    assert not wrong_answers.is_broken("AssertionError: Tensor-likes are not close!")


def test_a_students_tests_are_graded_by_the_mutants_they_catch(outcomes):
    """Only tests that pass on the correct code count."""
    caught, wrong_tests = outcomes["mutants"]
    assert caught == {"chosen_and_rejected_swapped": (True, "test_best_first")}
    assert list(map(name_of_test, wrong_tests)) == ["test_wrong_itself"]


# ------------------------------------------------------------------------------------------------
# The guide
# ------------------------------------------------------------------------------------------------

GUIDE = (ROOT / "classroom/GUIDE.md").read_text()
TOOLS = {"-m classroom.assignment": assignment, "-m classroom.wrong_answers": wrong_answers,
         "-m classroom.course": course, "train_sft.py": train_sft, "train_dpo.py": train_dpo}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def test_the_commands_of_the_guide_parse():
    """Every line that runs one of our tools, with the flags that LAB stands for. (test_readme.py
    checks the commands of the other pages.)"""
    text = "\n".join(blocks(GUIDE, "bash")).replace("\\\n", " ")
    text = text.replace("$LAB", re.search(r'^LAB="(.*)"$', text, re.M)[1])
    found = re.findall(r"^python (-m classroom\.\w+|train_\w+\.py)\b([^#\n]*)", text, re.M)
    assert {name for name, _ in found} == set(TOOLS) and len(found) >= 12
    for name, flags in found:
        TOOLS[name].parse_args(shlex.split(flags))


def imported_names(tree):
    """{name: module or object} that the imports of a script define. Fails if one does not exist."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                if alias.asname:
                    names[alias.asname] = module
                else:
                    top_level = alias.name.split(".")[0]
                    names[top_level] = sys.modules[top_level]
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                names[alias.asname or alias.name] = getattr(module, alias.name)
    return names


def test_the_experiments_of_the_guide_replace_what_is_there():
    """Each script is valid Python and imports only names that exist. A function that it assigns to
    an attribute of a module has the same arguments as the one that it replaces."""
    scripts = blocks(GUIDE, "python")
    assert len(scripts) >= 6
    replaced = set()
    for tree in map(ast.parse, scripts):
        names = imported_names(tree)
        defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
                continue
            target = node.targets[0]
            module = names[target.value.id]
            right = inspect.signature(getattr(module, target.attr))
            arguments = [argument.arg for argument in defined[node.value.id].args.args]
            assert arguments == list(right.parameters)
            replaced.add(f"{module.__name__}.{target.attr}")
    assert replaced == {"train_dpo.objective", "tasks.reviews.preferences"}


def test_the_guide_lists_the_exercises_as_they_are():
    """Their numbers, functions and needs are the same as in classroom/exercises.py."""
    for exercise in EXERCISES.values():
        row = re.search(rf"^\| {exercise.number} \|.*$", GUIDE, re.M)[0].split("|")
        assert all(f"`{split_target(target)[1]}`" in row[3] for target in exercise.functions)
        assert [int(digits) for digits in re.findall(r"\d+", row[4])] == exercise.needs
    assert f"{len(wrong_answers.MUTANTS)} wrong answers" in (ROOT / "README.md").read_text()


def rows_with(*cells):
    """The rows of the guide's tables that begin with these cells, as lists of cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in GUIDE.splitlines() if line.startswith("|")]
    return [row for row in rows if row[:len(cells)] == list(cells)]


def test_the_plans_add_up():
    """Minutes and points of the table of exercises; questions have 5 points, experiments 10."""
    rows = [rows_with(str(number))[0] for number in EXERCISES]      # the first table with numbers
    for plan, column, minutes in (("one week", 5, 230), ("three weeks", 6, 490)):
        chosen = [row for row in rows if row[column]]
        (_, exercise_points, questions, experiments, total), = rows_with(plan)
        n_questions, question_points = map(int, questions.split(": "))
        n_experiments, experiment_points = map(int, experiments.split(": "))
        assert sum(int(row[column]) for row in chosen) == int(exercise_points)
        assert (question_points, experiment_points) == (5 * n_questions, 10 * n_experiments)
        assert int(exercise_points) + question_points + experiment_points == int(total)
        assert sum(int(row[4]) for row in chosen) == minutes
        assert f"of which {minutes} minutes" in GUIDE


def test_each_written_question_has_a_rubric_of_three_levels():
    rows = [line.strip("|").replace("\\|", "").split("|") for line in GUIDE.splitlines()
            if re.match(r"\| \*\*\d\.\*\*", line)]
    assert [int(row[0].split("**")[1][:-1]) for row in rows] == list(range(1, 9))
    assert all(len(row) == 4 and all(len(cell) > 20 for cell in row) for row in rows)


def test_every_experiment_has_a_threshold_and_every_page_of_the_reading_order_exists():
    titles = re.findall(r"^### (\d)\. ", GUIDE, re.M)
    assert titles == [str(n) for n in range(1, 10)]
    thresholds = GUIDE[GUIDE.index("### Thresholds"):GUIDE.index("### 1. ")]
    assert re.findall(r"^\| (\d) \|", thresholds, re.M) == titles
    pages = set(re.findall(r"`(docs/\w+\.md)`", GUIDE))
    assert len(pages) >= 8 and all((ROOT / page).exists() for page in pages)


def test_thresholds_are_met_by_what_the_readme_reports():
    """The default run of two seeds, each of which is in the README and the guide. What the guide
    calls measured is the lowest of all runs, so no higher than these two."""
    readme = " ".join((ROOT / "README.md").read_text().split())
    reward, win_rate, well_formed = map(float, re.search(
        r"^dpo +([\d.]+) \S+ +[\d.]+ \S+ ([\d.]+) \S+ +([\d.]+) ", (ROOT / "README.md").read_text(),
        re.M).groups())
    others = re.search(r"`--seed 1`, SFT included, beta 0.5 ends at reward ([\d.]+), win rate "
                       r"([\d.]+) and ([\d.]+) well-formed", readme)
    row, = rows_with("the default run")
    limits, measured = ([float(number) for number in re.findall(r"\d+(?:\.\d+)?", cell)]
                        for cell in row[1:3])
    runs = [(reward, 100 * well_formed, win_rate),
            (float(others[1]), 100 * float(others[3]), float(others[2]))]
    for limit, lowest, *of_runs in zip(limits, measured, *runs, strict=True):
        assert limit <= lowest <= min(of_runs) + 1e-9
    guide = " ".join(GUIDE.split())
    assert f"reward {reward} with {well_formed} well-formed" in guide
    assert re.search(rf"with `--seed 1` at {others[1]}\d and {others[3]},", guide)


# ------------------------------------------------------------------------------------------------
# Bad input, and what the commands print
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main, argv, words", [
    (assignment.main, [], "one of the arguments"),
    (assignment.main, ["--out", "{here}"], "already exists"),
    (assignment.main, ["--out", "{here}/x", "--exercises", "1,99"], "--exercises 1,99: expected"),
    (assignment.main, ["--out", str(ROOT / "tests" / "class")], "inside a folder that is copied"),
    (assignment.main, ["--list", "--exercises", "1;2"], "--exercises 1;2: expected"),
    (assignment.main, ["--grade", "{here}/nowhere"], "no such folder"),
    (assignment.main, ["--grade", "{here}", "--results", "{here}/nowhere/r.json"],
     "r.json: there is no such folder to write to"),
    (assignment.main, ["--list", "--seconds", "0"], "--seconds"),
    (wrong_answers.main, ["no_such_mutant"], "no mutant no_such_mutant"),
    (wrong_answers.main, ["--tests", "{here}/nowhere.py"], "no such file"),
    (wrong_answers.main, ["--jobs", "0"], "--jobs"),
])
def test_bad_input_is_refused_in_one_sentence(main, argv, words, tmp_path, capsys):
    """With exit code 2."""
    (tmp_path / "something").write_text("here")
    with pytest.raises(SystemExit) as caught:
        main([word.format(here=tmp_path) for word in argv])
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and words in printed and printed.count("\n") == 1


def test_the_exercises_are_listed_with_their_functions(capsys):
    assert assignment.main(["--list", "--exercises", "3"]) == 0
    out = capsys.readouterr().out
    assert "dpo_loss" in out and EXERCISES[3].equation in out and "## 4." not in out


def test_the_mutants_are_listed_with_who_made_the_mistake(capsys):
    assert wrong_answers.main(["--list", "mean_for_sum"]) == 0
    assert "minimind #659" in capsys.readouterr().out


def test_nothing_of_the_parents_environment_reaches_the_child(monkeypatch):
    """It may contain secrets, and PYTHONPATH may lead to our own files."""
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert not {"SECRET_TOKEN", "PYTHONPATH", "PWD"} & set(sandbox.environment("/tmp"))
