"""Reads values of a Hugging Face config.json, with errors that name the file and the key.

Keys that models/ does not implement are refused, because such a model would load but give different numbers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mlpmem_jax.core.errors import UserError

NUMBER = (int, float)


@dataclasses.dataclass(frozen=True)
class ConfigJson:
    """A config.json, or a group in it.

    Attributes:
      file: the file, for messages.
      values: values by key.
    """

    file: str
    values: dict[str, Any]

    @property
    def family(self) -> str:
        """The `model_type`; GPT-2's configs may omit it."""
        return self.values.get("model_type", "gpt2")

    def error(self, text: str) -> UserError:
        """An error about this file."""
        return UserError(f"{self.file}: {text}")

    def check_allowed(self, name: str, value, allowed: tuple) -> None:
        """Raises UserError if the value is not one of the implemented ones; `name` is its key in messages."""
        if value not in allowed:
            raise self.error(f"{name} is {value!r}; only {' or '.join(map(repr, allowed))} can be imported")

    def sizes(self, keys: tuple[str, ...]) -> list[int]:
        """The positive whole numbers under required keys.

        Raises:
          UserError: one is missing or has another value.
        """
        for key in keys:
            if type(self.values.get(key)) is not int or self.values[key] < 1:
                raise self.error(
                    f"{key} is missing or no whole number above 0; this is not a config of a {self.family} model"
                )
        return [self.values[key] for key in keys]

    def optional(self, key: str, default, kinds: tuple[type, ...] = (int,)):
        """The positive number, text or boolean under an optional key; null counts as `default`.

        Raises:
          UserError: it is none of the `kinds`, or not positive.
        """
        value = self.values.get(key)
        if value is None:
            return default
        is_number = type(value) is not bool and isinstance(value, int | float)
        if type(value) not in kinds or (is_number and not 0 < value < math.inf):
            expected = {
                int: "a whole number above 0",
                float: "a number above 0",
                bool: "true or false",
                dict: "a group",
            }
            raise self.error(f"{key} is {value!r}; expected {expected[kinds[-1]]}, or null")
        return value

    def check_divides(self, part: str, divisor: int, whole: str, dividend: int) -> None:
        """Raises UserError if the divisor, the value of key `part`, does not divide that of key `whole`."""
        if dividend % divisor:
            raise self.error(f"{part}, {divisor}, does not divide {whole}, {dividend}")
