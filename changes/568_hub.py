# SPDX-License-Identifier: Apache-2.0
"""Downloads from the hub what a conversion needs of a model."""

from fork.change import Change


change = Change(
    name="hub",
    message="""\
feat(model): download from the hub what a conversion needs

SafeTensorsStateSource takes every safetensors file of a repository, also a
second set of the weights, at its main branch, whatever revision was asked
for.

Choose the files by their index, at one commit.
""",
    why="Of a model on the hub one set of weights is downloaded, at the revision that was asked for.",
    modules=["utils/hub.py"],
    problem="`AutoBridge.from_hf_pretrained(name, revision=…)` reads the config of the revision and the weights of main.",
    changes=["Nothing yet: `torch-files` uses it."],
    unchanged=["No existing file changes."],
    tested=["Downloads over HTTP from a small hub: whole, cut off and resumed, gated, without network."],
    limit=500,
    limit_reason="Its tests ask a hub of their own, over HTTP, which the upload's tests use, too.",
    stands_on=["lazy-package"],
    tests={"tests/unit/bridge/small_hub.py": "utils/", "tests/unit/bridge/test_hub.py": "utils/"},
)
