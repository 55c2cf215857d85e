"""What a training keeps of each weight beside float32: Adam's moments in 8 bits, weights in bfloat16.

adam      Adam with moments in 8 bits
bfloat16  weights that are numbers of bfloat16, rounded at random
codes     which numbers 8 bits stand for; the kernels of a GPU read the same tables
kernels   Numba kernels for both
"""
