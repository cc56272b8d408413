"""Nothing lost: a run that is stopped, killed or broken continues from there, to the same end.

    pytest tests/test_nothing_lost.py

After a kill, only what is on disk is left. Most tests here kill a run with an exception that
nothing catches, in the same process, which is fast; one sends SIGKILL to real processes, which work
in the background. "The same end" is always meant to the last bit: weights, the optimizer's moments,
all of dpo_metrics.csv.
"""

import csv
import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import runtime.cli
import runtime.run
import sample
import train_dpo
import train_sft
from data import Batches, Encoded
from model import GPT, GPTConfig
from runtime.errors import UserError
from runtime.files import fingerprint, replacing, write_json
from runtime.log import Log
from runtime.run import load_state
from tasks import task_of
from tasks.checkpoint import load_checkpoint, save_checkpoint
from tasks.tokenizers import get_tokenizer

ROOT = Path(__file__).parent.parent
for_all = settings(deadline=None, max_examples=20, derandomize=True)
STEPS = 7


class Killed(BaseException):
    """Stands for a kill: nothing catches it, and what was in memory is gone."""


def items(n=6):
    """n prompts with three ranked answers each, and made-up reference log-probs."""
    numbers = torch.Generator().manual_seed(1)
    return [Encoded(draw[:2], [draw[2:4], draw[4:7], draw[7:]], [(0, 1), (0, 2), (1, 2)],
                    [-9.0, -14.0, -23.0])
            for draw in torch.randint(0, 20, (n, 12), generator=numbers).tolist()]


def train(script, out, resume=False, seed=0, data=None, held_out=None, **changes):
    """Run a training loop for STEPS steps. Returns its model."""
    # A step takes 5 of 18 pairs, or 4 of 6 texts, so epochs end in the middle of a step.
    flags = dict(out=out, row_length=32, steps=STEPS, batch=5 if script is train_dpo else 4,
                 lr=1e-2, warmup=3, log_every=2, eval_every=4, save_every=0.0, resume=resume,
                 seed=seed)
    args = script.parse_args([])
    for name, value in (flags | changes).items():
        assert hasattr(args, name), name
        setattr(args, name, value)
    torch.manual_seed(5)
    model = GPT(GPTConfig(block_size=32, vocab_size=20, n_layer=1, n_head=2, n_embd=8), 0.3)
    data = data or items()
    if script is train_sft:
        data = [Encoded(item.prompt, item.answers[:1], []) for item in data]
    with pytest.MonkeyPatch.context() as patch:
        if script is train_dpo:         # the reference log-probs are made up
            patch.setattr(script, "check_start", lambda *arguments: None)
        script.train(model, data, held_out or data[:3], args)
    return model


def everything(out):
    """(final training state, bytes of the metrics): what must be the same."""
    [state] = out.glob("*_state.pt")
    [metrics] = out.glob("*_metrics.csv")
    return load_state(state), metrics.read_bytes()


def rows_of(path):
    """The rows of a CSV file, as dicts."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same(left, right):
    """Whether two nested dicts and lists of tensors are equal to the last bit."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def killed_at(script, step):
    """An update that dies in step `step // 2`: before it if `step` is even, else after it."""
    calls = []
    update = script.update

    def dying(*arguments):
        calls.append(1)
        if len(calls) == step // 2 + 1 and step % 2 == 0:
            raise Killed
        norm = update(*arguments)
        if len(calls) == step // 2 + 1:
            raise Killed
        return norm
    return dying


def will_die(patch, script, death):
    """Patch the run so that it dies in step `death // 3`, counted from where this process starts:
    before its update, after it, or when what came before the step has been evaluated and logged,
    but not saved."""
    step, when = divmod(death, 3)
    if when < 2:
        patch.setattr(script, "update", killed_at(script, 2 * step + when))
        return
    calls, all_reduce = [], runtime.run.all_reduce      # how processes agree whether to save

    def dying(*arguments):
        calls.append(1)
        if len(calls) == step + 1:
            raise Killed
        return all_reduce(*arguments)
    patch.setattr(runtime.run, "all_reduce", dying)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """The results of undisturbed runs: {(script, accumulate): everything}."""
    found = {}
    for script in (train_sft, train_dpo):
        for accumulate in (1, 2):
            out = tmp_path_factory.mktemp("untouched")
            train(script, out, accumulate=accumulate)
            found[script, accumulate] = everything(out)
    return found


# ------------------------------------------------------------------------------------------------
# Killed, and resumed
# ------------------------------------------------------------------------------------------------


