"""Shared fixtures.

Torch has one thread: the models here are so small that threads would only wait for each other.
"""
import json
import os
import random
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Read when Triton, and so kernels.py, is imported first.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The shared data folder beside the project, with real data sets.

    Tests that need it skip where it is absent.
    """
    folder = Path(__file__).parent.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder (../shared/data) is not here")
    return folder


@pytest.fixture(scope="session")
def town(tmp_path_factory) -> Path:
    """A folder with a tiny Tinytown run: data, and the stages base, sft, rank and rm."""
    import train_base
    import train_rm
    import train_sft
    from data.tinytown import rank
    from data.tinytown.talk import document
    from data.tinytown.teachers import demonstrations
    from data.tinytown.town import harmful_prompts, prompts
    run = tmp_path_factory.mktemp("town")
    (run / "data").mkdir()
    draw = random.Random(0)
    texts = [document(draw) for _ in range(400)]
    (run / "data/base.txt").write_text("\n<|endoftext|>\n".join(texts))
    (run / "data/base_val.txt").write_text("\n<|endoftext|>\n".join(texts[:40]))
    rows = {"sft": demonstrations("sft", 150, 0), "rank": prompts("rank", 20, 0),
            "rank_val": prompts("val", 6, 0), "rl": prompts("rl", 30, 0),
            "test": prompts("test", 16, 0, unique=True), "harmful": harmful_prompts("test", 4, 0)}
    for name, part in rows.items():
        (run / f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    train_base.train(train_base.Config(
        data=(str(run / "data/base.txt"),), val=str(run / "data/base_val.txt"),
        out=str(run / "base"), tokenizer="tinytown", block_size=96, window=48, n_layer=2, n_head=2,
        n_embd=32, lr=5e-3, steps=40, batch_size=8, warmup=5))
    train_sft.train(train_sft.Config(
        data=(str(run / "data/sft.jsonl"),), init=str(run / "base"), out=str(run / "sft"),
        epochs=6, lr=5e-3, ptx_data=(str(run / "data/base.txt"),), ptx_windows=2))
    rank.collect(rank.Config(
        data=(str(run / "data/rank.jsonl"),), init=str(run / "sft"), out=str(run / "rank"),
        clean=True, max_new_tokens=16))
    (run / "rank_val").symlink_to(run / "rank")
    train_rm.train(train_rm.Config(
        data=(str(run / "rank/rankings.jsonl"),), clean=str(run / "rank/clean.jsonl"),
        demonstrations=str(run / "data/sft.jsonl"), init=str(run / "sft"), out=str(run / "rm"),
        batch_size=4))
    return run
