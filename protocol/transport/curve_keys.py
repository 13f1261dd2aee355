"""CURVE keys: a folder of keys decides who may serve and who may connect.

The server (the learner's sockets) has one key pair, the actors share another. The learner's host
needs the whole folder; an actor's host needs only `server.public`, `actor.public` and
`actor.secret`. Each file is one line of Z85 (40 characters). The folder has mode 0700, its files
0600.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import zmq

from protocol.errors import ChannelError

SERVER_PUBLIC = "server.public"
SERVER_SECRET = "server.secret"
ACTOR_PUBLIC = "actor.public"
ACTOR_SECRET = "actor.secret"


@dataclass(frozen=True)
class ServerKeys:
    """A server's key pair, and the one public key that it admits. Z85 bytes."""

    public: bytes
    secret: bytes
    admitted: bytes


@dataclass(frozen=True)
class ClientKeys:
    """A client's key pair, and the server's public key. Z85 bytes."""

    public: bytes
    secret: bytes
    server: bytes


def make_keys(folder: str | Path) -> Path:
    """Make `folder` (0700) with new keys (0600); raise `ChannelError` if it holds keys already."""
    folder = Path(folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    names = (SERVER_PUBLIC, SERVER_SECRET, ACTOR_PUBLIC, ACTOR_SECRET)
    present = [name for name in names if (folder / name).exists()]
    if present:
        raise ChannelError(
            f"keys: required a folder without keys, got {folder} with {', '.join(present)}; "
            "name another folder, or remove these files and give the new ones to every host"
        )

    folder.chmod(0o700)
    server_public, server_secret = zmq.curve_keypair()
    actor_public, actor_secret = zmq.curve_keypair()

    for name, key in zip(
        names, (server_public, server_secret, actor_public, actor_secret), strict=True
    ):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key + b"\n")

    return folder


def load_server_keys(folder: str | Path) -> ServerKeys:
    """Load the server's pair and the admitted key; raise `ChannelError` naming a bad file."""
    folder = Path(folder)
    return ServerKeys(
        public=_read(folder / SERVER_PUBLIC),
        secret=_read(folder / SERVER_SECRET, secret=True),
        admitted=_read(folder / ACTOR_PUBLIC),
    )


def load_client_keys(folder: str | Path) -> ClientKeys:
    """Load the actors' pair and the server's public key; raise `ChannelError` naming a bad file."""
    folder = Path(folder)
    return ClientKeys(
        public=_read(folder / ACTOR_PUBLIC),
        secret=_read(folder / ACTOR_SECRET, secret=True),
        server=_read(folder / SERVER_PUBLIC),
    )


def _read(path: Path, *, secret: bool = False) -> bytes:
    try:
        key = path.read_bytes().strip()
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ChannelError(
            f"keys: required the key file {path}, got: {error.strerror}; "
            "make a folder of keys with launch/keys.py"
        ) from error

    if secret and mode & 0o077:
        raise ChannelError(
            f"keys: {path} must be readable by its owner only, got mode {mode:04o}; "
            f"run: chmod 600 {path}"
        )
    if len(key) != 40:
        raise ChannelError(f"keys: {path} must hold 40 characters of Z85, got {len(key)}")
    return key
