"""Models in folders: `OUT/model.pt` and `OUT/config.json`, verified before they are used.

    load_gpt, load_reward_model, save_model        models with their tokenizers
    load_checkpoint, save_checkpoint               what lies under them: tensors and a description
"""
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from common.errors import InputError, first_line, is_out_of_memory
from common.files import checksum, free_memory, write_and_flush, write_atomically
from common.parallel import full_tensors, rank
from data.tokenizer import OWN_VOCABULARIES, Tokenizer, get_tokenizer
from hub.tokenizers import read_tokenizer, write_tokenizer
from hub.weights import load_pretrained
from lora import without_lora
from model import GPT, GPTConfig, RewardModel

ABSENT = "train that stage again"


# ----------------------------------------------------------------------------- models

def new_gpt(config: GPTConfig) -> GPT:
    """A model with random weights; InputError if its largest matrices alone exceed the memory that
    is free, before any of it is taken."""
    positions = 0 if config.rope_theta else config.block_size
    size = 4 * config.n_embd * (config.n_layer * 8 * config.n_embd + config.vocab_size + positions)
    if size > free_memory():
        raise InputError(f"a model of {config.n_layer} layers, {config.n_embd} wide, with "
                         f"{config.vocab_size} tokens and a context of {config.block_size} needs "
                         f"{size / 2 ** 30:,.0f} GiB for its weights alone: take smaller numbers")
    return GPT(config)


def load_gpt(source: str, dropout: float = 0.0) -> tuple[GPT, Tokenizer]:
    """A language model and its tokenizer from a checkpoint folder or from published weights
    (`hub/weights.py`): a folder, a GGUF file, or a name such as gpt2 or smollm2. "" gives a new
    small model on GPT-2's vocabulary.

    Raises InputError in one line if there is no language model or its files do not fit each other.
    """
    if not source:
        tokenizer = get_tokenizer("gpt2")
        return GPT(GPTConfig(256, tokenizer.vocab_size, 4, 4, 128, dropout)), tokenizer
    refuse_others(Path(source))
    if not is_published(source):
        return load_model(source, "language model",
                          lambda shape: new_gpt(GPTConfig(**shape | {"dropout": dropout})))
    gpt, tokenizer = load_pretrained(source, chat=True)
    if tokenizer is None:
        raise InputError(f"{source}: the weights load, but there is no tokenizer.json beside them; "
                         f"add it")
    gpt.config.dropout = dropout
    for layer, block in enumerate(gpt.blocks):
        block.dropout = dropout * layer / max(1, gpt.config.n_layer - 1)
    return gpt, tokenizer


def load_reward_model(folder: str) -> tuple[RewardModel, Tokenizer]:
    """A reward model and its tokenizer from a checkpoint folder; errors as `load_gpt`."""
    refuse_others(Path(folder))
    return load_model(folder, "reward model",
                      lambda shape: RewardModel(new_gpt(GPTConfig(**shape))))


def load_model(folder: str, kind: str, build) -> tuple[torch.nn.Module, Tokenizer]:
    """The model that `build` makes of the described shape, with the folder's weights."""
    state, description = load_checkpoint(folder, kind)
    try:
        model = build(description["model"])
        model.load_state_dict(state)
        name, own = description["tokenizer"], description["tokenizer"] in OWN_VOCABULARIES
        tokenizer = get_tokenizer(name) if own else read_tokenizer(Path(folder))
        if tokenizer is None or tokenizer.name != name:
            raise InputError(f"{folder}/tokenizer.json: missing, or not the one that this model "
                             f"was trained with; {ABSENT}")
        return model, tokenizer
    except Exception as error:     # a changed description can fail in a dozen ways
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        raise InputError(f"{folder}: config.json and model.pt do not fit each other "
                         f"({in_short(error)}); {ABSENT}") from error


def save_model(folder: str | Path, model: GPT | RewardModel, config, tokenizer: Tokenizer) -> None:
    """Write a checkpoint that `load_gpt` or `load_reward_model` reads; the tokenizer too, if it is
    not the project's own."""
    if tokenizer.name not in OWN_VOCABULARIES and rank() == 0:
        write_tokenizer(tokenizer, Path(folder), model.config.block_size)
    kind = "reward model" if isinstance(model, RewardModel) else "language model"
    save_checkpoint(folder, without_lora(model), kind, config, tokenizer=tokenizer.name)


def refuse_others(path: Path) -> None:
    """InputError for what people take for a model: an adapter alone, a file that is no GGUF."""
    adapter = path / "adapter_config.json"
    if adapter.exists() and not (path / "config.json").exists():
        base = json.loads(adapter.read_text()).get("base_model_name_or_path", "another model")
        raise InputError(f"{path}: a PEFT adapter of {base}, not a model; merge it into its base "
                         f"first (merge_and_unload, then save_pretrained) and pass that folder")
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path}: not a GGUF file; pass a folder: of this project, or of "
                                 f"Hugging Face's layout (nanoGPT's ckpt.pt: its weights go into "
                                 f"such a folder of model_type gpt2)")


