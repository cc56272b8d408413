"""For a class: a student's copy of this repository, and the grader.

    python -m classroom.assignment --list                           # the exercises
    python -m classroom.assignment --out DIR [--exercises 1,3,5]    # a copy without the answers
    python -m classroom.assignment --grade DIR [--exercises 1,3,5]  # points; writes results.json
    python -m classroom.assignment --check                          # is every claim true, and needed?

A copy has the bodies of the chosen functions replaced by `raise NotImplementedError`, in the five
files and in the README's code, and a sheet, EXERCISES.md; the guide for teachers and the tests of
these tools stay here. In the copy, `pytest --exercise 3` says in words what is still wrong.

Of a submission only the chosen functions are read, from the syntax trees of its files. They go into
a clean copy in which every other function is ours, so that no exercise suffers from another and
edited tests change nothing; the tests run in a process of their own (sandbox.py), which has no
network, little memory, a time limit, and nowhere our own version of the exercise. A claim is a
test; an exercise's points are shared among its claims. results.json is what Gradescope reads.

Left out on purpose: style, plagiarism, and protection against real malice; classroom/GUIDE.md
says how far it goes.
"""

import ast
import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from classroom import sandbox
from classroom.exercises import (EXERCISES, ROOT, SLOW, body_lines, claims, functions,
                                 is_unwritten, message, path_of, sentence, split_target,
                                 with_functions, without_bodies)
from runtime.cli import Parser, command, number_type
from runtime.errors import UserError

POINTS = 10.0                       # of each exercise
SHEET = "EXERCISES.md"
FOR_TEACHERS = "GUIDE.md"
COPIED = ("assets", "classroom", "docs", "experiments", "runtime", "tasks", "tests")
# Not in a copy: the guide, the tests of these tools, and those of the benchmark and of torchrun:
# they run the loop in other processes, where an unwritten function can't be told from a broken one.
LEFT_OUT = (FOR_TEACHERS, "test_classroom.py", "test_benchmark.py", "test_processes.py")
LARGEST_SOURCE = 1 << 20


# ------------------------------------------------------------------------------------------------
# Our own source
# ------------------------------------------------------------------------------------------------


def our_source(module):
    return path_of(module).read_text(encoding="utf-8")


def by_module(exercises):
    """{module: {function: exercise}} of some exercises. Raises UserError where a function that an
    exercise names is no longer there, or has no docstring to write it again from."""
    chosen = {}
    for exercise in exercises:
        for target in exercise.functions:
            module, name = split_target(target)
            chosen.setdefault(module, {})[name] = exercise
    for module, names in chosen.items():
        found = functions(our_source(module)) if path_of(module).exists() else {}
        for name, exercise in names.items():
            if name not in found or ast.get_docstring(found[name]) is None:
                raise UserError(f"{module}.{name}, of exercise {exercise.number}, is no longer "
                                "there, or has no docstring: classroom/exercises.py names it")
            if is_unwritten(found[name]):
                raise UserError(f"{module}.{name} is not written here: this is a student's copy, "
                                "and only a whole repository can make or grade one")
    return chosen


# ------------------------------------------------------------------------------------------------
# --out: a student's copy
# ------------------------------------------------------------------------------------------------


def make_copy(folder, exercises):
    """Write the student's copy to a folder that is empty or not there. Raises UserError."""
    chosen = by_module(exercises)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder}: is there already; name a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns("__pycache__", ".*", "out", *LEFT_OUT)
    for path in sorted(ROOT.iterdir()):
        if path.is_dir() and path.name in COPIED:
            shutil.copytree(path, folder / path.name, ignore=ignored)
        elif path.suffix in (".py", ".md", ".txt") or path.name in ("LICENSE", ".gitignore"):
            shutil.copy(path, folder)
    for module, names in chosen.items():
        text = without_bodies(our_source(module), {n: message(e) for n, e in names.items()})
        (folder / path_of(module).relative_to(ROOT)).write_text(text, encoding="utf-8")
    for page in [folder / "README.md", *(folder / "docs").glob("*.md")]:
        text = without_answers(page.read_text(encoding="utf-8"), chosen)
        page.write_text(text, encoding="utf-8")
    (folder / SHEET).write_text(sheet(exercises), encoding="utf-8")
    (folder / "classroom" / FOR_TEACHERS).write_text(
        "The guide for teachers is not part of a student's copy.\n", encoding="utf-8")


