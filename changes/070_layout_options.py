# SPDX-License-Identifier: Apache-2.0
"""Choices for callers that expect an import at `iter_0000000`: a link of that name, and the layout from the environment."""

import libcst.matchers as m

from fork.change import Change, TextEdit, insert_before_heading
from fork.edits import (
    Edit,
    File,
    add_import,
    add_parameter,
    assign,
    call,
    expression,
    imports,
    insert_after,
    insert_before,
    insert_first,
    pass_argument,
    replace,
)


LINK_DOC = (
    "If True, leaves a symbolic link `iter_0000000` to the release checkpoint, for scripts that look for this folder."
)
ITERATION_NAME = m.Assign(
    value=m.Call(
        func=m.Name("get_checkpoint_name"),
        args=[m.ZeroOrMore(), m.Arg(keyword=m.Name("release"), value=m.Name("False"))],
    )
)
SCRIPTS = ">=0.6"
LAYOUT = "from megatron.bridge.release_checkpoint.layout import"
# Tests of the conversion scripts put modules of their own in the place of Bridge's.
FAKE_BRIDGE = 'modules["megatron.bridge"].AutoBridge'
FAKE_LAYOUT = """\
layout = types.ModuleType("megatron.bridge.release_checkpoint.layout")
layout.release_for = str
modules["megatron.bridge.release_checkpoint"] = types.ModuleType("megatron.bridge.release_checkpoint")
modules[layout.__name__] = layout
"""
FAKE_OPTIONS = """\
options = types.ModuleType("megatron.bridge.training.release_options")
options.release_wanted = lambda release, default: default
modules["megatron.bridge.training"] = types.ModuleType("megatron.bridge.training")
modules[options.__name__] = options
"""
RESOLVE = [
    add_import(f"{LAYOUT} release_for", releases=SCRIPTS),
    insert_first("export_checkpoint", "megatron_path = release_for(megatron_path)\n", releases=SCRIPTS),
]
GUIDE = """\
### Scripts that expect `iter_0000000`

For scripts that look for the folder `iter_0000000` themselves, `AutoBridge.import_ckpt(..., link_iter_0=True)` leaves a
symbolic link of that name. For those that read the tracker as a number, `release=False`, or
`MEGATRON_BRIDGE_CHECKPOINT_LAYOUT=iter` in the environment, writes the folder itself, from which Megatron-LM can't start
fine-tuning.

"""


def passing_link(scope: str, function: str, count: int = 1) -> list[Edit]:
    """Adds the parameter `link_iter_0` to `scope`, and passes it on to `function`."""
    return [
        add_parameter(scope, "link_iter_0: bool = False", doc=LINK_DOC, keyword_only=scope.endswith("import_ckpt")),
        pass_argument(scope, call(function), "link_iter_0=link_iter_0", count=count),
    ]


