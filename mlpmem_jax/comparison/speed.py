"""`mlpmem compare --speed`: time to first token and tokens per second of every system, by corpus size.

All systems get prompts and outputs of the same length. Retrieval counts toward the time to first token and makes the
prompt longer. Corpora larger than the real one are synthesized from it: keys by adding noise to real ones, passages by
shuffling the words of real ones. Each round measures all systems in turn, so that other load affects them equally.

All timings are in WORKDIR/comparison/speed.json, which the page shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import tempfile
import time
from collections.abc import Callable

import jax
import ml_collections
import numpy as np
import rich.console
import rich.table
from etils import epath

from mlpmem_jax.comparison import greedy, page, speed_page, systems
from mlpmem_jax.comparison.passages import Retriever, documents, make_retriever, split
from mlpmem_jax.comparison.searching import EXACT, fingerprint, open_fastest, source_of
from mlpmem_jax.comparison.systems import SIDE_MODEL, SYSTEMS, Workdir
from mlpmem_jax.core import host
from mlpmem_jax.core.errors import ArtifactError, UserError
from mlpmem_jax.core.mesh import barrier
from mlpmem_jax.core.progress import progress, say
from mlpmem_jax.core.storage import temporary_room
from mlpmem_jax.corpus.tokens import TokenStream, encode_prompts, read_tokenizer
from mlpmem_jax.retrieval import backends, exact_backend
from mlpmem_jax.retrieval.key_shards import Search

BATCHES = (1, 8)
WEIGHT = 0.5  # lambda; any value other than 0 costs the same
_NOISE = 0.1  # noise of a synthetic key, in standard deviations of the real keys
_KEYS_AT_ONCE = 16_384


def run(config: ml_collections.ConfigDict) -> dict:
    """Measures the systems of `config.comparison`.

    Returns:
      The contents of speed.json.

    Raises:
      UserError: a stage is not finished, or the test split is too short.
    """
    settings = config.comparison.speed
    workdir = Workdir(config)
    chosen, skipped = _usable(workdir)
    prompts = _prompts(workdir, max(BATCHES), settings.prompt_tokens)
    report = {
        "titles": {name: SYSTEMS[name].title for name in chosen},
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "rounds": settings.rounds,
        "real_positions": _real_positions(workdir),
        "device": jax.devices()[0].device_kind,
        "cores": host.cpu_count(),
        "measured": [],
        "skipped": skipped,
    }
    for positions in sorted({int(one) for one in settings.positions.split(",")}):
        say(f"== a corpus of {positions:,} positions")
        systems_timed = {}
        with contextlib.ExitStack() as files:
            for name in chosen:
                try:
                    systems_timed[name] = _Timed.open(workdir, name, positions, prompts, settings.new_tokens, files)
                except _TooLargeError as error:
                    skipped.append({"system": name, "positions": positions, "reason": str(error)})
                    say(f"{name}: skipped, {error}")
            for batch in BATCHES:
                report["measured"] += _rounds(systems_timed, positions, batch, settings.rounds)
        if jax.process_index() == 0:
            workdir.results.mkdir(parents=True, exist_ok=True)
            (workdir.results / "speed.json").write_text(json.dumps(report, indent=1) + "\n")
            page.write(workdir.results)
    if jax.process_index() == 0:
        _show(report)
    return report


def _rounds(systems_timed: dict[str, _Timed], positions: int, batch: int, rounds: int) -> list[dict]:
    """One record per system; each round measures all systems in turn."""
    seconds = {name: [] for name in systems_timed}
    for number in range(-1, rounds):  # round -1 compiles and is not recorded
        for name, timed in systems_timed.items():
            once = timed.measure(batch)
            seconds[name] += [once] if number >= 0 else []
    lines = []
    for name, of in seconds.items():
        first, following = zip(*of, strict=True)
        lines.append(
            {
                "system": name,
                "positions": positions,
                "batch": batch,
                "prompt_tokens": systems_timed[name].prompt_tokens,
                "first": list(first),
                "next": list(following),
            }
        )
        rate = batch / np.median(following)
        say(f"{name}, batch {batch}: first token {1e3 * np.median(first):,.0f} ms, {rate:,.1f} tokens/s")
    return lines


class _TooLargeError(Exception):
    """The corpus does not fit into this machine's memory or disk."""


