#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Install the kit beside this host's torch, without network, run the visit, and put all that it gives into one folder.
#
#   ./run.sh [ARGUMENTS OF THE VISIT]
#   ./run.sh -- COMMAND               runs that in the kit's environment instead
#
#   PYTHON           the Python that has torch (default: python3)
#   KIT_ENVIRONMENT  folder for what is installed (default: environment, beside this script)
#   KIT_RESULTS      folder for the results (default: results/TIME, beside this script)
set -euo pipefail
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
environment=$(realpath -m "${KIT_ENVIRONMENT:-$kit/environment}")
results=$(realpath -m "${KIT_RESULTS:-$kit/results/$(date -u +%Y%m%dT%H%M%SZ)}")
mkdir -p "$results"

"${PYTHON:-python3}" "$kit/install.py" "$environment" 2>&1 | tee "$results/install.log"
cp "$kit/manifest.json" "$results"
nvidia-smi > "$results/nvidia-smi.txt" 2>&1 || rm "$results/nvidia-smi.txt"

# The environment sees the host's packages behind the kit's; in PYTHONPATH they would be in front.
unset PYTHONPATH PYTHONHOME
# A pytest plugin of the host's may be made for another pytest.
export PYTHONNOUSERSITE=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTEST_PLUGINS=xdist.plugin
export HF_HUB_OFFLINE=1 HF_HOME="$environment/cache/huggingface" TRITON_CACHE_DIR="$environment/cache/triton"
export KIT_RESULTS=$results PATH="$environment/bin:$PATH"
cd "$environment/payload"
if [[ ${1:-} == -- ]]; then
    shift
else
    set -- python tests/functional/visit.py --minutes 10 --out "$results" "$@"
fi
# In the place of this shell: what stops the script stops the visit, which then writes what it has.
exec "$@" > >(tee "$results/visit.log") 2>&1
