"""Decoding with a captured graph says what GPT.generate says. On the CPU there is no graph to
capture, so these tests are about the step with fixed shapes, run as it is and by torch.compile.

    pytest tests/test_captured.py
"""

import pytest
import torch

import model
from experiments.captured import COLUMNS, Decoder
from model import GPT, GPTConfig

EOT = 19
PROMPTS = [[1, 2, 3, 4, 5], [6], [6], [7, 8, 9], [6], [2, 2]]
WAYS = [{}, {"temperature": 0.0}, {"temperature": 0.5, "top_k": 3}, {"top_p": 0.6},
        {"top_k": 5, "top_p": 0.9}]


def small_gpt(block_size=96):
    """A GPT in float64, so that no token depends on rounding; its weights are large enough that
    answers end at different times."""
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size, EOT + 1, 2, 2, 8), init_std=0.3).double()


def answers(generate, prompts, n, seed, **way):
    return generate(prompts, n, eot=EOT, generator=torch.Generator().manual_seed(seed), **way)


@pytest.fixture(autouse=True)
def no_row_is_dropped(monkeypatch):
    """GPT.generate draws one number per row that is left, so both have to keep all rows."""
    monkeypatch.setattr(model, "MOST_GOING", 0)
    torch._dynamo.reset()


@pytest.mark.parametrize("way", WAYS)
def test_the_captured_step_samples_what_generate_samples(way):
    """Ragged prompts, some of them equal; the second call reuses the caches of the first, with what
    they hold, for shorter prompts. Some answers end early."""
    gpt = small_gpt()
    decoder = Decoder(gpt, backend="eager")
    ended = set()
    for prompts, seed in [(PROMPTS, 0), ([prompt[:2] for prompt in PROMPTS], 1)]:
        expected = answers(gpt.generate, prompts, 30, seed, **way)
        assert answers(decoder.generate, prompts, 30, seed, **way) == expected
        ended |= {ids[-1] == EOT for ids in expected}
    assert len(decoder.caches) == 1
    assert True in ended or way == {"temperature": 0.0}


def test_an_answer_ends_at_the_block_size_and_at_its_own_limit():
    """The longest prompt has 5 of 12 places, so 7 new tokens; the others may have more."""
    gpt = small_gpt(block_size=12)
    expected = gpt.generate(PROMPTS, 20, temperature=0)
    assert Decoder(gpt, backend="eager").generate(PROMPTS, 20, temperature=0) == expected
    assert [len(ids) for ids in expected] == [7, 11, 11, 9, 11, 10]


def test_a_batch_is_one_graph_whatever_its_prompts():
    """Three batches of six rows; prompts and answers together fit in the same number of columns.
    One graph without a break; another number of rows is the second."""
    gpt = small_gpt()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    decoder = Decoder(gpt, backend=count, fullgraph=True)
    for length in (1, 2, 5):
        decoder.generate([prompt[:length] for prompt in PROMPTS], 20)
    assert len(graphs) == 1 and COLUMNS >= 5 + 20
    decoder.generate(PROMPTS[:2], 20)
    assert len(graphs) == 2


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_through_the_compiler_it_is_the_same(precision):
    """aot_eager traces as on a GPU, functional and without Python, but generates no code. Greedy in
    float32 and bfloat16, where a mask of another width may round a score differently: the answers
    differ only if two tokens are equally likely to that precision."""
    gpt = small_gpt().float()
    gpt.precision = precision
    decoder = Decoder(gpt, backend="aot_eager", fullgraph=True)
    expected = answers(gpt.generate, PROMPTS, 30, 0, temperature=0.0)
    assert answers(decoder.generate, PROMPTS, 30, 0, temperature=0.0) == expected


def test_new_weights_are_used():
    """As in PPO, which samples from a policy that it trains."""
    gpt = small_gpt()
    decoder = Decoder(gpt, backend="eager")
    before = decoder.generate(PROMPTS, 20, temperature=0)
    with torch.no_grad():
        gpt.wte.weight.copy_(gpt.wte.weight.flip(0))
    after = decoder.generate(PROMPTS, 20, temperature=0)
    assert after == gpt.generate(PROMPTS, 20, temperature=0) != before
