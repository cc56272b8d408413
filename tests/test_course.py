"""classroom/course.py: the DPO problem of CS336, checked on many random cases.

    pytest tests/test_course.py

The students of this file solve the problem as public solutions do: they score the whole text, or
only the answer, with a Hugging Face tokenizer and model. Each known mistake is made by one of them.
A student's copy does not contain this file.
"""

import math
import textwrap

import pytest
import torch
import torch.nn.functional as F

from classroom import course
from classroom.course import EOS, MISTAKES, TEMPLATE, check, random_case
from model import GPT

# ------------------------------------------------------------------------------------------------
# Students
# ------------------------------------------------------------------------------------------------


def alpaca(prompt, answer):
    return TEMPLATE.format(prompt) + answer + EOS


def whole_text(lm, tokenizer, prompt, answer, text=alpaca):
    """The log-probs of all tokens after the first, (1, T - 1)."""
    ids = tokenizer(text(prompt, answer), return_tensors="pt").input_ids
    log_probs = lm(ids).logits.log_softmax(-1)
    return log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


def answer_alone(lm, tokenizer, prompt, answer):
    """The log-probs of the answer's tokens, (L,)."""
    n = len(tokenizer.encode(TEMPLATE.format(prompt)))
    return whole_text(lm, tokenizer, prompt, answer)[0, n - 1:]


def student(score, loss=lambda margin, beta: -F.logsigmoid(beta * margin), reference=1):
    """A solution. score(lm, tokenizer, prompt, answer) is the log-prob of an answer. reference: the
    factor of its log-probs under the reference."""
    def solution(lm, lm_ref, tokenizer, beta, prompt, response_chosen, response_rejected):
        margin = 0
        for sign, answer in ((1, response_chosen), (-1, response_rejected)):
            ref = score(lm_ref, tokenizer, prompt, answer).detach()
            margin = margin + sign * (score(lm, tokenizer, prompt, answer) - reference * ref)
        return loss(margin, beta)
    return solution


def total(log_probs, **changes):
    """A score for `student`: the sum of some log-probs."""
    return lambda *arguments: log_probs(*arguments, **changes).sum()


def text_without(piece, instead=""):
    """A score for `student`: the whole text with a piece replaced."""
    def text(prompt, answer):
        return alpaca(prompt, answer).replace(piece, instead)
    return total(whole_text, text=text)


def bare_text(end):
    return total(whole_text, text=lambda prompt, answer: prompt + answer + end)


def raw_logits(lm, tokenizer, prompt, answer):
    n = len(tokenizer.encode(TEMPLATE.format(prompt)))
    ids = torch.tensor(tokenizer.encode(alpaca(prompt, answer)))
    return lm(ids).logits[n - 1:-1].gather(-1, ids[n:, None]).sum()


def unshifted(lm, tokenizer, prompt, answer):
    ids = tokenizer(alpaca(prompt, answer), return_tensors="pt")["input_ids"]
    return lm(ids).logits.log_softmax(-1).gather(-1, ids[..., None]).sum()


def shifted_twice(lm, tokenizer, prompt, answer):
    """The model shifts the labels by itself, and the student has already done so."""
    ids = tokenizer(alpaca(prompt, answer), return_tensors="pt").input_ids
    return -lm(ids[:, :-1], labels=ids[:, 1:]).loss * (ids.size(1) - 2)


def loss_of_the_model(lm, tokenizer, prompt, answer):
    """What lm returns for labels: a mean over all tokens after the first."""
    ids = tokenizer(alpaca(prompt, answer), return_tensors="pt").input_ids
    return -lm(ids, labels=ids).loss


def loss_times_length(lm, tokenizer, prompt, answer):
    length = len(tokenizer.encode(alpaca(prompt, answer)))
    return loss_of_the_model(lm, tokenizer, prompt, answer) * (length - 1)


def padded(lm, tokenizer, prompt, answer):
    """In a batch with a longer text."""
    batch = tokenizer([alpaca(prompt, answer), alpaca(prompt, 20 * "and so on ")],
                      padding=True, return_tensors="pt").to("cpu")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:1]
    ids, mask = batch.input_ids[:1], batch.attention_mask[:1]
    return -lm(ids, attention_mask=mask, labels=labels).loss * (mask.sum() - 1)


right_students = pytest.mark.parametrize("score", [
    total(whole_text), total(answer_alone), loss_times_length, padded])

