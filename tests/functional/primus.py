# SPDX-License-Identifier: Apache-2.0
"""Run the unmodified hook of a checkout of AMD's Primus, which converts with Bridge before Megatron-LM fine-tunes."""

import os
import re
import sys
from pathlib import Path

import steps
import yaml


VARIABLE = "FUNCTIONAL_PRIMUS"  # a checkout of AMD-AGI/Primus
HOOK = Path("runner/helpers/hooks/train/posttrain/megatron/01_convert_checkpoints.py")


def checkout() -> Path | None:
    """Return the checkout of Primus, if there is one."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else None


def write_experiment(path: Path, source: Path) -> None:
    """Write an experiment that fine-tunes a Hugging Face model, and for which the hook converts with Bridge.

    Args:
        path: The YAML file.
        source: The Hugging Face model.
    """
    overrides = {"hf_path": str(source), "tokenizer_model": str(source), "native_ckpt_convert": False}
    # The hook reads the model's preset but uses none of it: Bridge takes the architecture from Hugging Face's config.
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
        name: The purpose of this step.
        primus: The checkout of Primus.
        source: The Hugging Face model.
        folder: The folder for experiment and checkpoint.
        log: The file for everything that the hook prints.

    Returns:
        The arguments that the hook adds for the training, by Megatron-LM's name.

    Raises:
        StepFailed: The hook ended with an error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_experiment(folder / "experiment.yaml", source)
    # This folder has no `src`, so that Python finds the installed Bridge instead of Primus's submodule.
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
    """Return the lines `extra.NAME=VALUE`, which `runner/` adds to the command line of the training."""
    return dict(found.groups() for line in lines if (found := re.fullmatch(r"extra\.(\w+)=(.*)", line)))
