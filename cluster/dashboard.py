"""Send the metrics of a run to Weights & Biases (the extra "wandb"), beside metrics.jsonl and TensorBoard."""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path

from cluster import atomic
from cluster.checkpoint import brief
from cluster.errors import UserError

ID = "wandb-id.txt"  # in the exp-dir: by it, all launches of a run are one run there


class Dashboard:
    """A run of Weights & Biases; `folder` is the exp-dir, whose config.json goes there too.

    Where it goes (a server, or with WANDB_MODE=offline the folder wandb/ in the exp-dir) and the key are its
    own environment variables. A run that is resumed sends the lines after its checkpoint again.
    Raises UserError if the package is not installed, or refuses to begin.
    """

    def __init__(self, project: str, folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"--wandb-project {project}: the package is not installed; pip install 'linework[wandb]'"
            ) from None
        atomic.make_folder(folder)
        known = folder / ID
        if not known.exists():
            atomic.write_text(known, secrets.token_hex(8) + "\n")
        config = folder / "config.json"
        try:
            self.run = wandb.init(
                project=project,
                id=known.read_text().strip(),
                name=folder.absolute().name,
                dir=folder,
                config=json.loads(config.read_text()) if config.exists() else {},
                resume="allow",
                settings=wandb.Settings(silent=True, console="off", disable_git=True),
            )
        except wandb.Error as error:
            raise UserError(
                f"--wandb-project {project}: {brief(error)}; run `wandb login`, or set WANDB_MODE=offline"
            ) from None
        self.run.define_metric("*", step_metric="step")  # its own count would refuse a step for a second time

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log({"step": step, **figures})

    def close(self) -> None:
        self.run.finish()
