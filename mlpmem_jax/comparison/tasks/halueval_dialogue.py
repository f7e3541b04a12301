"""HaluEval, dialogue: is the response hallucinated?"""

from mlpmem_jax.comparison.tasks import _halueval

TASK = _halueval.task(
    "HaluEval dialogue",
    "dialogue",
    {"Dialogue History": "dialogue_history", "Response": "response"},
    "right_response",
    "hallucinated_response",
)
