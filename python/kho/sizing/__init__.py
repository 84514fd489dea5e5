"""The cost of a handover in advance: computed (`plan`), or measured in an arena (`simulate`)."""
