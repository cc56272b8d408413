"""The exercises: which functions a student writes, and which tests decide whether they are right.

`pytest --exercise N` (tests/conftest.py) and assignment.py read this list. The code itself contains
no markers: functions and tests are found by name in the syntax trees of the files, so the code can
change freely. If a name in this list no longer exists, an error says so.

Left out on purpose: hints. The docstring of a function is the task, and its tests are the claims.
"""

import ast
import functools
import re
import threading
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Python 3.11 counts the depth of its parser over all threads together. Exercises are graded in
# several threads, so only one of them may parse at a time.
PARSER = threading.RLock()

# functions: "module.function" or "module.Class.method". needs: exercises whose functions the tests
# also call, so they come first in a copy that has both. before: what to read or know beforehand.
Exercise = namedtuple("Exercise", "number title equation functions needs before tests")

EXERCISES = {exercise.number: exercise for exercise in [
    Exercise(
        1, "causal attention", "softmax(q k^T / sqrt(D)) v, over the tokens that are not masked",
        ["model.Attention.forward"], [],
        "batched matrix products; KeyValueCache, further down in the file",
        ["test_forward_is_gpt2_written_out_by_hand",
         "test_no_logit_depends_on_a_later_token",
         "test_training_mode_changes_nothing",
         "test_cached_generation_of_ragged_prompts_is_the_plain_one",
         "test_each_prompt_may_use_all_positions_there_are"]),
    Exercise(
        2, "log-probabilities of answers",
        "log pi(y|x) = sum_t log pi(y_t | x, y_1 ... y_t-1)",
        ["model.GPT.logps", "model.GPT.token_logps"], [1, 7],
        "the fields of data.Batch; why logits and labels are shifted by one",
        ["test_packed_logps_are_those_of_one_row_a_sequence",
         "test_packed_gradients_are_those_of_one_row_a_sequence",
         "test_an_answer_is_blind_to_its_siblings",
         "test_probabilities_of_all_next_tokens_sum_to_one",
         "test_logps_follow_the_chain_rule",
         "test_common_mistakes_give_other_numbers",
         "test_half_precision_logps_are_float32_and_close"]),
    Exercise(
        3, "the DPO loss", "Eq. 16, Eq. 17 and Appendix B: -log sigma(rhat_w - rhat_l)",
        ["train_dpo.bradley_terry", "train_dpo.implicit_reward", "train_dpo.dpo_loss"], [6],
        "A.2 of the paper; why logsigmoid is finite where log(sigmoid) overflows",
        ["test_bradley_terry_of_rewards_log_three_and_zero_is_three_quarters",
         "test_bradley_terry_is_equation_16_written_out",
         "test_one_of_two_answers_is_preferred",
         "test_dpo_loss_takes_the_arguments_of_appendix_b_by_name",
         "test_dpo_loss_is_appendix_b_written_out",
         "test_each_pair_has_its_own_loss_whatever_else_is_in_the_batch",
         "test_dpo_loss_is_bradley_terry_of_the_implicit_rewards",
         "test_rewards_are_beta_times_the_log_ratio_of_every_answer",
         "test_rewards_carry_no_gradient_and_losses_do",
         "test_loss_starts_at_exactly_log_two_and_rewards_at_zero",
         "test_only_the_ratio_of_policy_to_reference_counts",
         "test_log_probs_are_taken_as_they_come",
         "test_erratum_equation_21_prints_the_loss_of_the_reversed_preference",
         "test_losses_and_gradients_are_right_at_huge_margins",
         "test_dpo_on_exact_preferences_finds_the_optimal_policy"]),
    Exercise(
        4, "the gradient of DPO in closed form",
        "A.4, Eq. 21-22: -beta sigma(rhat_l - rhat_w) (grad log pi_w - grad log pi_l)",
        ["train_dpo.dpo_gradient"], [3],
        "the derivative of log sigma; A.4, which prints chosen and rejected swapped",
        ["test_closed_form_gradient_is_the_one_autograd_finds",
         "test_closed_form_gradient_is_the_slope_of_the_loss",
         "test_the_first_gradient_is_half_of_beta",
         "test_gradients_of_the_pairs_of_four_ranked_answers_add_up",
         "test_a_wrongly_ranked_pair_pulls_harder_than_a_rightly_ranked_one",
         "test_gradient_moves_chosen_and_rejected_by_opposite_amounts",
         "test_erratum_final_gradient_of_a4_has_chosen_and_rejected_swapped"]),
    Exercise(
        5, "Plackett-Luce, and DPO for rankings",
        "Eq. 18: prod_k exp(r_tau(k)) / sum_{j >= k} exp(r_tau(j)); Eq. 20",
        ["train_dpo.plackett_luce", "train_dpo.plackett_luce_loss"], [3],
        "A.3 of the paper; logsumexp; masks and -inf",
        ["test_plackett_luce_of_three_answers_worked_out_on_paper",
         "test_plackett_luce_is_equation_18_written_out",
         "test_plackett_luce_with_two_answers_is_bradley_terry",
         "test_plackett_luce_sums_to_one_over_all_rankings",
         "test_leaving_answers_out_of_a_ranking_keeps_the_odds_of_the_rest",
         "test_a_ranking_padded_with_minus_one_is_the_shorter_ranking",
         "test_a_ranking_of_one_answer_or_none_says_nothing",
         "test_rankings_of_any_batch_shape_are_scored_one_by_one",
         "test_ranking_loss_is_plackett_luce_of_the_implicit_rewards",
         "test_rewards_of_rankings_carry_no_gradient_and_losses_do",
         "test_ranking_loss_of_two_answers_is_the_dpo_loss",
         "test_ranking_loss_starts_at_log_of_the_number_of_rankings",
         "test_ranking_gradient_is_the_share_in_each_draw_minus_one",
         "test_padded_rankings_are_right_and_finite_at_huge_margins"]),
    Exercise(
        6, "the optimal policy and the partition function",
        "Eq. 15: pi* = pi_ref exp(r / beta) / Z, Z = sum_y pi_ref exp(r / beta)",
        ["train_dpo.log_partition", "train_dpo.optimal_policy"], [],
        "A.1 of the paper; logsumexp",
        ["test_partition_and_optimal_policy_of_two_answers_worked_out_on_paper",
         "test_partition_is_the_sum_over_all_answers",
         "test_optimal_policy_is_equation_15_written_out",
         "test_optimal_policy_is_a_distribution",
         "test_every_prompt_has_its_own_partition",
         "test_no_policy_scores_higher_than_the_optimal_one",
         "test_what_a_policy_loses_is_beta_times_its_divergence_from_the_optimum",
         "test_larger_beta_keeps_the_optimal_policy_closer_to_the_reference",
         "test_beta_runs_from_the_best_answer_alone_to_the_reference",
         "test_lemma_2_rewards_that_differ_by_a_function_of_the_prompt_have_one_optimum",
         "test_theorem_1_projection_is_idempotent",
         "test_optimal_policy_is_right_when_rewards_are_huge_beside_beta"]),
    Exercise(
        7, "the mask of a packed row", "causal & same group & (prompt | same answer)",
        ["data.Batch.mask"], [8],
        "the picture at the top of data.py; the fields of data.Batch; broadcasting",
        ["test_an_answer_sees_its_prompt_and_itself_never_its_siblings_nor_other_groups",
         "test_each_token_of_each_answer_is_predicted_once_from_its_prompt_and_what_came_before",
         "test_a_longer_row_changes_nothing_but_padding"]),
    Exercise(
        8, "from sampled answers to ranked pairs", "C.1: K answers make K (K - 1) / 2 pairs",
        ["tasks.sampled.rank_answers", "data.ranking_to_pairs"], [],
        "C.1 of the paper; the layouts of a preference that data.load_preferences reads",
        ["test_a_ranking_of_three_is_three_pairs",
         "test_four_answers_with_four_rewards_make_six_pairs_best_first",
         "test_of_answers_that_tie_the_first_stands_for_all",
         "test_answers_that_all_tie_make_no_row",
         "test_rank_is_all_pairs_of_answers_whose_rewards_differ"]),
    Exercise(
        9, "one training step", "unscale and clip the gradient, then step at this step's rate",
        ["train_sft.warmup", "train_sft.update"], [1],
        "PyTorch's optimizers and their param_groups; torch.amp.GradScaler",
        ["test_warm_up_is_linear_from_zero_and_then_constant",
         "test_an_update_uses_the_learning_rate_it_is_given",
         "test_gradients_are_clipped_to_the_norm_asked_for",
         "test_gradients_are_clipped_at_their_true_size",
         "test_the_scaler_is_ready_for_the_next_step",
         "test_an_overflow_of_float16_leaves_the_step_out_and_goes_on"]),
    Exercise(
        10, "the loop of DPO", "the loss of Appendix B, minimized step by step",
        ["train_dpo.train"], [1, 2, 3, 5, 7, 9],
        "train_sft.train, the same loop with another loss; the functions below train",
        ["test_the_first_step_of_training_moves_the_policy",
         "test_training_lowers_the_loss_and_ranks_the_answers",
         "test_a_batch_of_rankings_holds_whole_rankings",
         "test_the_learning_rate_of_dpo_warms_up_and_then_stays",
         "test_accumulation_changes_nothing_but_memory",
         "test_the_reference_is_used_and_belongs_to_its_answer",
         "test_the_reference_does_not_move_with_the_policy"]),
    Exercise(
        11, "the reward model's loss", "Eq. 2: -log sigma(r(x, y_w) - r(x, y_l))",
        ["experiments.reward_model.reward_loss"], [3],
        "exercise 3; Lemma 1 of the paper",
        ["test_reward_loss_is_equation_2_written_out",
         "test_a_shift_of_all_rewards_of_a_prompt_changes_no_loss_but_a_scale_does",
         "test_the_loss_of_the_implicit_reward_is_the_dpo_loss"]),
    Exercise(
        12, "rewards and advantages of tokens",
        "Eq. 3 token by token; GAE: A_t = sum_k (gamma lam)^k delta_(t+k)",
        ["experiments.ppo.token_rewards", "experiments.ppo.gae", "experiments.ppo.whiten"], [],
        "the top of experiments/ppo.py; Schulman et al. 2016, Eq. 11 to 16",
        ["test_rewards_of_the_tokens_sum_to_the_kl_constrained_reward",
         "test_the_score_is_on_the_last_token_and_never_on_padding",
         "test_a_token_more_likely_than_under_the_reference_is_penalised",
         "test_gae_is_the_discounted_sum_of_later_temporal_differences",
         "test_with_lambda_1_the_advantage_is_what_followed_minus_what_was_expected",
         "test_whitened_advantages_have_mean_0_and_deviation_1_over_the_tokens_alone"]),
    Exercise(
        13, "the clipped objectives of PPO",
        "-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), and its like for the critic",
        ["experiments.ppo.clipped_loss", "experiments.ppo.clipped_value_loss"], [],
        "importance weights; Schulman et al. 2017, Eq. 7",
        ["test_clipped_loss_is_the_smaller_of_two_objectives_written_out",
         "test_where_nothing_has_moved_the_gradient_is_that_of_reinforce",
         "test_a_token_that_moved_far_enough_is_not_pushed_further_but_may_come_back",
         "test_clipped_value_loss_is_the_larger_of_two_errors_written_out"]),
    Exercise(
        14, "a round of online DPO",
        "K answers of the policy of now, judged and ranked: K (K - 1) / 2 pairs; pi_ref as before",
        ["experiments.online.sample_round"], [1, 2, 7, 8],
        "the top of experiments/online.py; sample.sample_answers, sample.logps_of, ppo.judged",
        ["test_a_round_compares_answers_of_the_policy_as_it_is_now",
         "test_fresh_answers_have_the_log_probs_of_the_reference",
         "test_the_judge_reads_each_prompt_once_followed_by_an_answer",
         "test_every_round_draws_other_answers_and_the_same_in_another_run",
         "test_the_better_answer_of_every_pair_is_the_chosen_one_and_ties_make_no_pair",
         "test_equal_answers_are_never_compared_whatever_the_judge_says",
         "test_a_round_in_which_all_answers_tie_is_refused"]),
]}


