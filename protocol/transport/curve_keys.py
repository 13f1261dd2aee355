"""CURVE keys: a folder of keys decides who may serve, who may connect, and under which name.

    server.public, server.secret    of the learner and of reward servers
    NAME.public, NAME.secret        of the actor NAME, one pair per actor

The learner's host holds `server.secret` and every actor's public key; an actor's host needs only
`server.public` and its own pair. Whose public key lies in the folder is admitted, as the actor of
that name and no other: a file that is added lets its actor join a run that is going on, and one
that is removed shuts it out. Each file is one line of Z85 (40 characters). The folder has mode
0700, its files 0600.
"""

import os
import re
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from protocol.errors import ChannelError

SERVER = "server"
PUBLIC, SECRET = ".public", ".secret"
CHECK_S = 1.0  # how long a folder's listing is trusted before its time stamp is read again
_SETTLED_S = 2.0  # a folder that changed later than this may change again within one time stamp

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LOCAL = re.compile(r"actor-\d+")
_SHARED = "actor"  # the pair that all actors shared in earlier versions


@dataclass(frozen=True)
class KeyPair:
    """A key pair, as Z85 bytes."""

    public: bytes
    secret: bytes


@dataclass(frozen=True)
class ClientKeys:
    """A client's key pair, and the server's public key. Z85 bytes."""

    public: bytes
    secret: bytes
    server: bytes


@dataclass
class AdmittedKeys:
    """The names behind the public keys of a folder, which is read again when it has changed.

    The server's own key is admitted too, under the name `server`: local actors use it at reward
    servers on other machines.
    """

    folder: Path
    clock: Callable[[], float] = time.time
    _names: dict[bytes, str] = field(default_factory=dict[bytes, str])
    _read_at: float = float("-inf")
    _checked_at: float = float("-inf")

    def name_of(self, public: bytes) -> str:
        """Return the name that a public key was given, or "" if it is not admitted.

        A key that is not known may have been added just now, and ZMQ's clients do not try again
        after a refusal: the folder is looked at.
        """
        self._refresh()
        if public not in self._names:
            self._refresh(at_once=True)
        return self._names.get(public, "")

    def has(self, name: str) -> bool:
        """Whether an actor of this name has a key."""
        self._refresh()
        return name in self._names.values()

    def _refresh(self, *, at_once: bool = False) -> None:
        now = self.clock()
        if not at_once and 0 <= now - self._checked_at < CHECK_S:
            return
        self._checked_at = now

        try:
            changed_at = self.folder.stat().st_mtime
        except OSError:  # a folder on a share that is away for a moment shuts nobody out
            return
        if changed_at < self._read_at - _SETTLED_S:
            return

        self._read_at = now
        names: dict[bytes, str] = {}
        for path in self.folder.glob(f"*{PUBLIC}"):
            with suppress(ChannelError):  # half-written, or just removed
                names[_read(path)] = path.stem
        self._names = names


def make_keys(folder: str | Path, actors: Iterable[str]) -> Path:
    """Add a key pair per actor to `folder`, which is made (0700) with the server's if need be.

    Raise `ChannelError` for a name that cannot be used, or that has keys already.
    """
    folder, names = Path(folder), list(actors)
    for name in names:
        _check_name(name)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_shared(folder)

    present = [name for name in names if _exists(folder, name)]
    if present:
        raise ChannelError(
            f"keys: required names without keys, got {', '.join(present)}, which {folder} has "
            "already; choose other names, or remove these files first to shut the old keys out"
        )

    folder.chmod(0o700)
    for name in [*([] if _exists(folder, SERVER) else [SERVER]), *names]:
        public, secret = zmq.curve_keypair()
        _write(folder / f"{name}{SECRET}", secret)
        _write(folder / f"{name}{PUBLIC}", public)
    return folder


def load_server_keys(folder: str | Path) -> KeyPair:
    """Load the server's pair; raise `ChannelError` naming a bad file."""
    folder = Path(folder)
    _refuse_shared(folder)
    for path in folder.glob(f"*{PUBLIC}"):
        _read(path)  # a bad file is named now, not when its actor cannot join
    return _load_pair(folder, SERVER)


