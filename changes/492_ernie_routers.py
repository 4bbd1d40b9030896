# SPDX-License-Identifier: Apache-2.0
"""The routers of ERNIE 4.5 stay in float32."""

from fork.change import Change
from fork.edits import File, add_import, call, decorate, pass_argument


IMPORT = "from megatron.bridge.models.float32_router import"

change = Change(
    name="ernie-routers",
    message="""\
fix(model): keep the routers of ERNIE 4.5 in float32

ERNIE 4.5 is published in bfloat16 with router gates in float32, and the model
computes with them. An import rounded them to bfloat16, as Megatron Core
creates them.

Keep the weights of these routers in float32.
""",
    why="The router gates of ERNIE 4.5 are imported without a loss, and exported as they were.",
    edits=[
        File(
            "models/ernie/ernie_45_bridge.py",
            [
                add_import(f"{IMPORT} with_float32_routers", releases=">=0.6"),
                decorate("_ernie45_decoder_block_spec", "with_float32_routers", releases=">=0.6"),
            ],
        ),
        File(
            "models/ernie_vl/modeling_ernie45_vl/ernie_decoder_layer_spec.py",
            [
                add_import(f"{IMPORT} Float32Router", releases=">=0.6"),
                pass_argument("_get_mlp_module_spec", call("MoESubmodules"), "router=Float32Router", releases=">=0.6"),
            ],
        ),
    ],
    modules=["models/float32_router.py"],
    problem=(
        "`AutoBridge.import_ckpt` of ERNIE 4.5 rounds the router gates, which are published in float32, to bfloat16, and "
        "so changes which experts a token goes to."
    ),
    changes=["The routers of ERNIE 4.5 and ERNIE 4.5 VL have weights in float32, as those of MiniMax-M3 have."],
    unchanged=["The routers of other models."],
    tested=["Import and export of tiny models of both, bit for bit."],
    stands_on=["accelerator", "untrusted-run-config"],
    tests={"tests/unit/bridge/test_float32_router.py": "models/"},
)
