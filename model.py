"""A GPT in one sitting: GPT-2's architecture, a key-value cache, sampling, and a scalar head for rewards and values.

    x = wte[token] + wpe[position]                                embeddings
    x = x + attention(LN(x));  x = x + mlp(LN(x))                 each of n_layer blocks (pre-LayerNorm)
    logits = LN(x) · wteᵀ                                         the output head is the input embedding ("tied")

Llama differs in five places, each a field of the config: RMSNorm for LayerNorm, positions by rotating queries and keys,
a gate in the MLP, fewer key and value heads than query heads, and no biases.

Shapes: B sequences, T new tokens, S tokens in the cache and new, C width, H heads, G key-value heads, D head width,
V vocabulary.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import load_checkpoint, save_checkpoint
from common import InputError, available, is_out_of_memory, progress
from data.published import read_tokenizer, write_tokenizer
from data.tokenizer import OWN_VOCABULARIES, Tokenizer, get_tokenizer
from kernels import gelu, linear, token_logprobs
from parallel import rank


@dataclass(slots=True)
class GPTConfig:
    block_size: int = 1024       # longest sequence, tokens (number of learned positions)
    vocab_size: int = 50304      # GPT-2's 50,257 ids and our special tokens, padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0         # residual dropout of the last block; rises linearly from 0 at the first (LIMA)
    bias: bool = True            # biases in linear layers and LayerNorms, as GPT-2 has
    # What Llama and its kin do otherwise:
    n_kv_head: int = 0           # key-value heads, each for n_head / n_kv_head query heads; 0: one for each query head
    n_hidden: int = 0            # width inside the MLP; 0: 4 · n_embd
    rope_theta: float = 0.0      # rotary positions with this base; 0: learned positions
    swiglu: bool = False         # silu(gate) · up inside the MLP instead of gelu(up)
    rms_norm: bool = False       # RMSNorm instead of LayerNorm
    norm_eps: float = 1e-5
    qkv_bias: bool = False       # biases of queries, keys and values even without the others (Qwen2)
    tied: bool = True            # the output head is the input embedding


class KVCache:
    """Keys and values of all tokens so far, (L, B, G, S_max, D) each, written in place: generation 1.1 to 1.2 times faster."""

    def __init__(self, config: GPTConfig, batch: int, size: int, like: Tensor):
        shape = (config.n_layer, batch, config.n_kv_head or config.n_head, size, config.n_embd // config.n_head)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, G, T, D) behind what is there; return all of it, (B, G, S, D)."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length:end] = key
        self.values[layer, :, :, self.length:end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def take(self, rows: Tensor) -> None:
        """Go on with these rows (indices): fewer where some have finished, or one several times over."""
        old = self.keys, self.values
        if len(rows) > old[0].shape[1]:
            self.keys, self.values = (x.new_empty(x.shape[0], len(rows), *x.shape[2:]) for x in old)
            moved = torch.arange(len(rows), device=rows.device)
        else:                 # in place: rows that stay are not copied (512 rows: a fifth more tokens a second)
            self.keys, self.values = (x[:, :len(rows)] for x in old)
            moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for new, x in zip((self.keys, self.values), old):
            new[:, moved, :, :self.length] = x[:, rows[moved], :, :self.length]


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def norm(config: GPTConfig) -> nn.Module:
    """LayerNorm, or RMSNorm, which neither subtracts the mean nor adds a bias: (..., C) → the same."""
    if config.rms_norm:
        return nn.RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)


def rotation(positions: Tensor, config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles position · θ^(−2i/D), i < D/2: (T,) → (T, D/2) each, (B, T) → (B, 1, T, D/2)."""
    width = config.n_embd // config.n_head
    angles = positions[..., None] * config.rope_theta ** (-torch.arange(0, width, 2, device=positions.device) / width)
    angles = angles if positions.dim() == 1 else angles[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+D/2}) of queries or keys by their position's angles. The product of a query and a key then
    depends on how far apart they stand, not on where. (B, H, T, D) → the same."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Causal attention with n_head queries and n_kv_head keys and values a token, (B, T, C) → (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads = config.n_head, config.n_kv_head or config.n_head, config.n_kv_head or config.n_head        # q, k, v
        self.width = config.n_embd // config.n_head
        self.qkv = Linear(config.n_embd, sum(self.heads) * self.width, bias=config.bias or config.qkv_bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, mask: Tensor | None, rope: tuple[Tensor, Tensor] | None, cache: KVCache | None, layer: int,
                at: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, -1, self.width).transpose(1, 2).split(self.heads, 1)       # (B, H or G, T, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(layer, k, v)                                                        # (B, G, S, D)
        if at is not None:
            q = q.take_along_dim(at[:, None, :, None], 2)                                           # (B, H, M, D)
        if k.shape[1] < q.shape[1]:             # each key-value head serves a group of query heads
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))               # (B, H, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)   # (B, H, T, D)
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); (B, T, C) → (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.dropout = config.dropout * layer / max(1, config.n_layer - 1)
        hidden = config.n_hidden or 4 * config.n_embd
        self.ln_1 = norm(config)
        self.attention = Attention(config)
        self.ln_2 = norm(config)
        self.swiglu = config.swiglu
        self.up = Linear(config.n_embd, 2 * hidden if config.swiglu else hidden, bias=config.bias)
        self.down = Linear(hidden, config.n_embd, bias=config.bias)

    def mlp(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if not self.swiglu:
            return self.down(gelu(x))
        gate, x = x.chunk(2, -1)
        return self.down(F.silu(gate) * x)

    def forward(self, x: Tensor, mask: Tensor | None, rope: tuple[Tensor, Tensor] | None, cache: KVCache | None,
                at: Tensor | None = None) -> Tensor:
        """(B, T, C) → the same; or, with at (B, M), to the states of these columns only, (B, M, C), mask (B, 1, M, S)."""
        y = self.attention(self.ln_1(x), mask, rope, cache, self.layer, at)
        x = x if at is None else x.take_along_dim(at[:, :, None], 1)
        x = x + F.dropout(y, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.ln_2(x)), self.dropout, self.training)                   # (B, T, C)


def check_size(config: GPTConfig) -> None:
    """InputError if the largest matrices alone exceed the memory that is free, before any of it is taken."""
    positions = 0 if config.rope_theta else config.block_size
    size = 4 * config.n_embd * (config.n_layer * 8 * config.n_embd + config.vocab_size + positions)
    if size > available() and torch.get_default_device().type != "meta":
        raise InputError(f"a model of {config.n_layer} layers, {config.n_embd} wide, with {config.vocab_size} tokens and a context of "
                         f"{config.block_size} needs {size / 2 ** 30:,.0f} GiB for its weights alone: take smaller numbers")


class GPT(nn.Module):
    """The language model: `hidden` gives states, `logprobs` log π of given tokens, `generate` samples. ValueError if heads do not
    divide the width, InputError if its weights do not fit into memory."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} must be a multiple of n_head {config.n_head}")
        if config.n_head % (config.n_kv_head or config.n_head):
            raise ValueError(f"n_head {config.n_head} must be a multiple of n_kv_head {config.n_kv_head}")
        self.config = config
        check_size(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.rope_theta else nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = norm(config)
        self.head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # GPT-2's 0.02 at its width of 768. Narrower models start larger: in short single trials at width 128 they learned
        # to copy words from the prompt sooner, the larger the start.
        std = min(0.12, 0.02 * 768 / config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):     # 2L of them add up on the residual stream
                nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def output_weight(self) -> Tensor:
        """The matrix of the output head, (V, C)."""
        return self.wte.weight if self.head is None else self.head.weight

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, attention_mask: Tensor | None = None,
               cache: KVCache | None = None, wanted: Tensor | None = None) -> Tensor:
        """States after the final LayerNorm, (B, T, C); or, with wanted (B, T) bool, only those where it is 1, (N, C).

        tokens (B, T). positions (B, T) default to 0, 1, 2, … over the real tokens of each row. attention_mask (B, S)
        over cached and new tokens, 1 = real; only left-padded rows need one: right padding comes after every real
        token, where causal attention cannot see it. Or (B, T, S), 1 where token t may see token s, for rows that hold
        several texts; it needs positions. Attention is causal all the same. Without positions, raises ValueError beyond
        block_size.
        """
        B, T = tokens.shape
        start = cache.length if cache is not None else 0
        if positions is None and start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens, but the model's block_size is {self.config.block_size}")
        if positions is None:
            if attention_mask is None:
                positions = torch.arange(start, start + T, device=tokens.device)
            else:
                positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, start:]          # (B, T)
        mask = None
        if attention_mask is not None or (start > 0 and T > 1):         # one token alone sees all that came before
            order = torch.arange(start + T, device=tokens.device)
            mask = order <= order[start:, None]                                                     # (T, S) causal
            if attention_mask is not None:                # a padding query sees itself, or softmax would give NaN
                visible = attention_mask.bool().view(B, 1, -1, start + T)                           # (B, 1, 1 or T, S)
                mask = mask & visible | (order == order[start:, None])                              # (B, 1, T, S)
        x, rope = self.wte(tokens), None                                                            # (B, T, C)
        if self.wpe is None:
            rope = rotation(positions, self.config)
        else:
            x = x + self.wpe(positions)
        *lower, top = self.blocks
        for block in lower:
            x = block(x, mask, rope, cache)
        most = T if wanted is None else max(1, int(wanted.sum(1).max()))
        if most > 3 * T // 4:
            x = top(x, mask, rope, cache)
            x = x if wanted is None else x[wanted]
        else:       # the last block computes no state that nobody reads (reward model of 4 layers: 1.25 times faster)
            at = wanted.long().argsort(dim=1, descending=True, stable=True)[:, :most]               # (B, M)
            if mask is None:
                mask = torch.ones(T, start + T, dtype=torch.bool, device=tokens.device).tril(start)
            mask = mask.expand(B, 1, T, start + T).take_along_dim(at[:, None, :, None], 2)          # (B, 1, M, S)
            x = top(x, mask, rope, cache, at)[wanted.take_along_dim(at, 1)]
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V); column t predicts token t + 1."""
        return F.linear(self.hidden(tokens, positions, attention_mask), self.output_weight)

    def logprobs(self, tokens: Tensor, mask: Tensor, temperature: float = 1.0, positions: Tensor | None = None,
                 attention_mask: Tensor | None = None, equal_weights: bool = False) -> tuple[Tensor, Tensor]:
        """log π(token t | tokens before t) and the entropy of π(· | tokens before t), where mask is 1; else exactly 0.

        tokens, mask (B, T), right-padded; returns two (B, T), aligned with tokens. Only masked-in places pay for the
        output head. Raises ValueError where mask[:, 0] is 1: nothing comes before the first token. positions,
        attention_mask: as `hidden`; equal_weights, for a loss that is a mean: as `token_logprobs`.
        """
        mask = mask.bool()
        states = self.hidden(tokens, positions, attention_mask, wanted=before(mask))                # (N, C)
        chosen, entropies = token_logprobs(states, self.output_weight, tokens[mask], temperature, equal_weights)
        logprobs = chosen.new_zeros(tokens.shape).masked_scatter(mask, chosen)                      # (B, T)
        return logprobs, entropies.new_zeros(tokens.shape).masked_scatter(mask, entropies)

    @classmethod
    def from_pretrained(cls, path_or_name: str | Path, vocab_size: int = 0) -> "GPT":
        """Published weights (GPT-2, Llama, Qwen2): a folder, a GGUF file or a name. vocab_size: pad the vocabulary to it."""
        from weights import load_pretrained
        return load_pretrained(str(path_or_name), vocab_size)[0]

    def save_pretrained(self, path: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer load."""
        from weights import save_pretrained
        save_pretrained(self, path, tokenizer)

    def generate(self, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float = 1.0, stop_token: int | None = None,
                 generator: torch.Generator | None = None, uniforms: Tensor | None = None) -> list[list[int]]:
        """Responses to prompts of unequal lengths, each up to and including `stop_token`.

        temperature 0 is greedy. Plain temperature (no top_k, top_p) samples exactly the distribution that `logprobs`
        scores at that temperature. uniforms (prompts, max_new_tokens): the random numbers in [0, 1) that choose the tokens,
        one each, so that a response does not depend on its neighbours; without them the generator draws such numbers. Raises
        ValueError if the longest prompt and max_new_tokens exceed block_size.
        """
        responses: list[list[int]] = [[] for _ in prompts]
        for rows, tokens in self.stream(prompts, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                                        stop_token=stop_token, generator=generator, uniforms=uniforms):
            for row, token in zip(rows, tokens):
                responses[row].append(token)
        return responses

    @torch.no_grad()
    def stream(self, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0,
               top_k: int | None = None, top_p: float = 1.0, stop_token: int | None = None,
               generator: torch.Generator | None = None, uniforms: Tensor | None = None) -> Iterator[tuple[list[int], list[int]]]:
        """`generate`, one step at a time: yields (row indices still running, their next tokens)."""
        if not prompts or max_new_tokens <= 0:
            return
        if temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature {temperature} must be ≥ 0, top_k {top_k} ≥ 1 or None, top_p {top_p} in (0, 1]")
        longest = max(map(len, prompts))
        if min(map(len, prompts)) == 0:
            raise ValueError("an empty prompt: give at least one token")
        if longest + max_new_tokens > self.config.block_size:
            raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's block_size "
                             f"of {self.config.block_size}: shorten the prompt or max_new_tokens")
        device, was_training = self.wte.weight.device, self.training
        self.eval()                                                      # dropout would change the distribution
        size = longest + max_new_tokens
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        copies = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=device)       # (B,)
        tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in distinct], device=device)   # left-padded
        lengths = torch.tensor([len(p) for p in distinct], device=device)
        mask = torch.arange(size, device=device) >= (longest - lengths)[:, None]                    # (B, S_max)
        if uniforms is None:
            uniforms = torch.rand(len(prompts), max_new_tokens, device=device, generator=generator)
        rows = torch.arange(len(prompts), device=device)                 # which prompt each row of the batch is
        running = torch.ones(len(prompts), dtype=torch.bool, device=device)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.wte.weight.dtype
        cache = KVCache(self.config, len(distinct), size, self.wte.weight.to(dtype))
        try:
            # A prompt that is answered several times is read once; then its row is copied (64 times: 1.2 to 1.4 times faster).
            padded = int(lengths.min()) < longest
            last = (torch.arange(longest, device=device) == longest - 1).expand(tokens.shape)
            states = self.hidden(tokens, None, mask[:, :longest] if padded else None, cache, last)[copies]      # (B, C)
            cache.take(copies)
            lengths, mask = lengths[copies], mask[copies]
            for step in range(1, max_new_tokens + 1):
                next_tokens = sample_token(linear(states, self.output_weight), uniforms[rows, step - 1], temperature, top_k, top_p)
                yield rows[running].tolist(), next_tokens[running].tolist()
                if stop_token is not None:
                    running &= next_tokens != stop_token
                if step == max_new_tokens or not running.any():
                    return
                count = int(running.sum())
                if count <= 7 / 8 * len(rows):      # the last running rows take the places of those that have finished
                    kept = torch.arange(count, device=device)
                    kept[~running[:count]] = count + running[count:].nonzero()[:, 0]
                    rows, lengths, mask, next_tokens = rows[kept], lengths[kept], mask[kept], next_tokens[kept]
                    running = running[kept]
                    cache.take(kept)
                positions = (lengths + step - 1)[:, None]                                           # (B, 1)
                visible = mask[:, :longest + step] if padded else None
                states = self.hidden(next_tokens[:, None], positions, visible, cache)[:, -1]
        finally:
            self.train(was_training)


def generate_many(model: GPT, prompts: list[list[int]], max_new_tokens: int, *, title: str, batch_size: int = 512,
                  **sampling) -> list[list[int]]:
    """`generate` for any number of prompts: in batches of similar length, with a progress bar."""
    responses: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with progress(len(prompts), title, "response") as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start:start + batch_size]
            for row, response in zip(rows, model.generate([prompts[i] for i in rows], max_new_tokens, **sampling)):
                responses[row] = response
            bar.update(len(rows))
    return responses


def before(mask: Tensor) -> Tensor:
    """The places one token before those where mask is 1, (B, T) bool → the same. Column 0 of mask has none.

    The only place where the project shifts: predictions and values for token t are read from the state before it.
    """
    return F.pad(mask[:, 1:], (0, 1))


def sample_token(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Draw one token per row from softmax(logits / temperature), (B, V) → (B,); temperature 0 takes the largest.

    uniforms (B,): a random number in [0, 1) for each row. top_k keeps the k largest; top_p the smallest set of largest
    probabilities whose sum reaches p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(-1)                                                                      # (B, V)
    if top_p < 1.0:
        ordered, index = probs.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
    # Inverse of the cumulative distribution: one uniform number a row, where torch.multinomial draws V of them (16 rows of
    # 50,304 on the CPU: 15 times faster).
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    u = uniforms[:, None] * total
    u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))    # rounded up to total, it would miss them all
    return torch.searchsorted(cumulative, u, right=True)[:, 0]


class RewardModel(nn.Module):
    """A GPT with a scalar head instead of its output head: reward of a whole sequence, or value of every prefix."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.config = gpt.config
        self.gpt = gpt
        self.head = nn.Linear(gpt.config.n_embd, 1, bias=False)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(gpt.config.n_embd + 1))    # lm-human-preferences
        # The pairwise loss cannot see a constant, so it is set afterwards: demonstrations average 0.
        self.register_buffer("bias", torch.zeros(()))

    def scalars(self, tokens: Tensor, positions: Tensor | None = None, attention_mask: Tensor | None = None,
                wanted: Tensor | None = None) -> Tensor:
        """The head after every token, (B, T), or where wanted is 1, (N,); arguments as `GPT.hidden`."""
        return self.head(self.gpt.hidden(tokens, positions, attention_mask, wanted=wanted))[..., 0].float() - self.bias

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Scores (B,): the head on the last real token. tokens (B, T) right-padded, lengths (B,) without padding."""
        return self.scalars(tokens, wanted=torch.arange(tokens.shape[1], device=tokens.device) == (lengths - 1)[:, None])


def load_gpt(source: str, dropout: float = 0.0) -> tuple[GPT, Tokenizer]:
    """A language model and its tokenizer from a checkpoint folder or from published weights (`weights.py`): a folder, a
    GGUF file, or a name such as gpt2 or smollm2. "" gives a new small model on GPT-2's vocabulary.

    Raises InputError in one line if there is no language model or its files do not fit each other.
    """
    if not source:
        tokenizer = get_tokenizer("gpt2")
        return GPT(GPTConfig(256, tokenizer.vocab_size, 4, 4, 128, dropout)), tokenizer
    if not is_published(source):
        return _load(source, "language model", lambda shape: GPT(GPTConfig(**shape | {"dropout": dropout})))
    from weights import load_pretrained
    gpt, tokenizer = load_pretrained(source, chat=True)
    if tokenizer is None:
        raise InputError(f"{source}: the weights load, but there is no tokenizer.json beside them; add it")
    gpt.config.dropout = dropout
    for layer, block in enumerate(gpt.blocks):
        block.dropout = dropout * layer / max(1, gpt.config.n_layer - 1)
    return gpt, tokenizer


def is_published(source: str) -> bool:
    """Whether weights.py reads `source`: a Hugging Face folder, a GGUF file, or else a name. What begins with out/, a dot or a
    slash, or stands in a folder that is there, is never taken for a name."""
    path = Path(source)
    if path.is_dir():
        config = path / "config.json"
        return config.exists() and b'"model_type"' in config.read_bytes()
    named = "/" not in source or not (source.startswith((".", "/", "out/")) or path.parent.is_dir())
    return path.is_file() or path.suffix == ".gguf" or named


def load_reward_model(folder: str) -> tuple[RewardModel, Tokenizer]:
    """A reward model and its tokenizer from a checkpoint folder; errors as `load_gpt`."""
    return _load(folder, "reward model", lambda shape: RewardModel(GPT(GPTConfig(**shape))))


def save_model(folder: str | Path, model: GPT | RewardModel, config, tokenizer: Tokenizer) -> None:
    """Write a checkpoint that `load_gpt` or `load_reward_model` reads; the tokenizer too, if it is not the project's own."""
    from lora import without_lora
    if tokenizer.name not in OWN_VOCABULARIES and rank() == 0:
        write_tokenizer(tokenizer, Path(folder), model.config.block_size)
    model = without_lora(model)
    save_checkpoint(folder, model, "reward model" if isinstance(model, RewardModel) else "language model", config,
                    tokenizer=tokenizer.name)


def _load(folder, kind, build):
    state, description = load_checkpoint(folder, kind)
    try:
        model = build(description["model"])
        model.load_state_dict(state)
        name = description["tokenizer"]
        tokenizer = get_tokenizer(name) if name in OWN_VOCABULARIES else read_tokenizer(Path(folder))
        if tokenizer is None or tokenizer.name != name:
            raise InputError(f"{folder}/tokenizer.json: missing, or not the one that this model was trained with; train that stage again")
        return model, tokenizer
    except Exception as error:        # a changed description can fail in a dozen ways; to the reader they are all one fault
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        raise InputError(f"{folder}: config.json and model.pt do not fit each other ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:100]}); train that stage again") from error
