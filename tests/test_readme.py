"""What the README, the pages of docs/ and CONTRIBUTING.md say, checked: a claim that nothing tests
rots.

    pytest tests/test_readme.py
"""

import functools
import importlib
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import train_dpo
import train_sft
from classroom.exercises import is_a_students_copy
from experiments import benchmark
from model import GPT, GPTConfig
from tasks.checkpoint import save_checkpoint
from tasks.tokenizers import get_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md",
                      *sorted((ROOT / "docs").glob("*.md"))]}
FOLDERS = [".", "runtime", "tasks", "experiments", "classroom", "tests"]
FILES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))}
SOURCES = "\n".join(FILES.values())
# Every module that can be run, as it is written after "python".
SCRIPTS = {name if "/" not in name else f"-m {module_name}": module_name
           for name, source in FILES.items() if re.search(r"^def parse_args", source, re.M)
           for module_name in [name.removesuffix(".py").replace("/", ".")]}
# Commands that are not ours.
INSTALLATION = ["pip install -r requirements.txt", "pip install matplotlib",
                "pip install ruff==0.17.6", "ruff check ."]

# Of files, which are checked apart from other names.
ENDINGS = (".pt", ".csv", ".json", ".jsonl", ".svg", ".txt", ".md")

on_every_page = pytest.mark.parametrize("page", PAGES)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.S | re.M)


@functools.cache
def in_backquotes(page):
    """What stands in backquotes in the text of a page, outside of its blocks of code."""
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.S | re.M)
    return set(re.findall(r"`([^`\n]+)`", text))


def commands(page):
    """Every command of a page: the lines of its bash blocks without their comments, and what is in
    backquotes and begins like one; those joined by && separately."""
    lines = [line for block in blocks(page, "bash")
             for line in block.replace("\\\n", " ").splitlines()]
    lines += [code for code in in_backquotes(page)
              if code.startswith(("python ", "pytest", "pip "))]
    return [part.strip() for line in lines for part in line.split("#")[0].split("&&")
            if part.strip()]


def script_of(words):
    """(the script, its own words) of the words after "python"."""
    n = 2 if words[0] == "-m" else 1
    return " ".join(words[:n]), words[n:]


def anchors(page):
    """The anchors of a page's headings, as GitHub forms them."""
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", PAGES[page], re.M)}


# ------------------------------------------------------------------------------------------------
# Commands and flags
# ------------------------------------------------------------------------------------------------


@on_every_page
def test_every_command_is_one_that_this_repository_understands(page, monkeypatch):
    """Parsed by the script's own parser, without the two words of torchrun; files of tests that
    pytest is pointed to exist. One command needs TRL, which is not a requirement."""
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: name)
    for line in commands(page):
        program, *words = shlex.split(line)
        if program == "torchrun":
            assert words[0] == "--nproc_per_node" and words[1].isdecimal(), line
            program, *words = "python", *words[2:]
        if program == "python":
            script, flags = script_of(words)
            importlib.import_module(SCRIPTS[script]).parse_args(flags)
        elif program == "pytest":
            files = [word for word in words if not word.startswith("-") and word != "gpu"]
            assert all((ROOT / file).exists() for file in files), line      # gpu is a marker
        else:
            assert line in INSTALLATION, line


def test_every_script_is_shown_with_a_command():
    """On one of the pages at least."""
    shown = {script_of(words[1:])[0] for page in PAGES for line in commands(page)
             if (words := shlex.split(line))[0] == "python"}
    assert shown == set(SCRIPTS)


@on_every_page
def test_every_flag_exists(page):
    text = PAGES[page].replace("torchrun --nproc_per_node", "")
    for flag in set(re.findall(r"(?<![\w-])(--[a-z][a-z-]*)", text)) - {"--help"}:
        assert f'"{flag}"' in SOURCES, flag


# ------------------------------------------------------------------------------------------------
# Files, links and names
# ------------------------------------------------------------------------------------------------


