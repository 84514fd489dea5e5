"""The lab: real kernels in virtual machines, and claims about kho that are held against them.

A scenario is a module of `lab.scenarios` with `def run(lab: Lab) -> Iterator[Claim]`. lab/README.md says how to run
and add one.
"""

from .bench import Lab
from .claims import Claim
from .qemu import Console

__all__ = ["Claim", "Console", "Lab"]
