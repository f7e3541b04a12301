"""Folders of PyTorch weights: safetensors, in one file or sharded with an index, and pytorch_model.bin (read only).

Tensors are read and written one at a time or one file at a time, never all of them together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils

from mlpmem_jax.core.errors import UserError, require

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
MAXIMUM_SHARD_BYTES = 5 * 10**9  # per file, as in transformers


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor under its PyTorch name.

    Attributes:
      read: returns its values in float32; for a tensor in a file also a part, given a tuple of slices.
      file: the file in which it is stored.
      dtype: the stored dtype, with safetensors' names.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[..., np.ndarray]
    file: str = ""
    dtype: str = "F32"


def write(folder: pathlib.Path, tensors: Sequence[Tensor], maximum_shard_bytes: int = MAXIMUM_SHARD_BYTES) -> None:
    """Writes tensors as float32 to model.safetensors, or if that is too large, to several files and an index.

    Every process must call this, because each holds a part of the tensors; the first one writes.
    """
    shards: list[list[Tensor]] = [[]]
    room = maximum_shard_bytes
    for tensor in tensors:
        size = _bytes(tensor)
        if shards[-1] and size > room:
            shards.append([])
            room = maximum_shard_bytes
        shards[-1].append(tensor)
        room -= size
    files, is_first = [SAFETENSORS], jax.process_index() == 0
    if len(shards) > 1:
        files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(_bytes(tensor) for tensor in tensors)},
            "weight_map": {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard},
        }
        if is_first:
            (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for file, shard in zip(files, shards, strict=True):
        # Safetensors writes memory in storage order: a transposed view would be written untransposed.
        arrays = {tensor.name: np.ascontiguousarray(tensor.read(), np.float32) for tensor in shard}
        if is_first:
            (folder / file).touch()
            mode = (folder / file).stat().st_mode  # with the umask's mode; the library lets only the owner read
            safetensors.numpy.save_file(arrays, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(mode)


def on_host(array: jax.Array) -> np.ndarray:
    """The whole array on the host; every process must call this and gets it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _bytes(tensor: Tensor) -> int:
    return 4 * int(np.prod(tensor.shape))


def read(folder: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a folder by name, without their values.

    If a folder has several kinds of files, the choice is that of transformers: safetensors before pickled ones, and a
    single file before an index. Pickled files are loaded with torch's `weights_only`, which does not run their code.

    Raises:
      UserError: there are no weights, or a file is truncated, foreign or missing.
    """
    for name, open_file in ((SAFETENSORS, _safetensors), (PICKLED, _pickled)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [name]
        elif index.is_file():
            with _explained(index, "the index of sharded weights, with a 'weight_map'"):
                files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            continue
        return {tensor.name: tensor for file in files for tensor in open_file(folder / file)}
    raise UserError(f"{folder}: expected weights in {SAFETENSORS} or {PICKLED}, or in files with an index; found none")


def _safetensors(file: pathlib.Path) -> Iterator[Tensor]:
    def values(name: str, part=...) -> np.ndarray:
        # The file is memory-mapped only here, so that its pages are released afterwards.
        with _explained(file, f"tensor {name!r}"), safetensors.safe_open(file, framework="numpy") as opened:
            return finite(opened.get_slice(name)[part].astype(np.float32), file, name)

    with _explained(file, "weights in safetensors"), safetensors.safe_open(file, framework="numpy") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        stored = {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in slices.items()}
    for name, (shape, dtype) in stored.items():
        yield Tensor(name, shape, functools.partial(values, name), str(file), dtype)


def _pickled(file: pathlib.Path) -> Iterator[Tensor]:
    torch = require("torch", extra="torch")
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    def values(name: str, tensor, part=...) -> np.ndarray:
        return finite(tensor[part].float().numpy(), file, name)

    with _explained(file, "a state dict of tensors alone, as torch.save writes it"):
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    for name, tensor in tensors.items():
        dtype = names.get(tensor.dtype, str(tensor.dtype))
        yield Tensor(name, tuple(tensor.shape), functools.partial(values, name, tensor), str(file), dtype)


def finite(values: np.ndarray, file: pathlib.Path, name: str) -> np.ndarray:
    """The values of a tensor.

    Raises:
      UserError: not all of them are finite; names the tensor.
    """
    if not np.isfinite(values).all():
        raise UserError(f"{file}: tensor {name!r} has values that are not finite; use another file")
    return values


@contextlib.contextmanager
def _explained(file: pathlib.Path, what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # safetensors and torch raise many kinds of errors for invalid files
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"{file}: expected {what}, and could not read it (truncated?): {reason}") from error


def check(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], source: str, prefix: str = "") -> None:
    """Checks tensors against the names and shapes that a config requires.

    Args:
      tensors: the existing tensors, by name.
      shapes: the required shapes, by name.
      source: source of the tensors, for errors.
      prefix: prefix of all these names in the file.

    Raises:
      UserError: names the first tensor that is missing, unexpected or of another shape.
    """
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(
                f"{source}: tensor {prefix + name!r} of shape {shape} is missing; config.json and weights disagree"
            )
        if tensors[name].shape != shape:
            raise UserError(
                f"{tensors[name].file}: tensor {prefix + name!r} is {tensors[name].shape}; config.json says {shape}"
            )
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise UserError(
            f"{tensors[extra[0]].file}: tensor {prefix + extra[0]!r} is not part of the model that "
            "config.json describes"
        )
