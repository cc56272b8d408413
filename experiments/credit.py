"""Where in an answer the implicit reward sits: its share of each token.

    python -m experiments.credit                        # four held-out pairs of the reviews task
    python -m experiments.credit --sort wrong           # of those that the policy ranks wrongly
    python -m experiments.credit --prompt "The plot" --chosen " was good." --rejected " was dull."
    python -m experiments.credit --html credit.html     # as a page, with all log-probs
    python -m experiments.credit --truth                # reviews: compared with the true reward

The implicit reward of an answer (Eq. 17, without the term that all answers to a prompt share) is a
sum over its tokens, and this script shows the terms:

    beta log(pi(y|x) / pi_ref(y|x)) = sum over t of beta log(pi(y_t|x, y_<t) / pi_ref(y_t|x, y_<t))

In the terminal, a token is shaded by its share: blue if the policy makes it more likely than the
reference does, orange if less. Where there is no colour, its share stands behind it as a number.

--truth measures, over all held-out answers, how well the shares find the clauses of a review that
earn its reward. docs/credit.md says what a share means and what was measured.

Left out on purpose: attributions by gradients or by leaving out words. The shares need neither,
because the sum is exact.
"""

import html
import math
import os
import re
import shutil
import sys
from collections import namedtuple
from string import Template

import torch

from data import Encoded, Preference, decode_answer, encode
from experiments.ppo import by_token
from runtime.cli import Parser, command, number_type, only_one_process, path_type, printable, set_up
from runtime.errors import UserError
from runtime.files import replacing
from runtime.report import names_of
from runtime.rows import Skipped, unusable
from sample import logps_of, tie_in_nats
from tasks import held_out_pairs, reviews, task_of
from tasks.checkpoint import open_with_reference
from tasks.flags import add_task_flags, choose_task
from train_dpo import implicit_reward

# A token of an answer: its text, as it can be printed; its log-probs, given all before it, under
# reference and policy; its share of the implicit reward.
Token = namedtuple("Token", "text ref_logp logp share")

# A pair as one policy sees it: the prompt, a text; two answers, lists of Token.
View = namedtuple("View", "prompt chosen rejected")

DIM, RESET = "\033[2m", "\033[0m"
BLUES, ORANGES = (153, 75, 33), (223, 215, 208)     # of a terminal's 256 colours, from pale to full


# ------------------------------------------------------------------------------------------------
# The shares
# ------------------------------------------------------------------------------------------------


def credit(policy, reference, items, tokenizer, beta):
    """The tokens of every answer of a list of Encoded: a list of lists of Token, in order."""
    answers = [Encoded(item.prompt, [answer], []) for item in items for answer in item.answers]
    logps = by_token(policy, policy.token_logps, answers)       # (N, L)
    ref_logps = by_token(reference, reference.token_logps, answers)
    shares = implicit_reward(logps, ref_logps, beta)
    rows = zip(ref_logps.tolist(), logps.tolist(), shares.tolist())
    return [[Token(text_of(i, tokenizer), *numbers) for i, *numbers in zip(item.answers[0], *row)]
            for item, row in zip(answers, rows)]


def text_of(token, tokenizer):
    """A token as it can be printed: control characters, and bytes that are only a part of a
    character, are escaped."""
    if token == tokenizer.eot_token:
        return "<eot>"
    return printable(tokenizer.decode_single_token_bytes(token).decode("utf-8", "backslashreplace"))


def views_of(policy, reference, pairs, tokenizer, beta):
    """A View of each of a list of Encoded of two answers, the chosen one first."""
    answers = credit(policy, reference, pairs, tokenizer, beta)
    return [View(tokenizer.decode(pair.prompt[1:]), *answers[2 * i:2 * i + 2])
            for i, pair in enumerate(pairs)]


def total(answer):
    """The implicit reward of a list of Token."""
    return sum(token.share for token in answer)


def full_shade(views):
    """The largest share of all tokens that are shown, up or down, which is shaded fully."""
    return max(abs(token.share) for view in views for answer in view[1:] for token in answer)


def strength(share, full):
    """How strongly to shade a share, from -1 to 1. It grows with the square root, so that one
    extreme token does not make all others pale: a quarter of the largest share is half as strong.
    """
    return math.copysign(math.sqrt(min(1, abs(share) / full)), share) if full > 0 else 0.0


