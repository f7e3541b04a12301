"""The search on keys with the statistics of real language models, and the recall that it has to reach."""

import numpy as np
import pytest
from etils import epath
from retrieval_data import LENGTH
from workdirs import write_datastore

from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.retrieval import quality, scann_backend, scratch, tuning
from mlpmem_jax.retrieval.key_shards import KeyShards, Search
from mlpmem_jax.retrieval.queries import sample_queries
from mlpmem_jax.retrieval.scann_backend import ScannIndex
from mlpmem_jax.retrieval.scann_index import Options
from mlpmem_jax.retrieval.scratch import Measurements

pytestmark = pytest.mark.skipif(bool(scann_backend.unavailable()), reason="ScaNN has no wheel for this machine")

WIDTH, K = 48, 16


@pytest.fixture(scope="module")
def datastore(tmp_path_factory):
    """Keys in clusters; where attention is parked one number is -31, the others vary by 0.2 around means up to 5."""
    rng = np.random.default_rng(0)
    centers = 0.2 * rng.standard_normal((300, WIDTH))
    keys = centers[rng.integers(300, size=6400)] + 0.1 * rng.standard_normal((6400, WIDTH)) + rng.uniform(-5, 5, WIDTH)
    keys[rng.random(6400) < 0.02, 7] -= 31
    keys = keys.astype(np.float16).reshape(-1, LENGTH, WIDTH)
    folder = tmp_path_factory.mktemp("datastore")
    arrays = {
        "keys": keys,
        "next_tokens": rng.integers(50, size=keys.shape[:2]).astype(np.int32),
        "documents": np.arange(6400, dtype=np.int32).reshape(keys.shape[:2]) // 40,
    }
    write_datastore(folder, arrays)
    return open_artifact(folder, "datastore")


def shards_and_sample(datastore, tmp_path, **settings):
    search = Search.create(scann_backend.Backend, {"k": K, **settings})
    key_shards = KeyShards.prepare(datastore, 10**6, epath.Path(tmp_path), search)
    return key_shards, quality.Sample.draw(key_shards, sample_queries(datastore, 300), "self", K)


def test_keys_as_they_are_are_lost_to_one_large_number(datastore):
    """What the preparation is for; ScaNN by itself, with every leaf searched."""
    keys = datastore.read("keys", 0, 400).reshape(-1, WIDTH).astype(np.float32)
    _, ids = ScannIndex.build(keys, Options(80, 80, 2.0, 6400)).search(keys[:300], K)
    truth = np.argsort(((keys[:300, None] - keys[None]) ** 2).sum(axis=2), axis=1)[:, :K]
    assert quality.contains(ids, truth).mean() < 0.8


def test_the_prepared_search_reaches_the_recall_at_the_least_cost(datastore, tmp_path):
    key_shards, sample = shards_and_sample(datastore, tmp_path)
    trials, place = tuning.reach(key_shards, sample, 0.97)
    assert trials[place].recall >= 0.97
    assert all(trial.recall < 0.97 for trial in trials[:place])
    costs = [trial.bytes_read for trial in trials]
    assert costs == sorted(costs)
    # The distances are those of the keys themselves.
    assert sample.search(trials[place].effort)[0] == trials[place].recall
    queries = sample_queries(datastore, 50)
    distances, ids = key_shards.open(0).search(queries, K, None, trials[place].effort)
    truth = ((key_shards.keys(0).read(0, 6400)[ids].astype(np.float64) - queries.keys_QxD[:, None]) ** 2).sum(axis=2)
    np.testing.assert_allclose(distances, truth, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("recalls", "first", "expected"),
    [
        ([0.2, 0.5, 0.8, 0.96, 0.99], 2, 3),  # up
        ([0.2, 0.5, 0.96, 0.97, 0.99], 3, 3),  # reached, but not by far
        ([0.2, 0.96, 0.97, 0.98, 0.99], 3, 1),  # by far: down to the last that reaches it
        ([0.96, 0.97, 0.98, 0.98, 0.99], 4, 0),
        ([0.2, 0.5, 0.8, 0.8, 0.9], 2, 4),  # out of reach
        ([0.2], 0, 0),
    ],
)
def test_efforts_are_searched_up_or_down(recalls, first, expected):
    assert tuning._cheapest(lambda place: recalls[place], len(recalls), first, 0.95) == expected


def test_the_true_neighbors_are_found_without_an_index(datastore, tmp_path, monkeypatch):
    search = Search.create(scann_backend.Backend, {"k": K})
    key_shards = KeyShards.prepare(datastore, 3200, epath.Path(tmp_path), search)
    monkeypatch.setattr(KeyShards, "_index", lambda self, shard: pytest.fail("opened"))
    queries = sample_queries(datastore, 300)
    sample = quality.Sample.draw(key_shards, queries, "self", K)
    keys = datastore.read("keys", 0, 400).reshape(-1, WIDTH).astype(np.float64)
    distances = ((keys[None] - queries.keys_QxD[:, None]) ** 2).sum(axis=2)
    distances[np.arange(300), queries.positions_Q] = np.inf
    actual = np.concatenate([ids + 3200 * shard for shard, (_, ids) in enumerate(sample.true_neighbors)], axis=1)
    np.testing.assert_allclose(
        np.sort(np.take_along_axis(distances, actual, axis=1), axis=1)[:, :K],
        np.sort(distances, axis=1)[:, :K],
        rtol=1e-4,
        atol=2e-3,
    )


