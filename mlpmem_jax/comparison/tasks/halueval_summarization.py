"""HaluEval, summarization: is the summary hallucinated?"""

from mlpmem_jax.comparison.tasks import _halueval

TASK = _halueval.task(
    "HaluEval summarization",
    "summarization",
    {"Document": "document", "Summary": "summary"},
    "right_summary",
    "hallucinated_summary",
)
