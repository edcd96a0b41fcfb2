"""Connects interpreters, on the agent and on each host that leads to another one."""

import base64
import contextlib
import os
import re
import signal
import subprocess
import zlib
from typing import Any, Dict, List, Match

import mitogen.core
import mitogen.parent


class Watched:
    """What a connection of this module does beyond mitogen's own; mixed into one of its classes."""

    def create_child(self, **options: Any) -> Any:
        """As mitogen's own, in a session of its own, which mitogen gives to terminals alone."""
        start = super().create_child  # type: ignore[misc]  # mitogen's
        requires_pty = getattr(self, "_requires_pty", None)
        if start is mitogen.parent.create_child:
            # Or what a local interpreter says before it fails goes to whoever looks at stderr.
            options.setdefault("stderr_pipe", not options.get("merge_stdio"))
        if start is mitogen.parent.create_child or (requires_pty and not requires_pty()):
            options["preexec_fn"] = os.setsid
        return start(**options)

    def get_boot_command(self) -> List[str]:
        """
        As mitogen's own, with a first stage that ends when its interpreter does, and an ssh that
        tells why it failed.
        """
        command = super().get_boot_command()  # type: ignore[misc]  # mitogen's
        words = ["LogLevel INFO" if word == "LogLevel ERROR" else word for word in command]
        return [_ENCODED.sub(_end_with_interpreter, word) for word in words]

    def stderr_stream_factory(self) -> Any:
        """As mitogen's own, which takes a server's banner for a prompt when ssh shows it."""
        stream = super().stderr_stream_factory()  # type: ignore[misc]  # mitogen's
        prompts = getattr(stream.protocol, "PARTIAL_PATTERNS", ())
        if getattr(self, "_requires_pty", None) and self.options.password is None:  # type: ignore[attr-defined]
            stream.protocol.PARTIAL_PATTERNS = [(_PROMPT, _on_prompt), *prompts[1:]]
        return stream

    def _complete_connection(self) -> None:
        lines = getattr(self.stdio_stream and self.stdio_stream.protocol, "logged_lines", ())  # type: ignore[attr-defined]
        versions = _VERSION.findall(b"\n".join(line for _, line in lines))
        self.context.python_version = versions[-1].decode() if versions else ""  # type: ignore[attr-defined]
        super()._complete_connection()  # type: ignore[misc]  # mitogen's

    def _streams(self) -> List[Any]:
        return [stream for stream in (self.stdio_stream, self.stderr_stream) if stream]  # type: ignore[attr-defined]

    def _on_timer_expired(self) -> None:
        # Mitogen's own drops what came back before, such as a question that nobody answered.
        lines = [mitogen.parent.Router.connection_timeout_msg]  # type: List[str]
        history = mitogen.parent.get_history(self._streams())
        if history:
            lines.append(history)
        for stream in self._streams():
            partial = getattr(stream.protocol, "logged_partial", None) or b""
            if partial.strip():
                lines.append(WAITING + partial[-500:].decode("utf-8", "replace").strip())
        self._fail_connection(mitogen.core.StreamError("\n".join(lines)))

    def _fail_connection(self, error: Exception) -> None:
        if type(error).__name__ == "PasswordError":
            # Why a password is asked for, or does not do, may have come before: it has expired.
            error.args = (f"{mitogen.parent.get_history(self._streams())}\n{error}",)
        # Mitogen asks the program to leave, and forgets what that has started.
        process = self.proc  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            if process is not None and os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, signal.SIGKILL)
        super()._fail_connection(error)  # type: ignore[misc]  # mitogen's


WAITING = "it waits after: "
"""What comes in front of the last line that had no end: a prompt, when a connection timed out."""

# What the first stage says of itself.
_VERSION = re.compile(rb"\[\[Python (\d[\d.]{1,20})\]\]")
_PROMPT = re.compile(b"assword: ?$")
_ENCODED = re.compile("[A-Za-z0-9+/]{200,}={0,2}")


_mitogens_popen = mitogen.parent.popen


def _popen(preexec_fn: Any = None, **options: Any) -> Any:
    """
    As mitogen's own, which copies this whole process for a function to call in the child: Python's
    own way to a session needs no copy.
    """
    if preexec_fn is os.setsid and not mitogen.parent._preexec_hook:
        return subprocess.Popen(start_new_session=True, **options)
    return _mitogens_popen(preexec_fn=preexec_fn, **options)


