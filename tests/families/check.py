# SPDX-License-Identifier: Apache-2.0
"""Take tiny models of families to Megatron and back, in a process with the layout of Transformer Engine's modules.

    python tests/families/check.py [ARCHITECTURE…]

A line of JSON says of each architecture what of its tensors doesn't come back, or why it isn't converted.
`nox -s families` runs it for all of them.
"""

import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1] / "functional"))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from megatron.bridge.host import stand_ins


stand_ins.install()  # before Megatron Core is imported

import tiny  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from megatron.bridge import AutoBridge  # noqa: E402


def there_and_back(folder: Path, architecture: str) -> list[str]:
    """Import a tiny model, export it, and return a line for each tensor that differs from the model's."""
    hf = tiny.make_model(folder / "hf", architecture)
    AutoBridge.import_ckpt(hf, folder / "megatron")
    AutoBridge.from_hf_pretrained(hf).export_ckpt(folder / "megatron", folder / "back", show_progress=False)
    source, back = tensors(hf), tensors(folder / "back")
    lines = [f"{name} is missing" for name in source.keys() - back.keys()]
    lines += [f"{name} is new" for name in back.keys() - source.keys()]
    for name in source.keys() & back.keys():
        if source[name].dtype != back[name].dtype:
            lines.append(f"{name} is {back[name].dtype}, was {source[name].dtype}")
        elif not source[name].equal(back[name]):
            lines.append(f"{name} has other values")
    return sorted(lines)


def tensors(folder: Path) -> dict:
    """Return the tensors of a Hugging Face checkpoint."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def main() -> None:
    """Print a line of JSON for each architecture, and exit with 1 if one has another result than its row says."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    failed = False
    for architecture in sys.argv[1:] or tiny.ROWS:
        expected = tiny.ROWS[architecture].reason
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            try:
                lines = there_and_back(Path(folder), architecture)
            except Exception as error:
                lines = [" ".join(f"{type(error).__name__}: {error}".split())]
        row = {"architecture": architecture, "lines": len(lines), "first": lines[0] if lines else ""}
        row["as expected"] = expected in row["first"] if expected else not lines
        failed |= not row["as expected"]
        print(json.dumps(row), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
