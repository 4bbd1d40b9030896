# SPDX-License-Identifier: Apache-2.0
"""Release checkpoints: what the pull request has beside the change."""

from fork.edits import (
    File,
    add_import,
    assign,
    call,
    expression,
    insert_before,
    insert_first,
    pass_argument,
    replace,
)
from fork.pull_request import PullRequest, TextEdit, insert_before_heading


IMPORT_TESTS = {
    "test_import_ckpt_basic": "",
    "test_import_ckpt_with_kwargs": "",
    "test_import_ckpt_with_low_memory_save": ">=0.7",
}
# These name a folder that is not there; import_ckpt refuses it now before it asks the mock. A model id will do.
LOCAL_MODEL = {
    "test_import_ckpt_with_kwargs": ("", 3),
    "test_import_ckpt_preserves_existing_distributed_context": (">=0.7", 1),
    "test_import_ckpt_scopes_standalone_cpu_state_to_gloo_context": (">=0.7", 1),
}

# What the conversion scripts take from Bridge. Their tests put modules of their own in the place of Bridge's.
ITERATION_0 = "from megatron.bridge.training.iteration_0 import release_for"
RESOLVE = "megatron_path = release_for(megatron_path)\n"
FAKE_BRIDGE = 'modules["megatron.bridge"].AutoBridge'
FAKE_ITERATION_0 = """\
modules["megatron.bridge.training"] = types.ModuleType("megatron.bridge.training")
iteration_0 = types.ModuleType("megatron.bridge.training.iteration_0")
iteration_0.release_for = str
iteration_0.release_wanted = lambda release, default: default
modules[iteration_0.__name__] = iteration_0
"""

GUIDE = """\
### Release checkpoints

`AutoBridge.import_ckpt` and `scripts/conversion` write a *release checkpoint*, which Megatron Bridge and Megatron-LM both
start from.

```
megatron_checkpoints/llama32_1b/
├── latest_checkpointed_iteration.txt    # the word "release", written last
└── release/
    ├── .metadata, *.distcp, common.pt   # weights, and Megatron-LM's args; no optimizer, no random state
    ├── run_config.yaml
    └── tokenizer/
```

It prints the command line for Megatron-LM, which takes the architecture from the args in the checkpoint:

```
--load ./megatron_checkpoints/llama32_1b --use-checkpoint-args --norm-epsilon 1e-05
```

What needs a path takes the root or `release/` itself; a path that ends in `iter_0000000`, where imports lay before, is taken
for the release, with a warning. An import that is stopped leaves what was there before; a target that holds training
iterations is refused. `AutoBridge.save_megatron_model(..., release=True)` writes a release checkpoint from a model in memory.

For scripts that look for the folder `iter_0000000` themselves, `AutoBridge.import_ckpt(..., link_iter_0=True)` leaves a
symbolic link of that name. For those that read the tracker as a number, `release=False`, or
`MEGATRON_BRIDGE_CHECKPOINT_LAYOUT=iter` in the environment, writes the folder itself; Megatron-LM can't start fine-tuning from
that.

"""

