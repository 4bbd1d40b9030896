# SPDX-License-Identifier: Apache-2.0
"""Release checkpoints: `import_ckpt` writes one, with Megatron-LM's args."""

from fork.change import Change, insert_before_heading
from fork.edits import (
    File,
    add_import,
    add_parameter,
    assign,
    call,
    decorate,
    define,
    expression,
    ifs,
    insert_after,
    insert_before,
    insert_first,
    pass_argument,
    replace,
)


SAVE_DOC = (
    "If True, saves a release checkpoint, which Megatron-LM starts fine-tuning from: weights and Megatron-LM args, "
    "without training state, in `release/`, with the tracker `release`."
)
SHORT_DOC = "If True, saves a release checkpoint, which Megatron-LM fine-tunes from. Default: False."
BARRIER = "save_checkpoint._post_save_global_barrier"

GUIDE = """\
### Release checkpoints

`AutoBridge.import_ckpt` writes a *release checkpoint*, from which Megatron Bridge and Megatron-LM both start.

```
megatron_checkpoints/llama32_1b/
├── latest_checkpointed_iteration.txt    # the word "release", written last
└── release/
    ├── .metadata, *.distcp              # weights, and Megatron-LM's args; no optimizer, no random state
    └── run_config.yaml, tokenizer/
```

Pass the root, or `release/`, as the checkpoint path. An import that is interrupted leaves what was there before, and a target
with training iterations is refused. `AutoBridge.save_megatron_model(..., release=True)` writes a release from a model in memory.

"""

