# SPDX-License-Identifier: Apache-2.0
"""The files of a Hugging Face model beside its weights: a release checkpoint keeps them, an export gives them back.

transformers re-saves a tokenizer and a config in the form of its own version, which older versions refuse or misread,
and leaves out what it doesn't know: the license, the model card, the model's code. So these files travel byte for byte,
in `hf/` of the payload. Their names say which ones they are. None of them is run.
"""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from safetensors import safe_open
from transformers import PretrainedConfig
from transformers.utils import cached_file

from megatron.bridge.models.conversion.hf_checkpoint import SAFETENSORS_DTYPES
from megatron.bridge.models.hf_pretrained.safe_config_loader import safe_load_config_with_retry
from megatron.bridge.training.release_checkpoint import RELEASE, resolve_checkpoint
from megatron.bridge.training.utils.checkpoint_utils import file_exists
from megatron.bridge.utils.common_utils import get_rank_safe
from megatron.bridge_cli.durable_files import write_new


if TYPE_CHECKING:
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge
    from megatron.bridge.training.config import ConfigContainer

logger = logging.getLogger(__name__)

KEPT = "hf"
MAX_BYTES = 64 << 20
CONFIG = "config.json"
TEMPLATES = "additional_chat_templates"
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "tokenizer.model.v*", "tekken.json", "tiktoken.model", "*.tiktoken"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece*.model", "*.spm"),
    *("chat_template.json", "chat_template.jinja", f"{TEMPLATES}/*.jinja"),
)
GENERATION = "generation_config.json"
PROCESSOR = ("*processor_config.json", "feature_extractor*.json", "audio_tokenizer_config.json")
CODE = "*.py"
DOCUMENTS = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*", "README*")
WEIGHTS = tuple(f"*.{form}" for form in "safetensors bin pt pth ckpt gguf onnx h5 msgpack npz pkl".split())
# What transformers writes of a model, too: in its own form, or though the model has no such file.
RESAVED = (CONFIG, *TOKENIZER, GENERATION, *PROCESSOR)
ALLOWED = (*RESAVED, CODE, *DOCUMENTS)
# How a tokenizer is loaded, and not what it is.
_LOADING = {"use_fast", "trust_remote_code", "revision", "include_special_tokens"}
# Where a config comes from, and what the files that are written say.
_NO_CHANGE = {"_name_or_path", "transformers_version", "auto_map", "torch_dtype", "dtype", "quantization_config"}


def keep_model_files(payload: Any, cfg: "ConfigContainer") -> None:
    """Copy what belongs to the model of a save into the payload of a release. Called on rank 0.

    Args:
        payload: The payload folder, a `pathlib.Path` or MultiStorageClient's.
        cfg: The config of the save. Its model says which Hugging Face model it comes from. If its tokenizer is that
            model's, `tokenizer/` gets the tokenizer's files, too.
    """
    metadata = vars(cfg.model) | (getattr(cfg.model, "extra_checkpoint_metadata", None) or {})
    model, tokenizer = metadata.get("hf_model_id"), cfg.tokenizer
    options = getattr(tokenizer, "hf_tokenizer_kwargs", None) or {}
    source = _local_folder(model, metadata.get("hf_model_revision") or options.get("revision"))
    files = _found(source, links=True) if source else {}
    _copy(files, payload / KEPT)
    changes = (getattr(tokenizer, name, None) for name in ("special_tokens", "chat_template", "chat_template_path"))
    if (
        _has(files, *TOKENIZER)
        and str(getattr(tokenizer, "tokenizer_model", None)) == str(model)
        and not options.keys() - _LOADING
        and not any(changes)
    ):
        # Config and code say which class a tokenizer has that doesn't say so itself.
        own = (CONFIG, *TOKENIZER, CODE)
        _copy({name: path for name, path in files.items() if _is(name, *own)}, payload / "tokenizer")


def has_own_tokenizer(payload: str | os.PathLike) -> bool:
    """Return whether `keep_model_files` has filled `tokenizer/` of a payload: nothing else puts a config there."""
    return file_exists(os.path.join(payload, "tokenizer", CONFIG))


