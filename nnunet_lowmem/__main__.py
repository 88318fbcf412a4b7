"""``python -m nnunet_lowmem`` is ``nnunet-lowmem``."""

import sys

from nnunet_lowmem.commands.cli import main

sys.exit(main())
