"""
What a person sees of the demo: its progress, and what came of it.
"""

import collections.abc
import contextlib
import re
import sys
import time

import rich.console
import rich.padding
import rich.table
import rich.text

from testbed.client import Call, LogRecord, Resource

# Where there is no terminal to ask for its width.
_WIDTH = 80

# How much of an error to show: what a host has of interpreters, say, can be a long list.
_ERROR = 360


class Stage:
    """
    A step of the demo, while it goes on.

    :param console: Where to show it.
    :param title: What it does.
    """

    def __init__(self, console: rich.console.Console, title: str) -> None:
        self.outcome = title
        """What to say when it is done."""
        self._console = console
        self._title = title
        self._shown = ""
        self._status = console.status(title)

    @contextlib.contextmanager
    def running(self) -> collections.abc.Iterator["Stage"]:
        """Show that it goes on and, at the end, what came of it and how long it took."""
        begin = time.monotonic()
        self._without_terminal(f"  {self._title} ...")
        mark, text = "[bold red]✘", self._title
        try:
            with self._status:
                yield self
            mark, text = "[bold green]✔", self.outcome
        finally:
            line = rich.table.Table.grid(expand=False)
            line.add_column(width=2)
            line.add_column(width=min(self._console.width, _WIDTH) - 12)
            line.add_column(width=9, justify="right", style="dim")
            line.add_row(mark, text, f"{time.monotonic() - begin:.1f} s")
            self._console.print(line, highlight=False)

    def progress(self, text: str) -> None:
        """Show how far it is."""
        if text != self._shown:
            self._shown = text
            self._status.update(f"{self._title}: {text}")
            self._without_terminal(f"    {text}")

    def _without_terminal(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(f"[dim]{text}", highlight=False)


class Show:
    """
    Writes to the terminal, or to a log, where there is none.

    :param console: Where to write, by default the standard output.
    """

    def __init__(self, console: rich.console.Console | None = None) -> None:
        if console is None:
            reconfigure = getattr(sys.stdout, "reconfigure", None)
            if reconfigure is not None:
                # A mark that the terminal has no character for is no reason to fail.
                reconfigure(errors="replace", line_buffering=True)
            console = rich.console.Console(width=None if sys.stdout.isatty() else _WIDTH)
        self.console = console

    def stage(self, title: str) -> contextlib.AbstractContextManager[Stage]:
        """Show what is going to happen, and how far it is."""
        return Stage(self.console, title).running()

    def say(self, text: str = "") -> None:
        """Print a line, with rich's markup."""
        self.console.print(text, highlight=False)

    def command(self, text: str) -> None:
        """Print what can be typed, on one line however wide the terminal is."""
        self.console.print(
            f"    {text}", style="cyan", soft_wrap=True, highlight=False, markup=False
        )

    def failure(self, what: str, logs: str) -> None:
        """
        Print what went wrong.

        :param what: What went wrong.
        :param logs: The end of the logs that may tell why.
        """
        if logs.strip():
            self.console.print(logs, style="dim", highlight=False, markup=False)
        self.console.print(f"✘ {what}", style="bold red", highlight=False, markup=False)

    def resources(
        self,
        deployed: collections.abc.Sequence[tuple[Resource, list[LogRecord]]],
        *,
        ways: collections.abc.Mapping[str, str],
        wanted_state: collections.abc.Callable[[str], str],
        directory: str,
    ) -> None:
        """
        Show what became of the resources, and how.

        :param deployed: The resources, each with its log.
        :param ways: How each agent reaches its host, in the order to show them in.
        :param wanted_state: The state that the resources of an agent should be in.
        :param directory: A path that is shown as an ellipsis.
        """
        for agent, way in ways.items():
            self.say(f"[bold underline]{agent}[/] [dim]{way}[/]")
            rows = [pair for pair in deployed if pair[0].agent == agent]
            for resource, log in sorted(rows, key=lambda pair: pair[0].type, reverse=True):
                line = _state_text(resource.state, wanted_state(agent))
                line.append(f"  {resource.type} ", "bold default")
                line.append(_shorten(resource.value, directory), "default")
                self._indented(line, 2)
                for record in log:
                    if record.call is not None:
                        self._indented(call_text(record.call, directory), 6)
                    elif record.level in ("ERROR", "CRITICAL"):
                        self._indented(_error_text(record, directory), 6)
            self.say()

    def _indented(self, text: rich.text.Text, columns: int) -> None:
        self.console.print(
            rich.padding.Padding(text, (0, 0, 0, columns), expand=False), highlight=False
        )


def call_text(call: Call, directory: str) -> rich.text.Text:
    """
    Return the call as one would write it, and what it returned.

    :param call: A call.
    :param directory: A path that is shown as an ellipsis.
    """
    module, _, name = call.function.rpartition(".")
    # The module's own functions are known by their names.
    module = f"{module}." if module not in ("", "inmanta_mitogen") else ""
    text = rich.text.Text(module, "dim")
    text.append(name, "bold cyan")
    # A mode is what nobody reads as a decimal number.
    show = _mode_text if name == "chmod" else _value_text
    arguments = [show(value) for value in call.args]
    arguments += [f"{key}={_value_text(value)}" for key, value in call.kwargs.items()]
    text.append(_shorten(f"({', '.join(arguments)})", directory), "default")
    if call.exception is not None:
        text.append(" ✘ ", "bold red")
        text.append(_shorten(call.exception, directory), "red")
    else:
        text.append(" → ", "dim")
        text.append(_shorten(_value_text(call.result), directory), "green")
    return text


def _mode_text(value: object) -> str:
    return f"0o{value:o}" if isinstance(value, int) else _value_text(value)


def _value_text(value: object) -> str:
    # Bytes, and what was too long to log, come as the text of what they were.
    if isinstance(value, str) and (
        re.match(r"""b['"]|[\[{("]""", value) or value.endswith("<...>")
    ):
        return value
    return repr(value)


def _error_text(record: LogRecord, directory: str) -> rich.text.Text:
    text = rich.text.Text("✘ ", "bold red")
    error = str(record.values.get("exception") or record.message)
    name, bracket, rest = error.partition("(")
    if bracket and name.isidentifier():
        text.append(name, "bold red")
        error = ": " + rest.removesuffix(")").strip("'\"")
    error = _shorten(error, directory).replace("\\n", "\n")
    text.append(error if len(error) <= _ERROR else error[:_ERROR] + " …", "red")
    return text


def _state_text(state: str, wanted: str) -> rich.text.Text:
    if state != wanted:
        return rich.text.Text(f"{state}, not {wanted}", "bold red")
    if state == "deployed":
        return rich.text.Text(state, "bold green")
    return rich.text.Text(f"{state} as expected", "green")


def _shorten(text: str, directory: str) -> str:
    return text.replace(directory, "…")