@for_all
@given(st.sampled_from([train_sft, train_dpo]), st.integers(1, 2), st.integers(1, 4),
       st.lists(st.integers(0, 3 * STEPS - 1), max_size=3))
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bytes(
        untouched, tmp_path_factory, script, accumulate, every, deaths):
    """It is killed up to three times, in any step, before or after its update or between its line
    of the log and its state, which is saved every few steps: the clock advances by a minute
    whenever it is read."""
    out, clock = tmp_path_factory.mktemp("killed"), iter(range(10**6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.run.time, "monotonic", lambda: 60 * next(clock))
        for death in deaths:
            with pytest.MonkeyPatch.context() as deadly:
                will_die(deadly, script, death)
                try:
                    train(script, out, resume=True, accumulate=accumulate, save_every=every)
                except Killed:
                    pass
        train(script, out, resume=True, accumulate=accumulate, save_every=every)
    state, metrics = everything(out)
    expected, expected_metrics = untouched[script, accumulate]
    for name in ("model", "optimizer", "scaler", "log", "step"):
        assert same(state[name], expected[name]), name
    assert metrics == expected_metrics


def test_what_is_compared_would_show_one_step_more_or_less(untouched, tmp_path):
    """The test above can fail: with one step left out, the weights differ."""
    train(train_dpo, tmp_path, steps=STEPS - 1)
    state, metrics = everything(tmp_path)
    expected, expected_metrics = untouched[train_dpo, 1]
    assert not same(state["model"], expected["model"])
    assert not same(state["optimizer"], expected["optimizer"]) and metrics != expected_metrics


DEATHS = {      # {phase: what is called in the midst of it, and how often until it is killed there}
    "sampling": (GPT, "hidden", 20), "reference": (GPT, "logps", 2),
    "training": (train_dpo, "update", 4)}


def run_and_kill(folder):
    """Make one run of DPO in folder/whole, and another in folder/killed: a process sends itself
    SIGKILL while it samples, the next while it computes the reference, the next while it trains,
    and the last one finishes. All are forks of this process, which has imported everything and
    used nothing. Exit codes go to folder/codes.json, what they print to folder/*.txt."""
    whole, killed = folder / "whole", folder / "killed"
    sft = ("--n-layer 1 --n-head 2 --n-embd 16 --block-size 128 --reviews 200 --steps 120 "
           f"--lr 1e-2 --seed 3 --device cpu --out {whole}").split()
    dpo = ("--prefixes 40 --samples 4 --max-new-tokens 96 --eval-prompts 20 --steps 10 "
           "--batch 16 --accumulate 2 --seed 3 --device cpu --out").split()
    again = [*dpo, str(killed), "--resume", "--save-every", "0"]
    assert torch._dynamo            # torch.optim imports it, which takes longer than all the rest
    codes = {"sft": in_fork(lambda: train_sft.main(sft), folder / "sft.txt")}
    killed.mkdir()
    (killed / "sft.pt").write_bytes((whole / "sft.pt").read_bytes())
    codes["whole"] = in_fork(lambda: train_dpo.main([*dpo, str(whole)]), folder / "whole.txt")
    for phase, death in DEATHS.items():
        codes[phase] = in_fork(lambda: die_at(*death) or train_dpo.main(again),
                               folder / f"{phase}.txt")
        codes[phase] = codes[phase], (killed / "dpo.pt").exists()
    codes["last"] = in_fork(lambda: train_dpo.main(again), folder / "last.txt")
    (folder / "codes.json").write_text(json.dumps(codes))


def in_fork(function, output):
    """Call a function in a fork of this process; what it prints goes to a file. Returns the exit
    code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(output, "w") as file, redirect_stdout(file):
                function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(owner, name, number):
    """Have this process send itself SIGKILL when owner.name is called for this number of times."""
    real, calls = getattr(owner, name), itertools.count(1)

    def dying(*arguments, **more):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **more)
    setattr(owner, name, dying)


def start_killing(folder, **streams):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, folder], env=environment, **streams)


BACKGROUND = {"kills": start_killing}           # see conftest.py


@pytest.fixture(scope="module")
def kills(in_background):
    """The folder of run_and_kill."""
    return in_background[start_killing].wait()


def test_sigkill_in_every_phase_of_dpo_costs_nothing_but_the_phase(kills):
    """Every file is that of an uninterrupted run."""
    codes = json.loads((kills / "codes.json").read_text())
    died = [-signal.SIGKILL, False]             # and there was no dpo.pt yet
    assert codes == {"sft": 0, "whole": 0, **dict.fromkeys(DEATHS, died), "last": 0}
    output = (kills / "last.txt").read_text()
    assert output.count("already computed") >= 2 and "going on" in output
    names = {path.name for path in (kills / "killed").iterdir()}
    assert names == {"dpo.pt", "dpo_metrics.csv", "preferences.jsonl", "preferences.key",
                     "reference.json", "reference.key", "results.json", "sft.pt"}
    for name in names:
        files = [kills / folder / name for folder in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_finished_phases_are_not_repeated_unless_something_they_depend_on_changed(
        tmp_path, monkeypatch, capsys):
    """Sampling depends on the SFT weights, seed and counts; the reference on weights and data."""
    sft = ("--n-layer 1 --n-head 2 --n-embd 16 --block-size 128 --reviews 100 --steps 120 "
           "--lr 1e-2 --device cpu").split()
    dpo = "--prefixes 20 --samples 3 --max-new-tokens 96 --eval-prompts 5 --steps 2 --device cpu"
    there, done = ["--out", str(tmp_path)], []
    monkeypatch.setattr(train_dpo, "measure", lambda *arguments, **facts: None)
    for module, name in [(train_dpo, "sample_answers"), (sample, "logps_of")]:
        def noted(*arguments, name=name, real=getattr(module, name), **more):
            done.append(name)
            return real(*arguments, **more)
        monkeypatch.setattr(module, name, noted)

    def phases(*words):
        done.clear()
        train_dpo.main([*there, *dpo.split(), *words])
        return done.copy()
    train_sft.main([*there, *sft])
    assert phases() == ["sample_answers", "logps_of"]
    assert phases() == phases("--beta", "0.2") == []
    assert phases("--samples", "4") == ["sample_answers", "logps_of"]
    assert phases("--samples", "4", "--row-length", "60") == ["logps_of"]
    (tmp_path / "reference.json").write_text("[[0]]")
    assert phases("--samples", "4") == ["logps_of"]
    (tmp_path / "preferences.jsonl").write_text("{}")
    assert phases("--samples", "4") == ["sample_answers"]           # the same answers and reference
    train_sft.main([*there, *sft, "--seed", "1"])
    assert phases("--samples", "4") == ["sample_answers", "logps_of"]


def test_reference_log_probs_of_other_weights_are_never_used(tmp_path, monkeypatch):
    """The file and the answers are the same, but the SFT model is another one. If the key of the
    cache left out the weights, its reference would be that of the first model."""
    rows = [{"prompt": f"P {i}", "chosen": f" good {i}", "rejected": " bad"} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--out", str(tmp_path), "--data", str(tmp_path / "a.jsonl"), "--device", "cpu",
             "--tokenizer", "reviews", "--steps", "1"]
    losses, references = [], []
    for seed in ("0", "1"):
        train_sft.main([*flags, *"--n-layer 1 --n-head 1 --n-embd 8 --block-size 64 --seed".split(),
                        seed])
        train_dpo.main([*flags, "--eval-prompts", "2", "--max-new-tokens", "4", "--seed", "0"])
        before, after = rows_of(tmp_path / "dpo_metrics.csv")
        losses += [before["held_out_loss"], after["loss"]]      # log 2, of policy = reference
        references.append(json.loads((tmp_path / "reference.json").read_text()))
    assert losses == ["0.693147"] * 4
    assert len(references[0]) == len(references[1]) == 30 and references[0] != references[1]


def test_a_kill_while_the_state_is_written_leaves_the_one_before(untouched, tmp_path, monkeypatch):
    """Writing the state after step 2 is cut off in the middle. The previous state is still there
    and complete."""
    real, saves = torch.save, []

    def dying(content, file):
        saves.append(1)
        if len(saves) == 4:         # the first is written before the first step
            file.write(b"half of a state")
            file.flush()
            raise Killed
        real(content, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", dying)
        with pytest.raises(Killed):
            train(train_dpo, tmp_path)
    assert load_state(tmp_path / "dpo_state.pt")["step"] == 2
    train(train_dpo, tmp_path, resume=True)
    state, metrics = everything(tmp_path)
    expected, expected_metrics = untouched[train_dpo, 1]
    assert same(state["model"], expected["model"]) and metrics == expected_metrics


def test_a_run_goes_on_with_the_micro_batches_it_began_with(tmp_path, untouched, monkeypatch):
    """It starts with two; when it is resumed, there would be memory for one. With two, sums are
    rounded as before. A number that is given takes precedence, because too little memory may be why
    the run ended."""
    numbers = iter([2, 1])
    monkeypatch.setattr(runtime.run, "fewest_micro_batches", lambda *arguments: next(numbers))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dpo, "update", killed_at(train_dpo, 6))
        with pytest.raises(Killed):
            train(train_dpo, tmp_path, accumulate=None)
    shutil.copytree(tmp_path, tmp_path / "named")
    train(train_dpo, tmp_path / "named", resume=True, accumulate=3)
    named, _ = everything(tmp_path / "named")
    assert named["step"] == STEPS and named["micro_batches"] == 3
    shutil.rmtree(tmp_path / "named")
    train(train_dpo, tmp_path, resume=True, accumulate=None)
    expected, expected_metrics = untouched[train_dpo, 2]
    state, metrics = everything(tmp_path)
    assert same(state, expected) and metrics == expected_metrics


# ------------------------------------------------------------------------------------------------
# What cannot be resumed is refused, with the reason
# ------------------------------------------------------------------------------------------------


def interrupted(script, out, **changes):
    """A folder with the training state of a run that was killed in its fourth step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "update", killed_at(script, 6))
        with pytest.raises(Killed):
            train(script, out, **changes)
    return out


