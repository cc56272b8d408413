"""The wrong answers: broken variants of our own functions, and the test that catches each.

    python -m classroom.wrong_answers                      # the suite against each; all must be caught
    python -m classroom.wrong_answers mean_for_sum         # only these
    python -m classroom.wrong_answers --all                # go on after the first catch: every failing test
    python -m classroom.wrong_answers --tests my_tests.py  # how many do the tests of a student catch?

Nearly all are mistakes that public DPO code really made; the line under a name says where. Each
replaces one function while the suite runs, and is a few lines around the right one (`right`) where
that will do, so that it outlives changes of what it breaks; one whose function is gone says so. The
test that it names must catch it: its name says in words what is wrong.

Left out on purpose: mutants of every operator in the code. These are the ones people write.
"""

import functools
import importlib
import math
import os
import shutil
import sys
import tempfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from tqdm import tqdm

from classroom import sandbox
from classroom.exercises import SLOW, claims, split_target
from runtime.cli import Parser, command, number_type
from runtime.errors import UserError

Mutant = namedtuple("Mutant", "name target test who wrong")
MUTANTS = {}
FILES = sorted({file for file, _ in claims().values()} - {"test_classroom.py"})
SECONDS = 300               # for one mutant; a caught one takes a few


def replaces(target, test):
    """Register a function as what stands for `target` ("module.function", "module.Class.method"):
    it is called with the right function, then with the arguments."""
    def register(wrong):
        MUTANTS[wrong.__name__] = Mutant(
            wrong.__name__, target, test, " ".join(wrong.__doc__.split()), wrong)
        return wrong
    return register


# ------------------------------------------------------------------------------------------------
# model.py: the network
# ------------------------------------------------------------------------------------------------


@replaces("model.Attention.forward", "test_no_logit_depends_on_a_later_token")
def attention_not_causal(right, self, x, mask=None, cache=None):
    """The first thing that goes wrong when attention is written by hand: no mask at all."""
    if mask is None:
        mask = x.new_ones(1, 1, x.size(1), x.size(1)).bool()
    return right(self, x, mask, cache)


@replaces("model.Attention.forward", "test_forward_is_gpt2_written_out_by_hand")
def attention_scores_unscaled(right, self, x, *more):
    """Without 1 / sqrt(D): it trains, but it is not the model whose weights were released."""
    unscaled = functools.partial(F.scaled_dot_product_attention, scale=1.0)
    with mock.patch.object(F, "scaled_dot_product_attention", unscaled):
        return right(self, x, *more)


@replaces("model.MLP.forward", "test_forward_is_gpt2_written_out_by_hand")
def gelu_without_tanh(right, self, x):
    """"gelu" for GPT-2's "gelu_new": a difference in the fourth digit that nobody sees."""
    return self.c_proj(F.gelu(self.c_fc(x)))


@replaces("model.MLP.forward", "test_training_mode_changes_nothing")
def dropout_left_on(right, self, x):
    """TRL #639: policy and reference drop different units, and what DPO sees is the noise."""
    return F.dropout(right(self, x), 0.1, self.training)


@replaces("model.GPT.head", "test_half_precision_logps_are_float32_and_close")
def softmax_in_half_precision(right, self, hidden, *more):
    """Half precision has 8 or 11 bits; a log-prob of -100 is then known to a half or so."""
    logits = right(self, hidden, *more)
    return logits if self.precision is None else logits.to(self.precision)


@replaces("model.GPT.head", "test_probabilities_of_all_next_tokens_sum_to_one")
def vocabulary_padded_with_zeros(right, self, hidden, *more):
    """50257 padded to 50304 by zero rows: a logit of 0 is enormous beside GPT-2's, near -100."""
    return F.pad(right(self, hidden, *more), (0, 47))


@replaces("model.GPT.head", "test_a_padded_vocabulary_changes_no_log_prob_and_no_gradient")
def padded_columns_not_hidden(right, self, hidden, *more):
    """The same where the padding is asked for: only a GPU asks, so only there is it wrong."""
    return right(self, hidden, *more).nan_to_num(neginf=0.0)


# ------------------------------------------------------------------------------------------------
# model.py: the log-probability of an answer
# ------------------------------------------------------------------------------------------------


def begins(owner):
    """True at the first scored token of each answer; answers lie one after the other."""
    first = owner.new_ones(len(owner)).bool()
    first[1:] = owner[1:] != owner[:-1]
    return first


def only(batch, kept):
    """A batch that scores only the tokens where kept is True."""
    return replace(batch, source=batch.source[kept], target=batch.target[kept],
                   owner=batch.owner[kept])


def prompt_tokens(batch, owner):
    """(source, target) of the prompt's tokens of one answer, but for the first, which has no
    prediction."""
    group, answer = batch.group.flatten(), batch.answer.flatten()
    mine = group[batch.source[batch.owner == owner][0]]
    target = ((group == mine) & (answer == 0)).nonzero()[1:, 0]
    return target - 1, batch.tokens.flatten()[target]


def scored(batch, tokens):
    """The batch with these scored tokens, [(source, target, owner), ...], instead of its own."""
    source, target, owner = zip(*[(s, t, t.new_full(t.shape, o)) for s, t, o in tokens])
    return replace(batch, source=torch.cat(source), target=torch.cat(target),
                   owner=torch.cat(owner))