pull_request = PullRequest(
    change="release-checkpoints",
    changelog=[
        "`AutoBridge.import_ckpt` and scripts/conversion write `release/`, the tracker `release` and Megatron-LM's args; "
        "`release=False` and `MEGATRON_BRIDGE_CHECKPOINT_LAYOUT=iter` write what they wrote before, `link_iter_0=True` leaves "
        "a link `iter_0000000`.",
        "`AutoBridge.save_megatron_model`, `save_megatron_model` and `save_checkpoint` take `release` and `link_iter_0`; "
        "without them they write what they wrote before.",
        "A path `iter_0000000` that is not there stands for the release beside it.",
        "Every reader of a checkpoint root (`load_megatron_model`, `export_ckpt`, `load_checkpoint`, tokenizer, model "
        "config, ModelOpt state) resolves it through `release_checkpoint.resolve_checkpoint`.",
        "`import_ckpt` refuses a damaged Hugging Face checkpoint before it converts, and prints the flags for Megatron-LM.",
    ],
    tested=[
        "Megatron-LM's own training loop (core 0.17, 0.18 and 0.19, on the CPU) starts from the checkpoint with "
        "`--use-checkpoint-args`; the first loss is Hugging Face's on the same batch within 1e-4; what was imported is "
        "exported bit for bit.",
        "The model config that Megatron-LM's parser builds from the args equals Bridge's, field by field, for 9 families.",
        "Unit tests on the CPU, with the change `conversion-without-cuda` on top; without it Bridge needs a GPU to import.",
    ],
    notes=[
        "The layout that `import_ckpt` writes by default is another: code that appends `/iter_0000000` to the path of an "
        "import should name the root, or pass `release=False`.",
        "scripts/conversion writes a release on the CPU and on GPUs. Commands in examples/, docs/ and skills/ that export "
        "from, train from or load `iter_0000000` of an import work all the same, by the release beside it and with a "
        "warning. Scripts that look for the folder themselves do not; the commit `import-paths` renames it in all of them.",
        "Loading the weights takes a pass more over each tensor, for NaN and infinity; it is small beside the reading.",
    ],
    stands_on=["untrusted-checkpoints"],
    tests={
        "bridge/test_release_checkpoint.py": "training/test_release_checkpoint.py",
        "bridge/test_iteration_0.py": "training/test_iteration_0.py",
        "bridge/test_release_layout.py": "training/test_release_layout.py",
        "bridge/test_release_ranks.py": "training/test_release_ranks.py",
        "bridge/test_bridge_training.py": "training/test_bridge_training.py",
        "bridge/test_checkpoint_args.py": "training/mlm_compat/test_checkpoint_args.py",
        "bridge/test_hf_checkpoint.py": "models/test_hf_checkpoint.py",
    },
    functional={"functional/test_release_checkpoint.py": "ckpts/release/test_release_checkpoint.py"},
    expectations=[
        File(
            "tests/unit_tests/models/test_auto_bridge.py",
            [
                *(
                    pass_argument(
                        f"TestAutoBridge.{test}",
                        call("mock_bridge.save_megatron_model.assert_called_once_with"),
                        argument,
                        releases=releases,
                    )
                    for test, releases in IMPORT_TESTS.items()
                    for argument in ("release=True", "link_iter_0=False")
                ),
                *(
                    replace(
                        f"TestAutoBridge.{test}",
                        expression('"./local_model"'),
                        '"some/model"',
                        count=count,
                        releases=releases,
                    )
                    for test, (releases, count) in LOCAL_MODEL.items()
                ),
                *(
                    pass_argument(
                        f"TestAutoBridge.{test}",
                        call("mock_save_megatron_model.assert_called_once_with"),
                        argument,
                    )
                    for test in ("test_save_megatron_model_basic", "test_save_megatron_model_with_tokenizer")
                    for argument in ("release=None", "link_iter_0=False")
                ),
            ],
        ),
        File(
            "tests/unit_tests/training/test_model_load_save.py",
            [
                pass_argument(
                    f"TestSaveMegatronModel.{test}",
                    call("mock_save_checkpoint.assert_called_once_with"),
                    argument,
                )
                for test in (
                    "test_save_megatron_model",
                    "test_save_megatron_model_with_tokenizer",
                    "test_save_megatron_model_without_tokenizer",
                )
                for argument in ("release=False", "link_iter_0=False")
            ],
        ),
        File(
            "tests/unit_tests/conversion/launcher/test_cpu_backend.py",
            [insert_before("_load_cpu_backend", assign(FAKE_BRIDGE), FAKE_ITERATION_0, releases=">=0.6")],
        ),
        File(
            "tests/unit_tests/conversion/launcher/test_gpu_backend.py",
            [
                insert_before("_fake_megatron_modules", assign(FAKE_BRIDGE), FAKE_ITERATION_0, releases=">=0.6"),
                insert_before(
                    "TestImportHfToMegatron.test_import_saves_megatron_checkpoint_with_tokenizer_metadata",
                    assign("from_hf_call"),
                    'assert save_call[2]["release"] is True\n',
                    releases=">=0.6",
                ),
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
    others=[
        File(
            "scripts/conversion/cpu_backend.py",
            [
                add_import(ITERATION_0, releases=">=0.6"),
                insert_first("export_checkpoint", RESOLVE, releases=">=0.6"),
            ],
        ),
        File(
            "scripts/conversion/gpu_backend.py",
            [
                add_import(f"{ITERATION_0}, release_wanted", releases=">=0.6"),
                pass_argument(
                    "import_checkpoint",
                    call("bridge.save_megatron_model"),
                    "release=release_wanted(None, default=True)",
                    releases=">=0.6",
                ),
                insert_first("export_checkpoint", RESOLVE, releases=">=0.6"),
                replace(
                    "_maybe_restore_pipeline_layout",
                    expression('checkpoint_path.glob("iter_*")'),
                    '(*checkpoint_path.glob("iter_*"), checkpoint_path / "release")',
                    releases=">=0.6",
                ),
            ],
        ),
        File(
            "examples/conversion/hf_to_megatron_generate_text.py",
            [
                add_import(
                    "from megatron.bridge.training.release_checkpoint import resolve_checkpoint, run_config_folder",
                    releases=">=0.6",
                ),
                replace(
                    "main",
                    expression("Path(args.megatron_model_path)"),
                    "Path(run_config_folder(resolve_checkpoint(args.megatron_model_path)))",
                    releases=">=0.6",
                ),
            ],
        ),
        # A folder of diffusers has no config.json of its own.
        File(
            "examples/models/wan/conversion/convert_checkpoints.py",
            [
                replace(
                    "import_hf_to_megatron",
                    expression("ValueError"),
                    "(FileNotFoundError, ValueError)",
                    releases=">=0.6",
                )
            ],
        ),
    ],
    docs=[
        insert_before_heading("docs/bridge-guide.md", "### Megatron → HF export (one call)", GUIDE),
        TextEdit(
            "docs/bridge-guide.md",
            "add the layout to the signature of AutoBridge.import_ckpt",
            r"^(AutoBridge\.import_ckpt\([^)\n]*), \*\*kwargs\)",
            r"\1, *, release: bool | None = None, link_iter_0: bool = False, **kwargs)",
            done="link_iter_0: bool = False, **kwargs)",
        ),
    ],
)
