"""Texts that a host wrote, made fit for logs and exceptions."""

import re

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def bounded_text(text: str, limit: int) -> str:
    """
    :param text: Any text.
    :param limit: The greatest length of what is kept, in characters.
    :return: The text with control characters and lone surrogates as Python escapes them, but for
        tabs and ends of lines. Of a text beyond the limit, the middle is replaced by a note.
    """
    if len(text) > limit:
        half = limit // 2
        note = f" <... {len(text) - 2 * half} characters ...> "
        text = text[:half] + note + text[len(text) - half :]
    return _CONTROL.sub(lambda found: repr(found.group())[1:-1], text)
