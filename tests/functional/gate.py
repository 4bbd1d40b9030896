# SPDX-License-Identifier: Apache-2.0
"""Upstream's gate for conversion without a GPU: what was written without Transformer Engine must compute with it.

    python tests/functional/gate.py write                     # without Transformer Engine: write every family
    python tests/functional/gate.py write --family llama-3    # write only this family; can be repeated

`visit.py` has the rows of the gate. Each row loads a release checkpoint strictly into a model of Transformer Engine's
modules, compares every weight, and compares the logits with those of transformers, in float32 and in bf16. On the CPU
the models have Megatron Core's local layers. That is a rehearsal, and counts as left out.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import matrix
import models
import steps
import torch


CARRIED = steps.HERE.parents[1] / "dist" / "carried"

# transformers neither computes nor writes the layers for multi-token prediction.
FAMILIES = {
    name: family for name, family in models.CONVERTED.items() if not family.values.get("num_nextn_predict_layers")
}

# Families that local layers convert but can't compute, and why (core 0.19.2).
NOT_WITH_LOCAL_LAYERS = {
    "gemma": "PyTorch's norms are not zero-centered",
    "nemotron": "PyTorch's norms are not zero-centered",
}

LAYERS = 2  # keeps the carried files small
TOKENS = (2, 64)

# The largest allowed difference from the logits of transformers in float32, relative to their size (both root mean
# squares). Real errors are larger: another rotary base gives 0.44, another epsilon of the norms 0.27. On the CPU the
# difference is at most 1e-5 in float32. In bf16 it is at most 0.07, where a router rounds differently and sends tokens
# to other experts. Transformer Engine multiplies float32 matrices in TF32, which has 3 bits more than bf16
# (`transformer_engine/common/gemm/cublaslt_gemm.cu`).
IN_FLOAT32 = {"cpu": 1e-4, "cuda": 5e-2, "rocm": 5e-2}
IN_BF16 = 0.15


def write(folder: Path, families: list[str]) -> None:
    """Write a model of each family and import it, in bf16: `FAMILY/hf`, `FAMILY/megatron`, `about.json`.

    Raises:
        ValueError: Transformer Engine is installed, or a family doesn't exist.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE:
        raise ValueError("found Transformer Engine; write the gate's release checkpoints on a host without it")
    if unknown := set(families) - set(FAMILIES):
        raise ValueError(f"no family is named {min(unknown)!r}; choose from {', '.join(FAMILIES)}")
    for name in families:
        shutil.rmtree(folder / name, ignore_errors=True)
        source = models.make_model(folder / name / "hf", name, dtype=torch.bfloat16, num_hidden_layers=LAYERS)
        matrix.import_release(source, folder / name / "megatron")
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "megatron-core")}
    (folder / "about.json").write_text(json.dumps({"families": families, "written with": versions}, indent=1))


def carried(folder: Path) -> list[str]:
    """Return the families whose release checkpoints are in a folder, in the order of `FAMILIES`."""
    return [name for name in FAMILIES if (folder / name / "megatron").is_dir()]


@dataclass(frozen=True, kw_only=True)
class Gate(matrix.Check):
    """A row that loads a family's release checkpoint into a model of Transformer Engine's modules, and computes.

    Attributes:
        carried: The folder that `write` wrote.
    """

    carried: Path = field(default=CARRIED, compare=False)
    limit_s: float = 120

    @classmethod
    def of(cls, family: str, folder: Path) -> "Gate":
        """Return the row of a family."""
        return cls(name=f"gate-{family}", model=family, carried=folder)

    def why_not(self, runner: matrix.Runner) -> str | None:
        """Return why it can't run here, or None if it can."""
        if self.model not in carried(self.carried):
            return f"found no release checkpoint of {self.model}; run `gate.py write` without Transformer Engine"
        if runner.host.lacks_transformer_engine:
            return "needs Transformer Engine, which can't be imported here"
        if runner.host.transformer_engine is None and self.model in NOT_WITH_LOCAL_LAYERS:
            return f"needs Transformer Engine: {NOT_WITH_LOCAL_LAYERS[self.model]}"
        return None

    def run(self, runner: matrix.Runner) -> "GateRun":
        """Return the run of this row."""
        return GateRun(runner, self)


class GateRun(matrix.Run):
    """One run of a row of the gate."""

    row: Gate

    def go_on(self) -> None:
        """Load, compare the weights, compute, compare the logits."""
        host = self.runner.host
        with self.stage("load and compute"):
            asked = Computer.of(self.runner)
            self.figures |= asked.ask(self.row.carried / self.row.model)
        with self.stage("compare"):
            judge(self.figures, IN_FLOAT32[host.platform.name])
            modules = self.figures["modules of Transformer Engine"]
            matrix.expect(modules > 0, host.transformer_engine is not None, "modules are Transformer Engine's")
        if not modules:
            self.shows_nothing = "rehearsed with Megatron Core's local layers; the gate needs Transformer Engine"


def judge(figures: dict[str, float], in_float32: float) -> None:
    """Raise an error if the logits differ by more than rounding explains."""
    for precision, most in (("float32", in_float32), ("bf16", IN_BF16)):
        found = figures[f"logit difference, {precision}"]
        if not found <= most:
            raise AssertionError(
                f"logits in {precision}: differ from those of transformers in float32 by {found:.2g} of their size,"
                f" expected at most {most:.2g}"
            )


