"""A GPT in one sitting: GPT-2's architecture, sampling, and a scalar head for rewards and values.

    x = wte[token] + wpe[position]                                embeddings
    x = x + attention(LN(x));  x = x + mlp(LN(x))                 each of n_layer blocks
    logits = LN(x) · wteᵀ                                         the head is the embedding ("tied")

Llama differs in five places, each a field of the config: RMSNorm for LayerNorm, positions by
rotating queries and keys, a gate in the MLP, fewer key and value heads than query heads, no biases.

Shapes: B sequences, T new tokens, S tokens in the cache and new, C width, H heads, G key-value
heads, D head width, V vocabulary. A first reading may end with `RewardModel`: below it stand
sampling, the key-value cache, masks, and what else makes the model fast.
"""
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import gelu, linear, token_logprobs


@dataclass(slots=True)
class GPTConfig:
    block_size: int = 1024       # longest sequence, tokens (number of learned positions)
    vocab_size: int = 50304      # GPT-2's 50,257 ids and our special tokens, a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0         # residual dropout of the last block, linearly from 0 (LIMA)
    bias: bool = True            # biases in linear layers and LayerNorms, as GPT-2 has
    # What Llama and its kin do otherwise:
    n_kv_head: int = 0           # key-value heads, n_head / n_kv_head query heads each; 0: n_head
    n_hidden: int = 0            # width inside the MLP; 0: 4 · n_embd
    rope_theta: float = 0.0      # rotary positions with this base; 0: learned positions
    swiglu: bool = False         # silu(gate) · up inside the MLP instead of gelu(up)
    rms_norm: bool = False       # RMSNorm instead of LayerNorm
    norm_eps: float = 1e-5
    qkv_bias: bool = False       # biases of queries, keys, values even without others (Qwen2)
    tied: bool = True            # the output head is the input embedding


# ----------------------------------------------------------------------------- one block

class Attention(nn.Module):
    """Causal attention with H query heads and G key-value heads a token, (B, T, C) → the same."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        kv_heads = config.n_kv_head or config.n_head
        self.layer, self.head_width = layer, config.n_embd // config.n_head
        self.heads = config.n_head, kv_heads, kv_heads                               # of q, k, v
        bias = config.bias or config.qkv_bias
        self.qkv = Linear(config.n_embd, sum(self.heads) * self.head_width, bias=bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, rope: tuple | None = None,
                cache: "KVCache | None" = None) -> Tensor:
        """mask (…, T, S): 1 where token t may see token s; None: all that is not later."""
        q, k, v = self.queries_keys_values(x, rope, cache)
        return self.attend(q, k, v, mask)

    def queries_keys_values(self, x: Tensor, rope, cache) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, D) of the new tokens, k and v (B, G, S, D) of all."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_width).transpose(1, 2)   # (B, H + 2G, T, D)
        q, k, v = qkv.split(self.heads, dim=1)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """proj(softmax(q·kᵀ/√D)·v), (B, T, C); the softmax of token t runs over what it sees."""
        if q.shape[2] == 1:
            y = attend_once(q, k, v, mask)
        else:
            if k.shape[1] < q.shape[1]:         # each key-value head serves a group of query heads
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.proj(y.transpose(1, 2).flatten(2))                      # (B, T, C)


def attend_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q·kᵀ/√D)·v of a decoding step's one query, q (B, H, 1, D) → the same; k and v
    (B, G, S, D), mask as in `Attention`. For one query two plain products are a little faster than
    the library's kernel, given keys and values as `KVCache` keeps them, and need no copies of keys
    and values where query heads share them."""
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[-1])                # (B, G, H/G, D)
    scores = grouped @ k.mT / math.sqrt(q.shape[-1])                        # (B, G, H/G, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (v.mT @ scores.softmax(-1).mT).mT.reshape(q.shape)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); (B, T, C) → same, or (N, C): see `only`."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.dropout = config.dropout * layer / max(1, config.n_layer - 1)
        hidden = config.n_hidden or 4 * config.n_embd
        self.swiglu = config.swiglu
        self.ln_1 = norm(config)
        self.attention = Attention(config, layer)
        self.ln_2 = norm(config)
        self.up = Linear(config.n_embd, hidden * (2 if config.swiglu else 1), bias=config.bias)
        self.down = Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, rope: tuple | None = None,
                cache: "KVCache | None" = None, wanted: Tensor | None = None) -> Tensor:
        if wanted is None:
            y = self.attention(self.ln_1(x), mask, rope, cache)
            x = x + F.dropout(y, self.dropout, self.training)
            return x + F.dropout(self.mlp(self.ln_2(x)), self.dropout, self.training)
        return self.only(wanted, x, mask, rope, cache)

    def mlp(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if not self.swiglu:
            return self.down(gelu(x))
        gate, x = x.chunk(2, -1)
        return self.down(F.silu(gate) * x)

    def only(self, wanted: Tensor, x: Tensor, mask, rope, cache) -> Tensor:
        """The block's output where wanted (B, T) is 1, (N, C): the last block need not compute
        states that nobody reads (a reward model of 4 layers: 1.25 times faster)."""
        T, most = x.shape[1], max(1, int(wanted.sum(1).max()))
        if most > 3 * T // 4:
            return self.forward(x, mask, rope, cache)[wanted]
        q, k, v = self.attention.queries_keys_values(self.ln_1(x), rope, cache)
        S = k.shape[2]
        # Each row's wanted columns, then others to fill up: (B, M).
        at = wanted.long().argsort(dim=1, descending=True, stable=True)[:, :most]
        if mask is None:
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        mask = mask.expand(len(x), 1, T, S).take_along_dim(at[:, None, :, None], 2)  # (B, 1, M, S)
        q = q.take_along_dim(at[:, None, :, None], 2)                                # (B, H, M, D)
        y = self.attention.attend(q, k, v, mask)                                     # (B, M, C)
        x = x.take_along_dim(at[:, :, None], 1) + F.dropout(y, self.dropout, self.training)
        x = x + F.dropout(self.mlp(self.ln_2(x)), self.dropout, self.training)
        return x[wanted.take_along_dim(at, 1)]


def norm(config: GPTConfig) -> nn.Module:
    """LayerNorm, or RMSNorm, which neither subtracts the mean nor adds a bias: (..., C) → same."""
    if config.rms_norm:
        return nn.RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)


