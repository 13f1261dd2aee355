"""What a run tells its actors, from which they choose their number of concurrent completions."""

import json
import platform
from pathlib import Path

from learner.build.forward import DEFAULT_PROMPT_LIMIT
from learner.build.online import OnlineAddresses, OnlinePlan, ledger_settings, new_coordinator
from learner.data.prompts import open_prompts
from learner.ledger.ledger import Ledger
from protocol.config.load import load
from protocol.config.settings import GrpoRun, ModelSettings, narrowed
from protocol.messages.messages import Welcome
from protocol.model.policy import load_policy
from tests.tiny import write_model_folder


def terms(folder: Path, *flags: str, eval_length: int | None = None) -> Welcome:
    """Return the terms of a run over prompts of up to five words, with one of seven held out."""
    rows = [" ".join(["w5"] * words) for words in (2, 5, 3)]
    for name, prompts in (("rows", rows), ("held_out", [" ".join(["w5"] * 7)])):
        lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    common = [f"--model.path={write_model_folder(folder / 'model')}", "--model.dtype=float32"]
    common += [f"--data.path={folder / 'rows.jsonl'}", "--rewards.functions=a.py:f"]
    settings = load(GrpoRun, None, [*common, "--train.batch_size=3", "--train.max_steps=2", *flags])

    policy = load_policy(settings.model, seed=0)
    prompts = open_prompts(settings.data, policy.tokenizer, seed=0, epochs=None, batch_size=3)
    model = narrowed(settings.model, ModelSettings)
    addresses = OnlineAddresses(["ipc://a"], "ipc://s", [])
    plan = OnlinePlan(folder, addresses, settings, model, policy, prompts, 2)
    ledger = Ledger.new(ledger_settings(plan), "r", "L1")
    return new_coordinator(plan, ledger, 12_345, eval_length=eval_length).welcome


def test_the_terms_say_what_the_queue_holds_and_what_the_learner_takes(tmp_path: Path):
    flags = ["--queue.max_staleness=1", "--sampling.num_generations=4", "--actors.count=3"]
    told = terms(tmp_path, *flags, "--sampling.max_completion_length=16")
    assert told.in_flight_completions == (1 + 1) * 3 * 4
    assert (told.local_actors, told.min_generations) == (3, 4)
    assert (told.max_prompt, told.max_tokens) == (5, 5 + 16)
    assert (told.learner_bytes, told.host) == (12_345, platform.node())


def test_held_out_prompts_and_their_answers_count_too(tmp_path: Path):
    flags = ["--sampling.max_completion_length=16", f"--data.eval_path={tmp_path}/held_out.jsonl"]
    told = terms(tmp_path, *flags, eval_length=32)
    assert (told.max_prompt, told.max_tokens) == (7, 7 + 32)
    assert told.min_generations == 1  # prompts of an evaluation have one answer each


def test_a_streams_longest_prompt_is_a_guess(tmp_path: Path):
    told = terms(tmp_path, "--data.streaming=true", "--sampling.max_completion_length=16")
    assert told.max_prompt == DEFAULT_PROMPT_LIMIT == 512
    told = terms(tmp_path, "--data.streaming=true", "--data.max_prompt_length=9")
    assert told.max_prompt == 9


def test_the_actors_of_a_deterministic_run_are_told(tmp_path: Path):
    assert not terms(tmp_path).deterministic
    assert terms(tmp_path, "--run.deterministic=true").deterministic
