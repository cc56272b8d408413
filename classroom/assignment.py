"""Make a student's copy of this repository, and grade submissions.

    python -m classroom.assignment --list                           # the exercises
    python -m classroom.assignment --out DIR [--exercises 1,3,5]    # a copy without the solutions
    python -m classroom.assignment --grade DIR [--exercises 1,3,5]  # grade, write results.json
    python -m classroom.assignment --check                          # check the exercises themselves

In a copy, the bodies of the chosen functions are replaced by `raise NotImplementedError`, both in
the five files and in the code that the README shows. The copy also has a sheet, EXERCISES.md, but
neither the guide for teachers nor the tests of these tools. In the copy, `pytest --exercise 3`
explains in words what is still wrong.

The grader reads only the chosen functions of a submission, from the syntax trees of its files. It
puts them into a clean copy in which every other function is ours, so that no exercise depends on
another and edited tests have no effect. The tests run in a separate process (sandbox.py), which has
no network, little memory, a time limit, and no access to our own version of the exercise. Each test
is a claim, and the points of an exercise are shared equally among its claims. results.json has
Gradescope's format.

Left out on purpose: style, plagiarism, and protection against determined attacks; GUIDE.md says how
far the protection goes.
"""

import ast
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
from classroom.exercises import (
    EXERCISES,
    ROOT,
    SLOW,
    body_lines,
    claims,
    functions,
    is_unwritten,
    message,
    name_of_test,
    path_of,
    sentence,
    split_target,
    with_functions,
    without_bodies,
)
from runtime.cli import Parser, command, number_type, only_one_process
from runtime.errors import UserError
from runtime.files import write_json

POINTS = 10.0                       # per exercise
SHEET = "EXERCISES.md"
FOR_TEACHERS = "GUIDE.md"
COPIED = ("assets", "classroom", "docs", "experiments", "runtime", "tasks", "tests")
# Not in a copy: the guide, the tests of these tools, and the tests of the benchmark and of several
# processes. The last two run the loop in other processes, where an unwritten function cannot be
# told from a broken one.
LEFT_OUT = (FOR_TEACHERS, "test_classroom.py", "test_course.py", "test_benchmark.py",
            "test_processes.py")
LARGEST_SOURCE = 1 << 20            # bytes


# ------------------------------------------------------------------------------------------------
# Our own source
# ------------------------------------------------------------------------------------------------


def our_source(module):
    return path_of(module).read_text(encoding="utf-8")


def by_module(exercises):
    """{module: {function: exercise}} of some exercises. Raises UserError if a function that an
    exercise names no longer exists, has no docstring, or is itself unwritten."""
    chosen = {}
    for exercise in exercises:
        for target in exercise.functions:
            module, name = split_target(target)
            chosen.setdefault(module, {})[name] = exercise
    for module, names in chosen.items():
        found = functions(our_source(module)) if path_of(module).exists() else {}
        for name, exercise in names.items():
            if name not in found or ast.get_docstring(found[name]) is None:
                raise UserError(f"{module}.{name}, which classroom/exercises.py names for exercise "
                                f"{exercise.number}, no longer exists or has no docstring")
            if is_unwritten(found[name]):
                raise UserError(f"{module}.{name} is not written here: this is a student's copy; "
                                "only the whole repository can make copies and grade them")
    return chosen


# ------------------------------------------------------------------------------------------------
# --out: a student's copy
# ------------------------------------------------------------------------------------------------


def make_copy(folder, exercises):
    """Write the student's copy to a folder that is new or empty. Raises UserError."""
    chosen = by_module(exercises)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder}: already exists; choose a new or empty folder")
    if any((ROOT / name) in [folder.resolve(), *folder.resolve().parents] for name in COPIED):
        raise UserError(f"--out {folder}: inside a folder that is copied; choose one elsewhere")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        copy = Path(scratch) / "copy"
        write_copy(copy, exercises, chosen)
        os.replace(copy, folder)        # complete or absent: until here it has our solutions


