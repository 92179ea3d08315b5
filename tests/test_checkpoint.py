"""Interrupted runs go on as if nothing had happened; damaged checkpoints are named, not loaded."""
import functools
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_base
import train_dpo
import train_ppo
import train_rm
import train_sft
from common import checkpoint, cli, files, optimizer, resume
from common import log as books
from common import run as door
from common.checkpoint import load_checkpoint
from common.errors import InputError, Stopped
from data import batches
from data.batches import Row
from model import GPT, GPTConfig

SCRIPTS = {"base": train_base, "sft": train_sft, "rm": train_rm, "ppo": train_ppo, "dpo": train_dpo}


def config_of(stage: str, town: Path, out: Path, **changes):
    """A run of eight steps or so with everything in it that has a state: dropout, text,
    accumulation, adaptive β."""
    text, rankings = (str(town / "data/base.txt"),), (str(town / "rank/rankings.jsonl"),)
    fields = {
        "base": dict(data=text, init=str(town / "base"), steps=8, batch_size=4, micro_batch=3,
                     dropout=0.2, eval_every=3, window=32),
        "sft": dict(data=(str(town / "data/sft.jsonl"),), init=str(town / "sft"), ptx_data=text,
                    ptx_windows=2, ptx_window=32, epochs=2, dropout=0.2),
        "rm": dict(data=rankings, init=str(town / "sft"), epochs=2, batch_size=4),
        "ppo": dict(data=(str(town / "data/rl.jsonl"),), init=str(town / "sft"),
                    reward=str(town / "rm"), ptx_data=text, ptx_windows=2, ptx_window=32, steps=6,
                    batch_size=6, max_new_tokens=10, target_kl=0.5, horizon=50, sample_every=2,
                    lr=1e-3),
        "dpo": dict(data=rankings, init=str(town / "sft"), epochs=2, batch_size=4)}[stage]
    return SCRIPTS[stage].Config(
        **fields | dict(out=str(out), device="cpu", dtype="float32") | changes)


def run(stage: str, *args, **changes) -> dict:
    return SCRIPTS[stage].train(config_of(stage, *args, **changes))


def stop_at(monkeypatch, *steps: int) -> None:
    """Send SIGTERM while these steps (from 1) are logged."""
    write = books.Log.step

    def write_and_stop(self, step, *args, **numbers):
        write(self, step, *args, **numbers)
        if step in steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(books.Log, "step", write_and_stop)


def outcome(out: Path) -> tuple[dict, list[dict], dict]:
    """(weights, logged rows, final numbers) without what a clock wrote."""
    state = torch.load(out / "model.pt", weights_only=True)
    rows = [json.loads(line) for path in sorted(out.glob("*.jsonl"))
            for line in path.read_text().splitlines()]
    final = json.loads((out / "final.json").read_text())
    timed = ("seconds", "tokens_per_second", "memory_gib")
    return (state, [{k: v for k, v in row.items() if k not in timed} for row in rows],
            {k: v for k, v in final.items() if k not in timed})


def kept(out: Path) -> list[str]:
    """The steps of the states in a run's folder; there is nothing else but the lock."""
    return sorted(path.name.split("_")[1] for path in (out / "resume").iterdir()
                  if path.name != "lock")


