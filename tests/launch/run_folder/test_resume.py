"""Settings of a resumed run: said where they change, kept as they were where they are refused."""

from pathlib import Path

from launch.run_folder.resume import changes, put, settle
from protocol.config.load import load, to_toml
from protocol.config.settings import SftRun

FLAGS = ["--model.path=m", "--data.path=d"]
OTHER = [*FLAGS, "--run.resume=r", "--run.seed=7", "--model.lora.rank=4", "--data.max_length=none"]


def test_what_changes_is_said():
    before, after = load(SftRun, None, FLAGS), load(SftRun, None, OTHER)
    assert changes(before, before) == []
    seed, lora, length = changes(before, after)
    assert seed == "changed: run.seed = 7, was 42"
    assert lora.startswith('changed: model.lora = {"rank":4,')
    assert '"rank":16' in lora.split(", was ")[1]
    assert length == "changed: data.max_length = null, was 1024"


def test_refused_settings_do_not_stay(tmp_path: Path):
    before, after = load(SftRun, None, FLAGS), load(SftRun, None, OTHER)
    config = tmp_path / "config.toml"
    config.write_text(to_toml(before))
    put(tmp_path, after)
    assert load(SftRun, config) == after
    settle(tmp_path, begun=False)
    assert load(SftRun, config) == before
    put(tmp_path, after)
    settle(tmp_path, begun=True)
    settle(tmp_path, begun=False)  # a run that was not resumed has nothing to put back
    assert load(SftRun, config) == after
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]
