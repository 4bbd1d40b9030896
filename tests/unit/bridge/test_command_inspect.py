# SPDX-License-Identifier: Apache-2.0
"""The subcommand `inspect` without a checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from megatron.bridge.cli import main


def test_a_path_without_a_checkpoint_is_a_problem(tmp_path: Path):
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "c"), "--json"])
    document = json.loads(result.stdout)
    assert result.exit_code == 1 and not document["ok"]
    assert "nothing at this path" in document["problems"][0]["what"]


def test_inspect_imports_no_torch(tmp_path: Path):
    code = "import sys\nfrom megatron.bridge.cli import main\n"
    code += "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "inspect", str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
