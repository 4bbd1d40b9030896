# SPDX-License-Identifier: Apache-2.0
"""AutoBridge imports Megatron Core and the classes of transformers when it converts."""

from fork.change import Change
from fork.edits import File, add_import, assign, defer_imports, replace, wrap_imports


LAZY = """
from megatron.bridge.utils.lazy_imports import lazy_imports


with lazy_imports(__name__):
    {}
"""
BLOCK = """
with lazy_imports(__name__):
    # A function that uses one of these imports it from here.
    {}
"""
# The module of 0.3 evaluates its annotations.
LAZY_HINTS = ">=0.4"
BRIDGE = "megatron.bridge.models"
HEAVY = (
    *("megatron.core", "megatron.core.process_groups_config", "megatron.training.models.base"),
    *("megatron.core.transformer.module", "megatron.core.transformer.transformer_config"),
    *(f"{BRIDGE}.conversion.model_bridge", f"{BRIDGE}.conversion.utils", f"{BRIDGE}.gpt_provider"),
    *(f"{BRIDGE}.hf_pretrained.{each}" for each in ("causal_lm", "masked_lm", "token_classification", "wrappers")),
    *(f"{BRIDGE}.model_provider", "megatron.bridge.utils.common_utils"),
)

change = Change(
    name="light-auto-bridge",
    message="""\
perf(model): import Megatron Core when AutoBridge converts

`from megatron.bridge import AutoBridge` imported Megatron Core, its training
loop, and the generation of transformers. The module now imports them when
one of its functions uses them. Every name of the module is still there.
""",
    why="`from megatron.bridge import AutoBridge` takes as long as importing torch and transformers.",
    modules=["models/hf_pretrained/wrappers.py"],
    edits=[
        # AutoBridge registers their configurations.
        *(
            File(f"models/{each}/__init__.py", [wrap_imports(LAZY, releases=">=0.5")])
            for each in ("bailing", "stepfun")
        ),
        File("models/hf_pretrained/__init__.py", [wrap_imports(LAZY, releases=LAZY_HINTS)]),
        File(
            "models/conversion/auto_bridge.py",
            [
                add_import("from megatron.bridge.utils.lazy_imports import lazy_imports", releases=LAZY_HINTS),
                replace(
                    "",
                    assign("MegatronModelT"),
                    'MegatronModelT = TypeVar("MegatronModelT", bound="MegatronModule")',
                    releases=LAZY_HINTS,
                ),
                # The tuple has the classes themselves.
                replace(
                    "",
                    assign("_PRETRAINED_WRAPPER_TYPES"),
                    "from megatron.bridge.models.hf_pretrained.wrappers import WRAPPERS as _PRETRAINED_WRAPPER_TYPES",
                    releases=">=0.6",
                ),
                defer_imports(BLOCK, f"{BRIDGE}.conversion.auto_bridge", *HEAVY, releases=LAZY_HINTS),
            ],
        ),
    ],
    problem="""\
`python -c "from megatron.bridge import AutoBridge"` imports Megatron Core, its training loop, and the generation of
transformers. A script that reads its arguments first, or only asks for the version of a checkpoint, waits for all of them.
""",
    changes=[
        "`from megatron.bridge import AutoBridge` imports torch and transformers, and Megatron Core when AutoBridge is used.",
        "The names that `auto_bridge.py` imports from Megatron Core and from Bridge's models are imported when they are "
        "used. A function of the module imports them from the module, so a test can still replace them there.",
    ],
    unchanged=[
        "Every name of `auto_bridge.py` and of `models.hf_pretrained`. `transformers.AutoConfig` knows Bailing and Step.",
        "The results of AutoBridge, and what a conversion imports.",
    ],
    tested=[
        "A process that has imported AutoBridge has imported neither Megatron Core's models nor its training loop.",
        "No function of the module reads a global that isn't there. A replaced name takes effect.",
    ],
    notes=[
        "The module of Qwen3-ASR registers its config, model, and processor with transformers, and that of Bailing its "
        "model. AutoBridge imports both before it reads a config, no longer when it is imported itself. A script that loads "
        "one of them with transformers before it uses AutoBridge has to import `megatron.bridge.models.qwen3_asr`, or "
        "`megatron.bridge.models.bailing.bailing_moe2_bridge`.",
        "`typing.get_type_hints` of a method knows a class of Megatron once its name was read from `auto_bridge.py`. Until then "
        "it raises `NameError`, as it did for `PEFT` in `save_hf_adapter`.",
    ],
    tests={"tests/unit/bridge/test_light_auto_bridge.py": "models/"},
    stands_on=["families", "lazy-models"],
)
