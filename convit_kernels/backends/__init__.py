"""One file a backend, and none knows another. Each has these functions:

`attention(inputs)`: (B, H, N, D) in q's dtype.
`why_not(inputs)`: why it cannot compute that, "" when it can; for None, whether it can run on this machine at all.
`why_slower(inputs)`, where it may be needed: why a later backend is expected to be faster for these, "" where none is.
"""
