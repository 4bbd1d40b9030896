# SPDX-License-Identifier: Apache-2.0
"""The config of an export says what was trained: the checkpoint's own args decide, and the shapes of its weights.

While an export runs, the bridge's config has the values of the checkpoint. Whether a config says them isn't looked up
in a table: Bridge makes its model of the changed config, and that model has to have the args of the checkpoint.
"""

import copy
import functools
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from megatron.bridge.models.conversion import trained_keys, trained_weights
from megatron.bridge.models.hf_pretrained import source_config
from megatron.bridge.release_checkpoint import weights
from megatron.bridge.release_checkpoint.architecture import UNSAID, differ, facts
from megatron.bridge.release_checkpoint.args import megatron_lm_args
from megatron.bridge.release_checkpoint.flags import BUILT_ROPE_SCALING_FACTOR, drops_rope_scaling_factor
from megatron.bridge.release_checkpoint.layout import RUN_CONFIG, is_payload, resolve_checkpoint
from megatron.bridge.release_checkpoint.payload import Payload, examine_payload, refuse_damage


if TYPE_CHECKING:
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

logger = logging.getLogger(__name__)

_OVERRIDES = "_of_the_checkpoint"
_SOURCE = "_config_of_the_source"


def follow_checkpoint(export: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate `AutoBridge.export_ckpt`: its bridge has the config of the checkpoint while it runs."""

    @functools.wraps(export)
    def exporting(self: "AutoBridge", megatron_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        with as_trained(self, megatron_path):
            return export(self, megatron_path, *args, **kwargs)

    return exporting


def overrides(bridge: "AutoBridge") -> dict[str, Any]:
    """Return the fields of the model provider that the checkpoint has otherwise than its run config may say."""
    return getattr(bridge, _OVERRIDES, {})


def source_of(bridge: "AutoBridge") -> Any | None:
    """Return the config that an export has changed, None if it is as it was."""
    return getattr(bridge, _SOURCE, None)


@contextmanager
def as_trained(bridge: "AutoBridge", megatron_path: str | os.PathLike) -> Iterator[None]:
    """Give the config of a bridge the values that a checkpoint was trained with, and take them back.

    Reads no weights. Every rank comes to the same result.

    Args:
        bridge: The bridge that exports.
        megatron_path: Checkpoint root or payload folder. A MultiStorageClient URL is left as it is.

    Raises:
        ValueError: The config can't say what was trained, or the checkpoint's args are not those of its weights.
    """
    folder = Path(resolve_checkpoint(megatron_path))
    if not folder.is_dir() or not is_payload(folder):
        yield
        return
    pretrained: Any = bridge.hf_pretrained
    alone = isinstance(pretrained, PretrainedConfig)
    source = pretrained if alone else pretrained.config
    config = copy.deepcopy(source)
    _set_config(bridge, config, alone)
    try:
        setattr(bridge, _OVERRIDES, _follow(bridge, config, examine_payload(folder)))
        if any(trained_keys.changes(source.to_dict(), config.to_dict())):
            setattr(bridge, _SOURCE, source)
        yield
    finally:
        for name in (_OVERRIDES, _SOURCE):
            vars(bridge).pop(name, None)
        _set_config(bridge, source, alone) if alone else setattr(pretrained, "config", source)


def _set_config(bridge: "AutoBridge", config: Any, alone: bool) -> None:
    if alone:
        bridge.hf_pretrained = config
    else:
        bridge.hf_pretrained.config = config


def _follow(bridge: "AutoBridge", config: Any, payload: Payload) -> dict[str, Any]:
    """Change the config as the payload says, and return the overrides of the run config."""
    refuse_damage(payload)
    before = bridge.to_megatron_provider(load_weights=False)
    args = _args_of(payload)
    if args is None:
        logger.warning(
            "%s holds no Megatron-LM args: RoPE, norm epsilon and what else the shapes of the weights don't say are "
            "those of config.json; pass the right --hf-model if they were trained otherwise",
            payload.path,
        )
    text = config.get_text_config()
    original = text.to_dict()
    changed = trained_weights.follow_rows(text, args, payload)
    trained_weights.follow_length(text, args)
    if args is not None:
        trained = facts(args)
        expected = _facts_of(before, trained)
        meant = _of_caller(bridge, expected) if _apart(trained, expected) else []
        trained = {name: value for name, value in trained.items() if name not in meant}
        names = _apart(trained, expected)
        if "rope" in trained and not hasattr(args, "bridge_provider") and _is_other_rope(text, before):
            names = list(dict.fromkeys([*names, "rope"]))
        for name in names:
            changed = True
            trained_keys.write(text, name, trained)
        after = bridge.to_megatron_provider(load_weights=False)
        _check_said(text, payload, trained, after)
        if changed and (wrong := trained_keys.other_function(text, after, before, original)):
            raise ValueError(
                f"config.json of {text.model_type} can't say what was trained, transformers would compute another "
                f"model: {'; '.join(wrong[:3])}. Train it with the flags that the import printed"
            )
        for line in _remarks(args):
            logger.warning("%s: %s", payload.path, line)
    else:
        after = bridge.to_megatron_provider(load_weights=False)
    shapes = Namespace(**vars(args or megatron_lm_args(after)) | {"padded_vocab_size": None})
    if wrong := weights.contradictions(shapes, payload.metadata):
        what = "args" if args is not None else "config.json"
        raise ValueError(
            f"{payload.path} holds other weights than its {what}: {'; '.join(wrong[:3])}. "
            "Pass the trained Hugging Face model with --hf-model (source_path), or download the checkpoint again"
        )
    for line in trained_keys.changes(original, text.to_dict()):
        logger.warning("config.json of the export says what was trained: %s", line)
    return _overrides(before, after, text, payload, args)


def _args_of(payload: Payload) -> Namespace | None:
    """Return the args of a payload, or those of its own run config, which Bridge's trainings save in their place."""
    if getattr(payload.args, "num_layers", None) is not None:
        return payload.args
    if not (payload.path / RUN_CONFIG).exists():
        return None
    from megatron.bridge.training.model_load_save import load_model_config

    provider, _ = load_model_config(str(payload.path))
    if not hasattr(provider, "activation_func"):
        return None
    return Namespace(**vars(megatron_lm_args(provider)), vocab_size=getattr(provider, "vocab_size", None))


def _is_other_rope(config: Any, provider: Any) -> bool:
    """Return whether transformers encodes positions by the config otherwise than Bridge's model of it."""
    from megatron.bridge.models.conversion import config_check, rope_scaling

    found = config_check.rope_problems(rope_scaling.own_config(config), provider)
    return config.model_type in config_check.FAMILIES and any(found)


def _remarks(args: Namespace) -> Iterator[str]:
    """Give what a training may have computed otherwise than its export does."""
    if not hasattr(args, "bridge_provider") and drops_rope_scaling_factor(args):
        yield (
            f"its args have --rope-scaling-factor {args.rope_scaling_factor}, which pretrain_gpt.py up to core 0.19 "
            "drops. If it was trained with that, unchanged, set the factor in config.json to "
            f"{BUILT_ROPE_SCALING_FACTOR}"
        )
    if (capacity := getattr(args, "moe_expert_capacity_factor", None)) is not None:
        yield f"it was trained with --moe-expert-capacity-factor {capacity}, transformers' model drops no tokens"
    if (spec := getattr(args, "spec", None)) and not getattr(args, "hybrid_layer_pattern", None):
        yield f"it was trained with --spec {spec}, and nothing compares these layers with those of transformers"


def _facts_of(provider: Any, trained: dict[str, Any]) -> dict[str, Any]:
    said = {name: getattr(provider, name, default) for name, default in UNSAID.items() if name in trained}
    found = facts(Namespace(**vars(megatron_lm_args(provider)) | said))
    if found.get("ffn_hidden_size", 0) is None:  # TransformerConfig.__post_init__ of Megatron Core sets it then
        found["ffn_hidden_size"] = 4 * provider.hidden_size
    return found


def _apart(trained: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the facts that differ. That the weights lack the prediction layers of a config is no difference."""
    return [
        name
        for name, value in trained.items()
        if name in expected and differ(value, expected[name]) and (name != "mtp_num_layers" or value)
    ]


def _of_caller(bridge: "AutoBridge", expected: dict[str, Any]) -> list[str]:
    """Return the facts that a caller has changed in the config of the bridge, which count as intended."""
    pretrained: Any = bridge.hf_pretrained
    if isinstance(pretrained, PretrainedConfig):
        return []
    config = pretrained.config
    source, now = source_config.configs(bridge, config.to_dict())
    if {**source, "dtype": None, "torch_dtype": None} == {**now, "dtype": None, "torch_dtype": None}:
        return []
    try:
        pretrained.config = type(config).from_dict(dict(source))
        of_source = _facts_of(bridge.to_megatron_provider(load_weights=False), expected)
    finally:
        pretrained.config = config
    if changed := [name for name, value in expected.items() if differ(value, of_source[name])]:
        logger.warning(
            "the config of the bridge was changed, %s: it goes before the checkpoint's args", ", ".join(changed)
        )
    return changed


def _check_said(config: Any, payload: Payload, trained: dict[str, Any], provider: Any) -> None:
    expected = _facts_of(provider, trained)
    wrong = [
        f"{name} is {_short(trained[name])} in the checkpoint and {_short(expected[name])} in the model of config.json"
        for name in _apart(trained, expected)
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{payload.path} was trained as another model than config.json of {config.model_type} can say: "
            f"{'; '.join(wrong[:3])}{more}. Pass the model that it was trained from with --hf-model (source_path), or "
            "train it with the flags that the import printed"
        )


def _overrides(before: Any, after: Any, config: Any, payload: Payload, args: Namespace | None) -> dict[str, Any]:
    names = ("num_layers", "share_embeddings_and_output_weights")
    values = {name: getattr(after, name, None) for name in names}
    values = {name: value for name, value in values.items() if value != getattr(before, name, None)}
    # Layers that a list says to be alike are stored one by one, those of a number are stacked.
    frequency = getattr(args, "moe_layer_freq", None)
    if frequency is not None and getattr(after, "num_moe_experts", None) and frequency != after.moe_layer_freq:
        values["moe_layer_freq"] = frequency
    if trained_weights.stored_rows(payload) not in (None, getattr(before, "vocab_size", None)):
        values |= {"vocab_size": config.vocab_size, "should_pad_vocab": False}
    if getattr(after, "mtp_num_layers", None) and not trained_weights.has_prediction_layers(payload):
        values["mtp_num_layers"] = 0
    return values | trained_weights.follow_precision(payload, config)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:100]}…"
