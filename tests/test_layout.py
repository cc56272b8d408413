"""The layout of the repository: which module may import which, and what the five files are about.

    pytest tests/test_layout.py
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Every module of a line may import those of earlier lines, and of its own line those before it.
ORDER = [
    "runtime.errors runtime.packing runtime.parallel runtime.files runtime.hub "
    "runtime.json_lines runtime.rows "
    "runtime.statistics runtime.report runtime.memory runtime.log runtime.run runtime.cli "
    "runtime.flags",
    "model",
    "data",
    "tasks.task tasks.prefixes tasks.own_file tasks.sampled tasks.reviews tasks.scalar_gpt "
    "tasks.sentiment tasks.imdb tasks.hh tasks.tldr tasks tasks.tokenizers tasks.flags "
    "tasks.checkpoint",
    "train_sft",
    "sample",
    "train_dpo",
    "experiments.plot experiments.squeezing experiments.best_of experiments.packed_row "
    "experiments.curves experiments.distribution experiments.reward_model experiments.ppo "
    "experiments.credit experiments.online experiments.probe experiments.frontier "
    "experiments.win_rate experiments.benchmark",
    "classroom.exercises classroom.rules classroom.probes classroom.sandbox classroom.child "
    "classroom.wrong_answers classroom.copies classroom.right_answers classroom.assignment "
    "classroom.course",
    "experiments.symptoms",             # trains with the wrong answers in place
]
MODULES = [module for line in ORDER for module in line.split()]
FIVE = ["model", "data", "train_sft", "train_dpo", "sample"]


def path_of(module):
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports_of(tree):
    """The modules of this repository that a syntax tree imports, with the nodes that do it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [member if member in MODULES else node.module for member in members]
        else:
            continue
        for name in names:
            if name in MODULES:
                yield name, node


def test_the_order_lists_every_module():
    """A new module has to be given its place."""
    folders = ["runtime", "tasks", "experiments", "classroom"]
    paths = [*ROOT.glob("*.py"), *(path for folder in folders
                                   for path in (ROOT / folder).glob("*.py"))]
    empty = {ROOT / folder / "__init__.py" for folder in ("runtime", "experiments", "classroom")}
    assert {path_of(module) for module in MODULES} == set(paths) - empty
    for path in empty:
        if path.exists():               # a docstring at most
            assert len(ast.parse(path.read_text()).body) <= 1


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    """So there is no cycle, and the five files need nothing from experiments or classroom. (The
    next test is about imports inside functions.)"""
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    for name, node in imports_of(tree):
        if node not in tree.body:
            continue
        assert MODULES.index(name) < MODULES.index(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_of_ours_is_imported_inside_a_function(module):
    """That would hide a cycle."""
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    inside = [name for name, node in imports_of(tree) if node not in tree.body]
    assert not inside


def test_nobody_imports_the_plumbing_of_train_sft():
    """Others import its update and its schedules, or run it as a command."""
    allowed = {"warmup", "cosine", "update", "grad_scaler"}
    for module in MODULES:
        for node in ast.walk(ast.parse(path_of(module).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "train_sft":
                assert {alias.name for alias in node.names} <= allowed, module


@pytest.mark.parametrize("module", FIVE)
def test_functions_of_the_five_files_fit_on_a_screen(module):
    """At most 60 lines with the docstring; lists of flags may be longer."""
    for node in ast.walk(ast.parse(path_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name != "parse_args":
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{module}.{node.name} has {lines} lines"


def public_names():
    """{name: the modules that define a function or class of that name}. A command has a main and a
    parse_args, and each training loop is called train."""
    found = {}
    for module in MODULES:
        for node in ast.parse(path_of(module).read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.setdefault(node.name, []).append(module)
    return {name: modules for name, modules in found.items()
            if name not in ("main", "parse_args", "train")}


def test_a_public_name_means_one_thing_in_the_whole_repository():
    """A reader who searches for a name finds the one that is meant."""
    defined = {name: modules for name, modules in public_names().items()
               if "classroom.wrong_answers" not in modules}
    assert {name: modules for name, modules in defined.items() if len(modules) > 1} == {}


def test_names_that_could_mean_two_things_are_not_used():
    """`rank` of a process or of an answer, `source` of a token or of a run, `number` a type or a
    number, `read` a file or a prompt; and a log-prob is not a score."""
    assert not set(public_names()) & {"rank", "source", "number", "parts", "keep", "take", "settle",
                                      "read", "score"}


def code_lines(node):
    """The lines of a function without its docstring, blank lines and comments."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    lines = ast.unparse(ast.Module(body, [])).splitlines()
    return len(lines)


def test_the_training_loop_of_dpo_is_twenty_lines_and_needs_twenty_names():
    """A student who reads it can write it again (exercise 10)."""
    tree = ast.parse(path_of("train_dpo").read_text(encoding="utf-8"))
    train, = (node for node in tree.body if getattr(node, "name", "") == "train")
    assert code_lines(train) <= 20
    names = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom)
             and node.module in MODULES for alias in node.names]
    assert len(names) <= 20, names


def test_the_ground_floor_knows_nothing_of_what_stands_on_it():
    """runtime/ imports nothing of the five files or tasks/, and its map names every module."""
    floor = [module for module in MODULES if module.startswith("runtime.")]
    for module in floor:
        for name, _ in imports_of(ast.parse(path_of(module).read_text(encoding="utf-8"))):
            assert name in floor, f"{module} imports {name}"
    listed = re.findall(r"^    (\w+) ", (ROOT / "runtime/__init__.py").read_text(), re.M)
    assert sorted(listed) == sorted(module.removeprefix("runtime.") for module in floor)


def test_the_reading_path_exists_and_is_short():
    """The table in the README: at most 450 lines of code, with docstrings and comments."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("## What to read"):readme.index("The rest, when")]
    rows = re.findall(r"^\| `(\w+)\.py` \| (.*?) \|", table, re.M)
    total = 0
    for module, cell in rows:
        tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
        if "docstring" in cell:
            total += len(ast.get_docstring(tree).splitlines())
        nodes = {node.name: node for node in ast.walk(tree)
                 if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for name in re.findall(r"`(\w+)`", cell):
            total += nodes[name].end_lineno - nodes[name].lineno + 1
    assert len(rows) == 5 and 250 < total <= 450


# Files that a user has or that a command writes, and that are named in a docstring.
NOT_OURS = {"EXERCISES.md", "tests/adapters.py", "my_tests.py", "symptoms.md"}


@pytest.mark.parametrize("module", MODULES)
def test_files_and_commands_named_in_docstrings_exist(module):
    """(tests/test_readme.py checks those in the documents.)"""
    path = path_of(module)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            continue
        text = ast.get_docstring(node) or ""
        for name in set(re.findall(r"[\w/-]+\.(?:py|md)\b", text)) - NOT_OURS:
            assert (ROOT / name).exists() or (path.parent / name).exists(), name
        for name in re.findall(r"python -m ([\w.]+)", text):
            assert path_of(name).exists(), name
