"""The published tasks, hh and tldr: which rows are read and skipped, and runs from end to end.

    pytest tests/test_published.py

The rows are made up, in the form of the real ones. The real files are read if environment variables
name them: DPO_HH_FILE is Anthropic's helpful-base/test.jsonl.gz, and TIKTOKEN_CACHE_DIR is a folder
with GPT-2's BPE. The traps of the first section are mistakes that other code has made on these
files.
"""

import gzip
import json
import math
import os
from types import SimpleNamespace

import pytest
import tiktoken
import torch
from hypothesis import given, settings, strategies as st

import runtime.files
import sample
import tasks.checkpoint
import tasks.tokenizers
import train_dpo
import train_sft
from data import Preference, encode, encode_all, load_preferences, pack
from model import GPT, GPTConfig
from runtime.errors import UserError
from runtime.rows import ASSISTANT, HUMAN, Skipped, tldr_prompt
from tasks import hh, own_file, reviews, tldr
from tasks.checkpoint import load_checkpoint
from tasks.tldr import load_comparisons, load_summaries
from tasks.tokenizers import get_tokenizer

TOKENIZER = get_tokenizer("reviews")
EOT = TOKENIZER.eot_token
for_all = settings(deadline=None, max_examples=30, derandomize=True)


def dialogue(*turns):
    """Turns that alternate, as text: "\\n\\nHuman: a\\n\\nAssistant: b ..."."""
    return "".join(f"{(HUMAN, ASSISTANT)[i % 2]} {turn}" for i, turn in enumerate(turns))


def hh_row(*turns, rejected):
    return {"chosen": dialogue(*turns), "rejected": dialogue(*turns[:-1], rejected)}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def one(tmp_path, row, row_length=200):
    """The Encoded of a file that has only this row."""
    [preference] = load_preferences(write(tmp_path / "row.jsonl", [row]))
    return encode(preference, TOKENIZER, row_length)


# ------------------------------------------------------------------------------------------------
# The traps, each on a made-up row in the form of HH
# ------------------------------------------------------------------------------------------------


def test_trap_1_the_answer_keeps_its_first_token_whatever_the_prompt_ends_with(tmp_path):
    """Encoded together, ":" and " I" could become one token that belongs to neither side."""
    item = one(tmp_path, hh_row("Hi", "I liked the plot", rejected="No"))
    assert TOKENIZER.decode(item.prompt[1:]) == "\n\nHuman: Hi\n\nAssistant:"
    assert [TOKENIZER.decode(answer[:-1]) for answer in item.answers] == [
        " I liked the plot", " No"]
    assert item.answers[0][0] == TOKENIZER.encode_ordinary(" I")[0]


def test_traps_2_and_3_end_of_text_once_and_scored_though_it_is_also_the_padding(tmp_path):
    """A mask made from ids would hide the end of each answer together with the padding."""
    item = one(tmp_path, hh_row("Hi", "Hello", rejected="No"))
    assert [answer.count(EOT) for answer in item.answers] == [1, 1]
    batch = pack([item], 200)
    assert (batch.target == EOT).sum() == 2 and len(batch.target) == sum(map(len, item.answers))


def test_trap_4_padding_changes_nothing(tmp_path):
    """The same tokens are scored in a row that just fits and in a row with 50 tokens of padding."""
    item = one(tmp_path, hh_row("Hi", "Hello", rejected="No"))
    n = len(item.prompt) + sum(map(len, item.answers))
    tight, loose = pack([item], n), pack([item], n + 50)
    assert torch.equal(tight.target, loose.target) and torch.equal(tight.source, loose.source)


def test_traps_5_and_7_a_long_answer_fills_the_row_and_has_no_end(tmp_path):
    """An answer may use what the prompt leaves of the row. One that is cut gets no end-of-text,
    which would teach the model to stop there."""
    row = hh_row("Hi", "very good " * 100, rejected="No")
    item = one(tmp_path, row, row_length=60)
    assert len(item.prompt) + len(item.answers[0]) == 60 and EOT not in item.answers[0]
    assert item.answers[1][-1] == EOT
    skipped = Skipped()
    encode_all(load_preferences(write(tmp_path / "a.jsonl", [row])), TOKENIZER, 60, skipped)
    assert skipped == {"answer cut (kept, without end-of-text)": 1}


