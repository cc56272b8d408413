"""GPT-2 in one file: the model, the log-probability of an answer, sampling, weights in and out.

    model = GPT(GPTConfig())                     # random weights, or
    model = GPT.from_pretrained("gpt2")          # the released ones; save_pretrained writes such
    logits = model(tokens)                       # (B, T) ids -> (B, T, V)
    logps = model.logps(batch)                   # (N,) log pi(y|x), one per answer of a batch
    answers = model.generate(prompts, 64)        # new ids for each of a list of prompts

The network is GPT-2 to the letter: token plus learned position embeddings, then n_layer blocks of

    x = x + attention(layer_norm(x))
    x = x + mlp(layer_norm(x))                   # pre-LayerNorm, tanh GELU, 4 C wide

then a last layer norm and the token embedding again as the output head. Letters used throughout:
B rows, T tokens of a row, C channels, V vocabulary, H heads, D = C / H channels of a head,
N answers, S scored tokens.

Left out on purpose: dropout. DPO compares the same answer under two models; with both
deterministic the comparison starts at zero, and nothing is lost on one pass over the data.
"""

import json
import math
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


class UserError(Exception):
    """What the person at the prompt can put right; the message is one sentence that says how."""


@dataclass
class GPTConfig:
    """Sizes of a GPT-2; the defaults are the smallest released one (124M parameters). Raises
    ValueError for sizes that make no network."""

    block_size: int = 1024      # the longest sequence: positions that have an embedding
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768           # C; n_head must divide it

    def __post_init__(self):
        for name, size in asdict(self).items():
            if type(size) is not int or size < 1:
                raise ValueError(f"expected a whole number above 0 for {name}, not {size!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


class Attention(nn.Module):
    """Causal self-attention, H heads at once."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)   # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, cache=None):
        """x: (B, T, C). mask: (B, 1, T, keys), True where a token may look; None is plain causal.
        cache: a KeyValueCache that holds the tokens before x, and takes those of x. With tokens in
        it and no mask, x is one more token, which may look at all of them."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)                               # (B, H, keys, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                           is_causal=mask is None and T > 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class KeyValueCache:
    """Keys and values of one layer for the tokens seen so far, in memory allocated once."""

    def __init__(self, capacity):
        """capacity: the most tokens a row will ever hold."""
        self.capacity, self.length = capacity, 0

    def append(self, k, v):
        """(B, H, T, D) of the new tokens in; (B, H, length, D) of all tokens out."""
        if self.length == 0:
            B, H, _, D = k.shape
            self.k = k.new_empty(B, H, self.capacity, D)
            self.v = v.new_empty(B, H, self.capacity, D)
        end = self.length + k.size(2)
        self.k[:, :, self.length:end], self.v[:, :, self.length:end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def select(self, rows):
        """Go on with these of the B rows, in this order; one may be named any number of times."""
        k, v = (x[:, :, :self.length].index_select(0, rows) for x in (self.k, self.v))
        self.length = 0
        self.append(k, v)


# GPT.generate asks only every CHECK_EVERY steps which answers are done: on a GPU the question waits
# for all work under way. Their rows leave the batch once no more than MOST_GOING of it goes on: to
# copy the caches of the others costs about as much as a step.
CHECK_EVERY, MOST_GOING = 8, 0.75


class GPT(nn.Module):
    """GPT-2. Module names follow the released weights (wte, wpe, h.0.attn.c_attn, ..., ln_f)."""

    def __init__(self, config, init_std=0.02):
        """init_std: standard deviation of the initial weights; 0.02 is GPT-2's, for 768 channels.
        """
        super().__init__()
        self.config = config
        self.precision = None       # torch.bfloat16 or torch.float16: autocast to it
        self.compiled = False       # whether logps is: then rows should keep one length
        self.vocab_multiple = 1     # logps computes logits in columns of a multiple of it; see head
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # Each block adds to the residual stream twice; this keeps its variance at the end
                # independent of the depth.
                residual = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=init_std / math.sqrt(residual))

    @property
    def device(self):
        return self.wte.weight.device

    # -- forward ---------------------------------------------------------------------------------

    def hidden(self, tokens, positions=None, mask=None, caches=None):
        """(B, T) ids to the (B, T, C) that the output head reads. Arguments as in forward;
        caches: one KeyValueCache a layer."""
        if positions is None:
            positions = torch.arange(tokens.size(1), device=tokens.device)
        if mask is not None:
            mask = mask[:, None]                                    # (B, 1, T, keys)
        x = self.wte(tokens) + self.wpe(positions)                  # (B, T, C)
        with self.autocast():
            for i, block in enumerate(self.h):
                x = block(x, mask, caches[i] if caches else None)
            return self.ln_f(x)

    def head(self, hidden, multiple=1):
        """(..., C) to logits (..., V): the token embedding once more. Never autocast: GPT-2's
        logits lie around -100, where bfloat16 counts in halves, and an answer's log-prob would be
        off by more than a nat.

        multiple: V is rounded up to a multiple of it, since tensor cores want rows that begin at
        multiples of 16 bytes, and 50257 is odd. The columns added are no token's, so they are -inf:
        0, as rows of zeros would make them, is enormous beside -100.
        """
        weight, bias = self.wte.weight, None
        missing = -len(weight) % multiple
        if missing:
            bias = F.pad(weight.new_zeros(len(weight)), (0, missing), value=-math.inf)
            weight = F.pad(weight, (0, 0, 0, missing))
        return F.linear(hidden.to(weight.dtype), weight, bias)

    def autocast(self):
        """The precision of the products. One place for training, reference, sampling and
        evaluation: if policy and reference differed in it, DPO would not start at log 2."""
        return torch.autocast(self.device.type, self.precision,
                              enabled=self.precision is not None)

    def forward(self, tokens, positions=None, mask=None):
        """Logits of the next token: (B, T) ids to (B, T, V).

        positions: (B, T), default 0, 1, 2, ... mask: (B, T, T) bool, True where the token of the
        second dimension may look at that of the third; default plain causal.
        """
        return self.head(self.hidden(tokens, positions, mask))

    def logps(self, batch):
        """log pi(y|x) = sum over the tokens of y of log pi(token | all before it), for each answer.

        batch: a packed data.Batch. Returns (N,), float32 also under autocast. The distribution
        over a token is read at the place *before* it, so only those S places go through the output
        head: its V columns are a third of all the arithmetic of the smallest GPT-2.
        """
        hidden = self.hidden(batch.tokens, batch.positions, batch.mask())        # (B, T, C)
        hidden = hidden.flatten(0, 1).index_select(0, batch.source)              # (S, C)
        logits = self.head(hidden, self.vocab_multiple)                          # (S, V) or more
        token_logps = -F.cross_entropy(logits, batch.target, reduction="none")   # (S,)
        return token_logps.new_zeros(batch.n_answers).index_add(0, batch.owner, token_logps)

    # -- sampling --------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eot=None,
                 generator=None):
        """Continue each of a list of prompts (lists of ids, of any lengths, none empty).

        temperature: 0 takes the likeliest token. top_k: only the k likeliest. top_p: only the
        fewest likeliest whose probabilities reach p. eot: the id that ends an answer. generator: a
        torch.Generator on the model's device, so that sampling never moves training's state.
        Returns a list of lists: the new ids of each, the eot included where it was reached. Equal
        prompts cost one prompt and are continued independently of each other.
        Raises ValueError for an empty prompt, or one that leaves no position free.
        """
        T, shortest = max(map(len, prompts)), min(map(len, prompts))
        block_size = self.config.block_size
        if shortest == 0 or T >= block_size:
            raise ValueError(f"prompts must have 1 to {block_size - 1} tokens, "
                             f"not {shortest} to {T}")
        room = [min(max_new_tokens, block_size - len(prompt)) for prompt in prompts]
        new, eot = max(room), -1 if eot is None else eot                    # -1 is no token
        hidden, left, caches = self.read(prompts, T + new)
        rows = torch.arange(len(prompts), device=self.device)       # the answers still to go on
        answers = rows.new_zeros(len(prompts), new)
        limits, columns = rows.new_tensor(room), torch.arange(T + new, device=self.device)
        for step in range(new):
            token = choose(self.head(hidden), temperature, top_k, top_p, generator)     # (rows,)
            answers[rows, step] = token
            if step + 1 == new:
                break
            if (step + 1) % CHECK_EVERY == 0:
                going = (answers[rows, :step + 1] != eot).all(1) & (limits[rows] > step + 1)
                going = going.nonzero()[:, 0]
                if len(going) == 0:
                    break
                if len(going) <= MOST_GOING * len(rows):
                    rows, left, token = rows[going], left[going], token[going]
                    for cache in caches:
                        cache.select(going)
            end = T + step
            positions = (end - left).clamp(max=block_size - 1)[:, None]
            mask = (columns[:end + 1] >= left[:, None])[:, None] if shortest < T else None
            hidden = self.hidden(token[:, None], positions, mask, caches)[:, -1]
        answers = [ids[:n] for ids, n in zip(answers.tolist(), room)]
        return [ids[:ids.index(eot) + 1] if eot in ids else ids for ids in answers]

    def read(self, prompts, capacity):
        """Put prompts through the network, each once however often it comes, to be continued.

        They end in the same column, so that each step of generate adds one column for all. What
        lies to the left of a short prompt is hidden by the mask and takes no position. Returns
        hidden (B, C) of the last tokens, left (B,), the hidden columns, and a KeyValueCache of
        `capacity` tokens for each layer.
        """
        row_of = {}                                                         # U different prompts
        owner = [row_of.setdefault(tuple(prompt), len(row_of)) for prompt in prompts]
        T = max(map(len, prompts))
        left, tokens, owner, columns = (torch.tensor(x, device=self.device) for x in (
            [T - len(p) for p in row_of], [(0,) * (T - len(p)) + p for p in row_of],
            owner, range(T)))                                               # (U,) (U, T) (B,) (T,)
        positions, mask = (columns - left[:, None]).clamp(min=0), None
        if min(map(len, prompts)) < T:          # without a mask, attention is faster
            mask = (columns <= columns[:, None]) & (columns >= left[:, None, None])     # (U, T, T)
            mask |= columns == columns[:, None]     # what is hidden sees itself: no NaN
        caches = [KeyValueCache(capacity) for _ in self.h]
        hidden = self.hidden(tokens, positions, mask, caches)[:, -1]
        for cache in caches:
            cache.select(owner)
        return hidden[owner], left[owner], caches

    # -- optimizer -------------------------------------------------------------------------------

    def optimizer(self, lr, weight_decay=0.0, betas=(0.9, 0.999)):
        """AdamW in one fused kernel, with decay on matrices only: decaying a bias or the gain of a
        layer norm would only pull it from where it is needed. Without decay it is Adam."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                                  {"params": vectors, "weight_decay": 0.0}],
                                 lr=lr, betas=betas, fused=True)

    # -- released weights ------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """GPT-2 as it was released, or a model in the same files.

        name_or_dir: "gpt2" (124M parameters), "gpt2-medium" (355M), "gpt2-large" (774M) or
        "gpt2-xl" (1.6B), downloaded once into torch's cache; or a folder in the layout of the
        Hugging Face hub: config.json, and model.safetensors or pytorch_model.bin. Returns the model
        in float32 on the CPU. Raises UserError where a file is missing, damaged, or not of a GPT-2.
        """
        if name_or_dir in RELEASED:
            config = GPTConfig(**RELEASED[name_or_dir])
            path = download(f"{HUB}/openai-community/{name_or_dir}/resolve/main/model.safetensors",
                            cache() / name_or_dir / "model.safetensors", SHA256.get(name_or_dir))
        else:
            folder = Path(name_or_dir)
            config = read_config(folder / "config.json")
            path = folder / "model.safetensors"
            path = path if path.exists() else folder / "pytorch_model.bin"
        with torch.device("meta"):      # no memory and no random numbers for weights not kept
            model = cls(config)
        state = from_hub_layout(read_weights(path), model.state_dict(), path)
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors; transformers' GPT2LMHeadModel.from_pretrained
        and our own open the folder. The end-of-text id is the last of the vocabulary, as in GPT-2.
        """
        config, last = self.config, self.config.vocab_size - 1
        facts = GPT2 | {
            "architectures": ["GPT2LMHeadModel"], "n_layer": config.n_layer,
            "n_head": config.n_head, "n_embd": config.n_embd, "n_positions": config.block_size,
            "n_ctx": config.block_size, "vocab_size": config.vocab_size,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
            "bos_token_id": last, "eos_token_id": last, "torch_dtype": "float32"}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "model.safetensors") as file:
            write_safetensors(file, {f"transformer.{name}": transposed(name, weight.cpu())
                                     for name, weight in self.state_dict().items()})
        write_json(folder / "config.json", facts)