@pytest.mark.parametrize("changes, words", [
    ({"beta": 0.7}, "that run had --beta 0.5, this one has 0.7"),
    ({"lr": 0.02}, "--lr 0.01, this one has 0.02"), ({"batch": 6}, "--batch 5"),
    ({"seed": 1}, "--seed 0"), ({"steps": 9}, "--steps 7"),
    ({"loss": "plackett_luce"}, "--loss dpo"), ({"log_every": 4}, "--log-every 2"),
    ({"eval_every": 2}, "--eval-every 4"), ({"warmup": 2}, "--warmup 3"),
    ({"data": items(5)}, "the data changed since"),
])
def test_another_configuration_or_other_data_are_refused_by_name(tmp_path, changes, words):
    interrupted(train_dpo, tmp_path)
    before = (tmp_path / "dpo_state.pt").read_bytes(), (tmp_path / "dpo_metrics.csv").read_bytes()
    with pytest.raises(UserError) as caught:
        train(train_dpo, tmp_path, resume=True, **changes)
    assert "cannot resume" in str(caught.value) and words in str(caught.value)
    assert before == ((tmp_path / "dpo_state.pt").read_bytes(),
                      (tmp_path / "dpo_metrics.csv").read_bytes())


def test_another_reference_is_refused(tmp_path):
    """The answers are the same, but one was a little more likely: its rewards would be shifted."""
    interrupted(train_dpo, tmp_path)
    other = items()
    other[3].ref_logps[1] += 1e-6
    with pytest.raises(UserError, match="the data changed since"):
        train(train_dpo, tmp_path, resume=True, data=other)


