import sys
import warnings

from cl_lib.cli import main

warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"

sys.exit(main())