mitogen.parent.popen = _popen


def _on_prompt(protocol: Any, line: bytes, match: Any) -> None:
    import mitogen.ssh

    error = mitogen.ssh.PasswordError(mitogen.ssh.password_required_msg)
    protocol.stream.conn._fail_connection(error)


def _end_with_interpreter(encoded: Match[str]) -> str:
    # Mitogen's first stage forks: one process becomes the interpreter, the other one writes the
    # source into its pipe, of which it holds the read end too. So where the interpreter dies, the
    # writer would wait forever, and keep the connection open until it times out.
    try:
        source = zlib.decompress(base64.b64decode(encoded.group()), -zlib.MAX_WBITS)
    except (ValueError, zlib.error):
        return encoded.group()
    version = b"os.write(1,('[[Python %d.%d.%d]]\\n'%sys.version_info[:3]).encode());"
    more = b"os.close(R);os.close(r);" + version
    source = source.replace(b"os.write(1,'MITO000", more + b"os.write(1,'MITO000")
    # Its complaint about the closed pipe would be the last word, in place of the interpreter's.
    source = source.replace(b"os.close(2)", b"").replace(
        b"f=os.fdopen(W", b"os.close(2);f=os.fdopen(W"
    )
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return base64.b64encode(compressor.compress(source) + compressor.flush()).decode()


def watched(connection_class: Any) -> Any:
    """
    Return one of mitogen's ways to connect as a :class:`Watched` one, under its own name.

    :param connection_class: A subclass of ``mitogen.parent.Connection``.
    """
    names = {"__module__": connection_class.__module__, "__qualname__": connection_class.__name__}
    return type(connection_class.__name__, (Watched, connection_class), names)


@mitogen.core.takes_econtext  # type: ignore[untyped-decorator]  # mitogen is not typed
def connect(method_name: str, name: Any, kwargs: Dict[str, Any], econtext: Any) -> Dict[str, Any]:
    """
    Connect an interpreter from this one.

    :param method_name: The connection method.
    :param name: The name of the new context, or None.
    :param kwargs: The options of the method.
    :param econtext: mitogen's description of this interpreter, which mitogen passes.
    :return: What ``mitogen.parent._proxy_connect`` returns: ``id`` and ``name`` of the context, or
        why there is none in ``msg``; and the version of its Python.
    """
    mitogen.parent.upgrade_router(econtext)
    connection_class = watched(mitogen.parent.get_connection_class(method_name))
    try:
        context = econtext.router._connect(connection_class, name=name, **kwargs)
    except mitogen.core.StreamError as error:
        return {"id": None, "name": None, "msg": f"error occurred on host {os.uname()[1]}: {error}"}
    python = context.python_version
    return {"id": context.context_id, "name": context.name, "msg": None, "python": python}


def end(connection: Any, broker: Any) -> None:
    """
    End a connection, whatever its other end does.

    :param connection: A ``mitogen.parent.Connection``.
    :param broker: The broker; this runs on its thread.
    """
    # The end of its terminal ends a sudo that this user may send no signal to.
    for stream in (connection.stdio_stream, connection.stderr_stream):
        if stream and not stream.receive_side.closed:
            stream.on_disconnect(broker)
    # Politely first: an interpreter that runs a command has to hand it over. What is frozen
    # doesn't know of the first signal.
    _signal(connection.proc, signal.SIGTERM)
    broker.timers.schedule(mitogen.core.now() + 1, lambda: _signal(connection.proc, signal.SIGKILL))


def _signal(process: Any, number: int) -> None:
    with contextlib.suppress(OSError):  # it may be root's
        process.send_signal(number)


@mitogen.core.takes_econtext  # type: ignore[untyped-decorator]  # mitogen is not typed
def cut(context_id: int, econtext: Any) -> None:
    """
    End the connection to an interpreter that was connected from this one.

    :param context_id: Its mitogen context id.
    :param econtext: mitogen's description of this interpreter, which mitogen passes.
    """
    stream = econtext.router.stream_by_id(context_id)
    if stream is not None and stream.protocol.remote_id == context_id:
        econtext.broker.defer(end, stream.conn, econtext.broker)
