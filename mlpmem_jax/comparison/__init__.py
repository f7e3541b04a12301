"""The paper's comparison: what a memory, kNN-LM, retrieval and further training do for the same questions.

tasks/        one file for each task: its questions, its prompts, its measures
question.py   what a task asks, and what a system answers
metrics.py    how answers are judged
passages.py   the training text as passages, and retrievers over them
reading.py    log-probabilities of given tokens, by batches of one shape
sides.py      what is mixed with a language model: the memory, or kNN search
systems.py    the systems: a language model, passages in its prompt or not, something mixed with it or not
greedy.py     texts of a system, token by token
compare.py    the command: every system on every task, from scores to the report
page.py       the report
"""
