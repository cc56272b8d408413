"""What students and Gradescope are given: copies of this repository with some functions unwritten.

    make_copy(Path("../class"), [EXERCISES[3]])                 # assignment.py --out
    make_gradescope(Path("../autograder"), [EXERCISES[3]], {3: 10.0})                # --gradescope

A student's copy has only what its exercises need, and nothing from which a solution could be taken:
no wrong answers, and no experiments but those that have an exercise.
"""

import ast
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from classroom import probes, sandbox
from classroom.exercises import (
    CORE,
    EXERCISES,
    HIDDEN,
    ROOT,
    body_lines,
    claims,
    functions,
    is_unwritten,
    message,
    path_of,
    relative_path,
    sentence,
    split_target,
    without_bodies,
)
from classroom.rules import our_text
from classroom.wrong_answers import results_of_mutants
from runtime.errors import UserError

SHEET = "EXERCISES.md"


# ------------------------------------------------------------------------------------------------
# Our own source
# ------------------------------------------------------------------------------------------------


def by_module(exercises):
    """{module: {function: exercise}} of some exercises. Raises UserError if a function that an
    exercise names no longer exists, has no docstring, or is itself unwritten."""
    chosen = {}
    for exercise in exercises:
        for target in exercise.functions:
            module, name = split_target(target)
            chosen.setdefault(module, {})[name] = exercise
    for module, names in chosen.items():
        found = functions(our_text(module)) if path_of(module).exists() else {}
        for name, exercise in names.items():
            if name not in found or ast.get_docstring(found[name]) is None:
                raise UserError(f"{module}.{name}, which classroom/exercises.py names for exercise "
                                f"{exercise.number}, no longer exists or has no docstring")
            if is_unwritten(found[name]):
                raise UserError(f"{module}.{name} is not written here: this is a student's copy; "
                                "only the whole repository can make copies and grade them")
    return chosen


# ------------------------------------------------------------------------------------------------
# A student's copy
# ------------------------------------------------------------------------------------------------


def make_copy(folder, exercises):
    """Write the student's copy to a folder that is new or empty. Raises UserError."""
    chosen = by_module(exercises)
    with new_folder(folder) as copy:
        exercises = [without_hidden(exercise) for exercise in exercises]
        copy_with_mistakes(copy, exercises)
        for name in ("README.md", "LICENSE", "requirements.txt", ".gitignore"):
            shutil.copy(ROOT / name, copy)
        for name in ("docs", "assets"):
            shutil.copytree(ROOT / name, copy / name)
        for module, names in chosen.items():
            messages = {name: message(exercise) for name, exercise in names.items()}
            write_text(copy / relative_path(module), without_bodies(our_text(module), messages))
        for page in [copy / "README.md", *(copy / "docs").glob("*.md")]:
            write_text(page, without_answers(page.read_text(encoding="utf-8"), chosen))
        exercises_py = copy / "classroom" / "exercises.py"
        write_text(exercises_py, without_hidden_names(exercises_py.read_text(encoding="utf-8")))
        write_text(copy / SHEET, sheet(exercises))
        write_text(copy / ".github" / "workflows" / "classroom.yml", workflow(exercises))


@contextmanager
def new_folder(folder):
    """A context manager that gives a folder to write to. It gets its name when it is complete,
    because until then it may have our solutions. Raises UserError if the name is taken."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already exists; choose a new or empty folder")
    if ROOT in folder.resolve().parents:
        raise UserError(f"{folder}: inside of this repository; choose a folder elsewhere")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        copy = Path(scratch) / "copy"
        copy.mkdir()
        yield copy
        os.replace(copy, folder)


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def copy_with_mistakes(folder, exercises):
    """Copy what some exercises need, and what their wrong answers return, to an empty folder."""
    sandbox.copy_sources(folder, exercises)
    targets = {target for exercise in exercises for target in exercise.functions}
    results = {target: results for target, results in results_of_mutants().items()
               if target in targets}
    write_text(folder / probes.FILE.relative_to(ROOT), json.dumps(results))


def is_hidden(test):
    return claims()[test][0] == HIDDEN


def without_hidden(exercise):
    return exercise._replace(tests=[test for test in exercise.tests if not is_hidden(test)])


def without_hidden_names(text):
    """The text of exercises.py without the names of hidden tests."""
    for test, (file, _) in claims().items():
        if file == HIDDEN:
            text = re.sub(rf'"{test}",?\s*', "", text)
    return text


def without_answers(markdown, chosen):
    """Remove the chosen functions from the Python code of a page: the bodies where a page defines
    them, and the code of a block that mostly consists of lines of a body."""
    bodies = {}                             # {function: (lines of its body, statement instead)}
    for module, names in chosen.items():
        source = our_text(module)
        for name, exercise in names.items():
            first, end = body_lines(source, functions(source)[name])
            bodies[name] = ({code_of(line) for line in source.splitlines()[first:end]} - {""},
                            f'raise NotImplementedError("{message(exercise)}")')

    def emptied(block):
        opening, code, closing = block.groups()
        try:
            defined = functions(code).keys() & bodies.keys()
        except SyntaxError:                 # an excerpt that is not complete
            defined = set()
        if defined:
            messages = {name: message(by_name[name]) for name in defined}
            return opening + without_bodies(code, messages) + closing
        lines = [code_of(line) for line in code.splitlines() if code_of(line)]
        for body, instead in bodies.values():
            n_shown = sum(line in body for line in lines)
            if n_shown >= 2 and n_shown >= len(lines) / 2:
                return f"{opening}{instead}\n{closing}"
        return block.group()
    by_name = {name: exercise for names in chosen.values() for name, exercise in names.items()}
    return re.sub(r"(^```python\n)(.*?)(^```)", emptied, markdown, flags=re.S | re.M)


def code_of(line):
    """A line of code without its indentation and its comment."""
    return re.sub(r"\s*#.*", "", line).strip()


def sheet(exercises):
    """The student's sheet, as markdown."""
    first = exercises[0].number
    lines = [
        "# Exercises", "",
        "Write the functions below from their docstrings; each raises NotImplementedError until "
        "you do. Define helpers inside the function: only the function itself is graded, with the "
        "imports at the top of its file.", "",
        "```bash", "pip install -r requirements.txt",
        f"pytest --exercise {first}       # what is still wrong, in words",
        f"pytest -v --exercise {first}    # and where in the code",
        "pytest                    # everything; tests that need an unwritten function are skipped",
        "```", "",
        "An exercise is finished when all its claims hold. Half of its points are for the claims "
        "with an asterisk, the other half for the others. The claims are tests. You may read them; "
        "they say how each expected number is derived. Editing them does not change your grade. "
        "If the grader would refuse something that you have written, `pytest --exercise` says so. "
        "README.md and docs/ describe the whole repository; this copy has only what the exercises "
        "need."]
    for exercise in exercises:
        lines += section(exercise, exercises)
    return "\n".join(lines) + "\n"


