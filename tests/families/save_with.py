# SPDX-License-Identifier: Apache-2.0
"""Make a model of a config with the transformers of this Python, and save it: `save_with.py CONFIG_FOLDER TARGET`.

`spellings.py` runs it with the Python of an older transformers, which saves tensors under names of its own.
"""

import json
import sys
from pathlib import Path

import torch
import transformers


source, target = sys.argv[1:]
architecture = json.loads(Path(source, "config.json").read_text("utf-8"))["architectures"][0]
if not hasattr(transformers, architecture):
    sys.exit(f"transformers {transformers.__version__} has no {architecture}")
model_class = getattr(transformers, architecture)
try:
    config = model_class.config_class.from_pretrained(source)
except KeyError as kind:  # of a part of the model
    sys.exit(f"transformers {transformers.__version__} has no {kind}")
torch.manual_seed(0)
model = model_class(config)
for parameter in model.parameters():
    parameter.data.normal_(std=0.1).add_(parameter.dim() == 1)
model.to(torch.bfloat16).save_pretrained(target)