def test_trap_6_a_dialogue_that_leaves_no_room_for_an_answer_is_dropped_and_counted(tmp_path):
    """Two empty answers are always equal, so the loss of their pair would stay at log 2."""
    [preference] = load_preferences(write(tmp_path / "a.jsonl", [
        hh_row("Hi " * 100, "Hello", rejected="No")]))
    skipped = Skipped()
    assert encode(preference, TOKENIZER, 100, skipped) is None
    assert skipped == {"prompt as long as a row": 1}


def test_trap_8_both_answers_belong_to_the_same_prompt_to_the_last_token(tmp_path):
    """This holds even if an answer is cut, because the prompt never is."""
    row = hh_row("Hi", "Hello", "And?", "very good " * 100, rejected="No")
    item = one(tmp_path, row, row_length=100)
    assert TOKENIZER.decode(item.prompt[1:]) == dialogue("Hi", "Hello", "And?") + ASSISTANT
    assert len(item.answers) == 2 and item.pairs == [(0, 1)]


def test_trap_9_dialogues_that_part_before_the_last_answer_are_left_out(tmp_path):
    """So are equal answers and empty ones. Splitting each dialogue at its own last "Assistant:"
    would hide the difference."""
    rows = [{"chosen": dialogue("Hi", "Hello", "And?", "Yes"),
             "rejected": dialogue("Hi", "Hullo", "And?", "No")},
            hh_row("Hi", "Hello", rejected="Hello"), hh_row("Hi", "", rejected="Hello"),
            {"chosen": dialogue("Hi", "A", "B", "C"), "rejected": dialogue("Hi", "A")},
            hh_row("Hi", "Hello", rejected="No")]
    skipped = Skipped()
    [kept] = load_preferences(write(tmp_path / "a.jsonl", rows), skipped)
    assert kept == Preference(dialogue("Hi") + ASSISTANT, [" Hello", " No"], [(0, 1)])
    assert skipped == {"dialogues that differ before the last answer": 2, "equal answers": 1,
                       "empty answer": 1}


def test_trap_10_control_tokens_that_somebody_typed_stay_text(tmp_path):
    item = one(tmp_path, hh_row("<|endoftext|>", "It is <|endoftext|>.", rejected="No"))
    assert item.prompt.count(EOT) == 1 and item.answers[0].count(EOT) == 1
    assert TOKENIZER.decode(item.answers[0][:-1]) == " It is <|endoftext|>."


@for_all
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: text.strip() and HUMAN not in text and ASSISTANT not in text),
    min_size=3, max_size=5, unique=True))
def test_trap_11_exactly_the_answers_are_scored_whatever_the_dialogue(tmp_path_factory, texts):
    """Scoring starts where the answer does, not after a constant number of template tokens."""
    *turns, rejected = texts
    turns = turns if len(turns) % 2 == 0 else turns[:-1]
    item = one(tmp_path_factory.mktemp("rows"), hh_row(*turns, rejected=rejected), 4000)
    batch = pack([item], 4000)
    for n, text in enumerate([turns[-1], rejected]):
        scored = batch.target[batch.answer_of == n].tolist()
        assert TOKENIZER.decode(scored[:-1]) == f" {text}" and scored[-1] == EOT
        assert batch.answer.flatten()[batch.source[batch.answer_of == n]][0] == 0


@pytest.mark.skipif("DPO_HH_FILE" not in os.environ or "TIKTOKEN_CACHE_DIR" not in os.environ,
                    reason="DPO_HH_FILE or TIKTOKEN_CACHE_DIR is not set")
