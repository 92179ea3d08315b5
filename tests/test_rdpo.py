"""rDPO: by hand, unbiased, its start, a tiny run, its mistakes."""
import math

import pytest
import torch
from test_mutants import Edit, check_caught

from systems import rdpo
from train_dpo import dpo_loss

ZERO = torch.zeros(3, dtype=torch.float64)


def test_rdpo_loss_by_hand():
    """h = (−1 + 2) − (−3 + 1) = 3, β = ½: (¾ log(1 + e^−1.5) − ¼ log(1 + e^1.5)) / ½."""
    losses, chosen, rejected = rdpo.rdpo_loss(*(torch.tensor([x]) for x in (-1., -3., -2., -1.)),
                                              0.5, 0.25)
    expected = (0.75 * math.log1p(math.exp(-1.5)) - 0.25 * math.log1p(math.exp(1.5))) / 0.5
    assert losses.item() == pytest.approx(expected)
    assert (chosen.item(), rejected.item()) == (0.5, -1.0)


def test_rdpo_is_unbiased_under_flips():
    """(1 − ε) of the pairs as they are and ε of them flipped give DPO's loss on clean ones."""
    sums = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    flipped = sums[[1, 0, 3, 2]]
    mean = 0.7 * rdpo.rdpo_loss(*sums, 0.3, 0.3)[0] + 0.3 * rdpo.rdpo_loss(*flipped, 0.3, 0.3)[0]
    torch.testing.assert_close(mean, dpo_loss(*sums, 0.3)[0])


def test_rdpo_starts_at_log_2_with_a_steeper_slope():
    chosen = ZERO.clone().requires_grad_()
    losses, *_ = rdpo.rdpo_loss(chosen, ZERO, ZERO, ZERO, 0.4, 0.25)
    assert losses.tolist() == pytest.approx([math.log(2)] * 3)
    losses.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-0.2 / 0.5] * 3)


def test_a_run_moves_the_policy(town, tmp_path):
    final = rdpo.train(rdpo.Config(data=(str(town / "rank/rankings.jsonl"),),
                                   init=str(town / "sft"), out=str(tmp_path)))
    assert final["margin"] != 0 and (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("mistake, wrong, test", [
    ("conservative DPO", Edit("+ label_smoothing * F", "- label_smoothing * F"),
     test_rdpo_loss_by_hand),
    ("not divided", Edit(" / (1 - 2 * label_smoothing)", ""), test_rdpo_is_unbiased_under_flips),
    ("divided by the wrong share", Edit("(1 - 2 * label_smoothing)", "(1 - label_smoothing)"),
     test_rdpo_starts_at_log_2_with_a_steeper_slope),
    ("reference forgotten", Edit("rejected_logprobs - ref_rejected_logprobs", "rejected_logprobs"),
     test_rdpo_loss_by_hand)])
def test_a_classic_wrong_answer_is_caught(monkeypatch, mistake, wrong, test):
    check_caught(monkeypatch, rdpo, "rdpo_loss", mistake, wrong, [test])
