# SPDX-License-Identifier: Apache-2.0
"""The process of a proof: computes a model's logits twice, and answers how far they are apart.

It reads one JSON document from stdin and writes one to stdout. `proof.py` starts it.
"""

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from megatron.bridge.utils.deferred import lean_imports


def compare(task: str, request: dict[str, Any]) -> dict[str, Any]:
    """Compare transformers' logits with those of one of Megatron Core's models.

    Args:
        task: "megatron-lm" or "bridge".
        request: `source` (a Hugging Face model), `payload` (a folder), `flags`, `length` (in tokens), `dtype` (to
            which weights are rounded, or None), `trust_remote_code` and `adapter` (a folder, or None).

    Returns:
        `figures` and `tokens`, or `error` and who raised it, `by`.
    """
    by = "transformers"
    try:
        tokens, exact = transformers_logits(**{key: request[key] for key in _OF_TRANSFORMERS})
        by = task
        with tempfile.TemporaryDirectory() as folder:
            root = release_root(Path(folder), Path(request["payload"]))
            found = megatron_logits(task, root, request, tokens)[..., : exact.shape[-1]]
        return {"figures": figures(found, exact, tokens), "tokens": tokens.numel()}
    except BaseException as error:  # Megatron-LM's parser exits, and PyTorch's CheckpointException is no Exception
        traceback.print_exc()
        return {"error": in_one_line(error), "by": by}


def make_and_import_twin(request: dict[str, Any]) -> dict[str, Any]:
    """Write the twin of `source` into the folder `twin`, and import it as the release checkpoint `megatron`.

    Returns:
        `args`, those of Megatron-LM for the whole model, or `error` and `by`.
    """
    by = "transformers"
    try:
        from transformers import AutoConfig

        from megatron.bridge.verify.twin import make_twin, why_no_twin

        trust = request["trust_remote_code"]
        config = AutoConfig.from_pretrained(request["source"], trust_remote_code=trust)
        if (reason := why_no_twin(config.to_dict())) is not None:
            return {"error": reason, "by": "config"}
        make_twin(request["source"], Path(request["twin"]), trust)
        by = "import"
        from megatron.bridge import AutoBridge
        from megatron.bridge.release_checkpoint.args import megatron_lm_args

        provider = AutoBridge.from_hf_pretrained(request["source"], trust_remote_code=trust).to_megatron_provider(
            load_weights=False
        )
        provider.finalize()
        AutoBridge.import_ckpt(request["twin"], request["megatron"], trust_remote_code=trust)
        return {"args": vars(megatron_lm_args(provider))}
    except BaseException as error:
        traceback.print_exc()
        return {"error": in_one_line(error), "by": by}


def in_one_line(error: BaseException) -> str:
    """Return what an error says. PyTorch's errors of checkpoints hold a traceback, whose last line says it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return (
        lines[-1]
        if "Traceback (most recent call last)" in str(error)
        else f"{type(error).__name__}: {' '.join(lines)}"
    )


_OF_TRANSFORMERS = ("source", "length", "dtype", "trust_remote_code", "adapter")


def transformers_logits(
    source: str, length: int, dtype: str | None, trust_remote_code: bool, adapter: str | None
) -> tuple[Any, Any]:
    """Return fixed tokens, `[1, length]`, and transformers' logits for them, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager", trust_remote_code=trust_remote_code
    ).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    config = model.config.get_text_config()
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    tokens = torch.randint(3, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        if dtype is not None:
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, dtype)))
        return tokens, model(tokens, use_cache=False).logits.float()


def release_root(folder: Path, payload: Path) -> Path:
    """Make a root whose release is this payload, wherever it lies."""
    (folder / "release").symlink_to(payload.absolute(), target_is_directory=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    return folder


def megatron_logits(task: str, root: Path, request: dict[str, Any], tokens: Any) -> Any:
    """Return the logits of one of Megatron Core's models."""
    from megatron.bridge.verify import megatron_models, without_cuda

    without_cuda.answer_for_cuda()
    if task == "bridge":
        model = megatron_models.bridge_model(root, request["source"], request["trust_remote_code"])
    else:
        model = megatron_models.megatron_lm_model(root, request["flags"], tokens.shape[1])
    return megatron_models.logits(model, tokens)


def figures(found: Any, exact: Any, tokens: Any) -> dict[str, float]:
    """Return the figures of a verdict for logits `[1, tokens, vocabulary]`."""
    from torch.nn.functional import cross_entropy, kl_div, log_softmax

    found, exact = found[0].double(), exact[0].double()
    after = tokens[0, 1:]
    values = {
        "largest_difference": (found - exact).abs().max(),
        "largest_logit": exact.abs().max(),
        "kl_divergence": kl_div(
            log_softmax(found, -1), log_softmax(exact, -1), reduction="batchmean", log_target=True
        ),
        "loss_transformers": cross_entropy(exact[:-1], after),
        "loss_megatron": cross_entropy(found[:-1], after),
    }
    return {name: value.item() for name, value in values.items()}


def prepare(task: str) -> None:
    """Import what a task needs, and nothing that only trainings use. The request may still be in the making."""
    if task == "megatron-lm":
        from megatron.bridge.verify import without_cuda

        without_cuda.leave_out_optional_packages()
    with lean_imports():
        from transformers import AutoModelForCausalLM  # noqa: F401

        if task == "megatron-lm":
            from megatron.training import arguments, checkpointing  # noqa: F401
        else:
            from megatron.bridge import AutoBridge  # noqa: F401


def main() -> None:
    """Answer one request."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print must not stand beside the answer
    task = sys.argv[1]
    prepare(task)
    request = json.load(sys.stdin)
    json.dump(make_and_import_twin(request) if task == "twin" else compare(task, request), answers)
    answers.close()


if __name__ == "__main__":
    main()
