# SPDX-License-Identifier: Apache-2.0
"""Release checkpoints: what the pull request has beside the change."""

import libcst.matchers as m

from fork.edits import File, call, expression, pass_argument, replace, wrap
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

GUIDE = """\
### Release checkpoints

`AutoBridge.import_ckpt` writes a *release checkpoint*, which Megatron Bridge and Megatron-LM both start from. (The
conversion scripts write `iter_0000000`.)

```
megatron_checkpoints/llama32_1b/
├── latest_checkpointed_iteration.txt    # the word "release", written last
└── release/
    ├── .metadata, *.distcp              # weights, and Megatron-LM's args; no optimizer, no random state
    ├── run_config.yaml
    └── tokenizer/
```

It prints the command line for Megatron-LM, which takes the architecture from the args in the checkpoint:

```
--load ./megatron_checkpoints/llama32_1b --use-checkpoint-args --norm-epsilon 1e-05
```

What needs a path takes the root or `release/` itself. An import that is stopped leaves what was there before; a target
that holds training iterations is refused. `AutoBridge.import_ckpt(..., release=False)` writes `iter_0000000`, which
Megatron-LM can't start fine-tuning from. `AutoBridge.save_megatron_model(..., release=True)` writes a release checkpoint
from a model in memory.

"""

pull_request = PullRequest(
    change="release-checkpoints",
    changelog=[
        "`AutoBridge.import_ckpt(release=True)`, the default, writes `release/`, the tracker `release` and Megatron-LM's "
        "args; `release=False` writes what it wrote before.",
        "`AutoBridge.save_megatron_model`, `save_megatron_model` and `save_checkpoint` take `release=False`.",
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
        "scripts/conversion passes `release=False` on the CPU, as its GPU backend does by `save_megatron_model`: some hundred "
        "scripts and pages of examples/, docs/ and skills/ name `iter_0000000` after it. Turning it, and those, is two "
        "arguments and a commit of its own.",
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
            [
                wrap(
                    "test_import_preserves_model_id_and_forwards_revision",
                    m.Dict(elements=[m.DictElement(key=m.SimpleString(value='"hf_model_id"')), m.ZeroOrMore()]),
                    '{} | {"release": False}',
                    releases=">=0.6",
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
    others=[
        # What looks for the run config of an import.
        File(
            "scripts/conversion/gpu_backend.py",
            [
                replace(
                    "_maybe_restore_pipeline_layout",
                    expression('checkpoint_path.glob("iter_*")'),
                    '(*checkpoint_path.glob("iter_*"), checkpoint_path / "release")',
                    releases=">=0.6",
                )
            ],
        ),
        File(
            "examples/conversion/hf_to_megatron_generate_text.py",
            [
                replace(
                    "main",
                    expression('[ckpt_path, *ckpt_path.glob("iter_*")]'),
                    '[ckpt_path, *ckpt_path.glob("iter_*"), ckpt_path / "release"]',
                    releases=">=0.6",
                )
            ],
        ),
        File(
            "scripts/conversion/cpu_backend.py",
            [pass_argument("import_checkpoint", call("AutoBridge.import_ckpt"), "release=False", releases=">=0.6")],
        ),
    ],
    docs=[
        insert_before_heading("docs/bridge-guide.md", "### Megatron → HF export (one call)", GUIDE),
        TextEdit(
            "docs/bridge-guide.md",
            "add release to the signature of AutoBridge.import_ckpt",
            r"^(AutoBridge\.import_ckpt\([^)\n]*), \*\*kwargs\)",
            r"\1, *, release: bool = True, **kwargs)",
            done="release: bool = True, **kwargs)",
        ),
    ],
)
