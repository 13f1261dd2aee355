"""Checks that span fields: refused at load, before anything heavy starts."""

from collections.abc import Collection
from ipaddress import ip_address

from protocol.config.preference_checks import check_preference_run
from protocol.config.settings import (
    AnyRun,
    EvalSettings,
    GrpoRun,
    GrpoSettings,
    ModelSettings,
    OptimizerSettings,
    PairsRun,
    PreferenceRun,
    SamplingSettings,
    TrainSettings,
    TransportSettings,
)
from protocol.config.unread import check_read
from protocol.errors import require


def check(run: AnyRun, flags: Collection[str] = ()) -> None:
    """Refuse settings that cannot be run, with the path of the field and what it needs.

    `flags` are the paths that the command line gave.
    """
    check_read(run, flags)
    _check_required(run)
    _check_model(run.model)
    _check_optimizer(run.optimizer)
    _check_train(run.train)
    _check_data(run)
    _check_eval(run.eval)
    require(run.run.save_steps >= 0, "run.save_steps", "must be at least 0", run.run.save_steps)
    seed = run.run.seed
    require(0 <= seed < 2**32, "run.seed", "must be int in [0, 2**32)", seed)
    limit = run.run.save_total_limit
    require(limit >= 1, "run.save_total_limit", "must be at least 1", limit)
    shown = run.run.log_completions
    require(shown >= -1, "run.log_completions", "must be -1 (all) or a count", shown)
    bad = run.run.name in (".", "..") or "/" in run.run.name or "\0" in run.run.name
    require(not bad, "run.name", "must be a folder's name without '/'", run.run.name)
    shared = run.train.shared_prompt
    if isinstance(run, GrpoRun):
        one = run.train.micro_batch_size == 1
        rule = "needs train.micro_batch_size = 1: groups have different prompts"
        require(one or shared != "on", "train.shared_prompt", rule, shared)
        _check_grpo(run)
        return
    if isinstance(run, PreferenceRun):
        check_preference_run(run)


def _check_required(run: AnyRun) -> None:
    require(
        bool(run.model.path), "model.path", "must name a local folder or hub id in mlx-lm's format",
        run.model.path,
    )  # fmt: skip
    require(
        bool(run.data.path), "data.path", "must name a hub id, a file or a folder", run.data.path
    )


def _check_model(model: ModelSettings) -> None:
    lora = model.lora
    require(lora.rank >= 1, "model.lora.rank", "must be at least 1", lora.rank)
    require(0 <= lora.dropout < 1, "model.lora.dropout", "must be in [0, 1)", lora.dropout)
    layers = lora.num_layers
    require(
        layers == -1 or layers >= 1, "model.lora.num_layers", "must be -1 (all) or >= 1", layers
    )
    require(lora.keys != [], "model.lora.keys", "must name a module, or be none for all", lora.keys)
    group = model.quantize_group_size
    require(group in (32, 64, 128), "model.quantize_group_size", "must be 32, 64 or 128", group)
    require(bool(model.reference), "model.reference", 'must be "initial", "base" or a path', "")
    if model.fine_tune_type == "full":
        require(
            not model.adapter_path,
            "model.adapter_path",
            'must be empty with model.fine_tune_type = "full"; fuse the adapter first',
            model.adapter_path,
        )


def _check_optimizer(optimizer: OptimizerSettings) -> None:
    for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
        value: float = getattr(optimizer, name)
        require(value > 0, f"optimizer.{name}", "must be positive", value)
    for name in ("warmup_steps", "weight_decay"):
        value = getattr(optimizer, name)
        require(value >= 0, f"optimizer.{name}", "must be at least 0", value)
    for name in ("adam_beta1", "adam_beta2"):
        value = getattr(optimizer, name)
        require(0 <= value < 1, f"optimizer.{name}", "must be in [0, 1)", value)


