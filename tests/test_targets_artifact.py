import itertools

import numpy as np
import pytest
from retrieval_data import LENGTH, PER_SHARD, write_workdir

from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.errors import ConfigError, UserError
from mlpmem_jax.retrieval.distribution import SparseDistributions
from mlpmem_jax.retrieval.targets_artifact import TargetsReader, TargetsWriter, array_specs, folder_of

SEQUENCES = 6  # two shards, the last one not full


@pytest.fixture
def datastore(tmp_path):
    write_workdir(tmp_path)
    return open_artifact(tmp_path / "datastore" / "validation", "datastore")


def distributions(rng, positions):
    counts_N = rng.integers(0, 5, positions)
    return SparseDistributions(
        offsets_Q1=np.concatenate([[0], np.cumsum(counts_N)]),
        token_ids_M=rng.integers(0, 50, counts_N.sum(), np.int32),
        probabilities_M=rng.integers(1, 64, counts_N.sum()).astype(np.float32) / 64,  # float16 holds them
        label_probabilities_Q=rng.random(positions, np.float32),
        dropped_mass_Q=np.full(positions, 0.25, np.float32),
    )


def test_what_is_written_is_read_position_by_position(datastore, tmp_path):
    rng = np.random.default_rng(0)
    writer = TargetsWriter(folder_of(tmp_path, "validation"), {}, {}, array_specs(datastore, "uint16", 4))
    # A shard may come in parts that end anywhere.
    parts = [[distributions(rng, n) for n in sizes] for sizes in ((10, PER_SHARD * LENGTH - 10), (2 * LENGTH,))]
    for shard in writer.incomplete_shards():
        writer.write_shard(shard, parts[shard], lacking=shard)
    writer.seal({"k": 4})
    written = [
        (part.token_ids_M[start:stop].tolist(), part.probabilities_M[start:stop].tolist())
        for shard in parts
        for part in shard
        for start, stop in zip(part.offsets_Q1[:-1], part.offsets_Q1[1:], strict=True)
    ]
    reader = TargetsReader.open(tmp_path, "validation")
    assert (reader.num_sequences, reader.length, reader.shards()) == (SEQUENCES, LENGTH, [(0, 4), (4, 2)])
    for first, stop in [(0, 4), (1, 3), (3, 4), (4, 6), (5, 6)]:
        offsets_N1, token_ids_M, probabilities_M = reader.read(first, stop)
        read = [
            (token_ids_M[start:end].tolist(), probabilities_M[start:end].tolist())
            for start, end in itertools.pairwise(offsets_N1)
        ]
        assert read == written[first * LENGTH : stop * LENGTH]
    labels_N = np.concatenate([part.label_probabilities_Q for shard in parts for part in shard])
    np.testing.assert_array_equal(reader.label_probabilities(2, 5).ravel(), labels_N[2 * LENGTH : 5 * LENGTH])
    summary = reader.artifact.summary
    assert reader.max_entries == max(len(tokens) for tokens, _ in written)
    assert summary["mean_entries"] == pytest.approx(np.mean([len(tokens) for tokens, _ in written]))
    assert (summary["positions_lacking_k"], summary["dropped_mass"]) == (1, 0.25)


def test_more_entries_than_an_offset_can_count_are_refused(datastore):
    with pytest.raises(ConfigError, match=r"sequences_per_shard: 4 sequences of 16 positions with up to 40000000 ent"):
        array_specs(datastore, "uint16", 40_000_000)


@pytest.mark.parametrize("probability", [np.nan, np.inf])
def test_a_shard_that_is_not_finite_is_refused(datastore, tmp_path, probability):
    part = distributions(np.random.default_rng(0), PER_SHARD * LENGTH)
    part.probabilities_M[3] = probability
    writer = TargetsWriter(folder_of(tmp_path, "validation"), {}, {}, array_specs(datastore, "uint16", 4))
    with pytest.raises(UserError, match="targets/validation: the distributions of shard 0 are empty or not finite"):
        writer.write_shard(0, [part])
    assert writer.incomplete_shards() == [0, 1]
