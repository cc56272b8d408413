"""What the README says, checked: a claim that nothing tests rots.

    pytest tests/test_readme.py
"""

import re
import shlex
from pathlib import Path

import torch

import assignment
import benchmark
import data
import mutants
import sample
import train_dpo
import train_sft
from data import get_tokenizer
from experiments import curves, frontier, win_rate
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"data.py": data, "train_sft.py": train_sft, "train_dpo.py": train_dpo,
           "sample.py": sample, "-m experiments.frontier": frontier,
           "tests/assignment.py": assignment, "tests/mutants.py": mutants,
           "tests/benchmark.py": benchmark,
           "-m experiments.curves": curves, "-m experiments.win_rate": win_rate}
SOURCES = "\n".join(path.read_text(encoding="utf-8") for folder in (".", "tests", "experiments")
                    for path in sorted((ROOT / folder).glob("*.py")))
WITHOUT_BLOCKS = re.sub(r"^```.*?^```", "", TEXT, flags=re.S | re.M)
INLINE = set(re.findall(r"`([^`\n]+)`", WITHOUT_BLOCKS))


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.S | re.M)


def commands():
    """Every command of the README: lines of bash blocks without their comment, and what stands in
    backquotes and begins like one; those joined by && apart."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines += [code for code in INLINE if code.startswith(("python ", "pytest", "pip "))]
    return [part.strip() for line in lines for part in line.split("#")[0].split("&&")
            if part.strip()]


def test_every_command_is_one_that_this_repository_understands(tmp_path, monkeypatch):
    """Parsed by the script's own parser, torchrun's two words left away; files of tests that pytest
    is pointed to are there. One of them needs TRL, which is no requirement."""
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: name)
    seen = set()
    for line in commands():
        program, *words = shlex.split(line)
        if program == "torchrun":
            assert words[0] == "--nproc_per_node" and words[1].isdecimal(), line
            program, *words = "python", *words[2:]
        if program == "python":
            script = " ".join(words[:2]) if words[0] == "-m" else words[0]
            SCRIPTS[script].parse_args(words[len(script.split()):])
            seen.add(script)
        elif program == "pytest":
            assert all((ROOT / word).exists() for word in words if not word.startswith("-")), line
        else:
            assert line in ("pip install -r requirements.txt", "pip install matplotlib"), line
    assert seen == set(SCRIPTS)


def test_every_flag_exists():
    text = TEXT.replace("torchrun --nproc_per_node", "")
    for flag in set(re.findall(r"(?<![\w-])(--[a-z][a-z-]*)", text)) - {"--help"}:
        assert f'"{flag}"' in SOURCES, flag


def test_every_file_exists_or_is_one_that_a_run_writes():
    for name in {word for code in INLINE for word in re.findall(r"[\w/.-]+\.\w+", code)}:
        if name.endswith(".py"):
            assert [*ROOT.glob(name), *ROOT.glob(f"*/{name}")], name
        elif name.endswith((".pt", ".csv", ".json", ".svg", ".txt")):
            last = name.split("/")[-1]
            assert (ROOT / name).exists() or last in SOURCES, name
    for target in re.findall(r"\]\(([^)#]+)\)|src(?:set)?=\"([^\"]+)\"", TEXT):
        path = "".join(target)
        assert path.startswith("https://") or (ROOT / path).exists(), path


def test_every_link_within_the_page_has_its_heading():
    headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
                for title in re.findall(r"^#+ (.*)$", TEXT, re.M)}
    for anchor in re.findall(r"\]\(#([^)]+)\)", TEXT):
        assert anchor in headings, anchor


def test_every_name_in_code_letters_occurs_in_the_code():
    """Functions and tests have to be defined; other single words must at least be in a source."""
    for code in INLINE:
        called = re.fullmatch(r"(?:\w+\.)?(\w+)\(.*\)", code)
        if called or re.fullmatch(r"test_\w+", code):
            name = called[1] if called else code
            assert re.search(rf"(def|class) {name}\b", SOURCES), code
        elif re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", code):
            for part in code.split("."):
                assert re.search(rf"\b{part}\b", SOURCES), code


def test_functions_of_the_paper_table_are_defined():
    section = TEXT.split("## From the paper to the code")[1]
    rows = re.findall(r"^\| (?:A|B|C)[.:\d].*$", section, re.M)
    assert len(rows) >= 12
    for row in rows:
        _, functions, _ = row.strip("|").split("|")
        for name in re.findall(r"`(\w+)`", functions):
            assert re.search(rf"^def {name}\b", SOURCES, re.M), name


def test_code_that_is_quoted_stands_so_in_the_source():
    """Line by line: the loss and the step of the README are those that run."""
    lines = {line.strip() for line in SOURCES.splitlines()}
    quoted = [line for block in blocks("python") if "load_checkpoint" not in block
              and "transformers" not in block for line in block.splitlines() if line.strip()]
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
    code, = (block for block in blocks("python") if "load_checkpoint" in block)
    exec(code, {"load_checkpoint": load_checkpoint, "get_tokenizer": get_tokenizer})
    assert capsys.readouterr().out.strip()


def test_the_defaults_it_quotes_are_the_defaults():
    """Sentences with the numbers of the code filled in; line breaks do not count."""
    def plain(value):
        return f"{value:g}".replace("e-0", "e-")
    reviews, own = train_dpo.parse_args([]), train_dpo.parse_args(["--data", "pairs.jsonl"])
    text = " ".join(TEXT.split())
    for sentence in [
            f"{reviews.prefixes:,} beginnings four times each",
            f"{reviews.eval_prompts:,} held-out prompts, one sample each",
            f"the paper's {plain(own.lr)} and {plain(own.beta)}; `--data` defaults",
            f"have to move further: {plain(reviews.lr)}",
            f"its beta is {plain(reviews.beta)}",
            f"warms up over {reviews.warmup} steps",
            f"written every {plain(reviews.save_every)} minutes (`--save-every`)"]:
        assert sentence in text, sentence
    assert reviews.samples == 4


def test_settings_that_are_called_the_defaults_are_the_defaults():
    """Giving them changes nothing of what is parsed."""
    rows = re.findall(r"^\| (SFT|DPO)\b[^|]*\| `([^`]+)` \| ([^|]*) \|$", TEXT, re.M)
    assert [name for name, _, _ in rows] == ["SFT", "DPO"]
    for name, flags, of_tldr in rows:
        module = train_sft if name == "SFT" else train_dpo
        others = " ".join(re.findall(r"`([^`]+)`", of_tldr))
        for task, words in (("hh", flags), ("tldr", f"{flags} {others}")):
            given = ["--task", task, *shlex.split(words)]
            assert module.parse_args(given) == module.parse_args(["--task", task]), (name, task)


def test_the_table_of_numbers_has_every_column_that_is_logged_and_measured():
    """What a reader sees on the screen is explained: COLUMNS, and what --evaluate reports."""
    explained = {name for row in re.findall(r"^\| (`[^|]*`) \|", TEXT, re.M)
                 for name in re.findall(r"`(\w+)`", row)}
    measured = "reward kl win_rate well_formed length distinct_n accuracy logp_accuracy margin"
    for name in {*train_dpo.COLUMNS, *train_sft.COLUMNS, *measured.split(), "kl_bound"}:
        assert name in explained, name


def test_pictures_can_be_read_on_light_and_on_dark_pages():
    """No picture has a background, and its letters are of middling brightness."""
    pictures = re.findall(r"\((assets/\w+\.svg)\)", TEXT)
    assert pictures
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
