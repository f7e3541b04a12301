"""HaluEval, question answering: is the answer hallucinated?"""

from mlpmem_jax.comparison.tasks import _halueval

TASK = _halueval.task(
    "HaluEval QA", "qa", {"Question": "question", "Answer": "answer"}, "right_answer", "hallucinated_answer"
)
