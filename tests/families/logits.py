# SPDX-License-Identifier: Apache-2.0
"""Compare logits of Bridge's model, loaded from a release, with those of transformers, in one process.

    python tests/families/logits.py ROW…

A row is an architecture, or one with a value of its text model's config.json, such as
`Gemma2ForCausalLM: sliding_window=8`. Names of values in dicts are joined by dots. A line of JSON for each has the
largest difference, as a part of the largest logit, or an error. Both models compute in float32 on the CPU, on the same
tokens and without pictures and sounds.
"""

import contextlib
import inspect
import io
import json
import logging
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any


sys.path += [str(Path(__file__).parents[1] / each) for each in ("functional", "compatibility")]
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MEGATRON_BRIDGE_IN_PROOF": "1"}
os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # what Megatron Core wants with `deterministic_mode`

# transformers looks for the packages that get stand-ins when it is imported.
import computing
import tiny
import torch
import transformers
from safetensors.torch import load_file


computing.install()  # before Megatron Core is imported

from megatron import bridge  # noqa: E402
from megatron.bridge.training.model_load_save import temporary_distributed_context  # noqa: E402
from megatron.bridge.verify import without_cuda  # noqa: E402


LENGTH = 48
# Fusions are kernels, and the linear attention of Megatron Core has PyTorch's operations in this mode.
OVERRIDES = {
    "bf16": False,
    "fp16": False,
    "params_dtype": torch.float32,
    "autocast_dtype": torch.float32,
    "pipeline_dtype": torch.float32,
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "cross_entropy_loss_fusion": False,
    "moe_token_dispatcher_type": "allgather",
    "moe_shared_expert_overlap": False,
    "use_mamba_mem_eff_path": False,
    "deterministic_mode": True,
}


def imported(folder: Path, architecture: str, changed: str = "") -> None:
    """Make a tiny model and import it, with a changed value of its config."""
    hf = tiny.make_model(folder / "hf", architecture)
    if changed:
        _change(hf / "config.json", *changed.split("=", 1))
    bridge.AutoBridge.import_ckpt(hf, folder / "megatron", **_options(architecture))


def _change(path: Path, name: str, value: str) -> None:
    config = json.loads(path.read_text("utf-8"))
    *outer, last = name.split(".")
    inner = config.get("text_config", config)
    for each in outer:
        inner = inner[each]
    inner[last] = json.loads(value)
    path.write_text(json.dumps(config), "utf-8")


def apart(folder: Path, architecture: str) -> float:
    """Return how far the logits of a tiny model are apart."""
    exact = _exact(folder / "hf", architecture)
    tokens = torch.randint(6, 380, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = exact(input_ids=tokens).logits.float()
        with temporary_distributed_context(backend="gloo"):
            loaded = bridge.AutoBridge.from_hf_pretrained(folder / "hf", **_options(architecture))
            (model,) = loaded.load_megatron_model(folder / "megatron", mp_overrides=OVERRIDES, wrap_with_ddp=False)
            found = _logits(model.eval(), tokens)[..., : wanted.shape[-1]]
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def _exact(hf: Path, architecture: str) -> Any:
    """Load a tiny model with the code of transformers, or with that of Bridge, without what makes sounds."""
    name = tiny.ROWS[architecture].model or architecture.partition(" ")[0]
    config = transformers.AutoConfig.from_pretrained(hf)
    if "Omni" in name:
        name, config = name.replace("For", "ThinkerFor"), config.thinker_config
    model_class, options = tiny.model_class(name), {"dtype": torch.float32, "attn_implementation": "eager"}
    if "." in name:  # Bridge's code, whose buffers from_pretrained of transformers 5 leaves without values
        model = model_class._from_config(config, **options)
        model.load_state_dict(load_file(hf / "model.safetensors"))
        return model.eval()
    return model_class.from_pretrained(hf, config=config, key_mapping={r"^thinker\.": ""}, **options).eval()


def _options(architecture: str) -> dict[str, bool]:
    return {"trust_remote_code": True} if tiny.ROWS[architecture].written else {}


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    length = tokens.shape[1]
    positions = torch.arange(length).expand_as(tokens)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    kinds = {"mm_token_type_ids": torch.zeros_like(tokens)}  # text alone
    taken = inspect.signature(model.forward).parameters
    given = {name: value for name, value in kinds.items() if name in taken}
    found = model(input_ids=tokens, position_ids=positions, attention_mask=mask, **given)
    return (found[0] if isinstance(found, tuple) else found).float()


def main() -> None:
    """Print a line of JSON for each row."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: dict[str, dict[str, Any]] = {name: {} for name in sys.argv[1:]}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for place, (name, row) in enumerate(rows.items()):
            _try(row, imported, Path(folder, str(place)), *name.split(": ", 1))
        without_cuda.answer_for_cuda()  # an import must not see it
        computing.leave_out_kernels()
        environment = dict(os.environ)
        for place, (name, row) in enumerate(rows.items()):
            os.environ.clear()
            os.environ.update(environment)  # Megatron Core sets NVTE_* to the attention of a model
            if "error" not in row:
                _try(row, apart, Path(folder, str(place)), name.split(": ")[0])
    for name, row in rows.items():
        print(json.dumps({"row": name} | row), flush=True)


def _try(row: dict[str, Any], step: Any, folder: Path, *given: str) -> None:
    try:
        row |= {"apart": step(folder, *given)}
    except Exception as error:
        traceback.print_exc()
        row["error"] = " ".join(f"{type(error).__name__}: {error}".split())


if __name__ == "__main__":
    main()