def test_other_held_out_data_are_refused(tmp_path):
    """They change no weight, but all numbers about held-out data in dpo_metrics.csv."""
    interrupted(train_dpo, tmp_path)
    with pytest.raises(UserError, match="the held-out data changed since"):
        train(train_dpo, tmp_path, resume=True, held_out=items()[3:])


@pytest.mark.parametrize("what", ["another run's", "cut short", "gone"])
def test_metrics_are_those_of_the_run_whatever_became_of_the_file(untouched, tmp_path, what):
    """The metrics are part of the training state, and the file is written again from it."""
    path = interrupted(train_dpo, tmp_path) / "dpo_metrics.csv"
    if what == "gone":
        path.unlink()
    else:
        path.write_text("step,loss\n0,9.9\n" * 50 if what == "another run's" else "step,lo")
    train(train_dpo, tmp_path, resume=True)
    assert path.read_bytes() == untouched[train_dpo, 1][1]


def test_other_weights_to_start_from_are_refused(tmp_path, monkeypatch):
    interrupted(train_dpo, tmp_path)
    monkeypatch.setattr(torch, "manual_seed", lambda seed, real=torch.manual_seed: real(seed + 1))
    with pytest.raises(UserError, match="the weights to start from changed since"):
        train(train_dpo, tmp_path, resume=True)


class Hostile:
    def __reduce__(self):
        return open, ("pwned", "w")


def test_a_damaged_or_foreign_state_is_refused_and_kept(tmp_path, monkeypatch):
    """Half a file, an empty one, a checkpoint, a pickle that runs code, the other loop's state."""
    monkeypatch.chdir(tmp_path)
    path = interrupted(train_dpo, tmp_path) / "dpo_state.pt"
    good = path.read_bytes()
    save_checkpoint("checkpoint.pt", GPT(GPTConfig(32, 20, 1, 2, 8)))
    torch.save(Hostile(), "hostile.pt")
    (tmp_path / "sft").mkdir()
    other = interrupted(train_sft, tmp_path / "sft") / "sft_state.pt"
    for content in (good[:len(good) // 2], b"", Path("checkpoint.pt").read_bytes(),
                    Path("hostile.pt").read_bytes(), other.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match="dpo_state.pt: "):
            train(train_dpo, tmp_path, resume=True)
        assert path.read_bytes() == content
    assert not (tmp_path / "pwned").exists()


def test_a_flipped_bit_in_a_state_is_refused_or_changes_nothing(tmp_path):
    """Most bytes of the file are numbers, and any bit of them makes another number. The archive has
    a checksum of each tensor. (Bits of its padding and of dates mean nothing.)"""
    path = interrupted(train_dpo, tmp_path) / "dpo_state.pt"
    good, expected = path.read_bytes(), load_state(path)
    positions = torch.Generator().manual_seed(1)
    refused = 0
    for at in torch.randint(len(good), (200,), generator=positions).tolist():
        damaged = bytearray(good)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            assert same(load_state(path), expected), at
        except UserError as error:
            assert str(error) == f"{path}: not the training state of a run, or a damaged one"
            refused += 1
    assert refused > 100


def test_a_tensor_that_is_marked_as_a_folder_is_refused(tmp_path):
    """One bit, 38 bytes after the beginning of an entry of the archive's directory, marks it as a
    folder, and then torch.load returned memory that nobody had written to."""
    path = interrupted(train_dpo, tmp_path) / "dpo_state.pt"
    damaged = bytearray(path.read_bytes())
    damaged[damaged.rfind(b"PK\x01\x02") + 38] ^= 0x10
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="a damaged one"):
        load_state(path)


