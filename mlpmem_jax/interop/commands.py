"""The verbs `export` and `import` of the command line."""

from __future__ import annotations

import pathlib

import ml_collections

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.interop import arrow_export, arrow_import, export_model, import_model, peft_adapter, verification


def export(config: ml_collections.ConfigDict, form: str, output: str, *, split: str, verify: bool) -> None:
    """Exports from `config.workdir`.

    Args:
      config: the resolved config.
      form: the format, as in `mlpmem export --format`.
      output: folder or file to create.
      split: split of targets and datastores.
      verify: whether to score the test split in PyTorch and compare; only for "transformers".

    Raises:
      UserError: an artifact is missing, a file does not match, or the output exists.
    """
    if verify and form != "transformers":
        raise UserError(f"--verify: needs --format=transformers; {form} has no language model to score")
    if form == "transformers":
        folder = export_model.transformers_folder(config, output)
        if verify:
            verification.run(config, folder)
    elif form == "reference":
        export_model.reference_folder(config, output)
    elif form == "peft":
        peft_adapter.export(config, output)
    elif form == "reference-targets":
        arrow_export.export_targets(config, split, output)
    else:
        arrow_export.export_datastore(config, split, output)


def import_any(config: ml_collections.ConfigDict, source: str, *, split: str) -> None:
    """Imports a model from a folder, or a split from a file with an Arrow stream.

    Raises:
      UserError: it is missing, or does not match the config.
    """
    if not pathlib.Path(source).exists():
        raise UserError(f"--from={source}: no such file or folder")
    if pathlib.Path(source).is_dir():
        import_model.run(config, source)
    else:
        arrow_import.run(config, split, source)
