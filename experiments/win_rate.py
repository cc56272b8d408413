"""Which of two policies do people, or a model, prefer? The judges of C.2 and D.3.

    python -m experiments.win_rate --ask judge.jsonl --task hh     # for a model: C.2's prompts
    python -m experiments.win_rate --ask study.html --task hh      # for people: D.3's form
    python -m experiments.win_rate --read judge.key.json answers.jsonl rater_1.json rater_2.json

--ask samples an answer of each of two checkpoints to held-out prompts and writes the questions.
Which of the two is A is drawn at random for each question and kept apart, in judge.key.json: the
file of questions does not tell, neither a model nor a person. A name in .jsonl gives one request a
line in the common chat-batch form, {"custom_id", "method", "url", "body": {"model", "messages"}};
one in .html a page that needs no other file: open it, or send it to raters; it lets them download
their answers as JSON.

--read takes the key and any number of files of answers: replies to a batch, one a line with its
custom_id and the reply as response.body.choices[0].message.content, or what raters downloaded. It
reports

    win rate        of the first checkpoint, with Wilson's 95 % interval; "I can't tell" is left
                    out, as in D.3, and counted
    order bias      how often A was chosen: a half, if where an answer stands does not matter
    unparsable      replies whose last line is not the verdict asked for, to the letter
    agreement       of two judges on the questions that both decided: raters among each other, and
                    each with the model

Left out on purpose: sending anything anywhere. What is asked, and of whom, is yours to decide.
"""

import html
import itertools
import json
import random
import re
import zlib
from collections import Counter
from pathlib import Path

from runtime.cli import Parser, add_shared_flags, choose_task, command, number_type, set_up
from runtime.errors import UserError
from sample import decode_answer, encode_prompt, held_out_pairs, open_policies, sample, wilson
from tasks import task_of

# C.2, word for word but for the typesetting: {prompt}, {A} and {B} are filled in.
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
    """(questions, order) of two policies' answers ({name: texts}) to prompts: questions are what a
    judge sees, {id: {"prompt", "A", "B"}}, order is {id: {"A": name, "B": name}}. The ids begin
    with a checksum of all that is asked, so that answers to other questions are noticed."""
    rng, (first, second) = random.Random(f"order {seed}"), texts
    study = zlib.crc32(json.dumps([prompts, texts, seed]).encode())
    questions, order = {}, {}
    for i, prompt in enumerate(prompts):
        names = [first, second] if rng.random() < 0.5 else [second, first]
        name = f"{study:08x}-{i + 1}"
        order[name] = dict(zip("AB", names))
        questions[name] = {"prompt": prompt,
                           **{letter: texts[who][i] for letter, who in order[name].items()}}
    return questions, order


def requests(questions, form, model):
    """The questions as lines of a chat batch. Text of policies is filled in once: braces in it, or
    a policy that writes "{B}", change nothing."""
    for name, question in questions.items():
        content = re.sub(r"\{(prompt|A|B)\}", lambda found: question[found[1]].strip(), FORMS[form])
        yield json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions",
                          "body": {"model": model,
                                   "messages": [{"role": "user", "content": content}]}}) + "\n"


