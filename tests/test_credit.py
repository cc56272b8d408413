"""experiments.credit and experiments.squeezing: where the implicit reward sits, and where the
probability goes.

    pytest tests/test_credit.py
"""

import importlib.util
import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import given, settings, strategies as st

from data import Encoded, Preference, encode, is_held_out, pack
from experiments import credit, squeezing
from experiments.credit import Token, View
from model import GPT, GPTConfig
from tasks import reviews
from tasks.checkpoint import save_checkpoint
from tasks.tokenizers import get_tokenizer
from train_dpo import implicit_reward, log_partition, optimal_policy

ROOT = Path(__file__).parent.parent
TOKENIZER = get_tokenizer("reviews")
for_all = settings(deadline=None, max_examples=50, derandomize=True)
ANSI = re.compile(r"\033\[[0-9;]*m")
NASTY = ["<script>alert(1)</script>", "</span></p>", "\x1b[31mred", "a\nb\t\r", "\u202egnirts",
         "&lt;b&gt;", "\"quoted' \x00", "é 語 \U0001f600", "$full ${x} $$"]


def small_model(seed):
    torch.manual_seed(seed)
    return GPT(GPTConfig(64, TOKENIZER.n_vocab, 1, 2, 16), 0.3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with three small checkpoints, of which two have a beta, and preferences."""
    out = tmp_path_factory.mktemp("run")
    for seed, (name, facts) in enumerate([("sft", {}), ("early", {"beta": 0.5}),
                                          ("dpo", {"beta": 0.5})]):
        save_checkpoint(out / f"{name}.pt", small_model(seed), tokenizer="reviews",
                        source="reviews", **facts)
    answers = [" was dull.", " was good.", " <b>&amp; \x1b[2J"]
    rows = [{"prompt": f"We saw it {i}. The plot", "answers": answers, "ranking": [1, 0, 2]}
            for i in range(60)]
    (out / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def encoded(*preferences):
    return [encode(Preference(*preference), TOKENIZER, 64) for preference in preferences]


# ------------------------------------------------------------------------------------------------
# The shares
# ------------------------------------------------------------------------------------------------


@for_all
@given(seed=st.integers(0, 999), beta=st.floats(0.01, 10),
       texts=st.lists(st.text(max_size=12), min_size=2, max_size=4, unique=True))
def test_shares_sum_to_the_implicit_reward_of_the_answer(seed, beta, texts):
    """For any models, any texts and any beta: beta (log pi(y|x) - log pi_ref(y|x))."""
    policy, reference = small_model(seed), small_model(seed + 1000)
    items = encoded(("The plot", texts, [(0, 1)]), ("", texts[::-1], [(0, 1)]))
    batch = pack(items, 64)
    with torch.no_grad():
        expected = beta * (policy.logps(batch) - reference.logps(batch))
    answers = credit.credit(policy, reference, items, TOKENIZER, beta)
    found = torch.tensor([credit.total(answer) for answer in answers])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3 * beta)
    lengths = [len(answer) for item in items for answer in item.answers]
    assert [len(answer) for answer in answers] == lengths       # end-of-text included


def test_every_token_has_its_own_log_probs_under_both_models():
    """Those of the answer alone after its prompt, one forward pass each."""
    policy, reference = small_model(0), small_model(1)
    [item] = encoded(("The plot", [" was good.", " was"], [(0, 1)]))
    answers = credit.credit(policy, reference, [item], TOKENIZER, 0.5)
    for ids, tokens in zip(item.answers, answers):
        whole = torch.tensor([[*item.prompt, *ids]])
        for name, model in (("logp", policy), ("ref_logp", reference)):
            with torch.no_grad():
                logps = model(whole)[0].log_softmax(-1)
            n = len(item.prompt)
            expected = [logps[n - 1 + t, token].item() for t, token in enumerate(ids)]
            assert [getattr(t, name) for t in tokens] == pytest.approx(expected, abs=1e-4)
        assert [t.share for t in tokens] == pytest.approx(
            [0.5 * (t.logp - t.ref_logp) for t in tokens], abs=1e-5)
    assert [t.text for t in answers[0]] == [" was", " good", ".", "<eot>"]


def test_a_policy_that_equals_its_reference_has_no_shares():
    model = small_model(0)
    pairs = encoded(("The plot", [" was good.", " was"], [(0, 1)]))
    [view] = credit.views_of(model, model, pairs, TOKENIZER, 0.5)
    assert all(token.share == 0 for token in view.chosen + view.rejected)
    assert credit.full_shade([view]) == 0 and credit.strength(0.0, 0.0) == 0
    assert "margin +0.00" in credit.show(view, 0.0, colour=True)


# ------------------------------------------------------------------------------------------------
# Which pairs
# ------------------------------------------------------------------------------------------------


def test_pairs_come_as_in_the_file_or_by_margin_or_wrongly_ranked_ones_only():
    """At most one of each prompt. A margin is that of the packed log-probs."""
    policy, reference = small_model(0), small_model(1)
    items = encoded(*[(f"The plot {i}", [" was good.", " dull", f" {i} {i}"],
                       [(0, 1), (0, 2), (1, 2)]) for i in range(20)])

    def margin_of(pair):
        batch = pack([pair], 64)
        with torch.no_grad():
            ahead = policy.logps(batch) - reference.logps(batch)
        return (ahead[0] - ahead[1]).item()

    def chosen(order, n):
        return credit.choose_pairs(items, n, order, policy, reference, 64)
    assert chosen("file", 3) == [Encoded(item.prompt, item.answers[:2], [(0, 1)])
                                 for item in items[:3]]
    margins = [[margin_of(credit.alone(item, pair)) for pair in item.pairs] for item in items]
    largest = sorted(map(max, margins), reverse=True)
    smallest = sorted(map(min, margins))
    assert [margin_of(p) for p in chosen("margin", 5)] == pytest.approx(largest[:5], abs=1e-4)
    wrong = [margin for margin in smallest if margin < 0]
    assert 0 < len(wrong)
    assert [margin_of(p) for p in chosen("wrong", 99)] == pytest.approx(wrong, abs=1e-4)


# ------------------------------------------------------------------------------------------------
# In the terminal
# ------------------------------------------------------------------------------------------------


def view_of(texts, shares, prompt="The plot"):
    tokens = [Token(credit.printable(text), -1.0, -1.0 + share, share)
              for text, share in zip(texts, shares)]
    return View(prompt, tokens, tokens[::-1])


def test_without_colour_every_share_is_a_signed_number_and_the_sums_are_below():
    view = View("The plot", [Token(" was", -1.0, -0.75, 0.125), Token(" good", -2.0, -1.0, 0.5)],
                [Token(" dull", -1.0, -3.0, -1.0)])
    assert credit.show(view, 1.0) == ("prompt    The plot\n"
                                      "chosen     was(+0.12) good(+0.50)\n"
                                      "rejected   dull(-1.00)\n"
                                      "sums      chosen +0.62, rejected -1.00, margin +1.62")


@for_all
@given(texts=st.lists(st.text(max_size=9), min_size=1, max_size=30), width=st.integers(40, 120),
       prompt=st.text(max_size=400), seed=st.integers(0, 99))
def test_text_of_a_model_never_becomes_a_control_character(texts, width, prompt, seed):
    """All that is not text in a view is our own colours, and they never change what it says."""
    shares = torch.randn(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    view = view_of(texts, shares, prompt)
    plain = credit.show(view, 1.0, width)
    coloured = credit.show(view, 1.0, width, colour=True)
    for shown in (plain, ANSI.sub("", coloured)):
        assert all(char.isprintable() or char == "\n" for char in shown)
    # After its label of ten characters, each line goes on with the text.
    answers = "".join(line[10:] for line in ANSI.sub("", coloured).split("\n")[:-1])
    assert answers.endswith("".join(token.text for token in view.chosen + view.rejected))
    assert coloured.count("\033[0m") == len(re.findall(r"\033\[(?!0m)", coloured))


def test_an_escape_sequence_in_a_text_is_shown_escaped():
    [item] = encoded(("a\x1b]0;b", [" \x1b[2J\u202e", " \r"], [(0, 1)]))
    [view] = credit.views_of(small_model(0), small_model(1), [item], TOKENIZER, 1.0)
    shown = credit.show(view, 1.0)
    assert "a\\x1b]0;b" in shown and "\\x1b(" in shown and "\\r(" in shown and "\x1b" not in shown
    assert "\u202e" not in shown and "\\xe2(" in shown      # byte by byte, as in this tokenizer


def test_shades_are_blue_above_zero_and_orange_below_and_stronger_further_out():
    """Three steps each; what is less than a sixth of the fullest has none. 33, 75 and 153 are blues
    of the 256 colours, 208, 215 and 223 oranges, and letters are black on all of them."""
    steps = [credit.shade(amount / 12) for amount in range(-12, 13)]
    backgrounds = [re.search(r"38;5;16;48;5;(\d+)m", step) for step in steps]
    found = [int(match[1]) if match else None for match in backgrounds]
    assert list(dict.fromkeys(found)) == [208, 215, 223, None, 153, 75, 33]
    assert [amount for amount, colour in zip(range(-12, 13), found) if colour is None] == [
        -2, -1, 0, 1, 2]


def test_the_largest_share_has_the_fullest_shade_and_a_quarter_of_it_half():
    """So one extreme token does not make all others pale, and no two shares look the same that are
    not: with a largest share of 1.19, one of 0.24 has a shade of sqrt(0.24 / 1.19) = 0.449."""
    view = View("", [Token("a", 0, 0, 0.24), Token("a", 0, 0, -1.19)], [Token("a", 0, 0, 1.0)])
    full = credit.full_shade([view])
    assert full == 1.19 and credit.strength(-1.19, full) == -1
    assert credit.strength(full / 4, full) == 0.5
    assert credit.strength(0.24, full) == pytest.approx(0.449, abs=1e-3)


# ------------------------------------------------------------------------------------------------
# As a page
# ------------------------------------------------------------------------------------------------

VOID = {"meta", "input"}


class Page(HTMLParser):
    """An HTML page whose tags are checked to be well nested: its tags with their attributes, its
    text, and the address of everything it refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.addresses = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.addresses += [value for name, value in attributes
                           if name in ("src", "href", "action", "srcset", "data", "poster")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


@pytest.mark.parametrize("n", [1, 3])
def test_the_page_is_well_formed_needs_no_other_file_and_shows_text_as_text(n):
    """A script is there only for the slider over several checkpoints, and texts are not in it."""
    views = [view_of(NASTY, [0.5, -0.5, 0.1] * 3, prompt=text) for text in NASTY]
    text = credit.credit_page([(f"<i>{k}</i>\n", 0.5, views) for k in range(n)], "<b>sft</b>")
    page = Page(text)
    assert page.addresses == [] and "http" not in text and "url(" not in text
    assert "@import" not in text and "\x1b" not in text and "\x00" not in text
    assert page.count("script") == page.count("input") == (n > 1)
    assert not page.count("i") and not page.count("b")
    assert page.text.count("<script>alert(1)</script>") == n * (1 + 4 * len(NASTY))
    assert page.count("section") == n and page.count("article") == n * len(NASTY)
    tokens = [attributes for tag, attributes in page.tags if attributes.get("class") == "token"]
    assert len(tokens) == n * len(NASTY) * 2 * len(NASTY)
    assert all(attributes["tabindex"] == "0" for attributes in tokens)
    assert "<i>0</i>\\n, β = 0.5, reference <b>sft</b>" in page.text
    # The slider has the names as well, in the order of the checkpoints.
    assert page.text.count("<i>0</i>\\n") == 1 + (n > 1)
    assert (n == 1) == ("<i>0</i>\\n<i>1</i>\\n<i>2</i>\\n" not in page.text)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_a_token_of_the_page_has_its_shade_and_its_numbers():
    token = Token(" good", -2.0, -1.0, 0.25)
    page = Page(f"<p>{credit.span(token, 1.0)}</p>")
    assert page.text == " good“ good”: log π -1.00, log π_ref -2.00, share +0.25"
    # Blue, at half of the 60 % that are the strongest; letters can be read on it.
    assert page.tags[1][1]["style"] == "background: rgb(31 127 196 / 30%)"
    assert "213 94 0 / 60%" in credit.span(token._replace(share=-1.0), 1.0)


def test_the_blanks_before_a_word_are_not_shaded():
    """At the end of a line they would be a sliver of colour. A token of blanks alone is shaded."""
    def parts(text):
        page = credit.span(Token(text, 0, 0, 1.0), 1.0)
        before, rest = page.split("<span", 1)
        return before, rest[rest.index(">") + 1:rest.index("<")]
    assert parts(" good") == (" ", "good") and parts("good") == ("", "good")
    assert parts("   ") == ("", "   ") and parts("  <") == ("  ", "&lt;")


def luminance(colour):
    """WCAG's relative luminance of (red, green, blue), from 0 to 255."""
    shares = [value / 255 for value in colour]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("letters, back", [((0, 0, 0), (255, 255, 255)),
                                           ((255, 255, 255), (18, 18, 18))])
def test_letters_can_be_read_on_the_strongest_shade_of_a_light_and_a_dark_page(letters, back):
    """WCAG asks for a contrast of 4.5 between letters and background."""
    for amount in (-1, 1):
        *paint, percent = map(int, re.findall(r"\d+", credit.paint(amount)))
        blended = [percent / 100 * p + (1 - percent / 100) * b for p, b in zip(paint, back)]
        light, dark = sorted([luminance(letters), luminance(blended)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])),
               None)
