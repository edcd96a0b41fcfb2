"""Questions that a handler will ask, sent along with its first one.

Handlers ask a fixed sequence about one path: whether it exists, who owns it, what it holds. For
each type of resource a proxy remembers which questions about the same path followed the first one.
When the first is asked again, about another path, they go with it in the same message, and are
answered from what came back.
"""

import os
import queue
import time

import inmanta_mitogen
import inmanta_mitogen.dispatch
from inmanta_plugins.mitogen import settings
from inmanta_plugins.mitogen.connections.connection import Answer, Function

_QUESTIONS: frozenset[Function] = frozenset(
    {
        inmanta_mitogen.lexists,
        inmanta_mitogen.file_stat,
        inmanta_mitogen.hash_file,
        inmanta_mitogen.islink,
        inmanta_mitogen.read,
        inmanta_mitogen.read_binary,
        os.readlink,
    }
)


def path_of(function: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> str | None:
    """
    Return the path that a question is about, None for any other call.

    :param function: The function that is called.
    :param args: Its positional arguments.
    :param kwargs: Its keyword arguments.
    """
    if len(args) == 1 and not kwargs and type(args[0]) is str and function in _QUESTIONS:
        return args[0]
    return None


Inboxes = dict[Function, queue.SimpleQueue[Answer]]
"""Where the answers to questions come."""


def is_usable(answer: Answer) -> bool:
    """
    Return whether a prefetched answer stands for the one that the host would give now.

    :param answer: What came back.
    """
    return (
        not answer.is_dead
        and answer.data[:1] != inmanta_mitogen.dispatch.SKIPPED
        and time.monotonic() - answer.came <= settings.PREFETCHED_SECONDS
    )


class Prefetcher:
    """
    What one proxy has learned, and what it holds of answers to questions not yet asked.

    A proxy may be used by several threads. Each call of the proxy that is not answered from here
    calls :meth:`drop`, before it is sent and after it has ended; so an answer that is still held
    was given after all other calls.
    """

    def __init__(self) -> None:
        self._learned: dict[tuple[str, Function], tuple[Function, ...]] = {}
        # About which path, and where the answers come.
        self._held: tuple[str | None, Inboxes] = (None, {})
        self._resource_type: str | None = None
        self._path: str | None = None
        # About that path, in this order; nothing when there is nothing to be learned from them.
        self._asked: list[Function] = []

    def begin(self, resource_type: str) -> None:
        """
        Begin with a resource.

        :param resource_type: Its type.
        """
        self.end()
        self._resource_type = resource_type

    def end(self) -> None:
        """End with the resource: what is held is dropped."""
        self._learn()
        self.drop()
        self._resource_type = self._path = None

    def drop(self) -> None:
        """Drop what is held: another call may change what it is about."""
        self._held = (None, {})

    def take(self, function: Function, path: str | None) -> queue.SimpleQueue[Answer] | None:
        """
        Return where the answer comes to a question that was asked already, once.

        :param function: The question.
        :param path: Its path.
        """
        held_path, inboxes = self._held
        return inboxes.pop(function, None) if held_path == path else None

    def ask(self, function: Function, path: str | None) -> tuple[Inboxes, Inboxes]:
        """
        Note a call that goes to the host.

        :param function: The function that is called.
        :param path: The path of a question, None for any other call.
        :return: The questions to send along with it, and what gets them once they are sent: only
            then may somebody wait for an answer.
        """
        self.drop()
        if path is None:
            self._learn()
        elif path == self._path:
            self.note(function)
        elif self._resource_type is not None:
            self._learn()
            self._path, self._asked = path, [function]
            predicted = self._learned.get((self._resource_type, function), ())
            held: Inboxes = {}
            self._held = (path, held)
            return {question: queue.SimpleQueue() for question in predicted}, held
        return {}, {}

    def note(self, function: Function) -> None:
        """
        Note that a question was asked about the path at hand.

        :param function: The question.
        """
        if function in self._asked:
            self._learn()  # whoever asks again wants to know what has changed
        elif self._asked:
            self._asked.append(function)

    def _learn(self) -> None:
        asked, self._asked = self._asked, []
        if asked and self._resource_type is not None:
            self._learned[self._resource_type, asked[0]] = tuple(asked[1:])
