# SPDX-License-Identifier: Apache-2.0
"""AMD's Primus converts with Bridge before Megatron-LM fine-tunes: its hook, run as it is in a checkout of Primus."""

import os
import re
import sys
from pathlib import Path

import steps
import yaml


VARIABLE = "FUNCTIONAL_PRIMUS"  # a checkout of AMD-AGI/Primus
HOOK = Path("runner/helpers/hooks/train/posttrain/megatron/01_convert_checkpoints.py")


def checkout() -> Path | None:
    """Give the checkout of Primus whose hook converts, if one was given."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else None


def write_experiment(path: Path, source: Path) -> None:
    """Write an experiment that fine-tunes a Hugging Face model, which the hook shall convert with Bridge.

    Args:
        path: The YAML file.
        source: The Hugging Face model.
    """
    overrides = {"hf_path": str(source), "tokenizer_model": str(source), "native_ckpt_convert": False}
    # The hook reads the model's preset and nothing in it: Bridge takes the architecture from Hugging Face's config.
    trainer = {"framework": "megatron", "config": "sft_trainer.yaml", "model": "llama3_8B.yaml"}
    names = dict.fromkeys(("work_group", "user_name", "exp_name"), "test")
    experiment = {
        **names,
        "workspace": str(path.parent / "workspace"),
        "modules": {"post_trainer": {**trainer, "overrides": overrides}},
    }
    path.write_text(yaml.safe_dump(experiment, sort_keys=False), "utf-8")


def convert(name: str, primus: Path, source: Path, folder: Path, log: Path) -> dict[str, str]:
    """Run the hook with the installed Bridge.

    Args:
        name: What this step is for.
        primus: The checkout of Primus.
        source: The Hugging Face model.
        folder: Where experiment and checkpoint go.
        log: Where everything that the hook prints is kept.

    Returns:
        What it tells Primus to train with, by the name of Megatron-LM's argument.

    Raises:
        StepFailed: the hook ended with an error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_experiment(folder / "experiment.yaml", source)
    # No folder `src` is there, so that Python finds the Bridge that is installed, and not Primus's submodule.
    variables = {"DATA_PATH": folder / "data", "MEGATRON_BRIDGE_PATH": folder / "no-bridge", "NODE_RANK": 0}
    command = [
        "env",
        *(f"{variable}={value}" for variable, value in variables.items()),
        sys.executable,
        str(primus / HOOK),
        f"--config={folder / 'experiment.yaml'}",
    ]
    lines: list[str] = []
    steps.Step(name, command, log).run(lines.append)
    return extras(lines)


def extras(lines: list[str]) -> dict[str, str]:
    """Read the lines `extra.NAME=VALUE`, which `runner/` adds to the command line of the training."""
    return dict(found.groups() for line in lines if (found := re.fullmatch(r"extra\.(\w+)=(.*)", line)))
