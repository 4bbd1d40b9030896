# SPDX-License-Identifier: Apache-2.0
"""What was trained from a release: Megatron-LM's checkpoints without run config, and adapters beside their base."""

from fork.change import Change
from fork.edits import (
    File,
    add_import,
    assign,
    call,
    expression,
    ifs,
    insert_after,
    insert_before,
    insert_first,
    replace,
)


CHECKPOINTS = "from megatron.bridge.training.mlm_compat.checkpoints import"
RUN_CONFIG = expression("get_checkpoint_run_config_filename(checkpoint_path)")
FROM_AUTO_CONFIG = ">=0.5"

change = Change(
    name="trained-checkpoints",
    message="""\
fix(ckpt): read what was trained from a release checkpoint

Megatron-LM saves no run_config.yaml, so export_ckpt refused what it had
trained. Adapters that are saved beside their release checkpoint move its
tracker on, so the tracker no longer names their base.

Use the run config of the release checkpoint beside the trained one, or the
bridge's own Hugging Face config. Find the base of adapters in their root.
""",
    why="export_ckpt and LoRA read what was trained from a release, by Megatron-LM or by Bridge.",
    edits=[
        File(
            "training/checkpointing.py",
            [
                # Adapters that are to be saved beside their release: there are none to resume from yet.
                insert_before(
                    "_load_checkpoint_from_path",
                    ifs('is_peft_resume and "sharded_state_dict" in load_kwargs'),
                    'if is_peft_resume and ckpt_format == "torch_dist" and release:\n'
                    '    print_rank_0(f" {load_dir} holds a release and no adapters: starting with fresh ones")\n'
                    "    return 0, 0\n",
                ),
            ],
        ),
        File(
            "training/setup.py",
            [
                add_import(f"{CHECKPOINTS} base_of_adapters"),
                insert_before(
                    "_create_peft_pre_wrap_hook.peft_pre_wrap_hook",
                    assign("cfg.checkpoint.finetune"),
                    "# What is loaded after this tells adapters from base weights by their paths.\n"
                    "cfg.checkpoint.pretrained_checkpoint = base_of_adapters(cfg.checkpoint.pretrained_checkpoint)",
                ),
            ],
        ),
        File(
            "training/model_load_save.py",
            [
                edit
                for function in ("load_tokenizer", "load_model_config")
                for edit in (
                    insert_first(function, f"{CHECKPOINTS} run_config_folder\n"),
                    replace(
                        function,
                        RUN_CONFIG,
                        "get_checkpoint_run_config_filename(run_config_folder(checkpoint_path))",
                    ),
                )
            ],
        ),
        File(
            "models/conversion/auto_bridge.py",
            [
                insert_after(
                    "AutoBridge.load_megatron_model",
                    assign("checkpoint_path"),
                    f"{CHECKPOINTS} lacks_run_config, load_with_hf_config\n"
                    "\n"
                    "if lacks_run_config(checkpoint_path):\n"
                    "    return load_with_hf_config(self, checkpoint_path, mp_overrides)",
                    done=call("load_with_hf_config"),
                ),
                insert_before(
                    "AutoBridge.from_auto_config",
                    ifs("not checkpoint_path.exists()"),
                    "checkpoint_path = Path(run_config_folder(checkpoint_path))\n",
                    releases=FROM_AUTO_CONFIG,
                ),
                insert_first(
                    "AutoBridge.from_auto_config", f"{CHECKPOINTS} run_config_folder\n", releases=FROM_AUTO_CONFIG
                ),
            ],
        ),
        File(
            "training/utils/checkpoint_utils.py",
            [
                insert_after(
                    "get_hf_model_id_from_checkpoint",
                    expression("resolve_checkpoint(path)"),
                    f"# That module imports this one.\n{CHECKPOINTS} run_config_folder\n\npath = run_config_folder(path)\n",
                ),
            ],
        ),
    ],
    modules=["training/mlm_compat/checkpoints.py"],
    stands_on=["release-checkpoints"],
    problem=(
        "`bridge.export_ckpt(trained, hf_out)` fails for a checkpoint that Megatron-LM trained from an import, "
        "because Megatron-LM saves no `run_config.yaml`. A LoRA training that saves beside its release checkpoint "
        "can't be resumed, because the tracker then names the adapters."
    ),
    changes=[
        "`export_ckpt` and `load_megatron_model` read what Megatron-LM saved, beside the release checkpoint or "
        "in another folder.",
        "LoRA starts from the root of its release checkpoint, and resumes there.",
    ],
    unchanged=[
        "How a checkpoint with its own run config is read.",
    ],
    tested=[
        "Fine-tuning and LoRA of a tiny model from a release, saved beside it and elsewhere, resumed and exported."
    ],
    tests={"tests/unit/bridge/test_trained_checkpoints.py": "training/"},
    functional={"changes/tests/functional/test_release_checkpoint.py": "ckpts/release/test_release_checkpoint.py"},
    others=[
        File(
            "examples/conversion/hf_to_megatron_generate_text.py",
            [
                add_import(f"{CHECKPOINTS} run_config_folder", releases=">=0.6"),
                replace(
                    "main",
                    expression("Path(resolve_checkpoint(args.megatron_model_path))"),
                    "Path(run_config_folder(resolve_checkpoint(args.megatron_model_path)))",
                    releases=">=0.6",
                ),
            ],
        ),
    ],
)
