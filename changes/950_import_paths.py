# SPDX-License-Identifier: Apache-2.0
"""Pages and scripts name an import by its root; a pull request only, since nothing of the wheel changes."""

from fork.change import Change, Sweep, TextEdit


GLM_45V = "examples/models/glm/glm_45v/README.md"

# The files are those of August 2026 (067f987), with the number of places in each.
COMMANDS = {
    "docs/models/hy_v3/hy-v3.md": 1,
    "examples/conversion/README.md": 1,
    "examples/inference/README.md": 1,
    "examples/models/bailing/README.md": 2,
    "examples/models/bailing/conversion.sh": 1,
    "examples/models/bailing/inference.sh": 1,
    "examples/models/exaone/exaone4/conversion.sh": 2,
    "examples/models/exaone/exaone4/inference.sh": 1,
    "examples/models/falcon_h1/conversion.sh": 2,
    "examples/models/gemma/gemma3_vl/conversion.sh": 1,
    "examples/models/gemma/gemma3_vl/inference.sh": 1,
    "examples/models/gemma/gemma4/README.md": 2,
    "examples/models/gemma/gemma4/conversion.sh": 1,
    "examples/models/gemma/gemma4/inference.sh": 1,
    "examples/models/gemma/gemma4_vl/README.md": 1,
    "examples/models/gemma/gemma4_vl/conversion.sh": 1,
    "examples/models/glm/glm_45v/conversion.sh": 1,
    "examples/models/glm/glm_45v/inference.sh": 1,
    "examples/models/glm/glm_45v/slurm_peft.sh": 1,
    "examples/models/glm/glm_45v/slurm_sft.sh": 1,
    "examples/models/glm47/conversion.sh": 1,
    "examples/models/gpt_oss/README.md": 2,
    "examples/models/gpt_oss/conversion.sh": 2,
    "examples/models/kimi/kimi_k25_vl/slurm_inference.sh": 1,
    "examples/models/mimo/conversion.sh": 1,
    "examples/models/mimo/inference.sh": 1,
    "examples/models/mistral/ministral3/conversion.sh": 1,
    "examples/models/mistral/ministral3/inference.sh": 1,
    "examples/models/mistral/mistral/conversion.sh": 1,
    "examples/models/mistral/mistral/inference.sh": 1,
    "examples/models/nemotron/nemotron_3/nano/conversion.sh": 2,
    "examples/models/nemotron/nemotron_3/super/conversion.sh": 2,
    "examples/models/qwen/qwen25_omni/README.md": 2,
    "examples/models/qwen/qwen25_omni/conversion.sh": 2,
    "examples/models/qwen/qwen25_omni/inference.sh": 1,
    "examples/models/qwen/qwen35_vl/README.md": 2,
    "examples/models/qwen/qwen35_vl/conversion.sh": 1,
    "examples/models/qwen/qwen35_vl/inference.sh": 1,
    "examples/models/qwen/qwen35_vl/slurm_inference.sh": 1,
    "examples/models/qwen/qwen3_asr/README.md": 3,
    "examples/models/qwen/qwen3_asr/inference.sh": 1,
    "examples/models/qwen/qwen3_omni/conversion.sh": 2,
    "examples/models/qwen/qwen3_omni/inference.sh": 1,
    "examples/models/qwen/qwen3_vl/README.md": 2,
    "examples/models/qwen/qwen3_vl/conversion.sh": 2,
    "examples/models/qwen/qwen3_vl/inference.sh": 2,
    "examples/models/sarvam/README.md": 2,
    "examples/models/sarvam/conversion.sh": 2,
    "examples/models/stepfun/step35/README.md": 1,
    "examples/models/stepfun/step35/conversion.sh": 2,
    "examples/models/stepfun/step37/slurm_pretrain.sh": 1,
    "examples/models/vlm/ernie_vl/README.md": 1,
    "examples/models/vlm/ernie_vl/conversion.sh": 1,
    "scripts/conversion/README.md": 1,
    "scripts/conversion/arguments.py": 1,
    "scripts/inference/README.md": 1,
    "skills/adding-model-support/SKILL.md": 1,
    "skills/adding-model-support/tests-and-examples.md": 1,
    "skills/create-model-verification-card/SKILL.md": 1,
    "tutorials/data/datacomp/train_qwen36_example.sh": 1,
}
# Where the payload is tested for, or is what the page speaks of.
PAYLOADS = {
    "examples/models/deepseek_v4/README.md": 1,
    "examples/models/deepseek_v4/conversion.sh": 1,
    "examples/models/deepseek_v4/inference.sh": 1,
    "examples/models/deepseek_v4/slurm_sft.sh": 1,
    "examples/models/falcon_h1/README.md": 1,
    "examples/models/falcon_h1/inference.sh": 1,
    GLM_45V: 3,
    "examples/models/gpt_oss/inference.sh": 1,
    "examples/models/nemotron_labs_diffusion/README.md": 1,
    "examples/models/qwen/qwen2_audio/sft.sh": 1,
    "examples/models/sarvam/inference.sh": 1,
    "examples/models/stepfun/step37/slurm_pretrain.sh": 1,
}