# Moves the slider to the first checkpoint, then the focus to a token, and notes what can be seen.
DRIVE = """<script>
const drive = () => {
if (!document.hasFocus()) return setTimeout(drive, 20);
const visible = () => sections.map(section => section.offsetHeight > 0);
const seen = {before: visible()};
input.value = 0;
input.dispatchEvent(new Event("input"));
seen.after = visible();
const token = document.querySelector(".token"), numbers = token.querySelector(".numbers");
seen.unfocused = getComputedStyle(numbers).display;
token.focus();
seen.focused = getComputedStyle(numbers).display;
seen.text = numbers.innerText;
seen.wider = document.documentElement.scrollWidth > innerWidth;
const probe = getComputedStyle(document.body);
seen.colours = [probe.color, probe.backgroundColor];
document.title = JSON.stringify(seen);
};
drive();
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("window", ["1200,900", "500,900"])
def test_a_browser_shows_one_checkpoint_and_the_numbers_of_a_token(run, tmp_path, scheme, window):
    """In a wide and a narrow window, light and dark, with the slider and the keyboard."""
    path = tmp_path / "page.html"
    credit.main(["--out", str(run), "--html", str(path), "--checkpoint", str(run / "early.pt"),
                 "--checkpoint", str(run / "dpo.pt")])
    path.write_text(path.read_text().replace("</body>", DRIVE))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={window}",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         "--virtual-time-budget=20000",
         f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", path.as_uri()],
        capture_output=True, text=True, timeout=120)
    seen = json.loads(re.search(r"<title>(.*)</title>", done.stdout)[1])
    assert seen["before"] == [False, True] and seen["after"] == [True, False]
    assert seen["unfocused"] == "none" and seen["focused"] == "block"
    assert re.fullmatch(r"“.*”: log π -\d+\.\d\d, log π_ref -\d+\.\d\d, share [+-]\d+\.\d\d",
                        seen["text"])
    assert seen["wider"] is False
    letters, back = [list(map(int, re.findall(r"\d+", colour)))[:3] for colour in seen["colours"]]
    assert (luminance(letters) > luminance(back)) == (scheme == "dark")


# ------------------------------------------------------------------------------------------------
# Compared with the truth
# ------------------------------------------------------------------------------------------------


@for_all
@given(seed=st.integers(0, 9999), cut=st.floats(0, 1), swaps=st.integers(0, 3))
def test_contributions_of_clauses_sum_to_the_reward_of_the_text(seed, cut, swaps):
    """Of any review, also if it is cut and some of its words are exchanged."""
    rng = random.Random(seed)
    words = re.findall(r"\s*\S+", reviews.write_review(rng))
    for _ in range(swaps):
        i, j = rng.randrange(len(words)), rng.randrange(len(words))
        words[i], words[j] = words[j], words[i]
    text = "".join(words[:round(cut * len(words))])
    total = sum(contribution for _, _, contribution in credit.opinions_of(text))
    assert total == pytest.approx(reviews.reward(text), abs=1e-6)


def test_a_clause_has_the_tokens_that_it_shares_letters_with():
    """Shares are powers of two, so that their sum tells which tokens they are of. Weights are 0.5,
    1.5 and 2, together 4; "good" is worth 0.4 and "hated" -0.8."""
    prompt = [TOKENIZER.eot_token, *TOKENIZER.encode_ordinary("The plot was")]
    ids = TOKENIZER.encode_ordinary(" good, but I hated the jokes. A good film.")
    ids = [*ids, TOKENIZER.eot_token]
    answer = [Token("", 0, 0, 2**i) for i in range(len(ids))]
    assert len(ids) == 13
    #  good , but I hated the jokes .  A  good film .  <eot>
    #  0    1 2   3 4     5   6     7  8  9    10   11 12
    kinds, contributions, shares = zip(*credit.clauses_of(prompt, ids, answer, TOKENIZER))
    assert kinds == ("before but", "after but", "verdict")
    assert contributions == pytest.approx([0.5 * 0.4 / 4, 1.5 * -0.8 / 4, 2 * 0.4 / 4])
    assert shares == (2**0, 2**7 - 2**1, 2**11 - 2**8)


def test_clauses_that_lie_in_the_prompt_are_left_out():
    prompt = [TOKENIZER.eot_token, *TOKENIZER.encode_ordinary("The plot was good. I hated the")]
    ids = TOKENIZER.encode_ordinary(" jokes.")
    answer = [Token("", 0, 0, 1.0)] * len(ids)
    [(kind, contribution, share)] = credit.clauses_of(prompt, ids, answer, TOKENIZER)
    assert (kind, contribution, share) == ("other", pytest.approx(-0.8 / 2), 1.0)


def test_the_correlation_is_pearsons_and_its_error_is_that_of_the_clusters():
    """Of normal variables, it is (1 - r^2) / sqrt(N). Entries that are there twice, in the same
    cluster, tell nothing new."""
    rng = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 20_000, generator=rng, dtype=torch.float64)
    y = 0.75 * x + noise                                # r = 0.75 / sqrt(1 + 0.75^2) = 0.6
    each = torch.arange(len(x))
    r, error = credit.correlation(3 * x - 1, y, each)
    assert r == pytest.approx(torch.corrcoef(torch.stack([x, y]))[0, 1].item())
    assert r == pytest.approx(0.6, abs=0.02)
    assert error == pytest.approx((1 - r**2) / len(x) ** 0.5, rel=0.03)
    assert credit.correlation(x, -2 * x, each) == pytest.approx((-1, 0))
    assert credit.correlation(x.repeat(2), y.repeat(2), each.repeat(2)) == pytest.approx((r, error))


def test_shares_that_are_the_contributions_correlate_perfectly():
    """Each clause's contribution at one of its tokens, and anything at tokens between clauses."""
    rng = random.Random(0)
    items = encoded(*[("", [reviews.write_review(rng) for _ in range(2)], [(0, 1)])
                      for _ in range(30)])
    answers = []
    for item in items:
        for ids in item.answers:
            ends = [len(TOKENIZER.decode(ids[:i + 1])) for i in range(len(ids))]
            last = {opinion.end(): contribution for opinion, _, contribution
                    in credit.opinions_of(TOKENIZER.decode(ids[:-1]))}
            full_stops = [TOKENIZER.decode([i]) == "." for i in ids]
            answers.append([Token("", 0, 0, rng.gauss(0, 9) if stop else last.get(end, 0.0))
                            for end, stop in zip(ends, full_stops)])
    found = credit.compare_with_truth(items, answers, TOKENIZER)
    assert set(found) == {"all", "other", "before but", "after but", "verdict"}
    assert all(r == pytest.approx(1) for _, r, _ in found.values())
    assert found["verdict"][0] == 60 and found["all"][0] == sum(
        found[kind][0] for kind in found if kind != "all")