# The claims that say what a function computes. Together they have half of the points of their
# exercise and all other claims the other half, so that a function that is wrong but has some
# properties of the right one does not get most of the points.
CORE = {
    "test_forward_is_gpt2_written_out_by_hand", "test_packed_logps_are_those_of_one_row_a_sequence",
    "test_packed_gradients_are_those_of_one_row_a_sequence",
    "test_dpo_loss_is_appendix_b_written_out",
    "test_closed_form_gradient_is_the_one_autograd_finds",
    "test_plackett_luce_is_equation_18_written_out",
    "test_ranking_loss_is_plackett_luce_of_the_implicit_rewards",
    "test_partition_is_the_sum_over_all_answers", "test_optimal_policy_is_equation_15_written_out",
    "test_an_answer_sees_its_prompt_and_itself_never_its_siblings_nor_other_groups",
    "test_four_answers_with_four_rewards_make_six_pairs_best_first",
    "test_warm_up_is_linear_from_zero_and_then_constant",
    "test_gradients_are_clipped_to_the_norm_asked_for",
    "test_training_lowers_the_loss_and_ranks_the_answers",
    "test_reward_loss_is_equation_2_written_out",
    "test_rewards_of_the_tokens_sum_to_the_kl_constrained_reward",
    "test_gae_is_the_discounted_sum_of_later_temporal_differences",
    "test_whitened_advantages_have_mean_0_and_deviation_1_over_the_tokens_alone",
    "test_clipped_loss_is_the_smaller_of_two_objectives_written_out",
    "test_clipped_value_loss_is_the_larger_of_two_errors_written_out",
    "test_a_round_compares_answers_of_the_policy_as_it_is_now",
    "test_the_better_answer_of_every_pair_is_the_chosen_one_and_ties_make_no_pair",
}