change = Change(
    name="release-checkpoints",
    message="""\
fix(ckpt)!: write release checkpoints that Megatron-LM fine-tunes from

`AutoBridge.import_ckpt` wrote `iter_0000000/` with the tracker `0` and no
Megatron-LM args. Megatron-LM could not start from that: up to core 0.15 it
refuses the tracker, later versions look for optimizer state, and none can
use `--use-checkpoint-args`.

Write `release/` with the tracker `release` and complete args by default.
""",
    why="import_ckpt writes a release checkpoint (release/, tracker, Megatron-LM args) that Megatron-LM starts from.",
    edits=[
        File(
            "training/checkpointing.py",
            [
                add_import("from megatron.bridge.training import release_state"),
                add_import("from megatron.bridge.training.release_writer import ReleaseWriter"),
                decorate("save_checkpoint", "release_state.writes_releases(ReleaseWriter)"),
                add_parameter("save_checkpoint", "release: bool = False", doc=SAVE_DOC),
                add_parameter(
                    "save_checkpoint",
                    "writer: ReleaseWriter | None = None",
                    doc="Writes the release checkpoint. Set by the decorator.",
                ),
                insert_after(
                    "save_checkpoint",
                    assign("checkpoint_name"),
                    "if writer is not None:\n    checkpoint_name = writer.stage()",
                    done=call("writer.stage"),
                ),
                insert_after(
                    "save_checkpoint",
                    ifs("prebuilt_state_dict is not None"),
                    "if writer is not None:\n    state_dict = release_state.release_state_dict(state_dict, cfg)",
                ),
                # On every rank, so that each raises what fails on rank 0.
                insert_before(
                    "save_checkpoint.train_state_finalize_fn",
                    assign('train_state_dict["floating_point_operations_so_far"]'),
                    "if writer is not None:\n    return",
                ),
                insert_first(
                    BARRIER,
                    "if writer is not None:\n"
                    "    writer.run(release_state.complete_payload, writer.payload, cfg)\n"
                    "    writer.publish()\n"
                    '    print_rank_0(f"  successfully saved release checkpoint to {save_dir}")',
                    done=call("writer.publish"),
                ),
                insert_before(
                    "save_checkpoint",
                    define("wandb_finalize_fn"),
                    "if writer is not None:\n"
                    "    checkpoint_name = get_checkpoint_name(save_dir, train_state.step, release=True)\n",
                ),
            ],
        ),
        File(
            "training/model_load_save.py",
            [
                add_parameter("save_megatron_model", "release: bool | None = None", doc=SHORT_DOC),
                pass_argument("save_megatron_model", call("save_checkpoint"), "release=bool(release)", count=2),
                # A release checkpoint is complete before its tracker names it: save_checkpoint writes the tokenizer.
                replace(
                    "save_megatron_model",
                    expression("tokenizer_config is not None"),
                    "tokenizer_config is not None and not release",
                ),
            ],
        ),
        File(
            "models/conversion/auto_bridge.py",
            [
                add_parameter(
                    "AutoBridge.save_megatron_model",
                    "release: bool | None = None",
                    doc=SHORT_DOC,
                ),
                pass_argument("AutoBridge.save_megatron_model", call("save_megatron_model"), "release=release"),
                insert_first(
                    "AutoBridge.import_ckpt",
                    "from megatron.bridge.training.release_writer import check_release_target\n"
                    "\n"
                    "check_release_target(megatron_path)\n",
                    done=call("check_release_target"),
                ),
                pass_argument("AutoBridge.import_ckpt", call("bridge.save_megatron_model"), "release=True"),
            ],
        ),
    ],
    modules=["release_checkpoint/args.py", "training/release_state.py"],
    issues=[3295, 1514, 1467, 698],
    stands_on=["release-writer"],
    problem=(
        "Megatron-LM can't fine-tune from what `AutoBridge.import_ckpt(hf_model, out)` writes. `pretrain_gpt.py "
        "--load out --use-checkpoint-args` stops at the tracker `0` (up to core 0.15) or with `KeyError: "
        "'optimizer'` (later versions), and the checkpoint has no args."
    ),
    changes=[
        "`AutoBridge.import_ckpt` writes `release/`, the tracker `release`, and Megatron-LM's args.",
        "`AutoBridge.save_megatron_model`, `save_megatron_model`, and `save_checkpoint` do the same with "
        "`release=True`. Without it they write what they wrote before.",
    ],
    unchanged=[
        "The weights, their names, and their files.",
        "`run_config.yaml` and `tokenizer/`.",
    ],
    tested=[
        "Megatron-LM's own training loop (core 0.17, 0.18, and 0.19, on the CPU) starts from the checkpoint with "
        "`--use-checkpoint-args`. The first loss is Hugging Face's on the same batch within 1e-4. An export of "
        "the import is bit for bit the source.",
        "The model config that Megatron-LM's parser builds from the args equals Bridge's, field by field, for 9 "
        "families.",
    ],
    later=[
        "Megatron Core up to 0.18 needs `common.pt`, which `common-state` adds.",
        "scripts/conversion still write iteration 0 on GPUs until `layout-options`.",
    ],
    notes=[
        "This changes the default layout of `import_ckpt`. Code that appends `/iter_0000000` to the path of an "
        "import should use the root instead. Bridge's readers accept such a path and open the release "
        "checkpoint.",
    ],
    tests={"tests/unit/bridge/test_release_args.py": "release_checkpoint/"},
    upstream_tests=[
        File(
            "tests/unit_tests/models/test_auto_bridge.py",
            [
                *(
                    pass_argument(
                        f"TestAutoBridge.{test}",
                        call("mock_bridge.save_megatron_model.assert_called_once_with"),
                        "release=True",
                        releases=releases,
                    )
                    for test, releases in {
                        "test_import_ckpt_basic": "",
                        "test_import_ckpt_with_kwargs": "",
                        "test_import_ckpt_with_low_memory_save": ">=0.7",
                    }.items()
                ),
                *(
                    pass_argument(
                        f"TestAutoBridge.{test}",
                        call("mock_save_megatron_model.assert_called_once_with"),
                        "release=None",
                    )
                    for test in ("test_save_megatron_model_basic", "test_save_megatron_model_with_tokenizer")
                ),
            ],
        ),
        File(
            "tests/unit_tests/training/test_model_load_save.py",
            [
                pass_argument(
                    f"TestSaveMegatronModel.{test}",
                    call("mock_save_checkpoint.assert_called_once_with"),
                    "release=False",
                )
                for test in (
                    "test_save_megatron_model",
                    "test_save_megatron_model_with_tokenizer",
                    "test_save_megatron_model_without_tokenizer",
                )
            ],
        ),
        File(
            "tests/functional_tests/test_groups/models/gemma_vl/test_gemma4_vl_conversion.py",
            [
                replace(
                    "TestGemma4DenseVLConversion.test_gemma4_dense_vl_autoconfig_roundtrip",
                    expression('"iter_0000000"'),
                    '"release"',
                    releases=">=0.7",
                )
            ],
        ),
    ],
    docs=[
        insert_before_heading("docs/bridge-guide.md", "### Megatron → HF export (one call)", GUIDE),
    ],
)
