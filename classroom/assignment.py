"""Make a student's copy of this repository, and grade submissions.

    python -m classroom.assignment --list                           # the exercises
    python -m classroom.assignment --out DIR [--exercises 1,3,5]    # a copy without the solutions
    python -m classroom.assignment --grade DIR [--exercises 1,3,5]  # grade one, write results.json
    python -m classroom.assignment --grade-all DIR                  # grade each folder in DIR
    python -m classroom.assignment --gradescope DIR                 # an autograder, ready to zip
    python -m classroom.assignment --check                          # check the exercises themselves

A copy has the code and the tests of its exercises, the README and docs/, a sheet (EXERCISES.md) and
a workflow for GitHub Classroom. The bodies of the chosen functions are replaced by `raise
NotImplementedError`, both in the code and where a page shows them. In the copy, `pytest --exercise
3` explains in words what is still wrong.

The grader reads only the chosen functions of a submission (rules.py). It puts them into a clean
copy in which every other function is ours, so that no exercise depends on another and edited tests
have no effect. The tests of each exercise run in a separate process (sandbox.py), which has no
network, little memory, a time limit, and no access to our own version of the exercise. Each test is
a claim. results.json has Gradescope's format.

Left out on purpose: style, plagiarism, and protection against determined attacks; GUIDE.md says how
far the protection goes.
"""

import csv
import hashlib
import math
import os
import re
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from classroom import right_answers, sandbox
from classroom.copies import (
    SHEET,
    by_module,
    copy_with_mistakes,
    is_hidden,
    make_copy,
    make_gradescope,
    sheet,
    without_hidden,
    write_text,
)
from classroom.exercises import (
    CORE,
    EXERCISES,
    ROOT,
    SLOW,
    claims,
    message,
    name_of_test,
    relative_path,
    sentence,
    split_target,
    with_functions,
    without_bodies,
)
from classroom.rules import our_text, submitted
from runtime.cli import Parser, command, number_type, only_one_process
from runtime.errors import UserError
from runtime.files import write_json

POINTS = 10.0                       # per exercise, unless --points says otherwise


# ------------------------------------------------------------------------------------------------
# --grade
# ------------------------------------------------------------------------------------------------


def clean_copy(folder, exercise, texts):
    """Write the modules and the exercise's tests to an empty folder. Of the exercise's functions,
    those in texts ({"module.function": text}) are as given there and the others are unwritten; our
    own versions are nowhere in the folder. Returns the node ids of the tests."""
    known = claims()
    missing = [test for test in exercise.tests if test not in known]
    if missing:
        raise UserError(f"{missing[0]}, which classroom/exercises.py names for exercise "
                        f"{exercise.number}, no longer exists")
    copy_with_mistakes(folder, [exercise])
    for module, names in by_module([exercise]).items():
        text = without_bodies(our_text(module), {name: message(exercise) for name in names})
        given = {name: texts[f"{module}.{name}"] for name in names if f"{module}.{name}" in texts}
        write_text(folder / relative_path(module), with_functions(text, given))
    return [f"tests/{known[test][0]}::{test}" for test in exercise.tests]


def try_out(attempts, seconds, jobs=1, seed=None, progress=None):
    """Run the tests of exercises on functions, [(exercise, {"module.function": text})]. Returns an
    Outcome for each."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = []
        for k, (exercise, texts) in enumerate(attempts):
            copy = Path(scratch) / str(k)
            tests = clean_copy(copy, exercise, texts)
            runs.append(sandbox.TestRun(copy, tests, seconds, guarded=True,
                                        claim_seconds=seconds / 4, seed=seed))
        return sandbox.run_all(runs, jobs, progress=progress)


def grade(folder, exercises, points, seconds, jobs, seed=None, progress=None):
    """The content of results.json for a submission. points: {number of an exercise: its points}.
    seed: what the random examples of the tests are drawn from; None: always the same ones."""
    by_module(exercises)
    read = [read_functions(folder, exercise) for exercise in exercises]
    attempts = [(exercise, texts) for exercise, (texts, _) in zip(exercises, read) if texts]
    outcomes = iter(try_out(attempts, seconds, jobs, seed, progress) if attempts else [])
    graded = []
    for exercise, (texts, problems) in zip(exercises, read):
        outcome = next(outcomes) if texts else sandbox.Outcome({}, "")
        graded.append(entries_of(exercise, points[exercise.number], outcome, problems))
    entries = [claim for of_exercise in graded for claim in of_exercise]
    return {"score": total_score(entries), "tests": entries,
            "output": points_table(exercises, graded, points)}


def read_functions(folder, exercise):
    """({"module.function": text}, [what is wrong with the others]) of a submission's functions."""
    texts, problems = {}, []
    for target in exercise.functions:
        try:
            texts[target] = submitted(folder, *split_target(target))
        except UserError as error:
            if str(error) not in problems:
                problems.append(str(error))
    return texts, problems