@contextmanager
def given_back(
    bridge: "AutoBridge",
    megatron_path: str | os.PathLike,
    hf_path: str | os.PathLike,
    source_path: str | os.PathLike | None = None,
) -> Iterator[None]:
    """Put a model's own files in the place of those that an export writes within. Every rank may call it.

    Args:
        bridge: The bridge that exports.
        megatron_path: Checkpoint root or payload folder. The release there, or beside it, has kept the files.
        hf_path: Where the export writes to.
        source_path: A Hugging Face model, folder or model ID, whose files go before the kept ones.

    Raises:
        ValueError: The config to give back is damaged. Nothing is written then.
    """
    if get_rank_safe() != 0:
        yield
        return
    files = _files_to_give_back(Path(resolve_checkpoint(megatron_path)), source_path)
    config = _read_config(files[CONFIG]) if CONFIG in files else None
    target = Path(hf_path)
    before = _states(target)
    yield
    if not files:
        return
    written = {name for name, state in _states(target).items() if before.get(name) != state}
    for name in written - files.keys() - {CONFIG}:
        if _has(files, *TOKENIZER) or not _is(name, *TOKENIZER):
            (target / name).unlink()
    own_config = files.pop(CONFIG, None)
    _copy(files, target)
    if own_config is not None:
        _write_config(target, own_config, config, bridge)


# --- files -------------------------------------------------------------------------------------------------------


def _files_to_give_back(payload: Path, source_path: str | os.PathLike | None) -> dict[str, Path]:
    source = _local_folder(source_path)
    if source is not None and (source / CONFIG).is_file():
        return _found(source, links=True)
    release = payload.parent / RELEASE if payload.name.startswith("iter_") else payload
    files = _found(release / KEPT, links=False)
    if not files:
        logger.warning(
            "%s keeps no files of its Hugging Face model: tokenizer and config are written as transformers %s does; "
            "pass the model as source_path (--hf-model) to get its own",
            payload,
            transformers.__version__,
        )
    return files


def _found(folder: Path, links: bool) -> dict[str, Path]:
    """Return the files of a model beside its weights, by name. What can't be taken is left out, with a warning.

    Args:
        folder: The model's folder; it, and what is in it, may be hostile.
        links: Whether symbolic links count, as in the hub's cache.
    """
    files, sizes = {}, {}
    for name in _names(folder):
        if not _is(name, *ALLOWED) or _is(name, *WEIGHTS):
            continue
        try:
            path = (folder / name).resolve(strict=True)
            if not (_leads_here(folder, name, path) if links else path == folder.parent.resolve() / KEPT / name):
                raise OSError(f"it leads to {path}")
            if not path.is_file():
                raise OSError("it is not a file")
            path.open("rb").close()
        except (OSError, RuntimeError) as error:
            logger.warning("%s is left out: %s", folder / name, error)
            continue
        files[name], sizes[name] = path, path.stat().st_size
    while sum(sizes.values()) > MAX_BYTES:
        largest = max(sizes, key=sizes.get)
        # A part of a tokenizer is none.
        parts = [name for name in sizes if name == largest or _is(name, *TOKENIZER) and _is(largest, *TOKENIZER)]
        logger.warning("%s has more than 64 MB beside its weights: left out %s", folder, ", ".join(parts))
        for name in parts:
            del files[name], sizes[name]
    return files


def _names(folder: Path) -> list[str]:
    """Return what a folder has, and its one subfolder that counts, without what is hidden."""
    templates = [f"{TEMPLATES}/{each.name}" for each in (folder / TEMPLATES).glob("*.jinja")]
    inside = [each.name for each in folder.glob("*")]
    return sorted(name for name in (*inside, *templates) if not Path(name).name.startswith("."))


def _is(name: str, *patterns: str) -> bool:
    return any(fnmatch(name.lower(), pattern.lower()) for pattern in patterns)


def _has(files: Mapping[str, Any], *patterns: str) -> bool:
    return any(_is(name, *patterns) for name in files)


def _leads_here(folder: Path, name: str, target: Path) -> bool:
    """Whether a link stays in the model, or leads to a file of the same name: a README may not be a private key."""
    root = folder.resolve()
    # In the hub's cache snapshots/<commit>/ links to blobs/.
    root = root.parent.parent if root.parent.name == "snapshots" else root
    return target.is_relative_to(root) or target.name == Path(name).name


def _copy(files: Mapping[str, Path], folder: Any) -> None:
    """Write copies of `files` into a folder, a `pathlib.Path` or MultiStorageClient's."""
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            _write(target, file.read(MAX_BYTES))


