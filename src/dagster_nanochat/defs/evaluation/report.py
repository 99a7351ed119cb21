"""The report card."""

import json

import dagster as dg

from dagster_nanochat.defs.sft.assets import sft_checkpoint
from dagster_nanochat.partitions import model_partitions
from dagster_nanochat.resources import StoreResource
from dagster_nanochat.selection import required_recipe
from dagster_nanochat.views import data_folder
from nanochat.export.report import make_report
from nanochat.stages import resolve


@dg.asset(
    partitions_def=model_partitions,
    group_name="evaluation",
    deps=[sft_checkpoint],
    kinds={"markdown"},
    tags={"stage": "evaluation"},
)
def model_report(context: dg.AssetExecutionContext, store: StoreResource) -> dg.MaterializeResult:
    """Lineage, recipe, data digests, loss curves, metrics and samples of a model, on one page."""
    recipe = required_recipe(context)
    opened = store.open()
    states = resolve(recipe, opened)
    if all(state.receipt is None for name, state in states.items() if name in ("base", "midtrain", "sft")):
        raise dg.Failure(
            f"no stage of {recipe.name} has been built: run `dg launch --job model_training --partition "
            f"{recipe.name}` first",
            allow_retries=False,
        )
    report = make_report(recipe, states, opened)
    folder = data_folder(opened) / "reports" / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.md"
    path.write_text(report.markdown, encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report.document, indent=1), encoding="utf-8")
    for name, png in report.pictures.items():
        (folder / name).write_bytes(png)
    context.log.info(f"report: {path}")
    return dg.MaterializeResult(
        metadata={"report": dg.MetadataValue.md(report.inlined()), "path": dg.MetadataValue.path(str(path))}
    )
