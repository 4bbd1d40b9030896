# SPDX-License-Identifier: Apache-2.0
"""Save a release checkpoint from a model that is split over all ranks. `matrix.py` runs it with torchrun."""

import argparse
import os


def main() -> None:
    """Build this rank's part of the model, and save it with the others."""
    parser = argparse.ArgumentParser()
    for size in ("tp", "pp", "ep"):
        parser.add_argument(f"--{size}", type=int, default=1)
    parser.add_argument("--interleaved", action="store_true")
    parser.add_argument("--backend", default="gloo")
    parser.add_argument("hf_model")
    parser.add_argument("out")
    options = parser.parse_args()

    import platforms
    import torch

    from megatron.bridge.utils.deferred import lean_imports

    if torch.version.hip:
        platforms.save_from_pageable_memory()
    if options.backend != "gloo":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(options.backend)
    # Importing all of Bridge would take each rank longer than everything below.
    with lean_imports():
        from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(options.hf_model)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = options.tp
    provider.pipeline_model_parallel_size = options.pp
    provider.expert_model_parallel_size = options.ep
    provider.sequence_parallel = options.tp > 1 and bool(provider.num_moe_experts)
    if options.pp > 1:
        provider.pipeline_dtype = provider.params_dtype
    if options.interleaved:
        provider.virtual_pipeline_model_parallel_size = 2
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    on_cpu = {"use_cpu_initialization": True} if options.backend == "gloo" else {}
    model = provider.provide_distributed_model(wrap_with_ddp=False, **on_cpu)
    bridge.save_megatron_model(model, options.out, hf_tokenizer_path=options.hf_model, release=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