@on_every_page
def test_every_file_exists_or_is_one_that_a_run_writes(page):
    for name in {word for code in in_backquotes(page)
                 for word in re.findall(r"[\w/.-]+\.\w+", code)}:
        if name.endswith(".py"):
            assert [*ROOT.glob(name), *ROOT.glob(f"*/{name}")], name
        elif name.endswith(".toml"):                # left out of a student's copy
            assert (ROOT / name).exists() or is_a_students_copy(), name
        elif name.endswith(ENDINGS):
            last = name.split("/")[-1]
            assert (ROOT / name).exists() or last in SOURCES, name
    for folder in {code for code in in_backquotes(page) if re.fullmatch(r"[\w/]+/", code)}:
        assert (ROOT / folder).is_dir() or folder.startswith("out/"), folder


@on_every_page
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(page):
    """Relative to the page, so that it works on GitHub and in a clone."""
    for found in re.findall(r"\]\(([^)\s]+)\)|src(?:set)?=\"([^\"]+)\"", PAGES[page]):
        target = "".join(found)
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = os.path.normpath(Path(page).parent / path) if path else page
        assert (ROOT / linked).exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_readme_links_to_every_page():
    for page in set(PAGES) - {"README.md"}:
        assert f"]({page}" in PAGES["README.md"], page


@on_every_page
def test_every_name_in_backquotes_occurs_in_the_code(page):
    """Functions and tests have to be defined; other single words must at least be in a source."""
    for code in in_backquotes(page):
        called = re.fullmatch(r"(?:\w+\.)?(\w+)\(.*\)", code)
        if called or re.fullmatch(r"test_\w+", code):
            name = called[1] if called else code
            assert re.search(rf"(def|class) {name}\b", SOURCES), code
        elif re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", code) and not code.endswith((*ENDINGS, ".toml")):
            for part in code.split("."):
                assert re.search(rf"\b{part}\b", SOURCES), code


def test_functions_and_tests_of_the_paper_table_are_where_it_says():
    """In the cells, names are followed by "in" and their file; without one, functions are in
    train_dpo.py and tests in test_mathematics.py."""
    rows = re.findall(r"^\| (?:A|B|C|D)[.:\d].*$", PAGES["docs/paper.md"], re.M)
    assert len(rows) >= 16
    for row in rows:
        _, functions, tests = row.strip("|").split("|")
        assert "`" in functions and "`" in tests, row
        for cell, file in ((functions, "train_dpo.py"), (tests, "tests/test_mathematics.py")):
            for part in cell.split(";"):
                named = re.search(r" in `([\w/]+\.py)`", part)
                source = FILES[named[1] if named else file]
                for name in re.findall(r"`(\w+)`", part):
                    assert re.search(rf"^def {name}\b", source, re.M), name


# ------------------------------------------------------------------------------------------------
# Code
# ------------------------------------------------------------------------------------------------


def test_code_that_is_quoted_is_in_the_source_line_by_line():
    """The loss and the step that the pages show are those that run. Code to be typed, which imports
    what it needs, is not a quotation."""
    lines = {line.strip() for line in SOURCES.splitlines()}
    quoted = [line for page in PAGES for block in blocks(page, "python")
              if not block.startswith("from ") for line in block.splitlines() if line.strip()]
    assert quoted
    for line in quoted:
        assert line.strip() in lines, line


def test_a_checkpoint_is_loaded_by_hand_as_it_says(tmp_path, monkeypatch, capsys):
    tokenizer = get_tokenizer("reviews")
    (tmp_path / "out" / "reviews").mkdir(parents=True)
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "out" / "reviews" / "dpo.pt",
                    GPT(GPTConfig(64, tokenizer.n_vocab, 1, 2, 16)), tokenizer="reviews")
    monkeypatch.chdir(tmp_path)
    code, = (block for page in PAGES for block in blocks(page, "python")
             if "load_checkpoint" in block)
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_the_loop_of_ones_own_learns(capsys):
    """It starts at log 2 and learns that good is better than dull."""
    code, = (block for block in blocks("docs/questions.md", "python"))
    torch.manual_seed(0)
    found = {}
    exec(code, found)
    assert found["losses"].mean() < 0.1 and len(found["losses"]) == 20
    assert "tensor" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------------


def plain(value):
    """A number as the pages and --help write it: 5e-3 and 1e-6, but 0.1 and 50."""
    if value < 1e-2:
        return np.format_float_scientific(value, trim="-", exp_digits=1)
    return f"{value:g}"


