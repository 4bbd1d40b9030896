# SPDX-License-Identifier: Apache-2.0
"""One resolver: every reader of Bridge finds the payload of a checkpoint root, and takes a release checkpoint."""

import libcst.matchers as m

from fork.change import Change
from fork.edits import (
    File,
    add_import,
    add_parameter,
    assign,
    call,
    expression,
    ifs,
    insert_after,
    insert_before,
    insert_first,
    replace,
    replace_up_to,
)


LAYOUT = "from megatron.bridge.release_checkpoint.layout import"
IMPORT_RESOLVER = f"{LAYOUT} resolve_checkpoint\n"
# `latest_train_state.pt` of a root; without a prefix the function names the file of one iteration.
ROOT_TRAIN_STATE = m.Call(
    func=m.Name("get_checkpoint_train_state_filename"),
    args=[m.Arg(value=m.Name("load_dir")), m.Arg(keyword=m.Name("prefix"))],
)
# What upstream has only since a certain version.
EXPORT_ADAPTER = WAN = ">=0.4"
FROM_AUTO_CONFIG = MIMO = ">=0.5"

ITERATIONS = "TestAutoBridge.test_load_megatron_model_with_iter_folder"

change = Change(
    name="resolver",
    message="""\
fix(ckpt): let every reader resolve a checkpoint root the same way

`load_megatron_model` took the highest `iter_*` of a root, whatever its
tracker said, and `load_checkpoint` believed `latest_train_state.pt` over a
tracker that Megatron-LM had moved on. None of them knew `release/`, which
Megatron-LM names in its tracker for weights without training state.

Resolve roots in one place: by the tracker, then by
`latest_train_state.pt`, then to the highest iteration, then to the release.
A tracker that names a missing folder is an error.
""",
    why="Every reader of a checkpoint root finds its payload in one place, and takes a release checkpoint.",
    edits=[
        File(
            "training/checkpointing.py",
            [
                add_import(f"{LAYOUT} release_for, train_state_tracker"),
                insert_first("_load_checkpoint_from_path", "load_dir = release_for(load_dir)"),
                # Megatron-LM of core 0.16 and later takes a tracker that says 0.
                replace("read_metadata", expression("iteration > 0"), "iteration >= 0"),
                *(
                    replace(function, ROOT_TRAIN_STATE, "train_state_tracker(load_dir)", releases=releases)
                    for function, releases in {
                        "_resolve_checkpoint_iteration": "",
                        # From 0.7 on it reads the train state of the iteration itself.
                        "_load_checkpoint_from_path": "<0.7",
                        "_load_base_checkpoint": "",
                    }.items()
                ),
            ],
        ),
        File(
            "training/config.py",
            [
                insert_first(
                    "CheckpointConfig.finalize",
                    f"{LAYOUT} release_for\n"
                    "\n"
                    "self.load, self.pretrained_checkpoint = release_for(self.load), release_for(self.pretrained_checkpoint)",
                )
            ],
        ),
        File(
            "training/model_load_save.py",
            [
                add_import(IMPORT_RESOLVER),
                *(
                    insert_first(function, "checkpoint_path = resolve_checkpoint(checkpoint_path)")
                    for function in (
                        "load_tokenizer",
                        "load_model_config",
                        "build_and_load_model",
                        "load_megatron_model",
                    )
                ),
            ],
        ),
        File(
            "models/conversion/auto_bridge.py",
            [
                add_import(IMPORT_RESOLVER),
                replace_up_to(
                    "AutoBridge.load_megatron_model",
                    expression("Path(path)"),
                    assign("skip_temp_dist_context"),
                    "checkpoint_path = Path(resolve_checkpoint(path))",
                ),
                insert_before(
                    "AutoBridge.from_auto_config",
                    ifs("not checkpoint_path.exists()"),
                    "checkpoint_path = Path(resolve_checkpoint(checkpoint_path))\n",
                    releases=FROM_AUTO_CONFIG,
                ),
                insert_after(
                    "AutoBridge.export_adapter_ckpt",
                    ifs("not ckpt_path.exists()"),
                    "ckpt_path = Path(resolve_checkpoint(ckpt_path))",
                    releases=EXPORT_ADAPTER,
                ),
            ],
        ),
        File(
            "training/utils/checkpoint_utils.py",
            [
                add_import(f"{LAYOUT} release_for, resolve_checkpoint"),
                insert_first("checkpoint_exists", "checkpoints_path = release_for(checkpoints_path)"),
                insert_first("get_hf_model_id_from_checkpoint", "path = resolve_checkpoint(path)"),
            ],
        ),
        File(
            "models/megatron_mimo/conversion/mimo_model_io.py",
            [
                insert_first(
                    "_resolve_iter_folder",
                    f"{IMPORT_RESOLVER}\n"
                    "resolved = Path(resolve_checkpoint(path))\n"
                    'if resolved != path or path.name == "release":\n'
                    "    return resolved\n",
                    releases=MIMO,
                )
            ],
        ),
        File(
            "diffusion/models/wan/flow_matching/flow_inference_pipeline.py",
            [
                insert_before(
                    "FlowInferencePipeline._select_checkpoint_dir",
                    assign("pattern"),
                    f"{IMPORT_RESOLVER}\n"
                    "resolved = resolve_checkpoint(base_dir)\n"
                    "if resolved != base_dir:\n"
                    '    logging.info(f"Selected checkpoint: {resolved}")\n'
                    "    return resolved\n",
                    releases=WAN,
                )
            ],
        ),
    ],
    modules=["release_checkpoint/__init__.py", "release_checkpoint/layout.py"],
    issues=[3295],
    problem=(
        "Bridge's readers disagree about which checkpoint a root holds. `load_megatron_model` takes the highest "
        "`iter_*` and ignores the tracker, while `load_checkpoint` prefers `latest_train_state.pt`, which "
        "Megatron-LM doesn't update. No reader finds `release/`: `bridge.load_megatron_model(root)` fails there with "
        "an error about a missing run config."
    ),
    changes=[
        "Every reader of a checkpoint root (`load_megatron_model`, `export_ckpt`, `load_checkpoint`, tokenizer, "
        "model config, ModelOpt state) resolves it with `release_checkpoint.layout.resolve_checkpoint`. It finds "
        "release checkpoints, too.",
        "If `iter_0000000` doesn't exist, its path means the release checkpoint beside it. A warning says so.",
    ],
    unchanged=[
        "What Bridge writes.",
        "How a path of an iteration folder is read.",
    ],
    tested=[
        "Unit tests of the resolver on folders.",
        "With the later changes, each reader on imported and on trained checkpoints, on the CPU.",
    ],
    later=[
        "Nothing in Bridge writes a release checkpoint yet. The change `release-checkpoints` does.",
        "The scripts below scripts/ and examples/ keep their own way to resolve a root until `layout-options`.",
    ],
    tests={"tests/unit/bridge/test_layout.py": "release_checkpoint/"},
    upstream_tests=[
        File(
            "tests/unit_tests/models/test_auto_bridge.py",
            [
                # Without the folder there is nothing to list.
                replace(
                    "TestAutoBridge.test_load_megatron_model_basic",
                    m.Expr(value=call("mock_iterdir.assert_called_once")),
                    'assert mock_load_megatron_model.call_args.args[0] == "checkpoint_path"',
                ),
                # The resolver lists only a folder that is there.
                add_parameter(ITERATIONS, "tmp_path"),
                replace(ITERATIONS, expression('"./checkpoint_path"'), "tmp_path"),
                replace(
                    ITERATIONS,
                    m.Expr(value=call("mock_load_megatron_model.assert_called_once")),
                    'assert mock_load_megatron_model.call_args.args[0] == str(tmp_path / "iter_0000020")',
                ),
            ],
        )
    ],
)