def test_all_the_traps_on_the_real_file_with_the_real_tokens():
    """helpful-base/test.jsonl.gz in GPT-2's tokens and rows of 1024: every row is accounted for,
    and the scored tokens are those of each answer and its end-of-text, unless it was cut."""
    gpt2, skipped = tiktoken.get_encoding("gpt2"), Skipped()
    preferences = load_preferences(os.environ["DPO_HH_FILE"], skipped)
    items = encode_all(preferences, gpt2, 1024, skipped)
    assert len(preferences) == 2339 and len(items) == 2339 - skipped["prompt as long as a row"]
    assert set(skipped) <= {
        "dialogues that differ before the last answer", "equal answers", "empty answer",
        "answer cut (kept, without end-of-text)", "prompt as long as a row",
        "answers equal after the cut"}
    texts = {(p.prompt, *p.answers) for p in preferences}
    cut = 0
    for start in range(0, len(items), 64):
        part = items[start:start + 64]
        batch = pack(part, 1024)
        numbers = batch.answer_of.tolist()
        scored = [[] for _ in range(batch.n_answers)]
        for number, token in zip(numbers, batch.target.tolist()):
            scored[number].append(token)
        for n, item in enumerate(part):
            prompt = gpt2.decode(item.prompt[1:])
            assert item.prompt[0] == 50256 and 50256 not in item.prompt[1:]
            assert prompt.endswith(ASSISTANT)
            answers = scored[2 * n:2 * n + 2]
            assert answers == list(map(list, item.answers))
            for answer in answers:
                cut += answer[-1] != 50256
                assert answer[-1] == 50256 or len(item.prompt) + len(answer) == 1024
                assert 50256 not in answer[:-1]
            if all(answer[-1] == 50256 for answer in answers):
                assert (prompt, *(gpt2.decode(answer[:-1]) for answer in answers)) in texts
    assert cut == skipped["answer cut (kept, without end-of-text)"]


# ------------------------------------------------------------------------------------------------
# TL;DR
# ------------------------------------------------------------------------------------------------


def tldr_row(i, choice=1, split="train", **changes):
    return {"info": {"id": f"t3_{i}", "subreddit": "legaladvice", "title": f"Help {i}",
                     "post": "A car hit me.\n\nWhat now?"},
            "summaries": [{"text": f" a car {i}", "policy": "ref"}, {"text": f"hit by a car {i}"}],
            "choice": choice, "split": split, "worker": "x"} | changes


def test_a_comparison_of_summaries_becomes_the_prompt_of_the_field(tmp_path):
    """"choice" is the index of the better summary; one space separates each from "TL;DR:"."""
    first, second = load_preferences(write(tmp_path / "a.json", [tldr_row(1), tldr_row(2, 0)]))
    assert first.prompt == ("SUBREDDIT: r/legaladvice\n\nTITLE: Help 1\n\n"
                            "POST: A car hit me.\n\nWhat now?\n\nTL;DR:")
    assert first.answers == [" a car 1", " hit by a car 1"]
    assert first.pairs == [(1, 0)] and second.pairs == [(0, 1)]


@pytest.mark.parametrize("changes, words", [
    ({"choice": 2}, '0 or 1 under "choice"'), ({"choice": True}, '0 or 1 under "choice"'),
    ({"summaries": [{"text": "a"}]}, "a list of two objects"),
    ({"summaries": ["a", "b"]}, "a list of two objects"),
    ({"summaries": [{"text": "a"}, {"text": 3}]}, 'a string under "text"'),
    ({"info": None}, 'an object under "info"'),
    ({"info": {"article": "..."}}, 'a string under "subreddit"'),
])
def test_a_broken_comparison_is_named_by_line(tmp_path, changes, words):
    path = write(tmp_path / "a.json", [tldr_row(1), tldr_row(2, **changes)])
    with pytest.raises(UserError) as caught:
        load_preferences(path)
    assert f"{path}, line 2: " in str(caught.value) and words in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """A folder with the published files of both tasks, a few rows each."""
    rows = [hh_row(f"Question {i}?", f"Answer {i}.", rejected=f"No {i}.") for i in range(30)]
    there = tmp_path / "published"
    write(there / "helpful-base/train.jsonl.gz", [*rows[:20], hh_row("Hi", "", rejected="No")])
    write(there / "helpful-base/test.jsonl.gz", rows[20:])
    for batch in range(3, 12):
        write(there / f"comparisons/batch{batch}.json",
              [tldr_row(batch, split="valid2"), tldr_row(100 + batch, split="train")])
    for part, n in (("train", 6), ("valid", 3)):
        write(there / f"tldr_3_filtered/{part}.jsonl", [
            {"id": f"{i}", "subreddit": "tifu", "title": f"T {i}", "post": "I fell.",
             "summary": f"{part} {i} fell."} for i in range(n)] + [
            {"id": "x", "subreddit": "tifu", "title": "T", "post": "P", "summary": " "}])
    return there


