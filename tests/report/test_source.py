"""The code that a chapter shows: every line but the docstrings."""

from cl_lib.report.source import code


def documented(x):
    """Words.

    More words.
    """
    return x + 1


class Thing:
    """Words."""

    size = 1

    def double(self, x):
        """Words."""
        text = """no docstring"""
        return 2 * x, text


def only_words():
    """Nothing else."""


def test_docstrings_go_and_code_stays():
    assert code(documented) == "def documented(x):\n    return x + 1"
    assert code(Thing) == (
        "class Thing:\n    size = 1\n\n    def double(self, x):\n"
        '        text = """no docstring"""\n        return 2 * x, text'
    )


def test_a_method_starts_at_the_margin_and_several_stand_apart():
    assert code(Thing.double, documented).startswith("def double(self, x):\n    text")
    assert "\n\ndef documented" in code(Thing.double, documented)


def test_a_body_of_words_alone_stays():
    assert '"""Nothing else."""' in code(only_words)