def rotation(positions: Tensor, config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles position · θ^(−2i/D), i < D/2: (T,) → (T, D/2) each, (B, T) →
    (B, 1, T, D/2)."""
    width = config.n_embd // config.n_head
    steps = torch.arange(0, width, 2, device=positions.device)
    angles = positions[..., None] * config.rope_theta ** (-steps / width)
    angles = angles if positions.dim() == 1 else angles[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+D/2}) of queries or keys by their position's angles. The product of
    a query and a key then depends on how far apart they stand, not on where. (B, H, T, D) → same.
    """
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


# ----------------------------------------------------------------------------- the language model

class GPT(nn.Module):
    """The language model: `hidden` gives states, `logprobs` log π of given tokens, `generate`
    samples. ValueError if heads do not divide the width.

    compute_dtype: the type of matrix products; weights, and everything that sums, stay in fp32.
    """
    compute_dtype = torch.float32

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} must be a multiple of n_head {config.n_head}")
        if config.n_head % (config.n_kv_head or config.n_head):
            raise ValueError(f"n_head {config.n_head} must be a multiple of n_kv_head "
                             f"{config.n_kv_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.rope_theta else nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = norm(config)
        self.head = (None if config.tied else
                     nn.Linear(config.n_embd, config.vocab_size, bias=False))
        # GPT-2's 0.02 at its width of 768. Narrower models start larger: in short single trials at
        # width 128 they learned to copy words from the prompt sooner, the larger the start.
        std = min(0.12, 0.02 * 768 / config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):     # 2L add up on the residual stream
                nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def output_weight(self) -> Tensor:
        """The matrix of the output head, (V, C)."""
        return self.wte.weight if self.head is None else self.head.weight

    def hidden(self, tokens: Tensor, positions: Tensor | None = None,
               attention_mask: Tensor | None = None, cache: "KVCache | None" = None,
               wanted: Tensor | None = None) -> Tensor:
        """States after the final norm, (B, T, C); or, with wanted (B, T) bool, only those
        where it is 1, (N, C).

        tokens (B, T). positions, (T,) or (B, T), default to 0, 1, 2, … over each row's real tokens.
        attention_mask (B, S) over cached and new tokens, 1 = real; only left-padded rows need one:
        right padding comes after every real token, where causal attention cannot see it. Or
        (B, T, S), 1 where token t may see token s, for rows that hold several texts; it needs
        positions. Attention is causal all the same. Without positions, raises ValueError beyond
        block_size.
        """
        positions, mask = self.places(tokens, positions, attention_mask, cache)
        x, rope = self.wte(tokens), None                                             # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        else:
            rope = rotation(positions, self.config)
        for block in self.blocks[:-1]:
            x = block(x, mask, rope, cache)
        # The last block computes only what is read.
        x = self.blocks[-1](x, mask, rope, cache, wanted)                   # (B, T, C) or (N, C)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.ln_f(x)

    def forward(self, tokens: Tensor, positions: Tensor | None = None,
                attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V); column t predicts token t + 1."""
        with self.autocast():
            return F.linear(self.hidden(tokens, positions, attention_mask), self.output_weight)

    def logprobs(self, tokens: Tensor, mask: Tensor, temperature: float = 1.0,
                 positions: Tensor | None = None, attention_mask: Tensor | None = None,
                 equal_weights: bool = False) -> tuple[Tensor, Tensor]:
        """log π(token t | tokens before t) and the entropy of π(· | tokens before t), where mask is
        1; else exactly 0.

        tokens, mask (B, T), right-padded; returns two (B, T), aligned with tokens. Only masked-in
        places pay for the output head. Raises ValueError where mask[:, 0] is 1: nothing comes
        before the first token. positions, attention_mask: as `hidden`; equal_weights: as
        `token_logprobs`.
        """
        mask = mask.bool()
        with self.autocast():
            states = self.hidden(tokens, positions, attention_mask, wanted=before(mask))   # (N, C)
            logprobs, entropy = token_logprobs(states, self.output_weight, tokens[mask],
                                               temperature, equal_weights)                 # (N,)
        return tuple(x.new_zeros(tokens.shape).masked_scatter(mask, x) for x in (logprobs, entropy))

    def loglikelihood(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """`logprobs` without the entropy, (B, T), for a loss that weighs all tokens alike, as a
        mean does: such a loss lets the kernel form gradients on the way, in half of the time."""
        return self.logprobs(tokens, mask, equal_weights=True)[0]

    def generate(self, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float = 1.0, stop_token: int | None = None,
                 generator: torch.Generator | None = None,
                 uniforms: Tensor | None = None) -> list[list[int]]:
        """Responses to prompts of unequal lengths, each up to and including `stop_token`.

        temperature 0 is greedy. Plain temperature (no top_k, top_p) samples exactly the
        distribution that `logprobs` scores at that temperature. uniforms (prompts,
        max_new_tokens): the random numbers in [0, 1) that choose the tokens, one each, so that a
        response does not depend on its neighbours; without them the generator draws such numbers.
        Raises ValueError if the longest prompt and max_new_tokens exceed block_size.
        """
        responses: list[list[int]] = [[] for _ in prompts]
        with self.autocast():
            for rows, tokens in stream(self, prompts, max_new_tokens, temperature=temperature,
                                       top_k=top_k, top_p=top_p, stop_token=stop_token,
                                       generator=generator, uniforms=uniforms):
                for row, token in zip(rows, tokens):
                    responses[row].append(token)
        return responses

    def autocast(self):
        """Inside, matrix products are in `compute_dtype`. Does nothing in fp32."""
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.wte.weight.device.type, dtype=self.compute_dtype)

    def places(self, tokens: Tensor, positions: Tensor | None, attention_mask: Tensor | None,
               cache: "KVCache | None") -> tuple[Tensor, Tensor | None]:
        """Positions of new tokens, (T,) or (B, T), and the mask of `Attention`, which none needs
        whose rows begin with their first token: see `hidden`."""
        B, T = tokens.shape
        start = cache.length if cache is not None else 0
        if positions is None:
            if start + T > self.config.block_size:
                raise ValueError(f"{start + T} tokens, but the model's block_size is "
                                 f"{self.config.block_size}")
            positions = torch.arange(start, start + T, device=tokens.device)                # (T,)
            if attention_mask is not None:
                positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, start:]  # (B, T)
        if attention_mask is None and (start == 0 or T == 1):  # one token sees all before it
            return positions, None
        order = torch.arange(start + T, device=tokens.device)
        mask = order <= order[start:, None]                                          # (T, S) causal
        if attention_mask is not None:            # a padding query sees itself, else softmax is NaN
            visible = attention_mask.bool().view(B, 1, -1, start + T)                # 1 or T, S
            mask = mask & visible | (order == order[start:, None])                   # (B, 1, T, S)
        return positions, mask

    @classmethod
    def from_pretrained(cls, path_or_name: str | Path, vocab_size: int = 0) -> "GPT":
        """Published weights (GPT-2, Llama, Qwen2): a folder, a GGUF file or a name. vocab_size:
        pad the vocabulary to it."""
        from hub.weights import load_pretrained
        return load_pretrained(str(path_or_name), vocab_size)[0]

    def save_pretrained(self, path: str | Path, tokenizer=None) -> None:
        """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer load."""
        from hub.weights import save_pretrained
        save_pretrained(self, path, tokenizer)


def before(mask: Tensor) -> Tensor:
    """The places one token before those where mask is 1, (B, T) bool → the same. Column 0 of mask
    has none.

    The only place where the project shifts: predictions and values for token t are read from the
    state before it.
    """
    return F.pad(mask[:, 1:], (0, 1))


class RewardModel(nn.Module):
    """A GPT with a scalar head instead of its output head: reward of a whole sequence, or value of
    every prefix."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.config = gpt.config
        self.gpt = gpt
        self.head = nn.Linear(gpt.config.n_embd, 1, bias=False)
        std = 1 / math.sqrt(gpt.config.n_embd + 1)                          # lm-human-preferences
        nn.init.normal_(self.head.weight, std=std)
        # The pairwise loss cannot see a constant; it is set afterwards: demonstrations average 0.
        self.register_buffer("bias", torch.zeros(()))

    def scalars(self, tokens: Tensor, positions: Tensor | None = None,
                attention_mask: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        """The head after every token, (B, T), or where wanted is 1, (N,); else as `GPT.hidden`."""
        with self.gpt.autocast():
            states = self.gpt.hidden(tokens, positions, attention_mask, wanted=wanted)
            return self.head(states)[..., 0].float() - self.bias

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Scores (B,): the head on the last real token. tokens (B, T) right-padded, lengths (B,)
        without padding."""
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        return self.scalars(tokens, wanted=columns == (lengths - 1)[:, None])


# ----------------------------------------------------------------------------- sampling

def sample_token(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int | None,
                 top_p: float) -> Tensor:
    """Draw one token per row from softmax(logits / temperature), (B, V) → (B,); temperature 0 takes
    the largest.

    uniforms (B,): a random number in [0, 1) for each row. top_k keeps the k largest; top_p the
    smallest set of largest probabilities whose sum reaches p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(-1)                                                       # (B, V)
    if top_p < 1.0:
        ordered, index = probs.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
    # Inverse of the cumulative distribution: one uniform number a row, where torch.multinomial
    # draws V of them (16 rows of 50,304 on the CPU: 15 times faster).
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    u = uniforms[:, None] * total
    u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))   # total would miss all
    return torch.searchsorted(cumulative, u, right=True)[:, 0]