def _check_train(train: TrainSettings) -> None:
    for name in ("batch_size", "micro_batch_size", "length_bucket"):
        value: int = getattr(train, name)
        require(value >= 1, f"train.{name}", "must be at least 1", value)
    steps, epochs = train.max_steps, train.num_train_epochs
    require(steps == -1 or steps >= 1, "train.max_steps", "must be -1 (epochs) or >= 1", steps)
    require(epochs > 0, "train.num_train_epochs", "must be positive", epochs)


def _check_data(run: AnyRun) -> None:
    data = run.data
    for name in ("max_prompt_length", "max_length", "max_rows"):
        value: int | None = getattr(data, name)
        require(value is None or value >= 1, f"data.{name}", "must be none or at least 1", value)
    buffer = data.shuffle_buffer
    require(buffer >= 1, "data.shuffle_buffer", "must be at least 1 row", buffer)
    require(data.eval_rows >= 0, "data.eval_rows", "must be at least 0", data.eval_rows)
    if data.streaming:
        require(
            run.train.max_steps >= 1,
            "train.max_steps",
            "must be set with data.streaming (the length of a stream is not known)",
            run.train.max_steps,
        )
        require(
            data.order in ("shuffled", "sequential"),
            "data.order",
            'must be "shuffled" or "sequential" with data.streaming',
            data.order,
        )
    has_eval = bool(data.eval_path or data.eval_split or data.eval_rows)
    rule = "needs data.eval_path, data.eval_split or data.eval_rows"
    require(run.eval.steps == 0 or has_eval, "eval.steps", rule, run.eval.steps)
    require(not run.eval.generate or has_eval, "eval.generate", rule, run.eval.generate)
    require(
        (data.eval_rows == 0) or not (data.eval_path or data.eval_split),
        "data.eval_rows",
        "must be 0 where data.eval_path or data.eval_split gives the held-out rows",
        data.eval_rows,
    )


def _check_eval(settings: EvalSettings) -> None:
    require(settings.steps >= 0, "eval.steps", "must be at least 0", settings.steps)
    require(settings.batch_size >= 1, "eval.batch_size", "must be at least 1", settings.batch_size)
    length = settings.max_completion_length
    rule = "must be none or at least 1"
    require(length is None or length >= 1, "eval.max_completion_length", rule, length)


def _check_grpo(run: GrpoRun) -> None:
    _check_sampling(run.sampling)
    _check_objective(run.objective)
    _check_transport(run.transport, run.rewards.workers)
    rewards, queue, actors = run.rewards, run.queue, run.actors
    names = rewards.functions
    unscored = isinstance(run, PairsRun) and run.pairs.mode == "given"
    rule = "must name at least one reward function"
    require(bool(names) or unscored, "rewards.functions", rule, names)
    require(all(names), "rewards.functions", "must hold no empty name", names)
    weights = rewards.reward_weights
    require(
        weights is None or len(weights) == len(names),
        "rewards.reward_weights",
        f"must hold one weight for each of the {len(names)} rewards.functions",
        weights,
    )
    timeout = rewards.reward_timeout_s
    require(timeout > 0, "rewards.reward_timeout_s", "must be positive", timeout)
    require(rewards.workers >= 1, "rewards.workers", "must be at least 1", rewards.workers)
    patience = rewards.max_none_batches
    require(patience >= 1, "rewards.max_none_batches", "must be at least 1", patience)
    stale = queue.max_staleness
    require(stale >= 0, "queue.max_staleness", "must be at least 0 (the synchronous loop)", stale)
    require(queue.max_attempts >= 1, "queue.max_attempts", "must be at least 1", queue.max_attempts)
    require(actors.heartbeat_s > 0, "actors.heartbeat_s", "must be positive", actors.heartbeat_s)
    require(
        queue.lease_s > 2 * actors.heartbeat_s,
        "queue.lease_s",
        f"must be more than twice actors.heartbeat_s ({actors.heartbeat_s})",
        queue.lease_s,
    )
    require(actors.count >= 0, "actors.count", "must be at least 0", actors.count)
    require(
        actors.count >= 1 or bool(run.transport.bind),
        "actors.count",
        "must be at least 1 unless transport.bind lets remote actors connect",
        actors.count,
    )
    most = actors.max_concurrent_completions
    require(most >= 1, "actors.max_concurrent_completions", "must be at least 1", most)
    chunk = actors.prefill_step_size
    require(chunk >= 1, "actors.prefill_step_size", "must be at least 1", chunk)
    restarts = actors.max_restarts
    require(restarts >= 0, "actors.max_restarts", "must be at least 0", restarts)


