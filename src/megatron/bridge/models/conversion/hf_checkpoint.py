# SPDX-License-Identifier: Apache-2.0
"""Checks of a local Hugging Face checkpoint, made before anything of it is converted or written."""

import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer

from megatron.bridge.models.conversion.hf_files import check_weights, read_json, some
from megatron.bridge.models.conversion.safetensors_header import in_one_line


logger = logging.getLogger(__name__)

# The smallest values that make a model.
_SIZES = {
    "hidden_size": 1,
    "intermediate_size": 0,
    "num_attention_heads": 1,
    "num_hidden_layers": 0,
    "num_key_value_heads": 0,
    "vocab_size": 1,
}
# Any of these makes AutoTokenizer find a tokenizer in a folder.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def local_path(model: str | os.PathLike) -> str | os.PathLike:
    """Return the absolute path of a folder, which an export elsewhere finds again, and a name on the hub as it is."""
    return os.path.abspath(model) if os.path.isdir(model) else model


def check_hf_checkpoint(model: str | os.PathLike, trust_remote_code: bool | None = None) -> None:
    """Refuse a local Hugging Face checkpoint that can't be imported. Reads headers and configs, no weights.

    A tensor that is missing is an error, though transformers draws it at random. Tensors that the model doesn't have
    are left to accounting.py, and model IDs to the hub's own checks.

    Args:
        model: Path of a checkpoint folder, or a model ID.
        trust_remote_code: Whether the config may need code that comes with the checkpoint. Nothing is run here.

    Raises:
        FileNotFoundError: The path, its config, its weights or a shard that its index names isn't there.
        NotADirectoryError: The path is a file.
        ValueError: A file is damaged, a tensor is missing or has another shape or dtype than the config says, or the
            tokenizer has more tokens than the embedding has rows.
    """
    path = Path(model).expanduser()
    if not path.exists():
        if _looks_like_path(str(model)):
            raise FileNotFoundError(f"{model} does not exist: pass the folder of a Hugging Face checkpoint")
        return
    if not path.is_dir():
        raise NotADirectoryError(f"{model} is a file: pass the folder of a Hugging Face checkpoint")
    if (path / "model_index.json").is_file():
        # A pipeline of diffusers, which is converted by other means; callers know the error that it gets after this.
        return
    config = read_json(path / "config.json", "so it is not a Hugging Face checkpoint: pass the folder of one")
    tensors = check_weights(path)
    _check_vocabulary(path, config)
    _check_sizes(path, config, tensors)
    if not trust_remote_code:
        _check_tensors(path, config, tensors)


def has_tokenizer(model: str | os.PathLike) -> bool:
    """Return whether a checkpoint comes with a tokenizer. A model ID is assumed to have one.

    Args:
        model: Path of a checkpoint folder, or a model ID.

    Returns:
        False for a folder without tokenizer files, which is imported without one.
    """
    path = Path(model).expanduser()
    if not path.is_dir() or any((path / name).is_file() for name in _TOKENIZER_FILES):
        return True
    logger.warning("%s has no tokenizer: the checkpoint will have none, pass --tokenizer-model to Megatron-LM", model)
    return False


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor, of any shape and dtype, is free of NaN and infinity. Takes one pass and no memory."""
    if not tensor.is_floating_point() or tensor.itemsize == 1 or tensor.numel() == 0:
        return True
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(tensor.detach()))


def warn_of_non_finite(names: Iterable[str]) -> None:
    """Warn of weights with NaN or infinity, which training can't recover from. Called as the weights pass by.

    Args:
        names: The tensors that are not finite.
    """
    for name in names:
        logger.warning("%s holds NaN or infinite weights and is imported as it is: check its source", name)


def _looks_like_path(model: str) -> bool:
    """Tell a path from a model ID, which is ``name`` or ``owner/name``."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith("/")