# ------------------------------------------------------------------------------------------------
# Which pairs
# ------------------------------------------------------------------------------------------------


def choose_pairs(items, n, order, policy, reference, row_length):
    """At most n pairs of a list of Encoded, at most one for each of them, as a list of Encoded of
    two answers, the chosen one first. order: "file", as they come; "margin", the pair with the
    largest one first; "wrong", only pairs that the policy ranks wrongly, the worst first."""
    if order == "file":
        return [alone(item, item.pairs[0]) for item in items[:n]]
    found = []
    pi_logps = logps_of(policy, items, row_length, "scoring pairs")
    ref_logps = logps_of(reference, items, row_length, "scoring pairs, reference")
    for item, pi, ref in zip(items, pi_logps, ref_logps):
        margins = [(pi[w] - ref[w]) - (pi[l] - ref[l]) for w, l in item.pairs]      # in nats
        margin = max(margins) if order == "margin" else min(margins)
        found.append((margin, alone(item, item.pairs[margins.index(margin)])))
    if order == "wrong":
        found = [(-margin, pair) for margin, pair in found
                 if margin < -tie_in_nats(policy.precision)]
    found.sort(key=lambda entry: entry[0], reverse=True)
    return [pair for _, pair in found[:n]]


def alone(item, pair):
    """An Encoded of one pair of an Encoded."""
    return Encoded(item.prompt, [item.answers[i] for i in pair], [(0, 1)])


def typed_pair(args, tokenizer, row_length):
    """The Encoded of --prompt, --chosen and --rejected. Raises UserError."""
    prompt, answers = task_of(args).as_prompt(args.prompt, args), [args.chosen, args.rejected]
    reason, skipped = unusable(prompt, answers), Skipped()
    if reason:
        raise UserError(f"--prompt, --chosen and --rejected: {reason}")
    item = encode(Preference(prompt, answers, [(0, 1)]), tokenizer, row_length, skipped)
    if skipped:
        raise UserError("--prompt, --chosen and --rejected: too long; prompt and answer may have "
                        f"{row_length} tokens together")
    return item


# ------------------------------------------------------------------------------------------------
# In the terminal
# ------------------------------------------------------------------------------------------------


def show(view, full, width=100, colour=False):
    """A View as lines of at most `width` characters."""
    prompt = view.prompt if len(view.prompt) <= 300 else "..." + view.prompt[-297:]
    shown = [(printable(word), DIM * colour) for word in re.findall(r"\S+\s*|\s+", prompt)]
    lines = ["prompt    " + wrap(shown, width)]
    for name, answer in [("chosen", view.chosen), ("rejected", view.rejected)]:
        shown = [(token.text, shade(strength(token.share, full))) if colour
                 else (f"{token.text}({token.share:+.2f})", "") for token in answer]
        lines.append(f"{name:<10}" + wrap(shown, width))
    chosen, rejected = total(view.chosen), total(view.rejected)
    lines.append(f"sums      chosen {chosen:+.2f}, rejected {rejected:+.2f}, margin "
                 f"{chosen - rejected:+.2f}")
    return "\n".join(lines)


def wrap(shown, width):
    """(text, style) pieces as text, in lines that leave room for a label of ten characters."""
    lines, used = [""], 10
    for text, style in shown:
        if used + len(text) > width and used > 10:
            lines.append(" " * 10)
            used = 10
        lines[-1] += style + text + RESET * bool(style)
        used += len(text)
    return "\n".join(lines)


def shade(amount):
    """The escape sequence for black letters on blue (amount above 0) or orange, in three steps;
    none for amounts near 0."""
    step = round(3 * abs(amount))
    if step == 0:
        return ""
    background = (BLUES if amount > 0 else ORANGES)[step - 1]
    return f"\033[38;5;16;48;5;{background}m"


# ------------------------------------------------------------------------------------------------
# As a page
# ------------------------------------------------------------------------------------------------

