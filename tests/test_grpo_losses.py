"""GRPO's pieces against hand-computed values and autograd of the written formulas."""

import math

import numpy as np
import pytest
import torch

from posttrain.losses.advantage import advantages, groups, has_signal
from posttrain.losses.aggregation import token_weights
from posttrain.losses.divergence import DIVERGENCES
from posttrain.losses.grpo import PolicyGradient
from posttrain.losses.loss import Scored
from posttrain.losses.vocabulary import Head, token_logprobs_and_entropies

LENGTHS = (4, 3)


def scored(seed=0, on_policy=False, **changes):
    """Two documents of 4 and 3 tokens; the last of each, and the first of the second, count nothing."""
    rng = torch.Generator().manual_seed(seed)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 0.0, 1.0, 0.0])
    logprobs = (-torch.rand(7, generator=rng) - 0.1).requires_grad_()
    signals = {
        "advantages": torch.tensor([1.5] * 4 + [-0.7] * 3),
        "old_logprobs": logprobs.detach() + 0.6 * torch.randn(7, generator=rng),
        "rollout_logprobs": logprobs.detach() + 0.3 * torch.randn(7, generator=rng),
        "reference_logprobs": logprobs.detach() + 0.5 * torch.randn(7, generator=rng),
    }
    if on_policy:
        del signals["old_logprobs"]
    entropies = torch.rand(7, generator=rng).requires_grad_()
    given = Scored(logprobs, weights, torch.tensor(3.5), entropies, LENGTHS, signals)
    return given, given.logprobs_T, given.signals


def gradient(loss, given):
    (found,) = torch.autograd.grad(loss.value(given), given.logprobs_T)
    return found


def test_grpo_advantages_by_hand():
    rewards, prompts = np.array([1.0, 0.0, 5.0, 0.0, 1.0, 5.0]), np.array([7, 7, 3, 7, 7, 3])
    std = math.sqrt(4 * 0.25 / 3)
    expected = np.array([0.5, -0.5, 0, -0.5, 0.5, 0]) / (std + 1e-6)
    np.testing.assert_allclose(advantages(rewards, prompts, "grpo"), expected, rtol=1e-12)
    np.testing.assert_allclose(advantages(rewards, prompts, "dr_grpo"), [0.5, -0.5, 0, -0.5, 0.5, 0])
    np.testing.assert_allclose(advantages(rewards, prompts, "rloo"), np.array([2, -2, 0, -2, 2, 0]) / 3)
    assert has_signal(rewards, prompts).tolist() == [True, True, False, True, True, False]
    assert [members.tolist() for members in groups(prompts)] == [[0, 1, 3, 4], [2, 5]]


def test_rloo_subtracts_the_mean_of_the_others():
    rewards = np.array([3.0, 1.0, 2.0])
    expected = [3 - 1.5, 1 - 2.5, 2 - 2]
    np.testing.assert_allclose(advantages(rewards, np.zeros(3), "rloo"), expected)


def test_rewards_that_nobody_could_tell_take_no_part():
    rewards, prompts = np.array([1.0, math.nan, 0.0, math.nan, 1.0]), np.array([0, 0, 0, 1, 2])
    found = advantages(rewards, prompts, "dr_grpo")
    np.testing.assert_array_equal(found, [0.5, math.nan, -0.5, math.nan, 0.0])
    assert has_signal(rewards, prompts).tolist() == [True, True, True, False, False]


def test_equal_rewards_have_no_advantage_at_all():
    assert not advantages(np.full(7, 0.7), np.zeros(7), "grpo").any()  # 0.7 is not the mean of seven times 0.7
    assert not has_signal(np.full(7, 0.7), np.zeros(7)).any()


@pytest.mark.parametrize(
    ("mode", "weights", "total"),
    [
        ("token-mean", [1, 1, 1], 10),
        ("seq-mean-token-mean", [1 / 2, 1 / 5, 1 / 3], 3),
        ("seq-mean-token-sum", [1, 1, 1], 3),
        ("constant-length", [1, 1, 1], 3 * 8),
    ],
)
def test_aggregation_by_hand(mode, weights, total):
    found, divisor = token_weights(np.array([2, 5, 3]), mode, 8)
    np.testing.assert_allclose(found, weights)
    assert divisor == total