def _check_sizes(path: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Refuse sizes that no model has: building one would end in a full memory, or in an error that says less."""
    sizes = _text_config(config)
    for name in _SIZES:
        size = sizes.get(name)
        if isinstance(size, int) and size < _SIZES[name]:
            raise ValueError(
                f"{path}/config.json has {name} {size}, expected {_SIZES[name]} or more: download it again"
            )
    layers = sizes.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(tensors):
        raise ValueError(
            f"{path}/config.json asks for {layers} layers, the weights are {len(tensors)} tensors: use the config of "
            "this model"
        )


def _check_tensors(path: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Compare the tensors with the model that transformers makes of the config, both on the meta device."""
    try:
        hf_config = transformers.AutoConfig.from_pretrained(path)
    except Exception as error:  # whatever the class of the config raises
        raise ValueError(
            f"{path}/config.json is not taken by transformers ({in_one_line(error)}): download it again, or pass "
            "trust_remote_code=True if it needs code from a checkpoint that you trust"
        ) from None
    model_class: Any = _model_class(config)
    # Quantized weights come in pieces that only their quantizer, and it perhaps only on a GPU, puts together.
    if "quantization_config" in config or Version(transformers.__version__).major < 5:
        return
    if model_class is None or not isinstance(hf_config, model_class.config_class):
        return
    from transformers.initialization import no_init_weights

    try:
        # On the meta device an initialization sets nothing, and imports sympy.
        with _quiet_transformers(), no_init_weights():
            model, seen = model_class.from_pretrained(
                None,
                config=hf_config,
                state_dict=dict(tensors),
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:
        if isinstance(error, RuntimeError) and "conversion of the weights" in str(error):
            raise ValueError(_experts_that_differ(path, tensors)) from None
        # What transformers can't make on the meta device, Bridge may convert, or say why not.
        logger.debug("the tensors of %s are not compared with its config: %s", path, error)
        return
    if seen["missing_keys"]:
        lacking = f"{path} lacks {some(seen['missing_keys'])}, which its config.json asks for"
        raise ValueError(f"{lacking}: download the whole checkpoint, or use the config of these weights")
    for name, found, expected in sorted(seen["mismatched_keys"]):
        raise ValueError(
            f"{path}: {name} has shape {list(found)}, config.json expects {list(expected)}: use weights and config of "
            "the same model"
        )
    for name, expected in model.state_dict().items():
        if name in tensors and expected.is_floating_point() and not tensors[name].is_floating_point():
            raise ValueError(
                f"{path}: {name} holds {tensors[name].dtype}, expected floats: download the checkpoint again"
            )


def _model_class(config: dict) -> type | None:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep back the report and the progress bar of a model that is thrown away."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def _experts_that_differ(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Say why transformers can't stack the experts of a layer: one of them has another shape, or is missing."""
    layers: defaultdict[tuple[str, str], dict] = defaultdict(dict)
    for name, tensor in tensors.items():
        before, experts, rest = name.partition(".experts.")
        layers[before, rest.partition(".")[2] if experts else name][name] = tensor.shape
    for shapes in layers.values():
        (usual, _), *others = Counter(shapes.values()).most_common()
        for name, shape in shapes.items():
            if others and shape != usual:
                return f"{path}: {name} has shape {list(shape)}, other experts {list(usual)}: download it again"
    return f"{path}: its tensors are not those of the model in config.json: use weights and config of the same model"


def _text_config(config: dict) -> dict:
    """Return the part of a config that describes the language model, which in multimodal ones is nested."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _check_vocabulary(path: Path, config: dict) -> None:
    """Compare the largest token of the tokenizer with the embedding, from the tokenizer's files alone."""
    rows = config.get("vocab_size", _text_config(config).get("vocab_size"))
    largest = max(token_ids(path), default=-1)
    if isinstance(rows, int) and largest >= rows:
        raise ValueError(
            f"the tokenizer of {path} has token {largest}, the embedding has {rows} rows: "
            "use the tokenizer of this model, or resize the embedding"
        )


def token_ids(path: Path) -> Iterator[int]:
    """Give the tokens of the tokenizer in a folder, from its files alone; none if it has other files."""
    if (path / "tokenizer.json").is_file():
        try:
            yield from Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab().values()
        except Exception as error:  # tokenizers raises nothing more precise
            raise ValueError(
                f"{path / 'tokenizer.json'} can't be read ({in_one_line(error)}): download it again"
            ) from None
    for name in ("vocab.json", "added_tokens.json"):
        if (path / name).is_file():
            yield from (token for token in read_json(path / name, "").values() if isinstance(token, int))
    if (path / "tokenizer_config.json").is_file():
        added = read_json(path / "tokenizer_config.json", "").get("added_tokens_decoder")
        yield from (int(token) for token in (added if isinstance(added, dict) else ()) if token.isdecimal())
