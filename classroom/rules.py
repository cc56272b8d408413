"""What the grader reads of a submission, and what it refuses.

    from classroom.rules import submitted
    text = submitted(folder, "train_dpo", "dpo_loss")       # raises UserError, which says why not

Only the graded functions are read, from the syntax trees of their files. A function may use what
our module imports and what the student's file imports at its top, as far as MODULES allows it. The
tests run in the same process as the submission, so code that can reach the interpreter can rewrite
the tests; no mathematical function needs that, and such code is not run at all.

`pytest --exercise` applies the same rules, so that students see them before they hand in.
"""

import ast
import builtins
import os
import stat
import symtable

from classroom.exercises import functions, is_unwritten, parse, path_of, relative_path
from runtime.errors import UserError

LARGEST_SOURCE = 1 << 20            # bytes
DEEPEST = 4                         # folders above a submitted file

# The modules that a solution may import, and the names and attributes that it must not use.
MODULES = {"math", "torch", "torch.nn", "torch.nn.functional", "torch.nn.utils", "numpy", "typing",
           "itertools", "functools", "collections", "collections.abc", "__future__"}
NAMES = set("exec eval compile open input breakpoint exit quit getattr setattr delattr globals "
            "locals vars dir memoryview help copyright credits license sys os".split())
ATTRIBUTES = set(
    "sys os io builtins importlib inspect ctypes gc subprocess socket threading multiprocessing "
    "signal pathlib pickle shutil tempfile traceback warnings testing hub load save jit fx ops "
    "classes package serialization distributed library export overrides from_file "
    "fromfile memmap tofile ctypeslib f2py lib modules gi_frame gi_code cr_frame tb_frame f_back "
    "f_globals f_locals f_builtins".split())


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def locate(folder, module):
    """The path of a module's file in a submission. It need not be at its place: a folder more or
    less does not matter. Raises UserError if there is no such file, or several."""
    wanted = relative_path(module)
    if os.path.lexists(folder / wanted):
        return folder / wanted
    found = []
    for parent, folders, files in os.walk(folder):
        depth = len(os.path.relpath(parent, folder).split(os.sep))
        folders[:] = [name for name in sorted(folders) if depth < DEEPEST
                      and not name.startswith((".", "__MACOSX"))]
        if wanted.name in files:
            found.append(type(folder)(parent) / wanted.name)
    found = [path for path in found if path.parts[-len(wanted.parts):] == wanted.parts] or found
    if not found:
        raise UserError(f"there is no file {wanted.as_posix()}")
    if len(found) > 1:
        names = ", ".join(path.relative_to(folder).as_posix() for path in found)
        raise UserError(f"there are several files {wanted.name} ({names}): hand in only one")
    return found[0]


def read_submission(path):
    """The text of a submitted file. Raises UserError. Links are not followed, because they could
    lead to our own file; pipes are not read, because that might never end."""
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):       # those that the platform has
        flags |= getattr(os, name, 0)
    try:
        file = os.open(path, flags)
        with open(file, "rb") as opened:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_SOURCE:
                raise UserError(f"{path.name} is not a file of at most a megabyte")
            return opened.read().decode("utf-8-sig")            # Windows likes to begin with a BOM
    except OSError as error:
        raise UserError(f"{path.name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} is not UTF-8 text: save it as UTF-8") from error


# ------------------------------------------------------------------------------------------------
# Functions
# ------------------------------------------------------------------------------------------------


def submitted(folder, module, name):
    """The text of one submitted function, without its type annotations, and with those imports at
    the top of its file that it needs. Raises UserError, which says what is wrong with it."""
    text = read_submission(locate(folder, module))
    file = relative_path(module).as_posix()
    try:
        node = functions(text).get(name)
        if node is None:
            raise UserError(f"there is no function {name} in {file}")
        if is_unwritten(node):
            raise UserError(f"{name} is not written yet")
        return text_to_grade(node, name, parse(text), file, module)
    except SyntaxError as error:
        line = f", {error.text.strip()!r}" if error.text else ""
        raise UserError(f"{file}, line {error.lineno}{line}: not Python: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{file} cannot be parsed") from error


def text_to_grade(node, name, file_tree, file, module):
    """The text of a function, from its syntax tree and that of its file, as `submitted` returns it.
    Raises UserError."""
    without_annotations(node)
    for complaint in complaints(node):
        raise UserError(f"{name}, line {complaint}")
    add_imports(node, name, file_tree, file, names_at_top(parse(our_text(module))))
    return ast.unparse(node)


def our_text(module):
    return path_of(module).read_text(encoding="utf-8")


def without_annotations(function):
    """Remove the type annotations of a function in place. They change nothing, but may need names
    that only the student's file imports."""
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        for _, value in ast.iter_fields(node):
            if isinstance(value, list):
                value[:] = [assignment_of(item) for item in value]


def assignment_of(statement):
    """`x: T = 1` as `x = 1`, and `x: T` as `pass`. Everything else stays as it is."""
    if not isinstance(statement, ast.AnnAssign):
        return statement
    if statement.value is None:
        return ast.copy_location(ast.Pass(), statement)
    return ast.copy_location(ast.Assign([statement.target], statement.value), statement)


def add_imports(function, name, file_tree, file, ours):
    """Copy into a function those imports at the top of the student's file whose names it uses and
    our module does not have. Raises UserError for other names that only that file defines."""
    missing = global_names(function) - ours - set(dir(builtins)) - {function.name}
    imports = []
    for node in file_tree.body:
        defined = names_at_top(ast.Module([node], [])) & missing
        if not defined:
            continue
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            raise UserError(f"{name} uses {min(defined)}, which {file} defines outside of it: only "
                            "the function itself is graded, so define it inside")
        complaint = complaint_about_import(node)
        if complaint:
            raise UserError(f"{name} needs line {node.lineno} of {file}, which {complaint}; no "
                            "solution needs it")
        imports.append(node)
    at = 1 if ast.get_docstring(function) is not None else 0
    function.body[at:at] = imports


def names_at_top(tree):
    """The names that a module defines at its top level."""
    found = set()
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        else:
            found |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)
                      and isinstance(inner.ctx, ast.Store)}
    return found


def global_names(function):
    """The names that a function looks up outside of itself: in its module, or among Python's own.
    A parameter or a variable of the function is not one of them, whatever it is called."""
    found, tables = set(), [symtable.symtable(ast.unparse(function), "", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_global() or (symbol.is_referenced() and table.get_type() != "function"):
                found.add(symbol.get_name())
    return found


def complaints(function):
    """Yield what is not allowed in the syntax tree of a solution, as "line: what is wrong"."""
    for node in ast.walk(function):
        complaint = complaint_about(node)
        if complaint:
            yield f"{getattr(node, 'lineno', function.lineno)}: {complaint}; no solution needs it"
    forbidden = global_names(function) & NAMES
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in forbidden:
            yield f"{node.lineno}: uses {node.id}; no solution needs it"


def complaint_about(node):
    """What is wrong with one node of a syntax tree, or None, apart from the names in NAMES."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return complaint_about_import(node)
    if isinstance(node, ast.Attribute):
        if node.attr in ATTRIBUTES or node.attr.startswith("_") and node.attr != "__getitem__":
            return f"uses .{node.attr}"
        if not isinstance(node.ctx, ast.Load) and node.attr not in ("grad", "data"):
            return f"changes .{node.attr}"
    if isinstance(node, ast.Name) and node.id.startswith("__"):
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
