# SPDX-License-Identifier: Apache-2.0
"""Upstream's gate for conversion without a GPU: what was written without Transformer Engine computes with it.

    python tests/functional/gate.py write                     # on a host without it: a release of each family
    python tests/functional/gate.py write --family llama-3    # of this one; can be repeated

`visit.py` has the rows of the gate. Each loads a release strictly into a model of Transformer Engine's
modules, compares every weight, and holds the logits beside those of transformers, in float32 and in bf16. On the CPU
the models are of Megatron Core's local layers: that rehearses the rows, and counts as left out.
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

# transformers doesn't compute what predicts further tokens, and writes none of it.
FAMILIES = {
    name: family for name, family in models.CONVERTED.items() if not family.values.get("num_nextn_predict_layers")
}

# Why local layers, which convert a family, don't compute it (core 0.19.2).
NOT_WITH_LOCAL_LAYERS = {
    "gemma": "PyTorch's norms are not zero-centered",
    "nemotron": "PyTorch's norms are not zero-centered",
}

LAYERS = 2  # carried files are small
TOKENS = (2, 64)

# The largest distance of logits from transformers' in float32, as a part of their size (both root mean square). What
# is wrong is further away: another rotary base 0.44, another epsilon of the norms 0.27. On the CPU float32 is 1e-5
# away at most, and bf16 0.07, where a router rounds otherwise and sends tokens to other experts. Transformer Engine
# multiplies float32 matrices in TF32, which has 3 bits more than bf16
# (`transformer_engine/common/gemm/cublaslt_gemm.cu`).
IN_FLOAT32 = {"cpu": 1e-4, "cuda": 5e-2, "rocm": 5e-2}
IN_BF16 = 0.15


def write(folder: Path, families: list[str]) -> None:
    """Write a model of each family and import it, in bf16: `FAMILY/hf`, `FAMILY/megatron`, `about.json`.

    Raises:
        ValueError: Transformer Engine is here, or there is no such family.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE:
        raise ValueError("found Transformer Engine; the gate is for releases that a host without it has written")
    if unknown := set(families) - set(FAMILIES):
        raise ValueError(f"no family is named {min(unknown)!r}; choose of {', '.join(FAMILIES)}")
    for name in families:
        shutil.rmtree(folder / name, ignore_errors=True)
        source = models.make_model(folder / name / "hf", name, dtype=torch.bfloat16, num_hidden_layers=LAYERS)
        matrix.import_release(source, folder / name / "megatron")
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "megatron-core")}
    (folder / "about.json").write_text(json.dumps({"families": families, "written with": versions}, indent=1))


def carried(folder: Path) -> list[str]:
    """Name the families whose releases lie in a folder, in the order of `FAMILIES`."""
    return [name for name in FAMILIES if (folder / name / "megatron").is_dir()]


@dataclass(frozen=True, kw_only=True)
class Gate(matrix.Check):
    """A family's release, loaded into a model of Transformer Engine's modules that computes.

    Attributes:
        carried: The folder that `write` has written.
    """

    carried: Path = field(default=CARRIED, compare=False)
    limit_s: float = 120

    @classmethod
    def of(cls, family: str, folder: Path) -> "Gate":
        """Make the row of a family."""
        return cls(name=f"gate-{family}", model=family, carried=folder)

    def why_not(self, runner: matrix.Runner) -> str | None:
        """Say why it can't run here, or give None if it can."""
        if self.model not in carried(self.carried):
            return f"no release of {self.model} was carried along: run `gate.py write` where Transformer Engine is not"
        if runner.host.lacks_transformer_engine:
            return "needs Transformer Engine, which can't be imported here"
        if runner.host.transformer_engine is None and self.model in NOT_WITH_LOCAL_LAYERS:
            return f"needs Transformer Engine: {NOT_WITH_LOCAL_LAYERS[self.model]}"
        return None

    def run(self, runner: matrix.Runner) -> "GateRun":
        """Give what runs it."""
        return GateRun(runner, self)


class GateRun(matrix.Run):
    """A row of the gate on its way."""

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
            self.shows_nothing = "rehearsed with Megatron Core's local layers, and passed; needs Transformer Engine"


def judge(figures: dict[str, float], in_float32: float) -> None:
    """Hold distances of logits against what rounding explains."""
    for precision, most in (("float32", in_float32), ("bf16", IN_BF16)):
        found = figures[f"logits apart, {precision}"]
        if not found <= most:
            raise AssertionError(
                f"logits in {precision}: apart from transformers' in float32 by {found:.2g} of their size, expected"
                f" at most {most:.2g}"
            )


