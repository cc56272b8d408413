"""Settings of the whole suite: the repository root on the path, the marker for tests that need a
GPU, and the exercises of a class.

    pytest --exercise 3             # the claims of one exercise, and in words what is still wrong

In a student's copy, a test that needs an exercise which is not its own is skipped until that one is
written, so that what fails is what there is to do.
"""

import functools
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from classroom.exercises import (EXERCISES, is_a_students_copy, message,            # noqa: E402
                                 sentence, unwritten)


def pytest_addoption(parser):
    parser.addoption("--exercise", type=int, metavar="N",
                     help=f"run the tests of exercise N alone, 1 to {len(EXERCISES)}")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")
    torch.set_num_threads(1)        # on models of a few thousand weights threads only wait
    number = config.getoption("--exercise")
    if number is not None and number not in EXERCISES:
        raise pytest.UsageError(f"--exercise {number}: there are exercises 1 to {len(EXERCISES)}")
    if number:      # the smallest example is worth a wait, but not what hypothesis explains of it
        phases = set(hypothesis.Phase) - {hypothesis.Phase.explain}
        hypothesis.settings.register_profile("exercise", phases=phases, report_multiple_bugs=False)
        hypothesis.settings.load_profile("exercise")
    if number and config.option.tbstyle == "auto" and not config.option.verbose:
        config.option.tbstyle, config.option.reportchars = "no", ""     # the words below instead


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if number := config.getoption("--exercise"):
        chosen = [item for item in items if name(item) in EXERCISES[number].tests]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
    if is_a_students_copy():
        for item in items:
            handle = getattr(getattr(item, "obj", None), "hypothesis", None)
            if handle is not None:
                handle.inner_test = without_search(handle.inner_test)


def name(item):
    return getattr(item, "originalname", None)


def without_search(test):
    """hypothesis looks for the smallest example of a failure, for seconds. An unwritten function
    fails for all of them; a skip ends the search, and the report below makes of it what it is."""
    @functools.wraps(test)
    def once(*arguments, **named):
        try:
            return test(*arguments, **named)
        except NotImplementedError as error:
            if unwritten(error):
                pytest.skip(str(error))
            raise
    return once


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """An unwritten function is a failure of its own exercise's tests; all others wait for it."""
    report = yield
    report.originalname = name(item)
    error = call.excinfo.value if call.excinfo else None
    report.words = [type(error).__name__, str(error), *getattr(error, "__notes__", [])]
    number = unwritten(error)
    if number in EXERCISES:
        own = report.originalname in EXERCISES[number].tests
        words = message(EXERCISES[number])
        report.outcome = "failed" if own else "skipped"
        report.words = [f"{words} is not written yet"]
        report.longrepr = f"E   {report.words[0]}" if own else (
            str(item.path), item.location[1] or 0, f"Skipped: waits for {words}")
    return report


def pytest_sessionfinish(session, exitstatus):
    if session.config.getoption("--exercise") and exitstatus == 0 and any(
            session.config.pluginmanager.getplugin("terminalreporter").stats.get("skipped", [])):
        session.exitstatus = 1                          # what waits is not done


def pytest_terminal_summary(terminalreporter, config):
    """With --exercise: each claim as a sentence, and of what fails why it matters and what came."""
    number = config.getoption("--exercise")
    if not number:
        return
    exercise, write = EXERCISES[number], terminalreporter.write_line
    docs = {item.originalname: " ".join((item.function.__doc__ or "").split())
            for item in terminalreporter._session.items}
    outcomes = {}
    for outcome in ("passed", "skipped", "failed", "error"):    # the worst of a claim's cases last
        for report in terminalreporter.stats.get(outcome, []):
            outcomes[report.originalname] = outcome, report
    terminalreporter.section(message(exercise))
    write(f"{', '.join(exercise.functions)}: {exercise.equation}")
    for test in exercise.tests:
        outcome, report = outcomes.get(test, ("not run", None))
        word = {"passed": "holds", "skipped": "waits", "not run": "not run"}.get(outcome, "wrong")
        write(f"\n{word:8}{sentence(test)}" if word == "wrong" else f"{word:8}{sentence(test)}")
        if outcome == "skipped":
            write(f"        {report.longrepr[2].removeprefix('Skipped: ')}")
        elif word == "wrong":
            write(f"        {docs[test]}")
            for line in what_happened(report):
                write(f"        > {line}")
    held = sum(outcomes.get(test, ("",))[0] == "passed" for test in exercise.tests)
    write(f"\n{held} of {len(exercise.tests)} claims hold"
          + ("" if held == len(exercise.tests) else "; pytest -v --exercise "
             f"{number} shows where in the code"))


def what_happened(report):
    """The error in a few lines, with the example at which it was found."""
    lines = [line.strip() for words in report.words for line in words.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("#", "You can reproduce"))]
    return [line[:150] for line in lines[1:] or lines][:16]
