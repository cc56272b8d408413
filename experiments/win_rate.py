"""Win rates of one policy over another, judged by a model (C.2) or by people (D.3).

    python -m experiments.win_rate --ask judge.jsonl --task hh     # for a model: C.2's prompts
    python -m experiments.win_rate --ask study.html --task hh      # for people: D.3's form
    python -m experiments.win_rate --read judge.jsonl.key.json answers.jsonl rater_1.json

--ask samples one answer from each of two checkpoints to held-out prompts and writes the questions.
Which of the two answers is called A is drawn at random for each question. Only the key,
judge.jsonl.key.json, records it, so neither a model nor a person can tell from the questions. The
extension of the file decides its format:

    .jsonl    one request per line in the common chat-batch form,
              {"custom_id", "method", "url", "body": {"model", "messages"}}
    .html     a page that needs no other file: open it, or send it to raters, who download their
              answers as JSON

--read takes the key and any number of files of answers: replies to a batch, one per line, each with
its custom_id and the text as response.body.choices[0].message.content; or files that raters
downloaded, of which the latest of each rater counts. The report shows

    win rate        of the first checkpoint; "I can't tell" is left out, as in D.3, and counted
                    separately
    order bias      how often A was chosen: half of the time, if the order does not matter
    unparsable      replies whose last line is not exactly the verdict that was asked for
    agreement       of two judges on the questions that both decided: between raters, and of the
                    raters with the model

Each share is first taken among the answers to one question, then averaged over the questions. Its
95 % interval (runtime.statistics.wilson) is over questions too: more raters make it no narrower
than the questions allow, and it says nothing about what other raters would answer.

Left out on purpose: sending anything anywhere. What to ask, and whom, is up to you.
"""

import html
import itertools
import json
import random
import re
import statistics
import zlib
from collections import namedtuple
from pathlib import Path

from data import decode_answer, encode_prompt
from runtime.cli import Parser, command, number_type, path_type, set_up
from runtime.errors import UserError
from runtime.files import replacing, write_json
from runtime.statistics import wilson
from sample import sample_answers
from tasks import held_out_pairs, held_out_prompts, task_of
from tasks.checkpoint import open_policies
from tasks.flags import add_task_flags, choose_task

# The prompts of C.2, word for word except for typesetting. `requests` fills in {prompt}, {A}, {B}.
SUMMARY = """\
Which of the following summaries does a better job of summarizing the most \
important points in the given forum post{criterion}

Post:
{{prompt}}

Summary A:
{{A}}

Summary B:
{{B}}

FIRST provide a one-sentence comparison of the two summaries, explaining which \
you prefer and why. SECOND, on a new line, state only "A" or "B" to indicate your \
choice. Your response should use the format:
Comparison: <one-sentence comparison and explanation>
Preferred: <"A" or "B">"""
DIALOGUE = """\
For the following query to a chatbot, which response is more helpful?

Query: {prompt}

Response A:
{A}

Response B:
{B}

FIRST provide a one-sentence comparison of the two responses and explain \
which you feel is more helpful. SECOND, on a new line, state only "A" or \
"B" to indicate which response is more helpful. Your response should use \
the format:
Comparison: <one-sentence comparison and explanation>
More helpful: <"A" or "B">"""
FORMS = {"dialogue": DIALOGUE, "summary_s": SUMMARY.format(criterion="?"),
         "summary_c": SUMMARY.format(criterion=", without including unimportant or irrelevant "
                                               "details? A good summary is both precise and "
                                               "concise.")}


# ------------------------------------------------------------------------------------------------
# Asking
# ------------------------------------------------------------------------------------------------


def draw_order(prompts, texts, seed):
    """Turn two policies' answers to prompts, {name: texts}, into questions in random order.

    Returns (questions, order): what a judge sees, {id: {"prompt", "A", "B"}}, and whose answers
    these are, {id: {"A": name, "B": name}}. Each id begins with a checksum of everything that is
    asked, so that answers to other questions are noticed.
    """
    first, second = texts
    rng = random.Random(f"order {seed}")
    study = zlib.crc32(json.dumps([prompts, texts, seed]).encode())
    questions, order = {}, {}
    for i, prompt in enumerate(prompts):
        a, b = first, second
        if rng.random() >= 0.5:
            a, b = second, first
        question_id = f"{study:08x}-{i + 1}"
        order[question_id] = {"A": a, "B": b}
        questions[question_id] = {"prompt": prompt, "A": texts[a][i], "B": texts[b][i]}
    return questions, order


