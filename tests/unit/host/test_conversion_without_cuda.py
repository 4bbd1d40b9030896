# SPDX-License-Identifier: Apache-2.0
"""Import and export on a host without an accelerator and Transformer Engine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.extensions.transformer_engine import HAVE_TE
from random_models import FURTHER, MTP, save_random_model
from safetensors.torch import load_file
from tiny_models import FAMILIES, weights
from transformers import MixtralConfig

from megatron.bridge import AutoBridge
from megatron.bridge.host import accelerator
from megatron.bridge.host.layout import with_transformer_engine_keys
from megatron.bridge.host.saving import strategy_for_this_host
from megatron.bridge.host.settings import as_recorded
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.training import checkpointing, model_load_save


pytestmark = pytest.mark.skipif(
    accelerator.is_available() or HAVE_TE, reason="shows what happens without an accelerator and Transformer Engine"
)

# Families that differ in what Transformer Engine fuses.
LAYOUTS = ("llama-3", "qwen3", "qwen3-moe", "deepseek-v3", MTP)

CONVERT = """
import sys
from megatron.bridge import AutoBridge
AutoBridge.import_ckpt({hf!r}, {out!r})
AutoBridge.from_hf_pretrained({hf!r}).export_ckpt({out!r}, {back!r}, show_progress=False)
print("CONVERTED")
"""

# Loads what a host without Transformer Engine wrote and writes it again, with Transformer Engine's layers.
RELOAD = """
import json, sys
sys.path.insert(0, {tests!r})
import transformer_engine_stand_in
from pathlib import Path
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.bridge import AutoBridge
from megatron.bridge.training.model_load_save import temporary_distributed_context

assert HAVE_TE
for folder in map(Path, sys.argv[1:]):
    bridge = AutoBridge.from_hf_pretrained(folder / "hf")
    with temporary_distributed_context(backend="gloo"):
        model = bridge.load_megatron_model(folder / "release")
        names = [name for name, _ in model[0].named_parameters()]
        assert any("layer_norm_weight" in name for name in names), names
        bridge.save_hf_pretrained(model, folder / "back", show_progress=False)
        bridge.save_megatron_model(model, folder / "fused")
"""

SHARDED = """
import sys
import torch
from megatron.core import parallel_state
from megatron.bridge import AutoBridge

torch.distributed.init_process_group("gloo")
for size, hf, out in (each.split(",") for each in sys.argv[1:]):
    bridge = AutoBridge.from_hf_pretrained(hf)
    provider = bridge.to_megatron_provider()
    setattr(provider, f"{size}_model_parallel_size", 2)
    provider.sequence_parallel = size == "tensor"
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    bridge.save_megatron_model(model, out, low_memory_save=size == "tensor")
    assert torch.distributed.get_backend() == "gloo"
    parallel_state.destroy_model_parallel()
torch.distributed.destroy_process_group()
"""


def tensors_of(folder):
    return {
        name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def assert_equal(left, right):
    assert left.keys() == right.keys() and left
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def run(command, **kwargs):
    # Without the variables of a launcher that this process may have: the child is on its own.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "TORCHELASTIC"))}
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        env=clean | {"OMP_NUM_THREADS": "1"},
        **kwargs,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A function that imports a family once and returns the folder with hf/ and release/."""
    folders = {}

    def folder_of(family):
        if family not in folders:
            folder = tmp_path_factory.mktemp(family)
            AutoBridge.import_ckpt(save_random_model(folder / "hf", family), folder / "release")
            folders[family] = folder
        return folders[family]

    return folder_of


@pytest.mark.parametrize("family", [*FAMILIES, MTP])
def test_a_family_goes_out_and_back_bit_for_bit(imported, tmp_path, family):
    folder = imported(family)
    AutoBridge.from_hf_pretrained(folder / "hf").export_ckpt(folder / "release", tmp_path, show_progress=False)
    assert_equal(tensors_of(folder / "hf"), tensors_of(tmp_path))


@pytest.mark.parametrize("family", FURTHER)
def test_a_family_whose_layers_differ_goes_out_and_back_bit_for_bit(tmp_path, monkeypatch, family):
    monkeypatch.setitem(FAMILIES, family, FURTHER[family])
    hf = save_random_model(tmp_path / "hf", family)
    AutoBridge.import_ckpt(hf, tmp_path / "out")
    AutoBridge.from_hf_pretrained(hf).export_ckpt(tmp_path / "out", tmp_path / "back", show_progress=False)
    assert_equal(tensors_of(hf), tensors_of(tmp_path / "back"))


