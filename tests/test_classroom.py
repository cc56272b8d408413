"""The classroom tools: the student's copy, the grader, the wrong answers.

    pytest tests/test_classroom.py

Left out on purpose: that every mutant is caught, that right solutions meet every claim of every
exercise and an empty one meets none, and that no other test fails in a copy. `python -m
classroom.wrong_answers` and `python -m classroom.assignment --check` check this in a few minutes. A
student's copy does not contain this file.
"""

import ast
import csv
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

import conftest
import pytest

import train_dpo
import train_sft
from classroom import (
    assignment,
    copies,
    course,
    exercises,
    probes,
    right_answers,
    rules,
    sandbox,
    wrong_answers,
)
from classroom.exercises import (
    CORE,
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
        exec(open({str(ROOT / "tasks/sampled.py")!r}).read(), scope := {{}})
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
    """A folder with the two modules of exercise 8, in which these functions are replaced."""
    (folder / "tasks").mkdir(parents=True)
    for file in ("data.py", "tasks/sampled.py"):
        source = (ROOT / file).read_text()
        replaced = {name: text for name, text in texts.items() if name in functions(source)}
        (folder / file).write_text(with_functions(source, replaced))
    return folder


# Claims of three exercises, run in a copy in which nothing is written.
IN_COPY = [test for number in (3, 4, 8) for test in EXERCISES[number].tests]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{name: outcome} of all slow runs, and under "folder" the path of a student's copy."""
    tmp = tmp_path_factory.mktemp("class")
    half = submission(tmp / "half", ranking_to_pairs=PAIRS.format("[(ranking[0], ranking[1])]"))
    texts = {"half": assignment.read_functions(half, RANKS)[0]}
    for name, text in (("hostile", HOSTILE), ("forged", FORGED), ("crash", CRASH), ("loop", LOOP)):
        texts[name] = {"data.ranking_to_pairs": RIGHT_PAIRS,
                       "tasks.sampled.rank_answers": text.strip()}
    runs = {}
    for name in texts:
        seconds = 4 if name == "loop" else 60
        tests = assignment.clean_copy(tmp / f"clean {name}", RANKS, texts[name])
        runs[name] = sandbox.TestRun(tmp / f"clean {name}", tests, seconds, guarded=True,
                                 claim_seconds=seconds / 4)
    copies.make_copy(tmp / "copy", list(EXERCISES.values()))
    in_copy = [f"tests/{claims()[test][0]}::{test}" for test in IN_COPY]
    runs["copy"] = sandbox.TestRun(tmp / "copy", in_copy, 300)
    their_tests = tmp / "my_tests.py"
    their_tests.write_text(THEIR_TESTS)
    with ThreadPoolExecutor(2) as pool:
        mutants = pool.submit(wrong_answers.against_their_tests, their_tests,
                              ["chosen_and_rejected_swapped"], 1)
        found = dict(zip(runs, sandbox.run_all(list(runs.values()), 2)))
        return found | {"mutants": mutants.result(), "folder": tmp / "copy"}


# ------------------------------------------------------------------------------------------------
# The exercises
# ------------------------------------------------------------------------------------------------


def test_every_exercise_names_functions_and_tests_that_are_there():
    """The exercises are in the order of their numbers, and each function has a docstring."""
    copies.by_module(EXERCISES.values())
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
            copies.by_module([gone])


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


def code_blocks(markdown):
    return re.findall(r"^```python\n(.*?)^```", markdown, re.S | re.M)


@pytest.mark.parametrize("number", EXERCISES)
def test_the_readme_of_a_copy_hides_what_is_to_be_written_and_nothing_else(number):
    """A block changes only if it shows a function of the exercise: the whole of it or some lines of
    its body."""
    text = (ROOT / "README.md").read_text()
    exercise = EXERCISES[number]
    hidden = copies.without_answers(text, copies.by_module([exercise]))
    names = [split_target(target)[1] for target in exercise.functions]
    for before, after in zip(code_blocks(text), code_blocks(hidden), strict=True):
        if before != after:
            assert message(exercise) in after
            assert number == 10 or any(f"def {name}(" in before for name in names)
        assert not any(f"def {name}(" in before for name in names) or before != after


def test_a_page_that_shows_a_few_lines_of_a_body_hides_them():
    page = "```python\nfor w in x:\n    return 1   # one\n```\n\n```python\nx = 3\n```\n"
    chosen = copies.by_module([EXERCISES[3]])
    assert copies.without_answers(page, chosen) == page
    source = exercises.path_of("train_dpo").read_text()
    first, end = exercises.body_lines(source, functions(source)["dpo_loss"])
    shown = "```python\n" + "\n".join(source.splitlines()[first:end - 1]) + "\n```\n"
    assert copies.without_answers(page + shown, chosen) == (
        page + f'```python\nraise NotImplementedError("{message(EXERCISES[3])}")\n```\n')


def test_in_a_copy_exactly_the_claims_of_the_exercises_fail(outcomes):
    """No claim holds in a copy: it fails, or it is skipped because it needs an exercise that comes
    first according to the sheet."""
    outcome = outcomes["copy"]
    assert not assignment.wrong_in_copy(outcome)
    assert set(map(name_of_test, outcome.claims)) == set(IN_COPY)
    for node, (result, details) in outcome.claims.items():
        test = name_of_test(node)
        assert result in ("failed", "skipped")
        if "needs Exercise" in details:
            needed = int(details.split("Exercise ")[1].split(":")[0])
            assert any(needed in exercise.needs for exercise in EXERCISES.values()
                       if test in exercise.tests), node


def test_a_copy_has_nothing_from_which_a_solution_could_be_taken(outcomes):
    """No wrong answers, no benchmark, no tests but those with claims. And no file has all the lines
    of the body of a graded function, one after the other."""
    folder = outcomes["folder"]
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")
             if path.is_file() and path.suffix != ".pyc"}
    of_classroom = {name for name in names if name.startswith("classroom/")}
    assert of_classroom == {f"classroom/{name}" for name in (
        "__init__.py", "exercises.py", "mistakes.json", "probes.py", "rules.py")}
    assert {name for name in names if name.startswith("experiments/")} == {
        "experiments/online.py", "experiments/ppo.py", "experiments/reward_model.py"}
    assert {name for name in names if name.startswith("tests/")} == {
        "tests/conftest.py", *(f"tests/{claims()[test][0]}" for test in OWN)}
    assert not files_with_a_body(folder, TARGETS)


