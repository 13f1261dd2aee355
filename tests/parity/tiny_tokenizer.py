"""A byte-level BPE tokenizer of 276 tokens, the same wherever it is built: merges are listed.

The TRL program that makes the goldens and the tests that read them both build it here.
"""

import hashlib
import json
from typing import Any

_MERGES = "h e|l l|o Ġ|Ġ b|e Ġ|i s|t he|b l|bl u|Ġb l|Ġbl u|Ġ t|4 2|Ġ 4|Ġ is|1 2"
CHATML = (
    "{% if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if shout is defined and shout %}{{ m['content'] | upper }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _byte_characters() -> list[str]:
    """GPT-2's visible stand-ins for the 256 bytes, in order."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def build(*, chat_template: bool = True) -> Any:
    """Return a transformers tokenizer; `<|im_end|>` is its EOS token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splits = [pair.split(" ") for pair in _MERGES.split("|")]
    merges = [(left, right) for left, right in splits]
    tokens = _byte_characters() + ["".join(pair) for pair in merges]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML if chat_template else None,
    )


def numbered_pairs(count: int) -> list[dict[str, str]]:
    """Return pairs of which every seventh has a prompt of more than 20 tokens."""
    return [
        {
            "prompt": f"{number} is" + (" not" * 20 if number % 7 == 6 else ""),
            "chosen": " blue" * (1 + number % 3),
            "rejected": f" {number % 4}",
        }
        for number in range(count)
    ]


def answers_digest(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the number of answers (input_ids, mask, label) and the digest of them in order."""
    text = json.dumps([[a["input_ids"], a["mask"], a["label"]] for a in answers])
    return {"count": len(answers), "sha256": hashlib.sha256(text.encode()).hexdigest()}
