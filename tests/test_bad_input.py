"""Bad input: one sentence that names the place, exit code 2, never a traceback, nothing lost.

    pytest tests/test_bad_input.py

The corpus of over a hundred cases is made here, by code: files, lines, rows, flags, checkpoints. A
row that teaches nothing must not end a run: it is skipped and counted, and only with --strict is it
an error. hypothesis adds what nobody has thought of.
"""

import gzip
import io
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import sample
import tasks.checkpoint
import train_dpo
import train_sft
from classroom.exercises import is_a_students_copy
from data import encode_all, load_examples, load_preferences, pack
from model import GPT, GPTConfig
from runtime.errors import UserError
from runtime.rows import Skipped
from tasks.checkpoint import save_checkpoint
from tasks.reviews import prefixes
from tasks.tokenizers import get_tokenizer

ROOT = Path(__file__).parent.parent
for_all = settings(deadline=None, max_examples=150, derandomize=True)
TOKENIZER = get_tokenizer("reviews")
trains_in_another_process = pytest.mark.skipif(
    is_a_students_copy(), reason="another process cannot say which exercise is not written yet")
TINY = ("--init random --n-layer 1 --n-head 2 --n-embd 16 --block-size 128 --steps 2 "
        "--tokenizer reviews --device cpu").split()
QUICK = "--steps 2 --eval-prompts 3 --max-new-tokens 4 --device cpu".split()
ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}
RANKING = {"prompt": "a", "answers": ["b", "c", "d"], "ranking": [2, 0, 1]}
HH = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
SCORES = {"prompt": "a", "answers": ["b", "c", "d"], "scores": [1, 2, 3]}
ASKS, SAYS_B, SAYS_C = [{"role": role, "content": content} for role, content in [
    ("user", "a"), ("assistant", "b"), ("assistant", "c")]]
CHAT = {"prompt": [ASKS], "chosen": [SAYS_B], "rejected": [SAYS_C]}
TLDR = {"info": {"subreddit": "s", "title": "t", "post": "p"}, "choice": 0,
        "summaries": [{"text": "b"}, {"text": "c"}]}


DIFFER = "dialogues that differ before the last answer"


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def pairs(n):
    return [{"prompt": f"The plot {i}", "chosen": f" was good {i}.", "rejected": " was dull."}
            for i in range(n)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with pairs.jsonl and sft.pt, trained on it for two steps."""
    out = tmp_path_factory.mktemp("run")
    (out / "pairs.jsonl").write_bytes(lines(*pairs(40)))
    train_sft.main(["--data", str(out / "pairs.jsonl"), "--out", str(out), *TINY])
    return out


def refused(main, argv, capsys):
    """Run a command that must end with code 2 and one sentence on stderr. Returns that sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in argv])
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert message.count("\n") == 1 and "Traceback" not in message, message
    return message


# ------------------------------------------------------------------------------------------------
# Files, lines, rows
# ------------------------------------------------------------------------------------------------

