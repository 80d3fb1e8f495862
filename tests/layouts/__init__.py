"""Any layout, the numbers of one rank; any layout goes on from any other; `python -m tests.layouts` prints the tables of docs/layouts.md.

run       what is trained, on how many ranks, and what comes out
cases     the layouts of the matrix
drawing   layouts drawn at random
compare   how far a layout is from one rank
reshard   from layout to layout, through the command line
sweep     one after the other, in a file in which a sweep that was ended goes on
"""