def beta_on_one_half(of_chosen, score):
    """A student who multiplies by beta only the log-ratio of the chosen answer, or only the
    log-probs under the policy."""
    def solution(lm, lm_ref, tokenizer, beta, prompt, response_chosen, response_rejected):
        logps = [[score(model, tokenizer, prompt, answer)
                  for answer in (response_chosen, response_rejected)] for model in (lm, lm_ref)]
        (pi_w, pi_l), (ref_w, ref_l) = logps
        if of_chosen:
            return -F.logsigmoid(beta * (pi_w - ref_w) - (pi_l - ref_l))
        return -F.logsigmoid(beta * (pi_w - pi_l) - (ref_w - ref_l))
    return solution


def own_reference(lm, lm_ref, **given):
    return student(total(whole_text))(lm, lm, **given)


# A part of the sentence about each mistake, and a student who makes it.
WRONG = {
    "template is missing": student(bare_text(EOS)),
    "joined by a space": student(
        total(whole_text, text=lambda prompt, answer: f"{prompt} {answer}{EOS}")),
    "no end-of-text": student(text_without(EOS)),
    "line break between the answer and end-of-text": student(text_without(EOS, "\n" + EOS)),
    "of the answer are averaged": student(lambda *given: answer_alone(*given).mean()),
    "of prompt and answer are averaged": student(loss_of_the_model),
    "first token of the answer": student(lambda *given: answer_alone(*given)[1:].sum()),
    "at its own position": student(unshifted),
    "shifted twice": student(shifted_twice),
    "without log_softmax": student(raw_logits),
    "beta is not used": student(total(whole_text), lambda margin, beta: -F.logsigmoid(margin)),
    "beta is used twice": student(
        total(whole_text), lambda margin, beta: -F.logsigmoid(beta * beta * margin)),
    "chosen answer only, not for the rejected one": beta_on_one_half(True, total(answer_alone)),
    "and the prompt is scored": beta_on_one_half(True, total(whole_text)),
    "policy only": beta_on_one_half(False, total(whole_text)),
    "another one than the tokenizer's": student(text_without(EOS, "</s>")),
    "own reference": own_reference,
    "-log(sigmoid(z))": student(
        total(whole_text), lambda margin, beta: -torch.log(torch.sigmoid(beta * margin))),
    "reference model is not used": student(total(whole_text), reference=0),
    "margin has the wrong sign": student(
        total(whole_text), lambda margin, beta: -F.logsigmoid(-beta * margin)),
    "loss has the wrong sign": student(
        total(whole_text), lambda margin, beta: F.logsigmoid(beta * margin)),
}


# ------------------------------------------------------------------------------------------------
# Our solution
# ------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer with one token per ASCII character; 0 is end-of-text."""
    eos_token_id = 0

    def encode(self, text, add_special_tokens=True):
        return list(text.encode("ascii"))


class LikesA(torch.nn.Module):
    """Gives "a" `weight` times the probability of each other token, and remembers what it read.
    Returns logits as a plain tensor, like GPT.forward."""

    def __init__(self, weight):
        super().__init__()
        self.logit = torch.nn.Parameter(torch.tensor(math.log(weight)))
        self.texts = []

    def forward(self, tokens):
        self.texts.append("".join(map(chr, tokens[0].tolist())))
        one_hot = F.one_hot(torch.tensor(ord("a")), 128)
        return (self.logit * one_hot).expand(*tokens.shape, 128)


def test_the_loss_of_a_pair_worked_out_on_paper():
    """The reference is uniform over V = 128 tokens. The policy gives "a" 3 times the weight of each
    other token: 3 / 130, and 1 / 130 to the others. "aa" is scored as three tokens and "b" as two,
    end-of-text included, so the difference of their log-ratios is

        2 log(3 * 128 / 130) + log(128 / 130) - 2 log(128 / 130) = 2 log 3 - log(130 / 128).

    At beta 1/2, the loss is -log sigma(log 3 - log(130 / 128) / 2) = log(1 + sqrt(130 / 128) / 3).
    """
    loss = course.run_compute_per_instance_dpo_loss(
        lm=LikesA(3.0), lm_ref=LikesA(1.0), tokenizer=Letters(), beta=0.5, prompt="Who?",
        response_chosen="aa", response_rejected="b")
    assert loss.shape == () and loss.item() == pytest.approx(math.log1p(math.sqrt(130 / 128) / 3))


