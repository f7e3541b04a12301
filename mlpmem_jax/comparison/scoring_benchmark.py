"""How fast choices are scored, next to lm-evaluation-harness's `hf` model on the same weights (extra `harness`).

Questions are built from the test split: a prompt, its true continuation, and continuations of other prompts. Both
models run in float32 on all cores, with the same number of positions per forward pass.
"""

from __future__ import annotations

import tempfile
import time

import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.comparison import packing, reading
from mlpmem_jax.comparison.packing import Row
from mlpmem_jax.comparison.systems import SIDE_MODEL, Workdir
from mlpmem_jax.core.benchmark_rows import row
from mlpmem_jax.core.errors import UserError, require
from mlpmem_jax.core.progress import say
from mlpmem_jax.corpus.tokens import TokenStream
from mlpmem_jax.interop import huggingface

QUESTIONS, CHOICES = 200, 4
PROMPT, ANSWER = 64, 16  # tokens
_BATCH = packing.POSITIONS_AT_ONCE // (PROMPT + ANSWER)  # texts in a forward pass of the harness's model


def rows(config: ml_collections.ConfigDict) -> list[dict]:
    """Rows of (name, value, unit, detail); none for a workdir without a finished base."""
    if not (epath.Path(config.workdir) / "base").exists():
        say(f"scoring: no rows, {config.workdir} has no finished base; set --config.workdir to one that does")
        return []
    workdir = Workdir(config)
    model, pairs = workdir.model(SIDE_MODEL), _pairs(workdir)
    choices = [Row.of_continuation(prompt, prompt + answer) for prompt, answer in pairs]

    def ours() -> list[float]:
        return [float(of.sum()) for of in reading.read(model, choices, {}, workdir.sharding, "scoring")[0]["model"]]

    ours()
    start = time.perf_counter()
    scores = ours()
    seconds = time.perf_counter() - start
    questions = len(pairs) // CHOICES
    detail = f"{questions} questions of {CHOICES} choices; prompts of {PROMPT} tokens, answers of {ANSWER}; float32"
    measured = [row("scoring, base LM", questions / seconds, "questions/s", f"{detail}; without compilation")]
    try:
        theirs, their_seconds = _harness(model, pairs)
    except UserError as error:
        say(f"scoring: the harness's row is left out: {error}")
        return measured
    difference = float(np.abs(np.subtract(scores, theirs)).max())
    return [
        *measured,
        row("scoring, hf of lm-evaluation-harness", questions / their_seconds, "questions/s",
             f"{_BATCH} texts per pass"),
        row("scoring, base LM / hf", their_seconds / seconds, "ratio",
             f"log-probabilities differ by at most {difference:.1e} nats"),
    ]  # fmt: skip


def _pairs(workdir: Workdir) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of every choice, with the choices of a question adjacent."""
    stream = TokenStream(workdir.tokens, "test")
    count = min(QUESTIONS, stream.length // (PROMPT + ANSWER))
    windows = np.asarray(stream.read(0, count * (PROMPT + ANSWER))).reshape(count, PROMPT + ANSWER).tolist()
    prompts, answers = [one[:PROMPT] for one in windows], [one[PROMPT:] for one in windows]
    return [(prompts[n], answers[(n + other) % count]) for n in range(count) for other in range(CHOICES)]


def _harness(model: reading.Model, pairs: list[tuple[list[int], list[int]]]) -> tuple[list[float], float]:
    """(log-probabilities, seconds) of the harness's own model.

    Raises:
      UserError: it is not installed.
    """
    language_models = require("lm_eval.models.huggingface", extra="harness")
    transformers = require("transformers", extra="harness")
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save_language_model(folder, model.parameters, model.config)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_no_tokenizer(model.config.vocab_size), eos_token="0"
    )
    theirs = language_models.HFLM(pretrained=loaded, tokenizer=tokenizer, device="cpu", batch_size=_BATCH)
    # The harness caches by text, so texts must differ wherever token ids do.
    requests = [((str(prompt), str(answer)), prompt, answer) for prompt, answer in pairs]
    theirs._loglikelihood_tokens(requests[:_BATCH], disable_tqdm=True)
    start = time.perf_counter()
    results = theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    return [value for value, _ in results], time.perf_counter() - start


def _no_tokenizer(vocab_size: int):
    """A stub: the harness requires a tokenizer, although it is given token ids."""
    import tokenizers

    return tokenizers.Tokenizer(tokenizers.models.WordLevel({str(id): id for id in range(vocab_size)}, unk_token="0"))
