# SPDX-License-Identifier: Apache-2.0
"""The command `megatron-bridge`, with a module for each subcommand.

A subcommand imports torch and AutoBridge when it runs, and only if it needs them.
"""

import importlib
import importlib.util
import signal
from typing import Any

import click


__all__ = ["main"]

SUBCOMMANDS = {
    "completion": "completion",
    "export": "export",
    "families": "families",
    "import": "import_",
    "inspect": "inspect",
    "repair": "repair",
    "verify": "verify",
}
"""The module of each subcommand, which has it as `command`. A subcommand is there when its module is."""


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, module in SUBCOMMANDS.items() if importlib.util.find_spec(f"{__name__}.{module}")]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        return importlib.import_module(f"{__name__}.{SUBCOMMANDS[name]}").command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a subcommand. Of several ranks that are interrupted, none says so: whoever started them does."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            from megatron.bridge.host import processes

            if processes.in_group():
                raise SystemExit(1) from None
            raise


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Convert checkpoints between Hugging Face and Megatron-LM, inspect them, and repair them."""
    # Batch systems send SIGTERM. As a KeyboardInterrupt it lets a subcommand remove what it has half written.
    # A rank of `--processes` has a handler of its own.
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
