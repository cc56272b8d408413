"""Measures and samples as text for the terminal."""

import textwrap
from collections import Counter


def table(measures, width=100):
    """{name: {measure: value}} as text, a row for each name: mean +- standard error, or the 95 %
    interval for a win rate. As many columns side by side as fit in the width. `finished` is left
    out: a sixth column would not fit in 100, and it is in the JSON file."""
    columns = list(dict.fromkeys(measure for values in measures.values() for measure in values
                                 if not measure.endswith(("_se", "_95", "finished"))))
    first = max(6, *(len(name) + 1 for name in measures))
    abreast = max(1, (width - first) // 18)
    blocks = []
    for start in range(0, len(columns), abreast):
        shown = columns[start:start + abreast]
        lines = [" " * first + "".join(f"{measure:>18}" for measure in shown)]
        for name, values in measures.items():
            cells = "".join(f"{cell(values, measure):>18}" for measure in shown)
            lines.append(name.ljust(first) + cells)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def cell(values, measure):
    if measure not in values:
        return "-"
    if f"{measure}_95" in values:
        return "{:.3f} {:.3f}-{:.3f}".format(values[measure], *values[f"{measure}_95"])
    if f"{measure}_se" in values:
        return f"{values[measure]:.3f} +-{values[f'{measure}_se']:.3f}"
    return f"{values[measure]:.3f}"


def side_by_side(prompts, texts, reward=None):
    """The answers of each policy ({name: texts}) under their prompts, as text. reward: a function
    from texts to rewards, both lists, to show them."""
    lines = []
    rewards = {name: reward([prompt + answer for prompt, answer in zip(prompts, answers)])
               for name, answers in texts.items() if reward}
    for i, prompt in enumerate(prompts):
        shown = prompt if len(prompt) <= 300 else "... " + prompt[-300:]    # the end of a dialogue
        lines.append(f"\nprompt  {shown!r}")
        for name, answers in texts.items():
            grade = f"{rewards[name][i]:+.2f}  " if reward else ""
            text = f"{grade}...{answers[i]}".replace("\n", "\\n")
            lines.append(textwrap.fill(text, 100, initial_indent=f"{name:<7} ",
                                       subsequent_indent=" " * 8))
    return "\n".join(lines)


def names_of(paths):
    """{path: name} of checkpoints: the stem, or the whole path if two files have the same stem."""
    files = {}
    for path in paths:
        files.setdefault(path.resolve(), path)
    stems = Counter(path.stem for path in files.values())
    names = {resolved: path.stem if stems[path.stem] == 1 else str(path)
             for resolved, path in files.items()}
    return {path: names[path.resolve()] for path in paths}


def final_report(prompts, texts, measures, reward=None, note=""):
    """What a measurement prints: the answers to the first four prompts, not picked, and the table.
    reward: as in side_by_side. note: a line about the measures."""
    line = f"{len(prompts):,} held-out prompts, one sample each, mean +- standard error"
    return f"{side_by_side(prompts[:4], texts, reward)}\n\n{line}{note}\n{table(measures)}"