def entries_of(exercise, points, outcome, problems):
    """The claims of one exercise, in the form of results.json."""
    shares = shares_of(exercise, points)
    return [entry(exercise, test, shares[test], outcome, problems) for test in exercise.tests]


def shares_of(exercise, points):
    """{claim: its points}: half for the CORE claims together, half for the others. They are rounded
    to two places so that they add up."""
    core = [test for test in exercise.tests if test in CORE]
    n_others = len(exercise.tests) - len(core)
    shares, so_far = {}, 0.0
    for test in exercise.tests:
        share = points / len(exercise.tests)
        if core and n_others:
            share = points / 2 / (len(core) if test in core else n_others)
        shares[test] = round(round(so_far + share, 2) - round(so_far, 2), 2)
        so_far += share
    return shares


def total_score(entries):
    return round(math.fsum(claim["score"] for claim in entries), 2)


def entry(exercise, test, points, outcome, problems):
    """One claim of one exercise, in the form of results.json. problems: what was wrong with the
    submitted functions before any test ran."""
    tests_run = [name_of_test(node) for node in outcome.claims]
    results = [result for node, result in outcome.claims.items() if name_of_test(node) == test]
    failures = [details for node, (result, details) in outcome.claims.items()
                if result != "passed" and name_of_test(node) in (test, node)]  # or of a whole file
    # If the process ended early, it ended during the last test, whatever that test reported.
    interrupted = outcome.end != "" and tests_run[-1:] == [test]
    holds = bool(results) and not failures and not interrupted
    output = [claims()[test][1]]
    if not holds:
        output += problems
        if failures:
            output.append(failures[0] or "the test did not pass")
        elif outcome.end:
            output.append(outcome.end)
    return {"name": f"{exercise.number}. {exercise.title}: {sentence(test)}",
            "number": str(exercise.number),
            "score": points if holds else 0.0,
            "max_score": points,
            "status": "passed" if holds else "failed",
            "output": without_controls("\n".join(output)),
            "output_format": "text",
            "visibility": "hidden" if is_hidden(test) else "visible"}


def without_controls(text):
    """Replace characters that could control a terminal, and lone surrogates, which cannot be
    encoded."""
    text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    return text.encode("utf-8", "replace").decode("utf-8")


