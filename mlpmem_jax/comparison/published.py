"""Results of the paper (arXiv 2508.01832, ICLR version) with Mistral-7B-v0.3, which read other text."""

WORDS = ("sst2", "mr", "cr", "rt", "hyp", "cb", "rte", "agn", "yahoo")
QUESTIONS = ("nq", "webquestions", "triviaqa", "truthfulqa", "hotpotqa")
HALLUCINATION = ("halueval_dialogue", "halueval_qa", "halueval_summarization")
_BY_TASKS = {
    WORDS: {
        "base": (81.21, 75.35, 62.30, 74.95, 55.42, 69.64, 59.57, 75.95, 56.36),
        "memory": (83.19, 79.90, 75.95, 75.42, 64.15, 76.79, 64.62, 80.28, 57.33),
        "knn_lm": (82.15, 76.85, 61.70, 74.95, 56.78, 71.42, 60.28, 76.13, 56.26),
        "rag": (87.20, 83.70, 71.55, 82.36, 54.65, 57.14, 66.43, 75.64, 58.43),
        "cpt": (87.09, 82.85, 82.60, 77.48, 60.65, 57.14, 52.71, 83.10, 51.56),
        "lora": (86.54, 83.20, 75.10, 79.83, 55.42, 51.78, 56.31, 65.46, 57.30),
    },
    QUESTIONS: {
        "base": (20.63, 29.28, 57.65, 32.09, 20.96),
        "memory": (25.20, 37.45, 60.99, 32.54, 24.14),
        "knn_lm": (21.05, 30.51, 57.77, 32.33, 21.20),
        "rag": (22.56, 24.90, 54.21, 35.47, 29.77),
        "cpt": (12.16, 34.06, 61.21, 29.18, 16.04),
        "lora": (18.17, 34.50, 61.60, 30.91, 16.23),
    },
    HALLUCINATION: {
        "base": (57.18, 53.99, 50.27),
        "memory": (66.86, 64.07, 52.41),
        "rag": (59.06, 65.09),
        "cpt": (51.68, 46.49, 47.39),
        "lora": (55.51, 50.02, 50.38),
    },
}
PUBLISHED = {
    (task, system): figure
    for tasks, systems in _BY_TASKS.items()
    for system, figures in systems.items()
    for task, figure in zip(tasks, figures, strict=False)
}
"""In percent, by (task, system)."""
