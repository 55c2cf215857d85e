"""What every part of saeflow needs and what knows nothing of SAEs. Read `errors` first.

errors      the error that a user can mend
text        text that is safe to print in a terminal
progress    progress bars and messages
threads     how many threads, and work spread over them
devices     processor or GPU: streams, pinned memory, copies
memory      how much memory a process takes and the machine has
sql_errors  the part of a DuckDB error that a user can act on
"""
