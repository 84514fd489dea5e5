"""What every test shares: how hypothesis runs."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# The model is slow on purpose and machines are shared, so a slow example is no failure.
settings.register_profile("quick", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
