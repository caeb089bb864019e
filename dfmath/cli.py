"""The command line: its commands, and how whatever goes wrong is said."""

from __future__ import annotations

import re
import signal
import sys
from difflib import get_close_matches
from typing import Annotated, Any

INTERRUPTED = 130
_OTHER_NAMES = {"explore": "look", "ot_check": "ot-test", "likelihood": "nll"}  # of the functions behind commands


def _fail(message: str, code: int) -> None:
    print(f"dfmath: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _interrupted() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would end the shutdown in a traceback
    _fail("interrupted", INTERRUPTED)


try:
    import typer

    from dfmath.cli_bench import bench
    from dfmath.cli_fisher import fisher
    from dfmath.cli_info import info
    from dfmath.cli_look import look
    from dfmath.cli_nll import nll
    from dfmath.cli_reproduce import reproduce
    from dfmath.cli_transport import ot_test
    from dfmath.cli_verify import verify
except KeyboardInterrupt:
    _interrupted()

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command line; whatever is wrong with the input is one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        _interrupted()
    except (ValueError, TypeError, OSError) as error:
        _fail(str(error), 2)
    except Exception as error:
        # Usage errors of the option parser know their own text; anything else is a bug and keeps its traceback.
        if hasattr(error, "format_message"):
            _fail(error.format_message() + _usage_hint(error), 2)
        if type(error).__name__ == "Abort":
            _interrupted()
        raise
    if code == INTERRUPTED:  # the option parser turns an interruption into its exit code, without a word
        _interrupted()
    sys.exit(code or 0)


def _usage_hint(error: Any) -> str:
    """What to do about a file given without its option."""
    command = getattr(getattr(error, "ctx", None), "command", None)
    takes_data = any(parameter.name == "data" for parameter in getattr(command, "params", ()))
    if takes_data and "extra argument" in str(error):
        return "; name a file of points with --data FILE"
    return _near_command(error)


def _near_command(error: Any) -> str:
    """The command that was meant, by its own name or by that of its function."""
    asked = re.fullmatch(r"No such command '(.*)'\.", error.format_message())
    if asked is None:
        return ""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {**{name: name for name in commands}, **_OTHER_NAMES}
    near = [name for name in known if name.startswith(asked[1])] or get_close_matches(asked[1], known, n=1)
    return f" Did you mean {known[near[0]]!r}?" if near else " dfmath --help lists them."


def _print_version(wanted: bool) -> None:
    if wanted:
        from dfmath import __version__

        print(f"dfmath {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Second-order quantities of diffusion models, exact where there is a closed form."""
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command()(verify)
app.command()(fisher)
app.command("ot-test")(ot_test)
app.command()(nll)
app.command()(look)
app.command()(info)
app.add_typer(bench, name="bench")
app.command()(reproduce)
