"""Functions that tests run on a host. They need nothing but the standard library and mitogen."""

import os
import signal
import time

import mitogen.core


def echo(*args, **kwargs):
    return [list(args), kwargs]


def pid():
    return os.getpid()


def parent_pid():
    return os.getppid()


def fail(text):
    raise ValueError(text)


def nap(seconds):
    time.sleep(seconds)
    return seconds


def slow_echo(value, seconds):
    time.sleep(seconds)
    return value


def note_and_die(path):
    """Leaves a trace of having run, and takes the interpreter with it."""
    with open(path, "a") as file:
        file.write("ran\n")
    os.kill(os.getpid(), signal.SIGKILL)


def note_and_nap(path, seconds):
    """Leaves a trace of having run, and takes its time."""
    with open(path, "a") as file:
        file.write("ran\n")
    time.sleep(seconds)


def unsendable():
    return (number for number in range(3))


def unreadable():
    return complex(1, 2)


def large(size):
    return b"x" * size


@mitogen.core.takes_router
def table_sizes(router):
    """What a hop's router keeps of the contexts that were connected through it."""
    listeners = vars(router.broker)["_signals"]
    return {
        "contexts": len(router._context_by_id),
        "streams": len(router._stream_by_id),
        "routes": len(router.route_monitor._routes_by_stream),
        "listeners": sum(map(len, listeners.values())),
        "timers": len(router.broker.timers._lst),
    }


@mitogen.core.takes_router
def call_context(context_id, router):
    """Asks another context of the same agent to run something."""
    message = mitogen.core.Message.pickled(
        (None, "os", None, "getpid", (), mitogen.core.Kwargs({})),
        handle=mitogen.core.CALL_FUNCTION,
    )
    context = router.context_by_id(context_id)
    return context.send_async(message).get(timeout=10).unpickle()


class Holder:
    @staticmethod
    def static(value):
        return value

    @classmethod
    def name(cls):
        return cls.__name__

    def method(self):
        return "never reached"