def write_copy(folder, exercises, chosen):
    """Write the student's copy to a new folder. chosen: the exercises by_module."""
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", ".*", "out", *LEFT_OUT)
    for path in sorted(ROOT.iterdir()):
        if path.is_dir() and path.name in COPIED:
            shutil.copytree(path, folder / path.name, ignore=ignored)
        elif path.suffix in (".py", ".md", ".txt") or path.name in ("LICENSE", ".gitignore"):
            shutil.copy(path, folder)
    for module, names in chosen.items():
        messages = {name: message(exercise) for name, exercise in names.items()}
        text = without_bodies(our_source(module), messages)
        (folder / path_of(module).relative_to(ROOT)).write_text(text, encoding="utf-8")
    for page in [folder / "README.md", *(folder / "docs").glob("*.md")]:
        text = without_answers(page.read_text(encoding="utf-8"), chosen)
        page.write_text(text, encoding="utf-8")
    (folder / SHEET).write_text(sheet(exercises), encoding="utf-8")
    (folder / "classroom" / FOR_TEACHERS).write_text(
        "The guide for teachers is not part of a student's copy.\n", encoding="utf-8")


def without_answers(markdown, chosen):
    """Remove the bodies of the chosen functions from the Python code of a page. A page may show a
    whole function or only a few of its lines; either way, the `raise` statement takes their place.
    """
    replacements = {}                       # {line of a body: the statement that replaces it}
    for module, names in chosen.items():
        source = our_source(module)
        for name, exercise in names.items():
            first, end = body_lines(source, functions(source)[name])
            for line in source.splitlines()[first:end]:
                if line:
                    replacements[line.strip()] = f'raise NotImplementedError("{message(exercise)}")'

    def emptied(block):
        opening, code, closing = block.groups()
        lines = []
        for line in code.splitlines():
            indent = line[:len(line) - len(line.lstrip())]
            line = indent + replacements.get(line.strip(), line.strip())
            repeated = line.strip() in replacements.values() and line in lines
            if not repeated:
                lines.append(line)
        return opening + "\n".join(lines) + "\n" + closing
    return re.sub(r"(^```python\n)(.*?)(^```)", emptied, markdown, flags=re.S | re.M)


def sheet(exercises):
    """The student's sheet, as markdown."""
    first = exercises[0].number
    lines = [
        "# Exercises", "",
        "Write the functions below from their docstrings; each raises NotImplementedError until "
        "you do. Define helpers inside the function: only the function itself is graded. "
        "Everything you need is already imported at the top of its file.", "",
        "```bash", "pip install -r requirements.txt",
        f"pytest --exercise {first}       # what is still wrong, in words",
        f"pytest -v --exercise {first}    # and where in the code",
        "pytest                    # everything; tests that need an unwritten function are skipped",
        "```", "",
        "An exercise is finished when all its claims hold. Each claim that holds earns an equal "
        "share of its points. The claims are tests. You may read them; they say how each expected "
        "number is derived. Editing them does not change your grade."]
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
        lines.append(f"- {sentence(test)} (`{file}`)")
    return lines


def needed(exercise, exercises):
    """The exercises of this sheet that come before an exercise, in words."""
    earlier = [str(other.number) for other in exercises if other.number in exercise.needs]
    if not earlier:
        return ""
    return f"; exercise{'s' if len(earlier) > 1 else ''} {', '.join(earlier)}"


# ------------------------------------------------------------------------------------------------
# --grade: what the grader reads from a submission
# ------------------------------------------------------------------------------------------------


def read_submission(path):
    """The text of a submitted file. Raises UserError. Links are not followed, because they could
    lead to our own file; pipes are not read, because that might never end."""
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
    """The text of one submitted function. Raises UserError, saying what is wrong with it."""
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


# The modules that a solution may import, and the names and attributes that it must not use: a
# mathematical function does not need them, but forging a grade does. The tests run in the same
# process as the submission, so code that can reach the interpreter can rewrite the tests.
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


def complaints(function):
    """Yield what is not allowed in the syntax tree of a solution, as "line: what is wrong"."""
    for node in ast.walk(function):
        complaint = complaint_about(node)
        if complaint:
            yield f"{getattr(node, 'lineno', function.lineno)}: {complaint}; no solution needs it"


