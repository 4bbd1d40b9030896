# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a GPT model on conversations with Megatron-LM's own training loop.

The flags are those of Megatron-LM's own parser, and those of `train.py`. `--record DIR` saves the loss of each
iteration and the batches that the model saw, so that another implementation can compute the loss on the same tokens.
Megatron-LM's entry point, `pretrain_gpt.py`, is not in the wheel of megatron-core. This module replaces it unless
`--megatron-lm` names a checkout that has it. It uses Megatron-LM's parser, data set class (`SFTDataset`), model class,
optimizer, checkpoint code, and loop unmodified. `train.py` runs it.
"""

import argparse
import inspect
import json
import runpy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import megatron.core
import megatron.training
import torch
from chat import ChatTokenizer
from megatron.core import parallel_state
from megatron.core.datasets import utils as dataset_utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.training import arguments, get_args, pretrain, training
from megatron.training.datasets.sft_dataset import SFTDataset
from torch.nn.utils.rnn import pad_sequence


def layer_spec(args: Any, config: Any, vp_stage: int | None) -> Any:
    """Return Megatron Core's layer spec for the model that the flags describe."""
    with_te = args.transformer_impl == "transformer_engine"
    if args.num_experts:
        return get_gpt_decoder_block_spec(
            config, use_transformer_engine=with_te, normalization=args.normalization, vp_stage=vp_stage
        )
    make = get_gpt_layer_with_transformer_engine_spec if with_te else get_gpt_layer_local_spec
    keywords = {} if with_te else {"normalization": args.normalization}
    return make(qk_layernorm=config.qk_layernorm, multi_latent_attention=config.multi_latent_attention, **keywords)


def provide_model(
    pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **given: Any
) -> GPTModel:
    """Build one rank's part of the model. `megatron.training.training.get_model` calls this for every stage."""
    args = get_args()
    config = given.get("config") or arguments.core_transformer_config_from_args(args)
    if getattr(args, "hybrid_layer_pattern", None):
        return _hybrid_model(config, given.get("pg_collection"), pre_process, post_process)
    groups = {name: given[name] for name in ("pg_collection",) if given.get(name) is not None}
    same_name = ("position_embedding_type", "rotary_base", "rotary_percent")
    return GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(args, config, vp_stage),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        **{name: getattr(args, name) for name in same_name},
        rope_scaling=args.use_rope_scaling,
        # Megatron-LM's own builder ignores this flag (core 0.19.2, `megatron/training/argument_utils.py`,
        # `gpt_config_from_args`) and builds every model with Llama 3.1's factor, 8. Llama 3.2 needs 32.
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        vp_stage=vp_stage,
        **groups,
    )


def _hybrid_model(config: Any, groups: Any, pre_process: bool, post_process: bool) -> Any:
    """Build a model with Mamba layers by Megatron-LM's own builder, as `pretrain_hybrid.py` of core 0.19 does."""
    from megatron.training.argument_utils import hybrid_config_from_args
    from megatron.training.models.hybrid import HybridModelBuilder

    builder = HybridModelBuilder(hybrid_config_from_args(get_args(), config))
    return builder.build_model(groups, pre_process, post_process)


def provide_datasets(samples: list[int], vp_stage: int | None = None) -> Any:
    """Build the train, validation, and test sets. A line is a sequence, and the assistant's tokens carry loss.

    With `--sft` the conversations of a line are packed. Without it a line has one conversation.

    Every rank reads the conversations itself, and the ranks of one data parallel group draw the same samples, so
    nothing needs to be broadcast.
    """
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend_per_split=[([path[0]], None) if path else None for path in _split_paths(args)],
        path_to_cache=args.data_cache_path,
        tokenizer=ChatTokenizer(args.tokenizer_model),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        context_parallel_size=args.context_parallel_size,
    )
    return BlendedMegatronDatasetBuilder(SFTDataset, samples, lambda: True, config).build()


provide_datasets.is_distributed = True


def _split_paths(args: Any) -> tuple[list[str] | None, ...]:
    return args.train_data_path, args.valid_data_path, args.test_data_path


