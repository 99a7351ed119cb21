from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq
import pytest
from standins.task_rows import load_task

from nanochat.data.conversations import Message, Part, problem
from nanochat.data.questions import render
from nanochat.data.stage_data import StoredHub
from nanochat.data.tasks import RowProblem, TaskContext, TaskError, find_task, load_questions
from nanochat.data.tasks.gsm8k import answer_parts
from nanochat.store import FileStore

GSM_ROW = {
    "question": "How many clips?",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\nThat is 48+24 = $<<48+24=72>>72.\n#### 72",
}


def mmlu_row(index: int, answer: int = 1) -> dict[str, Any]:
    return {"question": f"Which? {index}", "subject": "logic", "choices": list("wxyz"), "answer": answer}


def arc_row(index: int) -> dict[str, Any]:
    return {
        "id": f"M_{index}",
        "question": f"Why? {index}",
        "choices": {"text": ["p", "q", "r"], "label": ["A", "B", "C"]},
        "answerKey": "C",
    }


def chat_row(index: int, *roles: str) -> dict[str, Any]:
    roles = roles or ("user", "assistant")
    return {"messages": [{"role": role, "content": f"{role} {index}"} for role in roles], "source": "x"}


MakeHub = Callable[[dict[str, list[dict[str, Any]]]], Any]


def test_calculator_marks_become_calls_and_outputs() -> None:
    assert answer_parts(GSM_ROW["answer"]) == (
        Part("text", "She sold 48/2 = "),
        Part("python", "48/2"),
        Part("python_output", "24"),
        Part("text", "24 clips in May.\nThat is 48+24 = $"),
        Part("python", "48+24"),
        Part("python_output", "72"),
        Part("text", "72.\n#### 72"),
    )
    assert answer_parts("No sum.\n#### 3") == (Part("text", "No sum.\n#### 3"),)


def test_gsm8k_rows_are_conversations_with_calls(make_hub: MakeHub) -> None:
    context = TaskContext(hub=make_hub({"openai/gsm8k/main/train": [GSM_ROW] * 3}))
    rows = load_task("gsm8k", split="train", rows=8_000, seed=1, context=context)
    assert len(rows) == 3, "asked for more than there are, all are taken"
    assert rows[0].messages[0] == Message("user", "How many clips?")
    assert rows[0].messages[1].content == answer_parts(GSM_ROW["answer"])


def test_a_sample_of_a_dataset_is_fixed_by_its_seed(make_hub: MakeHub) -> None:
    context = TaskContext(
        hub=make_hub({"HuggingFaceTB/smol-smoltalk/default/train": [chat_row(i) for i in range(50)]})
    )
    some = load_task("smoltalk", split="train", rows=10, seed=1, context=context)
    assert len(set(some)) == 10
    assert some == load_task("smoltalk", split="train", rows=10, seed=1, context=context)
    assert some != load_task("smoltalk", split="train", rows=10, seed=2, context=context)
    assert len(load_task("smoltalk", split="train", rows=None, seed=1, context=context)) == 50


def test_a_row_that_is_no_conversation_is_left_out_and_named(make_hub: MakeHub) -> None:
    rows = [chat_row(0), chat_row(1, "user", "user"), chat_row(2, "system", "user", "assistant")]
    context = TaskContext(hub=make_hub({"HuggingFaceTB/smol-smoltalk/default/train": rows}))
    found = list(find_task("smoltalk").generate(context, "train", None, 1))
    assert [isinstance(row, RowProblem) for row in found] == [False, True, False]
    assert isinstance(found[1], RowProblem)
    assert found[1].row == "HuggingFaceTB/smol-smoltalk/train/1"
    assert "message 2: role 'user'" in found[1].reason
    assert len(load_task("smoltalk", split="train", rows=None, seed=1, context=context)) == 2


