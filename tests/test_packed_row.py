"""experiments.packed_row: it prints exactly what is trained on.

    pytest tests/test_packed_row.py
"""

import gzip
import json
import os
import random
import re

import pytest
from hypothesis import given, settings, strategies as st

import tasks.reviews
from data import Encoded, Preference, encode, pack
from experiments import packed_row
from experiments.packed_row import show_counts, show_row
from tasks.tokenizers import get_tokenizer

TOKENIZER = get_tokenizer("reviews")
for_all = settings(deadline=None, max_examples=50, derandomize=True)
ANSI = re.compile(r"\033\[[0-9;]*m")


def lines_of(text, name):
    """All words of the lines that begin with this name, without the bars between prompts."""
    return [word for line in text.splitlines() if line.startswith(f"{name} ")
            for word in line.split()[1:] if word != "|"]


def test_the_example_at_the_top_of_the_module_is_printed_as_it_stands_there():
    item = encode(Preference("The acting was", [" great!", " dull."], [(0, 1)]), TOKENIZER, 32)
    other = Encoded([TOKENIZER.eot_token], [TOKENIZER.encode_ordinary("I")], [])
    text = show_row(pack([item, other], 32), 0, TOKENIZER)
    assert text.splitlines()[:3] == [
        "tokens    <eot> The _acting _was _great ! <eot> _dull . <eot> | <eot> I",
        "position      0   1       2    3      4 5     6     4 5     6 |     0 1",
        "answer        0   0       0    0      1 1     1     2 2     2 |     0 1"]
    # A character is one token across and two down: a line shows what either of tokens 0 and 1, 2
    # and 3, ... sees. The fourth line is the <eot> of the first answer, which sees everything
    # before it, and "_dull", which does not.
    assert [line.strip() for line in text.splitlines()[-6:]] == [
        "##..........", "####........", "######......",
        "########....", "####...###..", "..........##"]