class Recorder:
    """Writes the losses and batches of the loop to a folder.

    `losses.jsonl` has one object per line: `{"split": "train", "iteration": 1, "loss": 5.97…}`. `batches/` has one
    file per micro-batch and data parallel rank, with `tokens`, `labels` (int64), and `loss_mask` (float32), each
    `[batch, sequence]`.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = Path(folder) if folder else None
        self.seen: Counter[tuple[str, int]] = Counter()

    def loss(self, split: str, iteration: int, losses: dict[str, torch.Tensor]) -> None:
        """Record the loss of one iteration. Only ranks of the last pipeline stage have it, and one of them writes."""
        if self.folder is None or not losses or not _writes():
            return
        line = {"split": split, "iteration": iteration, "loss": losses["lm loss"].item(), "time": time.time()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "losses.jsonl").open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(f"{split} iteration {iteration}: loss {line['loss']!r}", flush=True)

    def batch(self, split: str, iteration: int, batch: dict[str, torch.Tensor]) -> None:
        """Save one micro-batch as this data parallel rank saw it, with a row for each conversation."""
        if self.folder is None or parallel_state.get_tensor_model_parallel_rank() != 0:
            return
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return
        rank = parallel_state.get_data_parallel_rank()
        self.seen[split, iteration] += 1
        name = f"{split}-{iteration:06d}-rank{rank}-{self.seen[split, iteration]:04d}.pt"
        (self.folder / "batches").mkdir(parents=True, exist_ok=True)
        torch.save(conversations(batch), self.folder / "batches" / name)


def conversations(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch of `SFTDataset` with a row for each conversation, padded without loss.

    Args:
        batch: `tokens`, `labels` (int64), and `loss_mask` (float32), each `[batch, sequence]`. With `--sft` it also
            has `cu_seqlens` (int32, `[batch, places]`), the starts of each sequence's conversations. The last value,
            the end of the sequence, is repeated.
    """
    kept = {name: batch[name] for name in ("tokens", "labels", "loss_mask")}
    if not get_args().sft:
        return kept
    bounds = [row.unique().tolist() for row in batch["cu_seqlens"]]
    return {
        name: pad_sequence(
            [row[start:end] for row, ends in zip(value, bounds, strict=True) for start, end in pairwise(ends)],
            batch_first=True,
        )
        for name, value in kept.items()
    }


def _writes() -> bool:
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank() == 0
    )


