"""Rows for tests of datasets: written as JSONL, and a tokenizer for them that needs no files."""

import json

from protocol.config.settings import ExampleData, GrpoData


class ByteTokenizer:
    """UTF-8 bytes; EOS is one byte, and there is no chat template."""

    eos_token = "\x04"
    chat_template = None

    def encode(self, text):
        return list(text.encode())


def data_of(tmp_path, rows, **settings):
    """Write rows to a JSONL file and return the settings that name it, of examples."""
    return ExampleData(path=_write(tmp_path, rows), **settings)


def prompt_data_of(tmp_path, rows, **settings):
    """Write rows to a JSONL file and return the settings that name it, of prompts."""
    return GrpoData(path=_write(tmp_path, rows), **settings)


def _write(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)
