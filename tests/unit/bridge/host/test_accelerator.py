# SPDX-License-Identifier: Apache-2.0
"""Process groups and models on a host without an accelerator."""

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron.bridge.host import accelerator
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.checkpointing import get_rng_state


without_accelerator = pytest.mark.skipif(
    accelerator.is_available(), reason="shows what happens without an accelerator"
)


@pytest.mark.parametrize("devices, backend, device", [(0, "gloo", "cpu"), (1, "nccl", "cuda")])
def test_the_backend_is_that_of_the_devices(monkeypatch, devices, backend, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    assert (accelerator.backend(), accelerator.device()) == (backend, device)


@without_accelerator
def test_a_function_runs_in_a_group_of_its_own():
    @accelerator.with_process_group
    def world(fail=False):
        if fail:
            raise OSError("disk full")
        assert parallel_state.is_initialized()
        return dist.get_backend(), dist.get_world_size(), dist.group.WORLD

    assert world()[:2] == ("gloo", 1)
    with pytest.raises(OSError, match="disk full"):
        world(fail=True)
    assert not dist.is_initialized() and not parallel_state.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        assert world()[2] is dist.group.WORLD
        assert parallel_state.is_initialized()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@without_accelerator
def test_the_ranks_of_each_group_under_torchrun_have_keys_of_their_own(monkeypatch):
    """They meet in the launcher's store, which keeps the addresses of the group before."""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: iter([(store, 0, 1)]))
    prefixes = []
    with_prefix = dist.PrefixStore
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, of: prefixes.append(prefix) or with_prefix(prefix, of))
    for attempt in ("0", "0", "0-conversion-1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        with accelerator.gloo_group():
            assert dist.get_world_size() == 1
    assert len(set(prefixes)) == 3 and "0-conversion-1" in prefixes[2]


@without_accelerator
def test_a_model_is_built_on_the_cpu(monkeypatch):
    # Any port that is free.
    monkeypatch.setenv("MASTER_PORT", "0")
    provider = GPTModelProvider(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        vocab_size=32,
        seq_length=8,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    provider.finalize()
    try:
        (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
        assert dist.get_backend() == "gloo"
        assert {weight.device.type for weight in model.parameters()} == {"cpu"}
        assert get_rng_state(False, pg_collection=ProcessGroupCollection.use_mpu_process_groups()) is not None
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@without_accelerator
def test_a_seed_repeats_the_weights():
    accelerator.seed(1)
    first = torch.rand(4)
    accelerator.seed(1)
    assert torch.equal(torch.rand(4), first)
