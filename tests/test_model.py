"""The model: GPT-2 to the letter, log-probs of packed answers, sampling, checkpoints.

    pytest tests/test_model.py

The model is compared with a GPT-2 in NumPy that computes one sequence at a time, and with log-probs
summed token by token. Both are written out here. Almost everything is in float64, so that
tolerances can be small.
"""

import copy
import math
import os
import pickle
import textwrap
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

import model as module
from data import Encoded, pack
from model import GPT, GPTConfig, choose
from runtime.errors import UserError
from runtime.parallel import allow_any_size, set_precision
from tasks.checkpoint import load_checkpoint, save_checkpoint

for_all = settings(deadline=None, max_examples=30, derandomize=True)
EOT = 12                                                    # the last id of the small vocabulary


def small_gpt(seed=0, std=0.3, n_layer=2):
    """A GPT with 13 ids and with weights large enough that every token matters."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=24, vocab_size=13, n_layer=n_layer, n_head=2,
                          n_embd=8)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


ids = st.integers(0, EOT)
sequences = st.lists(ids, min_size=1, max_size=6)


@st.composite
def groups(draw):
    """One to four prompts with one to four answers each."""
    return [Encoded(prompt, answers, []) for prompt, answers in draw(st.lists(
        st.tuples(sequences, st.lists(sequences, min_size=1, max_size=4)), min_size=1, max_size=4))]


# ------------------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------------------


def gpt2_by_hand(model, tokens):
    """Logits (T, V) of one sequence, computed in NumPy from the state dict alone."""
    w = {name: value.numpy() for name, value in model.state_dict().items()}
    T, H = len(tokens), model.config.n_head

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def layer_norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def attention(x, name):
        qkv = np.split(linear(x, name + ".c_attn"), 3, axis=-1)
        heads = []
        for q, k, v in zip(*(np.split(all_heads, H, axis=-1) for all_heads in qkv)):
            out = np.zeros_like(v)
            for t in range(T):
                scores = np.exp(k[:t + 1] @ q[t] / math.sqrt(q.shape[-1]))
                out[t] = scores / scores.sum() @ v[:t + 1]
            heads.append(out)
        return linear(np.concatenate(heads, -1), name + ".c_proj")

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    for i in range(model.config.n_layer):
        x = x + attention(layer_norm(x, f"h.{i}.ln_1"), f"h.{i}.attn")
        wide = gelu(linear(layer_norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"))
        x = x + linear(wide, f"h.{i}.mlp.c_proj")
    return layer_norm(x, "ln_f") @ w["wte.weight"].T


@for_all
@given(st.lists(ids, min_size=1, max_size=24), st.integers(0, 3))
def test_forward_is_gpt2_written_out_by_hand(tokens, seed):
    """Pre-LayerNorm, tanh GELU, learned positions, tied head: any deviation shows here."""
    model = small_gpt(seed)
    got = model(torch.tensor([tokens]))[0].detach().numpy()
    np.testing.assert_allclose(got, gpt2_by_hand(model, tokens), rtol=1e-10, atol=1e-10)


def test_default_sizes_are_those_of_the_released_124m_model():
    """wte has 50257 x 768 parameters, wpe 1024 x 768, a block 12 C^2 + 13 C, and ln_f 2 C. With 12
    blocks that makes 124,439,808. The output head is wte again and adds nothing."""
    with torch.device("meta"):
        model = GPT(GPTConfig())
    C = 768
    expected = (50257 + 1024) * C + 12 * (12 * C * C + 13 * C) + 2 * C
    assert sum(p.numel() for p in model.parameters()) == expected == 124_439_808


def test_residual_projections_start_smaller_by_the_root_of_twice_the_depth():
    """The blocks add to the residual stream 2 n_layer times. Scaled by 1 / sqrt(2 n_layer), here
    1 / sqrt(2 x 8) = 1/4, they have a total variance that does not depend on the depth."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=8, n_head=1, n_embd=256))
    assert model.h[3].attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for projection in (model.h[3].attn.c_proj, model.h[3].mlp.c_proj):
        assert projection.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
        assert not projection.bias.any()


@for_all
@given(st.lists(ids, min_size=2, max_size=24), st.data())
def test_no_logit_depends_on_a_later_token(tokens, data):
    """Causality: otherwise the model would see the token that it has to predict."""
    model, t = small_gpt(), data.draw(st.integers(1, len(tokens) - 1))
    other = tokens[:t] + [data.draw(ids) for _ in tokens[t:]]
    a, b = model(torch.tensor([tokens])), model(torch.tensor([other]))
    torch.testing.assert_close(a[:, :t], b[:, :t], rtol=0, atol=1e-12)