def _check_sampling(sampling: SamplingSettings) -> None:
    group, length = sampling.num_generations, sampling.max_completion_length
    rule = "must be at least 2: GRPO compares the completions of a group"
    require(group >= 2, "sampling.num_generations", rule, group)
    require(length >= 1, "sampling.max_completion_length", "must be at least 1", length)
    warm, top_p, min_p = sampling.temperature, sampling.top_p, sampling.min_p
    require(warm > 0, "sampling.temperature", "must be positive: training samples", warm)
    require(0 < top_p <= 1, "sampling.top_p", "must be in (0, 1]", top_p)
    require(sampling.top_k >= 0, "sampling.top_k", "must be at least 0 (off)", sampling.top_k)
    fits = min_p is None or 0 <= min_p <= 1
    require(fits, "sampling.min_p", "must be none or in [0, 1]", min_p)


def _check_objective(grpo: GrpoSettings) -> None:
    require(grpo.beta >= 0, "objective.beta", "must be at least 0", grpo.beta)
    require(grpo.epsilon > 0, "objective.epsilon", "must be positive", grpo.epsilon)
    for name in ("epsilon_high", "delta"):
        value: float | None = getattr(grpo, name)
        require(value is None or value > 0, f"objective.{name}", "must be none or positive", value)
    high = grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high
    delta = grpo.delta
    require(
        delta is None or delta > 1 + high,
        "objective.delta",
        f"must exceed 1 + epsilon_high ({1 + high:g}), or it undoes the upper clip",
        grpo.delta,
    )
    turns, quantile = grpo.num_iterations, grpo.top_entropy_quantile
    require(turns >= 1, "objective.num_iterations", "must be at least 1", turns)
    require(0 <= quantile <= 1, "objective.top_entropy_quantile", "must be in [0, 1]", quantile)
    for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
        heat: float = getattr(grpo, name)
        require(heat > 0, f"objective.{name}", "must be positive", heat)
    require(
        not grpo.importance_sampling_correction or grpo.old_logprobs == "recompute",
        "objective.importance_sampling_correction",
        'needs objective.old_logprobs = "recompute": it corrects the difference between the two',
        grpo.importance_sampling_correction,
    )
    low, top = grpo.importance_sampling_clip_min, grpo.importance_sampling_clip_max
    require(top > 0, "objective.importance_sampling_clip_max", "must be positive", top)
    require(
        low is None or 0 <= low <= top,
        "objective.importance_sampling_clip_min",
        f"must be none or between 0 and importance_sampling_clip_max ({top:g})",
        low,
    )


def _check_transport(transport: TransportSettings, workers: int) -> None:
    size = transport.max_message_mb
    require(size >= 1, "transport.max_message_mb", "must be at least 1", size)
    if not transport.bind:
        return
    address = transport.bind.removeprefix("tcp://")
    host, colon, port = address.rpartition(":")
    fits = transport.bind.startswith("tcp://") and colon and host and port.isdecimal()
    require(
        bool(fits) and int(port) + 1 + workers < 65536,
        "transport.bind",
        "must be tcp://host:port ; the ports above it serve snapshots and rewards",
        transport.bind,
    )
    require(
        bool(transport.keys) or is_loopback(host),
        "transport.bind",
        "is not a loopback address and needs transport.keys (launch/keys.py makes them)",
        transport.bind,
    )


def is_loopback(host: str) -> bool:
    """Whether a host name can be reached from this machine only."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