@pytest.mark.parametrize("where, value", [
    ("step", "3"), ("step", -1), ("micro_batches", 0), ("flags", None), ("digests", [1]),
    ("model", None), ("model wte.weight", 1.0), ("model wte.weight", torch.zeros(3)),
    ("optimizer", {}), ("optimizer state 0", None), ("optimizer state 0 exp_avg", [1.0]),
    ("optimizer state 0 exp_avg", torch.zeros(3)), ("optimizer state 0 step", torch.zeros(3)),
    ("optimizer param_groups 0 betas", (0.9,)), ("optimizer param_groups 0 betas", "betas"),
    ("optimizer param_groups 1 weight_decay", 0.1), ("log", 7), ("log overflows", "many"),
    ("log text", 7), ("log sums", {"loss": "x"}), ("log counts", None), ("log latest", {"lr": "x"}),
])
def test_a_field_of_another_type_or_shape_is_refused(tmp_path, where, value):
    """AdamW's load_state_dict accepts nearly all of them, and with moments of another shape PyTorch
    wrote beyond its memory."""
    path = interrupted(train_dpo, tmp_path) / "dpo_state.pt"
    state = content = load_state(path)
    *parents, name = [int(word) if word.isdigit() else word for word in where.split()]
    for parent in parents:
        content = content[parent]
    content[name] = value
    torch.save(state, path)
    with pytest.raises(UserError, match="not the training state of a run, or a damaged one"):
        train(train_dpo, tmp_path, resume=True)


def test_a_run_says_when_there_is_something_to_resume_and_when_there_is_not(tmp_path, capsys):
    train(train_dpo, tmp_path, resume=True)
    assert "no unfinished run to resume" in capsys.readouterr().out
    path = interrupted(train_sft, tmp_path) / "sft_state.pt"
    before = path.read_bytes()
    capsys.readouterr()
    train(train_sft, tmp_path)
    assert "--resume would have continued" in capsys.readouterr().out
    assert path.with_suffix(".old1").read_bytes() == before     # a forgotten flag costs nothing
    second = (interrupted(train_sft, tmp_path) / "sft_state.pt").read_bytes()
    train(train_sft, tmp_path)                                  # nor does forgetting it again
    assert path.with_suffix(".old1").read_bytes() == before
    assert second in [old.read_bytes() for old in tmp_path.glob("sft_state.old*")]


# ------------------------------------------------------------------------------------------------
# What the log says, and a second round
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_round(tmp_path_factory):
    """(folder, flags) of a run of both commands on a file of preferences."""
    out = tmp_path_factory.mktemp("first")
    rows = [{"prompt": f"P {i}", "chosen": f" good {i}", "rejected": " bad"} for i in range(30)]
    (out / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", str(out / "a.jsonl"), *"--tokenizer reviews --device cpu".split()]
    train_sft.main([*flags, "--out", str(out), "--steps", "1",
                    *"--n-layer 1 --n-head 1 --n-embd 8 --block-size 64".split()])
    flags += "--steps 5 --batch 8 --lr 1e-2 --eval-prompts 3 --max-new-tokens 8".split()
    train_dpo.main([*flags, "--out", str(out)])
    return out, flags


def test_the_last_row_of_the_log_is_of_the_weights_that_are_saved(first_round):
    """Eq. 7 of the held-out pairs, from the log-probs under the two files. Row 0 is log 2."""
    out, flags = first_round
    args = train_dpo.parse_args([*flags, "--out", str(out)])
    args.row_length = 64
    _, held_out = task_of(args).encoded_preferences(get_tokenizer("reviews"), args)
    of_sft, of_dpo = [sample.logps_of(load_checkpoint(out / name)[0], held_out, 64)
                      for name in ("sft.pt", "dpo.pt")]
    losses = [math.log1p(math.exp(-args.beta * ((pi[w] - pi[l]) - (ref[w] - ref[l]))))
              for item, pi, ref in zip(held_out, of_dpo, of_sft) for w, l in item.pairs]
    rows = rows_of(out / "dpo_metrics.csv")
    assert [row["step"] for row in rows] == list("012345") and len(losses) > 1
    assert rows[0]["loss"] == "" and rows[0]["held_out_loss"] == "0.693147"
    mean = sum(losses) / len(losses)
    assert float(rows[-1]["held_out_loss"]) == pytest.approx(mean, rel=1e-5)
    assert float(rows[-2]["held_out_loss"]) != pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_a_second_round_does_not_overwrite_the_policy_it_starts_from(
        first_round, tmp_path, link, capsys):
    out, flags = first_round
    start = out / "dpo.pt"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    if link:
        start = tmp_path / "start.pt"
        link(out / "dpo.pt", start)
    with pytest.raises(SystemExit) as caught:
        train_dpo.main([*flags, "--out", str(out), "--sft", str(start)])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (f"train_dpo.py: --sft {start}: this run would overwrite it; "
                                       "choose another folder with --out\n")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_second_round_in_another_folder_is_measured_against_its_own_start(
        first_round, tmp_path, capsys):
    """Its reference is the policy of the first round. Measured against another one, it warns."""
    out, flags = first_round
    train_dpo.main([*flags, "--out", str(tmp_path), "--sft", str(out / "dpo.pt"), "--lr", "0.1"])
    measured = json.loads((tmp_path / "results.json").read_text())["policies"]
    assert measured["sft"]["kl"] == 0 < measured["dpo"]["kl"]
    start, _ = load_checkpoint(out / "dpo.pt")
    _, facts = load_checkpoint(tmp_path / "dpo.pt")
    assert facts["reference"] == fingerprint(start)
    capsys.readouterr()
    kls = []
    for reference, lines in (("dpo.pt", 0), ("sft.pt", 1)):
        sample.main([*flags[:2], *"--device cpu --eval-prompts 3 --max-new-tokens 8 --out".split(),
                     str(tmp_path), "--evaluate", str(out / "dpo.pt"), str(tmp_path / "dpo.pt"),
                     "--reference", str(out / reference)])
        err = capsys.readouterr().err
        assert err.count("\n") == err.count(
            f"{tmp_path / 'dpo.pt'} was not trained from {out / reference}") == lines
        written = json.loads((tmp_path / "evaluation.json").read_text())["policies"]
        kls.append(written[str(tmp_path / "dpo.pt")]["kl"])
    assert kls[0] == pytest.approx(measured["dpo"]["kl"]) and kls[0] != kls[1]


def test_a_warm_up_takes_at_most_half_of_the_run_and_says_so(tmp_path, capsys):
    """Of seven steps it takes three, with a third, two thirds and all of the learning rate."""
    train(train_dpo, tmp_path, warmup=100, log_every=1)
    said = "the learning rate warms up over 3 steps, half of the run, not over 100\n"
    assert said in capsys.readouterr().out
    rates = [float(row["lr"]) for row in rows_of(tmp_path / "dpo_metrics.csv")[1:]]
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, *[1e-2] * 5], rel=1e-5)
    train(train_dpo, tmp_path, warmup=3, log_every=1)
    assert "warm-up" not in capsys.readouterr().out


