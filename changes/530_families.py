# SPDX-License-Identifier: Apache-2.0
"""AutoBridge finds the module of an architecture in a table."""

from fork.change import Change
from fork.edits import File, add_import, call, define, ifs, insert_after, insert_before, insert_first


CONFIGS = "families.import_configs()"
READING = ("from_hf_pretrained", "can_handle", "import_ckpt")
REGISTRY = 'hasattr(model_bridge.get_model_bridge, "_exact_types")'

change = Change(
    name="families",
    message="""\
feat(model): find the bridge of an architecture by its name

AutoBridge knew the families whose modules somebody had imported, and so
`megatron.bridge` imported all of them.

Find the module of an architecture in a table, and import it when the
architecture is asked for. A test fails when a family is not in the table.
Such a family is found all the same, by importing all of them.
""",
    why="AutoBridge can import the bridge of the model that it converts, and no other.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                add_import("from megatron.bridge.models.conversion import families"),
                insert_after("", define("AutoBridge"), "families.register_configs()"),
                *(insert_first(f"AutoBridge.{each}", CONFIGS) for each in READING),
                insert_first("AutoBridge.from_auto_config", CONFIGS, releases=">=0.5"),
                insert_before("AutoBridge.list_supported_models", ifs(REGISTRY), "families.import_all()"),
                insert_before("AutoBridge._validate_config", ifs(REGISTRY), "families.import_family(arch_key)"),
                insert_before(
                    "AutoBridge._model_bridge",
                    call("model_bridge.get_model_bridge"),
                    "families.import_family(self._causal_lm_architecture)",
                ),
            ],
        ),
    ],
    modules=["models/conversion/families.py"],
    problem="""\
A bridge is registered when its module is imported, and AutoBridge looks among what is registered. So every family is
imported for the conversion of one model: `python -c "from megatron.bridge import AutoBridge"` loads some sixty bridges.
This change lets AutoBridge import a family by name. The packages are made lazy in changes that follow.
""",
    changes=["AutoBridge imports the module of an architecture that is not registered."],
    unchanged=["`AutoBridge.list_supported_models()`.", "A bridge of the user's own replaces Bridge's."],
    tested=["Each module of the table registers its architecture, and no architecture is missing in the table."],
    tests={"tests/unit/bridge/test_families.py": "models/"},
)
