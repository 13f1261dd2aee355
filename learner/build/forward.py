"""How a GRPO step takes its micro-batches through the model, and the memory of that."""

# pyright: reportMissingTypeStubs=false
# (mlx is only partly typed)

from dataclasses import dataclass

from learner.build.common import report_memory
from learner.data.prompts import PromptSource
from learner.model.logprobs import Head
from learner.model.reference import Reference
from learner.model.trials import choose_head, choose_shared_prompt
from learner.optim.step import should_compile
from protocol.config.settings import GrpoRun, PromptData
from protocol.model.policy import LoadedPolicy

DEFAULT_PROMPT_LIMIT = 512  # tokens of a streamed prompt without data.max_prompt_length


@dataclass(frozen=True)
class Forward:
    """The way through the model; `peak_bytes` is the learner's estimated memory."""

    head: Head
    share_prompt: bool
    peak_bytes: int


def longest_prompt(data: PromptData, prompts: PromptSource) -> int:
    """Return the tokens of the longest prompt; of a stream, a guess."""
    longest = prompts.epochs.longest
    return longest if longest is not None else data.max_prompt_length or DEFAULT_PROMPT_LIMIT


def choose_forward(
    settings: GrpoRun, policy: LoadedPolicy, reference: Reference | None, prompt: int
) -> Forward:
    """Try which ways the model can take, and log the memory that `prompt` tokens need at most."""
    train = settings.train
    head = choose_head(policy.model, train.head)
    # A micro-batch that is one group computes its prompt only once.
    share_prompt = train.micro_batch_size == 1 and choose_shared_prompt(
        [policy.model] if reference is None else [policy.model, reference.model],
        train.shared_prompt,
        head=head,
        gradient_checkpointing=train.gradient_checkpointing,
        compiled=should_compile(train.compile),
    )

    completion = settings.sampling.max_completion_length
    peak_bytes = report_memory(
        settings,
        policy,
        reference,
        head,
        sequences=train.micro_batch_size * settings.sampling.num_generations,
        length=prompt + completion,
        completion_length=completion,
        shared_prompt=share_prompt,
    )
    return Forward(head, share_prompt, peak_bytes)