def is_published(source: str) -> bool:
    """Whether hub/weights.py reads `source`: a Hugging Face folder, a GGUF file, or else a name.

    What begins with out/, a dot or a slash, or stands in a folder that is there, is no name.
    """
    path = Path(source)
    if path.is_dir():
        config = path / "config.json"
        return config.exists() and b'"model_type"' in config.read_bytes()
    local = source.startswith((".", "/", "out/")) or path.parent.is_dir()
    return path.is_file() or path.suffix == ".gguf" or "/" not in source or not local


# ----------------------------------------------------------------------------- tensors

def save_checkpoint(folder: str | Path, model: torch.nn.Module, kind: str, config, **extra) -> None:
    """Write `model.pt` (a plain dict of fp32 tensors) and `config.json` (kind, model shape, run
    config) to a folder."""
    folder = Path(folder)
    state = {name: tensor.detach().float().cpu().contiguous()
             for name, tensor in full_tensors(dict(model.state_dict())).items()}
    if rank() > 0:
        return

    def write(path: Path) -> None:
        torch.save(state, path)
        description = {"kind": kind, "model": asdict(model.config), "run": asdict(config), **extra,
                       "sha256": checksum(path)}
        text = json.dumps(description, indent=2) + "\n"
        write_and_flush(folder / "config.json.partial", lambda partial: partial.write_text(text))

    if list(folder.glob("resume/step_*.pt")):
        remedy = "make room: the run's last state is saved, and --resume goes on from there"
    else:
        there = (folder / "model.pt").exists()
        remedy = "the one that was there before is whole" if there else "make room"
    with room_for(state, folder, "model.pt", remedy):
        write_atomically(folder / "model.pt", write)     # killed here, `finish_saving` goes on
        os.replace(folder / "config.json.partial", folder / "config.json")


def load_checkpoint(folder: str | Path, kind: str) -> tuple[dict, dict]:
    """Return (state, description) of a checkpoint of `kind`; InputError if it is absent, broken or
    of another kind."""
    folder = Path(folder)
    finish_saving(folder)
    unfinished = list(folder.glob("resume/step_*.pt")) and not (folder / "final.json").exists()
    if unfinished and (folder / "model.pt").exists():
        print(f"note: {folder} holds an unfinished run; the model that is read here is of an "
              f"earlier one", file=sys.stderr)
    try:
        description = json.loads((folder / "config.json").read_text())
        found = description["kind"]
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no checkpoint here (config.json is missing); train that stage "
                         f"first, or pass the folder that its --out named") from error
    except (ValueError, RecursionError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{folder}/config.json: not a checkpoint's description; pass a folder "
                         f"written by a train_*.py script") from error
    if found != kind:
        scripts = "train_rm.py" if kind == "reward model" else "train_base.py or train_sft.py"
        raise InputError(f"{folder}: holds a {found} checkpoint, but a {kind} is needed here; pass "
                         f"the --out folder of {scripts}")
    try:
        if "sha256" in description and checksum(folder / "model.pt") != description["sha256"]:
            raise ValueError("its checksum is not the one in config.json")
        state = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
        return state, description
    except Exception as error:     # torch.load raises a dozen types; to the reader they are one
        if is_out_of_memory(error):
            raise
        raise InputError(f"{folder}/model.pt: cannot be read ({in_short(error)}); "
                         f"{ABSENT}") from error


def finish_saving(folder: Path) -> None:
    """Do the last line of a `save_checkpoint` that was killed before it."""
    partial = folder / "config.json.partial"
    try:
        if json.loads(partial.read_text())["sha256"] == checksum(folder / "model.pt"):
            os.replace(partial, folder / "config.json")
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        pass                       # nothing is there, or the saving never got that far


def in_short(error: Exception) -> str:
    """An error's type and the beginning of its words."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


@contextlib.contextmanager
def room_for(state: dict, folder: Path, what: str, remedy: str):
    """Inside, a disk that is full or read-only becomes one line that says how much is needed."""
    try:
        yield
    except (OSError, RuntimeError) as error:     # torch.save's RuntimeError where the disk is full
        for name in ("saving", "model.pt.partial", "config.json.partial"):
            with contextlib.suppress(OSError):
                (folder / name).unlink()
        need = sum(x.numel() * x.element_size() for x in tensors(state)) / 2 ** 20
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free / 2 ** 20
        reason = "no space left" if free < need else first_line(error)    # PyTorch does not say so
        raise InputError(f"{folder}: {what} could not be written ({reason}); it needs {need:,.1f} "
                         f"MiB and {free:,.1f} are free; {remedy}") from error


def tensors(state) -> Iterator[torch.Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if torch.is_tensor(state):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for item in state.values() if isinstance(state, dict) else state:
            yield from tensors(item)
