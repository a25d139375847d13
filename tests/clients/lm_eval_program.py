"""Runs lm-eval from Python and prints each task's score as one JSON object. Usage: lm_eval_program.py URL FOLDER

Once with the server's own tokenizer, which is what local-completions looks for first, and once through the chat endpoint.
"""

import json
import sys

import lm_eval
from lm_eval.tasks import TaskManager


def main(url, folder):
    tasks = TaskManager(include_path=folder)
    completions = {"model": "tiny", "base_url": f"{url}/v1/completions", "num_concurrent": 4}
    chat = {**completions, "base_url": f"{url}/v1/chat/completions"}
    runs = {
        "remote": ("local-completions", completions, ["tiny_sums_choose", "tiny_sums"], False),
        "chat": ("local-chat-completions", chat, ["tiny_chat"], True),
    }
    scores = {}
    for name, (model, args, names, template) in runs.items():
        done = lm_eval.simple_evaluate(
            model, model_args=args, tasks=names, task_manager=tasks, apply_chat_template=template, limit=12
        )
        scores[name] = {
            task: next(value for key, value in found.items() if key.startswith(("acc,", "exact_match,")))
            for task, found in done["results"].items()
        }
    print(json.dumps(scores))


main(*sys.argv[1:])