def files_with_a_body(folder, targets):
    """Those files of a folder that have all the lines of the body of one of these functions, one
    after the other, as {function: their names}."""
    texts = {path.name: without_spaces(path.read_text(encoding="utf-8"))
             for path in folder.rglob("*") if path.suffix in (".py", ".md")}
    found = {}
    for target in targets:
        module, name = split_target(target)
        source = exercises.path_of(module).read_text()
        first, end = exercises.body_lines(source, functions(source)[name])
        body = without_spaces("\n".join(source.splitlines()[first:end]))
        assert len(body) > 15
        files = [file for file, text in texts.items() if body in text]
        if files:
            found[target] = files
    return found


def without_spaces(text):
    """The code of a text without comments, indentation and empty lines."""
    return "\n".join(line for line in map(copies.code_of, text.splitlines()) if line)


def test_a_copy_for_some_exercises_has_only_their_tests_and_mistakes(tmp_path):
    copies.make_copy(tmp_path / "class", [RANKS])
    assert not (tmp_path / "class/experiments").exists()
    assert {path.name for path in (tmp_path / "class/tests").iterdir()} == {
        "conftest.py", "test_data.py"}
    mistakes = json.loads((tmp_path / "class/classroom/mistakes.json").read_text())
    assert set(mistakes) == set(RANKS.functions)


# What a student sees, on a machine that lacks what only Unix has: a mistake, and a refused import.
ON_WINDOWS = """
import os, signal, sys
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None                # import raises ModuleNotFoundError
for module, name in ((os, "O_NOFOLLOW"), (os, "O_NONBLOCK"), (os, "fork"), (signal, "SIGALRM"),
                     (signal, "SIGKILL"), (os, "killpg")):
    delattr(module, name)
import pytest
sys.exit(pytest.main(["--exercise", "8", "-p", "no:cacheprovider"]))
"""


