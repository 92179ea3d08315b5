"""Write a checkpoint as a folder that transformers' AutoModelForCausalLM,
AutoModelForSequenceClassification and AutoTokenizer load.

    python -m hub.export --init out/tinytown/ppo --out out/export
"""
import json
from dataclasses import dataclass
from pathlib import Path

from common.cli import check_flags, main
from common.checkpoint import load_gpt, load_reward_model
from hub.weights import save_pretrained


@dataclass(slots=True)
class Config:
    init: str = ""                 # checkpoint folder of a language model or a reward model
    out: str = "out/export"        # folder for what transformers loads


NEEDED = dict(init="name a checkpoint folder, such as out/tinytown/ppo")


def export(config: Config) -> None:
    """Read the checkpoint, of either kind, and write the folder."""
    check_flags(config, {}, NEEDED)
    try:
        description = json.loads((Path(config.init) / "config.json").read_text())
        is_reward = description.get("kind") == "reward model"
    except (OSError, ValueError, AttributeError):
        is_reward = False                   # load_gpt says what is wrong
    model, tokenizer = (load_reward_model if is_reward else load_gpt)(config.init)
    save_pretrained(model, config.out, tokenizer)
    print(f"{config.out}: written; transformers loads it from there")


if __name__ == "__main__":
    main(export, Config)
