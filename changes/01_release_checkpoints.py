# SPDX-License-Identifier: Apache-2.0
"""Release checkpoints: `import_ckpt` writes one, and every reader in Bridge finds its payload."""

import libcst.matchers as m

from fork.change import Change, TextEdit, insert_before_heading
from fork.edits import (
    Edit,
    File,
    add_import,
    add_parameter,
    assign,
    call,
    define,
    expression,
    ifs,
    insert_after,
    insert_before,
    insert_first,
    pass_argument,
    replace,
    wrap,
)


SAVE_DOC = (
    "If True, saves a release checkpoint, which Megatron-LM starts fine-tuning from: weights and Megatron-LM args, "
    "without training state, in `release/`, with the tracker `release`."
)
LINK_DOC = (
    "If True, leaves a symbolic link `iter_0000000` to the release checkpoint, for scripts that look for this folder."
)
DECIDED_DOC = (
    f"{SAVE_DOC} If False, saves iteration 0 without training state, which Megatron-LM can't fine-tune from. By default "
    "the environment variable `MEGATRON_BRIDGE_CHECKPOINT_LAYOUT` decides (`release` or `iter`), and without it "
)
IMPORT_RESOLVER = "from megatron.bridge.training.release_checkpoint import resolve_checkpoint\n"
# `latest_train_state.pt` of a root; without a prefix the function names the file of one iteration.
ROOT_TRAIN_STATE = m.Call(
    func=m.Name("get_checkpoint_train_state_filename"),
    args=[m.Arg(value=m.Name("load_dir")), m.Arg(keyword=m.Name("prefix"))],
)

# What upstream has only since a release.
EXPORT_ADAPTER = WAN = ">=0.4"
FROM_AUTO_CONFIG = MIMO = ">=0.5"


def saving_parameters(function: str) -> list[Edit]:
    """Adds to a function that saves a model without training state what decides the form of the checkpoint."""
    return [
        add_parameter(function, "release: bool | None = None", doc=f"{DECIDED_DOC}iteration 0 is saved."),
        add_parameter(function, "link_iter_0: bool = False", doc=LINK_DOC),
    ]


SAVING = [
    add_import("from megatron.bridge.training import iteration_0, release_checkpoint"),
    add_parameter("save_checkpoint", "release: bool = False", doc=SAVE_DOC),
    add_parameter("save_checkpoint", "link_iter_0: bool = False", doc=LINK_DOC),
    insert_after(
        "save_checkpoint",
        assign("checkpoint_name"),
        "if release:\n"
        "    checkpoint_name = release_checkpoint.stage_release(save_dir, link_iter_0)\n"
        "else:\n"
        "    iteration_0.remove_link(checkpoint_name)",
    ),
    insert_after(
        "save_checkpoint",
        ifs("prebuilt_state_dict is not None"),
        "if release:\n    state_dict = release_checkpoint.prepare_release_state_dict(state_dict, cfg)",
    ),
    insert_before(
        "save_checkpoint.train_state_finalize_fn",
        assign('train_state_dict["floating_point_operations_so_far"]'),
        "if release:\n    release_checkpoint.finalize_release(save_dir, cfg)\n    return",
    ),
    insert_before(
        "save_checkpoint",
        define("wandb_finalize_fn"),
        "if release:\n    checkpoint_name = get_checkpoint_name(save_dir, train_state.step, release=True)\n",
    ),
]

LOADING = [
    insert_first("_load_checkpoint_from_path", "load_dir = iteration_0.release_for(load_dir)"),
    # Megatron-LM of core 0.16 and later takes a tracker that says 0.
    replace("read_metadata", expression("iteration > 0"), "iteration >= 0"),
    *(
        replace(function, ROOT_TRAIN_STATE, "release_checkpoint.train_state_tracker(load_dir)", releases=releases)
        for function, releases in {
            "_resolve_checkpoint_iteration": "",
            # From 0.7 on it reads the train state of the iteration itself.
            "_load_checkpoint_from_path": "<0.7",
            "_load_base_checkpoint": "",
        }.items()
    ),
    # Adapters that are to be saved next to their release: there are none to resume from yet.
    insert_before(
        "_load_checkpoint_from_path",
        ifs('is_peft_resume and "sharded_state_dict" in load_kwargs'),
        'if is_peft_resume and ckpt_format == "torch_dist" and release:\n'
        '    print_rank_0(f" {load_dir} holds a release and no adapters: starting with fresh ones")\n'
        "    return 0, 0\n",
    ),
]

ADAPTERS = [
    add_import("from megatron.bridge.training import release_checkpoint"),
    insert_before(
        "_create_peft_pre_wrap_hook.peft_pre_wrap_hook",
        assign("cfg.checkpoint.finetune"),
        "# What is loaded after this tells adapters from base weights by their paths.\n"
        "cfg.checkpoint.pretrained_checkpoint = release_checkpoint.base_of_adapters(\n"
        "    cfg.checkpoint.pretrained_checkpoint\n"
        ")",
    ),
]