def points_table(exercises, graded, points):
    """One line per exercise, and the total. graded: the entries of each exercise."""
    lines = [f"{'exercise':54}{'claims':>10}{'points':>16}"]
    for exercise, entries in zip(exercises, graded):
        held = sum(claim["status"] == "passed" for claim in entries)
        lines.append(f"{exercise.number:3}  {exercise.title:49}{held:4} of {len(entries):2}"
                     f"{total_score(entries):8.2f} of {points[exercise.number]:g}")
    everything = [claim for entries in graded for claim in entries]
    most = sum(points[exercise.number] for exercise in exercises)
    lines.append(f"{'total':64}{total_score(everything):8.2f} of {most:g}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# --grade-all
# ------------------------------------------------------------------------------------------------


def grade_all(folder, results, exercises, points, seconds, jobs, seed):
    """Grade every folder in a folder. Writes <its name>.json for each to the folder `results`, and
    a row for each to grades.csv there. seed: each submission gets one of its own, made from this
    and its name."""
    submissions = sorted(path for path in folder.iterdir()
                         if path.is_dir() and not path.name.startswith("."))
    if not submissions:
        raise UserError(f"--grade-all {folder}: has no folders; each submission is one")
    results.mkdir(parents=True, exist_ok=True)
    rows = []
    for path in tqdm(submissions, "grading"):
        graded = grade(path, exercises, points, seconds, jobs, seed_of(seed, path.name))
        write_json(results / f"{path.name}.json", graded)
        row = {"submission": path.name, "total": graded["score"]}
        for exercise in exercises:
            row[f"exercise {exercise.number}"] = total_score(
                claim for claim in graded["tests"] if claim["number"] == str(exercise.number))
        rows.append(row)
    with open(results / "grades.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def seed_of(seed, name):
    """The seed of one submission, or None without a seed."""
    if seed is None:
        return None
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")


# ------------------------------------------------------------------------------------------------
# --check: our own solution, and an empty one
# ------------------------------------------------------------------------------------------------


def suite_of_copy(folder, tests=("tests",)):
    """Make a copy in which no exercise is written, and run its tests there."""
    make_copy(folder, list(EXERCISES.values()))
    run = sandbox.TestRun(folder, list(tests), 900, skip=SLOW)
    outcome, = sandbox.run_all([run])
    return outcome


def wrong_in_copy(outcome):
    """The failures in a student's copy that are not claims of any exercise."""
    own = {test for exercise in EXERCISES.values() for test in exercise.tests}
    wrong = [f"fails in a copy, but belongs to no exercise: {node}\n{details}"
             for node, (result, details) in outcome.claims.items()
             if result in ("failed", "error") and name_of_test(node) not in own]
    if outcome.end:
        wrong.append(outcome.end)
    return wrong


def faults_of(exercises, seconds, jobs):
    """What is wrong with the exercises: claims that a right solution (ours, or one of
    right_answers.py) does not meet, claims that an empty solution meets, and tests of a copy that
    fail although they belong to no exercise."""
    with tempfile.TemporaryDirectory() as scratch:
        wrong = wrong_in_copy(suite_of_copy(Path(scratch) / "copy"))
    attempts = [(exercise, {}) for exercise in exercises]
    for exercise in exercises:
        ours = {target: submitted(ROOT, *split_target(target)) for target in exercise.functions}
        attempts += [(exercise, ours | texts)
                     for texts in right_answers.solutions_of(exercise) or [ours]]
    outcomes = try_out(attempts, seconds, jobs, progress="solutions")
    for (exercise, texts), outcome in zip(attempts, outcomes):
        for test in exercise.tests:
            claim = entry(exercise, test, 1.0, outcome, [])
            if texts and claim["status"] != "passed":
                wrong.append(f"a right solution does not meet: {claim['name']}\n"
                             f"{claim['output']}\n" + "\n".join(texts.values()))
            elif not texts and claim["status"] == "passed":
                wrong.append(f"an empty solution meets: {claim['name']}")
    return wrong


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def chosen_exercises(text):
    """The exercises of a text such as "1,3,5", in the order of their numbers. Raises UserError."""
    numbers = set()
    if re.fullmatch(r"\d+(,\d+)*", text):
        numbers = {int(digits) for digits in text.split(",")}
    if not numbers or numbers - set(EXERCISES):
        raise UserError(f"--exercises {text}: expected numbers from 1 to {len(EXERCISES)}, "
                        "separated by commas")
    return [EXERCISES[n] for n in sorted(numbers)]


def points_of(text, exercises):
    """{number of an exercise: its points}, of a text such as "3=15,4=10". Raises UserError."""
    points = {exercise.number: POINTS for exercise in exercises}
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"(\d+)=(\d+(?:\.\d+)?)", part)
        if not found or int(found[1]) not in points:
            raise UserError(f"--points {text}: expected the number of a chosen exercise and its "
                            f"points, as in 3=15, not {part!r}")
        points[int(found[1])] = float(found[2])
    return points


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="print the exercises and their claims")
    action.add_argument("--out", type=Path, metavar="DIR", help="make a student's copy in DIR")
    action.add_argument("--grade", type=Path, metavar="DIR", help="grade the submission in DIR")
    action.add_argument("--grade-all", type=Path, metavar="DIR",
                        help="grade each folder in DIR as a submission")
    action.add_argument("--gradescope", type=Path, metavar="DIR",
                        help="make an autograder for Gradescope in DIR")
    action.add_argument("--check", action="store_true",
                        help="check that right solutions meet every claim and an empty one none")
    add("--exercises", default=",".join(map(str, EXERCISES)), metavar="1,3,5",
        help="only these exercises (default: all); for --grade, those that were set")
    add("--points", default="", metavar="3=15,4=10",
        help=f"points of an exercise (default {POINTS:g} each)")
    add("--results", type=Path, metavar="PATH",
        help="where to write: for --grade a file (default results.json); for --grade-all a folder "
             "(default results), with NAME.json for each submission and grades.csv for all")
    add("--seed", type=number_type(int, 0),
        help="draw the random examples of the tests from this seed and the folder's name "
             "(default: the same examples for all)")
    add("--seconds", type=number_type(float, 1), default=120.0,
        help="time limit per exercise; a single claim has a quarter of it (default 120)")
    add("--jobs", type=number_type(int, 1), default=os.cpu_count(),
        help="exercises to grade at the same time (default: one per processor)")
    args = parser.parse_args(argv)
    args.exercises = chosen_exercises(args.exercises)
    args.points = points_of(args.points, args.exercises)
    return args


