"""rDPO: DPO whose expected loss does not change when a known share of the labels is flipped.

    L = [ (1 − ε) ℓ(h) − ε ℓ(−h) ] / (1 − 2ε),   ℓ(h) = −log σ(β h)         → rdpo_loss

With labels flipped at rate ε the expectation of this is that of ℓ with clean labels: unbiased, at
the price of variance, as a pair's loss can be far below 0. Conservative DPO (label_smoothing of
`dpo_loss`) has a plus where this has its minus: it pulls h to a finite value, whatever the noise.

    python -m systems.rdpo --run out/tinytown
"""
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

import train_dpo
from common.run import DeviceFlags, main
from systems.table import again, measured


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # Tinytown run in which it is measured
    data: tuple = ()               # rankings; empty: rank/some.jsonl inside run
    init: str = ""                 # SFT checkpoint; empty: sft inside run
    out: str = ""                  # empty: systems/rdpo inside run
    beta: float = 0.15             # as Tinytown's DPO
    flip: float = 0.25             # ε, share of labels that is flipped


def rdpo_loss(policy_chosen_logprobs: Tensor, policy_rejected_logprobs: Tensor,
              ref_chosen_logprobs: Tensor, ref_rejected_logprobs: Tensor, beta: float,
              label_smoothing: float = 0.25) -> tuple[Tensor, Tensor, Tensor]:
    """Robust DPO (Chowdhury et al. 2024). Arguments and results as `dpo_loss`; label_smoothing is
    ε, the share of labels that is flipped, below ½. At h = 0 every loss is log 2 and its gradient
    1/(1 − 2ε) times DPO's. It has no lower bound: for h → ∞ it falls like −ε β h/(1 − 2ε).
    """
    chosen_logratios = policy_chosen_logprobs - ref_chosen_logprobs         # (B,)
    rejected_logratios = policy_rejected_logprobs - ref_rejected_logprobs   # (B,)
    logits_diff = chosen_logratios - rejected_logratios                     # (B,)  h
    losses = (-(1 - label_smoothing) * F.logsigmoid(beta * logits_diff)
              + label_smoothing * F.logsigmoid(-beta * logits_diff)) / (1 - 2 * label_smoothing)
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def train(config: Config) -> dict:
    """DPO's loop with this loss."""
    return train_dpo.train(train_dpo.Config(
        data=config.data, init=config.init, out=config.out, beta=config.beta, batch_size=16,
        label_smoothing=config.flip, seed=config.seed, **again(config.out)), rdpo_loss)


if __name__ == "__main__":
    main(lambda config: measured(train, config, "rdpo"), Config)
