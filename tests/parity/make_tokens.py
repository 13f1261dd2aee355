"""Make `tokens/*.json`: token IDs and masks by TRL 1.16.0's own preparation and collators.

    pip install trl==1.16.0 torch
    python tests/parity/make_tokens.py --models FOLDER

FOLDER holds `tokenizer-qwen3` and `stories260K`. The rows go through the trainers'
`_prepare_dataset` and data collators; no model is needed. `tokens/randperm.json` has torch's;
`tokens/repeat_sampler.json` the order of GRPO's prompts over epochs; `tokens/unpaired.json` the
answers that KTO makes of datasets of pairs, in its order.
"""

# pyright: reportMissingImports=false
# (torch and trl are no dependencies)

import argparse
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from datasets import Dataset
from transformers import AutoTokenizer
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import RepeatSampler

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import tiny_tokenizer  # noqa: E402

ASK = [{"role": "user", "content": "Is the sky blue?"}]
YES = [{"role": "assistant", "content": "It is blue."}]
NO = [{"role": "assistant", "content": "No, the sky is 12 and the sea 42."}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add", "parameters": {}}}]


def plain_cases(eos: str) -> list[dict]:
    """Rows of plain strings: name, trainer, row, options."""
    pair = {"prompt": "The sky is", "chosen": " blue", "rejected": " the 42nd colour"}
    straddling = {"prompt": "The sky is ", "chosen": "blue", "rejected": "the 42"}
    one_side = {"prompt": "12 is ", "chosen": "blue", "rejected": "42"}
    implicit = {"chosen": "The sky is blue today", "rejected": "The sky is the 42"}
    ended = {"prompt": "The sky is", "chosen": " blue" + eos, "rejected": " the 42"}
    answer = {"prompt": "The sky is ", "completion": "blue", "label": False}
    prompt_completion = {"prompt": "The sky is ", "completion": "blue"}
    return [
        case("plain", "dpo", pair),
        case("eos on one side", "dpo", ended),
        case("straddling boundary", "dpo", straddling),
        case("straddling on one side", "dpo", one_side),
        case("implicit prompt", "dpo", implicit),
        case("implicit, one begins the other", "dpo", {"chosen": "12 is", "rejected": "12 is 42"}),
        case("not ASCII", "dpo", {"prompt": "é ", "chosen": "日本\n", "rejected": "🍎"}),
        case("keep_start", "dpo", pair, max_length=8),
        case("keep_end", "dpo", pair, max_length=8, truncation_mode="keep_end"),
        case("keep_end, no prompt left", "dpo", pair, max_length=3, truncation_mode="keep_end"),
        case("prompt fills the length", "dpo", pair, max_length=2),
        case("answer", "kto", answer),
        case("answer, cut", "kto", answer, max_length=7),
        case("text", "sft", {"text": "The sky is blue"}),
        case("text with eos", "sft", {"text": "The sky is blue" + eos}),
        case("text, keep_start", "sft", {"text": "The sky is blue"}, max_length=4),
        case(
            "text, keep_end",
            "sft",
            {"text": "The sky is blue"},
            max_length=4,
            truncation_mode="keep_end",
        ),
        case("completion only", "sft", prompt_completion),
        case("whole sequence", "sft", prompt_completion, completion_only=False),
    ]


def chat_cases() -> list[dict]:
    """Rows of messages."""
    pair = {"prompt": ASK, "chosen": YES, "rejected": NO}
    system = [{"role": "system", "content": "Be brief."}]
    turns = [*ASK, *YES, {"role": "user", "content": "And the sea?"}]
    return [
        case("chat", "dpo", pair),
        case("chat, system", "dpo", {**pair, "prompt": system + ASK}),
        case("chat, turns", "dpo", {**pair, "prompt": turns}),
        case("chat, implicit prompt", "dpo", {"chosen": ASK + YES, "rejected": ASK + NO}),
        case("chat, tools", "dpo", {**pair, "tools": json.dumps(TOOLS)}),
        case(
            "chat, template arguments",
            "dpo",
            {**pair, "chat_template_kwargs": {"shout": True, "enable_thinking": False}},
        ),
        case("chat, keep_start", "dpo", pair, max_length=40),
        case("chat, keep_end", "dpo", pair, max_length=12, truncation_mode="keep_end"),
        case("chat answer", "kto", {"prompt": ASK, "completion": YES, "label": True}),
        case("messages", "sft", {"messages": ASK + YES}),
        case("chat, completion only", "sft", {"prompt": ASK, "completion": NO}),
    ]


def case(name: str, trainer: str, row: dict, **options: object) -> dict:
    """One row with the settings that it is prepared under."""
    settings = {"max_length": None, "truncation_mode": "keep_start", "completion_only": None}
    return {"name": name, "trainer": trainer, "row": row, **settings, **options}


def arguments(item: dict) -> SimpleNamespace:
    """Return what `_prepare_dataset` reads of a trainer's configuration."""
    return SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=False,
        shuffle_dataset=False,
        max_length=item["max_length"],
        truncation_mode=item["truncation_mode"],
    )


