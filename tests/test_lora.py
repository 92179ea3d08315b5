"""lora.py: nothing changes at first, only adapters learn, off and merged are what they say."""
import pytest
import torch

import lora
from lora import Adapted, add_lora, adapters_off, merge_lora
from model import GPT, GPTConfig, RewardModel


def small():
    torch.manual_seed(0)
    return GPT(GPTConfig(32, 64, 3, 2, 16)).eval()


TOKENS = torch.arange(1, 25).view(2, 12)


def trained(model, steps=3):
    """A few steps of something on whatever is trainable."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model.logprobs(TOKENS, torch.arange(12).expand(2, 12) > 3)[0].mean().neg().backward()
        optimizer.step()


def test_zero_adapters_change_nothing_and_freeze_the_rest():
    gpt = small()
    before = gpt(TOKENS)
    add_lora(gpt, 4)
    assert torch.equal(gpt(TOKENS), before)
    trainable = {name for name, p in gpt.named_parameters() if p.requires_grad}
    assert len(trainable) == 3 * 4 * 2 and all(name.endswith((".a", ".b")) for name in trainable)
    frozen = {name: p.clone() for name, p in gpt.named_parameters() if not p.requires_grad}
    trained(gpt)
    assert all(torch.equal(p, frozen[name]) for name, p in gpt.named_parameters() if name in frozen)
    assert (gpt(TOKENS) - before).abs().max() > 1e-2


def test_off_is_the_model_before_and_merged_is_the_model_after():
    gpt = small()
    before, names = gpt(TOKENS), list(gpt.state_dict())
    add_lora(gpt, 2)
    trained(gpt)
    after = gpt(TOKENS)
    with adapters_off(gpt):
        assert torch.equal(gpt(TOKENS), before)
    assert torch.equal(gpt(TOKENS), after)
    mask = torch.arange(12).expand(2, 12) > 3
    torch.testing.assert_close(lora.Reference(gpt).logprobs(TOKENS, mask)[0],
                               small().logprobs(TOKENS, mask)[0])
    merge_lora(gpt)
    assert list(gpt.state_dict()) == names and all(p.requires_grad for p in gpt.parameters())
    torch.testing.assert_close(gpt(TOKENS), after, atol=1e-5, rtol=0)
    assert (gpt(TOKENS) - before).abs().max() > 1e-2


def test_adapters_come_back_on_after_a_fault():
    gpt = small()
    add_lora(gpt, 2)
    with pytest.raises(ZeroDivisionError), adapters_off(gpt):
        1 / 0
    assert all(module.on for module in gpt.modules() if isinstance(module, Adapted))


def test_by_hand():
    """W + (α/r)·B·A on one layer."""
    linear = torch.nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    adapted = Adapted(linear, rank=1, alpha=3.0)
    adapted.a.data, adapted.b.data = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0]])
    assert adapted(torch.tensor([1.0, 1.0])).tolist() == [1 + 3 * 3, 1]


def test_a_reward_model_keeps_its_head_trainable():
    model = RewardModel(small())
    add_lora(model.gpt, 2)
    assert model.head.weight.requires_grad
    merge_lora(model)
    assert not any(isinstance(module, Adapted) for module in model.modules())
