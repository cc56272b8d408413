"""The CUDA path on a machine without CUDA: the real training loops, evaluation and sampling, with
tensors that have a shape, a dtype and the device "cuda", but no content.

    pytest tests/test_cuda_path.py

PyTorch's FakeTensorMode computes shapes, dtypes and devices only. So these tests fail if a tensor
is on the wrong device, if autocast meets a dtype that it refuses, or if a training step reads a
number from the device. They do not show that anything is right, fast or even possible on a card:
that is for the tests marked gpu, which nobody has been able to run yet.

What FakeTensorMode cannot do in PyTorch's CPU build has stand-ins:

    device guard   that of the meta device, which does nothing
    backward       gives a gradient to each weight that the loss depends on. (PyTorch's engine
                   refuses CUDA tensors here; what it does for each operation is not tested.)
    pin_memory     returns the tensor itself
    Module.to      makes new weights
    Generator      none
    numbers read   item() is 0, and a mask and nonzero() select everything; only where reading is
                   allowed, which it is not within a training step of SFT and DPO
    the run        the training state and the log, which touch files; step 0, which is compared with
                   log 2, is left out

Two checks are added that kernels make and FakeTensorMode does not: the dtypes of a matrix product,
and a tensor on the CPU that is indexed by one on the device.
"""

import ctypes
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import train_dpo
import train_sft
from data import Encoded, pack
from experiments import ppo, reward_model
from model import GPT, GPTConfig
from sample import logps_of, sample_answers
from tasks.scalar_gpt import ScalarGPT
from train_sft import grad_scaler

CUDA = torch.device("cuda", 0)
CONFIG = GPTConfig(block_size=32, vocab_size=50, n_layer=1, n_head=2, n_embd=8)
EOT = 49
PRECISIONS = [None, torch.bfloat16, torch.float16]


class StandIns(TorchFunctionMode):
    """Replaces what the top of this file lists. reading: whether numbers may be read back."""

    def __init__(self, reading):
        super().__init__()
        self.reading = reading

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in ("__getitem__", "__setitem__"):
            return self.index(func, *args)
        if name == "pin_memory":
            return args[0]
        if name == "backward":
            return give_gradients(args[0].grad_fn)
        if self.reading and name in ("item", "__float__", "__bool__", "__index__", "tolist"):
            return zeros(args[0].shape, bool if name == "__bool__" else int)
        if self.reading and name == "nonzero":
            return torch.ones(args[0].numel(), args[0].dim(), dtype=torch.int64,
                              device=args[0].device)
        return func(*args, **kwargs)

    def index(self, func, x, index, *value):
        """x[index], or x[index] = value. A tensor on the CPU has no place for indices on the
        device, which FakeTensorMode does not notice."""
        indices = [i for i in (index if isinstance(index, tuple) else (index,))
                   if isinstance(i, torch.Tensor)]
        for i in indices:
            if x.device.type == "cpu" and i.device.type == "cuda":
                raise IndexError("indices should be either on cpu or on the same device as the "
                                 "indexed tensor (cpu)")
        if self.reading and [i.dtype for i in indices] == [torch.bool]:
            return x.flatten(0, indices[0].dim() - 1)
        return func(x, index, *value)


class SameTypes(TorchDispatchMode):
    """Refuses what kernels refuse and FakeTensorMode does not: a matrix product of two dtypes."""

    PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "dot", "index_put_", "index_add"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.PRODUCTS:
            dtypes = {x.dtype for x in args
                      if isinstance(x, torch.Tensor) and x.is_floating_point()}
            if len(dtypes) > 1:
                raise RuntimeError(f"{func} of {dtypes}")
        return func(*args, **kwargs or {})


def zeros(shape, kind):
    """Nested lists of zeros; a single one for the shape ()."""
    return [zeros(shape[1:], kind) for _ in range(shape[0])] if shape else kind(0)


def give_gradients(node, seen=None):
    """Set the grad of every weight below a node of the autograd graph."""
    seen = set() if seen is None else seen
    if node is None or node in seen:
        return
    seen.add(node)
    if hasattr(node, "variable"):
        node.variable.grad = torch.zeros_like(node.variable)
    for below, _ in node.next_functions:
        give_gradients(below, seen)