CONVERSION = [
    *saving_parameters("AutoBridge.save_megatron_model"),
    pass_argument("AutoBridge.save_megatron_model", call("save_megatron_model"), "release=release"),
    pass_argument("AutoBridge.save_megatron_model", call("save_megatron_model"), "link_iter_0=link_iter_0"),
    wrap(
        "AutoBridge.save_megatron_model",
        m.Expr(value=m.Call(func=m.Name("save_megatron_model"))),
        "from megatron.bridge.training.release_checkpoint import discarded_on_error\n"
        "\n"
        "with discarded_on_error(path):\n    {}",
    ),
    insert_first("AutoBridge.load_megatron_model", IMPORT_RESOLVER),
    replace("AutoBridge.load_megatron_model", expression("Path(path)"), "Path(resolve_checkpoint(path))"),
    insert_before(
        "AutoBridge.load_megatron_model",
        assign("skip_temp_dist_context"),
        "from megatron.bridge.training.mlm_compat.load_model import lacks_run_config, load_with_hf_config\n"
        "\n"
        "if lacks_run_config(checkpoint_path):\n"
        "    return load_with_hf_config(self, checkpoint_path, mp_overrides)\n",
    ),
    add_parameter(
        "AutoBridge.import_ckpt",
        "release: bool | None = None",
        keyword_only=True,
        doc=f"{DECIDED_DOC}a release checkpoint is saved.",
    ),
    add_parameter("AutoBridge.import_ckpt", "link_iter_0: bool = False", keyword_only=True, doc=LINK_DOC),
    insert_first(
        "AutoBridge.import_ckpt",
        "from megatron.bridge.models.conversion.hf_checkpoint import check_hf_checkpoint, has_tokenizer\n"
        "from megatron.bridge.training.iteration_0 import release_wanted\n"
        "from megatron.bridge.training.release_checkpoint import check_release_target\n"
        "\n"
        "release = release_wanted(release, default=True, link_iter_0=link_iter_0)\n"
        "check_release_target(megatron_path, link_iter_0)\n"
        'check_hf_checkpoint(hf_model_id, kwargs.get("trust_remote_code"))\n',
    ),
    pass_argument("AutoBridge.import_ckpt", call("bridge.save_megatron_model"), "release=release"),
    pass_argument("AutoBridge.import_ckpt", call("bridge.save_megatron_model"), "link_iter_0=link_iter_0"),
    pass_argument(
        "AutoBridge.import_ckpt",
        call("bridge.save_megatron_model"),
        "hf_tokenizer_path=hf_model_id if has_tokenizer(hf_model_id) else None",
    ),
    insert_before(
        "AutoBridge.from_auto_config",
        ifs("not checkpoint_path.exists()"),
        "checkpoint_path = Path(run_config_folder(resolve_checkpoint(checkpoint_path)))\n",
        releases=FROM_AUTO_CONFIG,
    ),
    insert_first(
        "AutoBridge.from_auto_config",
        "from megatron.bridge.training.release_checkpoint import resolve_checkpoint, run_config_folder\n",
        releases=FROM_AUTO_CONFIG,
    ),
    insert_first("AutoBridge.export_adapter_ckpt", IMPORT_RESOLVER, releases=EXPORT_ADAPTER),
    insert_after(
        "AutoBridge.export_adapter_ckpt",
        ifs("not ckpt_path.exists()"),
        "ckpt_path = Path(resolve_checkpoint(ckpt_path))",
        releases=EXPORT_ADAPTER,
    ),
]

MODEL_LOAD_SAVE = [
    add_import("from megatron.bridge.training.release_checkpoint import resolve_checkpoint, run_config_folder"),
    *(
        insert_first(function, "checkpoint_path = resolve_checkpoint(checkpoint_path)")
        for function in ("load_tokenizer", "load_model_config", "build_and_load_model", "load_megatron_model")
    ),
    *(
        replace(
            function,
            m.Call(func=m.Name("get_checkpoint_run_config_filename")),
            "get_checkpoint_run_config_filename(run_config_folder(checkpoint_path))",
        )
        for function in ("load_tokenizer", "load_model_config")
    ),
    *saving_parameters("save_megatron_model"),
    add_import("from megatron.bridge.training.iteration_0 import release_wanted"),
    insert_first(
        "save_megatron_model", "release = release_wanted(release, False, link_iter_0, ckpt_format=ckpt_format)"
    ),
    pass_argument("save_megatron_model", call("save_checkpoint"), "release=release", count=2),
    pass_argument("save_megatron_model", call("save_checkpoint"), "link_iter_0=link_iter_0", count=2),
    # A release checkpoint is complete before its tracker names it: save_checkpoint writes the tokenizer itself.
    replace(
        "save_megatron_model",
        expression("tokenizer_config is not None"),
        "tokenizer_config is not None and not release",
    ),
]

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


