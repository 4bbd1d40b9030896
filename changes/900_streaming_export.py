# SPDX-License-Identifier: Apache-2.0
"""`export_ckpt` converts and writes in blocks, so that its memory does not grow with the model."""

from fork.change import Change
from fork.edits import (
    File,
    add_parameter,
    assign,
    call,
    expression,
    imports,
    insert_after,
    insert_before,
    pass_argument,
    replace,
    wrap,
)


STREAMING_DOC = (
    "If True, converts and writes tensor by tensor, so that the host needs no memory for the model. A checkpoint that can't "
    "be streamed is exported in memory: a warning says why. False forces that."
)
COLLECT = 'if hasattr(model, "streamed_tensors"):\n    generator = dict(generator)\n'
SAVE = "from megatron.bridge.models.conversion.streaming.safetensors_files import"
# They go the way through memory, with a mock of the bridge.
IN_MEMORY = {
    "test_export_ckpt_basic": "",
    "test_export_ckpt_with_kwargs": "",
    "test_export_ckpt_preserves_existing_distributed_context": ">=0.7",
}


change = Change(
    name="streaming-export",
    message="""\
perf(ckpt): export checkpoints tensor by tensor

`AutoBridge.export_ckpt` held the whole model in memory, more than once.

Plan the export on the meta device, and write the safetensors files block by
block. The files are the same for every family. Several ranks divide the
files among them. `streaming=False` exports in memory.
""",
    why="export_ckpt needs the memory of a block, not of a model, and goes at the speed of the disk.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                add_parameter("AutoBridge.export_ckpt", "streaming: bool = True", doc=STREAMING_DOC),
                insert_before(
                    "AutoBridge.export_ckpt",
                    assign("megatron_model"),
                    """\
streamed_model = None
if streaming:
    from megatron.bridge.models.conversion.streaming.export import plan_export

    streamed_model = plan_export(self, megatron_path)
""",
                ),
                wrap("AutoBridge.export_ckpt", call("self.load_megatron_model"), "streamed_model or {}"),
                *(
                    insert_after(
                        "AutoBridge.save_hf_weights",
                        call(f"{bridge}.stream_weights_megatron_to_hf"),
                        "# The tensors of an export that streams are read when they are written.\n"
                        'if hasattr(model, "streamed_tensors"):\n    generator = model.streamed_tensors.items()\n',
                        releases=releases,
                    )
                    for releases, bridge in {"<0.5": "model_bridge", ">=0.5": "bridge"}.items()
                ),
                # A model without weights has no quantizers. The import takes a second and 100 MB.
                replace(
                    "AutoBridge.save_hf_weights",
                    expression("is_quantized(model_instance)"),
                    'not hasattr(model, "streamed_tensors") and is_quantized(model_instance)',
                    releases=">=0.4",
                ),
                *(
                    insert_before(
                        "AutoBridge.save_hf_weights", call(f"{source}.save_generator"), COLLECT, releases=releases
                    )
                    for releases, source in {"<0.5": "self.hf_pretrained.state.source", ">=0.5": "source"}.items()
                ),
                insert_before(
                    "AutoBridge.save_hf_weights",
                    imports("huggingface_hub"),
                    f'if hasattr(model, "streamed_tensors"):\n    {SAVE} save_split\n\n'
                    '    return save_split(dict(generator), path, "5GB")\n',
                    releases=">=0.5",
                ),
            ],
        ),
        File(
            "models/hf_pretrained/state.py",
            [
                # Ranks divide the files of an export that streams.
                replace(
                    "SafeTensorsStateSource.save_generator",
                    expression("rank != 0"),
                    "rank != 0 and not isinstance(generator, dict)",
                ),
                insert_after(
                    "SafeTensorsStateSource.save_generator",
                    assign("all_expected_keys"),
                    f"if isinstance(generator, dict):\n    {SAVE} save_like\n\n"
                    "    return save_like(self.path, key_to_filename_map, generator, output_path, strict)\n",
                ),
            ],
        ),
    ],
    modules=["models/conversion/streaming/export.py"],
    problem=(
        "`AutoBridge.export_ckpt` needs 5 GB of memory for a model of 1B, and 11 GB for one of 3B. A host that "
        "imports a model of 8B in less than 1 GB can't export what was trained from it."
    ),
    unchanged=[
        "The bytes of every safetensors file.",
        "Exports of a model that is split over several ranks.",
    ],
    changes=[
        "`AutoBridge.export_ckpt` takes `streaming`. By default it makes the model on the meta device, and "
        "reads, converts, and writes tensor by tensor. `streaming=False` exports in memory as before.",
        "A checkpoint that can't be streamed is exported in memory, and a warning says why.",
    ],
    tested=[
        "For every family, the files equal those of an export in memory byte for byte, with Bridge 0.3.1 to 0.6.2.",
    ],
    upstream_tests=[
        File(
            "tests/unit_tests/models/test_auto_bridge.py",
            [
                pass_argument(
                    f"TestAutoBridge.{test}",
                    call("unwrap(AutoBridge.export_ckpt)"),
                    "streaming=False",
                    releases=releases,
                )
                for test, releases in IN_MEMORY.items()
            ],
        )
    ],
    stands_on=["trained-config", "streaming-load", "safetensors-files", "export-model-files"],
    tests={"tests/unit/bridge/test_streaming_export.py": "models/"},
)
