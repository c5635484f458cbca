# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""`python -m trl_opd` is `trl-opd`."""

import sys

from .cli import main

sys.exit(main())