@torch.no_grad()
def stream(model: GPT, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0,
           top_k: int | None = None, top_p: float = 1.0, stop_token: int | None = None,
           generator: torch.Generator | None = None,
           uniforms: Tensor | None = None) -> Iterator[tuple[list[int], list[int]]]:
    """`GPT.generate`, one step at a time: yields (row indices still running, their next tokens)."""
    if not prompts or max_new_tokens <= 0:
        return
    if temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature {temperature} must be ≥ 0, top_k {top_k} ≥ 1 or None, top_p "
                         f"{top_p} in (0, 1]")
    longest, device, was_training = max(map(len, prompts)), model.wte.weight.device, model.training
    size = longest + max_new_tokens
    if min(map(len, prompts)) == 0:
        raise ValueError("an empty prompt: give at least one token")
    if size > model.config.block_size:
        raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the "
                         f"model's block_size of {model.config.block_size}: shorten the prompt or "
                         f"max_new_tokens")
    model.eval()                                           # dropout would change the distribution
    tokens, lengths, copies = left_padded(prompts, device)
    mask = torch.arange(size, device=device) >= (longest - lengths)[:, None]         # (B, S_max)
    if uniforms is None:
        uniforms = torch.rand(len(prompts), max_new_tokens, device=device, generator=generator)
    rows = torch.arange(len(prompts), device=device)         # which prompt each row of the batch is
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    cache = KVCache(model.config, len(tokens), size, model.wte.weight)
    padded = int(lengths.min()) < longest
    try:
        last = (torch.arange(longest, device=device) == longest - 1).expand(tokens.shape)
        visible = mask[:, :longest] if padded else None
        states = model.hidden(tokens, None, visible, cache, last)[copies]            # (B, C)
        cache.take(copies)
        lengths, mask = lengths[copies], mask[copies]
        for step in range(1, max_new_tokens + 1):
            logits = linear(states, model.output_weight)                             # (B, V)
            chosen = sample_token(logits, uniforms[rows, step - 1], temperature, top_k, top_p)
            yield rows[running].tolist(), chosen[running].tolist()
            if stop_token is not None:
                running &= chosen != stop_token
            if step == max_new_tokens or not running.any():
                return
            if running.sum() <= 7 / 8 * len(rows):
                kept = closed_ranks(running)
                rows, lengths, mask, chosen, running = (
                    x[kept] for x in (rows, lengths, mask, chosen, running))
                cache.take(kept)
            visible = mask[:, :longest + step] if padded else None
            positions = (lengths + step - 1)[:, None]                                # (B, 1)
            states = model.hidden(chosen[:, None], positions, visible, cache)[:, -1]
    finally:
        model.train(was_training)


