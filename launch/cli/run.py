"""What the front doors share: command line, run folder, the processes of a run, its ending.

The resolved config.toml holds absolute paths (`launch/run_folder/paths.py`). Nothing heavy is
imported before the configuration is accepted.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import anyio

from launch.pages.progress import Progress
from launch.pages.run_page import write_report
from launch.processes.blas import HINT, load_openblas
from launch.processes.children import ChildSpec
from launch.processes.supervisor import INTERRUPTED, Supervisor, awake
from launch.run_folder import resume as resumption
from launch.run_folder.paths import DATA_SUFFIXES, require_file, resolve_flags, resolve_paths
from protocol.config.help import help_text
from protocol.config.load import load, read_toml, to_toml
from protocol.config.settings import AnyRun, GrpoRun, PreferenceRun, SftRun
from protocol.errors import ConfigError, PippinError

RunT = TypeVar("RunT", GrpoRun, PreferenceRun, SftRun)
PROGRAMS = Path(__file__).parents[1]
NOT_BEGUN = "not_begun"  # marks the folder of a run that failed before its first step


def read_command_line(
    cls: type[RunT], argv: Sequence[str], usage: str, default: Path | None = None
) -> tuple[RunT, Path]:
    """Return the settings and the run folder, made and holding config.toml.

    `argv` is `[recipe.toml] [--section.key value …]`; without a recipe, `default` is used.
    Prints the help and exits on --help or -h. Raises ConfigError.
    """
    flags = list(argv)
    if "--help" in flags or "-h" in flags:
        sys.stdout.write(help_text(cls, usage))
        raise SystemExit(0)
    recipe = Path(flags.pop(0)) if flags and not flags[0].startswith("--") else None
    if recipe is not None and recipe.suffix.lower() in DATA_SUFFIXES:
        raise ConfigError(f"{recipe} is no recipe, which is TOML; data: --data.path {recipe}")
    flags = resolve_flags(flags, Path.cwd())
    resumed = _resume_folder(flags)
    if resumed is not None:
        if recipe is not None:
            raise ConfigError(f"give either a recipe ({recipe}) or --run.resume, not both")
        _require_program(cls, resumed)
        flags.append(f"--run.resume={resumed}")
        before = load(cls, resumed / "config.toml")
        run = resolve_paths(load(cls, resumed / "config.toml", flags), Path.cwd())
        try:
            resumption.put(resumed, run)
        except OSError as error:
            raise ConfigError(f"--run.resume {resumed}: cannot be written: {error}") from error
        sys.stdout.write("".join(f"{line}\n" for line in resumption.changes(before, run)))
        return run, resumed
    recipe = recipe or default
    run = load(cls, recipe, flags)
    if recipe is not None:
        run = resolve_paths(run, recipe.parent.absolute())
    for name, path in (("path", run.data.path), ("eval_path", run.data.eval_path)):
        require_file(f"data.{name}", path)
    return run, make_run_folder(run, recipe.stem if recipe else "run")


def _require_program(cls: type[RunT], folder: Path) -> None:
    """Refuse to resume a run of another program."""
    tree = read_toml(folder / "config.toml")
    made: type[AnyRun] = SftRun
    if "rewards" in tree:
        made = GrpoRun
    elif "method" in tree.get("objective", {}):
        made = PreferenceRun
    if made is not cls:
        name = {GrpoRun: "grpo", PreferenceRun: "preference", SftRun: "sft"}[made]
        raise ConfigError(f"--run.resume {folder}: a run of launch/{name}.py; resume it with that")


def _resume_folder(flags: Sequence[str]) -> Path | None:
    for index, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name == "--run.resume":
            text = value if equals else "".join(flags[index + 1 : index + 2])
            folder = Path(text).resolve()
            if not (folder / "config.toml").is_file():
                raise ConfigError(f"--run.resume {text}: required a run folder with config.toml")
            return folder
    return None


def make_run_folder(run: AnyRun, stem: str) -> Path:
    """Make `runs/<name>/` with the resolved config.toml, and point `runs/latest` to it.

    Raises ConfigError if the named folder holds a run already, or cannot be made.
    """
    name = run.run.name or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = Path(run.run.dir).absolute() / name
    config = folder / "config.toml"
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        if (folder / NOT_BEGUN).exists():
            for stale in (config, folder / NOT_BEGUN, folder / "started_at"):
                stale.unlink(missing_ok=True)
        try:
            with config.open("x", encoding="utf-8") as file:  # of two launches at once, one has it
                file.write(to_toml(run))
        except FileExistsError:
            saved = any((folder / "checkpoints").glob("step-*/state.json"))
            on = f"go on with it by --run.resume {folder}" if saved else "delete that folder"
            raise ConfigError(
                f"run.name: {folder} holds a run already; choose another name, or {on}"
            ) from None
        latest = folder.parent / "latest"
        fresh = folder.parent / f".latest-{os.getpid()}"
        fresh.symlink_to(folder.name)
        fresh.replace(latest)
    except OSError as error:
        raise ConfigError(f"run.dir: the run folder {folder} cannot be made: {error}") from error
    return folder


def program(name: str, *arguments: str) -> list[str]:
    """Return the command of one of our programs, in this interpreter."""
    return [sys.executable, str(PROGRAMS / name), *arguments]


def learner_spec(folder: Path, kind: str, *arguments: str) -> ChildSpec:
    """Return the learner of a run; `kind` is grpo, preference or sft."""
    command = program("processes/learn.py", str(folder), "--kind", kind, *arguments, "--child")
    return ChildSpec("learner", "learner", command)


def supervise(
    folder: Path,
    run: AnyRun,
    learner: ChildSpec,
    helpers: Sequence[ChildSpec] = (),
    required: frozenset[str] = frozenset(),
) -> int:
    """Run the processes to the end with the display, write the report, return the exit status."""
    if not load_openblas():
        sys.stderr.write(f"{HINT}\n")
    progress = Progress(folder, max_steps=run.train.max_steps)
    metrics = folder / "metrics.jsonl"

    def say(text: str) -> None:
        progress.update()  # what came before it
        progress.say(text)

    supervisor = Supervisor(
        learner,
        helpers,
        folder / "logs",
        say=say,
        required=required,
        companions=[progress.follow],
    )
    try:
        with awake(), progress:
            status = anyio.run(supervisor.run)
    except KeyboardInterrupt:  # before the supervisor listened for it
        status = INTERRUPTED
    checkpoints = folder / "checkpoints"
    saved = checkpoints.is_dir() and any(checkpoints.iterdir())
    try:
        resumption.settle(folder, begun=False)
        if status != 0 and not saved and not metrics.exists():
            (folder / NOT_BEGUN).touch()
        if metrics.exists():
            sys.stdout.write(f"report:  {shown(write_report(folder))}\n")
    except OSError as error:  # a full disk; the run is what it is
        sys.stdout.write(f"report:  not written: {error}\n")
    lines = what_next(folder, run, done=status == 0)
    if saved and (status != 0 or supervisor.interrupted):
        lines.append(f"go on:   uv run {sys.argv[0]} --run.resume {shown(folder)}")
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return status


def shown(path: str | Path) -> str:
    """Write a path for a shell: relative where it lies in the current folder."""
    given = Path(path)
    inside = given.is_absolute() and given.is_relative_to(Path.cwd())
    return shlex.quote(str(given.relative_to(Path.cwd()) if inside else given))


def what_next(folder: Path, run: AnyRun, *, done: bool) -> list[str]:
    """Return lines that say where the run's weights are, and the commands that use them."""
    if not done:
        return [f"logs:    {shown(folder / 'logs')}"]
    full = run.model.fine_tune_type == "full"
    weights = shown(folder / ("model" if full else "adapters"))
    model = f"--model {weights if full else shown(run.model.path)}"
    loaded = model if full else f"{model} --adapter-path {weights}"
    return [
        f"weights: {weights}",
        f"chat:    uv run mlx_lm.chat {loaded}",
        f'ask:     uv run mlx_lm.generate {loaded} --prompt "…"',
        f"export:  uv run launch/export.py {shown(folder)} OUT",
    ]


def run_offline(cls: type[RunT], kind: str, argv: Sequence[str], usage: str) -> int:
    """Run launch/preference.py or launch/sft.py: the learner alone, supervised."""
    run, folder = read_command_line(cls, argv, usage)
    return supervise(folder, run, learner_spec(folder, kind))


def main(body: Callable[[], int]) -> None:
    """Run a front door; a PippinError becomes one line on stderr and exit status 2."""
    try:
        status = body()
    except PippinError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        status = 2
    except KeyboardInterrupt:
        status = INTERRUPTED
    raise SystemExit(status)