def test_hh_is_split_as_it_was_published(folder):
    skipped = Skipped()
    training = hh.load_dialogues("train", folder, skipped)
    held_out = hh.load_dialogues("test", folder, skipped)
    assert (len(training), len(held_out)) == (20, 10) and skipped["empty answer"] == 1
    assert not {p.prompt for p in training} & {p.prompt for p in held_out}


def test_tldr_trains_on_batches_3_to_10_and_holds_out_the_validation_splits(folder):
    """Each of nine files, batches 3 to 11, has a row of either split. Batch 11 is read only for its
    validation rows."""
    training = load_comparisons(False, folder, Skipped())
    assert [p.answers[0] for p in training] == [f" a car {100 + i}" for i in range(3, 11)]
    held_out = load_comparisons(True, folder, Skipped())
    assert [p.answers[0] for p in held_out] == [f" a car {i}" for i in range(3, 12)]


def test_tldr_has_its_own_summaries_for_sft(folder):
    skipped = Skipped()
    training = load_summaries(False, folder, skipped)
    assert len(training) == 6 and skipped["empty answer"] == 1
    assert training[0] == Preference(
        "SUBREDDIT: r/tifu\n\nTITLE: T 0\n\nPOST: I fell.\n\nTL;DR:", [" train 0 fell."], [])
    assert [p.answers[0] for p in load_summaries(True, folder, Skipped())][0] == " valid 0 fell."


def test_held_out_rows_beyond_so_many_are_counted(folder, monkeypatch):
    monkeypatch.setattr(tldr, "MOST_HELD_OUT", 4)
    skipped = Skipped()
    assert len(load_comparisons(True, folder, skipped)) == 4
    assert skipped["held-out row beyond the first 4"] == 9 - 4
    assert len(load_comparisons(False, folder, Skipped())) == 8     # training rows are not limited


def test_a_file_that_is_not_there_is_fetched_from_where_it_was_published(tmp_path, monkeypatch):
    """It is kept under the publisher's file name, and its checksum is verified if there is one."""
    asked = []

    def download(url, path, sha256=None):
        asked.append((url, path, bool(sha256)))
        raise UserError("no network")
    for module in (hh, tldr):
        monkeypatch.setattr(module, "download", download)
    for load, what, folder in [(hh.load_dialogues, "train", tmp_path),
                               (hh.load_dialogues, "test", tmp_path),
                               (load_comparisons, False, tmp_path), (load_summaries, False, None)]:
        with pytest.raises(UserError):
            load(what, folder, Skipped())
    hub, blob = "https://huggingface.co/datasets/Anthropic/hh-rlhf", tldr.URL
    assert asked == [
        (f"{hub}/resolve/main/helpful-base/train.jsonl.gz",
         tmp_path / "helpful-base/train.jsonl.gz", True),
        (f"{hub}/resolve/main/helpful-base/test.jsonl.gz",
         tmp_path / "helpful-base/test.jsonl.gz", True),
        (f"{blob}/dataset/comparisons/batch3.json", tmp_path / "comparisons/batch3.json", False),
        (f"{blob}/datasets/tldr_3_filtered/train.jsonl",
         runtime.files.cache_folder() / "tldr_3_filtered/train.jsonl", False)]


