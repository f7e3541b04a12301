"""llama.cpp's GGUF files: metadata and tensors, in any quantization that the `gguf` package can dequantize."""

from __future__ import annotations

import math
import pathlib

import numpy as np

from mlpmem_jax.core.errors import UserError, require


class GGUFFile:
    """A GGUF file, open for reading."""

    def __init__(self, path: str | pathlib.Path):
        """Reads the header.

        Raises:
          UserError: the file does not exist, is damaged, big-endian, or not a GGUF file.
        """
        self.path = pathlib.Path(path).expanduser()
        if not self.path.is_file():
            advice = "; `make smollm2-model` fetches it" if "SmolLM2" in self.path.name else ""
            raise UserError(f"{path}: no such file; expected a GGUF file{advice}")
        self._gguf = require("gguf", extra="gguf")
        try:
            reader = self._gguf.GGUFReader(self.path)
            self.values = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the package raises errors of NumPy and its own
            raise UserError(
                f"{path}: expected a GGUF file, found something else, or a damaged one ({error})"
            ) from error
        if reader.byte_order == "S":  # the package would dequantize its swapped bytes to wrong numbers
            raise UserError(f"{path}: its byte order is not that of this machine; use a file in the other one")
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def value(self, name: str, default=None):
        """The metadata with a name; UserError if it is missing and there is no default."""
        value = self.values.get(name, default)
        if value is None:
            raise UserError(f"{self.path}: has no {name}; this is not a complete llama.cpp model")
        return value

    def number(self, name: str, default: float | None = None, kind: type = int):
        """The positive number with a name: a whole one, or with kind `float` any.

        Raises:
          UserError: it is missing and there is no default, or is something else.
        """
        value = self.value(name, default)
        if type(value) not in (int, kind) or not 0 < value < math.inf:
            expected = "a whole number" if kind is int else "a number"
            raise UserError(f"{self.path}: {name} is {str(value)[:50]!r}; expected {expected} above 0")
        return kind(value)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in PyTorch's order: rows first."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def read(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, float32; only its rows are dequantized.

        Raises:
          UserError: the package cannot dequantize this quantization.
        """
        tensor, (rows, *rest) = self.tensors[name], part
        try:
            values = self._gguf.quants.dequantize(tensor.data[rows], tensor.tensor_type)
        except (NotImplementedError, KeyError, ValueError) as error:
            raise UserError(
                f"{self.path}: tensor {name!r} is quantized as {tensor.tensor_type.name}, which the gguf package does "
                f"not dequantize ({error}); use a file with another quantization"
            ) from error
        return np.asarray(values, np.float32)[(slice(None), *rest)]