# Claims in this file of tests/, if there is one, are hidden: a student's copy has neither the file
# nor the names of its tests, and results.json shows students nothing of them.
HIDDEN = "test_hidden.py"

# Tests that take seconds and catch nothing that a faster test would miss.
SLOW = ("test_compiled_logps_are_the_eager_ones", "test_more_prompts_than_there_are_are_refused",
        "test_the_reviews_task_goes_from_sampling_to_results")


def message(exercise):
    """The message of the NotImplementedError that an unwritten function raises. `unwritten`
    recognizes it."""
    return f"Exercise {exercise.number}: {exercise.title}"


def unwritten(error):
    """The number of the exercise whose unwritten function caused an exception, or None."""
    if error is None:
        return None
    found = re.match(r"(?:Skipped: )?Exercise (\d+): ", str(error))
    if found and type(error).__name__ in ("NotImplementedError", "Skipped"):    # see conftest.py
        return int(found[1])
    for other in [*getattr(error, "exceptions", ()), error.__cause__, error.__context__]:
        exercise_number = unwritten(other)
        if exercise_number:
            return exercise_number
    return None


def sentence(test):
    """test_one_of_two_answers_is_preferred to "one of two answers is preferred"."""
    return test.removeprefix("test_").replace("_", " ")


def name_of_test(node_id):
    """The name of the test of a node id, without its parameters. The node id itself if it names a
    whole file."""
    return node_id.partition("::")[2].partition("[")[0] or node_id