def test_divergences_by_hand():
    policy, reference = torch.tensor([-1.0]), torch.tensor([-1.5])
    by_hand = {"k1": 0.5, "k2": 0.125, "k3": math.exp(-0.5) - 1 + 0.5, "abs": 0.5}
    assert {name: float(of(policy, reference)) for name, of in DIVERGENCES.items()} == pytest.approx(by_hand)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_unbiased_divergences_have_the_true_mean(name):
    policy, reference = torch.randn(9).log_softmax(0), torch.randn(9).log_softmax(0)
    true = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * DIVERGENCES[name](policy, reference)).sum(), true)


def test_on_policy_the_ratio_is_one_and_the_gradient_is_the_policy_gradient():
    given, logprobs, signals = scored(on_policy=True)
    for ratio in ("clip", "cispo"):
        loss = PolicyGradient(ratio)
        torch.testing.assert_close(loss.ratios(given).detach(), torch.ones(7))
        plain = -(signals["advantages"] * logprobs * given.weights_T).sum() / given.total_weight
        (expected,) = torch.autograd.grad(plain, logprobs)
        torch.testing.assert_close(gradient(loss, given), expected)


@pytest.mark.parametrize("dual_clip", [None, 1.1])
def test_clipped_loss_equals_the_written_formula(dual_clip):
    given, logprobs, signals = scored()
    loss, total = PolicyGradient(clip_low=0.1, clip_high=0.3, dual_clip=dual_clip), 0.0
    for t in range(7):
        ratio, gain = (logprobs[t] - signals["old_logprobs"][t]).exp(), signals["advantages"][t]
        objective = min(ratio * gain, min(max(ratio, 0.9), 1.3) * gain)
        if dual_clip and gain < 0:
            objective = max(objective, dual_clip * gain)
        total = total - objective * given.weights_T[t]
    expected = total / given.total_weight
    torch.testing.assert_close(loss.value(given), expected)
    torch.testing.assert_close(gradient(loss, given), torch.autograd.grad(expected, logprobs)[0])


def test_dual_clip_bounds_what_a_bad_answer_can_cost():
    given, _, signals = scored()
    far = {**signals, "old_logprobs": given.logprobs_T.detach() - 5, "advantages": torch.full((7,), -1.0)}
    far = Scored(given.logprobs_T, given.weights_T, given.total_weight, None, LENGTHS, far)
    assert float(PolicyGradient().value(far).detach()) > 100
    bounded = PolicyGradient(dual_clip=3.0).value(far)
    torch.testing.assert_close(bounded.detach(), 3 * given.weights_T.sum() / given.total_weight)


def test_gspo_ratio_is_the_geometric_mean_over_the_answer():
    given, logprobs, signals = scored()
    log_ratio = logprobs - signals["old_logprobs"]
    first, second = (
        log_ratio[:3].mean().exp(),
        log_ratio[5].exp(),
    )  # weights do not count, only whether a token is trained
    found = PolicyGradient("gspo").ratios(given)
    torch.testing.assert_close(found, torch.stack([first] * 4 + [second] * 3))
    loss = PolicyGradient("gspo", clip_low=9, clip_high=9)
    gains = signals["advantages"]
    expected = -((given.weights_T[:4].sum() * first * gains[0]) + given.weights_T[5] * second * gains[5])
    torch.testing.assert_close(loss.value(given), expected / given.total_weight)
    torch.testing.assert_close(gradient(loss, given), torch.autograd.grad(expected / given.total_weight, logprobs)[0])


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    given, _, signals = scored()
    signals["old_logprobs"] = given.logprobs_T.detach() - 2  # ratios of e^2, far beyond the bound
    clipped, kept = PolicyGradient("clip", clip_high=0.2), PolicyGradient("cispo", clip_high=0.2)
    trained = (given.weights_T > 0) & (signals["advantages"] > 0)
    assert torch.all(gradient(clipped, given)[trained] == 0)
    expected = -1.2 * signals["advantages"] * given.weights_T / given.total_weight
    torch.testing.assert_close(gradient(kept, given), expected)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_divergence_and_entropy_are_added_with_their_weights(kind):
    given, logprobs, signals = scored(on_policy=True)
    plain, with_both = PolicyGradient(), PolicyGradient(kl_coef=0.3, kl_type=kind, entropy_coef=0.05)
    divergence = DIVERGENCES[kind](logprobs, signals["reference_logprobs"])
    added = ((0.3 * divergence - 0.05 * given.entropies_T) * given.weights_T).sum() / given.total_weight
    torch.testing.assert_close(with_both.value(given), plain.value(given) + added)
    (of_entropy,) = torch.autograd.grad(with_both.value(given), given.entropies_T)
    torch.testing.assert_close(of_entropy, -0.05 * given.weights_T / given.total_weight)


