"""How many micro-batches a training step needs to fit in the free memory."""

import math
import os
import re
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.packing import count_tokens
from runtime.parallel import all_reduce, world_size


def bytes_of_step(config, tokens, scored, row_length):
    """An estimate of the peak memory of forward and backward, besides weights, gradients and
    optimizer: twenty floats per token, layer and channel; the logits of each scored token, their
    log-softmax and its gradient; the gradient of the embedding twice; and, for each token and each
    place in its row, the mask as a float and as a bool. Measured in float32; half precision and
    compiled code need less."""
    L, C, V = config.n_layer, config.n_embd, config.vocab_size
    return 4 * (20 * L * C * tokens + 3 * V * scored + 2 * V * C) + 5 * tokens * row_length


def free_memory(device):
    """Bytes that this process may still allocate on a device. On a CPU, its share of what Linux
    reports as available, or of what a container's limit leaves, whichever is less."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return math.inf
    free = 1024 * int(re.search(r"MemAvailable: +(\d+)", meminfo)[1])
    return min(free, left_in_container()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def left_in_container(root="/sys/fs/cgroup"):
    """Bytes below the memory limit of this container, infinity if it has none. Its control group is
    mounted at `root`, in version 2 or 1. Cached files that are not in use do not count."""
    for folder, limit, used in [("", "memory.max", "memory.current"),
                                ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes")]:
        try:
            texts = [(Path(root) / folder / name).read_text()
                     for name in (limit, used, "memory.stat")]
        except OSError:
            continue
        if texts[0].strip() != "max":
            cached = re.search(r"^inactive_file (\d+)", texts[2], re.M)[1]
            return max(0, int(texts[0]) - int(texts[1]) + int(cached))
    return math.inf


def fewest_micro_batches(model, batches, row_length):
    """The smallest power of two of micro-batches per process with which every step of an epoch fits
    in 80 % of the free memory, by `bytes_of_step`, if a fifth of each row is padding."""
    steps = batches.first_epoch()
    tokens = max(sum(map(count_tokens, items)) for items in steps)
    scored = max(sum(len(answer) for item in items for answer in item.answers) for items in steps)
    weights = sum(weight.numel() for weight in model.parameters())
    room = 0.8 * (free_memory(model.device) - 12 * weights)     # gradients and Adam's moments

    def peak(n):
        share = n * world_size()
        return bytes_of_step(model.config, max(row_length, 1.25 * tokens / share), scored / share,
                             row_length)
    n = 1
    while n < batches.size and peak(n) > room:
        n *= 2
    return int(all_reduce([n], dist.ReduceOp.MAX)[0])