def choose(logits, temperature, top_k, top_p, generator):
    """Draw one token for each row of (B, V) logits; arguments as in GPT.generate. Returns (B,)."""
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature     # at most 0: no overflow
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p              # those before it reach p without it
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    # A number below 1 for each row, and the token within whose share of the sum it falls; float64,
    # for shares are small. (torch.multinomial draws a number for each token of the vocabulary.)
    ends = logits.softmax(-1).cumsum(-1, dtype=torch.float64)                       # (B, V)
    u = torch.rand(len(ends), 1, dtype=torch.float64, device=ends.device, generator=generator)
    return torch.searchsorted(ends, u * ends[:, -1:], right=True)[:, 0]


# -- the layout of the Hugging Face hub ------------------------------------------------------------

HUB = "https://huggingface.co"
RELEASED = {"gpt2": dict(n_layer=12, n_head=12, n_embd=768),
            "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
            "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
            "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600)}
SHA256 = {"gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"}

# What config.json says of the network beside its sizes: with any other value it is not this one.
GPT2 = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "n_inner": None, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False, "add_cross_attention": False,
        "tie_word_embeddings": True}


def read_config(path):
    """config.json of a GPT-2 to a GPTConfig. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        sizes = {ours: found[theirs] for ours, theirs in [
            ("block_size", "n_positions"), ("vocab_size", "vocab_size"), ("n_layer", "n_layer"),
            ("n_head", "n_head"), ("n_embd", "n_embd")]}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; expected one of "
                        f"{', '.join(RELEASED)}, or a folder with config.json and "
                        "model.safetensors or pytorch_model.bin") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: expected the config.json of a GPT-2, with n_positions, "
                        "vocab_size, n_layer, n_head and n_embd") from error
    for key, needed in GPT2.items():
        value = found.get(key, needed)
        if value != needed and (key, value) != ("n_inner", 4 * found["n_embd"]):
            raise UserError(f"{path}: {key} is {json.dumps(value)}; this GPT-2 has "
                            f"{json.dumps(needed)}")
    try:
        return GPTConfig(**sizes)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def transposed(name, weight):
    """A weight turned from our layout to that of the files, or back: GPT-2's matrices are written
    as in x @ W, but nn.Linear computes x @ W.T, so the four matrices of a block are transposed."""
    matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return weight.t() if matrix else weight


def from_hub_layout(weights, wanted, path):
    """The tensors of a weights file as a state dict of ours: float32, in memory of their own.

    weights: {name: tensor}, names with or without "transformer." in front. wanted: our state dict,
    for its names and shapes. Left out: the causal mask, which early versions stored as attn.bias,
    and the head, which is the token embedding once more. Raises UserError with a tensor's name.
    """
    found = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()
             if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    head = found.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in found and not torch.equal(head, found["wte.weight"]):
        raise UserError(f"{path}: lm_head.weight is not wte.weight; GPT-2's head is tied to it")
    for name in sorted(wanted.keys() ^ found.keys()):
        raise UserError(f"{path}: " + (f"{name} is missing" if name in wanted else
                                       f"{name} is no weight of a GPT-2 of this size"))
    state = {}
    for name, tensor in found.items():
        shape, expected = tuple(tensor.shape), tuple(transposed(name, wanted[name]).shape)
        if shape != expected:
            raise UserError(f"{path}: {name} has shape {shape}, expected {expected}")
        state[name] = transposed(name, tensor).to(
            torch.float32, copy=True, memory_format=torch.contiguous_format)
    return state


def read_weights(path):
    """{name: tensor} of model.safetensors or pytorch_model.bin. Raises UserError."""
    with reading(path, "a file of weights"):
        found = (read_safetensors(path) if path.suffix == ".safetensors" else
                 torch.load(path, map_location="cpu", weights_only=True))
        if not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
            raise ValueError("expected names and tensors, and nothing else")
        return found


SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
               "BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor} of a safetensors file, which is three things one after the other:

        8 bytes    n, the length of the header, least significant byte first
        n bytes    JSON: {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
        the rest   the tensors' bytes, at their offsets, without a gap

    Raises ValueError, KeyError and the like for what is no such file, or a part of one.
    """
    raw = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    n = int.from_bytes(raw[:8].numpy().tobytes(), "little")
    header = json.loads(raw[8:8 + n].numpy().tobytes())
    header.pop("__metadata__", None)
    data, tensors, end = raw[8 + n:], {}, 0
    for name, facts in header.items():
        first, last = facts["data_offsets"]
        tensor = data[first:last].clone().view(SAFETENSORS[facts["dtype"]])
        tensors[name], end = tensor.view(facts["shape"]), max(end, last)
    if end != len(data):
        raise ValueError(f"{len(data)} bytes of tensors, expected {end}")
    return tensors