def without_answers(markdown, chosen):
    """A page shows some functions, whole or a few lines of them; in a copy it shows the message
    that stands in their place."""
    removed = {}                            # {line of a body: what stands there instead}
    for module, names in chosen.items():
        source = our_source(module)
        for name, exercise in names.items():
            first, end = body_lines(source, functions(source)[name])
            stands = f'raise NotImplementedError("{message(exercise)}")'
            removed |= {line.strip(): stands for line in source.splitlines()[first:end] if line}

    def emptied(block):
        lines = []
        for line in block[2].splitlines():
            indent = line[:len(line) - len(line.lstrip())]
            lines.append(indent + removed.get(line.strip(), line.strip()))
        kept = [line for n, line in enumerate(lines)
                if line.strip() not in removed.values() or line not in lines[:n]]
        return block[1] + "\n".join(kept) + "\n" + block[3]
    return re.sub(r"(^```python\n)(.*?)(^```)", emptied, markdown, flags=re.S | re.M)


def sheet(exercises):
    """The student's sheet, as markdown."""
    known, lines = claims(), [
        "# Exercises", "",
        "Write the functions below again, from their docstrings; each raises NotImplementedError "
        "until you do. Helpers go inside the function: only the function itself is graded. What it "
        "needs is imported at the top of its file already.", "",
        "```bash", "pip install -r requirements.txt",
        f"pytest --exercise {exercises[0].number}       # what is still wrong, in words",
        f"pytest -v --exercise {exercises[0].number}    # and where in the code",
        "pytest                    # everything; what waits for an exercise is skipped", "```", "",
        "An exercise is done when all its claims hold, and gives a share of its points for each "
        "that does. The claims are tests, which may be read and say how a number comes about; "
        "to edit them changes nothing in the grade."]
    for exercise in exercises:
        lines += ["", f"## {exercise.number}. {exercise.title[0].upper()}{exercise.title[1:]}", "",
                  f"    {exercise.equation}", "",
                  "Write " + ", ".join(f"`{target.split('.', 1)[1]}` in `{target.split('.')[0]}.py`"
                                       for target in exercise.functions) + ".  ",
                  f"Before: {exercise.before}" + needed(exercise, exercises) + ".", ""]
        lines += [f"- {sentence(test)} (`{known[test][0]}`)" for test in exercise.tests]
    return "\n".join(lines) + "\n"


def needed(exercise, exercises):
    """Of the exercises that come first, those that this copy has."""
    first = [str(e.number) for e in exercises if e.number in exercise.needs]
    return f"; exercise{'s' * (len(first) > 1)} {', '.join(first)}" if first else ""


# ------------------------------------------------------------------------------------------------
# --grade: what is taken from a submission
# ------------------------------------------------------------------------------------------------