def test_training_mode_changes_nothing():
    """There is no dropout: noise would swamp the difference between policy and reference."""
    model, tokens = small_gpt(), torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(model.train()(tokens), model.eval()(tokens))


def test_heads_must_divide_channels():
    with pytest.raises(ValueError, match="n_embd 8 is not a multiple of n_head 3"):
        GPT(GPTConfig(n_embd=8, n_head=3))


# ------------------------------------------------------------------------------------------------
# Log-probs of packed answers
# ------------------------------------------------------------------------------------------------


def logp_by_hand(model, prompt, answer):
    """log pi(y|x) of one answer in its own row. The place before a token predicts it."""
    log_probs = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
    return sum(log_probs[len(prompt) + i - 1, token] for i, token in enumerate(answer))


def logps_by_hand(model, items):
    return torch.stack([logp_by_hand(model, item.prompt, answer)
                        for item in items for answer in item.answers])


@for_all
@given(groups(), st.integers(12, 40))
def test_packed_logps_are_those_of_one_row_a_sequence(items, row_length):
    """For any lengths and numbers of answers, packing saves arithmetic and changes no number."""
    model = small_gpt()
    got = model.logps(pack(items, row_length))
    torch.testing.assert_close(got, logps_by_hand(model, items), rtol=0, atol=1e-12)


@for_all
@given(groups(), st.integers(12, 40))
def test_packed_gradients_are_those_of_one_row_a_sequence(items, row_length):
    """Each answer has a weight of its own in the sum, so it would show if two were swapped."""
    packed, single = small_gpt(), small_gpt()
    weights = torch.arange(1.0, 1 + sum(len(item.answers) for item in items)).double()
    (packed.logps(pack(items, row_length)) * weights).sum().backward()
    (logps_by_hand(single, items) * weights).sum().backward()
    for (name, a), b in zip(packed.named_parameters(), single.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12,
                                   msg=f"the gradient of {name} is another one")


@for_all
@given(sequences, sequences, st.lists(sequences, min_size=1, max_size=3))
def test_an_answer_is_blind_to_its_siblings(prompt, answer, siblings):
    """If every token of its siblings changes, an answer's log-prob stays the same, bit for bit."""
    model = small_gpt()
    rewritten = [[(token + 1) % (EOT + 1) for token in sibling] for sibling in siblings]
    a = model.logps(pack([Encoded(prompt, [*siblings, answer], [])], 40))
    b = model.logps(pack([Encoded(prompt, [*rewritten, answer], [])], 40))
    assert a[-1] == b[-1]


@for_all
@given(sequences, sequences)
def test_probabilities_of_all_next_tokens_sum_to_one(prompt, answer):
    """exp(logps) summed over every one-token continuation of a prompt. Without the shift by one, or
    without the first token of an answer, the sum would not be 1."""
    model = small_gpt()
    logps = model.logps(pack([Encoded(prompt + answer, [[i] for i in range(EOT + 1)], [])], 40))
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-12)


@for_all
@given(sequences, sequences, sequences)
def test_logps_follow_the_chain_rule(prompt, begin, end):
    """log pi(ab|x) = log pi(a|x) + log pi(b|xa). And pi(a|x) is the sum of pi(ab|x) over all tokens
    b. Means over the answer's tokens, or log-probs that include the prompt's, would not do this."""
    model = small_gpt()
    whole, first, second, *extended = model.logps(pack([
        Encoded(prompt, [begin + end], []), Encoded(prompt, [begin], []),
        Encoded(prompt + begin, [end], []),
        Encoded(prompt, [begin + [token] for token in range(EOT + 1)], [])], 40))
    torch.testing.assert_close(whole, first + second, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.stack(extended).logsumexp(0), first, rtol=0, atol=1e-12)


def test_the_log_prob_of_one_answer_is_computed_as_the_docstring_of_logps_says():
    """The six lines that a reader who knows transformers would write, run as they stand there."""
    model, prompt, answer = small_gpt(), [EOT, 3, 1], [4, 1, 5, EOT]
    lines = textwrap.dedent(GPT.logps.__doc__.split("labels:\n\n")[1]).splitlines()
    found = {"torch": torch, "model": model, "prompt": prompt, "answer": answer}
    exec("\n".join(line.strip() for line in lines), found)
    packed = model.logps(pack([Encoded(prompt, [[2], answer], [])], 16))
    torch.testing.assert_close(found["logp"], packed[1], rtol=0, atol=1e-12)