def test_rollout_weights_are_truncated_and_carry_no_gradient():
    given, _logprobs, signals = scored()
    weights = PolicyGradient(rollout_cap=1.05).rollout_weights(given)
    expected = (signals["old_logprobs"] - signals["rollout_logprobs"]).exp().clamp(max=1.05)
    torch.testing.assert_close(weights, expected)
    assert not weights.requires_grad and (weights == 1.05).any() and (weights < 1).any()
    on_policy, _, own = scored(on_policy=True)
    found = PolicyGradient(rollout_cap=2.0).rollout_weights(on_policy)
    torch.testing.assert_close(found, (on_policy.logprobs_T.detach() - own["rollout_logprobs"]).exp().clamp(max=2))
    assert PolicyGradient(rollout_cap=None).rollout_weights(given) == 1.0


def test_measures_are_sums_over_trained_tokens():
    given, logprobs, signals = scored()
    assert "kl" not in PolicyGradient().measures(given)
    found = PolicyGradient(clip_low=0.2, clip_high=0.2, has_reference=True).measures(given)
    trained = given.weights_T > 0
    assert float(found["tokens"]) == 4
    gap = (signals["old_logprobs"] - signals["rollout_logprobs"]).abs()[trained].sum()
    torch.testing.assert_close(found["logprob_gap"], gap)
    torch.testing.assert_close(found["entropy"], given.entropies_T[trained].sum())
    ratio, gain = (logprobs - signals["old_logprobs"]).exp(), signals["advantages"]
    clipped = ((ratio > 1.2) & (gain > 0)) | ((ratio < 0.8) & (gain < 0))
    assert float(found["clip_share"]) == float((clipped & trained).sum())
    torch.testing.assert_close(found["kl"], DIVERGENCES["k3"](logprobs, signals["reference_logprobs"])[trained].sum())


def test_a_micro_batch_without_documents_adds_nothing():
    filler = Scored(torch.zeros(1, requires_grad=True), torch.zeros(1), torch.tensor(3.0), torch.zeros(1), (1,), {})
    for ratio in ("clip", "gspo", "cispo"):
        loss = PolicyGradient(ratio, kl_coef=0.1, entropy_coef=0.1, rollout_cap=2.0, has_reference=True)
        assert float(loss.value(filler).detach()) == 0
        assert all(float(total) == 0 for total in loss.measures(filler).values())


@pytest.mark.parametrize(("scale", "softcap", "temperature"), [(1.0, None, 1.0), (0.5, 5.0, 0.7), (1.0, None, 1.3)])
def test_entropies_and_their_gradients_equal_plain_logits(scale, softcap, temperature):
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 16, requires_grad=True), torch.randn(101, 16, requires_grad=True)
    labels, slopes, more = torch.randint(0, 101, (37,)), torch.rand(37), torch.rand(37)
    head = Head(weight, None, scale, softcap, temperature, logits_a_chunk=101 * 16, least_tokens_a_chunk=16)
    logits = hidden @ weight.T * scale
    logits = (softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature
    logs = logits.log_softmax(-1)
    expected = logs.gather(1, labels[:, None])[:, 0], -(logs.exp() * logs).sum(-1)
    found = token_logprobs_and_entropies(hidden, head, labels)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    together = [sum((x * s).sum() for x, s in zip(pair, (slopes, more), strict=True)) for pair in (found, expected)]
    ours, theirs = (torch.autograd.grad(total, (hidden, weight), retain_graph=True) for total in together)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() / other.norm() < 1e-5
    (ours,), (theirs,) = (torch.autograd.grad((pair[0] * slopes).sum(), hidden) for pair in (found, expected))
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
