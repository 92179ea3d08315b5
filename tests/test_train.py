"""Every script's `train()` on a tiny config, end to end.

Also run-time assertions, and what bad input says.
"""
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
import train_base
import train_dpo
import train_ppo
import train_rm
import train_sft
import rollout
from common import cli
from common.checkpoint import load_checkpoint, load_gpt, load_reward_model
from common.cli import parse_args
from common.errors import InputError
from common.optimizer import learning_rate
from data import batches
from data.readers import read_demonstrations
from data.tinytown import doses
from data.tinytown.town import NAMES

ROOT = Path(__file__).parent.parent


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def ppo_config(town: Path, out: Path, **changes) -> train_ppo.Config:
    return train_ppo.Config(**dict(
        data=(str(town / "data/rl.jsonl"),), init=str(town / "sft"), reward=str(town / "rm"),
        ptx_data=(str(town / "data/base.txt"),), ptx_windows=2, ptx_window=32, out=str(out),
        steps=3, batch_size=8, max_new_tokens=12, sample_every=2) | changes)


def test_pretraining_and_instruction_tuning_lower_their_losses(town):
    base, sft = metrics(town / "base"), metrics(town / "sft")
    assert base[-1]["loss"] < 0.75 * base[0]["loss"] and base[0]["loss"] > 4
    assert sum(row["loss"] for row in sft[-5:]) < 0.9 * sum(row["loss"] for row in sft[:5])
    assert all(math.isfinite(row["loss"]) for row in base + sft)


def test_every_stage_writes_a_checkpoint_that_the_next_one_reads(town):
    for stage in ("base", "sft"):
        gpt, tokenizer = load_gpt(str(town / stage))
        assert tokenizer.name == "tinytown" and gpt.config.n_embd == 32
    reward_model, _ = load_reward_model(str(town / "rm"))
    assert reward_model.head.weight.shape == (1, 32)
    for stage in ("base", "sft", "rm"):
        assert (json.loads((town / stage / "config.json").read_text())["run"]["out"]
                == str(town / stage))
        assert not list((town / stage).glob("*.partial"))


def test_demonstrations_average_zero_under_the_reward_model(town):
    model, tokenizer = load_reward_model(str(town / "rm"))
    rows = batches.demonstration_rows(read_demonstrations(town / "data/sft.jsonl"),
                                       tokenizer, 96)
    tokens, _, lengths = batches.pad_rows(rows, tokenizer.pad)
    with torch.no_grad():
        assert abs(model.eval()(tokens, lengths).mean().item()) < 1e-4
    assert model.bias.item() != 0