def test_the_text_is_the_template_the_answer_and_end_of_text():
    lm, lm_ref = LikesA(3.0), LikesA(1.0)
    course.run_compute_per_instance_dpo_loss(lm, lm_ref, Letters(), 0.5, "Who?", "aa", "b")
    start = ("Below is an instruction that describes a task. Write a response that appropriately "
             "completes the request.\n\n### Instruction:\nWho?\n\n### Response:\n")
    assert lm.texts == lm_ref.texts == [start + "aa\0", start + "b\0"]


def test_our_gpt_can_be_the_model():
    """Its forward returns logits, not an object that has them."""
    case = random_case(0)
    loss = course.run_compute_per_instance_dpo_loss(**case._asdict())
    models = []
    for model in (case.lm, case.lm_ref):
        plain = GPT(model.config)
        plain.load_state_dict(model.state_dict())
        models.append(plain)
    case = case._replace(lm=models[0], lm_ref=models[1])
    torch.testing.assert_close(course.run_compute_per_instance_dpo_loss(**case._asdict()), loss)


def test_equal_models_have_loss_log_two():
    case = random_case(1)
    case = case._replace(lm_ref=case.lm)
    loss = course.run_compute_per_instance_dpo_loss(**case._asdict())
    assert loss.item() == pytest.approx(math.log(2))


# ------------------------------------------------------------------------------------------------
# The check
# ------------------------------------------------------------------------------------------------


def test_one_case_in_ten_is_extreme():
    """Its loss is 300, up to rounding, where log(sigmoid(-300)) is infinite in float32."""
    assert course.loss_with(random_case("x", extreme=True)) == pytest.approx(300, rel=1e-4)


@right_students
def test_a_right_solution_passes_whichever_way_it_is_written(score):
    """Whether the prompt is scored too does not matter, nor does padding on the right."""
    assert check(student(score), 10, 0) == ""


def test_a_solution_may_return_its_loss_in_a_tensor_of_shape_1():
    """As the course's own test accepts it."""
    solution = student(total(whole_text))
    assert check(lambda **given: solution(**given)[None], 3, 0) == ""


def test_every_known_mistake_is_made_by_a_student_here():
    for name in MISTAKES:
        assert any(words in name for words in WRONG), name
    assert len(WRONG) == len(MISTAKES)


@pytest.mark.parametrize("words", WRONG)
def test_each_known_mistake_is_named_and_no_other(words):
    """After 10 cases. The sentence about the mistake is the whole verdict."""
    name = min((name for name in MISTAKES if words in name), key=len)
    verdict = check(WRONG[words], 10, 0).splitlines()[-1]
    assert verdict == f"This mistake gives exactly these numbers: {name}."


def test_two_mistakes_at_once_are_both_named():
    """The published mistake: neither template nor end-of-text."""
    verdict = check(student(bare_text("")), 10, 0).splitlines()[-1]
    assert "template is missing; and there is no end-of-text token" in verdict


def test_numbers_that_no_known_mistake_gives_are_called_so():
    report = check(lambda **given: torch.tensor(0.123), 3, 0)
    assert report.endswith("No known mistake gives these numbers, and no two of them together.")


def test_the_report_says_which_case_differs_by_how_much():
    """A loss that is 0.25 too large."""
    right = student(total(whole_text))
    report = check(lambda **given: right(**given) + 0.25, 3, 0)
    case = random_case("0, case 0")
    loss = right(**case._asdict()).item()
    assert report.startswith(f"case 0 of --seed 0: beta {case.beta:.3f}, prompt {case.prompt!r}")
    assert f"yours is {loss + 0.25:.4f}, ours {loss:.4f}: off by 0.2500" in report
    assert "3 of 3 cases differ" in report


def test_nan_is_not_a_right_loss():
    assert "off by nan" in check(lambda **given: torch.tensor(math.nan), 1, 0)


def without_gradient(**given):
    with torch.no_grad():
        return student(total(whole_text))(**given)


def with_half_of_the_gradient(lm, lm_ref, tokenizer, beta, prompt, response_chosen,
                              response_rejected):
    """The log-prob of the rejected answer is detached."""
    def score(model, answer):
        return whole_text(model, tokenizer, prompt, answer).sum()
    chosen = score(lm, response_chosen) - score(lm_ref, response_chosen).detach()
    rejected = score(lm, response_rejected).detach() - score(lm_ref, response_rejected).detach()
    return -F.logsigmoid(beta * (chosen - rejected))


