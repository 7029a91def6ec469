"""TensorBoard and W&B, which only show a run: when one of them breaks, the run goes on without it."""

import secrets
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import first_line

Numbers = dict[str, float]
Lost = Callable[[str, str], None]  # is told which display is lost, and why

_CLOSE_S = 300.0  # for what is still to be uploaded


class Plotter(Protocol):
    """What draws numbers somewhere."""

    def show(self, numbers: Numbers, step: int) -> None:
        """Draw the numbers of a step."""

    def close(self, exit_code: int) -> None:
        """Draw what is left, and say how the run ended."""


class Display:
    """A plotter that may break at any call, its making included; it is then told of once, and asked no more."""

    def __init__(self, name: str, make: Callable[[], Plotter], lost: Lost) -> None:
        self.name, self.lost = name, lost
        self.plotter: Plotter | None = None
        self.plotter = self._carefully(make)

    def show(self, numbers: Numbers, step: int) -> None:
        if (plotter := self.plotter) is not None:
            self._carefully(lambda: plotter.show(numbers, step))

    def close(self, exit_code: int) -> None:
        """Close it, but wait no longer than some minutes: it may wait for a server that is gone."""
        if (plotter := self.plotter) is not None:
            closing = Thread(target=self._carefully, args=(lambda: plotter.close(exit_code),), daemon=True)
            closing.start()
            closing.join(_CLOSE_S)

    def _carefully(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # of a library and whatever is behind it
            self.plotter = None
            self.lost(self.name, first_line(error))
            return None


def open_displays(run_dir: Path, config: RunConfig, start_step: int, lost: Lost) -> list[Display]:
    """Open what the config asks for, to go on after a step."""
    folder = Path(config.trainer.tensorboard_dir or run_dir / "tensorboard")
    displays = [Display("TensorBoard", lambda: _TensorBoard(folder, start_step), lost)]
    if config.wandb.enabled:
        displays.append(Display("W&B", lambda: _Wandb(run_dir, config), lost))
    return displays


class _TensorBoard:
    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder), purge_step=start_step + 1)

    def show(self, numbers: Numbers, step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self, exit_code: int) -> None:
        self.writer.close()


class _Wandb:
    """The run's W&B run, started or continued."""

    def __init__(self, run_dir: Path, config: RunConfig) -> None:
        import wandb

        settings = config.wandb
        folder = Path(settings.dir) if Path(settings.dir).is_absolute() else run_dir / settings.dir
        folder.mkdir(parents=True, exist_ok=True)
        self.run: Any = wandb.init(
            id=wandb_id(run_dir, settings.id), resume="allow", project=settings.project, entity=settings.entity,
            name=settings.name, tags=settings.tags, mode=settings.mode, dir=str(folder),
            config=config.model_dump(mode="json"),
        )  # fmt: skip

    def show(self, numbers: Numbers, step: int) -> None:
        self.run.log(numbers, step=step)

    def close(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)


def wandb_id(run_dir: Path, asked: str | None) -> str:
    """Return the id of the run's W&B run, which lives in the run folder: the one asked for, or one made once."""
    file = run_dir / "wandb_id"
    if asked or not file.exists():
        file.write_text(asked or secrets.token_hex(4))
    return file.read_text().strip()
