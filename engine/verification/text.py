"""Text to run a model on: a page about the sea, written for this."""

TEXT = """\
The tide tables for the harbour are printed every winter, four months before anyone needs them. A clerk copies the
heights of high water from the computation, checks each page against the year before, and sends the proofs to a printer
in the next town. Nobody has found a mistake in them since 1974, when two lines in October were exchanged and a
sailing barge sat on the mud for eleven hours. "We read it in the paper," said the harbour master, "and then we read the
table again." Computing a tide is simple in principle: the sea answers the moon and the sun, and its answer is a sum of
waves whose periods are known to many digits. A harbour needs some thirty of them. The largest has a period of 12.42
hours; the smaller ones tell apart spring and neap, summer and winter, deep water and shallow. What cannot be computed
is the wind. A gale from the north may hold the water in the estuary for a whole day, and then the table is wrong by a
metre, which every fisherman knows and no table says. In the evening the boats come back in a line: red, white, red,
green. Someone counts them from the quay. For i in range(7): print(i, i * i) is what the clerk's daughter wrote on the
back of last year's edition, and below it the squares: 0, 1, 4, 9, 16, 25, 36.
"""