def test_reward_model_learns_a_separable_preference(town, tmp_path):
    rows = [{"prompt": f"Where does {name} live?", "chosen": f"{name} lives at the {place}.",
             "rejected": "I do not care."}
            for name in NAMES for place in ("mill", "inn", "farm")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    final = train_rm.train(train_rm.Config(
        data=(str(tmp_path / "pairs.jsonl"),), init=str(town / "sft"), out=str(tmp_path / "rm"),
        epochs=4, batch_size=8, lr=3e-3))
    assert final["accuracy"] == 1.0 and final["loss"] < 0.3


def test_dpo_starts_at_log_2_and_widens_the_margin(town, tmp_path):
    config = train_dpo.Config(data=(str(town / "rank/rankings.jsonl"),), init=str(town / "sft"),
                              out=str(tmp_path / "dpo"), batch_size=8, micro_batch=4, epochs=3,
                              lr=1e-3, warmup=1)
    train_dpo.train(config)
    rows = metrics(tmp_path / "dpo")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and rows[0]["grad_norm"] > 1e-3
    assert rows[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert sum(row["margin"] for row in rows[-5:]) / 5 > 0.05


def test_micro_batches_change_memory_and_nothing_else(town, tmp_path):
    """Ranking batches and rollouts, cut into parts of unequal token counts, give the loss and the
    gradient of the whole step."""
    def first(script, config, names):
        found = []
        for micro in (0, 3):
            config.micro_batch, config.out = micro, str(tmp_path / f"{script.__name__}{micro}")
            script.train(config)
            # Later rows feel the updates.
            found.append([row[name] for row in metrics(Path(config.out))[:3] for name in names])
        assert found[1] == pytest.approx(found[0], rel=2e-3, abs=1e-5)

    data = dict(data=(str(town / "rank/rankings.jsonl"),), init=str(town / "sft"), batch_size=8)
    first(train_rm, train_rm.Config(**data), ("loss", "grad_norm"))
    first(train_dpo, train_dpo.Config(**data), ("loss", "grad_norm", "margin"))
    first(train_ppo, ppo_config(town, tmp_path),
          ("policy_loss", "value_loss", "clip_fraction", "kl", "score"))


def test_reference_computed_after_training_is_refused(town, tmp_path, monkeypatch):
    """Reference log-probabilities of any policy but the start are found at the first step."""
    right = train_dpo.set_reference

    def wrong(model, rows, *rest):
        right(model, rows, *rest)
        for row in rows:
            row.ref_logprobs = [2 * value for value in row.ref_logprobs]
    monkeypatch.setattr(train_dpo, "set_reference", wrong)
    with pytest.raises(RuntimeError, match="policy and reference"):
        train_dpo.train(train_dpo.Config(
            data=(str(town / "rank/rankings.jsonl"),), init=str(town / "sft"), out=str(tmp_path)))


def test_ppo_refuses_a_reward_model_of_another_vocabulary(town, tmp_path, monkeypatch):
    model, _ = load_reward_model(str(town / "rm"))
    monkeypatch.setattr(rollout, "load_reward_model",
                        lambda folder: (model, SimpleNamespace(name="gpt2")))
    with pytest.raises(InputError, match="--reward .*gpt2 vocabulary.*tinytown"):
        train_ppo.train(ppo_config(town, tmp_path / "out"))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ppo_starts_at_the_reference_with_ratio_one(town, tmp_path, temperature):
    """train() itself asserts the ratio; KL to the reference is exactly 0 before any update."""
    train_ppo.train(ppo_config(town, tmp_path, temperature=temperature, minibatches=1))
    rows = metrics(tmp_path)
    assert rows[0]["kl"] == 0 and rows[0]["kl_k3"] == 0 and rows[0]["clip_fraction"] == 0
    assert rows[1]["kl"] != 0
    assert rows[0]["objective"] == pytest.approx(rows[0]["score"], abs=1e-5)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert len((tmp_path / "rollouts.jsonl").read_text().splitlines()) == 24


def test_ppo_refuses_old_logprobs_that_are_not_the_policys(town, tmp_path, monkeypatch):
    right = train_ppo.rollout

    def wrong(*args):
        batch = right(*args)
        batch.logprobs = torch.where(batch.mask, batch.logprobs + 0.01, 0.0)
        return batch
    monkeypatch.setattr(train_ppo, "rollout", wrong)
    with pytest.raises(RuntimeError, match="ratio"):
        train_ppo.train(ppo_config(town, tmp_path))


def test_ppo_raises_a_plain_python_reward_and_dropout_never_acts(town, tmp_path):
    def reward(conversations, responses):
        assert all(messages[-1]["role"] == "user" for messages in conversations)
        return [float("o" in response) - 0.02 * len(response) for response in responses]
    train_ppo.train(ppo_config(town, tmp_path, steps=25, batch_size=32, lr=3e-3, value_lr=3e-3,
                               beta=0.0, ptx_coef=0.0, missing_end_score=-2.0, inner_epochs=2),
                    reward=reward)
    rows = metrics(tmp_path)
    assert sum(row["score"] for row in rows[-4:]) > sum(row["score"] for row in rows[:4]) + 1.0


def test_a_response_that_never_ends_gets_the_fixed_score(town, tmp_path):
    train_ppo.train(ppo_config(town, tmp_path, steps=1, max_new_tokens=1, missing_end_score=-7.5))
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    unended = [row for row in rows if not row["ended"]]
    assert unended and all(row["score"] == -7.5 for row in unended)


def test_adaptive_beta_moves_towards_the_target(town, tmp_path):
    train_ppo.train(ppo_config(town, tmp_path, target_kl=5.0, horizon=100))
    rows = metrics(tmp_path)
    assert rows[1]["beta"] == pytest.approx(0.05 * (1 - 0.2 * 8 / 100)) and rows[0]["beta"] == 0.05


def test_micro_batches_give_the_same_model(town, tmp_path):
    """One step over 12 demonstrations, at once or in parts of 5, leaves the same weights."""
    (tmp_path / "few.jsonl").write_text(
        "".join((town / "data/sft.jsonl").read_text().splitlines(keepends=True)[:12]))
    states = []
    for micro in (0, 5):
        train_sft.train(train_sft.Config(
            data=(str(tmp_path / "few.jsonl"),), val=str(tmp_path / "few.jsonl"),
            init=str(town / "base"), out=str(tmp_path / f"sft{micro}"), epochs=1, batch_size=12,
            micro_batch=micro, lr=1e-4))
        states.append(load_checkpoint(tmp_path / f"sft{micro}", "language model")[0])
    base = load_checkpoint(town / "base", "language model")[0]
    for name in base:
        moved, apart = ((states[0][name] - base[name]).abs().max(),
                        (states[0][name] - states[1][name]).abs().max())
        # Adam's first step magnifies rounding in gradients near 0.
        assert apart <= 0.1 * moved + 1e-7, name


def test_the_same_seed_gives_the_same_model(town, tmp_path):
    states = []
    for name in ("a", "b"):
        train_ppo.train(ppo_config(town, tmp_path / name))
        states.append(load_checkpoint(tmp_path / name, "language model")[0])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_evaluate_writes_report_and_page(town, tmp_path):
    for stage in ("data", "base", "sft", "rm"):
        (tmp_path / stage).symlink_to(town / stage)
    for name, ptx in (("ppo", 1.0), ("ppo_no_kl", 0.0)):
        train_ppo.train(ppo_config(town, tmp_path / name, steps=10, batch_size=4, ptx_coef=ptx))
    (tmp_path / "ppo_again").symlink_to(tmp_path / "ppo")
    (tmp_path / "base_large").symlink_to(town / "base")
    report = evaluate.evaluate(evaluate.Config(run=str(tmp_path), n=2, kl_prompts=3, kl_samples=4,
                                               max_new_tokens=12, also=("ppo_again",)))
    saved = json.loads((tmp_path / "report.json").read_text())
    policies = saved["policies"]
    assert set(policies) == {"base", "sft", "ppo", "ppo_no_kl", "ppo_again", "base_prompted",
                             "large_prompted", "best_of_2"}
    for name, policy in policies.items():
        best = format(policy["best_temperature"], "g")
        assert set(policy["at"]) == ({"1"} if name == "best_of_2" else {"0", "0.5", "0.7", "1"})
        assert 0 <= policy["at"][best]["gold"] <= 1
        assert set(policy["best_wins"]) == {"sft", "base_prompted", "large_prompted"}
    # Greedy SFT against itself: the same responses, half a win each.
    assert policies["sft"]["at"]["0"]["win_rate"] == {"rate": 0.5, "standard_error": 0}
    assert policies["ppo_again"]["at"]["0"]["gold"] == policies["ppo"]["at"]["0"]["gold"]
    assert policies["base_prompted"]["asked"].startswith(("talk", "task"))
    assert set(policies["ppo"]["plain_tasks"]) == {"fact", "question", "summary"}
    assert set(policies["ppo"]["declined"]) == {"0", "1"}
    assert policies["sft"]["kl"] == 0 and len(report["over_optimisation"]["ppo"]) == 2
    assert "| ppo |" in (tmp_path / "report.md").read_text()
    with pytest.raises(InputError, match="runs/lectures.sh trains it"):
        doses.measure(doses.Config(run=str(tmp_path), max_new_tokens=12))
    for place in {*doses.BETAS.values(), *doses.GAMMAS.values()} - {"ppo"}:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).symlink_to(tmp_path / ("sft" if place == "doses/beta_1.35" else "ppo"))
    table = doses.measure(doses.Config(run=str(tmp_path), max_new_tokens=12))
    assert table["β"]["0.15"] == table["γ_ptx"]["1"] and set(table["γ_ptx"]) == set(doses.GAMMAS)
    assert table["β"]["1.35"]["KL, nats"] == 0 != table["β"]["0.15"]["KL, nats"]
    ppo, greedy = policies["ppo"], table["β"]["0.15"]["gold, T = 0"]
    assert greedy == pytest.approx(ppo["at"]["0"]["gold"], abs=1e-4)
    loss = table["β"]["0.15"]["pretraining loss"]
    assert loss == pytest.approx(ppo["pretraining_loss"], abs=1e-4)
    with pytest.raises(InputError, match="nothing_here"):
        evaluate.evaluate(evaluate.Config(run=str(tmp_path), also=("nothing_here",)))


# ----------------------------------------------------------------------------- bad input

def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)