@for_all
@given(seed=st.integers(0, 9999), beta=st.floats(0.05, 5))
def test_a_share_of_the_optimal_policy_is_by_how_much_a_token_raises_the_value(seed, beta):
    """For any reward: all answers of two tokens out of four. V(prefix) = beta log E exp(r / beta),
    the expectation over how the reference goes on. The sum of an answer is r(x, y) - V(start), and
    V(start) is beta log Z(x)."""
    rng = torch.Generator().manual_seed(seed)
    ref = torch.randn(16, generator=rng, dtype=torch.float64).log_softmax(0)
    rewards = torch.randn(16, generator=rng, dtype=torch.float64)
    pi = optimal_policy(ref, rewards, beta)
    ref, pi, rewards = ref.view(4, 4), pi.view(4, 4), rewards.view(4, 4)    # first, second token
    start = beta * log_partition(ref.flatten(), rewards.flatten(), beta)
    after_first = beta * log_partition(ref.log_softmax(1), rewards, beta)
    first = implicit_reward(pi.logsumexp(1), ref.logsumexp(1), beta)
    second = implicit_reward(pi.log_softmax(1), ref.log_softmax(1), beta)
    torch.testing.assert_close(first, after_first - start)
    torch.testing.assert_close(second, rewards - after_first[:, None])


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def test_the_command_prints_held_out_pairs_as_they_come(run, capsys):
    rows = [json.loads(line) for line in (run / "preferences.jsonl").read_text().splitlines()]
    held_out = [row["prompt"] for row in rows if is_held_out(row["prompt"])]
    credit.main(["--out", str(run), "--pairs", "2"])
    out = capsys.readouterr().out
    assert re.findall(r"^prompt +(.*)$", out, re.M) == held_out[:2]
    assert "dpo, beta 0.5, reference sft" in out and "\033" not in out
    chosen, rejected, margin = map(float, re.search(
        r"chosen (\S+), rejected (\S+), margin (\S+)", out).groups())
    assert chosen - rejected == pytest.approx(margin, abs=0.011)


