"""Settings of the whole test suite: the import path, the marker for tests that need a GPU, the
exercises of a class, and work in the background.

    pytest --exercise 3             # the claims of one exercise, and in words what is still wrong

In a student's copy, a test that needs an unwritten function of another exercise is skipped. So the
tests that fail show what the student still has to do.
"""

import functools
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from classroom.exercises import (  # noqa: E402
    EXERCISES,
    is_a_students_copy,
    message,
    sentence,
    unwritten,
)


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
    if chosen_exercise(config) is None:
        return
    # Find the smallest failing example, but leave out hypothesis's slow explanation of it.
    phases = set(hypothesis.Phase) - {hypothesis.Phase.explain}
    hypothesis.settings.register_profile("exercise", phases=phases, report_multiple_bugs=False)
    hypothesis.settings.load_profile("exercise")
    if config.option.tbstyle == "auto" and not config.option.verbose:
        config.option.tbstyle = "no"        # pytest_terminal_summary explains the failures instead
        config.option.reportchars = ""


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    exercise = chosen_exercise(config)
    if exercise:
        chosen = [item for item in items if original_name(item) in exercise.tests]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
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
    report.details = [type(error).__name__, str(error), *getattr(error, "__notes__", [])]
    exercise = EXERCISES.get(unwritten(error))
    if exercise is None:
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
    docstrings = {item.originalname: " ".join((item.function.__doc__ or "").split())
                  for item in terminalreporter._session.items}
    reports = worst_reports(terminalreporter.stats)
    terminalreporter.section(message(exercise))
    write(f"{', '.join(exercise.functions)}: {exercise.equation}")
    held = 0
    for test in exercise.tests:
        outcome, report = reports.get(test, ("not run", None))
        if outcome == "passed":
            held += 1
            write(f"holds   {sentence(test)}")
        elif outcome == "not run":
            write(f"not run {sentence(test)}")
        elif outcome == "skipped":
            write(f"skipped {sentence(test)}")
            write(f"        {report.longrepr[2].removeprefix('Skipped: ')}")
        else:
            write(f"\nwrong   {sentence(test)}")
            write(f"        {docstrings[test]}")
            for line in what_happened(report):
                write(f"        > {line}")
    advice = ""
    if held < len(exercise.tests):
        advice = f"; pytest -v --exercise {exercise.number} shows where in the code"
    write(f"\n{held} of {len(exercise.tests)} claims hold{advice}")


def worst_reports(stats):
    """{name of a test: (outcome, report)}: of a test that ran with several parameters, the worst.
    stats: pytest's {outcome: reports}."""
    found = {}
    for outcome in ("passed", "skipped", "failed", "error"):    # a later one replaces an earlier
        for report in stats.get(outcome, []):
            found[report.originalname] = outcome, report
    return found


def what_happened(report):
    """The error in a few lines, with the example that caused it."""
    lines = [line.strip() for text in report.details for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("#", "You can reproduce"))]
    shown = lines[1:] or lines              # the first line is only the type of the error
    return [line[:150] for line in shown][:16]


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
                session.config.add_cleanup(STARTED[start].stop)