def write_safetensors(file, tensors):
    """Write {name: float32 tensor on the CPU} to an open binary file."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                     # so that the tensors are aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.contiguous().numpy().data)


# -- several processes -----------------------------------------------------------------------------
# Under torchrun every process runs the same lines on its own share of a batch; alone, all of this
# does nothing. What the processes tell each other passes through here, by way of the CPU, and only
# the gradients go from device to device.


def rank():
    """The number of this process among those of a run, counted from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def reduced(numbers, operation=dist.ReduceOp.SUM):
    """A list of numbers, each summed over all processes, or the largest of them (ReduceOp.MAX)."""
    if world_size() == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return tensor.tolist()


def wait():
    """Until every process has come this far."""
    reduced([0])


def gathered(mine):
    """What was dealt out, as things[rank()::world_size()], in one list again, the same for all."""
    if world_size() == 1:
        return mine
    parts = [None] * world_size()
    dist.all_gather_object(parts, mine)
    whole = [None] * sum(map(len, parts))
    for number, part in enumerate(parts):
        whole[number::len(parts)] = part
    return whole


@contextmanager
def first_process_first():
    """A with block that the first process ends before the others begin it: what it downloads is
    there for them."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


# -- checkpoints, files ----------------------------------------------------------------------------


@contextmanager
def replacing(path):
    """A binary file to write in a with block. It is complete or it is not there: written beside,
    flushed to the disk, then renamed to `path`, or to what a link there points to. Of several
    processes the first one writes; all go on when it has. Raises UserError where the disk is full,
    or the like."""
    if rank() > 0:
        with open(os.devnull, "wb") as file:
            yield file
        wait()
        return
    path = Path(os.path.realpath(path))
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):      # torch.save hides an OSError behind one of its own
            raise
        raise UserError(f"{path}: cannot be written: {cause.strerror or cause}; what was there "
                        "before is kept") from error
    finally:
        temporary.unlink(missing_ok=True)
    wait()


def write_json(path, content):
    """Write what json can hold to one file, for people to read too."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


