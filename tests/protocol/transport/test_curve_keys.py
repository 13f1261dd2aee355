"""The folder of CURVE keys: modes, contents, who is admitted, refusals."""

import pytest

from launch.keys import main
from protocol.errors import ChannelError
from protocol.transport.curve_keys import (
    AdmittedKeys,
    actor_name,
    load_client_keys,
    load_server_keys,
    make_keys,
)


def test_a_folder_of_keys_is_private_and_both_sides_agree(tmp_path):
    folder = make_keys(tmp_path / "a" / "keys", ["studio", "mini.2"])
    assert folder.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    names = [f"{name}.{kind}" for name in ("server", "studio", "mini.2") for kind in ("public",)]
    assert modes == dict.fromkeys([*names, *(n[:-6] + "secret" for n in names)], 0o600)

    server, studio = load_server_keys(folder), load_client_keys(folder, "studio")
    mini = load_client_keys(folder, "mini.2")
    assert server.public == studio.server == mini.server
    assert len({server.public, server.secret, studio.public, studio.secret, mini.secret}) == 5

    admitted = AdmittedKeys(folder)
    assert admitted.name_of(studio.public) == "studio"
    assert admitted.name_of(mini.public) == "mini.2"
    assert admitted.name_of(server.public) == "server"
    assert admitted.name_of(b"x" * 40) == ""
    assert admitted.has("studio")
    assert not admitted.has("other")


def test_an_actor_is_added_and_shut_out_while_the_folder_is_read(tmp_path):
    make_keys(tmp_path, ["studio"])
    now = [tmp_path.stat().st_mtime]
    admitted = AdmittedKeys(tmp_path, clock=lambda: now[0])
    assert not admitted.has("mini")

    make_keys(tmp_path, ["mini"])
    (tmp_path / "broken.public").write_text("half")
    assert not admitted.has("mini")  # the listing is trusted for a second
    assert admitted.name_of(load_client_keys(tmp_path, "mini").public) == "mini"
    assert admitted.has("studio")

    (tmp_path / "studio.public").unlink()
    assert admitted.has("studio")
    now[0] += 1.0
    assert not admitted.has("studio")
    assert admitted.has("mini")


def test_an_actors_name_is_that_of_its_key(tmp_path):
    host = tmp_path / "host"
    make_keys(tmp_path / "all", ["studio", "mini"])
    with pytest.raises(ChannelError, match="got those of mini, studio; say which one with --name"):
        actor_name(tmp_path / "all")
    with pytest.raises(ChannelError, match=r"key pair of actor other .* got those of mini, studio"):
        actor_name(tmp_path / "all", "other")
    assert actor_name(tmp_path / "all", "mini") == "mini"

    host.mkdir()
    for name in ("server.public", "studio.public", "studio.secret"):
        (tmp_path / "all" / name).rename(host / name)
    assert actor_name(host) == "studio"
    (host / "studio.secret").unlink()
    with pytest.raises(ChannelError, match=r"got those of no actor; run launch/keys\.py"):
        actor_name(host)


def test_keys_are_never_overwritten(tmp_path):
    make_keys(tmp_path, ["studio"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ChannelError, match="required names without keys, got studio, which"):
        make_keys(tmp_path, ["mini", "studio"])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "name", ["", "server", "actor", "actor-3", "../studio", ".studio", "a b", "x" * 65, "a\x1b"]
)
def test_names_that_cannot_be_used_are_refused(tmp_path, name):
    with pytest.raises(ChannelError, match="keys: an actor's name must be"):
        make_keys(tmp_path / "keys", [name])
    assert not (tmp_path / "keys").exists()


def test_missing_malformed_and_readable_keys_are_named(tmp_path):
    with pytest.raises(ChannelError, match=r"server\.public.*No such file.*launch/keys\.py"):
        load_server_keys(tmp_path)
    make_keys(tmp_path, ["studio"])
    (tmp_path / "studio.secret").chmod(0o640)
    with pytest.raises(ChannelError, match=r"got mode 0640; run: chmod 600"):
        load_client_keys(tmp_path)
    (tmp_path / "studio.public").write_text("short")
    with pytest.raises(ChannelError, match=r"studio\.public must hold 40 characters.*got 5"):
        load_server_keys(tmp_path)


def test_a_folder_of_an_earlier_version_is_refused_with_what_to_do(tmp_path):
    make_keys(tmp_path, [])
    (tmp_path / "actor.public").write_text("x" * 40)
    for load in (load_server_keys, load_client_keys, actor_name):
        with pytest.raises(ChannelError, match=r"remove both files .* launch/keys\.py .* --actor"):
            load(tmp_path)


def test_the_program_makes_keys_and_adds_actors(tmp_path, capsys):
    folder = str(tmp_path / "keys")
    assert main([folder]) == 0
    assert f"launch/keys.py {folder} --actor NAME" in capsys.readouterr().out
    assert main([folder, "--actor", "studio", "--actor", "mini"]) == 0
    told = capsys.readouterr().out
    assert "Copy to the machine of mini: server.public mini.public mini.secret" in told
    assert main([folder, "--actor", "studio"]) == 1
    assert "required names without keys" in capsys.readouterr().err
    with pytest.raises(SystemExit) as help_exit:
        main(["--help"])
    assert help_exit.value.code == 0