def _usable(workdir: Workdir) -> tuple[list[str], list[dict]]:
    """(systems whose artifacts are finished, records of the skipped systems and why)."""
    chosen, skipped = [], []
    for name in systems.parse(workdir.config.comparison.systems):
        try:
            workdir.parts(SYSTEMS[name])
            chosen.append(name)
        except ArtifactError as error:
            if name == "base":
                raise
            skipped.append({"system": name, "positions": None, "reason": str(error)})
            say(f"{name}: skipped, {error}")
    return chosen, skipped


def _prompts(workdir: Workdir, count: int, length: int) -> list[list[int]]:
    """Prompts taken from the test split.

    Raises:
      UserError: the split is too short.
    """
    stream = TokenStream(workdir.tokens, "test")
    if stream.length < length + count:
        raise UserError(
            f"config.comparison.speed.prompt_tokens: {count} prompts of {length} tokens are needed, but the test split "
            f"has {stream.length} tokens"
        )
    starts = np.linspace(0, stream.length - length, count).astype(int)
    return [stream.read(start, start + length).tolist() for start in starts]


def _real_positions(workdir: Workdir) -> int:
    sequences, length = workdir.artifact("datastore/train", "datastore").arrays["next_tokens"].shape
    return sequences * length


@dataclasses.dataclass
class _Timed:
    """A system ready to be timed.

    Attributes:
      mixture: its greedy decoding steps.
      prompts: token ids of each prompt.
      retrieve: prompts -> prompts with retrieved passages; None without retrieval.
      count: number of tokens to generate.
    """

    mixture: greedy.Mixture
    prompts: list[list[int]]
    retrieve: Callable[[list[list[int]]], list[list[int]]] | None
    count: int
    prompt_tokens: int

    @classmethod
    def open(
        cls,
        workdir: Workdir,
        name: str,
        positions: int,
        prompts: list[list[int]],
        count: int,
        files: contextlib.ExitStack,
    ) -> _Timed:
        """Opens a system over a corpus of `positions` positions; `files` as in `_neighbors_over`.

        Raises:
          _TooLargeError: the corpus does not fit into this machine's memory or disk.
        """
        system = SYSTEMS[name]
        side = None
        if system.side:
            side = _neighbors_over(workdir, positions, files) if system.side == "knn" else workdir.side(system.side)
        mixture = greedy.Mixture(*workdir.decoders(system, side), WEIGHT)
        retrieve = _with_passages(workdir, positions, count) if system.retrieves else None
        read = max(map(len, retrieve(prompts) if retrieve else prompts))
        return cls(mixture, prompts, retrieve, count, read)

    def measure(self, batch: int) -> tuple[float, float]:
        """(seconds until every text has its first token, seconds per step after that)."""
        prompts, start = self.prompts[:batch], time.perf_counter()
        tokens_B = self.mixture.start(self.retrieve(prompts) if self.retrieve else prompts, self.count)
        first = time.perf_counter() - start
        for _ in range(self.count - 1):
            tokens_B = self.mixture.step(tokens_B)
        return first, (time.perf_counter() - start - first) / max(1, self.count - 1)


def _with_passages(workdir: Workdir, positions: int, count: int) -> Callable[[list[list[int]]], list[list[int]]]:
    """A function that adds passages to prompts, from a corpus of `positions` positions."""
    settings, tokenizer = workdir.config.comparison, read_tokenizer(workdir.tokens)
    real = [passage for text in documents(workdir.tokens) for passage in split(text, settings.passage_words)]
    wanted = max(1, round(len(real) * positions / _real_positions(workdir)))
    retriever: Retriever = make_retriever(
        settings.retriever, _more_passages(real, wanted), workdir.config.targets, workdir.sharding.mesh, workdir.indices
    )
    room = workdir.model(SIDE_MODEL).config.context_length - count

    def retrieve(prompts: list[list[int]]) -> list[list[int]]:
        texts = tokenizer.decode_batch(prompts)
        passages = retriever.retrieve(texts, settings.passages)
        texts = [f"Background: {' '.join(of)}\n\n{text}" for of, text in zip(passages, texts, strict=True)]
        return [ids[-room:] for ids in encode_prompts(workdir.tokens, texts)]

    return retrieve


def _more_passages(real: list[str], count: int) -> list[str]:
    """`count` passages: the real ones, followed by copies with their words shuffled."""
    shuffled, passages = random.Random(0), real[:count]
    while len(passages) < count:
        words = real[len(passages) % len(real)].split()
        shuffled.shuffle(words)
        passages.append(" ".join(words))
    return passages


