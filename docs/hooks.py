"""Writes the page of all configuration keys, from the configuration classes themselves."""

import dataclasses
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from taca_jax.config.fields import describe, fields_of, show
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.training.config import TrainConfig

PAGE = "reference/configuration.md"
INTRODUCTION = """# Configuration

Every key of the commands, as their `--help` prints them: `key=value`, with a dot for keys of a
group (`lora.rank=64`). `none` leaves out what may be left out. A preset (`--config NAME`, a file in
`configs/`) sets some of them; the values below are the defaults without one.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page to the site's files."""
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """The page, in Markdown."""
    parts = [INTRODUCTION]
    for program, kind in {"train.py": TrainConfig, "generate.py": GenerateConfig}.items():
        parts += [f"\n## {program}\n", *_rows(kind)]
    return "\n".join(parts) + "\n"


def _rows(kind: type) -> Iterator[str]:
    """A table of the keys that are in no group, and one of each group."""
    fields = fields_of(kind)
    groups = ["", *(name for name, field in fields.items() if field.group is not None)]
    for group in groups:
        if group:
            yield f"\n### `{group}.*`\n\n{_text(fields[group].doc)}"
        yield "\n| key | default | value | meaning |\n|---|---|---|---|"
        for name, field in fields.items():
            if field.group is None and name.rpartition(".")[0] == group:
                required = field.default is dataclasses.MISSING
                default = "required" if required else f"`{show(field.default)}`"
                kinds = _text(describe(field.annotation))
                yield f"| `{name}` | {default} | {kinds} | {_text(field.doc)} |"


def _text(doc: str) -> str:
    return doc.replace("|", "\\|").replace("\n", " ")