class Computer:
    """A process that loads and computes. Its start takes longer than a family, so it is kept for the next one.

    Args:
        log: Where what packages print goes.
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
        """Give the one that is kept, a new one where there is none or it has ended."""
        if cls.kept is None or cls.kept.process.poll() is not None:
            cls.kept = cls(runner.logs / "gate.txt")
        return cls.kept

    def ask(self, folder: Path) -> dict[str, float]:
        """Have a family computed.

        Raises:
            StepFailed: it could not be, or the process ended.
        """
        try:
            self.process.stdin.write(f"{folder.absolute()}\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or "{}")
        except BaseException:  # of a time limit, too: the next family needs a process that listens
            self.end()
            raise
        if "figures" in answer:
            return answer["figures"]
        if "differs" not in answer:
            self.end()  # a device that refused once may refuse everything from then on
        why = answer.get("differs") or answer.get("error") or f"ended: {steps.last_error(self.log)}"
        raise steps.StepFailed(why, self.log)

    def end(self) -> None:
        """End the process; until it has, it would be taken for one that listens."""
        self.process.kill()
        self.process.wait()


def compute() -> None:
    """Answer for each folder whose path is read from stdin with a line of JSON on stdout."""
    # What packages print shall not stand between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with_accelerator = steps.host().platform.name != "cpu"
    if not with_accelerator:
        import cuda_emulation

        cuda_emulation.install()
    import traceback

    from megatron.bridge.training import checkpointing
    from megatron.bridge.utils import accelerator

    if not with_accelerator:
        # Megatron Core computes with the emulation; Bridge builds the model as for the CPU.
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
    """Give a module its weights, in place of Bridge's own, which tries once more and leniently (0.6.2).

    Raises:
        AssertionError: a weight is missing or none of the module's. An extra state is none: it holds what FP8 needs.
    """
    found = module.load_state_dict(state, strict=False)
    keys = [key for key in (*found.missing_keys, *found.unexpected_keys) if not key.endswith("_extra_state")]
    matrix.expect(keys, [], "keys that the checkpoint or the model lacks")


def computed(folder: Path) -> dict[str, float]:
    """Load a family's release in both precisions, and measure how far its logits are from transformers'.

    Raises:
        AssertionError: a weight is not that of Hugging Face's checkpoint.
    """
    from reference import Tensors, differences

    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import temporary_distributed_context
    from megatron.bridge.utils import accelerator

    print(f"\n{folder}", flush=True)
    source = folder / "hf"
    bridge = AutoBridge.from_hf_pretrained(source)
    tokens = torch.randint(models.VOCAB_SIZE, TOKENS, generator=torch.Generator().manual_seed(1))
    exact = by_transformers(source, tokens, torch.float32)
    figures: dict[str, float] = {}
    with temporary_distributed_context(backend=accelerator.backend()):
        for precision, changes in (("bf16", {}), ("float32", {"bf16": False})):
            # Without Transformer Engine a fused softmax of half precision is Apex's.
            changes |= {} if accelerator.is_available() else {"masked_softmax_fusion": False}
            (model,) = bridge.load_megatron_model(folder / "megatron", mp_overrides=changes, wrap_with_ddp=False)
            if precision == "bf16":
                loaded = {name: each.cpu() for name, each in bridge.export_hf_weights([model], show_progress=False)}
                matrix.expect(differences(Tensors(source), loaded), [], "weights in the checkpoint and as loaded")
            figures[f"logits apart, {precision}"] = apart(by_megatron(model, tokens), exact)
            figures["modules of Transformer Engine"] = sum(
                any(base.__module__.startswith("transformer_engine") for base in type(module).__mro__)
                for module in model.modules()
            )
    figures["logits apart, transformers in bf16"] = apart(by_transformers(source, tokens, torch.bfloat16), exact)
    return figures


def by_transformers(source: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Give the logits of transformers' model, on this host's accelerator, in float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    device = steps.host().accelerator
    network = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="eager").to(device).eval()
    with torch.inference_mode():
        return network(tokens.to(device)).logits.float().cpu()


def by_megatron(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Give the logits of a model of Megatron Core's, without what pads the vocabulary."""
    length = tokens.shape[1]
    device = next(model.parameters()).device
    positions = torch.arange(length).expand_as(tokens).to(device)
    # Transformer Engine knows that attention is causal; local attention is told.
    mask = None if device.type == "cuda" else torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.inference_mode():
        return model.eval()(tokens.to(device), positions, mask).float().cpu()[..., : models.VOCAB_SIZE]


def apart(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Give the distance of logits, as a part of their size."""
    return ((found - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()


def main() -> None:
    """Write releases to carry along, or compute."""
    parser = argparse.ArgumentParser(description="Upstream's gate: write releases without Transformer Engine.")
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="write a release of each family that converts")
    writing.add_argument("folder", type=Path, nargs="?", default=CARRIED, help="where they go (%(default)s)")
    writing.add_argument("--family", action="append", help=f"of {', '.join(FAMILIES)}; default: all")
    commands.add_parser("compute", help="what the rows start")
    options = parser.parse_args()
    if options.command == "compute":
        return compute()
    try:
        write(options.folder, options.family or list(FAMILIES))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
