"""One file a backend, and none knows another. Each has these functions:

`attention(inputs)`: (B, H, N, D) in q's dtype.
`why_not(inputs)`: why it cannot compute that, "" when it can; for None, whether it can run on this machine at all.
`why_later(inputs)`, where it may be needed: why backend=None takes a later one although this one can, "" where not.
"""
