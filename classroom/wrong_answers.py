"""The wrong answers: broken variants of our own functions, and the test that catches each one.

    python -m classroom.wrong_answers                      # run our tests against all of them
    python -m classroom.wrong_answers mean_for_sum         # only against this one
    python -m classroom.wrong_answers --all                # list every test that fails
    python -m classroom.wrong_answers --tests my_tests.py  # grade a student's tests

Each wrong answer, or mutant, is a function in this file. Many are mistakes that public DPO
code has really made; where a mistake has a known source, the docstring names it ("official code" is
that of the paper's authors). A mutant replaces one function while the tests run. Where possible, it
is a few lines around the right function (`right`), so that it survives changes to that function; if
the function no longer exists, an error says so. Each mutant names the test that must catch it, and
the name of that test says in words what is wrong.

Left out on purpose: mutants of every operator in the code. These are mistakes that people make.
"""

import functools
import importlib
import itertools
import math
import os
import shutil
import sys
import tempfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

from classroom import sandbox
from classroom.exercises import EXERCISES, SLOW, claims, name_of_test, split_target
from classroom.probes import PROBES, result_of
from runtime.cli import Parser, command, number_type
from runtime.errors import UserError

Mutant = namedtuple("Mutant", "name target test description wrong")
MUTANTS = {}
FILES = sorted({file for file, _ in claims().values()} - {"test_classroom.py"})
SECONDS = 300               # time limit for one mutant; one that is caught takes about a second


def replaces(target, test):
    """Register the decorated function as a mutant of `target` ("module.function" or
    "module.Class.method") that `test` must catch. It is called with the right function, followed by
    the arguments of the call."""
    def register(wrong):
        description = " ".join(wrong.__doc__.split())
        MUTANTS[wrong.__name__] = Mutant(wrong.__name__, target, test, description, wrong)
        return wrong
    return register


# ------------------------------------------------------------------------------------------------
# model.py: the network
# ------------------------------------------------------------------------------------------------


@replaces("model.Attention.forward", "test_no_logit_depends_on_a_later_token")
def attention_not_causal(right, self, x, mask=None, cache=None):
    """No mask at all: the first thing that goes wrong when attention is written by hand."""
    if mask is None:
        mask = x.new_ones(1, 1, x.size(1), x.size(1)).bool()
    return right(self, x, mask, cache)


@replaces("model.Attention.forward", "test_forward_is_gpt2_written_out_by_hand")
def attention_scores_unscaled(right, self, x, *more):
    """Without the factor 1 / sqrt(D) the model trains, but it is not the model whose weights were
    released."""
    unscaled = functools.partial(F.scaled_dot_product_attention, scale=1.0)
    with mock.patch.object(F, "scaled_dot_product_attention", unscaled):
        return right(self, x, *more)


@replaces("model.MLP.forward", "test_forward_is_gpt2_written_out_by_hand")
def gelu_without_tanh(right, self, x):
    """The activation is "gelu" instead of GPT-2's "gelu_new": a difference in the fourth digit that
    nobody notices."""
    return self.c_proj(F.gelu(self.c_fc(x)))


@replaces("model.MLP.forward", "test_training_mode_changes_nothing")
def dropout_left_on(right, self, x):
    """TRL #639: policy and reference drop different units, so what DPO sees is noise."""
    return F.dropout(right(self, x), 0.1, self.training)


@replaces("model.GPT.head", "test_half_precision_logps_are_float32_and_close")
def softmax_in_half_precision(right, self, hidden, *more):
    """Half precision has 8 or 11 significant bits, so a log-prob of -100 is only known to about
    0.5."""
    logits = right(self, hidden, *more)
    return logits if self.precision is None else logits.to(self.precision)


@replaces("model.GPT.head", "test_probabilities_of_all_next_tokens_sum_to_one")
def vocabulary_padded_with_zeros(right, self, hidden, *more):
    """The vocabulary is padded from 50257 to 50304 with rows of zeros, but a logit of 0 is huge
    next to GPT-2's, which are near -100."""
    return F.pad(right(self, hidden, *more), (0, 47))


@replaces("model.GPT.head", "test_a_padded_vocabulary_changes_no_log_prob_and_no_gradient")
def padded_columns_not_hidden(right, self, hidden, *more):
    """The columns that pad the vocabulary get logit 0. Padding is requested only on a GPU, so
    results are wrong only there."""
    return right(self, hidden, *more).nan_to_num(neginf=0.0)


# ------------------------------------------------------------------------------------------------
# model.py: the log-probability of an answer
# ------------------------------------------------------------------------------------------------


def begins(answer_of):
    """True at the first scored token of each answer. The tokens of an answer are consecutive."""
    first = answer_of.new_ones(len(answer_of)).bool()
    first[1:] = answer_of[1:] != answer_of[:-1]
    return first


def only(batch, selected):
    """The batch with only those scored tokens for which selected, (S,) bool, is True."""
    return replace(batch, source=batch.source[selected], target=batch.target[selected],
                   answer_of=batch.answer_of[selected])


def prompts_scored(batch):
    """The batch with other scored tokens: for each answer, those of its prompt instead of its own.
    The first token of a prompt is left out, because nothing predicts it."""
    group, answer, tokens = batch.group.flatten(), batch.answer.flatten(), batch.tokens.flatten()
    sources, targets, numbers = [], [], []
    for n in range(batch.n_answers):
        prompt = group[batch.source[batch.answer_of == n][0]]
        places = ((group == prompt) & (answer == 0)).nonzero()[1:, 0]
        sources.append(places - 1)
        targets.append(tokens[places])
        numbers.append(torch.full_like(places, n))
    return replace(batch, source=torch.cat(sources), target=torch.cat(targets),
                   answer_of=torch.cat(numbers))


@replaces("model.GPT.logps", "test_packed_logps_are_those_of_one_row_a_sequence")
def no_shift(right, self, batch):
    """0xallam/Direct-Preference-Optimization: each token is predicted at its own place, where the
    model can already see it."""
    return right(self, replace(batch, source=batch.source + 1))


@replaces("model.GPT.logps", "test_probabilities_of_all_next_tokens_sum_to_one")
def first_token_dropped(right, self, batch):
    """fw-ai/cookbook #388, minimind #621: the labels are shifted once more than the logits."""
    return right(self, only(batch, ~begins(batch.answer_of)))


@replaces("model.GPT.logps", "test_packed_logps_are_those_of_one_row_a_sequence")
def end_of_text_not_scored(right, self, batch):
    """rasbt/LLMs-from-scratch: the policy never learns where to stop."""
    return right(self, only(batch, ~begins(batch.answer_of.flip(0)).flip(0)))


@replaces("model.GPT.logps", "test_logps_follow_the_chain_rule")
def mean_for_sum(right, self, batch):
    """rasbt/LLMs-from-scratch, minimind #659, Liger-Kernel #693: a mean over the tokens, but log
    pi(y|x) is a sum."""
    return right(self, batch) / batch.answer_of.bincount(minlength=batch.n_answers)


@replaces("model.GPT.token_logps", "test_logps_follow_the_chain_rule")
def logits_for_log_probs(right, self, batch):
    """The logits are used as they are, without log_softmax."""
    hidden = self.hidden(batch.tokens, batch.positions, batch.mask()).flatten(0, 1)
    return self.head(hidden)[batch.source, batch.target]


@replaces("model.GPT.logps", "test_packed_logps_are_those_of_one_row_a_sequence")
def mean_over_the_padded_row(right, self, batch):
    """minimind #279: a mean that also counts the padding, so it depends on the rest of the
    batch."""
    return right(self, batch) / batch.tokens.size(1)


@replaces("model.GPT.logps", "test_logps_follow_the_chain_rule")
def prompt_scored(right, self, batch):
    """OpenRLHF #294 (there on one side only): log pi(x, y) instead of log pi(y|x)."""
    return right(self, batch) + right(self, prompts_scored(batch))


@replaces("model.GPT.logps", "test_packed_logps_are_those_of_one_row_a_sequence")
def loss_mask_inverted(right, self, batch):
    """CosyVoice #1449: the prompt is scored and the answer is not."""
    return right(self, prompts_scored(batch))