@for_all
@given(seed=st.integers(0, 999), width=st.integers(60, 200))
def test_every_token_position_and_answer_of_the_row_is_shown_in_order(seed, width):
    rng = random.Random(seed)
    items = [encode(Preference(tasks.reviews.write_review(rng)[:rng.randint(1, 30)],
                               [tasks.reviews.write_review(rng) for _ in range(2)], [(0, 1)]),
                    TOKENIZER, 128) for _ in range(rng.randint(1, 3))]
    batch = pack(items, 128)
    for row in range(len(batch.tokens)):
        plain = show_row(batch, row, TOKENIZER, width)
        filled = int((batch.group[row] >= 0).sum())
        for name, values in (("position", batch.positions), ("answer", batch.answer)):
            assert lines_of(plain, name) == [str(v) for v in values[row, :filled].tolist()]
        assert len(lines_of(plain, "tokens")) == filled
        picture = [line.strip() for line in plain.split("mask: ")[1].splitlines()[1:]]
        assert all(len(line) <= width for line in plain.split("mask: ")[0].splitlines())
        step, mask = -(-filled // 64), batch.mask()[row, :filled, :filled]
        assert picture == ["".join(".#"[int(mask[i:i + 2 * step, j:j + step].any())]
                                   for j in range(0, filled, step))
                           for i in range(0, filled, 2 * step)]
        assert ANSI.sub("", show_row(batch, row, TOKENIZER, width, colour=True)) == plain


def test_no_line_is_longer_than_the_terminal_is_wide():
    """At every width, wherever a line ends, even just before the next prompt."""
    item = encode(Preference("I", [" was"], []), TOKENIZER, 8)
    batch = pack([item] * 16, 64)
    for width in range(40, 90):
        table = show_row(batch, 0, TOKENIZER, width).split("mask: ")[0]
        assert width - 12 <= max(map(len, table.splitlines())) <= width


def test_what_is_scored_is_bright_and_what_is_not_is_dim():
    """The bright tokens are those that `target` lists, in that order; all others are dim."""
    items = [encode(Preference("The plot", [" was good.", " was", " is"], [(0, 1)]), TOKENIZER, 64)]
    batch = pack(items, 64)
    first = show_row(batch, 0, TOKENIZER, colour=True).splitlines()[0]
    dim = re.findall(r"\033\[2m *(\S+?)\033", first)
    bright = re.findall(r"\033\[1;(\d+)m *(\S+?)\033", first)
    ids = batch.target.tolist()
    shown = ["<eot>" if i == TOKENIZER.eot_token else TOKENIZER.decode([i]).replace(" ", "_")
             for i in ids]
    assert dim == ["<eot>", "The", "_plot"] and [text for _, text in bright] == shown
    assert len({colour for colour, _ in bright}) == 3           # each answer has its own


def test_tokens_that_are_no_letters_are_shown_in_one_line():
    item = encode(Preference("a\n\té", ["\x1b[31m", "|"], [(0, 1)]), TOKENIZER, 64)
    text = show_row(pack([item], 64), 0, TOKENIZER)
    assert text.isascii() and "\x1b" not in text and "\\n" in text and "\\t" in text


def test_counts_are_of_prompts_answers_and_pairs():
    items = [Encoded([1, 2], [[1], [1, 2, 3]], [(0, 1)]), Encoded([1] * 9, [[4, 5]], [])]
    assert show_counts(items) == ("2 prompts of 2 to 9 tokens, median 9\n"
                                  "3 answers of 1 to 3 tokens, median 2\n1 pairs")


def test_a_large_mask_is_shown_small():
    item = Encoded([1] * 100, [[2] * 90, [3] * 66], [(0, 1)])
    text = show_row(pack([item], 256), 0, TOKENIZER, width=100)
    picture = text.splitlines()[-32:]
    assert "4 tokens per character across and 8 down" in text
    assert {len(line) for line in picture} == {10 + 64}
    assert picture[0].strip() == "##" + "." * 62
    last = picture[-1].strip()          # the second answer sees the prompt and itself
    assert last == "#" * 25 + "." * 22 + "#" * 17


@pytest.mark.parametrize("folder_has_preferences", [True, False])
def test_the_command_prints_the_first_row_of_the_first_batch(tmp_path, capsys,
                                                             folder_has_preferences):
    if folder_has_preferences:
        rows = [{"prompt": f"The plot {i}", "chosen": " was good.", "rejected": " was dull."}
                for i in range(40)] + [{"prompt": "The", "chosen": " ", "rejected": "a"}]
        (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    packed_row.main(["--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert ("1 x empty answer" in out) == folder_has_preferences
    assert ("this is what train_sft.py trains on" in out) != folder_has_preferences
    assert len(lines_of(out, "tokens")) == len(lines_of(out, "position")) > 50
    assert "mask: which token (down) attends to which (across)" in out and "\033" not in out
    packed_row.main(["--out", str(tmp_path), "--seed", "5"])
    assert capsys.readouterr().out != out


def test_a_published_task_is_shown(tmp_path, capsys):
    for part in ("train", "test"):
        path = tmp_path / "helpful-base" / f"{part}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        with gzip.open(path, "wt") as file:
            for i in range(20):
                start = f"\n\nHuman: Film {i}?\n\nAssistant:"
                file.write(json.dumps({"chosen": start + " a", "rejected": start + " b"}) + "\n")
    packed_row.main(["--task", "hh", "--data-dir", str(tmp_path), "--tokenizer", "reviews"])
    out = capsys.readouterr().out
    assert "20 pairs" in out and "mask: " in out


@pytest.mark.parametrize("flags, words", [
    (["--data", "no.jsonl", "--tokenizer", "reviews"], "no.jsonl: cannot be read"),
    (["--row-length", "1"], "--row-length"), (["--task", "chess"], "--task")])
def test_bad_input_is_one_sentence(flags, words, capsys):
    with pytest.raises(SystemExit) as caught:
        packed_row.main(flags)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("packed_row.py: ") and words in message
    assert message.count("\n") == 1


@pytest.mark.skipif("DPO_HH_FILE" not in os.environ, reason="DPO_HH_FILE names no file")
def test_real_dialogues_are_shown(tmp_path, capsys):
    packed_row.main(["--data", os.environ["DPO_HH_FILE"], "--out", str(tmp_path), "--tokenizer",
                     "reviews", "--row-length", "1024"])
    out = capsys.readouterr().out
    assert "4 x empty answer" in out and "pairs" in out and "H" in lines_of(out, "tokens")