def test_common_mistakes_give_other_numbers():
    """The log-prob of three tokens, each at its place in log_softmax, is the number wanted; each of
    these mistakes gives another one."""
    model, prompt, answer = small_gpt(), [3, 1, 4], [1, 5, EOT]
    got = model.logps(pack([Encoded(prompt, [answer], [])], 8)).item()
    logits = model(torch.tensor([prompt + answer]))[0]
    log_probs = logits.log_softmax(-1)
    scored = [log_probs[2 + i, token].item() for i, token in enumerate(answer)]
    mistakes = {
        "each token is scored at its own place, not at the one before it":
            sum(log_probs[3 + i, token].item() for i, token in enumerate(answer)),
        "the first token of the answer is not scored": sum(scored[1:]),
        "end-of-text is not scored": sum(scored[:-1]),
        "the log-probs are averaged, not summed": sum(scored) / 3,
        "the prompt is scored, too":
            sum(log_probs[i, token].item() for i, token in enumerate((prompt + answer)[1:])),
        "logits are used as log-probs":
            sum(logits[2 + i, token].item() for i, token in enumerate(answer))}
    for mistake, value in mistakes.items():
        assert abs(value - sum(scored)) > 1e-3
        assert abs(value - got) > 1e-3, f"the number is that of this mistake: {mistake}"
    assert got == pytest.approx(sum(scored), abs=1e-12)


@for_all
@given(groups(), st.integers(2, 40), st.sampled_from([0.0, -100.0]), st.booleans())
def test_a_padded_vocabulary_changes_no_log_prob_and_no_gradient(items, multiple, shift, tf32):
    """The 13 columns of the head are padded to a multiple, as for the tensor cores. A constant
    first channel shifts every logit by 0 or by -100, where GPT-2's logits lie; there, a padding
    column of zeros would take all the probability. What TF32 needs besides, an embedding without
    its mean, changes none either."""
    plain, padded = small_gpt(), small_gpt()
    for model in (plain, padded):
        with torch.no_grad():
            model.ln_f.weight[0], model.ln_f.bias[0], model.wte.weight[:, 0] = 0.0, shift, 1.0
    padded.vocab_multiple, padded.tf32 = multiple, tf32
    columns = padded.head(torch.ones(2, 8), multiple).size(1)
    assert columns % multiple == 0 and 13 <= columns < 13 + multiple
    batch = pack(items, 16)
    logps = [model.logps(batch) for model in (plain, padded)]
    torch.testing.assert_close(*logps, rtol=0, atol=1e-11)
    for values in logps:
        values.sum().backward()
    for (name, a), b in zip(plain.named_parameters(), padded.parameters()):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_logps_are_float32_and_close(precision):
    """Matrix products are in half precision, softmax and sums in float32. The formats have 8 and 11
    significant bits, so a logit of about 1 is off by less than 2^-7, and a sum over 5 tokens by
    less than 5 times that. The tolerance is four times larger."""
    model, items = small_gpt().float(), [Encoded([1, 2, 3], [[4, 5, 6, 7, EOT], [8, 9, EOT]], [])]
    exact = model.logps(pack(items, 16))
    model.precision = precision
    rough = model.logps(pack(items, 16))
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0, atol=5 * 2**-5)
    model.precision = None
    assert torch.equal(model.logps(pack(items, 16)), exact)
    torch.testing.assert_close(exact, logps_by_hand(model, items))


def steps_of_any_shape(row_length=16):
    """Packed batches with varying numbers of rows, scored tokens and answers."""
    rng = np.random.default_rng(0)
    for n in (4, 9, 3, 17, 5):
        yield pack([Encoded([1] * rng.integers(1, 7), [[2] * m for m in rng.integers(1, 9, k)], [])
                    for k in rng.integers(1, 5, n)], row_length)


def compile_on(model):
    """What the training loops call if a model is compiled, after marking the batch as
    pack_for_model does. What PyTorch learned of earlier shapes, in other tests, is forgotten."""
    torch._dynamo.reset()
    model.compiled = True
    return lambda batch: allow_any_size(batch) or model.logps(batch)


