"""Devices, precision, presets, and what a run says about memory before it starts."""
import gc
import subprocess
import sys
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train_base
import train_dpo
import train_ppo
import train_rm
import train_sft
from common import estimate, optimizer
from common import machine as machines
from common.cli import parse_args
from common.errors import InputError
from common.estimate import activation_bytes, report_memory
from common.machine import Machine, find_machine
from common.optimizer import adamw
from model import GPT, GPTConfig, RewardModel

SCRIPTS = (train_base, train_sft, train_rm, train_ppo, train_dpo)


def machine(dtype=torch.float32, scale: float = 0.0) -> Machine:
    return Machine(torch.device("cpu"), dtype,
                   torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale > 0))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_script_has_a_preset_for_each_machine_and_each_is_read(script):
    assert {"tinytown", "cpu", "gpt2", "t4", "mps"} <= script.PRESETS.keys()
    for name, values in script.PRESETS.items():
        config = parse_args(script.Config, ["--preset", name], script.PRESETS)
        assert {field: getattr(config, field) for field in values} == values
    for name, device, dtype in (("cpu", "cpu", "float32"), ("gpt2", "cuda", "bfloat16"),
                                ("t4", "cuda", "float16"), ("mps", "mps", "float32")):
        assert (script.PRESETS[name]["device"], script.PRESETS[name]["dtype"]) == (device, dtype)


# ----------------------------------------------------------------------------- devices

def test_a_run_on_the_cpu_asks_for_no_other_device():
    """In a process of its own, so that imports are seen too."""
    code = ("import torch\n"
            "def asked(*_): raise SystemExit('asked for a GPU')\n"
            "torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = "
            "torch.backends.mps.is_available = asked\n"
            "import train_sft\n"
            "from common.run import start\n"
            "run = start(train_sft.Config(device='cpu', dtype='float32'))\n"
            "torch.cuda.get_rng_state = torch.cuda.get_rng_state_all = asked\n"
            "from model import GPT, GPTConfig\n"
            "run.train(GPT(GPTConfig(16, 64, 2, 2, 32)))\n"
            "run.expect([[(1, 9)]])\n"
            "print(run.device)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "cpu\n", done.stderr


@pytest.mark.parametrize("cuda, mps, found", [(True, True, "cuda"), (False, True, "mps"),
                                              (False, False, "cpu")])
def test_auto_takes_the_first_device_there_is(monkeypatch, cuda, mps, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(machines, "best_dtype", lambda device: torch.float32)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.amp, "GradScaler",
                        lambda *_, **__: SimpleNamespace(scale=lambda x: x))
    assert find_machine(train_sft.Config()).device.type == found


def test_old_gpus_get_fp16_and_new_ones_bf16(monkeypatch):
    for native, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: native or including_emulation)
        assert machines.best_dtype(torch.device("cuda")) == dtype


def test_an_unknown_precision_is_refused():
    with pytest.raises(InputError,
                       match="--dtype float8: expected auto, float32, bfloat16 or float16"):
        find_machine(train_sft.Config(device="cpu", dtype="float8"))


# ----------------------------------------------------------------------------- fp16