@pytest.mark.parametrize("solution", [without_gradient, with_half_of_the_gradient])
def test_a_right_loss_that_trains_nothing_is_found(solution):
    """The course's own test cannot see this: it only compares the loss."""
    assert "lm gets no gradient or another one than from our loss" in check(solution, 3, 0)


@pytest.mark.parametrize("solution, words", [
    (lambda **given: 0.5, "it returned float, not a tensor"),
    (lambda **given: torch.zeros(2), "it returned a tensor of shape (2,), not one loss"),
    (lambda **given: given["lm"].no_such_thing, "it raised AttributeError: "),
    (lambda **given: exit(), "it raised SystemExit"),
    (lambda lm: 0, "it raised TypeError: "),
])
def test_a_function_that_gives_no_loss_is_answered_in_words(solution, words):
    assert words in check(solution, 3, 0)


def test_a_function_that_is_not_written_yet_is_called_so():
    def unwritten(**given):
        raise NotImplementedError
    assert "not written yet" in check(unwritten, 3, 0)


# ------------------------------------------------------------------------------------------------
# The cases
# ------------------------------------------------------------------------------------------------


def test_cases_depend_on_the_seed_and_without_one_nobody_knows_them():
    wrong = WRONG["beta is not used"]
    assert check(wrong, 3, 5) == check(wrong, 3, 5) != check(wrong, 3, 6)
    assert check(wrong, 3) != check(wrong, 3)       # equal once in 10^9 times


def test_making_a_case_leaves_the_random_numbers_of_others_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    random_case(0)
    assert torch.equal(torch.rand(3), expected)


def test_every_mistake_shows_in_at_least_nine_cases_of_ten():
    """So that it can hardly be missed: the loss is off by more than the tolerance. Only
    -log(sigmoid(z)) shows in none but the extreme cases, of which there is one in ten."""
    cases = [random_case(seed, extreme=seed > 24) for seed in range(30)]
    ours = [course.run_compute_per_instance_dpo_loss(**case._asdict()).item() for case in cases]
    for name, changes in MISTAKES.items():
        shows = [not course.are_equal(case, course.loss_with(case, **changes), loss)
                 for case, loss in zip(cases, ours)]
        if "log(sigmoid" in name:
            assert shows == [False] * 25 + [True] * 5
        else:
            assert sum(shows) >= 27, name


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def run(text, tmp_path, *flags):
    """The exit code of the command for a file with this text."""
    path = tmp_path / "adapters.py"
    path.write_text(textwrap.dedent(text))
    return course.main([str(path), "--cases", "3", *flags])


def test_a_file_with_a_right_solution_passes(tmp_path, capsys):
    text = "from classroom.course import run_compute_per_instance_dpo_loss"
    assert run(text, tmp_path) == 0
    assert "all 3 cases agree" in capsys.readouterr().out


def test_a_file_that_imports_its_neighbour_is_understood(tmp_path, capsys):
    """As tests/adapters.py imports the package beside its folder."""
    (tmp_path / "their_dpo.py").write_text("import torch\n\n"
                                           "def loss(*_):\n    return torch.tensor(0.0)\n")
    assert run("from their_dpo import loss as run_compute_per_instance_dpo_loss", tmp_path) == 1
    assert "0 of 3 cases" not in capsys.readouterr().out


@pytest.mark.parametrize("text, words", [
    ("x = 1", "defines no function run_compute_per_instance_dpo_loss"),
    ("import no_such_package", "importing it raised ModuleNotFoundError: No module named"),
    ("def f(:", "importing it raised SyntaxError"),
    ("raise SystemExit", "importing it raised SystemExit"),
])
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, capsys, text, words):
    with pytest.raises(SystemExit) as caught:
        run(text, tmp_path)
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and words in printed and printed.count("\n") == 1


@pytest.mark.parametrize("argv, words", [
    ([], "required: FILE"),
    (["{here}/nowhere.py"], "nowhere.py: no such file"),
    (["{here}/solution.txt"], "its name does not end in .py"),
    (["{here}/solution.txt", "--cases", "0"], "--cases"),
    (["{here}/solution.txt", "--seed", "x"], "--seed"),
])
def test_bad_flags_are_refused_in_one_sentence(tmp_path, capsys, argv, words):
    (tmp_path / "solution.txt").write_text("x = 1\n")
    with pytest.raises(SystemExit) as caught:
        course.main([word.format(here=tmp_path) for word in argv])
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and words in printed and printed.count("\n") == 1
