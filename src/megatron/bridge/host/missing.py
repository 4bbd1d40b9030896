# SPDX-License-Identifier: Apache-2.0
"""Errors that name what this host lacks."""

import re
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from megatron.bridge.host import accelerator


__all__ = ["explain_missing"]

P = ParamSpec("P")
T = TypeVar("T")

# Messages that a missing package or device causes. Megatron Core replaces what it can't import by None, or by a mock
# that raises StopIteration.
_MISSING = re.compile(
    r"No module named|not installed|[Pp]lease install|'NoneType' object|CUDA|NVIDIA driver|"
    r"Transformer Engine|TESpecProvider|\bTE\b|torch LayerNorm"
)


def explain_missing(convert: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Decorates a method of `AutoBridge` to report that this host can't convert the model, if that is why it fails.

    Raises:
        RuntimeError: The model needs what this host lacks. The original error is its cause.
    """

    @wraps(convert)
    def wrapper(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return convert(self, *args, **kwargs)
        except Exception as error:
            from megatron.core.extensions.transformer_engine import HAVE_TE

            present = {"Transformer Engine": HAVE_TE, "accelerator": accelerator.is_available()}
            missing = [name for name, is_present in present.items() if not is_present]
            if not missing or not (isinstance(error, ImportError | StopIteration) or _MISSING.search(str(error))):
                raise
            architecture = self._causal_lm_architecture
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
            them = "them" if len(missing) > 1 else "it"
            raise RuntimeError(
                f"{getattr(architecture, '__name__', architecture)} can't be converted on this host, which has no "
                f"{' and no '.join(missing)}: {reason}. Convert it on a host that has {them}."
            ) from error

    return wrapper