change = Change(
    name="import-paths",
    message="""\
docs(ckpt): name an imported checkpoint by its root

An import writes a release, and no `iter_0000000`. Commands name the root of
the import, which is right for either form; what tests for the payload, and
prose that says where it lies, name `release`.

`iter_0000000` stays where it is true: in what writes it still (the
converters of FLUX, WAN, LLaDA and MegatronMIMO), in the cards of verified
models, which record what a commit of their own did, in the documentation of
0.4.2, and in unit tests.
""",
    why="Pages, examples, skills and launch scripts name an imported checkpoint by its root or by `release`.",
    problem=(
        "An import writes `release/`, but pages and scripts still name `iter_0000000`. A reader who copies such a "
        "command gets a warning, and a script that tests for that folder stops. `git grep -c iter_0000000 -- docs "
        "examples scripts skills tutorials` lists the places."
    ),
    unchanged=[
        "Existing checkpoints at `iter_0000000` are read as before.",
    ],
    changes=[
        "Examples, launch scripts, skills, and pages name an imported checkpoint by its root, or `release` where "
        "they look for the payload.",
    ],
    tested=[
        "`bash -n` accepts every changed script, and `py_compile` every changed module.",
        "A new unit test checks the pages and scripts. The unit tests of the conversion launcher, the pages, and "
        "the skills pass: 168 before, 169 after.",
    ],
    notes=[
        "All but four of the changed lines change or lose just this word: see `git show --word-diff`.",
        "`git grep -c iter_0000000 -- docs examples scripts skills tutorials | awk -F: '{n += $2} END {print n, "
        "NR}'` counts 265 lines in 102 files on main, and 172 lines in 31 files after this commit. Of these, 149 "
        "are in 20 cards of verified models, which record what one commit did, 19 in 8 files of converters that "
        "still write this folder, 2 in the documentation of 0.4.2, and 2 in the guide, which says how to get "
        "that layout. Of the 10 lines in tests, `release-checkpoints` edits one; the other 9 name a folder of "
        "the test's own.",
    ],
    stands_on=["release-checkpoints"],
    tests={"changes/tests/test_import_paths.py": "doc_consistency/"},
    docs=[
        TextEdit(
            GLM_45V,
            "name the imported weights",
            r"iteration directories such as (?=`)",
            "the imported weights in ",
            done="the imported weights in `",
        ),
        TextEdit(
            GLM_45V,
            "name the directory",
            r"that iteration directory (?=for)",
            "that directory ",
            done="that directory ",
        ),
        TextEdit(
            GLM_45V,
            "name the checkpoint",
            r"converted iteration (?=checkpoint)",
            "converted ",
            done="the converted checkpoint, for",
        ),
        TextEdit(
            "examples/models/nemotron/nemotron_3_omni/README.md",
            "name what an import writes",
            r"`iter_0000000/`, `\S+`, and$",
            "`release/` and",
            done="`release/` and",
        ),
    ],
    sweeps=[
        Sweep("name the root of an import", r'/iter_0000000(?=["}\s])', "", COMMANDS),
        Sweep("name the release", r"\biter_0000000\b", "release", PAYLOADS),
    ],
)