def test_what_was_measured_before_an_interruption_is_not_measured_again(datastore, tmp_path, monkeypatch):
    search = Search.create(scann_backend.Backend, {"k": K})
    searched = []

    def count(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments: (searched.append(name), original(*arguments))[1])

    count(KeyShards, "exact_neighbors")
    count(KeyShards, "search_shard")

    def measured(folder, recall):
        searched.clear()
        key_shards = KeyShards.prepare(datastore, 3200, epath.Path(tmp_path), search)
        sample = quality.Sample.draw(
            key_shards, sample_queries(datastore, 300), "self", K, Measurements(folder and epath.Path(folder))
        )
        trials, place = tuning.reach(key_shards, sample, recall)
        return [(str(trial), trial.packed_QxK.tobytes()) for trial in trials], place, sample.packed_QxK.tobytes()

    folder = tmp_path / "measured"
    expected = measured(None, 0.97)
    assert measured(folder, 0.97) == expected
    assert searched.count("exact_neighbors") == 2
    searches = searched.count("search_shard")
    assert measured(folder, 0.97) == expected
    assert searched == []
    folder.joinpath("exact.0001.npy").unlink()
    lost = sorted(folder.glob("search,*.0001.npy"))[0]
    lost.unlink()
    assert measured(folder, 0.97) == expected
    assert searched == ["exact_neighbors", "search_shard"]
    assert searches == len(list(folder.glob("search,*")))  # the trial of the first shard alone was not repeated either
    measured(folder, 0.5)  # as after a recall that was out of reach
    assert searched.count("exact_neighbors") == 0


def test_processes_of_a_collective_search_reuse_what_all_of_them_see(tmp_path, monkeypatch):
    folder = epath.Path(tmp_path)
    Measurements(folder, is_collective=True)
    list(Measurements(folder, is_collective=True).of_shards("exact", range(2), lambda shard: np.full(3, shard)))
    monkeypatch.setattr(scratch.jax, "process_count", lambda: 2)
    for others, measured in ((0, []), (1, [0, 1])):  # the other process sees the same files, or fewer
        monkeypatch.setattr(
            scratch.multihost_utils, "process_allgather", lambda own, others=others: np.array([own, own - others])
        )
        asked = []
        arrays = Measurements(folder, is_collective=True).of_shards(
            "exact", range(2), lambda shard, asked=asked: (asked.append(shard), np.full(3, shard))[1]
        )
        assert [array.tolist() for array in arrays] == [[0] * 3, [1] * 3]
        assert asked == measured


def test_total_variation_falls_as_the_search_looks_harder(datastore, tmp_path):
    key_shards, sample = shards_and_sample(datastore, tmp_path)
    efforts, _ = key_shards.efforts()
    variations = [
        sample.total_variation(sample.search(effort)[1], temperature=0.5) for effort in (efforts[0], efforts[-1])
    ]
    assert variations[1] < variations[0]
    assert variations[1] < 0.02


def test_a_recall_out_of_reach_stops_with_what_was_tried(datastore, tmp_path):
    key_shards, sample = shards_and_sample(datastore, tmp_path, leaves_to_search=1, reorder=K)
    with pytest.raises(UserError, match=r"recall: expected 0.99, but the best of 1 searches .* with 1 of \d+ leaves"):
        tuning.reach(key_shards, sample, 0.99)


def test_cheaper_searches_than_the_derived_one_have_fewer_leaves_alone():
    """Fewer leaves with more candidates would stand between them, and end the way down."""
    efforts, first = scann_backend.Backend(K).efforts(6400, WIDTH)
    derived = efforts[first]
    assert derived == Options.derive(6400, K)
    leaves = [effort.leaves_to_search for effort in efforts[: first + 1]]
    assert leaves == sorted(set(leaves))
    assert len(leaves) == 4
    assert {effort.reorder for effort in efforts[:first]} == {derived.reorder}
    assert all(effort.leaves_to_search >= derived.leaves_to_search for effort in efforts[first:])


def test_settings_of_the_user_are_not_searched_over(datastore, tmp_path):
    key_shards, _ = shards_and_sample(datastore, tmp_path, leaves_to_search=5)
    assert {options.leaves_to_search for options in key_shards.efforts()[0]} == {5}
    key_shards, _ = shards_and_sample(datastore, tmp_path, reorder=32)
    assert {options.reorder for options in key_shards.efforts()[0]} == {2.0}