def observe(function: Callable, watch: Callable[[inspect.BoundArguments, Any], None]) -> Callable:
    """Wrap a function of Megatron-LM's loop so that `watch` sees its arguments and result."""
    signature = inspect.signature(function)

    @wraps(function)
    def observed(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        watch(signature.bind(*args, **kwargs), result)
        return result

    return observed


def watch_losses(recorder: Recorder) -> None:
    """Record the losses that Megatron-LM reduces over all ranks, because its log has only six digits of them."""

    def after_iteration(call: inspect.BoundArguments, _: Any) -> None:
        recorder.loss("train", call.arguments["iteration"], call.arguments["loss_dict"])

    def after_evaluation(_: inspect.BoundArguments, result: Any) -> None:
        recorder.loss("valid", _iterations_done(), result[0])

    training.training_log = observe(training.training_log, after_iteration)
    training.evaluate = observe(training.evaluate, after_evaluation)


def _iterations_done() -> int:
    args = get_args()
    return max(args.iteration, getattr(args, "curr_iteration", -1) + 1)


def masked_loss(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Sum the loss over the tokens of the assistant.

    Returns:
        The sum, the number of tokens (int32), and both under "lm loss" for Megatron-LM to reduce over ranks and
        micro-batches.
    """
    mask = loss_mask.reshape(-1).float()
    total = (output.reshape(-1).float() * mask).sum()
    tokens = mask.sum().to(torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.to(total.dtype)])}


def forward_step(data: Iterator, model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    """Run one micro-batch through this rank's part of the model."""
    device = torch.cuda.current_device()
    batch = {name: value.to(device, non_blocking=True) for name, value in next(data).items()}
    packed = {}
    if get_args().sft:
        batch, packed["packed_seq_params"] = pack(batch)
    inputs = batch["tokens"], batch["position_ids"], None
    output = model(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"], **packed)
    return output, partial(masked_loss, batch["loss_mask"])


def pack(batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], PackedSeqParams]:
    """Concatenate the sequences of a micro-batch.

    Returns:
        The batch with values `[1, batch x sequence]`, and the parameters with which attention separates conversations.
    """
    from megatron.core.utils import flatten_batch_for_packed_sequences  # core 0.19 and later

    batch = flatten_batch_for_packed_sequences(batch)
    bounds, longest = batch["cu_seqlens"].squeeze(0), int(batch["max_seqlen"])
    places = {f"cu_seqlens_{each}": bounds for each in ("q", "kv")}
    lengths = {f"max_seqlen_{each}": longest for each in ("q", "kv")}
    return batch, PackedSeqParams(qkv_format="thd", **places, **lengths)


def recorded(step: Callable, recorder: Recorder) -> Callable:
    """Wrap a forward step, ours or that of `pretrain_gpt.py`, so that its batch is recorded."""

    @wraps(step)
    def watched(data: Iterator | None, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        now = ("train", get_args().curr_iteration + 1) if model.training else ("valid", _iterations_done())

        def drawn() -> Iterator:
            batch = next(data)
            recorder.batch(*now, batch)
            yield batch

        return step(drawn(), model, *args, **kwargs)

    return watched


def let_distributed_optimizers_resume() -> None:
    """Let a distributed optimizer resume where torch's Adam stands in for Transformer Engine's or Apex's.

    Megatron Core has three faults there (0.19.2, `distrib_optimizer.py`):

    - Before it reads a checkpoint, it asks Adam for its step, but there was none yet. Here Adam first takes a step
      with gradients of zero, which moves no weight and which the checkpoint replaces.
    - It copies into float32 weights that require gradients.
    - It keeps that first step instead of the checkpoint's, in one tensor for all weights, which each weight counts up.
      So the loss is wrong after two iterations.
    """
    state_dict, load_state_dict = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict

    @wraps(state_dict)
    def with_state(self: DistributedOptimizer) -> Any:
        if not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return state_dict(self)

    @wraps(load_state_dict)
    @torch.no_grad()
    def with_own_steps(self: DistributedOptimizer, given: Any) -> None:
        step = float(given["optimizer"]["param_groups"][0]["step"])
        load_state_dict(self, given)
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(step)

    DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict = with_state, with_own_steps


def pretrain_recorded(recorder: Recorder, *args: Any, **kwargs: Any) -> None:
    """Call `megatron.training.pretrain` with a forward step that is recorded."""
    call = inspect.signature(pretrain).bind(*args, **kwargs)
    call.arguments["forward_step_func"] = recorded(call.arguments["forward_step_func"], recorder)
    pretrain(*call.args, **call.kwargs)


def run_pretrain_gpt(checkout: Path, recorder: Recorder) -> None:
    """Run Megatron-LM's own script, like `python pretrain_gpt.py`."""
    megatron.training.pretrain = partial(pretrain_recorded, recorder)
    runpy.run_path(str(checkout / "pretrain_gpt.py"), run_name="__main__")


def fine_tune(recorder: Recorder) -> None:
    """Parse the flags and call `megatron.training.pretrain`, whose signature differs between versions."""
    keywords: dict[str, Any] = {}
    if "cfg_container" in inspect.signature(pretrain).parameters:  # megatron-core 0.18 and later
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        keywords["cfg_container"] = pretrain_cfg_container_from_args(arguments.parse_and_validate_args())
    pretrain_recorded(
        recorder,
        train_valid_test_dataset_provider=provide_datasets,
        model_provider=provide_model,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        **keywords,
    )


def main(given: argparse.Namespace) -> None:
    """Train with the flags of `train.take_own_flags`, and with Megatron-LM's flags from the command line."""
    if not HAVE_APEX_OR_TE:
        let_distributed_optimizers_resume()
    # Megatron-LM compiles helpers for indexed data sets with `make`, but the wheel of megatron-core has no Makefile
    # (`megatron/training/initialize.py`, `_compile_dependencies`, core 0.19.2). Conversations don't need the helpers.
    dataset_utils.compile_helpers = lambda: None
    print(f"Megatron Core {megatron.core.__version__} of {Path(megatron.core.__file__).parents[2]}", flush=True)
    recorder = Recorder(given.record)
    watch_losses(recorder)
    if given.megatron_lm:
        run_pretrain_gpt(Path(given.megatron_lm), recorder)
    else:
        fine_tune(recorder)
    torch.distributed.destroy_process_group()