CREDIT_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The implicit reward, token by token</title>
<style>
  :root { color-scheme: light dark }
  body { font: 1rem/1.6 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto 6rem;
         padding: 0 1rem; background: Canvas; color: CanvasText }
  article { border-top: 1px solid #8888; padding: .5rem 0 1rem }
  .pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1.5rem }
  .text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 }
  .prompt { border-left: 3px solid #8888; padding-left: .8rem }
  h3 { font-size: 1rem; margin: .6rem 0 0 }
  .token { border-radius: .2rem; padding: .1rem 0 }
  .token:hover, .token:focus { outline: 2px solid CanvasText }
  .numbers { display: none; position: fixed; left: 0; right: 0; bottom: 0; padding: .6rem 1rem;
             background: CanvasText; color: Canvas }
  .token:hover .numbers, .token:focus .numbers { display: block }
  .token:hover .numbers { z-index: 1 }
  [hidden] { display: none }
  #slider { width: min(40rem, 90%) }
  #slider div { display: flex; justify-content: space-between; gap: 1rem; overflow-wrap: anywhere }
  .shown { font-weight: bold }
  input { width: 100%; margin: 0 }
</style>
</head>
<body>
<h1>The implicit reward, token by token</h1>
<p>The implicit reward of an answer, β log(π / π_ref), is the sum of the shares of its tokens.
<span style="background: $blue">Blue</span> tokens are more likely under the policy than under the
reference, <span style="background: $orange">orange</span> ones less. The largest share, up or down,
is $full and has the full colour; a quarter of it has half. Point at a token, or move to it with the
tab key, to see its numbers.</p>
$slider$sections</body>
</html>
""")

# Without scripts, all checkpoints are shown below each other.
SLIDER = """<div id="slider" hidden><label>checkpoint <input type="range" min="0"></label>
<div>{names}</div></div>
"""
SCRIPT = """<script>
const sections = [...document.querySelectorAll("section")];
const input = document.querySelector("input");
const names = [...document.querySelectorAll("#slider span")];
const show = () => {
  sections.forEach((section, i) => { section.hidden = i !== +input.value; });
  names.forEach((name, i) => { name.classList.toggle("shown", i === +input.value); });
  input.setAttribute("aria-valuetext", names[input.value].textContent);
};
input.max = sections.length - 1;
input.value = input.max;
input.addEventListener("input", show);
document.getElementById("slider").hidden = false;
show();
</script>
"""


def credit_page(shown, reference):
    """An HTML page that needs no other file. shown: (name, beta, views) of each checkpoint, with a
    list of View. reference: its name. All of their texts become text, never markup."""
    full = full_shade([view for _, _, views in shown for view in views])
    sections = ""
    for name, beta, views in shown:
        title = html.escape(f"{printable(name)}, β = {beta:g}, reference {printable(reference)}")
        articles = "\n".join(article(view, full) for view in views)
        sections += f"<section>\n<h2>{title}</h2>\n{articles}\n</section>\n"
    slider = script = ""
    if len(shown) > 1:
        names = "".join(f"<span>{html.escape(printable(name))}</span>" for name, _, _ in shown)
        slider, script = SLIDER.format(names=names), SCRIPT
    return CREDIT_PAGE.substitute(blue=paint(1), orange=paint(-1), full=f"{full:.2f}",
                                  slider=slider, sections=sections + script)


def article(view, full):
    """A View as HTML."""
    columns = ""
    for name, answer in [("chosen", view.chosen), ("rejected", view.rejected)]:
        tokens = "".join(span(token, full) for token in answer)
        columns += (f'<div><h3>{name} {total(answer):+.2f}</h3>\n'
                    f'<p class="text">{tokens}</p></div>\n')
    prompt = html.escape("\n".join(map(printable, view.prompt.split("\n"))))
    margin = total(view.chosen) - total(view.rejected)
    return (f'<article>\n<p class="text prompt">{prompt}</p>\n<div class="pair">\n{columns}</div>\n'
            f"<p>margin {margin:+.2f}</p>\n</article>")


def span(token, full):
    """A Token as HTML: shaded, with its numbers, which are shown if it is pointed at. The blanks
    that it begins with have no shade: at the end of a line, it would be a sliver."""
    numbers = (f"“{token.text}”: log π {token.logp:.2f}, log π_ref {token.ref_logp:.2f}, "
               f"share {token.share:+.2f}")
    word = token.text.lstrip(" ") or token.text
    blanks = token.text[:len(token.text) - len(word)]
    return (f'{blanks}<span class="token" tabindex="0" style="background: '
            f'{paint(strength(token.share, full))}">{html.escape(word)}'
            f'<span class="numbers">{html.escape(numbers)}</span></span>')


def paint(amount):
    """A CSS colour: blue for amounts up to 1, orange down to -1. It is transparent, so letters can
    be read on it on a light page and on a dark one."""
    red_green_blue = "31 127 196" if amount > 0 else "213 94 0"
    return f"rgb({red_green_blue} / {60 * abs(amount):.0f}%)"


# ------------------------------------------------------------------------------------------------
# Compared with the truth, which the reviews task knows clause by clause
# ------------------------------------------------------------------------------------------------


def opinions_of(text):
    """(match of reviews.OPINION, kind, contribution) of each clause of a review that carries an
    opinion. The contribution is its weight times its value, over the weight of all; they sum to
    reviews.reward(text)."""
    opinions = [(opinion, reviews.kind_of(opinion)) for opinion in reviews.OPINION.finditer(text)]
    total = sum(reviews.WEIGHTS[kind] for _, kind in opinions)
    return [(opinion, kind, reviews.WEIGHTS[kind] * reviews.opinion_value(opinion) / total)
            for opinion, kind in opinions]


def clauses_of(prompt, ids, answer, tokenizer):
    """(kind, contribution, share) of each clause that has tokens in an answer; the share is the sum
    over these tokens. prompt, ids: of the answer. answer: the same, as a list of Token."""
    ids, n = [*prompt[1:], *ids], len(prompt) - 1
    ends = [len(tokenizer.decode(ids[:i])) for i in range(len(ids) + 1)]
    found = []
    for opinion, kind, contribution in opinions_of(decode_answer(ids, tokenizer)):
        shares = [token.share for token, start, end in zip(answer, ends[n:], ends[n + 1:])
                  if start < opinion.end() and end > opinion.start()]
        if shares:
            found.append((kind, contribution, sum(shares)))
    return found


def correlation(x, y, cluster):
    """(Pearson's correlation of x and y, its standard error), from numbers that are independent
    only between clusters. x, y: (N,) float64. cluster: (N,) indices.

    With x and y standardised, the correlation r moves by (x y - r (x^2 + y^2) / 2) / N for each
    entry (the delta method). These are added up within each cluster.
    """
    x, y = [(values - values.mean()) / values.std(correction=0) for values in (x, y)]
    r = (x * y).mean()
    moves = x * y - r * (x**2 + y**2) / 2
    per_cluster = moves.new_zeros(int(cluster.max()) + 1).index_add(0, cluster, moves)
    return r.item(), per_cluster.norm().item() / len(x)


def compare_with_truth(items, answers, tokenizer):
    """How what a clause adds to the true reward correlates with the implicit reward of its tokens:
    {kind: (clauses, correlation, standard error)}. answers: those of a list of Encoded, in order,
    as lists of Token. Standard errors are over prompts, as answers to one are not independent."""
    rows, answers = [], iter(answers)
    for i, item in enumerate(items):
        for ids in item.answers:
            rows += [(i, *clause) for clause in clauses_of(item.prompt, ids, next(answers),
                                                           tokenizer)]
    found = {}
    for kind in ["all", *reviews.WEIGHTS]:
        of_kind = [row for row in rows if kind in ("all", row[1])]
        if len(of_kind) > 1:
            prompts = torch.tensor([row[0] for row in of_kind])
            truth = torch.tensor([row[2] for row in of_kind], dtype=torch.float64)
            shares = torch.tensor([row[3] for row in of_kind], dtype=torch.float64)
            found[kind] = len(of_kind), *correlation(truth, shares, prompts)
    return found


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = Parser(__doc__)
    add_task_flags(parser)
    add = parser.add_argument
    add("--checkpoint", type=path_type, action="append", metavar="FILE",
        help="the policy (default dpo.pt of the run); several of them are for --html")
    add("--reference", type=path_type, help="default: sft.pt of the run")
    add("--pairs", type=number_type(int, 1), default=4, help="how many to show (default 4)")
    add("--sort", choices=["file", "margin", "wrong"], default="file",
        help="held-out pairs as they come in the file, by largest margin, or those that the (last) "
             "policy ranks wrongly, worst first; at most one of each prompt (default file)")
    add("--prompt", help="a pair to show instead, with --chosen and --rejected")
    add("--chosen", help="its first answer, which follows the prompt as it is, blanks included")
    add("--rejected", help="its second answer")
    add("--html", type=path_type, metavar="FILE",
        help="write a page instead, which needs no other file")
    add("--truth", action="store_true",
        help="reviews: instead, the correlation of what clauses add to the true reward with the "
             "implicit reward of their tokens, over all held-out answers")
    parser.set_defaults(strict=False)       # rows that teach nothing are counted
    args = parser.parse_args(argv)
    choose_task(args)
    check_credit_flags(args)
    return args


def check_credit_flags(args):
    """Raise UserError for flags that contradict each other or would have no effect."""
    typed = [args.prompt, args.chosen, args.rejected]
    is_typed = typed != [None] * 3
    if is_typed and None in typed:
        raise UserError("--prompt, --chosen and --rejected make one pair: give all three")
    if is_typed and args.sort != "file":
        raise UserError(f"--sort {args.sort} is for held-out pairs, not for a pair typed in")
    if args.truth and args.task != "reviews":
        raise UserError("--truth: only the reviews task knows what a clause is worth")
    if args.truth and (is_typed or args.html or args.sort != "file"):
        raise UserError("--truth is about all held-out answers, and shows no pairs")
    if args.checkpoint and len(args.checkpoint) > 1 and not args.html:
        raise UserError("several --checkpoint are for the slider of --html; give one")
    if args.html and args.html.suffix != ".html":
        raise UserError(f"--html {args.html}: expected a name that ends in .html")


@command
def main(argv=None):
    args = parse_args(argv)
    only_one_process("looking at tokens")
    device = set_up(args)
    paths, reference_path = args.checkpoint or [args.out / "dpo.pt"], args.reference
    reference_path = reference_path or args.out / "sft.pt"
    policies, reference, tokenizer, betas = open_with_reference(paths, reference_path, device, args)
    policy = list(policies.values())[-1]
    reference_name = names_of([*paths, reference_path])[reference_path]
    row_length = reference.config.block_size
    if args.prompt is not None:
        pairs = [typed_pair(args, tokenizer, row_length)]
    else:
        items = held_out_pairs(tokenizer, row_length, args)
        if not items:
            raise UserError(f"{task_of(args).source(args)}: no held-out pair to show")
        if args.truth and policy is reference:
            raise UserError("--truth: a policy that is its own reference has no implicit reward")
        if args.truth:
            print_truth(policy, reference, items, tokenizer)
            return
        pairs = choose_pairs(items, args.pairs, args.sort, policy, reference, row_length)
        if not pairs:
            raise UserError("no held-out pair is ranked wrongly")
    shown = []
    for name, model in policies.items():
        beta = betas.get(name, 1.0)             # without a beta, rewards are in nats
        views = views_of(model, reference, pairs, tokenizer, beta)
        shown.append((name, beta, views))
    if args.html:
        with replacing(args.html) as file:
            file.write(credit_page(shown, reference_name).encode())
        print(f"wrote {args.html}: open it in a browser")
    else:
        print_views(*shown[0], reference_name)


def print_truth(policy, reference, items, tokenizer):
    """Print what compare_with_truth finds. (No correlation depends on beta.)"""
    answers = credit(policy, reference, items, tokenizer, 1.0)
    print(f"\n{len(answers):,} held-out answers to {len(items):,} prompts: correlation of what a "
          "clause adds to the true\nreward with the implicit reward of its tokens, +- standard "
          f"error over prompts\n\n{'clauses':<12}{'number':>8}{'correlation':>18}")
    for kind, (n, r, error) in compare_with_truth(items, answers, tokenizer).items():
        print(f"{kind:<12}{n:>8,}{f'{r:.3f} +-{error:.3f}':>18}")


def print_views(name, beta, views, reference):
    """Print a list of View of one policy for a terminal, or without colour for a file or a pipe."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    width, full = shutil.get_terminal_size((100, 24)).columns, full_shade(views)
    print(f"\n{printable(name)}, beta {beta:g}, reference {printable(reference)}: share of the "
          "implicit reward of each token")
    if colour:
        print(f"{shade(1)}{full:+.2f}{RESET}  {shade(-1)}{-full:+.2f}{RESET}")
    for view in views:
        print("\n" + show(view, full, width, colour))


if __name__ == "__main__":
    main()
