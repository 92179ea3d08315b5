"""Two processes under torchrun train what one process trains, and write what one process writes."""
import json
import os
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
from common import machine, parallel
from common.errors import InputError
from common.run import Flags, Run
from data.batches import even
from test_checkpoint import SCRIPTS, run, stop_at

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--local-addr=127.0.0.1", "--nproc_per_node=2"]
if sys.platform == "linux":
    # Works also where this machine's own name leads nowhere.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

# Rows do not divide by two anywhere: windows 3 + 2, conversations 17 + 16, the last ranking of an
# epoch alone, episodes 2 + 1.
UNEVEN = {"base": dict(batch_size=5, micro_batch=2, dropout=0.0),
          "sft": dict(batch_size=33, micro_batch=7, dropout=0.0, ptx_windows=3),
          "rm": dict(batch_size=17, eval_every=3), "ppo": dict(batch_size=6),
          "dpo": dict(batch_size=17, lr=1e-3)}
# Adapters; and dropout, which draws other numbers on each process, through an interruption.
LORA, DROPOUT = dict(batch_size=17, lr=1e-2, lora_rank=2), dict(dropout=0.3, epochs=1)
# Sharded processes compute equally many passes.
EVEN = {"base": dict(micro_batch=1, dropout=0.0), "sft": dict(dropout=0.0, micro_batch=3),
        "rm": dict(batch_size=6, micro_batch=1), "ppo": dict(batch_size=8),
        "dpo": dict(batch_size=6, lr=1e-3)}

# In these stages one process goes on from sharded states, and the other way round. The other stages
# take the same way.
EXCHANGED = ("sft", "ppo")


