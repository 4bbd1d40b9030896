# SPDX-License-Identifier: Apache-2.0
"""Ways to break a Hugging Face checkpoint of two shards, by name: what is done to it, and a part of the error."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
PROJECTION = "model.layers.1.mlp.down_proj.weight"

Break = Callable[[Path], Any]


class Payload:
    """Runs when it is unpickled: it leaves a file."""

    def __init__(self, traces: Path):
        self.traces = traces

    def __reduce__(self):
        return os.mkdir, (str(self.traces),)


def traces(hf: Path) -> Path:
    """Where the payloads that are planted into `hf` leave their traces."""
    return hf.with_name(f"{hf.name}-was-run")


def edit(name: str, change: Callable[[dict], Any]) -> Break:
    def break_it(hf: Path) -> None:
        content = json.loads((hf / name).read_text())
        change(content)
        (hf / name).write_text(json.dumps(content))

    return break_it


def config(**values: Any) -> Break:
    return edit("config.json", lambda content: content.update(values))


def write(name: str, content: bytes) -> Break:
    return lambda hf: (hf / name).write_bytes(content)


def sparse(name: str, size: int) -> Break:
    return lambda hf: os.truncate(hf / name, size)


def header(change: Callable[[dict], Any]) -> Break:
    """Change the header of a shard and leave its data."""

    def break_it(hf: Path) -> None:
        data = (hf / SHARD).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        content = json.loads(data[8 : 8 + length])
        change(content)
        text = json.dumps(content).encode()
        (hf / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return break_it


def raw_header(text: bytes, length: int | None = None) -> Break:
    return write(SHARD, struct.pack("<Q", len(text) if length is None else length) + text)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Break:
    """Change tensors; files and index stay in line."""

    def break_it(hf: Path) -> None:
        content = {name: value for file in hf.glob("*.safetensors") for name, value in load_file(file).items()}
        change(content)
        for file in hf.glob("model*"):
            file.unlink()
        save_file(content, hf / "model.safetensors", metadata={"format": "pt"})

    return break_it


def shard_name(name: str) -> Break:
    return edit(INDEX, lambda content: content["weight_map"].update({NORM: name}))


def instead(make: Break) -> Break:
    """Remove a shard and make something else of its name."""

    def break_it(hf: Path) -> None:
        (hf / SHARD).unlink()
        make(hf / SHARD)

    return break_it


def drop(*names: str) -> Break:
    return tensors(lambda content: [content.pop(name) for name in names])


def pickled(name: str) -> Break:
    return lambda hf: (hf / name).write_bytes(pickle.dumps(Payload(traces(hf))))


def only_pickles(hf: Path) -> None:
    for file in hf.glob("model*"):
        file.unlink()
    torch.save({NORM: Payload(traces(hf))}, hf / "pytorch_model.bin")


def remote_code(hf: Path) -> None:
    (hf / "evil.py").write_text(f"import os\nos.mkdir({str(traces(hf))!r})\nclass Evil: pass\n")
    config(model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})(hf)


DAMAGED = f"{SHARD} is truncated or damaged"
NO_CONFIG = "config.json is not JSON"

BROKEN: dict[str, tuple[Break, str]] = {
    # The header of a shard.
    "header empty": (raw_header(b""), DAMAGED),
    "header of 2**63 bytes": (raw_header(b"{}", 2**63), DAMAGED),
    "header of 2**40 bytes": (raw_header(b"{}", 2**40), DAMAGED),
    "header of 90 MB in a sparse file": (
        lambda hf: (raw_header(b"{", 90 << 20)(hf), sparse(SHARD, 200 << 20)(hf)),
        DAMAGED,
    ),
    "header longer than the file": (raw_header(b"{}", 1000), DAMAGED),
    "an architecture without a bridge": (config(architectures=["GPTJForCausalLM"]), "GPTJForCausalLM"),
    "header no JSON": (raw_header(b"nonsense"), DAMAGED),
    "header a list": (raw_header(b"[]"), DAMAGED),
    "header not UTF-8": (raw_header(b'{"\xff\xfe": 1}'), DAMAGED),
    "header nested deeply": (raw_header(b'{"a":' + b"[" * 100_000), DAMAGED),
    "five bytes": (write(SHARD, b"12345"), DAMAGED),
    "unknown dtype": (header(lambda tensors: tensors[NORM].update(dtype="F31")), DAMAGED),
    "offsets beyond the file": (header(lambda tensors: tensors[NORM].update(data_offsets=[0, 1 << 50])), DAMAGED),
    "offsets reversed": (header(lambda tensors: tensors[NORM]["data_offsets"].reverse()), DAMAGED),
    "offsets negative": (header(lambda tensors: tensors[NORM].update(data_offsets=[-256, 0])), DAMAGED),
    "tensors overlap": (
        header(lambda tensors: tensors[NORM].update(data_offsets=tensors[PROJECTION]["data_offsets"])),
        DAMAGED,
    ),
    "shape too large for its bytes": (header(lambda tensors: tensors[NORM].update(shape=[65])), DAMAGED),
    "shape negative": (header(lambda tensors: tensors[NORM].update(shape=[-64])), DAMAGED),
    "shape overflows": (header(lambda tensors: tensors[NORM].update(shape=[2**62, 8])), DAMAGED),
    "no offsets": (header(lambda tensors: tensors[NORM].pop("data_offsets")), DAMAGED),
    "bytes behind the data": (lambda hf: (hf / SHARD).open("ab").write(b"more"), DAMAGED),
    # What is in the tensors.
    "a shape of another model": (
        tensors(lambda content: content.update({PROJECTION: torch.zeros(3, 5)})),
        f"{PROJECTION} has shape [3, 5], config.json expects [64, 128]",
    ),
    "transposed": (
        tensors(lambda content: content.update({EMBEDDING: content[EMBEDDING].t().contiguous()})),
        f"{EMBEDDING} has shape [64, 384]",
    ),
    "a scalar": (tensors(lambda content: content.update({NORM: torch.tensor(1.0)})), f"{NORM} has shape []"),
    "empty": (tensors(lambda content: content.update({NORM: torch.empty(0)})), f"{NORM} has shape [0]"),
    "integers": (
        tensors(lambda content: content.update({NORM: torch.ones(64, dtype=torch.int64)})),
        f"{NORM} holds torch.int64, expected floats",
    ),
    "booleans": (
        tensors(lambda content: content.update({NORM: torch.ones(64, dtype=torch.bool)})),
        f"{NORM} holds torch.bool, expected floats",
    ),
    "a tensor is missing": (drop(PROJECTION), f"lacks '{PROJECTION}'"),
    "the embedding is missing": (drop(EMBEDDING), f"lacks '{EMBEDDING}'"),
    "the output layer is missing": (drop("lm_head.weight"), "lacks 'lm_head.weight'"),
    "a tensor by another name": (
        tensors(lambda content: content.update({"model.final_norm.weight": content.pop(NORM)})),
        f"lacks '{NORM}'",
    ),
    "a tensor in the wrong shard": (
        edit(INDEX, lambda content: content["weight_map"].update({EMBEDDING: SHARD})),
        f"{SHARD} lacks '{EMBEDDING}'",
    ),
    "no tensors at all": (tensors(lambda content: content.clear()), "0 tensors"),
    # The config.
    "more layers than weights": (config(num_hidden_layers=3), "lacks 'model.layers.2"),
    "a billion layers": (config(num_hidden_layers=10**9), "asks for 1000000000 layers"),
    "another hidden size": (config(hidden_size=128), "has shape"),
    "another vocabulary": (config(vocab_size=512), "config.json expects [512, 64]"),
    "an endless vocabulary": (config(vocab_size=10**15), "config.json expects [1000000000000000, 64]"),
    "other heads": (config(num_key_value_heads=4), "config.json expects [64, 64]"),
    "no heads": (config(num_attention_heads=0), "config.json has num_attention_heads 0"),
    "a size that is text": (config(hidden_size="large"), "config.json is not taken by transformers"),
    "a negative size": (config(intermediate_size=-1), "config.json has intermediate_size -1"),
    "no architecture": (config(architectures=None), "architecture"),
    "no model type": (edit("config.json", lambda content: content.pop("model_type")), "config.json"),
    "config empty": (write("config.json", b""), NO_CONFIG),
    "config binary": (write("config.json", bytes(range(256))), NO_CONFIG),
    "config nested deeply": (write("config.json", b"[" * 1_000_000), NO_CONFIG),
    "config of 100 GB": (sparse("config.json", 100 << 30), "config.json is larger than 256 MB"),
    # The index.
    "index cut short": (lambda hf: os.truncate(hf / INDEX, 100), f"{INDEX} is not JSON"),
    "index of 100 GB": (sparse(INDEX, 100 << 30), f"{INDEX} is larger than 256 MB"),
    "index nested deeply": (write(INDEX, b'{"weight_map":' + b"[" * 1_000_000), f"{INDEX} is not JSON"),
    "weight map a list": (write(INDEX, b'{"weight_map": []}'), "has no weight_map"),
    "weight map to numbers": (
        edit(INDEX, lambda content: content["weight_map"].update({NORM: 2})),
        "has no weight_map",
    ),
    "index names itself": (shard_name(INDEX), f"{INDEX} is truncated or damaged"),
    "shard above": (shard_name(f"../{SHARD}"), "expected a file in the same folder"),
    "shard absolute": (shard_name("/etc/passwd"), "expected a file in the same folder"),
    "shard below": (shard_name(f"folder/{SHARD}"), "expected a file in the same folder"),
    "shard is the folder": (shard_name("."), "expected a file in the same folder"),
    "shard is the folder above": (shard_name(".."), "which is not there"),
    "shard without a name": (shard_name(""), "which is not there"),
    "shard with a NUL": (shard_name("a\0b"), "which is not there"),
    "shard with a line break": (shard_name("a\nb"), "which is not there"),
    "shard with a name of 5000 letters": (shard_name("a" * 5000), "which is not there"),
    # What stands where a shard is expected.
    "link to itself": (instead(lambda shard: shard.symlink_to(shard)), "which is not there"),
    "link to nothing": (instead(lambda shard: shard.symlink_to("nothing")), "which is not there"),
    "link to a device": (instead(lambda shard: shard.symlink_to("/dev/zero")), "which is not there"),
    "link to a text": (instead(lambda shard: shard.symlink_to("/etc/passwd")), DAMAGED),
    "a folder": (instead(lambda shard: shard.mkdir()), "which is not there"),
    "a pipe": (instead(lambda shard: os.mkfifo(shard)), "which is not there"),
    "a pipe without an index": (
        lambda hf: (instead(lambda shard: os.mkfifo(shard))(hf), (hf / INDEX).unlink()),
        f"{SHARD} is not a file",
    ),
    # Code.
    "pickles alone": (only_pickles, "pytorch_model.bin names posix.mkdir, which weights don't need"),
    "a pickle by the name of a shard": (pickled(SHARD), DAMAGED),
    "a pickle by the name of the config": (pickled("config.json"), NO_CONFIG),
    "code that nobody trusted": (remote_code, "pass trust_remote_code=True if"),
}