def expected(item: dict, tokenizer) -> list[dict]:
    """Return TRL's sequences, each with IDs and mask; none where TRL drops the row."""
    data = Dataset.from_list([item["row"]])
    only = item["completion_only"]
    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=None,
        calculate_KL=False,
        completion_only_loss="prompt" in item["row"] if only is None else only,
    )
    args = arguments(item)
    if item["trainer"] == "sft":
        rows = SFTTrainer._prepare_dataset(trainer, data, tokenizer, args, False, None, "train")
        return [
            {"input_ids": r["input_ids"], "mask": [int(i != -100) for i in r["labels"]]}
            for r in rows
        ]
    if item["trainer"] == "kto":
        rows = KTOTrainer._prepare_dataset(trainer, data, tokenizer, args, "train")
        return [cut(r["prompt_ids"], r["completion_ids"], item["max_length"]) for r in rows]
    rows = list(DPOTrainer._prepare_dataset(trainer, data, tokenizer, args, "train"))
    if not rows:
        return []
    collator = DataCollatorForPreference(
        pad_token_id=0, max_length=item["max_length"], truncation_mode=item["truncation_mode"]
    )
    batch = {key: value.tolist() for key, value in collator(rows).items()}
    keys = ("input_ids", "attention_mask", "completion_mask")
    return [
        {"input_ids": ids[: sum(seen)], "mask": mask[: sum(seen)]}
        for ids, seen, mask in zip(*(batch[key] for key in keys), strict=True)
    ]


def cut(prompt: list[int], completion: list[int], limit: int | None) -> dict:
    """Cut as KTO's collator does."""
    mask = [0] * len(prompt) + [1] * len(completion)
    return {"input_ids": (prompt + completion)[:limit], "mask": mask[:limit]}


def unpaired_cases(eos: str) -> list[dict]:
    """Datasets of pairs: name, rows or a count of `numbered_pairs`, max_length."""
    plain = [
        {"prompt": "The sky is", "chosen": " blue", "rejected": " the 42nd colour"},
        {"prompt": "The sky is ", "chosen": "blue", "rejected": "the 42"},
        {"prompt": "12 is ", "chosen": "blue", "rejected": "42" + eos},
    ]
    implicit = [
        {"chosen": "The sky is blue today", "rejected": "The sky is the 42"},
        {"chosen": "12 is", "rejected": "12 is 42"},
    ]
    chats = [
        {"prompt": ASK, "chosen": YES, "rejected": NO},
        {"prompt": [*ASK, *YES, *ASK], "chosen": NO, "rejected": YES},
    ]
    talks = [{"chosen": ASK + YES, "rejected": ASK + NO}]
    return [
        {"name": "pairs", "rows": plain, "max_length": None},
        {"name": "implicit prompts", "rows": implicit, "max_length": None},
        {"name": "chats", "rows": chats, "max_length": None},
        {"name": "implicit chats", "rows": talks, "max_length": 60},
        {"name": "one answer has no room", "rows": plain, "max_length": 3},
        {"name": "blocks", "count": 2300, "max_length": 20},
    ]


