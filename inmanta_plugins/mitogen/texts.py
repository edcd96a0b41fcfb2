"""How contexts, and texts that a host wrote, are shown in logs and exceptions."""

import re
from collections.abc import Mapping
from typing import Any

from inmanta_plugins.mitogen import settings

# The options that tell where a context is; the first one that is set counts.
_ADDRESSES = ("hostname", "container", "image", "pod")
# The methods that lead to root where no username is set.
_ROOT_BY_DEFAULT = ("sudo", "su", "doas", "setns")

# Control characters but for tab and newline, lone surrogates, and what is invisible, ends a line or
# changes the direction of text.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def bounded_text(text: str, limit: int) -> str:
    """
    Return a text with control characters and lone surrogates as Python escapes them, but for tabs
    and ends of lines.

    Of a text beyond the limit, the middle is replaced by a note.

    :param text: Any text.
    :param limit: The greatest length of what is kept, in characters.
    """
    if len(text) > limit:
        half = limit // 2
        note = f" <... {len(text) - 2 * half} characters ...> "
        text = text[:half] + note + text[len(text) - half :]
    return _CONTROL.sub(lambda found: repr(found.group())[1:-1], text)


def hops_of(serialized_context: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """
    Return the hops of a context in the order in which they are connected, so the context itself
    comes last.

    No more than one above `settings.MAX_HOPS`.

    :param serialized_context: A serialized context, perhaps one of the wrong form.
    """
    hops: list[Mapping[str, Any]] = []
    hop: object = serialized_context
    while isinstance(hop, Mapping) and len(hops) <= settings.MAX_HOPS:
        hops.append(hop)
        hop = hop.get("via")
    return hops[::-1]


def address_of(hop: Mapping[str, Any]) -> str:
    """
    Return where a hop is: host name and port (unless that is 22), container or pod.

    Empty for a method that stays on its machine.

    :param hop: A serialized context.
    """
    address = next(
        (text for text in map(hop.get, _ADDRESSES) if text and isinstance(text, str)), ""
    )
    port = hop.get("port")
    if not address or type(port) is not int or port == 22 or not 0 < port < 65536:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def user_of(hop: Mapping[str, Any]) -> str | None:
    """
    Return the user at the far end of a hop; None where neither the context nor mitogen says who.

    :param hop: A serialized context.
    """
    user = hop.get("username")
    if user and isinstance(user, str):
        return user
    return "root" if hop.get("method_name") in _ROOT_BY_DEFAULT else None


def describe_hop(hop: Mapping[str, Any]) -> str:
    """
    Return what people call a hop, without those before it.

    ``ssh probe@10.0.0.1:2222``, ``sudo root``, ``docker web``, ``local``; with its name, if it has
    one, ``web1 (ssh probe@10.0.0.1)``.

    :param hop: A serialized context.
    """
    method = hop.get("method_name")
    address, user = address_of(hop), user_of(hop)
    where = f"{user}@{address}" if user and address else address or user or ""
    place = f"{method if isinstance(method, str) else 'no method_name'} {where}".rstrip()
    name = hop.get("name")
    return f"{name} ({place})" if name and isinstance(name, str) else place


def describe_context(serialized_context: Mapping[str, Any]) -> str:
    """
    Return what people call a context, and each hop on the way.

    ``sudo root via web1 (ssh probe@10.0.0.1)``.

    :param serialized_context: A serialized context.
    """
    return " via ".join(describe_hop(hop) for hop in reversed(hops_of(serialized_context)))
