"""The paper's comparison: what a memory, kNN-LM, retrieval and further training do for the same questions.

tasks/        one file for each task: its questions, its prompts, its measures
hub.py        files of tasks from the Hugging Face hub
question.py   what a task asks, and what a system answers
metrics.py    how answers are judged
passages.py   the training text as passages, and retrievers over them
searching.py  searches over keys and passages
packing.py    texts packed into sequences, what they have in common computed once
reading.py    log-probabilities of given tokens in packed texts
scores.py     log-probabilities and texts of a task, kept for the next run
sides.py      what is mixed with a language model: the memory, or kNN search
systems.py    the systems: a language model, passages in its prompt or not, something mixed with it or not
greedy.py     texts of a system, token by token
weights.py    lambda of each question, tuned on others
costs.py      what a system cost to make, and takes to keep
compare.py    the command: every system on every task, from scores to the report
speed.py      the command with --speed: times by the size of the corpus
harness.py    tasks of lm-evaluation-harness
page.py       the report
"""