def _write(target: Any, data: bytes) -> None:
    if not isinstance(target, Path):
        target.write_bytes(data)
        return
    partial = target.with_name(f"{target.name}.incomplete")
    write_new(partial, data)
    partial.replace(target)


def _states(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return what tells whether a file was written anew, for each that transformers may write."""
    states = {name: (folder / name).lstat() for name in _names(folder) if _is(name, *RESAVED)}
    return {name: (state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states.items()}


def _local_folder(model: str | os.PathLike | None, revision: str | None = None) -> Path | None:
    """Return the folder of a model: the one that is named, or the one in the hub's cache."""
    if not model:
        return None
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        config = Path(cached_file(str(model), CONFIG, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        logger.warning("%s is neither a folder nor in the hub's cache, none of its files is taken: %s", model, error)
        return None
    try:
        # The cache has what was asked for so far: no license, for instance.
        return Path(snapshot_download(str(model), revision=config.parent.name, allow_patterns=list(ALLOWED)))
    except Exception as error:  # whatever there is between here and the hub
        logger.debug("%s is taken as it is in the cache: %s", model, error)
        return config.parent


# --- config.json -------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): import the model again, or pass another source") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected an object: import the model again")
    return config


def _write_config(target: Path, own: Path, config: dict[str, Any], bridge: "AutoBridge") -> None:
    """Write the model's own config, with what conversion or training changed; its own bytes if that is nothing."""
    before = json.dumps(config)
    if "quantization_config" not in _read_config(target / CONFIG):
        config.pop("quantization_config", None)
    _apply(config, *_configs(bridge, config))
    _set_dtype(config, config.get("torch_dtype", config.get("dtype")), _dtype_of_weights(target))
    if json.dumps(config) == before:
        _copy({CONFIG: own}, target)
    else:
        _write(target / CONFIG, f"{json.dumps(config, indent=2, ensure_ascii=False)}\n".encode())


def _configs(bridge: "AutoBridge", kept: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config that a bridge was made of, and the one that it has now, both as transformers spells them."""
    pretrained = bridge.hf_pretrained
    config = pretrained if isinstance(pretrained, PretrainedConfig) else pretrained.config
    if config is not pretrained:
        revision = pretrained.init_kwargs.get("revision")
        options = {"trust_remote_code": bool(getattr(pretrained, "trust_remote_code", False))}
        options |= {"revision": revision} if revision else {}
        try:
            source = safe_load_config_with_retry(pretrained.model_name_or_path, **options)
            return source.to_dict(), config.to_dict()
        except (OSError, ValueError) as error:
            logger.debug("%s is compared with the kept config: %s", pretrained.model_name_or_path, error)
    return type(config).from_dict(dict(kept)).to_dict(), config.to_dict()


def _apply(config: dict[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Make the changes from `old` to `new` in a config that may spell them in another way."""
    for key in sorted({*old, *new} - _NO_CHANGE):
        value = new.get(key)
        if old.get(key) == value:
            continue
        if all(isinstance(each.get(key), dict) for each in (config, old, new)):
            _apply(config[key], old[key], value)
        elif key == "rope_parameters" and key not in config and isinstance(value, dict) and "rope_theta" in value:
            # transformers up to 4 spells it so, and 5 reads it.
            rope = {name: each for name, each in value.items() if name != "rope_theta" and name not in config}
            config |= {name: each for name, each in value.items() if name not in rope}
            config["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
        elif key in new:
            config[key] = value
        else:
            config.pop(key, None)


def _set_dtype(config: dict[str, Any], old: str | None, new: str | None) -> None:
    """Say in which dtype the weights are, wherever a config names the one that it names for all of them."""
    if not old or not new or old == new:
        return
    for key, value in config.items():
        if isinstance(value, dict) and key != "quantization_config":
            _set_dtype(value, old, new)
        elif key in ("torch_dtype", "dtype") and value == old:
            config[key] = new


def _dtype_of_weights(folder: Path) -> str | None:
    """Return the dtype that most of the weights in a folder have, as a config spells it."""
    numbers = Counter()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                tensor = opened.get_slice(name)
                numbers[tensor.get_dtype()] += math.prod(tensor.get_shape())
    dtypes = (SAFETENSORS_DTYPES.get(name) for name, _ in numbers.most_common())
    found = next((dtype for dtype in dtypes if dtype and dtype.is_floating_point and dtype.itemsize > 1), None)
    return str(found).removeprefix("torch.") if found else None