@replaces("model.GPT.logps", "test_packed_logps_are_those_of_one_row_a_sequence")
def chosen_mask_on_rejected(right, self, batch):
    """CosyVoice #1449: the second answer is scored only up to the length of the first."""
    lengths = batch.answer_of.bincount(minlength=batch.n_answers)
    first = lengths.cumsum(0) - lengths                             # (N,) of its scored tokens
    place = torch.arange(len(batch.answer_of)) - first[batch.answer_of]     # (S,) within the answer
    length_of_chosen = lengths[batch.answer_of // 2 * 2]                # (S,)
    return right(self, only(batch, place < length_of_chosen))


# ------------------------------------------------------------------------------------------------
# model.py: sampling, optimizer, checkpoints
# ------------------------------------------------------------------------------------------------


@replaces("model.GPT.hidden", "test_cached_generation_of_ragged_prompts_is_the_plain_one")
def left_padding_takes_positions(right, self, tokens, positions=None, mask=None, caches=None):
    """TRL #469, #6800: GPT-2 with prompts that are padded on the left, but without position ids."""
    if caches:
        start = caches[0].length
        positions = torch.arange(start, start + tokens.size(1))
        positions = positions.clamp(max=self.config.block_size - 1).expand_as(tokens)
    return right(self, tokens, positions, mask, caches)


@replaces("model.KeyValueCache.append", "test_cached_generation_of_ragged_prompts_is_the_plain_one")
def stale_cache_index(right, self, k, v):
    """The cache index is off by one: each new token overwrites the one before it, and the text
    stays fluent."""
    if self.length and k.size(2) == 1:
        self.k[:, :, self.length - 1] = k[:, :, 0]
        self.v[:, :, self.length - 1] = v[:, :, 0]
    return right(self, k, v)


@replaces("model.KeyValueCache.select", "test_no_answer_changes_when_others_leave_the_batch")
def first_rows_kept_whoever_left(right, self, rows):
    """The batch is made smaller with [:n], so from then on answers continue with each other's
    text."""
    if len(rows) < len(self.k):
        rows = torch.arange(len(rows))
    return right(self, rows)


@replaces("model.choose", "test_temperature_divides_the_logits_once")
def temperature_applied_twice(right, logits, temperature, *more, **named):
    """Once by the caller and once in this function: temperature 0.5 samples at 0.25."""
    return right(logits / max(temperature, 1e-6), temperature, *more, **named)


@replaces("model.choose", "test_top_k_and_top_p_draw_every_one_of_those_they_leave")
def top_k_one_token_short(right, logits, temperature, top_k, *more, **named):
    """> the k-th logit instead of >=: the k-th token is never drawn."""
    if top_k:
        top_k = max(1, top_k - 1)
    return right(logits, temperature, top_k, *more, **named)


@replaces("model.choose", "test_top_k_and_top_p_draw_every_one_of_those_they_leave")
def top_p_one_token_short(right, logits, temperature, top_k, top_p, generator):
    """The token that reaches p is cut off together with those after it."""
    if top_p is not None and temperature >= 1e-6:
        ordered, order = (logits / temperature).sort(descending=True)
        beyond = ordered.softmax(-1).cumsum(-1) >= top_p
        beyond[..., 0] = False
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    return right(logits, temperature, top_k, None, generator)


@replaces("model.choose", "test_generation_has_its_own_generator")
def sampling_moves_trainings_generator(right, logits, temperature, top_k, top_p, generator):
    """TRL #7083, nanoGPT: looking at samples changes what the model is trained on next."""
    return right(logits, temperature, top_k, top_p, None)


@replaces("model.choose", "test_sampled_answers_follow_the_models_own_distribution")
def one_number_for_all_rows(right, *arguments):
    """torch.rand(1) instead of torch.rand(B, 1): all answers to a prompt are the same."""
    rand = torch.rand

    def broadcast(rows, *more, **named):
        return rand(1, *more, **named).expand(rows, 1)
    with mock.patch.object(torch, "rand", broadcast):
        return right(*arguments)


@replaces("model.GPT.optimizer", "test_weight_decay_shrinks_matrices_and_nothing_else")
def decay_on_everything(right, self, lr, weight_decay=0.0, **named):
    """AdamW(model.parameters()): biases and layer-norm gains are pulled towards zero as well."""
    optimizer = right(self, lr, weight_decay, **named)
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay
    return optimizer


@replaces("tasks.checkpoint.save_checkpoint",
          "test_a_checkpoint_brings_back_sizes_weights_and_facts")
def compiled_names_in_the_checkpoint(right, path, model, **facts):
    """nanoGPT #325: keys that begin with _orig_mod. cannot be loaded anywhere else."""
    weights = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    compiled = SimpleNamespace(
        config=model.config, parameters=model.parameters, state_dict=lambda: weights)
    return right(path, compiled, **facts)


# ------------------------------------------------------------------------------------------------
# data.py: text to ids
# ------------------------------------------------------------------------------------------------


@replaces("data.encode", "test_no_token_merges_across_the_end_of_the_prompt")
def prompt_and_answer_encoded_together(right, preference, tokenizer, row_length, *more, **named):
    """TRL #1153, #2054: a token merges across the boundary, and the answer loses its first word."""
    item = right(preference, tokenizer, row_length, *more, **named)
    if item and len(item.answers) == len(preference.answers):
        n_prompt = len(item.prompt) - 1                     # without end-of-text
        room = row_length - len(item.prompt)
        item.answers = []
        for answer in preference.answers:
            ids = tokenizer.encode_ordinary(preference.prompt + answer)[n_prompt:]
            item.answers.append((ids + [tokenizer.eot_token])[:room])
    return item


def with_answers(item, change):
    """An Encoded with change(answer) instead of each answer. None stays None."""
    if item:
        item.answers = [change(answer) for answer in item.answers]
    return item


@replaces("data.encode", "test_an_answer_has_exactly_one_end_of_text_and_it_is_scored")
def no_end_of_text(right, preference, tokenizer, row_length, *more, **named):
    """rasbt/LLMs-from-scratch: the answers never end."""
    item = right(preference, tokenizer, row_length, *more, **named)
    return with_answers(item, lambda ids: [i for i in ids if i != tokenizer.eot_token])


@replaces("data.encode", "test_an_answer_has_exactly_one_end_of_text_and_it_is_scored")
def two_ends_of_text(right, preference, tokenizer, row_length, *more, **named):
    """TRL #4908: one end-of-text from the template and one from the trainer."""
    item = right(preference, tokenizer, row_length, *more, **named)
    eot = tokenizer.eot_token
    return with_answers(item, lambda ids: ids + [eot] if ids[-1] == eot else ids)


@replaces("data.encode", "test_an_answer_has_all_the_row_after_its_prompt")
def end_of_text_on_cut_answers(right, preference, tokenizer, row_length, *more, **named):
    """OpenRLHF: end-of-text is forced onto an answer that was cut, which teaches the model to stop
    in mid-sentence."""
    item = right(preference, tokenizer, row_length, *more, **named)
    return with_answers(item, lambda ids: [*ids[:-1], tokenizer.eot_token])


@replaces("data.encode", "test_an_unfinished_answer_gets_no_end_of_text")
def end_of_text_on_unfinished_answers(right, preference, *more, **named):
    """Answers that were sampled up to a number of tokens are given an end-of-text, so the policy
    learns to stop after as many."""
    return right(preference._replace(unfinished=()), *more, **named)


@replaces("data.encode", "test_an_answer_that_only_just_fits_is_not_cut")
def cut_one_too_early(right, preference, tokenizer, row_length, *more, **named):
    """TRL #2209, official code: an answer has room for the row minus the prompt; here it gets one
    token less."""
    return right(preference, tokenizer, row_length - 1, *more, **named)


@replaces("data.encode", "test_prompt_and_answers_are_encoded_apart_with_one_end_of_text_each")
def users_can_type_control_tokens(right, preference, tokenizer, *more, **named):
    """encode(..., allowed_special="all"): "<|endoftext|>" in a user's text ends that text."""
    encode = functools.partial(tokenizer.encode, allowed_special="all")
    tokenizer = SimpleNamespace(eot_token=tokenizer.eot_token, encode_ordinary=encode)
    return right(preference, tokenizer, *more, **named)


@replaces("data.encode", "test_a_pair_whose_answers_are_equal_after_the_cut_is_dropped")
def pairs_of_equal_answers_kept(right, preference, tokenizer, row_length, *more, **named):
    """TRL #6321: if both answers are cut to the same text, or to nothing, the loss of the pair
    stays at log 2 forever."""
    item = right(preference, tokenizer, row_length, *more, **named)
    if item is None and preference.pairs:
        uncut = right(preference, tokenizer, 10**6)
        room = row_length - len(uncut.prompt)
        if room > 0:
            return with_answers(uncut, lambda ids: ids[:room])
    return item


@replaces("runtime.rows.parse_preference",
          "test_a_row_that_cannot_teach_is_counted_and_under_strict_an_error")
def dialogues_split_each_at_its_own_end(right, row, *more):
    """Official code, PR #86: HH dialogues that differ before the last turn are given the same
    prompt, although their prompts differ."""
    parsed, turn = right(row, *more), "\n\nAssistant:"
    if isinstance(parsed, str) and "differ" in parsed and isinstance(row["chosen"], str):
        prompt, chosen = row["chosen"].rsplit(turn, 1)
        _, rejected = row["rejected"].rsplit(turn, 1)
        return prompt + turn, [chosen, rejected], [[0], [1]]
    return parsed


@replaces("data.is_held_out",
          "test_whether_a_prompt_is_held_out_is_the_same_in_every_run")
def held_out_by_pythons_hash(right, text):
    """hash() of a string differs between processes, so a resumed run trains on prompts that it had
    held out."""
    return hash(text) % 10 == 0


@replaces("tasks.own_file.read_split", "test_held_out_prompts_are_never_trained_on")
def held_out_prompts_trained_on(right, *arguments):
    """The held-out prompts are also trained on, so the held-out numbers are training numbers."""
    training, held_out = right(*arguments)
    return training + held_out, held_out


# ------------------------------------------------------------------------------------------------
# data.py: rewards to pairs
# ------------------------------------------------------------------------------------------------


@replaces("tasks.sampled.rank_answers", "test_of_answers_that_tie_the_first_stands_for_all")
def ties_as_wins(right, prompt, answers, rewards):
    """Tied answers are still in the ranking, so they make pairs although neither is better."""
    if len(set(rewards)) < 2:
        return None
    return {"prompt": prompt, "answers": list(answers), "rewards": list(rewards),
            "ranking": sorted(range(len(answers)), key=lambda i: -rewards[i])}


@replaces("tasks.sampled.rank_answers",
          "test_four_answers_with_four_rewards_make_six_pairs_best_first")
def worst_first(right, prompt, answers, rewards):
    """sorted() without the minus sign: the policy learns what people like least."""
    row = right(prompt, answers, rewards)
    if row is None:
        return None
    return row | {"ranking": row["ranking"][::-1]}


@replaces("data.ranking_to_pairs", "test_a_ranking_of_three_is_three_pairs")
def best_against_worst_alone(right, ranking):
    """One pair per ranking, but C.1's four answers make six."""
    return [(ranking[0], ranking[-1])] if len(ranking) > 1 else []


@replaces("data.ranking_to_pairs", "test_a_ranking_of_three_is_three_pairs")
def chosen_and_rejected_swapped(right, ranking):
    """The two columns of a file are in the wrong order. Accuracy rises all the same."""
    return [(l, w) for w, l in right(ranking)]


@replaces("tasks.reviews.reward", "test_writing_the_same_again_gains_nothing")
def reward_is_a_sum(right, text):
    """A sum over sentences, so the policy writes more of them."""
    return right(text) * max(1, text.count(". "))


# ------------------------------------------------------------------------------------------------
# data.py: the packed row
# ------------------------------------------------------------------------------------------------


@replaces("data.Batch.mask",
          "test_an_answer_sees_its_prompt_and_itself_never_its_siblings_nor_other_groups")
def sibling_visible(right, self):
    """A causal mask within the group is not enough: the rejected answer can read the chosen one."""
    return (self.group[:, :, None] == self.group[:, None, :]).tril()


@replaces("data.Batch.mask",
          "test_an_answer_sees_its_prompt_and_itself_never_its_siblings_nor_other_groups")
def other_groups_visible(right, self):
    """Sequence packing without a mask between documents, which many trainers do by default."""
    visible = (self.answer[:, None, :] == 0) | (self.answer[:, :, None] == self.answer[:, None, :])
    return visible.tril()


@replaces("data.Batch.mask",
          "test_an_answer_sees_its_prompt_and_itself_never_its_siblings_nor_other_groups")
def mask_inverted(right, self):
    """Does True mean that a token may attend, or that it must not? Libraries differ."""
    return ~right(self)


@replaces("data.Batch.mask",
          "test_an_answer_sees_its_prompt_and_itself_never_its_siblings_nor_other_groups")
def the_attending_token_asked_whether_it_is_prompt(right, self):
    """The two token dimensions are swapped where the mask asks for the prompt: the prompt sees
    everything before it, and an answer does not see its prompt."""
    group, answer = self.group, self.answer
    visible = (answer[:, :, None] == 0) | (answer[:, :, None] == answer[:, None, :])
    return (visible & (group[:, :, None] == group[:, None, :])).tril()


@replaces("data.Batch.mask",
          "test_an_answer_sees_its_prompt_and_itself_never_its_siblings_nor_other_groups")
def own_place_hidden(right, self):
    """tril(-1) is off by one: no token attends to itself, and the first one of a row has nothing to
    attend to."""
    return right(self).tril(-1)


@replaces("data.pack", "test_the_example_at_the_top_of_the_module_down_to_every_number")
def positions_not_restarted(right, encoded, row_length):
    """The positions of the second answer continue after the first answer, not after the prompt."""
    batch = right(encoded, row_length)
    positions = batch.positions.clone()
    for g in range(int(batch.group.max()) + 1):
        in_group = batch.group == g                                 # (B, T)
        positions[in_group] = torch.arange(int(in_group.sum()))
    return replace(batch, positions=positions)


@replaces("data.pack", "test_a_row_is_whole_groups_one_after_the_other_and_then_nothing")
def positions_run_through_the_row(right, encoded, row_length):
    """Packing without position ids: a prompt in mid-row does not start at position 0."""
    batch = right(encoded, row_length)
    columns = torch.arange(row_length).expand_as(batch.tokens)
    return replace(batch, positions=columns * (batch.group >= 0))


@replaces("data.pack",
          "test_each_token_of_each_answer_is_predicted_once_from_its_prompt_and_what_came_before")
def first_token_predicted_by_the_sibling(right, encoded, row_length):
    """The place before an answer in the row is the last one of the previous answer, not of the
    prompt."""
    batch = right(encoded, row_length)
    source, first = batch.source.clone(), begins(batch.answer_of)
    second = (first.roll(1) & ~first).nonzero()[:, 0]       # predicted at the place of the first
    source[second - 1] = source[second] - 1
    return replace(batch, source=source)


@replaces("data.pack",
          "test_end_of_text_and_padding_inside_an_answer_are_scored_like_any_token")
def mask_made_from_ids(right, encoded, row_length):
    """DeepSeek-Coder #163: padding is end-of-text, and with a mask made from ids no answer learns
    to end."""
    batch = right(encoded, row_length)
    return only(batch, batch.target != 0)


@replaces("data.pack", "test_a_longer_row_changes_nothing_but_padding")
def last_column_trimmed(right, encoded, row_length):
    """TRL #2332: a trim that is off by one removes the last token of the longest row."""
    batch = right(encoded, row_length)
    return only(batch, batch.source % row_length != row_length - 2)


@replaces("data.pack", "test_pairs_rankings_and_reference_follow_the_numbers_of_the_answers")
def pairs_not_renumbered(right, encoded, row_length):
    """Indices into an item are used as indices into the batch, so every pair is one of the first
    prompt."""
    pairs = [pair for item in encoded for pair in item.pairs]
    batch = right(encoded, row_length)
    return replace(batch, chosen=batch.chosen.new_tensor([w for w, _ in pairs]),
                   rejected=batch.rejected.new_tensor([l for _, l in pairs]))


@replaces("data.select_pairs", "test_taking_one_pair_of_a_ranking_takes_its_two_answers")
def reference_of_another_answer(right, item, indices):
    """Open-instruct #1144: cached reference log-probs are looked up by the wrong index."""
    selected = right(item, indices)
    if item.ref_logps is None:
        return selected
    return replace(selected, ref_logps=item.ref_logps[:len(selected.answers)])


@replaces("data.Batches.order", "test_a_batch_depends_on_seed_and_step_alone")
def order_depends_on_history(right, self, epoch):
    """OpenRLHF #1350: after a resume, data is repeated or skipped."""
    self.asked = getattr(self, "asked", {})
    self.asked.setdefault(epoch, len(self.asked))
    return right(self, self.asked[epoch])


# ------------------------------------------------------------------------------------------------
# train_sft.py: the update, the log
# ------------------------------------------------------------------------------------------------


@replaces("train_sft.warmup", "test_warm_up_is_linear_from_zero_and_then_constant")
def warm_up_from_nothing(right, step, n_warmup):
    """step / n_warmup: the learning rate of step 0 is 0, so the first batch of every run is wasted.
    """
    return min(1.0, step / max(1, n_warmup))


@replaces("train_sft.update", "test_gradients_are_clipped_to_the_norm_asked_for")
def no_clipping(right, model, optimizer, scaler, lr, clip):
    """A flag that nothing reads (vwxyzjn, rlhf-book): --clip says 1, but nothing is clipped."""
    return right(model, optimizer, scaler, lr, math.inf)


@replaces("train_sft.update", "test_gradients_are_clipped_at_their_true_size")
def clipped_before_unscaling(right, model, optimizer, scaler, lr, clip):
    """The reverse of nanoGPT's order: scaled by 65,536, every gradient is too large."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    return right(model, optimizer, scaler, lr, clip)


@replaces("train_sft.update", "test_the_scaler_is_ready_for_the_next_step")
def scaler_never_updated(right, model, optimizer, scaler, lr, clip):
    """scaler.update() is missing: in float16, the second step raises an error."""
    with mock.patch.object(scaler, "update", lambda: None):
        return right(model, optimizer, scaler, lr, clip)


@replaces("train_sft.update", "test_gradients_are_clipped_to_the_norm_asked_for")
def gradients_left_over(right, model, optimizer, scaler, lr, clip):
    """zero_grad is missing: each step adds to the gradients of all steps before it."""
    optimizer.zero_grad = lambda set_to_none=True: None
    norm = right(model, optimizer, scaler, lr, clip)
    del optimizer.zero_grad
    return norm


@replaces("train_sft.update", "test_an_update_uses_the_learning_rate_it_is_given")
def learning_rate_never_set(right, model, optimizer, scaler, lr, clip):
    """A schedule that is computed and logged, but not passed to the optimizer."""
    return right(model, optimizer, scaler, optimizer.param_groups[0]["lr"], clip)


@replaces("train_sft.grad_scaler", "test_only_float16_gradients_are_scaled")
def scaler_with_bfloat16(right, model):
    """nanoGPT #87: bfloat16 has the range of float32, so it needs no scaler."""
    return torch.amp.GradScaler(model.device.type, enabled=model.precision is not None)


@replaces("runtime.parallel.set_precision", "test_parameters_stay_float32_in_every_precision")
def weights_in_half_precision(right, model, precision):
    """bfloat16 weights lose updates of DPO's size: at learning rate 5e-7, a hundred steps of Adam
    change one weight in a hundred."""
    right(model, precision)
    if model.precision:
        model.to(model.precision)


@replaces("data.micro_batches", "test_micro_batches_hold_every_prompt_once")
def last_micro_batch_dropped(right, *arguments):
    """minimind, OpenRLHF #1350: n micro-batches of len // n items each; the remainder is never
    used."""
    *others, last = right(*arguments)
    return others or [last]


@replaces("data.batches_in_order", "test_evaluation_counts_every_held_out_pair_once")
def last_evaluation_batch_dropped(right, items, row_length, model, size=32):
    """OpenRLHF #1332: drop_last in an evaluation."""
    return right(items[:max(size, len(items) // size * size)], row_length, model, size)


@replaces("runtime.run.Log.add", "test_log_means_are_sums_over_counts_since_the_last_line")
def mean_of_means(right, self, count, **sums):
    """OpenRLHF #1336: a small batch counts as much as a large one."""
    return right(self, 1, **{name: value / count for name, value in sums.items()})


@replaces("runtime.run.Log.add", "test_log_means_are_sums_over_counts_since_the_last_line")
def last_micro_batch_alone_is_logged(right, self, count, **sums):
    """torchtune: the numbers shown for a step are those of its last micro-batch."""
    for name in sums:
        self.sums[name] = self.counts[name] = 0
    return right(self, count, **sums)


@replaces("runtime.run.Log.write", "test_a_number_that_is_not_finite_stops_the_run")
def nan_becomes_zero(right, self, step):
    """smol-course #61: the log shows "loss 0.0", and training continues although the weights are
    ruined."""
    for name, value in self.sums.items():
        self.sums[name] = value if math.isfinite(value) else 0.0
    return right(self, step)


# ------------------------------------------------------------------------------------------------
# train_dpo.py: the mathematics
# ------------------------------------------------------------------------------------------------


@replaces("train_dpo.bradley_terry", "test_bradley_terry_is_equation_16_written_out")
def probability_for_its_logarithm(right, r_w, r_l):
    """The loss is -sigma instead of -log sigma: its gradient vanishes for the pairs that are ranked
    worst."""
    return right(r_w, r_l).exp()


@replaces("train_dpo.dpo_loss", "test_dpo_loss_is_appendix_b_written_out")
def beta_forgotten(right, pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """The loss works without beta, but at beta 1 the policy hardly moves."""
    losses, _ = right(pi_logps, ref_logps, yw_idxs, yl_idxs, 1.0)
    _, rewards = right(pi_logps, ref_logps, yw_idxs, yl_idxs, beta)
    return losses, rewards


@replaces("train_dpo.dpo_loss", "test_dpo_loss_is_appendix_b_written_out")
def beta_squared(right, pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """The rewards already contain beta, and the loss multiplies them by beta again."""
    losses, _ = right(pi_logps, ref_logps, yw_idxs, yl_idxs, beta * beta)
    _, rewards = right(pi_logps, ref_logps, yw_idxs, yl_idxs, beta)
    return losses, rewards


@replaces("train_dpo.dpo_loss",
          "test_erratum_equation_21_prints_the_loss_of_the_reversed_preference")
def swapped_in_the_loss(right, pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Equation 21 as the paper prints it: -log sigma(rhat_l - rhat_w)."""
    return right(pi_logps, ref_logps, yl_idxs, yw_idxs, beta)


@replaces("train_dpo.dpo_loss", "test_dpo_loss_is_appendix_b_written_out")
def loss_negated(right, *arguments, **named):
    """The loss has the wrong sign: log sigma instead of -log sigma."""
    losses, rewards = right(*arguments, **named)
    return -losses, rewards


@replaces("train_dpo.dpo_loss", "test_dpo_loss_is_appendix_b_written_out")
def reference_forgotten(right, pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """TRL #2431: the reference log-probs are computed, cached and never used."""
    return right(pi_logps, ref_logps * 0, yw_idxs, yl_idxs, beta)


@replaces("train_dpo.dpo_loss", "test_rewards_carry_no_gradient_and_losses_do")
def rewards_not_detached(right, pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """The rewards are returned without .detach(): a graph is kept alive for a number on the screen,
    or the number is trained on by mistake."""
    losses, _ = right(pi_logps, ref_logps, yw_idxs, yl_idxs, beta)
    return losses, beta * (pi_logps - ref_logps)


@replaces("train_dpo.dpo_loss", "test_each_pair_has_its_own_loss_whatever_else_is_in_the_batch")
def loss_averaged_inside(right, *arguments, **named):
    """The caller averages again, and each micro-batch has a different denominator."""
    losses, rewards = right(*arguments, **named)
    return losses.mean().expand_as(losses), rewards


@replaces("train_dpo.dpo_loss", "test_losses_and_gradients_are_right_at_huge_margins")
def logarithm_of_a_sigmoid(right, pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """torch.log(torch.sigmoid(z)) is -inf at z = -1000."""
    losses, rewards = right(pi_logps, ref_logps, yw_idxs, yl_idxs, beta)
    ratios = pi_logps - ref_logps
    return -(beta * (ratios[yw_idxs] - ratios[yl_idxs])).sigmoid().log(), rewards


@replaces("train_dpo.dpo_loss", "test_dpo_loss_is_appendix_b_written_out")
def ratio_of_probabilities_compared(right, pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """pi / pi_ref instead of its logarithm: right to first order at the start, and nowhere else."""
    _, rewards = right(pi_logps, ref_logps, yw_idxs, yl_idxs, beta)
    ratios = pi_logps.exp() / ref_logps.exp()
    return -(beta * (ratios[yw_idxs] - ratios[yl_idxs])).sigmoid().log(), rewards


@replaces("train_dpo.implicit_reward", "test_rewards_are_beta_times_the_log_ratio_of_every_answer")
def rewards_without_beta(right, pi_logps, ref_logps, beta):
    """rasbt/LLMs-from-scratch: the margins in the log are not those of the loss."""
    return right(pi_logps, ref_logps, 1.0)


@replaces("train_dpo.dpo_gradient", "test_closed_form_gradient_is_the_one_autograd_finds")
def sign_swapped_as_printed_in_a4(right, pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """The last gradient of A.4 as printed: the weight is sigma(rhat_w - rhat_l)."""
    r = beta * (pi_logps - ref_logps)
    weights = beta * (r[yw_idxs] - r[yl_idxs]).sigmoid()
    gradient = torch.zeros_like(pi_logps)
    return gradient.index_add(0, yw_idxs, -weights).index_add(0, yl_idxs, weights)


@replaces("train_dpo.dpo_gradient", "test_gradients_of_the_pairs_of_four_ranked_answers_add_up")
def pairs_of_one_answer_overwritten(right, pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """gradient[yw_idxs] -= weights: if an index occurs twice, only one of the updates counts."""
    r = beta * (pi_logps - ref_logps)
    weights = beta * (r[yl_idxs] - r[yw_idxs]).sigmoid()
    gradient = torch.zeros_like(pi_logps)
    gradient[yw_idxs] -= weights
    gradient[yl_idxs] += weights
    return gradient


@replaces("train_dpo.dpo_gradient", "test_the_first_gradient_is_half_of_beta")
def gradient_without_beta(right, *arguments):
    """The weight lacks the factor beta: the direction is right, but the gradient is ten times too
    long."""
    return right(*arguments) / arguments[-1]


@replaces("train_dpo.plackett_luce", "test_plackett_luce_sums_to_one_over_all_rankings")
def every_draw_among_all_answers(right, rewards, ranking):
    """A product of softmaxes over all answers: no answer is ever taken out of the urn."""
    drawn = ranking >= 0
    r = rewards[ranking.clamp(min=0)].masked_fill(~drawn, -math.inf)
    logps = r - r.logsumexp(-1, keepdim=True)
    return logps.masked_fill(~drawn, 0).sum(-1)


@replaces("train_dpo.plackett_luce", "test_plackett_luce_of_three_answers_worked_out_on_paper")
def ranking_read_worst_first(right, rewards, ranking):
    """The same formula from the other end; for pairs, it is the reversed preference."""
    return right(-rewards, ranking)


@replaces("train_dpo.plackett_luce",
          "test_a_ranking_padded_with_minus_one_is_the_shorter_ranking")
def padding_taken_for_the_last_answer(right, rewards, ranking):
    """-1 is a valid index too: that of the last answer."""
    return right(rewards, ranking % len(rewards))


@replaces("train_dpo.plackett_luce_loss",
          "test_rewards_of_rankings_carry_no_gradient_and_losses_do")
def ranking_rewards_not_detached(right, pi_logps, ref_logps, rankings, beta):
    """The rewards, which are only shown, keep their graph."""
    losses, _ = right(pi_logps, ref_logps, rankings, beta)
    return losses, beta * (pi_logps - ref_logps)


@replaces("train_dpo.log_partition", "test_partition_is_the_sum_over_all_answers")
def beta_times_the_reward(right, ref_logps, rewards, beta):
    """exp(beta r): beta is on the wrong side, and its effect is explained the wrong way round
    (rasbt, cell 83)."""
    return right(ref_logps, rewards * beta * beta, beta)


@replaces("train_dpo.log_partition", "test_partition_is_the_sum_over_all_answers")
def partition_without_the_reference(right, ref_logps, rewards, beta):
    """sum_y exp(r / beta): the softmax of the reward, as if pi_ref were uniform."""
    return right(ref_logps * 0, rewards, beta)


@replaces("train_dpo.log_partition", "test_every_prompt_has_its_own_partition")
def one_partition_for_all_prompts(right, ref_logps, rewards, beta):
    """Z depends on x. If it is summed over the batch as well, it does not cancel."""
    return right(ref_logps.flatten(), rewards.flatten(), beta).expand(ref_logps.shape[:-1])


@replaces("train_dpo.optimal_policy", "test_optimal_policy_is_a_distribution")
def partition_left_out(right, ref_logps, rewards, beta):
    """pi_ref exp(r / beta) sums to Z, not to one."""
    return ref_logps + rewards / beta


@replaces("train_dpo.unlikelihood_loss",
          "test_unlikelihood_is_minus_the_difference_of_log_probs")
def unlikelihood_with_a_sigmoid(right, pi_logps, yw_idxs, yl_idxs):
    """With a sigmoid this is DPO without a reference, and the baseline of C.3 no longer
    degenerates."""
    return -(-right(pi_logps, yw_idxs, yl_idxs)).sigmoid().log()


# ------------------------------------------------------------------------------------------------
# train_dpo.py: the step, the loop, the log
# ------------------------------------------------------------------------------------------------


@replaces("train_dpo.objective", "test_training_lowers_the_loss_and_ranks_the_answers")
def reference_is_the_live_policy(right, logps, batch, args):
    """TRL #2057: one model under two names. The reference moves with the policy, and the loss stays
    at log 2."""
    return right(logps, replace(batch, ref_logps=logps.detach()), args)


@replaces("train_dpo.objective", "test_the_first_step_of_training_moves_the_policy")
def reference_not_detached(right, logps, batch, args):
    """The reference is the live policy with its graph: the two gradients cancel and nothing is
    learned."""
    return right(logps, replace(batch, ref_logps=logps), args)


@replaces("train_dpo.objective", "test_accumulation_changes_nothing_but_memory")
def accumulation_unscaled(right, logps, batch, args):
    """TRL #2615, and again in 2026: each micro-batch is averaged, and the means are added."""
    losses, rewards = right(logps, batch, args)
    return losses * (args.batch / max(1, len(losses))), rewards


@replaces("train_dpo.train", "test_the_reference_does_not_move_with_the_policy")
def reference_moves_on_resume(right, policy, preferences, held_out, args, *more, **named):
    """OneTrainer #1403: after a resume, the reference is the half-trained policy."""
    right(policy, preferences, held_out, args, *more, **named)
    sys.modules["train_dpo"].add_reference(policy, preferences, args)


@replaces("train_dpo.check_start", "test_the_reference_is_used_and_belongs_to_its_answer")
def a_wrong_start_goes_unnoticed(right, *arguments):
    """Official code, #34: policy and reference are in different precision, and nothing reports
    it."""


@replaces("train_dpo.describe", "test_a_tie_is_half_right")
def ties_as_wrong(right, logps, rewards, batch, *more, **named):
    """rewards_w > rewards_l: before the first step, the accuracy is 0."""
    wins = (rewards[batch.chosen] > rewards[batch.rejected]).sum()
    return right(logps, rewards, batch, *more, **named) | {"accuracy": wins}


@replaces("train_dpo.describe", "test_a_step_never_waits_for_the_device")
def numbers_read_in_every_step(right, *arguments, **named):
    """TRL's step has ten or more calls of .item(): the GPU is idle while the host catches up."""
    return {name: value.item() for name, value in right(*arguments, **named).items()}


@replaces("train_dpo.describe", "test_each_number_on_the_screen_is_the_sum_of_its_column")
def chosen_and_rejected_rewards_swapped(right, *arguments, **named):
    """Two columns of the log have each other's names."""
    sums = right(*arguments, **named)
    return sums | {"chosen_reward": sums["rejected_reward"],
                   "rejected_reward": sums["chosen_reward"]}


@replaces("train_dpo.parse_args", "test_defaults_are_those_of_appendix_b")
def learning_rate_of_sft(right, argv):
    """LLaMA-Factory #7734, TRL #1236: at 1e-4, a pretrained policy loses its language."""
    args = right(argv)
    if not any(flag.startswith("--lr") for flag in argv):
        args.lr = 1e-4
    return args


# ------------------------------------------------------------------------------------------------
# sample.py: measuring
# ------------------------------------------------------------------------------------------------


@replaces("sample.evaluate", "test_kl_and_win_rate_are_what_their_names_say")
def kl_backwards(right, *arguments, **named):
    """The mean of log pi_ref - log pi over samples from pi is minus the KL divergence."""
    measures, texts = right(*arguments, **named)
    for values in measures.values():
        values["kl"] = -values["kl"]
    return measures, texts


@replaces("sample.sample_answers", "test_kl_and_win_rate_are_what_their_names_say")
def kl_of_another_temperature(right, model, prompts, max_new_tokens, seed, eot, temperature=1.0,
                              *more, **named):
    """Sampled at temperature 0.5 because it reads better, but scored at 1: this is the KL of no
    policy."""
    return right(model, prompts, max_new_tokens, seed, eot, temperature / 2, *more, **named)


@replaces("sample.evaluate", "test_kl_and_win_rate_are_what_their_names_say")
def ties_counted_for_the_policy(right, policies, reference, prompts, tokenizer, max_new_tokens,
                                seed, grades=None, *more):
    """>= instead of >: a policy that writes the same as its baseline always wins."""
    calls = itertools.count(1)

    def slightly_more_each_time(texts):                 # the policy is measured after its baseline
        return [reward + 1e-9 * next(calls) for reward in grades["reward"](texts)]
    biased = grades | {"reward": slightly_more_each_time} if grades else None
    return right(policies, reference, prompts, tokenizer, max_new_tokens, seed, biased, *more)


@replaces("sample.evaluate", "test_the_answers_that_are_compared_are_independent")
def common_random_numbers(right, policies, reference, prompts, tokenizer, max_new_tokens, seed,
                          *more):
    """Policy and baseline are sampled with the same random numbers, so similar policies write
    similar texts, and the win rate is not that of independent answers."""
    sample = sys.modules["sample"].sample_answers

    def with_one_seed(model, ids, n_tokens, _, *rest, **named):
        return sample(model, ids, n_tokens, seed, *rest, **named)
    with mock.patch.object(sys.modules["sample"], "sample_answers", with_one_seed):
        return right(policies, reference, prompts, tokenizer, max_new_tokens, seed, *more)


# ------------------------------------------------------------------------------------------------
# experiments/: the reward model and PPO
# ------------------------------------------------------------------------------------------------


@replaces("experiments.reward_model.reward_loss", "test_reward_loss_is_equation_2_written_out")
def reward_of_the_rejected_answer_first(right, rewards, yw_idxs, yl_idxs):
    """The difference has the wrong sign, so the model learns to prefer what people did not."""
    return right(rewards, yl_idxs, yw_idxs)


@replaces("experiments.reward_model.reward_loss", "test_reward_loss_is_equation_2_written_out")
def rewards_regressed(right, rewards, yw_idxs, yl_idxs):
    """Rewards of 1 for chosen answers and 0 for rejected ones, by least squares: the preferences
    say nothing about single answers, and a shift by f(x) now costs something."""
    return (rewards[yw_idxs] - 1) ** 2 + rewards[yl_idxs] ** 2


@replaces("tasks.scalar_gpt.ScalarGPT.rewards",
          "test_packed_rewards_are_those_of_one_row_a_sequence")
def reward_before_the_end(right, self, batch):
    """Read one token early, at the last word: the model never sees that the answer ends."""
    return self.scalars_at((batch.last - 1).clamp(min=0), batch)


@replaces("tasks.scalar_gpt.ScalarGPT.rewards",
          "test_packed_rewards_are_those_of_one_row_a_sequence")
def reward_at_the_end_of_the_row(right, self, batch):
    """Read at the last column, which with padding on the right is padding for all but the longest
    answer."""
    T = batch.tokens.size(1)
    return self.scalars_at(batch.last // T * T + T - 1, batch)


@replaces("tasks.scalar_gpt.ScalarGPT.values", "test_the_value_of_a_token_is_read_before_it")
def value_after_the_token(right, self, batch):
    """The critic already knows the token whose outcome it is to predict."""
    after = torch.where(batch.source + 1 < batch.tokens.numel(), batch.source + 1, batch.source)
    return self.scalars_at(after, batch)


@replaces("experiments.reward_model.normalise",
          "test_normalised_rewards_have_mean_0_and_deviation_1_and_the_same_order")
def normalised_bias_not_scaled(right, model, items, row_length):
    """The shift is applied before the scale, but the bias is left as it was."""
    bias = model.scalar.bias.detach().clone()
    right(model, items, row_length)
    with torch.no_grad():
        model.scalar.bias.copy_(bias)


@replaces("experiments.ppo.token_rewards",
          "test_a_token_more_likely_than_under_the_reference_is_penalised")
def kl_rewarded(right, logps, ref_logps, scores, mask, beta):
    """The sign of the KL penalty: moving away from the reference pays."""
    return right(logps, ref_logps, scores, mask, -beta)


@replaces("experiments.ppo.token_rewards",
          "test_the_score_is_on_the_last_token_and_never_on_padding")
def score_in_the_last_column(right, logps, ref_logps, scores, mask, beta):
    """The score stands in the last column of the matrix, which is padding for the shorter
    answers."""
    return right(logps, ref_logps, scores, torch.ones_like(mask), beta)


@replaces("experiments.ppo.token_rewards",
          "test_the_score_is_on_the_last_token_and_never_on_padding")
def score_before_end_of_text(right, logps, ref_logps, scores, mask, beta):
    """Off by one: the score stands on the last token but one."""
    shorter = mask.clone()
    shorter[torch.arange(len(mask)), (mask.sum(1) - 1).clamp(min=0)] = False
    shorter[:, 0] = True
    return right(logps, ref_logps, scores, shorter, beta)


@replaces("experiments.ppo.token_rewards",
          "test_rewards_of_the_tokens_sum_to_the_kl_constrained_reward")
def kl_as_an_absolute_value(right, logps, ref_logps, scores, mask, beta):
    """|log pi - log pi_ref| as an "estimate of the KL": it is never negative, but its mean is not
    the KL."""
    return right((logps - ref_logps).abs(), torch.zeros_like(logps), scores, mask, beta)


@replaces("experiments.ppo.gae",
          "test_gae_is_the_discounted_sum_of_later_temporal_differences")
def gae_off_by_one(right, rewards, values, gamma, lam):
    """The value of the token itself where that of the next one belongs."""
    shifted = torch.cat([values[:, :1], values[:, :-1]], dim=1)
    return right(rewards, shifted, gamma, lam)


@replaces("experiments.ppo.gae",
          "test_with_lambda_1_the_advantage_is_what_followed_minus_what_was_expected")
def gae_without_the_critic(right, rewards, values, gamma, lam):
    """The values are left out, so that every token of a good answer looks good."""
    return right(rewards, torch.zeros_like(values), gamma, lam)


@replaces("experiments.ppo.gae",
          "test_gae_is_the_discounted_sum_of_later_temporal_differences")
def earlier_tokens_decay_by_lambda_alone(right, rewards, values, gamma, lam):
    """A_t = delta_t + lam A_(t+1): the factor gamma is missing."""
    advantage, advantages = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards)
    for t in reversed(range(rewards.size(1))):
        after = values[:, t + 1] if t + 1 < rewards.size(1) else 0.0
        advantage = rewards[:, t] + gamma * after - values[:, t] + lam * advantage
        advantages[:, t] = advantage
    return advantages


@replaces("experiments.ppo.gae",
          "test_gae_is_the_discounted_sum_of_later_temporal_differences")
def lambda_for_gamma(right, rewards, values, gamma, lam):
    """The two coefficients are swapped, which at 1 and 0.95 discounts the rewards."""
    return right(rewards, values, lam, gamma)


@replaces("experiments.ppo.whiten",
          "test_whitened_advantages_have_mean_0_and_deviation_1_over_the_tokens_alone")
def whitened_with_the_mean_kept(right, advantages, mask):
    """Only scaled: if all rewards are positive, every token is pushed up."""
    kept = advantages[mask]
    return torch.where(mask, advantages / (kept.std() + 1e-8), 0.0)


@replaces("experiments.ppo.whiten",
          "test_whitened_advantages_have_mean_0_and_deviation_1_over_the_tokens_alone")
def whitened_over_padding(right, advantages, mask):
    """No mask: mean and deviation depend on how long the longest answer is."""
    return right(advantages, torch.ones_like(mask))


@replaces("experiments.ppo.whiten",
          "test_whitened_advantages_have_mean_0_and_deviation_1_over_the_tokens_alone")
def padding_shifted_as_well(right, advantages, mask):
    """Mean and deviation are right, but padding is shifted too and no longer zero."""
    kept = advantages[mask]
    return (advantages - kept.mean()) / (kept.std() + 1e-8)


@replaces("experiments.ppo.clipped_loss",
          "test_where_nothing_has_moved_the_gradient_is_that_of_reinforce")
def ratio_of_the_policy_to_itself(right, logps, old_logps, advantages, clip):
    """The old log-probs are computed again by the policy in training, with their gradient: the
    ratio is always 1 and nothing is learned."""
    return right(logps, logps, advantages, clip)


@replaces("experiments.ppo.clipped_loss",
          "test_a_token_that_moved_far_enough_is_not_pushed_further_but_may_come_back")
def clipped_ratio_alone(right, logps, old_logps, advantages, clip):
    """Without the minimum of the two: a token that moved too far the wrong way has no gradient
    back."""
    ratios = (logps - old_logps).exp().clamp(1 - clip, 1 + clip)
    return -ratios * advantages


@replaces("experiments.ppo.clipped_loss",
          "test_clipped_loss_is_the_smaller_of_two_objectives_written_out")
def maximum_of_the_objectives(right, logps, old_logps, advantages, clip):
    """torch.max for torch.min: the loss is negated, so it is the objective of which the minimum is
    meant."""
    ratios = (logps - old_logps).exp()
    return -torch.max(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)


@replaces("experiments.ppo.clipped_value_loss",
          "test_clipped_value_loss_is_the_larger_of_two_errors_written_out")
def smaller_error_of_the_value(right, values, old_values, returns, clip):
    """torch.min for torch.max: the clip now hides errors instead of keeping values from jumping."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.min((values - returns) ** 2, (clipped - returns) ** 2)


@replaces("experiments.ppo.advantages_and_returns",
          "test_returns_have_the_scale_of_the_rewards_and_advantages_are_whitened_after_that")
def returns_of_whitened_advantages(right, rolled, beta):
    """The critic learns whitened advantages plus its own values, which say nothing about the
    rewards."""
    advantages, _ = right(rolled, beta)
    return advantages, advantages + rolled.values


@replaces("experiments.ppo.by_token",
          "test_what_a_rollout_notes_is_constant")
def advantages_through_the_critic(right, model, numbers_of, items):
    """The values keep their gradient, so the policy's loss trains the critic to be pessimistic."""
    return right.__wrapped__(model, numbers_of, items)


@replaces("experiments.ppo.sample_answers",
          "test_the_log_probs_noted_are_those_of_the_distribution_that_was_sampled")
def rollout_at_another_temperature(right, *arguments, **named):
    """Sampled at temperature 0.7, but scored at 1: the answers are not those of the policy whose
    ratio is computed."""
    return right(*arguments, temperature=0.7, **named)


@replaces("experiments.ppo.rollout",
          "test_an_unfinished_answer_has_the_stated_reward_and_a_finished_one_its_own")
def unfinished_answers_scored(right, policy, value_model, reference, prompts, score_answers,
                              *more):
    """Answers that were cut get the reward of their beginning, so the policy learns to ramble on
    after a good first sentence."""
    scores = []

    def noting(items):
        scores.extend(score_answers(items))
        return scores
    rolled = right(policy, value_model, reference, prompts, noting, *more)
    return replace(rolled, scores=rolled.scores.new_tensor(scores))


@replaces("experiments.ppo.Penalty.adapt",
          "test_beta_goes_up_when_the_kl_is_above_its_target_and_by_a_bounded_factor")
def beta_goes_the_other_way(right, self, kl, n_answers):
    """The error is target / KL - 1: above the target the penalty gets weaker."""
    if self.target is not None:
        return right(self, self.target ** 2 / max(kl, 1e-9), n_answers)


# ------------------------------------------------------------------------------------------------
# experiments/: a round of online DPO
# ------------------------------------------------------------------------------------------------


@replaces("experiments.online.sample_round",
          "test_a_round_compares_answers_of_the_policy_as_it_is_now")
def answers_of_round_0_again(right, policy, reference, *more):
    """Every round ranks answers of the SFT model: that is offline DPO with more of them."""
    return right(reference, reference, *more)


@replaces("experiments.online.sample_round",
          "test_fresh_answers_have_the_log_probs_of_the_reference")
def reference_moves_with_the_policy(right, policy, reference, *more):
    """TRL #1824: each round starts from the last one's result as its reference, so nothing keeps
    the policy near the SFT model, and the KL that is reported is that of one round."""
    return right(policy, policy, *more)


@replaces("experiments.online.sample_round",
          "test_fresh_answers_have_the_log_probs_of_the_reference")
def reference_logps_of_stale_answers(right, policy, reference, prompts, score_answers, eot, number,
                                     args):
    """The log-probs are computed once, as in offline DPO, and belong to answers of an earlier
    round."""
    fresh, *rest = right(policy, reference, prompts, score_answers, eot, number, args)
    stale, *_ = right(policy, reference, prompts, score_answers, eot, number + 1, args)
    for item, earlier in zip(fresh, itertools.cycle(stale)):
        ref_logps = itertools.cycle(earlier.ref_logps)
        item.ref_logps = list(itertools.islice(ref_logps, len(item.answers)))
    return fresh, *rest


@replaces("experiments.online.sample_round",
          "test_the_judge_reads_each_prompt_once_followed_by_an_answer")
def judge_reads_the_prompt_twice(right, policy, reference, prompts, score_answers, *more):
    """The judge joins prompt and answer itself, but is given the whole text as the answer."""
    def judge(items):
        return score_answers([replace(item, answers=[[*item.prompt, *item.answers[0]]])
                              for item in items])
    return right(policy, reference, prompts, judge, *more)


@replaces("experiments.online.sample_round",
          "test_every_round_draws_other_answers_and_the_same_in_another_run")
def same_random_numbers_in_each_round(right, policy, reference, prompts, score_answers, eot, number,
                                      args):
    """The seed is that of the run in every round, so a policy that has moved little writes nearly
    the same answers again."""
    return right(policy, reference, prompts, score_answers, eot, 0, args)


@replaces("experiments.online.rank_answers",
          "test_the_better_answer_of_every_pair_is_the_chosen_one_and_ties_make_no_pair")
def ties_kept_in_a_round(right, prompt, answers, rewards):
    """Answers of equal reward are compared as well: the one that was sampled first wins."""
    ranking = sorted(range(len(answers)), key=lambda i: -rewards[i])
    return {"prompt": prompt, "answers": answers, "ranking": ranking, "rewards": rewards}


# ------------------------------------------------------------------------------------------------
# What the mutants return
# ------------------------------------------------------------------------------------------------


@functools.cache
def results_of_mutants():
    """{function: [[what a mutant returns for the function's probe, the mutant's description]]}, for
    probes.py to recognize a mutant by."""
    found = {}
    for mutant in MUTANTS.values():
        if mutant.target in PROBES:
            _, _, right = find(mutant.target)
            result = result_of(mutant.target, functools.partial(mutant.wrong, right))
            if result is not None:
                found.setdefault(mutant.target, []).append([result, mutant.description])
    return found


# ------------------------------------------------------------------------------------------------
# Putting a mutant in place
# ------------------------------------------------------------------------------------------------


def find(target):
    """(answer_of, name, value) of "module.function" or "module.Class.method". Raises UserError."""
    module, path = split_target(target)
    *path, name = path.split(".")
    try:
        answer_of = importlib.import_module(module)
        for attribute in path:
            answer_of = getattr(answer_of, attribute)
        return answer_of, name, vars(answer_of)[name]
    except (ImportError, AttributeError, KeyError):
        raise UserError(f"{target} no longer exists, but classroom/wrong_answers.py or "
                        "classroom/exercises.py names it") from None


def our_modules():
    """All modules that may have imported the function that a mutant replaces."""
    modules = []
    for path in sandbox.source_files("runtime", "tasks", "experiments"):
        module_name = ".".join(path.relative_to(sandbox.ROOT).with_suffix("").parts)
        modules.append(importlib.import_module(module_name.removesuffix(".__init__")))
    return modules


def apply(mutant_name):
    """Replace a function with its mutant, in every module that has imported it."""
    mutant = MUTANTS[mutant_name]
    answer_of, name, right = find(mutant.target)

    @functools.wraps(right)
    def wrong(*arguments, **named):
        return mutant.wrong(right, *arguments, **named)
    del wrong.__wrapped__
    setattr(answer_of, name, wrong)
    for module in our_modules():
        for key, value in list(vars(module).items()):
            if value is right:
                setattr(module, key, wrong)


# ------------------------------------------------------------------------------------------------
# Our own tests against the mutants
# ------------------------------------------------------------------------------------------------


def run_mutants(names, folder, tests_of, jobs, **settings):
    """{name of a mutant: Outcome} of the tests tests_of(name) with the mutant in place, each in a
    process of its own."""
    runs = [sandbox.TestRun(folder, tests_of(name), SECONDS,
                        before=("classroom.wrong_answers.apply", name), **settings)
            for name in names]
    outcomes = sandbox.run_all(runs, jobs, "classroom.wrong_answers.our_modules", "mutants")
    return dict(zip(names, outcomes))


def failures(outcome):
    """{name of a test that failed: details}."""
    return {name_of_test(node): details for node, (result, details) in outcome.claims.items()
            if result in ("failed", "error")}


def against_our_tests(names, every, jobs):
    """{name of a mutant: (whether it was caught, what to print)}. Each mutant meets the test that
    should catch it. Only a mutant that passes it, or with every=True each, meets all the others."""
    gone = {name: (False, f"{MUTANTS[name].test} no longer exists") for name in names
            if MUTANTS[name].test not in claims()}
    names = [name for name in names if name not in gone]
    outcomes = run_mutants(
        names, sandbox.ROOT,
        lambda name: [f"tests/{claims()[MUTANTS[name].test][0]}::{MUTANTS[name].test}"], jobs)
    failed = {name: failures(outcome) for name, outcome in outcomes.items()}
    missed = [name for name in names if every or not failed[name]]
    if missed:
        files = [f"tests/{file}" for file in FILES]
        others = run_mutants(missed, sandbox.ROOT, lambda name: files, jobs, stop=not every,
                             skip=SLOW)
        for name, outcome in others.items():
            failed[name] |= failures(outcome)
            outcomes[name] = outcome
    return gone | {name: verdict(MUTANTS[name].test, failed[name], outcomes[name].end)
                   for name in names}


def verdict(test, failed, end):
    """(whether a mutant was caught by its test, what to print). failed: the failures of its run."""
    for details in failed.values():
        if is_broken(details):
            return False, f"the mutant itself is broken: {details.splitlines()[0]}"
    if test in failed:
        return True, " ".join(failed)
    if failed:
        return False, f"caught by {' '.join(failed)}, but not by {test}"
    return False, f"caught by no test, not even by {test}; {end}".removesuffix("; ")


def is_broken(details):
    """Whether a failure shows that a mutant no longer fits the function that it replaces. A mutant
    should compute wrong numbers, not raise such errors."""
    errors = ("TypeError", "AttributeError", "NameError", "ImportError")
    return any(line.startswith(errors) or "no longer exists" in line
               for line in details.splitlines())


# ------------------------------------------------------------------------------------------------
# Somebody else's tests against the mutants
# ------------------------------------------------------------------------------------------------


def against_their_tests(path, names, jobs):
    """Run a file of tests against mutants. Returns ({name of a mutant: (whether it was caught, what
    to print)}, {test that fails on the correct code: details}). Raises UserError."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        file = f"tests/{path.name}"
        sandbox.copy_sources(copy, EXERCISES.values(), ["sandbox.py", "wrong_answers.py"])
        if (copy / file).exists():
            raise UserError(f"--tests {path}: choose another name for this file")
        shutil.copy(path, copy / file)
        on_correct_code, = sandbox.run_all([sandbox.TestRun(copy, [file], SECONDS, guarded=True)])
        if on_correct_code.end:
            raise UserError(f"--tests {path}: {on_correct_code.end}")
        usable, wrong_tests = [], {}
        for node, (result, details) in on_correct_code.claims.items():
            if result == "passed":
                usable.append(node)
            else:
                wrong_tests[node] = details
        if not usable:
            return dict.fromkeys(names, (False, "")), wrong_tests
        outcomes = run_mutants(names, copy, lambda name: usable, jobs, guarded=True, stop=True)
        results = {}
        for name, outcome in outcomes.items():
            failed = failures(outcome)
            results[name] = bool(failed), " ".join(failed) or "not caught"
        return results, wrong_tests


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="mutants to run (default: all)")
    add("--all", action="store_true",
        help="do not stop at the first failing test, but list every test that fails")
    add("--tests", type=Path, metavar="FILE", help="grade this test file instead of our own tests")
    add("--list", action="store_true", help="print the mutants with their descriptions and stop")
    add("--jobs", type=number_type(int, 1), default=os.cpu_count(),
        help="mutants to run at the same time (default: one per processor)")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in MUTANTS:
            raise UserError(f"no mutant {name}; --list prints all of them")
    return args


@command
def main(argv=None):
    """Returns the exit code: 1 if our own tests did not catch every mutant."""
    args = parse_args(argv)
    names = args.names or list(MUTANTS)
    if args.list:
        for name in names:
            print(f"{name}, for {MUTANTS[name].target}\n    {MUTANTS[name].description}")
        return 0
    wrong_tests = {}
    if args.tests:
        if not args.tests.is_file():
            raise UserError(f"--tests {args.tests}: no such file")
        results, wrong_tests = against_their_tests(args.tests, names, args.jobs)
    else:
        results = against_our_tests(names, args.all, args.jobs)
    for node, details in wrong_tests.items():
        print(f"does not count, because it fails on the correct code: {node}\n"
              f"    {details.splitlines()[0]}")
    n_caught = 0
    for name, (caught, text) in results.items():
        n_caught += caught
        print(f"{'caught' if caught else 'MISSED':8}{name:40} {text}")
    print(f"{n_caught} of {len(names)} mutants caught")
    return 0 if args.tests or n_caught == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