class Computer:
    """A process that loads and computes. Its start takes longer than a family, so the next family uses it too.

    Args:
        log: The log of everything that packages print.
    """

    kept: ClassVar["Computer | None"] = None

    def __init__(self, log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "compute"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=steps.environment(),
            )

    @classmethod
    def of(cls, runner: matrix.Runner) -> "Computer":
        """Return the running process, or start one."""
        if cls.kept is None or cls.kept.process.poll() is not None:
            cls.kept = cls(runner.logs / "gate.txt")
        return cls.kept

    def ask(self, folder: Path) -> dict[str, float]:
        """Let the process compute a family, and return its figures.

        Raises:
            StepFailed: The computation failed, or the process ended.
        """
        try:
            self.process.stdin.write(f"{folder.absolute()}\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or "{}")
        except BaseException:  # a time limit too: the next family needs a process that listens
            self.end()
            raise
        if "figures" in answer:
            return answer["figures"]
        if "differs" not in answer:
            self.end()  # a device that refused once may refuse everything from then on
        why = answer.get("differs") or answer.get("error") or f"ended: {steps.last_error(self.log)}"
        raise steps.StepFailed(why, self.log)

    def end(self) -> None:
        """End the process and wait, so that `of` doesn't take it for a running one."""
        self.process.kill()
        self.process.wait()


def compute() -> None:
    """Read paths of folders from stdin, and answer each with a line of JSON on stdout."""
    # Keep what packages print out of the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with_accelerator = steps.host().platform.name != "cpu"
    if not with_accelerator:
        import cuda_emulation

        cuda_emulation.install()
    import traceback

    from megatron.bridge.host import accelerator
    from megatron.bridge.training import checkpointing

    if not with_accelerator:
        # Megatron Core computes with the emulation, but Bridge must build the model for the CPU.
        accelerator.is_available = lambda: False
    checkpointing._load_model_state_dict = load_strictly
    for line in sys.stdin:
        try:
            answer = {"figures": computed(Path(line.strip()))}
        except AssertionError as error:
            answer = {"differs": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def load_strictly(module: torch.nn.Module, state: dict[str, Any], strict: bool) -> None:
    """Load weights strictly. Bridge's own function, which this one replaces, falls back to a lenient load (0.6.2).

    Raises:
        AssertionError: A weight is missing, or the module doesn't have it. Extra states don't count: they are for FP8.
    """
    found = module.load_state_dict(state, strict=False)
    keys = [key for key in (*found.missing_keys, *found.unexpected_keys) if not key.endswith("_extra_state")]
    matrix.expect(keys, [], "keys that the checkpoint or the model lacks")


def computed(folder: Path) -> dict[str, float]:
    """Load a family's release checkpoint in both precisions, and compare its logits with those of transformers.

    Raises:
        AssertionError: A weight differs from the Hugging Face checkpoint.
    """
    from reference import Tensors, differences

    from megatron.bridge import AutoBridge
    from megatron.bridge.host import accelerator
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    print(f"\n{folder}", flush=True)
    source = folder / "hf"
    bridge = AutoBridge.from_hf_pretrained(source)
    tokens = torch.randint(models.VOCAB_SIZE, TOKENS, generator=torch.Generator().manual_seed(1))
    exact = by_transformers(source, tokens, torch.float32)
    figures: dict[str, float] = {}
    with temporary_distributed_context(backend=accelerator.backend()):
        for precision, changes in (("bf16", {}), ("float32", {"bf16": False})):
            # Without Transformer Engine, the fused softmax for half precision comes from Apex.
            changes |= {} if accelerator.is_available() else {"masked_softmax_fusion": False}
            (model,) = bridge.load_megatron_model(folder / "megatron", mp_overrides=changes, wrap_with_ddp=False)
            if precision == "bf16":
                loaded = {name: each.cpu() for name, each in bridge.export_hf_weights([model], show_progress=False)}
                matrix.expect(differences(Tensors(source), loaded), [], "weights in the checkpoint and as loaded")
            figures[f"logit difference, {precision}"] = apart(by_megatron(model, tokens), exact)
            figures["modules of Transformer Engine"] = sum(
                any(base.__module__.startswith("transformer_engine") for base in type(module).__mro__)
                for module in model.modules()
            )
    figures["logit difference, transformers in bf16"] = apart(by_transformers(source, tokens, torch.bfloat16), exact)
    return figures


def by_transformers(source: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the logits of the model in transformers, computed on this host's accelerator, as float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    device = steps.host().accelerator
    network = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="eager").to(device).eval()
    with torch.inference_mode():
        return network(tokens.to(device)).logits.float().cpu()


def by_megatron(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of a Megatron Core model, without the padding of the vocabulary."""
    length = tokens.shape[1]
    device = next(model.parameters()).device
    positions = torch.arange(length).expand_as(tokens).to(device)
    # Transformer Engine knows that attention is causal. Local attention needs a mask.
    mask = None if device.type == "cuda" else torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.inference_mode():
        return model.eval()(tokens.to(device), positions, mask).float().cpu()[..., : models.VOCAB_SIZE]


def apart(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the difference of logits relative to their size (root mean squares)."""
    return ((found - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()


def main() -> None:
    """Write the release checkpoints of the gate, or compute for its rows."""
    parser = argparse.ArgumentParser(description="Write the release checkpoints of the gate.")
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="write a release checkpoint of each family that converts")
    writing.add_argument("folder", type=Path, nargs="?", default=CARRIED, help="default: %(default)s")
    writing.add_argument("--family", action="append", help=f"of {', '.join(FAMILIES)}; default: all")
    commands.add_parser("compute", help="compute for the rows (internal)")
    options = parser.parse_args()
    if options.command == "compute":
        return compute()
    try:
        write(options.folder, options.family or list(FAMILIES))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
