"""Settings of the whole test suite: the import path, the marker for tests that need a GPU, the
exercises of a class, and work in the background.

    pytest --exercise 3             # the claims of one exercise, and in words what is still wrong

In a student's copy, a test that needs an unwritten function of another exercise is skipped. So the
tests that fail show what the student still has to do.
"""

import functools
import importlib
import sys
import tempfile
import traceback
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from classroom.exercises import (  # noqa: E402
    EXERCISES,
    claims,
    is_a_students_copy,
    message,
    sentence,
    split_target,
    unwritten,
)
from classroom.rules import submitted  # noqa: E402
from runtime.errors import UserError  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--exercise", type=int, metavar="N",
                     help=f"run only the tests of exercise N, 1 to {len(EXERCISES)}")


def chosen_exercise(config):
    """The Exercise of --exercise, or None. Raises UsageError if there is none with that number."""
    exercise_number = config.getoption("--exercise")
    if exercise_number is None:
        return None
    if exercise_number not in EXERCISES:
        raise pytest.UsageError(f"--exercise {exercise_number}: expected a number from 1 to "
                                f"{len(EXERCISES)}")
    return EXERCISES[exercise_number]


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")
    torch.set_num_threads(1)        # with models of a few thousand weights, threads only cost time
    exercise = chosen_exercise(config)
    if exercise is None:
        return
    for target in exercise.functions:
        try_to_import(split_target(target)[0])
    # Collect only the files that have the claims: the others would take longer than these.
    files = sorted({claims()[test][0] for test in exercise.tests})
    config.args[:] = [str(ROOT / "tests" / file) for file in files]
    # Find the smallest failing example, but leave out hypothesis's slow explanation of it.
    phases = set(hypothesis.Phase) - {hypothesis.Phase.explain}
    hypothesis.settings.register_profile("exercise", phases=phases, report_multiple_bugs=False)
    hypothesis.settings.load_profile("exercise")
    if config.option.tbstyle == "auto" and not config.option.verbose:
        config.option.tbstyle = "no"        # pytest_terminal_summary explains the failures instead
        config.option.reportchars = ""


def try_to_import(module):
    """Raise UsageError with the line of the student's code if a module cannot be imported."""
    try:
        importlib.import_module(module)
    except SyntaxError as error:
        lines = traceback.format_exception_only(error)          # file, line, caret, what is wrong
    except Exception as error:
        ours = [frame for frame in traceback.extract_tb(error.__traceback__)
                if ROOT in Path(frame.filename).parents and Path(frame.filename) != Path(__file__)]
        lines = traceback.format_list(ours[-1:]) + traceback.format_exception_only(error)
    else:
        return
    raise pytest.UsageError(f"{module} cannot be imported, so no test can run\n" + "".join(lines))


def pytest_collection_modifyitems(config, items):
    exercise = chosen_exercise(config)
    if exercise:
        items[:] = [item for item in items if original_name(item) in exercise.tests]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if is_a_students_copy():
        for item in items:
            handle = getattr(getattr(item, "obj", None), "hypothesis", None)
            if handle is not None:
                handle.inner_test = without_search(handle.inner_test)


def original_name(item):
    """The name of a test without its parameters."""
    return getattr(item, "originalname", None)


def without_search(test):
    """Do not let hypothesis look for the smallest example if a function is unwritten, which takes
    seconds: every example fails. A skip ends the search, and pytest_runtest_makereport turns it
    into a failure if necessary."""
    @functools.wraps(test)
    def wrapped(*arguments, **named):
        try:
            return test(*arguments, **named)
        except NotImplementedError as error:
            if unwritten(error):
                pytest.skip(str(error))
            raise
    return wrapped


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """An unwritten function fails the tests of its own exercise. All other tests that call it are
    skipped."""
    report = yield
    report.originalname = original_name(item)
    error = call.excinfo.value if call.excinfo else None
    exercise = EXERCISES.get(unwritten(error))
    if exercise is None:
        if error is not None and report.outcome == "failed":
            report.details = what_happened(error, report.originalname)
            if isinstance(error, AssertionError):
                report.likely = mistakes_in_exercise_of(report.originalname)
        return report
    report.details = [f"{message(exercise)} is not written yet"]
    if report.originalname in exercise.tests:
        report.outcome = "failed"
        report.longrepr = f"E   {report.details[0]}"
    else:
        report.outcome = "skipped"
        reason = f"Skipped: needs {message(exercise)}, which is not written yet"
        report.longrepr = (str(item.path), item.location[1] or 0, reason)
    return report


def mistakes_in_exercise_of(test):
    """The known mistakes in the functions whose claim a test is, as sentences."""
    probes = importlib.import_module("classroom.probes")    # it imports files of the student's
    for exercise in EXERCISES.values():
        if test in exercise.tests:
            return probes.likely_mistakes(tuple(exercise.functions))
    return []


def what_happened(error, test):
    """The error in a few lines, with the example that caused it, and with the line of the code that
    raised it if it is not an assertion of the test."""
    lines = [line.strip() for text in [str(error), *getattr(error, "__notes__", [])]
             for line in text.splitlines()]
    noise = ("#", "You can reproduce", "Mismatched elements", "Greatest relative difference",
             "Use -v to", "...Full output truncated")
    lines = [line for line in lines if line and not line.startswith(noise)]
    if not isinstance(error, AssertionError):
        first = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        lines = [first, *line_of_code(error, test), *lines[1:]]
    return [line[:150] for line in lines][:16]


