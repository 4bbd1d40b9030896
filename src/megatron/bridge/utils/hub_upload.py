# SPDX-License-Identifier: Apache-2.0
"""Uploads an export to the Hugging Face hub, with a model card that says what it was made from."""

import json
import re
from importlib.metadata import version
from pathlib import Path

from megatron.bridge.utils.hub import in_one_line


def upload(folder: Path, name: str, private: bool, card: str) -> str:
    """Upload an export, and return its address. Files that an interrupted upload has stored aren't sent again.

    Args:
        folder: The export.
        name: The name on the hub, with or without the name of its owner. It is made if it isn't there.
        private: Whether it is private when it is made.
        card: The model card, in place of the one in the folder, which is that of the source.

    Raises:
        ValueError: The token may not write there.
        OSError: It can't be uploaded now.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with in_one_line(name, None, f"The export is whole at {folder}; upload it with: hf upload {name} {folder}"):
        made = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, ignore_patterns=["README.md"])
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=made.repo_id)
        return str(made)


def model_card(made_from: str, checkpoint: str, iteration: int, adapter: bool) -> str:
    """Return a model card that says what a model was made from.

    Args:
        made_from: The Hugging Face model that was trained, a name on the hub or a folder.
        checkpoint: The checkpoint that was exported.
        iteration: How long it was trained, 0 for a model that was only converted.
        adapter: Whether it is an adapter of PEFT.
    """
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", made_from) is not None and not Path(made_from).exists()
    head = {"library_name": "peft" if adapter else "transformers", "tags": ["megatron-bridge"]}
    head |= {"base_model": made_from} if on_hub else {}
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    source = f"[{made_from}](https://huggingface.co/{made_from})" if on_hub else Path(made_from).name
    what = f"This {'adapter' if adapter else 'model'} was {'trained' if iteration else 'converted'}"
    trained = f" for {iteration} iterations" if iteration else ""
    text = (
        f"{what} from {source}{trained} with Megatron-LM or Megatron-Bridge, and exported from the checkpoint "
        f"`{Path(checkpoint).name}` by Megatron-Bridge {version('megatron-bridge')}."
    )
    return "\n".join(["---", *lines, "---", "", text, ""])
