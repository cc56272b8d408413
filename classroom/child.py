"""The process in which sandbox.py runs tests. Run as a script, never imported.

It imports PyTorch and pytest once, which takes most of the time, and then forks for each run. The
fork sets its limits and only then imports the code under test. Nothing of classroom/ is imported
here, because the code under test may be another copy of this repository.
"""

import functools
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import hypothesis
import numpy  # noqa: F401
import pytest
import torch  # noqa: F401

MEMORY = 2 << 30            # bytes that the code under test may use in addition to PyTorch
LARGEST_FILE = 1 << 26      # bytes


class Stopped(BaseException):
    """Ends a test from outside. It is not an Exception, so neither hypothesis nor the code under
    test handles it as an error of its own."""


class Recorder:
    """A pytest plugin that passes the outcome of each test to `send`. skip: names of tests to leave
    out. seed: what hypothesis draws its examples from; without one, they are always the same."""

    def __init__(self, send, skip, seed):
        self.send, self.skip, self.seed = send, set(skip), seed

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.originalname not in self.skip]
        for item in items:
            if self.seed is not None and hypothesis.is_hypothesis_test(item.function):
                hypothesis.seed(self.seed)(item.function)

    def pytest_collectreport(self, report):
        if report.failed:
            self.send(claim=report.nodeid, outcome="error", details=details(report))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.send(claim=report.nodeid, outcome=report.outcome, details=details(report))


def limited_calls(seconds):
    """A pytest plugin that gives each test this many seconds and does not let it end the session.
    """
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
    """What went wrong: what tests/conftest.py found out about it. Otherwise what pytest says,
    without the code around it: the lines that it marks with E, and the indented ones after them."""
    if getattr(report, "details", None):
        return "\n".join([*report.details, *getattr(report, "likely", [])])[:1500]
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


def call_by_name(target, *arguments):
    """Call a function that is named as "package.module.function"."""
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)(*arguments)


def run_tests(run, send):
    """Run the tests of one run, a dict with the fields of sandbox.TestRun, in this process."""
    folder, scratch = run["folder"], run["scratch"]
    os.environ |= {"HOME": scratch, "TMPDIR": scratch, "HYPOTHESIS_STORAGE_DIRECTORY": scratch}
    tempfile.tempdir = None                 # forget the one of before
    os.chdir(folder)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # Only whether a test fails matters here. Finding the smallest example would take most of the
    # time.
    hypothesis.settings.register_profile(
        "grading", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        report_multiple_bugs=False)
    hypothesis.settings.load_profile("grading")
    limit_process(run["seconds"])
    if run["guarded"]:
        sys.dont_write_bytecode = True
        guard(folder, scratch)
    if run["before"]:
        call_by_name(*run["before"])
    plugins = [Recorder(send, run["skip"], run["seed"])]
    if run["claim_seconds"]:
        plugins.append(limited_calls(run["claim_seconds"]))
    # --tb=line shows the error and quotes no code. Parsing the test files for quotations takes
    # longer than most tests.
    flags = ["-q", "--tb=line", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    if run["stop"]:
        flags.append("-x")
    code = pytest.main([*run["tests"], *flags], plugins)
    send(end="" if code in (0, 1) else f"pytest ended with {getattr(code, 'name', code)}")


def how_it_ended(status):
    """The status of a process that has ended, in words."""
    code = os.waitstatus_to_exitcode(status)
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class Server:
    """Forks for each run of a job, at most job["jobs"] at a time. What the runs find is appended to
    a file, in lines that begin with a nonce."""

    def __init__(self, job):
        self.job = job
        self.going = {}             # {process: (run, deadline)}

    def send(self, k, **record):
        line = self.job["nonce"] + json.dumps({"run": k} | record) + "\n"
        os.write(self.job["results"], line.encode())

    def start(self, k):
        """Fork for run k."""
        run = self.job["runs"][k]
        process = os.fork()
        if process == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setpgid(0, 0)
            try:
                run_tests(run, functools.partial(self.send, k))
            finally:
                os._exit(0)
        self.going[process] = k, time.monotonic() + run["seconds"]

    def remove_ended(self):
        """Forget the processes that have ended, and end those whose time is over."""
        for process, (k, deadline) in list(self.going.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                reason = f"the process ended before its tests did ({how_it_ended(status)})"
            elif time.monotonic() > deadline:
                reason = f"stopped after {self.job['runs'][k]['seconds']:g} seconds"
            else:
                continue
            kill_group(process)
            if not ended:
                os.waitpid(process, 0)
            del self.going[process]
            self.send(k, ended=reason)

    def terminate(self, *_):
        for process in self.going:
            kill_group(process)
        os._exit(1)

    def serve(self):
        waiting = list(range(len(self.job["runs"])))
        while waiting or self.going:
            while waiting and len(self.going) < self.job["jobs"]:
                self.start(waiting.pop(0))
            self.remove_ended()
            time.sleep(0.02)


def kill_group(process):
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)


def main():
    """Read the job from standard input and do it."""
    job = json.loads(sys.stdin.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path.pop(0)                         # the folder of this file
    if job["load"]:
        sys.path.insert(0, job["runs"][0]["folder"])
        call_by_name(job["load"])
    server = Server(job)
    signal.signal(signal.SIGTERM, server.terminate)
    server.serve()


if __name__ == "__main__":
    main()