def test_both_commands_run_outside_of_the_main_thread(first_round, tmp_path):
    """There, Python allows no handlers of signals; a notebook server may run commands there."""
    out, flags = first_round
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ThreadPoolExecutor(1) as thread:           # result() raises what was raised in it
        thread.submit(train_dpo.main, [*flags, "--out", str(tmp_path)]).result()
    assert (tmp_path / "sft.pt").exists() and (tmp_path / "dpo.pt").exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# ------------------------------------------------------------------------------------------------
# Ctrl-C and SIGTERM
# ------------------------------------------------------------------------------------------------


def raising_signal(script, number, at):
    """An update that first sends this process a signal, in step `at`."""
    calls, update = [], script.update

    def signalling(*arguments):
        calls.append(1)
        if len(calls) == at + 1:
            os.kill(os.getpid(), number)
        return update(*arguments)
    return signalling


@pytest.mark.parametrize("script", [train_sft, train_dpo])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
        untouched, tmp_path, capsys, script, number, code):
    before = signal.getsignal(number)

    def main(argv=None):
        train(script, tmp_path, save_every=60.0)
    main.__module__ = script.__name__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "update", raising_signal(script, number, 3))
        with pytest.raises(SystemExit) as caught:
            runtime.cli.command(main)()
    err = capsys.readouterr().err
    assert caught.value.code == code and "Traceback" not in err
    assert err.splitlines()[-1] == (f"{script.__name__}.py: stopped after 4 steps; the same "
                                    "command with --resume, without --fresh, goes on from there")
    [path] = tmp_path.glob("*_state.pt")
    assert load_state(path)["step"] == 4
    assert signal.getsignal(number) == before
    train(script, tmp_path, resume=True)
    state, metrics = everything(tmp_path)
    expected, expected_metrics = untouched[script, 1]
    assert same(state["model"], expected["model"]) and metrics == expected_metrics


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_last_state(tmp_path, monkeypatch, capsys):
    update = train_dpo.update

    def twice(*arguments):
        norm = update(*arguments)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return norm
    monkeypatch.setattr(train_dpo, "update", twice)
    with pytest.raises(KeyboardInterrupt):
        train(train_dpo, tmp_path)
    assert load_state(tmp_path / "dpo_state.pt")["step"] == 0


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_outside_of_training_ends_with_one_sentence(
        tmp_path, monkeypatch, capsys, number, code):
    """For example while answers are sampled. (A process in the background of a shell starts with
    Ctrl-C ignored, and these tests may be one, so the default handler is set first.)"""
    monkeypatch.setattr(train_dpo, "open_start", lambda *a: os.kill(os.getpid(), number))
    (tmp_path / "sft.pt").write_bytes(b"")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as caught:
            train_dpo.main(["--out", str(tmp_path), "--device", "cpu"])
            time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught.value.code == code
    assert capsys.readouterr().err == "train_dpo.py: stopped; what was finished is kept\n"