def page(questions, form):
    """The questions as an HTML page that needs no other file."""
    question = FORMS[form].split("\n\n")[0]
    what = "summaries" if form.startswith("summary") else "responses"
    # "<" as \u003c: no text of a policy can end the script or begin a tag.
    data = json.dumps(questions).replace("<", "\\u003c")
    return (PAGE.replace("QUESTION", html.escape(question)).replace("WHAT", what)
            .replace("DATA", data))


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
  const file = new Blob([JSON.stringify({rater, answers}, null, 1)],
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
    """Sample both checkpoints, and write the questions and their key."""
    device = set_up(args)
    paths = args.between or [args.out / "dpo.pt", args.out / "sft.pt"]
    policies, tokenizer, _ = open_policies(paths, device, args)
    if len(policies) != 2:
        raise UserError("--between needs two different checkpoints")
    row_length = min(model.config.block_size for model in policies.values())
    task = task_of(args)
    items = [] if task.reward else held_out_pairs(tokenizer, row_length, args)
    prompts = task.prompts(items, tokenizer, args)
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    texts = {}
    for i, (name, model) in enumerate(policies.items(), 1):     # one seed would make them alike
        answers = sample(model, encoded, args.max_new_tokens, args.seed + i, tokenizer.eot_token,
                         args.temperature, progress=f"sampling {name}")
        texts[name] = [decode_answer(ids, tokenizer) for ids in answers]
    questions, order = draw_order(prompts, texts, args.seed)
    args.ask.write_text(page(questions, args.form) if args.ask.suffix == ".html" else
                        "".join(requests(questions, args.form, args.judge_model)),
                        encoding="utf-8")
    key = args.ask.with_suffix(".key.json")
    key.write_text(json.dumps({"form": args.form, "policies": list(texts), "order": order},
                              indent=1) + "\n")
    print(f"wrote {len(questions)} questions to {args.ask}, and to {key} which answer is whose: "
          "keep it from the judges")


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------


def verdict(reply, form):
    """"A" or "B", if the last line of a reply is the verdict in the format asked for, and no other
    line claims to be one; else None."""
    label = FORMS[form].splitlines()[-1].split(":")[0]
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    found = re.fullmatch(rf'{label}: (?:([AB])|"([AB])")', lines[-1] if lines else "")
    alone = sum(line.startswith(f"{label}:") for line in lines) == 1
    return (found[1] or found[2]) if found and alone else None


def read_answers(path, key):
    """("raters" or "model", {question: "A", "B", "tie" or None}) of a file of answers; None is an
    answer that cannot be read. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    try:
        kind, answers = "raters", dict(json.loads(text)["answers"])
    except (ValueError, KeyError, TypeError):
        kind, answers = "model", {}
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                name, answer = read_reply(line, key["form"], f"{path}, line {number}")
                if name in answers:
                    raise UserError(f"{path}, line {number}: a second answer to {name}")
                answers[name] = answer
    strange = [name for name in answers if name not in key["order"]]
    if strange or not answers:
        raise UserError(f"{path}: answers to other questions than those of the key" if strange
                        else f"{path}: no answer is in it")
    if kind == "raters":
        answers = {name: answer if answer in ("A", "B", "tie") else None
                   for name, answer in answers.items()}
    return kind, answers


def read_reply(line, form, where):
    """(question, verdict) of a line of replies to a chat batch."""
    try:
        row = json.loads(line)
        name = row["custom_id"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: neither a reply with a custom_id nor what a rater downloaded") \
            from error
    try:
        return name, verdict(row["response"]["body"]["choices"][0]["message"]["content"], form)
    except (KeyError, IndexError, TypeError, AttributeError):
        return name, None               # a request that failed has no reply


def report(files, key):
    """Text: what read_answers found in files, a list of (kind, answers), and how far they agree."""
    first, second = key["policies"]
    lines = []
    for kind in ("raters", "model"):
        answers = [pair for of, mine in files if of == kind for pair in mine.items()]
        if not answers:
            continue
        decided = [(name, letter) for name, letter in answers if letter in ("A", "B")]
        counts = Counter(letter for _, letter in answers)
        n_files = sum(of == kind for of, _ in files)
        lines += ["", f"{kind}: {n_files} file{'s' * (n_files > 1)}, {len(answers)} answers"]
        won = sum(key["order"][name][letter] == first for name, letter in decided)
        lines += [share(f"win rate of {first} over {second}", won, len(decided)),
                  share("order bias: A was chosen", counts["A"], len(decided)),
                  share("can't tell", counts["tie"], len(answers)),
                  share("unparsable", counts[None], len(answers))]
    for what, kinds in [("raters among each other", ["raters", "raters"]),
                        ("raters with the model", ["model", "raters"])]:
        same = [mine[name] == theirs[name]
                for (kind, mine), (other, theirs) in itertools.combinations(files, 2)
                if sorted([kind, other]) == kinds
                for name in mine if {mine[name], theirs.get(name)} <= {"A", "B"}]
        if same:
            lines += [""] * (what[-1] == "r") + [share(f"agreement, {what}", sum(same), len(same))]
    return "\n".join(lines[1:])


def share(what, count, n):
    """A line of the report: count of n as a share with its 95 % interval."""
    if not n:
        return f"  {what:<40} none to count"
    low, high = wilson(count, n)
    return f"  {what:<40} {count / n:.3f}  {low:.3f}-{high:.3f}  {count} of {n}"


def parse_args(argv):
    parser = Parser(__doc__)
    add_shared_flags(parser)
    add = parser.add_argument
    add("--ask", type=Path, metavar="FILE", help="write questions: .jsonl for a model, .html for "
        "people")
    add("--read", type=Path, nargs="+", metavar="FILE",
        help="the key that --ask wrote, then files of answers")
    add("--between", type=Path, nargs=2, metavar="FILE",
        help="the two checkpoints (default dpo.pt and sft.pt of the run)")
    add("--form", choices=FORMS,
        help="C.2's question: dialogue, or summaries without (s) or with (c) a word on concision "
             "(default summary_c for --task tldr, else dialogue)")
    add("--questions", type=number_type(int, 1), default=25, dest="eval_prompts",
        help="held-out prompts to ask about (default 25, as many as D.3 gives a rater)")
    add("--max-new-tokens", type=number_type(int, 1), default=96, help="longest answer (default 96)")
    add("--temperature", type=number_type(float, 0), default=1.0,
        help="of the answers (default 1; the paper's summaries are sampled at 0.25)")
    add("--judge-model", default="gpt-4-0314",
        help="the name that requests carry (default gpt-4-0314, the paper's)")
    parser.set_defaults(strict=False)       # data that cannot teach is counted, not an error
    args = parser.parse_args(argv)
    choose_task(args)
    if bool(args.ask) == bool(args.read):
        raise UserError("choose: --ask FILE writes questions, --read KEY FILE... reads answers")
    if args.ask and args.ask.suffix not in (".jsonl", ".html"):
        raise UserError(f"--ask {args.ask}: a name in .jsonl for a model or in .html for people")
    if args.read and len(args.read) < 2:
        raise UserError("--read needs the key that --ask wrote, and then at least one file of "
                        "answers")
    args.form = args.form or ("summary_c" if args.task == "tldr" else "dialogue")
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    if args.ask:
        ask(args)
        return
    path, *files = args.read
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        form, (_, _), order = key["form"], key["policies"], key["order"]
        known = form in FORMS and all(set(letters) == {"A", "B"} for letters in order.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a key that --ask wrote; it goes first") from error
    if not known:
        raise UserError(f"{path}: not a key that --ask wrote; it goes first")
    print(report([read_answers(file, key) for file in files], key))


if __name__ == "__main__":
    main()
