"""The questions to a GPU, rehearsed on the CPU with everything as small as possible.

    pytest tests/test_gpu_questions.py
"""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from experiments import gpu_questions
from experiments.gpu_questions import FULL, QUESTIONS, Question, ask, head_of, parse_args, stop


@pytest.fixture(autouse=True)
def the_precision_of_products_is_restored():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def args_of(*flags):
    return parse_args(["--device", "cpu", "--tiny", *flags])


SLOW = ("run", "ladder", "head", "packing", "vocabulary")
QUICK = [question for question in QUESTIONS if question.ask.__name__ not in SLOW]


@pytest.mark.parametrize("question", QUICK, ids=lambda question: question.ask.__name__)
def test_a_question_has_an_answer_that_can_be_written_down(question, monkeypatch):
    """In this process. The product of 2,048 x 2,048 matrices is left out, and so are the questions
    that take long; .ci/run asks those, and all others, as a command."""
    monkeypatch.setattr(gpu_questions.benchmark, "peak_flops", lambda device, dtype: 1e11)
    found = list(question.ask(args_of()))
    assert found and json.loads(json.dumps(found)) == found
    assert not any("failed" in line and line["failed"] for line in found), found
    assert all(code == 0 for line in found for code in line.get("exit codes", []))


def test_the_budgets_fit_in_nine_minutes_and_every_question_says_what_it_decides():
    assert sum(question.seconds for question in QUESTIONS) <= args_of().seconds == 540
    assert all(question.decision and question.ask.__doc__ for question in QUESTIONS)
    assert FULL.pairs == {"hh": 64, "tldr": 64, "c1": 66}


def test_a_question_that_runs_out_of_time_is_written_down_and_the_next_is_told(tmp_path, capsys):
    """The first has a budget of 20 s, but there is a tenth of a second for both; the file is there
    all the same."""
    path = tmp_path / "gpu.json"
    gpu_questions.main(["--device", "cpu", "--tiny", "--seconds", "0.1", "--json", str(path),
                        "--only", "vocabulary", "trl"])
    vocabulary, trl = json.loads(path.read_text())["questions"]
    assert vocabulary["error"] == "stopped after 0 s" and trl["error"] == "no time was left"
    assert "not answered in full: vocabulary, trl" in capsys.readouterr().out


def test_a_question_that_fails_says_why():
    question = Question(SimpleNamespace(__name__="nonsense"), 10, "")
    assert "exit code 2" in ask(question, ["--device", "cpu", "--tiny"], 60, print)


def test_what_a_question_finds_is_passed_on_while_it_runs(monkeypatch):
    """From the lines of its process, in their order, and nothing of the process is left."""
    found, processes = [], []
    monkeypatch.setattr(gpu_questions, "stop", lambda process: (processes.append(process),
                                                                stop(process)))
    question = next(question for question in QUESTIONS if question.ask.__name__ == "head")
    start = time.monotonic()
    assert ask(question, ["--device", "cpu", "--tiny"], 120, found.append) is None
    assert [line["vocabulary multiple"] for line in found] == [1, 64, 1, 64]
    assert found[0]["head"] == "float32" and found[-1]["head"] != "float32"
    assert processes[-1].poll() == 0 and time.monotonic() - start < 120


@pytest.mark.parametrize("multiple", [1, 16])
def test_the_heads_that_are_compared_have_one_value_and_gradient(multiple):
    """To the resolution of bfloat16, 2^-9 of a number; the sums have 24 terms of about 1 / 5."""
    torch.manual_seed(0)
    x, weight = torch.randn(6, 24), 0.2 * torch.randn(50, 24)
    target, found = torch.arange(6), []
    for name in ("float32", "bfloat16 inputs"):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        logps = head_of(name, target, multiple)(*inputs)
        logps.sum().backward()
        found.append([logps.detach(), *(tensor.grad for tensor in inputs)])
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)
    exact = (x @ weight.T).log_softmax(-1)[torch.arange(6), target]
    torch.testing.assert_close(found[0][0], exact)