@replaces("model.GPT.logps", "test_packed_logps_are_those_of_one_row_a_sequence")
def no_shift(right, self, batch):
    """0xallam/Direct-Preference-Optimization: a token's own place, where it is seen already."""
    return right(self, replace(batch, source=batch.source + 1))


@replaces("model.GPT.logps", "test_probabilities_of_all_next_tokens_sum_to_one")
def first_token_dropped(right, self, batch):
    """fw-ai/cookbook #388, minimind #621: the labels are shifted once more than the logits."""
    return right(self, only(batch, ~begins(batch.owner)))


@replaces("model.GPT.logps", "test_packed_logps_are_those_of_one_row_a_sequence")
def end_of_text_not_scored(right, self, batch):
    """rasbt/LLMs-from-scratch: the policy never learns where to stop."""
    return right(self, only(batch, ~begins(batch.owner.flip(0)).flip(0)))


@replaces("model.GPT.logps", "test_logps_follow_the_chain_rule")
def mean_for_sum(right, self, batch):
    """rasbt/LLMs-from-scratch, minimind #659, Liger-Kernel #693: log pi(y|x) is a sum."""
    return right(self, batch) / batch.owner.bincount(minlength=batch.n_answers)


@replaces("model.GPT.logps", "test_packed_logps_are_those_of_one_row_a_sequence")
def mean_over_the_padded_row(right, self, batch):
    """minimind #279: a mean, and over the padding too, so that it depends on the batch."""
    return right(self, batch) / batch.tokens.size(1)


@replaces("model.GPT.logps", "test_logps_follow_the_chain_rule")
def prompt_scored(right, self, batch):
    """OpenRLHF #294 (there on one side only): log pi(x, y), not log pi(y|x)."""
    more = [(*prompt_tokens(batch, n), n) for n in range(batch.n_answers)]
    return right(self, batch) + right(self, scored(batch, more))


@replaces("model.GPT.logps", "test_packed_logps_are_those_of_one_row_a_sequence")
def loss_mask_inverted(right, self, batch):
    """CosyVoice #1449: the prompt is scored and the answer is not."""
    more = [(*prompt_tokens(batch, n), n) for n in range(batch.n_answers)]
    return right(self, scored(batch, more))


