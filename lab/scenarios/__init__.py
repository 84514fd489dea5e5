"""Scenarios, a module each: `def run(lab: Lab) -> Iterator[Claim]`. Its docstring begins with what it proves."""
