"""GPT-2 in one file: the network, the log-probability of an answer, sampling.

    model = GPT(GPTConfig())                     # random weights, or
    model = GPT.from_pretrained("gpt2")          # the released ones
    logits = model(tokens)                       # (B, T) ids -> (B, T, V)
    logps = model.logps(batch)                   # (N,) log pi(y|x) of answers y to prompts x
    answers = model.generate(prompts, 64)        # new ids for each of a list of prompts

The network: token plus learned position embeddings, then n_layer blocks of

    x = x + attention(layer_norm(x))
    x = x + mlp(layer_norm(x))                   # pre-LayerNorm, tanh GELU, 4 C wide

then a final layer norm and the output head, which shares its weights with the token embedding.
Letters used throughout: B rows, T tokens per row, C channels, V vocabulary size, H heads,
D = C / H channels per head, N answers, S scored tokens.

Left out on purpose: dropout. DPO compares the log-probs of the same answer under two models, and
dropout would add noise to the difference. The data is seen once or a few times, so there is little
overfitting to prevent.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from runtime import hub
from runtime.errors import UserError
from runtime.parallel import compilable


@dataclass
class GPTConfig:
    """Sizes of a GPT-2. The defaults are those of the smallest released one (124M parameters).
    Raises ValueError for impossible sizes."""

    block_size: int = 1024      # the longest sequence: the number of position embeddings
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768           # C, a multiple of n_head

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
        """(B, T, C) to (B, T, C).

        mask: (B, 1, T, keys), 0 where a token may attend and -inf elsewhere; None is plain causal
        attention.
        cache: a KeyValueCache of the tokens before x, to which those of x are added. With tokens in
        the cache and no mask, x must be a single token, which attends to all of them.
        """
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
    """Keys and values of one layer for the tokens seen so far, with room for those to come."""

    def __init__(self, capacity):
        """capacity: the largest number of tokens that a row will hold."""
        self.capacity, self.length = capacity, 0

    def append(self, k, v):
        """Add the (B, H, T, D) keys and values of T new tokens. Returns those of all tokens so far,
        (B, H, length, D)."""
        if self.length == 0:
            B, H, _, D = k.shape
            self.k = k.new_empty(B, H, self.capacity, D)
            self.v = v.new_empty(B, H, self.capacity, D)
        end = self.length + k.size(2)
        self.k[:, :, self.length:end] = k
        self.v[:, :, self.length:end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def select(self, rows):
        """Keep these of the B rows, in this order. A row may be repeated."""
        k = self.k[:, :, :self.length].index_select(0, rows)
        v = self.v[:, :, :self.length].index_select(0, rows)
        self.length = 0
        self.append(k, v)


# GPT.generate checks which answers are finished only every CHECK_EVERY tokens, because on a GPU the
# check waits for all work under way. It drops the rows of finished answers when at most MOST_GOING
# of all rows are unfinished: dropping copies the caches, which costs about as much as a token.
CHECK_EVERY, MOST_GOING = 8, 0.75


class GPT(nn.Module):
    """GPT-2. Module names follow the released weights (wte, wpe, h.0.attn.c_attn, ..., ln_f)."""

    def __init__(self, config, init_std=0.02):
        """init_std: standard deviation of the initial weights; GPT-2 uses 0.02 for 768 channels."""
        super().__init__()
        self.config = config
        # Set by runtime.parallel.set_precision and set_compiled:
        self.precision = None       # autocast to torch.bfloat16 or torch.float16; None is float32
        self.tf32 = False           # float32 products, those of the head, may run in TF32
        self.vocab_multiple = 1     # logps pads the vocabulary to a multiple of this; see head
        self.compiled = False       # logps is compiled; packed rows have one of a few lengths
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # Each block adds to the residual stream twice. Scaling down its output layers keeps
                # the variance of the stream independent of the depth.
                residual = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=init_std / math.sqrt(residual))

    @property
    def device(self):
        return self.wte.weight.device

    # -- forward ---------------------------------------------------------------------------------

    def hidden(self, tokens, positions=None, mask=None, caches=None):
        """(B, T) ids to the final hidden states, (B, T, C). caches: a KeyValueCache per layer.
        positions, mask: as in forward; with caches the mask is (B, T, keys), over all tokens so
        far."""
        if positions is None:
            positions = torch.arange(tokens.size(1), device=tokens.device)
        if mask is not None:
            # As numbers to add to the scores. A bool mask would be converted in each layer, and
            # all the copies kept for the backward pass.
            dtype = self.precision or self.wte.weight.dtype
            mask = torch.where(mask[:, None], 0.0, -math.inf).to(dtype)     # (B, 1, T, keys)
        x = self.wte(tokens) + self.wpe(positions)                  # (B, T, C)
        with self.autocast():
            for i, block in enumerate(self.h):
                x = block(x, mask, caches[i] if caches else None)
            return self.ln_f(x)

    def head(self, hidden, multiple=1):
        """Logits: (..., C) to (..., V), by the transposed token embedding. Never under autocast:
        GPT-2's logits lie around -100, where bfloat16 has a resolution of one half, and the
        log-prob of an answer would be off by more than a nat.

        With self.tf32, the mean embedding is subtracted first. All logits of a position shift by
        the same number, to around 0, and no probability changes. TF32 keeps 11 significant bits of
        its inputs, too few for logits of -100: an answer would be off by tenths of a nat.

        multiple: pad V to a multiple of this. The added columns belong to no token, so they are
        -inf; zero would be a huge logit beside -100.
        """
        weight, bias = self.wte.weight, None
        if self.tf32:
            weight = weight - weight.mean(0)
        missing = -len(weight) % multiple
        if missing:
            bias = F.pad(weight.new_zeros(len(weight)), (0, missing), value=-math.inf)
            weight = F.pad(weight, (0, 0, 0, missing))
        with torch.autocast(self.device.type, enabled=False):
            return F.linear(hidden.to(weight.dtype), weight, bias)

    def autocast(self):
        """Context manager in which matrix products have self.precision: the same for training,
        reference, sampling and evaluation. If policy and reference differed in it, their log-probs
        would differ before the first update."""
        return torch.autocast(self.device.type, self.precision,
                              enabled=self.precision is not None)

    def forward(self, tokens, positions=None, mask=None):
        """Logits of the next token: (B, T) ids to (B, T, V).

        positions: (B, T), default 0, 1, 2, ... mask: (B, T, T) bool, True where the token of the
        second dimension may attend to that of the third; default plain causal.
        """
        return self.head(self.hidden(tokens, positions, mask))

    @compilable
    def logps(self, batch):
        """log pi(y|x) = sum over the tokens of y of log pi(token | all before it), for each answer.

        batch: a packed data.Batch. answer_of (S,): the answer that each scored token belongs to. N
        is batch.n_answers. Returns (N,) in the dtype of the weights, so in float32 under autocast
        too.

        For one answer in a row of its own, this is the usual shift of logits against labels:

            ids = torch.tensor([prompt + answer])           # (1, T); the prompt begins with <eot>
            logits, labels = model(ids)[:, :-1], ids[:, 1:]
            token_logps = logits.log_softmax(-1).gather(2, labels[:, :, None])[0, :, 0]
            logp = token_logps[len(prompt) - 1:].sum()      # without those of the prompt
        """
        token_logps = self.token_logps(batch)                                    # (S,)
        return token_logps.new_zeros(batch.n_answers).index_add(0, batch.answer_of, token_logps)

    def token_logps(self, batch):
        """log pi(token | all before it) for each scored token of a packed data.Batch, (S,), in the
        dtype of the weights. "All before it" is its prompt and the earlier tokens of its answer,
        which is what the batch's positions and mask let it see.

        source (S,): flat index, into the B * T tokens, of the token *before* each scored token,
        whose output predicts it; target (S,): the scored ids. Only these S positions go through the
        output head, which is a third of the arithmetic of the smallest GPT-2. The head is called
        with self.vocab_multiple, to which it pads the vocabulary; the padding changes no log-prob.
        """
        hidden = self.hidden(batch.tokens, batch.positions, batch.mask())        # (B, T, C)
        hidden = hidden.flatten(0, 1).index_select(0, batch.source)              # (S, C)
        logits = self.head(hidden, self.vocab_multiple)                          # (S, V) or more
        return -F.cross_entropy(logits, batch.target, reduction="none")

    # -- sampling --------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eot=None,
                 generator=None):
        """Continue each of a list of prompts (non-empty lists of ids, of any lengths).

        max_new_tokens: also limited by the block size, for each prompt. temperature: 0 always takes
        the most likely token. top_k: sample from the k most likely tokens. top_p: sample from the
        fewest most likely tokens whose probabilities add up to at least p. eot: the id that ends an
        answer. generator: a torch.Generator on the model's device, for answers that can be
        reproduced. Equal prompts are computed once and continued independently. Returns a list of
        lists: the new ids of each prompt, eot included if it was reached. Raises ValueError for an
        empty prompt, or one of block_size tokens or more.
        """
        T, shortest = max(map(len, prompts)), min(map(len, prompts))
        block_size = self.config.block_size
        if shortest == 0 or T >= block_size:
            raise ValueError(f"prompts must have 1 to {block_size - 1} tokens, "
                             f"not {shortest} to {T}")
        room = [min(max_new_tokens, block_size - len(prompt)) for prompt in prompts]
        n_new = max(room)
        eot = -1 if eot is None else eot                                    # -1 is no token
        with self.autocast():       # around all tokens, so that each weight is cast only once
            hidden, padding, caches = self.prefill(prompts, T + n_new)
            rows = torch.arange(len(prompts), device=self.device)   # the unfinished answers
            answers = rows.new_zeros(len(prompts), n_new)
            limits = rows.new_tensor(room)
            columns = torch.arange(T + n_new, device=self.device)
            for step in range(n_new):
                token = choose(self.head(hidden), temperature, top_k, top_p, generator)  # (rows,)
                answers[rows, step] = token
                if step + 1 == n_new:
                    break
                if (step + 1) % CHECK_EVERY == 0:
                    unfinished = (answers[rows, :step + 1] != eot).all(1)
                    unfinished &= limits[rows] > step + 1
                    going = unfinished.nonzero()[:, 0]              # indices into rows
                    if len(going) == 0:
                        break
                    if len(going) <= MOST_GOING * len(rows):        # drop the finished rows
                        rows, padding, token = rows[going], padding[going], token[going]
                        for cache in caches:
                            cache.select(going)
                end = T + step                                      # the column of this token
                positions = (end - padding).clamp(max=block_size - 1)[:, None]
                mask = None
                if shortest < T:
                    mask = (columns[:end + 1] >= padding[:, None])[:, None]     # (rows, 1, end + 1)
                hidden = self.hidden(token[:, None], positions, mask, caches)[:, -1]
        answers = [ids[:n] for ids, n in zip(answers.tolist(), room)]
        return [ids[:ids.index(eot) + 1] if eot in ids else ids for ids in answers]

    def prefill(self, prompts, capacity):
        """Compute the prompts that generate continues, each distinct one once.

        Prompts are padded on the left, so that they end in the same column and every step adds one
        column. Padding is masked, and position 0 is the first real token. Returns hidden (B, C) of
        the last tokens, padding (B,), the number of padded columns, and one KeyValueCache of
        `capacity` tokens per layer.
        """
        row_of = {}                         # {distinct prompt: its row}; there are U of them
        copies = [row_of.setdefault(tuple(prompt), len(row_of)) for prompt in prompts]
        T = max(map(len, prompts))
        tokens = torch.tensor([(0,) * (T - len(prompt)) + prompt for prompt in row_of],
                              device=self.device)                                       # (U, T)
        padding = tokens.new_tensor([T - len(prompt) for prompt in row_of])             # (U,)
        copies = tokens.new_tensor(copies)                          # (B,) the row of each prompt
        columns = torch.arange(T, device=self.device)
        positions = (columns - padding[:, None]).clamp(min=0)                           # (U, T)
        mask = None                         # attention is faster without one
        if min(map(len, prompts)) < T:
            mask = (columns <= columns[:, None]) & (columns >= padding[:, None, None])  # (U, T, T)
            mask |= columns == columns[:, None]     # padding attends to itself: no NaN
        caches = [KeyValueCache(capacity) for _ in self.h]
        hidden = self.hidden(tokens, positions, mask, caches)[:, -1]                    # (U, C)
        for cache in caches:
            cache.select(copies)
        return hidden[copies], padding[copies], caches

    # -- optimizer -------------------------------------------------------------------------------

    def optimizer(self, lr, weight_decay=0.0, betas=(0.9, 0.999)):
        """Fused AdamW, with weight decay on matrices only, not on biases and layer norms. Without
        decay it is Adam."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                                  {"params": vectors, "weight_decay": 0.0}],
                                 lr=lr, betas=betas, fused=True)

    # -- released weights ------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """Load a released GPT-2, or a folder in the layout of the Hugging Face hub.

        name_or_dir: "gpt2" (124M parameters), "gpt2-medium" (355M), "gpt2-large" (774M) or
        "gpt2-xl" (1.6B), which are downloaded once; or a folder with config.json and
        model.safetensors or pytorch_model.bin, whole or in shards. Returns the model in float32 on
        the CPU. Raises UserError if a file is missing, damaged, or not a GPT-2's.
        """
        sizes, paths = hub.find_or_download(name_or_dir)
        try:
            config = GPTConfig(**sizes)
        except ValueError as error:
            raise UserError(f"{paths[0].parent / 'config.json'}: {error}") from error
        with torch.device("meta"):      # allocates nothing and draws no random numbers
            model = cls(config)
        model.load_state_dict(hub.read_state(paths, model.state_dict()), assign=True)
        return model

    def save_pretrained(self, folder):
        """Write config.json, generation_config.json and model.safetensors, for from_pretrained and
        for transformers' GPT2LMHeadModel. End-of-text is taken to be the last id of the
        vocabulary, 50256 at most. The tokenizer's files: tasks.tokenizers.write_tokenizer.
        """
        hub.write_pretrained(folder, self.config, self.state_dict())


def choose(logits, temperature, top_k, top_p, generator):
    """Sample one token per row of (B, V) logits; arguments as in GPT.generate. Returns (B,)."""
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature     # at most 0: no overflow
    if top_k is not None:
        kept, ids = logits.topk(min(top_k, logits.size(-1)))
        logits = torch.full_like(logits, -math.inf).scatter(-1, ids, kept)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p              # those before add up to p
        beyond = beyond.scatter(-1, order, beyond)              # back in order of ids
        logits = logits.masked_fill(beyond, -math.inf)
    # Inverse transform sampling: one uniform number per row, and the token whose interval of the
    # cumulative distribution contains it. (torch.multinomial draws V numbers per row.) Rare tokens
    # have tiny intervals, so the sum is in float64 (float32 on Apple's GPUs, which lack float64).
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    ends = logits.softmax(-1).cumsum(-1, dtype=dtype)                               # (B, V)
    u = torch.rand(len(ends), 1, dtype=dtype, device=ends.device, generator=generator)
    token = torch.searchsorted(ends, u * ends[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.size(-1) - 1)         # u * end may round up to end in float32