def assert_same(one: Path, other: Path) -> None:
    (a, rows_a, final_a), (b, rows_b, final_b) = outcome(one), outcome(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert rows_a == rows_b and final_a == final_b


@pytest.mark.parametrize("stage, changes", [
    *((stage, {}) for stage in SCRIPTS), ("sft", dict(dtype="float16")),
    ("ppo", dict(lora_rank=2)), ("dpo", dict(lora_rank=2))])
def test_a_stopped_run_goes_on_bit_for_bit(stage, changes, town, tmp_path, monkeypatch):
    """A run stopped twice by a signal and resumed twice has the weights, logs and final numbers of
    the run that was left alone."""
    # The large scale is for fp16, which has to lower it.
    monkeypatch.setattr(torch.amp, "GradScaler",
                        functools.partial(torch.amp.GradScaler, init_scale=2.0 ** 22))
    run(stage, town, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        stop_at(patch, 2, 5)
        for resumed in (False, True):
            with pytest.raises(Stopped, match="with --resume"):
                run(stage, town, tmp_path / "cut", resume=resumed, **changes)
    run(stage, town, tmp_path / "cut", resume=True, **changes)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    start = load_checkpoint(town / ("base" if stage == "base" else "sft"), "language model")[0]
    moved = outcome(tmp_path / "whole")[0]
    name = "gpt.blocks.0.up.weight" if stage == "rm" else "blocks.0.up.weight"
    assert not torch.equal(moved[name], start["blocks.0.up.weight"])  # there was something to lose


def child(stage: str, town: Path, out: Path, training) -> None:
    """A run in a process of its own, which says when training begins."""
    torch.set_num_threads(1)
    begin = books.Log.__init__

    def ready(self, *args):
        begin(self, *args)
        training.set()

    books.Log.__init__ = ready
    run(stage, town, out, save_every=1, resume=bool(list(out.glob("resume/step_*.pt"))))


@pytest.fixture(scope="module")
def processes():
    """Processes that fork from one in which torch has been imported, and has not computed yet."""
    context = multiprocessing.get_context("forkserver")
    # The optimizer imports torch._dynamo, which takes a second and a half.
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    # Without this path the forkserver does not find this module, and forks without it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_run_killed_at_random_goes_on_bit_for_bit(stage, town, tmp_path, processes):
    """kill −9 at random moments after the start of training, then again from what is there.

    That is repeated until KILLS are done. Every run of the tests does three; for more of them:

        KILLS=20 pytest tests/test_checkpoint.py -k killed
    """
    start = time.time()
    run(stage, town, tmp_path / "whole", save_every=1)
    length, draw, kills, rounds = time.time() - start, random.Random(stage), 0, 0
    while kills < int(os.environ.get("KILLS", 3)):
        out, exitcode = tmp_path / str(rounds), None
        rounds += 1
        while exitcode != 0 and not (out / "final.json").exists():
            training = processes.Event()
            process = processes.Process(target=child, args=(stage, town, out, training))
            process.start()
            assert training.wait(60)
            process.join(draw.uniform(0, 0.7 * length))
            process.kill()                                  # does nothing to one that has ended
            process.join()
            exitcode = process.exitcode
            assert exitcode in (0, -signal.SIGKILL)
            kills += exitcode != 0
        assert_same(tmp_path / "whole", out)


def test_resuming_needs_a_checkpoint_and_the_same_flags(town, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no checkpoint in .*; leave --resume out"):
        run("sft", town, tmp_path, resume=True)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stopped):
            run("sft", town, tmp_path)
    with pytest.raises(InputError, match="--lr 0.5: the run in .* had 0.001"):
        run("sft", town, tmp_path, resume=True, lr=0.5)
    with pytest.raises(InputError, match="holds an unfinished run"):
        run("sft", town, tmp_path)


HOLD = """import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(100)"""


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_in_one_folder_are_refused(resume, town, tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    if resume:
        stop_at(monkeypatch, 2)
        with pytest.raises(Stopped):
            run("base", town, tmp_path / "a")
    else:
        (tmp_path / "a/resume").mkdir(parents=True)
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "a/resume/lock")],
                          stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(InputError, match="another run is writing to it"):
                run("base", town, tmp_path / "a", resume=resume)
        finally:
            other.kill()
    assert all(path.read_bytes() == content for path, content in before.items())
    run("base", town, tmp_path / "a", resume=resume)    # a process that was killed holds nothing


def test_the_last_two_checkpoints_are_kept(town, tmp_path):
    run("base", town, tmp_path, save_every=3)
    assert kept(tmp_path) == ["000000006", "000000008"]
    with pytest.raises(InputError, match="this run is finished; choose another --out"):
        run("base", town, tmp_path, save_every=3, resume=True)
    with pytest.raises(InputError, match="holds a finished run"):
        run("base", town, tmp_path, save_every=3)
    # Told to be replaced, it leaves nothing.
    run("base", town, tmp_path, save_every=2, steps=4, overwrite=True)
    assert kept(tmp_path) == ["000000002", "000000004"]


@pytest.mark.parametrize("fault", ["flipped", "cut", "empty"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_offered(fault, town, tmp_path,
                                                                       monkeypatch):
    run("base", town, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Stopped):
            run("base", town, tmp_path / "cut", save_every=2)
    before, last = sorted((tmp_path / "cut/resume").glob("step_*"))
    content = bytearray(last.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    last.write_bytes({"flipped": bytes(content), "cut": bytes(content[:-100]), "empty": b""}[fault])
    with pytest.raises(InputError,
                       match=f"{last.name}: damaged.*delete it to go on from {before.name}"):
        run("base", town, tmp_path / "cut", save_every=2, resume=True)
    last.unlink()
    run("base", town, tmp_path / "cut", save_every=2, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_no_code_in_a_checkpoint_is_run(town, tmp_path, monkeypatch):
    """Not even where the checksum fits."""
    monkeypatch.chdir(tmp_path)
    state = tmp_path / "resume/state.pt"
    state.parent.mkdir()
    torch.save({"step": 1, "state": Evil()}, state)
    state.rename(state.with_name(f"step_000000001_of_8_{files.checksum(state)}.pt"))
    with pytest.raises(InputError, match="holds something else than a run's state"):
        run("base", town, tmp_path, resume=True)
    save(tmp_path / "model", 1.0)
    torch.save(Evil(), tmp_path / "model/model.pt")
    description = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(
        json.dumps(description | {"sha256": files.checksum(tmp_path / "model/model.pt")}))
    with pytest.raises(InputError, match="model.pt: cannot be read .UnpicklingError"):
        load_checkpoint(tmp_path / "model", "language model")
    assert not (tmp_path / "evil").exists()


def test_a_row_that_was_cut_off_is_written_again(town, tmp_path, monkeypatch):
    """A kill in the middle of a row of the log; and a log that was lost."""
    run("ppo", town, tmp_path / "whole")
    for name, damage in (("cut", '{"step": 3, "sco'), ("lost", None)):
        with monkeypatch.context() as patch:
            stop_at(patch, 2)
            with pytest.raises(Stopped):
                run("ppo", town, tmp_path / name)
        for log in (tmp_path / name / "metrics.jsonl", tmp_path / name / "rollouts.jsonl"):
            if damage:
                log.write_text(log.read_text() + damage)
            else:
                log.unlink()
        run("ppo", town, tmp_path / name, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(outcome(tmp_path / "whole")[0].values(),
                                                 outcome(tmp_path / "lost")[0].values()))


def test_a_disk_that_is_full_leaves_the_checkpoint_before(town, tmp_path, monkeypatch):
    save, count = torch.save, []

    def full(state, path):
        count.append(Path(path).name)
        if count.count("saving") == 3:
            Path(path).write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", full)
        with pytest.raises(InputError, match=r"it needs \d+\.\d MiB and [\d,.]+ are free; "
                                             "the one before it is whole"):
            run("base", town, tmp_path / "cut", save_every=2)
    assert kept(tmp_path / "cut") == ["000000002", "000000004"]
    run("base", town, tmp_path / "whole")
    run("base", town, tmp_path / "cut", save_every=2, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.fixture
def small_disk(tmp_path, town):
    """A disk with room for a model and two and a half checkpoints."""
    run("base", town, tmp_path / "measure", save_every=8)
    checkpoint_, = (tmp_path / "measure/resume").glob("step_*.pt")
    size = int(2.5 * checkpoint_.stat().st_size) + (tmp_path / "measure/model.pt").stat().st_size
    disk = tmp_path / "disk"
    disk.mkdir()
    if sys.platform != "linux" or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)],
            capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root on Linux only")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_small_disk_runs_full_and_nothing_is_lost(town, tmp_path, small_disk):
    """On a real disk the third checkpoint does not fit beside two. What is there goes on elsewhere,
    to the end of a whole run."""
    with pytest.raises(InputError, match=r"could not be written .*it needs \d+\.\d MiB and "
                                         r"\d+\.\d are free; the one before it is whole"):
        run("base", town, small_disk / "run", save_every=2, eval_every=100)
    assert kept(small_disk / "run") == ["000000002", "000000004"]
    shutil.copytree(small_disk / "run", tmp_path / "run")
    run("base", town, tmp_path / "run", save_every=2, eval_every=100, resume=True)
    run("base", town, tmp_path / "whole", eval_every=100)
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_folder_that_cannot_be_written_is_one_line(script, town, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("not a folder")
    config = config_of(next(name for name in SCRIPTS if SCRIPTS[name] is script), town,
                       tmp_path / "file/out")
    with pytest.raises(SystemExit) as caught:
        monkeypatch.setattr(cli, "parse_args", lambda *_, **__: config)
        cli.main(script.train, script.Config)
    assert "\n" not in caught.value.code and "choose another --out" in caught.value.code


def test_a_checkpoint_of_another_stage_is_refused(town, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stopped):
            run("dpo", town, tmp_path)
    with pytest.raises(InputError, match=r"step_0.*pt: is of train_dpo.py; "
                                         "name the folder that train_rm.py had as --out"):
        run("rm", town, tmp_path, resume=True)


def test_a_run_whose_data_has_changed_is_refused(town, tmp_path, monkeypatch):
    rows = (town / "data/sft.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stopped):
            run("sft", town, tmp_path / "run", data=(str(tmp_path / "rows.jsonl"),))
    (tmp_path / "rows.jsonl").write_text("".join(rows[1:] + rows[:1]))       # as many of them
    with pytest.raises(InputError, match="rows.jsonl: has changed since the run in .* began"):
        run("sft", town, tmp_path / "run", data=(str(tmp_path / "rows.jsonl"),), resume=True)


def test_a_run_whose_start_has_changed_is_refused(town, tmp_path, monkeypatch):
    """DPO's reference is read again on --resume: it must be the one that the run began with."""
    shutil.copytree(town / "sft", tmp_path / "sft")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stopped):
            run("dpo", town, tmp_path / "run", init=str(tmp_path / "sft"))
    shutil.rmtree(tmp_path / "sft")
    shutil.copytree(town / "base", tmp_path / "sft")
    with pytest.raises(InputError, match="sft: has changed since the run in .* began"):
        run("dpo", town, tmp_path / "run", init=str(tmp_path / "sft"), resume=True)


def test_a_run_saves_every_ten_minutes(town, tmp_path, monkeypatch):
    """By the clock, here one that runs four minutes a step; and once more at the end."""
    clock, write = [0.0], books.Log.step

    def slow(*args, **numbers):
        write(*args, **numbers)
        clock[0] += 240
    monkeypatch.setattr(resume.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(books.Log, "step", slow)
    saved, save = [], resume.Resume.save
    monkeypatch.setattr(resume.Resume, "save",
                        lambda self, done: saved.append(done) or save(self, done))
    run("base", town, tmp_path)
    assert saved == [3, 6, 8]


@pytest.mark.parametrize("stage", ["base", "rm"])
def test_a_run_that_is_cut_in_its_last_evaluation_loses_nothing(stage, town, tmp_path, monkeypatch):
    """All steps are done, no flag has asked for a save, and the model is not written: the run still
    goes on, and is not mistaken for finished."""
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    changes = dict(eval_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(SCRIPTS[stage], "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(stage, town, tmp_path / "cut", **changes)
    with pytest.raises(InputError, match="holds an unfinished run"):
        run(stage, town, tmp_path / "cut", **changes)
    run(stage, town, tmp_path / "cut", resume=True, **changes)
    run(stage, town, tmp_path / "whole", **changes)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_retrained_stage_is_the_same_start(town, tmp_path, monkeypatch):
    """`make run` trains finished stages again. A model with the same bits is the same model, in
    whatever way it was reached."""
    start = dict(steps=4, eval_every=0)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stopped):
            run("base", town, tmp_path / "base", **start)
        run("base", town, tmp_path / "base", resume=True, **start)
        with pytest.raises(Stopped):
            run("sft", town, tmp_path / "sft", init=str(tmp_path / "base"))
    run("base", town, tmp_path / "base", overwrite=True, **start)
    run("sft", town, tmp_path / "sft", init=str(tmp_path / "base"), resume=True)


def test_no_memory_is_not_taken_for_damage(town, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: "
                           "you tried to allocate 99 bytes")
    run("base", town, tmp_path)
    monkeypatch.setattr(torch, "load", full)
    for read in (lambda: load_checkpoint(tmp_path, "language model"),
                 lambda: resume.read(next(tmp_path.glob("resume/*.pt")), None)):
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            read()


def test_a_run_that_was_resumed_does_not_look_unfinished(town, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stopped):
            run("base", town, tmp_path)
    run("base", town, tmp_path, resume=True)
    seconds = [row["seconds"] for row in files.read_log(tmp_path / "metrics.jsonl")]
    assert seconds == sorted(seconds) and len(seconds) == 8
    run("base", town, tmp_path, overwrite=True)              # anew: no --resume needed


@pytest.mark.parametrize("stage", ["base", "sft", "rm", "dpo"])
def test_the_best_model_is_kept(stage, town, tmp_path, monkeypatch):
    """The one of the lowest held-out loss, which is not the last; through an interruption too."""
    changes = dict(eval_every=2) | ({"lora_rank": 2} if stage == "dpo" else {})
    # Uphill, so that the first look is the best.
    monkeypatch.setattr(SCRIPTS[stage], "learning_rate", lambda *_, **__: -1e-3)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Stopped):
            run(stage, town, tmp_path / "cut", **changes)
    run(stage, town, tmp_path / "cut", resume=True, **changes)
    run(stage, town, tmp_path / "whole", **changes)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    rows = files.read_log(tmp_path / "whole/metrics.jsonl")
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert len(losses) >= 4 and all(step % 2 == 0 for step in losses)
    kind = "reward model" if stage == "rm" else "language model"
    best, twin, last = (load_checkpoint(tmp_path / name, kind)[0]
                        for name in ("whole/best", "cut/best", "whole"))
    assert all(torch.equal(best[name], twin[name]) for name in best) and best.keys() == last.keys()
    step = min(losses, key=losses.get)
    assert step < rows[-1]["step"] and any(not torch.equal(best[name], last[name]) for name in best)
    # The state of a run that is stopped at that step holds the same weights.
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Stopped):
            run(stage, town, tmp_path / "again", **changes)
    state = torch.load(next((tmp_path / "again/resume").glob("step_*.pt")),
                       weights_only=True)["state"]["model"]
    same = [name for name in best if name in state and "bias" not in name]
    assert same and all(torch.equal(best[name], state[name]) for name in same)


def test_signals_are_given_back(town, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run("base", town, tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ----------------------------------------------------------------------------- models

def save(folder: Path, value: float) -> None:
    gpt = GPT(GPTConfig(8, 16, 1, 1, 4))
    for parameter in gpt.parameters():
        parameter.data.fill_(value)
    checkpoint.save_checkpoint(folder, gpt, "language model", gpt.config, tokenizer="tinytown",
                               value=value)


def test_a_model_saved_over_another_is_whole_at_every_moment(tmp_path, monkeypatch):
    """Saving is killed before each call that touches the disk. What loads then is the old model or
    the new one, with its own description."""
    seen = set()
    for moment in range(20):
        folder = tmp_path / str(moment)
        save(folder, 1.0)
        calls = []
        with monkeypatch.context() as patch:
            for module, name in ((os, "replace"), (os, "fsync"), (torch, "save")):
                def dying(*args, name=name, real=getattr(module, name)):
                    calls.append(name)
                    if len(calls) == moment + 1:
                        if name == "save":                      # in the middle of it
                            Path(args[1]).write_bytes(b"half")
                        raise SystemExit
                    return real(*args)
                patch.setattr(module, name, dying)
            try:
                save(folder, 2.0)
            except SystemExit:
                pass
        state, description = load_checkpoint(folder, "language model")
        assert {x.item() for tensor in state.values()
                for x in tensor.unique()} == {description["value"]}
        seen.add((moment < len(calls), description["value"]))
    assert {(True, 1.0), (True, 2.0), (False, 2.0)} == seen | {(True, 2.0)}


@pytest.mark.parametrize("fault", ["flipped", "cut", "empty", "of another folder"])
def test_a_damaged_model_is_refused_in_one_line(fault, tmp_path):
    save(tmp_path / "a", 1.0)
    save(tmp_path / "b", 2.0)
    path = tmp_path / "a/model.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"flipped": bytes(content), "cut": bytes(content[:-9]), "empty": b"",
                      "of another folder": (tmp_path / "b/model.pt").read_bytes()}[fault])
    with pytest.raises(InputError,
                       match="model.pt: cannot be read .*train that stage again") as caught:
        load_checkpoint(tmp_path / "a", "language model")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------- numbers that go wrong

@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_does_harm(stage, town, tmp_path,
                                                                         monkeypatch):
    """The fourth step breaks; the checkpoint of the third goes on to the end of an unbroken run."""
    run(stage, town, tmp_path / "whole")
    clip, calls = torch.nn.utils.clip_grad_norm_, []
    each = 4 if stage == "ppo" else 1               # norms a step: two minibatches, two optimizers

    def broken(parameters, max_norm):
        calls.append(1)
        return (torch.tensor(float("nan")) if len(calls) == 3 * each + 1
                else clip(parameters, max_norm))

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
        with pytest.raises(InputError, match="norm of the gradient .*nan.*: not finite, so this "
                                             "step was not taken.*lower --lr") as caught:
            run(stage, town, tmp_path / "cut", save_every=1)
    assert ("\n" not in str(caught.value)
            and str(tmp_path / "cut/bad_batch.json") in str(caught.value))
    texts = json.loads((tmp_path / "cut/bad_batch.json").read_text())
    assert (len(texts) == {"sft": 32, "ppo": 3}.get(stage, 4)
            and all(len(text.split()) > 3 for text in texts))
    run(stage, town, tmp_path / "cut", save_every=1, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_loss_that_is_not_finite_stops_the_run_too(stage, town, tmp_path, monkeypatch):
    """Even where its gradient is."""
    step = optimizer.take_step
    monkeypatch.setattr(door, "take_step", lambda rates, scaler, max_norm, objective: step(
        rates, scaler, max_norm, float("inf")))
    with pytest.raises(InputError, match="objective inf, .*not finite, so this step was not taken"):
        run(stage, town, tmp_path)


def test_a_batch_without_targets_moves_nothing_and_is_counted(town, tmp_path, monkeypatch):
    rows = batches.demonstration_rows
    monkeypatch.setattr(batches, "demonstration_rows", lambda *args: [
        Row(ids, [False] * len(ids)) if i in (3, 7) else Row(ids, mask)
        for i, (ids, mask) in enumerate(rows(*args)[:20])])
    before = []
    step = optimizer.take_step

    def watched(rates, *rest):
        parameters = [p for optimizer in rates for group in optimizer.param_groups
                      for p in group["params"]]
        old = [p.detach().clone() for p in parameters]
        norm = step(rates, *rest)
        before.append((norm == 0, all(torch.equal(p, q) for p, q in zip(parameters, old))))
        return norm

    monkeypatch.setattr(door, "take_step", watched)
    final = run("sft", town, tmp_path, batch_size=1, epochs=2, ptx_data=(), dropout=0.0)
    assert (final["empty_steps"] == 4 and before.count((True, True)) == 4
            and before.count((False, False)) == len(before) - 4)
    assert all(math.isfinite(row["loss"]) for row in files.read_log(tmp_path / "metrics.jsonl"))


def test_ppo_stops_where_it_has_run_away_or_never_ends(town, tmp_path):
    with pytest.raises(InputError, match="nats a response, over --max_kl 1e-09.*Raise --beta"):
        run("ppo", town, tmp_path / "kl", max_kl=1e-9, lr=0.1, value_lr=0.1)
    with pytest.raises(InputError,
                       match="in five rollouts no response ended.*raise --max_new_tokens"):
        run("ppo", town, tmp_path / "endless", max_new_tokens=1, lr=0.0)