def load_client_keys(folder: str | Path, name: str = "") -> ClientKeys:
    """Load the pair of `name`, or of the folder's only actor, and the server's public key.

    Raise `ChannelError` naming a bad file, or the actors if there are several and no `name`.
    """
    folder = Path(folder)
    pair = _load_pair(folder, name if name == SERVER else actor_name(folder, name))
    return ClientKeys(pair.public, pair.secret, _read(folder / f"{SERVER}{PUBLIC}"))


def own_client_keys(folder: str | Path | None) -> ClientKeys | None:
    """Load a pair for a client whose name does not matter: the server's own, or an actor's.

    Return None without a folder.
    """
    if not folder:
        return None
    is_servers = (Path(folder) / f"{SERVER}{SECRET}").exists()
    return load_client_keys(folder, SERVER if is_servers else "")


def actor_name(folder: str | Path, name: str = "") -> str:
    """Return the name that an actor has by its key: `name`, or the folder's only one.

    Raise `ChannelError` if the folder has no secret key of that name, or several and no `name`.
    """
    folder = Path(folder)
    _refuse_shared(folder)
    found = name or _only_name(folder)
    if found and (folder / f"{found}{SECRET}").exists():
        return found
    names = _secret_names(folder)
    raise ChannelError(
        f"keys: required the key pair of actor {name or 'NAME'} in {folder}, got those of "
        f"{', '.join(names) or 'no actor'}; run launch/keys.py {folder} --actor "
        f"{name or 'NAME'} on the learner's machine and copy {name or 'NAME'}{PUBLIC}, "
        f"{name or 'NAME'}{SECRET} and {SERVER}{PUBLIC} here"
    )


def _only_name(folder: Path) -> str:
    """Return the only actor whose secret key is in `folder`, or "" if there is none."""
    names = _secret_names(folder)
    if len(names) > 1:
        raise ChannelError(
            f"keys: required one actor's key pair in {folder}, got those of {', '.join(names)}; "
            "say which one with --name"
        )
    return names[0] if names else ""


def _secret_names(folder: Path) -> list[str]:
    return sorted(p.stem for p in folder.glob(f"*{SECRET}") if p.stem != SERVER)


def _check_name(name: str) -> None:
    rule = ""
    if not _NAME.fullmatch(name):
        rule = "at most 64 letters, digits, dots, dashes and underscores, the first no mark"
    elif name in (SERVER, _SHARED) or _LOCAL.fullmatch(name):
        rule = f"neither {SERVER!r} nor {_SHARED!r}, nor 'actor-N', which a run's own actors have"
    if rule:
        raise ChannelError(f"keys: an actor's name must be {rule}; got {name!r}")


def _refuse_shared(folder: Path) -> None:
    if _exists(folder, _SHARED):
        raise ChannelError(
            f"keys: {folder} holds {_SHARED}{PUBLIC} or {_SHARED}{SECRET}, a pair that all actors "
            "shared in earlier versions; each actor needs a pair of its own now: remove both files "
            f"on every machine, then run launch/keys.py {folder} --actor NAME for each actor"
        )


def _exists(folder: Path, name: str) -> bool:
    return any((folder / f"{name}{kind}").exists() for kind in (PUBLIC, SECRET))


def _write(path: Path, key: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key + b"\n")


def _load_pair(folder: Path, name: str) -> KeyPair:
    return KeyPair(_read(folder / f"{name}{PUBLIC}"), _read(folder / f"{name}{SECRET}"))


def _read(path: Path) -> bytes:
    try:
        key = path.read_bytes().strip()
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ChannelError(
            f"keys: required the key file {path}, got: {error.strerror}; "
            "make a folder of keys with launch/keys.py"
        ) from error

    if path.suffix == SECRET and mode & 0o077:
        raise ChannelError(
            f"keys: {path} must be readable by its owner only, got mode {mode:04o}; "
            f"run: chmod 600 {path}"
        )
    if len(key) != 40:
        raise ChannelError(f"keys: {path} must hold 40 characters of Z85, got {len(key)}")
    return key
