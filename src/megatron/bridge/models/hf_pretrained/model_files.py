# SPDX-License-Identifier: Apache-2.0
"""The files of a Hugging Face model beside its weights: a release checkpoint keeps them, an export gives them back.

transformers saves a tokenizer and a config in the form of its own version, which older versions refuse or misread. It
leaves out what it doesn't know: the license, the model card, the model's code. So these files travel byte for byte, in
`hf/` of the payload. They are told by their names, and none of them is run.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import cached_file

from megatron.bridge.release_checkpoint.files import write_new
from megatron.bridge.release_checkpoint.layout import HF_FILES, as_path
from megatron.bridge.release_checkpoint.layout import TOKENIZER as TOKENIZER_FOLDER


if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

logger = logging.getLogger(__name__)

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


def keep_model_files(payload: str | os.PathLike, cfg: "ConfigContainer") -> None:
    """Copy what belongs to the model of a save into the payload of a release. Called on rank 0.

    Args:
        payload: The payload folder, a local path or a MultiStorageClient URL.
        cfg: The config of the save. Its model says which Hugging Face model it comes from. If its tokenizer is that
            model's, `tokenizer/` gets the tokenizer's files, too.
    """
    metadata = vars(cfg.model) | (getattr(cfg.model, "extra_checkpoint_metadata", None) or {})
    model, tokenizer = metadata.get("hf_model_id"), cfg.tokenizer
    options = getattr(tokenizer, "hf_tokenizer_kwargs", None) or {}
    source = local_folder(model, metadata.get("hf_model_revision") or options.get("revision"))
    files = found_files(source, links=True) if source else {}
    folder = as_path(payload)
    copy_files(files, folder / HF_FILES)
    changes = (getattr(tokenizer, name, None) for name in ("special_tokens", "chat_template", "chat_template_path"))
    if (
        has_one_of(files, *TOKENIZER)
        and str(getattr(tokenizer, "tokenizer_model", None)) == str(model)
        and not options.keys() - _LOADING
        and not any(changes)
    ):
        # Config and code say which class a tokenizer has that doesn't say so itself.
        own = (CONFIG, *TOKENIZER, CODE)
        copy_files({name: path for name, path in files.items() if is_one_of(name, *own)}, folder / TOKENIZER_FOLDER)


def has_own_tokenizer(payload: str | os.PathLike) -> bool:
    """Return whether `keep_model_files` has filled `tokenizer/` of a payload: nothing else puts a config there."""
    return (as_path(payload) / TOKENIZER_FOLDER / CONFIG).exists()


def found_files(folder: Path, links: bool) -> dict[str, Path]:
    """Return the files of a model beside its weights, by name. What can't be taken is left out, with a warning.

    Args:
        folder: The model's folder; it, and what is in it, may be hostile.
        links: Whether symbolic links count, as in the hub's cache.
    """
    files, sizes, left_out = {}, {}, []
    for name in names_in(folder):
        if not is_one_of(name, *ALLOWED) or is_one_of(name, *WEIGHTS):
            continue
        try:
            path = (folder / name).resolve(strict=True)
            if not (_leads_here(folder, name, path) if links else path == folder.parent.resolve() / HF_FILES / name):
                raise OSError(f"it leads to {path}")
            if not path.is_file():
                raise OSError("it is not a file")
            path.open("rb").close()
        except (OSError, RuntimeError) as error:
            logger.warning("%s is left out: %s", folder / name, error)
            left_out.append(name)
        else:
            files[name], sizes[name] = path, path.stat().st_size
    while sum(sizes.values()) > MAX_BYTES:
        left_out.append(max(sizes, key=sizes.__getitem__))
        logger.warning("%s has more than 64 MB beside its weights: %s is left out", folder, left_out[-1])
        del sizes[left_out[-1]]
    # A part of a tokenizer is none.
    without = TOKENIZER if has_one_of(left_out, *TOKENIZER) else ()
    return {name: files[name] for name in sizes if not is_one_of(name, *without)}


def names_in(folder: Path) -> list[str]:
    """Return what a folder has, and its one subfolder that counts, without what is hidden."""
    templates = [f"{TEMPLATES}/{each.name}" for each in (folder / TEMPLATES).glob("*.jinja")]
    inside = [each.name for each in folder.glob("*")]
    return sorted(name for name in (*inside, *templates) if not Path(name).name.startswith("."))


def is_one_of(name: str, *patterns: str) -> bool:
    """Return whether a name matches one of the patterns, in upper or lower case."""
    return any(fnmatch(name.lower(), pattern.lower()) for pattern in patterns)


def has_one_of(names: Iterable[str], *patterns: str) -> bool:
    """Return whether one of the names matches one of the patterns."""
    return any(is_one_of(name, *patterns) for name in names)


def _leads_here(folder: Path, name: str, target: Path) -> bool:
    """Whether a link stays in the model, or leads to a file of the same name: a README may not be a private key."""
    root = folder.resolve()
    blobs = root.parent.parent / "blobs"
    in_hubs_cache = root.parent.name == "snapshots" and target.parent == blobs
    return in_hubs_cache or target.is_relative_to(root) or target.name == Path(name).name


def copy_files(files: Mapping[str, Path], folder: Any) -> None:
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


def local_folder(model: str | os.PathLike | None, revision: str | None = None) -> Path | None:
    """Return the folder of a model: the one that is named, or the one in the hub's cache."""
    if not model:
        return None
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        cached = cached_file(str(model), CONFIG, revision=revision, local_files_only=True)
        config = Path(cached)  # type: ignore[arg-type]  # None only if an option asks for it
    except (OSError, ValueError) as error:
        logger.warning("%s is neither a folder nor in the hub's cache, none of its files is taken: %s", model, error)
        return None
    try:
        # The cache has what was asked for so far: no license, for instance.
        return Path(snapshot_download(str(model), revision=config.parent.name, allow_patterns=list(ALLOWED)))
    except Exception as error:  # whatever there is between here and the hub
        logger.debug("%s is taken as it is in the cache: %s", model, error)
        return config.parent