def test_compiled_logps_are_the_eager_ones(monkeypatch):
    """Compilation may reorder float32 sums and change nothing else, whatever the shapes. The keys
    of the state dict stay the same. What is ours ends with the graphs of forward and backward, and
    they run as they are here. With DPO_INDUCTOR=1, as in .ci/run, kernels are compiled from them,
    which takes a C++ compiler and most of a minute."""
    torch_compile = torch.compile
    backend = "inductor" if os.environ.get("DPO_INDUCTOR") else "aot_eager_decomp_partition"
    monkeypatch.setattr(torch, "compile", lambda f: torch_compile(f, backend=backend))
    monkeypatch.setattr(GPT.logps, "compiled", None)
    eager, compiled = (small_gpt(n_layer=1).float() for _ in "12")
    compiled_logps_of = compile_on(compiled)
    for batch in steps_of_any_shape():
        got = compiled_logps_of(batch)
        got.sum().backward()
        expected = eager.logps(batch)
        expected.sum().backward()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        for p, q in zip(compiled.parameters(), eager.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
    assert list(compiled.state_dict()) == list(eager.state_dict())


def test_there_is_a_graph_for_each_row_length_and_no_other(monkeypatch):
    """Compiling takes longer than many steps. Although the numbers of rows, scored tokens and
    answers differ in each batch, there are only two graphs for a row length, one for training steps
    and one for evaluation (without gradients), and another for batches of a single row."""
    graphs, torch_compile = [], torch.compile

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", lambda f: torch_compile(f, backend=count))
    monkeypatch.setattr(GPT.logps, "compiled", None)
    logps_of, found = compile_on(small_gpt()), []
    for gradients in (True, False, True, False):
        for batch in steps_of_any_shape():
            with torch.set_grad_enabled(gradients):
                logps_of(batch)
            found.append(len(graphs))
    assert found == [1] * 5 + [2] * 15
    for answers in ([[2, 3], [4]], [[2], [3], [4, 5]]):
        logps_of(pack([Encoded([1], answers, [])], 16))
    assert len(graphs) == 3
    for batch in steps_of_any_shape(row_length=24):
        logps_of(batch)
    assert len(graphs) == 4


# ------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------


def plain_greedy(model, prompt, new, eot):
    """Greedy decoding without a cache: every token is computed from the whole text so far."""
    text = list(prompt)
    while len(text) < min(len(prompt) + new, 24) and (text == prompt or text[-1] != eot):
        text.append(model(torch.tensor([text]))[0, -1].argmax().item())
    return text[len(prompt):]


def leaving(every, most_going=1.0):
    """A with block in which generate checks for finished rows every so many tokens and drops them
    once at most this share of the rows is unfinished; by default, however few are finished."""
    return mock.patch.multiple(module, CHECK_EVERY=every, MOST_GOING=most_going)


def tokens_read(model, *arguments, **named):
    """Call model.generate. Returns (answers, tokens that went through the network at each step)."""
    counts, hidden = [], model.hidden

    def counted(tokens, *more):
        counts.append(tokens.numel())
        return hidden(tokens, *more)
    with mock.patch.object(model, "hidden", counted):
        return model.generate(*arguments, **named), counts


@for_all
@given(st.lists(sequences, min_size=1, max_size=4), st.integers(1, 12))
def test_cached_generation_of_ragged_prompts_is_the_plain_one(prompts, new):
    """Greedy answers are those of each prompt alone, decoded without a cache. The weights are
    large, so one visible token too many or too few changes the most likely one."""
    model = small_gpt(std=1.0)
    expected = [plain_greedy(model, prompt, new, EOT) for prompt in prompts]
    assert model.generate(prompts, new, temperature=0, eot=EOT) == expected


# Up to four prompts, each repeated any number of times, in any order.
repeated = st.lists(sequences, min_size=1, max_size=4).flatmap(
    lambda prompts: st.lists(st.sampled_from(prompts), min_size=1, max_size=8))


@for_all
@given(repeated, st.integers(1, 9), st.sampled_from([0.0, 0.5, 0.75, 1.0]), ids)
def test_no_answer_changes_when_others_leave_the_batch(prompts, every, most_going, eot):
    """Any token may be the end-of-text, so answers end early, late and never, and finished rows
    leave at every step or only once many have finished. A row with the cached keys of another would
    continue the other's text."""
    model = small_gpt(std=1.0)
    expected = [plain_greedy(model, prompt, 30, eot) for prompt in prompts]
    with leaving(every, most_going):
        assert model.generate(prompts, 30, temperature=0, eot=eot) == expected


@for_all
@given(repeated)
def test_a_prompt_is_read_once_for_all_its_answers(prompts):
    """Equal prompts are prefilled once, wherever they are in the list. Each takes as many columns
    as the longest."""
    _, counts = tokens_read(small_gpt(), prompts, 1)
    assert counts == [len(set(map(tuple, prompts))) * max(map(len, prompts))]


@for_all
@given(repeated, st.integers(0, 99), st.integers(1, 30))
def test_an_answer_that_is_done_costs_nothing_more(prompts, seed, new):
    """If finished rows leave at every step, the tokens computed after the prefill are those of each
    answer except its last, whether that was end-of-text, the limit or the last position."""
    with leaving(1):
        answers, counts = tokens_read(small_gpt(), prompts, new, eot=EOT,
                                      generator=torch.Generator().manual_seed(seed))
    assert sum(counts[1:]) == sum(len(answer) - 1 for answer in answers)
    assert len(counts) == max(map(len, answers))


def test_most_of_the_tail_of_long_answers_is_not_paid_for():
    """This is with the default settings: 200 answers of at most 23 tokens, of which about one token
    in 13 ends an answer. A finished row stays for at most 7 steps, until the next check, or for as
    long as less than a quarter of the rows have finished."""
    model = small_gpt()
    answers, counts = tokens_read(model, [[1]] * 200, 23, eot=EOT,
                                  generator=torch.Generator().manual_seed(0))
    lengths = [len(answer) for answer in answers]
    for step, count in enumerate(counts[1:]):
        looked = step + 1 - (step + 1) % module.CHECK_EVERY     # length at the last check
        going = sum(length > looked for length in lengths)
        assert count <= (going / module.MOST_GOING if looked else 200)
    assert max(lengths) == 23 and counts[-1] < 100


def test_sampled_answers_follow_the_models_own_distribution():
    """The shares of first tokens among 4,000 two-token answers, against their probabilities. The
    share of an event of probability p in n draws has standard deviation
    sqrt(p (1 - p) / n) < 0.008; five of these are allowed. Rows whose first token is end-of-text
    leave the batch, which must not affect what the others draw next, so second tokens are
    compared."""
    model, n = small_gpt(), 4000
    with leaving(1):
        answers = model.generate([[1, 2, 3]] * n, 2, eot=EOT,
                                 generator=torch.Generator().manual_seed(0))
    first = torch.tensor([a[0] for a in answers]).bincount(minlength=EOT + 1) / n
    expected = model(torch.tensor([[1, 2, 3]]))[0, -1].softmax(-1)
    assert (first - expected).abs().max() < 5 * 0.008
    likeliest = int(expected[:EOT].argmax())
    second = torch.tensor([a[1] for a in answers if a[0] == likeliest])
    expected = model(torch.tensor([[1, 2, 3, likeliest]]))[0, -1].softmax(-1)
    shares = second.bincount(minlength=EOT + 1) / len(second)
    assert (shares - expected).abs().max() < 5 * 0.5 / len(second) ** 0.5


def test_generation_has_its_own_generator():
    """The same seed gives the same answers, and the state of PyTorch's default generator, which
    training may use, does not change."""
    model = small_gpt()

    def answers(seed):
        return model.generate([[1]] * 8, 20, eot=EOT,
                              generator=torch.Generator().manual_seed(seed))
    before = torch.get_rng_state()
    assert answers(1) == answers(1) != answers(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_answer_ends_with_its_first_end_of_text_or_at_the_limit():
    model, generator = small_gpt(), torch.Generator().manual_seed(0)
    for answer in model.generate([[1], [2, 3]] * 50, 9, eot=EOT, generator=generator):
        assert EOT not in answer[:-1]
        assert len(answer) == 9 or answer[-1] == EOT


def test_each_prompt_may_use_all_positions_there_are():
    """A long prompt in the batch takes nothing away from a short one. With 24 positions, prompts of
    20 and 2 tokens get 4 and 22 new ones, the same as if each were alone."""
    model, prompts = small_gpt(), [[1] * 20, [2] * 2]
    together = model.generate(prompts, 100, temperature=0)
    assert [len(answer) for answer in together] == [4, 22]
    assert together == [model.generate([prompt], 100, temperature=0)[0] for prompt in prompts]


@pytest.mark.parametrize("prompts", [[[]], [[1], []], [[1] * 24]])
def test_empty_prompts_and_prompts_without_room_are_refused(prompts):
    with pytest.raises(ValueError, match="prompts must have 1 to 23 tokens"):
        small_gpt().generate(prompts, 4)


logits = st.lists(st.floats(-5, 5), min_size=2, max_size=8, unique_by=lambda z: round(z, 3))


def draws(row, **how):
    """The set of ids in 200 draws. Settings that are not given are off."""
    how = dict(temperature=1.0, top_k=None, top_p=None) | how
    rows = torch.tensor([row], dtype=torch.float64).expand(200, -1)
    return set(choose(rows, generator=torch.Generator().manual_seed(0), **how).tolist())


@for_all
@given(logits, st.integers(1, 9))
def test_top_k_draws_only_the_k_likeliest(row, k):
    order = sorted(range(len(row)), key=lambda i: -row[i])
    assert draws(row, top_k=k) <= set(order[:k])
    assert draws(row, top_k=1) == draws(row, temperature=0) == {order[0]}


@for_all
@given(logits, st.floats(0.01, 1))
def test_top_p_draws_only_the_fewest_likeliest_that_reach_p(row, p):
    order = sorted(range(len(row)), key=lambda i: -row[i])
    weights = [math.exp(row[i]) for i in order]
    nucleus, mass = set(), 0.0
    for i, weight in zip(order, weights):
        if mass >= p - 1e-9:
            break
        nucleus.add(i)
        mass += weight / sum(weights)
    assert draws(row, top_p=p) <= nucleus


def test_top_p_of_one_leaves_all_tokens():
    """The sum of 100,000 equal probabilities reaches 1 before its end in float32."""
    logits = torch.zeros(1, 100_000)
    generator = torch.Generator().manual_seed(0)
    drawn = [choose(logits, 1.0, None, 1.0, generator).item() for _ in range(200)]
    generator.manual_seed(0)
    assert drawn == [choose(logits, 1.0, None, None, generator).item() for _ in range(200)]


def test_top_k_leaves_k_tokens_even_if_some_are_equally_likely():
    logits, generator = torch.zeros(1, 50), torch.Generator().manual_seed(0)
    drawn = {choose(logits, 1.0, 3, None, generator).item() for _ in range(200)}
    assert len(drawn) == 3


def test_top_k_and_top_p_draw_every_one_of_those_they_leave():
    """With probabilities 0.5, 0.3 and 0.2, the first two reach 0.7, and the last is needed for 0.9.
    The rarest is missing from 200 draws with probability 0.8^200 = 4e-20."""
    row = [math.log(p) for p in (0.5, 0.3, 0.2)]
    assert draws(row, top_k=2) == draws(row, top_p=0.7) == {0, 1}
    assert draws(row, top_k=3) == draws(row, top_p=0.9) == draws(row) == {0, 1, 2}


@pytest.mark.parametrize("u, token", [(0.0, 1), (1 - 2**-53, 3)])
def test_no_number_draws_a_token_that_has_no_probability(monkeypatch, u, token):
    """The probabilities are 0, 1/4, 0, 3/4 and 0. The smallest number that torch.rand can return
    draws token 1, the first with any probability, and the largest draws token 3, the last."""
    monkeypatch.setattr(torch, "rand",
                        lambda *shape, dtype, **how: torch.full(shape, u, dtype=dtype))
    row = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).log()
    assert choose(row, 1.0, None, None, None).tolist() == [token]


def test_temperature_divides_the_logits_once():
    """Logits 0 and 1 at temperature 0.5 become 0 and 2, so the second token has probability
    sigma(2) = 0.88. If the temperature were applied twice, it would be sigma(4) = 0.98. The share
    in 20,000 draws has standard deviation 0.0023; five of these are allowed."""
    rows = torch.tensor([[0.0, 1.0]]).expand(20_000, -1)
    share = choose(rows, 0.5, None, None, torch.Generator().manual_seed(0)).double().mean().item()
    assert share == pytest.approx(1 / (1 + math.exp(-2)), abs=5 * 0.0023)


# ------------------------------------------------------------------------------------------------
# Optimizer and checkpoints
# ------------------------------------------------------------------------------------------------


def test_weight_decay_shrinks_matrices_and_nothing_else():
    """With zero gradients AdamW only decays: matrices shrink by the factor 1 - lr x decay =
    1 - 0.1 x 0.5 = 0.95, and biases and layer norms stay."""
    model = small_gpt()
    before, optimizer = copy.deepcopy(model), model.optimizer(lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before.parameters()):
        torch.testing.assert_close(p, old * (0.95 if old.dim() == 2 else 1.0), msg=name)


def test_optimizer_without_decay_is_adam():
    """Appendix B trains with Adam."""
    a, b = small_gpt(), small_gpt()
    optimizers = a.optimizer(lr=1e-2), torch.optim.Adam(b.parameters(), lr=1e-2)
    for _ in range(3):
        for model, optimizer in zip((a, b), optimizers):
            model(torch.tensor([[1, 2, 3]])).log_softmax(-1)[0, -1, 4].neg().backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_a_checkpoint_brings_back_sizes_weights_and_facts(tmp_path):
    model = small_gpt().float()
    save_checkpoint(tmp_path / "a.pt", model, tokenizer="reviews", seed=3)
    loaded, facts = load_checkpoint(tmp_path / "a.pt")
    assert loaded.config == model.config and facts == {"tokenizer": "reviews", "seed": 3}
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters()))