def test_adapters_are_exported(imported, tmp_path):
    hf = imported("llama-3") / "hf"
    settings = {"dim": 4, "alpha": 8, "target_modules": ["linear_proj"]}
    lora = LoRA(**settings)
    with model_load_save.temporary_distributed_context(backend="gloo"):
        provider = AutoBridge.from_hf_pretrained(hf).to_megatron_provider()
        provider.finalize()
        provider.register_pre_wrap_hook(lambda chunks: lora(chunks, training=False))
        model = provider.provide_distributed_model(wrap_with_ddp=False)
        adapters = {name: weight for name, weight in model[0].named_parameters() if ".adapter." in name}
        for weight in adapters.values():
            weight.data.normal_()
        state_dict = checkpointing.apply_peft_adapter_filter_to_state_dict(
            checkpointing._generate_model_state_dict(model, {}), lora
        )
        (tmp_path / "peft").mkdir()
        strategy = strategy_for_this_host(TorchDistSaveShardedStrategy())
        dist_checkpointing.save(state_dict, str(tmp_path / "peft"), strategy)
    run_config = {"peft": {"_target_": "megatron.bridge.peft.lora.LoRA", **settings}}
    (tmp_path / "peft" / "run_config.yaml").write_text(yaml.safe_dump(run_config))
    AutoBridge.from_hf_pretrained(hf).export_adapter_ckpt(tmp_path / "peft", tmp_path / "out", show_progress=False)
    exported = tensors_of(tmp_path / "out")
    assert len(exported) == len(adapters) == 4
    for name, weight in adapters.items():
        layer = int(name.partition("layers.")[2].partition(".")[0])
        part = "lora_A" if "linear_in" in name else "lora_B"
        matrix = exported[f"base_model.model.model.layers.{layer}.self_attn.o_proj.{part}.weight"]
        assert torch.equal(matrix, weight.float()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_precision_of_the_model_is_kept(tmp_path, dtype):
    hf = save_random_model(tmp_path / "hf", "llama-3", dtype)
    AutoBridge.import_ckpt(hf, tmp_path / "out", torch_dtype=dtype)
    bridge = AutoBridge.from_hf_pretrained(hf, torch_dtype=dtype)
    bridge.export_ckpt(tmp_path / "out", tmp_path / "back", show_progress=False)
    assert_equal(tensors_of(hf), tensors_of(tmp_path / "back"))


@pytest.mark.parametrize("how", ["script", "interpreter"])
def test_no_main_guard_is_needed(imported, tmp_path, how):
    """A process that is spawned to write runs the script again and ends in an EOFError."""
    hf = imported("llama-3") / "hf"
    code = CONVERT.format(hf=str(hf), out=str(tmp_path / "out"), back=str(tmp_path / "back"))
    (tmp_path / "convert.py").write_text(code)
    printed = run([str(tmp_path / "convert.py")]) if how == "script" else run(["-i"], input=code)
    assert "CONVERTED" in printed
    assert_equal(tensors_of(hf), tensors_of(tmp_path / "back"))


def test_import_and_export_leave_the_process_as_it_was(imported, tmp_path):
    hf = imported("llama-3") / "hf"
    environment, default_dtype, random = dict(os.environ), torch.get_default_dtype(), torch.get_rng_state()
    for out in ("first", "second"):
        AutoBridge.import_ckpt(hf, tmp_path / out)
        AutoBridge.from_hf_pretrained(hf).export_ckpt(tmp_path / out, tmp_path / "back", show_progress=False)
        assert not torch.distributed.is_initialized()
        assert not parallel_state.is_initialized()
    assert dict(os.environ) == environment
    assert torch.get_default_dtype() == default_dtype
    assert torch.equal(torch.get_rng_state(), random)
    assert not torch.cuda.is_initialized()


def test_a_failed_import_ends_its_process_group(imported, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("torch.distributed.checkpoint.save", fail)
    with pytest.raises(OSError, match="disk full"):
        AutoBridge.import_ckpt(imported("llama-3") / "hf", tmp_path / "out")
    assert not torch.distributed.is_initialized()
    assert not parallel_state.is_initialized()


def test_a_process_group_of_the_caller_is_used_and_left_alone(imported, tmp_path):
    folder = imported("llama-3")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        AutoBridge.import_ckpt(folder / "hf", tmp_path / "out")
        AutoBridge.from_hf_pretrained(folder / "hf").export_ckpt(tmp_path / "out", tmp_path / "back")
        assert torch.distributed.group.WORLD is group
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    assert_equal(tensors_of(folder / "hf"), tensors_of(tmp_path / "back"))


def test_a_model_is_built_without_a_process_group(imported, monkeypatch):
    """to_megatron_model alone, as Bridge's examples call it: gloo and the CPU are found."""
    folder = imported("llama-3")
    # Any that is free: another test run on this host may have the one that it takes by itself.
    monkeypatch.setenv("MASTER_PORT", "0")
    try:
        model = AutoBridge.from_hf_pretrained(folder / "hf").to_megatron_model(wrap_with_ddp=False)
        assert torch.distributed.get_backend() == "gloo"
        assert {parameter.device.type for parameter in model[0].parameters()} == {"cpu"}
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def test_run_config_says_how_the_model_trains_not_where_it_was_converted(imported):
    dense, moe = (
        yaml.safe_load((imported(family) / "release" / "release" / "run_config.yaml").read_text())["model"]
        for family in ("llama-3", "deepseek-v3")
    )
    for name in ("apply_rope_fusion", "persist_layer_norm", "gradient_accumulation_fusion"):
        assert dense[name] is True, name
    assert dense["use_cpu_initialization"] is False
    assert dense["transformer_layer_spec"]["_target_"].endswith("default_layer_spec")
    for name in ("moe_permute_fusion", "moe_shared_expert_overlap", "moe_grouped_gemm", "persist_layer_norm"):
        assert moe[name] is True, name
    assert moe["moe_token_dispatcher_type"] == "alltoall"
    assert moe["transformer_layer_spec"]["use_transformer_engine"] is True


def test_what_the_host_lacks_is_put_back_in_a_copy_only():
    provider = GPTModelProvider(num_layers=2, hidden_size=64, num_attention_heads=4, apply_rope_fusion=True)
    provider.finalize()
    recorded = as_recorded(provider)
    assert (provider.apply_rope_fusion, recorded.apply_rope_fusion) == (False, True)
    assert (provider.use_cpu_initialization, recorded.use_cpu_initialization) == (True, False)


def test_a_setting_of_the_user_is_recorded_as_it_is():
    provider = GPTModelProvider(num_layers=2, hidden_size=64, num_attention_heads=4, apply_rope_fusion=False)
    provider.finalize()
    provider.finalize()
    assert as_recorded(provider).apply_rope_fusion is False


def test_models_with_transformer_engine_load_what_was_converted_without_it(imported, tmp_path):
    """By Megatron Core's own Transformer Engine layers over stand-ins; the real ones need a GPU."""
    folders = [imported(family) for family in LAYOUTS]
    script = tmp_path / "reload.py"
    script.write_text(RELOAD.format(tests=str(Path(__file__).parent)))
    run([str(script), *map(str, folders)])
    for folder in folders:
        expected = tensors_of(folder / "hf")
        assert_equal(expected, tensors_of(folder / "back"))
        # And the other way round: what has Transformer Engine's keys alone is exported here.
        assert not any("pre_mlp_layernorm" in key for key in weights(imported("llama-3") / "fused" / "iter_0000000"))
        AutoBridge.from_hf_pretrained(folder / "hf").export_ckpt(folder / "fused", folder / "again")
        assert_equal(expected, tensors_of(folder / "again"))


def test_the_keys_of_megatron_cores_own_layers_stay(imported):
    """Megatron-LM asks for these with `--transformer-impl local`."""
    keys = weights(imported("qwen3-moe") / "release" / "release").keys()
    assert {"decoder.layers.mlp.linear_fc1.layer_norm_weight", "decoder.layers.pre_mlp_layernorm.weight"} <= keys


def test_only_the_model_gets_further_keys():
    other = {"optimizer": {}, "iteration": 0, "args": None}
    assert with_transformer_engine_keys(other) == other


def test_two_ranks_write_one_checkpoint(imported, tmp_path):
    cases = [("tensor", "llama-3"), ("pipeline", "llama-3.2"), ("expert", "qwen3-moe"), ("tensor", "deepseek-v3")]
    arguments = [f"{size},{imported(family) / 'hf'},{tmp_path / size / family}" for size, family in cases]
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    run(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), *arguments])
    for size, family in cases:
        out, hf = tmp_path / size / family, imported(family) / "hf"
        assert {"__0_0.distcp", "__1_0.distcp"} <= {path.name for path in (out / "iter_0000000").iterdir()}
        AutoBridge.from_hf_pretrained(hf).export_ckpt(out, out / "hf", show_progress=False)
        assert_equal(tensors_of(hf), tensors_of(out / "hf"))


def test_a_family_without_a_bridge_says_so(tmp_path):
    MixtralConfig(architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="MixtralForCausalLM.*no bridge for it") as raised:
        AutoBridge.from_hf_pretrained(tmp_path / "hf")
    assert "\n" not in str(raised.value)


def test_a_family_that_needs_what_is_not_here_says_so(imported, monkeypatch):
    def fail(self, **kwargs):
        raise ImportError("No module named 'mamba_ssm'")

    monkeypatch.setattr(GPTModelProvider, "provide_distributed_model", fail)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM can't be converted on this host.*mamba_ssm") as raised:
        AutoBridge.from_hf_pretrained(imported("llama-3") / "hf").to_megatron_model(wrap_with_ddp=False)
    assert "\n" not in str(raised.value)


def test_a_mistake_of_the_caller_is_not_blamed_on_the_host(imported, monkeypatch):
    def fail(self, **kwargs):
        raise ValueError("num_layers must divide by the pipeline's size")

    monkeypatch.setattr(GPTModelProvider, "provide_distributed_model", fail)
    with pytest.raises(ValueError, match="num_layers must divide"):
        AutoBridge.from_hf_pretrained(imported("llama-3") / "hf").to_megatron_model(wrap_with_ddp=False)