def test_the_defaults_that_are_quoted_are_the_defaults():
    """Sentences with the numbers of the code filled in; line breaks do not count."""
    reviews, own = train_dpo.parse_args([]), train_dpo.parse_args(["--data", "pairs.jsonl"])
    sft = train_sft.parse_args([])
    text = " ".join(" ".join(PAGES.values()).split())
    for sentence in [
            f"A grammar writes {sft.reviews:,} film reviews",
            f"{reviews.prefixes:,} beginnings four times each",
            f"{reviews.eval_prompts:,} held-out prompts, one sample each",
            f"the paper's {plain(own.lr)} and {plain(own.beta)}, which are the defaults of "
            "`--data`",
            f"so its learning rate is {plain(reviews.lr)}",
            f"Its beta is {plain(reviews.beta)}",
            f"before the warm-up ends at step {own.warmup}",
            f"written every {plain(reviews.save_every)} minutes (`--save-every`)"]:
        assert sentence in text, sentence
    assert reviews.samples == 4


@pytest.mark.parametrize("script, sentences", [
    (train_dpo, ["default 150; {warmup} for reviews",
                 "default 0.1; {beta:g} for reviews, imdb-small, tldr",
                 "default 1e-6; {lr} for reviews, imdb-small",
                 "default 25,000; {prefixes:,} for reviews",
                 "default {gap:g}; 0.5 for imdb, imdb-small"]),
    (train_sft, ["default {reviews:,}, written first", "default 2e-5; {lr:g} for reviews",
                 "default {n_layer}; 6 for imdb-small", "default {n_head}; 8 for imdb-small",
                 "default {n_embd}; 256 for imdb-small",
                 "default {init_std:g}; 0.03 for imdb-small"])])
def test_help_names_the_defaults_of_the_reviews(script, sentences, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")      # argparse also breaks lines at hyphens
    defaults = vars(script.parse_args([]))
    if script is train_dpo:
        defaults["lr"] = plain(defaults["lr"])
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for sentence in sentences:
        assert sentence.format(**defaults) in shown, sentence


def test_settings_that_are_called_the_defaults_are_the_defaults():
    """Giving them changes nothing of what is parsed."""
    rows = [row for page in PAGES for row in re.findall(
        r"^\| (SFT|DPO)\b[^|]*\| `([^`]+)` \| ([^|]*) \|$", PAGES[page], re.M)]
    assert [name for name, _, _ in rows] == ["SFT", "DPO"]
    for name, flags, of_tldr in rows:
        module = train_sft if name == "SFT" else train_dpo
        others = " ".join(re.findall(r"`([^`]+)`", of_tldr))
        for task, words in (("hh", flags), ("tldr", f"{flags} {others}")):
            given = ["--task", task, *shlex.split(words)]
            assert module.parse_args(given) == module.parse_args(["--task", task]), (name, task)


def test_the_table_of_numbers_has_every_column_that_is_logged_and_measured():
    """What a reader sees on the screen is explained: COLUMNS, and what --evaluate reports."""
    explained = {name for row in re.findall(r"^\| (`[^|]*) \|", PAGES["docs/measuring.md"], re.M)
                 for name in re.findall(r"`(\w+)`", row)}
    measured = ("reward kl win_rate well_formed length finished distinct_n accuracy logp_accuracy "
                "margin kl_bound")
    for name in {*train_dpo.COLUMNS, *train_sft.COLUMNS, *measured.split()}:
        assert name in explained, name


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------


def test_pictures_can_be_read_on_light_and_on_dark_pages():
    """No picture has a background, and its letters are of middling brightness."""
    pictures = {os.path.normpath(Path(page).parent / target) for page in PAGES
                for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", PAGES[page])}
    assert pictures == {path.relative_to(ROOT).as_posix() for path in ROOT.glob("assets/*")}
    for path in pictures:
        picture = (ROOT / path).read_text(encoding="utf-8")
        patch = picture[picture.index('<g id="patch_1">'):]
        assert "fill: none" in patch[:patch.index("</g>")], path
        for colour in set(re.findall(r"(?:fill|stroke): #(\w{6})", picture)):
            r, g, b = (int(colour[i:i + 2], 16) / 255 for i in (0, 2, 4))
            light = sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
                        for w, c in ((0.2126, r), (0.7152, g), (0.0722, b)))
            # WCAG's contrast with white, and with GitHub's dark page: 3 is enough for graphics.
            assert 1.05 / (light + 0.05) >= 3 and (light + 0.05) / (0.0056 + 0.05) >= 3, colour
