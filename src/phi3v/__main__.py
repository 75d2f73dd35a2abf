"""`python -m phi3v`, as `torchrun -m phi3v` needs it."""

import sys

from phi3v.cli import main

sys.exit(main())
