"""``torchft``: the full tool. A subcommand's module is imported when it is called: most need no torch."""

from __future__ import annotations

import importlib

import click

import torchft

__all__ = ["cli", "main"]

_COMMANDS = {
    "lighthouse": ("torchft.cli.lighthouse", "Run the job's lighthouse."),
    "simulate": ("torchft.cli.simulate", "Run the control protocol under thousands of random faults."),
    "demo": ("torchft.cli.demo", "Watch two replica groups train, join late, die and recover."),
}


class _Lazy(click.Group):
    """A group of commands that live in modules of their own."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(_COMMANDS[cmd_name][0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(torchft.__version__, prog_name="torchft")
def cli() -> None:
    """Fault tolerance for PyTorch training, per step."""


def main() -> None:
    """The ``torchft`` command."""
    cli(prog_name="torchft")


if __name__ == "__main__":
    main()
