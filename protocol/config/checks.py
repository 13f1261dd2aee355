"""Rules that span keys, refused at load, before anything heavy starts.

Bounds of a single key are at its field in `settings.py`.
"""

from protocol.config.objective_settings import GrpoSettings
from protocol.config.preference_checks import check_preference_run
from protocol.config.settings import (
    AnyRun,
    GrpoRun,
    OfflineEval,
    OnlineRun,
    PairsRun,
    PreferenceRun,
    TransportSettings,
    has_held_out,
)
from protocol.errors import require
from protocol.hosts import is_loopback_host


def check(run: AnyRun) -> None:
    """Refuse settings that cannot be run, with the path of the field and what it needs."""
    name = run.run.name
    bad = name in (".", "..") or "/" in name or "\0" in name
    require(not bad, "run.name", "must be a folder's name without '/'", name)
    full = run.model.fine_tune_type == "full"
    rule = 'must be empty with model.fine_tune_type = "full"; fuse the adapter first'
    adapter = run.model.adapter_path
    require(not (full and adapter), "model.adapter_path", rule, adapter)

    _check_data(run)
    if isinstance(run, OnlineRun):
        _check_rewards(run)
        _check_actors(run)
        _check_transport(run.transport, run.rewards.workers)
    if isinstance(run, GrpoRun):
        shared = run.train.shared_prompt
        rule = "needs train.micro_batch_size = 1: groups have different prompts"
        fits = run.train.micro_batch_size == 1 or shared != "on"
        require(fits, "train.shared_prompt", rule, shared)
        _check_objective(run.objective)
    elif isinstance(run, PreferenceRun):
        check_preference_run(run)


def _check_data(run: AnyRun) -> None:
    data = run.data
    if data.streaming:
        rule = "must be set with data.streaming (the length of a stream is not known)"
        require(run.train.max_steps >= 1, "train.max_steps", rule, run.train.max_steps)
        rule = 'must be "shuffled" or "sequential" with data.streaming'
        require(data.order in ("shuffled", "sequential"), "data.order", rule, data.order)
    if isinstance(run, PairsRun):
        return

    has_eval = has_held_out(run.data)
    rule = "needs data.eval_path, data.eval_split or data.eval_rows"
    require(run.eval.steps == 0 or has_eval, "eval.steps", rule, run.eval.steps)
    if isinstance(run.eval, OfflineEval):
        require(not run.eval.generate or has_eval, "eval.generate", rule, run.eval.generate)
    fits = not run.data.eval_rows or not (run.data.eval_path or run.data.eval_split)
    rule = "must be 0 where data.eval_path or data.eval_split gives the held-out rows"
    require(fits, "data.eval_rows", rule, run.data.eval_rows)


def _check_rewards(run: OnlineRun) -> None:
    names, weights = run.rewards.functions, run.rewards.reward_weights
    unscored = isinstance(run, PairsRun) and run.pairs.mode == "given"
    rule = "must name at least one reward function"
    require(bool(names) or unscored, "rewards.functions", rule, names)
    require(all(names), "rewards.functions", "must hold no empty name", names)
    fits = weights is None or len(weights) == len(names)
    rule = f"must hold one weight for each of the {len(names)} rewards.functions"
    require(fits, "rewards.reward_weights", rule, weights)


def _check_actors(run: OnlineRun) -> None:
    lease, heartbeat = run.queue.lease_s, run.actors.heartbeat_s
    rule = f"must be more than twice actors.heartbeat_s ({heartbeat})"
    require(lease > 2 * heartbeat, "queue.lease_s", rule, lease)
    longest, scoring = run.queue.max_lease_s, run.rewards.reward_timeout_s
    rule = f"must be more than queue.lease_s ({lease:g}) and rewards.reward_timeout_s ({scoring:g})"
    require(longest > max(lease, scoring), "queue.max_lease_s", rule, longest)
    count, remote = run.actors.count, bool(run.transport.bind)
    rule = "must be at least 1 unless transport.bind lets remote actors connect"
    require(count >= 1 or remote, "actors.count", rule, count)
    devices = run.actors.devices or []
    rule = f"must hold at most one GPU for each of the {count} local actors"
    require(len(devices) <= count, "actors.devices", rule, devices)
    if isinstance(run, GrpoRun) and run.actors.colocate is True:
        rule = "must be 1 with actors.colocate, which makes it a part of the learner's process"
        require(count == 1, "actors.count", rule, count)
        rule = "must be none with actors.colocate: train.device says where the process computes"
        require(not devices, "actors.devices", rule, devices)


def _check_objective(grpo: GrpoSettings) -> None:
    high = grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high
    fits = grpo.delta is None or grpo.delta > 1 + high
    rule = f"must exceed 1 + epsilon_high ({1 + high:g}), or it undoes the upper clip"
    require(fits, "objective.delta", rule, grpo.delta)

    corrected = grpo.importance_sampling_correction
    rule = 'needs objective.old_logprobs = "recompute": it corrects the difference between the two'
    fits = not corrected or grpo.old_logprobs == "recompute"
    require(fits, "objective.importance_sampling_correction", rule, corrected)
    low, top = grpo.importance_sampling_clip_min, grpo.importance_sampling_clip_max
    rule = f"must be at most importance_sampling_clip_max ({top:g})"
    require(low is None or low <= top, "objective.importance_sampling_clip_min", rule, low)


def _check_transport(transport: TransportSettings, workers: int) -> None:
    if not transport.bind:
        return
    host, _, port = transport.bind.removeprefix("tcp://").rpartition(":")
    fits = transport.bind.startswith("tcp://") and host and port.isdecimal()
    # Snapshots and each reward server have a port above the first.
    fits = fits and int(port) + 1 + workers < 65536
    rule = "must be tcp://host:port; the ports above it serve snapshots and rewards"
    require(bool(fits), "transport.bind", rule, transport.bind)
    rule = "is not a loopback address and needs transport.keys (launch/keys.py makes them)"
    safe = bool(transport.keys) or is_loopback_host(host)
    require(safe, "transport.bind", rule, transport.bind)