@pytest.fixture(scope="module")
def runs(town, tmp_path_factory) -> Path:
    """A folder with the runs of one torchrun, and those that they are compared with."""
    out = tmp_path_factory.mktemp("parallel")
    jobs = []
    for stage in SCRIPTS:
        jobs += [(stage, f"{stage}-two", UNEVEN[stage], 0),
                 (stage, f"{stage}-shard", EVEN[stage] | {"shard": True}, 0)]
        run(stage, town, out / f"{stage}-one", **UNEVEN[stage])
        run(stage, town, out / f"{stage}-even", **EVEN[stage])
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3)
        for stage in SCRIPTS:
            with pytest.raises(InputError, match="stopped after step 3"):
                run(stage, town, out / f"{stage}-one-two", **UNEVEN[stage])
            jobs += [(stage, f"{stage}-one-two", UNEVEN[stage] | {"resume": True}, 0),
                     (stage, f"{stage}-two-one", UNEVEN[stage], 2)]
        for stage in EXCHANGED:
            with pytest.raises(InputError, match="stopped after step 3"):
                run(stage, town, out / f"{stage}-one-shard", **EVEN[stage])
            jobs += [
                (stage, f"{stage}-one-shard", EVEN[stage] | {"resume": True, "shard": True}, 0),
                (stage, f"{stage}-shard-one", EVEN[stage] | {"shard": True}, 2)]
    run("dpo", town, out / "lora-one", **LORA)
    jobs += [("dpo", "lora-two", LORA, 0), ("sft", "dropout-whole", DROPOUT, 0),
             ("sft", "dropout-cut", DROPOUT, 2),
             ("sft", "dropout-cut", DROPOUT | {"resume": True}, 0)]
    jobs = [(stage, str(out / name), changes, stop) for stage, name, changes, stop in jobs]
    done = subprocess.run(
        [*TORCHRUN, str(Path(__file__).parent / "two_processes.py"), str(town), json.dumps(jobs)],
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage, name, changes in [
            *((stage, f"{stage}-two-one", UNEVEN[stage]) for stage in SCRIPTS),
            *((stage, f"{stage}-shard-one", EVEN[stage]) for stage in EXCHANGED)]:
        assert "stopped after step 2" in (out / name / "error").read_text()
        run(stage, town, out / name, **changes, resume=True)
    return out


def assert_same_curve(one: Path, other: Path) -> None:
    """Rows of metrics are equal to 1e-5 of their size, episodes and final numbers are the same, and
    weights are nearly the same."""
    names = [sorted(path.name for path in folder.glob("*.jsonl")) for folder in (one, other)]
    assert names[0] == names[1] and names[0]
    for name in names[0]:
        a, b = ([json.loads(line) for line in (folder / name).read_text().splitlines()]
                for folder in (one, other))
        assert len(a) == len(b) > 3
        for row, twin in zip(a, b):
            assert row.keys() == twin.keys()
            for key in row.keys() - {"seconds"}:
                assert row[key] == (pytest.approx(twin[key], rel=1e-5, abs=1e-5)
                                    if isinstance(row[key], float) else twin[key]), (key, row, twin)
    a, b = (json.loads((folder / "final.json").read_text()) for folder in (one, other))
    for key in a.keys() - {"seconds", "tokens_per_second", "memory_gib"}:
        assert a[key] == pytest.approx(b[key], abs=2e-4), key           # rounded to four places
    for model in ("model.pt", "best/model.pt"):
        if (one / model).exists():
            a, b = (torch.load(folder / model, weights_only=True) for folder in (one, other))
            assert a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
            assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-3


@pytest.mark.parametrize("stage", SCRIPTS)
def test_two_processes_train_what_one_trains(stage, runs):
    """The same global batch, shared unevenly, by rows of unequal lengths: the same curve."""
    assert_same_curve(runs / f"{stage}-one", runs / f"{stage}-two")


@pytest.mark.parametrize("stage", SCRIPTS)
def test_sharded_processes_train_what_one_trains(stage, runs):
    assert_same_curve(runs / f"{stage}-even", runs / f"{stage}-shard")


@pytest.mark.parametrize(
    "stage, there", [(stage, there) for stage in SCRIPTS for there in ("one-two", "two-one")]
    + [(stage, there) for stage in EXCHANGED for there in ("one-shard", "shard-one")])
def test_a_checkpoint_resumes_in_any_number_of_processes(stage, there, runs):
    assert_same_curve(runs / f"{stage}-{'even' if 'shard' in there else 'one'}",
                      runs / f"{stage}-{there}")


def test_adapters_are_shared_too(runs):
    assert_same_curve(runs / "lora-one", runs / "lora-two")


def test_dropout_of_two_processes_goes_on_bit_for_bit(runs):
    """Each with its own random numbers."""
    a, b = (torch.load(runs / name / "model.pt", weights_only=True)
            for name in ("dropout-whole", "dropout-cut"))
    assert ((runs / "dropout-cut/error").exists()
            and all(torch.equal(a[name], b[name]) for name in a))


def command(town: Path, out: Path, **flags) -> list[str]:
    """train_sft.py under torchrun, saving after every step."""
    values = dict(init=town / "sft", data=town / "data/sft.jsonl", batch_size=4, epochs=200,
                  lr=1e-3, save_every=1, device="cpu", dtype="float32", out=out) | flags
    return [*TORCHRUN, "train_sft.py",
            *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def workers(out: Path) -> list[int]:
    """Process ids of the processes of a run."""
    ids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if (b"train_sft.py" in words and str(out).encode() in words
                and b"torch.distributed.run" not in words):
            ids.append(int(folder.name))
    return sorted(ids)


def wait_for(condition, seconds: float = 60):
    """The first true value of condition()."""
    end = time.time() + seconds
    while time.time() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("waited in vain")


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(),
                    reason="finds the processes of a run in /proc")
def test_a_process_that_dies_ends_the_others_with_a_message(town, tmp_path):
    """kill −9 of one process: no hang, a line that says what to do, and the run can go on."""
    process = subprocess.Popen(command(town, tmp_path), cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: list(tmp_path.glob("resume/step_*.pt")))
    os.kill(workers(tmp_path)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and not workers(tmp_path)
    assert "another process of this run has ended" in output and "with --resume" in output
    assert list(tmp_path.glob("resume/step_*.pt"))


@pytest.mark.parametrize("who", ["torchrun", "one worker"])
def test_a_run_that_is_told_to_stop_saves_and_goes_on(who, town, tmp_path):
    """SIGTERM goes to torchrun itself, or to one of its processes. Then --resume, in one process
    here, reaches the end of a run of one process."""
    process = subprocess.Popen(command(town, tmp_path / "cut", epochs=2), cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: list(tmp_path.glob("cut/resume/step_*.pt")))
    if who == "torchrun":
        process.send_signal(signal.SIGTERM)
    else:
        os.kill(workers(tmp_path / "cut")[-1], signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "saved in" in output and output.count("error: stopped after step") == 1
    for name, resume in (("cut", True), ("whole", False)):
        train_sft.train(train_sft.Config(
            data=(str(town / "data/sft.jsonl"),), init=str(town / "sft"), batch_size=4, epochs=2,
            lr=1e-3, save_every=1, device="cpu", dtype="float32", out=str(tmp_path / name),
            resume=resume))
    assert_same_curve(tmp_path / "whole", tmp_path / "cut")


def test_what_cannot_be_shared_is_said_in_one_line(town, tmp_path):
    done = subprocess.run(command(town, tmp_path, ptx_data=town / "data/base.txt", ptx_windows=1),
                          cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode != 0
            and done.stderr.count("error: --ptx_windows 1: must lie between 2 and") == 1)


@pytest.mark.parametrize("script, changes, words", [
    (train_base, dict(batch_size=5), "--batch_size 5 must be a multiple of 2"),
    (train_ppo, dict(batch_size=34, minibatches=2), "a multiple of 4"),
    (train_sft, dict(ptx_data=("a",), ptx_windows=3), "--ptx_windows 3 must be a multiple of 2"),
    (train_rm, dict(lora_rank=2), "--lora_rank"),
    (train_dpo, dict(dtype="float16"), "does not go together with float16")])
def test_what_cannot_be_sharded_is_refused(script, changes, words, monkeypatch):
    """Else the processes would wait for each other for ever."""
    config = script.Config(**dict(shard=True, device="cpu", dtype="float32") | changes)
    machine.find_machine(config)                                # one process: nothing to share
    monkeypatch.setattr(parallel, "world", lambda: 2)
    with pytest.raises(InputError, match=words):
        machine.find_machine(config)


def test_sharded_batches_divide_by_the_processes():
    batches = [[0, 1, 2], [3, 4], [5]]
    assert even(batches, processes=1) == batches
    assert even(batches, processes=2) == [[0, 1], [3, 4]]
    with pytest.raises(InputError, match="no batch holds a row for each of the 2 processes; "
                                         "raise --batch_size"):
        even([[0], [1]], processes=2)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [0, 1, 3])
def test_shares_are_a_partition(world, size, monkeypatch):
    rows, shares = list(range(7)), []
    monkeypatch.setattr(parallel, "world", lambda: world)
    for process in range(world):
        monkeypatch.setattr(parallel, "rank", lambda process=process: process)
        passes = list(Run(Flags(micro_batch=size, device="cpu", dtype="float32")).passes(rows))
        assert all(0 < len(part) <= (size or 7) for part in passes)
        assert sum(passes, []) == parallel.share(rows) == parallel.share(torch.arange(7)).tolist()
        shares.append(parallel.share(rows))
    assert sorted(sum(shares, [])) == rows
