"""Run tasks of the lm-evaluation-harness on a packed model: python tools/harness.py DIR TASK..., after
pip install -e '.[harness]'. Prints the harness' own table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    directory: Annotated[Path, typer.Argument(help="a packed directory")],
    tasks: Annotated[list[str], typer.Argument(help="names of tasks, as `lm_eval --tasks list` shows them")],
    include: Annotated[Path | None, typer.Option(help="a folder with tasks of your own")] = None,
    limit: Annotated[int | None, typer.Option(help="documents of each task")] = None,
    batch: Annotated[int, typer.Option(help="requests in a forward pass")] = 8,
) -> None:
    """Load, evaluate, print."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    import nashswarm
    from nashswarm.models import load_tokenizer

    model = HFLM(pretrained=nashswarm.load(directory), tokenizer=load_tokenizer(directory), batch_size=batch)
    manager = TaskManager(include_path=None if include is None else str(include))
    results = simple_evaluate(model=model, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0)
    print(make_table(results))


if __name__ == "__main__":
    typer.run(main)