def test_what_a_person_types_gets_the_form_that_the_model_has_read(tmp_path):
    """Of a file of one's own, that of its rows; while the file is missing, what was typed."""
    args = SimpleNamespace(data=tmp_path / "missing.jsonl")
    assert hh.HH().as_prompt("Why?", args) == "\n\nHuman: Why?\n\nAssistant:"
    assert hh.HH().as_prompt(dialogue("Why?") + ASSISTANT, args) == dialogue("Why?") + ASSISTANT
    for task in (reviews.Reviews(), own_file.OwnFile()):
        assert task.as_prompt("The plot", args) == "The plot"
    question = dialogue("Why?") + ASSISTANT
    for prompt, expected in [(dialogue("Hi") + ASSISTANT, question), ("Hi", "Why?")]:
        path = write(tmp_path / f"{len(prompt)}.jsonl",
                     [{"prompt": prompt, "chosen": " yes", "rejected": " no"}])
        assert own_file.OwnFile().as_prompt("Why?", SimpleNamespace(data=path)) == expected
    whole = tldr_prompt({"subreddit": "tifu", "title": "T", "post": "P"})
    assert tldr.TLDR().as_prompt(whole, args) == whole
    assert tldr.TLDR().as_prompt("I fell.", args).endswith("POST: I fell.\n\nTL;DR:")


# ------------------------------------------------------------------------------------------------
# Both scripts from end to end
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """A folder with a tiny GPT-2 in the hub's layout, and a stand-in for GPT-2's tokenizer that
    needs no file: it has as many ids and the same end-of-text, but encodes text as bytes. (The
    other ids stand for three bytes each, which no merge ever reaches.)"""
    ranks = {i.to_bytes(1 if i < 256 else 3, "big"): i for i in range(50256)}
    bytes_only = tiktoken.Encoding("gpt2", pat_str=tasks.tokenizers.GPT2_PATTERN,
                                   mergeable_ranks=ranks,
                                   special_tokens={"<|endoftext|>": 50256})
    for module in (train_sft, tasks.checkpoint):
        monkeypatch.setattr(module, "get_tokenizer", lambda name: bytes_only)
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=256, n_layer=1, n_head=1, n_embd=4)).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


QUICK = "--steps 3 --batch 4 --log-every 1 --eval-every 2 --device cpu".split()


@pytest.mark.parametrize("task", ["hh", "tldr"])
def test_each_task_goes_from_pretrained_weights_to_a_folder_that_opens_elsewhere(
        task, folder, gpt2, tmp_path, capsys):
    """SFT, DPO, the table and the export all run. DPO has the paper's beta and starts at log 2."""
    there = ["--task", task, "--data-dir", str(folder), "--out", str(tmp_path / "out"), *QUICK]
    train_dpo.main([*there, "--init", str(gpt2), "--max-new-tokens", "5"])
    out = capsys.readouterr().out
    assert f"({gpt2})" in out and f"beta {0.5 if task == 'tldr' else 0.1}" in out
    assert "1 x empty answer" in out
    first = (tmp_path / "out/dpo_metrics.csv").read_text().splitlines()[2].split(",")
    assert float(first[1]) == pytest.approx(math.log(2), abs=1e-5)
    model, facts = load_checkpoint(tmp_path / "out/dpo.pt")
    assert facts["init"] == str(gpt2) and facts["source"] == task
    sample.main(["--task", task, "--out", str(tmp_path / "out"), "--device", "cpu",
                 "--export", str(tmp_path / "export")])
    again = GPT.from_pretrained(tmp_path / "export")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


