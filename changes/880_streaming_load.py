# SPDX-License-Identifier: Apache-2.0
"""`load_megatron_model` loads a model whose parameters are read when they are used."""

from fork.change import Change
from fork.edits import File, add_parameter, call, ifs, insert_before, pass_argument


STREAMING = "streaming: bool = False"
DOC = (
    "If True, reads no weights: each parameter is a list of pieces of the checkpoint's files, which are read when it is "
    "used. For a single process."
)
PASSED = "streaming=streaming"

change = Change(
    name="streaming-load",
    message="""\
perf(ckpt): load a model without reading its weights

To load a model, `load_megatron_model` reads all of its weights.

With `streaming=True` it makes the model on the meta device. The model's own
sharded state dict says which bytes of the checkpoint make up each
parameter.
""",
    why="A model can be loaded without memory for its weights.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                add_parameter("AutoBridge.load_megatron_model", STREAMING, keyword_only=True, doc=DOC),
                *(
                    pass_argument("AutoBridge.load_megatron_model", call(function), PASSED)
                    for function in ("load_megatron_model", "load_with_hf_config")
                ),
            ],
        ),
        File(
            "training/model_load_save.py",
            [
                *(
                    add_parameter(function, STREAMING, doc=DOC)
                    for function in ("load_megatron_model", "build_and_load_model")
                ),
                pass_argument("load_megatron_model", call("build_and_load_model"), PASSED),
                insert_before(
                    "build_and_load_model._load_checkpoint",
                    ifs("use_cpu_init"),
                    "if streaming:\n"
                    "    from megatron.bridge.models.conversion.streaming.load import load_streaming\n"
                    "\n"
                    "    return load_streaming(checkpoint_path, model_cfg)\n",
                ),
            ],
        ),
    ],
    modules=["models/conversion/streaming/load.py"],
    problem=(
        "To export a checkpoint in blocks, a bridge needs a model whose parameters know where their values lie in "
        "the checkpoint. `AutoBridge.load_megatron_model(checkpoint)` reads all of the values instead, which takes "
        "the memory of the whole model."
    ),
    unchanged=["`load_megatron_model` without `streaming=True`."],
    changes=[
        "`load_megatron_model(streaming=True)` returns a model whose parameters are read when they are used.",
    ],
    tested=[
        "The parameters of such a model equal those of a model that is loaded without `streaming=True`.",
    ],
    later=[
        "`streaming-export` exports such a model.",
    ],
    upstream_tests=[
        File(
            "tests/unit_tests/training/test_model_load_save.py",
            # It stands for build_and_load_model.
            [
                add_parameter(
                    "TestLoadMegatronModel.test_default_load_builds_all_layers_on_one_rank._built_layer_count",
                    "streaming=False",
                    keyword_only=True,
                    releases=">=0.7",
                )
            ],
        )
    ],
    tests={"tests/unit/bridge/test_streaming_load.py": "models/"},
    stands_on=["other-formats-export", "transformer-engine-keys", "export-account"],
)
