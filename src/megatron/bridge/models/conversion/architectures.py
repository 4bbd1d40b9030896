# SPDX-License-Identifier: Apache-2.0
"""Which class of transformers makes the model of a config."""

from typing import Any


def check_named(config: Any, path: str | None) -> None:
    """Refuse a config without `architectures`, by which Bridge goes. transformers goes by `model_type`.

    Args:
        config: A Hugging Face config.
        path: Where it is from.

    Raises:
        ValueError: It names none.
    """
    if getattr(config, "architectures", None):
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = getattr(config, "model_type", None)
    made = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind or "")
    example = f'"architectures": ["{made}"]' if made else "those of the published model"
    raise ValueError(
        f"Model architecture not supported by AutoBridge: config.json of {path} has none. Add {example} to it"
        + f", which transformers makes of the model_type {kind!r}" * bool(made)
    )


def has_own_code(config: Any) -> bool:
    """Return whether transformers makes the model by its own code, although `auto_map` names code of the checkpoint.

    It does so without `trust_remote_code`, for each model type that it has: the class of the config is then its own.
    """
    code = getattr(config, "auto_map", None) or {}
    model = str(code.get("AutoModelForCausalLM", "")).rpartition(".")[2]
    own = type(config).__module__.startswith("transformers.models.")
    return own and "AutoConfig" in code and model not in (getattr(config, "architectures", None) or ())
