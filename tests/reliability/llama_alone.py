# SPDX-License-Identifier: Apache-2.0
"""Imports of Bridge what converts Llama, as `megatron-bridge import` does, in a process that does nothing but fork.

To be imported before anything of Bridge: what is left out then makes the forks smaller, too.
"""

import json
import os
import tempfile
from pathlib import Path


# Before torch is imported: pools of threads don't survive a fork.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

from megatron.bridge.cli.lean_import import auto_bridge_for


with tempfile.TemporaryDirectory() as folder:
    Path(folder, "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    auto_bridge_for(folder)
