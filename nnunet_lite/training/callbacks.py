"""Who gets the metrics of each epoch besides the files: callbacks, and TensorBoard, Weights & Biases or MLflow.

`training.logger` names one of these. A thread talks to it, so that a server that does not answer delays no training. A
resumed run continues its log.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from re import sub
from secrets import token_hex
from shlex import quote
from threading import Thread
from typing import TYPE_CHECKING, Any

from nnunet_lite import log
from nnunet_lite.errors import UserError, describe, how_to_install
from nnunet_lite.files import locked, read_text, write_text
from nnunet_lite.settings import flatten
from nnunet_lite.training.metrics import Metrics, flatten_metrics

if TYPE_CHECKING:
    from nnunet_lite.training.job import Job

Callback = Callable[[Metrics], Any]

_PATIENCE = 30  # seconds, at the end of a training, for what is left to write
_CONNECT = 15  # seconds until wandb works offline


def require_logger(name: str) -> None:
    """Refuse a logger whose package is not installed.

    Parameters
    ----------
    name : str
        Of `training.logger`.

    Raises
    ------
    UserError
        It is not installed.
    """
    if name != "none" and getattr(find_spec(name), "origin", None) is None:  # a folder of that name has no origin
        raise UserError(f"training.logger needs the package {name}", fix=how_to_install(name))


@contextmanager
def follow_epochs(job: Job) -> Iterator[Callback]:
    """Give a function that calls the callbacks and the logger of a job; of several processes the first one calls them.

    Parameters
    ----------
    job : Job
        What is trained.
    """
    context = {"configuration": job.configuration, "fold": job.folder.name.removeprefix("fold_")}
    callbacks, is_first, name = list(job.callbacks), job.ranks.rank == 0, job.settings.training.logger
    epochs: SimpleQueue[Metrics | None] = SimpleQueue()
    logger = Thread(target=_log_epochs, args=(job, epochs), daemon=True)
    if is_first and name != "none":
        logger.start()
        callbacks.append(epochs.put)

    def call(metrics: Metrics) -> None:
        for callback in callbacks if is_first else ():
            callback(context | deepcopy(metrics))

    try:
        yield call
    finally:
        if logger.is_alive():
            epochs.put(None)
            with log.working(f"waiting for {name}"):
                logger.join(_PATIENCE)
        if logger.is_alive():
            log.warn(f"{name} has not answered for {_PATIENCE} s; its log lacks the last epochs")


def _log_epochs(job: Job, epochs: SimpleQueue[Metrics | None]) -> None:
    """Write epochs to the logger of a job until None comes."""
    name = job.settings.training.logger
    package, write = _LOGGERS[name]
    try:
        write(import_module(package), job, iter(epochs.get, None))
    except Exception as error:  # the model does not depend on it
        log.warn(f"{name} gets no more metrics of this training: {describe(error)}")


def _run_name(job: Job) -> str:
    return f"{job.folder.parent.name} {job.folder.name}"


def _scalars(metrics: Metrics) -> dict[str, float]:
    numbers = {name: value for name, value in flatten_metrics(metrics).items() if isinstance(value, int | float)}
    del numbers["epoch"]
    return numbers


def _write_tensorboard(tensorboard: Any, job: Job, epochs: Iterator[Metrics]) -> None:
    """Write to the folder `tensorboard`; a resumed run replaces the epochs after its checkpoint."""
    writer = None
    for metrics in epochs:
        writer = writer or tensorboard.SummaryWriter(job.folder / "tensorboard", purge_step=metrics["epoch"])
        for name, value in _scalars(metrics).items():
            writer.add_scalar(name, value, metrics["epoch"])
        writer.flush()


def _write_wandb(wandb: Any, job: Job, epochs: Iterator[Metrics]) -> None:
    """Write to the server, or to the folder `wandb` if there is no account or no network."""
    file = job.folder / "wandb_run.txt"
    if not file.is_file():
        write_text(file, token_hex(4))

    def start(mode: str | None) -> Any:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", job.plan.dataset), group=job.folder.parent.name,
            name=_run_name(job), id=read_text(file), resume="allow", dir=job.folder, mode=mode,
            config=job.settings.model_dump(mode="json"),
            settings=wandb.Settings(init_timeout=_CONNECT, silent=True, console="off"),  # it would ask for an account
        )  # fmt: skip

    try:
        run = start(None)  # as WANDB_MODE says, otherwise online
    except wandb.Error as error:
        log.warn(f"wandb works offline: {describe(error)}")
        wandb.teardown()  # it still tries to open this run
        run = start("offline")
    synced = f"wandb sync {quote(str(Path(run.dir).parent))}"
    log.info(f"wandb: {synced if run.offline else run.url or 'disabled'}")
    for metrics in epochs:
        run.log(_scalars(metrics), step=metrics["epoch"])
    run.finish()


def _write_mlflow(mlflow: Any, job: Job, epochs: Iterator[Metrics]) -> None:
    """Write to the server of MLFLOW_TRACKING_URI, otherwise to mlflow.db in the folder of the dataset's models."""
    models, file = job.folder.absolute().parents[1], job.folder / "mlflow_run.txt"
    own = f"sqlite:///{(models / 'mlflow.db').as_posix()}"
    uri = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else own
    logging.getLogger("mlflow.store").setLevel(logging.WARNING)  # it announces every table
    with locked(models, "opening the log of MLflow"):  # by folds that begin at the same time
        client, name = mlflow.MlflowClient(uri), os.environ.get("MLFLOW_EXPERIMENT_NAME", job.plan.dataset)
        experiment = client.get_experiment_by_name(name)
        number = client.create_experiment(name) if experiment is None else experiment.experiment_id
    if not file.is_file():
        run = client.create_run(number, run_name=_run_name(job))
        for section, values in job.settings.model_dump(mode="json").items():  # a batch has at most 100 parameters
            params = [mlflow.entities.Param(key, str(value)[:250]) for key, value in flatten({section: values})]
            client.log_batch(run.info.run_id, params=params)
        write_text(file, run.info.run_id)
    run_id = read_text(file)
    log.info(f"mlflow: mlflow ui --backend-store-uri {quote(uri)}" if uri == own else f"mlflow: {uri}")
    for metrics in epochs:
        for metric, value in _scalars(metrics).items():
            client.log_metric(run_id, sub(r"[^\w\-./ ]", "_", metric), value, step=metrics["epoch"])
    client.set_terminated(run_id)


_LOGGERS = {
    "tensorboard": ("torch.utils.tensorboard", _write_tensorboard),
    "wandb": ("wandb", _write_wandb),
    "mlflow": ("mlflow", _write_mlflow),
}
