"""The project's scripts against TRL's trainers on the same token ids, in fp32: SFT, reward model,
DPO on pairs, and PPO.

    python -m bench.trainers                                    SFT, reward model, DPO
    PYTHONPATH=.venv/trl-1.12 python -m bench.trainers --ppo    PPO, which TRL has up to 1.12.0

Model: 4 layers, 4 heads, width 128, Tinytown's vocabulary. Ours is timed over all of `train()`,
reading and saving included; TRL over `trainer.train()` alone, its data tokenized beforehand.
Memory is as malloc gives it for both: what our scripts ask of it would help TRL as well, as both
run in one process.
"""
import argparse
import contextlib
import io
import os
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel,
                          PreTrainedTokenizerFast)

import train_dpo
import train_ppo
import train_rm
import train_sft
from bench.compare import emit, interleave, row
from bench.trainers_data import (CONTEXT, HEADS, LAYERS, PROMPT, RESPONSE, TOKENIZER, WIDTH,
                                 checkpoints, written)
from common import machine

machine.keep_freed_memory = lambda: None
BATCH, STEPS, ROUNDS = 16, 32, 4
EPISODES, PPO_STEPS, PPO_RESPONSE = 64, 4, 32


def ids(rows: list[dict]) -> list[dict]:
    """The same rows as token ids, as our renderer writes them."""
    out = []
    for pair in rows:
        prompt = TOKENIZER.render_prompt([{"role": "user", "content": pair["prompt"]}])
        chosen, rejected = ([*TOKENIZER.encode(pair[key]), TOKENIZER.end]
                            for key in ("chosen", "rejected"))
        assert (len(prompt), len(chosen), len(rejected)) == (PROMPT, RESPONSE, RESPONSE)
        out.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return out


def network(kind=GPT2LMHeadModel):
    shape = GPT2Config(n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, vocab_size=TOKENIZER.vocab_size,
                       n_positions=CONTEXT, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, num_labels=1,
                       bos_token_id=TOKENIZER.endoftext, eos_token_id=TOKENIZER.end,
                       pad_token_id=TOKENIZER.pad)
    return kind(shape)


def names(row: list[int]) -> str:
    """Ids as words for `their_tokenizer`, for the trainer that insists on text."""
    return " ".join(f"<{id}>" for id in row)


def their_tokenizer() -> PreTrainedTokenizerFast:
    """One word a token, so that TRL trains on the same ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    vocabulary = {names([id]): id for id in range(TOKENIZER.vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=names([0])))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=names([TOKENIZER.end]),
                                   pad_token=names([TOKENIZER.pad]))


def quietly(function):
    """Seconds of function(), what it prints thrown away."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        function()
    return time.perf_counter() - start


def settings(kind, folder: Path, **more):
    return kind(output_dir=str(folder / "trl"), per_device_train_batch_size=BATCH, report_to="none",
                save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
                bf16=False, gradient_checkpointing=False, learning_rate=1e-4, **more)


def main() -> None:
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
    folder = Path(tempfile.mkdtemp())
    pairs, one, rows = written(folder, BATCH * STEPS)
    checkpoints(folder)
    encoded = ids(rows)
    shared = dict(data=(str(pairs),), val=str(one), init=str(folder / "sft"), epochs=1,
                  batch_size=BATCH, device="cpu", dtype="float32", overwrite=True,
                  out=str(folder / "out"))

    def trainer(kind, config, rows: list[dict], *networks):
        return kind(*networks, settings(config, folder, max_steps=STEPS),
                    processing_class=their_tokenizer(), train_dataset=Dataset.from_list(rows))

    def sft_trainer():
        return trainer(SFTTrainer, SFTConfig, [
            {"input_ids": x["prompt"] + x["chosen"],
             "completion_mask": [0] * PROMPT + [1] * RESPONSE} for x in encoded], network())

    def reward_trainer():
        return trainer(RewardTrainer, RewardConfig, [
            {"chosen_ids": x["prompt"] + x["chosen"], "rejected_ids": x["prompt"] + x["rejected"]}
            for x in encoded], network(GPT2ForSequenceClassification))

    def dpo_trainer():
        return trainer(DPOTrainer, DPOConfig, [
            {"prompt": names(x["prompt"]) + " ", "chosen": names(x["chosen"]),
             "rejected": names(x["rejected"])} for x in encoded], network(), network())

    stages = {
        "SFT": (lambda: train_sft.train(train_sft.Config(**shared)), sft_trainer),
        "reward model": (
            lambda: train_rm.train(train_rm.Config(demonstrations=str(one), **shared)),
            reward_trainer),
        "DPO": (lambda: train_dpo.train(train_dpo.Config(**shared)), dpo_trainer),
    }
    for name, (ours, build) in stages.items():
        def theirs():
            built = build()
            return quietly(built.train)
        seconds = interleave({"ours": lambda: quietly(ours), "trl": theirs}, ROUNDS)
        best = "the same runs as the row above: no faster setting of either was tried"
        for title, bar, note in ((f"{name}, fp32 both", 1.8, ""),
                                 (f"{name}, each at its best (fp32 here)", 1.6, best)):
            emit(row(title, "TRL", seconds["ours"], seconds["trl"], BATCH * STEPS,
                     "rows/s" if name == "SFT" else "pairs/s", bar, 3.0, note))


def main_ppo() -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    folder = Path(tempfile.mkdtemp())
    pairs, _, rows = written(folder, EPISODES * PPO_STEPS)
    checkpoints(folder)
    encoded = ids(rows)

    def ours():
        train_ppo.train(train_ppo.Config(
            data=(str(pairs),), init=str(folder / "sft"), reward=str(folder / "rm"),
            out=str(folder / "ppo"), overwrite=True, steps=PPO_STEPS, batch_size=EPISODES,
            minibatches=1, inner_epochs=4, max_new_tokens=PPO_RESPONSE, ptx_coef=0.0, device="cpu",
            dtype="float32"))

    def theirs():
        config = settings(PPOConfig, folder, total_episodes=EPISODES * PPO_STEPS, num_ppo_epochs=4,
                          num_mini_batches=1, response_length=PPO_RESPONSE, temperature=1.0,
                          num_sample_generations=0, local_rollout_forward_batch_size=EPISODES)
        config.per_device_train_batch_size = EPISODES
        policy = network()
        trainer = PPOTrainer(config, their_tokenizer(), policy, network(),
                             network(GPT2ForSequenceClassification),
                             Dataset.from_list([{"input_ids": x["prompt"]} for x in encoded]),
                             network(GPT2ForSequenceClassification))
        return quietly(trainer.train)

    seconds = interleave({"ours": lambda: quietly(ours), "trl": theirs}, ROUNDS)
    emit(row("PPO, 64 episodes of 64 + 32 tokens, 4 inner epochs, fp32 both", "TRL 1.12.0",
             seconds["ours"], seconds["trl"], EPISODES * PPO_STEPS, "episodes/s", 2.2, 4.0))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ppo", action="store_true", help="PPO instead of the other three")
    torch.manual_seed(0)
    main_ppo() if parser.parse_args().ppo else main()
