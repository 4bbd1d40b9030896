# SPDX-License-Identifier: Apache-2.0
"""Models on the Hugging Face hub: what a conversion needs of one is downloaded.

huggingface_hub shows the progress, takes up a connection that breaks, and keeps the files that are whole. It finds the
token and the cache by its own environment variables. It is imported when it is needed.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


# The file of all weights or the index of several, in transformers' order of preference.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_INDEX = ".index.json"
# What belongs to a model beside its weights, in its folder itself.
_BESIDE = re.compile(
    r"[^/]+\.(json|txt|model|jinja|py|md|spm|tiktoken)|additional_chat_templates/[^/]+\.jinja|"
    r"(LICEN[SC]E|COPYING|NOTICE|USE_POLICY|README)[^/]*"
)
_NOWHERE = "is neither a local folder nor a model on the hub that you have access to"


def download(
    model: str, revision: str | None = None, token: str | bool | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Download a model, and return its folder in the hub's cache. What is there already isn't downloaded again.

    Args:
        model: Its name on the hub.
        revision: A branch, a tag, or a commit. Default: main.
        token: Who asks. Default: what HF_TOKEN or the login says.
        cache_dir: Where the cache is. Default: what HF_HUB_CACHE or HF_HOME says.

    Returns:
        A folder with one set of weights, config, tokenizer, code, and documents. Without network, what the cache has.

    Raises:
        ValueError: There is no such model or revision, it has no weights, or it takes a token.
        OSError: It can't be downloaded now.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    options: dict[str, Any] = {"token": token, "cache_dir": cache_dir}
    with in_one_line(model, revision):
        try:
            found = HfApi().model_info(model, revision=revision, token=token)
        except (HfHubHTTPError, ValueError):
            raise
        except Exception:  # the network's, of whatever library asks
            return Path(snapshot_download(model, revision=revision, local_files_only=True, cache_dir=cache_dir))
        names = [each.rfilename for each in found.siblings or ()]
        weights = next((name for name in _WEIGHTS if name in names), None)
        if weights is None and not any(name.endswith(".safetensors") for name in names):
            raise ValueError(f"{model} has no weights on the hub, expected safetensors or pytorch_model.bin")
        wanted = {name for name in names if _BESIDE.fullmatch(name) and not name.endswith(_INDEX)}
        if weights is None:
            wanted |= {name for name in names if re.fullmatch(r"[^/]+\.safetensors", name)}
        elif weights.endswith(_INDEX):
            index = json.loads(Path(hf_hub_download(model, weights, revision=found.sha, **options)).read_bytes())
            wanted |= {weights, *index["weight_map"].values()}
        else:
            wanted.add(weights)
        folder = Path(snapshot_download(model, revision=found.sha, allow_patterns=sorted(wanted), **options))
    # Of a commit the hub's library notes no name, and without network it looks for one.
    if revision != found.sha:
        note = folder.parents[1] / "refs" / (revision or "main")
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(folder.name)
    return folder


@contextmanager
def in_one_line(name: str, revision: str | None, hint: str = "") -> Iterator[None]:
    """Say in one line what huggingface_hub says in several. For an upload, `hint` says what is done already."""
    from huggingface_hub import errors

    done = f". {hint}" if hint else ""
    at = f" at {revision}" if revision else ""
    try:
        yield
    except errors.GatedRepoError:
        raise ValueError(
            f"{name} is gated: accept its terms on the hub, and pass a token (--token, HF_TOKEN){done}"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name} has no revision {revision}: pass a branch, a tag, or a commit of it") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        what = "is no model on the hub that you may write to" if hint else _NOWHERE
        raise ValueError(f"{name} {what}: correct the name, or pass a token (--token, HF_TOKEN){done}") from None
    except errors.LocalEntryNotFoundError:
        what = f"{name}{at} is not in the hub's cache, and the hub can't be reached"
        raise OSError(f"{what}: connect to the network, and run the command again") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        if status in (401, 403):
            what = f"{name}: the hub refuses the token ({status})"
            raise ValueError(f"{what}: pass another one (--token, HF_TOKEN){done}") from None
        raise OSError(_again(name, f"HTTP {status}", hint)) from None
    except (ValueError, FileNotFoundError):
        raise
    except Exception as error:  # whatever the connection raises
        raise OSError(_again(name, f"{type(error).__name__}: {' '.join(str(error).split())[:150]}", hint)) from None


def _again(name: str, what: str, hint: str) -> str:
    remedy = hint or "run the command again, which keeps the files that are whole"
    return f"{name}: the connection to the hub ended ({what}): {remedy}"