def unpaired(item: dict, tokenizer) -> list[dict]:
    """Return KTO's answers of a dataset of pairs, each with IDs, mask and label."""
    rows = item["rows"] if "rows" in item else tiny_tokenizer.numbered_pairs(item["count"])
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0
    )
    settings = {"truncation_mode": "keep_start", **item}
    args = arguments(settings)
    answers = KTOTrainer._prepare_dataset(
        trainer, Dataset.from_list(rows), tokenizer, args, "train"
    )
    return [
        cut(a["prompt_ids"], a["completion_ids"], item["max_length"]) | {"label": a["label"]}
        for a in answers
    ]


def permutations() -> list[dict]:
    """Return torch.randperm on CPU: its first 40 indices and the digest of all as int32."""
    found = []
    for count, seed in [(0, 1), (1, 1), (2, 7), (10, 42), (32, 43), (625, 0), (5000, 2**32 + 5)]:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        found.append(described(order, seed))
    for count in (20_001, 70_000, 1_000_000):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
        found.append(described(order, 3))
    return found


def repeated() -> list[dict]:
    """Return what four epochs of TRL's RepeatSampler visit, seeded once."""
    found = []
    for count, seed, batch_size in [(10, 42, 4), (7, 0, 2), (103, 5, 8), (33, 2**31 - 1, 1)]:
        sampler = RepeatSampler(range(count), 1, batch_size, shuffle=True, seed=seed)
        epochs = [described(torch.tensor(list(sampler)), seed) for _ in range(4)]
        found.append({"count": count, "seed": seed, "batch_size": batch_size, "epochs": epochs})
    return found


def described(order: torch.Tensor, seed: int) -> dict:
    """Describe a permutation."""
    digest = hashlib.sha256(order.to(torch.int32).numpy().astype("<i4").tobytes()).hexdigest()
    return {"count": len(order), "seed": seed, "head": order[:40].tolist(), "sha256": digest}


def main() -> None:
    """Write the goldens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    folder = parser.parse_args().models
    if trl.__version__ != "1.16.0":
        raise SystemExit(f"TRL 1.16.0 is needed, this is {trl.__version__}")
    tokenizers = {
        "tiny": tiny_tokenizer.build(),
        "tiny-no-template": tiny_tokenizer.build(chat_template=False),
        "tokenizer-qwen3": AutoTokenizer.from_pretrained(folder / "tokenizer-qwen3"),
        "stories260K": AutoTokenizer.from_pretrained(folder / "stories260K"),
    }
    (HERE / "tokens").mkdir(exist_ok=True)
    for name, tokenizer in tokenizers.items():
        cases = plain_cases(tokenizer.eos_token)
        cases += chat_cases() if tokenizer.chat_template else []
        for item in cases:
            item["expected"] = expected(item, tokenizer)
        write(name, {"tokenizer": name, "trl": trl.__version__, "cases": cases})
    cases = unpaired_cases(tokenizers["tiny"].eos_token)
    for item in cases:
        answers = unpaired(item, tokenizers["tiny"])
        item["expected"] = answers if "rows" in item else tiny_tokenizer.answers_digest(answers)
    write("unpaired", {"tokenizer": "tiny", "trl": trl.__version__, "cases": cases})
    write("randperm", {"torch": torch.__version__, "cases": permutations()})
    write("repeat_sampler", {"trl": trl.__version__, "cases": repeated()})


def write(name: str, content: dict) -> None:
    """Write one golden file, a line a case."""
    head = {key: value for key, value in content.items() if key != "cases"}
    cases = ",\n".join(json.dumps(item) for item in content["cases"])
    text = json.dumps(head)[:-1] + ', "cases": [\n' + cases + "\n]}\n"
    (HERE / "tokens" / f"{name}.json").write_text(text)


if __name__ == "__main__":
    main()
