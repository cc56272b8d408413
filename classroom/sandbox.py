"""Tests in a process of their own, with limits: what wrong_answers.py and assignment.py grade with.

    outcome = run(folder, ["tests/test_model.py"], seconds=60)
    outcome.claims      {"tests/test_model.py::test_x": ("passed" | "failed" | ..., words)}
    outcome.end         "" if the run came to its end, else why it did not, in words

The parent (`run`) starts this file once more in `folder`; the child imports PyTorch and pytest,
limits itself, and only then imports the code under test. A child is believed only where a line
begins with a nonce, drawn by the parent for this run and kept out of the environment, the command
line and the files; what the code under test prints goes nowhere.

Guarded (for code written by somebody else) it also may not read or write outside its folder and
Python's own, start processes or open connections: an audit hook refuses, and where `unshare` works
there is no network and no other process to see. The hook is Python's and so are its limits: code
that is out to break it, by way of native code, will. Left out on purpose: containers. For a class
that you do not trust, run the whole grader in one.
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

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 2 << 30            # bytes that the code under test may take beyond PyTorch itself
LARGEST_FILE = 1 << 26


@dataclass
class Outcome:
    claims: dict            # {node id: (outcome, words)}
    end: str                # why the run did not come to its end, or ""


# -- the parent ----------------------------------------------------------------------------------


def run(folder, tests, seconds, guarded=False, **job):
    """Run tests (node ids, relative to folder) for at most so many seconds.

    job: what `child` reads: mutant, a name in wrong_answers.py; stop, at the first failure; skip, names
    of tests to leave out; claim_seconds, the limit of a single test.
    """
    nonce = secrets.token_hex(16)
    job |= {"tests": list(tests), "seconds": seconds, "guarded": guarded, "nonce": nonce}
    with tempfile.TemporaryFile() as results, tempfile.TemporaryDirectory() as scratch:
        job["results"] = results.fileno()
        command = [*(isolation() if guarded else []), sys.executable, "-B", "-s", "-m",
                   "classroom.sandbox"]
        process = subprocess.Popen(
            command, cwd=folder, env=environment(scratch), stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[results.fileno()],
            start_new_session=True)
        late = False
        try:
            process.communicate(json.dumps(job).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            kill_all_of(process)
        results.seek(0)
        records = [json.loads(line[len(nonce):]) for line in results.read().decode(
            errors="replace").splitlines() if line.startswith(nonce)]
    claims, end = {}, None
    for record in records:
        if "end" in record:
            end = record["end"]
        elif claims.get(record["claim"], ("passed",))[0] == "passed":   # the first failure stays
            claims[record["claim"]] = record["outcome"], record["words"]
    if end is None:
        end = (f"stopped after {seconds:g} seconds" if late else
               f"the process ended before its tests did ({how_it_ended(process.returncode)})")
    return Outcome(claims, end)


def environment(scratch):
    """Nothing of the parent's that is not needed: keys and paths are not the child's business."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
            if name in os.environ}
    return kept | {"HOME": scratch, "TMPDIR": scratch, "HYPOTHESIS_STORAGE_DIRECTORY": scratch,
                   "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@functools.cache
def isolation():
    """The words before a command that take network and other processes from it, or none where this
    machine does not allow it. When the child ends, so does whatever it has started."""
    words = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child",
             "sh", "-c", '"$@"; exit $?', "sh"]     # a shell first: process 1 is deaf to signals
    if not shutil.which(words[0]):
        return []
    works = subprocess.run([*words, "true"], capture_output=True).returncode == 0
    return words if works else []


