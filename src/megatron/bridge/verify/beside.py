# SPDX-License-Identifier: Apache-2.0
"""The process that proves a twin beside the conversion: it reads a request from stdin, and writes a verdict."""

import json
import sys

from megatron.bridge.verify.proof import prove_twin


if __name__ == "__main__":
    request = json.load(sys.stdin)
    json.dump({"verdict": prove_twin(request["source"], request["trust_remote_code"]).plain()}, sys.stdout)
