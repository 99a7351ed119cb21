from __future__ import annotations

from pathlib import Path

import pytest

from nanochat.data.conversations import Message
from nanochat.data.questions import (
    Question,
    QuestionError,
    from_arc_row,
    from_mmlu_row,
    read_questions,
    to_conversation,
    to_prompt,
    write_questions,
)

SKY = Question("sky", "What colour is the sky?", ("red", "blue"), ("A", "B"), "B", "nature")


def test_a_question_is_rendered_with_each_letter_right_behind_its_choice() -> None:
    assert to_prompt(SKY).messages == (
        Message(
            "user",
            "Multiple Choice question: What colour is the sky?\n- red=A\n- blue=B\n\n"
            "Respond only with the letter of the correct answer.",
        ),
    )
    assert to_conversation(SKY).messages == (*to_prompt(SKY).messages, Message("assistant", "B"))


def test_an_mmlu_row_names_its_answer_by_index() -> None:
    row = {"question": "1+1?", "subject": "", "choices": ["1", "2", "3", "4"], "answer": 1}
    assert from_mmlu_row(row, "x") == Question("x", "1+1?", ("1", "2", "3", "4"), ("A", "B", "C", "D"), "B")
    with pytest.raises(QuestionError, match="question x: the answer's index 4"):
        from_mmlu_row({**row, "answer": 4}, "x")


def test_an_arc_row_keeps_its_own_labels() -> None:
    row = {
        "id": "M_1",
        "question": "Why?",
        "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
        "answerKey": "3",
    }
    assert from_arc_row(row).letters == ("1", "2", "3")
    assert from_arc_row(row).answer == "3"
    with pytest.raises(QuestionError, match="M_1: the answer 'A' is none of"):
        from_arc_row({**row, "answerKey": "A"})


@pytest.mark.parametrize(
    ("choices", "letters", "answer", "reason"),
    [
        (("a", "b"), ("A",), "A", "2 choices, 1 letters"),
        (("a",), ("A",), "A", "at least two"),
        (("a", "b"), ("A", "A"), "A", "occurs twice"),
        (("a", "b"), ("A", "B"), "C", "is none of"),
    ],
)
def test_a_question_without_one_right_letter_cannot_be_made(
    choices: tuple[str, ...], letters: tuple[str, ...], answer: str, reason: str
) -> None:
    with pytest.raises(QuestionError, match=reason):
        Question("q", "?", choices, letters, answer)


def test_questions_survive_their_file_and_a_wrong_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    plain = Question("p", "Gleich?\n", ("ja", "nein", "c"), ("A", "B", "C"), "A")
    assert write_questions(path, [SKY, plain]) == 2
    assert list(read_questions(path)) == [SKY, plain]
    for line, reason in (
        (b"{", ":3: "),
        (b"[]", "expected an object"),
        (b'{"id": "x"}', "missing fields"),
        (b'{"id":"x","question":"?","choices":["a",1],"letters":["A","B"],"answer":"A"}', "choices"),
        (b'{"id":1,"question":"?","choices":["a","b"],"letters":["A","B"],"answer":"A"}', "id"),
        (
            b'{"id":"1","question":"?","choices":["a","b"],"letters":["A","B"],"answer":"A","subject":1}',
            "subject",
        ),
        (b"\xff", "utf-8"),
    ):
        write_questions(path, [SKY, plain])
        with path.open("ab") as file:
            file.write(line + b"\n")
        with pytest.raises(QuestionError, match=reason) as caught:
            list(read_questions(path))
        assert "questions.jsonl:3:" in str(caught.value)
