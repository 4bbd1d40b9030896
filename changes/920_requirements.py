# SPDX-License-Identifier: Apache-2.0
"""What only NVIDIA GPUs need moves to an extra, so that plain pip installs the wheel on CPU and ROCm hosts."""

from packaging.version import Version

from fork.change import LOCK, Change
from fork.edits import File, imports, wrap
from fork.requirements import covers, move, replace
from fork.upstream import RELEASES


# What upstream's main calls itself after the last release.
LAST = max(map(Version, RELEASES))
NEXT = f"{LAST.major}.{LAST.minor + 1}"


def needed(release: str) -> list[str]:
    """What Bridge imports on any host of that which megatron-core[dev] brings."""
    return [
        'nvidia-modelopt>=0.44; sys_platform != "darwin"',
        f"megatron-energon{'~=6.0' if covers('<0.5', release) else '~=7.0'}",
        "multi-storage-client",
        # Later ones ask for it themselves.
        *(["einops~=0.8"] if covers("<0.4", release) else []),
    ]


change = Change(
    name="requirements",
    message="""\
build!: move packages that need an NVIDIA GPU to the extra cuda

`pip install megatron-bridge` fails on a host without CUDA: fast-hadamard-transform has no wheel, and its sdist needs
torch and nvcc at build time. flashinfer and flash-linear-attention install there but are of no use. The extra dev of
megatron-core requires the same packages.

nvidia-resiliency-ext has wheels for glibc 2.39 and later since 0.5. On an older host pip takes 0.4.1, which has no
`__version__`. megatron-core 0.19 reads that at import, so `import megatron.bridge` stops with an AttributeError.

All of these are now in the extra cuda, together with megatron-core[dev]: `pip install megatron-bridge[cuda]` installs
what `pip install megatron-bridge` did. The base names the packages of megatron-core[dev] that Bridge imports on any
host. pretrain needs nvidia-resiliency-ext for an annotation only, and works without it.
""",
    why="The wheel installs with plain pip on hosts without an NVIDIA GPU; the extra cuda has what the base had.",
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
        *(
            move(package, "cuda", releases=releases)
            for package, releases in {
                "fast-hadamard-transform": ">=0.6",
                "flash-linear-attention": "",
                "flashinfer-python": ">=0.5",
                "flashinfer-cubin": ">=0.5",
                "nvidia-resiliency-ext": "",
                # From 0.5 on upstream has these in extras of its own.
                "transformer-engine": "<0.5",
                "mamba-ssm": "<0.5",
                "causal-conv1d": "<0.5",
            }.items()
        ),
        *(
            replace(
                "megatron-core",
                f"megatron-core[mlm]{upstream.megatron_core_range}",
                f'megatron-core[dev]{upstream.megatron_core_range}; extra == "cuda"',
                *needed(upstream.version),
                releases=f"=={upstream.version}",
            )
            for upstream in RELEASES.values()
        ),
        # A checkout has the Megatron Core that it names as a submodule.
        replace(
            "megatron-core",
            "megatron-core[mlm]",
            'megatron-core[dev]; extra == "cuda"',
            *needed(NEXT),
            releases=f">={NEXT}",
        ),
    ],
    problem=(
        "`pip install megatron-bridge` fails on a host without CUDA: fast-hadamard-transform has no wheel, and its "
        "sdist needs torch and nvcc at build time. Even where it installs, `import megatron.bridge` can stop with an "
        "AttributeError, because pip takes an old nvidia-resiliency-ext on hosts with a glibc before 2.39."
    ),
    unchanged=["`pip install megatron-bridge[cuda]` installs what `pip install megatron-bridge` did."],
    changes=[
        "Packages that need an NVIDIA GPU, and `megatron-core[dev]`, are now in the optional extra `cuda`.",
        "The base names the packages of `megatron-core[dev]` that Bridge imports on any host.",
        "`training/pretrain.py` works without nvidia-resiliency-ext, which it needs for an annotation only.",
    ],
    tested=[
        "With this change, wheels of 0.3.1, 0.4.2, 0.5.1, and 0.6.2 install with plain pip on a host without CUDA.",
    ],
    notes=[
        LOCK,
        "The containers and `uv sync` of the CI have to name the extra `cuda`.",
    ],
    issues=[3295],
    tests={"tests/unit/bridge/test_pretrain_import.py": "training/test_pretrain_import.py"},
)