def read_submission(path):
    """The text of a submitted file. Raises UserError. A link is not followed: it could lead to our
    own file; nor is a pipe read, which would never end."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(file, "rb") as opened:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_SOURCE:
                raise UserError(f"{path.name} is not a file of at most a megabyte")
            return opened.read().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path.name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} is not UTF-8 text") from error


def submitted(folder, module, name):
    """The text of one submitted function. Raises UserError with what is wrong with it."""
    text = read_submission(folder / path_of(module).relative_to(ROOT))
    try:
        node = functions(text).get(name)
        if node is None:
            raise UserError(f"there is no function {name} in {module}.py")
        if is_unwritten(node):
            raise UserError(f"{name} is not written yet")
        for complaint in complaints(node):
            raise UserError(f"{name}, line {complaint}")
        return ast.unparse(node)
    except SyntaxError as error:
        raise UserError(f"{module}.py, line {error.lineno}: not Python: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{module}.py cannot be parsed") from error


# What a mathematical function has no use for, and a forged grade does. The tests run in the same
# process as the submission, so that one that reached the interpreter could rewrite them.
MODULES = {"math", "torch", "torch.nn", "torch.nn.functional", "torch.nn.utils", "numpy",
           "itertools", "functools", "collections"}
NAMES = set("exec eval compile open input breakpoint exit quit getattr setattr delattr globals "
            "locals vars dir memoryview help copyright credits license sys os".split())
ATTRIBUTES = set(
    "sys os io builtins importlib inspect ctypes gc subprocess socket threading multiprocessing "
    "signal pathlib pickle shutil tempfile traceback warnings testing hub load save jit fx ops "
    "classes package serialization distributed library export overrides from_file "
    "fromfile memmap tofile ctypeslib f2py lib modules gi_frame gi_code cr_frame tb_frame f_back "
    "f_globals f_locals f_builtins".split())


def complaints(node):
    """Lines and words of what a solution may not have; see MODULES above."""
    for part in ast.walk(node):
        at = getattr(part, "lineno", node.lineno)
        if isinstance(part, ast.Import) and {a.name for a in part.names} - MODULES:
            yield f"{at}: imports {', '.join(a.name for a in part.names)}; no solution needs it"
        elif isinstance(part, ast.ImportFrom) and (
                part.module not in MODULES or part.level
                or {a.name for a in part.names} & (ATTRIBUTES | {"*"})
                or any(a.name.startswith("_") for a in part.names)):
            yield f"{at}: imports from {part.module}; no solution needs it"
        elif isinstance(part, ast.Name) and (part.id in NAMES or part.id.startswith("__")):
            yield f"{at}: uses {part.id}; no solution needs it"
        elif isinstance(part, ast.Attribute) and (
                part.attr in ATTRIBUTES or part.attr.startswith("_")):
            yield f"{at}: uses .{part.attr}; no solution needs it"
        elif isinstance(part, ast.Attribute) and part.attr not in ("grad", "data") and not (
                isinstance(part.ctx, ast.Load)):
            yield f"{at}: changes .{part.attr}; no solution needs that"
        elif isinstance(part, (ast.FunctionDef, ast.ClassDef)) and part.name.startswith("__"):
            yield f"{at}: defines {part.name}; no solution needs it"
        elif isinstance(part, ast.Global):
            yield f"{at}: has a global statement; no solution needs it"


# ------------------------------------------------------------------------------------------------
# --grade: one exercise
# ------------------------------------------------------------------------------------------------


def clean_copy(folder, exercise, texts):
    """The modules and the exercise's tests in an empty folder: of its functions those in texts
    ({"module.function": text}), the others unwritten, and our own nowhere. Returns node ids."""
    known = claims()
    missing = [test for test in exercise.tests if test not in known]
    if missing:
        raise UserError(f"{missing[0]}, of exercise {exercise.number}, is no longer there: "
                        "classroom/exercises.py names it")
    sandbox.copy_sources(folder, {known[test][0] for test in exercise.tests})
    for module, names in by_module([exercise]).items():
        text = without_bodies(our_source(module), {name: message(exercise) for name in names})
        text = with_functions(text, {name: texts[f"{module}.{name}"] for name in names
                                     if f"{module}.{name}" in texts})
        (folder / path_of(module).relative_to(ROOT)).write_text(text, encoding="utf-8")
    return [f"tests/{known[test][0]}::{test}" for test in exercise.tests]


def grade_exercise(exercise, folder, seconds):
    """A list of the entries of results.json, one a claim."""
    texts, problems = {}, []
    for target in exercise.functions:
        try:
            texts[target] = submitted(folder, *split_target(target))
        except UserError as error:
            problems.append(str(error))
    outcome = sandbox.Outcome({}, "")
    if texts:
        outcome = try_out(exercise, texts, seconds)
    return [entry(exercise, test, outcome, problems) for test in exercise.tests]


def try_out(exercise, texts, seconds):
    """The exercise's tests on these functions in a process of their own."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        tests = clean_copy(copy, exercise, texts)
        return sandbox.run(copy, tests, seconds, guarded=True, claim_seconds=seconds / 4)


def entry(exercise, test, outcome, problems):
    """One claim of one exercise in the form of results.json."""
    results = [(result, words) for node, (result, words) in outcome.claims.items()
               if re.split(r"::|\[", node)[1:2] == [test]]
    last = [re.split(r"::|\[", node)[1:2] for node in outcome.claims][-1:] == [[test]]
    wrong = [words for result, words in results if result != "passed"]
    held = bool(results) and not wrong and not (outcome.end and last)
    said = [claims()[test][1]]
    if not held:
        said += problems or []
        said += [words or "it did not pass" for words in wrong[:1]]
        said += [outcome.end] if outcome.end and not wrong else []
    points = POINTS / len(exercise.tests)
    return {"name": f"{exercise.number}. {exercise.title}: {sentence(test)}",
            "number": str(exercise.number), "score": points if held else 0.0, "max_score": points,
            "status": "passed" if held else "failed",
            "output": printable("\n".join(said)), "output_format": "text"}


def printable(text):
    """Without what a submission could do to a screen; half surrogates can't even be written."""
    text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    return text.encode("utf-8", "replace").decode("utf-8")


def grade(folder, exercises, seconds, jobs):
    """The content of results.json for a submission."""
    by_module(exercises)
    with ThreadPoolExecutor(jobs) as pool:
        graded = list(tqdm(pool.map(lambda e: grade_exercise(e, folder, seconds), exercises),
                           "grading", len(exercises)))
    tests = [test for part in graded for test in part]
    return {"score": math.fsum(test["score"] for test in tests), "tests": tests,
            "output": table(exercises, graded)}


