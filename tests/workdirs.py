"""What many tests need of a working directory: a small config, a datastore of given arrays, the bytes of a folder."""

import pathlib

from configs import smoke
from mlpmem_jax.core.artifacts import ArraySpec, Artifact, ArtifactWriter


def small_config(workdir, *, steps, every, blocks=1, **changes):
    """The smoke config of a model of width 16 with contexts of 16 tokens; "group__key" changes a key."""
    config = smoke.get_config()
    config.workdir = str(workdir)
    config.corpus.max_bytes = 60_000
    config.tokenizer.vocab_size = 300
    config.base.update({"context_length": 16, "width": 16, "blocks": blocks})
    for settings in (config.base.training, config.training):
        settings.update({"steps": steps, "warmup_steps": 2, "evaluate_every": every, "checkpoint_every": every})
    config.memory.update({"width": 16, "blocks": 1})
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def write_datastore(path, arrays, *, inputs=None, summary=None, per_shard=4) -> Artifact:
    """A sealed datastore of arrays [sequences, T, ...] by name."""
    specs = {
        name: ArraySpec(array.shape, str(array.dtype), per_shard, (1, *array.shape[1:]))
        for name, array in arrays.items()
    }
    writer = ArtifactWriter.create(path, "datastore", {}, inputs or {}, specs)
    for shard in writer.incomplete_shards():
        part = slice(shard * per_shard, (shard + 1) * per_shard)
        writer.write_shard(shard, {name: array[part] for name, array in arrays.items()})
    return writer.seal(summary or {})


def bytes_by_file(folder, leave_out=frozenset()) -> dict[str, bytes]:
    """The bytes of every file under a folder by its relative path; parts of a path that are to be left out."""
    folder = pathlib.Path(folder)
    files = {file.relative_to(folder): file for file in folder.rglob("*") if file.is_file()}
    return {str(path): file.read_bytes() for path, file in sorted(files.items()) if not leave_out & set(path.parts)}
