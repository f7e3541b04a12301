"""Lambda, which the report of a memory says."""

import json
import types

import pytest

from mlpmem_jax.core.errors import ArtifactError
from mlpmem_jax.inference import weight

MEMORY = types.SimpleNamespace(fingerprint="f", path="memory")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-3],
        lambda text: text.replace("provenance", "prov\ufffdnance"),
        lambda text: text.replace("0.25", "4.25"),
        lambda text: text.replace("0.25", '"0"'),
        lambda text: "[]",
    ],
)
def test_a_damaged_report_is_named_and_gives_no_lambda(tmp_path, damage):
    report = {"provenance": {"fingerprints": {"memory": "f"}}, "interpolation_weight": {"memory": 0.25}}
    file = tmp_path / "report" / "metrics.json"
    file.parent.mkdir()
    file.write_text(json.dumps(report))
    assert weight.find_weight(tmp_path, MEMORY).value == 0.25
    file.write_text(damage(json.dumps(report)))
    with pytest.raises(ArtifactError, match=rf"^{file}: edited or corrupt"):
        weight.find_weight(tmp_path, MEMORY)