def test_a_folder_of_the_hub_can_be_the_reference_and_sampled(folder, gpt2, tmp_path, capsys):
    """DPO can start from somebody else's SFT model, without SFT of our own, and sample.py opens
    that model like any other."""
    train_dpo.main(["--task", "hh", "--data-dir", str(folder), "--sft", str(gpt2), *QUICK,
                    "--out", str(tmp_path / "out"), "--max-new-tokens", "5"])
    assert not (tmp_path / "out/sft.pt").exists() and (tmp_path / "out/dpo.pt").exists()
    capsys.readouterr()
    sample.main(["--task", "hh", "--checkpoint", str(gpt2), "--prompt", "Why?",
                 "--max-new-tokens", "3", "--device", "cpu"])
    assert "Why?" in capsys.readouterr().out


def test_a_learning_rate_far_above_the_papers_earns_one_line(folder, gpt2, tmp_path, capsys):
    """The paper's 1e-6 is for pretrained weights: 1e-5 is accepted, 2e-5 gets a warning. Random
    weights need far more, so they get none."""
    hh = ["--task", "hh", "--data-dir", str(folder), *QUICK, "--max-new-tokens", "2"]
    for lr, warned in [("1e-5", 0), ("2e-5", 1)]:
        train_dpo.main([*hh, "--sft", str(gpt2), "--lr", lr, "--out", str(tmp_path / lr)])
        assert capsys.readouterr().err.count("warning: --lr") == warned
    train_sft.main([*hh[:-2], "--init", str(gpt2), "--lr", "3e-3", "--out", str(tmp_path / "a")])
    assert "warning: --lr 0.003 is 150 times the usual 2e-05" in capsys.readouterr().err
    small = "--n-layer 1 --n-head 1 --n-embd 4 --init random".split()
    train_sft.main([*hh[:-2], *small, "--lr", "3e-3", "--out", str(tmp_path / "b")])
    train_dpo.main([*hh, "--lr", "3e-3", "--out", str(tmp_path / "b")])
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("main, flags, words", [
    (train_sft.main, ["--task", "hh", "--n-layer", "3"], "--n-layer is for --init random"),
    (train_sft.main, ["--task", "hh", "--init-std", "0.1"], "--init-std is for --init random"),
    (train_sft.main, ["--init", "gpt2", "--task", "reviews"], "it needs --tokenizer gpt2"),
    (train_sft.main, ["--task", "hh", "--data", "a.jsonl"], "choose one"),
    (train_sft.main, ["--tokenizer", "gpt2", "--reviews", "9", "--init", "nowhere"],
     "nowhere/config.json: cannot be read"),
    (train_dpo.main, ["--task", "hh", "--init", "gpt2", "--sft", "a.pt"], "choose"),
    (sample.main, ["--export", "a", "--compare"], "--export writes one checkpoint"),
])
def test_flags_that_contradict_each_other_are_refused(gpt2, main, flags, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main([*flags, "--out", str(tmp_path / "out"), "--device", "cpu"])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1 and words in err


def test_dpo_refuses_an_sft_model_of_other_weights_than_asked_for(folder, gpt2, tmp_path, capsys):
    hh = ["--task", "hh", "--data-dir", str(folder), "--out", str(tmp_path / "out"), *QUICK]
    train_sft.main([*hh, "--init", str(gpt2)])
    with pytest.raises(SystemExit):
        train_dpo.main([*hh, "--init", "gpt2"])
    assert f"was trained from {gpt2} weights, not gpt2" in capsys.readouterr().err


def test_defaults_of_the_tasks_are_those_of_appendix_b():
    """beta is 0.1, and 0.5 for TL;DR; the learning rate is 1e-6. SFT starts from GPT-2."""
    for task, beta in [("hh", 0.1), ("tldr", 0.5)]:
        args = train_dpo.parse_args(["--task", task])
        assert (args.beta, args.lr, args.batch, args.warmup) == (beta, 1e-6, 64, 150)
        args = train_sft.parse_args(["--task", task])
        assert (args.init, args.tokenizer, args.lr) == ("gpt2", "gpt2", 2e-5)
    assert train_sft.parse_args([]).init == "random"
