"""Several processes under torchrun, and the choice of a device, precision and compilation.

Every process runs the same code on its own share of a batch. With one process, the functions that
communicate return their argument and do nothing else. Numbers and objects travel between CPUs;
only gradients travel from device to device.

Left out on purpose: DistributedDataParallel, which overlaps the sum of the gradients with the
backward pass. It would have to wrap the model, and `policy.logps` would no longer be a plain call.
"""

import ctypes
import functools
import os
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from runtime.errors import UserError
from runtime.packing import count_tokens

# ------------------------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------------------------


STORES = []             # torchrun's key-value store, once the processes are joined


def join_processes(device):
    """Connect to the other processes if torchrun started this one."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    end_with_torchrun()
    # Gradients travel over NCCL on GPUs, everything else over gloo. The timeout is long because the
    # others wait while the first process downloads a model. If one dies, torchrun ends the others.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size,
                            timeout=timedelta(hours=3))
    STORES.append(store)


def is_first_to_say(message):
    """Whether this process should print an error message. Of processes that are joined, it is the
    first one that asks with this message. Before they are, all of them meet the same errors, and
    it is the one of rank 0."""
    if STORES:
        return STORES[-1].add(message, 1) == 1
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


def end_with_torchrun():
    """Have Linux kill this process when torchrun dies, which may itself have been killed. Nobody
    else would end it if it waits for the others, and what it has saved is complete."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # 1 is PR_SET_PDEATHSIG


def process_rank():
    """The index of this process among those of the run, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(numbers, operation=dist.ReduceOp.SUM):
    """A list of numbers, each summed over all processes (or its maximum, with ReduceOp.MAX)."""
    if world_size() == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return tensor.tolist()


def barrier():
    """Wait until every process has reached this line."""
    all_reduce([0])


def all_gather(mine):
    """Reassemble a list of which process r holds every world_size()-th item, starting from r. Every
    process gets the whole list."""
    if world_size() == 1:
        return mine
    shares = [None] * world_size()
    dist.all_gather_object(shares, mine)
    whole = [None] * sum(map(len, shares))
    for r, share in enumerate(shares):
        whole[r::len(shares)] = share
    return whole


@contextmanager
def first_process_first():
    """A with block that the first process completes before the others enter it, so that they find
    the file it downloaded."""
    if process_rank() > 0:
        barrier()
    yield
    if process_rank() == 0:
        barrier()


def sum_gradients(model):
    """Add up the gradients of all processes, in place. A sum, not a mean: each process has already
    divided its losses by the size of the whole batch."""
    if world_size() == 1:
        return
    pending = [dist.all_reduce(weight.grad, async_op=True) for weight in model.parameters()]
    for work in pending:
        work.wait()


# ------------------------------------------------------------------------------------------------
# Device, precision, compilation
# ------------------------------------------------------------------------------------------------


def choose_device(name):
    """The torch.device for --device: "auto" is CUDA where there is a card, else the CPU; any other
    name must be an accelerator that PyTorch sees. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or found.type != name:
        raise UserError(f"--device {name}: PyTorch finds no such device on this machine; it finds "
                        f"{'cpu' if found is None else f'cpu and {found.type}'}")
    launched = dist.is_torchelastic_launched()
    index = int(os.environ["LOCAL_RANK"]) if launched else 0
    count = torch.accelerator.device_count()
    if launched and int(os.environ["LOCAL_WORLD_SIZE"]) > count:
        raise UserError(f"more processes than the {count} {name} devices of this machine: use a "
                        "smaller --nproc_per_node, or --device cpu")
    torch.accelerator.set_device_index(index)
    return torch.device(name, index)


def set_precision(model, precision):
    """Set the precision of a model's matrix products from --precision; its parameters stay float32.
    "auto" is bfloat16 on CUDA, float16 where the card has no bfloat16, and float32 elsewhere."""
    cuda = model.device.type == "cuda"
    # Tensor cores want rows that are multiples of 16 bytes, and 50257 is odd. The padding costs a
    # copy of the embedding, so only CUDA gets it.
    model.vocab_multiple = 64 if cuda else 1
    # TF32 is for the products outside of autocast, those of the head. It is a setting of the whole
    # process, so it is also set back.
    model.tf32 = cuda and precision != "float32"
    torch.set_float32_matmul_precision("high" if model.tf32 else "highest")
    if cuda:
        # cuDNN's attention, which PyTorch prefers on some cards, builds a plan for every new shape,
        # and almost every batch and every sampled token has a shape of its own.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if precision == "auto" and cuda:
        has_bf16 = torch.cuda.get_device_capability() >= (8, 0)     # older cards only emulate it
        precision = "bfloat16" if has_bf16 else "float16"
    if precision in ("auto", "float32"):
        model.precision = None
    else:
        model.precision = getattr(torch, precision)


def set_compiled(model, items, args):
    """Decide from --compile whether model.logps is compiled in a run that trains on `items`, a list
    of Encoded. "auto" compiles if that is expected to save time."""
    units = sum(len(item.pairs) or 1 for item in items)         # pairs, or texts
    epochs = args.steps * args.batch / units if args.steps else args.epochs
    n_tokens = epochs * sum(map(count_tokens, items))
    model.compiled = args.compile == "on" or (
        args.compile == "auto" and worth_compiling(model, n_tokens))


def worth_compiling(model, n_tokens):
    """Whether compiling saves time in a run that trains on n_tokens, in all its steps together: on
    CUDA, if a quarter of their time is more than the minute that compilation takes. A step takes
    6 FLOPs per weight and token, at 250 TFLOP/s. All three are estimates for a recent GPU."""
    n_weights = sum(weight.numel() for weight in model.parameters())
    seconds = 6 * n_weights * n_tokens / 250e12
    return model.device.type == "cuda" and seconds / 4 > 60


def allow_any_size(batch):
    """Tell torch.compile that the first dimension of every tensor of a Batch (rows, scored tokens,
    answers, ...) varies. All steps in rows of one length then share a graph, and those without
    gradients another; only a dimension of size 1 needs its own."""
    for tensor in vars(batch).values():
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def compilable(method):
    """Decorate a method of a model that takes a Batch: if model.compiled, it runs through
    torch.compile, whose import takes seconds and therefore waits for the first call."""
    @functools.wraps(method)
    def call(model, batch):
        if not model.compiled:
            return method(model, batch)
        if call.compiled is None:
            call.compiled = torch.compile(method)
        return call.compiled(model, batch)
    call.compiled = None
    return call
