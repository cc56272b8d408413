"""Check a solution to the DPO problem of Stanford's CS336 against ours, on many random cases.

    python -m classroom.course FILE                     # 30 cases from a hidden seed
    python -m classroom.course FILE --seed 7 --cases 5  # cases that can be repeated

FILE is a Python file that defines run_compute_per_instance_dpo_loss, as tests/adapters.py of that
course does. It is imported and run with your permissions and without the limits of sandbox.py: it
needs the packages of its author. Run only files that you trust. Or, in a test of one's own:

    from classroom.course import check
    from .adapters import run_compute_per_instance_dpo_loss

    def test_dpo_loss_on_many_instances():
        assert check(run_compute_per_instance_dpo_loss) == ""

The course's own test compares one loss with one published number, 0.5785, to 1e-4. If the numbers
differ, the student does not learn why. Here, the answer says which cases differ by how much, and
which known mistake gives the student's numbers, because each mistake is computed as well.

The conventions of the course (assignment 5, supplement on safety and RLHF, problem dpo_loss):

- The prompt is the instruction of the Alpaca template (TEMPLATE), and the answer follows it.
- The end-of-text token follows the answer and is scored. The course's template file ends with a
  line break, which belongs to the file, not to the answer.
- Log-probs are summed. Whether the prompt is scored too does not matter: its log-prob is the same
  for both answers and cancels. The course recommends it. (For a mean, it would matter.)
- The loss is on the device of lm; lm_ref may be on another one, which is not checked here.

Left out on purpose: the transformers package. Models and tokenizer are small stand-ins, which have
what public solutions use of the real ones.
"""

import importlib.util
import itertools
import random
import secrets
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from runtime.cli import Parser, command, number_type
from runtime.errors import UserError
from tasks.tokenizers import get_tokenizer
from train_dpo import dpo_loss

NAME = "run_compute_per_instance_dpo_loss"
TEMPLATE = ("Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\n{}\n\n### Response:\n")
EOS = "<|endoftext|>"
# Of a loss; where beta or the loss is above 1, it is larger by that factor. Log-probs of whole
# texts in float32 are off by up to 1e-4.
TOLERANCE = 1e-3


# ------------------------------------------------------------------------------------------------
# Our solution
# ------------------------------------------------------------------------------------------------


def run_compute_per_instance_dpo_loss(lm, lm_ref, tokenizer, beta, prompt, response_chosen,
                                      response_rejected):
    """The DPO loss of one pair, a tensor of shape () on the device of lm.

    lm, lm_ref: the policy and the reference; called with (1, T) ids, they return (1, T, V) logits,
    or an object with .logits. tokenizer: a Hugging Face tokenizer of both. prompt,
    response_chosen, response_rejected: texts.
    """
    prompt_ids = tokenizer.encode(TEMPLATE.format(prompt))
    answers = [tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
               for text in (response_chosen, response_rejected)]
    pi_logps = torch.stack([answer_logp(lm, prompt_ids, answer) for answer in answers])     # (2,)
    with torch.no_grad():
        ref_logps = torch.stack([answer_logp(lm_ref, prompt_ids, answer) for answer in answers])
    ref_logps = ref_logps.to(pi_logps.device)
    losses, _ = dpo_loss(pi_logps, ref_logps, torch.tensor([0]), torch.tensor([1]), beta)   # (1,)
    return losses[0]


def answer_logp(lm, prompt_ids, answer):
    """log pi(y|x), the sum of the log-probs of the answer's tokens. Both arguments are ids."""
    log_probs = logits_of(lm, prompt_ids + answer).log_softmax(-1)          # (T, V)
    before = range(len(prompt_ids) - 1, len(prompt_ids) + len(answer) - 1)  # predict the answer
    return log_probs[list(before), answer].sum()


def logits_of(lm, ids):
    """(T, V) float32 logits of a list of T ids."""
    output = lm(torch.tensor([ids], device=next(lm.parameters()).device))
    return getattr(output, "logits", output)[0].float()


# ------------------------------------------------------------------------------------------------
# Random cases
# ------------------------------------------------------------------------------------------------

# The fields are the arguments of the function.
Case = namedtuple("Case", "lm lm_ref tokenizer beta prompt response_chosen response_rejected")
WORDS = ("the music was rather dull but we liked its ending and saw a lovely film twice "
         "naïve {x} 100 % who wrote it? Explain.").split()