WHOLE_FILES = {                                         # content, and words of the sentence
    "empty": (b"", "the file is empty"), "blank lines": (b"\n \r\n\t\n", "the file is empty"),
    "binary": (bytes(range(128, 256)), "line 1: not UTF-8"),
    "UTF-16": (json.dumps(ROW).encode("utf-16"), "UTF-16 text: save it as UTF-8"),
    "UTF-16, most significant byte first": (b"\xfe\xff\0{", "UTF-16 text"),
    "a gzip without its name": (gzip.compress(lines(ROW)), "a gzip file: let its name end in .gz"),
    "a web page": (b"\n<!doctype html>\n<html></html>", "a web page"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\nsize 9", "git lfs pull"),
    "a zip file": (b"PK\3\4\x14\0\0\0", "a zip file: unpack it"),
    "Parquet": (b"PAR1\x15\4\x15", "a Parquet file"),
    "CSV": (b"\xef\xbb\xbfprompt,chosen,rejected\na,b,c\n", "it looks like CSV"),
    "CSV with tabs": (b"prompt\tchosen\trejected\na\tb\tc\n", "it looks like CSV"),
    "one array over many lines": (json.dumps([ROW], indent=1).encode(), "a JSON array"),
    "one array on one line": (json.dumps([ROW, ROW]).encode(), "a JSON array"),
    "one object over many lines": (json.dumps(ROW, indent=1).encode(), "one whole object per line"),
    "one object of columns": (lines({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}),
                              '"prompt", not a list; a file of columns must be written as one'),
    "columns without a prompt": (lines({"chosen": ["b"], "rejected": ["c"]}), "a file of columns"),
    "nothing usable": (lines(ROW | {"chosen": " "}, ROW | {"chosen": "c"}, ROW | {"rejected": "b"}),
                       "no usable row (1 x empty answer; 2 x equal answers)"),
    "a number of many digits": (b'{"prompt": ' + b"7" * 5000 + b"}", "line 1: not JSON"),
}
BROKEN_LINES = {
    "cut short": (b'{"prompt": "a", "chosen": "b', "not JSON"),
    "two objects": (b'{"prompt": "a"} {"prompt": "b"}', "not JSON"),
    "a trailing comma": (b'{"prompt": "a", }', "not JSON"),
    "single quotes": (b"{'prompt': 'a'}", "not JSON"),
    "deeply nested": (b"[" * 100_000, "not JSON"), "a NUL": (b'{"prompt": "a\0b"}', "not JSON"),
    "Latin-1": ('{"prompt": "Grüße"}'.encode("latin-1"), "not UTF-8"),
    "a list": (b"[1]", "a JSON object, not [1]"), "a string": (b'"a"', "a JSON object"),
    "null": (b"null", "a JSON object"), "NaN": (b"NaN", "a JSON object"),
    "no key": (b"{}", 'found no keys; expected "prompt", "chosen" and "rejected"'),
    "no rejected": (b'{"prompt": "a", "chosen": "b"}',
                    'found the keys "prompt", "chosen"; expected "prompt", "chosen" and "rej'),
    "no chosen": (b'{"prompt": "a", "rejected": "b"}', 'found the keys "prompt", "rejected"; exp'),
    "one dialogue": (lines({"chosen": HH["chosen"]}), 'found the keys "chosen"; expected "prompt"'),
    "keys of another case": (b'{"Prompt": "a", "Chosen": "b", "REJECTED": "c"}',
                             'rename "Prompt", "Chosen", "REJECTED" to "prompt", "chosen", "rej'),
    "keys with a space": (lines({"prompt ": "a", " chosen": "b", "rejected": "c"}),
                          'rename "prompt ", " chosen" to "prompt", "chosen"'),
    "prompt under another key": (lines({"question": "a", "chosen": "b", "rejected": "c"}),
                                 'found the keys "question", "chosen", "rejected"; expected a "pr'),
    "KTO": (b'{"prompt": "a", "completion": "b", "label": true}', "a label of a single answer"),
    "Alpaca": (b'{"instruction": "a", "input": "", "output": "b"}',
               'found the keys "instruction", "input", "output"; expected'),
    "ShareGPT": (lines({"conversations": [{"from": "human", "value": "a"}]}),
                 'found the keys "conversations"; expected'),
    "long keys": (lines({f"\n{i}\U0001f600" * 30: 1 for i in range(80)}), 'found the keys "\\n0'),
    "a key twice": (b'{"prompt": "a", "chosen": "b", "chosen": "x", "rejected": "c"}',
                    "the key 'chosen' appears twice"),
    "a nested key twice": (b'{"prompt": "a", "x": {"y": 1, "y": 2}}', "the key 'y' appears twice"),
    "a number": (b"7", "a JSON object, not 7"), "not UTF-8": (b"\xff\xfe{\0", "not UTF-8"),
    "chosen a number": (lines(ROW | {"chosen": 3}), 'a string under "chosen"'),
    "chosen null": (lines(ROW | {"chosen": None}), 'a string under "chosen"'),
    "chosen NaN": (lines(ROW | {"chosen": float("nan")}), 'a string under "chosen"'),
    "rejected a list of numbers": (lines(ROW | {"rejected": [1]}), 'a string under "rejected"'),
    "an empty list": (lines(ROW | {"rejected": []}), "one or several under the other"),
    "several of both": (lines(ROW | {"chosen": ["b", "x"], "rejected": ["c", "d"]}),
                        'expected one string under "chosen" or "rejected"'),
    "prompt an object": (lines(ROW | {"prompt": {"text": "a"}}), 'a string under "prompt"'),
    "prompt a number": (lines(ROW | {"prompt": 7}), 'a string under "prompt"'),
    "prompt null": (lines(ROW | {"prompt": None}), 'a string under "prompt"'),
    "answers without a prompt": (b'{"answers": ["a", "b"], "ranking": [0, 1]}', 'under "prompt"'),
    "answers a string": (lines(RANKING | {"answers": "abc"}), "at least two strings"),
    "answers an object": (lines(RANKING | {"answers": {"a": 0, "b": 1}}), "at least two strings"),
    "answers with ranks": (lines(RANKING | {"answers": [{"answer": "b", "rank": 1}] * 3}),
                           "at least two strings"),
    "no answer": (lines(RANKING | {"answers": [], "ranking": []}), "at least two strings"),
    "an answer a number": (lines(RANKING | {"answers": ["a", 2, "c"]}), "at least two strings"),
    "one answer": (lines(RANKING | {"answers": ["b"], "ranking": [0]}), "at least two strings"),
    "answers nested": (lines(RANKING | {"answers": [["b"], "c", "d"]}), "at least two strings"),
    "ranking missing": (lines({"prompt": "a", "answers": ["b", "c"]}), '"ranking"'),
    "ranking null": (lines(RANKING | {"ranking": None}), "each of 0 to 2 once"),
    "ranking a string": (lines(RANKING | {"ranking": "201"}), "each of 0 to 2 once"),
    "ranking of strings": (lines(RANKING | {"ranking": ["2", "0", "1"]}), "each of 0 to 2 once"),
    "ranking of booleans": (lines(RANKING | {"ranking": [True, False, False]}), "each of 0 to 2"),
    "ranking too long": (lines(RANKING | {"ranking": [2, 0, 1, 3]}), "each of 0 to 2 once"),
    "ranking too long, with ties": (lines(RANKING | {"ranking": [0, 1, 1, 1]}), "each of 0 to 2"),
    "ranks out of range": (lines(RANKING | {"ranking": [4, 4, 0]}), "each of 0 to 2 once"),
    "ranks negative": (lines(RANKING | {"ranking": [-1, -1, 0]}), "each of 0 to 2 once"),
    "scores too few": (lines(SCORES | {"scores": [1]}), '3 finite numbers under "scores"'),
    "scores null": (lines(SCORES | {"scores": [1, None, 2]}), '3 finite numbers under "scores"'),
    "scores NaN": (lines(SCORES | {"scores": [1, float("nan"), 2]}), "3 finite numbers"),
    "scores infinite": (lines(SCORES | {"scores": [1, float("inf"), 2]}), "3 finite numbers"),
    "scores as text": (lines(SCORES | {"scores": ["1", "2", "3"]}), "3 finite numbers"),
    "unfinished out of range": (lines(RANKING | {"unfinished": [3]}), 'under "unfinished"'),
    "ranking out of range": (lines(RANKING | {"ranking": [1, 2, 3]}), "each of 0 to 2 once"),
    "ranking negative": (lines(RANKING | {"ranking": [0, 1, -1]}), "each of 0 to 2 once"),
    "ranking too short": (lines(RANKING | {"ranking": [0, 1]}), "each of 0 to 2 once"),
    "ranking of floats": (lines(RANKING | {"ranking": [2.0, 0.0, 1.0]}), "each of 0 to 2 once"),
    "ranking with NaN": (lines(RANKING | {"ranking": [float("nan"), 0, 1]}), "each of 0 to 2"),
    "no Assistant turn": (lines({"chosen": "b", "rejected": "c"}), "turns"),
    "one Assistant turn": (lines(HH | {"rejected": "\n\nHuman: a"}), "turns"),
    "a chat without a user": (lines({"chosen": [SAYS_B], "rejected": [SAYS_C]}), "a user message"),
    "a chat that the user ends": (lines({"chosen": [ASKS, SAYS_B], "rejected": [SAYS_C, ASKS]}),
                                  'one of the assistant at the end of "rejected"'),
    "an unknown role": (lines(CHAT | {"prompt": [ASKS, {"role": "tool", "content": "a"}]}),
                        '"role" ("system", "user" or "assistant"), not {"role": "tool", "content'),
    "a role that is a list": (lines(CHAT | {"prompt": [{"role": ["user"], "content": "a"}]}),
                              'not {"role": ["user"], "content": "a"}'),
    "ShareGPT's messages": (lines(CHAT | {"chosen": [{"from": "gpt", "value": "b"}]}),
                            'not {"from": "gpt", "value": "b"}'),
    "content a list": (lines(CHAT | {"chosen": [SAYS_B | {"content": [{"type": "text"}]}]}),
                       'a string under "content"'),
    "content null": (lines(CHAT | {"chosen": [SAYS_B | {"content": None}]}), 'under "content"'),
    "messages of strings": (lines(CHAT | {"chosen": ["b"]}), 'a list of messages under "chosen"'),
    "choice 2": (lines(TLDR | {"choice": 2}), '"choice"'),
    "choice null": (lines(TLDR | {"choice": None}), '"choice"'),
    "three summaries": (lines(TLDR | {"summaries": [{"text": "b"}] * 3}), '"summaries"'),
    "a summary without text": (lines(TLDR | {"summaries": [{"text": "b"}, {}]}), '"text"'),
    "no post": (lines(TLDR | {"info": {"subreddit": "s", "title": "t"}}), '"post"'),
}
CANNOT_TEACH = {                                        # one such row must not end the run
    "empty": (ROW | {"chosen": ""}, "empty answer"),
    "white space": (ROW | {"rejected": " \n\t\u3000"}, "empty answer"),
    "empty in a ranking": (RANKING | {"answers": ["b", "", "d"]}, "empty answer"),
    "equal": (ROW | {"rejected": "b"}, "equal answers"),
    "equal in a ranking": (RANKING | {"answers": ["b", "c", "b"]}, "equal answers"),
    "equal but for a space": (TLDR | {"summaries": [{"text": " b"}, {"text": "b "}]},
                              "equal answers"),
    "equal dialogues": (HH | {"rejected": HH["chosen"]}, "equal answers"),
    "an empty last turn": (HH | {"rejected": "\n\nHuman: a\n\nAssistant:"}, "empty answer"),
    "parted too early": (HH | {"rejected": "\n\nHuman: x\n\nAssistant: c"}, DIFFER),
    "more turns": (HH | {"rejected": HH["rejected"] + "\n\nHuman: x\n\nAssistant: y"}, DIFFER),
    "chats that part too early": (
        {"chosen": [ASKS, SAYS_B, ASKS, SAYS_B], "rejected": [ASKS, SAYS_C, ASKS, SAYS_C]}, DIFFER),
    "a chat with another prompt": (CHAT | {"prompt": "x", "chosen": [ASKS, SAYS_B]},
                                   "chat whose roles do not alternate"),
    "a question asked twice": (CHAT | {"rejected": [ASKS, ASKS, SAYS_C]},
                               "chat whose roles do not alternate"),
    "a late system message": (CHAT | {"prompt": [ASKS, SAYS_B, {"role": "system", "content": "x"},
                                                 ASKS]}, "chat whose roles do not alternate"),
    "an empty message": (CHAT | {"chosen": [SAYS_B | {"content": ""}]}, "empty answer"),
    "only ties": (SCORES | {"scores": [1, 1, 1.0]}, "answers that all tie"),
    "a lone surrogate": (ROW | {"prompt": "\ud800"}, "half a character (a lone surrogate)"),
    "a lone surrogate in an answer": (ROW | {"chosen": "x\udfff"}, "half a character"),
    "too long a prompt": (ROW | {"prompt": "long " * 400}, "prompt as long as a row"),
    "too long an answer": (ROW | {"chosen": "long " * 400},
                           "answer cut (kept, without end-of-text)"),
    "equal after the cut": (ROW | {"chosen": "long " * 400, "rejected": "long " * 401},
                            "answers equal after the cut"),
}


@pytest.mark.parametrize("kind", WHOLE_FILES)
def test_a_file_without_a_usable_row_is_refused_by_name(kind, tmp_path):
    content, words = WHOLE_FILES[kind]
    path = tmp_path / "file.jsonl"
    path.write_bytes(content)
    for load in (load_preferences, load_examples):
        with pytest.raises(UserError) as caught:
            load(path)
        message = str(caught.value)
        assert message.startswith(str(path)) and words in message and "\n" not in message


@pytest.mark.parametrize("script", [train_sft, train_dpo])
@pytest.mark.parametrize("content, words", [
    WHOLE_FILES["CSV"], (lines(ROW | {"prompt": "x " * 500}), "no row is left to train on")])
def test_both_scripts_refuse_such_a_file(script, content, words, run, capsys, tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(content)
    flags = TINY if script is train_sft else ["--sft", run / "sft.pt", *QUICK]
    message = refused(script.main, ["--data", path, "--out", tmp_path / "out", *flags], capsys)
    assert message.startswith(f"{script.__name__}.py: {path}") and words in message


def test_a_line_of_many_megabytes_is_a_prompt_as_long_as_a_row(tmp_path):
    path, skipped = tmp_path / "file.jsonl", Skipped()
    path.write_bytes(lines(ROW | {"prompt": "x" * 4_000_000}))
    assert encode_all(load_preferences(path), TOKENIZER, 128, skipped) == []
    assert skipped == {"prompt as long as a row": 1}


@pytest.mark.parametrize("kind", BROKEN_LINES)
def test_a_broken_line_is_refused_by_file_and_number(kind, tmp_path):
    """It is line 4, because blank lines count, as they do in an editor. A byte order mark and a
    Windows line end do no harm."""
    line, words = BROKEN_LINES[kind]
    path = tmp_path / "file.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines(ROW) + b"\r\n" + lines(ROW) + line.strip() + b"\n")
    for load in (load_preferences, load_examples):
        with pytest.raises(UserError) as caught:
            load(path)
        message = str(caught.value)
        assert message.startswith(f"{path}, line 4: ") and words in message
        assert "\n" not in message and len(message) < len(str(path)) + 350


@pytest.mark.parametrize("kind", CANNOT_TEACH)
def test_a_row_that_cannot_teach_is_counted_and_under_strict_an_error(kind, tmp_path):
    """A preference needs one prompt and two different, non-empty answers."""
    row, reason = CANNOT_TEACH[kind]
    path = tmp_path / "file.jsonl"
    path.write_bytes(lines(ROW, row, row))
    skipped = Skipped()
    kept = encode_all(load_preferences(path, skipped), TOKENIZER, 128, skipped)
    cut = reason == "answer cut (kept, without end-of-text)"
    assert len(kept) == 1 + 2 * cut
    assert [n for name, n in skipped.items() if name.startswith(reason)] == [2]
    with pytest.raises(UserError) as caught:
        strict = Skipped(strict=True)
        encode_all(load_preferences(path, strict), TOKENIZER, 128, strict)
    message = str(caught.value)
    assert "--strict" in message and "\n" not in message and len(message) < len(str(path)) + 150
    assert f"{path}, line 2: {reason}" in message or "the prompt '" in message


def test_strict_is_obeyed_by_both_scripts_and_without_it_the_run_goes_on(run, capsys, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(lines(*pairs(40), *(row for row, _ in CANNOT_TEACH.values())))
    for script, flags in [(train_sft, TINY), (train_dpo, ["--sft", run / "sft.pt", *QUICK])]:
        flags = [str(flag) for flag in ["--data", path, "--out", tmp_path / "out", *flags]]
        message = refused(script.main, [*flags, "--strict"], capsys)
        assert f"{path}, line 41: empty answer, and --strict is set" in message
        script.main(flags)
        out = capsys.readouterr().out
        assert "5 x empty answer; 4 x equal answers; 3 x dialogues that differ" in out
        assert "2 x half a character" in out and "1 x prompt as long as a row" in out


@pytest.mark.parametrize("name, words", [
    ("no.jsonl", "cannot be read: No such file"), ("no.jsonl.gz", "cannot be read: No such file"),
    ("folder", "a folder; expected a .jsonl or .jsonl.gz file"), ("folder.jsonl.gz", "a folder"),
    ("cut.jsonl.gz", "end-of-stream"), ("cut by 20 bytes.jsonl.gz", "end-of-stream"),
    ("plain.jsonl.gz", "Not a gzipped file"), ("empty.jsonl.gz", "the file is empty"),
    ("damaged.jsonl.gz", "cannot be read"), ("checksum.jsonl.gz", "cannot be read: CRC check"),
])
def test_a_file_that_cannot_be_read_is_refused_by_name(name, words, tmp_path):
    """A truncated file is not taken for a whole one."""
    whole = gzip.compress(lines(*pairs(1000)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.jsonl.gz").mkdir()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "cut by 20 bytes.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "plain.jsonl.gz").write_bytes(lines(ROW))
    (tmp_path / "empty.jsonl.gz").write_bytes(b"")
    (tmp_path / "damaged.jsonl.gz").write_bytes(whole[:50] + b"\xff" * 50 + whole[100:])
    (tmp_path / "checksum.jsonl.gz").write_bytes(whole[:-8] + bytes(8))
    with pytest.raises(UserError) as caught:
        load_preferences(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: ") and words in message


def test_plackett_luce_refuses_a_file_with_ties(run, capsys, tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(lines(*[SCORES | {"prompt": f"{score}", "scores": [1, 2, score]}
                             for score in (0, 1, 2)]))
    flags = ["--data", path, "--sft", run / "sft.pt", "--out", tmp_path / "out", *QUICK]
    assert "in 2 of 3 rows some answers tie, and --loss plackett_luce needs whole rankings" in (
        refused(train_dpo.main, [*flags, "--loss", "plackett_luce"], capsys))
    train_dpo.main(list(map(str, flags)))


@pytest.mark.parametrize("data, words", [
    ("no.jsonl", "No such file"), (".", "a folder; expected"),
    ("https://example.org/pairs.jsonl", "a URL; download the file and give its path"),
    ("hf://datasets/trl-lib/pairs", "a URL; download the file"),
])
def test_dpo_refuses_what_is_no_file(data, words, run, capsys, tmp_path):
    flags = ["--data", data, "--sft", run / "sft.pt", "--out", tmp_path / "out"]
    assert words in refused(train_dpo.main, flags, capsys)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner,
                                                                 max_size=4), max_leaves=8)
fields = st.sampled_from(["prompt", "chosen", "rejected", "answers", "ranking", "info", "summaries",
                          "choice", "text", "post", "title", "subreddit", "scores", "completion",
                          "messages", "role", "content", "unfinished", "label", "Prompt"])
rows = st.one_of(
    json_values, st.dictionaries(fields, json_values | st.dictionaries(fields, st.text())),
    st.builds(lambda row, change: {**row, **change},
              st.sampled_from([ROW, RANKING, SCORES, CHAT, HH, TLDR]),
              st.dictionaries(fields, json_values, max_size=2)))


def read_or_refused(path):
    """Read a file as a run does before it trains: it can be packed, or the error is a sentence."""
    for load in (load_preferences, load_examples):
        skipped = Skipped()
        try:
            items = encode_all(load(path, skipped), TOKENIZER, 40, skipped)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            continue
        if items:
            assert pack(items, 40).n_answers == sum(len(item.answers) for item in items)


@for_all
@given(st.lists(rows, max_size=3))
def test_any_json_is_read_or_refused_in_one_sentence(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("json") / "file.jsonl"
    path.write_bytes(lines(*found))
    read_or_refused(path)


@for_all
@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_any_bytes_are_read_or_refused_in_one_sentence(tmp_path_factory, content, zipped, after):
    path = tmp_path_factory.mktemp("bytes") / ("file.jsonl.gz" if zipped else "file.jsonl")
    path.write_bytes(gzip.compress(lines(ROW)) + content if zipped and after else
                     lines(ROW) + content if after else content)
    read_or_refused(path)


def test_the_corpus_is_large():
    sizes = Counter(files=len(WHOLE_FILES), lines=len(BROKEN_LINES), rows=len(CANNOT_TEACH),
                    flags=len(DPO_FLAGS) + len(SFT_FLAGS) + len(SAMPLE_FLAGS))
    assert sizes["files"] + sizes["lines"] + sizes["rows"] >= 60 and sizes["flags"] >= 60


# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------

BOTH = [
    ("--batch", "0"), ("--batch", "1.5"), ("--accumulate", "0"), ("--epochs", "0"),
    ("--epochs", "1e308"), ("--epochs", "nan"), ("--seed", "99999999999"), ("--seed", "-1"),
    ("--steps", "0"), ("--lr", "0"), ("--lr", "-1e-3"), ("--lr", "inf"), ("--warmup", "-1"),
    ("--clip", "0"), ("--weight-decay", "-1"), ("--log-every", "0"), ("--eval-every", "0"),
    ("--row-length", "1"), ("--save-every", "-1"), ("--save-every", "nan"), ("--task", "chess"),
    ("--tokenizer", "bert"), ("--precision", "int8"), ("--compile", "maybe"),
    ("--unknown", "1"),
]
DPO_FLAGS = BOTH + [
    ("--beta", "0"), ("--beta", "-1"), ("--beta", "nan"), ("--beta", "inf"), ("--beta", "x"),
    ("--prefixes", "5"), ("--samples", "1"), ("--max-new-tokens", "0"), ("--eval-prompts", "1"),
    ("--loss", "ppo"), ("--bet", "0.1"),
]
SFT_FLAGS = BOTH + [
    ("--block-size", "1"), ("--block-size", "1000000"), ("--n-layer", "0"), ("--n-embd", "99999"),
    ("--n-layer", "1001"), ("--n-head", "0"), ("--n-embd", "-8"),
    ("--init-std", "0"), ("--reviews", "0"),
]
SAMPLE_FLAGS = [
    ("-n", "0"), ("--max-new-tokens", "0"), ("--temperature", "-1"), ("--temperature", "nan"),
    ("--top-k", "0"), ("--top-p", "0"), ("--top-p", "1.5"), ("--seed", "x"),
]


@pytest.mark.parametrize("script, flag, value", [
    (script, *flag) for script, flags in [
        (train_dpo, DPO_FLAGS), (train_sft, SFT_FLAGS), (sample, SAMPLE_FLAGS)]
    for flag in flags])
def test_a_flag_out_of_range_is_refused_by_name(script, flag, value, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(script.main, [f"{flag}={value}" if flag[1] == "-" else flag + value], capsys)
    assert message.startswith(f"{script.__name__}.py: ")
    assert flag in message and "--help" in message
    assert not list(tmp_path.iterdir())                 # before any file is written


@pytest.mark.parametrize("flags, words", [
    (["--n-embd", "10", "--n-head", "3"], "--n-embd 10 is not a multiple of --n-head 3"),
    (["--row-length", "300"], "--row-length 300 is above the block size, 256"),
    (["--data-dir", "x", "--task", "hh", "--data", "y"], "--task hh and --data y: choose one"),
])
def test_sft_flags_that_make_no_run_are_refused(flags, words, capsys, tmp_path):
    assert words in refused(train_sft.main, [*flags, "--out", tmp_path], capsys)


def test_contradictions_are_refused(run, capsys, tmp_path):
    sft, there = run / "sft.pt", ["--out", tmp_path]
    assert "choose" in refused(train_dpo.main, ["--sft", sft, "--fresh", *there], capsys)
    assert "--tokenizer reviews, not gpt2" in refused(
        train_dpo.main, ["--sft", sft, "--tokenizer", "gpt2", *there], capsys)
    assert "--compare takes two" in refused(sample.main, ["--compare", sft, *there], capsys)
    assert "--row-length 129 is above the block size, 128" in refused(
        train_dpo.main, ["--sft", sft, "--row-length", "129", *there], capsys)
    assert "a prompt of 151 tokens" in refused(
        sample.main, ["--data", run / "pairs.jsonl", "--out", run, "--prompt", " plot" * 150],
        capsys)
    for script in (train_sft, train_dpo, sample):
        assert "--device tpu: PyTorch finds no such device" in refused(
            script.main, ["--device", "tpu", *there], capsys)
    if not torch.cuda.is_available():
        assert "--device cuda: PyTorch finds no such device on this machine; it finds cpu" in (
            refused(train_dpo.main, ["--device", "cuda", *there], capsys))


def test_another_file_of_the_same_name_is_not_the_one_that_sft_has_read(run, capsys, tmp_path):
    """Content counts, not the name: HH alone has four files called train.jsonl.gz."""
    other = tmp_path / "pairs.jsonl"
    other.write_bytes(lines(*pairs(41)))
    message = refused(train_dpo.main, ["--data", other, "--out", run, *QUICK], capsys)
    assert f"was trained on other content of pairs.jsonl, not on {other}" in message


def test_too_little_memory_is_one_sentence_and_no_damaged_file(run, capsys, tmp_path, monkeypatch):
    """PyTorch reports it in three ways, and a good checkpoint must not be called damaged for it."""
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):
        def load(*arguments, error=error, **more):
            raise error
        monkeypatch.setattr(tasks.checkpoint, "load_checkpoint", load)
        message = refused(sample.main, ["--checkpoint", run / "sft.pt"], capsys)
        assert "not enough memory" in message
    monkeypatch.undo()
    monkeypatch.setattr(torch, "load", lambda *a, **b: exec("raise torch.OutOfMemoryError('')"))
    message = refused(sample.main, ["--checkpoint", run / "sft.pt"], capsys)
    assert "not enough memory" in message and "damaged" not in message


def test_letters_that_the_terminal_cannot_show_do_not_stop_a_run(run, monkeypatch):
    """Python writes to a pipe in the locale's encoding, which may be ASCII."""
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii", write_through=True))
    sample.main(["--checkpoint", str(run / "sft.pt"), "--prompt", "Grüße", "--max-new-tokens", "3"])
    assert b"\\xfc" in printed.getvalue()


def test_a_line_that_is_not_utf8_does_not_take_the_next_prompt_with_it(run, monkeypatch, capsys):
    """It becomes a prompt with a replacement character, as the model's tokenizer would have it."""
    typed = io.BytesIO(b"The plot\n\xff was\nThe acting\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, "utf-8"))
    sample.main(["--checkpoint", str(run / "sft.pt"), "--max-new-tokens", "2"])
    out = capsys.readouterr().out
    prompts = [line for line in out.splitlines() if line.startswith("prompt  ")]
    assert prompts == ["prompt  'The plot'", "prompt  '� was'", "prompt  'The acting'"]


def test_a_reader_of_the_output_that_goes_away_costs_one_sentence(run):
    """As in `python -m experiments.packed_row | head -1`."""
    process = subprocess.Popen([sys.executable, "-m", "experiments.packed_row", "--data",
                                run / "pairs.jsonl", "--tokenizer", "reviews"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait() == 2 and err.startswith("packed_row.py: the output: Broken pipe")
    assert "Traceback" not in err


@trains_in_another_process
@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_closed_streams_do_not_cost_a_run(tmp_path):
    """A job that starts without a terminal may have none of them. Progress bars go to stderr."""
    command = [sys.executable, ROOT / "train_sft.py", *TINY, "--task", "reviews", "--reviews", "20",
               "--out", tmp_path]
    done = subprocess.run(f"exec {shlex.join(map(str, command))} <&- >&- 2>&-", shell=True)
    assert done.returncode == 0 and (tmp_path / "sft.pt").exists()
    talking = f"exec {sys.executable} {ROOT / 'sample.py'} --checkpoint {tmp_path / 'sft.pt'} <&-"
    assert subprocess.run(talking, shell=True, stdout=subprocess.DEVNULL).returncode == 0


@trains_in_another_process
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("full", ["stdout", "stderr"])
def test_an_output_on_a_full_disk_is_named(full, tmp_path):
    """If it is stderr, where nothing but errors go, then nothing can be said, but the exit code is
    that of a sentence."""
    reviews = "0" if full == "stderr" else "20"
    with open("/dev/full", "w") as disk:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {full: disk}
        done = subprocess.run([sys.executable, ROOT / "train_sft.py", *TINY, "--task", "reviews",
                               "--reviews", reviews, "--out", tmp_path], text=True, **streams)
    assert done.returncode == 2
    if full == "stdout":
        assert "train_sft.py: the output or a file: No space left on device\n" in done.stderr


def test_an_evaluation_without_a_line_in_the_log_is_refused(run, capsys, tmp_path):
    message = refused(train_sft.main, ["--data", run / "pairs.jsonl", "--out", tmp_path, *TINY,
                                       "--log-every", "2", "--eval-every", "3"], capsys)
    assert "--eval-every 3 is not a multiple of --log-every 2" in message
    assert not list(tmp_path.iterdir())


def test_control_characters_in_a_name_are_escaped(capsys, tmp_path):
    """A line end would make two sentences of one, and an escape sequence may do anything."""
    message = refused(sample.main, ["--checkpoint", tmp_path / "a\nb\x1b[31mé.pt"], capsys)
    assert message == f"sample.py: {tmp_path}/a\\nb\\x1b[31mé.pt: no such file\n"


def test_a_folder_that_cannot_be_made_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(train_sft.main, ["--out", tmp_path / "file" / "out"], capsys)
    assert f"--out {tmp_path / 'file' / 'out'}: cannot make this folder" in message


def test_more_prompts_than_there_are_are_refused():
    words = "not have 3,000 different beginnings; lower --eval-prompts"
    with pytest.raises(UserError, match=words):
        prefixes(3000, True, OneReview(), 0, "--eval-prompts")


class OneReview:
    """A tokenizer for which all reviews are the same, so they have few different beginnings."""

    def encode_ordinary(self, text):
        return list(range(8))

    def decode(self, ids):
        return f"review {len(ids)}"


# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------


def test_missing_checkpoints_are_refused_by_name(run, capsys, tmp_path):
    there = ["--out", tmp_path, "--device", "cpu"]
    for main, flags in [(train_dpo.main, ["--sft", "no.pt"]),
                        (sample.main, ["--checkpoint", "no.pt"]),
                        (sample.main, ["--compare", run / "sft.pt", "no.pt", "--data",
                                       run / "pairs.jsonl"])]:
        assert "no.pt: no such file\n" in refused(main, [*flags, *there], capsys)
    assert "sft.pt: no such file; python train_dpo.py or train_sft.py writes it\n" in refused(
        sample.main, ["--compare", *there], capsys)


def test_a_run_that_fails_at_once_leaves_no_empty_folder(capsys, tmp_path):
    flags = ["--sft", "no.pt", "--out", tmp_path / "new", "--device", "cpu"]
    refused(train_dpo.main, flags, capsys)
    assert not (tmp_path / "new").exists()


def test_a_tilde_is_the_home_folder_also_where_the_shell_leaves_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train_dpo.parse_args(["--out=~/run"]).out == tmp_path / "run"


def test_a_flipped_bit_in_a_checkpoint_is_refused(run, capsys, tmp_path):
    """The bit is in the middle of the file, where the weights are."""
    content = bytearray((run / "sft.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    message = refused(sample.main, ["--checkpoint", tmp_path / "a.pt", "--out", tmp_path], capsys)
    assert "a.pt: not a checkpoint of train_sft.py or train_dpo.py, or a damaged one" in message


@pytest.mark.parametrize("name, size", [
    ("n_embd", 10**6), ("n_layer", 10**9), ("vocab_size", 10**12), ("block_size", 10**12)])
def test_sizes_are_compared_before_a_model_of_that_size_is_built(run, capsys, tmp_path, name, size):
    """A token embedding of 10^12 ids would not fit in any memory, so this would not end with a
    damaged file but with too little memory. Nor are 10^9 blocks built first."""
    saved = torch.load(run / "sft.pt", weights_only=True)
    saved["config"][name] = size
    torch.save(saved, tmp_path / "a.pt")
    message = refused(sample.main, ["--checkpoint", tmp_path / "a.pt", "--out", tmp_path], capsys)
    assert "a.pt: not a checkpoint of train_sft.py or train_dpo.py, or a damaged one" in message


def test_checkpoints_that_do_not_fit_are_refused(run, capsys, tmp_path):
    """Checkpoints without a tokenizer's name, with another number of ids, without room for reviews,
    from SFT on another file, with sizes that do not match the weights, with NaN weights, without a
    configuration, or of another program."""
    there = ["--out", tmp_path, "--device", "cpu"]
    model, vocabulary = GPT(GPTConfig(16, 20, 1, 1, 8)), TOKENIZER.n_vocab
    save_checkpoint(tmp_path / "a.pt", model)
    save_checkpoint(tmp_path / "b.pt", model, tokenizer="reviews")
    save_checkpoint(tmp_path / "c.pt", GPT(GPTConfig(16, vocabulary, 1, 1, 8)), tokenizer="reviews")
    saved = torch.load(run / "sft.pt", weights_only=True)
    for name, change in [("sizes", {"config": saved["config"] | {"n_layer": 2}}),
                         ("huge", {"config": saved["config"] | {"n_head": -1}}),
                         ("facts", {"facts": [1]}), ("state", {"config": None})]:
        torch.save(saved | change, tmp_path / f"{name}.pt")
    torch.save(model.state_dict(), tmp_path / "other.pt")
    saved["model"]["wte.weight"][3, 1] = float("nan")
    torch.save(saved, tmp_path / "nan.pt")
    damaged = "not a checkpoint of train_sft.py or train_dpo.py, or a damaged one"
    for name, words in [("a", "does not say which tokenizer it is for"), ("b", "made for 20 ids"),
                        ("sizes", damaged), ("huge", damaged), ("state", damaged),
                        ("other", damaged), ("facts", "does not say which tokenizer"),
                        ("nan", "some of its weights are NaN or infinite")]:
        path = tmp_path / f"{name}.pt"
        assert words in refused(sample.main, ["--checkpoint", path, *there], capsys), name
        assert words in refused(train_dpo.main, ["--sft", path, *there], capsys), name
    assert "a block size of 16 has no room" in refused(
        train_dpo.main, ["--sft", tmp_path / "c.pt", *there], capsys)
    assert "was trained on pairs.jsonl, not on reviews" in refused(
        train_dpo.main, ["--out", run, "--device", "cpu"], capsys)
