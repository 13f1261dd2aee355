"""An Ollama Modelfile for an exported model: FROM, TEMPLATE, PARAMETER stop.

A chat template is Jinja; Ollama's templates are Go's. There is no general conversion: each
family that the markers below tell apart has a template written by hand; for any other, the
Modelfile says that its template is missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A way of writing chats; a Jinja template that holds all `markers` belongs to it."""

    name: str
    markers: tuple[str, ...]
    template: str
    stops: tuple[str, ...]


_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""

_LLAMA3 = """{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>

"""

_GEMMA = """{{- range .Messages }}<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}user\
{{ end }}
{{ .Content }}<end_of_turn>
{{ end }}<start_of_turn>model
"""

_MISTRAL = """{{- range .Messages }}{{ if eq .Role "assistant" }} {{ .Content }}</s>{{ else }}\
[INST] {{ .Content }} [/INST]{{ end }}{{ end }}"""

_ZEPHYR = """{{- range .Messages }}<|{{ .Role }}|>
{{ .Content }}</s>
{{ end }}<|assistant|>
"""

FAMILIES = (
    Family("Llama 3", ("<|start_header_id|>", "<|eot_id|>"), _LLAMA3, ("<|eot_id|>",)),
    Family("ChatML", ("<|im_start|>", "<|im_end|>"), _CHATML, ("<|im_end|>",)),
    Family("Gemma", ("<start_of_turn>", "<end_of_turn>"), _GEMMA, ("<end_of_turn>",)),
    Family("Mistral", ("[INST]", "[/INST]"), _MISTRAL, ("</s>",)),
    Family("Zephyr", ("<|user|>", "<|assistant|>", "eos_token"), _ZEPHYR, ("</s>",)),
)


def family_of(chat_template: str | None) -> Family | None:
    """Return the family of a Jinja chat template, or None."""
    for family in FAMILIES:
        if chat_template and all(marker in chat_template for marker in family.markers):
            return family
    return None


def modelfile(source: str, chat_template: str | None, stop_words: Sequence[str]) -> str:
    """Return a Modelfile for `source` (a GGUF file or a folder, relative to the Modelfile)."""
    family = family_of(chat_template)
    lines = [f"FROM {source}"]
    stops = list(dict.fromkeys([*stop_words, *(family.stops if family else ())]))
    if family is None:
        lines += [f"# {note}" for note in template_notes(chat_template)]
        lines.append("TEMPLATE {{ .Prompt }}")
    else:
        lines += [f'TEMPLATE """{family.template}"""']
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    return "\n".join(lines) + "\n"


def template_notes(chat_template: str | None) -> list[str]:
    """Return notes on the template: which one was written, and what could not be converted."""
    family = family_of(chat_template)
    if not chat_template:
        return ["The tokenizer has no chat template: prompts are passed on unchanged."]
    if family is None:
        return [
            "The chat template could not be converted: it belongs to no known family. "
            "Write TEMPLATE by hand before you chat with this model."
        ]
    left_out = [word for word in ("tools", "enable_thinking") if word in chat_template]
    notes = [f"The Modelfile has Ollama's chat template for the {family.name} family."]
    if left_out:
        notes.append(f"Not converted: the chat template's handling of {', '.join(left_out)}.")
    return notes


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
