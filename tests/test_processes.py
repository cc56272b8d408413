"""Several processes: two of them, connected by gloo on a CPU, do the same run as one.

    pytest tests/test_processes.py
    torchrun --nproc_per_node 2 tests/test_processes.py FOLDER      # what the two processes do

The first command starts the second in the background, which makes each run of RUNS and leaves its
weights and metrics in a folder of their own. pytest makes the same runs in one process, to compare.
"""

import copy
import csv
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import runtime.cli  # noqa: E402
import runtime.errors  # noqa: E402
import runtime.parallel  # noqa: E402
import runtime.run  # noqa: E402
import sample  # noqa: E402
import train_dpo  # noqa: E402
import train_sft  # noqa: E402
from classroom import assignment  # noqa: E402
from data import Batches, Encoded  # noqa: E402
from experiments import benchmark, curves, frontier, online, ppo, reward_model  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from runtime.cli import set_up  # noqa: E402
from runtime.errors import UserError  # noqa: E402
from runtime.parallel import process_rank  # noqa: E402
from runtime.run import Run, load_state  # noqa: E402
from tasks.checkpoint import load_checkpoint  # noqa: E402
from tasks.scalar_gpt import ScalarGPT  # noqa: E402

# Name: (script, flags). There are seven prompts with three answers each, which two processes cannot
# share equally.
RUNS = {
    "SFT": (train_sft, dict(batch=3)),
    "SFT in parts": (train_sft, dict(batch=7, accumulate=2)),
    "DPO": (train_dpo, dict(batch=13)),
    "DPO in parts": (train_dpo, dict(batch=20, accumulate=2)),
    **{loss: (train_dpo, dict(batch=11, loss=loss)) for loss in train_dpo.LOSSES},
    "reward model": (reward_model, dict(batch=13)),
    "PPO": (ppo, dict(batch=8, minibatch=4, accumulate=2, max_new_tokens=8, critic_lr=1e-2)),
    "online": (online, dict(batch=13, samples=3, rounds=2, accumulate=2, max_new_tokens=8)),
}
STEPS = 4
SFT = ("--n-layer 1 --n-head 2 --n-embd 16 --block-size 64 --reviews 600 --batch 93 --lr 2e-2 "
       "--warmup 4 --steps 40 --device cpu").split()
DPO = ("--prefixes 60 --samples 3 --max-new-tokens 40 --steps 6 --batch 13 --log-every 2 "
       "--eval-every 4 --eval-prompts 40 --warmup 2 --device cpu").split()


def train(name, out, **changes):
    """Make one of RUNS, in float64. Returns the model."""
    script, flags = RUNS[name]
    args = script.parse_args(["--device", "cpu"])
    flags = flags | changes | dict(out=out, row_length=32, steps=STEPS, lr=1e-2, warmup=2,
                                   log_every=2)
    if script not in (ppo, online):
        flags["eval_every"] = 2
    for flag, value in flags.items():
        assert hasattr(args, flag), flag
        setattr(args, flag, value)
    set_up(args)
    out.mkdir(exist_ok=True)
    torch.manual_seed(5)
    config = GPTConfig(block_size=32, vocab_size=20, n_layer=2, n_head=2, n_embd=8)
    model = GPT(config, 0.3).double()
    numbers = torch.Generator().manual_seed(1)
    items = [Encoded(draw[:2], [draw[2:4], draw[4:7], draw[7:7 + n % 5 + 1]],
                     [(0, 1), (0, 2), (1, 2)])
             for n, draw in enumerate(torch.randint(0, 20, (7, 12), generator=numbers).tolist())]
    if script is train_sft:
        items = [Encoded(item.prompt, item.answers[:1], []) for item in items]
    if script in (ppo, online):
        reference, prompts = copy.deepcopy(model), [item.prompt for item in items]
        script.train(model, reference, prompts, lambda items: [len(item.answers[0]) / 8
                                                               for item in items], 0, args)
        return model
    if script is reward_model:
        model = ScalarGPT.from_gpt(model).double()
        reward_model.train(model, items, items[:3], args)
        return model
    for item, logps in zip(items, sample.logps_of(model, items, 32)):
        item.ref_logps = logps
    script.train(model, items, items[:3], args)
    return model


