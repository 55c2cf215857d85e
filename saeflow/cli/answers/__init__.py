"""Commands that answer.

ask       the named questions
sql       your own SQL
reply     how an answer is given: format, place, rows
render    write an answer in a format
screen    answers on a terminal
contexts  tokens in their context on a terminal, shaded by value
"""