# ------------------------------------------------------------------------------------------------
# Gradients that are NaN or infinite
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [train_sft, train_dpo])
@pytest.mark.parametrize("value, step", [(math.nan, 2), (math.nan, 3), (math.inf, 2)])
def test_a_gradient_that_is_no_number_names_step_and_rows_and_spoils_nothing(
        untouched, tmp_path, script, value, step):
    """A line of the log is due after step 3, but not after step 2. The state before the broken step
    is kept, and a repaired run continues from there."""
    calls, update = [], script.update

    def breaking(model, *arguments):
        calls.append(1)
        if len(calls) == step + 1:
            model.wte.weight.grad[0, 0] = value
        return update(model, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "update", breaking)
        with pytest.raises(UserError) as caught:
            train(script, tmp_path)
    batches = Batches(items(), 5 if script is train_dpo else 4, 0, whole=script is train_sft)
    rows = sorted({item for _, item, _ in batches.units_of(step)})
    assert f"step {step}: the gradient is {value}" in str(caught.value)
    assert f"the prompts {', '.join(map(str, rows))}" in str(caught.value)
    [path] = tmp_path.glob("*_state.pt")
    assert load_state(path)["step"] == step
    train(script, tmp_path, resume=True)
    state, metrics = everything(tmp_path)
    expected, expected_metrics = untouched[script, 1]
    assert same(state["model"], expected["model"]) and metrics == expected_metrics


def test_a_broken_number_is_found_although_nobody_waits_for_it(tmp_path, monkeypatch):
    """Without a save or a line in between, the first broken step is still the one that is named."""
    calls, update = [], train_dpo.update

    def breaking(model, *arguments):
        calls.append(1)
        if len(calls) == 2:
            model.wte.weight.grad[0, 0] = math.nan
        return update(model, *arguments)
    monkeypatch.setattr(train_dpo, "update", breaking)
    with pytest.raises(UserError, match="step 1: the gradient is nan"):
        train(train_dpo, tmp_path, save_every=60.0, log_every=100, eval_every=100)
    assert load_state(tmp_path / "dpo_state.pt")["step"] == 0       # saved before step 0


def test_overflows_of_float16_are_the_scalers_business_until_they_go_on_for_too_long(tmp_path):
    """24 in a row are accepted; one finite step resets the count; the 25th in a row is an error."""
    class On:
        def is_enabled(self):
            return True
    log = Log(tmp_path / "log.csv", {}, batches=None, scaler=On())
    for _ in range(2):
        for step in range(24):
            log.note_update(step, torch.tensor(math.inf), lr=1.0)
        log.note_update(24, torch.tensor(1.0), lr=1.0)
    log.check_gradients()
    for step in range(24):
        log.note_update(step, torch.tensor(math.nan), lr=1.0)
        log.check_gradients()                         # a check does not reset the count
    log.note_update(24, torch.tensor(math.inf), lr=1.0)
    with pytest.raises(UserError, match="step 24: float16 overflowed 25 times in a row"):
        log.check_gradients()


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_file_is_saved_waits_until_it_is_complete(tmp_path, number):
    """Outside the loop too, where sft.pt and dpo.pt are written."""
    def handler(number, frame):
        raise KeyboardInterrupt
    before = signal.signal(number, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            with replacing(tmp_path / "a") as file:
                file.write(b"half ")
                os.kill(os.getpid(), number)
                file.write(b"and half")
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert (tmp_path / "a").read_bytes() == b"half and half"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The last update of a run can overflow, and nothing may look at the weights after it."""
    model = GPT(GPTConfig(8, 20, 1, 1, 4))
    save_checkpoint(tmp_path / "a.pt", model)
    before = (tmp_path / "a.pt").read_bytes()
    with torch.no_grad():
        model.wte.weight[0, 0] = math.inf
    with pytest.raises(UserError, match="some weights are NaN or infinite, so they are not saved"):
        save_checkpoint(tmp_path / "a.pt", model)
    assert (tmp_path / "a.pt").read_bytes() == before


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, capsys):
    """The lock belongs to the process: the system releases it however the process ends."""
    fcntl = pytest.importorskip("fcntl")
    flags = ["--out", str(tmp_path), *("--n-layer 1 --n-head 1 --n-embd 8 --block-size 64 "
                                       "--reviews 20 --steps 1 --device cpu").split()]
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    for script in (train_sft, train_dpo):
        with pytest.raises(SystemExit) as caught:
            script.main(["--out", str(tmp_path), "--device", "cpu"])
        assert caught.value.code == 2
        assert "another run is writing to this folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    os.close(other)
    train_sft.main(flags)
    train_sft.main(flags)               # and the first one has released it
    assert (tmp_path / "sft.pt").exists()


def test_a_full_disk_leaves_the_last_good_file(tmp_path):
    """A limit on the size of files cuts off the writing in the middle, as a full disk does."""
    path = tmp_path / "a.pt"
    save_checkpoint(path, GPT(GPTConfig(32, 20, 1, 1, 4)), seed=1)
    resource = pytest.importorskip("resource")
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError) as caught:
            save_checkpoint(path, GPT(GPTConfig(32, 1000, 1, 1, 64)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == (f"{path}: cannot be written: {os.strerror(errno.EFBIG)}; what was "
                                 "there before is kept")
    assert path.read_bytes() == before and load_checkpoint(path)[1] == {"seed": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_a_link_keeps_pointing_to_the_larger_disk(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "a.pt").symlink_to(tmp_path / "large" / "a.pt")
    save_checkpoint(tmp_path / "a.pt", GPT(GPTConfig(8, 20, 1, 1, 4)))
    assert (tmp_path / "a.pt").is_symlink() and (tmp_path / "large" / "a.pt").is_file()


def test_a_pipe_is_written_in_place(tmp_path):
    """Nor is /dev/null replaced by a file, as root could."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", [])
    assert os.read(reader, 100) == b"[]\n" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "dpo_metrics.csv").symlink_to("/dev/full")
    with pytest.raises(UserError, match="dpo_metrics.csv: cannot be written: No space left"):
        train(train_dpo, tmp_path)


