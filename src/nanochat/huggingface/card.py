"""The model card: where the model comes from and what was measured, from receipts alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nanochat.data.sources import load_sources
from nanochat.export.markdown import number, table
from nanochat.export.report import total_seconds
from nanochat.recipes import Model, Recipe, parameters
from nanochat.store import ObjectStore
from nanochat.store.receipts import Receipt, read_receipt

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_DATA_SHOWN = 12


def lineage(store: ObjectStore, receipt: Receipt) -> list[Receipt]:
    """The receipts that this one was built on, and itself, upstream first.

    One that was rebuilt or is gone since is left out: it is not what went in.
    """
    found: dict[str, Receipt] = {}
    for used in receipt.inputs:
        made = read_receipt(store, used.stage, used.fingerprint)
        if made is not None and made.digest() == used.receipt_sha256:
            found |= {one.stage: one for one in lineage(store, made)}
    return [*found.values(), receipt]


def model_card(recipe: Recipe, built: Model, vocab_size: int, receipts: list[Receipt], *, chat: bool) -> str:
    """README.md of the export.

    built: the architecture that was exported, whatever the recipe says by now. receipts: upstream first;
    the last one is the exported stage's.
    """
    from huggingface_hub import ModelCard, ModelCardData

    results = [result for receipt in receipts for result in _evaluations(recipe, receipt)]
    source = load_sources().sources.get(recipe.data.source)
    repo = getattr(source, "repo", None)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["nanochat", *(["conversational"] if chat else [])],
        datasets=[repo] if repo else None,
        model_name=recipe.name if results else None,
        eval_results=results or None,
    )
    sections = [
        _head(recipe, built, vocab_size, receipts[-1].stage),
        _use(chat=chat),
        _measured(results),
        _lineage(receipts),
        _data(receipts),
    ]
    return str(
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(sections), ignore_metadata_errors=False)
    )


def _head(recipe: Recipe, built: Model, vocab_size: int, stage: str) -> str:
    return (
        f"# {recipe.name}\n\n{recipe.description}.\n\nA language model that was trained from scratch, after "
        f"its stage `{stage}`: {parameters(built, vocab_size):,} parameters, {built.depth} layers, "
        f"{built.width} wide, {built.heads} heads, context {built.context} tokens, vocabulary "
        f"{vocab_size:,}. Weights are fp32. Before this folder was finished, the ids, logits and greedy "
        "answers that transformers gives with it were compared with those of the model that was trained.\n"
    )


def _use(*, chat: bool) -> str:
    asked = (
        'ids = tokenizer.apply_chat_template([{"role": "user", "content": "What is your name?"}],\n'
        '    add_generation_prompt=True, return_tensors="pt", return_dict=True)'
        if chat
        else 'ids = tokenizer("Once upon a time", return_tensors="pt")'
    )
    limits = (
        "It calculates between `<|python_start|>` and `<|python_end|>`, and was trained to read the result "
        "between `<|output_start|>` and `<|output_end|>`; a server that does not put the result there lets "
        "it guess one. The chat template keeps special tokens that a user types as text; text that is "
        "tokenized without it is not protected.\n"
        if chat
        else "It continues text and was not trained to chat.\n"
    )
    return (
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or the name of its repository\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f"model = AutoModelForCausalLM.from_pretrained(folder)\n{asked}\n"
        "answer = model.generate(**ids, max_new_tokens=64)\n"
        'print(tokenizer.decode(answer[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))\n```\n\n'
        f"{limits}"
    )


def _measured(results: list[EvalResult]) -> str:
    rows = [
        {
            "data": result.dataset_name,
            "metric": result.metric_name,
            "value": number(result.metric_value),
            "measured in": result.task_name,
        }
        for result in results
    ]
    return f"## Evaluation\n\n{table(rows)}\n"


def _lineage(receipts: list[Receipt]) -> str:
    rows = [
        {
            "stage": receipt.stage,
            "fingerprint": receipt.fingerprint[:12],
            "receipt": receipt.digest()[:12],
            "seconds": round(total_seconds(receipt), 1),
            "dollars": round(receipt.dollars, 2),
            "code": (receipt.code_revision or "-")[:10],
        }
        for receipt in receipts
    ]
    return f"## Lineage\n\n{table(rows)}\n"


def _data(receipts: list[Receipt]) -> str:
    rows = [
        {"stage": receipt.stage, "data": name, "sha256": digest[:16]}
        for receipt in receipts
        for name, digest in receipt.data.items()
    ]
    more = f"\n\n… {len(rows) - _DATA_SHOWN} more, in the receipts" if len(rows) > _DATA_SHOWN else ""
    return f"## Data\n\n{table(rows[:_DATA_SHOWN])}{more}\n"


def _evaluations(recipe: Recipe, receipt: Receipt) -> Iterator[EvalResult]:
    """Bits per byte of the validation shard, and every share of questions that were answered rightly."""
    from huggingface_hub import EvalResult

    common: dict[str, Any] = {"task_type": "text-generation", "task_name": receipt.stage}
    metrics = receipt.metrics
    if "val_bpb" in metrics:
        yield EvalResult(
            **common,
            dataset_type=recipe.data.source,
            dataset_name=f"{recipe.data.source}, validation",
            metric_type="bits_per_byte",
            metric_name="bits per byte",
            metric_value=metrics["val_bpb"],
        )
    tasks = {"mmlu": recipe.sft.mmlu_task, "arc_easy": recipe.sft.arc_easy_task} if recipe.sft else {}
    for name in sorted(metrics):
        asked = metrics.get(f"{name.removesuffix('_correct')}_questions")
        if not name.endswith("_correct") or not asked:
            continue
        skill = name.removesuffix("_correct")
        task = tasks.get(skill) or skill
        yield EvalResult(
            **common,
            dataset_type=task,
            dataset_name=f"{task}, {asked:.0f} questions",
            metric_type="accuracy",
            metric_name="accuracy",
            metric_value=metrics[name] / asked,
        )