def line_of_code(error, test):
    """Where an error was raised, as a list of one line or none: in a function of the test's
    exercise if it passed through one, otherwise anywhere in this folder."""
    graded = {target.rpartition(".")[2] for exercise in EXERCISES.values()
              if test in exercise.tests for target in exercise.functions}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if ROOT in Path(frame.filename).parents
              and Path(frame.filename) != Path(__file__)
              and "site-packages" not in frame.filename]
    of_student = [frame for frame in frames if frame.name in graded]
    for frame in (of_student or frames)[-1:]:
        return [f"in {frame.name} of {Path(frame.filename).name}: {frame.line}"]
    return []


def pytest_sessionfinish(session, exitstatus):
    """A skipped claim does not hold, so --exercise does not succeed."""
    if session.config.getoption("--exercise") and exitstatus == 0:
        reporter = session.config.pluginmanager.getplugin("terminalreporter")
        if reporter.stats.get("skipped"):
            session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, config):
    """With --exercise: print each claim as a sentence. For a claim that fails, print why it matters
    and what happened."""
    exercise = chosen_exercise(config)
    if exercise is None:
        return
    write = terminalreporter.write_line
    reports = worst_reports(terminalreporter.stats)
    if None in reports:
        write("\nthe file with the claims cannot be imported:")
        write("\n".join(reports[None][1].longreprtext.splitlines()[-6:]))
    terminalreporter.section(message(exercise))
    write(f"{', '.join(exercise.functions)}: {exercise.equation}")
    for test in exercise.tests:
        write_claim(write, test, *reports.get(test, ("not run", None)))
    held = sum(reports.get(test, ("", None))[0] == "passed" for test in exercise.tests)
    for line in mistakes_found(reports.values()):
        write(f"\n{line}")
    for line in refused(exercise):
        write(f"\nthe grader would refuse this: {line}")
    advice = ""
    if held < len(exercise.tests):
        advice = f"; pytest -v --exercise {exercise.number} shows where in the code"
    write(f"\n{held} of {len(exercise.tests)} claims hold{advice}")


def write_claim(write, test, outcome, report):
    """Print what became of one claim."""
    if outcome == "passed":
        write(f"holds   {sentence(test)}")
    elif outcome == "not run":
        write(f"not run {sentence(test)}")
    elif outcome == "skipped":
        write(f"skipped {sentence(test)}")
        write(f"        {report.longrepr[2].removeprefix('Skipped: ')}")
    else:
        write(f"\nwrong   {sentence(test)}")
        write(f"        {claims()[test][1]}")
        for line in report.details:
            write(f"        > {line}")


def worst_reports(stats):
    """{name of a test: (outcome, report)}: of a test that ran with several parameters, the worst.
    stats: pytest's {outcome: reports}."""
    found = {}
    for outcome in ("passed", "skipped", "failed", "error"):    # a later one replaces an earlier
        for report in stats.get(outcome, []):
            found[getattr(report, "originalname", None)] = outcome, report
    return found


def mistakes_found(outcomes):
    """The known mistakes of all reports, each once, in their order."""
    return list(dict.fromkeys(mistake for _, report in outcomes
                              for mistake in getattr(report, "likely", [])))


def refused(exercise):
    """What the grader would refuse in the functions of an exercise, a sentence each."""
    sentences = []
    for target in exercise.functions:
        try:
            submitted(ROOT, *split_target(target))
        except UserError as error:
            if "not written yet" not in str(error):
                sentences.append(str(error))
    return sentences


# ------------------------------------------------------------------------------------------------
# Work in the background
# ------------------------------------------------------------------------------------------------


class Background:
    """A process that works while other tests run, started by the `start` of a test file."""

    def __init__(self, start, folder):
        self.folder = folder
        self.output, self.errors = folder / "stdout", folder / "stderr"
        with open(self.output, "w") as output, open(self.errors, "w") as errors:
            self.process = start(folder, stdout=output, stderr=errors)

    def wait(self):
        """Wait until the process ends, successfully. Returns its folder."""
        assert self.process.wait() == 0, self.errors.read_text()[-3000:]
        return self.folder

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()        # torchrun ends its workers, too
            self.process.wait()


STARTED = {}


@pytest.fixture(scope="session")
def in_background():
    """{function start(folder, **streams) that returned a Popen: its Background}."""
    return STARTED


def pytest_collection_finish(session):
    """Start the long work of the tests that will run. A test file lists it in BACKGROUND, {fixture
    that waits for it: function that starts it}. Several cores are then busy, and waiting is short.
    """
    if session.config.option.collectonly:
        return
    for item in session.items:
        for fixture, start in getattr(item.module, "BACKGROUND", {}).items():
            if fixture in item.fixturenames and start not in STARTED:
                folder = tempfile.TemporaryDirectory()
                session.config.add_cleanup(folder.cleanup)
                STARTED[start] = Background(start, Path(folder.name))
                session.config.add_cleanup(functools.partial(STARTED.pop, start))
                session.config.add_cleanup(STARTED[start].stop)
