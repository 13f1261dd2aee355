"""What a local actor loads while the learner of its run does the same, before that answers."""

import logging
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from launch.processes.stages import Stages
from launch.run_folder.create import CONFIG
from protocol.config.load import load
from protocol.config.settings import GrpoRun, ModelSettings, narrowed
from protocol.errors import ModelError
from protocol.run_record import read_run

if TYPE_CHECKING:
    from protocol.model.policy import LoadedPolicy

log = logging.getLogger("pippin.actor")


@dataclass(frozen=True)
class EarlyPolicy:
    """A policy, and what it was loaded from."""

    settings: ModelSettings
    seed: int
    policy: "LoadedPolicy"


def load_early(folder: Path | None, stages: Stages) -> EarlyPolicy | None:
    """Import what samples, and load the model that the settings of the run in `folder` name.

    None without a folder, for runs whose learner changes the model's settings (pairs), and if the
    model cannot be loaded, which is the learner's to report.
    """
    # These imports take seconds.
    import_module("actors.engine.mlx_engine")
    from protocol.model.policy import load_policy

    stages.done("imports")
    if folder is None or read_run(folder).program != "grpo":
        return None

    run = load(GrpoRun, folder / CONFIG)
    settings = narrowed(run.model, ModelSettings)
    try:
        policy = load_policy(settings, seed=run.run.seed)
    except ModelError as error:
        log.info("the model is not loaded yet: %s", error)
        return None
    stages.done("model")
    return EarlyPolicy(settings, run.run.seed, policy)