def test_colour_is_for_terminals_unless_no_color_is_set(run, capsys, monkeypatch):
    """An empty NO_COLOR counts as none, as no-color.org says."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for value, coloured in [("", True), ("1", False)]:
        monkeypatch.setenv("NO_COLOR", value)
        credit.main(["--out", str(run)])
        assert ("\033[" in capsys.readouterr().out) == coloured


def test_a_pair_that_is_typed_in_is_shown(run, capsys):
    credit.main(["--out", str(run), "--prompt", "The plot", "--chosen", " was good.",
                 "--rejected", "\x1b[31m"])
    out = capsys.readouterr().out
    assert re.search(r"^chosen     was\(\S+\) good\(\S+\)\.\(\S+\)<eot>\(\S+\)$", out, re.M)
    assert re.search(r"^rejected  \\x1b\(", out, re.M) and "\x1b" not in out


def test_a_page_is_written_for_any_number_of_checkpoints(run, tmp_path, capsys):
    flags = ["--out", str(run), "--html", str(tmp_path / "a.html"), "--sort", "margin"]
    credit.main(flags)
    one = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert one.count("section") == 1 and one.count("script") == 0 and "<b>&amp; " not in one.tags
    credit.main(flags + ["--checkpoint", str(run / "sft.pt"), "--checkpoint", str(run / "dpo.pt")])
    two = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert two.count("section") == 2 and two.count("script") == 1
    assert "sft, β = 1, reference sft" in two.text and "dpo, β = 0.5, reference sft" in two.text


@pytest.mark.parametrize("flags, words", [
    (["--prompt", "a"], "give all three"),
    (["--prompt", "a", "--chosen", "b", "--rejected", "b"], "equal answers"),
    (["--prompt", "a", "--chosen", "b", "--rejected", " "], "empty answer"),
    (["--prompt", "a", "--chosen", "b", "--rejected", "\udce9"], "half a character"),
    (["--prompt", "a", "--chosen", "b", "--rejected", "c" * 80], "may have 64 tokens together"),
    (["--prompt", "a" * 80, "--chosen", "b", "--rejected", "c"], "may have 64 tokens together"),
    (["--prompt", "a", "--chosen", "b", "--rejected", "c", "--sort", "wrong"], "--sort wrong"),
    (["--checkpoint", "a.pt", "--checkpoint", "b.pt"], "slider"),
    (["--html", "page"], "a name that ends in .html"),
    (["--pairs", "0"], "--pairs"), (["--checkpoint", "no.pt"], "no.pt: no such file")])
def test_bad_input_is_one_sentence(run, flags, words, capsys):
    with pytest.raises(SystemExit) as caught:
        credit.main(["--out", str(run), *flags])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("credit.py: ") and words in message
    assert message.count("\n") == 1


def test_truth_is_measured_for_the_reviews_only(run, capsys):
    """In the fixture each of five prompts has two clauses, "was dull" and "was good"."""
    credit.main(["--out", str(run), "--truth"])
    out = capsys.readouterr().out
    assert "15 held-out answers to 5 prompts" in out
    assert re.search(r"^all +10 +-?[01]\.\d{3} \+-0\.\d{3}$", out, re.M), out
    for flags, words in [(["--data", "pairs.jsonl"], "only the reviews task"),
                         (["--sort", "margin"], "shows no pairs"),
                         (["--checkpoint", str(run / "sft.pt")], "its own reference")]:
        with pytest.raises(SystemExit):
            credit.main(["--out", str(run), "--truth", *flags])
        assert words in capsys.readouterr().err


def test_a_policy_without_wrong_pairs_says_so(run, capsys):
    """The reference itself: all of its margins are 0, which is a tie."""
    with pytest.raises(SystemExit):
        credit.main(["--out", str(run), "--sort", "wrong", "--checkpoint", str(run / "sft.pt")])
    assert "no held-out pair is ranked wrongly" in capsys.readouterr().err
    (run / "preferences.jsonl").rename(run / "away.jsonl")
    try:
        with pytest.raises(SystemExit):
            credit.main(["--out", str(run)])
    finally:
        (run / "away.jsonl").rename(run / "preferences.jsonl")
    assert "no held-out pair to show" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# The squeezing effect: what docs/squeezing.md claims, for any reference, pair and step
# ------------------------------------------------------------------------------------------------

BETA = 0.5
a_reference = st.lists(st.floats(-5, 5), min_size=3, max_size=12).map(
    lambda logits: torch.tensor(logits, dtype=torch.float64).log_softmax(0))
a_step = st.floats(0.01, 3)                             # d = lr beta / 2


def stepped(before, chosen, rejected, d):
    return squeezing.dpo_step(before, chosen, rejected, BETA, 2 * d / BETA)


@for_all
@given(before=a_reference, d=a_step, data=st.data())
def test_a_step_multiplies_the_pair_and_scales_all_others_alike(before, d, data):
    """The new probabilities are pi_w e^d / Z, pi_l e^-d / Z and pi_i / Z, where Z = 1 + pi_w (e^d -
    1) - pi_l (1 - e^-d): only two logits move."""
    w, l = data.draw(st.permutations(range(len(before))))[:2]
    after, p = stepped(before, w, l, d).exp(), before.exp()
    z = 1 + p[w] * math.expm1(d) - p[l] * -math.expm1(-d)
    expected = p / z
    expected[w] *= math.exp(d)
    expected[l] *= math.exp(-d)
    torch.testing.assert_close(after, expected)


@for_all
@given(before=a_reference, d=a_step, data=st.data())
def test_the_chosen_rises_the_rejected_falls_and_the_others_follow_their_ratio(before, d, data):
    """All others rise if the rejected answer was likelier than the chosen one by more than e^d, and
    fall if by less; the likeliest of them changes the most."""
    w, l = data.draw(st.permutations(range(len(before))))[:2]
    changes = stepped(before, w, l, d).exp() - before.exp()
    assert changes[w] > 0 > changes[l]
    others = [i for i in range(len(before)) if i not in (w, l)]
    excess = (before[l] - before[w]).item() - d
    hypothesis.assume(abs(excess) > 1e-6)
    assert all((changes[i] > 0) == (excess > 0) for i in others)
    likeliest = max(others, key=lambda i: before[i])
    assert changes[likeliest].abs() == max(changes[i].abs() for i in others)


@for_all
@given(before=a_reference, d=a_step, data=st.data())
def test_the_rejected_alone_raises_every_other_logit_by_its_probability(before, d, data):
    """The logits move by -d (1 - pi_l) and +d pi_i. So those rise that are likely enough: if one
    rises, so do all likelier ones but the rejected, which falls."""
    l = data.draw(st.integers(0, len(before) - 1))
    p = before.exp()
    moves = d * p
    moves[l] -= d
    after = stepped(before, None, l, d)
    torch.testing.assert_close(after, (before + moves).log_softmax(0))
    changes = after - before
    assert changes[l] < 0
    others = sorted((i for i in range(len(before)) if i != l), key=lambda i: before[i])
    assert all(changes[i] <= changes[j] + 1e-12 for i, j in zip(others, others[1:]))
    assert changes[others[-1]] > 0


def test_the_numbers_of_the_page_are_those_of_the_picture():
    page = " ".join((ROOT / "docs" / "squeezing.md").read_text(encoding="utf-8").split())
    flat, peaked = squeezing.REFERENCES.values()
    w, l = squeezing.CHOSEN, squeezing.REJECTED

    def changes(before, chosen):
        return 100 * (stepped(before, chosen, l, 1.0).exp() - before.exp())
    both, alone = changes(peaked, w), changes(peaked, None)
    assert f"the chosen answer gains {changes(flat, w)[w]:.1f} points" in page
    assert (changes(flat, w)[w] > -changes(flat, w)[l]
            and all(change < 0 for i, change in enumerate(changes(flat, w)) if i != w))
    assert f"at {100 * peaked[l].exp():.1f} %, loses {-both[l]:.1f} points" in page
    assert f"at {100 * peaked[w].exp():.1f} %, gains only {both[w]:.1f} of them" in page
    assert f"which is in no pair, gains {both[0]:.1f}." in page
    assert f"only the likeliest rises, by {alone[0]:.1f} points" in page
    assert [i for i, change in enumerate(alone) if change > 0] == [0]
    rises = changes(flat, None).tolist()
    assert len({round(rise, 12) for i, rise in enumerate(rises) if i != l}) == 1 and rises[0] > 0


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="no matplotlib")
def test_the_picture_is_drawn_and_the_numbers_are_printed(tmp_path, capsys):
    path = tmp_path / "new" / "a.svg"
    squeezing.main(["--out", str(path)])
    out = capsys.readouterr().out
    assert re.search(r"peaked reference, the rejected alone\n +likeliest +50\.012 -> +62\.097 %",
                     out)
    picture = path.read_text(encoding="utf-8")
    for words in ("likeliest", "rejected", "chosen", "change, points of percent",
                  "flat reference, the rejected alone"):
        assert f"<!-- {words}" in picture, words
    with pytest.raises(SystemExit):
        squeezing.main(["--out", str(tmp_path / "picture")])
    assert "a name that ends in .svg" in capsys.readouterr().err
