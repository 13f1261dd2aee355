"""The folder of CURVE keys: modes, contents, refusals."""

import pytest

from launch.keys import main
from protocol.errors import ChannelError
from protocol.transport.curve_keys import load_client_keys, load_server_keys, make_keys


def test_a_folder_of_keys_is_private_and_both_sides_agree(tmp_path):
    folder = make_keys(tmp_path / "a" / "keys")
    assert folder.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == dict.fromkeys(
        ("server.public", "server.secret", "actor.public", "actor.secret"), 0o600
    )
    server, client = load_server_keys(folder), load_client_keys(folder)
    assert server.public == client.server
    assert server.admitted == client.public
    assert len({server.public, server.secret, client.public, client.secret}) == 4


def test_keys_are_never_overwritten(tmp_path):
    make_keys(tmp_path)
    before = (tmp_path / "server.secret").read_bytes()
    with pytest.raises(ChannelError, match="required a folder without keys"):
        make_keys(tmp_path)
    assert (tmp_path / "server.secret").read_bytes() == before


def test_missing_malformed_and_readable_keys_are_named(tmp_path):
    with pytest.raises(ChannelError, match=r"server\.public.*No such file.*launch/keys\.py"):
        load_server_keys(tmp_path)
    make_keys(tmp_path)
    (tmp_path / "actor.secret").chmod(0o640)
    with pytest.raises(ChannelError, match=r"got mode 0640; run: chmod 600"):
        load_client_keys(tmp_path)
    (tmp_path / "actor.public").write_text("short")
    with pytest.raises(ChannelError, match=r"actor\.public must hold 40 characters.*got 5"):
        load_server_keys(tmp_path)


def test_the_program_makes_keys_once(tmp_path, capsys):
    folder = str(tmp_path / "keys")
    assert main([folder]) == 0
    assert f"Keys are in {folder}" in capsys.readouterr().out
    assert main([folder]) == 1
    assert "required a folder without keys" in capsys.readouterr().err
    with pytest.raises(SystemExit) as help_exit:
        main(["--help"])
    assert help_exit.value.code == 0