@pytest.mark.gpu
def test_on_a_gpu_a_run_goes_on_between_two_lines_of_the_log(tmp_path):
    """The sums since the last line are loaded on the CPU; tensors on the GPU are added to them."""
    flags = ["--out", str(tmp_path), "--device", "cuda", "--save-every", "0", "--steps", "6",
             "--log-every", "4", "--reviews", "100", "--n-layer", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft, "update", killed_at(train_sft, 5))
        with pytest.raises(Killed):
            train_sft.main(flags)
    train_sft.main([*flags, "--resume"])
    assert len((tmp_path / "sft_metrics.csv").read_text().splitlines()) == 1 + 3


def test_no_state_is_left_when_all_is_done_and_checkpoints_have_plain_keys(tmp_path, monkeypatch):
    """No `_orig_mod.` of torch.compile, and no `module.` of a wrapper for several processes."""
    calls, torch_compile = [], torch.compile

    def compile_without_kernels(function):      # they need a C++ compiler
        compiled = torch_compile(function, backend="eager")
        return lambda *arguments: calls.append(1) or compiled(*arguments)
    monkeypatch.setattr(torch, "compile", compile_without_kernels)
    monkeypatch.setattr(GPT.logps, "compiled", None)
    flags = ["--out", str(tmp_path), "--device", "cpu", "--save-every", "0", "--compile", "on"]
    rows = [{"prompt": f"P {i}", "chosen": f" good {i}", "rejected": " bad"} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags += ["--data", str(tmp_path / "a.jsonl"), "--tokenizer", "reviews", "--steps", "1"]
    train_sft.main([*flags, *"--n-layer 1 --n-head 1 --n-embd 8 --block-size 64".split()])
    calls_of_sft = len(calls)
    train_dpo.main([*flags, "--eval-prompts", "2", "--max-new-tokens", "4"])
    assert 0 < calls_of_sft < len(calls)
    assert not list(tmp_path.glob("*_state.pt"))
    for name in ("sft.pt", "dpo.pt"):
        keys = torch.load(tmp_path / name, weights_only=True)["model"].keys()
        assert keys == load_checkpoint(tmp_path / name)[0].state_dict().keys()
        assert not [key for key in keys if "_orig_mod" in key or "module" in key]


@pytest.mark.parametrize("flag", ["--fresh", None])
def test_an_sft_run_that_did_not_end_is_not_mistaken_for_an_older_one_that_did(
        tmp_path, monkeypatch, flag, capsys):
    """A second SFT run was killed, so sft.pt is still that of the first. --fresh and --resume run
    SFT instead of using it; without them, DPO starts from it and says so."""
    small = ("--n-layer 1 --n-head 1 --n-embd 8 --block-size 64 --reviews 50 --steps 3 "
             "--device cpu").split()
    train_sft.main([*small, "--out", str(tmp_path)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft, "update", killed_at(train_sft, 3))
        with pytest.raises(Killed):
            train_sft.main([*small, "--out", str(tmp_path), "--seed", "1"])
    asked = []
    monkeypatch.setattr(train_sft, "main", lambda argv: asked.append(argv) or exit(0))
    with pytest.raises(SystemExit):
        train_dpo.main(["--out", str(tmp_path), "--seed", "1", "--device", "cpu",
                        *([flag] if flag else ["--resume"])])
    assert ("--resume" in asked[0]) == (flag is None)
    monkeypatch.setattr(train_dpo, "open_start", lambda *arguments: exit(0))
    with pytest.raises(SystemExit):
        train_dpo.main(["--out", str(tmp_path), "--seed", "1", "--device", "cpu"])
    words = "a later SFT run did not finish, and --resume would continue it"
    assert words in capsys.readouterr().out


def test_flags_that_begin_again_and_go_on_contradict_each_other(capsys):
    with pytest.raises(SystemExit) as caught:
        train_dpo.main(["--fresh", "--resume"])
    assert caught.value.code == 2 and "choose" in capsys.readouterr().err


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_and_kill(Path(sys.argv[1]))