def test_the_same_model_is_saved_to_the_same_bytes_and_leaves_nothing_beside_it(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_checkpoint(tmp_path / folder / "sft.pt", small_gpt())
    assert (tmp_path / "a/sft.pt").read_bytes() == (tmp_path / "b/sft.pt").read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["sft.pt"]


class Hostile:
    def __reduce__(self):
        return open, ("pwned", "w")


def test_files_that_are_no_checkpoints_are_refused_in_one_sentence(tmp_path, monkeypatch):
    """A missing file, a folder, half a file, other content or sizes, a pickle that runs code."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint("good.pt", small_gpt())
    good = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(good[:len(good) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "hostile.pt").write_bytes(pickle.dumps(Hostile()))
    torch.save({"model": {}}, "other.pt")
    saved = torch.load("good.pt", weights_only=True)
    torch.save(saved | {"config": saved["config"] | {"n_embd": 16}}, "sizes.pt")
    (tmp_path / "folder.pt").mkdir()
    for name in ("missing", "half", "text", "empty", "hostile", "other", "sizes", "folder"):
        with pytest.raises(UserError, match=f"{name}.pt: ") as caught:
            load_checkpoint(f"{name}.pt")
        assert "\n" not in str(caught.value), name
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_logits_far_from_zero_cost_no_precision(precision):
    """All logits of the released GPT-2 lie around -100, where bfloat16 has a resolution of one
    half, so a head in bfloat16 would be off by about a quarter per token. In float32, the common
    offset, on which no probability depends, changes nothing."""
    model, item = small_gpt().float(), Encoded([1, 2, 3], [[4, 5, 6, 7, 8, 9, 10, EOT]], [])
    with torch.no_grad():
        model.ln_f.weight.zero_()       # so the input of the head is ln_f.bias alone, of norm 1
        model.ln_f.bias.copy_(torch.eye(8)[0])
        model.precision = precision
        near = model.logps(pack([item], 32))
        model.wte.weight[:, 0] -= 100
        far = model.logps(pack([item], 32))
    # Eight tokens, each off by float32's rounding error at 100, 4e-6, in its logit and in the sum.
    torch.testing.assert_close(far, near, rtol=0, atol=1e-3)


def nearest_tf32(x):
    """Float32 rounded to TF32, which keeps 10 of the 23 bits of the mantissa."""
    return ((x.view(torch.int32) + 2**12) & -2**13).view(torch.float32)


def truncated_tf32(x):
    return (x.view(torch.int32) & -2**13).view(torch.float32)


@pytest.mark.parametrize("tf32", [nearest_tf32, truncated_tf32])
def test_a_head_in_tf32_costs_hundredths_of_a_nat(tf32, monkeypatch):
    """Logits of 512 ids at -100 +- 6, most of it from one channel, as in GPT-2; 20 answers of 60
    tokens drawn from them. TF32 is off by up to 2^-11 of each of the two factors (by up to 2^-10 if
    they are cut instead of rounded, as some cards do), so by up to 2^-10 x 100 = 0.1 in a logit and
    tenths of a nat in an answer. Without its mean, the embedding is off by a tenth of that."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=512, n_layer=1, n_head=1, n_embd=256))
    hidden, weight = torch.randn(1200, 256), model.wte.weight.data.normal_(std=0.25)
    hidden[:, 0] = 10 + 0.5 * hidden[:, 0]
    weight[:, 0] = -10 + weight[:, 0]
    log_probs = model.double().head(hidden.double()).log_softmax(-1)
    tokens = log_probs.exp().multinomial(1)
    expected = log_probs.gather(1, tokens).view(20, 60).sum(1)
    monkeypatch.setattr(module.F, "linear", lambda x, weight, bias=None: (
        tf32(x).double() @ tf32(weight.float()).double().T).float())
    worst = {}
    for centred in (False, True):
        model.float().tf32 = centred
        answers = model.head(hidden).log_softmax(-1).gather(1, tokens).view(20, 60).sum(1)
        worst[centred] = (answers - expected).abs().max().item()
    assert worst[True] < 0.05 and worst[False] > 0.15


def test_sampling_casts_each_weight_to_half_precision_once():
    """Not once for every token. There are 4 linear layers in each of 2 blocks, and the casts of
    their weights are recognised by shape: the rows of an activation are at most 3."""
    casts = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == "_to_copy" and args[0].shape[0] >= 8:
                casts.append(tuple(args[0].shape))
            return func(*args, **kwargs or {})
    model = small_gpt().float()
    model.precision = torch.bfloat16
    with Watch():
        model.generate([[1, 2, 3], [4]], 9)
    matrices = [shape for shape in casts if len(shape) == 2]
    assert sorted(matrices) == sorted([(24, 8), (8, 8), (32, 8), (8, 32)] * 2)


@pytest.fixture
def settings_of_the_process():
    """Sets back what set_precision sets for the whole process."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_tf32_is_for_cuda_in_half_precision_and_is_set_back(settings_of_the_process):
    """It is a setting of the process, which the next model may not want."""
    for device, precision, tf32 in [("cuda", "bfloat16", True), ("cuda", "float32", False),
                                    ("cuda", "float16", True), ("cpu", "bfloat16", False)]:
        model = SimpleNamespace(device=torch.device(device))
        set_precision(model, precision)
        assert model.tf32 == tf32
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")


def backends(model, monkeypatch):
    """What PyTorch would choose for each call of attention: a list of names, filled later."""
    found, attention = [], F.scaled_dot_product_attention

    def noted(q, k, v, attn_mask=None, is_causal=False):
        chosen = torch._fused_sdp_choice(q, k, v, attn_mask, 0.0, is_causal)
        found.append(SDPBackend(chosen).name)
        return attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", noted)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_on_cuda_attention_goes_to_kernels_that_need_no_plan(precision, monkeypatch,
                                                             settings_of_the_process):
    """cuDNN would build a plan for each new shape. With a mask (packed rows, prompts of several
    lengths) it is the memory-efficient kernel; without one, plain causal or decoding, it is flash
    attention, which only half precision has. Heads have 64 channels, as in GPT-2."""
    model = GPT(GPTConfig(64, 13, 1, 2, 128)).cuda()
    set_precision(model, precision)
    found = backends(model, monkeypatch)
    unmasked = "EFFICIENT_ATTENTION" if precision == "float32" else "FLASH_ATTENTION"

    def used(work):
        found.clear()
        work()
        return set(found)
    batch = pack([Encoded([1, 2], [[3, 4, 5], [6]], [])] * 3, 20).to("cuda")
    assert used(lambda: model.logps(batch).sum().backward()) == {"EFFICIENT_ATTENTION"}
    assert used(lambda: model(batch.tokens)) == {unmasked}
    assert used(lambda: model.generate([[1, 2]] * 3, 5)) == {unmasked}
    assert used(lambda: model.generate([[1, 2], [3]], 5)) == {"EFFICIENT_ATTENTION"}


@pytest.mark.gpu
@pytest.mark.parametrize("precision, tolerance", [
    (None, 1e-3), (torch.bfloat16, 0.3), (torch.float16, 0.05)])
def test_cuda_logps_are_those_of_the_cpu(precision, tolerance):
    model, items = small_gpt().float(), [Encoded([1, 2, 3], [[4, 5, 6, EOT], [8, EOT]], [])] * 8
    expected = model.logps(pack(items, 32))
    model = model.cuda()
    model.precision, model.vocab_multiple = precision, 64
    got = model.logps(pack(items, 32).to("cuda"))
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=tolerance)
    greedy = model.generate([[1, 2], [3]], 8, temperature=0)
    if precision is None:
        assert greedy == model.cpu().generate([[1, 2], [3]], 8, temperature=0)