def test_a_student_on_windows_is_told_the_mistake_and_what_the_grader_would_refuse(tmp_path):
    folder = tmp_path / "class"
    copies.make_copy(folder, [RANKS])
    pairs = PAIRS.format("[(l, w) for i, w in enumerate(ranking) for l in ranking[i + 1:]]")
    ranks = ("def rank_answers(prompt, answers, rewards):\n    import os\n"
             "    return {}['nothing']")
    for file, texts in (("data.py", {"ranking_to_pairs": pairs}),
                        ("tasks/sampled.py", {"rank_answers": ranks})):
        source = (folder / file).read_text()
        (folder / file).write_text(with_functions(source, texts))
    done = subprocess.run([sys.executable, "-c", ON_WINDOWS], cwd=folder, capture_output=True,
                          text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    for words in ("collected", "wrong   a ranking of three is three pairs",
                  "        Best first: whoever stands earlier wins.",
                  "this mistake in ranking_to_pairs gives exactly what yours returns: The two "
                  "columns", "KeyError: 'nothing'",
                  "in rank_answers of sampled.py: return {}['nothing']",
                  "the grader would refuse this: rank_answers, line", "0 of 5 claims hold"):
        assert words in done.stdout, done.stdout


@pytest.mark.parametrize("text, words", [
    ("x = 1\ndef f(x:\n    pass\n", r'File ".*a_students_file.py", line 2\n +def f\(x:\n +\^'),
    ("x = 1\ny = undefined\n", r'line 2(.|\n)*y = undefined(.|\n)*NameError'),
])
def test_a_file_that_cannot_be_imported_is_shown_with_its_line(tmp_path, monkeypatch, text, words):
    """Instead of one error for each file of tests."""
    (tmp_path / "a_students_file.py").write_text(text)
    monkeypatch.setattr(conftest, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(pytest.UsageError, match=words):
        conftest.try_to_import("a_students_file")


def test_the_sheet_names_each_function_equation_and_claim(outcomes):
    text = (outcomes["folder"] / "EXERCISES.md").read_text()
    for exercise in EXERCISES.values():
        assert f"## {exercise.number}. " in text and exercise.equation in text
        names = [split_target(target)[1] for target in exercise.functions]
        for word in [*map(exercises.sentence, exercise.tests), *names]:
            assert word in text


def test_a_copy_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    """Above all not a folder that still has our solutions."""
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(copies, "without_bodies", interrupted)
    with pytest.raises(KeyboardInterrupt):
        copies.make_copy(tmp_path / "class", [EXERCISES[1]])
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------
# Grading
# ------------------------------------------------------------------------------------------------


def test_each_claim_that_holds_has_its_share_of_the_points(outcomes):
    """The submission returns only the best pair of a ranking, which is right for two answers and
    wrong for more. It meets 2 of the 4 claims that share half of the points, and not the one that
    has the other half: 10 / 2 * 2 / 4 points."""
    entries = assignment.entries_of(RANKS, 10.0, outcomes["half"], [])
    held = {test["name"].split(": ")[1] for test in entries if test["status"] == "passed"}
    assert held == {"of answers that tie the first stands for all",
                    "answers that all tie make no row"}
    assert assignment.total_score(entries) == 2.5
    assert sum(test["max_score"] for test in entries) == 10
    assert "2.50 of 10" in assignment.points_table([RANKS], [entries], {8: 10.0})
    wrong = entries[0]
    _, docstring = claims()[RANKS.tests[0]]
    assert docstring and wrong["output"].startswith(f"{docstring}\n")
    assert "assert [(2, 0)]" in wrong["output"]
    assert "Right contains 2 more items" in wrong["output"]     # a later line of the message

@pytest.mark.parametrize("number", EXERCISES)
@pytest.mark.parametrize("points", [10.0, 15.0, 0.5])
def test_points_have_two_places_and_add_up(number, points):
    """Half of them are for the claims that say what the function computes."""
    exercise = EXERCISES[number]
    shares = assignment.shares_of(exercise, points)
    assert list(shares) == exercise.tests
    assert sum(shares.values()) == pytest.approx(points)
    assert all(round(share, 2) == share >= 0 for share in shares.values())
    core = sum(share for test, share in shares.items() if test in CORE)
    assert core == pytest.approx(points / 2, abs=0.005 * len(shares))


def test_every_exercise_has_a_core_claim_and_others():
    assert CORE <= OWN
    for exercise in EXERCISES.values():
        assert 0 < len(CORE & set(exercise.tests)) < len(exercise.tests)


def test_a_class_is_graded_with_a_row_for_each_submission(tmp_path, capsys):
    """These two have no file that could be run, so no process is needed."""
    for name, text in (("ann", "x = 1\n"), ("bob", "def dpo_gradient(:\n")):
        (tmp_path / "handed_in" / name).mkdir(parents=True)
        (tmp_path / "handed_in" / name / "train_dpo.py").write_text(text)
    assignment.main(["--grade-all", str(tmp_path / "handed_in"), "--exercises", "3,4",
                     "--points", "4=15", "--results", str(tmp_path / "results")])
    with open(tmp_path / "results/grades.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"submission": name, "total": "0.0", "exercise 3": "0.0", "exercise 4": "0.0"}
                    for name in ("ann", "bob")]
    results = json.loads((tmp_path / "results/bob.json").read_text())
    assert set(results) == {"score", "tests", "output"}
    assert sum(test["max_score"] for test in results["tests"]) == pytest.approx(25)
    assert "train_dpo.py, line 1, 'def dpo_gradient(:': not Python" in results["tests"][0]["output"]
    assert "0.00 of 25" in capsys.readouterr().out


def test_each_student_has_a_seed_of_their_own():
    """The same one every time."""
    assert assignment.seed_of(1, "ann") == assignment.seed_of(1, "ann")
    assert len({assignment.seed_of(seed, name) for seed in (1, 2) for name in ("ann", "bob")}) == 4
    assert assignment.seed_of(None, "ann") is None


@pytest.fixture
def a_hidden_claim(monkeypatch):
    """The first claim of exercise 8, which is hidden because of the name of its file."""
    hidden = RANKS.tests[0]
    known = claims() | {hidden: (exercises.HIDDEN, "Secret.")}
    monkeypatch.setattr(copies, "claims", lambda: known)
    return hidden


def test_a_hidden_claim_is_in_no_copy(a_hidden_claim):
    """Neither its test nor its name, nor a line of the sheet."""
    exercise = copies.without_hidden(RANKS)
    assert exercise.tests == RANKS.tests[1:]
    text = copies.without_hidden_names((ROOT / "classroom/exercises.py").read_text())
    assert a_hidden_claim not in text
    names = {}
    exec(compile(text, str(ROOT / "classroom/exercises.py"), "exec"),
         names | {"__file__": exercises.__file__}, names)
    assert names["EXERCISES"][8].tests == RANKS.tests[1:]


def test_a_student_does_not_see_the_result_of_a_hidden_claim(a_hidden_claim):
    outcome = sandbox.Outcome({}, "")
    visible = {test: assignment.entry(RANKS, test, 1.0, outcome, [])["visibility"]
               for test in RANKS.tests}
    assert visible == dict.fromkeys(RANKS.tests, "visible") | {a_hidden_claim: "hidden"}


def details_of(outcome):
    """The details of all claims, as one text."""
    return "\n".join(details for _, details in outcome.claims.values())


def test_what_a_submission_tries_is_refused_and_the_next_claim_is_graded(outcomes):
    """It tries to read our own file, to fork, to use the network, to start a process, to use all
    memory, to interrupt the tests and to exit."""
    outcome = outcomes["hostile"]
    for refused in (f"not allowed here: open of {ROOT / 'tasks/sampled.py'}",
                    "not allowed here: os.fork", "not allowed here: socket",
                    "not allowed here: subprocess", "MemoryError",
                    "a KeyboardInterrupt was raised", "SystemExit"):
        assert refused in details_of(outcome), refused
    assert outcome.end == ""
    passed = {name_of_test(node) for node, (result, _) in outcome.claims.items()
              if result == "passed"}
    assert passed == {"test_a_ranking_of_three_is_three_pairs"}     # does not call rank_answers


# Each attempt on a file that may be read, but not written, and on what may be written.
ATTEMPTS = """
import os, sys, types
for name in ("hypothesis", "numpy", "pytest", "torch"):     # not needed here, and slow to import
    sys.modules[name] = types.ModuleType(name)
from classroom.child import guard
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
    entries = [assignment.entry(RANKS, test, 2.0, outcome, []) for test in RANKS.tests]
    assert not any(entry["score"] for entry in entries)
    assert "ended before its tests did" in entries[-1]["output"]


def test_a_crash_ends_the_process_and_not_the_grader(outcomes):
    assert "SIGSEGV" in outcomes["crash"].end


def test_an_endless_loop_is_stopped(outcomes):
    """A claim has a quarter of the time of an exercise, which includes starting the process."""
    outcome = outcomes["loop"]
    assert (outcome.end == "stopped after 4 seconds"
            or "no answer after 1 seconds" in details_of(outcome))


def first_complaint(text):
    """The first complaint about a function, or ""."""
    return next(rules.complaints(ast.parse(text).body[0]), "")


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
    assert not list(rules.complaints(functions(exercises.path_of(module).read_text())[name]))


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
    (None, "there is no file tasks/sampled.py"),
    ("link", "cannot be read"),
    ("folder", "cannot be read|not a file"),
    ("pipe", "not a file of"),
    (b"\xff", "not UTF-8"),
    (b"\0", "pars|not Python"),
    (b"(" * 5000, "pars|not Python|nested"),
    (b"#" * (1 << 21), "not a file of at most a megabyte"),
    (b"x = 1\n", "there is no function rank_answers"),
    (b"def rank_answers(:\n",
     "tasks/sampled.py, line 1, 'def rank_answers.:': not Python: invalid syntax"),
    (b"def rank_answers(p, a, r):\n    raise NotImplementedError('Exercise 8: x')\n",
     "not written yet"),
    (b"def rank_answers(p, a, r):\n    import os\n", "rank_answers, line 2: imports os"),
])
def test_a_submission_that_cannot_be_read_says_why(tmp_path, content, words):
    """Links are not followed, because they could lead to our own file."""
    path = tmp_path / "tasks/sampled.py"
    path.parent.mkdir()
    if content == "link":
        path.symlink_to(ROOT / "tasks/sampled.py")
    elif content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        rules.submitted(tmp_path, "tasks.sampled", "rank_answers")


@pytest.mark.parametrize("at, text", [
    ("tasks/sampled.py", "\ufeffdef rank_answers(prompt, answers, rewards):\n    return 5"),
    ("homework/my class/tasks/sampled.py",
     "def rank_answers(prompt, answers, rewards):\n    return 5"),
    ("sampled.py", "from torch import Tensor\nfrom typing import List\n\n"
     "def rank_answers(prompt: str, answers: List[str], rewards: Tensor) -> dict:\n"
     "    five: int = 5\n    return five"),
    ("sampled.py", "def rank_answers(prompt, input, rewards):\n    open = 5\n    return open"),
    ("sampled.py", "from functools import reduce\nimport math as m\n\n"
     "def rank_answers(prompt, answers, rewards):\n"
     "    return reduce(max, [m.floor(5.5)])"),
    ("sampled.py", "def rank_answers(prompt, answers, rewards):\n"
     "    from typing import Tuple\n    return 5"),
])
def test_what_is_harmless_is_accepted(tmp_path, at, text):
    """A byte order mark, a folder more, type annotations, imports at the top of the file, and
    variables that are called like a function of Python."""
    (tmp_path / at).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / at).write_text(text, encoding="utf-8")
    accepted = rules.submitted(tmp_path, "tasks.sampled", "rank_answers")
    scope = {}
    exec(accepted, scope)
    assert scope["rank_answers"]("Q", [], []) == 5


@pytest.mark.parametrize("text, words", [
    ("def help_me(x):\n    return x\n\ndef rank_answers(p, a, r):\n    return help_me(p)",
     "rank_answers uses help_me, which tasks/sampled.py defines outside of it: only the function "
     "itself is graded, so define it inside"),
    ("import os\n\ndef rank_answers(p, a, r):\n    return os.getcwd()", "uses os"),
    ("import scipy as s\n\ndef rank_answers(p, a, r):\n    return s.softmax(r)",
     "rank_answers needs line 1 of tasks/sampled.py, which imports scipy; no solution needs it"),
    ("def rank_answers(p, a, r):\n    def inner():\n        input = 1\n    return input()",
     "rank_answers, line 4: uses input"),
    ("def rank_answers(p, a, r=open('x')):\n    open = 1\n    return open", "uses open"),
])
def test_what_is_refused_says_what_to_change(tmp_path, text, words):
    (tmp_path / "sampled.py").write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        rules.submitted(tmp_path, "tasks.sampled", "rank_answers")


def test_of_two_files_none_is_chosen(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sampled.py").write_text("x = 1")
    with pytest.raises(UserError, match="several files sampled.py .new/sampled.py, old/sampled.py"):
        rules.submitted(tmp_path, "tasks.sampled", "rank_answers")


def test_the_clean_copy_has_our_solution_of_the_exercise_nowhere(tmp_path):
    """Neither as the function nor in any other file."""
    for exercise in EXERCISES.values():
        folder = tmp_path / str(exercise.number)
        assignment.clean_copy(folder, exercise, {})
        assert {path.suffix for path in folder.rglob("*")} == {"", ".py", ".json"}
        assert not files_with_a_body(folder, exercise.functions)


def test_edits_of_tests_and_of_other_functions_change_nothing(tmp_path):
    """The grader reads only the functions of the exercise."""
    folder = submission(tmp_path / "edited",
                        rank_answers="def rank_answers(prompt, answers, rewards):\n    return 5",
                        pack="def pack(encoded, row_length):\n    return 6")
    (folder / "tests").mkdir()
    (folder / "tests/conftest.py").write_text("raise SystemExit\n")
    copy = tmp_path / "clean"
    text = rules.submitted(folder, "tasks.sampled", "rank_answers")
    assignment.clean_copy(copy, RANKS, {"tasks.sampled.rank_answers": text})
    clean = functions((copy / "tasks/sampled.py").read_text())
    assert ast.unparse(clean["rank_answers"]) == (
        "def rank_answers(prompt, answers, rewards):\n    return 5")
    clean, ours = (functions((root / "data.py").read_text()) for root in (copy, ROOT))
    assert exercises.is_unwritten(clean["ranking_to_pairs"])
    assert ast.dump(clean["pack"]) == ast.dump(ours["pack"])
    assert "SystemExit" not in (copy / "tests/conftest.py").read_text()


def test_what_a_submission_says_cannot_move_the_screen():
    assert assignment.without_controls("a\x1b[2J\nb\u202e\ud800") == "a?[2J\nb??"


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


@pytest.mark.parametrize("target", probes.PROBES)
def test_a_probe_tells_each_wrong_answer_from_the_right_one_and_from_the_others(target):
    """So a mistake that is named is the one that was made."""
    _, _, right = wrong_answers.find(target)
    results = [probes.result_of(target, right)]
    assert results[0] is not None
    for result, _ in wrong_answers.results_of_mutants().get(target, []):
        assert not any(probes.are_close(result, other) for other in results), target
        results.append(result)


def test_nearly_every_wrong_answer_to_an_exercise_can_be_named():
    """Only those that raise an error, that only a longer run shows, or that are about a round of
    online DPO, which takes two models and a judge, cannot."""
    named = {name for results in wrong_answers.results_of_mutants().values()
             for _, name in results}
    cannot = {mutant.name for mutant in wrong_answers.MUTANTS.values()
              if mutant.target in TARGETS and mutant.description not in named
              and mutant.target != "experiments.online.sample_round"}
    assert cannot == {"scaler_never_updated", "reference_moves_on_resume"}


def test_a_known_mistake_is_named_and_a_right_function_is_not(monkeypatch):
    wrong = [[probes.result_of("data.ranking_to_pairs", lambda ranking: []), "nothing is there"]]
    monkeypatch.setattr(probes, "known_mistakes", lambda: {"data.ranking_to_pairs": wrong})
    for function, expected in ((lambda ranking: [], 1), (lambda ranking: [(0, 1)], 0)):
        probes.likely_mistakes.cache_clear()
        monkeypatch.setattr("data.ranking_to_pairs", function)
        found = probes.likely_mistakes(tuple(RANKS.functions))
        assert len(found) == expected
    probes.likely_mistakes.cache_clear()


@pytest.mark.parametrize("number", set(EXERCISES) - {10})
def test_every_exercise_has_three_right_answers_in_other_styles(number):
    """None of them is what another one or we wrote. (Their claims are checked by --check.)"""
    exercise = EXERCISES[number]
    ours = {target: rules.submitted(ROOT, *split_target(target)) for target in exercise.functions}
    solutions = [{}, *right_answers.solutions_of(exercise)]
    assert len({json.dumps(ours | solution) for solution in solutions}) == 4


def test_a_students_tests_are_graded_by_the_mutants_they_catch(outcomes):
    """Only tests that pass on the correct code count."""
    caught, wrong_tests = outcomes["mutants"]
    assert caught == {"chosen_and_rejected_swapped": (True, "test_best_first")}
    assert list(map(name_of_test, wrong_tests)) == ["test_wrong_itself"]


# ------------------------------------------------------------------------------------------------
# Gradescope and GitHub Classroom
# ------------------------------------------------------------------------------------------------


def test_an_autograder_for_gradescope_is_ready_to_zip(tmp_path, capsys):
    """Both scripts may be executed, and what is called is a command of this repository."""
    assignment.main(["--gradescope", str(tmp_path / "autograder"), "--exercises", "3,12",
                     "--points", "3=15"])
    folder = tmp_path / "autograder"
    for name in ("setup.sh", "run_autograder"):
        assert os.access(folder / name, os.X_OK)
        assert (folder / name).read_text().startswith("#!/usr/bin/env bash\n")
    command = (folder / "run_autograder").read_text().replace("\\\n", " ").splitlines()[-1]
    args = assignment.parse_args(shlex.split(command)[3:])
    assert args.points == {3: 15.0, 12: 10.0}
    assert str(args.results) == "/autograder/results/results.json"
    names = {path.name for path in (folder / "dpo").rglob("*")}
    assert {"requirements.txt", "ppo.py", "child.py", "test_rlhf.py"} <= names


def test_the_workflow_of_github_classroom_runs_each_exercise():
    text = copies.workflow([EXERCISES[3], EXERCISES[8]])
    for number in (3, 8):
        assert f"- id: exercise-{number}\n" in text
        assert f"command: pytest --exercise {number}\n" in text
        assert f'EXERCISE-{number}_RESULTS: "${{{{steps.exercise-{number}.outputs.' in text
    assert text.rstrip().endswith("runners: exercise-3,exercise-8")


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
    assert replaced == {"train_dpo.objective", "Reviews.preferences"}


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
    for plan, column, minutes in (("one week", 5, 230), ("two weeks", 6, 320),
                                  ("three weeks", 7, 490)):
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
    titles = re.findall(r"^### (\d+)\. ", GUIDE, re.M)
    assert titles == [str(n) for n in range(1, 11)]
    thresholds = GUIDE[GUIDE.index("### Thresholds"):GUIDE.index("### 1. ")]
    assert re.findall(r"^\| (\d+) \|", thresholds, re.M) == titles
    pages = set(re.findall(r"`(docs/\w+\.md)`", GUIDE))
    assert len(pages) >= 8 and all((ROOT / page).exists() for page in pages)


def test_thresholds_are_met_by_the_runs_that_are_documented():
    """Those of the default run with default beta in docs/measuring.md. What the guide calls
    measured is the lowest of its own runs, which is no higher than these."""
    page = (ROOT / "docs/measuring.md").read_text()
    row = r"^\| `--seed \d`[^|]* \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \|$"
    runs = re.findall(row, page, re.M)[:3]
    runs = [(float(reward), 100 * float(form), float(win)) for reward, win, form in runs]
    row, = rows_with("the default run")
    limits, measured = ([float(number) for number in re.findall(r"\d+(?:\.\d+)?", cell)]
                        for cell in row[1:3])
    assert len(runs) == 3
    for limit, lowest, *of_runs in zip(limits, measured, *runs, strict=True):
        assert limit <= lowest <= min(of_runs) + 1e-9


# ------------------------------------------------------------------------------------------------
# Bad input, and what the commands print
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main, argv, words", [
    (assignment.main, [], "one of the arguments"),
    (assignment.main, ["--out", "{here}"], "already exists"),
    (assignment.main, ["--out", "{here}/x", "--exercises", "1,99"], "--exercises 1,99: expected"),
    (assignment.main, ["--out", str(ROOT / "tests" / "class")], "inside of this repository"),
    (assignment.main, ["--list", "--points", "3"], "--points 3: expected the number"),
    (assignment.main, ["--grade-all", "{here}"], "has no folders; each submission is one"),
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