def section(exercise, exercises):
    """The lines of one exercise on a sheet with these exercises."""
    written = []
    for target in exercise.functions:
        module, name = split_target(target)
        written.append(f"`{name}` in `{module}.py`")
    lines = ["", f"## {exercise.number}. {exercise.title[0].upper()}{exercise.title[1:]}", "",
             f"    {exercise.equation}", "",
             f"Write {', '.join(written)}.  ",
             f"Before you start: {exercise.before}{needed(exercise, exercises)}.", ""]
    for test in exercise.tests:
        file, _ = claims()[test]
        lines.append(f"- {sentence(test)}{' (*)' if test in CORE else ''} (`{file}`)")
    return lines


def needed(exercise, exercises):
    """The exercises of this sheet that come before an exercise, in words."""
    earlier = [str(other.number) for other in exercises if other.number in exercise.needs]
    if not earlier:
        return ""
    return f"; exercise{'s' if len(earlier) > 1 else ''} {', '.join(earlier)}"


# ------------------------------------------------------------------------------------------------
# Gradescope and GitHub Classroom
# ------------------------------------------------------------------------------------------------

SETUP_SH = """\
#!/usr/bin/env bash
set -e
apt-get update
apt-get install -y python3-pip python3-venv
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install -r /autograder/source/dpo/requirements.txt
"""
RUN_AUTOGRADER = """\
#!/usr/bin/env bash
cd /autograder/source/dpo
/autograder/venv/bin/python -m classroom.assignment --grade /autograder/submission \\
    --exercises {exercises} --points {points} --results /autograder/results/results.json
"""
WORKFLOW = """\
name: Autograding Tests
on: [push, repository_dispatch]
permissions:
  checks: write
  actions: read
  contents: read
jobs:
  run-autograding-tests:
    runs-on: ubuntu-latest
    if: github.actor != 'github-classroom[bot]'
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.13"
      - run: pip install -r requirements.txt
{steps}
      - uses: classroom-resources/autograding-grading-reporter@v1
        env:
{results}
        with:
          runners: {runners}
"""
STEP = """\
      - id: {id}
        uses: classroom-resources/autograding-command-grader@v1
        with:
          test-name: "{title}"
          command: pytest --exercise {number}
          timeout: 10
          max-score: 1"""
RESULT = '          {variable}: "${{{{steps.{id}.outputs.result}}}}"'


def make_gradescope(folder, exercises, points):
    """Write a folder that can be zipped and uploaded to Gradescope as an autograder."""
    by_module(exercises)
    numbers = ",".join(str(exercise.number) for exercise in exercises)
    each = ",".join(f"{exercise.number}={points[exercise.number]:g}" for exercise in exercises)
    with new_folder(folder) as copy:
        sandbox.copy_sources(copy / "dpo", EXERCISES.values(),
                             ["assignment.py", "child.py", "copies.py", "right_answers.py",
                              "sandbox.py", "wrong_answers.py"])
        shutil.copy(ROOT / "requirements.txt", copy / "dpo")
        write_text(copy / "setup.sh", SETUP_SH)
        write_text(copy / "run_autograder", RUN_AUTOGRADER.format(exercises=numbers, points=each))
        for name in ("setup.sh", "run_autograder"):
            (copy / name).chmod(0o755)


def workflow(exercises):
    """The workflow file for GitHub Classroom, which runs `pytest --exercise` for each exercise."""
    ids = [f"exercise-{exercise.number}" for exercise in exercises]
    return WORKFLOW.format(
        steps="\n".join(STEP.format(id=name, title=message(exercise), number=exercise.number)
                        for name, exercise in zip(ids, exercises)),
        results="\n".join(RESULT.format(variable=f"{name.upper()}_RESULTS", id=name)
                          for name in ids),
        runners=",".join(ids))
