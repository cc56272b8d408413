"""GPT-2 in one file: the model, the log-probability of an answer, sampling, checkpoints.

    logits = GPT(GPTConfig())(tokens)            # (B, T) ids -> (B, T, V)
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

import math
import os
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


class UserError(Exception):
    """What the person at the prompt can put right; the message is one sentence that says how."""


@dataclass
class GPTConfig:
    """Sizes of a GPT-2; the defaults are the smallest released one (124M parameters)."""

    block_size: int = 1024      # the longest sequence: positions that have an embedding
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768           # C; n_head must divide it


class Attention(nn.Module):
    """Causal self-attention, H heads at once."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)   # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, cache=None):
        """x: (B, T, C). mask: (B, 1, T, keys), True where a token may look; None is plain causal.
        cache: a KeyValueCache that holds the tokens before x, and takes those of x."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)                               # (B, H, keys, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
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


class GPT(nn.Module):
    """GPT-2. Module names follow the released weights (wte, wpe, h.0.attn.c_attn, ..., ln_f)."""

    def __init__(self, config, init_std=0.02):
        """init_std: standard deviation of the initial weights; 0.02 is GPT-2's, for 768 channels.
        Raises ValueError where n_head does not divide n_embd."""
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.config = config
        self.precision = None       # torch.bfloat16 or torch.float16: autocast to it
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

    def head(self, hidden):
        """(..., C) to logits (..., V), in float32 or better whatever the product's precision."""
        with self.autocast():
            logits = F.linear(hidden, self.wte.weight)              # the token embedding once more
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

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
        logits = self.head(hidden)                                               # (S, V)
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
        Returns a list of lists: the new ids of each, the eot included where it was reached.
        Raises ValueError for an empty prompt, or one that leaves no position free.
        """
        device, config = self.device, self.config
        lengths = [len(prompt) for prompt in prompts]
        if min(lengths) == 0 or max(lengths) >= config.block_size:
            raise ValueError(f"prompts must have 1 to {config.block_size - 1} tokens, "
                             f"not {min(lengths)} to {max(lengths)}")
        B, T = len(prompts), max(lengths)
        room = [min(max_new_tokens, config.block_size - n) for n in lengths]
        new = max(room)
        # Prompts end in the same column, so that each step adds one column for all. What lies to
        # the left of a short prompt is hidden by the mask and takes no position.
        left = torch.tensor([T - n for n in lengths], device=device)                  # (B,)
        tokens = torch.tensor([[0] * (T - len(p)) + list(p) for p in prompts], device=device)
        columns = torch.arange(T + new, device=device)
        real = columns >= left[:, None]                                         # (B, T + new)
        positions = (columns - left[:, None]).clamp(0, config.block_size - 1)   # (B, T + new)
        mask = real[:, None, :T] & torch.ones(T, T, dtype=torch.bool, device=device).tril()
        mask |= torch.eye(T, dtype=torch.bool, device=device)   # what is hidden sees itself: no NaN
        caches = [KeyValueCache(T + new) for _ in self.h]

        hidden = self.hidden(tokens, positions[:, :T], mask, caches)
        drawn, done = [], torch.zeros(B, dtype=torch.bool, device=device)
        for end in range(T, T + new):
            logits = self.head(hidden[:, -1])                                         # (B, V)
            token = choose(logits, temperature, top_k, top_p, generator)      # (B,)
            drawn.append(token)
            if eot is not None:
                done |= token == eot
            if end + 1 == T + new or done.all():
                break
            hidden = self.hidden(token[:, None], positions[:, end:end + 1],
                                 real[:, None, :end + 1], caches)
        answers = torch.stack(drawn, 1).tolist()                                      # B x steps
        answers = [ids[:n] for ids, n in zip(answers, room)]
        return [ids[:ids.index(eot) + 1] if eot in ids else ids for ids in answers]

    # -- optimizer -------------------------------------------------------------------------------

    def optimizer(self, lr, weight_decay=0.0, betas=(0.9, 0.999)):
        """AdamW in one fused kernel, with decay on matrices only: decaying a bias or the gain of a
        layer norm would only pull it from where it is needed. Without decay it is Adam."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                                  {"params": vectors, "weight_decay": 0.0}],
                                 lr=lr, betas=betas, fused=True)


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
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# -- checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(path, model, **facts):
    """Write weights, sizes and facts (plain values: tokenizer, stage, seed, ...) to one file.

    The file is complete or it is not there: written beside, flushed to the disk, then renamed.
    """
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        torch.save({"config": asdict(model.config), "facts": facts, "model": model.state_dict()},
                   file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path, device="cpu"):
    """Returns (model, facts) of a file that save_checkpoint wrote. Raises UserError for another."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        model = GPT(GPTConfig(**saved["config"])).to(device)
        model.load_state_dict(saved["model"])
        return model, saved["facts"]
    except OSError as error:
        raise UserError(f"{path}: cannot read the checkpoint: {error.strerror}") from error
    except Exception as error:      # whatever a foreign or damaged file makes of torch.load
        raise UserError(f"{path}: not a checkpoint of train_sft.py or train_dpo.py, "
                        f"or a damaged one") from error
