# SPDX-License-Identifier: Apache-2.0
"""Import and export models that no disk here holds: `nox -s scale`.

A checkpoint has every tensor of the published model, by name, dtype and shape, in sparse files. `megatron-bridge`
plans and carries out a conversion of it as of any other, except that it leaves a hole where the values of a tensor
go, and reads none. So plan, headers, index, `.metadata`, and memory are real, and the time is that without the
values. The results are in benchmarks/scale.json.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from benchmarks import memory
from benchmarks.results import GB


HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests" / folder) for folder in ("unit/bridge", "functional")]

SHARD_BYTES = 5 * 10**9
BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
_BLOCK = 128
_QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return BYTES[self.dtype] * prod(self.shape)


Tensors = Iterator[tuple[str, Tensor]]


def _llama(config: dict) -> Tensors:
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    group = hidden // heads * config["num_key_value_heads"]
    linear = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    linear |= {"self_attn.k_proj": (group, hidden), "self_attn.v_proj": (group, hidden)}
    linear |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    yield from _ends(config)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in (linear | norms).items():
            yield f"model.layers.{layer}.{name}.weight", Tensor("BF16", shape)


def _deepseek(config: dict) -> Tensors:
    """Yield the tensors of DeepSeek-V3 as published: FP8 with scales of blocks, and one layer for prediction."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["q_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    latent, experts = config["kv_lora_rank"], config["n_routed_experts"]
    attention = {"q_a_proj": (rank, hidden), "q_b_proj": (heads * (nope + rope), rank)}
    attention |= {"kv_a_proj_with_mqa": (latent + rope, hidden), "kv_b_proj": (heads * (nope + value), latent)}
    attention |= {"o_proj": (hidden, heads * value)}
    yield from _ends(config)
    layers = config["num_hidden_layers"]
    for layer in range(layers + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", Tensor("BF16", (hidden,))
        for norm, size in (("q_a_layernorm", rank), ("kv_a_layernorm", latent)):
            yield f"{prefix}.self_attn.{norm}.weight", Tensor("BF16", (size,))
        for name, shape in attention.items():
            yield from _fp8(f"{prefix}.self_attn.{name}.weight", shape)
        if layer < config["first_k_dense_replace"]:
            yield from _mlp(f"{prefix}.mlp", hidden, config["intermediate_size"])
        else:
            yield f"{prefix}.mlp.gate.weight", Tensor("BF16", (experts, hidden))
            yield f"{prefix}.mlp.gate.e_score_correction_bias", Tensor("F32", (experts,))
            for each in ("shared_experts", *(f"experts.{number}" for number in range(experts))):
                yield from _mlp(f"{prefix}.mlp.{each}", hidden, config["moe_intermediate_size"])
        if layer >= layers:
            for name in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{prefix}.{name}.weight", Tensor("BF16", (hidden,))
            yield f"{prefix}.eh_proj.weight", Tensor("BF16", (hidden, 2 * hidden))
            for name in ("embed_tokens", "shared_head.head"):
                yield f"{prefix}.{name}.weight", Tensor("BF16", (config["vocab_size"], hidden))


def _ends(config: dict) -> Tensors:
    for name in ("model.embed_tokens", "lm_head"):
        yield f"{name}.weight", Tensor("BF16", (config["vocab_size"], config["hidden_size"]))
    yield "model.norm.weight", Tensor("BF16", (config["hidden_size"],))


def _mlp(prefix: str, hidden: int, inner: int) -> Tensors:
    for name, shape in {
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }.items():
        yield from _fp8(f"{prefix}.{name}.weight", shape)


def _fp8(name: str, shape: tuple[int, ...]) -> Tensors:
    yield name, Tensor("F8_E4M3", shape)
    yield f"{name}_scale_inv", Tensor("F32", tuple(-(-size // _BLOCK) for size in shape))


MODELS = {"Llama-3.1-405B": (_llama, {}), "DeepSeek-V3": (_deepseek, {"quantization_config": _QUANTIZATION})}
"""What gives the tensors of a model, and what its published config.json has beyond published_configs.py."""


def write_sparse(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    """Write config, index, and shards whose values are holes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.bytes
    files = {f"model-{at:05d}-of-{len(shards):05d}.safetensors": shard for at, shard in enumerate(shards, start=1)}
    index = {"metadata": {"total_size": sum(tensor.bytes for tensor in tensors.values())}}
    index["weight_map"] = {name: file for file, shard in files.items() for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, shard in files.items():
        entries, start = {}, 0
        for name, tensor in shard.items():
            stop = start + tensor.bytes
            entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + start)


def leave_holes() -> None:
    """Let this process write a hole for the values of a tensor, and read none."""
    from megatron.bridge.models.conversion.streaming import dcp, safetensors_files
    from megatron.bridge.models.conversion.streaming.archive import Archive

    def write_tensor(stream, tensor, advance):
        archive = Archive.around(tensor)
        stream.write(archive.before)
        stream.seek(archive.gap, os.SEEK_CUR)
        stream.write(archive.after(0))
        return True

    dcp.write_tensor = write_tensor
    # Headers are written, and room for the tensors is made, before.
    safetensors_files._write = lambda places, advance: None


def without_values(arguments: list[str]) -> None:
    """Run a subcommand of `megatron-bridge` in this process. It finds room on the disk in any case."""
    from megatron.bridge.cli import export, import_, main
    from megatron.bridge.utils.deferred import lean_imports

    import_.check_space = export.check_space = lambda path, needed: None
    with lean_imports():
        from megatron.bridge import AutoBridge  # noqa: F401
    leave_holes()
    main(arguments, prog_name="megatron-bridge")


def measure(name: str, folder: Path) -> dict:
    """Convert a model there and back, and return the figures."""
    from published_configs import PUBLISHED
    from tokenizer import train_tokenizer

    layout, further = MODELS[name]
    config = PUBLISHED[name] | further
    tensors = dict(layout(config))
    source, checkpoint, back = folder / "hf", folder / "checkpoint", folder / "back"
    write_sparse(source, config, tensors)
    train_tokenizer(source)
    steps = {
        "import": (["import", source, checkpoint, "--no-verify"], checkpoint / "release.incomplete.*" / "release"),
        "export": (["export", checkpoint, back], folder / "back.incomplete.*" / "**" / "*.safetensors"),
    }
    found = {"tensors": len(tensors), "bytes": sum(tensor.bytes for tensor in tensors.values())}
    for step, (arguments, marker) in steps.items():
        command = [sys.executable, "-m", "benchmarks.scale", "--without-values", *map(str, arguments)]
        run = memory.run(command, folder / f"{step}.log", marker)
        # How much of it is the plan shows when the first file appears.
        found[step] = {"seconds": run.wall, "planned": run.started, "resident": run.peak("resident")}
        print(f"{name}, {step}: {run.wall:.0f} s, {run.peak('resident') / GB:.2f} GB", flush=True)
    payload = checkpoint / "release"
    found["checkpoint_bytes"] = sum(file.stat().st_size for file in payload.glob("*.distcp"))
    found["metadata_bytes"] = (payload / ".metadata").stat().st_size
    again = json.loads((back / "model.safetensors.index.json").read_text())["weight_map"]
    found["exported_tensors"] = len(again)
    found["allocated_bytes"] = sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
    return found


def main() -> None:
    """Run the models that are asked for."""
    parser = argparse.ArgumentParser(prog="nox -s scale --", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="separated by commas; default: %(default)s")
    parser.add_argument("--out", type=Path, help="a folder for the sparse files; default: a temporary one")
    given = parser.parse_args()
    report = HERE / "scale.json"
    figures = json.loads(report.read_text()) if report.is_file() else {}
    for name in given.models.split(","):
        folder = Path(tempfile.mkdtemp(prefix="scale-", dir=given.out))
        try:
            figures[name] = measure(name, folder)
        finally:
            shutil.rmtree(folder)
        figures[name] |= {"cpus": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
        report.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--without-values"]:
        without_values(sys.argv[2:])
    else:
        main()