def requests(questions, form, model):
    """Yield the questions as lines of a chat batch.

    All of a form is filled in at once, so braces in a text change nothing, even if a policy writes
    "{B}".
    """
    for question_id, question in questions.items():
        content = re.sub(r"\{(prompt|A|B)\}", lambda match: question[match[1]].strip(), FORMS[form])
        body = {"model": model, "messages": [{"role": "user", "content": content}]}
        request = {"custom_id": question_id, "method": "POST", "url": "/v1/chat/completions",
                   "body": body}
        yield json.dumps(request) + "\n"


def page(questions, form):
    """The questions as an HTML page that needs no other file."""
    question = FORMS[form].split("\n\n")[0]
    noun = "summaries" if form.startswith("summary") else "responses"
    # "<" is written as \u003c, so that no text of a policy can end the script or begin a tag.
    data = json.dumps(questions).replace("<", "\\u003c")
    text = PAGE.replace("QUESTION", html.escape(question))
    text = text.replace("WHAT", noun)
    return text.replace("DATA", data)


PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which is better?</title>
<style>
  :root { color-scheme: light dark }
  body { font: 1rem/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto;
         padding: 0 1rem }
  fieldset { margin: 2.5rem 0; border: 1px solid #8888; border-radius: .5rem; padding: 0 1.2rem }
  legend { font-weight: bold; padding: 0 .4rem }
  .text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0 1rem }
  .prompt { border-left: 3px solid #8888; padding-left: .8rem }
  label { display: block; margin: .6rem 0; padding: .4rem .6rem; border: 1px solid #8886;
          border-radius: .4rem; cursor: pointer }
  label:has(:checked) { outline: 2px solid Highlight }
  button { font: inherit; padding: .4rem 1rem }
</style>
<h1>Which is better?</h1>
<p>QUESTION Some WHAT may be very similar; please do your best to compare them and use "I can't
tell" only rarely, if at all. When you are done, download your answers and send back the file.</p>
<form id="form"></form>
<footer><button id="download" type="button">Download my answers</button>
<span id="left" role="status"></span></footer>
<script id="data" type="application/json">DATA</script>
<script>
const questions = JSON.parse(document.getElementById("data").textContent);
const answers = {}, rater = Math.random().toString(36).slice(2, 10);
const names = Object.keys(questions);
let saved = true;

function element(parent, tag, text, attributes = {}) {
  const made = parent.appendChild(document.createElement(tag));
  made.textContent = text;            // text, never markup: whatever a policy wrote is shown
  return Object.assign(made, attributes);
}
function count() {
  const left = names.length - Object.keys(answers).length;
  document.getElementById("left").textContent =
    left ? `${left} of ${names.length} not answered yet` : "all answered, thank you";
}
names.forEach((name, i) => {
  const {prompt, A, B} = questions[name];
  const box = element(document.getElementById("form"), "fieldset", "");
  element(box, "legend", `${i + 1} of ${names.length}`);
  element(box, "div", prompt, {className: "text prompt"});
  for (const [value, title, text] of
       [["A", "A", A], ["B", "B", B], ["tie", "I can't tell", ""]]) {
    const label = element(box, "label", "");
    const input = element(label, "input", "", {type: "radio", name, value});
    element(label, "b", ` ${title}`);
    if (text) element(label, "div", text, {className: "text"});
    input.addEventListener("change", () => { answers[name] = value; saved = false; count(); });
  }
});
count();
document.getElementById("download").addEventListener("click", () => {
  const file = new Blob([JSON.stringify({rater, downloaded: new Date().toISOString(), answers},
                                        null, 1)],
                        {type: "application/json"});
  element(document.body, "a", "",
          {href: URL.createObjectURL(file), download: `answers_${rater}.json`}).click();
  saved = true;
});
addEventListener("beforeunload", event => { if (!saved) event.preventDefault(); });
</script>
</html>
"""


def ask(args):
    """Sample answers of both checkpoints, and write the questions and their key."""
    device = set_up(args)
    paths = args.between or [args.out / "dpo.pt", args.out / "sft.pt"]
    policies, tokenizer, _ = open_policies(paths, device, args)
    if len(policies) != 2:
        raise UserError("--between needs two different checkpoints")
    row_length = min(model.config.block_size for model in policies.values())
    items = [] if task_of(args).has_reward else held_out_pairs(tokenizer, row_length, args)
    prompts = held_out_prompts(items, tokenizer, args)
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    texts = {}
    for i, (name, model) in enumerate(policies.items(), 1):
        # With one seed for both, similar policies would sample similar answers.
        answers = sample_answers(model, encoded, args.max_new_tokens, args.seed + i,
                                 tokenizer.eot_token, args.temperature,
                                 progress=f"sampling {name}")
        texts[name] = [decode_answer(ids, tokenizer) for ids in answers]
    questions, order = draw_order(prompts, texts, args.seed)
    if args.ask.suffix == ".html":
        content = page(questions, args.form)
    else:
        content = "".join(requests(questions, args.form, args.judge_model))
    key_path = Path(f"{args.ask}.key.json")
    write_json(key_path, {"form": args.form, "policies": list(texts), "order": order})
    with replacing(args.ask) as file:
        file.write(content.encode())
    print(f"wrote {len(questions)} questions to {args.ask}, and to {key_path} which answer is "
          "whose; keep it from the judges")


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------


def read_verdict(reply, form):
    """"A" or "B", if the last line of a reply is the verdict in exactly the format asked for and no
    other line begins like a verdict; otherwise None."""
    label = FORMS[form].splitlines()[-1].split(":")[0]      # "More helpful" or "Preferred"
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    verdict_lines = [line for line in lines if line.startswith(f"{label}:")]
    if len(verdict_lines) != 1:
        return None
    match = re.fullmatch(rf'{label}: (?:([AB])|"([AB])")', lines[-1])
    if match is None:
        return None
    return match[1] or match[2]


def read_key(path):
    """Read the key that --ask wrote. Returns a dict with form, policies and order. Raises
    UserError."""
    refusal = f"{path}: not a key that --ask wrote; the key comes first"
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        form, order = key["form"], key["order"]
        _, _ = key["policies"]          # there must be two
        valid = form in FORMS and all(
            set(names) == {"A", "B"} and set(names.values()) == set(key["policies"])
            for names in order.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(refusal) from error
    if not valid:
        raise UserError(refusal)
    return key


# A file of answers. kind: "raters" or "model". judge: the id of a rater, or else the path. time: of
# the download, as text that sorts; "" if unknown. answers: {question: "A", "B", "tie", or None if
# it cannot be parsed}.
Answers = namedtuple("Answers", "path kind judge time answers")


def read_answers(path, key):
    """Read a file of answers. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    kind, judge, time = "raters", str(path), ""
    try:
        content = json.loads(text)
        answers = dict(content["answers"])
        judge = str(content.get("rater") or path)
        time = str(content.get("downloaded", ""))
    except (ValueError, KeyError, TypeError, RecursionError):
        kind, answers = "model", read_replies(text, key["form"], path)
    if not answers:
        raise UserError(f"{path}: it has no answers")
    if any(question not in key["order"] for question in answers):
        raise UserError(f"{path}: it answers other questions than those of the key")
    if kind == "raters":
        for question, answer in answers.items():
            if answer not in ("A", "B", "tie"):
                answers[question] = None
    return Answers(path, kind, judge, time, answers)


def latest_of_each(files):
    """The latest of each judge's files, a list of Answers. Prints which are left out. Of files
    without a time, the one that was named last is the latest."""
    latest = {}
    for file in sorted(files, key=lambda file: file.time):
        if file.judge in latest:
            print(f"{latest[file.judge].path}: left out, because {file.path} is a later download "
                  "of the same rater")
        latest[file.judge] = file
    return list(latest.values())


def read_replies(text, form, path):
    """{question: verdict} of the replies to a chat batch, one per line. path: for messages."""
    answers = {}
    for i, line in enumerate(text.split("\n"), 1):     # JSON strings may hold U+2028
        if not line.strip():
            continue
        where = f"{path}, line {i}"
        question, answer = read_reply(line, form, where)
        if question in answers:
            raise UserError(f"{where}: a second answer to {question}")
        answers[question] = answer
    return answers


def read_reply(line, form, where):
    """(question, verdict) of one line of replies to a chat batch."""
    try:
        row = json.loads(line)
        question = row["custom_id"]
        if not isinstance(question, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: neither a reply with a custom_id nor a file that a rater "
                        "downloaded") from error
    try:
        reply = row["response"]["body"]["choices"][0]["message"]["content"]
        return question, read_verdict(reply, form)
    except (KeyError, IndexError, TypeError, AttributeError):
        return question, None           # a request that failed has no reply


# ------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------


def report_verdicts(files, key):
    """The report as text. files: a list of Answers."""
    lines = []
    for kind in ("raters", "model"):
        files_of_kind = [file.answers for file in files if file.kind == kind]
        if files_of_kind:
            lines += ["", *report_kind(kind, files_of_kind, key)]
    between_raters = agreements(files, ["raters", "raters"])
    if between_raters:
        lines += ["", share("agreement between raters", between_raters)]
    with_model = agreements(files, ["model", "raters"])
    if with_model:
        lines += [share("agreement of raters with the model", with_model)]
    return "\n".join(lines[1:])


def report_kind(kind, files, key):
    """The lines of the report on the raters or on the model. files: {question: answer} of each."""
    first, second = key["policies"]
    answers = [pair for file in files for pair in file.items()]
    decided = [(question, answer) for question, answer in answers if answer in ("A", "B")]
    plural = "s" if len(files) > 1 else ""
    return [f"{kind}: {len(files)} file{plural}, {len(answers)} answers",
            share(f"win rate of {first} over {second}",
                  [(question, key["order"][question][answer] == first)
                   for question, answer in decided]),
            share("order bias: A was chosen",
                  [(question, answer == "A") for question, answer in decided]),
            share("can't tell", [(question, answer == "tie") for question, answer in answers]),
            share("unparsable", [(question, answer is None) for question, answer in answers])]


def agreements(files, kinds):
    """(question, whether two judges gave the same answer) for each two files of these kinds
    (sorted) and each question that both decided."""
    same = []
    for file, other in itertools.combinations(files, 2):
        if sorted([file.kind, other.kind]) != kinds:
            continue
        for question, answer in file.answers.items():
            other_answer = other.answers.get(question)
            if answer in ("A", "B") and other_answer in ("A", "B"):
                same.append((question, answer == other_answer))
    return same


def share(label, judged):
    """A line of the report: the mean share over questions, with its 95 % interval.

    judged: (question, whether it counts) for each answer. Answers to one question are not
    independent, so they are averaged first.
    """
    if not judged:
        return f"  {label:<40} none to count"
    by_question = {}
    for question, counts in judged:
        by_question.setdefault(question, []).append(counts)
    shares = [statistics.fmean(counts) for counts in by_question.values()]
    low, high = wilson(shares)
    return (f"  {label:<40} {statistics.fmean(shares):.3f}  {low:.3f}-{high:.3f}  "
            f"{sum(counts for _, counts in judged)} of {len(judged)}, {len(shares)} questions")


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = Parser(__doc__)
    add_task_flags(parser)
    add = parser.add_argument
    add("--ask", type=path_type, metavar="FILE",
        help="write questions: a name in .jsonl for a model, in .html for people")
    add("--read", type=path_type, nargs="+", metavar="FILE",
        help="read the key that --ask wrote, then files of answers, and report")
    add("--between", type=path_type, nargs=2, metavar="FILE",
        help="the two checkpoints (default: dpo.pt and sft.pt of the run)")
    add("--form", choices=FORMS,
        help="C.2's question: about dialogue, or about summaries without (summary_s) or with "
             "(summary_c) a request for conciseness (default: summary_c for --task tldr, else "
             "dialogue)")
    add("--questions", type=number_type(int, 2), default=25, dest="eval_prompts",
        help="held-out prompts to ask about (default 25, the number each rater gets in D.3)")
    add("--max-new-tokens", type=number_type(int, 1), default=96,
        help="longest sampled answer (default 96)")
    add("--temperature", type=number_type(float, 0), default=1.0,
        help="sampling temperature (default 1; the paper samples its summaries at 0.25)")
    add("--judge-model", default="gpt-4-0314",
        help="the model that the requests name (default gpt-4-0314, the paper's)")
    parser.set_defaults(strict=False)       # rows that teach nothing are counted
    args = parser.parse_args(argv)
    choose_task(args)
    if bool(args.ask) == bool(args.read):
        raise UserError("choose: --ask FILE writes questions, --read KEY FILE... reads answers")
    if args.ask and args.ask.suffix not in (".jsonl", ".html"):
        raise UserError(f"--ask {args.ask}: the name must end in .jsonl (for a model) or .html "
                        "(for people)")
    if args.read and len(args.read) < 2:
        raise UserError("--read needs the key that --ask wrote and at least one file of answers")
    if args.form is None:
        args.form = "summary_c" if args.task == "tldr" else "dialogue"
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    if args.ask:
        ask(args)
        return
    key_path, *paths = args.read
    key = read_key(key_path)
    files = [read_answers(path, key) for path in paths]
    print(report_verdicts(latest_of_each(files), key))


if __name__ == "__main__":
    main()