def stop_in_step(number):
    """An update that sends SIGTERM to the second process, and to no other, in this step."""
    update, steps = train_sft.update, itertools.count()

    def signalled(*arguments):
        if next(steps) == number and process_rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return update(*arguments)
    return signalled


def work(folder):
    """What each of the two processes does: a wrong command, all RUNS, a stopped and resumed one,
    both commands."""
    try:
        train_dpo.main(["--beta", "-1"])                        # before the processes are joined
    except SystemExit as error:
        (folder / f"code_{os.environ['RANK']}").write_text(str(error.code))
    for name in RUNS:
        calls, right = [], train_sft.sum_gradients              # which all loops call by update()
        train_sft.sum_gradients = lambda model: calls.append(1) or right(model)
        model = train(name, folder / name)
        train_sft.sum_gradients = right
        torch.save((model.state_dict(), len(calls)), folder / name / f"process_{process_rank()}.pt")
    out, right = folder / "stopped", train_sft.update
    train_sft.update = stop_in_step(2)
    try:
        train("SFT", out)
    except runtime.errors.Interrupted:
        torch.save(load_state(out / "sft_state.pt")["step"], out / f"stopped_{process_rank()}.pt")
        if process_rank() == 0:
            shutil.copy(out / "sft_state.pt", folder / "after_step_2.pt")
    train_sft.update = right
    model = train("SFT", out, resume=True)
    torch.save((model.state_dict(), 0), out / f"process_{process_rank()}.pt")
    train_sft.main([*SFT, "--out", str(folder / "commands")])
    train_dpo.main([*DPO, "--out", str(folder / "commands")])


