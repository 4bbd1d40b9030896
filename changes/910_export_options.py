# SPDX-License-Identifier: Apache-2.0
"""An export in another dtype, or in files of another size."""

from fork.change import Change
from fork.edits import File, add_import, add_parameter, call, insert_before


DTYPE_DOC = "The dtype of the exported weights. By default they have that of the checkpoint."
SIZE_DOC = (
    'The size that weight files have at most, in bytes or as "5GB". By default they are divided as the source\'s.'
)

change = Change(
    name="export-options",
    message="""\
feat(ckpt): export in another dtype, or in files of another size

An export had the dtype of the checkpoint and the files of the source.

`export_ckpt` takes `dtype` and `max_shard_size`. It rewrites the weights
block by block before the export gets its name, and states the dtype in
config.json. A value that the dtype can't hold is an error.
""",
    why="export_ckpt takes a dtype and the largest size of a file.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                add_import("import torch", releases="<0.4"),
                add_parameter("AutoBridge.export_ckpt", "dtype: torch.dtype | None = None", doc=DTYPE_DOC),
                add_parameter("AutoBridge.export_ckpt", "max_shard_size: int | str | None = None", doc=SIZE_DOC),
                insert_before(
                    "AutoBridge.export_ckpt",
                    call("own_files.give_back"),
                    "from megatron.bridge.models.conversion.streaming.rewrite import rewrite\n"
                    "\n"
                    "rewrite(hf_path, dtype, max_shard_size)",
                ),
            ],
        )
    ],
    modules=["models/conversion/streaming/rewrite.py"],
    stands_on=["safetensors-files", "export-staging", "source-config", "casts"],
    problem=(
        "`bridge.export_ckpt(checkpoint, hf_out)` always writes the dtype of the checkpoint, in files like those of "
        "the source. To get bfloat16 from a checkpoint in float32, or files below the size limit of a host, users "
        "have to load the export with transformers and save it again, in the memory of the whole model."
    ),
    changes=[
        "`AutoBridge.export_ckpt` takes `dtype` and `max_shard_size`.",
    ],
    unchanged=[
        "Exports without these arguments.",
    ],
    tested=[
        "Unit tests. A tiny Llama is exported in float32 and in files of 100 kB, and transformers loads it.",
    ],
    tests={"tests/unit/bridge/test_streaming_rewrite.py": "models/"},
)
