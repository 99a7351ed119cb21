"""The model as a folder that transformers, vLLM and the hub take."""

import dagster as dg
from pydantic import Field

from dagster_nanochat.defs.sft.assets import sft_checkpoint
from dagster_nanochat.partitions import model_partitions
from dagster_nanochat.resources import StoreResource
from dagster_nanochat.selection import required_recipe
from dagster_nanochat.views import data_folder
from nanochat.export.markdown import table


class ExportConfig(dg.Config):
    """Which stage of the model is exported."""

    source: str | None = Field(
        default=None,
        pattern="^(base|mid|sft)$",
        description="base, mid or sft (default: the last stage that the recipe has)",
    )


@dg.asset(
    partitions_def=model_partitions,
    group_name="evaluation",
    deps=[sft_checkpoint],
    kinds={"huggingface"},
    tags={"stage": "evaluation"},
)
def huggingface_export(
    context: dg.AssetExecutionContext, config: ExportConfig, store: StoreResource
) -> dg.MaterializeResult:
    """The model as transformers' NanoChat, compared with the model itself before the folder is there."""
    recipe = required_recipe(context)
    opened = store.open()
    last = "sft" if recipe.sft else "mid" if recipe.midtrain else "base"
    folder = data_folder(opened) / "exports" / recipe.name

    from nanochat.huggingface.export import CARD, export_model

    try:
        record = export_model(opened, recipe.name, config.source or last, folder)  # type: ignore[arg-type]
    except ValueError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    context.log.info(f"{folder}: {record.summary()}")
    files = [
        {"file": file.name, "bytes": file.size_bytes, "sha256": file.sha256[:16]} for file in record.files
    ]
    return dg.MaterializeResult(
        metadata={
            "path": dg.MetadataValue.path(str(folder)),
            "stage": record.stage,
            "receipt": record.receipt_sha256[:12],
            "transformers": record.transformers,
            **{f"equal_{name}": count for name, count in record.compared.items()},
            "files": dg.MetadataValue.md(table(files)),
            "card": dg.MetadataValue.md((folder / CARD).read_text(encoding="utf-8")),
        }
    )
