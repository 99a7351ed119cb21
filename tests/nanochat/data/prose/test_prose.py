from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from nanochat.data.prose.docstrings import read_file
from nanochat.data.prose.installation import PACKAGES
from nanochat.data.prose.quality import cut, documents, is_prose


def write_module(path: Path, source: str) -> Path:
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return path


def test_docstrings_of_modules_classes_methods_and_nested_functions_are_read(tmp_path: Path) -> None:
    path = write_module(
        tmp_path / "m.py",
        '''
        """This is what the module as a whole is about."""
        if True:
            class Thing:
                """A thing that other things can be made of."""
                def act(self):
                    """Do what the thing was made to do and return it."""
                    async def later():
                        """Do the same thing, but do it later than now."""
                try:
                    def risky(self):
                        """Do something that the platform may not have."""
                except ImportError:
                    pass
        add_docstr(torch.abs, r"""abs(input) -> Tensor

        Compute the absolute value of each element of {{input}}.
        {input}
        """.format(**args))
        add_newdoc("numpy", "ndarray", ("fill", """Fill the whole of the array with a scalar value."""))
        ''',
    )
    found = {name: text for name, _, text in read_file(str(path))}
    assert list(found) == [
        "",
        "Thing",
        "Thing.act",
        "Thing.act.later",
        "Thing.risky",
        "torch.abs",
        "numpy.ndarray.fill",
    ]
    assert found["torch.abs"] == (
        "abs(input) -> Tensor\n\nCompute the absolute value of each element of {input}."
    )


@pytest.mark.parametrize("source", ["def broken(:\n", "\x00", 'x = """text"""\n'])
def test_a_file_that_documents_nothing_or_cannot_be_parsed_is_passed_over(
    tmp_path: Path, source: str
) -> None:
    path = tmp_path / "m.py"
    path.write_text(source)
    assert read_file(str(path)) == []
    assert read_file(str(tmp_path / "absent.py")) == []


@pytest.mark.parametrize(
    ("why", "text"),
    [
        ("too short", "Return the name."),
        ("a licence", "Permission is hereby granted, free of charge, to any person obtaining a copy of it."),
        ("not English letters", "Возвращает имя объекта, который был передан этой функции при вызове."),
        (
            "a table",
            "+----+-----+\n| 12 | 3.4 |\n+----+-----+\n| 56 | 7.8 |\n+----+-----+ of numbers in a table",
        ),
        ("not prose", "alpha beta gamma delta epsilon zeta eta theta iota kappa " * 8),
        ("the same lines again", "The value of the thing is set to what it is.\n" * 40),
        ("an interpreter session", "The result of it is:\n" + ">>> f(a, b, c)\nabcdefghijk\n" * 60),
        ("not encodable", "The text holds \ud800, which is half of a character and no character."),
    ],
)
def test_what_is_not_prose_is_left_out(why: str, text: str) -> None:
    assert not is_prose(text), why


def test_prose_with_an_example_is_kept_and_its_white_space_is_tidied() -> None:
    text = "Return the sum of both numbers.\t\n\n\n\nThe order does not matter.\r\n\n>>> add(1, 2)\n3\n"
    assert list(documents(text)) == [
        (0, "Return the sum of both numbers.\n\nThe order does not matter.\n\n>>> add(1, 2)\n3")
    ]


def test_a_long_text_is_cut_between_paragraphs_and_nothing_is_lost() -> None:
    text = "\n\n".join(f"Paragraph {index} " + "of many words " * 30 for index in range(60))
    pieces = cut(text, 2_000)
    assert all(len(piece) <= 2_000 for piece in pieces)
    assert all(piece.startswith("Paragraph") for piece in pieces)
    assert "\n\n".join(pieces) == text
    assert "".join(cut("x" * 5_000, 2_000)) == "x" * 5_000


def test_every_package_that_is_read_is_pinned_by_the_project() -> None:
    lock = Path(__file__).parents[4] / "requirements.lock"
    if not lock.is_file():
        pytest.skip(f"{lock} is not there: this is not a checkout")
    pinned = {line.split("==")[0] for line in lock.read_text().splitlines() if "==" in line}
    assert set(PACKAGES) <= pinned