def test_a_scaled_step_is_the_step():
    """Two optimizers on one loss, with clipping, reach the same weights with a loss scale of 1024
    as without."""
    results = []
    for here in (machine(), machine(scale=1024.0)):
        torch.manual_seed(0)
        first, second = nn.Linear(4, 3), nn.Linear(3, 1)
        rates = {adamw(first, 1.0): 1e-2, adamw(second, 1.0): 3e-2}
        for _ in range(3):
            loss = 5 * second(first(torch.ones(2, 4))).square().mean()
            here.scaler.scale(loss).backward()
            norm = optimizer.take_step(rates, here.scaler, 0.5)
        results.append((norm, *(p.detach().clone() for model in (first, second)
                                for p in model.parameters())))
        assert all(p.grad is None for model in (first, second) for p in model.parameters())
    # A norm over 0.5 gave clipping work to do.
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5) and results[0][0] > 0.5
    for a, b in zip(results[0][1:], results[1][1:]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_step_that_overflows_is_left_out_and_the_scale_halved():
    here, model = machine(scale=1024.0), nn.Linear(2, 1)
    before = model.weight.detach().clone()
    here.scaler.scale(model(torch.full((1, 2), float("inf"))).sum()).backward()
    optimizer.take_step({adamw(model, 1.0): 1e-2}, here.scaler, 1.0)
    assert torch.equal(model.weight, before) and here.scaler.get_scale() == 512


def test_training_in_fp16_goes_as_in_fp32(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 200)
    losses = {}
    for dtype in ("float32", "float16"):
        losses[dtype] = train_base.train(train_base.Config(
            data=(str(tmp_path / "a.txt"),), tokenizer="tinytown", block_size=32, n_layer=2,
            n_head=2, n_embd=32, lr=1e-2, warmup=2, steps=12, batch_size=4, micro_batch=3,
            device="cpu", dtype=dtype, out=str(tmp_path / dtype)))["val_loss"]
    assert losses["float32"] < 3 and losses["float16"] == pytest.approx(losses["float32"], abs=0.05)


def test_micro_batches_of_windows_add_up(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 200)
    losses = [train_base.train(train_base.Config(
        data=(str(tmp_path / "a.txt"),), tokenizer="tinytown", block_size=32, n_layer=1, n_head=2,
        n_embd=16, lr=1e-2, warmup=2, steps=6, batch_size=5, micro_batch=micro, device="cpu",
        dtype="float32", out=str(tmp_path / str(micro))))["val_loss"] for micro in (0, 2)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


# ----------------------------------------------------------------------------- memory

def test_tokens_of_the_largest_forward_pass_count_its_padding():
    a, b, c, d, e = (1, 3), (1, 9), (1, 4), (2, 4), (1, 1)
    assert estimate.most_tokens([[a, b], [c, d, e]]) == 18
    assert estimate.most_tokens([[a, b], [c, d, e]], micro_batch=1) == 9
    assert estimate.most_tokens([[a, c], [e, d]]) == 12
    # The part that is largest counts, not the first.
    assert estimate.most_tokens([[e, e, e, d]], micro_batch=3) == 8
    assert estimate.most_tokens([]) == estimate.most_tokens([[]]) == 0


def test_activations_are_those_that_a_forward_pass_leaves_behind():
    """Against the allocator's own account of a pass over other numbers of tokens."""
    gpt = GPT(GPTConfig(64, 512, 3, 4, 128))
    for rows in (2, 16):
        with torch.profiler.profile(profile_memory=True) as profile:
            states = gpt.hidden(torch.randint(0, 500, (rows, 64)))
        left = sum(event.self_cpu_memory_usage for event in profile.key_averages())
        assert states.requires_grad
        assert activation_bytes(RewardModel(gpt), rows * 64) == pytest.approx(
            left, rel=0.3 if rows == 2 else 0.12)


def test_what_was_measured_is_freed():
    """Several trainings in one process would else fill the memory."""
    gpt = GPT(GPTConfig(64, 512, 2, 4, 32))
    weights = weakref.ref(gpt.wte.weight)
    activation_bytes(gpt, 64)
    del gpt
    gc.collect()
    assert weights() is None


def test_the_report_adds_up(capsys):
    policy, reward = GPT(GPTConfig(16, 64, 2, 2, 32)), RewardModel(GPT(GPTConfig(16, 64, 1, 2, 32)))
    N, M = sum(p.numel() for p in policy.parameters()), sum(p.numel() for p in reward.parameters())
    policy.wpe.requires_grad_(False)
    bytes_ = report_memory(100, trained=[policy], frozen=[reward]) * 2 ** 30
    assert bytes_ == pytest.approx(
        4 * (N + M) + 12 * (N - 16 * 32) + activation_bytes(policy, 100))
    cache = report_memory(100, trained=[policy], frozen=[reward],
                          cached=10 ** 6) * 2 ** 30
    assert cache == pytest.approx(4 * (N + M) + 12 * (N - 16 * 32) + 2 * 2 * 32 * 10 ** 6 * 4)
    assert "may not fit" not in capsys.readouterr().err


def test_what_cannot_fit_is_refused(monkeypatch):
    """From half as much again as there is; logits of sampling count with keys and values."""
    gpt = GPT(GPTConfig(16, 64, 2, 2, 32))
    states = 12 * sum(p.numel() for p in gpt.parameters())
    sampling = 2 * 2 * 32 * 4 * 10 ** 6 + 16 * 64 * 10 ** 5
    for room, refused in (((states + sampling) / 1.5 - 1000, True),
                          ((states + sampling) / 1.5 + 1000, False)):
        monkeypatch.setattr("common.estimate.available", lambda device: room)
        with pytest.raises(InputError, match="that cannot fit") if refused else nullcontext():
            report_memory(10, trained=[gpt], cached=10 ** 6, rows=10 ** 5)


def test_too_little_memory_is_said_with_the_remedy(monkeypatch, capsys):
    """The weights are there already and not counted against what is free."""
    gpt = GPT(GPTConfig(16, 64, 2, 2, 32))
    need = 12 * sum(p.numel() for p in gpt.parameters()) + activation_bytes(gpt, 10)
    for room, said in ((need - 1000, True), (need + 1000, False)):
        monkeypatch.setattr("common.estimate.available", lambda device: room)
        report_memory(10, trained=[gpt])
        assert ("this may not fit: --micro_batch 1" in capsys.readouterr().err) == said


def test_a_likelihood_keeps_no_probabilities():
    gpt = GPT(GPTConfig(16, 64, 2, 2, 32))
    assert (activation_bytes(gpt, 100)
            - activation_bytes(gpt, 100, likelihood=True)) == 4 * 100 * 64


def test_the_estimate_draws_no_random_number():
    gpt = GPT(GPTConfig(16, 64, 2, 2, 32, dropout=0.5)).train()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    activation_bytes(gpt, 10)
    assert torch.equal(torch.rand(4), expected)
