"""The tests are tested: they must catch classic wrong answers put in place of the right functions.

Most mutants are one edit of the right function's source, `wrong` for `right`, and read as a diff of
the mistake; a mistake of another shape is written out. For every mutant the tests named with it
pass before and fail after. An edit that no longer matches its function is an error here: rewrite
it. A mutant that survives is a missing test.
"""
import inspect
import textwrap
from collections.abc import Callable
from functools import partial

import pytest
import test_equations as equations
import test_machine as machine
import test_model
import torch
from torch import Tensor

import kernels
import model
import rollout
import train_base
import train_dpo
import train_ppo
import train_rm
import train_sft
from common import estimate, optimizer
from data import batches
from data.tokenizer import Tokenizer

NAN_LEAKS = equations.test_masked_nan_and_infinity_reach_neither_value_nor_gradient
OUTSIDE = equations.test_nothing_outside_the_mask_contributes
EMPTY = equations.test_fully_masked_is_0_not_nan
EMPTY_ROW = equations.test_a_fully_masked_row_is_as_if_it_were_not_there


class Edit:
    """The right function with `wrong` for `right`, which must occur exactly once in its source."""

    def __init__(self, right: str, wrong: str):
        self.right, self.wrong = right, wrong

    def of(self, function: Callable) -> Callable:
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.right) == 1, (
            f"{function.__qualname__} no longer holds {self.right!r} exactly once: "
            "write this mutant anew")
        scope = dict(vars(inspect.getmodule(function)))
        exec(compile(source.replace(self.right, self.wrong),
                     f"<mutant of {function.__qualname__}>", "exec"), scope)
        return scope[function.__name__]


# --------------------------------------------------------------- mutants that are more than an edit

