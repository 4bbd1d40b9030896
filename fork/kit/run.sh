#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Install the kit beside this host's torch, without network. Run the visit, and write all results to one folder.
#
#   ./run.sh [ARGUMENTS OF THE VISIT]
#   ./run.sh -- COMMAND               run another command in the kit's environment
#
#   PYTHON           the Python that has torch (default: python3)
#   KIT_ENVIRONMENT  folder of the installation (default: environment, beside this script)
#   KIT_RESULTS      folder of the results (default: results/TIME, beside this script)
set -euo pipefail
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
environment=$(realpath -m "${KIT_ENVIRONMENT:-$kit/environment}")
results=$(realpath -m "${KIT_RESULTS:-$kit/results/$(date -u +%Y%m%dT%H%M%SZ)}")
mkdir -p "$results"

"${PYTHON:-python3}" "$kit/install.py" "$environment" 2>&1 | tee "$results/install.log"
cp "$kit/manifest.json" "$results"
nvidia-smi > "$results/nvidia-smi.txt" 2>&1 || rm "$results/nvidia-smi.txt"

# In the environment the kit's packages come before the host's. PYTHONPATH would reverse that.
unset PYTHONPATH PYTHONHOME
# A pytest plugin of the host may need another pytest.
export PYTHONNOUSERSITE=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTEST_PLUGINS=xdist.plugin
export HF_HUB_OFFLINE=1 HF_HOME="$environment/cache/huggingface" TRITON_CACHE_DIR="$environment/cache/triton"
export KIT_RESULTS=$results PATH="$environment/bin:$PATH"
cd "$environment/payload"
if [[ ${1:-} == -- ]]; then
    shift
else
    set -- python tests/functional/visit.py --minutes 10 --out "$results" "$@"
fi
# exec, so that a signal reaches the visit, which then writes its results.
exec "$@" > >(tee "$results/visit.log") 2>&1