def table(exercises, graded):
    """A line for each exercise, and the sum."""
    lines = [f"{'exercise':46}{'claims':>10}{'points':>16}"]
    for exercise, part in zip(exercises, graded):
        held = sum(test["status"] == "passed" for test in part)
        points = math.fsum(test["score"] for test in part)
        lines.append(f"{exercise.number:3}  {exercise.title:41}{held:4} of {len(part):2}"
                     f"{points:8.2f} of {POINTS:.0f}")
    total = math.fsum(test["score"] for part in graded for test in part)
    lines.append(f"{'total':56}{total:8.2f} of {POINTS * len(exercises):.0f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# --check: our own solution, and none at all
# ------------------------------------------------------------------------------------------------


def suite_of_copy(folder, files):
    """What these test files say of a copy, made here, with no exercise written."""
    make_copy(folder, list(EXERCISES.values()))
    return sandbox.run(folder, [f"tests/{file}" for file in sorted(files)], 900, skip=SLOW)


def wrong_in_copy(outcome):
    """What fails in a student's copy and is none of an exercise's claims."""
    own = {test for exercise in EXERCISES.values() for test in exercise.tests}
    wrong = [f"fails in a copy, of no exercise: {node}\n{words}"
             for node, (result, words) in outcome.claims.items()
             if result in ("failed", "error") and re.split(r"::|\[", node)[1] not in own]
    return wrong + [outcome.end] * bool(outcome.end)


def check(exercises, seconds, jobs):
    """What is wrong with the exercises: claims that our own solution does not meet, claims that are
    met when nothing is written, and tests of nothing to do with them that fail in a copy."""
    files = {file for file, _ in claims().values()} - {*LEFT_OUT}
    with tempfile.TemporaryDirectory() as scratch:
        elsewhere = wrong_in_copy(suite_of_copy(Path(scratch) / "copy", files))
    solved = grade(ROOT, exercises, seconds, jobs)
    wrong = [f"our own solution does not meet: {test['name']}\n{test['output']}"
             for test in solved["tests"] if test["status"] != "passed"]
    with ThreadPoolExecutor(jobs) as pool:
        empty = list(tqdm(pool.map(lambda e: try_out(e, {}, seconds), exercises), "unwritten",
                          len(exercises)))
    for exercise, outcome in zip(exercises, empty):
        for test in exercise.tests:
            if entry(exercise, test, outcome, [])["status"] == "passed":
                wrong.append(f"met by nothing at all: {exercise.number}. {sentence(test)}")
    return wrong + elsewhere


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def chosen_exercises(text):
    """"1,3,5" to a list of exercises, in their order."""
    if not re.fullmatch(r"\d+(,\d+)*", text) or {*map(int, text.split(","))} - {*EXERCISES}:
        raise UserError(f"--exercises {text}: expected numbers from 1 to {len(EXERCISES)} with "
                        "commas between them")
    return [EXERCISES[n] for n in sorted({*map(int, text.split(","))})]


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="print the exercises and their tests")
    what.add_argument("--out", type=Path, metavar="DIR", help="make a student's copy here")
    what.add_argument("--grade", type=Path, metavar="DIR", help="grade the submission in here")
    what.add_argument("--check", action="store_true",
                      help="our own solution must meet every claim, an empty one none")
    add("--exercises", default=",".join(map(str, EXERCISES)), metavar="1,3,5",
        help="only these (default: all); grade the ones that you set")
    add("--results", type=Path, default=Path("results.json"), metavar="FILE",
        help="where --grade writes (default results.json)")
    add("--seconds", type=number_type(float, 1), default=120.0,
        help="limit of one exercise; a single claim has a quarter of it (default 120)")
    add("--jobs", type=number_type(int, 1), default=os.cpu_count(),
        help="exercises graded at a time (default: one a processor)")
    args = parser.parse_args(argv)
    args.exercises = chosen_exercises(args.exercises)
    return args


@command
def main(argv=None):
    """Returns the exit code: 1 where --check finds something."""
    args = parse_args(argv)
    if args.list:
        print(sheet(args.exercises), end="")
    elif args.out:
        make_copy(args.out, args.exercises)
        print(f"wrote {args.out}: exercises {', '.join(str(e.number) for e in args.exercises)}; "
              f"give out the folder, {SHEET} first")
    elif args.grade:
        if not args.grade.is_dir():
            raise UserError(f"--grade {args.grade}: no such folder")
        results = grade(args.grade, args.exercises, args.seconds, args.jobs)
        args.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"{results['output']}\nwrote {args.results}")
    else:
        wrong = check(args.exercises, args.seconds, args.jobs)
        print("\n".join(wrong) or f"{len(args.exercises)} exercises, "
              f"{sum(len(e.tests) for e in args.exercises)} claims: our solution meets them all, "
              "an empty one none, and in a copy no other test fails")
        return int(bool(wrong))
    return 0


if __name__ == "__main__":
    sys.exit(main())
