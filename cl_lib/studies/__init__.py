"""Many runs described in one file, ``notebooks/experiments/*.yaml``, and run by one command.

What a file may say stands in ``schema``, what it means in ``cells``. ``runner`` runs it by one of the ``backends``,
what was found is in a ``store`` at one of the ``places``, and ``frame`` reads the ``table`` of it.
"""

from cl_lib.results.table import frame as frame