@functools.cache
def claims():
    """{name of a test: (its file, its docstring)} of all tests."""
    found = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                docstring = ast.get_docstring(node) or ""
                found[node.name] = path.name, " ".join(docstring.split())
    return found


# -- functions in the text of a module -------------------------------------------------------------


def is_unwritten(node):
    """Whether a function's syntax tree has nothing but a docstring and `raise NotImplementedError`
    (with any message), `pass` or `...`."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if len(body) > 1:
        return False
    text = ast.unparse(body)
    return text in ("", "pass", "...") or text.startswith("raise NotImplementedError")


def split_target(target):
    """Split "module.function" or "package.module.Class.method" into the module and the rest. The
    module is the longest prefix that is a file."""
    names = target.split(".")
    for n in range(len(names) - 1, 0, -1):
        if path_of(".".join(names[:n])).exists():
            return ".".join(names[:n]), ".".join(names[n:])
    return names[0], ".".join(names[1:])


def relative_path(module):
    return Path(f"{module.replace('.', '/')}.py")


def path_of(module):
    return ROOT / relative_path(module)


@functools.cache
def is_a_students_copy():
    """Whether some function of an exercise is unwritten in this folder."""
    for exercise in EXERCISES.values():
        for target in exercise.functions:
            module, name = split_target(target)
            try:
                node = functions(path_of(module).read_text(encoding="utf-8")).get(name)
            except (OSError, SyntaxError):          # pytest reports this more clearly
                continue
            if node and is_unwritten(node):
                return True
    return False


def parse(source):
    with PARSER:
        return ast.parse(source)


def functions(source):
    """{"function" or "Class.method": syntax tree} of a module's text. If a name is defined twice,
    the later definition counts."""
    found = {}
    for node in parse(source).body:
        if isinstance(node, ast.ClassDef):
            members, prefix = node.body, f"{node.name}."
        else:
            members, prefix = [node], ""
        for member in members:
            if isinstance(member, ast.FunctionDef):
                found[prefix + member.name] = member
    return found


def body_lines(source, node):
    """(first, end) of the lines of a function's body below its docstring, including comments."""
    lines = source.splitlines()
    end = node.end_lineno
    while end < len(lines) and re.match(rf"\s{{{node.col_offset + 1},}}#", lines[end]):
        end += 1
    if ast.get_docstring(node) is not None:
        return node.body[0].end_lineno, end
    first = node.body[0].lineno - 1
    while lines[first - 1].strip().startswith("#"):
        first -= 1
    return first, end


def without_bodies(source, messages):
    """The text of a module in which the bodies of some functions ({name: message}) are replaced by
    raise NotImplementedError(message). Signatures, docstrings and everything else do not change."""
    lines, found = source.splitlines(keepends=True), functions(source)
    for name in sorted(messages, key=lambda name: found[name].lineno, reverse=True):
        first, end = body_lines(source, found[name])
        indent = " " * found[name].body[0].col_offset
        lines[first:end] = [f'{indent}raise NotImplementedError("{messages[name]}")\n']
    return "".join(lines)


def with_functions(source, texts):
    """The text of a module in which some functions ({name: text}) are replaced entirely."""
    lines, found = source.splitlines(keepends=True), functions(source)
    for name in sorted(texts, key=lambda name: found[name].lineno, reverse=True):
        node = found[name]
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        indent = " " * node.col_offset
        lines[first:node.end_lineno] = [f"{indent}{line}\n" for line in texts[name].splitlines()]
    return "".join(lines)