change = Change(
    name="release-checkpoints",
    message="""\
fix(ckpt)!: write release checkpoints that Megatron-LM fine-tunes from

`AutoBridge.import_ckpt` wrote `iter_0000000/` with the tracker `0` and no
Megatron-LM args. Megatron-LM could not start from that: up to core 0.15 it
refuses the tracker, later versions look for optimizer state, and none can
use `--use-checkpoint-args`.

Write `release/` with the tracker `release` and complete args by default.
The payload is staged and renamed into place and the tracker is written
last, so that an interrupted import leaves nothing half-written. Every
reader of a checkpoint root finds the payload through one function.
""",
    why=(
        "import_ckpt writes a release checkpoint (release/, tracker, Megatron-LM args) that Megatron-LM starts from, "
        "save_megatron_model and save_checkpoint can, and all readers resolve a checkpoint root the same way."
    ),
    edits=[
        File("training/checkpointing.py", [*SAVING, *LOADING]),
        File("training/setup.py", ADAPTERS),
        File(
            "training/config.py",
            [
                insert_first(
                    "CheckpointConfig.finalize",
                    "from megatron.bridge.training.iteration_0 import release_for\n"
                    "\n"
                    "self.load, self.pretrained_checkpoint = release_for(self.load), release_for(self.pretrained_checkpoint)",
                )
            ],
        ),
        File("training/model_load_save.py", MODEL_LOAD_SAVE),
        File("models/conversion/auto_bridge.py", CONVERSION),
        File(
            "models/hf_pretrained/state.py",
            [
                add_import(
                    "from megatron.bridge.models.conversion.hf_checkpoint import is_finite, warn_of_non_finite"
                ),
                insert_before(
                    "SafeTensorsStateSource.load_tensors",
                    m.Return(value=m.Name("loaded_tensors")),
                    "warn_of_non_finite(name for name, tensor in loaded_tensors.items() if not is_finite(tensor))",
                ),
            ],
        ),
        File(
            "training/utils/checkpoint_utils.py",
            [
                # Upstream has it from 0.4 on.
                insert_before(
                    "",
                    define("checkpoint_exists"),
                    "def is_checkpoint_iteration_directory(path: Optional[str]) -> bool:\n"
                    '    """Tells the folder of a payload from a checkpoint root."""\n'
                    '    markers = (CONFIG_FILE, TRAIN_STATE_FILE, "metadata.json", ".metadata")\n'
                    "    return path is not None and any(file_exists(os.path.join(path, name)) for name in markers)\n"
                    "\n",
                    releases="<0.4",
                ),
                insert_first(
                    "checkpoint_exists",
                    "from megatron.bridge.training.iteration_0 import release_for\n"
                    "\n"
                    "checkpoints_path = release_for(checkpoints_path)",
                ),
                insert_first(
                    "get_hf_model_id_from_checkpoint",
                    "# That module imports this one.\n"
                    "from megatron.bridge.training.release_checkpoint import resolve_checkpoint, run_config_folder\n"
                    "\n"
                    "path = run_config_folder(resolve_checkpoint(path))\n",
                ),
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
    modules=[
        "training/release_checkpoint.py",
        "training/iteration_0.py",
        "training/mlm_compat/checkpoint_args.py",
        "training/mlm_compat/load_model.py",
        "models/conversion/hf_checkpoint.py",
        "models/conversion/safetensors_header.py",
        "../bridge_cli/durable_files.py",
        "../bridge_cli/launch_flags.py",
    ],
    changes=[
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
        "tests/unit/bridge/test_release_checkpoint.py": "training/test_release_checkpoint.py",
        "tests/unit/bridge/test_iteration_0.py": "training/test_iteration_0.py",
        "tests/unit/bridge/test_release_layout.py": "training/test_release_layout.py",
        "tests/unit/bridge/test_release_ranks.py": "training/test_release_ranks.py",
        "tests/unit/bridge/test_bridge_training.py": "training/test_bridge_training.py",
        "tests/unit/bridge/test_checkpoint_args.py": "training/mlm_compat/test_checkpoint_args.py",
        "tests/unit/bridge/test_hf_checkpoint.py": "models/test_hf_checkpoint.py",
        "tests/unit/bridge/test_safetensors_header.py": "models/test_safetensors_header.py",
    },
    functional={"changes/tests/functional/test_release_checkpoint.py": "ckpts/release/test_release_checkpoint.py"},
    upstream_tests=[
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