@contextmanager
def reading(path, what):
    """A with block that reads a file of torch's or safetensors', and says in one sentence what is
    wrong with one that it cannot read. None of them can run code: weights_only=True throughout."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise                       # the file may be good
    except Exception as error:      # whatever a foreign or damaged one makes of its reader
        raise UserError(f"{path}: not {what}, or a damaged one") from error


def save_checkpoint(path, model, **facts):
    """Write weights, sizes and facts (plain values: tokenizer, stage, seed, ...) to one file."""
    with replacing(path) as file:
        torch.save({"config": asdict(model.config), "facts": facts, "model": model.state_dict()},
                   file)


def load_checkpoint(path, device="cpu"):
    """Returns (model, facts) of a file that save_checkpoint wrote. Raises UserError for another."""
    with reading(path, "a checkpoint of train_sft.py or train_dpo.py"):
        saved = torch.load(path, map_location=device, weights_only=True)
        model = GPT(GPTConfig(**saved["config"])).to(device)
        model.load_state_dict(saved["model"])
        return model, saved["facts"]


def cache():
    """Where downloads are kept: a folder beside those of torch.hub (TORCH_HOME moves them)."""
    return Path(torch.hub.get_dir()) / "dpo"


def download(url, path, sha256=None):
    """Fetch url to path, once, with a progress bar. A file that is there is taken as it is.

    torch.hub writes beside the path, compares the checksum where there is one, and renames. To it
    a broken connection is an end like any other, and a proxy's page a file like any other; so the
    length and the first bytes are looked at before the file takes its place. Returns the path.
    Raises UserError, which says what to fetch by hand and where to put it.
    """
    with first_process_first():
        return path if path.exists() else fetched(url, path, sha256)


def fetched(url, path, sha256):
    """The part of `download` that downloads."""
    partial = Path(f"{path}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url} to {path}")
        with urlopen(Request(url, method="HEAD"), timeout=60) as reply:
            length = reply.headers["Content-Length"]
        torch.hub.download_url_to_file(url, str(partial), hash_prefix=sha256)
        size = partial.stat().st_size
        with open(partial, "rb") as file:
            start = file.read(64).lstrip().lower()
        if length is not None and size != int(length):
            raise OSError(f"the connection broke after {size:,} of {int(length):,} bytes")
        if start.startswith((b"<!doctype", b"<html")):
            raise OSError("the answer is a web page, not the file")
        os.replace(partial, path)
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        raise UserError(f"{path}: not there, and it could not be downloaded ({error}); fetch {url} "
                        "by hand and put it there") from error
    finally:
        partial.unlink(missing_ok=True)
    return path