class StandInLM(GPT):
    """A GPT that is called like a Hugging Face model. remembered: logits, for margin_of."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.remembered = {}

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        """(B, T) or (T,) ids to an object with .logits. With labels, also .loss: the mean over the
        labels that are not -100, which this method shifts by one, as in transformers."""
        tokens = torch.atleast_2d(input_ids)                                # (B, T)
        mask = None
        if attention_mask is not None:
            seen = torch.atleast_2d(attention_mask).bool()                  # (B, T)
            square = torch.ones(tokens.size(1), tokens.size(1), dtype=torch.bool)
            itself = square.tril().triu()                   # also for padding, so that none is NaN
            mask = square.tril() & seen[:, None] | itself                   # (B, T, T)
        logits = super().forward(tokens, mask=mask)                         # (B, T, V)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1),
                                   torch.atleast_2d(labels)[:, 1:].flatten())
        return SimpleNamespace(logits=logits.view(*input_ids.shape, -1), loss=loss)


class Encoding(dict):
    """What a Hugging Face tokenizer returns: a dict whose values are attributes too."""
    __getattr__ = dict.__getitem__

    def to(self, device):
        return Encoding((name, tensor.to(device)) for name, tensor in self.items())


class StandInTokenizer:
    """The tokenizer of the reviews, called like a Hugging Face tokenizer. Like GPT-2's, it adds no
    special tokens. It pads on the right, with end-of-text."""

    def __init__(self):
        self.encoding = get_tokenizer("reviews")
        self.eos_token = self.bos_token = self.pad_token = EOS
        self.eos_token_id = self.bos_token_id = self.pad_token_id = self.encoding.eot_token

    def __len__(self):
        return self.encoding.n_vocab

    def encode(self, text, add_special_tokens=True, return_tensors=None, **_):
        ids = self.encoding.encode(text, allowed_special="all")
        return torch.tensor([ids]) if return_tensors else ids

    def decode(self, ids, **_):
        return self.encoding.decode(list(ids))

    def __call__(self, text, return_tensors=None, **_):
        """A text, or a list of texts, which are padded to one length if they become a tensor."""
        ids = [self.encode(one) for one in ([text] if isinstance(text, str) else text)]
        masks = [[1] * len(row) for row in ids]
        if return_tensors:
            T = max(map(len, ids))
            ids = torch.tensor([row + [self.pad_token_id] * (T - len(row)) for row in ids])
            masks = torch.tensor([row + [0] * (T - len(row)) for row in masks])
        elif isinstance(text, str):
            ids, masks = ids[0], masks[0]
        return Encoding(input_ids=ids, attention_mask=masks)


def random_case(seed, extreme=False):
    """A Case that depends only on the seed: a number or a text. extreme: its loss is 300, so that
    sigmoid is 0 in float32."""
    rng = random.Random(seed)
    tokenizer = StandInTokenizer()
    config = GPTConfig(block_size=512, vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=16)
    models = []
    with torch.random.fork_rng(devices=[]):
        for _ in ("lm", "lm_ref"):
            torch.manual_seed(rng.getrandbits(32))
            models.append(StandInLM(config, init_std=0.15).eval())

    def words(least, most):
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))
    prompt = words(3, 12) + rng.choice(".?")    # so that no token spans prompt and answer
    if rng.random() < 0.2:
        prompt = words(1, 6) + "\n" + prompt
    # Answers of different lengths, because for equal ones some mistakes are only another beta.
    chosen, rejected = words(1, 4), words(5, 9)
    if rng.random() < 0.5:
        chosen, rejected = rejected, chosen
    case = Case(*models, tokenizer, 10 ** rng.uniform(-1.3, 0), prompt, chosen, rejected)
    if extreme:
        with torch.no_grad():
            margin = margin_of(case._replace(beta=1.0)).item()
        if margin > 0:
            case = case._replace(response_chosen=rejected, response_rejected=chosen)
        case = case._replace(beta=300 / abs(margin))
    return case


# ------------------------------------------------------------------------------------------------
# Known mistakes
# ------------------------------------------------------------------------------------------------

# What is wrong, in words, and what it changes, as arguments of loss_with.
MISTAKES = {
    "the Alpaca template is missing": {"template": "{}"},
    "prompt and answer are joined by a space, not by the Alpaca template":
        {"template": "{}", "before": " "},
    "there is no end-of-text token after the answer": {"ending": ""},
    "there is a line break between the answer and end-of-text, like the one at the end of the "
    "course's template file": {"ending": "\n" + EOS},
    "the log-probs of the answer are averaged, not summed": {"mean": True},
    "the log-probs of prompt and answer are averaged, not summed": {"mean": True, "scored": "text"},
    "the first token of the answer is not scored": {"unscored": 1},
    "each token is scored at its own position, not at the one before it": {"shift": 0},
    "labels are shifted twice (models of transformers shift theirs by themselves)": {"shift": 2},
    "logits are used as log-probs, without log_softmax": {"softmax": False},
    "the end-of-text token is another one than the tokenizer's eos_token": {"ending": "</s>"},
    "beta is not used": {"beta_power": 0},
    "beta is used twice": {"beta_power": 2},
    "beta is used for the chosen answer only, not for the rejected one": {"betas_of": "chosen"},
    "beta is used for the chosen answer only, not for the rejected one, and the prompt is scored":
        {"betas_of": "chosen", "scored": "text"},
    "beta is used for the policy only, not for the reference": {"betas_of": "policy"},
    "the reference model is not used": {"reference": None},
    "the policy is used as its own reference": {"reference": "lm"},
    "the loss is -log(sigmoid(z)), which is infinite at an extreme margin, not -logsigmoid(z)":
        {"log_of_sigmoid": True},
    "the margin has the wrong sign (chosen and rejected swapped, or policy and reference)":
        {"margin_sign": -1},
    "the loss has the wrong sign": {"loss_sign": -1},
}


def loss_with(case, margin_sign=1, loss_sign=1, log_of_sigmoid=False, **changes):
    """The loss of a case with the mistakes that the arguments describe; without any, our loss."""
    with torch.no_grad():
        z = margin_sign * margin_of(case, **changes)
        loss = -z.sigmoid().log() if log_of_sigmoid else -F.logsigmoid(z)
        return loss_sign * loss.item()


def margin_of(case, template=TEMPLATE, before="", ending=EOS, scored="answer", mean=False,
              unscored=0, shift=1, softmax=True, beta_power=1, betas_of="all",
              reference="lm_ref"):
    """The difference of the two implicit rewards, with the mistakes that the arguments describe. To
    be called without gradients."""
    def logp(lm, answer):
        prompt_ids = case.tokenizer.encode(template.format(case.prompt))
        ids = prompt_ids + case.tokenizer.encode(before + answer + ending)
        text = tuple(ids)
        if text not in lm.remembered:
            lm.remembered[text] = logits_of(lm, ids)
        outputs = lm.remembered[text]                                       # (T, V)
        if softmax:
            outputs = outputs.log_softmax(-1)
        first = shift if scored == "text" else len(prompt_ids) + unscored
        logps = outputs[range(first - shift, len(ids) - shift), ids[first:]]
        return logps.mean() if mean else logps.sum()

    beta, margin = case.beta ** beta_power, 0.0
    for sign, answer in ((1, case.response_chosen), (-1, case.response_rejected)):
        of_policy = beta if betas_of in ("all", "policy") or sign > 0 else 1.0
        of_reference = beta if betas_of == "all" or betas_of == "chosen" and sign > 0 else 1.0
        margin += sign * of_policy * logp(case.lm, answer)
        if reference is not None:
            margin -= sign * of_reference * logp(getattr(case, reference), answer)
    return margin


def explanations(differing):
    """The shortest combinations of at most two MISTAKES that give the student's number in each of
    these (case, number), as a list of tuples of names."""
    for n in (1, 2):
        found = [names for names in itertools.combinations(MISTAKES, n)
                 if all(is_explained(case, number, names) for case, number in differing)]
        if found:
            return found
    return []


def is_explained(case, number, names):
    """Whether these mistakes give this number."""
    changes = [change for name in names for change in MISTAKES[name].items()]
    if len(dict(changes)) < len(changes):       # two mistakes that exclude each other
        return False
    return are_equal(case, loss_with(case, **dict(changes)), number)


def are_equal(case, loss, other):
    """Whether two losses of a case are equal, up to rounding. Both may be infinite."""
    size = max(1.0, case.beta, min(abs(loss), abs(other)))
    return loss == other or abs(loss - other) <= TOLERANCE * size


# ------------------------------------------------------------------------------------------------
# The comparison
# ------------------------------------------------------------------------------------------------


class Refused(Exception):
    """A student's function gave no number for a case. The message says why."""


