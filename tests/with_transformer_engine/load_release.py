# SPDX-License-Identifier: Apache-2.0
"""Load release checkpoints into models of Transformer Engine's modules, and print a line of JSON for each.

    python tests/with_transformer_engine/load_release.py [--keys] FOLDER…

Each folder has a Hugging Face model in `hf/` and its release checkpoint in `megatron/`. The model saves to `saved/`.
This is a separate program because the import of Megatron Core decides whether there is a Transformer Engine. Here
there is one that computes nothing (`inert_extension.py`), and the CPU emulates a GPU (`cuda_emulation.py`). With
--keys, only the keys are compared, and other packages than Transformer Engine have stand-ins.
"""

import gc
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "functional"))

import inert_extension


VERSION = inert_extension.install()

from megatron.bridge.host import stand_ins  # noqa: E402


ONLY_KEYS = "--keys" in sys.argv
if ONLY_KEYS:
    for package in ("transformer_engine", inert_extension.EXTENSION):
        del stand_ins.VERSIONS[package]
    stand_ins.install()

import cuda_emulation  # noqa: E402


cuda_emulation.install()

import torch  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.validation import StrictHandling  # noqa: E402
from megatron.core.extensions.transformer_engine import HAVE_TE  # noqa: E402
from reference import Tensors, differences  # noqa: E402

from megatron.bridge import AutoBridge  # noqa: E402
from megatron.bridge.training.model_load_save import temporary_distributed_context  # noqa: E402


EXTRA_STATE = "_extra_state"
State = dict[str, torch.Tensor]


@dataclass
class Found:
    """The result of one release checkpoint.

    Attributes:
        transformer_engine: The version of Transformer Engine.
        modules: The number of modules whose class is Transformer Engine's or derived from one.
        tensors: The number of parameters and buffers of the model that a checkpoint holds.
        extra_states: The number of extra states that the model asks for.
        lacking: Keys that the model asks for and the release checkpoint doesn't have.
        besides: Keys of the release checkpoint that the model doesn't ask for.
        no_copies: Those of `besides` that are not a copy of a tensor under another key.
        filled_extra_states: Extra states that are not empty in the release checkpoint.
        unequal: Tensors that differ from Bridge's own import into this model.
        lost: Tensors of the Hugging Face model that an export of this model doesn't return.
        error: The error that ended the load early, if there was one.
    """

    transformer_engine: str = VERSION
    modules: int = 0
    tensors: int = 0
    extra_states: int = 0
    lacking: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()
    no_copies: tuple[str, ...] = ()
    filled_extra_states: tuple[str, ...] = ()
    unequal: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    error: str = ""


def load(folder: Path) -> Found:
    """Load the release checkpoint in `folder` strictly, and compare it with its source."""
    bridge = AutoBridge.from_hf_pretrained(folder / "hf", **({"trust_remote_code": True} if ONLY_KEYS else {}))
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.gradient_accumulation_fusion = False  # needs a kernel of Apex
    provider.moe_token_dispatcher_type = "alltoall"  # others need packages for GPUs
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    found = Found(modules=len(list(_of_transformer_engine(model[0]))))
    if ONLY_KEYS:
        _, found.lacking, found.besides = read_release(model[0], folder / "megatron" / "release")
        found.no_copies = tuple(_without_copy(found.besides, folder / "megatron" / "release"))
        return found

    fill_with_nan(model[0])
    state, found.lacking, found.besides = read_release(model[0], folder / "megatron" / "release")
    extra_states = {name: value for name, value in state.items() if name.endswith(EXTRA_STATE)}
    found.extra_states = len(extra_states)
    found.filled_extra_states = tuple(name for name, value in extra_states.items() if not _is_empty(value))
    if found.lacking:
        return found
    found.no_copies = tuple(_without_copy(found.besides, folder / "megatron" / "release"))
    model[0].load_state_dict(state, strict=True)
    loaded = tensors_of(model[0])
    found.tensors = len(loaded)

    exported = dict(bridge.export_hf_weights(model, cpu=True, show_progress=False))
    found.lost = tuple(differences(Tensors(folder / "hf"), exported))
    bridge.save_megatron_model(model, folder / "saved")

    # Load the same model as Bridge does with Transformer Engine.
    fill_with_nan(model[0])
    bridge.load_hf_weights(model)
    found.unequal = tuple(_with_nan(loaded) + differences(loaded, tensors_of(model[0])))
    return found


def read_release(model: torch.nn.Module, payload: Path) -> tuple[dict[str, object], tuple[str, ...], tuple[str, ...]]:
    """Read the keys that the model asks for, as Megatron-LM does.

    Returns:
        The model's state dict, the keys that the release checkpoint lacks, and its unused keys.
    """
    common = dist_checkpointing.load_common_state_dict(str(payload))
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    request = {"model": model.sharded_state_dict(metadata=metadata)}
    loaded, besides, lacking = dist_checkpointing.load(request, str(payload), strict=StrictHandling.RETURN_ALL)
    return loaded["model"], tuple(sorted(lacking)), tuple(sorted(besides))


def fill_with_nan(model: torch.nn.Module) -> None:
    """Overwrite every tensor that a checkpoint holds with NaN."""
    with torch.no_grad():
        for tensor in tensors_of(model, copy=False).values():
            tensor.fill_(torch.nan)


def tensors_of(model: torch.nn.Module, copy: bool = True) -> State:
    """Return the parameters and persistent buffers of a model."""
    tensors = {name: value for name, value in model.state_dict().items() if not name.endswith(EXTRA_STATE)}
    return {name: value.detach().clone() for name, value in tensors.items()} if copy else tensors


def _with_nan(state: State) -> list[str]:
    return [f"{name}: not filled" for name, value in state.items() if value.isnan().any()]


def _without_copy(keys: Sequence[str], payload: Path) -> Iterator[str]:
    stored = dist_checkpointing.load_plain_tensors(str(payload)) if keys else {}
    others = [value for name, value in stored.items() if name not in keys and isinstance(value, torch.Tensor)]
    for key in keys:
        tensor = stored[key]
        if not any(value.shape == tensor.shape and torch.equal(value, tensor) for value in others):
            yield key


def _is_empty(extra_state: object) -> bool:
    return extra_state is None or (isinstance(extra_state, torch.Tensor) and extra_state.numel() == 0)


def _of_transformer_engine(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for module in model.modules():
        if any(each.__module__.partition(".")[0] == "transformer_engine" for each in type(module).__mro__):
            yield module


def main() -> None:
    """Load each folder. An error ends only that folder."""
    assert HAVE_TE, "Megatron Core found no Transformer Engine"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    environment = dict(os.environ)
    for folder in (Path(each) for each in sys.argv[1:] if each != "--keys"):
        # Megatron Core sets NVTE_* to the attention of a model, and then refuses a model with another one.
        os.environ.clear()
        os.environ.update(environment)
        try:
            with temporary_distributed_context(backend="gloo"):
                found = load(folder)
        except Exception as error:
            traceback.print_exc()
            found = Found(error=f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}")
        print(json.dumps({"folder": str(folder)} | asdict(found)), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