def grade_one(args):
    """--grade"""
    results = args.results or Path("results.json")
    if not results.parent.is_dir():
        raise UserError(f"--results {results}: there is no such folder to write to")
    graded = grade(args.grade, args.exercises, args.points, args.seconds, args.jobs,
                   seed_of(args.seed, args.grade.resolve().name), "grading")
    print(graded["output"])
    write_json(results, graded)
    print(f"wrote {results}")


def grade_each(args):
    """--grade-all"""
    results = args.results or Path("results")
    rows = grade_all(args.grade_all, results, args.exercises, args.points, args.seconds, args.jobs,
                     args.seed)
    for row in rows:
        print(f"{row['submission']:40}{row['total']:8.2f} of {sum(args.points.values()):g}")
    print(f"wrote {results / 'grades.csv'} and a file for each of {len(rows)} submissions")


def check_all(args):
    """--check. Returns the exit code."""
    wrong = faults_of(args.exercises, args.seconds, args.jobs)
    if wrong:
        print("\n".join(wrong))
        return 1
    n_claims = sum(len(exercise.tests) for exercise in args.exercises)
    print(f"{len(args.exercises)} exercises, {n_claims} claims: right solutions meet all of them, "
          "an empty one none, and no other test fails in a copy")
    return 0


@command
def main(argv=None):
    """Returns the exit code: 1 if --check finds something wrong."""
    args = parse_args(argv)
    only_one_process("making or grading an assignment")
    numbers = ", ".join(str(exercise.number) for exercise in args.exercises)
    for folder in (args.grade, args.grade_all):
        if folder and not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
    if (args.grade or args.grade_all or args.check) and not hasattr(os, "fork"):
        raise UserError("grading needs Linux or macOS; on Windows, use WSL or Gradescope")
    if args.list:
        print(sheet([without_hidden(exercise) for exercise in args.exercises]), end="")
    elif args.out:
        make_copy(args.out, args.exercises)
        print(f"wrote {args.out} with exercises {numbers}; give students this folder and point "
              f"them to {SHEET}")
    elif args.gradescope:
        make_gradescope(args.gradescope, args.exercises, args.points)
        print(f"wrote {args.gradescope} for exercises {numbers}; zip what is in it and upload it")
    elif args.grade:
        grade_one(args)
    elif args.grade_all:
        grade_each(args)
    else:
        return check_all(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
