# SPDX-License-Identifier: Apache-2.0
"""Bridge finds the model that transformers makes of a config, or says what config.json lacks."""

import libcst.matchers as m

from fork.change import Change
from fork.edits import File, add_import, call, insert_first, replace, wrap


FROM_AUTO_MAP = m.Assign(targets=[m.AssignTarget(target=m.Name("arch_key"))], value=m.Name("arch_name"))
MODULE = "megatron.bridge.models.conversion.architectures"

change = Change(
    name="architectures",
    message="""\
fix(model): choose the bridge of the model that transformers makes

Without trust_remote_code, transformers makes a Llama by its own code, also if
auto_map names code of the checkpoint. Bridge looked for the class in
auto_map, and said that LlamaForCausalLM isn't supported. A config without
architectures was answered with a list of endings.

Choose the bridge by the class that transformers makes, and name the key that
is missing.
""",
    why="A config that transformers takes is converted as transformers takes it, or the error says what to add.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                add_import(f"from {MODULE} import check_named"),
                add_import(f"from {MODULE} import has_own_code"),
                insert_first("AutoBridge._validate_config", "check_named(config, path)\n"),
                # The error then names the class that was looked for.
                replace("AutoBridge._validate_config", FROM_AUTO_MAP, "arch_key = architecture = arch_name"),
                *(
                    wrap(
                        f"AutoBridge.{function}",
                        call("get_causal_lm_class_name_via_auto_map"),
                        "None if has_own_code(config) else {}",
                    )
                    for function in ("_causal_lm_architecture", "_validate_config")
                ),
            ],
        ),
    ],
    modules=["models/conversion/architectures.py"],
    problem=(
        "`AutoBridge.import_ckpt` of a Llama with an `auto_map` says that LlamaForCausalLM isn't supported. transformers "
        "loads it without the code that `auto_map` names."
    ),
    changes=[
        "A model type that transformers has is converted without `trust_remote_code` whatever `auto_map` names.",
        "A config.json without `architectures` is refused with the line that it lacks.",
    ],
    unchanged=["Models whose code is on the hub.", "Models whose `auto_map` names one of their `architectures`."],
    tested=["Import of a tiny Llama with an `auto_map` beside transformers' logits."],
    tests={"tests/unit/bridge/test_architectures.py": "models/"},
    stands_on=["conversion-errors"],
)