@contextmanager
def device_guard():
    """The CPU build has no device guard for CUDA, and many operations ask for one. Lends it that of
    the meta device. (1 and 14 are c10::DeviceType's CUDA and Meta.)"""
    try:
        [library] = (Path(torch.__file__).parent / "lib").glob("libc10.*")
        guards = (ctypes.c_void_p * 15).in_dll(ctypes.CDLL(str(library)),
                                               "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError):
        pytest.skip("this build of PyTorch does not show its table of device guards")
    before = guards[1]
    guards[1] = before or guards[14]
    yield
    guards[1] = before


class NoGenerator:
    def __init__(self, device):
        pass

    def manual_seed(self, seed):
        return None


def move(module, device):
    """Module.to, which cannot swap weights without content."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            setattr(part, name, torch.nn.Parameter(weight.detach().to(device)))
    return module


@contextmanager
def fake_cuda(reading=False):
    """A with block in which tensors on "cuda" can be made, without content."""
    with ExitStack() as stack:
        stack.enter_context(device_guard())
        stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", lambda *_: True))
        stack.enter_context(mock.patch("torch.nn.Module.to", move))
        stack.enter_context(mock.patch(
            "torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(mock.patch("torch.Generator", NoGenerator))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(SameTypes())
        yield stack.enter_context(StandIns(reading))


class FakeRun:
    """In place of a Run and its Log: steps 1 and 2, in two micro-batches, then an evaluation.
    Nothing is written. It notes which columns were logged, on which device."""

    n_steps, n_warmup, step = 3, 1, 2

    def __init__(self, name, columns, args, batches, held_out=(), digests=None, *, model, **_):
        self.args, self.batches, self.model, self.log, self.logged = args, batches, model, self, {}

    def steps(self, evaluate=None):
        yield from range(1, 3)
        if evaluate:
            evaluate()

    def micro_batches(self, step):
        return self.batches.micro_batches(step, 2, self.args.row_length, self.model)

    def add(self, count, **sums):
        self.logged |= {name: getattr(value, "device", None) for name, value in sums.items()}

    def note_update(self, step, grad_norm, lr):
        self.add(1, grad_norm=grad_norm)


def items(n=4):
    """Encoded preferences, of two and of three answers in turn."""
    two = Encoded([EOT, 1, 2], [[3, 4, EOT], [5, EOT]], [(0, 1)], [-1.0, -2.0])
    three = Encoded([EOT, 6], [[7, EOT], [8, 9, 10, EOT], [11, EOT]], [(0, 1), (2, 0)], [-1.0] * 3)
    return [two, three] * (n // 2)


def cuda_model(precision, kind=GPT):
    with torch.device(CUDA):
        model = kind(CONFIG)
    model.precision, model.tf32, model.vocab_multiple = precision, True, 64     # see set_precision
    return model


def run_loop(loop, monkeypatch, *arguments, **changes):
    """Call the train of a module for steps 1 and 2. Returns its FakeRun."""
    args = loop.parse_args([])
    defaults = {"row_length": 32, "batch": 4, "steps": 3}
    for name, value in (defaults | changes).items():
        setattr(args, name, value)
    args.out, made = Path("nowhere"), []

    def make(*positional, **named):
        made.append(FakeRun(*positional, **named))
        return made[-1]
    monkeypatch.setattr(loop, "Run", make)
    loop.train(*arguments, args)
    return made[0]


@pytest.fixture
def two_processes():
    """The first of two processes, whose messages nobody receives (backend `fake`)."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_of_sft_reads_nothing_from_the_device(precision, monkeypatch):
    with fake_cuda():
        texts = [Encoded(item.prompt, item.answers[:1], []) for item in items()]
        run = run_loop(train_sft, monkeypatch, cuda_model(precision), texts, texts)
    assert set(run.logged) == {"loss", "held_out_loss", "grad_norm"}
    assert set(run.logged.values()) == {CUDA}


@pytest.mark.parametrize("precision, loss", [
    (None, "dpo"), (torch.float16, "dpo"), *((torch.bfloat16, loss) for loss in train_dpo.LOSSES)])
def test_a_step_of_dpo_reads_nothing_from_the_device(precision, loss, monkeypatch):
    with fake_cuda():
        run = run_loop(train_dpo, monkeypatch, cuda_model(precision), items(8), items(), loss=loss)
    assert set(run.logged) == set(train_dpo.COLUMNS) - {"lr"}
    assert set(run.logged.values()) == {CUDA}


def test_a_step_of_one_of_two_processes_reads_nothing_either(monkeypatch, two_processes):
    test_a_step_of_dpo_reads_nothing_from_the_device(torch.float16, "dpo", monkeypatch)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_reward_model_trains_and_evaluates_on_the_device(precision, monkeypatch):
    """Its evaluation reads the rewards, so reading is allowed."""
    with fake_cuda(reading=True):
        run = run_loop(reward_model, monkeypatch, cuda_model(precision, ScalarGPT), items(8),
                       items())
    assert run.logged["grad_norm"] == run.logged["loss"] == run.logged["accuracy"] == CUDA


def test_a_step_of_ppo_stays_on_the_device(monkeypatch):
    """rollout, advantages_and_returns and improve. They read the sampled answers and the number of
    tokens, so reading is allowed; the answers are four times token 0. One pass is enough."""
    monkeypatch.setattr(ppo, "PASSES", 1)
    with fake_cuda(reading=True):
        prompts = [[EOT, 1, 2], [EOT, 3]] * 4
        models = [cuda_model(torch.float16) for _ in ("policy", "reference")]
        run = run_loop(ppo, monkeypatch, *models, prompts, lambda answers: [1.0] * len(answers),
                       EOT, batch=4, minibatch=2, max_new_tokens=4)
    assert {"reward", "kl", "clipped", "value_loss", "grad_norm"} <= set(run.logged)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_and_moments_stay_float32_on_the_device(precision):
    """The stand-in for backward gives a gradient to all weights that log pi(y|x) depends on, and
    those are all weights. In float16 the scaler is active."""
    with fake_cuda():
        model = cuda_model(precision)
        optimizer, scaler = model.optimizer(1e-3), grad_scaler(model)
        logps = model.logps(pack(items(), 32).to(CUDA))
        scaler.scale(logps.sum()).backward()
        assert all(weight.grad is not None for weight in model.parameters())
        norm = train_sft.update(model, optimizer, scaler, 1e-3, 1.0)
        moments = [moment for state in optimizer.state.values() for moment in state.values()]
        assert {(x.dtype, x.device) for x in [*model.parameters(), *moments, logps, norm]} == {
            (torch.float32, CUDA)}
    assert scaler.is_enabled() == (precision == torch.float16)


# ------------------------------------------------------------------------------------------------
# Without gradients
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scoring_reads_one_number_per_answer(precision):
    with fake_cuda(reading=True):
        assert logps_of(cuda_model(precision), items(), 32) == [[0, 0], [0, 0, 0]] * 2


@pytest.mark.parametrize("precision, settings", [
    (None, {}), (torch.float16, {}), (torch.bfloat16, {}), (torch.bfloat16, {"temperature": 0.0}),
    (torch.bfloat16, {"top_k": 3}), (torch.bfloat16, {"top_p": 0.5})])
def test_sampling_stays_on_the_device(precision, settings):
    """Prompts of two lengths, one of them twice; 12 tokens, so the finished rows are looked for
    once, and the answers are read at the end."""
    with fake_cuda(reading=True):
        answers = sample_answers(cuda_model(precision), [[1, 2, 3], [4], [4]], 12, 0, EOT,
                                 **settings)
    assert answers == [[0] * 12] * 3


# ------------------------------------------------------------------------------------------------
# What these tests notice
# ------------------------------------------------------------------------------------------------


def logps_of_two_devices(model, batch):
    return GPT.token_logps(model, batch) + torch.zeros(1)


def logps_that_wait(model, batch):
    return GPT.token_logps(model, batch) * batch.ref_logps.sum().item()


def logps_by_a_mask(model, batch):
    return GPT.token_logps(model, batch)[batch.target > 3]


def logps_without_a_cast(model, batch):
    hidden = model.hidden(batch.tokens, batch.positions, batch.mask()).flatten(0, 1)
    return hidden.bfloat16()[batch.source] @ model.wte.weight[0]


def logps_by_indices_on_the_cpu(model, batch):
    return torch.zeros(100)[batch.source]


@pytest.mark.parametrize("mistake, error", [
    (logps_of_two_devices, RuntimeError), (logps_that_wait, DataDependentOutputException),
    (logps_by_a_mask, DynamicOutputShapeException), (logps_without_a_cast, RuntimeError),
    (logps_by_indices_on_the_cpu, IndexError)])
def test_a_mistake_is_noticed(mistake, error, monkeypatch):
    monkeypatch.setattr(GPT, "logps", lambda model, batch: mistake(model, batch).sum()[None])
    with fake_cuda(), pytest.raises(error):
        run_loop(train_dpo, monkeypatch, cuda_model(torch.bfloat16), items(8), [])