def test_mmlu_and_arc_are_multiple_choice_conversations_and_questions(make_hub: MakeHub) -> None:
    context = TaskContext(
        hub=make_hub(
            {
                "cais/mmlu/all/auxiliary_train": [mmlu_row(i) for i in range(4)],
                "cais/mmlu/all/test": [mmlu_row(i) for i in range(5)] + [mmlu_row(9, answer=7)],
                "allenai/ai2_arc/ARC-Easy/train": [arc_row(i) for i in range(4)],
                "allenai/ai2_arc/ARC-Easy/test": [arc_row(i) for i in range(6)],
                "allenai/ai2_arc/ARC-Challenge/train": [arc_row(i) for i in range(4)],
            }
        )
    )
    questions = load_questions("mmlu", split="test", context=context)
    assert [question.id for question in questions] == [f"cais/mmlu/test/{i}" for i in range(5)]
    assert questions[0].subject == "logic"
    assert load_questions("arc_easy", split="test", context=context)[2].id == "M_2"
    assert len(load_questions("arc_easy", split="test", context=context, limit=3)) == 3
    for task, answer in (("mmlu_auxiliary_train", "B"), ("arc_easy", "C"), ("arc_challenge", "C")):
        row = load_task(task, split="train", rows=None, seed=1, context=context)[0]
        assert row.messages[1] == Message("assistant", answer)
        assert row.messages[0].text.startswith("Multiple Choice question: W")
    assert "- z=D\n" in render(questions[0])


def test_a_missing_column_is_named_with_its_file(make_hub: MakeHub) -> None:
    context = TaskContext(hub=make_hub({"openai/gsm8k/main/train": [{"q": "a", "answer": "b"}] * 2}))
    with pytest.raises(
        TaskError, match=r"openai/gsm8k/train \(main, 00000.parquet\) has no column \['question'\]"
    ):
        load_task("gsm8k", split="train", rows=None, seed=1, context=context)


@pytest.mark.needs_data
@pytest.mark.parametrize(
    ("task", "split", "repo", "folder"),
    [
        ("gsm8k", "train", "openai--gsm8k", "main/train"),
        ("gsm8k", "test", "openai--gsm8k", "main/test"),
        ("smoltalk", "train", "HuggingFaceTB--smol-smoltalk", "default/train"),
        ("mmlu_auxiliary_train", "train", "cais--mmlu", "all/auxiliary_train"),
        ("mmlu", "test", "cais--mmlu", "all/test"),
        ("mmlu", "validation", "cais--mmlu", "all/validation"),
        ("arc_easy", "train", "allenai--ai2_arc", "ARC-Easy/train"),
        ("arc_easy", "test", "allenai--ai2_arc", "ARC-Easy/test"),
        ("arc_challenge", "train", "allenai--ai2_arc", "ARC-Challenge/train"),
    ],
)
def test_every_row_of_the_real_data_is_read(
    real_hub: Any, task: str, split: Any, repo: str, folder: str
) -> None:
    context = TaskContext(hub=real_hub)
    files = sorted((real_hub.root / repo / folder).glob("*.parquet"))
    total = sum(pq.read_metadata(path).num_rows for path in files)
    found = list(find_task(task).generate(context, split, None, 1))
    assert [row for row in found if isinstance(row, RowProblem)] == []
    assert len(found) == total
    assert all(problem(row) is None for row in found if not isinstance(row, RowProblem))
    if task == "gsm8k":
        answers = [row.messages[1] for row in found if not isinstance(row, RowProblem)]
        assert all("#### " in answer.text.splitlines()[-1] for answer in answers)
        assert not any("<<" in answer.text for answer in answers)


@pytest.mark.needs_data
def test_task_data_comes_through_the_hubs_own_client_and_stays_in_the_store(
    shared_hub: object, tmp_store: FileStore
) -> None:
    with pytest.raises(TaskError, match="openai/gsm8k"):
        find_task("gsm8k").inputs(TaskContext(hub=StoredHub(tmp_store, fetch=False)))
    fetching = TaskContext(hub=StoredHub(tmp_store, fetch=True))
    rows = load_task("gsm8k", split="train", rows=20, seed=1, context=fetching)
    assert len(rows) == 20
    digests = find_task("gsm8k").inputs(fetching)
    assert set(digests) == {"train", "test"}
    assert find_task("gsm8k").inputs(TaskContext(hub=StoredHub(tmp_store, fetch=False))) == digests