@replaces("model.GPT.logps", "test_packed_logps_are_those_of_one_row_a_sequence")
def chosen_mask_on_rejected(right, self, batch):
    """CosyVoice #1449: the second answer is scored up to the length of the first."""
    lengths = batch.owner.bincount(minlength=batch.n_answers)
    place = torch.arange(len(batch.owner)) - (lengths.cumsum(0) - lengths)[batch.owner]
    return right(self, only(batch, place < lengths[batch.owner // 2 * 2]))


# ------------------------------------------------------------------------------------------------
# model.py: sampling, optimizer, checkpoints
# ------------------------------------------------------------------------------------------------


@replaces("model.GPT.hidden", "test_cached_generation_of_ragged_prompts_is_the_plain_one")
def left_padding_takes_positions(right, self, tokens, positions=None, mask=None, caches=None):
    """TRL #469, #6800: GPT-2 padded on the left, without position ids."""
    if caches:
        start, last = caches[0].length, self.config.block_size - 1
        positions = torch.arange(start, start + tokens.size(1)).clamp(max=last).expand_as(tokens)
    return right(self, tokens, positions, mask, caches)


@replaces("model.KeyValueCache.append", "test_cached_generation_of_ragged_prompts_is_the_plain_one")
def stale_cache_index(right, self, k, v):
    """Each new token is written over the one before it: off by one, and the text stays fluent."""
    if self.length and k.size(2) == 1:
        self.k[:, :, self.length - 1], self.v[:, :, self.length - 1] = k[:, :, 0], v[:, :, 0]
    return right(self, k, v)


@replaces("model.KeyValueCache.select", "test_no_answer_changes_when_others_leave_the_batch")
def first_rows_kept_whoever_left(right, self, rows):
    """A batch made smaller with [:n]: from there on, answers go on with each other's text."""
    return right(self, torch.arange(len(rows)) if len(rows) < len(self.k) else rows)


@replaces("model.choose", "test_temperature_divides_the_logits_once")
def temperature_applied_twice(right, logits, temperature, *more, **named):
    """Once by the caller and once in here: at 0.5 it samples at 0.25."""
    return right(logits / max(temperature, 1e-6), temperature, *more, **named)


@replaces("model.choose", "test_top_k_and_top_p_draw_every_one_of_those_they_leave")
def top_k_one_token_short(right, logits, temperature, top_k, *more, **named):
    """> the k-th for >= the k-th: the k-th itself is never drawn."""
    return right(logits, temperature, top_k and max(1, top_k - 1), *more, **named)


@replaces("model.choose", "test_top_k_and_top_p_draw_every_one_of_those_they_leave")
def top_p_one_token_short(right, logits, temperature, top_k, top_p, generator):
    """The token that reaches p is cut off with those beyond it."""
    if top_p is not None and temperature >= 1e-6:
        ordered, order = (logits / temperature).sort(descending=True)
        beyond = ordered.softmax(-1).cumsum(-1) >= top_p
        beyond[..., 0] = False
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    return right(logits, temperature, top_k, None, generator)


@replaces("model.choose", "test_generation_has_its_own_generator")
def sampling_moves_trainings_generator(right, logits, temperature, top_k, top_p, generator):
    """TRL #7083, nanoGPT: looking at samples changes what is trained on next."""
    return right(logits, temperature, top_k, top_p, None)


@replaces("model.choose", "test_sampled_answers_follow_the_models_own_distribution")
def one_number_for_all_rows(right, *arguments):
    """torch.rand(1) for torch.rand(B, 1): the answers to one prompt are all the same answer."""
    rand = torch.rand

    def broadcast(rows, *more, **named):
        return rand(1, *more, **named).expand(rows, 1)
    with mock.patch.object(torch, "rand", broadcast):
        return right(*arguments)


@replaces("model.GPT.optimizer", "test_weight_decay_shrinks_matrices_and_nothing_else")
def decay_on_everything(right, self, lr, weight_decay=0.0, **named):
    """AdamW(model.parameters()): biases and gains are pulled to zero as well."""
    optimizer = right(self, lr, weight_decay, **named)
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay
    return optimizer


@replaces("runtime.checkpoint.save_checkpoint", "test_a_checkpoint_brings_back_sizes_weights_and_facts")
def compiled_names_in_the_checkpoint(right, path, model, **facts):
    """nanoGPT #325: keys that begin with _orig_mod. load nowhere else."""
    weights = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    return right(path, SimpleNamespace(config=model.config, state_dict=lambda: weights), **facts)


# ------------------------------------------------------------------------------------------------
# data.py: text to ids
# ------------------------------------------------------------------------------------------------


@replaces("data.encode", "test_no_token_merges_across_the_end_of_the_prompt")
def prompt_and_answer_encoded_together(right, preference, tokenizer, row_length, *more, **named):
    """TRL #1153, #2054: a merge across the boundary, and the answer loses its first word."""
    item = right(preference, tokenizer, row_length, *more, **named)
    if item and len(item.answers) == len(preference.answers):
        n, room = len(item.prompt) - 1, row_length - len(item.prompt)
        item.answers = [(tokenizer.encode_ordinary(preference.prompt + answer)[n:]
                         + [tokenizer.eot_token])[:room] for answer in preference.answers]
    return item


def with_answers(item, change):
    """The Encoded with each answer changed; None stays None."""
    if item:
        item.answers = [change(answer) for answer in item.answers]
    return item


@replaces("data.encode", "test_an_answer_has_exactly_one_end_of_text_and_it_is_scored")
def no_end_of_text(right, preference, tokenizer, row_length, *more, **named):
    """rasbt/LLMs-from-scratch: answers that never end."""
    item = right(preference, tokenizer, row_length, *more, **named)
    return with_answers(item, lambda ids: [i for i in ids if i != tokenizer.eot_token])


@replaces("data.encode", "test_an_answer_has_exactly_one_end_of_text_and_it_is_scored")
def two_ends_of_text(right, preference, tokenizer, row_length, *more, **named):
    """TRL #4908: one from the template, one from the trainer."""
    item = right(preference, tokenizer, row_length, *more, **named)
    return with_answers(item, lambda ids: ids + ids[-1:] * (ids[-1] == tokenizer.eot_token))


@replaces("data.encode", "test_an_answer_has_all_the_row_after_its_prompt")
def end_of_text_on_cut_answers(right, preference, tokenizer, row_length, *more, **named):
    """OpenRLHF: forced onto an answer that was cut, it teaches to stop in mid-sentence."""
    item = right(preference, tokenizer, row_length, *more, **named)
    return with_answers(item, lambda ids: [*ids[:-1], tokenizer.eot_token])


@replaces("data.encode", "test_an_answer_that_only_just_fits_is_not_cut")
def cut_one_too_early(right, preference, tokenizer, row_length, *more, **named):
    """TRL #2209, official: the room of an answer is the row less the prompt, and nothing else."""
    return right(preference, tokenizer, row_length - 1, *more, **named)


@replaces("data.encode", "test_prompt_and_answers_are_encoded_apart_with_one_end_of_text_each")
def users_can_type_control_tokens(right, preference, tokenizer, *more, **named):
    """encode(..., allowed_special="all"): "<|endoftext|>" in a user's text ends it."""
    reads = functools.partial(tokenizer.encode, allowed_special="all")
    return right(preference, SimpleNamespace(eot_token=tokenizer.eot_token,
                                             encode_ordinary=reads), *more, **named)


@replaces("data.encode", "test_a_pair_whose_answers_are_equal_after_the_cut_is_dropped")
def pairs_of_equal_answers_kept(right, preference, tokenizer, row_length, *more, **named):
    """TRL #6321: cut to the same text, or to none, a pair's loss stays at log 2 for ever."""
    item = right(preference, tokenizer, row_length, *more, **named)
    if item is None and preference.pairs:
        long = right(preference, tokenizer, 10**6)
        room = row_length - len(long.prompt)
        return with_answers(long, lambda ids: ids[:room]) if room > 0 else None
    return item


@replaces("runtime.rows.parse_preference", "test_a_row_that_cannot_teach_is_left_out_and_counted")
def dialogues_split_each_at_its_own_end(right, row):
    """Official, PR #86: HH dialogues that part earlier get one prompt, and it is not theirs."""
    found, turn = right(row), "\n\nAssistant:"
    if isinstance(found, str) and "differ" in found:
        (prompt, chosen), (_, rejected) = (row[key].rsplit(turn, 1)
                                           for key in ("chosen", "rejected"))
        return prompt + turn, [chosen, rejected], [0, 1]
    return found


@replaces("data.is_held_out",
          "test_whether_a_prompt_is_held_out_is_the_same_in_every_run")
def held_out_by_pythons_hash(right, prompt):
    """hash() of a text is another in each process: a resumed run trains on what it had kept."""
    return hash(prompt) % 10 == 0


@replaces("tasks.own_file.read_split", "test_held_out_prompts_are_never_trained_on")
def held_out_prompts_trained_on(right, *arguments):
    """Held-out numbers that are training numbers."""
    training, held_out = right(*arguments)
    return training + held_out, held_out


# ------------------------------------------------------------------------------------------------
# data.py: rewards to pairs
# ------------------------------------------------------------------------------------------------


@replaces("data.rank_answers", "test_of_answers_that_tie_the_first_stands_for_all")
def ties_as_wins(right, prompt, answers, rewards):
    """sorted() puts tied answers in some order, and some order is then what is learned."""
    if len(set(rewards)) < 2:
        return None
    return {"prompt": prompt, "answers": list(answers), "rewards": list(rewards),
            "ranking": sorted(range(len(answers)), key=lambda i: -rewards[i])}


@replaces("data.rank_answers", "test_four_answers_with_four_rewards_make_six_pairs_best_first")
def worst_first(right, prompt, answers, rewards):
    """sorted() without the minus: the policy learns what people like least."""
    row = right(prompt, answers, rewards)
    return row and row | {"ranking": row["ranking"][::-1]}


@replaces("data.ranking_to_pairs", "test_a_ranking_of_three_is_three_pairs")
def best_against_worst_alone(right, ranking):
    """One pair of a ranking: C.1's four answers make six."""
    return [(ranking[0], ranking[-1])] if len(ranking) > 1 else []


@replaces("data.ranking_to_pairs", "test_a_ranking_of_three_is_three_pairs")
def chosen_and_rejected_swapped(right, ranking):
    """The two columns of a file in the other order; accuracy rises all the same."""
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
    """Causal and same group is not enough: the rejected answer reads the chosen one."""
    return (self.group[:, :, None] == self.group[:, None, :]).tril()


@replaces("data.Batch.mask",
          "test_an_answer_sees_its_prompt_and_itself_never_its_siblings_nor_other_groups")
def other_groups_visible(right, self):
    """Sequence packing without a mask between documents, a default of many trainers."""
    visible = (self.answer[:, None, :] == 0) | (self.answer[:, :, None] == self.answer[:, None, :])
    return visible.tril()


@replaces("data.Batch.mask",
          "test_an_answer_sees_its_prompt_and_itself_never_its_siblings_nor_other_groups")
def mask_inverted(right, self):
    """True where a token may look, or where it may not? Libraries differ."""
    return ~right(self)


@replaces("data.Batch.mask",
          "test_an_answer_sees_its_prompt_and_itself_never_its_siblings_nor_other_groups")
def own_place_hidden(right, self):
    """tril(-1): off by one, and the first token of a row has nothing to look at."""
    return right(self).tril(-1)


@replaces("data.pack", "test_the_example_at_the_top_of_the_module_down_to_every_number")
def positions_not_restarted(right, encoded, row_length):
    """The second answer stands where the first ends, not where its prompt does."""
    batch = right(encoded, row_length)
    positions = batch.positions.clone()
    for number in range(int(batch.group.max()) + 1):
        mine = batch.group == number
        positions[mine] = torch.arange(int(mine.sum()))
    return replace(batch, positions=positions)


@replaces("data.pack", "test_a_row_is_whole_groups_one_after_the_other_and_then_nothing")
def positions_run_through_the_row(right, encoded, row_length):
    """Packing without position ids: a later prompt starts in mid-row."""
    batch = right(encoded, row_length)
    columns = torch.arange(row_length).expand_as(batch.tokens)
    return replace(batch, positions=columns * (batch.group >= 0))


@replaces("data.pack",
          "test_each_token_of_each_answer_is_predicted_once_from_its_prompt_and_what_came_before")
def first_token_predicted_by_the_sibling(right, encoded, row_length):
    """The place before it in the row is the sibling's last, not the prompt's."""
    batch = right(encoded, row_length)
    source, first = batch.source.clone(), begins(batch.owner)
    second = (first.roll(1) & ~first).nonzero()[:, 0]       # its source is where the first stands
    source[second - 1] = source[second] - 1
    return replace(batch, source=source)


@replaces("data.pack",
          "test_end_of_text_and_padding_inside_an_answer_are_scored_like_any_token")
def mask_made_from_ids(right, encoded, row_length):
    """DeepSeek-Coder #163: with padding = end-of-text, no answer is taught to end."""
    batch = right(encoded, row_length)
    return only(batch, batch.target != 0)


@replaces("data.pack", "test_a_longer_row_changes_nothing_but_padding")
def last_column_trimmed(right, encoded, row_length):
    """TRL #2332: a trim that is off by one eats the last token of the longest row."""
    batch = right(encoded, row_length)
    return only(batch, batch.source % row_length != row_length - 2)


@replaces("data.pack", "test_pairs_rankings_and_reference_follow_the_numbers_of_the_answers")
def pairs_not_renumbered(right, encoded, row_length):
    """Indices of an item taken for indices of the batch: every pair is one of the first prompt."""
    pairs = [pair for item in encoded for pair in item.pairs]
    batch = right(encoded, row_length)
    return replace(batch, winners=batch.winners.new_tensor([w for w, _ in pairs]),
                   losers=batch.losers.new_tensor([l for _, l in pairs]))


@replaces("data.select_pairs", "test_taking_one_pair_of_a_ranking_takes_its_two_answers")
def reference_of_another_answer(right, item, numbers):
    """Open-instruct #1144: cached reference log-probs by the wrong index."""
    part = right(item, numbers)
    return replace(part, ref_logps=item.ref_logps and item.ref_logps[:len(part.answers)])


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
def warm_up_from_nothing(right, step, steps):
    """step / steps: the first batch of every run is thrown away."""
    return min(1.0, step / max(1, steps))


@replaces("train_sft.update", "test_gradients_are_clipped_to_the_norm_asked_for")
def no_clipping(right, model, optimizer, scaler, lr, clip):
    """A flag that nothing reads (vwxyzjn, rlhf-book): --clip says 1, and nothing is clipped."""
    return right(model, optimizer, scaler, lr, math.inf)


@replaces("train_sft.update", "test_gradients_are_clipped_at_their_true_size")
def clipped_before_unscaling(right, model, optimizer, scaler, lr, clip):
    """nanoGPT's order, the other way round: scaled by 65,536, every gradient is too large."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    return right(model, optimizer, scaler, lr, clip)


@replaces("train_sft.update", "test_gradients_are_clipped_to_the_norm_asked_for")
def gradients_left_over(right, model, optimizer, scaler, lr, clip):
    """No zero_grad: each step adds to the gradient of all before it."""
    optimizer.zero_grad = lambda set_to_none=True: None
    norm = right(model, optimizer, scaler, lr, clip)
    del optimizer.zero_grad
    return norm


@replaces("train_sft.update", "test_an_update_uses_the_learning_rate_it_is_given")
def learning_rate_never_set(right, model, optimizer, scaler, lr, clip):
    """A schedule that is computed, logged, and not given to the optimizer."""
    return right(model, optimizer, scaler, optimizer.param_groups[0]["lr"], clip)


@replaces("train_sft.grad_scaler", "test_only_float16_gradients_are_scaled")
def scaler_with_bfloat16(right, model):
    """nanoGPT #87: bfloat16 has the range of float32 and needs none."""
    return torch.amp.GradScaler(model.device.type, enabled=model.precision is not None)


@replaces("runtime.parallel.set_precision", "test_parameters_stay_float32_in_every_precision")
def weights_in_half_precision(right, model, precision):
    """bfloat16 weights lose DPO-sized updates: at 5e-7, a hundred steps of Adam move one in a
    hundred of them."""
    right(model, precision)
    if model.precision:
        model.to(model.precision)


@replaces("data.micro_batches", "test_micro_batches_hold_every_prompt_once")
def last_micro_batch_dropped(right, *arguments):
    """minimind, OpenRLHF #1350: len // n of n parts, and the rest is never seen."""
    *others, last = right(*arguments)
    return others or [last]


@replaces("data.batches_in_order", "test_evaluation_counts_every_held_out_pair_once")
def last_evaluation_batch_dropped(right, items, row_length, model, size=32):
    """OpenRLHF #1332: drop_last, in an evaluation."""
    return right(items[:max(size, len(items) // size * size)], row_length, model, size)


@replaces("runtime.run.Log.add", "test_log_means_are_sums_over_counts_since_the_last_line")
def mean_of_means(right, self, count, **sums):
    """OpenRLHF #1336: a small batch counts as much as a large one."""
    return right(self, 1, **{name: value / count for name, value in sums.items()})


@replaces("runtime.run.Log.add", "test_log_means_are_sums_over_counts_since_the_last_line")
def last_micro_batch_alone_is_logged(right, self, count, **sums):
    """torchtune: what is shown for a step is what its last part had."""
    for name in sums:
        self.sums[name] = self.counts[name] = 0
    return right(self, count, **sums)


@replaces("runtime.run.Log.write", "test_a_number_that_is_not_finite_stops_the_run")
def nan_becomes_zero(right, self, step):
    """smol-course #61: "loss 0.0", and training goes on, on weights that are gone."""
    for name, value in self.sums.items():
        self.sums[name] = value if math.isfinite(value) else 0.0
    return right(self, step)


# ------------------------------------------------------------------------------------------------
# train_dpo.py: the mathematics
# ------------------------------------------------------------------------------------------------


@replaces("train_dpo.bradley_terry", "test_bradley_terry_is_equation_16_written_out")
def probability_for_its_logarithm(right, r_w, r_l):
    """-sigma as a loss: its gradient vanishes for the pairs that are ranked worst."""
    return right(r_w, r_l).exp()


@replaces("train_dpo.dpo_loss", "test_dpo_loss_is_appendix_b_written_out")
def beta_forgotten(right, pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """A loss without beta runs, and with beta 1 the policy hardly moves."""
    return right(pi_logps, ref_logps, yw_idxs, yl_idxs, 1.0)[0], right(
        pi_logps, ref_logps, yw_idxs, yl_idxs, beta)[1]


@replaces("train_dpo.dpo_loss", "test_dpo_loss_is_appendix_b_written_out")
def beta_squared(right, pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Rewards that have their beta already, times beta again."""
    return right(pi_logps, ref_logps, yw_idxs, yl_idxs, beta * beta)[0], right(
        pi_logps, ref_logps, yw_idxs, yl_idxs, beta)[1]


@replaces("train_dpo.dpo_loss",
          "test_erratum_equation_21_prints_the_loss_of_the_reversed_preference")
def winner_and_loser_swapped(right, pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """Equation 21 of the paper as printed: -log sigma(rhat_l - rhat_w)."""
    return right(pi_logps, ref_logps, yl_idxs, yw_idxs, beta)


@replaces("train_dpo.dpo_loss", "test_dpo_loss_is_appendix_b_written_out")
def reference_forgotten(right, pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """TRL #2431: reference log-probs that are computed, cached and never used."""
    return right(pi_logps, ref_logps * 0, yw_idxs, yl_idxs, beta)


@replaces("train_dpo.dpo_loss", "test_rewards_carry_no_gradient_and_losses_do")
def rewards_not_detached(right, pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """A graph kept alive for a number on the screen, or trained on by mistake."""
    return right(pi_logps, ref_logps, yw_idxs, yl_idxs, beta)[0], beta * (pi_logps - ref_logps)


@replaces("train_dpo.dpo_loss", "test_each_pair_has_its_own_loss_whatever_else_is_in_the_batch")
def loss_averaged_inside(right, *arguments, **named):
    """The caller averages again, and each micro-batch has another denominator."""
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
    rewards = right(pi_logps, ref_logps, yw_idxs, yl_idxs, beta)[1]
    ratios = pi_logps.exp() / ref_logps.exp()
    return -(beta * (ratios[yw_idxs] - ratios[yl_idxs])).sigmoid().log(), rewards


@replaces("train_dpo.implicit_reward", "test_rewards_are_beta_times_the_log_ratio_of_every_answer")
def rewards_without_beta(right, pi_logps, ref_logps, beta):
    """rasbt/LLMs-from-scratch: margins in the log that are not those of the loss."""
    return right(pi_logps, ref_logps, 1.0)


@replaces("train_dpo.dpo_gradient", "test_closed_form_gradient_is_the_one_autograd_finds")
def sign_swapped_as_printed_in_a4(right, pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """The last gradient of A.4 as printed: the weight is sigma(rhat_w - rhat_l)."""
    r = beta * (pi_logps - ref_logps)
    weights = beta * (r[yw_idxs] - r[yl_idxs]).sigmoid()
    return (pi_logps * 0).index_add(0, yw_idxs, -weights).index_add(0, yl_idxs, weights)


@replaces("train_dpo.dpo_gradient", "test_gradients_of_the_pairs_of_four_ranked_answers_add_up")
def pairs_of_one_answer_overwritten(right, pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """gradient[yw_idxs] -= weights: an index that comes twice is written once."""
    r, gradient = beta * (pi_logps - ref_logps), pi_logps * 0
    weights = beta * (r[yl_idxs] - r[yw_idxs]).sigmoid()
    gradient[yw_idxs] -= weights
    gradient[yl_idxs] += weights
    return gradient


@replaces("train_dpo.dpo_gradient", "test_the_first_gradient_is_half_of_beta")
def gradient_without_beta(right, *arguments):
    """The weight without its beta in front: right in direction, ten times too long."""
    return right(*arguments) / arguments[-1]


@replaces("train_dpo.plackett_luce", "test_plackett_luce_sums_to_one_over_all_rankings")
def every_draw_among_all_answers(right, rewards, ranking):
    """A product of softmaxes over all answers: nothing is ever taken out of the urn."""
    drawn = ranking >= 0
    r = rewards[ranking.clamp(min=0)].masked_fill(~drawn, -math.inf)
    return ((r - r.logsumexp(-1, keepdim=True)) * 1.0).masked_fill(~drawn, 0).sum(-1)


@replaces("train_dpo.plackett_luce", "test_plackett_luce_of_three_answers_worked_out_on_paper")
def ranking_read_worst_first(right, rewards, ranking):
    """The same formula, from the other end; for pairs it is the swapped preference."""
    return right(-rewards, ranking)


@replaces("train_dpo.plackett_luce",
          "test_a_ranking_padded_with_minus_one_is_the_shorter_ranking")
def padding_taken_for_the_last_answer(right, rewards, ranking):
    """-1 is an index too: of the last answer there is."""
    return right(rewards, ranking % len(rewards))


@replaces("train_dpo.log_partition", "test_partition_is_the_sum_over_all_answers")
def beta_times_the_reward(right, ref_logps, rewards, beta):
    """exp(beta r): beta on the wrong side, and explained the wrong way round (rasbt, cell 83)."""
    return right(ref_logps, rewards * beta * beta, beta)


@replaces("train_dpo.log_partition", "test_partition_is_the_sum_over_all_answers")
def partition_without_the_reference(right, ref_logps, rewards, beta):
    """sum_y exp(r / beta): the softmax of the reward, as if pi_ref were uniform."""
    return right(ref_logps * 0, rewards, beta)


@replaces("train_dpo.log_partition", "test_every_prompt_has_its_own_partition")
def one_partition_for_all_prompts(right, ref_logps, rewards, beta):
    """Z depends on x; summed over the batch as well, it cancels in nothing."""
    return right(ref_logps.flatten(), rewards.flatten(), beta).expand(ref_logps.shape[:-1])


@replaces("train_dpo.optimal_policy", "test_optimal_policy_is_a_distribution")
def partition_left_out(right, ref_logps, rewards, beta):
    """pi_ref exp(r / beta) sums to Z, not to one."""
    return ref_logps + rewards / beta


@replaces("train_dpo.unlikelihood_loss",
          "test_unlikelihood_is_minus_the_difference_of_log_probs")
def unlikelihood_with_a_sigmoid(right, pi_logps, yw_idxs, yl_idxs):
    """Then it is DPO without a reference, and C.3's baseline no longer falls apart."""
    return -(-right(pi_logps, yw_idxs, yl_idxs)).sigmoid().log()


# ------------------------------------------------------------------------------------------------
# train_dpo.py: the step, the loop, what is watched
# ------------------------------------------------------------------------------------------------


@replaces("train_dpo.objective", "test_training_lowers_the_loss_and_ranks_the_answers")
def reference_is_the_live_policy(right, logps, batch, args):
    """TRL #2057: one model under two names. The reference moves along, the loss stays log 2."""
    return right(logps, replace(batch, ref_logps=logps.detach()), args)


@replaces("train_dpo.objective", "test_the_first_step_of_training_moves_the_policy")
def reference_not_detached(right, logps, batch, args):
    """The live policy, and with its graph: the two gradients cancel and nothing is learned."""
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
    """Official #34: policy and reference in different precision, and no word about it."""


@replaces("train_dpo.describe", "test_a_tie_is_half_right")
def ties_as_wrong(right, logps, rewards, batch):
    """rewards_w > rewards_l: before the first step, accuracy is 0."""
    wins = (rewards[batch.winners] > rewards[batch.losers]).sum()
    return right(logps, rewards, batch) | {"accuracy": wins}


@replaces("train_dpo.describe", "test_a_step_never_waits_for_the_device")
def numbers_read_in_every_step(right, logps, rewards, batch):
    """TRL's step has ten .item() and more: the GPU stands idle while the host catches up."""
    return {name: value.item() for name, value in right(logps, rewards, batch).items()}


@replaces("train_dpo.describe", "test_each_number_on_the_screen_is_the_sum_of_its_column")
def chosen_and_rejected_rewards_swapped(right, logps, rewards, batch):
    """Two columns of the log under each other's names."""
    numbers = right(logps, rewards, batch)
    return numbers | {"chosen_reward": numbers["rejected_reward"],
                      "rejected_reward": numbers["chosen_reward"]}


@replaces("train_dpo.parse_args", "test_defaults_are_those_of_appendix_b")
def learning_rate_of_sft(right, argv):
    """LLaMA-Factory #7734, TRL #1236: at 1e-4, a pretrained policy forgets its language."""
    args = right(argv)
    args.lr = args.lr if any(flag.startswith("--lr") for flag in argv) else 1e-4
    return args


# ------------------------------------------------------------------------------------------------
# sample.py: measuring
# ------------------------------------------------------------------------------------------------


@replaces("sample.evaluate", "test_kl_and_win_rate_are_what_their_names_say")
def kl_backwards(right, *arguments, **named):
    """The mean of log pi_ref - log pi over samples of pi is minus the divergence."""
    measures, texts = right(*arguments, **named)
    for values in measures.values():
        values["kl"] = -values["kl"]
    return measures, texts


@replaces("sample.sample", "test_kl_and_win_rate_are_what_their_names_say")
def kl_of_another_temperature(right, model, prompts, max_new_tokens, seed, eot, temperature=1.0,
                              *more, **named):
    """Sampled at 0.5 because it reads better, scored at 1: not the KL of any policy."""
    return right(model, prompts, max_new_tokens, seed, eot, temperature / 2, *more, **named)


@replaces("sample.evaluate", "test_kl_and_win_rate_are_what_their_names_say")
def ties_counted_for_the_policy(right, *arguments, reward=None, **named):
    """>= for >: a policy that writes the same as its baseline wins always."""
    seen = []

    def a_little_more_each_time(text):
        seen.append(text)
        return reward(text) + 1e-9 * len(seen)
    return right(*arguments, reward=reward and a_little_more_each_time, **named)


# ------------------------------------------------------------------------------------------------
# To put a mutant in place
# ------------------------------------------------------------------------------------------------


def find(target):
    """(owner, name, value) of "module.function" or "module.Class.method". Raises UserError."""
    module, path = split_target(target)
    *path, name = path.split(".")
    try:
        owner = importlib.import_module(module)
        for part in path:
            owner = getattr(owner, part)
        return owner, name, vars(owner)[name]
    except (ImportError, AttributeError, KeyError):
        raise UserError(f"{target} is no longer there: classroom/wrong_answers.py and "
                        "classroom/exercises.py name it") from None


def apply(name):
    """Put the mutant in the place of its function, in every module that has imported it."""
    mutant, modules = MUTANTS[name], []
    for path in sandbox.source_files("runtime", "tasks", "experiments"):
        dotted = ".".join(path.relative_to(sandbox.ROOT).with_suffix("").parts)
        modules.append(importlib.import_module(dotted.removesuffix(".__init__")))
    owner, name, right = find(mutant.target)

    @functools.wraps(right)
    def wrong(*arguments, **named):
        return mutant.wrong(right, *arguments, **named)
    del wrong.__wrapped__
    setattr(owner, name, wrong)
    for module in modules:
        for key, value in list(vars(module).items()):
            if value is right:
                setattr(module, key, wrong)


# ------------------------------------------------------------------------------------------------
# Our own tests against each
# ------------------------------------------------------------------------------------------------


def test_name(node):
    return node.split("::")[-1].split("[")[0]


def failures(outcome):
    """{test: words} of what failed."""
    return {test_name(node): words for node, (result, words) in outcome.claims.items()
            if result in ("failed", "error")}


def against_our_tests(name, every=False):
    """(caught, what to print): the test that should catch a mutant; then, if it did not or if
    every test is asked for, the suite."""
    test = MUTANTS[name].test
    if test not in claims():
        return False, f"{test} is no longer there"
    node = f"tests/{claims()[test][0]}::{test}"
    outcome = sandbox.run(sandbox.ROOT, [node], SECONDS, mutant=name)
    failed = failures(outcome)
    if every or not failed:
        outcome = sandbox.run(sandbox.ROOT, [f"tests/{file}" for file in FILES], SECONDS,
                              mutant=name, stop=not every, skip=SLOW)
        failed |= failures(outcome)
    if broken := next((words for words in failed.values() if is_broken(words)), None):
        return False, f"the mutant itself is broken: {broken.splitlines()[0]}"
    if test in failed:
        return True, " ".join(failed)
    if failed:
        return False, f"caught by {' '.join(failed)}, but not by {test}"
    return False, f"NOT CAUGHT, not by {test} either; {outcome.end}".rstrip("; ")


def is_broken(words):
    """A wrong answer gives wrong numbers. These errors say that it no longer fits its function."""
    return any(line.startswith(("TypeError", "AttributeError", "NameError", "ImportError"))
               or "is no longer there" in line for line in words.splitlines())


def run_all(names, judge, jobs):
    """{name: judge(name)}, in parallel, with a bar."""
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(names, list(tqdm(pool.map(judge, names), "mutants", len(names)))))


# ------------------------------------------------------------------------------------------------
# The tests of somebody else against each
# ------------------------------------------------------------------------------------------------


def against_their_tests(path, names, jobs):
    """({name: (caught, what to print)}, {test that fails on the right code: words})."""
    with tempfile.TemporaryDirectory() as folder:
        copy, test = Path(folder) / "copy", f"tests/{path.name}"
        sandbox.copy_sources(copy, tools=["wrong_answers.py"])
        if (copy / test).exists() or not path.name.isidentifier:
            raise UserError(f"--tests {path}: choose another name for this file")
        shutil.copy(path, copy / test)
        right = sandbox.run(copy, [test], SECONDS, guarded=True)
        if right.end:
            raise UserError(f"--tests {path}: {right.end}")
        wrongly = {node: words for node, (result, words) in right.claims.items()
                   if result != "passed"}
        good = [node for node, (result, _) in right.claims.items() if result == "passed"]

        def judge(name):
            outcome = sandbox.run(copy, good, SECONDS, guarded=True, mutant=name, stop=True)
            failed = [node for node, (result, _) in outcome.claims.items()
                      if result in ("failed", "error")]
            return bool(failed), " ".join(map(test_name, failed)) or "not caught"
        return run_all(names, judge, jobs) if good else dict.fromkeys(names, (False, "")), wrongly


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="mutants to run (default: all)")
    add("--all", action="store_true", help="go on after the first failing test")
    add("--tests", type=Path, metavar="FILE", help="grade this test file instead of our own tests")
    add("--list", action="store_true", help="print each mutant with what it is, and stop")
    add("--jobs", type=number_type(int, 1), default=os.cpu_count(),
        help="how many to run at a time (default: one a processor)")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in MUTANTS:
            raise UserError(f"no mutant {name}; --list prints those there are")
    return args


@command
def main(argv=None):
    """Returns the exit code: 1 where a mutant lives that our own tests should have caught."""
    args = parse_args(argv)
    names, wrongly = args.names or list(MUTANTS), {}
    if args.list:
        for mutant in map(MUTANTS.get, names):
            print(f"{mutant.name}, for {mutant.target}\n    {mutant.who}")
        return 0
    if args.tests:
        if not args.tests.is_file():
            raise UserError(f"--tests {args.tests}: no such file")
        results, wrongly = against_their_tests(args.tests, names, args.jobs)
    else:
        results = run_all(names, lambda name: against_our_tests(name, args.all), args.jobs)
    for node, words in wrongly.items():
        print(f"fails on the right code, so it does not count: {node}\n    {words.splitlines()[0]}")
    for name, (caught, words) in results.items():
        print(f"{'caught' if caught else 'ALIVE ':8}{name:40} {words}")
    caught = sum(caught for caught, _ in results.values())
    print(f"{caught} of {len(names)} mutants caught")
    return 0 if args.tests or caught == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