def complaint(config_train, config) -> str:
    with pytest.raises(InputError) as caught:
        config_train(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_broken_line_is_one_line_of_error_and_no_traceback(town, tmp_path):
    good = '{"prompt": "Who is Ada?", "response": "Ada is a smith."}\n'
    (tmp_path / "rows.jsonl").write_text(good * 16 + "{oops\n" + good)
    done = run("train_sft.py", "--data", str(tmp_path / "rows.jsonl"), "--init", str(town / "base"),
               "--out", str(tmp_path / "out"))
    assert done.returncode != 0 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error:") and "rows.jsonl" in last and "17" in last


def test_an_unknown_flag_is_an_error_that_names_it():
    done = run("train_dpo.py", "--bta", "0.1")
    assert done.returncode == 2 and "--bta" in done.stderr and "Traceback" not in done.stderr


def test_missing_field_and_empty_response_name_field_and_line(town, tmp_path):
    for text, word in (('{"instruction": "Say hi."}\n', "output"),
                       ('{"prompt": "Hi.", "response": " "}\n', "response")):
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' + text)
        said = complaint(train_sft.train, train_sft.Config(
            data=(str(tmp_path / "rows.jsonl"),), init=str(town / "base"), out=str(tmp_path)))
        assert "rows.jsonl" in said and "2" in said and word in said


def test_a_checkpoint_of_the_wrong_kind_is_named_with_the_remedy(town, tmp_path):
    said = complaint(train_sft.train, train_sft.Config(
        data=(str(town / "data/sft.jsonl"),), init=str(town / "rm"), out=str(tmp_path)))
    assert str(town / "rm") in said and "reward model" in said and "train_base.py" in said
    said = complaint(train_ppo.train, ppo_config(town, tmp_path, reward=str(town / "sft")))
    assert str(town / "sft") in said and "train_rm.py" in said


def test_prompts_beyond_the_context_are_counted_and_refused_if_none_is_left(town, tmp_path, capsys):
    long = json.dumps({"prompt": "the mill " * 60}) + "\n"
    (tmp_path / "long.jsonl").write_text(long)
    said = complaint(train_ppo.train,
                     ppo_config(town, tmp_path, data=(str(tmp_path / "long.jsonl"),)))
    assert "84 tokens" in said and "block_size" in said
    (tmp_path / "mixed.jsonl").write_text(long + (town / "data/rl.jsonl").read_text())
    train_ppo.train(ppo_config(town, tmp_path, data=(str(tmp_path / "mixed.jsonl"),), steps=1))
    assert "1 dropped" in capsys.readouterr().err


def test_out_of_range_and_missing_flags_name_field_and_limit(town, tmp_path):
    assert "--lam" in complaint(train_ppo.train, ppo_config(town, tmp_path, lam=1.5))
    assert "--ptx_data" in complaint(train_ppo.train, ppo_config(town, tmp_path, ptx_data=()))
    assert "--data" in complaint(train_rm.train, train_rm.Config())
    assert "--device" in complaint(train_sft.train,
                                   train_sft.Config(data=("x",), device="no-such-device"))
    assert "no-such-module" in complaint(train_ppo.train,
                                         ppo_config(town, tmp_path, reward="no-such-module:f"))


def test_flags_override_presets_and_presets_override_defaults():
    config = parse_args(train_sft.Config, ["--preset", "lima", "--lr", "0.5", "--data", "a", "b"],
                        train_sft.PRESETS)
    assert (config.epochs, config.dropout, config.weight_decay, config.lr, config.data) == (
        15, 0.3, 0.1, 0.5, ("a", "b"))


def test_learning_rate_warms_up_and_ends_at_its_floor():
    assert learning_rate(0, 100, 1.0, warmup=10) == pytest.approx(0.1)
    assert learning_rate(9, 100, 1.0, warmup=10) == 1.0
    assert learning_rate(99, 100, 1.0, warmup=10) == pytest.approx(0.1)
    assert learning_rate(50, 101, 1.0, shape="linear") == pytest.approx(0.55)


# ----------------------------------------------------------------------------- the house

def test_real_preferences_are_learned(shared_data, tmp_path, town):
    """Polite against rude, 100 real pairs on the tiny model: better than chance after seconds."""
    rows = json.loads((shared_data / "instruction_data_with_preference.json").read_text())
    short = [row for row in rows if len(row["chosen"]) + len(row["rejected"]) < 120
             and row["chosen"] != row["rejected"]][:60]
    (tmp_path / "pairs.json").write_text(json.dumps(short))
    final = train_rm.train(train_rm.Config(
        data=(str(tmp_path / "pairs.json"),), init=str(town / "sft"), out=str(tmp_path / "rm"),
        val=str(tmp_path / "pairs.json"), epochs=6, batch_size=8, lr=2e-3))
    assert final["accuracy"] > 0.8


@pytest.mark.parametrize("fault", [
    MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    RuntimeError("MPS backend out of memory (9 GiB)")])
def test_out_of_memory_is_one_line_with_advice(monkeypatch, fault):
    def train(config):
        raise fault

    monkeypatch.setattr(sys, "argv", ["train_dpo.py"])
    with pytest.raises(SystemExit) as caught:
        cli.main(train, train_dpo.Config)
    assert ("--micro_batch 1 or --max_tokens 256 or --lora_rank 8" in str(caught.value.code)
            and "\n" not in str(caught.value.code))
    with pytest.raises(RuntimeError, match="something else"):
        cli.main(lambda config: (_ for _ in ()).throw(RuntimeError("something else")),
                    train_dpo.Config)


def test_adapters_in_every_stage(town, tmp_path):
    """With lora_rank the blocks learn, all else stays, and the saved model is a plain one again."""
    start, rankings = (load_checkpoint(town / "sft", "language model")[0],
                       (str(town / "rank/rankings.jsonl"),))
    shared = dict(lora_rank=2, lr=1e-2)
    train_sft.train(train_sft.Config(
        data=(str(town / "data/sft.jsonl"),), init=str(town / "sft"), out=str(tmp_path / "sft"),
        epochs=1, **shared))
    train_dpo.train(train_dpo.Config(data=rankings, init=str(town / "sft"),
                                     out=str(tmp_path / "dpo"), batch_size=4, **shared))
    train_ppo.train(ppo_config(town, tmp_path / "ppo", **shared))
    for stage in ("sft", "dpo", "ppo"):
        state = load_checkpoint(tmp_path / stage, "language model")[0]
        assert state.keys() == start.keys()
        moved = {name for name in state if not torch.equal(state[name], start[name])}
        assert moved == {name for name in state if name.endswith(
            ("qkv.weight", "proj.weight", "up.weight", "down.weight"))}
    train_rm.train(train_rm.Config(data=rankings, init=str(town / "sft"), out=str(tmp_path / "rm"),
                                   batch_size=4, **shared))
    state = load_checkpoint(tmp_path / "rm", "reward model")[0]
    assert torch.equal(state["gpt.wte.weight"], start["wte.weight"])
    assert not torch.equal(state["gpt.blocks.0.up.weight"], start["blocks.0.up.weight"])


def test_max_tokens_drops_or_cuts_long_rows(town, tmp_path, capsys):
    config = dict(init=str(town / "sft"), batch_size=4, max_tokens=40)
    train_dpo.train(train_dpo.Config(data=(str(town / "rank/rankings.jsonl"),),
                                     out=str(tmp_path / "dpo"), **config))
    assert "longer than 40 tokens" in capsys.readouterr().err
    train_sft.train(train_sft.Config(data=(str(town / "data/sft.jsonl"),),
                                     out=str(tmp_path / "sft"), epochs=1, **config))
    assert "cut, longer than 40 tokens" in capsys.readouterr().err


def test_pretraining_goes_on_from_a_checkpoint(town, tmp_path):
    """A model that is there learns text of another kind; its shape and vocabulary are those of the
    checkpoint."""
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 200)
    final = train_base.train(train_base.Config(
        data=(str(tmp_path / "a.txt"),), init=str(town / "base"), out=str(tmp_path / "base"),
        lr=5e-3, steps=10, batch_size=4, warmup=2))
    gpt, tokenizer = load_gpt(str(tmp_path / "base"))
    assert (tokenizer.name == load_gpt(str(town / "base"))[1].name
            and gpt.config == load_gpt(str(town / "base"))[0].config)
    assert final["val_loss"] < metrics(tmp_path / "base")[0]["loss"] - 1


def test_a_reward_model_of_no_epochs_is_only_measured(town, tmp_path):
    config = train_rm.Config(data=(str(town / "rank/rankings.jsonl"),), init=str(town / "sft"),
                             out=str(tmp_path), epochs=0)
    assert 0 <= train_rm.train(config)["accuracy"] <= 1 and metrics(tmp_path) == []
    state, start = (load_checkpoint(tmp_path, "reward model")[0],
                    load_checkpoint(town / "sft", "language model")[0])
    assert torch.equal(state["gpt.blocks.0.up.weight"], start["blocks.0.up.weight"])