def mean_of_row_means(x, mask):
    mask = mask.bool()
    rows = torch.where(mask, x, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
    return rows[mask.any(-1)].sum() / mask.any(-1).sum().clamp(min=1)


def temperature_on_log_probabilities(hidden, weight, targets, temperature=1.0):
    logprobs, entropy = kernels.token_logprobs_reference(hidden, weight, targets)
    return logprobs / temperature, entropy


def the_places_themselves(mask):
    return mask.bool() & (torch.arange(mask.shape[1]) > 0)


def places_after(mask):
    return mask.bool().roll(1, 1)


def mask_one_token_late(prompt, response):
    return prompt + response, [False] * (len(prompt) + 1) + [True] * (len(response) - 1)


def ties_broken_by_index(scores, mask):
    K = scores.shape[1]
    earlier = torch.arange(K)[:, None] < torch.arange(K)
    above = ((scores[:, :, None] > scores[:, None, :])
             | (scores[:, :, None] == scores[:, None, :]) & earlier)
    return above & mask[:, :, None] & mask[:, None, :]


one_row_for_all = partial(equations.test_log_probabilities_of_responses_are_sums, 256)
rewards_in_one_row = partial(equations.test_rewards_of_responses_are_those_they_have_alone, 256)


def without_reference(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0,
                      right=train_dpo.dpo_loss):
    return right(chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(chosen), beta,
                 label_smoothing)


def reference_that_moves_with_the_policy(chosen, rejected, ref_chosen, ref_rejected, beta,
                                         label_smoothing=0.0, right=train_dpo.dpo_loss):
    return right(chosen, rejected, chosen, rejected, beta, label_smoothing)


def beta_outside_the_sigmoid(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0,
                             right=train_dpo.dpo_loss):
    losses, *rewards = right(chosen, rejected, ref_chosen, ref_rejected, 1.0, label_smoothing)
    return beta * losses, *(beta * reward for reward in rewards)


def kl(k1: Callable = lambda ratio: ratio, k2: Callable = lambda ratio: ratio.square() / 2,
       k3: Callable = lambda ratio: torch.expm1(-ratio) + ratio) -> Callable:
    """kl_estimates with one formula replaced; ratio = log π − log π_ref."""
    return lambda logprobs, ref_logprobs: tuple(k(logprobs - ref_logprobs) for k in (k1, k2, k3))


def with_score_at(place: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """kl_penalized_rewards with the scores put where `place(scores, mask)`, (B, T), says."""
    right = train_ppo.kl_penalized_rewards
    return lambda scores, logprobs, ref_logprobs, mask, beta: (
        right(torch.zeros_like(scores), logprobs, ref_logprobs, mask, beta)
        + place(scores, mask.bool()))


def last_column(scores, mask):
    return torch.cat([torch.zeros_like(mask[:, 1:]),
                      torch.ones_like(mask[:, :1])], dim=1) * scores[:, None]


def one_after_the_last_token(scores, mask):
    after = ~mask & torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)
    return torch.where(after, scores[:, None], 0.0)


def first_token(scores, mask):
    return torch.where(mask & (mask.cumsum(1) == 1), scores[:, None], 0.0)


def every_token(scores, mask):
    return torch.where(mask, scores[:, None], 0.0)


def zero_is_missing(scores, mask):
    scores = torch.where(scores != 0, scores, -1.0)
    return torch.where(mask & (mask.flip(1).cumsum(1).flip(1) == 1), scores[:, None], 0.0)


def whiten_per_row(x, mask, shift_mean=True, right=train_ppo.whiten):
    return torch.cat([right(x[b:b + 1], mask[b:b + 1], shift_mean) for b in range(len(x))])


def whiten_unbiased(x, mask, shift_mean=True):
    kept = x[mask.bool()]
    whitened = (x - kept.mean()) * torch.rsqrt(kept.var() + 1e-8)           # n − 1, torch's default
    return torch.where(mask.bool(), whitened if shift_mean else whitened + kept.mean(), 0.0)


def whiten_with_padding(x, mask, shift_mean=True, right=train_ppo.whiten):
    return torch.where(mask.bool(), right(x, torch.ones_like(mask), shift_mean), 0.0)


def whiten_masked_in_the_means_only(x, mask, shift_mean=True):
    mean = kernels.masked_mean(x, mask)
    # The value is right, but its gradient is 0·NaN where x is NaN.
    variance = kernels.masked_mean((x - mean).square(), mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask.bool(), whitened if shift_mean else whitened + mean, 0.0)


def old_log_probabilities_taken_anew(logprobs, old_logprobs, advantages, mask, cliprange,
                                     right=train_ppo.policy_loss):
    return right(logprobs, logprobs.detach(), advantages, mask, cliprange)


def clipped_around_the_returns(values, old_values, returns, mask, cliprange_value,
                               right=train_ppo.value_loss):
    return right(values, returns, returns, mask, cliprange_value)


def value_loss_masked_in_the_mean_only(values, old_values, returns, mask, cliprange_value):
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    return 0.5 * kernels.masked_mean(
        torch.maximum((values - returns).square(), (clipped - returns).square()), mask)


def explained_with_padding(values, returns, mask, right=train_ppo.explained_variance):
    return right(values, returns, torch.ones_like(mask))


# ----------------------------------------------------------------------------- the table

# (where, name, what is wrong, the wrong function or edit, the tests that catch it)
MUTANTS = [
    # kernels.py
    (kernels, "masked_mean", "padding counted", Edit("mask.sum().clamp(min=1)", "mask.numel()"),
     equations.test_masked_mean_by_hand),
    (kernels, "masked_mean", "mean of row means", mean_of_row_means,
     equations.test_masked_mean_by_hand),
    (kernels, "masked_mean", "multiply instead of where",
     Edit("torch.where(mask, x, 0.0)", "(mask * x)"),
     partial(NAN_LEAKS, "masked_mean"), partial(EMPTY, "masked_mean")),
    (kernels, "masked_mean", "empty mask divides by 0", Edit(".clamp(min=1)", ""),
     partial(EMPTY, "masked_mean")),
    (kernels, "masked_mean", "no mask", lambda x, mask: x.mean(),
     equations.test_masked_mean_by_hand, partial(OUTSIDE, "masked_mean")),
    (kernels, "token_logprobs", "temperature divides log-probabilities",
     temperature_on_log_probabilities,
     equations.test_temperature_divides_logits_not_log_probabilities,
     equations.test_token_logprobs_equal_their_definition),
    (kernels, "_probabilities", "entropy with the wrong sign",
     Edit("total.log() - logits", "total.log() + logits"),
     equations.test_token_logprobs_by_hand),
    (kernels, "_probabilities", "exp before the maximum is taken out",
     Edit("logits.amax(0)", "torch.zeros_like(logits[0])"),
     equations.test_token_logprobs_are_finite_at_logits_of_1e4),
    (kernels, "_probabilities", "probabilities not normalised", Edit("p.div_(total)", "p"),
     equations.test_token_logprobs_equal_the_reference_forward_and_backward),
    (kernels._TokenLogprobs, "forward", "everything kept", Edit("if room >= 0:", "if True:"),
     equations.test_no_more_than_the_stated_probabilities_wait_for_the_backward_pass),
    (kernels, "_logits", "softmax in bfloat16",
     Edit(".to(torch.promote_types(hidden.dtype, torch.float32))", ""),
     equations.test_token_logprobs_in_bfloat16_err_no_more_than_the_reference),
    (kernels, "_add_gradients", "no temperature in the gradient",
     Edit("(grad if temperature == 1 else grad.div_(temperature))", "grad"),
     equations.test_token_logprobs_have_the_gradient_of_finite_differences,
     equations.test_token_logprobs_equal_the_reference_forward_and_backward,
     equations.test_a_likelihoods_gradients_equal_those_of_any_loss),
    (kernels._TokenLogprobs, "backward", "logits formed again without temperature",
     Edit("_logits(hidden[rows], weight, ctx.temperature)", "_logits(hidden[rows], weight, 1.0)"),
     equations.test_token_logprobs_have_the_gradient_of_finite_differences,
     equations.test_token_logprobs_equal_the_reference_forward_and_backward),
    (kernels._TokenLogprobs, "backward", "entropy detached",
     Edit("with_entropy = bool((grad_entropy != 0).any())", "with_entropy = False"),
     equations.test_token_logprobs_have_the_gradient_of_finite_differences,
     equations.test_token_logprobs_equal_the_reference_forward_and_backward),
    (kernels._LikelihoodLogprobs, "backward", "the loss's weight forgotten",
     Edit("grad_hidden.mul_(scale), grad_weight.mul_(scale)", "grad_hidden, grad_weight"),
     equations.test_a_likelihoods_gradients_equal_those_of_any_loss),
    (kernels._LikelihoodLogprobs, "backward", "unequal weights accepted",
     Edit("(grad_logprobs != scale).any() or ", ""),
     equations.test_a_broken_promise_of_equal_weights_is_an_error),
    (kernels._Gelu, "backward", "slope of a plain sigmoid unit",
     Edit(".mul_(3 * _Gelu.B)", ".mul_(_Gelu.B)"),
     equations.test_gelu_is_the_tanh_form_forward_and_backward),
    (kernels, "linear", "bias forgotten for few rows",
     Edit("y if bias is None else y.add_(bias)", "y"),
     equations.test_linear_is_the_same_for_few_rows),
    (kernels, "_chunks", "one chunk for everything", lambda rows, columns: [slice(0, rows)],
     equations.test_no_tensor_over_all_tokens_and_the_vocabulary_is_built),

    # model.py
    (model, "attend_once", "scores not divided by √D", Edit(" / math.sqrt(q.shape[-1])", ""),
     partial(test_model.test_attention_of_one_query, 4, 2, True)),
    (model, "attend_once", "the mask turned round", Edit("(~mask, ", "(mask, "),
     partial(test_model.test_attention_of_one_query, 4, 2, True)),
    (model, "attend_once", "query heads dealt out in turn",
     Edit("q.reshape(len(q), k.shape[1], -1, q.shape[-1])",
          "q.reshape(len(q), -1, k.shape[1], q.shape[-1]).transpose(1, 2)"),
     partial(test_model.test_attention_of_one_query, 4, 2, False)),
    (model, "before", "log-probabilities not shifted", the_places_themselves,
     equations.test_log_probabilities_are_read_before_the_token,
     one_row_for_all),
    (model, "before", "shifted to the other side", places_after,
     equations.test_log_probabilities_are_read_before_the_token),
    (model.GPT, "logprobs", "temperature forgotten",
     Edit("temperature, equal_weights)", "1.0, equal_weights)"),
     equations.test_log_probabilities_are_read_before_the_token),
    (model.RewardModel, "forward", "score read at the last column",
     Edit("== (lengths - 1)[:, None]", "== tokens.shape[1] - 1 + 0 * lengths[:, None]"),
     equations.test_the_score_is_read_at_the_last_real_token),
    (model.RewardModel, "forward", "score read one token early",
     Edit("lengths - 1", "(lengths - 2).clamp(min=0)"),
     equations.test_the_score_is_read_at_the_last_real_token),
    (train_ppo, "before", "V_t read after the token", the_places_themselves,
     equations.test_values_are_read_before_the_token),
    (train_ppo, "before", "V_t shifted to the other side", places_after,
     equations.test_values_are_read_before_the_token),

    # data/tokenizer.py and data/batches.py
    (Tokenizer, "render", "mask shifted by one",
     Edit("return ids, mask", "return ids, [False, *mask[:-1]]"),
     equations.test_the_response_and_its_end_are_trained_on_and_the_prompt_is_not),
    (Tokenizer, "render", "mask shifted by one to the left",
     Edit("return ids, mask", "return ids, [*mask[1:], False]"),
     equations.test_the_response_and_its_end_are_trained_on_and_the_prompt_is_not),
    (Tokenizer, "render", "end token left out of the mask",
     Edit('[message["role"] == "assistant"] * len(text)',
          '[message["role"] == "assistant"] * (len(text) - 1) + [False]'),
     equations.test_the_response_and_its_end_are_trained_on_and_the_prompt_is_not),
    (Tokenizer, "render", "prompt trained on", Edit('[message["role"] == "assistant"]', "[True]"),
     equations.test_the_response_and_its_end_are_trained_on_and_the_prompt_is_not),
    (Tokenizer, "render", "role marker trained on",
     Edit("[False] * len(opening)", '[message["role"] == "assistant"] * len(opening)'),
     equations.test_the_response_and_its_end_are_trained_on_and_the_prompt_is_not),
    (batches, "response_row", "first response token left out of the mask", mask_one_token_late,
     equations.test_the_response_and_its_end_are_trained_on_and_the_prompt_is_not,
     equations.test_padding_is_never_trained_on_even_if_it_has_the_id_of_the_end),
    (batches, "pad_rows", "lengths from ids that are not padding",
     Edit("[len(ids) for ids, _ in rows]", "[sum(i != pad for i in ids) for ids, _ in rows]"),
     equations.test_padding_is_never_trained_on_even_if_it_has_the_id_of_the_end,
     equations.test_the_score_is_read_at_the_last_real_token),

    # train_sft.py and train_base.py
    (train_sft, "sft_loss", "sign flipped",
     Edit("-masked_mean", "masked_mean"), equations.test_sft_loss_by_hand),
    (train_sft, "sft_loss", "sum instead of mean",
     Edit("masked_mean(logprobs, mask)", "logprobs[mask.bool()].sum()"),
     equations.test_sft_loss_by_hand, equations.test_micro_batches_give_the_gradient_of_one_batch),
    (train_sft, "masked_mean", "mean of row means", mean_of_row_means,
     equations.test_sft_loss_by_hand, equations.test_micro_batches_give_the_gradient_of_one_batch),
    (train_sft, "masked_mean", "padding counted",
     lambda x, mask: (x * mask).mean(), equations.test_sft_loss_by_hand),
    (train_base, "pretraining_loss", "sign flipped", Edit("-masked_mean", "masked_mean"),
     equations.test_sft_loss_by_hand,
     equations.test_loss_of_a_uniform_guess_is_the_log_of_the_vocabulary),
    (train_base, "pretraining_loss", "sum instead of mean",
     Edit("masked_mean(logprobs, mask)", "logprobs[mask.bool()].sum()"),
     equations.test_sft_loss_by_hand,
     equations.test_loss_of_a_uniform_guess_is_the_log_of_the_vocabulary),

    # train_rm.py
    (train_rm, "pairwise_loss", "log(sigmoid) instead of logsigmoid",
     Edit("F.logsigmoid(chosen_rewards - rejected_rewards - margin)",
          "torch.sigmoid(chosen_rewards - rejected_rewards - margin).log()"),
     equations.test_losses_and_gradients_are_finite_at_1e4),
    (train_rm, "pairwise_loss", "sign flipped",
     Edit("chosen_rewards - rejected_rewards - margin",
          "rejected_rewards - chosen_rewards - margin"),
     equations.test_pairwise_loss_by_hand, equations.test_rewards_follow_the_higher_score),
    (train_rm, "pairwise_loss", "margin added",
     Edit("rejected_rewards - margin", "rejected_rewards + margin"),
     equations.test_pairwise_loss_by_hand, equations.test_ranking_loss_with_a_margin_by_hand),
    (train_rm, "ranking_loss", "all pairs weighted equally over rankings of different K",
     Edit("per_prompt.sum() / (count > 0).sum().clamp(min=1)",
          "torch.where(pairs, losses, 0.0).sum() / count.sum().clamp(min=1)"),
     equations.test_ranking_loss_by_hand,
     equations.test_rankings_of_nine_and_of_four_weigh_the_same),
    (train_rm, "ranking_loss", "sum over a prompt's pairs", Edit(" / count.clamp(min=1)", ""),
     equations.test_ranking_loss_by_hand, equations.test_equal_rewards_give_log_2),
    (train_rm, "ranking_loss", "tied pairs counted in the mean",
     Edit("count.clamp(min=1)", "(rewards.shape[1] * (rewards.shape[1] - 1) / 2)"),
     equations.test_ranking_loss_by_hand, equations.test_ties_count_for_no_pair),
    (train_rm, "ranking_loss", "prompts without a pair counted in the mean",
     Edit("(count > 0).sum().clamp(min=1)", "len(count)"),
     equations.test_ranking_loss_equals_its_definition, partial(EMPTY_ROW, "ranking_loss")),
    (train_rm, "ranking_loss", "multiply instead of where",
     Edit("torch.where(mask, rewards, 0.0)", "rewards * mask"),
     partial(NAN_LEAKS, "ranking_loss")),
    (train_rm, "ranking_loss", "one response is silently nothing",
     Edit("rewards.shape[-1] < 2", "False"),
     equations.test_one_response_raises),
    (train_rm, "better_pairs", "ties broken by index", ties_broken_by_index,
     equations.test_ties_count_for_no_pair, equations.test_ranking_loss_by_hand),
    (train_rm, "better_pairs", "a response is compared with itself",
     Edit("scores[:, :, None] > scores", "scores[:, :, None] >= scores"),
     equations.test_ties_count_for_no_pair, equations.test_ranking_loss_by_hand),
    (train_rm, "better_pairs", "lower score taken for better",
     Edit("scores[:, :, None] > scores", "scores[:, :, None] < scores"),
     equations.test_rewards_follow_the_higher_score, equations.test_a_ranking_of_two_is_a_pair),
    (train_rm, "better_pairs", "pairs with padding",
     Edit(" & mask[:, :, None] & mask[:, None, :]", ""),
     equations.test_ranking_loss_by_hand, equations.test_ranking_accuracy_by_hand),
    (train_rm, "better_pairs", "a score of 0 taken for missing",
     Edit("& mask[:, :, None]", "& (scores * scores[:, :1] != 0)[:, :, None] & mask[:, :, None]"),
     equations.test_a_score_of_0_is_a_score),
    (train_rm, "ranking_accuracy", "equal rewards count as right", Edit("> 0)", ">= 0)"),
     equations.test_ranking_accuracy_by_hand),
    (train_rm, "ranking_accuracy", "equal rewards count as wrong", Edit("+ 0.5 *", "+ 0.0 *"),
     equations.test_ranking_accuracy_by_hand),

    # train_dpo.py
    (train_dpo, "response_logprobs", "mean where the sum belongs",
     Edit("batch.sums(logprobs)",
          "batch.sums(logprobs) / batch.sums(torch.ones_like(logprobs))"), one_row_for_all),
    (batches, "ranking_batch", "responses see each other",
     Edit("(part[:, :, None] == part[:, None, :])", "(part[:, None, :] >= 0)"),
     one_row_for_all, rewards_in_one_row),
    (batches, "ranking_batch", "responses do not see the prompt",
     Edit(" | (part == 0)[:, None, :]", ""),
     one_row_for_all, rewards_in_one_row),
    (batches, "ranking_batch", "positions go on from the response before",
     Edit("len(prompt) - 1 + i, k + 1", "len(packed[-1]) + i, k + 1"),
     one_row_for_all, rewards_in_one_row),
    (batches, "ranking_batch", "responses lack the prompt's last token",
     Edit("[prompt[-1], *response]", "[0, *response]"),
     one_row_for_all, rewards_in_one_row),
    (batches, "ranking_batch", "that token is scored too",
     Edit("i > 0,", "len(packed[-1]) > 0,"), one_row_for_all),
    (batches, "ranking_batch", "first response token left out of the mask",
     Edit("i > 0,", "i > 1,"), one_row_for_all),
    (batches, "ranking_batch", "reward read one token early",
     Edit("i == len(response))", "i == len(response) - 1)"), rewards_in_one_row),
    (train_dpo, "ranking_dpo_loss", "chosen and rejected swapped",
     Edit("prompt, chosen, rejected = ", "prompt, rejected, chosen = "),
     equations.test_dpo_on_a_ranking_by_hand),
    (train_dpo, "ranking_dpo_loss", "prompts with many pairs weigh more",
     Edit("1 / prompt.bincount()[prompt].to(losses.dtype)", "torch.ones_like(losses)"),
     equations.test_dpo_on_a_ranking_by_hand,
     equations.test_dpo_on_rankings_is_the_ranking_loss_of_the_implicit_rewards),
    (train_dpo, "ranking_dpo_loss", "mean over all prompts, those without a pair too",
     Edit("weight.sum().clamp(min=1)", "len(scores)"),
     equations.test_dpo_on_rankings_is_the_ranking_loss_of_the_implicit_rewards),
    (train_dpo, "ranking_dpo_loss", "smoothing forgotten",
     Edit(", beta, label_smoothing)", ", beta)"),
     equations.test_dpo_on_pairs_is_the_mean_of_their_losses),
    (train_dpo, "pair_sums", "ties count as wrong",
     Edit("0.5 *", "0.0 *"), equations.test_dpo_on_pairs_is_the_mean_of_their_losses),
    (train_dpo, "dpo_loss", "sign flipped",
     Edit("chosen_logratios - rejected_logratios", "rejected_logratios - chosen_logratios"),
     equations.test_dpo_loss_by_hand,
     equations.test_policy_equal_to_reference_gives_log_2_and_a_gradient),
    (train_dpo, "dpo_loss", "reference forgotten", without_reference,
     equations.test_dpo_loss_by_hand,
     equations.test_policy_equal_to_reference_gives_log_2_and_a_gradient),
    (train_dpo, "dpo_loss", "reference moves with the policy", reference_that_moves_with_the_policy,
     equations.test_dpo_loss_by_hand,
     equations.test_policy_equal_to_reference_gives_log_2_and_a_gradient),
    (train_dpo, "dpo_loss", "β outside the sigmoid", beta_outside_the_sigmoid,
     equations.test_dpo_loss_by_hand,
     equations.test_beta_towards_0_gives_log_2_whatever_the_policy),
    (train_dpo, "dpo_loss", "log(sigmoid) instead of logsigmoid",
     Edit("F.logsigmoid(beta * logits_diff)", "torch.sigmoid(beta * logits_diff).log()"),
     equations.test_losses_and_gradients_are_finite_at_1e4),
    (train_dpo, "dpo_loss", "smoothing without effect",
     Edit("F.logsigmoid(-beta * logits_diff)", "F.logsigmoid(beta * logits_diff)"),
     equations.test_dpo_loss_by_hand),
    (train_dpo, "dpo_loss", "rewards without β",
     Edit("beta * chosen_logratios.detach()", "chosen_logratios.detach()"),
     equations.test_dpo_loss_by_hand),
    (train_dpo, "dpo_loss", "rewards not detached",
     Edit("chosen_logratios.detach()", "chosen_logratios"),
     equations.test_implicit_rewards_carry_no_gradient),
    (train_dpo, "set_reference", "references given to other rankings",
     Edit("logprobs.tolist()", "logprobs.flip(0).tolist()"),
     equations.test_the_reference_stands_still),

    # rollout.py
    (rollout, "win_rate", "ties count as losses",
     Edit("0.5 *", "0.0 *"), equations.test_win_rate_by_hand),
    (rollout, "win_rate", "error over comparisons",
     Edit("math.sqrt(len(per_prompt))", "math.sqrt(more.numel())"),
     equations.test_win_rate_by_hand),

    # train_ppo.py: KL and rewards
    (train_ppo, "kl_estimates", "k1 clamped at 0", kl(k1=lambda ratio: ratio.clamp(min=0)),
     equations.test_k1_and_k3_equal_the_exact_kl_in_expectation_and_k1_is_not_clamped,
     equations.test_rewards_of_a_response_sum_to_score_minus_beta_kl),
    (train_ppo, "kl_estimates", "the ratio upside down",
     lambda a, b, right=train_ppo.kl_estimates: right(b, a),
     equations.test_kl_estimates_by_hand,
     equations.test_moving_away_from_the_reference_costs_reward,
     equations.test_k1_and_k3_equal_the_exact_kl_in_expectation_and_k1_is_not_clamped),
    (train_ppo, "kl_estimates", "k2 without the half", kl(k2=lambda ratio: ratio.square()),
     equations.test_kl_estimates_by_hand,
     equations.test_as_a_loss_k1_teaches_nothing_and_k2_teaches_the_kl),
    (train_ppo, "kl_estimates", "k3 of the other direction",
     kl(k3=lambda ratio: ratio.exp() - 1 - ratio),
     equations.test_k1_and_k3_equal_the_exact_kl_in_expectation_and_k1_is_not_clamped),
    (train_ppo, "kl_estimates", "k3 by a difference of nearly equal numbers",
     kl(k3=lambda ratio: torch.exp(-ratio) - 1 + ratio),
     equations.test_k3_is_never_negative),
    (train_ppo, "kl_penalized_rewards", "sign of the penalty flipped",
     Edit("-beta * kl", "beta * kl"),
     equations.test_kl_penalized_rewards_by_hand,
     equations.test_moving_away_from_the_reference_costs_reward,
     equations.test_rewards_of_a_response_sum_to_score_minus_beta_kl),
    (train_ppo, "kl_penalized_rewards", "β forgotten", Edit("-beta * kl", "-kl"),
     equations.test_kl_penalized_rewards_by_hand),
    (train_ppo, "kl_penalized_rewards", "k3 in the reward", Edit("kl, _, _ =", "_, _, kl ="),
     equations.test_kl_penalized_rewards_by_hand),
    (train_ppo, "kl_penalized_rewards", "multiply instead of where",
     Edit("torch.where(mask, -beta * kl, 0.0)", "mask * (-beta * kl)"),
     partial(NAN_LEAKS, "kl_penalized_rewards")),
    (train_ppo, "kl_penalized_rewards", "penalty on the prompt",
     Edit("torch.where(mask, -beta * kl, 0.0)", "-beta * kl"),
     equations.test_kl_penalized_rewards_by_hand, partial(OUTSIDE, "kl_penalized_rewards")),
    (train_ppo, "kl_penalized_rewards", "score in the last column", with_score_at(last_column),
     equations.test_kl_penalized_rewards_by_hand,
     equations.test_the_score_lands_on_a_trained_position),
    (train_ppo, "kl_penalized_rewards", "score one place after the end token",
     with_score_at(one_after_the_last_token),
     equations.test_kl_penalized_rewards_by_hand,
     equations.test_the_score_lands_on_a_trained_position),
    (train_ppo, "kl_penalized_rewards", "score on the first token", with_score_at(first_token),
     equations.test_kl_penalized_rewards_by_hand,
     equations.test_the_score_lands_on_a_trained_position),
    (train_ppo, "kl_penalized_rewards", "score on every token", with_score_at(every_token),
     equations.test_kl_penalized_rewards_by_hand,
     equations.test_rewards_of_a_response_sum_to_score_minus_beta_kl),
    (train_ppo, "kl_penalized_rewards", "a score of 0 taken for missing",
     with_score_at(zero_is_missing),
     equations.test_a_score_of_0_is_a_score),
    (train_ppo, "kl_penalized_rewards", "the score of an empty response vanishes",
     Edit("if not mask.any(1).all()", "if False"),
     equations.test_a_row_without_response_tokens_raises),
    (train_ppo, "evaluate", "KL of a token reported for that of a response",
     Edit("torch.where(batch.mask, k1, 0.0).sum(1).mean()", "masked_mean(k1, batch.mask)"),
     equations.test_the_reported_kl_is_the_penalised_kl),
    (train_ppo, "evaluate", "another KL reported than the penalised one",
     Edit("k1, _, k3 =", "_, k1, k3 ="),
     equations.test_the_reported_kl_is_the_penalised_kl),
    (train_ppo, "evaluate", "entropy over padding too",
     Edit("masked_mean(batch.entropy, batch.mask)", "batch.entropy.mean()"),
     equations.test_the_reported_kl_is_the_penalised_kl),

    # train_ppo.py: advantages
    (train_ppo, "gae", "bootstrapping beyond the end",
     Edit("torch.where(mask, values, 0.0)", "values"),
     equations.test_gae_by_hand, partial(OUTSIDE, "gae")),
    (train_ppo, "gae", "multiply instead of where",
     Edit("torch.where(mask, values, 0.0)", "values * mask"),
     partial(NAN_LEAKS, "gae")),
    (train_ppo, "gae", "advantages run on into the prompt",
     Edit("torch.where(mask[:, t], advantage, 0.0)", "advantage"),
     equations.test_gae_by_hand, equations.test_gae_equals_its_definition),
    (train_ppo, "gae", "λ forgotten", Edit("gamma * lam", "gamma"),
     equations.test_gae_by_hand, equations.test_lambda_1_is_monte_carlo_and_lambda_0_the_td_error),
    (train_ppo, "gae", "γ forgotten in the sum", Edit("gamma * lam", "lam"),
     equations.test_gae_by_hand, equations.test_lambda_1_is_monte_carlo_and_lambda_0_the_td_error),
    (train_ppo, "gae", "γ forgotten in δ", Edit("gamma * next_value", "next_value"),
     equations.test_gae_by_hand, equations.test_lambda_1_is_monte_carlo_and_lambda_0_the_td_error),
    (train_ppo, "gae", "values with the wrong sign",
     Edit("gamma * next_value - values[:, t]", "values[:, t] - gamma * next_value"),
     equations.test_gae_by_hand, equations.test_returns_are_advantages_plus_values),
    (train_ppo, "gae", "forwards in time",
     Edit("reversed(range(rewards.shape[1]))", "range(rewards.shape[1])"),
     equations.test_gae_by_hand, equations.test_lambda_1_is_monte_carlo_and_lambda_0_the_td_error),
    (train_ppo, "gae", "returns without values", Edit("advantages + values", "advantages"),
     equations.test_gae_by_hand, equations.test_returns_are_advantages_plus_values),
    (train_ppo, "gae", "rewards where returns belong", Edit("advantages + values", "rewards"),
     equations.test_gae_by_hand, equations.test_returns_are_advantages_plus_values),
    (train_ppo, "gae", "advantages whitened before the returns are computed",
     Edit("return advantages, advantages + values",
          "return whiten(advantages, mask), "
          "torch.where(mask, whiten(advantages, mask) + values, 0.0)"),
     equations.test_gae_by_hand, equations.test_lambda_1_is_monte_carlo_and_lambda_0_the_td_error),
    (train_ppo, "whiten", "unbiased variance", whiten_unbiased,
     equations.test_whiten_by_hand,
     equations.test_whitened_numbers_have_mean_0_and_variance_1_over_the_mask),
    (train_ppo, "whiten", "statistics of each row", whiten_per_row,
     equations.test_whiten_by_hand,
     equations.test_whitened_numbers_have_mean_0_and_variance_1_over_the_mask),
    (train_ppo, "whiten", "statistics over padding too", whiten_with_padding,
     equations.test_whiten_by_hand, partial(OUTSIDE, "whiten")),
    (train_ppo, "whiten", "divided by the variance",
     Edit("torch.rsqrt(variance + 1e-8)", "(variance + 1e-8).reciprocal()"),
     equations.test_whiten_by_hand),
    (train_ppo, "whiten", "the mean always taken out",
     Edit("whitened if shift_mean else whitened + mean", "whitened"),
     equations.test_whiten_by_hand, equations.test_whitening_constants_gives_no_nan),
    (train_ppo, "whiten", "no guard against a variance of 0", Edit(" + 1e-8", ""),
     equations.test_whitening_constants_gives_no_nan),
    (train_ppo, "whiten", "masked in the means only", whiten_masked_in_the_means_only,
     partial(NAN_LEAKS, "whiten"), partial(NAN_LEAKS, "whiten, mean kept")),
    (train_ppo, "explained_variance", "statistics over padding too", explained_with_padding,
     equations.test_explained_variance_by_hand, partial(OUTSIDE, "explained_variance")),

    # train_ppo.py: losses
    (train_ppo, "policy_loss", "sign flipped", Edit("-masked_mean", "masked_mean"),
     equations.test_policy_loss_by_hand,
     equations.test_the_first_minibatch_has_loss_minus_mean_advantage_and_gradient_minus_advantage),
    (train_ppo, "policy_loss", "ratio without clip",
     Edit("torch.minimum(unclipped, clipped)", "unclipped"),
     equations.test_policy_loss_by_hand, equations.test_clipping_never_raises_the_objective),
    (train_ppo, "policy_loss", "only the clipped ratio",
     Edit("torch.minimum(unclipped, clipped)", "clipped"),
     equations.test_policy_loss_by_hand),
    (train_ppo, "policy_loss", "max where min belongs", Edit("torch.minimum", "torch.maximum"),
     equations.test_policy_loss_by_hand, equations.test_clipping_never_raises_the_objective),
    (train_ppo, "policy_loss", "clipped from above only",
     Edit("clamp(1 - cliprange, 1 + cliprange)", "clamp(max=1 + cliprange)"),
     equations.test_policy_loss_by_hand),
    (train_ppo, "policy_loss", "the ratio upside down",
     Edit("logprobs - old_logprobs", "old_logprobs - logprobs"),
     equations.test_policy_loss_by_hand,
     equations.test_the_first_minibatch_has_loss_minus_mean_advantage_and_gradient_minus_advantage),
    (train_ppo, "policy_loss", "old log-probabilities taken anew", old_log_probabilities_taken_anew,
     equations.test_policy_loss_by_hand),
    (train_ppo, "policy_loss", "multiply instead of where",
     Edit("torch.where(mask, logprobs - old_logprobs, 0.0)", "(logprobs - old_logprobs) * mask"),
     partial(NAN_LEAKS, "policy_loss")),
    (train_ppo, "masked_mean", "padding counted in the mean",
     lambda x, mask: torch.where(mask.bool(), x, 0.0).mean(),
     equations.test_policy_loss_by_hand, equations.test_value_loss_by_hand,
     equations.test_the_first_minibatch_has_loss_minus_mean_advantage_and_gradient_minus_advantage),
    (train_ppo, "masked_mean", "mean of row means", mean_of_row_means,
     equations.test_policy_loss_equals_its_definition,
     equations.test_value_loss_equals_its_definition,
     equations.test_the_first_minibatch_has_loss_minus_mean_advantage_and_gradient_minus_advantage),
    (train_ppo, "value_loss", "min where max belongs", Edit("torch.maximum", "torch.minimum"),
     equations.test_value_loss_by_hand, equations.test_clipping_never_lowers_the_value_loss),
    (train_ppo, "value_loss", "the half missing",
     Edit("0.5 * ", ""), equations.test_value_loss_by_hand),
    (train_ppo, "value_loss", "clipped around 0",
     Edit("old_values + (values - old_values).clamp", "values.clamp"),
     equations.test_value_loss_by_hand),
    (train_ppo, "value_loss", "clipped around the returns", clipped_around_the_returns,
     equations.test_value_loss_by_hand),
    (train_ppo, "value_loss", "masked in the mean only", value_loss_masked_in_the_mean_only,
     partial(NAN_LEAKS, "value_loss"), partial(EMPTY, "value_loss")),
    (optimizer, "take_step", "clipped before the loss scale is off",
     Edit("scaler.unscale_(optimizer)", "pass"),
     machine.test_a_scaled_step_is_the_step),
    (optimizer, "take_step", "loss scale never lowered", Edit("scaler.update()", "pass"),
     machine.test_a_step_that_overflows_is_left_out_and_the_scale_halved),
    (estimate, "most_tokens", "padding forgotten",
     Edit("sum(rows) * max(lengths)", "sum(map(int.__mul__, rows, lengths))"),
     machine.test_tokens_of_the_largest_forward_pass_count_its_padding),
    (train_ppo, "adapted_beta", "sign flipped", Edit("kl / target_kl - 1", "1 - kl / target_kl"),
     equations.test_adapted_beta_by_hand),
    (train_ppo, "adapted_beta", "error not clipped",
     Edit("max(-0.2, min(0.2, kl / target_kl - 1))", "kl / target_kl - 1"),
     equations.test_adapted_beta_by_hand),
    (train_ppo, "adapted_beta", "steps counted instead of episodes",
     Edit("episodes / horizon", "1 / horizon"),
     equations.test_adapted_beta_by_hand),
]


def title(test: Callable) -> str:
    return f"{test.func.__name__}[{test.args[0]}]" if isinstance(test, partial) else test.__name__


def fails(test: Callable) -> bool:
    """Whether a test says no. Any other error is no verdict on the mutant, and goes up."""
    try:
        test()
    except (AssertionError, pytest.fail.Exception):
        return True
    return False


def check_caught(monkeypatch, where, name: str, mistake: str, mutant, tests) -> None:
    """The tests pass with the right function and fail with the mutant in its place."""
    wrong = mutant.of(getattr(where, name)) if isinstance(mutant, Edit) else mutant
    assert tests and [title(test) for test in tests if fails(test)] == []
    monkeypatch.setattr(where, name, wrong)
    survived = [title(test) for test in tests if not fails(test)]
    assert not survived, f"{name} with {mistake} passes {', '.join(survived)}"


def catching(mutants: list[tuple]) -> Callable:
    """A test that each mutant is caught: (module, name, mistake, mutant, tests that catch it …)."""
    @pytest.mark.parametrize("mutant", mutants, ids=[f"{row[1]}: {row[2]}" for row in mutants])
    def test(monkeypatch, mutant):
        check_caught(monkeypatch, *mutant[:4], mutant[4:])
    return test


test_a_classic_wrong_answer_is_caught = catching(MUTANTS)


def test_every_equation_has_a_mutant():
    mutated = {name for _, name, *_ in MUTANTS}
    assert mutated >= {name for functions in equations.SIGNATURES.values() for name in functions}