# ----------------------------------------------------------------------------- what makes it fast

class Linear(nn.Linear):
    """nn.Linear, in the form that is fastest for its shape: see `kernels.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class KVCache:
    """Keys and values of all tokens so far, written in place: (L, B, G, D, S_max) each, so that
    `attend_once` reads along S."""

    def __init__(self, config: GPTConfig, batch: int, size: int, like: Tensor):
        kind = like.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        width = config.n_embd // config.n_head
        shape = (config.n_layer, batch, config.n_kv_head or config.n_head, width, size)
        self.keys, self.values = (like.new_empty(shape, dtype=dtype) for _ in range(2))
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, G, T, D) behind what is there; return all of it, (B, G, S, D)."""
        end = self.length + key.shape[2]
        self.keys[layer, ..., self.length:end] = key.mT
        self.values[layer, ..., self.length:end] = value.mT
        if self.length == 0:
            return key, value                # in the order in which many queries read them faster
        return self.keys[layer, ..., :end].mT, self.values[layer, ..., :end].mT

    def take(self, rows: Tensor) -> None:
        """Go on with these rows (indices): fewer where some have finished, or one several times.

        A prompt that is answered several times is read once, then its row is copied (64 times: 1.2
        to 1.4 times faster). Rows that stay are not copied (512 rows: a fifth more tokens/second).
        """
        old = self.keys, self.values
        places = torch.arange(len(rows), device=rows.device)
        if len(rows) > old[0].shape[1]:
            shape = (old[0].shape[0], len(rows), *old[0].shape[2:])
            self.keys, self.values = (x.new_empty(shape) for x in old)
            moved = places
        else:
            self.keys, self.values = (x[:, :len(rows)] for x in old)
            moved = (rows != places).nonzero()[:, 0]
        for new, x in zip((self.keys, self.values), old):
            new[:, moved, ..., :self.length] = x[:, rows[moved], ..., :self.length]


def left_padded(prompts: list[list[int]], device) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens (P, T) of the distinct prompts, padded with 0 on the left; their lengths (P,); which
    of them each prompt is, (B,))."""
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    longest = max(map(len, distinct))
    tokens = [[0] * (longest - len(prompt)) + list(prompt) for prompt in distinct]
    lengths = [len(prompt) for prompt in distinct]
    copies = [distinct[tuple(prompt)] for prompt in prompts]
    return tuple(torch.tensor(x, device=device) for x in (tokens, lengths, copies))


def closed_ranks(running: Tensor) -> Tensor:
    """Indices of the running rows (B,) → (N,), where the last of them take the places of those that
    have finished: the others stay where they are."""
    count = int(running.sum())
    kept = torch.arange(count, device=running.device)
    kept[~running[:count]] = count + running[count:].nonzero()[:, 0]
    return kept
