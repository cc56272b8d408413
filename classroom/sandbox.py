"""Run tests in separate processes with limits. wrong_answers.py and assignment.py grade with this.

    runs = [TestRun(folder, ["tests/test_model.py"], seconds=60), ...]
    outcomes = run_all(runs, jobs=2)        # an Outcome for each
    outcome.claims      {"tests/test_model.py::test_x": ("passed" | "failed" | ..., details)}
    outcome.end         "" if the run finished, otherwise the reason why it did not

A separate process (child.py) imports PyTorch and pytest once and then forks for each run. The fork
sets its limits, and only then imports the code under test. This process accepts only those lines of
the results that begin with a nonce, a random number that is not in the environment, on the command
line or in a file. Whatever the code under test prints is discarded.

With guarded=True (for code written by somebody else), a run must not read or write files outside
its own folder and Python's, start processes, or open connections. An audit hook refuses these.
Where `unshare` works, it also has no network and sees no processes but those of this call. Audit
hooks have their limits: code that is determined to get around them can, for example with native
code.

Left out on purpose: containers. If you do not trust a class, run the whole grader in one.
"""

import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from classroom.exercises import EXERCISES, ROOT, claims, path_of, split_target

STARTING = 120              # seconds that importing PyTorch may take on a busy machine


@dataclass
class TestRun:
    """What child.py runs in one process: tests, by their node ids, in a folder."""

    folder: Path
    tests: list
    seconds: float                  # time limit
    guarded: bool = False
    before: tuple = ()              # a function to call first, "module.function", and its arguments
    stop: bool = False              # stop at the first failure
    skip: tuple = ()                # names of tests to leave out
    claim_seconds: float = None     # time limit of each test
    seed: int = None                # of the examples that hypothesis draws; None: always the same


@dataclass
class Outcome:
    claims: dict            # {node id: (outcome, details)}
    end: str                # the reason why the run did not finish, or ""


def run_all(runs, jobs=1, load=None, progress=None):
    """The Outcome of each TestRun, at most `jobs` of them at the same time.

    load: a function, "module.function", to call in the folder of the first run before any run
    starts, for modules that all of them import. progress: what a progress bar calls the runs.
    """
    nonce = secrets.token_hex(16)
    command = [sys.executable, "-s", str(ROOT / "classroom" / "child.py")]
    if any(run.guarded for run in runs):
        command = isolation() + command
    deadline = time.monotonic() + STARTING + sum(run.seconds for run in runs)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "results"
        results = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        job = {"nonce": nonce, "results": results, "jobs": jobs, "load": load, "runs": []}
        for k, run in enumerate(runs):
            own_scratch = Path(scratch) / str(k)
            own_scratch.mkdir()
            job["runs"].append(asdict(run) | {"folder": str(Path(run.folder).resolve()),
                                              "scratch": str(own_scratch)})
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(scratch), stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[results],
            start_new_session=True)
        os.close(results)
        try:
            process.stdin.write(json.dumps(job).encode())
            process.stdin.close()
            with tqdm(desc=progress, total=len(runs), disable=progress is None) as bar:
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.05)
                    n_ended = path.read_bytes().count(b'"ended"') if progress else 0
                    if n_ended > bar.n:
                        bar.update(n_ended - bar.n)
        finally:
            kill_all_of(process)
        text = path.read_text(errors="replace")
    return outcomes_of(text, nonce, len(runs))


def outcomes_of(text, nonce, n):
    """The Outcome of each of n runs, from what they and child.py wrote. Lines without the nonce are
    ignored."""
    outcomes = [Outcome({}, None) for _ in range(n)]
    for line in text.splitlines():
        if not line.startswith(nonce):
            continue
        record = json.loads(line[len(nonce):])
        outcome = outcomes[record["run"]]
        if "end" in record:
            outcome.end = record["end"]
        elif "ended" in record:
            if outcome.end is None:         # the process ended, but its tests had not
                outcome.end = record["ended"]
        else:
            earlier = outcome.claims.get(record["claim"])
            if earlier is None or earlier[0] == "passed":   # of several, the first failure counts
                outcome.claims[record["claim"]] = record["outcome"], record["details"]
    for outcome in outcomes:
        if outcome.end is None:
            outcome.end = "the process that runs the tests ended"
    return outcomes


def environment(scratch):
    """The environment of the child. It has nothing from the parent's that is not needed, because
    that may contain keys and private paths."""
    names = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
    inherited = {name: os.environ[name] for name in names if name in os.environ}
    return inherited | {"HOME": scratch, "TMPDIR": scratch,
                        "HYPOTHESIS_STORAGE_DIRECTORY": scratch,
                        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


@functools.cache
def isolation():
    """The beginning of a command that runs without a network and does not see other processes, or
    [] if this machine does not allow it. When the child ends, everything that it started ends too.
    """
    # The shell becomes process 1 of the namespace, because process 1 ignores most signals, and
    # the child must not.
    prefix = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child",
              "sh", "-c", '"$@"; exit $?', "sh"]
    if not shutil.which("unshare"):
        return []
    works = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if works else []


def kill_all_of(process):
    """End child.py, which then ends its runs; whatever is left of its session is killed."""
    for signal_number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, signal_number)
            process.wait(seconds)
        except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
            pass
    process.wait()


def source_files(*packages):
    """The paths of the five files at the top level and of the modules in these folders."""
    paths = [*ROOT.glob("*.py")]
    for package in packages:
        paths += (ROOT / package).glob("*.py")
    return sorted(paths)


def copy_sources(folder, exercises, tools=()):
    """Copy to an empty folder what some exercises need: the five files and what they import, the
    modules of the exercises, the files with their claims, and what `pytest --exercise` needs.
    tools: further files of classroom/."""
    targets = {path_of(split_target(target)[0]) for exercise in exercises
               for target in exercise.functions}
    if any(path.parent.name == "experiments" for path in targets):      # some import each other
        targets = {path_of(split_target(target)[0]) for exercise in EXERCISES.values()
                   for target in exercise.functions}
    tests = {claims()[test][0] for exercise in exercises for test in exercise.tests}
    paths = {*source_files("runtime", "tasks"), *targets}
    paths |= {ROOT / "tests" / name for name in {"conftest.py", *tests}}
    paths |= {ROOT / "classroom" / name
              for name in {"__init__.py", "exercises.py", "probes.py", "rules.py", *tools}}
    for path in sorted(paths):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
