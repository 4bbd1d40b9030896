# SPDX-License-Identifier: Apache-2.0
"""What only NVIDIA GPUs need moves to an extra, so that plain pip installs the wheel on CPU and ROCm hosts."""

from fork.edits import Change, File, imports, wrap
from fork.requirements import move, replace


change = Change(
    name="requirements",
    message="""build: move what only NVIDIA GPUs need to the extra cuda

`pip install megatron-bridge` fails on a host without CUDA: fast-hadamard-transform has no wheel, and its sdist needs
torch and nvcc at build time. flashinfer and flash-linear-attention install there but are of no use. The extra dev of
megatron-core brings the same packages along.

nvidia-resiliency-ext has wheels for glibc 2.39 and later since 0.5. On an older host pip takes 0.4.1, which has no
`__version__`, and megatron-core 0.19 reads that at import: `import megatron.bridge` stops with AttributeError.

All of these are now in the extra cuda, together with megatron-core[dev]: `pip install megatron-bridge[cuda]` installs
what `pip install megatron-bridge` did. The base names the packages of megatron-core[dev] that Bridge imports on any
host. pretrain needs nvidia-resiliency-ext for an annotation only, and goes without where it isn't installed.
""",
    why="The wheel installs with plain pip on hosts without an NVIDIA GPU; the extra cuda has what upstream's base had.",
    edits=[
        File(
            "training/pretrain.py",
            [
                wrap(
                    "",
                    imports("nvidia_resiliency_ext.inprocess"),
                    "try:\n    {}\nexcept ImportError:  # the extra cuda has it\n    CallWrapper = object",
                )
            ],
        )
    ],
    requirements=[
        move("fast-hadamard-transform", "cuda"),
        move("flash-linear-attention", "cuda"),
        move("flashinfer-python", "cuda"),
        move("flashinfer-cubin", "cuda"),
        move("nvidia-resiliency-ext", "cuda"),
        replace(
            "megatron-core",
            "megatron-core[mlm]>=0.19.2,<0.20",
            'megatron-core[dev]>=0.19.2,<0.20; extra == "cuda"',
            'nvidia-modelopt>=0.44; sys_platform != "darwin"',
            "megatron-energon~=7.0",
            "multi-storage-client",
            releases="==0.6.*",
        ),
    ],
)
