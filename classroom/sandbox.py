"""Run tests in a separate process with limits. wrong_answers.py and assignment.py grade with this.

    outcome = run(folder, ["tests/test_model.py"], seconds=60)
    outcome.claims      {"tests/test_model.py::test_x": ("passed" | "failed" | ..., details)}
    outcome.end         "" if the run finished, otherwise the reason why it did not

The parent (`run`) starts this module again in `folder`. The child imports PyTorch and pytest, sets
its limits, and only then imports the code under test. The parent accepts only those lines of the
child's results that begin with a nonce, a random number drawn for this run that is not in the
environment, on the command line or in a file. Whatever the code under test prints is discarded.

With guarded=True (for code written by somebody else), the child must not read or write files
outside its own folder and Python's, start processes, or open connections. An audit hook refuses
these. Where `unshare` works, the child also has no network and sees no other processes. Audit hooks
have their limits: code that is determined to get around them can, for example with native code.

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
from dataclasses import dataclass
from pathlib import Path

from classroom.exercises import EXERCISES, path_of, split_target

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 2 << 30            # bytes that the code under test may use in addition to PyTorch
LARGEST_FILE = 1 << 26      # bytes


@dataclass
class Outcome:
    claims: dict            # {node id: (outcome, details)}
    end: str                # the reason why the run did not finish, or ""


# -- the parent ----------------------------------------------------------------------------------


def run(folder, tests, seconds, guarded=False, **job):
    """Run tests (node ids, relative to folder) for at most this many seconds. Returns an Outcome.

    job: further settings that `child` reads. mutant: the name of a mutant in wrong_answers.py.
    stop: whether to stop at the first failure. skip: names of tests to leave out. claim_seconds:
    the time limit of a single test.
    """
    nonce = secrets.token_hex(16)
    job |= {"tests": list(tests), "seconds": seconds, "guarded": guarded, "nonce": nonce}
    command = [sys.executable, "-B", "-s", "-m", "classroom.sandbox"]
    if guarded:
        command = isolation() + command
    with tempfile.TemporaryFile() as results, tempfile.TemporaryDirectory() as scratch:
        job["results"] = results.fileno()
        process = subprocess.Popen(
            command, cwd=folder, env=environment(scratch), stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[results.fileno()],
            start_new_session=True)
        timed_out = False
        try:
            process.communicate(json.dumps(job).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            kill_all_of(process)
        results.seek(0)
        text = results.read().decode(errors="replace")
    claims, end = read_records(text, nonce)
    if end is None and timed_out:
        end = f"stopped after {seconds:g} seconds"
    elif end is None:
        end = f"the process ended before its tests did ({how_it_ended(process.returncode)})"
    return Outcome(claims, end)


def read_records(text, nonce):
    """The claims and the end of an Outcome, from what a child wrote. end is None if the child did
    not write it. Lines without the nonce are ignored."""
    claims, end = {}, None
    for line in text.splitlines():
        if not line.startswith(nonce):
            continue
        record = json.loads(line[len(nonce):])
        if "end" in record:
            end = record["end"]
            continue
        earlier = claims.get(record["claim"])
        if earlier is None or earlier[0] == "passed":       # of several, the first failure counts
            claims[record["claim"]] = record["outcome"], record["details"]
    return claims, end


def environment(scratch):
    """The environment of the child. It has nothing from the parent's that is not needed, because
    that may contain keys and private paths."""
    names = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
    inherited = {name: os.environ[name] for name in names if name in os.environ}
    return inherited | {"HOME": scratch, "TMPDIR": scratch,
                        "HYPOTHESIS_STORAGE_DIRECTORY": scratch,
                        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}


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
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def how_it_ended(code):
    """An exit code in words. Like a shell, unshare reports a signal as 128 + its number."""
    signal_number = -code if code < 0 else code - 128
    try:
        return f"signal {signal.Signals(signal_number).name}"
    except ValueError:
        return f"exit code {code}"


def source_files(*packages):
    """The paths of the five files at the top level and of the modules in these folders."""
    paths = [*ROOT.glob("*.py")]
    for package in packages:
        paths += (ROOT / package).glob("*.py")
    return sorted(paths)


def copy_sources(folder, tests=(), tools=()):
    """Copy to an empty folder: the five files and what they import, the other modules with
    exercises, some tests, and what is needed to run them. tools: further files of classroom/."""
    with_exercises = {path_of(split_target(target)[0]) for exercise in EXERCISES.values()
                      for target in exercise.functions}
    for path in {*source_files("runtime", "tasks"), *with_exercises}:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for package, names in [("tests", {"conftest.py", *tests}),
                           ("classroom", {"__init__.py", "exercises.py", "sandbox.py", *tools})]:
        (folder / package).mkdir()
        for name in names:
            shutil.copy(ROOT / package / name, folder / package)


# -- the child -----------------------------------------------------------------------------------


class Stopped(BaseException):
    """Ends a test from outside. It is not an Exception, so neither hypothesis nor the code under
    test handles it as an error of its own."""


class Recorder:
    """A pytest plugin that passes the outcome of each test to `send`."""

    def __init__(self, send, job):
        self.send, self.skip = send, set(job.get("skip", ()))

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.originalname not in self.skip]

    def pytest_collectreport(self, report):
        if report.failed:
            self.send(claim=report.nodeid, outcome="error", details=details(report))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.send(claim=report.nodeid, outcome=report.outcome, details=details(report))


def limited_calls(seconds):
    """A pytest plugin that gives each test this many seconds and does not let it end the session.
    """
    import pytest

    def too_late(*_):
        raise Stopped(f"no answer after {seconds:g} seconds")

    class Limits:
        @pytest.hookimpl(wrapper=True, tryfirst=True)
        def pytest_runtest_call(self, item):
            signal.signal(signal.SIGALRM, too_late)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                return (yield)
            except KeyboardInterrupt:
                raise Stopped("a KeyboardInterrupt was raised") from None
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    return Limits()


def details(report):
    """What pytest says went wrong, without the code around it: the lines that it marks with E, and
    the indented ones that follow them."""
    lines = report.longreprtext.splitlines()
    errors, in_error = [], False
    for line in lines:
        if not line.startswith("    "):         # an indented line belongs to the one before it
            in_error = line.startswith("E")
        if in_error:
            errors.append(line.removeprefix("E").strip())
    shown = errors or lines[-6:]
    return "\n".join(line[:160] for line in shown if line)[:1500]


def limit_process(seconds):
    """Limit the CPU time, the memory and the file sizes of this process. The operating system
    enforces these limits."""
    import resource
    cpu_seconds = int(seconds) + 10
    limits = [(resource.RLIMIT_CPU, cpu_seconds), (resource.RLIMIT_CORE, 0),
              (resource.RLIMIT_FSIZE, LARGEST_FILE)]
    statm = Path("/proc/self/statm")
    if statm.exists():                                      # Linux
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        limits.append((resource.RLIMIT_AS, used + MEMORY))
    for kind, limit in limits:
        resource.setrlimit(kind, (limit, limit))


# Audit events that are refused, by prefix.
FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn",
             "os.spawn", "os.kill", "os.chmod", "os.chown", "os.link", "os.symlink",
             "ctypes.dlopen", "ctypes.dlsym", "ctypes.cdata", "gc.get_objects",
             "resource.setrlimit", "shutil.", "webbrowser.", "urllib.", "ftplib.", "smtplib.")
# Events that are refused outside certain folders, and those of them that write.
ON_FILES = ("open", "os.listdir", "os.scandir", "os.chdir", "os.rename", "os.remove", "os.mkdir",
            "os.rmdir", "os.truncate", "os.utime")
WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
WRITING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.utime")


def guard(folder, scratch):
    """For the rest of this process, refuse everything that no test of a function needs."""
    writable = [os.path.realpath(path) for path in (folder, scratch, os.devnull)]
    packages = [path for path in sys.path if path.endswith("-packages")]
    python = [sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.__file__), *packages]
    readable = writable + [os.path.realpath(path) for path in [*python, "/dev/urandom"]]

    def is_inside(path, folders):
        return any(path == folder or path.startswith(folder + os.sep) for folder in folders)

    def writes(event, arguments):
        if event != "open":
            return event in WRITING
        _, mode, flags = arguments      # os.open has flags, but no mode
        return bool(set(mode or "") & set("wax+") or flags & WRITING_FLAGS)

    def hook(event, arguments):
        if event.startswith(FORBIDDEN) and not event.startswith("shutil.rmtree"):
            raise PermissionError(f"not allowed here: {event}")
        paths = arguments[:2] if event == "os.rename" else arguments[:1]
        for path in paths:
            if event in ON_FILES and isinstance(path, (str, bytes)):
                path = os.path.realpath(os.fsdecode(path))
                allowed = writable if writes(event, arguments) else readable
                if not is_inside(path, allowed):
                    raise PermissionError(f"not allowed here: {event} of {path}")
    sys.addaudithook(hook)


def child():
    """Read the job from standard input, run it, and write the results."""
    job = json.loads(sys.stdin.read())
    nonce = job.pop("nonce")
    results = os.fdopen(job.pop("results"), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # Before the limits are set, because these imports open files and map memory.
    import hypothesis
    import pytest
    import torch  # noqa: F401

    # Only whether a test fails matters here. Finding the smallest example would take most of the
    # time.
    hypothesis.settings.register_profile(
        "grading", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        report_multiple_bugs=False)
    hypothesis.settings.load_profile("grading")

    def send(**record):
        results.write(nonce + json.dumps(record) + "\n")
        results.flush()

    folder = os.getcwd()
    sys.path.insert(0, folder)
    limit_process(job["seconds"])
    if job["guarded"]:
        guard(folder, os.environ["TMPDIR"])
    if job.get("mutant"):
        from classroom import wrong_answers
        wrong_answers.apply(job["mutant"])
    plugins = [Recorder(send, job)]
    if job.get("claim_seconds"):
        plugins.append(limited_calls(job["claim_seconds"]))
    # --tb=line shows the error and quotes no code. Parsing the test files for quotations takes
    # longer than most tests.
    flags = ["-q", "--tb=line", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    if job.get("stop"):
        flags.append("-x")
    code = pytest.main([*job["tests"], *flags], plugins)
    send(end="" if code in (0, 1) else f"pytest ended with {getattr(code, 'name', code)}")


if __name__ == "__main__":
    child()
