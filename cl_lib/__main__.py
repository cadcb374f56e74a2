import sys

from cl_lib.cli import main

sys.exit(main())