def kill_all_of(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def how_it_ended(code):
    number = -code if code < 0 else code - 128      # unshare passes a signal on as a shell does
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:
        return f"exit code {code}"


def source_files(*packages):
    """The paths of the five files at the top and of the modules in these folders."""
    paths = [*ROOT.glob("*.py")]
    for package in packages:
        paths += (ROOT / package).glob("*.py")
    return sorted(paths)


def copy_sources(folder, tests=(), tools=()):
    """Copy the five files and what they import, some tests, and what it takes to run them (with
    these further tools) to an empty folder."""
    for path in source_files("runtime", "tasks"):
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
    """Ends a test from outside. No Exception, so that neither hypothesis nor the code under test
    takes it for something that it could handle."""


class Recorder:
    """A pytest plugin that gives what each test did to `send`."""

    def __init__(self, send, job):
        self.send, self.skip = send, set(job.get("skip", ()))

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.originalname not in self.skip]

    def pytest_collectreport(self, report):
        if report.failed:
            self.send(claim=report.nodeid, outcome="error", words=words(report))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.send(claim=report.nodeid, outcome=report.outcome, words=words(report))


def limited_calls(seconds):
    """A plugin: each test has so many seconds, and can't end the session."""
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


def words(report):
    """What pytest says went wrong, without the code around it: the lines that it marks with E."""
    text = report.longreprtext.splitlines()
    lines = [line[1:].strip() for line in text if line[:1] == "E"] or text[-6:]
    return "\n".join(line[:160] for line in lines if line)[:1500]


def limit_process(seconds):
    """CPU time, memory, files: of the process itself, so that the system enforces them."""
    import resource
    seconds = int(seconds) + 10
    with open("/proc/self/statm") if os.path.exists("/proc/self/statm") else open(os.devnull) as f:
        pages = f.read().split()
    limits = [(resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0),
              (resource.RLIMIT_FSIZE, LARGEST_FILE)]
    if pages:
        limits.append((resource.RLIMIT_AS, int(pages[0]) * resource.getpagesize() + MEMORY))
    for kind, limit in limits:
        resource.setrlimit(kind, (limit, limit))


FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn",
             "os.spawn", "os.kill", "os.chmod", "os.chown", "os.link", "os.symlink",
             "ctypes.dlopen", "ctypes.dlsym", "ctypes.cdata", "gc.get_objects",
             "resource.setrlimit", "shutil.", "webbrowser.", "urllib.", "ftplib.", "smtplib.")
ON_FILES = ("open", "os.listdir", "os.scandir", "os.chdir", "os.rename", "os.remove", "os.mkdir",
            "os.rmdir", "os.truncate", "os.utime")


def guard(folder, scratch):
    """Refuse, for the rest of this process, what no test of a function needs."""
    own = [os.path.realpath(path) for path in (folder, scratch, os.devnull)]
    readable = own + [os.path.realpath(path) for path in {
        sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.__file__),
        "/dev/urandom", *(p for p in sys.path if p.endswith("-packages"))}]

    def inside(path, folders):
        return any(path == folder or path.startswith(folder + os.sep) for folder in folders)

    def hook(event, arguments):
        if event.startswith(FORBIDDEN) and not event.startswith("shutil.rmtree"):
            raise PermissionError(f"not allowed here: {event}")
        if event in ON_FILES and arguments and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            mode = arguments[1] if event == "open" else None
            writes = event.startswith(("os.r", "os.m", "os.t", "os.u")) or (
                isinstance(mode, str) and set(mode) & set("wax+"))
            if not inside(path, own if writes else readable):
                raise PermissionError(f"not allowed here: {event} of {path}")
    sys.addaudithook(hook)


def child():
    """Read the job from standard input, run it, write what happened."""
    job = json.loads(sys.stdin.read())
    nonce, results = job.pop("nonce"), os.fdopen(job.pop("results"), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    import hypothesis               # before the limits: these may open and map what they like
    import pytest
    import torch                                                                    # noqa: F401
    # Whether a test fails is the question here; the smallest example would take most of the time.
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
    flags = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    code = pytest.main([*job["tests"], *flags, *(["-x"] if job.get("stop") else [])], plugins)
    send(end="" if code in (0, 1) else f"pytest ended with {getattr(code, 'name', code)}")


if __name__ == "__main__":
    child()
