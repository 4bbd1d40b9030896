# SPDX-License-Identifier: Apache-2.0
"""The files of a Hugging Face model beside its weights: a release checkpoint keeps them, an export gives them back.

transformers saves a tokenizer and a config in the form of its own version, which older versions refuse or misread. It
leaves out what it doesn't know: the license, the model card, the model's code. So these files travel byte for byte, in
`hf/` of the payload. They are told by their names, and none of them is run.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers.utils import cached_file

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
WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.onnx",
    "*.h5",
    "*.msgpack",
    "*.npz",
    "*.pkl",
)
# What transformers writes of a model, too: in its own form, or though the model has no such file.
RESAVED = (CONFIG, *TOKENIZER, GENERATION, *PROCESSOR)
ALLOWED = (*RESAVED, CODE, *DOCUMENTS)
# How a tokenizer is loaded, and not what it is.
_LOADING = {"use_fast", "trust_remote_code", "revision", "include_special_tokens"}


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


@dataclass(frozen=True)
class OwnFiles:
    """A model's own files, which go in the place of those that an export writes.

    Attributes:
        files: Where each lies, by name. Empty where there are none, and on every rank but 0.
        target: Where the export writes to.
        before: What was there before the export, and when it was written.
        left: Names of what stays as the export writes it.
    """

    files: dict[str, Path]
    target: Path
    before: dict[str, tuple[int, ...]]
    left: tuple[str, ...]

    def give_back(self) -> None:
        """Put the files, but for the config, where the export has written, and remove what the model doesn't have."""
        if not self.files:
            return
        written = {name for name, state in _states(self.target).items() if self.before.get(name) != state}
        for name in written - self.files.keys():
            if not _is(name, *self.left):
                (self.target / name).unlink()
        _copy({name: path for name, path in self.files.items() if name != CONFIG}, self.target)


def own_files(
    bridge: "AutoBridge",
    megatron_path: str | os.PathLike,
    hf_path: str | os.PathLike,
    source_path: str | os.PathLike | None = None,
) -> OwnFiles:
    """Find the files that an export gives back, before it writes. Every rank may call it.

    Args:
        bridge: The bridge that exports. A generation config that its caller has set is exported as it is.
        megatron_path: Checkpoint root or payload folder. The release there, or beside it, has kept the files.
        hf_path: Where the export writes to.
        source_path: A Hugging Face model, folder or model ID, whose files go before the kept ones.

    Returns:
        The files.
    """
    target = Path(hf_path)
    if get_rank_safe() != 0:
        return OwnFiles({}, target, {}, ())
    files = _files_of_source_or_release(Path(resolve_checkpoint(megatron_path)), source_path)
    left = (CONFIG,) if _has(files, *TOKENIZER) else (CONFIG, *TOKENIZER)
    pretrained = bridge.hf_pretrained
    generation = getattr(pretrained, "_generation_config", None)
    if generation is not None and generation != pretrained._load_generation_config():
        files.pop(GENERATION, None)
        left += (GENERATION,)
    return OwnFiles(files, target, _states(target), left)


def _files_of_source_or_release(payload: Path, source_path: str | os.PathLike | None) -> dict[str, Path]:
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
            write(target, file.read(MAX_BYTES))


def write(target: Any, data: bytes) -> None:
    """Write a file whole or not at all, whatever lies there; `target` is a `pathlib.Path` or MultiStorageClient's."""
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