change = Change(
    name="layout-options",
    message="""\
feat(ckpt): let callers choose the layout of an import

Scripts name `iter_0000000`, where imports lay before release checkpoints.

`link_iter_0=True` leaves a symbolic link of that name, and
`MEGATRON_BRIDGE_CHECKPOINT_LAYOUT=iter` gives the old layout to scripts that
nobody can edit.
""",
    why="A link iter_0000000, or the old layout, for scripts that expect an import there.",
    edits=[
        File(
            "training/checkpointing.py",
            [
                add_import("from megatron.bridge.training import release_options"),
                add_import("from megatron.bridge.training.release_writer import on_rank_0"),
                add_parameter("save_checkpoint", "link_iter_0: bool = False", doc=LINK_DOC),
                insert_after(
                    "save_checkpoint",
                    ITERATION_NAME,
                    "if writer is None:\n"
                    "    release_options.remove_link(checkpoint_name)\n"
                    "elif link_iter_0:\n"
                    "    on_rank_0(release_options.check_link, save_dir)",
                ),
                pass_argument(
                    "save_checkpoint._post_save_global_barrier",
                    call("writer.publish"),
                    "before_tracker=lambda root: release_options.set_link(root, link_iter_0)",
                ),
            ],
        ),
        File(
            "training/model_load_save.py",
            [
                add_import("from megatron.bridge.training.release_options import release_wanted"),
                *passing_link("save_megatron_model", "save_checkpoint", count=2),
                insert_first(
                    "save_megatron_model",
                    "release = release_wanted(release, False, link_iter_0, ckpt_format=ckpt_format)",
                ),
            ],
        ),
        File(
            "models/conversion/auto_bridge.py",
            [
                *passing_link("AutoBridge.save_megatron_model", "save_megatron_model"),
                add_parameter(
                    "AutoBridge.import_ckpt",
                    "release: bool | None = None",
                    keyword_only=True,
                    doc="If False, saves iteration 0 without args, which Megatron-LM can't fine-tune from. By default the "
                    "environment variable `MEGATRON_BRIDGE_CHECKPOINT_LAYOUT` decides (`release` or `iter`), and without it a "
                    "release checkpoint is saved.",
                ),
                pass_argument("AutoBridge.import_ckpt", call("bridge.save_megatron_model"), "release=release"),
                *passing_link("AutoBridge.import_ckpt", "bridge.save_megatron_model"),
                insert_before(
                    "AutoBridge.import_ckpt",
                    imports("megatron.bridge.training.release_writer"),
                    "from megatron.bridge.training.release_options import check_link, release_wanted\n",
                ),
                insert_before(
                    "AutoBridge.import_ckpt",
                    call("check_release_target"),
                    "release = release_wanted(release, default=True, link_iter_0=link_iter_0)",
                ),
                insert_after(
                    "AutoBridge.import_ckpt",
                    call("check_release_target"),
                    "if link_iter_0:\n    check_link(megatron_path)\n",
                ),
            ],
        ),
    ],
    modules=["training/release_options.py"],
    stands_on=["release-checkpoints", "object-stores"],
    problem=(
        "Some scripts append `/iter_0000000` to the path of an import, or read its tracker as a number. Since "
        "`import_ckpt` writes a release checkpoint, a script that opens `OUT/iter_0000000` itself fails, and its "
        "user may not be able to edit it."
    ),
    changes=[
        "`import_ckpt(release=False)` writes iteration 0 as before.",
        "With `link_iter_0=True`, `import_ckpt`, `save_megatron_model`, and `save_checkpoint` leave a link "
        "`iter_0000000`.",
        "If the caller doesn't choose, `MEGATRON_BRIDGE_CHECKPOINT_LAYOUT` (`release` or `iter`) does.",
        "scripts/conversion write a release checkpoint on GPUs, too, and export one on CPUs and GPUs.",
        "examples/conversion/hf_to_megatron_generate_text.py takes the root of a release checkpoint.",
    ],
    unchanged=[
        "What is written without the option and the variable.",
    ],
    tested=[
        "Unit tests. On the CPU, Megatron-LM starts, saves and resumes in a root with the link, as it does without."
    ],
    tests={"tests/unit/bridge/test_release_options.py": "training/"},
    upstream_tests=[
        File(
            "tests/unit_tests/models/test_auto_bridge.py",
            [
                *(
                    pass_argument(
                        f"TestAutoBridge.{test}",
                        call("mock_bridge.save_megatron_model.assert_called_once_with"),
                        "link_iter_0=False",
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
                        "link_iter_0=False",
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
                    "link_iter_0=False",
                )
                for test in (
                    "test_save_megatron_model",
                    "test_save_megatron_model_with_tokenizer",
                    "test_save_megatron_model_without_tokenizer",
                )
            ],
        ),
        File(
            "tests/unit_tests/conversion/launcher/test_cpu_backend.py",
            [insert_before("_load_cpu_backend", assign(FAKE_BRIDGE), FAKE_LAYOUT, releases=SCRIPTS)],
        ),
        File(
            "tests/unit_tests/conversion/launcher/test_gpu_backend.py",
            [
                insert_before(
                    "_fake_megatron_modules", assign(FAKE_BRIDGE), FAKE_LAYOUT + FAKE_OPTIONS, releases=SCRIPTS
                ),
                insert_before(
                    "TestImportHfToMegatron.test_import_saves_megatron_checkpoint_with_tokenizer_metadata",
                    assign("from_hf_call"),
                    'assert save_call[2]["release"] is True\n',
                    releases=SCRIPTS,
                ),
            ],
        ),
    ],
    others=[
        File(
            "examples/conversion/hf_to_megatron_generate_text.py",
            [
                add_import(f"{LAYOUT} resolve_checkpoint", releases=SCRIPTS),
                replace(
                    "main",
                    expression("Path(args.megatron_model_path)"),
                    "Path(resolve_checkpoint(args.megatron_model_path))",
                    releases=SCRIPTS,
                ),
            ],
        ),
        File("scripts/conversion/cpu_backend.py", RESOLVE),
        File(
            "scripts/conversion/gpu_backend.py",
            [
                *RESOLVE,
                replace(
                    "_maybe_restore_pipeline_layout",
                    expression('checkpoint_path.glob("iter_*")'),
                    '(*checkpoint_path.glob("iter_*"), checkpoint_path / "release")',
                    releases=SCRIPTS,
                ),
                add_import("from megatron.bridge.training.release_options import release_wanted", releases=SCRIPTS),
                pass_argument(
                    "import_checkpoint",
                    call("bridge.save_megatron_model"),
                    "release=release_wanted(None, default=True)",
                    releases=SCRIPTS,
                ),
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