def check(theirs, n_cases=30, seed=None):
    """Compare a student's function with ours. Returns "" if all cases agree, and otherwise what is
    wrong, in words. Without a seed, the cases are different each time."""
    seed = secrets.randbelow(10 ** 9) if seed is None else seed
    lines, differing, wrong_gradients = [], [], []
    for k in range(n_cases):
        case = random_case(f"{seed}, case {k}", extreme=k % 10 == 3)
        ours = run_compute_per_instance_dpo_loss(**case._asdict())
        try:
            loss = call(theirs, case)
        except Refused as refusal:
            return f"{describe_case(case, k, seed)}\n    {refusal}"
        off = abs(loss.item() - ours.item())
        if not are_equal(case, ours.item(), loss.item()):     # also if it is NaN
            differing.append((case, loss.item()))
            lines.append(f"{describe_case(case, k, seed)}\n    yours is {loss.item():.4f}, ours "
                         f"{ours.item():.4f}: off by {off:.4f}")
        elif not same_gradient(case.lm, loss / case.beta, ours / case.beta):
            wrong_gradients.append(describe_case(case, k, seed))
    if differing:
        return "\n".join([*lines[:5], f"{len(differing)} of {n_cases} cases differ",
                          verdict(differing[:10])])
    if wrong_gradients:
        return (f"{wrong_gradients[0]}\nThe losses agree, but in {len(wrong_gradients)} of "
                f"{n_cases} cases lm gets no gradient or another one than from our loss: is it "
                "computed under torch.no_grad, or detached?")
    return ""


