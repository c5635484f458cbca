# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""`trl-opd report`: a run as one HTML file."""
