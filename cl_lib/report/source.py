"""Code as a chapter shows it: the library's own lines without their docstrings, whose words the text has."""

import ast
import inspect
import textwrap


def code(*things) -> str:
    """The source of functions, methods and classes, one after another, without their docstrings.

    Arguments:
        things: what ``inspect.getsource`` takes.
    """
    return "\n\n".join(map(_plain, things))


def _plain(thing) -> str:
    text = textwrap.dedent(inspect.getsource(thing))
    lines = text.splitlines()
    documented = ast.AsyncFunctionDef | ast.FunctionDef | ast.ClassDef
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented) and ast.get_docstring(node)]
    for first in sorted((node.body[0] for node in nodes if len(node.body) > 1), key=lambda n: n.lineno, reverse=True):
        end = first.end_lineno
        if not lines[end].strip():  # the empty line after a docstring
            end += 1
        del lines[first.lineno - 1 : end]
    return "\n".join(lines)