def call(theirs, case):
    """The student's loss of a case, a tensor with one element. Raises Refused."""
    try:
        loss = theirs(**case._asdict())
    except NotImplementedError:
        raise Refused("the function is not written yet: it raised NotImplementedError") from None
    except (Exception, SystemExit) as error:
        raise Refused(f"it raised {type(error).__name__}: {error}") from None
    if not isinstance(loss, torch.Tensor):
        raise Refused(f"it returned {type(loss).__name__}, not a tensor")
    if loss.numel() != 1:
        raise Refused(f"it returned a tensor of shape {tuple(loss.shape)}, not one loss")
    return loss


def same_gradient(lm, theirs, ours):
    """Whether both losses have the same gradient with respect to the weights of lm."""
    if not theirs.requires_grad:
        return False
    weights = list(lm.parameters())
    pairs = zip(torch.autograd.grad(theirs.sum(), weights, allow_unused=True),
                torch.autograd.grad(ours, weights))
    return all(mine is not None and torch.allclose(mine, right, rtol=1e-2, atol=1e-3)
               for mine, right in pairs)


def describe_case(case, k, seed):
    return (f"case {k} of --seed {seed}: beta {case.beta:.3f}, prompt {case.prompt!r}, chosen "
            f"{case.response_chosen!r}, rejected {case.response_rejected!r}")


def verdict(differing):
    """Which mistakes explain the student's numbers, in a sentence."""
    found = explanations(differing)
    if not found:
        return "No known mistake gives these numbers, and no two of them together."
    causes = ["; and ".join(names) for names in found]
    return "This mistake gives exactly these numbers: " + "\n  or: ".join(causes) + "."


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def load(path):
    """The student's function. Imports the file, with its folder and the folder above in the import
    path. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    sys.path += [str(path.resolve().parent), str(path.resolve().parent.parent)]
    spec = importlib.util.spec_from_file_location("course_solution", path)
    if spec is None:
        raise UserError(f"{path}: not a Python file (its name does not end in .py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: importing it raised {type(error).__name__}: {error}") from error
    function = getattr(module, NAME, None)
    if not callable(function):
        raise UserError(f"{path}: defines no function {NAME}")
    return function


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help=f"a Python file that defines {NAME}")
    add("--cases", type=number_type(int, 1), default=30, help="random cases (default 30)")
    add("--seed", type=number_type(int, 0), help="repeat the cases of this seed (default: hidden)")
    return parser.parse_args(argv)


@command
def main(argv=None):
    """Returns the exit code: 1 if something is wrong."""
    args = parse_args(argv)
    wrong = check(load(args.file), args.cases, args.seed)
    print(wrong or f"all {args.cases} cases agree with our loss, and so do the gradients of lm")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