def complaint_about(node):
    """What is wrong with one node of a syntax tree, or None; see MODULES above."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return complaint_about_import(node)
    if isinstance(node, ast.Attribute):
        if node.attr in ATTRIBUTES or node.attr.startswith("_"):
            return f"uses .{node.attr}"
        if not isinstance(node.ctx, ast.Load) and node.attr not in ("grad", "data"):
            return f"changes .{node.attr}"
    if isinstance(node, ast.Name) and (node.id in NAMES or node.id.startswith("__")):
        return f"uses {node.id}"
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name.startswith("__"):
        return f"defines {node.name}"
    if isinstance(node, ast.Global):
        return "has a global statement"
    return None


def complaint_about_import(node):
    """What is wrong with an import statement, or None."""
    names = [alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        return f"imports {', '.join(names)}" if set(names) - MODULES else None
    private = any(name.startswith("_") for name in names)
    forbidden = set(names) & (ATTRIBUTES | {"*"})
    if node.level or node.module not in MODULES or private or forbidden:
        return f"imports from {node.module}"
    return None


# ------------------------------------------------------------------------------------------------
# --grade: one exercise
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
    sandbox.copy_sources(folder, {known[test][0] for test in exercise.tests})
    for module, names in by_module([exercise]).items():
        text = without_bodies(our_source(module), {name: message(exercise) for name in names})
        given = {name: texts[f"{module}.{name}"] for name in names if f"{module}.{name}" in texts}
        text = with_functions(text, given)
        (folder / path_of(module).relative_to(ROOT)).write_text(text, encoding="utf-8")
    return [f"tests/{known[test][0]}::{test}" for test in exercise.tests]


def grade_exercise(exercise, folder, seconds):
    """The entries of results.json for one exercise, one per claim."""
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
    """Run the exercise's tests on these functions in a separate process."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        tests = clean_copy(copy, exercise, texts)
        return sandbox.run(copy, tests, seconds, guarded=True, claim_seconds=seconds / 4)


def entry(exercise, test, outcome, problems):
    """One claim of one exercise, in the form of results.json. problems: what was wrong with the
    submitted functions before any test ran."""
    tests_run = [name_of_test(node) for node in outcome.claims]
    results = [result for node, result in outcome.claims.items() if name_of_test(node) == test]
    failures = [details for result, details in results if result != "passed"]
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
    points = POINTS / len(exercise.tests)
    return {"name": f"{exercise.number}. {exercise.title}: {sentence(test)}",
            "number": str(exercise.number),
            "score": points if holds else 0.0,
            "max_score": points,
            "status": "passed" if holds else "failed",
            "output": printable("\n".join(output)),
            "output_format": "text"}


def printable(text):
    """Replace characters that could control a terminal, and lone surrogates, which cannot be
    encoded."""
    text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    return text.encode("utf-8", "replace").decode("utf-8")


def grade(folder, exercises, seconds, jobs):
    """The content of results.json for a submission."""
    by_module(exercises)
    with ThreadPoolExecutor(jobs) as pool:
        graded = list(tqdm(pool.map(lambda e: grade_exercise(e, folder, seconds), exercises),
                           "grading", len(exercises)))
    entries = []
    for of_exercise in graded:
        entries += of_exercise
    return {"score": math.fsum(claim["score"] for claim in entries), "tests": entries,
            "output": table(exercises, graded)}


