"""How C.1 makes preferences: sample answers from the SFT model and rank them by a reward.

    prompt              The acting was
    four answers        " great. A good film."   " dull. ..."   " great. A good film."   " not bad"
    their rewards           0.47                    -0.60           0.47 (a tie)            ...
    ranking             best first; answers that tie with a better one, and with --gap those that
                        are nearly as good, are left out. K answers make K (K - 1) / 2 pairs

The result is preferences.jsonl in the folder of the run, which is read like a file of your own.
"""

import json
from dataclasses import dataclass

from data import decode_answer, encode_prompt
from runtime.errors import UserError
from runtime.files import cache_key, cached
from tasks.own_file import read_split
from tasks.task import Task


class SampledTask(Task):
    """A task with a ground-truth reward, whose preferences are sampled."""

    has_reward = True

    def reward(self, args):
        """The reward as a function from texts (a prompt with its answer) to numbers, both lists."""
        raise NotImplementedError

    def sampling_prompts(self, tokenizer, args):
        """--prefixes prompts to sample answers for, as texts; one in ten is held out."""
        raise NotImplementedError

    def prompts(self, items, tokenizer, args):
        """At most --eval-prompts new prompts to measure on. Not those of the preferences (items),
        of which there are few."""
        raise NotImplementedError

    def grades(self, args, reference, tokenizer):
        return {"reward": self.reward(args)}

    def digest(self, args):
        """A digest of what the rewards depend on."""
        raise NotImplementedError

    def check(self, args):
        self.reward(args)

    def source(self, args):
        return args.out / "preferences.jsonl"

    def preferences(self, args):
        return read_split(self.source(args), args)

    def sample_preferences(self, model, tokenizer, sample_answers, args):
        """Write preferences.jsonl, unless it is already there for this model and these flags.
        sample_answers: the function of sample.py, which comes later in the order of imports."""
        key = cache_key(model, model.device.type, model.precision, self.digest(args), args.seed,
                        args.prefixes, args.samples, args.max_new_tokens, args.gap)
        cached(self.source(args), key,
               lambda: ranked_samples(self, model, tokenizer, sample_answers, args))


@dataclass(eq=False)
class Answer:
    """A sampled answer: its text, its reward, and whether it reached end-of-text."""

    text: str
    reward: float
    ended: bool


def ranked_samples(task, model, tokenizer, sample_answers, args):
    """The content of preferences.jsonl: one JSON object per prompt."""
    prompts = task.sampling_prompts(tokenizer, args)
    sampled = answers_to(prompts, task, model, tokenizer, sample_answers, args)
    rows, n_unusable, n_ties = [], 0, 0
    for prompt, answers in zip(prompts, sampled):
        usable = [answer for answer in answers
                  if answer.text.strip() and (answer.ended or not task.answers_must_end)]
        kept = separate(usable, args.gap)
        row = rank_answers(prompt, [answer.text for answer in kept],
                           [answer.reward for answer in kept])
        n_unusable += len(answers) - len(usable)
        n_ties += len(usable) - (len(row["answers"]) if row else 0)
        if row:
            rows.append(row | unfinished_of(row, kept))
    if not rows:
        raise UserError("no prompt got two usable answers of different reward: train SFT for "
                        "longer, lower --gap, or raise --max-new-tokens")
    print(f"{len(rows):,} of {len(prompts):,} prompts have answers of different rewards; left out: "
          f"{n_unusable:,} empty\nor unfinished answers, {n_ties:,} that tie with a better one"
          + (f" (within --gap {args.gap:g})" if args.gap else ""))
    return "".join(json.dumps(row) + "\n" for row in rows)


def answers_to(prompts, task, model, tokenizer, sample_answers, args):
    """--samples sampled answers to each of a list of prompts (texts): a list of lists of Answer."""
    repeated = [prompt for prompt in prompts for _ in range(args.samples)]
    sampled = sample_answers(model, [encode_prompt(prompt, tokenizer) for prompt in repeated],
                             args.max_new_tokens, args.seed, tokenizer.eot_token,
                             progress="sampling answers")
    texts = [decode_answer(ids, tokenizer) for ids in sampled]
    rewards = task.reward(args)([prompt + text for prompt, text in zip(repeated, texts)])
    answers = [Answer(text, reward, ids[-1] == tokenizer.eot_token)
               for text, reward, ids in zip(texts, rewards, sampled)]
    return [answers[i:i + args.samples] for i in range(0, len(answers), args.samples)]


def unfinished_of(row, answers):
    """The entry "unfinished" of a row, which ranks some of a list of Answer: the indices of those
    that did not reach end-of-text. No entry if all did."""
    cut = {answer.text for answer in answers if not answer.ended}
    unfinished = [i for i, text in enumerate(row["answers"]) if text in cut]
    return {"unfinished": unfinished} if unfinished else {}


def separate(answers, gap):
    """Those of a list of Answer whose rewards differ by at least `gap`: the one with the highest
    reward, then the next one whose reward is lower by at least `gap`, and so on. Nearly equal
    rewards say little about which answer is better."""
    kept = []
    for answer in sorted(answers, key=lambda answer: -answer.reward):
        if not kept or kept[-1].reward - answer.reward >= gap:
            kept.append(answer)
    return [answer for answer in answers if answer in kept]


def rank_answers(prompt, answers, rewards):
    """C.1: rank sampled answers by their rewards, best first. Returns a row for a preferences file,
    a dict: "prompt"; "answers" and "rewards", lists in the order given; and "ranking", a list of
    indices into them, best first.

    If several answers have the same reward, the first is kept and the others are left out of all
    three lists. Returns None if fewer than two answers are left. K answers make K (K - 1) / 2 pairs
    (six for C.1's four) unless some of them tie.
    """
    first = {}
    for answer, reward in zip(answers, rewards):
        first.setdefault(reward, answer)
    if len(first) < 2:
        return None
    distinct = list(first)
    return {"prompt": prompt, "answers": [first[reward] for reward in distinct],
            "ranking": sorted(range(len(distinct)), key=lambda i: -distinct[i]),
            "rewards": distinct}