def torchrun(*arguments, **streams):
    """Start a script in two processes. Returns the Popen of the process that waits for both."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         *map(str, arguments)], cwd=ROOT, env=environment, text=True, **streams)


def start_pair(folder, **streams):
    return torchrun(__file__, folder, **streams)


BACKGROUND = {"pair": start_pair}           # see conftest.py


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def assert_alike(left, right, within=2e-6):
    """Assert that the numbers of two CSV files are equal to about the six digits printed."""
    left, right = rows_of(left), rows_of(right)
    assert [row["step"] for row in left] == [row["step"] for row in right]
    for ours, theirs in zip(left, right):
        for name in ours:
            assert bool(ours[name]) == bool(theirs[name])
            if ours[name]:
                assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=2e-5, abs=within)


@pytest.fixture(scope="module")
def pair(in_background):
    """The folder of two processes that have done their `work`."""
    return in_background[start_pair].wait()


# ------------------------------------------------------------------------------------------------
# The loops
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_end_with_the_weights_of_one(pair, tmp_path, name):
    """Each loss is divided by the size of the whole batch and gradients are added up, so it does
    not matter which process has the larger share. In float64 the weights agree to 1e-9 (after the
    32 updates of PPO, to 1e-6: Adam scales up the rounding of gradients that are nearly 0)."""
    alone = train(name, tmp_path).state_dict()
    for process in (0, 1):
        weights, _ = torch.load(pair / name / f"process_{process}.pt", weights_only=True)
        for key, weight in weights.items():
            torch.testing.assert_close(weight, alone[key], rtol=0,
                                       atol=1e-6 if name == "PPO" else 1e-9)


@pytest.mark.parametrize("name", RUNS)
def test_metrics_are_those_of_all_processes(pair, tmp_path, name):
    """Every number of every line, also of held-out data, comes from sums and counts that are added
    up over all processes. (TRL #2474 is about metrics of one process only.)"""
    train(name, tmp_path)
    [ours] = (pair / name).glob("*_metrics.csv")
    assert_alike(ours, tmp_path / ours.name)


@pytest.mark.parametrize("name", RUNS)
def test_gradients_travel_once_an_update(pair, name):
    """They are not exchanged once per micro-batch. A step of PPO makes four passes over two
    minibatches, with one update of the policy and one of the critic for each."""
    updates = ppo.PASSES * 2 * 2 if name == "PPO" else 1
    for process in (0, 1):
        _, calls = torch.load(pair / name / f"process_{process}.pt", weights_only=True)
        assert calls == updates * STEPS


def test_a_signal_to_one_process_stops_all_after_the_same_step(pair, tmp_path):
    """Only the second process gets the signal, in step 2, the third. Both finish that step and
    save. Resumed, they end where an undisturbed run ends."""
    for process in (0, 1):
        assert torch.load(pair / "stopped" / f"stopped_{process}.pt") == 3
    alone = train("SFT", tmp_path).state_dict()
    for process in (0, 1):
        weights, _ = torch.load(pair / "stopped" / f"process_{process}.pt", weights_only=True)
        for key, weight in weights.items():
            torch.testing.assert_close(weight, alone[key], rtol=0, atol=1e-9)
    assert_alike(pair / "stopped" / "sft_metrics.csv", tmp_path / "sft_metrics.csv")


def test_a_run_may_go_on_with_another_number_of_processes(pair, tmp_path):
    """Two processes were stopped after three of the four steps. One goes on with their training
    state, which does not depend on their number, and ends where one process alone ends, with the
    metrics of all four steps."""
    (tmp_path / "resumed").mkdir()
    shutil.copy(pair / "after_step_2.pt", tmp_path / "resumed" / "sft_state.pt")
    assert load_state(pair / "after_step_2.pt")["step"] == STEPS - 1
    resumed = train("SFT", tmp_path / "resumed", resume=True).state_dict()
    alone = train("SFT", tmp_path / "alone").state_dict()
    for key, weight in resumed.items():
        torch.testing.assert_close(weight, alone[key], rtol=0, atol=1e-9)
    assert_alike(*(tmp_path / name / "sft_metrics.csv" for name in ("resumed", "alone")))


# ------------------------------------------------------------------------------------------------
# The commands
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(pair, tmp_path_factory):
    """(folder of two processes, folder of one, SFT weights of one) after both commands. Both DPO
    runs start from the same SFT weights."""
    two, one = pair / "commands", tmp_path_factory.mktemp("one")
    train_sft.main([*SFT, "--out", str(one)])
    alone = load_checkpoint(one / "sft.pt")[0].state_dict()
    (one / "sft.pt").write_bytes((two / "sft.pt").read_bytes())
    train_dpo.main([*DPO, "--out", str(one)])
    return two, one, alone


def test_the_float32_weights_of_two_processes_are_those_of_one_to_1e_6(folders):
    """After 40 steps of 93 texts. The bias of the keys, the middle third of c_attn's, is left out:
    it adds the same number to all scores of a query, so its gradient is rounding error, which Adam
    scales up to a step."""
    two, _, alone = folders
    for name, weight in load_checkpoint(two / "sft.pt")[0].state_dict().items():
        difference = weight - alone[name]
        if name.endswith("c_attn.bias"):
            difference = torch.cat([difference.chunk(3)[0], difference.chunk(3)[2]])
        assert difference.abs().max() <= 1e-6, name


def test_both_commands_write_under_torchrun_what_they_write_alone(folders):
    """The files are the same. Sampled answers and reference log-probs are equal to the byte,
    because processes share whole batches, each with a generator of its own. Metrics are equal
    within the precision of float32 for differences of log-probs around -50."""
    two, one, _ = folders
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    for name in ("preferences.jsonl", "reference.json"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
    for name in ("sft_metrics.csv", "dpo_metrics.csv"):
        assert_alike(two / name, one / name, within=2e-5)
    results = [json.loads((folder / "results.json").read_text()) for folder in (two, one)]
    assert results[0]["policies"]["sft"] == results[1]["policies"]["sft"]


def test_the_first_process_alone_speaks(pair):
    printed = (pair / "stdout").read_text()
    for line in ("starting from", "wrote", "DPO on", "SFT of", "held-out prompts, one sample"):
        count = printed.count(line)
        assert count == (3 if line == "wrote" else 1), line


def test_bad_input_under_torchrun_is_said_once_by_the_script(pair):
    """Both processes end with 2."""
    said = (pair / "stderr").read_text()
    assert said.count("train_dpo.py: argument --beta: expected") == 1
    assert "train_dpo.py, process 1" not in said
    assert [(pair / f"code_{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


@pytest.mark.parametrize("asked_before, said", [(0, True), (1, False)])
def test_an_error_is_said_by_the_process_that_has_it_first(asked_before, said, monkeypatch, capfd):
    """Of two processes that are joined, this is the second. SFT is a command within the command of
    DPO, whose stderr is already closed to the second process."""
    class Store:
        def add(self, message, n):
            return asked_before + n
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime.parallel, "STORES", [Store()])

    @runtime.cli.command
    def inner(argv):
        raise UserError("half of a file")
    with pytest.raises(SystemExit) as caught:
        runtime.cli.command(lambda argv: inner(argv))([])
    assert caught.value.code == 2
    words = "test_processes.py, process 1: half of a file\n"
    assert capfd.readouterr().err == (words if said else "")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can do this")
def test_workers_do_not_outlive_a_torchrun_that_was_killed():
    """They would wait for each other for hours, or go on writing where a new run has begun. Here a
    child stands for torchrun and its child for a worker; only they write to the pipe. So when
    the child is killed, reading ends if the worker, too, has ended."""
    reading, writing = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        if os.fork() == 0:
            signal.alarm(60)                    # ends it if nothing else does
            runtime.parallel.end_with_torchrun()
            os.write(writing, b"ready")
        signal.pause()
        os._exit(1)
    os.close(writing)
    assert os.read(reading, 5) == b"ready"
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert select.select([reading], [], [], 30)[0] and os.read(reading, 5) == b""
    os.close(reading)


@pytest.mark.parametrize("left_over", [{"RANK": "1", "WORLD_SIZE": "2"},
                                       {"RANK": "abc", "WORLD_SIZE": "1", "LOCAL_RANK": "7"}])
def test_variables_that_a_cluster_left_over_change_nothing(left_over, monkeypatch, capsys):
    """Only torchrun makes a run one of several processes."""
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        train_dpo.main(["--beta", "-1"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("train_dpo.py: argument --beta: expected")


@pytest.mark.parametrize("module, argv, what", [
    (benchmark, [], "the benchmark"), (curves, ["."], "drawing"),
    (frontier, ["--out", "/nonexistent"], "the frontier"),
    (sample, ["--prompt", ""], "talking"),
    (assignment, ["--list"], "making or grading an assignment")])
def test_tools_that_cannot_share_their_work_refuse_several_processes(module, argv, what,
                                                                      monkeypatch, capsys):
    """Of two processes that torchrun started, this is the first. With one process, torchrun is as
    good as python."""
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime.cli, "join_processes", lambda device: None)
    with pytest.raises(SystemExit) as caught:
        module.main(argv)
    assert caught.value.code == 2
    message = f"{what} takes one process: start it without torchrun\n"
    assert capsys.readouterr().err.endswith(message)
    monkeypatch.setenv("WORLD_SIZE", "1")
    runtime.cli.only_one_process(what)


def test_fewer_prompts_than_processes_is_one_sentence(monkeypatch):
    monkeypatch.setattr(data, "world_size", lambda: 3)
    items = [Encoded([1], [[2]], [])] * 2
    with pytest.raises(UserError, match="a batch of 2 prompts for 3 processes"):
        next(data.micro_batches(items, 1, 8, GPT(GPTConfig(8, 4, 1, 1, 4))))


def test_a_batch_that_is_too_small_in_some_step_is_refused_before_the_first(tmp_path, monkeypatch):
    """With three pairs per prompt, 13 pairs come from 5 or 6 prompts."""
    monkeypatch.setattr(runtime.run, "world_size", lambda: 6)
    items = [Encoded([1], [[2], [3], [4]], [(0, 1), (0, 2), (1, 2)])] * 7
    args = train_dpo.parse_args(["--batch", "13", "--out", str(tmp_path)])
    run = Run("dpo", train_dpo.COLUMNS, args, Batches(items, 13, 0),
              model=GPT(GPTConfig(8, 8, 1, 1, 8)), optimizer=None, scaler=None)
    with pytest.raises(UserError, match="--batch 13 is 5 prompts in some step, and there are 6"):
        next(run.steps())
    assert not list(tmp_path.iterdir())


def test_what_is_no_tensor_of_a_gpu_goes_by_way_of_the_cpu(monkeypatch, tmp_path):
    """By default PyTorch chooses only the accelerator's backend, which cannot send CPU tensors."""
    asked = []
    monkeypatch.setattr(runtime.parallel, "end_with_torchrun", lambda: asked.append("end"))
    monkeypatch.setattr(runtime.parallel, "STORES", [])
    monkeypatch.setattr(runtime.parallel.dist, "rendezvous", lambda url: iter([("store", 1, 2)]))
    monkeypatch.setattr(runtime.parallel.dist, "init_process_group",
                        lambda *a, **k: asked.append(a[0]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", asked.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, expected in (("cuda", "cuda:1"), ("cpu", "cpu")):
        args = train_dpo.parse_args(["--device", device])
        assert set_up(args) == torch.device(expected)
    assert asked == [1, "end", "cpu:gloo,cuda:nccl", "end", "gloo"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")         # the first of them says so too
    with pytest.raises(UserError, match="more processes than the 2 cuda devices"):
        set_up(train_dpo.parse_args([]))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU at most")
def test_two_gpus_end_with_the_weights_of_one(tmp_path):
    """Over NCCL, in float32, for which TF32 is not used."""
    flags = [*SFT, "--device", "cuda", "--precision", "float32"]
    assert torchrun("train_sft.py", *flags, "--out", tmp_path / "two").wait() == 0
    train_sft.main([*flags, "--out", str(tmp_path / "one")])
    weights = [load_checkpoint(tmp_path / name / "sft.pt")[0].wte.weight for name in ("one", "two")]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------
# Sharing a batch
# ------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 4), st.integers(1, 4))
def test_a_batch_is_dealt_out_whole_and_evenly(lengths, processes, accumulate):
    """Every prompt is in exactly one micro-batch of one process. Because they are dealt out by
    length, no two micro-batches differ by more tokens than the longest prompt and answer have."""
    items = [Encoded([1], [[2] * n], [], [float(i)]) for i, n in enumerate(lengths)]
    dealt, model = [], GPT(GPTConfig(64, 4, 1, 1, 4))
    with pytest.MonkeyPatch.context() as patch:
        for process in range(processes):
            patch.setattr(data, "process_rank", lambda: process)
            patch.setattr(data, "world_size", lambda: processes)
            if len(items) >= processes:
                dealt += data.micro_batches(items, accumulate, 64, model)
    if len(items) >= processes:
        found = sorted(int(i) for part in dealt for i in part.ref_logps)
        assert found == list(range(len(items)))
        tokens = [int((part.group >= 0).sum()) for part in dealt]
        assert len(dealt) == min(accumulate * processes, len(items))
        assert max(tokens) - min(tokens) <= max(lengths) + 1


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 30), st.integers(1, 5))
def test_what_was_dealt_out_comes_back_in_its_order(n, processes):
    """`all_gather` of things[rank::world_size] is things, for any number of both."""
    parallel = runtime.parallel
    things = list(range(n))
    with pytest.MonkeyPatch.context() as patch:
        def exchange(parts, mine):
            parts[:] = [things[number::processes] for number in range(processes)]
        patch.setattr(parallel, "world_size", lambda: processes)
        patch.setattr(parallel.dist, "all_gather_object", exchange)
        assert parallel.all_gather(things[:]) == things


if __name__ == "__main__":
    torch.set_num_threads(1)
    runtime.cli.command(lambda argv: work(Path(argv[0])))(sys.argv[1:])