def _neighbors_over(workdir: Workdir, positions: int, files: contextlib.ExitStack):
    """kNN search over `positions` keys: the real ones, followed by noisy copies.

    Args:
      workdir: has the datastore.
      positions: number of keys.
      files: when closed, deletes keys that are not real, and their index.

    Raises:
      _TooLargeError: the keys or their index do not fit into this machine's memory or disk.
    """
    datastore = workdir.artifact("datastore/train", "datastore")
    sequences, length, width = datastore.arrays["keys"].shape
    next_tokens_N = datastore.read("next_tokens", 0, sequences).reshape(-1).astype(np.int32)
    settings, k = workdir.config.targets, min(workdir.k, positions)
    folder = workdir.indices / f"speed_{fingerprint(datastore.fingerprint, positions, settings)}"
    _check_room(workdir, positions, width, datastore.arrays["keys"].dtype)
    keys_NxD = datastore.read("keys", 0, -(-min(positions, sequences * length) // length)).reshape(-1, width)
    if positions > len(keys_NxD):
        temporary = files.enter_context(tempfile.TemporaryDirectory(prefix="mlpmem_"))
        keys_NxD = _with_noisy_copies(keys_NxD, positions, f"{temporary}/keys")
        files.callback(_delete, folder)
    source = source_of(keys_NxD[:positions])
    index = open_fastest(source, settings, k, workdir.sharding.mesh, folder, source.read(0, min(positions, 256)))
    return workdir.neighbors(index, np.resize(next_tokens_N, positions))


def _with_noisy_copies(keys_NxD: np.ndarray, count: int, file: str) -> np.ndarray:
    """`count` keys in a new memory-mapped file: the real ones repeated, with noise from the second copy on."""
    deviations_D = _NOISE * keys_NxD.astype(np.float32).std(axis=0)
    written_NxD = np.memmap(file, keys_NxD.dtype, "w+", shape=(count, keys_NxD.shape[1]))
    written_NxD[: len(keys_NxD)] = keys_NxD
    random = np.random.default_rng(0)
    with progress(count - len(keys_NxD), "noisy copies of keys", "keys") as bar:
        for start in range(len(keys_NxD), count, _KEYS_AT_ONCE):
            places = np.arange(start, min(start + _KEYS_AT_ONCE, count))
            noise_BxD = random.standard_normal((len(places), len(deviations_D)), np.float32) * deviations_D
            written_NxD[places[0] : places[-1] + 1] = keys_NxD[places % len(keys_NxD)] + noise_BxD
            bar.advance(len(places))
    return written_NxD


def _delete(folder: epath.Path) -> None:
    barrier("an index of noisy copies searched")
    if jax.process_index() == 0 and folder.exists():
        folder.rmtree()


def _check_room(workdir: Workdir, positions: int, width: int, dtype) -> None:
    settings, key_bytes = workdir.config.targets, np.dtype(dtype).itemsize
    backend = backends.chosen(settings.backend)[1]
    searches = [Search.create(backend, {**settings, "k": workdir.k}, workdir.sharding.mesh)]
    if positions <= EXACT:
        searches.append(Search(exact_backend.Backend.create(settings, workdir.k, workdir.sharding.mesh)))
    needs = [search.needs(positions, width, key_bytes, 1) for search in searches]
    real, whole = _real_positions(workdir), positions * width * key_bytes
    memory = min(positions, real) * width * key_bytes + sum(of.memory for of in needs)
    disk = sum(of.disk for of in needs) + (whole if positions > real else 0)
    for what, needed, available in (
        ("memory", memory, host.memory_bytes()),
        ("disk", disk, temporary_room()),
    ):
        if needed > available:
            raise _TooLargeError(
                f"its keys and index need {needed / 2**30:.1f} GiB of {what}, this machine has "
                f"{available / 2**30:.1f}; config.targets.search_dimensions makes the index smaller"
            )


def _show(report: dict) -> None:
    table = rich.table.Table(
        "system", "positions", "batch", "prompt", "first token, ms", "/ base", "tokens/s", "/ base",
        title=f"prompts of {report['prompt_tokens']} tokens, {report['new_tokens']} new, {report['rounds']} rounds",
        caption="medians; ranges are on the page",
    )  # fmt: skip
    for row in speed_page.rows(report):
        table.add_row(*(cell.partition(" (")[0] for cell in row))
    rich.console.Console().print(table)
