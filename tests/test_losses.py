"""Losses over tokens: the chunked vocabulary against plain logits, and the written formulas."""

import pytest
import torch

from posttrain.losses.loss import Scored
from posttrain.losses.sft import sft_loss
from posttrain.losses.vocabulary import Head, token_logprobs

T, D, V = 37, 16, 101


def plain_logprobs(hidden, head, labels):
    logits = hidden @ head.weight_VD.T
    if head.bias_V is not None:
        logits = logits + head.bias_V
    logits = logits * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]


def tensors(bias=False):
    torch.manual_seed(0)
    hidden = torch.randn(T, D, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    bias = torch.randn(V, requires_grad=True) if bias else None
    return hidden, weight, bias, torch.randint(0, V, (T,)), torch.rand(T)


@pytest.mark.parametrize("known", [True, False], ids=["known slope", "slope from autograd"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (1.0, 5.0), (0.5, 5.0)])
def test_chunked_logprobs_and_gradients_equal_plain_logits(known, bias, scale, softcap):
    hidden, weight, bias, labels, weights = tensors(bias)
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    total = weights.sum()
    head = Head(
        weight, bias, scale, softcap, logits_a_chunk=V * 16, least_tokens_a_chunk=16
    )  # several chunks, the last one short

    expected = plain_logprobs(hidden, head, labels)
    expected_gradients = torch.autograd.grad(sft_loss.value(Scored(expected, weights, total)), inputs)
    slope = sft_loss.slope(weights, total) if known else None
    found = token_logprobs(hidden, head, labels, slope)
    found_gradients = torch.autograd.grad(sft_loss.value(Scored(found, weights, total)), inputs)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        assert (one - other).norm() / other.norm() < 1e-5


def test_sft_slope_is_the_derivative_of_its_value():
    logprobs = torch.randn(T, requires_grad=True)
    weights, total = torch.rand(T), torch.tensor(11.0)
    (derivative,) = torch.autograd.grad(sft_loss.value(Scored(logprobs, weights, total)), logprobs)
    torch.testing.assert_close(derivative, sft_loss.slope(weights, total))


def test_sft_loss_by_hand():
    logprobs = torch.tensor([-1.0, -2.0, -4.0])
    assert float(sft_loss.value(Scored(logprobs, torch.tensor([1.0, 0.0, 0.5]), torch.tensor(2.0)))) == pytest.approx(
        1.5
    )


def test_without_gradients_nothing_is_kept_for_the_backward_pass():
    hidden, weight, _, labels, _ = tensors()
    with torch.no_grad():
        found = token_logprobs(hidden, Head(weight), labels, torch.ones(T))
    assert not found.requires_grad
    torch.testing.assert_close(found, plain_logprobs(hidden, Head(weight), labels).detach(), rtol=1e-5, atol=1e-5)
