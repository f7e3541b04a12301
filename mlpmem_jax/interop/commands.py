"""The verbs `export` and `import` of the command line."""

from __future__ import annotations

import argparse
import pathlib

import ml_collections

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.interop import arrow_export, arrow_import, export_model, import_model, peft_adapter, verify


def run(config: ml_collections.ConfigDict, options: argparse.Namespace) -> None:
    """Exports or imports what the options ask for.

    Args:
      config: resolved.
      options: verb; of "export" format, output, verify and split; of "import" source and split.

    Raises:
      UserError: an artifact is missing, a file does not fit, the output exists.
    """
    if options.verb == "import":
        import_any(config, options.source, options.split)
        return
    if options.verify and options.format != "transformers":
        raise UserError(f"--verify: needs --format=transformers; {options.format} holds no language model to score")
    if options.format == "transformers":
        folder = export_model.transformers_folder(config, options.output)
        if options.verify:
            verify.run(config, folder)
    elif options.format == "reference":
        export_model.reference_folder(config, options.output)
    elif options.format == "peft":
        peft_adapter.export(config, options.output)
    elif options.format == "reference-targets":
        arrow_export.export_targets(config, options.split, options.output)
    else:
        arrow_export.export_datastore(config, options.split, options.output)


def import_any(config: ml_collections.ConfigDict, source: str, split: str) -> None:
    """A folder is a model, a file an Arrow stream."""
    if not pathlib.Path(source).exists():
        raise UserError(f"--from={source}: no such file or folder")
    if pathlib.Path(source).is_dir():
        import_model.run(config, source)
    else:
        arrow_import.run(config, split, source)
