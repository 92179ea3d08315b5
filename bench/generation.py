"""Generated tokens a second: 64 new tokens after prompts of 64, temperature 0.7, no top-k, against
`transformers`.

    python -m bench.generation [--size "0.86 M"]
"""
import argparse

import torch
from transformers import CompileConfig, GPT2Config, GPT2LMHeadModel

from bench.compare import SIZES, emit, has_bf16, interleave, missing, row
from model import GPT, GPTConfig

PROMPT = NEW = 64
BATCH = {"0.86 M": 64, "30 M": 16, "124 M": 8}
ROUNDS = {"0.86 M": 9, "30 M": 5, "124 M": 5}
BARS = {"fp32": {"0.86 M": (2.2, 3.0)}, "bf16": {"30 M": (2.5, 4.0), "124 M": (1.8, 3.0)},
        "best": {"30 M": (4.0, 8.0), "124 M": (3.5, 6.0)}}


def ours(size: str) -> GPT:
    layers, heads, width, vocabulary, context = SIZES[size]
    return GPT(GPTConfig(context, vocabulary, layers, heads, width)).eval()


def theirs(size: str) -> GPT2LMHeadModel:
    layers, heads, width, vocabulary, context = SIZES[size]
    model = GPT2LMHeadModel(GPT2Config(
        n_layer=layers, n_head=heads, n_embd=width, vocab_size=vocabulary, n_positions=context,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=None)).eval()
    model.generation_config.eos_token_id = None
    return model


def main(sizes: list[str]) -> None:
    torch.manual_seed(0)
    for size in sizes:
        batch = BATCH[size]
        prompts = torch.randint(1, 500, (batch, PROMPT))
        rows = prompts.tolist()
        model, peer = ours(size), theirs(size)

        def generate(dtype=torch.float32):
            model.compute_dtype = dtype
            responses = model.generate(rows, NEW, temperature=0.7)
            assert all(len(response) == NEW for response in responses)

        @torch.no_grad()
        def peer_generate(network=peer, **more):
            out = network.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
                                   temperature=0.7, top_k=0, max_new_tokens=NEW, pad_token_id=0,
                                   **more)
            assert out.shape[1] == PROMPT + NEW

        # What transformers recommends for speed; on a CPU it has to be told.
        compiled = CompileConfig()
        compiled._compile_all_devices = True
        seconds = interleave({
            "ours": generate, "transformers": peer_generate,
            "static, compiled": lambda: peer_generate(cache_implementation="static",
                                                      compile_config=compiled)}, ROUNDS[size])
        emit(row(f"generation {size}, batch {batch}, fp32 both", "transformers generate",
                 seconds["ours"], seconds["transformers"], batch * NEW, "tokens/s",
                 *BARS["fp32"].get(size, (None, None))))
        emit(row(f"generation {size}, batch {batch}, each at its best (fp32 here)",
                 "transformers generate, static cache, compiled", seconds["ours"],
                 seconds["static, compiled"], batch * NEW, "tokens/s", 1.0, 1.3,
                 "compiled before the clock starts"))
        if size == "0.86 M":
            continue
        if not has_bf16():
            why = "this CPU has no bf16 instructions"
            emit(missing(f"generation {size}, batch {batch}, bf16 both", "transformers generate",
                         why, *BARS["bf16"][size]))
            emit(row(f"generation {size}, ours at its best (fp32 here: {why}), theirs by default",
                     "transformers generate", seconds["ours"], seconds["transformers"], batch * NEW,
                     "tokens/s", *BARS["best"][size]))
            continue
        low = theirs(size).bfloat16()
        seconds = interleave({"ours": lambda: generate(torch.bfloat16),
                              "bf16": lambda: peer_generate(low),
                              "fp32": peer_generate}, ROUNDS[size])
        emit(row(f"generation {size}, batch {batch}, bf16 both", "transformers generate",
                 seconds["ours"], seconds["bf16"], batch * NEW, "tokens/s", *BARS["bf16"][size]))
        emit(row(f"generation {size}, ours at its best (bf16), theirs by default",
                 "transformers generate", seconds["ours"], seconds["fp32"], batch * NEW,
                 "tokens/s", *BARS["best"][size]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), action="append")
    main(parser.parse_args().size or list(SIZES))
