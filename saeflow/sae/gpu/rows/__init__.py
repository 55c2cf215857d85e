"""Gradients of the rows of both matrices, by feature, and the optimizer's step of each.

by_feature  entries sorted by feature, segments of long features, sums by feature
update      gradients of the rows of both matrices and Adam's step, in one kernel
adam        Adam's step of a row, and the rows that take one
dense       Adam's step in 8 bits, and rounding, of rows whose gradient exists
moments     Adam's moments in float32 or 8 bits, and weights in bfloat16
"""
