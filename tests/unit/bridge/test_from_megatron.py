# SPDX-License-Identifier: Apache-2.0
"""A release checkpoint that is made of another checkpoint of Megatron-LM has its weights and says its args."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.extensions.transformer_engine import HAVE_TE
from rank_checkpoints import args_of, save_ranks, whole_model
from tiny_models import assert_same_weights, save_hf_model, weights

from megatron.bridge import AutoBridge
from megatron.bridge.host import accelerator
from megatron.bridge.models.conversion.from_megatron import import_megatron_lm
from megatron.bridge.release_checkpoint.architecture import facts
from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.repair.problems import problems


pytestmark = pytest.mark.skipif(accelerator.is_available() or HAVE_TE, reason="compares the keys of local layers")
SIZES = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
USUAL = {
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "seq_length": 32,
    "norm_epsilon": 1e-5,
}
NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def root(path, tracker="release"):
    path.mkdir(exist_ok=True)
    (path / "latest_checkpointed_iteration.txt").write_text(tracker)
    return path / ("release" if tracker == "release" else f"iter_{int(tracker):07d}")


def expected(whole, layers=4):
    """The tensors of a release by key: those of all layers of a kind are one."""
    stacked = {name: tensor for name, tensor in whole.items() if ".layers." not in name}
    for name in {name.partition("layers.0.")[2] for name in whole if "layers.0." in name}:
        each = [whole[f"decoder.layers.{number}.{name}"] for number in range(layers)]
        stacked[f"decoder.layers.{NORMS.get(name, name)}"] = torch.stack(each)
    return stacked


@pytest.mark.parametrize(
    ("sizes", "tied", "options"),
    [({}, False, {}), (SIZES, True, {"chunks": 2}), (SIZES, False, {"fused": True})],
    ids=["one rank", "TP2 PP2, interleaved", "Transformer Engine's names"],
)
def test_the_files_of_ranks_become_a_release(tmp_path, sizes, tied, options):
    whole, args = whole_model(tied=tied), args_of(tied=tied, **USUAL, **sizes)
    save_ranks(root(tmp_path / "source", "7"), whole, args, iteration=7, **options)
    import_megatron_lm(tmp_path / "source", tmp_path / "out")
    assert_same_weights(weights(tmp_path / "out/release"), expected(whole))
    found = examine(tmp_path / "out")
    assert (problems(found), found.layout, found.payload.iteration) == ([], "release", 0)
    assert facts(found.payload.args) == facts(found.payload.args) | facts(args)
    assert found.payload.parallelism == {"TP": 1, "PP": 1, "EP": 1}


def test_entries_of_fsdp2_become_a_release(tmp_path):
    whole = whole_model()
    entries = {f"model.{name}": weight for name, weight in whole.items()}
    entries |= {"args": args_of(ckpt_format="torch_dcp", **USUAL), "iteration": 7, "checkpoint_version": 3.0}
    dcp.save(entries, storage_writer=dcp.FileSystemWriter(root(tmp_path / "source", "7")), no_dist=True)
    import_megatron_lm(tmp_path / "source", tmp_path / "out")
    assert_same_weights(weights(tmp_path / "out/release"), expected(whole))


@pytest.mark.parametrize("family", ["llama-3", "qwen3-moe", "deepseek-v3"])
def test_a_release_of_a_release_is_the_same(tmp_path, family):
    """Without its run config, and so by its args alone."""
    AutoBridge.import_ckpt(save_hf_model(tmp_path / "hf", family), tmp_path / "first")
    (tmp_path / "first/release/run_config.yaml").unlink()
    import_megatron_lm(tmp_path / "first", tmp_path / "second")
    assert_same_weights(weights(tmp_path / "first/release"), weights(tmp_path / "second/release"))
    first, second = (facts(examine(tmp_path / each).payload.args) for each in ("first", "second"))
    assert first == second


# name: (what the args say otherwise, part of the message)
REFUSED = {
    "hybrid": ({"hybrid_layer_pattern": "M*"}, "is a hybrid model (hybrid_layer_pattern), expected a GPT"),
    "unsaid": (
        {"attention_output_gate": True},
        "has attention_output_gate True, and a release",
    ),
    "another size": ({"num_layers": 6}, "num_layers is 6 by the args and 4 in the weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_release_cannot_say_is_refused(tmp_path, name):
    changed, message = REFUSED[name]
    save_ranks(root(tmp_path / "source"), whole_model(), args_of(**{**USUAL, **changed}))
    with pytest.raises(ValueError) as refused:
        import_megatron_lm(tmp_path / "source", tmp_path / "out")
    assert message in str(refused.value) and not (tmp_path / "out/release").exists()


def test_a_root_with_training_checkpoints_is_refused(tmp_path):
    save_ranks(root(tmp_path / "source", "7"), whole_model(), args_of(**USUAL), iteration=7)
    with pytest.raises(FileExistsError, match="holds training iteration 7"):
        import_megatron_lm(tmp_path / "source", tmp_path / "source")
