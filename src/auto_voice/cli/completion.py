"""``autovoice completion``: what a shell needs to complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = {
    "bash": ("~/.bashrc", 'eval "$(autovoice completion bash)"'),
    "zsh": ("~/.zshrc", 'eval "$(autovoice completion zsh)"'),
    "fish": ("~/.config/fish/completions/autovoice.fish", "autovoice completion fish | source"),
}
VARIABLE = "_AUTOVOICE_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(list(SHELLS)))
@click.option("--how", is_flag=True, help="Say which line to put where.")
def completion(shell: str, how: bool) -> None:
    """Print the script that completes autovoice in SHELL.

    \b
    autovoice completion bash --how
    eval "$(autovoice completion bash)"
    """
    if how:
        file, line = SHELLS[shell]
        click.echo(f"add this line to {file} and open a new shell:\n{line}")
        return
    from auto_voice.cli.main import cli

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "autovoice", VARIABLE).source())
