"""Keep memory from one run to the next: `python live_restart.py FILE`, again and again."""

import sys

import kho

with kho.live.open("restarts", size="16M", version="1", backing=sys.argv[1]) as h:
    if h.inherited:
        print("run", h["runs"][0] + 1, "finds", h["table"].nbytes, "bytes in place")
    else:
        print("run 1 fills the table")
        table = h.empty("table", (1000, 1000), "f4")
        table[:] = 1.5
        h.empty("runs", 1, "i8")
        h.commit()
    runs = h.edit("runs")
    runs[0] += 1
    print("generation", h.commit(), "holds", h["table"].sum(dtype="f8"), "in", *h.names())
