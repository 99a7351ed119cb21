"""A tiny trained model, exported once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nanochat.inference.engine import Engine
    from nanochat.model.gpt import GPT
    from nanochat.store import ObjectStore
    from nanochat.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def exported_store(
    tmp_path_factory: pytest.TempPathFactory, trained_model: GPT, byte_tokenizer: Tokenizer
) -> ObjectStore:
    """The store that the export was made from: model `quick` with `base` and `sft`."""
    from standins.trained_model import fill_store

    return fill_store(tmp_path_factory.mktemp("exported"), trained_model, byte_tokenizer)


@pytest.fixture(scope="session")
def exported(exported_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of `quick`. Not to be changed: copy it."""
    from nanochat.huggingface.export import export_model

    folder = tmp_path_factory.mktemp("export") / "quick"
    export_model(exported_store, "quick", "sft", folder)
    return folder


@pytest.fixture(scope="session")
def engine(exported_store: ObjectStore) -> Engine:
    """Our engine over the same model."""
    from nanochat.inference.chat import load_engine

    return load_engine(exported_store, "quick", device="cpu", as_trained=True)
