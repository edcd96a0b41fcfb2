"""
A real container, without a registry to fetch an image from.
"""

import collections.abc
import contextlib
import os
import pathlib
import secrets
import shlex
import shutil

import pytest

import support

# Podman wants control groups of version 2, and some machines have those of version 1 mounted. A
# mount namespace of the call's own gets the version that podman wants, whatever the machine has.
_WRAPPER = """\
#!/bin/sh
export CONTAINERS_CONF={directory}/containers.conf
exec unshare --mount -- sh -c '
[ "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs ] ||
    {{ umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; }} || exit
exec {podman} --root={directory}/storage --runroot={directory}/run --tmpdir={directory}/tmp "$@"
' podman "$@"
"""

_SETTINGS = """\
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
"""

# What su needs in there: who is root may become anyone, all others give the password.
_PAM = """\
auth sufficient pam_rootok.so
auth required pam_unix.so
account required pam_unix.so
session required pam_permit.so
"""


class Container:
    """
    A running container. Its programs are those of this machine, whose ``/usr`` it has read-only;
    all else is its own.
    """

    user = "app"
    """Its one user besides root."""

    def __init__(self, directory: pathlib.Path, root_password: str, root_hash: str) -> None:
        self.name = f"box-{secrets.token_hex(4)}"
        """Its name."""
        self.root = directory / "rootfs"
        """The directory that is its file system's root."""
        self.root_password = root_password
        """The password of its root, for su."""
        self.podman_path = str(directory / "podman")
        """A podman that knows it, and no others."""
        self._directory = directory
        self._monitor: int | None = None
        self._write_podman()
        self._write_root(root_hash)

    def _write_podman(self) -> None:
        (self._directory / "containers.conf").write_text(_SETTINGS)
        podman = pathlib.Path(self.podman_path)
        podman.write_text(
            _WRAPPER.format(
                directory=shlex.quote(str(self._directory)), podman=support.find_program("podman")
            )
        )
        podman.chmod(0o755)

    def _write_root(self, root_hash: str) -> None:
        for path in ("etc/pam.d", "root", "tmp", "proc", "sys", "dev", "run", "usr", "var"):
            (self.root / path).mkdir(parents=True)
        (self.root / "tmp").chmod(0o1777)
        for path in ("bin", "sbin", "lib", "lib64"):
            if os.path.islink(f"/{path}"):
                (self.root / path).symlink_to(os.readlink(f"/{path}"))
        files = {
            "etc/passwd": f"root:x:0:0::/root:/bin/sh\n{self.user}:x:1000:1000::/tmp:/bin/sh\n",
            "etc/group": f"root:x:0:\n{self.user}:x:1000:\n",
            "etc/shadow": f"root:{root_hash}:19000:0:99999:7:::\n{self.user}:*:19000::::::\n",
            "etc/pam.d/su": _PAM,
            "etc/pam.d/other": _PAM,
        }
        for path, text in files.items():
            (self.root / path).write_text(text)
        (self.root / "etc/shadow").chmod(0o600)
        for path in ("/etc/ld.so.cache", "/etc/login.defs"):
            if os.path.exists(path):
                shutil.copy(path, self.root / path[1:])

    def podman(self, *arguments: str) -> str:
        """Return what podman printed."""
        return support.execute(self.podman_path, *arguments, timeout=60, check=True).stdout.strip()

    def start(self, hidden: collections.abc.Iterable[str] = ()) -> None:
        """
        Start it.

        :param hidden: Programs of this machine that it should not be able to run.
        """
        mounts = ["--volume=/usr:/usr:ro"]
        mounts += [f"--volume=/dev/null:{path}:ro" for path in hidden]
        for path in ("/bin", "/sbin", "/lib", "/lib64"):
            if os.path.isdir(path) and not os.path.islink(path):
                mounts.append(f"--volume={path}:{path}:ro")
        limits = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000", "--cgroups=disabled"]
        self.podman(
            *("run", "--detach", "--name", self.name, "--network=host", *limits, *mounts),
            *("--rootfs", str(self.root), "sleep", "infinity"),
        )
        self._monitor = self._state("ConmonPid")

    def _state(self, field: str) -> int:
        return int(self.podman("inspect", f"--format={{{{.State.{field}}}}}", self.name))

    @property
    def leader(self) -> int:
        """The process id, on this machine, of the container's first process."""
        return self._state("Pid")

    def remove(self) -> None:
        """Stop the container, if it was started, and forget it."""
        self.podman("rm", "--force", "--ignore", "--time=0", self.name)
        # The monitor has podman clean up once more, which makes files where the container was.
        if (monitor := self._monitor) is not None:
            support.wait_until(lambda: support.is_gone(monitor), "podman has ended")


def in_podman(container: Container, python_path: list[str], user: str = "root") -> support.Context:
    """Return the context of a user in a container."""
    return {
        "method_name": "podman",
        "name": "pod",
        "python_path": python_path,
        "container": container.name,
        "podman_path": container.podman_path,
        "username": user,
    }


def interpreters() -> set[str]:
    """Return all that may be an interpreter of this machine."""
    return {
        str(path.resolve())
        for place in ("/usr/bin", "/usr/local/bin", "/usr/libexec")
        for name in ("python*", "pypy*", "platform-python*")
        for path in pathlib.Path(place).glob(name)
    }


@contextlib.contextmanager
def running_container(
    owner: support.User, *, with_python: bool = True
) -> collections.abc.Iterator[Container]:
    """
    Run a container, and remove it.

    :param owner: A user of this machine whose password is the one of the container's root.
    :param with_python: Whether there are interpreters in it.
    """
    support.need("podman", "conmon", "unshare", root=True)
    python = support.interpreter_for_everyone()
    if python is None or not python.startswith("/usr/"):
        pytest.skip("needs a Python in /usr that every user can execute")
    _, password_hash, *_ = support.execute("getent", "shadow", owner.name).stdout.split(":")
    with support.public_directory() as directory:
        container = Container(directory, owner.password, password_hash)
        try:
            container.start([] if with_python else interpreters())
            yield container
        finally:
            container.remove()
