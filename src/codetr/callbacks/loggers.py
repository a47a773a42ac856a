"""MLflow's logger, with runs in a folder."""

from __future__ import annotations

import os

from lightning.pytorch.loggers import MLFlowLogger

from codetr.errors import UserError


def mlflow_logger(experiment_name: str, run_name: str, tracking_uri: str, run_id: str | None) -> MLFlowLogger:
    """Raises UserError where the package is missing."""
    # A folder needs no database and no server, and mlflow-skinny has nothing else; newer ones ask to be told.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    try:
        return MLFlowLogger(experiment_name, run_name=run_name, tracking_uri=tracking_uri, run_id=run_id)
    except ModuleNotFoundError as error:
        raise UserError("logger.mlflow needs MLflow: pip install 'codetr[loggers]', or take logger=default") from error
