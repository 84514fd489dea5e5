"""What a handover costs before there is one: worked out (`plan`), or made in an arena and measured (`simulate`)."""