def table(exercises, graded):
    """One line per exercise, and the total. graded: the entries of each exercise."""
    lines = [f"{'exercise':46}{'claims':>10}{'points':>16}"]
    total = []
    for exercise, entries in zip(exercises, graded):
        held = sum(claim["status"] == "passed" for claim in entries)
        scores = [claim["score"] for claim in entries]
        total += scores
        lines.append(f"{exercise.number:3}  {exercise.title:41}{held:4} of {len(entries):2}"
                     f"{math.fsum(scores):8.2f} of {POINTS:.0f}")
    lines.append(f"{'total':56}{math.fsum(total):8.2f} of {POINTS * len(exercises):.0f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# --check: our own solution, and an empty one
# ------------------------------------------------------------------------------------------------


def suite_of_copy(folder, files):
    """Make a copy in which no exercise is written, and run these test files there."""
    make_copy(folder, list(EXERCISES.values()))
    return sandbox.run(folder, [f"tests/{file}" for file in sorted(files)], 900, skip=SLOW)


def wrong_in_copy(outcome):
    """The failures in a student's copy that are not claims of any exercise."""
    own = {test for exercise in EXERCISES.values() for test in exercise.tests}
    wrong = [f"fails in a copy, but belongs to no exercise: {node}\n{details}"
             for node, (result, details) in outcome.claims.items()
             if result in ("failed", "error") and name_of_test(node) not in own]
    if outcome.end:
        wrong.append(outcome.end)
    return wrong


def check(exercises, seconds, jobs):
    """What is wrong with the exercises: claims that our own solution does not meet, claims that an
    empty solution meets, and unrelated tests that fail in a copy."""
    files = {file for file, _ in claims().values()} - set(LEFT_OUT)
    with tempfile.TemporaryDirectory() as scratch:
        elsewhere = wrong_in_copy(suite_of_copy(Path(scratch) / "copy", files))
    solved = grade(ROOT, exercises, seconds, jobs)
    wrong = [f"our own solution does not meet: {claim['name']}\n{claim['output']}"
             for claim in solved["tests"] if claim["status"] != "passed"]
    with ThreadPoolExecutor(jobs) as pool:
        empty = list(tqdm(pool.map(lambda e: try_out(e, {}, seconds), exercises), "unwritten",
                          len(exercises)))
    for exercise, outcome in zip(exercises, empty):
        for test in exercise.tests:
            if entry(exercise, test, outcome, [])["status"] == "passed":
                wrong.append(f"an empty solution meets: {exercise.number}. {sentence(test)}")
    return wrong + elsewhere


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


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="print the exercises and their claims")
    action.add_argument("--out", type=Path, metavar="DIR", help="make a student's copy in DIR")
    action.add_argument("--grade", type=Path, metavar="DIR", help="grade the submission in DIR")
    action.add_argument("--check", action="store_true",
                        help="check that our own solution meets every claim and an empty one none")
    add("--exercises", default=",".join(map(str, EXERCISES)), metavar="1,3,5",
        help="only these exercises (default: all); for --grade, those that were set")
    add("--results", type=Path, default=Path("results.json"), metavar="FILE",
        help="where --grade writes (default results.json)")
    add("--seconds", type=number_type(float, 1), default=120.0,
        help="time limit per exercise; a single claim has a quarter of it (default 120)")
    add("--jobs", type=number_type(int, 1), default=os.cpu_count(),
        help="exercises to grade at the same time (default: one per processor)")
    args = parser.parse_args(argv)
    args.exercises = chosen_exercises(args.exercises)
    return args


@command
def main(argv=None):
    """Returns the exit code: 1 if --check finds something wrong."""
    args = parse_args(argv)
    only_one_process("making or grading an assignment")
    if args.list:
        print(sheet(args.exercises), end="")
    elif args.out:
        make_copy(args.out, args.exercises)
        numbers = ", ".join(str(exercise.number) for exercise in args.exercises)
        print(f"wrote {args.out} with exercises {numbers}; give students this folder and point "
              f"them to {SHEET}")
    elif args.grade:
        if not args.grade.is_dir():
            raise UserError(f"--grade {args.grade}: no such folder")
        if not args.results.parent.is_dir():
            raise UserError(f"--results {args.results}: there is no such folder to write to")
        results = grade(args.grade, args.exercises, args.seconds, args.jobs)
        print(results["output"])
        write_json(args.results, results)
        print(f"wrote {args.results}")
    else:
        wrong = check(args.exercises, args.seconds, args.jobs)
        if wrong:
            print("\n".join(wrong))
            return 1
        n_claims = sum(len(exercise.tests) for exercise in args.exercises)
        print(f"{len(args.exercises)} exercises, {n_claims} claims: our own solution meets all of "
              "them, an empty one none, and no other test fails in a copy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
