"""How KHO uses the memory of a machine, determined from files that need no root to read.

>>> report = kho.doctor.examine("hosts/default-scratch")
>>> report.headline
'KHO holds 192 MiB (9.6 % of RAM) as scratch; kernel memory and long-term pins cannot use it.'
>>> report.exit_code, report.scratch
(1, 201326592)
"""

from __future__ import annotations

from .examine import examine
from .kernellog import Evidence
from .report import Finding, Report
from .rules import RULES, Rule
from .scratch import Area
from .tree import Unread
from .whatif import WhatIf, what_if

__all__ = ["RULES", "Area", "Evidence", "Finding", "Report", "Rule", "Unread", "WhatIf", "examine", "what_if"]
