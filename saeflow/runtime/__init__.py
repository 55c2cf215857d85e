"""What every part of saeflow needs and what knows nothing of SAEs. Read `errors` first.

errors      the error that a user can fix
text        text for people: safe to print, short, sizes in words, names like a mistyped one
terminal    the one place that prints
progress    progress bars and messages
threads     how many threads, and work spread over them
compiled    loops compiled by Numba
linear      the product rows @ weights.T, and the precision it is quickest in
ranks       processes that work together, as torchrun starts them
devices     processor or GPU: streams, pinned memory, copies
interrupts  Ctrl-C and SIGTERM that wait until a step is done
memory      how much memory and time work takes, and how much memory the machine has
temporary   temporary folders, and what is said if they are full
sql_errors  the part of a DuckDB error that a user can act on
sql_judge   whether a statement only reads, as DuckDB parses and plans it
"""
