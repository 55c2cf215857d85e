"""Requests that an inference engine has answered, as documents: one safetensors file a request, or a batch of them.

files      one file: its token ids, and the requests in it
folder     every file of a folder, with its index, checked as a whole
documents  the requests as documents of a corpus
"""
